"""The runs behind docs/results.md: their commands, and the table made from what they left.

    python docs/results/results.py run [NAME ...]   # trains and evaluates what is missing; resumes
    python docs/results/results.py collect          # copies commands, logs, evaluations here
    python docs/results/results.py table            # writes the table to docs/results.md

A run's last step evaluates it, and the network that it started from, by k-NN and by its paper's
own protocol: so a run is one command.
"""

import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RUNS, KEPT = ROOT / "runs" / "results", ROOT / "docs" / "results"
SEEDS = 0, 1, 2
UNTRAINED = "random initialisation"
TRAINING = {  # name: what the table calls it, its command
    "vicreg": ("VICReg", "vicreg.py"),
    "vicreg-no-var": ("without variance", "vicreg.py --var-coeff 0"),
    "vicreg-no-cov": ("without covariance", "vicreg.py --cov-coeff 0"),
    "vicregl": ("VICRegL", "vicregl.py"),
    "vicregl-1": ("the global criterion alone", "vicregl.py --alpha 1"),
    "lc_loss": ("LC-loss", "lc_loss.py"),
    "lc_loss-0": ("without local contrast: BYOL", "lc_loss.py --alpha 0"),
    "cribo": ("CrIBo", "cribo.py"),
    "cribo-image": ("images alone: DINO", "cribo.py --no-object --no-cross-image"),
    "bagssl": ("BagSSL", "bagssl.py"),
}
CLAIMS = {  # a method's own protocol
    "vicreg.py": [],
    "vicregl.py": ["correspond"],
    "lc_loss.py": ["correspond"],
    "cribo.py": ["clusters"],
    "bagssl.py": ["bag"],
}
COLUMNS = {  # title: of which protocol, row (the run's own are the first), column
    "untrained": ("knn", UNTRAINED, "20-NN"),
    "k-NN": ("knn", "", "20-NN"),
    "found, untrained": ("correspond", UNTRAINED, "flip"),
    "found": ("correspond", "", "flip"),
    "purity, untrained": ("clusters", UNTRAINED, "features"),
    "purity": ("clusters", "", "features"),
    "centre patch": ("bag", "bag of 1", "20-NN"),
    "bag of 16": ("bag", "bag of 16", "20-NN"),
}


def train_command(name, seed):
    script = TRAINING[name][1]
    return f"python {script} --log-every 10 --seed {seed} --out runs/results --name {name}-s{seed}"


def protocols(name):
    """What a run of this method ends with."""
    script = TRAINING[name][1].split()[0]
    return ["knn", *CLAIMS[script]]


def is_done(name, seed):
    folder = RUNS / f"{name}-s{seed}"
    return all((folder / f"{protocol}.jsonl").exists() for protocol in protocols(name))


def run(*names):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for seed in SEEDS:
        for name in names or TRAINING:
            if not is_done(name, seed):
                command = f"{train_command(name, seed)} --workers 1"
                print(command, flush=True)
                words = [sys.executable, *shlex.split(command)[1:]]
                subprocess.run(words, cwd=ROOT, env=env, check=True)


def collect():
    revision = ["git", "rev-parse", "--short", "HEAD"]
    about = dict(
        revision=subprocess.check_output(revision, cwd=ROOT, text=True).strip(),
        torch=torch.__version__,
        python=platform.python_version(),
        machine=machine(),
        threads=1,
    )
    for name in TRAINING:
        for seed in SEEDS:
            source, place = RUNS / f"{name}-s{seed}", KEPT / name / f"seed{seed}"
            if is_done(name, seed) and not place.exists():
                place.mkdir(parents=True)
                line = dict(command=train_command(name, seed), **about)
                (place / "run.json").write_text(json.dumps(line) + "\n")
                for file in ("log", *protocols(name)):
                    shutil.copy(source / f"{file}.jsonl", place)


def machine():
    """The processor's name and number of cores, as Linux gives them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores"


def numbers(places, file, row, column):
    values = []
    for path in (place / f"{file}.jsonl" for place in places):
        if path.exists():
            rows = json.loads(path.read_text().splitlines()[-1])["rows"]
            first = next(key for key in rows if row in key)  # NETWORK or NETWORK: ROW
            values.append(rows[first][column])
    return values


def cell(values):
    """Mean and standard deviation over seeds of one number, nothing where it was not measured."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else ""


def minutes(places):
    """Of training: the median of what the log's lines say, as some runs were paused."""
    times = []
    for place in places:
        rows = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
        steps = rows[-1]["step"]
        times += [x["minutes_left"] / (steps - x["step"]) * steps for x in rows[:-1]]
    return f"{statistics.median(times):.1f}"


def table():
    lines = [["", "command", *COLUMNS, "minutes", "seeds"], ["---"] * (len(COLUMNS) + 4)]
    for name, (label, command) in TRAINING.items():
        places = sorted((KEPT / name).glob("seed*"))
        if places:
            cells = [cell(numbers(places, *where)) for where in COLUMNS.values()]
            lines.append([label, f"`{command}`", *cells, minutes(places), str(len(places))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_table():
    path = ROOT / "docs" / "results.md"
    before, rest = path.read_text().split("<!-- results -->\n")
    after = rest.split("<!-- end -->", 1)[1]
    path.write_text(f"{before}<!-- results -->\n{table()}<!-- end -->{after}")


if __name__ == "__main__":
    {"run": run, "collect": collect, "table": write_table}[sys.argv[1]](*sys.argv[2:])
