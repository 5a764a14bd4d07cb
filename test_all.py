"""The method as an executable specification; run as a script, all tests of the project.

    python test_all.py                      all of them, no downloads
    python test_all.py TestPgd              one class, from here or from tests/
    python test_all.py TestPgd.test_fgsm    one test; -v names each test as it runs

    here                TestPatches     patchify, position embedding, names, initialization
                        TestNoise       add_noise and NoiseScale
                        TestViT         forward pass and MIM against a plain re-implementation
                        TestLosses      NIM's and MIM's loss, masks, reconstruct
                        TestClassifier  trained positions, drop path
                        TestDe3         gradients, straight-through clamp, votes, MIM, gray images
                        TestPgd         known optima, the ball, EOT
    the attack          test_pgd        invariants, targets, early stop, losses, warnings, what needs EOT
                        test_audit      catches hidden gradients, passes an honest defense
                        test_certify    the beta quantile, attacks inside the radius, what gets none
    a kind is an entry  test_kinds      noise law, denoiser, attack, defense, data set
    data                test_data       the digits, folders, CIFAR-10, batches, the order of classes
                        test_images     transparency, turning, formats, file names, photographs
                        test_own_images folders of images as people have them
                        test_loading    images that other processes load, and how a script ends
    training            test_training   learning rate, groups, precision, the log
                        test_recipes    recipes and augmentation against the paper's numbers
                        test_processes  torchrun: the same weights, each image once
                        test_threads    CPU threads of a tiny model
    runs                test_run        a checkpoint is read, built and loaded with care
                        test_files      a folder is begun once, what is saved is what was trained
                        test_resume     killed runs end with the same weights and the same log
                        test_experiment what is changed shows: other code, weights or data
                        test_published  files of weights become runs, and what starts from a run
                        test_ship       half-precision copies
    the stages          test_stages     one after the other on the digits
                        test_folder     the same and the variants on a folder of images
                        test_flags      flags that change nothing, settings that are kept
                        test_table      scores, intervals, rows and their names, pictures
                        test_bad_input  one sentence and exit code 2
                        test_commands   the commands that the READMEs and exercises show
                        test_silent     edits that would make wrong numbers without a word
    studies             test_compare    what is missing, the readings, what is measured again, the plot
                        test_wiener     a linear filter and a blur in the autoencoder's place
                        test_autoattack every image of a random defense is attacked, by both losses
                        test_speed      the plain De³ is ours in other words
                        test_lesson     the lesson runs from top to bottom
"""

import argparse
import math
import re
import sys
import unittest
import warnings
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import attack
from attack import pgd
from model import (Classifier, De3, Defense, MaskAndFill, MaskAndPaste, NoiseOnly, NoiseScale, UserError,
                   add_noise, make_classifier, patchify, sincos_pos_embed, unpatchify)
from tests.helpers import (ENCODER, REPOSITORY, Linear, assert_near, random_images, seeded,
                           small_autoencoder, small_classifier)


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

    def test_given_noise(self):
        """The ε of the caller, one for all images or one for each, instead of a fresh draw."""
        images, sigma = random_images(), torch.tensor([0.0, 10.0, 20.0, 30.0])
        for noise in (torch.randn(3, 16, 16), torch.randn(4, 3, 16, 16)):
            expected = [x + (noise if noise.dim() == 3 else noise[i]) * sigma[i] / 255
                        for i, x in enumerate(images)]
            assert_near(add_noise(images, sigma, noise), torch.stack(expected))

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

    def test_noise_scale_as_text(self):
        """A number is the uniform distribution from itself to itself; what is printed can be read."""
        for text, law, parameters in [("70", "uniform", (70, 70)), ("0.5", "uniform", (0.5, 0.5)),
                                      ("gamma:25,3", "gamma", (25, 3)), ("uniform:0,30", "uniform",
                                                                         (0, 30))]:
            scale = NoiseScale.parse(text)
            self.assertEqual(scale, NoiseScale(law, parameters))
            self.assertEqual(scale.fixed, None if ":" in text else float(text))
            self.assertEqual(str(scale), text)
            self.assertIs(NoiseScale.parse(scale), scale)
        self.assertEqual(NoiseScale.parse(70), NoiseScale.parse("uniform:70,70"))
        self.assertEqual(str(NoiseScale.parse("uniform:70,70")), "70")


