"""Runs that were cut short go on as if nothing had happened; finished runs are kept."""

import signal
import time
import unittest
from unittest import mock

import torch

import finetune
import pretrain
from support import checkpoints, training as training_steps
from tests.helpers import (assert_refused, finished, kill_after_first_save, new_folder,
                           photo_autoencoder, photo_flags, photo_runs, process, read_csv, run, training)


class TestResume(unittest.TestCase):
    def assert_same_weights(self, a, b):
        a, b = torch.load(a), torch.load(b)
        self.assertEqual(a["epoch"], b["epoch"])
        self.assertEqual(list(a["model"]), list(b["model"]))
        for name in a["model"]:
            self.assertTrue(torch.equal(a["model"][name], b["model"][name]), name)

    def assert_same_log(self, a, b):
        """Each epoch once, and the same figures; only speed and command may differ."""
        other = dict(images_per_second="", command="")
        a, b = ([{**row, **other} for row in read_csv(path.with_name("log.csv"))] for path in (a, b))
        self.assertEqual(a, b)
        self.assertEqual([row["epoch"] for row in a], [str(1 + i) for i in range(len(a))])

    def check(self, script, whole_runs, killed_runs, *flags):
        flags = (*flags, *training(10, warmup=2))
        whole, = finished(run(script, *flags, *photo_flags(whole_runs))).wrote()
        flags += photo_flags(killed_runs)
        path = kill_after_first_save(script, flags, killed_runs)
        stopped = torch.load(path)["epoch"]
        self.assertTrue(1 <= stopped < 10)
        left_over = path.with_name(".checkpoint.pt.0123.tmp")
        left_over.write_bytes(b"half a file")
        assert_refused(run(script, *flags), "--resume")
        resumed = finished(run(script, *flags, "--resume"))
        self.assertIn(f"epoch {stopped} of 10", resumed.out)
        self.assertEqual(resumed.wrote(), [path])
        self.assert_same_weights(path, whole)
        self.assert_same_log(path, whole)
        self.assertFalse(left_over.exists())

    def test_pretrain(self):
        self.check("pretrain", new_folder(), new_folder())

    def test_finetune(self):
        self.check("finetune", photo_runs()[0], photo_runs()[0], "--mode", "de3")

    def test_finetune_augmented(self):
        """The draws of the paper's augmentation, and of mixing, are repeated as well."""
        whole_runs, cut_runs = photo_runs()[0], photo_runs()[0]
        flags = ("--mode", "de3", *training(4))
        with mock.patch.object(finetune, "AUGMENT_FROM", 1):
            whole, = finished(run("finetune", *flags, *photo_flags(whole_runs))).wrote()
            flags += photo_flags(cut_runs)
            with self.cut(checkpoints, "save_checkpoint", epoch=3):
                self.assertEqual(run("finetune", *flags).code, 130)
            path, = finished(run("finetune", *flags, "--resume")).wrote()
        self.assert_same_weights(path, whole)
        self.assert_same_log(path, whole)

    def cut(self, module, name, epoch):
        """End a run, as Ctrl-C does, at this epoch's call of a function."""
        function, calls = getattr(module, name), []

        def cut_short(*arguments):
            calls.append(arguments)
            if len(calls) == epoch:
                raise KeyboardInterrupt
            return function(*arguments)
        return mock.patch.object(module, name, cut_short)

    def test_log_between_two_saves(self):
        """Cut before an epoch is saved or before it is logged: every row is there, and once."""
        whole, = finished(run("pretrain", *training(4), *photo_flags(new_folder()))).wrote()
        for module, name in ((checkpoints, "save_checkpoint"), (training_steps, "write_log_row")):
            with self.subTest(name):
                flags = (*training(4), *photo_flags(new_folder()))
                with self.cut(module, name, epoch=3):
                    self.assertEqual(run("pretrain", *flags).code, 130)
                path, = finished(run("pretrain", *flags, "--resume")).wrote()
                self.assert_same_log(path, whole)

    def test_log_of_a_run_trained_anew(self):
        """--overwrite starts the log again."""
        flags = photo_flags(new_folder())
        finished(run("pretrain", *training(4), *flags))
        path, = finished(run("pretrain", *training(2), *flags, "--overwrite")).wrote()
        self.assertEqual([row["epoch"] for row in read_csv(path.with_name("log.csv"))], ["1", "2"])

    def test_interrupted(self):
        """Ctrl-C: exit code 130, how to go on, and a checkpoint that --resume takes up."""
        folder = new_folder()
        running = process("pretrain", *training(200), *photo_flags(folder))
        while not list(folder.rglob("checkpoint.pt")):
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate()
        self.assertEqual((running.returncode, err.count("--resume")), (130, 1))
        self.assertNotIn("Traceback", err)

    def test_killed_before_the_first_save(self):
        folder = new_folder()
        path = folder / "photos" / photo_autoencoder().name / "checkpoint.pt"
        path.parent.mkdir(parents=True)
        path.with_name(".checkpoint.pt.0123.tmp").write_bytes(b"half a file")
        result = finished(run("pretrain", *training(), *photo_flags(folder), "--resume"))
        self.assertIn("starting over", result.out)
        self.assert_same_weights(path, photo_autoencoder() / "checkpoint.pt")

    def test_finished_run(self):
        """Kept as it is, whatever is asked, but for --overwrite."""
        folder, source = photo_runs()
        path, flags = source / "checkpoint.pt", photo_flags(folder)
        content, changed = path.read_bytes(), path.stat().st_mtime_ns
        for more in ((), ("--resume",)):
            self.assertIn("finished", finished(run("pretrain", *training(), *flags, *more)).out)
        for more in (("--base-lr", 1e-5), ("--base-lr", 1e-5, "--resume")):
            assert_refused(run("pretrain", *training(), *flags, *more), ("base_lr", "--overwrite"))
        with mock.patch.dict(pretrain.RECIPES["tiny"], weight_decay=0.1):  # what has no flag counts too
            assert_refused(run("pretrain", *training(), *flags),
                           ("weight_decay 0.05 there, 0.1 here", "--overwrite"))
        self.assertEqual((path.read_bytes(), path.stat().st_mtime_ns), (content, changed))
        finished(run("pretrain", *training(2), *flags, "--overwrite"))
        self.assertEqual(torch.load(path)["epoch"], 2)
