"""Stage 4, attack.py: PGD by hand, and the table of clean and robust accuracy over sigma.

    python attack.py                                 undefended against De³, on the digits
    python attack.py --classifier RUN ... --eps 4/255 --sigma off 0 50
    python attack.py --steps 100 --eot 16 --restarts 3 --loss ce margin       a stronger attack

Every attack is white-box through the whole defense unless --threat gray. A random defense must be
attacked with EOT (pgd+eot): the gradient is averaged over --eot draws; plain pgd and fgsm see one
draw per step and overstate it. Robust accuracy is measured after the attack, on fresh draws of the
defense (the mean over draws: one shot). Appends its rows to RUNS/<data>/attack.csv. Whether the
attack can be believed: python -m studies.audit.
"""

import time
import warnings

import torch
import torch.nn.functional as F

from model import UserError, check_images
from support import cli, data, evaluation, training

DRAWS = 5  # fresh draws of a random defense that score it
FOOLED_MARGIN = 1e-3  # early stop: fooled only above this, so that rounding cannot undo it


# --------------------------------------------------------------------------- PGD (Madry et al. 2018)

def margin(logits, labels):
    """Best other logit minus the label's, [B]: above 0 where the label is not predicted."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def objective(logits, labels, targets, loss):
    """What the attacker raises, [B]: the loss of the labels, "ce" (cross-entropy) or "margin".

    With targets [B] it is the loss of the target class, negated: the attack moves towards it.
    """
    if not (labels if targets is None else targets).max() < logits.shape[1]:
        raise UserError(f"labels must be below {logits.shape[1]}, the number of the model's classes")

    def loss_of(classes):
        if loss == "margin":
            return margin(logits, classes)
        return F.cross_entropy(logits, classes, reduction="none")
    return loss_of(labels) if targets is None else -loss_of(targets)


def input_gradient(model, current, labels, targets, loss, eot, max_batch=None):
    """Gradient of the objective at the current images, averaged over eot draws of the model.

    Expectation over transformation (Athalye et al. 2018): a model that is random at every call has
    to be attacked through the mean over its randomness. As many draws go through the model at once
    as max_batch images allow (one draw if None). Also returns the mean margin over the draws, [B]:
    above 0 where the attack has succeeded.
    """
    total, margins = torch.zeros_like(current), torch.zeros(len(current), device=current.device)
    at_once = max(1, (max_batch or 1) // max(1, len(current)))
    for first in range(0, eot, at_once):
        draws = min(at_once, eot - first)
        repeated_labels = labels.repeat(draws)
        repeated_targets = None if targets is None else targets.repeat(draws)
        with torch.enable_grad():
            x = current.detach().requires_grad_()
            logits = model(x.repeat(draws, 1, 1, 1))  # [draws·B, classes]; each copy has its own noise
            gain = objective(logits, repeated_labels, repeated_targets, loss)
            total += torch.autograd.grad(gain.sum(), x)[0]  # of x: the sum over its copies
        margin_of_draws = objective(logits.detach(), repeated_labels, repeated_targets, "margin")
        margins += margin_of_draws.view(draws, -1).sum(0)
    largest = total.abs().max()
    if not largest.isfinite():
        raise UserError("the model's gradient with respect to its input is not finite")
    if largest == 0:
        warnings.warn("the gradient is zero in every pixel of every image: the model masks it, and PGD "
                      "does not attack it", stacklevel=3)
    return total / eot, margins / eot


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
    if not getattr(model, "is_random", True):
        draws = 1
    with torch.no_grad():
        margins = torch.stack([torch.stack([objective(model(x), labels, targets, "margin")
                                            for _ in range(draws)]) for x in candidates])
    error_rate, mean_margin = (margins > 0).double().mean(1), margins.mean(1)  # [candidates, B]
    errs_most = error_rate == error_rate.amax(0)
    best = mean_margin.where(errs_most, -torch.inf).argmax(0)
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
    Raises UserError for images that are not floats in [0, 1], labels that do not fit, and settings out
    of range. Warns where the gradient is zero everywhere: that is masking.
    """
    check_images(images)
    if images.dtype not in (torch.float32, torch.float64):  # coarser ones round out of the ball
        raise UserError(f"images must be float32 or float64, not {images.dtype}")
    for classes in (labels,) if targets is None else (labels, targets):
        if classes.dtype != torch.long or classes.shape != (len(images),) or (classes < 0).any():
            raise UserError(f"labels and targets must be one class number (long) for each of the "
                            f"{len(images)} images")
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
        active = torch.arange(len(images), device=images.device)  # the images still attacked
        for _ in range(steps):
            if not len(active):
                break
            active_targets = None if targets is None else targets[active]
            gradient, margins = input_gradient(model, x[active], labels[active], active_targets, loss,
                                               eot, max_batch)
            if early_stop:
                not_yet_fooled = margins <= FOOLED_MARGIN  # the others leave for good
                active, gradient = active[not_yet_fooled], gradient[not_yet_fooled]
            if norm == "linf":
                direction = gradient.sign()
            else:
                direction = F.normalize(gradient.flatten(1), eps=1e-30).view_as(gradient)
            x[active] = project(x[active] + step_size * direction, images[active], eps, norm)
        candidates.append(x)
    return candidates[0] if restarts == 1 else strongest(model, candidates, labels, targets)


