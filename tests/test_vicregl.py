"""vicregl.py: positions, matches and loss against the paper, the golden numbers and vicreg.py."""
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import checkpoint, lines
from PIL import Image
from test_vicreg import algorithm_1
from torchvision.transforms import RandomResizedCrop

import common
import training
import vicreg
import vicregl
from vicregl import (
    closest,
    feature_distances,
    local_criterion,
    location_distances,
    map_positions,
    match,
    positions,
    vicregl_loss,
)

GOLDEN = Path(__file__).parent / "golden"
RELEASED = dict(inv_coeff=25.0, var_coeff=12.5, cov_coeff=0.5)


def golden(name):
    return {k: torch.tensor(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


def close(ours, theirs, tolerance=1e-9):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def maps_and_positions(batch=5, grids=(4, 4), dim=6):
    """Random maps V x (B, N, D) that require grad, and positions V x (B, N, 2) of random crops."""
    torch.manual_seed(0)
    maps, pos = [], []
    for grid in grids:
        features = torch.randn(batch, grid * grid, dim, dtype=torch.float64)
        maps.append(features.requires_grad_())
        boxes = 100 * torch.rand(batch, 4, dtype=torch.float64) + 20
        pos.append(positions(boxes, torch.rand(batch) < 0.5, grid).flatten(1, 2))
    return maps, pos


# --- positions ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", "abcd")
def test_golden_positions(name):
    g = golden("positions")
    grid = len(g[f"{name}_grid"])
    ours = positions(g[f"{name}_box"][None], g[f"{name}_flip"][None], grid)[0]
    torch.testing.assert_close(ours, g[f"{name}_grid"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("height,width", [(200, 256), (256, 64), (20, 24)])
def test_positions_are_where_cut_cuts(height, width):
    y, x = np.mgrid[0:height, 0:width].astype(np.uint8)
    image = Image.fromarray(np.stack([y, x, x], 2))  # each pixel holds where it is
    torch.manual_seed(0)
    for grid, size in ((7, 224), (4, 64), (3, 96), (1, 8)):
        for flip in (False, True):
            box = RandomResizedCrop.get_params(image, (0.05, 1.0), (3 / 4, 4 / 3))
            view = common.cut(image, box, flip, size)[:2].float()
            seen = F.adaptive_avg_pool2d(view, grid).permute(1, 2, 0) + 0.5  # centres of pixels
            where = positions(torch.tensor([box]), torch.tensor([flip]), grid)[0]
            assert (seen - where).abs().max() < 0.6, (box, flip, grid)


def test_positions_of_half_precision_boxes_are_in_float32():
    boxes = torch.tensor([[256.0, 384.0, 96.0, 112.0]])  # these are exact in bfloat16
    flips = torch.tensor([True])
    half = positions(boxes.bfloat16(), flips, 7)
    assert half.dtype == torch.float32 and torch.equal(half, positions(boxes, flips, 7))
    distances = location_distances(half.flatten(1, 2).bfloat16(), half.flatten(1, 2).bfloat16())
    assert distances.dtype == torch.float32


def test_a_map_that_is_no_square_grid_is_refused():
    boxes, flips = torch.rand(2, 2, 4), torch.zeros(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="12 locations is not square"):
        map_positions(boxes, flips, [torch.rand(2, 9, 5), torch.rand(2, 12, 5)])


def test_views():
    torch.manual_seed(0)
    image = Image.new("RGB", (400, 300))
    kinds = vicregl.VIEWS["multicrop"]
    draws = [vicregl.sample_views(image, kinds, 224) for _ in range(300)]
    assert [size for _, _, size in draws[0]] == [224] * 2 + [96] * 6
    areas = np.array([[h * w / 120000 for (_, _, h, w), _, _ in views] for views in draws])
    assert 0.39 < areas[:, :2].min() < 0.45 and areas[:, :2].max() > 0.9
    assert 0.078 < areas[:, 2:].min() < 0.09 and 0.38 < areas[:, 2:].max() < 0.41
    assert 0.45 < np.mean([[flip for _, flip, _ in views] for views in draws]) < 0.55
    views = vicregl.sample_views(image, vicregl.VIEWS["two"], 224)
    assert [size for _, _, size in views] == [224] * 2


# --- matches --------------------------------------------------------------------------------------

def grid_positions(box, flip=False, grid=7):
    boxes = torch.tensor([box], dtype=torch.float64)
    return positions(boxes, torch.tensor([flip]), grid).flatten(1, 2)  # (1, N, 2)


def nearest(pos_a, pos_b, num_matches=None):
    kept, found = closest(location_distances(pos_a, pos_b), num_matches)
    return kept[0].tolist(), found[0].tolist()


def test_identity_crops_match_themselves():
    pos = grid_positions((10, 20, 140, 70))
    assert (location_distances(pos, pos).diagonal(dim1=1, dim2=2) == 0).all()
    assert nearest(pos, pos) == (list(range(49)), list(range(49)))
    maps = torch.randn(3, 49, 8)
    by_place = location_distances(pos, pos).expand(3, -1, -1)
    for distances in (feature_distances(maps, maps), by_place):
        for side in match(maps, maps, distances, None):
            assert torch.equal(side, maps)
    assert nearest(pos, pos, 20)[0] == list(range(20))  # all at distance 0: the first


def test_opposite_flips_match_mirrored_cells():
    box = (10, 20, 140, 70)
    mirrored = torch.arange(49).view(7, 7).flip(1).flatten().tolist()
    assert nearest(grid_positions(box), grid_positions(box, True)) == (list(range(49)), mirrored)
    assert nearest(grid_positions(box, True), grid_positions(box, True))[1] == list(range(49))


def test_overlapping_crops_match_the_cell_of_the_same_pixel():
    # cells of 10 x 10 pixels; the second crop lies 3 cells lower and 2 to the right
    kept, found = nearest(grid_positions((0, 0, 70, 70)), grid_positions((30, 20, 70, 70)), 20)
    assert kept == [7 * row + column for row in range(3, 7) for column in range(2, 7)]
    assert found == [7 * row + column for row in range(4) for column in range(5)]
    # shifted by a third of a cell, of different sizes: each centre's own cell, within the overlap
    a, b = grid_positions((5, 5, 56, 56)), grid_positions((8, 8, 42, 42))
    cell = ((a[0] - 8) / 6).floor()
    inside = ((cell >= 0) & (cell < 7)).all(1)
    expected = (7 * cell[:, 0] + cell[:, 1]).long()
    assert inside.sum() >= 25
    assert torch.tensor(nearest(a, b)[1])[inside].tolist() == expected[inside].tolist()


def test_crops_apart_still_match():
    a, b = grid_positions((0, 0, 70, 70)), grid_positions((200, 300, 35, 35), grid=3)
    maps = torch.randn(1, 49, 8), torch.randn(1, 9, 8)
    query, found = match(*maps, location_distances(a, b), 20)
    assert query.shape == found.shape == (1, 20, 8)
    assert torch.equal(found, maps[1][:, :1].expand(-1, 20, -1))  # its upper left corner is nearest
    assert match(*maps, location_distances(a, b), 0)[0].shape == (1, 49, 8)
    assert match(*maps[::-1], location_distances(b, a), 20)[0].shape == (1, 9, 8)  # all that it has


@pytest.mark.parametrize("name", ["vicregl_small", "vicregl_deep"])
def test_golden_matches(name):
    g = golden(name)
    pos = [g[f"pos_{v}"].flatten(1, 2) for v in range(2)]
    distances = {"loc": location_distances(*pos), "feat": feature_distances(g["map_0"], g["map_1"])}
    for kind, d in distances.items():
        query, found = match(g["map_0"], g["map_1"], d, int(g["num_matches"][0]))
        assert torch.equal(query, g[f"{kind}_query"]) and torch.equal(found, g[f"{kind}_match"])


def test_location_distances():
    a, b = 200 * torch.rand(3, 30, 2), 200 * torch.rand(3, 9, 2)
    exact = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(location_distances(a, b), exact, rtol=1e-6, atol=1e-5)


def test_feature_distances():
    a, b = torch.randn(3, 30, 16) + 2, torch.randn(3, 9, 16) + 2
    exact = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")
    ours = feature_distances(a, b).double()
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
    half = feature_distances(a.bfloat16(), b.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        again = feature_distances(a.bfloat16(), b.bfloat16())
    assert torch.equal(again, half) and half.dtype == torch.float32


def test_matches_are_exact_where_images_differ_more_than_their_locations():
    torch.manual_seed(0)
    image = torch.randn(64, 1, 128)
    a, b = image + 0.01 * torch.randn(2, 64, 49, 128)
    ours = closest(feature_distances(a, b), 20)
    exact = closest(feature_distances(a.double(), b.double()), 20)
    for found, right in zip(ours, exact):
        assert (found == right).all(1).float().mean() == 1  # 78% with the batch's mean taken off


def test_no_gradient_through_distances():
    (a, b), (pos_a, pos_b) = maps_and_positions()
    pos_a.requires_grad_()
    assert not location_distances(pos_a, pos_b).requires_grad
    assert not feature_distances(a, b).requires_grad
    distances = torch.rand(5, 16, 16, dtype=torch.float64, requires_grad=True)
    query, found = match(a, b, distances, 4)
    (query * found.detach()).sum().backward()
    assert distances.grad is None and b.grad is None
    assert (a.grad != 0).any(2).sum(1).tolist() == [4] * 5
    local_criterion(a, b, pos_a, pos_b, 4, 4)[0].backward()
    assert pos_a.grad is None


# --- the loss -------------------------------------------------------------------------------------

def pair(g, i, j):
    """The released local loss of two views: mean of both directions, each with its own number."""
    numbers = g["num_matches"].tolist()
    loss, terms = 0, {}
    for number, a, b in ((numbers[0], i, j), (numbers[1], j, i)):
        pos = [g[f"pos_{v}"].flatten(1, 2) for v in (a, b)]
        one, parts = local_criterion(g[f"map_{a}"], g[f"map_{b}"], *pos, number, None, **RELEASED)
        loss = loss + one / 2
        terms = {k: terms.get(k, 0) + RELEASED[f"{k}_coeff"] * v / 2 for k, v in parts.items()}
    return loss, terms


@pytest.mark.parametrize("name", ["vicregl_small", "vicregl_deep"])
def test_golden_loss(name):
    g = golden(name)
    for i in (0, 1):
        g[f"map_{i}"].requires_grad_()
    loss, terms = pair(g, 0, 1)
    loss.backward()
    for i in (0, 1):
        close(g[f"map_{i}"].grad, g[f"pair_grad_{i}"])
    pairs = [pair(g, i, j)[1] for i, j in ((0, 1), (0, 2), (1, 0), (1, 2))]
    for k in ("inv", "var", "cov"):
        close(terms[k], g[f"pair_{k}"])
        close(sum(p[k] for p in pairs) / 4, g[f"multi_{k}"])
    embeddings = [g[f"emb_{i}"] for i in range(3)]
    _, parts = vicregl_loss(embeddings, None, None, alpha=1.0)
    close(25 * parts["inv"], g["global_inv"])
    # Difference 5: the release averages these over views
    close(2 * 12.5 * sum(vicreg.variance(z) for z in embeddings) / 3, g["global_var"])
    close(2 * 0.5 * sum(vicreg.covariance(z) for z in embeddings) / 3, g["global_cov"])
    var, cov = vicregl.variance_and_covariance(torch.stack(embeddings, 1))
    close(2 * 12.5 * var.mean(), g["global_var"])
    close(2 * 0.5 * cov.mean(), g["global_cov"])


def literal_local_criterion(map_a, map_b, pos_a, pos_b, num_matches, num_feature_matches):
    """Algorithm 1, location by location and image by image."""
    loss = 0
    kinds = ((pos_a, pos_b, num_matches), (map_a, map_b, num_feature_matches))
    for of_a, of_b, number in kinds:
        filtered, filtered_nn = [], []
        for image in range(len(map_a)):
            found, at = [], []
            for hw in range(map_a.shape[1]):
                l2_dist = [torch.dist(of_a[image, hw], other).item() for other in of_b[image]]
                at.append(int(np.argmin(l2_dist)))
                found.append(min(l2_dist))
            best = sorted(np.argsort(found, kind="stable")[:number])
            filtered.append(torch.stack([map_a[image, hw] for hw in best]))
            filtered_nn.append(torch.stack([map_b[image, at[hw]] for hw in best]))
        z_a, z_b = torch.stack(filtered, 1), torch.stack(filtered_nn, 1)  # (M, B, D)
        loss = loss + sum(algorithm_1(a, b) for a, b in zip(z_a, z_b)) / len(z_a)
    return loss


@pytest.mark.parametrize("batch,grids,dim,numbers", [
    (5, (4, 4), 9, (6, 3)), (9, (3, 5), 4, (9, 5)), (4, (4, 2), 4, (7, 7)),
])
def test_local_criterion_is_algorithm_1(batch, grids, dim, numbers):
    maps, pos = maps_and_positions(batch, grids, dim)
    theirs, _ = maps_and_positions(batch, grids, dim)
    ours = local_criterion(*maps, *pos, *numbers)[0]
    literal = literal_local_criterion(*theirs, *pos, *numbers)
    ours.backward()
    literal.backward()
    close(ours, literal)
    for a, b in zip(maps, theirs):
        close(a.grad, b.grad)


def test_one_kind_of_match_alone():
    maps, pos = maps_and_positions(5, (4, 4), 9)
    both, parts = local_criterion(*maps, *pos, 6, 3)
    place, of_place = local_criterion(*maps, *pos, 6, 3, match_by="place")
    content, of_content = local_criterion(*maps, *pos, 6, 3, match_by="content")
    close(both, place + content)
    for name in parts:
        close(parts[name], of_place[name] + of_content[name])
    other = [maps[0][..., :2], maps[1][..., :2]]  # places, which do not matter to the content
    close(local_criterion(*maps, *other, 6, 3, match_by="content")[0], content)
    assert not torch.allclose(place, content)

    embeddings = [torch.randn(5, 8, dtype=torch.float64) for _ in range(2)]
    total, _ = vicregl_loss(embeddings, maps, pos, 0.0, (6, 6), (3, 3), match_by="place")
    back, _ = local_criterion(*maps[::-1], *pos[::-1], 6, 3, match_by="place")
    close(total, (place + back) / 2)


def test_gradcheck():
    maps, pos = maps_and_positions(3, (2, 2), 3)
    assert torch.autograd.gradcheck(lambda a, b: local_criterion(a, b, *pos, 3, 2)[0], maps)


@pytest.mark.parametrize("n,d", [(6, 10), (10, 6), (6, 6)])
def test_local_statistics_are_those_of_each_index(n, d):
    z = torch.randn(n, 2, 7, d, dtype=torch.float64)
    var, cov = vicregl.variance_and_covariance(z)
    each = z.flatten(1, 2).unbind(1)
    close(var, torch.stack([vicreg.variance(x) for x in each]))
    close(cov, torch.stack([vicreg.covariance(x) for x in each]))
    ours, parts = vicregl.vicreg_loss(z[:, 0], z[:, 1], 3.0, 2.0, 1.0)
    theirs = [vicreg.vicreg_loss(a, b, 3.0, 2.0, 1.0)[0] for a, b in zip(each[:7], each[7:])]
    close(ours, sum(theirs) / 7)
    close(vicregl.vicreg_loss(each[0], each[1])[0], vicreg.vicreg_loss(each[0], each[1])[0])


def test_embeddings_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="different shapes"):
        vicregl.vicreg_loss(torch.rand(4, 6), torch.rand(4, 1))
    with pytest.raises(ValueError, match="different shapes"):
        vicregl.vicreg_loss(torch.rand(4, 3, 6), torch.rand(4, 1, 6))


def several_views(batch=6, grids=(4, 4, 2, 2)):
    maps, pos = maps_and_positions(batch, grids)
    return [torch.randn(batch, 12, dtype=torch.float64) for _ in grids], maps, pos


def test_alpha():
    embeddings, maps, pos = several_views(grids=(4, 4))
    z = [e.clone().requires_grad_() for e in embeddings]
    w = [e.clone().requires_grad_() for e in embeddings]
    loss, parts = vicregl_loss(z, maps, pos, alpha=1.0)
    theirs, terms = vicreg.vicreg_loss(*w)
    loss.backward()
    theirs.backward()
    close(loss, theirs)
    for a, b in zip(z, w):
        close(a.grad, b.grad)
    for k in terms:
        close(parts[k], terms[k])
    both = [local_criterion(maps[a], maps[b], pos[a], pos[b])[0] for a, b in ((0, 1), (1, 0))]
    local = sum(both) / 2
    close(vicregl_loss(embeddings, maps, pos, alpha=0.0)[0], local)
    close(vicregl_loss(embeddings, maps, pos, alpha=0.3)[0], 0.3 * theirs + 0.7 * local)


def test_alpha_of_1_or_0_does_not_compute_the_other_criterion():
    embeddings, maps, pos = several_views()
    _, parts = vicregl_loss(embeddings, None, None, alpha=1.0)
    assert list(parts) == ["inv", "var", "cov"]
    loss, parts = vicregl_loss(None, maps, pos, alpha=0.0)
    assert list(parts) == ["local_inv", "local_var", "local_cov"]
    for alpha in (1.0, 0.0):  # where both are given, no zero gradients either
        z = [e.clone().requires_grad_() for e in embeddings]
        m = [x.detach().clone().requires_grad_() for x in maps]
        vicregl_loss(z, m, pos, alpha)[0].backward()
        assert all((x.grad is None) == (alpha == 0) for x in z)
        assert all((x.grad is None) == (alpha == 1) for x in m)


@pytest.mark.parametrize("grids", [(4, 4), (4, 4, 2), (3, 3, 2, 2, 2)])
def test_pairs_of_views(grids):
    embeddings, maps, pos = several_views(grids=grids)
    numbers = {v: (5, 6) if v < 2 else (3, 2) for v in range(len(grids))}
    pairs = [(i, j) for i in (0, 1) for j in range(len(grids)) if i != j]
    coefficients = (3.0, 2.0, 1.0)
    whole, local = 0, 0
    for i, j in pairs:
        whole += vicreg.vicreg_loss(embeddings[i], embeddings[j], *coefficients)[0] / len(pairs)
        for a, b in ((i, j), (j, i)):
            one, _ = local_criterion(maps[a], maps[b], pos[a], pos[b], *numbers[a], *coefficients)
            local += one / (2 * len(pairs))
    loss, parts = vicregl_loss(embeddings, maps, pos, 0.6, (5, 3), (6, 2), *coefficients)
    close(loss, 0.6 * whole + 0.4 * local)
    again = 0
    for coefficient, k in zip(coefficients, ("inv", "var", "cov")):
        again += coefficient * (0.6 * parts[k] + 0.4 * parts[f"local_{k}"])
    close(loss, again)


def test_pairs_side_by_side_give_the_mean():
    maps, pos = maps_and_positions(6, (3, 3, 2, 2))
    a, b = torch.stack(maps[:2], 1), torch.stack(maps[2:], 1)
    loss, _ = local_criterion(a, b, torch.stack(pos[:2], 1), torch.stack(pos[2:], 1), 4, 5)
    one = local_criterion(maps[0], maps[2], pos[0], pos[2], 4, 5)[0]
    other = local_criterion(maps[1], maps[3], pos[1], pos[3], 4, 5)[0]
    close(loss, (one + other) / 2)


def test_training_calls_algorithm_1(monkeypatch):
    calls = []

    def spy(*args):
        calls.append([tuple(x.shape) for x in args[:2]] + list(args[4:6]))
        return local_criterion(*args)
    monkeypatch.setattr(vicregl, "local_criterion", spy)
    embeddings, maps, pos = several_views()
    vicregl_loss(embeddings[:2], maps[:2], pos[:2])
    assert calls == [[(6, 2, 16, 6), (6, 2, 16, 6), 20, 20]]
    calls.clear()
    vicregl_loss(embeddings, maps, pos, num_matches=(20, 4))
    large, small = (6, 4, 16, 6), (6, 4, 4, 6)
    assert calls[1:] == [[large, small, 20, 20], [small, large, 4, 20]]


def test_half_precision_inputs_give_a_float32_loss():
    embeddings, maps, pos = several_views(grids=(4, 4, 2))
    half = [[100 * t.detach().to(torch.bfloat16) for t in x] for x in (embeddings, maps)]
    pos = [p.float() for p in pos]
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = vicregl_loss(*half, pos)
    assert loss.dtype == torch.float32
    assert all(v.dtype == torch.float32 for v in parts.values())
    double = [[t.double() for t in x] for x in half]
    exact = vicregl_loss(*double, [p.double() for p in pos])[0]
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)


# --- the model ------------------------------------------------------------------------------------

def test_multicrop_shapes_and_one_pass_per_size():
    backbone = common.build_backbone("tiny_convnet")
    model = vicregl.VICRegL(backbone, (16, 8), (12, 6), num_classes=3)
    passes = []
    backbone.register_forward_hook(lambda module, inputs, _: passes.append(inputs[0].shape))
    views = [torch.randn(2, 3, 56, 56) for _ in range(2)]
    views += [torch.randn(2, 3, 24, 24) for _ in range(6)]
    embeddings, maps, logits = model(views)
    assert passes == [(4, 3, 56, 56), (12, 3, 24, 24)]
    assert logits.shape == (2, 3)
    assert [tuple(z.shape) for z in embeddings] == [(2, 8)] * 8
    assert [tuple(m.shape) for m in maps] == [(2, 49, 6)] * 2 + [(2, 9, 6)] * 6
    boxes = 50 * torch.rand(2, 8, 4) + 5
    flips = torch.arange(16).view(2, 8) % 3 == 0
    pos = map_positions(boxes, flips, maps)
    for v, grid in enumerate([7] * 2 + [3] * 6):
        assert torch.equal(pos[v], positions(boxes[:, v], flips[:, v], grid).flatten(1, 2))
    loss, parts = vicregl_loss(embeddings, maps, pos, num_matches=(20, 4))
    loss.backward()
    untrained = [name for name, p in model.named_parameters() if p.grad is None]
    assert untrained == ["probe.weight", "probe.bias"]
    assert list(parts) == ["inv", "var", "cov", "local_inv", "local_var", "local_cov"]


def test_views_keep_their_order_and_locations():
    model = vicregl.VICRegL(common.build_backbone("tiny_convnet"), (8, 8), (8, 6)).eval()
    sides = (16, 16, 8, 8)
    views = [torch.randn(2, 3, side, side) for side in sides]
    model.probe = torch.nn.Linear(256, 3)
    embeddings, maps, logits = model(views)
    expected = model.probe(model.backbone(views[0])[1])  # of the first view
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for view, z, m in zip(views, embeddings, maps):
        features, pooled = model.backbone(view)
        torch.testing.assert_close(model.projector(pooled), z, rtol=1e-4, atol=1e-5)
        for location in range(m.shape[1]):
            local = model.local_projector(features[:, location])
            torch.testing.assert_close(local, m[:, location], rtol=1e-4, atol=1e-5)


def test_a_model_of_one_criterion_has_one_projector():
    views = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    boxes, flips = 50 * torch.rand(4, 2, 4) + 5, torch.zeros(4, 2, dtype=torch.bool)
    for alpha, widths, absent in ((1.0, ((8, 8), None), "local_projector"),
                                  (0.0, (None, (8, 8)), "projector")):
        model = vicregl.VICRegL(common.build_backbone("tiny_convnet"), *widths)
        embeddings, maps, _ = model(views)
        pos = map_positions(boxes, flips, maps)
        vicregl_loss(embeddings, maps, pos, alpha)[0].backward()
        assert all(p.grad is not None for p in model.parameters())
        assert not any(name.startswith(f"{absent}.") for name, _ in model.named_parameters())


# --- the command line -----------------------------------------------------------------------------

@pytest.mark.parametrize("alpha,trained,absent", [(1, "", "local_"), (0, "local_", "")])
def test_only_what_is_trained_is_logged_and_saved(alpha, trained, absent, flags, tmp_path):
    args = (*flags("vicregl"), "--epochs", 1, "--alpha", alpha, "--out", tmp_path, "--name", "run")
    assert helpers.run("vicregl", *args) == 0
    names = checkpoint(tmp_path / "run")["model"]
    assert any(name.startswith(f"{trained}projector") for name in names)
    assert not any(name.startswith(f"{absent}projector") for name in names)
    for line in lines(tmp_path / "run"):
        for term in ("inv", "var", "cov"):
            assert np.isfinite(line[f"{trained}{term}"]) and f"{absent}{term}" not in line


def test_a_run_logs_all_terms_and_ends_with_its_evaluations(flags, tmp_path, monkeypatch):
    protocols = []
    monkeypatch.setattr(training.Run, "finish", lambda run, *names, **_: protocols.extend(names))
    args = (*flags("vicregl"), "--epochs", 1, "--out", tmp_path, "--name", "run")
    assert helpers.run("vicregl", *args) == 0
    assert protocols == ["knn", "correspond"]
    terms = {"loss", "inv", "var", "cov", "local_inv", "local_var", "local_cov", "std"}
    assert terms <= lines(tmp_path / "run")[-1].keys()


def test_recipes(monkeypatch):
    found = []
    monkeypatch.setattr(vicregl, "train", found.append)

    def recipe(*args):
        assert helpers.run("vicregl", *args) == 0
        return found.pop()
    r50 = recipe("--data", "imagenet")
    assert (r50.arch, r50.base_lr, r50.batch_size, r50.epochs) == ("resnet50", 0.3, 512, 100)
    assert r50.views == "two" and r50.num_matches == r50.num_feature_matches == [20, 20]
    assert r50.projector == [8192] * 3 and r50.local_projector == [512] * 3 and r50.alpha == 0.75
    for name, lr, batch in (("small", 0.00075, 384), ("base", 0.0005, 576)):
        args = recipe("--data", "imagenet", "--arch", f"convnext_{name}")
        assert (args.arch, args.base_lr, args.batch_size) == (f"convnext_{name}", lr, batch)
        assert (args.weight_decay, args.views, args.drop_path) == (0.05, "multicrop", 0.1)
        assert abs(args.final_lr / (lr * batch / 256) - 0.001) < 1e-9
    assert recipe("--data", "imagenet", "--arch", "convnext_tiny").arch == "convnext_tiny"
    assert recipe("--data", "shapes").arch == "tiny_convnet"
    assert recipe("--data", "shapes", "--num-matches", 20, 4).num_matches == [20, 4]


def test_convnext_optimizer():
    backbone = common.build_backbone("convnext_tiny")
    model = vicregl.VICRegL(backbone, (8, 8), (8, 8), norm=torch.nn.LayerNorm)
    names = {p: name for name, p in model.named_parameters()}
    optimizer = vicregl.make_optimizer("convnext_tiny", model, 0.05)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if names[p].endswith("bias") or p.ndim == 1:
                assert group["weight_decay"] == 0.0
            else:
                assert group["weight_decay"] == 0.05


def test_convnext_trains(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(common.CONVNEXTS, "convnext_tiny", ((8, 16, 16, 24), (1, 1, 1, 1)))
    args = (*flags("vicregl"), "--arch", "convnext_tiny", "--batch-size", 20, "--epochs", 1,
            "--warmup-epochs", 0, "--out", tmp_path, "--name", "run")
    assert helpers.run("vicregl", *args, "--size", 224) == 0
    last = lines(tmp_path / "run")[-1]
    for group in checkpoint(tmp_path / "run")["optimizer"]["param_groups"]:
        assert group["lr"] == pytest.approx(last["lr"])  # the local projector's too
    said = helpers.user_error(vicregl.main, monkeypatch, capsys, *args, "--size", 64)
    assert "views of 27 pixels: --size must make a multiple of 32, 64 or more" in said


@pytest.mark.parametrize("args,words", [
    (("--alpha", 2), "--alpha 2.0"),
    (("--alpha", -0.1), "--alpha -0.1"),
    (("--num-matches", 20), "--num-matches"),
    (("--num-matches", -1, 4), "--num-matches"),
    (("--projector", "big"), "--projector"),
    (("--drop-path", 1), "--drop-path"),
])
def test_bad_arguments(args, words, flags, tmp_path, monkeypatch, capsys):
    args = (*flags("vicregl"), *args, "--out", tmp_path)
    assert words in helpers.user_error(vicregl.main, monkeypatch, capsys, *args)
