"""Tiny models use the number of CPU threads that pays at this moment, and a resumed run repeats it."""

import contextlib
import io
import time
import unittest

import torch

from support import cli
from tests.helpers import finished, new_folder, run, saved, training

CPU = torch.device("cpu")


class TestThreads(unittest.TestCase):
    def setUp(self):
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(2)

    def slow_with(self, threads, seconds=0.01):
        """Work that takes three times as long with this number of threads."""
        return lambda: time.sleep(seconds * (3 if torch.get_num_threads() == threads else 1))

    def test_what_pays(self):
        for slow, chosen in ((2, 1), (1, 2)):
            torch.set_num_threads(2)
            self.assertEqual(cli.choose_threads(self.slow_with(slow), CPU), chosen)
            self.assertEqual(torch.get_num_threads(), chosen)

    def test_as_an_earlier_run(self):
        for wanted, chosen in ((1, 1), (2, 2), (8, 2)):  # never more than the user allows
            torch.set_num_threads(2)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                self.assertEqual(cli.choose_threads(self.slow_with(2), CPU, wanted), chosen)
            self.assertEqual("OMP_NUM_THREADS=8" in out.getvalue(), wanted == 8)
            self.assertEqual(torch.get_num_threads(), chosen)

    def test_one_allowed(self):
        torch.set_num_threads(1)
        self.assertEqual(cli.choose_threads(self.fail, CPU), 1)  # nothing to measure

    def test_large_work(self):
        """What takes seconds is not measured to the end, and keeps all threads."""
        calls = []
        started = time.perf_counter()
        self.assertEqual(cli.choose_threads(lambda: calls.append(time.sleep(1.1)), CPU), 2)
        self.assertLessEqual(len(calls), 3)
        self.assertLess(time.perf_counter() - started, 6)

    def test_kept_in_the_checkpoint(self):
        torch.set_num_threads(1)
        folder = new_folder() / "nim"
        finished(run("pretrain", *training(1, 64), "--out", folder))
        self.assertEqual(saved(folder)["threads"], 1)
