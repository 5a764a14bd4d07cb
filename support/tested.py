"""What the later stages test: the defenses that their flags ask for, and the test images."""

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from model import DEFENSES, UserError
from support import cli, data, run

DEFAULT_RUNS = ("runs/digits/clean", "runs/digits/de3")


class Entry(NamedTuple):
    """A model under test, from [0, 1] images to logits.

    name: in tables, the run's folder and the level. folder: the run's. level, value: its level in words and
    as a number (None for "off"). model: the defense, or the classifier where that is tested alone;
    classifier: the one in it; defense: None where there is none. checkpoint: the classifier's; pretraining:
    that of the autoencoder in front of it, or None.
    """
    name: str
    folder: str
    level: str
    value: float
    model: nn.Module
    classifier: nn.Module
    defense: nn.Module
    checkpoint: dict
    pretraining: dict = None


def evaluation_flags(parser, images, runs=DEFAULT_RUNS):
    """The flags of the later stages; `images` is how many they take by default, `runs` which runs."""
    add = parser.add_argument
    add("runs", nargs="*", type=cli.folder, default=list(map(Path, runs)), metavar="RUN",
        help=f"folders of finetune.py's runs; default: {' '.join(runs)}")
    add("--autoencoder", type=cli.folder, metavar="RUN", help="put this run's autoencoder in front of every "
        "classifier")
    add("--defense", nargs="+", metavar="NAME[:LEVEL]", help="put these in front of every classifier instead "
        f"of its own, as de3:50; names: {', '.join(DEFENSES)}, and off")
    add("--sigma", nargs="+", metavar="S", help="sigmas to test De³ at, in 8-bit units (0..255), 'off' for "
        "its classifier alone; default: the data set's. An undefended classifier is tested as it is")
    add("--data", type=data.dataset_name, help="other test images than the run's: " + data.DATA_HELP)
    add("--split", choices=data.SPLITS, help="default test; val for a FOLDER without test/")
    add("--images", type=cli.count, default=images, help="how many: the first of a fixed choice, spread over "
        f"the classes; default {images}")
    add("--seed", type=int, default=0, help="of the noise and the attack, default 0")
    add("--out", type=cli.folder, help="folder for tables and pictures; default: the one the first run lies "
        "in")


def choose_defenses(args, checkpoint, pretraining):
    """What the flags say of one run: [(name of a defense, level)], ("off", None) for the classifier alone."""
    own, test_sigmas = checkpoint["defense"], checkpoint["data"]["test_sigmas"]
    if args.autoencoder and not own:
        own = "mim" if pretraining["task"] == "mim" else "de3"
    if args.defense:
        return [pair for text in args.defense for pair in parse_defense(text, test_sigmas)]
    if not own:
        return [("off", None)]
    if args.sigma and DEFENSES[own].levels:
        raise UserError(f"--sigma is not a level of {own}: give --defense {own}:LEVEL")
    levels = args.sigma or DEFENSES[own].levels or test_sigmas
    return [("off", None) if level == "off" else (own, level) for level in levels]


def parse_defense(text, test_sigmas):
    """'de3:50' -> [("de3", "50")]; 'de3' -> a pair for each usual level; 'off' -> [("off", None)]."""
    name, _, level = text.partition(":")
    if name == "off":
        return [("off", None)]
    if name not in DEFENSES:
        raise UserError(f"there is no defense {name!r}, only {', '.join(DEFENSES)} and off")
    return [(name, level) for level in ([level] if level else DEFENSES[name].levels or test_sigmas)]


def check_task(name, autoencoder, pretraining, folder):
    """UserError unless the defense of this name gets an autoencoder that was pretrained for its task."""
    needed, title = DEFENSES[name].task, DEFENSES[name].title
    if needed and autoencoder is None:
        raise UserError(f"{folder} holds no autoencoder for {title}: give one with --autoencoder RUN")
    if needed and pretraining["task"] != needed:
        raise UserError(f"{title} needs an autoencoder that was pretrained for {needed.upper()}, and the one "
                        f"in front of {folder} was pretrained for {pretraining['task'].upper()}: give another "
                        "with --autoencoder RUN")


