"""Images from a folder, and what the flags of the stages change."""

import argparse
import contextlib
import os
import re
import shutil
import unittest
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from torchvision import transforms
from torchvision.transforms import v2

import finetune
import pretrain
from attack import accuracy, pgd
from model import Autoencoder, De3, Defense, MaskAndFill, MaskAndPaste, NoiseOnly, add_noise
from support import data, report
from support import run as run_module
from support import training as training_steps
from tests.helpers import (assert_picture, assert_refused, finished, new_folder, photo_autoencoder,
                           photo_classifier, photo_flags, photos, read_csv, run, saved, training)


class TestFolder(unittest.TestCase):
    def test_all_stages(self):
        nim, (clean, de3) = photo_autoencoder(), (photo_classifier(mode) for mode in ("clean", "de3"))
        out = new_folder()
        tested = (clean, de3, "--images", 6, "--out", out)
        result = finished(run("defend", *tested, "--steps", 2, "--eot", 2))
        self.assertRegex(result.out, r"\nclean +[\d.]+ .*\nde3, σ = 0 .*\nde3, σ = \d\d .*")
        assert_picture(out / "defend.png")
        photo = photos() / "val/red/0.png"
        result = finished(run("defend", clean, de3, "--photos", photo, "--sigma", 70, "--out", out))
        answer = r"(red|green|blue) [\d.]+%, .*"
        self.assertRegex(result.out, rf"{photo} +clean: {answer}\n{photo} +de3, σ = 70: {answer}")

        finished(run("attack", *tested, "--steps", 2, "--threat", "gray", "--norm", "l2", "--eps", "0.5",
                     "--sigma", 70))
        rows = read_csv(out / "attack.csv")
        self.assertEqual({row["threat"] for row in rows}, {"gray"})
        for level in ("off", "σ = 70"):  # the attacker sees the classifier only: no need of EOT
            self.assertEqual([row["attack"] for row in rows if row["level"] == level], ["fgsm", "pgd"])

        # an autoencoder that is given stands in front of every classifier; runs tell them apart
        more = (*tested, "--attack", "fgsm", "--eps", "8/255", "--autoencoder", nim)
        finished(run("attack", *more, "--sigma", "off", 70))
        found = [(row["defense"], row["run"], row["level"]) for row in read_csv(out / "attack.csv")[4:]]
        self.assertEqual(found, [
            ("clean", str(clean), "off"),
            ("clean behind De³, σ = 70, autoencoder of nim", str(clean), "σ = 70"),
            ("de3, off", str(de3), "off"), ("de3, σ = 70, autoencoder of nim", str(de3), "σ = 70")])

        # the same by name, which was measured already
        table = (out / "attack.csv").read_bytes()
        result = finished(run("attack", *more, "--defense", "off", "de3:70"))
        shown = re.findall(r"^(.*?) +8/255  fgsm .* kept$", result.out, re.M)
        self.assertEqual(shown, [name for name, _, _ in found])
        self.assertEqual((out / "attack.csv").read_bytes(), table)

    def test_pretraining_noise(self):
        """The autoencoder is shown the noisy image, one sigma per image, and clean targets."""
        pairs, forward = [], Autoencoder.forward

        def watch(autoencoder, images, noisy):
            pairs.append((images, noisy))
            return forward(autoencoder, images, noisy)
        with mock.patch.object(Autoencoder, "forward", watch):
            finished(run("pretrain", "--sigma", "gamma:25,3", *training(4), *photo_flags(),
                         "--out", new_folder()))
        images, noisy = (torch.cat(group) for group in zip(*pairs))
        sigmas = 255 * (noisy - images).flatten(1).std(1)
        self.assertEqual(len(sigmas), 4 * 24)
        self.assertAlmostEqual(sigmas.mean().item(), 75, delta=6)
        self.assertAlmostEqual(sigmas.std().item(), 15, delta=4)

    def test_pretraining_by_masking(self):
        """MAE's ratio, the loss over masked patches only, and a picture of what is filled in."""
        calls, forward, out = [], Autoencoder.forward, new_folder()

        def watch(autoencoder, images, noisy=None, **masking):
            calls.append((noisy, masking))
            return forward(autoencoder, images, noisy, **masking)
        with mock.patch.object(Autoencoder, "forward", watch):
            result = finished(run("pretrain", "--task", "mim", *training(), *photo_flags(),
                                  "--out", out))
        self.assertEqual(calls, [(None, dict(mask_ratio=pretrain.MASK_RATIO))] * 3)
        shown = re.findall(r"mask ([\d.]+)  masked +[\d.]+  filled in +[\d.]+", result.out)
        self.assertEqual(shown, ["0.25", "0.5", "0.75"])
        assert_picture(out / "pretrain.png")
        self.assertEqual(saved(out)["task"], "mim")

    def test_training_learns(self):
        autoencoder, _ = run_module.load(photo_autoencoder(epochs=20), "autoencoder")
        images, labels, _ = data.load_images(str(photos()), "val", 32)
        images = data.as_floats(images)
        torch.manual_seed(0)
        denoised = autoencoder.reconstruct(add_noise(images, 75), images).clamp(0, 1)
        mean = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
        self.assertGreater(report.psnr(denoised, images).mean(), report.psnr(mean, images).mean() + 0.5)
        out = new_folder()
        result = run("finetune", "--mode", "clean", "--from-scratch", *training(8), *photo_flags(),
                     "--out", out)
        shown, = re.findall(r"^([\d.]+)% of \d+ validation images are right$", finished(result).out, re.M)
        right = accuracy(run_module.load(out, "classifier")[0], images, labels)
        self.assertEqual(float(shown), round(100 * right.mean().item(), 1))
        self.assertGreater(float(shown), 80)

    def purified(self, *flags, kind=Defense, task="nim"):
        """Fine-tune: (defense, gradients on?, training?) of each call of its purify, Result, its folder.

        What is not in training is an attack, the look at what was saved, or at the held-out images.
        """
        calls, purify, out = [], kind.purify, new_folder() / "run"

        def watch(defense, images):
            self.assertTrue(0 <= images.min() and images.max() <= 1)
            calls.append((defense, torch.is_grad_enabled(), defense.classifier.training))
            return purify(defense, images)
        with mock.patch.object(kind, "purify", watch):
            result = finished(run("finetune", "--autoencoder", photo_autoencoder(task), *training(),
                                  *flags, "--workers", 0, "--out", out))
        return calls, result, out

    def test_de3(self):
        """The default: on denoised images, without gradients; the autoencoder stays as it is."""
        before = (photo_autoencoder() / "checkpoint.pt").read_bytes()
        calls, result, out = self.purified(kind=De3)
        self.assertEqual([training for _, _, training in calls].count(True), 3)  # batches
        self.assertFalse(any(gradients for _, gradients, _ in calls))
        self.assertEqual({str(defense.sigma) for defense, _, _ in calls}, {"uniform:0,60"})
        self.assertRegex(result.out, r"% of \d+ validation images are right behind De³, σ = uniform:0,60\n")
        self.assertEqual((photo_autoencoder() / "checkpoint.pt").read_bytes(), before)
        held, original = saved(out)["autoencoder"], saved(photo_autoencoder())
        self.assertEqual(held["config"], original["config"])
        for name, value in original["model"].items():
            self.assertTrue(torch.equal(held["model"][name], value), name)

    def test_clean(self):
        """Nothing stands in front of the classifier, and none is kept."""
        for kind in (De3, NoiseOnly):
            calls, _, out = self.purified("--mode", "clean", kind=kind)
            self.assertEqual(calls, [])
        self.assertEqual((saved(out)["defense"], saved(out)["autoencoder"]), ("", None))

    def test_modes_of_the_models(self):
        """The classifier trains, but for the steps of an attack on it; the autoencoder is frozen."""
        modes, purify = [], De3.purify

        def watch(defense, images):
            self.assertFalse(defense.autoencoder.training)
            self.assertFalse(any(p.requires_grad for p in defense.autoencoder.parameters()))
            modes.append(defense.classifier.training)
            return purify(defense, images)
        for flags, attack_steps in ((), 0), (("--adversarial", "8/255"), 5):
            modes.clear()
            with mock.patch.object(De3, "purify", watch):
                finished(run("finetune", "--mode", "de3", *flags, "--autoencoder", photo_autoencoder(),
                             *training(), "--workers", 0, "--out", new_folder()))
            batch, looks = [False] * attack_steps + [True], [False] * 4  # memory and file, each twice
            self.assertEqual(modes, looks + 3 * batch + looks + [False] * 2)  # the last on held-out images

    def test_starts_from_the_encoder(self):
        """With a learning rate of nearly zero the encoder's weights are still there."""
        encoder, nim = saved(photo_autoencoder())["model"], ("--autoencoder", photo_autoencoder())
        for flags, same in (nim, True), (("--from-scratch", *photo_flags()), False):
            out = new_folder()
            finished(run("finetune", "--mode", "clean", *flags, *training(base_lr=1e-12), "--out", out))
            weights = saved(out)["model"]
            for name in ("patch_embed.proj.weight", "blocks.3.mlp.fc2.weight"):
                self.assertEqual(torch.allclose(weights[name], encoder[name], atol=1e-6), same)

    def test_starts_from_another_run(self):
        """--init RUN, in both stages, from a run of either kind, by their common names."""
        nim, de3 = photo_autoencoder(), photo_classifier()
        for script, flags, source, left in [
                ("pretrain", ("--task", "mim"), nim, "none"),
                ("pretrain", ("--task", "nim"), de3, "decoder_blocks, decoder_embed, decoder_norm, "
                                                     "decoder_pos_embed, decoder_pred, mask_token, norm"),
                ("finetune", ("--mode", "clean"), de3, "none"),
                ("finetune", ("--mode", "clean"), nim, "fc_norm, head")]:
            out = new_folder()
            result = finished(run(script, "--init", source, *flags, *training(base_lr=1e-12), *photo_flags(),
                                  "--out", out))
            kind = "autoencoder" if source == nim else "classifier"
            self.assertIn(f"weights from the {kind} in {source}; at their initial value: {left}\n", result.out)
            weights, given = saved(out)["model"], saved(source)["model"]
            self.assertEqual(saved(out)["started_from"], dict(
                kind=kind, made_by=saved(source)["made_by"], settings=dict(seed=saved(source)["settings"]["seed"])))
            for name, value in given.items():
                if name in weights:
                    self.assertTrue(torch.allclose(weights[name], value, atol=1e-6), name)
        self.assertEqual(saved(out)["settings"]["init"], str(nim))
        resumed = finished(run("finetune", "--out", out, "--resume"))
        self.assertNotIn("weights from", resumed.out)
        assert_refused(run("pretrain", "--init", photos(), *photo_flags(), "--out", new_folder()),
                       (photos(), "holds no run"))

    def test_default_autoencoder(self):
        """Of --data FOLDER it is runs/<FOLDER>/nim, never the digits'; the new run lies beside it."""
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(new_folder())
        flags = ("finetune", *training(), "--data", photos(), "--workers", 0)
        assert_refused(run(*flags), ("runs/photos/nim", "holds no run"))
        shutil.copytree(photo_autoencoder(), "runs/photos/nim")
        finished(run(*flags))
        self.assertEqual(saved("runs/photos/de3")["data"]["name"], str(photos()))
        assert_refused(run("finetune", *training()), "runs/digits/nim")
        finished(run(*flags, "--mode", "clean"))
        self.assertEqual(sorted(os.listdir("runs/photos")), ["clean", "de3", "nim"])
        finished(run(*flags, "--from-scratch", "--mode", "no-denoise", "--size", "tiny"))  # needs none
        self.assertEqual(os.listdir("runs"), ["photos"])

    def test_no_denoise(self):
        calls, _, out = self.purified("--mode", "no-denoise", "--sigma", "40", kind=NoiseOnly)
        self.assertEqual({(defense.autoencoder, str(defense.sigma)) for defense, _, _ in calls},
                         {(None, "40")})
        self.assertEqual((saved(out)["defense"], saved(out)["level"], saved(out)["autoencoder"]),
                         ("no-denoise", "40", None))
        table = out / "table"
        finished(run("attack", out, "--sigma", 0, 40, "--images", 3, "--steps", 1, "--eot", 2,
                     "--attack", "pgd+eot", "--eps", "8/255", "--out", table))
        self.assertEqual([row["defense"] for row in read_csv(table / "attack.csv")],
                         ["run, σ = 0", "run, σ = 40"])

    def test_adversarial(self):
        """By default on the undefended classifier; with --mode de3 through the defense."""
        for flags, defended in ((), False), (("--mode", "de3"), True):
            with mock.patch.object(finetune, "pgd", wraps=pgd) as attacks:
                calls, _, out = self.purified("--adversarial", "8/255", *flags, kind=De3)
            self.assertEqual(attacks.call_count, 3)  # batches
            for call in attacks.call_args_list:
                self.assertEqual(isinstance(call.args[0], De3), defended)
            radii = [call.args[3] for call in attacks.call_args_list]
            self.assertEqual(radii, [0, 8 / 255, 8 / 255])  # it grows in warm-up, a quarter of a step here
            # the attack goes through purify
            self.assertEqual(any(gradients for _, gradients, _ in calls), defended)
            self.assertFalse(any(gradients for _, gradients, training in calls if training))
            self.assertEqual(saved(out)["defense"], "de3" if defended else "")
        result = finished(run("defend", out, "--photos", photos() / "val/red/0.png", "--sigma", 50))
        self.assertIn("run, σ = 50: ", result.out)

    def test_mim(self):
        """With the visible patches kept, which is a defense of its own name."""
        calls, _, out = self.purified("--mode", "mim-visible", task="mim", kind=MaskAndFill)
        self.assertEqual([training for _, _, training in calls].count(True), 3)
        for defense, gradients, _ in calls:
            self.assertTrue(isinstance(defense, MaskAndPaste) and not gradients)
            self.assertEqual(defense.mask_ratio.parameters, (0, 0.75))
        self.assertEqual((saved(out)["defense"], saved(out)["level"]), ("mim-visible", "uniform:0,0.75"))
        flags = (out, "--defense", "mim-visible:0.25", "mim-visible:0.5", "mim:0.5", "--images", 6,
                 "--steps", 2, "--eot", 2, "--out", out)
        self.assertRegex(finished(run("defend", *flags)).out,
                         "run, mask 0.25 .*\nrun, mask 0.5 .*\nrun behind MIM, mask 0.5 ")
        assert_picture(out / "defend.png")
        finished(run("attack", *flags, "--attack", "pgd+eot", "--eps", "8/255"))
        self.assertEqual([(row["defense"], row["value"]) for row in read_csv(out / "attack.csv")],
                         [("run, mask 0.25", "0.25"), ("run, mask 0.5", "0.5"),
                          ("run behind MIM, mask 0.5", "0.5")])

    def test_mode_of_an_autoencoder(self):
        """That of MIM stands in a MIM defense unless --mode says otherwise, and no NIM stands there."""
        _, _, out = self.purified(task="mim", kind=MaskAndFill)
        self.assertEqual(saved(out)["defense"], "mim")
        for task, mode in (("mim", "de3"), ("nim", "mim"), ("nim", "mim-visible")):
            refused = run("finetune", "--autoencoder", photo_autoencoder(task), "--mode", mode, *training(),
                          "--workers", 0, "--out", new_folder())
            assert_refused(refused, ("needs an autoencoder", f"was pretrained for {task.upper()}"))

    def test_mask_ratios_in_training(self):
        """One for each batch, drawn from Uniform(0, 0.75)."""
        source, ratios, draw_ratio = photo_autoencoder("mim"), [], MaskAndFill.draw_ratio

        def watch(defense):
            ratio = draw_ratio(defense)
            if defense.classifier.training:
                ratios.append(ratio)
            return ratio
        with mock.patch.object(MaskAndFill, "draw_ratio", watch):
            finished(run("finetune", "--autoencoder", source, *training(2, batch_size=1), "--workers", 0,
                         "--out", new_folder()))
        self.assertEqual(len(ratios), 2 * 24)
        self.assertTrue(0 <= min(ratios) < 0.1 and 0.65 < max(ratios) <= 0.75)

    def choice(self, name, recipe_augments, images, in_memory, adversarial=None):
        """What is chosen for so many images: what augments a batch, what mixes, how each is loaded."""
        train = mock.MagicMock(__len__=lambda _: images, classes=["a", "b"], transform=None)
        if in_memory:
            train = TensorDataset(torch.zeros(images))
        args = argparse.Namespace(augment=recipe_augments, adversarial=adversarial)
        config = dict(image_size=32, mean=(0.5,) * 3, std=(0.2,) * 3)
        with contextlib.redirect_stdout(None):
            about = data.about(name)
        augment, mix = finetune.choose_augmentation(args, train, about, config)
        loaded = [] if in_memory else [type(step) for step in train.transform.transforms]
        return augment, mix, loaded, args.augmentation

    def test_choice_of_augmentation(self):
        """Digits are moved, small images cropped, enough others get the paper's, few a crop and a flip."""
        jitter, crop, few = training_steps.jitter, training_steps.crop_and_flip, finetune.FEW
        self.assertEqual(few, 10_000)
        folder, config = str(photos()), dict(mean=(0.5,) * 3, std=(0.2,) * 3)
        gentle = [type(step) for step in training_steps.gentle_transform(32).transforms]
        paper = [type(step) for step in training_steps.finetune_transform(32, **config).transforms]
        self.assertIn(transforms.RandomErasing, paper)
        for name, augments, images, in_memory, *expected in [
                (folder, True, few - 1, False, None, False, gentle, "gentle"),
                (folder, True, few, False, None, True, paper, "paper"),
                ("cifar10", True, 45_000, True, crop, False, [], "crop_and_flip"),
                (folder, True, 100, True, crop, False, [], "crop_and_flip"),
                ("digits", True, 1197, True, jitter, False, [], "jitter"),
                ("digits", False, 1197, True, None, False, [], "None")]:
            with self.subTest(name=name, images=images, augments=augments):
                augment, mix, *others = self.choice(name, augments, images, in_memory)
                self.assertEqual([augment, mix is not None, *others], expected)
        _, mix, loaded, _ = self.choice(folder, True, few, False)
        self.assertEqual([type(part) for part in mix.transforms], [v2.MixUp, v2.CutMix])
        # an attack needs one label
        _, mix, loaded, name = self.choice(folder, True, few, False, adversarial=8 / 255)
        self.assertEqual((mix, loaded, name), (None, paper, "paper"))

    def test_augment(self):
        """Images that are not kept in memory: labels are mixed where there are enough, always smoothed."""
        for enough, *flags in ((True,), (False,), (True, "--adversarial", "8/255")):
            with mock.patch.object(F, "cross_entropy", wraps=F.cross_entropy) as losses, \
                    mock.patch.object(data, "SMALL", 31), \
                    mock.patch.object(training_steps, "finetune_transform",
                                      wraps=training_steps.finetune_transform) as paper, \
                    mock.patch.object(training_steps, "gentle_transform",
                                      wraps=training_steps.gentle_transform) as gentle, \
                    mock.patch.object(finetune, "FEW", 24 if enough else 25):
                _, result, out = self.purified("--mode", "de3", *flags)
            self.assertEqual((paper.call_count, gentle.call_count), (enough, not enough))
            self.assertEqual(saved(out)["settings"]["augmentation"], "paper" if enough else "gentle")
            mixed = enough and not flags  # an attack needs one label
            self.assertEqual("  accuracy " in result.out, not mixed)  # mixed labels have none
            smoothed = [call for call in losses.call_args_list if "label_smoothing" in call.kwargs]
            self.assertEqual(len(smoothed), 3)
            for call in smoothed:
                self.assertEqual(call.args[1].dim(), 1 + mixed)
                self.assertEqual(call.kwargs["label_smoothing"], 0.0 if flags else 0.1)

    def test_augmented_in_memory(self):
        """Small images are cropped in both stages, the digits moved, but in adversarial training."""
        with contextlib.redirect_stdout(None):
            small, digits = data.about(str(photos())), data.DATASETS["digits"]
        self.assertIsNone(digits.pretrain_augment)

        def open_few(split, image_size):
            opened = data.load_digits(split, image_size)
            few = TensorDataset(*opened[:64])
            few.classes = opened.classes
            return few
        few_digits = digits._replace(open=open_few)
        clean = ("finetune", "--mode", "clean", "--from-scratch")
        for row, augmented, batches, batch, script, *flags in [
                (small, True, 3, 8, "pretrain", *photo_flags()), (small, True, 3, 8, *clean, *photo_flags()),
                (few_digits, True, 2, 32, *clean),
                (few_digits, False, 2, 32, "finetune", "--from-scratch", "--adversarial", "8/255")]:
            watched = {name: mock.Mock(side_effect=getattr(row, name), __name__="watched")
                       for name in ("pretrain_augment", "finetune_augment") if getattr(row, name)}
            row = row._replace(**watched)
            with mock.patch.object(F, "cross_entropy", wraps=F.cross_entropy) as losses, \
                    mock.patch.dict(data.DATASETS, digits=few_digits), \
                    mock.patch.object(data, "about", lambda *about: row):
                finished(run(script, *flags, *training(1, batch), "--out", new_folder()))
            calls = {name: augment.call_count for name, augment in watched.items()}
            tried = 1  # before training, whether the result lies in [0, 1]
            self.assertEqual(calls.get(f"{script}_augment", 0), augmented * (batches + tried))
            self.assertEqual(sum(calls.values()), augmented * (batches + tried))
            smoothing = {call.kwargs["label_smoothing"] for call in losses.call_args_list
                         if "label_smoothing" in call.kwargs}
            self.assertEqual(smoothing, set() if script == "pretrain" else {0.1 * augmented})

    def test_resnet18(self):
        _, _, out = self.purified("--mode", "de3", "--arch", "resnet18")
        self.assertIn("layer4.1.conv2.weight", "".join(saved(out)["model"]))
        result = run("defend", out, "--images", 6, "--sigma", "off", 50, "--steps", 1, "--out", out)
        self.assertRegex(finished(result).out, "run, off .*\nrun, σ = 50 ")
