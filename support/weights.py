"""From folders and files to models: published weights, and the defenses that the later stages test."""

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model import DEFENSES, SIZES, Autoencoder, Classifier, De3, NoiseScale, UserError
from support import cli, data, run

ENCODER = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "mean", "std")
NORM_PIX_FROM = 14  # pixels of a patch: from here on target patches are normalized by default
BATCH = 120  # images that are evaluated together; at most --max-batch


# ----------------------------------------------------------------------------- published weights

def published_state(path, key="model"):
    """The ViT's state dict in a file of weights: ours, MAE's, NIM-AdvDef's, timm's, or wrapped ones.

    It is looked for under `key`, the usual names, and in the file itself; one prefix in front of all
    its names (DDP's "module.", torch.compile's "_orig_mod.") is taken off. Says where it was found.
    """
    file = run.read_weights(path)
    file = file if isinstance(file, dict) else {}
    first = "patch_embed.proj.weight"
    usual = dict.fromkeys([key, "model", "state_dict", "model_state_dict", *file])
    places = {name: file[name] for name in usual if isinstance(file.get(name), dict)}
    for place, state in [*places.items(), ("the file itself", file)]:
        found = [name for name in state if isinstance(name, str) and name.endswith(first)]
        if not found:
            continue
        prefix, names = found[0].removesuffix(first), list(state)
        state = {name.removeprefix(prefix): value for name, value in state.items()
                 if torch.is_tensor(value) and name.startswith(prefix)}
        if getattr(state.get("pos_embed"), "ndim", 3) != 3:
            continue
        if not all(value.isfinite().all() for value in state.values()):
            raise UserError(f"{path} holds weights that are not finite")
        others = [name for name in places if name != place]
        others = others if place in places else []
        beside = [name for name in names if not str(name).startswith(prefix)]
        others += [f"{len(beside)} names without it, as {beside[0]}"] if beside else []
        print(f"{path}: took {place}" + (f", without the prefix {prefix!r}" if prefix else "")
              + (f"; left {', '.join(others)}" if others else ""))
        return state
    raise UserError(f"{path} holds no ViT weights under the names of MAE and timm (patch_embed, blocks); "
                    f"it holds: {', '.join(map(str, list(file)[:8])) or 'no dictionary'}")


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
                            "in the model: another --size?")
        loaded[name] = value
    model.load_state_dict(loaded, strict=False)
    return loaded.keys(), own.keys() - loaded.keys(), state.keys() - loaded.keys()


def initialize_from_file(model, path, key="model"):
    """`initialize` from published weights, say by name what became of them, return what was left.

    A classifier of another number of classes gives everything but its head.
    """
    if Path(path).is_dir():
        raise UserError(f"--init takes a file of weights, as {path}/checkpoint.pt, not a folder")
    state, head = published_state(path, key), model.state_dict().get("head.weight")
    if head is not None and "head.weight" in state and len(state["head.weight"]) != len(head):
        print(f"{path}: its head is for {len(state['head.weight'])} classes, not {len(head)}: left out")
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    loaded, left, ignored = initialize(model, state, path)
    for title, names in (("loaded", loaded), ("left at the initial value", left), ("ignored", ignored)):
        short = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
        print(f"{path}: {title}: {', '.join(short) or 'nothing'}")
    return left


def is_published(source):
    """Whether this is a file of published weights, not a run's folder or a copy of its checkpoint."""
    return Path(source).is_file() and not run.is_checkpoint(run.read_weights(source))


