"""The papers' figures, drawn with matplotlib from any checkpoint and any images, as PNG files.

    python visualize.py matches --checkpoint runs/vicregl-shapes                 # VICRegL, Fig. 4
    python visualize.py correspond --checkpoint runs/lc_loss-shapes --index 5    # LC-loss, Fig. 4
    python visualize.py objects --checkpoint runs/cribo-shapes --bank-images 500 # CrIBo, Fig. 3
    python visualize.py heatmap --checkpoint runs/bagssl-shapes --query 0.3 0.6  # BagSSL, Fig. 6
    python visualize.py neighbors --checkpoint runs/bagssl-shapes --scale 0.2    # BagSSL, Fig. 7
    python visualize.py views --method vicregl --views multicrop       # crops, colours, positions
    python visualize.py detections --checkpoint runs/lc_loss-shapes    # after `evaluate detect`
    python visualize.py curves runs/vicreg-shapes runs/vicregl-shapes  # what runs have logged

--checkpoint is as for `python -m evaluate`; images are those of the validation part of --data.
Positions come from the methods' own functions: a flip that is wrong in a loss is wrong in its
picture. Points are (y, x), as there; only matplotlib is given (x, y). What is right is blue and
solid, what is wrong orange and dashed, for colour-blind readers too.
"""
import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate
from torchvision.utils import draw_segmentation_masks, make_grid

import bagssl
import cribo
import lc_loss
import training
import vicregl
import weights
from common import Photometric, UserError, Views, grid_of, normalize
from evaluate import detect
from evaluate.__main__ import Parser, check
from evaluate.bag import load_projector
from evaluate.correspond import transformed
from evaluate.features import add_flags, load, open_part, progress, to_input

try:
    from matplotlib.figure import Figure
    from matplotlib.patches import ConnectionPatch, Rectangle
    from matplotlib.patheffects import withStroke
except ModuleNotFoundError:
    print("error: visualize.py draws with matplotlib: pip install matplotlib", file=sys.stderr)
    sys.exit(2)

# --- 1. Drawing -----------------------------------------------------------------------------------

DPI = 150
SIDE = 3.3  # inches for a view and what is around it: 450 pixels or more for the view itself
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7",  # of Okabe and Ito
           "#56B4E9", "#D55E00", "#F0E442", "#000000"]
RIGHT = dict(color="#0072B2", linestyle="solid")
WRONG = dict(color="#D55E00", linestyle="dashed")
LINE = dict(linewidth=2, path_effects=[withStroke(linewidth=3.5, foreground="white")])
CIRCLE = dict(boxstyle="circle,pad=0.15", facecolor="white")
SIGN = dict(boxstyle="round,pad=0.1", facecolor="white", alpha=0.7, edgecolor="none")


