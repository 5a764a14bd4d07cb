"""Data sets: the digits in this repository, CIFAR-10, or a folder of your own; one entry each.

A data set is a TensorDataset of images [N, C, S, S] and labels [N] (floats in [0, 1], or bytes), or
one of (PIL image, label) with `targets`, its labels; both have `classes`, the names of the labels.

    digits   assets/digits.npz: 1,797 handwritten digits of 8x8 pixels, 17 gray levels, from "Optical
             Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI Machine Learning
             Repository, CC BY 4.0), as scikit-learn's load_digits gives them. Enlarged to the image
             size (bilinear), gray copied to three channels. A fixed stratified split stands in the
             file: 1,197 train, 240 validation (choose recipes on these), 360 test.
    cifar10  torchvision's CIFAR10, downloaded to data/ on first use; the last 500 training images of
             each class are the validation images.
    FOLDER   FOLDER/train/<class>/*.jpg, the same in FOLDER/val/ and FOLDER/test/ (torchvision's
             ImageFolder); without test/, the validation images serve as test images as well.
             Transparent images are laid on white, photographs turned as the camera was held.

Images that are trained at up to 64 pixels are decoded once and kept in memory as bytes.
"""

import functools
import hashlib
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from model import IMAGENET_MEAN, IMAGENET_STD, SIZES, UserError, check_images
from support import cli, training

DIGITS_FILE = Path(__file__).parents[1] / "assets" / "digits.npz"
SMALL = 64  # pixels: up to here images are kept in memory, and a folder of such images is small
HELDOUT_IMAGES = 1000  # validation images, at most, on which the training stages show their result
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")  # for some others Pillow starts external programs
EXTENSIONS = tuple(ending for ending, name in Image.registered_extensions().items() if name in FORMATS)
LARGEST_ASPECT = 50  # of an image: a longer strip would be enlarged to gigabytes
SHOWN = 5  # of files that cannot be read: how many are named
SPLITS = ("train", "val", "test")
HIDDEN = (".", "__MACOSX", "@eaDir")  # prefixes of what systems add to folders


# ------------------------------------------------------------------------------- reading images

def read_image(path):
    """A PIL RGB image: transparency laid on white, turned as the camera was held.

    Raises UserError, which names the file and the formats that are accepted.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            check_pillow_image(image)
            image.load()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read image {path} ({reason}): replace or remove it; {', '.join(FORMATS)} "
                        "files of 8 bits per channel are accepted") from None
    try:
        ImageOps.exif_transpose(image, in_place=True)  # turned before the rest of EXIF is looked at
    except Exception:  # a damaged EXIF raises many kinds: the image stays as it is
        pass
    return as_rgb(image)


def check_pillow_image(image):
    """UserError for a PIL image that cannot be used as it is."""
    if image.mode.startswith(("I", "F")):  # Pillow would clip them to white
        raise UserError("it has more than 8 bits per channel")
    if max(image.size) > LARGEST_ASPECT * min(image.size):
        raise UserError(f"it is a strip of {image.width}x{image.height} pixels")


def as_rgb(image):
    """A PIL image of whatever mode as RGB, transparency laid on white; UserError for more than 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    check_pillow_image(image)
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La")
    if has_alpha or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def to_size(image, image_size):
    """A PIL image as it is tested: resized (short side) and cropped (center), bicubic; bytes [3, S, S].

    The short side becomes image_size, from 128 pixels on 256 for 224. What has the model's size already
    is taken as it is.
    """
    image = as_rgb(image)
    if image.size != (image_size, image_size):
        short_side = image_size * 256 // 224 if image_size >= 128 else image_size
        image = center_crop(resize(image, short_side, InterpolationMode.BICUBIC), image_size)
    return pil_to_tensor(image)


def eval_transform(image_size):
    """`to_size` for images of this size, as a transform."""
    return functools.partial(to_size, image_size=image_size)


# ----------------------------------------------------------------- how each data set is opened

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


