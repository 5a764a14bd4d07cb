"""tradeoff.png: clean and robust accuracy over sigma, from the comparison's table or attack.py's.

    python -m studies.plot                                        runs/digits/compare.csv
    python -m studies.plot --table runs/digits/attack.csv --out tradeoff.png
    python -m studies.plot --table runs/cifar10/compare.csv --against-clean
    python -m studies.plot --ladder

Two panels, a curve for each defense with the spread over its seeds; what has no sigma is a level line,
masking is left out. Robust is one attack: that of the table's last row, or the one that --attack, --eps
and --threat choose; rows of another attack, other images or other code are left out, and counted.
--against-clean draws robust over clean accuracy, sigma along each curve: at the left one shot, at the
right the worst of the three readings of the comparison. --ladder draws accuracy over what the attacker
knows. Needs matplotlib (pip install matplotlib).
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

import attack
from model import UserError
from studies import compare
from support import cli, report, run

SHOWN = ("undefended", "adversarial training 16/255", "adversarial training 4/255", "noise only", "De³",
         "De³, the paper's Γ(25, 3), U(0, 30)", "De³, fine-tuned on U(0, 60)", "noise only, U(0, 60)",
         "De³, fine-tuned on U(50, 150)", "noise only, U(50, 150)")  # at most six of them in one table
READINGS = ("one_shot", "ten_tries", "noise_known")
RUNGS = {"gray_box": "only the classifier\n(gray-box)", "no_eot": "the whole defense,\none draw a step",
         "one_shot": "its average\n(EOT, one shot)", "ten_tries": "may try\nten times",
         "noise_known": "the noise"}
ONE_ATTACK = ("norm", "eps", "l2_radius", "steps", "step_size", "restarts", "loss", "threat", "data", "split",
              "images", "every", "pixels", "precision", "code", "attack_seed")  # what rows must share
STYLES = [("#000000", "-", "o"), ("#0072b2", "--", "s"), ("#d55e00", "-", "^"), ("#009e73", "-.", "D"),
          ("#cc79a7", ":", "v"), ("#56b4e9", "--", "*")]  # Okabe and Ito's colors


def points_of(rows, readings):
    """{name: {level: [(clean, robust), one for each seed]}}.

    Robust accuracy is the lowest of these readings, or the robust_accuracy of attack.csv.
    """
    points = {}
    for row in rows:
        if "one_shot" in row:
            robust = min(float(row[name]) for name in readings if row[name])
            values = float(row["clean"]), robust
        else:
            values = float(row["clean_accuracy"]), float(row["robust_accuracy"])
        name, level = name_of(row), row["level"]
        if sigma_of(level) is None:  # a line of its own, as JPEG at each quality
            name, level = f"{name}, {level}", "off"
        points.setdefault(name, {}).setdefault(level, []).append(values)
    return points


def name_of(row):
    """What a row's curve is called: the defense without its level."""
    return row["defense"] if "one_shot" in row else row["defense"].replace(f" {row['level']}", "")


def with_runs_in_names(rows):
    """Rows of attack.csv; where the defenses of several runs have one name, the run stands behind it."""
    plain = [{**row, "defense": row["defense"].removesuffix(f" ({row.get('run')})")} for row in rows]
    runs = {}
    for row in plain:
        runs.setdefault(name_of(row), set()).add(row.get("run"))
    named = []
    for row in plain:
        if len(runs[name_of(row)]) > 1:
            row = {**row, "defense": f"{row['defense']} ({row['run']})"}
        named.append(row)
    return named


def curve_of(row):
    """What rows of the same weights have in common: run, name, and, in compare.csv, the training's seed."""
    return row.get("run"), name_of(row), row["seed"] if "one_shot" in row else ""