def panels(rows, columns, height=1.1, width=1.0):
    """A figure, and a grid of panels in it, of this height and width in views."""
    size = (columns * width * SIDE, rows * height * SIDE)
    figure = Figure(size, DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
        ax.set_anchor("N")
    return figure, axes


def show(ax, picture, title="", width=1, height=1):
    """A PIL image or a view (3, H0, W0), its corners at (0, 0) and (height, width) of the axes."""
    if isinstance(picture, torch.Tensor):
        picture = picture.permute(1, 2, 0).numpy()
    ax.imshow(picture, extent=(0, width, height, 0), interpolation="bicubic")
    ax.autoscale(False)
    ax.set_title(title)


def outline(ax, box, style, label=None):
    """A box (top, left, height, width)."""
    top, left, height, width = [float(side) for side in box]
    ax.add_patch(Rectangle((left, top), width, height, fill=False, clip_on=False, label=label,
                           **LINE, **style))


def mark(ax, point, text, box=CIRCLE):
    """A number in a circle, or a text, at a point of the axes, above all else in the figure."""
    y, x = point.tolist()
    ax.figure.text(x, y, text, transform=ax.transData, bbox=box, fontsize=7, ha="center",
                   va="center_baseline")


def connect(axes, views, title, starts, ends, styles):
    """Two views, one above the other, and numbered lines from points of the first to points of the
    second, (n, 2) each, in units of their sides."""
    above, below = axes
    show(above, views[0], title)
    show(below, views[1])
    triples = zip(starts, ends, styles)
    for number, (start, end, style) in enumerate(triples, 1):
        a = start.flip(0).tolist()
        b = end.flip(0).tolist()
        line = ConnectionPatch(a, b, "data", axesA=above, axesB=below, **LINE, **style)
        above.figure.add_artist(line)
        mark(above, start, number)
        mark(below, end, number)


# --- 2. Images and features -----------------------------------------------------------------------

def sampled(args, data, index, sample):
    """Image `index`, and its V views as training samples them, in a common.Batch."""
    batch = Views(data, sample, args.seed)[0, index]
    if batch.broken:
        raise UserError(f"cannot read {data.name(index)}: mend or remove it")
    return data.load(index), batch


def image_and_others(args, data, count):
    """--index, and the numbers of `count` other images, or of all, at random."""
    order = torch.randperm(len(data)).tolist()
    order.remove(args.index)
    return [args.index, *order[:count]]


def visible(x):
    """Normalized images (B, 3, H0, W0) -> the same from 0 to 1."""
    black = normalize(torch.zeros(1, 3, 1, 1))
    white = normalize(torch.ones(1, 3, 1, 1))
    return ((x - black) / (white - black)).clamp(0, 1)


def encoded(args, backbone, x):
    """Normalized views (B, 3, H0, W0) -> local features (B, N, D), representations (B, D)."""
    parts = x.split(64)
    parts = progress(parts, len(parts), f"features of {len(x)} views")
    chunks = [backbone(part.to(args.device)) for part in parts]
    maps, pooled = zip(*chunks)
    return torch.cat(maps).cpu(), torch.cat(pooled).cpu()


def centres(grid):
    """Centres (N, 2) of a view's N = grid^2 locations, row by row, in units of its sides."""
    line = (torch.arange(grid) + 0.5) / grid
    return torch.cartesian_prod(line, line)


def paired_points(method, batch, grid):
    """The points that a method pairs, (V, n, 2) in pixels of the image and (V, n, 2) from 0 to 1 in
    the views, and which are inside, (V, n): of a grid over the view, in LC-loss over the image."""
    count = len(batch.boxes)
    at = centres(grid).expand(count, -1, -1)
    if method is not lc_loss:
        pos = method.positions(batch.boxes, batch.flips, grid).flatten(1, 2)
        inside = torch.ones(count, grid**2, dtype=torch.bool)
        return pos, at, inside
    sizes = batch.sizes.expand(count, -1)
    points, valid = lc_loss.correspondences(batch.boxes, batch.flips, sizes, grid)
    points = points.flatten(1, 2).flip(2)  # (V, n, 2): (y, x) from -1 to 1
    in_view = (points + 1) / 2
    return at * batch.sizes, in_view, valid.flatten(1)


# --- 3. The commands ------------------------------------------------------------------------------

def matches(args, data, backbone):
    """VICRegL, Figs. 4-5: the best matches from a view to another, by feature (of the local
    projector, if there is one) and by place. Number 1 is the closest."""
    sample = partial(vicregl.sample_views, kinds=vicregl.VIEWS["two"], size=args.size)
    image, batch = sampled(args, data, args.index, sample)
    x = to_input(torch.stack(batch.views), "cpu")
    maps, _ = encoded(args, backbone, x)  # (2, N, D)
    projector = load_projector(args.checkpoint, "local_projector")
    if projector:
        projected = projector(maps.flatten(0, 1))  # (2N, D')
        maps = projected.unflatten(0, maps.shape[:2])
    pos = vicregl.map_positions(batch.boxes[None], batch.flips[None], maps.split(1))
    by_feature = vicregl.feature_distances(*maps)  # (N, N)
    by_place = vicregl.location_distances(*pos)[0]

    figure, axes = panels(2, 3)
    show(axes[0, 0], image, "image", *image.size)
    for i, style in enumerate((WRONG, RIGHT)):
        mirrored = ", mirrored" if batch.flips[i] else ""
        outline(axes[0, 0], batch.boxes[i], style, f"view {i + 1}{mirrored}")
    axes[0, 0].legend(loc="upper center", bbox_to_anchor=(0.5, 0))

    at = centres(grid_of(args.size, backbone.stride))
    styles = [dict(color=colour) for colour in args.num_matches * COLOURS]
    pairs = ((1, "by feature", by_feature), (2, "by place", by_place))
    for column, title, distances in pairs:
        kept, found = vicregl.closest(distances, args.num_matches)  # (n,) each
        order = distances[kept, found].argsort(stable=True)
        starts = at[kept[order]]
        ends = at[found[order]]
        connect(axes[:, column], batch.views, title, starts, ends, styles)
    return figure


def correspond(args, data, backbone, lines=15):
    """LC-loss, Figs. 4-5: where points of an image lie in a view of it, and where its features find
    them, by cosine: in the loss's crop, and in the mirrored, recoloured view of Section 4.6."""
    sample = partial(lc_loss.sample_views, size=args.size)
    _, batch = sampled(args, data, args.index, sample)
    whole, crop = [view[None] for view in batch.views]
    augment_c, augment_sc = [Photometric(**colours, size=args.size) for colours in lc_loss.COLOURS]
    cropped = torch.cat([augment_c(whole), augment_sc(crop)])
    mirrored = torch.cat([to_input(whole, "cpu"), transformed(whole)])

    # What the second view of a pair shows: the crop; all of the image, mirrored.
    boxes = batch.boxes.flip(0)
    flips = torch.tensor([batch.flips[1], True])
    seconds = batch._replace(boxes=boxes, flips=flips)
    grid = grid_of(args.size, backbone.stride)
    _, truths, valid = paired_points(lc_loss, seconds, grid)

    figure, axes = panels(2, 4)
    at = centres(grid)  # (N, 2)
    pairs = (("crop", cropped), ("mirrored", mirrored))
    for i, (name, x) in enumerate(pairs):
        maps, _ = encoded(args, backbone, x)
        f_c, f_sc = F.normalize(maps, dim=2)  # (N, D) each
        similarity = f_c @ f_sc.T  # (N, D) (D, N) -> (N, N)
        found = at[similarity.argmax(1)]  # (N, 2)
        offset = (found - truths[i]).abs()
        right = (offset <= 0.5 / grid).all(1)  # (N,)
        inside = valid[i].nonzero().flatten()  # (n,)
        shown = inside[torch.randperm(len(inside))[:lines]]
        pictures = visible(x)
        starts = at[shown]

        title = f"{name}: truth"
        styles = lines * [RIGHT]
        connect(axes[:, 2 * i], pictures, title, starts, truths[i, shown], styles)
        title = f"{name}: {right[inside].sum()} of {len(inside)} right"
        styles = [RIGHT if ok else WRONG for ok in right[shown]]
        connect(axes[:, 2 * i + 1], pictures, title, starts, found[shown], styles)
    return figure


def objects(args, data, backbone, batch_size=32):
    """CrIBo, Figs. 3-4: the objects in both views of an image, each with the nearest in a bank.
    Blue frames: the cycle of Eq. (4) holds in a batch of images; orange, dashed: it does not."""
    grid = grid_of(args.size, backbone.stride)
    cribo.check_sizes(args, grid, len(data))
    indices = image_and_others(args, data, args.bank_images + batch_size - 1)
    sample = partial(cribo.sample_views, size=args.size)
    read = progress(indices, len(indices), "reading images")
    batches = [sampled(args, data, index, sample)[1] for index in read]
    batch = default_collate(batches)
    z_1, _ = encoded(args, backbone, to_input(batch.views[0], "cpu"))  # (n, N, D)
    z_2, _ = encoded(args, backbone, to_input(batch.views[1], "cpu"))
    pos = cribo.joint_positions(batch.boxes, batch.flips, grid)
    tokens = torch.cat([z_1, z_2], 1)  # (n, 2N, D)
    assignment = cribo.joint_space_clustering(tokens, pos, args.num_objects, pos_weight=1.0)
    c_1, c_2, valid = cribo.object_representations(z_1, z_2, assignment)  # (M, D) twice, (n, K)
    owners, clusters = valid.nonzero().unbind(1)  # (M,) each: the image of each object, its cluster
    masks = assignment.mT[owners, clusters] > 0  # (n, 2N, K) -> (M, 2N)
    masks = masks.unflatten(1, (2, grid, grid)).byte()  # (M, 2, h, w)
    masks = F.interpolate(masks, args.size).bool()  # (M, 2, size, size)

    m = (owners < len(indices) - args.bank_images).sum()  # objects of the batch, then the bank's
    bank = cribo.MemoryBank(len(c_1) - m, c_1.shape[1])
    bank.push(c_1[m:], c_2[m:])
    nearest, _, closed, _ = cribo.cycle_consistent_matches(c_1[:m], c_2[:m], bank)

    own = (owners == 0).sum().item()
    figure, axes = panels(own // 2 + 1, 4)
    pairs = axes.reshape(-1, 2)
    colours = args.num_objects * COLOURS
    for v, ax in enumerate(pairs[0]):
        view = batch.views[v][0]
        painted = draw_segmentation_masks(view, masks[:own, v], 0.5, colours)
        show(ax, painted, f"view {v + 1}")
        for o in range(own):
            inside = masks[o, v].nonzero() / args.size  # (n, 2)
            middle = (inside - inside.mean(0)).norm(dim=1).argmin()
            mark(ax, inside[middle], o + 1)
    for o in range(own):
        style = RIGHT if closed[o] else WRONG
        shown = {f"object {o + 1}": o, "its nearest": m + nearest[o]}
        for ax, (title, i) in zip(pairs[1 + o], shown.items()):
            view = batch.views[0][owners[i]]
            faded = 192 + view // 4
            show(ax, torch.where(masks[i, 0], view, faded), title)
            outline(ax, (0, 0, 1, 1), style)
    return figure


def embedded(args, data, backbone, index, count):
    """Image `index`, a common.Batch of `count` patches on a grid, and their normalized embeddings
    before and after the projector, if any: {name: (P, D)}."""
    sample = partial(bagssl.patch_grid, scale=args.scale, count=count, size=args.size)
    image, batch = sampled(args, data, index, sample)
    x = to_input(torch.stack(batch.views), "cpu")
    _, y = encoded(args, backbone, x)
    spaces = {"embedding": F.normalize(y, dim=1)}
    if args.projector:
        spaces["projection"] = F.normalize(args.projector(y), dim=1)
    return image, batch, spaces


def show_query(args, ax, image, boxes, point):
    """The image and the patch nearest to `point` -> its number, the middles (P, 2) of all."""
    middles = boxes[:, :2] + boxes[:, 2:] / 2
    sides = torch.tensor([image.height, image.width])
    query = (middles - point * sides).norm(dim=1).argmin()
    show(ax, image, f"query: {args.scale:g} of the area", *image.size)
    outline(ax, boxes[query], WRONG)
    return query, middles


def heatmap(args, data, backbone, steps=17):
    """BagSSL, Fig. 6: cosine similarity of an image's patches to one of them, before and after the
    projector, drawn in their middles; a row for each --query."""
    image, batch, spaces = embedded(args, data, backbone, args.index, steps**2)
    height = 0.3 + image.height / image.width  # of an image and a colour bar
    figure, axes = panels(len(args.query), 1 + len(spaces), height)
    grey = image.convert("L").convert("RGB")
    for point, row in zip(args.query, axes):
        query, middles = show_query(args, row[0], image, batch.boxes, point)
        y, x = middles.T.numpy()
        for ax, (name, z) in zip(row[1:], spaces.items()):
            similarity = z @ z[query]  # (P, D) (D,) -> (P,)
            heat = similarity.view(steps, steps).numpy()
            show(ax, grey, f"{name}: cosine similarity", *image.size)
            mesh = ax.pcolormesh(x[:steps], y[::steps], heat, alpha=0.7)
            figure.colorbar(mesh, ax=ax, location="bottom", panchor=False)
    return figure


def neighbors(args, data, backbone):
    """BagSSL, Figs. 7-8: the patches nearest to one of them by cosine, before and after the
    projector, among 16 patches of each bank image. The first is the patch itself."""
    indices = image_and_others(args, data, args.bank_images)
    read = progress(indices, len(indices), "features of images")
    bank = [embedded(args, data, backbone, index, 16) for index in read]
    patches = [view for _, batch, _ in bank for view in batch.views]
    image, batch, spaces = bank[0]
    columns = math.ceil(1.25 * args.count**0.5)
    rows = math.ceil(args.count / columns)
    figure, axes = panels(len(args.query), 1 + len(spaces), width=1.6)
    for point, row in zip(args.query, axes):
        query, _ = show_query(args, row[0], image, batch.boxes, point)
        for ax, name in zip(row[1:], spaces):
            z = torch.cat([found[name] for _, _, found in bank])
            similarity = z @ z[query]  # (P, D) (D,) -> (P,)
            nearest = similarity.argsort(descending=True)[: args.count].tolist()
            tiles = [patches[i] for i in nearest]
            tiles = make_grid(tiles, columns, pad_value=255)
            show(ax, tiles, f"{name}: the nearest of {len(patches)}", columns, rows)
    return figure


def views(args, data, _):
    """A method's augmentation: each view beside the image and its crop. The same number lies on the
    same thing in both, or the method's positions are wrong."""
    method = METHODS[args.method]
    sample = partial(method.sample_views, size=args.size)
    if method is vicregl:
        sample = partial(sample, kinds=vicregl.VIEWS[args.views])
    image, batch = sampled(args, data, args.index, sample)
    sources, targets, valid = paired_points(method, batch, grid=4)
    figure, axes = panels(len(batch.views) // 2, 4)
    for i, (source, target) in enumerate(axes.reshape(-1, 2)):
        colours = method.COLOURS[i % len(method.COLOURS)]
        augment = Photometric(**colours, size=args.size)
        x = augment(batch.views[i][None])
        mirrored = ", mirrored" if batch.flips[i] else ""
        show(source, image, f"{args.method}: crop {i + 1}", *image.size)
        show(target, visible(x)[0], f"view {i + 1}: {x.shape[2]} pixels{mirrored}")
        outline(source, batch.boxes[i], RIGHT)
        for n in valid[i].nonzero().flatten().tolist():
            mark(source, sources[i, n], n + 1)
            mark(target, targets[i, n], n + 1)
    return figure


def show_objects(ax, title, image, objects, classes, right):
    """An image (3, H0, W0) and n objects, as a detector returns them or is told them: boxes, masks
    if any, classes, scores if any. right (n,): above 0 where they are drawn as right."""
    styles = [RIGHT if ok > 0 else WRONG for ok in right]
    height, width = image.shape[1:]
    if "masks" in objects:
        masks = objects["masks"].view(-1, height, width) >= 0.5
        for mask, style in zip(masks, styles):  # all at once, it paints overlaps black
            image = draw_segmentation_masks(image, mask, 0.4, style["color"])
    show(ax, image, title, width, height)
    for i, style in enumerate(styles):
        x0, y0, x1, y1 = objects["boxes"][i]
        outline(ax, (y0, x0, y1 - y0, x1 - x0), style)
        text = str(classes[objects["labels"][i] - 1])
        if "scores" in objects:
            text += f" {objects['scores'][i]:.0%}"
        top = torch.stack([y0, (x0 + x1) / 2])
        mark(ax, top, text, SIGN)


def detections(args, data, backbone, least=0.3):
    """The objects in four images, and below them what the detector of `evaluate detect` finds with
    a score of `least` or more: in blue what AP50 counts as right, else in orange, dashed."""
    detector = detect.build(backbone, data, args)
    detector.load_state_dict(weights.read_checkpoint(args.checkpoint)["detector"])
    detector.to(args.device).eval()
    figure, axes = panels(2, 4)
    indices = image_and_others(args, data, 3)
    for index, (above, below) in zip(indices, axes.T):
        image, truth = data[index]
        (found,) = detector([image.to(args.device) / 255])
        kept = found["scores"] >= least
        found = {name: x[kept].cpu() for name, x in found.items()}
        verdicts = detect.judge("boxes", found, truth)[2]  # (n, A, T)
        show_objects(above, f"image {index}", image, truth, data.classes, truth["labels"])
        show_objects(below, "found", image, found, data.classes, verdicts[:, 0, 0])  # as in AP50
    return figure


NO_METRICS = {"step", "epoch", "lr", "momentum", "decay", "temperature", "broken", "wait",
              "minutes_left", "memory_gb"}


def read_log(path):
    """The lines of a run's log.jsonl; the last one may not be complete yet."""
    try:
        lines = (path / "log.jsonl").read_text().splitlines(keepends=True)
        lines = [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError):
        lines = []
    if not lines:
        raise UserError(f"{path} has no log.jsonl of a run, or an empty one")
    return lines


def smoothed(values):
    """The mean of each value and its neighbours, a twentieth of all; the ends are repeated."""
    reach = len(values) // 40
    window = np.ones(2 * reach + 1)
    padded = np.pad(values, reach, "edge")
    return np.convolve(padded, window / len(window), "valid")


def curves(args, columns=3):
    """What one or several runs have logged, over epochs: pale as it is, and smoothed."""
    if not args.runs:
        raise UserError("curves needs the folders of runs")
    logs = [read_log(path) for path in args.runs]
    names = dict.fromkeys(name for log in logs for name in log[-1])
    names = [name for name in names if name not in NO_METRICS]
    rows = math.ceil(len(names) / columns)
    figure, axes = panels(rows, columns, width=1.3)
    for ax, name in zip(axes.flat, names):
        ax.set_axis_on()
        ax.set(title=name, xlabel="epoch")
        ax.grid(alpha=0.3)
        for path, log, colour in zip(args.runs, logs, len(logs) * COLOURS):
            lines = [line for line in log if name in line]
            epochs = [line["epoch"] for line in lines]
            values = [line[name] for line in lines]
            if values:
                ax.plot(epochs, values, ".-", color=colour, alpha=0.4, markersize=5)
                ax.plot(epochs, smoothed(values), color=colour, label=path.name)
    lines_and_names = axes[0, 0].get_legend_handles_labels()
    figure.legend(*lines_and_names, loc="outside lower center", ncols=columns)
    return figure


# --- 4. Command line ------------------------------------------------------------------------------

METHODS = dict(vicregl=vicregl, lc_loss=lc_loss, cribo=cribo)
COMMANDS = dict(matches=matches, correspond=correspond, objects=objects, heatmap=heatmap,
                neighbors=neighbors, views=views, detections=detections, curves=curves)
LOWEST = dict(index=0, seed=0, query=0, scale=0.001)  # of all other numbers: 1
HIGHEST = dict(size=4096, query=1, scale=1)


def parse_args():
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form)
    flag = parser.add_argument
    flag("command", choices=COMMANDS)
    flag("runs", nargs="*", type=Path, help="curves: folders of runs")
    add_flags(flag)
    flag("--index", type=int, default=0, help="which image of the validation part")
    flag("--seed", type=int, default=0, help="of crops and colours")
    flag("--num-matches", type=int, default=10, help="matches: how many are drawn")
    flag("--num-objects", type=int, default=8, help="objects: K, clusters of an image")
    flag("--bank-images", type=int, default=128, help="objects, neighbors: S, images searched in")
    flag("--query", type=float, nargs=2, action="extend",
         help="heatmap, neighbors: the middle of the patch, y and x from 0 to 1; may be repeated")
    flag("--count", type=int, default=40, help="neighbors: how many; the paper shows 120 and 256")
    flag("--scale", type=float, default=0.1, help="heatmap, neighbors: a patch's share of the area")
    flag("--method", default="vicregl", choices=METHODS, help="views: whose augmentation")
    flag("--views", default="two", choices=vicregl.VIEWS, help="views: VICRegL's --views")
    flag("--out", type=Path, default="figure.png", help="the picture, a PNG file")
    args = parser.parse_args()

    check(args, LOWEST, HIGHEST)
    query = args.query or [0.5, 0.5]
    args.query = torch.tensor(query).view(-1, 2)
    if args.out.suffix != ".png":
        raise UserError(f"--out {args.out} must end in .png")
    return args


def draw(args):
    """The figure of a command."""
    if args.command == "curves":
        return curves(args)
    if args.command == "views" and args.checkpoint is None:  # it shows no features
        args.checkpoint = "random"
        args.arch = "tiny_convnet"
    if args.command == "detections" and args.checkpoint:
        args.checkpoint = detect.kept_detector(args.checkpoint)  # it tells its --data and --size
        if not args.checkpoint.is_file():
            raise UserError(f"no {args.checkpoint}: `python -m evaluate detect` leaves it there")
    args.bf16 = False
    backbone = load(args)
    args.device = training.set_up(args.seed)
    backbone.to(args.device).eval()
    args.projector = load_projector(args.checkpoint)
    if args.command == "detections":
        _, data = detect.prepare(args)
    else:
        data = open_part(args)
    if not 0 <= args.index < len(data):
        raise UserError(f"--index {args.index}: {args.data} has {len(data)} images, from 0 on")
    return COMMANDS[args.command](args, data, backbone)


@torch.no_grad()
def main():
    with training.orderly_exit():
        args = parse_args()
        figure = draw(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        training.write(args.out, lambda file: figure.savefig(file, format="png"))
        print(args.out)


if __name__ == "__main__":
    main()
