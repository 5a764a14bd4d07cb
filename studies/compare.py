"""The comparison the paper makes: every defense of a table under the same attacks, read three ways.

    python -m studies.compare --seeds 0 1 2            the digits, eps 16/255, 100 images
    python -m studies.compare --data FOLDER            small color images, eps 4/255, 300 images

Names the models that are missing, with the commands that make them. Each cell is measured once and
kept in RUNS/<data>/compare.csv; what stands there for the same weights and settings is not measured
again, so a run that was cut short goes on. The three readings of a random defense:

    one shot       PGD with EOT, scored on fresh draws: the mean over ten of them
    ten tries      the share of images that are right in all of these ten draws
    noise known    one noise for all images, fixed and known to the attacker (arXiv 2404.14309), who
                   needs no EOT: PGD of twice the steps, the mean of 3 noises; not for masking

Where nothing is random all three are one; "worst" is the lowest of them. "no EOT" is what an attack
without it would claim; "l2" and "l2 twice" are PGD in L2 with EOT, at --l2 and twice that radius: the
threat that nobody trained for.
"""

import time
from statistics import mean, stdev

import torch

from attack import accuracy, pgd
from model import De3, UserError
from studies.tables import folders, missing_commands, table_of
from support import checkpoints, cli, data, evaluation, files, runs, training, weights

TRIES, KNOWN_NOISES = 10, 3
COLUMN = 17  # width of a column of the printed table
FIELDS = ("defense level seed run weights split images norm eps l2_radius steps eot attack_seed "
          "precision clean clean_ten_tries clean_noise_known no_eot one_shot ten_tries noise_known l2 "
          "l2_twice seconds").split()
KEY = ("level", "seed", "run", "weights", "split", "images", "eps", "l2_radius", "steps", "eot",
       "attack_seed", "precision")
MEASURED = FIELDS[FIELDS.index("clean"):]


# -------------------------------------------------------------------------------- the readings

def tries(de3, images, labels):
    """Ten draws of a defense (one where nothing is random): 1 where it is right, [draws, B]."""
    draws = TRIES if de3.is_random else 1
    return torch.stack([accuracy(de3, images, labels, 1) for _ in range(draws)])


def with_known_noise(de3, images, labels, eps, steps, max_batch):
    """(clean, robust) accuracy of each image where the attacker knows the noise: the mean of 3."""
    clean, robust = [], []
    for _ in range(KNOWN_NOISES):
        noise = torch.randn_like(images[0])
        fixed = De3(de3.autoencoder, de3.classifier, de3.sigma, noise=noise)
        adversarial = pgd(fixed, images, labels, eps, 2 * steps, early_stop=True, max_batch=max_batch)
        clean.append(accuracy(fixed, images, labels, 1))
        robust.append(accuracy(fixed, adversarial, labels, 1))
    return torch.stack(clean).mean(0), torch.stack(robust).mean(0)


def measure(de3, batches, args, show):
    """Every reading of one defense in percent: a dict with the columns from "clean" to "l2_twice"."""
    sums, seen = {}, 0
    settings = dict(steps=args.steps, max_batch=args.max_batch, early_stop=not de3.is_random)
    eot = args.eot if de3.is_random else 1

    def add(name, values):
        sums[name] = sums.get(name, 0.0) + values.sum().item()
    for number, (images, labels) in enumerate(batches):
        training.seed_epoch(args.seed, number)
        hits = tries(de3, images, labels)
        add("clean", hits.mean(0))
        add("clean_ten_tries", hits.amin(0))
        show("PGD with EOT")
        hits = tries(de3, pgd(de3, images, labels, args.eps, eot=eot, **settings), labels)
        add("one_shot", hits.mean(0))
        add("ten_tries", hits.amin(0))
        if de3.is_random:
            show("PGD without EOT")
            add("no_eot", tries(de3, pgd(de3, images, labels, args.eps, **settings), labels).mean(0))
        for name, radius in (("l2", args.l2), ("l2_twice", 2 * args.l2)):
            if radius:
                show(f"PGD in L2, radius {radius:g}")
                adversarial = pgd(de3, images, labels, radius, norm="l2", eot=eot, **settings)
                add(name, tries(de3, adversarial, labels).mean(0))
        if de3.is_random and de3.mask_ratio is None:
            show("PGD that knows the noise")
            clean, robust = with_known_noise(de3, images, labels, args.eps, args.steps, args.max_batch)
            add("clean_noise_known", clean)
            add("noise_known", robust)
        seen += len(images)
    result = {name: 100 * value / seen for name, value in sums.items()}
    if not de3.is_random:  # one reading: nothing is drawn
        result.update(no_eot=result["one_shot"], noise_known=result["one_shot"],
                      clean_noise_known=result["clean"])
    return result


