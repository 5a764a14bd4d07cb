"""Bad input is refused: a UserError from Python, one sentence and exit code 2 from a stage."""

import io
import math
import os
import unittest
import warnings
from unittest import mock

import torch

from attack import pgd
from model import De3, MaskAndFill, NoiseOnly, NoiseScale, UserError, add_noise
from support import cli, tested
from support.tested import parse_defense
from tests.helpers import (Result, RunsCode, assert_refused, finished, new_folder,
                           photo_autoencoder, photo_classifier, photo_flags, photo_runs, photos,
                           process, random_images, run, small_autoencoder, small_classifier, training)


class TestBadArguments(unittest.TestCase):
    """What model.py and pgd refuse."""

    def test_kind_of_error(self):
        """Callers need no class of this project to catch it."""
        self.assertTrue(issubclass(UserError, ValueError))

    def test_sizes_that_do_not_fit(self):
        for config, words in ((dict(image_size=30), "30.* 4"), (dict(patch_size=5), "16.* 5"),
                              (dict(patch_size=32), "16.* 32"), (dict(embed_dim=18), "18"),
                              (dict(num_heads=3), "3 heads")):
            with self.subTest(config), self.assertRaisesRegex(UserError, words):
                small_autoencoder(**config)
        with self.assertRaisesRegex(UserError, "16, 16"):
            small_classifier()(random_images(1, 3, 32, 32))

    def test_noise_scale(self):
        for text in ("-1", "nan", "inf", "uniform:30,0", "uniform:-1,3", "uniform:3",
                     "uniform:0,nan", "gamma:0,3", "gamma:25", "gamma:25,3,1", "normal:1,2", "much",
                     "", "1,2"):
            with self.subTest(text), self.assertRaises(UserError):
                NoiseScale.parse(text)

    def test_mask_ratio(self):
        for ratio in (1, -0.1, math.nan, 0.99):  # 0.99 leaves none of 16
            with self.subTest(ratio), self.assertRaises(UserError):
                small_autoencoder().mim(random_images(), ratio)

    def test_images(self):
        autoencoder, classifier, images = small_autoencoder(), small_classifier(), random_images()
        bad = images.clone()
        bad[0, 0, 0, 0] = math.nan
        for defense in (De3(autoencoder, classifier, 50), NoiseOnly(None, classifier, 0),
                        MaskAndFill(autoencoder, classifier, 0.5)):
            for wrong in (bad, images + 0.01, images - 1.01, images * 255, images.round().long(),
                          (images * 255).byte(), images[0], images.numpy(), images[:0]):
                with self.subTest(defense.title), self.assertRaises(UserError):
                    defense(wrong)
            within = images.clone()
            within.view(-1)[:2] = torch.tensor([1 + 5e-7, -5e-7])
            self.assertEqual(defense(within).shape, (4, 10))
            within.view(-1)[0] = 1 + 5e-6
            self.assertRaises(UserError, defense, within)

    def test_settings_of_defenses(self):
        models = small_autoencoder(), small_classifier()
        noise = torch.zeros(3, 16, 16)
        for kind, setting, more in [
                (De3, 50, dict(votes=0)), (De3, -1, {}), (De3, math.nan, {}), (De3, "off", {}),
                (De3, "uniform:0,30", dict(noise=noise)), (NoiseOnly, "gamma:25,3", dict(noise=noise)),
                (NoiseOnly, -1, {}), (MaskAndFill, 1, {}), (MaskAndFill, -0.1, {}),
                (MaskAndFill, math.nan, {}), (MaskAndFill, "gamma:1,1", {}),
                (MaskAndFill, "uniform:0,1", {}),
                (MaskAndFill, 0.5, dict(votes=0))]:
            with self.subTest(kind.title, setting=setting, **more), self.assertRaises(UserError):
                kind(*models, setting, **more)

    def test_names_of_defenses(self):
        """As --defense and the comparison's table take them."""
        self.assertEqual(parse_defense("off", (0, 50)), [("off", None)])
        self.assertEqual(parse_defense("de3:uniform:0,9", ()), [("de3", "uniform:0,9")])
        self.assertEqual(parse_defense("no-denoise", (0, 50)), [("no-denoise", 0), ("no-denoise", 50)])
        self.assertEqual(parse_defense("mim", (0, 50)), [("mim", r) for r in (0.25, 0.5, 0.75)])
        for text in ("jpeg:50", "De3:5", "", ":5"):
            self.assertRaisesRegex(UserError, "de3, no-denoise, mim, mim-visible and off", parse_defense,
                                   text, ())

    def test_settings_of_pgd(self):
        images, labels, model = random_images(6, 3, 16, 16), torch.arange(6), small_classifier()
        nan = images.clone()
        nan[0, 0, 0, 0] = math.nan
        for wrong, eps, steps, settings in [
                (images, 8, 1, {}), (images, -0.1, 1, {}), (images, math.nan, 1, {}),
                (images, math.inf, 1, dict(norm="l2")), (images, 0.1, 0, {}),
                (images, 0.1, 1, dict(norm="l1")), (images, 0.1, 1, dict(loss="mse")),
                (images, 0.1, 1, dict(restarts=0)), (images, 0.1, 1, dict(eot=0)),
                (images, 0.1, 1, dict(step_size=-1)), (images.long(), 0.1, 1, {}),
                (images * 255, 0.1, 1, {}), (images - 0.5, 0.1, 1, {}), (nan, 0.1, 1, {})]:
            with self.subTest(eps=eps, steps=steps, **settings), self.assertRaises(UserError):
                pgd(model, wrong, labels, eps, steps, **settings)

    def test_sigma_of_add_noise(self):
        for sigma in (-1, math.nan, math.inf, torch.tensor([1, 2, -3, 4.0]), torch.tensor(math.nan)):
            with self.subTest(sigma), self.assertRaisesRegex(UserError, "sigma must be finite"):
                add_noise(random_images(), sigma)

    def test_labels_of_pgd(self):
        """One long for each image; the same for targets."""
        images, labels, model = random_images(3, 3, 16, 16), torch.arange(3), small_classifier()
        for wrong in (torch.arange(6), labels[:2], labels.float(), labels[:, None]):
            with self.subTest(wrong), self.assertRaisesRegex(UserError, "labels"):
                pgd(model, images, wrong, 0.1, 1)
            with self.subTest(targets=wrong), self.assertRaisesRegex(UserError, "labels"):
                pgd(model, images, labels, 0.1, 1, targets=wrong)
        for dtype in (torch.bfloat16, torch.float16):
            with self.assertRaisesRegex(UserError, "float32"):
                pgd(model.to(dtype), images.to(dtype), labels, 0.1, 1)


