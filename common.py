"""What the four stages share: arguments, run folders and checkpoints, schedule, progress, errors."""

import argparse
import hashlib
import math
import os
import pickle
import sys
import time
from pathlib import Path

import torch

from data import statistics
from model import Autoencoder, Classifier, UserError, parse_sigma

# ------------------------------------------------------------------------------------ arguments


def number(kind, low, high=math.inf, low_allowed=True):
    """An argparse type: int or float within [low, high], or (low, high]."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high) or (value == low and not low_allowed) or math.isinf(value):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole number' if kind is int else 'a number'} "
                f"{'from' if low_allowed else 'above'} {low:g}"
                + (f" to {high:g}" if high < math.inf else ""))
        return value
    return convert


count = number(int, 1)  # of images, epochs, steps, draws ...
positive = number(float, 0, low_allowed=False)
fraction = number(float, 0, 1)


def sigma(text):
    """An argparse type: a noise scale (see model.parse_sigma)."""
    try:
        return parse_sigma(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def eps(text):
    """An argparse type: an attack radius '8/255' or '0.03', in [0, 1] units."""
    try:
        top, _, bottom = text.partition("/")
        value = float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a radius in [0, 1]; write 8/255 for 8 of 255 gray levels")
    return value


def parser(docstring):
    """The flags every stage has."""
    result = argparse.ArgumentParser(description=docstring,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--data", default="digits", help="digits (default), cifar10, or FOLDER with train/, val/")
    add("--seed", type=number(int, 0), default=0, help="default 0")
    add("--device", default="auto", help="auto (default: cuda where there is one), cpu, cuda, ...")
    add("--runs", default="runs", help="where everything is written: RUNS/<data>/ (default runs)")
    add("--workers", type=number(int, 0), default=2, help="image loading processes (default 2)")
    return result


def training_flags(add, recipe):
    """The flags both training stages have. recipe: (help text of) the defaults of each size."""
    add("--epochs", type=count, help=f"default {recipe('epochs')}")
    add("--batch-size", type=count, help=f"default {recipe('batch_size')}")
    add("--base-lr", type=positive,
        help=f"learning rate per 256 images, lr = this x batch/256; default {recipe('base_lr')}")
    add("--warmup-epochs", type=number(float, 0), help=f"default {recipe('warmup_epochs')}")
    add("--weight-decay", type=number(float, 0), default=0.05, help="default 0.05")
    add("--resume", action="store_true", help="go on where an interrupted run last saved")
    add("--overwrite", action="store_true", help="train anew over an earlier run of this name")


def fill_recipe(args, recipes, size):
    """Set the training flags that were not given to the recipe of this size."""
    for name, value in recipes[size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def run_script(main):
    """Call main(); one sentence and exit code 2 for bad input, 130 for Ctrl-C."""
    try:
        main()
    except UserError as error:  # one raised in a loading process carries that process's traceback
        message = str(error).strip().splitlines()[-1]
        sys.exit(fail(message.removeprefix("model.UserError: "), 2))
    except KeyboardInterrupt:
        sys.exit(fail("interrupted; a training stage goes on with the same command and --resume",
                      130))


def fail(message, code):
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


# ---------------------------------------------------------------------------------- checkpoints
# One file per run, checkpoint.pt: kind ("autoencoder" or "classifier"), config (constructor
# arguments), model, optimizer, epoch and epochs, settings. The random state needs no storing:
# every epoch starts from torch.manual_seed of (seed, epoch), see seed_epoch.

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
        temporary.unlink(missing_ok=True)
        raise UserError(f"could not save {path}: {str(error).splitlines()[0]}; what was saved "
                        "before is kept, go on with --resume") from None


def load_checkpoint(path, kind):
    """Read a checkpoint of this project; tensors and plain values only, nothing that runs code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is no checkpoint, or holds objects that could run code on "
                        "loading; refused") from None
    except Exception as error:  # torch.load of a damaged file raises many kinds
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or no checkpoint ({reason}); train it again with "
                        "--overwrite") from None
    needed = {"kind", "config", "model", "epoch", "epochs", "settings"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of this project")
    if checkpoint["kind"] != kind:
        raise UserError(f"{path} holds {checkpoint['kind']} weights, not {kind} weights")
    return checkpoint


def open_run(folder, settings, kind, args):
    """Decide what to do with the run folder. Returns its checkpoint, or None to start from nothing.

    A finished run with the same settings comes back as it is (epoch == epochs). Raises UserError
    where going on would overwrite another run.
    """
    path = folder / "checkpoint.pt"
    if args.overwrite and args.resume:
        raise UserError("--resume and --overwrite exclude each other")
    if not path.exists():
        if args.resume:
            print(f"{folder}: nothing saved yet, starting over")
        return None
    if args.overwrite:
        return None
    checkpoint = load_checkpoint(path, kind)
    old = checkpoint["settings"]
    changed = [f"{key} {old.get(key)} there, {settings.get(key)} here"
               for key in sorted({*old, *settings}) if old.get(key) != settings.get(key)]
    if changed:
        raise UserError(f"{folder} holds a run with other settings ({'; '.join(changed)}): train "
                        "anew with --overwrite, or keep both by another --runs folder")
    done = f"epoch {checkpoint['epoch']} of {checkpoint['epochs']}"
    if checkpoint["epoch"] == checkpoint["epochs"]:
        print(f"{folder}: finished run kept ({done}); --overwrite trains anew")
    elif args.resume:
        print(f"{folder}: going on after {done}")
    else:
        raise UserError(f"{folder} holds an unfinished run ({done}): go on with --resume or train "
                        "anew with --overwrite")
    return checkpoint


def fingerprint(model):
    """Twelve hex digits that tell whether two models have the same weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def build(make, checkpoint, path):
    """make(**config) with the checkpoint's weights, in evaluation mode, without gradients."""
    try:
        module = make(**checkpoint["config"])
        module.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this code: {str(error).splitlines()[0]}") from None
    return module.eval().requires_grad_(False)


def load_finished(folder, kind, made_by):
    """The checkpoint in a folder (or a file), which must be finished."""
    path = Path(folder)
    path = path / "checkpoint.pt" if path.suffix != ".pt" else path
    if not path.exists():
        raise UserError(f"{path} is missing; make it with: {made_by}")
    checkpoint = load_checkpoint(path, kind)
    if checkpoint["epoch"] < checkpoint["epochs"]:
        raise UserError(f"{path} is unfinished (epoch {checkpoint['epoch']} of "
                        f"{checkpoint['epochs']}); finish it with --resume")
    return checkpoint


def load_autoencoder(folder, device, made_by="python pretrain.py"):
    checkpoint = load_finished(folder, "autoencoder", made_by)
    return build(Autoencoder, checkpoint, folder).to(device), checkpoint


# ----------------------------------------------------------------------- optimizer and schedule

def parameter_groups(model, weight_decay, layer_decay=1.0):
    """AdamW groups: no weight decay on 1-D parameters, class token and position embedding.

    layer_decay: the lr of block i is scaled by layer_decay^(depth - i), the embedding's (class
    token, positions, patches) by layer_decay^(depth + 1), the head's by 1 (BEiT, MAE).
    """
    depth = len(getattr(model, "blocks", ()))
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = 0 if name.startswith(("cls_token", "pos_embed", "patch_embed")) else depth + 1
        decays = parameter.dim() > 1 and name not in ("cls_token", "pos_embed")
        group = groups.setdefault((layer, decays), {
            "params": [], "weight_decay": weight_decay if decays else 0.0,
            "lr_scale": layer_decay ** (depth + 1 - layer)})
        group["params"].append(parameter)
    return list(groups.values())


def learning_rate(step, steps, warmup_steps, peak, final):
    """Linear warm-up from 0, then half a cosine from peak to final; one value per iteration."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def update(loss, optimizer, lr, step):
    """One optimizer step at learning rate lr; stops the run where the loss is not finite."""
    if not math.isfinite(loss.item()):
        raise UserError(f"the loss is {loss.item()} at step {step}; the last checkpoint is kept: "
                        "try a lower --base-lr with --overwrite")
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def seed_epoch(seed, epoch):
    """All randomness of an epoch follows from (seed, epoch): resumed runs repeat it exactly."""
    torch.manual_seed(seed * 1_000_003 + epoch + 1)


class Progress:
    """Prints loss, accuracy, speed and time left, at most every few seconds and at the end."""

    def __init__(self, first_epoch, epochs, every=5.0):
        self.first, self.epochs, self.every = first_epoch, epochs, every
        self.start = self.printed = time.time()
        self.images = self.loss = self.correct = self.seen = 0

    def add(self, loss, correct, images):
        """loss: batch mean; correct: number of hits, or None where there are no labels."""
        self.images += images
        self.seen += images
        self.loss += loss * images
        self.correct = None if correct is None else self.correct + correct

    def epoch_done(self, epoch, lr):
        now = time.time()
        if now - self.printed < self.every and epoch < self.epochs:
            return
        self.printed = now
        left = (now - self.start) / (epoch - self.first) * (self.epochs - epoch)
        hits = "" if self.correct is None else f"  accuracy {100 * self.correct / self.seen:5.1f}%"
        print(f"epoch {epoch:4d}/{self.epochs}  loss {self.loss / self.seen:7.4f}{hits}  "
              f"lr {lr:.1e}  {self.images / (now - self.start):7.0f} images/s  "
              f"{left // 60:3.0f}:{left % 60:02.0f} left", flush=True)
        self.loss = self.seen = 0
        self.correct = None if self.correct is None else 0


def psnr(images, reference):
    """Peak signal-to-noise ratio in dB, averaged over the images."""
    mse = (images - reference).square().flatten(1).mean(1).clamp(min=1e-10)
    return (-10 * mse.log10()).mean().item()
