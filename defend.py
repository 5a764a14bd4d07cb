"""Stage 3, defend.py: what De³ does to clean images, over sigma, and to one's own photographs.

    python defend.py                          accuracy and PSNR over sigma, and defend.png
    python defend.py --sigma 0 25 50 75 100 --votes 5
    python defend.py --certify                randomized smoothing: what no L2 attack can change
    python defend.py --dial 0 1 2             the paper's comparison over sigma, with seeds 0, 1, 2
    python defend.py photo.jpg another.png    label and confidence with and without the defense;
                                              purified images go to RUNS/<data>/purified/

defend.png shows, for a few test images: original; attacked without the defense (PGD); attacked through
De³ (PGD with EOT); that one with noise; and denoised. The label under an image is the undefended
classifier's, in the last row that of the classifier behind De³. Images of one's own should look like
the data set's: the digits are bright on dark.
"""

import csv
import importlib.util
import io
import math
import os
import re
import time
from pathlib import Path
from statistics import NormalDist, mean, stdev

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import save_image

import common
import data
from model import De3, UserError, add_noise


def evaluation_flags(add, images):
    """The flags of both evaluating stages."""
    add("--classifier", nargs="+", type=common.run_path, metavar="RUN",
        help="folders of finetune.py's runs, or files of published weights; default: the undefended "
        "and the De³ classifier made by default")
    add("--autoencoder", type=common.run_path, metavar="RUN",
        help="folder or file; default: the one the classifier was trained behind")
    add("--sigma", nargs="+", metavar="S",
        type=lambda text: text if text == "off" else common.number(float)(text),
        help="sigmas to test, 'off' for undefended; default off and, for De³, "
        f"{data.DATASETS['digits']['test']} (digits) or {data.DATASETS['FOLDER']['test']}; a "
        "classifier given by --classifier is tested at all of them, also one trained undefended")
    add("--mask-ratio", nargs="+", type=common.ratio, default=[0.25, 0.5, 0.75], metavar="R",
        help="behind MIM: ratios to test, default 0.25 0.5 0.75")
    add("--votes", type=common.count, default=1, help="draws that De³ averages, default 1")
    add("--split", choices=["train", "val", "test"], default="test",
        help="default test; only the digits tell val from test")
    add("--images", type=common.count, help=f"how many, evenly spread; default {images}")
    add("--batch-size", type=common.count, default=120, help="default 120")


def load_defenses(args, device, straight_through=True):
    """What --classifier, --autoencoder, --sigma, --mask-ratio and --votes ask for.

    Returns a list of (name of the run, De3 on the device) and the last classifier's checkpoint.
    """
    behind, defenses = common.default_autoencoder(args), []
    for folder in args.classifier or common.default_classifiers(args):
        classifier, checkpoint = common.load_finished(folder, "classifier", device, args)
        mode, autoencoder, ratios = checkpoint["mode"], None, [None]
        sigmas = args.sigma or (["off"] if mode == "clean" else data.default(args, "test").split())
        if not args.classifier:  # the default pair: each as it was trained
            sigmas = [sigma for sigma in sigmas if (sigma == "off") == (mode == "clean")]
        if mode == "de3" or (mode == "clean" and set(sigmas) - {"off"}):
            inside = mode == "de3" or (folder.parent / "checkpoint.pt").exists()
            source = args.autoencoder or (folder.parent if inside else behind)
            autoencoder, pretraining = common.load_finished(source, "autoencoder", device, args)
            if mode == "de3" and not args.autoencoder and (
                    common.fingerprint(autoencoder) != checkpoint["settings"].get("autoencoder")):
                raise UserError(f"{folder} was trained behind another autoencoder than {source} now "
                                "holds: train it again with finetune.py --overwrite")
            if pretraining["task"] == "mim":
                sigmas, ratios = ["off"], args.mask_ratio
        for sigma, ratio in [(sigma, ratio) for sigma in sigmas for ratio in ratios]:
            sigma = None if sigma == "off" else float(sigma)
            defenses.append((os.path.relpath(folder, common.runs_folder(args)), De3(
                autoencoder, classifier, sigma, ratio, checkpoint["keep_visible"], args.votes,
                straight_through).to(device).eval()))
        common.compile_models(args, device, autoencoder, classifier)
    return defenses, checkpoint


