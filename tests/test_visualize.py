"""visualize.py: what is drawn lies where it should, read from the figures; one-line errors."""
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_images, user_error
from PIL import Image

pytest.importorskip("matplotlib")

import bagssl  # noqa: E402
import common  # noqa: E402
import cribo  # noqa: E402
import lc_loss  # noqa: E402
import vicregl  # noqa: E402
import visualize  # noqa: E402
from evaluate import __main__ as evaluation  # noqa: E402
from evaluate import detect, features  # noqa: E402
from evaluate.objects import ShapesObjects  # noqa: E402
from visualize import DPI, RIGHT, SIDE, WRONG  # noqa: E402

BOXES = [(20, 30, 150, 120), (0, 10, 110, 170)]  # top, left, height, width, of 200 x 200 pixels
FLIPS = [[False, False], [True, False], [False, True], [True, True]]


@pytest.fixture
def figure(tmp_path, monkeypatch):
    """figure("matches --checkpoint run ...") -> that command's figure, not rendered yet."""
    monkeypatch.chdir(tmp_path)

    def make(command):
        monkeypatch.setattr(sys, "argv", ["visualize.py", *command.split()])
        with torch.no_grad():
            return visualize.draw(visualize.parse_args())

    return make


@pytest.fixture
def checkpoint(tmp_path):
    """A run of an untrained VICRegL: backbone, projector and local projector."""
    torch.manual_seed(0)
    model = vicregl.VICRegL(common.build_backbone("tiny_convnet"), (32, 32), (16, 16))
    (tmp_path / "run").mkdir()
    args = dict(arch="tiny_convnet", size=64, data="shapes")
    torch.save(dict(model=model.state_dict(), args=args), tmp_path / "run/last.pt")


@pytest.fixture
def gradient(tmp_path):
    """A folder of images: red tells the column, green the row, blue is 40 times the index."""
    (tmp_path / "images").mkdir()
    ramp = np.linspace(20, 235, 200)
    for i in range(6):
        pixels = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], 40 * i), 2)
        Image.fromarray(pixels.round().astype(np.uint8)).save(tmp_path / f"images/{i}.png")


@pytest.fixture
def true_colours(monkeypatch):
    """No colour augmentation."""
    plain = lambda self, x: common.normalize(x.float() / 255)  # noqa: E731
    monkeypatch.setattr(common.Photometric, "__call__", plain)


def pictures(figure):
    return [ax for ax in figure.axes if ax.images]


def colour_at(ax, point):
    """The colour, from 0 to 255, of what an axes shows at (x, y) of its coordinates."""
    shown = ax.images[0]
    left, right, bottom, top = shown.get_extent()
    pixels = np.asarray(shown.get_array(), dtype=float)
    if pixels.max() <= 1:
        pixels = 255 * pixels
    row = (point[1] - top) / (bottom - top) * pixels.shape[0]
    col = (point[0] - left) / (right - left) * pixels.shape[1]
    limits = np.array(pixels.shape[:2]) - 1
    return pixels[tuple(np.clip(np.floor([row, col]).astype(int), 0, limits))]


def lines(figure, above):
    """The lines that start in an axes: (start, end), (x, y) each, and which are drawn as right."""
    found = [line for line in figure.artists if line.axesA is above]
    ends = np.array([(line.xy1, line.xy2) for line in found])
    return ends, [line.get_linestyle() == RIGHT["linestyle"] for line in found]


def numbers(figure, ax):
    """{number: (x, y)} of the marks in an axes."""
    found = [text for text in figure.texts if text.get_transform() is ax.transData]
    return {int(text.get_text()): text.get_position() for text in found}


def centre(box, flip, row, col, grid):
    """The point (y, x) of the image in the middle of a cell of a view."""
    y, x = (row + 0.5) / grid, (col + 0.5) / grid
    return box[0] + y * box[2], box[1] + (1 - x if flip else x) * box[3]


# --- all commands ---------------------------------------------------------------------------------

