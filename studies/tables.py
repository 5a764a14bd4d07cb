"""The defenses that the comparison puts side by side: for each its run's folder, and what makes it."""

import shlex
from pathlib import Path
from typing import NamedTuple

from model import UserError


class Entry(NamedTuple):
    """A defense of the comparison; a new one is a line here.

    run: the folder of its classifier, and flags: what finetune.py makes it with (@ is the folder of its
    seed); autoencoder: the folder of the run that holds what denoises, or starts it. defenses: what it is
    tested behind, as in attack.py's --defense. in_front: a pretraining run whose autoencoder is put in front
    of the classifier in testing, in place of its own, if it has one.
    """
    name: str
    run: str
    flags: str
    autoencoder: str = "nim"
    defenses: tuple = ("off",)
    in_front: str = ""

    @property
    def init(self):
        """The run of the table that --init names, or ""."""
        return self.flags.partition("--init @/")[2].partition(" ")[0]


class Table(NamedTuple):
    """The defenses of a data set, and what they are tested on unless the command line says otherwise.

    pretraining: the script and flags that make each autoencoder. images: how many. l2: the smaller radius of
    the attack in L2, 0 for none. every: of a random defense, what takes many draws is read on one image
    in so many.
    """
    pretraining: dict
    entries: list
    images: int
    l2: float
    every: int = 1

    def entry_of(self, run):
        """The first entry with this run."""
        return next(entry for entry in self.entries if entry.run == run)

    def command(self, run):
        """The script and flags that make a run."""
        return self.pretraining.get(run) or f"finetune.py {self.entry_of(run).flags}"


# flags that say where and how something is trained, not what
NOT_RECIPE = ("--out", "--autoencoder", "--data", "--seed", "--bf16", "--no-bf16", "--workers", "--device",
              "--max-batch", "--resume", "--overwrite")
PRETRAINING = {"nim": "pretrain.py", "mim": "pretrain.py --task mim", "nim120": "pretrain.py --sigma 120",
               "nim_paper": "pretrain.py --sigma gamma:25,3", "wiener": "-m studies.wiener",
               "wiener100": "-m studies.wiener --sigma 100", "blur": "-m studies.wiener --blur"}
DE3 = ("de3:0", "de3:100", "de3:200")
MASKED, PASTED = ("mim:0.5", "mim:0.75"), ("mim-visible:0.5", "mim-visible:0.75")
COLOR = ("de3:0", "de3:50", "de3:100")
NOISE = ("no-denoise:0", "no-denoise:50", "no-denoise:100")
TABLES = {
    "digits": Table(PRETRAINING, [
        Entry("undefended", "clean", "--mode clean"),
        Entry("adversarial training 16/255", "adversarial", "--adversarial 16/255"),
        Entry("noise only", "no-denoise", "--mode no-denoise",
              defenses=("no-denoise:100", "no-denoise:200")),
        Entry("De³", "de3", "", defenses=DE3),
        Entry("De³, trained as long as adversarial training", "de3_long", "--epochs 132",
              defenses=("de3:0",)),
        Entry("De³, pretrained on σ = 120", "de3_120", "", "nim120", DE3),
        Entry("De³, the paper's Γ(25, 3), U(0, 30)", "de3_paper", "--sigma uniform:0,30", "nim_paper", DE3),
        Entry("De³ with a linear filter", "de3_wiener", "--init @/nim", "wiener", DE3),
        Entry("De³ with a linear filter, from scratch", "de3_wiener_scratch", "--from-scratch", "wiener",
              ("de3:0",)),
        Entry("De³ with a blur", "de3_blur", "--init @/nim", "blur", ("de3:0",)),
        Entry("De³, adversarially trained at σ = 0", "de3_adversarial_0",
              "--mode de3 --adversarial 16/255 --sigma 0 --init @/de3 --epochs 12", defenses=("de3:0",)),
        Entry("De³, adversarially trained on its noise", "de3_adversarial",
              "--mode de3 --adversarial 16/255 --init @/de3 --epochs 12", defenses=DE3),
        Entry("MIM, whole output", "de3_mim", "", "mim", MASKED),
        Entry("MIM, visible kept", "de3_mim_visible", "--mode mim-visible", "mim", PASTED),
    ], images=100, l2=1.0),
    "color": Table(PRETRAINING, [
        Entry("undefended", "clean", "--mode clean"),
        Entry("De³, fine-tuned on U(0, 60)", "de3", "", defenses=COLOR),
        Entry("adversarial training 4/255", "adversarial", "--adversarial 4/255"),
        Entry("MIM, whole output", "de3_mim", "", "mim", MASKED),
        Entry("De³, fine-tuned on U(50, 150)", "de3_50-150", "--sigma uniform:50,150", defenses=COLOR),
        Entry("De³ with a linear filter", "de3_wiener", "--init @/nim", "wiener", COLOR),
        Entry("De³ with a linear filter, in testing that of σ = 100", "de3_wiener", "--init @/nim", "wiener",
              ("de3:100",), in_front="wiener100"),
        Entry("De³ with a linear filter, U(50, 150)", "de3_wiener_50-150",
              "--sigma uniform:50,150 --init @/nim", "wiener100", COLOR),
        Entry("De³ with a linear filter, from scratch", "de3_wiener_scratch", "--from-scratch", "wiener",
              ("de3:0",)),
        Entry("De³ with a blur", "de3_blur", "--init @/nim", "blur", ("de3:0",)),
        Entry("De³, adversarially trained at σ = 0", "de3_adversarial_0",
              "--mode de3 --adversarial 4/255 --sigma 0 --init @/de3 --epochs 4", defenses=("de3:0",)),
        Entry("De³, adversarially trained on its noise", "de3_adversarial",
              "--mode de3 --adversarial 4/255 --init @/de3 --epochs 2", defenses=COLOR),
        Entry("noise only, U(0, 60)", "no-denoise", "--mode no-denoise", defenses=NOISE),
        Entry("noise only, U(50, 150)", "no-denoise_50-150", "--mode no-denoise --sigma uniform:50,150",
              defenses=NOISE),
        Entry("De³ off the shelf", "clean", "--mode clean", defenses=("de3:0", "de3:25", "de3:50"),
              in_front="nim"),
        Entry("noise off the shelf", "clean", "--mode clean",
              defenses=("no-denoise:25", "no-denoise:50")),
    ], images=1200, l2=0.0, every=4),
}


