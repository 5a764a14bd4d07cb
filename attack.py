"""Stage 4, attack.py: PGD by hand, and the table of clean and robust accuracy over sigma.

    python attack.py                                 undefended against De³, on the digits
    python attack.py --classifier RUN ... --eps 4/255 --sigma off 0 50
    python attack.py --steps 100 --eot 16 --restarts 3 --loss ce margin       a stronger attack
    python attack.py --threat gray                   gradients of the classifier only

Every attack is white-box through the whole defense unless --threat gray. A random defense must be
attacked with EOT (pgd+eot): the gradient is averaged over --eot draws; plain pgd and fgsm see one
draw per step and overstate it. Robust accuracy is measured after the attack, on --draws fresh draws
of the defense (the mean over draws: one shot). Appends its rows to RUNS/<data>/attack.csv.
"""

import csv
import importlib.util
import os
import time
from pathlib import Path
from statistics import NormalDist

import torch
import torch.nn.functional as F

import common
import data
from model import De3, UserError, check_images


def margin(logits, labels):
    """Best other logit minus the label's, [B]: above 0 where the label is not predicted."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def objective(logits, labels, targets, loss):
    """What the attacker raises, [B]: cross-entropy or margin; of the target, negated, if given."""
    function = {"ce": lambda z, y: F.cross_entropy(z, y, reduction="none"), "margin": margin}[loss]
    return function(logits, labels) if targets is None else -function(logits, targets)


def input_gradient(model, images, labels, targets, loss, eot):
    """Gradient of the objective with respect to the images, averaged over eot draws of the model.

    Expectation over transformation (Athalye et al. 2018): a model that is random at every call has
    to be attacked through the mean over its randomness.
    """
    total = torch.zeros_like(images)
    with torch.enable_grad():
        for _ in range(eot):
            x = images.detach().requires_grad_()
            gain = objective(model(x), labels, targets, loss).sum()
            total += torch.autograd.grad(gain, x)[0]
    if not total.isfinite().all():
        raise UserError("the model's gradient with respect to its input is not finite")
    return total / eot


def project(x, images, eps, norm):
    """The nearest point to x in the eps-ball around the images, then in [0, 1]."""
    if norm == "linf":
        x = torch.minimum(torch.maximum(x, images - eps), images + eps)
    else:
        delta = x - images
        length = delta.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        x = images + delta * (eps / length).clamp(max=1)
    return x.clamp(0, 1)


def random_point(images, eps, norm):
    """A point drawn uniformly from the eps-ball around the images, clipped to [0, 1]."""
    if norm == "linf":
        delta = torch.empty_like(images).uniform_(-eps, eps)
    else:
        direction = F.normalize(torch.randn_like(images).flatten(1)).view_as(images)
        radius = torch.rand(len(images), 1, 1, 1).to(images) ** (1 / images[0].numel())
        delta = eps * radius * direction
    return (images + delta).clamp(0, 1)


def strongest(model, candidates, labels, targets=None, draws=10):
    """Of several adversarial versions of each image, the one to keep.

    Highest error rate over fresh draws of the model, then highest mean margin: to choose on a
    single evaluation of a random model picks luck, not strength.
    """
    best, best_errors, best_gain = None, None, None
    for x in candidates:
        with torch.no_grad():
            gains = torch.stack([objective(model(x), labels, targets, "margin")
                                 for _ in range(draws)])  # [draws, B]
        errors, gain = (gains > 0).double().mean(0), gains.mean(0)
        if best is None:
            best, best_errors, best_gain = x, errors, gain
            continue
        better = (errors > best_errors) | ((errors == best_errors) & (gain > best_gain))
        best = torch.where(better.view(-1, 1, 1, 1), x, best)
        best_errors, best_gain = errors.where(better, best_errors), gain.where(better, best_gain)
    return best


def pgd(model, images, labels, eps, steps, step_size=None, norm="linf", random_start=True,
        restarts=1, eot=1, targets=None, loss="ce"):
    """Projected gradient descent (Madry et al. 2018): adversarial images within eps, in [0, 1].

    model: [0, 1] images to logits, in evaluation mode. images [B, 3, H, W]; labels [B] (long).
    eps: radius; for norm "linf" in [0, 1] units (8/255), for "l2" the length over all pixels.
    step_size: default 2.5·eps/steps. FGSM is steps=1, step_size=eps, random_start=False.
    restarts: runs from so many starts and keeps the strongest (see there) for each image.
    eot: draws of a random model averaged in each gradient. loss: "ce" or "margin".
    targets [B]: classes to move to; None to move away from the labels.
    Raises UserError for images that are not floats in [0, 1] and for settings out of range.
    """
    check_images(images)
    if norm not in ("linf", "l2") or loss not in ("ce", "margin"):
        raise UserError(f"norm must be linf or l2, loss ce or margin, not {norm!r} and {loss!r}")
    if not 0 <= eps < float("inf") or (norm == "linf" and eps > 1):
        raise UserError(f"eps must be at least 0, and for linf at most 1 (8/255, say), not {eps}")
    if min(steps, restarts, eot) < 1 or (step_size is not None and not step_size >= 0):
        raise UserError("steps, restarts and eot must be at least 1, step_size not negative")
    step_size = 2.5 * eps / steps if step_size is None else step_size
    images, candidates = images.detach(), []
    for _ in range(restarts):
        x = random_point(images, eps, norm) if random_start else images
        for _ in range(steps):
            gradient = input_gradient(model, x, labels, targets, loss, eot)
            if norm == "linf":
                direction = gradient.sign()
            else:
                direction = F.normalize(gradient.flatten(1), eps=1e-30).view_as(images)
            x = project(x + step_size * direction, images, eps, norm)
        candidates.append(x)
    return candidates[0] if restarts == 1 else strongest(model, candidates, labels, targets)


FIELDS = ("defense sigma mask_ratio votes attack norm eps steps step_size restarts eot loss threat "
          "images seed clean_accuracy robust_accuracy seconds").split()


def evaluation_flags(add, images):
    """The flags of both evaluating stages."""
    add("--classifier", nargs="+", metavar="RUN", help="folders of finetune.py's runs; default: "
        "the undefended and the De³ classifier it makes by default")
    add("--autoencoder", metavar="RUN", help="default: the one the classifier was trained behind")
    add("--sigma", nargs="+", type=lambda text: text if text == "off" else common.number(float)(text),
        metavar="S", help="sigmas to test, 'off' for undefended; default off for an undefended "
        f"classifier, for De³ {data.DATASETS['digits']['test']} (digits) or "
        f"{data.DATASETS['FOLDER']['test']}")
    add("--mask-ratio", nargs="+", type=common.ratio, default=[0.25, 0.5, 0.75], metavar="R",
        help="behind MIM: ratios to test, default 0.25 0.5 0.75")
    add("--votes", type=common.count, default=1, help="draws that De³ averages for one answer, default 1")
    add("--split", choices=["train", "val", "test"], default="test",
        help="default test; only the digits tell val from test")
    add("--images", type=common.count, default=images, help=f"how many, evenly spread; default {images}")
    add("--batch-size", type=common.count, default=120, help="default 120")


def load_defenses(args, device, straight_through=True):
    """What --classifier, --autoencoder, --sigma, --mask-ratio and --votes ask for.

    Returns a list of (name of the run, De3 on the device) and the last classifier's checkpoint.
    """
    behind, defenses = common.default_autoencoder(args), []
    for folder in args.classifier or [common.variant(behind, args, "clean"), common.variant(
            behind, args, "de3", data.default(args, "finetune"))]:
        classifier, checkpoint = common.load_finished(folder, "classifier", common.command("finetune.py", args),
                                               device)
        mode, sigmas, ratios, autoencoder = checkpoint["mode"], args.sigma, [None], None
        if mode == "de3" or (mode == "clean" and sigmas and sigmas != ["off"]):
            inside = mode == "de3" or (Path(folder).parent / "checkpoint.pt").exists()
            source = args.autoencoder or (Path(folder).parent if inside else behind)
            autoencoder, pretraining = common.load_finished(source, "autoencoder",
                                                     common.command("pretrain.py", args), device)
            if mode == "de3" and not args.autoencoder and (
                    common.fingerprint(autoencoder) != checkpoint["settings"]["fingerprint"]):
                raise UserError(f"{folder} was trained behind another autoencoder than {source} now "
                                "holds: train it again with finetune.py --overwrite")
            if pretraining["task"] == "mim":
                sigmas, ratios = ["off"], args.mask_ratio
        sigmas = sigmas or (["off"] if mode == "clean" else data.default(args, "test").split())
        for sigma, ratio in [(sigma, ratio) for sigma in sigmas for ratio in ratios]:
            sigma = None if sigma == "off" else float(sigma)
            defenses.append((os.path.relpath(folder, common.runs_folder(args)), De3(
                autoencoder, classifier, sigma, ratio, checkpoint["keep_visible"], args.votes,
                straight_through).to(device).eval()))
    return defenses, checkpoint


def load_test_images(args, checkpoint):
    """Batches of the images --data, --split and --images ask for, sized for the classifier."""
    images = data.load_dataset(args.data, args.split, checkpoint["config"]["image_size"])
    if images.classes != checkpoint["classes"]:
        raise UserError(f"the classes of {args.data} are not those the classifier was trained on")
    return data.loader(data.subset(images, args.images), args.batch_size, workers=args.workers)


def accuracy(model, images, labels, draws):
    """Share of correct predictions of each image over fresh draws of the model: [B]."""
    with torch.no_grad():
        return torch.stack([(model(images).argmax(1) == labels).double()
                            for _ in range(draws)]).mean(0)


def interval(percent, images):
    """95% Wilson interval of an accuracy in percent, as text."""
    z, p = NormalDist().inv_cdf(0.975), percent / 100
    center, width = p + z**2 / (2 * images), z * (p * (1 - p) / images + z**2 / 4 / images**2) ** 0.5
    low, high = (100 * (center + sign * width) / (1 + z**2 / images) for sign in (-1, 1))
    return f"{percent:5.1f} [{low:4.1f}, {high:5.1f}]"


def check_adversarial(adversarial, images, eps, norm):
    """Stop the run unless every adversarial image lies in the ball and in [0, 1]."""
    check_images(adversarial)
    length = (adversarial - images).flatten(1).norm(p=torch.inf if norm == "linf" else 2, dim=1)
    if not (length <= eps + 1e-6 * max(1.0, eps)).all():
        raise UserError(f"an adversarial image left the ball: {length.max():.6f} over eps {eps:.6f}")


def append_row(path, row):
    """One more line in the table, which keeps the rows of earlier runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", newline="") as file:
        file.seek(0)
        if (header := file.readline().strip()) not in ("", ",".join(FIELDS)):
            raise UserError(f"{path} is not a table of attack.py: move it away")
        table = csv.DictWriter(file, FIELDS)
        if not header:
            table.writeheader()
        table.writerow(row)


