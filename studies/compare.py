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
                   needs no EOT; the mean of 3 noises; not for masking

Where nothing is random the last four are one. That reading, and that of a known noise, is the strongest
of many runs of PGD (strong_pgd in attack.py: cross-entropy, margin, margin towards each other class, two
starts); with EOT, and in gray-box, it is one run. All are scored in float32. "worst" is the lowest of the
last three; "l2" and "l2 twice" are the same attacks in L2, at --l2 and twice that radius: the threat that
nobody trained for; "clean ten tries" and "clean noise known" are those readings without an attack.
Clean and gray-box accuracy are read on all images, and so is everything where nothing is random; the
other readings of a random defense on color on the first quarter of these images.
"""

import math
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import torch

from attack import accuracy, in_batches, needs_eot, pgd, say_one_answer, strong_pgd
from model import NoiseScale, UserError
from studies.certify import draws_gaussian_noise_once
from studies.tables import TABLES, choose, folder_of, missing_commands, say_other_recipe
from support import cli, data, report, run, tested

TRIES, KNOWN_NOISES = 10, 3
COLUMN = 17  # width of a column of the printed table
CODE = ("model.py", "attack.py", "studies/compare.py", "studies/certify.py")  # what decides a cell
NOT_MEASURED = ("defense", "run", "data", "commit")  # what may differ between two rows of one cell
MEASURED = ("clean", "gray_box", "no_eot", "one_shot", "ten_tries", "noise_known", "l2", "l2_twice",
            "clean_ten_tries", "clean_noise_known")


# -------------------------------------------------------------------------------- the readings

def tries(model, images, labels, batch, random):
    """Ten draws of a defense (one where nothing is random) on each image: 1 where it is right, [draws, N]."""
    draws = [in_batches(lambda x, y: accuracy(model, x, y), images, labels, batch)
             for _ in range(TRIES if random else 1)]
    return torch.stack(draws)


def takes_known_noise(model, images):
    """Whether a random defense adds the noise ε·σ/255 that it is given, once, and draws none besides.

    images: a few, at least one.
    """
    scale = getattr(model, "sigma", None)
    if not hasattr(model, "noise") or not isinstance(scale, NoiseScale) or scale.fixed is None:
        return False
    fixed = tested.twin_of(model)
    fixed.noise = torch.randn_like(images[0])
    return not needs_eot(fixed, images) and draws_gaussian_noise_once(model, images[0])


def measure(model, images, labels, eps, l2, steps, eot, seed, batch, every=1, show=lambda text: None):
    """Every reading of one defense, any model from [0, 1] images to logits: {column: percent}.

    batch: images that are attacked together. Where the defense is random, what takes many draws is read on
    one in `every` images only, the first of them. "noise known" is left out where a defense takes no noise
    that it is given; a note says so if it has one.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile: what is copied is the module in it
    few = data.as_floats(images[:batch])
    random = needs_eot(model, few)
    knows_noise = random and takes_known_noise(model, few)
    if random and hasattr(model, "noise") and not knows_noise:
        title = getattr(model, "title", type(model).__name__)
        print(f"note: {title} does not add one noise ε·σ/255 that it is given, and nothing else: noise known is "
              "left out")
    draws = eot if random else 1
    settings = dict(eps=eps, steps=steps)
    fewer = math.ceil(len(images) / every) if random else len(images)  # the first of the choice: all classes
    some, some_labels = images[:fewer], labels[:fewer]
    result = {}

    def attacked(x, y, attacked_model=model, **more):
        """Adversarial images for all of x: one run of PGD, in batches."""
        return in_batches(lambda a, b: pgd(attacked_model, a, b, **{**settings, **more}), x, y, batch)

    def attacked_by_many(x, y, attacked_model=model, **more):
        """The same by many runs of PGD, of a model in which nothing is random."""
        return in_batches(lambda a, b: strong_pgd(attacked_model, a, b, **{**settings, **more}), x, y, batch)

    def attacked_through(x, y, **more):
        """The strongest white-box attack: with EOT where the model is random, else many runs of PGD."""
        return attacked(x, y, eot=draws, **more) if random else attacked_by_many(x, y, **more)

    def read(name, x, y, tries_name=None):
        """Measure how many of these images are right on fresh draws; also in all of ten tries."""
        hits = tries(model, x, y, batch, random)
        result[name] = 100 * hits.mean().item()
        if tries_name:
            result[tries_name] = 100 * hits.amin(0).mean().item()
    cli.seed_everything(seed)
    read("clean", images, labels, "clean_ten_tries")
    if hasattr(model, "classifier"):
        show("gray-box PGD")
        averages = needs_eot(model.classifier, few)
        adversarial = attacked(images, labels, model.classifier, eot=eot if averages else 1)
        read("gray_box", adversarial, labels)
    show("PGD with EOT")
    read("one_shot", attacked_through(some, some_labels), some_labels, "ten_tries")
    if random:
        show("PGD without EOT")
        read("no_eot", attacked(some, some_labels), some_labels)
    for name, radius in (("l2", l2), ("l2_twice", 2 * l2)):
        if radius:
            show(f"PGD in L2, radius {radius:g}")
            read(name, attacked_through(some, some_labels, eps=radius, norm="l2"), some_labels)
    if knows_noise:
        show("PGD that knows the noise")
        clean, robust = [], []
        for _ in range(KNOWN_NOISES):
            fixed = tested.twin_of(model)
            fixed.noise = torch.randn_like(few[0])
            adversarial = attacked_by_many(some, some_labels, fixed)
            clean.append(tries(fixed, some, some_labels, batch, random=False))
            robust.append(tries(fixed, adversarial, some_labels, batch, random=False))
        result["clean_noise_known"] = 100 * torch.stack(clean).mean().item()
        result["noise_known"] = 100 * torch.stack(robust).mean().item()
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


