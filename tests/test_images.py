"""The one reader of images: what it accepts, what it makes of it, names of any kind, photographs."""

import contextlib
import io
import os
import re
import shutil
import struct
import unittest
import warnings
from unittest import mock

import numpy as np
from PIL import Image, ImageOps

import defend
from model import De3, UserError
from support import cli, data
from support import run as run_module
from tests.helpers import (assert_refused, copy_of_photos, finished, new_folder, photo_classifier,
                           photo_flags, photos, read_csv, run, training)

BYTES_NAME = os.fsdecode(b"caf\xe9")  # not UTF-8


def on_white(color, alpha):
    """A color of this opacity, both 0..255, laid on white."""
    return [round(255 + alpha / 255 * (value - 255)) for value in color]


def exif(*entries, end=b""):
    """An EXIF block of entries (tag, type, count, four bytes), and what comes behind them."""
    packed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + b"\0\0\0\0" + end


def short(value):
    """The four bytes of a SHORT."""
    return struct.pack("<HH", value, 0)


class TestTransparency(unittest.TestCase):
    """Transparent images of every kind are laid on white."""

    def read(self, image, suffix=".png", **settings):
        """The pixels that read_image makes of an image saved with these settings: [H, W, 3]."""
        path = new_folder() / f"image{suffix}"
        image.save(path, **settings)
        read = data.read_image(path)
        self.assertEqual(read.mode, "RGB")
        return np.array(read).astype(int)

    def assert_colors(self, pixels, expected):
        np.testing.assert_allclose(pixels[0], expected, atol=1)

    def test_alpha_channel(self):
        """Opaque, half and wholly transparent pixels, one row of each."""
        alphas = [255, 128, 0]
        colored = Image.fromarray(np.array([[[200, 0, 100, a] for a in alphas]], np.uint8))
        gray = Image.fromarray(np.array([[[40, a] for a in alphas]], np.uint8), "LA")
        for suffix, settings in ((".png", {}), (".tif", {}), (".webp", dict(lossless=True, exact=True))):
            with self.subTest(suffix):
                self.assert_colors(self.read(colored, suffix, **settings),
                                   [on_white((200, 0, 100), a) for a in alphas])
                if suffix != ".webp":
                    self.assert_colors(self.read(gray, suffix), [on_white((40,) * 3, a) for a in alphas])

    def test_palette(self):
        """One transparent color, an opacity of each, and a palette with an alpha channel."""
        palette = [(200, 0, 100), (0, 0, 0), (10, 250, 30)]
        image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
        image.putpalette(sum(palette, ()))
        self.assert_colors(self.read(image), palette)
        self.assert_colors(self.read(image, transparency=1), [palette[0], (255,) * 3, palette[2]])
        self.assert_colors(self.read(image, transparency=bytes([0, 128, 255])),
                           [on_white(color, a) for color, a in zip(palette, (0, 128, 255))])
        with_alpha = image.convert("PA")
        with_alpha.putalpha(Image.fromarray(np.array([[0, 128, 255]], np.uint8)))
        self.assertEqual(with_alpha.mode, "PA")
        self.assert_colors(self.read(with_alpha, ".tif"),
                           [on_white(color, a) for color, a in zip(palette, (0, 128, 255))])

    def test_transparent_color(self):
        """PNG names one gray or one color as transparent, without an alpha channel."""
        gray = Image.fromarray(np.array([[7, 0, 90]], np.uint8))
        self.assert_colors(self.read(gray), [(7,) * 3, (0,) * 3, (90,) * 3])
        self.assert_colors(self.read(gray, transparency=0), [(7,) * 3, (255,) * 3, (90,) * 3])
        colors = [(0, 0, 0), (1, 2, 3), (200, 0, 100)]
        colored = Image.fromarray(np.array([colors], np.uint8))
        self.assert_colors(self.read(colored, transparency=(1, 2, 3)),
                           [colors[0], (255,) * 3, colors[2]])
        black_and_white = gray.point(lambda value: 255 * (value > 50)).convert("1")
        self.assert_colors(self.read(black_and_white), [(0,) * 3, (0,) * 3, (255,) * 3])
        self.assert_colors(self.read(black_and_white, transparency=0), [(255,) * 3] * 3)

    def test_drawing(self):
        """Black on a transparent ground stays a drawing, turned ones included, and is trained so."""
        pixels = np.zeros((32, 32, 4), np.uint8)
        pixels[8:24, 4:12, 3] = 255
        turned = Image.Exif()
        turned[0x0112] = 6
        read = self.read(Image.fromarray(pixels), exif=turned)
        self.assertEqual(read.mean(), 255 * (1 - 16 * 8 / 32**2))
        self.assertTrue((read[4:12, 8:24] == 0).all())
        folder = copy_of_photos()
        Image.fromarray(pixels).save(folder / "train" / "red" / "0.png")
        images, labels, _ = data.load_images(str(folder), "train", 32)
        means = images[labels == 2].double().mean((1, 2, 3)) - 255 * (1 - 16 * 8 / 32**2)
        self.assertEqual((means.abs() < 1).sum(), 1)