def put_in_front(folder, classifier, checkpoint, autoencoder, pretraining, name, level, votes=None):
    """A classifier behind the defense of this name, or alone ("off"): an Entry.

    votes: how many draws it averages; None: as many as the defense was made with.
    """
    folder = Path(folder)
    called = folder.name or folder.resolve().name
    if name == "off":
        if checkpoint["defense"]:
            called += ", off"
        return Entry(called, folder.as_posix(), "off", None, classifier, classifier, None, checkpoint)
    check_task(name, autoencoder, pretraining, folder)
    defense = DEFENSES[name](autoencoder, classifier, level).eval()
    if votes is not None:
        defense.votes = votes
    if name != checkpoint["defense"]:
        called += f" behind {defense.title}"
    try:
        value = float(level)
    except ValueError:  # a distribution
        value = None
    return Entry(f"{called}, {defense.level}", folder.as_posix(), defense.level, value, defense, classifier,
                 defense, checkpoint, pretraining if DEFENSES[name].task else None)


def twin_of(model):
    """A copy of a module with the same weights, whose attributes, buffers and parts can be replaced."""
    twin = copy.copy(model)
    for name in ("_parameters", "_buffers", "_modules"):
        vars(twin)[name] = dict(vars(model)[name])
    return twin


def load_run(folder, autoencoder_of, device):
    """(classifier, its checkpoint, the autoencoder in front of it or None, that one's checkpoint)."""
    classifier, checkpoint = run.load(folder, "classifier", device)
    if not autoencoder_of and not checkpoint["autoencoder"]:
        return classifier, checkpoint, None, None
    autoencoder, pretraining = run.load(autoencoder_of or folder, "autoencoder", device)
    if autoencoder_of:
        run.say_made_by_other_code({autoencoder_of: pretraining})
    if pretraining["data"]["name"] != checkpoint["data"]["name"]:
        print(f"note: the autoencoder in front of {folder} was trained on {pretraining['data']['name']}, the "
              f"classifier on {checkpoint['data']['name']}")
    return classifier, checkpoint, autoencoder, pretraining


def load_entries(args, device, votes=None):
    """What the flags ask for: a list of Entry on the device. Fills in --data, --out and --max-batch."""
    run.note_imported_code()
    cli.seed_everything(args.seed, same=True)  # a defense may draw when it is made
    if args.defense:
        cli.refuse(args, ["sigma"], "beside --defense, which takes levels, as de3:50")
    loaded = {folder: load_run(folder, args.autoencoder, device) for folder in args.runs}
    lenders = [folder for folder, (_, _, autoencoder, _) in loaded.items() if autoencoder is not None]
    entries = []
    for folder, (classifier, checkpoint, autoencoder, pretraining) in loaded.items():
        chosen = choose_defenses(args, checkpoint, pretraining)
        needs_one = any(name != "off" and DEFENSES[name].task for name, _ in chosen)
        lender = args.autoencoder
        if lender and not needs_one:
            raise UserError(f"--autoencoder changes nothing for {folder}, which is tested behind nothing that uses "
                            "one: leave it out, or give --defense de3")
        if needs_one and autoencoder is None and lenders:
            lender = lenders[0]
            print(f"note: {folder} holds no autoencoder: that of {lender} is put in front of it")
            _, _, autoencoder, pretraining = loaded[lender]
        for name, level in chosen:
            entry = put_in_front(folder, classifier, checkpoint, autoencoder, pretraining, name, level, votes)
            if lender and entry.pretraining:
                entry = entry._replace(name=f"{entry.name}, autoencoder of {lender.name}")
            entries.append(entry)
    checkpoints = {folder: checkpoint for folder, (_, checkpoint, _, _) in loaded.items()}
    run.say_made_by_other_code(checkpoints)
    entries = with_names_of_their_own(entries)
    first = entries[0].checkpoint
    args.data = args.data or first["data"]["name"]
    first_run = args.runs[0] if args.runs[0].name else args.runs[0].resolve()  # "." has no parent
    args.out = args.out or first_run.parent
    args.max_batch = args.max_batch or cli.MAX_BATCH.get(first["settings"]["size"], 256)
    if first["settings"]["size"] == "tiny" and device.type == "cpu":
        cli.choose_threads()
    return entries


