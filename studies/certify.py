"""Randomized smoothing (Cohen et al. 2019) of De³: a radius in L2 that no attack whatever can cross.

    python -m studies.certify --sigma 50 200            the default De³, on all test images
    python -m studies.certify RUN --sigma 64 --images 200

Inside the radius the class that De³ gives most often over its noise stays the same, with 99.9%
confidence: (σ/255)·Φ⁻¹(p), p a lower bound of that class's probability. The class is guessed from
--n0 draws, its probability bounded from --n others. Appends a row for each image to certify.csv in the
folder in which the first run lies.
"""

import copy
import math
from pathlib import Path
from statistics import NormalDist

import torch

from model import De3, UserError
from support import cli, data, report, run, training, weights

ALPHA = 0.001  # probability that the bound is wrong
CODE = ("model.py", "support/training.py", "studies/certify.py")  # what decides the numbers
CORNERS = (8, 16)  # of L∞ balls of these eps (x 255), shown beside the radii


def lower_bound(hits, draws, alpha=ALPHA):
    """Clopper-Pearson: with confidence 1 - alpha the probability of a hit is at least this.

    The alpha-quantile of Beta(hits, draws - hits + 1), that is the p at which so many hits or more
    of so many draws have probability alpha; by bisection.
    """
    if hits == 0:
        return 0.0
    k = torch.arange(hits, draws + 1, dtype=torch.float64)
    ways = math.lgamma(draws + 1) - torch.lgamma(k + 1) - torch.lgamma(draws - k + 1)
    low, high = 0.0, 1.0
    for _ in range(50):
        p = (low + high) / 2
        tail = (ways + k * math.log(p) + (draws - k) * math.log1p(-p)).exp().sum()
        if tail < alpha:
            low = p
        else:
            high = p
    return low