@pytest.mark.parametrize("command,count,size", [
    ("matches --checkpoint run", 5, (3, 2.2)),
    ("matches --checkpoint run --index 3 --num-matches 20", 5, (3, 2.2)),
    ("matches --checkpoint random --arch tiny_vit --size 32", 5, (3, 2.2)),
    ("correspond --checkpoint run", 8, (4, 2.2)),
    ("objects --checkpoint run --bank-images 4 --num-objects 2", 6, (4, 2.2)),
    ("heatmap --checkpoint run", 3, (3, 1.3)),
    ("heatmap --checkpoint run/backbone.pt --arch tiny_convnet --size 50", 2, (2, 1.3)),
    ("neighbors --checkpoint run --bank-images 3", 3, (4.8, 1.1)),
    ("views --method vicregl --views multicrop --size 56", 16, (4, 4.4)),
])
def test_a_command_ends_with_a_file(
        tmp_path, checkpoint, monkeypatch, capsys, command, count, size):
    torch.save(common.build_backbone("tiny_convnet").state_dict(), tmp_path / "run/backbone.pt")
    drawn = []
    draw = visualize.draw
    monkeypatch.setattr(visualize, "draw", lambda args: drawn.append(draw(args)) or drawn[0])
    monkeypatch.setattr(visualize, "DPI", 20)
    monkeypatch.chdir(tmp_path)
    argv = ["visualize.py", *command.split(), "--out", "pictures/picture.png"]
    monkeypatch.setattr(sys, "argv", argv)
    visualize.main()
    assert capsys.readouterr().out == "pictures/picture.png\n"
    assert len(pictures(drawn[0])) == count
    assert np.allclose(drawn[0].get_size_inches(), np.array(size) * SIDE)
    picture = Image.open("pictures/picture.png")
    assert picture.format == "PNG"
    assert np.allclose(picture.size, np.array(size) * SIDE * 20, atol=1)


@pytest.mark.parametrize("command", [
    "matches --checkpoint run", "correspond --checkpoint run", "heatmap --checkpoint run",
    "views --method cribo", "objects --checkpoint run --bank-images 3",
])
def test_a_view_has_448_pixels_or_more(figure, checkpoint, command):
    drawn = figure(command)
    assert drawn.dpi == DPI
    drawn.draw_without_rendering()
    for ax in pictures(drawn):
        assert min(ax.get_window_extent().size) >= 448
        ratio = ax.get_window_extent().height / ax.get_window_extent().width
        assert ratio == pytest.approx(1, abs=0.01)  # nothing is distorted


def test_the_same_seed_gives_the_same_picture(figure, checkpoint):
    shown = []
    for seed in (1, 1, 2):
        drawn = figure(f"correspond --checkpoint run --seed {seed}")
        shown.append([np.asarray(ax.images[0].get_array()) for ax in drawn.axes])
    assert all(np.array_equal(a, b) for a, b in zip(shown[0], shown[1]))
    assert not all(np.array_equal(a, b) for a, b in zip(shown[0], shown[2]))


def test_an_untrained_network_uses_its_running_statistics(figure, monkeypatch):
    monkeypatch.setitem(visualize.COMMANDS, "matches", lambda args, data, backbone: backbone)
    assert not figure("matches --checkpoint random --arch tiny_convnet --size 64").training


# --- geometry -------------------------------------------------------------------------------------

@pytest.mark.parametrize("flips", FLIPS)
def test_matches_by_place_end_where_the_nearest_places_are(
        figure, checkpoint, gradient, monkeypatch, flips):
    views = [(box, flip, 64) for box, flip in zip(BOXES, flips)]
    monkeypatch.setattr(vicregl, "sample_views", lambda image, kinds, size: views)
    drawn = figure("matches --checkpoint run --data images --num-matches 6")
    axes = np.array(drawn.axes).reshape(2, 3)

    source = [patch.get_bbox().bounds for patch in axes[0, 0].patches]
    assert source == [(left, top, width, height) for top, left, height, width in BOXES]
    labels = [text.get_text() for text in axes[0, 0].get_legend().get_texts()]
    assert ["mirrored" in label for label in labels] == flips

    cells = [(row, col) for row in range(8) for col in range(8)]
    places = [np.array([centre(box, flip, *cell, 8) for cell in cells])
              for box, flip in zip(BOXES, flips)]
    distances = np.linalg.norm(places[0][:, None] - places[1], axis=2)
    ends, _ = lines(drawn, axes[0, 2])
    assert len(ends) == 6
    numbered = [[np.ravel_multi_index((int(8 * y), int(8 * x)), (8, 8)) for x, y in pair]
                for pair in ends]
    found = [distances[a, b] for a, b in numbered]
    np.testing.assert_allclose(found, np.sort(distances.min(1))[:6], atol=1e-4)
    for (a, b), (start, end) in zip(numbered, ends):
        np.testing.assert_allclose(np.array([*cells[a], *cells[b]]) + 0.5,
                                   8 * np.array([*start[::-1], *end[::-1]]), atol=1e-5)


