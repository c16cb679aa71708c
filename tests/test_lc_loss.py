"""lc_loss.py: correspondences against pixels, the loss against a loop, BYOL's target, the training run."""
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, kill_tree, make_images, on_processes, script, start, user_error
from PIL import Image

import common
import lc_loss
from lc_loss import byol_loss, correspondences, local_contrastive_loss, local_mse_loss


def maps(b=3, d=5, h=4, w=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, b, d, h, w, generator=g, dtype=torch.float64)


def somewhere(b=3, h=4, w=4, reach=1.3, seed=1):
    points = (2 * torch.rand(b, h, w, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1) * reach
    return points, (points.abs() <= 1).all(3)


def by_hand(f_c, f_sc, points, valid, temperature):
    """Eqs. (2)-(4), point by point, with bilinear interpolation by hand."""
    images = []
    for a, t, p, v in zip(f_c, f_sc, points, valid):
        losses = []
        for i in range(a.shape[1]):
            for j in range(a.shape[2]):
                if not v[i, j]:
                    continue
                nll = torch.empty(t.shape[1:], dtype=t.dtype)
                cosine = torch.stack([torch.stack([a[:, i, j] @ t[:, y, x] / a[:, i, j].norm() / t[:, y, x].norm()
                                                   for x in range(t.shape[2])]) for y in range(t.shape[1])])
                nll = -(cosine / temperature - torch.logsumexp(cosine.flatten() / temperature, 0))
                x, y = (((p[i, j, k] + 1) / 2 * t.shape[2 - k] - 0.5).clamp(0, t.shape[2 - k] - 1).item() for k in (0, 1))
                x0, y0 = min(int(x), t.shape[2] - 2), min(int(y), t.shape[1] - 2)
                fx, fy = x - x0, y - y0
                losses.append((1 - fy) * ((1 - fx) * nll[y0, x0] + fx * nll[y0, x0 + 1])
                              + fy * ((1 - fx) * nll[y0 + 1, x0] + fx * nll[y0 + 1, x0 + 1]))
        if losses:
            images.append(torch.stack(losses).mean())
    return torch.stack(images).mean()


def test_loss_is_eqs_2_to_4():
    (f_c, f_sc), (points, valid) = maps(), somewhere()
    assert 0 < valid.sum() < valid.numel()
    a, b = (f_sc.clone().requires_grad_() for _ in range(2))
    ours, theirs = local_contrastive_loss(f_c, a, points, valid, 0.1), by_hand(f_c, b, points, valid, 0.1)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(a.grad, b.grad)


def centres(h, w):
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    return 2 * torch.stack([x, y], 2).double() - 1


def test_whole_cells_make_it_cross_entropy():
    f_c, f_sc = maps()
    points = centres(4, 4).flip(1).expand(3, -1, -1, -1)  # each cell lies at its mirror cell
    target = torch.arange(16).view(4, 4).flip(1).flatten()
    logits = F.normalize(f_c.flatten(2), dim=1).mT @ F.normalize(f_sc.flatten(2), dim=1) / 0.2
    expected = F.cross_entropy(logits.flatten(0, 1), target.repeat(3))
    ours = local_contrastive_loss(f_c, f_sc, points, torch.ones(3, 4, 4, dtype=torch.bool), 0.2)
    torch.testing.assert_close(ours, expected)
    perfect = local_mse_loss(f_c, f_c.flip(3), points, torch.ones(3, 4, 4, dtype=torch.bool))
    torch.testing.assert_close(perfect.item(), 0.0, atol=1e-9, rtol=0)


@pytest.mark.parametrize("loss", [local_contrastive_loss, local_mse_loss])
def test_points_outside_contribute_nothing(loss):
    (f_c, f_sc), (points, valid) = maps(), somewhere()
    f_c, f_sc = f_c.requires_grad_(), f_sc.requires_grad_()
    loss(f_c, f_sc, points, valid).backward()
    assert not f_c.grad.permute(0, 2, 3, 1)[~valid].any() and f_c.grad.permute(0, 2, 3, 1)[valid].any()
    moved = torch.where(valid[..., None], points, 5 * points)
    torch.testing.assert_close(loss(f_c, f_sc, moved, valid), loss(f_c, f_sc, points, valid))


@pytest.mark.parametrize("loss", [local_contrastive_loss, local_mse_loss])
def test_views_without_a_common_point(loss):
    (f_c, f_sc), (points, valid) = maps(), somewhere()
    alone = loss(f_c[1:], f_sc[1:], points[1:], valid[1:])
    valid[0] = False
    f_sc = f_sc.clone().requires_grad_()
    one = loss(f_c, f_sc, points, valid)
    torch.testing.assert_close(one, alone)  # the image without any counts nothing
    nothing = loss(f_c, f_sc, points, torch.zeros_like(valid))
    (one + nothing).backward()
    assert nothing == 0 and f_sc.grad.isfinite().all() and not f_sc.grad[0].any()


@pytest.mark.parametrize("loss", [local_contrastive_loss, local_mse_loss])
def test_scale_changes_nothing(loss):
    (f_c, f_sc), (points, valid) = maps(), somewhere()
    if loss is local_mse_loss:  # interpolation mixes neighbours, so one factor for the whole map
        factor = 7.0
    else:
        factor = torch.rand(3, 1, 4, 4, dtype=torch.float64) + 0.1
    torch.testing.assert_close(loss(3 * f_c, factor * f_sc, points, valid), loss(f_c, f_sc, points, valid))


def test_byol_loss():
    q, g = torch.randn(2, 6, 4, dtype=torch.float64)
    expected = (F.normalize(q, dim=1) - F.normalize(g, dim=1)).square().sum(1).mean()  # the same, as a distance
    torch.testing.assert_close(byol_loss(q, g), expected)
    assert byol_loss(q, 3 * q).abs() < 1e-12


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", [(0, 0, 160, 200), (20, 50, 100, 80), (61, 3, 99, 130), (0, 0, 40, 40)])
def test_correspondences_land_on_the_same_pixels(box, flip):
    box = tuple(side // 2 for side in box)
    y, x = 2 * np.mgrid[0:80, 0:100].astype(np.uint8)  # bytes hold half pixels
    image, grid, size = Image.fromarray(np.stack([x, y, 0 * x], 2)), 7, 112
    view = common.cut(image, box, flip, size).double()[None]
    points, valid = correspondences(torch.tensor([box]).float(), torch.tensor([flip]), torch.tensor([[80, 100]]), grid)
    shown = F.grid_sample(view, points.double(), padding_mode="border", align_corners=False)[0, :2] / 2  # (x, y)
    true_x = ((torch.arange(grid) + 0.5) / grid * 100 - 0.5).expand(grid, -1)
    true_y = ((torch.arange(grid) + 0.5) / grid * 80 - 0.5)[:, None].expand(-1, grid)
    top, left, height, width = box
    inside = (true_x + 0.5 >= left) & (true_x + 0.5 <= left + width) & (true_y + 0.5 >= top) & (true_y + 0.5 <= top + height)
    assert torch.equal(valid[0], inside) and valid.any()
    error = (shown - torch.stack([true_x, true_y])).abs().amax(0)
    assert error[inside].max() < 0.5


def tiny(classes=0):
    torch.manual_seed(0)
    return lc_loss.BYOL(common.TinyConvNet(), (16, 8), classes)


def test_target_moves_as_an_average_and_gets_no_gradient():
    model = tiny()
    first = [p.clone() for p in model.target.parameters()]
    online = [p for name in model.target for p in getattr(model, name).parameters()]
    seen = []
    for _ in range(3):
        for p in online:
            p.data += torch.randn_like(p)
        seen.append([p.clone() for p in online])
        model.update_target(0.9)
    for p, start_, *path in zip(model.target.parameters(), first, *seen):
        expected = 0.9 ** 3 * start_ + 0.1 * (0.81 * path[0] + 0.9 * path[1] + path[2])
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5)
    q_c, q_sc, g_c, g_sc, f_c, f_sc, _ = model(*torch.randn(2, 4, 3, 32, 32))
    assert not any(t.requires_grad for t in (g_c, g_sc, f_c)) and f_c.shape == f_sc.shape == (4, 256, 4, 4)
    (byol_loss(q_c, g_sc) + byol_loss(q_sc, g_c) + f_sc.mean()).backward()
    assert all(p.grad is None for p in model.target.parameters())
    for name in ("backbone", "projector", "predictor", "local"):
        assert all(p.grad is not None for p in getattr(model, name).parameters())


def test_views_and_networks_are_paired():
    model = tiny(3)  # at the start, the target is the online network
    x_c, x_sc = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        q_c, q_sc, g_c, g_sc, f_c, f_sc, logits = model(x_c, x_sc)
        for x, q, g, f in ((x_c, q_c, g_c, f_c), (x_sc, q_sc, g_sc, f_sc)):
            maps, pooled = model.backbone(x)
            torch.testing.assert_close(g, model.projector(pooled))
            torch.testing.assert_close(q, model.predictor(g))
            torch.testing.assert_close(f, model.project_maps(model.local, maps))
        torch.testing.assert_close(logits, model.probe(model.backbone(x_c)[1]))


@pytest.mark.parametrize("kind", ["contrastive", "mse"])
def test_total_is_eq_5(kind):
    q_c, q_sc, g_c, g_sc = torch.randn(4, 3, 6, dtype=torch.float64)
    (f_c, f_sc), (points, valid) = maps(), somewhere()
    loss, parts = lc_loss.lc_loss(q_c, q_sc, g_c, g_sc, f_c, f_sc, points, valid, 0.3, 0.2, kind)
    torch.testing.assert_close(parts["byol"], byol_loss(q_c, g_sc) + byol_loss(q_sc, g_c))
    local = local_mse_loss(f_c, f_sc, points, valid) if kind == "mse" else by_hand(f_c, f_sc, points, valid, 0.2)
    torch.testing.assert_close(parts["local"], local)
    torch.testing.assert_close(loss, 0.7 * parts["byol"] + 0.3 * local)


def test_half_precision_and_autocast():
    q_c, q_sc, g_c, g_sc = torch.randn(4, 3, 6)
    (f_c, f_sc), (points, valid) = maps(), somewhere()
    exact = lc_loss.lc_loss(q_c, q_sc, g_c, g_sc, f_c.bfloat16().float(), f_sc.bfloat16().float(), points, valid)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = lc_loss.lc_loss(q_c, q_sc, g_c, g_sc, f_c.bfloat16(), f_sc.bfloat16(), points, valid)[0]
    assert half.dtype == torch.float32 and half == exact


def test_the_run_takes_the_cropped_views_box(images, tmp_path, monkeypatch):
    seen = []

    def spy(boxes, flips, sizes, grid):
        seen.append((boxes, flips, sizes, grid))
        return correspondences(boxes, flips, sizes, grid)
    monkeypatch.setattr(lc_loss, "correspondences", spy)
    arguments = ["lc_loss.py", "--data", images, *SMALL, "--epochs", 1, "--workers", 0, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(a) for a in arguments])
    lc_loss.main()
    views = common.Views(common.open_data(str(images)), lambda *a: lc_loss.sample_views(*a, size=32), 0)
    samples = [views[key] for key in next(iter(common.Batches(44, 8, 0, 5, 0)))]
    boxes, flips, sizes, grid = seen[0]
    assert torch.equal(boxes, torch.stack([s.boxes[1] for s in samples])) and grid == 4
    assert torch.equal(flips, torch.stack([s.flips[1] for s in samples])) and sizes.tolist() == [[40, 48]] * 8
    assert all(s.boxes[0].tolist() == [0, 0, 40, 48] and not s.flips[0] for s in samples)
    for line in map(json.loads, open(tmp_path / f"lc_loss-{images.name}" / "log.jsonl")):
        assert line["loss"] == pytest.approx(0.9 * line["byol"] + 0.1 * line["local"])


