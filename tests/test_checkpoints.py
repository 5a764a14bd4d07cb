"""A damaged checkpoint is refused in one sentence, and an unfinished one with the command for it."""

import argparse
import contextlib
import os
import re
import shlex
import time
import unittest
from unittest import mock

import torch
import torch.distributed as dist

from model import De3, UserError
from support import checkpoints, evaluation, files, runs, training as training_steps, weights
from tests.helpers import (assert_near, assert_refused, finished, in_processes, new_folder, photo_flags,
                           photo_runs, photos, process, random_images, run, small_autoencoder,
                           small_classifier, training)

CONFIG = dict(image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, mean=(0.5,) * 3,
              std=(0.2,) * 3)
WRONG = (None, 3, -1, "x", [], {}, torch.zeros(2), ["x", 2])
REMOVED = object()


def small_checkpoint(kind):
    """A whole checkpoint of a small model after one step: (model, optimizer, checkpoint)."""
    if kind == "autoencoder":
        config = dict(CONFIG, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2, norm_pix=False)
        model, more = small_autoencoder(**config), dict(task="nim")
        loss = model(random_images(), random_images(seed=1)) + model.mask_token.sum()
    else:
        config = dict(CONFIG, num_classes=3, drop_path=0.1, arch="vit")
        model = small_classifier(**{name: config[name] for name in config if name != "arch"})
        more = dict(mode="de3", classes=["blue", "green", "red"], keep_visible=False)
        loss = model(random_images()).sum()
    optimizer = torch.optim.AdamW(training_steps.parameter_groups(model, 0.05))
    loss.backward()
    training_steps.update(optimizer, 1e-3)
    return model, optimizer, dict(
        kind=kind, config=config, settings={"sigma": "75"}, model=model.state_dict(),
        optimizer=optimizer.state_dict(), epoch=2, epochs=2, command="python pretrain.py", **more)


def with_entry(checkpoint, name, value):
    """A copy with another entry, or without it; "config/depth" is the entry depth of config."""
    outer, _, inner = name.partition("/")
    changed = dict(checkpoint)
    if inner:
        changed[outer] = with_entry(checkpoint[outer], inner, value)
    elif value is REMOVED:
        del changed[outer]
    else:
        changed[outer] = value
    return changed


