"""A run is a folder: checkpoint.pt knows all that a later stage needs, log.csv is written from it.

A checkpoint holds tensors and plain values only: kind ("autoencoder" or "classifier"), config
(what builds the model), model, optimizer, epoch (of epochs; with the seed it is the random state as
well, see training.seed_epoch), settings (what decides the weights), data (what it was trained on and
is tested at), log, and made_by: command, torch, commit and digests of the code, one entry for each
time that the code changed. A classifier's holds its autoencoder, too: a folder is a whole defense.
"""

import argparse
import ast
import csv
import functools
import hashlib
import inspect
import io
import os
import shlex
import subprocess
import uuid
import zipfile
from pathlib import Path

import numpy as np
import torch

from model import Autoencoder, UserError, make_classifier
from support import cli, data

try:
    import fcntl
except ImportError:  # Windows: there nothing keeps two processes apart
    fcntl = None

REPOSITORY = Path(__file__).resolve().parents[1]
# What changes where or how fast a run works, or where something came from, but not its weights.
NOT_SETTINGS = ("device", "workers", "out", "resume", "overwrite", "dry_run", "given",
                "autoencoder")
MAKERS = {"autoencoder": Autoencoder, "classifier": make_classifier}


# ------------------------------------------------------------------------------------ the code

@functools.cache
def commit():
    """The commit of this checkout, with "+" for uncommitted changes; "" where git knows none."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=REPOSITORY, text=True, capture_output=True,
                              check=True).stdout.strip()
    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


@functools.cache
def digest_of_file(path):
    """Twelve hex digits of a Python file's parsed code: comments and docstrings change nothing."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except OSError:
        return "missing"
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(
                body[0].value, ast.Constant):
            body[:] = body[1:] or [ast.Pass()]
        if isinstance(node, ast.JoinedStr):  # Python 3.12 puts empty text behind a nested format
            node.values = [part for part in node.values if getattr(part, "value", None) != ""]
    return hashlib.sha256(repr(plain(tree)).encode()).hexdigest()[:12]


def plain(node):
    """A syntax tree as nested tuples, without what only some versions of Python write of it."""
    if isinstance(node, ast.AST):
        fields = [(name, plain(value)) for name, value in ast.iter_fields(node)]
        return (type(node).__name__, *[field for field in fields if field[1] not in (None, [])])
    return [plain(one) for one in node] if isinstance(node, list) else node


def digests(files):
    """{file: digest of its code}, for files named from the repository's folder."""
    return {name: digest_of_file(REPOSITORY / name) for name in files}


def provenance(files):
    """What a result comes from: the command, torch, the commit, digests of the code that decides it."""
    return dict(command=cli.command_line(), torch=str(torch.__version__), commit=commit(),
                code=digests(files))


def changed_files(checkpoint):
    """The files whose code is not the one that trained this run, all of its epochs."""
    changed = {name for made in checkpoint["made_by"] for name, digest in digests(made["code"]).items()
               if digest != made["code"][name]}
    return sorted(changed)


def say_made_by_other_code(folder, checkpoint):
    """One line for a run, and its autoencoder, whose code has changed since."""
    for part, what in ((checkpoint, ""), (checkpoint.get("autoencoder"), ", its autoencoder")):
        files = changed_files(part) if part else []
        if files:
            made_at = part["made_by"][-1]["commit"] or "unknown"
            print(f"note: {folder}{what} was made by other code ({', '.join(files)} changed since; "
                  f"commit {made_at})")


# ------------------------------------------------------------------------------ files and locks

def write_whole(path, save):
    """save(file) beside `path`, then move into place: a kill leaves the old file whole.

    Each writer has a temporary file of its own. Raises UserError where the folder or the disk fails.
    """
    buffer = io.BytesIO()
    save(buffer)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"could not save {path} ({error}); what was saved before is kept: make room, "
                        "and go on with the same command (training: and --resume)") from None
    finally:
        temporary.unlink(missing_ok=True)  # moved away, where all went well


