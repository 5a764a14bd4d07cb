"""Stage 4, attack.py: PGD by hand, and the table of clean and robust accuracy over sigma.

    python attack.py                                 undefended against De³, on the digits
    python attack.py --classifier RUN ... --eps 4/255 --sigma off 0 50
    python attack.py --steps 100 --eot 16 --restarts 3 --loss ce margin       a stronger attack
    python attack.py --threat gray                   gradients of the classifier only
    python attack.py --audit                         is the attack strong enough to be believed?

Every attack is white-box through the whole defense unless --threat gray. A random defense must be
attacked with EOT (pgd+eot): the gradient is averaged over --eot draws; plain pgd and fgsm see one
draw per step and overstate it. Robust accuracy is measured after the attack, on --draws fresh draws
of the defense (the mean over draws: one shot). Appends its rows to RUNS/<data>/attack.csv; draws
RUNS/<data>/tradeoff.png anew, from this run's rows, when these hold two sigmas or more.
"""

import csv
import sys
import time
from statistics import NormalDist

import torch
import torch.nn.functional as F

import common
import data
from defend import evaluation_flags, load_defenses, load_test_images, plot
from model import UserError, check_images


def margin(logits, labels):
    """Best other logit minus the label's, [B]: above 0 where the label is not predicted."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def objective(logits, labels, targets, loss):
    """What the attacker raises, [B]: cross-entropy or margin; of the target, negated, if given."""
    function = {"ce": lambda z, y: F.cross_entropy(z, y, reduction="none"), "margin": margin}[loss]
    return function(logits, labels) if targets is None else -function(logits, targets)


def input_gradient(model, images, labels, targets, loss, eot, max_batch=None):
    """Gradient of the objective with respect to the images, averaged over eot draws of the model.

    Expectation over transformation (Athalye et al. 2018): a model that is random at every call has
    to be attacked through the mean over its randomness. As many draws go through the model at once
    as max_batch images allow (one if None). Also returns the share of draws that err: [B].
    """
    total, errors = torch.zeros_like(images), torch.zeros(len(images), device=images.device)
    together = max(1, (max_batch or 1) // max(1, len(images)))
    for first in range(0, eot, together):
        draws = min(together, eot - first)
        y, aim = labels.repeat(draws), targets if targets is None else targets.repeat(draws)
        with torch.enable_grad():
            x = images.detach().requires_grad_()
            logits = model(x.repeat(draws, 1, 1, 1))
            total += torch.autograd.grad(objective(logits, y, aim, loss).sum(), x)[0]
        errors += (objective(logits.detach(), y, aim, "margin") > 0).view(draws, -1).sum(0)
    if not total.isfinite().all():
        raise UserError("the model's gradient with respect to its input is not finite")
    return total / eot, errors / eot


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
    with torch.no_grad():
        gains = torch.stack([torch.stack([objective(model(x), labels, targets, "margin")
                                          for _ in range(draws)]) for x in candidates])
    errors, gain = (gains > 0).double().mean(1), gains.mean(1)  # [candidates, B]
    best = gain.where(errors == errors.amax(0), -torch.inf).argmax(0)
    return torch.stack(candidates)[best, torch.arange(len(labels), device=best.device)]


def pgd(model, images, labels, eps, steps, step_size=None, norm="linf", random_start=True,
        restarts=1, eot=1, targets=None, loss="ce", early_stop=False, max_batch=None):
    """Projected gradient descent (Madry et al. 2018): adversarial images within eps, in [0, 1].

    model: [0, 1] images to logits, in evaluation mode. images [B, 3, H, W]; labels [B] (long).
    eps: radius; for norm "linf" in [0, 1] units (8/255), for "l2" the length over all pixels.
    step_size: default 2.5·eps/steps. FGSM is steps=1, step_size=eps, random_start=False.
    restarts: runs from so many starts and keeps the strongest (see there) for each image.
    eot: draws of a random model averaged in each gradient. loss: "ce" or "margin".
    targets [B]: classes to move to; None to move away from the labels.
    early_stop: leave an image as it is once it fools the model. Only for deterministic models: on a
        random one it stops at lucky draws.
    max_batch: draws of EOT run together up to so many images; None: one draw at a time.
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
        x = random_point(images, eps, norm) if random_start else images.clone()
        todo = torch.arange(len(images), device=images.device)  # without early_stop: all, always
        for _ in range(steps):
            gradient, errors = input_gradient(model, x[todo], labels[todo], targets if targets is None
                                              else targets[todo], loss, eot, max_batch)
            if early_stop:
                todo, gradient = todo[errors == 0], gradient[errors == 0]
            direction = gradient.sign() if norm == "linf" else F.normalize(
                gradient.flatten(1), eps=1e-30).view_as(gradient)
            x[todo] = project(x[todo] + step_size * direction, images[todo], eps, norm)
        candidates.append(x)
    return candidates[0] if restarts == 1 else strongest(model, candidates, labels, targets)


