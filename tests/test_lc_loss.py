"""lc_loss.py: correspondences against pixels, the loss against a loop, BYOL's target, the run."""
import functools
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_images, user_error
from PIL import Image

import common
import lc_loss
import training
from lc_loss import byol_loss, correspondences, local_contrastive_loss, local_mse_loss


def maps(b=3, d=5, h=4, w=4, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(2, b, d, h, w, dtype=dtype)


def somewhere(b=3, h=4, w=4, reach=1.3, dtype=torch.float64):
    torch.manual_seed(1)
    points = (2 * torch.rand(b, h, w, 2, dtype=dtype) - 1) * reach
    return points, (points.abs() <= 1).all(3)


# --- the loss -------------------------------------------------------------------------------------

def bilinear(values, x, y):
    """values (h, w) at (x, y) in [-1, 1]; beyond the outer centres, the border's value."""
    h, w = values.shape
    x = ((x + 1) / 2 * w - 0.5).clamp(0, w - 1).item()
    y = ((y + 1) / 2 * h - 0.5).clamp(0, h - 1).item()
    x0, y0 = min(int(x), w - 2), min(int(y), h - 2)
    fx, fy = x - x0, y - y0
    upper = (1 - fx) * values[y0, x0] + fx * values[y0, x0 + 1]
    lower = (1 - fx) * values[y0 + 1, x0] + fx * values[y0 + 1, x0 + 1]
    return (1 - fy) * upper + fy * lower


def by_hand(f_c, f_sc, points, valid, temperature):
    """Eqs. (2)-(4), point by point."""
    images = []
    for c, sc, place, inside in zip(f_c, f_sc, points, valid):
        losses = []
        for i, j in inside.nonzero().tolist():
            p_c = c[:, i, j]
            cosine = torch.stack([p_c @ p / p_c.norm() / p.norm() for p in sc.flatten(1).T])
            scores = torch.exp(cosine / temperature)
            nll = -torch.log(scores / scores.sum())
            losses.append(bilinear(nll.view(sc.shape[1:]), *place[i, j]))
        if losses:
            images.append(torch.stack(losses).mean())
    return torch.stack(images).mean()


@pytest.mark.parametrize("shape", [(4, 4), (3, 5)])
def test_loss_is_eqs_2_to_4(shape):
    f_c, _ = maps()
    _, f_sc = maps(h=shape[0], w=shape[1])
    points, valid = somewhere()
    assert 0 < valid.sum() < valid.numel()
    a, b = f_sc.clone().requires_grad_(), f_sc.clone().requires_grad_()
    ours = local_contrastive_loss(f_c, a, points, valid, 0.1)
    theirs = by_hand(f_c, b, points, valid, 0.1)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_mse_is_eq_1_at_the_points():
    (f_c, f_sc), (points, valid) = maps(), somewhere()
    images = []
    for c, sc, place, inside in zip(f_c, f_sc, points, valid):
        losses = []
        for i, j in inside.nonzero().tolist():
            at = torch.stack([bilinear(channel, *place[i, j]) for channel in sc])
            losses.append(byol_loss(at[None], c[None, :, i, j]))
        images.append(torch.stack(losses).mean())
    torch.testing.assert_close(local_mse_loss(f_c, f_sc, points, valid), torch.stack(images).mean())


def centres(h, w):
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    return 2 * torch.stack([x, y], 2).double() - 1


def test_whole_cells_make_it_cross_entropy():
    f_c, f_sc = maps()
    points = centres(4, 4).flip(1).expand(3, -1, -1, -1)  # each cell lies at its mirror cell
    everywhere = torch.ones(3, 4, 4, dtype=torch.bool)
    target = torch.arange(16).view(4, 4).flip(1).flatten()
    logits = F.normalize(f_c.flatten(2), dim=1).mT @ F.normalize(f_sc.flatten(2), dim=1) / 0.2
    expected = F.cross_entropy(logits.flatten(0, 1), target.repeat(3))
    ours = local_contrastive_loss(f_c, f_sc, points, everywhere, 0.2)
    torch.testing.assert_close(ours, expected)
    perfect = local_mse_loss(f_c, f_c.flip(3), points, everywhere)
    torch.testing.assert_close(perfect.item(), 0.0, atol=1e-9, rtol=0)


LOCAL = pytest.mark.parametrize("loss", [local_contrastive_loss, local_mse_loss])


@LOCAL
def test_points_outside_contribute_nothing(loss):
    (f_c, f_sc), (points, valid) = maps(), somewhere()
    outside = ~valid[:, None]
    expected = loss(f_c, f_sc, points, valid)
    moved = torch.where(valid[..., None], points, 5 * points)
    torch.testing.assert_close(loss(f_c, f_sc, moved, valid), expected)
    torch.testing.assert_close(loss(torch.where(outside, -f_c, f_c), f_sc, points, valid), expected)
    assert (loss(torch.where(outside, f_c, -f_c), f_sc, points, valid) - expected).abs() > 0.01


@LOCAL
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


@LOCAL
def test_scale_changes_nothing(loss):
    (f_c, f_sc), (points, valid) = maps(), somewhere()
    if loss is local_mse_loss:  # interpolation mixes neighbours, so one factor for the whole map
        factor = 7.0
    else:
        factor = torch.rand(3, 1, 4, 4, dtype=torch.float64) + 0.1
    scaled = loss(3 * f_c, factor * f_sc, points, valid)
    torch.testing.assert_close(scaled, loss(f_c, f_sc, points, valid))


def test_byol_loss():
    q, g = torch.randn(2, 6, 4, dtype=torch.float64)
    distance = F.normalize(q, dim=1) - F.normalize(g, dim=1)
    torch.testing.assert_close(byol_loss(q, g), distance.square().sum(1).mean())
    assert byol_loss(q, 3 * q).abs() < 1e-12


def inputs(dtype=torch.float64):
    """All arguments of lc_loss() that are tensors, those of the online network with gradient."""
    q_c, q_sc, g_c, g_sc = torch.randn(4, 3, 6, dtype=dtype)
    f_c, f_sc = maps(dtype=dtype)
    points, valid = somewhere(dtype=torch.promote_types(dtype, torch.float32))
    return q_c, q_sc, g_c, g_sc, f_c, f_sc, points, valid


@pytest.mark.parametrize("kind", ["contrastive", "mse"])
def test_total_is_eq_5(kind):
    q_c, q_sc, g_c, g_sc, f_c, f_sc, points, valid = x = inputs()
    loss, parts = lc_loss.lc_loss(*x, 0.3, 0.2, kind)
    torch.testing.assert_close(parts["byol"], byol_loss(q_c, g_sc) + byol_loss(q_sc, g_c))
    local = local_mse_loss(f_c, f_sc, points, valid)
    if kind == "contrastive":
        local = by_hand(f_c, f_sc, points, valid, 0.2)
    torch.testing.assert_close(parts["local"], local)
    torch.testing.assert_close(loss, 0.7 * parts["byol"] + 0.3 * local)
    assert list(parts) == ["byol", "local"]

    byol, only = lc_loss.lc_loss(*x[:4], None, None, points, valid, 0.0, 0.2, kind)
    assert list(only) == ["byol"] and byol == parts["byol"]
    alone, only = lc_loss.lc_loss(None, None, None, None, *x[4:], 1.0, 0.2, kind)
    assert list(only) == ["local"] and alone == parts["local"]


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_an_unknown_local_loss_is_refused(alpha):
    with pytest.raises(ValueError, match="local_loss"):
        lc_loss.lc_loss(*inputs(), alpha=alpha, local_loss="MSE")


LOSSES = {  # of all tensors that lc_loss() takes
    "byol": lambda q_c, q_sc, g_c, g_sc, *local: byol_loss(q_c, g_sc),
    "contrastive": lambda q_c, q_sc, g_c, g_sc, *local: local_contrastive_loss(*local),
    "mse": lambda q_c, q_sc, g_c, g_sc, *local: local_mse_loss(*local),
    "lc_loss": lambda *x: lc_loss.lc_loss(*x)[0],
    "lc_loss, mse": lambda *x: lc_loss.lc_loss(*x, local_loss="mse")[0],
}
EVERY_LOSS = pytest.mark.parametrize("name", LOSSES)


def differentiated(name, x, autocast=False):
    """The loss and its gradient with respect to each tensor of features; None where it has none."""
    features = [t.detach().clone().requires_grad_() for t in x[:6]]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = LOSSES[name](*features, *x[6:])
    loss.backward()
    return loss.detach(), [t.grad for t in features]


@EVERY_LOSS
def test_targets_get_no_gradient(name):
    _, (q_c, q_sc, g_c, g_sc, f_c, f_sc) = differentiated(name, inputs())
    assert g_c is None and g_sc is None and f_c is None
    assert (q_c is None) == (name in ("contrastive", "mse")) and (f_sc is None) == (name == "byol")


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision_change_nothing(name, dtype):
    x = inputs(dtype)
    exact, exact_grads = differentiated(name, [t.float() for t in x[:6]] + list(x[6:]))
    loss, grads = differentiated(name, x, autocast=True)
    assert loss.dtype == torch.float32 and loss == exact
    for ours, theirs in zip(grads, exact_grads):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs.to(dtype))


