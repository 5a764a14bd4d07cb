"""The comparison the paper makes: every defense of a table under the same attacks, read in many ways.

    python -m studies.compare --seeds 0 1 2            the digits, eps 16/255, 100 images
    python -m studies.compare color --data FOLDER      small color images, eps 4/255, 1,200 images
    python -m studies.compare --only undefended De³    these rows of the table

Names the runs that are missing, with the commands that make them. Each cell is measured once and
kept in compare.csv beside the runs; what stands there for the same weights, code, images and settings
is not measured again, so a comparison that was cut short goes on. The attacker knows more and more:

    gray-box       PGD on the classifier alone, without the defense (the paper's protocol)
    no EOT         PGD through the whole defense, one draw of the noise a step
    one shot       PGD with EOT, scored on fresh draws: the mean over ten of them
    ten tries      the share of images that are right in all of these ten draws
    noise known    one noise for all images, fixed and known to the attacker (arXiv 2404.14309), who
                   needs no EOT: PGD of twice the steps, the mean of 3 noises; not for masking

Where nothing is random the last four are one. "worst" is the lowest of the last three; "l2" and "l2
twice" are PGD in L2 with EOT, at --l2 and twice that radius: the threat that nobody trained for.
Clean and gray-box accuracy are read on all images, and so is everything where nothing is random; the
other readings of a random defense on color on every fourth of these images.
"""

import argparse
import copy
import time
from pathlib import Path
from statistics import mean, stdev

import torch

from attack import accuracy, is_random, pgd
from model import UserError
from studies.certify import adds_gaussian_noise
from studies.tables import TABLES, choose, folder_of, missing_commands, say_other_recipe
from support import cli, data, report, run, training, weights

TRIES, KNOWN_NOISES = 10, 3
COLUMN = 17  # width of a column of the printed table
CODE = ("model.py", "attack.py", "support/training.py", "studies/compare.py")  # what decides a cell
MEASURED = ("clean", "gray_box", "no_eot", "one_shot", "ten_tries", "noise_known", "l2", "l2_twice",
            "clean_ten_tries", "clean_noise_known")


# -------------------------------------------------------------------------------- the readings

def tries(model, images, labels, random):
    """Ten draws of a defense (one where nothing is random): 1 where it is right, [draws, B]."""
    return torch.stack([accuracy(model, images, labels, 1) for _ in range(TRIES if random else 1)])


def takes_known_noise(defense, images):
    """Whether a random defense uses the noise ε·σ/255 that it is given, and draws none besides."""
    fixed = copy.copy(defense)
    fixed.noise = torch.randn_like(images[0])
    return not is_random(fixed, images) and adds_gaussian_noise(defense, images)


def with_known_noise(defense, images, labels, eps, steps):
    """(clean, robust) accuracy of each image where the attacker knows the noise: the mean of 3."""
    clean, robust = [], []
    for _ in range(KNOWN_NOISES):
        fixed = copy.copy(defense)
        fixed.noise = torch.randn_like(images[0])
        adversarial = pgd(fixed, images, labels, eps, 2 * steps, early_stop=True)
        clean.append(accuracy(fixed, images, labels, 1))
        robust.append(accuracy(fixed, adversarial, labels, 1))
    return torch.stack(clean).mean(0), torch.stack(robust).mean(0)


