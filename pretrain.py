"""Stage 1, pretrain.py: learn to denoise (NIM), or to fill in masked patches (MIM).

    python pretrain.py                          NIM on the digits, sigma ~ Gamma: runs/digits/nim
    python pretrain.py --task mim               the baseline, MAE's masking: runs/digits/mim
    python pretrain.py --sigma 75 --out runs/digits/nim75         one fixed sigma, not a random one
    python pretrain.py --out runs/digits/nim75 --resume           go on where it was cut short
    python pretrain.py --data FOLDER --init runs/mae              start from another run's weights

Writes the run's folder: checkpoint.pt and log.csv after every epoch; at the end the PSNR on held-out
images, as a table and as pretrain.png. Next: finetune.py.
"""

import argparse
from pathlib import Path

import torch

from model import (AUTOENCODERS, SIGMA_HELP, SIZES, De3, MaskAndPaste, NoiseScale, add_noise, make_autoencoder,
                   warn_of_small_sigma)
from support import cli, data, report, run, training

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
NORM_PIX_FROM = 14  # pixels of a patch: from here on target patches are normalized by default
SIGMAS, MASK_RATIOS = (25, 50, 75, 100, 150), (0.25, 0.5, 0.75)  # where the result is shown
TRAINED = [name for name in AUTOENCODERS if name not in ("wiener", "blur")]  # --arch: those with weights
CODE = ("model.py", "support/training.py", "pretrain.py")  # what decides the weights


def arguments(argv=None):
    parser = cli.training_parser("python pretrain.py", __doc__, RECIPES)
    add = parser.add_argument
    add("--data", type=data.dataset_name, help=f"{data.DATA_HELP}; default digits")
    add("--task", choices=["nim", "mim"], help="denoise (nim, default) or fill in masked patches (mim)")
    add("--sigma", help="noise scale in 8-bit units (255 is the range of a pixel), one draw per image: "
        f"{SIGMA_HELP}; default: the data set's, gamma:25,3 in the paper")
    add("--norm-pix", action=argparse.BooleanOptionalAction, help="normalize each target patch; default: "
        "only at patches of 14 pixels and more")
    add("--arch", choices=TRAINED, help="what denoises, default vit")
    add("--init", type=cli.folder, metavar="RUN", help="start from this run's weights instead of random ones")
    args = cli.parse(parser, argv)
    if args.sigma is not None:  # as the run that --resume goes on with says it
        args.sigma = str(NoiseScale.parse(args.sigma))
    return args


def settle(args, dataset, device):
    """Every setting of a new run: flags, then the data set, then the recipe."""
    args.size, args.arch = args.size or dataset.size, args.arch or "vit"
    cli.apply_recipe(args, RECIPES, args.task, device)
    if args.task == "mim":
        cli.refuse(args, ["sigma"], "in MIM")
    else:
        sigma = NoiseScale.parse(args.sigma or dataset.pretrain_sigma)
        warn_of_small_sigma(sigma)
        args.sigma = str(sigma)
    if args.norm_pix is None:
        args.norm_pix = SIZES[args.size].get("patch_size", 0) >= NORM_PIX_FROM


@torch.no_grad()
def show_result(path, autoencoder, task, images, seed):
    """PSNR of the denoised (or filled-in) images, as a table, and one image as a picture."""
    kind, levels = (De3, SIGMAS) if task == "nim" else (MaskAndPaste, MASK_RATIOS)
    defenses = [kind(autoencoder, None, level) for level in levels]
    nothing, pictured, worse = [""] * len(levels), {}, []
    print("\nPSNR in dB: more is better")
    for defense in defenses:
        cli.seed_everything(seed)
        made = [defense.steps(batch) for batch in images.split(250)]
        decibels = {}
        for name in made[0]:
            decibels[name] = report.psnr(torch.cat([steps[name] for steps in made]), images)
            caption = f"{decibels[name][0]:.1f} dB"
            pictured.setdefault(name, []).append((made[0][name][0], caption))
        means = {name: of_each.mean().item() for name, of_each in decibels.items()}
        print(f"{defense.level:>10}  " + "  ".join(f"{name} {mean:5.2f}" for name, mean in means.items()))
        before, after = means.values()
        if after < before:
            worse.append(defense.level)
    if worse:
        print(f"note: at {', '.join(worse)} the result is further from the image than what it was made of: "
              "train longer, or on more images")
    rows = [report.Row("clean", images[:1].expand(len(levels), -1, -1, -1), nothing, nothing)]
    for name, columns in pictured.items():
        shown, captions = zip(*columns)
        rows.append(report.Row(name, torch.stack(shown), captions, nothing))
    report.draw_sheet(path, "A held-out image; under it the PSNR to the clean one",
                      [defense.level for defense in defenses], rows)


