"""visualize.py: the size of each picture, and that what is drawn on a place lies there, read from the pixels."""
import json
import random
import re
import sys

import numpy as np
import pytest
import torch
from helpers import make_images, user_error
from PIL import Image

import bagssl
import common
import cribo
import lc_loss
import vicreg
import vicregl
import visualize
from visualize import GAP, GREEN, PANEL, RED


@pytest.fixture
def draw(tmp_path, monkeypatch, capsys):
    """draw("matches RUN ...") -> the picture (H, W, 3) as main() wrote it; its size must be the one that was printed."""
    monkeypatch.chdir(tmp_path)

    def run(command):
        monkeypatch.setattr(sys, "argv", f"visualize.py {command} --out out/figure.png".split())
        visualize.main()
        picture = np.asarray(Image.open("out/figure.png"))
        printed = re.fullmatch(r"out/figure.png: (\d+) x (\d+) pixels\n", capsys.readouterr().out)
        assert [int(n) for n in printed.groups()] == [*picture.shape[1::-1]]
        return picture.astype(int)

    return run


@pytest.fixture
def checkpoint(tmp_path):
    """A run of an untrained VICRegL."""
    torch.manual_seed(0)
    model = vicregl.VICRegL(common.build_backbone("tiny_convnet"), (32, 32), (16, 16))
    (tmp_path / "run").mkdir()
    args = dict(arch="tiny_convnet", size=64, data="shapes")
    torch.save(dict(model=model.state_dict(), args=args), tmp_path / "run/last.pt")


def gradient(folder, count=1, side=200):
    """Images whose red tells the column and whose green tells the row."""
    folder.mkdir()
    ramp = np.linspace(20, 235, side)
    pixels = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], 128), 2).round().astype(np.uint8)
    for i in range(count):
        Image.fromarray(pixels).save(folder / f"{i}.png")


def blobs(picture, colour, solid=5):
    """Centres (y, x), 0 being the border, of squares of pure colour; lines are thinner than `solid` pixels."""
    mask = (picture == colour).all(2)
    windows = np.lib.stride_tricks.sliding_window_view(mask, (solid, solid)).all((2, 3))
    where = np.argwhere(windows)
    return where.mean(0) + solid / 2 if len(where) else None


@pytest.mark.parametrize("command,width,height", [
    ("matches run", 750, 527), ("matches run --index 3 5 --num-matches 100", 750, 1042), ("correspond run", 996, 527),
    ("heatmap run", 720, 290), ("heatmap run/backbone.pt --arch tiny_convnet --size 64 --index 1 2", 484, 568),
    ("neighbors run --bank 6", 1044, 287), ("neighbors random --arch tiny_vit --size 64 --bank 6", 646, 287),
    ("objects run --bank 4 --num-objects 1", 956, 420), ("objects random --arch tiny_vit --size 32 --bank 40", 956, None),
    ("views --method vicregl", 1028, 287), ("views --method vicregl --views multicrop", 1028, 1112),
    ("views --method bagssl --grid 0", 1028, 287), ("curves log.jsonl", 1008, 487), ("curves log.jsonl . --log", 1008, 293),
])
def test_size(draw, checkpoint, command, width, height):
    torch.save(common.build_backbone("tiny_convnet").state_dict(), "run/backbone.pt")
    with open("log.jsonl", "w") as log:
        for step in range(1, 9):  # cov is nowhere positive, so the logarithmic axes are three
            line = dict(step=step, epoch=step / 2, loss=40 / step, inv=0.3, cov=0.0, images_per_s=100.0 + step, lr=0.1)
            log.write(json.dumps(line) + "\n")
        log.write('{"step": 9, "ep')  # in the writing
    picture = draw(command)
    assert picture.shape[:2] == (height or picture.shape[0], width)  # the number of objects decides on the rows of frames


