"""Command line, device and processes: what an argument may be, the flags, how a script ends."""

import argparse
import contextlib
import io
import math
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from model import SIZES, NoiseScale, UserError

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


def say_small_sigma(scale):
    """A note where a NoiseScale seems to be meant as a share of the pixel range."""
    largest = scale.parameters[-1]
    if scale.law == "uniform" and 0 < largest < 1:
        print(f"note: sigma is in 8-bit units (0..255), and {largest:g} is {largest:g}/255, next to nothing; "
              f"where a share of the pixel range was meant, write {255 * largest:g}")


def noise_scale(text):
    """An argparse type: a NoiseScale; says so where it seems to be meant as a share of the range."""
    scale = argument_type(NoiseScale.parse)(text)
    say_small_sigma(scale)
    return scale


def sigma_level(text):
    """An argparse type: a sigma to test at, in 8-bit units, or 'off', which is returned as None."""
    return None if text == "off" else noise_scale(text)


def run_path(text):
    """An argparse type: a run's folder (its checkpoint.pt will do), or a file of published weights."""
    path = Path(text)
    return path.parent if path.name == "checkpoint.pt" else path


count = number(int, 1)  # of images, epochs, steps, draws ...
ratio = number(float, 0, 0.99)


# ---------------------------------------------------------------------------------- the arguments

def stage_parser(docstring):
    """A parser with the flags that every stage has; the docstring becomes its help."""
    parser = argparse.ArgumentParser(description=docstring, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="auto", help="auto (default: cuda if there is one), cpu, cuda, ...")
    add("--workers", type=number(int), default=2, help="image loading processes, default 2")
    add("--max-batch", type=count, help="images that a device sees at once: memory; training "
        "accumulates gradients; default 256 (large 128, huge 64)")
    add("--bf16", action=argparse.BooleanOptionalAction, default=None,
        help="bfloat16 autocast; default: in training on a GPU, nowhere else; a CPU gains by it only "
        "if it has bfloat16 instructions")
    return parser


def training_parser(docstring, recipes):
    """A parser with the flags of both training stages; `recipes` gives, by size, what is not given."""
    def defaults(name):
        return "default " + ", ".join(f"{recipe[name]:g} ({size})" for size, recipe in recipes.items())
    parser = stage_parser(docstring)
    add = parser.add_argument
    add("--out", type=run_path, metavar="RUN", help="the run's folder; all that is written goes there")
    add("--size", choices=SIZES, help="default: tiny (digits), small (images of up to 64 pixels), base")
    add("--seed", type=number(int), help="default 0")
    add("--epochs", type=count, help=defaults("epochs"))
    add("--batch-size", type=count, help="images of one optimizer step; " + defaults("batch_size"))
    add("--base-lr", type=number(float, 1e-12, 1e30),
        help="lr = this x batch/256; " + defaults("base_lr"))
    add("--warmup-epochs", type=number(float),
        help="default: a share of the epochs; " + defaults("warmup_share"))
    add("--init", metavar="FILE", help="start from published weights: MAE's, NIM-AdvDef's, timm's "
        "ViT (average pooling), or a run's checkpoint.pt")
    add("--dry-run", action="store_true", help="print what the flags come to, and stop")
    add("--resume", action="store_true", help="go on where the run in --out last saved; every setting "
        "comes from its checkpoint")
    add("--overwrite", action="store_true", help="train anew over the run in --out")
    return parser


def parse(parser):
    """The parsed command line; `given` holds the names of the flags that stand on it."""
    unset = object()
    everything = vars(parser.parse_args())
    probe = argparse.Namespace(**dict.fromkeys(everything, unset))
    with contextlib.redirect_stdout(io.StringIO()):  # what there is to say was said
        probed = vars(parser.parse_args(namespace=probe))
    given = {name for name, value in probed.items() if value is not unset}
    return argparse.Namespace(**everything, given=given)


def refuse_unused(args, names, why):
    """UserError for those of these flags that were given, where nothing uses them."""
    for name in names:
        if name in args.given:
            raise UserError(f"--{name.replace('_', '-')} changes nothing {why}: leave it out")


