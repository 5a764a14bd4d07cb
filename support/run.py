"""A run is a folder: checkpoint.pt knows all that a later stage needs, log.csv is written from it.

A checkpoint holds tensors and plain values only:

    kind         "autoencoder" or "classifier"; config: what builds it; model: its weights
    autoencoder  of a defense: the checkpoint of the autoencoder in front; defense, level: its name, and
                 what it was trained at
    resume       what --resume goes on with: model and optimizer, unless a stage wants it otherwise
    epoch        of epochs; with the seed it is the random state as well (training.seed_epoch)
    settings     what decides the weights; data: what it was trained on and is tested at; classes; log
    made_by      command, torch, commit and digests of the code, an entry for each time the code changed
    started_from kind, made_by and seed of the run whose weights it started from; None: random ones

A folder holds one run. It is begun once: whoever creates checkpoint.pt owns the folder.
"""

import ast
import contextlib
import csv
import functools
import hashlib
import inspect
import os
import shlex
import subprocess
import sys
import time
import types
import uuid
import zipfile
from pathlib import Path

import torch

from model import (AUTOENCODERS, CLASSIFIERS, DEFENSES, NOISE_LAWS, Defense, NoiseScale, UserError,
                   make_autoencoder, make_classifier)
from support import cli, data

REPOSITORY = Path(__file__).resolve().parents[1]
# what decides no weights
NOT_SETTINGS = ("device", "workers", "out", "resume", "overwrite", "autoencoder", "command")
OF_TRAINING = ("training", "require_backward_grad_sync")  # attributes of a model that are no settings
MAKERS = {"autoencoder": make_autoencoder, "classifier": make_classifier}
STAGES = {"autoencoder": "pretrain.py", "classifier": "finetune.py"}
MADE_BY_DEFAULT = {"runs/digits/nim": "pretrain.py", "runs/digits/mim": "pretrain.py --task mim",
                   "runs/digits/de3": "finetune.py", "runs/digits/clean": "finetune.py --mode clean"}
FOLDERS = ("support", "studies", "tests")
TOP_LEVEL = ("model.py", "pretrain.py", "finetune.py", "defend.py", "attack.py", "test_all.py")


# ------------------------------------------------------------------------------------ the code

@functools.cache
def commit():
    """The commit of this checkout, with "+" for uncommitted changes; "" where git does not track it."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=REPOSITORY, text=True, capture_output=True,
                              check=True).stdout.strip()
    try:
        git("ls-files", "--error-unmatch", "support/run.py")  # not a copy inside another repository
        return git("describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return ""


def digest_of_code(text):
    """Twelve hex digits of a Python file's parsed code: comments and docstrings change nothing.

    Another version of Python may parse it into something else.
    """
    tree = ast.parse(text)
    for node in ast.walk(tree):
        may_have_one = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if may_have_one and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]


_imported = {}  # {file: (the import it was read at, its digest)}
_reloaded = set()  # names of modules that importlib.reload has made anew


def note_imported_code():
    """Digest each file of the project that has just been imported, or imported anew (importlib.reload).

    A file that is edited later keeps the digest of the code that runs, and the commit is that of now. Called
    when this module is imported and when a stage begins, before anything slow. UserError where another module
    still holds what a reloaded one has replaced.
    """
    commit()
    modules = {}
    for module in list(sys.modules.values()):
        file = Path(getattr(module, "__file__", None) or "")
        if not file.is_relative_to(REPOSITORY) or "site-packages" in file.parts or not file.is_file():
            continue  # another project's
        name = file.relative_to(REPOSITORY).as_posix()
        modules[name] = module
        known_import, _ = _imported.get(name, (None, ""))
        is_script = module.__spec__ is None  # python attack.py: it cannot be reloaded
        is_new = name not in _imported
        if is_new or not (is_script or known_import is module.__spec__):  # a reload makes a new one
            _imported[name] = module.__spec__, digest_of_code(file.read_text(encoding="utf-8"))
            if known_import:
                _reloaded.add(module.__name__)
    outdated = sorted(name for name, module in modules.items() if _reloaded and holds_outdated(module))
    if outdated:
        raise UserError(f"{', '.join(outdated)} still hold what {', '.join(sorted(_reloaded))} held before it "
                        "was reloaded: restart the kernel, or reload these, too")


def holds_outdated(module):
    """Whether a module has imported a class or function that a reload of its own module has replaced since."""
    for value in list(vars(module).values()):
        if not isinstance(value, (type, types.FunctionType)) or value.__module__ not in _reloaded:
            continue
        home = sys.modules[value.__module__]
        if getattr(home, value.__name__, value) is not value:
            return True
    return False


def digest_of_file(name):
    """The digest of a project's file as it was imported, or as it is on disk, or "" for one that is gone."""
    if name in _imported:
        return _imported[name][1]
    path = REPOSITORY / name
    return digest_of_code(path.read_text(encoding="utf-8")) if path.exists() else ""


