"""Where runs lie, which commands make them, and that a checkpoint is saved and loaded safely."""

import argparse
import math
import pickle
import shlex
import unittest
from pathlib import Path
from unittest import mock

import torch

from model import SIZES, Autoencoder, De3, NoiseScale, UserError
from support import checkpoints, runs
from tests.helpers import (RunsCode, assert_near, assert_refused, digits_names, digits_runs, new_folder,
                           photo_autoencoder, random_images, run, small_autoencoder, small_classifier)


def flags(**changes):
    """The flags that name a run, as argparse gives them."""
    return argparse.Namespace(**{**dict(runs="runs", data="digits", size="tiny", seed=0), **changes})


class TestFolders(unittest.TestCase):
    def test_autoencoder(self):
        for changes, arguments, expected in [
                ({}, {}, "runs/digits/nim_gamma10-12"),
                (dict(seed=3), {}, "runs/digits/nim_gamma10-12_seed3"),
                (dict(size="small"), {}, "runs/digits/nim_gamma10-12_small"),
                (dict(data="cifar10", size="small"), {}, "runs/cifar10/nim_gamma10-8"),
                (dict(data="a/b/photos", size="base"), {}, "runs/photos/nim_gamma25-3"),
                (dict(data="./digits", size="base"), {}, "runs/digits-folder/nim_gamma25-3"),
                (dict(data="a/cifar10", size="base"), {}, "runs/cifar10-folder/nim_gamma25-3"),
                ({}, dict(level=NoiseScale.parse("75")), "runs/digits/nim_75"),
                ({}, dict(level=NoiseScale.parse("0")), "runs/digits/nim_0"),
                ({}, dict(task="mim", level=0.75), "runs/digits/mim_0.75"),
                ({}, dict(norm_pix=False), "runs/digits/nim_gamma10-12"),
                ({}, dict(norm_pix=True), "runs/digits/nim_gamma10-12_normpix"),
                (dict(size="base"), dict(norm_pix=False), "runs/digits/nim_gamma10-12_base_plainpix"),
                (dict(seed=1), dict(init="a/mae.pth"), "runs/digits/nim_gamma10-12_init-mae_seed1")]:
            self.assertEqual(runs.autoencoder_folder(flags(**changes), **arguments), Path(expected))

    def test_classifier(self):
        sigma = NoiseScale.parse("uniform:100,400")
        for arguments, expected in [
                (dict(mode="clean"), "clean"),
                (dict(mode="clean", seed=2), "clean_seed2"),
                (dict(mode="de3", sigma=sigma), "de3_uniform100-400"),
                (dict(mode="no-denoise", sigma=NoiseScale.parse("40")), "no-denoise_40"),
                (dict(mode="de3", max_mask_ratio=0.75), "de3"),
                (dict(mode="de3", max_mask_ratio=0.5, keep_visible=True), "de3_0.5_visible"),
                (dict(mode="de3", sigma=sigma, adversarial=16 / 255),
                 "de3_uniform100-400_adversarial16"),
                (dict(mode="clean", arch="resnet18", from_scratch=True), "clean_resnet18"),
                (dict(mode="clean", from_scratch=True), "clean_scratch"),
                (dict(mode="clean", init="x/vit.pth"), "clean_init-vit")]:
            folder = runs.classifier_folder(Path("behind"), **{"seed": 0, **arguments})
            self.assertEqual(folder, Path("behind", expected))

    def test_defaults_are_what_the_stages_make(self):
        folder, pretrained, finetuned = digits_runs()
        args = flags(runs=folder)
        self.assertEqual([path.parent for path in pretrained.wrote()], [runs.autoencoder_folder(args)])
        self.assertEqual({path.parent for path in finetuned.wrote()},
                         set(runs.default_classifier_folders(args)))

    def test_stage_command(self):
        """What differs from the defaults, quoted so that a shell takes it as it is."""
        self.assertEqual(runs.stage_command("pretrain", flags()), "python pretrain.py")
        args = flags(data="my photos", size="tiny", seed=3, runs="a b/runs")
        words = shlex.split(runs.stage_command("finetune", args))
        self.assertEqual(words, ["python", "finetune.py", "--data", "my photos", "--size", "tiny",
                                 "--seed", "3", "--runs", "a b/runs"])

    def test_command_for_a_folder_with_a_blank(self):
        """A stage that misses a run names the command in that form."""
        folder = new_folder() / "my runs"
        assert_refused(run("finetune", "--runs", folder), f"python pretrain.py --runs '{folder}'")


