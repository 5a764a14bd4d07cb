"""What the stages report: scores, intervals, the rows of attack.csv, defenses in words, pictures."""

import contextlib
import math
import os
import re
import unittest
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageColor, ImageFont
from torch import nn

import attack
from model import De3, MaskAndFill, NoiseOnly, UserError
from support import data, report, weights
from support import run as run_module
from tests.helpers import (assert_near, assert_refused, digits_runs, finished, new_folder, photo_classifier,
                           random_images, read_csv, run, small_autoencoder, small_classifier)


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
        assert_near(result, torch.full((5,), 0.875), atol=0.03)

    def test_interval(self):
        """Known values of Wilson's interval."""
        for percent, images, low, high in [(50, 10, 23.7, 76.3), (0, 10, 0.0, 27.8),
                                           (100, 10, 72.2, 100.0), (8100 / 263, 263, 25.5, 36.6)]:
            text = report.interval(percent, images)
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", text)]
            assert_near(torch.tensor(numbers), torch.tensor([percent, low, high]), atol=0.06)

    def test_psnr(self):
        a = torch.zeros(2, 3, 4, 4)
        b = a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
        assert_near(report.psnr(b, a), torch.tensor([20., 40.]), atol=1e-3)

    def test_defenses_in_words(self):
        """The title and level of a defense, then what is particular to the classifier's training."""
        autoencoder = small_autoencoder()
        for words, defense, changes in [
                ("undefended", None, {}),
                ("De³ σ = 50", De3(autoencoder, None, 50), {}),
                ("De³ σ = 0", De3(autoencoder, None, 0), {}),
                ("noise only σ = 50", NoiseOnly(None, None, 50), {}),
                ("MIM mask 0.5", MaskAndFill(autoencoder, None, 0.5), {}),
                ("MIM mask 0.5, visible kept",
                 MaskAndFill(autoencoder, None, 0.5, keep_visible=True), {}),
                ("adversarial training 16/255", None, dict(adversarial=16 / 255)),
                ("De³ σ = 50, adversarial training 8/255", De3(autoencoder, None, 50),
                 dict(adversarial=8 / 255)),
                ("undefended, from scratch", None, dict(from_scratch=True)),
                ("De³ σ = 50, resnet18", De3(autoencoder, None, 50), dict(arch="resnet18"))]:
            config = {"arch": changes.get("arch", "vit")}
            self.assertEqual(weights.describe(dict(settings=changes, config=config), defense), words)

    def test_published_weights_in_words(self):
        """Nothing is known of how they were trained."""
        self.assertEqual(weights.describe(dict(settings={}, config={}), None), "undefended")


