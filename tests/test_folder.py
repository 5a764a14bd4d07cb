"""Images from a folder, and what the flags of the stages change."""

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
from model import Autoencoder, De3, Defense, MaskAndFill, NoiseOnly, add_noise
from support import data, report
from support import run as run_module
from support import training as training_steps
from tests.helpers import (assert_picture, finished, new_folder, photo_autoencoder, photo_classifier,
                           photo_flags, photos, read_csv, run, saved, training)


class TestFolder(unittest.TestCase):
    def test_all_stages(self):
        nim, (clean, de3) = photo_autoencoder(), (photo_classifier(mode) for mode in ("clean", "de3"))
        out = new_folder()
        tested = (clean, de3, "--images", 6, "--out", out)
        result = finished(run("defend", "--run", *tested, "--steps", 2, "--eot", 2))
        self.assertRegex(result.out, r"undefended .*\nDe³ σ = 0 .*\nDe³ σ = \d\d .*")
        assert_picture(out / "defend.png")
        photo = photos() / "val/red/0.png"
        result = finished(run("defend", photo, "--run", clean, de3, "--sigma", 70, "--out", out))
        answer = r"(red|green|blue) \([\d.]+%\)"
        self.assertRegex(result.out, rf"{photo} +undefended: {answer}\n{photo} +De³ σ = 70: {answer}")

        finished(run("attack", *tested, "--steps", 2, "--threat", "gray", "--norm", "l2", "--eps", "0.5",
                     "--sigma", 70))
        rows = read_csv(out / "attack.csv")
        self.assertEqual({row["threat"] for row in rows}, {"gray"})
        for level in ("off", "σ = 70"):  # the attacker sees the classifier only: no need of EOT
            self.assertEqual([row["attack"] for row in rows if row["level"] == level], ["fgsm", "pgd"])

        # an autoencoder that is given stands in front of every classifier; runs tell them apart
        finished(run("attack", *tested, "--attack", "fgsm", "--eps", "8/255", "--sigma", "off", 70,
                     "--autoencoder", nim))
        found = [(row["defense"], row["run"], row["level"]) for row in read_csv(out / "attack.csv")[4:]]
        self.assertEqual(found, [(f"{words} ({folder})", str(folder), level) for folder in (clean, de3)
                                 for words, level in (("undefended", "off"), ("De³ σ = 70", "σ = 70"))])

        # the same by name
        finished(run("attack", *tested, "--attack", "fgsm", "--eps", "8/255", "--autoencoder", nim,
                     "--defense", "off", "de3:70"))
        again = [(row["defense"], row["run"], row["level"]) for row in read_csv(out / "attack.csv")[8:]]
        self.assertEqual(again, found)

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
        shown = re.findall(r"mask ([\d.]+), visible kept  masked +[\d.]+  filled in +[\d.]+", result.out)
        self.assertEqual(shown, ["0.25", "0.5", "0.75"])
        assert_picture(out / "pretrain.png")
        self.assertEqual(saved(out)["task"], "mim")

    def test_training_learns(self):
        autoencoder, _ = run_module.load(photo_autoencoder(epochs=20), "autoencoder")
        images, _ = next(iter(data.Loader(data.load_dataset(str(photos()), "val", 32), 24)))
        torch.manual_seed(0)
        denoised = autoencoder.reconstruct(add_noise(images, 75), images).clamp(0, 1)
        mean = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
        self.assertGreater(report.psnr(denoised, images).mean(), report.psnr(mean, images).mean() + 0.5)
        result = run("finetune", "--mode", "clean", "--from-scratch", *training(8, warmup=1),
                     *photo_flags(), "--out", new_folder())
        accuracy, = re.findall(r"^clean: ([\d.]+)% of 24", finished(result).out, re.M)
        self.assertGreater(float(accuracy), 80)

    def purified(self, *flags, kind=Defense, task="nim"):
        """Fine-tune: (defense, gradients on?) of each call of its purify, Result, the run's folder."""
        calls, purify, out = [], kind.purify, new_folder()

        def watch(defense, images):
            self.assertTrue(0 <= images.min() and images.max() <= 1)
            calls.append((defense, torch.is_grad_enabled()))
            return purify(defense, images)
        with mock.patch.object(kind, "purify", watch):
            result = finished(run("finetune", "--autoencoder", photo_autoencoder(task), *training(),
                                  *flags, "--workers", 0, "--out", out))
        return calls, result, out

    def test_de3(self):
        """The default: on denoised images, without gradients; the autoencoder stays as it is."""
        before = (photo_autoencoder() / "checkpoint.pt").read_bytes()
        calls, _, out = self.purified(kind=De3)
        self.assertEqual(len(calls), 3 + 1)  # batches, and the held-out images
        self.assertFalse(any(gradients for _, gradients in calls))
        self.assertEqual(str(calls[0][0].sigma), "uniform:0,60")
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
            batch = [False] * attack_steps + [True]
            self.assertEqual(modes, 3 * batch + [False])  # the last on held-out images

    def test_starts_from_the_encoder(self):
        """With a learning rate of nearly zero the encoder's weights are still there."""
        encoder, nim = saved(photo_autoencoder())["model"], ("--autoencoder", photo_autoencoder())
        for flags, same in (nim, True), (("--from-scratch", *photo_flags()), False):
            out = new_folder()
            finished(run("finetune", "--mode", "clean", *flags, *training(base_lr=1e-12), "--out", out))
            weights = saved(out)["model"]
            for name in ("patch_embed.proj.weight", "blocks.3.mlp.fc2.weight"):
                self.assertEqual(torch.allclose(weights[name], encoder[name], atol=1e-6), same)

    def test_no_denoise(self):
        calls, _, out = self.purified("--mode", "no-denoise", "--sigma", "40", kind=NoiseOnly)
        self.assertEqual({(defense.autoencoder, str(defense.sigma)) for defense, _ in calls},
                         {(None, "40")})
        self.assertEqual((saved(out)["defense"], saved(out)["autoencoder"]), ("no-denoise", None))
        table = out / "table"
        finished(run("attack", out, "--sigma", 0, 40, "--images", 3, "--steps", 1, "--eot", 2,
                     "--attack", "pgd+eot", "--eps", "8/255", "--out", table))
        self.assertEqual([row["defense"] for row in read_csv(table / "attack.csv")],
                         ["noise only σ = 0", "noise only σ = 40"])

    def test_adversarial(self):
        """By default on the undefended classifier; with --mode de3 through the defense."""
        for flags, defended in ((), False), (("--mode", "de3"), True):
            with mock.patch.object(finetune, "pgd", wraps=pgd) as attacks:
                calls, _, out = self.purified("--adversarial", "8/255", *flags, kind=De3)
            self.assertEqual(attacks.call_count, 3)  # batches
            for call in attacks.call_args_list:
                self.assertEqual(isinstance(call.args[0], De3), defended)
                self.assertEqual(call.args[3], 8 / 255)
            self.assertEqual(any(gradients for _, gradients in calls), defended)  # attack through purify
            self.assertEqual(saved(out)["defense"], "de3" if defended else "")
        result = finished(run("defend", photos() / "val/red/0.png", "--run", out, "--sigma", 50))
        self.assertIn("De³ σ = 50, adversarial training 8/255: ", result.out)

    def test_mim(self):
        calls, _, out = self.purified("--keep-visible", task="mim", kind=MaskAndFill)
        self.assertEqual(len(calls), 3 + 1)
        for defense, gradients in calls:
            self.assertTrue(defense.keep_visible and not gradients)
            self.assertEqual(defense.mask_ratio.parameters, (0, 0.75))
        self.assertEqual((saved(out)["defense"], saved(out)["options"]),
                         ("mim", dict(keep_visible=True)))
        flags = (out, "--mask-ratio", 0.25, 0.5, "--images", 6, "--steps", 2, "--eot", 2, "--out", out)
        self.assertRegex(finished(run("defend", "--run", *flags)).out,
                         "MIM mask 0.25, visible kept .*\nMIM mask 0.5, visible kept ")
        assert_picture(out / "defend.png")
        finished(run("attack", *flags, "--attack", "pgd+eot", "--eps", "8/255"))
        self.assertEqual([row["level"] for row in read_csv(out / "attack.csv")],
                         ["mask 0.25, visible kept", "mask 0.5, visible kept"])

    def test_mask_ratios_in_training(self):
        """One for each batch, drawn from Uniform(0, --max-mask-ratio)."""
        source, ratios, mim = photo_autoencoder("mim"), [], Autoencoder.mim

        def watch(autoencoder, images, mask_ratio):
            ratios.append(mask_ratio)
            return mim(autoencoder, images, mask_ratio)
        with mock.patch.object(Autoencoder, "mim", watch):
            finished(run("finetune", "--autoencoder", source, "--max-mask-ratio", 0.4, *training(16),
                         "--workers", 0, "--out", new_folder()))
        *drawn, tested = ratios
        self.assertEqual(len(drawn), 16 * 3)
        self.assertTrue(0 <= min(drawn) < 0.05 and 0.35 < max(drawn) <= 0.4)
        self.assertTrue(0 <= tested <= 0.4)

    def choice(self, name, recipe_augments, images, in_memory):
        """What is chosen for so many images: (what augments a batch, mixed, label smoothing)."""
        images_ = TensorDataset(torch.zeros(images)) if in_memory else mock.MagicMock(
            __len__=lambda _: images)
        config = dict(image_size=32, mean=(0.5,) * 3, std=(0.2,) * 3)
        chosen = finetune.choose_augmentation(images_, data.about(name), config, recipe_augments, 0.1)
        return chosen, not in_memory and isinstance(images_.transform, transforms.Compose)

    def test_choice_of_augmentation(self):
        """The digits are shifted, small images cropped, enough others get the paper's recipe."""
        shift, crop, enough = training_steps.shift, training_steps.crop_and_flip, finetune.AUGMENT_FROM
        self.assertEqual(enough, 10_000)
        folder = str(photos())
        for name, augments, images, in_memory, expected, transformed in [
                (folder, True, enough - 1, False, (None, False, 0.0), False),
                (folder, True, enough, False, (None, True, 0.1), True),
                ("cifar10", True, 45_000, True, (crop, False, 0.1), False),
                (folder, True, 100, True, (crop, False, 0.1), False),
                ("digits", True, 1197, True, (shift, False, 0.1), False),
                ("digits", False, 1197, True, (None, False, 0.1), False)]:
            with self.subTest(name=name, images=images, augments=augments):
                self.assertEqual(self.choice(name, augments, images, in_memory), (expected, transformed))

    def test_augment(self):
        """Images that are not kept in memory: mixed labels, smoothed, where there are enough."""
        for augmented, *flags in ((True,), (False,), (True, "--adversarial", "8/255")):
            with mock.patch.object(F, "cross_entropy", wraps=F.cross_entropy) as losses, \
                    mock.patch.object(data, "MEMORY", 0), \
                    mock.patch.object(training_steps, "finetune_transform",
                                      wraps=training_steps.finetune_transform) as transform, \
                    mock.patch.object(finetune, "AUGMENT_FROM", 24 if augmented else 25):
                _, result, _ = self.purified("--mode", "de3", *flags)
            self.assertEqual(transform.call_count, augmented)
            mixed = augmented and not flags  # an attack needs one label
            self.assertEqual("  accuracy " in result.out, not mixed)  # mixed labels have none
            smoothed = [call for call in losses.call_args_list if "label_smoothing" in call.kwargs]
            self.assertEqual(len(smoothed), 3)
            for call in smoothed:
                self.assertEqual(call.args[1].dim(), 1 + mixed)
                expected = 0.0 if flags else 0.1
                self.assertEqual(call.kwargs["label_smoothing"], expected * augmented)

    def test_augmented_in_memory(self):
        """Small images are cropped in both stages, the digits shifted, but in adversarial training."""
        for name, scripts in (("crop_and_flip", (("pretrain", *photo_flags()),
                                                 ("finetune", "--mode", "clean", "--from-scratch",
                                                  *photo_flags()))),
                              ("shift", (("finetune", "--mode", "clean", "--from-scratch"),
                                         ("finetune", "--from-scratch", "--adversarial", "8/255")))):
            for script, *flags in scripts:
                row = data.DATASETS["digits"] if name == "shift" else data.about(str(photos()))
                augment = mock.Mock(side_effect=row.finetune_augment)
                row = row._replace(finetune_augment=augment)
                if script == "pretrain":
                    row = row._replace(pretrain_augment=augment)
                batch = 600 if name == "shift" else 8
                with mock.patch.object(F, "cross_entropy", wraps=F.cross_entropy) as losses, \
                        mock.patch.object(data, "about", lambda dataset: row):
                    finished(run(script, *flags, *training(1, batch), "--max-batch", batch,
                                 "--out", new_folder()))
                augmented = "--adversarial" not in flags
                self.assertEqual(augment.call_count, augmented * (1 if name == "shift" else 3))
                smoothing = {call.kwargs["label_smoothing"] for call in losses.call_args_list
                             if "label_smoothing" in call.kwargs}
                self.assertEqual(smoothing, set() if script == "pretrain" else {0.1 * augmented})

    def test_resnet18(self):
        _, _, out = self.purified("--mode", "de3", "--arch", "resnet18")
        self.assertIn("layer4.1.conv2.weight", "".join(saved(out)["model"]))
        result = run("defend", "--run", out, "--images", 6, "--sigma", "off", 50, "--steps", 1,
                     "--out", out)
        self.assertRegex(finished(result).out, "undefended, resnet18 .*\nDe³ σ = 50, resnet18 ")
