"""--compile: the same values, names, resumption and processes; traced, but not made into code."""
import signal

import helpers
import pytest
import torch
from helpers import METHODS, checkpoint, lines, on_processes, run_in_pool


def _traced():
    """torch.compile that traces forward and backward passes and runs what it traced."""
    normal = torch.compile
    traced = []

    def compiled(*args, **options):
        traced.append(1)
        return normal(*args, backend="aot_eager", **options)

    def undo():
        torch.compile = normal
        torch.compiler.reset()
        assert traced

    torch.compile = compiled
    return undo


@pytest.fixture
def traced():
    undo = _traced()
    yield
    undo()


def assert_near(a, b):
    """Two run folders hold the same to 1e-5."""
    for one, two in zip(lines(a), lines(b), strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), key
    one, two = (checkpoint(folder)["model"] for folder in (a, b))
    assert list(one) == list(two)
    for key in one:
        distance = (one[key].double() - two[key].double()).norm()
        assert distance <= 1e-5 * one[key].double().norm(), key


@pytest.mark.parametrize("method", METHODS)
def test_compiled_training_is_the_same(method, flags, traced, tmp_path):
    args = (*flags(method), "--epochs", 2, "--out", tmp_path, "--name")
    for name in ("eager", "compiled"):
        assert helpers.run(method, *args, name, *["--compile"] * (name == "compiled")) == 0
    assert_near(tmp_path / "eager", tmp_path / "compiled")


def test_compiled_training_stops_and_resumes_to_the_bit(flags, traced, monkeypatch, tmp_path):
    args = (*flags("cribo"), "--compile", "--epochs", 2, "--out", tmp_path, "--name")
    assert helpers.run("cribo", *args, "whole") == 0
    with monkeypatch.context() as patch:
        helpers.at_step(patch, 6, helpers.interrupted(signal.SIGTERM))
        assert helpers.run("cribo", *args, "cut") == 0
    assert checkpoint(tmp_path / "cut")["step"] == 7
    assert helpers.run("cribo", *args, "cut") == 0
    helpers.assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_compiled_training_on_two_processes_is_the_same(flags, tmp_path):
    args = (*flags("lc_loss"), "--epochs", 1, "--out", tmp_path, "--name")
    eager = on_processes(2, run_in_pool, "lc_loss", (*args, "eager"))
    compiled = on_processes(2, run_in_pool, "lc_loss", (*args, "compiled", "--compile"),
                            (_traced,))
    assert [answer["code"] for answer in (*eager, *compiled)] == 4 * [0], compiled
    assert_near(tmp_path / "eager", tmp_path / "compiled")
    assert helpers.equal(compiled[0]["parameters"], compiled[1]["parameters"])