FIELDS = ("defense sigma mask_ratio votes attack norm eps steps step_size restarts eot loss threat "
          "images seed clean_accuracy robust_accuracy seconds").split()


def accuracy(model, images, labels, draws):
    """Share of correct predictions of each image over fresh draws of the model: [B]."""
    with torch.no_grad():
        return torch.stack([(model(images).argmax(1) == labels).double()
                            for _ in range(draws)]).mean(0)


def robust_hits(defense, attacked, batches, device, eps, norm, losses, draws, settings):
    """Attack every batch, check the ball, score on fresh draws: the sum of `accuracy` over images."""
    hits = 0.0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        candidates = [pgd(attacked, images, labels, eps, norm=norm, loss=loss, **settings)
                      for loss in losses]
        adversarial = strongest(attacked, candidates, labels) if len(losses) > 1 else candidates[0]
        check_adversarial(adversarial, images, eps, norm)
        hits += accuracy(defense, adversarial, labels, draws).sum().item()
    return hits


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
    if common.rank() > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", newline="") as file:
        file.seek(0)
        if (header := file.readline().strip()) not in ("", ",".join(FIELDS)):
            raise UserError(f"{path} is not a table of attack.py: move it away")
        table = csv.DictWriter(file, FIELDS)
        if not header:
            table.writeheader()
        table.writerow(row)


def audit(defense, images, labels, eps, steps, eot, draws, max_batch):
    """Checks of a De3 and of the attack on it: a list of (what must hold, figures, holds).

    After Athalye et al. 2018 and Carlini et al. 2019. Accuracies are compared image by image; a
    difference counts beyond 3 standard errors.
    """
    def attacked(model=defense, **changes):
        settings = {**dict(eps=eps, steps=steps, eot=eot, max_batch=max_batch), **changes}
        adversarial.append(pgd(model, images, labels, **settings))
        check_adversarial(adversarial[-1], images, settings["eps"], "linf")
        return accuracy(defense, adversarial[-1], labels, draws)

    def above(a, b):
        difference = a - b
        return bool(difference.mean() > 3 * difference.std() / len(difference) ** 0.5)

    def check(name, holds, *figures):
        shown = [a if isinstance(a, str) else f"{100 * a.mean():.1f}" for a in figures]
        checks.append((name, ", ".join(shown), bool(holds)))

    adversarial, checks = [], []
    clean = accuracy(defense, images, labels, draws)
    with torch.enable_grad():  # a defense must not notice that it is being differentiated
        x = images.clone().requires_grad_()
        watched = torch.stack([(defense(x).argmax(1) == labels).double() for _ in range(draws)]).mean(0)
        gradient, = torch.autograd.grad(objective(defense(x), labels, None, "ce").sum(), x,
                                        allow_unused=True, materialize_grads=True)
    check("accuracy is the same while gradients are taken",
          not above(clean, watched) and not above(watched, clean), clean, watched)
    dead = ((gradient == 0) | ~gradient.isfinite()).double()
    check("under 5% of the input gradients are zero or not finite", dead.mean() < 0.05, dead)
    zero = attacked(eps=0.0, steps=1, eot=1)
    check("accuracy at eps 0 is clean accuracy", not above(clean, zero) and not above(zero, clean),
          clean, zero)
    shaken = (images + eps * torch.randn_like(images).sign()).clamp(0, 1)
    noise = accuracy(defense, shaken, labels, draws)
    check("random noise of this eps costs under 10 points", clean.mean() - noise.mean() < 0.1,
          clean, noise)
    base = attacked()
    strong = adversarial[-1]
    for name, other in [
            ("FGSM is no stronger than PGD", dict(steps=1, step_size=eps, random_start=False, eot=1)),
            ("twice the steps change nothing", dict(steps=2 * steps)),
            ("twice the EOT draws change nothing", dict(eot=2 * eot)),
            ("the margin loss is no stronger", dict(loss="margin")),
            ("gray-box is no stronger than white-box", dict(model=defense.classifier, eot=1)),
            ("the plain clamp's gradient is no stronger", {})]:
        defense.straight_through = bool(other)
        result = attacked(**other)
        check(name, not above(base, result), base, result)
    defense.straight_through = True
    attacked()
    best = strongest(defense, [strong, adversarial[-1]], labels)
    twice = accuracy(defense, best, labels, draws)
    check("a second restart changes nothing", not above(base, twice), base, twice)
    larger = [base] + [attacked(eps=factor * eps, eot=2) for factor in (2, 4, 8) if factor * eps <= 1]
    check("robust accuracy falls with eps, to under 5%", larger[-1].mean() < 0.05 and not any(
        above(b, a) for a, b in zip(larger, larger[1:])), *larger)
    shots, votes = [], defense.votes
    for defense.votes, x in ((1, images), (1, strong), (10, images), (10, strong)):
        with torch.no_grad():
            hits = torch.stack([(defense(x).argmax(1) == labels).double() for _ in range(10)])
        shots.append((hits.mean(0), f"{100 * hits.mean():.1f} ± {100 * hits.mean(1).std():.1f} / "
                                    f"{100 * hits.amin(0).mean():.1f}"))
    defense.votes = votes
    check("one shot ± spread / right in all of ten tries, clean, attacked, and both with 10 votes; votes "
          "are no worse", not above(shots[1][0], shots[3][0]), *[shown for _, shown in shots])
    return checks


