"""Objects, as clusters of features. CrIBo, Section 3.2.1, Figs. 3 and 4

An image and its mirror image are clustered into K objects as in CrIBo's training, by features and
places and by features alone. Purity is the share of pixels whose class is the commonest of their
cluster: 100 where each cluster lies within one object, or within several of one class.

    python -m evaluate clusters --checkpoint runs/cribo-shapes --baseline

Differences
 1. The paper shows clusters in figures; their purity, on the unmirrored image and without void, is
    this project's own measure. K and lambda_pos are the run's, or 12 and 1. Costs are scaled image
    by image, in training over a batch.
"""
import numpy as np
import torch

import cribo
import training
from evaluate.features import summed
from evaluate.masks import mask_flags, open_masks, whole_images
from evaluate.retrieve import cells

NAME = "clusters"
prepare = open_masks


def add_flags(flag):
    mask_flags(flag)
    flag("--images", type=int, default=500, help="so many of the validation images")


def mirrored_positions(h, w, device):
    """Where locations (h, w) of an image and of its mirror image lie: (1, 2hw, 2), y and x, in
    strides of the map."""
    y = torch.arange(h, device=device).expand(w, h).T  # (h, w)
    x = torch.arange(w, device=device).expand(h, w)
    plain = torch.stack([y, x], 2)  # (h, w, 2)
    both = torch.stack([plain, plain.flip(1)])  # (2, h, w, 2)
    return both.view(1, -1, 2)


def pure_pixels(cluster, mask, num_clusters, num_classes):
    """Of pixels with clusters and classes (H0, W0), -1 is void: how many have the commonest class
    of their cluster, and how many have a class."""
    known = mask >= 0
    pairs = cluster * num_classes + mask
    counts = torch.bincount(pairs[known], minlength=num_clusters * num_classes)
    counts = counts.view(num_clusters, num_classes)
    return torch.stack([counts.amax(1).sum(), counts.sum()])


@torch.no_grad()
def run(backbone, data, args):
    """Purity in % of the clusters of validation images."""
    backbone.eval()
    _, val = data
    most = args.run.get("num_objects", 12)  # K
    weights = {"features and places": args.run.get("pos_weight", 1.0), "features": 0.0}
    sums = torch.zeros(len(weights), 2, dtype=torch.long, device=args.device)

    rank, world = training.rank_and_world()
    chosen = np.random.default_rng(0).permutation(len(val))[: args.images]
    mine = chosen[rank::world].tolist()
    images = whole_images(val, mine, None, backbone.stride, args)
    for index, (x, mask) in zip(mine, images):
        both = torch.cat([x, x.flip(3)])  # (2, 3, H0, W0)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            maps = backbone.stages(both)[-1].float()  # (2, D, h, w)
        h, w = maps.shape[2:]
        tokens = maps.flatten(2).mT.flatten(0, 1)[None]  # (1, 2hw, D)
        num_objects = min(most, 2 * h * w)  # no more than locations
        positions = mirrored_positions(h, w, x.device)
        cell = cells(mask, h, w)  # (H0, W0)
        for total, weight in zip(sums, weights.values()):
            torch.manual_seed(index)  # the same on any number of processes
            assignment = cribo.joint_space_clustering(tokens, positions, num_objects, weight)
            cluster = assignment[0, : h * w].argmax(1)  # (hw,)
            total += pure_pixels(cluster[cell], mask, num_objects, val.num_classes)

    pure, pixels = summed(sums).T  # (weights,) each
    return {"": dict(zip(weights, (100 * pure / pixels).tolist()))}
