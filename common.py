"""What the stages share: arguments, devices and processes, run folders, checkpoints, weights."""

import argparse
import contextlib
import hashlib
import io
import math
import os
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
from model import SIZES, Autoencoder, Classifier, UserError, make_classifier

NO_SETTINGS = "device runs workers resume overwrite max_batch bf16 compile dry_run".split()
ENCODER = "image_size patch_size embed_dim depth num_heads mean std".split()  # what a classifier has


# ------------------------------------------------------------------------------------ arguments

def number(kind, low=0, high=10**9):
    """An argparse type: an int or float from low to high."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise UserError(f"{text!r} is not {kind.__name__} from {low:g} to {high:g}")
        return value
    return convert


def eps(text):
    """An argparse type: '8/255' or '0.03', an attack radius in [0, 1] units."""
    top, _, bottom = text.partition("/")
    return number(float)(top) / number(float, 1)(bottom or 1)


def run_path(text):
    """An argparse type: a run's folder (its checkpoint.pt will do), or a file of published weights."""
    return Path(text).parent if Path(text).name == "checkpoint.pt" else Path(text)


count = number(int, 1)  # of images, epochs, steps, draws ...
ratio = number(float, 0, 0.99)


def parser(docstring):
    """The flags that every stage has."""
    result = argparse.ArgumentParser(description=docstring,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--data", default="digits", help="digits (default), cifar10, or FOLDER with train/ and val/")
    add("--size", choices=SIZES, help="default: tiny (digits), small (cifar10), base (FOLDER)")
    add("--seed", type=number(int), default=0, help="default 0; also names the runs looked for")
    add("--device", default="auto", help="auto (default: cuda if there is one), cpu, cuda, ...")
    add("--runs", default="runs", help="everything is written to RUNS/<data>/ (default runs)")
    add("--workers", type=number(int), default=2, help="image loading processes, default 2")
    add("--max-batch", type=count, default=256, help="images that a device sees at once: memory; "
        "training accumulates gradients, EOT draws run together up to this; default 256")
    add("--bf16", action=argparse.BooleanOptionalAction, default=None,
        help="bfloat16 autocast; default: in training on a GPU")
    add("--compile", action="store_true", help="torch.compile the models; the first steps take longer")
    return result


def fill_in(args, recipes=None, classifier=""):
    """Set what was not given: the size by the data set, then the recipe of size and classifier."""
    args.size = args.size or data.default(args, "size")
    if recipes:
        for name, value in recipes.get(f"{args.size} {classifier}", recipes[args.size]).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        if args.warmup_epochs >= args.epochs:
            raise UserError(f"{args.epochs} epochs are not more than {args.warmup_epochs:g} of warm-up: "
                            "give --warmup-epochs as well")
    return args


# ------------------------------------------------------------------------ devices and processes

def start(args):
    """The device to use; under torchrun, joins the other processes first. Only rank 0 prints."""
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    torchrun = "LOCAL_RANK" in os.environ
    name += ":" + os.environ["LOCAL_RANK"] if torchrun and name == "cuda" else ""
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()  # "meta", for one, cannot
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0][:90]}") from None
    device = probe.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 stays
    if torchrun and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(*values):
    """The sum of each value over all processes, as a list of floats."""
    sums = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def compile_models(args, device, *models):
    """torch.compile for --compile: an autoencoder's denoise, a classifier's forward, in place."""
    if not args.compile:
        return
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as error:  # no compiler, no Triton ...
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--compile cannot work here ({reason}): leave it out") from None
    for model in models:
        if isinstance(model, Autoencoder):
            model.denoise = torch.compile(model.denoise)
        elif model is not None:
            model.compile()