def digest_of_files(names):
    """One digest of the code of several files."""
    digests = [(name, digest_of_file(name)) for name in sorted(names)]
    return hashlib.sha256(repr(digests).encode()).hexdigest()[:12]


def files_of_yours():
    """The imported files in this folder, and in packages of yours, that are none of the project's."""
    note_imported_code()  # a model may import one when it is first called
    return {name for name in _imported if name not in TOP_LEVEL and name.split("/")[0] not in FOLDERS}


def digest_of_code_of(files, model, *functions):
    """One digest of these files, of yours, and of what defines a model's classes, the functions, the noise laws.

    What is defined in a notebook's cell counts by its own source, what is defined in a file outside the project
    by the whole file.
    """
    definitions = {kind for part in model.modules() for kind in type(part).__mro__}
    definitions |= {law.draw for law in NOISE_LAWS.values()}
    own, sources = set(), []
    for function in functions:
        if isinstance(function, functools.partial):
            sources.append(repr((function.args, function.keywords)))
            function = function.func
        definitions.add(function)
    for definition in definitions:
        module = getattr(definition, "__module__", None) or ""
        path = Path(getattr(sys.modules.get(module), "__file__", None) or "")
        if path.is_relative_to(REPOSITORY) and "site-packages" not in path.parts:
            own.add(path.relative_to(REPOSITORY).as_posix())
        elif not is_installed(module, path):
            sources.append(source_of(definition, path))
    digest = digest_of_files({*files, *own, *files_of_yours()})
    if sources:
        digest = hashlib.sha256(repr([digest, sorted(sources)]).encode()).hexdigest()[:12]
    return digest


def is_installed(module, path):
    """Whether a module, of this file, is Python's own or an installed package."""
    return module.split(".")[0] in sys.stdlib_module_names or "site-packages" in path.parts


def source_of(definition, path):
    """The digest of the file that defines a class or function, or the text of a notebook's cell.

    Where there is neither, one that never comes again.
    """
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        return inspect.getsource(definition)
    except (OSError, TypeError):
        return uuid.uuid4().hex


def origin(command, files):
    """What a result comes from: the command, torch, the commit, digests of these files and of yours."""
    return dict(command=command, torch=str(torch.__version__), commit=commit(),
                code={name: digest_of_file(name) for name in (*files, *sorted(files_of_yours()))})


def say_made_by_other_code(checkpoints):
    """One line for all runs, {folder: checkpoint}, whose code or autoencoder's code has changed since."""
    changed = {}
    for folder, checkpoint in checkpoints.items():
        for part in (checkpoint, checkpoint.get("autoencoder")):
            for made in part["made_by"] if part else ():
                files = {name for name, digest in made["code"].items() if digest != digest_of_file(name)}
                if files:
                    changed.setdefault(str(folder), set()).update(files)
    if changed:
        told = "; ".join(f"{folder} ({', '.join(sorted(files))})" for folder, files in changed.items())
        print(f"note: made by other code than that of today: {told}")


def is_plain(value):
    """Whether a value is a setting: a number, text or a NoiseScale, or a list of such."""
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    return isinstance(value, (bool, int, float, str, NoiseScale))


def fingerprint(model):
    """Twelve hex digits of a model: the weights, buffers and plain attributes of all its parts."""
    sha = hashlib.sha256()
    for part in model.modules():
        settings = {name: value for name, value in vars(part).items()
                    if is_plain(value) and name not in OF_TRAINING}
        sha.update(repr([type(part).__name__, sorted(settings.items())]).encode())
    for value in [*model.parameters(), *model.buffers()]:
        sha.update(value.detach().float().cpu().numpy().tobytes())
    return sha.hexdigest()[:12]


note_imported_code()


# ---------------------------------------------------------------------------- reading a run back

