"""Weights from elsewhere: what is copied from them, and the stages on files as others publish them."""

import argparse
import contextlib
import io
import unittest
from pathlib import Path
from unittest import mock

import torch

from model import SIZES, UserError, sincos_pos_embed
from support import weights
from support.weights import resize_pos_embed
from tests.helpers import (RunsCode, assert_near, assert_refused, finished, new_folder,
                           photo_autoencoder, photo_flags, photos, random_images, read_csv, run,
                           small_autoencoder, small_classifier, training)


class TestInitialize(unittest.TestCase):
    def test_resize_pos_embed(self):
        """The class token's stays; a constant stays constant, a ramp over the rows a ramp."""
        embedding = sincos_pos_embed(16, 4)
        self.assertTrue(torch.equal(resize_pos_embed(embedding, 17), embedding))
        larger = resize_pos_embed(embedding, 65)
        self.assertEqual(larger.shape, (1, 65, 16))
        assert_near(larger[:, 0], embedding[:, 0])
        flat = torch.cat([torch.zeros(1, 1, 16), torch.arange(16.).expand(1, 16, 16)], 1)
        assert_near(resize_pos_embed(flat, 65)[0, 1:], torch.arange(16.).expand(64, 16))
        ramp = torch.arange(4.).repeat_interleave(4)[None, :, None]  # the row number
        ramp = resize_pos_embed(torch.cat([torch.zeros(1, 1, 1), ramp], 1), 65)[0, 1:, 0].view(8, 8)
        self.assertTrue((ramp.diff(dim=0) > 0).all() and (ramp.diff(dim=1).abs() < 1e-5).all())

    def test_start_from_autoencoder(self):
        """The encoder without its norm; the head stays as it is; positions fit the image size."""
        autoencoder, classifier = small_autoencoder(seed=1), small_classifier(seed=2)
        before = {name: value.clone() for name, value in classifier.state_dict().items()}
        encoder = autoencoder.state_dict()
        loaded, left, ignored = weights.initialize(classifier, encoder, "the autoencoder")
        for name, value in classifier.state_dict().items():
            own = name.startswith(("fc_norm", "head"))
            self.assertTrue(torch.equal(value, before[name] if own else encoder[name]), name)
            self.assertTrue(name in (left if own else loaded))
        self.assertEqual(loaded | ignored, encoder.keys())
        larger = small_classifier(image_size=32)
        weights.initialize(larger, encoder, "the autoencoder")
        assert_near(larger.pos_embed.detach(), resize_pos_embed(autoencoder.pos_embed, 65))
        with self.assertRaises(UserError):
            weights.initialize(small_classifier(embed_dim=32), encoder, "the autoencoder")


