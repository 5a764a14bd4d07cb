"""What the stages share: arguments, run folders, checkpoints, schedule, progress."""

import argparse
import hashlib
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torchvision import transforms
from torchvision.models import resnet18

import data
from model import Autoencoder, Classifier, UserError

DECODER = dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)
SIZES = {  # arguments of Autoencoder; base, large and huge are MAE's
    "tiny": dict(image_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4,  # the digits
                 decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4),
    "small": dict(image_size=32, patch_size=4, embed_dim=192, depth=7, num_heads=6,  # 32x32 color
                  decoder_embed_dim=128, decoder_depth=4, decoder_num_heads=4),
    "base": dict(image_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, **DECODER),
    "large": dict(image_size=224, patch_size=16, embed_dim=1024, depth=24, num_heads=16, **DECODER),
    "huge": dict(image_size=224, patch_size=14, embed_dim=1280, depth=32, num_heads=16, **DECODER),
}


# ------------------------------------------------------------------------------------ arguments

def number(kind, low=0, high=math.inf):
    """An argparse type: a finite int or float from low to high."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            raise UserError(f"{text!r} is not {kind.__name__} from {low:g} to {high:g}")
        return value
    return convert


def eps(text):
    """An argparse type: '8/255' or '0.03', an attack radius in [0, 1] units."""
    top, _, bottom = text.partition("/")
    return number(float)(top) / number(float, 1)(bottom or 1)


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
    return result


def training_flags(add, recipes):
    """The flags of both training stages; what is not given is taken from the size's recipe."""
    def text(name):
        return "default " + ", ".join(f"{recipes[key][name]:g} ({key})" for key in recipes)
    add("--epochs", type=count, help=text("epochs"))
    add("--batch-size", type=count, help=text("batch_size"))
    add("--base-lr", type=number(float, 1e-12), help="lr = this x batch/256; " + text("base_lr"))
    add("--warmup-epochs", type=number(float), help=text("warmup_epochs"))
    add("--weight-decay", type=number(float), default=0.05, help="default 0.05")
    add("--resume", action="store_true", help="go on where an interrupted run last saved")
    add("--overwrite", action="store_true", help="train anew over an earlier run of this name")


def fill_in(args, recipes=None, classifier=""):
    """Set what was not given: the size by the data set, then the recipe of size and classifier."""
    args.size = args.size or data.default(args, "size")
    if recipes:
        for name, value in recipes.get(f"{args.size} {classifier}", recipes[args.size]).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    return args


def pick_device(name):
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return name


def run_script(main):
    """Call main(); one sentence and exit code 2 for bad input, 130 for Ctrl-C."""
    try:
        main()
    except UserError as error:  # from a loading process it comes with that process's traceback
        message = str(error).strip().splitlines()[-1].removeprefix("model.UserError: ")
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; training goes on with the same command and --resume", file=sys.stderr)
        sys.exit(130)


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


def command(script, args):
    """The command line that makes the default run of a stage."""
    given = [("--data", args.data, "digits"), ("--size", args.size, data.default(args, "size")),
             ("--seed", args.seed, 0), ("--runs", args.runs, "runs")]
    return " ".join([f"python {script}"] + [f"{flag} {value}" for flag, value, usual in given
                                            if value != usual])


def save_checkpoint(path, checkpoint):
    """Write beside `path`, then move into place: a kill at any moment leaves the old file whole."""
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not save {path} ({str(error).splitlines()[0]}); what was saved "
                        "before is kept: make room and go on with --resume") from None


