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

import shlex
import sys
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from model import UserError, check_images
from support import cli, data, report, run, tested

DRAWS = 5  # fresh draws of a random defense that score it
BATCH = 120  # images that are attacked together; at most --max-batch
WALK = {"linf": 2.5, "l2": 10.0}  # total length of PGD's steps, in radii, unless a step size is given
MANY_SECONDS = 300  # from here on it is said how to make a table take less
MOST_TARGETS = 9  # other classes that strong_pgd moves towards
FOOLED_MARGIN = 0.05  # early stop: fooled only above this, so that rounding (bfloat16) hardly ever undoes it
CODE = ("model.py", "attack.py")  # what decides the numbers


# --------------------------------------------------------------------------- PGD (Madry et al. 2018)

def margin(logits, labels):
    """Best other logit minus the label's, [B]: above 0 where the label is not predicted."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def cross_entropy(logits, labels):
    """The cross-entropy of each image, [B]; the margin where it is 0 in floating point.

    An overconfident model's cross-entropy has no gradient there, and an attack would stand still.
    """
    loss = F.cross_entropy(logits, labels, reduction="none")
    return torch.where(loss > 0, loss, margin(logits, labels))


LOSSES = {"ce": cross_entropy, "margin": margin}  # what the attacker may raise: (logits, labels) to [B]


def input_gradient(model, images, labels, loss="ce", eot=1, targets=None):
    """Gradient of the attacker's loss at these images, averaged over eot draws of the model.

    Expectation over transformation (Athalye et al. 2018): a model that is random at every call has to be
    attacked through the mean over its randomness; every draw is a call of its own. With targets [B] the
    loss of these classes is lowered instead. Also returns the margin of the labels, the mean over the
    draws, [B]: above 0 where the attack has succeeded.
    """
    total, margins = torch.zeros_like(images), 0
    for _ in range(eot):
        with torch.enable_grad():
            x = images.detach().requires_grad_()
            logits = model(x).float()
            if not logits.requires_grad:
                raise UserError("the model's logits have no gradient: it detaches the images, or works under "
                                "no_grad, and PGD cannot attack it")
            gain = LOSSES[loss](logits, labels) if targets is None else -LOSSES[loss](logits, targets)
            total += torch.autograd.grad(gain.sum(), x, allow_unused=True, materialize_grads=True)[0]
        margins = margins + margin(logits.detach(), labels)
    return total / eot, margins / eot


def direction_of(gradient, norm):
    """The step of length 1 along which the loss grows most, to first order."""
    if norm == "linf":
        return gradient.sign()
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)  # the square of 1e-30 is 0
    scaled = gradient / largest.where(largest > 0, 1)
    return F.normalize(scaled.flatten(1)).view_as(gradient)


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


def strongest(model, candidates, labels, draws=10):
    """Of several adversarial versions of each image, the one to keep.

    Highest error rate over fresh draws of the model, then highest mean margin: to choose on a single
    evaluation of a random model picks luck, not strength. Where nothing is random one is enough.
    """
    if not needs_eot(model, candidates[0]):
        draws = 1
    with torch.no_grad():
        margins = torch.stack([torch.stack([margin(model(x).float(), labels) for _ in range(draws)])
                               for x in candidates])
    error_rate, mean_margin = (margins > 0).float().mean(1), margins.mean(1)  # [candidates, B]
    errs_most = error_rate == error_rate.amax(0)
    best = mean_margin.where(errs_most, -torch.inf).argmax(0)
    return torch.stack(candidates)[best, torch.arange(len(labels), device=best.device)]


@torch.inference_mode(False)
def pgd(model, images, labels, eps, steps, step_size=None, norm="linf", random_start=True,
        restarts=1, eot=1, targets=None, loss="ce", early_stop=False):
    """Projected gradient descent (Madry et al. 2018): adversarial images within eps, in [0, 1].

    model: [0, 1] images to logits, in evaluation mode. images [B, C, H, W]; labels [B] (long).
    eps: radius; for norm "linf" in [0, 1] units (8/255), for "l2" the length over all pixels.
    step_size: default 2.5·eps/steps in linf and 10·eps/steps in l2, where a short walk attacks less
        (studies/RESULTS.md). FGSM is steps=1, step_size=eps, random_start=False.
    restarts: runs from so many starts and keeps the strongest (see there) for each image.
    eot: draws of a random model averaged in each gradient. loss: "ce", "margin", an entry of LOSSES.
    targets [B]: classes to move towards; it still succeeds where the label is not predicted.
    early_stop: leave an image as it is once it fools the model. Only for deterministic models: on a
        random one it stops at lucky draws.
    Warns of steps that cannot cross the ball, a model in training mode, and images without a gradient. Raises
    UserError for images that are not floats in [0, 1], labels that do not fit, and settings out of range.
    """
    images, labels = images.detach().clone(), labels.clone()  # also from under inference_mode
    if min(steps, restarts, eot) < 1 or loss not in LOSSES:
        raise UserError(f"steps, restarts and eot must be at least 1, loss one of {', '.join(LOSSES)}, not "
                        f"{steps}, {restarts}, {eot} and {loss!r}")
    step_size = default_step(eps, steps, norm) if step_size is None else step_size
    check_settings(model, images, labels, targets, eps, steps, step_size, norm, random_start)
    candidates = []
    for _ in range(restarts):
        x = random_point(images, eps, norm) if random_start else images.clone()
        active = torch.arange(len(images), device=images.device)  # the images that are still attacked
        for _ in range(steps):
            towards = None if targets is None else targets[active]
            gradient, margins = input_gradient(model, x[active], labels[active], loss, eot, towards)
            if early_stop:
                right = ~(margins > FOOLED_MARGIN)  # the others leave for good
                active, gradient, margins = active[right], gradient[right], margins[right]
            if not len(active):
                break
            moved = x[active] + step_size * direction_of(gradient, norm)
            x[active] = project(moved, images[active], eps, norm)
        candidates.append(x)
    if len(active):
        warn_of_lost_gradients(gradient, margins, len(images))
    return x if restarts == 1 else strongest(model, candidates, labels)


def default_step(eps, steps, norm):
    """The size of PGD's steps unless it is given: a share of the walk, in l2 at most across the ball."""
    size = WALK.get(norm, 0.0) * eps / steps
    return min(size, 2 * eps) if norm == "l2" else size


