"""The comparison of all defenses: what is missing, the readings, what is measured again; the plot."""

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
                           new_folder, photo_classifier, photos, read_csv, run, small_autoencoder, training)

SMALL = tables.Table({"nim": "pretrain.py --sigma 75", "mim": "pretrain.py --task mim"}, [
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
        assert_refused(refused, ("python pretrain.py --sigma 120 --out", "pretrain.py --task mim --seed 1",
                                 "--adversarial 16/255", "--mode mim-visible", "--sigma uniform:0,30"))
        self.assertEqual(len(self.commands(refused)), 2 * self.runs_of("digits"))
        refused = run("studies.compare", "color", "--data", photos(), "--at", self.folder)
        assert_refused(refused, (f"--data {photos()}", "--adversarial 4/255", "--sigma uniform:50,150"))
        self.assertEqual(len(self.commands(refused)), self.runs_of("color"))

    def runs_of(self, name):
        """How many runs a table needs, of both stages."""
        entries = tables.TABLES[name].entries
        pretrained = {entry.autoencoder for entry in entries}
        pretrained |= {entry.in_front for entry in entries if entry.in_front}
        return len(pretrained) + len({entry.run for entry in entries})

    def test_folders_with_spaces(self):
        """The commands can be pasted into a shell."""
        commands = tables.missing_commands(SMALL, SMALL.entries, Path("my runs"), [0], "my photos")
        for words in map(shlex.split, commands):
            self.assertIn(str(Path("my runs") / words[-1].split("/")[-1]), words)
            if words[1] == "pretrain.py":
                self.assertIn("my photos", words)
        started = tables.Entry("De³", "de3", "--init @/nim --sigma 50", "mim")
        command = tables.missing_commands(SMALL, [started], Path("my runs"), [0], "my photos")[-1]
        self.assertIn("my runs/nim", shlex.split(command))

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
            clean = f"{float(row['clean']):.1f}"
            self.assertRegex(result.out, rf"\n{row['defense']} +{row['level']} +{clean} ")
        with mock.patch.object(compare, "measure", side_effect=AssertionError):
                again = finished(self.compare())
        tables_printed = [out.partition("\n6 val images")[2] for out in (again.out, result.out)]
        self.assertIn("De³", tables_printed[0])
        self.assertEqual(*tables_printed)
        self.assertEqual(read_csv(self.folder / "compare.csv"), rows)

    def test_means_over_seeds(self):
        """Mean and standard deviation, of each defense at each level."""
        shutil.copytree(self.runs(), self.folder / "seed1")
        assert_refused(self.compare("--only", "undefended", "--seeds", 0, 1),
                       "seed1/clean was trained with seed 0")
        checkpoint = torch.load(self.folder / "seed1/clean/checkpoint.pt")
        checkpoint["settings"]["seed"] = 1
        torch.save(checkpoint, self.folder / "seed1/clean/checkpoint.pt")
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
        self.assertRegex(result.out, "note: .*clean was made by: .*--sigma uniform:0,30"
                                     ".*, and the table says: finetune.py --mode clean\n")
        same = "python finetune.py --bf16 --sigma uniform:0,30 --seed 3 --out runs/x --init a/nim --workers 2"
        decides = tables.what_decides
        self.assertEqual(decides(same), decides("finetune.py --init @/nim --sigma uniform:0,30"))
        for other in (same + " --epochs 2", same.replace("finetune", "pretrain"), same.replace("nim", "mim")):
            self.assertNotEqual(decides(other), decides(same))

    def test_other_start(self):
        """So is one that started from the classifier of a De³ where the table says its autoencoder."""
        folder = self.runs()
        path, of_de3 = folder / "clean" / "checkpoint.pt", torch.load(folder / "de3" / "checkpoint.pt")
        checkpoint = torch.load(path)
        checkpoint["started_from"] = dict(kind="classifier", settings=dict(seed=0), made_by=of_de3["made_by"])
        torch.save(checkpoint, path)
        with mock.patch.object(compare, "measure", return_value=dict.fromkeys(compare.MEASURED, 50.0)):
            result = finished(self.compare("--only", "undefended"))
        self.assertRegex(result.out, "note: what .*clean started from was made by: .*finetune.py"
                                     ".*, and the table says: pretrain.py --sigma 75\n")
        checkpoint["started_from"]["settings"] = dict(seed=1)
        torch.save(checkpoint, path)
        with mock.patch.object(compare, "measure", return_value=dict.fromkeys(compare.MEASURED, 50.0)):
            result = finished(self.compare("--only", "undefended"))
        self.assertRegex(result.out, "note: what .*clean started from was trained with seed 1, and .*clean with 0\n")
        self.assertEqual(result.out.count(" was made by: "), 2)  # the run itself, and its start

    def test_other_data(self):
        """Said of every run that was trained on other data, not of the first alone."""
        path = self.runs() / "de3" / "checkpoint.pt"
        checkpoint = torch.load(path)
        checkpoint["data"]["name"] = "elsewhere"
        torch.save(checkpoint, path)
        with mock.patch.object(compare, "measure", return_value=dict.fromkeys(compare.MEASURED, 50.0)):
            result = finished(self.compare("--only", "undefended", "De³"))
        self.assertRegex(result.out, "note: .*de3 was trained on elsewhere and is tested on")

    def test_levels_that_read_alike(self):
        """Are no seeds of one defense: refused."""
        self.runs()
        _, de3, *_ = SMALL.entries
        entries = [de3._replace(defenses=("de3:40", "no-denoise:40"))]
        with mock.patch.dict(tables.TABLES, small=SMALL._replace(entries=entries)):
            assert_refused(self.compare(), ("two levels of De³ read alike", "σ = 40, σ = 40"))

    def test_renamed_line(self):
        """What was measured under another name gets a row under this one, once."""
        self.runs()
        self.measured("--only", "undefended")
        entries = [SMALL.entries[0]._replace(name="no defense")]
        with mock.patch.dict(tables.TABLES, small=SMALL._replace(entries=entries)):
            for _ in range(2):
                self.assertEqual(self.measured(), [])
        rows = read_csv(self.folder / "compare.csv")
        self.assertEqual([row["defense"] for row in rows], ["undefended", "no defense"])

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
        """An edited file that decides a cell, though no weight changed; and back."""
        self.runs()
        self.measured()
        digest_of_file = run_module.digest_of_file
        for name in ("attack.py", "studies/compare.py", "studies/certify.py", "support/report.py"):
            def digest(file, name=name):
                return "edited" if file == name else digest_of_file(file)
            with self.subTest(name), mock.patch.object(run_module, "digest_of_file", digest):
                self.assertEqual(len(self.measured()), 0 if name == "support/report.py" else 5)
                self.assertEqual(len(self.measured()), 0)
        self.assertEqual(len(self.measured()), 0)

    def test_other_images(self):
        """The pixels count, not the folder's name."""
        self.runs()
        self.measured()
        other = copy_of_photos()
        self.assertEqual(len(self.measured(dataset=other)), 0)
        for path in other.glob("val/red/*.png"):
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
        """With other columns: nothing in it is taken for measured, it is left as it is, and nothing is measured."""
        self.runs()
        self.measured()
        path = self.folder / "compare.csv"
        rows = [{name: row[name] for name in row if name != "code"} for row in read_csv(path)]
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        with mock.patch.object(compare, "measure", side_effect=AssertionError("measured")):
            refused = self.compare()
        assert_refused(refused, ("compare.csv is a table with other columns", "move it away"))
        self.assertEqual(read_csv(path), rows)

    def test_refuses(self):
        self.runs()
        for flags, words in (
                (["--seeds", "x"], "--seeds"), (["--eps", 8], "at most 1 (write 8/255)"),
                (["--only"], "--only"), (["--norm", "l2"], "--norm"), (["--images", 0], "--images")):
            assert_refused(self.compare(*flags), words)
        assert_refused(run("studies.compare", "much"), "much")


class HoldsNoise(NoiseOnly):
    """Its noise is a buffer, so that it moves with the model to a device."""

    def __init__(self, autoencoder, classifier, sigma, noise=None, **settings):
        super().__init__(autoencoder, classifier, sigma, None, **settings)
        del self.noise
        self.register_buffer("noise", noise)


class TestReadings(unittest.TestCase):
    def readings(self, model):
        """What `measure` finds for a defense of the linear classifier, on 40 digits."""
        _, (images, labels) = linear_on_digits()
        return compare.measure(model, images[:40], labels[:40], eps=0.05, l2=0.5, steps=5, eot=4, seed=0,
                               batch=20)

    def test_noise_in_a_buffer(self):
        """It is given to a copy: the readings are those of a plain attribute, and the defense stays as it was."""
        model, _ = linear_on_digits()
        defense = HoldsNoise(None, model, 100)
        self.assertEqual(self.readings(defense), self.readings(NoiseOnly(None, model, 100)))
        self.assertIsNone(defense.noise)

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
            found = compare.measure(defense, images[:8], labels[:8], 0.05, 0, 2, 2, 0, batch=8)
        gray = [call for call in attacks.call_args_list if call.args[0] is model]
        self.assertEqual(len(gray), 1)
        self.assertEqual(gray[0].kwargs.get("eot", 1), 1)
        random = NoiseOnly(None, model, 20)  # as a classifier that is random by itself
        with mock.patch.object(compare, "pgd", wraps=compare.pgd) as attacks:
            compare.measure(NoiseOnly(None, random, 0), images[:8], labels[:8], 0.05, 0, 2, 3, 0, batch=8)
        gray = [call for call in attacks.call_args_list if call.args[0] is random]
        self.assertEqual([call.kwargs["eot"] for call in gray], [3])
        self.assertEqual({"gray_box", "one_shot"} & found.keys(), {"gray_box", "one_shot"})
        self.assertNotIn("l2", found)
        found = self.readings(model)
        self.assertEqual(found["gray_box"], found["one_shot"])

    def test_fewer_images_for_many_draws(self):
        """Of a random defense, all but clean and gray-box; of a deterministic one nothing."""
        model, (images, labels) = linear_on_digits()
        for sigma, expected in ((20, 3), (0, 9)):
            defense = De3(small_autoencoder(image_size=32).eval(), model, sigma)
            with mock.patch.object(compare, "pgd", wraps=compare.pgd) as attacks, \
                    mock.patch.object(compare, "strong_pgd", wraps=compare.strong_pgd) as strong_attacks:
                compare.measure(defense, images[:9], labels[:9], 0.05, 1, 5, 2, 0, batch=9, every=3)
            self.assertEqual(len(strong_attacks.call_args_list), 3)  # known noises; or L∞, and twice L2
            calls = attacks.call_args_list + strong_attacks.call_args_list
            seen = {call.args[0] is model: set() for call in calls}
            for call in calls:
                seen[call.args[0] is model].add(len(call.args[1]))
            self.assertEqual(seen, {True: {9}, False: {expected}})

    def test_known_noise_has_to_be_the_noise(self):
        """A defense whose edited noise ignores what it is given gets no figure for known noise."""
        model, (images, labels) = linear_on_digits()

        def own_noise(x, sigma, noise=None):
            return x + 0.1 * torch.rand_like(x)
        with mock.patch("model.add_noise", own_noise), \
                contextlib.redirect_stdout(io.StringIO()) as printed:
            found = compare.measure(NoiseOnly(None, model, 100), images[:5], labels[:5], 0.05, 0, steps=2,
                                    eot=2, seed=0, batch=5)
        self.assertNotIn("noise_known", found)
        self.assertIn("one_shot", found)
        self.assertIn("noise known is left out", printed.getvalue())

    def test_known_noise_of_rounds(self):
        """A defense that adds noise again in a second round is another one than that of a given noise."""
        model, (images, _) = linear_on_digits()

        class Twice(NoiseOnly):
            def purify(self, x):
                return super().purify(super().purify(x))
        few = images[:3]
        self.assertTrue(compare.takes_known_noise(NoiseOnly(None, model, 100), few))
        self.assertFalse(compare.takes_known_noise(Twice(None, model, 100), few))
        self.assertFalse(compare.takes_known_noise(NoiseOnly(None, model, "uniform:0,100"), few))
        self.assertFalse(compare.takes_known_noise(model, few))

    def test_known_noise_is_the_same_for_all_images(self):
        """And the attacker's: each of three noises is drawn once, fixed, and attacked without EOT."""
        model, (images, labels) = linear_on_digits()
        defense = NoiseOnly(None, model, 100)
        with mock.patch.object(compare, "strong_pgd", wraps=compare.strong_pgd) as attacks:
            compare.measure(defense, images[:6], labels[:6], 0.05, 0, steps=4, eot=2, seed=0, batch=3)
        attacks = attacks.call_args_list
        noises = [call.args[0].noise for call in attacks]  # two batches each
        self.assertEqual([noise.shape for noise in noises], [images[0].shape] * 2 * compare.KNOWN_NOISES)
        self.assertEqual(len({id(noise) for noise in noises}), compare.KNOWN_NOISES)
        self.assertTrue(torch.equal(noises[0], noises[1]))
        self.assertFalse(torch.equal(noises[0], noises[2]))
        for call in attacks:
            self.assertFalse(call.args[0].is_random)
            self.assertEqual((call.kwargs["steps"], call.kwargs.get("eot", 1)), (4, 1))
            self.assertTrue(call.kwargs.get("early_stop", True))
        self.assertIsNone(defense.noise)  # the defense itself stays random

    def test_compiled(self):
        """What torch.compile wraps is measured as it is, and left as it is."""
        model, _ = linear_on_digits()
        defense = NoiseOnly(None, model, 100)
        compiled = torch.compile(defense)
        self.assertEqual(self.readings(compiled), self.readings(defense))
        self.assertTrue(defense.is_random and defense.noise is None)

    def test_bytes_and_batches(self):
        """Images that are kept as bytes, and any size of batches, give the same readings."""
        model, (images, labels) = linear_on_digits()
        as_bytes = (255 * images[:10]).round().to(torch.uint8)
        readings = [compare.measure(model, x, labels[:10], 0.05, 0.5, steps=1, eot=1, seed=0, batch=batch)
                    for x, batch in ((as_bytes, 10), (as_bytes.float() / 255, 10), (as_bytes, 3))]
        self.assertEqual(readings[0], readings[1])
        self.assertEqual(readings[0]["clean"], readings[2]["clean"])


def compared_row(name="De³", level="σ = 50", seed="0", one_shot="40", **changes):
    """A row of compare.csv."""
    value = level.removeprefix("σ = ") if level.startswith("σ") else ""
    row = dict(defense=name, level=level, value=value, seed=seed, run="runs/de3", data="digits", split="test",
               images="100", every="1", pixels="abc", norm="linf", eps="0.0627451", l2_radius="1", steps="20",
               eot="8", attack_seed="0", precision="fp32", weights="w" + seed, code="c", commit="d8e",
               clean="90.0", gray_box="80", no_eot="50", one_shot=one_shot, ten_tries="20",
               noise_known="30", clean_ten_tries="70", clean_noise_known="90")
    return {**row, **changes}


class TestPlot(unittest.TestCase):
    def save(self, rows):
        """The rows as a table; its path."""
        path = new_folder() / "compare.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        return path

    def choose(self, rows):
        """({name: {sigma: one shot of each seed}}, the title, what is printed of those left out)."""
        with contextlib.redirect_stdout(io.StringIO()) as out, \
                mock.patch.object(plot.run, "digest_of_files", return_value="c"):
            chosen = plot.rows_of_one_attack(self.save(copy.deepcopy(rows)))
            found = plot.defenses_to_draw(chosen)
        points = {name: {sigma: [float(row["one_shot"]) for row in of_sigma]
                         for sigma, of_sigma in levels.items()} for name, levels in found.items()}
        return points, plot.title_of(chosen), out.getvalue()

    def test_seeds_and_sigmas(self):
        """One point for each seed, sigma as a number; what has none is a level of its own."""
        rows = [compared_row(seed=seed, one_shot=value) for seed, value in (("0", "40"), ("1", "50"))]
        rows += [compared_row("undefended", "off", "0", "0"), compared_row(level="σ = 100", one_shot="30")]
        points, title, printed = self.choose(rows)
        self.assertEqual(points, {"De³": {50: [40, 50], 100: [30]}, "undefended": {None: [0]}})
        self.assertEqual(title, "100 test images, 16/255, PGD-20, EOT 8 or many runs, mean of 1 to 2 seeds")
        self.assertEqual(printed, "")
        self.assertIn("mean of 2 seeds", self.choose(rows[:2])[1])
        self.assertIn("one seed", self.choose(rows[1:2])[1])
        self.assertIn("(one in 4 where", self.choose([compared_row(every="4")])[1])

    def test_levels_that_are_no_numbers(self):
        """Two distributions are two curves."""
        rows = [compared_row(level=f"σ = uniform:{name}", value="", one_shot=value)
                for name, value in (("0,20", "40"), ("80,90", "50"))]
        points, _, _ = self.choose(rows)
        self.assertEqual(points, {"De³, σ = uniform:0,20": {None: [40]}, "De³, σ = uniform:80,90": {None: [50]}})

    def test_one_attack(self):
        """Whatever makes earlier rows another measurement than the last one leaves them out, counted."""
        for name, value in [("eps", "0.0313725"), ("norm", "l2"), ("l2_radius", "2"), ("steps", "100"),
                            ("eot", "32"), ("data", "cifar10"), ("split", "val"), ("images", "20"),
                            ("every", "4"), ("pixels", "other"), ("precision", "bf16"), ("code", "other"),
                            ("attack_seed", "1")]:
            with self.subTest(name):
                old = [compared_row(seed=seed, one_shot="7", **{name: value}) for seed in "01"]
                points, title, printed = self.choose([*old, compared_row(), compared_row(seed="1")])
                self.assertEqual(points, {"De³": {50: [40, 40]}})
                self.assertIn("EOT 8", title)
                self.assertIn("left out: 2 rows", printed)

    def test_measured_again(self):
        """Of a run that was trained anew the latest row counts."""
        points, _, printed = self.choose([compared_row(one_shot="7", weights="old"), compared_row()])
        self.assertEqual(points, {"De³": {50: [40]}})
        self.assertIn("left out: 1 rows", printed)

    def test_other_code(self):
        """That the table is not of today's code is said."""
        _, _, printed = self.choose([compared_row(code="old")])
        self.assertIn("measured by other code than that of today (commit d8e)", printed)

    def test_what_is_not_drawn(self):
        """Masking, and others that a picture has no room for, are named."""
        rows = [compared_row("MIM, whole output", "mask 0.5"), compared_row("De³ off the shelf"),
                compared_row()]
        points, _, printed = self.choose(rows)
        self.assertEqual(list(points), ["De³"])
        self.assertIn("left out: De³ off the shelf, MIM, whole output\n", printed)
        with self.assertRaisesRegex(UserError, "no defense that is drawn"):
            self.choose(rows[:1])

    def test_readings(self):
        """The mean of what is there; None where nothing is."""
        rows = [compared_row(), compared_row(ten_tries="", noise_known="", one_shot="50")]
        self.assertEqual(plot.average(rows, "one_shot"), 45)
        self.assertEqual(plot.average(rows, "ten_tries"), 20)
        self.assertIsNone(plot.average(rows[1:], "ten_tries"))

    def test_colors(self):
        """One for each kind, by the longest beginning that fits; what is not known is gray."""
        names = ["undefended", "De³", "De³, the paper's Γ(25, 3), U(0, 30)", "noise only, U(0, 60)",
                 "adversarial training 4/255"]
        styles = [plot.style_of(name) for name in names]
        self.assertEqual(len(set(styles)), 5)
        self.assertEqual(plot.style_of("De³, fine-tuned on U(0, 60)"), plot.style_of("De³"))
        self.assertEqual(plot.style_of("JPEG")[0], "#777777")

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "matplotlib is not installed")
    def test_script(self):
        """Three kinds of picture, each with a name of its own, unless --out says otherwise."""
        rows = [compared_row(name, level, seed, seed + "5") for seed in "12" for name, level in
                (("undefended", "off"), ("De³", "σ = 0"), ("De³", "σ = 100"), ("noise only", "σ = 100"))]
        path = self.save(rows)
        for flags, name in (
                ([], "tradeoff.png"), (["--against-clean"], "tradeoff.png"), (["--ladder"], "ladder.png"),
                (["--out", path.with_name("other.png")], "other.png"),
                (["--ladder", "--only", "De³"], "ladder.png")):
            with self.subTest(flags):
                picture = path.with_name(name)
                picture.unlink(missing_ok=True)
                self.assertIn(f"wrote {picture}", finished(run("studies.plot", "--table", path, *flags)).out)
                assert_picture(picture)
        assert_refused(run("studies.plot", "--table", path, "--only", "noise only"), "fewer than two sigmas")
        assert_refused(run("studies.plot", "--table", path, "--only", "JPEG"), "no defense that is drawn")
        assert_refused(run("studies.plot", "--table", path, "--ladder", "--against-clean"), "not allowed")

    def test_refuses(self):
        folder = new_folder()
        assert_refused(run("studies.plot", "--table", folder / "none.csv"), ("none.csv", "studies.compare"))
        for rows in ([{"a": 1, "b": 2}], [dict(defense="de3", level="σ = 50", robust_accuracy="40")]):
            assert_refused(run("studies.plot", "--table", self.save(rows)), "is no table of studies.compare")
        with mock.patch.dict(sys.modules, {"matplotlib.figure": None}):
            rows = [compared_row(level=level) for level in ("σ = 0", "σ = 50")]
            assert_refused(run("studies.plot", "--table", self.save(rows)), "pip install matplotlib")


if __name__ == "__main__":
    unittest.main()
