"""What the five methods share and no paper defines: backbones, data, optimisation, and a run's plumbing.

    Legend of all files: B batch, V views, H W map height and width, N = H*W locations, D width.
"""
import argparse
import codecs
import contextlib
import datetime
import fcntl
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import stat
import sys
import time
import typing
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image, ImageOps
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import StochasticDepth


class UserError(Exception):
    """A mistake the user can mend: shown as one line that names cause and cure, exit code 2."""


# --- 1. Backbones: images (B, 3, H0, W0) -> maps (B, N, D), pooled (B, D); `.dim` is D, `.stride` = H0 / H ---------
# stages(images) -> the last four levels [(B, D_i, H_i, W_i)], coarsest last; the last one holds the same as `maps`


def outputs(layers, x):
    """What each layer returns, the first fed with x and every other one with the output before it."""
    return list(itertools.accumulate(layers, lambda x, layer: layer(x), initial=x))[1:]


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet without its classifier; the parameter names are torchvision's.

    Images under 100 pixels get the small stem: a 3x3 convolution of stride 1 and no max-pool (stride 8, not 32).
    """

    def __init__(self, block, layers, size):
        super().__init__(block, layers, zero_init_residual=True)
        self.fc = nn.Identity()
        self.dim, self.stride = 512 * block.expansion, 32
        if size < 100:
            self.conv1, self.maxpool, self.stride = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity(), 8
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def stages(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return outputs([self.layer1, self.layer2, self.layer3, self.layer4], x)

    def forward(self, x):
        x = self.stages(x)[-1]
        return x.flatten(2).mT, x.mean((2, 3))  # (B, D, H, W) -> (B, N, D), (B, D)


class ConvNeXt(torchvision.models.ConvNeXt):
    """torchvision's ConvNeXt without its classifier; its last LayerNorm serves every location and the mean."""

    def __init__(self, widths, depths, drop_path):
        stages = [CNBlockConfig(*c) for c in zip(widths, (*widths[1:], None), depths)]
        super().__init__(stages, stochastic_depth_prob=drop_path)
        self.classifier[2] = nn.Identity()
        self.dim, self.stride = widths[-1], 32

    def stages(self, x):
        *maps, x = outputs(self.features, x)[1::2]  # stem, stage, downsampling, stage, ...
        return [*maps, self.classifier[0](x)]

    def forward(self, x):
        x = self.features(x)  # (B, D, H, W)
        maps, pooled = self.classifier[0](x), self.classifier[0](x.mean((2, 3), keepdim=True))
        return maps.flatten(2).mT, pooled.flatten(1)


class Block(nn.Module):
    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.heads, self.drop_path = heads, StochasticDepth(drop_path, "row")
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x):  # (B, 1+N, D) -> the same
        qkv = self.attn.qkv(self.norm1(x))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = x + self.drop_path(self.attn.proj(mixed))
        return x + self.drop_path(self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))))


