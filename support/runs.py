"""Run folders, RUNS/<data>/<autoencoder>/[<classifier>/]: their names, and how a run begins."""

import argparse
import functools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from model import SIZES, UserError
from support import checkpoints, cli, data, files

ASSETS = Path(__file__).parents[1] / "assets"
LOG_FIELDS = ("epoch", "loss", "accuracy", "lr", "images_per_second", "command", "torch", "commit")

# ------------------------------------------------------------------------------ names of folders

def data_folder(runs, name):
    """RUNS/<data>: the name of the data set, or of the folder it lies in."""
    if name in data.BUILT_IN:
        return Path(runs) / name
    folder = Path(name).resolve().name
    return Path(runs) / (f"{folder}-folder" if folder in data.BUILT_IN else folder)


def run_folder(parent, seed, names):
    """A folder named by these names (empty ones are left out) and, unless it is 0, the seed."""
    names = [str(part) for part in names if part]
    if seed:
        names.append(f"seed{seed}")
    return parent / "_".join(names).replace(":", "").replace(",", "-")


def norm_pix_by_default(size):
    """Whether the recipe of a size normalizes target patches: only at patches of 14 pixels and more."""
    return SIZES[size]["patch_size"] >= 14


def autoencoder_folder(args, task="nim", level=None, norm_pix=None, init=None):
    """The folder of a pretraining run; without further arguments, that of pretrain.py's default run.

    args: the flags --runs, --data, --size and --seed. level: the noise scale of NIM, the mask ratio
    of MIM. It is named by these, and by what differs from the data set's defaults.
    """
    data_defaults = data.defaults(args.data)
    names = [f"{task}_{data_defaults['pretrain_sigma'] if level is None else level}"]
    if args.size != data_defaults["size"]:
        names.append(args.size)
    if norm_pix is not None and norm_pix != norm_pix_by_default(args.size):
        names.append("normpix" if norm_pix else "plainpix")
    if init:
        names.append(f"init-{Path(init).stem}")
    return run_folder(data_folder(args.runs, args.data), args.seed, names)


def classifier_folder(parent, seed, mode, sigma=None, max_mask_ratio=None, keep_visible=False,
                      adversarial=None, arch="vit", from_scratch=False, init=None):
    """The folder of a fine-tuning run inside `parent`, named by what makes it different.

    sigma, max_mask_ratio: None where the mode uses none.
    """
    names = [mode, sigma]
    if max_mask_ratio not in (None, 0.75):
        names.append(f"{max_mask_ratio:g}")
    if keep_visible:
        names.append("visible")
    if adversarial is not None:
        names.append(f"adversarial{255 * adversarial:g}")
    if arch != "vit":
        names.append(arch)
    elif from_scratch:
        names.append("scratch")
    if init:
        names.append(f"init-{Path(init).stem}")
    return run_folder(parent, seed, names)


def classifier_run(args, mode, sigma, max_mask_ratio, autoencoder, source, **more):
    """The folder of finetune.py's run and the settings that decide its weights.

    sigma, max_mask_ratio: None where the mode uses none. autoencoder: None, or the one it starts from
    or stands behind, which came from `source`. more: further settings.
    """
    parent = data_folder(args.runs, args.data)
    if autoencoder is not None:
        parent = parent / source.stem if source.is_file() else source
        more["autoencoder"] = checkpoints.fingerprint(autoencoder)
    else:
        more["autoencoder"] = ""
    if sigma is not None:
        more["sigma"] = sigma
    if max_mask_ratio is not None:
        more.update(max_mask_ratio=max_mask_ratio, keep_visible=args.keep_visible)
    folder = classifier_folder(parent, args.seed, mode, sigma, max_mask_ratio, args.keep_visible,
                               args.adversarial, args.arch, args.from_scratch, args.init)
    decided_here = ("autoencoder", "mode", "sigma", "max_mask_ratio", "keep_visible")
    return folder, cli.training_settings(args, decided_here, data=data.identity(args.data), **more)


