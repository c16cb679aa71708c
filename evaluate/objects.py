"""Images with objects, as torchvision's detectors take them: scenes, VOC, COCO's, YOLO's files."""
import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision import datasets as sets
from torchvision.ops import box_area, box_convert, masks_to_boxes
from torchvision.transforms.functional import pil_to_tensor

import common
import shapes


def run_lengths(text):
    """COCO's compressed run lengths: digits of 5 bits, the lowest first, as characters from "0" on,
    32 more where another digit follows; from the fourth on, a difference to the last but one."""
    lengths = []
    for number in re.findall("[P-o]*[0-O]", text):
        digits = [ord(character) - 48 & 31 for character in number]
        value = sum(digit << 5 * place for place, digit in enumerate(digits))
        if digits[-1] & 16:  # the highest bit tells the sign
            value -= 1 << 5 * len(digits)
        if len(lengths) > 2:
            value += lengths[-2]
        lengths.append(value)
    return lengths


def decode(segmentation, width, height):
    """COCO's polygons, or run lengths along the columns -> a mask (height, width), bool."""
    if isinstance(segmentation, list):
        drawn = Image.new("1", (4 * width, 4 * height))  # in quarters of pixels
        for polygon in segmentation:
            points = [round(4 * x) for x in polygon]
            ImageDraw.Draw(drawn).polygon(points, fill=1)
        return np.array(drawn)[2::4, 2::4]  # the pixels' centres
    lengths = segmentation["counts"]
    if isinstance(lengths, str):
        lengths = run_lengths(lengths)
    marked = np.arange(len(lengths)) % 2 == 1
    return np.repeat(marked, lengths).reshape(width, height).T


# Readers yield paths of images and lists of objects, with COCO's keys and a name.

VOC = {"train": [("2007", "trainval"), ("2012", "trainval")], "val": [("2007", "test")]}
SIDES = ("xmin", "ymin", "xmax", "ymax")  # in pixels, from 1 on, the last one is inside


def read_voc(root, split):
    for year, part in VOC[split]:
        data = sets.VOCDetection(root, year, part)
        for path, annotation in zip(data.images, data.annotations):
            objects = []
            for element in ElementTree.parse(annotation).iter("object"):
                x0, y0, x1, y1 = [float(element.findtext(f"bndbox/{side}")) for side in SIDES]
                box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
                difficult = int(element.findtext("difficult", 0))
                objects.append(dict(name=element.findtext("name"), bbox=box, ignore=difficult))
            yield path, objects


def read_coco(folder, split):
    path = min((folder / "annotations").glob(f"instances_{split}*.json"))
    content = json.loads(path.read_bytes())
    names = {category["id"]: category["name"] for category in content["categories"]}
    objects = {image["id"]: [] for image in content["images"]}
    for found in content["annotations"]:
        found["name"] = names[found["category_id"]]
        objects[found["image_id"]].append(found)
    images = folder / path.stem.removeprefix("instances_")
    for image in content["images"]:
        yield images / image["file_name"], objects[image["id"]]


def read_yolo(folder, split):
    images, labels = [folder / kind / split for kind in ("images", "labels")]
    if not images.is_dir():
        images, labels = [folder / split / kind for kind in ("images", "labels")]
    found = common.find_images(images)
    for path in [found.name(i) for i in range(len(found))]:
        text = labels / Path(path).relative_to(images).with_suffix(".txt")
        objects = []
        for line in text.read_text().splitlines() if text.exists() else []:
            name, *box = line.split()
            x, y, width, height = map(float, box)  # middle and sides, as shares of the image's
            box = [x - width / 2, y - height / 2, width, height]
            objects.append(dict(name=int(name), bbox=box))
        yield path, objects


READERS = dict(voc=read_voc, coco=read_coco, yolo=read_yolo)


