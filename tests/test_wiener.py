"""The denoisers that nobody trained: a linear filter and a blur, as runs that the stages take."""

import re
import unittest

import torch

from model import AUTOENCODERS, De3, make_autoencoder
from studies import wiener
from support import data
from support import run as run_module
from tests.helpers import (assert_near, assert_refused, finished, new_folder, photos, random_images, read_csv,
                           run, saved, training)


class TestWiener(unittest.TestCase):
    def make(self, *flags):
        """A run of studies.wiener on the photos: (its folder, what was printed)."""
        folder = new_folder() / "wiener"
        result = finished(run("studies.wiener", "--data", photos(), *flags, "--out", folder))
        return folder, result.out

    def test_is_the_wiener_filter(self):
        """Σ (Σ + s²I)⁻¹ (y - μ) + μ, of the covariance Σ of the images; what is left out is next to nothing."""
        images = random_images(200, 3, 4, 4)
        images = 0.5 * images + 0.5 * images.mean((2, 3), keepdim=True)
        sigma = 40.0
        center, variances, directions = wiener.components_of(images, sigma)
        model = make_autoencoder("wiener", image_size=4, mean=(0.5,) * 3, std=(0.2,) * 3,
                                 components=len(variances), sigma=sigma)
        model.load_state_dict(dict(center=center, variances=variances, directions=directions))
        torch.manual_seed(0)
        noisy = images + torch.randn_like(images) * sigma / 255
        x = images.flatten(1).double()
        covariance = torch.cov(x.T)
        gain = covariance @ torch.linalg.inv(covariance + (sigma / 255) ** 2 * torch.eye(48, dtype=torch.float64))
        expected = x.mean(0) + (noisy.flatten(1).double() - x.mean(0)) @ gain.T
        assert_near(model.reconstruct(noisy, images).flatten(1), expected.float(), atol=5e-3)
        before = (noisy - images).square().mean()
        after = (model.reconstruct(noisy, images) - images).square().mean()
        self.assertLess(after, before)

    def test_runs(self):
        """Each denoises noisy images better than nothing does, and lets an attack through."""
        images = random_images(6, 3, 32, 32)
        for flags, arch in (((), "wiener"), (("--blur", "--sigma", 60), "blur")):
            folder, printed = self.make(*flags)
            checkpoint = saved(folder)
            self.assertEqual((checkpoint["kind"], checkpoint["config"]["arch"]), ("autoencoder", arch))
            trained_on, _, _ = data.load_images(str(photos()), "train", 32)
            self.assertEqual(set(data.digest_of_each(trained_on).tolist()),
                             set(checkpoint["data"]["digests"].tolist()))
            decibels = dict(re.findall(r"σ = +(\d+)  denoised +([\d.]+) dB", printed))
            self.assertGreater(float(decibels["100"]), 14)  # the noise alone has 8
            model, _ = run_module.load(folder)
            self.assertIsInstance(model, AUTOENCODERS[arch])
            self.assertEqual(model.reconstruct(images, images).shape, images.shape)
            gradient, = torch.autograd.grad(De3(model, torch.nn.Flatten(), 0)(images.requires_grad_()).sum(), images)
            self.assertTrue(gradient.abs().sum() > 0)  # an attack goes through it

    def test_fine_tuned_and_attacked_behind_it(self):
        """As behind any autoencoder."""
        folder, _ = self.make()
        out = new_folder() / "de3_wiener"
        finished(run("finetune", "--autoencoder", folder, "--from-scratch", *training(batch_size=24),
                     "--workers", 0, "--out", out))
        self.assertEqual(saved(out)["autoencoder"]["config"]["arch"], "wiener")
        finished(run("attack", out, "--sigma", 0, "--attack", "fgsm", "--eps", "8/255", "--images", 3))
        self.assertEqual(len(read_csv(out.parent / "attack.csv")), 1)

    def test_refuses(self):
        folder, _ = self.make()
        assert_refused(run("studies.wiener", "--data", photos(), "--out", folder), "holds a run")
        assert_refused(run("studies.wiener", "--sigma", 0, "--out", new_folder() / "wiener"), "above 0")


if __name__ == "__main__":
    unittest.main()