class TestRows(unittest.TestCase):
    """Tables in files: attack.csv, and whatever stands in its place."""

    SHORT = ("--images", 6, "--attack", "fgsm", "--eps", "8/255")

    def test_append_row(self):
        """A column that a table lacks is added behind; in the old rows it is empty."""
        path = new_folder() / "new" / "attack.csv"
        report.append_row(path, dict(defense="De³ σ = 50", robust=10))
        report.append_row(path, dict(defense="undefended", robust=1, code="abc"))
        report.append_row(path, dict(defense="clean"))
        self.assertEqual(read_csv(path), [
            dict(defense="De³ σ = 50", robust="10", code=""),
            dict(defense="undefended", robust="1", code="abc"),
            dict(defense="clean", robust="", code="")])
        self.assertEqual(report.read_table(path), read_csv(path))

    def test_settings_are_shown(self):
        """The step size in the heading; eps 0 is used, and gives the clean accuracy."""
        folder, out = digits_runs()[0], new_folder()
        for flags, words in ((["--step-size", "2/255"], "20 steps of 2/255"),
                             (["--steps", 7], "7 steps of 2.5 eps/steps")):
            result = finished(run("attack", folder / "clean", "--images", 6, "--attack", "pgd",
                                  "--eps", 0, *flags, "--out", out))
            self.assertIn(words, result.out.partition("defense")[0])
        for row, step in zip(read_csv(out / "attack.csv"), ("0.00784314", "0")):
            self.assertEqual((row["eps"], row["step_size"]), ("0", step))
            self.assertEqual(row["robust_accuracy"], row["clean_accuracy"])

    def test_table_that_cannot_be_written(self):
        """What was measured was shown before; the clock may be coarse, or set back."""
        with mock.patch.object(report, "append_row", side_effect=UserError("could not save")), \
                mock.patch("time.time", return_value=0.0):
            refused = run("attack", photo_classifier("clean"), "--attack", "fgsm", "--images", 4, "--eps",
                          "8/255", "--workers", 0, "--out", new_folder())
        assert_refused(refused, "could not save")
        self.assertRegex(refused.out, r"undefended +8/255 +fgsm +[\d.]+ \[")

    def test_rows_say_where_they_come_from(self):
        """Commit, code, weights (autoencoder included), data and the pixels that were attacked."""
        folder, _ = digits_runs()
        flags = (folder / "clean", folder / "de3", "--sigma", "off", 0, 50, *self.SHORT)
        out = new_folder()
        finished(run("attack", *flags, "--out", out))
        finished(run("attack", *flags, "--out", out, "--seed", 1, "--images", 7))
        with mock.patch.object(run_module, "digests", lambda files: dict.fromkeys(files, "edited")):
            finished(run("attack", *flags, "--out", out))
        rows = read_csv(out / "attack.csv")
        self.assertEqual([row["defense"] for row in rows[:4]],
                         ["undefended (%s)" % (folder / name) for name in ("clean", "de3")]
                         + ["De³ σ = 0", "De³ σ = 50"])
        clean, _ = run_module.load(folder / "clean", "classifier")
        batches = data.Loader(data.evenly_spread(data.load_dataset("digits", "test", 32), 6), 120)
        for row in rows:
            self.assertEqual((row["data"], row["split"], row["commit"]), ("digits", "test",
                                                                         run_module.commit()))
            self.assertEqual(row["pixels"] == data.digest_of(batches), row["images"] == "6")
            self.assertEqual(row["weights"] == run_module.identity(clean),
                             row["run"].endswith("clean"))
        self.assertEqual(len({row["weights"] for row in rows}), 3)  # De³ has an autoencoder
        self.assertEqual({row["code"] for row in rows[:8]} & {row["code"] for row in rows[8:]}, set())
        self.assertEqual({len(row["code"]) for row in rows}, {12})

    def test_weights_of_the_autoencoder_count(self):
        """And what a defense is set to; not where the models lie."""
        autoencoder, classifier = small_autoencoder(), small_classifier()
        defenses = [De3(autoencoder, classifier, 50), De3(small_autoencoder(1), classifier, 50),
                    De3(autoencoder, small_classifier(1), 50), De3(autoencoder, classifier, 50, votes=3),
                    NoiseOnly(None, classifier, 50), classifier,
                    MaskAndFill(autoencoder, classifier, 0.5),
                    MaskAndFill(autoencoder, classifier, 0.5, keep_visible=True)]
        found = [run_module.fingerprint(defense) for defense in defenses]
        self.assertEqual(len(set(found)), len(found))
        again = De3(small_autoencoder(), small_classifier(), 50).eval()
        self.assertEqual(run_module.fingerprint(again), found[0])

    def test_table_of_an_earlier_layout(self):
        """Fewer columns, perhaps saved by a spreadsheet program with a mark in front: goes on in it."""
        folder, out = digits_runs()[0], new_folder()
        for encoding in ("utf-8", "utf-8-sig"):
            (out / "attack.csv").write_text("defense,attack,robust_accuracy\nDe³,pgd,12.50\n", encoding)
            finished(run("attack", folder / "clean", *self.SHORT, "--out", out))
            old, new = read_csv(out / "attack.csv")
            self.assertEqual((old["defense"], old["robust_accuracy"], old["code"]), ("De³", "12.50", ""))
            self.assertEqual((new["defense"], new["attack"]), ("undefended", "fgsm"))
            self.assertEqual(list(old)[:3], ["defense", "attack", "robust_accuracy"])
            self.assertNotIn("", new.values())

    def test_no_table(self):
        """Said before anything is measured; the file stays as it is."""
        folder, out = digits_runs()[0], new_folder()
        for content, words in [("defense;attack\nDe³;pgd\n", "separated by commas"),
                               ("defense,attack\nDe³,pgd,12,50\n", "more fields than the heading"),
                               ('defense,attack\n"De³,pgd\n', "attack.csv"),
                               (b"\xff\xfe\0", "attack.csv"),
                               ("defense\n", "separated by commas")]:
            content = content.encode() if isinstance(content, str) else content
            (out / "attack.csv").write_bytes(content)
            with mock.patch.object(attack, "pgd", side_effect=AssertionError):
                refused = run("attack", folder / "clean", *self.SHORT, "--out", out)
            assert_refused(refused, (words, "is not a table that can be read"))
            self.assertEqual((out / "attack.csv").read_bytes(), content)

    def test_folder_whose_name_is_no_text(self):
        """Of the bytes caf\\xe9: attack.csv keeps them."""
        folder, out = digits_runs()[0], new_folder() / os.fsdecode(b"caf\xe9")
        os.symlink(folder, out)
        for _ in range(2):
            finished(run("attack", out / "clean", *self.SHORT, "--out", out.parent))
        rows = (out.parent / "attack.csv").read_bytes().splitlines()[1:]
        self.assertEqual([b"caf\xe9/clean" in row for row in rows], [True, True])