def take_lock(path, wait):
    """Make and lock a file, returned open: closing unlocks it. UserError if another process has it.

    The system unlocks it however the process ends.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written to ({error.strerror}): choose another --out, "
                        "or make it writable") from None
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is training in {path.parent}: wait for it, or use another "
                        "--out") from None
    except OSError:
        pass  # a file system without locks
    return file


def read_weights(path):
    """A file of weights: tensors and plain values only, so that loading it cannot run code.

    Checksums are tested, which torch.load ignores. What is let through besides: argparse.Namespace,
    which MAE's training checkpoints hold, and NumPy's numbers.
    """
    scalar = np.float64(0).__reduce__()[0]  # whose module has another name in every version of NumPy
    allowed = [argparse.Namespace, np.dtype, *{type(np.dtype(kind)) for kind in "?bhilqBHILQefdU"},
               (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    try:
        with open(path, "rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"  # older formats have no checksums
            if is_archive and zipfile.ZipFile(file).testzip():
                raise zipfile.BadZipFile("a checksum differs")
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"there is no file {path}") from None
    except Exception as error:  # torch.load of a damaged file raises many kinds
        lines = (str(error) or type(error).__name__).splitlines()
        named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line or "but got" in line]
        reason = (named or lines)[0].strip()[:160]
        raise UserError(f"{path} is damaged, is no file of weights, or holds objects that could run "
                        f"code when loaded ({reason})") from None


# ---------------------------------------------------------------------------- reading a run back

def is_checkpoint(content):
    """Whether the content of a file of weights is a run's checkpoint, whatever the file is called."""
    needed = {"kind", "config", "settings", "data", "model", "epoch", "epochs", "log", "made_by"}
    return isinstance(content, dict) and needed <= content.keys()


def read(folder, kind=None, making=None):
    """The checkpoint in a run's folder, or in a copy of its file under another name.

    UserError where there is none, or one of another kind.
    """
    path = Path(folder) if Path(folder).is_file() else Path(folder) / "checkpoint.pt"
    if not path.exists():
        stage = "pretrain.py" if "autoencoder" in (kind, making) else "finetune.py"
        mode = " --mode clean" if Path(folder).name == "clean" else ""
        raise UserError(f"{folder} holds no run (there is no {path}): make it with python {stage}{mode} "
                        f"--out {shlex.quote(str(folder))}, or name another run's folder")
    checkpoint = read_weights(path)
    if not is_checkpoint(checkpoint):
        raise UserError(f"{path} is not a checkpoint of this project, or one of an earlier layout")
    if kind is not None and checkpoint["kind"] != kind:
        raise UserError(f"{path} holds {checkpoint['kind']} weights where {kind} weights are needed")
    return checkpoint