def arguments(argv=None):
    parser = cli.stage_parser("python -m studies.compare", __doc__)
    add = parser.add_argument
    add("table", nargs="?", choices=TABLES, default="digits", help="default digits")
    add("--data", type=data.dataset_name, help="of the color table: FOLDER, or cifar10 (default)")
    add("--at", type=cli.folder, help="where the runs lie; default runs/<data>, other seeds in seed<N>/ "
        "there")
    add("--only", nargs="+", metavar="NAME", help="only these rows of the table")
    add("--seeds", nargs="+", type=int, default=[0], help="of the trainings, default 0")
    add("--split", choices=data.SPLITS, help="default test; val for a FOLDER without test/")
    add("--images", type=cli.count, help="how many; default 100 (color 1,200)")
    add("--every", type=cli.count, metavar="N", help="of a random defense, read what takes many draws on "
        "one in N of these images, the first; default 1 (color 4)")
    add("--eps", type=cli.eps, help="radius in L∞, default 16/255 (color 4/255)")
    add("--l2", type=cli.eps, help="radius in L2, 0: none; default: as the table says")
    add("--steps", type=cli.count, default=20, help="of PGD, default 20")
    add("--eot", type=cli.count, default=8, help="draws in each gradient, default 8")
    add("--seed", type=int, default=0, help="of the noise and the attack, default 0")
    args = cli.parse(parser, argv)
    table = TABLES[args.table]
    args.data = args.data or ("digits" if args.table == "digits" else "cifar10")
    args.at = args.at or Path("runs", data.short_name(args.data))
    args.images, args.every = args.images or table.images, args.every or table.every
    args.l2 = table.l2 if args.l2 is None else args.l2
    args.max_batch = args.max_batch or 120
    return args


def load_entry(entry, table, at, seed, device):
    """What a line of the table is tested as: a list of tested.Entry; UserError for a run of another seed."""
    cli.seed_everything(seed)  # a defense may draw when it is made
    here = folder_of(at, seed)
    in_front = here / entry.in_front if entry.in_front else None
    classifier, checkpoint, autoencoder, pretraining = tested.load_run(here / entry.run, in_front, device)
    trained_with = checkpoint["settings"]["seed"]
    if trained_with != seed:
        raise UserError(f"{here / entry.run} was trained with seed {trained_with}, and stands where seed "
                        f"{seed} is looked for: move it, or train that seed")
    say_other_recipe(entry, table, here / entry.run, checkpoint, pretraining)
    chosen = [pair for text in entry.defenses for pair in tested.parse_defense(text, ())]
    found = [tested.put_in_front(here / entry.run, classifier, checkpoint, autoencoder, pretraining, *pair)
             for pair in chosen]
    if len({one.level for one in found}) < len(found):
        raise UserError(f"two levels of {entry.name} read alike ({', '.join(one.level for one in found)}), and would "
                        "count as two seeds of one: give each a line of the table")
    return found


