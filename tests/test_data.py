"""The data sets, their transforms, the order of their classes, and the batches made of them."""

import contextlib
import functools
import os
import pickle
import shutil
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision import transforms

from model import IMAGENET_MEAN, IMAGENET_STD, UserError
from support import cli, data, training
from tests.helpers import (assert_near, assert_refused, copy_of_photos, finished, new_folder,
                           photo_autoencoder, photo_classifier, photos, read_csv, run, seeded)
from tests.helpers import training as short_training


class TestData(unittest.TestCase):
    def test_digits(self):
        seen = set()
        for split, size in (("train", 1197), ("val", 240), ("test", 360)):
            images, labels = data.load_dataset("digits", split, 32).tensors
            self.assertEqual(images.shape, (size, 3, 32, 32))
            self.assertEqual((images.min(), images.max()), (0, 1))
            self.assertTrue((images == images[:, :1]).all())  # gray
            self.assertEqual(sorted(labels.unique().tolist()), list(range(10)))
            self.assertGreater(labels.bincount().min(), 0.09 * size)  # stratified
            seen |= {image.numpy().tobytes() for image in images}
        self.assertEqual(len(seen), 1797)
        self.assertEqual(data.load_dataset("digits", "val", 24)[0][0].shape, (3, 24, 24))
        usual = data.DATASETS["digits"]
        train = data.load_dataset("digits", "train", 32).tensors[0]
        self.assertAlmostEqual(train.mean().item(), usual.mean[0], delta=0.01)
        self.assertAlmostEqual(train.std().item(), usual.std[0], delta=0.01)

    def test_shift(self):
        """Moved a little, still in [0, 1]; eight images share one draw."""
        images = data.load_dataset("digits", "train", 32)[:1][0].expand(16, -1, -1, -1)
        moved = seeded(lambda: training.shift(images))
        self.assertTrue(0 <= moved.min() and moved.max() <= 1)
        for start in (0, 8):
            assert_near(moved[start:start + 8], moved[start].expand(8, -1, -1, -1))
        rows = torch.arange(32.0)
        center = [(x[:, 0].sum(2) * rows).sum(1) / x[:, 0].sum((1, 2)) for x in (images, moved)]
        self.assertTrue((0.01 < (center[0] - center[1]).abs()).all())
        self.assertTrue(((center[0] - center[1]).abs() < 5).all())
        self.assertNotAlmostEqual(center[1][0].item(), center[1][8].item(), places=3)

    def test_transforms(self):
        finetuning = functools.partial(training.finetune_transform, mean=IMAGENET_MEAN,
                                       std=IMAGENET_STD)
        photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
        for transform in (training.pretrain_transform, finetuning, data.eval_transform):
            results = [seeded(transform(32), photo, seed=seed) for seed in range(3)]
            for image in results:
                self.assertEqual((image.shape, image.dtype), ((3, 32, 32), torch.float32))
            fixed = torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
            self.assertEqual(fixed, transform is data.eval_transform)
        ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 256, 3)))
        image = data.eval_transform(224)(ramp)  # resize to 256, crop 16 off each side
        self.assertAlmostEqual(255 * image[0, 0, 0].item(), 16, delta=0.5)

    def test_loader(self):
        dataset = TensorDataset(torch.arange(12.), torch.arange(12))
        in_order = [labels.tolist() for _, labels in data.Loader(dataset, 5)]
        self.assertEqual(in_order, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]])
        batches, orders = data.TrainingBatches(dataset, 4, 256, 0, 0, "cpu"), []
        for epoch in (0, 1, 0):
            orders.append([])
            for images, labels in batches.epoch(epoch):
                self.assertEqual(images.tolist(), labels.tolist())
                orders[-1] += labels.tolist()
            self.assertEqual(sorted(orders[-1]), list(range(12)))
        self.assertNotEqual(orders[0], orders[1])
        self.assertEqual(orders[0], orders[2])
        self.assertNotEqual(orders[0], list(range(12)))

    def order(self, parts, rank=0, world_size=1):
        """The lists of indices that one of several processes gets, of batches of 12 of 50 images."""
        with mock.patch.object(cli, "rank", return_value=rank), \
                mock.patch.object(cli, "world_size", return_value=world_size):
            order = data.TrainingOrder(50, 12, parts, 3, False)
            found = list(order)
            self.assertEqual(len(order), len(found))
        return found

    def test_training_order(self):
        """Processes and micro-batches divide the batches of one process, without gap or overlap."""
        whole = [set(batch) for batch in self.order(1)]
        self.assertEqual([len(batch) for batch in whole], [12] * 4)  # the partial one is dropped
        for parts, world in ((1, 2), (3, 1), (2, 3), (4, 3)):
            shares = [self.order(parts, rank, world) for rank in range(world)]
            for step, batch in enumerate(whole):
                micro = [share[step * parts + part] for share in shares for part in range(parts)]
                self.assertEqual({len(indices) for indices in micro}, {12 // parts // world})
                self.assertEqual(set().union(*micro), batch)

    def test_evenly_spread(self):
        """Processes share the images: each has some, none are missing, none counted twice."""
        dataset = TensorDataset(torch.arange(100))

        def chosen(*arguments):
            return [item[0].item() for item in data.evenly_spread(dataset, *arguments)]
        self.assertEqual(chosen(5), [0, 20, 40, 60, 80])
        for count in (100, 1000):
            self.assertEqual(chosen(count), list(range(100)))
        shares = [chosen(7, rank, 3) for rank in range(3)]
        self.assertEqual(sorted(sum(shares, [])), [i * 100 // 7 for i in range(7)])


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


TRAINING_IMAGES = 30  # of each class of the made-up CIFAR-10


@contextlib.contextmanager
def small_cifar10():
    """Work in a folder with made-up CIFAR-10 files, whose checksums are not looked at."""
    folder, here = new_folder(), os.getcwd()
    make_cifar10(folder)
    os.chdir(folder)
    try:
        with mock.patch("torchvision.datasets.cifar.check_integrity", return_value=True), \
                mock.patch.object(data, "VALIDATION_SHARE", 3 / TRAINING_IMAGES):
            yield folder
    finally:
        os.chdir(here)


class TestSeeds(unittest.TestCase):
    def test_large_seed(self):
        """Up to what --seed takes: photographs are augmented, each seed in its own way."""
        images = data.Transformed(data.open_folder(str(photos()), "train"),
                                  training.pretrain_transform(32))
        drawn = [images[seed, 3, 0][0] for seed in (10**9, 10**9, 10**9 - 1, 20_000)]
        self.assertTrue(torch.equal(drawn[0], drawn[1]))
        self.assertFalse(torch.equal(drawn[0], drawn[2]) or torch.equal(drawn[0], drawn[3]))


class TestFolders(unittest.TestCase):
    """A folder of your own, and CIFAR-10."""

    def test_test_folder(self):
        """test/ where there is one; else the validation images serve as test images, and tables say so."""
        folder, out = new_folder() / "with test", new_folder()
        shutil.copytree(photos(), folder)
        for said in ("val", "test"):
            result = finished(run("attack", photo_classifier(), "--data", folder, "--images", 2, "--eps", 0,
                                  "--sigma", 0, "--attack", "fgsm", "--out", out, "--workers", 0))
            self.assertIn(f"\n2 {said} images of", result.out)
            self.assertEqual(result.out.count("has no test/: its val/ is used"), said == "val")
            self.assertEqual(read_csv(out / "attack.csv")[-1]["split"], said)
            shutil.copytree(folder / "val", folder / "test", dirs_exist_ok=True)
        shutil.rmtree(folder / "test")
        shutil.copytree(folder / "train", folder / "test")
        train, val = (data.load_dataset(str(folder), split, 32).tensors[0] for split in ("train", "val"))
        test = data.load_dataset(str(folder), "test", 32).tensors[0]
        self.assertTrue(torch.equal(train, test))
        self.assertFalse(torch.equal(val, test))

    def test_names_of_augmentations(self):
        """Tell apart what DATASETS may hold: functions, their settings, and lambdas."""
        hows = [None, training.crop_and_flip, functools.partial(training.crop_and_flip, padding=2),
                functools.partial(training.crop_and_flip, padding=9),
                lambda images: images,
                lambda images: 0 * images,
                transforms.RandomErasing(0.1), transforms.RandomErasing(0.2)]
        self.assertEqual(len({data.name_of(how) for how in hows}), len(hows))
        again = functools.partial(training.crop_and_flip, padding=2)
        self.assertNotIn(" at 0x", str([data.name_of(how) for how in (*hows, mock.MagicMock())]))
        self.assertEqual(data.name_of(again), data.name_of(hows[2]))

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

    def folder_of(self, *sizes):
        """A data folder with one class of images of these (width, height)."""
        folder = new_folder() / "images"
        for split in ("train", "val"):
            (folder / split / "cat").mkdir(parents=True)
            for number, size in enumerate(sizes):
                Image.new("RGB", size).save(folder / split / "cat" / f"{number:03}.png")
        return str(folder)

    def test_recipe_of_a_folder(self):
        """The median of several training images decides between small images and photographs."""
        for sizes, expected in [([(65, 30)], "base"), ([(64, 64)], "small"), ([(48, 36)] * 3, "small"),
                                ([(48, 48)] + [(300, 240)] * 60, "base"),
                                ([(300, 240)] + [(48, 48)] * 60, "small")]:
            folder = self.folder_of(*sizes)
            with contextlib.redirect_stdout(None):
                about = data.about(folder)
            self.assertEqual(about.size, expected)
            self.assertEqual(len(about.open("train", 32)), len(sizes))
        self.assertEqual(data.about("cifar10"), data.DATASETS["cifar10"])
        self.assertEqual((about.mean, about.pretrain_sigma), (data.COLOR["mean"], "gamma:10,8"))

    def test_no_folder(self):
        empty = new_folder()
        (empty / "train").mkdir()
        half = Path(shutil.copytree(photos(), new_folder() / "photos"))
        shutil.rmtree(half / "train" / "red")
        (half / "train" / "red").mkdir()
        for folder, words in ((empty / "none", "no folder"), (empty, "no class folder"), (half, "red")):
            self.assertRaisesRegex(UserError, words, data.load_dataset, str(folder), "train", 32)

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
            finished(run("pretrain", *short_training(1, 64), "--data", "cifar10", "--size", "tiny"))
            finished(run("finetune", *short_training(1, 64), "--autoencoder", "runs/cifar10/nim"))
            small = ("--images", 20, "--steps", 1, "--eot", 2, "--eps", "4/255")
            result = finished(run("defend", "--run", "runs/cifar10/de3", *small))
            self.assertIn("20 test images of cifar10", result.out)
            finished(run("attack", "runs/cifar10/de3", *small, "--attack", "pgd+eot", "--sigma", 50))
            row, = read_csv(folder / "runs/cifar10/attack.csv")
        self.assertEqual((row["defense"], row["data"], row["split"], row["draws"], row["precision"],
                          row["reading"], row["eot"]),
                         ("De³ σ = 50", "cifar10", "test", "5", "fp32", "one shot", "2"))

    def test_download_that_fails(self):
        """A sentence that says where to place the archive."""
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(new_folder())
        for error in (RuntimeError("Dataset not found"), OSError("no network")):
            with mock.patch("torchvision.datasets.CIFAR10.__init__", side_effect=error):
                assert_refused(run("pretrain", "--data", "cifar10"), "CIFAR10 into data/")


class TestOrderOfClasses(unittest.TestCase):
    """Labels in the order of a classifier's outputs, however a data set lists its classes."""

    def both(self, folder):
        """The same validation images in memory and on the disk."""
        in_memory = data.load_dataset(str(folder), "val", 32)
        with mock.patch.object(data, "MEMORY", 0):
            return in_memory, data.load_dataset(str(folder), "val", 32)

    def names(self, images):
        """The class of each image in words."""
        return [images.classes[int(images[i][1])] for i in range(len(images))]

    def test_folders_that_are_numbers(self):
        """0 … 11 are in the order of numbers, not of text; other names in that of text."""
        folder = new_folder() / "numbers"
        for split in ("train", "val"):
            for number in range(12):
                (folder / split / str(number)).mkdir(parents=True)
                Image.new("RGB", (4, 4), (20 * number,) * 3).save(folder / split / str(number) / "0.png")
        for images in self.both(folder):
            self.assertEqual(images.classes, [str(number) for number in range(12)])
            for image, label in (images[i] for i in range(12)):
                gray = image.float().mean() / (255 if image.dtype == torch.uint8 else 1)
                self.assertAlmostEqual(255 * gray.item(), 20 * label, delta=0.6)
        for split in ("train", "val"):
            (folder / split / "x").mkdir()
            shutil.copy(folder / split / "0" / "0.png", folder / split / "x")
        images, _ = self.both(folder)
        self.assertEqual(images.classes, sorted(images.classes))

    def test_other_order(self):
        """Labels follow the classifier's order, however often it is asked for; images stay."""
        order = ["red", "blue", "green"]
        for images in self.both(photos()):
            before, first = self.names(images), images[0][0]
            for wanted in (order, order, ["green", "red", "blue"], order):
                images = data.in_order_of(wanted, images, "photos")
                self.assertEqual(images.classes, wanted)
                self.assertEqual(self.names(images), before)
            self.assertTrue(torch.equal(images[0][0], first))
            for other in (["red", "blue"], ["red", "blue", "yellow"], [*order, "yellow"]):
                self.assertRaises(UserError, data.in_order_of, other, images, "photos")

    def reordered(self, source, order):
        """A copy of a classifier's run that was trained with its classes in another order."""
        folder = new_folder() / source.name
        folder.mkdir()
        checkpoint = torch.load(source / "checkpoint.pt")
        places = [checkpoint["classes"].index(name) for name in order]
        for name in ("head.weight", "head.bias"):
            checkpoint["model"][name] = checkpoint["model"][name][places]
        torch.save({**checkpoint, "classes": order}, folder / "checkpoint.pt")
        return folder

    def test_run_with_classes_in_another_order(self):
        """The same accuracy, in memory and on the disk, for one run and for several."""
        usual = photo_classifier("clean")
        other, another = (self.reordered(usual, ["red", "blue", "green"]) for _ in range(2))
        flags = ("--attack", "fgsm", "--eps", 0, "--workers", 0)
        for memory in (data.MEMORY, 0):
            with mock.patch.object(data, "MEMORY", memory):
                for runs in ([usual], [other], [other, another]):
                    out = new_folder()
                    finished(run("attack", *runs, *flags, "--out", out))
                    found = {row["clean_accuracy"] for row in read_csv(out / "attack.csv")}
                    if runs == [usual]:
                        expected = found
                    self.assertEqual(found, expected, (memory, runs))
        self.assertGreater(float(expected.pop()), 60)  # more than by chance
        assert_refused(run("attack", usual, other, *flags), "number the classes differently")

    def test_order_of_a_file_is_said(self):
        """A file does not say its classes: those of the folders are printed, with their numbers."""
        path = new_folder() / "classifier.pth"
        torch.save(torch.load(photo_classifier("clean") / "checkpoint.pt")["model"], path)
        flags = ("--data", photos(), "--size", "tiny", "--attack", "fgsm", "--eps", 0,
                 "--out", new_folder())
        result = finished(run("attack", path, *flags))
        self.assertIn(f"{path} does not name its classes", result.out)
        self.assertIn("0 blue, 1 green, 2 red", result.out)
        other = copy_of_photos()
        for split in ("train", "val"):
            shutil.rmtree(other / split / "red")
        refused = run("attack", path, *flags, "--data", other)
        assert_refused(refused, ("knows 3 classes", "has 2"))

    def test_runs_and_files_together(self):
        """A file beside a run is taken in the run's order."""
        usual = photo_classifier("clean")
        other = self.reordered(usual, ["red", "blue", "green"])
        path, out = new_folder() / "c.pth", new_folder()
        torch.save(torch.load(other / "checkpoint.pt")["model"], path)
        result = finished(run("attack", other, path, "--size", "tiny", "--attack", "fgsm", "--eps", 0,
                              "--out", out))
        self.assertIn("0 red, 1 blue, 2 green", result.out)
        rows = read_csv(out / "attack.csv")
        self.assertEqual(rows[0]["clean_accuracy"], rows[1]["clean_accuracy"])

    def test_train_and_val_differ(self):
        """Refused before the training, by name."""
        other = copy_of_photos()
        (other / "val" / "red").rename(other / "val" / "yellow")
        refused = run("finetune", "--mode", "clean", "--autoencoder", photo_autoencoder(),
                      "--data", other, "--out", new_folder() / "clean")
        assert_refused(refused, ("train/ and val/ do not hold the same classes", "red, yellow"))


if __name__ == "__main__":
    unittest.main()
