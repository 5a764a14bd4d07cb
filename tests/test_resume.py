"""Runs that were cut short go on as if nothing had happened; finished runs are kept."""

import shlex
import shutil
import unittest
from pathlib import Path
from unittest import mock

import torch

import finetune
import pretrain
from model import SIZES
from support import data
from support import run as run_module
from tests.helpers import (assert_refused, assert_same_run, copy_of_photos, cut_after, finished,
                           in_processes, kill_after_first_save, new_folder, photo_autoencoder,
                           photo_flags, photo_runs, photos, read_csv, run, saved, training)


def settings(folder, *names):
    """Those settings of a run."""
    return [saved(folder)["settings"][name] for name in names]


class TestResume(unittest.TestCase):
    def test_killed(self):
        """Bit by bit the run that was never killed; all settings come from the checkpoint."""
        whole, killed = new_folder() / "whole", new_folder() / "killed"
        flags = (*training(20, warmup=2), *photo_flags())
        finished(run("pretrain", *flags, "--out", whole))
        kill_after_first_save("pretrain", flags, killed)
        stopped = saved(killed)["epoch"]
        self.assertTrue(1 <= stopped < 20)
        left_over = killed / ".checkpoint.pt.0123.tmp"
        left_over.write_bytes(b"half a file")
        assert_refused(run("pretrain", *flags, "--out", killed),
                       (f"unfinished run, epoch {stopped} of 20", "--resume", "--overwrite", "--out"))
        resumed = finished(run("pretrain", "--out", killed, "--resume", "--workers", 0))
        self.assertIn(f"going on after epoch {stopped} of 20", resumed.out)
        assert_same_run(killed, whole)
        self.assertFalse(left_over.exists())

    def test_every_kind(self):
        """Cut after one of two epochs, in every kind of training."""
        nim, mim = photo_autoencoder(), photo_autoencoder("mim")
        for script, *flags in [
                ("pretrain", "--task", "mim"), ("pretrain", "--max-batch", 4, "--norm-pix"),
                ("pretrain", "--bf16"),
                ("finetune", "--mode", "clean"), ("finetune", "--mode", "no-denoise", "--sigma", 40),
                ("finetune", "--mode", "clean", "--from-scratch", "--seed", 3),
                ("finetune", "--mode", "de3", "--adversarial", "8/255"),
                ("finetune", "--autoencoder", mim, "--keep-visible", "--max-mask-ratio", 0.5)]:
            with self.subTest(script, flags=flags):
                if script == "pretrain" or "--from-scratch" in flags:
                    flags += photo_flags()
                elif mim not in flags:
                    flags += ("--autoencoder", nim)
                whole, part = new_folder() / "whole", new_folder() / "part"
                flags += (*training(2, warmup=1), "--workers", 0)
                finished(run(script, *flags, "--out", whole))
                with cut_after(1):
                    self.assertEqual(run(script, *flags, "--out", part).code, 130)
                self.assertEqual(saved(part)["epoch"], 1)
                finished(run(script, "--out", part, "--resume", "--workers", 0))
                assert_same_run(part, whole)

    def test_photographs(self):
        """Loaded from the disk one by one, with the paper's augmentation, its mixing and drop path."""
        with mock.patch.object(data, "MEMORY", 0), mock.patch.object(finetune, "AUGMENT_FROM", 1):
            for script, *flags in (("pretrain", *photo_flags()),
                                   ("finetune", "--autoencoder", photo_autoencoder(), "--workers", 0)):
                whole, part = new_folder() / "whole", new_folder() / "part"
                flags += training(3)
                with mock.patch.dict(finetune.RECIPES["tiny"], drop_path=0.3):
                    finished(run(script, *flags, "--out", whole))
                    with cut_after(2):
                        self.assertEqual(run(script, *flags, "--out", part).code, 130)
                finished(run(script, "--out", part, "--resume", "--workers", 0))  # drop path and all
                assert_same_run(part, whole)

    def test_between_two_files(self):
        """Cut before checkpoint.pt or between it and log.csv: in the end every row is there, once."""
        whole, flags = new_folder() / "whole", (*training(4), *photo_flags())
        write = run_module.write_whole
        finished(run("pretrain", *flags, "--out", whole))
        for name in ("checkpoint.pt", "log.csv"):
            part, written = new_folder() / "part", []

            def cut_short(path, save):
                written.append(path.name)
                if written.count(name) == 3:
                    raise KeyboardInterrupt
                write(path, save)
            with self.subTest(name), mock.patch.object(run_module, "write_whole", cut_short):
                stopped = run("pretrain", *flags, "--out", part)
            self.assertEqual(stopped.code, 130)
            finished(run("pretrain", "--out", part, "--resume", "--workers", 0))
            assert_same_run(part, whole)

    def test_killed_before_the_first_save(self):
        folder = new_folder() / "run"
        folder.mkdir()
        (folder / ".checkpoint.pt.0123.tmp").write_bytes(b"half a file")
        result = finished(run("pretrain", *training(), *photo_flags(), "--out", folder, "--resume"))
        self.assertIn("starting over", result.out)
        assert_same_run(folder, photo_autoencoder())

    def test_advice(self):
        """What an interrupted training says to do can be done, with --overwrite and without."""
        folder = Path(shutil.copytree(photo_autoencoder(), new_folder() / "nim"))
        command = ("pretrain", *training(3), *photo_flags(), "--out", folder, "--overwrite")
        with cut_after(1):
            stopped = run(*command)
        self.assertIn("go on with --resume in the place of --overwrite", stopped.err)
        finished(run(*command[:-1], "--resume"))
        self.assertEqual(saved(folder)["epoch"], 3)

    def test_unfinished(self):
        """A later stage names the command that finishes the run; done as printed, it does."""
        folder = new_folder() / "my runs" / "nim"
        with cut_after(1):
            run("pretrain", *training(3), "--sigma", 120, *photo_flags(), "--out", folder)
        stage = ("finetune", "--mode", "clean", "--autoencoder", folder, *training())
        refusal = run(*stage)
        assert_refused(refusal, ("unfinished (epoch 1 of 3)", "finish it with: python pretrain.py "))
        command = shlex.split(refusal.err.split("finish it with: python ")[1])
        finished(run(command[0].removesuffix(".py"), *command[1:], "--workers", 0))
        self.assertEqual(settings(folder, "sigma", "epochs"), ["120", 3])
        finished(run(*stage))
        path = folder.with_name("clean") / "checkpoint.pt"
        torch.save({**torch.load(path), "epochs": 5}, path)
        assert_refused(run("attack", path.parent), ("finish it with: python finetune.py", "--resume"))

    def test_settings(self):
        """A flag that differs from the checkpoint is refused by name, one that says the same is not."""
        nim, de3, sources = new_folder() / "nim", new_folder() / "de3", photo_autoencoder()
        first = {nim: ("pretrain", *training(2), "--sigma", 75, *photo_flags(), "--max-batch", 16),
                 de3: ("finetune", *training(2), "--autoencoder", sources, "--sigma", 40)}
        for folder, command in first.items():
            with cut_after(1):
                run(*command, "--out", folder)
        for folder, flag, value in [
                (nim, "--sigma", 76), (nim, "--epochs", 3), (nim, "--seed", 1), (nim, "--task", "mim"),
                (nim, "--size", "small"), (nim, "--max-batch", 4), (nim, "--bf16", None),
                (nim, "--data", "digits"), (nim, "--batch-size", 4), (nim, "--norm-pix", None),
                (nim, "--init", "x.pth"), (de3, "--mode", "clean"), (de3, "--base-lr", 1e-3),
                (de3, "--adversarial", "8/255"), (de3, "--arch", "resnet18"), (de3, "--sigma", "41"),
                (de3, "--warmup-epochs", 1)]:
            before = (folder / "checkpoint.pt").read_bytes()
            with self.subTest(flag):
                result = run(first[folder][0], "--out", folder, "--resume", flag,
                             *([] if value is None else [value]))
                assert_refused(result, (f"{flag} is ", "leave the flag out"))
                self.assertEqual((folder / "checkpoint.pt").read_bytes(), before)
        for folder, command in first.items():
            finished(run(*command, "--out", folder, "--resume"))
            self.assertEqual(saved(folder)["epoch"], 2)

    def test_what_has_no_flag(self):
        """The recipe, sizes and statistics of the checkpoint count, not those of today's code."""
        whole, part = new_folder() / "whole", new_folder() / "part"
        flags = (*training(2), *photo_flags())
        finished(run("pretrain", *flags, "--out", whole))
        with cut_after(1):
            run("pretrain", *flags, "--out", part)
        row = data.about(str(photos()))._replace(mean=(0.1,) * 3, pretrain_sigma="gamma:1,1")
        with mock.patch.dict(SIZES["tiny"], depth=1), \
                mock.patch.object(data, "about", lambda name: row), \
                mock.patch.dict(pretrain.RECIPES["tiny"], weight_decay=0.4):
            finished(run("pretrain", "--out", part, "--resume", "--workers", 0))
        assert_same_run(part, whole)

    def test_new_setting(self):
        """What an old checkpoint does not say has its default: the run is kept, and goes on."""
        nim = photo_autoencoder()
        for script, flag, *flags in (("pretrain", "init", *photo_flags()),
                                     ("finetune", "init", "--autoencoder", nim, "--workers", 0)):
            whole, part = new_folder() / "whole", new_folder() / "part"
            flags += training(2)
            finished(run(script, *flags, "--out", whole))
            with cut_after(1):
                run(script, *flags, "--out", part)
            checkpoint = saved(part)
            for name in (flag, "weight_decay"):  # with a flag, and without one
                del checkpoint["settings"][name]
            torch.save(checkpoint, part / "checkpoint.pt")
            with self.subTest(script):
                finished(run(script, "--out", part, "--resume", "--workers", 0))
                assert_same_run(part, whole)
                self.assertIn("run kept", finished(run(script, *flags, "--out", part)).out)
                assert_refused(run(script, *flags, "--out", part, "--init", "x.pth"), "init x.pth here")

    def test_moved_data(self):
        """--data says where the folder of images is now, if it is gone where it was; nothing else."""
        whole, part, images = new_folder() / "whole", new_folder() / "part", copy_of_photos()
        flags = (*training(2), *photo_flags(images))
        finished(run("pretrain", *flags, "--out", whole))
        with cut_after(1):
            run("pretrain", *flags, "--out", part)
        moved = new_folder() / "elsewhere"
        resume = ("pretrain", "--out", part, "--resume", "--workers", 0, "--data")
        shutil.copytree(images, moved)
        assert_refused(run(*resume, moved), "--data is ")  # which of the two?
        shutil.rmtree(images)
        assert_refused(run(*resume[:-1]), ("no folder", "--data"))
        assert_refused(run(*resume, moved / "nowhere"), "--data is ")
        result = finished(run(*resume, f"{moved}/"))
        self.assertNotIn("other images", result.out)
        assert_same_run(part, whole)

    def test_digits_do_not_move(self):
        """A data set by name is no folder that is gone: other images are another run."""
        part = new_folder() / "part"
        with cut_after(1):
            run("pretrain", *training(2, 64), "--out", part)
        assert_refused(run("pretrain", "--out", part, "--resume", "--data", photos()), "--data is ")