class TestTurning(unittest.TestCase):
    """Photographs are turned as the camera was held."""

    def setUp(self):
        random = np.random.default_rng(0)
        self.image = Image.fromarray(random.integers(0, 256, (2, 3, 3), np.uint8)).resize((48, 32), 0)

    def saved(self, suffix=".jpg", **settings):
        path = new_folder() / f"photo{suffix}"
        self.image.save(path, **settings)
        return path

    def assert_turned(self, path, orientation):
        """As the stored image, read without EXIF, is to be turned."""
        with Image.open(path) as stored:
            unturned = Image.fromarray(np.array(stored.convert("RGB")))
        if path.suffix == ".tif":  # Pillow turns these itself
            unturned = self.image
        unturned.getexif()[0x0112] = orientation
        expected = np.array(ImageOps.exif_transpose(unturned))
        np.testing.assert_array_equal(np.array(data.read_image(path)), expected)

    def test_every_orientation(self):
        """In every format that has the tag."""
        for orientation in range(1, 9):
            tag = Image.Exif()
            tag[0x0112] = orientation
            for suffix in (".jpg", ".png", ".webp", ".tif"):
                with self.subTest(orientation=orientation, suffix=suffix):
                    self.assert_turned(self.saved(suffix, exif=tag), orientation)

    def test_damaged_exif(self):
        """Other entries may hold anything; where the block itself is broken the image is as stored."""
        turn = (0x0112, 3, 1, short(6))
        for block, orientation in [
                (exif((0x0100, 9, 1, struct.pack("<i", -5)), turn), 6),  # a negative width
                (exif((0x010F, 2, 10**6, struct.pack("<I", 10**7)), turn), 6),  # text beyond the end
                (exif((0x8769, 4, 1, struct.pack("<I", 10**8)), turn), 6),  # a folder beyond the end
                (exif((0x0112, 3, 1, short(77))), 1), (exif((0x0112, 2, 4, b"six\0")), 1),
                (exif((0x0112, 3, 0, short(6))), 1), (exif(turn)[:-9], 1), (b"Exif\0\0", 1),
                (b"Exif\0\0garbage", 1), (b"Exif\0\0II*\0\xff\xff\xff\xff", 1)]:
            with self.subTest(block), warnings.catch_warnings(action="ignore"):  # Pillow's
                path = self.saved(exif=block)
                read = np.array(data.read_image(path))
                self.assertEqual(read.shape, (48, 32, 3) if orientation == 6 else (32, 48, 3))
                self.assert_turned(path, orientation)

    def test_in_a_data_folder(self):
        folder = copy_of_photos()
        block = exif((0x0100, 9, 1, struct.pack("<i", -5)), (0x0112, 3, 1, short(6)))
        self.image.save(folder / "train" / "red" / "0.jpg", exif=block)
        images, _, _ = data.load_images(str(folder), "train", 32)
        self.assertEqual(len(images), 25)