def strong_pgd(model, images, labels, eps, steps, step_size=None, norm="linf", restarts=2, eot=1,
               loss="all", early_stop=True):
    """The strongest of several runs of PGD for each image, with pgd's arguments: adversarial images.

    They raise the cross-entropy, then the margin, then, on a deterministic model, the margin towards each of
    the most likely other classes (nine at most), each from so many starts. With early_stop a run attacks what
    the runs before have left right; without it, where the images are meant for another model, or on a random
    model, where it would pick lucky draws, each run attacks all images, and the strongest are kept. loss: how
    a table names this, "all".
    """
    settings = dict(eps=eps, steps=steps, step_size=step_size, norm=norm, eot=eot)
    plans = [("ce", None), ("margin", None)]
    random = needs_eot(model, images)
    if not random:
        plans += [("margin", target) for target in likely_targets(model, images, labels)]
    if random or not early_stop:
        candidates = [pgd(model, images, labels, loss=name, targets=target, **settings)
                      for name, target in plans * restarts]
        return strongest(model, candidates, labels)
    adversarial, left = images.clone(), torch.arange(len(images), device=images.device)
    for name, target in plans * restarts:
        if not len(left):
            break
        towards = None if target is None else target[left]
        attacked = pgd(model, images[left], labels[left], loss=name, targets=towards, early_stop=True, **settings)
        adversarial[left] = attacked
        left = left[accuracy(model, attacked, labels[left]) == 1]
    return adversarial


def likely_targets(model, images, labels):
    """The most likely other class of each image, the next one ...: a list of nine tensors [B] at most."""
    with torch.no_grad():
        logits = model(images).float()
    likely = logits.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
    return [likely[:, k] for k in range(min(MOST_TARGETS, logits.shape[1] - 1))]


def warn_of_lost_gradients(gradient, margins, images):
    """Warn of images that are still right and have no gradient at all; UserError if one is not finite."""
    if not gradient.isfinite().all():
        raise UserError("the model's gradient with respect to its input is not finite")
    lost = (gradient.flatten(1).abs().amax(1) == 0) & (margins < 0)
    if lost.any():
        warnings.warn(f"{lost.sum()} of {images} images that were still right had no gradient at all: the "
                      "model masks it (or returns probabilities instead of logits), and PGD does not attack "
                      "them", stacklevel=4)


