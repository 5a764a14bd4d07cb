"""Command line, device and processes: the flags that stages share, and how a script ends."""

import argparse
import contextlib
import os
import random
import shlex
import sys
import time
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from model import SIZES, Block, UserError

MAX_BATCH = {"large": 128, "huge": 64}  # the default of --max-batch; 256 for the other sizes
FOR_GPUS = ("base", "large", "huge")  # sizes that a CPU takes days for


# ---------------------------------------------------------------------------------- the arguments

def count(text):
    """An argparse type: a whole number from 1 on, of images, epochs, steps, draws ..."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return value


def positive(text):
    """An argparse type: a number above 0, of a learning rate, a sigma."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def eps(text):
    """An argparse type: '8/255' or '0.03', an attack radius or a step."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, as 8/255 or 0.03") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def folder(text):
    """An argparse type: a path, of which ~ is the home folder also behind an equals sign."""
    return Path(text).expanduser()


def stage_parser(prog, docstring, epilog=None):
    """A parser without flags yet; prog: how the stage is called, as "python attack.py"."""
    return argparse.ArgumentParser(prog=prog, description=docstring, epilog=epilog, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def machine_flags(parser):
    """The flags that every stage has."""
    add = parser.add_argument_group("the machine").add_argument
    add("--device", default="auto", help="cpu, cuda, ...; default: cuda if there is one")
    add("--workers", type=int, default=2, help="processes that load photographs above 64 pixels, default 2")
    add("--max-batch", type=count, help="the most images that the device sees at once, which decides its "
        "memory; training accumulates gradients over them; default 256 (large 128, huge 64)")
    add("--bf16", action=argparse.BooleanOptionalAction, help="compute in bfloat16 where it is safe; "
        "default: in training on a GPU only; a CPU gains by it if it has bfloat16 instructions")


def training_parser(prog, docstring, recipes):
    """A parser with the flags of both training stages; recipes: what they fill in, by size."""
    width = max(map(len, recipes))
    table = [f"  {name:{width}}  {recipe['epochs']:6}  {recipe['batch_size']:10}  {recipe['base_lr']:7g}"
             for name, recipe in recipes.items()]
    heading = f"defaults:\n  {'size':{width}}  epochs  batch size  base lr\n"
    parser = stage_parser(prog, docstring, epilog=heading + "\n".join(table))
    add = parser.add_argument_group("training").add_argument
    add("--out", type=folder, metavar="RUN", help="the run's folder; all that is written goes there")
    add("--size", choices=SIZES, help="of the model; default: tiny (digits), small (images of up to 64 "
        "pixels), base (larger ones)")
    add("--seed", type=int, help="of all random numbers, default 0")
    add("--epochs", type=count, help="times that every image is seen")
    add("--batch-size", type=count, help="images of one optimizer step, of all processes together")
    add("--base-lr", type=positive, help="the peak learning rate is this x batch/256")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on where the run in --out last saved, "
                          "with its settings; begin it where there is none")
    existing.add_argument("--overwrite", action="store_true", help="train anew over the run in --out")
    return parser


def parse(parser, argv=None, machine=True):
    """The command line, with the machine's flags besides; `command` is how it was called.

    argv: the arguments, those of sys.argv by default. machine: False for a script without those flags.
    """
    if machine:
        machine_flags(parser)
    words = sys.argv[1:] if argv is None else list(map(str, argv))
    return parser.parse_args(words, argparse.Namespace(command=f"{parser.prog} {shlex.join(words)}".strip()))


def refuse(args, names, why):
    """UserError for those of these flags that were given, where nothing uses them."""
    for name in names:
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} changes nothing {why}: leave it out")


def apply_recipe(args, recipes, special, device):
    """Fill in what the command line leaves open from the recipe of --size and of what is special.

    What has no flag is set as well, so that an edited recipe shows in a run's settings. That the recipe
    of the size alone is used, where other sizes have a special one, is said.
    """
    name = f"{args.size} {special}"
    if name not in recipes:
        if any(other.endswith(f" {special}") for other in recipes):
            print(f"note: there is no recipe for {name!r}: that of {args.size!r} is used")
        name = args.size
    if name not in recipes:
        raise UserError(f"there is no recipe for size {name!r}: add it to RECIPES, beside "
                        f"{', '.join(recipes)}")
    for setting, value in recipes[name].items():
        if getattr(args, setting, None) is None:
            setattr(args, setting, value)
    if args.size in FOR_GPUS and device.type == "cpu":
        print(f"note: on a CPU a model of size {args.size} takes seconds for every image in each of "
              f"{args.epochs} epochs; --size small trains on the same images at 32x32 pixels, in minutes",
              flush=True)
    args.max_batch = args.max_batch or MAX_BATCH.get(args.size, 256)
    args.seed = args.seed or 0
    if args.bf16 is None:
        args.bf16 = device.type == "cuda"


# ------------------------------------------------------------------------ devices and processes

def open_device(name, alone=False):
    """The device of --device; under torchrun, joins the other processes first. Only rank 0 prints.

    alone: for a script that several processes would not share; UserError where there are several.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    under_torchrun = dist.is_torchelastic_launched()
    if alone and under_torchrun and os.environ["WORLD_SIZE"] != "1":
        raise UserError("this script works in one process: start it with python, without torchrun")
    if under_torchrun and name == "cuda":
        name += ":" + os.environ["LOCAL_RANK"]
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if under_torchrun and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def choose_threads():
    """Let PyTorch use one CPU thread or all it may, whichever is faster now for a model like `tiny`.

    Two threads make so small a model up to 1.4 times as fast on an idle machine, and many times slower
    beside a busy process, for which they wait. OMP_NUM_THREADS, where it is set, decides without measuring.
    """
    allowed = torch.get_num_threads()
    if allowed == 1 or "OMP_NUM_THREADS" in os.environ:
        return
    block, tokens = Block(64, num_heads=4), torch.randn(64, 17, 64)
    seconds = {allowed: 0.0, 1: 0.0}
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end:
        for threads in seconds:  # in turns: what else runs on the machine may change
            torch.set_num_threads(threads)
            block(tokens).sum().backward()  # the first call after a change prepares
            started = time.perf_counter()
            block(tokens).sum().backward()
            seconds[threads] += time.perf_counter() - started
    several_pay = 1.2 * seconds[allowed] < seconds[1]
    torch.set_num_threads(allowed if several_pay else 1)


