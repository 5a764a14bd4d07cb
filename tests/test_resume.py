"""Runs that were cut short go on as if nothing had happened; a folder with a run is not trained over."""

import contextlib
import io
import shlex
import shutil
import unittest
from pathlib import Path
from unittest import mock

from torch import nn
from torchvision.transforms import Normalize

import finetune
import pretrain
from model import CLASSIFIERS, SIZES
from support import data
from support import training as training_module
from tests.helpers import (assert_refused, assert_same_run, copy_of_photos, cut_after,
                           finished, kill_after_first_save, new_folder, photo_autoencoder, photo_classifier,
                           photo_flags, photo_runs, photos, read_csv, run, saved, training)


def settings(folder, *names):
    """Those settings of a run."""
    return [saved(folder)["settings"][name] for name in names]


def small_cnn(num_classes, mean, std, **vit_only):
    """A classifier of another --arch, with batch norm."""
    return nn.Sequential(Normalize(mean, std), nn.Conv2d(3, 8, kernel_size=8, stride=8), nn.BatchNorm2d(8),
                         nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, num_classes))


class TestResume(unittest.TestCase):
    def test_killed(self):
        """Bit by bit the run that was never killed; all settings come from the checkpoint."""
        whole, killed = new_folder() / "whole", new_folder() / "killed"
        flags = (*training(12), *photo_flags())
        finished(run("pretrain", *flags, "--out", whole))
        kill_after_first_save("pretrain", flags, killed)
        stopped = saved(killed)["epoch"]
        self.assertTrue(1 <= stopped < 12)
        assert_refused(run("pretrain", *flags, "--out", killed),
                       (f"{killed} holds a run", "--resume", "--overwrite", "--out"))
        resumed = finished(run("pretrain", "--out", killed, "--resume", "--workers", 0))
        self.assertIn(f"going on after epoch {stopped} of 12", resumed.out)
        assert_same_run(killed, whole)

    @mock.patch.dict(CLASSIFIERS, cnn=small_cnn)
    def test_every_kind(self):
        """Cut after one of two epochs, in every kind of training."""
        nim, mim = photo_autoencoder(), photo_autoencoder("mim")
        for script, *flags in [
                ("pretrain", "--task", "mim"), ("pretrain", "--max-batch", 4, "--norm-pix"),
                ("pretrain", "--bf16"), ("pretrain", "--init", nim),
                ("finetune", "--mode", "clean"), ("finetune", "--mode", "no-denoise", "--sigma", 40),
                ("finetune", "--mode", "clean", "--from-scratch", "--seed", 3),
                ("finetune", "--mode", "de3", "--adversarial", "8/255"),
                ("finetune", "--arch", "cnn"), ("finetune", "--autoencoder", mim),
                ("finetune", "--autoencoder", mim, "--mode", "mim-visible")]:
            with self.subTest(script, flags=flags):
                if script == "pretrain" or "--from-scratch" in flags:
                    flags += photo_flags()
                elif mim not in flags:
                    flags += ("--autoencoder", nim)
                whole, part = new_folder() / "whole", new_folder() / "part"
                flags += (*training(2), "--workers", 0)
                finished(run(script, *flags, "--out", whole))
                with cut_after(1):
                    self.assertEqual(run(script, *flags, "--out", part).code, 130)
                self.assertEqual(saved(part)["epoch"], 1)
                finished(run(script, "--out", part, "--resume", "--workers", 0))
                assert_same_run(part, whole)

    def test_same_command(self):
        """With all its flags once more, as clusters do it: what they say is what the run was made with."""
        for script, *flags in [
                ("pretrain", *photo_flags(), "--init", photo_autoencoder(), "--sigma", "30.0"),
                ("finetune", "--autoencoder", photo_autoencoder(), "--sigma", "gamma:9.0,4", "--workers", 0),
                ("finetune", "--adversarial", "8/255", "--from-scratch", *photo_flags())]:
            whole, part = new_folder() / "whole", new_folder() / "part"
            finished(run(script, *flags, *training(2), "--out", whole))
            with cut_after(1):
                run(script, *flags, *training(2), "--out", part, "--resume")
            finished(run(script, *flags, *training(2), "--out", part, "--resume"))
            assert_same_run(part, whole)

    def test_other_groups(self):
        """An optimizer's settings would be those that were saved, whatever the code of now says: refused."""
        out, groups = new_folder() / "run", training_module.parameter_groups
        flags = (*training(2), *photo_flags(), "--out", out)
        with cut_after(1):
            run("pretrain", *flags)
        with mock.patch.object(training_module, "parameter_groups", lambda model, weight_decay: groups(model, 20.0)):
            assert_refused(run("pretrain", *flags, "--resume"), ("parameter groups are others", "--overwrite"))
        finished(run("pretrain", *flags, "--resume"))

    def test_photographs(self):
        """Loaded from the disk one by one, with the paper's augmentation, its mixing and drop path."""
        with mock.patch.object(data, "SMALL", 16), mock.patch.object(finetune, "FEW", 1):
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
        self.assertEqual(saved(whole)["settings"]["augmentation"], "paper")

    def test_nothing_there(self):
        """--resume begins the run, as jobs on clusters do that may be started again at any time."""
        folder = new_folder() / "run"
        command = ("pretrain", *training(), *photo_flags(), "--out", folder, "--resume")
        with cut_after(0):
            self.assertEqual(run(*command).code, 130)
        self.assertIn("going on after epoch 0 of 1", finished(run(*command)).out)
        assert_same_run(folder, photo_autoencoder())

    def test_advice(self):
        """What an interrupted training says to do can be done, also after --overwrite."""
        folder = Path(shutil.copytree(photo_autoencoder(), new_folder() / "nim"))
        command = ("pretrain", *training(3), *photo_flags(), "--out", folder, "--overwrite")
        with cut_after(1):
            stopped = run(*command)
        self.assertIn("go on with --resume in the same --out", stopped.err)
        finished(run(*command[:-1], "--resume"))
        self.assertEqual(saved(folder)["epoch"], 3)

    def test_unfinished(self):
        """A later stage names the command that finishes the run; done as printed, it does."""
        folder = new_folder() / "my runs" / "nim"
        with cut_after(1):
            run("pretrain", *training(3), "--sigma", 120, *photo_flags(), "--out", folder)
        stage = ("finetune", "--mode", "clean", "--autoencoder", folder, *training(2))
        refusal = run(*stage)
        assert_refused(refusal, ("unfinished (epoch 1 of 3)", "finish it with python pretrain.py "))
        command = shlex.split(refusal.err.split("finish it with python ")[1])
        finished(run(command[0].removesuffix(".py"), *command[1:], "--workers", 0))
        self.assertEqual(settings(folder, "sigma", "epochs"), ["120", 3])
        with cut_after(0):
            run(*stage)
        assert_refused(run("attack", folder.with_name("clean")),
                       ("unfinished (epoch 0 of 2)", "finish it with python finetune.py", "--resume"))

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
                (nim, "--batch-size", 4), (nim, "--norm-pix", None), (nim, "--init", sources),
                (de3, "--mode", "clean"), (de3, "--base-lr", 1e-3), (de3, "--from-scratch", None),
                (de3, "--adversarial", "8/255"), (de3, "--arch", "resnet18"), (de3, "--sigma", "41"),
                (de3, "--init", sources)]:
            before = (folder / "checkpoint.pt").read_bytes()
            with self.subTest(flag):
                result = run(first[folder][0], "--out", folder, "--resume", flag,
                             *([] if value is None else [value]))
                assert_refused(result, (f"{flag} is ", "leave the flag out"))
                self.assertEqual((folder / "checkpoint.pt").read_bytes(), before)
        assert_refused(run("finetune", "--out", nim, "--resume"), "autoencoder weights where classifier")
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
        with contextlib.redirect_stdout(io.StringIO()):
            row = data.about(str(photos()))._replace(mean=(0.1,) * 3, pretrain_sigma="gamma:1,1")
        with mock.patch.dict(SIZES["tiny"], depth=1), \
                mock.patch.object(data, "about", lambda *about: row), \
                mock.patch.dict(pretrain.RECIPES["tiny"], weight_decay=0.4):
            finished(run("pretrain", "--out", part, "--resume", "--workers", 0))
        assert_same_run(part, whole)

    def test_moved_data(self):
        """--data says where the folder of images is now; other images are refused."""
        whole, part, images = new_folder() / "whole", new_folder() / "part", copy_of_photos()
        flags = (*training(2), *photo_flags(images))
        finished(run("pretrain", *flags, "--out", whole))
        with cut_after(1):
            run("pretrain", *flags, "--out", part)
        moved = new_folder() / "elsewhere"
        resume = ("pretrain", "--out", part, "--resume", "--workers", 0, "--data")
        shutil.move(images, moved)
        assert_refused(run(*resume[:-1]), ("no folder", "if it has moved, say where with --data"))
        assert_refused(run(*resume, moved / "nowhere"), "no folder")
        fewer = Path(shutil.copytree(moved, new_folder() / "fewer"))
        (fewer / "train/red/0.png").unlink()
        assert_refused(run(*resume, fewer), ("begun on 24 images of 3 classes", "23 of 3 now"))
        finished(run(*resume, f"{moved}/"))
        assert_same_run(part, whole)
        self.assertEqual(saved(part)["data"]["name"], str(moved))
        finished(run("pretrain", "--out", part, "--resume", "--workers", 0))  # it is known now

    def test_digits_do_not_move(self):
        """Other images are another run."""
        part = new_folder() / "part"
        with cut_after(1):
            run("pretrain", *training(2, 64), "--out", part)
        assert_refused(run("pretrain", "--out", part, "--resume", "--data", photos()),
                       "was begun on 1197 images of 10 classes")


