"""Flags that would change nothing, or ask for the impossible, are refused before any work."""

import unittest
from unittest import mock

import torch

from model import De3
from tests.helpers import (assert_refused, finished, new_folder, photo_autoencoder, photo_classifier,
                           photo_flags, photos, run, saved, training)


class TestFlags(unittest.TestCase):
    def refused(self, script, *flags, says):
        with self.subTest(script, flags=flags):
            assert_refused(run(script, *flags), says)

    def test_ignored_in_training(self):
        """A flag that nothing would use; no run is begun."""
        out = new_folder() / "run"
        nim, mim = (("--autoencoder", photo_autoencoder(task), "--out", out) for task in ("nim", "mim"))
        clean = ("--mode", "clean", *nim)
        for script, *flags, mode in (("pretrain", "--task", "mim", "--out", out, "MIM"),
                                     ("finetune", *clean, "--mode clean"), ("finetune", *mim, "--mode mim"),
                                     ("finetune", "--adversarial", "8/255", *nim, "--mode clean"),
                                     ("finetune", "--mode", "mim-visible", *mim, "--mode mim-visible")):
            self.refused(script, *flags, "--sigma", 75, says=f"--sigma changes nothing in {mode}")
        for mode in ("clean", "no-denoise"):
            for start in (["--from-scratch"], ["--arch", "resnet18"], ["--init", photo_classifier("clean")]):
                self.refused("finetune", "--mode", mode, *start, *nim, says="--autoencoder changes nothing")
        self.assertFalse(out.exists())

    def test_ignored_in_evaluation(self):
        de3, photo = photo_classifier(), next(photos().glob("val/*/*"))
        self.refused("attack", de3, "--norm", "l2", says="--norm l2 needs --eps")
        self.refused("attack", de3, "--defense", "de3:50", "--sigma", 9, says="--sigma changes nothing")
        mim = photo_classifier("mim", "mim")
        self.refused("attack", mim, "--sigma", 9, says="--sigma is not a level of mim")
        for flag, value in (("--split", "val"), ("--eps", "2/255"), ("--steps", 3), ("--eot", 3)):
            self.refused("defend", de3, flag, value, "--photos", photo,
                         says=f"{flag} changes nothing for photos")

    def test_bf16_is_used(self):
        """attack, certify and photographs run their models in bfloat16 with --bf16, and only then; what counts
        right answers never does."""
        seen, forward = set(), De3.forward

        def noting(de3, images):
            seen.add(torch.is_autocast_enabled("cpu"))
            return forward(de3, images)
        de3, photo = photo_classifier(), next(photos().glob("val/*/*"))
        for words in (("defend", de3, "--images", 8, "--steps", 1), ("defend", de3, "--photos", photo),
                      ("attack", de3, "--images", 8, "--steps", 1, "--attack", "pgd"),
                      ("studies.certify", de3, "--images", 1, "--n", 10)):
            for flag in ("--bf16", "--no-bf16"):
                with self.subTest(words, flag=flag), mock.patch.object(De3, "forward", noting):
                    seen.clear()
                    finished(run(*words, "--sigma", 50, "--out", new_folder(), flag))
                    is_scored = words[0] == "attack" or (words[0] == "defend" and "--photos" not in words)
                    self.assertEqual(seen, {flag == "--bf16"} | ({False} if is_scored else set()))

    def test_settings(self):
        """Of a run stand in its checkpoint as plain values; what its mode does not use is not set."""
        nim, mim = (saved(photo_autoencoder(task))["settings"] for task in ("nim", "mim"))
        self.assertEqual((nim["task"], nim["sigma"]), ("nim", "gamma:10,8"))
        self.assertEqual((mim["task"], mim["sigma"]), ("mim", None))
        behind, clean, de3 = (saved(photo_classifier(mode, task)) for mode, task
                              in (("mim", "mim"), ("clean", "nim"), ("de3", "nim")))
        self.assertEqual([(found["settings"]["mode"], found["settings"]["sigma"], found["level"])
                          for found in (behind, clean, de3)],
                         [("mim", None, "uniform:0,0.75"), ("clean", None, None),
                          ("de3", "uniform:0,60", "uniform:0,60")])
        for found in (nim, mim, behind["settings"], clean["settings"], de3["settings"]):
            self.assertEqual((found["data"], found["size"], found["seed"]), (str(photos()), "tiny", 0))
            self.assertEqual((found["bf16"], found["max_batch"], found["weight_decay"]),
                             (False, 256, 0.05))
            for value in found.values():
                self.assertIsInstance(value, (bool, int, float, str, type(None)))
            for name in ("device", "workers", "out", "resume", "overwrite", "command"):
                self.assertNotIn(name, found)

    def test_said_once(self):
        """Data set, size and seed are the autoencoder's; the later stages take them from the run."""
        nim, out = new_folder() / "nim", new_folder() / "clean"
        finished(run("pretrain", *training(), *photo_flags(), "--seed", 5, "--out", nim))
        finished(run("finetune", "--mode", "clean", "--autoencoder", nim, *training(), "--out", out))
        found = saved(out)["settings"]
        self.assertEqual((found["data"], found["size"], found["seed"]), (str(photos()), "tiny", 5))
        result = finished(run("defend", out, "--images", 6, "--steps", 1))
        self.assertIn(f"6 val images of {photos()}", result.out)
        self.assertEqual(saved(out)["data"]["name"], str(photos()))

    def test_radius_in_pixels(self):
        """8 for 8/255: refused by the attack itself, in every stage, before a figure is kept."""
        de3, out = photo_classifier(), new_folder()
        for script, tested in (("attack", de3), ("defend", de3), ("studies.audit", "assets/digits/de3")):
            self.refused(script, tested, "--eps", 8, "--out", out, says="write 8/255")
        self.assertEqual(list(out.iterdir()), [])
        self.refused("finetune", "--autoencoder", photo_autoencoder(), "--adversarial", 8, *training(2),
                     "--out", new_folder(), says="write 8/255")
