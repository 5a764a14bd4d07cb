"""Stage 1, pretrain.py: learn to denoise (NIM), or to fill in masked patches (MIM).

    python pretrain.py                          NIM on the digits, sigma ~ Gamma
    python pretrain.py --task mim               the baseline, MAE's masking
    python pretrain.py --sigma 75               one fixed sigma instead of a random one
    python pretrain.py --data FOLDER --size small --sigma gamma:25,3

Writes RUNS/<data>/<variant>/checkpoint.pt after every epoch, and ends with the denoising PSNR on
held-out images. Next: finetune.py.
"""

import argparse
import contextlib
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import common
import data
from model import SIZES, Autoencoder, De3, NoiseScale, UserError, add_noise

IMAGENET = dict(epochs=800, batch_size=4096, base_lr=1.5e-4, warmup_epochs=40)
RECIPES = {  # the paper's from base on; tiny was chosen on the validation images of the digits
    "tiny": dict(epochs=80, batch_size=32, base_lr=3.2e-2, warmup_epochs=8),
    "small": dict(epochs=200, batch_size=512, base_lr=1e-3, warmup_epochs=10),
    "base": IMAGENET, "large": IMAGENET, "huge": IMAGENET,
}


def training_flags(add, recipes):
    """The flags of both training stages; what is not given is taken from the size's recipe."""
    def text(name):
        return "default " + ", ".join(f"{recipes[key][name]:g} ({key})" for key in recipes)
    add("--epochs", type=common.count, help=text("epochs"))
    add("--batch-size", type=common.count, help=text("batch_size"))
    add("--base-lr", type=common.number(float, 1e-12, 1e30),
        help="lr = this x batch/256; " + text("base_lr"))
    add("--warmup-epochs", type=common.number(float), help=text("warmup_epochs"))
    add("--weight-decay", type=common.number(float, 0, 10), default=0.05, help="default 0.05")
    add("--init", metavar="FILE", help="start from published weights: MAE's, NIM-AdvDef's, timm's "
        "ViT (average pooling), or a checkpoint.pt")
    add("--dry-run", action="store_true", help="print what the flags come to, and stop")
    add("--resume", action="store_true", help="go on where an interrupted run last saved")
    add("--overwrite", action="store_true", help="train anew over an earlier run of this name")


def parameter_groups(model, weight_decay, layer_decay=1.0):
    """AdamW groups: no weight decay on 1-D parameters, nor on what model.no_weight_decay names.

    layer_decay: the lr of block i is scaled by layer_decay^(depth - i), that of the tokens
    (patches, positions, class) by layer_decay^(depth + 1), that of the head by 1 (as in MAE).
    """
    depth, groups = len(getattr(model, "blocks", ())), {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = 0 if name.startswith(("cls_token", "pos_embed", "patch_embed")) else depth + 1
        decays = parameter.dim() > 1 and name not in getattr(model, "no_weight_decay", ())
        group = groups.setdefault((layer, decays), dict(
            params=[], weight_decay=weight_decay if decays else 0.0,
            lr_scale=layer_decay ** (depth + 1 - layer)))
        group["params"].append(parameter)
    return list(groups.values())


def learning_rate(step, steps, warmup_steps, peak, final):
    """Linear warm-up from 0, then half a cosine from peak to final; one value per iteration."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def plan(args, images):
    """The batch as it is used, its micro-batches per process, and the steps of an epoch.

    --batch-size counts the images of all processes in one optimizer step.
    """
    share = min(args.batch_size, images) // common.world()
    if not share:
        raise UserError(f"{images} images in batches of {args.batch_size} do not fill {common.world()} "
                        "processes")
    parts = next(k for k in range(1, share + 1) if share % k == 0 and share // k <= args.max_batch)
    batch = share * common.world()
    return batch, parts, images // batch


def dry_run(args, model, train_one, images, batch, parts, steps):
    """Print what the flags come to; train_one: the loss of one image."""
    model.eval()  # batch norm takes no single image in training mode
    with FlopCounterMode(display=False) as counter:
        train_one().backward()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"images          {images}\nparameters      {parameters / 1e6:.2f} million\n"
          f"GFLOPs/image    {counter.get_total_flops() / 1e9:.3f} (one training step, 2 per "
          f"multiply-add)\nbatch           {batch} = {common.world()} process(es) x {parts} "
          f"micro-batch(es) of {batch // parts // common.world()}\n"
          f"learning rate   {args.base_lr * batch / 256:.3g} at its peak\n"
          f"epochs          {args.epochs}, {args.warmup_epochs:g} of them warm-up\n"
          f"steps           {args.epochs * steps}, {steps} in an epoch")


def distribute(model):
    """DistributedDataParallel around the model, where there are several processes."""
    return DistributedDataParallel(model) if dist.is_initialized() else model


def sharing(model, last):
    """Context of one micro-batch: gradients are averaged over processes in the last one only."""
    return model.no_sync() if dist.is_initialized() and not last else contextlib.nullcontext()


def backward(loss, parts, step):
    """Gradients of one of the micro-batches of a step; a loss that is not finite stops the run."""
    if not loss.isfinite():
        raise UserError(f"the loss is {loss.item()} at step {step}; what was saved before is kept: "
                        "try a lower --base-lr")
    (loss / parts).backward()


def update(optimizer, lr):
    """One optimizer step at this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.step()
    optimizer.zero_grad()


def log_epoch(epoch, epochs, started, lr, loss, images, hits=math.nan):
    """One line of the log; loss, images and hits are this process's sums over the epoch."""
    loss, images, hits = common.total(loss, images, hits)
    seconds = time.time() - started
    left = seconds * (epochs - epoch)
    accuracy = "" if math.isnan(hits) else f"accuracy {100 * hits / images:5.1f}%  "
    print(f"epoch {epoch:4d}/{epochs}  loss {loss / images:7.4f}  {accuracy}lr {lr:.1e}  "
          f"{images / seconds:6.0f} images/s  {left // 60:.0f}:{left % 60:02.0f} left", flush=True)


def arguments():
    result = common.parser(__doc__)
    add = result.add_argument
    add("--image-size", type=common.number(int, 1, 4096), help="default: that of the size")
    add("--patch-size", type=common.number(int, 1, 4096), help="default: that of the size")
    add("--task", choices=["nim", "mim"], default="nim", help="default nim")
    add("--sigma", type=NoiseScale.parse, help="noise scale in 8-bit units, one draw per image: a "
        "number, gamma:SHAPE,SCALE or uniform:LOW,HIGH; default gamma:25,3, digits gamma:10,12")
    add("--mask-ratio", type=common.ratio, default=0.75, help="of MIM, default 0.75")
    add("--all-patches", action="store_true", help="MIM's loss over all patches, not masked ones")
    add("--norm-pix", action=argparse.BooleanOptionalAction,
        help="normalize each target patch; default: only at patches of 14 pixels and more")
    training_flags(add, RECIPES)
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
        args.task == "mim" and args.all_patches and "allpatches",
        args.init and f"init-{Path(args.init).stem}")


