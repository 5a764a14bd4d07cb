r"""Published weights become a run's folder, once: after that every stage takes them like your own.

    python -m studies.convert mae_pretrain_vit_base_full.pth --as autoencoder --task mim --norm-pix \
        --data IMAGENET --out runs/mae
    python -m studies.convert mae_finetuned_vit_base.pth --as classifier --data IMAGENET --out runs/vit

Takes MAE's release, NIM-AdvDef's checkpoints and timm's ViT with average pooling, bare or wrapped
(state_dict, "module." in front of all names, an EMA beside), and .safetensors where that package is
installed. What was taken, left and ignored is printed. What a file does not show is said by flags: the
size, what an autoencoder was pretrained for, and the data set, for its mean and deviation and the names
of its classes in their order (the folders of FOLDER/val).
"""

import argparse
import math
import re
import zipfile

import numpy as np
import torch

from finetune import ENCODER
from model import SIZES, UserError
from pretrain import NORM_PIX_FROM
from support import cli, data, run

FIRST = "patch_embed.proj.weight"  # every ViT of MAE's and timm's has it
USUAL = ("model", "classifier", "state_dict", "model_state_dict")  # where a state dict lies in a file


def read_weights(path):
    """The content of a file of weights: tensors and plain values only, so that loading it cannot run code.

    Let through besides: argparse.Namespace, which MAE's training checkpoints hold, and NumPy's numbers.
    """
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise UserError(f"{path} needs another package: pip install safetensors") from None
        return load_file(path)
    scalar = np.float64(0).__reduce__()[0]  # whose module has another name in every version of NumPy
    allowed = [argparse.Namespace, np.dtype, *{type(np.dtype(kind)) for kind in "?bhilqBHILQefdU"},
               (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # older files have no checksums
            raise zipfile.BadZipFile("a checksum differs")
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load of a damaged file raises many kinds
        lines = (str(error) or type(error).__name__).splitlines()
        named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
        raise UserError(f"{path} is damaged, is no file of weights, or holds objects that could run code "
                        f"when loaded ({(named or lines)[0].strip()[:160]})") from None


def find_state(content, path):
    """The ViT's state dict in the content of a file, without a prefix in front of all its names.

    Says where it was found, and what else lay there.
    """
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no dictionary of weights")
    dictionaries = {name: value for name, value in content.items() if isinstance(value, dict)}
    places = sorted(dictionaries, key=lambda name: USUAL.index(name) if name in USUAL else len(USUAL))
    for place in [*places, None]:
        state = content if place is None else content[place]
        found = [name for name in state if isinstance(name, str) and name.endswith(FIRST)]
        if not found:
            continue
        prefix = found[0].removesuffix(FIRST)
        if torch.is_tensor(state.get(prefix + "pos_embed")) and state[prefix + "pos_embed"].dim() != 3:
            continue  # an optimizer's moments, say
        left = [name for name in places if name != place] if place else []
        others = [name for name in state if not str(name).startswith(prefix)]
        if others:
            left.append(f"{len(others)} names without it, as {others[0]}")
        print(f"took {place or 'the file itself'}" + (f", without the prefix {prefix!r}" if prefix else "")
              + (f"; left {', '.join(left)}" if left else ""))
        return {name.removeprefix(prefix): value for name, value in state.items()
                if torch.is_tensor(value) and name.startswith(prefix)}
    raise UserError(f"{path} holds no ViT weights under the names of MAE and timm (patch_embed, blocks); it "
                    f"holds: {', '.join(map(str, list(content)[:8]))}")


def config_of(args, state, dataset):
    """What builds the model of these weights: the size's entry of SIZES, and what file and flags say."""
    config = dict(SIZES[args.size or dataset.size], mean=tuple(args.mean or dataset.mean),
                  std=tuple(args.std or dataset.std))
    if "pos_embed" in state:
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
        config["image_size"] = side * config["patch_size"]
    if args.kind == "autoencoder":
        by_default = config["patch_size"] >= NORM_PIX_FROM
        config["norm_pix"] = by_default if args.norm_pix is None else args.norm_pix
        config["task"] = args.task
        return config
    if "fc_norm.weight" not in state:
        raise UserError(f"{args.file} classifies by the class token, this classifier by the mean of the "
                        "patch tokens (timm: global_pool='avg')")
    return {name: config[name] for name in ENCODER} | dict(num_classes=len(state["head.weight"]))


def load_state(model, state, path):
    """Give the model these weights, all of them; says by name what was ignored, as MAE does.

    UserError for what is missing or has another shape.
    """
    own = model.state_dict()
    depth = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=0)
    if hasattr(model, "blocks") and depth != len(model.blocks):
        raise UserError(f"{path} has {depth} blocks, the model {len(model.blocks)}: another --size?")
    for name, value in state.items():
        if name in own and value.shape != own[name].shape:
            raise UserError(f"{name} is {list(value.shape)} in {path} and {list(own[name].shape)} in the "
                            "model: another --size?")
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing:
        raise UserError(f"{path} is no whole {type(model).__name__.lower()}: it lacks "
                        f"{', '.join(missing[:3])}"
                        + (" ..." if len(missing) > 3 else ""))
    short = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in unexpected})
    print(f"ignored: {', '.join(short) or 'nothing'}")
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise UserError(f"{path} holds weights that are not finite")