def arguments(argv=None):
    result = common.parser(__doc__)
    add = result.add_argument
    evaluation_flags(add, images="80, with --audit 120")
    add("--attack", nargs="+", choices=["fgsm", "pgd", "pgd+eot"], default=["fgsm", "pgd", "pgd+eot"],
        help="default: all three")
    add("--eps", nargs="+", type=common.eps, default=[8 / 255, 16 / 255], metavar="E",
        help="radii, default 8/255 16/255")
    add("--norm", choices=["linf", "l2"], default="linf", help="default linf")
    add("--steps", type=common.count, default=20, help="of pgd, default 20")
    add("--step-size", type=common.eps, help="of pgd, as 2/255; default 2.5 eps/steps")
    add("--restarts", type=common.count, default=1, help="of pgd, default 1")
    add("--eot", type=common.count, default=8, help="draws in each gradient of pgd+eot, default 8")
    add("--loss", nargs="+", choices=["ce", "margin"], default=["ce"], help="both: the stronger one")
    add("--threat", choices=["white", "gray"], default="white", help="gray: the classifier alone")
    add("--plain-clamp", action="store_true", help="no gradient where De³ clamps; default: straight")
    add("--draws", type=common.count, default=5, help="fresh draws that score a defense, default 5")
    add("--audit", action="store_true", help="check the last defense chosen (default De³), and the "
        "attack, at the largest eps; exit code 1 if anything is suspicious")
    args = common.fill_in(result.parse_args(argv))
    args.images = args.images or (120 if args.audit else 80)
    if args.norm == "linf" and max(args.eps) > 1:
        raise UserError(f"--eps {max(args.eps):g} is more than the range of the pixels, 1; write 8/255")
    return args


