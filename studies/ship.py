"""Half-precision copies of runs, to be bundled with the repository under assets/<data>/.

    python -m studies.ship runs/cifar10-jpeg/clean runs/cifar10-jpeg/de3 --out assets/cifar10

A copy lacks what --resume needs, so it cannot be trained further; a De³'s autoencoder goes with it. It
carries no digests of the code that made it: it is part of this repository, whose commit says that.
Whether half precision keeps the accuracy: attack.py on the runs and on the copies.
"""

import argparse
import re
import shlex
from pathlib import Path

from support import cli, data, run


def without_folders(command):
    """A command with the last name of each absolute path only: where it was run is private."""
    return shlex.join(re.sub("(^|=)/.*/", r"\1", word) for word in shlex.split(command))


def in_public(made_by):
    """What made a run, without the folders of this machine and the digests of its code."""
    return [{**made, "command": without_folders(made["command"]), "code": {}} for made in made_by]


def halve(checkpoint, dataset):
    """A finished run's checkpoint with weights in float16, without what only --resume needs.

    dataset: what it says of its data, a name instead of a folder.
    """
    halved = {name: value for name, value in checkpoint.items() if name != "resume"}
    halved["model"] = {name: value.half() if value.is_floating_point() else value
                       for name, value in checkpoint["model"].items()}
    halved["data"] = {**checkpoint["data"], "name": dataset}
    halved["settings"] = {**checkpoint["settings"], "data": dataset}
    if halved["settings"].get("init"):
        halved["settings"]["init"] = Path(halved["settings"]["init"]).name
    halved["made_by"] = in_public(checkpoint["made_by"])
    if checkpoint.get("started_from"):
        start = checkpoint["started_from"]
        halved["started_from"] = {**start, "made_by": in_public(start["made_by"])}
    if checkpoint.get("autoencoder"):
        halved["autoencoder"] = halve(checkpoint["autoencoder"], dataset)
    return halved


def arguments(argv=None):
    parser = argparse.ArgumentParser(prog="python -m studies.ship", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=cli.folder, metavar="RUN")
    parser.add_argument("--out", type=cli.folder, required=True, help="a folder, as assets/cifar10")
    return cli.parse(parser, argv, machine=False)


def main(argv=None):
    args = arguments(argv)
    for folder in args.runs:
        _, checkpoint = run.load(folder)  # finished, and it fits
        dataset = checkpoint["data"]["name"]
        if dataset not in data.DATASETS:
            dataset = args.out.name  # where the folder of images lay is private
        copy = args.out / folder.resolve().name
        run.write_new(copy, halve(checkpoint, dataset))
        path = copy / "checkpoint.pt"
        print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run_script(main)
