"""vicregl.py: positions, matches and the loss against the paper, the golden numbers and vicreg.py; the training run."""
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, kill_tree, make_images, on_processes, script, start, user_error
from PIL import Image
from test_vicreg import algorithm_1, assert_same, outcome, wait_for_line

import common
import vicreg
import vicregl
from vicregl import closest, feature_distances, local_criterion, location_distances, match, positions, vicregl_loss

RELEASED = dict(inv_coeff=25.0, var_coeff=12.5, cov_coeff=0.5)


def golden(name):
    return {k: torch.tensor(v) for k, v in np.load(ROOT / f"tests/golden/{name}.npz").items()}


def close(ours, theirs, tolerance=1e-9):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def maps_and_positions(batch=5, grids=(4, 4), dim=6, seed=0):
    """Random maps V x (B, N, D) that require grad, and positions V x (B, N, 2) of random crops."""
    g = torch.Generator().manual_seed(seed)
    maps, pos = [], []
    for grid in grids:
        maps.append(torch.randn(batch, grid * grid, dim, generator=g, dtype=torch.float64).requires_grad_())
        boxes = 100 * torch.rand(batch, 4, generator=g, dtype=torch.float64) + 20
        pos.append(positions(boxes, torch.rand(batch, generator=g) < 0.5, grid).flatten(1, 2))
    return maps, pos


