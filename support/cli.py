"""Command line and processes: what an argument may be, the flags of every stage, device, torchrun."""

import argparse
import contextlib
import ctypes
import functools
import math
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from model import SIZES, Autoencoder, NoiseScale, UserError

# What changes where or how fast a run works, but not the weights that it ends with.
NOT_SETTINGS = ("device", "runs", "data", "workers", "resume", "overwrite", "max_batch", "compile",
                "dry_run")
MAX_BATCH = {"large": 128, "huge": 64}  # the default of --max-batch; 256 for the other sizes


# ----------------------------------------------------------------------------- types of arguments

def argument_type(convert):
    """`convert` as an argparse type: its UserError becomes the parser's one-sentence message."""
    def converted(text):
        try:
            return convert(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return converted


def number(kind, low=0, high=10**9):
    """An argparse type: an int or float (`kind`) from low to high."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise UserError(f"{text!r} is not {kind.__name__} from {low:g} to {high:g}")
        return value
    return argument_type(convert)


def eps(text):
    """An argparse type: '8/255' or '0.03', an attack radius in [0, 1] units."""
    top, _, bottom = text.partition("/")
    return number(float)(top) / number(float, 1)(bottom or 1)


def linf_eps(text):
    """An argparse type: as `eps`, at most the range of the pixels."""
    value = eps(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is more than the range of the pixels, 1: write 8/255")
    return value


def sigma_level(text):
    """An argparse type: a sigma to test at, in 8-bit units, or 'off', which is returned as None."""
    return None if text == "off" else number(float)(text)


def run_path(text):
    """An argparse type: a run's folder (its checkpoint.pt will do), or a file of published weights."""
    path = Path(text)
    return path.parent if path.name == "checkpoint.pt" else path


count = number(int, 1)  # of images, epochs, steps, draws ...
ratio = number(float, 0, 0.99)
noise_scale = argument_type(NoiseScale.parse)


# ---------------------------------------------------------------------------------- the arguments

def stage_parser(docstring):
    """A parser with the flags that every stage has; the docstring becomes its help."""
    parser = argparse.ArgumentParser(description=docstring,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="digits", help="digits (default), cifar10, or FOLDER with train/ and val/")
    add("--size", choices=SIZES, help="default: tiny (digits), small (images of up to 64 "
        "pixels), base")
    add("--seed", type=number(int), default=0, help="default 0; also names the runs looked for")
    add("--device", default="auto", help="auto (default: cuda if there is one), cpu, cuda, ...")
    add("--runs", default="runs", help="everything is written to RUNS/<data>/ (default runs)")
    add("--workers", type=number(int), default=2, help="image loading processes, default 2")
    add("--max-batch", type=count, help="images that a device sees at once: memory; training "
        "accumulates gradients, EOT draws run together up to this; default 256 (large 128, huge 64)")
    add("--bf16", action=argparse.BooleanOptionalAction, default=None,
        help="bfloat16 autocast; default: in training where it is faster (not tiny models on a CPU)")
    add("--compile", action="store_true", help="torch.compile the models; the first steps take longer")
    return parser


def refuse_unused(args, parser, names, why):
    """UserError for those of these arguments that were given, where nothing uses them."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} changes nothing {why}: leave it out")


def training_flags(parser, recipes):
    """The flags of both training stages; `recipes` gives, for each size, what is not given."""
    def defaults(name):
        return "default " + ", ".join(f"{recipe[name]:g} ({size})" for size, recipe in recipes.items())
    add = parser.add_argument
    add("--epochs", type=count, help=defaults("epochs"))
    add("--batch-size", type=count, help="images of one optimizer step; " + defaults("batch_size"))
    add("--base-lr", type=number(float, 1e-12, 1e30),
        help="lr = this x batch/256; " + defaults("base_lr"))
    add("--warmup-epochs", type=number(float),
        help="default: a share of the epochs; " + defaults("warmup_share"))
    add("--init", metavar="FILE", help="start from published weights: MAE's, NIM-AdvDef's, timm's "
        "ViT (average pooling), or a checkpoint.pt")
    add("--dry-run", action="store_true", help="print what the flags come to, and stop")
    add("--resume", action="store_true", help="go on where an interrupted run last saved")
    add("--overwrite", action="store_true", help="train anew over an earlier run of this name")


def apply_recipe(args, recipe):
    """Give args what the recipe says, except where the command line said otherwise.

    What has no flag is set as well, so that an edited recipe shows in a run's settings.
    """
    for name, value in recipe.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs * args.warmup_share
    if args.warmup_epochs >= args.epochs:
        raise UserError(f"{args.epochs} epochs are not more than {args.warmup_epochs:g} of warm-up: "
                        "give fewer --warmup-epochs, or leave them out")


def training_settings(args, ignored=(), **more):
    """What decides the weights, as text; a run with other settings is another run.

    That is every argument but NOT_SETTINGS and those ignored, and what `more` says: of the data
    (data.identity), and in how many micro-batches noise is drawn.
    """
    settings = {name: value for name, value in vars(args).items()
                if name not in NOT_SETTINGS and name not in ignored}
    return {name: str(value) for name, value in {**settings, **more}.items()}


# ------------------------------------------------------------------------ devices and processes

def open_device(name):
    """The device of --device; under torchrun, joins the other processes first. Only rank 0 prints."""
    under_torchrun = "LOCAL_RANK" in os.environ
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if under_torchrun and name == "cuda":
        name += ":" + os.environ["LOCAL_RANK"]
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()  # "meta", for one, cannot
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:90]
        raise UserError(f"device {name!r} cannot be used: {reason}") from None
    device = probe.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 stays
    else:
        keep_freed_memory()
    if under_torchrun and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def keep_freed_memory():
    """Let the C library keep freed memory for the next tensors; outside of Linux nothing happens.

    Otherwise glibc returns a step's large tensors to the system, which zeroes their pages anew in
    the next step.
    """
    if sys.platform != "linux":
        return
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, gibibyte = -1, -3, 2**30  # of malloc.h
        c_library.mallopt(M_MMAP_THRESHOLD, gibibyte)
        c_library.mallopt(M_TRIM_THRESHOLD, gibibyte)


def rank():
    """The number of this process, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count():
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def rank_0_first():
    """What stands inside is done by the process of rank 0, then by the others: a download, say."""
    if dist.is_initialized() and rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank() == 0:
        dist.barrier()


def sum_over_processes(*values):
    """The sum of each value over all processes, as a list of floats."""
    sums = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


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


@functools.cache
def bf16_is_faster():
    """Whether this CPU multiplies matrices faster in bfloat16 than in float32; timed on small ones."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(512, 512, dtype=dtype)
        matrix @ matrix  # the first call prepares
        started = time.perf_counter()
        for _ in range(5):
            matrix @ matrix
        seconds.append(time.perf_counter() - started)
    return seconds[1] < 0.8 * seconds[0]


def training_precision(bf16, device, size):
    """Whether to train in bfloat16: as --bf16 says (None: not given), else where it is faster.

    The tiny models of the digits stay in float32 on a CPU, so that figures repeat on every machine.
    """
    if bf16 is None:
        return device.type == "cuda" or (size != "tiny" and bf16_is_faster())
    return bf16


@functools.cache
def note_slow_bf16():
    """Say, once in a run, that bfloat16 is slower than float32 on this processor, where it is."""
    if not bf16_is_faster():
        print("--bf16: bfloat16 is slower than float32 on this processor")


def autocast(bf16, device):
    """bfloat16 autocast, if bf16 is true; says so where that is slower."""
    if bf16 and device.type == "cpu":
        note_slow_bf16()
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(bf16))


# -------------------------------------------------------------------------- what the user sees

def minutes(seconds):
    """Seconds as minutes:seconds."""
    seconds = round(seconds)
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


class Progress:
    """One line on a terminal, rewritten as work goes on; nothing into a pipe or a file."""

    def __init__(self, every=0.5):
        self.every, self.shown_at, self.width, self.started = every, 0.0, 0, time.time()

    def show(self, text, done=None):
        """Replace the line, unless it was replaced less than `every` seconds ago.

        done: the part of the work that is done, from which the time left follows.
        """
        if not sys.stdout.isatty() or time.time() - self.shown_at < self.every:
            return
        if done:
            seconds = time.time() - self.started
            text += f", {minutes(seconds / done - seconds)} left"
        text = text[:shutil.get_terminal_size().columns - 1]  # a longer one could not be rewritten
        print("\r" + text.ljust(self.width), end="", flush=True)
        self.shown_at, self.width = time.time(), len(text)

    def clear(self):
        """Remove the line, before a lasting one is printed; what follows is timed anew."""
        if self.width:
            print("\r" + " " * self.width + "\r", end="", flush=True)
        self.shown_at, self.width, self.started = 0.0, 0, time.time()


def command_again(*more):
    """The command that was given, with these flags and without --overwrite, quoted for a shell."""
    words = [word for word in sys.argv if word not in ("--overwrite", *more)]
    return shlex.join(["python", *words, *more])


class Interruption:
    """Ctrl-C. Raised inside a destructor the exception is lost, so loops ask once more (`check`)."""
    requested = False

    @classmethod
    def request(cls, signal_number, frame):
        cls.requested = True
        raise KeyboardInterrupt

    @classmethod
    def check(cls):
        if cls.requested:
            raise KeyboardInterrupt


def run_script(main, resumable=False):
    """Call main(); one sentence and exit code 2 for bad input, 130 for Ctrl-C.

    resumable: training, which goes on with --resume.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without σ shows a question mark
    Interruption.requested = False
    before = signal.signal(signal.SIGINT, Interruption.request)
    try:
        main()
    except UserError as error:  # from a loading process it comes with that process's traceback
        message = str(error).strip().splitlines()[-1].removeprefix("model.UserError: ")
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that cannot be written to ...
        print(f"error: {error}; what was saved before is kept", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        reason = resource_error(error)
        if not reason:
            raise
        print(f"error: {reason}; what was saved before is kept", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        advice = f"go on with: {command_again('--resume')}" if resumable else "what was written is kept"
        print(f"interrupted; {advice}", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, before)
        if dist.is_initialized():
            dist.destroy_process_group()


def resource_error(error):
    """What to do about an error of the machine rather than of the code, or None for any other."""
    if (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or "can't allocate memory" in str(error)):
        return "out of memory: give a lower --max-batch, or a smaller --size"
    if "DataLoader worker" in str(error):  # PyTorch notices it at any time, in a signal handler
        return "a process that loads images was killed, perhaps out of memory: give fewer --workers"
    return None