class TestPublished(unittest.TestCase):
    TINY = dict(image_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4)

    def setUp(self):
        self.folder = new_folder()
        self.autoencoder = small_autoencoder(1, **self.TINY, decoder_embed_dim=64, decoder_depth=2,
                                             decoder_num_heads=4)
        self.classifier = small_classifier(2, **self.TINY, num_classes=3)

    def save(self, content, name="weights.pth"):
        torch.save(content, self.folder / name)
        return self.folder / name

    def test_mae_release(self):
        """{"model": ...}, with or without decoder, with a Namespace beside it."""
        state = self.autoencoder.state_dict()
        encoder = {name: value for name, value in state.items()
                   if "decoder" not in name and name != "mask_token"}
        whole = self.save({"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 800})
        for path, left in ((whole, "nothing"), (self.save({"model": encoder}, "e.pth"), "decoder_b")):
            result = finished(run("pretrain", "--init", path, *training(base_lr=1e-9),
                                  *photo_flags(new_folder())))
            self.assertRegex(result.out, rf"left at the initial value: {left}")
            self.assertIn("loaded: blocks.*.attn.proj.bias", result.out)
            self.assertIn(f"init-{path.stem}", str(result.wrote()[0]))
            trained = torch.load(result.wrote()[0])["model"]
            for name, value in encoder.items():
                assert_near(trained[name], value, atol=1e-4)
        result = finished(run("finetune", "--mode", "clean", "--init", whole, *training(base_lr=1e-9),
                              *photo_flags(new_folder())))
        self.assertRegex(result.out, "left at the initial value: fc_norm.*head")
        self.assertRegex(result.out, "ignored: decoder_blocks.*norm.weight")
        trained = torch.load(result.wrote()[0])["model"]
        assert_near(trained["blocks.3.mlp.fc2.weight"], state["blocks.3.mlp.fc2.weight"], atol=1e-4)

    def test_later_stages(self):
        """NIM-AdvDef: {"model": autoencoder} and {"classifier": ...}; timm: the state dict itself."""
        autoencoder = self.save({"model": self.autoencoder.state_dict()}, "ae.pth")
        state, folder = self.classifier.state_dict(), new_folder()
        for content in ({"classifier": state}, {"model": state}, state):
            path = self.save(content)
            flags = ("--classifier", path, "--images", 6, *photo_flags(folder))
            result = finished(run("attack", *flags, "--autoencoder", autoencoder, "--sigma", "off", 20,
                                  "--attack", "pgd", "--eps", 0, "--steps", 1))
            self.assertRegex(result.out, r"undefended +0/255 .*\nDe³ σ = 20 +0/255 ")
            for row in read_csv(folder / "photos/attack.csv")[-2:]:
                self.assertEqual(Path(row["run"]).resolve(), path.resolve())
        finished(run("defend", *flags))
        images = random_images(6, 3, 32, 32)
        args = argparse.Namespace(size="tiny", data="x")
        with contextlib.redirect_stdout(None):
            loaded, _ = weights.load_model(path, "classifier", "cpu", args)
        assert_near(loaded(images), self.classifier(images))
        self.assertFalse(loaded.training or any(p.requires_grad for p in loaded.parameters()))
        result = finished(run("finetune", "--mode", "de3", "--autoencoder", autoencoder, *training(),
                              *photo_flags(folder)))
        finished(run("defend", "--classifier", result.wrote()[0].parent, "--autoencoder", autoencoder,
                     "--images", 6, *photo_flags(folder), "--steps", 1))

    def test_photos_without_class_names(self):
        """A published classifier says the number of the class."""
        photo = photos() / "val/red/0.png"
        result = run("defend", photo, "--classifier", self.save(self.classifier.state_dict()),
                     *photo_flags(new_folder()))
        self.assertRegex(finished(result).out, rf"{photo} +undefended: [012] \([\d.]+%\)")

    def test_other_image_size(self):
        """Positions are interpolated where the model takes larger images than the weights did."""
        path = self.save({"model": self.autoencoder.state_dict()})
        larger = dict(SIZES["tiny"], image_size=48)
        with mock.patch.dict(SIZES, tiny=larger):
            result = finished(run("pretrain", "--init", path, *training(base_lr=1e-9),
                                  *photo_flags(new_folder())))
        assert_near(torch.load(result.wrote()[0])["model"]["pos_embed"],
                    resize_pos_embed(self.autoencoder.pos_embed, 37))

    def test_other_classes(self):
        """A classifier of ten classes gives everything but its head to one of three, and says so."""
        ten = small_classifier(3, **self.TINY)
        result = finished(run("finetune", "--mode", "clean", "--init", self.save(ten.state_dict()),
                              *training(base_lr=1e-9), *photo_flags(new_folder())))
        self.assertIn("its head is for 10 classes, not 3: left out", result.out)
        self.assertRegex(result.out, "left at the initial value: head.bias, head.weight\n")
        trained = torch.load(result.wrote()[0])["model"]
        self.assertEqual(trained["head.weight"].shape, (3, 64))
        assert_near(trained["fc_norm.weight"], ten.fc_norm.weight.detach(), atol=1e-4)

    def test_what_the_file_does_not_show(self):
        """norm_pix and the task of a published autoencoder are arguments, and said."""
        path = self.save({"model": self.autoencoder.state_dict()})
        for arguments, words, norm_pix, task in [
                ({}, "NIM without norm_pix", False, "nim"),
                (dict(norm_pix=True, task="mim"), "MIM with norm_pix", True, "mim")]:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                model, checkpoint = weights.load_published(path, "autoencoder", "tiny", "digits",
                                                           **arguments)
            self.assertIn(words, out.getvalue())
            self.assertEqual((model.norm_pix, checkpoint["task"]), (norm_pix, task))

    def test_refuses(self):
        state, trace = self.classifier.state_dict(), self.folder / "trace"
        class_token = {name.replace("fc_norm", "norm"): value for name, value in state.items()}
        half = self.save(state, "half.pth")
        half.write_bytes(half.read_bytes()[:3000])
        shallow = small_autoencoder(**{**self.TINY, "depth": 3}).state_dict()
        flags = (*training(), *photo_flags(new_folder()))
        for stage, path, words in [
                ("pretrain", self.folder / "none.pth", "none.pth"), ("pretrain", half, "half.pth"),
                ("pretrain", self.save({"model": {"w": torch.zeros(1)}}, "w.pth"), "no ViT"),
                ("pretrain", self.save(RunsCode(trace), "code.pth"), "run code"),
                ("pretrain", self.save({**state, "pos_embed": torch.zeros(9)}, "p.pth"), "no ViT"),
                ("pretrain", self.save({"model": small_autoencoder(depth=4).state_dict()}, "s.pth"),
                 ("[1, 1, 16]", "[1, 1, 64]")),
                ("pretrain", self.save({"model": shallow}, "d.pth"), "blocks.3"),
                ("finetune", self.save(class_token, "class.pth"), "class token")]:
            with self.subTest(path):
                extra = ("--mode", "clean") if stage == "finetune" else ()
                assert_refused(run(stage, "--init", path, *extra, *flags), words)
        self.assertFalse(trace.exists())
        result = run("defend", "--classifier", self.save(state), "--sigma", 20, "--autoencoder",
                     self.save({"model": state}, "noae.pth"), *photo_flags(new_folder()))
        assert_refused(result, "lacks decoder")

    def test_ours_under_others_names(self):
        """Plain tensors under the published names, which any loader of MAE's layout reads."""
        state = torch.load(photo_autoencoder() / "checkpoint.pt")["model"]
        self.assertEqual(list(state), list(self.autoencoder.state_dict()))
        self.assertTrue(all(type(value) is torch.Tensor for value in state.values()))
