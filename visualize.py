"""The papers' pictures, from any checkpoint and any images, as PNG files.

    python visualize.py matches runs/vicregl-shapes                      # VICRegL, Figs. 4-5: the best local matches
    python visualize.py correspond runs/lc_loss-shapes --index 0 5       # LC-loss, Figs. 4-5: truth beside prediction
    python visualize.py objects runs/cribo-shapes --bank 500             # CrIBo, Figs. 3-4: objects and their neighbours
    python visualize.py heatmap runs/bagssl-shapes --query 0.3 0.6       # BagSSL, Fig. 6: similarity to a patch
    python visualize.py neighbors resnet50.pth --arch resnet50 --data imagenet   # BagSSL, Figs. 7-8: nearest patches
    python visualize.py views --method vicregl --views multicrop         # what an augmentation does, and where
    python visualize.py curves runs/vicreg-shapes runs/vicregl-shapes    # loss terms and the rest of several log.jsonl

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
from torchvision.utils import draw_segmentation_masks, make_grid

import bagssl
import common
import cribo
import evaluate
import lc_loss
import training
import vicreg
import vicregl

# --- Drawing -------------------------------------------------------------------------------------------------------
# Pictures are PIL images. Points are (y, x) in pixels; 0 is the upper or left edge, so a pixel's centre is at a half.

PANEL, GAP, LINE = 224, 12, 17  # pixels: side of a view as drawn, space between panels, height of a line of text
FONT, SMALL = ImageFont.load_default(13), ImageFont.load_default(11)
RED, BLUE, GREEN, BLACK, WHITE = (214, 40, 40), (40, 90, 220), (30, 150, 60), (0, 0, 0), (255, 255, 255)


def hues(n, lightness=48):
    """n different colours, from red over green to violet."""
    return [ImageColor.getrgb(f"hsl({290 * i / max(n - 1, 1):.1f}, 90%, {lightness}%)") for i in range(n)]


def panel(image, side=PANEL):
    """A view, uint8 (3, H0, W0), as a square picture."""
    return tvf.to_pil_image(image).resize((side, side), Image.BICUBIC)


def framed(picture, colour, width=3):
    """With a frame inside its borders."""
    return ImageOps.expand(ImageOps.crop(picture, width), width, colour)


def text(string, width):
    """In as many lines as it takes; nothing for an empty string."""
    wrapped = (textwrap.wrap(string, n) for n in range(len(string) or 1, 0, -1))
    lines = next(lines for lines in wrapped if max(map(FONT.getlength, lines), default=0) <= width)
    picture = Image.new("RGB", (width, LINE * len(lines)), WHITE)
    for i, line in enumerate(lines):
        ImageDraw.Draw(picture).text((0, LINE * i), line, BLACK, FONT)
    return picture


def below(*pictures, gap=GAP):
    size = max(p.width for p in pictures), sum(p.height for p in pictures) + gap * (len(pictures) - 1)
    whole, y = Image.new("RGB", size, WHITE), 0
    for p in pictures:
        whole.paste(p, (0, y))
        y += p.height + gap
    return whole


def beside(*pictures, titles=()):
    """Pictures in a row, a title above each, if there are titles."""
    heads = [text(title, p.width) for title, p in itertools.zip_longest(titles, pictures, fillvalue="")]
    top = max(head.height for head in heads) + (4 if titles else 0)
    size = sum(p.width for p in pictures) + GAP * (len(pictures) - 1), top + max(p.height for p in pictures)
    whole, x = Image.new("RGB", size, WHITE), 0
    for head, p in zip(heads, pictures):
        whole.paste(head, (x, 0))
        whole.paste(p, (x, top))
        x += p.width + GAP
    return whole


class Marks:
    """What is drawn over a picture, in its coordinates. The picture may get a white margin, for what crosses its border.

    Lines, dots and boxes are drawn at three times the size and reduced: their edges are smooth.
    """

    def __init__(self, picture, margin=0):
        self.picture, self.margin, self.labels = ImageOps.expand(picture, margin, WHITE), margin, []
        self.layer = Image.new("RGBA", (3 * self.picture.width, 3 * self.picture.height))
        self.pen = ImageDraw.Draw(self.layer)

    def line(self, points, colour, width=2):
        at = [(3 * (x + self.margin) - 0.5, 3 * (y + self.margin) - 0.5) for y, x in points]
        self.pen.line(at, colour, 3 * width, joint="curve")

    def dot(self, point, colour, radius=4, edge=BLACK):
        y, x = (3 * (c + self.margin) - 0.5 for c in point)
        for r, fill in ((3 * radius + 3, edge), (3 * radius, colour)):
            self.pen.ellipse((x - r, y - r, x + r, y + r), fill)

    def box(self, box, colour, width=2, dashes=1):
        """Just inside the outline of (top, left, height, width); dashes: on each side, white between them."""
        top, left, h, w = box
        y0, x0, y1, x1 = top + width / 2, left + width / 2, top + h - width / 2, left + w - width / 2
        corners = [(y0, x0), (y0, x1), (y1, x1), (y1, x0), (y0, x0), (y0, x1)]
        self.line(corners, colour if dashes == 1 else WHITE, width)
        for a, b in itertools.pairwise(corners[:5]) if dashes > 1 else ():
            at = np.linspace(a, b, 2 * dashes)
            for dash in zip(at[::2], at[1::2]):
                self.line(dash, colour, width)

    def label(self, point, string, colour=BLACK, anchor="mm", font=FONT):
        self.labels.append(((point[1] + self.margin, point[0] + self.margin), string, colour, font, anchor))

    def drawn(self):
        picture = Image.alpha_composite(self.picture.convert("RGBA"), self.layer.reduce(3)).convert("RGB")
        for label in self.labels:
            ImageDraw.Draw(picture).text(*label)
        return picture


def fitted(image):
    """A whole image, its longer side PANEL pixels, and the scale of this."""
    scale = PANEL / max(image.size)
    return image.resize([round(scale * side) for side in image.size], Image.BICUBIC), scale


def joined(a, b, ends, colours):
    """Two panels, the second below the first, and a line from each point of the first to one of the second.

    ends (n, 2, 2): (y, x) in a and in b, in units of their sides.
    """
    both, lines = Marks(below(a, b, gap=2 * GAP), margin=5), PANEL * ends
    lines[:, 1, 0] += PANEL + 2 * GAP
    for line, colour in zip(lines.tolist(), colours):
        both.line(line, colour)
    for line, colour in zip(lines.tolist(), colours):
        for point in line:
            both.dot(point, colour)
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


def recoloured(view, colour, generator):
    """A view (3, H0, W0) uint8 as a Photometric changes it, the same as uint8 for the eye."""
    x = colour(view[None], generator)
    low, high = (common.normalize(torch.full((1, 3, 1, 1), value)) for value in (0.0, 1.0))
    return x, ((x - low) / (high - low) * 255).round().clamp(0, 255).byte()[0]


def local_maps(backbone, x, local=None):
    """A backbone's input (B, 3, H0, W0) -> local features (B, N, D), those of a projector if there is one, on the CPU."""
    maps = backbone(x.to(next(backbone.parameters()).device))[0]
    return (local(maps.flatten(0, 1)).unflatten(0, maps.shape[:2]) if local else maps).cpu()  # (B, N, D)


