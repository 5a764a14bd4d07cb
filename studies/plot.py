"""Pictures of the comparison's table, compare.csv: the trade-off over sigma, and what the attacker knows.

    python -m studies.plot                                        runs/digits/compare.csv: tradeoff.png
    python -m studies.plot --ladder                               accuracy over what the attacker knows
    python -m studies.plot --table runs/cifar10/compare.csv --against-clean

By default two panels, a curve for each defense with the spread over its seeds; what has no sigma is a
level line. --against-clean draws robust over clean accuracy, sigma along each curve: at the left one shot,
at the right with the noise known. --ladder draws accuracy over what the attacker knows, and
apart from it ten tries, which is no knowledge; faint is what each reading leaves without any
attack. A defense has one color in all pictures. Rows of other images, another attack or other code than
the table's last row are left out, and counted, and so are defenses that a picture does not show. Needs
matplotlib (pip install matplotlib).
"""

import argparse
import itertools
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

from model import UserError
from studies import compare
from support import cli, report, run

KINDS = {  # how a defense's name begins: its color (Okabe and Ito's), marker; what else is shown is gray
    "undefended": ("#000000", "o"), "adversarial training": ("#0072b2", "s"), "noise only": ("#cc79a7", "v"),
    "De³": ("#d55e00", "^"), "De³, the paper's": ("#009e73", "D"), "De³, fine-tuned on "
        "U(50": ("#009e73", "D"),
    "De³ with a linear filter": ("#56b4e9", "*"), "De³, adversarially": ("#e69f00", "P"),
}
LEFT_OUT = ("MIM", "De³ off the shelf", "noise off the shelf", "De³, pretrained on σ", "De³, trained as long",
            "De³ with a blur", "De³ with a linear filter, from scratch", "De³ with a linear filter, in testing")
RUNGS = {"gray_box": "only the classifier\n(gray-box)", "no_eot": "the whole defense,\none draw a step",
         "one_shot": "its average\n(EOT, one shot)", "noise_known": "the noise"}
ONE_ATTACK = ("norm", "eps", "l2_radius", "steps", "eot", "data", "split", "images", "every", "pixels",
              "precision", "code", "attack_seed")  # what the rows of a picture share


def rows_of_one_attack(path):
    """The rows that were measured as the table's last one was, the latest of each defense, level and seed."""
    rows = report.read_rows(path)
    if not rows:
        raise UserError(f"there is no {path}, or nothing in it: python -m studies.compare writes it")
    if not {"one_shot", "level", "seed", *ONE_ATTACK} <= rows[0].keys():
        raise UserError(f"{path} is no table of studies.compare")
    last = rows[-1]
    if last["code"] != run.digest_of_files({*compare.CODE, *run.files_of_yours()}):
        print(f"note: the table was measured by other code than that of today (commit {last['commit']})")
    alike = [row for row in rows if all(row[name] == last[name] for name in ONE_ATTACK)]
    latest = {(row["defense"], row["level"], row["seed"]): row for row in alike}
    if len(latest) < len(rows):
        print(f"left out: {len(rows) - len(latest)} rows that were measured otherwise, or again since")
    return list(latest.values())


def defenses_to_draw(rows):
    """{name: {sigma, or None: its rows, one for each seed}}, in the table's order; says what is left out.

    What has levels that are no sigma, as masks or distributions, is a defense for each.
    """
    others = sorted({row["defense"] for row in rows if row["defense"].startswith(LEFT_OUT)})
    found = {}
    for row in rows:
        if row["defense"] in others:
            continue
        sigma = float(row["value"]) if row["level"].startswith("σ") and row["value"] else None
        has_level = sigma is None and row["level"] != "off"
        name = f"{row['defense']}, {row['level']}" if has_level else row["defense"]
        found.setdefault(name, {}).setdefault(sigma, []).append(row)
    if others:
        print(f"left out: {', '.join(others)}")
    if not found:
        raise UserError("the table holds no defense that is drawn")
    return found


def style_of(name):
    """(color, marker) of a defense: those of the longest beginning in KINDS that fits."""
    fitting = [begin for begin in KINDS if name.startswith(begin)]
    return KINDS[max(fitting, key=len)] if fitting else ("#777777", "x")


def average(rows, column):
    """The mean of a column over rows; None where it is empty."""
    values = [float(row[column]) for row in rows if row.get(column)]
    return mean(values) if values else None


def new_figure(width, height, columns):
    """(a matplotlib figure, its panels), which share their vertical axis."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, sharey=True, squeeze=False)[0]


def save(figure, path, title):
    """Write the figure as a PNG with this title and the names of its curves below."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=12)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(f"wrote {path}")


def draw_over_sigma(path, defenses, title):
    """Two panels over sigma: clean accuracy, and one shot; what has no sigma is a level line."""
    sigmas = sorted({sigma for levels in defenses.values() for sigma in levels if sigma is not None})
    if len(sigmas) < 2:
        raise UserError("the table holds fewer than two sigmas")
    figure, panels = new_figure(11, 5.2, 2)
    for name, levels in defenses.items():
        color, marker = style_of(name)
        for panel, column in zip(panels, ("clean", "one_shot")):
            if None in levels:
                panel.axhline(average(levels[None], column), color=color, linewidth=2, label=name)
                continue
            x = sorted(levels)
            y = [average(levels[sigma], column) for sigma in x]
            values = [[float(row[column]) for row in levels[sigma]] for sigma in x]
            spread = [stdev(of_one) if len(of_one) > 1 else 0 for of_one in values]
            panel.errorbar(x, y, spread, color=color, marker=marker, markersize=7, linewidth=2, capsize=4,
                           label=name)
    for panel, what in zip(panels, ("clean images", "under attack, one shot")):
        panel.set_title(what, fontsize=13)
        panel.set_xlabel("σ at test time (8-bit units)", fontsize=12)
        panel.margins(y=0.06)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy (%)", fontsize=12)
    save(figure, path, title)


