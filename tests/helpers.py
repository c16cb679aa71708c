"""What several test files need: process groups on one machine, image folders, and the command line in-process."""
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

ROOT = Path(__file__).parent.parent


def _process(rank, world, folder, function, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(function(rank, world, *args), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_processes(world, folder, function, *args):
    """[function(rank, world, *args) for each rank], run in `world` gloo processes. The function is a module's own."""
    folder.mkdir(exist_ok=True)
    mp.start_processes(_process, (world, folder, function, args), nprocs=world, start_method="spawn")
    return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world)]


def make_images(folder, count, size=(48, 40), classes=2, seed=0):
    """`count` JPEG files of random blobs in `classes` class folders (or flat for 0)."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        place = folder / f"class{i % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        coarse.resize(size, Image.BICUBIC).save(place / f"{i:04}.jpg", quality=95)
    return folder


def script(*args, torchrun=0, **options):
    """Runs `python ARGS` (or torchrun with that many processes) from the repository -> CompletedProcess."""
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, **options)


def start(*args, torchrun=0):
    """The same, started in the background in its own process group -> Popen."""
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*launcher, *map(str, args)], cwd=ROOT, env=env, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_tree(pid):
    """SIGKILL to a process and all below it: torchrun starts its workers in sessions of their own."""
    children = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            fields = entry.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    family = [pid]
    for parent in family:
        family += children.get(parent, [])
    for member in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def user_error(main, monkeypatch, capsys, *args):
    """What main() says on stderr for these arguments; it must be one line, with exit code 2."""
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
