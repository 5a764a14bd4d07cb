"""Data sets: the digits in this repository, CIFAR-10, or a folder of your own; one entry each.

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
             Transparent images are laid on white, photographs turned as the camera was held.

Images that are trained at up to 64 pixels are decoded once and kept in memory as bytes.
"""

import functools
import hashlib
import inspect
import math
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, Subset, TensorDataset
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from model import IMAGENET_MEAN, IMAGENET_STD, UserError, check_images
from support import cli, training

DIGITS_FILE = Path(__file__).parents[1] / "assets" / "digits.npz"
SMALL = 64  # pixels: up to here images are kept in memory, and a folder of such images is small
MEMORY = 2 * 10**9  # bytes, at most, of a data set in memory
VALIDATION_SHARE = 0.1  # of the training images of each class of a CIFAR
HELDOUT_IMAGES = 1000  # validation images, at most, on which the training stages show their result
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")  # Pillow hands some others to other programs
SPLITS = ("train", "val", "test")
HIDDEN = (".", "__MACOSX", "@eaDir")  # how names begin that systems make: archives of Macs, network drives
TURNS = {  # EXIF's orientation tag: how the stored image has to be turned
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}


# ------------------------------------------------------------------------------- reading images

def read_image(path):
    """A PIL RGB image: transparency laid on white, turned as the camera was held.

    Raises UserError, which names the file and the formats that are accepted.
    """
    try:
        with open(path, "rb") as file:
            image = Image.open(file, formats=FORMATS)
            if image.mode.startswith(("I", "F")):  # Pillow would clip them to white
                raise ValueError("it has more than 8 bits per channel")
            image.load()
            turn = orientation(image)
            if turn in TURNS:
                image = image.transpose(TURNS[turn])
            has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La")
            if has_alpha or "transparency" in image.info:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        if isinstance(error, FileNotFoundError):
            raise UserError(f"there is no image {path}") from None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read image {path} ({reason}): replace or remove it; {', '.join(FORMATS)} "
                        "files of 8 bits per channel are accepted") from None


def orientation(image):
    """EXIF's orientation tag; 1, as it is stored, where there is none or EXIF is damaged."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # damaged in many ways
        return 1


def eval_transform(image_size):
    """Resize the short side (to 256 for 224; under 128 to image_size) and crop the center, bicubic."""
    resize = image_size * 256 // 224 if image_size >= 128 else image_size
    return transforms.Compose([transforms.Resize(resize, InterpolationMode.BICUBIC),
                               transforms.CenterCrop(image_size), transforms.ToTensor()])


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


def open_cifar(make, split, image_size):
    """A CIFAR of torchvision's (`make`, its class) as a data set of PIL images."""
    try:
        if cli.rank() == 0:
            make("data", split != "test", download=True)
        cli.sum_over_processes(0)  # the others wait for it
        whole = make("data", split != "test")
    except (OSError, RuntimeError) as error:  # no network, or a damaged download
        raise UserError(f"could not get {make.__name__} into data/ ({str(error).splitlines()[0]}): place "
                        "its archive there or use --data FOLDER") from None
    return whole if split == "test" else of_each_class(whole, split)


class Images(datasets.ImageFolder):
    """torchvision's ImageFolder without hidden files and folders; folders that are numbers count."""

    def __init__(self, folder):
        super().__init__(folder, loader=read_image, is_valid_file=self.is_image)

    def is_image(self, path):
        hidden = any(part.startswith(HIDDEN) for part in Path(path).relative_to(self.root).parts)
        return path.lower().endswith(datasets.folder.IMG_EXTENSIONS) and not hidden

    def find_classes(self, directory):
        names = [entry.name for entry in os.scandir(directory)
                 if entry.is_dir() and not entry.name.startswith(HIDDEN)]
        names.sort(key=int if all(name.isdecimal() for name in names) else str)
        if not names:
            raise FileNotFoundError("there is no class folder in it")
        return names, {name: number for number, name in enumerate(names)}


def split_there_is(dataset, split):
    """The split itself, or "val", with a note, for the "test" of a folder that has none."""
    if dataset in DATASETS or split != "test" or (Path(dataset) / "test").is_dir():
        return split
    print(f"note: {dataset} has no test/: its val/ is used")
    return "val"


