"""evaluate/: each protocol against brute force, on one and on two processes."""
import concurrent.futures
import json
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from helpers import kill_tree, make_images, on_processes, script, start, user_error
from PIL import Image

import bagssl
import common
import shapes
import training
from evaluate import __main__ as command
from evaluate import (
    bag,
    clusters,
    correspond,
    export,
    features,
    fewshot,
    heads,
    knn,
    linear,
    masks,
    retrieve,
)
from evaluate import segment as segmentation

CPU = torch.device("cpu")
ARGS = dict(stem_padding=1, masks="masks", void=255,
    protocol="p", checkpoint="c", data="data", size=32, workers=0, bf16=False, device=CPU, run={},
    finetune=False, labels=None, augment=True, epochs=2, batch_size=4, lr=[0.5, 0.05],
    head="linear", layers=1, steps=60, subsample=[1, 2], runs=5, chunk=3)


def settings(**changes):
    return SimpleNamespace(**{**ARGS, **changes})


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def blobs(n, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    centers = torch.randn(classes, 16, generator=torch.Generator().manual_seed(7))
    return centers[labels] + 0.9 * torch.randn(n, 16, generator=g), labels


def run_command(monkeypatch, line):
    """What `python -m evaluate LINE` does, in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *line.split()])
    command.main()


def results(folder, protocol):
    return [json.loads(line) for line in (folder / f"{protocol}.jsonl").read_text().splitlines()]


# --- k nearest neighbors --------------------------------------------------------------------------

@pytest.mark.parametrize("chunk", [3, 50, 1000])
def test_nearest_is_brute_force(chunk):
    x, y = blobs(200)
    queries, _ = blobs(40, seed=1)
    chunks = [(rows, labels, [0, 1][i % 2:]) for i, (rows, labels)  # trial 1 has all, 0 half
              in enumerate(zip(x.split(chunk), y.split(chunk)))]
    for trial, nearest in enumerate(knn.nearest_rows(queries, chunks, 20, trials=2)):
        rows, classes = zip(*[chunk[:2] for chunk in chunks if trial in chunk[2]])
        rows = torch.cat(rows)
        classes = torch.cat(classes)
        for q, s, found in zip(queries, *nearest):
            cosine = np.array([(q @ row / q.norm() / row.norm()).item() for row in rows])
            order = np.argsort(-cosine)[:20]
            np.testing.assert_allclose(s, cosine[order], atol=1e-5)
            assert found.tolist() == classes[order].tolist()


def test_fewer_rows_than_k():
    x, y = blobs(7)
    similarity, labels = next(knn.nearest_rows(x, [(x, y, [0])], 20))
    assert (similarity[:, 7:] == -torch.inf).all()
    assert (labels[:, 7:] == -1).all()
    for temperature in (None, 0.07):
        predicted = knn.vote(similarity, labels, 5, temperature)
        assert torch.isin(predicted, y).all()


def test_votes():
    similarity = torch.tensor([[0.9, 0.5, 0.5, -torch.inf]])
    labels = torch.tensor([[2, 1, 1, -1]])
    assert knn.vote(similarity, labels, 3).item() == 1  # the majority
    # the nearest weighs exp(0.4 / 0.07) times as much
    assert knn.vote(similarity, labels, 3, 0.07).item() == 2


# --- images with labels ---------------------------------------------------------------------------

class Means(torch.nn.Module):
    """A backbone whose representation is the image's mean color."""

    dim = 3

    def forward(self, x):
        return None, x.mean((2, 3))


def colored(folder, count, seed):
    """Class folders of images of one noisy color each."""
    rng = np.random.default_rng(seed)
    for i, color in enumerate(((220, 30, 30), (30, 220, 30), (30, 30, 220))):
        (folder / f"class{i}").mkdir(parents=True)
        for j in range(count):
            pixels = rng.normal(color, 60, (20, 20, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{i}" / f"{j}.png")
    return folder


@pytest.fixture
def classes(tmp_path):
    colored(tmp_path / "data" / "train", 9, 0)
    colored(tmp_path / "data" / "val", 5, 1)
    return tmp_path / "data"


def open_parts(folder):
    return [common.open_data(str(folder), split) for split in ("train", "val")]


def test_center_view():
    large, small = Image.new("RGB", (512, 256)), Image.new("RGB", (40, 32))
    assert features.center_view(large, 224) == [((16, 144, 224, 224), False, 224)]
    assert features.center_view(small, 32) == [((0, 4, 32, 32), False, 32)]
    assert features.whole_view(large, 224) == [((0, 128, 256, 256), False, 224)]


def test_broken_images_have_no_part(classes, capsys):
    (classes / "val" / "class0" / "broken.png").write_bytes(b"not an image")
    _, val = open_parts(classes)
    y, labels, index = features.all_features(Means(), val, settings(size=16))
    assert len(val) == 16 and len(y) == len(labels) == len(index) == 15
    assert "no part in the result" in capsys.readouterr().err


def test_top_1_and_top_5():
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1]])
    row, = linear.accuracies([torch.nn.Identity()], logits, torch.tensor([0, 4, 5]))
    assert row == pytest.approx({"top-1": 100 / 3, "top-5": 200 / 3})
    row, = linear.accuracies([torch.nn.Identity()], logits[:, :2], torch.tensor([0, 1, 1]))
    assert row["top-5"] == 100  # of two classes all are among the first five


def test_sweep():
    rows = [{"top-1": 10, "top-5": 90}, {"top-1": 20, "top-5": 80}]
    table = heads.sweep_table([1, 0.5], rows)
    assert list(table) == ["lr 1", "lr 0.5", "best"]
    assert table["best"] == rows[1]  # best by the first column
    assert heads.sweep_table([1], rows[:1]) == {"lr 1": rows[0]}


def test_few_labels(tmp_path):
    colored(tmp_path / "train", 12, 0)
    data = common.open_data(str(tmp_path))
    assert len(linear.few_labels(data, 0.25)) == 9
    assert sorted(data.label(i) for i in linear.few_labels(data, 0.01)) == [0, 1, 2]


# --- the command line -----------------------------------------------------------------------------

def save_backbone(folder, size=32):
    torch.save(common.build_backbone("tiny_convnet", size).state_dict(), folder / "backbone.pt")


def save_run(folder, seed=3, **flags):
    """A run folder with an untrained network of another seed."""
    flags = dict(arch="tiny_convnet", size=32, data="shapes", bf16=False, seed=seed) | flags
    torch.manual_seed(99)
    backbone = common.build_backbone(flags["arch"], flags["size"])
    state = prefixed(backbone.state_dict(), "backbone.")
    torch.save({"model": state, "args": flags}, folder / "last.pt")
    return backbone


