"""What a run survives, in processes of its own: docs/faults.md names the tests of this file.

Most are slow. test_training.py has what can be tested without processes.
"""
import functools
import io
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    METHODS,
    Command,
    assert_same,
    below,
    checkpoint,
    kill_tree,
    launcher,
    lines,
    on_processes,
    pair,
    run_in_pool,
    wait_for,
)
from PIL import Image

import bagssl
import common
import cribo
import lc_loss
import training
import vicreg
import vicregl

# --- killed ---------------------------------------------------------------------------------------

def here():
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in_a_save(moment):
    """SIGKILL at a moment of the second save, of which each begins with backbone.pt."""
    count = 0
    replace, link, fsync, save = os.replace, os.link, os.fsync, torch.save

    def moving(move, source, target):
        nonlocal count
        name = Path(target).name
        count += name == "backbone.pt"
        if count == 2 and moment == f"before {name}":
            here()
        move(source, target)
        if count == 2 and moment == f"after {name}":
            here()

    def dying_fsync(descriptor):
        if count == 2 and moment == "at fsync":  # before last.pt is complete on the disk
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

    os.replace = functools.partial(moving, replace)
    os.link = functools.partial(moving, link)
    os.fsync = dying_fsync
    torch.save = dying_save


MOMENTS = ["before backbone.pt", "after backbone.pt", "half written", "at fsync",
           "before previous.pt", "after previous.pt", "before last.pt", "after last.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_20_times_is_bit_identical(method, flags, undisturbed, tmp_path):
    longer = ("--epochs", 8)
    folder = tmp_path / "cut"
    rng = random.Random(method)
    start = functools.partial(Command, method, *flags(method), *longer, "--out", tmp_path,
                              "--name", "cut", said=tmp_path / "said")
    for number in range(20):
        before = len(lines(folder))
        if number % 2 and number < 16:
            run = start(prepare=(_die_in_a_save, MOMENTS[number // 2]))
            assert run.end() == -signal.SIGKILL, run.said()
            continue
        run = start("--workers", number % 3)
        if number == 2 or rng.random() < 0.5:  # anywhere in the steps, or while it starts
            wait_for(lambda: len(lines(folder)) > before, run)  # noqa: B023
        time.sleep(rng.uniform(0, 0.03))
        run.kill()
        assert run.end() == -signal.SIGKILL, run.said()
    last = start()
    assert last.end() == 0, last.said()
    assert_same(undisturbed(method, *longer), folder)


@pytest.mark.slow
def test_killed_and_resumed_in_processes_of_their_own(flags, undisturbed, tmp_path):
    folder = tmp_path / "cut"
    command = ("vicreg", *flags("vicreg"), "--out", tmp_path, "--name", "cut")
    first = Command(*command, "--workers", 1, said=tmp_path / "said")
    wait_for(lambda: len(lines(folder)) >= 5, first)
    first.kill()
    assert first.end() == -signal.SIGKILL
    second = Command(*command, "--workers", 2, said=tmp_path / "said")
    wait_for(lambda: len(lines(folder)) >= 11, second)
    second.kill(signal.SIGTERM)
    assert second.end() == 0 and "SIGTERM: saved at step" in second.said()
    third = Command(*command, said=tmp_path / "said")
    assert third.end() == 0 and "resumed at step" in third.said()
    assert_same(undisturbed("vicreg"), folder)


def torchrun(options, method, *args):
    """A torchrun in the background -> Popen."""
    words = ["-m", "torch.distributed.run", *options, f"{method}.py", *args]
    return subprocess.Popen(**launcher(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kill_a_process(run):
    """Of the training processes below a torchrun, the one with the least number."""
    found = [pid for pid, words in below(run.pid).items() if " --data " in words]
    os.kill(min(found), signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed_pair(flags, tmp_path_factory):
    """undisturbed_pair(method) -> the folder of a run on two processes, made once."""
    out = tmp_path_factory.mktemp("pairs")

    @functools.cache
    def folder(method):
        args = (*flags(method), "--out", out, "--name", method, "--epochs", 8)
        answers = on_processes(2, run_in_pool, method, args)
        assert [answer["code"] for answer in answers] == [0, 0], answers
        return out / method

    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_torchrun_restarts_a_killed_process(method, flags, undisturbed_pair, tmp_path):
    args = (*flags(method), "--epochs", 8, "--out", tmp_path)
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    run = torchrun(options, method, *args, "--name", "cut")
    try:
        wait_for(lambda: len(lines(tmp_path / "cut")) >= 13, seconds=100)
        kill_a_process(run)
        said = run.communicate(timeout=150)[0]
    finally:
        kill_tree(run.pid)
    assert run.returncode == 0 and said.count("resumed at step") == 1, said
    assert_same(undisturbed_pair(method), tmp_path / "cut")


@pytest.mark.slow
def test_two_torchrun_agents_survive_within_one_more_attempt(flags, undisturbed_pair, tmp_path):
    """Two nodes: one process dies, both torchruns restart theirs, and one attempt is enough."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        end = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=2", "--rdzv_id=1",
               "--rdzv_backend=c10d", f"--rdzv_endpoint={end}"]
    args = (*flags("vicreg"), "--epochs", 8,
            "--out", tmp_path, "--name", "nodes")
    agents = [torchrun(options, "vicreg", *args) for _ in range(2)]
    try:
        wait_for(lambda: len(lines(tmp_path / "nodes")) >= 13, seconds=100)
        kill_a_process(agents[0])
        for agent in agents:
            said = agent.communicate(timeout=150)[0]
            assert agent.returncode == 0, said
    finally:
        for agent in agents:
            kill_tree(agent.pid)
    assert_same(undisturbed_pair("vicreg"), tmp_path / "nodes")


def test_a_killed_process_ends_the_others(flags, tmp_path):
    args = (*flags("vicreg"), "--epochs", 200, "--out", tmp_path, "--name", "cut")
    runs = pair("vicreg", *args, said=tmp_path / "said")
    wait_for(lambda: len(lines(tmp_path / "cut")) >= 12, *runs)  # a vote to save was before
    runs[1].kill()
    assert runs[0].end(30) == 1, runs[0].said()
    assert checkpoint(tmp_path / "cut")["step"] >= 10


def _short_timeout():
    training.TIMEOUT = training.datetime.timedelta(seconds=4)


@pytest.mark.slow
def test_a_process_that_stops_answering_is_a_timeout(flags, tmp_path):
    args = (*flags("vicreg"), "--epochs", 200, "--out", tmp_path, "--name", "cut")
    runs = pair("vicreg", *args, said=tmp_path / "said", prepare=(_short_timeout,))
    wait_for(lambda: len(lines(tmp_path / "cut")) >= 12, *runs)
    runs[1].kill(signal.SIGSTOP)
    code = runs[0].end(40)
    runs[1].kill()
    assert code == 1 and checkpoint(tmp_path / "cut")["step"] >= 10


def test_a_mistake_that_one_process_meets_ends_all(flags, tmp_path):
    """The first process alone claims the folder; the other one does not wait for it."""
    args = (*flags("vicreg"), "--name", "../x", "--out", tmp_path)
    runs = pair("vicreg", *args, said=tmp_path / "said")
    assert runs[0].end(30) == 2 and runs[1].end(30) != 0
    assert runs[0].said().count("error: --name '../x'") == 1


def _meet_at_the_backbone():
    """Without torchrun the first process holds the store: all must have joined before it ends."""
    normal = common.build_backbone

    def build(*args, **options):
        torch.distributed.barrier()
        return normal(*args, **options)

    common.build_backbone = build


def test_a_mistake_that_all_processes_meet(flags, tmp_path):
    runs = pair("vicreg", *flags("vicreg"), "--arch", "resnet19", "--out", tmp_path,
                said=tmp_path / "said", prepare=(_meet_at_the_backbone,))
    assert [run.end(30) for run in runs] == [2, 2]
    assert runs[0].errors()[0].startswith("error: no architecture 'resnet19'")


# --- data workers ---------------------------------------------------------------------------------

def gone(pids):
    """None of these processes runs; one that its parent has not asked about yet is no longer."""
    def state(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "gone"

    return all(state(pid) in ("gone", "Z") for pid in pids)


def test_a_killed_data_worker_ends_the_run(flags, undisturbed, tmp_path):
    command = ("vicreg", *flags("vicreg"), "--out", tmp_path, "--name", "cut")
    run = Command(*command, "--workers", 2, said=tmp_path / "said", prepare=(_slow_images, 0.02))
    wait_for(lambda: len(lines(tmp_path / "cut")) >= 5, run)
    workers = sorted(below(run.process.pid))
    os.kill(workers[0], signal.SIGKILL)
    assert run.end(40) == 2 and len(workers) == 2, run.said()
    wait_for(lambda: gone(workers), seconds=2)
    (line,) = run.errors()
    assert "a data worker died" in line and "--workers" in line
    again = Command(*command, said=tmp_path / "said")
    assert again.end() == 0, again.said()
    assert_same(undisturbed("vicreg"), tmp_path / "cut")


def _slow_images(seconds):
    normal = vicreg.sample_views

    def slow(image, area, size):
        time.sleep(seconds)
        return normal(image, area, size)

    vicreg.sample_views = slow


def _bug_in_the_views(kind):
    def bug(image, area, size):
        raise kind("a bug in sample_views")

    vicreg.sample_views = bug


@pytest.mark.parametrize("workers,kind", [(0, ZeroDivisionError), (2, ZeroDivisionError),
                                          (1, RuntimeError)])
def test_a_bug_in_the_views_ends_the_run(workers, kind, flags, tmp_path):
    args = (*flags("vicreg"), "--workers", workers, "--out", tmp_path)
    run = Command("vicreg", *args, said=tmp_path / "said", prepare=(_bug_in_the_views, kind))
    children = set()
    begin = time.monotonic()
    while run.process.exitcode is None and time.monotonic() - begin < 20:
        children |= set(below(run.process.pid))
        time.sleep(0.01)
    assert run.end(1) == 1, run.said()
    assert "Traceback" in run.said() and f"{kind.__name__}: a bug in sample_views" in run.said()
    wait_for(lambda: gone(children), seconds=2)


def _a_mistake_in_the_views():
    def mistake(image, area, size):
        raise common.UserError("these images are too small")

    vicreg.sample_views = mistake


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_that_a_worker_finds_is_one_line(workers, flags, tmp_path):
    args = (*flags("vicreg"), "--workers", workers, "--out", tmp_path)
    run = Command("vicreg", *args, said=tmp_path / "said", prepare=(_a_mistake_in_the_views,))
    assert run.end(20) == 2 and run.errors() == ["error: these images are too small"]


def test_a_signal_to_the_whole_group_of_processes(flags, undisturbed, tmp_path):
    """As Ctrl-C in a terminal, and as a scheduler's SIGTERM: the workers get it too."""
    folder = tmp_path / "cut"
    command = ("vicreg", *flags("vicreg"), "--workers", 2, "--out", tmp_path, "--name", "cut")
    for number, step in ((signal.SIGINT, 3), (signal.SIGTERM, 9)):
        run = Command(*command, said=tmp_path / "said", prepare=(_slow_images, 0.02))
        wait_for(lambda: len(lines(folder)) >= step, run)  # noqa: B023
        workers = below(run.process.pid)
        for pid in (run.process.pid, *workers):
            os.kill(pid, number)
        assert run.end(20) == 0 and f"{number.name}: saved at step" in run.said(), run.said()
        wait_for(lambda: gone(workers), seconds=2)  # noqa: B023
    last = Command(*command, said=tmp_path / "said")
    assert last.end() == 0, last.said()
    assert_same(undisturbed("vicreg"), folder)


def _stuck_images(after):
    """As on a mount that answers no more."""
    normal = vicreg.sample_views
    calls = []

    def stuck(image, area, size):
        calls.append(1)
        if len(calls) > after:
            time.sleep(1000)
        return normal(image, area, size)

    vicreg.sample_views = stuck


@pytest.mark.slow
def test_stuck_data_workers_are_a_timeout(flags, tmp_path):
    args = (*flags("vicreg"), "--workers", 1, "--out", tmp_path, "--name", "cut")
    command = functools.partial(Command, "vicreg", *args, said=tmp_path / "said")
    run = command(prepare=(_stuck_and_short, 60))
    workers = set()
    wait_for(lambda: workers.update(below(run.process.pid)) or len(lines(tmp_path / "cut")) >= 5)
    assert run.end(30) == 2 and "a data worker died or hung" in run.errors()[0]
    wait_for(lambda: gone(workers), seconds=2)


def _stuck_and_short(after):
    _short_timeout()
    _stuck_images(after)


def test_a_second_ctrl_c_ends_a_run_whose_workers_are_stuck(flags, tmp_path):
    args = (*flags("vicreg"), "--workers", 1, "--out", tmp_path, "--name", "cut")
    run = Command("vicreg", *args, said=tmp_path / "said", prepare=(_stuck_images, 60))
    wait_for(lambda: len(lines(tmp_path / "cut")) >= 5, run)
    workers = below(run.process.pid)
    run.kill(signal.SIGINT)
    wait_for(lambda: "again to quit now" in run.said(), run)
    run.kill(signal.SIGINT)
    assert run.end(20) != 0
    wait_for(lambda: gone(workers), seconds=2)


# --- locks and disks ------------------------------------------------------------------------------

def test_a_second_run_in_the_folder_is_refused(flags, tmp_path):
    command = ("vicreg", *flags("vicreg"), "--out", tmp_path, "--name", "one")
    first = Command(*command, "--workers", 2, said=tmp_path / "said", prepare=(_slow_images, 0.05))
    wait_for(lambda: len(lines(tmp_path / "one")) >= 3, first)
    second = Command(*command, said=tmp_path / "second")
    assert second.end() == 2
    (line,) = second.errors()
    assert "another run is at work in" in line and first.process.exitcode is None
    workers = below(first.process.pid)
    first.kill()
    assert first.end() == -signal.SIGKILL and len(workers) == 2
    # The dead run's workers may live on for seconds; its lock does not.
    third = Command(*command, said=tmp_path / "third")
    assert third.end() == 0 and "resumed at step" in third.said(), third.said()
    wait_for(lambda: gone(workers))


def _fill_the_disk(begin, end):
    """No file grows between two steps, as on a full disk; but for what the run says."""
    normal = training.Run.log
    teller = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    for stream in (1, 2):
        os.dup2(teller.stdin.fileno(), stream)
    teller.stdin.close()
    everything = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def log(self, **metrics):
        if self.step == begin:
            size = os.path.getsize(self.folder / "log.jsonl")
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        if self.step == end:
            resource.setrlimit(resource.RLIMIT_FSIZE, everything)
        normal(self, **metrics)

    training.Run.log = log


def test_a_full_disk(flags, undisturbed, tmp_path):
    command = ("vicreg", *flags("vicreg"), "--out", tmp_path)
    run = Command(*command, "--name", "for-a-while", said=tmp_path / "said",
                  prepare=(_fill_the_disk, 5, 9))
    assert run.end() == 0, run.said()
    wait_for(lambda: run.said().count("warning: cannot write") >= 8)
    assert "Traceback" not in run.said()
    assert_same(undisturbed("vicreg"), tmp_path / "for-a-while")  # no log line is lost either

    run = Command(*command, "--name", "to-the-end", said=tmp_path / "said2",
                  prepare=(_fill_the_disk, 5, -1))
    assert run.end() == 2, run.said()
    wait_for(lambda: run.errors())
    (line,) = run.errors()
    assert "cannot write" in line and checkpoint(tmp_path / "to-the-end")["step"] == 5
    run = Command(*command, "--name", "to-the-end", said=tmp_path / "said2")
    assert run.end() == 0, run.said()
    assert_same(undisturbed("vicreg"), tmp_path / "to-the-end")


# --- images ---------------------------------------------------------------------------------------

def _seeds(rng):
    """Small files of every format, some animated, some with EXIF: [(suffix, bytes)]."""
    exif = Image.Exif()
    exif[0x112] = 6
    exif[0x10e] = "a title"
    pixels = [Image.fromarray(rng.integers(0, 256, (20, 28, 3), np.uint8)) for _ in range(3)]
    animated = {"save_all": True, "append_images": pixels[1:]}
    ways = {
        "JPEG": [{}, {"exif": exif}, {"progressive": True}],
        "PNG": [{}, {"exif": exif}, animated],
        "GIF": [{}, animated],
        "WEBP": [{}, {"exif": exif}, animated],
        "TIFF": [{}, {"exif": exif}, animated, {"compression": "tiff_lzw"},
                 {"compression": "jpeg"}, {"compression": "tiff_deflate"}],
    }
    suffixes = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "WEBP": ".webp", "TIFF": ".tif"}
    files = []
    for name, options in ways.items():
        for way in [*options, "gray"]:
            image = pixels[0].convert("L") if way == "gray" else pixels[0]
            file = io.BytesIO()
            image.save(file, name, **({} if way == "gray" else way))
            files.append((suffixes[name], file.getvalue()))
    return files


def _mutate(data, rng):
    """Flipped bits, a cut end, a hole of zeros, a doubled or exchanged part; one to five times."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(len(data)))
        length = int(rng.integers(1, 40))
        kind = rng.integers(6)
        if kind < 2:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[at % 64 % len(data)] = int(rng.integers(256))  # in the header
        elif kind == 3:
            data[at:at + length] = bytes(min(length, len(data) - at))
        elif kind == 4:
            data[at:at] = data[at:at + length]
        elif rng.random() < 0.4:
            del data[max(at, 1):]
    return bytes(data)


def _resources():
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(os.listdir("/proc/self/fd")), memory


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_2400_damaged_files_are_decoded_or_reported(tmp_path, capsys):
    rng = np.random.default_rng(0)
    seeds = _seeds(rng)
    suffixes = sorted({suffix for suffix, _ in seeds})
    decoded = reported = 0

    def whole(image):
        return [((0, 0, image.height, image.width), False, 16)]

    for number in range(2400):
        if number == 400:  # libraries are loaded, buffers are at their size
            files, memory = _resources()
        suffix, content = seeds[number % len(seeds)]
        if number % 9 == 0:
            suffix = suffixes[rng.integers(len(suffixes))]  # one of another format
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(_mutate(content, rng))
        data = common.Images([path])
        broken = common.Views(data, whole, 0)[0, 0].broken
        try:
            image = data.load(0)
        except Exception:  # a decoder may raise anything
            assert broken
            reported += 1
        else:
            assert not broken and image.mode == "RGB" and min(image.size) > 0
            decoded += 1
        path.unlink()
        capsys.readouterr()
    files_after, memory_after = _resources()
    assert files_after == files and memory_after - memory < 64e6
    assert decoded > 300 and reported > 600, (decoded, reported)


# --- numbers --------------------------------------------------------------------------------------

def _stop_after(step):
    normal = training.Run.log

    def log(self, **metrics):
        normal(self, **metrics)
        if self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)

    training.Run.log = log


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_bf16_stays_within_1_percent(method, flags, tmp_path):
    args = (*flags(method), "--data", "shapes", "--batch-size", 256, "--epochs", 1,
            "--out", tmp_path)
    # On the activations of a network that has trained for three steps.
    first = Command(method, *args, "--name", "float32", said=tmp_path / "said",
                    prepare=(_stop_after, 3))
    assert first.end() == 0, first.said()
    shutil.copytree(tmp_path / "float32", tmp_path / "bf16")
    state = checkpoint(tmp_path / "bf16")
    state["args"]["bf16"] = True
    torch.save(state, tmp_path / "bf16" / "last.pt")
    for name, flag in (("float32", "--no-bf16"), ("bf16", "--bf16")):
        run = Command(method, *args, flag, "--name", name, said=tmp_path / "said",
                      prepare=(_stop_after, 4))
        assert run.end() == 0, run.said()
    exact, half = [lines(tmp_path / name)[-1] for name in ("float32", "bf16")]
    assert exact["step"] == half["step"] == 4 and exact["loss"] != half["loss"]
    assert abs(half["loss"] / exact["loss"] - 1) < 0.01, (exact, half)


def vicreg_case(make):
    wide, _ = vicreg.vicreg_loss(make(16, 24), make(16, 24))
    tall, _ = vicreg.vicreg_loss(make(24, 16), make(24, 16))
    return wide + tall


def vicregl_case(make):
    pos = [50 * torch.rand(8, 9, 2) for _ in range(2)]
    embeddings = [make(8, 12) for _ in pos]
    maps = [make(8, 9, 6) for _ in pos]
    return vicregl.vicregl_loss(embeddings, maps, pos, num_matches=(4, 4),
                                num_feature_matches=(4, 4))[0]


def lc_case(make, **options):
    points = 2.4 * torch.rand(8, 3, 3, 2) - 1.2
    valid = (points.abs() <= 1).all(3)
    vectors = [make(8, 12) for _ in range(4)]
    maps = [make(8, 6, 3, 3) for _ in range(2)]
    return lc_loss.lc_loss(*vectors, *maps, points, valid, **options)[0]


def cribo_case(make):
    z_1, z_2 = make(4, 9, 6), make(4, 9, 6)
    places = 50 * torch.rand(4, 18, 2)
    assignment = cribo.joint_space_clustering(torch.cat([z_1, z_2], 1), places, 3, 1.0)
    c_1, c_2, _ = cribo.object_representations(z_1, z_2, assignment)
    bank = cribo.MemoryBank(len(c_1), 6, torch.bfloat16)
    bank.push(c_1, c_2)
    nn_1, nn_2, ok_1, ok_2 = cribo.cycle_consistent_matches(c_1, c_2, bank)
    trusted = torch.cat([ok_1, ok_2])
    objects = torch.cat([c_1, c_2])
    neighbours = torch.cat([bank.objects[0, nn_1], bank.objects[1, nn_2]])[trusted]
    targets = cribo.Targets(make(8, 6), objects.detach(), neighbours, trusted.nonzero().flatten())
    return cribo.cribo_loss(targets, make(8, 6), objects, torch.zeros(6), torch.zeros(6), 0.04)[0]


def bag_case(make, objective):
    coefficients = {"tcr": (30.0, 0.2)}.get(objective, ())
    losses = []
    for shape in ((16, 24), (24, 16)):
        losses.append(bagssl.bag_loss([make(*shape), make(*shape)], objective, *coefficients)[0])
    return sum(losses)


LOSSES = {
    "vicreg": vicreg_case,
    "vicregl": vicregl_case,
    "lc_loss": lc_case,
    "lc_loss-mse": functools.partial(lc_case, local_loss="mse"),
    "cribo": cribo_case,
    "bagssl-vicreg": functools.partial(bag_case, objective="vicreg"),
    "bagssl-spectral": functools.partial(bag_case, objective="spectral"),
    "bagssl-simclr": functools.partial(bag_case, objective="simclr"),
    "bagssl-tcr": functools.partial(bag_case, objective="tcr"),
}
SCALES = {"constant": 3.0, "zero": 0.0, "huge": 1e4, "tiny": 1e-8, "huge and constant": 1e4}


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_finite_at_the_extremes(loss, kind):
    torch.manual_seed(0)
    made = []

    def make(*shape):
        x = torch.ones(shape) if "constant" in kind else torch.randn(shape)
        made.append((SCALES[kind] * x).requires_grad_())
        return made[-1]

    value = LOSSES[loss](make)
    value.backward()
    assert value.isfinite()
    grads = [x.grad for x in made if x.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)
