"""Weights that come along: half-precision copies of runs, and the stages on such a folder."""

import shutil
import unittest
from pathlib import Path

import torch

from studies import ship
from support import run as run_module
from tests.helpers import (REPOSITORY, assert_near, assert_refused, digits_runs, finished, new_folder,
                           photo_autoencoder, photo_classifier, photos, read_csv, run, saved)


class TestShip(unittest.TestCase):
    NAMES = ("nim", "de3", "clean")

    @classmethod
    def setUpClass(cls):
        cls.own, _ = digits_runs()
        cls.assets = new_folder() / "digits"
        runs = [cls.own / name for name in cls.NAMES]
        cls.result = finished(run("studies.ship", *runs, "--out", cls.assets))

    def test_copies(self):
        """Half the bytes, rounded weights, nothing for --resume, no digests of code, no private folder."""
        for name in self.NAMES:
            path, original = (folder / name / "checkpoint.pt" for folder in (self.assets, self.own))
            self.assertIn(f"wrote {path}", self.result.out)
            self.assertLess(path.stat().st_size, original.stat().st_size / 3)  # it held AdamW's too
            halved, whole = torch.load(path, weights_only=True), torch.load(original)
            for kept, made in [(halved, whole)] + [(halved["autoencoder"], whole["autoencoder"])
                                                   for _ in range(name == "de3")]:
                self.assertNotIn("resume", kept)
                self.assertEqual([made_by["code"] for made_by in kept["made_by"]], [{}])
                self.assertTrue(made["made_by"][0]["code"])
                for weight, value in made["model"].items():
                    self.assertEqual(kept["model"][weight].dtype, torch.float16)
                    assert_near(kept["model"][weight].float(), value, atol=1e-6, rtol=1e-3)
                self.assertNotIn(str(self.own), str({**kept, "model": None, "autoencoder": None}))
        model, _ = run_module.load(self.assets / "de3", "classifier")
        self.assertEqual({value.dtype for value in model.state_dict().values()}, {torch.float32})

    def test_folders_of_the_machine(self):
        """A data set in a folder is called as the assets are; commands keep last names only."""
        target = new_folder() / "cifar10"
        finished(run("studies.ship", photo_classifier(), "--out", target))
        checkpoint = torch.load(target / "de3" / "checkpoint.pt")
        for part in (checkpoint, checkpoint["autoencoder"]):
            self.assertEqual((part["data"]["name"], part["settings"]["data"]), ("cifar10", "cifar10"))
            self.assertNotIn(str(photos().parent), str({**part, "model": None, "autoencoder": None}))
            self.assertIn("--epochs", part["made_by"][0]["command"])
        trained = torch.load(photo_classifier() / "checkpoint.pt")
        trained["settings"]["init"] = "/home/me/weights.pth"
        trained["started_from"]["made_by"][0]["command"] = "python pretrain.py --out /home/me/nim"
        halved = ship.halve(trained, "cifar10")
        self.assertNotIn("/home", str([halved["settings"], halved["started_from"]]))
        for command in ("python finetune.py --data /home/me/photos --init /home/me/w.pth",
                        "python finetune.py --out=/home/me/runs/de3"):
            self.assertNotIn("/home", ship.without_folders(command))

    def test_stages(self):
        """A copy of the folder is a whole defense; the accuracies stay, and nothing is written to it."""
        copied = new_folder() / "elsewhere" / "renamed"
        shutil.copytree(self.assets / "de3", copied)
        before, photo = set(copied.rglob("*")), next(photos().glob("val/*/*"))
        flags = ("--images", 60, "--steps", 2, "--attack", "pgd")
        found = []
        for folder in (self.own / "de3", copied):
            out = new_folder()
            finished(run("attack", folder, *flags, "--out", out))
            found.append(read_csv(out / "attack.csv"))
            finished(run("defend", folder, "--photos", photo, "--out", out))
            self.assertTrue(list(out.glob("purified/*.png")))
            finished(run("studies.certify", folder, "--sigma", 50, "--images", 2, "--n", 10, "--out",
                         out))
        self.assertEqual(set(copied.rglob("*")), before)
        for trained, row in zip(*found, strict=True):
            self.assertEqual((row["level"], row["attack"]), (trained["level"], trained["attack"]))
            self.assertEqual(row["defense"], trained["defense"].replace("de3", "renamed"))
            self.assertAlmostEqual(float(row["clean_accuracy"]), float(trained["clean_accuracy"]),
                                   delta=5)
            self.assertNotEqual(row["weights"], trained["weights"])

    def test_refuses(self):
        """What is no finished run, two runs of one name, and to train a copy further."""
        assert_refused(run("studies.ship", new_folder() / "none", "--out", new_folder()), "holds no run")
        source = photo_autoencoder() / "checkpoint.pt"
        unfinished = new_folder() / "nim"
        unfinished.mkdir()
        torch.save({**torch.load(source), "epochs": 9}, unfinished / "checkpoint.pt")
        assert_refused(run("studies.ship", unfinished, "--out", new_folder()),
                       ("unfinished", "--resume"))
        again = Path(shutil.copytree(photo_autoencoder(), new_folder() / photo_autoencoder().name))
        out = new_folder()
        assert_refused(run("studies.ship", photo_autoencoder(), again, "--out", out), "holds a run: name another")
        self.assertEqual(saved(out / again.name)["kind"], "autoencoder")  # the first of them
        copied = shutil.copytree(self.assets / "nim", new_folder() / "nim")
        assert_refused(run("pretrain", "--out", copied, "--resume"), ("lacks what --resume needs", "--init"))

    def test_weights_that_come_along(self):
        """Those of assets/ label a photograph."""
        out, photo = new_folder(), photos() / "val" / "red" / "0.png"
        for name, words in (("de3", "de3, σ = 50"), ("clean", "clean"), ("adversarial", "adversarial")):
            result = finished(run("defend", REPOSITORY / "assets/cifar10" / name, "--photos", photo,
                                  "--out", out))
            self.assertRegex(result.out, rf"{words}: [a-z]+ [\d.]+%, ")
            self.assertNotIn("other code", result.out)


if __name__ == "__main__":
    unittest.main()