# --- positions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", "abcd")
def test_golden_positions(name):
    g = golden("positions")
    ours = positions(g[f"{name}_box"][None], g[f"{name}_flip"][None], len(g[f"{name}_grid"]))[0]
    torch.testing.assert_close(ours, g[f"{name}_grid"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("height,width", [(200, 256), (256, 64), (20, 24)])
def test_positions_are_where_cut_cuts(height, width):
    y, x = np.mgrid[0:height, 0:width].astype(np.uint8)
    image = Image.fromarray(np.stack([y, x, x], 2))  # each pixel holds its own coordinates; its centre is 0.5 further
    rng = random.Random(0)
    for grid, size in ((7, 224), (4, 64), (3, 96), (1, 8)):
        for flip in (False, True):
            box = vicregl.random_box(rng, height, width, (0.05, 1.0))
            seen = F.adaptive_avg_pool2d(common.cut(image, box, flip, size)[:2].float(), grid).permute(1, 2, 0) + 0.5
            where = positions(torch.tensor([box], dtype=torch.float32), torch.tensor([flip]), grid)[0]
            assert (seen - where).abs().max() < 0.6, (box, flip, grid)


def test_views():
    rng = random.Random(0)
    views = vicregl.sample_views(rng, 300, 400, vicregl.VIEWS["multicrop"], 224)
    assert [size for _, _, size in views] == [224] * 2 + [96] * 6
    draws = [vicregl.sample_views(rng, 300, 400, vicregl.VIEWS["multicrop"], 224) for _ in range(300)]
    areas = np.array([[h * w / 120000 for (_, _, h, w), _, _ in views] for views in draws])
    assert 0.39 < areas[:, :2].min() < 0.45 and areas[:, :2].max() > 0.9
    assert 0.078 < areas[:, 2:].min() < 0.09 and 0.38 < areas[:, 2:].max() < 0.41
    assert 0.45 < np.mean([[flip for _, flip, _ in views] for views in draws]) < 0.55
    views = vicregl.sample_views(rng, 300, 400, vicregl.VIEWS["two"], 224)
    assert [size for _, _, size in views] == [224] * 2


# --- matches -------------------------------------------------------------------------------------------------------


def grid_positions(box, flip=False, grid=7):
    return positions(torch.tensor([box], dtype=torch.float64), torch.tensor([flip]), grid).flatten(1, 2)  # (1, N, 2)


def nearest(pos_a, pos_b, num_matches=None):
    kept, found = closest(location_distances(pos_a, pos_b), num_matches)
    return kept[0].tolist(), found[0].tolist()


def test_identity_crops_match_themselves():
    pos = grid_positions((10, 20, 140, 70))
    assert nearest(pos, pos) == (list(range(49)), list(range(49)))
    maps = torch.randn(3, 49, 8)
    for distances in (feature_distances(maps, maps), location_distances(pos, pos).expand(3, -1, -1)):
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
    # shifted by a third of a cell and of different sizes: each pixel centre's own cell, within the overlap
    a, b = grid_positions((5, 5, 56, 56)), grid_positions((8, 8, 42, 42))
    cell = ((a[0] - 8) / 6).floor()
    inside = ((cell >= 0) & (cell < 7)).all(1)
    expected = (7 * cell[:, 0] + cell[:, 1]).long()
    assert inside.sum() >= 25 and torch.tensor(nearest(a, b)[1])[inside].tolist() == expected[inside].tolist()


def test_crops_apart_still_match():
    a, b = grid_positions((0, 0, 70, 70)), grid_positions((200, 300, 35, 35), grid=3)
    maps = torch.randn(1, 49, 8), torch.randn(1, 9, 8)
    query, found = match(*maps, location_distances(a, b), 20)
    assert query.shape == found.shape == (1, 20, 8)
    assert torch.equal(found, maps[1][:, :1].expand(-1, 20, -1))  # its upper left corner is nearest to all
    assert match(*maps, location_distances(a, b), 0)[0].shape == (1, 49, 8)
    assert match(*maps[::-1], location_distances(b, a), 20)[0].shape == (1, 9, 8)  # all that it has


@pytest.mark.parametrize("name", ["vicregl_small", "vicregl_deep"])
def test_golden_matches(name):
    g = golden(name)
    distances = {"loc": location_distances(g["pos_0"].flatten(1, 2), g["pos_1"].flatten(1, 2)),
                 "feat": feature_distances(g["map_0"], g["map_1"])}
    for kind, d in distances.items():
        query, found = match(g["map_0"], g["map_1"], d, int(g["num_matches"][0]))
        assert torch.equal(query, g[f"{kind}_query"]) and torch.equal(found, g[f"{kind}_match"])


def test_feature_distances():
    a, b = torch.randn(3, 30, 16) + 2, torch.randn(3, 9, 16) + 2
    exact = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(feature_distances(a, b).double(), exact, rtol=1e-4, atol=1e-4)
    half = feature_distances(a.bfloat16(), b.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(feature_distances(a.bfloat16(), b.bfloat16()), half) and half.dtype == torch.float32


def test_no_gradient_through_distances():
    (a, b), (pos_a, pos_b) = maps_and_positions()
    pos_a.requires_grad_()
    assert not location_distances(pos_a, pos_b).requires_grad and not feature_distances(a, b).requires_grad
    distances = torch.rand(5, 16, 16, dtype=torch.float64, requires_grad=True)
    query, found = match(a, b, distances, 4)
    (query * found.detach()).sum().backward()
    assert distances.grad is None and b.grad is None and (a.grad != 0).any(2).sum(1).tolist() == [4] * 5
    local_criterion(a, b, pos_a, pos_b, 4, 4)[0].backward()
    assert pos_a.grad is None


# --- the loss ------------------------------------------------------------------------------------------------------


def pair(g, i, j):
    """The released local loss of two views: mean of both directions, each with its own number of location matches."""
    numbers = g["num_matches"].tolist()
    loss, terms = 0, {}
    for number, a, b in ((numbers[0], i, j), (numbers[1], j, i)):
        pos = (g[f"pos_{v}"].flatten(1, 2) for v in (a, b))
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
    _, parts = vicregl_loss(embeddings, [g[f"map_{i}"] for i in range(3)], [g[f"pos_{i}"].flatten(1, 2) for i in range(3)])
    close(25 * parts["inv"], g["global_inv"])
    close(2 * 12.5 * sum(vicregl.variance(z) for z in embeddings) / 3, g["global_var"])  # Differences, 5: a mean over views
    close(2 * 0.5 * sum(vicregl.covariance(z) for z in embeddings) / 3, g["global_cov"])


def literal_local_criterion(map_a, map_b, pos_a, pos_b, num_matches, num_feature_matches):
    """Algorithm 1, location by location and image by image."""
    loss = 0
    kinds = ((pos_a, pos_b, num_matches), (map_a, map_b, num_feature_matches))
    for of_a, of_b, number in kinds:
        filtered, filtered_nn = [], []
        for image in range(len(map_a)):
            found, at = [], []
            for hw in range(map_a.shape[1]):
                l2_dist = [torch.dist(of_a[image, hw], of_b[image, other]).item() for other in range(map_b.shape[1])]
                at.append(int(np.argmin(l2_dist)))
                found.append(min(l2_dist))
            best = sorted(np.argsort(found, kind="stable")[:number])
            filtered.append(torch.stack([map_a[image, hw] for hw in best]))
            filtered_nn.append(torch.stack([map_b[image, at[hw]] for hw in best]))
        z_a, z_b = torch.stack(filtered, 1), torch.stack(filtered_nn, 1)  # (n, B, D)
        loss = loss + sum(algorithm_1(a, b) for a, b in zip(z_a, z_b)) / len(z_a)
    return loss


@pytest.mark.parametrize("batch,grids,dim,numbers", [(5, (4, 4), 9, (6, 3)), (9, (3, 5), 4, (9, 5)), (4, (4, 2), 4, (7, 7))])
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


def test_gradcheck():
    maps, pos = maps_and_positions(3, (2, 2), 3)
    assert torch.autograd.gradcheck(lambda a, b: local_criterion(a, b, *pos, 3, 2)[0], maps)


@pytest.mark.parametrize("n,d", [(6, 10), (10, 6), (6, 6)])
def test_local_statistics_are_those_of_each_index(n, d):
    z = torch.randn(n, 7, d, dtype=torch.float64)
    for ours, theirs in ((vicregl.variance, vicreg.variance), (vicregl.covariance, vicreg.covariance)):
        close(ours(z), torch.stack([theirs(z[:, i]) for i in range(7)]).mean())
        close(ours(z[:, 0]), theirs(z[:, 0]))


def three_views(batch=6, seed=0):
    maps, pos = maps_and_positions(batch, (4, 4, 2), seed=seed)
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 12, generator=g, dtype=torch.float64) for _ in range(3)], maps, pos


def test_alpha():
    embeddings, maps, pos = (x[:2] for x in three_views())
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
    both = sum(local_criterion(maps[a], maps[b], pos[a], pos[b])[0] for a, b in ((0, 1), (1, 0))) / 2
    close(vicregl_loss(embeddings, maps, pos, alpha=0.0)[0], both)
    close(vicregl_loss(embeddings, maps, pos, alpha=0.3)[0], 0.3 * theirs + 0.7 * both)


def test_pairs_of_more_views():
    embeddings, maps, pos = three_views()
    numbers = {0: (5, 6), 1: (5, 6), 2: (3, 2)}
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2)]
    expected = sum(vicreg.vicreg_loss(embeddings[i], embeddings[j], 3.0, 2.0, 1.0)[0] for i, j in pairs) / 4
    local = sum(local_criterion(maps[a], maps[b], pos[a], pos[b], *numbers[a], 3.0, 2.0, 1.0)[0]
                for i, j in pairs for a, b in ((i, j), (j, i))) / 8
    loss, parts = vicregl_loss(embeddings, maps, pos, 0.6, (5, 3), (6, 2), 3.0, 2.0, 1.0)
    close(loss, 0.6 * expected + 0.4 * local)
    again = sum(c * (0.6 * parts[k] + 0.4 * parts[f"local_{k}"]) for k, c in (("inv", 3.0), ("var", 2.0), ("cov", 1.0)))
    close(loss, again)