def default_classifier_folders(args):
    """The folders of finetune.py's default run: undefended and De³."""
    parent = autoencoder_folder(args)
    return [classifier_folder(parent, args.seed, "clean"),
            classifier_folder(parent, args.seed, "de3", data.defaults(args.data)["finetune_sigma"])]


def shipped(args):
    """The flags `args` with --runs at the weights that come along, in assets/, or None.

    None where the default autoencoder of these flags is no shipped one, or one's own is there.
    """
    assets = argparse.Namespace(**{**vars(args), "runs": os.path.relpath(ASSETS)})
    own, theirs = (autoencoder_folder(flags) / "checkpoint.pt" for flags in (args, assets))
    return assets if theirs.exists() and not own.exists() else None


def stage_command(stage, args):
    """The command line that makes the default run of "pretrain" or "finetune" for these flags."""
    unsaid = dict(data="digits", size=data.defaults(args.data)["size"], seed=0, runs="runs")
    words = ["python", f"{stage}.py"]
    for name, value in unsaid.items():
        given = getattr(args, name)
        if given != value:
            words += [f"--{name}", str(given)]
    return shlex.join(words)


# --------------------------------------------------------------------------------- a run begins

@functools.cache
def provenance():
    """What a result came from: the command, the torch version and, in a checkout, the commit."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True,
                                capture_output=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        commit = ""
    return dict(command=shlex.join(["python", *sys.argv]), torch=str(torch.__version__), commit=commit)


def prepare_folder(folder):
    """Rank 0 makes and locks a run's folder before any process reads; what fails there stops all."""
    problem = ""
    if cli.rank() == 0:
        try:
            files.hold_folder(folder)
            files.read_table(folder / "log.csv", LOG_FIELDS)  # told now, not after an epoch
        except UserError as error:
            problem = str(error)
    if cli.sum_over_processes(bool(problem)) != [0]:
        raise UserError(problem or f"rank 0 cannot train in {folder}")


def open_run(path, kind, settings, args, model, optimizer):
    """Load what an earlier run saved at `path` into model and optimizer; returns its epoch, or 0.

    A finished run with the same settings is kept (epoch == args.epochs). Raises UserError where
    training would write over something else.
    """
    if args.overwrite and args.resume:
        raise UserError("--resume and --overwrite exclude each other")
    prepare_folder(path.parent)
    found = path.exists() and not args.overwrite
    checkpoint = checkpoints.load_checkpoint(path, kind) if found else {"epoch": -1}
    epoch = checkpoint["epoch"]
    if cli.sum_over_processes(epoch) != [epoch * cli.process_count()]:
        raise UserError(f"the processes do not find the same {path}: choose a --runs folder that all "
                        "of them share")
    if not found:
        print(f"{path.parent}: {'nothing saved yet, starting over' if args.resume else 'training'}")
        return 0
    old = checkpoint["settings"]
    changed = [f"{key} {old.get(key)} there, {settings.get(key)} here"
               for key in sorted({*old, *settings}) if old.get(key) != settings.get(key)]
    if changed:
        raise UserError(f"{path.parent} holds a run with other settings ({'; '.join(changed)}): "
                        "train anew with --overwrite, or keep both with another --runs folder")
    if epoch == args.epochs:
        print(f"{path.parent}: finished run kept, --overwrite trains anew")
    elif args.resume:
        print(f"{path.parent}: going on after epoch {epoch} of {args.epochs}")
    else:
        raise UserError(f"{path.parent} holds an unfinished run (epoch {epoch} of {args.epochs}): "
                        "go on with --resume, or train anew with --overwrite")
    checkpoints.load_state(path, model, checkpoint["model"])
    checkpoints.load_optimizer(path, optimizer, checkpoint.get("optimizer"))
    return epoch