class ViT(nn.Module):
    """Vision transformer with the parameter names of DINO and timm; `pooled` is the [CLS] token.

    Position embeddings are made for `size` pixels and interpolated to the grid of any other input.
    """

    def __init__(self, dim, depth, heads, patch, size, drop_path):
        super().__init__()
        self.dim, self.stride = dim, patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, stride=patch)})
        self.blocks = nn.ModuleList(Block(dim, heads, drop_path * i / (depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def positions(self, height, width):
        grid = math.isqrt(self.pos_embed.shape[1] - 1)
        if (height, width) == (grid, grid):
            return self.pos_embed
        cls, pos = self.pos_embed[:, :1], rearrange(self.pos_embed[:, 1:], "1 (h w) d -> 1 d h w", h=grid)
        pos = F.interpolate(pos, (height, width), mode="bicubic")
        return torch.cat([cls, rearrange(pos, "1 d h w -> 1 (h w) d")], 1)  # (1, 1+N, D)

    def tokens(self, x):
        """The outputs (B, 1+N, D) of all blocks."""
        x = self.patch_embed.proj(x)  # (B, D, H, W)
        pos = self.positions(*x.shape[2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], 1) + pos  # (B, 1+N, D)
        return outputs(self.blocks, x)

    def stages(self, x):
        last = self.tokens(x)[-4:]
        return [rearrange(self.norm(t)[:, 1:], "b (h w) d -> b d h w", h=x.shape[2] // self.stride) for t in last]

    def forward(self, x):
        x = self.norm(self.tokens(x)[-1])
        return x[:, 1:], x[:, 0]


class TinyConvNet(nn.Sequential):
    """Four convolutions, for demonstrations on a CPU: stride 8, 256 wide."""

    def __init__(self):
        layers = []
        for i, o, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 1), (128, 256, 2)):
            layers += [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        super().__init__(*layers)
        self.dim, self.stride = 256, 8

    def stages(self, x):
        return outputs(self, x)[2::3]  # after each ReLU

    def forward(self, x):
        x = self.stages(x)[-1]
        return x.flatten(2).mT, x.mean((2, 3))  # (B, D, H, W) -> (B, N, D), (B, D)


RESNETS = {"resnet18": (BasicBlock, [2, 2, 2, 2]), "resnet34": (BasicBlock, [3, 4, 6, 3]),
           "resnet50": (Bottleneck, [3, 4, 6, 3])}
CONVNEXTS = {"convnext_tiny": ((96, 192, 384, 768), (3, 3, 9, 3)), "convnext_small": ((96, 192, 384, 768), (3, 3, 27, 3)),
             "convnext_base": ((128, 256, 512, 1024), (3, 3, 27, 3))}
VITS = {f"vit_{name}_patch{patch}": (dim, 12, heads, patch) for patch in (16, 8)
        for name, dim, heads in (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12))}
VITS["tiny_vit"] = 128, 4, 4, 8
ARCHITECTURES = ["tiny_convnet", *RESNETS, *CONVNEXTS, *VITS]


def build_backbone(arch, size=224, drop_path=0.0):
    """A freshly initialised backbone for images of `size` pixels. Raises UserError on an unknown `arch`."""
    if arch in RESNETS:
        backbone = ResNet(*RESNETS[arch], size)
    elif arch in CONVNEXTS:
        backbone = ConvNeXt(*CONVNEXTS[arch], drop_path)
    elif arch in VITS:
        backbone = ViT(*VITS[arch], size, drop_path)
    elif arch == "tiny_convnet":
        backbone = TinyConvNet()
    else:
        raise UserError(f"no architecture '{arch}': --arch is one of {', '.join(ARCHITECTURES)}")
    if size < backbone.stride:
        raise UserError(f"{size} pixels are smaller than one stride of {arch}: --size {backbone.stride} at least")
    return backbone


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


def read_checkpoint(path):
    """The dictionary in a checkpoint file, or in last.pt of a run folder. Raises UserError, and runs no code that the
    file may hold: it reads tensors, plain values, numpy's numbers and an argparse.Namespace (DINO keeps its flags in one).
    """
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give a run folder, last.pt or backbone.pt")
    try:
        scalar = np._core.multiarray.scalar  # DINO's optimizer holds its learning rate as one, by this or the older name
        number = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Float64DType, codecs.encode]
        with torch.serialization.safe_globals([argparse.Namespace, *number]):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict):
            return state
        reason = f"it holds a {type(state).__name__}"
    except Exception as error:  # whatever the bytes of the file make the unpickler raise
        reason = (str(error) or type(error).__name__).split(". ")[0].splitlines()[0]
    raise UserError(f"{path} is no file of weights, or holds more than weights, and was not loaded ({reason})")


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


# --- 2. Data -------------------------------------------------------------------------------------------------------

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class Images:
    """Images in files or in one uint8 array (n, H, W, 3), with or without labels."""

    def __init__(self, items, labels=None, classes=()):
        # Bytes in one array: forked workers share it, where a list of a million strings would be copied into each.
        self.items = items if isinstance(items, np.ndarray) else np.array([os.fsencode(p) for p in items])
        self.labels, self.classes = labels, classes

    def __len__(self):
        return len(self.items)

    def label(self, index):
        return -1 if self.labels is None else int(self.labels[index])

    def name(self, index):
        return os.fsdecode(self.items[index]) if self.items.dtype.kind == "S" else f"image {index}"

    def load(self, index):
        """The RGB image, upright; raises whatever a decoder raises on a broken file."""
        if self.items.dtype.kind != "S":
            return Image.fromarray(self.items[index])
        path = os.fsdecode(self.items[index])
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for without end
            raise OSError("no regular file")
        with Image.open(path) as image:
            if not 0 < image.width * image.height <= Image.MAX_IMAGE_PIXELS:  # Pillow itself refuses twice as many
                raise OSError(f"{image.width} x {image.height} pixels")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion would clip it at 255
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")


class Shapes:
    """Scenes made in memory: three to five textured objects on a grey textured ground; scene `index` is always the same.

    An object's class is its outline (4) and its texture (3) together, whatever its colours, size and rotation. All
    objects of a scene but one are of one class, which is the scene's label.
    """

    outlines, textures = ("triangle", "square", "star", "disc"), ("stripes", "checks", "rings")
    classes = [f"{texture} {outline}" for outline, texture in itertools.product(outlines, textures)]

    def __init__(self, split, size):
        self.size, self.seed = size, {"train": 0, "val": 1}[split]
        self.length = {"train": 10_000, "val": 2_000}[split]

    def __len__(self):
        return self.length

    def name(self, index):
        return f"shapes scene {index}"

    def label(self, index):
        return int(np.random.default_rng((self.seed, index)).integers(12))

    def load(self, index):
        return Image.fromarray(self.scene(index)[0])

    def scene(self, index):
        """Image (size, size, 3) and mask (size, size), uint8: 0 is the ground, 1 + class an object."""
        rng = np.random.default_rng((self.seed, index))
        label = rng.integers(12)  # first draw: see label()
        y, x = np.mgrid[0:self.size, 0:self.size].astype(np.float32) / self.size
        ground = Image.fromarray(rng.integers(50, 200, (12, 12), np.uint8)).resize((self.size, self.size), Image.BICUBIC)
        image = np.asarray(ground)[..., None].repeat(3, 2)
        mask = np.zeros((self.size, self.size), np.uint8)
        for kind in [rng.integers(12)] + [label] * rng.integers(4, 7):
            radius = rng.uniform(0.16, 0.26)
            center, turn = rng.uniform(radius, 1 - radius, 2).tolist(), rng.uniform(0, 2 * math.pi)
            window = tuple(slice(int((c - radius) * self.size), int((c + radius) * self.size) + 2) for c in center)
            dy, dx = ((coordinate[window] - c) / radius for coordinate, c in zip((y, x), center))
            u, v = math.cos(turn) * dx - math.sin(turn) * dy, math.sin(turn) * dx + math.cos(turn) * dy
            r, angle = np.hypot(u, v), np.arctan2(v, u)
            outline, texture = self.outlines[kind // 3], self.textures[kind % 3]
            f, phase = rng.uniform((13, 0), (18, 2 * math.pi)).tolist()
            if outline == "disc":  # all four outlines have the same area
                edge = 0.64
            elif outline == "star":
                edge = 0.62 + 0.26 * np.cos(5 * angle)
            else:  # a regular polygon in polar coordinates
                corner, reach = {"triangle": (math.pi / 3, 1.0), "square": (math.pi / 4, 0.8)}[outline]
                edge = reach * math.cos(corner) / np.cos(angle % (2 * corner) - corner)
            wave = np.sin(f * (r if texture == "rings" else u) + phase)
            wave = 2 * wave * np.sin(f * v) if texture == "checks" else wave
            inside = r < edge
            image[window][inside] = self.paint(wave, rng.uniform(0, 120, (1, 3)), rng.uniform(110, 255, (1, 3)))[inside]
            mask[window][inside] = 1 + kind
        return image, mask

    @staticmethod
    def paint(wave, dark, light):
        """Two colours (1, c) mixed by a wave (h, w) in [-1, 1] -> (h, w, c) uint8."""
        palette = (dark + (light - dark) * np.linspace(0, 1, 256)[:, None]).astype(np.uint8)  # (256, c)
        return palette[(127 + 255 * wave).clip(0, 255).astype(np.uint8)]


def find_images(root):
    """Images anywhere below `root`, sorted; labelled if all of them lie in ROOT/CLASS/."""
    def refuse(error):  # os.walk would leave the folder out without a word
        raise UserError(f"cannot list a folder of images ({error}): make it readable, or remove it")

    paths, seen = [], {os.path.realpath(root)}
    for folder, inner, files in os.walk(root, onerror=refuse, followlinks=True):
        inner[:] = sorted(d for d in inner if (real := os.path.realpath(os.path.join(folder, d))) not in seen
                          and not seen.add(real))  # a link back to a parent must not loop
        paths += [os.path.join(folder, f) for f in sorted(files) if os.path.splitext(f)[1].lower() in SUFFIXES]
    parents = [os.path.relpath(os.path.dirname(p), root) for p in paths]
    classes = sorted(set(parents))
    if len(classes) > 1 and not any(os.sep in c or c == "." for c in classes):
        number = {c: i for i, c in enumerate(classes)}
        return Images(paths, np.array([number[p] for p in parents]), classes)
    return Images(paths)


def open_data(name, split="train", size=64):
    """The `split` ("train" or "val") of a data set: Images or Shapes, or None where a folder has no validation part.

    name: "shapes" (scenes made for views of `size` pixels); cifar10, cifar100, stl10, voc (torchvision downloads them
    to $DATA or ./data); else a folder, or one in $DATA: X/train and X/val (or X/test) if X has them, else X itself; the
    images/ of a part that has masks/.
    """
    root = os.environ.get("DATA", "data")
    if name == "shapes":
        return Shapes(split, 3 * size // 2)
    if name in ("cifar10", "cifar100", "stl10", "voc"):
        follower = dist.is_initialized() and os.environ.get("LOCAL_RANK", "0") != "0"
        if follower:  # one process of each machine downloads, the others then find the files
            dist.barrier()
        try:
            if name == "stl10":
                parts = {"train": "train+unlabeled", "val": "test"}
                data = torchvision.datasets.STL10(root, parts[split], download=not follower)
                return Images(data.data.transpose(0, 2, 3, 1), data.labels, data.classes)
            if name == "voc":
                return Images(torchvision.datasets.VOCSegmentation(root, image_set=split, download=not follower).images)
            data = getattr(torchvision.datasets, name.upper())(root, split == "train", download=not follower)
            return Images(data.data, np.array(data.targets), data.classes)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot get {name} in {root} ({error}): put torchvision's files there, or set $DATA") from error
        finally:
            if dist.is_initialized() and not follower:
                dist.barrier()
    places = [Path(name), Path(root) / name]
    for place in places:
        if place.is_dir():
            parts = [place / p for p in (("train",) if split == "train" else ("val", "test"))]
            if split == "train":
                parts.append(place)
            for part in parts:
                if part.is_dir():
                    images = find_images(part / "images" if (part / "masks").is_dir() else part)
                    if not len(images):
                        raise UserError(f"no images in {part}: it needs files ending in {' '.join(sorted(SUFFIXES))}")
                    return images
            return None
    raise UserError(f"no data set '{name}': looked for the folders {places[0].absolute()} and {places[1].absolute()}; "
                    "set $DATA or give a folder, or try --data shapes, which needs none")


class Batch(typing.NamedTuple):
    views: list  # V tensors (B, 3, size, size), uint8
    boxes: torch.Tensor  # (B, V, 4): top, left, height, width in pixels of the original image
    flips: torch.Tensor  # (B, V): mirrored left to right
    sizes: torch.Tensor  # (B, 2): height and width of the original image
    labels: torch.Tensor  # (B,): -1 where there is none
    broken: torch.Tensor  # (B,): the index of an image that could not be read, or -1


def cut(image, box, flip, size):
    """The view (3, size, size) of a PIL image in `box` (top, left, height, width in whole pixels), mirrored where `flip`.

    PyTorch's antialiased bicubic of bytes differs from Pillow's by 1 of 255 at most, and is four times faster.
    """
    top, left, height, width = box
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + width, top + height)))).permute(2, 0, 1)
    view = F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]
    return view.flip(2) if flip else view


