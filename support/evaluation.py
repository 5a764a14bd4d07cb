"""What the later stages and the studies share: which defenses, on which images, under which names."""

import os
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from model import De3, UserError
from support import checkpoints, cli, data, files, runs, weights

BATCH = 120  # images that are evaluated together; at most --max-batch
FIELDS = ("defense run autoencoder sigma mask_ratio attack norm eps steps step_size restarts eot loss "
          "threat reading draws images split seed precision clean_accuracy robust_accuracy seconds"
          ).split()  # the columns of attack.csv


class NamedDefense(NamedTuple):
    """A De3, what the tables call it, and the run folders of its classifier and autoencoder."""
    words: str
    run: str
    autoencoder: str
    de3: De3


def evaluation_flags(parser, images):
    """The flags of both evaluating stages; `images` is how many they take by default."""
    add = parser.add_argument
    add("--classifier", nargs="+", type=cli.run_path, metavar="RUN",
        help="folders of finetune.py's runs, or files of published weights; default: the undefended "
        "and the De³ classifier made by default")
    add("--autoencoder", type=cli.run_path, metavar="RUN",
        help="folder or file; default: the one the classifier was trained behind")
    add("--sigma", nargs="+", metavar="S", type=cli.sigma_level,
        help="sigmas to test, 'off' for undefended; default off and, for De³, the data set's; a "
        "classifier given by --classifier is tested at all of them, also one trained undefended")
    add("--mask-ratio", nargs="+", type=cli.ratio, metavar="R",
        help="behind MIM: ratios to test, default 0.25 0.5 0.75")
    add("--split", choices=["train", "val", "test"], default="test",
        help="default test; the val images of a FOLDER without test/")
    add("--images", type=cli.count, default=images, help=f"how many, evenly spread; default {images}")


# -------------------------------------------------------------------------------- the defenses

def sigmas_to_test(args, mode):
    """The sigmas (None: off) at which a classifier of this mode is tested."""
    sigmas = args.sigma
    if not sigmas:
        sigmas = [None] if mode == "clean" else list(data.defaults(args.data)["test_sigmas"])
    if args.classifier:
        return sigmas
    # the default pair of classifiers, each as it was trained
    return [sigma for sigma in sigmas if (sigma is None) == (mode == "clean")]


def load_autoencoder(args, folder, checkpoint, device):
    """The autoencoder in front of a classifier: (model, its checkpoint, its folder).

    --autoencoder names it; without the flag it is the one in whose folder the classifier lies, or
    pretrain.py's default run, where there is none. Raises UserError for a classifier that was trained
    behind other weights.
    """
    pretraining_folder = folder.parent
    if checkpoint["mode"] != "de3" and not (pretraining_folder / "checkpoint.pt").exists():
        pretraining_folder = runs.autoencoder_folder(args)
    source = args.autoencoder or pretraining_folder
    autoencoder, pretraining = weights.load_model(source, "autoencoder", device, args)
    if checkpoint["mode"] == "de3" and not args.autoencoder:
        if checkpoints.fingerprint(autoencoder) != checkpoint["settings"].get("autoencoder"):
            raise UserError(f"{folder} was trained behind another autoencoder than {source} now holds: "
                            "train it again with finetune.py --overwrite")
    return autoencoder, pretraining, source


def describe(checkpoint, de3):
    """A defense in words: "undefended", "De³ σ = 50", "adversarial training 16/255" ..."""
    settings = checkpoint["settings"]
    words = []
    if de3.mask_ratio is not None:
        words.append(f"MIM {de3.level}" + (", visible kept" if de3.keep_visible else ""))
    elif de3.defended:
        words.append(f"De³ {de3.level}" if de3.autoencoder is not None else f"noise only {de3.level}")
    if settings.get("adversarial", "None") != "None":
        words.append(f"adversarial training {255 * float(settings['adversarial']):.3g}/255")
    if not words:
        words.append("undefended")
    if settings.get("arch", "vit") != "vit":
        words.append(settings["arch"])
    elif settings.get("from_scratch") == "True":
        words.append("from scratch")
    return ", ".join(words)


def name_of_run(folder, root):
    """A run's folder as tables name it: inside RUNS/<data> (`root`) or, outside, from here."""
    inside = Path(folder).resolve().is_relative_to(Path(root).resolve())
    return os.path.relpath(folder, root if inside else None)


def results_folder(root, run):
    """The folder in RUNS/<data> (`root`) for results about a run: its own, or one named like it."""
    return Path(root, *[part for part in Path(run).parts if part not in ("..", "/")])


def with_folders(named):
    """Add the run's folder to the words that stand for more than one defense."""
    words = [defense.words for defense in named]
    return [defense._replace(words=f"{defense.words} ({defense.run})")
            if words.count(defense.words) > 1 else defense for defense in named]


