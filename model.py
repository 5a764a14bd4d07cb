"""The whole method: ViT autoencoder (NIM and MIM), ViT classifier, noise, and the De³ defense.

Source: "Beyond Pretrained Features: Noisy Image Modeling Provides Adversarial Defense" (NeurIPS
2023, arXiv 2302.01056), on MAE (arXiv 2111.06377), whose parameter names are kept: weights are
published under them. Images are [B, C, H, W] in [0, 1], normalized by mean/std inside the models (as
many channels as values in mean: 3, or 1 for gray); sigma is in 8-bit units, 0..255. Shapes: B images,
L patches, p patch size, D width of a token.
"""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18
from torchvision.ops import StochasticDepth
from torchvision.transforms import Normalize
from torchvision.transforms.functional import gaussian_blur

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DECODER = dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)
SIZES = {  # arguments of Autoencoder; base, large and huge are MAE's
    "tiny": dict(image_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4,  # the digits
                 decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4),
    "small": dict(image_size=32, patch_size=4, embed_dim=144, depth=5, num_heads=3,  # 32x32 color
                  decoder_embed_dim=96, decoder_depth=2, decoder_num_heads=3),
    "medium": dict(image_size=32, patch_size=4, embed_dim=192, depth=7, num_heads=6,  # on a GPU
                   decoder_embed_dim=128, decoder_depth=4, decoder_num_heads=4),
    "base": dict(image_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, **DECODER),
    "large": dict(image_size=224, patch_size=16, embed_dim=1024, depth=24, num_heads=16, **DECODER),
    "huge": dict(image_size=224, patch_size=14, embed_dim=1280, depth=32, num_heads=16, **DECODER),
}


class UserError(ValueError):
    """Bad input; the message says in one sentence what is wrong and what to do."""


# --------------------------------------------------------------------------------------- the noise

class NoiseLaw(NamedTuple):
    """A distribution that sigma is drawn from; a new one is a new entry of NOISE_LAWS.

    parameters: their names, as help and errors show them. is_valid(*values): whether they may be
    used. draw(batch_size, device, *values): one sigma for each image, [B].
    """
    parameters: str
    is_valid: Callable
    draw: Callable


def draw_gamma(batch_size, device, shape, scale):
    """Gamma: mean shape·scale, standard deviation √shape·scale; torch asks for the rate, 1/scale."""
    gamma = torch.distributions.Gamma(shape, 1 / scale)
    return gamma.sample((batch_size,)).to(device)


def draw_uniform(batch_size, device, low, high):
    """Uniform from low to high; low = high where sigma is fixed, and nothing is drawn."""
    if low == high:
        return torch.full((batch_size,), low, device=device)
    return torch.empty(batch_size, device=device).uniform_(low, high)


NOISE_LAWS = {
    "gamma": NoiseLaw("SHAPE,SCALE", lambda shape, scale: min(shape, scale) >= 1e-3, draw_gamma),
    "uniform": NoiseLaw("LOW,HIGH", lambda low, high: 0 <= low <= high, draw_uniform),
}
LARGEST_PARAMETER = 1e6  # of a noise law: beyond it float32 has nothing left of the image
SIGMA_HELP = "a number or " + " or ".join(f"{name}:{law.parameters}" for name, law in NOISE_LAWS.items())


@dataclass(frozen=True)
class NoiseScale:
    """What sigma is drawn from: the name of a noise law, and its parameters."""
    law: str
    parameters: tuple

    @classmethod
    def parse(cls, text):
        """Read '70', 'gamma:25,3' or 'uniform:0,30'; anything else raises UserError.

        A number is the uniform distribution from itself to itself. A NoiseScale is returned as it is.
        """
        if isinstance(text, NoiseScale):
            return text
        name, colon, numbers = str(text).rpartition(":")
        if not colon:
            name, numbers = "uniform", f"{numbers},{numbers}"
        try:
            parameters = tuple(float(number) for number in numbers.split(","))
        except ValueError:
            parameters = ()
        law = NOISE_LAWS.get(name)
        valid = law is not None and len(parameters) == len(law.parameters.split(","))
        if valid:
            finite = all(abs(value) <= LARGEST_PARAMETER for value in parameters)
            valid = finite and law.is_valid(*parameters)
        if not valid:
            raise UserError(f"sigma {text!r} must be {SIGMA_HELP}, in 8-bit units (255 is the range of a "
                            "pixel), with values that this law allows")
        return cls(name, parameters)

    @property
    def fixed(self):
        """The one sigma that is ever drawn, as a float; None where sigma is random."""
        if self.law == "uniform" and self.parameters[0] == self.parameters[1]:
            return self.parameters[0]
        return None

    def draw(self, batch_size, device="cpu"):
        """One sigma for each image: [B]."""
        return NOISE_LAWS[self.law].draw(batch_size, device, *self.parameters)

    def __str__(self):
        """What `parse` reads."""
        if self.fixed is not None:
            return f"{self.fixed:.15g}"
        return f"{self.law}:{','.join(f'{value:.15g}' for value in self.parameters)}"