class TestFinished(unittest.TestCase):
    def test_result_is_shown_again(self):
        """--resume on a finished run trains nothing, and shows what it reached."""
        for script, source, words in (("pretrain", photo_autoencoder(), "PSNR in dB"),
                                      ("finetune", photo_classifier(), "validation images are right")):
            folder = Path(shutil.copytree(source, new_folder() / source.name))
            path = folder / "checkpoint.pt"
            before = path.read_bytes(), path.stat().st_mtime_ns
            with self.subTest(script):
                result = finished(run(script, "--out", folder, "--resume", "--workers", 0))
                self.assertIn(words, result.out)
                self.assertNotIn("\nepoch ", result.out)
                again = finished(run(script, "--out", folder, "--resume", "--workers", 0))
                self.assertEqual(again.out, result.out)
                self.assertEqual((path.read_bytes(), path.stat().st_mtime_ns), before)

    def test_refused(self):
        """A folder that holds a run: one sentence says the three things one may want, and nothing changes."""
        for script, source, flags in (
                ("pretrain", photo_autoencoder(), photo_flags()),
                ("finetune", photo_classifier(), ("--autoencoder", photo_autoencoder(), "--workers", 0))):
            path = source / "checkpoint.pt"
            before = path.read_bytes(), path.stat().st_mtime_ns
            for more in ((), ("--base-lr", 1e-5), ("--seed", 3)):
                assert_refused(run(script, *training(), *flags, *more, "--out", source),
                               (f"{source} holds a run", "--resume", "--overwrite", "--out"))
            assert_refused(run(script, *flags, "--out", source, "--resume", "--overwrite"), "not allowed")
            self.assertEqual((path.read_bytes(), path.stat().st_mtime_ns), before)
        assert_refused(run("finetune", "--from-scratch", *photo_flags(), "--out", photo_autoencoder()),
                       "holds a run")  # also one of another kind

    def test_other_autoencoder(self):
        """A run does not go on behind another autoencoder than it was begun behind; with the same it does."""
        nim, folder = photo_autoencoder(), new_folder() / "de3"
        flags = ("--workers", 0, *training(2), "--out", folder)
        with cut_after(1):
            run("finetune", "--autoencoder", nim, *flags)
        other = photo_autoencoder(epochs=2)
        assert_refused(run("finetune", "--autoencoder", other, *flags, "--resume"), "another autoencoder")
        self.assertEqual(saved(folder)["epoch"], 1)
        finished(run("finetune", "--autoencoder", nim, *flags, "--resume"))
        self.assertEqual(saved(folder)["epoch"], 2)

    def test_overwrite(self):
        """Trains anew: the weights of a new run, its log from the start, and other files are left."""
        folder, fresh = photo_runs(), new_folder() / "fresh"
        (folder / "notes.txt").write_text("mine")
        (folder / "purified").mkdir()
        (folder / "purified/photo.png").write_bytes(b"1")
        for more in (("--out", folder, "--overwrite"), ("--out", fresh)):
            finished(run("pretrain", *training(2), "--seed", 4, *photo_flags(), *more))
        assert_same_run(folder, fresh)
        self.assertEqual([row["epoch"] for row in read_csv(folder / "log.csv")], ["1", "2"])
        self.assertEqual((folder / "notes.txt").read_text(), "mine")
        self.assertEqual((folder / "purified/photo.png").read_bytes(), b"1")

    def test_overwrite_leaves_nothing_of_the_old_run(self):
        """Also if it ends before its first epoch: no log and no picture of weights that are gone."""
        folder = photo_runs()
        with cut_after(0):
            run("pretrain", *training(2), *photo_flags(), "--out", folder, "--overwrite")
        self.assertEqual([path.name for path in folder.iterdir()], ["checkpoint.pt"])
        self.assertEqual(saved(folder)["epoch"], 0)

    def test_overwrite_of_another_kind(self):
        """A damaged checkpoint, or one of another kind, is no obstacle."""
        folder = new_folder() / "run"
        folder.mkdir()
        (folder / "checkpoint.pt").write_bytes(b"damaged")
        flags = (*training(), *photo_flags(), "--out", folder)
        assert_refused(run("pretrain", *flags, "--resume"), "is damaged")
        finished(run("pretrain", *flags, "--overwrite"))
        finished(run("finetune", "--mode", "clean", "--from-scratch", *flags, "--overwrite"))
        self.assertEqual((saved(folder)["kind"], (folder / "pretrain.png").exists()), ("classifier", False))

    def test_default_folders(self):
        """Beside the autoencoder, named by what is trained; --resume finds each there."""
        nim = photo_runs()
        for flags, name in ((("--mode", "no-denoise"), "no-denoise"), (("--mode", "clean"), "clean"),
                            (("--adversarial", "8/255"), "adversarial"), ((), "de3")):
            command = ("finetune", "--autoencoder", nim, *training(), *flags)
            self.assertIn(f"the run is in {nim.with_name(name)};", finished(run(*command)).out)
            assert_refused(run(*command), f"{nim.with_name(name)} holds a run")
            self.assertIn("going on after epoch 1 of 1", finished(run(*command, "--resume")).out)
        names = {path.name for path in nim.parent.iterdir()}
        self.assertEqual(names, {"nim", "no-denoise", "clean", "adversarial", "de3"})

    def test_default_folder_of_other_data(self):
        """For images in a folder it is that folder's name, never the digits'; so is the autoencoder."""
        place = new_folder()
        with contextlib.chdir(place):
            assert_refused(run("finetune", "--data", photos(), *training()), "runs/photos/nim holds no run")
            finished(run("pretrain", *photo_flags(), *training()))
            finished(run("finetune", "--data", photos(), "--workers", 0, *training()))
            finished(run("finetune", "--data", photos(), "--resume"))
        found = {path.relative_to(place).as_posix() for path in place.rglob("checkpoint.pt")}
        self.assertEqual(found, {"runs/photos/nim/checkpoint.pt", "runs/photos/de3/checkpoint.pt"})