def test_matches_by_feature_are_those_of_the_local_projector(figure, checkpoint, gradient):
    drawn = figure("matches --checkpoint run --data images --num-matches 100")
    axes = np.array(drawn.axes).reshape(2, 3)
    ends, _ = lines(drawn, axes[0, 1])
    assert len(ends) == 64
    x = torch.stack([torch.from_numpy(np.array(ax.images[0].get_array())) for ax in axes[:, 1]])
    x = common.normalize(x.permute(0, 3, 1, 2).float() / 255)
    model = vicregl.VICRegL(common.build_backbone("tiny_convnet"), (32, 32), (16, 16))
    model.load_state_dict(torch.load("run/last.pt")["model"])
    with torch.no_grad():
        maps, _ = model.eval().backbone(x)
        maps = model.local_projector(maps.flatten(0, 1)).view(2, 64, -1).double()
    distances = torch.cdist(*maps, compute_mode="donot_use_mm_for_euclid_dist")
    a, b = [(8 * ends[:, i, 1]).astype(int) * 8 + (8 * ends[:, i, 0]).astype(int) for i in (0, 1)]
    assert sorted(a) == list(range(64))
    found = distances[torch.tensor(a), torch.tensor(b)]
    np.testing.assert_allclose(found, distances.min(1).values[torch.tensor(a)], atol=1e-4)
    assert (found.diff() > -1e-4).all()  # number 1 is the closest
    for part in (axes[0, 1], axes[1, 1]):
        assert sorted(numbers(drawn, part)) == list(range(1, 65))


@pytest.mark.parametrize("flip", [False, True])
def test_true_correspondences_end_on_their_colour(
        figure, checkpoint, gradient, true_colours, monkeypatch, flip):
    views = [((0, 0, 200, 200), False, 64), (BOXES[0], flip, 64)]
    monkeypatch.setattr(lc_loss, "sample_views", lambda image, size: views)
    drawn = figure("correspond --checkpoint run --data images")
    axes = np.array(drawn.axes).reshape(2, 4)
    for column in (0, 2):  # the crop, the mirror image
        ends, right = lines(drawn, axes[0, column])
        assert len(ends) == 15 and all(right)
        for start, end in ends:
            ours, theirs = colour_at(axes[0, column], start), colour_at(axes[1, column], end)
            np.testing.assert_allclose(ours, theirs, atol=4)  # 4 of 215 are 4 pixels of 200
        assert numbers(drawn, axes[1, column]) == {
            i: pytest.approx(tuple(end)) for i, (_, end) in enumerate(ends, 1)}


@pytest.mark.parametrize("flip", [False, True])
def test_a_prediction_is_right_in_the_location_of_the_truth(
        figure, checkpoint, true_colours, monkeypatch, flip):
    crop = ((0, 0, 96, 96), flip, 64)  # all of the image
    views = [((0, 0, 96, 96), False, 64), crop]
    monkeypatch.setattr(lc_loss, "sample_views", lambda image, size: views)
    monkeypatch.setattr(visualize.correspond, "__defaults__", (64,))  # all lines
    drawn = figure("correspond --checkpoint run --index 7")
    axes = np.array(drawn.axes).reshape(2, 4)
    for column in (0, 2):
        truth, _ = lines(drawn, axes[0, column])
        found, right = lines(drawn, axes[0, column + 1])
        assert len(truth) == len(found) == 64
        np.testing.assert_array_equal(truth[:, 0], found[:, 0])
        same = (np.floor(8 * truth[:, 1]) == np.floor(8 * found[:, 1])).all(1)
        assert same.tolist() == right
        title = axes[0, column + 1].get_title()
        assert title.endswith(f"{same.sum()} of 64 right")
        if column == 0 and not flip:
            assert same.all()  # both views are the same picture


