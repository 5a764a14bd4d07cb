"""Stage 4, attack.py: PGD by hand, and the table of clean and robust accuracy over sigma.

    python attack.py                                 undefended against De³, on the digits
    python attack.py --classifier RUN ... --eps 4/255 --sigma off,0,50
    python attack.py --steps 100 --eot 16 --restarts 3 --loss ce,margin       a stronger attack
    python attack.py --threat gray                   gradients of the classifier only

Every attack is white-box through the whole defense unless --threat gray. A random defense must be
attacked with EOT (pgd+eot): the gradient is averaged over --eot draws; plain pgd and fgsm see one
draw per step and overstate it. Robust accuracy is measured after the attack, on --draws fresh draws
of the defense (the mean over draws: one shot). Adds its rows to RUNS/<data>/attack.csv.
"""

import argparse
import csv
import os
import time
from pathlib import Path
from statistics import NormalDist

import torch
import torch.nn.functional as F

import common
import data
from common import UserError
from model import De3, check_images

# ----------------------------------------------------------------------------------- the attack


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
