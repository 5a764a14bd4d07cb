"""Folders of images as people have them: what counts, what is decided by it, and what may change."""

import contextlib
import io
import os
import shutil
import unittest
from pathlib import Path

import numpy as np
from PIL import Image

from model import UserError
from support import data
from tests.helpers import (assert_refused, assert_same_run, copy_of_photos, cut_after, finished,
                           new_folder, photo_autoencoder, photo_flags, photos, read_csv, run, saved,
                           training)


def write_images(folder, names, size):
    """Random pictures of this size (width, height) under these names in the folder."""
    random = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / name)


class TestWhatCounts(unittest.TestCase):
    def clutter(self, folder):
        """What systems and programs leave behind, beside the class folders and inside them."""
        for place in (folder, *folder.glob("*"), *folder.glob("*/*")):
            for name in (".DS_Store", ".gitkeep", "._0.png", "Thumbs.db", "notes.txt", ".hidden.png"):
                (place / name).write_bytes(b"no image")
            for name in (".ipynb_checkpoints", ".thumbnails"):
                (place / name).mkdir()
                (place / name / "0.png").write_bytes(b"no image")
        for split in ("train", "val"):
            (folder / split / "__MACOSX" / "red").mkdir(parents=True)
            (folder / split / "__MACOSX" / "red" / "._0.png").write_bytes(b"no image")

    def test_clutter(self):
        """Is not looked at: the same run, bit by bit, also where it appears between two starts."""
        before, between, outs = copy_of_photos(), copy_of_photos(), []
        self.clutter(before)
        self.assertEqual(data.open_folder(str(before), "train").classes, ["blue", "green", "red"])
        for images in (photos(), before, between):
            outs.append(new_folder() / "run")
            flags = (*training(2), *photo_flags(images), "--out", outs[-1])
            if images == between:
                with cut_after(1):
                    run("pretrain", *flags)
                self.clutter(between)
                flags = ("--out", outs[-1], "--resume")
            finished(run("pretrain", *flags))
            self.assertEqual(saved(outs[-1])["data"]["images"], 24)
        for out in outs[1:]:
            assert_same_run(out, outs[0])

    def test_files_that_are_no_images(self):
        """Named by their endings, once a split; what systems leave is not worth a word."""
        folder = copy_of_photos()
        self.assertEqual(self.said(folder), "")
        for name in ("0.gif", "1.HEIC", "2.heic", "readme", ".DS_Store", "._0.png"):
            (folder / "train" / "red" / name).write_bytes(b"?")
        (folder / "val" / "red" / "notes.txt").write_bytes(b"?")
        shutil.copy(next((folder / "val" / "red").glob("*.png")), folder / "val" / "loose.png")
        said = [f"note: {folder}/{split}: files were left out: {endings}\n"
                for split, endings in (("train", "1 (no ending), 1 .gif, 2 .heic"),
                                       ("val", "1 .txt, 1 in no class folder"))]
        self.assertEqual(self.said(folder), "".join(said))

    def said(self, folder):
        """What is printed when both splits of a folder are loaded."""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            for split in ("train", "val"):
                images, _, _ = data.load_images(str(folder), split, 32)
                self.assertEqual(len(images), 24)
        return out.getvalue()

    def test_endings(self):
        """Of every format that is read, in any case; .jfif, as browsers save a JPEG."""
        folder = new_folder()
        names = [f"train/a/{number}{ending}" for number, ending in enumerate(
            (".jpg", ".JPEG", ".jfif", ".png", ".bmp", ".ppm", ".tif", ".TIFF", ".webp"))]
        write_images(folder, names, (8, 8))
        found = [path for path, _ in data.open_folder(str(folder), "train").samples]
        self.assertEqual(sorted(found), sorted(str(folder / name) for name in names))

    def test_linked_folders(self):
        """A folder counts once, whatever links lead to it: into itself, or beside itself."""
        folder = new_folder()
        write_images(folder, [f"train/{name}/{number}.png" for name in ("cat", "dog") for number in range(3)],
                     (8, 8))
        write_images(folder, ["train/dog/more/0.png"], (8, 8))  # another one of that name
        dog, before = folder / "train" / "dog", data.open_folder(str(folder), "train")
        self.assertEqual(before.targets, [0] * 3 + [1] * 4)
        os.symlink(".", dog / "images")  # ln -s . FOLDER/train/dog/images
        os.symlink("more", dog / "again")
        os.symlink(folder / "train" / "cat", dog / "cat")  # one image in two classes
        after = data.open_folder(str(folder), "train")
        real = [sorted((os.path.realpath(path), label) for path, label in images.samples)
                for images in (before, after)]
        self.assertEqual(real[1], real[0])
        self.assertEqual((len(after), sorted(after.targets)), (7, before.targets))

    def test_linked_images(self):
        """Files that are links, as in folders that only choose among images, count each."""
        folder = new_folder()
        write_images(folder, [f"all/{number}.png" for number in range(4)], (8, 8))
        for number, name in enumerate("aabb"):
            (folder / "train" / name).mkdir(parents=True, exist_ok=True)
            os.symlink(folder / f"all/{number}.png", folder / f"train/{name}/{number}.png")
        self.assertEqual(data.open_folder(str(folder), "train").targets, [0, 0, 1, 1])

    def test_thumbnails_of_a_network_drive(self):
        """@eaDir, beside the classes and in them, is no class and no image."""
        folder = copy_of_photos()
        before = data.open_folder(str(folder), "train")
        for at in (folder / "train", folder / "train" / "red"):
            write_images(at / "@eaDir" / "0.png", ["THUMB_M.png"], (9, 9))
        after = data.open_folder(str(folder), "train")
        self.assertEqual((after.classes, after.samples), (before.classes, before.samples))

    def test_one_class(self):
        """Classes that lie one folder deeper are not trained as one class."""
        folder = new_folder()
        for split in ("train", "val"):
            shutil.copytree(photos() / split, folder / split / "images")
        autoencoder = photo_autoencoder()
        assert_refused(run("finetune", "--autoencoder", autoencoder, "--data", folder, *training(),
                           "--mode", "clean", "--workers", 0, "--out", folder / "out"),
                       ("one class folder only, images", "deeper"))

    def test_test_folder_without_classes(self):
        """As contests give it: refused."""
        folder = copy_of_photos()
        write_images(folder / "test", ["0.png"], (32, 32))
        with self.assertRaisesRegex(UserError, "test holds no class folder: images lie in test/<class>/"):
            data.open_folder(str(folder), "test")

    def test_name_of_a_data_set(self):
        """Is not taken for a folder that is called so; ~ is the home."""
        folder = new_folder()
        (folder / "digits" / "train").mkdir(parents=True)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder)
        self.assertEqual(data.dataset_name("digits"), "digits")
        self.assertEqual(data.dataset_name("./digits"), str((folder / "digits").resolve()))
        self.assertEqual(data.dataset_name("~/x"), str(Path("~/x").expanduser().resolve()))
        self.assertEqual(data.short_name(data.dataset_name("./digits/")), "digits")

    def test_nothing_to_find(self):
        """A folder without classes, or a class without images, is named."""
        folder = new_folder()
        (folder / "train" / ".hidden").mkdir(parents=True)
        command = ("pretrain", "--data", folder, "--out", folder / "out")
        assert_refused(run(*command), (folder / "train", "class"))
        write_images(folder, ["train/a/0.png", "train/.b/0.png"], (8, 8))
        (folder / "train" / "empty").mkdir()
        (folder / "train" / "empty" / ".DS_Store").write_bytes(b"x")
        assert_refused(run(*command), (folder / "train", "empty"))
        self.assertFalse((folder / "out").exists())


