"""Tests of the whole project: python test_all.py (about two minutes on two cores, no downloads).

    TestPatches      patchify, position embedding, parameter names, initialization
    TestNoise        add_noise and NoiseScale
    TestViT          forward pass and MIM against a plain re-implementation
    TestLosses       NIM's and MIM's loss, masks, reconstruct
    TestClassifier   pooling, the copy of the encoder, drop path
    TestDe3          the defense: gradients, straight-through clamp, votes, MIM, refusals
    TestPgd          the attack: known optima, invariants, EOT, restarts, refusals
    TestTable        what attack.py reports: ball check, Wilson interval, merged rows
    TestAudit        catches a defense that hides its gradients, passes an honest one
    TestCertificate  the beta quantile, and attacks inside the certified radius
    TestDial         names what is missing; means over seeds
    TestCommon       learning rate, parameter groups, checkpoints
    TestData         the digits, augmentation, loader, subset
    TestStages       pretrain, finetune, defend, attack on the digits
    TestFolder       the same and the variants on a small folder of images
    TestPublished    --init, and the later stages, on weights from elsewhere
    TestProcesses    torchrun: the same weights, each image once, no hang
    TestResume       killed runs end with the same weights; finished runs are kept
    TestBadInput     one sentence and exit code 2

One class or test: python test_all.py TestPgd, python test_all.py TestPgd.test_fgsm
"""

import argparse
import contextlib
import csv
import functools
import importlib
import io
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import warnings
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models import resnet18

import attack
import common
import data
import defend
import finetune
import pretrain
from attack import pgd
from common import resize_pos_embed
from finetune import start_from_autoencoder
from model import (Autoencoder, Classifier, De3, NoiseScale, UserError, add_noise, patchify,
                   sincos_pos_embed, unpatchify)

torch.set_num_threads(1)
REPOSITORY = Path(__file__).resolve().parent
ENCODER = dict(image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
DECODER = dict(decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)


def small_autoencoder(seed=0, **config):
    torch.manual_seed(seed)
    return Autoencoder(**{**ENCODER, **DECODER, **config})


def small_classifier(seed=0, **config):
    """With a head that is large enough for its logits to matter."""
    torch.manual_seed(seed)
    classifier = Classifier(**{**ENCODER, **config})
    nn.init.normal_(classifier.head.weight)
    return classifier.eval()


def random_images(*shape, seed=0, low=0.0, high=1.0):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*(shape or (4, 3, 16, 16)), generator=generator)