def load_published(path, kind, args):
    """A model with published weights, and what a checkpoint of ours would say of it.

    args: the flags --data, --size, and, for what a file does not show, --mean and --std (default:
    those of --data) and, of an autoencoder, --task and --[no-]norm-pix.
    """
    dataset = args.data or "digits"
    row = data.about(dataset)
    size = args.size or row.size
    key = "model" if kind == "autoencoder" else "classifier"
    state = published_state(path, key)
    config = dict(SIZES[size], mean=tuple(args.mean or row.mean), std=tuple(args.std or row.std))
    print(f"{path}: taken for a model of images with mean {config['mean']} and std {config['std']}, which "
          "the file does not show (--mean, --std)")
    if "pos_embed" in state:
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
        config["image_size"] = side * config["patch_size"]
    if kind == "autoencoder":
        norm_pix = args.norm_pix
        if norm_pix is None:
            norm_pix = config["patch_size"] >= NORM_PIX_FROM
        config["norm_pix"] = norm_pix
        print(f"{path}: taken for an autoencoder of {args.task.upper()} "
              f"{'with' if norm_pix else 'without'} norm_pix, which the file does not show (--task, "
              "--norm-pix, --no-norm-pix)")
        model = Autoencoder(**config)
    else:
        config = {name: config[name] for name in ENCODER}
        config["num_classes"] = len(state["head.weight"]) if "head.weight" in state else 1
        model = Classifier(**config)
    missing = initialize_from_file(model, path, key)
    if missing:
        raise UserError(f"{path} is no whole {kind}: it lacks {', '.join(sorted(missing)[:3])} ...")
    facts = dict(name=dataset, test_sigmas=row.test_sigmas, eps=row.eps, attack_eps=row.attack_eps,
                 finetune_sigma=row.finetune_sigma)
    return model, dict(kind=kind, config=config, task=args.task, defense="", options={}, classes=None,
                       autoencoder=None, data=facts, settings=dict(size=size, data=dataset, seed=0),
                       model=model.state_dict(), made_by=[run.provenance(())])


def load_model(source, kind, device, args):
    """(model, checkpoint) from a run's folder or a file of published weights (see load_published).

    The folder of a De³ gives its autoencoder, too.
    """
    if is_published(source):
        model, checkpoint = load_published(source, kind, args)
    elif kind == "autoencoder" and run.read(source, making=kind).get("autoencoder"):
        model, checkpoint = held_autoencoder(source)
    else:
        model, checkpoint = run.load(source, kind)
    return model.to(device).eval().requires_grad_(False), checkpoint


def held_autoencoder(source):
    """(model, checkpoint) of the autoencoder that a De³'s folder holds."""
    checkpoint = run.read(source)["autoencoder"]
    run.say_made_by_other_code(f"the autoencoder in {source}", checkpoint)
    return run.build(checkpoint, f"the autoencoder in {source}"), checkpoint


# -------------------------------------------------------------------------------- the defenses

class Tested(NamedTuple):
    """What a later stage tests: its name in tables, its run, the level in words, and the model.

    defense: None where the classifier is tested alone, "undefended". model: the defense, or else the
    classifier; from [0, 1] images to logits.
    """
    words: str
    run: str
    level: str
    classifier: nn.Module
    defense: nn.Module
    checkpoint: dict

    @property
    def model(self):
        return self.classifier if self.defense is None else self.defense


def file_flags(parser):
    """The flags for weights that come from a file, which shows neither size nor task."""
    add = parser.add_argument
    add("--task", choices=["nim", "mim"], default="nim", help="of an autoencoder in a file, default nim")
    add("--norm-pix", action="store_true", default=None, help="of an autoencoder in a file; default: at "
        "patches of 14 pixels and more")
    add("--no-norm-pix", action="store_false", dest="norm_pix", help="the contrary")
    for name, low in (("mean", 0), ("std", 1e-3)):
        add(f"--{name}", type=cli.number(float, low, 1), nargs=3, metavar=("R", "G", "B"),
            help=f"{name} by which a model from a file normalizes, as 0.5 0.5 0.5; default: the data set's")


