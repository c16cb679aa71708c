"""The demonstrations learn: each recipe of shapes, over its first steps, on one thread."""
import argparse
import sys

import helpers
import pytest
import torch

import common
import shapes
import training
from evaluate import knn

STEPS = {"vicreg": 95, "vicregl": 95, "lc_loss": 110, "cribo": 170, "bagssl": 95}  # an epoch

# A term of the loss and where it must be by then; a deviation of embeddings and the least it must
# be, as it is nearly 0 after a collapse.
LEARNED = {
    "vicreg": ("loss", 37.3, "std", 0.35),
    "vicregl": ("loss", 43, "std", 0.35),
    "lc_loss": ("byol", 1.9, "spread", 0.7),
    "cribo": ("image", 13.2, "std", 0.015),
    "bagssl": ("loss", 5.1, "std", 0.05),
}


def accuracy(backbone, size):
    """20-NN in % of 500 scenes, among 2000."""
    parts = [shapes.Shapes(split, 3 * size // 2) for split in ("train", "val")]
    parts[0].length = 2000
    parts[1].length = 500
    args = argparse.Namespace(device=torch.device("cpu"), size=size, bf16=False, workers=0)
    return knn.run(backbone, parts, args)[""]["20-NN"]


@pytest.mark.slow
@pytest.mark.parametrize("method", helpers.METHODS)
def test_a_demonstration_learns(method, tmp_path, monkeypatch):
    """What the loss says can be learned from colours that no class has: so the classes count too.
    LC-loss and CrIBo fell below the untrained network on scenes of small coloured objects."""
    runs = []
    steps = STEPS[method]
    end_step = training.Run.end_step

    def stop(run):
        end_step(run)
        if run.step == steps:
            runs.append(run)
            sys.exit(0)

    monkeypatch.setattr(training.Run, "end_step", stop)
    flags = ("--out", tmp_path, "--name", "run", "--workers", 0, "--log-every", steps // 10)
    assert helpers.run(method, *flags) == 0
    last = helpers.lines(tmp_path / "run")[-2:]  # the mean of two lines, as single batches differ
    term, most, deviation, least = LEARNED[method]
    assert sum(line[term] for line in last) / 2 < most
    assert min(line[deviation] for line in last) > least

    (run,) = runs
    torch.manual_seed(0)
    untrained = common.build_backbone(run.args.arch, run.args.size)
    before = accuracy(untrained, run.args.size)
    after = accuracy(run.model.backbone, run.args.size)
    print("20-NN", before, after)
    assert after > before + 3
