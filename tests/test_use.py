"""docs/use.md: every block runs, on small data made on the spot."""
import importlib
import re
import shlex
import sys
import types

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, make_images, run

import common
import cribo
import training
import vicreg
from evaluate import __main__ as evaluate

TEXT = (ROOT / "docs" / "use.md").read_text()


def block(*words, language="python"):
    """The block of docs/use.md that holds these words."""
    blocks = re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)
    (found,) = [text for text in blocks if all(word in text for word in words)]
    return found


class NamesOfTimm(torch.nn.Module):
    """Stands for timm where it is not installed: our network; it checks that our parameters have
    the names that timm 1.0.31 gave to its own."""

    def __init__(self, name, num_classes, img_size=224):
        super().__init__()
        assert num_classes == 0
        arch = name.removesuffix("_224")
        self.net = common.build_backbone(arch, img_size)
        self.names = {"vit_tiny_patch16": vit_names, "resnet18": resnet18_names}[arch]()

    def load_state_dict(self, state):
        assert set(state) == set(self.names)
        return self.net.load_state_dict(state)

    def forward_features(self, x):
        maps, cls = self.net(x)
        return torch.cat([cls[:, None], maps], 1)


def vit_names():
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    for i in range(12):
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            names += [f"blocks.{i}.{part}.weight", f"blocks.{i}.{part}.bias"]
    return [*names, "norm.weight", "norm.bias"]


def resnet18_names():
    def norm(name):
        kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return [f"{name}.{kind}" for kind in kinds]

    names = ["conv1.weight", *norm("bn1")]
    for stage in (1, 2, 3, 4):
        for i in (0, 1):
            for j in (1, 2):
                names += [f"layer{stage}.{i}.conv{j}.weight", *norm(f"layer{stage}.{i}.bn{j}")]
            if stage > 1 and i == 0:
                downsample = f"layer{stage}.0.downsample"
                names += [f"{downsample}.0.weight", *norm(f"{downsample}.1")]
    return names


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with photographs, weights as runs leave them, and timm or what stands for it."""
    make_images(tmp_path / "photos", 12, classes=0)
    recipes = vicreg.RECIPES["small"], cribo.RECIPES["small"]
    for name, recipe in zip(("vicreg-photos", "cribo-photos"), recipes):
        torch.manual_seed(0)
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        arch = recipe["arch"]
        state = common.build_backbone(arch, recipe["size"]).state_dict()
        torch.save(state, folder / "backbone.pt")
        model = {f"backbone.{key}": value for key, value in state.items()}
        torch.save({"model": model, "args": {"arch": arch, "size": 64}}, folder / "last.pt")
    try:
        importlib.import_module("timm")
    except ModuleNotFoundError:
        monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=NamesOfTimm))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names_after(*codes):
    """What these blocks leave, run one after the other as a script."""
    names = {"__name__": "__main__"}
    for code in codes:
        exec(compile(code, "docs/use.md", "exec"), names)
    return names


def command(monkeypatch, line):
    monkeypatch.setattr(sys, "argv", shlex.split(line.split("python -m ")[1]))
    evaluate.main()


def test_representations_of_a_folder(here, monkeypatch, capsys):
    line = block("evaluate features", language="bash")
    command(monkeypatch, f"{line.strip()} --workers 0")
    capsys.readouterr()
    left = names_after(block("x.npy"))
    assert left["x"].shape == (12, 512) and left["nearest"][0] == 0
    assert capsys.readouterr().out.count("photos/") == 5


def test_torchvision(here):
    left = names_after(block("FasterRCNN"))
    state = torch.load("runs/vicreg-photos/backbone.pt", weights_only=True)
    for network in (left["pyramid"].body, left["last"]):
        loaded = network.state_dict()
        assert all(torch.equal(loaded[key], state[key]) for key in loaded)
    assert len(left["losses"]) == 4
    assert left["logits"].shape == (2, 21, 224, 224)
    assert left["net"].conv1.weight.grad.abs().sum() > 0


def test_timm(here):
    left = names_after(block('create_model("resnet18"'))
    ours = common.build_backbone("vit_tiny_patch16", 160).eval()
    ours.load_state_dict(torch.load("runs/cribo-photos/backbone.pt", weights_only=True))
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        theirs = left["vit"].eval().forward_features(x)
        maps, pooled = ours(x)
    torch.testing.assert_close(theirs, torch.cat([pooled[:, None], maps], 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["torchvision", "timm"])
def test_a_copied_file(here, kind):
    torch.manual_seed(0)
    code = block(f"import {kind}\n", "class Backbone")
    assert len([line for line in code.splitlines() if line]) <= 15
    left = names_after(code, block("def view"))
    assert left["loss"].isfinite() and left["parts"]["local_inv"] > 0
    assert left["maps"][0].shape == (8, 49 if kind == "torchvision" else 196, 128)
    assert all(p.grad is not None for p in left["model"].local_projector.parameters())


def test_a_method_of_ones_own(here, monkeypatch):
    code = block("SimSiam")
    assert len([line for line in code.splitlines() if line]) <= 50
    line = block("simsiam.py", language="bash")
    (here / "simsiam.py").write_text(code)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setattr(sys, "argv", shlex.split(line)[1:] + [
        "--batch-size", "4", "--size", "32", "--epochs", "2", "--workers", "0", "--log-every", "1"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Run, "finish", lambda self, *protocols, **_: None)
        names_after(code)
    saved = torch.load("runs/simsiam-photos/last.pt", weights_only=True)
    assert saved["step"] == 6 and saved["args"]["arch"] == "resnet18"


def test_one_change(here, monkeypatch):
    """The diff fits vicregl.py, and training feels it."""
    lines = block("criteria", language="diff").splitlines()
    old = "".join(line[1:] + "\n" for line in lines if line[0] == "-")
    text = (ROOT / "vicregl.py").read_text()
    assert text.count(old) == 1
    (here / "place.py").write_text(text.replace(old, ""))
    monkeypatch.syspath_prepend(here)
    monkeypatch.delitem(sys.modules, "place", raising=False)
    place = importlib.import_module("place")
    vicregl = importlib.import_module("vicregl")
    torch.manual_seed(0)
    maps, pos = torch.randn(2, 6, 9, 4), 9 * torch.rand(2, 6, 9, 2)
    loss, _ = place.local_criterion(*maps, *pos)
    location = vicregl.vicreg_loss(*vicregl.match(*maps, vicregl.location_distances(*pos), 20))[0]
    assert loss.item() == pytest.approx(location.item())
    small = ("--data", here / "photos", *SMALL, "--epochs", 1, "--batch-size", 4, "--workers", 0,
             "--projector", "16-16", "--local-projector", "8-8")
    for method in ("place", "vicregl"):
        assert run(method, *small, "--name", f"{method}-shapes") == 0
    logs = [np.genfromtxt(f"runs/{m}-shapes/log.jsonl", str, delimiter="\n")
            for m in ("place", "vicregl")]
    assert len(logs[0]) == len(logs[1]) == 3 and logs[0][-1] != logs[1][-1]
    visualize = importlib.import_module("visualize")
    curves, = [line for line in block("place.py", language="bash").splitlines() if "curves" in line]
    monkeypatch.setattr(sys, "argv", shlex.split(curves)[1:])
    visualize.main()
    assert (here / "figure.png").exists()
