"""Checkpoints, of this project and of others, as backbones."""

import math
import re

import torch

from common import CONVNEXTS, UserError, build_backbone, read_checkpoint

RENAMED = [  # parameter names of other projects -> those used here
    # torchvision's ViT
    (r"^class_token$", "cls_token"), (r"^encoder\.pos_embedding$", "pos_embed"), (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.ln\.", "norm."), (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."), (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."), (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(linear_1|0)\.", ".mlp.fc1."), (r"\.mlp\.(linear_2|3)\.", ".mlp.fc2."),
    # ConvNeXt as its authors and VICRegL name it, and as timm does
    (r"^stem\.", "features.0."), (r"^head\.norm\.", "classifier.0."),
    *[(rf"^(downsample_layers\.{i}|stages\.{i}\.downsample)\.", f"features.{2 * i}.") for i in range(4)],
    *[(rf"^stages\.{i}\.(blocks\.)?", f"features.{2 * i + 1}.") for i in range(4)],
    *[(rf"^(features\.\d\.\d+)\.({theirs})\b", rf"\1.{ours}") for theirs, ours in (
        ("dwconv|conv_dw", "block.0"), ("norm", "block.2"), ("pwconv1|mlp.fc1", "block.3"), ("pwconv2|mlp.fc2", "block.5"),
        ("gamma", "layer_scale"))],
]
HEADS = ("fc.", "head.", "heads.", "classifier.2.", "projector.", "maps_projector.", "projection_head.", "prototypes.")


def load_backbone(checkpoint, arch=None):
    """A backbone with trained weights, in eval mode.

    checkpoint: a run folder or its last.pt (both know their `arch`), backbone.pt, a state dict of torchvision or timm, or
    a release of VICReg, VICRegL, DINO (the teacher) or CrIBo (the teacher); or any of these, loaded. Their heads are left
    out. Raises UserError, naming the keys, where the weights are of another architecture.
    """
    loaded = isinstance(checkpoint, dict)
    name, state = ("the checkpoint", checkpoint) if loaded else (checkpoint, read_checkpoint(checkpoint))
    if isinstance(state.get("args"), dict):
        arch = arch or state["args"].get("arch")
    if arch is None:
        raise UserError(f"{name} does not name its architecture: add --arch")
    state = next((state[key] for key in ("teacher", "model", "state_dict") if key in state), state)
    state = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    inner = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    state = inner or state
    for pattern, ours in RENAMED + [(r"^norm\.", "classifier.0.")] * (arch in CONVNEXTS):
        state = {re.sub(pattern, ours, key): value for key, value in state.items()}
    state = {key: value.view(-1, 1, 1) if key.endswith("layer_scale") else value for key, value in state.items()
             if not key.startswith(HEADS)}
    size = 224  # what the weights were made for: the small stem is 3 pixels wide, position embeddings count patches
    if "conv1.weight" in state and state["conv1.weight"].shape[-1] == 3:
        size = 32
    if {"pos_embed", "patch_embed.proj.weight"} <= state.keys():
        size = math.isqrt(state["pos_embed"].shape[1] - 1) * state["patch_embed.proj.weight"].shape[-1]
    backbone = build_backbone(arch, size)
    own = backbone.state_dict()
    shapes = [f"{key} {tuple(state[key].shape)}, not {tuple(own[key].shape)}" for key in own
              if key in state and state[key].shape != own[key].shape]
    wrong = {"missing in the file": [k for k in own if k not in state],
             "unexpected in the file": [k for k in state if k not in own], "of another shape": shapes}
    if any(wrong.values()):
        told = "; ".join(f"{len(keys)} {what} ({', '.join(keys[:4])}{', ...' * (len(keys) > 4)})"
                         for what, keys in wrong.items() if keys)
        raise UserError(f"{name} is not a {arch}: of {len(own)} parameters {told}; set --arch")
    backbone.load_state_dict(state)
    return backbone.eval()
