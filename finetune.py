"""Stage 2, finetune.py: train two classifiers, one on denoised images (De³), one undefended.

    python finetune.py                              both, from the encoder pretrain.py made
    python finetune.py --mode clean --from-scratch  undefended, no pretraining
    python finetune.py --mode no-denoise            noise without denoising, the ablation
    python finetune.py --adversarial 16/255         adversarial training; --mode de3: through De³
    python finetune.py --autoencoder runs/digits/mim_0.75 --mode de3 --keep-visible     behind MIM

Order: augment, mix (or attack: PGD through the defense, one draw a step), noise, denoise without
gradients, clamp, classify. Writes checkpoint.pt and log.csv after every epoch into a folder inside
that of the autoencoder it starts from; from scratch, beside it. Next: defend.py, attack.py.
"""

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from attack import pgd
from model import SIZES, De3, UserError
from support import checkpoints, cli, data, runs, training, weights

PAPER = dict(epochs=100, batch_size=1024, base_lr=1e-3, warmup_share=0.05, weight_decay=0.05,
             layer_decay=0.75, drop_path=0.1, label_smoothing=0.1, attack_steps=5)
TINY = dict(epochs=48, batch_size=32, base_lr=3.2e-2, warmup_share=1 / 12, weight_decay=0.05,
            layer_decay=1.0, drop_path=0.0, label_smoothing=0.1, attack_steps=5)
RECIPES = {  # the paper's from base on; tiny was chosen on the validation images of the digits
    "tiny": TINY,
    "tiny resnet18": {**TINY, "epochs": 12, "batch_size": 128, "base_lr": 2e-3},
    "small": dict(epochs=10, batch_size=128, base_lr=4e-3, warmup_share=0.1, weight_decay=0.05,
                  layer_decay=0.75, drop_path=0.0, label_smoothing=0.1, attack_steps=2),
    "medium": {**PAPER, "epochs": 50, "batch_size": 256, "warmup_share": 0.1, "attack_steps": 2},
    "base": PAPER,
    "large": {**PAPER, "epochs": 50, "warmup_share": 0.1},
    "huge": {**PAPER, "epochs": 50, "warmup_share": 0.1, "drop_path": 0.2},
}
MAX_MASK_RATIO = 0.75
AUGMENT_FROM = 10_000  # training images: with fewer, the paper's augmentation hinders


def arguments():
    parser = cli.stage_parser(__doc__)
    add = parser.add_argument
    add("--mode", choices=["de3", "clean", "no-denoise"], help="train only this one; no-denoise: "
        "on noisy images; default: de3, then clean (with --adversarial: clean)")
    add("--autoencoder", type=cli.run_path, metavar="RUN", help="folder of the pretraining run, or a "
        "file of published weights; default: the run that pretrain.py makes by default")
    add("--sigma", type=cli.noise_scale, help="noise scale in 8-bit units, one draw per image; "
        "default: the data set's, uniform:0,30 in the paper")
    add("--max-mask-ratio", type=cli.ratio, help="behind MIM: the ratio is drawn from "
        f"Uniform(0, this); default {MAX_MASK_RATIO:g}")
    add("--keep-visible", action="store_true", help="behind MIM: keep unmasked patches as they are")
    add("--adversarial", type=cli.linf_eps, metavar="EPS", help="adversarial training, linf, as 8/255")
    add("--from-scratch", action="store_true", help="random weights instead of the encoder's")
    add("--arch", choices=["vit", "resnet18"], default="vit", help="default vit")
    cli.training_flags(parser, RECIPES)
    args = parser.parse_args()
    data.set_size(args)
    cli.apply_recipe(args, RECIPES.get(f"{args.size} {args.arch}", RECIPES[args.size]))
    if args.mode is None and args.adversarial is not None:
        args.mode = "clean"
    if args.mode == "clean":
        cli.refuse_unused(args, parser, ["sigma"], "in --mode clean")
    args.from_scratch = args.from_scratch or args.arch != "vit"
    if args.init and args.from_scratch:
        raise UserError("--init is for the ViT, and not for --from-scratch")
    if args.mode != "de3":
        cli.refuse_unused(args, parser, ["keep_visible", "max_mask_ratio"], "without --mode de3")
    if args.from_scratch:
        args.layer_decay = 1.0  # no layer is pretrained
    return args


