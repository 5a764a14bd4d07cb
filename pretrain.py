"""Stage 1, pretrain.py: learn to denoise (NIM), or to fill in masked patches (MIM).

    python pretrain.py                          NIM on the digits, sigma ~ Gamma: runs/digits/nim
    python pretrain.py --task mim               the baseline, MAE's masking: runs/digits/mim
    python pretrain.py --sigma 75 --out runs/digits/nim75         one fixed sigma, not a random one
    python pretrain.py --out runs/digits/nim75 --resume           go on where it was cut short

Writes the run's folder: checkpoint.pt and log.csv after every epoch; at the end the PSNR on held-out
images, as a table and as pretrain.png. Next: finetune.py.
"""

import argparse
from pathlib import Path

import torch

from model import SIGMA_HELP, SIZES, Autoencoder, De3, MaskAndFill, NoiseScale, add_noise
from support import cli, data, report, run, training, weights

PAPER = dict(epochs=800, batch_size=4096, base_lr=1.5e-4, warmup_share=0.05, weight_decay=0.05,
             beta2=0.95)
RECIPES = {  # the paper's from base on; tiny and small were chosen on validation images
    "tiny": dict(PAPER, epochs=60, batch_size=64, base_lr=6.4e-2, warmup_share=0.1),
    "tiny mim": dict(PAPER, epochs=60, batch_size=64, base_lr=1.6e-2, warmup_share=0.1),
    "small": dict(PAPER, epochs=30, batch_size=64, base_lr=8e-3, warmup_share=0.1),
    "small mim": dict(PAPER, epochs=30, batch_size=64, base_lr=4e-3, warmup_share=0.1),
    "medium": dict(PAPER, epochs=200, batch_size=512, base_lr=1e-3),
    "base": PAPER, "large": PAPER, "huge": PAPER,
}
MASK_RATIO = 0.75  # of MIM; its loss is over masked patches only
SIGMAS, MASK_RATIOS = (25, 50, 75, 100, 150), (0.25, 0.5, 0.75)  # where the result is shown
CODE = ("model.py", "support/training.py", "pretrain.py")  # what decides the weights


def arguments():
    parser = cli.training_parser(__doc__, RECIPES)
    add = parser.add_argument
    add("--data", type=data.dataset_name, default="digits",
        help=f"{data.DATA_HELP}; default digits")
    add("--task", choices=["nim", "mim"], default="nim", help="default nim")
    add("--sigma", type=cli.noise_scale, help="noise scale in 8-bit units (0..255), one draw per image: "
        f"{SIGMA_HELP}; default: the data set's, gamma:25,3 in the paper")
    add("--norm-pix", action=argparse.BooleanOptionalAction,
        help="normalize each target patch; default: only at patches of 14 pixels and more")
    return cli.parse(parser)


def recipe_of(args):
    """The row of RECIPES for --size and --task."""
    return RECIPES.get(f"{args.size} {args.task}", RECIPES[args.size])


def settle(args, device):
    """Every setting of the run: from its checkpoint with --resume, else flags, data set and recipe."""
    args.out = args.out or Path("runs", Path(args.data).name, args.task)
    if args.resume and run.take_settings(args, "autoencoder"):
        cli.apply_recipe(args, recipe_of(args), device)  # what an older checkpoint does not say
        return
    dataset = data.about(args.data)
    args.size = args.size or dataset.size
    cli.apply_recipe(args, recipe_of(args), device)
    if args.task == "mim":
        cli.refuse_unused(args, ["sigma"], "in MIM")
        args.mask_ratio = MASK_RATIO
    elif args.sigma is None:
        args.sigma = dataset.pretrain_sigma
    if args.norm_pix is None:
        args.norm_pix = SIZES[args.size]["patch_size"] >= weights.NORM_PIX_FROM


def main():
    # the run: its settings, and what there is of it
    args = arguments()
    device = cli.open_device(args.device)
    settle(args, device)
    this_run = run.Run(args, "autoencoder", CODE)
    nim = args.task == "nim"
    sigma = NoiseScale.parse(args.sigma) if nim else None

    # the data
    dataset = data.about(args.data)
    config = dict(SIZES[args.size], norm_pix=args.norm_pix, mean=dataset.mean, std=dataset.std)
    if this_run.saved:
        config = this_run.saved["config"]
    image_size = config["image_size"]
    train = data.load_dataset(args.data, "train", image_size, training.pretrain_transform(image_size))
    heldout = data.load_heldout(args.data, image_size, args.workers)
    augment = dataset.pretrain_augment if data.in_memory(train) else None  # others: as they are loaded
    batches = data.TrainingBatches(train, args.batch_size, args.max_batch, args.seed, args.workers, device)

    # the model, new or as the run left it
    torch.manual_seed(args.seed)
    autoencoder = Autoencoder(**config).to(device)
    if args.init and not this_run.saved:
        weights.initialize_from_file(autoencoder, args.init)
    autoencoder.mask_token.requires_grad_(not nim)  # NIM does not use it
    optimizer = torch.optim.AdamW(training.parameter_groups(autoencoder, args.weight_decay),
                                  betas=(0.9, args.beta2), fused=True)

    def loss_of(count):
        """The loss of so many black images."""
        images = torch.zeros(count, 3, image_size, image_size, device=device)
        return autoencoder(images, images) if nim else autoencoder(images, mask_ratio=args.mask_ratio)
    if args.dry_run:
        training.print_dry_run(args, autoencoder, loss_of, len(train), batches)
        return
    first_epoch = this_run.start(config, args.data, train, autoencoder, optimizer,
                                 lambda: loss_of(batches.at_once).backward(), task=args.task)

    # training
    model = training.distribute(autoencoder)
    steps, micro_batches = batches.steps, batches.micro_batches
    peak_lr = args.base_lr * batches.batch / 256
    for epoch in range(first_epoch, args.epochs):
        images_of_epoch = batches.epoch(epoch)
        log = training.EpochLog(epoch + 1, args.epochs, len(train))
        for step in range(epoch * steps, (epoch + 1) * steps):
            for micro_step in range(micro_batches):
                images, _ = next(images_of_epoch)
                if augment is not None:
                    images = augment(images)
                model.require_backward_grad_sync = micro_step == micro_batches - 1
                with cli.autocast(args.bf16, device):
                    if nim:
                        noisy = add_noise(images, sigma.draw(len(images), device))
                        loss = model(images, noisy)
                    else:
                        loss = model(images, mask_ratio=args.mask_ratio)
                (loss / micro_batches).backward()
                log.add(loss, len(images))
            lr = training.learning_rate(step, args.epochs * steps, args.warmup_epochs * steps, peak_lr,
                                        final=0.0)
            training.update(optimizer, lr)
        this_run.save(epoch + 1, log.finish(lr), autoencoder, optimizer)

    # what it reached
    if nim:
        shown = [De3(autoencoder, None, level) for level in SIGMAS]
    else:
        shown = [MaskAndFill(autoencoder, None, level, keep_visible=True) for level in MASK_RATIOS]
    report.show_pretraining(args.out / "pretrain.png", shown, heldout, args.seed, args.epochs, device)


if __name__ == "__main__":
    cli.run_script(main, resumable=True)