def warn_of_small_sigma(scale):
    """Warn of a NoiseScale that seems to be meant as a share of the pixel range."""
    largest = scale.parameters[-1]
    if scale.law == "uniform" and 0 < largest < 1:
        warnings.warn(f"sigma is in 8-bit units (0..255): {largest:g} is next to nothing; where a share of the "
                      f"pixel range was meant, write {255 * largest:g}", stacklevel=3)


def add_noise(images, sigma, noise=None):
    """x + ε·σ/255, not clipped; sigma is a number, or one for each image, [B].

    ε ~ N(0, I) is drawn fresh at every call, unless noise, [C, H, W], gives it: studies.compare does, to
    measure an attacker who knows the noise; for another distribution, change it there, too.
    Raises UserError for a sigma that is negative or not finite.
    """
    sigma = torch.as_tensor(sigma)
    can_be_checked = not (sigma.is_cuda or torch.compiler.is_compiling())  # a GPU would have to wait
    if can_be_checked and not ((sigma >= 0) & sigma.isfinite()).all():
        raise UserError(f"sigma must be finite and not negative, not {sigma.tolist()}")
    sigma = sigma.to(images).view(-1, 1, 1, 1)
    if noise is None:
        noise = torch.randn_like(images)
    return images + noise.to(images) * sigma / 255


# ------------------------------------------------------------------------------------- the networks

def patchify(images, p):
    """[B, C, H, W] -> [B, L, p·p·C], patches row by row, inside a patch (row, column, channel)."""
    B, C, H, W = images.shape
    grid = images.reshape(B, C, H // p, p, W // p, p)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def unpatchify(patches, p):
    """Inverse of patchify, for square images: [B, L, p·p·C] -> [B, C, H, W]."""
    B, L, values = patches.shape
    side, C = math.isqrt(L), values // p**2
    grid = patches.reshape(B, side, side, p, p, C)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(B, C, side * p, side * p)


def sincos_pos_embed(embed_dim, side):
    """Fixed 2-D sine-cosine position embedding [1, 1 + side², D]; zero for the class token.

    The first half of the channels encodes the column, the second half the row (MAE's order); each
    is the sines, then the cosines, of position / 10000^(i / (D/4)), i = 0 .. D/4 - 1.
    """
    frequency = 10000 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency  # [side, D/4]
    encoding = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, D/2]
    column = encoding.repeat(side, 1)  # patch k stands in column k % side
    row = encoding.repeat_interleave(side, dim=0)  # and in row k // side
    embedding = torch.cat([column, row], dim=1).float()
    return torch.cat([torch.zeros(1, embed_dim), embedding])[None]