# ------------------------------------------------------- the networks, image by image, in plain steps

def plain_norm(x, weights, name):
    centered = x - x.mean(-1, keepdim=True)
    x = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def plain_linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def plain_block(x, weights, name, heads=2):
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


def plain_encode(tokens, weights):
    x = torch.cat([weights["cls_token"][0] + weights["pos_embed"][0, :1], tokens])
    for i in range(ENCODER["depth"]):
        x = plain_block(x, weights, f"blocks.{i}")
    return x


def plain_decode(latent, weights):
    x = plain_block(latent + weights["decoder_pos_embed"][0], weights, "decoder_blocks.0")
    return plain_linear(plain_norm(x, weights, "decoder_norm"), weights, "decoder_pred")[1:]


class TestViT(unittest.TestCase):
    def fill(self, model):
        """Weights without random numbers: each parameter holds sines of a running index."""
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
        """Over all patches, between the prediction from the noisy image and the clean target."""
        for norm_pix in (False, True):
            model, images = small_autoencoder(norm_pix=norm_pix), random_images()
            noisy = add_noise(images, 50)
            error = (model.denoise(noisy) - self.formula(images, norm_pix)).square()
            assert_near(model(images, noisy), error.mean())

    def test_mim(self):
        """Over the masked patches, or over all."""
        images, scores = random_images(), random_images(4, 16, seed=1)
        for norm_pix in (False, True):
            model = small_autoencoder(norm_pix=norm_pix)
            loss, prediction, mask = model.mim(images, 0.75, scores)
            error = (prediction - self.formula(images, norm_pix)).square().mean(2)
            assert_near(loss, error[mask == 1].mean())
            assert_near(model(images, mask_ratio=0.75, scores=scores), loss)
            assert_near(model.mim(images, 0.75, scores, all_patches=True)[0], error.mean())

    def test_variance_floor(self):
        """A flat patch: 1e-6 under the root, so nothing is divided by zero."""
        images = torch.full((1, 3, 16, 16), 0.5) + 1e-4 * random_images(1, 3, 16, 16)
        mean, std = torch.tensor([0.485, 0.456, 0.406]).mean(), 0.226
        model = small_autoencoder(norm_pix=True, mean=(mean,) * 3, std=(std,) * 3)
        patches = patchify((images - mean) / std, 4)
        scale = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        assert_near(model.target(images)[0], (patches - patches.mean(-1, keepdim=True)) / scale,
                    atol=0.01, rtol=0.01)

    def test_mask_counts(self):
        model = small_autoencoder()
        for ratio in (0, 0.1, 0.5, 0.75, 0.9):
            mask = model.mim(random_images(), ratio)[2]
            self.assertEqual((mask == 0).sum(1).tolist(), [int(16 * (1 - ratio))] * 4)
            self.assertTrue(set(mask.unique().tolist()) <= {0.0, 1.0})
        self.assertGreater(len({tuple(row) for row in mask.tolist()}), 1)  # each image its own

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
        """norm_pix takes each patch's mean and deviation from the reference."""
        images, other = random_images(), random_images(seed=1, high=0.3)
        for norm_pix in (False, True):
            model = small_autoencoder(norm_pix=norm_pix)
            target = model.target(images)[0]
            assert_near(model.to_images(target, images), images)
            assert_near(model.reconstruct(other, images),
                        model.to_images(model.denoise(other), images))
            changed = (model.reconstruct(other, images) - model.reconstruct(other, other)).abs()
            self.assertEqual(changed.max().item() > 0.01, norm_pix)
        with mock.patch.object(model, "denoise", return_value=target):
            assert_near(model.reconstruct(other, images), images)


class TestClassifier(unittest.TestCase):
    def test_pos_embed_is_trained_and_drop_path_rises(self):
        classifier = small_classifier(depth=3, drop_path=0.4)
        self.assertTrue(classifier.pos_embed.requires_grad)
        assert_near(torch.tensor([block.drop_path.p for block in classifier.blocks]),
                    torch.tensor([0.0, 0.2, 0.4]))
        images = random_images(1, 3, 16, 16).expand(32, -1, -1, -1)
        self.assertLess(classifier(images).std(0).max(), 1e-4)
        self.assertGreater(classifier.train()(images).std(0).max(), 1e-2)  # per image


