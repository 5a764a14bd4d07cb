"""How fast are the stages, and PGD beside a plain implementation of the same defense?

    python -m studies.speed                         the small models
    python -m studies.speed --size base --batch 2   ViT-B at 224

Random images and weights; without norm_pix, augmentation and loading. The plain De³ stands below:
explicit softmax attention, one draw at a time, fp32; first its gradients are compared with ours. What
a block of the table shows is timed in turns, so that no drift of the machine's speed gets into a ratio;
the fastest call counts. On a GPU fp32 products are TF32, the plain ones too.
"""

import argparse
import functools
import resource
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from attack import input_gradient, pgd
from model import (IMAGENET_MEAN, IMAGENET_STD, SIZES, Autoencoder, Classifier, De3, NoiseScale,
                   UserError, add_noise)
from support import cli, training

SIGMA, EPS, STEPS, EOTS = 50, 8 / 255, 2, (1, 8)  # of the defense and of PGD
TOLERANCE = 1e-4  # between gradients, relative to the largest value
MATRIX_SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}  # of products; the fastest is the limit


# -------------------------------------------------------------------- the plain implementation

def linear(x, state, name):
    return F.linear(x, state[name + ".weight"], state[name + ".bias"])


def layer_norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], eps=1e-6)


def plain_blocks(x, state, name, depth, heads):
    """Transformer blocks with explicit softmax attention: [B, L, D] -> [B, L, D]."""
    for block in [f"{name}.{number}" for number in range(depth)]:
        qkv = linear(layer_norm(x, state, block + ".norm1"), state, block + ".attn.qkv")
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, L, D/heads]
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5  # [B, heads, L, L]
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, state, block + ".attn.proj")
        hidden = linear(layer_norm(x, state, block + ".norm2"), state, block + ".mlp.fc1")
        x = x + linear(F.gelu(hidden), state, block + ".mlp.fc2")
    return x