def main(argv=None):
    args = arguments(argv)
    device = cli.open_device(args.device, alone=True)
    run.note_imported_code()
    table = TABLES[args.table]
    chosen = choose(table, args.only)
    missing = missing_commands(table, chosen, args.at, args.seeds, args.data)
    if missing:
        raise UserError("runs are missing; make them with: " + " && ".join(missing))
    found = [(line, seed, entry) for line in chosen for seed in args.seeds
             for entry in load_entry(line, table, args.at, seed, device)]
    run.say_made_by_other_code({entry.folder: entry.checkpoint for _, _, entry in found})
    images, labels, classes = tested.load_test_images(args, [entry for _, _, entry in found], device)
    eps = found[0][2].checkpoint["data"]["eps"] if args.eps is None else args.eps
    pixels, path, rows, progress = data.digest(images, labels), args.at / "compare.csv", [], cli.Progress()
    measured = report.read_rows(path)
    for number, (line, seed, entry) in enumerate(found):
        started, name = time.perf_counter(), f"{line.name}, {entry.level}, seed {seed}"
        say_one_answer(name, entry.model, images, labels, classes, args.max_batch)
        row = dict(defense=line.name, level=entry.level, value=entry.value, seed=seed, run=entry.folder,
                   data=args.data, split=args.split, images=len(images), every=args.every, pixels=pixels,
                   norm="linf", eps=f"{eps:.6g}", l2_radius=f"{args.l2:g}", steps=args.steps, eot=args.eot,
                   attack_seed=args.seed, precision="bf16" if args.bf16 else "fp32",
                   weights=run.fingerprint(entry.model), code=run.digest_of_code_of(CODE, entry.model),
                   commit=run.commit())
        row = {name: report.as_text(value) for name, value in row.items()}
        cell = {name: value for name, value in row.items() if name not in NOT_MEASURED}
        names = dict(defense=line.name, run=entry.folder)
        same = report.find_row(measured, {**cell, **names}, path)
        old = same or report.find_row(measured, cell, path)
        if old:
            kept = {**old, **names}
            if not same:  # measured under another name
                measured.append(kept)
                report.append_row(path, kept)
            rows.append(kept)
            if old.get("warnings"):
                print(f"warning: {name}: {old['warnings']}", file=sys.stderr)
            continue
        with cli.autocast(args.bf16, device), cli.heard_warnings() as heard:
            readings = measure(entry.model, images, labels, eps, args.l2, args.steps, args.eot, args.seed,
                               args.max_batch, args.every,
                               lambda text: progress.show(f"{name}: {text}", (number + 0.5) / len(found)))
        progress.clear()
        if heard:
            print(f"warning: {name}: {'; '.join(heard)}", file=sys.stderr)
        row.update({column: f"{readings[column]:.2f}" if column in readings else "" for column in MEASURED})
        row.update(seconds=f"{time.perf_counter() - started:.1f}", warnings="; ".join(heard))
        print(f"{name}: clean {row['clean']}, one shot {row['one_shot']}, {row['seconds']} s", flush=True)
        rows.append(row)
        measured.append(row)
        report.append_row(path, row)
    fewer = f" (one in {args.every} where many draws are taken)" if args.every > 1 else ""
    print_table(rows, f"{len(images)} {args.split} images{fewer} of {args.data}, PGD of {args.steps} "
                      f"steps at eps {255 * eps:g}/255, EOT {args.eot}, seeds {args.seeds}, L2 radius "
                      f"{args.l2:g}")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    cli.run_script(main)
