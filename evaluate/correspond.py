"""Matches of locations in two views. LC-loss, Section 4.6; VICRegL, Eqs. (2) and (3)

flip: an image against itself mirrored and with other colors; the match of a location is the one
with the largest cosine similarity, and right is the mirrored location (LC-loss).
location = feature: two random crops; of one crop's locations inside the other the 20 best matches
by feature distance, and right are those that are the matches by location too (VICRegL).
chance: the share of right ones among random matches.

    python -m evaluate correspond --checkpoint runs/lc_loss-shapes --baseline

Differences
 1. LC-loss names blur, color jitter and random grayscale, not their strengths and probabilities:
    those of VICReg's Appendix B.2, for both methods.
 2. VICRegL shows such matches in its figures; the share that agrees is this project's own measure.
"""
import functools

import torch
import torch.nn.functional as F
from torchvision.transforms import RandomResizedCrop

import common
import training
from evaluate.features import center_view, read_batches, summed, to_input

NAME = "correspondence"


def add_flags(flag):
    pass


def prepare(args):
    val = common.open_data(args.data, "val", args.size)
    return val or common.open_data(args.data, "train", args.size)


def transformed(x):
    """Section 4.6's transformation: images (B, 3, H0, W0), uint8 -> inputs, mirrored, with blur,
    color jitter and grayscale at random, drawn with torch's global generator."""
    colors = common.Photometric(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5)
    return colors(x.flip(3))


def three_views(image, size):
    """The center of an image, and two random crops as VICRegL draws them."""
    views = center_view(image, size)
    for _ in range(2):
        box = RandomResizedCrop.get_params(image, (0.08, 1.0), ratio=(3 / 4, 4 / 3))
        views.append((box, torch.rand(()).item() < 0.5, size))
    return views


def flip_matches(plain, mirrored, grid):
    """Which locations (B, N) of maps (B, N, D) find their mirror image. LC-loss, Section 4.6"""
    similarity = F.normalize(plain, dim=2) @ F.normalize(mirrored, dim=2).mT  # (B, N, N)
    index = torch.arange(grid * grid, device=plain.device)
    return similarity.argmax(2) == index.view(grid, grid).flip(1).flatten()


def crop_matches(a, b, boxes, flips, grid, num_matches):
    """Which locations (B, N) of maps a have a match in b that counts, and which of these are the
    matches by location too. boxes (B, 2, 4) and flips (B, 2) of both crops."""
    from vicregl import positions

    pos_a = positions(boxes[:, 0], flips[:, 0], grid).flatten(1, 2)  # (B, N, 2)
    pos_b = positions(boxes[:, 1], flips[:, 1], grid).flatten(1, 2)
    low = boxes[:, None, 1, :2]  # (B, 1, 2)
    high = low + boxes[:, None, 1, 2:]
    inside = ((pos_a >= low) & (pos_a <= high)).all(2)
    exact = "donot_use_mm_for_euclid_dist"
    by_location = torch.cdist(pos_a, pos_b, compute_mode=exact).argmin(2)
    distance, by_feature = torch.cdist(a, b).min(2)
    best = distance.where(inside, torch.inf).argsort(1)[:, :num_matches]  # (B, n)
    kept = torch.zeros_like(inside).scatter_(1, best, True) & inside
    return kept, kept & (by_location == by_feature)


@torch.no_grad()
def run(backbone, data, args, num_matches=20, batch_size=64):
    """Two shares in % of right matches, and that of random ones."""
    backbone.eval()
    rank, world = training.rank_and_world()
    chunks = [list(range(start, min(start + batch_size, len(data))))
              for start in range(0, len(data), batch_size)]
    sample = functools.partial(three_views, size=args.size)
    sums = torch.zeros(5, dtype=torch.float64, device=args.device)
    for index, batch in read_batches(data, sample, chunks[rank::world], args):
        plain, a, b = batch.views.unbind(1)  # (B, 3, size, size) each
        inputs = [to_input(x, args.device) for x in (plain, a, b)]
        torch.manual_seed(int(index[0]) if len(index) else 0)  # the same on any number of processes
        inputs.append(transformed(plain))
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            maps = [backbone.stages(x)[-1].float() for x in inputs]  # (B, D, h, w) each
        grid = maps[0].shape[2]
        plain, a, b, mirrored = [m.flatten(2).mT for m in maps]  # (B, N, D) each

        right = flip_matches(plain, mirrored, grid)
        boxes, flips = batch.boxes[:, 1:], batch.flips[:, 1:]
        kept, agree = crop_matches(a, b, boxes, flips, grid, num_matches)
        images = torch.tensor(len(index), device=args.device)
        locations = images * grid * grid
        sums += torch.stack([right.sum(), locations, agree.sum(), kept.sum(), images])

    right, locations, agree, kept, images = summed(sums).tolist()
    return {"": {"flip": 100 * right / locations,
                 "location = feature": 100 * agree / max(kept, 1),
                 "chance": 100 * images / locations}}
