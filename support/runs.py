"""Run folders and checkpoints: RUNS/<data>/<autoencoder>/[<classifier>/]checkpoint.pt.

One file per run, tensors and plain values only: kind ("autoencoder" or "classifier"), config
(constructor arguments), model, optimizer, epoch (of epochs; with the seed it is the random state as
well, see seed_epoch), settings (what decides the weights), and what the later stages need.
"""

import argparse
import functools
import hashlib
import math
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms import Normalize

from model import SIZES, Autoencoder, Classifier, UserError
from support import cli, data, files

ASSETS = Path(__file__).parents[1] / "assets"
LOG_FIELDS = ("epoch", "loss", "accuracy", "lr", "images_per_second", "command", "torch", "commit")
CHECKPOINT = dict(config=dict, settings=dict, model=dict, epoch=int, epochs=int)
VIT = dict(image_size=int, patch_size=int, embed_dim=int, depth=int, num_heads=int,
           mean=tuple, std=tuple)
TYPES = {  # of the entries of a checkpoint, and of those of its config
    "autoencoder": (dict(CHECKPOINT, task=str), dict(VIT, decoder_embed_dim=int, decoder_depth=int,
                                                     decoder_num_heads=int, norm_pix=bool)),
    "classifier": (dict(CHECKPOINT, mode=str, keep_visible=bool, classes=(list, type(None))),
                   dict(VIT, num_classes=int, drop_path=(int, float))),
}


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
        more["autoencoder"] = fingerprint(autoencoder)
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


# ---------------------------------------------------------------------------------- checkpoints

@functools.cache
def provenance():
    """What a result came from: the command, the torch version and, in a checkout, the commit."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True,
                                capture_output=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        commit = ""
    return dict(command=shlex.join(["python", *sys.argv]), torch=str(torch.__version__), commit=commit)


def save_checkpoint(path, checkpoint):
    """Write a checkpoint, in the process of rank 0."""
    if cli.rank() == 0:
        files.write_whole(path, lambda file: torch.save(checkpoint, file))


def read_weights(path):
    """A file of weights: tensors and plain values only, so that loading it cannot run code.

    Checksums are tested, which torch.load ignores. The one class let through is argparse.Namespace,
    which MAE's training checkpoints hold.
    """
    try:
        with open(path, "rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"  # older formats have no checksums
            if is_archive and zipfile.ZipFile(file).testzip():
                raise zipfile.BadZipFile("a checksum differs")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"there is no file {path}") from None
    except Exception as error:  # torch.load of a damaged file raises many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise UserError(f"{path} is damaged, no checkpoint, or holds objects that could run code when "
                        f"loaded ({reason}); make it again (--overwrite) or get it again") from None


def check_finite(path, state):
    """UserError unless every one of these tensors is finite."""
    for name, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"{path}: {name} is not finite; make it again (--overwrite)")


def check_checkpoint(path, checkpoint, kind):
    """UserError unless it is a checkpoint of this project and kind, every entry there and plausible."""
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") not in list(TYPES):
        raise UserError(f"{path} is not a checkpoint of this project")
    if checkpoint["kind"] != kind:
        raise UserError(f"{path} holds {checkpoint['kind']} weights where {kind} weights are needed")
    entries, arguments = TYPES[kind]
    wrong = of_other_types(checkpoint, entries)
    wrong = wrong or [f"config {name}" for name in of_other_types(checkpoint["config"], arguments)]
    wrong = wrong or implausible(checkpoint)
    if not wrong and not fits_weights(checkpoint["config"], checkpoint["model"]):
        wrong = ["config"]
    if wrong:
        raise UserError(f"{path}: its entry {wrong[0]!r} is missing or damaged; make it again "
                        "(--overwrite) or get it again")
    check_finite(path, checkpoint["model"])


def of_other_types(entries, types):
    """The names of the entries that are missing, or not of their type."""
    return [name for name, its_type in types.items()
            if name not in entries or not isinstance(entries[name], its_type)]


def is_plain_tensor(value):
    """Whether it is a tensor of real numbers that are there: not sparse, not on the meta device."""
    return (torch.is_tensor(value) and value.layout == torch.strided and value.device.type == "cpu"
            and not value.is_complex())


def is_number(text):
    """Whether a setting is "None" or a number."""
    try:
        return text == "None" or math.isfinite(float(text))
    except (TypeError, ValueError):
        return False


def fits_weights(config, state):
    """Whether a ViT's config is that of its weights; a wrong one could ask for any amount of memory."""
    if config.get("arch", "vit") != "vit":
        return True
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    tokens, patches = state.get("pos_embed", torch.zeros(1, 0, 0)), state.get("patch_embed.proj.weight")
    side = config["image_size"] // max(1, config["patch_size"])
    return (len(blocks) == config["depth"] and tokens.shape == (1, side**2 + 1, config["embed_dim"])
            and patches is not None and patches.shape[-1] == config["patch_size"])


