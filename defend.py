"""Stage 3, defend.py: what De³ does to clean images, over sigma, and to your own photographs.

    python defend.py                          accuracy and PSNR over sigma, and defend.png
    python defend.py runs/digits/de3 --sigma 0 25 50 75 100 --votes 5
    python defend.py assets/cifar10/de3 --photos photo.jpg FOLDER           the likeliest classes

Results go into the folder in which the first run lies: defend.png shows a few test images, attacked
by PGD on the undefended classifier and by PGD with EOT through the defense, and what the defense makes
of both. Under each stands the answer, at the left who gives it; wrong answers are red. Of photographs the
answers and what the classifier saw go to runs/photos/ unless --out is given. Your own images should look like
the data set's: the digits are bright on dark. Next: attack.py.
"""

import csv
import re
import shlex
import time
import unicodedata
from pathlib import Path

import torch
from torchvision.utils import save_image

from attack import accuracy, in_batches, mean_over_processes, needs_eot, percent, pgd, say_one_answer
from model import UserError
from support import cli, data, report, tested

PICTURED, LIKELY = 8, 5  # test images in defend.png; classes that are named for a photograph
ENLARGED = 7  # how many times a change is shown enlarged


def arguments(argv=None):
    parser = cli.stage_parser("python defend.py", __doc__)
    tested.evaluation_flags(parser, images=1000)
    add = parser.add_argument
    add("--photos", nargs="+", type=cli.folder, metavar="PATH", help="image files, and folders of them, to "
        "purify and classify instead of test images")
    add("--votes", type=cli.count, help="draws of the noise that the defense averages; default: what it is made "
        "with, 1 for De³")
    add("--eps", type=cli.eps, help="of the attack in defend.png, in [0, 1] units; default 16/255 (color "
        "4/255)")
    add("--steps", type=cli.count, help="of the attack in defend.png, default 20")
    add("--eot", type=cli.count, help="draws that each of its gradients averages, default 8")
    args = cli.parse(parser, argv)
    if args.photos:
        cli.refuse(args, ["split", "eps", "steps", "eot"], "for photos")
        taken_for_photos = [path for path in args.photos if (path / "checkpoint.pt").exists()]
        if taken_for_photos:
            raise UserError(f"{taken_for_photos[0]} is a run: put it in front of --photos")
        if args.runs is parser.get_default("runs"):  # those of the digits
            raise UserError("photographs need a run, in front of --photos: python defend.py RUN --photos ...")
    args.steps, args.eot = args.steps or 20, args.eot or 8
    return args


def find_photos(paths):
    """The image files among these paths and in the folders among them, at any depth, each once.

    UserError for none.
    """
    files = {}  # by where they really lie
    for path in paths:
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if data.is_image(file, path))
        for file in found:
            files.setdefault(file.resolve(), file)
    if not files:
        raise UserError(f"there is no image in {', '.join(map(str, paths))} ({', '.join(data.FORMATS)} are "
                        "read)")
    return list(files.values())


@torch.no_grad()
def classify_photos(args, entries, folder, device):
    """The likeliest classes of each photograph under each defense, on the screen and in predictions.csv.

    Purified images are written beside it. Photographs in folders that are named as classes are counted: see
    print_confusion.
    """
    tested.check_same_images(entries)
    classes = entries[0].checkpoint["classes"]
    image_size = entries[0].checkpoint["config"]["image_size"]
    try:
        (folder / "purified").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"note: nothing is kept ({error}): name a folder with --out")
        folder = None
    rows, problems, read = [], [], []
    for number, path in enumerate(find_photos(args.photos), start=1):
        try:
            pixels = data.to_size(data.read_image(path), image_size)
        except UserError as error:
            problems.append(error)
            continue
        read.append(pixels)
        image = data.as_floats(pixels)[None].to(device)
        for entry in entries:
            cli.seed_everything(args.seed)
            probabilities = entry.model(image).float().softmax(1)[0]
            shares, labels = probabilities.topk(min(LIKELY, len(classes)))
            answers = [f"{classes[label]} {100 * share:.1f}%" for share, label in zip(shares.tolist(), labels)]
            print(f"{path}  {entry.name}: {', '.join(answers[:3])}")
            name = ""
            if entry.defense is not None and folder:
                cli.seed_everything(args.seed)  # the picture shows the draw that was classified
                defense = re.sub(r"[^\w.-]+", "_", entry.name.replace("σ = ", "sigma"))
                name = f"{number:04}_{path.stem}_{defense}.png"
                save_image(entry.defense.purify(image), folder / "purified" / name)
            of_class = unicodedata.normalize("NFC", path.absolute().parent.name)  # as data.py reads names
            rows.append(dict(photo=path, folder=of_class, defense=entry.name, answer=classes[labels[0]],
                             likely="; ".join(answers), purified=name))
    if not rows:
        raise problems[0]
    for problem in problems:
        print(f"note: {problem}")
    tested.count_trained_on(entries, torch.stack(read))
    known = [row for row in rows if row["folder"] in classes]
    for entry in entries if known else ():
        print_confusion(entry.name, classes, [row for row in known if row["defense"] == entry.name])
    if not known:
        print(f"no accuracy: no folder of these photographs is named as a class ({', '.join(classes[:LIKELY])}"
              f"{' ...' if len(classes) > LIKELY else ''})")
    if folder:
        path = folder / "predictions.csv"
        with open(path, "w", newline="", encoding="utf-8", errors=report.UNREADABLE) as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        print(f"predictions.csv and what the classifier saw (purified/) are in {folder}/")


