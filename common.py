"""What the methods share and no paper defines: backbones, data sets, views, colour augmentation.

Legend of all files: B this process's batch, n the global one, G processes, V views, D width,
H x W a map's height and width, N = H W its locations, H0 x W0 an image's height and width."""
import dataclasses
import hashlib
import itertools
import math
import os
import sys
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
from torchvision import datasets as sets
from torchvision.models.convnext import CNBlock, CNBlockConfig
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import StochasticDepth
from torchvision.transforms.v2 import functional as TF


class UserError(Exception):
    """A mistake that the user can mend: shown as one line with its cure, exit code 2."""


# --- 1. Backbones ---------------------------------------------------------------------------------
# backbone(images (B, 3, H0, W0)) -> maps (B, N, D), pooled (B, D); .dim is D, .stride is H0 / H.
# backbone.stages(images) -> the last four levels, [(B, D_i, H_i, W_i)], the last one as in maps.


def outputs(layers, x):
    """What each layer returns, the first fed with x and every other with the output before it."""
    found = []
    for layer in layers:
        x = layer(x)
        found.append(x)
    return found


def flat(x):
    """A map (B, D, H, W) -> (B, N, D) and its mean (B, D)."""
    return rearrange(x, "b d h w -> b (h w) d"), x.mean((2, 3))


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet without its classifier. Images under 100 pixels get the small stem, a
    3x3 convolution of stride 1 without max-pooling: stride 8 instead of 32."""

    def __init__(self, block, layers, width, size):
        super().__init__(block, layers, zero_init_residual=True, width_per_group=width)
        self.fc = nn.Identity()
        self.dim = 512 * block.expansion
        self.stride = 8 if size < 100 else 32
        if size < 100:
            self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.maxpool = nn.Identity()

    def stages(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return outputs([self.layer1, self.layer2, self.layer3, self.layer4], x)

    def forward(self, x):
        return flat(self.stages(x)[-1])


class PlainBlock(CNBlock):
    """ConvNeXt's block without LayerScale."""

    def __init__(self, *args):
        super().__init__(*args)
        del self.layer_scale

    def forward(self, x):
        return x + self.stochastic_depth(self.block(x))


class ConvNeXt(torchvision.models.ConvNeXt):
    """torchvision's ConvNeXt without its classifier, and without LayerScale, as VICRegL has it: its
    `pooled` is the mean of the normalized map. With LayerScale it is torchvision's network."""

    def __init__(self, widths, depths, drop_path, layer_scale):
        stages = [CNBlockConfig(*c) for c in zip(widths, (*widths[1:], None), depths)]
        block = CNBlock if layer_scale else PlainBlock
        super().__init__(stages, stochastic_depth_prob=drop_path, block=block)
        self.classifier[2] = nn.Identity()
        self.dim = widths[-1]
        self.stride = 32
        self.layer_scale = layer_scale

    def stages(self, x):
        *maps, x = outputs(self.features, x)[1::2]  # stem, stage, downsampling, stage, ...
        return [*maps, self.classifier[0](x)]

    def forward(self, x):
        x = self.features(x)  # (B, D, H, W)
        maps, pooled = flat(self.classifier[0](x))
        if self.layer_scale:
            pooled = self.classifier[0](x.mean((2, 3), keepdim=True)).flatten(1)
        return maps, pooled


class Block(nn.Module):
    """A transformer block: tokens (B, 1+N, D) -> the same."""

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.heads = heads
        self.drop_path = StochasticDepth(drop_path, "row")
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        qkv = self.attn.qkv(self.norm1(x))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.drop_path(self.attn.proj(rearrange(mixed, "b h n d -> b n (h d)")))
        hidden = F.gelu(self.mlp.fc1(self.norm2(x)))
        return x + self.drop_path(self.mlp.fc2(hidden))