def open_folder(name, split):
    """One split of a folder as a data set of PIL images; UserError where there is none."""
    folder = Path(name) / split
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: --data takes {', '.join(DATASETS)}, or a folder with "
                        "train/<class>/ and val/<class>/ in it; if it has moved, say where with --data")
    try:
        return Images(folder)
    except FileNotFoundError as error:  # no class folder, or one without images
        hint = "; --split val takes the validation images" if split == "test" else ""
        raise UserError(f"{folder}: {str(error).splitlines()[0]}{hint}") from None


def of_each_class(dataset, split):
    """The last tenth of each class for "val", the others for "train"; order and classes stay."""
    seen, chosen = [0] * len(dataset.classes), []
    totals = torch.tensor(dataset.targets).bincount().tolist()
    for index, label in enumerate(dataset.targets):
        is_validation = seen[label] >= totals[label] - round(VALIDATION_SHARE * totals[label])
        seen[label] += 1
        if is_validation == (split == "val"):
            chosen.append(index)
    result = Subset(dataset, chosen)
    result.classes = dataset.classes
    return result


# ------------------------------------------------------------------------------ the data sets

class DataSet(NamedTuple):
    """What is particular to a data set; a new one is a new entry of DATASETS.

    open(split, image_size): a TensorDataset, or a data set of (PIL image, label), with `classes`.
    size: of the models, a key of model.SIZES and of the stages' RECIPES. mean, std: of its pixels.
    The sigmas of both trainings, as text, and those to test at. eps: radius to compare at;
    attack_eps: those of attack.py. The augmentations take a batch [B, 3, S, S] in memory, None: none.
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
    pretrain_augment: Callable = training.crop_and_flip
    finetune_augment: Callable = training.crop_and_flip


PAPER = dict(size="base", pretrain_sigma="gamma:25,3", finetune_sigma="uniform:0,30",
             test_sigmas=(0, 35, 70, 140), eps=4 / 255, attack_eps=(4 / 255, 8 / 255),
             mean=IMAGENET_MEAN, std=IMAGENET_STD)
COLOR = dict(size="small", pretrain_sigma="gamma:10,8", finetune_sigma="uniform:0,60",
             test_sigmas=(0, 50, 100), eps=4 / 255, attack_eps=(4 / 255, 8 / 255),
             mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
DATASETS = {  # any other --data is a folder
    "digits": DataSet(load_digits, size="tiny", mean=(0.306,) * 3, std=(0.324,) * 3,
                      pretrain_sigma="gamma:10,12", finetune_sigma="uniform:100,400",
                      test_sigmas=(0, 50), eps=16 / 255, attack_eps=(8 / 255, 16 / 255),
                      pretrain_augment=None, finetune_augment=training.shift),
    "cifar10": DataSet(functools.partial(open_cifar, datasets.CIFAR10), **COLOR),
}


DATA_HELP = f"{', '.join(DATASETS)}, or FOLDER with train/<class>/ and val/<class>/ in it"


def dataset_name(text):
    """The argparse type of --data: a data set's name, or a folder, of which the whole path is kept."""
    if text in DATASETS and Path(text, "train").is_dir():
        print(f"note: {text} is the data set of that name; the folder here is --data ./{text}")
    return text if text in DATASETS else str(Path(text).expanduser().resolve())