def print_confusion(name, classes, rows):
    """Accuracy, and how often each class was taken for which, of photographs whose folder names their class."""
    right = sum(row["folder"] == row["answer"] for row in rows)
    accuracy_of_them = report.interval(100 * right / len(rows), len(rows)).strip()
    print(f"\n{name}: {accuracy_of_them} % of {len(rows)} photographs in folders named as classes are right\n"
          "rows: the folder; columns: the answer")
    shown = [one for one in classes if any(one in (row["folder"], row["answer"]) for row in rows)]
    width = max(6, *map(len, shown))
    print(" " * width + "".join(f"  {one:>{width}}" for one in shown))
    for one in shown:
        counts = [sum((row["folder"], row["answer"]) == (one, other) for row in rows) for other in shown]
        print(f"{one:{width}}" + "".join(f"  {count:{width}}" for count in counts))


def print_clean_accuracy(args, entries, images, labels, classes):
    """A table: accuracy on clean images, and PSNR of what the classifier sees, over sigma."""
    total, width = len(images), max(len(entry.name) for entry in entries)
    images, labels = tested.own_share(images, labels)
    votes = f", votes {args.votes}" if args.votes else ""
    print(f"{total} {args.split} images of {args.data}{votes}, seed {args.seed}\n\n"
          f"{'run and level':{width}}  {'clean accuracy % [95%]':>22}  PSNR dB  images/s")
    for entry in entries:
        cli.seed_everything(args.seed)
        started = time.perf_counter()
        correct = percent(in_batches(lambda x, y: accuracy(entry.model, x, y), images, labels,
                                     args.max_batch))
        seconds, quality = time.perf_counter() - started, "-"
        if entry.defense is not None:
            with torch.no_grad():
                decibels = in_batches(lambda x, y: report.psnr(entry.defense.purify(x.clone()), x), images, labels,
                                      args.max_batch)
            quality = f"{mean_over_processes(decibels):.2f}"
        print(f"{entry.name:{width}}  {report.interval(correct, total):>22}  {quality:>7}  {total / seconds:8.0f}",
              flush=True)
        say_one_answer(entry.name, entry.model, images, labels, classes, args.max_batch)


def draw_defense(path, args, eps, undefended, defense, images, labels, classes):
    """defend.png: an attack that ignores the defense, and one that goes through it."""
    cli.seed_everything(args.seed)
    fooling = pgd(undefended, images, labels, eps, args.steps)
    eot = args.eot if needs_eot(defense, images) else 1
    adversarial = pgd(defense, images, labels, eps, args.steps, eot=eot)
    behind = f"({defense.title}, {defense.level})"
    with torch.no_grad():
        pictured = [
            ("clean\n(undefended)", images, undefended),
            ("attacked\n(undefended)", fooling, undefended),
            (f"this attack,\npurified\n{behind}", defense.purify(fooling), defense.classifier),
            (f"attacked\nthrough {defense.title},\npurified\n{behind}", defense.purify(adversarial),
             defense.classifier)]
        rows = []
        for title, shown, answering in pictured:
            predicted = answering(shown).argmax(1)
            rows.append(report.Row(title, shown, [classes[label] for label in predicted],
                                   (predicted != labels).tolist()))
    nothing = [""] * len(images)
    change = 0.5 + ENLARGED * (fooling - images)
    rows.insert(2, report.Row(f"its change,\n{ENLARGED} times", change, nothing, nothing))
    heading = ("Above, the true label; under each image the answer of the classifier in brackets, red "
               f"where wrong.\nPGD, {args.steps} steps, eps {255 * eps:.3g}/255; through "
               f"{defense.title} ({defense.level}) with EOT {eot}.")
    report.draw_sheet(path, heading, [classes[label] for label in labels], rows)


def main(argv=None):
    args = arguments(argv)
    device = cli.open_device(args.device)
    photos_folder = args.out or Path("runs", "photos")
    entries = tested.load_entries(args, device, args.votes)
    with cli.autocast(args.bf16, device):
        if args.photos:
            if cli.rank() == 0:
                classify_photos(args, entries, photos_folder, device)
            return
        images, labels, classes = tested.load_test_images(args, entries, device)
        print_clean_accuracy(args, entries, images, labels, classes)

        # the picture: the defense at its middle level, beside the undefended classifier
        defended = [entry for entry in entries if entry.defense is not None]
        undefended = [entry for entry in entries if entry.defense is None]
        if defended and cli.rank() == 0:
            chosen, few = defended[len(defended) // 2], slice(PICTURED)
            eps = chosen.checkpoint["data"]["eps"] if args.eps is None else args.eps
            draw_defense(args.out / "defend.png", args, eps, (undefended or defended)[0].classifier,
                         chosen.defense, data.as_floats(images[few]), labels[few], classes)
    print("next: python attack.py " + " ".join(shlex.quote(str(folder)) for folder in args.runs))


if __name__ == "__main__":
    cli.run_script(main)