def open_cifar10(split, image_size):
    """torchvision's CIFAR10 as a data set of PIL images; the last tenth of each class is "val"."""
    try:
        if cli.rank() == 0:
            datasets.CIFAR10("data", split != "test", download=True)
        cli.sum_over_processes(0)  # the others wait for it
        whole = datasets.CIFAR10("data", split != "test")
    except (OSError, RuntimeError) as error:  # no network, or a damaged download
        raise UserError(f"could not get CIFAR10 into data/ ({str(error).splitlines()[0]}): place its archive "
                        "there, or use --data FOLDER") from None
    if split == "test":
        return whole
    of_class = torch.tensor(whole.targets).argsort(stable=True).view(10, 5000)  # its images in order
    chosen = of_class[:, 4500:] if split == "val" else of_class[:, :4500]
    indices = chosen.flatten().sort().values.tolist()
    part = Subset(whole, indices)
    part.classes, part.targets = whole.classes, [whole.targets[index] for index in indices]
    return part


def is_hidden(path, root):
    """Whether systems rather than people made this file below root, or a folder that it lies in."""
    return any(part.startswith(HIDDEN) for part in Path(path).relative_to(root).parts)


def is_image(path, root):
    """Whether a file below root has the ending of an image, and is not hidden."""
    return Path(path).suffix.lower() in EXTENSIONS and not is_hidden(path, root)


class Images(datasets.ImageFolder):
    """torchvision's ImageFolder without what systems add to folders; folders that are numbers count.

    A real folder or file counts once, whatever links lead to it; folders whose names differ only in how
    their accents are written (Macs write NFD) are one class. left_out: how many other files, by their endings,
    and images that lie in no class folder.
    """

    def __init__(self, folder):
        self.left_out = Counter()
        super().__init__(folder, loader=read_image, is_valid_file=self.is_valid)
        folders = {os.path.dirname(path) for path, _ in self.samples}
        real = {folder: os.path.realpath(folder) for folder in folders}
        by_file = {}
        for path, label in self.samples:
            folder, name = os.path.split(path)
            real_path = os.path.realpath(path) if os.path.islink(path) else os.path.join(real[folder], name)
            by_file.setdefault(real_path, (path, label))
        self.samples = self.imgs = list(by_file.values())
        self.targets = [label for _, label in self.samples]

    def is_valid(self, path):
        visible = not is_hidden(path, self.root)
        if visible and not is_image(path, self.root):
            self.left_out[Path(path).suffix.lower() or "(no ending)"] += 1
        return is_image(path, self.root)

    def find_classes(self, directory):
        loose = [entry for entry in os.scandir(directory) if entry.is_file() and is_image(entry.path, directory)]
        if loose:
            self.left_out["in no class folder"] = len(loose)
        names = [entry.name for entry in os.scandir(directory)
                 if entry.is_dir() and not entry.name.startswith(HIDDEN)]
        if not names:
            raise UserError(f"{directory} holds no class folder: images lie in "
                            f"{Path(directory).name}/<class>/")
        spelled = {name: unicodedata.normalize("NFC", name) for name in names}
        classes = sorted(set(spelled.values()), key=int if all(name.isdecimal() for name in names) else str)
        return classes, {name: classes.index(spelled[name]) for name in names}


def open_folder(name, split):
    """One split of a folder as a data set of PIL images; UserError where there is none."""
    folder = Path(name) / split
    if Path(name).is_file():
        raise UserError(f"{name} is a file: unpack it, and name the folder that holds train/ and val/")
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: --data takes {', '.join(DATASETS)}, or a folder with "
                        "train/<class>/ and val/<class>/ in it; if it has moved, say where with --data")
    try:
        return Images(folder)
    except FileNotFoundError as error:  # a class folder without images
        raise UserError(f"{folder}: {str(error).splitlines()[0]}") from None


# ------------------------------------------------------------------------------ the data sets