def test_under_torchrun(tmp_path, classes):
    save_backbone(tmp_path)
    done = script("-m", "evaluate", "knn", "--checkpoint", tmp_path / "backbone.pt", "--arch",
                  "tiny_convnet", "--size", 32, "--data", classes, torchrun=2)
    assert done.returncode == 0 and done.stdout.count("20-NN weighted") == 1, done.stderr
    result, = results(tmp_path, "knn")
    row, = result["rows"].values()
    assert list(row) == ["20-NN", "20-NN weighted", "200-NN", "200-NN weighted"]
    assert 0 <= row["20-NN"] <= 100
    assert result["settings"]["size"] == 32 and result["settings"]["data"] == str(classes)


def test_help_names_protocols_and_sources(monkeypatch, capsys):
    for line, words in (
        ("--help", ["C.1", "B.3", "D.1", "Table 7", "D.2", "4.1", "4.6", "C.4"]),
        ("linear --help", ["Differences", "SimCLR", "--labels"]),
        ("segment --help", ["As in mmsegmentation", "Not as in mmsegmentation", "Tables 3 and 4"]),
    ):
        run_command(monkeypatch, line)
        said = " ".join(capsys.readouterr().out.split())
        assert all(word in said for word in words), said


def test_baseline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes.Shapes, "__len__", lambda self: 40)
    save_run(tmp_path)
    run_command(monkeypatch, f"knn --checkpoint {tmp_path} --baseline --workers 0")
    told, *printed, explained = capsys.readouterr().out.splitlines()
    assert told == f"k-NN of {tmp_path}: tiny_convnet for 32 pixels, on shapes, cpu"
    assert explained.startswith("A validation image gets the class of most of its k nearest")
    header, first, second = [re.split(r"\s{2,}", line) for line in printed]
    assert header == ["k-NN on shapes, %", "20-NN", "20-NN weighted", "200-NN", "200-NN weighted"]
    name = f"{tmp_path.parent.name}/{tmp_path.name}"  # short
    assert first[0] == name and second[0] == "random initialisation"
    assert len({len(line) for line in printed}) == 1  # the columns are below one another

    torch.manual_seed(3)  # the run's
    fresh = common.build_backbone("tiny_convnet", 32)
    train, val = common.open_data("shapes", "train", 32), common.open_data("shapes", "val", 32)
    expected = knn.run(fresh, (train, val), settings())[""]
    result, = results(tmp_path, "knn")
    assert result["title"] == "k-NN on shapes, %"
    assert result["rows"]["random initialisation"] == expected
    assert result["rows"][name] != expected

    run_command(monkeypatch, f"segment --checkpoint {tmp_path} --baseline --workers 0 --steps 1 "
                "--lr 0.1 0.2 --batch-size 2")
    rows = results(tmp_path, "segment")[0]["rows"]
    assert list(rows) == [f"{network}: {row}" for network in (name, "random initialisation")
                          for row in ("lr 0.1", "lr 0.2", "best")]


@pytest.mark.parametrize("arch,size", [("resnet18", 32), ("resnet18", 128), ("tiny_vit", 48),
                                       ("convnext_tiny", 64)])
def test_the_baseline_is_what_the_run_started_from(monkeypatch, arch, size):
    monkeypatch.setitem(common.CONVNEXTS, "convnext_tiny", ((8, 16, 24, 32), (1, 1, 2, 1)))
    torch.manual_seed(5)
    started = common.build_backbone(arch, size).state_dict()
    trained = common.build_backbone(arch, size)
    fresh = features.untrained(settings(arch=arch, size=224, run={"seed": 5}), trained)
    assert all(torch.equal(started[key], value) for key, value in fresh.state_dict().items())


def append(folder, number):
    command.write_line(folder / "knn.jsonl", {"number": number, "text": 2000 * "x"})


def test_concurrent_results_are_all_kept(tmp_path):
    with concurrent.futures.ProcessPoolExecutor(4) as pool:
        list(pool.map(append, 80 * [tmp_path], range(80)))
    assert sorted(result["number"] for result in results(tmp_path, "knn")) == list(range(80))


def test_a_damaged_file_costs_nothing(tmp_path, capsys):
    append(tmp_path, 1)
    with open(tmp_path / "knn.jsonl", "ab") as file:
        file.write(b'\xff{"number": 2, "te')  # a crash in the middle of a line
    append(tmp_path, 3)
    lines = (tmp_path / "knn.jsonl").read_bytes().splitlines()
    assert [json.loads(lines[i])["number"] for i in (0, 2)] == [1, 3]
    command.write_line(tmp_path / "nowhere" / "knn.jsonl", {})
    assert "warning: cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("key,value", [("6.weight", torch.nan), ("4.running_var", torch.inf)])
def test_weights_that_are_not_finite_are_refused(tmp_path, monkeypatch, capsys, key, value):
    state = common.build_backbone("tiny_convnet").state_dict()
    state[key].view(-1)[3] = value
    torch.save(state, tmp_path / "backbone.pt")
    said = user_error(command.main, monkeypatch, capsys, "knn", "--arch", "tiny_convnet",
                      "--checkpoint", tmp_path / "backbone.pt", "--workers", 0)
    assert key in said and "NaN" in said
    assert not (tmp_path / "knn.jsonl").exists()


@pytest.mark.parametrize("args,word", [
    (["--checkpoint", "nowhere", "--arch", "tiny_convnet"], "no checkpoint at nowhere"),
    (["--checkpoint", "backbone.pt", "--arch", "resnet18"], "not a resnet18"),
    (["--checkpoint", "random"], "--arch"),
    (["--checkpoint", "backbone.pt", "--arch", "tiny_convnet", "--data", "flat"],
     "knn needs labels"),
])
def test_bad_input(tmp_path, monkeypatch, capsys, args, word):
    monkeypatch.chdir(tmp_path)
    save_backbone(tmp_path)
    make_images(tmp_path / "flat", 4, classes=0)
    said = user_error(command.main, monkeypatch, capsys, "knn", "--workers", 0, "--size", 32, *args)
    assert word in said


@pytest.mark.parametrize("rename,words", [
    (("val", "validation"), "there is no val/"), (("val/class1", "val/cat"), "both: cat, class1"),
    (("val/class1", "val/class0/x"), "both: class0, class1, class2"),
    (("train", "x"), "not in both: class0"),
])
def test_why_labels_are_missing(classes, monkeypatch, capsys, rename, words):
    (classes / rename[0]).rename(classes / rename[1])
    said = user_error(command.main, monkeypatch, capsys, "knn", "--checkpoint", "random", "--arch",
                      "tiny_convnet", "--data", classes, "--size", 32)
    assert "knn needs labels" in said and words in said