class Attention(nn.Module):
    """Multi-head self-attention: [B, L, D] -> [B, L, D]."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, L, D = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, L, D/heads]
        if x.is_cuda:
            x = F.scaled_dot_product_attention(q, k, v)
        else:  # the same by hand: on a CPU the fused kernel's backward is slow in bfloat16
            scale = (D // self.num_heads) ** -0.5
            scores = (q * scale) @ k.transpose(-2, -1)  # [B, heads, L, L]
            x = scores.softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, L, D))


class Block(nn.Module):
    """Pre-norm transformer block; drop_path skips a branch at random, per image, in training."""

    def __init__(self, dim, num_heads, drop_path=0.0):
        super().__init__()
        if dim % num_heads or dim % 4:
            raise UserError(f"width {dim} must be divisible by its {num_heads} heads and by 4")
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), gelu=nn.GELU(),
                                             fc2=nn.Linear(4 * dim, dim)))
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """What the autoencoder's encoder and the classifier share: images to tokens, and the blocks."""

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads, drop_path, mean, std):
        super().__init__()
        if image_size < patch_size or image_size % patch_size:
            raise UserError(f"image size {image_size} is not divisible by patch size {patch_size}")
        self.image_size, self.patch_size, self.channels = image_size, patch_size, len(mean)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.patch_embed = nn.Sequential(OrderedDict(
            proj=nn.Conv2d(self.channels, embed_dim, kernel_size=patch_size, stride=patch_size)))
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.blocks = nn.Sequential(*[Block(embed_dim, num_heads, rate)
                                      for rate in torch.linspace(0, drop_path, depth).tolist()])
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, image_size // patch_size), False)

    def init_weights(self):
        """MAE's initialization: Xavier for matrices, zero biases, N(0, 0.02) for the tokens."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.data.flatten(1))
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name in ("cls_token", "mask_token"):
                nn.init.normal_(parameter, std=0.02)

    def normalize(self, images):
        """[0, 1] images -> zero mean and unit deviation over the data set, channel by channel."""
        size = (self.channels, self.image_size, self.image_size)
        if images.shape[1:] != size:
            raise UserError(f"the model takes images [B, {size}], not {list(images.shape)}")
        return (images - self.mean) / self.std

    def tokens(self, images):
        """[0, 1] images -> patch tokens with their position embedding [B, L, D]."""
        patches = self.patch_embed(self.normalize(images))  # [B, D, H/p, W/p]
        return patches.flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]

    def encode(self, tokens):
        """Put the class token first and apply the blocks: [B, 1 + number of tokens, D]."""
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        return self.blocks(torch.cat([cls, tokens], dim=1))


class Autoencoder(ViT):
    """ViT encoder and decoder in MAE's layout, pretrained by NIM (denoise) or MIM (fill in).

    task: "nim" or "mim", what it is pretrained for; NIM does not use the mask token, which stays fixed.
    norm_pix: each target patch, of the mean/std-normalized image, is shifted and scaled by its own
    mean and standard deviation; an image is got back with those of a reference image.
    """

    def __init__(self, image_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4,
                 decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4, norm_pix=False,
                 task="nim", mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__(image_size, patch_size, embed_dim, depth, num_heads, 0.0, mean, std)
        self.norm_pix = norm_pix
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim), requires_grad=task == "mim")
        self.decoder_blocks = nn.Sequential(*[Block(decoder_embed_dim, decoder_num_heads)
                                              for _ in range(decoder_depth)])
        self.decoder_pos_embed = nn.Parameter(
            sincos_pos_embed(decoder_embed_dim, image_size // patch_size), False)
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * self.channels)
        self.init_weights()

    def decode(self, latent):
        """Latent [B, 1 + L, decoder D], patches in order -> prediction [B, L, p·p·C]."""
        x = self.decoder_blocks(latent + self.decoder_pos_embed)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]  # the class token is dropped

    def denoise(self, noisy):
        """NIM, every patch is encoded: prediction [B, L, p·p·C], in units of the target."""
        latent = self.norm(self.encode(self.tokens(noisy)))
        return self.decode(self.decoder_embed(latent))

    def target(self, images):
        """Normalized patches [B, L, p·p·C], and the mean and std that norm_pix takes out of each."""
        patches = patchify(self.normalize(images), self.patch_size)
        if not self.norm_pix:
            return patches, 0.0, 1.0
        mean = patches.mean(-1, keepdim=True)
        std = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        return (patches - mean) / std, mean, std

    def to_images(self, prediction, reference):
        """Prediction -> images, not clamped; norm_pix takes mean and std from the reference."""
        _, mean, std = self.target(reference)
        return unpatchify(prediction * std + mean, self.patch_size) * self.std + self.mean

    def forward(self, images, noisy=None, **masking):
        """The training loss, a scalar.

        With noisy images, NIM's: mean squared error over all patches between prediction and clean
        target. Without, MIM's; the keywords are those of `mim`. Both pass through `forward`, because
        DistributedDataParallel averages the gradients of what was computed there, and only there.
        """
        if noisy is None:
            loss, _, _ = self.mim(images, **masking)
            return loss
        target, _, _ = self.target(images)
        return (self.denoise(noisy) - target).square().mean()

    def reconstruct(self, noisy, reference):
        """Denoised images, not clamped; reference: what was handed to the defense, before noise."""
        return self.to_images(self.denoise(noisy), reference)

    def mim(self, images, mask_ratio, scores=None, all_patches=False):
        """MIM (MAE): drop a random part of the patches before the encoder, predict them.

        The int(L·(1 - mask_ratio)) patches of smallest score stay; scores [B, L] are uniform in
        [0, 1) unless given. The loss is over masked patches only, or over all (all_patches).
        Returns loss, prediction [B, L, p·p·C] and mask [B, L] (1 = dropped).
        """
        tokens = self.tokens(images)
        B, L, D = tokens.shape
        keep = int(L * (1 - mask_ratio)) if 0 <= mask_ratio < 1 else 0
        if keep == 0:
            raise UserError(f"mask ratio {mask_ratio} is not in [0, 1), or leaves no patch of {L}")
        if scores is None:
            scores = torch.rand(B, L, device=images.device)
        order = scores.argsort(1)  # the patches that stay come first
        place = order.argsort(1)  # the inverse: where each patch stands in that order
        visible = tokens.gather(1, order[:, :keep, None].expand(-1, -1, D))
        latent = self.decoder_embed(self.norm(self.encode(visible)))
        mask_tokens = self.mask_token.expand(B, L - keep, -1)
        patches = torch.cat([latent[:, 1:], mask_tokens], dim=1)
        patches = patches.gather(1, place[:, :, None].expand(-1, -1, patches.shape[2]))
        prediction = self.decode(torch.cat([latent[:, :1], patches], dim=1))
        mask = (place >= keep).to(prediction.dtype)
        target, _, _ = self.target(images)
        error = (prediction - target).square().mean(dim=-1)  # [B, L]
        weight = torch.ones_like(mask) if all_patches or keep == L else mask
        return (error * weight).sum() / weight.sum(), prediction, mask


class Classifier(ViT):
    """[0, 1] images to logits: the encoder without norm, mean over patch tokens, fc_norm, head."""
    no_weight_decay = ("cls_token", "pos_embed")

    def __init__(self, image_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4,
                 num_classes=10, drop_path=0.0, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__(image_size, patch_size, embed_dim, depth, num_heads, drop_path, mean, std)
        self.pos_embed.requires_grad_(True)
        self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        self.init_weights()
        nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def forward(self, images):
        patches = self.encode(self.tokens(images))[:, 1:]  # without the class token: [B, L, D]
        return self.head(self.fc_norm(patches.mean(dim=1)))


class LinearFilter(nn.Module):
    """The Wiener filter of a set of images: the linear map that denoises them best at one sigma.

    In the basis of the principal components v of the images, of variance λ, each component is scaled by
    λ / (λ + (sigma/255)²). Nothing is trained: studies.wiener computes it. components: how many are kept.
    """

    def __init__(self, image_size, mean, std, components, sigma, **others):
        super().__init__()
        values = len(mean) * image_size**2
        self.sigma = sigma
        self.register_buffer("center", torch.zeros(values))  # the mean image
        self.register_buffer("variances", torch.ones(components))  # λ
        self.register_buffer("directions", torch.zeros(values, components))  # v, one a column

    def reconstruct(self, noisy, reference):
        """Denoised images, not clamped; the reference is not used."""
        gains = self.variances / (self.variances + (self.sigma / 255) ** 2)
        coordinates = (noisy.flatten(1) - self.center) @ self.directions
        denoised = self.center + (gains * coordinates) @ self.directions.T
        return denoised.view_as(noisy)


class Blur(nn.Module):
    """A Gaussian blur of the given width, in pixels, in the denoiser's place: it knows nothing of images."""

    def __init__(self, width, **others):
        super().__init__()
        self.width = width

    def reconstruct(self, noisy, reference):
        """Blurred images; the reference is not used."""
        kernel_size = 2 * math.ceil(3 * self.width) + 1
        return gaussian_blur(noisy, kernel_size, self.width)