# ------------------------------------------------------------------------------------------ De³

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
        defense = NoiseOnly(None, nn.Flatten(), 100)  # a pixel acts on itself alone
        clamped = seeded(defense.purify, images)
        clamped = (clamped == 0) | (clamped == 1)
        self.assertTrue(0.05 < clamped.double().mean() < 0.95)
        for straight_through in (False, True):
            defense.straight_through = straight_through
            x = images.clone().requires_grad_()
            gradient = torch.autograd.grad(seeded(defense, x).sum(), x)[0]
            self.assertTrue(torch.equal(gradient == 1, ~clamped | straight_through))

    def test_norm_pix_statistics_come_from_the_input(self):
        autoencoder = small_autoencoder(norm_pix=True).eval()
        images = random_images(2, 3, 16, 16, low=0.3, high=0.7)
        with mock.patch.object(autoencoder, "denoise", lambda noisy: autoencoder.target(images)[0]):
            assert_near(De3(autoencoder, nn.Flatten(), 200).purify(images), images)

    def test_one_sigma_per_image_and_call(self):
        torch.manual_seed(0)
        defense = NoiseOnly(None, nn.Flatten(), "uniform:0,40")
        stds = 255 * defense(torch.full((200, 3, 16, 16), 0.5)).std(1)
        self.assertTrue(stds.min() < 4 and 36 < stds.max() < 44)
        self.assertAlmostEqual(stds.mean().item(), 20, delta=4)

    def test_given_noise(self):
        """The same ε at every call, for every image: nothing is random."""
        noise, images = torch.randn(3, 16, 16), random_images()
        autoencoder, classifier = small_autoencoder().eval(), small_classifier()
        defense = De3(autoencoder, classifier, 60, noise=noise)
        purified = autoencoder.reconstruct(images + noise * 60 / 255, images).clamp(0, 1)
        assert_near(defense.purify(images), purified)
        self.assertTrue(torch.equal(defense(images), defense(images)))
        self.assertFalse(defense.is_random)

    def test_noise_only(self):
        """Noise and clamp; the autoencoder is not even kept."""
        images, classifier = random_images(), small_classifier()
        noisy = seeded(lambda: add_noise(images, NoiseScale.parse(80).draw(4))).clamp(0, 1)
        for autoencoder in (None, small_autoencoder()):
            defense = NoiseOnly(autoencoder, classifier, 80)
            assert_near(seeded(defense.purify, images), noisy)
            assert_near(seeded(defense, images), classifier(noisy))
            self.assertIsNone(defense.autoencoder)

    def test_steps(self):
        """What pictures and tables show: the last step is what the classifier sees, the first is raw."""
        images, autoencoder = random_images(), small_autoencoder().eval()
        for defense, names in [(De3(autoencoder, None, 200), ["noisy", "denoised"]),
                               (NoiseOnly(None, None, 200), ["noisy"]),
                               (MaskAndFill(autoencoder, None, 0.5), ["masked", "filled in"])]:
            steps = seeded(defense.steps, images)
            self.assertEqual(list(steps), names)
            self.assertTrue(torch.equal(steps[names[-1]], seeded(defense.purify, images)))
        noisy = seeded(De3(autoencoder, None, 200).steps, images)["noisy"]
        self.assertGreater(noisy.max(), 1.2)  # not clamped
        masked = steps["masked"]
        gray = (masked == 0.5).all(1).double().mean()
        self.assertAlmostEqual(gray.item(), 0.5, delta=0.01)
        self.assertTrue(torch.equal(masked[masked != 0.5], images[masked != 0.5]))

    def test_base_class(self):
        """A defense is `purify`; the votes, the check of the images and the pictures are inherited."""
        class Dark(Defense):
            title, level, is_random = "dark", "half", False

            def purify(self, images):
                return images / 2
        images, classifier = random_images(), small_classifier()
        assert_near(Dark(None, classifier)(images), classifier(images / 2))
        assert_near(Dark(None, classifier, votes=3)(images), classifier(images / 2).log_softmax(1))
        self.assertEqual(list(Dark(None, classifier).steps(images)), ["purified"])
        self.assertRaises(UserError, Dark(None, classifier), images + 0.1)
        self.assertRaises(NotImplementedError, Defense(None, classifier), images)

    def test_votes(self):
        """The log of the mean probability."""
        images, one, five = random_images(2, 3, 8, 8).double(), self.defense(80), self.defense(80)
        five.votes = 5
        torch.manual_seed(3)
        mean = torch.stack([one(images).softmax(1) for _ in range(5)]).mean(0)
        assert_near(seeded(five, images), mean.log())

    def test_mim(self):
        """The whole output of the decoder, or only the masked patches of it."""
        images = random_images(low=0.01, high=0.99)
        autoencoder, classifier = small_autoencoder(), small_classifier()
        _, prediction, mask = seeded(autoencoder.mim, images, 0.75)
        whole = autoencoder.to_images(prediction, images).clamp(0, 1)
        defense = MaskAndFill(autoencoder, classifier, 0.75)
        assert_near(seeded(defense.purify, images), whole)
        assert_near(seeded(defense, images), classifier(whole))
        pixels = unpatchify(mask[:, :, None].expand(-1, -1, 48), 4)
        defense = MaskAndPaste(autoencoder, classifier, 0.75)
        assert_near(seeded(defense.purify, images), torch.where(pixels == 1, whole, images))

    def test_mask_ratio_is_drawn(self):
        """From a uniform distribution at every call, where it is one."""
        defense = MaskAndFill(small_autoencoder(), None, "uniform:0.2,0.6")
        torch.manual_seed(0)
        ratios = torch.tensor([defense.draw_ratio() for _ in range(500)])
        self.assertTrue(0.2 <= ratios.min() < 0.22 and 0.58 < ratios.max() <= 0.6)
        self.assertEqual(MaskAndFill(small_autoencoder(), None, 0.5).draw_ratio(), 0.5)

    def test_level_and_randomness(self):
        """Its setting in words, and whether an attack on it needs EOT."""
        for kind, setting, level, is_random in [
                (De3, 0, "σ = 0", False), (De3, "50", "σ = 50", True), (NoiseOnly, 50, "σ = 50", True),
                (De3, "uniform:0,40", "σ = uniform:0,40", True), (NoiseOnly, 0, "σ = 0", False),
                (MaskAndFill, 0.5, "mask 0.5", True), (MaskAndPaste, 0.5, "mask 0.5", True)]:
            defense = kind(small_autoencoder(), small_classifier(), setting)
            self.assertEqual((defense.level, defense.is_random), (level, is_random))
            outputs = [defense(random_images()) for _ in range(2)]
            self.assertEqual(torch.equal(*outputs), not is_random)

    def test_gray(self):
        """One channel, where mean and std have one value: no model knows that there could be three."""
        images, config = random_images(4, 1, 16, 16), dict(mean=(0.4,), std=(0.3,))
        for norm_pix in (False, True):
            autoencoder = small_autoencoder(norm_pix=norm_pix, **config)
            self.assertEqual(autoencoder.denoise(images).shape, (4, 16, 16))
            assert_near(autoencoder.to_images(autoencoder.target(images)[0], images), images)
            for loss in (autoencoder(images, add_noise(images, 50)), autoencoder(images, mask_ratio=0.5)):
                self.assertTrue(loss.isfinite() and loss.requires_grad)
            classifier = small_classifier(**config)
            for kind, level in ((De3, 50), (NoiseOnly, 50), (MaskAndFill, 0.5), (MaskAndPaste, 0.5)):
                defense = kind(autoencoder, classifier, level)
                self.assertEqual({step.shape for step in defense.steps(images).values()}, {images.shape})
                self.assertEqual(defense(images).shape, (4, 10))
                x = pgd(defense, images, torch.arange(4), 0.1, 2, eot=2)
                attack.check_adversarial(x, images, 0.1, "linf")
                self.assertGreater((x - images).abs().amax((1, 2, 3)).min(), 0.05)
        for model in (autoencoder.denoise, classifier):
            self.assertRaisesRegex(UserError, "1, 16, 16", model, random_images())

    def test_any_autoencoder(self):
        """De³ asks its autoencoder to reconstruct, and knows nothing else of it."""
        class Smooth(nn.Module):
            def reconstruct(self, noisy, reference):
                return F.avg_pool2d(noisy, 3, stride=1, padding=1)
        images, classifier = random_images(), small_classifier()
        defense = De3(Smooth(), classifier, 50)
        noisy = seeded(lambda: add_noise(images, NoiseScale.parse(50).draw(4)))
        assert_near(seeded(defense.purify, images), F.avg_pool2d(noisy, 3, 1, 1).clamp(0, 1))

    def test_any_classifier(self):
        resnet = make_classifier("resnet18", num_classes=7, mean=(0.5,) * 3, std=(0.2,) * 3, depth=2)
        defense = De3(small_autoencoder(), resnet, 50).eval()
        images = random_images().requires_grad_()
        logits = defense(images)
        self.assertEqual(logits.shape, (4, 7))
        self.assertGreater(torch.autograd.grad(logits[:, 0].sum(), images)[0].abs().sum(), 0)

    def test_models_are_used_as_they_are(self):
        """Neither frozen nor put into evaluation mode, and no gradient is held back.

        Fixed are the positions, and what the autoencoder's task does not train.
        """
        autoencoder, classifier = small_autoencoder().eval(), small_classifier().train()
        autoencoder.norm.requires_grad_(False)
        De3(autoencoder, classifier, 50)(random_images()).square().sum().backward()
        self.assertTrue(classifier.training and not autoencoder.training)
        for name, parameter in [*classifier.named_parameters(), *autoencoder.named_parameters()]:
            fixed = name in ("norm.weight", "norm.bias", "decoder_pos_embed", "mask_token") or (
                name == "pos_embed" and parameter is autoencoder.pos_embed)
            self.assertEqual(parameter.requires_grad, not fixed, name)
            self.assertEqual(parameter.grad is None, fixed, name)
        self.assertTrue(small_autoencoder(task="mim").mask_token.requires_grad)


