"""Several processes under torchrun."""

import time
import unittest

import torch

from tests.helpers import (assert_near, copy_of_photos, finished, kill_after_first_save, new_folder,
                           photo_flags, read_csv, run, torchrun, training)


class TestProcesses(unittest.TestCase):
    def test_training(self):
        """Without noise two processes, and micro-batches, have the gradient that one has.

        After one step AdamW's first moment is 0.1 times the gradient.
        """
        gradients, losses = [], []
        for start, most in ((run, 299), (run, 598), (torchrun, 300)):
            path, = finished(start("pretrain", "--sigma", 0, *training(1, 1196), "--max-batch", most,
                                   "--runs", new_folder())).wrote()
            state = torch.load(path)["optimizer"]["state"].values()
            gradients.append(torch.cat([moments["exp_avg"].flatten() for moments in state]))
            row, = read_csv(path.with_name("log.csv"))
            losses.append(float(row["loss"]))
        self.assertGreater(gradients[0].abs().max(), 1e-3)
        for other in gradients[1:]:
            assert_near(other, gradients[0], atol=1e-7, rtol=1e-4)
        assert_near(torch.tensor(losses), torch.full((3,), losses[0]), atol=1e-5)

    def test_resume_and_attack(self):
        """A run that was killed goes on with two processes; attack.py counts each image once."""
        runs = new_folder()
        flags = (*training(10), *photo_flags(runs))
        path = kill_after_first_save("pretrain", flags, runs)
        result = finished(torchrun("pretrain", *flags, "--resume"))
        self.assertEqual((result.out.count("going on"), torch.load(path)["epoch"]), (1, 10))
        epochs = [row["epoch"] for row in read_csv(path.with_name("log.csv"))]
        self.assertEqual(epochs, sorted(set(epochs), key=int))  # one process writes it
        path, = finished(run("finetune", "--mode", "clean", *training(3), *photo_flags(runs))).wrote()
        flags = ("--classifier", path.parent, "--images", 19, "--attack", "fgsm", "--max-batch", 4,
                 "--eps", "8/255", *photo_flags(runs))
        for start in (run, torchrun):
            result = finished(start("attack", *flags))
        self.assertEqual(result.out.count("8/255"), 1)  # one process prints
        one, two = read_csv(runs / "photos/attack.csv")
        self.assertEqual({**one, "seconds": 0}, {**two, "seconds": 0})
        self.assertEqual(one["images"], "19")

    def test_a_process_dies(self):
        """torchrun ends the others; nothing hangs."""
        photos = copy_of_photos()
        (photos / "train/red/0.png").write_bytes(b"no image")  # in one process's share
        start = time.time()
        result = torchrun("pretrain", *training(100, 24), *photo_flags(new_folder(), photos))
        self.assertNotEqual(result.code, 0)
        self.assertIn("red/0.png", result.err)
        self.assertLess(time.time() - start, 90)
