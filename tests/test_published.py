"""Weights from elsewhere: what is copied from them, and the stages on files as others publish them."""

import argparse
import contextlib
import io
import shutil
import unittest
import zipfile
from unittest import mock

import numpy as np
import torch

from model import SIZES, UserError, sincos_pos_embed
from support import data, weights
from support import run as run_module
from support.weights import resize_pos_embed
from tests.helpers import (RunsCode, assert_near, assert_refused, finished, new_folder,
                           photo_autoencoder, photo_classifier, photo_flags, photos, random_images,
                           read_csv, run, saved, small_autoencoder, small_classifier, training)


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


TINY = dict(image_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4)


class FilesOfWeights(unittest.TestCase):
    """A folder for such files, and the models of size tiny whose weights they hold."""

    def setUp(self):
        self.folder = new_folder()
        self.autoencoder = small_autoencoder(1, **TINY, decoder_embed_dim=64, decoder_depth=2,
                                             decoder_num_heads=4)
        self.classifier = small_classifier(2, **TINY, num_classes=3)

    def save(self, content, name="weights.pth", **settings):
        torch.save(content, self.folder / name, **settings)
        return self.folder / name

    def load(self, path, kind="classifier", **flags):
        """What load_model makes of a file: (model, checkpoint, what it says)."""
        args = argparse.Namespace(**{**dict(size="tiny", data="digits", task="nim", norm_pix=None, mean=None, std=None),
                                     **flags})
        with contextlib.redirect_stdout(io.StringIO()) as out:
            model, checkpoint = weights.load_model(path, kind, "cpu", args)
        return model, checkpoint, out.getvalue()


