"""What the tests share: small models and images, and the stages run on small data.

Everything is written to one temporary folder, which is made when it is first needed and removed at
the end. Runs that several tests look at are made once, by whichever test comes first.
"""

import atexit
import contextlib
import csv
import functools
import importlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import warnings
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from model import Autoencoder, Classifier
from support import cli, data
from support import run as run_module

torch.set_num_threads(1)
run_module.digest_of_code = functools.cache(run_module.digest_of_code)  # each start of a stage asks anew
REPOSITORY = Path(__file__).resolve().parents[1]
ENCODER = dict(image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
DECODER = dict(decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)
CHECK = unittest.TestCase()  # its assert methods, for functions outside a test


# ---------------------------------------------------------------------------- models and images

def small_autoencoder(seed=0, **config):
    """An Autoencoder for images of 16x16."""
    torch.manual_seed(seed)
    return Autoencoder(**{**ENCODER, **DECODER, **config})


def small_classifier(seed=0, **config):
    """A Classifier for images of 16x16, with a head that is large enough for its logits to matter."""
    torch.manual_seed(seed)
    classifier = Classifier(**{**ENCODER, **config})
    nn.init.normal_(classifier.head.weight)
    return classifier.eval()


def random_images(*shape, seed=0, low=0.0, high=1.0):
    """Uniform in [low, high]; [4, 3, 16, 16] unless a shape is given."""
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*(shape or (4, 3, 16, 16)), generator=generator)


def assert_near(actual, expected, atol=1e-5, rtol=1e-5):
    """Same shape, same dtype, values within the tolerance."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def seeded(function, *arguments, seed=3):
    """Call the function with the random numbers of this seed."""
    torch.manual_seed(seed)
    return function(*arguments)


class Linear(nn.Module):
    """Two classes with logits 0 and w·x + b: label 0 is attacked by moving along w."""

    def __init__(self, shape=(3, 4, 4), bias=0.0):
        super().__init__()
        self.w = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        self.bias = bias

    def forward(self, x):
        score = (x * self.w).flatten(1).sum(1) + self.bias
        return torch.stack([torch.zeros_like(score), score], dim=1)


@functools.cache
def linear_on_digits():
    """A linear classifier fitted by least squares on the training digits; 100 test digits, labels."""
    images, labels, _ = data.load_images("digits", "train", 32)
    x = torch.cat([images.flatten(1), torch.ones(len(images), 1)], dim=1).double()
    ridge = x.T @ x + 10 * torch.eye(x.shape[1])
    weights = torch.linalg.solve(ridge, x.T @ F.one_hot(labels).double())
    layer = nn.Linear(3072, 10)
    layer.weight.data, layer.bias.data = 10 * weights[:-1].T.float(), 10 * weights[-1].float()
    test_images, test_labels, _ = data.load_images("digits", "test", 32, count=100)
    return nn.Sequential(nn.Flatten(), layer), (test_images, test_labels)


class RunsCode:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


# ------------------------------------------------------------------------- folders and pictures

@functools.cache
def temporary_folder():
    """The one folder that holds everything the tests write."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return folder


def new_folder():
    """An empty folder."""
    return Path(tempfile.mkdtemp(dir=temporary_folder()))


@functools.cache
def photos():
    """A folder data set: 3 classes, by color, of 8 images of 32x32 in train and in val."""
    folder, random = new_folder() / "photos", np.random.default_rng(0)
    for split in ("train", "val"):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = random.integers(0, 256, (4, 4, 3), np.uint8)
                pixels[:, :, channel] = 190 + pixels[:, :, channel] // 4
                image = Image.fromarray(pixels).resize((32, 32), Image.BILINEAR)
                image.save(folder / split / name / f"{number}.png")
    return folder


def copy_of_photos():
    """The same images in a folder of that name, for a test that spoils some."""
    return Path(shutil.copytree(photos(), new_folder() / "photos"))