class TestEntries(unittest.TestCase):
    def setUp(self):
        self.path = new_folder() / "checkpoint.pt"
        self.small = {kind: small_checkpoint(kind) for kind in checkpoints.TYPES}

    def refused(self, function, words=""):
        """Whether the function raises, then one sentence that names the file and holds the words."""
        try:
            function()
        except UserError as error:
            self.assertEqual(len(str(error).splitlines()), 1, error)
            self.assertIn(str(self.path.parent), str(error))
            self.assertIn(words, str(error))
            return True
        return False

    def use(self, kind):
        """What the later stages do with a finished run."""
        model, checkpoint = checkpoints.load_finished(self.path.parent, kind)
        images = random_images()
        if kind == "autoencoder":
            self.assertIn(checkpoint["task"], ("nim", "mim"))
            return model.reconstruct(images, images)
        defense = De3(None, model, 50, keep_visible=checkpoint["keep_visible"])
        self.assertIn(len(checkpoint["classes"] or "abc"), (0, 3))
        self.assertIn(checkpoint["mode"], ("clean", "de3", "no-denoise"))
        self.assertEqual(checkpoint["config"]["image_size"], 16)
        return evaluation.describe(checkpoint, defense), defense(images)

    def resume(self, kind):
        """What a stage does with --resume: load, and take a step."""
        model, optimizer, checkpoint = self.small[kind]
        args = argparse.Namespace(resume=True, overwrite=False, epochs=checkpoint["epochs"])
        with contextlib.redirect_stdout(None):
            epoch = runs.open_run(self.path, kind, checkpoint["settings"], args, model, optimizer)
        self.assertIn(epoch, range(3))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        training_steps.update(optimizer, 1e-3)

    def test_whole(self):
        for kind in checkpoints.TYPES:
            model, _, checkpoint = self.small[kind]
            torch.save(checkpoint, self.path)
            self.use(kind)
            loaded, _ = checkpoints.load_finished(self.path.parent, kind)
            self.assertEqual(checkpoints.fingerprint(loaded), checkpoints.fingerprint(model))
            self.resume(kind)

    def test_every_entry(self):
        """Missing or replaced by something else: a sentence, or a run that works."""
        for kind in checkpoints.TYPES:
            *_, whole = self.small[kind]
            torch.save(whole, self.path)  # only to be there: what is read is given below
            names = [*whole, *(f"config/{name}" for name in whole["config"]), "settings/sigma",
                     "model/cls_token", "optimizer/state", "optimizer/param_groups"]
            count = 0
            for name in names:
                for value in (REMOVED, *WRONG):
                    with self.subTest(kind=kind, name=name, value=value):
                        changed = with_entry(whole, name, value)
                        with mock.patch.object(checkpoints, "read_weights", return_value=changed):
                            count += self.refused(lambda: self.use(kind))
                            count += self.refused(lambda: self.resume(kind))
            self.assertGreater(count, len(names) * len(WRONG))

    def test_entry_is_named(self):
        for kind, name, value in [("autoencoder", "task", "dae"), ("classifier", "mode", REMOVED),
                                  ("classifier", "classes", ["one"]), ("classifier", "epoch", 3),
                                  ("autoencoder", "settings", {"sigma": 75}),
                                  ("classifier", "settings", {"adversarial": "much"})]:
            *_, whole = self.small[kind]
            torch.save(with_entry(whole, name, value), self.path)
            self.assertTrue(self.refused(lambda: self.use(kind), name), name)
            self.assertTrue(self.refused(lambda: self.resume(kind), name), name)

    def test_config_of_other_weights(self):
        """It could ask for any amount of memory: refused before a model is made."""
        for kind in checkpoints.TYPES:
            *_, whole = self.small[kind]
            changes = [("depth", 9999), ("depth", 1), ("image_size", 8000), ("patch_size", 1),
                       ("embed_dim", 9000), ("num_heads", 0), ("num_heads", 3)]
            if kind == "autoencoder":
                changes += [("decoder_depth", 9999), ("decoder_embed_dim", 8000)]
            for name, value in changes:
                torch.save(with_entry(whole, f"config/{name}", value), self.path)
                self.assertTrue(self.refused(lambda: self.use(kind)), (name, value))

    def test_optimizer_of_another_model(self):
        """Other groups, other shapes, or moments that are not there."""
        *_, whole = self.small["autoencoder"]
        for change in (lambda saved: saved["param_groups"].pop(),
                       lambda saved: saved["param_groups"].append(dict(params=[99])),
                       lambda saved: saved["param_groups"].reverse(),
                       lambda saved: saved["param_groups"][0].pop("params"),
                       lambda saved: saved["state"].pop(0),
                       lambda saved: saved["state"][0].pop("exp_avg"),
                       lambda saved: saved["state"][0].update(exp_avg=torch.zeros(3)),
                       lambda saved: saved["state"][0].update(step="x"),
                       lambda saved: saved["state"].update({0: None})):
            saved = {"state": {number: dict(moments) for number, moments
                               in whole["optimizer"]["state"].items()},
                     "param_groups": [dict(group) for group in whole["optimizer"]["param_groups"]]}
            change(saved)
            torch.save({**whole, "optimizer": saved}, self.path)
            self.assertTrue(self.refused(lambda: self.resume("autoencoder"), "optimizer"))
            self.use("autoencoder")

    def test_other_tensors(self):
        """Weights that torch.load reads and that are no numbers to calculate with."""
        for kind in checkpoints.TYPES:
            *_, whole = self.small[kind]
            value = whole["model"]["cls_token"]
            for other in (value.to_sparse(), value.to("meta"), value.to(torch.complex64), "x"):
                torch.save(with_entry(whole, "model/cls_token", other), self.path)
                self.assertTrue(self.refused(lambda: self.use(kind), "model"), other)

    def test_other_shapes(self):
        """Both are named."""
        *_, whole = self.small["autoencoder"]
        torch.save(with_entry(whole, "model/cls_token", torch.zeros(1, 1, 20)), self.path)
        for act in (self.use, self.resume):
            self.assertTrue(self.refused(lambda: act("autoencoder"), "cls_token"))
            self.assertTrue(self.refused(lambda: act("autoencoder"), "[1, 1, 20]"))
            self.assertTrue(self.refused(lambda: act("autoencoder"), "[1, 1, 16]"))

    def test_not_finite(self):
        for bad in (float("nan"), float("inf")):
            *_, whole = self.small["autoencoder"]
            whole["model"]["norm.bias"][3] = bad
            torch.save(whole, self.path)
            for act in (self.use, self.resume):
                self.assertTrue(self.refused(lambda: act("autoencoder"), "norm.bias is not finite"))
            self.assertTrue(self.refused(lambda: weights.published_state(self.path), "norm.bias"))

    def test_stages(self):
        """They say the same."""
        folder, source = photo_runs()
        path, flags = source / "checkpoint.pt", (*training(), *photo_flags(folder))
        whole = torch.load(path)
        for name, value in (("settings", REMOVED), ("config", {}), ("epochs", "x")):
            torch.save(with_entry(whole, name, value), path)
            assert_refused(run("finetune", *flags), (path, name))
            assert_refused(run("pretrain", *flags, "--resume"), (path, name))


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
                found = checkpoints.read_weights(path)
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
            self.assertRaisesRegex(UserError, "checksum", checkpoints.read_weights, path)

    def test_older_format(self):
        """Without checksums, as some published files are."""
        path = new_folder() / "weights.pth"
        torch.save({"w": torch.arange(4.)}, path, _use_new_zipfile_serialization=False)
        assert_near(checkpoints.read_weights(path)["w"], torch.arange(4.))