# --------------------------------------------------------------------------------------- attack

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

    def test_margin(self):
        logits = torch.tensor([[1., 4., 3.], [2., 2., -1.], [9., 0., 8.]])
        assert_near(attack.margin(logits, torch.tensor([1, 0, 1])), torch.tensor([-1., 0., 9.]))

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

    def test_eot(self):
        """One draw of the gradient goes the wrong way; the mean over 16 goes the right way."""
        images, labels = torch.full((64, 3, 4, 4), 0.5), torch.zeros(64, dtype=torch.long)
        broken = {}
        for eot in (1, 16):
            with warnings.catch_warnings(action="ignore"):  # 16 slopes can cancel exactly
                x = pgd(Misleading(), images, labels, 0.1, 20, 0.02, eot=eot)
            broken[eot] = (Misleading()(x).argmax(1) == 1).float().mean()
        self.assertLess(broken[1], 0.2)
        self.assertGreater(broken[16], 0.8)


class TestIndex(unittest.TestCase):
    def test_is_complete(self):
        """The list at the head of this file names every file of tests, and no other."""
        listed = __doc__.partition("    here ")[2]
        files = [path.stem for path in (REPOSITORY / "tests").glob("test_*.py")]
        self.assertEqual(sorted(re.findall(r"test_\w+", listed)), sorted(files))
        classes = [name for name in globals() if name.startswith("Test")]
        self.assertEqual([*re.findall(r"Test\w+", listed), type(self).__name__], classes)


