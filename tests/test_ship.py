"""Weights that come along: half-precision copies, and the stages that fall back on them."""

import unittest
from pathlib import Path
from unittest import mock

import torch

from support import checkpoints, runs
from tests.helpers import (assert_near, assert_refused, digits_runs, finished, new_folder, photos,
                           read_csv, run)


class TestShip(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        own, _, finetuned = digits_runs()
        cls.own, cls.classifiers = own, [path.parent for path in finetuned.wrote()]
        cls.assets = new_folder()
        cls.shipped = finished(run("studies.ship", "--out", cls.assets / "digits", "--classifier",
                                   *cls.classifiers)).wrote()

    def test_copies(self):
        """Half the bytes, rounded weights, the new fingerprint, no folder of the machine."""
        self.assertEqual(len(self.shipped), 3)
        copied, _ = checkpoints.load_finished(self.shipped[0].parent, "autoencoder")
        trained, _ = checkpoints.load_finished(self.classifiers[0].parent, "autoencoder")
        for name, value in trained.state_dict().items():
            assert_near(copied.state_dict()[name], value, atol=1e-6, rtol=1e-3)
        self.assertNotEqual(checkpoints.fingerprint(copied), checkpoints.fingerprint(trained))
        for path in self.shipped:
            original = self.own / "digits" / path.relative_to(self.assets / "digits")
            self.assertLess(path.stat().st_size, original.stat().st_size / 4)  # it held AdamW's too
            checkpoint = torch.load(path, weights_only=True)
            self.assertNotIn("optimizer", checkpoint)
            self.assertNotIn(str(self.own), str({**checkpoint, "model": None}))
        settings = torch.load(self.shipped[1])["settings"]
        self.assertEqual(settings["autoencoder"], checkpoints.fingerprint(copied))

    def test_stages(self):
        """Without a run of one's own they are used, in one line; the accuracies stay."""
        flags = ("--images", 60, "--steps", 2, "--attack", "pgd")
        finished(run("attack", "--runs", self.own, *flags))
        trained = read_csv(self.own / "digits/attack.csv")[-2:]
        elsewhere = new_folder()
        before, photo = set(self.assets.rglob("*")), next(photos().glob("val/*/*"))
        with mock.patch.object(runs, "ASSETS", self.assets):
            self.assertNotIn("come along", finished(run("defend", "--runs", self.own, photo)).out)
            result = finished(run("attack", "--runs", elsewhere, *flags))
            self.assertEqual(result.out.count("weights that come along"), 1)
            labelled = finished(run("defend", photo, "--runs", elsewhere))
            self.assertIn(f"{photo}", labelled.out)
            self.assertTrue(list(Path(elsewhere).glob("digits/purified/**/*.png")))
            finished(run("studies.certify", "--runs", elsewhere, "--images", 2, "--n", 10))
            self.assertEqual(set(self.assets.rglob("*")), before)
            assert_refused(run("attack", "--runs", elsewhere, "--seed", 5, *flags), "is missing")
        for row, old in zip(read_csv(elsewhere / "digits/attack.csv")[-2:], trained):
            self.assertEqual(row["defense"], old["defense"])
            self.assertAlmostEqual(float(row["clean_accuracy"]), float(old["clean_accuracy"]), delta=5)