def test_maps_keep_their_places():
    maps = torch.randn(2, 16, 5)
    out = lc_loss.BYOL.project_maps(torch.nn.Identity(), maps)
    assert torch.equal(out[1, :, 2, 3], maps[1, 2 * 4 + 3])


def _ddp(rank, world):
    """Gradient of a linear map before the loss; no image of the first process shares a point with its crop."""
    (f_c, f_sc), (points, valid) = maps(b=4), somewhere(b=4)
    valid[:2] = False
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(5, 5, 1).double()
    net = torch.nn.parallel.DistributedDataParallel(conv) if world > 1 else conv
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    grads = []
    for loss in (local_contrastive_loss, local_mse_loss):
        conv.zero_grad()
        value = loss(f_c[mine], net(f_sc[mine]), points[mine], valid[mine])
        value.backward()
        grads.append((value.item(), [p.grad.clone() for p in conv.parameters()]))
    return grads


def test_processes_equal_one(tmp_path):
    shares = on_processes(2, tmp_path, _ddp)
    for i, (value, grads) in enumerate(_ddp(0, 1)):
        assert abs(sum(s[i][0] for s in shares) / 2 - value) < 1e-9
        for share in shares:
            for a, b in zip(grads, share[i][1]):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


def test_copied_alone(tmp_path):
    shutil.copy(ROOT / "lc_loss.py", tmp_path)
    code = ("import torch, lc_loss, importlib.util; assert importlib.util.find_spec('common') is None;"
            "box, flip, size = torch.tensor([[0., 0, 9, 9]]), torch.tensor([True]), torch.tensor([[9, 9]]);"
            "points, valid = lc_loss.correspondences(box, flip, size, 3);"
            "print(lc_loss.local_contrastive_loss(*torch.randn(2, 1, 4, 3, 3), points, valid).item())")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) > 0, done.stderr


