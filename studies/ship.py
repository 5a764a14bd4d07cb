"""Half-precision copies of trained weights, which come along with the repository under assets/<data>/.

    python -m studies.ship --classifier RUN RUN ... --out assets/cifar10

Each classifier is copied with the autoencoder in whose folder it lies, without the optimizer's state.
Rounding the autoencoder changes its fingerprint: the copies of the classifiers trained behind it carry
the new one. Whether half precision keeps the accuracy: attack.py on the runs and on the copies.
"""

import argparse
import shlex
from pathlib import Path

import torch

from support import checkpoints, cli, files


def without_folders(words):
    """A command with the last name of each folder only: where it was run is nobody's business."""
    return shlex.join(Path(word).name if word.startswith("/") else word for word in shlex.split(words))


def halve(checkpoint):
    """A finished run's checkpoint with weights in float16 and without what only --resume needs."""
    halved = {name: value for name, value in checkpoint.items() if name != "optimizer"}
    halved["model"] = {name: value.half() if value.is_floating_point() else value
                       for name, value in checkpoint["model"].items()}
    halved["settings"] = {**checkpoint["settings"], "data": Path(checkpoint["settings"]["data"]).name}
    halved["command"] = without_folders(checkpoint["command"])
    return halved


def write(path, checkpoint):
    """Save a checkpoint and say how large it is."""
    files.write_whole(path, lambda file: torch.save(checkpoint, file))
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", nargs="+", type=cli.run_path, metavar="RUN", required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder, assets/cifar10")
    args = parser.parse_args()
    fingerprints = {}  # of each autoencoder: as it was trained, and as the copy is
    for folder in args.classifier:
        source = folder.parent
        if source not in fingerprints:
            autoencoder, checkpoint = checkpoints.load_finished(source, "autoencoder")
            path = args.out / source.name / "checkpoint.pt"
            write(path, halve(checkpoint))
            copy, _ = checkpoints.load_finished(path.parent, "autoencoder")
            fingerprints[source] = checkpoints.fingerprint(autoencoder), checkpoints.fingerprint(copy)
        trained, copied = fingerprints[source]
        _, checkpoint = checkpoints.load_finished(folder, "classifier")
        halved = halve(checkpoint)
        if halved["settings"].get("autoencoder") == trained:
            halved["settings"]["autoencoder"] = copied
        write(args.out / source.name / folder.name / "checkpoint.pt", halved)


if __name__ == "__main__":
    cli.run_script(main)
