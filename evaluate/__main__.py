"""The papers' evaluation protocols, for a checkpoint of any method; on one CPU or under torchrun.

    python -m evaluate knn --checkpoint runs/vicreg-shapes --baseline
    python -m evaluate features --checkpoint runs/vicreg-shapes --data FOLDER --out x.npy
    torchrun --nproc_per_node=8 -m evaluate linear --checkpoint runs/vicreg-imagenet
    python -m evaluate PROTOCOL --help      # what it computes, and where it differs from the paper

--checkpoint: a run folder, last.pt, backbone.pt, a state dict of torchvision or timm, a release of
VICReg, VICRegL, DINO or CrIBo, or `random`: the untrained network. The result is appended to
PROTOCOL.jsonl beside the checkpoint: a line of JSON with title, rows and settings.

--data: as in training. Masks (segment, retrieve, clusters), 8-bit PNGs of class ids, 255 is void,
come with shapes, voc, a folder of train/images, train/masks, val/images, val/masks, or ADE20K's.
"""
import argparse
import contextlib
import fcntl
import json
import math
import os
from pathlib import Path

import torch

import common
import evaluate.export as export
import training
from evaluate import bag, clusters, correspond, detect, fewshot, knn, linear, retrieve, segment
from evaluate.features import add_flags, load, say, untrained

PROTOCOLS = dict(features=export, knn=knn, linear=linear, fewshot=fewshot, bag=bag, detect=detect,
                 segment=segment, retrieve=retrieve, clusters=clusters, correspond=correspond)
LOWEST = dict(workers=0, lr=0, patch_scale=0.001, void=0, labels=0)  # of all other numbers: 1
HIGHEST = dict(workers=1024, size=4096, patch_scale=1, void=255)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise common.UserError(f"{message}; see --help")


def check(args, lowest, highest):
    """Raises UserError for a number among args that is out of these limits, or below 1."""
    for name, values in vars(args).items():
        low, high = lowest.get(name, 1), highest.get(name, math.inf)
        for value in values if isinstance(values, list) else [values]:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and not low <= value <= high:
                raise common.UserError(f"--{name.replace('_', '-')} {value}: it must be at least "
                                       f"{low} and at most {high}")


def parse_args():
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m evaluate", description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL")
    for name, protocol in PROTOCOLS.items():
        header = protocol.__doc__
        command = commands.add_parser(name, help=header.splitlines()[0], description=header,
                                      formatter_class=form)
        flag = command.add_argument
        add_flags(flag)
        flag("--bf16", action=argparse.BooleanOptionalAction, help="by default as in the run")
        flag("--workers", type=int, default=training.own_cores(), help="data loading processes")
        if protocol is not export:
            flag("--baseline", action="store_true", help="the untrained network too, in more rows")
        if hasattr(protocol, "add_flags"):
            protocol.add_flags(flag)
    args = parser.parse_args()
    check(args, LOWEST, HIGHEST)
    return args


def write_line(path, result):
    """Adds a line of JSON: in one write at the file's end, so that no other process's is lost."""
    line = json.dumps(result).encode() + b"\n"
    try:
        with open(path, "a+b", buffering=0) as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)  # no other process is amid its line
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if file.read(1) not in (b"", b"\n"):  # a line that was cut off
                line = b"\n" + line
            file.write(line)
    except OSError as error:
        training.warn(f"cannot write {path} ({error})")


def print_table(title, rows):
    """rows: {name: {column: number or None}}"""
    columns = list(next(iter(rows.values())))
    width = max(24, *map(len, [title, *rows]))
    print(f"{title:{width}}", *columns, sep="  ")
    for name, row in rows.items():
        cells = ["-" if row[c] is None else f"{row[c]:.1f}" for c in columns]
        cells = [f"{cell:>{len(c)}}" for cell, c in zip(cells, columns)]
        print(f"{name:{width}}", *cells, sep="  ", flush=True)


def evaluate(args):
    """-> the result's title, and its rows {network, or network: row: {column: number}}."""
    protocol = PROTOCOLS[args.protocol]
    backbone = load(args, getattr(protocol, "SIZE", None))
    data = protocol.prepare(args)
    short = "/".join(Path(args.checkpoint).parts[-2:])
    networks = [(short, backbone, args)]
    if vars(args).get("baseline"):
        settings = argparse.Namespace(**vars(args) | {"checkpoint": "random"})
        networks.append(("random initialisation", untrained(args, backbone), settings))
    say(f"{protocol.NAME} of {args.checkpoint}: {args.arch} for {args.size} pixels, "
        f"on {args.data}, {args.device.type}")
    table = {}
    for network, backbone, settings in networks:
        backbone = backbone.to(args.device, memory_format=torch.channels_last)
        rows = protocol.run(backbone, data, settings)
        for name, row in rows.items():
            table[f"{network}: {name}" if name else network] = row
    return f"{protocol.NAME} on {args.data}, %", table


def main():
    with training.orderly_exit():
        args = parse_args()
        args.device = training.set_up(seed=0)
        torch.set_float32_matmul_precision("high")  # on a GPU TF32, to 1e-3; a CPU has none
        title, rows = evaluate(args)
        if training.rank_and_world()[0] or not rows:
            return
        if args.checkpoint != "random":
            path = Path(args.checkpoint)
            folder = path if path.is_dir() else path.parent
            inner = ("device", "run", "workers")
            settings = {name: value for name, value in vars(args).items() if name not in inner}
            result = dict(title=title, rows=rows, settings=settings)
            write_line(folder / f"{args.protocol}.jsonl", result)
        print_table(title, rows)
        training.say(PROTOCOLS[args.protocol].__doc__.split("\n\n")[1])  # what it shows


if __name__ == "__main__":
    main()
