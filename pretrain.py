"""Stage 1, pretrain.py: learn to denoise (NIM), or to fill in masked patches (MIM).

    python pretrain.py                          NIM on the digits, sigma ~ Gamma
    python pretrain.py --task mim               the baseline, MAE's masking
    python pretrain.py --sigma 75               one fixed sigma instead of a random one
    python pretrain.py --data FOLDER --size small --sigma gamma:25,3

Writes RUNS/<data>/<variant>/checkpoint.pt after every epoch, and ends with the denoising PSNR on
held-out images. Next: finetune.py.
"""

import argparse
from pathlib import Path

import torch

import data
from common import (Progress, count, fill_recipe, fraction, learning_rate, open_run, parameter_groups, parser, pick_device, psnr, run_script,
                    save_checkpoint, seed_epoch, sigma, training_flags, update)
from model import SIZES, Autoencoder, NoiseScale, add_noise, check_mask_ratio

IMAGENET = dict(epochs=800, batch_size=4096, base_lr=1.5e-4, warmup_epochs=40)
RECIPES = {  # the paper's for base and up; tiny was chosen on the digits' validation images
    "tiny": dict(epochs=150, batch_size=64, base_lr=4e-3, warmup_epochs=10),
    "small": dict(epochs=200, batch_size=512, base_lr=5e-4, warmup_epochs=10),
    "base": IMAGENET, "large": IMAGENET, "huge": IMAGENET,
}
SIGMA = NoiseScale("gamma", 25, 3)  # the paper's
DIGITS_SIGMA = NoiseScale("gamma", 10, 8)  # wider; does better on the digits


def default_size(name):
    return {"digits": "tiny", "cifar10": "small"}.get(name, "base")


def default_sigma(name):
    return DIGITS_SIGMA if name == "digits" else SIGMA


def variant(args):
    """The run's folder, named by what makes it different from other runs."""
    parts = [f"nim_{args.sigma}" if args.task == "nim" else f"mim_{args.mask_ratio:g}"]
    parts += [args.size] if args.size != default_size(args.data) else []
    parts += [f"image{args.image_size}"] if args.image_size != SIZES[args.size]["image_size"] else []
    parts += [f"patch{args.patch_size}"] if args.patch_size != SIZES[args.size]["patch_size"] else []
    parts += ["normpix"] if args.norm_pix else []
    parts += ["allpatches"] if args.all_patches else []
    parts += [f"seed{args.seed}"] if args.seed else []
    return Path(args.runs) / data.short_name(args.data) / "_".join(parts).replace(":", "")


def arguments():
    result = parser(__doc__)
    add = result.add_argument
    add("--size", choices=SIZES, help="default tiny (digits), small (cifar10), base (folder)")
    add("--image-size", type=count, help="default: that of the size")
    add("--patch-size", type=count, help="default: that of the size")
    add("--task", choices=["nim", "mim"], default="nim", help="default nim")
    add("--sigma", type=sigma, help="NIM's noise scale, in 8-bit units: a number, gamma:SHAPE,SCALE "
        f"or uniform:LOW,HIGH; default {SIGMA}, {DIGITS_SIGMA} for digits")
    add("--mask-ratio", type=fraction, default=0.75, help="MIM's, default 0.75")
    add("--all-patches", action="store_true", help="MIM's loss over all patches, not masked only")
    add("--norm-pix", action=argparse.BooleanOptionalAction,
        help="normalize each target patch; default: only at patches of 14 pixels and more")
    training_flags(add, lambda name: ", ".join(f"{RECIPES[s][name]:g} ({s})" for s in RECIPES))
    args = result.parse_args()
    args.size = args.size or default_size(args.data)
    args.image_size = args.image_size or SIZES[args.size]["image_size"]
    args.patch_size = args.patch_size or SIZES[args.size]["patch_size"]
    args.sigma = args.sigma or default_sigma(args.data)
    args.norm_pix = args.patch_size >= 14 if args.norm_pix is None else args.norm_pix
    fill_recipe(args, RECIPES, args.size)
    check_mask_ratio(args.mask_ratio)
    return args


def main():
    args = arguments()
    device = pick_device(args.device)
    folder = variant(args)
    settings = {name: str(value) for name, value in vars(args).items()
                if name not in ("device", "runs", "workers", "resume", "overwrite")}

    # the model
    torch.manual_seed(args.seed)
    mean, std = data.statistics(args.data)
    config = dict(SIZES[args.size], image_size=args.image_size, patch_size=args.patch_size,
                  norm_pix=args.norm_pix, mean=mean, std=std)
    autoencoder = Autoencoder(**config).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(autoencoder, args.weight_decay),
                                  betas=(0.9, 0.95))

    # the data
    transform = data.pretrain_transform(args.image_size)
    train = data.load_dataset(args.data, "train", args.image_size, transform)
    batches = data.loader(train, args.batch_size, shuffle=True, workers=args.workers, device=device)
    heldout = data.subset(data.load_dataset(args.data, "val", args.image_size), 1000)

    # where an earlier run stands
    checkpoint = open_run(folder, settings, "autoencoder", args)
    epoch = 0
    if checkpoint:
        epoch = checkpoint["epoch"]
        autoencoder.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    # training
    steps_per_epoch = len(batches)
    peak = args.base_lr * min(args.batch_size, len(train)) / 256
    progress = Progress(epoch, args.epochs)
    for epoch in range(epoch, args.epochs):
        seed_epoch(args.seed, epoch)
        for i, (images, _) in enumerate(batches):
            images = images.to(device, non_blocking=True)
            if args.task == "nim":
                loss = autoencoder(images, add_noise(images, args.sigma.draw(len(images), device)))
            else:
                loss, _, _ = autoencoder.mim(images, args.mask_ratio, all_patches=args.all_patches)
            step = epoch * steps_per_epoch + i
            lr = learning_rate(step, args.epochs * steps_per_epoch,
                               args.warmup_epochs * steps_per_epoch, peak, final=0.0)
            update(loss, optimizer, lr, step)
            progress.add(loss.item(), None, len(images))
        save_checkpoint(folder / "checkpoint.pt", {
            "kind": "autoencoder", "config": config, "task": args.task, "settings": settings,
            "model": autoencoder.state_dict(), "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1, "epochs": args.epochs})
        progress.epoch_done(epoch + 1, lr)

    # how well it works: PSNR in dB on held-out images, of what goes in and of what comes out
    autoencoder.eval()
    levels = (25, 50, 75, 100, 150) if args.task == "nim" else (0.25, 0.5, 0.75)
    print("\nsigma   noisy  denoised" if args.task == "nim" else "\nmask ratio  reconstructed")
    for level in levels:
        seed_epoch(args.seed, args.epochs)
        before = after = 0.0
        for images, _ in data.loader(heldout, 250, workers=args.workers):
            images = images.to(device)
            with torch.no_grad():
                if args.task == "nim":
                    noisy = add_noise(images, level)
                    restored = autoencoder.reconstruct(noisy, images)
                    before += psnr(noisy, images) * len(images) / len(heldout)
                else:
                    _, prediction, _ = autoencoder.mim(images, level)
                    restored = autoencoder.to_images(prediction, images)
                after += psnr(restored.clamp(0, 1), images) * len(images) / len(heldout)
        print(f"{level:5g}  {before:6.2f}  {after:8.2f}" if args.task == "nim"
              else f"{level:10g}  {after:13.2f}")
    print(f"\nwrote {folder / 'checkpoint.pt'}")


if __name__ == "__main__":
    run_script(main)
