"""What both training stages share: augmentation, AdamW's groups, schedule, micro-batches, the log."""

import functools
import math
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

from model import UserError, check_images
from support import cli


def pretrain_transform(image_size):
    """RandomResizedCrop(0.2..1, bicubic) and flip."""
    return transforms.Compose([
        transforms.RandomResizedCrop(image_size, (0.2, 1), interpolation=InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor()])


def gentle_transform(image_size):
    """RandomResizedCrop(0.5..1, bicubic) and flip, for few photographs."""
    return transforms.Compose([
        transforms.RandomResizedCrop(image_size, (0.5, 1), interpolation=InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor()])


def finetune_transform(image_size, mean, std):
    """RandomResizedCrop(0.08..1), flip, RandAugment, erasing 0.25, all as in MAE's recipe.

    RandAugment is timm's rand-m9-mstd0.5-inc1: two operations, each with probability 0.5, at 9 of 10.
    torchvision's set lacks timm's Invert and SolarizeAdd, and its magnitude has no spread of 0.5.
    Erasing writes N(0, 1) where the image is normalized, that is mean + std·z; the result is clamped.
    """
    operation = transforms.RandAugment(1, magnitude=27, fill=[round(255 * value) for value in mean],
                                       interpolation=InterpolationMode.BICUBIC)
    back = transforms.Normalize([-m / s for m, s in zip(mean, std)], [1 / s for s in std])
    return transforms.Compose([
        transforms.RandomResizedCrop(image_size, (0.08, 1), interpolation=InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([operation], 0.5), transforms.RandomApply([operation], 0.5),
        transforms.ToTensor(), transforms.Normalize(mean, std),
        transforms.RandomErasing(0.25, value="random"), back,
        transforms.Lambda(functools.partial(torch.clamp, min=0, max=1))])


jitter_digit = v2.RandomAffine(degrees=8, translate=(0.08, 0.08), scale=(0.9, 1.1),
                               interpolation=InterpolationMode.BILINEAR)


def jitter(images):
    """The augmentation of the digits: images [B, 3, S, S], rotated, shifted and scaled a little.

    Eight images share one draw: torchvision draws once per call, and calls cost time.
    """
    return torch.cat([jitter_digit(eight) for eight in images.split(8)])


def crop_and_flip(images, padding=4):
    """The augmentation of small color images [B, 3, S, S], in both training stages.

    Each is cut out at a random place of its reflect-padded self, and mirrored with probability 1/2.
    """
    B, _, S, _ = images.shape
    padded = F.pad(images, (padding,) * 4, mode="reflect")
    windows = padded.unfold(2, S, 1).unfold(3, S, 1)  # [B, 3, 2·padding + 1, 2·padding + 1, S, S]
    top, left = torch.randint(2 * padding + 1, (2, B))
    crops = windows[torch.arange(B), :, top, left]
    mirrored = (torch.rand(B) < 0.5).to(images.device)
    return torch.where(mirrored.view(-1, 1, 1, 1), crops.flip(3), crops)


def check_augmentation(augment, images):
    """UserError unless an augmentation of batches (None: there is none) keeps these images in [0, 1]."""
    if augment is None:
        return
    try:
        check_images(augment(images))
    except UserError as error:
        raise UserError(f"after augmentation by {getattr(augment, '__name__', augment)} {error}") from None


def seed_epoch(seed, epoch):
    """All randomness of an epoch follows from (seed, epoch), so a resumed run repeats it exactly.

    Each process draws its own noise; the order of the images is data.TrainingBatches'.
    """
    cli.seed_everything((seed * 1_000_003 + epoch + 1) * 1_009)


def initialize(model, other, source):
    """Give a model the weights that another one has under the same names; source: which that is, in words.

    A head for another number of classes is left out. Says what kept its initial value; UserError where
    nothing fits, or a shape differs.
    """
    own, given = model.state_dict(), other.state_dict()
    common = [name for name in own if name in given]
    differ = [name for name in common if own[name].shape != given[name].shape]
    if not common:
        raise UserError(f"{source} has no weights in common with this model: choose another run, or "
                        "--from-scratch")
    if any(not name.startswith("head.") for name in differ):
        raise UserError(f"{differ[0]} is {list(given[differ[0]].shape)} in {source} and "
                        f"{list(own[differ[0]].shape)} here: is that run of another size?")
    taken = [name for name in common if name not in differ]
    model.load_state_dict({name: given[name] for name in taken}, strict=False)
    for name in ("mean", "std"):  # no weights: they follow from the data, or the autoencoder
        before, now = getattr(other, name, None), getattr(model, name, None)
        if before is not None and now is not None and not torch.equal(before.cpu(), now.cpu()):
            print(f"note: {source} normalizes by another {name}, {before.flatten().tolist()}, than this model, "
                  f"{now.flatten().tolist()}")
    left = sorted({name.split(".")[0] for name in own if name not in taken})
    print(f"weights from {source}; at their initial value: {', '.join(left) or 'none'}")


def parameter_groups(model, weight_decay, layer_decay=1.0):
    """AdamW groups: no weight decay on 1-D parameters, nor on what model.no_weight_decay names.

    layer_decay: the lr of block i is scaled by layer_decay^(depth - i), that of the tokens
    (patches, positions, class) by layer_decay^(depth + 1), that of the head by 1 (as in MAE). UserError for
    a model without blocks, whose layers it could not tell.
    """
    if layer_decay != 1 and not hasattr(model, "blocks"):
        raise UserError(f"layer decay {layer_decay:g} needs a ViT, a model with blocks: make the groups of each part "
                        "of yours by itself, and put them together")
    depth = len(getattr(model, "blocks", ()))
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        elif name.startswith(("cls_token", "pos_embed", "patch_embed")):
            layer = 0
        else:
            layer = depth + 1
        decays = parameter.dim() > 1 and name not in getattr(model, "no_weight_decay", ())
        lr_scale = layer_decay ** (depth + 1 - layer)
        group = groups.setdefault((lr_scale, decays), dict(  # few groups: each is a call in every step
            params=[], weight_decay=weight_decay if decays else 0.0, lr_scale=lr_scale))
        group["params"].append(parameter)
    return list(groups.values())


def learning_rate(step, steps, warmup_steps, peak, final):
    """Linear warm-up from 0, then half a cosine from peak to final; one value per iteration."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def print_plan(model, batches, epochs, peak_lr):
    """One line: what this training will do, and on what."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    device = next(model.parameters()).device
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    print(f"{len(batches.dataset):,} images, {epochs * batches.steps:,} steps of {batches.batch} in {epochs} "
          f"epochs, peak lr {peak_lr:.3g}; {parameters / 1e6:.2f} million parameters on {cli.world_size()} x "
          f"{device.type}{threads}")


def distribute(model, optimizer):
    """DistributedDataParallel around the model, where there are several processes; on a GPU, TF32 from here on.

    Its require_backward_grad_sync, False in all micro-batches but the last, has gradients averaged once.
    UserError where the optimizer trains what is not part of this model: only gradients of what is computed
    in its forward are averaged over processes. What is trained together goes into one module.
    """
    own = {id(parameter) for parameter in model.parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not all(id(parameter) in own for parameter in trained):
        raise UserError("the optimizer trains parameters that the model given to training.distribute does "
                        "not hold: put all that is trained into one module, and compute the loss in its "
                        "forward")
    if next(model.parameters()).is_cuda:
        torch.set_float32_matmul_precision("high")  # the later stages stay in float32
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model)


def check_processes(model):
    """UserError unless all processes ended with the same weights; waits for all of them.

    They drift apart where something is trained that DistributedDataParallel does not hold.
    """
    if not dist.is_initialized():
        return
    total = sum(parameter.detach().double().sum().item() for parameter in model.parameters())
    extremes = torch.tensor([total, -total], dtype=torch.float64)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if extremes[0] != -extremes[1]:
        raise UserError("the processes ended with different weights: put all that is trained into the one "
                        "module that training.distribute gets")


def update(optimizer, lr):
    """One optimizer step at this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.step()
    optimizer.zero_grad()


class EpochLog:
    """The sums of one epoch in this process, its line on the screen, and its row of the log.

    The sums stay on the device: to look at one waits for the device.
    """

    def __init__(self, epoch, epochs, micro_batches):
        self.epoch, self.epochs, self.micro_batches = epoch, epochs, micro_batches
        self.started, self.progress = time.perf_counter(), cli.Progress()
        self.seen, self.images, self.loss_sum, self.hits, self.counted = 0, 0, 0.0, 0, 0

    def add(self, loss, images, hits=None):
        """Count a micro-batch: its mean loss, number of images, correct ones (None: not counted)."""
        self.seen += 1
        self.images += images
        self.loss_sum += loss.detach() * images
        if hits is not None:
            self.hits, self.counted = self.hits + hits, self.counted + images
        self.progress.show(f"epoch {self.epoch}", self.seen / self.micro_batches)

    def finish(self, lr):
        """Print the epoch's line; returns its row of the log. UserError for a loss that is not finite."""
        seconds = time.perf_counter() - self.started
        loss, images, hits, counted = cli.sum_over_processes(
            float(self.loss_sum), self.images, int(self.hits), self.counted)
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} in epoch {self.epoch}; what was saved before is kept: try "
                            "a lower --base-lr")
        row = dict(epoch=self.epoch, loss=f"{loss / images:.6f}", accuracy="", lr=f"{lr:.3e}",
                   images_per_second=f"{images / seconds:.1f}")
        accuracy = ""
        if counted:
            row["accuracy"] = f"{100 * hits / counted:.2f}"
            accuracy = f"accuracy {100 * hits / counted:5.1f}%  "
        left = seconds * (self.epochs - self.epoch)
        self.progress.clear()
        print(f"epoch {self.epoch:4d}/{self.epochs}  loss {loss / images:7.4f}  {accuracy}lr {lr:.1e}  "
              f"{images / seconds:6.0f} images/s  {cli.minutes(left)} left", flush=True)
        return row