class Views(torch.utils.data.Dataset):
    """Item (epoch, index) -> one sample of a Batch; what is random depends on (seed, epoch, index) alone.

    sample(rng, height, width) -> a list of (box, flip, size), one a view.
    """

    def __init__(self, data, sample, seed):
        self.data, self.sample, self.seed = data, sample, seed

    def __getitem__(self, key):
        epoch, index = key
        rng = random.Random(f"{self.seed} {epoch} {index}")
        image, source = self.read(index)
        views = self.sample(rng, image.height, image.width)
        return Batch([cut(image, *view) for view in views], torch.tensor([box for box, _, _ in views], dtype=torch.float32),
                     torch.tensor([flip for _, flip, _ in views]), torch.tensor([image.height, image.width]),
                     self.data.label(source) if source >= 0 else -1, -1 if source == index else index)

    def read(self, index):
        """The image and its index: the next readable one if it is broken itself (black if ten in a row are)."""
        for source in range(index, index + 10):
            with contextlib.suppress(Exception):  # a decoder may raise anything; the run counts and names the file
                return self.data.load(source % len(self.data)), source % len(self.data)
        return Image.new("RGB", (256, 256)), -1


class Batches:
    """This process's share of each global batch of steps start..stop, as lists of (epoch, index).

    The order of an epoch is a function of (seed, epoch); the global batch is the same for any number of processes;
    the last, incomplete batch of an epoch is dropped.
    """

    def __init__(self, length, batch_size, start, stop, seed, rank=0, world=1):
        self.length, self.batch_size, self.start, self.stop = length, batch_size, start, stop
        self.seed, self.rank, self.world = seed, rank, world

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        order, order_epoch, per_epoch = None, None, self.length // self.batch_size
        for step in range(self.start, self.stop):
            epoch, batch = divmod(step, per_epoch)
            if epoch != order_epoch:
                order, order_epoch = np.random.default_rng((self.seed, epoch)).permutation(self.length), epoch
            local = order[batch * self.batch_size + self.rank:(batch + 1) * self.batch_size:self.world]
            yield [(epoch, int(index)) for index in local]


