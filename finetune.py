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
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

import common
import data
from attack import pgd
from common import Progress, count, fraction
from model import De3, start_from_autoencoder

RECIPES = {  # the paper's for base and up; tiny was chosen on the digits' validation images
    "tiny": dict(epochs=40, batch_size=64, base_lr=8e-3, warmup_epochs=4, drop_path=0.1),
    "small": dict(epochs=50, batch_size=256, base_lr=1e-3, warmup_epochs=5, drop_path=0.1),
    "base": dict(epochs=100, batch_size=1024, base_lr=1e-3, warmup_epochs=5, drop_path=0.1),
    "large": dict(epochs=50, batch_size=1024, base_lr=1e-3, warmup_epochs=5, drop_path=0.1),
    "huge": dict(epochs=50, batch_size=1024, base_lr=1e-3, warmup_epochs=5, drop_path=0.2),
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
    add("--autoencoder", help="folder of the pretraining run (default: pretrain.py's default)")
    add("--sigma", type=common.sigma, help="noise scale, one draw per image; default "
        f"{common.finetune_sigma('')}, {common.finetune_sigma('digits')} for digits")
    add("--mask-ratio", type=fraction, default=0.75,
        help="behind MIM: the ratio is drawn from Uniform(0, this) (default 0.75)")
    add("--keep-visible", action="store_true", help="behind MIM: keep unmasked patches as they are")
    add("--adversarial", type=common.eps, metavar="EPS", help="adversarial training, EPS like 8/255")
    add("--from-scratch", action="store_true", help="random weights instead of the encoder's")
    add("--classifier", choices=["vit", "resnet18"], default="vit", help="default vit")
    add("--layer-decay", type=fraction, default=0.75, help="lr factor per layer, default 0.75")
    add("--drop-path", type=fraction, help="default 0.1 (0.2 huge)")
    add("--augment", action=argparse.BooleanOptionalAction,
        help="the recipe's augmentation; default: with 10,000 training images or more")
    common.training_flags(add, RECIPES)
    args = result.parse_args()
    args.size = args.size or common.default_size(args.data)
    args.sigma = args.sigma or common.finetune_sigma(args.data)
    common.fill_recipe(args, RECIPES)
    return args


def variant(args, mode, autoencoder_folder):
    """The run's folder, named by what makes it different; inside the autoencoder's if it uses it."""
    needs_autoencoder = mode != "clean" or not (args.from_scratch or args.classifier != "vit")
    parent = autoencoder_folder if needs_autoencoder else common.runs_folder(args)
    return common.folder(parent, {
        mode: True, args.sigma: mode != "clean" and args.task == "nim",
        f"to{args.mask_ratio:g}": mode == "de3" and args.task == "mim" and args.mask_ratio != 0.75,
        "visible": args.keep_visible, f"adversarial{255 * (args.adversarial or 0):g}": args.adversarial,
        "scratch": args.from_scratch and args.classifier == "vit",
        args.classifier: args.classifier != "vit", f"seed{args.seed}": args.seed})


def train(args, mode, device):
    """Train one classifier; mode de3, clean or no-denoise."""