def main():
    args = arguments()
    device = common.start(args)
    path = run_folder(args) / "checkpoint.pt"
    settings = {name: str(value) for name, value in vars(args).items() if name not in common.NO_SETTINGS}

    # the data
    train = data.load_dataset(args.data, "train", args.image_size,
                              data.pretrain_transform(args.image_size))
    batch, parts, steps = plan(args, len(train))  # an epoch has `steps` optimizer steps
    order = data.TrainingOrder(len(train), batch, parts, args.seed, common.rank(), common.world())
    batches = data.loader(train, order, args.workers, device)
    heldout = data.subset(data.load_dataset(args.data, "val", args.image_size), 1000,
                          common.rank(), common.world())

    # the model, new or as an earlier run left it
    torch.manual_seed(args.seed)
    config = dict(SIZES[args.size], image_size=args.image_size, patch_size=args.patch_size,
                  norm_pix=args.norm_pix, mean=data.default(args, "mean"),
                  std=data.default(args, "std"))
    autoencoder = Autoencoder(**config).to(device)
    if args.init:
        common.initialize_from_file(autoencoder, args.init)
    autoencoder.mask_token.requires_grad_(args.task == "mim")  # NIM does not use it
    optimizer = torch.optim.AdamW(parameter_groups(autoencoder, args.weight_decay),
                                  betas=(0.9, 0.95), fused=True)
    if args.dry_run:
        one = torch.zeros(1, 3, args.image_size, args.image_size, device=device)
        masking = dict(mask_ratio=args.mask_ratio) if args.task == "mim" else dict(noisy=one)
        return dry_run(args, autoencoder, lambda: autoencoder(one, **masking), len(train), batch,
                       parts, steps)
    first_epoch = common.open_run(path, "autoencoder", settings, args, autoencoder, optimizer)
    common.compile_models(args, device, autoencoder)

    # training
    nim, peak = args.task == "nim", args.base_lr * batch / 256
    model = distribute(autoencoder)
    for epoch in range(first_epoch, args.epochs):
        started, loss_sum, seen = time.time(), 0.0, 0
        common.seed_epoch(args.seed, epoch)
        order.epoch = epoch
        for micro, (images, _) in enumerate(batches, start=epoch * steps * parts):
            step, last = micro // parts, (micro + 1) % parts == 0
            images = images.to(device, non_blocking=True)
            with sharing(model, last):
                with common.autocast(args, device, default=True):
                    if nim:
                        noisy = add_noise(images, args.sigma.draw(len(images), device))
                        loss = model(images, noisy)
                    else:
                        loss = model(images, mask_ratio=args.mask_ratio, all_patches=args.all_patches)
                backward(loss, parts, step)
            loss_sum, seen = loss_sum + loss.item() * len(images), seen + len(images)
            if last:
                lr = learning_rate(step, args.epochs * steps, args.warmup_epochs * steps, peak, 0.0)
                update(optimizer, lr)
        common.save_checkpoint(path, {
            "kind": "autoencoder", "config": config, "task": args.task, "settings": settings,
            "model": autoencoder.state_dict(), "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1, "epochs": args.epochs})
        log_epoch(epoch + 1, args.epochs, started, lr, loss_sum, seen)

    # how well it works: PSNR on held-out images, of what goes in and of what comes out
    print("\nsigma  noisy dB  denoised dB" if nim else "\nmask ratio  filled in dB (visible patches kept)")
    for level in (25, 50, 75, 100, 150) if nim else (0.25, 0.5, 0.75):
        sigma, mask_ratio = (level, None) if nim else (None, level)
        defense = De3(autoencoder, None, sigma, mask_ratio, keep_visible=True)
        common.seed_epoch(args.seed, args.epochs)
        before = after = 0
        for images, _ in data.loader(heldout, 250, workers=args.workers):
            images = images.to(device)
            with torch.no_grad():
                before += common.psnr(add_noise(images, level), images).sum().item()
                after += common.psnr(defense.purify(images), images).sum().item()
        count, before, after = common.total(len(heldout), before, after)
        print(f"{level:5g}  {before / count:8.2f}  {after / count:11.2f}" if nim else
              f"{level:10g}  {after / count:12.2f}")
    if args.norm_pix:
        print("(--norm-pix: each patch has the mean and sd of the clean image's back)")
    if first_epoch < args.epochs:
        print(f"\nwrote {path}")


if __name__ == "__main__":
    common.run_script(main)