def evaluation_flags(parser, images, runs="runs"):
    """The flags of the later stages; `images` is how many they take by default."""
    add = parser.add_argument
    default = [Path("runs/digits/clean"), Path("runs/digits/de3")]
    add(runs, nargs="*" if runs == "runs" else "+", default=default, type=cli.run_path, metavar="RUN",
        help="folders of finetune.py's runs, or files of published weights; default: runs/digits/clean "
        "and runs/digits/de3")
    add("--autoencoder", type=cli.run_path, metavar="RUN",
        help="folder or file: put this one in front of every classifier")
    add("--defense", nargs="+", metavar="NAME[:LEVEL]", help="put these in front of every classifier "
        f"instead of its own, as de3:50; names: {', '.join(DEFENSES)}")
    add("--sigma", nargs="+", metavar="S", type=cli.sigma_level, help="sigmas to test De³ at, in 8-bit "
        "units (0..255), 'off' for its classifier alone; default: the data set's. An undefended "
        "classifier is always tested as it is")
    add("--mask-ratio", nargs="+", type=cli.ratio, metavar="R",
        help="behind MIM: ratios to test, default 0.25 0.5 0.75")
    add("--data", type=data.dataset_name, help="other test images than the run's: "
        + data.DATA_HELP)
    add("--split", choices=data.SPLITS, default="test",
        help="default test; the val images of a FOLDER without test/")
    add("--images", type=cli.count, default=images, help=f"how many, evenly spread; default {images}")
    add("--seed", type=cli.number(int), default=0, help="of the noise and the attack, default 0")
    add("--out", type=Path, help="folder for tables and pictures; default: the one the first run lies in")
    add("--size", choices=SIZES, help="of a model from a file; default: the data set's")
    file_flags(parser)


def parse_defense(text, test_sigmas):
    """'de3:50' or 'de3' -> [(name, level)], without a level at all that are usual; 'off' -> [("", None)]."""
    name, _, level = str(text).partition(":")
    if name == "off":
        return [("", None)]
    if name not in DEFENSES:
        raise UserError(f"there is no defense {name!r}, only {', '.join(DEFENSES)} and off")
    return [(name, level) for level in ([level] if level else DEFENSES[name].levels or test_sigmas)]


def levels_to_test(args, checkpoint, pretraining):
    """What the flags say of one run: [(name of a defense, level)], ("", None) for the classifier alone."""
    test_sigmas = checkpoint["data"]["test_sigmas"]
    if args.defense:
        chosen = [pair for text in args.defense for pair in parse_defense(text, test_sigmas)]
        for name, level in chosen:
            if name and issubclass(DEFENSES[name], De3):
                cli.say_small_sigma(NoiseScale.parse(level))
        return chosen
    name = checkpoint["defense"]
    if args.autoencoder and not name:
        name = "mim" if pretraining["task"] == "mim" else "de3"
    if not name:
        return [("", None)]
    levels = (args.mask_ratio or DEFENSES[name].levels) if name == "mim" else (
        args.sigma or DEFENSES[name].levels or test_sigmas)
    return [("" if level is None else name, level) for level in levels]


def describe(checkpoint, defense):
    """A defense in words: "undefended", "De³ σ = 50", "adversarial training 16/255" ..."""
    settings = checkpoint["settings"]
    words = [f"{defense.title} {defense.level}"] if defense is not None else []
    if settings.get("adversarial") is not None:
        words.append(f"adversarial training {255 * settings['adversarial']:.3g}/255")
    words = words or ["undefended"]
    if checkpoint["config"].get("arch", "vit") != "vit":
        words.append(checkpoint["config"]["arch"])
    elif settings.get("from_scratch"):
        words.append("from scratch")
    return ", ".join(words)


def put_in_front(source, classifier, checkpoint, autoencoder, chosen, votes=1):
    """A classifier behind each of the chosen defenses, [(name, level)]: a list of Tested."""
    tested = []
    for name, level in chosen:
        defense = None
        if name:
            if DEFENSES[name].needs_autoencoder and autoencoder is None:
                raise UserError(f"{source} holds no autoencoder for {DEFENSES[name].title}: give one with "
                                "--autoencoder RUN")
            options = checkpoint["options"] if name == checkpoint["defense"] else {}
            try:
                defense = DEFENSES[name](autoencoder, classifier, level, votes=votes, **options).eval()
            except ValueError as error:  # a level that is none
                raise UserError(f"{name} cannot be made at level {level!r}: {error}") from None
        tested.append(Tested(describe(checkpoint, defense), Path(source).as_posix(),
                             defense.level if name else "off", classifier, defense, checkpoint))
    return tested