def sampled(sample, flips, smallest=0.4, side=200):
    """A seed for which `sample` gives views with these flips, large enough, and the views."""
    for seed in range(1000):
        views = sample(random.Random(f"{seed} 0"), side, side)
        if [flip for _, flip, _ in views] == flips and min(min(box[2:]) for box, _, _ in views) > smallest * side:
            return seed, views


def centre(box, flip, row, col, grid):
    """The point (y, x) of the image in the middle of a cell of a view."""
    y, x = (row + 0.5) / grid, (col + 0.5) / grid
    return box[0] + y * box[2], box[1] + (1 - x if flip else x) * box[3]


@pytest.mark.parametrize("flips", [[False, False], [True, False], [False, True], [True, True]])
def test_matches_end_where_the_nearest_places_are(draw, checkpoint, tmp_path, flips):
    gradient(tmp_path / "images")
    kinds, n, grid = vicregl.VIEWS["two"], 6, 8
    seed, views = sampled(lambda rng, h, w: vicregl.sample_views(rng, h, w, kinds, 64), flips)
    picture = draw(f"matches run --data images --seed {seed} --num-matches {n}")
    cells = [(row, col) for row in range(grid) for col in range(grid)]
    places = [np.array([centre(*view[:2], *cell, grid) for cell in cells]) for view in views]
    distances = np.linalg.norm(places[0][:, None] - places[1], axis=2).round(3)
    left, top = GAP + 2 * (PANEL + 10 + GAP) + 5, picture.shape[0] - GAP - 5 - 2 * PANEL - 2 * GAP
    column = picture[top:, left:]
    ends = []
    for colour in visualize.hues(n):
        upper, lower = blobs(column[:PANEL + GAP], colour), blobs(column[PANEL + GAP:], colour)
        if upper is not None and lower is not None:  # else a dot lies on another
            ends.append([np.floor(end / PANEL * grid) for end in (upper, lower - [GAP, 0])])
            for end, cell in zip((upper, lower - [GAP, 0]), ends[-1]):
                np.testing.assert_allclose(end, (cell + 0.5) * PANEL / grid, atol=1)
    assert len(ends) >= n - 2
    found = [distances[cells.index(tuple(a)), cells.index(tuple(b))] for a, b in ends]
    best = np.sort(distances.min(1))[:n]
    assert set(found) <= set(best) and found == sorted(found)


@pytest.mark.parametrize("flip", [False, True])
def test_true_correspondences_end_on_their_colour(draw, checkpoint, tmp_path, monkeypatch, flip):
    gradient(tmp_path / "images")
    monkeypatch.setattr(common.Photometric, "__call__", lambda self, x, generator: common.normalize(x.float() / 255))
    seed, _ = sampled(lambda rng, h, w: lc_loss.sample_views(rng, h, w, 64), [False, flip])
    dots = draw(f"correspond run --data images --seed {seed}")
    monkeypatch.setattr(visualize.Marks, "drawn", lambda self: self.picture)
    clean = draw(f"correspond run --data images --seed {seed}")
    top = dots.shape[0] - GAP - 5 - 2 * PANEL - 2 * GAP
    for column in (0, 2):  # the crop, the mirror image
        left = GAP + column * (PANEL + 10 + GAP) + 5
        colours, checked = np.unique(dots[top:, left:left + PANEL].reshape(-1, 3), axis=0, return_counts=True), 0
        for colour in colours[0][colours[1] > 80]:
            if tuple(colour) in [tuple(c) for c in clean.reshape(-1, 3)[::97]] or (colour == 255).all():
                continue
            upper, lower = (blobs(part[:, left:left + PANEL], colour)
                            for part in (dots[top:top + PANEL + GAP], dots[top + PANEL + GAP:]))
            if upper is not None and lower is not None:
                a = clean[top:, left:][tuple(upper.astype(int))]
                b = clean[top + PANEL + GAP:, left:][tuple(lower.astype(int))]
                np.testing.assert_allclose(a, b, atol=4)  # 4 levels of 215 are 4 pixels of 224
                checked += 1
        assert checked >= 6