def read_csv(path):
    """The rows of a table, as dictionaries."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_picture(path):
    """A PNG that can be read and shows more than a few colors."""
    with Image.open(path) as picture:
        CHECK.assertEqual(picture.format, "PNG")
        CHECK.assertGreater(len(picture.convert("RGB").getcolors(10**6)), 50)


# ------------------------------------------------------------------------------------- the stages

class Result(NamedTuple):
    """What a stage ended with: exit code, standard output, standard error."""
    code: int
    out: str
    err: str


def run(script, *arguments):
    """A stage or study in this process, on the CPU: python SCRIPT.py ARGUMENTS."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = [f"{script}.py", *map(str, arguments)]
    run_module._imported.clear()  # as in a new process: a test may have edited a file
    without_device = ("studies.plot", "studies.ship", "studies.convert", "studies.wiener")
    if "--device" not in argv and script not in without_device:
        argv += ["--device", "cpu"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("sys.argv", argv))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            cli.run_script(importlib.import_module(script).main, resumable=script in ("pretrain", "finetune"))
        except SystemExit as stop:
            code = stop.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def process(script, *arguments):
    """A stage in a process of its own, as a user starts it."""
    return subprocess.Popen(
        [sys.executable, REPOSITORY / f"{script}.py", *map(str, arguments), "--device", "cpu"],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's & ignores it


def new_python(script, folder=REPOSITORY):
    """What a Python script prints in a new process, started in this folder; it must not fail."""
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, text=True, capture_output=True,
                          timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    CHECK.assertEqual(done.returncode, 0, done.stderr)
    return done.stdout


def torchrun(script, *arguments, processes=2):
    """A stage under torchrun, on the CPU: its Result."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
         REPOSITORY / f"{script}.py", *map(str, arguments), "--device", "cpu"], text=True,
        capture_output=True, cwd=REPOSITORY, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return Result(done.returncode, done.stdout, done.stderr)


def elsewhere(*commands, repository=REPOSITORY, processes=1):
    """Stages one after the other in a new process, or in several under torchrun: their Results.

    A command is (script, *flags), with a number in front to cut it after that epoch. Of several
    processes only that of rank 0 may have printed anything. repository: another copy of the code.
    """
    path = new_folder() / "commands.json"
    path.write_text(json.dumps([[word if isinstance(word, int) else str(word) for word in command]
                                for command in commands]))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    subprocess.run([sys.executable, *(launcher if processes > 1 else []), "-m", "tests.helpers", path],
                   check=True, timeout=120, cwd=repository, env={**os.environ, "OMP_NUM_THREADS": "1"})
    written = [json.loads(path.with_suffix(f".{rank}").read_text()) for rank in range(processes)]
    first, *others = [[Result(*result) for result in results] for results in written]
    for results in others:
        CHECK.assertEqual([(result.code, result.out) for result in results],
                          [(result.code, "") for result in first])
    return first


def run_commands(path):
    """The other side of `elsewhere`."""
    results = []
    for number, command in enumerate(json.loads(path.read_text())):
        if number and "RANK" in os.environ:  # the first stage meets as torchrun says, which works once
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{path}.meeting{number}", rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]))
        cut = command.pop(0) if isinstance(command[0], int) else None
        with cut_after(cut):
            results.append(run(*command))
    path.with_suffix(f".{os.environ.get('RANK', 0)}").write_text(json.dumps(results))


def kill_after_first_save(script, flags, folder):
    """Start a stage that trains in this folder, kill it after it has saved an epoch."""
    path = folder / "log.csv"
    before = path.stat().st_mtime_ns if path.exists() else None
    running = process(script, *flags, "--out", folder)
    while not path.exists() or path.stat().st_mtime_ns == before:
        CHECK.assertIsNone(running.poll(), "ended before it was killed")
        time.sleep(0.01)
    running.kill()
    running.communicate()


@contextlib.contextmanager
def cut_after(epoch):
    """End a training, as Ctrl-C does, after it has saved this epoch (0: before the first)."""
    save = run_module.save

    def save_and_stop(folder, checkpoint, *arguments, **parts):
        save(folder, checkpoint, *arguments, **parts)
        if checkpoint["epoch"] == epoch:
            raise KeyboardInterrupt
    with mock.patch.object(run_module, "save", save_and_stop):
        yield


def saved(folder):
    """The checkpoint in a run's folder."""
    return torch.load(Path(folder) / "checkpoint.pt")


def assert_same_run(one, other):
    """Two runs' folders hold the same weights, optimizer and log, bit by bit; but for the speed."""
    a, b = saved(one), saved(other)
    CHECK.assertEqual((a["epoch"], list(a["model"])), (b["epoch"], list(b["model"])))
    for name, value in a["model"].items():
        CHECK.assertTrue(torch.equal(value, b["model"][name]), name)
    states = [checkpoint["resume"]["optimizer"]["state"] for checkpoint in (a, b)]
    CHECK.assertEqual(*[list(state) for state in states])
    for number, moments in states[0].items():
        for name, value in moments.items():
            CHECK.assertTrue(torch.equal(value, states[1][number][name]), (number, name))
    logs = [[{**row, "images_per_second": ""} for row in read_csv(Path(folder) / "log.csv")]
            for folder in (one, other)]
    CHECK.assertEqual(*logs)
    CHECK.assertEqual([row["epoch"] for row in logs[0]], [str(1 + i) for i in range(a["epoch"])])


def in_processes(function, *arguments_of_each):
    """Call the function in forked processes, all at once, a tuple of arguments each: exit codes."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=function, args=arguments) for arguments in arguments_of_each]
    for forked in processes:
        forked.start()
    for forked in processes:
        forked.join()
    return [forked.exitcode for forked in processes]


def finished(result):
    """The run must have succeeded."""
    if result.code:
        raise AssertionError(result)
    return result


def assert_refused(result, says=()):
    """Exit code 2 and one sentence (after argparse's usage, if it is a flag), without traceback.

    says: words, or a tuple of them, that the sentence must hold.
    """
    CHECK.assertEqual(result.code, 2, result)
    lines = result.err.strip().splitlines()
    CHECK.assertEqual(["error: " in line for line in lines].count(True), 1, result.err)
    CHECK.assertIn("error: ", lines[-1])
    CHECK.assertTrue(lines[0].startswith("usage: " if len(lines) > 1 else "error: "), result.err)
    CHECK.assertNotIn("Traceback", result.out + result.err)
    for words in says if isinstance(says, tuple) else (says,):
        CHECK.assertIn(str(words), lines[-1])


# ------------------------------------------------------------------- flags, and runs made only once

def photo_flags(folder=None):
    """The flags of pretrain.py for a data set in a folder; the photos, unless a folder is given."""
    return "--data", folder or photos(), "--size", "tiny", "--workers", 0


def training(epochs=1, batch_size=8, base_lr=0.04):
    """The flags of a short training."""
    return "--epochs", epochs, "--batch-size", batch_size, "--base-lr", base_lr


@functools.cache
def digits_runs():
    """Short default runs on the digits: (their folder, with nim, de3 and clean in it, the Results)."""
    folder = new_folder()
    results = [finished(run("pretrain", *training(3, 32), "--out", folder / "nim"))]
    for mode in ("de3", "clean"):
        results.append(finished(run("finetune", "--mode", mode, "--autoencoder", folder / "nim",
                                    *training(4, 32))))
    return folder, results


@functools.cache
def photo_autoencoder(task="nim", epochs=1):
    """Folder of a pretraining run on the photos, named by its task. It is not written to again."""
    folder = new_folder() / task
    finished(run("pretrain", "--task", task, *training(epochs), *photo_flags(), "--out", folder))
    return folder


def photo_runs(task="nim"):
    """A new folder with a copy of that run in it: the copy, beside which classifiers may be trained."""
    return Path(shutil.copytree(photo_autoencoder(task), new_folder() / task))


@functools.cache
def photo_classifier(mode="de3", task="nim"):
    """Folder of a short fine-tuning run on the photos. It is not written to again."""
    folder = new_folder() / mode
    finished(run("finetune", "--mode", mode, "--autoencoder", photo_autoencoder(task), *training(2),
                 "--workers", 0, "--out", folder))
    return folder


if __name__ == "__main__":
    run_commands(Path(sys.argv[1]))