# ----------------------------------------------------------------------------------- its score

def accuracy(model, images, labels, draws):
    """Share of correct predictions of each image over fresh draws of the model: [B]."""
    with torch.no_grad():
        return torch.stack([(model(images).argmax(1) == labels).double()
                            for _ in range(draws)]).mean(0)


def check_adversarial(adversarial, images, eps, norm):
    """Stop the run unless every adversarial image lies in the ball and in [0, 1]."""
    check_images(adversarial)
    length = (adversarial - images).flatten(1).norm(p=torch.inf if norm == "linf" else 2, dim=1)
    if not (length <= eps + 1e-6 * max(1.0, eps)).all():
        raise UserError(f"an adversarial image left the ball: {length.max():.6f} over eps {eps:.6f}")


def attack_batches(defense, attacked, batches, eps, norm, losses, draws, settings, show):
    """Attack every batch, check the ball, score on fresh draws.

    attacked: the model that the attacker differentiates. losses: one attack each, the strongest
    counts. settings: the other arguments of pgd. show(text, done) tells how far it is.
    Returns images, adversarial images, labels, and the share of correct draws of each image.
    """
    results = []
    show(f"{len(batches)} batch(es)")
    for number, (images, labels) in enumerate(batches, start=1):
        candidates = [pgd(attacked, images, labels, eps, norm=norm, loss=loss, **settings)
                      for loss in losses]
        adversarial = candidates[0]
        if len(candidates) > 1:
            adversarial = strongest(attacked, candidates, labels)
        check_adversarial(adversarial, images, eps, norm)
        correct = accuracy(defense, adversarial, labels, draws)
        results.append((images, adversarial, labels, correct))
        so_far = torch.cat([correct for _, _, _, correct in results]).mean()
        show(f"batch {number} of {len(batches)}, robust so far {100 * so_far:.1f}%",
             number / len(batches))
    return [torch.cat(values) for values in zip(*results)]


# ----------------------------------------------------------------------------------- the stage

def arguments():
    parser = cli.stage_parser(__doc__)
    evaluation.evaluation_flags(parser, images=80)
    add = parser.add_argument
    add("--attack", nargs="+", choices=["fgsm", "pgd", "pgd+eot"], default=["fgsm", "pgd", "pgd+eot"],
        help="default: all three")
    add("--eps", nargs="+", type=cli.eps, help="default 8/255 16/255, color 4/255 8/255; none for l2")
    add("--norm", choices=["linf", "l2"], default="linf", help="default linf")
    add("--steps", type=cli.count, default=20, help="of pgd, default 20")
    add("--step-size", type=cli.eps, help="of pgd, as 2/255; default 2.5 eps/steps")
    add("--restarts", type=cli.count, default=1, help="of pgd, default 1")
    add("--eot", type=cli.count, default=8, help="draws in each gradient of pgd+eot, default 8")
    add("--loss", nargs="+", choices=["ce", "margin"], default=["ce"], help="both: the stronger one")
    add("--save", metavar="FILE.npz", help="keep what a run of one row found, image by image")
    add("--threat", choices=["white", "gray"], default="white", help="gray: the classifier alone")
    args = parser.parse_args()
    data.set_size(args)
    if args.eps is None and args.norm == "l2":
        raise UserError("--norm l2 needs --eps, a length over all pixels: 1 or 2, say")
    args.eps = args.eps or data.defaults(args.data)["attack_eps"]
    if args.norm == "linf" and max(args.eps) > 1:
        raise UserError(f"--eps {max(args.eps):g} is more than the range of the pixels, 1; write 8/255")
    if "pgd+eot" not in args.attack or args.threat == "gray":
        cli.refuse_unused(args, parser, ["eot"], "without a white-box pgd+eot")
    if args.step_size == 0:
        raise UserError("--step-size 0 moves nothing: give a positive one, as 2/255")
    return args