def load_projector(args, name="projector"):
    projector = evaluate.load_projector(args.checkpoint, name)
    return projector and projector.to(args.device)


def cell_centres(indices, grid):
    """Numbers of locations (n,), row by row -> their centres (n, 2) as (y, x) in units of the view's sides."""
    return (torch.stack([indices // grid, indices % grid], 1) + 0.5) / grid


# --- matches -------------------------------------------------------------------------------------------------------


def matches(args, data, backbone):
    """VICRegL, Figs. 4-5: the best matches from a view to another, by feature and by place, coloured by rank.

    Features are those that its loss matches, the local projector's, or the backbone's in a checkpoint that has none.
    """
    local = load_projector(args, "local_projector")
    for image, rng in chosen(args, data):
        views, boxes, flips = cut_all(image, vicregl.sample_views(rng, *image.size[::-1], vicregl.VIEWS["two"], args.size))
        map_a, map_b = local_maps(backbone, evaluate.to_input(torch.stack(views), args.device), local)[:, None]  # (1, N, D)
        grid = math.isqrt(map_a.shape[1])
        pos_a, pos_b = vicregl.positions(boxes, flips, grid).flatten(1, 2)[:, None]  # (1, N, 2) each
        by_feature, by_place = vicregl.feature_distances(map_a, map_b), vicregl.location_distances(pos_a, pos_b)
        pairs = []
        for distances in (by_feature, by_place):
            kept, found = (i[0] for i in vicregl.closest(distances, args.num_matches))
            order = distances[0, kept, found].argsort(stable=True)
            pairs.append((kept[order], found[order]))  # (n,) each, the closest pair first
        (kept, found), colours = pairs[0], hues(len(pairs[0][0]))
        agree = (by_place[0].argmin(1)[kept] == found).sum()
        source, scale = fitted(image)
        source, key = Marks(source, margin=5), Marks(Image.new("RGB", (PANEL + 10, 4 * LINE), WHITE))
        for i, (box, flip, colour) in enumerate(zip(boxes, flips, (RED, BLUE))):
            source.box((box * scale).tolist(), colour)
            key.label((LINE * i, 5), f"{('first', 'second')[i]} view{' (mirrored)' * flip}", colour, "la")
        key.label((2 * LINE, 5), "closest", anchor="la")
        key.label((2 * LINE, PANEL + 5), f"rank {len(kept)}", anchor="ra")
        step = PANEL / len(kept)
        for i, colour in enumerate(colours):
            key.line([(3.5 * LINE, 5 + i * step), (3.5 * LINE, 5 + (i + 1) * step)], colour, LINE - 3)
        views = [framed(panel(view), colour) for view, colour in zip(views, (RED, BLUE))]
        columns = [joined(*views, torch.stack([cell_centres(i, grid) for i in pair], 1), colours) for pair in pairs]
        yield beside(below(source.drawn(), key.drawn()), *columns, titles=[
            "the image", f"by feature: {agree} of {len(kept)} also by place", "by place"])


# --- correspond ----------------------------------------------------------------------------------------------------


def thinned(numbers, n=5):
    """At most n of them, evenly spread."""
    step = math.ceil(len(numbers) / n) or 1
    return numbers[(len(numbers) - 1) % step // 2::step]


def correspond(args, data, backbone):
    """LC-loss, Figs. 4-5: where points of an image lie in a transformed version, and where the features say they lie.

    Left, the cropped view of the loss; right, the image mirrored, blurred, jittered and made gray, as in Section 4.6. The
    prediction is the arg max of cosine similarity; it is right in the location that holds the true point.
    """
    crop_colours = [common.Photometric(**colour) for colour in lc_loss.COLOURS]
    flip_colours = common.Photometric(gray_p=0), common.Photometric(lc_loss.JITTER, jitter_p=1, gray_p=0.5, blur_p=1)
    for image, rng in chosen(args, data):
        whole, crop = lc_loss.sample_views(rng, image.height, image.width, args.size)
        generator, columns, titles = torch.Generator().manual_seed(rng.getrandbits(63)), [], []
        versions = ("crop", crop, crop_colours), ("mirrored", (whole[0], True, args.size), flip_colours)
        for name, version, colours in versions:
            views, boxes, flips = cut_all(image, [whole, version])
            x, views = zip(*(recoloured(view, colour, generator) for view, colour in zip(views, colours)))
            f_c, f_sc = F.normalize(local_maps(backbone, torch.cat(x)), dim=2)  # (N, D) each
            grid = math.isqrt(len(f_c))
            points, valid = lc_loss.correspondences(boxes[1:], flips[1:], torch.tensor([image.size[::-1]]), grid)
            truth = (points[0].flatten(0, 1).flip(1) + 1) / 2  # (N, 2) as (y, x) in units of the view's sides
            found = (f_c @ f_sc.T).argmax(1)  # (N, D) (D, N) -> (N, N) -> (N,)
            y, x = (truth * grid).long().clamp(0, grid - 1).unbind(1)
            right = (y * grid + x == found)[valid.flatten()]
            rows, cols = (thinned(valid[0].any(axis).nonzero().flatten()) for axis in (1, 0))
            shown = (rows[:, None] * grid + cols).flatten()  # (n,): lines from all locations would hide one another
            titles += [f"{name}: truth", f"{name}: {right.sum()} of all {len(right)} points right"]
            for target in (truth[shown], cell_centres(found[shown], grid)):
                ends = torch.stack([cell_centres(shown, grid), target], 1)
                columns.append(joined(*map(panel, views), ends, hues(len(shown))))
        yield beside(*columns, titles=titles)


# --- objects -------------------------------------------------------------------------------------------------------


def object_batch(args, data, indices, backbone):
    """The objects of images as CrIBo finds them -> views (n, 2, 3, size, size) uint8, assignment (n, 2, N, K), objects of
    both views c_1, c_2 (M, D), and the image and the cluster of each, (M, 2)."""
    views, boxes, flips = [], [], []
    for index in indices:
        image, rng = load_image(args, data, index), random.Random(f"{args.seed} {index}")
        parts = cut_all(image, cribo.sample_views(rng, image.height, image.width, args.size))
        for collected, part in zip((views, boxes, flips), parts):
            collected.append(part)
    views = torch.stack([torch.stack(pair) for pair in views])
    maps_1, maps_2 = (local_maps(backbone, evaluate.to_input(x, args.device)) for x in views.unbind(1))  # (n, N, D)
    grid = math.isqrt(maps_1.shape[1])
    if args.num_objects > 2 * grid ** 2:
        raise common.UserError(f"--num-objects {args.num_objects}: two views have {2 * grid ** 2} locations to cluster")
    tokens, positions = torch.cat([maps_1, maps_2], 1), cribo.joint_positions(torch.stack(boxes), torch.stack(flips), grid)
    assignment = cribo.joint_space_clustering(tokens, positions, args.num_objects, args.pos_weight)  # (n, 2N, K)
    c_1, c_2, valid = cribo.object_representations(maps_1, maps_2, assignment)
    return views, assignment.unflatten(1, (2, -1)), c_1, c_2, valid.nonzero()


def object_masks(assigned, size):
    """Columns of an assignment (N, k) -> (k, size, size) bool: where the view shows these objects."""
    grid = math.isqrt(len(assigned))
    masks = (assigned > 0).T.unflatten(1, (grid, grid))[None].float()  # (N, k) -> (1, k, h, w)
    return F.interpolate(masks, (size, size))[0].bool()


def lone_object(views, assignment, place, side):
    """The first view of an image, in which all but one object is faded, as a square picture. place: image and cluster."""
    image, k = place.tolist()
    view = tvf.pil_to_tensor(panel(views[image, 0], side))
    mask = object_masks(assignment[image, 0][:, k:k + 1], side)
    return tvf.to_pil_image(torch.where(mask, view, (view * 0.3 + 255 * 0.7).byte()))


def objects(args, data, backbone, batch=32):
    """CrIBo, Figs. 3-4: the clusters of both views of an image; and the nearest object in a bank for each of the first view.

    Green frames where the cycle of Eq. (4) holds, red where it does not. The way back is sought among the objects of `batch`
    images, as in training; the bank holds those of --bank other images. Without colour augmentation.
    """
    others = [i for i in spread(data, args.bank + batch) if i not in args.index]
    random.Random(args.seed).shuffle(others)  # the data may be sorted by class
    company = max(0, batch - len(args.index))
    if len(others) <= company:
        raise common.UserError(f"{args.data} has {len(data)} images: more than {batch} are needed, to fill the bank too")
    views, assignment, c_1, c_2, places = object_batch(args, data, [*args.index, *others[:company]], backbone)
    chunks = [object_batch(args, data, others[i:i + batch], backbone) for i in range(company, len(others), batch)]
    for i, chunk in enumerate(chunks):
        chunk[-1][:, 0] += i * batch
    kept_views, kept_assignment, b_1, b_2, kept_places = (torch.cat(parts) for parts in zip(*chunks))
    bank = cribo.MemoryBank(len(b_1), b_1.shape[1])
    bank.push(b_1, b_2)
    nearest, _, closed, _ = cribo.cycle_consistent_matches(c_1, c_2, bank)
    colours, side = hues(args.num_objects), (PANEL - GAP - 8) // 2
    for i in range(len(args.index)):
        mine, panels = (places[:, 0] == i).nonzero().flatten(), []
        for view, assigned in zip(views[i], assignment[i]):
            shown, in_both = panel(view), places[mine, 1]
            masks = object_masks(assigned[:, in_both], PANEL)
            painted = draw_segmentation_masks(tvf.pil_to_tensor(shown), masks, 0.7, [colours[k] for k in in_both])
            panels += [shown, panel(painted)]
        pairs = []
        for m in mine:
            tiles = lone_object(views, assignment, places[m], side), lone_object(
                kept_views, kept_assignment, kept_places[nearest[m]], side)
            pair = Marks(framed(ImageOps.expand(beside(*tiles), 4, WHITE), GREEN if closed[m] else RED))
            pair.dot((12, 12), colours[places[m, 1]], 5)
            pairs.append(pair.drawn())
        string = (f"each object of view 1, and the nearest of {len(b_1)} in the bank; framed green where the cycle holds "
                  f"({closed[mine].sum()} of {len(mine)})")
        count = f"{len(mine)} objects in both views"
        yield below(beside(*panels, titles=["view 1", count, "view 2", count]), text(string, 4 * PANEL),
                    *(beside(*pairs[j:j + 4]) for j in range(0, len(pairs), 4)))


# --- heatmap and neighbors -----------------------------------------------------------------------------------------


def square_and_query(args, image):
    """The central square of an image (3, R, R) uint8, as large as makes a patch of --scale of its area --size pixels wide,
    and the patch around --query, (top, left, height, width) in its pixels."""
    pixels = bagssl.image_side(args.size, args.scale)
    (box, _, _), = evaluate.whole_view(None, image.height, image.width, pixels)
    corner = [min(max(round(q * pixels - args.size / 2), 0), pixels - args.size) for q in args.query]
    return common.cut(image, box, False, pixels), (*corner, args.size, args.size)


def cut_patches(square, boxes):
    return torch.stack([square[:, top:top + h, left:left + w] for top, left, h, w in boxes])  # (P, 3, h, w)


def spaces(args, patches, backbone, projector):
    """Normalised embeddings of patches after and before the projector -> {"projection": (P, D'), "embedding": (P, D)}."""
    y = torch.cat([backbone(evaluate.to_input(x, args.device))[1] for x in patches.split(64)])
    both = {"projection": projector(y)} if projector else {}
    return {name: F.normalize(z, dim=1).cpu() for name, z in (both | {"embedding": y}).items()}


def queried(square, query):
    """The central square as a panel, the query patch in red dashes."""
    marks = Marks(panel(square))
    marks.box([PANEL / square.shape[1] * side for side in query], RED, dashes=5)
    return marks.drawn()


def warm(levels):
    """Gray levels as colours, from dark blue over red to yellow."""
    return ImageOps.colorize(levels, (20, 20, 110), (255, 235, 70), (215, 50, 60))


def heatmap(args, data, backbone, steps=17):
    """BagSSL, Fig. 6: cosine similarity of all patches of an image to one of them, in both spaces.

    A patch's similarity is drawn at its centre; no centre lies nearer to the border than half a patch.
    """
    projector = load_projector(args)
    for image, _ in chosen(args, data):
        square, query = square_and_query(args, image)
        boxes, gray = [query, *bagssl.patch_grid(square.shape[1], args.size, steps ** 2)], panel(square).convert("L")
        side = PANEL * args.size / square.shape[1]
        cell = (PANEL - side) / (steps - 1)  # pixels from one centre to the next
        start, extent = round((side - cell) / 2), round(steps * cell)
        found = spaces(args, cut_patches(square, boxes), backbone, projector)
        columns = [queried(square, query)]
        for z in found.values():
            similarity = (z[1:] @ z[0]).view(steps, steps)  # (P, D) (D,) -> (P,)
            low, high = similarity.aminmax()
            levels = Image.fromarray(((similarity - low) / (high - low).clamp(min=1e-6) * 255).byte().numpy())
            heat = gray.convert("RGB")
            heat.paste(warm(levels.resize((extent, extent), Image.BICUBIC)), (start, start))
            key = Marks(warm(Image.linear_gradient("L").rotate(90).resize((PANEL, LINE))))
            key.label((LINE / 2, 4), f"{low:.2f}", WHITE, "lm")
            key.label((LINE / 2, PANEL - 4), f"{high:.2f}", BLACK, "rm")
            columns.append(below(Image.blend(gray.convert("RGB"), heat, 0.8), key.drawn(), gap=4))
        yield beside(*columns, titles=[f"query: {args.scale:g} of the area", *(f"{name}: cosine" for name in found)])


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
    for index, (image, _) in zip(args.index, chosen(args, data)):
        square, query = square_and_query(args, image)
        patch, columns = cut_patches(square, [query]), [queried(square, query)]
        first = Marks(panel(patch[0], 46))
        first.box((0, 0, 46, 46), RED, 3, dashes=4)
        for name, z in spaces(args, patch, backbone, projector).items():
            similarity = torch.cat([y[name] for y in bank]) @ z[0]  # (P, D) (D,) -> (P,)
            shown = [first.drawn()]
            for i in similarity.topk(min(nrow * rows - 1, len(owners))).indices.tolist():
                label, own = data.label(owners[i]), data.label(index)
                known = owners[i] != index and min(label, own) >= 0
                shown.append(framed(tiles[i], GREEN if label == own else RED) if known else tiles[i])
            grid = make_grid([tvf.pil_to_tensor(tile) for tile in shown], nrow, padding=2, pad_value=255)
            columns.append(tvf.to_pil_image(grid))
        titles = [f"{name}: the nearest of {len(owners)} patches" for name in bank[0]]
        yield beside(*columns, titles=[f"query: {args.scale:g} of the area", *titles])


# --- views ---------------------------------------------------------------------------------------------------------


def augmentation(args):
    """A method's own sample(rng, height, width), and the colours of its views, in turn."""
    kinds = {"vicreg": vicreg.VIEWS, "vicregl": vicregl.VIEWS}.get(args.method)
    if kinds and args.views and args.views not in kinds:
        raise common.UserError(f"--views {args.views}: {args.method} has {', '.join(kinds)}")
    if args.method == "vicreg":
        area, *colours = vicreg.VIEWS[args.views or "paper"]
        return functools.partial(vicreg.sample_views, area=area, size=args.size), colours
    if args.method == "vicregl":
        colours = [dict(jitter=vicregl.JITTER, blur_p=0.5, solarize_p=0.1)]
        return functools.partial(vicregl.sample_views, kinds=vicregl.VIEWS[args.views or "two"], size=args.size), colours
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
    positions = cribo.positions if args.method == "cribo" else vicregl.positions  # the others have no use for them
    return positions(box[None], flip[None], args.grid)[0].flatten(0, 1), centres, number


def views(args, data):
    """What the augmentation of a method makes of an image: each view beside the image and its crop, with numbered points.

    The same number lies on the same thing in both, or the method's positions are wrong.
    """
    sample, colours = augmentation(args)
    colours, hue = [common.Photometric(**colour) for colour in colours], hues(args.grid ** 2)
    for image, rng in chosen(args, data):
        views, boxes, flips = cut_all(image, sample(rng, image.height, image.width))
        generator, pictures, titles = torch.Generator().manual_seed(rng.getrandbits(63)), [], []
        for i, (view, box, flip) in enumerate(zip(views, boxes, flips)):
            view = recoloured(view, colours[i % len(colours)], generator)[1]
            at_source, at_view, numbers = places(args, box, flip, torch.tensor(image.size[::-1]))
            source, scale = fitted(image)
            both = Marks(source, margin=9), Marks(panel(view), margin=9)
            both[0].box((box * scale).tolist(), RED)
            for marks, points in zip(both, (at_source * scale, at_view * PANEL)):
                for point, n in zip(points.tolist(), numbers.tolist()):
                    marks.dot(point, hue[n], 8)
                    marks.label(point, f"{n + 1}", WHITE if np.dot(hue[n], (0.3, 0.6, 0.1)) < 130 else BLACK, font=SMALL)
                pictures.append(marks.drawn())
            titles += [f"{args.method}: crop {i + 1}", f"view {i + 1}: {view.shape[1]} pixels{', mirrored' * flip}"]
        yield from (beside(*pictures[i:i + 4], titles=titles[i:i + 4]) for i in range(0, len(pictures), 4))


# --- curves --------------------------------------------------------------------------------------------------------

PLOT = 320, 190  # width and height
SCHEDULES = {"step", "epoch", "lr", "momentum", "decay", "temperature", "broken", "eta_s", "data_wait", "memory_gb"}


def read_log(path):
    """The lines of a run's log.jsonl; the last one may still be in the writing."""
    file = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path)
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise common.UserError(f"{file} is no log.jsonl of a run ({error})") from error
    if not lines:
        raise common.UserError(f"{file} is still empty: its first line comes after --log-every steps")
    return lines


def ticks(low, high, log):
    """Three or more round numbers from low to high; on a logarithmic axis powers of ten, with 2 and 5 where they are few."""
    unit, tries = 10.0 ** math.floor(math.log10(high - low)), []
    if log:
        powers = [10.0 ** e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)))]
        tries = [[p * s for p in powers for s in steps if low <= p * s <= high] for steps in ((1,), (1, 2, 5))]
    for step in (2 * unit, unit, unit / 2, unit / 5):
        tries.append([i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)])
    values = next(values for values in tries if len(values) > 2)
    return values[::math.ceil(len(values) / 8)]