AUTOENCODERS = {  # pretrain.py --arch trains the first; studies.wiener makes the others
    "vit": Autoencoder,
    "wiener": LinearFilter,
    "blur": Blur,
}


def make_autoencoder(arch="vit", **config):
    """The autoencoder of pretrain.py's --arch. A denoiser of another kind is a class and an entry above.

    Its contract: it is made from the config of a checkpoint (image_size, mean, std, task, and what the
    entry of SIZES says; take **others for what it does not need). reconstruct(noisy, reference) gives
    denoised images [B, C, H, W], not clamped; reference is what was handed to the defense, before noise.
    forward(images, noisy) is the training loss, a scalar: only what is computed there has its gradients
    averaged over processes. A filter, which is not trained, has none. What is not trained has requires_grad
    False.
    """
    return AUTOENCODERS[arch](**config)


def resnet18_classifier(num_classes, mean, std, **vit_only):
    """torchvision's ResNet-18 with the normalization inside; what only a ViT has is left out."""
    network = resnet18(num_classes=num_classes)
    if len(mean) != 3:
        network.conv1 = nn.Conv2d(len(mean), 64, kernel_size=7, stride=2, padding=3, bias=False)
    return nn.Sequential(Normalize(mean, std), network)


CLASSIFIERS = {  # finetune.py --arch: from the config in a checkpoint to a model from images to logits
    "vit": Classifier,
    "resnet18": resnet18_classifier,
}


