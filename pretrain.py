"""Stage 1, pretrain.py: learn to denoise (NIM), or to fill in masked patches (MIM).

    python pretrain.py                          NIM on the digits, sigma ~ Gamma
    python pretrain.py --task mim               the baseline, MAE's masking
    python pretrain.py --sigma 75               one fixed sigma instead of a random one
    python pretrain.py --data FOLDER --size small --sigma gamma:25,3

Writes RUNS/<data>/<variant>/checkpoint.pt after every epoch, and ends with the denoising PSNR on
held-out images. Next: finetune.py.
"""

import argparse

import torch

import common
import data
from common import SIZES, Progress
from model import Autoencoder, NoiseScale, add_noise

IMAGENET = dict(epochs=800, batch_size=4096, base_lr=1.5e-4, warmup_epochs=40)
RECIPES = {  # the paper's from base on; tiny was chosen on the validation images of the digits
    "tiny": dict(epochs=80, batch_size=32, base_lr=3.2e-2, warmup_epochs=8),
    "small": dict(epochs=200, batch_size=512, base_lr=1e-3, warmup_epochs=10),
    "base": IMAGENET, "large": IMAGENET, "huge": IMAGENET,
}


def arguments():
    result = common.parser(__doc__)
    add = result.add_argument
    add("--image-size", type=common.count, help="default: that of the size")
    add("--patch-size", type=common.count, help="default: that of the size")
    add("--task", choices=["nim", "mim"], default="nim", help="default nim")
    add("--sigma", type=NoiseScale.parse, help="noise scale in 8-bit units, one draw per image: a "
        "number, gamma:SHAPE,SCALE or uniform:LOW,HIGH; default gamma:25,3, digits gamma:10,12")
    add("--mask-ratio", type=common.ratio, default=0.75, help="of MIM, default 0.75")
    add("--all-patches", action="store_true", help="MIM's loss over all patches, not masked ones")
    add("--norm-pix", action=argparse.BooleanOptionalAction,
        help="normalize each target patch; default: only at patches of 14 pixels and more")
    common.training_flags(add, RECIPES)
    args = common.fill_in(result.parse_args(), RECIPES)
    args.image_size = args.image_size or SIZES[args.size]["image_size"]
    args.patch_size = args.patch_size or SIZES[args.size]["patch_size"]
    args.sigma = args.sigma or NoiseScale.parse(data.default(args, "pretrain"))
    args.norm_pix = args.patch_size >= 14 if args.norm_pix is None else args.norm_pix
    return args


def run_folder(args):
    usual = SIZES[args.size]
    return common.variant(
        common.runs_folder(args), args,
        f"nim_{args.sigma}" if args.task == "nim" else f"mim_{args.mask_ratio:g}",
        args.size != data.default(args, "size") and args.size,
        args.image_size != usual["image_size"] and f"image{args.image_size}",
        args.patch_size != usual["patch_size"] and f"patch{args.patch_size}",
        args.norm_pix != (args.patch_size >= 14) and ("normpix" if args.norm_pix else "plainpix"),
        args.task == "mim" and args.all_patches and "allpatches")


def main():
    args = arguments()
    device = common.pick_device(args.device)
    path = run_folder(args) / "checkpoint.pt"
    settings = {name: str(value) for name, value in vars(args).items() if name not in
                ("device", "runs", "workers", "resume", "overwrite")}

    # the data
    train = data.load_dataset(args.data, "train", args.image_size,
                              data.pretrain_transform(args.image_size))
    batches = data.loader(train, args.batch_size, shuffle=True, workers=args.workers, device=device)
    heldout = data.subset(data.load_dataset(args.data, "val", args.image_size), 1000)

    # the model, new or as an earlier run left it
    torch.manual_seed(args.seed)
    config = dict(SIZES[args.size], image_size=args.image_size, patch_size=args.patch_size,
                  norm_pix=args.norm_pix, mean=data.default(args, "mean"),
                  std=data.default(args, "std"))
    autoencoder = Autoencoder(**config).to(device)
    optimizer = torch.optim.AdamW(common.parameter_groups(autoencoder, args.weight_decay),
                                  betas=(0.9, 0.95))
    first_epoch = common.open_run(path, "autoencoder", settings, args, autoencoder, optimizer)

    # training
    peak = args.base_lr * min(args.batch_size, len(train)) / 256
    progress = Progress(first_epoch, args.epochs)
    for epoch in range(first_epoch, args.epochs):
        common.seed_epoch(args.seed, epoch)
        for step, (images, _) in enumerate(batches, start=epoch * len(batches)):
            images = images.to(device, non_blocking=True)
            if args.task == "nim":
                loss = autoencoder(images, add_noise(images, args.sigma.draw(len(images), device)))
            else:
                loss, _, _ = autoencoder.mim(images, args.mask_ratio, all_patches=args.all_patches)
            lr = common.learning_rate(step, args.epochs * len(batches),
                                      args.warmup_epochs * len(batches), peak, final=0.0)
            common.update(loss, optimizer, lr, step)
            progress.add(loss.item(), len(images))
        common.save_checkpoint(path, {
            "kind": "autoencoder", "config": config, "task": args.task, "settings": settings,
            "model": autoencoder.state_dict(), "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1, "epochs": args.epochs})
        progress.epoch_done(epoch + 1, lr)

    # how well it works: PSNR on held-out images, of what goes in and of what comes out
    autoencoder.eval()
    nim = args.task == "nim"
    print("\nsigma  noisy dB  denoised dB" if nim else "\nmask ratio  reconstructed dB")
    for level in (25, 50, 75, 100, 150) if nim else (0.25, 0.5, 0.75):
        common.seed_epoch(args.seed, args.epochs)
        before, after = [], []
        for images, _ in data.loader(heldout, 250, workers=args.workers):
            images = images.to(device)
            with torch.no_grad():
                noisy = add_noise(images, level if nim else 0)
                restored = (autoencoder.reconstruct(noisy, images) if nim else
                            autoencoder.to_images(autoencoder.mim(images, level)[1], images))
            before.append(common.psnr(noisy, images))
            after.append(common.psnr(restored.clamp(0, 1), images))
        first = f"{level:5g}  {torch.cat(before).mean():8.2f}" if nim else f"{level:10g}"
        print(f"{first}  {torch.cat(after).mean():{11 if nim else 16}.2f}")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    common.run_script(main)