def with_names_of_their_own(entries):
    """The entries; where the runs of several have one name, their folders stand in the place of it.

    UserError where two that differ still have one name: a defense whose level says too little.
    """
    names = [entry.name for entry in entries]
    entries = [entry._replace(name=entry.name.replace(Path(entry.folder).name, entry.folder, 1))
               if names.count(entry.name) > 1 else entry for entry in entries]
    named = {}
    for entry in entries:
        other = named.setdefault(entry.name, entry)
        if other is not entry and run.fingerprint(other.model) != run.fingerprint(entry.model):
            raise UserError(f"two different defenses are called {entry.name!r}: let the level of "
                            f"{type(entry.model).__name__} say all that is set in it")
    return entries


def load_test_images(args, entries, device):
    """What --data, --split and --images ask for: images and labels on the device, the names of the classes.

    Images are bytes, or floats in [0, 1]; attack.in_batches makes floats of them. Says what a run was trained
    on, where it is tested on something else, and how many of the images it was trained on (args.trained_on, a
    number for each entry's name). UserError for runs that cannot be tested on the same images.
    """
    if args.split is None:
        has_test = args.data in data.DATASETS or (Path(args.data) / "test").is_dir()
        args.split = "test" if has_test else "val"
    check_same_images(entries)
    first = entries[0].checkpoint
    for folder, checkpoint in {entry.folder: entry.checkpoint for entry in entries}.items():
        if checkpoint["data"]["name"] != args.data:
            print(f"note: {folder} was trained on {checkpoint['data']['name']} and is tested on {args.data}")
    images, labels, classes = data.load_images(args.data, args.split, first["config"]["image_size"],
                                               first["classes"], args.images)
    if args.split == "train":
        print("note: these are training images")
    args.trained_on = count_trained_on(entries, images)
    return images.to(device), labels.to(device), classes


def check_same_images(entries):
    """UserError for models that cannot be tested on the same images."""
    first = entries[0]
    for entry in entries:
        if entry.checkpoint["config"]["image_size"] != first.checkpoint["config"]["image_size"]:
            raise UserError("the runs take images of different sizes: test them in two calls")
        if entry.checkpoint["classes"] != first.checkpoint["classes"]:
            raise UserError(f"{entry.folder} and {first.folder} have other classes: test them in two calls")


def count_trained_on(entries, images):
    """How many of these images [N, C, S, S] each model was trained on, {name of the entry: number}; says it.

    What its autoencoder was trained on counts, too.
    """
    digests, counts, told = data.digest_of_each(images), {}, set()
    for entry in entries:
        parts = [part for part in (entry.checkpoint, entry.pretraining) if part]
        known = [part["data"]["digests"] for part in parts if "digests" in part["data"]]
        seen = int(torch.isin(digests, torch.cat(known)).sum()) if known else 0
        if seen and (entry.folder, seen) not in told:
            print(f"note: {seen} of these {len(images)} images are training images of {entry.folder}")
            told.add((entry.folder, seen))
        counts[entry.name] = seen
    return counts


def own_share(images, labels):
    """Of several processes each one's images and labels: every image once; UserError for too few."""
    if len(images) < cli.world_size():
        raise UserError(f"{len(images)} images are too few for {cli.world_size()} processes, which need one "
                        "each")
    return images[cli.rank()::cli.world_size()], labels[cli.rank()::cli.world_size()]