@pytest.mark.parametrize("flags,words", [
    ("linear --finetune", "go together"), ("linear --labels 0.1", "go together"),
    ("linear --finetune --labels 0.1 --no-augment", "go together"),
    ("linear --batch-size 99999", "at most the 10000 training images"),
    ("bag --bags 4 8", "squares"), ("bag --bags 0", "--bags 0"),
    ("segment --void 300", "--void 300"), ("segment --masks nowhere --data .", "no images in"),
    ("features --out x.txt", "x.txt must end in .npy"), ("features --out /proc/x/y.npy", "/proc/x"),
    ("features --out x.npy --baseline", "--baseline"), ("features", "--out"),
    ("knn --stem-padding -1", "--stem-padding -1"),
    ("bag --patch-scale 1.5", "--patch-scale 1.5"), ("bag --patch-scale 0", "--patch-scale 0"),
    ("retrieve --subsample 0", "--subsample 0"), ("retrieve --subsample 8 -1", "--subsample -1"),
    ("retrieve --chunk 0", "--chunk 0"), ("retrieve --runs 0", "--runs 0"),
    ("clusters --images 0", "--images 0"),
    ("segment --steps 0", "--steps 0"), ("segment --size 0", "--size 0"),
    ("linear --epochs 0", "--epochs 0"), ("linear --lr -1", "--lr -1"),
    ("linear --lr nan", "--lr nan"), ("knn --workers -1", "--workers -1"),
    ("segment --head vit", "--head"), ("knn --chunk 3", "--chunk"), ("nothing", "nothing"),
])
def test_flags_that_cannot_be(monkeypatch, capsys, flags, words):
    args = f"{flags} --checkpoint random --arch tiny_convnet".split()
    if "--size" not in args:
        args += ["--size", "32"]
    if "--workers" not in args:
        args += ["--workers", "0"]
    assert words in user_error(command.main, monkeypatch, capsys, *args)


@pytest.mark.parametrize("line,length,column", [
    ("knn", 60, "20-NN"), ("linear --epochs 1 --batch-size 16", 60, "top-5"),
    ("linear --epochs 1 --batch-size 16 --no-augment", 60, "top-1"),
    ("linear --finetune --labels 0.1 --epochs 1 --batch-size 4", 60, "top-1"),
    ("fewshot", 300, "accuracy"), ("segment --steps 2", 20, "mIoU"),
    ("retrieve --subsample 1 4 --runs 2", 8, "patch mIoU"), ("correspond", 20, "flip"),
    ("clusters", 6, "features and places"),
    ("bag --bags 1 4 --epochs 1 --batch-size 16", 60, "20-NN"),
])
def test_every_protocol_on_shapes(tmp_path, monkeypatch, capsys, line, length, column):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes.Shapes, "__len__", lambda self: length)
    kept = []
    monkeypatch.setattr(command, "print_table", lambda title, rows: kept.append((title, rows)))
    flags = "--checkpoint random --arch tiny_convnet --size 32 --workers 0"
    run_command(monkeypatch, f"{line} {flags}")
    (title, rows), = kept
    assert title.endswith(" on shapes, %")
    assert all(name.startswith("random") for name in rows)
    assert all(0 <= row[column] <= 100 for row in rows.values())
    assert not list(tmp_path.iterdir())  # `random` has no folder, and leaves no file


def test_print_table(capsys):
    command.print_table("title", {"a": {"mIoU": 1.25, "std": None}, 30 * "b": {"mIoU": 100.0,
                                                                              "std": 2.0}})
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "title" + 25 * " " + "  mIoU  std"
    assert others == ["a" + 29 * " " + "   1.2    -", 30 * "b" + "  100.0  2.0"]


def test_the_run_gives_data_and_size_and_nothing_else(tmp_path):
    backbone = save_run(tmp_path, arch="tiny_vit", data="cifar10", bf16=True, epochs=9)
    args = dict(checkpoint=str(tmp_path), data=None, size=48, bf16=None, arch=None, epochs=None,
                stem_padding=1)
    args = SimpleNamespace(**args)
    loaded = features.load(args)
    assert (args.data, args.size, args.bf16, args.epochs) == ("cifar10", 48, True, None)
    assert args.arch == "tiny_vit" and args.run["epochs"] == 9
    assert torch.equal(loaded.pos_embed, backbone.pos_embed)
    args.size = None
    features.load(args, size=512)  # as segment wants it
    assert args.size == 512
    args.data, args.size = "shapes", None
    features.load(args, size=512)
    assert args.size == 32


# --- what is told on the way ----------------------------------------------------------------------