class TestPublished(FilesOfWeights):
    """The stages on such files."""

    def test_mae_release(self):
        """{"model": ...}, with or without decoder, with a Namespace beside it."""
        state = self.autoencoder.state_dict()
        encoder = {name: value for name, value in state.items()
                   if "decoder" not in name and name != "mask_token"}
        whole = self.save({"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 800})
        for path, left in ((whole, "nothing"), (self.save({"model": encoder}, "e.pth"), "decoder_b")):
            out = new_folder() / "nim"
            result = finished(run("pretrain", "--init", path, *training(base_lr=1e-9), *photo_flags(),
                                  "--out", out))
            self.assertRegex(result.out, rf"left at the initial value: {left}")
            self.assertIn("loaded: blocks.*.attn.proj.bias", result.out)
            checkpoint = run_module.read(out)
            self.assertEqual(checkpoint["settings"]["init"], str(path))
            for name, value in encoder.items():
                assert_near(checkpoint["model"][name], value, atol=1e-4)
        out = new_folder() / "clean"
        result = finished(run("finetune", "--mode", "clean", "--init", whole, *training(base_lr=1e-9),
                              *photo_flags(), "--out", out))
        self.assertRegex(result.out, "left at the initial value: fc_norm.*head")
        self.assertRegex(result.out, "ignored: decoder_blocks.*norm.weight")
        trained = run_module.read(out)["model"]
        assert_near(trained["blocks.3.mlp.fc2.weight"], state["blocks.3.mlp.fc2.weight"], atol=1e-4)

    def test_other_weights_under_the_same_name(self):
        """A finished run that started from other ones is not shown as one that started from these."""
        state, out = self.classifier.state_dict(), new_folder() / "run"
        path = self.save(state)
        command = ("finetune", "--mode", "clean", "--init", path, *training(), *photo_flags(), "--out", out)
        finished(run(*command))
        self.assertIn("finished run kept", finished(run(*command)).out)
        self.save({**state, "cls_token": state["cls_token"] + 1})
        assert_refused(run(*command), "init_weights")

    def test_later_stages(self):
        """NIM-AdvDef: {"model": autoencoder} and {"classifier": ...}; timm: the state dict itself."""
        autoencoder = self.save({"model": self.autoencoder.state_dict()}, "ae.pth")
        state, out = self.classifier.state_dict(), new_folder()
        common = ("--images", 6, *photo_flags(), "--out", out)
        for content in ({"classifier": state}, {"model": state}, state):
            path = self.save(content)
            result = finished(run("attack", path, "--autoencoder", autoencoder, "--sigma", "off", 20,
                                  "--attack", "pgd", "--eps", 0, "--steps", 1, *common))
            self.assertRegex(result.out, r"undefended +0/255 .*\nDe³ σ = 20 +0/255 ")
            for row in read_csv(out / "attack.csv")[-2:]:
                self.assertEqual(row["run"], path.as_posix())
        finished(run("defend", "--run", path, *common))
        finished(run("finetune", "--autoencoder", autoencoder, *training(), *photo_flags(),
                     "--out", out / "de3"))
        finished(run("defend", "--run", out / "de3", "--images", 6, "--steps", 1))
        kept = run_module.read(out / "de3")["autoencoder"]["model"]
        self.assertTrue(all(torch.equal(kept[name], value)
                            for name, value in self.autoencoder.state_dict().items()))

    def test_photos_without_class_names(self):
        """A published classifier says the number of the class."""
        photo, path = photos() / "val/red/0.png", self.save(self.classifier.state_dict())
        result = run("defend", photo, "--run", path, *photo_flags(), "--out", new_folder())
        self.assertRegex(finished(result).out, rf"{photo} +undefended: [012] \([\d.]+%\)")

    def test_other_image_size(self):
        """Positions are interpolated where the model takes larger images than the weights did."""
        path, out = self.save({"model": self.autoencoder.state_dict()}), new_folder()
        with mock.patch.dict(SIZES, tiny=dict(SIZES["tiny"], image_size=48)):
            finished(run("pretrain", "--init", path, *training(base_lr=1e-9), *photo_flags(),
                         "--out", out))
        assert_near(run_module.read(out)["model"]["pos_embed"],
                    resize_pos_embed(self.autoencoder.pos_embed, 37))

    def test_other_classes(self):
        """A classifier of ten classes gives everything but its head to one of three, and says so."""
        ten, out = small_classifier(3, **TINY), new_folder()
        result = finished(run("finetune", "--mode", "clean", "--init", self.save(ten.state_dict()),
                              *training(base_lr=1e-9), *photo_flags(), "--out", out))
        self.assertIn("its head is for 10 classes, not 3: left out", result.out)
        self.assertRegex(result.out, "left at the initial value: head.bias, head.weight\n")
        trained = run_module.read(out)["model"]
        self.assertEqual(trained["head.weight"].shape, (3, 64))
        assert_near(trained["fc_norm.weight"], ten.fc_norm.weight.detach(), atol=1e-4)

    def test_what_the_file_does_not_show(self):
        """norm_pix and the task of an autoencoder in a file are flags, and what was taken is said."""
        path = self.save({"model": self.autoencoder.state_dict()})
        for flags, words, norm_pix, task, defense in [
                ([], "NIM without norm_pix", False, "nim", "de3"),
                (["--norm-pix"], "NIM with norm_pix", True, "nim", "de3"),
                (["--task", "mim", "--no-norm-pix"], "MIM without norm_pix", False, "mim", "mim")]:
            out = new_folder()
            result = finished(run("finetune", "--autoencoder", path, *flags, *training(), *photo_flags(),
                                  "--out", out))
            self.assertIn(words, result.out)
            checkpoint = run_module.read(out)
            kept = checkpoint["autoencoder"]
            self.assertEqual((kept["config"]["norm_pix"], kept["task"], checkpoint["defense"]),
                             (norm_pix, task, defense))
        classifier, out = self.save(self.classifier.state_dict(), "c.pth"), new_folder()
        finished(run("attack", classifier, "--autoencoder", path, "--task", "mim", *photo_flags(),
                     "--eps", 0, "--attack", "fgsm", "--out", out))
        self.assertEqual({row["defense"] for row in read_csv(out / "attack.csv")},
                         {"MIM mask 0.25", "MIM mask 0.5", "MIM mask 0.75"})

    def test_default_of_norm_pix(self):
        """On at patches of 14 pixels and more, as MAE's; the flag decides where it is given."""
        paper = dict(TINY, image_size=28, patch_size=14, decoder_embed_dim=64, decoder_depth=2,
                     decoder_num_heads=4)
        path = self.save({"model": small_autoencoder(**paper).state_dict()})
        with mock.patch.dict(SIZES, tiny=paper):
            for given, expected in ((None, True), (False, False), (True, True)):
                model, checkpoint, _ = self.load(path, "autoencoder", norm_pix=given)
                self.assertEqual((model.norm_pix, checkpoint["config"]["norm_pix"]),
                                 (expected, expected))

    def test_flags_of_files_for_a_run(self):
        """Where a run's folder says it itself they would change nothing: refused."""
        for flags in (["--norm-pix"], ["--no-norm-pix"], ["--task", "mim"], ["--size", "small"]):
            words = flags[0].replace("--no-", "--")
            with self.subTest(flags):
                assert_refused(run("finetune", "--autoencoder", photo_autoencoder(), *flags, *training(),
                                   "--out", new_folder()), words)
                assert_refused(run("attack", photo_classifier(), *flags, "--images", 2, "--eps", 0,
                                   "--attack", "fgsm", "--out", new_folder()), words)

    def test_refuses(self):
        state, trace = self.classifier.state_dict(), self.folder / "trace"
        class_token = {name.replace("fc_norm", "norm"): value for name, value in state.items()}
        half = self.save(state, "half.pth")
        half.write_bytes(half.read_bytes()[:3000])
        flipped = self.save(state, "flipped.pth")
        content = bytearray(flipped.read_bytes())
        content[len(content) // 2] ^= 1
        flipped.write_bytes(content)
        infinite = {**state, "cls_token": state["cls_token"] / 0}
        shallow = small_autoencoder(**{**TINY, "depth": 3}).state_dict()
        flags = (*training(), *photo_flags(), "--out", new_folder())
        for stage, path, words in [
                ("pretrain", self.folder / "none.pth", "none.pth"), ("pretrain", half, "half.pth"),
                ("pretrain", flipped, ("flipped.pth", "checksum")),
                ("pretrain", self.save({"model": {"w": torch.zeros(1)}}, "w.pth"),
                 ("no ViT weights", "it holds: model")),
                ("pretrain", self.save([state], "list.pth"), "no dictionary"),
                ("pretrain", self.save(RunsCode(trace), "code.pth"), ("run code", "open")),
                ("pretrain", self.save({**state, "pos_embed": torch.zeros(9)}, "p.pth"), "no ViT"),
                ("pretrain", self.save(infinite, "inf.pth"), "not finite"),
                ("pretrain", self.save({"model": small_autoencoder(depth=4).state_dict()}, "s.pth"),
                 ("[1, 1, 16]", "[1, 1, 64]")),
                ("pretrain", self.save({"model": shallow}, "d.pth"), "blocks.3"),
                ("pretrain", photo_autoencoder(), ("--init takes a file", "checkpoint.pt")),
                ("finetune", self.save(class_token, "class.pth"), "class token")]:
            with self.subTest(path):
                extra = ("--mode", "clean") if stage == "finetune" else ()
                assert_refused(run(stage, "--init", path, *extra, *flags), words)
        self.assertFalse(trace.exists())
        result = run("defend", "--run", self.save(state), "--sigma", 20, "--autoencoder",
                     self.save({"model": state}, "noae.pth"), *photo_flags())
        assert_refused(result, "lacks decoder")

    def test_ours_under_others_names(self):
        """Plain tensors under the published names, which any loader of MAE's layout reads."""
        state = torch.load(photo_autoencoder() / "checkpoint.pt")["model"]
        self.assertEqual(list(state), list(self.autoencoder.state_dict()))
        self.assertTrue(all(type(value) is torch.Tensor for value in state.values()))


class TestWhatPeopleHave(FilesOfWeights):
    """Files as other projects write them: the same weights are found in all of them."""

    def assert_taken(self, path, *words):
        """The classifier in the file is ours, and these words were said."""
        model, checkpoint, said = self.load(path)
        images = random_images(6, 3, 32, 32)
        reference = small_classifier(2, **TINY, num_classes=3, mean=checkpoint["config"]["mean"],
                                     std=checkpoint["config"]["std"])
        assert_near(model(images), reference(images))
        self.assertFalse(model.training or any(p.requires_grad for p in model.parameters()))
        for word in words:
            self.assertIn(word, said)
        return said

    def test_places(self):
        """Under the usual names, or any other; what lies beside it is mentioned and left."""
        state = self.classifier.state_dict()
        ema = small_classifier(7, **TINY, num_classes=3).state_dict()
        optimizer = {"state": {}, "param_groups": []}
        for content, place, left in [
                (state, "the file itself", []), ({"model": state}, "model", []),
                ({"state_dict": state, "epoch": 3, "arch": "vit"}, "state_dict", []),
                ({"state_dict_ema": ema, "state_dict": state, "optimizer": optimizer}, "state_dict",
                 ["state_dict_ema", "optimizer"]),
                ({"model_ema": ema, "model": state}, "model", ["model_ema"]),
                ({"model_state_dict": state, "optimizer_state_dict": optimizer}, "model_state_dict",
                 ["optimizer_state_dict"]),
                ({"net": state}, "net", []), ({"ema": ema, "classifier": state}, "classifier", ["ema"])]:
            with self.subTest(place, left=left):
                said = self.assert_taken(self.save(content), f"took {place}", *left)
                self.assertNotIn("prefix", said)

    def test_prefixes(self):
        """One prefix of all names is taken off, and said: DDP's, torch.compile's, Lightning's, both."""
        for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone."):
            state = {prefix + name: value for name, value in self.classifier.state_dict().items()}
            others = {"criterion.weight": torch.ones(3), "module.step": torch.tensor(7)}
            for content in ({"model": state}, {"state_dict": {**others, **state}}, state):
                with self.subTest(prefix):
                    self.assert_taken(self.save(content), f"without the prefix {prefix!r}")

    def test_prefixes_of_an_autoencoder(self):
        """--init and --autoencoder as well, the decoder included."""
        prefixed = {f"module.{name}": value for name, value in self.autoencoder.state_dict().items()}
        path = self.save({"model": prefixed, "epoch": 800})
        model, _, _ = self.load(path, "autoencoder")
        for name, value in self.autoencoder.state_dict().items():
            self.assertTrue(torch.equal(model.state_dict()[name], value), name)
        fresh = small_autoencoder(5, **TINY, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4)
        with contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(weights.initialize_from_file(fresh, path), set())
        assert_near(fresh.decoder_pred.weight, self.autoencoder.decoder_pred.weight)

    def test_numbers_of_numpy(self):
        """Scalars beside the weights, of every kind; what could run code stays out."""
        state = self.classifier.state_dict()
        for number in (np.float64(81.5), np.float32(0.5), np.float16(1), np.int64(3), np.int32(3),
                       np.uint8(3), np.bool_(True)):
            with self.subTest(type(number).__name__):
                self.assert_taken(self.save({"model": state, "best": number, "log": [{"acc": number}]}))

    def test_numbers_of_an_older_numpy(self):
        """NumPy 1 wrote numpy.core where NumPy 2 writes numpy._core."""
        content = {"model": self.classifier.state_dict(), "best": np.float64(81.5)}
        path, old = self.save(content, pickle_protocol=2), self.folder / "old.pth"
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w") as target:
            for name in source.namelist():
                target.writestr(name, source.read(name).replace(b"numpy._core.", b"numpy.core."))
        with zipfile.ZipFile(old) as written:
            pickled, = [name for name in written.namelist() if name.endswith("data.pkl")]
            self.assertIn(b"numpy.core.multiarray\nscalar", written.read(pickled))
        self.assert_taken(old)

    def test_two_models_in_one_file(self):
        """One of a teacher and a student is taken, and the other mentioned."""
        state, others = self.classifier.state_dict(), small_classifier(7, **TINY, num_classes=3).state_dict()
        both = {**{f"student.{name}": value for name, value in state.items()},
                **{f"teacher.{name}": value for name, value in others.items()}}
        self.assert_taken(self.save(both), "without the prefix 'student.'",
                          f"left {len(others)} names without it, as teacher.")

    def test_copy_of_a_run(self):
        """A checkpoint under another name is still a whole run: defense, classes, norm_pix and all."""
        classifier, autoencoder = self.folder / "checkpoint (1).pt", self.folder / "nim_best.pt"
        shutil.copy(photo_classifier() / "checkpoint.pt", classifier)
        shutil.copy(photo_autoencoder() / "checkpoint.pt", autoencoder)
        tables = []
        for source in (classifier, photo_classifier()):
            finished(run("attack", source, "--attack", "fgsm", "--sigma", 0, 20, "--images", 6,
                         "--workers", 0, "--out", self.folder / f"table{len(tables)}"))
            tables.append(read_csv(self.folder / f"table{len(tables)}" / "attack.csv"))
        columns = ("defense", "level", "clean_accuracy", "robust_accuracy", "weights", "data")
        found, expected = [[[row[name] for name in columns] for row in table] for table in tables]
        self.assertEqual(found, expected)
        self.assertIn("De³", found[0][0])
        assert_refused(run("attack", classifier, "--size", "tiny"), "--size")
        finished(run("finetune", "--autoencoder", autoencoder, *training(), "--workers", 0, "--out",
                     self.folder / "de3"))
        config = saved(self.folder / "de3")["autoencoder"]["config"]
        self.assertEqual(config, saved(photo_autoencoder())["config"])
        assert_refused(run("finetune", "--autoencoder", autoencoder, "--no-norm-pix"), "--norm-pix")

    def test_object_that_could_run_code(self):
        """Named, so that it can be left out of the file; nothing of it runs."""
        trace = self.folder / "trace"
        path = self.save({"model": self.classifier.state_dict(), "hook": RunsCode(trace)})
        with self.assertRaisesRegex(UserError, "open"):
            self.load(path)
        self.assertFalse(trace.exists())

    def test_mean_and_std(self):
        """Those of --data, which a file does not show, and which is said; or those of the flags."""
        path = self.save(self.classifier.state_dict())
        for dataset in ("digits", "cifar10"):
            model, _, said = self.load(path, data=dataset)
            assert_near(model.mean.flatten(), torch.tensor(data.DATASETS[dataset].mean))
            self.assertIn(f"mean {data.DATASETS[dataset].mean}", said)
        model, checkpoint, said = self.load(path, mean=[0.5, 0.4, 0.3], std=[0.2, 0.1, 0.5])
        assert_near(model.mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))
        assert_near(model.std.flatten(), torch.tensor([0.2, 0.1, 0.5]))
        self.assertIn("std (0.2, 0.1, 0.5)", said)
        assert_near(run_module.build(checkpoint).std.flatten(), torch.tensor([0.2, 0.1, 0.5]))


if __name__ == "__main__":
    unittest.main()
