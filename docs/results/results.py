"""The runs behind docs/results.md: their commands, and the table made from what they left.

    python docs/results/results.py run [NAME ...]   # trains and evaluates what is missing; resumes
    python docs/results/results.py collect          # copies commands, logs, evaluations here
    python docs/results/results.py photographs      # k-NN of the runs on photographs, by epoch
    python docs/results/results.py table            # writes the tables to docs/results.md, a figure

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
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import training  # noqa: E402
import weights  # noqa: E402
from evaluate import knn  # noqa: E402
from evaluate.features import center_view, to_input  # noqa: E402

RUNS, KEPT = ROOT / "runs" / "results", ROOT / "docs" / "results"
SEEDS = 0, 1, 2
UNTRAINED = "random initialisation"
TRAINING = {  # name: what the table calls it, its command
    "vicreg": ("VICReg", "vicreg.py"),
    "vicreg-no-var": ("without variance", "vicreg.py --var-coeff 0"),
    "vicreg-no-cov": ("without covariance", "vicreg.py --cov-coeff 0"),
    "vicreg-l2": ("l2-normalization", "vicreg.py --normalization l2 --inv-coeff 12.5"),
    "vicregl": ("VICRegL", "vicregl.py"),
    "vicregl-1": ("the global criterion alone", "vicregl.py --alpha 1"),
    "lc_loss": ("LC-loss", "lc_loss.py"),
    "lc_loss-0": ("without local contrast: BYOL", "lc_loss.py --alpha 0"),
    "cribo": ("CrIBo", "cribo.py"),
    "cribo-image": ("images alone: DINO", "cribo.py --no-object --no-cross-image"),
    "cribo-500": ("bank of 500 images", "cribo.py --bank-images 500"),
    "cribo-2000": ("bank of 2,000", "cribo.py --bank-images 2000"),
    "cribo-9000": ("bank of 9,000, nearly all", "cribo.py --bank-images 9000"),
    "bagssl": ("BagSSL", "bagssl.py"),
}
LC_DINO = "-m docs.lc_dino --data imagenette160 --recipe shapes --epochs 5"
ON_DINO = {  # as TRAINING, but on Imagenette (160 pixels) in $DATA
    "dino": ("DINO", f"{LC_DINO} --alpha 0"),
    "lc_dino": ("LC-loss on DINO", LC_DINO),
}
CLAIMS = {  # a method's own protocol
    "vicreg.py": [],
    "vicregl.py": ["correspond"],
    "lc_loss.py": ["correspond"],
    "cribo.py": ["clusters"],
    "bagssl.py": ["bag"],
    "docs.lc_dino": ["correspond"],
}
PHOTOGRAPHS = {  # on Imagenette (160 pixels), in $DATA: what the table calls a run, its command
    "supervised": ("supervised", "docs/results/supervised.py --epochs 12"),
    "vicreg": ("VICReg", "vicreg.py --recipe shapes --epochs 12"),
    "vicreg-60": ("VICReg, longer", "vicreg.py --recipe shapes --epochs 60 --base-lr 2"),
    "vicregl": ("VICRegL", "vicregl.py --recipe shapes --epochs 12"),
    "vicregl-20": ("VICRegL, longer", "vicregl.py --recipe shapes --epochs 20 --base-lr 3"),
    "lc_loss": ("LC-loss", "lc_loss.py --recipe shapes --epochs 10"),
    "lc_loss-20": ("LC-loss, longer", "lc_loss.py --recipe shapes --epochs 20 --base-lr 2"),
    "cribo": ("CrIBo", "cribo.py --recipe shapes --epochs 10 --bank-images 1000"),
    "dino": ("DINO alone", "cribo.py --recipe shapes --epochs 10 --no-object --no-cross-image"),
    "bagssl": ("BagSSL", "bagssl.py --recipe shapes --epochs 12"),
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
VOC = {  # title: of which protocol, row, column, on a part of VOC, of the networks of PHOTOGRAPHS
    "segmentation": ("segment", "", "mIoU"),
    "retrieval": ("retrieve", "", "patch mIoU"),
}


def train_command(name, seed):
    script = (TRAINING | ON_DINO)[name][1]
    return f"python {script} --log-every 10 --seed {seed} --out runs/results --name {name}-s{seed}"


def protocols(name):
    """What a run of this method ends with."""
    words = train_command(name, 0).split()
    script = words[2] if words[1] == "-m" else words[1]
    return ["knn", *CLAIMS[script]]


def is_done(name, seed):
    folder = RUNS / f"{name}-s{seed}"
    return all((folder / f"{protocol}.jsonl").exists() for protocol in protocols(name))


def run(*names):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for seed in SEEDS:
        for name in names or TRAINING | ON_DINO:
            if not is_done(name, seed):
                command = f"{train_command(name, seed)} --workers 1"
                print(command, flush=True)
                words = [sys.executable, *shlex.split(command)[1:]]
                subprocess.run(words, cwd=ROOT, env=env, check=True)


def circumstances():
    revision = ["git", "rev-parse", "--short", "HEAD"]
    return dict(
        revision=subprocess.check_output(revision, cwd=ROOT, text=True).strip(),
        torch=torch.__version__,
        python=platform.python_version(),
        machine=machine(),
        threads=1,
    )


def collect():
    about = circumstances()
    for name in TRAINING | ON_DINO:
        for seed in SEEDS:
            source, place = RUNS / f"{name}-s{seed}", KEPT / name / f"seed{seed}"
            if is_done(name, seed) and not place.exists():
                place.mkdir(parents=True)
                line = dict(command=train_command(name, seed), **about)
                (place / "run.json").write_text(json.dumps(line) + "\n")
                for file in source.glob("*.jsonl"):  # the log, evaluations
                    shutil.copy(file, place)


def machine():
    """The processor's name and number of cores, as Linux gives them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores"