class Clock:
    """time.monotonic() that each look moves on."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.now = 0

    def __call__(self):
        self.now += self.seconds
        return self.now


def told(monkeypatch, capsys, steps, seconds, terminal):
    monkeypatch.setattr(features.time, "monotonic", Clock(seconds))
    monkeypatch.setattr(features.sys.stderr, "isatty", lambda: terminal, raising=False)
    assert list(features.progress(range(steps), steps, "40 images")) == list(range(steps))
    return capsys.readouterr().err


def test_progress_in_a_file_comes_by_time(monkeypatch, capsys):
    assert told(monkeypatch, capsys, 10, 0.1, False) == ""  # over before it is worth a word
    lines = told(monkeypatch, capsys, 20, 2, False).splitlines()
    assert lines[0] == "40 images: 15%, 34 s left"  # after 6 s of 40
    assert len(lines) == 4  # then every 10 s
    assert told(monkeypatch, capsys, 1000, 6, False).startswith("40 images: 0%, 100 min left\n")


def test_progress_on_a_terminal_is_one_line(monkeypatch, capsys):
    said = told(monkeypatch, capsys, 10, 2, True)
    assert "\n" not in said and said.count("\r\033[K40 images: ") == 10
    assert said.endswith("\r\033[K")  # what follows finds an empty line


def test_only_the_first_process_tells(monkeypatch, capsys):
    monkeypatch.setattr(training, "rank_and_world", lambda: (1, 2))
    assert told(monkeypatch, capsys, 20, 2, False) == ""


@pytest.mark.parametrize("line,what", [
    ("knn", "40 images"), ("linear --no-augment --epochs 1 --batch-size 16", "2 steps"),
    ("segment --steps 2 --batch-size 2", "validation images"),
    ("retrieve --subsample 1", "training images"),
    ("correspond", "40 images"), ("bag --bags 1 --epochs 1 --batch-size 16", "40 images"),
])
def test_every_protocol_tells_its_progress(monkeypatch, capsys, line, what):
    monkeypatch.setattr(shapes.Shapes, "__len__", lambda self: 40)
    monkeypatch.setattr(features.time, "monotonic", Clock(20))
    run_command(monkeypatch, f"{line} --checkpoint random --arch tiny_convnet --size 32 "
                "--workers 0")
    said = capsys.readouterr()
    assert what in said.err and " left\n" in said.err
    assert said.out.splitlines()[0].endswith("random: tiny_convnet for 32 pixels, on shapes, cpu")


def test_ctrl_c_is_one_line(tmp_path):
    started = start("-u", "-m", "evaluate", "knn", "--checkpoint", "random", "--arch",
                    "resnet50", "--size", 224, "--workers", 1)
    assert "k-NN of random" in started.stdout.readline()
    started.send_signal(signal.SIGINT)
    try:
        said, _ = started.communicate(timeout=60)
    finally:
        kill_tree(started.pid)
    assert said.splitlines() == ["interrupted"] and started.returncode == 130


# --- representations in a file --------------------------------------------------------------------

def test_features_of_a_folder_in_a_file(tmp_path, classes, monkeypatch, capsys):
    """With labels and without; on two processes; the rows are those of the names."""
    save_run(tmp_path, size=16)
    flat = make_images(tmp_path / "flat", 7, classes=0)
    (flat / "0003.jpg").write_bytes(b"not an image")
    backbone = common.build_backbone("tiny_convnet", 16).eval()
    backbone.load_state_dict(prefixed_with_backbone(tmp_path))
    for folder, count in ((classes, 27), (classes / "val", 15), (flat, 6)):
        out = tmp_path / "x.npy"
        run_command(monkeypatch, f"features --checkpoint {tmp_path} --data {folder} --out {out} "
                    "--workers 0")
        assert f"x.npy: {count} rows of 256 numbers" in capsys.readouterr().out
        rows = np.load(out, allow_pickle=False)
        names = (tmp_path / "x.txt").read_text().splitlines()
        assert rows.shape == (count, 256) and rows.dtype == np.float32 and len(names) == count
        assert not any("0003" in name for name in names)
        for row, name in list(zip(rows, names))[::4]:
            view = common.cut(Image.open(name), *features.center_view(Image.open(name), 16)[0])
            with torch.no_grad():
                _, expected = backbone(features.to_input(view[None], CPU))
            np.testing.assert_allclose(row, expected[0], rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "features.jsonl").exists()


def prefixed_with_backbone(folder):
    state = torch.load(folder / "last.pt", weights_only=True)["model"]
    return {key.removeprefix("backbone."): value for key, value in state.items()}


def _features(rank, world, folder, out):
    args = settings(data=folder, size=16, out=out)
    export.run(Means(), export.prepare(args), args)


def test_features_on_two_processes(tmp_path, classes):
    args = (str(classes), tmp_path / "two.npy")
    on_processes(2, _features, *args)
    _features(0, 1, str(classes), tmp_path / "one.npy")
    assert np.array_equal(np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy"))
    assert (tmp_path / "one.txt").read_text() == (tmp_path / "two.txt").read_text()


# --- bags of patches ------------------------------------------------------------------------------

@pytest.mark.parametrize("extra", [
    {"0.weight": torch.zeros(8, 256), "0.bias": torch.zeros(8)},
    {"conv.weight": torch.zeros(8, 256, 1, 1)}, {"layer1.weight": torch.zeros(8, 256)}])
def test_a_projector_of_another_build(tmp_path, monkeypatch, capsys, extra):
    state = prefixed(common.build_backbone("tiny_convnet", 32).state_dict(), "backbone.")
    state |= prefixed(extra, "projector.")
    flags = {"arch": "tiny_convnet", "size": 32}
    torch.save({"model": state, "args": flags}, tmp_path / "last.pt")
    said = user_error(command.main, monkeypatch, capsys, "bag", "--checkpoint", tmp_path,
                      "--workers", 0)
    assert "its projector" in said and "backbone" in said


def test_patches_have_a_share_of_the_whole_image():
    seen = []

    class Spy(Means):
        def forward(self, x):
            seen.append(x)
            return x.flatten(2).mT, x.mean((2, 3))

    y, x = np.mgrid[:375, :500]
    pixels = np.stack([y // 2, x // 2, 0 * x], 2).astype(np.uint8)
    data = common.Images(np.stack(20 * [pixels]), np.arange(20) % 2, ["a", "b"])
    args = settings(checkpoint="random", bags=[1], patch_scale=[0.2], size=16, lr=[1],
                    epochs=1, linear=True)
    bag.run(Spy(), (data, data), args)
    for x, (height, width) in ((seen[0], (375, 375)), (seen[-1], (194, 194))):
        x = 255 * x * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        rise = x[0, 0, -1, 0] - x[0, 0, 0, 0], x[0, 1, 0, -1] - x[0, 1, 0, 0]  # of 15 of 16 pixels
        assert [16 / 15 * 2 * r.item() for r in rise] == pytest.approx([height, width], rel=0.03)
    assert 194**2 / (500 * 375) == pytest.approx(0.2, rel=0.01)  # as training takes them


def test_bag_of_a_run(tmp_path, classes, monkeypatch):
    """Against patches cut one by one, with the scale, the size and the projector of the run."""
    torch.manual_seed(0)
    model = bagssl.BagSSL(common.build_backbone("tiny_convnet", 16), (8, 5)).eval()
    flags = dict(arch="tiny_convnet", size=16, patch_scale="0.25", data=str(classes), bf16=False)
    torch.save({"model": model.state_dict(), "args": flags}, tmp_path / "last.pt")
    run_command(monkeypatch, f"bag --checkpoint {tmp_path} --bags 1 4 --workers 0 --batch-size 9 "
                "--baseline --epochs 2 --lr 1")
    result, = results(tmp_path, "bag")
    found = result["rows"]
    assert result["settings"]["patch_scale"] == [0.25]
    names = ["whole image", "whole image, after the projector", "local aggregation", "bag of 1",
             "bag of 1, after the projector", "bag of 4", "bag of 4, after the projector"]
    fresh = [name for name in names if "projector" not in name]  # an untrained network has none
    folder = f"{tmp_path.parent.name}/{tmp_path.name}"
    assert list(found) == ([f"{folder}: {name}" for name in names]
                           + [f"random initialisation: {name}" for name in fresh])
    corners = {1: [(5, 5)], 4: [(0, 0), (0, 10), (10, 0), (10, 10)]}  # of 10 pixels in 20

    def bags(data, count, layer):
        rows = []
        for i in range(len(data)):
            image = data.load(i)
            patches = [common.cut(image, (*yx, 10, 10), False, 16) for yx in corners[count]]
            _, y = model.backbone(features.to_input(torch.stack(patches), CPU))
            rows.append(layer(y).mean(0))
        labels = [data.label(i) for i in range(len(data))]
        return torch.stack(rows).detach(), torch.tensor(labels)

    train, val = open_parts(classes)
    for count in corners:
        for name, layer in (("", torch.nn.Identity()), (", after the projector", model.projector)):
            queries, targets = bags(val, count, layer)
            memory = [(*bags(train, count, layer), [0])]
            predicted = knn.vote(*next(knn.nearest_rows(queries, memory, 20)), 3)
            expected = 100 * (predicted == targets).double().mean().item()
            row = found[f"{folder}: bag of {count}{name}"]
            assert row["20-NN"] == pytest.approx(expected)
            images = [common.cut(val.load(i), (0, 0, 20, 20), False, 16) for i in range(len(val))]
            _, y = model.backbone(features.to_input(torch.stack(images), CPU))
            whole = layer(y).detach()
            cosine = torch.nn.functional.cosine_similarity(queries, whole).mean().item()
            assert row["cosine"] == pytest.approx(100 * cosine, abs=1e-3)
            assert found[f"{folder}: whole image{name}"]["cosine"] is None


def test_bags_of_several_scales_and_without_holding_features(classes, monkeypatch):
    """--no-linear streams the training images' features, to the same 20-NN."""
    data = open_parts(str(classes))
    how = dict(checkpoint="random", bags=[1, 4], size=16, lr=[1], epochs=1)
    held = bag.run(Conv(), data, settings(**how, patch_scale=[0.25], linear=True))
    kept = []
    original = bag.all_features

    def spy(backbone, part, args, **how):
        kept.append(part)
        return original(backbone, part, args, **how)

    monkeypatch.setattr(bag, "all_features", spy)
    args = settings(**how, patch_scale=[0.25, 1.0], linear=False)
    streamed = bag.run(Conv(), data, args)
    assert kept and all(part is data[1] for part in kept)
    for name, row in streamed.items():
        same = held.get(name.removeprefix("scale 0.25, "))
        assert row["linear"] is None
        if same:
            assert row["20-NN"] == same["20-NN"] and row["cosine"] == same["cosine"]
    names = [f"scale {scale}, bag of {count}" for scale in ("0.25", "1") for count in (1, 4)]
    assert list(streamed) == ["whole image", "local aggregation", *names]
    for count in (1, 4):  # patches that are the whole image, all four of them
        assert streamed[f"scale 1, bag of {count}"]["cosine"] == pytest.approx(100, abs=1e-4)
    assert streamed["scale 0.25, bag of 1"]["cosine"] < 99.99


