"""What the stages share: arguments, run folders, checkpoints, schedule, progress, and errors."""

import argparse
import hashlib
import math
import os
import pickle
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torchvision import transforms
from torchvision.models import resnet18

import data
from model import Autoencoder, Classifier, De3, NoiseScale, UserError, check_mask_ratio

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
DEFAULTS = {  # by --data; sigma: of pretraining, of fine-tuning, at test time
    "digits": dict(size="tiny", pretrain="gamma:10,8", finetune="uniform:0,60", test="0,50"),
    "cifar10": dict(size="small", pretrain="gamma:25,3", finetune="uniform:0,30", test="0,35,70,140"),
    "FOLDER": dict(size="base", pretrain="gamma:25,3", finetune="uniform:0,30", test="0,35,70,140"),
}


def default(args, name):
    return DEFAULTS.get(args.data, DEFAULTS["FOLDER"])[name]


# ------------------------------------------------------------------------------------ arguments

def checked(function):
    """An argparse type from a function that raises UserError or ValueError."""
    def convert(text):
        try:
            return function(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except (ValueError, ZeroDivisionError):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    return convert


def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float from low to high."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise UserError(f"{text} is not between {low:g} and {high:g}")
        return value
    return checked(convert)


count = number(int, 1)  # of images, epochs, steps, draws ...
sigma = checked(NoiseScale.parse)


@checked
def test_sigma(text):
    """'off', for undefended, or a number."""
    scale = None if text == "off" else NoiseScale.parse(text)
    if scale and scale.kind != "fixed":
        raise UserError(f"sigma {text!r}: at test time sigma is a number, or off")
    return scale and scale.a


def radius(text):
    """'8/255' or '0.03': an attack radius in [0, 1] units (for L2 it may be larger)."""
    top, _, bottom = text.partition("/")
    value = float(top) / float(bottom or 1)
    if not 0 <= value < math.inf:
        raise UserError(f"eps {text} must be a finite number, not negative; write 8/255")
    return value


def check_linf(value):
    if value > 1:
        raise UserError(f"eps {value:g} is above 1: write 8/255 for 8 of 255 gray levels")
    return value


eps = checked(radius)
linf_eps = checked(lambda text: check_linf(radius(text)))


def one_of(what, *names):
    """An argparse type: one of some names."""
    def convert(text):
        if text not in names:
            raise UserError(f"unknown {what} {text!r}: choose from {', '.join(names)}")
        return text
    return checked(convert)


@checked
def mask_ratio(text):
    check_mask_ratio(float(text))
    return float(text)


def listed(convert):
    """An argparse type: a comma-separated list."""
    return lambda text: [convert(part) for part in text.split(",")]


def parser(docstring):
    """The flags that every stage has."""
    result = argparse.ArgumentParser(description=docstring,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--data", default="digits", help="digits (default), cifar10, or FOLDER with train/ and val/")
    add("--size", choices=SIZES, help="default: tiny (digits), small (cifar10), base (FOLDER)")
    add("--seed", type=number(int, 0), default=0, help="default 0; also names the runs looked for")
    add("--device", default="auto", help="auto (default: cuda if there is one), cpu, cuda, ...")
    add("--runs", default="runs", help="where everything is written: RUNS/<data>/ (default runs)")
    add("--workers", type=number(int, 0), default=2, help="image loading processes, default 2")
    return result


def training_flags(add, recipes):
    """The flags of both training stages; what is not given is taken from the size's recipe."""
    def text(name):
        return "default " + ", ".join(f"{recipes[key][name]:g} ({key})" for key in recipes)
    add("--epochs", type=count, help=text("epochs"))
    add("--batch-size", type=count, help=text("batch_size"))
    add("--base-lr", type=number(float, 1e-12), help="lr per 256 images, lr = this x batch/256; "
        + text("base_lr"))
    add("--warmup-epochs", type=number(float, 0), help=text("warmup_epochs"))
    add("--weight-decay", type=number(float, 0), default=0.05, help="default 0.05")
    add("--resume", action="store_true", help="go on where an interrupted run last saved")
    add("--overwrite", action="store_true", help="train anew over an earlier run of this name")


def fill_defaults(args, recipes=(), classifier=""):
    """Set what was not given: the size by the data set, then the recipe of size and classifier."""
    args.size = args.size or default(args, "size")
    key = f"{args.size} {classifier}" if f"{args.size} {classifier}" in recipes else args.size
    for name, value in (recipes[key] if recipes else {}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def evaluation_flags(add):
    """The flags of both evaluating stages."""
    add("--classifier", nargs="+", metavar="RUN", help="fine-tuning runs (folders); default: the "
        "undefended and the De³ classifier of finetune.py's default")
    add("--autoencoder", metavar="RUN", help="default: the one the classifier was trained behind")
    add("--sigma", type=listed(test_sigma), metavar="S,S,...",
        help="sigmas to test, 'off' for undefended; default: off for an undefended classifier, "
             f"{DEFAULTS['digits']['test']} (digits) or {DEFAULTS['FOLDER']['test']} for De³")
    add("--mask-ratio", type=listed(mask_ratio), default=[0.25, 0.5, 0.75], metavar="R,R,...",
        help="behind MIM: ratios to test, default 0.25,0.5,0.75")
    add("--votes", type=count, default=1, help="draws that De³ averages for one answer, default 1")
    add("--split", choices=["train", "val", "test"], default="test",
        help="default test; only the digits tell val from test")
    add("--images", type=count, help="how many, evenly spread; default 120 in attack.py, else 1000, or all there are")
    add("--batch-size", type=count, default=120, help="default 120")


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
    return Path(args.runs) / data.short_name(args.data)


def variant(parent, *parts):
    """Folder of a run, named by what makes it different; parts that are False or None are left out."""
    name = "_".join(str(part) for part in parts if part)
    return parent / name.replace(":", "").replace(",", "-")


def autoencoder_folder(args, task, *parts):
    """Where pretrain.py keeps a run; later stages look there for the default one."""
    return variant(runs_folder(args), task, args.size != default(args, "size") and args.size, *parts,
                   args.seed and f"seed{args.seed}")


def default_autoencoder(args):
    return autoencoder_folder(args, f"nim_{NoiseScale.parse(default(args, 'pretrain'))}")


def command(script, args):
    """The command line that makes the default run of a stage."""
    given = [("--data", args.data, "digits"), ("--size", args.size, default(args, "size")),
             ("--seed", args.seed, 0), ("--runs", args.runs, "runs")]
    return " ".join(["python", script] + [f"{flag} {value}" for flag, value, usual in given
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
    except pickle.UnpicklingError:
        raise UserError(f"{path} is no checkpoint, or holds objects that could run code when "
                        "loaded: refused") from None
    except Exception as error:  # torch.load of a damaged file raises many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise UserError(f"{path} is damaged or no checkpoint ({reason}); make it again with "
                        "--overwrite") from None
    if not isinstance(checkpoint, dict) or not {"kind", "config", "model", "epoch"} <= set(checkpoint):
        raise UserError(f"{path} is not a checkpoint of this project")
    if checkpoint["kind"] != kind:
        raise UserError(f"{path} holds {checkpoint['kind']} weights where {kind} weights are needed")
    return checkpoint


def open_run(folder, settings, kind, args):
    """The checkpoint to go on from, or None to start from nothing.

    A finished run with the same settings comes back as it is (epoch == epochs). Raises UserError
    where training would write over something else.
    """
    path = folder / "checkpoint.pt"
    if args.overwrite and args.resume:
        raise UserError("--resume and --overwrite exclude each other")
    if args.overwrite or not path.exists():
        print(f"{folder}: " + ("nothing saved yet, starting over" if args.resume else "training"))
        return None
    checkpoint = load_checkpoint(path, kind)
    old = checkpoint["settings"]
    changed = [f"{key} {old.get(key)} there, {settings.get(key)} here"
               for key in sorted({*old, *settings}) if old.get(key) != settings.get(key)]
    if changed:
        raise UserError(f"{folder} holds a run with other settings ({'; '.join(changed)}): train "
                        "anew with --overwrite, or keep both with another --runs folder")
    done = f"epoch {checkpoint['epoch']} of {checkpoint['epochs']}"
    if checkpoint["epoch"] < checkpoint["epochs"] and not args.resume:
        raise UserError(f"{folder} holds an unfinished run ({done}): go on with --resume, or train "
                        "anew with --overwrite")
    finished = checkpoint["epoch"] == checkpoint["epochs"]
    print(f"{folder}: " + ("finished run kept, --overwrite trains anew" if finished
                           else f"going on after {done}"))
    return checkpoint


def load_finished(folder, kind, made_by, device):
    """A finished run: (model in evaluation mode, without gradients; its checkpoint)."""
    path = Path(folder) / "checkpoint.pt" if Path(folder).suffix != ".pt" else Path(folder)
    if not path.exists():
        raise UserError(f"{path} is missing; make it with: {made_by}")
    checkpoint = load_checkpoint(path, kind)
    if checkpoint["epoch"] < checkpoint["epochs"]:
        raise UserError(f"{path} is unfinished (epoch {checkpoint['epoch']} of "
                        f"{checkpoint['epochs']}); finish it with: {made_by} --resume")
    make = Autoencoder if kind == "autoencoder" else make_classifier
    try:
        model = make(**checkpoint["config"])
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
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def load_defenses(args, device, straight_through=True):
    """What --classifier, --autoencoder, --sigma, --mask-ratio and --votes ask for.

    Returns a list of (name of the run, De3 on the device) and the last classifier's checkpoint.
    """
    folders = args.classifier or [
        variant(default_autoencoder(args), "clean", args.seed and f"seed{args.seed}"),
        variant(default_autoencoder(args), "de3", NoiseScale.parse(default(args, "finetune")),
                args.seed and f"seed{args.seed}")]
    defenses, made_by = [], command("finetune.py", args)
    for folder in folders:
        classifier, checkpoint = load_finished(folder, "classifier", made_by, device)
        mode, sigmas, ratios = checkpoint["mode"], args.sigma, [None]
        autoencoder, task = None, "nim"
        if mode == "de3" or (mode == "clean" and sigmas and sigmas != [None]):
            parent = (Path(folder).parent if Path(folder).suffix == ".pt" else Path(folder)).parent
            inside = mode == "de3" or (parent / "checkpoint.pt").exists()
            source = args.autoencoder or (parent if inside else default_autoencoder(args))
            autoencoder, pretraining = load_finished(source, "autoencoder",
                                                     command("pretrain.py", args), device)
            task = pretraining["task"]
            if mode == "de3" and not args.autoencoder and (
                    fingerprint(autoencoder) != checkpoint["fingerprint"]):
                raise UserError(f"{folder} was trained behind another autoencoder than {source} now "
                                "holds: train it again with finetune.py --overwrite")
            if autoencoder.image_size != checkpoint["config"]["image_size"]:
                raise UserError(f"{source} is for images of {autoencoder.image_size} pixels, "
                                f"{folder} for {checkpoint['config']['image_size']}")
        if task == "mim":
            sigmas, ratios = [None], args.mask_ratio
        elif sigmas is None:
            sigmas = [None] if mode == "clean" else [
                float(value) for value in default(args, "test").split(",")]
        name = os.path.relpath(folder, runs_folder(args)).removesuffix("/checkpoint.pt")
        defenses += [(name, De3(None if sigma is None and ratio is None else autoencoder, classifier,
                                sigma, ratio, checkpoint["keep_visible"], args.votes,
                                straight_through).to(device).eval())
                     for sigma in sigmas for ratio in ratios]
    return defenses, checkpoint


def load_test_images(args, checkpoint, usual_count):
    """The images --data, --split and --images ask for, sized for the classifier of a checkpoint."""
    images = data.load_dataset(args.data, args.split, checkpoint["config"]["image_size"])
    if images.classes != checkpoint["classes"]:
        raise UserError(f"the classes of {args.data} are not those the classifier was trained on")
    return data.subset(images, args.images or usual_count)


# ------------------------------------------------------------------------------------- training

def parameter_groups(model, weight_decay, layer_decay=1.0):
    """AdamW groups: no weight decay on 1-D parameters, class token and position embedding.

    (The paper exempts the class token in fine-tuning only; here it is exempt in both stages.)

    layer_decay: the lr of block i is scaled by layer_decay^(depth - i), that of the tokens
    (patches, positions, class) by layer_decay^(depth + 1), that of the head by 1 (as in MAE).
    """
    depth, groups = len(getattr(model, "blocks", ())), {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = 0 if name.startswith(("cls_token", "pos_embed", "patch_embed")) else depth + 1
        decays = parameter.dim() > 1 and name not in ("cls_token", "pos_embed")
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
        self.images = 0
        self.window = [0.0, 0, 0]  # loss, hits, images since the last line

    def add(self, loss, images, hits=None):
        """A batch: its mean loss, its size, and how many it got right (None: not counted)."""
        self.images += images
        added = (loss * images, math.nan if hits is None else hits, images)
        self.window = [old + new for old, new in zip(self.window, added)]

    def epoch_done(self, epoch, lr):
        now = time.time()
        if now - self.printed < 5 and epoch < self.epochs:
            return
        loss, hits, images = self.window
        left = (now - self.start) / (epoch - self.first) * (self.epochs - epoch)
        accuracy = "" if math.isnan(hits) else f"  accuracy {100 * hits / images:5.1f}%"
        print(f"epoch {epoch:4d}/{self.epochs}  loss {loss / images:7.4f}{accuracy}  lr {lr:.1e}  "
              f"{self.images / (now - self.start):6.0f} images/s  "
              f"{left // 60:.0f}:{left % 60:02.0f} left", flush=True)
        self.printed, self.window = now, [0.0, 0, 0]


def psnr(images, reference):
    """Peak signal-to-noise ratio in dB of each image: [B]."""
    return -10 * (images - reference).square().flatten(1).mean(1).clamp(min=1e-10).log10()
