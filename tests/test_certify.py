"""Randomized smoothing: the bound, the radius, and the table of certified accuracy."""

import contextlib
import csv
import io
import re
import unittest
from unittest import mock

import torch
from torch import nn

from attack import pgd
from model import De3, MaskAndFill, NoiseOnly, UserError
from studies import certify, compare
from support import run as run_module
from tests.helpers import (assert_refused, digits_runs, finished, linear_on_digits, new_folder,
                           photo_classifier, random_images, read_csv, run, small_autoencoder,
                           small_classifier)


class Cascade(De3):
    """Noise and denoising in rounds, of which each draws its own noise, or all take the one that is given."""
    rounds = 2

    def purify(self, images):
        for _ in range(self.rounds):
            images = super().purify(images)
        return images


class TestCertificate(unittest.TestCase):
    def test_lower_bound(self):
        """Quantiles of the beta distribution, as SciPy's beta.ppf gives them."""
        for hits, draws, alpha, expected in [
                (1000, 1000, 0.001, 0.9931160484), (990, 1000, 0.001, 0.9760361872),
                (600, 1000, 0.001, 0.5510754739), (50, 100, 0.001, 0.3447980064),
                (99500, 100000, 0.001, 0.9942718184), (0, 10, 0.001, 0.0),
                (7, 7, 0.05, 0.05 ** (1 / 7))]:
            self.assertAlmostEqual(certify.lower_bound(hits, draws, alpha), expected, delta=1e-7)

    def test_certified_radius(self):
        """L2 PGD with EOT inside the radius does not change the vote of 500 draws."""
        model, (images, labels) = linear_on_digits()
        defense, held, radii = NoiseOnly(None, model, 60, straight_through=False), 0, []
        torch.manual_seed(0)
        for image, label in zip(images[:60], labels):
            predicted, hits, radius = certify.certify(defense, image, 100, 500, 500)
            if predicted == label:
                radii.append(radius)
                x = pgd(defense, image[None], label[None], 0.99 * radius, 5, norm="l2", eot=10)
                vote = defense(x.expand(500, -1, -1, -1)).argmax(1).bincount().argmax()
                held += (vote == label).item()
        self.assertGreater(len(radii), 30)
        self.assertTrue(0.05 < max(radii) <= 60 / 255 * 2.21)  # the largest from 500 draws
        self.assertGreaterEqual(held, len(radii) - 2)  # 0.1 in 100 are expected to fail

    def test_abstains(self):
        class Guesses(nn.Module):
            def forward(self, x):
                return torch.rand(len(x), 10)
        image = torch.zeros(3, 32, 32)
        self.assertIsNone(certify.certify(NoiseOnly(None, Guesses(), 50), image, 10, 100, 100)[0])

    def test_refuses(self):
        """What the theorem does not cover."""
        image, model = torch.zeros(3, 32, 32), nn.Flatten()
        plain, norm_pix = (small_autoencoder(norm_pix=value, image_size=32) for value in (False, True))
        for defense in (model, NoiseOnly(None, model, 0), NoiseOnly(None, model, 50, votes=2),
                        De3(plain, model, 50, noise=torch.zeros(3, 32, 32)), De3(norm_pix, model, 50),
                        De3(plain, model, 0), NoiseOnly(None, model, "uniform:1,9"),
                        MaskAndFill(plain, model, 0.5)):
            self.assertRaises(UserError, certify.check_certifiable, defense, image)
        certify.check_certifiable(De3(plain, model, 50), image)

    def test_script(self):
        """The printed table is the share of the rows that are right and reach the radius."""
        folder, out = digits_runs()[0], new_folder()
        flags = (folder / "de3", "--images", 9, "--n0", 5, "--n", 20, "--out", out)
        result = finished(run("studies.certify", *flags))
        table = out / "certify.csv"
        self.assertEqual(result.out.count("wrote "), 1)  # σ = 0 has no certificate
        self.assertIn(f"wrote {table}", result.out)
        rows = read_csv(table)
        self.assertEqual([row["draws"] for row in rows], ["20"] * 9)
        finished(run("studies.certify", *flags))
        self.assertEqual(read_csv(table), rows)  # each image counts once
        with open(table, "w", newline="", encoding="utf-8") as file:  # as another machine may count
            anew = csv.DictWriter(file, rows[0])
            anew.writeheader()
            anew.writerows({**row, "hits": 12} for row in rows)
        finished(run("studies.certify", *flags))
        self.assertEqual(len(read_csv(table)), len(rows))
        right = [float(row["l2_radius"]) for row in rows if row["label"] == row["predicted"]]
        self.assertTrue(0 < len(right) < 9, rows)  # else the next lines say little
        printed = re.findall(r"^ +(\d\.\d\d) +([\d.]+)(?:  a corner .*/255)?$", result.out, re.M)
        self.assertEqual(len(printed), 9 + 2 + 2)
        self.assertIn("     1.74", result.out)
        self.assertIn(" 3.48                   0.0  a corner of the Linf ball of 16/255", result.out)
        for radius, certified in printed:  # of two digits: a row may lie between it and the radius
            most, fewest = (100 / 9 * sum(found >= float(radius) + rounding for found in right)
                            for rounding in (-0.005, 0.005))
            self.assertTrue(fewest - 0.06 <= float(certified) <= most + 0.06, (radius, certified, right))
        autoencoder, _ = run_module.load(folder / "nim", "autoencoder")
        classifier, _ = run_module.load(folder / "de3", "classifier")
        weights = run_module.fingerprint(De3(autoencoder, classifier, 50))
        for row in rows:
            self.assertEqual((row["defense"], row["weights"], row["commit"], row["data"], row["attack_seed"]),
                             ("de3, σ = 50", weights, run_module.commit(), "digits", "0"))
            self.assertTrue(row["code"] and row["pixels"])

    def test_certificate_of_noise_alone(self):
        """Any classifier behind noise: --defense."""
        out = new_folder()
        finished(run("studies.certify", photo_classifier("clean"), "--defense", "no-denoise:25",
                     "--images", 2, "--n", 10, "--out", out))
        self.assertEqual(len(read_csv(out / "certify.csv")), 2)

    def test_other_noise(self):
        """After add_noise was edited, whatever else it adds, there is no certificate."""
        defense, image = De3(small_autoencoder(), small_classifier(), 50).eval(), random_images()[0]
        certify.check_certifiable(defense, image)

        def poisson(images, sigma, noise=None):
            return torch.poisson(100 * images.clamp(min=0)) / 100
        with mock.patch("model.add_noise", poisson):
            with self.assertRaisesRegex(UserError, "does not add one Gaussian"):
                certify.check_certifiable(defense, image)

    def test_cascade(self):
        """Noise in several rounds: no certificate, and no reading of a noise that the attacker knows."""
        images, labels = random_images(), torch.arange(4)
        models = small_autoencoder().eval(), small_classifier()
        for kind, level, alone in ((De3, 50, True), (Cascade, 50, False)):
            defense = kind(*models, level).eval()
            with contextlib.redirect_stdout(io.StringIO()) as said:
                readings = compare.measure(defense, images, labels, 0.05, 0, 1, 2, seed=0, batch=4)
            self.assertEqual(compare.takes_known_noise(defense, images), alone)
            self.assertEqual("noise_known" in readings, alone)
            self.assertEqual("noise known is left out" in said.getvalue(), not alone)
            if alone:
                certify.check_certifiable(defense, images[0])
            else:
                with self.assertRaisesRegex(UserError, "does not add one Gaussian"):
                    certify.check_certifiable(defense, images[0])
        with mock.patch.object(Cascade, "rounds", 1):  # the same class, without further rounds
            self.assertTrue(compare.takes_known_noise(defense, images))
            certify.check_certifiable(defense, images[0])

    def test_way_around_the_noise(self):
        """A defense that mixes the image itself into what the classifier sees, or changes it before."""
        class Mixed(De3):
            def purify(self, images):
                return 0.5 * super().purify(images) + 0.5 * images

        class Rounded(De3):
            def purify(self, images):
                return super().purify((images * 4).round() / 4)
        for kind in (Mixed, Rounded):
            defense = kind(small_autoencoder(), small_classifier(), 50).eval()
            with self.assertRaisesRegex(UserError, "sees more of the image"):
                certify.check_certifiable(defense, random_images()[0])

    def test_draws_of_a_batch(self):
        """Images of a batch that share a noise, or change each other's answers, are no independent draws."""
        class OneForAll(De3):
            def add_noise(self, images):
                noise = torch.randn_like(images[0]) if self.noise is None else self.noise
                return images + noise * self.sigma.fixed / 255

        class Together(nn.Module):
            def forward(self, x):
                return x.flatten(1) - x.flatten(1).mean(0)
        image, autoencoder = random_images()[0], small_autoencoder()
        for defense in (OneForAll(autoencoder, small_classifier(), 50), De3(autoencoder, Together(), 50)):
            with self.assertRaisesRegex(UserError, "draws are not independent"):
                certify.check_certifiable(defense.eval(), image)

    def test_script_refuses(self):
        """And writes nothing."""
        folder, out = digits_runs()[0] / "de3", new_folder()
        for flags, words in [
                ([folder, "--n", 9], "--n"), ([folder, "--votes", 2], "--votes"),
                ([folder, "--sigma", 0], "above 0"), ([folder, "--sigma", "off"], "above 0"),
                ([folder, "--sigma", "uniform:1,9"], "above 0"),
                ([digits_runs()[0] / "clean"], "above 0"),
                ([photo_classifier("mim", "mim")], "above 0")]:
            assert_refused(run("studies.certify", *flags, "--images", 2, "--out", out), words)
        self.assertEqual(list(out.iterdir()), [])


if __name__ == "__main__":
    unittest.main()