# --- images with masks ----------------------------------------------------------------------------

def striped(root, count, seed, split="train", mode="L"):
    """Images of upright bands, 8 pixels wide, black, red, green or blue by class (all 4 in each
    image), and masks of them with two rows of void."""
    rng = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (root / split / kind).mkdir(parents=True)
    for i in range(count):
        bands = np.append(rng.permutation(4), rng.integers(4)).astype(np.uint8)
        mask = bands.repeat(8)[None].repeat(32, 0)
        pixels = 255 * np.eye(4, dtype=np.uint8)[mask][..., 1:]
        Image.fromarray(pixels).save(root / split / "images" / f"{i}.png")
        mask[:2] = 255
        saved = Image.fromarray(mask)
        if mode == "P":
            saved.putpalette(list(range(256)) * 3)
        saved.save(root / split / "masks" / f"{i}.png")
    return root


@pytest.fixture
def bands(tmp_path):
    striped(tmp_path / "bands", 8, 0, mode="P")
    return str(striped(tmp_path / "bands", 5, 1, split="val"))


def open_bands(bands):
    return masks.open_masks(settings(data=bands))


class Oracle(torch.nn.Module):
    """Local features are the one-hot class of striped(), or the mixture of classes in the patch."""

    dim, stride, classes = 4, 8, 4

    def stages(self, x):
        black = common.normalize(torch.zeros(1, 3, 1, 1))
        scale = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        color = torch.nn.functional.avg_pool2d((x - black) * scale, 8)
        return [torch.cat([1 - color.sum(1, keepdim=True), color], 1)]  # (B, 4, H/8, W/8)

    def forward(self, x):
        maps = self.stages(x)[-1]
        return maps.flatten(2).mT, maps.mean((2, 3))