def make_classifier(arch="vit", **config):
    """The classifier of finetune.py's --arch; config: Classifier's arguments, of which others take some."""
    return CLASSIFIERS[arch](**config)


# ------------------------------------------------------------------------------------ the defenses

def check_images(images):
    """UserError unless images are a float tensor [B, C, H, W] within [0, 1] (1e-6 tolerated).

    Not checked in torch.compile and torch.export, whose graphs cannot depend on the values of pixels.
    """
    if torch.compiler.is_compiling():
        return
    if not torch.is_tensor(images) or not images.is_floating_point() or images.dim() != 4:
        raise UserError("images must be a floating-point tensor [B, C, H, W] in [0, 1]")
    if not images.numel():
        raise UserError("there are no images")
    low, high = images.detach().aminmax()
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # NaN fails this too
        raise UserError(f"images must lie in [0, 1], without NaN (found {low:g} to {high:g})")


def clamp_straight_through(x):
    """clamp(x, 0, 1) with the gradient of the identity, not 0 where it cuts (Athalye et al. 2018)."""
    zero = x - x.detach()  # its value is 0, its gradient that of x
    return x.clamp(0, 1).detach() + zero  # the value comes from the one, the gradient from the other


class Defense(nn.Module):
    """What stands in front of a classifier: [0, 1] images -> purify -> classifier -> logits.

    A new defense is a subclass with `purify` and `level`, and an entry of DEFENSES, whose name is then a
    --mode of finetune.py. The undefended model is the classifier itself. The models are used as they are:
    put them into evaluation mode, and freeze them, where they are not being trained.

    autoencoder: the pretrained one, or None. classifier: any nn.Module from [0, 1] images to logits.
    votes: the logits are the log of the mean probability over this many draws (1: plain logits).
    straight_through: gradients pass the clamp as if it were the identity.
    """
    title = "defense"  # what tables call it
    task = None  # what its autoencoder must be pretrained for, "nim" or "mim"; None: it needs none
    levels = ()  # what it is tested at unless told otherwise; (): the data set's sigmas
    trained_at = None  # the level to fine-tune at; None: the first of levels, or the data set's sigma
    is_random = False  # True where two calls can differ; attack.needs_eot finds that out by itself, too
    level = ""  # its setting in words, as "σ = 50"

    def __init__(self, autoencoder, classifier, votes=1, straight_through=True):
        super().__init__()
        if votes < 1:
            raise UserError(f"votes must be at least 1, not {votes}")
        self.autoencoder, self.classifier = autoencoder, classifier
        self.votes, self.straight_through = votes, straight_through

    def purify(self, images):
        """The images that the classifier sees, [B, C, H, W] in [0, 1]."""
        raise NotImplementedError

    def steps(self, images):
        """All that is made of the images on the way to the classifier, by name, for pictures."""
        return {"purified": self.purify(images)}

    def clamp(self, images):
        """Clamp to [0, 1], with the gradient of the identity if straight_through."""
        if self.straight_through:
            return clamp_straight_through(images)
        return images.clamp(0, 1)

    def forward(self, images):
        check_images(images)
        if self.votes == 1:
            return self.classifier(self.purify(images))
        draws = [self.classifier(self.purify(images)).log_softmax(1) for _ in range(self.votes)]
        return torch.stack(draws).logsumexp(0) - math.log(self.votes)