def choose_rows(rows, args):
    """(the rows of one attack, its words); what is left out is printed, with the reason."""
    def keep(kept, reason):
        if len(kept) < len(chosen):
            print(f"left out: {len(chosen) - len(kept)} rows {reason}")
        return kept
    chosen = rows
    chosen = keep([row for row in chosen if not row["level"].startswith("mask")], "of masking, without sigma")
    attack_name = args.attack and args.attack.removesuffix("+eot")
    for name, wanted in (("attack", attack_name), ("eps", args.eps and f"{args.eps:.6g}"),
                         ("threat", args.threat)):
        if wanted:
            chosen = keep([row for row in chosen if row.get(name, "").removesuffix("+eot") == wanted],
                          f"of another {name}")
    if not chosen:
        raise UserError("the table holds no row of that attack")
    code = run.digest_of_files(attack.CODE if "attack" in chosen[-1] else compare.CODE)
    todays = [row for row in chosen if row.get("code") == code]
    if not todays:
        print(f"note: no row was measured by the code of today; drawn: commit {chosen[-1].get('commit')}")
    last = (todays or chosen)[-1]
    latest_weights = {curve_of(row): row.get("weights") for row in chosen}
    chosen = keep([row for row in chosen if row.get("weights") == latest_weights[curve_of(row)]],
                  "of weights that were trained anew since")
    for name in ONE_ATTACK if "attack" in last else (*ONE_ATTACK, "eot"):
        chosen = keep([row for row in chosen if row.get(name, "") == last.get(name, "")],
                      f"whose {name} is not {last.get(name, '')}")
    if "attack" in last:  # attack.csv: with EOT where it changes something, the latest of each
        base = last["attack"].removesuffix("+eot")
        chosen = keep([row for row in chosen if row["attack"].removesuffix("+eot") == base],
                      f"of another attack than {base}")
        latest = {}
        for row in sorted(chosen, key=lambda row: row["attack"].endswith("+eot")):
            latest[row.get("run"), row["defense"], row.get("seed", "")] = row
        chosen = keep(list(latest.values()), "measured again, or without EOT beside one with it")
        chosen = with_runs_in_names(chosen)
        seeds = {row.get("seed", "") for row in chosen}
        if len(seeds) > 1:  # of the attack, not of the training
            chosen = keep([row for row in chosen if row.get("seed", "") == last.get("seed", "")],
                          f"of another seed of the attack than {last['seed']}")
    else:
        latest = {(row["defense"], row["level"], row["seed"]): row for row in chosen}
        chosen = keep(list(latest.values()), "measured again, of earlier weights")
    return chosen


def sigma_of(level):
    """The number in "σ = 50"; -1 for "off"; None for any other level, as "σ = uniform:0,50"."""
    if level == "off":
        return -1.0
    try:
        return float(level.removeprefix("σ = "))
    except ValueError:
        return None


def new_figure(height):
    """A matplotlib figure of two panels that share their vertical axis."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, height), layout="constrained")
    return figure, figure.subplots(1, 2, sharey=True)


def save(figure, path, title):
    """Write the figure as a PNG with this title."""
    figure.suptitle(title, fontsize=12)
    run.write_whole(Path(path), lambda file: figure.savefig(file, dpi=110, bbox_inches="tight"))
    print(f"wrote {path}")


def draw_against_clean(path, points_of_panels, title):
    """Robust over clean accuracy, a curve for each defense; sigma stands beside its points."""
    figure, panels = new_figure(height=6)
    whats = "one shot, PGD with EOT", "the worst of one shot, ten tries, noise known"
    for panel, points, what in zip(panels, points_of_panels, whats):
        for (name, found), (color, line, marker) in zip(points.items(), STYLES):
            levels = dict(sorted(found.items(), key=lambda item: sigma_of(item[0])))
            x = [mean(clean for clean, _ in values) for values in levels.values()]
            y = [mean(robust for _, robust in values) for values in levels.values()]
            panel.plot(x, y, color=color, linestyle=line, linewidth=2, marker=marker, markersize=8,
                       label=name)
            for level, clean, robust in zip(levels, x, y):
                if level != "off":
                    panel.annotate(level.removeprefix("σ = "), (clean, robust), xytext=(7, 5),
                                   textcoords="offset points", color=color, fontsize=11)
        panel.set_title(what, fontsize=13)
        panel.set_xlabel("clean accuracy (%)", fontsize=12)
        panel.tick_params(labelsize=11)
        panel.margins(0.09)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy under attack (%)", fontsize=12)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=12)
    save(figure, path, title + "; numbers at the points: σ")


def draw_ladder(path, rows, title):
    """Accuracy over what the attacker knows, a curve for each defense and level of compare.csv."""
    figure, _ = new_figure(height=5.4)
    figure.clf()
    panel = figure.subplots()
    curves = {}
    drawn = names_to_draw(dict.fromkeys(row["defense"] for row in rows))
    for row in rows:
        if row["defense"] in drawn:
            name = row["defense"] if row["level"] == "off" else f"{row['defense']}, {row['level']}"
            curves.setdefault(name, []).append([float(row[rung]) for rung in RUNGS])
    defended = {}
    for name, found in curves.items():
        if mean(values[0] for values in found) > 5:
            defended[name] = found
        else:
            print(f"left out: {name}, which keeps under 5% in gray-box")
    for name in list(defended)[len(STYLES):]:
        print(f"left out: {name}, of more than {len(STYLES)} curves")
    for (name, found), (color, line, marker) in zip(defended.items(), STYLES):
        heights = [mean(values) for values in zip(*found)]
        panel.plot(heights, color=color, linestyle=line, linewidth=2, marker=marker, markersize=8, label=name)
    panel.set_xticks(range(len(RUNGS)), RUNGS.values(), fontsize=12)
    panel.set_xlabel("the attacker knows more and more →", fontsize=12)
    panel.set_ylabel("accuracy under attack (%)", fontsize=12)
    panel.set_ylim(-4, 104)
    panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=12)
    save(figure, path, title)


def draw(path, points, title):
    """Two panels over sigma, labels at the right end of the curves of the right panel."""
    sigmas = sorted({sigma_of(level) for levels in points.values() for level in levels
                     if level.startswith("σ")})
    if len(sigmas) < 2:
        raise UserError("the table holds fewer than two sigmas: test more, with --sigma")
    figure, panels = new_figure(height=4.6)
    ends = []
    for (name, levels), (color, line, marker) in zip(points.items(), STYLES):
        found = {sigma_of(level): values for level, values in levels.items() if level.startswith("σ")}
        has_sigma = bool(found)
        if not has_sigma:
            everything = [value for values in levels.values() for value in values]
            found = {sigmas[0]: everything, sigmas[-1]: everything}
        for column, panel in enumerate(panels):
            x = sorted(found)
            y = [mean(value[column] for value in found[sigma]) for sigma in x]
            spread = [stdev([value[column] for value in found[sigma]]) if len(found[sigma]) > 1 else 0
                      for sigma in x]
            panel.errorbar(x, y, spread, color=color, linestyle=line, linewidth=2, capsize=4,
                           marker=marker if has_sigma else None, markersize=7)
        ends.append((y[-1], name, color))
    for panel, what in zip(panels, ("clean images", "under attack (PGD with EOT)")):
        panel.set_title(what, fontsize=13)
        panel.set_xlabel("σ at test time (8-bit units)", fontsize=12)
        panel.set_ylim(-4, 104)  # no curve on an axis
        panel.tick_params(labelsize=11)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy (%)", fontsize=12)
    lowest = -100.0
    for y, name, color in sorted(ends):  # labels do not overlap
        lowest = max(y, lowest + 7)
        panels[1].annotate(name, (1.02, (lowest + 4) / 108), xycoords="axes fraction", color=color,
                           fontsize=12, va="center", annotation_clip=False)
    save(figure, path, title)


def names_to_draw(points):
    """The defenses of a table that are drawn, at most six, in SHOWN's order; the others are printed."""
    chosen = [name for shown in SHOWN for name in points if name.partition(" (")[0] == shown]
    drawn = (chosen or list(points))[:len(STYLES)]
    for name in points:
        if name not in drawn:
            print(f"left out: {name}, which is not among the defenses of this picture")
    return drawn