def rank():
    """The number of this process, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(*values):
    """The sum of each value over all processes, as a list of floats."""
    sums = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def of_rank_0(value):
    """What the process of rank 0 has of this value, for all processes."""
    held = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(held, device=torch.device("cpu"))
    return held[0]


def seed_everything(seed, same=False):
    """Seed PyTorch's, NumPy's and Python's random numbers.

    Each of several processes then draws its own; with same=True all draw the same.
    """
    if not same:
        seed += rank()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state(device):
    """The state of PyTorch's, NumPy's and Python's random numbers, which every draw changes."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    _, numbers, position, *_ = np.random.get_state()
    return [state.tolist() for state in (*states, numbers)], position, random.getstate()


@contextlib.contextmanager
def heard_warnings():
    """Inside, warnings are not shown: the list that this gives holds the text of each, once."""
    heard = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield heard
    heard += dict.fromkeys(str(warning.message) for warning in caught)


@contextlib.contextmanager
def repeated_draws(seed):
    """Inside, all random numbers follow from this seed; afterwards they go on as if nothing had been drawn."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        seed_everything(seed)
        yield
    np.random.set_state(numpy_state)
    random.setstate(python_state)


def autocast(bf16, device):
    """bfloat16 autocast, if bf16 is true."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(bf16))


# ----------------------------------------------------------------- what the user sees, and the end

def minutes(seconds):
    """Seconds as minutes:seconds."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole}:{rest:02}"


class Progress:
    """One line on a terminal, rewritten as work goes on; nothing into a pipe or a file."""

    def __init__(self):
        self.started, self.shown_at = time.perf_counter(), 0.0

    def show(self, text, done):
        """Replace the line, twice a second at most; done: the part of the work that is done, above 0."""
        now = time.perf_counter()
        if sys.stdout.isatty() and now - self.shown_at > 0.5:
            left = (now - self.started) * (1 / done - 1)
            print(f"\r{text}, {minutes(left)} left\033[K", end="", flush=True)  # \033[K clears the rest
            self.shown_at = now

    def clear(self):
        """Remove the line, before a lasting one is printed; what follows is timed anew."""
        if self.shown_at:
            print("\r\033[K", end="", flush=True)
        self.started, self.shown_at = time.perf_counter(), 0.0


def run_script(main, resumable=False):
    """Call main(); one sentence and exit code 2 for bad input and the system's errors, 130 for Ctrl-C.

    Any other error is a bug, or a machine's limit, and keeps its traceback. resumable: training, which
    goes on with --resume.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without σ shows a question mark
    warnings.showwarning = lambda message, *where, **more: print(f"warning: {message}", file=sys.stderr)
    try:
        main()
    except UserError as error:  # from a loading process it comes with that process's traceback
        message = str(error).strip().splitlines()[-1].removeprefix("model.UserError: ")
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that cannot be written to ...
        print(f"error: {error}; what was saved before is kept", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        advice = "go on with --resume in the same --out" if resumable else "what was written is kept"
        print(f"interrupted; {advice}", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
