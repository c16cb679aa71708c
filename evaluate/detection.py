"""Average precision (AP) as COCO defines it, for boxes and masks.

At each threshold of intersection over union (IoU), detections take objects of their class, the best
score first. One that takes an object is right, another wrong. Not counted are those that take an
ignored object or lie in a crowd, and wrong ones of an area out of range. COCO counts the 100 best
of an image and class; torchvision's detectors return no more.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import box_area

from evaluate.features import concatenated

IOUS = torch.from_numpy(np.linspace(0.5, 0.95, 10))
RECALLS = np.linspace(0, 1, 101)
LOWEST = torch.tensor([0, 0, 32**2, 96**2])[:, None]  # areas: all, small, medium, large
HIGHEST = torch.tensor([1e10, 32**2, 96**2, 1e10])[:, None]
A = len(LOWEST)
T = len(IOUS)
EMPTY = [0, 0, (0, A, T), 0, (0, A)]  # shapes of what judge() returns of no image
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def overlaps(kind, found, truth):
    """Boxes (n, 4), (G, 4), as (x0, y0, x1, y1), or masks (n, 1, H0, W0), (G, H0, W0) -> their
    areas (n,), (G,), and those of intersections (n, G). float64: a rounded IoU could miss a
    threshold."""
    if kind == "masks":
        found = found.flatten(1) >= 0.5  # (n, H0 W0), of probabilities
        found = found.float()
        truth = truth.flatten(1).float()
        both = found @ truth.T  # (n, H0 W0) (H0 W0, G) -> (n, G)
        return found.sum(1).double(), truth.sum(1), both
    found = found.double()
    pairs = found[:, None]  # (n, 1, 4)
    low, _ = torch.maximum(pairs, truth).chunk(2, 2)  # (n, G, 2): corners of the intersections
    _, high = torch.minimum(pairs, truth).chunk(2, 2)
    both = (high - low).clamp(min=0).prod(2)
    return box_area(found), box_area(truth), both


def out_of_range(areas):
    """Whether areas (n,) are out of the ranges: (A, n)."""
    return (areas < LOWEST) | (areas > HIGHEST)


def judge(kind, found, truth):
    """Verdicts on an image's n detections, as torchvision's detectors return them, of kind boxes or
    masks; truth: boxes, masks, labels, areas, crowd and ignored of its G objects. -> scores and
    labels (n,), verdicts (n, A, T): 1 right, 0 wrong, -1 not counted; labels (G,), and which
    objects count (G, A)."""
    order = found["scores"].argsort(descending=True, stable=True)
    scores = found["scores"][order]
    labels = found["labels"][order]
    found = found[kind][order]
    truth = {name: x.flip(0) for name, x in truth.items()}  # of equals, COCO takes the last
    areas, true_areas, both = overlaps(kind, found, truth[kind])
    crowd = truth["crowd"]
    outside = out_of_range(areas).T  # (n, A)
    areas = areas[:, None]
    union = areas + true_areas - both
    union = torch.where(crowd, areas, union)
    same = labels[:, None] == truth["labels"]  # (n, G)
    iou = torch.where(same, both / union, -1.0)

    ignored = truth["ignored"] | crowd  # (G,)
    counted = ~(ignored | out_of_range(truth["areas"]))  # (A, G)
    verdicts = torch.where(outside, -1.0, 0.0)
    verdicts = verdicts[:, :, None].repeat(1, 1, T)
    free = torch.ones(A, T, len(crowd)).bool()
    matching = (iou >= IOUS[0]).any(1)  # (n,)
    for i in matching.nonzero().flatten():
        fits = free & (iou[i] >= IOUS[:, None])  # (A, T, G)
        wanted = iou[i] + counted[:, None]  # (A, 1, G): those that count come first
        wanted = torch.where(fits, wanted, -1)
        best = wanted.argmax(2)  # (A, T)
        taken = F.one_hot(best, len(crowd)).bool() & fits
        right = taken & counted[:, None]
        free &= ~taken | crowd  # a crowd takes any number
        verdicts[i, taken.any(2)] = -1
        verdicts[i, right.any(2)] = 1
    counts = counted.T.float()
    return scores, labels, verdicts, truth["labels"], counts


def average_precision(verdicts, count):
    """Verdicts (n, A, T), the best score first, and how many objects count (A,) -> AP (A, T): over
    101 recalls, the mean of the highest precision at it or a higher one; NaN without objects."""
    nothing = -torch.ones(1, A, T)  # found yet
    verdicts = torch.cat([nothing, verdicts])
    right = (verdicts == 1).cumsum(0).double()
    wrong = (verdicts == 0).cumsum(0)
    seen = right + wrong
    precision = right / seen.clamp(min=1)
    recall = right / count[:, None]
    highest = []
    for wanted in RECALLS:
        reached = precision.where(recall >= wanted, 0)
        highest.append(reached.amax(0))
    ap = torch.stack(highest).mean(0)  # (101, A, T) -> (A, T)
    return ap.masked_fill(count[:, None] == 0, math.nan)


def table(judged, device):
    """Each process's list of what judge() returns, in the order of the images -> {column: %}, None
    where no object is of that size. A collective of all processes."""
    empty = [torch.zeros(shape) for shape in EMPTY]  # for a process without images
    columns = [torch.cat(column) for column in zip(empty, *judged)]
    columns = [concatenated(column.to(device)).cpu() for column in columns]
    scores, labels, verdicts, true_labels, counts = columns
    order = scores.argsort(descending=True, stable=True)
    labels = labels[order]
    verdicts = verdicts[order]
    aps = [torch.full((A, T), math.nan)]
    for c in true_labels.unique():
        of_class = verdicts[labels == c]
        count = counts[true_labels == c].sum(0)
        aps.append(average_precision(of_class, count))
    ap = 100 * torch.stack(aps).nanmean(0)  # (A, T)
    mean, *of_sizes = ap.mean(1)
    values = [mean, ap[0, 0], ap[0, 5], *of_sizes]
    values = [None if x.isnan() else x.item() for x in values]
    return dict(zip(COLUMNS, values))