def convert(args):
    """The checkpoint of a finished run that holds these weights."""
    state = find_state(read_weights(args.file), args.file)
    dataset = data.about(args.data, args.size)
    config = config_of(args, state, dataset)
    classes = list(data.open_split(args.data, "val", config["image_size"]).classes)
    if args.kind == "classifier" and config["num_classes"] != len(classes):
        raise UserError(f"{args.file} knows {config['num_classes']} classes, {args.data} has {len(classes)}")
    model = run.MAKERS[args.kind](**config)
    load_state(model, state, args.file)
    print(f"taken for a model of {config['num_heads']} heads (no weight shows how many), of images with "
          f"mean {config['mean']} and std {config['std']}"
          + (f", pretrained by {args.task.upper()}, norm_pix "
             f"{config['norm_pix']}" if args.kind == "autoencoder"
             else "; its classes: " + ", ".join(classes[:10]) + (" ..." if len(classes) > 10 else "")))
    settings = dict(size=args.size or dataset.size, data=args.data, seed=0)
    return dict(kind=args.kind, config=config, settings=settings, data=run.facts(args.data, dataset),
                classes=classes, task=args.task, defense="", level=None, autoencoder=None, epoch=1, epochs=1,
                log=[],
                made_by=[run.origin(args.command, ())], model=model.state_dict())


def arguments(argv=None):
    parser = argparse.ArgumentParser(prog="python -m studies.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", type=cli.folder, help="a file of weights")
    add("--as", dest="kind", choices=run.MAKERS, required=True, help="what it is")
    add("--data", type=data.dataset_name, required=True, help="what it was trained on: " + data.DATA_HELP)
    add("--out", type=cli.folder, required=True, metavar="RUN", help="the run's folder")
    add("--size", choices=SIZES, help="of the model; default: the data set's")
    add("--task", choices=["nim", "mim"], default="nim", help="what an autoencoder was pretrained for, "
        "default nim")
    add("--norm-pix", action=argparse.BooleanOptionalAction, help="whether an autoencoder's targets were "
        "normalized patch by patch; default: at patches of 14 pixels and more")
    for name in ("mean", "std"):
        add(f"--{name}", type=float, nargs=3, metavar=("R", "G", "B"), help=f"{name} by which the model "
            "normalizes, as 0.5 0.5 0.5; default: the data set's")
    return cli.parse(parser, argv, machine=False)


def main(argv=None):
    args = arguments(argv)
    checkpoint = convert(args)
    run.write_new(args.out, checkpoint)
    print(f"the run is in {args.out}")


if __name__ == "__main__":
    cli.run_script(main)
