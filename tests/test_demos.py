"""The demonstrations learn: each recipe of shapes, over its first steps, on one thread."""
import sys

import helpers
import pytest

import training

STEPS = {"vicreg": 90, "vicregl": 90, "lc_loss": 90, "cribo": 150, "bagssl": 90}  # an epoch

# A term of the loss and where it must be by then: below all that a run has that learns nothing, or
# that learned nothing on the scenes of small coloured objects which these recipes had at first.
# And a deviation of embeddings, which is nearly 0 after a collapse, with the least it must be.
LEARNED = {
    "vicreg": ("loss", 37, "std", 0.35),
    "vicregl": ("loss", 42, "std", 0.35),
    "lc_loss": ("byol", 2, "spread", 0.7),
    "cribo": ("image", 13.3, "std", 0.015),
    "bagssl": ("loss", 5.1, "std", 0.055),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", helpers.METHODS)
def test_a_demonstration_learns(method, tmp_path, monkeypatch):
    steps = STEPS[method]
    end_step = training.Run.end_step

    def stop(run):
        end_step(run)
        if run.step == steps:
            sys.exit(0)

    monkeypatch.setattr(training.Run, "end_step", stop)
    flags = ("--out", tmp_path, "--name", "run", "--workers", 0, "--log-every", steps // 10)
    assert helpers.run(method, *flags) == 0
    last = helpers.lines(tmp_path / "run")[-2:]  # the mean of two lines, as single batches differ
    term, most, deviation, least = LEARNED[method]
    assert sum(line[term] for line in last) / 2 < most
    assert min(line[deviation] for line in last) > least