class TestSheet(unittest.TestCase):
    """Sheets of captioned pictures."""

    def sheet(self, heading="a heading", columns=("0", "1"), title="two\nimages", captions=("a", "b"),
              wrong=(False, True)):
        """The pixels of a sheet of one row, two black images: [H, W, 3]."""
        path, images = new_folder() / "sheet.png", torch.zeros(2, 3, 8, 8)
        row = report.Row(title, images, list(captions), list(wrong))
        with contextlib.redirect_stdout(None):
            report.draw_sheet(path, heading, list(columns), [row])
        with Image.open(path) as sheet:
            return torch.tensor(np.array(sheet)).int()

    def test_captions(self):
        """Red under the image where the answer is wrong, and there only."""
        red = self.sheet(captions=("right", "wrong")) == torch.tensor(ImageColor.getrgb(report.WRONG))
        height, width = red.shape[:2]
        row_of_pixel, column_of_pixel = red.all(2).nonzero().T
        self.assertGreater(column_of_pixel.min(), width - report.CELL - report.GAP - 1)
        self.assertGreater(row_of_pixel.min(), height - report.TEXT - 2 * report.GAP - 1)

    def test_wide_class_names(self):
        """Shortened to the width of a cell: nothing is drawn between the cells, or outside the sheet."""
        for name in ("n02093428_American_Staffordshire_terrier", "W" * 300, "日本の" * 40):
            pixels = self.sheet(columns=[name, name], captions=[name, name], title="", heading="")
            dark = (pixels < 128).all(2).any(0) | (pixels[:, :, 0] > pixels[:, :, 1] + 60).any(0)
            gap = dark[-report.CELL - 2 * report.GAP + 1:-report.CELL - report.GAP]
            self.assertFalse(gap.any(), name)
            self.assertTrue(dark[-report.CELL - report.GAP:].any())
        font = report.load_font()
        self.assertEqual(report.shorten("cat", font, 112), "cat")
        short = report.shorten("terrier" * 9, font, 112)
        self.assertTrue(short.startswith("terrier") and short.endswith("..."))
        self.assertTrue(90 < font.getlength(short) <= 112)

    def test_letters_that_the_font_lacks(self):
        """σ is written out, wherever it stands; others become question marks."""
        for place in ("heading", "title", "columns", "captions"):
            def value(text):
                return [text, text] if place in ("columns", "captions") else text
            with self.subTest(place):
                self.assertTrue(torch.equal(self.sheet(**{place: value("σ = 5")}),
                                            self.sheet(**{place: value("sigma = 5")})))
                self.assertTrue(torch.equal(self.sheet(**{place: value("日 b")}),
                                            self.sheet(**{place: value("? b")})))

    def test_older_pillow(self):
        """Before 10.1 load_default took no size, and its font knew Latin-1 only."""
        font = ImageFont.load_default_imagefont()

        def load_default(*size):
            if size:
                raise TypeError("load_default() takes 0 positional arguments but 1 was given")
            return font
        with mock.patch.object(ImageFont, "load_default", load_default):
            self.assertIs(report.load_font(), font)
            for title in ("De³", "De³, σ = 50"):
                pixels = self.sheet(title=title, columns=("σ = 0", "é"), captions=("日本", "x" * 99))
                self.assertGreater(len(pixels.flatten(0, 1).unique(dim=0)), 2)


if __name__ == "__main__":
    unittest.main()