class DataSet(NamedTuple):
    """What is particular to a data set; a new one is a new entry of DATASETS.

    open(split, image_size): a data set as above. size: of the models, a key of model.SIZES and of the
    stages' RECIPES. mean, std: of its pixels, a value for each channel. The sigmas of both trainings, as
    text, and those to test at. eps: radius to compare at; attack_eps: those of attack.py. The augmentations
    take a batch [B, C, S, S] in memory; None: none.
    """
    open: Callable
    size: str
    mean: tuple
    std: tuple
    pretrain_sigma: str
    finetune_sigma: str
    test_sigmas: tuple
    eps: float
    attack_eps: tuple
    pretrain_augment: Callable = None
    finetune_augment: Callable = None


PAPER = dict(size="base", pretrain_sigma="gamma:25,3", finetune_sigma="uniform:0,30",
             test_sigmas=(0, 35, 70, 140), eps=4 / 255, attack_eps=(4 / 255, 8 / 255),
             mean=IMAGENET_MEAN, std=IMAGENET_STD)
COLOR = dict(size="small", pretrain_sigma="gamma:10,8", finetune_sigma="uniform:0,60",
             test_sigmas=(0, 50, 100), eps=4 / 255, attack_eps=(4 / 255, 8 / 255),
             mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616),
             pretrain_augment=training.crop_and_flip, finetune_augment=training.crop_and_flip)
DATASETS = {  # any other --data is a folder
    "digits": DataSet(load_digits, size="tiny", mean=(0.306,) * 3, std=(0.324,) * 3,
                      pretrain_sigma="gamma:10,12", finetune_sigma="uniform:100,400",
                      test_sigmas=(0, 50), eps=16 / 255, attack_eps=(8 / 255, 16 / 255),
                      finetune_augment=training.jitter),
    "cifar10": DataSet(open_cifar10, **COLOR),
}
DATA_HELP = f"{', '.join(DATASETS)}, or FOLDER with train/<class>/ and val/<class>/ in it"


def dataset_name(text):
    """The argparse type of --data: a data set's name, or a folder, of which the whole path is kept."""
    return text if text in DATASETS else str(Path(text).expanduser().resolve())


def short_name(dataset):
    """The name of a data set, or of its folder: runs lie in runs/<name>/."""
    return Path(dataset).name