class TestFinished(unittest.TestCase):
    def test_kept(self):
        """The same command again, or --resume, changes nothing; another one is refused."""
        folder = photo_runs()
        path, flags = folder / "checkpoint.pt", (*training(), *photo_flags(), "--out", folder)
        content, changed = path.read_bytes(), path.stat().st_mtime_ns
        for more in ((), ("--resume",), ("--workers", 1)):
            self.assertIn("finished run kept", finished(run("pretrain", *flags, *more)).out)
        for more, says in ((("--base-lr", 1e-5), "base_lr 0.04 there, 1e-05 here"),
                           (("--max-batch", 4), "max_batch 256 there, 4 here"),
                           (("--seed", 3), "seed 0 there, 3 here")):
            assert_refused(run("pretrain", *flags, *more), (says, "--resume", "--overwrite", "--out"))
        with mock.patch.dict(pretrain.RECIPES["tiny"], weight_decay=0.1):  # what has no flag counts too
            assert_refused(run("pretrain", *flags), "weight_decay 0.05 there, 0.1 here")
        assert_refused(run("finetune", "--mode", "clean", "--from-scratch", *flags),
                       "autoencoder weights")
        assert_refused(run("pretrain", *flags, "--resume", "--overwrite"), "exclude each other")
        self.assertEqual((path.read_bytes(), path.stat().st_mtime_ns), (content, changed))

    def test_overwrite(self):
        """Trains anew: the weights of a new run, and its log from the start."""
        folder, fresh = photo_runs(), new_folder() / "fresh"
        for more in (("--out", folder, "--overwrite"), ("--out", fresh)):
            finished(run("pretrain", *training(2), "--seed", 4, *photo_flags(), *more))
        assert_same_run(folder, fresh)
        self.assertEqual([row["epoch"] for row in read_csv(folder / "log.csv")], ["1", "2"])

    def test_default_folders(self):
        """Beside the autoencoder, named by what is trained; each is kept for itself."""
        nim = photo_runs()
        for flags, name in ((("--mode", "no-denoise"), "no-denoise"), (("--mode", "clean"), "clean"),
                            (("--adversarial", "8/255"), "adversarial"), ((), "de3")):
            command = ("finetune", "--autoencoder", nim, *training(), *flags)
            self.assertIn(f"the run is in {nim.with_name(name)}\n", finished(run(*command)).out)
            self.assertIn("finished run kept", finished(run(*command)).out)
        names = {path.name for path in nim.parent.iterdir()}
        self.assertEqual(names, {"nim", "no-denoise", "clean", "adversarial", "de3"})

    def test_trained_elsewhere(self):
        """A folder in which another process trains is left alone, whatever the flags say."""
        folder = photo_runs()
        before = (folder / "checkpoint.pt").read_bytes()
        lock = run_module.take_lock(folder / ".lock", wait=False)

        def attempt(more):
            result = run("pretrain", *training(), *photo_flags(), "--out", folder, *more)
            assert_refused(result, ("another process is training in", folder, "--out"))
        for more in ((), ("--resume",), ("--overwrite",)):
            self.assertEqual(in_processes(attempt, (more,)), [0])
        self.assertEqual((folder / "checkpoint.pt").read_bytes(), before)
        lock.close()
        finished(run("pretrain", *training(2), *photo_flags(), "--out", folder, "--overwrite"))