@pytest.mark.parametrize("method,sample", [
    ("vicregl", "multicrop"), ("lc_loss", "two"), ("cribo", "two")])
@pytest.mark.parametrize("flips", [[False, True], [True, False]])
def test_numbers_lie_on_the_same_colour(
        figure, gradient, true_colours, monkeypatch, method, sample, flips):
    views = [(box, flip, 64) for box, flip in zip(BOXES, flips)]
    if sample == "multicrop":
        views += [((30, 60, 90, 100), True, 40), ((60, 30, 100, 90), False, 40)]
    monkeypatch.setattr(visualize.METHODS[method], "sample_views", lambda *_, **__: views)
    drawn = figure(f"views --method {method} --views {sample} --data images --size 64")
    axes = np.array(drawn.axes).reshape(-1, 2)
    assert len(axes) == len(views)
    for (source, target), (box, flip, _) in zip(axes, views):
        at_source, at_target = numbers(drawn, source), numbers(drawn, target)
        assert at_source.keys() == at_target.keys()
        assert len(at_source) == 16 if method != "lc_loss" else len(at_source) >= 4
        (outline,) = source.patches
        assert outline.get_bbox().bounds == (box[1], box[0], box[3], box[2])
        assert ("mirrored" in target.get_title()) == flip
        for number, point in at_source.items():
            ours, theirs = colour_at(source, point), colour_at(target, at_target[number])
            np.testing.assert_allclose(ours, theirs, atol=5)


def test_visible_undoes_normalize():
    x = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(visualize.visible(common.normalize(x)), x)


# --- patches --------------------------------------------------------------------------------------

def test_heat_is_where_the_query_is(figure, checkpoint, tmp_path):
    make_images(tmp_path / "images", 2, size=(120, 96), classes=0)
    drawn = figure("heatmap --checkpoint run --data images --query 0.3 0.6 --scale 0.05")
    query, *spaces = pictures(drawn)
    (box,) = query.patches
    left, top, width, height = box.get_bbox().bounds
    assert width == height == round((0.05 * 120 * 96) ** 0.5)
    middle = np.array([left + width / 2, top + height / 2])
    np.testing.assert_allclose(middle, [0.6 * 120, 0.3 * 96], atol=0.5 * (120 - width) / 16 + 0.5)
    heats = [np.asarray(ax.collections[0].get_array()) for ax in spaces]
    assert not np.allclose(*heats)
    titles = [ax.get_title() for ax in spaces]
    assert [title.split(":")[0] for title in titles] == ["embedding", "projection"]
    for ax in spaces:
        (mesh,) = ax.collections
        heat = np.asarray(mesh.get_array())
        assert heat.shape == (17, 17) and heat.max() == pytest.approx(1, abs=1e-5)
        row, col = np.unravel_index(heat.argmax(), heat.shape)
        corners = mesh.get_coordinates()[row : row + 2, col : col + 2]
        np.testing.assert_allclose(corners.mean((0, 1)), middle, atol=0.5)


def test_the_cells_of_a_heat_map_are_those_of_the_patches(figure, checkpoint, gradient):
    drawn = figure("heatmap --checkpoint run --data images --scale 0.25")
    image = Image.open("images/0.png")
    boxes = [box for box, _, _ in bagssl.patch_grid(image, 0.25, 289, 64)]
    middles = np.array([(left + width / 2, top + height / 2) for top, left, height, width in boxes])
    mesh = pictures(drawn)[1].collections[0].get_coordinates()
    cells = (mesh[1:, 1:] + mesh[:-1, :-1]) / 2
    np.testing.assert_allclose(cells[1:-1, 1:-1].reshape(-1, 2),
                               middles.reshape(17, 17, 2)[1:-1, 1:-1].reshape(-1, 2), atol=0.6)


