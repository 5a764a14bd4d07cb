"""Stage 3, defend.py: what De³ does to clean images, over sigma, and to one's own photographs.

    python defend.py                          accuracy and PSNR over sigma, and defend.png
    python defend.py --sigma 0 25 50 75 100 --votes 5
    python defend.py photo.jpg another.png    label and confidence with and without the defense;
                                              purified images go to RUNS/<data>/purified/<run>/

defend.png shows a few test images, under PGD without the defense and under PGD with EOT through De³,
with De³'s noise, and denoised. Under each stands the answer, at the left who gives it; wrong answers
are red. One's own images should look like the data set's: the digits are bright on dark. Next: attack.py.
"""

import time
from pathlib import Path

import torch
from torchvision.utils import save_image

from attack import pgd
from model import De3, add_noise
from support import cli, data, evaluation, pictures, runs, training

PICTURED = 8  # test images in defend.png


def arguments():
    parser = cli.stage_parser(__doc__)
    add = parser.add_argument
    add("photos", nargs="*", help="image files to purify and classify; give them before the flags")
    evaluation.evaluation_flags(parser, images=1000)
    add("--votes", type=cli.count, default=1, help="draws that De³ averages, default 1")
    add("--eps", type=cli.linf_eps, help="of the attack in defend.png, default 16/255 (color 4/255)")
    add("--steps", type=cli.count, default=20, help="of the attack in defend.png, default 20")
    add("--eot", type=cli.count, default=8, help="draws per gradient there, default 8")
    args = parser.parse_args()
    data.set_size(args)
    if args.photos:
        cli.refuse_unused(args, parser, ["split", "images", "eps", "steps", "eot"], "for photos")
    args.eps = args.eps or data.defaults(args.data)["eps"]
    return args


def purify_photos(args, defenses, checkpoint, device):
    """Label and confidence of each file under each defense; purified images are written."""
    transform = data.eval_transform(checkpoint["config"]["image_size"])
    photos = [(Path(name), transform(data.read_image(name))) for name in args.photos]
    folder, classes = runs.data_folder(args.runs, args.data) / "purified", checkpoint["classes"]
    for number, (path, image) in enumerate(photos):
        for words, run, _, de3 in defenses:
            with torch.no_grad():
                torch.manual_seed(args.seed)
                confidence, label = de3(image[None].to(device)).float().softmax(1)[0].max(0)
                torch.manual_seed(args.seed)  # the picture shows the draw that was classified
                purified = de3.purify(image[None].to(device))
            name = classes[label] if classes else label
            print(f"{path}  {words:>12}: {name} ({100 * confidence:.1f}%)")
            if de3.defended:
                level = de3.level.replace("σ = ", "sigma").replace(" ", "")
                target = evaluation.results_folder(folder, run)
                target.mkdir(parents=True, exist_ok=True)
                save_image(purified, target / f"{number}_{path.stem}_{level}.png")
    if any(de3.defended for _, _, _, de3 in defenses):
        print(f"wrote purified images to {folder}/")


def print_clean_accuracy(args, defenses, batches, images_in_all):
    """A table: accuracy on clean images, and PSNR of what the classifier sees, over sigma."""
    width = max(len(defense.words) for defense in defenses)
    print(f"{images_in_all} {args.split} images, votes {args.votes}, seed {args.seed}\n\n"
          f"{'defense':{width}}  clean accuracy %  PSNR dB  images/s")
    for words, _, _, de3 in defenses:
        training.seed_epoch(args.seed, 0)
        started, hits, decibels = time.time(), 0, 0
        for images, labels in batches:
            with torch.no_grad():
                hits += (de3(images).argmax(1) == labels).sum().item()
                decibels += pictures.psnr(de3.purify(images), images).sum().item()
        hits, decibels = cli.sum_over_processes(hits, decibels)
        quality = f"{decibels / images_in_all:7.2f}" if de3.defended else "      -"
        print(f"{words:{width}}  {100 * hits / images_in_all:16.1f}  {quality}  "
              f"{images_in_all / (time.time() - started):8.0f}", flush=True)


def draw_defense(path, args, undefended, de3, images, labels, classes):
    """defend.png: what an attack does without and with De³, and how De³ sees it."""
    torch.manual_seed(args.seed)
    fooling = pgd(undefended, images, labels, args.eps, args.steps)
    adversarial = pgd(de3, images, labels, args.eps, args.steps, eot=args.eot)
    with torch.no_grad():
        noisy, purified = adversarial, de3.purify(adversarial)
        if de3.sigma is not None:  # the noise that is shown is the noise removed
            noisy = add_noise(adversarial, de3.sigma.fixed)
            purified = noisy.clamp(0, 1)
            if de3.autoencoder is not None:
                purified = de3.autoencoder.reconstruct(noisy, adversarial).clamp(0, 1)

        def row(title, pictured, answering):
            predicted = answering(pictured.clamp(0, 1)).argmax(1)
            return pictures.Row(title, pictured, [classes[label] for label in predicted],
                                (predicted != labels).tolist())
        level = de3.level.replace("σ = ", "sigma ")  # the font has no Greek letters
        rows = [row("clean\n(undefended)", images, undefended),
                row("attacked\n(undefended)", fooling, undefended),
                row("attacked\nthrough De3\n(undefended)", adversarial, undefended),
                row("the same, noisy\n(undefended)", noisy, undefended),
                row(f"denoised\n(De3, {level})", purified, de3.classifier)]
    heading = ("Above, the true label; under each image the answer of the classifier in brackets, red "
               f"where wrong.\nPGD, {args.steps} steps, eps {255 * args.eps:.3g}/255; through De3 "
               f"({level}) with EOT {args.eot}.")
    pictures.draw_sheet(path, heading, [classes[label] for label in labels], rows)


def main():
    args = arguments()
    device = cli.open_device(args.device)
    defenses, checkpoint = evaluation.load_defenses(args, device, args.votes)
    with cli.autocast(args.bf16, device):
        if args.photos:
            if cli.rank() == 0:
                purify_photos(args, defenses, checkpoint, device)
            return
        own_images, images_in_all, classes = evaluation.load_test_images(args, checkpoint)
        batches = evaluation.test_batches(args, own_images, device)
        print_clean_accuracy(args, defenses, batches, images_in_all)

        # the picture: De³ at its middle level, beside the undefended classifier
        defended = [de3 for _, _, _, de3 in defenses if de3.defended]
        undefended = [de3 for _, _, _, de3 in defenses if not de3.defended]
        if not defended or cli.rank() > 0:
            return
        de3 = defended[len(defended) // 2]
        undefended = undefended[0] if undefended else De3(None, de3.classifier, None)
        few = data.evenly_spread(own_images, PICTURED)
        images, labels = next(iter(data.Loader(few, PICTURED, device=device)))
        path = runs.data_folder(args.runs, args.data) / "defend.png"
        draw_defense(path, args, undefended, de3, images, labels, classes)


if __name__ == "__main__":
    cli.run_script(main)
