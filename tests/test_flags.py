"""Flags that would change nothing, or ask for the impossible, are refused before any work."""

import unittest
from unittest import mock

import torch

import finetune
import pretrain
from model import De3
from tests.helpers import (assert_refused, digits_runs, finished, new_folder, photo_flags, photo_runs,
                           photos, run, training)


class TestFlags(unittest.TestCase):
    def refused(self, script, *flags, says):
        with self.subTest(script, flags=flags):
            assert_refused(run(script, *flags), says)

    def test_ignored(self):
        """A flag that nothing would use."""
        runs = ("--runs", new_folder())
        self.refused("pretrain", "--task", "mim", "--sigma", 75, *runs, says="--sigma changes nothing")
        self.refused("finetune", "--adversarial", "8/255", "--sigma", 75, *runs,
                     says="--sigma changes nothing")
        clean = ("--mode", "clean", *runs)
        self.refused("finetune", *clean, "--sigma", 75, says="--sigma changes nothing")
        self.refused("finetune", *clean, "--keep-visible", says="--keep-visible changes nothing")
        self.refused("finetune", *clean, "--max-mask-ratio", 0.3, says="--max-mask-ratio changes")
        own = ("--runs", digits_runs()[0])
        self.refused("attack", "--norm", "l2", *own, says="--norm l2 needs --eps")
        self.refused("attack", "--attack", "pgd", "--eot", 9, *own, says="--eot changes nothing")
        self.refused("attack", "--threat", "gray", "--eot", 9, *own, says="--eot changes nothing")
        self.refused("attack", "--mask-ratio", 0.5, *own, says="--mask-ratio changes nothing")
        self.refused("attack", "--step-size", 0, *own, says="--step-size 0 moves nothing")
        for flag, value in (("--split", "val"), ("--images", 3), ("--eps", "2/255"), ("--steps", 3),
                            ("--eot", 3)):
            self.refused("defend", next(photos().glob("val/*/*")), flag, value, *own,
                         says=f"{flag} changes nothing for photos")

    def test_ignored_behind_an_autoencoder(self):
        for task, flags, says in (("mim", ("--sigma", 75), "--sigma changes nothing behind"),
                                  ("nim", ("--keep-visible",), "are for an autoencoder of --task mim"),
                                  ("nim", ("--max-mask-ratio", 0.3), "are for an autoencoder of")):
            folder, source = photo_runs(task)
            self.refused("finetune", "--mode", "de3", "--autoencoder", source, *flags,
                         *photo_flags(folder), says=says)
            self.assertEqual(list(folder.rglob("log.csv")), [])

    def test_bf16_is_used(self):
        """defend, attack and certify run their models in bfloat16 with --bf16, and only then."""
        seen, forward = set(), De3.forward

        def noting(de3, images):
            seen.add(torch.is_autocast_enabled("cpu"))
            return forward(de3, images)
        own = ("--runs", digits_runs()[0], "--sigma", 50)
        photo = next(photos().glob("val/*/*"))
        for words in (("defend", "--images", 8, "--steps", 1), ("defend", photo),
                      ("attack", "--images", 8, "--steps", 1, "--attack", "pgd"),
                      ("studies.certify", "--images", 1, "--n", 10)):
            for flag in ("--bf16", "--no-bf16"):
                with self.subTest(words, flag=flag), mock.patch.object(De3, "forward", noting):
                    seen.clear()
                    finished(run(*words, *own, flag))
                    self.assertEqual(seen, {flag == "--bf16"})

    def test_settings(self):
        """Of a run stand in its checkpoint, those that its mode uses and no others."""
        def settings(script, folder, *flags):
            path, = finished(run(script, *flags, *training(), *photo_flags(folder))).wrote()
            return torch.load(path)["settings"]
        nim, mim = (settings("pretrain", new_folder(), "--task", task) for task in ("nim", "mim"))
        self.assertEqual((nim["sigma"], mim["mask_ratio"]), ("gamma:10,8", str(pretrain.MASK_RATIO)))
        self.assertNotIn("mask_ratio", nim)
        self.assertEqual(mim.get("sigma"), "None")
        folder, source = photo_runs("mim")
        behind = settings("finetune", folder, "--mode", "de3", "--autoencoder", source)
        self.assertEqual(behind["max_mask_ratio"], str(finetune.MAX_MASK_RATIO))
        self.assertNotIn("sigma", behind)
        clean = settings("finetune", folder, "--mode", "clean", "--from-scratch")
        self.assertFalse({"sigma", "max_mask_ratio", "keep_visible"} & set(clean))
        for found in (nim, mim, behind, clean):
            self.assertTrue(found["data"].startswith("folder "))
            self.assertEqual(found["micro_batches"], "1")

    def test_refused_early(self):
        """Before the models and images are loaded."""
        for script, flags, says in [
                ("finetune", ("--adversarial", "4/3"), "more than the range of the pixels"),
                ("defend", ("--eps", "16"), "more than the range of the pixels"),
                ("studies.audit", ("--eps", "16"), "more than the range of the pixels"),
                ("attack", ("--eps", "16"), "more than the range of the pixels")]:
            with mock.patch("support.data.load_dataset", side_effect=AssertionError), \
                    mock.patch("support.weights.load_model", side_effect=AssertionError):
                self.refused(script, *flags, "--runs", digits_runs()[0], says=says)

    def test_save(self):
        """A folder, or a place where nothing can be written: told before the attack."""
        one = ("--attack", "fgsm", "--eps", "8/255", "--sigma", 0, "--runs", digits_runs()[0],
               "--classifier", digits_runs()[2].wrote()[0].parent)
        with mock.patch("attack.attack_batches", side_effect=AssertionError):
            self.refused("attack", *one, "--save", new_folder(), says="name a file")
            self.refused("attack", *one, "--save", "/proc/nowhere/x.npz", says="name a file")

    def test_micro_batches(self):
        """In how many pieces a batch goes through the model decides the noise: it is a setting."""
        folder = new_folder()
        flags = (*training(2), *photo_flags(folder))
        finished(run("pretrain", *flags))
        self.assertIn("finished run kept", finished(run("pretrain", *flags, "--max-batch", 8)).out)
        self.refused("pretrain", *flags, "--max-batch", 4, says="micro_batches 1 there, 2 here")
