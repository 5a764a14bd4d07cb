"""Images from a folder, and what the flags of the stages change."""

import argparse
import functools
import re
import unittest
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from torchvision import transforms

import finetune
import pretrain
from attack import pgd
from model import Autoencoder, De3, add_noise
from support import checkpoints, data, pictures
from support import training as training_steps
from tests.helpers import (assert_near, assert_picture, assert_refused, finished, new_folder,
                           photo_autoencoder, photo_flags, photo_runs, photos, read_csv, run, training)


def force_augmentation():
    """Few images are enough for the paper's augmentation, while this lasts."""
    return mock.patch.object(finetune, "AUGMENT_FROM", 1)


class TestFolder(unittest.TestCase):
    def test_all_stages(self):
        folder = new_folder()
        flags = photo_flags(folder)
        pretrained = finished(run("pretrain", *training(), *flags))
        with force_augmentation():
            finetuned = finished(run("finetune", *training(), *flags))
        self.assertIn("of 24 validation images", finetuned.out)
        for path in pretrained.wrote() + finetuned.wrote():
            self.assertTrue(path.is_file() and folder / "photos" in path.parents)
        small = (*flags, "--images", 6, "--steps", 2, "--eot", 2)
        result = finished(run("defend", *small))
        self.assertRegex(result.out, r"undefended .*\nDe³ σ = 0 .*\nDe³ σ = \d\d .*")
        photo = photos() / "val/red/0.png"
        result = finished(run("defend", photo, *flags, "--sigma", "off", 70))
        answer = r"(red|green|blue) \([\d.]+%\)"
        self.assertRegex(result.out, rf"{photo} +undefended: {answer}\n{photo} +De³ σ = 70: {answer}")
        table = folder / "photos/attack.csv"
        finished(run("attack", *flags, "--images", 6, "--steps", 2, "--threat", "gray", "--norm", "l2",
                     "--eps", "0.5", "--sigma", "off", 70))
        rows = read_csv(table)
        self.assertEqual({row["threat"] for row in rows}, {"gray"})
        for sigma in ("", "70.0"):  # the attacker sees the classifier only: no need of EOT
            self.assertEqual([row["attack"] for row in rows if row["sigma"] == sigma],
                             ["fgsm", "pgd"])

        # classifiers that are given are tested at all sigmas, and told apart by their folders
        names = [path.parent.relative_to(folder / "photos") for path in finetuned.wrote()]
        finished(run("attack", *flags, "--images", 6, "--attack", "fgsm", "--eps", "8/255",
                     "--sigma", "off", 70,
                     "--classifier", *(path.parent for path in finetuned.wrote())))
        found = [(row["defense"], row["run"], row["sigma"]) for row in read_csv(table)[4:]]
        self.assertEqual(found, [(f"{words} ({name})", str(name), sigma) for name in names for
                                 words, sigma in (("undefended", ""), ("De³ σ = 70", "70.0"))])

    def test_pretraining_noise(self):
        """The autoencoder is shown the noisy image, one sigma per image, and clean targets."""
        pairs, forward = [], Autoencoder.forward

        def watch(autoencoder, images, noisy):
            pairs.append((images, noisy))
            return forward(autoencoder, images, noisy)
        with mock.patch.object(Autoencoder, "forward", watch):
            finished(run("pretrain", "--sigma", "gamma:25,3", *training(4),
                         *photo_flags(new_folder())))
        images, noisy = (torch.cat(group) for group in zip(*pairs))
        sigmas = 255 * (noisy - images).flatten(1).std(1)
        self.assertEqual(len(sigmas), 4 * 24)
        self.assertAlmostEqual(sigmas.mean().item(), 75, delta=6)
        self.assertAlmostEqual(sigmas.std().item(), 15, delta=4)

    def test_pretraining_by_masking(self):
        """MAE's ratio, the loss over masked patches only, and a picture of what is filled in."""
        calls, forward = [], Autoencoder.forward

        def watch(autoencoder, images, noisy=None, **masking):
            calls.append((noisy, masking))
            return forward(autoencoder, images, noisy, **masking)
        with mock.patch.object(Autoencoder, "forward", watch):
            result = run("pretrain", "--task", "mim", *training(), *photo_flags(new_folder()))
        path, = finished(result).wrote()
        self.assertEqual(path.parent.name, "mim_0.75_tiny")
        self.assertEqual(calls, [(None, dict(mask_ratio=pretrain.MASK_RATIO))] * 3)
        self.assertRegex(result.out, r"mask ratio  filled in dB.*\n +0.25 .*\n +0.5 .*\n +0.75 ")
        assert_picture(path.parent / "pretrain.png")

    def test_training_learns(self):
        source = photo_autoencoder(epochs=20)
        autoencoder, _ = checkpoints.load_finished(source, "autoencoder")
        images, _ = next(iter(data.Loader(data.load_dataset(photos(), "val", 32), 24)))
        torch.manual_seed(0)
        denoised = autoencoder.reconstruct(add_noise(images, 75), images).clamp(0, 1)
        mean = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
        self.assertGreater(pictures.psnr(denoised, images).mean(),
                           pictures.psnr(mean, images).mean() + 0.5)
        result = run("finetune", "--mode", "clean", "--from-scratch", *training(8, warmup=1),
                     *photo_flags(new_folder()))
        accuracy, = re.findall(r"^clean: ([\d.]+)% of 24", finished(result).out, re.M)
        self.assertGreater(float(accuracy), 80)

    def purified(self, *flags, task="nim"):
        """Fine-tune; the (De3, gradients on?) of each call of its purify, and the result."""
        folder, source = photo_runs(task)
        calls, purify = [], De3.purify

        def watch(defense, images):
            self.assertTrue(0 <= images.min() and images.max() <= 1)
            calls.append((defense, torch.is_grad_enabled()))
            return purify(defense, images)
        with mock.patch.object(De3, "purify", watch):
            result = finished(run("finetune", "--autoencoder", source, *training(), *flags,
                                  *photo_flags(folder)))
        return calls, result

    def test_default_trains_both(self):
        calls, result = self.purified()
        self.assertEqual([path.parent.name for path in result.wrote()],
                         ["de3_uniform0-60", "clean"])
        self.assertFalse(any(gradients for _, gradients in calls))
        first, last = calls[0][0], calls[-1][0]
        self.assertEqual(str(first.sigma), "uniform:0,60")
        self.assertIsNotNone(first.autoencoder)
        self.assertFalse(last.defended)
        source = result.wrote()[0].parents[1] / "checkpoint.pt"
        self.assertEqual(source.read_bytes(),
                         (photo_autoencoder() / "checkpoint.pt").read_bytes())

    def test_modes_of_the_models(self):
        """The classifier trains, but for the steps of an attack on it; the autoencoder is frozen."""
        modes, purify = [], De3.purify

        def watch(defense, images):
            self.assertFalse(defense.autoencoder.training)
            self.assertFalse(any(p.requires_grad for p in defense.autoencoder.parameters()))
            modes.append(defense.classifier.training)
            return purify(defense, images)
        folder, _ = photo_runs()
        for flags, attack_steps in ((), 0), (("--adversarial", "8/255"), 5):
            modes.clear()
            with mock.patch.object(De3, "purify", watch):
                finished(run("finetune", "--mode", "de3", *flags, *training(), *photo_flags(folder)))
            batch = [False] * attack_steps + [True]
            self.assertEqual(modes, 3 * batch + [False])  # the last on held-out images

    def test_starts_from_the_encoder(self):
        """With a learning rate of nearly zero the encoder's weights are still there."""
        folder, source = photo_runs()
        encoder = torch.load(source / "checkpoint.pt")["model"]
        for flags, same in ((), True), (("--from-scratch",), False):
            result = finished(run("finetune", "--mode", "clean", "--autoencoder", source, *flags,
                                  *training(base_lr=1e-12), *photo_flags(folder)))
            weights = torch.load(result.wrote()[0])["model"]
            for name in ("patch_embed.proj.weight", "blocks.3.mlp.fc2.weight"):
                self.assertEqual(torch.allclose(weights[name], encoder[name], atol=1e-6), same)

    def test_no_denoise(self):
        calls, result = self.purified("--mode", "no-denoise", "--sigma", "40")
        self.assertEqual({(defense.autoencoder, str(defense.sigma)) for defense, _ in calls},
                         {(None, "40")})
        self.assertEqual(torch.load(result.wrote()[0])["mode"], "no-denoise")

    def test_adversarial(self):
        """By default on the undefended classifier; with --mode de3 through the defense."""
        for flags, defended in ((), False), (("--mode", "de3"), True):
            with mock.patch.object(finetune, "pgd", wraps=pgd) as attacks:
                calls, result = self.purified("--adversarial", "8/255", *flags)
            self.assertEqual(attacks.call_count, 3)  # batches
            for call in attacks.call_args_list:
                self.assertEqual(call.args[0].defended, defended)
                self.assertEqual(call.args[3], 8 / 255)
            self.assertTrue(any(gradients for _, gradients in calls))  # attack through purify
            self.assertEqual(len(result.wrote()), 1)

    def test_mim(self):
        calls, result = self.purified("--mode", "de3", "--keep-visible", task="mim")
        ratios = {defense.mask_ratio for defense, _ in calls}
        self.assertTrue(all(defense.keep_visible and defense.sigma is None for defense, _ in calls))
        self.assertTrue(all(0 <= ratio <= 0.75 for ratio in ratios))
        folder, classifier = result.wrote()[0].parents[3], result.wrote()[0].parent
        flags = ("--classifier", classifier, *photo_flags(folder), "--mask-ratio", 0.25, 0.5,
                 "--images", 6, "--steps", 2, "--eot", 2)
        self.assertRegex(finished(run("defend", *flags)).out,
                         "MIM mask 0.25, visible kept .*\nMIM mask 0.5, visible kept ")
        finished(run("attack", *flags, "--attack", "pgd+eot", "--eps", "8/255"))
        rows = read_csv(folder / "photos/attack.csv")
        self.assertEqual([(row["sigma"], row["mask_ratio"]) for row in rows],
                         [("", "0.25"), ("", "0.5")])

    def test_mask_ratios_in_training(self):
        """One for each batch, drawn from Uniform(0, --max-mask-ratio)."""
        ratios, mim = [], Autoencoder.mim

        def watch(autoencoder, images, mask_ratio):
            ratios.append(mask_ratio)
            return mim(autoencoder, images, mask_ratio)
        folder, source = photo_runs("mim")
        with mock.patch.object(Autoencoder, "mim", watch):
            result = run("finetune", "--mode", "de3", "--autoencoder", source, "--max-mask-ratio", 0.4,
                         *training(16), *photo_flags(folder))
        self.assertEqual(finished(result).wrote()[0].parent.name, "de3_0.4")
        *drawn, tested = ratios
        self.assertEqual((len(drawn), tested), (16 * 3, 0.2))
        self.assertTrue(0 <= min(drawn) < 0.05 and 0.35 < max(drawn) <= 0.4)

    def choice(self, name, adversarial, images, in_memory):
        """What is chosen for so many images: (what augments a batch, mixed, label smoothing)."""
        dataset = TensorDataset(torch.zeros(images)) if in_memory else range(images)
        if not in_memory:
            dataset = mock.MagicMock(__len__=lambda _: images)
        args = argparse.Namespace(data=name, adversarial=adversarial, label_smoothing=0.1)
        return finetune.choose_augmentation(args, dataset, 32), dataset

    def test_choice_of_augmentation(self):
        """The digits are shifted, small images cropped, enough others get the paper's recipe."""
        shift, crop, enough = training_steps.shift, training_steps.crop_and_flip, finetune.AUGMENT_FROM
        self.assertEqual(enough, 10_000)
        for name, adversarial, images, in_memory, expected in [
                ("photos", None, enough - 1, False, (None, False, 0.0)),
                ("photos", None, enough, False, (None, True, 0.1)),
                ("photos", 8 / 255, enough, False, (None, False, 0.1)),
                ("cifar10", None, 45_000, True, (crop, False, 0.1)),
                ("photos", 8 / 255, 100, True, (crop, False, 0.1)),
                ("digits", None, 1197, True, (shift, False, 0.1)),
                ("digits", 8 / 255, 1197, True, (None, False, 0.0))]:
            chosen, dataset = self.choice(name, adversarial, images, in_memory)
            self.assertEqual(chosen, expected)
            transformed = not in_memory and images >= enough
            self.assertEqual(isinstance(dataset.transform, transforms.Compose)
                             if not in_memory else False, transformed)

    def test_augment(self):
        """Images that are not kept in memory: mixed labels, smoothed, where there are enough."""
        for augmented in (True, False):
            with mock.patch.object(F, "cross_entropy", wraps=F.cross_entropy) as losses, \
                    mock.patch.object(data, "MEMORY", 0), \
                    mock.patch.object(training_steps, "finetune_transform",
                                      wraps=training_steps.finetune_transform) as transform, \
                    mock.patch.object(finetune, "AUGMENT_FROM", 24 if augmented else 25):
                _, result = self.purified("--mode", "de3")
            self.assertEqual(transform.call_count, augmented)
            self.assertEqual("  accuracy " in result.out, not augmented)  # mixed labels have none
            for call in losses.call_args_list:
                self.assertEqual(call.args[1].dim(), 1 + augmented)  # mixed labels
                self.assertEqual(call.kwargs["label_smoothing"], 0.1 * augmented)

    def test_small_images_are_cropped(self):
        """In both training stages, every batch; their labels are smoothed, not mixed."""
        for stage, flags in (("pretrain", ()), ("finetune", ("--mode", "clean", "--from-scratch"))):
            with mock.patch.object(training_steps, "crop_and_flip",
                                   wraps=training_steps.crop_and_flip) as crop:
                finished(run(stage, *flags, *training(2), *photo_flags(new_folder())))
            self.assertEqual(crop.call_count, 6)

    def test_augmented_digits(self):
        """Shifted, labels smoothed; not in adversarial training."""
        for flags, augmented in (((), True), (("--adversarial", "8/255"), False)):
            with mock.patch.object(F, "cross_entropy", wraps=F.cross_entropy) as losses, \
                    mock.patch.object(training_steps, "shift",
                                      wraps=training_steps.shift) as shift:
                finished(run("finetune", "--mode", "clean", "--from-scratch", *flags,
                             *training(1, 600), "--max-batch", 600, "--runs", new_folder()))
            self.assertEqual(shift.call_count, int(augmented))
            smoothing = {call.kwargs["label_smoothing"] for call in losses.call_args_list
                         if "label_smoothing" in call.kwargs}
            self.assertEqual(smoothing, {0.1 * augmented})

    def test_compile(self):
        """--compile changes the speed only; here with a backend that runs what was traced as it is."""
        folder, source = photo_runs()
        flags = ("--mode", "de3", "--autoencoder", source, *training(), *photo_flags(folder))
        weights = []
        for more in ((), ("--compile", "--overwrite")):
            eager = functools.partial(torch.compile, backend="eager")
            with mock.patch("torch.compile", side_effect=eager) as compiled:
                path, = finished(run("finetune", *flags, *more)).wrote()
            self.assertEqual(compiled.call_count, 4 if more else 0)  # a trial, 2, classifier
            weights.append(torch.load(path)["model"])
        for name, value in weights[0].items():
            assert_near(value, weights[1][name], 1e-4)
        with mock.patch("torch.compile", side_effect=RuntimeError("no compiler found")):
            refused = run("finetune", *flags, "--compile", "--overwrite")
        assert_refused(refused, ("no compiler found", "leave it out"))

    def test_resnet18(self):
        _, result = self.purified("--mode", "de3", "--arch", "resnet18")
        path, = result.wrote()
        self.assertIn("layer4.1.conv2.weight", "".join(torch.load(path)["model"]))
        result = run("defend", "--classifier", path.parent, "--images", 6, "--sigma", "off", 50,
                     "--steps", 1, *photo_flags(path.parents[3]))
        self.assertRegex(finished(result).out, "undefended, resnet18 .*\nDe³ σ = 50, resnet18 ")