def choose_augmentation(args, train_set, image_size):
    """(what augments a batch, or None; whether images and labels are mixed; the label smoothing).

    Small images are cropped and flipped; others, if there are enough, augmented as they are loaded.
    """
    if args.data == "digits":
        if args.adversarial is not None:  # which shifted digits and smoothed labels make weaker
            return None, False, 0.0
        return training.shift, False, args.label_smoothing
    if data.in_memory(train_set):
        return training.crop_and_flip, False, args.label_smoothing
    if len(train_set) < AUGMENT_FROM:
        return None, False, 0.0
    color = data.defaults(args.data)
    train_set.transform = training.finetune_transform(image_size, color["mean"], color["std"])
    return None, args.adversarial is None, args.label_smoothing


def attack_images(args, defense, images, labels, step, warmup_steps):
    """Adversarial training's images: PGD through the defense; its eps grows during the warm-up.

    The attack meets the network as it will be tested, without drop path, and batch norm must not learn
    from the attack's own steps: hence the evaluation mode.
    """
    eps = args.adversarial
    if step < warmup_steps:
        eps *= step / warmup_steps
    defense.classifier.eval()
    return pgd(defense, images, labels, eps, args.attack_steps)


def print_accuracy(args, mode, defense, max_mask_ratio, heldout, device):
    """Accuracy on held-out images, seen as in training."""
    defense.classifier.eval()
    training.seed_epoch(args.seed, args.epochs)
    level = "" if mode == "clean" else f" at sigma {defense.sigma}"
    if max_mask_ratio is not None:
        defense.mask_ratio = max_mask_ratio / 2
        level = f" at mask ratio {defense.mask_ratio:g}"
    heldout, hits = data.evenly_spread(heldout, 1000, cli.rank(), cli.process_count()), 0
    for images, labels in data.Loader(heldout, 250, args.workers, device):
        with torch.no_grad():
            hits += (defense(images).argmax(1) == labels).sum().item()
    hits, images = cli.sum_over_processes(hits, len(heldout))
    print(f"{mode}{level}: {100 * hits / images:.1f}% of {images:.0f} validation images")