SAMPLES = {
    "vicreg": lambda rng, h, w: vicreg.sample_views(rng, h, w, (0.2, 1.0), 64),
    "vicregl": lambda rng, h, w: vicregl.sample_views(rng, h, w, vicregl.VIEWS["two"], 64),
    "lc_loss": lambda rng, h, w: lc_loss.sample_views(rng, h, w, 64),
    "cribo": lambda rng, h, w: cribo.sample_views(rng, h, w, 64),
    "bagssl": lambda rng, h, w: bagssl.sample_patches(rng, h, w, (0.2, 0.2), 2, 64),
}


@pytest.mark.parametrize("method", SAMPLES)
@pytest.mark.parametrize("flips", [[False, True], [True, False]])
def test_numbers_lie_on_the_same_colour(draw, tmp_path, monkeypatch, method, flips):
    """Each point, and in the image at least two of another row or column, so that colours tell them apart."""
    gradient(tmp_path / "images")
    monkeypatch.setattr(common.Photometric, "__call__", lambda self, x, generator: common.normalize(x.float() / 255))
    flips = [False, flips[1]] if method == "lc_loss" else flips
    seed, _ = sampled(SAMPLES[method], flips)
    command = f"views --method {method} --data images --size 64 --seed {seed} --grid"
    dots, clean = draw(f"{command} 4"), draw(f"{command} 0")
    top, checked = dots.shape[0] - GAP - 18 - PANEL, 0
    for view in range(2):
        for colour in visualize.hues(16):
            seen = []
            for column in (2 * view, 2 * view + 1):
                part = slice(top, top + PANEL + 18), slice(GAP + column * (PANEL + 18 + GAP), None)
                at = np.argwhere((dots[part][:, :PANEL + 18] == colour).all(2))
                if len(at):
                    y, x = (at.min(0) + at.max(0)) // 2
                    if 10 < min(y, x) and max(y, x) < PANEL + 8:  # beyond is the white margin
                        seen.append(clean[part][y, x])
            if len(seen) == 2:
                np.testing.assert_allclose(*seen, atol=4)
                checked += 1
    assert checked >= (16 + 4 if method == "lc_loss" else 32)


def test_heat_is_where_the_query_is(draw, checkpoint, tmp_path):
    make_images(tmp_path / "images", 2, size=(96, 96), classes=0)
    picture = draw("heatmap run --data images --query 0.3 0.6 --scale 0.05")
    heat = picture[-GAP - 4 - visualize.LINE - PANEL:-GAP - 4 - visualize.LINE, -GAP - PANEL:-GAP]
    peak = np.unravel_index((heat @ [1, 1, -1]).argmax(), (PANEL, PANEL))  # yellow
    np.testing.assert_allclose(np.array(peak) / PANEL, [0.3, 0.6], atol=0.05)


def frame_colours(picture, rows=5, nrow=8):
    """The colour of each tile's frame in the last column of neighbors."""
    left, top = picture.shape[1] - GAP - (nrow * 48 + 2), picture.shape[0] - GAP - (rows * 48 + 2)
    return [tuple(picture[top + 48 * row + 3, left + 48 * col + 25]) for row in range(rows) for col in range(nrow)]


def test_frames_tell_the_class(draw, checkpoint, tmp_path):
    """The same image twice in its class and twice in another: these have the nearest patches."""
    make_images(tmp_path / "flat", 2, (96, 96), classes=0)
    for i, (name, source) in enumerate((("a", 0), ("a", 0), ("b", 0), ("b", 0), ("b", 1))):
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / f"images/{name}/{i}.jpg").write_bytes((tmp_path / f"flat/000{source}.jpg").read_bytes())
    frames = frame_colours(draw("neighbors run --data images --query 0 0"))[1:5]
    assert frames.count(GREEN) == 1 and frames.count(RED) == 2  # and the image itself
    assert not {GREEN, RED} & set(frame_colours(draw("neighbors run --data flat"))[1:])


