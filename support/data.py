"""Data sets: the digits that come with the repository, CIFAR-10, or a folder of one's own.

Every item is (image [3, S, S] in [0, 1], label). A data set has `classes`, the names of its labels.

    digits   assets/digits.npz: 1,797 handwritten digits of 8x8 pixels, 17 gray levels, from "Optical
             Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI Machine Learning
             Repository, CC BY 4.0), as scikit-learn's load_digits gives them. Enlarged to the image
             size (bilinear), gray copied to three channels. A fixed stratified split stands in the
             file: 1,197 train, 240 validation (choose recipes on these), 360 test.
    cifar10  torchvision's CIFAR10, downloaded to data/ on first use; the last 500 training images of
             each class are the validation images.
    FOLDER   FOLDER/train/<class>/*.jpg, the same in FOLDER/val/ and FOLDER/test/ (torchvision's
             ImageFolder); without test/, the validation images serve as test images as well.

Images that are trained at up to 64 pixels are decoded once and kept in memory as bytes.
"""

import contextlib
import functools
import hashlib
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, Subset, TensorDataset
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from model import IMAGENET_MEAN, IMAGENET_STD, UserError
from support import cli

DIGITS_FILE = Path(__file__).parents[1] / "assets" / "digits.npz"
PAPER = dict(pretrain_sigma="gamma:25,3", finetune_sigma="uniform:0,30", test_sigmas=(0, 35, 70, 140),
             eps=4 / 255, attack_eps=(4 / 255, 8 / 255))