def load_test_images(args, checkpoint):
    """What --data, --split and --images ask for: this process's share, number of all, classes."""
    images = data.load_dataset(args.data, args.split, checkpoint["config"]["image_size"])
    if len(images.classes) != checkpoint["config"]["num_classes"] or (
            images.classes != (checkpoint["classes"] or images.classes)):
        raise UserError(f"the classes of {args.data} are not those the classifier was trained on")
    share = data.subset(images, args.images, common.rank(), common.world())
    return share, min(args.images, len(images)), images.classes


def arguments():
    result = common.parser(__doc__)
    add = result.add_argument
    add("photos", nargs="*", help="image files to purify and classify; give them before the flags")
    evaluation_flags(add, images="1000")
    add("--eps", type=common.eps, default=16 / 255, help="of the attack in defend.png, 16/255")
    add("--steps", type=common.count, default=20, help="of the attack in defend.png, default 20")
    add("--eot", type=common.count, default=8, help="draws per gradient there, default 8")
    add("--dial", nargs="+", type=common.number(int), metavar="SEED", help="mean and spread over "
        "these seeds of the defenses in DIAL, on the digits; names the models that are missing")
    add("--certify", action="store_true", help="certified accuracy of the majority vote over noise")
    add("--n0", type=common.count, default=100, help="draws that guess the class, default 100")
    add("--n", type=common.number(int, 10), default=1000,  # fewer cannot bound it above 1/2
        help="draws that bound its probability, at least 10, default 1000")
    args = common.fill_in(result.parse_args())
    args.images = args.images or 1000
    return args


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
            level, names = level_text(defense), checkpoint["classes"]
            print(f"{path}  {level:>12}: {names[label] if names else label} ({100 * confidence:.1f}%)")
            if defense.defended:
                save_image(purified, folder / f"{number}_{path.stem}_{level.replace(' ', '')}.png")
    if any(defense.defended for _, defense in defenses):
        print(f"wrote purified images to {folder}/")


def lower_bound(hits, draws, alpha=0.001):
    """Clopper-Pearson: with confidence 1 - alpha the probability of a hit is at least this.

    The alpha-quantile of Beta(hits, draws - hits + 1), that is the p at which so many hits or more
    of so many draws have probability alpha; by bisection.
    """
    k = torch.arange(hits, draws + 1, dtype=torch.float64)
    ways = math.lgamma(draws + 1) - torch.lgamma(k + 1) - torch.lgamma(draws - k + 1)
    low, high = 0.0, 1.0
    for _ in range(50 if hits else 0):
        p = (low + high) / 2
        tail = (ways + k * math.log(p) + (draws - k) * math.log1p(-p)).exp().sum()
        low, high = (p, high) if tail < alpha else (low, p)
    return low


def certify(defense, image, n0, n, max_batch):
    """Cohen et al. 2019 for one image [3, H, W]: (class or None to abstain, hits, L2 radius).

    It holds, with 99.9% confidence, for the class that De³ gives most often over its noise, not for
    one draw. Raises UserError where the theorem does not apply.
    """
    if defense.mask_ratio is not None or not defense.sigma or defense.sigma.kind or not defense.sigma.a:
        raise UserError("a certificate needs Gaussian noise: one --sigma above 0, no masking")
    if getattr(defense.autoencoder, "norm_pix", False):
        raise UserError("no certificate with norm_pix: it carries patch statistics of the image around "
                        "the noise")
    if defense.votes != 1:
        raise UserError("a certificate is for the majority of single draws: leave --votes at 1")

    def counts(draws):
        total = 0
        for first in range(0, draws, max_batch):
            with torch.no_grad():
                logits = defense(image.expand(min(max_batch, draws - first), -1, -1, -1))
            total = total + logits.argmax(1).bincount(minlength=logits.shape[1])
        return total

    label = counts(n0).argmax().item()  # guessed from draws of its own
    hits = counts(n)[label].item()
    p = lower_bound(hits, n)
    if p <= 0.5:
        return None, hits, 0.0
    return label, hits, defense.sigma.a / 255 * NormalDist().inv_cdf(p)