def test_spread():
    same = torch.rand(4, 1, 6).expand(4, 10, 6)
    assert lc_loss.spread(same) < 1e-3
    opposite = torch.cat([same, -3 * same], 1)
    torch.testing.assert_close(lc_loss.spread(opposite).item(), 1.0)
    x = F.normalize(torch.randn(4, 10, 6, dtype=torch.float64), dim=2)
    distance = (x - x.mean(1, keepdim=True)).norm(dim=2)
    torch.testing.assert_close(lc_loss.spread(5 * x), distance.square().mean(1).sqrt().mean())


# --- views and positions --------------------------------------------------------------------------

def test_one_view_is_whole_and_one_is_cropped():
    image = Image.new("RGB", (200, 160))
    areas, flips = [], []
    for seed in range(300):
        torch.manual_seed(seed)
        whole, (box, flip, size) = lc_loss.sample_views(image, 64)
        torch.manual_seed(seed)
        assert lc_loss.sample_views(image, 64) == [whole, (box, flip, size)]
        assert whole == ((0, 0, 160, 200), False, 64) and size == 64
        top, left, height, width = box
        assert 0 <= top <= 160 - height and 0 <= left <= 200 - width
        areas.append(height * width / 32000)
        flips.append(flip)
    assert 0.075 < min(areas) < 0.15 and 0.85 < max(areas) <= 1 and 110 < sum(flips) < 190


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "box", [(0, 0, 80, 100), (10, 25, 50, 40), (30, 1, 49, 65), (0, 0, 20, 20)])
def test_correspondences_land_on_the_same_pixels(box, flip):
    y, x = 2 * np.mgrid[0:80, 0:100].astype(np.uint8)  # bytes hold half pixels
    image = Image.fromarray(np.stack([x, y, 0 * x], 2))
    grid = 7
    view = common.cut(image, box, flip, 112).double()[None]
    points, valid = correspondences(torch.tensor([box]).float(), torch.tensor([flip]),
                                    torch.tensor([[80, 100]]), grid)
    shown = F.grid_sample(view, points.double(), padding_mode="border", align_corners=False)
    centres = (torch.arange(grid) + 0.5) / grid
    true_x = (centres * 100).expand(grid, -1)
    true_y = (centres * 80)[:, None].expand(-1, grid)
    top, left, height, width = box
    inside = (true_x >= left) & (true_x <= left + width)
    inside &= (true_y >= top) & (true_y <= top + height)
    assert torch.equal(valid[0], inside) and valid.any()
    error = (shown[0, :2] / 2 + 0.5 - torch.stack([true_x, true_y])).abs().amax(0)
    assert error[inside].max() < 0.5


