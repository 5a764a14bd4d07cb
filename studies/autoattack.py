"""AutoAttack (Croce and Hein 2020), by its authors' code, on the defenses of attack.py.

    pip install pyautoattack
    python -m studies.autoattack runs/digits/clean runs/digits/de3 --sigma 0 --images 100
    python -m studies.autoattack runs/digits/de3 --sigma 50 --images 50

Version "standard" for what is deterministic, "rand" (APGD with EOT 20) for what is random. Two figures:
AutoAttack's own count, in which an image of a random defense is lost with the first wrong draw, and
robust accuracy on fresh draws of the images that it hands back, in float32. Beside them stands our own
attack on the same images, as studies.compare makes it: strong_pgd where nothing is random, else PGD with
EOT. pyautoattack packages the authors' code, with 100 steps for each attack; one of its attacks (DLR)
needs four classes.
"""

import tempfile
import time
from pathlib import Path

from torch import nn

from attack import accuracy, in_batches, in_units, needs_eot, pgd, say_one_answer, strong_pgd
from model import UserError
from support import cli, data, report, run, tested

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


def arguments(argv=None):
    parser = cli.stage_parser("python -m studies.autoattack", __doc__)
    tested.evaluation_flags(parser, images=100)
    add = parser.add_argument_group("the attack").add_argument
    add("--eps", type=cli.eps, help="radius; in L∞ default 16/255 (color 4/255), in L2 without default")
    add("--norm", choices=["linf", "l2"], default="linf", help="default linf")
    add("--version", choices=["standard", "rand"], help="default: rand for what is random")
    add("--steps", type=cli.count, default=20, help="of our PGD, default 20")
    add("--eot", type=cli.count, default=8, help="draws in each gradient of our PGD, default 8")
    args = cli.parse(parser, argv)
    if args.norm == "l2" and args.eps is None:
        raise UserError("--norm l2 needs --eps, a length over all pixels: 0.5 or 1, say")
    return args


def auto_attack(model, images, labels, args, eps, version, device):
    """(the images that AutoAttack hands back; for each whether it stayed right, by its own count)."""
    from pyautoattack import AutoAttack
    from pyautoattack.state import EvaluationState
    norm = {"linf": "Linf", "l2": "L2"}[args.norm]
    attack = AutoAttack(model, norm=norm, eps=eps, version=version, seed=args.seed, device=device)
    with tempfile.TemporaryDirectory() as folder:
        state_path = Path(folder, "state")
        adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=args.max_batch,
                                                        state_path=state_path)
        return adversarial, EvaluationState.from_disk(state_path).robust_flags


def main(argv=None):
    args = arguments(argv)
    device = cli.open_device(args.device, alone=True)
    try:
        import pyautoattack  # noqa: F401
    except ImportError:
        raise UserError("this study needs its authors' code: pip install pyautoattack") from None
    entries = tested.load_entries(args, device)
    images, labels, classes = tested.load_test_images(args, entries, device)
    images = data.as_floats(images)
    if len(classes) < 4:
        raise UserError(f"AutoAttack's DLR loss needs four classes, and {args.data} has {len(classes)}: use "
                        "attack.py")
    table = args.out / "autoattack.csv"
    for entry in entries:
        eps = entry.checkpoint["data"]["eps"] if args.eps is None else args.eps
        random = needs_eot(entry.model, images[:8])
        say_one_answer(entry.name, entry.model, images, labels, classes, args.max_batch)
        version = args.version or ("rand" if random else "standard")
        draws = DRAWS if random else 1

        def score(adversarial):
            return 100 * in_batches(lambda x, y: accuracy(entry.model, x, y, draws), adversarial, labels,
                                    args.max_batch).mean().item()

        def our_attack(x, y):
            settings = dict(eps=eps, steps=args.steps, norm=args.norm)
            with cli.autocast(args.bf16, device):
                if random:
                    return pgd(entry.model, x, y, eot=args.eot, **settings)
                return strong_pgd(entry.model, x, y, **settings)
        cli.seed_everything(args.seed)
        of_pgd = score(in_batches(our_attack, images, labels, args.max_batch))
        started = time.perf_counter()
        model = InPrecision(entry.model, args.bf16, device).eval()
        adversarial, not_broken = auto_attack(model, images, labels, args, eps, version, device)
        seconds = time.perf_counter() - started
        fresh, counted = score(adversarial), 100 * not_broken.float().mean().item()
        print(f"{entry.name}: {len(images)} {args.split} images, {args.norm} {in_units(eps, args.norm)}: "
              f"AutoAttack {version} leaves {fresh:.1f}% on fresh draws, {counted:.1f}% by its own count; "
              f"our PGD-{args.steps} {of_pgd:.1f}%; {cli.minutes(seconds)} minutes", flush=True)
        report.append_row(table, dict(
            defense=entry.name, run=entry.folder, level=entry.level, version=version, norm=args.norm,
            eps=f"{eps:.6g}", data=args.data, split=args.split, images=len(images),
            pixels=data.digest(images, labels), attack_seed=args.seed, draws=draws,
            precision="bf16" if args.bf16 else "fp32",
            autoattack_on_fresh_draws=f"{fresh:.2f}",
            autoattack_own_count=f"{counted:.2f}", pgd=f"{of_pgd:.2f}", steps=args.steps, eot=args.eot,
            seconds=f"{seconds:.1f}", weights=run.fingerprint(entry.model),
            code=run.digest_of_code_of(CODE, entry.model), commit=run.commit()))
    print(f"wrote {table}")


if __name__ == "__main__":
    cli.run_script(main)
