"""The data sets, their transforms, and the batches that are made of them."""

import functools
import unittest

import numpy as np
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from model import IMAGENET_MEAN, IMAGENET_STD
from support import data, training
from tests.helpers import assert_near, seeded


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
        usual = data.DEFAULTS["digits"]
        train = data.load_dataset("digits", "train", 32).tensors[0]
        self.assertAlmostEqual(train.mean().item(), usual["mean"][0], delta=0.01)
        self.assertAlmostEqual(train.std().item(), usual["std"][0], delta=0.01)

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
        order, orders = data.TrainingOrder(12, 4, 1, seed=0), []
        for order.epoch in (0, 1, 0):
            orders.append([])
            for images, labels in data.Loader(dataset, order):
                self.assertEqual(images.tolist(), labels.tolist())
                orders[-1] += labels.tolist()
            self.assertEqual(sorted(orders[-1]), list(range(12)))
        self.assertNotEqual(orders[0], orders[1])
        self.assertEqual(orders[0], orders[2])
        self.assertNotEqual(orders[0], list(range(12)))

    def test_training_order(self):
        """Processes and micro-batches divide the batches of one process, without gap or overlap."""
        whole = [set(batch) for batch in data.TrainingOrder(50, 12, 1, seed=3)]
        self.assertEqual([len(batch) for batch in whole], [12] * 4)  # the partial one is dropped
        for parts, world in ((1, 2), (3, 1), (2, 3), (4, 3)):
            shares = [list(data.TrainingOrder(50, 12, parts, 3, rank, world)) for rank in range(world)]
            for step, batch in enumerate(whole):
                micro = [share[step * parts + part] for share in shares for part in range(parts)]
                self.assertEqual({len(indices) for indices in micro}, {12 // parts // world})
                self.assertEqual(set().union(*micro), batch)
            order = data.TrainingOrder(50, 12, parts, 3, 0, world)
            self.assertEqual(len(order), len(list(order)))

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