def test_positions_in_half_precision_are_promoted():
    box, flip, size = [[8.0, 16, 32, 64]], torch.tensor([True]), [[80, 99]]
    exact = correspondences(torch.tensor(box), flip, torch.tensor(size), 5)
    half = correspondences(torch.tensor(box).half(), flip, torch.tensor(size).half(), 5)
    assert half[0].dtype == torch.float32
    assert torch.equal(half[0], exact[0]) and torch.equal(half[1], exact[1])


def test_maps_keep_their_places():
    maps = torch.randn(2, 16, 5)
    out = lc_loss.project_maps(maps, torch.nn.Identity())
    assert torch.equal(out[1, :, 2, 3], maps[1, 2 * 4 + 3])
    for n in (8, 15, 17):  # 8: a map of 2 x 4
        with pytest.raises(ValueError, match=f"{n} locations"):
            lc_loss.project_maps(torch.randn(2, n, 5), torch.nn.Identity())


# --- the model ------------------------------------------------------------------------------------

def tiny(classes=0, **options):
    torch.manual_seed(0)
    return lc_loss.BYOL(common.TinyConvNet(), (16, 8), classes, **options)


def test_target_moves_as_an_average_and_gets_no_gradient():
    model = tiny()
    first = [p.clone() for p in model.target.parameters()]
    names = [name for name, _ in model.target.named_children()]
    assert names == ["backbone", "projector", "local"]
    online = [p for name in names for p in getattr(model, name).parameters()]
    seen = []
    for _ in range(3):
        for p in online:
            p.data += torch.randn_like(p)
        seen.append([p.clone() for p in online])
        model.update_target(0.9)
    for p, start_, *path in zip(model.target.parameters(), first, *seen, strict=True):
        expected = 0.9 ** 3 * start_ + 0.1 * (0.81 * path[0] + 0.9 * path[1] + path[2])
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5)

    out, _ = model(*torch.randn(2, 4, 3, 32, 32))
    assert not any(t.requires_grad for t in (out.g_c, out.g_sc, out.f_c))
    assert out.f_c.shape == out.f_sc.shape == (4, 256, 4, 4)
    loss = byol_loss(out.q_c, out.g_sc) + byol_loss(out.q_sc, out.g_c) + out.f_sc.mean()
    loss.backward()
    assert all(p.grad is None for p in model.target.parameters())
    for name in ("backbone", "projector", "predictor", "local"):
        assert all(p.grad is not None for p in getattr(model, name).parameters())


