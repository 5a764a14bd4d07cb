"""Color images: folders with and without test images, images in memory, torchvision's CIFAR10."""

import contextlib
import os
import pickle
import shutil
import unittest
from unittest import mock

import numpy as np
import torch
from PIL import Image

from support import data
from tests.helpers import (assert_near, assert_refused, finished, new_folder, photos, read_csv, run,
                           training)


def make_cifar10(folder, images_of_a_class=6):
    """The files of torchvision's CIFAR10, five training batches and a test batch, of few images."""
    target = folder / "data" / "cifar-10-batches-py"
    target.mkdir(parents=True)
    random, labels = np.random.default_rng(0), list(range(10)) * images_of_a_class
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = random.integers(0, 256, (len(labels), 3072), np.uint8)
        with open(target / name, "wb") as file:
            pickle.dump({"data": pixels, "labels": labels}, file)
    with open(target / "batches.meta", "wb") as file:
        pickle.dump({"label_names": [f"class{i}" for i in range(10)]}, file)


@contextlib.contextmanager
def small_cifar10():
    """Work in a folder with made-up CIFAR-10 files, whose checksums are not looked at."""
    folder, here = new_folder(), os.getcwd()
    make_cifar10(folder)
    os.chdir(folder)
    try:
        with mock.patch("torchvision.datasets.cifar.check_integrity", return_value=True), \
                mock.patch.object(data, "VALIDATION_IMAGES", 3):
            yield folder
    finally:
        os.chdir(here)


class TestColor(unittest.TestCase):
    def test_test_folder(self):
        """test/ where there is one; else the validation images serve as test images."""
        folder = new_folder() / "with test"
        shutil.copytree(photos(), folder)
        val, test = (data.load_dataset(str(folder), split, 32).tensors[0] for split in ("val", "test"))
        self.assertTrue(torch.equal(val, test))
        shutil.copytree(folder / "train", folder / "test")
        train = data.load_dataset(str(folder), "train", 32).tensors[0]
        test = data.load_dataset(str(folder), "test", 32).tensors[0]
        self.assertTrue(torch.equal(train, test))
        self.assertFalse(torch.equal(val, test))

    def test_in_memory(self):
        """Up to 64 pixels and 2 GB as bytes; a batch is what decoding one by one gives."""
        name = str(photos())
        dataset = data.load_dataset(name, "val", 32)
        self.assertTrue(data.in_memory(dataset))
        self.assertEqual(dataset.tensors[0].dtype, torch.uint8)
        with mock.patch.object(data, "MEMORY", 24 * 3 * 32**2 - 1):
            one_by_one = data.load_dataset(name, "val", 32)
        self.assertFalse(data.in_memory(one_by_one))
        self.assertFalse(data.in_memory(data.load_dataset(name, "val", 65)))
        self.assertEqual(one_by_one.classes, dataset.classes)
        for (a, b), (c, d) in zip(data.Loader(dataset, 10), data.Loader(one_by_one, 10)):
            self.assertEqual(a.dtype, torch.float32)
            assert_near(a, c, atol=1e-6)
            self.assertTrue(torch.equal(b, d))

    def test_defaults_of_a_folder(self):
        """Its first training image tells: small images, small models."""
        folder = new_folder() / "large"
        (folder / "train" / "cat").mkdir(parents=True)
        Image.fromarray(np.zeros((65, 30, 3), np.uint8)).save(folder / "train" / "cat" / "0.png")
        self.assertEqual(data.defaults(str(photos()))["size"], "small")
        self.assertEqual(data.defaults(str(folder))["size"], "base")
        self.assertEqual(data.defaults("no folder")["size"], "base")
        self.assertEqual(data.defaults("cifar10"), data.DEFAULTS["FOLDER of small images"])

    def test_cifar10_split(self):
        """The last images of each class become validation images; none is in two splits."""
        with small_cifar10():
            train, val, test = (data.load_dataset("cifar10", split, 32) for split in
                                ("train", "val", "test"))
        self.assertEqual([len(split) for split in (train, val, test)], [270, 30, 60])
        self.assertEqual(val.tensors[1].bincount().tolist(), [3] * 10)
        self.assertEqual(train.tensors[1].bincount().tolist(), [27] * 10)
        seen = {image.numpy().tobytes() for split in (train, val, test) for image in split.tensors[0]}
        self.assertEqual(len(seen), 360)
        self.assertEqual(train.classes, [f"class{i}" for i in range(10)])

    def test_cifar10_stages(self):
        with small_cifar10() as folder:
            flags = ("--data", "cifar10", "--size", "tiny", "--runs", "runs")
            finished(run("pretrain", *training(1, 64), *flags))
            finished(run("finetune", *training(1, 64), *flags))
            small = (*flags, "--images", 20, "--steps", 1, "--eot", 2, "--eps", "4/255")
            self.assertIn("20 test images", finished(run("defend", *small)).out)
            finished(run("attack", *small, "--attack", "pgd+eot", "--save", folder / "kept.npz",
                         "--classifier", "runs/cifar10/nim_gamma10-8_tiny/de3_uniform0-60",
                         "--sigma", 50))
            row, = read_csv(folder / "runs/cifar10/attack.csv")
            with np.load(folder / "kept.npz") as kept:
                images, adversarial = kept["images"], kept["adversarial"]
                self.assertEqual(images.shape, (20, 3, 32, 32))
                self.assertTrue(0 < np.abs(images - adversarial).max() <= 4 / 255 + 1e-6)
                self.assertAlmostEqual(100 * kept["correct"].mean(), float(row["robust_accuracy"]), 1)
                self.assertEqual(kept["labels"].shape, (20,))
            self.assertEqual((row["split"], row["draws"], row["precision"], row["reading"]),
                             ("test", "5", "fp32", "one shot"))
            self.assertEqual(row["autoencoder"], "nim_gamma10-8_tiny")
            assert_refused(run("attack", *small, "--save", "x.npz"), "--save keeps one row")

    def test_provenance(self):
        """A checkpoint says by which command, torch and commit it was made."""
        path, = finished(run("pretrain", *training(1, 600), "--runs", new_folder())).wrote()
        checkpoint = torch.load(path, weights_only=True)
        self.assertEqual(checkpoint["torch"], str(torch.__version__))
        self.assertIn("command", checkpoint)
        self.assertRegex(checkpoint["commit"], "^([0-9a-f]{40})?$")