def attack_settings(args, attack, eps, de3):
    """The arguments of `pgd` for one row of the table; attack: "fgsm", "pgd" or "pgd+eot"."""
    white_box = args.threat == "white"
    if attack == "fgsm":
        settings = dict(steps=1, step_size=eps, random_start=False, restarts=1)
    else:
        step_size = 2.5 * eps / args.steps if args.step_size is None else args.step_size
        settings = dict(steps=args.steps, step_size=step_size, restarts=args.restarts)
    averaged = attack == "pgd+eot" and de3.is_random and white_box
    settings.update(eot=args.eot if averaged else 1, max_batch=args.max_batch,
                    early_stop=not de3.is_random and white_box)
    return settings


def main():
    args = arguments()
    device = cli.open_device(args.device)
    defenses, checkpoint = evaluation.load_defenses(args, device)
    if args.save and (len(defenses) * len(args.eps) * len(args.attack) > 1 or cli.process_count() > 1):
        raise UserError("--save keeps one row, of one process: choose one --classifier, --sigma, --eps "
                        "and --attack")
    own_images, images_in_all, _ = evaluation.load_test_images(args, checkpoint)
    batches = evaluation.test_batches(args, own_images, device)
    table, progress = evaluation.open_table(args), cli.Progress()
    width = max(len(defense.words) for defense in defenses)
    print(f"{images_in_all} {args.split} images, {args.norm}, {args.steps} steps, EOT {args.eot}, "
          f"{args.restarts} restart(s), loss {'+'.join(args.loss)}, {args.threat}-box, {DRAWS} draws, "
          f"seed {args.seed}; accuracy in % [95% interval]\n\n{'defense':{width}} {'eps':>7}  "
          f"{'attack':8} {'clean':>19} {'robust':>19} {'seconds':>8}   gradients/s")
    for defense in defenses:
        words, de3 = defense.words, defense.de3
        draws = DRAWS if de3.is_random else 1
        training.seed_epoch(args.seed, 0)
        with cli.autocast(args.bf16, device):
            clean = torch.cat([accuracy(de3, images, labels, draws) for images, labels in batches])
        clean = cli.sum_over_processes(clean.sum().item())[0] * 100 / images_in_all
        attacked = de3 if args.threat == "white" else de3.classifier
        for eps in args.eps:
            ball = f"{255 * eps:g}/255" if args.norm == "linf" else f"{eps:g}"
            for attack in args.attack:
                settings = attack_settings(args, attack, eps, de3)
                if attack == "pgd+eot" and "pgd" in args.attack and settings["eot"] == 1:
                    continue  # nothing is random for the attacker: the same as pgd
                training.seed_epoch(args.seed, 0)
                started = time.time()
                with cli.autocast(args.bf16, device):
                    images, adversarial, labels, correct = attack_batches(
                        de3, attacked, batches, eps, args.norm, args.loss, draws, settings,
                        lambda text, done=None: progress.show(f"{words}, {ball}, {attack}: {text}",
                                                              done))
                progress.clear()
                robust = cli.sum_over_processes(correct.sum().item())[0] * 100 / images_in_all
                seconds = time.time() - started
                evaluation.append_row(table, evaluation.row_of(
                    defense, args, settings, attack=attack, eps=f"{eps:.6g}", draws=draws,
                    images=images_in_all, clean_accuracy=f"{clean:.2f}",
                    robust_accuracy=f"{robust:.2f}", seconds=f"{seconds:.1f}"))
                gradients = images_in_all * settings["steps"] * settings["eot"] * settings["restarts"]
                speed = f"{gradients * len(args.loss) / seconds:.0f}"
                print(f"{words:{width}} {ball:>7}  {attack:8} "
                      f"{evaluation.interval(clean, images_in_all):>19} "
                      f"{evaluation.interval(robust, images_in_all):>19} {seconds:8.1f} "
                      f"{'stopped early' if settings['early_stop'] else speed:>13}", flush=True)
    print(f"\nwrote {table}")
    if args.save:
        evaluation.save_arrays(args.save, images=images, adversarial=adversarial, labels=labels,
                               correct=correct)


if __name__ == "__main__":
    cli.run_script(main)