def in_memory(name, size):
    """Each part of a folder of images: central squares (n, 3, size, size), uint8, and labels (n,).
    They are decoded once for all networks."""
    parts = []
    for split in ("train", "val"):
        views = common.Views(common.open_data(name, split), partial(center_view, size=size), seed=0)
        samples = [views[0, i] for i in range(len(views.data))]
        pixels = torch.stack([sample.views[0] for sample in samples])
        labels = torch.tensor([sample.labels for sample in samples])
        parts.append((pixels, labels))
    return parts


@torch.no_grad()
def k_nn(backbone, parts, k=20):
    """`evaluate knn` on what in_memory() holds: the accuracy in %."""
    backbone.eval()
    represented = []
    for pixels, labels in parts:
        with torch.autocast("cpu", torch.bfloat16, enabled=training.has_bf16()):
            y = [backbone(to_input(x, "cpu"))[1].float() for x in pixels.split(256)]
        represented.append((torch.cat(y), labels))
    bank, (queries, targets) = represented
    ((similarity, labels),) = knn.nearest_rows(queries, [(*bank, [0])], k)
    predicted = knn.vote(similarity, labels, int(targets.max()) + 1)
    return 100 * (predicted == targets).float().mean().item()


def photographs():
    """Measures every kept backbone of runs/imagenette, and the network that it started from."""
    data = {}
    for name, (_, command) in PHOTOGRAPHS.items():
        folder = RUNS.parent / "imagenette" / name
        place = KEPT / "imagenette" / f"{name}.json"
        if place.exists() or not (folder / "last.pt").exists():
            continue
        run = torch.load(folder / "last.pt", weights_only=True)["args"]
        if run["size"] not in data:
            data[run["size"]] = in_memory(run["data"], run["size"])
        torch.manual_seed(run["seed"])
        backbones = {0: common.build_backbone(run["arch"], run["size"])}
        for epoch in range(1, run["epochs"] + 1):
            path = folder / f"backbone-{epoch}.pt"
            if path.exists():  # --keep-every
                backbones[epoch] = weights.load_backbone(path, run["arch"])
        parts = data[run["size"]]
        curve = {epoch: round(k_nn(network, parts), 2) for epoch, network in backbones.items()}
        place.parent.mkdir(exist_ok=True)
        command = f"python {command} --data imagenette160 --keep-every {run['keep_every']}"
        result = dict(command=command, **circumstances(), minutes=minutes([folder]), curve=curve)
        place.write_text(json.dumps(result) + "\n")
        print(name, curve, flush=True)


