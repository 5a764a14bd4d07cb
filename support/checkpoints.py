"""Checkpoints: written whole, read without running code, checked entry by entry, made into models.

One file per run, tensors and plain values only: kind ("autoencoder" or "classifier"), config
(constructor arguments), model, optimizer, epoch (of epochs; with the seed it is the random state as
well, see training.seed_epoch), settings (what decides the weights), and what the later stages need.
"""

import argparse
import hashlib
import math
import zipfile
from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms import Normalize

from model import Autoencoder, Classifier, UserError
from support import cli, files

CHECKPOINT = dict(config=dict, settings=dict, model=dict, epoch=int, epochs=int)
VIT = dict(image_size=int, patch_size=int, embed_dim=int, depth=int, num_heads=int,
           mean=tuple, std=tuple)
TYPES = {  # of the entries of a checkpoint, and of those of its config
    "autoencoder": (dict(CHECKPOINT, task=str), dict(VIT, decoder_embed_dim=int, decoder_depth=int,
                                                     decoder_num_heads=int, norm_pix=bool)),
    "classifier": (dict(CHECKPOINT, mode=str, keep_visible=bool, classes=(list, type(None))),
                   dict(VIT, num_classes=int, drop_path=(int, float))),
}


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
    side = config["image_size"] // max(1, config["patch_size"])
    patches = state.get("patch_embed.proj.weight")
    if patches is None or patches.shape[-1] != config["patch_size"]:
        return False
    parts = ["", "decoder_"] if "decoder_depth" in config else [""]
    for part in parts:
        blocks = {name.split(".")[1] for name in state if name.startswith(f"{part}blocks.")}
        tokens = state.get(f"{part}pos_embed")
        if len(blocks) != config[f"{part}depth"] or tokens is None:
            return False
        if tokens.shape != (1, side**2 + 1, config[f"{part}embed_dim"]):
            return False
    return True


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
