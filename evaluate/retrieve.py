"""Dense nearest neighbor retrieval. CrIBo, Section 4.1, Table 1

Each patch of the validation images gets the class of most of its 50 nearest patches in the training
images, of which all or one of 8, 64 or 128 are used (then the mean of 5 draws). A patch's own class
is that of most of its pixels. Images keep their size, rounded down to a multiple of the patch.

    python -m evaluate retrieve --checkpoint cribo.pth --arch vit_small_patch16 --data voc

"patch mIoU" compares patches with their own majority labels, as in 4.1; "pixel mIoU" pixels of the
masks, in their own size, with the class of their patch.

Differences
 1. Unsaid in the paper: the vote is unweighted, the distance cosine, and void left out: a patch has
    the class of most of its other pixels, and one of nothing but void is left out.
 2. Neighbors are exact: the training patches are computed anew for each --chunk of validation
    images, and never kept. The deviation over draws is that of a sample (n - 1).
"""
import math
import typing

import numpy as np
import torch

import training
from evaluate.features import concatenated, summed
from evaluate.heads import confusion, mean_iou
from evaluate.knn import nearest_rows, vote
from evaluate.masks import mask_flags, open_masks, whole_images

NAME = "retrieval"
prepare = open_masks


def add_flags(flag):
    mask_flags(flag)
    flag("--subsample", type=int, nargs="+", default=[1, 8, 64, 128],
         help="one of so many training images is used")
    flag("--runs", type=int, default=5, help="draws of these images")
    flag("--chunk", type=int, default=300, help="validation images at a time: 10 kB a patch")


class Patches(typing.NamedTuple):
    features: torch.Tensor  # (N, D)
    labels: torch.Tensor  # (N,): the class of most pixels but void; -1 where all is void
    mask: torch.Tensor  # (H0, W0)
    cell: torch.Tensor  # (H0, W0): the patch in which a pixel lies


def cells(mask, h, w):
    """For each pixel of a mask (H0, W0), the number of its cell in a grid of h x w."""
    height, width = mask.shape
    y = torch.arange(height, device=mask.device) * h // height
    x = torch.arange(width, device=mask.device) * w // width
    return y[:, None] * w + x


def majority(mask, cell, n, num_classes):
    """The class (n,) of most pixels in each of n cells but void; -1 where all is void."""
    pairs = cell * num_classes + mask
    votes = torch.bincount(pairs[mask >= 0], minlength=n * num_classes)
    votes = votes.view(n, num_classes)
    empty = votes.sum(1) == 0
    return votes.argmax(1).masked_fill(empty, -1)


@torch.no_grad()
def patches(backbone, data, indices, args, what="validation images"):
    """Yields the Patches of each of these images."""
    for x, mask in whole_images(data, indices, None, backbone.stride, args, what):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            maps = backbone.stages(x)[-1].float()  # (1, D, h, w)
        h, w = maps.shape[2:]
        cell = cells(mask, h, w)
        labels = majority(mask, cell, h * w, data.num_classes)
        yield Patches(maps[0].flatten(1).T, labels, mask, cell)


def draw_images(total, factor, draw):
    """Which (total,) of the training images, one of `factor`, are used."""
    order = np.random.default_rng((factor, draw)).permutation(total)
    return order.argsort() < math.ceil(total / factor)  # the first so many in this order


def memory(backbone, train, trials, args):
    """Yields the features (n, D) and labels (n,) of patches of this process's training images, an
    image at a time, and the numbers of the trials that use it."""
    rank, world = training.rank_and_world()
    used = np.stack([draw_images(len(train), *trial) for trial in trials])  # (trials, images)
    mine = np.flatnonzero(used.any(0))[rank::world]
    images = patches(backbone, train, mine.tolist(), args, "training images")
    for index, image in zip(mine, images):
        known = image.labels >= 0
        yield image.features[known], image.labels[known], np.flatnonzero(used[:, index])


def add_chunk(counts, trials, backbone, data, indices, args, k):
    """Adds to each trial's counts (2, C, C) those of the validation images `indices`."""
    train, val = data
    c = train.num_classes
    rank, world = training.rank_and_world()
    images = list(patches(backbone, val, indices[rank::world], args))
    sizes = [len(image.features) for image in images]
    none = torch.empty(0, backbone.dim, device=args.device)
    own = torch.cat([none] + [image.features for image in images])
    queries = concatenated(own)
    owner = concatenated(torch.full((len(own),), rank, device=args.device))

    rows = memory(backbone, train, trials, args)
    found = nearest_rows(queries, rows, k, len(trials))
    for count, (similarity, labels) in zip(counts, found):
        predicted = vote(similarity, labels, c)[owner == rank]
        for part, image in zip(predicted.split(sizes), images):
            count[0] += confusion(part, image.labels, c)
            count[1] += confusion(part[image.cell], image.mask, c)  # (N,) -> (H0, W0)


def run(backbone, data, args, k=50):
    """mIoU in % of k-NN classification of all patches of the validation images."""
    backbone.eval()
    train, val = data
    trials = []
    for factor in args.subsample:
        draws = args.runs if factor > 1 else 1
        trials += [(factor, draw) for draw in range(draws)]
    shape = (len(trials), 2, train.num_classes, train.num_classes)
    counts = torch.zeros(shape, dtype=torch.long, device=args.device)
    for chunk in torch.arange(len(val)).split(args.chunk):
        add_chunk(counts, trials, backbone, data, chunk.tolist(), args, k)

    scores = {factor: [] for factor in args.subsample}
    for (factor, _), (patch, pixel) in zip(trials, summed(counts)):
        scores[factor].append((mean_iou(patch), mean_iou(pixel)))
    table = {}
    for factor, drawn in scores.items():
        patch, pixel = np.array(drawn).T  # (draws,) each
        deviation = patch.std(ddof=1).item() if len(drawn) > 1 else None
        table[f"1/{factor} of the images"] = {
            "patch mIoU": patch.mean().item(),
            "std over draws": deviation,
            "pixel mIoU": pixel.mean().item(),
        }
    return table