def test_the_nearest_patches_in_order(figure, checkpoint, tmp_path):
    make_images(tmp_path / "images", 5, (96, 96), classes=0)
    drawn = figure("neighbors --checkpoint run --data images --bank-images 3 --query 0.2 0.9")
    query, embedding, _ = pictures(drawn)
    (box,) = query.patches
    left, top, width, height = box.get_bbox().bounds
    assert top == 0 or left > 0  # of the 16: near the right border
    image = Image.open("images/0000.jpg")
    patch = common.cut(image, (int(top), int(left), int(height), int(width)), False, 64)

    grid = torch.from_numpy(np.array(embedding.images[0].get_array())).permute(2, 0, 1)
    tiles = [grid[:, 66 * row + 2 : 66 * row + 66, 66 * col + 2 : 66 * col + 66]
             for row in range(5) for col in range(8)]
    assert torch.equal(tiles[0], patch)
    model = vicregl.VICRegL(common.build_backbone("tiny_convnet"), (32, 32), (16, 16))
    model.load_state_dict(torch.load("run/last.pt")["model"])
    with torch.no_grad():
        _, y = model.eval().backbone(common.normalize(torch.stack(tiles).float() / 255))
    similarity = F.cosine_similarity(y, y[:1])
    assert (similarity.diff() < 1e-5).all() and similarity[0] > similarity[-1]
    assert "of 64" in embedding.get_title()


# --- objects --------------------------------------------------------------------------------------

@pytest.fixture
def halves(monkeypatch):
    """Clusters: the left and the right half of each view -> the positions that were passed."""
    seen = []

    def clustering(tokens, positions, num_objects, pos_weight):
        seen.append(positions)
        left = (torch.arange(64) % 8 < 4).float()
        view = torch.stack([left, 1 - left], 1) / 32  # (N, 2)
        return torch.cat([view, view]).expand(len(tokens), -1, -1)

    monkeypatch.setattr(cribo, "joint_space_clustering", clustering)
    return seen


@pytest.mark.parametrize("flips", FLIPS)
def test_clustering_gets_the_places_of_both_views(
        figure, checkpoint, gradient, halves, monkeypatch, flips):
    views = [(box, flip, 64) for box, flip in zip(BOXES, flips)]
    monkeypatch.setattr(cribo, "sample_views", lambda image, size: views)
    figure("objects --checkpoint run --data images --bank-images 3 --num-objects 2")
    expected = [centre(box, flip, row, col, 8)
                for box, flip in zip(BOXES, flips) for row in range(8) for col in range(8)]
    np.testing.assert_allclose(halves[0], np.tile(expected, (6, 1, 1)), atol=1e-4)


@pytest.mark.parametrize("holds", [True, False])
def test_objects_their_nearest_and_frames(figure, checkpoint, gradient, halves, monkeypatch, holds):
    found = []
    represent = cribo.object_representations
    monkeypatch.setattr(cribo, "object_representations",
                        lambda *args: found.append(represent(*args)) or found[0])
    monkeypatch.setattr(visualize, "image_and_others", lambda *args: list(range(6)))

    def matched(c_1, c_2, bank):
        assert bank.ready
        views = torch.stack(found[0][:2])  # (2, M, D): two objects of each of six images
        assert torch.equal(torch.stack([c_1, c_2]), views[:, :6])  # the batch: three images
        assert torch.equal(bank.objects, views[:, 6:])  # the bank: the other three
        first = torch.ones(len(c_1), dtype=torch.long)
        held = torch.full((len(c_1),), holds)
        return first, 0 * first, held, ~held  # the first view counts

    monkeypatch.setattr(cribo, "cycle_consistent_matches", matched)
    drawn = figure("objects --checkpoint run --data images --bank-images 3 --num-objects 2")
    first, second, *tiles = pictures(drawn)
    for ax in (first, second):
        (x_1, _), (x_2, _) = numbers(drawn, ax).values()
        assert x_1 < 0.5 < x_2
    style = RIGHT if holds else WRONG
    for ax in tiles:
        (frame,) = ax.patches
        assert frame.get_bbox().bounds == (0, 0, 1, 1)
        assert frame.get_linestyle() == style["linestyle"]
    shown = [np.asarray(ax.images[0].get_array()) for ax in tiles]
    faded = [[(part >= 192).all() for part in np.split(view, 2, axis=1)] for view in shown]
    # Object 1 is the left half; its nearest, entry 1 of the bank, is a right half; and so on.
    assert faded == [[False, True], [True, False], [True, False], [True, False]]
    blue = [view[20, 20 if half == [False, True] else 50, 2] for view, half in zip(shown, faded)]
    np.testing.assert_allclose(blue, [0, 40 * 3, 0, 40 * 3], atol=2)  # image 0, the bank's first


# --- detections -----------------------------------------------------------------------------------