def main(argv=None):
    args = arguments(argv)
    device = common.start(args)
    defenses, checkpoint = load_defenses(args, device, not args.plain_clamp)
    share, images_in_all, _ = load_test_images(args, checkpoint)
    batches = data.loader(share, min(args.batch_size, args.max_batch), args.workers)
    if args.audit:
        if common.world() > 1 or args.norm != "linf" or args.threat != "white" or args.plain_clamp:
            raise UserError("--audit is linf and white-box, in one process, and tries both gradients of "
                            "the clamp: leave out torchrun, --norm, --threat and --plain-clamp")
        name, defense = defenses[-1]
        images, labels = (torch.cat(values).to(device) for values in zip(*batches))
        common.seed_epoch(args.seed, 0)
        checks = audit(defense, images, labels, max(args.eps), args.steps, args.eot, args.draws,
                       args.max_batch)
        print(f"audit of {name}, sigma {defense.sigma}: {len(images)} images, eps "
              f"{255 * max(args.eps):g}/255, {args.steps} steps, EOT {args.eot}; accuracy in %\n")
        for check, figures, holds in checks:
            print(f"{'holds     ' if holds else 'SUSPICIOUS'}  {check}: {figures}")
        sys.exit(0 if all(holds for *_, holds in checks) else 1)
    table, rows = common.runs_folder(args) / "attack.csv", []
    title = (f"{images_in_all} {args.split} images, {args.norm}, {args.steps} steps, EOT {args.eot}, "
             f"{args.restarts} restart(s), loss {'+'.join(args.loss)}, {args.threat}-box, "
             f"{'plain clamp, ' * args.plain_clamp}{args.draws} draws, votes {args.votes}, "
             f"seed {args.seed}")
    print(f"{title}; accuracy in % [95% interval]\n\n{'defense':34} {'sigma':>8} {'eps':>7}  "
          f"{'attack':8} {'clean':>19} {'robust':>19} {'seconds':>8}   gradients/s")
    for name, defense in defenses:
        random = defense.mask_ratio is not None or bool(defense.sigma and defense.sigma.b > 0)
        draws = args.draws if random else 1
        common.seed_epoch(args.seed, 0)
        hits = sum(accuracy(defense, images.to(device), labels.to(device), draws).sum().item()
                   for images, labels in batches)
        clean = common.total(hits)[0] * 100 / images_in_all
        attacked = defense if args.threat == "white" else defense.classifier
        averaged = random and args.threat == "white"  # else every draw has the same gradient
        for eps, attack in [(eps, attack) for eps in args.eps for attack in args.attack]:
            if attack == "pgd+eot" and "pgd" in args.attack and not averaged:
                continue  # the same as pgd
            fgsm = attack == "fgsm"
            settings = dict(  # the attack itself
                steps=1 if fgsm else args.steps, random_start=not fgsm,
                step_size=eps if fgsm else (
                    2.5 * eps / args.steps if args.step_size is None else args.step_size),
                restarts=1 if fgsm else args.restarts,
                eot=args.eot if attack == "pgd+eot" and averaged else 1,
                early_stop=not random and args.threat == "white", max_batch=args.max_batch)
            common.seed_epoch(args.seed, 0)
            start = time.time()
            with common.autocast(args, device, default=False):
                robust = robust_hits(defense, attacked, batches, device, eps, args.norm, args.loss,
                                     draws, settings)
            robust, seconds = common.total(robust)[0] * 100 / images_in_all, time.time() - start
            gradients = images_in_all * settings["steps"] * settings["eot"] * settings["restarts"]
            speed = round(gradients * len(args.loss) / seconds)
            level = defense.sigma.a if defense.sigma else ""
            rows.append({
                "defense": name, "sigma": level, "votes": args.votes, "attack": attack,
                "mask_ratio": "" if defense.mask_ratio is None else defense.mask_ratio,
                **{key: settings[key] for key in ("steps", "restarts", "eot")}, "norm": args.norm,
                "eps": f"{eps:.6g}", "step_size": f"{settings['step_size']:.6g}",
                "loss": "+".join(args.loss), "threat": args.threat + "-plainclamp" * args.plain_clamp,
                "images": images_in_all, "seed": args.seed, "clean_accuracy": round(clean, 2),
                "robust_accuracy": round(robust, 2), "seconds": round(seconds, 1)})
            append_row(table, rows[-1])
            shown = "off" if not defense.defended else (
                f"{level:g}" if level != "" else f"mask {defense.mask_ratio:g}")
            ball = f"{255 * eps:g}/255" if args.norm == "linf" else f"{eps:g}"
            print(f"{name:34} {shown:>8} {ball:>7}  {attack:8} "
                  f"{interval(clean, images_in_all):>19} {interval(robust, images_in_all):>19} "
                  f"{seconds:8.1f} {'stopped early' if settings['early_stop'] else speed:>13}", flush=True)
    print(f"\nwrote {table}")
    plot(table.with_name("tradeoff.png"), rows, title)
    return rows


if __name__ == "__main__":
    common.run_script(main)
