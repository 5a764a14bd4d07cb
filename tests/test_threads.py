"""Tiny models use the number of CPU threads that pays at this moment, and a resumed run repeats it.

Two threads beside a busy process are what is slow: as little as possible is computed with them here.
"""

import os
import unittest
from unittest import mock

import torch

from support import cli
from tests.helpers import (cut_after, finished, new_folder, photo_autoencoder, photo_classifier,
                           photo_flags, photo_runs, photos, run, saved, training)


def threads_given(number=None):
    """Inside, OMP_NUM_THREADS is this number, or not given."""
    others = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    given = {} if number is None else {"OMP_NUM_THREADS": str(number)}
    return mock.patch.dict(os.environ, others | given, clear=True)


class TestThreads(unittest.TestCase):
    def setUp(self):
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())

    def choose(self, slow):
        """What is chosen on a machine on which a block takes three times as long with so many threads."""
        now = [1000.0]

        def block(tokens):
            now[0] += 0.03 if torch.get_num_threads() == slow else 0.01
            return torch.zeros(1, requires_grad=True)
        torch.set_num_threads(2)
        with mock.patch.object(cli, "Block", return_value=block), threads_given(), \
                mock.patch("time.perf_counter", lambda: now[0]):
            cli.choose_threads()
        self.assertLess(now[0], 1000.5)
        return torch.get_num_threads()

    def test_what_pays(self):
        for slow, chosen in ((2, 1), (1, 2), (None, 1)):  # as fast with one: the others stay free
            self.assertEqual(self.choose(slow), chosen)

    def test_measured(self):
        """With a real block and clock: one of the two."""
        torch.set_num_threads(2)
        with threads_given():
            cli.choose_threads()
        self.assertIn(torch.get_num_threads(), (1, 2))

    def test_given_by_the_user(self):
        """OMP_NUM_THREADS, or one thread alone, decides without measuring."""
        with mock.patch.object(cli, "Block", side_effect=AssertionError("measured")):
            for given, allowed in ((2, 2), (1, 1), (None, 1)):
                torch.set_num_threads(allowed)
                with threads_given(given):
                    cli.choose_threads()
                self.assertEqual(torch.get_num_threads(), allowed)

    def test_when_it_is_chosen(self):
        """By every stage for tiny on a CPU when a run begins; not by one that goes on, nor for larger."""
        part, tiny = new_folder() / "part", ("--size", "tiny")
        nim, clean = photo_autoencoder(), photo_classifier("clean")
        for chosen, cut, script, *flags in [
                (True, 1, "pretrain", "--data", photos(), *tiny, *training(2), "--out", part),
                (False, None, "pretrain", "--out", part, "--resume"),
                (False, 0, "pretrain", "--data", photos(), "--size", "small", "--out", new_folder()),
                (True, 0, "finetune", "--autoencoder", nim, *training(), "--out", new_folder()),
                (True, None, "attack", clean, "--images", 2, "--steps", 1, "--out", new_folder())]:
            with mock.patch.object(cli, "choose_threads") as choose, cut_after(cut):
                result = run(script, *flags)
            self.assertEqual(result.code, 0 if cut is None else 130, result)
            self.assertEqual(choose.call_count, chosen, (script, flags))

    def test_kept_in_the_checkpoint(self):
        """The number that was chosen; a run that goes on takes it, if the user allows so many."""
        out = new_folder() / "nim"
        with mock.patch.object(cli, "choose_threads", lambda: torch.set_num_threads(1)), cut_after(0):
            torch.set_num_threads(2)
            run("pretrain", *photo_flags(), *training(), "--out", out)
        self.assertEqual(saved(out)["threads"], 1)
        for trained_with, allowed, goes_on_with in ((1, 2, 1), (2, 2, 2), (2, 1, 1)):
            out = photo_runs()
            torch.save({**saved(out), "threads": trained_with}, out / "checkpoint.pt")
            torch.set_num_threads(allowed)
            result = finished(run("pretrain", "--out", out, "--resume"))  # shows its result
            self.assertEqual(torch.get_num_threads(), goes_on_with)
            said = f"was trained with {trained_with} CPU threads, here there are {allowed}" in result.out
            self.assertEqual(said, goes_on_with < trained_with)
