"""An attack without gradients, hand-written: random search over squares (Andriushchenko et al. 2020).

The audit runs it, because a defense that hides its gradients hides them from PGD alone.
"""

import math

import torch

from attack import margin, project
from support import cli

DRAWS = 4  # of the model in each query


@torch.no_grad()
def square_search(model, images, labels, eps, queries, draws=DRAWS):
    """A gradient-free attack: random search over squares (Andriushchenko et al. 2020, L∞).

    Starts from vertical stripes of ±eps. Each query paints one square of each image, channel by
    channel, with +eps or -eps, and keeps it where the margin, the mean over draws of the model, grows;
    both images are judged under the same draws, lest a lucky one stay. The squares shrink from a
    quarter of the image to a few pixels. Returns adversarial images.
    """
    def mean_margin(x, seed):
        with cli.repeated_draws(seed):
            return torch.stack([margin(model(x), labels) for _ in range(draws)]).mean(0)
    B, C, H, W = images.shape

    def signs(*shape):
        return torch.randint(2, shape, device=images.device) * 2.0 - 1
    x = project(images + eps * signs(B, C, 1, W), images, eps, "linf")
    for query in range(queries):
        area = 0.25 * 2.0 ** (-6 * query / queries)  # share of the image
        side = max(1, round(min(H, W) * math.sqrt(area)))
        colors = eps * signs(B, C, 1, 1)
        candidate = x.clone()
        for i in range(B):
            top, left = torch.randint(H - side + 1, ()), torch.randint(W - side + 1, ())
            square = (i, slice(None), slice(top, top + side), slice(left, left + side))
            candidate[square] = images[square] + colors[i]
        candidate.clamp_(0, 1)
        seed = torch.randint(2**31, ()).item()
        better = mean_margin(candidate, seed) > mean_margin(x, seed)
        x[better] = candidate[better]
    return x
