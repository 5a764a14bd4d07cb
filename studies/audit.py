"""Is the attack on a defense strong enough to be believed? Checks, each with figures and a verdict.

    python -m studies.audit                          De³ at its largest default sigma, on the digits
    python -m studies.audit UNDEFENDED RUN --sigma 50
    python -m studies.audit UNDEFENDED RUN --sigma 0 --norm l2 --eps 2

After Athalye et al. 2018 and Carlini et al. 2019. The last defense chosen is put to the checks, under
PGD at --eps, white-box; images that fool the undefended ones before it are tried on it, too. In L2 the
gradient-free search, which is one of L∞, is left out.
Accuracies are compared image by image; a difference counts beyond 3 paired standard errors, and each
comparison says the smallest difference that it would have noticed. The exit code is 1 if anything is
suspicious.
"""

import math
import sys

import torch

from attack import (accuracy, check_adversarial, direction_of, in_batches, in_units, input_gradient, margin,
                    needs_eot, pgd, say_one_answer, strongest)
from model import UserError
from studies.square import square_search
from support import cli, data, tested

FEWEST_IMAGES = 90  # fewer than 9 changed images never count (3 standard errors): here 10 points
QUERIES = 300  # of the gradient-free search


def changed(defense, **attributes):
    """The same defense, its weights shared, with other attributes where it has them."""
    twin = tested.twin_of(defense)
    for name, value in attributes.items():
        if hasattr(twin, name):
            setattr(twin, name, value)
    return twin


def predicted_and_actual_gain(defense, images, labels, step=1 / 255):
    """Gain of the margin by one sign step: as the gradient predicts it, and as it is: [B, 2].

    The noise is held fixed, and the clamp has its own gradient, so that on a step this small the two
    agree unless the gradient is not the loss's (shattered, noisy, blocked).
    """
    defense = changed(defense, straight_through=False)
    seed = torch.randint(2**31, ()).item()

    def margins(x):
        with cli.repeated_draws(seed):
            return margin(defense(x), labels)
    with torch.enable_grad():
        x = images.clone().requires_grad_()
        before = margins(x)
        gradient, = torch.autograd.grad(before.sum(), x, allow_unused=True, materialize_grads=True)
    moved = (images + step * gradient.sign()).clamp(0, 1)
    predicted = (gradient * (moved - images)).flatten(1).sum(1)
    with torch.no_grad():
        actual = margins(moved) - before
    return torch.stack([predicted, actual], dim=1).detach()