class TestRefused(unittest.TestCase):
    """What is not accepted is refused with the list of what is."""

    def assert_unreadable(self, path, *words):
        with self.assertRaises(UserError) as caught:
            data.read_image(path)
        for word in (*words, str(path), "JPEG, PNG, BMP, PPM, TIFF, WEBP", "8 bits"):
            self.assertIn(word, str(caught.exception))
        self.assertEqual(len(str(caught.exception).splitlines()), 1)

    def test_other_formats(self):
        """Whatever their names end in; nothing is handed to another program."""
        folder, image = new_folder(), Image.new("RGB", (9, 9))
        buffer = io.BytesIO()
        image.save(buffer, "GIF")
        for name, content in [
                ("a.gif", buffer.getvalue()), ("b.png", buffer.getvalue()),
                ("c.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)),
                ("d.avif", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(99)), ("e.svg", b"<svg/>"),
                ("f.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n"),
                ("g.jpg", b""), ("h.png", b"no image")]:
            (folder / name).write_bytes(content)
            with self.subTest(name), mock.patch("subprocess.check_call", side_effect=AssertionError):
                self.assert_unreadable(folder / name)

    def test_formats_that_are_accepted(self):
        folder = new_folder()
        for suffix in (".jpg", ".jfif", ".png", ".bmp", ".ppm", ".tif", ".webp"):
            Image.new("RGB", (9, 5), (200, 100, 50)).save(folder / f"a{suffix}")
            read = data.read_image(folder / f"a{suffix}")
            self.assertEqual((read.mode, read.size), ("RGB", (9, 5)))
            np.testing.assert_allclose(np.array(read), np.full((5, 9, 3), (200, 100, 50)), atol=3)
        Image.new("CMYK", (9, 5)).save(folder / "b.jpg")
        self.assertEqual(data.read_image(folder / "b.jpg").getpixel((0, 0)), (255, 255, 255))

    def test_damaged(self):
        folder = new_folder()
        for suffix in (".jpg", ".png", ".tif"):
            random = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(random).save(folder / f"a{suffix}")
            whole = (folder / f"a{suffix}").read_bytes()
            (folder / f"a{suffix}").write_bytes(whole[:len(whole) // 2])
            self.assert_unreadable(folder / f"a{suffix}")
        with self.assertRaisesRegex(UserError, "there is no file .*none.png"):
            data.read_image(folder / "none.png")

    def test_more_than_8_bits(self):
        folder = new_folder()
        for name, dtype in (("a.png", np.uint16), ("a.tif", np.uint16), ("b.tif", np.float32)):
            Image.fromarray(np.full((9, 9), 30000, dtype)).save(folder / name)
            self.assert_unreadable(folder / name, "more than 8 bits")

    def test_strip(self):
        """Enlarged to the model's size it would take gigabytes; a wide picture is none."""
        folder = new_folder()
        for name, size in (("a.png", (20_000, 3)), ("b.png", (3, 20_000)), ("c.png", (151, 3))):
            Image.new("RGB", size).save(folder / name)
            self.assert_unreadable(folder / name, f"a strip of {size[0]}x{size[1]} pixels")
        Image.new("RGB", (150, 3)).save(folder / "d.png")
        self.assertEqual(data.read_image(folder / "d.png").size, (150, 3))

    def test_in_a_data_folder(self):
        """Named, with images loaded in this process and in a loading process."""
        folder = copy_of_photos()
        broken = folder / "train" / "red" / "broken.png"
        broken.write_bytes(b"no image")
        for small, workers in ((data.SMALL, 0), (31, 0), (31, 1)):
            with mock.patch.object(data, "SMALL", small):
                refused = run("pretrain", *photo_flags(folder), *training(), "--workers", workers,
                              "--out", new_folder() / "nim")
            assert_refused(refused, (broken, "JPEG, PNG"))


class TestNames(unittest.TestCase):
    """File and folder names are bytes that need not be text."""

    def test_in_a_data_folder(self):
        folder = copy_of_photos()
        red = folder / "train" / "red"
        (red / "0.png").rename(red / f"{BYTES_NAME}.png")
        (folder / "train" / "blue").rename(folder / "train" / BYTES_NAME)
        for small in (data.SMALL, 31):
            with mock.patch.object(data, "SMALL", small):
                images = data.load_training_images(str(folder), 32, data.eval_transform(32), 0)
            self.assertEqual(len(images), 24)
            self.assertEqual(images.classes, ["caf\udce9", "green", "red"])
            self.assertEqual([int(images[i][1]) for i in range(24)], [0] * 8 + [1] * 8 + [2] * 8)

    def test_through_the_stages(self):
        """A class and an image; what cannot be written to the terminal becomes a question mark."""
        folder, out = copy_of_photos(), new_folder()
        for split in ("train", "val"):
            (folder / split / "red").rename(folder / split / BYTES_NAME)
            (folder / split / "blue" / "0.png").rename(folder / split / "blue" / f"{BYTES_NAME}.png")
        finished(run("pretrain", *photo_flags(folder), *training(), "--out", out / "nim"))
        finished(run("finetune", "--autoencoder", out / "nim", *training(), "--workers", 0))
        photo = folder / "val" / BYTES_NAME / "0.png"
        argv = ["defend.py", str(out / "de3"), "--sigma", "0", "--device", "cpu", "--photos", str(photo),
                "--out", str(out)]
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "ascii")) as terminal, \
                mock.patch("sys.argv", argv), warnings.catch_warnings(action="ignore"):
            cli.run_script(defend.main)
            terminal.flush()
            printed = terminal.buffer.getvalue().decode("ascii")
        self.assertIn("/val/caf?/0.png", printed)
        finished(run("defend", out / "de3", "--images", 6, "--steps", 1, "--eot", 1))
        broken = folder / "val" / f"{BYTES_NAME}.png"
        broken.write_bytes(b"no image")
        assert_refused(run("defend", out / "de3", "--photos", broken), broken)

    def test_photograph(self):
        """Read, and its purified picture is written under the same bytes."""
        path, out = new_folder() / f"{BYTES_NAME}.png", new_folder()
        path.write_bytes((photos() / "val/red/0.png").read_bytes())
        result = finished(run("defend", photo_classifier(), "--photos", path, "--sigma", 0, "--out", out))
        self.assertIn("de3, σ = 0: ", result.out)
        written = b"0001_caf\xe9_de3_sigma0.png"
        self.assertEqual(os.listdir(os.fsencode(out / "purified")), [written])


class TestPhotographs(unittest.TestCase):
    """defend.py's own photographs."""

    def purified(self, out):
        """The purified pictures in a folder: {name: pixels}."""
        return {path.name: np.array(Image.open(path)) for path in sorted((out / "purified").iterdir())}

    def defend(self, *names, out):
        return finished(run("defend", photo_classifier(), "--photos", *names, "--sigma", 0, "--out", out))

    def test_two_of_one_name(self):
        """Of two folders: both are kept, and each is its own picture."""
        red, blue = photos() / "val/red/0.png", photos() / "val/blue/0.png"
        alone = []
        for photo in (red, blue):
            out = new_folder()
            self.defend(photo, out=out)
            self.assertEqual(list(self.purified(out)), ["0001_0_de3_sigma0.png"])
            alone += self.purified(out).values()
        self.assertFalse(np.array_equal(*alone))
        out = new_folder()
        self.defend(red, blue, out=out)
        found = self.purified(out)
        self.assertEqual(list(found), ["0001_0_de3_sigma0.png", "0002_0_de3_sigma0.png"])
        for written, expected in zip(found.values(), alone):
            np.testing.assert_array_equal(written, expected)

    def test_two_defenses_of_one_level(self):
        """A picture each, under the name that predictions.csv says."""
        out = new_folder()
        finished(run("defend", photo_classifier(), "--photos", photos() / "val/red/0.png", "--defense", "de3:50",
                     "no-denoise:50", "--out", out))
        names = [row["purified"] for row in read_csv(out / "predictions.csv")]
        self.assertEqual(sorted(names), list(self.purified(out)))
        self.assertEqual(len(set(names)), 2)

    def test_answers(self):
        """The likeliest classes of each photograph with each defense; one purified picture of each."""
        out, names = new_folder(), [photos() / "val/red/0.png", photos() / "val/blue/1.png"]
        result = finished(run("defend", photo_classifier("clean"), photo_classifier(), "--photos", *names,
                              "--sigma", "off", 0, 50, "--out", out))
        for name in names:
            for words in ("clean", "de3, off", "de3, σ = 0", "de3, σ = 50"):
                answer = r"(red|green|blue) [\d.]+%"
                answers = re.findall(rf"^{name}  {words}: {answer}, {answer}, {answer}$", result.out, re.M)
                self.assertEqual([len(set(answer)) for answer in answers], [3], words)
        self.assertEqual(list(self.purified(out)), [
            "0001_0_de3_sigma0.png", "0001_0_de3_sigma50.png",
            "0002_1_de3_sigma0.png", "0002_1_de3_sigma50.png"])
        rows = read_csv(out / "predictions.csv")
        self.assertEqual([row["photo"] for row in rows], [str(name) for name in names for _ in range(4)])
        self.assertTrue(all(row["likely"].startswith(row["answer"]) for row in rows))

    def test_needs_a_run(self):
        """The digits' are not taken for photographs unless they are named; a run behind --photos is noticed."""
        photo = photos() / "val/red/0.png"
        assert_refused(run("defend", "--photos", photo), "photographs need a run")
        assert_refused(run("defend", "--photos", photo, photo_classifier()), "is a run: put it in front")

    def test_without_class_folders(self):
        """No accuracy, said once; photographs that were trained on are counted."""
        out, folder = new_folder(), new_folder()
        shutil.copy(photos() / "train/red/0.png", folder / "mine.png")
        result = self.defend(folder, out=out)
        self.assertEqual(result.out.count("no accuracy: no folder of these photographs is named as a class"), 1)
        self.assertIn("note: 1 of these 1 images are training images", result.out)

    def test_folder(self):
        """Every image in it; class folders give an accuracy and a confusion matrix; odd files are named."""
        folder, out = new_folder() / "mine", new_folder()
        shutil.copytree(photos() / "val", folder)
        (folder / "red" / "notes.txt").write_text("no image")
        (folder / "red" / "broken.jpg").write_text("no image")
        result = self.defend(folder, out=out)
        rows = read_csv(out / "predictions.csv")
        self.assertEqual(len(rows), 24)
        right = sum(row["folder"] == row["answer"] for row in rows)
        self.assertRegex(result.out, rf"\n.*: {100 * right / 24:.1f} \[.*\] % of 24 photographs")
        self.assertIn(f"cannot read image {folder}/red/broken.jpg", result.out)
        counts = re.findall(r"^(?:blue|green|red) +(\d+) +(\d+) +(\d+)$", result.out, re.M)
        self.assertEqual(sum(int(count) for row in counts for count in row), 24)
        self.assertEqual(sum(int(row[i]) for i, row in enumerate(counts)), right)

    def test_out(self):
        """In the current folder, never beside bundled weights."""
        here = new_folder()
        with contextlib.chdir(here):
            finished(run("defend", photo_classifier(), "--photos", photos() / "val/red/0.png", "--sigma", 0))
        self.assertTrue((here / "runs/photos/predictions.csv").exists())

    def test_purified_picture(self):
        """What the classifier saw, in the draw that was classified."""
        out = new_folder()
        self.defend(photos() / "val/red/0.png", out=out)
        checkpoint = run_module.read(photo_classifier())
        image = data.as_floats(data.to_size(data.read_image(photos() / "val/red/0.png"), 32))[None]
        expected = De3(run_module.build(checkpoint["autoencoder"]), None, 0).purify(image)
        found = self.purified(out)["0001_0_de3_sigma0.png"].transpose(2, 0, 1) / 255
        np.testing.assert_allclose(found, expected[0].numpy(), atol=1 / 255)

    def test_refused(self):
        """What changes nothing for photographs; a folder without any."""
        folder, empty = photos() / "val/red", new_folder()
        assert_refused(run("defend", photo_classifier(), "--photos", empty), (empty, "no image"))
        for flag, value in (("--eps", 0.1), ("--steps", 2), ("--eot", 2), ("--split", "val")):
            refused = run("defend", photo_classifier(), flag, value, "--photos", folder / "0.png")
            assert_refused(refused, (flag, "for photos"))


if __name__ == "__main__":
    unittest.main()