def check_settings(model, images, labels, targets, eps, steps, step_size, norm, random_start):
    """UserError for what cannot be attacked; a warning for an attack that is weaker than it seems."""
    check_images(images)
    if images.dtype not in (torch.float32, torch.float64):  # coarser ones round out of the ball
        raise UserError(f"images must be float32 or float64, not {images.dtype}")
    for classes in (labels,) if targets is None else (labels, targets):
        if classes.dtype != torch.long or classes.shape != (len(images),):
            raise UserError(f"labels must be one class number (long) for each of the {len(images)} images")
    if norm not in ("linf", "l2"):
        raise UserError(f"norm must be linf or l2, not {norm!r}")
    if not 0 <= eps < float("inf") or (norm == "linf" and eps > 1):
        raise UserError(f"eps must be at least 0, and for linf at most 1 (write 8/255), not {eps:g}")
    if not step_size >= 0:
        raise UserError(f"step_size must not be negative, as {step_size:g} is")
    needed = 2 * eps if random_start else eps  # from a random start across the ball, or to its edge
    if steps * step_size < needed * (1 - 1e-6):
        warnings.warn(f"{steps} steps of {in_units(step_size, norm)} cannot cross the ball of radius "
                      f"{in_units(eps, norm)}: give more or larger steps", stacklevel=4)
    if steps > 1 and step_size > 2 * eps > 0:
        warnings.warn(f"steps of {in_units(step_size, norm)} each cross the whole ball of radius "
                      f"{in_units(eps, norm)}: smaller ones attack better", stacklevel=4)
    acting = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, StochasticDepth)
    if isinstance(model, nn.Module) and any(part.training and isinstance(part, acting)
                                            and getattr(part, "p", 1) > 0 for part in model.modules()):
        warnings.warn("the model is in training mode (its batch norm, dropout or drop path): call "
                      "model.eval() first", stacklevel=4)


def in_units(length, norm):
    """A radius or a step as text: "8/255" in linf, the length over all pixels in l2."""
    return f"{255 * length:.4g}/255" if norm == "linf" else f"{length:.4g}"


# ----------------------------------------------------------------------------------- its score

def in_batches(function, images, labels, size, show=lambda done: None):
    """function(images, labels) for `size` images at a time, as floats in [0, 1]; its results in one tensor.

    The function gets copies: whatever it does to them, images and labels stay. show(done) is told the part of the
    images that is done.
    """
    results = []
    for x, y in zip(images.split(size), labels.split(size)):
        results.append(function(data.as_floats(x).clone(), y.clone()))
        show(sum(map(len, results)) / len(images))
    return torch.cat(results)


def accuracy(model, images, labels, draws=1):
    """Share of correct predictions of each image over fresh draws of the model, in float32: [B].

    So also where the attack computes in bfloat16, whose rounding must not decide what is right.
    """
    check_images(images)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        hits = [(model(images.clone()).argmax(1) == labels).float() for _ in range(draws)]
    return torch.stack(hits).mean(0)


def mean_over_processes(values):
    """The mean of a number for each image, [N], over the images of all processes."""
    total, images = cli.sum_over_processes(values.sum().item(), len(values))
    return total / images


def percent(shares):
    """The mean of each image's share of correct draws in percent, over the images of all processes."""
    return 100 * mean_over_processes(shares)