def certify_all(args, defenses, share, device):
    """For each defense the table of certified accuracy over radii; certify.csv has a row per image."""
    if common.world() > 1:
        raise UserError("--certify runs in one process, without torchrun")
    noisy = [item for item in defenses if item[1].sigma and item[1].sigma.a > 0]
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow("defense sigma image label predicted hits draws l2_radius".split())
    for name, defense in defenses if args.sigma or not noisy else noisy:
        common.seed_epoch(args.seed, 0)
        radii = []  # -1 where the vote is wrong
        for number, (image, label) in enumerate(share):
            predicted, hits, radius = certify(defense, image.to(device), args.n0, args.n, args.max_batch)
            radii.append(radius if predicted == label else -1.0)
            table.writerow([name, defense.sigma, number, int(label),
                            "ABSTAIN" if predicted is None else predicted, hits, args.n, f"{radius:.6f}"])
        print(f"{name}, sigma {defense.sigma}: {len(share)} {args.split} images, class from {args.n0} "
              f"draws, bound from {args.n}, 99.9% confidence, seed {args.seed}\n\n"
              "L2 radius  certified accuracy %")
        most = defense.sigma.a / 255 * NormalDist().inv_cdf(lower_bound(args.n, args.n))
        corners = {k / 255 * image.numel() ** 0.5: f"  a corner of the Linf ball of {k}/255"
                   for k in (8, 16)}
        for radius in sorted([*corners, *(step * most / 8 for step in range(9))]):
            certified = sum(found >= radius for found in radii) / len(radii)
            print(f"{radius:9.2f}  {100 * certified:20.1f}{corners.get(radius, '')}")
        print(f"\nThe radius is an L2 length over all pixels; {args.n} draws certify {most:.2f} at most "
              "(--n).\n", flush=True)
    path = common.runs_folder(args) / "certify.csv"
    common.write_whole(path, lambda file: file.write(text.getvalue().encode()))
    print(f"wrote {path}")


def plot(path, rows, title):
    """attack.py's rows over sigma: a line for each defense, attack and eps, mean ± deviation of seeds.

    What has no sigma (undefended, adversarial training) is a level line; masking has no place here.
    Needs matplotlib.
    """
    lines = {}
    for row in rows:
        name, eps = re.sub(r"_seed\d+", "", row["defense"]), f"eps {255 * float(row['eps']):.3g}/255"
        found = [("clean", "clean_accuracy"), (f"{row['attack']}, {eps}", "robust_accuracy")]
        if row["attack"] == "pgd" and row["sigma"] == 0:  # nothing to average: the same under EOT
            found.append((f"pgd+eot, {eps}", "robust_accuracy"))
        for what, column in found if row["mask_ratio"] == "" else ():
            lines.setdefault((name, what), {}).setdefault(row["sigma"], []).append(row[column])
    sigmas = {row["sigma"] for row in rows} - {""}
    names = list(dict.fromkeys(name for name, _ in lines))
    if common.rank() > 0 or len(sigmas) < 2 or not importlib.util.find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for (name, what), points in lines.items():
        if "" in points:
            points = dict.fromkeys((min(sigmas), max(sigmas)), points[""])
        spread = [stdev(values) if len(values) > 1 else 0 for values in points.values()]
        style = {"clean": "-", "fgsm": ":", "pgd": "--"}.get(what.split(",")[0], "-.")
        axes.errorbar(list(points), [mean(values) for values in points.values()], spread, linestyle=style,
                      marker="osv^D*xP+"[names.index(name) % 9], color=f"{names.index(name) % 5 * 0.15}",
                      capsize=2, linewidth=1, label=f"{name}, {what}")
    axes.set(xlabel="sigma at test time (8-bit units)", ylabel="accuracy (%)", ylim=(0, 100))
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=5, loc="upper left", bbox_to_anchor=(1, 1))
    common.write_whole(path, lambda file: figure.savefig(file, dpi=150, bbox_inches="tight"))
    print(f"wrote {path}")


