"""Images with masks, which are 8-bit PNGs of class ids."""
import concurrent.futures
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common
import shapes
import training
from evaluate.features import progress, say, to_input

VOID = 255


def mask_flags(flag):
    flag("--masks", default="masks", help="name of the folders of masks, beside images/")
    flag("--void", type=int, default=VOID, help="class id that does not count, as 255 does not")


class MaskedShapes(shapes.Shapes):
    num_classes = 1 + len(shapes.Shapes.classes)  # with the ground

    def pair(self, index):
        image, mask = self.scene(index)
        return Image.fromarray(image), Image.fromarray(mask)


class Masked:
    """Images in a folder (all, or `images`) and masks of the same names in another, where `void`
    becomes 255. All are read once, before anything is computed. UserError names what is wrong."""
    def __init__(self, folder, masks, num_classes=None, void=VOID, images=None):
        if images is None and os.path.isdir(folder):
            images = common.find_images(folder)
        if not images:
            raise common.UserError(f"no images in {folder}: --data is shapes, voc, or a folder: of "
                                   "ADE20K, or of train/images, train/masks, val/images, val/masks")
        names = [images.name(i).replace(str(folder), str(masks), 1) for i in range(len(images))]
        self.images = images
        self.masks = common.Images([Path(name).with_suffix(".png") for name in names])
        self.void = void
        with concurrent.futures.ThreadPoolExecutor() as pool:
            ids = pool.map(lambda i: np.setdiff1d(self.pair(i)[1], VOID), range(len(images)))
            ids = list(progress(ids, len(images), "reading masks"))
        say(f"{len(images)} masks with the classes {np.unique(np.concatenate(ids))}")
        largest = [int(found.max(initial=0)) for found in ids]
        self.num_classes = num_classes or max(largest) + 1
        if max(largest) >= self.num_classes:
            worst = self.masks.name(np.argmax(largest))
            raise common.UserError(f"{worst} holds the class id {max(largest)}; classes are 0 to "
                                   f"{self.num_classes - 1}")

    def __len__(self):
        return len(self.images)

    def pair(self, index):
        """The RGB image and its mask, both PIL."""
        name, path = self.images.name(index), self.masks.name(index)
        if not os.path.isfile(path):
            raise common.UserError(f"{name} has no mask: looked for {path}")
        try:
            image = self.images.load(index)
            with Image.open(path, formats=["PNG"]) as mask:
                ids = np.array(mask)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on broken files
            raise common.UserError(f"cannot read {name} or its mask {path} ({error})") from error
        if mask.mode not in ("L", "P") or mask.size != image.size:
            raise common.UserError(f"{path} is no 8-bit image of class ids, of {image.size} pixels "
                                   f"as its image: its mode is {mask.mode}, its size {mask.size}")
        ids[ids == self.void] = VOID
        return image, Image.fromarray(ids)


def open_masks(args):
    """The training and validation parts of --data, with masks. Raises UserError."""
    if args.data == "shapes":
        return [MaskedShapes(split, 3 * args.size // 2) for split in ("train", "val")]
    if args.data == "voc":
        parts = [common.open_data("voc", split) for split in ("train", "val")]
        return [Masked("JPEGImages", "SegmentationClass", 21, images=part) for part in parts]
    root = Path(args.data)
    if not root.is_dir():
        root = Path(os.environ.get("DATA", "data")) / args.data
    if (root / "annotations").is_dir():  # ADE20K's own layout and classes, 1 to 150
        return [Masked(root / "images" / split, root / "annotations" / split, 151, void=0)
                for split in ("training", "validation")]
    train = Masked(root / "train/images", root / "train" / args.masks, None, args.void)
    val = Masked(root / "val/images", root / "val" / args.masks, train.num_classes, args.void)
    return [train, val]


def targets(mask):
    """A PIL mask as int64 (H0, W0), where void is -1."""
    mask = torch.from_numpy(np.array(mask)).long()
    return mask.masked_fill(mask == VOID, -1)


class Crops(torch.utils.data.Dataset):
    """Item (epoch, index) -> a random square of an image (3, size, size) and of its mask."""

    def __init__(self, data, size):
        self.data = data
        self.size = size

    def __getitem__(self, key):
        rng = np.random.default_rng(key)
        image, mask = self.data.pair(key[1])
        side = round(min(image.size) / rng.uniform(1, 2))
        left, top = [int(rng.integers(length - side + 1)) for length in image.size]
        flip = rng.random() < 0.5
        box = (left, top, left + side, top + side)
        mask = targets(mask.resize((self.size, self.size), Image.NEAREST, box=box))
        pixels = common.cut(image, (top, left, side, side), flip, self.size)
        return pixels, mask.flip(1) if flip else mask


class Whole(torch.utils.data.Dataset):
    """Item index -> an image (3, h, w), uint8, its sides multiples of `stride`, and its mask
    (H0, W0). The short side is scaled to `size`; None: images keep their size, rounded down."""

    def __init__(self, data, size, stride):
        self.data = data
        self.size = size
        self.stride = stride

    def __getitem__(self, index):
        image, mask = self.data.pair(index)
        scale = self.size / min(image.size) if self.size else 1
        sides = [max(1, round(scale * side) // self.stride) * self.stride for side in image.size]
        pixels = np.array(image.resize(sides, Image.BICUBIC))
        return torch.from_numpy(pixels).permute(2, 0, 1), targets(mask)


def whole_images(data, indices, size, stride, args, what="validation images"):
    """Yields a backbone's inputs (1, 3, h, w) and masks (H0, W0), one image at a time."""
    pairs = training.data_loader(Whole(data, size, stride), args.workers, batch_size=None,
                                 sampler=indices)
    for image, mask in progress(pairs, len(indices), what):
        yield to_input(image[None], args.device), mask.to(args.device, non_blocking=True)
