"""What the five methods share and no paper defines: backbones, data, optimisation, and a run's plumbing.

    Legend of all files: B batch, V views, H W map height and width, N = H*W locations, D width.
"""
import argparse
import codecs
import contextlib
import itertools
import math
import os
import random
import stat
import typing
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
        from shapes import Shapes

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


def printable(name):
    """The same on one line, in any script: control characters and bytes that are no text are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


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