def main(argv=None):
    # the run: its settings, and what there is of it
    args = arguments(argv)
    device = cli.open_device(args.device)
    args.out = args.out or Path("runs", data.short_name(args.data or "digits"), args.task or "nim")
    saved = run.find(args, "autoencoder")  # None: a new run; else what --resume goes on with
    args.data, args.task = args.data or "digits", args.task or "nim"
    dataset = data.about(args.data, args.size)
    if saved is None:
        settle(args, dataset, device)
    nim = args.task == "nim"

    # the data
    if saved:
        config = saved["config"]
    else:
        config = dict(SIZES[args.size], arch=args.arch, task=args.task, norm_pix=args.norm_pix,
                      mean=dataset.mean, std=dataset.std)
    image_size = config["image_size"]
    transform = training.pretrain_transform(image_size)
    train = data.load_training_images(args.data, image_size, transform, args.seed)
    heldout, _, _ = data.load_images(args.data, "val", image_size, train.classes, data.HELDOUT_IMAGES)
    heldout = data.as_floats(heldout).to(device)
    augment = dataset.pretrain_augment if data.in_memory(train) else None  # photographs: as they are loaded
    training.check_augmentation(augment, heldout[:8])
    batches = data.TrainingBatches(train, args.batch_size, args.max_batch, args.seed, args.workers, device)

    # the model, new or as the run left it
    if saved is None and args.size == "tiny" and device.type == "cpu":
        cli.choose_threads()
    cli.seed_everything(args.seed)
    autoencoder = make_autoencoder(**config).to(device)
    started_from = None
    if args.init and saved is None:
        other, started_from = run.load(args.init)
        run.say_made_by_other_code({args.init: started_from})
        training.initialize(autoencoder, other, f"the {started_from['kind']} in {args.init}")
    optimizer = torch.optim.AdamW(training.parameter_groups(autoencoder, args.weight_decay),
                                  betas=(0.9, args.beta2), fused=True)
    if saved:
        checkpoint = saved
        run.restore(checkpoint, args, CODE, train, model=autoencoder, optimizer=optimizer)
    else:
        checkpoint = run.begin(args, "autoencoder", CODE, config, dataset, train, started_from, task=args.task)
        run.save(args.out, checkpoint, autoencoder, heldout[:8], model=autoencoder, optimizer=optimizer)

    # training
    model = training.distribute(autoencoder, optimizer)
    steps, micro_batches = args.epochs * batches.steps, batches.micro_batches
    peak_lr = args.base_lr * batches.batch / 256
    warmup_steps = args.epochs * args.warmup_share * batches.steps
    training.print_plan(autoencoder, batches, args.epochs, peak_lr)
    for epoch in range(checkpoint["epoch"], args.epochs):
        autoencoder.train()
        images_of_epoch = batches.epoch(epoch)
        log = training.EpochLog(epoch + 1, args.epochs, batches.steps * micro_batches)
        for step in range(epoch * batches.steps, (epoch + 1) * batches.steps):
            for micro_step in range(micro_batches):
                images, _ = next(images_of_epoch)
                if augment is not None:
                    images = augment(images)
                model.require_backward_grad_sync = micro_step == micro_batches - 1
                with cli.autocast(args.bf16, device):
                    if nim:
                        sigma = NoiseScale.parse(args.sigma).draw(len(images), device)
                        loss = model(images, add_noise(images, sigma))
                    else:
                        loss = model(images, mask_ratio=MASK_RATIO)
                (loss / micro_batches).backward()
                log.add(loss, len(images))
            lr = training.learning_rate(step, steps, warmup_steps, peak_lr, final=0.0)
            training.update(optimizer, lr)
        checkpoint["log"].append(log.finish(lr))
        checkpoint["epoch"] = epoch + 1
        run.save(args.out, checkpoint, autoencoder, heldout[:8], model=autoencoder, optimizer=optimizer)

    # what it reached, shown of what the folder holds
    training.check_processes(autoencoder)
    if cli.rank() == 0:
        autoencoder = run.build(run.read(args.out), device)
        show_result(args.out / "pretrain.png", autoencoder, args.task, heldout, args.seed)
    print(f"the run is in {args.out}; next: python finetune.py --autoencoder {args.out}")


if __name__ == "__main__":
    cli.run_script(main, resumable=True)