def build(checkpoint, name="the checkpoint"):
    """The model of a checkpoint: its own config makes it, every weight has to fit. UserError if not."""
    try:
        model = MAKERS[checkpoint["kind"]](**checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
        finite = all(value.isfinite().all() for value in checkpoint["model"].values())
    except Exception as error:  # a changed constructor, a missing weight, damage: many kinds
        lines = [line.strip() for line in (str(error) or repr(error)).splitlines()]
        raise UserError(f"{name} does not fit this code: {' '.join(lines)[:200]}") from None
    if not finite:
        raise UserError(f"{name} holds weights that are not finite")
    return model


def load(folder, kind):
    """A finished run's folder: (model in evaluation mode, without gradients; its checkpoint)."""
    checkpoint = read(folder, kind)
    if checkpoint["epoch"] < checkpoint["epochs"]:
        stage = "pretrain" if kind == "autoencoder" else "finetune"
        raise UserError(f"{folder} is unfinished (epoch {checkpoint['epoch']} of "
                        f"{checkpoint['epochs']}); finish it with: python {stage}.py "
                        f"--out {shlex.quote(str(folder))} --resume")
    say_made_by_other_code(folder, checkpoint)
    model = build(checkpoint, Path(folder) / "checkpoint.pt")
    return model.eval().requires_grad_(False), checkpoint


def fingerprint(model):
    """Twelve hex digits of a model's weights and plain attributes, to notice that it is another one."""
    sha = hashlib.sha256()
    for value in model.state_dict().values():
        sha.update(value.float().cpu().numpy().tobytes())
    plain = {name: value for name, value in vars(model).items()
             if isinstance(value, (bool, int, float, str)) and name != "training"}
    sha.update(repr([type(model).__name__, sorted(plain.items())]).encode())
    return sha.hexdigest()[:12]


def identity(model):
    """A model's fingerprint with its buffers: mean and deviation, too, which no checkpoint's weights hold."""
    sha = hashlib.sha256(fingerprint(model).encode())
    for value in model.buffers():
        sha.update(value.float().cpu().numpy().tobytes())
    return sha.hexdigest()[:12]


def origin_of_row(model, files):
    """What a row of a table says of its origin: the weights measured, the code, and the commit.

    The code is that of `files` and of the files that hold the model's class and its bases.
    """
    own = [inspect.getsourcefile(kind) for kind in type(model).__mro__ if kind.__module__ != "builtins"]
    own = [Path(name).resolve() for name in own if name]
    own = [path.relative_to(REPOSITORY).as_posix() for path in own if path.is_relative_to(REPOSITORY)]
    return dict(weights=identity(model), code=digest_of_files({*files, *own}), commit=commit())


def digest_of_files(files):
    """One digest of the code of several files, as it is today."""
    return hashlib.sha256(repr(sorted(digests(files).items())).encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------ a run in training

def settings_of(args):
    """What decides the weights, as plain values: every argument but NOT_SETTINGS."""
    plain = (bool, int, float, str, type(None))
    return {name: value if isinstance(value, plain) else str(value)
            for name, value in vars(args).items() if name not in NOT_SETTINGS}


def take_settings(args, kind):
    """For --resume: give args every setting of the run in --out; returns its checkpoint.

    None where nothing is saved yet. Raises UserError for a flag that says otherwise; only a data
    folder that is gone may have moved.
    """
    if not (args.out / "checkpoint.pt").exists():
        return None
    checkpoint = read(args.out, kind)
    saved, here = checkpoint["settings"], settings_of(args)
    moved = False
    if "data" in args.given and saved["data"] not in data.DATASETS:
        moved = not Path(saved["data"]).exists() and Path(here["data"]).exists()
    for name in sorted(args.given & here.keys()):
        if here[name] != saved.get(name) and not (name == "data" and moved):
            raise UserError(f"--{name.replace('_', '-')} is {here[name]} here, and {saved.get(name)} in "
                            f"the run that --resume goes on with, {args.out}: leave the flag out")
    for name, value in saved.items():
        if not (name == "data" and moved):
            setattr(args, name, value)
    return checkpoint


class Run:
    """A run in training: the folder of --out, which other processes are kept out of, and what it holds.

    saved: the checkpoint that was found, None for a new run. A finished run of the same settings and
    code is kept, and one to --resume goes on; training over anything else raises UserError. files:
    the code that decides the weights.
    """

    def __init__(self, args, kind, files):
        row = data.about(args.data)
        augmented = [data.name_of(how) for how in (row.pretrain_augment, row.finetune_augment)]
        of_data = dict(statistics=str((row.mean, row.std)), augmentation=str(augmented))
        if args.init and Path(args.init).is_file() and not args.resume:
            of_data["init_weights"] = hashlib.sha256(Path(args.init).read_bytes()).hexdigest()[:12]
        self.folder, self.settings, self.epochs = args.out, {**settings_of(args), **of_data}, args.epochs
        self.kind, self.files, self.saved, self.loaded_back = kind, files, None, False
        if args.dry_run:
            return
        if args.resume and args.overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        problem = ""
        if cli.rank() == 0:
            try:
                self.lock = take_lock(self.folder / ".lock", wait=False)
            except UserError as error:
                problem = str(error)
            for left_over in self.folder.glob(".checkpoint.pt.*.tmp"):  # of runs that were killed
                left_over.unlink()
        if cli.sum_over_processes(bool(problem)) != [0]:
            raise UserError(problem or f"rank 0 cannot train in {self.folder}")
        if (self.folder / "checkpoint.pt").exists() and not args.overwrite:
            self.saved = read(self.folder)
            if not args.resume:
                self.refuse_another(args.given)
            say_made_by_other_code(self.folder, self.saved)
        epoch = self.saved["epoch"] if self.saved else -1
        if cli.sum_over_processes(epoch) != [epoch * cli.world_size()]:
            raise UserError(f"the processes do not find the same {self.folder}: choose a folder that all "
                            "of them share")
        if epoch >= self.epochs:
            print(f"{self.folder}: finished run kept, --overwrite trains anew")
        elif self.saved:
            print(f"{self.folder}: going on after epoch {epoch} of {self.epochs}")
        else:
            print(f"{self.folder}: {'nothing saved yet, starting over' if args.resume else 'training'}")

    def refuse_another(self, given):
        """UserError unless the saved run is a finished one of these settings and this code."""
        saved, changed, other = self.saved, changed_files(self.saved), []
        for name, value in self.settings.items():
            old = saved["settings"].get(name)
            if name in saved["settings"] and old != value:
                other.append(f"{name} {old} there, {value} here")
            elif name not in saved["settings"] and name in given:
                other.append(f"{name} {value} here")  # what a run does not say has its default
        if saved["kind"] != self.kind:
            what = f"{saved['kind']} weights"
        elif other:
            what = f"a run with other settings: {'; '.join(other)}"
        elif saved["epoch"] < saved["epochs"]:
            what = f"an unfinished run, epoch {saved['epoch']} of {saved['epochs']}"
        elif changed:
            what = f"a run made by other code: {', '.join(changed)} changed since"
        else:
            return
        raise UserError(f"{self.folder} holds {what}; go on with that run by --resume, train anew over it "
                        "with --overwrite, or keep it and name another folder with --out")

    def start(self, config, dataset, train, model, optimizer, try_step, **more):
        """Begin or go on: the first epoch to train, from 0. Model and optimizer get what was saved.

        config: what builds the model. dataset, train: the name of the data and its training images.
        try_step(): forward and backward of one micro-batch, to choose the number of CPU threads, which
        is kept, since another number rounds differently. more: what the later stages need besides.
        """
        threads = cli.choose_threads(try_step, next(model.parameters()).device,
                                     self.saved.get("threads") if self.saved else None)
        optimizer.zero_grad()
        made_by = [dict(provenance(self.files), from_epoch=1)]
        facts = data.facts(dataset, train)
        self.checkpoint = dict(kind=self.kind, config=config, settings=self.settings, data=facts, epoch=0,
                               epochs=self.epochs, log=[], made_by=made_by, threads=threads,
                               world_size=cli.world_size(), **more)
        if self.saved is None:
            return 0
        then = self.saved["data"]
        for name in ("statistics", "augmentation"):
            old, new = self.saved["settings"].get(name), self.settings[name]
            if old not in (None, new):
                print(f"note: the {name} of {dataset} was {old} when {self.folder} was begun, and is {new} now")
        if self.saved.get("world_size", cli.world_size()) != cli.world_size():
            print(f"note: {self.folder} was trained by {self.saved['world_size']} process(es) and goes on "
                  f"with {cli.world_size()}: other noise than in an uninterrupted run")
        if (then["images"], then["pixels"]) != (facts["images"], facts["pixels"]):
            print(f"note: {self.folder} was trained on other images than {dataset} holds now "
                  f"({then['images']} then, {facts['images']} now)")
        try:
            model.load_state_dict(self.saved["model"])
            optimizer.load_state_dict(self.saved["optimizer"])
        except Exception as error:  # the code makes another model or optimizer now
            raise UserError(f"the run in {self.folder} does not fit this code "
                            f"({str(error).splitlines()[0]}): train anew with --overwrite, or name "
                            "another folder with --out") from None
        if made_by[0]["code"] != self.saved["made_by"][-1]["code"] and self.saved["epoch"] < self.epochs:
            made_by[0]["from_epoch"] = self.saved["epoch"] + 1
            self.saved["made_by"] += made_by
        self.checkpoint = self.saved
        self.checkpoint["settings"]["data"] = self.checkpoint["data"]["name"] = dataset  # may have moved
        self.write_log()
        return self.saved["epoch"]

    def save(self, epoch, row, model, optimizer):
        """Write checkpoint.pt and log.csv after so many epochs, in the process of rank 0.

        row: the epoch's, of the log. What is written first is loaded back, so that a config that does
        not make its model is found after one epoch and not after the last.
        """
        self.checkpoint["log"].append(dict(row, commit=commit()))
        self.checkpoint.update(epoch=epoch, model=model.state_dict(), optimizer=optimizer.state_dict())
        if cli.rank() > 0:
            return
        write_whole(self.folder / "checkpoint.pt", lambda file: torch.save(self.checkpoint, file))
        self.write_log()
        if not self.loaded_back:
            build(read(self.folder), f"{self.folder} was saved and cannot be loaded again: it")
            self.loaded_back = True

    def write_log(self):
        """Write log.csv from the log in the checkpoint, in the process of rank 0."""
        if cli.rank() > 0:
            return
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, list(self.checkpoint["log"][-1]), extrasaction="ignore")
        table.writeheader()
        table.writerows(self.checkpoint["log"])
        write_whole(self.folder / "log.csv", lambda file: file.write(text.getvalue().encode()))
