"""What several test files need: runs in this process and in others, a pool of processes, images."""
import contextlib
import importlib
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import training

ROOT = Path(__file__).parent.parent
METHODS = ["vicreg", "vicregl", "lc_loss", "cribo", "bagssl"]
STEPS = 20  # of a run with these flags on the 44 images of the fixture `images`
SMALL = ("--arch", "tiny_convnet", "--size", 16, "--batch-size", 8, "--epochs", 4, "--base-lr", 1,
         "--warmup-epochs", 1, "--log-every", 1, "--save-minutes", 0, "--no-bf16")
EXTRA = {
    "vicreg": ("--projector", "32-16"),
    "vicregl": ("--projector", "32-16", "--local-projector", "16-16"),
    "lc_loss": ("--projector", "32-16", "--momentum", 0.99),
    "cribo": ("--head", "32-16-24", "--base-lr", 0.02, "--num-objects", 3, "--bank-images", 20,
              "--temp-warmup-epochs", 2),
    "bagssl": ("--projector", "32-16", "--loss", "tcr"),
}
CLOCK = ("images_per_s", "wait", "minutes_left", "memory_gb")


def make_images(folder, count, size=(48, 40), classes=2, seed=0):
    """`count` JPEG files of random blobs in `classes` class folders (or flat for 0)."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        place = folder / f"class{i % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        coarse.resize(size, Image.BICUBIC).save(place / f"{i:04}.jpg", quality=95)
    return folder


def wait_for(condition, *commands, seconds=60):
    """Until condition() holds; none of these commands may end before."""
    begin = time.monotonic()
    while not condition():
        said = "".join(command.said() for command in commands)
        assert all(command.process.exitcode is None for command in commands), said
        assert time.monotonic() - begin < seconds, said
        time.sleep(0.005)


# --- runs in this process -------------------------------------------------------------------------

def run(method, *args):
    """`python METHOD.py ARGS` in this process -> its exit code."""
    before = sys.argv
    sys.argv = [f"{method}.py", *map(str, args)]
    try:
        importlib.import_module(method).main()
        return 0
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = before


def user_error(main, monkeypatch, capsys, *args):
    """What main() says on stderr for these arguments: one line, with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["method.py", *map(str, args)])
    code = None
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if not line.startswith("warning:")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in said, (code, said)
    return lines[0]


def at_step(monkeypatch, step, action):
    """action() at the log line of a step, once."""
    normal = training.Run.log

    def log(self, **metrics):
        normal(self, **metrics)
        if self.step == step:
            monkeypatch.setattr(training.Run, "log", normal)
            action()

    monkeypatch.setattr(training.Run, "log", log)


def interrupted(number):
    return lambda: os.kill(os.getpid(), number)


# --- what a run leaves ----------------------------------------------------------------------------

def lines(folder):
    """The log without its clock."""
    with contextlib.suppress(FileNotFoundError):
        kept = [json.loads(line) for line in open(folder / "log.jsonl") if line.endswith("\n")]
        return [{k: v for k, v in line.items() if k not in CLOCK} for line in kept]
    return []


def checkpoint(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same(a, b):
    """Two run folders hold the same to the bit: step, weights, optimizer, backbone and log."""
    ours, theirs = checkpoint(a), checkpoint(b)
    for key in ("step", "model", "optimizer"):
        assert equal(ours[key], theirs[key]), key
    assert equal(checkpoint(a, "backbone.pt"), checkpoint(b, "backbone.pt"))
    assert lines(a) == lines(b)


# --- a pool of processes for distributed tests ----------------------------------------------------

SERVER = multiprocessing.get_context("forkserver")  # it has torch and the methods loaded already


def start_process(function, *args):
    SERVER.set_forkserver_preload(["helpers", *METHODS])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # the server's
    process = SERVER.Process(target=function, args=args)
    process.start()
    # A run in this process kills its children when it ends: this one is not a run's own.
    multiprocessing.process._children.discard(process)
    if path is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = path
    return process


def _work(pipe):
    """A process of the pool: calls functions until the pipe is closed."""
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    with contextlib.suppress(EOFError):
        while True:
            rank, world, store, function, args = pipe.recv()
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank,
                                    world_size=world, timeout=training.TIMEOUT)
            buffer = io.BytesIO()
            try:
                torch.save(function(rank, world, *args), buffer)
                dist.barrier()
                answer = buffer.getvalue(), None
            except BaseException:
                answer = None, traceback.format_exc()
            dist.destroy_process_group()  # where one failed, this ends the others' waiting
            pipe.send(answer)