def test_half_precision_inputs_give_a_float32_loss():
    embeddings, maps, pos = three_views()
    half = [[100 * t.detach().to(torch.bfloat16) for t in views] for views in (embeddings, maps)]
    pos = [p.float() for p in pos]
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = vicregl_loss(*half, pos)
    assert loss.dtype == torch.float32 and all(v.dtype == torch.float32 for v in parts.values())
    exact = vicregl_loss(*([t.double() for t in views] for views in half), [p.double() for p in pos])[0]
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)


def _ddp(rank, world, dims):
    """Loss and parameter gradients for each width of the local features, of this process's share of 12 images."""
    results = []
    for d in dims:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, d)).double()
        mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
        _, pos = maps_and_positions(12, (3, 3, 2))
        x = [torch.randn(12, p.shape[1], 5, dtype=torch.float64)[mine] for p in pos]
        net = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
        maps = net(torch.cat([v.flatten(0, 1) for v in x])).split([v.shape[0] * v.shape[1] for v in x])
        maps = [m.unflatten(0, v.shape[:2]) for m, v in zip(maps, x)]
        loss, _ = vicregl_loss([m.mean(1) for m in maps], maps, [p[mine] for p in pos], num_matches=(5,))
        loss.backward()
        results.append((loss.item(), [p.grad for p in model.parameters()]))
    return results