class Noise(Oracle):
    """Features that know nothing of the image."""

    def stages(self, x):
        return [torch.randn(len(x), 4, x.shape[2] // 8, x.shape[3] // 8)]


class Conv(Oracle):
    """Features that know something: a fixed random projection of each patch."""

    dim = 6

    def stages(self, x):
        weight = 0.05 * torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        return [torch.nn.functional.conv2d(x, weight, stride=8)]


def test_void_names_of_folders_and_classes_found(bands, monkeypatch, capsys):
    root = Path(bands)
    for part in ("train", "val"):
        (root / part / "masks").rename(root / part / "labels")
    flags = ("--checkpoint random --arch tiny_convnet --size 32 --workers 0 --steps 2 --lr 0.1 "
             f"--batch-size 2 --data {bands}")
    run_command(monkeypatch, f"segment {flags} --masks labels --void 2")
    said = capsys.readouterr().out
    assert "8 masks with the classes [0 1 3]" in said and "5 masks with the classes [0 1 3]" in said
    shown = re.search(r"lr 0.1, IoU of class 0: ([\d.]+), 1: ([\d.]+), 3: ([\d.]+)\n", said)
    (mean,) = re.findall(r"lr 0.1 +([\d.]+)\n", said)
    assert np.mean([float(iou) for iou in shown.groups()]) == pytest.approx(float(mean), abs=0.1)
    for folder in (root, "nowhere"):
        assert "train/masks" in user_error(command.main, monkeypatch, capsys, *["segment"],
                                           *flags.replace(bands, str(folder)).split())


def test_mean_iou():
    mask = torch.tensor([[0, 0, 1, 1, -1, 3]])
    predicted = torch.tensor([[0, 1, 1, 2, 0, 3]])
    counts = heads.confusion(predicted, mask, 5)
    assert counts.sum() == 5  # void is ignored
    # class 0: 1 of 2; class 1: 1 of 3; class 3: 1 of 1; classes 2 and 4 are not in the mask
    assert heads.mean_iou(counts) == pytest.approx(100 * (1 / 2 + 1 / 3 + 1) / 3)


def test_majority_of_a_patch():
    mask = torch.tensor([[0, 0, 2, -1], [0, 1, -1, -1], [-1, -1, 1, 1], [-1, -1, 1, 0]])
    cell = retrieve.cells(mask, 2, 2)
    assert retrieve.majority(mask, cell, 4, 3).tolist() == [0, 2, -1, 1]
    assert retrieve.cells(torch.zeros(3, 4), 1, 2).tolist() == 3 * [[0, 0, 1, 1]]


def test_oracle_and_random_features(bands):
    data = open_bands(bands)
    assert [len(part) for part in data] == [8, 5]
    assert data[0].num_classes == data[1].num_classes == 4
    for backbone, steps, low, high in ((Oracle(), 60, 99.9, 100), (Noise(), 5, 0, 35)):
        torch.manual_seed(0)
        args = settings(lr=[10, 0.5], steps=steps)
        for row in retrieve.run(backbone, data, args, k=5).values():
            assert low <= row["pixel mIoU"] <= high and low <= row["patch mIoU"] <= high
        found = segmentation.run(backbone, data, args)
        assert set(found) == {"lr 10", "lr 0.5", "best"} and low <= found["best"]["mIoU"] <= high


def iou(predicted, truth):
    """The mean over the classes in `truth` of IoU in %; void, 255, is left out of both."""
    known = truth != 255
    values = []
    for c in np.unique(truth[known]):
        a, b = (predicted == c) & known, truth == c
        values.append((a & b).sum() / (a | b).sum())
    return 100 * np.mean(values)


def test_retrieve_is_brute_force(bands):
    backbone = Conv()

    def patches(data):
        """Features and labels of all patches, and the masks."""
        rows, labels, whole = [], [], []
        for i in range(len(data)):
            image, mask = data.pair(i)
            x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
            maps = backbone.stages(features.to_input(x, CPU))[0]
            mask = np.array(mask)
            for y in range(0, 32, 8):
                for x in range(0, 40, 8):
                    ids = [v for v in mask[y:y + 8, x:x + 8].flatten() if v != 255]
                    rows.append(maps[0, :, y // 8, x // 8])
                    labels.append(max(set(ids), key=ids.count))
            whole.append(mask)
        return torch.stack(rows), np.array(labels), np.stack(whole)

    data = open_bands(bands)
    memory, classes, _ = patches(data[0])
    queries, labels, truth = patches(data[1])
    nearest = [torch.cosine_similarity(memory, q[None], 1).argmax() for q in queries]
    predicted = classes[nearest]
    pixels = predicted.reshape(5, 4, 5).repeat(8, 1).repeat(8, 2)  # (5, 32, 40)
    for chunk in (2, 100):
        found = retrieve.run(Conv(), data, settings(chunk=chunk), k=1)["1/1 of the images"]
        assert found["patch mIoU"] == pytest.approx(iou(predicted, labels))
        assert found["pixel mIoU"] == pytest.approx(iou(pixels, truth))
        assert found["std over draws"] is None  # of all images there is one draw

    scores = []
    for draw in range(3):  # of half of the images, with 20 patches each
        images = np.random.default_rng((2, draw)).permutation(8)[:4]
        rows = (20 * images[:, None] + np.arange(20)).flatten()
        nearest = [torch.cosine_similarity(memory[rows], q[None], 1).argmax() for q in queries]
        scores.append(iou(classes[rows[nearest]], labels))
    found = retrieve.run(Conv(), data, settings(runs=3), k=1)["1/2 of the images"]
    assert found["patch mIoU"] == pytest.approx(np.mean(scores))
    assert found["std over draws"] == pytest.approx(np.std(scores, ddof=1))


def test_deviation_over_draws(bands, monkeypatch):
    values = iter([50.0, 1, 10, 1, 20, 1, 60, 1])  # of all images; of three draws: patches, pixels
    monkeypatch.setattr(retrieve, "mean_iou", lambda counts: next(values))
    found = retrieve.run(Conv(), open_bands(bands), settings(runs=3), k=1)
    assert found["1/2 of the images"]["patch mIoU"] == 30
    assert found["1/2 of the images"]["std over draws"] == pytest.approx(700**0.5)  # n - 1 = 2


# --- clusters -------------------------------------------------------------------------------------

def test_pure_pixels():
    cluster = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 2]])
    mask = torch.tensor([[3, 3, 0, 1], [1, -1, -1, -1]])
    # Two of cluster 0 in class 3, both of cluster 1 in class 1; cluster 2 has only void.
    assert clusters.pure_pixels(cluster, mask, 4, 5).tolist() == [4, 5]


def test_positions_of_the_mirror_image():
    positions = clusters.mirrored_positions(2, 3, CPU).view(2, 2, 3, 2)
    assert positions[0].tolist() == [[[0, 0], [0, 1], [0, 2]], [[1, 0], [1, 1], [1, 2]]]
    assert positions[1].tolist() == [[[0, 2], [0, 1], [0, 0]], [[1, 2], [1, 1], [1, 0]]]


def test_clusters_are_those_of_an_image_and_its_mirror_image(bands, monkeypatch):
    seen = []
    stages = Conv.stages
    monkeypatch.setattr(Conv, "stages", lambda self, x: seen.append(x) or stages(self, x))
    clusters.run(Conv(), open_bands(bands), settings(images=2, run={}))
    assert len(seen) == 2
    for plain, mirrored in seen:
        assert torch.equal(mirrored, plain.flip(2)) and not torch.equal(mirrored, plain)


def test_clusters_of_features_that_know_the_classes_are_pure(bands):
    data = open_bands(bands)
    args = settings(images=5, run=dict(num_objects=12))
    knows = clusters.run(Oracle(), data, args)[""]
    knows_not = clusters.run(Noise(), data, args)[""]
    assert min(knows.values()) > 90 and knows_not["features"] < knows["features"] - 20
    args = settings(images=5, run=dict(num_objects=12, pos_weight=0.0))
    assert clusters.run(Oracle(), data, args)[""] == dict.fromkeys(knows, knows["features"])
    args = settings(images=5, run=dict(num_objects=1000))  # more than an image has locations
    assert clusters.run(Oracle(), data, args)[""]["features"] > 90


# --- matches --------------------------------------------------------------------------------------

class Pixels(Oracle):
    """The mean color of a cell: the flip is found where the colors hold."""

    def stages(self, x):
        return [torch.nn.functional.avg_pool2d(x, 8)]


def test_correspond(monkeypatch):
    data = common.open_data("shapes", "val", 64)
    data.length = 6
    found = correspond.run(Pixels(), data, settings(size=64))[""]
    assert found["chance"] == 100 / 64
    assert found["flip"] > 2 * found["chance"]
    assert found["location = feature"] > 2 * found["chance"]
    monkeypatch.setattr(correspond, "transformed", lambda x: features.to_input(x.flip(3), CPU))
    noise = common.Images(np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8))
    assert correspond.run(Pixels(), noise, settings())[""]["flip"] == 100
    # an image whose color tells the place: the feature's match is that of the location
    y, x = np.mgrid[:256, :256]
    place = common.Images(np.stack(20 * [np.stack([y, x, 0 * x], 2)]).astype(np.uint8))
    found = correspond.run(Pixels(), place, settings(size=64))[""]
    assert found["location = feature"] > 97


def test_crop_matches_are_brute_force():
    torch.manual_seed(1)
    boxes = torch.tensor([[[0.0, 0, 80, 60], [20, 10, 40, 80]], [[5, 5, 30, 30], [0, 0, 90, 90]]])
    flips = torch.tensor([[False, True], [True, False]])
    a, b = torch.randn(2, 16, 3), torch.randn(2, 16, 3)
    kept, agree = correspond.crop_matches(a, b, boxes, flips, 4, 5)

    def center(box, flip, i):
        top, left, height, width = box.tolist()
        y, x = divmod(i, 4)
        x = 3 - x if flip else x
        return np.array([top + (y + 0.5) * height / 4, left + (x + 0.5) * width / 4])

    for n in range(2):
        centers = [[center(boxes[n, v], flips[n, v], i) for i in range(16)] for v in (0, 1)]
        top, left, height, width = boxes[n, 1].tolist()
        found = []
        for i, (y, x) in enumerate(centers[0]):
            distance = (a[n, i] - b[n]).norm(dim=1)
            near = np.argmin([np.hypot(*(centers[0][i] - other)) for other in centers[1]])
            if top <= y <= top + height and left <= x <= left + width:
                found.append((distance.min().item(), i, near == distance.argmin().item()))
        best = sorted(found)[:5]
        assert kept[n].nonzero().flatten().tolist() == sorted(i for _, i, _ in best)
        assert agree[n].nonzero().flatten().tolist() == sorted(i for _, i, same in best if same)