class Finder(torch.nn.Module):
    """Of each image finds the first object, the others 30 pixels too far right; one not surely."""

    def __init__(self, truths):
        super().__init__()
        self.truths = truths

    def forward(self, images):
        truth = next(self.truths)
        n = len(truth["labels"])
        boxes = truth["boxes"].clone()
        boxes[1:, [0, 2]] += 30
        masks = 0.8 * truth["masks"][:, None].float()
        found = dict(boxes=boxes, labels=truth["labels"], scores=torch.full((n,), 0.9), masks=masks)
        unsure = {name: x[:1] for name, x in found.items()} | {"scores": torch.tensor([0.2])}
        return [{name: torch.cat([x, unsure[name]]) for name, x in found.items()}]


def test_objects_and_detections_lie_where_they_are(figure, checkpoint, monkeypatch):
    indices = [3, 5, 7, 9]
    scenes = ShapesObjects("val", 96)
    finder = Finder(scenes[index][1] for index in indices)
    monkeypatch.setattr(visualize, "image_and_others", lambda *args: indices)
    monkeypatch.setattr(detect, "build", lambda *args: finder)
    backbone = common.build_backbone("tiny_convnet").state_dict()
    args = dict(arch="tiny_convnet", size=64, data="shapes", bf16=False)
    torch.save(dict(model=backbone, detector={}, args=args), "run/detector.pt")
    drawn = figure("detections --checkpoint run")
    axes = np.array(drawn.axes).reshape(2, 4)
    for (above, below), index in zip(axes.T, indices):
        image, truth = scenes[index]
        boxes = truth["boxes"].numpy()
        sides = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
        assert [above.get_title(), below.get_title()] == [f"image {index}", "found"]
        assert above.images[0].get_extent() == below.images[0].get_extent() == [0, 96, 96, 0]
        for ax, right, shift, score in ((above, len(sides), 0, ""), (below, 1, 30, " 90%")):
            found = np.array([patch.get_bbox().bounds for patch in ax.patches])
            np.testing.assert_allclose(found[:1], sides[:1])
            np.testing.assert_allclose(found[1:], sides[1:] + [shift, 0, 0, 0])
            drawn_right = [patch.get_linestyle() == RIGHT["linestyle"] for patch in ax.patches]
            assert drawn_right == [i < right for i in range(len(sides))]
            texts = [text for text in drawn.texts if text.get_transform() is ax.transData]
            name = scenes.classes[scenes.label(index)]
            assert {text.get_text() for text in texts} == {name + score}
            places = np.array([text.get_position() for text in texts])
            np.testing.assert_allclose(places, found[:, :2] + found[:, 2:] * [0.5, 0])
        plain = image.permute(1, 2, 0).numpy()
        inside = truth["masks"].any(0).numpy()
        for ax in (above, below):  # masks are painted, and nothing else
            assert ((np.asarray(ax.images[0].get_array()) != plain).any(2) == inside).mean() > 0.99


def test_evaluate_leaves_the_detector_that_is_drawn(figure, checkpoint, monkeypatch):
    monkeypatch.setattr(detect, "measure", lambda *args: {})
    line = "evaluate detect --checkpoint run --steps 1 --batch-size 2 --workers 0 --baseline"
    monkeypatch.setattr(sys, "argv", line.split())
    with torch.enable_grad():
        evaluation.main()
    kept = torch.load("run/detector.pt", weights_only=True)
    trained = torch.load("run/last.pt", weights_only=True)["model"]
    first = "0.weight"
    start = trained[f"backbone.{first}"]
    change = (kept["model"][first] - start).norm() / start.norm()
    assert 0 < change < 0.1  # of the run's network, not of the untrained one, which came later
    assert len(pictures(figure("detections --checkpoint run"))) == 8


# --- curves ---------------------------------------------------------------------------------------

def write_log(folder, values, **more):
    folder.mkdir(parents=True)
    with open(folder / "log.jsonl", "w") as log:
        for step, value in enumerate(values, 1):
            line = dict(step=step, epoch=step / 4, loss=value, **more, lr=0.1)
            log.write(json.dumps(line) + "\n")
        log.write('{"step": 9, "ep')  # in the writing


