"""A denoiser that nobody trained: is it noisy image modeling that defends, or any denoiser?

    python -m studies.wiener --data digits --out runs/digits/wiener           the linear filter
    python -m studies.wiener --data digits --blur --out runs/digits/blur      a Gaussian blur
    python finetune.py --autoencoder runs/digits/wiener --init runs/digits/nim --out runs/digits/de3_wiener
    python finetune.py --autoencoder runs/digits/wiener --from-scratch --out runs/digits/de3_wiener_scratch

Writes a run's folder that the stages take like that of pretrain.py. The filter is the Wiener filter of the
training images at --sigma (their principal components, each scaled by λ / (λ + (σ/255)²)), in closed form.
The blur has the width that denoises validation images best at the same sigma, as PSNR tells it. Prints the
PSNR of both on validation images, as pretrain.py does for its own.
"""

import argparse

import torch

from model import SIZES, Blur, UserError, make_autoencoder
from pretrain import SIGMAS
from support import cli, data, report, run

FEWEST_GAIN = 1e-3  # components that are scaled below this are left out
WIDTHS = [0.25 * step for step in range(1, 17)]  # of the blur, in pixels: which ones are tried
AT = {"digits": 120.0}  # the sigma that the filter is for, unless told otherwise; 75 for other data
CODE = ("model.py", "studies/wiener.py")  # what decides the weights


def components_of(images, sigma):
    """(mean, variances λ, directions v) of images [N, C, S, S], of the components that the filter keeps."""
    x = images.flatten(1).double()
    center = x.mean(0)
    covariance = (x - center).T @ (x - center) / (len(x) - 1)
    variances, directions = torch.linalg.eigh(covariance)
    variances = variances.clamp(min=0)
    kept = variances / (variances + (sigma / 255) ** 2) > FEWEST_GAIN
    return center.float(), variances[kept].float(), directions[:, kept].float()


@torch.no_grad()
def decibels(model, images, sigma, seed):
    """The mean PSNR of what the model makes of these images at one sigma, clamped to [0, 1]."""
    cli.seed_everything(seed)
    noisy = images + torch.randn_like(images) * sigma / 255
    return report.psnr(model.reconstruct(noisy, images).clamp(0, 1), images).mean().item()


def arguments(argv=None):
    parser = argparse.ArgumentParser(prog="python -m studies.wiener", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=data.dataset_name, default="digits", help=f"{data.DATA_HELP}; default digits")
    add("--out", type=cli.folder, required=True, metavar="RUN", help="the run's folder")
    add("--blur", action="store_true", help="a Gaussian blur instead of the filter")
    add("--sigma", type=cli.positive, help="the noise it is for; default 120 (digits), 75")
    add("--seed", type=int, default=0, help="what the fine-tuning takes over, default 0")
    return cli.parse(parser, argv, machine=False)


def main(argv=None):
    args = arguments(argv)
    dataset = data.about(args.data)
    if dataset.size not in ("tiny", "small"):
        raise UserError("a filter of all pixels is for images of up to 64 pixels")
    size = SIZES[dataset.size]
    sigma = AT.get(args.data, 75.0) if args.sigma is None else args.sigma
    images, _, classes = data.load_images(args.data, "train", size["image_size"])
    heldout, _, _ = data.load_images(args.data, "val", size["image_size"], classes, data.HELDOUT_IMAGES)
    facts = run.facts(args.data, dataset, images)
    images, heldout = data.as_floats(images), data.as_floats(heldout)
    config = dict(size, task="nim", mean=dataset.mean, std=dataset.std)
    if args.blur:
        width = max(WIDTHS, key=lambda width: decibels(Blur(width), heldout, sigma, args.seed))
        config.update(arch="blur", width=width)
        model = make_autoencoder(**config)
        print(f"a blur of {width:g} pixels")
    else:
        center, variances, directions = components_of(images, sigma)
        config.update(arch="wiener", components=len(variances), sigma=sigma)
        model = make_autoencoder(**config)
        model.load_state_dict(dict(center=center, variances=variances, directions=directions))
        print(f"the linear filter for σ = {sigma:g}: {len(variances)} of {len(center)} components")
    for level in SIGMAS:
        print(f"{f'σ = {level}':>10}  denoised {decibels(model, heldout, level, args.seed):5.2f} dB")
    settings = dict(data=args.data, size=dataset.size, seed=args.seed)
    checkpoint = dict(kind="autoencoder", config=config, settings=settings, data=facts, classes=classes,
                      task="nim", epoch=1, epochs=1, log=[], made_by=[run.origin(args.command, CODE)],
                      model=model.state_dict())
    run.write_new(args.out, checkpoint)
    print(f"the run is in {args.out}; next: python finetune.py --autoencoder {args.out} --init RUN")


if __name__ == "__main__":
    cli.run_script(main)