def read(folder, kind=None):
    """The checkpoint in a run's folder; UserError where there is none, or one of another kind.

    The folder of a De³ gives the checkpoint of its autoencoder as well. Only tensors and plain values are
    loaded, so that a file cannot run code, and checksums are tested.
    """
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        stage = MADE_BY_DEFAULT.get(Path(folder).as_posix(), STAGES.get(kind, "finetune.py"))
        inside = sorted(str(found.parent) for found in Path(folder).glob("*/checkpoint.pt"))
        advice = f"; runs in it: {', '.join(inside)}" if inside else ""
        raise UserError(f"{folder} holds no run (there is no {path}): make one with python {stage}, or name "
                        f"another run's folder{advice}")
    try:
        if zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile("a checksum differs")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint["kind"]
    except Exception as error:  # torch.load of a damaged or foreign file raises many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged, or no checkpoint of this project ({reason[:160]}); published "
                        "weights become a run by python -m studies.convert") from None
    entries = {*DEFENSES, *AUTOENCODERS, *CLASSIFIERS}
    for name in (checkpoint.get("defense"), checkpoint.get("config", {}).get("arch")):
        if name and name not in entries:
            raise UserError(f"{path} needs {name!r}, which is no entry of DEFENSES, AUTOENCODERS or CLASSIFIERS "
                            "in model.py: was it made on another branch?")
    if kind == "autoencoder" and found == "classifier" and checkpoint["autoencoder"]:
        return checkpoint["autoencoder"]
    if kind not in (None, found):
        raise UserError(f"{path} holds {found} weights where {kind} weights are needed")
    return checkpoint