def load_run(source, args, device):
    """One run: (classifier, its checkpoint, the autoencoder in front of it or None, its checkpoint)."""
    classifier, checkpoint = load_model(source, "classifier", device, args)
    if args.autoencoder:
        return classifier, checkpoint, *load_model(args.autoencoder, "autoencoder", device, args)
    pretraining = checkpoint["autoencoder"]
    if pretraining is None:
        return classifier, checkpoint, None, None
    autoencoder = run.build(pretraining, f"the autoencoder in {source}")
    return classifier, checkpoint, autoencoder.to(device).eval().requires_grad_(False), pretraining


def load_defenses(args, device, votes=1):
    """What the flags of the later stages ask for: a list of Tested on the device.

    Fills in --data, --out and --max-batch, which follow from the first run.
    """
    if args.defense:
        cli.refuse_unused(args, ["sigma", "mask_ratio"], "beside --defense, which takes levels, as de3:50")
    sources = [*args.runs, args.autoencoder] if args.autoencoder else args.runs
    if not any(is_published(source) for source in sources):
        cli.refuse_unused(args, ["size", "task", "norm_pix", "mean", "std"], "without a file of weights")
    tested = []
    for source in args.runs:
        classifier, checkpoint, autoencoder, pretraining = load_run(source, args, device)
        chosen = levels_to_test(args, checkpoint, pretraining)
        tested += put_in_front(source, classifier, checkpoint, autoencoder, chosen, votes)
    words = [one.words for one in tested]
    tested = [one._replace(words=f"{one.words} ({one.run})") if words.count(one.words) > 1 else one
              for one in tested]
    if args.mask_ratio and not any(one.level.startswith("mask") for one in tested):
        raise UserError("--mask-ratio changes nothing without an autoencoder of MIM: leave it out")
    first = tested[0].checkpoint
    args.data = args.data or first["data"]["name"]
    args.out = args.out or Path(args.runs[0]).parent
    args.max_batch = args.max_batch or cli.MAX_BATCH.get(first["settings"]["size"], 256)
    return tested


def say_other_data(source, checkpoint, dataset):
    """A note where a run is tested on another data set than it was trained on."""
    trained_on = checkpoint["data"]["name"]
    if trained_on != dataset:
        print(f"note: {source} was trained on {trained_on} and is tested on {dataset}")


def load_test_images(args, tested, device):
    """What --data, --split and --images ask for: (batches of this process's share, how many in all).

    batches: a data.Loader; its `classes` are in the order of the classifiers' outputs. Says what a run
    was trained on, where it is tested on something else, and the order of classes that nobody recorded.
    """
    first = tested[0].checkpoint
    args.split = data.split_there_is(args.data, args.split)
    images = data.load_dataset(args.data, args.split, first["config"]["image_size"])
    order = None  # of the classes, once a run has said it
    for source, checkpoint in {one.run: one.checkpoint for one in tested}.items():
        config = checkpoint["config"]
        if config["image_size"] != first["config"]["image_size"]:
            raise UserError("the runs take images of different sizes: test them in two calls")
        say_other_data(source, checkpoint, args.data)
        if checkpoint["classes"] is not None:
            if order not in (None, checkpoint["classes"]):
                raise UserError("the runs number the classes differently: test them in two calls")
            order = checkpoint["classes"]
            images = data.in_order_of(order, images, args.data)
    for source, checkpoint in {one.run: one.checkpoint for one in tested}.items():
        if checkpoint["classes"] is None:
            known, named = checkpoint["config"]["num_classes"], images.classes
            if known != len(named):
                raise UserError(f"{source} knows {known} classes, {args.data} has {len(named)}")
            listed = ", ".join(f"{number} {name}" for number, name in enumerate(named[:20]))
            print(f"note: {source} does not name its classes; they are taken in this order: {listed}"
                  + (" ..." if len(named) > 20 else ""))
    own = data.evenly_spread(images, args.images, cli.rank(), cli.world_size())
    batches = data.Loader(own, min(BATCH, args.max_batch), args.workers, device)
    some, _ = next(iter(data.Loader(images, 50, device=device)))
    with torch.no_grad():
        cli.choose_threads(lambda: tested[-1].model(some), device)
    batches.classes = images.classes
    return batches, min(args.images, len(images))