# --- the command line ----------------------------------------------------------------------------------------------

SMALL = ("--arch", "tiny_convnet", "--size", 32, "--projector", "32-16", "--batch-size", 8, "--base-lr", 1,
         "--warmup-epochs", 1, "--epochs", 6, "--momentum", 0.99, "--log-every", 1, "--save-minutes", 0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make_images(folder / "train", 44)
    make_images(folder / "val", 10, seed=1)
    return folder


def test_killed_and_resumed_is_bit_identical(images, tmp_path):
    command = ("lc_loss.py", "--data", images, *SMALL, "--out", tmp_path)
    whole = script(*command, "--name", "whole", "--workers", 0)
    assert whole.returncode == 0, whole.stderr
    process = start(*command, "--name", "cut", "--workers", 0)
    log, begin = tmp_path / "cut" / "log.jsonl", time.time()
    while not log.exists() or sum(1 for _ in open(log)) < 7:
        assert process.poll() is None and time.time() - begin < 120
        time.sleep(0.02)
    kill_tree(process.pid)
    process.communicate()
    assert script(*command, "--name", "cut", "--workers", 1).returncode == 0
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert any(key.startswith("target.backbone") for key in a["model"])
    for x, y in zip(a["model"].values(), b["model"].values(), strict=True):
        assert torch.equal(x, y)
    a, b = ([json.loads(line) for line in open(tmp_path / name / "log.jsonl")] for name in ("whole", "cut"))
    assert len(a) == len(b) == 30
    for key in ("step", "loss", "byol", "local", "momentum", "lr"):
        assert [line[key] for line in a] == [line[key] for line in b]
    assert a[0]["momentum"] < a[-1]["momentum"] <= 1


@pytest.mark.parametrize("flags", [pytest.param(("--alpha", 0), marks=pytest.mark.slow), ("--local-loss", "mse")])
def test_ablations_under_torchrun(images, tmp_path, flags):
    done = script("lc_loss.py", "--data", images, *SMALL, "--epochs", 1, *flags, "--out", tmp_path, torchrun=2)
    assert done.returncode == 0 and "20-NN" in done.stdout, done.stderr


def test_bad_input(images, tmp_path, monkeypatch, capsys):
    args = "--data", images, *SMALL, "--out", tmp_path
    assert "no data set 'nowhere'" in user_error(lc_loss.main, monkeypatch, capsys, *args, "--data", "nowhere")
    for size in (44, 8):
        assert "times its stride, 8" in user_error(lc_loss.main, monkeypatch, capsys, *args, "--size", size)
