"""Matches of locations in two views. LC-loss, Section 4.6; VICRegL, Eqs. (2) and (3)

flip: an image and the same mirrored and recolored (LC-loss). The match of a location is the one
with the largest cosine similarity; right is the mirrored location.
location = feature: two random crops (VICRegL). Of one crop's locations that lie inside the other,
the 20 best matches by feature distance; right are those that are the matches by location too.
chance: the share of random matches that are right.

    python -m evaluate correspond --checkpoint runs/lc_loss-shapes --baseline

Differences
 1. LC-loss names blur, color jitter and random grayscale, but neither strengths nor probabilities:
    those of VICReg, Appendix B.2.
 2. VICRegL shows its matches in figures; the share that agrees is this project's own measure.
"""
import torch
import torch.nn.functional as F
from torchvision.transforms import RandomResizedCrop

import common
from evaluate.features import center_view, open_part, read_batches, summed, to_input

NAME = "correspondence"
prepare = open_part


def transformed(x):
    """LC-loss's transformation in 4.6: images (B, 3, H0, W0), uint8 -> mirrored and recolored
    inputs. Draws with torch's global generator."""
    jitter = (0.4, 0.4, 0.2, 0.1)
    recolor = common.Photometric(jitter, blur_p=0.5, size=x.shape[3])
    return recolor(x.flip(3))


def three_views(image, size):
    """The center of an image, and two random crops as VICRegL draws them."""
    views = center_view(image, size)
    for _ in range(2):
        box = RandomResizedCrop.get_params(image, (0.08, 1.0), ratio=(3 / 4, 4 / 3))
        flip = torch.rand(()).item() < 0.5
        views.append((box, flip, size))
    return views


def flip_matches(plain, mirrored, grid):
    """Which locations (B, N) of maps (B, N, D) find their mirror image."""
    plain = F.normalize(plain, dim=2)
    mirrored = F.normalize(mirrored, dim=2)
    similarity = plain @ mirrored.mT  # (B, N, D) (B, D, N) -> (B, N, N)
    index = torch.arange(grid**2, device=plain.device)
    mirror_image = index.view(grid, grid).flip(1).flatten()
    return similarity.argmax(2) == mirror_image


def crop_matches(a, b, boxes, flips, grid, num_matches):
    """Of two crops' maps a, b (B, N, D), boxes (B, 2, 4) and flips (B, 2): which locations (B, N)
    of a have one of the best matches by feature, and which of these agree with that by location."""
    from vicregl import positions

    box_a, box_b = boxes.unbind(1)
    flip_a, flip_b = flips.unbind(1)
    pos_a = positions(box_a, flip_a, grid).flatten(1, 2)  # (B, N, 2)
    pos_b = positions(box_b, flip_b, grid).flatten(1, 2)
    corner, sides = box_b[:, None].chunk(2, 2)  # (B, 1, 2) each
    inside = (pos_a >= corner) & (pos_a <= corner + sides)
    inside = inside.all(2)

    exact = "donot_use_mm_for_euclid_dist"
    by_location = torch.cdist(pos_a, pos_b, compute_mode=exact).argmin(2)
    distance, by_feature = torch.cdist(a, b).min(2)
    distance = distance.where(inside, torch.inf)
    best = distance.argsort(1)[:, :num_matches]
    kept = torch.zeros_like(inside).scatter(1, best, True)
    kept = kept & inside
    return kept, kept & (by_location == by_feature)


@torch.no_grad()
def run(backbone, data, args, num_matches=20, batch_size=64):
    """Two shares in % of right matches, and that of random ones."""
    backbone.eval()
    device = args.device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for index, batch in read_batches(data, three_views, args, batch_size):
        plain, a, b = batch.views.unbind(1)  # (B, 3, size, size) each
        torch.manual_seed(int(index.sum()))  # the same on any number of processes
        inputs = [to_input(x, device) for x in (plain, a, b)]
        inputs.append(transformed(plain))
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            maps = [backbone.stages(x)[-1].float() for x in inputs]
        grid = maps[0].shape[2]
        plain, a, b, mirrored = [m.flatten(2).mT for m in maps]  # (B, D, h, w) -> (B, N, D)

        boxes = batch.boxes[:, 1:]  # of the two crops
        flips = batch.flips[:, 1:]
        kept, agree = crop_matches(a, b, boxes, flips, grid, num_matches)
        right = flip_matches(plain, mirrored, grid)
        counts = [right.sum(), right.numel(), agree.sum(), kept.sum(), len(index)]
        sums += torch.tensor(counts, device=device)

    right, locations, agree, kept, images = summed(sums).tolist()
    row = {
        "flip": 100 * right / locations,
        "location = feature": 100 * agree / max(kept, 1),
        "chance": 100 * images / locations,
    }
    return {"": row}
