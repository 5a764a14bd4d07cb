"""Stage 3, defend.py: what De³ does to clean images, over sigma, and to one's own photographs.

    python defend.py                          accuracy and PSNR over sigma, and defend.png
    python defend.py --sigma 0 25 50 75 100 --votes 5
    python defend.py photo.jpg another.png    label and confidence with and without the defense;
                                              purified images go to RUNS/<data>/purified/

defend.png shows, for a few test images: original, adversarial (PGD with EOT through De³), noisy and
denoised, with the predicted labels. Images of one's own should look like the data set's: the digits
are bright on dark.
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import save_image

import common
import data
from attack import evaluation_flags, load_defenses, load_test_images, pgd
from model import De3, add_noise


def arguments():
    result = common.parser(__doc__)
    add = result.add_argument
    add("photos", nargs="*", help="image files to purify and classify")
    evaluation_flags(add, images=1000)
    add("--eps", type=common.eps, default=16 / 255, help="of the attack in defend.png, 16/255")
    add("--steps", type=common.count, default=20, help="of the attack in defend.png, default 20")
    add("--eot", type=common.count, default=8, help="draws per gradient there, default 8")
    return common.fill_in(result.parse_args())


def level_text(defense):
    return f"sigma {defense.sigma}" if defense.sigma else (
        f"mask {defense.mask_ratio:g}" if defense.defended else "off")


def purify_photos(args, defenses, checkpoint, device):
    """Label and confidence of each file under each defense; purified images are written."""
    transform = data.eval_transform(checkpoint["config"]["image_size"])
    photos = [(Path(name), transform(data.read_image(name))) for name in args.photos]
    folder = common.runs_folder(args) / "purified"
    folder.mkdir(parents=True, exist_ok=True)
    for number, (path, image) in enumerate(photos):
        for _, defense in defenses:
            torch.manual_seed(args.seed)
            with torch.no_grad():
                confidence, label = defense(image[None].to(device)).softmax(1)[0].max(0)
                purified = defense.purify(image[None].to(device))
            level = level_text(defense)
            print(f"{path}  {level:>12}: {checkpoint['classes'][label]} ({100 * confidence:.1f}%)")
            if defense.defended:
                save_image(purified, folder / f"{number}_{path.stem}_{level.replace(' ', '')}.png")
    print(f"wrote purified images to {folder}/")


def picture(path, rows, classes):
    """Rows of images with a label under each: rows is a list of (title, images, predicted [N])."""
    cell, left, text = 64, 96, 14
    sheet = Image.new("RGB", (left + len(rows[0][1]) * (cell + 4), len(rows) * (cell + text + 4)),
                      "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, images, predicted) in enumerate(rows):
        top = i * (cell + text + 4)
        draw.text((4, top + cell // 2), title, fill="black")
        for j, image in enumerate(images.clamp(0, 1).cpu()):
            sheet.paste(to_pil_image(image).resize((cell, cell), Image.NEAREST),
                        (left + j * (cell + 4), top))
            draw.text((left + j * (cell + 4), top + cell), classes[predicted[j]][:10], fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"wrote {path}")


def main():
    args = arguments()
    device = common.pick_device(args.device)
    defenses, checkpoint = load_defenses(args, device)
    if args.photos:
        return purify_photos(args, defenses, checkpoint, device)
    batches = load_test_images(args, checkpoint)

    # clean accuracy, and the PSNR of what the classifier sees, over sigma
    print(f"{len(batches.dataset)} {args.split} images, votes {args.votes}, seed {args.seed}\n\n"
          f"{'defense':34} {'level':>12}  clean accuracy %  PSNR dB")
    for name, defense in defenses:
        torch.manual_seed(args.seed)
        hits, quality = [], []
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            with torch.no_grad():
                hits.append((defense(images).argmax(1) == labels).double())
                quality.append(common.psnr(defense.purify(images), images))
        shown = f"{torch.cat(quality).mean():7.2f}" if defense.defended else "      -"
        print(f"{name:34} {level_text(defense):>12}  {100 * torch.cat(hits).mean():16.1f}  {shown}")

    # the picture: the undefended classifier's answer first, then De³'s middle level
    defended = [defense for _, defense in defenses if defense.defended]
    if not defended:
        return
    defense = defended[len(defended) // 2]
    undefended = next((other for _, other in defenses if not other.defended),
                      De3(None, defense.classifier, None))
    images, labels = next(iter(data.loader(data.subset(batches.dataset, 10), 10)))
    images, labels = images.to(device), labels.to(device)
    torch.manual_seed(args.seed)
    fooling = pgd(undefended, images, labels, args.eps, args.steps)
    adversarial = pgd(defense, images, labels, args.eps, args.steps, eot=args.eot)
    with torch.no_grad():
        noisy = add_noise(adversarial, defense.sigma.a if defense.sigma else 0)
        purified = defense.purify(adversarial)
        rows = [(title, shown, model(shown.clamp(0, 1)).argmax(1)) for title, shown, model in [
            ("original", images, undefended), ("attacked,\nno defense", fooling, undefended),
            ("attacked\nthrough De3", adversarial, defense), ("noisy", noisy, undefended),
            ("denoised", purified, defense.classifier)]]
    picture(common.runs_folder(args) / "defend.png", rows, checkpoint["classes"])


if __name__ == "__main__":
    common.run_script(main)
