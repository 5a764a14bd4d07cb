"""Images that are loaded by other processes, and what may go wrong with the machine."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import unittest
from unittest import mock

import torch

import finetune
from model import UserError
from support import cli, data
from tests.helpers import (REPOSITORY, assert_refused, assert_same_run, cut_after, finished, new_folder,
                           photo_autoencoder, photo_flags, photos, run, training)


class TestLoading(unittest.TestCase):
    def test_workers_do_not_matter(self):
        """Exact resume: begun with two processes that load and augment, ended with none."""
        whole, part = new_folder() / "whole", new_folder() / "part"
        flags = ("finetune", "--autoencoder", photo_autoencoder(), *training(3))
        with mock.patch.object(finetune, "AUGMENT_FROM", 1), mock.patch.object(data, "MEMORY", 0):
            finished(run(*flags, "--workers", 0, "--out", whole))
            with cut_after(2):
                self.assertEqual(run(*flags, "--workers", 2, "--out", part).code, 130)
            finished(run("finetune", "--out", part, "--resume", "--workers", 0))
        assert_same_run(part, whole)

    def test_augmentation(self):
        """Of an image differs from epoch to epoch and from seed to seed, and repeats."""
        with mock.patch.object(data, "MEMORY", 0):
            dataset = data.load_dataset(str(photos()), "train", 32, lambda image: torch.rand(3))
        drawn = {key: dataset[key][0] for key in ((0, 0, 1), (0, 1, 1), (1, 0, 1), (0, 0, 2))}
        self.assertEqual(len({tuple(values.tolist()) for values in drawn.values()}), 4)
        torch.manual_seed(5)
        before = torch.get_rng_state()
        for key, values in drawn.items():
            self.assertTrue(torch.equal(dataset[key][0], values))
        self.assertTrue(torch.equal(torch.get_rng_state(), before))  # nobody else's numbers are used
        batches = data.TrainingBatches(dataset, 8, 256, seed=0, workers=0, device="cpu")
        first, second, again = ({tuple(values.tolist()) for images, _ in batches.epoch(epoch)
                                 for values in images} for epoch in (0, 1, 0))
        self.assertEqual(len(first | second), 2 * 24)
        self.assertEqual(again, first)

    def test_killed_worker(self):
        """One sentence, whatever the process was doing."""
        def die(path):
            os.kill(os.getpid(), signal.SIGKILL)
        data.about(str(photos()))  # which reads images as well, in this process
        with mock.patch.object(data, "MEMORY", 0), mock.patch.object(data, "read_image", die):
            result = run("pretrain", *training(2), *photo_flags()[:-2], "--workers", 1,
                         "--out", new_folder())
        assert_refused(result, ("was killed", "fewer --workers"))

    def test_ctrl_c_with_workers(self):
        """The whole group gets the signal, as from a terminal: exit code 130, and no traceback."""
        program = ("import pretrain\nfrom support import cli, data\ndata.MEMORY = 0\n"
                   "cli.run_script(pretrain.main, resumable=True)")
        folder = new_folder() / "run"
        flags = (*training(500), *photo_flags()[:-2], "--workers", 2, "--device", "cpu")
        running = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, flags), "--out", folder], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while not (folder / "checkpoint.pt").exists():
            self.assertIsNone(running.poll())
            time.sleep(0.01)
        time.sleep(0.2)
        os.killpg(running.pid, signal.SIGINT)
        _, err = running.communicate(timeout=60)
        self.assertEqual(running.returncode, 130, err)
        self.assertNotIn("Traceback", err)
        self.assertEqual(err.count("go on with the same command and --resume"), 1, err)

    def test_what_ctrl_c_says(self):
        """How to go on, where a run can be resumed."""
        for resumable in (True, False):
            with contextlib.redirect_stderr(io.StringIO()) as err, self.assertRaises(SystemExit) as stop:
                cli.run_script(mock.Mock(side_effect=KeyboardInterrupt), resumable)
            self.assertEqual(stop.exception.code, 130)
            self.assertEqual("--resume" in err.getvalue(), resumable)

    def test_out_of_memory(self):
        """Of a GPU, of PyTorch's allocator for the CPU, of Python: what to do."""
        for error in (torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                      RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't "
                                   "allocate memory: you tried to allocate 9 bytes.")):
            with mock.patch("pretrain.arguments", side_effect=error):
                assert_refused(run("pretrain"), ("out of memory", "--max-batch"))
        with mock.patch("pretrain.arguments", side_effect=RuntimeError("a bug")), \
                self.assertRaisesRegex(RuntimeError, "a bug"):
            run("pretrain")

    def test_split(self):
        for name in ("digits", str(photos()), "cifar10"):
            with self.assertRaisesRegex(UserError, "train, val, test"):
                data.load_dataset(name, "foo", 32)

    def test_download(self):
        """By the process of rank 0, while the others wait; then by them, who find it there."""
        for rank, expected in ((0, ["download", "wait", "open"]), (1, ["wait", "open"])):
            order = []

            def make(folder, train, download=False):
                order.append("download" if download else "open")
                return mock.Mock(classes=["a"], targets=[0])
            with mock.patch.object(cli, "rank", return_value=rank), \
                    mock.patch.object(cli, "sum_over_processes", lambda *values: order.append("wait")):
                data.open_cifar(make, "test", 32)
            self.assertEqual(order, expected)
