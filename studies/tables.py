"""The defenses that the comparison puts side by side, for each data set, and their run folders."""

import shlex
from typing import NamedTuple

from model import NoiseScale, UserError
from support import cli, data, runs


class Entry(NamedTuple):
    """A defense of the comparison: its name, its runs by their flags, and where it is tested."""
    name: str
    pretrain: dict
    finetune: dict
    sigmas: tuple = (None,)
    mask_ratios: tuple = (None,)


class Table(NamedTuple):
    """The defenses of a data set, and what they are tested on unless the command line says otherwise.

    images: how many. l2: the smaller radius of the attack in L2, 0 for none.
    """
    entries: list
    images: int
    l2: float


DIGITS = {"sigma": "gamma:10,12"}
COLOR = {"sigma": "gamma:10,8"}
MIM = {"task": "mim"}
TABLES = {
    "digits": Table([
        Entry("undefended", DIGITS, {"mode": "clean"}),
        Entry("adversarial training 16/255", DIGITS, {"mode": "clean", "adversarial": "16/255"}),
        Entry("noise only", DIGITS, {"mode": "no-denoise", "sigma": "uniform:100,400"}, (100, 200)),
        Entry("De³", DIGITS, {"mode": "de3", "sigma": "uniform:100,400"}, (0, 100, 200)),
        Entry("De³, pretrained on σ = 120", {"sigma": "120"},
              {"mode": "de3", "sigma": "uniform:100,400"}, (0, 100, 200)),
        Entry("De³, the paper's Γ(25, 3), U(0, 30)", {"sigma": "gamma:25,3"},
              {"mode": "de3", "sigma": "uniform:0,30"}, (0, 100, 200)),
        Entry("MIM, whole output", MIM, {"mode": "de3"}, mask_ratios=(0.5, 0.75)),
        Entry("MIM, visible kept", MIM, {"mode": "de3", "keep-visible": True}, mask_ratios=(0.5, 0.75)),
    ], images=100, l2=1.0),
    "cifar10": Table([
        Entry("undefended", COLOR, {"mode": "clean"}),
        Entry("De³, fine-tuned on U(0, 60)", COLOR, {"mode": "de3", "sigma": "uniform:0,60"},
              (0, 50, 100)),
        Entry("adversarial training 4/255", COLOR, {"mode": "clean", "adversarial": "4/255"}),
        Entry("MIM, whole output", MIM, {"mode": "de3"}, mask_ratios=(0.5, 0.75)),
        Entry("De³, fine-tuned on U(50, 150)", COLOR, {"mode": "de3", "sigma": "uniform:50,150"},
              (0, 50, 100)),
        Entry("noise only", COLOR, {"mode": "no-denoise", "sigma": "uniform:50,150"},
              (0, 50, 100)),
    ], images=300, l2=0.0),
}


def table_of(name):
    """The table for --data `name`; a folder of small images has that of cifar10."""
    if name in TABLES:
        return TABLES[name]
    if data.defaults(name) == data.defaults("cifar10"):
        return TABLES["cifar10"]
    raise UserError(f"there is no table of {name}: add one to TABLES in studies/tables.py")


def flag_words(flags):
    """A dict of flags as words of a command line; True stands for a flag without a value."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def folders(entry, args, seed):
    """The run folders of an entry's autoencoder and classifier for one seed."""
    args = type(args)(**{**vars(args), "seed": seed})
    task, made_with = entry.pretrain.get("task", "nim"), entry.finetune
    level = 0.75 if task == "mim" else NoiseScale.parse(entry.pretrain["sigma"])
    autoencoder = runs.autoencoder_folder(args, task, level)
    classifier = runs.classifier_folder(
        autoencoder, seed, made_with["mode"],
        NoiseScale.parse(made_with["sigma"]) if "sigma" in made_with else None,
        keep_visible="keep-visible" in made_with,
        adversarial=cli.eps(made_with["adversarial"]) if "adversarial" in made_with else None,
        arch=made_with.get("arch", "vit"))
    return autoencoder, classifier


def missing_commands(entries, args, seeds):
    """The commands that make the models which are not there, each once, in the order to run them."""
    commands = []
    for entry in entries:
        for seed in seeds:
            autoencoder, classifier = folders(entry, args, seed)
            common = {name: value for name, value, default in [
                ("data", args.data, "digits"), ("size", args.size, data.defaults(args.data)["size"]),
                ("runs", args.runs, "runs"), ("seed", seed, 0)]
                if value != default}
            if not (autoencoder / "checkpoint.pt").exists():
                commands.append(["python", "pretrain.py", *flag_words({**entry.pretrain, **common})])
            if not (classifier / "checkpoint.pt").exists():
                flags = {"autoencoder": autoencoder, **entry.finetune, **common}
                commands.append(["python", "finetune.py", *flag_words(flags)])
    return list(dict.fromkeys(shlex.join(map(str, words)) for words in commands))