def test_transformed_is_mirrored_and_recolored():
    torch.manual_seed(0)
    x = (255 * torch.rand(200, 3, 8, 8)).byte()
    y = correspond.transformed(x)
    plain = common.normalize(x.float().flip(3) / 255)
    same = (y - plain).abs().amax((1, 2, 3)) < 1e-5
    gray = (common.normalize(torch.zeros(1, 3, 1, 1)) - y) * torch.tensor(
        [0.229, 0.224, 0.225]).view(3, 1, 1)
    gray = (gray - gray.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
    # neither jitter (0.8) nor gray (0.2) nor blur (0.5); gray
    assert 3 <= same.sum() <= 35 and 20 <= gray.sum() <= 65


# --- few shots ------------------------------------------------------------------------------------

def test_logistic_regression_is_at_its_optimum():
    torch.manual_seed(0)
    x = torch.randn(2, 25, 8, dtype=torch.float64)
    queries = torch.randn(2, 7, 8, dtype=torch.float64)
    x = x / x.norm(dim=2, keepdim=True)
    y = torch.eye(5, dtype=torch.float64).repeat_interleave(5, 0)
    found = fewshot.logistic_regression(x, y, queries)
    for i in range(2):
        w = torch.zeros(8, 5, dtype=torch.float64, requires_grad=True)
        b = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([w, b], max_iter=100, tolerance_grad=1e-8,
                                   tolerance_change=1e-12)

        def loss(w=w, b=b, x=x[i], solver=solver):
            value = torch.nn.functional.cross_entropy(x @ w + b, y, reduction="sum")
            value = value + w.square().sum() / 2
            solver.zero_grad()
            value.backward()
            return value

        solver.step(loss)
        torch.testing.assert_close(found[i], (queries[i] @ w + b).detach(), atol=1e-5, rtol=1e-5)


def test_episodes():
    members = [torch.arange(30) + 100 * c for c in range(8)]
    rows = fewshot.draw_episode(members, 5, 20, torch.Generator().manual_seed(0))
    assert rows.shape == (5, 20)
    assert (rows // 100 == rows[:, :1] // 100).all()  # a class in each row
    assert len((rows[:, 0] // 100).unique()) == 5  # five of them
    assert all(len(row.unique()) == 20 for row in rows)


def test_too_few_images_for_episodes(classes):
    train, _ = open_parts(classes)
    with pytest.raises(common.UserError, match="need 5 classes of 20 images or more"):
        fewshot.run(Means(), train, settings(size=16))


# --- processes ------------------------------------------------------------------------------------

def concatenated(rank, world):
    """Three rows and their columns from unequal parts, one of them empty."""
    x = torch.arange(6.0).view(3, 2)
    rows = []
    for sizes in ([3] + [0] * (world - 1), [1] * (world - 1) + [4 - world]):
        own = x.split(sizes)[rank]
        columns = features.concatenated(own.T, dim=1)
        rows += [features.concatenated(own).tolist(), columns.T.tolist()]
    return rows


def _protocols(rank, world, classes, bands):
    data = open_parts(classes)
    pairs = open_bands(bands)
    small = settings(size=16)
    return {
        "knn": knn.run(Means(), data, small, ks=(1, 5)),
        "linear": linear.run(Means(), data, small),
        "cached": linear.run(Means(), data, settings(size=16, augment=False, lr=[10])),
        "segment": segmentation.run(Conv(), pairs, settings()),
        "retrieve": retrieve.run(Conv(), pairs, settings(), k=3),
        "clusters": clusters.run(Conv(), pairs, settings(images=5, run={})),
        "correspond": correspond.run(Conv(), pairs[1].images, settings(), batch_size=2),
        "bag": bag.run(Conv(), data, settings(checkpoint="random", bags=[1, 4], patch_scale=[0.25],
                                              size=16, lr=[10], linear=True)),
        "fewshot": fewshot.run(Means(), data[0], small, ways=3, shots=2, queries=3, episodes=120),
        "concatenated": concatenated(rank, world),
    }


def test_two_processes_find_the_same_as_one(tmp_path, classes, bands):
    (classes / "val" / "class0" / "broken.png").write_bytes(b"not an image")
    one = _protocols(0, 1, str(classes), bands)
    assert list(one["knn"][""]) == ["1-NN", "1-NN weighted", "5-NN", "5-NN weighted"]
    assert one["knn"][""]["5-NN"] == 100
    assert one["linear"]["best"]["top-1"] > 60 and one["cached"]["lr 10"]["top-1"] > 90
    assert one["fewshot"][""]["accuracy"] > 90
    for two in on_processes(2, tmp_path / "group", _protocols, str(classes), bands):
        for name in ("linear", "cached", "segment", "correspond"):
            for row in one[name]:
                assert two[name][row] == pytest.approx(one[name][row], abs=0.2), (name, row)
        for name in ("knn", "retrieve", "clusters", "fewshot", "concatenated"):
            assert two[name] == one[name]
        for row in one["bag"]:
            assert two["bag"][row]["20-NN"] == one["bag"][row]["20-NN"]


# --- training the backbone, and its stages --------------------------------------------------------

def test_finetuning_and_heads(tmp_path, bands):
    colored(tmp_path / "data" / "train", 12, 0)
    colored(tmp_path / "data" / "val", 4, 1)
    backbone = common.build_backbone("tiny_convnet")
    before = backbone[0].weight.clone()
    args = settings(data=str(tmp_path / "data"), finetune=True, labels=0.1, batch_size=3, lr=None)
    found = linear.run(backbone, linear.prepare(args), args)
    assert found["lr 0.1"]["top-1"] >= 0 and args.epochs == 2
    assert not torch.equal(before, backbone[0].weight)
    data = open_bands(bands)
    for arch, flags in (("tiny_vit", dict(layers=4, lr=None)),
                        ("tiny_convnet", dict(layers=4, head="fcn", finetune=True)),
                        ("resnet18", dict())):
        backbone = common.build_backbone(arch)
        before = [p.clone() for p in backbone.parameters()]
        found = segmentation.run(backbone, data, settings(**{"steps": 2, "lr": [0.1], **flags}))
        assert all(0 <= row["mIoU"] <= 100 for row in found.values())
        assert ("lr 0.0008" in found) == (arch == "tiny_vit")
        # each rate starts from the same
        assert all(torch.equal(p, q) for p, q in zip(before, backbone.parameters()))


def test_linear_recipes():
    args = settings(data="shapes", epochs=None)
    linear.prepare(args)
    assert args.epochs == 100
    args = settings(data="shapes", epochs=None, finetune=True, labels=0.01)
    linear.prepare(args)
    assert (args.epochs, args.lr) == (20, [0.08])


def test_stages(monkeypatch):
    monkeypatch.setitem(common.CONVNEXTS, "convnext_tiny", ((8, 16, 24, 32), (1, 1, 2, 1)))
    x = torch.randn(1, 3, 64, 96)
    for arch in ("tiny_convnet", "resnet18", "convnext_tiny", "tiny_vit"):
        backbone = common.build_backbone(arch).eval()
        with torch.no_grad():
            maps, stages = backbone(x)[0], backbone.stages(x)
        assert len(stages) == 4 and torch.equal(stages[-1].flatten(2).mT, maps), arch
    resnet = common.build_backbone("resnet18").eval()
    before = resnet.stages(x)[-1]
    segmentation.dilate(resnet)
    after = resnet.stages(x)[-1]
    assert after.shape == (1, 512, 4, 6) and resnet.stride == 16
    torch.testing.assert_close(after[..., ::2, ::2], before)  # the same function, at more places
    assert segmentation.local_features(resnet, x, 4).shape == (1, 64 + 128 + 256 + 512, 16, 24)


# --- masks ----------------------------------------------------------------------------------------

def test_layouts_of_masks(tmp_path):
    for kind in ("images", "annotations"):
        for split in ("training", "validation"):
            (tmp_path / kind / split).mkdir(parents=True)
            pixels = Image.fromarray(np.array([[0, 1, 150]], np.uint8))
            pixels.save(tmp_path / kind / split / "ADE_1.png")
    train, val = masks.open_masks(settings(data=str(tmp_path)))
    assert train.num_classes == val.num_classes == 151
    assert masks.targets(train.pair(0)[1]).tolist() == [[-1, 1, 150]]
    scenes = masks.open_masks(settings(data="shapes", size=64))[1]
    image, mask = scenes.pair(3)
    assert image.size == mask.size == (96, 96)
    assert np.array(mask).max() < scenes.num_classes == 13


def test_voc(tmp_path, monkeypatch):
    names = []
    for folder in ("JPEGImages", "SegmentationClass"):
        (tmp_path / "VOC2012" / folder).mkdir(parents=True)
    for i in range(2):
        names.append(str(tmp_path / "VOC2012" / "JPEGImages" / f"{i}.jpg"))
        Image.new("RGB", (8, 6)).save(names[-1])
        mask = Image.fromarray(np.full((6, 8), [20, 255][i], np.uint8))
        mask.save(tmp_path / "VOC2012" / "SegmentationClass" / f"{i}.png")
    monkeypatch.setattr(common, "open_data", lambda name, split: common.Images(names))
    train, _ = masks.open_masks(settings(data="voc"))
    assert train.num_classes == 21 and np.array(train.pair(0)[1]).tolist() == 6 * [8 * [20]]


def test_many_classes(tmp_path, monkeypatch, capsys):
    """A confusion of 200 classes: ids of 8 bits are not counted with in 8 bits."""
    for part in ("train", "val"):
        folder = striped(tmp_path, 2, 0, split=part) / part / "masks"
        for path in folder.iterdir():
            ids = np.array(Image.open(path))
            ids[ids == 3] = 199
            _save(ids, path)
    for line in ("retrieve --subsample 1", "segment --steps 1 --batch-size 2 --lr 1"):
        run_command(monkeypatch, f"{line} --checkpoint random --arch tiny_convnet --size 32 "
                    f"--data {tmp_path} --workers 0")
    assert "199: " in capsys.readouterr().out


def test_crops_keep_image_and_mask_together(bands):
    crops = masks.Crops(open_bands(bands)[0], 32)
    for epoch in range(4):
        image, mask = crops[epoch, 0]
        inner = mask >= 0
        black = 255 - image.float().sum(0, keepdim=True)
        right = torch.cat([black, image]).argmax(0)[inner] == mask[inner]
        assert right.float().mean() > 0.95  # but where bicubic resizing blurs the bands
        assert torch.equal(image, crops[epoch, 0][0])


def _save(array, path):
    Image.fromarray(np.array(array, np.uint8)).save(path)


def _halve(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _disguise(path):
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 32\nshowpage\n")


@pytest.mark.parametrize("name,spoil,words", [
    ("size", lambda d: _save(np.zeros((9, 7)), d / "train/masks/1.png"),
     "train/masks/1.png is no 8-bit image of class ids, of (40, 32) pixels as its "
     "image: its mode is L, its size (7, 9)"),
    ("ids", lambda d: _save(np.full((32, 40), 9), d / "val/masks/2.png"),
     "val/masks/2.png holds the class id 9"),
    ("missing", lambda d: (d / "val/masks/0.png").unlink(), "val/images/0.png has no mask"),
    ("empty", lambda d: [p.unlink() for p in (d / "val/images").iterdir()], "no images in"),
    ("color", lambda d: _save(np.zeros((32, 40, 3)), d / "train/masks/0.png"),
     "train/masks/0.png is no 8-bit"),
    ("broken", lambda d: (d / "train/masks/0.png").write_bytes(b"?"), "train/masks/0.png"),
    ("program", lambda d: _disguise(d / "train/masks/0.png"), "train/masks/0.png"),
    ("truncated", lambda d: _halve(d / "val/images/0.png"), "cannot read"),
])
def test_bad_masks(tmp_path, monkeypatch, capsys, name, spoil, words):
    striped(striped(tmp_path, 3, 0), 3, 1, split="val")
    spoil(tmp_path)
    said = user_error(command.main, monkeypatch, capsys, "retrieve", "--checkpoint", "random",
                      "--arch", "tiny_convnet", "--data", tmp_path, "--workers", 0)
    assert words in said


def test_nothing_imports_evaluate_but_what_shows_results():
    root = Path(common.__file__).parent
    for name in ("common", "shapes", "weights", "training", "vicreg"):
        assert "import evaluate" not in (root / f"{name}.py").read_text()
        assert "from evaluate" not in (root / f"{name}.py").read_text()


def test_a_worker_that_dies_is_one_line(monkeypatch, capsys):
    def dies(*_, **__):
        raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error.")

    monkeypatch.setattr(torch.utils.data, "DataLoader", dies)
    with pytest.raises(SystemExit) as stop, training.orderly_exit():
        training.data_loader([], 0)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "--shm-size" in said and said.count("\n") == 1


def test_stem_of_solo_learn(tmp_path):
    """Its ResNets of CIFAR pad the first convolution by 2: 32 pixels become 5 x 5 locations."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    theirs.conv1 = torch.nn.Conv2d(3, 64, 3, stride=1, padding=2, bias=False)
    theirs.maxpool = torch.nn.Identity()
    theirs.fc = torch.nn.Identity()
    state = {f"backbone.{key}": value for key, value in theirs.eval().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "solo.ckpt")
    args = settings(checkpoint=str(tmp_path / "solo.ckpt"), arch="resnet18", stem_padding=2,
                    data=None, size=None, bf16=None)
    backbone = features.load(args)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps, pooled = backbone(x)
        torch.testing.assert_close(pooled, theirs(x))
    assert maps.shape == (2, 25, 512)
    assert features.untrained(args, backbone).conv1.padding == (2, 2)
    args.stem_padding = 1
    with torch.no_grad():
        assert not torch.allclose(features.load(args)(x)[1], pooled, rtol=0.1)