def adjust_brightness(x, factor):
    return (factor * x).clamp(0, 1)


def adjust_contrast(x, factor):
    return (factor * x + (1 - factor) * gray(x).mean((2, 3), keepdim=True)).clamp(0, 1)


def adjust_saturation(x, factor):
    return (factor * x + (1 - factor) * gray(x)).clamp(0, 1)


def adjust_hue(x, factor):
    """Turns the hue by `factor` of a circle. With c the chroma and h in sixths, RGB = v - c clamp(min(k, 4 - k))."""
    v, c = x.amax(1, True), x.amax(1, True) - x.amin(1, True)  # (B, 1, H, W)
    r, g, b = x.split(1, 1)
    h = torch.where(v == r, g - b, torch.where(v == g, 2 * c + b - r, 4 * c + r - g)) / c.clamp(min=1e-12)
    k = (h + 6 * factor + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)) % 6  # (B, 3, H, W), from 5, 3, 1
    return v - c * torch.minimum(k, 4 - k).clamp(0, 1)


def gray(x):  # the constants here and in normalize() are numbers: a tensor of them would make the GPU wait for the host
    r, g, b = x.split(1, 1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def gaussian_blur(x, sigma, kernel=23):
    """Blurs with reflected borders. sigma (B,) in pixels.

    A separable blur is one product with a banded matrix a side, which is faster than B different convolutions.
    """
    def matrix(n):
        reach = min(kernel // 2, n - 1)
        offset = torch.arange(-reach, reach + 1, device=x.device)
        weight = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)  # (B, kernel)
        weight = weight / weight.sum(1, keepdim=True)
        source = (torch.arange(n, device=x.device)[:, None] + offset).abs()
        source = torch.where(source < n, source, 2 * (n - 1) - source)  # (n, kernel), reflected
        return x.new_zeros(len(x), n, n).scatter_add_(2, source.expand(len(x), -1, -1), weight[:, None].expand(-1, n, -1))

    rows, cols = matrix(x.shape[2]), matrix(x.shape[3])
    return rows[:, None] @ x @ cols.mT[:, None]  # (B, 1, H, H) (B, 3, H, W) (B, 1, W, W)


def solarize(x, threshold=0.5):
    return torch.where(x >= threshold, 1 - x, x)


class Photometric:
    """Colour augmentation of a batch on its device, with one draw a sample: jitter (in random order), grayscale,
    blur, solarize, normalise by ImageNet's mean and deviation. Each op equals torchvision's for the same factors.

    jitter: the strengths of brightness, contrast, saturation and hue, as ColorJitter takes them; *_p: probabilities.
    """

    ops = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)

    def __init__(self, jitter=(0, 0, 0, 0), jitter_p=0.8, gray_p=0.2, blur_p=0.0, solarize_p=0.0):
        self.jitter, self.jitter_p, self.gray_p, self.blur_p, self.solarize_p = jitter, jitter_p, gray_p, blur_p, solarize_p

    def __call__(self, x, generator):
        """x (B, 3, H, W) uint8 -> float32, normalised. generator: on the CPU, so that no choice waits for the device."""
        def uniform(*shape):
            return torch.rand(*shape, generator=generator)

        def apply(op, chosen, *factors):
            i = chosen.nonzero().flatten().to(x.device, non_blocking=True)
            if len(i):
                x[i] = op(x[i], *(f[chosen].to(x.device, non_blocking=True) for f in factors))

        batch, x = len(x), x.float() / 255
        jittered, order, draw = uniform(batch) < self.jitter_p, uniform(batch, 4).argsort(1), uniform(batch, 4, 1, 1, 1)
        strength = torch.tensor(self.jitter).view(4, 1, 1, 1)
        factors = torch.tensor([1.0, 1, 1, 0]).view(4, 1, 1, 1) + strength * (2 * draw - 1)  # (B, 4, 1, 1, 1)
        for place in range(4):
            for op in range(4):
                if self.jitter[op]:
                    apply(self.ops[op], jittered & (order[:, place] == op), factors[:, op])
        apply(lambda x: gray(x).expand_as(x), uniform(batch) < self.gray_p)
        apply(gaussian_blur, uniform(batch) < self.blur_p, 0.1 + 1.9 * uniform(batch))
        apply(solarize, uniform(batch) < self.solarize_p)
        return normalize(x)