class TestUnfinished(unittest.TestCase):
    def test_killed_run(self):
        """Nobody else trains there meanwhile; then its own command, as it is printed, finishes it."""
        folder = new_folder() / "my runs"
        flags = (*training(12), "--sigma", 120, *photo_flags(folder))
        running = process("pretrain", *flags, "--workers", 1, "--overwrite")
        while not (found := list(folder.rglob("checkpoint.pt"))):
            self.assertIsNone(running.poll(), "ended before it was killed")
            time.sleep(0.01)
        assert_refused(run("pretrain", *flags, "--resume"),
                       ("another process is training in", found[0].parent))
        running.kill()
        running.communicate()
        finetune = ("finetune", "--mode", "clean", "--autoencoder", found[0].parent, *training(),
                    *photo_flags(folder))
        refusal = run(*finetune)
        assert_refused(refusal, ("unfinished", "finish it with: python "))
        command = shlex.split(refusal.err.split("finish it with: python ")[1])
        self.assertEqual(command.count("--resume"), 1)
        self.assertNotIn("--overwrite", command)
        self.assertIn("120", command)
        result = finished(run("pretrain", *command[1:]))
        self.assertIn("going on after epoch", result.out)
        finished(run(*finetune))

    def test_command(self):
        """--resume is added once; a file that holds no command has the default one."""
        folder, source = photo_runs()
        whole = torch.load(source / "checkpoint.pt")
        for command, expected in [
                ("python pretrain.py --resume", "python pretrain.py --resume"),
                ("python pretrain.py --overwrite --seed 3", "python pretrain.py --seed 3 --resume"),
                (REMOVED, f"python pretrain.py --data {photos()}")]:
            changed = with_entry({**whole, "epochs": 5}, "command", command)
            torch.save(changed, source / "checkpoint.pt")
            result = run("finetune", *training(), *photo_flags(folder))
            assert_refused(result, (f"finish it with: {expected}", "--resume"))


class TestProcesses(unittest.TestCase):
    def open_run(self, folders, resume=True):
        """Each of several processes opens the run in its folder: exit code 3 where it is refused."""
        meeting = new_folder() / "meeting"

        def attempt(number, folder):
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=number,
                                    world_size=len(folders))
            model, optimizer, whole = small_checkpoint("autoencoder")
            args = argparse.Namespace(resume=resume, overwrite=False, epochs=whole["epochs"])
            try:
                with contextlib.redirect_stdout(None):
                    runs.open_run(folder / "checkpoint.pt", "autoencoder", whole["settings"], args,
                                  model, optimizer)
            except UserError as error:
                not_shared = "the processes do not find the same .*: choose a --runs folder"
                os._exit(3 if re.match(not_shared, str(error)) else 4)
        return in_processes(attempt, *enumerate(folders))

    def test_folders_that_are_not_shared(self):
        """Two machines, of which one has no checkpoint, or one of another epoch."""
        *_, whole = small_checkpoint("autoencoder")
        none, old, new = new_folder(), new_folder(), new_folder()
        torch.save({**whole, "epoch": 1}, old / "checkpoint.pt")
        torch.save(whole, new / "checkpoint.pt")
        for resume in (True, False):
            for folders in ((none, new), (new, none), (old, new)):
                self.assertEqual(self.open_run(folders, resume), [3, 3])
        for folder in (none, old, new):
            self.assertEqual(self.open_run((folder, folder)), [0, 0])
        files.hold_folder(new)
        self.assertEqual(self.open_run((new, new)), [4, 4])  # trained here: both are told