def audit(defense, images, labels, eps, steps, eot, draws, max_batch, others=(),
          show=lambda name, figures, holds: None, norm="linf"):
    """Checks of a defense, and of the attack on it: a list of (what must hold, figures, holds).

    defense: any model from [0, 1] images to logits; a Defense is also attacked in gray-box, with the
    clamp's own gradient, and through ten votes.
    images [B, 3, H, W] in [0, 1] with labels [B]; eps: radius in norm, "linf" or "l2"; steps, eot: of PGD;
    draws: fresh draws that score; max_batch: images that a model sees at once; others: models whose
    adversarial images are tried on the defense; show(name, figures, holds) is told of each check when it is
    done.
    """
    checks = []
    defense = getattr(defense, "_orig_mod", defense)  # of torch.compile: what is copied is the module in it
    random = needs_eot(defense, images[:max_batch])
    if not random:
        eot = draws = 1

    def score(x, model=defense):
        """Share of correct draws of each image."""
        return in_batches(lambda a, b: accuracy(model, a, b, draws), x, labels, max_batch)

    def attacked(model=defense, **changes):
        """Adversarial images of PGD, with other settings where they are given."""
        settings = {**dict(eps=eps, steps=steps, eot=eot, norm=norm), **changes}
        adversarial = in_batches(lambda a, b: pgd(model, a, b, **settings), images, labels, max_batch)
        check_adversarial(adversarial, images, settings["eps"], norm)
        return adversarial

    def above(a, b):
        """Whether accuracy a is above b, image by image, beyond 3 standard errors."""
        difference = a - b
        return bool(difference.mean() > 3 * difference.std() / len(difference) ** 0.5)

    def add(name, holds, figures):
        checks.append((name, figures, bool(holds)))
        show(*checks[-1])

    def compare(name, base, other, both_ways=False):
        """`other` must not be below `base` (an attack: must not be stronger)."""
        least = max(9 / len(base), (3 * (base - other).std() / len(base) ** 0.5).item())
        holds = not above(base, other) and not (both_ways and above(other, base))
        add(name, holds, f"{100 * base.mean():.1f}, {100 * other.mean():.1f} "
                         f"(would notice {100 * least:.1f})")

    # the defense, without an attack
    clean = score(images)
    in_float32 = torch.autocast(images.device.type, enabled=False)  # as accuracy() scores
    with torch.enable_grad(), in_float32:  # a defense must not notice that it is being differentiated
        x = images.clone().requires_grad_()
        watched = torch.stack([in_batches(lambda a, b: (defense(a).argmax(1) == b).float(), x, labels,
                                          max_batch) for _ in range(draws)]).mean(0)
    gradient = in_batches(lambda a, b: input_gradient(defense, a, b)[0], images, labels, max_batch)
    compare("accuracy is the same while gradients are taken", clean, watched, both_ways=True)
    dead = ((gradient == 0) | ~gradient.isfinite()).float().mean()
    add("under 5% of the input gradients are zero or not finite", dead < 0.05, f"{100 * dead:.1f}%")
    gains = in_batches(lambda a, b: predicted_and_actual_gain(defense, a, b), images, labels, max_batch)
    predicted, actual = gains.mean(0).tolist()
    ratio = actual / predicted if predicted > 0 else math.nan
    add("the gradient predicts the loss: a sign step of 1/255 gains 0.5 to 1.5 times what it predicts",
        0.5 <= ratio <= 1.5, f"{ratio:.2f}")
    compare("accuracy at eps 0 is clean accuracy", clean, score(attacked(eps=0.0, steps=1, eot=1)),
            both_ways=True)
    shaken = (images + eps * direction_of(torch.randn_like(images), norm)).clamp(0, 1)
    noise = score(shaken)
    add("random noise of this eps costs under 10 points", clean.mean() - noise.mean() < 0.1,
        f"{100 * clean.mean():.1f}, {100 * noise.mean():.1f}")

    # other ways to attack
    first = attacked()
    base = score(first)
    fgsm = dict(steps=1, step_size=eps, random_start=False, eot=1)
    compare("FGSM is no stronger than PGD", base, score(attacked(**fgsm)))
    compare("twice the steps change nothing", base, score(attacked(steps=2 * steps)))
    if random:
        compare("twice the EOT draws change nothing", base, score(attacked(eot=2 * eot)))
    compare("the margin loss is no stronger", base, score(attacked(loss="margin")))
    if hasattr(defense, "classifier"):
        compare("gray-box is no stronger than white-box", base,
                score(attacked(defense.classifier, eot=1)))
    if hasattr(defense, "straight_through"):
        compare("the clamp's own gradient is no stronger", base,
                score(attacked(changed(defense, straight_through=False))))
    second = attacked()
    best = torch.cat([strongest(defense, [a, b], y) for a, b, y in zip(
        first.split(max_batch), second.split(max_batch), labels.split(max_batch))])
    compare("a second restart changes nothing", base, score(best))
    if norm == "linf":
        found = in_batches(lambda a, b: square_search(defense, a, b, eps, queries=QUERIES), images, labels,
                           max_batch)
        check_adversarial(found, images, eps, "linf")
        compare(f"gradient-free search ({QUERIES} queries) is no stronger", base, score(found))
    for number, other in enumerate(others, start=1):
        compare(f"images that fool another model ({number}) are no stronger", base,
                score(attacked(other, eot=1)))
    to_gray = 0.5 if norm == "linf" else 0.5 * images[0].numel() ** 0.5  # a radius in which every image is gray
    radii = [radius for radius in (2 * eps, 4 * eps) if radius < to_gray] + [to_gray]
    larger = [base] + [score(attacked(eps=radius)) for radius in radii]
    falls = not any(above(b, a) for a, b in zip(larger, larger[1:]))
    add("robust accuracy falls with eps, to under 5% where the attack may turn every image gray",
        falls and larger[-1].mean() < 0.05, ", ".join(f"{100 * result.mean():.1f}" for result in larger))

    if not random or not hasattr(defense, "votes"):
        return checks
    # one shot, ten tries, ten votes
    voting = changed(defense, votes=10)
    against_votes = attacked(voting, eot=1)
    shots = {}
    for name, model, x in [("clean", defense, images), ("attacked", defense, first),
                           ("clean, 10 votes", voting, images),
                           ("attacked, 10 votes", voting, against_votes)]:
        hits = torch.stack([in_batches(lambda a, b: accuracy(model, a, b), x, labels, max_batch)
                            for _ in range(10)])
        shots[name] = hits.mean(0)
        spread, always = hits.mean(1).std(), hits.amin(0).mean()
        shots[name + " in words"] = (f"{name} {100 * hits.mean():.1f} ± {100 * spread:.1f} / "
                                     f"{100 * always:.1f}")
    add("ten votes, attacked with ten votes, are no worse (one shot ± spread / right in all of ten)",
        not above(shots["attacked"], shots["attacked, 10 votes"]),
        "; ".join(text for name, text in shots.items() if name.endswith("in words")))
    return checks