DIAL = {  # of the digits: (run, what finetune.py makes it with, sigmas or mask ratios to test)
    "undefended": ("nim_gamma10-12/clean", "--clean", ""),
    "adversarial training": ("nim_gamma10-12/clean_adversarial16", "--adversarial 16/255", ""),
    "noise only": ("nim_gamma10-12/no-denoise_uniform100-400", "--no-denoise", "--sigma 100 200"),
    "NIM, Gamma(10, 12)": ("nim_gamma10-12/de3_uniform100-400", "--de3", "--sigma 0 100 200"),
    "NIM, fixed 120": ("nim_120/de3_uniform100-400", "--de3", "--sigma 0 100 200"),
    "NIM, Gamma(25, 3)": ("nim_gamma25-3/de3_uniform0-30", "--de3 --sigma uniform:0,30",
                          "--sigma 0 100 200"),
    "MIM, whole output": ("mim_0.75/de3", "--de3", "--mask-ratio 0.5 0.75"),
    "MIM, visible kept": ("mim_0.75/de3_visible", "--de3 --keep-visible", "--mask-ratio 0.5 0.75"),
}
PRETRAINED = {"nim_gamma10-12": "", "nim_120": "--sigma 120", "nim_gamma25-3": "--sigma gamma:25,3",
              "mim_0.75": "--task mim"}


def dial(args):
    """The comparison the paper makes: every defense of DIAL under the same attack, over seeds."""
    import attack  # here, because attack.py imports this file
    if args.data != "digits":
        raise UserError("--dial is for the digits")
    folders, missing, cells, rows = {}, {}, {}, []
    for label, (run, made_with, levels) in DIAL.items():
        for seed in args.dial:
            suffix, seeded = (f"_seed{seed}", f" --seed {seed}") if seed else ("", "")
            seeded += f" --runs {args.runs}" if args.runs != "runs" else ""
            pretrained, classifier = run.split("/")
            source = common.runs_folder(args) / (pretrained + suffix)
            folder = source / (classifier + suffix)
            if not (source / "checkpoint.pt").exists():
                missing["python pretrain.py " + PRETRAINED[pretrained] + seeded] = None
            if not (folder / "checkpoint.pt").exists():
                missing[f"python finetune.py --autoencoder {source} {made_with}{seeded}"] = None
            folders[label, seed] = ["--classifier", str(folder), *levels.split(), "--seed", str(seed)]
    if missing:
        raise UserError("models are missing; make them with: " + " && ".join(missing))
    for (label, _), flags in folders.items():
        for row in attack.main(flags + ["--runs", args.runs] + (
                f"--attack pgd pgd+eot --eps {args.eps} --steps {args.steps} --eot {args.eot} --images "
                f"{args.images} --split {args.split} --device {args.device}").split()):
            level = f"sigma {row['sigma']:g}" if row["sigma"] != "" else f"mask {row['mask_ratio']}"
            cell = cells.setdefault((label, "off" if level == "mask " else level), {})
            cell.setdefault("clean" if row["attack"] == "pgd" else "", []).append(row["clean_accuracy"])
            cell.setdefault(row["attack"], []).append(row["robust_accuracy"])
            rows.append(row)
    caption = (f"{rows[0]['images']} {args.split} images, PGD of {args.steps} steps at eps "
               f"{255 * args.eps:g}/255, EOT {args.eot}, seeds {args.dial}")
    print(f"\n{caption}: mean ± standard deviation in %\n\n{'':22} {'level':>10}  {'clean':>12}  "
          f"{'without EOT':>12}  {'with EOT':>12}")
    for (label, level), cell in cells.items():
        shown = [f"{mean(cell[key]):5.1f} ± {stdev(cell[key]) if len(cell[key]) > 1 else 0:4.1f}"
                 for key in ("clean", "pgd", "pgd+eot" if "pgd+eot" in cell else "pgd")]
        print(f"{label:22} {level:>10}  " + "  ".join(f"{text:>12}" for text in shown))
    plot(common.runs_folder(args) / "tradeoff.png", rows, caption)


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
    common.write_whole(path, lambda file: sheet.save(file, "png"))
    print(f"wrote {path}")


