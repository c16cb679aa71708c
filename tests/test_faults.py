"""What a run survives: README's table "What it survives" names the tests of this file, and of others."""
import contextlib
import functools
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, kill_tree, make_images, script, start, user_error
from PIL import Image

import common
import lc_loss
import vicreg
import vicregl

METHODS = ["vicreg", "vicregl", "lc_loss"]
SMALL = ("--arch", "tiny_convnet", "--size", 16, "--projector", "32-16", "--batch-size", 8, "--base-lr", 1, "--warmup-epochs", 1,
         "--epochs", 4, "--log-every", 1, "--save-minutes", 0, "--no-bf16")  # with 44 images: 5 steps an epoch, 20 in all
STEPS = 20
EXTRA = {"vicreg": (), "vicregl": ("--local-projector", "16-16"), "lc_loss": ("--momentum", 0.99)}
TIMING = ("images_per_s", "data_wait", "memory_gb", "eta_s")


# --- runs in processes of their own, quick to start ----------------------------------------------------------------


def _run(method, args, said, prepare, env):
    """A process: `python METHOD.py ARGS`, after prepare(*its arguments), with its words in the file `said`."""
    words = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(words, 1)
    os.dup2(words, 2)
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.argv = [f"{method}.py", *map(str, args)]
    if prepare:
        prepare[0](*prepare[1:])
    importlib.import_module(method).main()


class Command:
    """A run in the background, forked from a process that has torch loaded already: it starts in half a second."""

    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["test_faults"])

    def __init__(self, method, *args, said, prepare=None, **env):
        env = {"CUDA_VISIBLE_DEVICES": "", **{k: str(v) for k, v in env.items()}}
        self.words = Path(said)
        self.process = self.processes.Process(target=_run, args=(method, args, str(said), prepare, env))
        self.process.start()

    def end(self, seconds=120):
        """-> exit code (minus the signal's number if one killed it)."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.said()}"
        return self.process.exitcode

    def said(self):
        return self.words.read_text() if self.words.exists() else ""

    def kill(self, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)


def pair(method, *args, said, prepare=None):
    """The same on two processes, without torchrun -> two Commands, which say it all in one file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common_env = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_WORLD_SIZE=2)
    return [Command(method, *args, said=said, prepare=prepare, RANK=rank, LOCAL_RANK=rank, **common_env) for rank in (0, 1)]


def lines(folder):
    """The log without its clock."""
    with contextlib.suppress(FileNotFoundError):
        kept = [json.loads(line) for line in open(folder / "log.jsonl") if line.endswith("\n")]
        return [{k: v for k, v in line.items() if k not in TIMING} for line in kept]
    return []


def wait_for(condition, *commands, seconds=60):
    begin = time.monotonic()
    while not condition():
        assert all(c.process.exitcode is None for c in commands), "".join(c.said() for c in commands)
        assert time.monotonic() - begin < seconds, "".join(c.said() for c in commands)
        time.sleep(0.005)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same(a, b):
    """Two run folders: weights, optimizer, log and step."""
    ours, theirs = (torch.load(folder / "last.pt", weights_only=True) for folder in (a, b))
    for key in ("step", "model", "optimizer", "broken"):
        assert equal(ours[key], theirs[key]), key
    assert lines(a) == lines(b)
    assert equal(*(torch.load(folder / "backbone.pt", weights_only=True) for folder in (a, b)))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make_images(folder / "train", 44)
    make_images(folder / "val", 10, seed=1)
    return folder


@pytest.fixture(scope="module")
def flags(images, tmp_path_factory):
    """flags(method) -> the command line of a small run in a folder of all tests of this file, without --name."""
    out = tmp_path_factory.mktemp("runs")
    return lambda method: (method, "--data", images, *SMALL, *EXTRA[method], "--workers", 0, "--out", out)


@pytest.fixture(scope="module")
def undisturbed(flags):
    """undisturbed(method) -> the folder of a run that nothing disturbed, made once."""
    @functools.cache
    def folder(method):
        command = flags(method)
        run = Command(*command, "--name", f"{method}-whole", said=command[-1] / f"{method}-whole.txt")
        assert run.end() == 0, run.said()
        return command[-1] / f"{method}-whole"
    return folder


# --- killed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_same_command_twice_is_bit_identical(method, flags, undisturbed, tmp_path):
    again = Command(*flags(method), "--out", tmp_path, "--name", "again", said=tmp_path / "said")
    assert again.end() == 0, again.said()
    assert len(lines(tmp_path / "again")) == STEPS
    assert_same(undisturbed(method), tmp_path / "again")


def _die_in_a_save(moment):
    """SIGKILL at the second save: at a moment of os.replace's or fsync's, or with half of last.pt written."""
    def here():
        os.kill(os.getpid(), signal.SIGKILL)

    count, replace, fsync, save = 0, os.replace, os.fsync, torch.save

    def dying_replace(source, target):
        nonlocal count
        count += Path(target).name == "backbone.pt"
        if count == 2 and moment == f"before {Path(target).name}":
            here()
        replace(source, target)
        if count == 2 and moment == f"after {Path(target).name}":
            here()

    def dying_fsync(descriptor):
        if count == 2 and moment == "at fsync":  # after backbone.pt, before last.pt is complete on the disk
            here()
        fsync(descriptor)

    def dying_save(state, file):
        if count == 2 and moment == "half written":
            whole = io.BytesIO()
            save(state, whole)
            file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
            file.flush()
            here()
        save(state, file)
    os.replace, os.fsync, torch.save = dying_replace, dying_fsync, dying_save


MOMENTS = ["before backbone.pt", "after backbone.pt", "half written", "at fsync", "before previous.pt", "after previous.pt",
           "before last.pt", "after last.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_20_times_is_bit_identical(method, flags, undisturbed, tmp_path):
    command, folder, rng = flags(method), tmp_path / "cut", random.Random(method)
    for number in range(20):
        prepare = (_die_in_a_save, MOMENTS[number // 2]) if number % 2 and number < 16 else None
        before = len(lines(folder))
        run = Command(*command, "--out", tmp_path, "--name", "cut", "--workers", number % 3, said=tmp_path / "said", prepare=prepare)
        if prepare:
            assert run.end() == -signal.SIGKILL, run.said()
            continue
        if number == 2 or rng.random() < 0.5:  # anywhere in the steps, or while it starts
            wait_for(lambda: len(lines(folder)) > min(before, STEPS - 2), run)  # noqa: B023
        time.sleep(rng.uniform(0, 0.1))
        run.kill()
        assert run.end() == -signal.SIGKILL, run.said()
    last = Command(*command, "--out", tmp_path, "--name", "cut", said=tmp_path / "said")
    assert last.end() == 0, last.said()
    assert_same(undisturbed(method), folder)
