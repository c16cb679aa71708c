"""The papers' pictures, from any checkpoint and any images, as PNG files.

    python visualize.py matches runs/vicregl-shapes                        # VICRegL, Figs. 4-5: the best local matches
    python visualize.py correspond runs/lc_loss-shapes --index 0 5         # LC-loss, Figs. 4-5: truth beside prediction
    python visualize.py objects runs/cribo-shapes --bank 500               # CrIBo, Figs. 3-4: objects and their neighbours
    python visualize.py heatmap runs/bagssl-shapes --query 0.3 0.6         # BagSSL, Fig. 6: similarity to a patch
    python visualize.py neighbors resnet50.pth --arch resnet50 --data imagenet     # BagSSL, Figs. 7-8: nearest patches
    python visualize.py views --method vicregl --views multicrop           # what an augmentation does, and where
    python visualize.py curves runs/vicreg-shapes runs/vicregl-shapes      # loss terms and the rest of several log.jsonl

The checkpoint is what evaluate.py takes, `random` included. Images are those of the validation part of --data, by default
the data of the run; --index chooses among them (several: one below the other), --seed draws other crops. A view is drawn
PANEL pixels wide, whatever its size. Positions come from the methods' own functions: a flip that is wrong in a loss is
wrong in its picture too.
"""
import argparse
import functools
import itertools
import json
import math
import random
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as tvf
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision.utils import draw_segmentation_masks, make_grid

import bagssl
import common
import cribo
import evaluate
import lc_loss
import vicreg
import vicregl

# --- Drawing -------------------------------------------------------------------------------------------------------
# Pictures are PIL images. Points are (y, x) in pixels; 0 is the upper or left edge, so a pixel's centre is at a half.

PANEL, GAP, LINE = 224, 12, 17  # pixels: side of a view as drawn, space between panels, height of a line of text
PLOT = 320, 210  # width and height of a panel of curves
FONT, SMALL = ImageFont.load_default(13), ImageFont.load_default(11)
RED, BLUE, GREEN, BLACK, GRAY = (214, 40, 40), (40, 90, 220), (30, 150, 60), (0, 0, 0), (150, 150, 150)


def hues(n, lightness=48):
    """n different colours, from red over green to violet."""
    return [ImageColor.getrgb(f"hsl({290 * i / max(n - 1, 1):.1f}, 90%, {lightness}%)") for i in range(n)]


def panel(image, side=PANEL):
    """A view, uint8 (3, size, size), or a part of a PIL image, as a square picture."""
    image = tvf.to_pil_image(image) if isinstance(image, torch.Tensor) else image
    return image.resize((side, side), Image.BICUBIC)


def framed(picture, colour, width=3):
    """With a frame inside its borders."""
    return ImageOps.expand(ImageOps.crop(picture, width), width, colour)


def beside(*pictures):
    """In a row, their lower edges on one line."""
    size = sum(p.width for p in pictures) + GAP * (len(pictures) - 1), max(p.height for p in pictures)
    whole, x = Image.new("RGB", size, "white"), 0
    for p in pictures:
        whole.paste(p, (x, whole.height - p.height))
        x += p.width + GAP
    return whole


def below(*pictures, gap=GAP):
    """In a column."""
    size = max(p.width for p in pictures), sum(p.height for p in pictures) + gap * (len(pictures) - 1)
    whole, y = Image.new("RGB", size, "white"), 0
    for p in pictures:
        whole.paste(p, (0, y))
        y += p.height + gap
    return whole


def text(string, width, colour=BLACK):
    """A text in as many lines as it takes."""
    wrapped = (textwrap.wrap(string, n) for n in range(len(string), 0, -1))
    lines = next(lines for lines in wrapped if max(map(FONT.getlength, lines)) <= width)
    picture = Image.new("RGB", (width, LINE * len(lines)), "white")
    ImageDraw.Draw(picture).multiline_text((0, 0), "\n".join(lines), colour, FONT, spacing=LINE - FONT.size)
    return picture


def titled(string, picture):
    return below(text(string, picture.width), picture, gap=4)


