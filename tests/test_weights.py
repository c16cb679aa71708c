"""weights.py: checkpoints of this project and of others."""
import argparse
import json
import os
import pickle
import re

import numpy as np
import pytest
import torch
import torchvision

import common
import weights


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


AUTHORS = {"layer_scale": "gamma", "block.0": "dwconv", "block.2": "norm", "block.3": "pwconv1",
           "block.5": "pwconv2"}
TIMM = AUTHORS | {"block.0": "conv_dw", "block.3": "mlp.fc1", "block.5": "mlp.fc2"}


def theirs(state, timm=False):
    """A ConvNeXt's parameters as its authors name them (and VICRegL), or timm."""
    renamed = {}
    for key, value in state.items():
        if m := re.match(r"features\.([0246])\.(.*)", key):
            i = int(m[1]) // 2
            key = f"downsample_layers.{i}.{m[2]}"
            if timm:
                key = f"stages.{i}.downsample.{m[2]}" if i else f"stem.{m[2]}"
        elif m := re.match(r"features\.(\d)\.(\d+)\.(layer_scale|block\.\d)(.*)", key):
            part = (TIMM if timm else AUTHORS)[m[3]]
            key = f"stages.{int(m[1]) // 2}.{'blocks.' * timm}{m[2]}.{part}{m[4]}"
            value = value.flatten() if part == "gamma" else value
        else:
            key = key.replace("classifier.0.", "head.norm." if timm else "norm.")
        renamed[key] = value
    return renamed


def layouts(arch, state, layer_scale):
    """(name, what a file of another project holds)"""
    head = {"weight": torch.zeros(10, 4), "bias": torch.zeros(10)}
    projector = prefixed(head, "projector.0.")
    yield "here", {"model": prefixed(state, "backbone.") | projector, "args": {"arch": arch}}
    full = prefixed(prefixed(state, "backbone.") | projector, "module.")
    yield "VICReg, full", {"model": full, "epoch": 9}
    yield "Lightning", {"state_dict": prefixed(prefixed(state, "backbone.") | projector, "model.")}
    yield "compiled", prefixed(state, "_orig_mod.")
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    yield "MoCo", {"state_dict": prefixed(state, "module.encoder_q.")
                   | prefixed(other, "module.encoder_k.")}
    if arch == "resnet18":
        yield "torchvision and timm, with their heads", state | prefixed(head, "fc.")
    if arch == "convnext_tiny" and layer_scale:
        yield "torchvision", state | prefixed(head, "classifier.2.")
        yield "its authors", {"model": theirs(state) | prefixed(head, "head.")}
        yield "timm", theirs(state, timm=True) | prefixed(head, "head.fc.")
    if arch == "convnext_tiny" and not layer_scale:
        yield "VICRegL", theirs(state)
    if arch == "tiny_vit":
        yield "timm", state | prefixed(head, "head.")
        yield "DINO, CrIBo", {
            "student": prefixed(other, "module.backbone.") | prefixed(head, "module.head.mlp.0."),
            "teacher": prefixed(state, "backbone.") | prefixed(head, "head.mlp.0."), "epoch": 3,
            "args": argparse.Namespace(arch="vit_small", lr=0.1),
            "optimizer": {"param_groups": [{"lr": np.float64(0.1)}]}}
        teacher = prefixed(state, "module.backbone.")
        yield "CrIBo, teacher in DDP", {"student": other, "teacher": teacher}


@pytest.mark.parametrize("arch,layer_scale", [
    ("resnet18", False), ("convnext_tiny", True), ("convnext_tiny", False), ("tiny_vit", False)])
def test_layouts_of_checkpoints(tmp_path, monkeypatch, arch, layer_scale):
    monkeypatch.setitem(common.CONVNEXTS, "convnext_tiny", ((8, 16, 24, 32), (1, 1, 2, 1)))
    torch.manual_seed(1)
    backbone = common.build_backbone(arch, layer_scale=layer_scale).eval()
    for p in backbone.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(x)
        for name, held in layouts(arch, backbone.state_dict(), layer_scale):
            torch.save(held, tmp_path / "w.pth")
            loaded = weights.load_backbone(tmp_path / "w.pth", arch)
            assert all(torch.equal(a, b) for a, b in zip(loaded(x), expected)), name
            guessed = weights.load_backbone(tmp_path / "w.pth", "a_name_of_timm_224")
            assert guessed.arch == loaded.arch == arch and not guessed.training
            assert torch.equal(guessed(x)[1], expected[1]), name


