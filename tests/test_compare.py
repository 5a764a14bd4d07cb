"""The comparison of all defenses: what is missing, the readings, what is measured again; the plot."""

import argparse
import contextlib
import copy
import csv
import importlib.util
import io
import re
import shlex
import shutil
import sys
import unittest
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

from model import De3, NoiseOnly, UserError
from studies import compare, plot, tables
from support import run as run_module
from tests.helpers import (assert_picture, assert_refused, copy_of_photos, finished, linear_on_digits,
                           new_folder, photo_classifier, photos, read_csv, run, small_autoencoder,
                           training)

SMALL = tables.Table({"nim": "--sigma 75", "mim": "--task mim"}, [
    tables.Entry("undefended", "clean", "--mode clean"),
    tables.Entry("De³", "de3", "--sigma uniform:0,30", defenses=("de3:0", "de3:40")),
    tables.Entry("MIM", "de3_mim", "", "mim", ("mim:0.5",)),
    tables.Entry("off the shelf", "clean", "--mode clean", defenses=("de3:20",), in_front="nim"),
], images=6, l2=1.0)
CELLS = [("undefended", "off"), ("De³", "σ = 0"), ("De³", "σ = 40"), ("MIM", "mask 0.5"),
         ("off the shelf", "σ = 20")]


class WithSmallTable(unittest.TestCase):
    """A table of four defenses for the photos, and a folder of runs made by the commands it names."""

    @classmethod
    def setUpClass(cls):
        patch = mock.patch.dict(tables.TABLES, small=SMALL)
        patch.start()
        cls.addClassCleanup(patch.stop)

    def setUp(self):
        self.folder = new_folder() / "runs"

    def compare(self, *flags, folder=None, dataset=None):
        return run("studies.compare", "small", "--data", dataset or photos(),
                   "--at", folder or self.folder, "--steps", 1, "--eot", 2, "--workers", 0, *flags)

    def commands(self, refused):
        """What the sentence says is to be run: a list of lists of words."""
        return [shlex.split(words) for words in refused.err.strip().partition("with: ")[2].split("&&")]

    def runs(self):
        """The runs of the table, made once, in a folder of this test's own."""
        if not hasattr(WithSmallTable, "made"):
            WithSmallTable.made = new_folder() / "made"
            refused = self.compare(folder=WithSmallTable.made)
            for _, script, *words in self.commands(refused):
                size = ["--size", "tiny"] if script == "pretrain.py" else []
                finished(run(script.removesuffix(".py"), *words, *size, "--workers", 0, *training()))
        shutil.copytree(WithSmallTable.made, self.folder)
        return self.folder

    def measured(self, *flags, **where):
        """The cells that a comparison with these flags measures, in their order."""
        cells, figures = [], dict.fromkeys(compare.MEASURED, 50.0)

        def measure(model, *_):
            cells.append(getattr(model, "level", "off"))
            return figures
        with mock.patch.object(compare, "measure", measure):
            finished(self.compare(*flags, **where))
        return cells


