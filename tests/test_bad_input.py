"""Bad input is refused: a UserError from Python, one sentence and exit code 2 from a stage."""

import io
import math
import unittest
import warnings

import numpy as np
import torch
from PIL import Image
from torch import nn

from attack import pgd
from model import De3, NoiseScale, UserError, add_noise
from tests.helpers import (Linear, Result, RunsCode, assert_refused, copy_of_photos, digits_names,
                           digits_runs, finished, new_folder, photo_flags, photo_runs, photos, process,
                           random_images, run, small_autoencoder, small_classifier, training)


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
        for sigma in (None, 50):
            defense, images = De3(small_autoencoder(), small_classifier(), sigma), random_images()
            bad = images.clone()
            bad[0, 0, 0, 0] = math.nan
            for wrong in (bad, images + 0.01, images - 1.01, images * 255, images.round().long(),
                          (images * 255).byte(), images[0], images.numpy(), images[:0]):
                with self.subTest(sigma=sigma), self.assertRaises(UserError):
                    defense(wrong)
            images.view(-1)[:2] = torch.tensor([1 + 5e-7, -5e-7])
            self.assertEqual(defense(images).shape, (4, 10))
            images.view(-1)[0] = 1 + 5e-6
            self.assertRaises(UserError, defense, images)

    def test_settings_of_de3(self):
        autoencoder, classifier = small_autoencoder(), small_classifier()
        for source, settings in [
                (autoencoder, dict(sigma=50, votes=0)), (autoencoder, dict(sigma=-1)),
                (autoencoder, dict(sigma=math.nan)), (autoencoder, dict(sigma=50, mask_ratio=0.5)),
                (None, dict(sigma=None, mask_ratio=0.5)),
                (autoencoder, dict(sigma=None, mask_ratio=1)),
                (autoencoder, dict(sigma=None, mask_ratio=0.5, noise=torch.zeros(3, 16, 16))),
                (autoencoder, dict(sigma=None, mask_ratio=-0.1))]:
            with self.subTest(settings), self.assertRaises(UserError):
                De3(source, classifier, **settings)

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
        """One long for each image, each a class of the model; the same for targets."""
        images, labels, model = random_images(3, 3, 16, 16), torch.arange(3), small_classifier()
        for wrong in (torch.arange(6), labels[:2], labels - 1, labels + 8, labels.float(),
                      labels[:, None]):
            with self.subTest(wrong), self.assertRaisesRegex(UserError, "labels"):
                pgd(model, images, wrong, 0.1, 1)
            with self.subTest(targets=wrong), self.assertRaisesRegex(UserError, "labels"):
                pgd(model, images, labels, 0.1, 1, targets=wrong)
        for dtype in (torch.bfloat16, torch.float16):
            with self.assertRaisesRegex(UserError, "float32"):
                pgd(model.to(dtype), images.to(dtype), labels, 0.1, 1)

    def test_gradient_that_is_zero(self):
        """Masked everywhere: a warning, since nothing was attacked; not where one image has one."""
        class Flat(nn.Module):
            def forward(self, x):
                score = x.flatten(1)[:, 0] * torch.tensor([self.slope, 0, 0, 0])
                return torch.stack([score, 0 * score], dim=1)
        model, labels = Flat(), torch.zeros(4, dtype=torch.long)
        model.slope = 0.0
        with self.assertWarnsRegex(UserWarning, "gradient is zero"):
            pgd(model, random_images(), labels, 0.1, 1)
        model.slope = 1.0
        with warnings.catch_warnings(action="error"):
            pgd(model, random_images(), labels, 0.1, 1)

    def test_gradient_that_is_not_finite(self):
        class Broken(nn.Module):
            def forward(self, x):
                return Linear((3, 16, 16))(x) * math.nan
        with self.assertRaisesRegex(UserError, "finite"):
            pgd(Broken(), random_images(), torch.zeros(4, dtype=torch.long), 0.1, 1)