def normalize(x):
    """RGB (B, 3, H, W) from 0 to 1 -> minus ImageNet's mean, divided by its standard deviation."""
    constants = (0.485, 0.229), (0.456, 0.224), (0.406, 0.225)
    return torch.stack([(channel - mean) / std for channel, (mean, std) in zip(x.unbind(1), constants)], 1)


# --- 3. Optimisation -----------------------------------------------------------------------------------------------


class LARS(torch.optim.Optimizer):
    """SGD whose step on each weight matrix is scaled to eta times the matrix's norm (You et al., arXiv 1708.03888).

    One-dimensional parameters (biases, normalisation) are neither decayed nor scaled. A step overwrites the gradients of
    the others, instead of allocating as much again.
    """

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, eta=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            together = [p for p in live if p.ndim > 1], [p for p in live if p.ndim < 2]  # on a GPU: few launches
            alone = [[p] for p in live]  # on a CPU: a parameter stays in the cache from one line to the next
            for params in together if live and live[0].is_cuda else alone:
                if not params:
                    continue
                updates = [p.grad for p in params]
                if params[0].ndim > 1:
                    torch._foreach_add_(updates, params, alpha=group["weight_decay"])
                    w, u = (torch.stack(torch._foreach_norm(t)) for t in (params, updates))
                    ratio = torch.where((w > 0) & (u > 0), group["eta"] * w / u, 1.0)
                    torch._foreach_mul_(updates, ratio.unbind())
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in params]
                torch._foreach_mul_(momenta, group["momentum"])
                torch._foreach_add_(momenta, updates)
                torch._foreach_add_(params, momenta, alpha=-group["lr"])


def cosine_schedule(step, total, warmup, peak, final):
    """Linear from 0 to `peak` over the first `warmup` steps, then half a cosine to `final` at step `total`."""
    if step < warmup:
        return peak * step / warmup
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def probe(logits, labels):
    """Loss and accuracy of the online linear classifier; labels (B,) are -1 where unknown, logits None without labels."""
    if logits is None:
        return 0.0, {}
    known = (labels >= 0).sum().clamp(min=1)
    loss = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum") / known
    return loss, {"accuracy": (logits.argmax(1) == labels).sum() / known}


# --- 4. Run --------------------------------------------------------------------------------------------------------


TIMEOUT = datetime.timedelta(minutes=30)  # listing the images of a slow disk takes one process longer than another
GONE = {  # how torch says that another process is gone: what to say
    r"DataLoader worker \(.*(killed|exited)": "a data loading process was killed: lower --workers if memory is short",
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited":
        "another process of this run has ended: see what it said",
    r"Timed out waiting|Application timeout": f"another process of this run has not answered for {TIMEOUT} h",
}