def markdown(lines):
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def photographs_table():
    lines = [["", "command", "epochs", "minutes", "k-NN", *VOC], ["---"] * (len(VOC) + 5)]
    for name, (label, command) in PHOTOGRAPHS.items():
        place = KEPT / "imagenette" / f"{name}.json"
        if place.exists():
            result = json.loads(place.read_text())
            *_, (epoch, accuracy) = result["curve"].items()
            line = [label, f"`{command}`", epoch, result["minutes"], f"{accuracy:.1f}"]
            folder = KEPT / "imagenette" / name
            lines.append(line + [cell(numbers([folder], *where)) for where in VOC.values()])
    return markdown(lines)


def draw_photographs(path):
    """The curves of all methods, k-NN over epochs."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7.5, 4), layout="constrained")
    colours = {}
    for name, (label, _) in PHOTOGRAPHS.items():
        place = KEPT / "imagenette" / f"{name}.json"
        if place.exists():
            curve = json.loads(place.read_text())["curve"]
            method, *longer = label.split(", ")
            colour = colours.setdefault(method, f"C{len(colours)}")
            style = "--" if longer else "-"
            width = 2.5 if method == "supervised" else 1.5
            epochs = [int(epoch) for epoch in curve]
            ax.plot(epochs, list(curve.values()), style, c=colour, lw=width, label=label)
    ax.set_xscale("symlog", linthresh=1)  # epoch 0 is the untrained network
    ticks = [0, 1, 3, 10, 30, 60]
    ax.set_xticks(ticks, ticks)
    ax.set(xlabel="epoch", ylabel="k-NN accuracy in %", title="Imagenette at 64 pixels")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110)


def draw_bank(path):
    """CrIBo's k-NN and purity over the size of its bank: mean and deviation over seeds."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot

    sizes = {500: "cribo-500", 1_000: "cribo", 2_000: "cribo-2000", 9_000: "cribo-9000"}
    figure, axes = pyplot.subplots(1, 2, figsize=(7.5, 3), layout="constrained")
    for ax, column in zip(axes, ("k-NN", "purity")):
        found = [numbers(sorted((KEPT / name).glob("seed*")), *COLUMNS[column])
                 for name in sizes.values()]
        means = [statistics.mean(values) for values in found]
        spreads = [statistics.stdev(values) for values in found]
        ax.errorbar(list(sizes), means, spreads, fmt="o-", capsize=3)
        ax.set_xscale("log")
        ax.set_xticks(list(sizes), [f"{size:,}" for size in sizes])
        ax.set(xlabel="images in the bank, of 10,000", ylabel=f"{column} in %")
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


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


def table(runs, columns):
    lines = [["", "command", *columns, "minutes", "seeds"], ["---"] * (len(columns) + 4)]
    for name, (label, command) in runs.items():
        places = sorted((KEPT / name).glob("seed*"))
        if places:
            cells = [cell(numbers(places, *COLUMNS[column])) for column in columns]
            lines.append([label, f"`{command}`", *cells, minutes(places), str(len(places))])
    return markdown(lines)


def tables():
    return {
        "results": table(TRAINING, COLUMNS),
        "photographs": photographs_table(),
        "dino": table(ON_DINO, ["untrained", "k-NN", "found, untrained", "found"]),
    }


def write_tables():
    path = ROOT / "docs" / "results.md"
    text = path.read_text()
    for mark, rows in tables().items():
        before, rest = text.split(f"<!-- {mark} -->\n")
        after = rest.split("<!-- end -->", 1)[1]
        text = f"{before}<!-- {mark} -->\n{rows}<!-- end -->{after}"
    path.write_text(text)
    draw_photographs(ROOT / "docs" / "imagenette.png")
    draw_bank(ROOT / "docs" / "bank.png")


if __name__ == "__main__":
    commands = {"run": run, "collect": collect, "photographs": photographs, "table": write_tables}
    commands[sys.argv[1]](*sys.argv[2:])
