"""training.py: optimizer, flags and bad input, a run's files, how it resumes and stops."""
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import (
    METHODS,
    STEPS,
    Command,
    assert_same,
    at_step,
    checkpoint,
    interrupted,
    lines,
    make_images,
    run,
)

import common
import training
import vicreg

GOLDEN = Path(__file__).parent / "golden"

# --- optimization ---------------------------------------------------------------------------------

def test_lars_golden():
    g = {key: torch.tensor(value) for key, value in np.load(GOLDEN / "lars.npz").items()}
    options = {key: g[key].item() for key in ("weight_decay", "momentum", "eta")}
    params = [torch.nn.Parameter(g[f"init_{i}"].clone()) for i in range(4)]
    lars = training.LARS(params, **options)
    for step in range(6):
        if step == 3:  # the state survives a checkpoint
            state = lars.state_dict()
            lars = training.LARS(params, weight_decay=0.5)
            lars.load_state_dict(state)
        for i, p in enumerate(params):
            p.grad = g[f"grad_{i}"][step].clone()
        lars.param_groups[0]["lr"] = g["lr"][step].item()
        lars.step()
    for i, p in enumerate(params):
        torch.testing.assert_close(p.data, g[f"final_{i}"], rtol=1e-9, atol=1e-12)


def test_cosine_schedule():
    values = [training.cosine_schedule(step, 100, 10, 2.0, 0.5) for step in range(101)]
    assert values[0] == 0 and values[5] == 1.0 and values[10] == 2.0
    assert values[55] == pytest.approx(1.25) and values[100] == 0.5
    assert all(a > b for a, b in zip(values[10:], values[11:]))
    assert training.cosine_schedule(0, 10, 0, 1.0, 0.0) == 1.0


def test_probe_leaves_unknown_labels_out():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 0.0]])
    loss, metrics = training.probe(logits, torch.tensor([0, 0, -1]))
    expected = torch.nn.functional.cross_entropy(logits[:2], torch.tensor([0, 0]))
    torch.testing.assert_close(loss, expected)
    assert metrics["accuracy"] == 0.5
    assert training.probe(None, torch.tensor([0])) == (0.0, {})
    loss, metrics = training.probe(logits, torch.tensor([-1, -1, -1]))
    assert loss == 0 and metrics["accuracy"] == 0


# --- what a mistake gets --------------------------------------------------------------------------

BAD = [  # flags; what the one line says
    ("--data nowhere", "no data set 'nowhere'.*looked for.*--data shapes"),
    ("--data EMPTY", r"no images in .*\.jpg"),
    ("--data FILE", "no data set"),
    ("--batch-size 1", "--batch-size 1: .*2 or more"),
    ("--batch-size 64", "--batch-size 64 .* the 44 images"),
    ("--arch resnet19", "no architecture 'resnet19'.*resnet18"),
    ("--size 7", "--size 7 is below 8, one stride"),
    ("--size 0", "--size 0: it must be at least 1 "),
    ("--epochs 0", "--epochs 0: it must be at least 1 "),
    ("--epochs 1.5", "--epochs.*1.5"),
    ("--base-lr -1", "--base-lr -1.0: it must be at least 0 "),
    ("--base-lr nan", "--base-lr nan"),
    ("--base-lr much", "--base-lr.*much.*--help"),
    ("--final-lr -1", "--final-lr -1"),
    ("--weight-decay -1", "--weight-decay -1"),
    ("--warmup-epochs -1", "--warmup-epochs -1"),
    ("--seed -1", "--seed -1"),
    ("--workers -1", "--workers -1"),
    ("--save-minutes -1", "--save-minutes -1"),
    ("--log-every 0", "--log-every 0"),
    ("--keep-every -1", "--keep-every -1"),
    ("--recipe best", "--recipe.*best.*small"),
    ("--max-megapixels 0", "--max-megapixels 0"),
    ("--views best", "--views.*best.*paper"),
    ("--projector wide", "--projector.*wide"),
    ("--no-such-flag", "no-such-flag.*--help"),
    ("--out FILE", "cannot write in .*--out"),
    *((["--name", name], "--name .*: it must be the name of a folder")
      for name in ("../x", "/tmp/x", "a/b", "", ".", "..", "a\nb", "\udcff", "x/")),
]


