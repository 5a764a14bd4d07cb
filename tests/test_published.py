"""Weights from elsewhere: files as others publish them become runs, and what starts from a run's weights."""

import argparse
import contextlib
import io
import sys
import unittest
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from model import SIZES, UserError, make_classifier
from studies import convert
from support import data, training
from support import run as run_module
from tests.helpers import (RunsCode, assert_near, assert_refused, finished, new_folder, photo_autoencoder,
                           photo_classifier, photo_flags, photos, random_images, read_csv, run, saved,
                           small_autoencoder, small_classifier)
from tests.helpers import training as training_flags

TINY = dict(image_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4)
DECODER = dict(decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4)
CLASSES = ["blue", "green", "red"]  # of the photos


class TestInitialize(unittest.TestCase):
    """Weights of another run by their common names."""

    def initialize(self, model, other):
        """What training.initialize says."""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            training.initialize(model, other, "runs/other")
        return printed.getvalue()

    def test_from_an_autoencoder(self):
        """The encoder without its norm; the head stays as it is, and that is said."""
        autoencoder, classifier = small_autoencoder(seed=1), small_classifier(seed=2)
        before = {name: value.clone() for name, value in classifier.state_dict().items()}
        encoder = autoencoder.state_dict()
        said = self.initialize(classifier, autoencoder)
        self.assertEqual(said, "weights from runs/other; at their initial value: fc_norm, head\n")
        for name, value in classifier.state_dict().items():
            own = name.startswith(("fc_norm", "head"))
            self.assertTrue(torch.equal(value, before[name] if own else encoder[name]), name)

    def test_head_for_other_classes(self):
        """It is left out, everything else taken."""
        ten, three = small_classifier(seed=1), small_classifier(seed=2, num_classes=3)
        head = three.head.weight.clone()
        self.assertIn("at their initial value: head\n", self.initialize(three, ten))
        assert_near(three.head.weight, head)
        assert_near(three.fc_norm.weight, ten.fc_norm.weight)
        assert_near(three.blocks[1].attn.qkv.weight, ten.blocks[1].attn.qkv.weight)
        same = small_classifier(seed=3)
        self.assertIn("at their initial value: none\n", self.initialize(same, ten))
        self.assertEqual(run_module.fingerprint(same), run_module.fingerprint(ten))

    def test_what_does_not_fit(self):
        """Refused, and the model is as it was."""
        resnet = make_classifier(arch="resnet18", num_classes=3, mean=(0.5,) * 3, std=(0.2,) * 3)
        for model, words in (
                (small_classifier(embed_dim=32), "of another size"), (resnet, "no weights in common"),
                (small_classifier(image_size=32), r"pos_embed is \[1, 17, 16\] in runs/other and \[1, 65")):
            before = run_module.fingerprint(model)
            with self.subTest(words), self.assertRaisesRegex(UserError, words):
                self.initialize(model, small_autoencoder())
            self.assertEqual(run_module.fingerprint(model), before)

    def test_stages(self):
        """--init RUN in both training stages; then nothing else of that run counts."""
        nim, clean = photo_autoencoder(), photo_classifier("clean")
        for script, source, *flags in (
                ("pretrain", nim, "--task", "mim"), ("finetune", clean, "--mode", "clean"),
                ("finetune", nim, "--mode", "clean")):
            out = new_folder() / "run"
            result = finished(run(script, "--init", source, *flags, *photo_flags(),
                                  *training_flags(base_lr=1e-9), "--out", out))
            self.assertIn(f" in {source}; at their initial value: ", result.out)
            given, trained = saved(source)["model"], saved(out)
            for name in ("patch_embed.proj.weight", "cls_token", "blocks.3.mlp.fc2.weight"):
                assert_near(trained["model"][name], given[name], atol=1e-4)
            self.assertEqual(trained["settings"]["init"], str(source))
        assert_refused(run("pretrain", "--init", new_folder(), *photo_flags(), "--out", new_folder() / "run"),
                       "holds no run")


