"""Several processes under torchrun."""

import time
import unittest

import torch

from tests.helpers import (assert_near, assert_same_run, copy_of_photos, elsewhere, finished, new_folder,
                           photo_autoencoder, photo_classifier, photo_flags, read_csv, run, saved, torchrun,
                           training)


class TestProcesses(unittest.TestCase):
    def test_stages(self):
        """Training, going on with a cut run, and the later stages, in two processes and in one."""
        folder = new_folder()
        step = ("pretrain", "--sigma", 0, *training(1, 1196), "--out")
        train = ("pretrain", *training(2), *photo_flags(), "--out")
        clean = ("finetune", "--mode", "clean", "--autoencoder", photo_autoencoder(), *training(3),
                 "--workers", 0, "--out", folder / "clean")
        attack = ("attack", folder / "clean", photo_classifier(), "--images", 19, "--attack", "fgsm",
                  "--max-batch", 4, "--eps", "8/255", "--sigma", 0, 50, "--out")
        defend = ("defend", folder / "clean", "--images", 19, "--max-batch", 4, "--out")
        stepped, whole, cut, resumed, finetuned, attacked, shown, kept = elsewhere(
            (*step, folder / "two", "--max-batch", 300), (*train, folder / "whole"),
            (1, *train, folder / "part"), ("pretrain", "--out", folder / "part", "--resume"),
            clean, (*attack, folder / "by_two"), (*defend, folder / "by_two"), (*attack, folder / "by_two"),
            processes=2)
        self.assertEqual(cut.code, 130)
        for result in (stepped, whole, resumed, finetuned, attacked, shown, kept):
            finished(result)
        self.one_step(step, folder)

        # the run that was cut; one process wrote it
        self.assertEqual(resumed.out.count("going on after epoch 1 of 2"), 1)
        assert_same_run(folder / "part", folder / "whole")

        # attack.py counts each image once, writes each row once, and one process prints
        finished(run(*attack, folder / "by_one"))
        two, one = (read_csv(folder / name / "attack.csv") for name in ("by_two", "by_one"))
        self.assertEqual([row["level"] for row in two], ["off", "σ = 0", "σ = 50"])
        self.assertEqual(attacked.out.count("8/255  fgsm"), 3)
        self.assertEqual((kept.out.count("kept\n"), len(two)), (3, 3))  # a second call measures nothing
        for row, expected in zip(two[:2], one[:2]):  # at σ = 50 each process draws its own noise
            self.assertEqual(row["images"], "19")
            self.assertEqual({**row, "seconds": 0}, {**expected, "seconds": 0})

        # and so does defend.py
        expected = finished(run(*defend, folder / "by_one")).out
        lines = [[line.split()[:-1] for line in out.splitlines() if line.startswith("clean ")]
                 for out in (shown.out, expected)]  # without images/s
        self.assertEqual(len(lines[1]), 1)
        self.assertEqual(*lines)

    def one_step(self, step, folder):
        """Without noise two processes, and micro-batches, have the gradient that one has.

        After one step AdamW's first moment is 0.1 times the gradient.
        """
        for name, most in (("one", 598), ("micro", 299)):
            finished(run(*step, folder / name, "--max-batch", most))
        gradients, losses = [], []
        for name in ("one", "micro", "two"):
            state = saved(folder / name)["resume"]["optimizer"]["state"].values()
            gradients.append(torch.cat([moments["exp_avg"].flatten() for moments in state]))
            losses += [float(row["loss"]) for row in read_csv(folder / name / "log.csv")]
        self.assertGreater(gradients[0].abs().max(), 1e-3)
        for other in gradients[1:]:
            assert_near(other, gradients[0], atol=1e-7, rtol=1e-4)
        assert_near(torch.tensor(losses), torch.full((3,), losses[0]), atol=1e-5)

    def test_a_process_dies(self):
        """torchrun ends the others; nothing hangs."""
        photos = copy_of_photos()
        (photos / "train/red/0.png").write_bytes(b"no image")
        start = time.time()
        result = torchrun("pretrain", *training(100, 24), *photo_flags(photos), "--out", new_folder())
        self.assertNotEqual(result.code, 0)
        self.assertIn("red/0.png", result.err)
        self.assertLess(time.time() - start, 90)