def test_processes_equal_one(tmp_path):
    dims = [4, 40]  # fewer and more than the 12 rows
    shares = on_processes(2, tmp_path, _ddp, dims)
    for i, (loss, grads) in enumerate(_ddp(0, 1, dims)):
        assert abs(sum(s[i][0] for s in shares) / 2 - loss) < 1e-9
        for share in shares:
            for a, b in zip(grads, share[i][1]):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


# --- the model -----------------------------------------------------------------------------------------------------


def test_multicrop_shapes_and_one_pass_per_size():
    backbone = common.build_backbone("tiny_convnet")
    model, passes = vicregl.VICRegL(backbone, (16, 8), (12, 6), num_classes=3), []
    backbone.register_forward_hook(lambda module, inputs, output: passes.append(tuple(inputs[0].shape)))
    views = [torch.randn(2, 3, 56, 56) for _ in range(2)] + [torch.randn(2, 3, 24, 24) for _ in range(6)]
    embeddings, maps, logits = model(views)
    assert passes == [(4, 3, 56, 56), (12, 3, 24, 24)] and logits.shape == (2, 3)
    assert [tuple(z.shape) for z in embeddings] == [(2, 8)] * 8
    assert [tuple(m.shape) for m in maps] == [(2, 49, 6)] * 2 + [(2, 9, 6)] * 6
    boxes = 50 * torch.rand(2, 8, 4) + 5
    flips = torch.arange(16).view(2, 8) % 3 == 0
    pos = vicregl.map_positions(boxes, flips, maps)
    for v, grid in enumerate([7] * 2 + [3] * 6):
        assert torch.equal(pos[v], vicregl.positions(boxes[:, v], flips[:, v], grid).flatten(1, 2))
    loss, parts = vicregl_loss(embeddings, maps, pos, num_matches=(20, 4))
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("probe"))
    assert list(parts) == ["inv", "var", "cov", "local_inv", "local_var", "local_cov"]


def test_views_keep_their_order_and_locations():
    model = vicregl.VICRegL(common.build_backbone("tiny_convnet"), (8, 8), (8, 6)).eval()
    views = [torch.randn(2, 3, 16 if v < 2 else 8, 16 if v < 2 else 8) for v in range(4)]
    embeddings, maps, _ = model(views)
    for view, z, m in zip(views, embeddings, maps):
        features, pooled = model.backbone(view)
        torch.testing.assert_close(model.projector(pooled), z, rtol=1e-4, atol=1e-5)
        for location in range(m.shape[1]):
            torch.testing.assert_close(model.local_projector(features[:, location]), m[:, location], rtol=1e-4, atol=1e-5)


def test_copied_alone(tmp_path):
    shutil.copy(ROOT / "vicregl.py", tmp_path)
    code = ("import torch, vicregl, importlib.util; assert importlib.util.find_spec('common') is None;"
            "net = torch.nn.Module(); net.dim = 4;"
            "net.forward = lambda x: ((x.flatten(2).mT @ torch.ones(3, 4)), x.mean((2, 3)) @ torch.ones(3, 4));"
            "z, maps, _ = vicregl.VICRegL(net, (8, 8), (8, 8))([torch.randn(6, 3, 9, 9) for _ in range(2)]);"
            "pos = vicregl.map_positions(torch.rand(6, 2, 4), torch.zeros(6, 2, dtype=torch.bool), maps);"
            "loss, parts = vicregl.vicregl_loss(z, maps, pos); loss.backward(); print(loss.item(), *parts)")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[1:4] == ["inv", "var", "cov"], done.stderr


# --- the command line ----------------------------------------------------------------------------------------------

SMALL = ("--arch", "tiny_convnet", "--size", 32, "--projector", "32-32", "--local-projector", "16-16", "--batch-size", 8,
         "--base-lr", 1, "--warmup-epochs", 1, "--epochs", 3, "--log-every", 1, "--save-minutes", 0)  # 5 steps an epoch


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make_images(folder / "train", 44)
    make_images(folder / "val", 10, seed=1)
    return folder


def run_here(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["vicregl.py", *map(str, args)])
    vicregl.main()