def title_of(rows, args):
    """What one attack the picture shows, in words."""
    last, seeds = rows[-1], len({row["seed"] for row in rows if "one_shot" in row})
    eot = max(int(row.get("eot") or 1) for row in rows)
    title = f"{last['images']} {last['split']} images, "
    every = int(last.get("every") or 1)
    if every > 1:
        title += f"one in {every} where many draws are taken, "
    if last.get("threat") == "gray":
        title += "gray-box "
    title += f"{last.get('attack', 'pgd').removesuffix('+eot').upper()}-{last['steps']}, EOT {eot}, "
    radius = float(last["eps"])
    title += f"L2 {radius:g}, " if last["norm"] == "l2" else f"{255 * radius:.3g}/255, "
    if seeds <= 1:
        return title + "one seed"
    return title + (f"mean of {seeds} seeds" if args.against_clean or args.ladder else f"mean ± deviation of {seeds} seeds")


def plot(args):
    """Read the table, choose what belongs to one attack, and draw it."""
    if not args.table.exists():
        raise UserError(f"there is no {args.table}: python -m studies.compare, or attack.py, writes it")
    rows = report.read_table(args.table)
    if not rows or not {"eps", "images", "steps", "level", "defense"} <= rows[0].keys():
        raise UserError(f"{args.table} is no table of compare.py or attack.py")
    rows = choose_rows(rows, args)
    title = title_of(rows, args)
    path, from_comparison = args.out or args.table.with_name("tradeoff.png"), "one_shot" in rows[0]
    if (args.against_clean or args.ladder) and not from_comparison:
        raise UserError("--against-clean and --ladder need the readings of the comparison: give it a "
                        "compare.csv")
    if args.ladder:
        draw_ladder(path, rows, title)
        return
    in_one_shot = points_of(rows, ("one_shot",))
    names = names_to_draw(in_one_shot)
    if args.against_clean:
        at_worst = points_of(rows, READINGS)
        panels = [{name: points[name] for name in names} for points in (in_one_shot, at_worst)]
        draw_against_clean(path, panels, title)
    else:
        draw(path, {name: in_one_shot[name] for name in names}, title)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", type=Path, default=Path("runs/digits/compare.csv"),
        help="compare.csv or attack.csv; default runs/digits/compare.csv")
    add("--against-clean", action="store_true", help="robust over clean accuracy")
    add("--ladder", action="store_true", help="accuracy over what the attacker knows")
    add("--attack", help="of attack.csv: pgd or fgsm; default: as the last row")
    add("--eps", type=cli.eps, help="radius in [0, 1] units; default: as the last row")
    add("--threat", choices=["white", "gray"], help="default: as the last row")
    add("--out", type=Path, help="default: tradeoff.png beside the table")
    args = parser.parse_args()
    try:
        plot(args)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:  # no number, no column
        raise UserError(f"{args.table} is damaged ({error}): repair it, or measure again") from None


if __name__ == "__main__":
    cli.run_script(main)
