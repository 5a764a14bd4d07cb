"""What the stages report: scores, intervals, the rows of attack.csv and their names, pictures."""

import contextlib
import math
import os
import re
import sys
import types
import unittest
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageColor, ImageFont
from torch import nn

import attack
from model import De3, MaskAndFill, MaskAndPaste, NoiseOnly, UserError
from support import cli, data, report
from support import run as run_module
from tests.helpers import (assert_near, assert_refused, digits_runs, finished, new_folder, photo_autoencoder,
                           photo_classifier, random_images, read_csv, run, small_autoencoder,
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

    def test_in_batches(self):
        """Every image once, in order and as a float, in batches of any size; it says how far it is."""
        images = (255 * random_images(7, 1, 2, 2)).byte()
        labels, sizes, told = torch.arange(7), [], []

        def brightness(x, y):
            sizes.append(len(x))
            return x.mean((1, 2, 3)) + y
        found = attack.in_batches(brightness, images, labels, 3, told.append)
        assert_near(found, images.float().mean((1, 2, 3)) / 255 + labels)
        self.assertEqual((sizes, told), ([3, 3, 1], [3 / 7, 6 / 7, 1]))


class TestRows(unittest.TestCase):
    """Tables in files: attack.csv, and whatever stands in its place."""

    SHORT = ("--images", 6, "--attack", "fgsm", "--eps", "8/255")

    def test_append_row(self):
        """A line a row, appended: what stands there is not touched, and other columns are refused."""
        path = new_folder() / "new" / "attack.csv"
        report.append_row(path, dict(defense="De³, σ = 50", robust=10))
        first = path.read_bytes()
        report.append_row(path, dict(defense='a "clean" one', robust=1))
        self.assertTrue(path.read_bytes().startswith(first))
        self.assertEqual(report.read_rows(path), [dict(defense="De³, σ = 50", robust="10"),
                                                  dict(defense='a "clean" one', robust="1")])
        self.assertEqual(report.read_rows(path), read_csv(path))
        for row in (dict(defense="x"), dict(robust=1, defense="x"), dict(defense="x", robust=1, code="y")):
            self.assertRaisesRegex(UserError, "other columns", report.append_row, path, row)
        self.assertEqual(len(read_csv(path)), 2)
        self.assertEqual(report.read_rows(path.parent / "none.csv"), [])

    def test_processes_agree_on_what_is_there(self):
        """What rank 0 read: one that sees no table, on another machine, would measure what the others keep."""
        path, told = new_folder() / "attack.csv", []
        report.append_row(path, dict(robust=1))
        with mock.patch.object(cli, "of_rank_0", side_effect=lambda rows: told.append(rows) or [dict(robust="2")]):
            for rank in (0, 1):
                with mock.patch.object(cli, "rank", return_value=rank):
                    self.assertEqual(report.read_rows(path), [dict(robust="2")])
        self.assertEqual(told, [[dict(robust="1")], []])

    def test_row_that_is_there(self):
        """What was measured by the same code on the same images is shown again, not measured again."""
        out, fgsm = new_folder(), ("attack", photo_classifier("clean"), *self.SHORT)
        first = finished(run(*fgsm, "--out", out)).out
        with mock.patch.object(attack, "measure", side_effect=AssertionError("measured again")):
            again = finished(run(*fgsm, "--out", out)).out
        self.assertEqual(*[re.search(r"\nclean .* fgsm .*\]", text)[0] for text in (first, again)])
        self.assertRegex(again, r"\nclean .* kept\n")
        self.assertEqual(len(read_csv(out / "attack.csv")), 1)
        for flag, value in (("--seed", 1), ("--images", 7), ("--eps", "7/255"), ("--threat", "gray")):
            finished(run(*fgsm, flag, value, "--out", out))
        self.assertEqual(len(read_csv(out / "attack.csv")), 5)

    def test_attack_of_ones_own(self):
        """Defined outside the project, as in a notebook, and defined anew: it is measured again."""
        out, path = new_folder(), new_folder() / "attack_of_mine.py"
        for body, rows in (("images", 1), ("images.flip(1)", 2), ("images.flip(1)", 2)):
            path.write_text(f"def mine(model, images, labels, eps, **settings):\n    return {body}\n")
            module = types.ModuleType("attack_of_mine")
            module.__file__ = str(path)
            exec(compile(path.read_text(), path, "exec"), vars(module))
            with mock.patch.dict(attack.ATTACKS, mine=attack.Attack(module.mine)), \
                    mock.patch.dict(sys.modules, attack_of_mine=module):
                finished(run("attack", photo_classifier("clean"), "--images", 6, "--eps", 1, "--attack", "mine",
                             "--out", out))
            self.assertEqual(len(read_csv(out / "attack.csv")), rows)

    def test_other_columns_are_found_first(self):
        """Before an hour is spent on what could not be written down."""
        out = new_folder()
        (out / "attack.csv").write_text("defense,robust\nde3,10\n")
        with mock.patch.object(attack, "measure", side_effect=AssertionError("measured")):
            assert_refused(run("attack", photo_classifier("clean"), *self.SHORT, "--out", out), "other columns")

    def test_settings_are_shown(self):
        """Those of each attack beside it; eps 0 is used, and gives the clean accuracy."""
        folder, out = digits_runs()[0], new_folder()
        for flags in (["--step-size", "2/255"], ["--steps", 7]):
            result = finished(run("attack", folder / "de3", "--sigma", 50, "--images", 6, "--attack", "fgsm",
                                  "pgd+eot", "--eot", 3, "--eps", 0, *flags, "--out", out))
            shown = re.findall(r"\nde3, σ = 50 +0/255 +(fgsm|pgd\+eot) +ce +(\d+) +(\d+) +1 ", result.out)
            self.assertEqual(shown, [("fgsm", "1", "1"),
                                     ("pgd+eot", "7" if flags == ["--steps", 7] else "20", "3")])
        rows = [row for row in read_csv(out / "attack.csv") if row["attack"] == "pgd+eot"]
        for row, step in zip(rows, ("0.00784314", "0"), strict=True):
            self.assertEqual((row["eps"], row["step_size"], row["eot"]), ("0", step, "3"))
            self.assertAlmostEqual(float(row["robust_accuracy"]), float(row["clean_accuracy"]), delta=17)
        finished(run("attack", folder / "clean", "--images", 6, "--attack", "pgd", "--eps", 0, "--out", out))
        last = read_csv(out / "attack.csv")[-1]
        self.assertEqual(last["robust_accuracy"], last["clean_accuracy"])

    def test_names(self):
        """A row is named by the folder of its run, what else stands in front of it, and the level."""
        folder, out = new_folder(), new_folder()
        for name, source in (("trades", photo_classifier("clean")), ("paper's", photo_classifier()),
                             ("a/same", photo_classifier()), ("b/same", photo_classifier())):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(source)
        for runs, flags, expected in [
                (["trades", "paper's"], ["--sigma", 50, "off"],
                 [("trades", "off", ""), ("paper's, σ = 50", "σ = 50", "50.0"), ("paper's, off", "off", "")]),
                (["trades"], ["--autoencoder", photo_autoencoder(), "--sigma", 9],
                 [("trades behind De³, σ = 9, autoencoder of nim", "σ = 9", "9.0")]),
                (["paper's"], ["--defense", "no-denoise:uniform:0,9"],
                 [("paper's behind noise only, σ = uniform:0,9", "σ = uniform:0,9", "")]),
                (["a/same", "b/same"], ["--sigma", 50],
                 [(f"{folder / name}, σ = 50", "σ = 50", "50.0") for name in ("a/same", "b/same")])]:
            with self.subTest(runs, flags=flags):
                finished(run("attack", *[folder / name for name in runs], *flags, *self.SHORT, "--out", out))
                rows = read_csv(out / "attack.csv")
                self.assertEqual([(row["defense"], row["level"], row["value"]) for row in rows], expected)
                (out / "attack.csv").unlink()

    def test_table_that_cannot_be_written(self):
        """What was measured was shown before; the clock may be coarse, or set back."""
        with mock.patch.object(report, "append_row", side_effect=UserError("could not save")), \
                mock.patch("time.time", return_value=0.0):
            refused = run("attack", photo_classifier("clean"), "--attack", "fgsm", "--images", 4, "--eps",
                          "8/255", "--workers", 0, "--out", new_folder())
        assert_refused(refused, "could not save")
        self.assertRegex(refused.out, r"clean +8/255 +fgsm +ce +1 +1 +1 +[\d.]+ \[")

    def test_rows_say_where_they_come_from(self):
        """Commit, code, weights (autoencoder included), data and the pixels that were attacked."""
        folder, _ = digits_runs()
        flags = (folder / "clean", folder / "de3", "--sigma", "off", 0, 50, *self.SHORT)
        out = new_folder()
        finished(run("attack", *flags, "--out", out))
        finished(run("attack", *flags, "--out", out, "--seed", 1, "--images", 7))
        with mock.patch.object(run_module, "digest_of_file", lambda name: f"edited {name}"):
            finished(run("attack", *flags, "--out", out))
        rows = read_csv(out / "attack.csv")
        self.assertEqual(len(rows), 12)
        self.assertEqual([row["defense"] for row in rows[:4]],
                         ["clean", "de3, off", "de3, σ = 0", "de3, σ = 50"])
        self.assertEqual([row["run"] for row in rows[:4]],
                         [(folder / name).as_posix() for name in ("clean", "de3", "de3", "de3")])
        clean, _ = run_module.load(folder / "clean", "classifier")
        pixels = data.digest(*data.load_images("digits", "test", 32, count=6)[:2])
        for row in rows:
            self.assertEqual((row["data"], row["split"], row["commit"]), ("digits", "test",
                                                                         run_module.commit()))
            self.assertEqual(row["pixels"] == pixels, row["images"] == "6")
            self.assertEqual(row["attack_seed"], "1" if row["images"] == "7" else "0")
            self.assertEqual(row["weights"] == run_module.fingerprint(clean),
                             row["run"].endswith("clean"))
        self.assertEqual(len({row["weights"] for row in rows}), 4)  # De³ has an autoencoder, and a sigma
        self.assertEqual({row["code"] for row in rows[:8]} & {row["code"] for row in rows[8:]}, set())
        self.assertEqual({len(row["code"]) for row in rows}, {12})

    def test_weights_of_the_autoencoder_count(self):
        """And what a defense is set to; not where the models lie."""
        autoencoder, classifier = small_autoencoder(), small_classifier()
        defenses = [De3(autoencoder, classifier, 50), De3(small_autoencoder(1), classifier, 50),
                    De3(autoencoder, small_classifier(1), 50), De3(autoencoder, classifier, 50, votes=3),
                    NoiseOnly(None, classifier, 50), classifier,
                    MaskAndFill(autoencoder, classifier, 0.5), MaskAndPaste(autoencoder, classifier, 0.5)]
        found = [run_module.fingerprint(defense) for defense in defenses]
        self.assertEqual(len(set(found)), len(found))
        again = De3(small_autoencoder(), small_classifier(), 50).eval()
        self.assertEqual(run_module.fingerprint(again), found[0])

    def test_other_table(self):
        """With other columns, or none: refused in one sentence, and it stays as it is."""
        clean, out = digits_runs()[0] / "clean", new_folder()
        for content in ("defense,attack,robust_accuracy\nDe³,pgd,12.50\n", "defense;attack\nDe³;pgd\n"):
            (out / "attack.csv").write_text(content)
            assert_refused(run("attack", clean, *self.SHORT, "--out", out),
                           ("attack.csv", "other columns", "--out"))
            self.assertEqual((out / "attack.csv").read_text(), content)

    def test_spreadsheet(self):
        """One that puts a mark in front of the text: the rows are read all the same."""
        path = new_folder() / "attack.csv"
        path.write_text("defense,robust\nDe³,1\n", "utf-8-sig")
        self.assertEqual(report.read_rows(path), [dict(defense="De³", robust="1")])

    def test_folder_whose_name_is_no_text(self):
        """Of the bytes caf\\xe9: attack.csv keeps them, and the second call finds its row again."""
        folder, out = digits_runs()[0], new_folder() / os.fsdecode(b"caf\xe9")
        os.symlink(folder, out)
        for _ in range(2):
            finished(run("attack", out / "clean", *self.SHORT, "--out", out.parent))
        rows = (out.parent / "attack.csv").read_bytes().splitlines()[1:]
        self.assertEqual([b"caf\xe9/clean" in row for row in rows], [True])


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
        font = ImageFont.load_default(report.TEXT)
        self.assertEqual(report.fitting("cat", font, 112), "cat")
        short = report.fitting("terrier" * 9, font, 112)
        self.assertTrue("terrier" * 9 != short and ("terrier" * 9).startswith(short))
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


if __name__ == "__main__":
    unittest.main()