COLOR = dict(size="small", pretrain_sigma="gamma:10,8", finetune_sigma="uniform:0,60",
             test_sigmas=(0, 50, 100), eps=4 / 255, attack_eps=(4 / 255, 8 / 255),
             mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
DEFAULTS = {  # of each data set: size of the models; sigmas; eps to compare at, and those of attack.py;
    # mean and sd of its pixels
    "digits": dict(size="tiny", pretrain_sigma="gamma:10,12", finetune_sigma="uniform:100,400",
                   test_sigmas=(0, 50), eps=16 / 255, attack_eps=(8 / 255, 16 / 255),
                   mean=(0.306,) * 3, std=(0.324,) * 3),
    "cifar10": COLOR,
    "FOLDER of small images": COLOR,
    "FOLDER": dict(size="base", **PAPER, mean=IMAGENET_MEAN, std=IMAGENET_STD),
}
BUILT_IN = ("digits", "cifar10")  # any other --data is a folder
SMALL = 64  # pixels: up to here images are kept in memory, and a folder of such images is small
MEMORY = 2 * 10**9  # bytes, at most, of a data set in memory
VALIDATION_IMAGES = 500  # of each class of cifar10
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")  # Pillow hands some others to other programs
SPLITS = ("train", "val", "test")


def defaults(name):
    """The row of DEFAULTS for --data `name`; of a folder the first training image tells its row."""
    if name in BUILT_IN:
        return DEFAULTS[name]
    return DEFAULTS["FOLDER of small images" if has_small_images(name) else "FOLDER"]


def set_size(args):
    """Fill in --size and --max-batch, where they were not given, by the data set and the size."""
    args.size = args.size or defaults(args.data)["size"]
    args.max_batch = args.max_batch or cli.MAX_BATCH.get(args.size, 256)


def identity(name):
    """What a run's settings say of its data: cifar10, or "folder" and a digest of its training files.

    The digest is of their names inside the folder and of their sizes, so a folder may be moved.
    """
    if name in BUILT_IN:
        return name
    digest = hashlib.sha256()
    for path in sorted(Path(name).glob("train/*/*")):
        digest.update(f"{path.relative_to(name).as_posix()} {path.stat().st_size}\n".encode())
    return f"folder {digest.hexdigest()[:12]}"


@functools.cache
def has_small_images(folder):
    """Whether the first training image of a folder has no side above 64 pixels."""
    first = next((path for path in sorted(Path(folder).glob("train/*/*")) if path.is_file()), None)
    return first is not None and max(read_image(first).size) <= SMALL


def eval_transform(image_size):
    """Resize the short side (to 256 for 224; under 128 to image_size) and crop the center, bicubic."""
    resize = image_size * 256 // 224 if image_size >= 128 else image_size
    return transforms.Compose([transforms.Resize(resize, InterpolationMode.BICUBIC),
                               transforms.CenterCrop(image_size), transforms.ToTensor()])


def read_image(path):
    """A PIL RGB image, or a UserError that names the file."""
    try:
        with open(path, "rb") as file:
            image = Image.open(file, formats=FORMATS)
            if image.mode.startswith(("I", "F")):  # Pillow would clip them to white
                raise ValueError("more than 8 bits per channel")
            return ImageOps.exif_transpose(image).convert("RGB")  # as the camera was held
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read image {path}: {reason}; replace or remove it") from None


def load_digits(split, image_size):
    """The digits of one split as a TensorDataset of [N, 3, S, S] floats and [N] labels."""
    with np.load(DIGITS_FILE, allow_pickle=False) as file:
        chosen = file["split"] == SPLITS.index(split)
        images = torch.from_numpy(file["images"][chosen]).float() / 16  # 0..16 -> [0, 1]
        labels = torch.from_numpy(file["labels"][chosen]).long()
    images = F.interpolate(images[:, None], size=(image_size, image_size), mode="bilinear")
    dataset = TensorDataset(images.expand(-1, 3, -1, -1).contiguous(), labels)
    dataset.classes = [str(digit) for digit in range(10)]
    return dataset


def open_images(name, split):
    """cifar10 or a folder, as a data set of PIL images; UserError where there is none."""
    if name == "cifar10":
        try:
            with cli.rank_0_first():
                whole = datasets.CIFAR10("data", split != "test", download=True)
        except (OSError, RuntimeError) as error:  # no network, or a damaged download
            raise UserError(f"could not get CIFAR-10 into data/ ({str(error).splitlines()[0]}); "
                            "place cifar-10-python.tar.gz there or use --data FOLDER") from None
        if split == "test":
            return whole
        return of_each_class(whole, split)
    folder = Path(name) / split
    if split == "test" and not folder.is_dir():
        folder = Path(name) / "val"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: --data takes digits, cifar10, or a folder with "
                        "train/<class>/ and val/<class>/ in it")
    try:
        return datasets.ImageFolder(folder, loader=read_image)
    except FileNotFoundError as error:  # no class folder, or one without images
        raise UserError(f"{folder}: {str(error).splitlines()[0]}") from None


def of_each_class(dataset, split):
    """The last 500 images of each class for "val", the others for "train"; order and classes stay."""
    seen, chosen = [0] * len(dataset.classes), []
    totals = torch.tensor(dataset.targets).bincount().tolist()
    for index, label in enumerate(dataset.targets):
        is_validation = seen[label] >= totals[label] - VALIDATION_IMAGES
        seen[label] += 1
        if is_validation == (split == "val"):
            chosen.append(index)
    result = Subset(dataset, chosen)
    result.classes = dataset.classes
    return result


def decode(dataset, image_size):
    """All images of a data set of PIL images as one uint8 tensor, in a TensorDataset."""
    to_size, progress = eval_transform(image_size), cli.Progress()
    images = torch.empty(len(dataset), 3, image_size, image_size, dtype=torch.uint8)
    labels = torch.empty(len(dataset), dtype=torch.long)
    for i, (image, label) in enumerate(dataset):
        images[i], labels[i] = (255 * to_size(image)).round().byte(), label
        progress.show(f"decoding image {i + 1} of {len(dataset)}", (i + 1) / len(dataset))
    progress.clear()
    result = TensorDataset(images, labels)
    result.classes = dataset.classes
    return result


