"""Randomized smoothing (Cohen et al. 2019) of De³: an L2 radius within which no attack changes the vote.

    python -m studies.certify --sigma 50 200            the default De³, on all test images
    python -m studies.certify RUN --sigma 64 --images 200

Inside the radius the class that De³ gives most often over its noise stays the same, with 99.9%
confidence: (σ/255)·Φ⁻¹(p), p a lower bound of that class's probability. The class is guessed from
--n0 draws, its probability bounded from --n others. Appends a row for each image to certify.csv in the
folder in which the first run lies.
"""

import math
from statistics import NormalDist

import torch

from attack import in_batches
from model import De3, UserError
from support import cli, data, report, run, tested

ALPHA = 0.001  # probability that the bound is wrong
CODE = ("model.py", "studies/certify.py")  # what decides the numbers
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


def draws_gaussian_noise_once(defense, image):
    """Whether a De³ at fixed sigma turns image [3, H, W] into image + ε·σ/255, one ε ~ N(0, I), and no other.

    What it makes of the image is compared with what it makes of this ε when it is given: a defense that
    draws again, in rounds or elsewhere, or adds something else, differs.
    """
    given = tested.twin_of(defense)
    with torch.no_grad():
        with cli.repeated_draws(seed=0):
            drawn = defense.purify(image[None])
        with cli.repeated_draws(seed=0):
            defense.sigma.draw(1, image.device)
            given.noise = torch.randn_like(image[None])[0]
            made_of_it = given.purify(image[None])
        noisy = image + given.noise * defense.sigma.fixed / 255
        added = torch.allclose(given.add_noise(image[None])[0], noisy, atol=1e-5)
        return added and torch.allclose(drawn, made_of_it, rtol=1e-3, atol=1e-4)


def sees_the_noisy_image_alone(defense, images):
    """Whether a defense adds its noise to these images as they are, and then sees nothing else of them.

    It is run on them, and on others to which the same noisy images are given: the logits are equal.
    """
    given, logits = [], []
    noisy = images + defense.sigma.fixed / 255 * torch.randn_like(images)
    twin = tested.twin_of(defense)

    def noisy_whatever_comes(x):
        given.append(x)
        return noisy
    twin.add_noise = noisy_whatever_comes
    for x in (images, 1 - images):
        with torch.no_grad(), cli.repeated_draws(seed=0):  # a classifier may be random
            logits.append(twin(x))
        if len(given) != len(logits) or not torch.equal(given[-1], x):
            return False
    return torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-4)


def each_draw_stands_alone(defense, image):
    """Whether copies of an image [3, H, W] in one batch get a noise each, and an answer that no other changes."""
    twin, logits = tested.twin_of(defense), []
    with torch.no_grad(), cli.repeated_draws(seed=0):
        one, other = defense.purify(image.expand(2, -1, -1, -1))
    for beside in (torch.rand_like(image), torch.rand_like(image)):
        pair = torch.stack([image, beside])
        twin.add_noise = lambda x: pair
        with torch.no_grad(), cli.repeated_draws(seed=0):
            logits.append(twin(pair)[0])
    return not torch.equal(one, other) and torch.allclose(*logits, rtol=1e-3, atol=1e-4)


def check_certifiable(defense, image):
    """UserError where the theorem does not apply; image [3, H, W] is one to try the defense on."""
    fixed = isinstance(defense, De3) and defense.sigma.fixed
    if not fixed or not defense.is_random:
        raise UserError("a certificate needs Gaussian noise: De³ or noise only at one --sigma above 0")
    if not draws_gaussian_noise_once(defense, image):
        raise UserError(f"no certificate: {defense.title} does not add one Gaussian ε·σ/255 to the image, "
                        "which the theorem is about")
    if getattr(defense.autoencoder, "norm_pix", False):
        raise UserError("no certificate with norm_pix: it carries patch statistics of the image around "
                        "the noise")
    if defense.votes != 1:
        raise UserError("a certificate is for the majority of single draws: leave votes at 1")
    if not sees_the_noisy_image_alone(defense, image[None]):
        raise UserError(f"no certificate: {defense.title} sees more of the image than image + ε·σ/255, which "
                        "the theorem is about")
    if not each_draw_stands_alone(defense, image):
        raise UserError(f"no certificate: the images of a batch share the noise of {defense.title}, or change each "
                        "other's answers, so that its draws are not independent")


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
    one draw, and where `check_certifiable` finds nothing.
    """
    label = count_classes(defense, image, n0, max_batch).argmax().item()  # guessed from draws of its own
    hits = count_classes(defense, image, n, max_batch)[label].item()
    p = lower_bound(hits, n)
    if p <= 0.5:
        return None, hits, 0.0
    return label, hits, defense.sigma.fixed / 255 * NormalDist().inv_cdf(p)


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


def arguments(argv=None):
    parser = cli.stage_parser("python -m studies.certify", __doc__)
    tested.evaluation_flags(parser, images=1000, runs=["runs/digits/de3"])  # an undefended run has none
    parser.add_argument("--n0", type=cli.count, default=100, help="draws that guess the class, default 100")
    parser.add_argument("--n", type=cli.count, default=1000, help="draws that bound its probability, default "
                        "1000")
    args = cli.parse(parser, argv)
    if lower_bound(args.n, args.n) <= 0.5:
        raise UserError(f"--n {args.n} draws bound nothing above 1/2, give 10 or more")
    return args


def main(argv=None):
    args = arguments(argv)
    device = cli.open_device(args.device, alone=True)
    entries = tested.load_entries(args, device)
    if not (args.sigma or args.defense):  # of the defaults those that can be certified
        entries = [entry for entry in entries if getattr(entry.defense, "is_random", False)] or entries
    images, labels, _ = tested.load_test_images(args, entries, device)
    for entry in entries:
        with cli.autocast(args.bf16, device):
            check_certifiable(entry.defense, data.as_floats(images[0]))
    table, pixels, progress = args.out / "certify.csv", data.digest(images, labels), cli.Progress()
    written = report.read_rows(table)
    for entry in entries:
        origin = dict(run=entry.folder, defense=entry.name, level=entry.level, n0=args.n0, data=args.data,
                      split=args.split, images=len(images), pixels=pixels, attack_seed=args.seed,
                      precision="bf16" if args.bf16 else "fp32", weights=run.fingerprint(entry.defense),
                      code=run.digest_of_code_of(CODE, entry.defense))
        rows = []

        def certify_one(x, y):
            predicted, hits, radius = certify(entry.defense, x[0], args.n0, args.n, args.max_batch)
            rows.append(dict(image=len(rows), label=y.item(), predicted=predicted, hits=hits, draws=args.n,
                             l2_radius=radius))
            image = dict(origin, image=rows[-1]["image"], label=rows[-1]["label"], draws=args.n)
            if not report.find_row(written, image, table):  # each counts once, also on another machine
                report.append_row(table, {**origin, **in_text(rows[-1]), "commit": run.commit()})
            return torch.tensor([radius])
        cli.seed_everything(args.seed)
        with cli.autocast(args.bf16, device):
            in_batches(certify_one, images, labels, 1, lambda done: progress.show(entry.name, done))
        progress.clear()
        print(f"{entry.name}: {len(images)} {args.split} images, class from {args.n0} draws, bound from "
              f"{args.n}, 99.9% confidence, seed {args.seed}\n")
        print_table(rows, entry.defense, args.n, images[0].shape)
    print(f"wrote {table}")


if __name__ == "__main__":
    cli.run_script(main)