def autocast(args, device, default):
    """bfloat16 autocast if --bf16, or, where default says so, on a GPU."""
    bf16 = default and device.type == "cuda" if args.bf16 is None else args.bf16
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def run_script(main):
    """Call main(); one sentence and exit code 2 for bad input, 130 for Ctrl-C."""
    try:
        main()
    except UserError as error:  # from a loading process it comes with that process's traceback
        message = str(error).strip().splitlines()[-1].removeprefix("model.UserError: ")
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that cannot be written to ...
        print(f"error: {error}; what was saved before is kept", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; training goes on with the same command and --resume (not --overwrite)",
              file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------- run folders, checkpoints
# RUNS/<data>/<variant>/checkpoint.pt, one file per run: kind ("autoencoder" or "classifier"),
# config (constructor arguments), model, optimizer, epoch (of epochs; with the seed it is the random
# state as well, see seed_epoch), settings (the arguments), and what the later stages need.

def runs_folder(args):
    """RUNS/<data>: the name of the data set, or of the folder it lies in."""
    return Path(args.runs) / (args.data if args.data in data.DATASETS else Path(args.data).resolve().name)


def variant(parent, args, *parts):
    """Folder of a run, named by what makes it different; parts that are False or None are left out."""
    name = "_".join(str(part) for part in (*parts, args.seed and f"seed{args.seed}") if part)
    return parent / name.replace(":", "").replace(",", "-")


def default_autoencoder(args):
    """The folder of pretrain.py's default run."""
    return variant(runs_folder(args), args, f"nim_{data.default(args, 'pretrain')}",
                   args.size != data.default(args, "size") and args.size)


def default_classifiers(args):
    """The folders of finetune.py's default run: undefended and De³."""
    behind = default_autoencoder(args)
    return [variant(behind, args, "clean"),
            variant(behind, args, "de3", data.default(args, "finetune"))]


def command(kind, args=None):
    """The command line that makes the default run of this kind: autoencoder or classifier."""
    script = {"autoencoder": "python pretrain.py", "classifier": "python finetune.py"}[kind]
    given = [("--data", args.data, "digits"), ("--size", args.size, data.default(args, "size")),
             ("--seed", args.seed, 0), ("--runs", args.runs, "runs")] if args else []
    return script + "".join(f" {flag} {value}" for flag, value, usual in given if value != usual)


def write_whole(path, save):
    """save(file) beside `path`, then move into place: a kill leaves the old file whole."""
    buffer, temporary = io.BytesIO(), path.with_suffix(".tmp")
    save(buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"could not save {path} ({error}); what was saved before is kept: make room, and "
                        "go on with the same command (training: and --resume)") from None


def save_checkpoint(path, checkpoint):
    if rank() == 0:
        write_whole(path, lambda file: torch.save(checkpoint, file))


def read(path):
    """A file of weights: tensors and plain values only, so that loading it cannot run code.

    The one class let through is argparse.Namespace, which MAE's training checkpoints hold.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"there is no file {path}") from None
    except Exception as error:  # torch.load of a damaged file raises many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise UserError(f"{path} is damaged, no checkpoint, or holds objects that could run code "
                        f"when loaded ({reason}); make it again (--overwrite) or get it again") from None


def load_checkpoint(path, kind):
    """Read a checkpoint of this project."""
    checkpoint = read(path)
    if not isinstance(checkpoint, dict) or not {"kind", "config", "model", "epoch"} <= set(checkpoint):
        raise UserError(f"{path} is not a checkpoint of this project")
    if checkpoint["kind"] != kind:
        raise UserError(f"{path} holds {checkpoint['kind']} weights where {kind} weights are needed")
    return checkpoint


def open_run(path, kind, settings, args, model, optimizer):
    """Load what an earlier run saved at `path` into model and optimizer; returns its epoch, or 0.

    A finished run with the same settings is kept (epoch == args.epochs). Raises UserError where
    training would write over something else.
    """
    if args.overwrite and args.resume:
        raise UserError("--resume and --overwrite exclude each other")
    if args.overwrite or not path.exists():
        print(f"{path.parent}: " + ("nothing saved yet, starting over" if args.resume else "training"))
        return 0
    checkpoint = load_checkpoint(path, kind)
    old, epoch = checkpoint["settings"], checkpoint["epoch"]
    changed = [f"{key} {old.get(key)} there, {settings.get(key)} here"
               for key in sorted({*old, *settings}) if old.get(key) != settings.get(key)]
    if changed:
        raise UserError(f"{path.parent} holds a run with other settings ({'; '.join(changed)}): "
                        "train anew with --overwrite, or keep both with another --runs folder")
    if epoch < args.epochs and not args.resume:
        raise UserError(f"{path.parent} holds an unfinished run (epoch {epoch} of {args.epochs}): "
                        "go on with --resume, or train anew with --overwrite")
    print(f"{path.parent}: " + ("finished run kept, --overwrite trains anew" if epoch == args.epochs
                                else f"going on after epoch {epoch} of {args.epochs}"))
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return epoch


def load_finished(source, kind, device="cpu", args=None):
    """A finished run's folder: (model in evaluation mode, without gradients; its checkpoint).

    With args, source may also be a file of published weights, in the model of --size.
    """
    path = Path(source) / "checkpoint.pt"
    if Path(source).is_file() and args:
        model, checkpoint = load_published(source, kind, args)
        return model.to(device).eval().requires_grad_(False), checkpoint
    if not path.exists():
        usual = not args or Path(source) in [default_autoencoder(args), *default_classifiers(args)]
        raise UserError(f"{path} is missing; make it with: {command(kind, args)}"
                        + ("" if usual else " and the flags that the folder's name stands for (--help)"))
    checkpoint = load_checkpoint(path, kind)
    if checkpoint["epoch"] < checkpoint["epochs"]:
        raise UserError(f"{path} is unfinished (epoch {checkpoint['epoch']} of "
                        f"{checkpoint['epochs']}); finish it with: {command(kind, args)} --resume")
    try:
        model = (Autoencoder if kind == "autoencoder" else make_classifier)(**checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this code: {str(error).splitlines()[0]}") from None
    return model.to(device).eval().requires_grad_(False), checkpoint


def published_state(path, key="model"):
    """State dict in a file of weights: ours, MAE's, NIM-AdvDef's ({key: state}), or timm's ViT."""
    file = read(path)
    for state in (file.get(key), file.get("model"), file) if isinstance(file, dict) else ():
        if isinstance(state, dict) and "patch_embed.proj.weight" in state and (
                getattr(state.get("pos_embed"), "ndim", 3) == 3):
            return {name: value for name, value in state.items() if torch.is_tensor(value)}
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
    loaded = {name: resize_pos_embed(value, own[name].shape[1]) if "pos_embed" in name else value
              for name, value in state.items() if name in own}
    for name, value in loaded.items():
        if value.shape != own[name].shape:
            raise UserError(f"{name} is {list(value.shape)} in {source} and {list(own[name].shape)} "
                            "in the model")
    model.load_state_dict(loaded, strict=False)
    return loaded.keys(), own.keys() - loaded.keys(), state.keys() - loaded.keys()


def initialize_from_file(model, path, key="model"):
    """`initialize` from published weights, and say by name what became of them."""
    found = initialize(model, published_state(path, key), path)
    for title, names in zip(("loaded", "left at the initial value", "ignored"), found):
        short = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
        print(f"{path}: {title}: {', '.join(short) or 'nothing'}")
    return found[1]


def load_published(path, kind, args):
    """A model of --size with published weights, and what a checkpoint of ours would say of it."""
    key = "model" if kind == "autoencoder" else "classifier"
    state = published_state(path, key)
    size = SIZES[args.size]
    side = math.isqrt(state["pos_embed"].shape[1] - 1) if "pos_embed" in state else 1
    config = dict(size, image_size=side * size["patch_size"], mean=data.default(args, "mean"),
                  std=data.default(args, "std"), norm_pix=size["patch_size"] >= 14)
    if kind == "classifier":
        config = {name: config[name] for name in ENCODER}
        config["num_classes"] = len(state.get("head.weight", " "))
    model = (Autoencoder if kind == "autoencoder" else Classifier)(**config)
    if missing := initialize_from_file(model, path, key):
        raise UserError(f"{path} is no whole {kind}: it lacks {', '.join(sorted(missing)[:3])} ...")
    return model, dict(config=config, task="nim", mode="de3" if args.autoencoder else "clean",
                       keep_visible=False, classes=None, settings={"autoencoder": ""})


def fingerprint(model):
    """Twelve hex digits of the weights, to notice an autoencoder that was trained anew."""
    values = b"".join(value.cpu().numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(values).hexdigest()[:12]


def seed_epoch(seed, epoch):
    """All randomness of an epoch follows from (seed, epoch), so a resumed run repeats it exactly.

    Each process draws its own noise; the order of the images is data.TrainingOrder's.
    """
    torch.manual_seed((seed * 1_000_003 + epoch + 1) * 1_009 + rank())


def psnr(images, reference):
    """Peak signal-to-noise ratio in dB of each image: [B]."""
    return -10 * (images - reference).square().flatten(1).mean(1).clamp(min=1e-10).log10()