def measure(model, batches, eps, l2, steps, eot, seed, every=1, show=lambda text: None):
    """Every reading of one defense, any model from [0, 1] images to logits: {column: percent}.

    Where the defense is random, what takes many draws is read on every so many images only. "noise
    known" is left out where a defense takes no noise that it is given; a note says so if it has one.
    """
    first_images, _ = next(iter(batches))
    random = is_random(model, first_images)
    has_noise = random and hasattr(model, "noise")
    knows_noise = has_noise and takes_known_noise(model, first_images)
    if has_noise and not knows_noise:
        print(f"note: {model.title} does not add the noise ε·σ/255 that it is given: noise known is left out "
              "(with_known_noise in studies/compare.py would have to be changed with it)")
    every = every if random else 1
    draws = eot if random else 1
    settings = dict(steps=steps, early_stop=not random)
    found = {}  # for each column the accuracy of each image, batch by batch
    seen = 0  # images of the batches before

    def add(name, values):
        found.setdefault(name, []).append(values)
    for number, (all_images, all_labels) in enumerate(batches):
        training.seed_epoch(seed, number)
        hits = tries(model, all_images, all_labels, random)
        add("clean", hits.mean(0))
        add("clean_ten_tries", hits.amin(0))
        if hasattr(model, "classifier"):
            show("gray-box PGD")
            adversarial = pgd(model.classifier, all_images, all_labels, eps, steps)
            add("gray_box", tries(model, adversarial, all_labels, random).mean(0))
        first = -seen % every
        images, labels = all_images[first::every], all_labels[first::every]
        seen += len(all_images)
        if not len(images):
            continue
        show("PGD with EOT")
        hits = tries(model, pgd(model, images, labels, eps, eot=draws, **settings), labels, random)
        add("one_shot", hits.mean(0))
        add("ten_tries", hits.amin(0))
        if random:
            show("PGD without EOT")
            without_eot = pgd(model, images, labels, eps, **settings)
            add("no_eot", tries(model, without_eot, labels, random).mean(0))
        for name, radius in (("l2", l2), ("l2_twice", 2 * l2)):
            if radius:
                show(f"PGD in L2, radius {radius:g}")
                adversarial = pgd(model, images, labels, radius, norm="l2", eot=draws, **settings)
                add(name, tries(model, adversarial, labels, random).mean(0))
        if knows_noise:
            show("PGD that knows the noise")
            clean, robust = with_known_noise(model, images, labels, eps, steps)
            add("clean_noise_known", clean)
            add("noise_known", robust)
    result = {name: 100 * torch.cat(values).mean().item() for name, values in found.items()}
    if not random:  # one reading: nothing is drawn
        result.update(no_eot=result["one_shot"], noise_known=result["one_shot"],
                      clean_noise_known=result["clean"])
    result.setdefault("gray_box", result["one_shot"])  # where there is no defense
    return result


# ------------------------------------------------------------------------------------ the script

def print_table(rows, heading):
    """Mean (and standard deviation) over the seeds, a line for each defense and level."""
    columns = ["clean", "worst", *MEASURED[1:]]
    cells = {}
    for row in rows:
        readings = [float(row[name]) for name in ("one_shot", "ten_tries", "noise_known") if row[name]]
        worst = min(readings, default="")
        cells.setdefault((row["defense"], row["level"]), []).append({**row, "worst": worst})
    width = max(len(name) for name, _ in cells)
    print(f"\n{heading}; mean ± standard deviation in %\n\n{'':{width}} {'level':>9}  "
          + "  ".join(f"{name.replace('_', ' '):>{COLUMN}}" for name in columns))
    for (name, level), found in cells.items():
        texts = []
        for column in columns:
            values = [float(row[column]) for row in found if row.get(column, "") != ""]
            if not values:
                texts.append("-")
            elif len(values) == 1:
                texts.append(f"{values[0]:.1f}")
            else:
                texts.append(f"{mean(values):.1f} ± {stdev(values):.1f}")
        print(f"{name:{width}} {level:>9}  " + "  ".join(f"{text:>{COLUMN}}" for text in texts))


def same_cell(measured, row):
    """The row that was measured for the same weights, code, images and settings, or None.

    A column that an old table lacks is empty, and so is no match.
    """
    for old in measured:
        if all(old.get(name, "") == value for name, value in row.items() if name not in ("defense", "run")):
            return old
    return None


def arguments():
    parser = cli.stage_parser(__doc__)
    add = parser.add_argument
    add("table", nargs="?", choices=TABLES, default="digits", help="default digits")
    add("--data", type=data.dataset_name, help="of the color table: FOLDER, or cifar10 (default)")
    add("--at", type=Path, help="where the runs lie; default runs/<data>, other seeds in seed<N>/ there")
    add("--only", nargs="+", metavar="NAME", help="only these rows of the table")
    add("--seeds", nargs="+", type=cli.number(int), default=[0], help="of the trainings, default 0")
    add("--split", choices=data.SPLITS, default="test", help="default test")
    add("--images", type=cli.count, help="how many, evenly spread; default 100 (color 1,200)")
    add("--every", type=cli.count, metavar="N", help="of a random defense, read what takes many draws on "
        "every Nth of these images; default 1 (color 4)")
    add("--eps", type=cli.linf_eps, help="radius in L∞, default 16/255 (color 4/255)")
    add("--l2", type=cli.number(float), help="radius in L2, 0: none; default: as the table says")
    add("--steps", type=cli.count, default=20, help="of PGD, default 20")
    add("--eot", type=cli.count, default=8, help="draws in each gradient, default 8")
    add("--seed", type=cli.number(int), default=0, help="of the noise and the attack, default 0")
    args = cli.parse(parser)
    args.data = args.data or ("digits" if args.table == "digits" else "cifar10")
    args.at = args.at or Path("runs", Path(args.data).name)
    args.max_batch = args.max_batch or 256
    return args


