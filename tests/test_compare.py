"""The comparison of all defenses: what is missing, the readings, the table, the plot."""

import csv
import importlib.util
import shlex
import sys
import unittest
from argparse import Namespace
from unittest import mock

import torch

from model import De3
from studies import compare, plot, tables
from support import checkpoints, evaluation, weights
from tests.helpers import (assert_picture, assert_refused, digits_runs, finished, linear_on_digits,
                           new_folder, photo_flags, photos, read_csv, run, small_autoencoder,
                           small_classifier, training)


class TestCompare(unittest.TestCase):
    def test_missing_models(self):
        """Every run that is missing, by the command that makes it, each once."""
        folder, *_ = digits_runs()
        result = run("studies.compare", "--seeds", 0, 1, "--runs", folder)
        assert_refused(result, ("python pretrain.py --sigma 120 --runs", "--seed 1",
                                "--adversarial 16/255", "--keep-visible"))
        self.assertEqual(result.err.count("python "), 3 + 4 + 6 + 8)

    def small_table(self):
        """A table of three defenses for the photos, while the test lasts."""
        nim, mim = {"sigma": "75"}, {"task": "mim"}
        table = [tables.Entry("undefended", nim, {"mode": "clean"}),
                 tables.Entry("De³", nim, {"mode": "de3", "sigma": "uniform:0,30"}, (0, 40)),
                 tables.Entry("MIM", mim, {"mode": "de3", "keep-visible": True}, mask_ratios=(0.5,))]
        table = tables.Table(table, images=6, l2=1.0)
        patch = mock.patch.dict(tables.TABLES, {str(photos()): table})
        patch.start()
        self.addCleanup(patch.stop)

    def test_script(self):
        """The commands it names make what it misses; what it measured once is not measured again."""
        self.small_table()
        folder = new_folder() / "my runs"
        flags = (*photo_flags(folder), "--steps", 1, "--eot", 2)
        refused = run("studies.compare", *flags)
        assert_refused(refused, "models are missing")
        commands = [shlex.split(words) for words in refused.err.partition("with: ")[2].split("&&")]
        self.assertEqual(len(commands), 2 + 3)
        for _, script, *words in commands:
            self.assertIn("--size tiny", shlex.join(words))
            finished(run(script.removesuffix(".py"), *words, "--workers", 0, *training()))
        result = finished(run("studies.compare", *flags))
        rows = read_csv(folder / "photos/compare.csv")
        self.assertEqual([(row["defense"], row["level"]) for row in rows],
                         [("undefended", "off"), ("De³", "σ = 0"), ("De³", "σ = 40"),
                          ("MIM", "mask 0.5")])
        for row in rows:
            measured = float(row["ten_tries"]), float(row["one_shot"]), float(row["clean"])
            self.assertTrue(0 <= measured[0] <= measured[1] <= 100 and 0 <= measured[2] <= 100, row)
            self.assertEqual(row["noise_known"] == "", row["level"] == "mask 0.5")
            self.assertRegex(result.out, rf"\n{row['defense']} +{row['level']} +{row['clean'][:-1]} ")
        with mock.patch.object(compare, "measure", side_effect=AssertionError):
            again = finished(run("studies.compare", *flags))
        self.assertEqual(again.out.partition("\n6 test")[2], result.out.partition("\n6 test")[2])

    def test_color(self):
        """A folder of small images has the table of cifar10; its own flags can be changed."""
        folder = new_folder()
        refused = run("studies.compare", "--data", photos(), "--runs", folder)
        assert_refused(refused, ("pretrain.py --sigma gamma:10,8", "--adversarial 4/255",
                                 "--mode de3 --sigma uniform:50,150", "--mode no-denoise"))
        self.assertEqual(refused.err.count("python "), 2 + 6)
        with mock.patch("sys.argv", ["compare.py", "--data", "cifar10", "--images", "7"]):
            args, _ = compare.arguments()
        self.assertEqual((args.images, args.eps, args.l2), (7, 4 / 255, 0))

    def fake(self, name, module, function):
        """Replace a function while the test lasts."""
        patch = mock.patch.object(module, name, function)
        self.addCleanup(patch.stop)
        return patch.start()

    def without_models(self):
        """Models that only say their seed, for a comparison that measures nothing; the folder."""
        def load_model(source, kind, device, args):
            classifier = small_classifier(image_size=32)
            classifier.seed = int(source.name.endswith("_seed1"))
            mode = source.name.partition("_")[0]
            return classifier, dict(mode=mode, keep_visible=False, classes=None,
                                    config=dict(image_size=32, num_classes=10))
        autoencoder = small_autoencoder(image_size=32)
        self.fake("load_model", weights, load_model)
        self.fake("load_autoencoder", evaluation, lambda *_: (autoencoder, {}, ""))
        self.fake("missing_commands", compare, lambda *_: [])
        return new_folder() / "a folder"

    def measured(self, de3, *_):
        """Figures that grow with the seed."""
        seed = de3.classifier.seed
        return dict(clean=90 + seed, no_eot=50 + 2 * seed, one_shot=40 + 2 * seed)

    def test_table(self):
        """Mean and standard deviation over seeds, of each defense at each level."""
        folder = self.without_models()
        with mock.patch.object(compare, "measure", side_effect=self.measured) as calls:
            result = finished(run("studies.compare", "--seeds", 0, 1, "--runs", folder))
        entries = tables.TABLES["digits"].entries
        levels = sum(len(entry.sigmas) * len(entry.mask_ratios) for entry in entries)
        self.assertEqual(calls.call_count, 2 * levels)
        for level in ("undefended +off", "De³ +σ = 100", "MIM, whole output +mask 0.5"):
            figures = "90.5 ± 0.7 +41.0 ± 1.4 +41.0 ± 1.4 +- +- +51.0 ± 1.4 "
            self.assertRegex(result.out, rf"\n{level} +{figures}")

    def test_cut_short(self):
        """What was measured before is kept; other weights are measured anew."""
        folder, calls = self.without_models(), []

        def cut_short(de3, *_):
            calls.append(de3)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return self.measured(de3)
        self.fake("measure", compare, cut_short)
        flags = ("--runs", folder)
        self.assertEqual(run("studies.compare", *flags).code, 130)
        finished(run("studies.compare", *flags))
        levels = len(read_csv(folder / "digits/compare.csv"))
        self.assertEqual(len(calls), levels + 1)
        finished(run("studies.compare", *flags))
        self.assertEqual(len(calls), levels + 1)
        finished(run("studies.compare", *flags, "--eps", "8/255"))
        self.assertEqual(len(calls), 2 * levels + 1)
        self.fake("fingerprint", checkpoints, lambda model: "other")
        finished(run("studies.compare", *flags))
        self.assertEqual(len(calls), 3 * levels + 1)
        self.assertEqual(len(read_csv(folder / "digits/compare.csv")), 3 * levels)

    def test_refuses(self):
        folder = self.without_models()
        flags = photo_flags(folder, new_folder())
        assert_refused(run("studies.compare", *flags), "there is no table of")
        (folder / "digits").mkdir(parents=True)
        (folder / "digits/compare.csv").write_text("a,b\n1,2\n")
        assert_refused(run("studies.compare", "--runs", folder), "compare.csv is not a table")
        self.assertEqual((folder / "digits/compare.csv").read_text(), "a,b\n1,2\n")
        words = ",".join(["much"] * len(compare.FIELDS))
        (folder / "digits/compare.csv").write_text(",".join(compare.FIELDS) + f"\n{words}\n")
        assert_refused(run("studies.compare", "--runs", folder), "compare.csv is damaged near line 2")

    def readings(self, de3):
        """What `measure` finds for a defense of the linear classifier, on 40 digits."""
        _, (images, labels) = linear_on_digits()
        args = Namespace(steps=5, eot=4, eps=0.05, l2=0.5, seed=0, max_batch=256)
        batches = [(images[:20], labels[:20]), (images[20:40], labels[20:40])]
        return compare.measure(de3, batches, args, lambda text: None)

    def test_readings(self):
        """Stricter readings are lower; where nothing is random they are one."""
        model, _ = linear_on_digits()
        found = self.readings(De3(None, model, 100))
        self.assertLess(found["ten_tries"], found["one_shot"])
        self.assertLess(found["clean_ten_tries"], found["clean"])
        self.assertLess(found["one_shot"], found["clean"] - 10)
        self.assertLess(found["noise_known"], found["one_shot"] + 5)
        self.assertLess(found["one_shot"], found["no_eot"] + 5)
        self.assertLess(found["l2"], found["clean"])
        self.assertLess(found["l2_twice"], found["l2"])
        for de3 in (De3(None, model, None), De3(None, model, 0)):
            found = self.readings(de3)
            robust = {found[name] for name in ("no_eot", "one_shot", "ten_tries", "noise_known")}
            clean = {found[name] for name in ("clean", "clean_ten_tries", "clean_noise_known")}
            self.assertEqual((len(robust), len(clean)), (1, 1))
            self.assertLess(*robust, *clean)

    def test_known_noise_is_the_same_for_all_images(self):
        """And the attacker's: each of three noises is drawn once, fixed, and attacked without EOT."""
        model, (images, labels) = linear_on_digits()
        with mock.patch.object(compare, "pgd", wraps=compare.pgd) as attacks:
            compare.with_known_noise(De3(None, model, 100), images[:5], labels[:5], 0.05, 4, 256)
        noises = [call.args[0].noise for call in attacks.call_args_list]
        self.assertEqual([noise.shape for noise in noises], [images[0].shape] * compare.KNOWN_NOISES)
        self.assertFalse(torch.equal(noises[0], noises[1]))
        for call in attacks.call_args_list:
            self.assertFalse(call.args[0].is_random)
            self.assertEqual((call.args[4], call.kwargs.get("eot", 1)), (8, 1))