# ------------------------------------------------------------------------------------ the script

def print_check(name, figures, holds):
    """A line for one check, as soon as it is done."""
    print(f"{'holds     ' if holds else 'SUSPICIOUS'}  {name}: {figures}", flush=True)


def arguments(argv=None):
    parser = cli.stage_parser("python -m studies.audit", __doc__)
    tested.evaluation_flags(parser, images=120)
    add = parser.add_argument_group("the attack").add_argument
    add("--eps", type=cli.eps, help="radius; in L∞ default 16/255 (color 4/255), in L2 without default")
    add("--norm", choices=["linf", "l2"], default="linf", help="default linf")
    add("--steps", type=cli.count, default=20, help="of PGD, default 20")
    add("--eot", type=cli.count, default=8, help="draws in each gradient, default 8")
    add("--draws", type=cli.count, default=5, help="fresh draws that score the defense, default 5")
    args = cli.parse(parser, argv)
    if args.norm == "l2" and args.eps is None:
        raise UserError("--norm l2 needs --eps, a length over all pixels: 0.5 or 1, say")
    return args


def main(argv=None):
    args = arguments(argv)
    device = cli.open_device(args.device, alone=True)
    entries = tested.load_entries(args, device)
    audited = entries[-1]
    others = [entry for entry in entries if entry.defense is None and entry is not audited]
    images, labels, classes = tested.load_test_images(args, entries, device)
    images = data.as_floats(images)
    if len(images) < FEWEST_IMAGES:
        raise UserError(f"{len(images)} images say nothing: a difference counts from 9 images on, give "
                        f"--images {FEWEST_IMAGES} or more")
    say_one_answer(audited.name, audited.model, images, labels, classes, args.max_batch)
    eps = audited.checkpoint["data"]["eps"] if args.eps is None else args.eps
    cli.seed_everything(args.seed)
    print(f"audit of {audited.name} ({audited.folder}): {len(images)} {args.split} images of {args.data}, "
          f"{args.norm} {in_units(eps, args.norm)}, {args.steps} steps, EOT {args.eot}, seed {args.seed}; "
          "transfer from "
          f"{', '.join(entry.folder for entry in others) or 'nothing'}; accuracy in %\n", flush=True)
    with cli.autocast(args.bf16, device):
        checks = audit(audited.model, images, labels, eps, args.steps, args.eot, args.draws, args.max_batch,
                       [entry.model for entry in others], print_check, args.norm)
    sys.exit(0 if all(holds for _, _, holds in checks) else 1)


if __name__ == "__main__":
    cli.run_script(main)
