"""Images with masks of classes, and how well predicted masks agree with them.

Masks come with `shapes`, `voc` (torchvision's, its 1,464 training images), a folder of train/images,
train/masks, val/images and val/masks, or ADE20K's own layout, images/{training,validation} and
annotations/. They are 8-bit PNGs of class ids, 255 = void; a folder has as many classes as its
training masks name. ADE20K's 0 is void, so its ids are shifted by -1.
"""
import concurrent.futures
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common
import shapes
from evaluate.features import load_batches, to_input

VOID = 255


class MaskedShapes(shapes.Shapes):
    num_classes = 1 + len(shapes.Shapes.classes)  # with the ground

    def pair(self, index):
        image, mask = self.scene(index)
        return Image.fromarray(image), Image.fromarray(mask)


class Masked:
    """Images and their masks in files; `shift` is subtracted from class ids, modulo 256.

    All files are read once, before anything is computed. Raises UserError, naming the file, where
    one is wrong or an id is beyond num_classes (None: as many as there are).
    """

    def __init__(self, images, masks, num_classes=None, shift=0):
        self.images = images
        self.masks = common.Images(masks)
        self.shift = shift
        with concurrent.futures.ThreadPoolExecutor() as pool:
            largest = list(pool.map(self.largest_id, range(len(self))))
        self.num_classes = num_classes or max(largest) + 1
        if max(largest) >= self.num_classes:
            worst = self.masks.name(np.argmax(largest))
            raise common.UserError(f"{worst} holds the class id {max(largest)}, but there are "
                                   f"{self.num_classes} classes")

    def __len__(self):
        return len(self.images)

    def largest_id(self, index):
        """The largest class id of a mask but void."""
        _, mask = self.pair(index)
        ids = np.asarray(mask)
        return int(ids.max(initial=0, where=ids != VOID))

    def pair(self, index):
        """The RGB image and its mask, both PIL."""
        name = self.masks.name(index)
        if not os.path.isfile(name):
            raise common.UserError(f"{self.images.name(index)} has no mask: looked for {name}")
        try:
            image = self.images.load(index)
            with Image.open(name, formats=["PNG"]) as mask:
                mode = mask.mode
                ids = np.array(mask)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on broken files
            raise common.UserError(f"cannot read {self.images.name(index)} or its mask {name} "
                                   f"({error})") from error
        if mode not in ("L", "P"):
            raise common.UserError(f"{name} is no 8-bit image of class ids: its mode is {mode}")
        if ids.shape != (image.height, image.width):
            raise common.UserError(f"{name} has {ids.shape[1]} x {ids.shape[0]} pixels, its image "
                                   f"{image.width} x {image.height}")
        return image, Image.fromarray(ids - np.uint8(self.shift))


def open_voc(split):
    images = common.open_data("voc", split)
    names = [images.name(i).replace("JPEGImages", "SegmentationClass") for i in range(len(images))]
    return Masked(images, [Path(name).with_suffix(".png") for name in names], 21)


def open_folder(folder, masks, num_classes, shift):
    images = common.find_images(folder)
    if not len(images):
        raise common.UserError(f"no images in {folder}: give shapes, voc, ADE20K's folder, or one "
                               "with train/images, train/masks, val/images and val/masks")
    names = [Path(images.name(i)).relative_to(folder) for i in range(len(images))]
    return Masked(images, [masks / name.with_suffix(".png") for name in names], num_classes, shift)


def open_masks(args):
    """The training and validation parts of --data, with masks. Raises UserError."""
    if args.data == "shapes":
        return [MaskedShapes(split, 3 * args.size // 2) for split in ("train", "val")]
    if args.data == "voc":
        return [open_voc(split) for split in ("train", "val")]
    root = Path(args.data)
    if not root.is_dir():
        root = Path(os.environ.get("DATA", "data")) / args.data
    if (root / "annotations").is_dir():  # ADE20K's own layout
        return [open_folder(root / "images" / split, root / "annotations" / split, 150, shift=1)
                for split in ("training", "validation")]
    train = open_folder(root / "train" / "images", root / "train" / "masks", None, shift=0)
    val = root / "val"
    return [train, open_folder(val / "images", val / "masks", train.num_classes, shift=0)]


def targets(mask):
    """A PIL mask as int64 (H0, W0), where void is -1."""
    mask = torch.from_numpy(np.array(mask)).long()
    return mask.masked_fill(mask == VOID, -1)


class Whole(torch.utils.data.Dataset):
    """Item index -> an image (3, h, w), uint8, h and w multiples of `stride`, and its mask (H0, W0).

    The short side is scaled to `size`; None: images keep their own size, rounded down.
    """

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


def whole_images(data, indices, size, stride, args):
    """Yields a backbone's inputs (1, 3, h, w) and masks (H0, W0), one image at a time."""
    whole = Whole(data, size, stride)
    for image, mask in load_batches(whole, args, batch_size=None, sampler=indices):
        yield to_input(image[None], args.device), mask.to(args.device)