def adds_gaussian_noise(defense, images):
    """Whether a De³ at fixed sigma adds ε·σ/255, ε ~ N(0, I), and nothing else to these images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sigma = defense.sigma.draw(len(images), images.device).view(-1, 1, 1, 1)
        expected = images + torch.randn_like(images) * sigma / 255
        torch.manual_seed(0)
        return torch.allclose(defense.add_noise(images), expected, atol=1e-5)


def sees_the_noisy_image_alone(defense, images):
    """Whether a defense adds its noise to these images as they are, and then sees nothing else of them.

    It is run on them, and on others to which the same noisy images are given: the logits are equal.
    """
    given, logits = [], []
    noisy = images + defense.sigma.fixed / 255 * torch.randn_like(images)
    twin = copy.copy(defense)

    def noisy_whatever_comes(x):
        given.append(x)
        return noisy
    twin.add_noise = noisy_whatever_comes
    for x in (images, 1 - images):
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)  # a classifier may be random
            logits.append(twin(x))
        if len(given) != len(logits) or not torch.equal(given[-1], x):
            return False
    return torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-4)


def check_certifiable(defense, image):
    """UserError where the theorem does not apply; image [3, H, W] is one to try the defense on."""
    fixed = isinstance(defense, De3) and defense.sigma.fixed
    if not fixed or not defense.is_random:
        raise UserError("a certificate needs Gaussian noise: De³ or noise only at one --sigma above 0")
    if not adds_gaussian_noise(defense, image.expand(4, -1, -1, -1)):
        raise UserError("no certificate: add_noise in model.py does not add the Gaussian ε·σ/255 that the "
                        "theorem is about")
    if defense.autoencoder is not None and defense.autoencoder.norm_pix:
        raise UserError("no certificate with norm_pix: it carries patch statistics of the image around "
                        "the noise")
    if defense.votes != 1:
        raise UserError("a certificate is for the majority of single draws: leave votes at 1")
    if not sees_the_noisy_image_alone(defense, image[None]):
        raise UserError(f"no certificate: {defense.title} sees more of the image than image + ε·σ/255, which "
                        "the theorem is about")


def count_classes(defense, image, draws, max_batch):
    """How often each class is given to one image [3, H, W]: [classes]."""
    counts = 0
    for first in range(0, draws, max_batch):
        copies = image.expand(min(max_batch, draws - first), -1, -1, -1)
        with torch.no_grad():
            logits = defense(copies)
        counts = counts + logits.argmax(1).bincount(minlength=logits.shape[1])
    return counts


def certify(defense, image, n0, n, max_batch):
    """For one image [3, H, W]: (class, or None to abstain; hits; L2 radius in [0, 1] units).

    It holds, with 99.9% confidence, for the class that De³ gives most often over its noise, not for
    one draw. Raises UserError where the theorem does not apply.
    """
    check_certifiable(defense, image)
    label = count_classes(defense, image, n0, max_batch).argmax().item()  # guessed from draws of its own
    hits = count_classes(defense, image, n, max_batch)[label].item()
    p = lower_bound(hits, n)
    if p <= 0.5:
        return None, hits, 0.0
    return label, hits, defense.sigma.fixed / 255 * NormalDist().inv_cdf(p)


def certify_images(defense, single_images, n0, n, max_batch, show, keep):
    """A list of dicts, one for each batch of one image; keep(row) is called with each as it is there."""
    rows = []
    for number, (images, label) in enumerate(single_images):
        predicted, hits, radius = certify(defense, images[0], n0, n, max_batch)
        rows.append(dict(image=number, label=int(label), predicted=predicted, hits=hits, draws=n,
                         l2_radius=radius))
        keep(rows[-1])
        show(f"σ = {defense.sigma}: image {number + 1} of {len(single_images)}",
             (number + 1) / len(single_images))
    return rows


def print_table(rows, defense, n, image_shape):
    """Certified accuracy over radii: the share of images that are right and reach the radius."""
    most = defense.sigma.fixed / 255 * NormalDist().inv_cdf(lower_bound(n, n))
    radii = {most * step / 8: "" for step in range(9)}
    radii.update({0.25: "", 0.5: ""})  # where the literature compares
    for k in CORNERS:
        radii[k / 255 * math.prod(image_shape) ** 0.5] = f"  a corner of the Linf ball of {k}/255"
    print("L2 radius  certified accuracy %")
    for radius in sorted(radii):
        certified = sum(row["predicted"] == row["label"] and row["l2_radius"] >= radius for row in rows)
        print(f"{radius:9.2f}  {100 * certified / len(rows):20.1f}{radii[radius]}")
    print(f"\nThe radius is an L2 length over all pixels; {n} draws certify at most {most:.2f} (--n)\n")


def in_text(row):
    """A row of the table; ABSTAIN where no class can be certified."""
    predicted = "ABSTAIN" if row["predicted"] is None else row["predicted"]
    return {**row, "predicted": predicted, "l2_radius": f"{row['l2_radius']:.6f}"}


def arguments():
    parser = cli.stage_parser(__doc__)
    weights.evaluation_flags(parser, images=1000)
    parser.add_argument("--n0", type=cli.count, default=100,
                        help="draws that guess the class, default 100")
    parser.add_argument("--n", type=cli.number(int, 10), default=1000,  # fewer bound nothing above 1/2
                        help="draws that bound its probability, at least 10, default 1000")
    parser.set_defaults(runs=[Path("runs/digits/de3")])  # an undefended run has no certificate
    return cli.parse(parser)


def main():
    args = arguments()
    device = cli.open_device(args.device)
    cli.one_process("the certificate")
    tested = weights.load_defenses(args, device)
    if "sigma" not in args.given:  # of the defaults those that can be certified
        tested = [one for one in tested if getattr(one.defense, "is_random", False)] or tested
    batches, images_in_all = weights.load_test_images(args, tested, device)
    first_image = next(iter(batches))[0][0]
    for one in tested:
        with cli.autocast(args.bf16, device):
            check_certifiable(one.defense, first_image)
    table = report.open_table(args.out / "certify.csv")
    pixels, progress = data.digest_of(batches), cli.Progress()
    for one in tested:
        origin = dict(run=one.run, defense=one.words, level=one.level, n0=args.n0, data=args.data,
                      split=args.split, images=images_in_all, pixels=pixels, seed=args.seed,
                      precision="bf16" if args.bf16 else "fp32", **run.origin_of_row(one.defense, CODE))
        training.seed_epoch(args.seed, 0)
        single_images = data.Loader(batches.images, 1, device=device)
        with cli.autocast(args.bf16, device):
            rows = certify_images(one.defense, single_images, args.n0, args.n, args.max_batch, progress.show,
                                  lambda row: report.append_row(table, {**origin, **in_text(row)}))
        progress.clear()
        print(f"{one.words}: {images_in_all} {args.split} images, class from {args.n0} draws, bound from "
              f"{args.n}, 99.9% confidence, seed {args.seed}\n")
        print_table(rows, one.defense, args.n, batches.images[0][0].shape)
    print(f"wrote {table}")


if __name__ == "__main__":
    cli.run_script(main)
