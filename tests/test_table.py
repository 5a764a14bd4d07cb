"""What the stages report: scores, intervals, the rows of attack.csv, the defenses in words."""

import contextlib
import math
import re
import unittest

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import nn

import attack
from model import De3, UserError
from support import evaluation, pictures
from tests.helpers import (assert_near, new_folder, random_images, read_csv, small_autoencoder,
                           small_classifier)


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

    def test_accuracy(self):
        """The mean over fresh draws, of each image."""
        class Coin(nn.Module):
            def forward(self, x):
                return torch.rand(len(x), 2) - torch.tensor([0.0, 0.5])
        torch.manual_seed(0)
        result = attack.accuracy(Coin(), torch.zeros(5, 3, 4, 4), torch.zeros(5).long(), draws=2000)
        assert_near(result, torch.full((5,), 0.875).double(), atol=0.03)

    def test_interval(self):
        """Known values of Wilson's interval."""
        for percent, images, low, high in [(50, 10, 23.7, 76.3), (0, 10, 0.0, 27.8),
                                           (100, 10, 72.2, 100.0), (8100 / 263, 263, 25.5, 36.6)]:
            text = evaluation.interval(percent, images)
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", text)]
            assert_near(torch.tensor(numbers), torch.tensor([percent, low, high]), atol=0.06)

    def test_psnr(self):
        a = torch.zeros(2, 3, 4, 4)
        b = a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
        assert_near(pictures.psnr(b, a), torch.tensor([20., 40.]), atol=1e-3)

    def test_append_row(self):
        """Rows of earlier runs are kept; another file of that name is left alone."""
        def row(**changes):
            return {**{name: "1" for name in evaluation.FIELDS}, **changes}
        path = new_folder() / "new" / "attack.csv"
        evaluation.append_row(path, row(defense="De³ σ = 50", sigma=50.0, robust_accuracy=10))
        evaluation.append_row(path, row(defense="undefended", sigma=""))
        found = [(row["defense"], row["sigma"], row["robust_accuracy"]) for row in read_csv(path)]
        self.assertEqual(found, [("De³ σ = 50", "50.0", "10"), ("undefended", "", "1")])
        path.write_text("a,b\n1,2\n")
        self.assertRaises(UserError, evaluation.append_row, path, row())
        self.assertEqual(path.read_text(), "a,b\n1,2\n")

    def describe(self, sigma=None, mask_ratio=None, keep_visible=False, denoised=True, **settings):
        """The words for a defense made with these settings of finetune.py."""
        settings = {"adversarial": "None", "arch": "vit", "from_scratch": "False", **settings}
        autoencoder = small_autoencoder() if denoised else None
        de3 = De3(autoencoder, small_classifier(), sigma, mask_ratio, keep_visible)
        return evaluation.describe({"settings": settings}, de3)

    def test_defenses_in_words(self):
        for words, made_with in [
                ("undefended", dict()),
                ("undefended", dict(denoised=False)),
                ("De³ σ = 50", dict(sigma=50)),
                ("De³ σ = 0", dict(sigma=0)),
                ("noise only σ = 50", dict(sigma=50, denoised=False)),
                ("MIM mask 0.5", dict(mask_ratio=0.5)),
                ("MIM mask 0.5, visible kept", dict(mask_ratio=0.5, keep_visible=True)),
                ("adversarial training 16/255", dict(adversarial=str(16 / 255))),
                ("De³ σ = 50, adversarial training 8/255", dict(sigma=50, adversarial=str(8 / 255))),
                ("undefended, from scratch", dict(from_scratch="True")),
                ("De³ σ = 50, resnet18", dict(sigma=50, arch="resnet18", from_scratch="True"))]:
            self.assertEqual(self.describe(**made_with), words)

    def test_published_weights_in_words(self):
        """Nothing is known of how they were trained."""
        checkpoint = {"settings": {"autoencoder": ""}}
        self.assertEqual(evaluation.describe(checkpoint, De3(None, small_classifier(), None)),
                         "undefended")

    def test_folders_where_words_are_not_unique(self):
        named = [evaluation.NamedDefense(words, run, "", None) for words, run in
                 (("undefended", "a/clean"), ("De³ σ = 50", "a/de3"), ("undefended", "b/clean"))]
        found = [defense.words for defense in evaluation.with_folders(named)]
        self.assertEqual(found, ["undefended (a/clean)", "De³ σ = 50", "undefended (b/clean)"])
        self.assertEqual(evaluation.with_folders(named[:2]), named[:2])

    def test_sheet(self):
        """The caption is red under the image where the answer is wrong, and there only."""
        path, images = new_folder() / "sheet.png", torch.zeros(2, 3, 8, 8)
        row = pictures.Row("two\nimages", images, ["right", "wrong"], [False, True])
        with contextlib.redirect_stdout(None):
            pictures.draw_sheet(path, "a heading", ["0", "1"], [row])
        with Image.open(path) as sheet:
            red = torch.tensor(np.array(sheet)) == torch.tensor(ImageColor.getrgb(pictures.WRONG))
        height, width = red.shape[:2]
        row_of_pixel, column_of_pixel = red.all(2).nonzero().T
        self.assertGreater(column_of_pixel.min(), width - pictures.CELL - pictures.GAP - 1)
        self.assertGreater(row_of_pixel.min(), height - pictures.TEXT - 2 * pictures.GAP - 1)
