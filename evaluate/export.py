"""The representations of a folder of images, with or without labels, as a file of numpy

    python -m evaluate features --checkpoint runs/vicreg-shapes --data FOLDER --out x.npy

x.npy holds a row of float32 for each image, the backbone's `pooled`; x.txt their names in the same
order. They are the images of FOLDER/train, if there is one, else all below FOLDER (say FOLDER/val
for others). As for knn, the central square, 7/8 of the short side, is resized to --size. An image
that cannot be read has no row.
"""
from pathlib import Path

import numpy as np

import common
import training
from evaluate.features import all_features

NAME = "features"


def add_flags(flag):
    flag("--out", type=Path, required=True, help="the file, which ends in .npy")


def prepare(args):
    if args.out.suffix != ".npy":
        raise common.UserError(f"--out {args.out} must end in .npy")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise common.UserError(f"cannot write {args.out} ({error})") from error
    return common.open_data(args.data, "train", args.size)


def run(backbone, data, args):
    """Writes both files; no rows for a table."""
    y, _, index = all_features(backbone, data, args)
    if training.rank_and_world()[0] == 0:
        names = [training.printable(data.name(i)) + "\n" for i in index.tolist()]
        training.write(args.out, lambda file: np.save(file, y.cpu().numpy()))
        beside = args.out.with_suffix(".txt")
        training.write(beside, lambda file: file.write("".join(names).encode()))
        training.say(f"{args.out}: {len(y)} rows of {y.shape[1]} numbers; {beside}: the names")
    return {}
