"""Stage 3, defend.py: what De³ does to clean images, over sigma, and to your own photographs.

    python defend.py                          accuracy and PSNR over sigma, and defend.png
    python defend.py --sigma 0 25 50 75 100 --votes 5
    python defend.py photo.jpg --run assets/cifar10/de3        label and confidence with the defense

Results go into the folder in which the first run lies: defend.png shows a few test images, under PGD
without the defense and under PGD with EOT through it, then what the defense makes of them step by
step. Under each stands the answer, at the left who gives it; wrong answers are red. Purified
photographs go to purified/ there. Your own images should look like the data set's: the digits are
bright on dark. Next: attack.py.
"""

import io
import time
from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import save_image

from attack import is_random, pgd
from model import UserError
from support import cli, data, report, run, training, weights

PICTURED = 8  # test images in defend.png


def arguments():
    parser = cli.stage_parser(__doc__)
    add = parser.add_argument
    add("photos", nargs="*", help="image files to purify and classify; give them before the flags")
    weights.evaluation_flags(parser, images=1000, runs="--run")
    add("--votes", type=cli.count, default=1, help="draws that the defense averages, default 1")
    add("--eps", type=cli.linf_eps, help="of the attack in defend.png, in [0, 1] units; default 16/255 "
        "(color 4/255)")
    add("--steps", type=cli.count, default=20, help="of the attack in defend.png, default 20")
    add("--eot", type=cli.count, default=8, help="draws per gradient there, default 8")
    args = cli.parse(parser)
    args.runs = args.run
    for run_path in args.run:
        if run_path.suffix.lower() in IMG_EXTENSIONS:
            raise UserError(f"{run_path} is an image, and no run: give photos before the flags")
    if args.photos:
        cli.refuse_unused(args, ["split", "images", "eps", "steps", "eot"], "for photos")
    for name in args.photos:
        if Path(name).is_dir():
            raise UserError(f"{name} is a folder: name the image files in it, as {name}/*.jpg")
    return args


def save_new(image, path):
    """Write a PNG; beside another picture of that name it gets a number."""
    buffer, number = io.BytesIO(), 1
    save_image(image, buffer, format="png")
    target = path
    while target.exists() and target.read_bytes() != buffer.getvalue():
        number += 1
        target = path.with_stem(f"{path.stem}-{number}")
    run.write_whole(target, lambda file: file.write(buffer.getvalue()))


def purify_photos(args, tested, device):
    """Label and confidence of each file under each defense; purified images are written."""
    transform = data.eval_transform(tested[0].checkpoint["config"]["image_size"])
    photos = [(Path(name), transform(data.read_image(name))) for name in args.photos]
    folder = args.out / "purified"
    for path, image in photos:
        for one in tested:
            classes = one.checkpoint["classes"]
            with torch.no_grad():
                torch.manual_seed(args.seed)
                confidence, label = one.model(image[None].to(device)).float().softmax(1)[0].max(0)
            name = classes[label] if classes else label.item()
            print(f"{path}  {one.words:>12}: {name} ({100 * confidence:.1f}%)")
            if one.defense is not None:
                torch.manual_seed(args.seed)  # the picture shows the draw that was classified
                with torch.no_grad():
                    purified = one.defense.purify(image[None].to(device))
                level = one.level.replace("σ = ", "sigma").replace(" ", "")
                save_new(purified, folder / f"{path.stem}_{Path(one.run).name}_{level}.png")
    if folder.exists():
        print(f"purified images are in {folder}/")


def print_clean_accuracy(args, tested, batches, images_in_all):
    """A table: accuracy on clean images, and PSNR of what the classifier sees, over sigma."""
    width = max(len(one.words) for one in tested)
    print(f"{images_in_all} {args.split} images of {args.data}, votes {args.votes}, seed {args.seed}\n\n"
          f"{'defense':{width}}  clean accuracy %  PSNR dB  images/s")
    for one in tested:
        training.seed_epoch(args.seed, 0)
        started, hits, decibels = time.perf_counter(), 0, 0
        for images, labels in batches:
            with torch.no_grad():
                hits += (one.model(images).argmax(1) == labels).sum().item()
                if one.defense is not None:
                    decibels += report.psnr(one.defense.purify(images), images).sum().item()
        hits, decibels = cli.sum_over_processes(hits, decibels)
        quality = "      -" if one.defense is None else f"{decibels / images_in_all:7.2f}"
        print(f"{one.words:{width}}  {100 * hits / images_in_all:16.1f}  {quality}  "
              f"{images_in_all / (time.perf_counter() - started):8.0f}", flush=True)


def draw_defense(path, args, eps, undefended, defense, images, labels, classes):
    """defend.png: what an attack does without and with the defense, and how the defense sees it."""
    torch.manual_seed(args.seed)
    fooling = pgd(undefended, images, labels, eps, args.steps)
    eot = args.eot if is_random(defense, images) else 1
    adversarial = pgd(defense, images, labels, eps, args.steps, eot=eot)
    pictured = [("clean\n(undefended)", images, undefended),
                ("attacked\n(undefended)", fooling, undefended),
                (f"attacked\nthrough {defense.title}\n(undefended)", adversarial, undefended)]
    with torch.no_grad():
        steps = list(defense.steps(adversarial).items())
        pictured += [(f"{name}\n(undefended)", made, undefended) for name, made in steps[:-1]]
        pictured += [(f"{steps[-1][0]}\n({defense.title}, {defense.level})", steps[-1][1],
                      defense.classifier)]
        rows = []
        for title, shown, answering in pictured:
            predicted = answering(shown.clamp(0, 1)).argmax(1)
            rows.append(report.Row(title, shown, [classes[label] for label in predicted],
                                   (predicted != labels).tolist()))
    heading = ("Above, the true label; under each image the answer of the classifier in brackets, red "
               f"where wrong.\nPGD, {args.steps} steps, eps {255 * eps:.3g}/255; through "
               f"{defense.title} ({defense.level}) with EOT {eot}.")
    report.draw_sheet(path, heading, [classes[label] for label in labels], rows)


def main():
    args = arguments()
    device = cli.open_device(args.device)
    tested = weights.load_defenses(args, device, args.votes)
    with cli.autocast(args.bf16, device):
        if args.photos:
            if cli.rank() == 0:
                purify_photos(args, tested, device)
            return
        batches, images_in_all = weights.load_test_images(args, tested, device)
        print_clean_accuracy(args, tested, batches, images_in_all)

        # the picture: the defense at its middle level, beside the undefended classifier
        defended = [one for one in tested if one.defense is not None]
        undefended = [one for one in tested if one.defense is None]
        if not defended or cli.rank() > 0:
            return
        chosen = defended[len(defended) // 2]
        few = data.evenly_spread(batches.images, PICTURED)
        images, labels = next(iter(data.Loader(few, PICTURED, device=device)))
        eps = chosen.checkpoint["data"]["eps"] if args.eps is None else args.eps
        draw_defense(args.out / "defend.png", args, eps, (undefended or defended)[0].classifier,
                     chosen.defense, images, labels, batches.classes)


if __name__ == "__main__":
    cli.run_script(main)