# --------------------------------------------------------------------------------- run all tests

def find_tests(name=None):
    """All tests of this file and of tests/, or those of one class, or one test: Class.test."""
    loader = unittest.TestLoader()
    if name:
        loader.testNamePatterns = [f"*.{name}", f"*.{name}.*"]
    here = loader.loadTestsFromModule(sys.modules[__name__])
    return unittest.TestSuite([here, loader.discover(REPOSITORY / "tests", top_level_dir=REPOSITORY)])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="classes, or Class.test; default: all")
    parser.add_argument("-v", "--verbose", action="store_true", help="name each test as it runs")
    args = parser.parse_args()
    chosen = [find_tests(name) for name in args.names] or [find_tests()]
    for name, tests in zip(args.names, chosen):
        if tests.countTestCases() == 0:
            parser.error(f"no class or test is called {name}")
    runner = unittest.TextTestRunner(verbosity=2 if args.verbose else 1)
    result = runner.run(unittest.TestSuite(chosen))
    # several parts of one test may have failed, each with an entry of its own
    failed = len({getattr(test, "test_case", test) for test, _ in result.failures + result.errors})
    skipped = len(result.skipped)
    print(f"{result.testsRun - failed - skipped} passed, {failed} failed"
          + (f", {skipped} skipped" if skipped else ""))
    sys.exit(0 if result.wasSuccessful() else 1)


if __name__ == "__main__":
    main()