def main():
    args = arguments()
    device = common.start(args)
    if args.dial:
        dial(args)
        return
    defenses, checkpoint = load_defenses(args, device)
    if args.photos:
        if common.rank() == 0:
            purify_photos(args, defenses, checkpoint, device)
        return
    share, images_in_all, classes = load_test_images(args, checkpoint)
    if args.certify:
        certify_all(args, defenses, share, device)
        return
    batches = data.loader(share, min(args.batch_size, args.max_batch), args.workers)

    # clean accuracy, and the PSNR of what the classifier sees, over sigma
    print(f"{images_in_all} {args.split} images, votes {args.votes}, seed {args.seed}\n\n"
          f"{'defense':34} {'level':>12}  clean accuracy %  PSNR dB  images/s")
    for name, defense in defenses:
        common.seed_epoch(args.seed, 0)
        start, hits, quality = time.time(), 0, 0
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            with torch.no_grad():
                hits += (defense(images).argmax(1) == labels).sum().item()
                quality += common.psnr(defense.purify(images), images).sum().item()
        hits, quality = (value / images_in_all for value in common.total(hits, quality))
        shown = f"{quality:7.2f}" if defense.defended else "      -"
        print(f"{name:34} {level_text(defense):>12}  {100 * hits:16.1f}  {shown}  "
              f"{images_in_all / (time.time() - start):8.0f}")

    # the picture: the undefended classifier's answer first, then De³'s middle level
    defended = [defense for _, defense in defenses if defense.defended]
    if not defended or common.rank() > 0:
        return
    defense = defended[len(defended) // 2]
    undefended = next((other for _, other in defenses if not other.defended),
                      De3(None, defense.classifier, None))
    from attack import pgd  # here, because attack.py imports this file
    images, labels = next(iter(data.loader(data.subset(share, 10), 10)))
    images, labels = images.to(device), labels.to(device)
    torch.manual_seed(args.seed)
    fooling = pgd(undefended, images, labels, args.eps, args.steps)
    adversarial = pgd(defense, images, labels, args.eps, args.steps, eot=args.eot)
    with torch.no_grad():
        noisy = add_noise(adversarial, defense.sigma.a if defense.sigma else 0)
        if defense.sigma and defense.autoencoder:  # the noise that is shown is the noise removed
            purified = defense.autoencoder.reconstruct(noisy, adversarial).clamp(0, 1)
        else:
            purified = defense.purify(adversarial)
        rows = [(title, shown, model(shown.clamp(0, 1)).argmax(1)) for title, shown, model in [
            ("original", images, undefended), ("attacked,\nno defense", fooling, undefended),
            ("attacked\nthrough De3", adversarial, undefended), ("noisy", noisy, undefended),
            ("denoised", purified, defense.classifier)]]
    picture(common.runs_folder(args) / "defend.png", rows, classes)


if __name__ == "__main__":
    common.run_script(main)