def apply_recipe(args, recipe, device):
    """Fill in what the command line leaves open: the recipe, warm-up, --max-batch, seed, precision.

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
    args.max_batch = args.max_batch or MAX_BATCH.get(args.size, 256)
    args.seed = args.seed or 0
    if args.bf16 is None:
        args.bf16 = device.type == "cuda"


# ------------------------------------------------------------------------ devices and processes

def open_device(name):
    """The device of --device; under torchrun, joins the other processes first. Only rank 0 prints."""
    under_torchrun = {"LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
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
    if under_torchrun and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def gather(items):
    """The items of all processes in one list."""
    if not dist.is_initialized():
        return items
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, items)
    return [item for of_one in of_all for item in of_one]


def choose_threads(work, device, wanted=None):
    """Let PyTorch use the number of CPU threads that pays for work() now: one, or all it may use.

    A tiny model gains little by a second thread, and is several times slower with it where another
    process keeps a core busy, because the threads wait for each other. wanted: the number of an earlier
    run, whose rounding is to be repeated. Returns the number.
    """
    allowed = torch.get_num_threads()
    if wanted is not None and wanted > allowed and device.type == "cpu":
        print(f"note: this run was trained with {wanted} CPU threads, here there are {allowed}, which rounds "
              f"differently (OMP_NUM_THREADS={wanted} repeats it exactly)")
    if device.type != "cpu" or allowed == 1:
        return allowed
    if wanted is None:
        work()  # the first call prepares
        seconds = {allowed: 0.0, 1: 0.0}
        for threads in [allowed, 1] * 4:  # in turns: what else runs on the machine may change
            torch.set_num_threads(threads)
            started = time.perf_counter()
            work()
            work()
            seconds[threads] += time.perf_counter() - started
            if seconds[allowed] > 2:  # not tiny
                break
        wanted = allowed if seconds[allowed] > 2 or 1.2 * seconds[allowed] < seconds[1] else 1
    torch.set_num_threads(min(wanted, allowed))
    return min(wanted, allowed)


def rank():
    """The number of this process, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def one_process(what):
    """UserError under torchrun, where `what` cannot use it."""
    if world_size() > 1:
        raise UserError(f"{what} runs in one process: leave out torchrun")


def sum_over_processes(*values):
    """The sum of each value over all processes, as a list of floats."""
    sums = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def autocast(bf16, device):
    """bfloat16 autocast, if bf16 is true."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(bf16))


# ----------------------------------------------------------------- what the user sees, and the end

def minutes(seconds):
    """Seconds as minutes:seconds."""
    seconds = round(seconds)
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


class Progress:
    """One line on a terminal, rewritten as work goes on; nothing into a pipe or a file."""

    def __init__(self, every=0.5):
        self.every, self.shown_at, self.width, self.started = every, 0.0, 0, time.perf_counter()

    def show(self, text, done=None):
        """Replace the line, unless it was replaced less than `every` seconds ago.

        done: the part of the work that is done, from which the time left follows.
        """
        if not sys.stdout.isatty() or time.perf_counter() - self.shown_at < self.every:
            return
        if done:
            seconds = time.perf_counter() - self.started
            text += f", {minutes(seconds / done - seconds)} left"
        text = text[:shutil.get_terminal_size().columns - 1]  # a longer one could not be rewritten
        print("\r" + text.ljust(self.width), end="", flush=True)
        self.shown_at, self.width = time.perf_counter(), len(text)

    def clear(self):
        """Remove the line, before a lasting one is printed; what follows is timed anew."""
        if self.width:
            print("\r" + " " * self.width + "\r", end="", flush=True)
        self.shown_at, self.width, self.started = 0.0, 0, time.perf_counter()


def command_line():
    """The command that was given, quoted for a shell."""
    return shlex.join(["python", *sys.argv])


def run_script(main, resumable=False):
    """Call main(); one sentence and exit code 2 for bad input, 130 for Ctrl-C.

    resumable: training, which goes on with --resume.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by >&-, or absent as under pythonw
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
    except BrokenPipeError:  # what read the output has ended: python attack.py | head
        sys.stdout = open(os.devnull, "w")
        sys.exit(1)
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
        advice = "go on with the same command and --resume" if resumable else "what was written is kept"
        if resumable and "--overwrite" in sys.argv:
            advice = ("go on with --resume in the place of --overwrite, or, where no epoch was saved yet, with "
                      "the same command")
        print(f"interrupted; {advice}", file=sys.stderr)
        sys.exit(130)
    finally:
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


def ignore_ctrl_c(worker_number):
    """In a loading process: Ctrl-C is for the main one, and a run that ends first is no error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *error: None