def test_torchvisions_vit(tmp_path):
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(64, 8, 4, 4, 128, 512).eval()
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    vit.heads = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    loaded = weights.load_backbone(tmp_path / "vit.pth", "tiny_vit")
    torch.testing.assert_close(loaded(x)[1], vit(x), rtol=1e-4, atol=1e-5)


def test_the_flags_beside_backbone_pt(tmp_path):
    """They name the architecture, unless they are damaged; other files in the folder have none."""
    state = common.build_backbone("tiny_convnet").state_dict()
    flags = {"arch": "tiny_convnet", "size": 48, "data": "photos", "bf16": True}
    (tmp_path / "backbone.json").write_text(json.dumps(flags))
    for name, found in (("backbone.pt", flags), ("backbone-10.pt", flags), ("other.pt", None)):
        torch.save(state, tmp_path / name)
        assert weights.read_checkpoint(tmp_path / name).get("args") == found
        assert weights.load_backbone(tmp_path / name).arch == "tiny_convnet"
    for damage in ("", "{", "[" * 100_000, "3", "\0"):
        (tmp_path / "backbone.json").write_text(damage)
        assert weights.load_backbone(tmp_path / "backbone.pt").arch == "tiny_convnet"


def test_no_architecture_fits(tmp_path):
    state = common.build_backbone("resnet18").state_dict()
    del state["bn1.bias"]
    assert "fits none of tiny_convnet, resnet18" in refusal(state, None)
    assert "1 missing (bn1.bias [64]), 0 unexpected" in refusal(state, "resnet18")


def refusal(path, arch="resnet18"):
    with pytest.raises(common.UserError) as error:
        weights.load_backbone(path, arch)
    said = str(error.value)
    assert "\n" not in said
    return said


def test_both_sides_of_a_mismatch_are_named(tmp_path):
    state = common.build_backbone("resnet18").state_dict()
    state["conv1.weight"] = torch.zeros(64, 3, 5, 5)
    state["extra"] = torch.zeros(1)
    del state["bn1.bias"]
    torch.save(state, tmp_path / "other.pth")
    said = refusal(tmp_path / "other.pth")
    for words in ("other.pth is not a resnet18",
                  "2 missing (bn1.bias [64], conv1.weight [64, 3, 7, 7])",
                  "2 unexpected (conv1.weight [64, 3, 5, 5], extra [1])"):
        assert words in said


class Scalar:
    """A number of numpy, of 400,000,000 bytes."""

    def __reduce__(self):
        return np._core.multiarray.scalar, (np.dtype("S400000000"), b"x")


@pytest.mark.parametrize("strange", [Scalar(), np.float64(0.1), np.dtype("f4"),
                                     argparse.Namespace(x=1)])
def test_nothing_of_foreign_libraries_is_built(tmp_path, strange):
    torch.save({"a": strange, "w": torch.ones(3)}, tmp_path / "w.pt")
    found = weights.read_checkpoint(tmp_path / "w.pt")
    assert isinstance(found["a"], weights.Ignored) and vars(found["a"]) == {}
    assert torch.equal(found["w"], torch.ones(3))


class Malice:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    for junk in (b"", b"hello world"):
        (tmp_path / "junk.pt").write_bytes(junk)
        assert "junk.pt is no file of weights" in refusal("junk.pt")
    if zipped:
        torch.save({"model": Malice()}, "evil.pt")
    else:
        (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": Malice()}, protocol=2))
    said = refusal("evil.pt")
    assert "evil.pt" in said and "not loaded" in said
    assert not (tmp_path / "executed").exists()


def strange(kind):
    """A state dict with a tensor that is not what it claims."""
    torch.manual_seed(0)
    state = common.build_backbone("tiny_vit", 32).state_dict()
    if kind == "stride 0":
        state["pos_embed"] = torch.zeros(1).expand(1, 1 + 10**8, 128)
    if kind == "sparse":
        state["pos_embed"] = state["pos_embed"].to_sparse()
    if kind == "meta":
        state["pos_embed"] = state["pos_embed"].to("meta")
    if kind == "integer keys":
        state = dict(enumerate(state.values()))
    if kind == "no dict":
        state = {"model": 3}
    if kind == "arch":
        state = {"model": {"w": torch.ones(2)}, "args": {"arch": ["tiny_vit"]}}
    if kind == "flat":
        state["pos_embed"] = torch.zeros(())
    return state


@pytest.mark.parametrize("kind", ["stride 0", "sparse", "meta", "integer keys", "no dict",
                                  "arch", "flat"])
def test_strange_tensors_are_refused_in_one_line(kind):
    arch = None if kind == "arch" else "tiny_vit"
    with pytest.raises(common.UserError) as error:
        weights.load_backbone(strange(kind), arch)
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)
