"""AutoAttack (Croce and Hein 2020), by its authors' code, on the defenses of attack.py.

    pip install pyautoattack
    python -m studies.autoattack runs/digits/clean runs/digits/de3 --sigma 0 --images 100
    python -m studies.autoattack runs/digits/de3 --sigma 50 --images 50

Version "standard" for what is deterministic, "rand" (APGD with EOT 20) for what is random. Two figures:
AutoAttack's own count, in which an image of a random defense is lost with the first wrong draw, and
robust accuracy on fresh draws of the images that it hands back. Beside them stands our PGD on the same
images. pyautoattack packages the authors' code, with 100 steps for each attack.
"""

import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from attack import accuracy, is_random, pgd
from model import UserError
from support import cli, data, report, run, training, weights

DRAWS = 10  # fresh draws that score a random defense
CODE = ("model.py", "attack.py", "studies/autoattack.py")  # what decides the numbers


class InPrecision(nn.Module):
    """A model under autocast, whose logits are float32."""

    def __init__(self, model, bf16, device):
        super().__init__()
        self.model, self.bf16, self.device = model, bf16, device

    def forward(self, images):
        with cli.autocast(self.bf16, self.device):
            logits = self.model(images)
        return logits.float()


def arguments():
    parser = cli.stage_parser(__doc__)
    weights.evaluation_flags(parser, images=100)
    add = parser.add_argument
    add("--eps", type=cli.linf_eps, help="radius in L∞, in [0, 1] units; default 16/255 (color 4/255)")
    add("--version", choices=["standard", "rand"], help="default: rand for what is random")
    add("--steps", type=cli.count, default=20, help="of our PGD, default 20")
    add("--eot", type=cli.count, default=8, help="draws in each gradient of our PGD, default 8")
    return cli.parse(parser)


def main():
    args = arguments()
    device = cli.open_device(args.device)
    cli.one_process("AutoAttack")
    try:
        from pyautoattack import AutoAttack
        from pyautoattack.state import EvaluationState
    except ImportError:
        raise UserError("this study needs its authors' code: pip install pyautoattack") from None
    tested = weights.load_defenses(args, device)
    batches, images_in_all = weights.load_test_images(args, tested, device)
    images, labels = (torch.cat(values) for values in zip(*batches))
    table = report.open_table(args.out / "autoattack.csv")
    for one in tested:
        eps = one.checkpoint["data"]["eps"] if args.eps is None else args.eps
        model = InPrecision(one.model, args.bf16, device).eval()
        random = is_random(model, images[:8])
        version = args.version or ("rand" if random else "standard")
        draws = DRAWS if random else 1
        training.seed_epoch(args.seed, 0)
        ours = pgd(model, images, labels, eps, args.steps, eot=args.eot if random else 1,
                   early_stop=not random)
        of_pgd = 100 * accuracy(model, ours, labels, draws).mean().item()
        started = time.perf_counter()
        attack = AutoAttack(model, eps=eps, version=version, seed=args.seed, device=device)
        with tempfile.TemporaryDirectory() as folder:
            state_path = Path(folder, "state")
            adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=args.max_batch,
                                                            state_path=state_path)
            not_broken = EvaluationState.from_disk(state_path).robust_flags
        seconds = time.perf_counter() - started
        fresh = 100 * accuracy(model, adversarial, labels, draws).mean().item()
        counted = 100 * not_broken.float().mean().item()
        report.append_row(table, dict(
            defense=one.words, run=one.run, level=one.level, version=version, eps=f"{eps:.6g}",
            data=args.data, split=args.split, images=images_in_all, pixels=data.digest(images, labels),
            seed=args.seed, draws=draws, autoattack_on_fresh_draws=f"{fresh:.2f}",
            autoattack_own_count=f"{counted:.2f}", pgd=f"{of_pgd:.2f}", steps=args.steps, eot=args.eot,
            seconds=f"{seconds:.1f}", **run.origin_of_row(one.model, CODE)))
        print(f"{one.words}: {images_in_all} {args.split} images, {255 * eps:.4g}/255: AutoAttack {version} "
              f"leaves {fresh:.1f}% on fresh draws, {counted:.1f}% by its own count; PGD-{args.steps} "
              f"{of_pgd:.1f}%; {cli.minutes(seconds)} minutes", flush=True)
    print(f"wrote {table}")


if __name__ == "__main__":
    cli.run_script(main)