class FilesOfWeights(unittest.TestCase):
    """A folder for such files, and the models of size tiny whose weights they hold."""

    def setUp(self):
        self.folder = new_folder()
        self.autoencoder = small_autoencoder(1, **TINY, **DECODER)
        self.classifier = small_classifier(2, **TINY, num_classes=3)

    def save(self, content, name="weights.pth", **settings):
        torch.save(content, self.folder / name, **settings)
        return self.folder / name

    def try_to_convert(self, path, *flags, kind="classifier", dataset=None, out=None):
        """(the folder of the run that studies.convert makes of a file, its Result)."""
        out = out or new_folder() / Path(path).stem
        command = ("studies.convert", path, "--as", kind, "--data", dataset or photos(), "--size", "tiny")
        return out, run(*command, *flags, "--out", out)

    def convert(self, path, *flags, **what):
        """(that folder, what was said)."""
        out, result = self.try_to_convert(path, *flags, **what)
        return out, finished(result).out

    def assert_taken(self, path, *words):
        """The classifier in the file is ours, and these words were said."""
        out, said = self.convert(path)
        model, checkpoint = run_module.load(out, "classifier")
        images = random_images(6, 3, 32, 32)
        reference = small_classifier(2, **TINY, num_classes=3, mean=checkpoint["config"]["mean"],
                                     std=checkpoint["config"]["std"])
        assert_near(model(images), reference(images))
        for word in words:
            self.assertIn(word, said)
        return said