def load_entry(entry, table, at, seed, device):
    """What one entry is tested as: a list of weights.Tested; UserError for a run of another seed."""
    here = folder_of(at, seed)
    flags = argparse.Namespace(autoencoder=here / entry.in_front if entry.in_front else None)
    classifier, checkpoint, autoencoder, pretraining = weights.load_run(here / entry.run, flags, device)
    trained_with = checkpoint["settings"]["seed"]
    if trained_with != seed:
        raise UserError(f"{here / entry.run} was trained with seed {trained_with}, and stands where seed {seed} "
                        "is looked for: move it, or train that seed")
    say_other_recipe(entry, table, here / entry.run, checkpoint, pretraining)
    chosen = [pair for text in entry.defenses for pair in weights.parse_defense(text, ())]
    return weights.put_in_front(here / entry.run, classifier, checkpoint, autoencoder, chosen)


def main():
    args = arguments()
    device = cli.open_device(args.device)
    cli.one_process("the comparison")
    table = TABLES[args.table]
    chosen = choose(table, args.only)
    missing = missing_commands(table, chosen, args.at, args.seeds, args.data)
    if missing:
        raise UserError("runs are missing; make them with: " + " && ".join(missing))
    args.images = args.images or table.images
    every = args.every or table.every
    l2 = table.l2 if args.l2 is None else args.l2
    path, rows, progress = report.open_table(args.at / "compare.csv"), [], cli.Progress()
    measured = report.read_table(path, MEASURED)
    batches, eps = None, args.eps
    for entry in chosen:
        for seed in args.seeds:
            for one in load_entry(entry, table, args.at, seed, device):
                if batches is None:
                    batches, images_in_all = weights.load_test_images(args, [one], device)
                    pixels = data.digest_of(batches)
                else:
                    weights.say_other_data(one.run, one.checkpoint, args.data)
                if one.checkpoint["classes"] not in (None, batches.classes):
                    raise UserError(f"{one.run} numbers the classes differently: compare it apart")
                eps = one.checkpoint["data"]["eps"] if eps is None else eps
                row = dict(
                    defense=entry.name, level=one.level, seed=seed, run=one.run, data=args.data,
                    split=args.split, images=images_in_all, every=every, pixels=pixels, norm="linf",
                    eps=f"{eps:.6g}", l2_radius=f"{l2:g}", steps=args.steps, eot=args.eot,
                    attack_seed=args.seed, precision="bf16" if args.bf16 else "fp32", **run.origin_of_row(one.model, CODE))
                row = {name: str(value) for name, value in row.items()}
                key = {name: value for name, value in row.items() if name not in ("data", "commit")}
                old = same_cell(measured, key)
                if old:
                    rows.append({**old, "defense": entry.name})
                    continue
                started, words = time.perf_counter(), f"{entry.name}, {one.level}, seed {seed}"
                with cli.autocast(args.bf16, device):
                    found = measure(one.model, batches, eps, l2, args.steps, args.eot, args.seed,
                                    every, lambda text: progress.show(f"{words}: {text}"))
                progress.clear()
                row.update({name: f"{found[name]:.2f}" if name in found else "" for name in MEASURED})
                row["seconds"] = f"{time.perf_counter() - started:.1f}"
                rows.append(row)
                measured.append(row)
                report.append_row(path, row)
                print(f"{words}: clean {row['clean']}, one shot {row['one_shot']}, {row['seconds']} s",
                      flush=True)
    fewer = f" (one in {every} where many draws are taken)" if every > 1 else ""
    print_table(rows, f"{images_in_all} {args.split} images{fewer} of {args.data}, PGD of {args.steps} "
                      f"steps at eps {255 * eps:g}/255, EOT {args.eot}, seeds {args.seeds}, L2 radius {l2:g}")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    cli.run_script(main)