@pytest.mark.parametrize("kind", ["contrastive", "mse"])
def test_views_and_networks_are_paired(kind):
    model = tiny(3, local_loss=kind)  # at the start, the target is the online network
    x_c, x_sc = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        out, logits = model(x_c, x_sc)
        maps_c, y_c = model.backbone(x_c)
        maps_sc, y_sc = model.backbone(x_sc)
        torch.testing.assert_close(out.g_c, model.projector(y_c))
        torch.testing.assert_close(out.g_sc, model.projector(y_sc))
        torch.testing.assert_close(out.q_c, model.predictor(out.g_c))
        torch.testing.assert_close(out.q_sc, model.predictor(out.g_sc))
        torch.testing.assert_close(out.f_c, lc_loss.project_maps(maps_c, model.local))
        f_sc = lc_loss.project_maps(maps_sc, model.local)
        if kind == "mse":
            f_sc = lc_loss.project_maps(f_sc.flatten(2).mT, model.local_predictor)
        torch.testing.assert_close(out.f_sc, f_sc)
        torch.testing.assert_close(logits, model.probe(y_sc))


@pytest.mark.parametrize("alpha,kind,built", [
    (0.0, "mse", {"projector", "predictor"}),
    (0.5, "contrastive", {"projector", "predictor", "local"}),
    (0.5, "mse", {"projector", "predictor", "local", "local_predictor"}),
    (1.0, "contrastive", {"local"}),
    (1.0, "mse", {"local", "local_predictor"}),
])
def test_only_what_is_trained_is_built(alpha, kind, built):
    model = tiny(3, alpha=alpha, local_loss=kind)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"backbone", "probe"} | built
    followed = {name.split(".")[0] for name, _ in model.target.named_parameters()}
    assert followed == {"backbone"} | built & {"projector", "local"}

    passes = []
    for network in (model.backbone, model.target.backbone):
        network.register_forward_hook(lambda module, x, y: passes.append(module))
    out, logits = model(*torch.randn(2, 4, 3, 32, 32))
    assert len(passes) == (2 if alpha == 1 else 4)
    points, valid = somewhere(4, dtype=torch.float32)
    loss, _ = lc_loss.lc_loss(*out, points, valid, alpha, 0.1, kind)
    (loss + logits.sum()).backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad and p.ndim > 1)


def trained_with_mse(predictor, steps=30, batch_size=8):
    """The spread of an image's local projections and of the target's, after some steps."""
    model = tiny(alpha=1.0, local_loss="mse")
    if not predictor:
        model.local_predictor = torch.nn.Identity()
    data = common.open_data("shapes", "train", 32)
    views = common.Views(data, functools.partial(lc_loss.sample_views, size=32), 0)
    augment_c, augment_sc = [common.Photometric(**colour) for colour in lc_loss.COLOURS]
    optimizer = training.LARS(model.parameters(), lr=4.0)
    for step in range(steps):
        samples = [views[(step, i)] for i in range(batch_size)]
        batch = torch.utils.data.default_collate(samples)
        x_c, x_sc = augment_c(batch.views[0]), augment_sc(batch.views[1])
        place = correspondences(batch.boxes[:, 1], batch.flips[:, 1], batch.sizes, 4)
        out, _ = model(x_c, x_sc)
        loss, _ = lc_loss.lc_loss(*out, *place, alpha=1.0, local_loss="mse")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(0.97)
    maps_sc, _ = model.backbone(x_sc)
    f_sc = lc_loss.project_maps(maps_sc, model.local)
    return [lc_loss.spread(f.flatten(2).mT).item() for f in (f_sc, out.f_c)]