def assert_near(actual, expected, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


# ---------------------------------------------------------------------------------------- model

class TestPatches(unittest.TestCase):
    def test_round_trip(self):
        for p in (1, 2, 4, 8):
            images = random_images(2, 3, 16, 16)
            self.assertEqual(patchify(images, p).shape, (2, (16 // p) ** 2, 3 * p * p))
            self.assertTrue(torch.equal(unpatchify(patchify(images, p), p), images))

    def test_order(self):
        """Patches row by row; inside a patch (row, column, channel)."""
        images, p = random_images(1, 3, 8, 8), 4
        patches = patchify(images, p)
        for patch, row, column, channel in [(0, 0, 0, 2), (0, 2, 1, 0), (1, 3, 0, 1), (2, 0, 3, 2)]:
            top, left = patch // 2 * p, patch % 2 * p
            self.assertEqual(patches[0, patch, (row * p + column) * 3 + channel],
                             images[0, channel, top + row, left + column])

    def test_sincos_pos_embed(self):
        embedding = sincos_pos_embed(8, 3)[0]  # 8 channels: column sin sin cos cos, row the same
        self.assertEqual(embedding.shape, (10, 8))
        assert_near(embedding[0], torch.zeros(8))
        row, column, slow = 1, 2, 0.01  # frequencies 1 and 10000^(-1/2)
        expected = [f(place * w) for place in (column, row) for f in (math.sin, math.cos)
                    for w in (1, slow)]
        assert_near(embedding[1 + 3 * row + column], torch.tensor(expected))

    def test_published_parameter_names(self):
        def block(prefix):
            return {f"{prefix}.0.{name}.{kind}" for kind in ("weight", "bias") for name in
                    ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}
        encoder = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
                   *block("blocks")}
        self.assertEqual(set(small_autoencoder(depth=1).state_dict()), encoder | {
            "norm.weight", "norm.bias", "decoder_embed.weight", "decoder_embed.bias", "mask_token",
            "decoder_pos_embed", *block("decoder_blocks"), "decoder_norm.weight",
            "decoder_norm.bias", "decoder_pred.weight", "decoder_pred.bias"})
        self.assertEqual(set(small_classifier(depth=1).state_dict()), encoder | {
            "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"})

    def test_initialization(self):
        model = small_autoencoder(embed_dim=1024, decoder_embed_dim=1024, depth=1)
        for layer in (model.blocks[0].mlp.fc1, model.decoder_pred, model.patch_embed.proj):
            matrix = layer.weight.flatten(1)
            bound = math.sqrt(6 / sum(matrix.shape))  # Xavier
            self.assertTrue(0.97 * bound < matrix.abs().max() <= bound)
            assert_near(layer.bias, torch.zeros_like(layer.bias))
        for token in (model.cls_token, model.mask_token):
            self.assertAlmostEqual(token.std().item(), 0.02, delta=0.002)
        assert_near(model.pos_embed, sincos_pos_embed(1024, 4))
        self.assertFalse(model.pos_embed.requires_grad or model.decoder_pos_embed.requires_grad)
        head = Classifier(**ENCODER, num_classes=500).head
        self.assertAlmostEqual(head.weight.std().item(), 2e-5, delta=1e-6)

    def test_sizes_that_do_not_fit(self):
        for config in (dict(image_size=30), dict(patch_size=5), dict(patch_size=32)):
            with self.subTest(config), self.assertRaises(UserError):
                small_autoencoder(**config)
        with self.assertRaisesRegex(UserError, "16, 16"):
            small_classifier()(random_images(1, 3, 32, 32))


class TestNoise(unittest.TestCase):
    def test_add_noise(self):
        torch.manual_seed(0)
        images = torch.full((10, 3, 256, 256), 0.9)
        noise = add_noise(images, 70) - images
        self.assertAlmostEqual(noise.mean().item(), 0, delta=0.001)
        self.assertAlmostEqual(noise.std().item(), 70 / 255, delta=0.0007)
        self.assertGreater(noise.max(), 0.5)  # not clipped at 1
        self.assertFalse(torch.equal(add_noise(images, 70) - images, noise))  # fresh
        self.assertTrue(torch.equal(add_noise(images, 0), images))

    def test_one_sigma_per_image(self):
        torch.manual_seed(0)
        sigma = torch.tensor([0.0, 25.5, 255.0])
        noise = add_noise(torch.zeros(3, 3, 64, 64), sigma)
        assert_near(noise.flatten(1).std(1), sigma / 255, atol=0.02, rtol=0.02)

    def test_noise_scale(self):
        torch.manual_seed(0)
        gamma = NoiseScale.parse("gamma:25,3").draw(20000)
        self.assertEqual(gamma.shape, (20000,))
        self.assertAlmostEqual(gamma.mean().item(), 75, delta=0.7)
        self.assertAlmostEqual(gamma.std().item(), 15, delta=0.5)
        uniform = NoiseScale.parse("uniform:10,30").draw(20000)
        self.assertTrue(10 <= uniform.min() < 10.1 and 29.9 < uniform.max() <= 30)
        self.assertAlmostEqual(uniform.mean().item(), 20, delta=0.2)
        self.assertEqual(NoiseScale.parse("70").draw(3).tolist(), [70, 70, 70])
        for text in ("70", "gamma:25,3", "uniform:0,30"):
            self.assertEqual(str(NoiseScale.parse(text)), text)

    def test_parse_refuses(self):
        for text in ("-1", "nan", "inf", "uniform:30,0", "uniform:-1,3", "uniform:3",
                     "uniform:0,nan", "gamma:0,3", "gamma:25", "gamma:25,3,1", "normal:1,2", "much",
                     "", "1,2"):
            with self.subTest(text), self.assertRaises(UserError):
                NoiseScale.parse(text)


def plain_norm(x, weights, name):
    centered = x - x.mean(-1, keepdim=True)
    x = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def plain_linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def plain_block(x, weights, name, heads):
    """x [L, D], one image: softmax(QKᵀ/√d)·V of each head, then the MLP with the exact GELU."""
    width = x.shape[1] // heads
    q, k, v = plain_linear(plain_norm(x, weights, f"{name}.norm1"), weights,
                           f"{name}.attn.qkv").chunk(3, dim=1)
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        outputs.append(scores.exp() / scores.exp().sum(1, keepdim=True) @ v[:, part])
    x = x + plain_linear(torch.cat(outputs, 1), weights, f"{name}.attn.proj")
    hidden = plain_linear(plain_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + plain_linear(hidden, weights, f"{name}.mlp.fc2")


def plain_tokens(image, model, weights):
    """image [3, H, W] -> patch tokens [L, D]: one dot product per patch."""
    p, tokens = model.patch_size, []
    image = (image - model.mean[0]) / model.std[0]
    kernel = weights["patch_embed.proj.weight"].flatten(1)
    for top in range(0, image.shape[1], p):
        for left in range(0, image.shape[2], p):
            patch = image[:, top:top + p, left:left + p].flatten()
            tokens.append(kernel @ patch + weights["patch_embed.proj.bias"])
    return torch.stack(tokens) + weights["pos_embed"][0, 1:]


def plain_encode(tokens, weights, heads=2):
    x = torch.cat([weights["cls_token"][0] + weights["pos_embed"][0, :1], tokens])
    for i in range(ENCODER["depth"]):
        x = plain_block(x, weights, f"blocks.{i}", heads)
    return x


def plain_decode(latent, weights):
    x = plain_block(latent + weights["decoder_pos_embed"][0], weights, "decoder_blocks.0", 2)
    return plain_linear(plain_norm(x, weights, "decoder_norm"), weights, "decoder_pred")[1:]


class TestViT(unittest.TestCase):
    """Weights without random numbers: each parameter holds sines of a running index."""

    def fill(self, model):
        start = 1
        with torch.no_grad():
            for parameter in model.parameters():
                index = torch.arange(start, start + parameter.numel(), dtype=torch.float64)
                parameter.copy_((0.1 * index).sin().view_as(parameter))
                start += parameter.numel()
        return model.double().eval(), dict(model.double().named_parameters())

    def test_autoencoder(self):
        model, weights = self.fill(small_autoencoder())
        images = random_images().double()
        with torch.no_grad():
            for image, prediction in zip(images, model.denoise(images)):
                x = plain_encode(plain_tokens(image, model, weights), weights)
                x = plain_linear(plain_norm(x, weights, "norm"), weights, "decoder_embed")
                assert_near(prediction, plain_decode(x, weights))

    def test_classifier(self):
        """The mean over the patch tokens, not the class token; no `norm`, but fc_norm."""
        model, weights = self.fill(small_classifier())
        images = random_images().double()
        with torch.no_grad():
            for image, logits in zip(images, model(images)):
                x = plain_encode(plain_tokens(image, model, weights), weights)[1:].mean(0)
                x = plain_norm(x, weights, "fc_norm")
                assert_near(logits, plain_linear(x, weights, "head"))

    def test_mim(self):
        """Only the kept patches are encoded; mask tokens stand in the places of the others."""
        model, weights = self.fill(small_autoencoder())
        images, scores = random_images().double(), random_images(4, 16, seed=1)
        with torch.no_grad():
            _, predictions, masks = model.mim(images, 0.75, scores)
            for image, score, prediction, mask in zip(images, scores, predictions, masks):
                kept = score.argsort()[:4]
                self.assertEqual(sorted(kept.tolist()), (mask == 0).nonzero()[:, 0].tolist())
                x = plain_encode(plain_tokens(image, model, weights)[kept], weights)
                x = plain_linear(plain_norm(x, weights, "norm"), weights, "decoder_embed")
                latent = weights["mask_token"][0].repeat(17, 1)
                latent[0], latent[1 + kept] = x[0], x[1:]
                assert_near(prediction, plain_decode(latent, weights))


class TestLosses(unittest.TestCase):
    def formula(self, images, norm_pix):
        """The target, patch by patch."""
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in
                     ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        targets = []
        for image in (images - mean) / std:
            for top in range(0, 16, 4):
                for left in range(0, 16, 4):
                    patch = image[:, top:top + 4, left:left + 4].permute(1, 2, 0).flatten()
                    if norm_pix:
                        variance = (patch - patch.mean()).square().sum() / (patch.numel() - 1)
                        patch = (patch - patch.mean()) / (variance + 1e-6).sqrt()
                    targets.append(patch)
        return torch.stack(targets).view(len(images), 16, 48)

    def test_nim(self):
        for norm_pix in (False, True):
            model, images = small_autoencoder(norm_pix=norm_pix), random_images()
            noisy = add_noise(images, 50)
            error = (model.denoise(noisy) - self.formula(images, norm_pix)).square()
            assert_near(model(images, noisy), error.mean())

    def test_variance_floor(self):
        """A flat patch: 1e-6 under the root, so nothing is divided by zero."""
        images = torch.full((1, 3, 16, 16), 0.5) + 1e-4 * random_images(1, 3, 16, 16)
        mean, std = torch.tensor([0.485, 0.456, 0.406]).mean(), 0.226
        model = small_autoencoder(norm_pix=True, mean=(mean,) * 3, std=(std,) * 3)
        patches = patchify((images - mean) / std, 4)
        scale = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        assert_near(model.target(images)[0], (patches - patches.mean(-1, keepdim=True)) / scale,
                    atol=0.01, rtol=0.01)

    def test_mim(self):
        images, scores = random_images(), random_images(4, 16, seed=1)
        for norm_pix in (False, True):
            model = small_autoencoder(norm_pix=norm_pix)
            loss, prediction, mask = model.mim(images, 0.75, scores)
            error = (prediction - self.formula(images, norm_pix)).square().mean(2)
            assert_near(loss, error[mask == 1].mean())
            assert_near(model.mim(images, 0.75, scores, all_patches=True)[0], error.mean())

    def test_mask_counts(self):
        model = small_autoencoder()
        for ratio in (0, 0.1, 0.5, 0.75, 0.9):
            mask = model.mim(random_images(), ratio)[2]
            self.assertEqual((mask == 0).sum(1).tolist(), [int(16 * (1 - ratio))] * 4)
            self.assertTrue(set(mask.unique().tolist()) <= {0.0, 1.0})
        self.assertGreater(len({tuple(row) for row in mask.tolist()}), 1)  # each image its own
        for ratio in (1, -0.1, math.nan, 0.99):  # 0.99 leaves none of 16
            with self.subTest(ratio), self.assertRaises(UserError):
                model.mim(random_images(), ratio)

    def test_masked_pixels_are_not_seen(self):
        model, images = small_autoencoder(), random_images()
        scores = random_images(4, 16, seed=1)
        _, prediction, mask = model.mim(images, 0.75, scores)
        pixels = unpatchify(mask[:, :, None].expand(-1, -1, 48), 4)
        hidden = torch.where(pixels == 1, torch.zeros(()), images)
        assert_near(model.mim(hidden, 0.75, scores)[1], prediction)
        seen = torch.where(pixels == 0, torch.zeros(()), images)
        self.assertGreater((model.mim(seen, 0.75, scores)[1] - prediction).abs().max(), 1e-3)

    def test_reconstruct(self):
        images, other = random_images(), random_images(seed=1, high=0.3)
        for norm_pix in (False, True):
            model = small_autoencoder(norm_pix=norm_pix)
            target = model.target(images)[0]
            assert_near(model.to_images(target, images), images)
            assert_near(model.reconstruct(other, images),
                        model.to_images(model.denoise(other), images))
            changed = (model.reconstruct(other, images) - model.reconstruct(other, other)).abs()
            self.assertEqual(changed.max().item() > 0.01, norm_pix)  # statistics of `reference`
        with mock.patch.object(model, "denoise", return_value=target):
            assert_near(model.reconstruct(other, images), images)


class TestClassifier(unittest.TestCase):
    def test_resize_pos_embed(self):
        embedding = sincos_pos_embed(16, 4)
        self.assertTrue(torch.equal(resize_pos_embed(embedding, 17), embedding))
        larger = resize_pos_embed(embedding, 65)
        self.assertEqual(larger.shape, (1, 65, 16))
        assert_near(larger[:, 0], embedding[:, 0])
        flat = torch.cat([torch.zeros(1, 1, 16), torch.arange(16.).expand(1, 16, 16)], 1)
        assert_near(resize_pos_embed(flat, 65)[0, 1:], torch.arange(16.).expand(64, 16))
        ramp = torch.arange(4.).repeat_interleave(4)[None, :, None]  # the row number
        rows = resize_pos_embed(torch.cat([torch.zeros(1, 1, 1), ramp], 1), 65)[0, 1:, 0].view(8, 8)
        self.assertTrue((rows.diff(dim=0) > 0).all() and (rows.diff(dim=1).abs() < 1e-5).all())

    def test_start_from_autoencoder(self):
        autoencoder, classifier = small_autoencoder(seed=1), small_classifier(seed=2)
        before = {name: value.clone() for name, value in classifier.state_dict().items()}
        start_from_autoencoder(classifier, autoencoder)
        for name, value in classifier.state_dict().items():
            own = name.startswith(("fc_norm", "head"))
            self.assertTrue(torch.equal(value, before[name] if own else
                                        autoencoder.state_dict()[name]), name)
        larger = small_classifier(image_size=32)
        start_from_autoencoder(larger, autoencoder)
        assert_near(larger.pos_embed.detach(), resize_pos_embed(autoencoder.pos_embed, 65))
        with self.assertRaises(UserError):
            start_from_autoencoder(small_classifier(embed_dim=32), autoencoder)

    def test_pos_embed_is_trained_and_drop_path_rises(self):
        classifier = small_classifier(depth=3, drop_path=0.4)
        self.assertTrue(classifier.pos_embed.requires_grad)
        assert_near(torch.tensor([block.drop_path.p for block in classifier.blocks]),
                    torch.tensor([0.0, 0.2, 0.4]))
        images = random_images(1, 3, 16, 16).expand(32, -1, -1, -1)
        self.assertLess(classifier(images).std(0).max(), 1e-4)
        self.assertGreater(classifier.train()(images).std(0).max(), 1e-2)  # per image


# ------------------------------------------------------------------------------------------ De³

def seeded(function, *arguments, seed=3):
    torch.manual_seed(seed)
    return function(*arguments)


class TestDe3(unittest.TestCase):
    def defense(self, sigma=20, spread=0.02, norm_pix=False, **settings):
        """spread: of the reconstructions around mid-gray; 0.02 clamps nothing, 1 a lot."""
        config = dict(image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
        autoencoder = small_autoencoder(norm_pix=norm_pix, **config)
        nn.init.normal_(autoencoder.decoder_pred.weight, std=spread)
        return De3(autoencoder, small_classifier(**config), sigma, **settings).double().eval()

    def gradient(self, defense, images):
        images = images.clone().requires_grad_()
        logits = seeded(defense, images)
        return torch.autograd.grad((logits * torch.arange(1., 11)).sum(), images)[0]

    def test_gradient_is_the_derivative(self):
        """Noise held fixed; against finite differences, with and without pixels that clamp."""
        images = random_images(1, 3, 8, 8).double()
        for spread, norm_pix in ((0.02, False), (0.02, True), (1, False)):
            defense = self.defense(spread=spread, norm_pix=norm_pix, straight_through=False)
            images.requires_grad_()
            self.assertTrue(torch.autograd.gradcheck(lambda x: seeded(defense, x), images))
            clamped = seeded(defense.purify, images)
            self.assertEqual(((clamped == 0) | (clamped == 1)).any().item(), spread == 1)

    def test_straight_through(self):
        images = random_images(2, 3, 8, 8).double()
        plain, through = (self.defense(straight_through=value) for value in (False, True))
        assert_near(self.gradient(through, images), self.gradient(plain, images), atol=1e-12)
        plain, through = (self.defense(spread=1, straight_through=v) for v in (False, True))
        self.assertTrue(torch.equal(seeded(plain, images), seeded(through, images)))
        change = (self.gradient(through, images) - self.gradient(plain, images)).abs()
        self.assertGreater(change.max(), 1e-3)

    def test_straight_through_differs_at_clamped_pixels_only(self):
        images = random_images(2, 3, 8, 8).double()
        defense = De3(None, nn.Flatten(), 100)  # no autoencoder: a pixel acts on itself alone
        clamped = seeded(defense.purify, images)
        clamped = (clamped == 0) | (clamped == 1)
        self.assertTrue(0.05 < clamped.double().mean() < 0.95)
        for straight_through in (False, True):
            defense.straight_through = straight_through
            x = images.clone().requires_grad_()
            gradient = torch.autograd.grad(seeded(defense, x).sum(), x)[0]
            self.assertTrue(torch.equal(gradient == 1, ~clamped | straight_through))

    def test_what_the_classifier_sees(self):
        images = random_images(2, 3, 8, 8).double()
        defense = self.defense(sigma=75, spread=1)
        for straight_through in (False, True):
            defense.straight_through = straight_through
            purified = seeded(defense.purify, images)
            self.assertTrue(0 <= purified.min() and purified.max() <= 1)
            noisy = seeded(lambda: add_noise(images, defense.sigma.draw(2)))
            assert_near(purified, defense.autoencoder.reconstruct(noisy, images).clamp(0, 1))
            assert_near(seeded(defense, images), defense.classifier(purified))
        self.assertGreater((defense(images) - defense(images)).abs().max(), 1e-4)  # random

    def test_norm_pix_statistics_come_from_the_input(self):
        autoencoder = small_autoencoder(norm_pix=True).eval()
        images = random_images(2, 3, 16, 16, low=0.3, high=0.7)
        with mock.patch.object(autoencoder, "denoise", lambda noisy: autoencoder.target(images)[0]):
            assert_near(De3(autoencoder, nn.Flatten(), 200).purify(images), images)

    def test_one_sigma_per_image_and_call(self):
        torch.manual_seed(0)
        defense = De3(None, nn.Flatten(), "uniform:0,40")
        stds = 255 * defense(torch.full((200, 3, 16, 16), 0.5)).std(1)
        self.assertTrue(stds.min() < 4 and 36 < stds.max() < 44)
        self.assertAlmostEqual(stds.mean().item(), 20, delta=4)

    def test_undefended(self):
        images, defense = random_images(2, 3, 8, 8).double(), self.defense()
        bare = De3(defense.autoencoder, defense.classifier, None, votes=3)
        self.assertTrue(torch.equal(bare(images), defense.classifier(images)))
        self.assertTrue(torch.equal(bare.purify(images), images))
        self.assertTrue(defense.defended and not bare.defended)

    def test_without_autoencoder(self):
        images, classifier = random_images(), small_classifier()
        noisy = seeded(lambda: add_noise(images, NoiseScale.parse(80).draw(4)))
        assert_near(seeded(De3(None, classifier, 80), images), classifier(noisy.clamp(0, 1)))

    def test_votes(self):
        images, one, five = random_images(2, 3, 8, 8).double(), self.defense(80), self.defense(80)
        five.votes = 5
        torch.manual_seed(3)
        mean = torch.stack([one(images).softmax(1) for _ in range(5)]).mean(0)
        assert_near(seeded(five, images), mean.log())

    def test_mim(self):
        images = random_images(low=0.01, high=0.99)
        autoencoder, classifier = small_autoencoder(), small_classifier()
        _, prediction, mask = seeded(autoencoder.mim, images, 0.75)
        whole = autoencoder.to_images(prediction, images).clamp(0, 1)
        defense = De3(autoencoder, classifier, None, mask_ratio=0.75)
        assert_near(seeded(defense.purify, images), whole)  # all of it, visible patches too
        assert_near(seeded(defense, images), classifier(whole))
        pixels = unpatchify(mask[:, :, None].expand(-1, -1, 48), 4)
        defense = De3(autoencoder, classifier, None, mask_ratio=0.75, keep_visible=True)
        assert_near(seeded(defense.purify, images), torch.where(pixels == 1, whole, images))

    def test_any_classifier(self):
        defense = De3(small_autoencoder(), resnet18(num_classes=7), 50).eval()
        images = random_images().requires_grad_()
        logits = defense(images)
        self.assertEqual(logits.shape, (4, 7))
        self.assertGreater(torch.autograd.grad(logits[:, 0].sum(), images)[0].abs().sum(), 0)

    def test_autoencoder_is_frozen(self):
        defense = De3(small_autoencoder(), small_classifier(), 50)
        defense(random_images()).square().sum().backward()
        self.assertTrue(all(p.grad is None for p in defense.autoencoder.parameters()))
        self.assertTrue(all(p.grad is not None for p in defense.classifier.parameters()))

    def test_refuses_images(self):
        for sigma in (None, 50):
            defense, images = De3(small_autoencoder(), small_classifier(), sigma), random_images()
            bad = images.clone()
            bad[0, 0, 0, 0] = math.nan
            for wrong in (bad, images + 0.01, images - 1.01, images * 255, images.round().long(),
                          (images * 255).byte(), images[0], images.numpy()):
                with self.subTest(sigma=sigma), self.assertRaises(UserError):
                    defense(wrong)
            images.view(-1)[:2] = torch.tensor([1 + 5e-7, -5e-7])
            self.assertEqual(defense(images).shape, (4, 10))
            images.view(-1)[0] = 1 + 5e-6
            self.assertRaises(UserError, defense, images)

    def test_refuses_settings(self):
        autoencoder, classifier = small_autoencoder(), small_classifier()
        for source, settings in [
                (autoencoder, dict(sigma=50, votes=0)), (autoencoder, dict(sigma=-1)),
                (autoencoder, dict(sigma=math.nan)), (autoencoder, dict(sigma=50, mask_ratio=0.5)),
                (None, dict(sigma=None, mask_ratio=0.5)),
                (autoencoder, dict(sigma=None, mask_ratio=1)),
                (autoencoder, dict(sigma=None, mask_ratio=-0.1))]:
            with self.subTest(settings), self.assertRaises(UserError):
                De3(source, classifier, **settings)


# --------------------------------------------------------------------------------------- attack

class Linear(nn.Module):
    """Two classes with logits 0 and w·x + b: label 0 is attacked by moving along w."""

    def __init__(self, shape=(3, 4, 4), bias=0.0):
        super().__init__()
        self.w = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        self.bias = bias

    def forward(self, x):
        score = (x * self.w).flatten(1).sum(1) + self.bias
        return torch.stack([torch.zeros_like(score), score], dim=1)


class Misleading(nn.Module):
    """Random model: its margin is the mean pixel - 0.55, but one draw of the slope misleads.

    The slope of a draw is -1 with probability 3/4, else 7: on average +1, most often negative.
    """

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        slope = torch.where(torch.rand(len(x)) < 0.75, -1.0, 7.0)
        score = mean.detach() - 0.55 + slope * (mean - mean.detach())
        return torch.stack([torch.zeros_like(score), score], dim=1)


class TestPgd(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.images = random_images(6, 3, 16, 16)
        self.labels = torch.arange(6)
        self.model = small_classifier()

    def test_linear_model(self):
        """The optimum is known: eps·sign(w) for linf, eps·w/|w| for l2."""
        model, labels = Linear(), torch.zeros(3, dtype=torch.long)
        images = random_images(3, 3, 4, 4, low=0.4, high=0.6)
        for loss in ("ce", "margin"):
            for norm, eps, best in [("linf", 0.1, model.w.sign()),
                                    ("l2", 0.3, model.w / model.w.norm())]:
                x = pgd(model, images, labels, eps, 150, eps / 10, norm, loss=loss)
                assert_near(x - images, (eps * best).expand_as(x), atol=1e-6)
                toward = pgd(model, images, labels, eps, 150, eps / 10, norm, targets=labels)
                assert_near(toward - images, (-eps * best).expand_as(x), atol=1e-6)

    def test_fgsm(self):
        x = self.images.clone().requires_grad_()
        loss = F.cross_entropy(self.model(x), self.labels)
        expected = (x + 0.1 * torch.autograd.grad(loss, x)[0].sign()).clamp(0, 1).detach()
        actual = pgd(self.model, self.images, self.labels, 0.1, 1, 0.1, random_start=False)
        assert_near(actual, expected, atol=1e-6)

    def test_default_step_size(self):
        """2.5·eps/steps: from the image, one step of it is cut back to eps, one of ten is not."""
        model, labels = Linear((3, 16, 16)), torch.zeros(6, dtype=torch.long)
        seen = []
        model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        images = self.images * 0.2 + 0.4
        pgd(model, images, labels, 0.1, 10, random_start=False)
        self.assertEqual(len(seen), 10)
        assert_near((seen[1] - seen[0]).abs(), torch.full_like(images, 0.025), atol=1e-6)

    def test_invariants(self):
        """In the ball, in [0, 1], without gradients, whatever the settings."""
        choice = np.random.default_rng(0)
        for trial in range(24):
            norm = ("linf", "l2")[trial % 2]
            eps = float(choice.uniform(0, 0.5 if norm == "linf" else 5))
            settings = dict(steps=int(choice.integers(1, 5)), restarts=int(choice.integers(1, 3)),
                            eot=int(choice.integers(1, 3)), loss=("ce", "margin")[trial // 2 % 2],
                            random_start=bool(trial % 3), targets=self.labels.flip(0)
                            if trial % 4 == 0 else None, step_size=(None, 10.0)[trial // 4 % 2])
            with self.subTest(norm=norm, eps=eps, **settings):
                x = pgd(self.model, self.images, self.labels, eps, norm=norm, **settings)
                self.assertTrue(0 <= x.min() and x.max() <= 1 and not x.requires_grad)
                delta = (x - self.images).flatten(1)
                length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
                self.assertLess(length.max(), eps + 1e-5)
                self.assertGreater(length.max(), 0)
        for norm in ("linf", "l2"):
            assert_near(pgd(self.model, self.images, self.labels, 0, 3, norm=norm), self.images)

    def test_project(self):
        """To the nearest point: what lies inside stays, what lies outside goes to the edge."""
        images = torch.full((2, 3, 4, 4), 0.5)
        delta = torch.zeros_like(images)
        delta[0, 0, 0, 0], delta[1, 0, 0, :2] = 0.05, torch.tensor([0.3, 0.4])
        for norm, edge in (("linf", [0.1, 0.1]), ("l2", [0.06, 0.08])):
            moved = attack.project(images + delta, images, 0.1, norm) - images
            assert_near(moved[0], delta[0])
            assert_near(moved[1, 0, 0, :2], torch.tensor(edge))
        near_white = torch.full((2, 3, 4, 4), 0.95)
        self.assertEqual(attack.project(near_white + 0.1, near_white, 0.1, "linf").max(), 1)

    def test_random_start(self):
        starts = [attack.random_point(torch.full((2000, 3, 4, 4), 0.5), 0.1, norm)
                  for norm in ("linf", "l2")]
        assert_near(starts[0].std(), torch.tensor(0.1 / math.sqrt(3)), atol=1e-3)  # of a uniform
        length = (starts[1] - 0.5).flatten(1).norm(dim=1)
        self.assertLessEqual(length.max(), 0.1 + 1e-6)
        volume = (length / 0.1) ** 48  # uniform over the ball: so is the share of its volume
        assert_near(volume.mean(), torch.tensor(0.5), atol=0.03)
        a, b = (pgd(self.model, self.images, self.labels, 0.1, 1) for _ in range(2))
        self.assertFalse(torch.equal(a, b))

    def test_stronger_than_random_and_targeted(self):
        labels = self.model(self.images).argmax(1)
        loss = lambda x, y: F.cross_entropy(self.model(x), y, reduction="none")
        x = pgd(self.model, self.images, labels, 0.03, 10)
        noise = attack.random_point(self.images, 0.03, "linf")
        self.assertTrue((loss(x, labels) > loss(noise, labels)).all())
        targets = (labels + 1) % 10
        x = pgd(self.model, self.images, labels, 0.03, 10, targets=targets)
        self.assertTrue((loss(x, targets) < loss(self.images, targets)).all())

    def test_margin(self):
        logits = torch.tensor([[1., 4., 3.], [2., 2., -1.], [9., 0., 8.]])
        assert_near(attack.margin(logits, torch.tensor([1, 0, 1])), torch.tensor([-1., 0., 9.]))

    def test_eot(self):
        """One draw of the gradient goes the wrong way; the mean over 16 goes the right way."""
        images, labels = torch.full((64, 3, 4, 4), 0.5), torch.zeros(64, dtype=torch.long)
        broken = {}
        for eot in (1, 16):
            x = pgd(Misleading(), images, labels, 0.1, 20, 0.02, eot=eot)
            broken[eot] = (Misleading()(x).argmax(1) == 1).float().mean()
        self.assertLess(broken[1], 0.2)
        self.assertGreater(broken[16], 0.8)

    def test_gradient_is_a_mean(self):
        one, three = (attack.input_gradient(self.model, self.images, self.labels, None, "ce", eot)[0]
                      for eot in (1, 3))
        assert_near(one, three)

    def test_draws_together(self):
        """EOT draws in one batch: as many as max_batch allows, with the same mean gradient."""
        sizes = []
        hook = self.model.register_forward_pre_hook(lambda module, x: sizes.append(len(x[0])))
        one, _ = attack.input_gradient(self.model, self.images, self.labels, None, "ce", 1)
        for max_batch, expected in [(None, [6] * 5), (6, [6] * 5), (17, [12, 12, 6]), (30, [30]),
                                    (1000, [30]), (2, [6] * 5)]:
            sizes.clear()
            many, errors = attack.input_gradient(self.model, self.images, self.labels, None, "ce", 5,
                                                 max_batch)
            self.assertEqual(sizes, expected)
            assert_near(many, one)
            assert_near(errors, (self.model(self.images).argmax(1) != self.labels).float())
        hook.remove()

    def test_early_stop(self):
        """Images that already err stay as they are; no image that would be fooled is lost."""
        images = random_images(40, 3, 16, 16, seed=2)
        labels = self.model(images).argmax(1)
        labels[:3] = (labels[:3] + 1) % 10  # err from the start
        robust = {}
        for early_stop in (False, True):
            x = pgd(self.model, images, labels, 0.02, 10, random_start=False, early_stop=early_stop)
            robust[early_stop] = self.model(x).argmax(1) == labels
        self.assertTrue(torch.equal(x[:3], images[:3]))
        self.assertTrue(0 < robust[False].sum() < 37)
        self.assertTrue((robust[True] <= robust[False]).all())

    def test_draws_are_fresh(self):
        """Each step and each of its eot draws is a new call of the model, and of its noise."""
        model = De3(None, small_classifier(), 50)
        calls = []
        model.classifier.register_forward_pre_hook(lambda module, x: calls.append(x[0].detach()))
        pgd(model, self.images, self.labels, 0, steps=3, eot=4)
        self.assertEqual(len(calls), 12)
        self.assertEqual(len({call.sum().item() for call in calls}), 12)

    def test_restarts(self):
        images = random_images(40, 3, 16, 16, seed=2)
        labels = self.model(images).argmax(1)
        gains = {}
        for restarts in (1, 4):
            x = seeded(lambda: pgd(self.model, images, labels, 0.02, 1, restarts=restarts))
            gains[restarts] = attack.margin(self.model(x), labels)
        self.assertGreaterEqual((gains[4] > 0).sum(), (gains[1] > 0).sum())
        self.assertTrue((gains[4] >= gains[1] - 1e-5).all())
        self.assertGreater(gains[4].mean(), gains[1].mean())

    def test_strongest(self):
        """The error rate decides, then the margin; here in one fixed cycle of draws."""
        class Cycle(nn.Module):
            draw = 0

            def forward(self, x):  # dark: errs narrowly in 9 of 10 draws; bright: widely in 1
                self.draw += 1
                often = torch.tensor(0.01 if self.draw % 10 else -1.0)
                rarely = torch.tensor(-0.01 if self.draw % 10 else 100.0)
                score = torch.where(x[:, 0, 0, 0] < 0.5, often, rarely)
                return torch.stack([torch.zeros_like(score), score], dim=1)
        often, rarely = torch.full((2, 3, 4, 4), 0.1), torch.full((2, 3, 4, 4), 0.9)
        labels = torch.zeros(2, dtype=torch.long)
        for candidates in ([often, rarely], [rarely, often]):
            assert_near(attack.strongest(Cycle(), candidates, labels), often)
        one, two = often.clone(), often.clone()
        one[0], two[1] = 0.3, 0.3  # each candidate is the better one for one of two images
        model = Linear((3, 4, 4), bias=50)  # errs everywhere: the margin decides
        score = model(one)[:, 1] > model(two)[:, 1]
        expected = torch.where(score.view(-1, 1, 1, 1), one, two)
        self.assertEqual(score.sum(), 1)
        assert_near(attack.strongest(model, [one, two], labels), expected)

    def test_without_gradients(self):
        """Works under no_grad and for frozen models, and leaves no gradient behind."""
        expected = seeded(lambda: pgd(self.model, self.images, self.labels, 0.1, 2))
        self.model.requires_grad_(False)
        with torch.no_grad():
            actual = seeded(lambda: pgd(self.model, self.images, self.labels, 0.1, 2))
        assert_near(actual, expected)
        self.model.requires_grad_(True)
        pgd(self.model, self.images, self.labels, 0.1, 2)
        self.assertTrue(all(p.grad is None for p in self.model.parameters()))

    def test_refuses(self):
        nan = self.images.clone()
        nan[0, 0, 0, 0] = math.nan
        for images, eps, steps, settings in [
                (self.images, 8, 1, {}), (self.images, -0.1, 1, {}), (self.images, math.nan, 1, {}),
                (self.images, math.inf, 1, dict(norm="l2")), (self.images, 0.1, 0, {}),
                (self.images, 0.1, 1, dict(norm="l1")), (self.images, 0.1, 1, dict(loss="mse")),
                (self.images, 0.1, 1, dict(restarts=0)), (self.images, 0.1, 1, dict(eot=0)),
                (self.images, 0.1, 1, dict(step_size=-1)), (self.images.long(), 0.1, 1, {}),
                (self.images * 255, 0.1, 1, {}), (self.images - 0.5, 0.1, 1, {}),
                (nan, 0.1, 1, {})]:
            with self.subTest(eps=eps, steps=steps, **settings), self.assertRaises(UserError):
                pgd(self.model, images, self.labels, eps, steps, **settings)

        class Broken(nn.Module):
            def forward(self, x):
                return self.linear(x) * math.nan
            linear = Linear((3, 16, 16))
        with self.assertRaisesRegex(UserError, "finite"):
            pgd(Broken(), self.images, torch.zeros(6, dtype=torch.long), 0.1, 1)


class TestTable(unittest.TestCase):
    def test_check_adversarial(self):
        images = random_images(low=0.3, high=0.7)
        for norm, far in (("linf", 0.11), ("l2", 0.11 / math.sqrt(3 * 16 * 16))):
            attack.check_adversarial(images + far * 0.1 / 0.111, images, 0.1, norm)
            with self.assertRaises(UserError):
                attack.check_adversarial(images + far, images, 0.1, norm)
        one_bad = images.clone()
        one_bad[2, 1, 5, 5] += 0.11
        self.assertRaises(UserError, attack.check_adversarial, one_bad, images, 0.1, "linf")
        self.assertRaises(UserError, attack.check_adversarial, images + 0.5, images, 1, "linf")
        self.assertRaises(UserError, attack.check_adversarial, images * math.nan, images, 1, "linf")

    def test_interval(self):
        """Known values of Wilson's interval."""
        for percent, images, low, high in [(50, 10, 23.7, 76.3), (0, 10, 0.0, 27.8),
                                           (100, 10, 72.2, 100.0), (8100 / 263, 263, 25.5, 36.6)]:
            numbers = [float(n) for n in re.findall(r"-?[\d.]+", attack.interval(percent, images))]
            assert_near(torch.tensor(numbers), torch.tensor([percent, low, high]), atol=0.06)

    def test_accuracy(self):
        """The mean over fresh draws, of each image."""
        class Coin(nn.Module):
            def forward(self, x):
                return torch.rand(len(x), 2) - torch.tensor([0.0, 0.5])
        torch.manual_seed(0)
        result = attack.accuracy(Coin(), torch.zeros(5, 3, 4, 4), torch.zeros(5).long(), draws=2000)
        assert_near(result, torch.full((5,), 0.875).double(), atol=0.03)

    def test_append_row(self):
        def row(**changes):
            return {**{name: "1" for name in attack.FIELDS}, **changes}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "new" / "attack.csv"
            attack.append_row(path, row(sigma=50.0, robust_accuracy=10))
            attack.append_row(path, row(sigma=""))
            self.assertEqual([(row["sigma"], row["robust_accuracy"]) for row in read_csv(path)],
                             [("50.0", "10"), ("", "1")])
            path.write_text("a,b\n1,2\n")
            self.assertRaises(UserError, attack.append_row, path, row())
            self.assertEqual(path.read_text(), "a,b\n1,2\n")


@functools.cache
def linear_on_digits():
    """A linear classifier fitted by least squares on the training digits; 100 test digits, labels."""
    images, labels = data.load_dataset("digits", "train", 32).tensors
    x = torch.cat([images.flatten(1), torch.ones(len(images), 1)], dim=1).double()
    weights = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ F.one_hot(labels).double())
    layer = nn.Linear(3072, 10)
    layer.weight.data, layer.bias.data = 10 * weights[:-1].T.float(), 10 * weights[-1].float()
    return nn.Sequential(nn.Flatten(), layer), data.subset(data.load_dataset("digits", "test", 32),
                                                           100).tensors


class TestAudit(unittest.TestCase):
    def suspicious(self, kind):
        model, (images, labels) = linear_on_digits()
        checks = seeded(lambda: attack.audit(kind(None, model, 20), images[:50], labels[:50], 0.05, 10,
                                             2, 5, 400))
        return [name for name, figures, holds in checks if not holds]

    def test_honest(self):
        self.assertEqual(self.suspicious(De3), [])

    def test_quantizes(self):
        class Quantizes(De3):  # no gradient
            def purify(self, images):
                return (super().purify(images) * 4).round().clamp(0, 4) / 4
        found = self.suspicious(Quantizes)
        self.assertIn("under 5% of the input gradients are zero or not finite", found)
        self.assertIn("gray-box is no stronger than white-box", found)

    def test_noise_under_gradients(self):
        class Hides(De3):  # drowns the gradient, and only the gradient
            def purify(self, images):
                return add_noise(images, 2000 if torch.is_grad_enabled() else 20)
        self.assertIn("accuracy is the same while gradients are taken", self.suspicious(Hides))

    def test_exit_code(self):
        runs, *_ = digits_runs()
        flags = ("--audit", "--runs", runs, "--images", 4, "--draws", 1, "--steps", 1, "--eot", 1)
        for holds, code in ((True, 0), (False, 1)):
            checks = [("a check", "1.0", holds), ("another", "1.0", True)]
            with mock.patch.object(attack, "audit", return_value=checks):
                result = run("attack", *flags)
            self.assertEqual((result.code, "SUSPICIOUS" in result.out), (code, not holds))
        self.assertRegex(run("attack", *flags).out, "holds +random noise")
        for extra in (["--norm", "l2"], ["--threat", "gray"], ["--plain-clamp"]):
            TestBadInput().assert_refused(run("attack", *flags, *extra), (extra[0], "leave out"))


class TestCertificate(unittest.TestCase):
    def test_lower_bound(self):
        """Quantiles of the beta distribution, as SciPy's beta.ppf gives them."""
        for hits, draws, alpha, expected in [
                (1000, 1000, 0.001, 0.9931160484), (990, 1000, 0.001, 0.9760361872),
                (600, 1000, 0.001, 0.5510754739), (50, 100, 0.001, 0.3447980064),
                (99500, 100000, 0.001, 0.9942718184), (0, 10, 0.001, 0.0),
                (7, 7, 0.05, 0.05 ** (1 / 7))]:
            self.assertAlmostEqual(defend.lower_bound(hits, draws, alpha), expected, delta=1e-7)

    def test_certified_radius(self):
        """L2 PGD with EOT inside the radius does not change the vote of 500 draws."""
        model, (images, labels) = linear_on_digits()
        defense, held, radii = De3(None, model, 60, straight_through=False), 0, []
        torch.manual_seed(0)
        for image, label in zip(images, labels):
            predicted, hits, radius = defend.certify(defense, image, 100, 500, 500)
            if predicted == label:
                radii.append(radius)
                x = pgd(defense, image[None], label[None], 0.99 * radius, 5, norm="l2", eot=10)
                vote = defense(x.expand(500, -1, -1, -1)).argmax(1).bincount().argmax()
                held += (vote == label).item()
        self.assertGreater(len(radii), 50)
        self.assertTrue(0.05 < max(radii) <= 60 / 255 * 2.21)  # the largest from 500 draws
        self.assertGreaterEqual(held, len(radii) - 2)  # 0.1 in 100 are expected to fail

    def test_abstains_and_refuses(self):
        model, (images, _) = linear_on_digits()
        class Guesses(nn.Module):
            def forward(self, x):
                return torch.rand(len(x), 10)
        self.assertIsNone(defend.certify(De3(None, Guesses(), 50), images[0], 10, 100, 100)[0])
        autoencoder = small_autoencoder(norm_pix=True, image_size=32)
        for defense in (De3(None, model, None), De3(None, model, 0), De3(None, model, 50, votes=2),
                        De3(autoencoder, model, 50), De3(None, model, NoiseScale.parse("uniform:1,9")),
                        De3(small_autoencoder(image_size=32), model, None, mask_ratio=0.5)):
            self.assertRaises(UserError, defend.certify, defense, images[0], 10, 10, 10)

    def test_stage(self):
        """The printed table is the share of certify.csv's rows that are right and reach the radius."""
        runs, *_ = digits_runs()
        result = finished(run("defend", "--certify", "--runs", runs, "--images", 9, "--n0", 5, "--n", 20))
        table = runs / "digits/certify.csv"
        rows, old = read_csv(table), table.read_bytes()
        self.assertEqual([row["draws"] for row in rows], ["20"] * 9)
        right = [float(row["l2_radius"]) for row in rows if row["label"] == row["predicted"]]
        self.assertTrue(0 < len(right) < 9, rows)  # else the next lines say little
        printed = re.findall(r"^ +(\d\.\d\d) +([\d.]+)(?:  a corner .*/255)?$", result.out, re.M)
        self.assertEqual(len(printed), 11)
        self.assertIn("     1.74", result.out)
        self.assertIn(" 3.48                   0.0  a corner of the Linf ball of 16/255", result.out)
        for radius, certified in printed:
            reached = [found for found in right if found >= float(radius) - 0.005]
            self.assertAlmostEqual(float(certified), 100 * len(reached) / 9, delta=0.06)
        self.assertEqual(run("defend", "--certify", "--runs", runs, "--n", 9).code, 2)
        refused = run("defend", "--certify", "--runs", runs, "--images", 2, "--votes", 2)
        self.assertEqual((refused.code, table.read_bytes()), (2, old))


class TestDial(unittest.TestCase):
    def test_missing_models(self):
        runs, *_ = digits_runs()
        result = run("defend", "--dial", 0, 1, "--runs", runs)
        TestBadInput().assert_refused(result, ("python pretrain.py --sigma 120 --runs", "--seed 1",
                                               "--adversarial 16/255", "--keep-visible"))
        self.assertEqual(result.err.count("python "), 3 + 4 + 6 + 8)

    def test_table(self):
        """Mean and standard deviation over seeds; without EOT and with it."""
        runs = new_folder() / "a folder"
        for name, (path, *_) in defend.DIAL.items():
            for suffix in ("", "_seed1"):
                source, classifier = path.split("/")
                folder = runs / "digits" / (source + suffix) / (classifier + suffix)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "checkpoint.pt").touch()
                (folder.parent / "checkpoint.pt").touch()

        def fake(argv):
            self.assertIn(str(runs), argv)  # whole, with its blank
            seed, masked = int(argv[argv.index("--seed") + 1]), "--mask-ratio" in argv
            base = dict(defense="x", eps="0.06", images=9, mask_ratio=0.5 if masked else "",
                        clean_accuracy=90.0 + seed)
            levels = [""] if masked or "--sigma" not in argv else [0.0, 50.0]
            return [dict(base, sigma=sigma, attack=attack, robust_accuracy=value + 2 * seed)
                    for sigma in levels for attack, value in (("pgd", 50.0), ("pgd+eot", 40.0))]
        with mock.patch.object(attack, "main", side_effect=fake) as calls:
            result = finished(run("defend", "--dial", 0, 1, "--runs", runs))
        self.assertEqual(calls.call_count, 2 * len(defend.DIAL))
        for level in ("undefended +off", r"NIM, Gamma\(10, 12\) +sigma 50", "MIM, whole output +mask 0.5"):
            self.assertRegex(result.out, level + r" +90.5 ± +0.7 +51.0 ± +1.4 +41.0 ± +1.4\n")


# ------------------------------------------------------------------------------- common and data

class RunsCode:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


class TestCommon(unittest.TestCase):
    def test_learning_rate(self):
        rates = [pretrain.learning_rate(step, 100, 20, 2.0, 0.5) for step in range(101)]
        self.assertEqual(rates[0], 0)
        self.assertAlmostEqual(rates[10], 1)
        self.assertAlmostEqual(rates[20], 2)
        self.assertAlmostEqual(rates[60], 1.25)  # half the way down
        self.assertAlmostEqual(rates[40], 0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2)
        self.assertAlmostEqual(rates[100], 0.5)
        self.assertEqual(max(rates), rates[20])
        self.assertEqual(pretrain.learning_rate(0, 100, 0, 2.0, 0.5), 2.0)  # no warm-up

    def test_parameter_groups(self):
        classifier, found = small_classifier(), {}
        groups = pretrain.parameter_groups(classifier, 0.05, layer_decay=0.5)
        names = {id(parameter): name for name, parameter in classifier.named_parameters()}
        for group in groups:
            for parameter in group["params"]:
                found[names[id(parameter)]] = group["weight_decay"], group["lr_scale"]
        self.assertEqual(set(found), set(names.values()))
        self.assertEqual(sum(len(group["params"]) for group in groups), len(names))
        for name, expected in {
                "cls_token": (0, 0.125), "pos_embed": (0, 0.125),
                "patch_embed.proj.bias": (0, 0.125), "patch_embed.proj.weight": (0.05, 0.125),
                "blocks.0.attn.qkv.weight": (0.05, 0.25), "blocks.1.attn.qkv.weight": (0.05, 0.5),
                "blocks.1.norm1.weight": (0, 0.5), "fc_norm.weight": (0, 1),
                "head.weight": (0.05, 1), "head.bias": (0, 1)}.items():
            self.assertEqual(found[name], expected, name)
        pretraining = pretrain.parameter_groups(small_autoencoder(), 0.05)
        self.assertEqual({group["lr_scale"] for group in pretraining}, {1})
        self.assertTrue(all(p.requires_grad for group in pretraining for p in group["params"]))

    def test_update(self):
        layers = [nn.Parameter(torch.ones(())) for _ in range(2)]
        optimizer = torch.optim.SGD([dict(params=[layers[0]], lr_scale=1.0),
                                     dict(params=[layers[1]], lr_scale=0.25)])
        for _ in range(2):  # gradients add up over micro-batches, not over steps
            for _ in range(3):
                pretrain.backward(3 * (layers[0] + layers[1]), parts=3, step=0)
            pretrain.update(optimizer, lr=0.1)
        assert_near(torch.stack(layers).detach(), torch.tensor([1 - 0.6, 1 - 0.15]))
        for bad in (math.nan, math.inf):
            with self.assertRaisesRegex(UserError, "step 7"):
                pretrain.backward(layers[0] * bad, 1, step=7)
        assert_near(layers[0].detach(), torch.tensor(0.4))

    def test_log_epoch(self):
        """Means over the epoch's images, its speed, and the time that the epochs left would take."""
        for hits, accuracy in ((15, "accuracy  75.0%  "), (math.nan, "")):
            out = io.StringIO()
            with mock.patch("time.time", return_value=1002.0), contextlib.redirect_stdout(out):
                pretrain.log_epoch(2, 42, 1000.0, 0.01, loss=30.0, images=20, hits=hits)
            self.assertEqual(out.getvalue(), f"epoch    2/42  loss  1.5000  {accuracy}lr 1.0e-02      "
                                             "10 images/s  1:20 left\n")

    def test_psnr(self):
        a = torch.zeros(2, 3, 4, 4)
        b = a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
        assert_near(common.psnr(b, a), torch.tensor([20., 40.]), atol=1e-3)

    def test_autocast(self):
        """bfloat16 where --bf16 says so; without the flag on a GPU only, and only in training."""
        product = lambda: torch.ones(2, 2) @ torch.ones(2, 2)
        for bf16, expected in ((True, torch.bfloat16), (False, torch.float32), (None, torch.float32)):
            with common.autocast(mock.Mock(bf16=bf16), torch.device("cpu"), default=True):
                self.assertEqual(product().dtype, expected)
        for default in (True, False):
            with mock.patch("torch.autocast") as autocast:
                common.autocast(mock.Mock(bf16=None), torch.device("cuda"), default)
            self.assertEqual(autocast.call_args.kwargs["enabled"], default)

    def checkpoint(self, **changes):
        return dict(dict(kind="autoencoder", config={}, model={}, epoch=1, epochs=1), **changes)

    def test_failed_save_keeps_the_old_file(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run" / "checkpoint.pt"
            common.save_checkpoint(path, self.checkpoint())
            old = path.read_bytes()

            full = mock.patch("os.fsync", side_effect=OSError("No space left on device"))
            with full, self.assertRaisesRegex(UserError, "No space left"):
                common.save_checkpoint(path, self.checkpoint(epoch=2))
            self.assertEqual(path.read_bytes(), old)
            self.assertEqual(list(path.parent.iterdir()), [path])  # no half file takes up the room
            common.save_checkpoint(path, self.checkpoint(epoch=3))
            self.assertEqual(common.load_checkpoint(path, "autoencoder")["epoch"], 3)
            self.assertEqual(list(path.parent.iterdir()), [path])

    def test_load_refuses(self):
        with tempfile.TemporaryDirectory() as folder:
            path, trace = Path(folder) / "checkpoint.pt", Path(folder) / "trace"
            torch.save(self.checkpoint(model=RunsCode(trace)), path)
            self.assertRaises(UserError, common.load_checkpoint, path, "autoencoder")
            path.write_bytes(pickle.dumps(self.checkpoint(model=RunsCode(trace)), protocol=2))
            self.assertRaises(UserError, common.load_checkpoint, path, "autoencoder")
            self.assertFalse(trace.exists())
            torch.save(self.checkpoint(model={"w": torch.zeros(1000)}), path)
            common.load_checkpoint(path, "autoencoder")
            whole = path.read_bytes()
            self.assertRaisesRegex(UserError, "autoencoder.*classifier", common.load_checkpoint,
                                   path, "classifier")
            for content in (whole[:len(whole) // 2], whole[:10], b"", b"hello"):
                path.write_bytes(content)
                self.assertRaises(UserError, common.load_checkpoint, path, "autoencoder")
            for foreign in ({"model": {}}, [1, 2], torch.zeros(3)):
                torch.save(foreign, path)
                self.assertRaises(UserError, common.load_checkpoint, path, "autoencoder")


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
        mean, std = data.DATASETS["digits"]["mean"], data.DATASETS["digits"]["std"]
        train = data.load_dataset("digits", "train", 32).tensors[0]
        self.assertAlmostEqual(train.mean().item(), mean[0], delta=0.01)
        self.assertAlmostEqual(train.std().item(), std[0], delta=0.01)

    def test_shift(self):
        """Moved a little, still in [0, 1]; eight images share one draw."""
        images = data.load_dataset("digits", "train", 32)[:1][0].expand(16, -1, -1, -1)
        moved = seeded(lambda: data.shift(images))
        self.assertTrue(0 <= moved.min() and moved.max() <= 1)
        for start in (0, 8):
            assert_near(moved[start:start + 8], moved[start].expand(8, -1, -1, -1))
        rows = torch.arange(32.0)
        center = [(x[:, 0].sum(2) * rows).sum(1) / x[:, 0].sum((1, 2)) for x in (images, moved)]
        self.assertTrue((0.01 < (center[0] - center[1]).abs()).all())
        self.assertTrue(((center[0] - center[1]).abs() < 5).all())
        self.assertNotAlmostEqual(center[1][0].item(), center[1][8].item(), places=3)

    def test_transforms(self):
        photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
        for transform in (data.pretrain_transform, data.finetune_transform, data.eval_transform):
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
        in_order = [labels.tolist() for _, labels in data.loader(dataset, 5)]
        self.assertEqual(in_order, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]])
        order, orders = data.TrainingOrder(12, 4, 1, seed=0), []
        for order.epoch in (0, 1, 0):
            orders.append([])
            for images, labels in data.loader(dataset, order):
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

    def test_subset(self):
        dataset = TensorDataset(torch.arange(100))
        self.assertEqual([item[0].item() for item in data.subset(dataset, 5)], [0, 20, 40, 60, 80])
        for count in (100, 1000):
            self.assertEqual([item[0].item() for item in data.subset(dataset, count)],
                             list(range(100)))
        shares = [[item[0].item() for item in data.subset(dataset, 7, rank, 3)] for rank in range(3)]
        self.assertEqual(sorted(sum(shares, [])), [i * 100 // 7 for i in range(7)])


# --------------------------------------------------------------------------------------- stages

class Result(NamedTuple):
    code: int
    out: str
    err: str

    def wrote(self):
        """The checkpoints that the output names."""
        return [Path(path) for path in re.findall(r"wrote (.*checkpoint\.pt)", self.out)]


def run(script, *arguments):
    """A stage in this process, on the CPU: python SCRIPT.py ARGUMENTS."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = [f"{script}.py", *map(str, arguments)]
    argv += [] if "--device" in argv else ["--device", "cpu"]
    with mock.patch("sys.argv", argv), contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            common.run_script(importlib.import_module(script).main)
        except SystemExit as stop:
            code = stop.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def process(script, *arguments):
    """A stage in a process of its own, as a user starts it."""
    return subprocess.Popen(
        [sys.executable, REPOSITORY / f"{script}.py", *map(str, arguments), "--device", "cpu"],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's & ignores it


def new_folder():
    return Path(tempfile.mkdtemp(dir=TEMPORARY))


def setUpModule():
    global TEMPORARY, PHOTOS
    TEMPORARY = Path(tempfile.mkdtemp())
    PHOTOS = make_photos(TEMPORARY / "photos")


def tearDownModule():
    shutil.rmtree(TEMPORARY)


def make_photos(folder):
    """A folder data set: 3 classes, by color, of 8 images of 32x32 in train and in val."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = random.integers(0, 256, (4, 4, 3), np.uint8)
                pixels[:, :, channel] = 190 + pixels[:, :, channel] // 4
                image = Image.fromarray(pixels).resize((32, 32), Image.BILINEAR)
                image.save(folder / split / name / f"{number}.png")
    return folder


def photo_flags(runs, folder=None):
    return "--data", folder or PHOTOS, "--size", "tiny", "--workers", 0, "--runs", runs


def training(epochs=1, batch_size=8, warmup=0, base_lr=0.04):
    return ("--epochs", epochs, "--batch-size", batch_size, "--warmup-epochs", warmup,
            "--base-lr", base_lr)


def finished(result):
    """The run must have succeeded."""
    if result.code:
        raise AssertionError(result)
    return result


@functools.cache
def digits_runs():
    """Short default runs on the digits: (runs, pretrain's Result, finetune's Result)."""
    runs = new_folder()
    return (runs, finished(run("pretrain", "--runs", runs, *training(3, 32, 1))),
            finished(run("finetune", "--runs", runs, *training(4, 32, 1))))


def digits_names():
    """How the tables name the De³ and the undefended classifier of digits_runs()."""
    runs, _, finetuned = digits_runs()
    return [str(path.parent.relative_to(runs / "digits")) for path in finetuned.wrote()]


@functools.cache
def photo_autoencoder(task="nim", epochs=1):
    """Folder of a pretraining run on the photos. Copy it before training behind it."""
    return finished(run("pretrain", "--task", task, *training(epochs, warmup=epochs // 5),
                        *photo_flags(new_folder()))).wrote()[0].parent


def photo_runs(task="nim"):
    """A new --runs folder with the autoencoder in its place: (runs, folder of the autoencoder)."""
    source, runs = photo_autoencoder(task), new_folder()
    target = runs / "photos" / source.name
    target.mkdir(parents=True)
    shutil.copy(source / "checkpoint.pt", target)
    return runs, target


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class TestStages(unittest.TestCase):
    def test_pretrain(self):
        runs, pretrained, _ = digits_runs()
        self.assertEqual(pretrained.wrote(), list((runs / "digits").glob("nim_*/checkpoint.pt")))
        table = dict(re.findall(r"^ +(\d+) +([-\d.]+ +[-\d.]+)$", pretrained.out, re.M))
        noisy, denoised = map(float, table["150"].split())
        self.assertAlmostEqual(noisy, 20 * math.log10(255 / 150), delta=0.1)
        self.assertGreater(denoised, noisy + 5)

    def test_finetune(self):
        _, pretrained, finetuned = digits_runs()
        folder, = [path.parent for path in pretrained.wrote()]
        self.assertEqual([path.parents[1] for path in finetuned.wrote()], [folder, folder])
        for kind in ("de3 at sigma uniform.*", "clean"):
            accuracy, = re.findall(rf"^{kind}: ([\d.]+)% of 240 val", finetuned.out, re.M)
            self.assertGreater(float(accuracy), 18)  # chance is 10

    def test_defend(self):
        (runs, *_), (de3, clean) = digits_runs(), digits_names()
        result = finished(run("defend", "--runs", runs, "--images", 20, "--votes", 2, "--steps", 2,
                              "--eot", 2))
        rows = re.findall(r"^(\S+) +(off|sigma \d+) +([\d.]+) +([\d.]+|-) +\d+$", result.out, re.M)
        self.assertEqual([row[:2] for row in rows[:2]], [(clean, "off"), (de3, "sigma 0")])
        self.assertGreater(len(rows), 2)
        classifier, _ = common.load_finished(runs / "digits" / clean, "classifier")
        test_set = data.load_dataset("digits", "test", 32)
        images, labels = (values[::18] for values in test_set.tensors)  # 20 of 360
        with torch.no_grad():
            accuracy = 100 * (classifier(images).argmax(1) == labels).double().mean()
        self.assertAlmostEqual(float(rows[0][2]), accuracy.item(), delta=0.06)
        self.assertEqual(rows[0][3], "-")
        for row in rows[1:]:
            self.assertEqual(row[0], de3)
            self.assertTrue(0 <= float(row[2]) <= 100 and 5 < float(row[3]) < 40, row)
        with Image.open(runs / "digits/defend.png") as picture:
            self.assertGreater(len(picture.convert("RGB").getcolors(10**6)), 50)

    def test_purified_photos(self):
        runs, *_ = digits_runs()
        photo = new_folder() / "my photo.png"
        Image.fromarray(np.full((40, 50, 3), 99, np.uint8)).save(photo)
        result = finished(run("defend", photo, "--runs", runs, "--sigma", 0, 80))
        lines = [line for line in result.out.splitlines() if line.startswith(str(photo))]
        self.assertEqual([re.search("undefended|sigma \\d+", line)[0] for line in lines],
                         ["sigma 0", "sigma 80"])
        images = sorted((runs / "digits/purified").iterdir())
        self.assertEqual([path.name for path in images],
                         ["0_my photo_sigma0.png", "0_my photo_sigma80.png"])
        for path in images:
            with Image.open(path) as image:
                self.assertEqual(image.size, (32, 32))

    def test_attack(self):
        runs, *_ = digits_runs()
        table, flags = runs / "digits/attack.csv", ("--runs", runs, "--images", 20, "--steps", 2)
        finished(run("attack", *flags, "--eot", 2))
        rows = read_csv(table)
        self.assertEqual(list(rows[0]), [
            "defense", "sigma", "mask_ratio", "votes", "attack", "norm", "eps", "steps",
            "step_size", "restarts", "eot", "loss", "threat", "images", "seed", "clean_accuracy",
            "robust_accuracy", "seconds"])
        de3, clean = digits_names()
        sigmas = {row["sigma"] for row in rows} - {""}
        self.assertLess({"0.0"}, sigmas)
        expected = {(clean, "", name) for name in ("fgsm", "pgd")} | {
            (de3, sigma, name) for sigma in sigmas for name in ("fgsm", "pgd", "pgd+eot")
            if (sigma, name) != ("0.0", "pgd+eot")}  # without noise there is nothing to average
        self.assertEqual(sorted((row["defense"], row["sigma"], row["attack"], row["eps"])
                                for row in rows),
                         sorted((*key, f"{k / 255:.6g}") for key in expected for k in (8, 16)))
        for row in rows:
            before, after = float(row["clean_accuracy"]), float(row["robust_accuracy"])
            self.assertTrue(0 <= after <= before + 10 and before <= 100, row)
            self.assertEqual(row["eot"], "2" if row["attack"] == "pgd+eot" else "1")
            self.assertEqual(row["steps"], "1" if row["attack"] == "fgsm" else "2")
            self.assertEqual(row["images"], "20")

        # a stronger attack, in rows of its own
        stronger = (*flags, "--attack", "pgd", "--eps", "1", "--sigma", "off", 50, "--restarts", 2,
                    "--loss", "ce", "margin")
        finished(run("attack", *stronger))
        self.assertEqual(len(read_csv(table)), len(rows) + 2)  # undefended off, De³ at 50
        for row in read_csv(table)[-2:]:
            self.assertEqual((row["loss"], row["restarts"]), ("ce+margin", "2"))
            self.assertLess(float(row["robust_accuracy"]), 30)  # the ball is the whole pixel box


class TestFolder(unittest.TestCase):
    """Images from a folder, and what the flags of the stages change."""

    def test_all_stages(self):
        runs = new_folder()
        flags = photo_flags(runs)
        pretrained = finished(run("pretrain", *training(), *flags))
        finetuned = finished(run("finetune", "--augment", *training(), *flags))
        self.assertIn("of 24 validation images", finetuned.out)
        for path in pretrained.wrote() + finetuned.wrote():
            self.assertTrue(path.is_file() and runs / "photos" in path.parents)
        small = (*flags, "--images", 6, "--steps", 2, "--eot", 2)
        result = finished(run("defend", *small))
        self.assertRegex(result.out, r"clean +off.*\n.*de3.*sigma 0.*\n.*de3.*sigma \d\d.*")
        photo = PHOTOS / "val/red/0.png"
        result = finished(run("defend", photo, *flags, "--sigma", "off", 70))
        self.assertRegex(result.out, rf"{photo} +sigma 70: (red|green|blue) \([\d.]+%\)")
        finished(run("attack", *small, "--threat", "gray", "--norm", "l2", "--eps", "0.5",
                     "--sigma", "off", 70))
        rows = read_csv(runs / "photos/attack.csv")
        self.assertEqual({row["threat"] for row in rows}, {"gray"})
        for sigma in ("", "70.0"):  # the attacker sees the classifier only: no need of EOT
            self.assertEqual([row["attack"] for row in rows if row["sigma"] == sigma],
                             ["fgsm", "pgd"])
        classifiers = [path.parent for path in finetuned.wrote()]
        finished(run("attack", *small, "--attack", "fgsm", "--sigma", "off", 70, "--classifier",
                     *classifiers))
        both = [(row["defense"].split("/")[1], row["sigma"]) for row in read_csv(runs / "photos/attack.csv")[4:]]
        self.assertEqual(both[::2], [(folder.name, sigma) for folder in classifiers
                                     for sigma in ("", "70.0")])  # each at all of them

    def test_pretraining_noise(self):
        """The autoencoder is shown the noisy image, one sigma per image, and clean targets."""
        pairs, forward = [], Autoencoder.forward

        def watch(autoencoder, images, noisy):
            pairs.append((images, noisy))
            return forward(autoencoder, images, noisy)
        with mock.patch.object(Autoencoder, "forward", watch):
            finished(run("pretrain", "--sigma", "gamma:25,3", *training(4),
                         *photo_flags(new_folder())))
        images, noisy = (torch.cat(group) for group in zip(*pairs))
        sigmas = 255 * (noisy - images).flatten(1).std(1)
        self.assertEqual(len(sigmas), 4 * 24)
        self.assertAlmostEqual(sigmas.mean().item(), 75, delta=6)
        self.assertAlmostEqual(sigmas.std().item(), 15, delta=4)

    def test_training_learns(self):
        source = photo_autoencoder(epochs=20)
        autoencoder, _ = common.load_finished(source, "autoencoder")
        images = torch.stack([image for image, _ in data.load_dataset(PHOTOS, "val", 32)])
        torch.manual_seed(0)
        denoised = autoencoder.reconstruct(add_noise(images, 75), images).clamp(0, 1)
        mean = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
        self.assertGreater(common.psnr(denoised, images).mean(),
                           common.psnr(mean, images).mean() + 0.5)
        result = run("finetune", "--clean", "--from-scratch", *training(8, warmup=1),
                     *photo_flags(new_folder()))
        accuracy, = re.findall(r"^clean: ([\d.]+)% of 24", finished(result).out, re.M)
        self.assertGreater(float(accuracy), 80)

    def purified(self, *flags, task="nim"):
        """Fine-tune; the (De3, gradients on?) of each call of its purify, and the result."""
        runs, source = photo_runs(task)
        calls, purify = [], De3.purify

        def watch(defense, images):
            self.assertTrue(0 <= images.min() and images.max() <= 1)
            calls.append((defense, torch.is_grad_enabled()))
            return purify(defense, images)
        with mock.patch.object(De3, "purify", watch):
            result = finished(run("finetune", "--autoencoder", source, *training(), *flags,
                                  *photo_flags(runs)))
        return calls, result

    def test_default_trains_both(self):
        calls, result = self.purified()
        self.assertEqual([path.parent.name for path in result.wrote()],
                         ["de3_uniform0-30", "clean"])
        self.assertFalse(any(gradients for _, gradients in calls))
        first, last = calls[0][0], calls[-1][0]
        self.assertEqual(str(first.sigma), "uniform:0,30")
        self.assertIsNotNone(first.autoencoder)
        self.assertFalse(last.defended)
        source = result.wrote()[0].parents[1] / "checkpoint.pt"
        self.assertEqual(source.read_bytes(),
                         (photo_autoencoder() / "checkpoint.pt").read_bytes())

    def test_starts_from_the_encoder(self):
        """With a learning rate of nearly zero the encoder's weights are still there."""
        runs, source = photo_runs()
        encoder = torch.load(source / "checkpoint.pt")["model"]
        for flags, same in ((), True), (("--from-scratch",), False):
            result = finished(run("finetune", "--clean", "--autoencoder", source, *flags,
                                  *training(base_lr=1e-12), *photo_flags(runs)))
            weights = torch.load(result.wrote()[0])["model"]
            for name in ("patch_embed.proj.weight", "blocks.3.mlp.fc2.weight"):
                self.assertEqual(torch.allclose(weights[name], encoder[name], atol=1e-6), same)

    def test_no_denoise(self):
        calls, result = self.purified("--no-denoise", "--sigma", "40")
        self.assertEqual({(defense.autoencoder, str(defense.sigma)) for defense, _ in calls},
                         {(None, "40")})
        self.assertEqual(torch.load(result.wrote()[0])["mode"], "no-denoise")

    def test_adversarial(self):
        for flags, defended in ((), False), (("--de3",), True):
            with mock.patch.object(finetune, "pgd", wraps=pgd) as attacks:
                calls, result = self.purified("--adversarial", "8/255", *flags)
            self.assertEqual(attacks.call_count, 3)  # batches
            for call in attacks.call_args_list:
                self.assertEqual(call.args[0].defended, defended)
                self.assertEqual(call.args[3], 8 / 255)
            self.assertTrue(any(gradients for _, gradients in calls))  # attack through purify
            self.assertEqual(len(result.wrote()), 1)

    def test_mim(self):
        calls, result = self.purified("--de3", "--keep-visible", task="mim")
        ratios = {defense.mask_ratio for defense, _ in calls}
        self.assertTrue(all(defense.keep_visible and defense.sigma is None for defense, _ in calls))
        self.assertTrue(all(0 <= ratio <= 0.75 for ratio in ratios))
        runs, folder = result.wrote()[0].parents[3], result.wrote()[0].parent
        flags = ("--classifier", folder, *photo_flags(runs), "--mask-ratio", 0.25, 0.5, "--images",
                 6, "--steps", 2, "--eot", 2)
        self.assertRegex(finished(run("defend", *flags)).out, "mask 0.25.*\n.*mask 0.5")
        finished(run("attack", *flags, "--attack", "pgd+eot", "--eps", "8/255"))
        rows = read_csv(runs / "photos/attack.csv")
        self.assertEqual([(row["sigma"], row["mask_ratio"]) for row in rows],
                         [("", "0.25"), ("", "0.5")])

    def test_augment(self):
        for flags, augmented in (("--augment",), True), ((), False):
            with mock.patch.object(F, "cross_entropy", wraps=F.cross_entropy) as losses, \
                    mock.patch.object(data, "finetune_transform", wraps=data.finetune_transform
                                      ) as transform:
                self.purified("--de3", *flags)
            self.assertEqual(transform.call_count, augmented)
            for call in losses.call_args_list:
                self.assertEqual(call.args[1].dim(), 1 + augmented)  # mixed labels
                self.assertEqual(call.kwargs["label_smoothing"], 0.1 * augmented)

    def test_augmented_digits(self):
        """Shifted, labels smoothed; by default not in adversarial training."""
        for flags, augmented in (((), True), (("--no-augment",), False),
                                 (("--adversarial", "8/255"), False)):
            with mock.patch.object(F, "cross_entropy", wraps=F.cross_entropy) as losses, \
                    mock.patch.object(data, "shift", wraps=data.shift) as shift:
                finished(run("finetune", "--clean", "--from-scratch", *flags, *training(1, 600),
                             "--max-batch", 600, "--runs", new_folder()))
            self.assertEqual(shift.call_count, int(augmented))
            smoothing = {call.kwargs["label_smoothing"] for call in losses.call_args_list
                         if "label_smoothing" in call.kwargs}
            self.assertEqual(smoothing, {0.1 * augmented})

    def test_compile(self):
        """--compile changes the speed only; here with the backend that runs what was traced as it is."""
        runs, source = photo_runs()
        flags, weights = ("--de3", "--autoencoder", source, *training(), *photo_flags(runs)), []
        for more in ((), ("--compile", "--overwrite")):
            eager = functools.partial(torch.compile, backend="eager")
            with mock.patch("torch.compile", side_effect=eager) as compiled:
                path, = finished(run("finetune", *flags, *more)).wrote()
            self.assertEqual(compiled.call_count, 3 if more else 0)  # a trial, denoiser, classifier
            weights.append(torch.load(path)["model"])
        for name, value in weights[0].items():
            assert_near(value, weights[1][name], 1e-4)
        with mock.patch("torch.compile", side_effect=RuntimeError("no compiler found")):
            refused = run("finetune", *flags, "--compile", "--overwrite")
        TestBadInput().assert_refused(refused, ("no compiler found", "leave it out"))

    def test_resnet18(self):
        _, result = self.purified("--de3", "--classifier", "resnet18")
        path, = result.wrote()
        self.assertIn("layer4.1.conv2.weight", "".join(torch.load(path)["model"]))
        result = run("defend", "--classifier", path.parent, "--images", 6, "--sigma", "off", 50,
                     "--steps", 1, *photo_flags(path.parents[3]))
        self.assertRegex(finished(result).out, "off.*\n.*sigma 50")


# --------------------------------------------------------- published weights, several processes

class TestPublished(unittest.TestCase):
    """--init, and the later stages, on files as others publish them."""
    TINY = dict(image_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4)

    def setUp(self):
        self.folder = new_folder()
        self.autoencoder = small_autoencoder(1, **self.TINY, decoder_embed_dim=64, decoder_depth=2,
                                             decoder_num_heads=4)
        self.classifier = small_classifier(2, **self.TINY, num_classes=3)

    def save(self, content, name="weights.pth"):
        torch.save(content, self.folder / name)
        return self.folder / name

    def test_mae_release(self):
        """{"model": ...}, with or without decoder, with a Namespace beside it."""
        state = self.autoencoder.state_dict()
        encoder = {name: value for name, value in state.items()
                   if "decoder" not in name and name != "mask_token"}
        whole = self.save({"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 800})
        for path, left in ((whole, "nothing"), (self.save({"model": encoder}, "e.pth"), "decoder_b")):
            result = finished(run("pretrain", "--init", path, *training(base_lr=1e-9),
                                  *photo_flags(new_folder())))
            self.assertRegex(result.out, rf"left at the initial value: {left}")
            self.assertIn("loaded: blocks.*.attn.proj.bias", result.out)
            self.assertIn(f"init-{path.stem}", str(result.wrote()[0]))
            trained = torch.load(result.wrote()[0])["model"]
            for name, value in encoder.items():
                assert_near(trained[name], value, atol=1e-4)
        result = finished(run("finetune", "--clean", "--init", whole, *training(base_lr=1e-9),
                              *photo_flags(new_folder())))
        self.assertRegex(result.out, "left at the initial value: fc_norm.*head")
        self.assertRegex(result.out, "ignored: decoder_blocks.*norm.weight")
        trained = torch.load(result.wrote()[0])["model"]
        assert_near(trained["blocks.3.mlp.fc2.weight"], state["blocks.3.mlp.fc2.weight"], atol=1e-4)

    def test_later_stages(self):
        """NIM-AdvDef: {"model": autoencoder} and {"classifier": ...}; timm: the state dict itself."""
        autoencoder = self.save({"model": self.autoencoder.state_dict()}, "ae.pth")
        state, runs = self.classifier.state_dict(), new_folder()
        for content in ({"classifier": state}, {"model": state}, state):
            flags = ("--classifier", self.save(content), "--images", 6, *photo_flags(runs))
            result = finished(run("attack", *flags, "--autoencoder", autoencoder, "--sigma", "off", 20,
                                  "--attack", "pgd", "--eps", 0, "--steps", 1))
            self.assertRegex(result.out, r"weights.pth +off .*\n.*weights.pth +20 ")
        finished(run("defend", *flags))
        found = random_images(6, 3, 32, 32)
        with contextlib.redirect_stdout(None):
            loaded, _ = common.load_finished(self.folder / "weights.pth", "classifier", args=(
                argparse.Namespace(size="tiny", data="x", autoencoder=None)))
        assert_near(loaded(found), self.classifier(found))
        result = finished(run("finetune", "--de3", "--autoencoder", autoencoder, *training(),
                              *photo_flags(runs)))
        finished(run("defend", "--classifier", result.wrote()[0].parent, "--autoencoder", autoencoder,
                     "--images", 6, *photo_flags(runs), "--steps", 1))

    def test_other_image_size(self):
        path = self.save({"model": self.autoencoder.state_dict()})
        result = finished(run("pretrain", "--init", path, "--image-size", 48, *training(base_lr=1e-9),
                              *photo_flags(new_folder())))
        assert_near(torch.load(result.wrote()[0])["model"]["pos_embed"],
                    resize_pos_embed(self.autoencoder.pos_embed, 37))

    def test_refuses(self):
        state, trace = self.classifier.state_dict(), self.folder / "trace"
        class_token = {name.replace("fc_norm", "norm"): value for name, value in state.items()}
        half = self.save(state, "half.pth")
        half.write_bytes(half.read_bytes()[:3000])
        flags, refused = (*training(), *photo_flags(new_folder())), TestBadInput.assert_refused
        for stage, path, words in [
                ("pretrain", self.folder / "none.pth", "none.pth"), ("pretrain", half, "half.pth"),
                ("pretrain", self.save({"model": {"w": torch.zeros(1)}}, "w.pth"), "no ViT"),
                ("pretrain", self.save(RunsCode(trace), "code.pth"), "run code"),
                ("pretrain", self.save({**state, "pos_embed": torch.zeros(9)}, "p.pth"), "no ViT"),
                ("pretrain", self.save({"model": small_autoencoder(depth=4).state_dict()}, "s.pth"),
                 ("[1, 1, 16]", "[1, 1, 64]")),
                ("pretrain", self.save({"model": small_autoencoder(**{**self.TINY, "depth": 3}
                                                                   ).state_dict()}, "d.pth"), "blocks.3"),
                ("finetune", self.save(class_token, "class.pth"), "class token"),
                ("finetune", self.save(small_classifier(**self.TINY).state_dict(), "ten.pth"),
                 ("[10, 64]", "[3, 64]"))]:
            with self.subTest(path):
                extra = ("--clean",) if stage == "finetune" else ()
                refused(TestBadInput(), run(stage, "--init", path, *extra, *flags), words)
        self.assertFalse(trace.exists())
        result = run("defend", "--classifier", self.save(state), "--sigma", 20, "--autoencoder",
                     self.save({"model": state}, "noae.pth"), *photo_flags(new_folder()))
        refused(TestBadInput(), result, "lacks decoder")

    def test_ours_under_others_names(self):
        """Plain tensors under the published names, which any loader of MAE's layout reads."""
        state = torch.load(photo_autoencoder() / "checkpoint.pt")["model"]
        self.assertEqual(list(state), list(self.autoencoder.state_dict()))
        self.assertTrue(all(type(value) is torch.Tensor for value in state.values()))


def torchrun(script, *arguments, processes=2):
    """A stage under torchrun, on the CPU: its Result."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
         REPOSITORY / f"{script}.py", *map(str, arguments), "--device", "cpu"], text=True,
        capture_output=True, cwd=REPOSITORY, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return Result(done.returncode, done.stdout, done.stderr)


class TestProcesses(unittest.TestCase):
    def test_training(self):
        """Without noise two processes, and micro-batches, have the gradient that one has.

        After one step AdamW's first moment is 0.1 times the gradient.
        """
        gradients = []
        for start, more in ((run, ()), (run, ("--max-batch", 500)), (torchrun, ("--max-batch", 300))):
            path, = finished(start("pretrain", "--sigma", 0, *training(1, 1196), *more, "--runs",
                                   new_folder())).wrote()
            state = torch.load(path)["optimizer"]["state"].values()
            gradients.append(torch.cat([moments["exp_avg"].flatten() for moments in state]))
        self.assertGreater(gradients[0].abs().max(), 1e-3)
        for other in gradients[1:]:
            assert_near(other, gradients[0], atol=1e-7, rtol=1e-4)

    def test_resume_and_attack(self):
        """A run that was killed goes on with two processes; attack.py counts each image once."""
        runs = new_folder()
        path = TestResume.kill(self, "pretrain", (*training(10), *photo_flags(runs)), runs)
        result = finished(torchrun("pretrain", *training(10), *photo_flags(runs), "--resume"))
        self.assertEqual((result.out.count("going on"), torch.load(path)["epoch"]), (1, 10))
        path, = finished(run("finetune", "--clean", *training(3), *photo_flags(runs))).wrote()
        flags = ("--classifier", path.parent, "--images", 19, "--attack", "fgsm", "--batch-size", 4,
                 "--eps", "8/255", *photo_flags(runs))
        for start in (run, torchrun):
            result = finished(start("attack", *flags))
        self.assertEqual(result.out.count("8/255"), 1)  # one process prints
        one, two = read_csv(runs / "photos/attack.csv")
        self.assertEqual({**one, "seconds": 0}, {**two, "seconds": 0})
        self.assertEqual(one["images"], "19")

    def test_a_process_dies(self):
        """torchrun ends the others; nothing hangs."""
        photos = new_folder() / "photos"
        shutil.copytree(PHOTOS, photos)
        (photos / "train/red/0.png").write_bytes(b"no image")  # in one process's share
        start = time.time()
        result = torchrun("pretrain", *training(100, 24), *photo_flags(new_folder(), photos))
        self.assertNotEqual(result.code, 0)
        self.assertIn("red/0.png", result.err)
        self.assertLess(time.time() - start, 90)


# --------------------------------------------------------------------------- interrupted, refused

class TestResume(unittest.TestCase):
    def assert_same_weights(self, a, b):
        a, b = torch.load(a), torch.load(b)
        self.assertEqual(a["epoch"], b["epoch"])
        self.assertEqual(list(a["model"]), list(b["model"]))
        for name in a["model"]:
            self.assertTrue(torch.equal(a["model"][name], b["model"][name]), name)

    def kill(self, script, flags, runs):
        """Start a stage, kill it after its first save. Returns the checkpoint."""
        before = set(runs.rglob("checkpoint.pt"))
        running = process(script, *flags)
        while not (saved := set(runs.rglob("checkpoint.pt")) - before):
            self.assertIsNone(running.poll(), "ended before it was killed")
            time.sleep(0.01)
        running.kill()
        running.communicate()
        return saved.pop()

    def check(self, script, runs, killed_runs, *flags):
        flags = (*flags, *training(10, warmup=2))
        whole, = finished(run(script, *flags, *photo_flags(runs))).wrote()
        flags += photo_flags(killed_runs)
        path = self.kill(script, flags, killed_runs)
        stopped = torch.load(path)["epoch"]
        self.assertTrue(1 <= stopped < 10)
        path.with_suffix(".tmp").write_bytes(b"half a file")
        refused = run(script, *flags)
        self.assertEqual(refused.code, 2)
        self.assertIn("--resume", refused.err)
        resumed = finished(run(script, *flags, "--resume"))
        self.assertIn(f"epoch {stopped} of 10", resumed.out)
        self.assertEqual(resumed.wrote(), [path])
        self.assert_same_weights(path, whole)
        self.assertFalse(path.with_suffix(".tmp").exists())

    def test_pretrain(self):
        self.check("pretrain", new_folder(), new_folder())

    def test_finetune(self):
        self.check("finetune", photo_runs()[0], photo_runs()[0], "--de3", "--augment")

    def test_interrupted(self):
        """Ctrl-C: exit code 130, how to go on, and a checkpoint that --resume takes up."""
        runs = new_folder()
        running = process("pretrain", *training(200), *photo_flags(runs))
        while not list(runs.rglob("checkpoint.pt")):
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate()
        self.assertEqual((running.returncode, err.count("--resume"), "Traceback" in err), (130, 1, False))

    def test_killed_before_the_first_save(self):
        runs = new_folder()
        path = runs / "photos" / photo_autoencoder().name / "checkpoint.pt"
        path.parent.mkdir(parents=True)
        path.with_suffix(".tmp").write_bytes(b"half a file")
        result = finished(run("pretrain", *training(), *photo_flags(runs), "--resume"))
        self.assertIn("starting over", result.out)
        self.assert_same_weights(path, photo_autoencoder() / "checkpoint.pt")

    def test_finished_run(self):
        runs, source = photo_runs()
        path, flags = source / "checkpoint.pt", photo_flags(runs)
        content, changed = path.read_bytes(), path.stat().st_mtime_ns
        for more in ((), ("--resume",)):
            self.assertIn("finished", finished(run("pretrain", *training(), *flags, *more)).out)
        for more in (("--base-lr", 1e-5), ("--base-lr", 1e-5, "--resume"), ("--all-patches",)):
            result = run("pretrain", *training(), *flags, *more)
            self.assertEqual(result.code, 2)
            self.assertIn("--overwrite", result.err)
        self.assertEqual((path.read_bytes(), path.stat().st_mtime_ns), (content, changed))
        finished(run("pretrain", *training(2), *flags, "--overwrite"))
        self.assertEqual(torch.load(path)["epoch"], 2)


class TestBadInput(unittest.TestCase):
    def refused(self, script, *arguments, says=()):
        """Exit code 2, one sentence (after argparse's usage, if it is a flag), no traceback."""
        with self.subTest(script, arguments=arguments):
            self.assert_refused(run(script, *arguments), says)

    def assert_refused(self, result, says=()):
        self.assertEqual(result.code, 2, result)
        lines = result.err.strip().splitlines()
        self.assertEqual(["error: " in line for line in lines].count(True), 1, result.err)
        self.assertIn("error: ", lines[-1])
        self.assertTrue(lines[0].startswith("usage: " if len(lines) > 1 else "error: "), result.err)
        self.assertNotIn("Traceback", result.out + result.err)
        for words in says if isinstance(says, tuple) else (says,):
            self.assertIn(str(words), lines[-1])

    def test_flags(self):
        for flags in (["--sigma", "-5"], ["--sigma", "nan"], ["--sigma", "uniform:30,0"],
                      ["--mask-ratio", "1"], ["--mask-ratio", "-0.1"], ["--mask-ratio", "x"],
                      ["--epochs", "0"], ["--epochs", "x"], ["--batch-size", "0"], ["--seed", "-1"],
                      ["--base-lr", "nan"], ["--base-lr", "-1"], ["--task", "dae"],
                      ["--size", "giant"], ["--image-size", "0"], ["--flag-that-is-not"],
                      ["--resume", "--overwrite"], ["--image-size", "30"], ["--patch-size", "5"],
                      ["--max-batch", "0"], ["--seed", "1" + "0" * 20], ["--sigma", "1e300"],
                      ["--epochs", "1" + "0" * 400], ["--base-lr", "1e300"], ["--task", "mim", "--mask-ratio", "0.99"]):
            self.refused("pretrain", "--runs", new_folder(), *flags)
        for flags in (["--adversarial", "-1/255"], ["--adversarial", "8/0"], ["--de3", "--clean"],
                      ["--drop-path", "1"], ["--layer-decay", "0"]):
            self.refused("finetune", "--runs", new_folder(), *flags)
        runs, *_ = digits_runs()
        for flags in (["--eps", "8"], ["--eps", "-1/255"], ["--eps", "nan"], ["--eps", "8/x"],
                      ["--steps", "0"], ["--eot", "0"], ["--restarts", "0"], ["--images", "0"],
                      ["--attack", "cw"], ["--loss", "mse"], ["--norm", "l1"], ["--sigma", "-1"],
                      ["--votes", "0"], ["--batch-size", "0"]):
            self.refused("attack", "--runs", runs, *flags)
        self.refused("attack", "--attack", "cw", says=("cw", "pgd+eot"))
        self.refused("pretrain", "--image-size", 30, "--runs", new_folder(), says=("30", "8"))
        self.refused("attack", "--runs", new_folder(), "--eps", 8, says="write 8/255")
        for script in ("pretrain", "finetune"):  # the learning rate would never reach its peak
            self.refused(script, "--runs", new_folder(), "--epochs", 3, says="give --warmup-epochs")

    def test_adversarial_eps_above_one(self):
        """8 instead of 8/255."""
        self.refused("finetune", "--clean", "--from-scratch", "--adversarial", 8,
                     *photo_flags(new_folder()), *training())
        self.refused("defend", "--runs", digits_runs()[0], "--images", 5, "--eps", 16)

    def test_device(self):
        for script in ("pretrain", "finetune", "defend", "attack"):
            for device in ("nonsense", "cuda:99", "meta"):
                self.refused(script, "--device", device, "--runs", new_folder(), says=device)

    def test_missing_runs(self):
        runs = new_folder()
        flags = ("--runs", runs)
        command = f"python pretrain.py --runs {runs}"
        self.refused("finetune", *flags, says=(runs, "missing", command))
        self.refused("finetune", *flags, "--seed", 3, says="python pretrain.py --seed 3 --runs")
        for script in ("defend", "attack"):
            self.refused(script, *flags, says=("missing", f"python finetune.py --runs {runs}"))
            self.refused(script, *flags, "--classifier", runs / "none",
                         says=("none/checkpoint.pt", "flags that the folder's name stands for"))
        runs, source = photo_runs()
        self.refused("defend", *photo_flags(runs), says="python finetune.py")

    def test_damaged_checkpoints(self):
        runs, source = photo_runs()
        path, trace = source / "checkpoint.pt", runs / "trace"
        flags = (*training(), *photo_flags(runs))
        whole = path.read_bytes()
        for content in (whole[:len(whole) // 2], b"", b"hello"):
            path.write_bytes(content)
            self.refused("finetune", *flags, says=path)
            self.refused("pretrain", *flags, "--resume", says=path)
        for foreign in ({"model": {}}, RunsCode(trace), {"model": RunsCode(trace)}):
            torch.save(foreign, path)
            self.refused("finetune", *flags, says=path)
        self.assertFalse(trace.exists())
        checkpoint = torch.load(io.BytesIO(whole))
        torch.save({**checkpoint, "config": {**checkpoint["config"], "embed_dim": 32}}, path)
        self.refused("finetune", *flags, says=path)
        torch.save({**checkpoint, "epochs": 5}, path)
        self.refused("finetune", *flags, says=("unfinished", "--resume"))

    def test_wrong_kind(self):
        runs, *_ = digits_runs()
        source = runs / "digits/nim_gamma10-12"
        self.refused("finetune", "--runs", new_folder(), "--autoencoder", source / "clean",
                     says=("classifier", "autoencoder"))
        self.refused("attack", "--runs", runs, "--classifier", source,
                     says=("classifier", "autoencoder"))

    def test_stale_autoencoder(self):
        """Trained anew after the classifier was trained behind it."""
        runs, source = photo_runs()
        flags = photo_flags(runs)
        finished(run("finetune", "--de3", *training(), *flags))
        classifier = ("--classifier", source / "de3_uniform0-30", "--images", 3, "--steps", 1)
        finished(run("defend", *classifier, *flags))
        finished(run("pretrain", "--overwrite", *training(2), *flags))
        for script in ("defend", "attack"):
            self.refused(script, *classifier, *flags, says=("autoencoder", "--overwrite"))

    def test_data_folder(self):
        folder, runs = new_folder(), new_folder()
        for script in ("pretrain", "finetune"):
            extra = ("--clean", "--from-scratch") if script == "finetune" else ()
            for name in ("missing", "empty"):
                self.refused(script, *photo_flags(runs, folder / name), *extra, says=folder / name)
                (folder / "empty" / "train").mkdir(parents=True, exist_ok=True)
        (folder / "empty" / "train" / "red").mkdir()
        self.refused("pretrain", *photo_flags(runs, folder / "empty"), says="red")

    def test_classes(self):
        other = new_folder() / "photos"
        shutil.copytree(PHOTOS, other)
        (other / "val" / "red").rename(other / "val" / "yellow")
        runs = new_folder()
        flags = ("--clean", "--from-scratch", *training())
        self.refused("finetune", *flags, *photo_flags(runs, other), says="classes")
        path, = finished(run("finetune", *flags, *photo_flags(runs))).wrote()
        for script in ("defend", "attack"):
            self.refused(script, "--classifier", path.parent, *photo_flags(runs, other),
                         says="classes")

    def test_unreadable_image(self):
        """Named, with images loaded in this process and in a loading process."""
        folder = new_folder() / "photos"
        shutil.copytree(PHOTOS, folder)
        broken = folder / "train" / "red" / "broken.png"
        whole = (PHOTOS / "train/red/0.png").read_bytes()
        for content, workers in ((b"no image", 0), (whole[:len(whole) // 2], 0), (b"no image", 1)):
            broken.write_bytes(content)
            self.refused("pretrain", *photo_flags(new_folder(), folder), *training(),
                         "--workers", workers, says=broken)
        self.refused("defend", broken, "--runs", digits_runs()[0], says=broken)
        Image.fromarray(np.full((9, 9), 30000, np.uint16)).save(broken)
        self.refused("defend", broken, "--runs", digits_runs()[0], says=(broken, "8 bits"))
        self.refused("defend", "no.png", "--runs", digits_runs()[0], says="no.png")

    def test_loss_that_is_not_finite(self):
        """Stops at once, with the step; what was saved before is kept."""
        runs = new_folder()
        flags = (*training(9, batch_size=24, warmup=1, base_lr=1e30), *photo_flags(runs))
        result = run("pretrain", *flags)
        self.assert_refused(result, ("loss", "step 2", "--base-lr"))
        path, = runs.rglob("checkpoint.pt")
        self.assertEqual(torch.load(path)["epoch"], 2)
        result = run("finetune", "--clean", "--from-scratch", *flags)
        self.assert_refused(result, ("loss", "step", "--base-lr"))

    def test_mim_flags_without_mim(self):
        runs, _ = photo_runs()
        self.refused("finetune", "--keep-visible", *training(), *photo_flags(runs),
                     says="--keep-visible")

    def test_results_that_cannot_be_written(self):
        runs, target = digits_runs()[0], new_folder()
        flags = ("--classifier", runs / "digits" / digits_names()[0], "--sigma", 0, "--images", 2, "--steps",
                 1, "--runs", target)
        for script, name in (("attack", "attack.csv"), ("defend", "defend.png")):
            (target / "digits" / name).mkdir(parents=True)
            self.refused(script, *flags, says=name)

    def test_real_process(self):
        running = process("attack", "--runs", new_folder(), "--classifier", "none")
        out, err = running.communicate()
        self.assert_refused(Result(running.returncode, out, err), "none/checkpoint.pt")


if __name__ == "__main__":
    unittest.main()