class TestPublished(FilesOfWeights):
    """From such a file to the stages."""

    def test_mae_release(self):
        """{"model": ...} with MAE's Namespace and optimizer beside it: behind it MIM, or NIM from it."""
        state = self.autoencoder.state_dict()
        optimizer = {"state": {0: {"step": 800, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
        path = self.save({"model": state, "optimizer": optimizer, "epoch": 800, "scaler": {"scale": 65536.0},
                          "args": argparse.Namespace(lr=1e-3, data_path="/datasets01/imagenet")})
        mae, said = self.convert(path, "--task", "mim", "--norm-pix", kind="autoencoder")
        for words in ("took model; left optimizer, scaler", "ignored: nothing",
                      "pretrained by MIM, norm_pix True"):
            self.assertIn(words, said)
        model, checkpoint = run_module.load(mae, "autoencoder")
        self.assertEqual((checkpoint["task"], model.norm_pix, checkpoint["classes"]), ("mim", True, CLASSES))
        for name, value in state.items():
            self.assertTrue(torch.equal(model.state_dict()[name], value), name)

        behind = finished(run("finetune", "--autoencoder", mae, *training_flags(), "--workers", 0))
        self.assertIn("MIM, mask", behind.out)
        trained = saved(mae.with_name("mim"))
        self.assertEqual((trained["defense"], trained["settings"]["data"]), ("mim", str(photos())))
        self.assertTrue(trained["autoencoder"]["config"]["norm_pix"])
        assert_refused(run("finetune", "--autoencoder", mae, "--mode", "de3"), "pretrained for NIM")
        nim = new_folder() / "nim"
        result = finished(run("pretrain", "--init", mae, *photo_flags(), *training_flags(base_lr=1e-9),
                              "--out", nim))
        self.assertIn(f"weights from the autoencoder in {mae}; at their initial value: none", result.out)
        assert_near(saved(nim)["model"]["decoder_pred.weight"], state["decoder_pred.weight"], atol=1e-4)
        self.assertEqual((saved(nim)["task"], saved(nim)["config"]["norm_pix"]), ("nim", False))

    def test_without_a_decoder(self):
        """MAE's other release holds the encoder alone: no autoencoder, and what it lacks is named."""
        encoder = {name: value for name, value in self.autoencoder.state_dict().items()
                   if "decoder" not in name and name != "mask_token"}
        out, result = self.try_to_convert(self.save({"model": encoder}), kind="autoencoder")
        assert_refused(result, ("is no whole autoencoder: it lacks", "decoder", "..."))
        self.assertFalse(out.exists())

    def test_later_stages(self):
        """NIM-AdvDef: {"model": autoencoder} and {"classifier": ...}; timm: the state dict itself."""
        path = self.save({"model": self.autoencoder.state_dict()}, "nim.pth")
        nim, _ = self.convert(path, kind="autoencoder")
        state, tables, found = self.classifier.state_dict(), new_folder(), []
        for name, content in (("advdef", {"classifier": state}), ("mae", {"model": state}), ("timm", state)):
            classifier, _ = self.convert(self.save(content, f"{name}.pth"))
            result = finished(run("attack", classifier, "--autoencoder", nim, "--sigma", "off", 20,
                                  "--images", 6, "--attack", "pgd", "--eps", 0, "--steps", 1,
                                  "--out", tables / name))
            self.assertNotIn("other code", result.out)
            rows = read_csv(tables / name / "attack.csv")
            self.assertEqual([row["defense"] for row in rows],
                             [name, f"{name} behind De³, σ = 20, autoencoder of nim"])
            self.assertEqual({row["run"] for row in rows}, {classifier.as_posix()})
            found.append([(row["clean_accuracy"], row["weights"]) for row in rows])
        self.assertEqual(found, [found[0]] * 3)
        finished(run("finetune", "--autoencoder", nim, *training_flags(), "--workers", 0))
        finished(run("defend", nim.with_name("de3"), "--images", 6, "--steps", 1))
        kept = saved(nim.with_name("de3"))["autoencoder"]["model"]
        for name, value in self.autoencoder.state_dict().items():
            self.assertTrue(torch.equal(kept[name], value), name)
        assert_refused(run("finetune", "--out", classifier, "--resume"), "lacks what --resume needs")

    def test_accuracy(self):
        """A trained classifier keeps its figures on the way through a file of weights."""
        own = photo_classifier("clean")
        out, _ = self.convert(self.save(saved(own)["model"]))
        found = []
        for folder in (own, out):
            finished(run("attack", folder, "--attack", "fgsm", "--eps", "8/255", "--out", new_folder() / "t"))
            model, checkpoint = run_module.load(folder, "classifier")
            found.append((run_module.fingerprint(model), checkpoint["classes"]))
        self.assertEqual(*found)

    def test_order_of_classes(self):
        """Labels count the classes as --data does, and photographs are called by their names."""
        classifier, said = self.convert(self.save(self.classifier.state_dict()))
        self.assertIn("its classes: blue, green, red", said)
        photo = photos() / "val/red/0.png"
        result = finished(run("defend", classifier, "--photos", photo, "--out", new_folder()))
        self.assertRegex(result.out, rf"{photo}  weights: (blue|green|red) [\d.]+%, ")
        ten = self.save(small_classifier(3, **TINY).state_dict(), "ten.pth")
        _, result = self.try_to_convert(ten)
        assert_refused(result, ("knows 10 classes", "has 3"))
        _, said = self.convert(ten, dataset="digits")
        self.assertIn("its classes: 0, 1, 2", said)

    def test_what_the_file_does_not_show(self):
        """norm_pix and the task of an autoencoder are flags, and what was taken is said."""
        path = self.save({"model": self.autoencoder.state_dict()})
        for flags, words, norm_pix, task in [
                ([], "pretrained by NIM, norm_pix False", False, "nim"),
                (["--norm-pix"], "pretrained by NIM, norm_pix True", True, "nim"),
                (["--task", "mim", "--no-norm-pix"], "pretrained by MIM, norm_pix False", False, "mim")]:
            out, said = self.convert(path, *flags, kind="autoencoder")
            self.assertIn(words, said)
            model, checkpoint = run_module.load(out, "autoencoder")
            self.assertEqual((model.norm_pix, checkpoint["task"], checkpoint["config"]["task"]),
                             (norm_pix, task, task))
        finished(run("attack", photo_classifier("clean"), "--autoencoder", out, "--attack", "fgsm",
                     "--eps", 0, "--images", 6, "--out", self.folder))
        self.assertEqual([row["defense"] for row in read_csv(self.folder / "attack.csv")],
                         [f"clean behind MIM, mask {ratio}, autoencoder of weights" for ratio in (0.25, 0.5, 0.75)])

    def test_default_of_norm_pix(self):
        """On at patches of 14 pixels and more, as MAE's; the flag decides where it is given."""
        paper = dict(TINY, image_size=28, patch_size=14, **DECODER)
        path = self.save({"model": small_autoencoder(**paper).state_dict()})
        with mock.patch.dict(SIZES, tiny=paper):
            for flags, expected in (([], True), (["--no-norm-pix"], False), (["--norm-pix"], True)):
                out, _ = self.convert(path, *flags, kind="autoencoder")
                model, checkpoint = run_module.load(out, "autoencoder")
                self.assertEqual((model.norm_pix, checkpoint["config"]["norm_pix"]), (expected, expected))

    def test_mean_and_std(self):
        """Those of --data, which a file does not show, and which is said; or those of the flags."""
        path = self.save(small_classifier(3, **TINY).state_dict())
        for dataset, mean in (("digits", data.DATASETS["digits"].mean), (photos(), data.COLOR["mean"])):
            source = path if dataset == "digits" else self.save(self.classifier.state_dict(), "three.pth")
            out, said = self.convert(source, dataset=dataset)
            assert_near(run_module.load(out)[0].mean.flatten(), torch.tensor(mean))
            self.assertIn(f"mean {mean}", said)
        out, said = self.convert(source, "--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.1, 0.5)
        model, _ = run_module.load(out)
        assert_near(model.mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))
        assert_near(model.std.flatten(), torch.tensor([0.2, 0.1, 0.5]))
        self.assertIn("std (0.2, 0.1, 0.5)", said)

    def test_refuses(self):
        state, trace = self.classifier.state_dict(), self.folder / "trace"
        class_token = {name.replace("fc_norm", "norm"): value for name, value in state.items()}
        half = self.save(state, "half.pth")
        half.write_bytes(half.read_bytes()[:3000])
        flipped = self.save(state, "flipped.pth")
        content = bytearray(flipped.read_bytes())
        content[len(content) // 2] ^= 1
        flipped.write_bytes(content)
        shallow = small_autoencoder(**{**TINY, **DECODER, "depth": 3}).state_dict()
        for kind, path, words in [
                ("autoencoder", self.folder / "none.pth", "there is no file"),
                ("autoencoder", photo_autoencoder(), "there is no file"),
                ("autoencoder", half, "half.pth is damaged"),
                ("classifier", flipped, ("flipped.pth is damaged", "checksum")),
                ("autoencoder", self.save({"model": {"w": torch.zeros(1)}}, "w.pth"),
                 ("no ViT weights", "it holds: model")),
                ("autoencoder", self.save([state], "list.pth"), "no dictionary"),
                ("autoencoder", self.save(RunsCode(trace), "code.pth"), ("run code", "open")),
                ("classifier", self.save({"model": state, "hook": RunsCode(trace)}, "hook.pth"),
                 ("run code", "open")),
                ("classifier", self.save({**state, "pos_embed": torch.zeros(9)}, "p.pth"), "no ViT"),
                ("classifier", self.save({**state, "cls_token": state["cls_token"] / 0}, "inf.pth"),
                 "not finite"),
                ("autoencoder", self.save({"model": small_autoencoder(depth=4).state_dict()}, "s.pth"),
                 ("[1, 1, 16]", "[1, 1, 64]", "--size")),
                ("autoencoder", self.save({"model": shallow}, "d.pth"), ("3 blocks", "4")),
                ("autoencoder", self.save(state, "noae.pth"), ("no whole autoencoder", "decoder")),
                ("classifier", self.save(class_token, "class.pth"), ("class token", "global_pool='avg'"))]:
            with self.subTest(path):
                out, result = self.try_to_convert(path, kind=kind)
                assert_refused(result, words)
                self.assertFalse(out.exists())
        self.assertFalse(trace.exists())

    def test_a_folder_with_a_run(self):
        """Is left as it is."""
        path = self.save(self.classifier.state_dict())
        out, _ = self.convert(path)
        before = (out / "checkpoint.pt").read_bytes()
        _, result = self.try_to_convert(path, out=out)
        assert_refused(result, (f"{out} holds a run", "--out"))
        self.assertEqual((out / "checkpoint.pt").read_bytes(), before)

    def test_stages_take_folders(self):
        """A file in the place of a run is refused."""
        path = self.save(self.classifier.state_dict())
        for stage in (("attack", path), ("finetune", "--autoencoder", path), ("defend", path),
                      ("pretrain", "--init", path, *photo_flags(), "--out", new_folder() / "run")):
            assert_refused(run(*stage), f"{path} holds no run")

    def test_ours_under_others_names(self):
        """Plain tensors under the published names, which any loader of MAE's layout reads."""
        state = torch.load(photo_autoencoder() / "checkpoint.pt")["model"]
        self.assertEqual(list(state), list(self.autoencoder.state_dict()))
        self.assertTrue(all(type(value) is torch.Tensor for value in state.values()))


class TestWhatPeopleHave(FilesOfWeights):
    """Files as other projects write them: the same weights are found in all of them."""

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
            others = {"criterion.weight": torch.ones(3), "step": torch.tensor(7)}
            for content in ({"model": state}, {"state_dict": {**others, **state}}, state):
                with self.subTest(prefix):
                    said = self.assert_taken(self.save(content), f"without the prefix {prefix!r}")
                    self.assertEqual("left 2 names without it, as criterion.weight" in said,
                                     "state_dict" in content)

    def test_prefixes_of_an_autoencoder(self):
        """The decoder included."""
        prefixed = {f"module.{name}": value for name, value in self.autoencoder.state_dict().items()}
        out, _ = self.convert(self.save({"model": prefixed, "epoch": 800}), kind="autoencoder")
        model, _ = run_module.load(out, "autoencoder")
        for name, value in self.autoencoder.state_dict().items():
            self.assertTrue(torch.equal(model.state_dict()[name], value), name)

    def test_two_models_in_one_file(self):
        """One of a teacher and a student is taken, and the other mentioned."""
        state, others = self.classifier.state_dict(), small_classifier(7, **TINY, num_classes=3).state_dict()
        both = {**{f"student.{name}": value for name, value in state.items()},
                **{f"teacher.{name}": value for name, value in others.items()}}
        self.assert_taken(self.save(both), "without the prefix 'student.'",
                          f"left {len(others)} names without it, as teacher.")

    def test_names_that_are_ignored(self):
        """Short, as MAE says them: what a block has of its own once for all blocks."""
        state = self.classifier.state_dict()
        more = {f"blocks.{number}.ls1.gamma": torch.ones(64) for number in range(4)}
        self.assert_taken(self.save({**state, **more, "norm_pre.bias": torch.zeros(64)}),
                          "ignored: blocks.*.ls1.gamma, norm_pre.bias\n")

    def test_numbers_of_numpy(self):
        """Scalars beside the weights, of every kind."""
        state = self.classifier.state_dict()
        numbers = [np.float64(81.5), np.float32(0.5), np.float16(1), np.int64(3), np.int32(3), np.uint8(3),
                   np.bool_(True)]
        self.assert_taken(self.save({"model": state, "best": numbers[0], "log": [{"acc": numbers}]}))

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

    def test_older_format(self):
        """torch.save's before 2020, without checksums."""
        self.assert_taken(self.save(self.classifier.state_dict(), _use_new_zipfile_serialization=False))

    def test_safetensors(self):
        """Where that package is installed; else a sentence says what to install."""
        path = self.folder / "model.safetensors"
        try:
            from safetensors.torch import save_file
        except ImportError:
            path.write_bytes(b"")
        else:
            save_file(self.classifier.state_dict(), path)
            self.assert_taken(path)
        with mock.patch.dict(sys.modules, {"safetensors.torch": None}), \
                self.assertRaisesRegex(UserError, "pip install safetensors"):
            convert.read_weights(path)


if __name__ == "__main__":
    unittest.main()