def test_local_mse_does_not_collapse():
    online, target = trained_with_mse(predictor=True)
    assert online > 0.6 and target > 0.6
    online, target = trained_with_mse(predictor=False)
    assert online < 0.4 and target < 0.5  # of object and ground; the target follows


# --- the command line -----------------------------------------------------------------------------

SMALL = ("--arch", "tiny_convnet", "--size", 32, "--projector", "32-16", "--batch-size", 8,
         "--base-lr", 1, "--warmup-epochs", 1, "--epochs", 4, "--momentum", 0.99, "--log-every", 1,
         "--save-minutes", 0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), 44)


@pytest.fixture
def run_here(images, tmp_path, monkeypatch):
    """A run of one epoch in this process -> its log lines."""
    monkeypatch.setattr(training.Run, "finish", lambda run, *protocols, **_: seen.extend(protocols))
    seen = []

    def run(*flags):
        args = ["lc_loss.py", "--data", images, *SMALL, "--epochs", 1, "--workers", 0,
                "--out", tmp_path, "--name", "run", *flags]
        monkeypatch.setattr(sys, "argv", [str(a) for a in args])
        lc_loss.main()
        assert seen == ["knn", "correspond"]
        return [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    return run


def test_the_run_takes_the_cropped_views_box(images, run_here, monkeypatch):
    seen = []

    def spy(boxes, flips, sizes, grid):
        seen.append((boxes, flips, sizes, grid))
        return correspondences(boxes, flips, sizes, grid)
    monkeypatch.setattr(lc_loss, "correspondences", spy)
    lines = run_here()
    data = common.open_data(str(images))
    views = common.Views(data, functools.partial(lc_loss.sample_views, size=32), 0)
    samples = [views[key] for key in next(iter(common.Batches(44, 8, 0, 5, 0)))]
    boxes, flips, sizes, grid = seen[0]
    assert torch.equal(boxes, torch.stack([s.boxes[1] for s in samples])) and grid == 4
    assert torch.equal(flips, torch.stack([s.flips[1] for s in samples]))
    assert sizes.tolist() == [[40, 48]] * 8
    assert all(s.boxes[0].tolist() == [0, 0, 40, 48] and not s.flips[0] for s in samples)
    for line in lines:
        assert line["loss"] == pytest.approx(0.9 * line["byol"] + 0.1 * line["local"])
        assert 0 < line["spread"] <= 1 and 0 < line["local_spread"] <= 1 and 0 < line["valid"] < 1


@pytest.mark.parametrize("flags,terms", [
    (("--alpha", 0), {"byol", "spread"}),
    (("--alpha", 1), {"local", "local_spread", "valid"}),
    (("--local-loss", "mse"), {"byol", "spread", "local", "local_spread", "valid"}),
])
def test_ablations(run_here, flags, terms):
    for line in run_here(*flags):
        assert line.keys() & {"byol", "spread", "local", "local_spread", "valid"} == terms


@pytest.mark.parametrize("flags,words", [
    (("--data", "nowhere"), "no data set 'nowhere'"),
    (("--size", 44), "--size must make a multiple of 8, 16 or more"),
    (("--size", 8), "views of 8 pixels: --size must"),
    (("--temperature", 0), "--temperature 0"),
    (("--temperature", -0.1), "--temperature -0.1"),
    (("--temperature", "nan"), "--temperature nan"),
    (("--alpha", 2), "--alpha 2"),
    (("--alpha", -0.1), "--alpha -0.1"),
    (("--momentum", 1.5), "--momentum 1.5"),
    (("--local-loss", "MSE"), "--local-loss"),
    (("--projector", "32-a"), "--projector"),
])
def test_bad_input(images, tmp_path, monkeypatch, capsys, flags, words):
    args = "--data", images, *SMALL, "--workers", 0, "--out", tmp_path, *flags
    assert words in user_error(lc_loss.main, monkeypatch, capsys, *args)


