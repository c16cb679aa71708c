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

from evaluate.features import concatenated, summed

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
RANGES = [(0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10)]  # of areas: all, small, ...
SHAPE = (len(RANGES), len(IOUS))  # A, T

# --- 1. Overlaps ----------------------------------------------------------------------------------

def box_areas(boxes):
    sides = boxes[..., 2:] - boxes[..., :2]
    return sides.clamp(min=0).prod(-1)


def overlap_of_boxes(found, truth):
    """Boxes (n, 4), (G, 4), as (x0, y0, x1, y1) -> areas (n,), (G,), of intersections (n, G)."""
    found = found.double()  # as in COCO's code: a rounded IoU can miss a threshold
    pairs = found[:, None]  # (n, 1, 4)
    low = torch.maximum(pairs[..., :2], truth[:, :2])  # (n, G, 2)
    high = torch.minimum(pairs[..., 2:], truth[:, 2:])
    both = torch.cat([low, high], 2)  # (n, G, 4)
    return box_areas(found), box_areas(truth), box_areas(both)


def overlap_of_masks(found, truth):
    """The same of masks (n, H, W), (G, H, W)."""
    found = found.flatten(1).float()  # (n, HW)
    truth = truth.flatten(1).float()
    both = found @ truth.T  # (n, HW) (HW, G) -> (n, G)
    return found.sum(1), truth.sum(1), both.double()


OVERLAPS = {"boxes": overlap_of_boxes, "masks": overlap_of_masks}

# --- 2. Verdicts ----------------------------------------------------------------------------------

def out_of_range(areas):
    """Whether areas (n,) are out of the ranges: (A, n)."""
    rows = [(areas < low) | (areas > high) for low, high in RANGES]
    return torch.stack(rows)


def match(iou, crowd, ignored):
    """Verdicts on n detections, the best score first: 1 right, 0 wrong, -1 not counted, (n, A, T).
    iou (n, G) with G objects; crowd (G,): it takes any number; ignored (A, G): crowds too."""
    n, g = iou.shape
    verdicts = torch.zeros(n, *SHAPE)
    if g == 0:
        return verdicts
    thresholds = torch.from_numpy(IOUS)[:, None]  # (T, 1)
    ignored = ignored[:, None]  # (A, 1, G)
    free = torch.ones(*SHAPE, g, dtype=torch.bool)  # (A, T, G)
    for row, verdict in zip(iou, verdicts):
        fits = free & (row >= thresholds)
        counted = fits & ~ignored
        any_counted = counted.any(2, keepdim=True)
        fits = torch.where(any_counted, counted, fits)  # ignored ones come last
        best = torch.where(fits, row, -1.0).argmax(2)  # (A, T)
        taken = F.one_hot(best, g).bool() & fits
        free &= ~taken | crowd

        right = taken & ~ignored
        uncounted = taken & ignored
        verdict[right.any(2)] = 1
        verdict[uncounted.any(2)] = -1
    return verdicts


def judge(kind, found, truth):
    """Detections as of Average.add(), the best score first -> verdicts (n, A, T), and which objects
    count (A, G)."""
    areas, true_areas, both = OVERLAPS[kind](found[kind], truth[kind])
    areas = areas[:, None]  # (n, 1)
    union = areas + true_areas - both
    union = torch.where(truth["crowd"], areas, union)
    same = found["labels"][:, None] == truth["labels"]  # (n, G)
    iou = torch.where(same, both / union, -1.0)

    crowd = truth["crowd"]
    ignored = truth["ignored"] | crowd | out_of_range(truth["areas"])  # (A, G)
    verdicts = match(iou, crowd, ignored)
    outside = out_of_range(areas).movedim(0, 1)  # (n, A, 1)
    wrong = verdicts == 0
    return verdicts.masked_fill(wrong & outside, -1), ~ignored


# --- 3. Average precision -------------------------------------------------------------------------

def average_precision(verdicts, count):
    """Verdicts (A, T, n), the best score first, and how many objects count (A,) -> AP (A, T): over
    101 recalls, the mean of the highest precision at it or a higher one; NaN without objects."""
    right = (verdicts == 1).cumsum(2)
    wrong = (verdicts == 0).cumsum(2)
    seen = (right + wrong).double()
    precision = right / seen.clamp(min=1)
    precision = F.pad(precision, (0, 1))  # 0 beyond the highest recall
    highest = precision.flip(2).cummax(2).values
    precision = highest.flip(2)

    recall = right / count[:, None, None]
    wanted = torch.from_numpy(RECALLS).repeat(*SHAPE, 1)  # (A, T, 101)
    first = torch.searchsorted(recall, wanted)
    ap = precision.gather(2, first).mean(2)  # (A, T)
    return ap.masked_fill(count[:, None] == 0, math.nan)


class Average:
    """AP of `kind`, boxes or masks, over the images of all processes."""

    def __init__(self, kind, num_classes):
        self.kind = kind
        self.counts = torch.zeros(1 + num_classes, len(RANGES), dtype=torch.double)
        nothing = torch.zeros(0, 3 + math.prod(SHAPE))
        self.rows = [nothing]  # image, class, score, verdicts

    def add(self, index, found, truth):
        """Image `index`: labels and scores (n,) of what is found, boxes (n, 4), masks (n, H, W); of
        the truth boxes, masks, labels, areas, crowd and ignored. On the CPU."""
        order = found["scores"].argsort(descending=True, stable=True)
        found = {name: x[order] for name, x in found.items()}
        truth = {name: x.flip(0) for name, x in truth.items()}  # of equals, COCO takes the last
        verdicts, counted = judge(self.kind, found, truth)
        counted = counted.T.double()  # (G, A)
        self.counts.index_add_(0, truth["labels"], counted)
        image = torch.full_like(order, index)
        about = [image, found["labels"], found["scores"]]
        about = torch.stack(about, 1)  # (n, 3)
        rows = torch.cat([about, verdicts.flatten(1)], 1)
        self.rows.append(rows.float())

    def table(self, device):
        """{column: %}, None where no object is of that size. A collective of all processes."""
        counts = summed(self.counts.to(device)).cpu()
        rows = torch.cat(self.rows).to(device)
        rows = concatenated(rows).cpu()
        by_image = rows[:, 0].argsort(stable=True)
        rows = rows[by_image]
        by_score = rows[:, 2].argsort(descending=True, stable=True)
        rows = rows[by_score]

        aps = []
        for c in range(1, len(counts)):
            of_class = rows[rows[:, 1] == c]
            verdicts = of_class[:, 3:].T.unflatten(0, SHAPE)  # (A, T, n)
            aps.append(average_precision(verdicts, counts[c]))
        ap = 100 * torch.stack(aps).nanmean(0)  # (A, T)
        mean, small, medium, large = ap.mean(1)
        ap_50, ap_75 = ap[0, [0, 5]]
        columns = dict(AP=mean, AP50=ap_50, AP75=ap_75, APs=small, APm=medium, APl=large)
        return {name: None if x.isnan() else x.item() for name, x in columns.items()}
