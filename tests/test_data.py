"""The data sets, their transforms, the order of their classes, and the batches made of them."""

import contextlib
import functools
import io
import os
import shutil
import unittest
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision import datasets

from model import IMAGENET_MEAN, IMAGENET_STD, UserError
from support import cli, data, tested, training
from tests.helpers import (assert_near, assert_refused, copy_of_photos, finished, new_folder,
                           photo_autoencoder, photo_classifier, photos, read_csv, run, saved, seeded)
from tests.helpers import training as short_training

CPU = torch.device("cpu")


class TestData(unittest.TestCase):
    def test_digits(self):
        seen = set()
        for split, size in (("train", 1197), ("val", 240), ("test", 360)):
            images, labels = data.open_split("digits", split, 32).tensors
            self.assertEqual(images.shape, (size, 3, 32, 32))
            self.assertEqual((images.min(), images.max()), (0, 1))
            self.assertTrue((images == images[:, :1]).all())  # gray
            self.assertEqual(sorted(labels.unique().tolist()), list(range(10)))
            self.assertGreater(labels.bincount().min(), 0.09 * size)  # stratified
            seen |= {image.numpy().tobytes() for image in images}
        self.assertEqual(len(seen), 1797)
        self.assertEqual(data.open_split("digits", "val", 24)[0][0].shape, (3, 24, 24))
        usual = data.DATASETS["digits"]
        train = data.open_split("digits", "train", 32).tensors[0]
        self.assertAlmostEqual(train.mean().item(), usual.mean[0], delta=0.01)
        self.assertAlmostEqual(train.std().item(), usual.std[0], delta=0.01)

    def test_jitter(self):
        """Moved a little, still in [0, 1]; eight images share one draw."""
        images = data.open_split("digits", "train", 32)[:1][0].expand(16, -1, -1, -1)
        moved = seeded(lambda: training.jitter(images))
        self.assertTrue(0 <= moved.min() and moved.max() <= 1)
        for start in (0, 8):
            assert_near(moved[start:start + 8], moved[start].expand(8, -1, -1, -1))
        rows = torch.arange(32.0)
        center = [(x[:, 0].sum(2) * rows).sum(1) / x[:, 0].sum((1, 2)) for x in (images, moved)]
        self.assertTrue((0.01 < (center[0] - center[1]).abs()).all())
        self.assertTrue(((center[0] - center[1]).abs() < 5).all())
        self.assertNotAlmostEqual(center[1][0].item(), center[1][8].item(), places=3)

    def test_transforms(self):
        """What is drawn is drawn anew for each image, as floats; for a test nothing is, and bytes stay."""
        finetuning = functools.partial(training.finetune_transform, mean=IMAGENET_MEAN,
                                       std=IMAGENET_STD)
        photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
        for transform in (training.pretrain_transform, training.gentle_transform, finetuning,
                          data.eval_transform):
            is_test = transform is data.eval_transform
            results = [seeded(transform(32), photo, seed=seed) for seed in range(3)]
            for image in results:
                self.assertEqual((image.shape, image.dtype),
                                 ((3, 32, 32), torch.uint8 if is_test else torch.float32))
            fixed = torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
            self.assertEqual(fixed, is_test)
        ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 256, 3)))
        image = data.eval_transform(224)(ramp)  # resize to 256, crop 16 off each side
        self.assertEqual(image[0, 0, 0], 16)

    def test_images_of_the_models_size(self):
        """Are taken as they are, and that is said where others would be enlarged and cropped."""
        random = np.random.default_rng(0)
        for side, other in ((32, 33), (128, 129)):
            folder = new_folder() / "images"
            (folder / "train" / "a").mkdir(parents=True)
            for number, size in enumerate((side, side, other)):
                pixels = random.integers(0, 256, (size, size, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "train" / "a" / f"{number}.png")
                made = data.to_size(Image.fromarray(pixels), side)
                self.assertEqual(made.shape, (3, side, side))
                self.assertEqual(np.array_equal(made.permute(1, 2, 0), pixels), size == side)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                data.load_images(str(folder), "train", side)
            self.assertEqual("2 of 3 images have 128x128 pixels" in out.getvalue(), side == 128)

    def test_choice_of_test_images(self):
        """Of each class its share, in a shuffled order that stays; a smaller one begins a larger one."""
        labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
        whole = data.choose(labels)
        self.assertEqual(sorted(whole), list(range(100)))
        for count in (1, 10, 50, 99):
            chosen = data.choose(labels, count)
            self.assertEqual(chosen, whole[:count])
            shares = labels[chosen].bincount(minlength=3) / count
            assert_near(shares, torch.tensor([0.6, 0.3, 0.1]), atol=1 / count)
        first_class = [index for index in whole if index < 60]
        self.assertNotEqual(first_class, sorted(first_class))
        self.assertEqual(data.choose(labels, 1000), whole)
        images, numbers, _ = data.load_images("digits", "test", 32, count=50)
        self.assertEqual(numbers.bincount().tolist(), [5] * 10)
        opened, all_labels = data.open_split("digits", "test", 32).tensors
        for place, index in enumerate(data.choose(all_labels, 50)):
            self.assertTrue(torch.equal(images[place], opened[index]))
            self.assertEqual(numbers[place], all_labels[index])

    def test_shares_of_processes(self):
        """Each has some, none are missing, none counted twice."""
        images, shares = torch.arange(7.), []
        for rank in range(3):
            with processes(rank, 3):
                own, labels = tested.own_share(images, images + 10)
            assert_near(labels, own + 10)
            shares += own.tolist()
            self.assertGreaterEqual(len(own), 2)
        self.assertEqual(sorted(shares), images.tolist())
        with processes(0, 8), self.assertRaisesRegex(UserError, "7 images are too few for 8 processes"):
            tested.own_share(images, images)


@contextlib.contextmanager
def processes(rank, world_size):
    """Inside, this is one of several processes."""
    with mock.patch.object(cli, "rank", return_value=rank), \
            mock.patch.object(cli, "world_size", return_value=world_size):
        yield


class TestBatches(unittest.TestCase):
    def test_epochs(self):
        """Each image once, in an order that belongs to the epoch."""
        dataset = TensorDataset(torch.arange(12.), torch.arange(12))
        batches, orders = data.TrainingBatches(dataset, 4, 256, 0, 0, CPU), []
        for epoch in (0, 1, 0):
            orders.append([])
            for images, labels in batches.epoch(epoch):
                self.assertEqual(images.tolist(), labels.tolist())
                orders[-1] += labels.tolist()
            self.assertEqual(sorted(orders[-1]), list(range(12)))
        self.assertNotEqual(orders[0], orders[1])
        self.assertEqual(orders[0], orders[2])
        self.assertNotEqual(orders[0], list(range(12)))

    def order(self, max_batch, rank=0, world_size=1):
        """The lists of indices that one of several processes gets, of batches of 12 of 50 images."""
        dataset = TensorDataset(torch.arange(50), torch.arange(50))
        with processes(rank, world_size):
            batches = data.TrainingBatches(dataset, 12, max_batch, 3, 0, CPU)
            found = batches.order(2)
        self.assertEqual(len(found), batches.steps * batches.micro_batches)
        return found

    def test_processes_and_micro_batches(self):
        """They divide the batches of one process, without gap or overlap."""
        whole = [set(batch) for batch in self.order(12)]
        self.assertEqual([len(batch) for batch in whole], [12] * 4)  # the partial one is dropped
        for parts, world in ((1, 2), (3, 1), (2, 3), (4, 3)):
            shares = [self.order(12 // parts // world, rank, world) for rank in range(world)]
            for step, batch in enumerate(whole):
                micro = [share[step * parts + part] for share in shares for part in range(parts)]
                self.assertEqual({len(indices) for indices in micro}, {12 // parts // world})
                self.assertEqual(set().union(*micro), batch)

    def test_pieces(self):
        """The same for one process and for two, and as they always were: old runs can be repeated."""
        expected = [[4, 31, 17], [30, 46, 5], [22, 2, 8], [10, 39, 43],
                    [9, 32, 45], [26, 18, 24], [41, 36, 44], [14, 35, 47]]
        self.assertEqual(self.order(3)[:8], expected)
        for rank in range(2):
            self.assertEqual(self.order(3, rank, 2)[:4], expected[rank::2])


TRAINING_IMAGES, VALIDATION_IMAGES = 4500, 500  # of each class of CIFAR-10


class Cifar10:
    """In the place of torchvision's: as many images, of labels in any order; the pixels tell the index."""
    classes = [f"class{number}" for number in range(10)]

    def __init__(self, folder, train, download=False):
        self.split = int(train)
        labels = np.arange(50_000 if train else 10_000) % 10
        self.targets = np.random.default_rng(0).permutation(labels).tolist()

    def __getitem__(self, index):
        color = (self.split, *divmod(index, 256))
        return Image.new("RGB", (32, 32), color), self.targets[index]

    def __len__(self):
        return len(self.targets)


def open_small_cifar10(split, image_size):
    """A few of each class of that."""
    whole = Cifar10("data", split != "test")
    per_class = {"train": 20, "val": 3, "test": 6}[split]
    chosen = data.choose(torch.tensor(whole.targets), 10 * per_class)
    part = torch.utils.data.Subset(whole, chosen)
    part.classes, part.targets = whole.classes, [whole.targets[index] for index in chosen]
    return part


class TestSeeds(unittest.TestCase):
    def test_large_seed(self):
        """Photographs are augmented, each seed in its own way."""
        images = data.open_folder(str(photos()), "train")
        drawn = []
        for seed in (10**9, 10**9, 10**9 - 1, 20_000):
            transformed = data.Transformed(images, training.pretrain_transform(32), seed)
            transformed.epoch = 3
            drawn.append(transformed[0][0])
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
                                  "--sigma", 0, "--attack", "fgsm", "--out", out))
            self.assertIn(f"\n2 {said} images of", result.out)
            self.assertEqual(read_csv(out / "attack.csv")[-1]["split"], said)
            shutil.copytree(folder / "val", folder / "test", dirs_exist_ok=True)
        shutil.rmtree(folder / "test")
        shutil.copytree(folder / "train", folder / "test")
        train, val, test = (data.load_images(str(folder), split, 32)[0] for split in data.SPLITS)
        self.assertTrue(torch.equal(train, test))
        self.assertFalse(torch.equal(val, test))

    def test_in_memory(self):
        """Up to 64 pixels as bytes; a batch is what decoding one by one gives."""
        name, transform = str(photos()), data.eval_transform(32)
        dataset = data.load_training_images(name, 32, transform, seed=0)
        self.assertTrue(data.in_memory(dataset))
        self.assertEqual(dataset.tensors[0].dtype, torch.uint8)
        self.assertFalse(data.in_memory(data.load_training_images(name, 65, transform, seed=0)))
        with mock.patch.object(data, "SMALL", 31):
            one_by_one = data.load_training_images(name, 32, transform, seed=0)
        self.assertFalse(data.in_memory(one_by_one))
        self.assertEqual(one_by_one.classes, dataset.classes)
        both = [data.TrainingBatches(images, 10, 256, 0, 0, CPU).epoch(0) for images in (dataset, one_by_one)]
        for (a, b), (c, d) in zip(*both, strict=True):
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
        half = copy_of_photos()
        shutil.rmtree(half / "train" / "red")
        (half / "train" / "red").mkdir()
        for folder, words in ((empty / "none", "no folder"), (empty, "no class folder"), (half, "red")):
            self.assertRaisesRegex(UserError, words, data.load_images, str(folder), "train", 32)

    def test_data_set_of_ones_own(self):
        """What it lacks, or numbers from 1, in a sentence; the same for images in memory and others."""
        class Own(list):
            pass

        def opened(classes=None, targets=None, labels=(0, 1), in_memory=False):
            if in_memory:
                dataset = TensorDataset(torch.zeros(2, 3, 32, 32), torch.tensor(labels))
            else:
                dataset = Own((Image.new("RGB", (32, 32)), label) for label in labels)
            for name, value in (("classes", classes), ("targets", targets)):
                if value is not None:
                    setattr(dataset, name, value)
            return dataset
        lacks, numbers = "own: a data set needs classes, .* targets", "own: labels must be .* from 0 to 1"
        from_1 = dict(classes=["a", "b"], labels=(1, 2))
        for words, settings in [
                (lacks, dict(targets=[0, 1])), (lacks, dict(classes=["a", "b"])),
                (lacks, dict(in_memory=True)), (numbers, dict(from_1, targets=[1, 2])),
                (numbers, dict(from_1, in_memory=True))]:
            with self.subTest(settings), self.entry(lambda split, image_size: opened(**settings)):
                for load in (lambda: data.load_images("own", "val", 32),
                             lambda: data.load_training_images("own", 32, None, 0)):
                    self.assertRaisesRegex(UserError, words, load)
        for in_memory in (True, False):
            good = dict(classes=["a", "b"], targets=[1, 0], labels=(1, 0), in_memory=in_memory)
            with self.entry(lambda split, image_size: opened(**good)):
                _, labels, classes = data.load_images("own", "val", 32)
            self.assertEqual((sorted(labels.tolist()), classes), ([0, 1], ["a", "b"]))

    def test_what_a_tensor_data_set_must_be(self):
        """Two classes of one name, or images of other floats: a sentence."""
        for images, classes, words in ((torch.zeros(2, 3, 32, 32), ["crane", "crane"], "the same name"),
                                       (torch.zeros(2, 3, 32, 32).double(), ["a", "b"], "uint8. or float32")):
            dataset = TensorDataset(images, torch.tensor([0, 1]))
            dataset.classes = classes
            with self.entry(lambda split, image_size: dataset):
                self.assertRaisesRegex(UserError, words, data.load_images, "own", "val", 32)

    def entry(self, opening):
        """Inside, DATASETS has "own", which is opened so."""
        row = data.DATASETS["digits"]._replace(open=opening)
        return mock.patch.dict(data.DATASETS, own=row)

    def test_cifar10_split(self):
        """The last images of each class become validation images; none is in two splits."""
        with mock.patch.object(datasets, "CIFAR10", Cifar10):
            whole, parts = Cifar10("data", True), []
            for split in ("train", "val", "test"):
                part = data.open_split("cifar10", split, 32)
                self.assertEqual(part.classes, Cifar10.classes)
                parts.append(part)
        train, val, test = parts
        self.assertEqual([len(split) for split in parts], [45_000, 5_000, 10_000])
        self.assertEqual(train.indices, sorted(train.indices))
        self.assertEqual(val.indices, sorted(val.indices))
        self.assertEqual(sorted(train.indices + val.indices), list(range(50_000)))
        for label in range(10):
            of_class = [index for index, target in enumerate(whole.targets) if target == label]
            own = [index for index in val.indices if whole.targets[index] == label]
            self.assertEqual(own, of_class[TRAINING_IMAGES:])
            self.assertEqual(len(own), VALIDATION_IMAGES)
        for part in (train, val):  # its images are those of its indices and labels
            for place in (0, 1, len(part) - 1):
                image, label = part[place]
                self.assertEqual(image.getpixel((0, 0)), (1, *divmod(part.indices[place], 256)))
                self.assertEqual(label, part.targets[place])
        self.assertEqual(test[0][0].getpixel((0, 0))[0], 0)  # the file of test images

    def test_cifar10_stages(self):
        small = data.DATASETS["cifar10"]._replace(open=open_small_cifar10)
        self.addCleanup(os.chdir, os.getcwd())
        folder = new_folder()
        os.chdir(folder)
        with mock.patch.dict(data.DATASETS, cifar10=small):
            finished(run("pretrain", *short_training(1, 64), "--data", "cifar10", "--size", "tiny"))
            finished(run("finetune", *short_training(1, 64), "--data", "cifar10"))
            few = ("--images", 20, "--steps", 1, "--eot", 2, "--eps", "4/255")
            result = finished(run("defend", "runs/cifar10/de3", *few))
            self.assertIn("20 test images of cifar10", result.out)
            finished(run("attack", "runs/cifar10/de3", *few, "--attack", "pgd+eot", "--sigma", 50))
            row, = read_csv(folder / "runs/cifar10/attack.csv")
        self.assertEqual(saved(folder / "runs/cifar10/de3")["data"]["images"], 200)
        self.assertEqual((row["defense"], row["level"], row["data"], row["split"], row["draws"],
                          row["precision"], row["reading"], row["eot"]),
                         ("de3, σ = 50", "σ = 50", "cifar10", "test", "5", "fp32", "one shot", "2"))

    def test_download_that_fails(self):
        """A sentence that says where to place the archive."""
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(new_folder())
        for error in (RuntimeError("Dataset not found"), OSError("no network")):
            with mock.patch("torchvision.datasets.CIFAR10.__init__", side_effect=error):
                assert_refused(run("pretrain", "--data", "cifar10"), "CIFAR10 into data/")


class TestOrderOfClasses(unittest.TestCase):
    """Labels in the order of a classifier's outputs, however a data set lists its classes."""

    def test_folders_that_are_numbers(self):
        """0 … 11 are in the order of numbers, not of text; other names in that of text."""
        folder = new_folder() / "numbers"
        for split in ("train", "val"):
            for number in range(12):
                (folder / split / str(number)).mkdir(parents=True)
                Image.new("RGB", (4, 4), (20 * number,) * 3).save(folder / split / str(number) / "0.png")
        images, labels, classes = data.load_images(str(folder), "val", 32)
        self.assertEqual(classes, [str(number) for number in range(12)])
        self.assertEqual(images.float().mean((1, 2, 3)).tolist(), (20 * labels).tolist())
        self.assertEqual(data.load_training_images(str(folder), 65, None, 0).classes, classes)
        for split in ("train", "val"):
            (folder / split / "x").mkdir()
            shutil.copy(folder / split / "0" / "0.png", folder / split / "x")
        _, _, classes = data.load_images(str(folder), "val", 32)
        self.assertEqual(classes, sorted(classes))

    def test_other_order(self):
        """Labels follow the classifier's order; images stay."""
        images, labels, own = data.load_images(str(photos()), "val", 32)
        self.assertEqual(own, ["blue", "green", "red"])
        for wanted in (["red", "blue", "green"], ["green", "red", "blue"], own):
            again, numbers, classes = data.load_images(str(photos()), "val", 32, wanted)
            self.assertEqual(classes, wanted)
            self.assertEqual([wanted[number] for number in numbers], [own[label] for label in labels])
            self.assertTrue(torch.equal(again, images))
        for other in (["red", "blue"], ["red", "blue", "yellow"], [*own, "yellow"]):
            self.assertRaises(UserError, data.load_images, str(photos()), "val", 32, other)

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
        """The same accuracy, for one run and for several."""
        usual = photo_classifier("clean")
        other, another = (self.reordered(usual, ["red", "blue", "green"]) for _ in range(2))
        flags = ("--attack", "fgsm", "--eps", 0)
        for runs in ([usual], [other], [other, another]):
            out = new_folder()
            finished(run("attack", *runs, *flags, "--out", out))
            found = {row["clean_accuracy"] for row in read_csv(out / "attack.csv")}
            if runs == [usual]:
                expected = found
            self.assertEqual(found, expected, runs)
        self.assertGreater(float(expected.pop()), 60)  # more than by chance
        assert_refused(run("attack", usual, other, *flags), ("have other classes", "in two calls"))

    def test_train_and_val_differ(self):
        """Refused before the training, by name."""
        other, out = copy_of_photos(), new_folder() / "clean"
        (other / "val" / "red").rename(other / "val" / "yellow")
        refused = run("finetune", "--mode", "clean", "--autoencoder", photo_autoencoder(),
                      "--data", other, "--out", out)
        assert_refused(refused, (other, "missing: red; unknown: yellow"))
        self.assertFalse(out.exists())

    def test_composed_and_decomposed_letters(self):
        """A Mac writes é as e and an accent, other systems as one letter: the same class."""
        folder = new_folder() / "images"
        for split, names in (("train", ("caf\u00e9", "tea")), ("val", ("cafe\u0301", "tea"))):
            for number, name in enumerate(names):
                (folder / split / name).mkdir(parents=True)
                Image.new("RGB", (32, 32), (99 * number,) * 3).save(folder / split / name / "0.png")
        train = data.load_training_images(str(folder), 32, None, 0)
        images, labels, classes = data.load_images(str(folder), "val", 32, train.classes)
        self.assertEqual(classes, ["caf\u00e9", "tea"])
        self.assertEqual(images.float().mean((1, 2, 3)).tolist(), (99 * labels).tolist())


if __name__ == "__main__":
    unittest.main()