def test_curves_pass_through_their_values(figure, tmp_path):
    write_log(tmp_path / "runs/one", [10.0, 1000.0, 100.0])
    write_log(tmp_path / "runs/two", [5.0], inv=0.5)
    drawn = figure("curves runs/one runs/two")
    loss, inv = [ax for ax in drawn.axes if ax.get_title()]
    assert [loss.get_title(), inv.get_title()] == ["loss", "inv"]
    assert [len(loss.lines), len(inv.lines)] == [4, 2]
    for line in loss.lines[:2]:  # too short to be smoothed
        np.testing.assert_allclose(line.get_xydata(), [[0.25, 10], [0.5, 1000], [0.75, 100]])
    np.testing.assert_allclose(loss.lines[2].get_xydata(), [[0.25, 5.0]])
    assert loss.lines[0].get_color() == loss.lines[1].get_color() != loss.lines[2].get_color()
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]


def test_smoothed_curves(figure, tmp_path):
    values = np.sin(np.arange(100.0)).tolist()
    write_log(tmp_path / "run", values)
    raw, smooth = figure("curves run").axes[0].lines
    np.testing.assert_allclose(raw.get_ydata(), values)
    expected = [np.mean(values[i - 2 : i + 3]) for i in range(2, 98)]
    np.testing.assert_allclose(smooth.get_ydata()[2:98], expected)
    assert len(smooth.get_ydata()) == 100
    np.testing.assert_allclose(visualize.smoothed([3.0] * 57), 3.0)


# --- errors ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("command,words", [
    ("matches --checkpoint nowhere", "nowhere"),
    ("matches --checkpoint run --index 5000", "shapes has 2000 images"),
    ("matches --checkpoint run --index -1", "--index -1"),
    ("matches --checkpoint run --size 60", "views of 60 pixels: --size must make a multiple of 8"),
    ("matches --checkpoint run --num-matches 0", "--num-matches 0: it must be at least 1"),
    ("matches --checkpoint run --data broken", "mend or remove it"),
    ("matches", "--checkpoint is missing: a run folder"),
    ("matches --checkpoint random", "--arch"),
    ("detections --checkpoint run", "`python -m evaluate detect` leaves it there"),
    ("detections --checkpoint random", "no detector.pt"),
    ("detections", "--checkpoint is missing"),
    ("matches --checkpoint random --arch tiny_convnet --size 99999", "--size 99999"),
    ("heatmap --checkpoint run --scale nan", "--scale nan"),
    ("heatmap --checkpoint run --query 0.5 1.5", "--query 1.5"),
    ("matches --checkpoint run --seed -1", "--seed -1"),
    ("matches --checkpoint run --seed x", "invalid int value"),
    ("views --data nothing", "no data set 'nothing'"),
    ("views --out picture.jpg", "must end in .png"),
    ("views --views none", "--views"),
    ("views --method none", "--method"),
    ("heatmap --checkpoint run --scale 0", "--scale 0"),
    ("objects --checkpoint run --data flat", "--bank-images 128: give less than 4"),
    ("objects --checkpoint run --num-objects 200", "128 locations"),
    ("objects --checkpoint run --size 60", "views of 60 pixels"),
    ("curves", "curves needs"),
    ("curves nowhere", "nowhere has no log.jsonl"),
    ("curves empty", "empty has no log.jsonl of a run, or an empty one"),
    ("nothing", "invalid choice"),
])
def test_bad_input(tmp_path, checkpoint, monkeypatch, capsys, command, words):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "flat", 4, classes=0)
    for folder, file in (("empty", "log.jsonl"), ("broken", "0.jpg")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("")
    assert words in user_error(visualize.main, monkeypatch, capsys, *command.split())


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(visualize, "draw", interrupted)
    monkeypatch.setattr(sys, "argv", ["visualize.py", "views"])
    with pytest.raises(SystemExit) as stop:
        visualize.main()
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_progress_is_told(figure, checkpoint, monkeypatch, capsys):
    ticks = iter(range(0, 10**6, 20))
    monkeypatch.setattr(features.time, "monotonic", lambda: next(ticks))
    figure("neighbors --checkpoint run --bank-images 3")
    said = capsys.readouterr().err
    assert "features of images: 75%, 60 s left\n" in said
    assert "features of 16 views: 100%, 0 s left\n" in said


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "visualize")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as stop:
        import visualize  # noqa: F401
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install matplotlib" in line
