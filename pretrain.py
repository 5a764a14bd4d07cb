"""Stage 1, pretrain.py: learn to denoise (NIM), or to fill in masked patches (MIM).

    python pretrain.py                          NIM on the digits, sigma ~ Gamma
    python pretrain.py --task mim               the baseline, MAE's masking
    python pretrain.py --sigma 75               one fixed sigma instead of a random one

Writes RUNS/<data>/<run>/: checkpoint.pt and log.csv after every epoch; at the end the PSNR on
held-out images, as a table and as pretrain.png. Next: finetune.py.
"""

import argparse

import torch

from model import SIZES, Autoencoder, add_noise
from support import checkpoints, cli, data, pictures, runs, training, weights

PAPER = dict(epochs=800, batch_size=4096, base_lr=1.5e-4, warmup_share=0.05, weight_decay=0.05)
RECIPES = {  # the paper's from base on; tiny was chosen on the validation images of the digits
    "tiny": dict(epochs=80, batch_size=32, base_lr=3.2e-2, warmup_share=0.1, weight_decay=0.05),
    "small": dict(epochs=10, batch_size=128, base_lr=2e-3, warmup_share=0.1, weight_decay=0.05),
    "medium": dict(epochs=200, batch_size=512, base_lr=1e-3, warmup_share=0.05, weight_decay=0.05),
    "base": PAPER, "large": PAPER, "huge": PAPER,
}
MASK_RATIO = 0.75  # of MIM; its loss is over masked patches only
SIGMAS, MASK_RATIOS = (25, 50, 75, 100, 150), (0.25, 0.5, 0.75)  # where the result is shown


def arguments():
    parser = cli.stage_parser(__doc__)
    add = parser.add_argument
    add("--task", choices=["nim", "mim"], default="nim", help="default nim")
    add("--sigma", type=cli.noise_scale, help="noise scale in 8-bit units, one draw per image: a "
        "number, gamma:SHAPE,SCALE or uniform:LOW,HIGH; default: the data set's, "
        "gamma:25,3 in the paper")
    add("--norm-pix", action=argparse.BooleanOptionalAction,
        help="normalize each target patch; default: only at patches of 14 pixels and more")
    cli.training_flags(parser, RECIPES)
    args = parser.parse_args()
    data.set_size(args)
    cli.apply_recipe(args, RECIPES[args.size])
    if args.task == "mim":
        cli.refuse_unused(args, parser, ["sigma"], "in MIM")
        args.mask_ratio = MASK_RATIO
    else:
        args.sigma = args.sigma or cli.noise_scale(data.defaults(args.data)["pretrain_sigma"])
    if args.norm_pix is None:
        args.norm_pix = runs.norm_pix_by_default(args.size)
    return args


def main():
    args = arguments()
    device = cli.open_device(args.device)
    args.bf16 = cli.training_precision(args.bf16, device, args.size)
    nim = args.task == "nim"
    folder = runs.autoencoder_folder(args, args.task, args.sigma if nim else args.mask_ratio,
                                     args.norm_pix, args.init)

    # the data
    data_defaults, size = data.defaults(args.data), SIZES[args.size]
    train = data.load_dataset(args.data, "train", size["image_size"],
                              training.pretrain_transform(size["image_size"]))
    heldout = data.evenly_spread(data.load_dataset(args.data, "val", size["image_size"]), 1000,
                                 cli.rank(), cli.process_count())
    batch, micro_batches, steps = training.plan_batches(args.batch_size, args.max_batch, len(train))
    settings = cli.training_settings(args, data=data.identity(args.data), micro_batches=micro_batches)
    order = data.TrainingOrder(len(train), batch, micro_batches, args.seed, cli.rank(),
                               cli.process_count())
    batches = data.Loader(train, order, args.workers, device)
    crops = args.data != "digits" and data.in_memory(train)  # others are augmented as they are loaded

    # the model, new or as an earlier run left it
    torch.manual_seed(args.seed)
    config = dict(size, norm_pix=args.norm_pix, mean=data_defaults["mean"], std=data_defaults["std"])
    autoencoder = Autoencoder(**config).to(device)
    if args.init:
        weights.initialize_from_file(autoencoder, args.init)
    autoencoder.mask_token.requires_grad_(not nim)  # NIM does not use it
    optimizer = torch.optim.AdamW(training.parameter_groups(autoencoder, args.weight_decay),
                                  betas=(0.9, 0.95), fused=True)
    if args.dry_run:
        image = torch.zeros(1, 3, size["image_size"], size["image_size"], device=device)
        task = dict(noisy=image) if nim else dict(mask_ratio=args.mask_ratio)
        training.print_dry_run(args, autoencoder, lambda: autoencoder(image, **task), len(train),
                               batch, micro_batches, steps)
        return
    path = folder / "checkpoint.pt"
    first_epoch = runs.open_run(path, "autoencoder", settings, args, autoencoder, optimizer)
    if args.compile:
        cli.compile_models(device, autoencoder)

    # training
    model = training.distribute(autoencoder)
    peak_lr = args.base_lr * batch / 256
    for epoch in range(first_epoch, args.epochs):
        training.seed_epoch(args.seed, epoch)
        order.epoch = epoch
        log = training.EpochLog(epoch + 1, args.epochs, steps * batch // cli.process_count())
        for number, (images, _) in enumerate(batches):
            if crops:
                images = training.crop_and_flip(images)
            step = epoch * steps + number // micro_batches
            last_micro_batch = (number + 1) % micro_batches == 0
            with training.gradient_averaging(model, last_micro_batch):
                with cli.autocast(args.bf16, device):
                    if nim:
                        noisy = add_noise(images, args.sigma.draw(len(images), device))
                        loss = model(images, noisy)
                    else:
                        loss = model(images, mask_ratio=args.mask_ratio)
                (loss / micro_batches).backward()
            if last_micro_batch:
                lr = training.learning_rate(step, args.epochs * steps, args.warmup_epochs * steps,
                                            peak_lr, final=0.0)
                training.update(optimizer, lr)
            log.add(loss, len(images))
        log.finish(folder, lr)  # before the checkpoint: a row too many is replaced on --resume
        checkpoints.save_checkpoint(path, {
            "kind": "autoencoder", "config": config, "task": args.task, "settings": settings,
            "model": autoencoder.state_dict(), "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1, "epochs": args.epochs, **runs.provenance()})

    pictures.print_psnr(autoencoder, args, heldout, SIGMAS if nim else MASK_RATIOS, device)
    if cli.rank() == 0:
        few, _ = next(iter(data.Loader(heldout, 10, device=device)))
        pictures.draw_pretraining(folder / "pretrain.png", autoencoder, few[-1:],
                                  SIGMAS if nim else MASK_RATIOS, nim, args.seed)
    if first_epoch < args.epochs:
        print(f"\nwrote {path}")


if __name__ == "__main__":
    cli.run_script(main, resumable=True)