class TestBadInput(unittest.TestCase):
    """What the stages refuse."""

    def refused(self, script, *arguments, says=()):
        """The stage refuses these arguments with a sentence that holds the words."""
        with self.subTest(script, arguments=arguments):
            assert_refused(run(script, *arguments), says)

    def test_flags_of_training(self):
        for flags in (["--sigma", "-5"], ["--sigma", "nan"], ["--sigma", "uniform:30,0"],
                      ["--epochs", "0"], ["--epochs", "x"], ["--batch-size", "0"], ["--seed", "-1"],
                      ["--base-lr", "nan"], ["--base-lr", "-1"], ["--task", "dae"],
                      ["--warmup-epochs", "-1"], ["--warmup-epochs", "nan"], ["--size", "giant"],
                      ["--flag-that-is-not"], ["--resume", "--overwrite"], ["--max-batch", "0"],
                      ["--seed", "1" + "0" * 20], ["--sigma", "1e300"],
                      ["--epochs", "1" + "0" * 400], ["--base-lr", "1e300"]):
            self.refused("pretrain", "--runs", new_folder(), *flags)
        for flags in (["--adversarial", "-1/255"], ["--adversarial", "8/0"], ["--mode", "dirty"],
                      ["--max-mask-ratio", "1"], ["--max-mask-ratio", "-0.1"],
                      ["--max-mask-ratio", "x"], ["--arch", "vgg"]):
            self.refused("finetune", "--runs", new_folder(), *flags)
        self.refused("finetune", "--mode", "dirty", says=("dirty", "de3", "clean", "no-denoise"))
        for flags in (["--from-scratch"], ["--arch", "resnet18"]):
            self.refused("finetune", "--init", "x.pth", *flags, says="--init is for the ViT")

    def test_flags_of_evaluation(self):
        runs, *_ = digits_runs()
        for flags in (["--eps", "8"], ["--eps", "-1/255"], ["--eps", "nan"], ["--eps", "8/x"],
                      ["--steps", "0"], ["--eot", "0"], ["--restarts", "0"], ["--images", "0"],
                      ["--attack", "cw"], ["--loss", "mse"], ["--norm", "l1"], ["--sigma", "-1"],
                      ["--mask-ratio", "1"], ["--mask-ratio", "-0.1"], ["--mask-ratio", "x"],
                      ["--max-batch", "0"], ["--step-size", "-1"]):
            self.refused("attack", "--runs", runs, *flags)
        for flags in (["--votes", "0"], ["--eot", "0"], ["--steps", "0"], ["--split", "dev"]):
            self.refused("defend", "--runs", runs, *flags)
        self.refused("attack", "--attack", "cw", says=("cw", "pgd+eot"))
        self.refused("attack", "--runs", new_folder(), "--eps", 8, says="write 8/255")

    def test_eps_above_one(self):
        """8 instead of 8/255."""
        self.refused("finetune", "--mode", "clean", "--from-scratch", "--adversarial", 8,
                     *photo_flags(new_folder()), *training())
        self.refused("defend", "--runs", digits_runs()[0], "--images", 5, "--eps", 16,
                     says="write 8/255")

    def test_device(self):
        for script in ("pretrain", "finetune", "defend", "attack"):
            for device in ("nonsense", "cuda:99", "meta"):
                self.refused(script, "--device", device, "--runs", new_folder(), says=device)

    def test_missing_runs(self):
        runs = new_folder()
        flags = ("--runs", runs)
        command = f"python pretrain.py --runs {runs}"
        self.refused("finetune", *flags, says=(runs, "missing", command))
        self.refused("finetune", *flags, "--seed", 3, says="python pretrain.py --seed 3 --runs")
        for script in ("defend", "attack"):
            self.refused(script, *flags, says=("missing", f"python finetune.py --runs {runs}"))
            self.refused(script, *flags, "--classifier", runs / "none",
                         says=("none/checkpoint.pt", "flags that the folder's name stands for"))
        runs, _ = photo_runs()
        self.refused("defend", *photo_flags(runs), says="python finetune.py")

    def test_damaged_checkpoints(self):
        runs, source = photo_runs()
        path, trace = source / "checkpoint.pt", runs / "trace"
        flags = (*training(), *photo_flags(runs))
        whole = path.read_bytes()
        for content in (whole[:len(whole) // 2], b"", b"hello"):
            path.write_bytes(content)
            self.refused("finetune", *flags, says=path)
            self.refused("pretrain", *flags, "--resume", says=path)
        for foreign in ({"model": {}}, RunsCode(trace), {"model": RunsCode(trace)}):
            torch.save(foreign, path)
            self.refused("finetune", *flags, says=path)
        self.assertFalse(trace.exists())
        checkpoint = torch.load(io.BytesIO(whole))
        torch.save({**checkpoint, "config": {**checkpoint["config"], "embed_dim": 32}}, path)
        self.refused("finetune", *flags, says=path)
        torch.save({**checkpoint, "epochs": 5}, path)
        self.refused("finetune", *flags, says=("unfinished", "--resume"))

    def test_wrong_kind(self):
        runs, *_ = digits_runs()
        source = runs / "digits/nim_gamma10-12"
        self.refused("finetune", "--runs", new_folder(), "--autoencoder", source / "clean",
                     says=("classifier", "autoencoder"))
        self.refused("attack", "--runs", runs, "--classifier", source,
                     says=("classifier", "autoencoder"))

    def test_stale_autoencoder(self):
        """Trained anew after the classifier was trained behind it."""
        runs, source = photo_runs()
        flags = photo_flags(runs)
        finished(run("finetune", "--mode", "de3", *training(), *flags))
        classifier = ("--classifier", source / "de3_uniform0-60", "--images", 3, "--steps", 1)
        finished(run("defend", *classifier, *flags))
        finished(run("pretrain", "--overwrite", *training(2), *flags))
        for script in ("defend", "attack"):
            self.refused(script, *classifier, *flags, says=("autoencoder", "--overwrite"))

    def test_data_folder(self):
        folder, runs = new_folder(), new_folder()
        for script in ("pretrain", "finetune"):
            extra = ("--mode", "clean", "--from-scratch") if script == "finetune" else ()
            for name in ("missing", "empty"):
                self.refused(script, *photo_flags(runs, folder / name), *extra, says=folder / name)
                (folder / "empty" / "train").mkdir(parents=True, exist_ok=True)
        (folder / "empty" / "train" / "red").mkdir()
        self.refused("pretrain", *photo_flags(runs, folder / "empty"), says="red")

    def test_classes(self):
        other = copy_of_photos()
        (other / "val" / "red").rename(other / "val" / "yellow")
        runs = new_folder()
        flags = ("--mode", "clean", "--from-scratch", *training())
        self.refused("finetune", *flags, *photo_flags(runs, other), says="classes")
        path, = finished(run("finetune", *flags, *photo_flags(runs))).wrote()
        for script in ("defend", "attack"):
            self.refused(script, "--classifier", path.parent, *photo_flags(runs, other),
                         says="classes")

    def test_unreadable_image(self):
        """Named, with images loaded in this process and in a loading process."""
        folder = copy_of_photos()
        broken = folder / "train" / "red" / "broken.png"
        whole = (photos() / "train/red/0.png").read_bytes()
        for content, workers in ((b"no image", 0), (whole[:len(whole) // 2], 0), (b"no image", 1)):
            broken.write_bytes(content)
            self.refused("pretrain", *photo_flags(new_folder(), folder), *training(),
                         "--workers", workers, says=broken)
        self.refused("defend", broken, "--runs", digits_runs()[0], says=broken)
        Image.fromarray(np.full((9, 9), 30000, np.uint16)).save(broken)
        self.refused("defend", broken, "--runs", digits_runs()[0], says=(broken, "8 bits"))
        self.refused("defend", "no.png", "--runs", digits_runs()[0], says="no.png")

    def test_loss_that_is_not_finite(self):
        """Stops before anything is saved; what was saved before is kept."""
        runs = new_folder()
        flags = (*training(9, batch_size=24, warmup=1, base_lr=1e30), *photo_flags(runs))
        assert_refused(run("pretrain", *flags), ("loss", "epoch 3", "--base-lr"))
        path, = runs.rglob("checkpoint.pt")
        self.assertEqual(torch.load(path)["epoch"], 2)
        result = run("finetune", "--mode", "clean", "--from-scratch", *flags)
        assert_refused(result, ("loss", "epoch", "--base-lr"))

    def test_mim_flags_without_mim(self):
        runs, _ = photo_runs()
        self.refused("finetune", "--keep-visible", *training(), *photo_flags(runs),
                     says="--keep-visible")

    def test_results_that_cannot_be_written(self):
        runs, target = digits_runs()[0], new_folder()
        flags = ("--classifier", runs / "digits" / digits_names()[0], "--sigma", 0, "--images", 2,
                 "--steps", 1, "--runs", target)
        for script, name in (("attack", "attack.csv"), ("defend", "defend.png")):
            (target / "digits" / name).mkdir(parents=True)
            self.refused(script, *flags, says=name)

    def test_real_process(self):
        running = process("attack", "--runs", new_folder(), "--classifier", "none")
        out, err = running.communicate()
        assert_refused(Result(running.returncode, out, err), "none/checkpoint.pt")
