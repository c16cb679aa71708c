"""Checkpoints of this project and of others as backbones, under our parameter names."""
import contextlib
import json
import math
from pathlib import Path

import torch

from common import ARCHITECTURES, CONVNEXTS, VITS, UserError, build_backbone

HEADS = ("fc.", "head.", "heads.", "classifier.2.", "projector.", "maps_projector.",
         "projection_head.", "prototypes.")
PREFIXES = ("_orig_mod.", "module.", "model.", "encoder_q.", "backbone.")  # in this order
IGNORED = ("argparse.Namespace", "numpy.dtype", "numpy.core.multiarray.scalar",
           "numpy._core.multiarray.scalar")


class Ignored:
    """Stands for what a checkpoint holds beside tensors and plain values: nothing is computed."""

    def __init__(self, *_):
        pass

    __setstate__ = __init__


def read_checkpoint(path):
    """The dictionary in a checkpoint file or a run folder's last.pt; no code that it may hold runs.
    Reads tensors and plain values; DINO's numpy numbers and Namespace are Ignored. UserError."""
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give a run folder, last.pt or backbone.pt")
    try:
        with torch.serialization.safe_globals([(Ignored, name) for name in IGNORED]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes of the file make the unpickler raise
        reason = (str(error) or type(error).__name__).split(". ")[0].splitlines()[0]
        raise UserError(f"{path} is no file of weights alone, not loaded ({reason})") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, no dictionary of weights")
    beside = path.with_name("backbone.json")  # the flags of the run
    if path.name.startswith("backbone") and beside.is_file():
        with contextlib.suppress(OSError, ValueError, RecursionError):
            return {"model": state, "args": json.loads(beside.read_text())}
    return state


def from_torchvision_vit(key):
    """torchvision's names of a ViT's parameters -> DINO's and timm's, which are ours."""
    names = {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed",
             "conv_proj": "patch_embed.proj", "encoder.layers.encoder_layer_": "blocks.",
             "encoder.ln": "norm", "ln_1": "norm1", "ln_2": "norm2",
             "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj",
             "mlp.linear_1": "mlp.fc1", "mlp.linear_2": "mlp.fc2", "mlp.0": "mlp.fc1",
             "mlp.3": "mlp.fc2"}
    for theirs, ours in names.items():
        key = key.replace(theirs, ours)
    return key


def from_convnext(key):
    """ConvNeXt's names by its authors, which are VICRegL's, and by timm -> torchvision's."""
    if key.startswith("norm."):  # the last one, not a block's
        return key.replace("norm.", "classifier.0.")
    names = {"head.norm.": "classifier.0.", "stem.": "features.0."}
    for i in range(4):  # in torchvision's features: stem, stage, downsampling, stage, ...
        names[f"downsample_layers.{i}."] = f"features.{2 * i}."
        names[f"stages.{i}.downsample."] = f"features.{2 * i}."
        names[f"stages.{i}.blocks."] = f"features.{2 * i + 1}."
        names[f"stages.{i}."] = f"features.{2 * i + 1}."
    names |= {"dwconv": "block.0", "conv_dw": "block.0", "norm": "block.2", "pwconv1": "block.3",
              "mlp.fc1": "block.3", "pwconv2": "block.5", "mlp.fc2": "block.5",
              "gamma": "layer_scale"}
    for theirs, ours in names.items():
        key = key.replace(theirs, ours)
    return key


def backbone_state(state, arch):
    """The backbone's parameters in a checkpoint under our names: of the teacher, if there is one,
    without prefixes and heads."""
    parts = [state.get(name) for name in ("teacher", "model", "state_dict")]
    state = next((part for part in parts if isinstance(part, dict)), state)
    state = {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    for key, value in state.items():
        dense = value.layout == torch.strided and value.is_cpu and not value.is_quantized
        if not dense or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise UserError(f"the checkpoint's {key} is no plain tensor")
    for prefix in PREFIXES:
        inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        state = inner or state
    state = {key: value for key, value in state.items()
             if not key.startswith(HEADS) or key.startswith("head.norm.")}  # timm's ConvNeXt
    if arch in VITS:
        return {from_torchvision_vit(key): value for key, value in state.items()}
    if arch in CONVNEXTS:
        state = {from_convnext(key): value for key, value in state.items()}
        scales = {key: state[key].view(-1, 1, 1) for key in state if key.endswith("layer_scale")}
        return state | scales
    return state


def fresh(state, arch, drop_path=0.0):
    """A fresh backbone for images of the size that parameters under our names were made for."""
    size = 224
    if "conv1.weight" in state and state["conv1.weight"].shape[2:] == (3, 3):
        size = 32  # the small stem
    if arch in VITS and "pos_embed" in state and state["pos_embed"].ndim == 3:
        size = VITS[arch][3] * math.isqrt(max(1, state["pos_embed"].shape[1] - 1))
    layer_scale = any("layer_scale" in key for key in state)
    return build_backbone(arch, size, drop_path, layer_scale)


def load_backbone(checkpoint, arch=None, drop_path=0.0):
    """A trained backbone in eval mode; .arch: by default as its run says, or its parameters' names
    and shapes tell. checkpoint: a run folder or a file (also of torchvision, timm, VICReg, VICRegL,
    DINO, CrIBo, MoCo), or its content. Raises UserError, naming keys, where it does not fit."""
    state = checkpoint if isinstance(checkpoint, dict) else read_checkpoint(checkpoint)
    name = "the checkpoint" if state is checkpoint else checkpoint
    if arch is None and isinstance(state.get("args"), dict):
        arch = state["args"].get("arch")
    candidates = [arch] if arch in ARCHITECTURES else ARCHITECTURES
    for arch in candidates:
        found = backbone_state(state, arch)
        with torch.device("meta"):  # names and shapes alone
            backbone = fresh(found, arch, drop_path)
        theirs = {f"{key} {list(value.shape)}" for key, value in found.items()}
        ours = {f"{key} {list(value.shape)}" for key, value in backbone.state_dict().items()}
        if ours == theirs:
            backbone.to_empty(device="cpu").load_state_dict(found)
            backbone.arch = arch
            return backbone.eval()
    if len(candidates) > 1:
        raise UserError(f"{name} fits none of {', '.join(candidates)}: add --arch to see why")
    missing = sorted(ours - theirs)
    other = sorted(theirs - ours)
    raise UserError(f"{name} is not a {arch}: {len(missing)} missing ({', '.join(missing[:4])}), "
                    f"{len(other)} unexpected ({', '.join(other[:4])}); set --arch")