class TestBadInput(unittest.TestCase):
    """What the stages refuse."""

    def refused(self, script, *arguments, says=()):
        """The stage refuses these arguments with a sentence that holds the words."""
        with self.subTest(script, arguments=arguments):
            assert_refused(run(script, *arguments), says)

    def test_flags_of_training(self):
        out = new_folder() / "run"
        for flags in (["--sigma", "-5"], ["--sigma", "nan"], ["--sigma", "uniform:30,0"],
                      ["--sigma", "1e300"], ["--sigma", "50", "--task", "mim"], ["--epochs", "0"],
                      ["--epochs", "x"], ["--epochs", "1.5"], ["--batch-size", "0"], ["--max-batch", "0"],
                      ["--seed", "x"], ["--base-lr", "x"], ["--base-lr", "-1"], ["--workers", "x"],
                      ["--task", "dae"], ["--size", "giant"], ["--arch", "unet"],
                      ["--flag-that-is-not"], ["--runs", out],
                      ["--resume", "--overwrite"]):
            self.refused("pretrain", "--out", out, *flags, says=flags[0].strip("-"))
        source = ("--autoencoder", photo_autoencoder(), "--out", out)
        for flags in (["--adversarial", "8/0"], ["--adversarial", "x"], ["--mode", "dirty"],
                      ["--arch", "vgg"], ["--keep-visible"], ["--sigma", "5", "--mode", "clean"],
                      ["--size", "huge"]):
            self.refused("finetune", *source, *flags, says=flags[0])
        self.refused("finetune", "--mode", "dirty", says=("dirty", "de3", "clean", "no-denoise"))
        self.refused("finetune", *source, "--from-scratch", "--mode", "clean", says="--autoencoder")
        self.refused("finetune", *source, "--arch", "resnet18", "--init", photo_classifier("clean"),
                     says="no weights in common")
        self.assertFalse((out / "checkpoint.pt").exists())

    def test_flags_of_evaluation(self):
        classifier, out = photo_classifier(), new_folder() / "out"
        for flags in (["--eps", "8/x"], ["--eps", "8/0"], ["--eps", "nan"], ["--eps", "-1/255"],
                      ["--steps", "0"], ["--eot", "0"], ["--restarts", "0"], ["--images", "0"],
                      ["--attack", "cw"], ["--loss", "mse"], ["--norm", "l1"], ["--sigma", "-1"],
                      ["--max-batch", "0"], ["--step-size", "x"], ["--norm", "l2"], ["--run", "x"],
                      ["--mask-ratio", "0.5"], ["--threat", "black"], ["--save", "x.npz"]):
            self.refused("attack", classifier, "--out", out, *flags, says=flags[0].strip("-"))
        self.refused("attack", classifier, "--out", out, "--eps", "8", says=("eps must be", "8/255"))
        for flag in ("--eps", "--step-size"):
            self.refused("attack", classifier, "--out", out, flag, "-1", says="is below 0")
        for level in ("de3:-1", "no-denoise:x", "de3:gamma:0,1"):
            self.refused("attack", classifier, "--defense", level, says="sigma")
        for level in ("mim:1", "mim:-0.1", "mim-visible:gamma:1,1"):
            self.refused("attack", photo_classifier("mim", "mim"), "--defense", level, says="must be")
        self.refused("attack", classifier, "--defense", "jpeg:50",
                     says=("jpeg", "de3, no-denoise, mim, mim-visible and off"))
        for flags in (["--votes", "0"], ["--eot", "0"], ["--steps", "0"], ["--split", "dev"]):
            self.refused("defend", classifier, *flags, says=flags[0])
        self.refused("attack", "--attack", "cw", says=("cw", "pgd+eot"))
        self.assertFalse(out.exists())

    def test_small_sigma(self):
        """Taken as it is, and said: the literature writes shares of the range."""
        for sigma, said in ((0.25, "write 63.75"), (0, ""), (25, ""), ("uniform:0,30", ""),
                            ("uniform:0,0.5", "write 127.5"), ("gamma:0.1,0.1", "")):
            with warnings.catch_warnings(record=True, action="always") as caught:
                De3(None, None, sigma)
            self.assertEqual(len(caught), bool(said))
            for warning in caught:
                self.assertIn("8-bit units", str(warning.message))
                self.assertIn(said, str(warning.message))
        attack = process("attack", photo_classifier(), "--defense", "de3:0.25", "--images", 2, "--eps", 0,
                         "--attack", "fgsm", "--out", new_folder())
        out, err = attack.communicate()
        self.assertIn("de3, σ = 0.25", out)
        self.assertEqual(err.count("write 63.75"), 1)
        self.assertTrue(err.startswith("warning: sigma is in 8-bit units"), err)

    def test_device(self):
        for script in ("pretrain", "finetune", "defend", "attack"):
            for device in ("nonsense", "cuda:99"):
                self.refused(script, "--device", device, says=device)

    def test_missing_runs(self):
        """The folder that was looked for, and the stage that makes such runs."""
        folder = new_folder()
        none = folder / "none"
        self.refused("finetune", "--autoencoder", none, says=(none, "make one with python pretrain.py"))
        self.refused("attack", none, says=(none, "make one with python finetune.py"))
        self.refused("defend", none, says=(none, "make one with python finetune.py"))
        self.refused("pretrain", *photo_flags(), "--init", none, "--out", folder / "new", says=none)
        self.assertFalse((folder / "new" / "checkpoint.pt").exists())
        file = photo_classifier() / "checkpoint.pt"
        self.refused("attack", file, says=f"{file} holds no run")  # a run is its folder
        self.refused("attack", photo_classifier("clean"), "--autoencoder", none,
                     says=(none, "pretrain.py"))
        self.refused("attack", photo_classifier("clean"), "--defense", "de3:50",
                     says=("no autoencoder for De³", "--autoencoder RUN"))

    def test_damaged_checkpoints(self):
        source = photo_runs()
        path, trace = source / "checkpoint.pt", source.parent / "trace"
        flags = ("--autoencoder", source, *training())
        whole = path.read_bytes()
        for content in (whole[:len(whole) // 2], b"", b"hello"):
            path.write_bytes(content)
            self.refused("finetune", *flags, says=path)
            if content:  # an empty one is of a run that has not begun
                self.refused("pretrain", "--out", source, "--resume", says=path)
        for foreign in ({"model": {}}, RunsCode(trace), {"model": RunsCode(trace)}):
            torch.save(foreign, path)
            self.refused("finetune", *flags, says=path)
        self.assertFalse(trace.exists())
        torch.save({**torch.load(io.BytesIO(whole)), "epochs": 5}, path)
        self.refused("finetune", *flags, says=("unfinished", "--resume"))

    def test_wrong_kind(self):
        for script, flags in (("finetune", ["--autoencoder", photo_classifier("clean")]),
                              ("attack", [photo_autoencoder()]),
                              ("defend", [photo_autoencoder()])):
            self.refused(script, *flags, says=("classifier weights", "autoencoder weights"))

    def test_data_folder(self):
        folder, out = new_folder(), new_folder()
        (folder / "empty" / "train" / "red").mkdir(parents=True)
        for name, words in (("missing", folder / "missing" / "train"), ("empty", "red")):
            self.refused("pretrain", *photo_flags(folder / name), "--out", out, says=words)
            self.refused("finetune", "--mode", "clean", "--from-scratch", *photo_flags(folder / name),
                         "--out", out, says=words)
            self.refused("attack", photo_classifier(), "--data", folder / name, says=str(folder / name))

    def test_loss_that_is_not_finite(self):
        """Stops before that epoch is saved; what was saved before is kept."""
        out = new_folder()
        flags = (*training(2, base_lr=1e30), *photo_flags())
        self.refused("pretrain", *flags, "--out", out / "nim", says=("loss", "epoch 1", "--base-lr"))
        self.refused("finetune", "--mode", "clean", "--from-scratch", *flags, "--out", out / "clean",
                     says=("loss", "epoch 1", "--base-lr"))
        for name in ("nim", "clean"):
            checkpoint = torch.load(out / name / "checkpoint.pt")
            self.assertEqual(checkpoint["epoch"], 0)
            self.assertTrue(all(value.isfinite().all() for value in checkpoint["model"].values()))

    def test_one_image_at_once(self):
        """Batch norm cannot learn from it."""
        for flags in (["--batch-size", 1], ["--batch-size", 8, "--max-batch", 1]):
            self.refused("finetune", "--mode", "clean", "--arch", "resnet18", *photo_flags(),
                         *training(), *flags, "--out", new_folder(),
                         says=("at least 2 images", "--batch-size"))

    def test_left_over_environment(self):
        """A variable of torchrun's alone, as a cluster sets it, starts no group of processes."""
        with mock.patch.dict(os.environ, LOCAL_RANK="3"):
            finished(run("attack", photo_classifier("clean"), "--images", 3, "--eps", 0,
                         "--attack", "fgsm", "--out", new_folder()))

    def test_study_under_torchrun(self):
        """Where each process would measure all images with its own seed."""
        with mock.patch.dict(os.environ, TORCHELASTIC_RUN_ID="1", WORLD_SIZE="2", LOCAL_RANK="0"):
            for name in ("audit", "certify", "compare"):
                flags = ["--at", new_folder()] if name == "compare" else [photo_classifier()]
                self.refused(f"studies.{name}", *flags, says="torchrun")

    def test_results_that_cannot_be_written(self):
        out = new_folder()
        flags = ("--sigma", 0, "--images", 2, "--steps", 1, "--out", out)
        for name in ("attack.csv", "defend.png"):
            (out / name).mkdir()
        self.refused("attack", photo_classifier(), *flags, says="attack.csv")
        self.refused("defend", photo_classifier(), *flags, says="defend.png")

    def test_photo_among_the_runs(self):
        """Said by its name: photographs have a flag of their own."""
        photo = photos() / "val" / "red" / "0.png"
        self.refused("defend", photo_classifier(), photo, says=f"{photo} holds no run")

    def test_fewer_images_than_processes(self):
        """Refused before anything is measured: each process needs one."""
        images, labels = random_images(), torch.arange(4)
        with mock.patch.object(cli, "world_size", return_value=3), \
                mock.patch.object(cli, "rank", return_value=1):
            self.assertEqual(tested.own_share(images, labels)[1].tolist(), [1])
            with self.assertRaisesRegex(UserError, "2 images are too few for 3 processes"):
                tested.own_share(images[:2], labels[:2])

    def test_real_process(self):
        folder = new_folder()
        running = process("attack", folder / "none")
        out, err = running.communicate()
        assert_refused(Result(running.returncode, out, err), folder / "none")


if __name__ == "__main__":
    unittest.main()