def needs_eot(model, images):
    """Whether a model is random: it says so, it draws a random number, or two calls on these images differ.

    In the second call the images stand elsewhere, beside others: a model whose answer depends on that needs
    several draws as well, and no early stop, which changes the batch.
    """
    if getattr(model, "is_random", False):
        return True
    elsewhere = torch.arange(len(images), device=images.device) % max(1, len(images) // 2)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        before = cli.random_state(images.device)
        first = model(images.clone())
        has_drawn = cli.random_state(images.device) != before
        second = model(images[elsewhere])
    return has_drawn or not torch.allclose(first[elsewhere], second, rtol=1e-3, atol=1e-4)


def say_one_answer(name, model, images, labels, classes, batch):
    """The class that a model gives for all of these images, of all processes, with a note; or ""."""
    with torch.no_grad():
        predicted = in_batches(lambda x, y: model(x).argmax(1), images, labels, batch)
    counts = cli.sum_over_processes(*predicted.bincount(minlength=len(classes)).tolist())
    if max(counts) < sum(counts) or sum(counts) < 2:
        return ""
    answer = classes[counts.index(max(counts))]
    print(f"note: {name} answers {answer} for all {sum(counts):.0f} images: its accuracy is the share of that "
          "class")
    return answer


def check_adversarial(adversarial, images, eps, norm):
    """Stop the run unless every adversarial image lies in the ball and in [0, 1]."""
    check_images(adversarial)
    length = (adversarial - images).flatten(1).norm(p=torch.inf if norm == "linf" else 2, dim=1)
    if not (length <= eps + 1e-6 * max(1.0, eps)).all():
        raise UserError(f"an adversarial image left the ball: {length.max():.6f} over eps {eps:.6f}")


# ----------------------------------------------------------------------------------- the stage

class Attack(NamedTuple):
    """An entry of ATTACKS: a function with the arguments of pgd; with "+eot" it averages over draws.

    fixed(eps): the arguments that are not the flags', a loss of its own among them. norms: those it can
    be bounded in. gradients(settings): about how many gradients it takes for each image.
    """
    function: Callable
    fixed: Callable = lambda eps: {}
    norms: tuple = ("linf", "l2")
    gradients: Callable = lambda settings: settings["steps"] * settings["eot"] * settings["restarts"]


ATTACKS = {
    "fgsm": Attack(pgd, lambda eps: dict(steps=1, step_size=eps, random_start=False, restarts=1)),
    "pgd": Attack(pgd),
    "strong": Attack(strong_pgd, lambda eps: dict(loss="all", restarts=2), gradients=lambda settings: (
        settings["steps"] * settings["eot"] * settings["restarts"] * (2 + MOST_TARGETS))),
}


def attack_named(name):
    """The entry of ATTACKS of this name, with or without "+eot"."""
    return ATTACKS[name.removesuffix("+eot")]


class Cell(NamedTuple):
    """A row of the table that is to be measured: a defense, an attack on it, and its settings.

    attacked: what the attacker differentiates, the whole defense or its classifier alone; needs_eot: whether
    that is random. random: whether the whole defense is.
    """
    entry: tested.Entry
    attacked: nn.Module
    needs_eot: bool
    random: bool
    attack: str
    eps: float
    settings: dict
    losses: list  # the strongest counts
    seconds: float  # about how long it will take, without early stop

    @property
    def draws(self):
        """How many fresh draws score it: one where nothing is random."""
        return DRAWS if self.random else 1


def arguments(argv=None):
    parser = cli.stage_parser("python attack.py", __doc__)
    tested.evaluation_flags(parser, images=80)
    add = parser.add_argument_group("the attack").add_argument
    names = [name + eot for name in ATTACKS for eot in ("", "+eot")]
    add("--attack", nargs="+", choices=names, default=["fgsm", "pgd", "pgd+eot"], help="default: fgsm pgd "
        "pgd+eot")
    add("--eps", nargs="+", type=cli.eps, help="radius: in linf a share of the pixel range, as 8/255 "
        "(default 8/255 16/255, color 4/255 8/255), in l2 the length of the change over all pixels, as 0.5 "
        "(no default)")
    add("--norm", choices=["linf", "l2"], default="linf", help="how a change is measured, default linf")
    add("--steps", type=cli.count, default=20, help="of pgd, default 20")
    add("--step-size", type=cli.eps, help="of pgd, as 2/255; default 2.5 eps/steps, in l2 10 eps/steps")
    add("--restarts", type=cli.count, default=1, help="random starts of pgd, the strongest counts; default 1")
    add("--eot", type=cli.count, default=8, help="draws of the noise that each gradient of pgd+eot averages, "
        "default 8")
    add("--loss", nargs="+", choices=LOSSES, default=["ce"], help="what pgd raises; of several an attack "
        "each, the strongest counts; default ce, the cross-entropy")
    add("--threat", choices=["white", "gray"], default="white", help="what the attacker differentiates: the "
        "whole defense (white, default), or its classifier alone (gray, the paper's protocol)")
    args = cli.parse(parser, argv)
    if args.norm == "l2" and args.eps is None:
        raise UserError("--norm l2 needs --eps, a length over all pixels: 0.5 or 1, say")
    for name in args.attack:
        if args.norm not in attack_named(name).norms:
            raise UserError(f"--attack {name} is not bounded in {args.norm}")
    return args


def settings_of(args, name, eps, random):
    """(the arguments of an attack for one row of the table, its losses); random: what it attacks needs EOT."""
    averages = name.endswith("+eot") and random
    settings = dict(steps=args.steps, step_size=args.step_size, norm=args.norm, restarts=args.restarts,
                    eot=args.eot if averages else 1, early_stop=not random and args.threat == "white")
    if args.step_size is None:
        settings["step_size"] = default_step(eps, args.steps, args.norm)
    settings.update(attack_named(name).fixed(eps))
    losses = [settings.pop("loss")] if "loss" in settings else args.loss
    return settings, losses


def plan_table(args, entries, images, batch):
    """The cells to measure; a call of each model on the first batch of images tells how long they will take."""
    cells = []
    for entry in entries:
        few = data.as_floats(images[:batch])
        started = time.perf_counter()
        accuracy(entry.model, few, torch.zeros(len(few), dtype=torch.long, device=few.device))
        seconds = 3 * len(images) / len(few) * (time.perf_counter() - started)  # of a gradient of every image
        attacked = entry.model if args.threat == "white" else entry.classifier
        random = cli.sum_over_processes(needs_eot(entry.model, few)) != [0]
        attacked_is_random = cli.sum_over_processes(needs_eot(attacked, few)) != [0]
        for eps in args.eps or entry.checkpoint["data"]["attack_eps"]:
            for name in args.attack:
                settings, losses = settings_of(args, name, eps, attacked_is_random)
                base = name.removesuffix("+eot")
                if name != base and base in args.attack and settings["eot"] == 1:
                    continue  # nothing is random for the attacker: the same as without EOT
                gradients = attack_named(name).gradients(settings) * len(losses)
                cells.append(Cell(entry, attacked, attacked_is_random, random, name, eps, settings, losses,
                                  seconds * gradients))
    return cells


def say_without_eot(cells):
    """A note on random defenses whose attacks all see one draw a step: what they leave is too high."""
    averaged = {cell.entry.name for cell in cells if cell.settings["eot"] > 1}
    overstated = {cell.entry.name for cell in cells if cell.needs_eot} - averaged
    if overstated:
        print(f"note: random, and attacked without EOT, which overstates it: {', '.join(sorted(overstated))}; "
              "give --attack pgd+eot")


def measure(cell, args, images, labels, batch, show):
    """The share of correct draws of each image after the attack, [N]; show(done) is told how far it is."""
    entry, attacked, attack = cell.entry, cell.attacked, attack_named(cell.attack).function

    def attack_and_score(x, y):
        candidates = [attack(attacked, x.clone(), y.clone(), cell.eps, loss=loss, **cell.settings)
                      for loss in cell.losses]
        adversarial = candidates[0] if len(candidates) == 1 else strongest(attacked, candidates, y)
        check_adversarial(adversarial, x, cell.eps, args.norm)
        return accuracy(entry.model, adversarial, y, cell.draws)
    cli.seed_everything(args.seed)
    return in_batches(attack_and_score, images, labels, batch, show)


def facts_of(cell, args, images, pixels, one_answer):
    """What decides the number of a cell, {column: value}; a row that says the same is not measured again.

    images: how many, of all processes; pixels: their digest; one_answer: the class that the model gives for
    all of them, or "".
    """
    entry, settings, attack = cell.entry, cell.settings, attack_named(cell.attack)
    functions = [attack.function, attack.fixed, *LOSSES.values()]  # strong chooses its losses by itself
    return dict(
        level=entry.level, value=entry.value, attack=cell.attack, norm=args.norm, eps=f"{cell.eps:.6g}",
        steps=settings["steps"], step_size=f"{settings['step_size']:.6g}", restarts=settings["restarts"],
        eot=settings["eot"], loss="+".join(cell.losses), threat=args.threat, reading="one shot",
        draws=cell.draws, split=args.split, images=images, pixels=pixels,
        trained_on=args.trained_on[entry.name], one_answer=one_answer, attack_seed=args.seed,
        precision="bf16" if args.bf16 else "fp32", weights=run.fingerprint(entry.model),
        code=run.digest_of_code_of(CODE, entry.model, *functions))


def main(argv=None):
    args = arguments(argv)
    device = cli.open_device(args.device)
    entries = tested.load_entries(args, device)
    images, labels, classes = tested.load_test_images(args, entries, device)
    total, pixels = len(images), data.digest(images, labels)
    images, labels = tested.own_share(images, labels)
    batch, table, progress = min(BATCH, args.max_batch), args.out / "attack.csv", cli.Progress()
    with cli.autocast(args.bf16, device):
        cells = plan_table(args, entries, images, batch)
    width, name_width = max(len(entry.name) for entry in entries), max(8, *map(len, args.attack))
    most_seconds, advice = sum(cell.seconds for cell in cells), ""
    if most_seconds > MANY_SECONDS:
        advice = "; fewer rows or images take less: --images, --sigma, --eps, --attack pgd+eot"
    print(f"{total} {args.split} images of {args.data}, {args.norm}, {args.threat}-box, {DRAWS} draws of what "
          f"is random, seed {args.seed}, {device.type}; accuracy in % [95% interval]; at most about "
          f"{cli.minutes(most_seconds)} (minutes:seconds){advice}\n\n"
          f"{'run and level':{width}} {'eps':>7}  {'attack':{name_width}} {'loss':9} {'steps':>5} {'EOT':>3} "
          f"{'starts':>6} {'clean':>19} {'robust':>19} {'seconds':>8}")
    clean_of, lowest, measured = {}, {}, report.read_rows(table)
    largest_eps = max(cell.eps for cell in cells)
    for cell in cells:
        entry, settings = cell.entry, cell.settings
        ball, started = in_units(cell.eps, args.norm), time.perf_counter()
        with cli.autocast(args.bf16, device):
            if entry.name not in clean_of:
                cli.seed_everything(args.seed)
                right = in_batches(lambda x, y: accuracy(entry.model, x, y, cell.draws), images, labels, batch)
                one_answer = say_one_answer(entry.name, entry.model, images, labels, classes, batch)
                clean_of[entry.name] = percent(right), one_answer
            clean, one_answer = clean_of[entry.name]
            facts = facts_of(cell, args, total, pixels, one_answer)
            names = dict(defense=entry.name, run=entry.folder, data=args.data)
            same = report.find_row(measured, {**names, **facts}, table)
            old = same or report.find_row(measured, facts, table)
            if old:  # by the same code, weights, images and settings
                robust, seconds, warned = float(old["robust_accuracy"]), "kept", old.get("warnings", "")
            else:
                with cli.heard_warnings() as heard:
                    shares = measure(cell, args, images, labels, batch, lambda done: progress.show(
                        f"{entry.name}, {ball}, {cell.attack}", done))
                robust, seconds = percent(shares), f"{time.perf_counter() - started:.1f}"
                warned = "; ".join(heard)
        progress.clear()
        if warned:
            print(f"warning: {warned}", file=sys.stderr)
        print(f"{entry.name:{width}} {ball:>7}  {cell.attack:{name_width}} {'+'.join(cell.losses):9} "
              f"{settings['steps']:5} {settings['eot']:3} {settings['restarts']:6} "
              f"{report.interval(clean, total):>19} {report.interval(robust, total):>19} {seconds:>8}",
              flush=True)
        if cell.eps == largest_eps:
            lowest[entry.name] = min(robust, lowest.get(entry.name, 100.0))
        if robust > clean + 1:
            print("note: more images are right under attack than without one: this attack does not work here")
        if not same:  # new, or the run has another name now
            report.append_row(table, dict(
                **names, **facts, clean_accuracy=f"{clean:.2f}", robust_accuracy=f"{robust:.2f}",
                seconds=seconds, warnings=warned, commit=run.commit()))
    say_without_eot(cells)
    summary = ", ".join(f"{name} {robust:.1f}%" for name, robust in lowest.items())
    runs = " ".join(shlex.quote(str(folder)) for folder in args.runs)
    print(f"\nright under the strongest of these attacks, at {in_units(largest_eps, args.norm)}: {summary}\n"
          f"the table is {table}; is the attack strong enough? python -m studies.audit {runs}")


if __name__ == "__main__":
    cli.run_script(main)