class De3(Defense):
    """De³: x -> x + ε·σ/255 -> autoencoder -> clamp to [0, 1] -> classifier -> logits.

    sigma: a number, or a NoiseScale or its text (one draw for each image at every call).
    noise: the ε to use, [C, H, W] for all images, instead of fresh ones; sigma must be fixed.
    """
    title, task = "De³", "nim"

    def __init__(self, autoencoder, classifier, sigma, noise=None, **settings):
        super().__init__(autoencoder, classifier, **settings)
        self.sigma, self.noise = NoiseScale.parse(sigma), noise
        if noise is not None and self.sigma.fixed is None:
            raise UserError("a given noise needs a fixed sigma")
        warn_of_small_sigma(self.sigma)

    @property
    def is_random(self):
        return self.sigma.fixed != 0 and self.noise is None

    @property
    def level(self):
        return f"σ = {self.sigma}"

    def add_noise(self, images):
        """x + ε·σ/255, not clamped; at σ = 0 nothing is drawn."""
        if self.sigma.fixed == 0:
            return images
        sigma = self.sigma.draw(images.shape[0], images.device)
        return add_noise(images, sigma, self.noise)

    def steps(self, images):
        noisy = self.add_noise(images)
        denoised = self.autoencoder.reconstruct(noisy, images)
        return {"noisy": noisy, "denoised": self.clamp(denoised)}

    def purify(self, images):
        return self.steps(images)["denoised"]


class NoiseOnly(De3):
    """The ablation: noise and clamp as in De³, without denoising. It ignores the autoencoder."""
    title, task = "noise only", None

    def __init__(self, autoencoder, classifier, sigma, noise=None, **settings):
        super().__init__(None, classifier, sigma, noise, **settings)

    def steps(self, images):
        return {"noisy": self.purify(images)}

    def purify(self, images):
        return self.clamp(self.add_noise(images))


class MaskAndFill(Defense):
    """MIM's version of De³: mask patches at random instead of noise, let the autoencoder fill them in.

    mask_ratio: a number in [0, 1), or "uniform:LOW,HIGH" (one draw at every call). The classifier gets
    the decoder's whole output, as in the authors' code, whose loss never trained the visible patches.
    """
    title, task, levels, trained_at = "MIM", "mim", (0.25, 0.5, 0.75), "uniform:0,0.75"
    is_random = True

    def __init__(self, autoencoder, classifier, mask_ratio, **settings):
        super().__init__(autoencoder, classifier, **settings)
        try:
            self.mask_ratio = NoiseScale.parse(mask_ratio)
        except UserError:
            self.mask_ratio = None
        if self.mask_ratio is None or self.mask_ratio.law != "uniform" or self.mask_ratio.parameters[1] >= 1:
            raise UserError(f"mask_ratio must be in [0, 1), or uniform:LOW,HIGH in it, not {mask_ratio}")

    @property
    def level(self):
        return f"mask {self.mask_ratio}"

    def draw_ratio(self):
        """The mask ratio of this call: all images lose equally many patches."""
        low, high = self.mask_ratio.parameters
        if low == high:
            return low
        return low + (high - low) * torch.rand(()).item()

    def combine(self, filled_in, images, mask):
        """What the classifier sees, before the clamp; mask [B, C, H, W], 1 = dropped."""
        return filled_in

    def steps(self, images):
        _, prediction, mask = self.autoencoder.mim(images, self.draw_ratio())
        mask = unpatchify(mask[:, :, None].expand_as(prediction), self.autoencoder.patch_size)
        filled_in = self.autoencoder.to_images(prediction, images)
        seen = self.combine(filled_in, images, mask)
        return {"masked": (1 - mask) * images + mask * 0.5, "filled in": self.clamp(seen)}

    def purify(self, images):
        return self.steps(images)["filled in"]


class MaskAndPaste(MaskAndFill):
    """MaskAndFill with the unmasked patches of the input pasted back."""
    title = "MIM, visible kept"

    def combine(self, filled_in, images, mask):
        return mask * filled_in + (1 - mask) * images


DEFENSES = {  # name: class, made as Class(autoencoder, classifier, level)
    "de3": De3,
    "no-denoise": NoiseOnly,
    "mim": MaskAndFill,
    "mim-visible": MaskAndPaste,
}
