"""Weights from elsewhere: MAE's release, NIM-AdvDef's checkpoints, timm's ViT, our own files."""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from model import SIZES, Autoencoder, Classifier, UserError
from support import checkpoints, data, runs

ENCODER = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "mean", "std")


def published_state(path, key="model"):
    """State dict in a file of weights: ours, MAE's, NIM-AdvDef's ({key: state}), or timm's ViT."""
    file = checkpoints.read_weights(path)
    candidates = (file.get(key), file.get("model"), file) if isinstance(file, dict) else ()
    for state in candidates:
        if not isinstance(state, dict) or "patch_embed.proj.weight" not in state:
            continue
        if getattr(state.get("pos_embed"), "ndim", 3) == 3:
            state = {name: value for name, value in state.items() if torch.is_tensor(value)}
            checkpoints.check_finite(path, state)
            return state
    raise UserError(f"{path} holds no ViT weights under the names of MAE and timm")


def resize_pos_embed(pos_embed, length):
    """Interpolate a position embedding bicubically, [1, 1 + old², D] -> [1, length, D]."""
    old, new = math.isqrt(pos_embed.shape[1] - 1), math.isqrt(length - 1)
    if old == new or old**2 + 1 != pos_embed.shape[1]:
        return pos_embed
    grid = pos_embed[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def initialize(model, state, source):
    """Copy the weights that model and state have in common, by name; pos_embed is interpolated.

    Returns the names loaded, left at their initial value, and ignored. Raises UserError where a
    shape or the depth differs, and for a classifier that reads the class token.
    """
    own = model.state_dict()
    if "head.weight" in own and "head.weight" in state and "fc_norm.weight" not in state:
        raise UserError(f"{source} classifies by the class token, this classifier by the mean of the "
                        "patch tokens (timm: global_pool='avg')")
    for name in sorted(own.keys() | state.keys()):
        if name.startswith("blocks.") and (name not in own or name not in state):
            raise UserError(f"{name} is in only one of {source} and the model: another --size?")
    loaded = {}
    for name, value in state.items():
        if name not in own:
            continue
        if "pos_embed" in name:
            value = resize_pos_embed(value, own[name].shape[1])
        if value.shape != own[name].shape:
            raise UserError(f"{name} is {list(value.shape)} in {source} and {list(own[name].shape)} "
                            "in the model")
        loaded[name] = value
    model.load_state_dict(loaded, strict=False)
    return loaded.keys(), own.keys() - loaded.keys(), state.keys() - loaded.keys()


def initialize_from_file(model, path, key="model"):
    """`initialize` from published weights, say by name what became of them, return what was left.

    A classifier of another number of classes gives everything but its head.
    """
    state, head = published_state(path, key), model.state_dict().get("head.weight")
    if head is not None and "head.weight" in state and len(state["head.weight"]) != len(head):
        print(f"{path}: its head is for {len(state['head.weight'])} classes, not {len(head)}: left out")
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    loaded, left, ignored = initialize(model, state, path)
    for title, names in (("loaded", loaded), ("left at the initial value", left), ("ignored", ignored)):
        short = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
        print(f"{path}: {title}: {', '.join(short) or 'nothing'}")
    return left


def load_published(path, kind, size, data_name, mode="clean", norm_pix=None, task="nim"):
    """A model of --size with published weights, and what a checkpoint of ours would say of it.

    kind: "autoencoder" or "classifier"; data_name: the data set whose mean and sd normalize;
    mode: what the classifier is taken for, "de3" or "clean". The file of an autoencoder does not show
    its norm_pix (None: as the recipe of the size has it) and task ("nim" or "mim").
    """
    if norm_pix is None:
        norm_pix = runs.norm_pix_by_default(size)
    key = "model" if kind == "autoencoder" else "classifier"
    state, data_defaults = published_state(path, key), data.defaults(data_name)
    config = dict(SIZES[size], mean=data_defaults["mean"], std=data_defaults["std"])
    if "pos_embed" in state:
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
        config["image_size"] = side * config["patch_size"]
    if kind == "autoencoder":
        config["norm_pix"] = norm_pix
        print(f"{path}: taken for an autoencoder of {task.upper()} {'with' if norm_pix else 'without'} "
              "norm_pix, which the file does not show")
        model = Autoencoder(**config)
    else:
        config = {name: config[name] for name in ENCODER}
        config["num_classes"] = len(state["head.weight"]) if "head.weight" in state else 1
        model = Classifier(**config)
    missing = initialize_from_file(model, path, key)
    if missing:
        raise UserError(f"{path} is no whole {kind}: it lacks {', '.join(sorted(missing)[:3])} ...")
    return model, dict(config=config, task=task, mode=mode, keep_visible=False, classes=None,
                       settings={"autoencoder": ""})


def load_model(source, kind, device, args, mode="clean"):
    """(model, checkpoint) from a run's folder or a file of published weights (in the model of --size).

    args: the flags --runs, --data, --size and --seed, for the size, and for the sentence that names
    the command that makes a missing run. mode: what a published classifier is taken for.
    """
    if Path(source).is_file():
        model, checkpoint = load_published(source, kind, args.size, args.data, mode)
        return model.to(device).eval().requires_grad_(False), checkpoint
    stage = "pretrain" if kind == "autoencoder" else "finetune"
    make_it = runs.stage_command(stage, args)
    if Path(source) not in [runs.autoencoder_folder(args), *runs.default_classifier_folders(args)]:
        make_it += " and the flags that the folder's name stands for (--help)"
    return checkpoints.load_finished(source, kind, device, make_it)