# ------------------------------------------------------------------------------------ the script

def print_table(rows, args):
    """Mean (and standard deviation) over the seeds, a line for each defense and level."""
    columns = ["clean", "worst", "one_shot", "ten_tries", "noise_known", "no_eot", "l2", "l2_twice",
               "clean_ten_tries", "clean_noise_known"]
    cells = {}
    for row in rows:
        readings = [float(row[name]) for name in ("one_shot", "ten_tries", "noise_known") if row[name]]
        worst = min(readings, default="")
        cells.setdefault((row["defense"], row["level"]), []).append({**row, "worst": worst})
    width = max(len(name) for name, _ in cells)
    print(f"\n{rows[0]['images']} {args.split} images, PGD of {args.steps} steps at eps "
          f"{255 * args.eps:g}/255, EOT {args.eot}, seeds {args.seeds}, L2 radius {args.l2:g}; mean ± "
          f"standard deviation in %\n\n{'':{width}} {'level':>9}  "
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


def arguments():
    parser = cli.stage_parser(__doc__)
    add = parser.add_argument
    add("--seeds", nargs="+", type=cli.number(int), default=[0], help="of the trainings, default 0")
    add("--split", choices=["train", "val", "test"], default="test", help="default test")
    add("--images", type=cli.count, help="how many, evenly spread; default: as the table says")
    add("--eps", type=cli.eps, help="radius in L∞, default 16/255 (color 4/255)")
    add("--l2", type=cli.number(float), help="radius in L2, 0: none; default: as the table says")
    add("--steps", type=cli.count, default=20, help="of PGD, default 20")
    add("--eot", type=cli.count, default=8, help="draws in each gradient, default 8")
    args = parser.parse_args()
    data.set_size(args)
    args.autoencoder = None  # each classifier's own
    table = table_of(args.data)
    args.images = args.images or table.images
    args.l2 = table.l2 if args.l2 is None else args.l2
    args.eps = args.eps or data.defaults(args.data)["eps"]
    return args, table.entries


def main():
    args, entries = arguments()
    device = cli.open_device(args.device)
    if cli.process_count() > 1:
        raise UserError("the comparison runs in one process: leave out torchrun")
    missing = missing_commands(entries, args, args.seeds)
    if missing:
        raise UserError("models are missing; make them with: " + " && ".join(missing))
    path = runs.data_folder(args.runs, args.data) / "compare.csv"
    measured, rows, progress = files.read_table(path, FIELDS, MEASURED), [], cli.Progress()
    for entry in entries:
        for seed in args.seeds:
            _, folder = folders(entry, args, seed)
            classifier, checkpoint = weights.load_model(folder, "classifier", device, args)
            autoencoder = None
            if checkpoint["mode"] == "de3":
                autoencoder, _, _ = evaluation.load_autoencoder(args, folder, checkpoint, device)
            own_images, images_in_all, _ = evaluation.load_test_images(args, checkpoint)
            batches = evaluation.test_batches(args, own_images, device)
            for sigma, ratio in [(s, r) for s in entry.sigmas for r in entry.mask_ratios]:
                de3 = De3(autoencoder, classifier, sigma, ratio, checkpoint["keep_visible"])
                row = dict(
                    defense=entry.name, level=de3.level, seed=seed,
                    run=folder.relative_to(runs.data_folder(args.runs, args.data)),
                    weights=checkpoints.fingerprint(classifier), split=args.split, images=images_in_all,
                    norm="linf", eps=f"{args.eps:.6g}", l2_radius=f"{args.l2:g}", steps=args.steps,
                    eot=args.eot, attack_seed=args.seed, precision="bf16" if args.bf16 else "fp32")
                row = {name: str(value) for name, value in row.items()}
                same = [old for old in measured if all(old[name] == row[name] for name in KEY)]
                if same:
                    rows.append({**same[0], "defense": entry.name})
                    continue
                started = time.time()
                words = f"{entry.name}, {de3.level}, seed {seed}"
                with cli.autocast(args.bf16, device):
                    found = measure(de3, batches, args,
                                    lambda text: progress.show(f"{words}: {text}"))
                progress.clear()
                row.update({name: f"{value:.2f}" for name, value in found.items()})
                row["seconds"] = f"{time.time() - started:.1f}"
                rows.append({**dict.fromkeys(FIELDS, ""), **row})
                measured.append(rows[-1])
                files.append_row(path, FIELDS, rows[-1])
                print(f"{words}: clean {row['clean']}, one shot {row['one_shot']}, {row['seconds']} s",
                      flush=True)
    print_table(rows, args)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    cli.run_script(main)