@contextlib.contextmanager
def one_line_errors():
    """Around a main(): a UserError, or the loss of another process, becomes one line on stderr and exit code 2."""
    try:
        yield
    except (UserError, RuntimeError) as error:
        line = str(error).rpartition("common.UserError: ")[2].strip()  # a loader's worker puts its traceback before it
        if not isinstance(error, UserError):
            line = next((f"{said}; the same command resumes" for seen, said in GONE.items() if re.search(seen, line)), None)
            if line is None:
                raise
        if line and first_to_say(line):
            print(f"error: {printable(line)}", file=sys.stderr, flush=True)
        if dist.is_initialized():  # others may yet ask the store who says it; a thread of gloo needs Python's lock to end,
            time.sleep(1)  # and torch 2.11 would wait for it with the lock
        if not isinstance(error, UserError):  # an orderly end would wait for a dead process, or for a lock it died with
            left = multiprocessing.active_children()
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whose handler, torch's, would raise the error anew
            for worker in left:
                worker.kill()
            os._exit(2)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def first_to_say(line):
    """Whether no other process has said it yet, as far as one can know."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # the store may have gone with the process that held it
            return dist.distributed_c10d._get_default_store().add(line, 1) == 1
    return True


def printable(name):
    """The same on one line, in any script: control characters and bytes that are no text are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def parse_args(parser, recipes):
    """Adds the flags of every method; a recipe gives the defaults, any flag overrides it.

    recipes: by the family of --arch (resnet, convnext, vit) if it has one, else by --data, else imagenet's.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    flag = parser.add_argument
    flag("--data", default="shapes", help="shapes, cifar10, cifar100, stl10, voc, or a folder of images (or one in $DATA)")
    flag("--arch", help=", ".join(ARCHITECTURES))
    flag("--size", type=int, help="pixels of a view")
    flag("--epochs", type=int)
    flag("--batch-size", type=int, help="over all processes")
    flag("--base-lr", type=float, help="the peak is base-lr * batch-size / 256")
    flag("--final-lr", type=float)
    flag("--weight-decay", type=float)
    flag("--warmup-epochs", type=int)
    flag("--seed", type=int, default=0)
    flag("--bf16", action=argparse.BooleanOptionalAction, default=has_bf16(), help="autocast; default: where it is fast")
    flag("--workers", type=int, default=min(12, cores), help="data loading processes of each training process")
    flag("--out", default="runs", help="folder of all runs")
    flag("--name", help="this run's folder in --out; by default METHOD-DATA")
    flag("--save-minutes", type=float, default=10, help="time between checkpoints")
    flag("--log-every", type=int, default=50, help="steps between log lines")
    known = parser.parse_known_args()[0]
    data, family = Path(known.data).name, (known.arch or "").split("_")[0]
    recipe = recipes.get(family, recipes.get(data, recipes["imagenet"]))
    parser.set_defaults(**recipe, name=f"{Path(sys.argv[0]).stem}-{data}")
    return parser.parse_args()


def has_bf16():
    """Whether bfloat16 is fast here: on GPUs and CPUs with instructions for it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"))


def of_this_start(store, rank, world):
    """The part of torchrun's store that is of this start alone.

    The store outlives a restart (of torch 2.15 at least), and with it the addresses of the dead, to which some process
    would try to connect. So each process draws a name, the first one lists the names until all processes have found
    themselves in one and the same list, and that list is the part's name.
    """
    mine, agreed = os.urandom(8).hex(), None
    store.set(f"name {rank}", mine)
    while not agreed or store.add(agreed, 0) < world:
        if rank == 0:
            store.set("names", " ".join(store.get(f"name {r}").decode() for r in range(world)))
        names = store.get("names").decode()
        digest = hashlib.sha256(names.encode()).hexdigest()
        if mine in names and digest != agreed:
            agreed = digest
            store.add(agreed, 1)
        time.sleep(0.02)
    return dist.PrefixStore(agreed, store)


def set_up(seed):
    """Joins torchrun's process group (NCCL or gloo; none without a launcher), seeds, -> the device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=of_this_start(store, rank, world),
                                rank=rank, world_size=world, timeout=TIMEOUT)
    torch.manual_seed(seed)
    return device


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def distribute(model, device):
    """The model on its device, and the same ready for training: channels_last, SyncBatchNorm on CUDA, DDP."""
    model = model.to(device, memory_format=torch.channels_last)
    if not dist.is_initialized():
        return model, model
    if device.type == "cuda":  # on the CPU, BatchNorm's statistics stay those of each process
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ids = [device.index] if device.type == "cuda" else None
    return model, nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def seed_step(seed, step):
    """Makes all that is random on the device a function of (seed, step, rank); the generator for Photometric."""
    rng = random.Random(f"{seed} {step} {rank_and_world()[0]}")
    torch.manual_seed(rng.getrandbits(63))  # drop path and the like
    return torch.Generator().manual_seed(rng.getrandbits(63))


def write(path, save, previous=None):
    """save(file), so that `path` holds the old bytes or all of the new ones, whatever happens meanwhile.

    previous: a second name that the old file keeps.
    """
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            with contextlib.suppress(OSError):  # a file system without hard links keeps no previous one
                previous.unlink(missing_ok=True)
                os.link(path, previous)  # not renamed: at no moment is there no file at `path`
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):  # torch.save makes a RuntimeError of a failure to write, but not only of that
            raise
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({reason}); what it held before is intact: free space, run again") from error


def whole(path):
    """Whether the checkpoint at `path` is there and holds the bytes that were written: torch.load does not look at their
    checksums."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # whatever the bytes of the file make zipfile raise
        return False