def plain_encode(images, state, size):
    """[0, 1] images to what leaves the encoder's blocks, class token first: [B, 1 + L, D]."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).to(images).view(2, 3, 1, 1)
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    patches = F.conv2d((images - mean) / std, weight, bias, stride=size["patch_size"])
    cls = state["cls_token"].expand(len(images), -1, -1)
    x = torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1) + state["pos_embed"]
    return plain_blocks(x, state, "blocks", size["depth"], size["num_heads"])


def plain_de3(images, noise, autoencoder, classifier, size):
    """Logits [B, classes] of De³ at SIGMA; the two models are state dicts, size is one of SIZES."""
    x = plain_encode(images + noise * SIGMA / 255, autoencoder, size)
    x = linear(layer_norm(x, autoencoder, "norm"), autoencoder, "decoder_embed")
    x = plain_blocks(x + autoencoder["decoder_pos_embed"], autoencoder, "decoder_blocks",
                     size["decoder_depth"], size["decoder_num_heads"])
    patches = linear(layer_norm(x, autoencoder, "decoder_norm"), autoencoder, "decoder_pred")[:, 1:]
    p, side = size["patch_size"], size["image_size"] // size["patch_size"]
    grid = patches.reshape(-1, side, side, p, p, 3).permute(0, 5, 1, 3, 2, 4)
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).to(images).view(2, 3, 1, 1)
    denoised = grid.reshape(images.shape) * std + mean
    clamped = denoised + (denoised.clamp(0, 1) - denoised).detach()  # the gradient of the identity
    pooled = plain_encode(clamped, classifier, size)[:, 1:].mean(dim=1)
    return linear(layer_norm(pooled, classifier, "fc_norm"), classifier, "head")


def plain_gradient(plain, images, labels, noise):
    """Gradient of the cross-entropy with respect to the images; plain: of images and noise."""
    x = images.detach().requires_grad_()
    loss = F.cross_entropy(plain(x, noise), labels, reduction="sum")
    return torch.autograd.grad(loss, x)[0]


def plain_pgd(plain, images, labels, eot):
    """PGD in L∞ from a random start, one draw after another: adversarial images."""
    x = (images + torch.empty_like(images).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        gradient = sum(plain_gradient(plain, x, labels, torch.randn_like(x)) for _ in range(eot))
        x = x + 2.5 * EPS / STEPS * gradient.sign()
        x = (images + (x - images).clamp(-EPS, EPS)).clamp(0, 1)
    return x


def gradient_difference(plain, autoencoder, classifier, images, labels):
    """Largest difference between the gradients of plain and ours, relative; UserError if too large."""
    noise, precision = torch.randn_like(images[0]), torch.get_float32_matmul_precision()
    ours = De3(autoencoder, classifier, SIGMA, noise=noise)
    torch.set_float32_matmul_precision("highest")  # TF32 rounds to 1e-3
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = plain_gradient(plain, images, labels, noise)
        actual, _ = input_gradient(ours, images, labels, "ce", eot=2)
    torch.set_float32_matmul_precision(precision)
    difference = ((actual - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise UserError(f"the gradients of plain and ours differ by {difference:.1e} of their largest "
                        f"value, over {TOLERANCE:g}: mend model.py or studies/speed.py first")
    return difference


# ---------------------------------------------------------------------- what is timed, and how

def compile_models(device, *models):
    """torch.compile, in place: an autoencoder's denoise and mim, any other model's forward.

    None among the models is skipped. Raises UserError where nothing can be compiled.
    """
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as error:  # no compiler, no Triton ...
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--compile cannot work here ({reason}): leave it out") from None
    for model in models:
        if isinstance(model, Autoencoder):
            model.denoise, model.mim = torch.compile(model.denoise), torch.compile(model.mim)
        elif model is not None:
            model.compile()


def workloads(autoencoder, classifier, plain, images, labels):
    """Yields (name, items of each image, ours, plain or None); what was trained is then frozen."""
    de3, finetuned = [De3(autoencoder, classifier, sigma) for sigma in (SIGMA, "uniform:0,30")]

    def pretrain():
        sigma = NoiseScale.parse("gamma:25,3").draw(len(images), images.device)
        autoencoder(images, add_noise(images, sigma)).backward()
        training.update(optimizer, lr=1e-6)

    def finetune():
        with torch.no_grad():
            purified = finetuned.purify(images)
        F.cross_entropy(classifier(purified), labels).backward()
        training.update(optimizer, lr=1e-6)

    optimizer = torch.optim.AdamW(training.parameter_groups(autoencoder, 0.05), fused=True)
    yield "pretraining, images", 1, pretrain, None
    autoencoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(training.parameter_groups(classifier, 0.05), fused=True)
    yield "fine-tuning, images", 1, finetune, None
    classifier.requires_grad_(False)
    optimizer = None  # frees its memory
    yield "De³, images", 1, lambda: torch.no_grad()(de3)(images), None

    def attacked(x):
        return de3(x.view_as(x))  # torch's counter of operations fails on a leaf of the graph

    for eot in EOTS:
        yield (f"PGD, EOT {eot}, gradients", STEPS * eot,
               lambda: pgd(attacked, images, labels, EPS, STEPS, eot=eot),
               lambda: plain_pgd(plain, images, labels, eot))


def measure(calls, seconds, device):
    """{name: (seconds of the fastest call, peak bytes)}: all in turns, twice at least."""
    times, peaks, end = {name: [] for name in calls}, {}, time.time() + seconds * len(calls)
    while time.time() < end or any(len(of_one) < 2 for of_one in times.values()):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - started)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated(device)
            else:  # macOS counts bytes, Linux KiB
                unit = 1 if sys.platform == "darwin" else 1024
                peaks[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {name: (min(times[name]), peaks[name]) for name in calls}


def matrix_rate(dtype, seconds, device):
    """Operations a second of the fastest matrix product among several sizes, each in its fastest call."""
    matrices = {side: torch.rand(side, side, device=device).to(dtype) for side in MATRIX_SIDES[device.type]}
    calls = {side: functools.partial(torch.matmul, matrix, matrix) for side, matrix in matrices.items()}
    return max(2 * side**3 / fastest for side, (fastest, _) in measure(calls, seconds, device).items())


def arguments(argv=None):
    parser = argparse.ArgumentParser(prog="python -m studies.speed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="default small")
    add("--batch", type=cli.count, default=16, help="images at once, default 16")
    add("--seconds", type=float, default=10, help="of each line at least, default 10")
    add("--seed", type=int, default=0, help="default 0")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default auto")
    add("--bf16", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    add("--compile", action="store_true", help="torch.compile our models, not the plain one")
    return cli.parse(parser, argv, machine=False)


def main(argv=None):
    args = arguments(argv)
    device = cli.open_device(args.device)
    bf16 = device.type == "cuda" if args.bf16 is None else args.bf16
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16} if bf16 else {"fp32": torch.float32}

    torch.manual_seed(args.seed)
    size = SIZES[args.size]
    encoder = {name: value for name, value in size.items() if not name.startswith("decoder")}
    autoencoder, classifier = Autoencoder(**size).to(device), Classifier(**encoder).to(device)
    for parameter in [*autoencoder.parameters(), *classifier.parameters()]:
        parameter.data += 0.02 * torch.randn_like(parameter)  # biases of 0 could hide a mistake
    images = torch.rand(args.batch, 3, size["image_size"], size["image_size"], device=device)
    labels = torch.randint(10, (args.batch,), device=device)
    plain = functools.partial(plain_de3, autoencoder=autoencoder.state_dict(),
                              classifier=classifier.state_dict(), size=size)
    difference = gradient_difference(plain, autoencoder, classifier, images[:2], labels[:2])
    print(f"{args.size}, {args.batch} image(s), {device.type}, {torch.get_num_threads()} thread(s), "
          f"torch {torch.__version__}\ngradients of plain and ours differ by {difference:.0e} of the "
          f"largest value, {TOLERANCE:g} is allowed", flush=True)
    if args.compile:
        compile_models(device, autoencoder, classifier)

    matrix_rates = {precision: matrix_rate(dtype, min(1, args.seconds), device)
                    for precision, dtype in precisions.items()}
    for precision, rate in matrix_rates.items():
        print(f"matrix product, {precision}: {rate / 1e12:.3f} TFLOP/s")
    print("On a CPU peak memory is that of the whole process so far: it can only grow.\n\n"
          f"{'':34} per second  x plain  % of matrix rate  peak GiB")
    for name, items, ours, plain_work in workloads(autoencoder, classifier, plain, images, labels):
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            ours()
        calls = {"plain fp32": plain_work} if plain_work else {}
        for precision in precisions:
            calls[f"ours {precision}"] = cli.autocast(precision == "bf16", device)(ours)
        measured = measure(calls, args.seconds, device)
        for who, (seconds, peak) in measured.items():
            rate = items * args.batch / seconds
            ratio = f"{measured['plain fp32'][0] / seconds:.2f}" if plain_work else ""
            share = 100 * counter.get_total_flops() / seconds / matrix_rates[who.split()[1]]
            shown = f"{share:.1f}" if share <= 100 else "-"  # a limit that is exceeded is none
            print(f"{name:22}  {who:10} {rate:10.4g} {ratio:>8} {shown:>17} "
                  f"{peak / 2**30:9.2f}", flush=True)


if __name__ == "__main__":
    cli.run_script(main)
