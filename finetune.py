"""Stage 2, finetune.py: train the classifier, on denoised images (De³) and undefended.

    python finetune.py                              both, from the encoder pretrain.py made
    python finetune.py --clean --from-scratch       undefended, no pretraining
    python finetune.py --no-denoise                 noise without denoising, the ablation
    python finetune.py --adversarial 16/255         adversarial training; add --de3: through De³
    python finetune.py --classifier resnet18        torchvision's resnet18 instead of the ViT
    python finetune.py --autoencoder runs/digits/mim_0.75 --de3 --keep-visible      behind MIM

Order: augment, mix (or attack: PGD through the defense, one draw a step), noise, denoise without
gradients, clamp, classify. Writes checkpoint.pt after every epoch into a folder inside the
autoencoder's; beside it, where no autoencoder is used. Next: defend.py, attack.py.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

import common
import data
import pretrain
from attack import pgd
from model import SIZES, De3, NoiseScale, UserError, make_classifier

IMAGENET = dict(epochs=100, batch_size=1024, base_lr=1e-3, warmup_epochs=5, layer_decay=0.75,
                drop_path=0.1)
RECIPES = {  # the paper's from base on; tiny was chosen on the validation images of the digits
    "tiny": dict(epochs=48, batch_size=32, base_lr=3.2e-2, warmup_epochs=4, layer_decay=1.0,
                 drop_path=0.0),
    "tiny resnet18": dict(epochs=12, batch_size=128, base_lr=2e-3, warmup_epochs=1,
                          layer_decay=1.0, drop_path=0.0),
    "small": {**IMAGENET, "epochs": 50, "batch_size": 256},
    "base": IMAGENET, "large": {**IMAGENET, "epochs": 50},
    "huge": {**IMAGENET, "epochs": 50, "drop_path": 0.2},
}
ATTACK_STEPS = 5  # of PGD in adversarial training; its eps grows during the warm-up


def arguments():
    result = common.parser(__doc__)
    add = result.add_argument
    mode = result.add_mutually_exclusive_group()
    for name, text in [("de3", "train only on images denoised by the autoencoder"),
                       ("clean", "train only the undefended classifier"),
                       ("no-denoise", "train on noisy images that are not denoised")]:
        mode.add_argument(f"--{name}", action="store_const", dest="mode", const=name, help=text)
    add("--autoencoder", type=common.run_path, metavar="RUN", help="folder of the pretraining run, or "
        "a file of published weights; default: the run that pretrain.py makes by default")
    add("--sigma", type=NoiseScale.parse, help="noise scale in 8-bit units, one draw per image; "
        f"default uniform:0,30, digits {data.DATASETS['digits']['finetune']}")
    add("--mask-ratio", type=common.ratio, default=0.75,
        help="behind MIM: the ratio is drawn from Uniform(0, this); default 0.75")
    add("--keep-visible", action="store_true", help="behind MIM: keep unmasked patches as they are")
    add("--adversarial", type=common.eps, metavar="EPS", help="adversarial training, linf, as 8/255")
    add("--from-scratch", action="store_true", help="random weights instead of the encoder's")
    add("--classifier", choices=["vit", "resnet18"], default="vit", help="default vit")
    add("--layer-decay", type=common.number(float, 1e-6, 1),
        help="lr factor from layer to layer, default 0.75 (1 for tiny, and from scratch)")
    add("--drop-path", type=common.number(float, 0, 0.99), help="default 0.1 (0 tiny, 0.2 huge)")
    add("--augment", action=argparse.BooleanOptionalAction, help="crop, flip, RandAugment, erasing, "
        "MixUp/CutMix (not with --adversarial), label smoothing; default: with 10,000 training images "
        "or more; the digits are only shifted and their labels smoothed, by default unless --adversarial")
    pretrain.training_flags(add, RECIPES)
    args = result.parse_args()
    common.fill_in(args, RECIPES, args.classifier)
    args.sigma = args.sigma or NoiseScale.parse(data.default(args, "finetune"))
    args.from_scratch = args.from_scratch or args.classifier != "vit"
    if args.init and args.from_scratch:
        raise UserError("--init is for the ViT, and not for --from-scratch")
    args.layer_decay = 1.0 if args.from_scratch else args.layer_decay
    return args


def start_from_autoencoder(classifier, autoencoder):
    """Copy the encoder's weights, without its norm; pos_embed is interpolated to the image size."""
    common.initialize(classifier, autoencoder.state_dict(), "the autoencoder")


