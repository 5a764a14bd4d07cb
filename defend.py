"""Stage 3, defend.py: what De³ does to clean images, over sigma, and to your own photographs.

    python defend.py                          accuracy and PSNR over sigma, and defend.png
    python defend.py runs/digits/de3 --sigma 0 25 50 75 100 --votes 5
    python defend.py assets/cifar10/de3 --photos photo.jpg other.jpg        label and confidence

Results go into the folder in which the first run lies: defend.png shows a few test images, under PGD
without the defense and under PGD with EOT through it, then what the defense makes of them step by
step. Under each stands the answer, at the left who gives it; wrong answers are red. Purified
photographs go to purified/ there. Your own images should look like the data set's: the digits are
bright on dark. Next: attack.py.
"""

import time
from pathlib import Path

import torch
from torchvision.utils import save_image

from attack import accuracy, in_batches, needs_eot, percent, pgd, say_one_answer
from support import cli, data, report, tested

PICTURED = 8  # test images in defend.png


def arguments(argv=None):
    parser = cli.stage_parser("python defend.py", __doc__)
    tested.evaluation_flags(parser, images=1000)
    add = parser.add_argument
    add("--photos", nargs="+", type=cli.folder, metavar="FILE", help="image files to purify and classify, "
        "instead of test images")
    add("--votes", type=cli.count, default=1, help="draws of the noise that the defense averages, default 1")
    add("--eps", type=cli.eps, help="of the attack in defend.png, in [0, 1] units; default 16/255 (color "
        "4/255)")
    add("--steps", type=cli.count, help="of the attack in defend.png, default 20")
    add("--eot", type=cli.count, help="draws that each of its gradients averages, default 8")
    args = cli.parse(parser, argv)
    if args.photos:
        cli.refuse(args, ["split", "eps", "steps", "eot"], "for photos")
    args.steps, args.eot = args.steps or 20, args.eot or 8
    return args


@torch.no_grad()
def purify_photos(args, entries, device):
    """Label and confidence of each file under each defense; purified images are written."""
    folder = args.out / "purified"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"note: purified images are not kept ({error}): name a folder with --out")
        folder = None
    image_size = entries[0].checkpoint["config"]["image_size"]
    photos = [(path, data.to_size(data.read_image(path), image_size)) for path in args.photos]
    for path, pixels in photos:
        image = data.as_floats(pixels)[None].to(device)
        for entry in entries:
            cli.seed_everything(args.seed)
            confidence, label = entry.model(image).float().softmax(1)[0].max(0)
            print(f"{path}  {entry.name}: {entry.checkpoint['classes'][label]} ({100 * confidence:.1f}%)")
            if entry.defense is not None and folder:
                cli.seed_everything(args.seed)  # the picture shows the draw that was classified
                level = entry.level.replace("σ = ", "sigma").replace(" ", "")
                parts = [path.resolve().parent.name, path.stem, Path(entry.folder).name, level]
                save_image(entry.defense.purify(image), folder / f"{'_'.join(parts)}.png")
    if folder:
        print(f"purified images are in {folder}/")


def print_clean_accuracy(args, entries, images, labels, classes):
    """A table: accuracy on clean images, and PSNR of what the classifier sees, over sigma."""
    total, width = len(images), max(len(entry.name) for entry in entries)
    images, labels = tested.own_share(images, labels)
    print(f"{total} {args.split} images of {args.data}, votes {args.votes}, seed {args.seed}\n\n"
          f"{'run and level':{width}}  clean accuracy %  PSNR dB  images/s")
    for entry in entries:
        cli.seed_everything(args.seed)
        started = time.perf_counter()
        correct = percent(in_batches(lambda x, y: accuracy(entry.model, x, y), images, labels,
                                     args.max_batch))
        seconds, quality = time.perf_counter() - started, "-"
        if entry.defense is not None:
            with torch.no_grad():
                decibels = in_batches(lambda x, y: report.psnr(entry.defense.purify(x), x), images, labels,
                                      args.max_batch)
            quality = f"{percent(decibels) / 100:.2f}"
        print(f"{entry.name:{width}}  {correct:16.1f}  {quality:>7}  {total / seconds:8.0f}", flush=True)
        say_one_answer(entry, images, labels, classes, args.max_batch)


def draw_defense(path, args, eps, undefended, defense, images, labels, classes):
    """defend.png: what an attack does without and with the defense, and how the defense sees it."""
    cli.seed_everything(args.seed)
    fooling = pgd(undefended, images, labels, eps, args.steps)
    eot = args.eot if needs_eot(defense, images) else 1
    adversarial = pgd(defense, images, labels, eps, args.steps, eot=eot)
    pictured = [("clean\n(undefended)", images, undefended),
                ("attacked\n(undefended)", fooling, undefended),
                (f"attacked\nthrough {defense.title}\n(undefended)", adversarial, undefended)]
    with torch.no_grad():
        *before, (last, purified) = defense.steps(adversarial).items()
        pictured += [(f"{name}\n(undefended)", made, undefended) for name, made in before]
        pictured += [(f"{last}\n({defense.title}, {defense.level})", purified, defense.classifier)]
        rows = []
        for title, shown, answering in pictured:
            predicted = answering(shown.clamp(0, 1)).argmax(1)
            rows.append(report.Row(title, shown, [classes[label] for label in predicted],
                                   (predicted != labels).tolist()))
    heading = ("Above, the true label; under each image the answer of the classifier in brackets, red "
               f"where wrong.\nPGD, {args.steps} steps, eps {255 * eps:.3g}/255; through "
               f"{defense.title} ({defense.level}) with EOT {eot}.")
    report.draw_sheet(path, heading, [classes[label] for label in labels], rows)


def main(argv=None):
    args = arguments(argv)
    device = cli.open_device(args.device)
    entries = tested.load_entries(args, device, args.votes)
    with cli.autocast(args.bf16, device):
        if args.photos:
            if cli.rank() == 0:
                purify_photos(args, entries, device)
            return
        images, labels, classes = tested.load_test_images(args, entries, device)
        print_clean_accuracy(args, entries, images, labels, classes)

        # the picture: the defense at its middle level, beside the undefended classifier
        defended = [entry for entry in entries if entry.defense is not None]
        undefended = [entry for entry in entries if entry.defense is None]
        if not defended or cli.rank() > 0:
            return
        chosen, few = defended[len(defended) // 2], slice(PICTURED)
        eps = chosen.checkpoint["data"]["eps"] if args.eps is None else args.eps
        draw_defense(args.out / "defend.png", args, eps, (undefended or defended)[0].classifier,
                     chosen.defense, data.as_floats(images[few]), labels[few], classes)


if __name__ == "__main__":
    cli.run_script(main)