class TestCheckpoints(unittest.TestCase):
    def checkpoint(self, **changes):
        config = dict(SIZES["tiny"], norm_pix=False, mean=(0.5,) * 3, std=(0.2,) * 3)
        return dict(dict(kind="autoencoder", task="nim", settings={}, epoch=1, epochs=3, config=config,
                         model=Autoencoder(**config).state_dict()), **changes)

    def test_failed_save_keeps_the_old_file(self):
        path = new_folder() / "run" / "checkpoint.pt"
        checkpoints.save_checkpoint(path, self.checkpoint())
        old = path.read_bytes()

        full = mock.patch("os.fsync", side_effect=OSError("No space left on device"))
        with full, self.assertRaisesRegex(UserError, "No space left"):
            checkpoints.save_checkpoint(path, self.checkpoint(epoch=2))
        self.assertEqual(path.read_bytes(), old)
        self.assertEqual(list(path.parent.iterdir()), [path])  # no half file takes up the room
        checkpoints.save_checkpoint(path, self.checkpoint(epoch=3))
        self.assertEqual(checkpoints.load_checkpoint(path, "autoencoder")["epoch"], 3)
        self.assertEqual(list(path.parent.iterdir()), [path])

    def test_load_refuses(self):
        """Code in the file is not run; other files are named for what they are."""
        folder = new_folder()
        path, trace = folder / "checkpoint.pt", folder / "trace"
        torch.save(self.checkpoint(model=RunsCode(trace)), path)
        self.assertRaises(UserError, checkpoints.load_checkpoint, path, "autoencoder")
        path.write_bytes(pickle.dumps(self.checkpoint(model=RunsCode(trace)), protocol=2))
        self.assertRaises(UserError, checkpoints.load_checkpoint, path, "autoencoder")
        self.assertFalse(trace.exists())
        torch.save(self.checkpoint(), path)
        checkpoints.load_checkpoint(path, "autoencoder")
        whole = path.read_bytes()
        self.assertRaisesRegex(UserError, "autoencoder.*classifier", checkpoints.load_checkpoint,
                               path, "classifier")
        for content in (whole[:len(whole) // 2], whole[:10], b"", b"hello"):
            path.write_bytes(content)
            self.assertRaises(UserError, checkpoints.load_checkpoint, path, "autoencoder")
        for foreign in ({"model": {}}, [1, 2], torch.zeros(3)):
            torch.save(foreign, path)
            self.assertRaises(UserError, checkpoints.load_checkpoint, path, "autoencoder")

    def test_finished_models_are_frozen(self):
        """Gradients reach the images through a loaded model, and stay out of its weights."""
        autoencoder, _ = checkpoints.load_finished(photo_autoencoder(), "autoencoder")
        folder, *_ = digits_runs()
        classifier, _ = checkpoints.load_finished(folder / "digits" / digits_names()[0], "classifier")
        for model in (autoencoder, classifier):
            self.assertFalse(any(module.training for module in model.modules()))
            self.assertFalse(any(parameter.requires_grad for parameter in model.parameters()))
        images = random_images(2, 3, 32, 32).requires_grad_()
        trained = small_classifier(image_size=32)
        for last in (trained, classifier):
            De3(autoencoder, last, 50)(images).square().sum().backward()
            self.assertGreater(images.grad.abs().sum(), 0)
            images.grad = None
        for model in (autoencoder, classifier):
            self.assertTrue(all(parameter.grad is None for parameter in model.parameters()))
        self.assertTrue(all(parameter.grad is not None for parameter in trained.parameters()))

    def test_architectures(self):
        """Both take [0, 1] images, and normalize them inside."""
        images, config = random_images(), dict(num_classes=7, mean=(0.4,) * 3, std=(0.2,) * 3)
        make = checkpoints.make_classifier
        vit = make(image_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, **config)
        resnet = make(arch="resnet18", image_size=16, drop_path=0.1, **config).eval()
        self.assertEqual((vit(images).shape, resnet(images).shape), ((4, 7), (4, 7)))
        assert_near(vit.mean.flatten(), torch.full((3,), 0.4))
        assert_near(resnet(images), resnet[1]((images - 0.4) / 0.2), atol=1e-4)

    def test_fingerprint(self):
        """It follows from the weights, and notices the smallest change of one."""
        one, two = (checkpoints.fingerprint(small_autoencoder(seed)) for seed in (0, 1))
        self.assertRegex(one, "^[0-9a-f]{12}$")
        self.assertEqual(checkpoints.fingerprint(small_autoencoder(0)), one)
        self.assertNotEqual(one, two)
        changed = small_autoencoder(0)
        weight = changed.decoder_pred.weight.data
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(math.inf))
        self.assertNotEqual(checkpoints.fingerprint(changed), one)
