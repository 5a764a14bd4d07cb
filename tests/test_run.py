"""A checkpoint is read, built and loaded with care, and knows the code that it was made by."""

import argparse
import ast
import math
import pickle
import subprocess
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from model import De3, UserError, make_classifier
from support import run as run_module
from tests.helpers import (REPOSITORY, RunsCode, assert_near, assert_refused, new_folder,
                           photo_autoencoder, photo_classifier, random_images, run, saved,
                           small_autoencoder, small_classifier, training)

CONFIG = dict(image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, mean=(0.5,) * 3,
              std=(0.2,) * 3)


def small_checkpoint(kind, **config):
    """A whole checkpoint of a small model, and the model."""
    if kind == "autoencoder":
        config = dict(CONFIG, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2, norm_pix=True,
                      **config)
        model = small_autoencoder(**config)
    else:
        config = dict(CONFIG, arch="vit", drop_path=0.1, **{"num_classes": 3, **config})
        torch.manual_seed(0)
        model = make_classifier(**config)
    checkpoint = dict(kind=kind, config=config, settings={}, data=dict(name="digits"), epoch=2, epochs=2,
                      log=[], made_by=[run_module.provenance(["model.py"])], model=model.state_dict())
    return checkpoint, model


class TestCheckpoint(unittest.TestCase):
    def setUp(self):
        self.folder = new_folder()
        self.path = self.folder / "checkpoint.pt"

    def refused(self, words, kind="autoencoder"):
        """The folder cannot be loaded; one sentence names it and says so in these words."""
        with self.assertRaisesRegex(UserError, words) as refusal:
            run_module.load(self.folder, kind)
        self.assertEqual(len(str(refusal.exception).splitlines()), 1)
        self.assertIn(str(self.folder), str(refusal.exception))

    def test_round_trip(self):
        """The model that was saved, in evaluation mode, frozen; its gradients reach the images."""
        for kind in run_module.MAKERS:
            checkpoint, model = small_checkpoint(kind)
            torch.save(checkpoint, self.path)
            loaded, found = run_module.load(self.folder, kind)
            self.assertEqual(found["config"], checkpoint["config"])
            self.assertEqual(run_module.fingerprint(loaded), run_module.fingerprint(model))
            self.assertFalse(any(module.training for module in loaded.modules()))
            self.assertFalse(any(parameter.requires_grad for parameter in loaded.parameters()))
        autoencoder, _ = run_module.load(photo_autoencoder(), "autoencoder")
        images, trained = random_images(2, 3, 32, 32).requires_grad_(), small_classifier(image_size=32)
        De3(autoencoder, trained, 50)(images).square().sum().backward()
        self.assertGreater(images.grad.abs().sum(), 0)
        self.assertTrue(all(parameter.grad is None for parameter in autoencoder.parameters()))
        self.assertTrue(all(parameter.grad is not None for parameter in trained.parameters()))

    def test_many_classes(self):
        """iNaturalist has ten thousand."""
        checkpoint, model = small_checkpoint("classifier", num_classes=10_001)
        torch.save({**checkpoint, "classes": [f"{number:05}" for number in range(10_001)]}, self.path)
        loaded, _ = run_module.load(self.folder, "classifier")
        self.assertEqual(loaded(random_images()).shape, (4, 10_001))
        self.assertEqual(run_module.fingerprint(loaded), run_module.fingerprint(model))

    def test_code_is_not_run(self):
        """Nor by a stage."""
        checkpoint, _ = small_checkpoint("autoencoder")
        trace = self.folder / "trace"
        for protocol in (None, 2):
            content = {**checkpoint, "model": RunsCode(trace)}
            if protocol is None:
                torch.save(content, self.path)
            else:
                self.path.write_bytes(pickle.dumps(content, protocol))
            self.refused("run code")
            for stage in (("finetune", "--autoencoder", self.folder), ("defend", "--run", self.folder),
                          ("pretrain", "--out", self.folder, "--resume"), ("attack", self.folder),
                          ("attack", self.path),
                          ("finetune", "--mode", "clean", "--init", self.path)):
                assert_refused(run(*stage), (self.path, "run code"))
        self.assertFalse(trace.exists())

    def test_missing(self):
        """A later stage names the command that makes the run."""
        for maker, *stage in (("pretrain.py", "finetune", "--autoencoder"), ("finetune.py", "attack"),
                              ("finetune.py", "defend", "--run")):
            assert_refused(run(*stage, self.folder),
                           f"make it with python {maker} --out {self.folder}, or")
        assert_refused(run("attack", self.folder / "clean"), "finetune.py --mode clean --out")

    def test_other_files(self):
        """Truncated, of another kind, of something else, or of an earlier layout."""
        self.refused(r"holds no run .*python pretrain.py --out")
        self.refused(r"holds no run .*python finetune.py --out", "classifier")
        checkpoint, _ = small_checkpoint("autoencoder")
        torch.save(checkpoint, self.path)
        whole = self.path.read_bytes()
        self.refused("holds autoencoder weights where classifier weights", "classifier")
        for content in (whole[:len(whole) // 2], whole[:-30], whole[:10], b"", b"hello"):
            self.path.write_bytes(content)
            self.refused("is damaged")
        for foreign in ({"model": {}}, [1, 2], torch.zeros(3), "x"):
            torch.save(foreign, self.path)
            self.refused("not a checkpoint of this project")
        for name in checkpoint:
            torch.save({key: value for key, value in checkpoint.items() if key != name}, self.path)
            self.refused("not a checkpoint of this project")

    def test_what_does_not_fit(self):
        """Config and weights must make one model: a sentence says what does not."""
        checkpoint, _ = small_checkpoint("autoencoder")
        model = checkpoint["model"]
        others = [("config", {**checkpoint["config"], name: value}, words) for name, value, words in [
            ("depth", 1, "blocks.1"), ("depth", 3, "blocks.2"), ("embed_dim", 32, "size mismatch"),
            ("num_heads", 3, "3 heads"), ("image_size", 8, "pos_embed"), ("patch_size", 5, "16.* 5"),
            ("dropout", 0.1, "dropout")]]
        without = {name: value for name, value in model.items() if name != "cls_token"}
        others += [("model", {**model, "cls_token": torch.zeros(1, 1, 20)}, "cls_token"),
                   ("model", without, "cls_token"), ("model", {**model, "more": torch.zeros(2)}, "more"),
                   ("model", {**model, "cls_token": torch.full((1, 1, 16), math.nan)}, "not finite"),
                   ("model", {**model, "cls_token": "x"}, "fit"), ("model", None, "fit")]
        for name, value, words in others:
            with self.subTest(words):
                torch.save({**checkpoint, name: value}, self.path)
                self.refused(words)
                assert_refused(run("finetune", "--autoencoder", self.folder, *training()), self.path)
        held = {**saved(photo_classifier())["autoencoder"], "model": without}
        torch.save({**saved(photo_classifier()), "autoencoder": held}, self.path)
        assert_refused(run("attack", self.folder), ("autoencoder in", self.folder))

    def test_architectures(self):
        """Both take [0, 1] images, and normalize them inside."""
        images, config = random_images(), dict(num_classes=7, mean=(0.4,) * 3, std=(0.2,) * 3)
        vit = make_classifier(image_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, **config)
        resnet = make_classifier(arch="resnet18", image_size=16, drop_path=0.1, **config).eval()
        self.assertEqual((vit(images).shape, resnet(images).shape), ((4, 7), (4, 7)))
        assert_near(vit.mean.flatten(), torch.full((3,), 0.4))
        assert_near(resnet(images), resnet[1]((images - 0.4) / 0.2), atol=1e-4)

    def test_fingerprint(self):
        """It follows from the weights, and notices the smallest change of one, or of a number beside."""
        one, two = (run_module.fingerprint(small_autoencoder(seed)) for seed in (0, 1))
        self.assertRegex(one, "^[0-9a-f]{12}$")
        self.assertEqual(run_module.fingerprint(small_autoencoder(0)), one)
        self.assertNotEqual(one, two)
        changed = small_autoencoder(0)
        weight = changed.decoder_pred.weight.data
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(math.inf))
        self.assertNotEqual(run_module.fingerprint(changed), one)
        self.assertNotEqual(run_module.fingerprint(small_autoencoder(0, norm_pix=True)), one)
        otherwise_normalized = small_autoencoder(0)
        otherwise_normalized.mean += 0.1
        self.assertNotEqual(run_module.identity(otherwise_normalized), run_module.identity(small_autoencoder(0)))


class TestDamage(unittest.TestCase):
    def test_single_bits(self):
        """A flipped bit is noticed, or lies where nothing is read and changes nothing."""
        path, state = new_folder() / "checkpoint.pt", {"w": torch.randn(40, 3), "b": torch.randn(7)}
        torch.save({"model": state, "epoch": 5}, path)
        whole, refused = path.read_bytes(), 0
        for position in range(0, len(whole), 3):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            try:
                found = run_module.read_weights(path)
            except UserError as error:
                self.assertEqual(len(str(error).splitlines()), 1, error)
                refused += 1
                continue
            self.assertEqual((list(found), found["epoch"]), (["model", "epoch"], 5), position)
            for name, value in state.items():
                self.assertTrue(torch.equal(found["model"][name], value), position)
        self.assertGreater(refused, 40 * 3 * 4 / 3)  # at least those in the weights

    def test_every_bit_of_a_number(self):
        path, weight = new_folder() / "checkpoint.pt", torch.tensor([1234.5678])
        torch.save({"w": weight}, path)
        whole = path.read_bytes()
        start = whole.index(weight.numpy().tobytes())
        for bit in range(32):
            damaged = bytearray(whole)
            damaged[start + bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            self.assertRaisesRegex(UserError, "checksum", run_module.read_weights, path)

    def test_other_formats(self):
        """The older one, without checksums, and what training checkpoints of others hold besides."""
        path = new_folder() / "weights.pth"
        torch.save({"w": torch.arange(4.)}, path, _use_new_zipfile_serialization=False)
        assert_near(run_module.read_weights(path)["w"], torch.arange(4.))
        torch.save({"w": torch.arange(4.), "args": argparse.Namespace(lr=1), "best": np.float64(3),
                    "loss": np.float32(2), "epoch": np.int64(7)}, path)
        self.assertEqual(run_module.read_weights(path)["epoch"], 7)


class TestCode(unittest.TestCase):
    CODE = ('"""Doc."""\nX = 3\n\n\nclass A(B):\n    """Doc."""\n    y = "x"\n\n    def f(self):\n'
            '        return 1\n')

    def digest(self, *changes):
        """Of a file of that code, after this change (what, by what)."""
        path = new_folder() / "code.py"
        path.write_text(self.CODE.replace(*changes) if changes else self.CODE)
        return run_module.digest_of_file(path)

    def test_digest(self):
        """Comments, docstrings and layout change nothing; everything else does."""
        whole = self.digest()
        for change in [("Doc.", "Other."), ("X = 3", "X = 3  # three"), ("\n\n\n", "\n\n# a line\n\n\n"),
                       ("X = 3", "X = (3)"), ('"x"', "'x'"), ("    ", "  "), ('    """Doc."""\n', ""),
                       ("f(self):\n", 'f(self):\n        """Doc."""\n')]:
            with self.subTest(change):
                self.assertEqual(self.digest(*change), whole)
        for change in [("X = 3", "X = 4"), ('"x"', '"z"'), ("return 1", "return 1.0"), ("(B)", "(C)"),
                       ("return 1", 'return "Doc."'), ("X = 3", "X = 3; Y = 4"), ("def f", "def g")]:
            with self.subTest(change):
                self.assertNotEqual(self.digest(*change), whole)
        self.assertEqual(run_module.digest_of_file(new_folder() / "none.py"), "missing")

    def test_digest_in_other_pythons(self):
        """Known values: what Python 3.10 to 3.13 write of a syntax tree differs, the digest does not."""
        known = new_folder() / "code.py"
        known.write_text('def f(a, *b):\n    return f"{a:>{b}} {a!r:{b[0]}.3}" + f"{b[\'x\']}" f"", None, []\n')
        self.assertEqual(run_module.digest_of_file(known), "ce71afa28fcf")
        run_module.digest_of_file.cache_clear()
        without, with_text = "f'{a:{b}}'", ast.parse("f'{a:{b}}'")
        spec, = [node for node in ast.walk(with_text) if isinstance(node, ast.FormattedValue)
                 and node.format_spec]
        spec.format_spec.values.append(ast.Constant(""))  # as Python 3.12 does
        known.write_text(without)
        expected = run_module.digest_of_file(known)
        run_module.digest_of_file.cache_clear()
        with mock.patch("ast.parse", return_value=with_text):
            self.assertEqual(run_module.digest_of_file(known), expected)
        run_module.digest_of_file.cache_clear()

    def test_commit(self):
        """Of the checkout, with a mark for uncommitted changes; nothing where git knows none."""
        def git(*words):
            return subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], cwd=folder,
                                  check=True, capture_output=True, text=True).stdout.strip()

        def found():
            run_module.commit.cache_clear()
            with mock.patch.object(run_module, "REPOSITORY", folder):
                return run_module.commit()
        self.addCleanup(run_module.commit.cache_clear)
        folder = new_folder()
        self.assertEqual(found(), "")
        (folder / "code.py").write_text("1")
        git("init", "-q")
        git("add", "code.py")
        git("commit", "-q", "-m", "first")
        commit = git("rev-parse", "HEAD")[:12]
        (folder / "untracked").write_text("2")
        self.assertEqual(found(), commit)
        (folder / "code.py").write_text("2")
        self.assertEqual(found(), commit + "+")
        with mock.patch("subprocess.run", side_effect=FileNotFoundError):  # no git at all
            self.assertEqual(found(), "")

    def test_made_by(self):
        """A run says by which command and code it was made; a row of a table, by which code it was."""
        made, = saved(photo_classifier())["made_by"]
        self.assertEqual(made["from_epoch"], 1)
        self.assertIn("finetune.py --mode de3 --autoencoder", made["command"])
        self.assertEqual(set(made["code"]), {"model.py", "support/training.py", "finetune.py"})
        for name, digest in made["code"].items():
            self.assertEqual(digest, run_module.digest_of_file(REPOSITORY / name))
        for row in saved(photo_classifier())["log"]:
            self.assertEqual(row["commit"], run_module.commit())

        model, files = small_classifier(), ("attack.py",)
        row = run_module.origin_of_row(model, files)
        self.assertEqual(row["weights"], run_module.identity(model))
        for edited in ("model.py", "attack.py", "support/data.py"):
            def changed(path, edited=edited):
                return "changed" if Path(path) == REPOSITORY / edited else "same"
            with mock.patch.object(run_module, "digest_of_file", lambda path: "same"):
                before = run_module.origin_of_row(model, files)["code"]
            with mock.patch.object(run_module, "digest_of_file", changed):
                after = run_module.origin_of_row(model, files)["code"]
            self.assertEqual(after != before, edited != "support/data.py")