class Transformed(Dataset):
    """A data set of PIL images, each transformed when it is asked for, by its index.

    In training it is asked for by (seed, epoch, index), from which all random numbers of its
    augmentation follow: then it does not matter which process loads it, and after what.
    """

    def __init__(self, dataset, transform):
        self.dataset, self.transform, self.classes = dataset, transform, dataset.classes

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        if not isinstance(key, tuple):
            image, label = self.dataset[key]
            return self.transform(image), label
        seed, epoch, index = key
        image, label = self.dataset[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((seed * 1_000_003 + epoch) * 1_000_000_007 + index)
            return self.transform(image), label


def load_dataset(name, split, image_size, transform=None):
    """The data set `name` (digits, cifar10 or a folder); split train, val or test.

    transform: from PIL image to [3, S, S], for images that are not kept in memory; default
    eval_transform. Raises UserError for a missing or empty folder and for a download that fails.
    """
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if name == "digits":
        return load_digits(split, image_size)
    dataset = open_images(name, split)
    if image_size <= SMALL and len(dataset) * 3 * image_size**2 <= MEMORY:
        return decode(dataset, image_size)
    return Transformed(dataset, transform or eval_transform(image_size))


def in_memory(dataset):
    """Whether a data set is kept in memory, and augmented batch by batch."""
    return isinstance(dataset, TensorDataset)


class TrainingOrder(Sampler):
    """Lists of indices for one epoch of training (set `epoch` before each).

    Every process draws the same permutation, which follows from seed and epoch, and cuts it into
    batches (the last partial one is dropped). A batch is divided evenly into `micro_batches` of
    `processes` pieces; each process takes its own piece of each micro-batch.
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
            pieces = batch.view(self.micro_batches, self.processes, -1)
            for indices in pieces[:, self.rank]:
                yield indices.tolist()


class SeededOrder(Sampler):
    """The same lists, of (seed, epoch, index), for images that are augmented as they are loaded."""

    def __init__(self, order):
        self.order = order

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        for indices in self.order:
            yield [(self.order.seed, self.order.epoch, index) for index in indices]


class Loader:
    """Batches (images [B, 3, S, S] in [0, 1], labels [B]) of a data set, on the device.

    batches: a TrainingOrder, or a batch size, to go once through all of it. workers: processes that
    load images which are not in memory; those of a training live until it ends.
    """

    def __init__(self, dataset, batches, workers=0, device="cpu"):
        self.device = torch.device(device)
        training = isinstance(batches, TrainingOrder)
        if not training:
            batches = BatchSampler(range(len(dataset)), batches, drop_last=False)
        if in_memory(dataset):  # a batch is one indexing operation
            self.batches = DataLoader(dataset, sampler=batches, batch_size=None)
        else:
            self.batches = DataLoader(
                dataset, batch_sampler=SeededOrder(batches) if training else batches,
                num_workers=workers, persistent_workers=training and workers > 0,
                pin_memory=self.device.type != "cpu", worker_init_fn=start_worker,
                generator=torch.Generator())  # the loader draws a seed: not from the training's numbers

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        with without_ctrl_c():  # the processes that start here leave Ctrl-C to this one
            batches = iter(self.batches)
        for images, labels in batches:
            cli.Interruption.check()
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device)
            if images.dtype == torch.uint8:
                images = images.float() / 255
            yield images, labels


def start_worker(number):
    """In a loading process: the thread that hands images over says nothing when the run ends first."""
    sys.excepthook = lambda *error: None


@contextlib.contextmanager
def without_ctrl_c():
    """Hold Ctrl-C back; processes that are started meanwhile never see it. Not on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def evenly_spread(dataset, count, rank=0, processes=1):
    """`count` images evenly spread over the data set (a folder lists its images class by class).

    Of several processes each gets its own: every image exactly once.
    """
    count = min(count, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    own = chosen[rank::processes]
    if in_memory(dataset):
        return TensorDataset(*dataset[own])
    return Subset(dataset, own)