@pytest.mark.parametrize("wrong,words", BAD)
def test_bad_input(wrong, words, flags, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").touch()
    wrong = wrong.split() if isinstance(wrong, str) else wrong
    wrong = [tmp_path / word if word in ("EMPTY", "FILE") else word for word in wrong]
    args = (*flags("vicreg"), "--out", out, *wrong)
    said = helpers.user_error(vicreg.main, monkeypatch, capsys, *args)
    assert re.search(words, said), said
    assert not list(out.rglob("*.pt")) and set(os.listdir(tmp_path)) == {"out", "EMPTY", "FILE"}


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_of_every_method(method, flags, tmp_path, capsys):
    for wrong in (["--data", "nowhere"], ["--arch", "resnet19"], ["--batch-size", 64], ["--x"]):
        assert run(method, *flags(method), "--out", tmp_path, *wrong) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("error: "), said


def test_a_recipe_gives_the_defaults(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(vicreg, "train", seen.append)
    monkeypatch.setenv("DATA", str(tmp_path))

    def args_of(*args):
        assert run("vicreg", *args) == 0
        return seen[-1]

    args = args_of()
    assert args.data == "shapes" and args.arch == "tiny_convnet" and args.name == "vicreg-shapes"
    args = args_of("--data", "cifar10", "--base-lr", 7)
    assert args.arch == "resnet34" and args.base_lr == 7 and args.projector == [4096, 128]
    assert args_of("--data", "/some/where/imagenet100").batch_size == 1024
    flowers = make_images(tmp_path / "flowers", 4, classes=0)
    args = args_of("--data", flowers)
    assert args.recipe == "small" and args.batch_size == 128 and args.name == "vicreg-flowers"
    assert args_of("--data", "voc").recipe == "small"  # without a download
    assert args_of("--arch", "vit_tiny_patch16_224").arch == "vit_tiny_patch16"
    assert args_of("--data", flowers, "--recipe", "imagenet").batch_size == 2048
    monkeypatch.setattr(training, "FEW_IMAGES", 4)
    args = args_of("--data", flowers)
    assert args.recipe == "imagenet" and args.batch_size == 2048 and args.base_lr == 0.2


@pytest.mark.parametrize("method", METHODS)
def test_help_gives_each_flag_a_sentence_and_its_default(method, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    flowers = make_images(tmp_path / "flowers", 4, classes=0)
    assert run(method, "--data", flowers, "--help") == 0
    said = capsys.readouterr().out
    _, _, flags = said.partition("options:")
    entries = re.findall(r"^  (-.*?)(?=^  -|\Z)", flags, re.MULTILINE | re.DOTALL)
    assert len(entries) > 20
    for entry in entries:
        assert re.search(r"  \S+ ?.*\w", entry.replace("\n", " ")), entry
        assert "-h, --help" in entry or "(default: " in entry, entry
    assert "vit_tiny" in said if method == "cribo" else "(default: resnet18)" in said
    assert f"(default: {method}-flowers)" in said


# --- resumed to the bit ---------------------------------------------------------------------------

class Killed(BaseException):
    """In place of SIGKILL: nothing of the run catches it, and nothing more is written."""


def killed():
    raise Killed


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_is_bit_identical(method, flags, undisturbed, tmp_path, monkeypatch,
                                              capsys):
    command = (method, *flags(method), "--out", tmp_path, "--name", "cut")
    at_step(monkeypatch, 2, killed)
    assert run(*command, "--workers", 1) == 1
    assert checkpoint(tmp_path / "cut")["step"] == 2 and len(lines(tmp_path / "cut")) == 3
    for number, step in zip(SIGNALS, (5, 9, 14)):
        at_step(monkeypatch, step, interrupted(number))
        assert run(*command, "--save-minutes", 60) == 0
        assert f"{number.name}: saved at step {step + 1}" in capsys.readouterr().out
        assert checkpoint(tmp_path / "cut")["step"] == step + 1
    at_step(monkeypatch, 17, killed)
    assert run(*command) == 1
    capsys.readouterr()
    assert run(*command, "--workers", 2) == 0
    assert "resumed at step 17" in capsys.readouterr().out
    assert_same(undisturbed(method), tmp_path / "cut")
    assert len(lines(tmp_path / "cut")) == STEPS


def die_in_a_save(monkeypatch, moment, at_save):
    """Ends the run at a moment of one of its saves, of which each begins with backbone.pt."""
    saves = 0
    replace, link, fsync, save = os.replace, os.link, os.fsync, torch.save

    def moving(move, source, target):
        nonlocal saves
        name = Path(target).name
        saves += name == "backbone.pt"
        if saves == at_save and moment == f"before {name}":
            killed()
        move(source, target)
        if saves == at_save and moment == f"after {name}":
            killed()

    def dying_fsync(descriptor):
        if saves == at_save and moment == "at fsync":
            killed()
        fsync(descriptor)

    def dying_save(state, file):
        if saves == at_save and moment == "half written":
            file.write(b"half a checkpoint")
            killed()
        save(state, file)

    monkeypatch.setattr(os, "replace", lambda *names: moving(replace, *names))
    monkeypatch.setattr(os, "link", lambda *names: moving(link, *names))
    monkeypatch.setattr(os, "fsync", dying_fsync)
    monkeypatch.setattr(torch, "save", dying_save)


MOMENTS = ["before backbone.pt", "after backbone.pt", "half written", "at fsync",
           "before previous.pt", "after previous.pt", "before last.pt", "after last.pt"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("at_save", [1, 2, 3])
def test_killed_in_a_save(moment, at_save, flags, undisturbed, tmp_path, monkeypatch, capsys):
    short = ("--epochs", 1)
    command = ("vicreg", *flags("vicreg"), *short, "--out", tmp_path, "--name", "cut")
    with monkeypatch.context() as patch:
        die_in_a_save(patch, moment, at_save)
        # The first save has nothing to put away as previous.pt.
        missed = at_save == 1 and "previous" in moment
        assert run(*command) == (0 if missed else 1)
    capsys.readouterr()
    assert run(*command) == 0
    if not missed:
        done = at_save - (moment != "after last.pt")
        said = "a new run" if done == 0 else f"resumed at step {done}"
        assert said in capsys.readouterr().out
    assert_same(undisturbed("vicreg", *short), tmp_path / "cut")
    assert {path.name for path in (tmp_path / "cut").iterdir()} <= {
        "lock", "log.jsonl", "backbone.json", "backbone.pt", "last.pt", "previous.pt"}


def test_randomness_is_a_function_of_seed_step_and_rank():
    def draw(*numbers):
        torch.manual_seed(common.seed_of(*numbers))
        return torch.rand(3)

    assert torch.equal(draw(0, 1, 0, 1), draw(0, 1, 0, 1))
    draws = [draw(*key) for key in ((0, 1, 0, 1), (1, 1, 0, 1), (0, 2, 0, 1), (0, 1, 1, 1))]
    assert len({tuple(values.tolist()) for values in draws}) == 4


def test_another_seed_is_another_run(flags, undisturbed, tmp_path):
    short = ("--epochs", 1)
    command = (*flags("vicreg"), *short, "--seed", 1, "--out", tmp_path, "--name", "other")
    assert run("vicreg", *command) == 0
    whole = undisturbed("vicreg", *short)
    assert lines(tmp_path / "other")[0]["loss"] != lines(whole)[0]["loss"]


# --- checkpoints ----------------------------------------------------------------------------------

def _flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1:]


DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:len(data) // 2],
    "short": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "missing": None,
}


def damaged(folder, target, damage, files=("last.pt",)):
    """A copy of a run's folder with these files damaged."""
    shutil.copytree(folder, target)
    for name in files:
        data = (target / name).read_bytes()
        (target / name).unlink()
        if DAMAGES[damage]:
            (target / name).write_bytes(DAMAGES[damage](data))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, flags, undisturbed, tmp_path,
                                                           monkeypatch, capsys):
    folder = tmp_path / "cut"
    damaged(undisturbed("vicreg"), folder, damage)
    with open(folder / "log.jsonl", "ab") as log:
        log.write(b"\0\xff\0\n7\n{}\n" + b"\0" * 100)  # as a crash of the machine may leave it
    before = contents(folder)
    command = ("vicreg", *flags("vicreg"), "--out", tmp_path, "--name", "cut")

    with monkeypatch.context() as patch:  # before the next save, neither is touched
        patch.setattr(training.Run, "batches", lambda self, sample: killed())
        assert run(*command) == 1
    after = contents(folder)
    for name in ("last.pt", "previous.pt"):
        assert after.get(name) == before.get(name)

    capsys.readouterr()
    assert run(*command) == 0
    said = capsys.readouterr()
    assert f"resumed at step {STEPS - 1}" in said.out
    assert said.err.count("warning: cannot read") == (damage != "missing")
    assert_same(undisturbed("vicreg"), folder)


def test_no_whole_checkpoint_is_an_error(flags, undisturbed, tmp_path, monkeypatch, capsys):
    damaged(undisturbed("vicreg"), tmp_path / "cut", "truncated", ["last.pt", "previous.pt"])
    before = contents(tmp_path / "cut")
    args = (*flags("vicreg"), "--out", tmp_path, "--name", "cut")
    said = helpers.user_error(vicreg.main, monkeypatch, capsys, *args)
    assert "no whole checkpoint in" in said and "another --name" in said
    assert contents(tmp_path / "cut") == before


class Planted:
    def __reduce__(self):
        return os.mkdir, (os.environ["PLANTED"],)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_planted_pickle_does_not_run(zipped, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PLANTED", str(tmp_path / "ran"))
    (tmp_path / "cut").mkdir()
    planted = tmp_path / "cut" / "last.pt"
    torch.save({"model": Planted()}, planted, _use_new_zipfile_serialization=zipped)
    args = (*flags("vicreg"), "--out", tmp_path, "--name", "cut")
    said = helpers.user_error(vicreg.main, monkeypatch, capsys, *args)
    assert "no whole checkpoint in" in said and not (tmp_path / "ran").exists()
    torch.load(planted, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have run


def test_resume_with_other_arguments(flags, undisturbed, tmp_path, monkeypatch, capsys):
    shutil.copytree(undisturbed("vicreg"), tmp_path / "cut")
    other = ("--base-lr", 2, "--seed", 7, "--var-coeff", 3, "--batch-size", 10)
    args = (*flags("vicreg"), "--out", tmp_path, "--name", "cut")
    said = helpers.user_error(vicreg.main, monkeypatch, capsys, *args, *other)
    for words in ("base-lr 1.0 (now 2.0)", "seed 0 (now 7)", "var-coeff 25.0 (now 3.0)",
                  "batch-size 8 (now 10)", "another --name"):
        assert words in said
    assert "weight-decay" not in said

    # Folder, name, workers and the rhythm of saving and logging may change; a step is left to do.
    damaged(undisturbed("vicreg"), tmp_path / "moved", "missing")
    args = (*args[:-1], "moved", "--workers", 1, "--save-minutes", 5, "--log-every", 20)
    assert run("vicreg", *args) == 0
    assert_same(undisturbed("vicreg"), tmp_path / "moved")


def test_a_finished_run_has_nothing_left_to_do(flags, undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed("vicreg"), tmp_path / "again")
    assert run("vicreg", *flags("vicreg"), "--out", tmp_path, "--name", "again") == 0
    said = capsys.readouterr()
    assert f"resumed at step {STEPS}" in said.out and "It is finished. Another --name" in said.out
    assert "has changed" not in said.err
    assert_same(undisturbed("vicreg"), tmp_path / "again")


def test_code_that_has_changed_is_warned_about(flags, undisturbed, tmp_path, monkeypatch, capsys):
    shutil.copytree(undisturbed("vicreg"), tmp_path / "again")
    changed = tmp_path / "common.py"
    changed.write_text(Path(common.__file__).read_text() + "# changed\n")
    monkeypatch.setattr(common, "__file__", str(changed))
    assert run("vicreg", *flags("vicreg"), "--out", tmp_path, "--name", "again") == 0
    assert capsys.readouterr().err.count("has changed since the checkpoint") == 1


@pytest.mark.parametrize("method", METHODS)
def test_init_starts_from_a_backbone(method, flags, undisturbed, tmp_path, capsys):
    """All networks start from it, the target's and the teacher's too."""
    first = undisturbed("vicreg")
    args = (*flags(method), "--init", first, "--base-lr", 0, "--weight-decay", 0, "--epochs", 1)
    if method == "cribo":
        args = (*args, "--final-lr", 0)
    assert run(method, *args, "--out", tmp_path, "--name", "next") == 0
    theirs = checkpoint(first, "backbone.pt")
    ours = checkpoint(tmp_path / "next")["model"]
    first_weight = "backbone.0.weight"
    backbones = [name.removesuffix("0.weight") for name in ours if name.endswith(first_weight)]
    assert len(backbones) == {"lc_loss": 2, "cribo": 2}.get(method, 1)
    for prefix in backbones:
        for key in theirs:
            if "running" not in key and "batches" not in key:
                assert torch.equal(ours[prefix + key], theirs[key]), prefix + key
    args = (*flags(method), "--init", tmp_path / "nowhere", "--out", tmp_path, "--name", "no")
    assert run(method, *args) == 2
    assert "no checkpoint at" in capsys.readouterr().err


def test_backbones_are_kept_every_few_epochs(flags, undisturbed, tmp_path):
    args = (*flags("vicreg"), "--keep-every", 2, "--out", tmp_path, "--name", "kept")
    assert run("vicreg", *args) == 0
    folder = tmp_path / "kept"
    kept = {path.name: checkpoint(folder, path.name) for path in folder.glob("backbone-*.pt")}
    assert set(kept) == {"backbone-2.pt", "backbone-4.pt"}
    assert helpers.equal(kept["backbone-4.pt"], checkpoint(folder, "backbone.pt"))
    assert not helpers.equal(kept["backbone-4.pt"], kept["backbone-2.pt"])
    assert_same(undisturbed("vicreg"), folder)
    about = json.loads((folder / "backbone.json").read_text())
    assert about["arch"] == "tiny_convnet" and about["size"] == 16 and about["bf16"] is False


def test_backbone_pt_is_the_backbone_alone(undisturbed):
    folder = undisturbed("vicreg")
    saved = checkpoint(folder, "backbone.pt")
    backbone = common.build_backbone("tiny_convnet", 16)
    backbone.load_state_dict(saved)
    model = checkpoint(folder)["model"]
    assert all(torch.equal(value, model[f"backbone.{key}"]) for key, value in saved.items())


def test_a_full_disk_does_not_end_a_run_that_keeps_backbones(flags, tmp_path, monkeypatch, capsys):
    write = training.write

    def full(path, save, *previous):
        if path.name.startswith("backbone-"):
            raise common.UserError(f"cannot write {path}")
        write(path, save, *previous)

    monkeypatch.setattr(training, "write", full)
    args = (*flags("vicreg"), "--epochs", 3, "--keep-every", 2, "--out", tmp_path, "--name", "full")
    assert run("vicreg", *args) == 0
    assert capsys.readouterr().err.count("warning: cannot write") == 1


def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    training.write(path, lambda file: torch.save({"step": 1}, file))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    large = {"step": 2, "big": torch.zeros(10 ** 6)}
    try:
        with pytest.raises(common.UserError, match=r"cannot write .*last.pt.*is intact"):
            training.write(path, lambda file: torch.save(large, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_only_a_failure_to_write_is_taken_for_one(tmp_path):
    """Where a data worker is killed, torch raises in whatever the main process is at."""
    def killed_worker(file):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(RuntimeError, match="pid 7"):
        training.write(tmp_path / "last.pt", killed_worker)


def test_links_of_others_are_not_followed(flags, tmp_path, capsys):
    """In a shared --out, somebody may put a link to a file of the user's there."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for name, code in (("lock", 2), ("last.part", 0), ("log.part", 0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).symlink_to(victim)
        command = (*flags("vicreg"), "--epochs", 1, "--out", tmp_path, "--name", name)
        assert run("vicreg", *command) == code
        assert victim.read_bytes() == b"precious"


# --- the log --------------------------------------------------------------------------------------

def test_log_lines(undisturbed):
    folder = undisturbed("vicreg")
    log = [json.loads(line) for line in open(folder / "log.jsonl")]
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    assert log[-1]["epoch"] == 4
    terms = ("loss", "inv", "var", "cov", "std", "corr", "accuracy", "lr", "broken")
    for name in (*terms, *helpers.CLOCK):
        assert all(math.isfinite(line[name]) for line in log), name
    rates = [line["lr"] for line in log]
    assert rates[0] == 0 and max(rates) == rates[5] == 1 * 8 / 256


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_says_fits_a_terminal(method, flags, tmp_path, capsys):
    make_images(tmp_path / "data" / "x", 20, classes=0)
    make_images(tmp_path / "data" / "y" / "z", 24, classes=0)
    args = (*flags(method), "--data", tmp_path / "data", "--epochs", 1, "--warmup-epochs", 1)
    assert run(method, *args, "--out", tmp_path, "--name", "run") == 0
    said = capsys.readouterr()
    assert f"20 images in {tmp_path}/data/x" in said.out
    assert f"24 images in {tmp_path}/data/y/z" in said.out
    assert all(len(line) <= 120 for line in said.out.splitlines() if str(tmp_path) not in line)
    assert "step 1 of 5, " in said.out and "images/s" in said.out and " min left" in said.out
    assert "does not reach its peak" in said.err


def test_progress_is_a_line_that_renews_itself(flags, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    ticks = iter(range(10 ** 6))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(ticks))  # each look: a second on
    args = (*flags("vicreg"), "--log-every", 100, "--epochs", 1)
    assert run("vicreg", *args, "--out", tmp_path, "--name", "run", "--save-minutes", 99) == 0
    said = terminal.getvalue()
    progress = re.findall(r"\r\033\[K\[(#*) *\] step (\d) of 5, [\d.]+ images/s", said)
    assert [int(step) for _, step in progress] == [1, 2, 3, 4, 5]
    assert [len(bar) for bar, _ in progress] == [4, 8, 12, 16, 20]
    assert said.count("left\n") == 1  # what comes next begins a line


def test_nan_stops_and_keeps_the_last_good_checkpoint(flags, tmp_path, monkeypatch, capsys):
    args = (*flags("vicreg"), "--out", tmp_path, "--name", "nan", "--base-lr", 1e36)
    said = helpers.user_error(vicreg.main, monkeypatch, capsys, *args)
    assert "NaN" in said and "--base-lr" in said
    assert all(f"{term}=" in said for term in ("inv", "var", "cov", "lr"))
    kept = checkpoint(tmp_path / "nan")["model"]
    assert all(value.isfinite().all() for value in kept.values())


@pytest.mark.parametrize("place", ["backbone.0.weight", "backbone.1.running_var"])
def test_weights_that_are_not_finite_are_not_saved(place, flags, tmp_path, monkeypatch, capsys):
    """A loss can be finite while a weight is not: where ReLU hides it, or in a running mean."""
    normal = training.Run.end_step

    def end_step(self):
        if self.step == 3:
            self.model.state_dict()[place][0] = math.nan
        normal(self)

    monkeypatch.setattr(training.Run, "end_step", end_step)
    args = (*flags("vicreg"), "--out", tmp_path, "--name", "nan")
    said = helpers.user_error(vicreg.main, monkeypatch, capsys, *args)
    assert "NaN" in said and checkpoint(tmp_path / "nan")["step"] == 3


def test_broken_images_are_replaced_counted_and_limited(flags, tmp_path, monkeypatch, capsys):
    folder = make_images(tmp_path / "train", 120, size=(20, 16)).parent
    image = folder / "train" / "class0" / "0002.jpg"
    image.write_bytes(image.read_bytes()[:200])
    args = (*flags("vicreg"), "--data", folder, "--epochs", 1, "--out", tmp_path)
    assert run("vicreg", *args, "--name", "one") == 0
    said = capsys.readouterr()
    assert said.err.count("warning: cannot read") == 1 and "0002.jpg" in said.err
    assert "another is taken" in said.err and "broken=1" in said.out
    assert [line["broken"] for line in lines(tmp_path / "one")][-1] == 1

    monkeypatch.setattr(common, "MAX_PIXELS", common.MAX_PIXELS)  # which the flag sets
    make_images(folder / "large", 1, size=(1010, 1000), classes=0)
    (folder / "large" / "0000.jpg").rename(folder / "train" / "class1" / "large.jpg")
    assert run("vicreg", *args, "--name", "large", "--max-megapixels", 1) == 0
    assert "1010 x 1000 pixels, over 1e+06 in all" in capsys.readouterr().err
    assert run("vicreg", *args, "--name", "small", "--max-megapixels", 1.1) == 0
    assert "pixels" not in capsys.readouterr().err

    for i in range(0, 30, 2):  # 15 are over 1% and 10 more
        (folder / "train" / "class0" / f"{i:04}.jpg").write_bytes(b"no image")
    monkeypatch.setattr(sys, "argv", ["vicreg.py", *map(str, args), "--name", "two"])
    said = helpers.user_error(vicreg.main, monkeypatch, capsys, *args, "--name", "two")
    assert "images could not be read, over 1%" in said


def test_names_of_any_bytes_are_warned_about_in_one_line(flags, tmp_path):
    folder = make_images(tmp_path / "images", 120, size=(20, 16)) / "class1"
    (folder / "0003.jpg").write_bytes(b"")
    (folder / "0003.jpg").rename(folder / os.fsdecode(b"\xffa\nb.jpg"))
    args = (*flags("vicreg"), "--data", folder.parent, "--epochs", 1, "--workers", 1)
    command = Command("vicreg", *args, "--out", tmp_path, said=tmp_path / "said")
    assert command.end() == 0, command.said()
    (line,) = [line for line in command.said().splitlines() if line.startswith("warning: cannot")]
    assert "\\udcffa\\nb.jpg" in line and "cannot identify" in line


def test_a_file_system_without_locks(flags, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(training.fcntl, "lockf", refuse)
    assert run("vicreg", *flags("vicreg"), "--epochs", 1, "--out", tmp_path) == 0
    assert capsys.readouterr().err.count("warning: cannot lock") == 1


# --- the end --------------------------------------------------------------------------------------

FINISH = training.Run.finish  # conftest.py patches it for each test


def finishing(tmp_path, monkeypatch, classes, rank=0):
    """The commands that finish() runs for a run in tmp_path."""
    commands = []
    monkeypatch.setattr(training.subprocess, "run", lambda args, **_: commands.append(args))
    finished = training.Run.__new__(training.Run)
    finished.folder = tmp_path
    finished.rank = rank
    finished.data = common.Images([], classes=classes)
    FINISH(finished, "knn", "linear --no-augment", figure="matches --checkpoint")
    return commands


def test_a_run_ends_with_an_evaluation(tmp_path, monkeypatch, capsys):
    (tmp_path / "evaluate").mkdir()
    monkeypatch.setattr(training, "__file__", str(tmp_path / "training.py"))
    commands = finishing(tmp_path, monkeypatch, ["a", "b"])
    assert [command[:4] for command in commands] == [
        [sys.executable, "-m", "evaluate", "knn"], [sys.executable, "-m", "evaluate", "linear"]]
    assert commands[1][4] == "--no-augment"
    assert all(command[-3:-1] == ["--checkpoint", str(tmp_path)] for command in commands)
    assert not finishing(tmp_path, monkeypatch, ["a", "b"], rank=1)
    assert f"{tmp_path} holds backbone.pt" in capsys.readouterr().out

    assert not finishing(tmp_path, monkeypatch, [])  # no labels
    assert f"knn needs labels: python -m evaluate knn --checkpoint {tmp_path}" in (
        capsys.readouterr().out)
    (tmp_path / "evaluate").rmdir()
    assert not finishing(tmp_path, monkeypatch, ["a", "b"])
    assert "knn needs the folder evaluate/: python -m evaluate knn" in capsys.readouterr().out

    script = tmp_path / "visualize.py"
    script.touch()
    (command,) = finishing(tmp_path, monkeypatch, ["a", "b"])
    picture = str(tmp_path / "matches.png")
    assert command[1:] == [str(script), "matches", "--checkpoint", str(tmp_path), "--out", picture]
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)  # no matplotlib
    assert not finishing(tmp_path, monkeypatch, ["a", "b"])


# --- what an attack found -------------------------------------------------------------------------

def test_the_same_data_under_another_path_and_other_data_under_the_same(
        images, flags, undisturbed, tmp_path, monkeypatch, capsys):
    damaged(undisturbed("vicreg"), tmp_path / "cut", "missing")
    shutil.copytree(images, tmp_path / "moved")
    args = (*flags("vicreg"), "--data", tmp_path / "moved", "--out", tmp_path, "--name", "cut")
    assert run("vicreg", *args) == 0
    assert_same(undisturbed("vicreg"), tmp_path / "cut")

    first = sorted((tmp_path / "moved").rglob("*.jpg"))[0]
    first.rename(first.with_name("another.jpg"))  # as many images, in another order
    assert "digest" in helpers.user_error(vicreg.main, monkeypatch, capsys, *args)


def test_an_empty_validation_part_is_found_before_training(flags, tmp_path, monkeypatch, capsys):
    make_images(tmp_path / "data" / "train", 44)
    (tmp_path / "data" / "val").mkdir()
    args = (*flags("vicreg"), "--data", tmp_path / "data", "--out", tmp_path, "--name", "new")
    said = helpers.user_error(vicreg.main, monkeypatch, capsys, *args)
    assert "no images in" in said and "val" in said
    assert not (tmp_path / "new").exists()


def test_printing_does_not_end_a_run():
    with open("/dev/full", "w") as full:
        training.say("more than there is room for", full)
        training.say("and after it", full)


def test_a_run_that_resumes_keeps_its_bf16(flags, tmp_path, monkeypatch):
    args = [flag for flag in flags("vicreg") if "bf16" not in str(flag)]
    monkeypatch.setattr(training, "has_bf16", lambda: True)
    out = ("--out", tmp_path, "--name", "run", "--epochs", 1)
    assert run("vicreg", *args, *out) == 0
    monkeypatch.setattr(training, "has_bf16", lambda: False)  # on another machine
    assert run("vicreg", *args, *out) == 0
    assert checkpoint(tmp_path / "run")["args"]["bf16"] is True


def test_half_of_the_cores_decode_where_the_other_half_computes(monkeypatch):
    monkeypatch.setattr(training.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training.own_cores() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert training.own_cores() == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training.own_cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(training.os, "sched_getaffinity", lambda _: set(range(64)))
    assert training.own_cores() == 12
