"""Stage 4, attack.py: PGD by hand, and the table of clean and robust accuracy over sigma.

    python attack.py                                 undefended against De³, on the digits
    python attack.py RUN RUN --eps 4/255 --sigma off 0 50         any runs of finetune.py
    python attack.py RUN --steps 100 --eot 16 --restarts 3 --loss ce margin       a stronger attack

Every attack is white-box through the whole defense unless --threat gray. A random defense must be
attacked with EOT (pgd+eot): the gradient is averaged over --eot draws; plain pgd and fgsm see one
draw per step and overstate it. Robust accuracy is measured after the attack, on fresh draws of the
defense (the mean over draws: one shot). Appends its rows to attack.csv in the folder in which the
first run lies. Whether the attack can be believed: python -m studies.audit.
"""

import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from model import UserError, check_images
from support import cli, data, report, run, training, weights

DRAWS = 5  # fresh draws of a random defense that score it
FOOLED_MARGIN = 1e-3  # early stop: fooled only above this, so that rounding cannot undo it
CODE = ("model.py", "attack.py", "support/training.py")  # what decides the numbers


# --------------------------------------------------------------------------- PGD (Madry et al. 2018)

def margin(logits, labels):
    """Best other logit minus the label's, [B]: above 0 where the label is not predicted."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def cross_entropy(logits, labels):
    """The cross-entropy of each image, [B]."""
    return F.cross_entropy(logits, labels, reduction="none")


LOSSES = {"ce": cross_entropy, "margin": margin}  # what the attacker may raise: (logits, labels) to [B]


def objective(logits, labels, targets, loss):
    """What the attacker raises, [B]: the loss of the labels, an entry of LOSSES.

    With targets [B] it is the loss of the target class, negated: the attack moves towards it.
    """
    if not (labels if targets is None else targets).max() < logits.shape[1]:
        raise UserError(f"labels must be below {logits.shape[1]}, the number of the model's classes")
    loss_of = LOSSES[loss]
    return loss_of(logits, labels) if targets is None else -loss_of(logits, targets)


def success(logits, labels, targets):
    """How far the attack has succeeded, [B], whatever loss it raises: above 0 where it has.

    The margin of the labels, or with targets [B] that of the target classes, negated.
    """
    return margin(logits, labels) if targets is None else -margin(logits, targets)


def check_logits(logits):
    """UserError unless a model's output is what PGD can climb: logits that depend on the images."""
    if not torch.is_tensor(logits) or logits.dim() != 2 or logits.shape[1] < 2:
        found = list(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
        raise UserError(f"the model must return logits, a tensor [B, two classes or more], not {found}")
    if not logits.requires_grad:
        raise UserError("the model's logits have no gradient with respect to the images: it detaches them "
                        "or works under no_grad, and PGD cannot attack it")


def input_gradient(model, current, labels, targets, loss, eot):
    """Gradient of the objective at the current images, averaged over eot draws of the model.

    Expectation over transformation (Athalye et al. 2018): a model that is random at every call has
    to be attacked through the mean over its randomness. Every draw is a call of its own, so that it
    does not matter whether a model draws for each image or for each call. Also returns the mean
    success over the draws, [B]: above 0 where the attack has succeeded.
    """
    total, successes = torch.zeros_like(current), torch.zeros(len(current), device=current.device)
    for _ in range(eot):
        with torch.enable_grad():
            x = current.detach().requires_grad_()
            logits = model(x)
            check_logits(logits)
            gain = objective(logits, labels, targets, loss)
            total += torch.autograd.grad(gain.sum(), x)[0]
        successes += success(logits.detach(), labels, targets)
    if not total.abs().max().isfinite():
        raise UserError("the model's gradient with respect to its input is not finite")
    return total / eot, successes / eot


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
    single evaluation of a random model picks luck, not strength. Where nothing is random one is enough.
    """
    if not getattr(model, "is_random", True) and not is_random(model, candidates[0]):
        draws = 1
    with torch.no_grad():
        successes = torch.stack([torch.stack([success(model(x), labels, targets) for _ in range(draws)])
                                 for x in candidates])
    error_rate, mean_success = (successes > 0).float().mean(1), successes.mean(1)  # [candidates, B]
    errs_most = error_rate == error_rate.amax(0)
    best = mean_success.where(errs_most, -torch.inf).argmax(0)
    return torch.stack(candidates)[best, torch.arange(len(labels), device=best.device)]


def without_gradient(gradient, successes):
    """Which images are still right (success below 0) and have a gradient of zero in every pixel: [B]."""
    return (gradient.flatten(1).abs().amax(1) == 0) & (successes < 0)


def warn_of_weak_settings(model, eps, steps, step_size, random_start):
    """Warn of an attack that is weaker than it seems: too short a walk, a model in training mode."""
    needed = 2 * eps if random_start else eps  # from a random start across the ball, or to its edge
    if steps * step_size < needed * (1 - 1e-6):
        warnings.warn(f"{steps} steps of {step_size:.3g} ({255 * step_size:.3g}/255) cannot cross the ball "
                      f"of radius {eps:.3g} ({255 * eps:.3g}/255): give more or larger steps", stacklevel=3)
    if steps > 1 and step_size > 2 * eps > 0:
        warnings.warn(f"steps of {step_size:.3g} ({255 * step_size:.3g}/255) each cross the whole ball of "
                      f"radius {eps:.3g} ({255 * eps:.3g}/255): smaller ones attack better", stacklevel=3)
    acting = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, StochasticDepth)
    if isinstance(model, nn.Module) and any(part.training and isinstance(part, acting)
                                            and getattr(part, "p", 1) > 0 for part in model.modules()):
        warnings.warn("the model is in training mode (its batch norm, dropout or drop path): call "
                      "model.eval() first", stacklevel=3)


def warn_of_lost_gradients(underflows, masked, images):
    """Warn of so many images, of all, that were still right and had no gradient of the loss, or none."""
    if underflows:
        warnings.warn(f"{underflows} of {images} images that were still right had no gradient of the "
                      "loss (the cross-entropy of an overconfident model underflows): the margin loss "
                      "(loss='margin') was used for them", stacklevel=3)
    if masked:
        warnings.warn(f"{masked} of {images} images that were still right had no gradient at all, of the "
                      "margin loss (loss='margin') neither: the model masks it (or returns probabilities "
                      "instead of logits), and PGD does not attack them", stacklevel=3)


def pgd(model, images, labels, eps, steps, step_size=None, norm="linf", random_start=True,
        restarts=1, eot=1, targets=None, loss="ce", early_stop=False):
    """Projected gradient descent (Madry et al. 2018): adversarial images within eps, in [0, 1].

    model: [0, 1] images to logits, in evaluation mode. images [B, 3, H, W]; labels [B] (long).
    eps: radius; for norm "linf" in [0, 1] units (8/255), for "l2" the length over all pixels.
    step_size: default 2.5·eps/steps. FGSM is steps=1, step_size=eps, random_start=False.
    restarts: runs from so many starts and keeps the strongest (see there) for each image.
    eot: draws of a random model averaged in each gradient. loss: "ce", "margin", an entry of LOSSES.
    targets [B]: classes to move to; None to move away from the labels.
    early_stop: leave an image as it is once it fools the model. Only for deterministic models: on a
        random one it stops at lucky draws.
    Where the cross-entropy of an image underflows, so that it has no gradient, the margin loss is used
    for that image, and a warning says for how many; another one for those without any gradient (that
    is masking), for a walk too short to cross the ball, and for a model in training mode.
    Raises UserError for images that are not floats in [0, 1], labels that do not fit, and settings out
    of range.
    """
    check_images(images)
    if images.dtype not in (torch.float32, torch.float64):  # coarser ones round out of the ball
        raise UserError(f"images must be float32 or float64, not {images.dtype}")
    for classes in (labels,) if targets is None else (labels, targets):
        if classes.dtype != torch.long or classes.shape != (len(images),) or (classes < 0).any():
            raise UserError(f"labels and targets must be one class number (long) for each of the "
                            f"{len(images)} images")
    if norm not in ("linf", "l2") or loss not in LOSSES:
        raise UserError(f"norm must be linf or l2, loss {' or '.join(LOSSES)}, not {norm!r} and {loss!r}")
    if not 0 <= eps < float("inf") or (norm == "linf" and eps > 1):
        raise UserError(f"eps must be at least 0, and for linf at most 1 (8/255, say), not {eps}")
    if min(steps, restarts, eot) < 1 or (step_size is not None and not step_size >= 0):
        raise UserError("steps, restarts and eot must be at least 1, step_size not negative")
    step_size = 2.5 * eps / steps if step_size is None else step_size
    warn_of_weak_settings(model, eps, steps, step_size, random_start)
    images, candidates = images.detach(), []
    underflows, masked = set(), set()  # the images that have no gradient of the loss, and none at all
    for _ in range(restarts):
        x = random_point(images, eps, norm) if random_start else images.clone()
        active = torch.arange(len(images), device=images.device)  # the images still attacked
        for _ in range(steps):
            if not len(active):
                break
            active_targets = None if targets is None else targets[active]
            gradient, successes = input_gradient(model, x[active], labels[active], active_targets, loss, eot)
            stuck = without_gradient(gradient, successes)  # still right, and nowhere to go
            if stuck.any():
                numbers = active[stuck]
                gradient[stuck], _ = input_gradient(
                    model, x[numbers], labels[numbers], None if targets is None else targets[numbers],
                    "margin", eot)
                underflows.update(numbers.tolist())
                masked.update(active[without_gradient(gradient, successes)].tolist())
            if early_stop:
                not_yet_fooled = successes <= FOOLED_MARGIN  # the others leave for good
                active, gradient = active[not_yet_fooled], gradient[not_yet_fooled]
            if norm == "linf":
                direction = gradient.sign()
            else:
                largest = gradient.abs().amax((1, 2, 3), keepdim=True)  # the square of 1e-30 is 0
                direction = gradient / largest.where(largest > 0, 1)
                direction = F.normalize(direction.flatten(1)).view_as(gradient)
            x[active] = project(x[active] + step_size * direction, images[active], eps, norm)
        candidates.append(x)
    warn_of_lost_gradients(len(underflows - masked), len(masked), len(images))
    return candidates[0] if restarts == 1 else strongest(model, candidates, labels, targets)


# ----------------------------------------------------------------------------------- its score

def accuracy(model, images, labels, draws):
    """Share of correct predictions of each image over fresh draws of the model: [B]."""
    with torch.no_grad():
        return torch.stack([(model(images).argmax(1) == labels).float()
                            for _ in range(draws)]).mean(0)


def is_random(model, images):
    """Whether a model needs EOT: it says so, or two calls on these images differ."""
    with torch.no_grad():
        first, second = model(images), model(images)
    differs = not torch.allclose(first, second, rtol=1e-3, atol=1e-4)
    return differs or getattr(model, "is_random", False)


def check_adversarial(adversarial, images, eps, norm):
    """Stop the run unless every adversarial image lies in the ball and in [0, 1]."""
    check_images(adversarial)
    length = (adversarial - images).flatten(1).norm(p=torch.inf if norm == "linf" else 2, dim=1)
    if not (length <= eps + 1e-6 * max(1.0, eps)).all():
        raise UserError(f"an adversarial image left the ball: {length.max():.6f} over eps {eps:.6f}")


class Attack(NamedTuple):
    """A row of ATTACKS: a function with the arguments of pgd, and those that are not the flags'.

    fixed(eps) gives these. With "+eot" behind its name an attack averages its gradients over draws.
    """
    run: Callable
    fixed: Callable = lambda eps: {}


ATTACKS = {
    "fgsm": Attack(pgd, lambda eps: dict(steps=1, step_size=eps, random_start=False, restarts=1)),
    "pgd": Attack(pgd),
}


def attack_batches(attack, defense, attacked, batches, eps, norm, losses, draws, settings,
                   show=lambda text, done=None: None):
    """Attack every batch, check the ball, score on fresh draws: share of correct draws of each, [N].

    attack: a function with the arguments of pgd. attacked: the model that the attacker differentiates.
    losses: one attack each, the strongest counts. settings: the other arguments of the attack.
    show(text, done) tells how far it is.
    """
    results = []
    for number, (images, labels) in enumerate(batches, start=1):
        candidates = [attack(attacked, images, labels, eps, norm=norm, loss=loss, **settings)
                      for loss in losses]
        adversarial = candidates[0]
        if len(candidates) > 1:
            adversarial = strongest(attacked, candidates, labels)
        check_adversarial(adversarial, images, eps, norm)
        results.append(accuracy(defense, adversarial, labels, draws))
        show(f"batch {number} of {len(batches)}, robust so far {100 * torch.cat(results).mean():.1f}%",
             number / len(batches))
    return torch.cat(results) if results else torch.zeros(0)


# ----------------------------------------------------------------------------------- the stage

def arguments():
    parser = cli.stage_parser(__doc__)
    weights.evaluation_flags(parser, images=80)
    add = parser.add_argument
    names = [name + eot for name in ATTACKS for eot in ("", "+eot")]
    add("--attack", nargs="+", choices=names, default=["fgsm", "pgd", "pgd+eot"],
        help="default: fgsm pgd pgd+eot")
    add("--eps", nargs="+", type=cli.eps, help="radius in [0, 1] units, as 8/255; default 8/255 16/255, "
        "color 4/255 8/255; for l2 the length over all pixels, without default")
    add("--norm", choices=["linf", "l2"], default="linf", help="default linf")
    add("--steps", type=cli.count, default=20, help="of pgd, default 20")
    add("--step-size", type=cli.eps, help="of pgd, as 2/255; default 2.5 eps/steps")
    add("--restarts", type=cli.count, default=1, help="of pgd, default 1")
    add("--eot", type=cli.count, default=8, help="draws in each gradient of pgd+eot, default 8")
    add("--loss", nargs="+", choices=LOSSES, default=["ce"],
        help="several: the strongest; default ce")
    add("--threat", choices=["white", "gray"], default="white", help="gray: the classifier alone")
    args = cli.parse(parser)
    if args.norm == "l2" and args.eps is None:
        raise UserError("--norm l2 needs --eps, a length over all pixels: 1 or 2, say")
    if args.norm == "linf" and max(args.eps or [0]) > 1:
        raise UserError(f"--eps {max(args.eps):g} is more than the range of the pixels, 1; write 8/255")
    if args.norm == "l2" and 0 < min(args.eps) < 0.1:
        print(f"note: --norm l2 takes the length over all pixels, and {min(args.eps):g} is next to nothing; "
              "0.5 and 1 are usual")
    if args.threat == "gray" or not any(name.endswith("+eot") for name in args.attack):
        cli.refuse_unused(args, ["eot"], "without a white-box attack with +eot")
    if args.step_size == 0:
        raise UserError("--step-size 0 moves nothing: give a positive one, as 2/255")
    return args


class Cell(NamedTuple):
    """A row of the table that is to be measured: a defense, an attack on it, and its settings."""
    one: weights.Tested
    random: bool
    name: str
    eps: float
    settings: dict
    seconds: float  # about how long it will take


def attack_settings(args, name, eps, random):
    """The arguments of an attack for one row of the table; random: the defense needs EOT."""
    base = name.removesuffix("+eot")
    settings = dict(steps=args.steps, restarts=args.restarts, step_size=args.step_size)
    if args.step_size is None:
        settings["step_size"] = 2.5 * eps / args.steps
    settings.update(ATTACKS[base].fixed(eps))
    averaged = name != base and random and args.threat == "white"
    settings.update(eot=args.eot if averaged else 1, early_stop=not random and args.threat == "white")
    return settings


def gradients_of_image(settings, args):
    """How many gradients an attack takes for each image, if it never stops early."""
    return settings["steps"] * settings["eot"] * settings["restarts"] * len(args.loss)


def plan_table(args, tested, images, images_in_all):
    """The cells to measure; two calls of each model on the first images tell how long they will take."""
    cells = []
    for one in tested:
        started = time.perf_counter()
        random = is_random(one.model, images)
        seconds_of_image = (time.perf_counter() - started) / 2 / len(images)
        for eps in args.eps or one.checkpoint["data"]["attack_eps"]:
            for name in args.attack:
                settings, base = attack_settings(args, name, eps, random), name.removesuffix("+eot")
                if name != base and base in args.attack and settings["eot"] == 1:
                    continue  # nothing is random for the attacker: the same as without EOT
                seconds = 3 * seconds_of_image * images_in_all * gradients_of_image(settings, args)
                cells.append(Cell(one, random, name, eps, settings, seconds / cli.world_size()))
    return cells


def percent(correct, images_in_all):
    """The share of correct draws of each image, as a percentage over the images of all processes."""
    return 100 * cli.sum_over_processes(correct.sum().item())[0] / images_in_all


def measure_clean(cell, args, batches, device):
    """The share of correct draws of each clean image, [N]: the same for every attack on a defense."""
    draws = DRAWS if cell.random else 1
    training.seed_epoch(args.seed, 0)
    with cli.autocast(args.bf16, device):
        return torch.cat([accuracy(cell.one.model, images, labels, draws) for images, labels in batches])


def measure_robust(cell, args, batches, device, show):
    """(the share of correct draws of each attacked image, [N]; seconds)."""
    model, draws = cell.one.model, DRAWS if cell.random else 1
    attacked = model if args.threat == "white" else cell.one.classifier
    attack = ATTACKS[cell.name.removesuffix("+eot")].run
    training.seed_epoch(args.seed, 0)
    started = time.perf_counter()
    with cli.autocast(args.bf16, device):
        correct = attack_batches(attack, model, attacked, batches, cell.eps, args.norm, args.loss, draws,
                                 cell.settings, show)
    return correct, time.perf_counter() - started


def main():
    args = arguments()
    device = cli.open_device(args.device)
    tested = weights.load_defenses(args, device)
    batches, images_in_all = weights.load_test_images(args, tested, device)
    table, progress = report.open_table(args.out / "attack.csv"), cli.Progress()
    first_images, _ = next(iter(batches))
    with cli.autocast(args.bf16, device):
        cells = plan_table(args, tested, first_images, images_in_all)
    pixels = data.digest_of(batches)
    step = "2.5 eps/steps" if args.step_size is None else f"{255 * args.step_size:.3g}/255"
    width, name_width = max(len(one.words) for one in tested), max(8, *map(len, args.attack))
    print(f"{images_in_all} {args.split} images of {args.data}, {args.norm}, {args.steps} steps of {step}, "
          f"EOT {args.eot}, {args.restarts} restart(s), loss {'+'.join(args.loss)}, {args.threat}-box, "
          f"{DRAWS} draws, seed {args.seed}; accuracy in % [95% interval]; takes at most about "
          f"{cli.minutes(sum(cell.seconds for cell in cells))} minutes\n\n{'defense':{width}} "
          f"{'eps':>7}  {'attack':{name_width}} {'clean':>19} {'robust':>19} {'seconds':>8}   gradients/s")
    clean_of = {}
    for cell in cells:
        one, settings = cell.one, cell.settings
        if one.model not in clean_of:
            clean_of[one.model] = percent(measure_clean(cell, args, batches, device), images_in_all)
        ball = f"{255 * cell.eps:.4g}/255" if args.norm == "linf" else f"{cell.eps:g}"
        correct, seconds = measure_robust(
            cell, args, batches, device,
            lambda text, done: progress.show(f"{one.words}, {ball}, {cell.name}: {text}", done))
        progress.clear()
        clean, robust = clean_of[one.model], percent(correct, images_in_all)
        speed = f"{images_in_all * gradients_of_image(settings, args) / seconds:.0f}"
        print(f"{one.words:{width}} {ball:>7}  {cell.name:{name_width}} "
              f"{report.interval(clean, images_in_all):>19} {report.interval(robust, images_in_all):>19} "
              f"{seconds:8.1f} {'stopped early' if settings['early_stop'] else speed:>13}", flush=True)
        report.append_row(table, dict(
            defense=one.words, run=one.run, level=one.level, attack=cell.name, norm=args.norm,
            eps=f"{cell.eps:.6g}", steps=settings["steps"], step_size=f"{settings['step_size']:.6g}",
            restarts=settings["restarts"], eot=settings["eot"], loss="+".join(args.loss),
            threat=args.threat, reading="one shot", draws=DRAWS if cell.random else 1, data=args.data,
            split=args.split, images=images_in_all, pixels=pixels, seed=args.seed,
            precision="bf16" if args.bf16 else "fp32", clean_accuracy=f"{clean:.2f}",
            robust_accuracy=f"{robust:.2f}", seconds=f"{seconds:.1f}", **run.origin_of_row(one.model, CODE)))
    print(f"\nwrote {table}")


if __name__ == "__main__":
    cli.run_script(main)