class ViT(nn.Module):
    """Vision transformer with the parameter names of DINO and timm; `pooled` is the [CLS] token.
    Position embeddings are made for `size` pixels and interpolated for images of other sizes."""

    def __init__(self, dim, depth, heads, patch, size, drop_path):
        super().__init__()
        self.dim = dim
        self.stride = patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, stride=patch)})
        rates = [drop_path * i / (depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def position_embeddings(self, height, width):
        """For a grid of height x width patches: (1, 1+N, D)."""
        grid = math.isqrt(self.pos_embed.shape[1] - 1)
        if (height, width) == (grid, grid):
            return self.pos_embed
        cls, pos = self.pos_embed.split([1, grid**2], 1)
        pos = rearrange(pos, "1 (h w) d -> 1 d h w", h=grid)
        pos = F.interpolate(pos, (height, width), mode="bicubic")
        return torch.cat([cls, rearrange(pos, "1 d h w -> 1 (h w) d")], 1)

    def tokens(self, x):
        """The outputs (B, 1+N, D) of all blocks."""
        x = self.patch_embed.proj(x)  # (B, D, H, W)
        positions = self.position_embeddings(*x.shape[2:])
        cls = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls, rearrange(x, "b d h w -> b (h w) d")], 1) + positions  # (B, 1+N, D)
        return outputs(self.blocks, x)

    def stages(self, x):
        maps = [self.norm(tokens)[:, 1:] for tokens in self.tokens(x)[-4:]]
        return [rearrange(m, "b (h w) d -> b d h w", h=x.shape[2] // self.stride) for m in maps]

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
        self.dim = 256
        self.stride = 8

    def stages(self, x):
        return outputs(self, x)[2::3]  # after each ReLU

    def forward(self, x):
        return flat(self.stages(x)[-1])


RESNETS = {  # blocks of the four stages, and their inner width in the first one
    "resnet18": (BasicBlock, [2, 2, 2, 2], 64), "resnet34": (BasicBlock, [3, 4, 6, 3], 64),
    "resnet50": (Bottleneck, [3, 4, 6, 3], 64), "resnet101": (Bottleneck, [3, 4, 23, 3], 64),
    "wide_resnet50_2": (Bottleneck, [3, 4, 6, 3], 128),
}
CONVNEXTS = {  # widths and depths of the four stages
    "convnext_tiny": ((96, 192, 384, 768), (3, 3, 9, 3)),
    "convnext_small": ((96, 192, 384, 768), (3, 3, 27, 3)),
    "convnext_base": ((128, 256, 512, 1024), (3, 3, 27, 3)),
}
VITS = {"tiny_vit": (128, 4, 4, 8)}  # width, depth, heads, side of a patch
for patch in (16, 8):
    for name, width, heads in (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12)):
        VITS[f"vit_{name}_patch{patch}"] = (width, 12, heads, patch)
ARCHITECTURES = ["tiny_convnet", *RESNETS, *CONVNEXTS, *VITS]


def build_backbone(arch, size=224, drop_path=0.0, layer_scale=False):
    """A freshly initialized backbone for images of `size` pixels. Raises UserError."""
    arch = arch.removesuffix("_224")  # timm's vit_small_patch16_224
    if arch in RESNETS:
        backbone = ResNet(*RESNETS[arch], size)
    elif arch in CONVNEXTS:
        backbone = ConvNeXt(*CONVNEXTS[arch], drop_path, layer_scale)
    elif arch in VITS:
        backbone = ViT(*VITS[arch], size, drop_path)
    elif arch == "tiny_convnet":
        backbone = TinyConvNet()
    else:
        raise UserError(f"no architecture '{arch}': --arch is one of {', '.join(ARCHITECTURES)}")
    if size < backbone.stride:
        raise UserError(f"--size {size} is below {backbone.stride}, one stride of {arch}")
    return backbone


def grid_of(size, stride):
    """Locations along a map's side, for square views of `size` pixels. Raises UserError."""
    if size % stride or size < 2 * stride:  # else centres of locations would not be where we say
        raise UserError(f"views of {size} pixels: --size must make a multiple of {stride}, "
                        f"{2 * stride} or more")
    return size // stride


# --- 2. Data sets ---------------------------------------------------------------------------------

DOWNLOADS = ("cifar10", "cifar100", "stl10", "voc")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # PostScript would run a program
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
MAX_PIXELS = 50e6  # of an image, 150 MB in memory


class Images:
    """Images in files below `root`, or in one uint8 array (n, H0, W0, 3); labelled or not."""

    def __init__(self, items, labels=None, classes=(), root=""):
        if not isinstance(items, np.ndarray):  # forked workers share an array, not a list
            items = np.array([os.fsencode(path) for path in items])
        self.items = items  # bytes (dtype "S") or pixels
        self.labels = labels
        self.classes = classes
        self.root = root

    def __len__(self):
        return len(self.items)

    def label(self, index):
        return -1 if self.labels is None else int(self.labels[index])

    def name(self, index):
        if self.items.dtype.kind != "S":
            return f"image {index}"
        return os.path.join(self.root, os.fsdecode(self.items[index]))

    def digest(self):
        """Tells data apart: by names below the root, or pixels; by labels and classes."""
        described = hashlib.sha256(repr(self.classes).encode())
        described.update(np.ascontiguousarray(self.items))
        described.update(b"" if self.labels is None else np.ascontiguousarray(self.labels))
        return described.hexdigest()[:12]

    def load(self, index):
        """The RGB image, upright. Raises whatever a decoder raises on a broken file."""
        if self.items.dtype.kind != "S":
            return Image.fromarray(self.items[index])
        path = self.name(index)
        if Path(path).is_fifo():  # it would be waited for without end
            raise OSError("a pipe, no regular file")
        with Image.open(path, formats=FORMATS) as image:
            if not 0 < image.width * image.height <= MAX_PIXELS:
                raise OSError(f"{image.width} x {image.height} pixels, over {MAX_PIXELS:g} in all")
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in "IF":  # integers of 16 or 32 bits, or floats: to bytes
                pixels = np.asarray(image, np.float32)
                scale = 1 / 257  # 65,535 becomes 255
                if pixels.max() <= 255 and not image.mode.startswith("I;16"):
                    scale = 255 if image.mode == "F" and pixels.max() <= 1 else 1
                image = Image.fromarray((scale * pixels).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")


def find_images(root):
    """Images anywhere below `root`, sorted; labelled if all of them lie in ROOT/CLASS/. What lies
    beside a folder named images is left out: masks, mostly. Raises UserError."""
    def refuse(error):  # os.walk would leave the folder out without a word
        raise UserError(f"cannot list a folder of images ({error}): make it readable or remove it")

    paths = []
    seen = set()
    for folder, inner, files in os.walk(root, onerror=refuse, followlinks=True):
        if os.path.realpath(folder) in seen:  # a link back to a parent must not loop
            inner.clear()
            continue
        seen.add(os.path.realpath(folder))
        inner[:] = sorted(name for name in inner if name[0] != ".")  # .ipynb_checkpoints
        if "images" in inner:
            inner[:] = ["images"]
        for name in sorted(files):
            if name[0] != "." and Path(name).suffix.lower() in SUFFIXES:  # ._x.jpg is no image
                paths.append(os.path.relpath(os.path.join(folder, name), root))
    parents = [os.path.dirname(path) for path in paths]
    classes, labels = np.unique(parents, return_inverse=True)
    if len(classes) < 2 or any(c == "" or os.sep in c for c in classes):
        return Images(paths, root=root)
    return Images(paths, labels, classes.tolist(), root)


def open_downloaded(name, split, root):
    """One of torchvision's data sets, downloaded to `root` if it is not there. Raises UserError."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not first:
        dist.barrier()  # the first process of each machine downloads
    try:
        if name == "stl10":
            part = {"train": "train+unlabeled", "val": "test"}[split]
            data = sets.STL10(root, part, download=True)
            images = Images(data.data.transpose(0, 2, 3, 1), data.labels, data.classes)
        elif name == "voc":
            images = Images(sets.VOCSegmentation(root, image_set=split, download=True).images)
        else:
            data = getattr(sets, name.upper())(root, split == "train", download=True)
            images = Images(data.data, np.array(data.targets), data.classes)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot get {name} in {root} ({error}); set $DATA") from error
    if dist.is_initialized() and first:
        dist.barrier()
    return images


def open_data(name, split="train", size=64):
    """The part "train" or "val" of a data set, or None where a folder has none. name: shapes (for
    views of `size` pixels); cifar10, cifar100, stl10, voc (downloaded to $DATA or ./data); or a
    folder, here or in $DATA, with train/ and val/ (or valid/, test/), or of images. UserError."""
    root = os.environ.get("DATA", "data")
    if name == "shapes":
        from shapes import Shapes
        return Shapes(split, 3 * size // 2)
    if name in DOWNLOADS:
        return open_downloaded(name, split, root)
    folder = Path(name) if Path(name).is_dir() else Path(root, name)
    if not folder.is_dir():
        raise UserError(f"no data set '{name}': looked for it here, in {root}; try --data shapes")
    names = ("train", ".") if split == "train" else ("val", "valid", "test")
    part = next((folder / name for name in names if (folder / name).is_dir()), None)
    if part is None:
        return None
    images = find_images(part)
    if not len(images):
        raise UserError(f"no images in {part}: their names end in {' '.join(sorted(SUFFIXES))}")
    return images


# --- 3. Views -------------------------------------------------------------------------------------

class Batch(typing.NamedTuple):
    views: list  # V tensors (B, 3, size, size), uint8
    boxes: torch.Tensor  # (B, V, 4): top, left, height, width in pixels of the original image
    flips: torch.Tensor  # (B, V): mirrored left to right
    sizes: torch.Tensor  # (B, 2): height and width of the original image
    labels: torch.Tensor  # (B,): -1 where there is none
    broken: torch.Tensor  # (B,): the image could not be read, and another took its place


def seed_of(*numbers):
    """A seed of 63 bits that is a function of these integers."""
    return int(np.random.default_rng(numbers).integers(2**63))


def cut(image, box, flip, size):
    """The view (3, size, size), uint8, of a PIL image in `box`, mirrored where `flip`."""
    top, left, height, width = box
    crop = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)  # (3, height, width)
    # Within 1 of 255 of Pillow's bicubic, and four times as fast.
    view = F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]
    return view.flip(2) if flip else view


@dataclasses.dataclass
class Views(torch.utils.data.Dataset):
    """Item (epoch, index) -> one sample of a Batch. Randomness depends on (seed, epoch, index)."""

    data: object  # an image by data.load(index), its label, its name
    sample: object  # sample(image) -> [(box, flip, size), ...], drawn with torch's global generator
    seed: int

    def __getitem__(self, key):
        epoch, index = key
        image, source = self.read(index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            sampled = self.sample(image)
        views = [cut(image, *view) for view in sampled]
        boxes = torch.tensor([box for box, _, _ in sampled], dtype=torch.float32)
        flips = torch.tensor([flip for _, flip, _ in sampled])
        label = -1 if source is None else self.data.label(source)
        size = torch.tensor([image.height, image.width])
        return Batch(views, boxes, flips, size, label, source != index)

    def read(self, index):
        """The image and its index; of a broken one the next that can be read, or black and None."""
        for offset in range(10):
            source = (index + offset) % len(self.data)
            try:
                return self.data.load(source), source
            except Exception as error:  # a decoder may raise anything
                said = f"cannot read {self.data.name(source)!r} ({error!r}): another is taken"
                print("warning:", said, file=sys.stderr, flush=True)
        return Image.new("RGB", (256, 256)), None


@dataclasses.dataclass
class Batches:
    """This process's share of the global batches start..stop, as lists of (epoch, index). Their
    order is a function of (seed, epoch); an epoch's last, incomplete batch is dropped."""

    length: int
    batch_size: int
    start: int
    stop: int
    seed: int
    rank: int = 0
    world: int = 1

    def __iter__(self):
        for step in range(self.start, self.stop):
            epoch, batch = divmod(step, self.length // self.batch_size)
            if batch == 0 or step == self.start:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(epoch, int(index)) for index in rows[self.rank :: self.world]]


# --- 4. Colour augmentation -----------------------------------------------------------------------

def blend(x, weights):
    """Brightness, contrast or saturation: the sum, in [0, 1], of images x (B, 3, H0, W0), of their
    mean gray and of their gray, each by its `weights` (B, 3)."""
    own, to_mean, to_gray = weights[:, :, None, None, None].unbind(1)  # (B, 1, 1, 1) each
    gray = TF.rgb_to_grayscale(x)  # (B, 1, H0, W0)
    other = (to_gray * gray).add_(to_mean * gray.mean((2, 3), keepdim=True))
    return torch.addcmul(other, own, x).clamp_(0, 1)


def adjust_hue(x, factor):
    """Turns the hue by `factor` (B,) of a circle. With value v, chroma c and hue h in sixths,
    RGB = v - c clamp(min(k, 4 - k), 0, 1), where k = (n + h) mod 6 and n = 5, 3, 1."""
    r, g, b = x.split(1, 1)  # (B, 1, H0, W0) each
    v = x.amax(1, keepdim=True)
    c = v - x.amin(1, keepdim=True)
    h = torch.where(v == r, g - b, torch.where(v == g, 2 * c + b - r, 4 * c + r - g))
    h = h.div_(c.clamp(min=1e-12)).add_(6 * factor.view(-1, 1, 1, 1))
    k = (h + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)).remainder_(6)  # (B, 3, H0, W0)
    return v - torch.minimum(k, 4 - k).clamp_(0, 1).mul_(c)


def gaussian_blur(x, sigma, kernel=23):
    """Blurs each image of x (B, 3, H0, W0) with its own sigma (B,) in pixels; borders reflected."""
    b, _, h, w = x.shape
    reach = min(kernel // 2, h - 1, w - 1)
    offset = torch.arange(-reach, reach + 1, device=x.device)
    weight = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)  # (B, kernel)
    weight = weight / weight.sum(1, keepdim=True)
    weight = weight.repeat_interleave(3, 0)[:, None, None]  # (3B, 1, 1, kernel)
    for _ in range(2):  # along the rows, then along the columns
        x = F.pad(x.reshape(1, 3 * b, *x.shape[2:]), (reach, reach, 0, 0), mode="reflect")
        x = F.conv2d(x, weight, groups=3 * b).unflatten(1, (b, 3))[0].mT
    return x


def normalize(x):
    """RGB (B, 3, H0, W0) from 0 to 1 -> minus ImageNet's mean, by its standard deviation."""
    r, g, b = x.unbind(1)  # numbers, not a tensor of them: the GPU would wait for the host
    return torch.stack([(r - 0.485) / 0.229, (g - 0.456) / 0.224, (b - 0.406) / 0.225], 1)


@dataclasses.dataclass
class Photometric:
    """Colour augmentation of a batch on its device, with one draw a sample: jitter in random order,
    grayscale, blur, solarize, normalize. Each op is torchvision's for the same factors."""

    jitter: tuple = (0, 0, 0, 0)  # strengths of brightness, contrast, saturation, hue
    jitter_p: float = 0.8  # probabilities
    gray_p: float = 0.2
    blur_p: float = 0.0
    solarize_p: float = 0.0
    size: int = 224  # of a run's whole views: blur is in proportion, the papers' 0.1 to 2 at 224

    def draw(self, n):
        """Steps for n images: [(op, those it changes (n,), its factors (n, ...) if any), ...]."""
        jittered = torch.rand(n) < self.jitter_p
        order = torch.rand(n, 4).argsort(1)  # of brightness 0, contrast 1, saturation 2 and hue 3
        change = torch.tensor(self.jitter) * (2 * torch.rand(n, 4) - 1)  # by each, 0 for none
        grayed = torch.rand(n) < self.gray_p
        blurred = torch.rand(n) < self.blur_p
        sigma = (0.1 + 1.9 * torch.rand(n)) * self.size / 224  # pixels
        solarized = torch.rand(n) < self.solarize_p

        own = 1 + change.gather(1, order)  # (n, 4): the image's weight at each place in the order
        rest = 1 - own
        weights = torch.stack([own, rest * (order == 1), rest * (order == 2)], 2)  # (n, 4, 3)
        hue = (order == 3).int().argmax(1)  # its place
        return [
            # What an image has before its hue, the hue of all images at once, then what is left.
            *((blend, jittered & (place < hue), weights[:, place]) for place in range(3)),
            (adjust_hue, jittered, change[:, 3]),
            *((blend, jittered & (place > hue), weights[:, place]) for place in range(1, 4)),
            (lambda x: TF.rgb_to_grayscale(x, 3), grayed),
            (gaussian_blur, blurred, sigma),
            (lambda x: TF.solarize(x, 0.5), solarized),
        ]

    def __call__(self, x):
        """x (B, 3, H0, W0) uint8 -> float32, normalized."""
        (x,) = recolour([self], [x])
        return x


def recolour(colours, views):
    """V views (B, 3, H0, W0), uint8, each by its Photometric -> float32, normalized. Those of one
    size in a row are one batch, for fewer launches. Draws on the CPU, without a host sync."""
    done = []
    for _, group in itertools.groupby(zip(colours, views), lambda pair: pair[1].shape):
        colours_of_size, views_of_size = zip(*group)
        x = torch.cat(views_of_size).float() / 255
        draws = [colour.draw(len(view)) for colour, view in zip(colours_of_size, views_of_size)]
        for steps in zip(*draws):  # the same step of each view
            ops, chosen, *factors = zip(*steps)
            chosen = torch.cat(chosen)
            i = chosen.nonzero().flatten().to(x.device, non_blocking=True)
            if len(i):
                factors = [torch.cat(f)[chosen].to(x.device, non_blocking=True) for f in factors]
                x[i] = ops[0](x[i], *factors)
        done += normalize(x).chunk(len(draws))
    return done