class TestWhatIsDecided(unittest.TestCase):
    def decided(self, folder):
        """What data.about makes of a folder, and what it says."""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            row = data.about(str(folder))
        line, = out.getvalue().splitlines()
        self.assertTrue(line.startswith(f"{folder}: "))
        return row, line

    def test_one_folder_deeper(self):
        """train/<class>/images/*.png of 64 pixels are small images."""
        folder = new_folder()
        for split in ("train", "val"):
            write_images(folder / split, [f"{name}/images/{number}.png" for name in "ab"
                                          for number in range(20)], (64, 64))
        row, line = self.decided(folder)
        self.assertEqual(row.size, "small")
        self.assertIn("40 training images of about 64x64 pixels, 2 classes; size small: each is taken as 32x32", line)
        result = finished(run("pretrain", "--data", folder, *training(), "--out", folder / "out",
                              "--size", "tiny"))
        self.assertIn(line.replace("size small", "size tiny"), result.out)
        self.assertIn("\n40 images, 5 steps of 8 in 1 epochs", result.out)

    def test_several_images_decide(self):
        """A thumbnail among photographs, or a photograph among thumbnails, does not."""
        for number, (most, one, says) in enumerate((((300, 240), (48, 48), "300x240"),
                                                    ((48, 40), (300, 240), "48x40"))):
            for count in (30, 3):  # more images than are looked at, and fewer
                folder = new_folder()
                names = [f"train/{name}/{index}.png" for name in "ab" for index in range(count)]
                write_images(folder, names + ["val/a/1.png", "val/b/1.png"], most)
                write_images(folder, [names[0]], one)
                row, line = self.decided(folder)
                self.assertEqual(row.size, ("base", "small")[number], (most, count))
                self.assertEqual(row.pretrain_sigma, ("gamma:25,3", "gamma:10,8")[number])
                with contextlib.redirect_stdout(io.StringIO()):  # the model's size decides, if it is known
                    sigmas = [data.about(str(folder), size).finetune_sigma for size in ("small", "base")]
                self.assertEqual(sigmas, ["uniform:0,60", "uniform:0,30"])
                self.assertIn(f"{2 * count} training images of about {says} pixels", line)

    def test_size_flag(self):
        """--size says otherwise, for the autoencoder and with it for all that follows."""
        nim = photo_autoencoder()
        self.assertEqual(saved(nim)["settings"]["size"], "tiny")
        out = new_folder() / "clean"
        finished(run("finetune", "--mode", "clean", "--autoencoder", nim, *training(), "--out", out))
        checkpoint = saved(out)
        self.assertEqual(checkpoint["settings"]["size"], "tiny")
        self.assertEqual(checkpoint["config"]["embed_dim"], 64)
        assert_refused(run("finetune", "--size", "small", "--autoencoder", nim, "--out", new_folder()),
                       "--size small")