def folder_of(at, seed):
    """Where the runs of one seed lie: seed 0 in the folder itself, another in seed<number>/ in it."""
    return Path(at) / f"seed{seed}" if seed else Path(at)


def missing_commands(table, chosen, at, seeds, dataset):
    """The commands that make the runs which are not there, each once, in the order to run them."""
    commands = {}
    for seed in seeds:
        here = folder_of(at, seed)
        common = "" if dataset == "digits" else f" --data {shlex.quote(dataset)}"
        common += f" --seed {seed}" if seed else ""

        def need(name):
            """Add what makes this folder, and before it what that needs."""
            folder = here / name
            if (folder / "checkpoint.pt").exists():
                return
            if name in table.pretraining:
                commands[f"python {table.pretraining[name]}{common} --out {shlex.quote(str(folder))}"] = None
                return
            line = table.entry_of(name)
            need(line.autoencoder)
            if line.init:
                need(line.init)
            pretrained, flags = shlex.quote(str(here / line.autoencoder)), line.flags
            flags = flags.replace("@", shlex.quote(str(here)))
            commands[f"python finetune.py --autoencoder {pretrained} {flags} "
                     f"--out {shlex.quote(str(folder))}"] = None
        for entry in chosen:
            need(entry.run)
            if entry.in_front:
                need(entry.in_front)
    return [command.replace("  ", " ") for command in commands]


def what_decides(command):
    """The script of a training command and the flags that decide what is trained, each with its value.

    Of the run that --init names only the folder's own name counts.
    """
    found, flag, script = set(), [], []
    for word in [*shlex.split(command), "--"]:
        if word.startswith("--"):
            if flag and flag[0] not in NOT_RECIPE:
                found.add(" ".join(flag))
            flag = [word]
        elif flag:
            flag.append(Path(word).name if flag[0] == "--init" else word)
        else:
            script.append(word)
    return {" ".join(script).removeprefix("python "), *found}


def say_other_recipe(entry, table, folder, checkpoint, pretraining):
    """A note where a run was made by other flags than the table's; so of its autoencoder, and of its start.

    checkpoint, pretraining: what is known of both; pretraining is None where there is no autoencoder.
    """
    made = [(folder, checkpoint, f"finetune.py {entry.flags}")]
    if pretraining is not None:
        pretrained = entry.in_front or entry.autoencoder
        made.append((f"the autoencoder of {folder}", pretraining, table.pretraining[pretrained]))
    start = checkpoint.get("started_from")  # runs of older code do not say it
    if start and (pretraining is None or start["made_by"] != pretraining["made_by"]):
        made.append((f"what {folder} started from", start, table.command(entry.init or entry.autoencoder)))
    seed = checkpoint["settings"]["seed"]
    for what, of_run, command in made:
        its_seed = of_run["settings"].get("seed")  # converted weights have none
        if its_seed not in (None, seed):
            print(f"note: {what} was trained with seed {its_seed}, and {folder} with {seed}")
        used = what_decides(of_run["made_by"][0]["command"])
        if used != what_decides(command):
            print(f"note: {what} was made by: {' '.join(sorted(used))}, and the table says: {command}")


def choose(table, names):
    """The entries of a table, all or those named; UserError for a name that is none."""
    unknown = set(names or ()) - {entry.name for entry in table.entries}
    if unknown:
        raise UserError(f"the table has no {', '.join(sorted(unknown))}; it has: "
                        + "; ".join(entry.name for entry in table.entries))
    return [entry for entry in table.entries if not names or entry.name in names]