def train(args, mode, device):
    """Train one classifier; mode: de3, clean or no-denoise."""
    # the autoencoder to start from, and to stand behind
    source, autoencoder, masks = args.autoencoder or common.default_autoencoder(args), None, False
    size = dict(SIZES[args.size], mean=data.default(args, "mean"), std=data.default(args, "std"))
    if mode == "de3" or not (args.from_scratch or args.init):
        autoencoder, pretraining = common.load_finished(source, "autoencoder", device, args)
        size, masks = pretraining["config"], mode == "de3" and pretraining["task"] == "mim"
    if args.keep_visible and not masks:
        raise UserError("--keep-visible is for --de3 behind an autoencoder of --task mim")

    # the data; the paper's augmentation needs a data set that is big enough
    train_set = data.load_dataset(args.data, "train", size["image_size"])
    heldout = data.load_dataset(args.data, "val", size["image_size"])
    if heldout.classes != train_set.classes:
        raise UserError(f"{args.data}: train/ and val/ do not hold the same classes")
    digits = args.data == "digits"
    augment = args.augment
    if augment is None:  # shifted digits make adversarial training weaker
        augment = args.adversarial is None if digits else len(train_set) >= 10_000
    if augment and not digits:
        train_set.transform = data.finetune_transform(size["image_size"])
    batch, parts, steps = pretrain.plan(args, len(train_set))  # an epoch has `steps` optimizer steps
    order = data.TrainingOrder(len(train_set), batch, parts, args.seed, common.rank(), common.world())
    batches = data.loader(train_set, order, args.workers, device)
    num_classes = len(train_set.classes)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=num_classes),
                           v2.CutMix(alpha=1.0, num_classes=num_classes)])

    # the classifier, new, from the encoder, or as an earlier run left it
    torch.manual_seed(args.seed)
    config = {name: size[name] for name in common.ENCODER}
    config.update(kind=args.classifier, num_classes=num_classes, drop_path=args.drop_path)
    classifier = make_classifier(**config).to(device)
    if args.init:
        common.initialize_from_file(classifier, args.init, "classifier")
    elif not args.from_scratch:
        start_from_autoencoder(classifier, autoencoder)
    optimizer = torch.optim.AdamW(
        pretrain.parameter_groups(classifier, args.weight_decay, args.layer_decay),
        betas=(0.9, 0.999), fused=True)
    parent = common.runs_folder(args) / source.stem if source.is_file() else source
    path = common.variant(
        parent if autoencoder else common.runs_folder(args), args, mode,
        mode != "clean" and not masks and args.sigma,
        masks and args.mask_ratio != 0.75 and f"{args.mask_ratio:g}",
        args.keep_visible and "visible",
        args.adversarial is not None and f"adversarial{255 * args.adversarial:g}",
        args.classifier if args.classifier != "vit" else args.from_scratch and "scratch",
        args.init and f"init-{Path(args.init).stem}",
    ) / "checkpoint.pt"
    ignored = [*common.NO_SETTINGS, "autoencoder", "mode"]
    ignored += ["sigma"] if mode == "clean" or masks else []
    ignored += [] if masks else ["mask_ratio", "keep_visible"]
    settings = {name: str(value) for name, value in vars(args).items() if name not in ignored}
    settings["autoencoder"] = common.fingerprint(autoencoder) if autoencoder else ""
    defense = De3(autoencoder if mode == "de3" else None, classifier,
                  None if mode == "clean" or masks else args.sigma,
                  args.mask_ratio if masks else None, args.keep_visible)
    if args.dry_run:
        one = torch.zeros(1, 3, size["image_size"], size["image_size"], device=device)
        print(f"{mode}:")
        return pretrain.dry_run(args, classifier, lambda: classifier(defense.purify(one)).sum(),
                                len(train_set), batch, parts, steps)
    first_epoch = common.open_run(path, "classifier", settings, args, classifier, optimizer)
    common.compile_models(args, device, autoencoder, classifier)

    # training
    peak = args.base_lr * batch / 256
    model = pretrain.distribute(classifier)
    for epoch in range(first_epoch, args.epochs):
        started, loss_sum, seen, hits = time.time(), 0.0, 0, 0
        common.seed_epoch(args.seed, epoch)
        order.epoch = epoch
        for micro, (images, labels) in enumerate(batches, start=epoch * steps * parts):
            step, last = micro // parts, (micro + 1) % parts == 0
            if augment and digits:
                images = data.shift(images)
            images, labels = images.to(device, non_blocking=True), labels.to(device)
            images, targets = images.clamp(0, 1), labels  # random erasing leaves [0, 1]
            if masks:
                defense.mask_ratio = args.mask_ratio * torch.rand(()).item()
            if args.adversarial is not None:
                classifier.eval()
                warmup = args.warmup_epochs * steps
                radius = args.adversarial * (step / warmup if step < warmup else 1)
                images = pgd(defense, images, labels, radius, ATTACK_STEPS)
            elif augment and not digits:
                images, targets = mix(images, labels)
            classifier.train()
            with pretrain.sharing(model, last):
                with common.autocast(args, device, default=True):
                    with torch.no_grad():
                        purified = defense.purify(images)
                    logits = model(purified)
                    loss = F.cross_entropy(logits, targets, label_smoothing=0.1 if augment else 0.0)
                pretrain.backward(loss, parts, step)
            if last:
                lr = pretrain.learning_rate(step, args.epochs * steps, args.warmup_epochs * steps,
                                            peak, final=1e-6)
                pretrain.update(optimizer, lr)
            loss_sum, seen = loss_sum + loss.item() * len(images), seen + len(images)
            hits += (logits.argmax(1) == labels).sum().item() if targets is labels else math.nan
        common.save_checkpoint(path, {
            "kind": "classifier", "config": config, "mode": mode, "settings": settings,
            "classes": train_set.classes, "keep_visible": args.keep_visible,
            "model": classifier.state_dict(), "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1, "epochs": args.epochs})
        pretrain.log_epoch(epoch + 1, args.epochs, started, lr, loss_sum, seen, hits)

    # accuracy on held-out images, seen as in training
    defense.eval()
    common.seed_epoch(args.seed, args.epochs)
    defense.mask_ratio = args.mask_ratio / 2 if masks else None
    heldout, hits = data.subset(heldout, 1000, common.rank(), common.world()), 0
    for images, labels in data.loader(heldout, 250, workers=args.workers):
        with torch.no_grad():
            hits += (defense(images.to(device)).argmax(1).cpu() == labels).sum().item()
    level = f" at mask ratio {defense.mask_ratio:g}" if masks else (
        "" if mode == "clean" else f" at sigma {args.sigma}")
    hits, images = common.total(hits, len(heldout))
    print(f"{mode}{level}: {100 * hits / images:.1f}% of {images:.0f} validation images")
    print(f"wrote {path}\n" if first_epoch < args.epochs else "")


def main():
    args = arguments()
    device = common.start(args)
    usual = ["de3", "clean"] if args.adversarial is None else ["clean"]
    for mode in [args.mode] if args.mode else usual:
        train(args, mode, device)


if __name__ == "__main__":
    common.run_script(main)