class Objects:
    """Item index -> an image (3, H0, W0), uint8, and its G objects: boxes (G, 4) as (x0, y0, x1,
    y1), labels from 1 on, areas, crowd and ignored (G,), masks (G, H0, W0). Raises UserError."""

    def __init__(self, form, part, classes):
        paths, objects = zip(*part)
        self.form = form
        self.has_masks = form == "coco"
        self.images = common.Images(paths)
        self.classes = classes
        texts = [json.dumps(of_image).encode() for of_image in objects]
        self.ends = np.cumsum([0, *map(len, texts)])
        self.text = np.frombuffer(b"".join(texts), np.uint8)  # forked workers share an array

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        start, end = self.ends[index : index + 2]
        objects = json.loads(self.text[start:end].tobytes())
        try:
            image = self.images.load(index)
            masks = [decode(o["segmentation"], *image.size) for o in objects if self.has_masks]
        except Exception as error:  # a decoder may raise anything
            name = self.images.name(index)
            raise common.UserError(f"cannot read {name} or its masks: {error!r}") from error

        def column(key, dtype):
            return torch.tensor([o.get(key, 0) for o in objects], dtype=dtype)

        boxes = column("bbox", torch.float32).view(-1, 4)
        if self.form == "yolo":
            boxes *= torch.tensor(2 * image.size)
        boxes = box_convert(boxes, "xywh", "xyxy")
        labels = torch.tensor([1 + self.classes.index(o["name"]) for o in objects]).long()
        target = dict(boxes=boxes, labels=labels, areas=box_area(boxes),
                      crowd=column("iscrowd", torch.bool), ignored=column("ignore", torch.bool))
        if self.has_masks:
            masks = np.array(masks, bool).reshape(-1, image.height, image.width)
            target["masks"] = torch.from_numpy(masks)
            target["areas"] = column("area", torch.float32)
        return pil_to_tensor(image), target


class ShapesObjects(shapes.Shapes):
    """Scenes with objects, which have numbers in place of their class in the scenes' masks."""

    form = "shapes"
    has_masks = True

    def draw(self, image, mask, kind, rng):
        own = np.zeros_like(mask)
        super().draw(image, own, kind, rng)
        mask[own > 0] = mask.max() + 1

    def __getitem__(self, index):
        image, mask = self.scene(index)
        numbers = np.unique(mask[mask > 0])  # (G,): of those that are not covered by others
        masks = torch.from_numpy(mask == numbers[:, None, None])  # (G, H0, W0)
        boxes = masks_to_boxes(masks)
        boxes[:, 2:] += 1  # behind the last pixel
        labels = torch.full((len(masks),), 1 + self.label(index))
        no = torch.zeros(len(masks), dtype=torch.bool)
        return torch.from_numpy(image).permute(2, 0, 1), dict(
            boxes=boxes, labels=labels, areas=masks.sum((1, 2)), crowd=no, ignored=no, masks=masks)


def open_objects(args):
    """The training and validation parts of --data, with objects. Raises UserError."""
    if args.data == "shapes":
        parts = [ShapesObjects(split, 3 * args.size // 2) for split in ("train", "val")]
        parts[1].length = 500  # a minute's
        return parts
    root = Path(os.environ.get("DATA", "data"))
    folder = Path(args.data) if Path(args.data).is_dir() else root / args.data
    form = "coco" if (folder / "annotations").is_dir() else "yolo"
    if args.data == "voc":
        form = "voc"
        folder = root
    try:
        parts = [list(READERS[form](folder, split)) for split in ("train", "val")]
        names = {o["name"] for part in parts for _, objects in part for o in objects}
        if not names or not all(parts):
            raise ValueError("no images with objects to train or to validate")
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, SyntaxError) as error:
        raise common.UserError(f"cannot read the objects of {args.data} ({error!r}): `python -m "
                               "evaluate detect --help` says which files lie where") from error
    return [Objects(form, part, sorted(names)) for part in parts]
