"""Stage 2, finetune.py: train the classifier, on denoised images (De³) and undefended.

    python finetune.py                              both, from the encoder pretrain.py made
    python finetune.py --clean --from-scratch       undefended, no pretraining
    python finetune.py --no-denoise                 noise without denoising, the ablation
    python finetune.py --adversarial 16/255         adversarial training; add --de3: through De³
    python finetune.py --classifier resnet18        torchvision's resnet18 instead of the ViT
    python finetune.py --autoencoder runs/digits/mim_0.75 --de3 --keep-visible      behind MIM

Order: augment, mix, (attack,) noise, denoise without gradients, clamp, classify. Writes
checkpoint.pt after every epoch into a folder inside the autoencoder's. Next: defend.py, attack.py.
"""

import argparse

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

import common
import data
from attack import pgd
from common import SIZES, Progress
from model import De3, NoiseScale, start_from_autoencoder

IMAGENET = dict(epochs=100, batch_size=1024, base_lr=1e-3, warmup_epochs=5, drop_path=0.1)
RECIPES = {  # the paper's from base on; tiny was chosen on the validation images of the digits
    "tiny": dict(epochs=40, batch_size=64, base_lr=8e-3, warmup_epochs=4, drop_path=0.1),
    "small": dict(epochs=50, batch_size=256, base_lr=1e-3, warmup_epochs=5, drop_path=0.1),
    "base": IMAGENET, "large": {**IMAGENET, "epochs": 50},
    "huge": {**IMAGENET, "epochs": 50, "drop_path": 0.2},
}
ATTACK_STEPS = 5  # of PGD in adversarial training


def arguments():
    result = common.parser(__doc__)
    add = result.add_argument
    mode = result.add_mutually_exclusive_group()
    for name, text in [("de3", "train only on images denoised by the autoencoder"),
                       ("clean", "train only the undefended classifier"),
                       ("no-denoise", "train on noisy images that are not denoised")]:
        mode.add_argument(f"--{name}", action="store_const", dest="mode", const=name, help=text)
    add("--autoencoder", metavar="RUN", help="folder of the pretraining run; default: the one that "
        "pretrain.py makes by default")
    add("--sigma", type=common.sigma, help="noise scale in 8-bit units, one draw per image; "
        "default uniform:0,30, digits uniform:0,60")
    add("--mask-ratio", type=common.mask_ratio, default=0.75,
        help="behind MIM: the ratio is drawn from Uniform(0, this); default 0.75")
    add("--keep-visible", action="store_true", help="behind MIM: keep unmasked patches as they are")
    add("--adversarial", type=common.eps, metavar="EPS", help="adversarial training, linf, as 8/255")
    add("--from-scratch", action="store_true", help="random weights instead of the encoder's")
    add("--classifier", choices=["vit", "resnet18"], default="vit", help="default vit")
    add("--layer-decay", type=common.number(float, 1e-6, 1), default=0.75,
        help="lr factor from layer to layer, default 0.75 (1 from scratch)")
    add("--drop-path", type=common.number(float, 0, 0.99), help="default 0.1 (0.2 for huge)")
    add("--augment", action=argparse.BooleanOptionalAction, help="crop, flip, RandAugment, erasing, "
        "MixUp/CutMix, label smoothing; default: with 10,000 training images or more")
    common.training_flags(add, RECIPES)
    args = result.parse_args()
    common.fill_defaults(args, RECIPES)
    args.sigma = args.sigma or NoiseScale.parse(common.default(args, "finetune"))
    args.from_scratch = args.from_scratch or args.classifier != "vit"
    args.layer_decay = 1.0 if args.from_scratch else args.layer_decay
    return args


def train(args, mode, device):
    """Train one classifier; mode: de3, clean or no-denoise."""
    source = args.autoencoder or common.default_autoencoder(args)
    autoencoder = task = None
    if mode == "de3" or not args.from_scratch:
        autoencoder, pretraining = common.load_finished(
            source, "autoencoder", common.command("pretrain.py", args), device)
        task = pretraining["task"]
    masks = mode == "de3" and task == "mim"
    if args.keep_visible and not masks:
        raise common.UserError("--keep-visible is for --de3 behind an autoencoder of --task mim")
    folder = common.variant(
        source if autoencoder else common.runs_folder(args), mode,
        mode != "clean" and not masks and args.sigma,
        masks and args.mask_ratio != 0.75 and f"{args.mask_ratio:g}", masks and args.keep_visible and "visible",
        args.adversarial is not None and f"adversarial{255 * args.adversarial:g}",
        args.classifier if args.classifier != "vit" else args.from_scratch and "scratch",
        args.seed and f"seed{args.seed}")

    # the data
    train_set = data.load_dataset(args.data, "train", 32)
