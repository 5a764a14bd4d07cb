"""Several processes under torchrun."""

import time
import unittest

import torch

from tests.helpers import (assert_near, assert_same_run, copy_of_photos, elsewhere, finished, new_folder,
                           photo_autoencoder, photo_flags, read_csv, run, saved, torchrun, training)


class TestProcesses(unittest.TestCase):
    def test_stages(self):
        """Training, going on with a cut run, and attack.py, in two processes and in one."""
        folder = new_folder()
        step = ("pretrain", "--sigma", 0, *training(1, 1196), "--out")
        train = ("pretrain", *training(2), *photo_flags(), "--out")
        clean = ("finetune", "--mode", "clean", "--autoencoder", photo_autoencoder(), *training(3),
                 "--workers", 0, "--out", folder / "clean")
        attack = ("attack", folder / "clean", "--images", 19, "--attack", "fgsm", "--max-batch", 4,
                  "--eps", "8/255")
        stepped, whole, cut, resumed, finetuned, attacked = elsewhere(
            (*step, folder / "two", "--max-batch", 300), (*train, folder / "whole"),
            (1, *train, folder / "part"), ("pretrain", "--out", folder / "part", "--resume"),
            clean, attack, processes=2)
        self.assertEqual(cut.code, 130)
        for result in (stepped, whole, resumed, finetuned, attacked):
            finished(result)
        self.one_step(step, folder)

        # the run that was cut; one process wrote it
        self.assertEqual(resumed.out.count("going on after epoch 1 of 2"), 1)
        assert_same_run(folder / "part", folder / "whole")

        # attack.py counts each image once, and one process prints
        finished(run(*attack))
        two, one = read_csv(folder / "attack.csv")
        self.assertEqual(attacked.out.count("8/255"), 1)
        self.assertEqual(one["images"], "19")
        for row in (one, two):
            self.assertEqual(len(row.pop("pixels")), 12)  # each process looks at its own share
        self.assertEqual({**one, "seconds": 0}, {**two, "seconds": 0})

    def one_step(self, step, folder):
        """Without noise two processes, and micro-batches, have the gradient that one has.

        After one step AdamW's first moment is 0.1 times the gradient.
        """
        for name, most in (("one", 598), ("micro", 299)):
            finished(run(*step, folder / name, "--max-batch", most))
        gradients, losses = [], []
        for name in ("one", "micro", "two"):
            state = saved(folder / name)["optimizer"]["state"].values()
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
