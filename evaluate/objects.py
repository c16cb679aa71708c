"""Images with objects, as torchvision's detectors take them: scenes, VOC, COCO's, YOLO's files."""
import itertools
import json
import os
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from torchvision import datasets as sets
from torchvision.ops import box_area, masks_to_boxes

import common
import shapes

# --- 1. COCO's masks ------------------------------------------------------------------------------

def run_lengths(text):
    """COCO's compressed run lengths: digits of 5 bits, the lowest first, as characters from "0" on,
    32 more where another digit follows; from the fourth on, a difference to the last but one."""
    lengths = []
    value = shift = 0
    for byte in text.encode():
        digit = byte - 48
        value += (digit & 31) << shift
        shift += 5
        if digit < 32:
            value -= (digit & 16) << (shift - 4)  # negative where the highest bit is set
            value += lengths[-2] if len(lengths) > 2 else 0
            lengths.append(value)
            value = shift = 0
    return lengths


def inside(polygon, width, height):
    """Whether pixels' centres lie in a polygon [x, y, x, y, ...]: (height, width). A ray from the
    left changes sides wherever it crosses an edge."""
    start = np.array(polygon, float).reshape(-1, 2)
    end = np.roll(start, -1, 0)
    y = np.arange(height) + 0.5
    crossed = (start[:, 1, None] <= y) != (end[:, 1, None] <= y)  # (edges, height)
    edge, row = crossed.nonzero()
    dx, dy = (end - start)[edge].T
    x = start[edge, 0] + (y[row] - start[edge, 1]) * dx / dy
    column = np.ceil(x - 0.5).clip(0, width).astype(int)  # the first centre behind the edge
    changes = np.zeros((height, width + 1), int)
    np.add.at(changes, (row, column), 1)
    return changes.cumsum(1)[:, :width] % 2 == 1


def decode(segmentation, width, height):
    """COCO's polygons, or run lengths along the columns -> a mask (height, width), bool."""
    if isinstance(segmentation, list):
        return np.any([inside(polygon, width, height) for polygon in segmentation], 0)
    lengths = segmentation["counts"]
    if isinstance(lengths, str):
        lengths = run_lengths(lengths)
    marked = np.arange(len(lengths)) % 2 == 1
    return np.repeat(marked, lengths).reshape(width, height).T


# --- 2. Files -------------------------------------------------------------------------------------
# Each function yields paths of images and lists of objects, with COCO's keys and a name.

VOC = {"train": [("2007", "trainval"), ("2012", "trainval")], "val": [("2007", "test")]}


def read_voc(root, split):
    for year, part in VOC[split]:
        data = sets.VOCDetection(root, year, part)
        for path, annotation in zip(data.images, data.annotations):
            elements = ElementTree.parse(annotation).iter("object")
            yield path, [voc_object(element) for element in elements]


def voc_object(element):
    sides = ("xmin", "ymin", "xmax", "ymax")  # in pixels, from 1 on, the last one is inside
    x0, y0, x1, y1 = [float(element.findtext(f"bndbox/{side}")) for side in sides]
    box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
    difficult = int(element.findtext("difficult", 0))
    return dict(name=element.findtext("name"), bbox=box, ignore=difficult)


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
        lines = text.read_text().splitlines() if text.exists() else []  # nothing in the image
        yield path, [yolo_object(line) for line in lines]


def yolo_object(line):
    name, *box = line.split()
    x, y, width, height = map(float, box)  # middle and sides, as shares of the image's sides
    return dict(name=int(name), bbox=[x - width / 2, y - height / 2, width, height])


READERS = dict(voc=read_voc, coco=read_coco, yolo=read_yolo)

# --- 3. Data sets ---------------------------------------------------------------------------------

class Objects:
    """Images in files with lists of objects. Boxes are in pixels, or YOLO's shares of the sides."""

    def __init__(self, form, paths, objects, classes):
        self.form = form
        self.has_masks = form == "coco"
        self.images = common.Images(paths)
        self.classes = classes
        texts = [json.dumps(of_image).encode() for of_image in objects]
        self.ends = np.cumsum([0, *map(len, texts)])
        self.text = np.frombuffer(b"".join(texts), np.uint8)  # forked workers share an array

    def __len__(self):
        return len(self.images)

    def pair(self, index):
        """The image (H0, W0, 3), uint8, and its G objects: boxes (G, 4) as (x0, y0, x1, y1), labels
        from 1 on, areas, crowd and ignored (G,), masks (G, H0, W0). Raises UserError."""
        start, end = self.ends[index : index + 2]
        objects = json.loads(self.text[start:end].tobytes())
        try:
            image = self.images.load(index)
            masks = [decode(o["segmentation"], *image.size) for o in objects if self.has_masks]
            masks = np.array(masks, bool).reshape(-1, image.height, image.width)
        except Exception as error:  # a decoder may raise anything
            name = self.images.name(index)
            raise common.UserError(f"cannot read {name} or its masks: {error!r}") from error

        def column(key, dtype):
            return torch.tensor([o.get(key, 0) for o in objects], dtype=dtype)

        boxes = column("bbox", torch.float32).view(-1, 4)  # left, top, width, height
        if self.form == "yolo":
            boxes *= torch.tensor(2 * image.size)
        boxes[:, 2:] += boxes[:, :2]
        target = dict(boxes=boxes, labels=column("category_id", torch.long), areas=box_area(boxes),
                      crowd=column("iscrowd", torch.bool), ignored=column("ignore", torch.bool))
        if self.has_masks:
            target["areas"] = column("area", torch.float32)
            target["masks"] = torch.from_numpy(masks)
        return np.array(image), target


class ShapesObjects(shapes.Shapes):
    """Scenes with objects: in their masks, object k of class c, both from 0 on, is 12 k + c + 1."""

    form = "shapes"
    has_masks = True

    def draw(self, image, mask, kind, rng):
        own = np.zeros_like(mask)
        super().draw(image, own, kind, rng)
        k = (int(mask.max()) + 11) // 12  # the object before lies above all others
        mask[own > 0] = 12 * k + kind + 1

    def pair(self, index):
        image, mask = self.scene(index)
        ids = torch.from_numpy(np.unique(mask[mask > 0])).long()  # (G,)
        masks = torch.from_numpy(mask) == ids[:, None, None]  # (G, H0, W0)
        boxes = masks_to_boxes(masks)
        boxes[:, 2:] += 1  # behind the last pixel
        no = torch.zeros(len(ids), dtype=torch.bool)
        return image, dict(boxes=boxes, labels=(ids - 1) % 12 + 1, areas=masks.sum((1, 2)),
                           crowd=no, ignored=no, masks=masks)


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
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, SyntaxError) as error:
        raise common.UserError(f"cannot read the objects of {args.data} ({error!r}): `python -m "
                               "evaluate detect --help` says which files lie where") from error
    found = [o for _, objects in itertools.chain(*parts) for o in objects]
    names = sorted({o["name"] for o in found})
    if not names or not all(parts):
        raise common.UserError(f"{folder} must hold images with objects, to train and to validate")
    numbers = {name: number for number, name in enumerate(names, 1)}
    for o in found:
        o["category_id"] = numbers[o["name"]]
    return [Objects(form, *zip(*part), names) for part in parts]