def test_killed_and_resumed_is_bit_identical(images, tmp_path):
    command = ("vicregl.py", "--data", images, *SMALL, "--out", tmp_path)
    whole = script(*command, "--name", "whole", "--workers", 0)
    assert whole.returncode == 0, whole.stderr
    assert "20-NN" in whole.stdout and "of the feature matches are the nearest location too" in whole.stdout
    assert whole.stdout.count("note: views of 32 pixels have 16 locations, so --num-matches is 16 for them, not 20") == 1
    process = start(*command, "--name", "cut", "--workers", 1)
    wait_for_line(tmp_path / "cut", 4, process)
    kill_tree(process.pid)
    process.communicate(timeout=60)
    resumed = script(*command, "--name", "cut", "--workers", 2)
    assert resumed.returncode == 0 and int(resumed.stdout.split("resumed at step ")[1].split()[0]) < 15, resumed.stderr
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))


def test_torchrun_multicrop(images, tmp_path):
    done = script("vicregl.py", "--data", images, *SMALL, "--views", "multicrop", "--num-matches", 8, 2, "--workers", 0,
                  "--batch-size", 20, "--epochs", 1, "--out", tmp_path, "--name", "two", torchrun=2)
    assert done.returncode == 0, done.stderr
    assert "2 on cpu, 10 images each" in done.stdout and "20-NN" in done.stdout
    assert done.stdout.count("of the feature matches are the nearest location too") == 1
    assert "--num-matches is" not in done.stdout and done.stdout.count("--num-feature-matches is 4 for them, not 20") == 1
    last = json.loads(open(tmp_path / "two" / "log.jsonl").readlines()[-1])
    assert last["step"] == 2 and all(np.isfinite(last[f"local_{k}"]) for k in ("inv", "var", "cov"))


def test_convnext_recipe(monkeypatch, tmp_path):
    class Stop(Exception):
        pass

    def stop(args):
        raise Stop(args)
    monkeypatch.setattr(vicregl, "train", stop)

    def recipe(*args):
        with pytest.raises(Stop) as stopped:
            run_here(monkeypatch, *args)
        return stopped.value.args[0]
    r50, small = recipe("--data", "imagenet"), recipe("--data", "imagenet", "--arch", "convnext_small")
    assert (r50.arch, r50.base_lr, r50.batch_size, r50.epochs, r50.views) == ("resnet50", 0.3, 512, 100, "two")
    assert (small.arch, small.base_lr, small.batch_size, small.weight_decay) == ("convnext_small", 0.00075, 384, 0.05)
    assert (small.views, small.drop_path, small.local_lr_ratio) == ("multicrop", 0.1, 0.1)
    assert abs(small.final_lr / (small.base_lr * 384 / 256) - 0.001) < 1e-9
    assert recipe("--data", "imagenet", "--arch", "convnext_tiny").arch == "convnext_tiny"
    assert recipe("--data", "shapes").arch == "tiny_convnet"


def test_convnext_optimizer():
    class Args:
        arch, weight_decay, local_lr_ratio = "convnext_tiny", 0.05, 0.1
    model = vicregl.VICRegL(common.build_backbone("convnext_tiny"), (8, 8), (8, 8), norm=torch.nn.LayerNorm)
    names = {p: name for name, p in model.named_parameters()}
    optimizer = vicregl.make_optimizer(Args, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.0 if names[p].endswith(("bias", "layer_scale")) or p.ndim == 1 else 0.05)
            assert group["lr_ratio"] == (0.1 if "local_projector" in names[p] else 1.0)


def test_convnext_trains(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(common.CONVNEXTS, "convnext_tiny", ((8, 16, 16, 24), (1, 1, 1, 1)))
    args = ("--data", images, "--arch", "convnext_tiny", "--size", 80, "--projector", "16-16", "--local-projector", "16-16",
            "--batch-size", 20, "--epochs", 1, "--warmup-epochs", 0, "--workers", 0, "--out", tmp_path)
    run_here(monkeypatch, *args, "--name", "whole")
    assert "views of 34 pixels have 1 locations, so --num-matches is 1 for them, not 20" in capsys.readouterr().out
    state = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)["optimizer"]
    lr = {group["lr_ratio"]: group["lr"] for group in state["param_groups"]}
    assert lr[0.1] == pytest.approx(0.1 * lr[1.0])
    said = user_error(vicregl.main, monkeypatch, capsys, *args, "--size", 64)
    assert "views of 27 pixels are smaller than one stride of convnext_tiny: --size 75 at least, or --views two" in said
