"""AutoAttack (Croce and Hein 2020), by its authors' code, on the defenses of attack.py.

    pip install pyautoattack
    python -m studies.autoattack runs/digits/clean runs/digits/de3 --sigma 0 --images 100
    python -m studies.autoattack runs/digits/de3 --sigma 50 --images 50

Where nothing is random, its version "standard"; else the two attacks of its version "rand", APGD of 100
steps with EOT 20 by cross-entropy and by DLR, on every image, of which the stronger counts. (Run as it is,
"rand" leaves alone what one draw gets wrong, and hands back unattacked what another one gets right: fresh
draws would score images that nobody has attacked.) Everything is computed in float32: AutoAttack gives up an
image as soon as it is wrong, be it by rounding alone. Beside it stands our own attack on the same images, as
studies.compare makes it: strong_pgd where nothing is random, else PGD with EOT, scored on as many fresh
draws. pyautoattack packages the authors' code; DLR needs four classes.
"""

import time

from attack import accuracy, in_batches, in_units, needs_eot, pgd, say_one_answer, strong_pgd, strongest
from model import UserError
from support import cli, data, report, run, tested

NORMS = {"linf": "Linf", "l2": "L2"}  # as AutoAttack calls them
DRAWS = 10  # fresh draws that score a random defense
CODE = ("model.py", "attack.py", "studies/autoattack.py")  # what decides the numbers


def arguments(argv=None):
    parser = cli.stage_parser("python -m studies.autoattack", __doc__)
    tested.evaluation_flags(parser, images=100)
    add = parser.add_argument_group("the attack").add_argument
    add("--eps", type=cli.eps, help="radius; in L∞ default 16/255 (color 4/255), in L2 without default")
    add("--norm", choices=["linf", "l2"], default="linf", help="default linf")
    add("--steps", type=cli.count, default=20, help="of our PGD, default 20")
    add("--eot", type=cli.count, default=8, help="draws in each gradient of our PGD, default 8")
    args = cli.parse(parser, argv)
    cli.refuse(args, ["bf16"], "here, where everything is computed in float32")
    if args.norm == "l2" and args.eps is None:
        raise UserError("--norm l2 needs --eps, a length over all pixels: 0.5 or 1, say")
    return args


def attacked_by(attack, images, labels, batch_size):
    """The adversarial versions that an AutoAttack, "standard" or "rand", makes of these images [N, C, H, W]."""
    if attack.version == "standard":
        adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=batch_size)
        return adversarial

    def attack_all(x, y):
        candidates = []
        for loss in ("ce", "dlr"):
            attack.apgd.loss = loss
            candidates.append(attack.apgd.perturb(x, y, best_loss=True))
        return strongest(attack.model, candidates, y)
    return in_batches(attack_all, images, labels, batch_size)


def main(argv=None):
    args = arguments(argv)
    device = cli.open_device(args.device, alone=True)
    try:
        from pyautoattack import AutoAttack
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
        version = "rand" if random else "standard"
        draws = DRAWS if random else 1

        def score(adversarial):
            return 100 * in_batches(lambda x, y: accuracy(entry.model, x, y, draws), adversarial, labels,
                                    args.max_batch).mean().item()

        def our_attack(x, y):
            settings = dict(eps=eps, steps=args.steps, norm=args.norm)
            if random:
                return pgd(entry.model, x, y, eot=args.eot, **settings)
            return strong_pgd(entry.model, x, y, **settings)
        cli.seed_everything(args.seed)
        of_pgd = score(in_batches(our_attack, images, labels, args.max_batch))
        started = time.perf_counter()
        cli.seed_everything(args.seed)
        auto_attack = AutoAttack(entry.model, norm=NORMS[args.norm], eps=eps, version=version, seed=args.seed,
                                 device=device)
        left = score(attacked_by(auto_attack, images, labels, args.max_batch))
        seconds = time.perf_counter() - started
        print(f"{entry.name}: {len(images)} {args.split} images, {args.norm} {in_units(eps, args.norm)}: "
              f"AutoAttack {version} leaves {left:.1f}%, our PGD-{args.steps} {of_pgd:.1f}%; "
              f"{cli.minutes(seconds)} minutes", flush=True)
        report.append_row(table, dict(
            defense=entry.name, run=entry.folder, level=entry.level, version=version, norm=args.norm,
            eps=f"{eps:.6g}", data=args.data, split=args.split, images=len(images),
            pixels=data.digest(images, labels), attack_seed=args.seed, draws=draws, autoattack=f"{left:.2f}",
            pgd=f"{of_pgd:.2f}", steps=args.steps, eot=args.eot, seconds=f"{seconds:.1f}",
            weights=run.fingerprint(entry.model), code=run.digest_of_code_of(CODE, entry.model),
            commit=run.commit()))
    print(f"wrote {table}")


if __name__ == "__main__":
    cli.run_script(main)
