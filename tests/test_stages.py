"""The four stages, one after the other, on the digits."""

import math
import re
import unittest

import numpy as np
import torch
from PIL import Image

from support import checkpoints, data, evaluation
from tests.helpers import (assert_picture, digits_names, digits_runs, finished, new_folder, read_csv,
                           run)


class TestStages(unittest.TestCase):
    def test_pretrain(self):
        """The PSNR of what goes in follows from sigma; what comes out is nearer to the clean image."""
        folder, pretrained, _ = digits_runs()
        path, = pretrained.wrote()
        self.assertEqual([path], list((folder / "digits").glob("nim_*/checkpoint.pt")))
        table = dict(re.findall(r"^ +(\d+) +([-\d.]+ +[-\d.]+)$", pretrained.out, re.M))
        noisy, denoised = map(float, table["150"].split())
        self.assertAlmostEqual(noisy, 20 * math.log10(255 / 150), delta=0.1)
        self.assertGreater(denoised, noisy + 5)
        assert_picture(path.parent / "pretrain.png")

    def test_finetune(self):
        _, pretrained, finetuned = digits_runs()
        folder, = [path.parent for path in pretrained.wrote()]
        self.assertEqual([path.parents[1] for path in finetuned.wrote()], [folder, folder])
        for kind in ("de3 at sigma uniform.*", "clean"):
            accuracy, = re.findall(rf"^{kind}: ([\d.]+)% of 240 val", finetuned.out, re.M)
            self.assertGreater(float(accuracy), 18)  # chance is 10

    def test_log(self):
        """A row for each epoch, with what the screen showed; no accuracy in pretraining."""
        _, pretrained, finetuned = digits_runs()
        for result, has_accuracy in ((pretrained, False), (finetuned, True)):
            shown = re.findall(r"^epoch +(\d+)/\d+  loss +([\d.]+)", result.out, re.M)
            rows = [row for path in result.wrote() for row in read_csv(path.with_name("log.csv"))]
            self.assertEqual([(row["epoch"], f"{float(row['loss']):.4f}") for row in rows], shown)
            self.assertEqual({row["accuracy"] != "" for row in rows}, {has_accuracy})
            losses = [float(row["loss"]) for row in rows]
            self.assertLess(losses[-1], losses[0])

    def test_defend(self):
        (folder, *_), (_, clean) = digits_runs(), digits_names()
        result = finished(run("defend", "--runs", folder, "--images", 20, "--votes", 2, "--steps", 2,
                              "--eot", 2))
        row = r"^(undefended|De³ σ = \d+) +([\d.]+) +([\d.]+|-) +\d+$"
        rows = re.findall(row, result.out, re.M)
        levels = [f"De³ σ = {sigma}" for sigma in data.DEFAULTS["digits"]["test_sigmas"]]
        self.assertEqual([words for words, _, _ in rows], ["undefended", *levels])
        classifier, _ = checkpoints.load_finished(folder / "digits" / clean, "classifier")
        test_set = data.load_dataset("digits", "test", 32)
        images, labels = (values[::18] for values in test_set.tensors)  # 20 of 360
        with torch.no_grad():
            accuracy = 100 * (classifier(images).argmax(1) == labels).double().mean()
        self.assertAlmostEqual(float(rows[0][1]), accuracy.item(), delta=0.06)
        self.assertEqual(rows[0][2], "-")
        for row in rows[1:]:
            self.assertTrue(0 <= float(row[1]) <= 100 and 5 < float(row[2]) < 40, row)
        assert_picture(folder / "digits/defend.png")

    def test_purified_photos(self):
        folder, *_ = digits_runs()
        photo = new_folder() / "my photo.png"
        Image.fromarray(np.full((40, 50, 3), 99, np.uint8)).save(photo)
        result = finished(run("defend", photo, "--runs", folder, "--sigma", 0, 80))
        lines = [line for line in result.out.splitlines() if line.startswith(str(photo))]
        self.assertEqual([re.search(r"undefended|σ = \d+", line)[0] for line in lines],
                         ["σ = 0", "σ = 80"])
        de3, _ = digits_names()
        images = sorted((folder / "digits/purified").rglob("0_my photo_*"))
        self.assertEqual([str(path.relative_to(folder / "digits/purified")) for path in images],
                         [f"{de3}/0_my photo_sigma{sigma}.png" for sigma in (0, 80)])
        for path in images:
            with Image.open(path) as image:
                self.assertEqual(image.size, (32, 32))

    def attack(self, *flags):
        """attack.py with few images and steps; the rows that it adds to the table."""
        folder, *_ = digits_runs()
        table = folder / "digits/attack.csv"
        before = len(read_csv(table)) if table.exists() else 0
        finished(run("attack", "--runs", folder, "--images", 20, "--steps", 2, *flags))
        return read_csv(table)[before:]

    def test_attack(self):
        rows, (de3, clean) = self.attack("--eot", 2), digits_names()
        self.assertEqual(list(rows[0]), evaluation.FIELDS)
        names = {(row["defense"], row["run"], row["sigma"]) for row in rows}
        sigmas = data.DEFAULTS["digits"]["test_sigmas"]
        self.assertEqual(names, {("undefended", clean, ""), *(
            (f"De³ σ = {sigma}", de3, f"{sigma}.0") for sigma in sigmas)})
        self.assertIn(0, sigmas)
        expected = {("", name) for name in ("fgsm", "pgd")} | {
            (f"{sigma}.0", name) for sigma in sigmas for name in ("fgsm", "pgd", "pgd+eot")
            if (sigma, name) != (0, "pgd+eot")}  # without noise there is nothing to average
        self.assertEqual(sorted((row["sigma"], row["attack"], row["eps"]) for row in rows),
                         sorted((*key, f"{k / 255:.6g}") for key in expected for k in (8, 16)))
        for row in rows:
            before, after = float(row["clean_accuracy"]), float(row["robust_accuracy"])
            self.assertTrue(0 <= after <= before + 10 and before <= 100, row)
            self.assertEqual(row["eot"], "2" if row["attack"] == "pgd+eot" else "1")
            self.assertEqual(row["steps"], "1" if row["attack"] == "fgsm" else "2")
            self.assertEqual(row["draws"], "5" if row["sigma"] not in ("", "0.0") else "1")
            self.assertEqual(row["autoencoder"], "" if row["run"] == clean else de3.split("/")[0])
            self.assertEqual((row["images"], row["split"], row["reading"]), ("20", "test", "one shot"))

    def test_stronger_attack(self):
        """Two losses, two restarts, undefended and De³, in a ball that is the whole pixel box."""
        rows = self.attack("--attack", "pgd", "--eps", "1", "--sigma", "off", 50, "--restarts", 2,
                           "--loss", "ce", "margin")
        self.assertEqual([row["defense"] for row in rows], ["undefended", "De³ σ = 50"])
        for row in rows:
            self.assertEqual((row["loss"], row["restarts"]), ("ce+margin", "2"))
            self.assertLess(float(row["robust_accuracy"]), 30)
