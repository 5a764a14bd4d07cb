"""Data sets: the digits that come with the repository, CIFAR-10, or a folder of one's own.

Every item is (image [3, S, S] in [0, 1], label). A data set has `classes`, the names of its labels.

    digits   assets/digits.npz: 1,797 handwritten digits of 8x8 pixels, 17 gray levels, from "Optical
             Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI Machine Learning
             Repository, CC BY 4.0), as scikit-learn's load_digits gives them. Enlarged to the image
             size (bilinear), gray copied to three channels. A fixed stratified split stands in the
             file: 1,197 train, 240 validation (choose recipes on these), 360 test.
    cifar10  torchvision's CIFAR10, downloaded to data/ on first use.
    FOLDER   FOLDER/train/<class>/*.jpg and FOLDER/val/<class>/*.jpg (torchvision's ImageFolder).

cifar10 and FOLDER hold no third split: their validation images serve as test images as well.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Sampler, Subset, TensorDataset
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode, v2

from model import IMAGENET_MEAN, IMAGENET_STD, UserError

DIGITS_FILE = Path(__file__).parents[1] / "assets" / "digits.npz"
PAPER = dict(pretrain_sigma="gamma:25,3", finetune_sigma="uniform:0,30", test_sigmas=(0, 35, 70, 140))
DEFAULTS = {  # of each data set: the size of the models, sigmas, what the models normalize by
    "digits": dict(size="tiny", pretrain_sigma="gamma:10,12", finetune_sigma="uniform:100,400",
                   test_sigmas=(0, 50), mean=(0.306,) * 3, std=(0.324,) * 3),
    "cifar10": dict(size="small", **PAPER, mean=(0.4914, 0.4822, 0.4465),
                    std=(0.2470, 0.2435, 0.2616)),
    "FOLDER": dict(size="base", **PAPER, mean=IMAGENET_MEAN, std=IMAGENET_STD),
}


def defaults(name):
    """The row of DEFAULTS for --data `name`."""
    return DEFAULTS.get(name, DEFAULTS["FOLDER"])


# ---------------------------------------------------------------------------------- the images

def eval_transform(image_size):
    """Resize the short side (to 256 for 224; under 128 to image_size itself) and center crop, bicubic."""
    resize = image_size * 256 // 224 if image_size >= 128 else image_size
    return transforms.Compose([transforms.Resize(resize, InterpolationMode.BICUBIC),
                               transforms.CenterCrop(image_size), transforms.ToTensor()])


def pretrain_transform(image_size):
    """RandomResizedCrop(0.2..1, bicubic) and flip."""
    return transforms.Compose([
        transforms.RandomResizedCrop(image_size, (0.2, 1), interpolation=InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor()])


def finetune_transform(image_size):
    """RandomResizedCrop(0.08..1), flip, RandAugment (2 operations at 27 of 30), erasing 0.25.

    Random erasing writes N(0, 1) values, so the caller clamps to [0, 1] again.
    """
    return transforms.Compose([
        transforms.RandomResizedCrop(image_size, (0.08, 1), interpolation=InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.RandAugment(num_ops=2, magnitude=27, interpolation=InterpolationMode.BILINEAR),
        transforms.ToTensor(), transforms.RandomErasing(0.25, value="random")])


shift_digit = v2.RandomAffine(degrees=8, translate=(0.08, 0.08), scale=(0.9, 1.1),
                              interpolation=InterpolationMode.BILINEAR)


def shift(images):
    """The augmentation of the digits: images [B, 3, S, S], rotated, shifted and scaled a little.

    Eight images share one draw: torchvision draws once per call, and calls cost time.
    """
    return torch.cat([shift_digit(eight) for eight in images.split(8)])


def read_image(path):
    """A PIL RGB image, or a UserError that names the file."""
    try:
        with open(path, "rb") as file:
            image = Image.open(file)
            if image.mode.startswith(("I", "F")):  # Pillow would clip them to white
                raise ValueError("more than 8 bits per channel")
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read image {path}: {reason}; replace or remove it") from None


# -------------------------------------------------------------------------------- the data sets

def load_digits(split, image_size):
    """The digits of one split as a TensorDataset of [N, 3, S, S] floats and [N] labels."""
    with np.load(DIGITS_FILE, allow_pickle=False) as file:
        chosen = file["split"] == ("train", "val", "test").index(split)
        images = torch.from_numpy(file["images"][chosen]).float() / 16  # 0..16 -> [0, 1]
        labels = torch.from_numpy(file["labels"][chosen]).long()
    images = F.interpolate(images[:, None], size=(image_size, image_size), mode="bilinear")
    dataset = TensorDataset(images.expand(-1, 3, -1, -1).contiguous(), labels)
    dataset.classes = [str(digit) for digit in range(10)]
    return dataset


def load_dataset(name, split, image_size, transform=None):
    """The data set `name` (digits, cifar10 or a folder); split train, val or test.

    transform: from PIL image to [3, S, S]; default eval_transform. Ignored by the digits.
    Raises UserError for a missing or empty folder and for a download that fails.
    """
    if name == "digits":
        return load_digits(split, image_size)
    transform = transform or eval_transform(image_size)
    if name == "cifar10":
        try:
            return datasets.CIFAR10("data", split == "train", transform, download=True)
        except (OSError, RuntimeError) as error:  # no network, or a damaged download
            raise UserError(f"could not get CIFAR-10 into data/ ({str(error).splitlines()[0]}); "
                            "place cifar-10-python.tar.gz there or use --data FOLDER") from None
    folder = Path(name) / ("train" if split == "train" else "val")
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: --data takes digits, cifar10, or a folder with "
                        "train/<class>/ and val/<class>/ in it")
    try:
        return datasets.ImageFolder(folder, transform, loader=read_image)
    except FileNotFoundError as error:  # no class folder, or one without images
        raise UserError(f"{folder}: {str(error).splitlines()[0]}") from None


# ------------------------------------------------------------------------------------- batches

class TrainingOrder(Sampler):
    """Lists of indices for one epoch of training (set `epoch` before each).

    Every process draws the same permutation, which follows from seed and epoch, and cuts it into
    batches (the last partial one is dropped). A batch is divided evenly into `micro_batches` of
    `processes` shares; each process takes its own share of each micro-batch.
    """

    def __init__(self, images, batch_size, micro_batches, seed, rank=0, processes=1):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.micro_batches, self.rank, self.processes = micro_batches, rank, processes
        self.steps = images // batch_size
        self.epoch = 0

    def __len__(self):
        return self.steps * self.micro_batches

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.images, generator=generator)
        for batch in order.split(self.batch_size)[:self.steps]:
            shares = batch.view(self.micro_batches, self.processes, -1)
            for share in shares[:, self.rank]:
                yield share.tolist()


def loader(dataset, batches, workers=0, device="cpu"):
    """Pairs (images, labels); batches: a TrainingOrder, or a batch size, to go once through all."""
    if isinstance(batches, int):
        batches = BatchSampler(range(len(dataset)), batches, drop_last=False)
    if isinstance(dataset, TensorDataset):  # in memory: a batch is one indexing operation
        return DataLoader(dataset, sampler=batches, batch_size=None)
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                      pin_memory=str(device) != "cpu")


def evenly_spread(dataset, count, rank=0, processes=1):
    """`count` images evenly spread over the data set (a folder lists its images class by class).

    Of several processes each gets its share: every image exactly once.
    """
    count = min(count, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    share = chosen[rank::processes]
    if isinstance(dataset, TensorDataset):
        return TensorDataset(*dataset[share])
    return Subset(dataset, share)