def load_defenses(args, device, votes=1):
    """What --classifier, --autoencoder, --sigma and --mask-ratio ask for.

    Returns a list of NamedDefense on the device, and the last classifier's checkpoint.
    """
    root, named = runs.data_folder(args.runs, args.data), []
    assets = None if args.classifier else runs.shipped(args)
    if assets is not None:
        args = assets
        print(f"no model of your own in {root}: using the weights that come along, "
              f"{runs.data_folder(args.runs, args.data)}")
    for folder in args.classifier or runs.default_classifier_folders(args):
        mode_of_file = "de3" if args.autoencoder else "clean"
        classifier, checkpoint = weights.load_model(folder, "classifier", device, args, mode_of_file)
        sigmas, mask_ratios = sigmas_to_test(args, checkpoint["mode"]), [None]
        autoencoder, source = None, ""
        defended_later = checkpoint["mode"] == "clean" and any(sigma is not None for sigma in sigmas)
        if checkpoint["mode"] == "de3" or defended_later:
            autoencoder, pretraining, source = load_autoencoder(args, folder, checkpoint, device)
            if pretraining["task"] == "mim":
                sigmas, mask_ratios = [None], args.mask_ratio or [0.25, 0.5, 0.75]
        for sigma in sigmas:
            for mask_ratio in mask_ratios:
                de3 = De3(autoencoder, classifier, sigma, mask_ratio, checkpoint["keep_visible"],
                          votes).to(device).eval()
                named.append(NamedDefense(describe(checkpoint, de3), name_of_run(folder, root),
                                          name_of_run(source, root) if source else "", de3))
        if args.compile:
            cli.compile_models(device, autoencoder, classifier)
    if args.mask_ratio and all(defense.de3.mask_ratio is None for defense in named):
        raise UserError("--mask-ratio changes nothing without an autoencoder of MIM: leave it out")
    return with_folders(named), checkpoint


# ---------------------------------------------------------------------------------- the images

def load_test_images(args, checkpoint):
    """What --data, --split and --images ask for: (this process's images, number of all, classes)."""
    config = checkpoint["config"]
    images = data.load_dataset(args.data, args.split, config["image_size"])
    expected_classes = checkpoint["classes"] or images.classes
    if len(images.classes) != config["num_classes"] or images.classes != expected_classes:
        raise UserError(f"the classes of {args.data} are not those the classifier was trained on")
    own_images = data.evenly_spread(images, args.images, cli.rank(), cli.process_count())
    return own_images, min(args.images, len(images)), images.classes


def test_batches(args, own_images, device):
    """The batches in which the images are evaluated."""
    return data.Loader(own_images, min(BATCH, args.max_batch), args.workers, device)


def interval(percent, images):
    """95% Wilson interval of an accuracy in percent, as text."""
    z, p = NormalDist().inv_cdf(0.975), percent / 100
    center = p + z**2 / (2 * images)
    width = z * (p * (1 - p) / images + z**2 / 4 / images**2) ** 0.5
    low, high = (100 * (center + sign * width) / (1 + z**2 / images) for sign in (-1, 1))
    return f"{percent:5.1f} [{low:4.1f}, {high:5.1f}]"


def row_of(defense, args, settings, **measured):
    """A row of attack.csv: a NamedDefense, attack.py's flags, pgd's arguments, what was measured."""
    de3 = defense.de3
    return dict(
        defense=defense.words, run=defense.run, autoencoder=defense.autoencoder,
        sigma="" if de3.sigma is None else de3.sigma.fixed,
        mask_ratio="" if de3.mask_ratio is None else de3.mask_ratio, norm=args.norm,
        steps=settings["steps"], step_size=f"{settings['step_size']:.6g}",
        restarts=settings["restarts"], eot=settings["eot"], loss="+".join(args.loss),
        threat=args.threat, reading="one shot", split=args.split, seed=args.seed,
        precision="bf16" if args.bf16 else "fp32", **measured)


def open_table(args):
    """The path of attack.csv; UserError, before hours of work, where it or --save cannot be written."""
    if args.save:
        target = Path(args.save).resolve()
        if target.is_dir() or not os.access(target.parent, os.W_OK):
            raise UserError(f"--save {args.save} cannot be written: name a file in an existing folder")
    path = runs.data_folder(args.runs, args.data) / "attack.csv"
    files.check_writable(path.parent)
    files.read_table(path, FIELDS)
    return path


def append_row(path, row):
    """One more line in the table, which keeps the rows of earlier runs."""
    if cli.rank() == 0:
        files.append_row(path, FIELDS, row)


def save_arrays(path, **tensors):
    """Tensors as a .npz file, one array each."""
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    files.write_whole(Path(path), lambda file: np.savez_compressed(file, **arrays))
    print(f"wrote {path}")