class Marks:
    """Lines, dots and boxes over a picture, drawn at three times its size and reduced, so that their edges are smooth."""

    def __init__(self, picture):
        self.picture, self.layer = picture, Image.new("RGBA", (3 * picture.width, 3 * picture.height))
        self.pen = ImageDraw.Draw(self.layer)

    def line(self, points, colour, width=2):
        self.pen.line([(3 * x - 0.5, 3 * y - 0.5) for y, x in points], colour, round(3 * width), joint="curve")

    def dot(self, point, colour, radius=4, edge=BLACK):
        y, x = (3 * c - 0.5 for c in point)
        for r, fill in ((3 * radius + 3, edge), (3 * radius, colour)):
            self.pen.ellipse((x - r, y - r, x + r, y + r), fill)

    def box(self, box, colour, width=2, dashes=1):
        """The outline of a box (top, left, height, width), inside it; dashes: on each side, white between them."""
        (top, left, height, width_), half = box, width / 2
        y0, x0, y1, x1 = top + half, left + half, top + height - half, left + width_ - half
        corners = [(y0, x0), (y0, x1), (y1, x1), (y1, x0), (y0, x0)]
        self.line(corners + corners[1:2], colour if dashes == 1 else "white", width)
        for (ya, xa), (yb, xb) in itertools.pairwise(corners):
            at = [(ya + (yb - ya) * i / (2 * dashes - 1), xa + (xb - xa) * i / (2 * dashes - 1)) for i in range(2 * dashes)]
            for start, end in zip(at[::2], at[1::2]):
                self.line([start, end], colour, width)

    def drawn(self):
        return Image.alpha_composite(self.picture.convert("RGBA"), self.layer.reduce(3)).convert("RGB")


def fitted(image):
    """A whole image, its longer side PANEL pixels, and the scale of this."""
    scale = PANEL / max(image.size)
    return image.resize([round(scale * side) for side in image.size], Image.BICUBIC), scale


def joined(a, b, ends, colours):
    """Two panels, the second below the first, and a line from each point of the first to one of the second.

    ends (n, 2, 2): (y, x) in a and in b, in units of their sides.
    """
    both = Marks(below(a, b, gap=2 * GAP))
    ends = [(PANEL * p, PANEL * q + torch.tensor([PANEL + 2 * GAP, 0])) for p, q in ends.float()]
    for (p, q), colour in zip(ends, colours):
        both.line([p.tolist(), q.tolist()], colour)
    for (p, q), colour in zip(ends, colours):
        both.dot(p.tolist(), colour)
        both.dot(q.tolist(), colour)
    return both.drawn()


# --- Images and features -------------------------------------------------------------------------------------------


def load_image(args, data, index):
    if not 0 <= index < len(data):
        raise common.UserError(f"--index {index}: {args.data} has images 0 to {len(data) - 1} here")
    try:
        return data.load(index)
    except Exception as error:  # whatever the decoder raises
        raise common.UserError(f"cannot read {data.name(index)} ({error}): mend or remove it") from error


def chosen(args, data):
    """Yields the images of --index, and for each a generator of random numbers."""
    for index in args.index:
        yield load_image(args, data, index), random.Random(f"{args.seed} {index}")


def spread(data, count):
    """The indices of `count` images, or of all, spread evenly over the data, whatever its order."""
    return np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int).tolist()


def cut_all(image, views):
    """Views [(box, flip, size), ...] -> V tensors (3, size, size) uint8, boxes (V, 4), flips (V,)."""
    boxes, flips = torch.tensor([box for box, _, _ in views], dtype=torch.float32), torch.tensor([f for _, f, _ in views])
    return [common.cut(image, *view) for view in views], boxes, flips


def uncoloured(x):
    """What a Photometric returns, (B, 3, H, W) -> uint8, for the eye."""
    low, high = (common.normalize(torch.full((1, 3, 1, 1), value)) for value in (0.0, 1.0))
    return ((x - low) / (high - low) * 255).round().clamp(0, 255).byte()


def head(checkpoint, name):
    """The head `name` of a last.pt or a release, of linear layers, normalisation and ReLU; or None."""
    if checkpoint == "random":
        return None
    state = common.read_checkpoint(checkpoint)
    state = {key.removeprefix("module."): value for key, value in state.get("model", state).items()}
    state = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    layers = []
    for i in range(max((int(key.split(".")[0]) + 1 for key in state), default=0)):
        weight = state.get(f"{i}.weight")
        if weight is None:
            layers.append(nn.ReLU())
        elif weight.ndim == 2:
            layers.append(nn.Linear(*reversed(weight.shape), bias=f"{i}.bias" in state))
        else:
            layers.append((nn.BatchNorm1d if f"{i}.running_mean" in state else nn.LayerNorm)(len(weight)))
    network = nn.Sequential(*layers)
    network.load_state_dict(state)
    return network.eval() if layers else None


def local_maps(backbone, x, local=None):
    """Views (B, 3, H0, W0) uint8, or as a Photometric returns them -> local features (B, N, D) on the CPU."""
    device = next(backbone.parameters()).device
    x = evaluate.to_input(x, device) if x.dtype == torch.uint8 else x.to(device)
    maps = backbone(x)[0]
    return (local(maps.flatten(0, 1)).unflatten(0, maps.shape[:2]) if local else maps).cpu()  # (B, N, D)