def load_checkpoint(path, kind):
    """Read a checkpoint of this project; only tensors and plain values, nothing that runs code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load of a damaged file raises many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise UserError(f"{path} is damaged, no checkpoint, or holds objects that could run code "
                        f"when loaded ({reason}); make it again with --overwrite") from None
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


def load_finished(folder, kind, made_by, device="cpu"):
    """A finished run: (model in evaluation mode, without gradients; its checkpoint)."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise UserError(f"{path} is missing; make it with: {made_by}")
    checkpoint = load_checkpoint(path, kind)
    if checkpoint["epoch"] < checkpoint["epochs"]:
        raise UserError(f"{path} is unfinished (epoch {checkpoint['epoch']} of "
                        f"{checkpoint['epochs']}); finish it with: {made_by} --resume")
    try:
        model = (Autoencoder if kind == "autoencoder" else make_classifier)(**checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this code: {str(error).splitlines()[0]}") from None
    return model.to(device).eval().requires_grad_(False), checkpoint


def make_classifier(kind="vit", **config):
    """The ViT, or torchvision's resnet18 with the normalization inside ([0, 1] images to logits)."""
    if kind == "vit":
        return Classifier(**config)
    return nn.Sequential(transforms.Normalize(config["mean"], config["std"]),
                         resnet18(num_classes=config["num_classes"]))


def fingerprint(model):
    """Twelve hex digits of the weights, to notice an autoencoder that was trained anew."""
    values = b"".join(value.cpu().numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(values).hexdigest()[:12]


# ------------------------------------------------------------------------------------- training

def parameter_groups(model, weight_decay, layer_decay=1.0):
    """AdamW groups: no weight decay on 1-D parameters, nor on what model.no_weight_decay names.

    layer_decay: the lr of block i is scaled by layer_decay^(depth - i), that of the tokens
    (patches, positions, class) by layer_decay^(depth + 1), that of the head by 1 (as in MAE).
    """
    depth, groups = len(getattr(model, "blocks", ())), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0 if (
                name.startswith(("cls_token", "pos_embed", "patch_embed"))) else depth + 1
            decays = parameter.dim() > 1 and name not in getattr(model, "no_weight_decay", ())
            group = groups.setdefault((layer, decays), dict(
                params=[], weight_decay=weight_decay if decays else 0.0,
                lr_scale=layer_decay ** (depth + 1 - layer)))
            group["params"].append(parameter)
    return list(groups.values())


def learning_rate(step, steps, warmup_steps, peak, final):
    """Linear warm-up from 0, then half a cosine from peak to final; one value per iteration."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def update(loss, optimizer, lr, step):
    """One optimizer step at this learning rate; a loss that is not finite stops the run."""
    if not loss.isfinite():
        raise UserError(f"the loss is {loss.item()} at step {step}; what was saved before is kept: "
                        "try a lower --base-lr")
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def seed_epoch(seed, epoch):
    """All randomness of an epoch follows from (seed, epoch), so a resumed run repeats it exactly."""
    torch.manual_seed(seed * 1_000_003 + epoch + 1)


class Progress:
    """Prints loss, accuracy, speed and time left, at most every five seconds and at the end."""

    def __init__(self, first_epoch, epochs):
        self.first, self.epochs = first_epoch, epochs
        self.start = self.printed = time.time()
        self.images, self.window = 0, [0.0, 0, 0]  # window: loss, hits, images since the last line

    def add(self, loss, images, hits=math.nan):
        """A batch: its mean loss, its size, and how many it got right."""
        self.images += images
        self.window = [a + b for a, b in zip(self.window, (loss * images, hits, images))]

    def epoch_done(self, epoch, lr):
        now = time.time()
        if now - self.printed < 5 and epoch < self.epochs:
            return
        loss, hits, images = self.window
        left = (now - self.start) / (epoch - self.first) * (self.epochs - epoch)
        accuracy = "" if math.isnan(hits) else f"accuracy {100 * hits / images:5.1f}%  "
        print(f"epoch {epoch:4d}/{self.epochs}  loss {loss / images:7.4f}  {accuracy}lr {lr:.1e}  "
              f"{self.images / (now - self.start):6.0f} images/s  "
              f"{left // 60:.0f}:{left % 60:02.0f} left", flush=True)
        self.printed, self.window = now, [0.0, 0, 0]


def psnr(images, reference):
    """Peak signal-to-noise ratio in dB of each image: [B]."""
    return -10 * (images - reference).square().flatten(1).mean(1).clamp(min=1e-10).log10()