def plot(path, rows, title):
    """Accuracy over sigma; one line for each defense, attack and eps. Needs matplotlib."""
    lines = {}
    for row in rows:
        if row["sigma"] != "":
            eps, name = f"eps {255 * float(row['eps']):.3g}/255", row["defense"]
            lines.setdefault((f"{name}, clean", "-"), {})[row["sigma"]] = row["clean_accuracy"]
            lines.setdefault((f"{name}, {row['attack']}, {eps}", {"fgsm": ":", "pgd": "--"}.get(
                row["attack"], "-.")), {})[row["sigma"]] = row["robust_accuracy"]
    if max(map(len, lines.values()), default=0) < 2 or not importlib.util.find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for number, ((label, style), points) in enumerate(lines.items()):
        axes.plot(points.keys(), points.values(), style, marker="osv^D*xP+"[number % 9], label=label)
    axes.set(xlabel="sigma at test time (8-bit units)", ylabel="accuracy (%)", ylim=(0, 100))
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=6)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"wrote {path}")


def arguments():
    result = common.parser(__doc__)
    add = result.add_argument
    evaluation_flags(add, images=120)
    add("--attack", nargs="+", choices=["fgsm", "pgd", "pgd+eot"], default=["fgsm", "pgd", "pgd+eot"],
        help="default: all three")
    add("--eps", nargs="+", type=common.eps, default=[8 / 255, 16 / 255], metavar="E",
        help="radii, default 8/255 16/255")
    add("--norm", choices=["linf", "l2"], default="linf", help="default linf")
    add("--steps", type=common.count, default=20, help="of pgd, default 20")
    add("--step-size", type=common.eps, help="of pgd, as 2/255; default 2.5 eps/steps")
    add("--restarts", type=common.count, default=1, help="of pgd, default 1")
    add("--eot", type=common.count, default=8, help="draws in each gradient of pgd+eot, default 8")
    add("--loss", nargs="+", choices=["ce", "margin"], default=["ce"],
        help="default ce; both: the stronger for each image")
    add("--threat", choices=["white", "gray"], default="white",
        help="white (default): through the defense; gray: gradients of the classifier only")
    add("--plain-clamp", action="store_true",
        help="gradients stop where De³ clamps; default: they go straight through")
    add("--draws", type=common.count, default=5, help="fresh draws that score a defense, default 5")
    return common.fill_in(result.parse_args())