class TestCompare(WithSmallTable):
    def test_missing_runs(self):
        """Each run that is missing, by the command that makes it, once, in the order to run them."""
        nim, mim = self.folder / "nim", self.folder / "mim"
        where = ["--data", str(photos())]
        expected = [
            ["pretrain.py", "--sigma", "75", *where, "--out", str(nim)],
            ["finetune.py", "--autoencoder", str(nim), "--mode", "clean",
             "--out", str(self.folder / "clean")],
            ["finetune.py", "--autoencoder", str(nim), "--sigma", "uniform:0,30", "--out",
             str(self.folder / "de3")],
            ["pretrain.py", "--task", "mim", *where, "--out", str(mim)],
            ["finetune.py", "--autoencoder", str(mim), "--out", str(self.folder / "de3_mim")]]
        refused = self.compare()
        assert_refused(refused, "runs are missing")
        self.assertEqual(self.commands(refused), [["python", *words] for words in expected])
        self.assertEqual(self.commands(self.compare("--only", "MIM")),
                         [["python", *words] for words in expected[3:]])
        seeds = self.commands(self.compare("--seeds", 0, 3))
        self.assertEqual(len(seeds), 10)
        self.assertEqual(seeds[5], ["python", "pretrain.py", "--sigma", "75", *where, "--seed", "3",
                                    "--out", str(self.folder / "seed3" / "nim")])
        (self.runs() / "de3" / "checkpoint.pt").unlink()
        self.assertEqual(self.commands(self.compare()), [["python", *expected[2]]])
        assert_refused(self.compare("--only", "JPEG"), ("no JPEG", "undefended; De³; MIM"))

    def test_trained_run_needs_no_pretraining_run(self):
        """A folder is a whole defense, but for what is put in front of it."""
        table, here = tables.TABLES["digits"], new_folder()
        shutil.copytree(photo_classifier("clean"), here / "clean")
        undefended = tables.choose(table, ["undefended"])
        self.assertEqual(tables.missing_commands(table, undefended, here, [0], "digits"), [])
        in_front = [undefended[0]._replace(in_front="nim")]
        self.assertIn("pretrain.py", tables.missing_commands(table, in_front, here, [0], "digits")[0])

    def test_missing_runs_of_the_tables(self):
        refused = run("studies.compare", "--at", self.folder, "--seeds", 0, 1)
        assert_refused(refused,
                       ("python pretrain.py --sigma 120 --out", "pretrain.py --task mim --seed 1",
                                 "--adversarial 16/255", "--keep-visible", "--sigma uniform:0,30"))
        self.assertEqual(len(self.commands(refused)), 2 * (4 + 9))
        refused = run("studies.compare", "color", "--data", photos(), "--at", self.folder)
        assert_refused(refused, (f"--data {photos()}", "--adversarial 4/255", "--sigma uniform:50,150"))
        self.assertEqual(len(self.commands(refused)), 2 + 7)

    def test_folders_with_spaces(self):
        """The commands can be pasted into a shell."""
        commands = tables.missing_commands(SMALL, SMALL.entries, Path("my runs"), [0], "my photos")
        for words in map(shlex.split, commands):
            self.assertIn(str(Path("my runs") / words[-1].split("/")[-1]), words)
            if words[1] == "pretrain.py":
                self.assertIn("my photos", words)

    def test_run_put_in_front_is_needed(self):
        """Also where no classifier of the table starts from it."""
        entry = tables.Entry("shelf", "clean", "--mode clean", defenses=("de3:20",), in_front="mim")
        commands = tables.missing_commands(SMALL, [entry], Path("runs"), [0], "digits")
        self.assertIn("python pretrain.py --task mim --out runs/mim", commands)

    def test_table(self):
        """Every reading of every cell, in the file and on the screen; the second time from the file."""
        self.runs()
        result = finished(self.compare())
        rows = read_csv(self.folder / "compare.csv")
        self.assertEqual([(row["defense"], row["level"]) for row in rows], CELLS)
        for row in rows:
            for name in ("clean", "gray_box", "no_eot", "one_shot", "ten_tries", "l2", "l2_twice"):
                self.assertTrue(0 <= float(row[name]) <= 100, (name, row))
            self.assertLessEqual(float(row["ten_tries"]), float(row["one_shot"]))
            self.assertEqual(row["noise_known"] == "", row["level"] == "mask 0.5")
            made = {"De³": "de3", "MIM": "de3_mim"}.get(row["defense"], "clean")
            self.assertEqual(row["run"], (self.folder / made).as_posix())
            self.assertEqual((row["data"], row["commit"], row["images"]),
                             (str(photos()), run_module.commit(), "6"))
            self.assertRegex(result.out, rf"\n{row['defense']} +{row['level']} +{row['clean'][:-1]} ")
        with mock.patch.object(compare, "measure", side_effect=AssertionError):
            again = finished(self.compare())
        self.assertEqual(again.out.partition("\n6 test")[2], result.out.partition("\n6 test")[2])
        self.assertEqual(read_csv(self.folder / "compare.csv"), rows)

    def test_means_over_seeds(self):
        """Mean and standard deviation, of each defense at each level."""
        shutil.copytree(self.runs(), self.folder / "seed1")
        assert_refused(self.compare("--only", "undefended", "--seeds", 0, 1),
                       "seed1/clean was trained with seed 0")
        checkpoint = torch.load(self.folder / "seed1/clean/checkpoint.pt")
        checkpoint["settings"]["seed"] = 1
        torch.save(checkpoint, self.folder / "seed1/clean/checkpoint.pt")
        (self.folder / "compare.csv").unlink()
        figures = [dict(clean=90 + seed, no_eot=50 + 2 * seed, one_shot=40 + 2 * seed)
                   for seed in (0, 1)]
        with mock.patch.object(compare, "measure", side_effect=figures):
            result = finished(self.compare("--only", "undefended", "--seeds", 0, 1))
        heading, row = [re.split("  +", line.strip()) for line in result.out.splitlines()
                        if line.strip().startswith(("level", "undefended "))]
        found = dict(zip(heading, row[1:]))
        self.assertEqual((row[0], found["level"]), ("undefended", "off"))
        names = ("clean", "worst", "no eot", "one shot", "gray box", "l2")
        self.assertEqual([found[name] for name in names],
                         ["90.5 ± 0.7", "41.0 ± 1.4", "51.0 ± 1.4", "41.0 ± 1.4", "-", "-"])

    def test_other_recipe(self):
        """A run that the table's flags did not make is named, with those that made it."""
        shutil.copytree(self.runs() / "de3", self.folder / "clean", dirs_exist_ok=True)
        with mock.patch.object(compare, "measure", return_value=dict.fromkeys(compare.MEASURED, 50.0)):
            result = finished(self.compare("--only", "undefended"))
        self.assertRegex(result.out, "note: .*clean was made by: python finetune.py .*--sigma uniform:0,30"
                                     ".*, and the table says: python finetune.py --mode clean\n")
        same = "python finetune.py --bf16 --sigma uniform:0,30 --seed 3 --out runs/x --workers 2"
        self.assertEqual(tables.flags_of(same), tables.flags_of("--sigma uniform:0,30"))
        self.assertNotEqual(tables.flags_of(same + " --epochs 2"), tables.flags_of(same))

    def test_other_data(self):
        """Said of every run that was trained on other data, not of the first alone."""
        path = self.runs() / "de3" / "checkpoint.pt"
        checkpoint = torch.load(path)
        checkpoint["data"]["name"] = "elsewhere"
        torch.save(checkpoint, path)
        with mock.patch.object(compare, "measure", return_value=dict.fromkeys(compare.MEASURED, 50.0)):
            result = finished(self.compare("--only", "undefended", "De³"))
        self.assertRegex(result.out, "note: .*de3 was trained on elsewhere and is tested on")

    def test_cut_short(self):
        """What was measured before is kept, and the rest is measured."""
        self.runs()
        figures = dict.fromkeys(compare.MEASURED, 50.0)
        with mock.patch.object(compare, "measure", side_effect=[figures, figures, KeyboardInterrupt]):
            self.assertEqual(self.compare().code, 130)
        self.assertEqual(self.measured(), ["σ = 40", "mask 0.5", "σ = 20"])
        self.assertEqual(len(read_csv(self.folder / "compare.csv")), 5)

    def edit(self, name, part=()):
        """Change one weight of a run, or of the autoencoder in it."""
        path = self.folder / name / "checkpoint.pt"
        checkpoint = changed = torch.load(path)
        for key in part:
            changed = changed[key]
        changed["model"]["cls_token"] += 1
        torch.save(checkpoint, path)

    def test_other_weights(self):
        """Those of the classifier, of the autoencoder alone, and of the one put in front of it."""
        self.runs()
        everything = ["off", "σ = 0", "σ = 40", "mask 0.5", "σ = 20"]
        self.assertEqual(self.measured(), everything)
        self.assertEqual(self.measured(), [])
        for name, part, again in [("de3", ("autoencoder",), ["σ = 0", "σ = 40"]),
                                  ("de3_mim", (), ["mask 0.5"]),
                                  ("nim", (), ["σ = 20"]), ("clean", (), ["off", "σ = 20"])]:
            with self.subTest(name, part=part):
                self.edit(name, part)
                self.assertEqual(self.measured(), again)
                self.assertEqual(self.measured(), [])

    def test_other_code(self):
        """An edited file that decides a cell, though no weight changed; also of a class by itself."""
        self.runs()
        self.measured()
        with mock.patch.object(run_module, "digests", lambda files: dict.fromkeys(files, "edited")):
            self.assertEqual(len(self.measured()), 5)
            self.assertEqual(len(self.measured()), 0)
        self.assertEqual(len(self.measured()), 0)

    def test_other_images(self):
        """The pixels count, not the folder's name."""
        self.runs()
        self.measured()
        other = copy_of_photos()
        self.assertEqual(len(self.measured(dataset=other)), 0)
        path = other / "val" / "red" / "0.png"
        with Image.open(path) as image:
            image.putpixel((3, 4), (1, 2, 3))
            image.save(path)
        self.assertEqual(len(self.measured(dataset=other)), 5)
        self.assertEqual(len(self.measured(dataset=other)), 0)
        self.assertEqual(len(self.measured()), 0)

    def test_other_settings(self):
        self.runs()
        one = ("--only", "undefended")
        self.measured(*one)
        for flags in (["--eps", "8/255"], ["--l2", 2], ["--steps", 2], ["--eot", 3], ["--images", 7],
                      ["--every", 2], ["--seed", 1], ["--bf16"], ["--split", "train"]):
            with self.subTest(flags):
                self.assertEqual(len(self.measured(*one, *flags)), 1)
                self.assertEqual(len(self.measured(*one, *flags)), 0)

    def test_table_of_an_earlier_layout(self):
        """A row that lacks a column says nothing of it: measured anew, and the old row is kept."""
        self.runs()
        self.measured()
        path = self.folder / "compare.csv"
        rows = [{name: row[name] for name in row if name != "code"} for row in read_csv(path)]
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        self.assertEqual(len(self.measured()), 5)
        self.assertEqual([row["code"] == "" for row in read_csv(path)], [True] * 5 + [False] * 5)

    def test_refuses(self):
        path = self.runs() / "compare.csv"
        for content, words in (("a;b\n1;2\n", "separated by commas"),
                               ("defense,clean\nDe³,much\n", "could not convert string to float")):
            path.write_text(content)
            assert_refused(self.compare(), ("compare.csv is not a table", words))
            self.assertEqual(path.read_text(), content)
        for flags in (["--seeds", -1], ["--eps", 8], ["--only"], ["--norm", "l2"]):
            assert_refused(self.compare(*flags), flags[0])
        assert_refused(run("studies.compare", "much"), "much")


