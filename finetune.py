"""Stage 2, finetune.py: train a classifier, on denoised images (De³) or otherwise.

    python finetune.py                              De³, from runs/digits/nim: runs/digits/de3
    python finetune.py --mode clean                 undefended: runs/digits/clean
    python finetune.py --mode no-denoise            noise without denoising, the ablation
    python finetune.py --adversarial 16/255         adversarial training; with --mode de3 through De³
    python finetune.py --autoencoder runs/digits/mim --out runs/digits/de3_mim       behind MIM
    python finetune.py --out runs/digits/de3 --resume                 go on where it was cut short

Order: augment, mix (or attack: PGD through the defense, one draw a step), noise, denoise without
gradients, clamp, classify. Writes the run's folder, beside the autoencoder's unless --out names it:
checkpoint.pt (which holds the autoencoder of a De³ as well) and log.csv after every epoch. Data set,
size and seed are the autoencoder's. Next: defend.py, attack.py.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from attack import pgd
from model import CLASSIFIERS, DEFENSES, SIGMA_HELP, SIZES, UserError, make_classifier
from support import cli, data, report, run, training, weights

PAPER = dict(epochs=100, batch_size=1024, base_lr=1e-3, warmup_share=0.05, weight_decay=0.05,
             layer_decay=0.75, beta2=0.999, drop_path=0.1, label_smoothing=0.1, attack_steps=5, augment=True)
TINY = dict(epochs=40, batch_size=64, base_lr=6.4e-2, warmup_share=1 / 12, weight_decay=0.05,
            layer_decay=1.0, beta2=0.98, drop_path=0.0, label_smoothing=0.1, attack_steps=5, augment=True)
RECIPES = {  # the paper's from base on; tiny and small were chosen on validation images
    "tiny": TINY,
    "tiny resnet18": {**TINY, "epochs": 12, "batch_size": 128, "base_lr": 2e-3, "beta2": 0.999},
    "tiny no-denoise": {**TINY, "epochs": 48, "batch_size": 32, "base_lr": 3.2e-2},  # 6.4e-2 fails on
    "tiny mim": {**TINY, "epochs": 48, "batch_size": 32, "base_lr": 3.2e-2},  # images as hard as these
    "tiny adversarial": {**TINY, "label_smoothing": 0.0, "augment": False},  # which make it weaker
    "small": dict(epochs=15, batch_size=64, base_lr=4e-3, warmup_share=0.1, weight_decay=0.05,
                  layer_decay=0.75, beta2=0.98, drop_path=0.0, label_smoothing=0.1, attack_steps=2,
                  augment=True),
    "medium": {**PAPER, "epochs": 50, "batch_size": 256, "warmup_share": 0.1, "attack_steps": 2},
    "base": PAPER,
    "large": {**PAPER, "epochs": 50, "warmup_share": 0.1},
    "huge": {**PAPER, "epochs": 50, "warmup_share": 0.1, "drop_path": 0.2},
}
MAX_MASK_RATIO = 0.75
AUGMENT_FROM = 10_000  # photographs: with fewer, the paper's augmentation hinders
CODE = ("model.py", "support/training.py", "finetune.py")  # what decides the weights


def arguments():
    parser = cli.training_parser(__doc__, RECIPES)
    add = parser.add_argument
    add("--mode", choices=["de3", "clean", "no-denoise"], help="de3 (default), clean: undefended "
        "(default with --adversarial), no-denoise: on noisy images")
    add("--autoencoder", type=cli.run_path, metavar="RUN", default=Path("runs/digits/nim"),
        help="folder of the pretraining run, or a file of published weights; default runs/digits/nim")
    add("--sigma", type=cli.noise_scale, help="noise scale in 8-bit units (0..255), one draw per image: "
        f"{SIGMA_HELP}; default: the data set's, uniform:0,30 in the paper")
    add("--max-mask-ratio", type=cli.ratio, help="behind MIM: the ratio is drawn from "
        f"Uniform(0, this); default {MAX_MASK_RATIO:g}")
    add("--keep-visible", action="store_true", help="behind MIM: keep unmasked patches as they are")
    add("--adversarial", type=cli.linf_eps, metavar="EPS", help="adversarial training, linf, as 8/255")
    add("--from-scratch", action="store_true", help="random weights instead of the encoder's")
    add("--arch", choices=CLASSIFIERS, default="vit", help="default vit")
    add("--data", type=data.dataset_name, help="default: the autoencoder's; its folder has moved, say")
    weights.file_flags(parser)
    return cli.parse(parser)


def fill_in_recipe(args, device, behind_mim):
    """What is still open, from the recipe of the size and of what is special."""
    if args.from_scratch:
        args.layer_decay = 1.0  # no layer is pretrained
    special = "mim" if behind_mim else args.mode
    if args.adversarial is not None:
        special = "adversarial"
    if args.arch != "vit":
        special = args.arch
    cli.apply_recipe(args, RECIPES.get(f"{args.size} {special}", RECIPES[args.size]), device)


def settle(args, device):
    """Every setting of the run: from its checkpoint with --resume, else flags, autoencoder and recipe.

    Returns the autoencoder, frozen, or None where nothing of it is needed, and what is known of it.
    """
    args.from_scratch = args.from_scratch or args.arch != "vit"
    if args.mode is None:
        args.mode = "de3" if args.adversarial is None else "clean"
    needs_autoencoder = args.mode == "de3" or not (args.from_scratch or args.init)
    folder = args.autoencoder.parent
    if not needs_autoencoder or weights.is_published(args.autoencoder):
        folder = Path("runs", Path(args.data or "digits").name)
    args.out = args.out or folder / (args.mode if args.adversarial is None else "adversarial")
    saved = run.take_settings(args, "classifier") if args.resume else None
    if saved:
        fill_in_recipe(args, device, saved["defense"] == "mim")  # what an older checkpoint does not say
        if saved["autoencoder"] is None:
            return None, None
        return weights.load_model(args.out, "autoencoder", device, args)
    if args.init and args.from_scratch:
        raise UserError("--init is for the ViT, and not for --from-scratch")
    if needs_autoencoder:
        autoencoder, pretraining = weights.load_model(args.autoencoder, "autoencoder", device, args)
        made = pretraining["settings"]
        if args.size not in (None, made["size"]):
            raise UserError(f"--size {args.size}: the autoencoder's is {made['size']}, and decides")
        if not weights.is_published(args.autoencoder):
            cli.refuse_unused(args, ["task", "norm_pix", "mean", "std"], "for a run's folder, which knows it")
        if args.data not in (None, made["data"]):
            print(f"note: {args.autoencoder} was trained on {made['data']}, the classifier is on {args.data}")
        args.data, args.size = args.data or made["data"], made["size"]
        args.seed = made["seed"] if args.seed is None else args.seed
        args.autoencoder_weights = run.fingerprint(autoencoder)
    else:
        cli.refuse_unused(args, ["autoencoder"], "where neither the encoder nor the decoder is used")
        args.data = args.data or "digits"
        dataset = data.about(args.data)
        args.size = args.size or dataset.size
        config = dict(SIZES[args.size], mean=dataset.mean, std=dataset.std)
        autoencoder = None
        pretraining = dict(config=config, task="nim", data=dict(finetune_sigma=dataset.finetune_sigma))
    behind_mim = args.mode == "de3" and pretraining["task"] == "mim"
    fill_in_recipe(args, device, behind_mim)
    if args.mode == "clean" or behind_mim:
        cli.refuse_unused(args, ["sigma"], "in --mode clean" if args.mode == "clean" else "behind MIM")
    elif args.sigma is None:
        args.sigma = pretraining["data"]["finetune_sigma"]
    if behind_mim:
        args.max_mask_ratio = MAX_MASK_RATIO if args.max_mask_ratio is None else args.max_mask_ratio
    else:
        cli.refuse_unused(args, ["keep_visible", "max_mask_ratio"], "unless behind MIM in --mode de3")
    return autoencoder, pretraining


def choose_augmentation(train_set, dataset, config, recipe_augments, label_smoothing):
    """(what augments a batch, or None; whether images and labels are mixed; the label smoothing).

    Images in memory are augmented as their data set says; photographs, if there are enough, as they
    are loaded, with the paper's augmentation.
    """
    if data.in_memory(train_set):
        return dataset.finetune_augment if recipe_augments else None, False, label_smoothing
    if len(train_set) < AUGMENT_FROM:
        return None, False, 0.0
    train_set.transform = training.finetune_transform(config["image_size"], config["mean"], config["std"])
    return None, True, label_smoothing


def attack_images(attacked, images, labels, eps, steps, warmup):
    """Adversarial training's images: PGD through the defense; warmup, 0 to 1, scales eps.

    The attack meets the network as it will be tested, without drop path, and batch norm must not learn
    from the attack's own steps: hence the evaluation mode.
    """
    attacked.eval()
    return pgd(attacked, images, labels, eps * min(1, warmup), steps)


def main():
    # the run: its settings, the autoencoder it starts from or stands behind, and what there is of it
    args = arguments()
    device = cli.open_device(args.device)
    autoencoder, pretraining = settle(args, device)
    code = CODE if args.adversarial is None else (*CODE, "attack.py")
    this_run = run.Run(args, "classifier", code)

    # the data
    dataset = data.about(args.data)
    if this_run.saved:
        config = this_run.saved["config"]
    else:
        config = {name: pretraining["config"][name] for name in weights.ENCODER}
    train = data.load_dataset(args.data, "train", config["image_size"])
    if this_run.saved:
        train = data.in_order_of(this_run.saved["classes"], train, args.data)
    heldout = data.load_heldout(args.data, config["image_size"], args.workers, train.classes)
    num_classes = len(train.classes)
    if num_classes < 2:
        raise UserError(f"{args.data}: train/ holds one class folder only, {train.classes[0]}: a classifier "
                        "needs two (are they one folder deeper, or higher?)")
    if not this_run.saved:
        config.update(arch=args.arch, num_classes=num_classes, drop_path=args.drop_path)
    augment, mixed, label_smoothing = choose_augmentation(train, dataset, config, args.augment,
                                                          args.label_smoothing)
    mixed = mixed and args.adversarial is None
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=num_classes),
                           v2.CutMix(alpha=1.0, num_classes=num_classes)])
    batches = data.TrainingBatches(train, args.batch_size, args.max_batch, args.seed, args.workers, device)
    if args.arch != "vit" and batches.at_once < 2:
        raise UserError("batch norm needs at least 2 images at once: give a larger --batch-size or "
                        "--max-batch")

    # the classifier: new, from the encoder, or as the run left it
    torch.manual_seed(args.seed)
    classifier = make_classifier(**config).to(device)
    if args.init and not this_run.saved:
        weights.initialize_from_file(classifier, args.init, "classifier")
    elif not args.from_scratch and not this_run.saved:
        weights.initialize(classifier, autoencoder.state_dict(), "the autoencoder")
    optimizer = torch.optim.AdamW(
        training.parameter_groups(classifier, args.weight_decay, args.layer_decay),
        betas=(0.9, args.beta2), fused=True)

    # the defense that it is trained behind
    defense, defense_name, options, kept = None, "", {}, None
    if args.mode == "de3" and pretraining["task"] == "mim":
        defense_name, level = "mim", f"uniform:0,{args.max_mask_ratio}"
        options = dict(keep_visible=args.keep_visible)
    elif args.mode != "clean":
        defense_name, level = args.mode, args.sigma
    if defense_name:
        defense = DEFENSES[defense_name](autoencoder, classifier, level, **options)
    if args.mode == "de3":
        kept = {name: value for name, value in pretraining.items() if name != "optimizer"}

    def loss_of(count):
        """The sum of the logits of so many black images, which costs what the loss costs."""
        classifier.eval()  # batch norm is to learn nothing from them
        images = torch.zeros(count, 3, config["image_size"], config["image_size"], device=device)
        if defense is not None:
            with torch.no_grad():
                images = defense.purify(images)
        return classifier(images).sum()
    if args.dry_run:
        training.print_dry_run(args, classifier, loss_of, len(train), batches)
        return
    first_epoch = this_run.start(config, args.data, train, classifier, optimizer,
                                 lambda: loss_of(batches.at_once).backward(), defense=defense_name,
                                 options=options, classes=train.classes, autoencoder=kept)

    # training
    model = training.distribute(classifier)
    steps, micro_batches = batches.steps, batches.micro_batches
    peak_lr, warmup_steps = args.base_lr * batches.batch / 256, args.warmup_epochs * steps
    for epoch in range(first_epoch, args.epochs):
        images_of_epoch = batches.epoch(epoch)
        log = training.EpochLog(epoch + 1, args.epochs, len(train))
        for step in range(epoch * steps, (epoch + 1) * steps):
            for micro_step in range(micro_batches):
                images, labels = next(images_of_epoch)
                targets = labels
                if augment is not None:
                    images = augment(images)
                if args.adversarial is not None:
                    warmup = step / warmup_steps if warmup_steps else 1
                    with cli.autocast(args.bf16, device):
                        images = attack_images(defense or classifier, images, labels, args.adversarial,
                                               args.attack_steps, warmup)
                elif mixed:
                    images, targets = mix(images, labels)
                classifier.train()
                model.require_backward_grad_sync = micro_step == micro_batches - 1
                with cli.autocast(args.bf16, device):
                    if defense is not None:
                        with torch.no_grad():
                            images = defense.purify(images)
                    logits = model(images)
                    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
                (loss / micro_batches).backward()
                log.add(loss, len(images), None if mixed else (logits.argmax(1) == labels).sum())
            lr = training.learning_rate(step, args.epochs * steps, warmup_steps, peak_lr, final=1e-6)
            training.update(optimizer, lr)
        this_run.save(epoch + 1, log.finish(lr), classifier, optimizer)

    # what it reached
    report.show_finetuning(args.mode, defense or classifier, heldout, args.seed, args.epochs, device)
    print(f"the run is in {args.out}\n")


if __name__ == "__main__":
    cli.run_script(main, resumable=True)