def train(args, mode, device):
    """Train one classifier; mode: de3, clean or no-denoise."""
    # the autoencoder to start from, and to stand behind
    data_defaults = data.defaults(args.data)
    source = args.autoencoder or runs.autoencoder_folder(args)
    autoencoder, behind_mim = None, False
    size = dict(SIZES[args.size], mean=data_defaults["mean"], std=data_defaults["std"])
    starts_from_encoder = not (args.from_scratch or args.init)
    if mode == "de3" or starts_from_encoder:
        autoencoder, pretraining = weights.load_model(source, "autoencoder", device, args)
        size = pretraining["config"]
        behind_mim = mode == "de3" and pretraining["task"] == "mim"
    sigma = max_mask_ratio = None
    if behind_mim:
        if args.sigma is not None:
            raise UserError("--sigma changes nothing behind an autoencoder of --task mim: leave it out")
        max_mask_ratio = MAX_MASK_RATIO if args.max_mask_ratio is None else args.max_mask_ratio
    elif args.keep_visible or args.max_mask_ratio is not None:
        raise UserError("--keep-visible and --max-mask-ratio are for an autoencoder of --task mim")
    elif mode != "clean":
        sigma = args.sigma or cli.noise_scale(data_defaults["finetune_sigma"])

    # the data
    train_set = data.load_dataset(args.data, "train", size["image_size"])
    heldout = data.load_dataset(args.data, "val", size["image_size"])
    if heldout.classes != train_set.classes:
        raise UserError(f"{args.data}: train/ and val/ do not hold the same classes")
    num_classes = len(train_set.classes)
    augment, mixed, label_smoothing = choose_augmentation(args, train_set, size["image_size"])
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=num_classes),
                           v2.CutMix(alpha=1.0, num_classes=num_classes)])
    batch, micro_batches, steps = training.plan_batches(args.batch_size, args.max_batch, len(train_set))
    folder, settings = runs.classifier_run(args, mode, sigma, max_mask_ratio, autoencoder, source,
                                           micro_batches=micro_batches)
    order = data.TrainingOrder(len(train_set), batch, micro_batches, args.seed, cli.rank(),
                               cli.process_count())
    batches = data.Loader(train_set, order, args.workers, device)

    # the classifier, new, from the encoder, or as an earlier run left it
    torch.manual_seed(args.seed)
    config = {name: size[name] for name in weights.ENCODER}
    config.update(arch=args.arch, num_classes=num_classes, drop_path=args.drop_path)
    classifier = checkpoints.make_classifier(**config).to(device)
    if args.init:
        weights.initialize_from_file(classifier, args.init, "classifier")
    elif starts_from_encoder:
        weights.initialize(classifier, autoencoder.state_dict(), "the autoencoder")
    optimizer = torch.optim.AdamW(
        training.parameter_groups(classifier, args.weight_decay, args.layer_decay),
        betas=(0.9, 0.999), fused=True)
    defense = De3(autoencoder if mode == "de3" else None, classifier, sigma, max_mask_ratio,
                  args.keep_visible)
    if args.dry_run:
        image = torch.zeros(1, 3, size["image_size"], size["image_size"], device=device)
        print(f"{mode}:")
        training.print_dry_run(args, classifier, lambda: classifier(defense.purify(image)).sum(),
                               len(train_set), batch, micro_batches, steps)
        return
    path = folder / "checkpoint.pt"
    first_epoch = runs.open_run(path, "classifier", settings, args, classifier, optimizer)
    if args.compile:
        cli.compile_models(device, autoencoder, classifier)

    # training
    model = training.distribute(classifier)
    peak_lr, warmup_steps = args.base_lr * batch / 256, args.warmup_epochs * steps
    for epoch in range(first_epoch, args.epochs):
        training.seed_epoch(args.seed, epoch)
        order.epoch = epoch
        log = training.EpochLog(epoch + 1, args.epochs, steps * batch // cli.process_count())
        for number, (images, labels) in enumerate(batches):
            step = epoch * steps + number // micro_batches
            last_micro_batch = (number + 1) % micro_batches == 0
            targets = labels
            if augment is not None:
                images = augment(images)
            if behind_mim:
                defense.mask_ratio = max_mask_ratio * torch.rand(()).item()
            if args.adversarial is not None:
                with cli.autocast(args.bf16, device):
                    images = attack_images(args, defense, images, labels, step, warmup_steps)
            elif mixed:
                images, targets = mix(images, labels)
            classifier.train()
            with training.gradient_averaging(model, last_micro_batch):
                with cli.autocast(args.bf16, device):
                    with torch.no_grad():
                        purified = defense.purify(images)
                    logits = model(purified)
                    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
                (loss / micro_batches).backward()
            if last_micro_batch:
                lr = training.learning_rate(step, args.epochs * steps, warmup_steps, peak_lr, 1e-6)
                training.update(optimizer, lr)
            hits = None if mixed else (logits.argmax(1) == labels).sum()
            log.add(loss, len(images), hits)
        log.finish(folder, lr)  # before the checkpoint: a row too many is replaced on --resume
        checkpoints.save_checkpoint(path, {
            "kind": "classifier", "config": config, "mode": mode, "settings": settings,
            "classes": train_set.classes, "keep_visible": args.keep_visible,
            "model": classifier.state_dict(), "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1, "epochs": args.epochs, **runs.provenance()})

    print_accuracy(args, mode, defense, max_mask_ratio, heldout, device)
    print(f"wrote {path}\n" if first_epoch < args.epochs else "")


def main():
    args = arguments()
    device = cli.open_device(args.device)
    args.bf16 = cli.training_precision(args.bf16, device, args.size)
    for mode in [args.mode] if args.mode else ["de3", "clean"]:
        train(args, mode, device)


if __name__ == "__main__":
    cli.run_script(main, resumable=True)