class TestReadings(unittest.TestCase):
    def readings(self, model):
        """What `measure` finds for a defense of the linear classifier, on 40 digits."""
        _, (images, labels) = linear_on_digits()
        batches = [(images[:20], labels[:20]), (images[20:40], labels[20:40])]
        return compare.measure(model, batches, eps=0.05, l2=0.5, steps=5, eot=4, seed=0)

    def test_readings(self):
        """Stricter readings are lower; where nothing is random they are one."""
        model, _ = linear_on_digits()
        found = self.readings(NoiseOnly(None, model, 100))
        self.assertLess(found["ten_tries"], found["one_shot"])
        self.assertLess(found["clean_ten_tries"], found["clean"])
        self.assertLess(found["one_shot"], found["clean"] - 10)
        self.assertLess(found["noise_known"], found["one_shot"] + 5)
        self.assertLess(found["one_shot"], found["no_eot"] + 5)
        self.assertLess(found["one_shot"], found["gray_box"] + 5)
        self.assertLess(found["l2"], found["clean"])
        self.assertLess(found["l2_twice"], found["l2"])
        for defense in (model, NoiseOnly(None, model, 0)):
            found = self.readings(defense)
            robust = {found[name] for name in ("no_eot", "one_shot", "ten_tries", "noise_known")}
            clean = {found[name] for name in ("clean", "clean_ten_tries", "clean_noise_known")}
            self.assertEqual((len(robust), len(clean)), (1, 1))
            self.assertLess(*robust, *clean)

    def test_gray_box(self):
        """PGD on the classifier alone, scored through the defense; without a defense it is white-box."""
        model, (images, labels) = linear_on_digits()
        defense = De3(small_autoencoder(image_size=32).eval(), model, 20)
        with mock.patch.object(compare, "pgd", wraps=compare.pgd) as attacks:
            found = compare.measure(defense, [(images[:8], labels[:8])], 0.05, 0, 2, 2, 0)
        gray = [call for call in attacks.call_args_list if call.args[0] is model]
        self.assertEqual(len(gray), 1)
        self.assertEqual(gray[0].kwargs.get("eot", 1), 1)
        self.assertEqual({"gray_box", "one_shot"} & found.keys(), {"gray_box", "one_shot"})
        self.assertNotIn("l2", found)
        found = self.readings(model)
        self.assertEqual(found["gray_box"], found["one_shot"])

    def test_fewer_images_for_many_draws(self):
        """Of a random defense, all but clean and gray-box; of a deterministic one nothing."""
        model, (images, labels) = linear_on_digits()
        for sigma, expected in ((20, 3), (0, 9)):
            defense = De3(small_autoencoder(image_size=32).eval(), model, sigma)
            with mock.patch.object(compare, "pgd", wraps=compare.pgd) as attacks:
                compare.measure(defense, [(images[:9], labels[:9])], 0.05, 1, 2, 2, 0, every=3)
            seen = {call.args[0] is model: set() for call in attacks.call_args_list}
            for call in attacks.call_args_list:
                seen[call.args[0] is model].add(len(call.args[1]))
            self.assertEqual(seen, {True: {9}, False: {expected}})

    def test_known_noise_has_to_be_the_noise(self):
        """A defense whose edited noise ignores what it is given gets no figure for known noise."""
        model, (images, labels) = linear_on_digits()

        def own_noise(x, sigma, noise=None):
            return x + 0.1 * torch.rand_like(x)
        with mock.patch("model.add_noise", own_noise), contextlib.redirect_stdout(io.StringIO()) as printed:
            found = compare.measure(NoiseOnly(None, model, 100), [(images[:5], labels[:5])], 0.05, 0, 2, 2, 0)
        self.assertNotIn("noise_known", found)
        self.assertIn("one_shot", found)
        self.assertIn("noise known is left out", printed.getvalue())

    def test_known_noise_is_the_same_for_all_images(self):
        """And the attacker's: each of three noises is drawn once, fixed, and attacked without EOT."""
        model, (images, labels) = linear_on_digits()
        defense = NoiseOnly(None, model, 100)
        with mock.patch.object(compare, "pgd", wraps=compare.pgd) as attacks:
            compare.with_known_noise(defense, images[:5], labels[:5], 0.05, 4)
        noises = [call.args[0].noise for call in attacks.call_args_list]
        self.assertEqual([noise.shape for noise in noises], [images[0].shape] * compare.KNOWN_NOISES)
        self.assertFalse(torch.equal(noises[0], noises[1]))
        for call in attacks.call_args_list:
            self.assertFalse(call.args[0].is_random)
            self.assertEqual((call.args[4], call.kwargs.get("eot", 1)), (8, 1))
        self.assertIsNone(defense.noise)  # the defense itself stays random