@pytest.mark.parametrize("holds", [True, False])
def test_frames_tell_the_cycle(draw, checkpoint, monkeypatch, holds):
    def matched(c_1, c_2, bank):
        assert bank.ready
        first = torch.zeros(len(c_1), dtype=torch.long)
        return first, first, torch.full((len(c_1),), holds), torch.full((len(c_1),), not holds)  # of the first view

    monkeypatch.setattr(cribo, "cycle_consistent_matches", matched)
    picture = draw("objects run --bank 4")
    counts = [(picture == colour).all(2).sum() for colour in (GREEN, RED)]
    assert counts[not holds] > 1000 and counts[holds] == 0


def test_object_masks():
    assigned = torch.zeros(16, 2)
    assigned[[1, 2, 5], 0] = 1 / 3
    assigned[12, 1] = 1.0
    masks = visualize.object_masks(assigned, 8)
    assert masks.sum((1, 2)).tolist() == [12, 4]
    assert masks[0, :2, 2:6].all() and masks[0, 2:4, 2:4].all() and masks[1, 6:, :2].all()


@pytest.mark.parametrize("log", [False, True])
def test_curves_pass_through_their_values(log):
    colour, points = (1, 2, 3), [(1.0, 10.0), (2.0, 1000.0), (4.0, 100.0)]
    picture = np.asarray(visualize.plot([(points, colour)], 4.0, log)).astype(int)
    where = np.argwhere((picture == colour).all(2))
    (_, x0), (y1, x1) = where[where[:, 1].argmin()], where[where[:, 1].argmax()]
    highest, lowest = where[where[:, 0].argmin()], where[where[:, 0].max() == where[:, 0]][0]
    assert abs(x1 - (visualize.PLOT[0] - 8)) <= 2.5 and abs(highest[1] - (x0 + (x1 - x0) / 3)) <= 2.5
    share = (lowest[0] - y1) / (lowest[0] - highest[0])  # of the way from 10 to 1000
    assert abs(share - (0.5 if log else 90 / 990)) < 0.03


@pytest.mark.parametrize("low,high,log", [(0, 1, False), (-3.2, 0.4, False), (33.1, 44.9, False), (1.04, 1.31, True),
                                          (0.002, 700, True), (1e-12, 1e3, True), (0, 1000, False), (5, 5.001, False)])
def test_ticks(low, high, log):
    values = visualize.ticks(low, high, log)
    assert 3 <= len(values) <= 8 and low <= values[0] and values[-1] <= high and values == sorted(values)
    assert all(float(f"{value:.6g}") == pytest.approx(value) for value in values)


@pytest.mark.parametrize("string", ["a title that is rather long for the picture that it stands above", "x" * 200, "i"])
def test_text_is_not_clipped(string):
    narrow, wide = np.asarray(visualize.text(string, 100)), np.asarray(visualize.text(string, 4000))
    assert narrow.shape[0] % visualize.LINE == 0 and wide.shape[0] == visualize.LINE
    ink = [np.abs(255 - picture.astype(int)).sum() for picture in (narrow, wide)]
    assert abs(ink[0] - ink[1]) < 0.1 * ink[1]  # as much as on one long line


@pytest.mark.parametrize("command,words", [
    ("matches nowhere", "no checkpoint at nowhere"), ("matches run --index 5000", "shapes has images 0 to 1999"),
    ("views --data nothing", "no data set 'nothing'"), ("views --out picture.jpg", "must end in .png"),
    ("views --views none", "--views none: vicregl has two, multicrop"),
    ("heatmap run --scale 2", "--scale 2.0"), ("objects run --data flat", "flat has 4 images"),
    ("objects run --num-objects 200", "128 locations"), ("curves nowhere", "nowhere is no log.jsonl"),
    ("curves empty.jsonl", "still empty"), ("matches random", "--arch"), ("matches run --data broken", "mend or remove it"),
])
def test_bad_input(tmp_path, checkpoint, monkeypatch, capsys, command, words):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "flat", 4, classes=0)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/0.jpg").write_text("no image")
    assert words in user_error(visualize.main, monkeypatch, capsys, *command.split())
