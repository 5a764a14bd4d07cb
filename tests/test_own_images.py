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
        before, between = copy_of_photos(), copy_of_photos()
        self.clutter(before)
        self.assertEqual(data.load_dataset(str(before), "train", 32).classes, ["blue", "green", "red"])
        for images, epochs in ((before, 1), (between, 2)):
            out = new_folder() / "run"
            flags = (*training(epochs), *photo_flags(images), "--out", out)
            with cut_after(1):
                run("pretrain", *flags)
            if images == between:
                self.clutter(between)
                result = finished(run("pretrain", "--out", out, "--resume", "--workers", 0))
                self.assertNotIn("other images", result.out)
                result = finished(run("pretrain", *flags))
                self.assertIn("finished run kept", result.out)
                self.assertNotIn("other images", result.out)
            self.assertEqual(saved(out)["data"]["images"], 24)
        assert_same_run(out, self.fresh(2))

    def fresh(self, epochs):
        """A run on photos without any clutter."""
        out = new_folder() / "run"
        finished(run("pretrain", *training(epochs), *photo_flags(), "--out", out))
        return out

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
        """As contests give it: refused, with the way out."""
        folder = copy_of_photos()
        write_images(folder / "test", ["0.png"], (32, 32))
        with self.assertRaisesRegex(UserError, "--split val"):
            data.open_folder(str(folder), "test")

    def test_name_of_a_data_set(self):
        """A folder that is called like a data set is not taken, and that is said; ~ is the home."""
        folder = new_folder()
        (folder / "digits" / "train").mkdir(parents=True)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.assertEqual(data.dataset_name("digits"), "digits")
            self.assertEqual(data.dataset_name("./digits"), str((folder / "digits").resolve()))
        self.assertIn("--data ./digits", out.getvalue())
        os.chdir(folder / "digits")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            data.dataset_name("digits")
        self.assertEqual(out.getvalue(), "")
        self.assertEqual(data.dataset_name("~/x"), str(Path("~/x").expanduser().resolve()))

    def test_nothing_to_find(self):
        """A folder without classes, or a class without images, is named."""
        folder = new_folder()
        (folder / "train" / ".hidden").mkdir(parents=True)
        assert_refused(run("pretrain", "--data", folder, "--dry-run"), (folder / "train", "class"))
        write_images(folder, ["train/a/0.png", "train/.b/0.png"], (8, 8))
        (folder / "train" / "empty").mkdir()
        (folder / "train" / "empty" / ".DS_Store").write_bytes(b"x")
        assert_refused(run("pretrain", "--data", folder, "--dry-run"), (folder / "train", "empty"))


class TestWhatIsDecided(unittest.TestCase):
    def decided(self, folder):
        """The size of the models for a folder; that and the reason are said."""
        data.about.cache_clear()
        result = finished(run("pretrain", "--data", folder, "--dry-run", "--workers", 0))
        line = result.out.splitlines()[0]
        self.assertIn(str(folder), line)
        return line, "images          " + line.split(": ")[1].split(" ")[0] in result.out

    def test_one_folder_deeper(self):
        """train/<class>/images/*.png of 64 pixels are small images."""
        folder = new_folder()
        for split in ("train", "val"):
            write_images(folder / split, [f"{name}/images/{number}.png" for name in "ab"
                                          for number in range(20)], (64, 64))
        line, counted = self.decided(folder)
        self.assertIn("40 training images of 64x64", line)
        self.assertIn("2 classes: size small", line)
        self.assertTrue(counted)

    def test_several_images_decide(self):
        """A thumbnail among photographs, or a photograph among thumbnails, does not."""
        for number, (most, one, says) in enumerate((((300, 240), (48, 48), "300x240"),
                                                    ((48, 40), (300, 240), "48x40"))):
            for count in (30, 3):  # more images than are looked at, and fewer
                folder = new_folder()
                names = [f"train/{name}/{index}.png" for name in "ab" for index in range(count)]
                write_images(folder, names + ["val/a/1.png", "val/b/1.png"], most)
                write_images(folder, [names[0]], one)
                with contextlib.redirect_stdout(None):
                    row = data.about(str(folder))
                self.assertEqual(row.size, ("base", "small")[number], (most, count))
                self.assertEqual(row.pretrain_sigma, ("gamma:25,3", "gamma:10,8")[number])
        line, _ = self.decided(folder)  # of the last, small ones
        self.assertIn("6 training images of 48x40 (the median of 6)", line)

    def test_size_flag(self):
        """--size says otherwise, for the autoencoder and with it for all that follows."""
        nim = photo_autoencoder()
        self.assertEqual(saved(nim)["settings"]["size"], "tiny")
        out = new_folder() / "clean"
        finished(run("finetune", "--mode", "clean", "--autoencoder", nim, *training(), "--out", out,
                     "--workers", 0))
        checkpoint = saved(out)
        self.assertEqual(checkpoint["settings"]["size"], "tiny")
        self.assertEqual(checkpoint["config"]["embed_dim"], 64)
        assert_refused(run("finetune", "--size", "small", "--autoencoder", nim), "--size small")


class TestWhatMayChange(unittest.TestCase):
    def start(self, epochs=2):
        """A run that was cut after its first epoch: (images, its folder, its flags)."""
        images, out = copy_of_photos(), new_folder() / "run"
        flags = (*training(epochs), *photo_flags(images), "--out", out)
        with cut_after(1):
            run("pretrain", *flags)
        return images, out, flags

    def test_images_that_come_and_go(self):
        """Between two starts: the run goes on, or is kept, with a note that says so."""
        def remove(images):
            (images / "train/red/3.png").unlink()

        def add(images):
            shutil.copy(images / "train/red/3.png", images / "train/red/new.png")

        def replace(images):
            shutil.copy(images / "train/red/3.png", images / "train/red/4.png")
        for change, then in ((remove, 23), (add, 25), (replace, 24)):
            with self.subTest(change.__name__):
                images, out, flags = self.start()
                change(images)
                note = f"was trained on other images than {images} holds now (24 then, {then} now)"
                result = finished(run("pretrain", "--out", out, "--resume", "--workers", 0))
                self.assertEqual(result.out.count(note), 1)
                self.assertEqual([row["epoch"] for row in read_csv(out / "log.csv")], ["1", "2"])
                again = finished(run("pretrain", *flags))
                self.assertIn("finished run kept", again.out)
                self.assertEqual(again.out.count("was trained on other images"), 1)

    def test_damaged_image(self):
        """Named; removed as advised, the run goes on."""
        images, out, flags = self.start()
        (images / "train/red/3.png").write_bytes(b"no image")
        assert_refused(run("pretrain", "--out", out, "--resume", "--workers", 0),
                       (images / "train/red/3.png", "remove it"))
        (images / "train/red/3.png").unlink()
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
