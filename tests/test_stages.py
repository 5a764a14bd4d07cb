"""The four stages, one after the other, on the digits."""

import math
import re
import unittest

import numpy as np
import torch
from PIL import Image

from support import data
from support import run as run_module
from tests.helpers import assert_picture, digits_runs, finished, new_folder, read_csv, run, saved


class TestStages(unittest.TestCase):
    def test_pretrain(self):
        """The PSNR of what goes in follows from sigma; what comes out is nearer to the clean image."""
        folder, (pretrained, *_) = digits_runs()
        shown = re.findall(r"^ +σ = (\d+)  noisy +([-\d.]+)  denoised +([-\d.]+)$", pretrained.out, re.M)
        self.assertEqual([sigma for sigma, *_ in shown], ["25", "50", "75", "100", "150"])
        noisy, denoised = map(float, shown[-1][1:])
        self.assertAlmostEqual(noisy, 20 * math.log10(255 / 150), delta=0.1)
        self.assertGreater(denoised, noisy + 5)
        assert_picture(folder / "nim" / "pretrain.png")

    def test_finetune(self):
        """One classifier a call, which is better than chance; a De³'s folder holds its autoencoder."""
        folder, (_, *finetuned) = digits_runs()
        nim = saved(folder / "nim")
        ends = ("right behind De³, σ = uniform:100,400", "right")
        for mode, end, result in zip(("de3", "clean"), ends, finetuned):
            accuracy, = re.findall(rf"^([\d.]+)% of 240 validation images are {end}$", result.out, re.M)
            self.assertGreater(float(accuracy), 18)  # chance is 10
            self.assertIn(f"\nthe run is in {folder / mode}; next: python attack.py {folder / mode}\n",
                          result.out)
            checkpoint = saved(folder / mode)
            self.assertEqual(checkpoint["classes"], [str(digit) for digit in range(10)])
            self.assertEqual(checkpoint["defense"], mode if mode == "de3" else "")
            held = checkpoint["autoencoder"]
            self.assertEqual(held is not None, mode == "de3")
        for name, value in nim["model"].items():
            self.assertTrue(torch.equal(saved(folder / "de3")["autoencoder"]["model"][name], value))

    def test_log(self):
        """A row for each epoch, with what the screen showed; no accuracy in pretraining."""
        folder, results = digits_runs()
        for name, result in zip(("nim", "de3", "clean"), results):
            shown = re.findall(r"^epoch +(\d+)/\d+  loss +([\d.]+)", result.out, re.M)
            rows = read_csv(folder / name / "log.csv")
            self.assertEqual([(row["epoch"], f"{float(row['loss']):.4f}") for row in rows], shown)
            self.assertEqual({row["accuracy"] != "" for row in rows}, {name != "nim"})
            losses = [float(row["loss"]) for row in rows]
            self.assertLess(losses[-1], losses[0])
            self.assertEqual(rows, [{key: str(value) for key, value in row.items()}
                                    for row in saved(folder / name)["log"]])

    def test_defend(self):
        folder, _ = digits_runs()
        result = finished(run("defend", folder / "clean", folder / "de3", "--images", 20, "--votes", 2,
                              "--steps", 2, "--eot", 2))
        self.assertIn("20 test images of digits, votes 2, seed 0\n", result.out)
        row = r"^(clean|de3, σ = \d+) +([\d.]+) \[.*\] +([\d.]+|-) +\d+$"
        rows = re.findall(row, result.out, re.M)
        levels = [f"de3, σ = {sigma}" for sigma in data.DATASETS["digits"].test_sigmas]
        self.assertEqual([name for name, _, _ in rows], ["clean", *levels])
        classifier, _ = run_module.load(folder / "clean", "classifier")
        images, labels, _ = data.load_images("digits", "test", 32, count=20)
        with torch.no_grad():
            accuracy = 100 * (classifier(images).argmax(1) == labels).double().mean()
        self.assertAlmostEqual(float(rows[0][1]), accuracy.item(), delta=0.06)
        self.assertEqual(rows[0][2], "-")
        for row in rows[1:]:
            self.assertTrue(0 <= float(row[1]) <= 100 and 5 < float(row[2]) < 40, row)
        assert_picture(folder / "defend.png")

    def test_purified_photos(self):
        folder, _ = digits_runs()
        photo = new_folder() / "my photo.png"
        Image.fromarray(np.full((40, 50, 3), 99, np.uint8)).save(photo)
        out = new_folder()
        result = finished(run("defend", folder / "clean", folder / "de3", "--photos", photo,
                              "--sigma", 0, 80, "--out", out))
        lines = re.findall(rf"^{re.escape(str(photo))}  (.*): \d [\d.]+%, ", result.out, re.M)
        self.assertEqual(lines, ["clean", "de3, σ = 0", "de3, σ = 80"])
        pictures = sorted((out / "purified").iterdir())
        self.assertEqual([path.name for path in pictures], [
            f"0001_my photo_de3_{level}.png" for level in ("sigma0", "sigma80")])
        for path in pictures:
            with Image.open(path) as image:
                self.assertEqual(image.size, (32, 32))

    def attack(self, *flags):
        """attack.py with few images and steps: the rows of its table, which is anew."""
        folder, _ = digits_runs()
        out = new_folder()
        finished(run("attack", folder / "clean", folder / "de3", "--images", 20, "--steps", 2,
                     "--out", out, *flags))
        return read_csv(out / "attack.csv")

    def test_attack(self):
        rows, (folder, _) = self.attack("--eot", 2), digits_runs()
        clean, de3 = str(folder / "clean"), str(folder / "de3")
        names = {(row["defense"], row["run"], row["level"], row["value"]) for row in rows}
        sigmas = data.DATASETS["digits"].test_sigmas
        self.assertEqual(names, {("clean", clean, "off", ""), *(
            (f"de3, σ = {sigma}", de3, f"σ = {sigma}", f"{sigma:.1f}") for sigma in sigmas)})
        self.assertIn(0, sigmas)
        expected = {("off", name) for name in ("fgsm", "pgd")} | {
            (f"σ = {sigma}", name) for sigma in sigmas for name in ("fgsm", "pgd", "pgd+eot")
            if (sigma, name) != (0, "pgd+eot")}  # without noise there is nothing to average
        self.assertEqual(sorted((row["level"], row["attack"], row["eps"]) for row in rows),
                         sorted((*key, f"{k / 255:.6g}") for key in expected for k in (8, 16)))
        for row in rows:
            before, after = float(row["clean_accuracy"]), float(row["robust_accuracy"])
            self.assertTrue(0 <= after <= before + 10 and before <= 100, row)
            self.assertEqual(row["eot"], "2" if row["attack"] == "pgd+eot" else "1")
            self.assertEqual(row["steps"], "1" if row["attack"] == "fgsm" else "2")
            self.assertEqual(row["draws"], "5" if row["level"] not in ("off", "σ = 0") else "1")
            self.assertEqual((row["images"], row["split"], row["data"], row["reading"]),
                             ("20", "test", "digits", "one shot"))
            self.assertEqual((row["norm"], row["threat"], row["attack_seed"]), ("linf", "white", "0"))
            self.assertEqual(row["commit"], run_module.commit())
        weights = {(row["run"], row["weights"], row["code"]) for row in rows}
        self.assertEqual(len(weights), 1 + len(sigmas))  # sigma is a setting of the defense

    def test_stronger_attack(self):
        """Two losses, two restarts, undefended and De³, in a ball that is the whole pixel box."""
        rows = self.attack("--attack", "pgd", "--eps", "1", "--sigma", 50, "--restarts", 2,
                           "--loss", "ce", "margin")
        self.assertEqual([row["defense"] for row in rows], ["clean", "de3, σ = 50"])
        for row in rows:
            self.assertEqual((row["loss"], row["restarts"]), ("ce+margin", "2"))
            self.assertLess(float(row["robust_accuracy"]), 30)
