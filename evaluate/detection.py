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
RANGES = [(0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10)]  # of areas: all, small, ...
SHAPE = (len(RANGES), len(IOUS))  # A, T


def overlaps(kind, found, truth):
    """Boxes (n, 4), (G, 4), as (x0, y0, x1, y1), or masks (n, 1, H0, W0), (G, H0, W0) -> their
    areas (n, 1), (G,), and those of intersections (n, G). A rounded IoU could miss a threshold."""
    if kind == "masks":
        found = (found.flatten(1) >= 0.5).float()  # (n, H0 W0), of probabilities
        truth = truth.flatten(1).float()
        both = found @ truth.T  # (n, H0 W0) (H0 W0, G) -> (n, G)
        return found.sum(1, keepdim=True).double(), truth.sum(1), both
    found = found[:, None].double()  # (n, 1, 4)
    low = torch.maximum(found[..., :2], truth[:, :2])  # (n, G, 2)
    high = torch.minimum(found[..., 2:], truth[:, 2:])
    both = (high - low).clamp(min=0).prod(2)  # (n, G)
    areas = (found[..., 2:] - found[..., :2]).prod(2)  # (n, 1)
    return areas, box_area(truth), both


def out_of_range(areas):
    """Whether areas (n,) are out of the ranges: (A, n)."""
    return torch.stack([(areas < low) | (areas > high) for low, high in RANGES])


def judge(kind, found, truth):
    """Verdicts on an image's n detections, as torchvision's detectors return them, of kind boxes or
    masks; truth: boxes, masks, labels, areas, crowd and ignored of its G objects. -> scores and
    labels (n,), verdicts (n, A, T): 1 right, 0 wrong, -1 not counted; labels (G,), and which
    objects count (G, A)."""
    order = found["scores"].argsort(descending=True, stable=True)
    found = {name: x[order] for name, x in found.items()}
    truth = {name: x.flip(0) for name, x in truth.items()}  # of equals, COCO takes the last
    areas, true_areas, both = overlaps(kind, found[kind], truth[kind])
    crowd = truth["crowd"]
    union = torch.where(crowd, areas, areas + true_areas - both)
    same = found["labels"][:, None] == truth["labels"]  # (n, G)
    iou = torch.where(same, both / union, -1.0)

    ignored = truth["ignored"] | crowd
    counts = ~(out_of_range(truth["areas"]) | ignored)[:, None]  # (A, 1, G)
    free = torch.ones(*SHAPE, len(crowd), dtype=torch.bool)  # (A, T, G)
    outside = out_of_range(areas[:, 0]).T  # (n, A)
    verdicts = -outside[..., None].float().repeat(1, 1, len(IOUS))
    for i in (iou >= IOUS[0]).any(1).nonzero().flatten():
        fits = free & (iou[i] >= IOUS[:, None])  # (A, T, G)
        wanted = torch.where(fits, iou[i] + counts, -1)  # those that count come first
        taken = F.one_hot(wanted.argmax(2), len(crowd)).bool() & fits
        free &= ~taken | crowd  # a crowd takes any number
        verdicts[i, taken.any(2)] = -1
        verdicts[i, (taken & counts).any(2)] = 1
    return found["scores"], found["labels"], verdicts, truth["labels"], counts[:, 0].T.long()


def average_precision(verdicts, count):
    """Verdicts (n, A, T), the best score first, and how many objects count (A,) -> AP (A, T): over
    101 recalls, the mean of the highest precision at it or a higher one; NaN without objects."""
    verdicts = F.pad(verdicts, (0, 0, 0, 0, 1, 0), value=-1)  # at first nothing is found
    right = (verdicts == 1).cumsum(0).double()
    wrong = (verdicts == 0).cumsum(0)
    precision = right / (right + wrong).clamp(min=1)
    recall = right / count[:, None]
    highest = [precision.where(recall >= wanted, 0).amax(0) for wanted in RECALLS]  # (A, T) each
    return torch.stack(highest).mean(0).masked_fill(count[:, None] == 0, math.nan)


def table(judged, device):
    """Each process's list of what judge() returns, in the order of the images -> {column: %}, None
    where no object is of that size. A collective of all processes."""
    none = torch.zeros(0)
    judged = [(none, none, none.view(0, *SHAPE), none, none.view(0, len(RANGES))), *judged]
    parts = [torch.cat(column).to(device) for column in zip(*judged)]
    scores, labels, verdicts, true_labels, counts = [concatenated(x).cpu() for x in parts]
    order = scores.argsort(descending=True, stable=True)
    aps = [torch.full(SHAPE, math.nan)]
    for c in true_labels.unique():
        of_class = order[labels[order] == c]
        count = counts[true_labels == c].sum(0)
        aps.append(average_precision(verdicts[of_class], count))
    ap = 100 * torch.stack(aps).nanmean(0)  # (A, T)
    mean, small, medium, large = ap.mean(1)
    ap_50, ap_75 = ap[0, [0, 5]]
    columns = dict(AP=mean, AP50=ap_50, AP75=ap_75, APs=small, APm=medium, APl=large)
    return {name: None if x.isnan() else x.item() for name, x in columns.items()}