def attack_row(words="De³ σ = 50", attack="pgd+eot", robust="40", **changes):
    """A row of attack.csv."""
    level = words[words.index("σ"):] if "σ" in words else "mask 0.5" if "mask" in words else "off"
    row = dict(defense=words, run="runs/de3", level=level, attack=attack, norm="linf", eps="0.0627451",
               steps="20", step_size="0.00784314", restarts="1", eot="8" if "eot" in attack else "1",
               loss="ce", threat="white", reading="one shot", draws="5", data="digits", split="test",
               images="80", pixels="abc", seed="0", precision="fp32", clean_accuracy="90.0",
               robust_accuracy=robust, seconds="1.0", weights="w", code="c", commit="d8e")
    return {**row, **changes}


ATTACKED = [attack_row("undefended", "fgsm", "60", step_size="0.06"),
            attack_row("undefended", "pgd", "20"),
            attack_row("De³ σ = 0", "pgd", "30"), attack_row("De³ σ = 50", "pgd", "50"), attack_row()]
POINTS = {"undefended": {"off": [(90, 20)]}, "De³": {"σ = 0": [(90, 30)], "σ = 50": [(90, 40)]}}


def compared_row(words="De³", level="σ = 50", seed="0", one_shot="40", **changes):
    """A row of compare.csv."""
    row = dict(defense=words, level=level, seed=seed, run="runs/de3", data="digits", split="test",
               images="100", pixels="abc", norm="linf", eps="0.0627451", l2_radius="1", steps="20",
               eot="8", attack_seed="0", precision="fp32", weights="w" + seed, code="c", commit="d8e",
               clean="90.0", gray_box="80", no_eot="50", one_shot=one_shot, ten_tries="20",
               noise_known="30")
    return {**row, **changes}


