"""Randomized smoothing: the bound, the radius, and the table of certified accuracy."""

import re
import unittest

import torch
from torch import nn

from attack import pgd
from model import De3, NoiseScale, UserError
from studies import certify
from tests.helpers import (assert_refused, digits_names, digits_runs, finished, linear_on_digits,
                           photo_flags, photo_runs, read_csv, run, small_autoencoder, training)


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
        defense, held, radii = De3(None, model, 60, straight_through=False), 0, []
        torch.manual_seed(0)
        for image, label in zip(images, labels):
            predicted, hits, radius = certify.certify(defense, image, 100, 500, 500)
            if predicted == label:
                radii.append(radius)
                x = pgd(defense, image[None], label[None], 0.99 * radius, 5, norm="l2", eot=10)
                vote = defense(x.expand(500, -1, -1, -1)).argmax(1).bincount().argmax()
                held += (vote == label).item()
        self.assertGreater(len(radii), 50)
        self.assertTrue(0.05 < max(radii) <= 60 / 255 * 2.21)  # the largest from 500 draws
        self.assertGreaterEqual(held, len(radii) - 2)  # 0.1 in 100 are expected to fail

    def test_abstains(self):
        class Guesses(nn.Module):
            def forward(self, x):
                return torch.rand(len(x), 10)
        image = torch.zeros(3, 32, 32)
        self.assertIsNone(certify.certify(De3(None, Guesses(), 50), image, 10, 100, 100)[0])

    def test_refuses(self):
        """What the theorem does not cover."""
        image, model = torch.zeros(3, 32, 32), nn.Flatten()
        autoencoder = small_autoencoder(norm_pix=True, image_size=32)
        for defense in (De3(None, model, None), De3(None, model, 0), De3(None, model, 50, votes=2),
                        De3(None, model, 50, noise=torch.zeros(3, 32, 32)), De3(autoencoder, model, 50),
                        De3(None, model, NoiseScale.parse("uniform:1,9")),
                        De3(small_autoencoder(image_size=32), model, None, mask_ratio=0.5)):
            self.assertRaises(UserError, certify.certify, defense, image, 10, 10, 10)

    def test_script(self):
        """The printed table is the share of the rows that are right and reach the radius."""
        runs, *_ = digits_runs()
        flags = ("--runs", runs, "--images", 9, "--n0", 5, "--n", 20)
        result = finished(run("studies.certify", *flags))
        table = runs / "digits" / digits_names()[0] / "certify_sigma50.csv"
        self.assertIn(f"wrote {table}", result.out)
        rows = read_csv(table)
        self.assertEqual([row["draws"] for row in rows], ["20"] * 9)
        right = [float(row["l2_radius"]) for row in rows if row["label"] == row["predicted"]]
        self.assertTrue(0 < len(right) < 9, rows)  # else the next lines say little
        printed = re.findall(r"^ +(\d\.\d\d) +([\d.]+)(?:  a corner .*/255)?$", result.out, re.M)
        self.assertEqual(len(printed), 9 + 2 + 2)
        self.assertIn("     1.74", result.out)
        self.assertIn(" 3.48                   0.0  a corner of the Linf ball of 16/255", result.out)
        for radius, certified in printed:
            reached = [found for found in right if found >= float(radius) - 0.005]
            self.assertAlmostEqual(float(certified), 100 * len(reached) / 9, delta=0.06)

    def test_script_refuses(self):
        """And leaves the tables of earlier runs alone."""
        runs, *_ = digits_runs()
        folder = runs / "digits" / digits_names()[0]
        before = {path: path.read_bytes() for path in folder.iterdir()}
        assert_refused(run("studies.certify", "--runs", runs, "--n", 9), "--n")
        assert_refused(run("studies.certify", "--runs", runs, "--votes", 2), "--votes")
        for flags in (("--sigma", 0), ("--sigma", "off", "--classifier", folder)):
            assert_refused(run("studies.certify", "--runs", runs, "--images", 2, *flags), "above 0")
        mim, source = photo_runs("mim")
        path, = finished(run("finetune", "--autoencoder", source, "--mode", "de3", *training(),
                             *photo_flags(mim))).wrote()
        refused = run("studies.certify", "--classifier", path.parent, *photo_flags(mim))
        assert_refused(refused, "masking")
        self.assertEqual({path: path.read_bytes() for path in folder.iterdir()}, before)