def cell_centres(indices, grid):
    """Numbers of locations (n,), row by row -> their centres (n, 2) as (y, x) in units of the view's sides."""
    return (torch.stack([indices // grid, indices % grid], 1) + 0.5) / grid


# --- matches -------------------------------------------------------------------------------------------------------


def matches(args, data, backbone):
    """VICRegL, Figs. 4-5: the best matches from a view to another, by feature and by place, coloured by rank.

    Features are those that its loss matches, the local projector's, or the backbone's in a checkpoint that has none.
    """
    local = head(args.checkpoint, "local_projector")
    local, figures = local and local.to(args.device), []
    for image, rng in chosen(args, data):
        views, boxes, flips = cut_all(image, vicregl.sample_views(rng, *image.size[::-1], vicregl.VIEWS["two"], args.size))
        map_a, map_b = local_maps(backbone, torch.stack(views), local)[:, None]  # (1, N, D) each
        grid = math.isqrt(map_a.shape[1])
        pos_a, pos_b = vicregl.positions(boxes, flips, grid).flatten(1, 2)[:, None]  # (1, N, 2) each
        by_place = vicregl.location_distances(pos_a, pos_b)
        a, b = (framed(panel(view), colour) for view, colour in zip(views, (RED, BLUE)))
        columns = []
        for name, distances in ("by feature", vicregl.feature_distances(map_a, map_b)), ("by place", by_place):
            kept, nearest = (i[0] for i in vicregl.closest(distances, args.num_matches))
            order = distances[0, kept, nearest].argsort(stable=True)
            kept, nearest = kept[order], nearest[order]  # (n,) the closest pair first
            ends = torch.stack([cell_centres(kept, grid), cell_centres(nearest, grid)], 1)  # (n, 2, 2)
            if name == "by feature":
                agree = (by_place[0].argmin(1)[kept] == nearest).sum()
                name += f"; {agree} of {len(kept)} are the nearest place too"
            columns.append(titled(name, joined(a, b, ends, hues(len(kept)))))
        source, scale = fitted(image)
        source = Marks(source)
        for box, colour in zip(boxes, (RED, BLUE)):
            source.box((box * scale).tolist(), colour)
        flipped = [" (mirrored)" * flip for flip in flips]
        key = below(text(f"first view{flipped[0]}, above", PANEL, RED), text(f"second view{flipped[1]}, below", PANEL, BLUE),
                    rank_key(len(kept)), gap=4)
        left = Image.new("RGB", (PANEL, 2 * PANEL + 2 * GAP), "white")  # as high as the columns without their titles
        left.paste(below(source.drawn(), key))
        figures.append(beside(left, *columns))
    return below(*figures, gap=2 * GAP)


def rank_key(n):
    """The colours of ranks 1 to n."""
    key = Image.new("RGB", (PANEL, LINE + 14), "white")
    pen = ImageDraw.Draw(key)
    for i, colour in enumerate(hues(n)):
        pen.rectangle((PANEL * i // n, LINE, PANEL * (i + 1) // n - 1, LINE + 13), colour)
    pen.text((0, 0), "closest", BLACK, FONT)
    pen.text((PANEL, 0), f"rank {n}", BLACK, FONT, anchor="ra")
    return key


# --- correspond ----------------------------------------------------------------------------------------------------


def thinned(numbers, n=5):
    """At most n of them, evenly spread."""
    step = math.ceil(len(numbers) / n) or 1
    return numbers[(len(numbers) - 1) % step // 2::step]


def correspond(args, data, backbone):
    """LC-loss, Figs. 4-5: where points of an image lie in a transformed version, and where the features say they lie.

    Above, the cropped view of the loss; then the image mirrored, blurred, jittered and made gray, as in Section 4.6. The
    prediction is the arg max of cosine similarity; it is right in the location that holds the true point.
    """
    flip_colours = common.Photometric(), common.Photometric(jitter=lc_loss.JITTER, jitter_p=1.0, gray_p=0.5, blur_p=1.0)
    figures = []
    for image, rng in chosen(args, data):
        generator, columns = torch.Generator().manual_seed(rng.getrandbits(63)), []
        cropped = lc_loss.sample_views(rng, image.height, image.width, args.size)
        mirrored = [cropped[0], (cropped[0][0], True, args.size)]
        for name, views, colours in ("crop", cropped, lc_loss.COLOURS), ("mirror image", mirrored, flip_colours):
            views, boxes, flips = cut_all(image, views)
            colours = [c if isinstance(c, common.Photometric) else common.Photometric(**c) for c in colours]
            x = torch.cat([colour(view[None], generator) for colour, view in zip(colours, views)])
            maps = F.normalize(local_maps(backbone, x), dim=2)  # (2, N, D)
            grid = math.isqrt(maps.shape[1])
            points, valid = lc_loss.correspondences(boxes[1:], flips[1:], torch.tensor([image.size[::-1]]), grid)
            truth = (points[0].flatten(0, 1).flip(1) + 1) / 2  # (N, 2) as (y, x) in units of the view's sides
            found = (maps[0] @ maps[1].T).argmax(1)  # (N, D) (D, N) -> (N, N) -> (N,)
            cell = (truth * grid).long().clamp(0, grid - 1)  # (N, 2)
            right = (cell[:, 0] * grid + cell[:, 1] == found)[valid.flatten()]
            rows, columns_ = (thinned(valid[0].any(axis).nonzero().flatten()) for axis in (1, 0))
            shown = (rows[:, None] * grid + columns_).flatten()  # (n,): lines from all locations would hide one another
            a, b = (panel(view) for view in uncoloured(x))
            title = f"{name}: truth", f"{name}: features; {right.sum()} of all {len(right)} points right"
            for string, target in zip(title, (truth[shown], cell_centres(found[shown], grid))):
                ends = torch.stack([cell_centres(shown, grid), target], 1)
                columns.append(titled(string, joined(a, b, ends, hues(len(shown)))))
        figures.append(beside(*columns))
    return below(*figures, gap=2 * GAP)


# --- objects -------------------------------------------------------------------------------------------------------


def object_batch(args, data, indices, backbone):
    """The objects of images as CrIBo finds them -> views (n, 2, 3, size, size) uint8, assignment (n, 2, N, K), objects of
    both views c_1, c_2 (M, D), and the place of each in n x K, (M, 2)."""
    views, boxes, flips = [], [], []
    for index in indices:
        image = load_image(args, data, index)
        sampled = cribo.sample_views(random.Random(f"{args.seed} {index}"), image.height, image.width, args.size)
        for kept, one in zip((views, boxes, flips), cut_all(image, sampled)):
            kept.append(torch.stack(one) if isinstance(one, list) else one)
    views = torch.stack(views)
    maps_1, maps_2 = (torch.cat([local_maps(backbone, x) for x in views[:, v].split(64)]) for v in (0, 1))  # (n, N, D)
    positions = cribo.joint_positions(torch.stack(boxes), torch.stack(flips), math.isqrt(maps_1.shape[1]))
    assignment = cribo.joint_space_clustering(torch.cat([maps_1, maps_2], 1), positions, args.num_objects, args.pos_weight)
    c_1, c_2, valid = cribo.object_representations(maps_1, maps_2, assignment)
    return views, assignment.unflatten(1, (2, -1)), c_1, c_2, valid.nonzero()


def object_mask(assigned, size):
    """Columns of an assignment (N, k) -> (k, size, size) bool: where the view shows these objects."""
    grid = math.isqrt(len(assigned))
    masks = (assigned > 0).T.unflatten(1, (grid, grid))[None].float()  # (N, k) -> (1, k, h, w)
    return F.interpolate(masks, (size, size))[0].bool()


def lone_object(view, assigned, side):
    """A view (3, H0, W0) in which all but one object (N,) is faded, as a square picture."""
    faded = view * 0.2 + 255 * 0.8
    return panel(torch.where(object_mask(assigned[:, None], view.shape[1]), view, faded).byte(), side)


def objects(args, data, backbone, batch=32):
    """CrIBo, Figs. 3-4: the clusters of both views of an image; and the nearest object in a bank for each of the first view.

    Green frames where the cycle of Eq. (4) holds, red where it does not. The way back is sought among the objects of `batch`
    images, as in training; the bank holds those of --bank other images. Without colour augmentation.
    """
    others = [i for i in spread(data, args.bank + batch) if i not in args.index]
    random.Random(args.seed).shuffle(others)  # the data may be sorted by class
    queries, others = [*args.index, *others[:batch - len(args.index)]], others[max(0, batch - len(args.index)):]
    if not others:
        raise common.UserError(f"{args.data} has {len(data)} images: more than {batch} are needed, to fill the bank too")
    parts = [object_batch(args, data, others[i:i + batch], backbone) for i in range(0, len(others), batch)]
    kept, kept_assignment, b_1, b_2, _ = (torch.cat(part) for part in zip(*parts))
    kept_places = torch.cat([part[4] + torch.tensor([i * batch, 0]) for i, part in enumerate(parts)])
    bank = cribo.MemoryBank(len(b_1), b_1.shape[1])
    bank.push(b_1, b_2)
    views, assignment, c_1, c_2, places = object_batch(args, data, queries, backbone)
    nearest, _, closed, _ = cribo.cycle_consistent_matches(c_1, c_2, bank)
    figures, colours, side = [], hues(args.num_objects), (PANEL - GAP) // 2
    for i in range(len(args.index)):
        mine, pairs, panels = (places[:, 0] == i).nonzero().flatten().tolist(), [], []
        in_both = places[mine, 1].tolist()
        for v in (0, 1):
            view = tvf.pil_to_tensor(panel(views[i, v]))
            masks = object_mask(assignment[i, v][:, in_both], PANEL)
            painted = draw_segmentation_masks(view, masks, 0.7, [colours[k] for k in in_both])
            panels += [titled(f"view {v + 1}", panel(view)),
                       titled(f"its objects; {len(in_both)} are in both views", panel(painted))]
        for m, k in zip(mine, in_both):
            image, found = kept_places[nearest[m]].tolist()
            tiles = (lone_object(views[i, 0], assignment[i, 0][:, k], side),
                     lone_object(kept[image, 0], kept_assignment[image, 0][:, found], side))
            pair = Marks(framed(ImageOps.expand(beside(*tiles), 4, "white"), GREEN if closed[m] else RED, 3))
            pair.dot((12, 12), colours[k], 5)
            pairs.append(pair.drawn())
        share = f"{sum(closed[mine].tolist())} of {len(mine)}"
        rows = [beside(*pairs[j:j + 4]) for j in range(0, len(pairs), 4)]
        figures.append(below(beside(*panels), titled(
            f"each object of view 1, and the nearest of {len(b_1)} in the bank; green: the cycle holds ({share})",
            below(*rows)) if rows else text("no object is in both views", 4 * PANEL)))
    return below(*figures, gap=2 * GAP)


# --- heatmap and neighbors -----------------------------------------------------------------------------------------


def square_and_query(args, image):
    """The image's central square (3, R, R) uint8, as large as makes a patch of --scale of its area --size pixels wide;
    and the patch around --query, (top, left, height, width) in its pixels."""
    pixels = bagssl.image_side(args.size, args.scale)
    (box, _, _), = evaluate.center_view(None, image.height, image.width, pixels)
    corner = [min(max(round(q * pixels - args.size / 2), 0), pixels - args.size) for q in args.query]
    return common.cut(image, box, False, pixels), (*corner, args.size, args.size)


def cut_patches(square, boxes):
    return torch.stack([square[:, top:top + h, left:left + w] for top, left, h, w in boxes])  # (P, 3, h, w)


def spaces(args, patches, backbone, projector):
    """Normalised embeddings of patches before and after the projector -> {"projection": (P, D'), "embedding": (P, D)}."""
    y = torch.cat([backbone(evaluate.to_input(x, args.device))[1] for x in patches.split(64)])
    both = {"projection": projector(y)} if projector else {}
    return {name: F.normalize(z, dim=1).cpu() for name, z in (both | {"embedding": y}).items()}


def queried(args, square, query):
    """The central square as a panel, the query patch in red dashes."""
    marks = Marks(panel(square))
    marks.box([PANEL / square.shape[1] * side for side in query], RED, dashes=5)
    return titled(f"query: a patch of {args.scale:g} of the area", marks.drawn())


def load_projector(args):
    projector = head(args.checkpoint, "projector")
    return projector and projector.to(args.device)


def heatmap(args, data, backbone, steps=17):
    """BagSSL, Fig. 6: cosine similarity of all patches of an image to one of them, in both spaces.

    A patch's similarity is drawn at its centre; no centre lies nearer to the border than half a patch.
    """
    projector, figures = load_projector(args), []
    for image, _ in chosen(args, data):
        square, query = square_and_query(args, image)
        columns, gray = [queried(args, square, query)], panel(square).convert("L").convert("RGB")
        boxes = [query, *bagssl.patch_grid(square.shape[1], args.size, steps ** 2)]
        side = PANEL * args.size / square.shape[1]
        cell = (PANEL - side) / (steps - 1)  # pixels from one centre to the next
        start, extent = round((side - cell) / 2), round(steps * cell)
        for name, z in spaces(args, cut_patches(square, boxes), backbone, projector).items():
            similarity = (z[1:] @ z[0]).view(steps, steps)  # (P, D) (D,) -> (P,)
            low, high = similarity.aminmax()
            levels = ((similarity - low) / (high - low).clamp(min=1e-6) * 255).byte()
            heat = gray.copy()
            heat.paste(warm(Image.fromarray(levels.numpy())).resize((extent, extent), Image.BICUBIC), (start, start))
            columns.append(titled(f"{name}: cosine", below(warm_key(low, high), Image.blend(gray, heat, 0.8), gap=4)))
        figures.append(beside(*columns))
    return below(*figures, gap=2 * GAP)


def warm(levels):
    """Gray levels as colours, from dark blue over red to yellow."""
    return ImageOps.colorize(levels, (20, 20, 110), (255, 235, 70), (215, 50, 60))


def warm_key(low, high):
    key = warm(Image.linear_gradient("L").rotate(90).resize((PANEL, LINE)))
    pen = ImageDraw.Draw(key)
    pen.text((4, LINE / 2), f"{low:.2f}", "white", FONT, anchor="lm")
    pen.text((PANEL - 4, LINE / 2), f"{high:.2f}", BLACK, FONT, anchor="rm")
    return key


def neighbors(args, data, backbone, nrow=8, rows=5):
    """BagSSL, Figs. 7-8: the patches nearest to one of them, by cosine, in both spaces; among 16 patches of each bank image.

    Frames: green around patches of other images of the same class, red around those of another class; none around
    patches of the same image, and none at all where the data has no labels.
    """
    projector, bank, owners, tiles = load_projector(args), [], [], []
    for index in dict.fromkeys([*args.index, *spread(data, args.bank)]):
        square, _ = square_and_query(args, load_image(args, data, index))
        patches = cut_patches(square, bagssl.patch_grid(square.shape[1], args.size, 16))
        bank.append(spaces(args, patches, backbone, projector))
        owners += [index] * len(patches)
        tiles += [panel(patch, 46) for patch in patches]
    bank = {name: torch.cat([z[name] for z in bank]) for name in bank[0]}  # (P, D) each
    figures = []
    for index, (image, _) in zip(args.index, chosen(args, data)):
        square, query = square_and_query(args, image)
        columns, patch = [queried(args, square, query)], cut_patches(square, [query])
        first = Marks(panel(patch[0], 46))
        first.box((0, 0, 46, 46), RED, 3, dashes=4)
        for name, z in spaces(args, patch, backbone, projector).items():
            nearest = (bank[name] @ z[0]).topk(min(nrow * rows - 1, len(owners))).indices.tolist()  # (P, D) (D,) -> (P,)
            shown = [first.drawn()]
            for i in nearest:
                labels, same = (data.label(index), data.label(owners[i])), owners[i] == index
                known = not same and min(labels) >= 0
                shown.append(framed(tiles[i], GREEN if labels[0] == labels[1] else RED) if known else tiles[i])
            grid = make_grid([tvf.pil_to_tensor(tile) for tile in shown], nrow, padding=2, pad_value=255)
            columns.append(titled(f"{name}: the nearest {len(nearest)} of {len(owners)} patches", tvf.to_pil_image(grid)))
        figures.append(beside(*columns))
    return below(*figures, gap=2 * GAP)


# --- views ---------------------------------------------------------------------------------------------------------


def augmentation(args):
    """A method's own sample(rng, height, width), and the colours of its views, in turn."""
    if args.method == "vicreg":
        area, *colours = vicreg.VIEWS[args.views or "paper"]
        return functools.partial(vicreg.sample_views, area=area, size=args.size), colours
    if args.method == "vicregl":
        kinds = vicregl.VIEWS[args.views or "two"]
        return functools.partial(vicregl.sample_views, kinds=kinds, size=args.size), [
            dict(jitter=vicregl.JITTER, blur_p=0.5, solarize_p=0.1)]
    if args.method == "bagssl":
        area = bagssl.parse_scale(args.views or "0.2")
        return functools.partial(bagssl.sample_patches, area=area, patches=2, size=args.size), bagssl.COLOURS
    module = {"lc_loss": lc_loss, "cribo": cribo}[args.method]
    return functools.partial(module.sample_views, size=args.size), module.COLOURS


def places(args, box, flip, size):
    """The points that a method pairs, (y, x) in pixels of the image and in units of the view's sides, (n, 2) each.

    With their numbers (n,) in a grid, row by row. size: the image's height and width. The points are the centres of a
    grid over the view, or for LC-loss of one over the image.
    """
    number = torch.arange(args.grid ** 2)
    centres = cell_centres(number, args.grid)
    if args.method == "lc_loss":
        points, valid = (t[0].flatten(0, 1) for t in lc_loss.correspondences(box[None], flip[None], size[None], args.grid))
        return centres[valid] * size, (points.flip(1)[valid] + 1) / 2, number[valid]
    positions = cribo.positions if args.method == "cribo" else vicregl.positions  # the others use none
    return positions(box[None], flip[None], args.grid)[0].flatten(0, 1), centres, number


def numbered(picture, points, number, grid, boxes=(), radius=8):
    """A picture in a white margin, with dots at points (n, 2), that show their numbers (n,) in a grid, and red boxes."""
    margin = radius + 1
    marks, dots = Marks(ImageOps.expand(picture, margin, "white")), list(zip((points + margin).tolist(), number.tolist()))
    for top, left, height, width in boxes:
        marks.box((top + margin, left + margin, height, width), RED)
    for point, n in dots:
        marks.dot(point, hues(grid ** 2)[n], radius)
    picture = marks.drawn()
    for (y, x), n in dots:
        dark = np.dot(hues(grid ** 2)[n], (0.3, 0.6, 0.1)) < 130
        ImageDraw.Draw(picture).text((x, y), str(n + 1), "white" if dark else BLACK, SMALL, anchor="mm")
    return picture


def views(args, data):
    """What the augmentation of a method makes of an image: each view beside the image and its crop, with numbered points.

    The same number lies on the same thing in both, or the method's positions are wrong.
    """
    sample, colours = augmentation(args)
    colours = [common.Photometric(**colour) for colour in colours]
    figures = []
    for image, rng in chosen(args, data):
        cut, boxes, flips = cut_all(image, sample(rng, image.height, image.width))
        generator, pairs = torch.Generator().manual_seed(rng.getrandbits(63)), []
        for i, (view, box, flip) in enumerate(zip(cut, boxes, flips)):
            view = uncoloured(colours[i % len(colours)](view[None], generator))[0]
            at_source, at_view, number = places(args, box, flip, torch.tensor(image.size[::-1]))
            source, scale = fitted(image)
            crop = [(box * scale).tolist()]
            string = f"view {i + 1} of {args.method}: {len(view[0])} pixels{', mirrored' * flip}"
            pairs.append(titled(string, beside(numbered(source, at_source * scale, number, args.grid, crop),
                                               numbered(panel(view), at_view * PANEL, number, args.grid))))
        figures += [beside(*pairs[i:i + 2]) for i in range(0, len(pairs), 2)]
    return below(*figures, gap=2 * GAP)


# --- curves --------------------------------------------------------------------------------------------------------

BOOKKEEPING = {"step", "epoch", "lr", "momentum", "broken", "eta_s", "data_wait", "memory_gb"}


def read_log(path):
    """The lines of a run's log.jsonl; the last one may still be in the writing."""
    file = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path)
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise common.UserError(f"{file} is no log.jsonl of a run ({error})") from error
    if not lines:
        raise common.UserError(f"{file} is still empty: the first line comes after --log-every steps")
    return lines


def ticks(low, high, log):
    """Three or more round numbers from low to high; on a logarithmic axis powers of ten, with 2 and 5 where they are few."""
    if log:
        powers = [10.0 ** e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        for steps in ((1,), (1, 2, 5)):
            values = [p * s for p in powers for s in steps if low <= p * s <= high]
            if len(values) > 2:
                return values
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = max(step * s for s in (1, 2, 5) if step * s <= (high - low) / 3)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def limits(values, log):
    """The range of an axis: that of the values and a little more."""
    low, high = min(values), max(values)
    if log:
        return low / 1.1, high * 1.1
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def plot(metric, runs, epochs, log):
    """A panel of a metric over epochs. runs: [(lines of a log, colour), ...]; epochs: the axis ends there."""
    scale = math.log10 if log else float
    curves = [([(line["epoch"], line[metric]) for line in lines if metric in line and (not log or line[metric] > 0)], colour)
              for lines, colour in runs]
    points = [point for curve, _ in curves for point in curve]
    if not points:  # on a logarithmic axis, of a metric that is never positive
        return None
    (x0, x1), (y0, y1) = (0, epochs), limits([y for _, y in points], log)
    labels = [(y, f"{y:.4g}") for y in ticks(y0, y1, log)]
    left, bottom, top = 8 + max(FONT.getlength(label) for _, label in labels), PLOT[1] - 2 * LINE - 4, LINE + 4

    def at(x, y):
        return (bottom - (scale(y) - scale(y0)) / (scale(y1) - scale(y0)) * (bottom - top),
                left + (x - x0) / (x1 - x0) * (PLOT[0] - 8 - left))

    marks, words = Marks(Image.new("RGB", PLOT, "white")), []
    for y, label in labels:
        row = at(x0, y)[0]
        marks.line([(row, left), (row, PLOT[0] - 8)], (225, 225, 225), 1)
        words.append((left - 5, row, label, "rm"))
    for x in ticks(x0, x1, False):
        column = at(x, y0)[1]
        marks.line([(bottom, column), (bottom + 4, column)], GRAY, 1)
        words.append((column, bottom + LINE / 2 + 4, f"{x:.4g}", "mm"))
    marks.line([(top, left), (bottom, left), (bottom, PLOT[0] - 8)], GRAY, 1)
    for curve, colour in curves:
        if len(curve) > 1:
            marks.line([at(*point) for point in curve], colour)
        for point in curve[:1] + curve[-1:]:  # seen even where it is the only one
            marks.dot(at(*point), colour, 2, colour)
    words += [((left + PLOT[0] - 8) / 2, LINE / 2, metric.replace("_per_", "/"), "mm"),
              ((left + PLOT[0] - 8) / 2, PLOT[1] - LINE / 2, "epoch", "mm")]
    picture = marks.drawn()
    for x, y, string, anchor in words:
        ImageDraw.Draw(picture).text((x, y), string, BLACK, FONT, anchor=anchor)
    return picture


def curves(args):
    """All metrics of one or several log.jsonl over epochs, a panel each, and a legend."""
    runs = [(read_log(path), colour) for path, colour in zip(args.logs, hues(len(args.logs), 40))]
    epochs = max(lines[-1]["epoch"] for lines, _ in runs)
    keys = sorted((list(lines[-1]) for lines, _ in runs), key=len, reverse=True)  # the longest order first
    metrics = dict.fromkeys(key for key in itertools.chain(*keys) if key not in BOOKKEEPING)
    panels = [p for metric in metrics if (p := plot(metric, runs, epochs, args.log))]
    rows = [beside(*panels[i:i + 3]) for i in range(0, len(panels), 3)]
    legend = []
    for path, (_, colour) in zip(args.logs, runs):
        line = Marks(Image.new("RGB", (30, LINE), "white"))
        line.line([(LINE / 2, 0), (LINE / 2, 30)], colour)
        legend.append(beside(line.drawn(), text(path, rows[0].width - 30 - GAP)))
    return below(*rows, below(*legend, gap=0))


# --- Command line --------------------------------------------------------------------------------------------------


def parse_args():
    images, model = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    images.add_argument("--data", "--images", help="as for training; default: that of the run")
    images.add_argument("--index", type=int, nargs="+", default=[0], help="which images of the validation part")
    images.add_argument("--size", type=int, help="pixels of a view; default: that of the run")
    images.add_argument("--seed", type=int, default=0, help="of crops and colours")
    model.add_argument("checkpoint", help="a run folder, a file of weights, or 'random'")
    model.add_argument("--arch", help="known from a run folder")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="protocol", required=True)

    def command(run, *parents):
        added = commands.add_parser(run.__name__, parents=parents, description=run.__doc__,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
        added.set_defaults(run=run, bf16=False)
        added.add_argument("--out", default=f"{run.__name__}.png", help="the picture, a PNG file")
        return added.add_argument

    command(matches, images, model)("--num-matches", type=int, default=10)
    command(correspond, images, model)
    flag = command(objects, images, model)
    flag("--num-objects", type=int, default=8, help="K, clusters an image")
    flag("--pos-weight", type=float, default=1.0, help="lambda_pos, weight of the distance in clustering")
    flag("--bank", type=int, default=128, help="images among whose objects neighbours are sought")
    for run, scale in (heatmap, 0.1), (neighbors, 0.2):
        flag = command(run, images, model)
        flag("--query", type=float, nargs=2, default=[0.5, 0.5], metavar=("Y", "X"), help="the patch's centre, from 0 to 1")
        flag("--scale", type=float, default=scale, help="a patch's share of the area")
    flag("--bank", type=int, default=256, help="images among whose patches neighbours are sought")
    flag = command(views, images)
    flag("--method", default="vicregl", choices=["vicreg", "vicregl", "lc_loss", "cribo", "bagssl"])
    flag("--views", help="that method's --views; --patch-scale of bagssl")
    flag("--grid", type=int, default=4, help="points a side; 0: none")
    flag = command(curves)
    flag("logs", nargs="+", metavar="RUN", help="run folders or log.jsonl files")
    flag("--log", action="store_true", help="logarithmic vertical axes")
    return parser.parse_args()


@torch.no_grad()
def main():
    with common.one_line_errors():
        args = parse_args()
        out = Path(args.out)
        if out.suffix != ".png":
            raise common.UserError(f"--out {out} must end in .png")
        if args.run is curves:
            picture = curves(args)
        else:
            args.device, backbone = common.set_up(args.seed), []
            if args.run is views:
                args.data, args.size = args.data or "shapes", args.size or (64 if args.data in (None, "shapes") else 224)
            else:
                backbone = [evaluate.load(args)[0].to(args.device)]
            data = common.open_data(args.data, "val", args.size) or common.open_data(args.data, "train", args.size)
            picture = args.run(args, data, *backbone)
        picture = ImageOps.expand(picture, GAP, "white")
        out.parent.mkdir(parents=True, exist_ok=True)
        common.write(out, lambda file: picture.save(file, "PNG", optimize=True))
        print(f"{out}: {picture.width} x {picture.height} pixels")


if __name__ == "__main__":
    main()