class TestPlot(unittest.TestCase):
    def choose(self, rows, attack=None, eps=None, threat=None):
        """(the points of the rows that are drawn, the title, what is printed of those left out)."""
        args = argparse.Namespace(attack=attack, eps=eps, threat=threat, against_clean=False,
                                  ladder=False)
        with contextlib.redirect_stdout(io.StringIO()) as out, \
                mock.patch.object(plot.run, "digest_of_files", return_value="c"):
            chosen = plot.choose_rows(copy.deepcopy(rows), args)
        return plot.points_of(chosen, ("one_shot",)), plot.title_of(chosen, args), out.getvalue()

    def test_code_of_today(self):
        """Rows of today's code are drawn, also where a later row has another; else it is said."""
        rows = [compared_row(code=code) for code in ("c", "old")]
        _, _, printed = self.choose(rows)
        self.assertIn("whose code is not c", printed)
        _, _, printed = self.choose(rows[1:])
        self.assertIn("no row was measured by the code of today", printed)

    def test_levels_that_are_no_sigma(self):
        """Each is a line of its own; a level between two others is no spread over seeds."""
        rows = [attack_row("JPEG quality 10", robust="10", level="quality 10"),
                attack_row("JPEG quality 90", robust="20", level="quality 90"),
                attack_row("De³ σ = uniform:0,50", robust="30", level="σ = uniform:0,50")]
        points, _, _ = self.choose(rows)
        self.assertEqual({name: levels["off"] for name, levels in points.items()},
                         {"JPEG, quality 10": [(90, 10)], "JPEG, quality 90": [(90, 20)],
                          "De³, σ = uniform:0,50": [(90, 30)]})

    def test_trained_anew(self):
        """Of a run that was trained anew only the rows of its last weights are drawn."""
        rows = [attack_row("De³ σ = 0", robust="10", weights="old"),
                attack_row("De³ σ = 50", robust="20", weights="new")]
        points, _, printed = self.choose(rows)
        self.assertEqual(points, {"De³": {"σ = 50": [(90, 20)]}})
        self.assertIn("trained anew", printed)

    def test_one_attack(self):
        """With EOT where nothing else is honest; one curve over sigma; FGSM is another attack."""
        points, title, printed = self.choose(ATTACKED)
        self.assertEqual(points, POINTS)
        self.assertEqual(title, "80 test images, PGD-20, EOT 8, 16/255, one seed")
        self.assertRegex(printed, "left out: 1 rows whose step_size is not 0.00784314\n")
        self.assertRegex(printed, "left out: 1 rows .*without EOT beside one with it\n")
        points, title, _ = self.choose(ATTACKED, attack="fgsm")
        self.assertEqual(points, {"undefended": {"off": [(90, 60)]}})
        self.assertIn("FGSM", title)

    def test_other_rows_are_left_out(self):
        """Whatever makes them another attack, other images, or other code: one by one, and counted."""
        for name, value in [
                ("threat", "gray"), ("step_size", "0.001"), ("seed", "1"), ("code", "other"),
                ("eps", "0.0313725"), ("norm", "l2"), ("steps", "100"), ("loss", "ce+margin"),
                ("restarts", "3"), ("pixels", "other"), ("images", "20"), ("data", "cifar10"),
                ("split", "val"), ("precision", "bf16"), ("attack", "fgsm")]:
            with self.subTest(name):
                others = [{**row, name: value, "robust_accuracy": "77", "clean_accuracy": "77"}
                          for row in ATTACKED[1:]]
                points, _, printed = self.choose(others + ATTACKED)
                self.assertEqual(points, POINTS)
                number = dict(seed=3, step_size=5).get(name, 4)  # 3: without EOT no more; 5: FGSM, too
                self.assertRegex(printed, rf"left out: {number} rows .*{name}")
                expected = {defense: {level: [(77, 77)] for level in levels}
                            for defense, levels in POINTS.items()}
                if name == "code":  # that of today is drawn, wherever it stands
                    expected = POINTS
                self.assertEqual(self.choose(ATTACKED + others)[0], expected)

    def test_chosen_by_flags(self):
        """--attack, --eps and --threat; the attack's name is that of its rows with EOT, too."""
        gray = [{**row, "threat": "gray", "robust_accuracy": "77"} for row in ATTACKED]
        weak = [{**row, "eps": "0.0313725", "robust_accuracy": "88"} for row in ATTACKED]
        rows = gray + weak + ATTACKED
        self.assertEqual(self.choose(rows, threat="gray")[0]["De³"]["σ = 50"], [(90, 77)])
        self.assertIn("gray-box PGD", self.choose(rows, threat="gray")[1])
        points, title, _ = self.choose(rows, eps=8 / 255)
        self.assertEqual(points["undefended"]["off"], [(90, 88)])
        self.assertIn("8/255", title)
        for name in ("pgd", "pgd+eot"):
            self.assertEqual(self.choose(rows, attack=name)[0], POINTS)
        with self.assertRaisesRegex(ValueError, "no row of that attack"):
            self.choose(rows, eps=0.5)

    def test_measured_again(self):
        """The latest row of each defense counts; masking has no sigma."""
        again = attack_row(robust="44", weights="other")
        mim = attack_row("MIM mask 0.5", robust="1")
        points, _, printed = self.choose([*ATTACKED, mim, again])
        self.assertEqual(points["De³"]["σ = 50"], [(90, 44)])
        self.assertIn("left out: 1 rows of masking", printed)

    def test_two_runs_of_one_name(self):
        """A curve for each run, whichever call put the run into the name."""
        other = [attack_row("De³ σ = 0", run="runs/bad", robust="1"),
                 attack_row("De³ σ = 50 (runs/bad)", run="runs/bad", robust="2", level="σ = 50")]
        points, _, _ = self.choose([*ATTACKED, *other])
        self.assertEqual(points, {
            "undefended": {"off": [(90, 20)]}, "De³ (runs/de3)": {"σ = 0": [(90, 30)], "σ = 50": [(90, 40)]},
            "De³ (runs/bad)": {"σ = 0": [(90, 1)], "σ = 50": [(90, 2)]}})
        self.assertEqual(plot.names_to_draw(points), ["undefended", "De³ (runs/de3)", "De³ (runs/bad)"])

    def test_comparison(self):
        """One point for each seed; the three readings, or one of them."""
        rows = [compared_row(seed=seed, one_shot=value) for seed, value in (("0", "40"), ("1", "50"))]
        points, title, printed = self.choose(rows)
        self.assertEqual(points, {"De³": {"σ = 50": [(90, 40), (90, 50)]}})
        self.assertEqual(title, "100 test images, PGD-20, EOT 8, 16/255, mean ± deviation of 2 seeds")
        self.assertEqual(printed, "")
        self.assertEqual(plot.points_of(rows, plot.READINGS), {"De³": {"σ = 50": [(90, 20), (90, 20)]}})
        without = [compared_row(ten_tries="", noise_known="")]
        self.assertEqual(plot.points_of(without, plot.READINGS), {"De³": {"σ = 50": [(90, 40)]}})

    def test_comparison_measured_again(self):
        """Other code, weights, images or settings: the latest alone, no mean with the earlier ones."""
        for name, value in [("code", "other"), ("weights", "other"), ("eot", "32"), ("attack_seed", "1"),
                            ("pixels", "other"), ("l2_radius", "2"), ("steps", "40"), ("eps", "0.03")]:
            with self.subTest(name):
                old = [compared_row(seed=seed, one_shot="7", **{name: value}) for seed in "01"]
                points, title, printed = self.choose([*old, compared_row(), compared_row(seed="1")])
                self.assertEqual(points, {"De³": {"σ = 50": [(90, 40), (90, 40)]}})
                self.assertIn("EOT 8", title)
                self.assertIn("left out: 2 rows", printed)

    def test_seeds(self):
        """Of the attack in attack.csv, of the training in compare.csv."""
        rows = [{**row, "seed": seed, "robust_accuracy": robust}
                for seed, robust in (("0", "10"), ("1", "20")) for row in ATTACKED[1:]]
        points, title, printed = self.choose(rows)
        self.assertEqual(points["De³"], {"σ = 0": [(90, 20)], "σ = 50": [(90, 20)]})
        self.assertIn("one seed", title)
        self.assertIn("another seed of the attack than 1", printed)

    def save(self, rows):
        """The rows as a table; its path."""
        path = new_folder() / "table.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        return path

    def test_order_of_levels(self):
        """By sigma, not as they stand in the table, or as text."""
        self.assertEqual(sorted(["σ = 100", "σ = 50", "off", "σ = 0"], key=plot.sigma_of),
                         ["off", "σ = 0", "σ = 50", "σ = 100"])

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "matplotlib is not installed")
    def test_script(self):
        compared = [compared_row(name, level, seed, seed + "5") for seed in "12" for name, level in
                    (("undefended", "off"), ("De³", "σ = 0"), ("De³", "σ = 100"))]
        for rows in (ATTACKED, compared):
            path = self.save(rows)
            finished(run("studies.plot", "--table", path))
            assert_picture(path.with_name("tradeoff.png"))
        finished(run("studies.plot", "--table", path, "--out", path.with_name("other.png")))
        assert_picture(path.with_name("other.png"))
        finished(run("studies.plot", "--table", path, "--against-clean"))
        assert_picture(path.with_name("tradeoff.png"))
        refused = run("studies.plot", "--table", self.save(ATTACKED), "--against-clean")
        assert_refused(refused, "give it a compare.csv")
        assert_refused(run("studies.plot", "--table", self.save(ATTACKED[:2])), "fewer than two sigmas")

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "matplotlib is not installed")
    def test_ladder(self):
        """A curve for each level; those beyond the six that can be told apart, and other rows, are named."""
        rows = [compared_row("De³", f"σ = {sigma}", gray_box="60", no_eot="50") for sigma in range(7)]
        rows.append(compared_row("De³ off the shelf", "σ = 0", gray_box="60", no_eot="50"))
        rows.append(compared_row("undefended", "off", gray_box="0", no_eot="0"))
        path = self.save(rows)
        result = finished(run("studies.plot", "--table", path, "--ladder"))
        assert_picture(path.with_name("tradeoff.png"))
        self.assertIn("left out: De³, σ = 6, of more than 6 curves", result.out)
        self.assertIn("left out: De³ off the shelf, ", result.out)
        self.assertIn("left out: undefended, which keeps under 5% in gray-box", result.out)

    def test_refuses(self):
        folder = new_folder()
        assert_refused(run("studies.plot", "--table", folder / "none.csv"), "none.csv")
        assert_refused(run("studies.plot", "--table", self.save([{"a": 1, "b": 2}])), "is no table of")
        no_number = [{**row, "robust_accuracy": "much"} for row in ATTACKED]
        assert_refused(run("studies.plot", "--table", self.save(no_number)), "is damaged")
        binary = folder / "binary.csv"
        binary.write_bytes(b"\xff\xfe\0")
        assert_refused(run("studies.plot", "--table", binary), "binary.csv")
        with mock.patch.dict(sys.modules, {"matplotlib.figure": None}):
            assert_refused(run("studies.plot", "--table", self.save(ATTACKED)), "pip install")


if __name__ == "__main__":
    unittest.main()
