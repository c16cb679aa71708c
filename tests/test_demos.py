"""The demonstrations learn: each method's recipe of shapes, in its first hundred steps."""
import json

import helpers
import pytest

import training

STEPS = 120  # of the recipe's own schedule: one and a half epochs


class EnoughError(Exception):
    """The run has made its STEPS."""


# The log's term that must fall, from where it starts, to below what; the deviation, its least.
LEARNED = {
    "vicreg": ("inv", 0.3, "std", 0.5),
    "vicregl": ("global_inv", 0.3, "std", 0.5),
    "lc_loss": ("byol", 2.0, "spread", 0.6),
    "cribo": ("image", 13.5, "std", 0.015),
    "bagssl": ("loss", 4.5, "std", 0.05),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", helpers.METHODS)
def test_a_demonstration_learns(method, tmp_path, monkeypatch):
    def end_step(run):
        run.step += 1
        if run.step == STEPS:
            raise EnoughError

    monkeypatch.setattr(training.Run, "end_step", end_step)
    with pytest.raises(EnoughError):
        helpers.run(method, "--out", tmp_path, "--name", "run", "--workers", 1, "--log-every", 20)