def build(checkpoint, device="cpu"):
    """The model of a checkpoint, in evaluation mode, without gradients: its own config makes it."""
    model = MAKERS[checkpoint["kind"]](**checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval().requires_grad_(False)


def build_whole(checkpoint, device="cpu"):
    """What a checkpoint was saved of: an autoencoder, or a classifier behind its defense, if it has one."""
    model = build(checkpoint, device)
    if not checkpoint.get("defense"):
        return model
    held = checkpoint["autoencoder"]
    autoencoder = build(held, device) if held else None
    return DEFENSES[checkpoint["defense"]](autoencoder, model, checkpoint["level"]).eval()


def load(folder, kind=None, device="cpu"):
    """A finished run's folder: (model, checkpoint); UserError for an unfinished one.

    kind: "autoencoder" (of a De³'s folder, too) or "classifier"; None: whatever it is.
    """
    checkpoint = read(folder, kind)
    if checkpoint["epoch"] < checkpoint["epochs"]:
        raise UserError(f"{folder} is unfinished (epoch {checkpoint['epoch']} of {checkpoint['epochs']}): "
                        f"finish it with python {STAGES[checkpoint['kind']]} --out "
                        f"{shlex.quote(str(folder))} --resume")
    checkpoint.pop("resume", None)  # large, and for --resume alone
    return build(checkpoint, device), checkpoint


# ------------------------------------------------------------------------------ a run in training

def find(args, kind):
    """The checkpoint in --out that --resume goes on with, and whose settings args get; None for a new run.

    Raises UserError for a run in --out without --resume or --overwrite, and for a flag that says otherwise
    than the run; only the folder of the data may have moved.
    """
    note_imported_code()
    path = args.out / "checkpoint.pt"
    exists = path.exists()
    is_empty = exists and path.stat().st_size == 0  # a run that ended before its first save
    if cli.sum_over_processes(exists) not in ([0], [cli.world_size()]):
        raise UserError(f"not all processes see the same {args.out}: choose a folder that all of them share")
    if not exists or args.overwrite or (args.resume and is_empty):
        return None
    if not args.resume:
        raise UserError(f"{args.out} holds a run: go on with it by --resume, train anew over it with "
                        "--overwrite, or name another folder with --out")
    saved = read(args.out, kind)
    if "resume" not in saved:
        raise UserError(f"{args.out} lacks what --resume needs, as bundled and converted runs do: start from "
                        "its weights with --init, in another --out")
    for name, value in saved["settings"].items():
        given = getattr(args, name, None)
        if given is None:
            setattr(args, name, value)
        elif plain(given) != value and name != "data":
            raise UserError(f"--{name.replace('_', '-')} is {given} here, and {value} in the run that "
                            f"--resume goes on with, {args.out}: leave the flag out")
    print(f"{args.out}: going on after epoch {saved['epoch']} of {saved['epochs']}")
    return saved


def begin(args, kind, files, config, dataset, train, started_from=None, **more):
    """The checkpoint of a new run, of no epoch yet, in a folder that is now its own.

    files: the code that decides the weights. dataset: a data.DataSet; train: its images. started_from: the
    checkpoint of the run whose weights it starts from; None: random ones. more: what the later stages need
    besides. UserError if another process has just begun a run there.
    """
    if cli.rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / "checkpoint.pt"
        is_empty = path.exists() and path.stat().st_size == 0  # a run that ended before its first save
        if path.exists() and (args.overwrite or (args.resume and is_empty)):  # the first save replaces it
            (args.out / "pretrain.png").unlink(missing_ok=True)
        else:
            try:
                open(path, "xb").close()  # atomic: of two processes one succeeds
            except FileExistsError:
                raise UserError(f"another process has begun a run in {args.out}: name another folder with "
                                "--out") from None
    settings = {name: plain(value) for name, value in vars(args).items() if name not in NOT_SETTINGS}
    images = train.tensors[0] if data.in_memory(train) else None
    about = facts(args.data, dataset, images, len(train))
    if started_from and "digests" in started_from["data"]:  # its images have shaped these weights, too
        own = about.get("digests", torch.empty(0, dtype=torch.long))
        about["digests"] = torch.cat([own, started_from["data"]["digests"]]).unique()
    start = None
    if started_from:
        start = dict(kind=started_from["kind"], made_by=started_from["made_by"],
                     settings=dict(seed=started_from["settings"].get("seed")))
    return dict(kind=kind, config=config, settings=settings, data=about, classes=train.classes, epoch=0,
                epochs=args.epochs, log=[], made_by=[dict(origin(args.command, files), from_epoch=1)],
                started_from=start, threads=torch.get_num_threads(), world_size=cli.world_size(), **more)


def facts(name, dataset, images=None, total=0):
    """What a checkpoint says of the data it was trained on; dataset: a data.DataSet.

    images: the training images, if they are in memory; total: how many, if they are not. Digests of each let
    a test on them be noticed.
    """
    about = dict(name=name, images=total if images is None else len(images), eps=dataset.eps,
                 test_sigmas=list(dataset.test_sigmas), attack_eps=list(dataset.attack_eps))
    if images is not None:
        about["digests"] = data.digest_of_each(images)
    return about


def write_new(folder, checkpoint):
    """Write a finished run, that no stage has trained, into a folder that holds none; it is read back."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / "checkpoint.pt", "xb") as file:
            torch.save(checkpoint, file)
    except FileExistsError:
        raise UserError(f"{folder} holds a run: name another folder with --out") from None
    load(folder, checkpoint["kind"])


def plain(value):
    """A setting as a checkpoint holds it."""
    return str(value) if isinstance(value, Path) else value


def check_groups(saved, now, folder):
    """UserError unless an optimizer's groups are those of the run in this folder, whose settings would win."""
    same = len(saved) == len(now)
    for before, after in zip(saved, now):
        settings = before.keys() & after.keys() - {"lr"}  # the lr is set at each step
        same = same and all(before[name] == after[name] for name in settings)
    if not same:
        raise UserError(f"the optimizer's parameter groups are others than when {folder} was begun: change them "
                        "back, or train anew with --overwrite")


def restore(checkpoint, args, files, train, **parts):
    """Give the parts (model, optimizer ...) what the run left; what is different now is noted, and said."""
    for name, part in parts.items():
        state = checkpoint["resume"][name]
        if isinstance(part, torch.optim.Optimizer):
            check_groups(state["param_groups"], part.state_dict()["param_groups"], args.out)
        part.load_state_dict(state)
    for name, value in checkpoint["settings"].items():
        if name != "data" and plain(getattr(args, name)) != value:  # a stage has settled it anew
            raise UserError(f"{name} was {value} when {args.out} was begun, and is {getattr(args, name)} by the "
                            "code of now: change it back, or train anew with --overwrite")
    then, classes = checkpoint["data"]["images"], checkpoint["classes"]
    if (then, classes) != (len(train), train.classes):
        differ = ", ".join(sorted(set(classes) ^ set(train.classes))[:5])
        raise UserError(f"{args.out} was begun on {then} images of {len(classes)} classes, and {args.data} "
                        f"holds {len(train)} of {len(train.classes)} now (classes in only one of them: "
                        f"{differ or 'none'}): restore them, or train anew with --overwrite")
    is_unfinished = checkpoint["epoch"] < checkpoint["epochs"]
    if is_unfinished and data.in_memory(train) and "digests" in checkpoint["data"]:
        before, now = checkpoint["data"]["digests"], data.digest_of_each(train.tensors[0])
        new = int((~torch.isin(now, before)).sum())
        if new:
            print(f"note: {new} of the training images are others than when {args.out} was begun; both count as "
                  "what it was trained on")
            checkpoint["data"]["digests"] = torch.cat([before, now]).unique()
    if checkpoint["world_size"] != cli.world_size():
        print(f"note: {args.out} was trained by {checkpoint['world_size']} process(es) and goes on with "
              f"{cli.world_size()}: other noise than in an uninterrupted run")
    allowed, on_cpu = torch.get_num_threads(), next(parts["model"].parameters()).device.type == "cpu"
    if on_cpu and checkpoint["threads"] > allowed:
        print(f"note: {args.out} was trained with {checkpoint['threads']} CPU threads, here there are "
              f"{allowed}, which rounds differently")
    torch.set_num_threads(min(checkpoint["threads"], allowed))
    write_log(args.out, checkpoint)  # a kill between the two files leaves its last row out
    checkpoint["settings"]["data"] = checkpoint["data"]["name"] = args.data  # may have moved
    now = origin(args.command, files)
    if is_unfinished and now["code"] != checkpoint["made_by"][-1]["code"]:
        checkpoint["made_by"].append(dict(now, from_epoch=checkpoint["epoch"] + 1))
        say_made_by_other_code({args.out: checkpoint})


def save(folder, checkpoint, whole, probe, **parts):
    """Write checkpoint.pt and log.csv, in the process of rank 0; a kill leaves the old checkpoint whole.

    whole: what is tested later, an autoencoder, a classifier, or a defense: its parts are saved as they are
    now, and `check` compares them with what the file makes, on the images of probe [B, C, S, S]. It is in
    evaluation mode afterwards. parts: what --resume goes on with, model=... and optimizer=..., as `restore`
    takes them: everything that changes from step to step, an average or a second optimizer, too.
    """
    if cli.rank() > 0:
        return
    model = whole.classifier if isinstance(whole, Defense) else whole
    checkpoint["model"] = model.state_dict()
    if checkpoint.get("autoencoder"):
        checkpoint["autoencoder"]["model"] = whole.autoencoder.state_dict()
    checkpoint["resume"] = {name: part.state_dict() for name, part in parts.items()}
    path, temporary = folder / "checkpoint.pt", folder / f"checkpoint.pt.{os.getpid()}.tmp"
    try:
        with told_if_not_saved(path):
            torch.save(checkpoint, temporary)
        check(temporary, whole, probe)
        with told_if_not_saved(path):
            patiently(lambda: os.replace(temporary, path))
    finally:
        temporary.unlink(missing_ok=True)  # after a failure or Ctrl-C half a file
    write_log(folder, checkpoint)


@contextlib.contextmanager
def told_if_not_saved(path):
    """Inside, an error of the file system is a UserError; so is torch.save's RuntimeError, for a full disk."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not save {path} ({str(error).splitlines()[0]}); what was saved before is "
                        "kept: make room, or close the program that has it open, and go on with "
                        "--resume") from None


def write_log(folder, checkpoint):
    """Write log.csv from the checkpoint, in the process of rank 0."""
    if cli.rank() > 0:
        return
    if not checkpoint["log"]:  # a new run: what another one left is not its
        (folder / "log.csv").unlink(missing_ok=True)
        return
    with patiently(lambda: open(folder / "log.csv", "w", newline="", encoding="utf-8")) as file:
        table = csv.DictWriter(file, list(checkpoint["log"][0]))
        table.writeheader()
        table.writerows(checkpoint["log"])


def check(file, whole, probe):
    """UserError unless what this checkpoint makes gives the same answers as what is in memory.

    They differ where something that is trained is not saved, is saved as it was once read, or is replaced by
    an average: whoever loads it would then test another model than the one that was trained.
    """
    answers = []
    for model in (whole, build_whole(torch.load(file, map_location="cpu", weights_only=True), probe.device)):
        model.eval()
        with torch.no_grad(), cli.repeated_draws(seed=0):
            if hasattr(model, "reconstruct"):  # an autoencoder
                answers.append(model.reconstruct(probe, probe))
            else:  # a classifier that knows nothing yet answers alike behind any defense
                purified = model.purify(probe) if isinstance(model, Defense) else probe
                answers.append(torch.cat([model(probe).flatten(), purified.flatten()]))
    if not answers[0].isfinite().all():
        raise UserError("the model's answers are no numbers any more; what was saved before is kept: train anew "
                        "with a lower --base-lr")
    if not torch.allclose(*answers, rtol=1e-3, atol=1e-4):
        raise UserError("what is saved is not the model that was trained: it answers differently by up to "
                        f"{(answers[0] - answers[1]).abs().max():.3g}; what was saved before is kept. Give "
                        "run.save every part that is trained, as it is to be tested")


def patiently(action):
    """action(), tried again for some seconds: on Windows a virus scanner or a spreadsheet may hold a file."""
    for seconds in (0.1, 0.5, 1, 2, 4):
        try:
            return action()
        except PermissionError:
            time.sleep(seconds)
    return action()