@functools.cache
def about(dataset):
    """The DataSet of a name; a folder is one of photographs (ImageNet's recipe) or of small images.

    The median of 25 of its training images, evenly spread, decides, and what was decided is said.
    """
    if dataset in DATASETS:
        return DATASETS[dataset]
    images = open_folder(dataset, "train")
    chosen = [images.samples[i * len(images) // 25][0] for i in range(25)] if len(images) > 25 else [
        path for path, _ in images.samples]
    sides = [read_image(path).size for path in chosen]
    width, height = (round(median(side[axis] for side in sides)) for axis in (0, 1))
    row = COLOR if max(width, height) <= SMALL else PAPER
    print(f"{dataset}: {len(images):,} training images of {width}x{height} (the median of "
          f"{len(sides)}), {len(images.classes)} classes: size {row['size']} unless --size says otherwise")
    return DataSet(lambda split, image_size: open_folder(dataset, split), **row)


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
        self.places = list(range(len(self.classes)))  # of the labels, see in_order_of

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        if not isinstance(key, tuple):
            image, label = self.dataset[key]
            return self.transform(image), self.places[label]
        seed, epoch, index = key
        image, label = self.dataset[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(((seed * 1_000_003 + epoch) * 1_000_000_007 + index) % 2**63)
            return self.transform(image), self.places[label]


def check_tensors(images, dataset):
    """UserError unless a TensorDataset holds bytes, or floats in [0, 1], and class numbers from 0."""
    pixels, labels = images.tensors
    if pixels.dtype != torch.uint8:
        check_images(pixels)
    if labels.dtype != torch.long or not 0 <= labels.min() <= labels.max() < len(images.classes):
        raise UserError(f"{dataset}: labels must be class numbers (long) from 0 to {len(images.classes) - 1}")


def load_dataset(dataset, split, image_size, transform=None):
    """The images of a data set (a key of DATASETS or a folder); split train, val or test.

    transform: from PIL image to [3, S, S], for images that are not kept in memory; default
    eval_transform. Raises UserError for a missing or empty folder and for a download that fails.
    """
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if dataset in DATASETS:
        images = DATASETS[dataset].open(split, image_size)
    else:
        images = open_folder(dataset, split)
    if in_memory(images):
        check_tensors(images, dataset)
        return images
    if image_size <= SMALL and len(images) * 3 * image_size**2 <= MEMORY:
        return decode(images, image_size)
    return Transformed(images, transform or eval_transform(image_size))


def load_heldout(dataset, image_size, workers, classes=None):
    """At most 1,000 validation images for the result of a training, of several processes each its own.

    All are opened now, so that none stops a run at its end. UserError unless they have these classes.
    """
    images = load_dataset(dataset, "val", image_size)
    if classes is not None:
        differ = sorted(set(classes) ^ set(images.classes))
        if differ:
            raise UserError(f"{dataset}: train/ and val/ do not hold the same classes ({', '.join(differ[:5])} "
                            "in only one of them)")
        images = in_order_of(classes, images, dataset)
    own = evenly_spread(images, HELDOUT_IMAGES, cli.rank(), cli.world_size())
    if not in_memory(own):
        for _ in Loader(own, 50, workers):
            pass
    return own


def in_order_of(classes, images, dataset):
    """The same images with labels in the order of these classes, a classifier's; UserError if others."""
    if sorted(images.classes) != sorted(classes):
        missing, more = set(classes) - set(images.classes), set(images.classes) - set(classes)
        raise UserError(f"the classes of {dataset} are not those the classifier was trained on (missing: "
                        f"{', '.join(sorted(missing)[:5]) or 'none'}; unknown to it: "
                        f"{', '.join(sorted(more)[:5]) or 'none'})")
    places = [classes.index(name) for name in images.classes]
    if in_memory(images):
        pixels, labels = images.tensors
        images.tensors = (pixels, torch.tensor(places)[labels])
    else:
        images.places = [places[place] for place in images.places]
    images.classes = list(classes)
    return images


def digest(*tensors):
    """Twelve hex digits of the contents of tensors, to tell whether images are the same."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.contiguous().cpu().numpy().tobytes())
    return sha.hexdigest()[:12]


def digest_of(batches):
    """Twelve hex digits of all the images and labels of a loader, in whatever order, of all processes."""
    own = [digest(*pair) for images, labels in batches for pair in zip(images, labels)]
    return hashlib.sha256("".join(sorted(cli.gather(own))).encode()).hexdigest()[:12]


def facts(dataset, images):
    """What a checkpoint says of its data: plain values, for the later stages and for --resume.

    pixels: a digest of the training images, where they are in memory.
    """
    row = about(dataset)
    return dict(name=dataset, images=len(images), pixels=digest(*images.tensors) if in_memory(images)
                else "", test_sigmas=list(row.test_sigmas), eps=row.eps, attack_eps=list(row.attack_eps),
                finetune_sigma=row.finetune_sigma)


def name_of(augmentation):
    """What tells one augmentation of DATASETS from another, as text; None for none."""
    if augmentation is None:
        return None
    if isinstance(augmentation, functools.partial):
        return f"{augmentation.func.__name__}{augmentation.args}{augmentation.keywords}"
    if isinstance(augmentation, torch.nn.Module):  # torchvision's: its text gives its settings
        return repr(augmentation)
    name = getattr(augmentation, "__name__", type(augmentation).__name__)
    if name == "<lambda>":
        return inspect.getsource(augmentation).strip()
    return name


def in_memory(dataset):
    """Whether a data set is kept in memory, and augmented batch by batch."""
    return isinstance(dataset, TensorDataset)


class Loader:
    """Batches (images [B, 3, S, S] in [0, 1], labels [B]) of a data set, on the device.

    batch_size: to go once through all of it; or a Sampler of lists of its keys. workers: processes
    that load images which are not in memory; those of a training live until it ends.
    """

    def __init__(self, dataset, batch_size, workers=0, device="cpu"):
        self.device, self.images = torch.device(device), dataset
        keys = batch_size
        if isinstance(batch_size, int):
            keys = BatchSampler(range(len(dataset)), batch_size, drop_last=False)
        if in_memory(dataset):  # a batch is one indexing operation
            self.batches = DataLoader(dataset, sampler=keys, batch_size=None)
        else:
            self.batches = DataLoader(
                dataset, batch_sampler=keys, num_workers=workers,
                persistent_workers=isinstance(keys, TrainingOrder) and workers > 0,
                pin_memory=self.device.type != "cpu", worker_init_fn=cli.ignore_ctrl_c,
                generator=torch.Generator())  # the loader draws a seed: not from the training's numbers

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for images, labels in self.batches:
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device)
            if images.dtype == torch.uint8:
                images = images.float() / 255
            yield images, labels


class TrainingOrder(Sampler):
    """Lists of keys for one epoch of training (set `epoch` before each): indices, or Transformed's.

    Every process draws the same permutation, which follows from seed and epoch, and cuts it into
    batches (the last partial one is dropped). A batch is divided evenly into micro-batches, and each
    of these into a piece for every process.
    """

    def __init__(self, images, batch, micro_batches, seed, with_seed):
        self.images, self.batch, self.micro_batches, self.seed = images, batch, micro_batches, seed
        self.with_seed, self.epoch = with_seed, 0

    def __len__(self):
        return self.images // self.batch * self.micro_batches

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.images, generator=generator)
        for batch in order.split(self.batch)[:self.images // self.batch]:
            pieces = batch.view(self.micro_batches, cli.world_size(), -1)
            for indices in pieces[:, cli.rank()].tolist():
                yield [(self.seed, self.epoch, i) for i in indices] if self.with_seed else indices


class TrainingBatches:
    """What a training draws its images from: `epoch(number)` gives the micro-batches of one epoch.

    batch_size counts the images of all processes in one optimizer step; a process sees at most
    max_batch at once, in as few micro-batches of equal size as that takes; what does not divide evenly
    is left out: see `batch`, `micro_batches` and `steps` (of an epoch). UserError for too few images.
    """

    def __init__(self, dataset, batch_size, max_batch, seed, workers, device):
        world_size, images = cli.world_size(), len(dataset)
        per_process = min(batch_size, images) // world_size
        if not per_process:
            raise UserError(f"{images} images in batches of {batch_size} do not fill {world_size} processes")
        self.micro_batches = math.ceil(per_process / max_batch)
        self.batch = per_process // self.micro_batches * self.micro_batches * world_size
        self.at_once = self.batch // self.micro_batches // world_size  # images that a process sees
        self.steps, self.seed = images // self.batch, seed
        self.order = TrainingOrder(images, self.batch, self.micro_batches, seed, not in_memory(dataset))
        self.loader = Loader(dataset, self.order, workers, device)

    def epoch(self, number):
        """An iterator over (images, labels); all random numbers from here on follow from (seed, epoch)."""
        training.seed_epoch(self.seed, number)
        self.order.epoch = number
        return iter(self.loader)


def evenly_spread(dataset, count, rank=0, world_size=1):
    """`count` images evenly spread over the data set (a folder lists its images class by class).

    Of several processes each gets its own: every image exactly once. UserError for fewer than processes.
    """
    count = min(count, len(dataset))
    if count < world_size:
        raise UserError(f"{count} images are too few for {world_size} processes, which need one each")
    chosen = [i * len(dataset) // count for i in range(count)]
    own = chosen[rank::world_size]
    if in_memory(dataset):
        return TensorDataset(*dataset[own])
    return Subset(dataset, own)