class Pool:
    """Three processes, started when first needed, that then run functions together."""

    SIZE = 3

    def __init__(self):
        self.workers = []

    def open(self):
        for _ in range(self.SIZE):
            mine, theirs = multiprocessing.Pipe()
            self.workers.append((start_process(_work, theirs), mine))
            theirs.close()

    def close(self):
        for process, pipe in self.workers:
            process.kill()
            process.join()
            pipe.close()
        self.workers = []

    def call(self, world, function, *args, seconds=120):
        if not self.workers:
            self.open()
        pipes = [pipe for _, pipe in self.workers[:world]]
        with tempfile.TemporaryDirectory() as folder:
            for rank, pipe in enumerate(pipes):
                pipe.send((rank, world, f"{folder}/store", function, args))
            answers = []
            for pipe in pipes:
                if not pipe.poll(seconds):
                    self.close()
                    raise AssertionError(f"no answer in {seconds} s; so far {answers}")
                try:
                    answers.append(pipe.recv())
                except EOFError:
                    self.close()
                    raise AssertionError(f"a process ended; so far {answers}") from None
        problems = [problem for _, problem in answers if problem]
        assert not problems, "\n".join(problems)
        return [torch.load(io.BytesIO(saved), weights_only=True) for saved, _ in answers]


POOL = Pool()


def on_processes(world, *call):
    """on_processes(world, function, *args) -> [function(rank, world, *args) for each rank].

    1 to 3 gloo processes of the pool run the function, which is a module's own. (A folder before
    the function is not used any more.)
    """
    if not callable(call[0]):
        call = call[1:]
    return POOL.call(world, *call)


def run_in_pool(rank, world, method, args, prepare=None):
    """For on_processes: `torchrun METHOD.py ARGS` -> its exit code, or its error, and its words.

    prepare: a function and its arguments, called before the run; what it returns undoes it.
    """
    undo = prepare[0](*prepare[1:]) if prepare else None
    ended = []
    training.Run.finish = lambda self, *protocols, **_: ended.append(self)
    training.orderly_exit = contextlib.nullcontext  # it would end the process
    said = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]):
            code = run(method, *args)
    except training.UserError as error:
        code = f"UserError: {error}"
    finally:
        if undo:
            undo()
    parameters = {}
    for finished in ended:
        parameters = {key: p.detach() for key, p in finished.model.named_parameters()}
    return dict(code=code, out=said[0].getvalue(), err=said[1].getvalue(), parameters=parameters)


# --- commands in processes of their own -----------------------------------------------------------

def _command(method, args, said, prepare, env):
    words = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(words, 1)
    os.dup2(words, 2)
    os.environ.update(env)
    torch.set_num_threads(1)
    training.Run.finish = lambda self, *protocols, **_: None
    if prepare:
        prepare[0](*prepare[1:])
    sys.exit(run(method, *args))


class Command:
    """`python METHOD.py ARGS`, forked from a process that has loaded torch: quick to start.

    said: the file of all it says; prepare: a function and its arguments, called before.
    """

    def __init__(self, method, *args, said, prepare=None, **env):
        self.words = Path(said)
        env = {"CUDA_VISIBLE_DEVICES": "", **{key: str(value) for key, value in env.items()}}
        self.process = start_process(_command, method, args, str(said), prepare, env)

    def end(self, seconds=120):
        """-> exit code, or minus the number of the signal that killed it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"runs after {seconds} s: {self.said()}"
        return self.process.exitcode

    def said(self):
        return self.words.read_text() if self.words.exists() else ""

    def errors(self):
        """The lines that tell a user's mistake; there must be no traceback."""
        assert "Traceback" not in self.said(), self.said()
        return [line for line in self.said().splitlines() if line.startswith("error: ")]

    def kill(self, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)


def pair(method, *args, said, prepare=None):
    """The same on two processes, without torchrun -> two Commands, which say it all in one file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_WORLD_SIZE=2)
    return [Command(method, *args, said=said, prepare=prepare, RANK=rank, LOCAL_RANK=rank, **env)
            for rank in (0, 1)]


def below(pid):
    """{id: command line} of all processes below `pid`."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)] = int(fields[1])
    found = {}
    for child in parents:
        above = child
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and child != pid:
            with contextlib.suppress(OSError):
                found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
    return found


def kill_tree(pid):
    """SIGKILL to a process and all below it: torchrun starts its workers in sessions of their own.
    """
    for member in (pid, *below(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def launcher(*args, torchrun=0):
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return dict(args=[*command, *map(str, args)], cwd=ROOT, env=env, text=True)


def script(*args, torchrun=0, **options):
    """Runs `python ARGS` (or torchrun with that many processes) in ROOT -> CompletedProcess."""
    command = launcher(*args, torchrun=torchrun)
    return subprocess.run(**{**command, **options}, capture_output=True, timeout=300, check=False)


def start(*args, torchrun=0):
    """The same, started in the background in its own process group -> Popen. It hears Ctrl-C, also
    where the tests run in the background of a shell, which makes what it starts deaf to it."""
    return subprocess.Popen(**launcher(*args, torchrun=torchrun), start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
