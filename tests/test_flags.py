"""Flags that would change nothing, or ask for the impossible, are refused before any work."""

import unittest
from unittest import mock

import torch

import finetune
import pretrain
from model import De3
from tests.helpers import (assert_refused, finished, new_folder, photo_autoencoder,
                           photo_classifier, photo_flags, photos, read_csv, run, saved, training)


class TestFlags(unittest.TestCase):
    def refused(self, script, *flags, says):
        with self.subTest(script, flags=flags):
            assert_refused(run(script, *flags), says)

    def test_ignored_in_training(self):
        """A flag that nothing would use; no run is begun."""
        out = new_folder() / "run"
        nim, mim = (("--autoencoder", photo_autoencoder(task), "--out", out) for task in ("nim", "mim"))
        clean = ("--mode", "clean", *nim)
        for script, *flags in (("pretrain", "--task", "mim", "--out", out), ("finetune", *clean),
                               ("finetune", "--adversarial", "8/255", *nim)):
            self.refused(script, *flags, "--sigma", 75, says="--sigma changes nothing")
        for flag in (("--keep-visible",), ("--max-mask-ratio", 0.3)):
            self.refused("finetune", *clean, *flag, says=f"{flag[0]} changes nothing")
            self.refused("finetune", *nim, *flag, says=f"{flag[0]} changes nothing unless behind MIM")
        self.refused("finetune", *mim, "--sigma", 75, says="--sigma changes nothing behind MIM")
        self.refused("finetune", *clean, "--from-scratch", says="--autoencoder changes nothing")
        self.assertFalse(out.exists())

    def test_ignored_in_evaluation(self):
        clean, de3 = photo_classifier("clean"), photo_classifier()
        self.refused("attack", de3, "--norm", "l2", says="--norm l2 needs --eps")
        self.refused("attack", de3, "--attack", "pgd", "--eot", 9, says="--eot changes nothing")
        self.refused("attack", de3, "--threat", "gray", "--eot", 9, says="--eot changes nothing")
        for run_ in (clean, de3):
            self.refused("attack", run_, "--mask-ratio", 0.5, says="--mask-ratio changes nothing")
        self.refused("attack", de3, "--step-size", 0, says="--step-size 0 moves nothing")
        for flag, value in (("--split", "val"), ("--images", 3), ("--eps", "2/255"), ("--steps", 3),
                            ("--eot", 3)):
            self.refused("defend", next(photos().glob("val/*/*")), flag, value, "--run", de3,
                         says=f"{flag} changes nothing for photos")

    def test_bf16_is_used(self):
        """defend, attack and certify run their models in bfloat16 with --bf16, and only then."""
        seen, forward = set(), De3.forward

        def noting(de3, images):
            seen.add(torch.is_autocast_enabled("cpu"))
            return forward(de3, images)
        de3, photo = photo_classifier(), next(photos().glob("val/*/*"))
        for words in (("defend", "--run", de3, "--images", 8, "--steps", 1),
                      ("defend", photo, "--run", de3),
                      ("attack", de3, "--images", 8, "--steps", 1, "--attack", "pgd"),
                      ("studies.certify", de3, "--images", 1, "--n", 10)):
            for flag in ("--bf16", "--no-bf16"):
                with self.subTest(words, flag=flag), mock.patch.object(De3, "forward", noting):
                    seen.clear()
                    finished(run(*words, "--sigma", 50, "--out", new_folder(), flag))
                    self.assertEqual(seen, {flag == "--bf16"})

    def test_settings(self):
        """Of a run stand in its checkpoint as plain values; what its mode does not use is not set."""
        nim, mim = (saved(photo_autoencoder(task))["settings"] for task in ("nim", "mim"))
        self.assertEqual((nim["sigma"], mim["mask_ratio"]), ("gamma:10,8", pretrain.MASK_RATIO))
        self.assertNotIn("mask_ratio", nim)
        self.assertIsNone(mim["sigma"])
        behind, clean, de3 = (saved(photo_classifier(mode, task))["settings"] for mode, task
                              in (("de3", "mim"), ("clean", "nim"), ("de3", "nim")))
        self.assertEqual((behind["max_mask_ratio"], behind["sigma"]), (finetune.MAX_MASK_RATIO, None))
        self.assertEqual((clean["max_mask_ratio"], clean["sigma"]), (None, None))
        self.assertEqual((de3["max_mask_ratio"], de3["sigma"]), (None, "uniform:0,60"))
        for found in (nim, mim, behind, clean, de3):
            self.assertEqual((found["data"], found["size"], found["seed"]), (str(photos()), "tiny", 0))
            self.assertEqual((found["bf16"], found["max_batch"], found["weight_decay"]),
                             (False, 256, 0.05))
            for value in found.values():
                self.assertIsInstance(value, (bool, int, float, str, type(None)))
            for name in ("device", "workers", "out", "resume", "overwrite", "dry_run", "given"):
                self.assertNotIn(name, found)

    def test_said_once(self):
        """Data set, size and seed are the autoencoder's; the later stages take them from the run."""
        nim, out = new_folder() / "nim", new_folder() / "clean"
        finished(run("pretrain", *training(), *photo_flags(), "--seed", 5, "--out", nim))
        finished(run("finetune", "--mode", "clean", "--autoencoder", nim, *training(), "--out", out))
        found = saved(out)["settings"]
        self.assertEqual((found["data"], found["size"], found["seed"]), (str(photos()), "tiny", 5))
        result = finished(run("defend", "--run", out, "--images", 6, "--steps", 1))
        self.assertIn(f"6 val images of {photos()}", result.out)
        self.assertEqual(saved(out)["data"]["name"], str(photos()))

    def test_refused_early(self):
        """Before the models and images are loaded."""
        for script, flags, says in [
                ("finetune", ("--adversarial", "4/3"), "more than the range of the pixels"),
                ("defend", ("--eps", "16"), "more than the range of the pixels"),
                ("studies.audit", ("--eps", "16"), "more than the range of the pixels"),
                ("attack", ("--eps", "16"), "more than the range of the pixels"),
                ("defend", (photos(),), "is a folder")]:
            with mock.patch("support.data.load_dataset", side_effect=AssertionError), \
                    mock.patch("support.weights.load_model", side_effect=AssertionError):
                self.refused(script, *flags, says=says)

    def test_run_path(self):
        """A run's folder, or the checkpoint.pt in it."""
        out, clean = new_folder(), photo_classifier("clean")
        for name in (clean, clean / "checkpoint.pt"):
            finished(run("attack", name, "--images", 3, "--attack", "fgsm", "--eps", "8/255",
                         "--out", out))
        one, two = read_csv(out / "attack.csv")
        self.assertEqual({**one, "seconds": ""}, {**two, "seconds": ""})
        self.assertEqual(one["run"], str(clean))
