"""Dense nearest neighbor retrieval. CrIBo, Section 4.1, Table 1

Each patch of the validation images gets the class of most of its 50 nearest patches of the training
images, whose own class is the one that most of their pixels have. Of the training images all, or
one of 8, 64 or 128 are used; these scores are the mean over 5 draws. Images keep their size, rounded
down to a multiple of the patch.

    python -m evaluate retrieve --checkpoint cribo.pth --arch vit_small_patch16 --data voc

"patch mIoU" compares patches with their own majority labels, as the paper does; "pixel mIoU" the
pixels of the masks, in their own size, with the class of their patch.

Differences
 1. Unsaid in the paper: the vote is unweighted, the distance cosine, and void has no part: a patch
    has the class of most of its pixels but void, and one of nothing but void is left out.
 2. The neighbors are exact. Training patches are computed anew for each draw and --chunk of
    validation images, and never kept.
"""
import math

import numpy as np
import torch

import training
from evaluate.features import concatenated, summed
from evaluate.knn import nearest_of_all, vote
from evaluate.masks import open_masks, whole_images
from evaluate.miou import confusion, mean_iou

NAME = "retrieval"


def add_flags(flag):
    flag("--subsample", type=int, nargs="+", default=[1, 8, 64, 128],
         help="one of so many training images is used")
    flag("--runs", type=int, default=5, help="draws of these images")
    flag("--chunk", type=int, default=1000, help="validation images held in memory at a time")


def prepare(args):
    return open_masks(args)


def cells(mask, h, w):
    """For each pixel of a mask (H0, W0), the number of its cell in a grid of h x w."""
    y = torch.arange(mask.shape[0], device=mask.device) * h // mask.shape[0]
    x = torch.arange(mask.shape[1], device=mask.device) * w // mask.shape[1]
    return y[:, None] * w + x


def majority(mask, h, w, num_classes):
    """The class (h w,) of most pixels in each cell of a mask but void; -1 where all is void."""
    pairs = (cells(mask, h, w) * num_classes + mask)[mask >= 0]
    votes = torch.bincount(pairs, minlength=h * w * num_classes).view(h * w, num_classes)
    return votes.argmax(1).where(votes.sum(1) > 0, -1)


@torch.no_grad()
def patches(backbone, data, indices, args):
    """Yields for each image its local features (N, D), its mask (H0, W0), and the grid (h, w)."""
    for x, mask in whole_images(data, indices, None, backbone.stride, args):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            maps = backbone.stages(x)[-1].float()  # (1, D, h, w)
        yield maps[0].flatten(1).T, mask, maps.shape[2:]


def labelled_patches(backbone, train, indices, args):
    """Yields for each image its patches (n, D) that are not void, and their classes (n,)."""
    for maps, mask, grid in patches(backbone, train, indices, args):
        labels = majority(mask, *grid, train.num_classes)
        yield maps[labels >= 0], labels[labels >= 0]


def draw(n, factor, run):
    """Indices of one of `factor` of n images."""
    order = np.random.default_rng((factor, run)).permutation(n)
    return order[: math.ceil(n / factor)].tolist()


def run(backbone, data, args, k=50):
    """mIoU in % of k-NN classification of all patches of the validation images."""
    backbone.eval()
    train, val = data
    rank, world = training.rank_and_world()
    trials = []
    for factor in args.subsample:
        runs = args.runs if factor > 1 else 1
        trials += [(factor, i) for i in range(runs)]
    c = train.num_classes
    counts = torch.zeros(len(trials), 2, c, c, dtype=torch.long, device=args.device)

    for start in range(0, len(val), args.chunk):
        mine = range(start + rank, min(start + args.chunk, len(val)), world)
        held = list(patches(backbone, val, mine, args))
        own = [torch.empty(0, backbone.dim, device=args.device)]
        own = torch.cat(own + [maps for maps, _, _ in held])
        queries = concatenated(own)
        owner = concatenated(torch.full((len(own),), rank, device=args.device))
        for trial, count in zip(trials, counts):
            chosen = draw(len(train), *trial)
            memory = labelled_patches(backbone, train, chosen[rank::world], args)
            similarity, labels = nearest_of_all(queries, memory, k)
            predicted = vote(similarity, labels, c)[owner == rank]
            parts = predicted.split([len(maps) for maps, _, _ in held])
            for part, (_, mask, grid) in zip(parts, held):
                count[0] += confusion(part, majority(mask, *grid, c), c)
                count[1] += confusion(part[cells(mask, *grid)], mask, c)  # (h w,) -> (H0, W0)

    scores = [[mean_iou(count) for count in both] for both in summed(counts)]
    table = {}
    for factor in args.subsample:
        drawn = np.array([score for score, trial in zip(scores, trials) if trial[0] == factor])
        patch, pixel = drawn.mean(0).tolist()  # (runs, 2) -> (2,)
        deviation = drawn[:, 0].std(ddof=1).item() if len(drawn) > 1 else None
        table[f"1/{factor} of the images"] = {
            "patch mIoU": patch, "std over runs": deviation, "pixel mIoU": pixel}
    return table