def limits(values, log):
    """The range of an axis: that of the values and a little more."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return (low / 1.1, high * 1.1) if log else (low - margin, high + margin)


def plot(curves, epochs, log):
    """Curves [([(epoch, value), ...], colour), ...] over epochs from 0."""
    scale, (low, high) = math.log10 if log else float, limits([value for points, _ in curves for _, value in points], log)
    labels = [(value, f"{value:.6g}") for value in ticks(low, high, log)]
    left, right = 8 + max(FONT.getlength(label) for _, label in labels), PLOT[0] - 8
    top, bottom = 4, PLOT[1] - 2 * LINE - 4
    picture = Marks(Image.new("RGB", PLOT, WHITE))

    def at(epoch, value):
        return (bottom - (scale(value) - scale(low)) / (scale(high) - scale(low)) * (bottom - top),
                left + epoch / epochs * (right - left))

    for value, label in labels:
        y, _ = at(0, value)
        picture.line([(y, left), (y, right)], (225, 225, 225), 1)
        picture.label((y, left - 5), label, anchor="rm")
    for epoch in ticks(0, epochs, False):
        _, x = at(epoch, high)
        picture.line([(bottom, x), (bottom + 4, x)], (150, 150, 150), 1)
        picture.label((bottom + LINE / 2 + 4, x), f"{epoch:.6g}")
    picture.label((PLOT[1] - LINE / 2, (left + right) / 2), "epoch")
    picture.line([(top, left), (bottom, left), (bottom, right)], (150, 150, 150), 1)
    for points, colour in curves:
        points = [at(*point) for point in points]
        picture.line(points, colour)
        for point in (points[0], points[-1]):  # to be seen even where there is but one
            picture.dot(point, colour, 1.5, colour)
    return picture.drawn()


def curves(args):
    """All metrics of one or several log.jsonl over epochs, a panel each, and a legend."""
    logs, colours = [read_log(path) for path in args.logs], hues(len(args.logs), 40)
    epochs, panels, titles = max(lines[-1]["epoch"] for lines in logs), [], []
    keys = sorted((list(lines[-1]) for lines in logs), key=len, reverse=True)
    for metric in dict.fromkeys(key for key in itertools.chain(*keys) if key not in SCHEDULES):
        runs = [[(line["epoch"], line[metric]) for line in lines if metric in line and (not args.log or line[metric] > 0)]
                for lines in logs]
        runs = [(points, colour) for points, colour in zip(runs, colours) if points]
        if runs:
            panels.append(plot(runs, epochs, args.log))
            titles.append(metric.replace("_per_", "/"))
    yield from (beside(*panels[i:i + 3], titles=titles[i:i + 3]) for i in range(0, len(panels), 3))
    for path, colour in zip(args.logs, colours):
        line = Marks(Image.new("RGB", (30, LINE), WHITE))
        line.line([(LINE / 2, 0), (LINE / 2, 30)], colour)
        yield beside(line.drawn(), text(path, 2 * PLOT[0]))


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
        added.add_argument("--out", type=Path, default=f"{run.__name__}.png", help="the picture, a PNG file")
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


def draw(args):
    """Yields the pictures of a command."""
    if args.run is curves:
        return curves(args)
    args.device, models = training.set_up(args.seed), []
    if args.run is views:
        args.data = args.data or "shapes"
        args.size = args.size or (64 if args.data == "shapes" else 224)
    else:
        models = [evaluate.load(args)[0].to(args.device)]
    data = common.open_data(args.data, "val", args.size) or common.open_data(args.data, "train", args.size)
    return args.run(args, data, *models)


@torch.no_grad()
def main():
    with training.one_line_errors():
        args = parse_args()
        if args.out.suffix != ".png":
            raise common.UserError(f"--out {args.out} must end in .png")
        for name, low, high in (("scale", 0.001, 0.99), ("num_matches", 1, math.inf), ("num_objects", 1, math.inf),
                                ("bank", 1, math.inf), ("grid", 0, 10)):
            if not low <= vars(args).get(name, low) <= high:
                raise common.UserError(f"--{name.replace('_', '-')} {vars(args)[name]}: it must lie in {low:g} to {high:g}")
        picture = ImageOps.expand(below(*draw(args)), GAP, WHITE)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        training.write(args.out, lambda file: picture.save(file, "PNG", optimize=True))
        print(f"{args.out}: {picture.width} x {picture.height} pixels")


if __name__ == "__main__":
    main()