def about(dataset, size=None):
    """The DataSet of a name; a folder is one of photographs (the paper's noise and recipe) or of small images.

    size: of the model, if it is known: it decides. Else the median of 25 training images, evenly spread, does.
    What was decided is said.
    """
    if dataset in DATASETS:
        return DATASETS[dataset]
    images = open_folder(dataset, "train")
    few = [images.samples[i * len(images) // 25][0] for i in range(25)]  # some twice, of fewer
    sides = [read_image(path).size for path in few]
    width, height = (round(median(side[axis] for side in sides)) for axis in (0, 1))
    is_small = SIZES[size]["image_size"] <= SMALL if size else max(width, height) <= SMALL
    row = COLOR if is_small else PAPER
    size = size or row["size"]
    pixels = SIZES[size]["image_size"]
    print(f"{dataset}: {len(images):,} training images of about {width}x{height} pixels, {len(images.classes)} "
          f"classes; size {size}: each is taken as {pixels}x{pixels}")
    return DataSet(lambda split, image_size: open_folder(dataset, split), **row)


# ----------------------------------------------------------------------------- images and labels

def in_memory(dataset):
    """Whether a data set is kept in memory, and augmented batch by batch."""
    return isinstance(dataset, TensorDataset)


def labels_of(dataset):
    """The labels of a data set: [N]."""
    return dataset.tensors[1] if in_memory(dataset) else torch.tensor(dataset.targets)


def open_split(dataset, split, image_size):
    """A split of a data set, its names and numbers checked; UserError for what cannot be used."""
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    opened = DATASETS[dataset].open(split, image_size) if dataset in DATASETS else open_folder(dataset, split)
    if not hasattr(opened, "classes") or not (in_memory(opened) or hasattr(opened, "targets")):
        raise UserError(f"{dataset}: a data set needs classes, the names of its labels, and, unless it is a "
                        "TensorDataset, targets, its labels")
    if in_memory(opened) and opened.tensors[0].dtype != torch.uint8:
        if opened.tensors[0].dtype != torch.float32:
            raise UserError(f"{dataset}: images must be bytes (uint8) or float32, not "
                            f"{opened.tensors[0].dtype}")
        check_images(opened.tensors[0])
    if len(set(opened.classes)) < len(opened.classes):
        raise UserError(f"{dataset}: two of its classes have the same name: give each its own")
    labels = labels_of(opened)
    if labels.dtype != torch.long or not 0 <= labels.min() <= labels.max() < len(opened.classes):
        raise UserError(f"{dataset}: labels must be class numbers (long) from 0 to {len(opened.classes) - 1}")
    left_out = getattr(opened, "left_out", {})
    if left_out:
        counts = ", ".join(f"{count} {ending}" for ending, count in sorted(left_out.items()))
        print(f"note: {dataset}/{split}: files were left out: {counts}")
    return opened


def choose(labels, count=None):
    """The indices of `count` images (default: all): a fixed shuffled choice, spread over the classes.

    It depends on the labels alone and is the same for every stage, table and machine; a smaller choice is the
    beginning of a larger one.
    """
    labels = labels.numpy()
    shuffled = np.random.RandomState(0).permutation(len(labels))  # NumPy keeps these numbers for good
    share = np.empty(len(labels))  # of its class that an image completes, in shuffled order
    for label in np.unique(labels):
        of_class = shuffled[labels[shuffled] == label]
        share[of_class] = (np.arange(len(of_class)) + 0.5) / len(of_class)
    order = np.lexsort((labels, share))
    return order[:count].tolist()


def decode(dataset, image_size, indices):
    """These images of a data set of PIL images, as they are evaluated: bytes [N, 3, S, S] and labels [N]."""
    progress, as_they_are, unreadable = cli.Progress(), 0, []
    images = torch.empty(len(indices), 3, image_size, image_size, dtype=torch.uint8)
    labels = torch.empty(len(indices), dtype=torch.long)
    for place, index in enumerate(indices):
        try:
            image, label = dataset[index]
        except UserError as error:  # all of them are named at once
            unreadable.append(str(error))
            continue
        images[place], labels[place] = to_size(image, image_size), label
        as_they_are += image.size == (image_size, image_size)
        progress.show(f"decoding image {place + 1} of {len(indices)}", (place + 1) / len(indices))
    progress.clear()
    if unreadable:
        raise UserError("; ".join(unreadable[:SHOWN]) + f"; {len(unreadable)} file(s) in all")
    if as_they_are and image_size > SMALL:
        print(f"note: {as_they_are} of {len(indices)} images have {image_size}x{image_size} pixels and are "
              "not enlarged and cropped")
    return images, labels


def load_images(dataset, split, image_size, classes=None, count=None):
    """Images [N, C, S, S] (bytes, or floats in [0, 1]), labels [N], and the names of the classes.

    count: at most so many, see `choose`. classes: the order in which the labels count them, a classifier's;
    UserError if the data set has others.
    """
    whole = open_split(dataset, split, image_size)
    chosen = choose(labels_of(whole), count)
    images, labels = whole[chosen] if in_memory(whole) else decode(whole, image_size, chosen)
    classes = list(classes or whole.classes)
    return images, in_order_of(classes, whole.classes, f"{dataset}/{split}")[labels], classes


def in_order_of(classes, own, dataset):
    """For each of a data set's own class names its place among `classes`; UserError if they differ."""
    missing, unknown = sorted(set(classes) - set(own)), sorted(set(own) - set(classes))
    if missing or unknown:
        raise UserError(f"the classes of {dataset} are not those of the training images (missing: "
                        f"{', '.join(missing[:5]) or 'none'}; unknown: {', '.join(unknown[:5]) or 'none'})")
    return torch.tensor([classes.index(name) for name in own])


def as_floats(images):
    """Bytes 0..255 as floats in [0, 1]; floats as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def digest_of_each(images):
    """A number for each image, [N], which tells whether two images are the same."""
    pixels = images.cpu().numpy()
    digests = [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in pixels]
    return torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.int64).copy())


def digest(*tensors):
    """Twelve hex digits of the contents of tensors, to tell whether images are the same."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.contiguous().cpu().numpy().tobytes())
    return sha.hexdigest()[:12]


# ---------------------------------------------------------------------------- training's batches

class Transformed(Dataset):
    """A data set of PIL images, each transformed when it is asked for; set `epoch` before each epoch.

    All random numbers of an image follow from (seed, epoch, index): then it does not matter which
    process loads it, and after what.
    """

    def __init__(self, dataset, transform, seed):
        self.dataset, self.transform, self.classes = dataset, transform, dataset.classes
        self.seed, self.epoch = seed, 0

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        image = as_rgb(image)
        with torch.random.fork_rng(devices=[]):
            seed = (self.seed * 1_000_003 + self.epoch) * 1_000_000_007 + index
            torch.default_generator.manual_seed(seed % 2**63)  # the CPU's only
            return self.transform(image), label


def load_training_images(dataset, image_size, transform, seed):
    """The training images: a TensorDataset where they are kept in memory, else a Transformed.

    transform: from PIL image to [3, S, S], for those that are not kept in memory.
    """
    opened = open_split(dataset, "train", image_size)
    if in_memory(opened):
        return opened
    if image_size > SMALL:
        return Transformed(opened, transform, seed)
    decoded = TensorDataset(*decode(opened, image_size, range(len(opened))))
    decoded.classes = opened.classes
    return decoded


class TrainingBatches:
    """What a training draws its images from: `epoch(number)` gives the micro-batches of one epoch.

    batch_size counts the images of all processes in one optimizer step; a process sees at most
    max_batch at once, in as few micro-batches of equal size as that takes; what does not divide evenly
    is left out: see `batch`, `micro_batches` and `steps` (of an epoch). UserError for too few images.
    """

    def __init__(self, dataset, batch_size, max_batch, seed, workers, device):
        per_process = min(batch_size, len(dataset)) // cli.world_size()
        if not per_process:
            raise UserError(f"{len(dataset)} images in batches of {batch_size} do not fill "
                            f"{cli.world_size()} processes")
        self.micro_batches = math.ceil(per_process / max_batch)
        self.at_once = per_process // self.micro_batches  # images that a process sees
        self.batch = self.at_once * self.micro_batches * cli.world_size()
        self.steps = len(dataset) // self.batch
        self.dataset, self.seed, self.workers, self.device = dataset, seed, workers, device

    def order(self, epoch):
        """The indices of each micro-batch of this process.

        Every process draws the same permutation of all images, which follows from seed and epoch, and cuts
        it into micro-batches of equal size, of which each process takes a part.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        permutation = torch.randperm(len(self.dataset), generator=generator)
        whole_batches = permutation[:self.steps * self.batch]
        micro_batches = whole_batches.view(-1, cli.world_size(), self.at_once)
        return micro_batches[:, cli.rank()].tolist()

    def epoch(self, number):
        """Yields (images in [0, 1], labels) on the device; all random numbers follow from (seed, epoch)."""
        training.seed_epoch(self.seed, number)
        on_gpu = self.device.type == "cuda"
        if in_memory(self.dataset):  # a micro-batch is one indexing operation
            loader = DataLoader(self.dataset, sampler=self.order(number), batch_size=None)
        else:
            self.dataset.epoch = number
            loader = DataLoader(self.dataset, batch_sampler=self.order(number), num_workers=self.workers,
                                pin_memory=on_gpu, generator=torch.Generator())
        for images, labels in loader:
            images = images.to(self.device, non_blocking=on_gpu)
            yield as_floats(images), labels.to(self.device)
