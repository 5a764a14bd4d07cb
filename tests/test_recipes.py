"""The recipes of base, large and huge, and their augmentation, against the authors' numbers."""

import unittest
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

import finetune
import pretrain
from model import IMAGENET_MEAN, IMAGENET_STD, SIZES, NoiseScale
from support import data, training
from tests.helpers import finished, new_folder, run


class TestRecipes(unittest.TestCase):
    def test_pretraining(self):
        for size in ("base", "large", "huge"):
            recipe = pretrain.RECIPES[size]
            self.assertEqual((recipe["epochs"], recipe["batch_size"], recipe["base_lr"],
                              recipe["weight_decay"]), (800, 4096, 1.5e-4, 0.05))
            self.assertAlmostEqual(recipe["epochs"] * recipe["warmup_share"], 40)
        self.assertEqual(pretrain.MASK_RATIO, 0.75)

    def test_finetuning(self):
        for size, epochs, drop_path in (("base", 100, 0.1), ("large", 50, 0.1), ("huge", 50, 0.2)):
            recipe = finetune.RECIPES[size]
            self.assertEqual((recipe["epochs"], recipe["drop_path"]), (epochs, drop_path))
            self.assertEqual((recipe["batch_size"], recipe["base_lr"], recipe["weight_decay"],
                              recipe["layer_decay"], recipe["label_smoothing"]),
                             (1024, 1e-3, 0.05, 0.75, 0.1))
            self.assertAlmostEqual(epochs * recipe["warmup_share"], 5)

    def test_warmup_of_the_digits(self):
        """A share of the epochs."""
        for recipe, warmup in ((pretrain.RECIPES["tiny"], 6), (finetune.RECIPES["tiny mim"], 4),
                               (finetune.RECIPES["tiny resnet18"], 1)):
            self.assertAlmostEqual(recipe["epochs"] * recipe["warmup_share"], warmup)

    def test_sizes(self):
        """Width, depth, heads and patch of the encoder; the decoder is the same for all three."""
        for size, numbers in {"base": (768, 12, 12, 16), "large": (1024, 24, 16, 16),
                              "huge": (1280, 32, 16, 14)}.items():
            config = SIZES[size]
            self.assertEqual(tuple(config[name] for name in (
                "embed_dim", "depth", "num_heads", "patch_size")), numbers)
            self.assertEqual(tuple(config[name] for name in (
                "decoder_embed_dim", "decoder_depth", "decoder_num_heads")), (512, 8, 16))
            self.assertEqual(config["image_size"], 224)

    def test_sigmas(self):
        """Of photographs, the paper's; they are trained at its size."""
        paper = data.PAPER
        self.assertEqual(NoiseScale.parse(paper["pretrain_sigma"]), NoiseScale("gamma", (25, 3)))
        self.assertEqual(NoiseScale.parse(paper["finetune_sigma"]), NoiseScale("uniform", (0, 30)))
        self.assertEqual((paper["size"], paper["eps"]), ("base", 4 / 255))

    def test_optimizers(self):
        """AdamW's betas; lr = base lr x batch/256; the last one is 0, in fine-tuning 1e-6."""
        folder = new_folder()
        flags = ("--epochs", 1, "--batch-size", 512, "--max-batch", 512, "--base-lr", 0.01)
        for stage, where, betas, final in [
                ("pretrain", ("--out", folder / "nim"), (0.9, 0.95), 0.0),
                ("finetune", ("--autoencoder", folder / "nim"), (0.9, 0.98), 1e-6)]:
            with mock.patch("torch.optim.AdamW", wraps=torch.optim.AdamW) as optimizer, \
                    mock.patch.object(training, "learning_rate", return_value=1e-6) as schedule:
                finished(run(stage, *where, *flags))
            self.assertEqual(optimizer.call_args.kwargs["betas"], betas)
            call = schedule.call_args
            self.assertAlmostEqual(call.args[3], 0.02)
            self.assertEqual(call.kwargs["final"], final)


class TestAugmentation(unittest.TestCase):
    def setUp(self):
        self.steps = training.finetune_transform(224, IMAGENET_MEAN, IMAGENET_STD).transforms

    def test_pretraining(self):
        crop, flip, _ = training.pretrain_transform(224).transforms
        self.assertEqual((crop.size, tuple(crop.scale), crop.interpolation),
                         ((224, 224), (0.2, 1), InterpolationMode.BICUBIC))
        self.assertEqual(flip.p, 0.5)

    def test_parameters(self):
        crop, flip, first, second = self.steps[:4]
        self.assertEqual((crop.size, tuple(crop.scale), crop.interpolation),
                         ((224, 224), (0.08, 1), InterpolationMode.BICUBIC))
        self.assertEqual(flip.p, 0.5)
        for applied in (first, second):  # each operation with probability 0.5, at 9 of 10
            operation, = applied.transforms
            self.assertEqual((applied.p, operation.num_ops, operation.magnitude), (0.5, 1, 27))
            self.assertEqual(operation.fill, [124, 116, 104])  # the mean color
            self.assertEqual(operation.interpolation, InterpolationMode.BICUBIC)
        erasing, = [step for step in self.steps if isinstance(step, transforms.RandomErasing)]
        self.assertEqual(erasing.p, 0.25)

    def test_erasing_writes_normalized_noise(self):
        """mean + std·z, clamped: few pixels are 0, where N(0, 1) in [0, 1] would leave half of them."""
        erasing, = [step for step in self.steps if isinstance(step, transforms.RandomErasing)]
        erasing.p, erasing.scale = 1, (0.33, 0.33)
        torch.manual_seed(0)
        gray = Image.fromarray(np.full((224, 224, 3), 128, np.uint8))
        image = transforms.Compose(self.steps[4:])(gray)
        self.assertTrue(0 <= image.min() and image.max() <= 1)
        erased = (image - 128 / 255).abs().amax(0) > 1e-3
        self.assertAlmostEqual(erased.double().mean().item(), 0.33, delta=0.03)
        pixels = image[:, erased]
        self.assertLess((pixels == 0).double().mean(), 0.05)
        for channel in range(3):
            self.assertAlmostEqual(pixels[channel].mean().item(), IMAGENET_MEAN[channel], delta=0.02)
            self.assertAlmostEqual(pixels[channel].std().item(), IMAGENET_STD[channel], delta=0.03)

    def test_crop_and_flip(self):
        """A window of the reflect-padded image, mirrored or not; every offset occurs."""
        images = torch.arange(3 * 16 * 16.).view(1, 3, 16, 16).expand(2000, -1, -1, -1)
        torch.manual_seed(0)
        moved = training.crop_and_flip(images)
        padded = torch.nn.functional.pad(images[:1], (4,) * 4, mode="reflect")[0]
        windows = [padded[:, top:top + 16, left:left + 16] for top in range(9) for left in range(9)]
        expected = {window.numpy().tobytes(): number for number, window in enumerate(
            [*windows, *[window.flip(2) for window in windows]])}
        found = [expected[image.numpy().tobytes()] for image in moved]
        self.assertEqual(len(set(found)), 162)
        self.assertAlmostEqual(sum(number >= 81 for number in found) / 2000, 0.5, delta=0.05)


if __name__ == "__main__":
    unittest.main()
