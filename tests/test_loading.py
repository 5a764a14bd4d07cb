"""Images that are loaded by other processes, and how a script ends."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import unittest
from unittest import mock

import torch
from torchvision import datasets

import finetune
from model import UserError
from support import cli, data
from support import training as training_steps
from tests.helpers import (REPOSITORY, assert_refused, assert_same_run, cut_after, finished, new_folder,
                           photo_autoencoder, photo_flags, photos, run, saved, training)


CPU = torch.device("cpu")


class TestLoading(unittest.TestCase):
    def test_workers_do_not_matter(self):
        """Exact resume: begun with two processes that load and augment, ended with none."""
        whole, part = new_folder() / "whole", new_folder() / "part"
        flags = ("finetune", "--autoencoder", photo_autoencoder(), *training(3))
        with mock.patch.object(finetune, "FEW", 1), mock.patch.object(data, "SMALL", 31):
            finished(run(*flags, "--workers", 0, "--out", whole))
            with cut_after(2):
                self.assertEqual(run(*flags, "--workers", 2, "--out", part).code, 130)
            finished(run("finetune", "--out", part, "--resume", "--workers", 0))
        assert_same_run(part, whole)

    def test_augmented_images(self):
        """Of photographs above 64 pixels are the same, bit by bit, whatever --workers."""
        transform, found = training_steps.finetune_transform(65, (0.5,) * 3, (0.2,) * 3), []
        for workers in (0, 1, 2):
            dataset = data.load_training_images(str(photos()), 65, transform, seed=4)
            self.assertFalse(data.in_memory(dataset))
            batches = data.TrainingBatches(dataset, 6, 3, 4, workers, CPU)
            images, labels = zip(*batches.epoch(2))
            found.append((torch.cat(images), torch.cat(labels)))
        self.assertEqual(found[0][0].shape, (24, 3, 65, 65))
        for images, labels in found[1:]:
            self.assertTrue(torch.equal(images, found[0][0]))
            self.assertTrue(torch.equal(labels, found[0][1]))

    def test_augmentation(self):
        """Of an image differs from epoch to epoch and from seed to seed, and repeats."""
        images = data.open_folder(str(photos()), "train")

        def draw(seed, epoch, index):
            dataset = data.Transformed(images, lambda image: torch.rand(3), seed)
            dataset.epoch = epoch
            return dataset[index][0]
        drawn = {key: draw(*key) for key in ((0, 0, 1), (0, 1, 1), (1, 0, 1), (0, 0, 2))}
        self.assertEqual(len({tuple(values.tolist()) for values in drawn.values()}), 4)
        torch.manual_seed(5)
        before = torch.get_rng_state()
        for key, values in drawn.items():
            self.assertTrue(torch.equal(draw(*key), values))
        self.assertTrue(torch.equal(torch.get_rng_state(), before))  # nobody else's numbers are used
        dataset = data.Transformed(images, lambda image: torch.rand(3), 0)
        batches = data.TrainingBatches(dataset, 8, 256, seed=0, workers=0, device=CPU)
        first, second, again = ({tuple(values.tolist()) for images, _ in batches.epoch(epoch)
                                 for values in images} for epoch in (0, 1, 0))
        self.assertEqual(len(first | second), 2 * 24)
        self.assertEqual(again, first)

    def test_ctrl_c_with_workers(self):
        """The whole group gets the signal, as from a terminal: exit code 130, and no traceback."""
        program = """if True:
            import os, signal
            import pretrain
            from support import cli, data, training
            data.SMALL, update, steps = 31, training.update, []

            def interrupt(*arguments):
                update(*arguments)
                steps.append(1)
                if len(steps) == 4:  # the first of the second epoch
                    os.killpg(0, signal.SIGINT)
            training.update = interrupt
            cli.run_script(pretrain.main, resumable=True)"""
        folder = new_folder() / "run"
        flags = (*training(500), *photo_flags()[:-2], "--workers", 2, "--device", "cpu", "--out", folder)
        ended = subprocess.run([sys.executable, "-c", program, *map(str, flags)], text=True, timeout=60,
                               capture_output=True, cwd=REPOSITORY, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        self.assertEqual(ended.returncode, 130, ended.stderr)
        self.assertNotIn("Traceback", ended.stderr)
        self.assertEqual(ended.stderr.count("go on with --resume in the same --out"), 1, ended.stderr)
        self.assertEqual(saved(folder)["epoch"], 1)

    def test_what_ctrl_c_says(self):
        """How to go on, where a run can be resumed."""
        for resumable in (True, False):
            with contextlib.redirect_stderr(io.StringIO()) as err, self.assertRaises(SystemExit) as stop:
                cli.run_script(mock.Mock(side_effect=KeyboardInterrupt), resumable)
            self.assertEqual(stop.exception.code, 130)
            self.assertEqual("--resume" in err.getvalue(), resumable)

    def test_other_errors(self):
        """A bug, or a limit of the machine, keeps its traceback, which names the place; none is worded."""
        for error in (RuntimeError("a bug"), MemoryError("none left"), torch.OutOfMemoryError("CUDA out"),
                      KeyError("x")):
            with mock.patch("pretrain.arguments", side_effect=error), \
                    self.assertRaises(type(error)) as raised:
                run("pretrain")
            self.assertIs(raised.exception, error)
        with mock.patch("pretrain.arguments", side_effect=OSError(28, "No space left on device", "a.csv")):
            assert_refused(run("pretrain"), ("No space left", "a.csv", "what was saved before is kept"))

    def test_split(self):
        for name in ("digits", str(photos()), "cifar10"):
            with self.assertRaisesRegex(UserError, "train, val, test"):
                data.load_images(name, "foo", 32)

    def test_download(self):
        """By the process of rank 0, while the others wait; then by them, who find it there."""
        for rank, expected in ((0, ["download", "wait", "open"]), (1, ["wait", "open"])):
            order = []

            def make(folder, train, download=False):
                order.append("download" if download else "open")
                return mock.Mock(classes=["a"], targets=[0])
            with mock.patch.object(cli, "rank", return_value=rank), \
                    mock.patch.object(datasets, "CIFAR10", make), \
                    mock.patch.object(cli, "sum_over_processes", lambda *values: order.append("wait")):
                data.open_cifar10("test", 32)
            self.assertEqual(order, expected)
