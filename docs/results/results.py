"""The runs behind docs/results.md: their commands, and the table made from what they left.

    python docs/results/results.py run [NAME ...]   # trains and evaluates what is missing; resumes
    python docs/results/results.py collect          # copies commands, logs, evaluations here
    python docs/results/results.py table            # writes the table to docs/results.md

In $DATA, all as JPEG files: imagenette160; voc_mini_s256, 1,000 + 445 images of VOC 2012 with their
masks, short side 256; cifar10-subset, the first 1,000 training and 200 test images of each class.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS, KEPT = ROOT / "runs" / "results", ROOT / "docs" / "results"
SEEDS = 0, 1, 2
SHORT = "--arch tiny_convnet --epochs 4 --warmup-epochs 1 --batch-size 128"
NETTE = f"--data imagenette160 {SHORT} --size 64"
VICREGL = f"{NETTE} --projector 1024-1024-1024 --local-projector 128-128 --base-lr 8 --final-lr 0"
BYOL = f"{NETTE} --projector 1024-256 --base-lr 8 --momentum 0.97"
CRIBO = (
    f"{NETTE} --head 512-128-1024 --base-lr 8e-3 --final-weight-decay 0.04 --momentum 0.99 "
    "--drop-path 0 --num-objects 8 --bank-images 2000 --teacher-temp 0.04 --temp-warmup-epochs 1"
)
CIFAR = (
    f"--data cifar10-subset {SHORT} --size 32 --projector 1024-128 --base-lr 4 "
    "--weight-decay 1e-6 --patch-scale 0.1914"
)
TRAINING = {  # name: what the table calls it, its command
    "vicreg": ("VICReg", "vicreg.py"),
    "vicreg-no-var": ("VICReg without variance", "vicreg.py --var-coeff 0"),
    "vicreg-no-cov": ("VICReg without covariance", "vicreg.py --cov-coeff 0"),
    "vicregl-1": ("VICRegL, alpha 1", "vicregl.py --alpha 1"),
    "vicregl-0.75": ("VICRegL, alpha 0.75", "vicregl.py --alpha 0.75"),
    "vicregl-1-longer": ("VICRegL, alpha 1", "vicregl.py --alpha 1 --epochs 14"),
    "vicregl-0.75-longer": ("VICRegL, alpha 0.75", "vicregl.py --alpha 0.75 --epochs 14"),
    "lc_loss-0": ("LC-loss, alpha 0: BYOL", "lc_loss.py --alpha 0 --epochs 3"),
    "lc_loss-0.1": ("LC-loss, alpha 0.1", "lc_loss.py --alpha 0.1 --epochs 3"),
    "lc_loss-mse": (
        "LC-loss, alpha 0.1, MSE",
        "lc_loss.py --alpha 0.1 --local-loss mse --epochs 3",
    ),
    "cribo-image": ("CrIBo, images alone: DINO", "cribo.py --no-object --no-cross-image"),
    "cribo-object": ("CrIBo, + objects across views", "cribo.py --no-cross-image"),
    "cribo": ("CrIBo, + across images", "cribo.py"),
    "bagssl-vicreg": ("BagSSL, VICReg", "bagssl.py --loss vicreg --epochs 3"),
    "bagssl-tcr": ("BagSSL, TCR", "bagssl.py --loss tcr --epochs 3"),
    "bagssl-simclr": ("BagSSL, SimCLR", "bagssl.py --loss simclr --epochs 3"),
    "bagssl-spectral": ("BagSSL, spectral", "bagssl.py --loss spectral --epochs 3"),
    "vicregl-1-imagenette": ("VICRegL, alpha 1", f"vicregl.py --alpha 1 {VICREGL}"),
    "vicregl-0.75-imagenette": ("VICRegL, alpha 0.75", f"vicregl.py --alpha 0.75 {VICREGL}"),
    "lc_loss-0-imagenette": ("LC-loss, alpha 0: BYOL", f"lc_loss.py --alpha 0 {BYOL}"),
    "lc_loss-0.1-imagenette": ("LC-loss, alpha 0.1", f"lc_loss.py --alpha 0.1 {BYOL}"),
    "cribo-image-imagenette": (
        "CrIBo, images alone: DINO",
        f"cribo.py --no-object --no-cross-image {CRIBO}",
    ),
    "cribo-object-imagenette": (
        "CrIBo, + objects across views",
        f"cribo.py --no-cross-image {CRIBO}",
    ),
    "cribo-imagenette": ("CrIBo, + across images", f"cribo.py {CRIBO}"),
    "bagssl-vicreg-cifar10": ("BagSSL, VICReg", f"bagssl.py --loss vicreg {CIFAR}"),
    "bagssl-tcr-cifar10": ("BagSSL, TCR", f"bagssl.py --loss tcr --tcr-coeff 30 {CIFAR}"),
    "bagssl-simclr-cifar10": (
        "BagSSL, SimCLR",
        f"bagssl.py --loss simclr --temperature 0.2 {CIFAR}",
    ),
    "bagssl-spectral-cifar10": ("BagSSL, spectral", f"bagssl.py --loss spectral {CIFAR}"),
}
PROTOCOLS = {  # each method's evaluations, after k-NN: those that its paper's claim is about
    "vicreg": {"linear": "--no-augment"},
    "vicregl": {"linear": "--no-augment", "segment": "--steps 2000 --layers 4", "correspond": ""},
    "lc_loss": {"linear": "--no-augment", "correspond": ""},
    "cribo": {"linear": "--no-augment", "retrieve": "--subsample 512", "correspond": ""},
    "bagssl": {"bag": "--bags 1 4 16 --lr 1 --epochs 10"},
}
ON_IMAGENETTE = {  # which has no masks, so no retrieval
    "vicregl": {
        "linear": "--no-augment",
        "correspond": "",
        "segment": "--data voc_mini_s256 --size 128 --steps 300 --layers 4",
    },
    "cribo": {"linear": "--no-augment", "correspond": ""},
}
LONGER = {"vicregl": {"segment": "--steps 1000 --layers 4 --lr 0.02"}}
COLUMNS = {  # file: row, column
    "k-NN": ("knn", 0, "20-NN"),
    "linear": ("linear", "best", "top-1"),
    "segmentation": ("segment", "best", "mIoU"),
    "retrieval": ("retrieve", 0, "pixel mIoU"),
    "correspondence": ("correspond", 0, "flip"),
    "centre patch": ("bag", "bag of 1", "20-NN"),
    "bag of 4": ("bag", "bag of 4", "20-NN"),
    "of 16": ("bag", "bag of 16", "20-NN"),
}


def commands(name, seed):
    """{the result that it leaves: the command}, for a run: training, then evaluations."""
    folder, script = f"{name}-s{seed}", TRAINING[name][1]
    flags = f"--workers 1 --log-every 10 --seed {seed} --out runs/results --name {folder}"
    train = f"python {script} {flags}"
    evaluate = f"python -m evaluate {{}} --checkpoint runs/results/{folder} --workers 1 {{}}"
    method = script.split(".")[0]
    special = ON_IMAGENETTE if NETTE in script else LONGER if "--epochs 14" in script else {}
    protocols = special.get(method, PROTOCOLS[method])
    result = {"knn": train}
    for protocol, special_flags in protocols.items():
        result[protocol] = evaluate.format(protocol, special_flags).rstrip()
    return result


def run(*names):
    for seed in SEEDS:
        for name in names or TRAINING:
            for result, command in commands(name, seed).items():
                if not (RUNS / f"{name}-s{seed}" / f"{result}.jsonl").exists():
                    print(command, flush=True)
                    words = [sys.executable, *shlex.split(command)[1:]]
                    env = {**os.environ, "OMP_NUM_THREADS": "1"}
                    subprocess.run(words, cwd=ROOT, env=env, check=True)


def collect():
    for name in TRAINING:
        for seed in SEEDS:
            source, place = RUNS / f"{name}-s{seed}", KEPT / name / f"seed{seed}"
            if all((source / f"{result}.jsonl").exists() for result in commands(name, seed)):
                place.mkdir(parents=True, exist_ok=True)
                (place / "commands.txt").write_text("\n".join(commands(name, seed).values()) + "\n")
                lines = (source / "log.jsonl").read_text().splitlines(keepends=True)
                step = -(-len(lines) // 300)
                thinned = lines[(len(lines) - 1) % step :: step]  # with the last one
                (place / "log.jsonl").write_text("".join(thinned))
                for result in commands(name, seed):
                    shutil.copy(source / f"{result}.jsonl", place)


def cell(places, file, row, column):
    """Mean and standard deviation over seeds of one number, nothing where it was not measured."""
    values = []
    for path in (place / f"{file}.jsonl" for place in places):
        if path.exists():
            rows = json.loads(path.read_text().splitlines()[-1])["rows"]
            values.append(rows[row if row in rows else list(rows)[0]][column])
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else ""


def minutes(places):
    """Of training: the median of what the log's lines say, as some runs were paused."""
    times = []
    for place in places:
        *lines, last = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
        times += [
            line["minutes_left"] / (last["step"] - line["step"]) * last["step"] for line in lines
        ]
    return f"{statistics.median(times):.1f}"


def table():
    lines = [["", "command", *COLUMNS, "minutes", "seeds"], ["---"] * (len(COLUMNS) + 4)]
    for name, (label, command) in TRAINING.items():
        places = sorted((KEPT / name).glob("seed*"))
        if places:
            shown, *rest = command.split(" --arch")  # whole in docs/results
            lines.append(
                [
                    label,
                    f"`{shown}{' ...' * len(rest)}`",
                    *(cell(places, *where) for where in COLUMNS.values()),
                    minutes(places),
                    str(len(places)),
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_table():
    path = ROOT / "docs" / "results.md"
    before, rest = path.read_text().split("<!-- results -->\n")
    after = rest.split("<!-- end -->", 1)[1]
    path.write_text(f"{before}<!-- results -->\n{table()}<!-- end -->{after}")


if __name__ == "__main__":
    {"run": run, "collect": collect, "table": write_table}[sys.argv[1]](*sys.argv[2:])