class TestPlot(unittest.TestCase):
    ATTACK = [dict(defense=words, sigma=sigma, attack=attack, eps=eps, images="80", split="test",
                   steps="20", clean_accuracy="90.0", robust_accuracy=robust)
              for words, sigma, attack, eps, robust in [
                  ("undefended", "", "pgd", "0.03", "60"), ("undefended", "", "pgd", "0.06", "20"),
                  ("De³ σ = 0", "0.0", "fgsm", "0.06", "55"),
                  ("De³ σ = 0", "0.0", "pgd", "0.06", "30"),
                  ("De³ σ = 50", "50.0", "pgd", "0.06", "50"),
                  ("De³ σ = 50", "50.0", "pgd+eot", "0.06", "40")]]

    def test_points_of_attack(self):
        """The largest eps; under EOT where nothing else is honest; one curve over sigma."""
        self.assertEqual(plot.points_of_attack(self.ATTACK), {
            "undefended": {"off": [(90, 20)]}, "De³": {"σ = 0": [(90, 30)], "σ = 50": [(90, 40)]}})

    def test_points_of_comparison(self):
        rows = [dict(defense="De³", level="σ = 100", seed=seed, clean="90", one_shot=value)
                for seed, value in (("0", "40"), ("1", "50"))]
        self.assertEqual(plot.points_of_comparison(rows), {"De³": {"σ = 100": [(90, 40), (90, 50)]}})
        rows = [{**row, "ten_tries": "20", "noise_known": ""} for row in rows]
        self.assertEqual(plot.points_of_comparison(rows, plot.READINGS),
                         {"De³": {"σ = 100": [(90, 20), (90, 20)]}})

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
        comparison = [dict(defense=name, level=level, seed=seed, images="100", split="test",
                           eps="0.06", steps="20", eot="8", clean="90", one_shot=seed + "5",
                           ten_tries=seed + "3", noise_known="")
                      for seed in "12" for name, level in (
                          ("undefended", "off"), ("De³", "σ = 0"), ("De³", "σ = 100"))]
        for rows in (self.ATTACK, comparison):
            path = self.save(rows)
            finished(run("studies.plot", "--table", path))
            assert_picture(path.with_name("tradeoff.png"))
        finished(run("studies.plot", "--table", path, "--out", path.with_name("other.png")))
        assert_picture(path.with_name("other.png"))
        finished(run("studies.plot", "--table", path, "--against-clean"))
        assert_picture(path.with_name("tradeoff.png"))
        refused = run("studies.plot", "--table", self.save(self.ATTACK), "--against-clean")
        assert_refused(refused, "give it a compare.csv")

    def test_refuses(self):
        folder = new_folder()
        assert_refused(run("studies.plot", "--table", folder / "none.csv"), "none.csv")
        assert_refused(run("studies.plot", "--table", self.save([{"a": 1}])), "is no table of")
        no_number = [{**row, "robust_accuracy": "much"} for row in self.ATTACK]
        assert_refused(run("studies.plot", "--table", self.save(no_number)), "is damaged")
        binary = folder / "binary.csv"
        binary.write_bytes(b"\xff\xfe\0")
        assert_refused(run("studies.plot", "--table", binary), "is damaged")
        without = mock.patch.dict(sys.modules, {"matplotlib.figure": None})
        with without:
            assert_refused(run("studies.plot", "--table", self.save(self.ATTACK)), "pip install")

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "matplotlib is not installed")
    def test_needs_two_sigmas(self):
        refused = run("studies.plot", "--table", self.save(self.ATTACK[:2]))
        assert_refused(refused, "fewer than two sigmas")