def main():
    args = arguments()
    device = common.pick_device(args.device)
    defenses, checkpoint = load_defenses(args, device, not args.plain_clamp)
    batches = load_test_images(args, checkpoint)
    table, total, rows = common.runs_folder(args) / "attack.csv", len(batches.dataset), []
    title = (f"{total} {args.split} images, {args.norm}, {args.steps} steps, EOT {args.eot}, "
             f"{args.restarts} restart(s), loss {'+'.join(args.loss)}, {args.threat}-box, "
             f"seed {args.seed}")
    print(f"{title}; accuracy in % [95% interval]\n\n{'defense':34} {'sigma':>8} {'eps':>7}  "
          f"{'attack':8} {'clean':>19} {'robust':>19} {'seconds':>8}")
    for name, defense in defenses:
        random = defense.mask_ratio is not None or bool(defense.sigma and defense.sigma.b > 0)
        draws = args.draws if random else 1
        torch.manual_seed(args.seed)
        clean = torch.cat([accuracy(defense, images.to(device), labels.to(device), draws)
                           for images, labels in batches]).mean().item() * 100
        attacked = defense if args.threat == "white" else defense.classifier
        averaged = random and args.threat == "white"  # else every draw has the same gradient
        for eps, attack in [(eps, attack) for eps in args.eps for attack in args.attack]:
            if attack == "pgd+eot" and "pgd" in args.attack and not averaged:
                continue  # the same as pgd
            fgsm = attack == "fgsm"
            settings = dict(  # the attack itself
                steps=1 if fgsm else args.steps, norm=args.norm, random_start=not fgsm,
                step_size=eps if fgsm else args.step_size or 2.5 * eps / args.steps,
                restarts=1 if fgsm else args.restarts,
                eot=args.eot if attack == "pgd+eot" and averaged else 1)
            torch.manual_seed(args.seed)
            start, robust = time.time(), []
            for images, labels in batches:
                images, labels = images.to(device), labels.to(device)
                candidates = [pgd(attacked, images, labels, eps, loss=loss, **settings)
                              for loss in args.loss]
                adversarial = candidates[0] if len(candidates) == 1 else strongest(
                    attacked, candidates, labels)
                check_adversarial(adversarial, images, eps, args.norm)
                robust.append(accuracy(defense, adversarial, labels, draws))
            robust, seconds = torch.cat(robust).mean().item() * 100, time.time() - start
            level = defense.sigma.a if defense.sigma else ""
            rows.append({
                "defense": name, "sigma": level, "votes": args.votes, "attack": attack,
                "mask_ratio": "" if defense.mask_ratio is None else defense.mask_ratio,
                "norm": args.norm, "eps": f"{eps:.6g}", "steps": settings["steps"],
                "step_size": f"{settings['step_size']:.6g}", "eot": settings["eot"],
                "restarts": settings["restarts"], "loss": "+".join(args.loss),
                "threat": args.threat + "-plainclamp" * args.plain_clamp, "images": total,
                "seed": args.seed, "clean_accuracy": round(clean, 2),
                "robust_accuracy": round(robust, 2), "seconds": round(seconds, 1)})
            append_row(table, rows[-1])
            shown = "off" if not defense.defended else (
                f"{level:g}" if level != "" else f"mask {defense.mask_ratio:g}")
            radius = f"{255 * eps:g}/255" if args.norm == "linf" else f"{eps:g}"
            print(f"{name:34} {shown:>8} {radius:>7}  {attack:8} {interval(clean, total):>19} "
                  f"{interval(robust, total):>19} {seconds:8.1f}", flush=True)
    print(f"\nwrote {table}")
    plot(table.with_name("tradeoff.png"), rows, title)


if __name__ == "__main__":
    common.run_script(main)
