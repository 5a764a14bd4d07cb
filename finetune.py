"""Stage 2, finetune.py: train a classifier, on denoised images (De³) or otherwise.

    python finetune.py                              De³, from runs/digits/nim: runs/digits/de3
    python finetune.py --mode clean                 undefended: runs/digits/clean
    python finetune.py --mode no-denoise            noise without denoising, the ablation
    python finetune.py --adversarial 16/255         adversarial training; with --mode de3 through De³
    python finetune.py --autoencoder runs/digits/mim                  behind MIM
    python finetune.py --out runs/digits/de3 --resume                 go on where it was cut short

Order: augment, mix (or attack: PGD through the defense, one draw a step), noise, denoise without
gradients, clamp, classify. Writes the run's folder, beside the autoencoder's unless --out names it:
checkpoint.pt (which holds the autoencoder of a De³ as well) and log.csv after every epoch. The size is
the autoencoder's, and so are data set and seed unless they are given. Next: defend.py, attack.py.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from attack import accuracy, in_batches, percent, pgd, say_one_answer
from model import CLASSIFIERS, DEFENSES, SIGMA_HELP, SIZES, NoiseScale, UserError, make_classifier
from support import cli, data, run, tested, training

PAPER = dict(epochs=100, batch_size=1024, base_lr=1e-3, warmup_share=0.05, weight_decay=0.05,
             layer_decay=0.75, beta2=0.999, drop_path=0.1, label_smoothing=0.1, attack_steps=5, augment=True)
TINY = dict(epochs=40, batch_size=64, base_lr=6.4e-2, warmup_share=1 / 12, weight_decay=0.05,
            layer_decay=1.0, beta2=0.98, drop_path=0.0, label_smoothing=0.1, attack_steps=5, augment=True)
TINY_HARD = {**TINY, "epochs": 48, "batch_size": 32, "base_lr": 3.2e-2}  # for images on which 6.4e-2 fails
SMALL = dict(epochs=15, batch_size=64, base_lr=4e-3, warmup_share=0.1, weight_decay=0.05,
             layer_decay=0.75, beta2=0.98, drop_path=0.0, label_smoothing=0.1, attack_steps=2, augment=True)
RECIPES = {  # the paper's from base on; tiny and small were chosen on validation images
    "tiny": TINY,
    "tiny resnet18": {**TINY, "epochs": 12, "batch_size": 128, "base_lr": 2e-3, "beta2": 0.999},
    "tiny no-denoise": TINY_HARD,
    "tiny mim": TINY_HARD,
    "tiny mim-visible": TINY_HARD,
    "tiny adversarial": {**TINY, "label_smoothing": 0.0, "augment": False},  # augmented it is weaker
    "small": SMALL,
    "small adversarial": SMALL,
    "medium": {**PAPER, "epochs": 50, "batch_size": 256, "warmup_share": 0.1, "attack_steps": 2},
    "base": PAPER,
    "large": {**PAPER, "epochs": 50, "warmup_share": 0.1},
    "huge": {**PAPER, "epochs": 50, "warmup_share": 0.1, "drop_path": 0.2},
}
FEW = 10_000  # photographs: with fewer, the paper's augmentation and mixing hinder
ENCODER = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "mean", "std")  # a ViT's config
CODE = ("model.py", "support/training.py", "finetune.py")  # what decides the weights


def arguments(argv=None):
    parser = cli.training_parser("python finetune.py", __doc__, RECIPES)
    add = parser.add_argument
    add("--mode", choices=["clean", *DEFENSES], help="what the classifier is trained behind; clean: nothing "
        "(default with --adversarial); default: de3, or mim where the autoencoder is of MIM")
    add("--autoencoder", type=cli.folder, metavar="RUN", help="folder of the pretraining run, or of a De³, "
        "which holds one; default runs/<data>/nim")
    add("--sigma", help="noise scale in 8-bit units (255 is the range of a pixel), one draw per image: "
        f"{SIGMA_HELP}; default: the data set's, uniform:0,30 in the paper")
    add("--adversarial", type=cli.eps, metavar="EPS", help="adversarial training, linf, as 8/255")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--from-scratch", action="store_true", default=None, help="random weights instead of the "
                       "encoder's")
    start.add_argument("--init", type=cli.folder, metavar="RUN", help="this run's weights instead of the "
                       "encoder's")
    add("--arch", choices=CLASSIFIERS, help="what classifies, default vit; others start from random weights")
    add("--data", type=data.dataset_name, help="default: the autoencoder's; give it if that folder has moved")
    args = cli.parse(parser, argv)
    if args.adversarial is not None and not 0 < args.adversarial <= 1:
        raise UserError(f"--adversarial {args.adversarial:g} must lie between 0 and the range of the pixels, 1: "
                        "write 8/255")
    if args.sigma is not None:  # as the run that --resume goes on with says it
        args.sigma = str(NoiseScale.parse(args.sigma))
    return args


def mode_of(args, source):
    """--mode; by default what suits the autoencoder in the folder `source`, or clean for --adversarial."""
    if args.mode or args.adversarial is not None:
        return args.mode or "clean"
    pretraining = run.read(source, "autoencoder") if (source / "checkpoint.pt").exists() else {}
    return "mim" if pretraining.get("task") == "mim" else "de3"


def level_in_training(mode):
    """What a defense whose level is no sigma is trained at: its trained_at, or the first of its levels."""
    defense = DEFENSES[mode]
    if defense.trained_at is None and defense.levels:
        return defense.levels[0]
    return defense.trained_at


def settle_names(args, source):
    """What a new run is, and what it starts from: --mode, --arch and --autoencoder, if they are not given."""
    args.mode, args.arch = mode_of(args, source), args.arch or "vit"
    args.from_scratch = bool(args.from_scratch or args.arch != "vit")
    needs_decoder = args.mode != "clean" and DEFENSES[args.mode].task is not None
    needs_encoder = not (args.from_scratch or args.init)
    if needs_decoder or needs_encoder:
        args.autoencoder = source
    else:
        cli.refuse(args, ["autoencoder"], "where neither its encoder nor its decoder is used")


def open_autoencoder(args, saved, device):
    """(The autoencoder, its checkpoint): of --autoencoder, or of the saved run; (None, None) without one.

    UserError if --autoencoder names another one than that of the saved run.
    """
    if saved is None:
        if not args.autoencoder:
            return None, None
        autoencoder, pretraining = run.load(args.autoencoder, "autoencoder", device)
        run.say_made_by_other_code({args.autoencoder: pretraining})
        return autoencoder, pretraining
    pretraining = saved["autoencoder"]
    if not pretraining:
        return None, None
    if args.autoencoder:
        given = run.read(args.autoencoder, "autoencoder")
        if (given["made_by"], given["log"]) != (pretraining["made_by"], pretraining["log"]):
            raise UserError(f"{args.out} was begun behind another autoencoder than that of {args.autoencoder}: "
                            "leave --autoencoder out")
    return run.build(pretraining, device), pretraining


def settle(args, pretraining, dataset, device):
    """Every other setting of a new run: flags, then what the autoencoder was made with, then the recipe."""
    if pretraining:
        made = pretraining["settings"]
        if args.size not in (None, made["size"]):
            raise UserError(f"--size {args.size}: the autoencoder's is {made['size']}, and decides")
        if made["data"] != args.data:
            print(f"note: {args.autoencoder} was trained on {made['data']}, the classifier is on {args.data}")
        args.size = made["size"]
        args.seed = made["seed"] if args.seed is None else args.seed
    args.size = args.size or dataset.size
    if args.from_scratch:
        args.layer_decay = 1.0  # no layer is pretrained
    special = args.mode if args.adversarial is None else "adversarial"
    cli.apply_recipe(args, RECIPES, special if args.arch == "vit" else args.arch, device)
    if args.mode == "clean" or level_in_training(args.mode) is not None:
        cli.refuse(args, ["sigma"], f"in --mode {args.mode}")
    else:
        args.sigma = str(NoiseScale.parse(args.sigma or dataset.finetune_sigma))


def choose_augmentation(args, train, dataset, config):
    """(what augments a batch, or None; what mixes images and labels, or None).

    Images in memory are augmented as their data set says. Photographs are augmented as they are loaded: as in
    the paper if there are enough, else by a crop and a flip, without mixing. args.augmentation says which.
    """
    if data.in_memory(train):
        augment = dataset.finetune_augment if args.augment else None
        args.augmentation = getattr(augment, "__name__", str(augment))
        return augment, None
    if len(train) < FEW:
        args.augmentation = "gentle"
        train.transform = training.gentle_transform(config["image_size"])
        return None, None
    args.augmentation = "paper"
    train.transform = training.finetune_transform(config["image_size"], config["mean"], config["std"])
    if args.adversarial is not None:
        return None, None
    classes = len(train.classes)
    return None, v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes),
                                  v2.CutMix(alpha=1.0, num_classes=classes)])


def main(argv=None):
    # the run: what there is of it, or the autoencoder it starts from, and its settings
    args = arguments(argv)
    device = cli.open_device(args.device)
    source = args.autoencoder or Path("runs", data.short_name(args.data or "digits"), "nim")
    if args.out is None:
        beside = Path("runs", data.short_name(args.data)) if args.data else source.parent
        args.out = beside / (mode_of(args, source) if args.adversarial is None else "adversarial")
    saved = run.find(args, "classifier")  # None: a new run; else what --resume goes on with
    if saved is None:
        settle_names(args, source)
    autoencoder, pretraining = open_autoencoder(args, saved, device)
    args.data = args.data or (pretraining["settings"]["data"] if pretraining else "digits")
    dataset = data.about(args.data, pretraining["settings"]["size"] if pretraining else args.size)
    if saved is None:
        settle(args, pretraining, dataset, device)

    # the data
    if saved:
        config = saved["config"]
    elif pretraining:
        config = {name: pretraining["config"][name] for name in ENCODER}
    else:
        everything = dict(SIZES[args.size], mean=dataset.mean, std=dataset.std)
        config = {name: everything[name] for name in ENCODER}
    image_size = config["image_size"]
    train = data.load_training_images(args.data, image_size, data.eval_transform(image_size), args.seed)
    if len(train.classes) < 2:
        raise UserError(f"{args.data}: train/ holds one class folder only, {train.classes[0]}: a classifier "
                        "needs two (are they one folder deeper, or higher?)")
    heldout, heldout_labels, _ = data.load_images(args.data, "val", image_size, train.classes,
                                                  data.HELDOUT_IMAGES)
    heldout, heldout_labels = data.as_floats(heldout).to(device), heldout_labels.to(device)
    augment, mix = choose_augmentation(args, train, dataset, config)
    training.check_augmentation(augment, heldout[:8])
    batches = data.TrainingBatches(train, args.batch_size, args.max_batch, args.seed, args.workers, device)
    if args.arch != "vit" and batches.at_once < 2:
        raise UserError("batch norm needs at least 2 images at once: give a larger --batch-size or "
                        "--max-batch")

    # the classifier: new, from the encoder or another run, or as this run left it
    if saved is None:
        config.update(arch=args.arch, num_classes=len(train.classes), drop_path=args.drop_path)
        if args.size == "tiny" and device.type == "cpu":
            cli.choose_threads()
    cli.seed_everything(args.seed)
    classifier = make_classifier(**config).to(device)
    started_from = None
    if saved is None and args.init:
        other, started_from = run.load(args.init)
        run.say_made_by_other_code({args.init: started_from})
        training.initialize(classifier, other, f"the {started_from['kind']} in {args.init}")
    elif saved is None and not args.from_scratch:
        started_from = pretraining
        training.initialize(classifier, autoencoder, f"the autoencoder in {args.autoencoder}")
    optimizer = torch.optim.AdamW(
        training.parameter_groups(classifier, args.weight_decay, args.layer_decay),
        betas=(0.9, args.beta2), fused=True)

    # the defense that it is trained behind, and the run
    is_defended = args.mode != "clean"
    defended, level = classifier, None
    if is_defended:
        level = args.sigma or level_in_training(args.mode)
        tested.check_task(args.mode, autoencoder, pretraining, args.autoencoder)
        defended = DEFENSES[args.mode](autoencoder, classifier, level)
    code = CODE if args.adversarial is None else (*CODE, "attack.py")
    if saved:
        checkpoint = saved
        run.restore(checkpoint, args, code, train, model=classifier, optimizer=optimizer)
    else:
        held = pretraining if is_defended and DEFENSES[args.mode].task else None
        checkpoint = run.begin(args, "classifier", code, config, dataset, train, started_from, level=level,
                               autoencoder=held, defense=args.mode if is_defended else "")
        run.save(args.out, checkpoint, defended, heldout[:8], model=classifier, optimizer=optimizer)

    # training
    model = training.distribute(classifier, optimizer)
    steps, micro_batches = args.epochs * batches.steps, batches.micro_batches
    peak_lr = args.base_lr * batches.batch / 256
    warmup_steps = args.epochs * args.warmup_share * batches.steps
    training.print_plan(classifier, batches, args.epochs, peak_lr)
    for epoch in range(checkpoint["epoch"], args.epochs):
        images_of_epoch = batches.epoch(epoch)
        log = training.EpochLog(epoch + 1, args.epochs, batches.steps * micro_batches)
        for step in range(epoch * batches.steps, (epoch + 1) * batches.steps):
            for micro_step in range(micro_batches):
                images, labels = next(images_of_epoch)
                augmented = images if augment is None else augment(images)
                targets = labels
                if mix is not None:
                    augmented, targets = mix(augmented, labels)
                attacked = augmented
                if args.adversarial is not None:
                    defended.eval()  # as it will be tested: no drop path, and batch norm learns nothing
                    eps = args.adversarial * min(1, step / warmup_steps if warmup_steps else 1)
                    with cli.autocast(args.bf16, device):
                        attacked = pgd(defended, augmented, labels, eps, args.attack_steps)
                classifier.train()
                model.require_backward_grad_sync = micro_step == micro_batches - 1
                with cli.autocast(args.bf16, device):
                    purified = attacked
                    if is_defended:
                        with torch.no_grad():
                            purified = defended.purify(attacked)
                    logits = model(purified)
                    loss = F.cross_entropy(logits, targets, label_smoothing=args.label_smoothing)
                (loss / micro_batches).backward()
                hits = (logits.argmax(1) == labels).sum() if mix is None else None
                log.add(loss, len(images), hits)
            lr = training.learning_rate(step, steps, warmup_steps, peak_lr, final=1e-6)
            training.update(optimizer, lr)
        checkpoint["log"].append(log.finish(lr))
        checkpoint["epoch"] = epoch + 1
        run.save(args.out, checkpoint, defended, heldout[:8], model=classifier, optimizer=optimizer)

    # what it reached, measured on what the folder holds
    training.check_processes(defended)
    defended = run.build_whole(run.read(args.out), device)
    cli.seed_everything(args.seed)
    total = len(heldout)
    heldout, heldout_labels = tested.own_share(heldout, heldout_labels)
    correct = percent(in_batches(lambda x, y: accuracy(defended, x, y), heldout, heldout_labels,
                                 args.max_batch))
    say_one_answer(args.out, defended, heldout, heldout_labels, train.classes, args.max_batch)
    behind = f" behind {defended.title}, {defended.level}" if is_defended else ""
    print(f"{correct:.1f}% of {total} validation images are right{behind}\nthe run is in {args.out}; next: "
          f"python attack.py {args.out}")


if __name__ == "__main__":
    cli.run_script(main, resumable=True)
