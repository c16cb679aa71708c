"""What holds for every test: one thread, the CPU, no evaluation after a run. Shared fixtures."""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # the tests' tensors are small, several processes share cores

import functools
import signal

import helpers
import pytest
import torch

import training

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: may use the GPU; all other tests see none")


@pytest.fixture(autouse=True)
def here(request, monkeypatch):
    """Runs in this process: on the CPU, without an evaluation at their end, signals as before."""
    monkeypatch.setattr(training.Run, "finish", lambda self, *protocols, **_: None)
    if not request.node.get_closest_marker("cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def processes():
    """Ends the pool of processes behind helpers.on_processes with the session."""
    yield
    helpers.POOL.close()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 44 small images for training and 10 for validation, of two classes."""
    folder = tmp_path_factory.mktemp("images")
    helpers.make_images(folder / "train", 44)
    helpers.make_images(folder / "val", 10, seed=1)
    return folder


@pytest.fixture(scope="session")
def flags(images):
    """flags(method) -> the flags of a run of helpers.STEPS steps, but for --out and --name."""
    small = ("--data", images, *helpers.SMALL, "--workers", 0)
    return lambda method: (*small, *helpers.EXTRA[method])


@pytest.fixture(scope="session")
def undisturbed(flags, tmp_path_factory):
    """undisturbed(method, *flags) -> the folder of a run that nothing disturbed, made once."""
    out = tmp_path_factory.mktemp("undisturbed")

    @functools.cache
    def folder(method, *more):
        name = f"{method}{len(list(out.iterdir()))}"
        assert helpers.run(method, *flags(method), *more, "--out", out, "--name", name) == 0
        return out / name
    return folder