class TestWhatMayChange(unittest.TestCase):
    def start(self, epochs=2):
        """A run that was cut after its first epoch: (images, its folder, its flags)."""
        images, out = copy_of_photos(), new_folder() / "run"
        flags = (*training(epochs), *photo_flags(images), "--out", out)
        with cut_after(1):
            run("pretrain", *flags)
        return images, out, flags

    def test_images_that_come_and_go(self):
        """Between two starts: refused with both numbers; with as many images the run goes on, and all count."""
        def remove(images):
            (images / "train/red/3.png").unlink()

        def add(images):
            shutil.copy(images / "train/red/3.png", images / "train/red/new.png")

        def restore(images):
            shutil.copytree(photos(), images, dirs_exist_ok=True)
            (images / "train/red/new.png").unlink(missing_ok=True)

        def replace(images):
            shutil.copy(images / "val/red/3.png", images / "train/red/4.png")
        images, out, _ = self.start()
        resume = ("pretrain", "--out", out, "--resume", "--workers", 0)
        before = (out / "checkpoint.pt").read_bytes()
        for change, now in ((remove, 23), (add, 25)):
            change(images)
            assert_refused(run(*resume), (f"{out} was begun on 24 images of 3 classes",
                                          f"{images} holds {now} of 3 now", "--overwrite"))
            restore(images)
        self.assertEqual((out / "checkpoint.pt").read_bytes(), before)
        replace(images)
        self.assertIn("note: 1 of the training images are others than when", finished(run(*resume)).out)
        self.assertEqual(len(saved(out)["data"]["digests"]), 25)
        self.assertEqual([row["epoch"] for row in read_csv(out / "log.csv")], ["1", "2"])

    def test_damaged_image(self):
        """Named; replaced as advised, the run goes on."""
        images, out, _ = self.start()
        (images / "train/red/3.png").write_bytes(b"no image")
        assert_refused(run("pretrain", "--out", out, "--resume", "--workers", 0),
                       (images / "train/red/3.png", "replace or remove it"))
        shutil.copy(images / "train/red/4.png", images / "train/red/3.png")
        finished(run("pretrain", "--out", out, "--resume", "--workers", 0))
        self.assertEqual(saved(out)["epoch"], 2)

    def test_other_classes(self):
        """A class folder that appears, or is renamed, would number the classes anew: refused."""
        images, nim = copy_of_photos(), photo_autoencoder()
        part, whole = new_folder() / "part", new_folder() / "whole"
        flags = ("finetune", "--mode", "clean", "--autoencoder", nim, "--data", images, *training(2),
                 "--workers", 0, "--out")
        finished(run(*flags, whole))
        with cut_after(1):
            run(*flags, part)
        resume = ("finetune", "--out", part, "--resume", "--workers", 0)
        for split in ("train", "val"):
            (images / split / "red").rename(images / split / "amber")
        assert_refused(run(*resume), ("classes", "red"))
        for split in ("train", "val"):
            shutil.copytree(images / split / "amber", images / split / "red")
        assert_refused(run(*resume), ("classes", "amber"))
        for split in ("train", "val"):
            shutil.rmtree(images / split / "amber")
        finished(run(*resume))
        assert_same_run(part, whole)