def ignore_signals(_):
    """In data loading workers: a signal to the whole process group is the main process's to answer."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class Run:
    """A training run in args.out/args.name: log.jsonl, last.pt, backbone.pt. Resumes from last.pt if there is one; where
    that is damaged, from previous.pt, the checkpoint before it."""

    FREE = {"out", "name", "workers", "save_minutes", "log_every"}  # flags that may change when a run is resumed

    def __init__(self, args, model, optimizer, data, device):
        self.args, self.model, self.optimizer, self.data, self.device = args, model, optimizer, data, device
        self.rank, self.world = rank_and_world()
        self.folder, self.step, self.stop, self.broken = Path(args.out) / args.name, 0, 0, set()
        if args.batch_size < 2 * self.world or args.batch_size % self.world:
            raise UserError(f"--batch-size {args.batch_size} must be at least 2 for each of the {self.world} processes and "
                            "divisible by their number")
        self.per_epoch = len(data) // args.batch_size
        if not self.per_epoch:
            raise UserError(f"--batch-size {args.batch_size} is larger than the {len(data)} images of {args.data}")
        self.total, self.peak_lr = args.epochs * self.per_epoch, args.base_lr * args.batch_size / 256
        # For votes that no GPU waits for
        self.control = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.world > 1 else None
        problem = [self.claim() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(problem, group=self.control)
        if problem[0]:
            self.fail(problem[0])
        if (self.folder / "last.pt").exists():
            self.resume(read_checkpoint(self.folder / "last.pt"))
        if self.world > 1:
            seen = torch.tensor([self.step, -self.step, len(data), -len(data)])
            dist.all_reduce(seen, dist.ReduceOp.MAX, group=self.control)
            if seen[0] != -seen[1] or seen[2] != -seen[3]:
                raise UserError("the processes see different checkpoints or images: --out and --data must be shared by all")
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: setattr(self, "stop", number))
        if self.rank == 0:
            log = self.folder / "log.jsonl"
            kept = []
            for line in log.read_text(errors="replace").splitlines(keepends=True) if log.exists() else []:
                with contextlib.suppress(ValueError, TypeError, KeyError):  # a crash of the machine may leave any bytes
                    if line.endswith("\n") and json.loads(line)["step"] <= self.step:
                        kept.append(line)
            write(log, lambda file: file.write("".join(kept).encode()))
            self.log_file = open(log, "a")
            self.describe()

    def claim(self):
        """Makes the folder this run's alone, with a whole last.pt if there is any. -> what prevents it, or None."""
        name, last, previous = self.args.name, self.folder / "last.pt", self.folder / "previous.pt"
        if name in ("", ".", "..") or "/" in name or not name.isprintable():
            return f"--name {name!r} is no name of a folder in --out: take one without slashes and control characters"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "w")
        except OSError as error:
            return f"cannot write in {self.folder} ({error}): give another --out"
        try:
            # The kernel drops a process's lock when it dies, however it dies; data loading workers, which may outlive it
            # for seconds, do not inherit it, as they would one of flock(). NFS keeps it for all machines; where a file
            # system has no locks, or keeps them for each machine alone, nothing but care prevents a second run.
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return f"another run is at work in {self.folder}: wait for its end, or give another --name"
        except OSError as error:
            print(f"warning: cannot lock {self.folder} ({error}): start no second run in it", file=sys.stderr, flush=True)
        if (last.exists() or previous.exists()) and not whole(last):
            if not whole(previous):
                return f"{last} is damaged, and there is no whole previous.pt: give another --name"
            os.replace(previous, last)
            print(f"warning: {last} was missing or damaged: previous.pt, the checkpoint before it, takes its place",
                  file=sys.stderr, flush=True)

    def resume(self, state):
        now, then = {**vars(self.args), "images": len(self.data)}, state["args"]
        changed = [f"{key.replace('_', '-')} {then[key]} (now {value})" for key, value in now.items()
                   if key in then.keys() - self.FREE and value != then[key]]
        if changed:
            raise UserError(f"{self.folder} was started with {', '.join(changed)}: give the same, or another --name")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.broken = state["step"], set(state["broken"])

    def describe(self):
        def millions(module):
            return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M"
        rows = {**dict(sorted(vars(self.args).items())), "peak lr": f"{self.peak_lr:g}",
                "images": f"{len(self.data)}, {self.per_epoch} steps an epoch, {self.total} in all",
                "processes": f"{self.world} on {self.device.type}, {self.args.batch_size // self.world} images each",
                "parameters": f"{millions(self.model.backbone)} backbone, {millions(self.model)} in all"}
        for key, value in rows.items():
            print(f"  {key.replace('_', '-'):16} {value}")
        print(f"{self.folder}:", f"resumed at step {self.step}" if self.step else "a new run", flush=True)

    def set_lr(self):
        warmup = self.args.warmup_epochs * self.per_epoch
        lr = cosine_schedule(self.step, self.total, warmup, self.peak_lr, self.args.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1)
        return lr

    def batches(self, sample):
        """Yields a Batch on the device for each step left; saves as time goes by, on a signal and at the end."""
        args, cuda = self.args, self.device.type == "cuda"
        order = Batches(len(self.data), args.batch_size, self.step, self.total, args.seed, self.rank, self.world)
        loader = torch.utils.data.DataLoader(  # forked workers share the data, and end soon after a parent that was killed
            Views(self.data, sample, args.seed), batch_sampler=order, pin_memory=cuda, num_workers=args.workers,
            worker_init_fn=ignore_signals, multiprocessing_context="fork" if args.workers else None)
        self.reset_clock()
        saved, vote = time.monotonic(), None
        asked = saved
        for batch in loader:
            self.waited += time.monotonic() - asked
            self.note_broken(batch.broken)
            views, *rest = batch
            yield Batch([v.to(self.device, non_blocking=True) for v in views],
                        *(t.to(self.device, non_blocking=True) for t in rest))
            self.step += 1
            wish = self.stop or int(time.monotonic() - saved >= 60 * args.save_minutes)  # a signal, or 1: save, or 0
            if self.world > 1:
                # All must save and stop at one step, though signals and clocks tell them at different ones: a vote that
                # is called at each step and read at the next, so that nobody waits.
                granted = 0
                if vote:
                    vote[1].wait()
                    granted = int(vote[0])
                ballot = torch.tensor(self.stop if granted else wish)  # what is granted is not asked for again
                vote, wish = (ballot, dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self.control, async_op=True)), granted
            if wish or self.step == self.total:
                self.save(must=wish > 1 or self.step == self.total)
                saved = time.monotonic()
            if wish > 1:
                if self.rank == 0:
                    print(f"{signal.Signals(wish).name}: saved at step {self.step}; the same command resumes", flush=True)
                sys.exit(0)
            asked = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        if self.world > 1:  # on the CPU each process has its own running statistics: all take those that were saved
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def note_broken(self, indices):
        for index in set(indices[indices >= 0].tolist()) - self.broken:
            self.broken.add(index)
            why = "but now it can be read"
            try:
                self.data.load(index)  # once more, as the reason stayed in the worker
            except Exception as error:
                why = str(error) or type(error).__name__
            print("warning:", printable(f"cannot read {self.data.name(index)} ({why}); another takes its place"),
                  file=sys.stderr, flush=True)

    def check_broken(self):
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, self.broken, group=self.control)
            self.broken = set().union(*everyone)
        if len(self.broken) > 0.01 * len(self.data):
            names = ", ".join(self.data.name(i) for i in sorted(self.broken))
            self.fail(f"over 1% of the images are unreadable ({len(self.broken)}): mend or remove {names}")

    def fail(self, why):
        """For what all processes find out together."""
        raise UserError(why if self.rank == 0 else "")

    def reset_clock(self):
        self.waited, self.clock, self.clock_step = 0.0, time.monotonic(), self.step

    def log(self, **metrics):
        """Every --log-every steps and at the last: a line in log.jsonl and one for the eye. Numbers or 0-d tensors.

        They are averaged over processes. Raises UserError, with every term, where the loss is not finite.
        """
        self.metrics, step = metrics, self.step + 1
        if step % self.args.log_every and step != self.total:
            return
        self.check_broken()
        values = [torch.as_tensor(v, dtype=torch.float64, device=self.device).detach() for v in metrics.values()]
        values = torch.stack(values)
        if self.world > 1:
            dist.all_reduce(values)
        line = dict(zip(metrics, (values / self.world).tolist()))
        if not math.isfinite(line["loss"]):
            self.fail(self.diverged(line))
        if self.rank == 0:
            seconds = time.monotonic() - self.clock
            rate = (step - self.clock_step) / seconds
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes
            memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else memory
            eta = (self.total - step) / rate
            line = dict(step=step, epoch=step / self.per_epoch, **line, broken=len(self.broken), eta_s=eta,
                        images_per_s=rate * self.args.batch_size, data_wait=self.waited / seconds, memory_gb=memory / 1e9)
            try:
                self.log_file.write(json.dumps(line) + "\n")
                self.log_file.flush()
            except OSError as error:  # the line stays in the buffer, to go out with a later one
                print(f"warning: cannot write to {self.folder / 'log.jsonl'} ({error})", file=sys.stderr, flush=True)
            print(f"epoch {line['epoch']:.2f}/{self.args.epochs}", *(f"{k} {line[k]:.4g}" for k in metrics),
                  f"{line['images_per_s']:.0f} img/s", f"wait {line['data_wait']:.0%}", f"{line['memory_gb']:.1f} GB",
                  f"eta {eta // 3600:.0f}:{eta % 3600 / 60:02.0f} h", *[f"broken {len(self.broken)}"] * bool(self.broken),
                  sep="  ", flush=True)
        self.reset_clock()

    def diverged(self, line):
        terms = ", ".join(f"{key} {float(value):g}" for key, value in line.items())
        return (f"NaN or infinity at step {self.step + 1} ({terms}); what is saved in {self.folder} is of an earlier, good "
                "step: try a lower --base-lr or --no-bf16 under another --name")

    def save(self, must):
        """last.pt and backbone.pt, if all weights are finite. A failure to write is fatal only if it `must` succeed.

        All processes call it, so that they find out together where weights are not finite; the first one writes.
        """
        if not all(p.isfinite().all() for p in self.model.parameters()):
            self.fail(self.diverged(self.metrics))
        if self.rank:
            return
        state = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), step=self.step,
                     broken=sorted(self.broken), args={**vars(self.args), "images": len(self.data)})
        try:
            write(self.folder / "backbone.pt", lambda file: torch.save(self.model.backbone.state_dict(), file))
            write(self.folder / "last.pt", lambda file: torch.save(state, file), self.folder / "previous.pt")
        except UserError as error:
            if must:
                raise
            print(f"warning: {error}", file=sys.stderr, flush=True)  # the next checkpoint may find room