def draw_against_clean(path, defenses, title):
    """Robust over clean accuracy, a curve for each defense; sigma stands beside its points."""
    figure, panels = new_figure(11, 6, 2)
    readings = {"one shot": ("clean", "one_shot"), "noise known": ("clean_noise_known", "noise_known")}
    for panel, (what, (clean_column, robust_column)) in zip(panels, readings.items()):
        for name, levels in defenses.items():
            color, marker = style_of(name)
            measured = [sigma for sigma in levels if average(levels[sigma], robust_column) is not None]
            order = sorted(measured, key=lambda sigma: -1 if sigma is None else sigma)
            x = [average(levels[sigma], clean_column) for sigma in order]
            y = [average(levels[sigma], robust_column) for sigma in order]
            panel.plot(x, y, color=color, marker=marker, markersize=8, linewidth=2, label=name)
            for sigma, clean, robust in zip(order, x, y):
                if sigma is not None:
                    panel.annotate(f"{sigma:g}", (clean, robust), xytext=(7, 7), textcoords="offset points",
                                   color=color, fontsize=11)
        panel.set_title(what, fontsize=13)
        panel.set_xlabel("clean accuracy (%)", fontsize=12)
        panel.margins(0.09)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy under attack (%)", fontsize=12)
    save(figure, path, title + "; numbers at the points: σ")


def draw_ladder(path, defenses, title):
    """Accuracy over what the attacker knows, a curve for each defense and level; ten tries beside it."""
    figure, (panel,) = new_figure(11, 6, 1)
    apart = len(RUNGS) + 0.5
    for name, levels in defenses.items():
        color, marker = style_of(name)
        for line, (sigma, rows) in zip(itertools.cycle(("-", "--", ":", "-.")), levels.items()):
            label = name if sigma is None else f"{name}, σ = {sigma:g}"
            heights = [average(rows, rung) for rung in RUNGS]
            panel.plot(heights, color=color, linestyle=line, marker=marker, markersize=8, linewidth=2,
                       label=label)
            panel.plot([apart], [average(rows, "ten_tries")], color=color, marker=marker, markersize=8)
            without = [average(rows, "clean")] * 3 + [average(rows, "clean_noise_known")]
            panel.plot(without, color=color, linestyle=line, alpha=0.3)
            panel.plot([apart - 0.15, apart + 0.15], [average(rows, "clean_ten_tries")] * 2, color=color,
                       linestyle=line, alpha=0.3)
    panel.axvline(len(RUNGS) - 0.25, color="#999999", linewidth=1)
    panel.set_xticks([*range(len(RUNGS)), apart], [*RUNGS.values(), "ten tries"], fontsize=12)
    panel.set_xlabel("the attacker knows more and more →     (faint: without an attack)", fontsize=12)
    panel.set_ylabel("accuracy under attack (%)", fontsize=12)
    panel.set_ylim(-4, 104)
    panel.grid(alpha=0.3)
    save(figure, path, title)


def title_of(rows):
    """What was measured, in words."""
    last = rows[-1]
    seeds_of_each = Counter((row["defense"], row["level"]) for row in rows).values()
    fewest, most = min(seeds_of_each), max(seeds_of_each)
    every = f" (one in {last['every']} where many draws are taken)" if int(last["every"]) > 1 else ""
    if most == 1:
        of_seeds = "one seed"
    elif fewest == most:
        of_seeds = f"mean of {most} seeds"
    else:
        of_seeds = f"mean of {fewest} to {most} seeds"
    return (f"{last['images']} {last['split']} images{every}, {255 * float(last['eps']):.3g}/255, "
            f"PGD-{last['steps']}, EOT {last['eot']} or many runs, {of_seeds}")


def arguments(argv=None):
    parser = argparse.ArgumentParser(prog="python -m studies.plot", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", type=cli.folder, default=Path("runs/digits/compare.csv"), help="default "
        "runs/digits/compare.csv")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--against-clean", action="store_true", help="robust over clean accuracy")
    kind.add_argument("--ladder", action="store_true", help="accuracy over what the attacker knows")
    add("--only", nargs="+", metavar="NAME", help="these defenses of the table")
    add("--out", type=cli.folder, help="default: tradeoff.png, or ladder.png, beside the table")
    return cli.parse(parser, argv, machine=False)


def main(argv=None):
    args = arguments(argv)
    rows = rows_of_one_attack(args.table)
    if args.only:
        rows = [row for row in rows if row["defense"] in args.only]
    defenses, title = defenses_to_draw(rows), title_of(rows or [{}])
    path = args.out or args.table.with_name("ladder.png" if args.ladder else "tradeoff.png")
    if args.ladder:
        draw_ladder(path, defenses, title)
    elif args.against_clean:
        draw_against_clean(path, defenses, title)
    else:
        draw_over_sigma(path, defenses, title)


if __name__ == "__main__":
    cli.run_script(main)