def implausible(checkpoint):
    """The names of entries of the right type that no run can have written."""
    config, settings, state = checkpoint["config"], checkpoint["settings"], checkpoint["model"]
    counts = [value for value in config.values() if isinstance(value, int)]
    classes = []
    if checkpoint["kind"] == "classifier":
        classes = checkpoint["classes"] or []
    holds = {
        "config": all(0 <= value < 10_000 for value in counts),
        "config mean or std": [type(part) for part in config["mean"] + config["std"]] == [float] * 6
        and all(part > 0 for part in config["std"]),
        "config drop_path": 0 <= config.get("drop_path", 0) <= 1,
        "settings": all(isinstance(text, str) for text in [*settings, *settings.values()]),
        "model": all(isinstance(name, str) and is_plain_tensor(state[name]) for name in state),
        "settings adversarial": is_number(settings.get("adversarial", "None")),
        "epoch": 0 <= checkpoint["epoch"] <= checkpoint["epochs"],
        "task": checkpoint.get("task", "nim") in ("nim", "mim"),
        "mode": checkpoint.get("mode", "clean") in ("clean", "de3", "no-denoise"),
        "classes": all(isinstance(name, str) for name in classes)
        and len(classes) in (0, config.get("num_classes")),
        "command": isinstance(checkpoint.get("command", ""), str)}
    return [name for name in holds if not holds[name]]


def load_checkpoint(path, kind):
    """Read a checkpoint of this project; UserError where it is another kind of file."""
    checkpoint = read_weights(path)
    check_checkpoint(path, checkpoint, kind)
    return checkpoint


def load_state(path, model, state):
    """Copy the weights of a checkpoint into a model; UserError where a name or a shape differs."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        difference = str(error).splitlines()[1].strip()[:200]  # below the line that announces it
        raise UserError(f"{path} does not fit this code: {difference}") from None


def load_optimizer(path, optimizer, saved):
    """Copy AdamW's moments; its groups stay as they are, and must hold the same parameters."""
    groups = optimizer.state_dict()["param_groups"]
    try:
        state, saved_groups = dict(saved)["state"], dict(saved)["param_groups"]
        layout = [dict(group)["params"] for group in saved_groups]
        fits = layout == [group["params"] for group in groups]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                moments = optimizer.state[parameter]
                shapes = [moments[name].shape for name in ("step", "exp_avg", "exp_avg_sq")]
                fits = fits and shapes == [(), parameter.shape, parameter.shape]
    except Exception:  # what is damaged fails in many ways
        fits = False
    if not fits:
        raise UserError(f"{path}: its entry 'optimizer' is missing, or of another model: train anew "
                        "with --overwrite")


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
    checkpoint = load_checkpoint(path, kind) if found else {"epoch": -1}
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
    load_state(path, model, checkpoint["model"])
    load_optimizer(path, optimizer, checkpoint.get("optimizer"))
    return epoch


def make_classifier(arch="vit", **config):
    """The ViT ("vit"), or torchvision's "resnet18" with the normalization inside.

    config holds the arguments of Classifier; of them resnet18 takes num_classes, mean and std.
    Both are from [0, 1] images [B, 3, H, W] to logits [B, num_classes].
    """
    if arch == "vit":
        return Classifier(**config)
    return nn.Sequential(Normalize(config["mean"], config["std"]),
                         resnet18(num_classes=config["num_classes"]))


def load_finished(folder, kind, device="cpu", make_it="pretrain.py, then finetune.py"):
    """A finished run's folder: (model in evaluation mode, without gradients; its checkpoint).

    make_it: the command that a missing or unfinished run is made with, for the error's sentence.
    """
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise UserError(f"{path} is missing; make it with: {make_it}")
    checkpoint = load_checkpoint(path, kind)
    if checkpoint["epoch"] < checkpoint["epochs"]:
        command = checkpoint.get("command", make_it).replace(" --overwrite", "")
        if " --resume" not in command:
            command += " --resume"
        raise UserError(f"{path} is unfinished (epoch {checkpoint['epoch']} of "
                        f"{checkpoint['epochs']}); finish it with: {command}")
    make_model = Autoencoder if kind == "autoencoder" else make_classifier
    try:
        model = make_model(**checkpoint["config"])
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this code: {str(error).splitlines()[0]}") from None
    load_state(path, model, checkpoint["model"])
    return model.to(device).eval().requires_grad_(False), checkpoint


def fingerprint(model):
    """Twelve hex digits of the weights, to notice an autoencoder that was trained anew."""
    values = b"".join(value.cpu().numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(values).hexdigest()[:12]
