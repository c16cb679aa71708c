"""vicreg.py: the loss against the paper and the golden numbers; views and model."""
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import checkpoint, lines, run
from PIL import Image
from torch import nn

import common
import vicreg
from vicreg import correlation, covariance, invariance, variance, vicreg_loss

GOLDEN = Path(__file__).parent / "golden"


def algorithm_1(z_a, z_b, inv_coeff=25, var_coeff=25, cov_coeff=1):
    """Appendix A, line by line."""
    n, d = z_a.shape
    sim_loss = F.mse_loss(z_a, z_b)
    std_z_a = torch.sqrt(z_a.var(dim=0) + 1e-04)
    std_z_b = torch.sqrt(z_b.var(dim=0) + 1e-04)
    std_loss = torch.mean(F.relu(1 - std_z_a))
    std_loss = std_loss + torch.mean(F.relu(1 - std_z_b))
    z_a = z_a - z_a.mean(dim=0)
    z_b = z_b - z_b.mean(dim=0)
    cov_z_a = (z_a.T @ z_a) / (n - 1)
    cov_z_b = (z_b.T @ z_b) / (n - 1)
    off = ~torch.eye(d, dtype=torch.bool)
    cov_loss = cov_z_a[off].pow(2).sum() / d
    cov_loss = cov_loss + cov_z_b[off].pow(2).sum() / d
    return inv_coeff * sim_loss + var_coeff * std_loss + cov_coeff * cov_loss


def pair(n, d, scale=0.7):
    torch.manual_seed(0)
    z = scale * torch.randn(2, n, d, dtype=torch.float64) + 3
    return [view.clone().requires_grad_() for view in z]


# --- the loss -------------------------------------------------------------------------------------

SIZES = [(8, 50), (31, 32), (32, 32), (33, 32), (200, 7), (2, 5), (4, 1)]


@pytest.mark.parametrize("n,d", SIZES)
def test_loss_is_algorithm_1(n, d):
    z, w = pair(n, d), pair(n, d)
    ours = vicreg_loss(*z)[0]
    theirs = algorithm_1(*w)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for a, b in zip(z, w):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["vicreg_wide", "vicreg_tall"])
def test_golden(name):
    g = {key: torch.tensor(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}
    z_a, z_b = g["z_a"].requires_grad_(), g["z_b"].requires_grad_()
    loss, parts = vicreg_loss(z_a, z_b, 25.0, 12.5, 1.0)
    loss.backward()
    ours = (loss, parts["inv"], parts["var"], parts["cov"], z_a.grad, z_b.grad)
    theirs = (g["loss"], g["sim"], 2 * g["std"], g["cov"], g["grad_z_a"], g["grad_z_b"])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("n,d", [(4, 6), (6, 4)])
def test_gradcheck(n, d):
    assert torch.autograd.gradcheck(lambda a, b: vicreg_loss(a, b)[0], pair(n, d))


def test_known_values():
    constant = torch.full((10, 4), 3.0, dtype=torch.float64)
    loss, parts = vicreg_loss(constant, constant)
    assert parts["inv"] == 0 and parts["cov"] == 0
    torch.testing.assert_close(parts["var"].item(), 2 * (1 - 1e-2))  # sqrt(0 + 1e-4) = 0.01
    torch.testing.assert_close(loss.item(), 25 * 2 * 0.99)
    z = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)  # variance 2, covariance 2
    torch.testing.assert_close(covariance(z).item(), (2 ** 2 + 2 ** 2) / 2)
    torch.testing.assert_close(variance(z).item(), 0.0)
    torch.testing.assert_close(variance(z, gamma=2.0, eps=0.0).item(), 2 - 2 ** 0.5)
    torch.testing.assert_close(vicreg_loss(z, z + 2)[1]["inv"].item(), 4.0)
    target = (2 + 1e-4) ** 0.5 + 0.25  # a quarter above each deviation, in both views
    torch.testing.assert_close(vicreg_loss(z, z, gamma=target)[1]["var"].item(), 0.5)
    assert vicreg_loss(z, z)[1]["var"] == 0


@pytest.mark.parametrize("n,d", [(20, 60), (60, 20)])
def test_both_sides_of_the_duality(n, d):
    z = pair(n, d)[0].detach()
    c = torch.cov(z.T)
    expected = (c.square().sum() - c.diagonal().square().sum()) / d
    torch.testing.assert_close(covariance(z), expected)


@pytest.mark.parametrize("n,d", SIZES)
def test_each_term_is_a_part_of_the_loss(n, d):
    z_a, z_b = pair(n, d)
    _, parts = vicreg_loss(z_a, z_b)
    torch.testing.assert_close(invariance(z_a, z_b), parts["inv"])
    torch.testing.assert_close(variance(z_a) + variance(z_b), parts["var"])
    torch.testing.assert_close(covariance(z_a) + covariance(z_b), parts["cov"])


def test_views_of_other_widths_are_refused():
    with pytest.raises(ValueError, match="different shapes"):
        vicreg_loss(torch.randn(6, 4), torch.randn(6, 1))  # would broadcast
    with pytest.raises(ValueError, match="different shapes"):
        invariance(torch.randn(6, 4), torch.randn(1, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_embeddings_stay_finite_under_autocast(dtype):
    scale = 100 if dtype == torch.float16 else 1e4  # 64 squares of 100 overflow half precision
    torch.manual_seed(0)
    z_a, z_b = (scale * torch.randn(2, 64, 512)).to(dtype)
    z_a.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = vicreg_loss(z_a, z_b)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and z_a.grad.isfinite().all()
    exact, _ = vicreg_loss(z_a.detach().double(), z_b.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)


LOSSES = {
    "vicreg_loss": lambda a, b: vicreg_loss(a, b)[0],
    "invariance": invariance,
    "variance": lambda a, b: variance(a) + variance(b),
    "covariance": lambda a, b: covariance(a) + covariance(b),
}


@pytest.mark.parametrize("n,d", [(64, 16), (16, 64)])
@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_no_loss_and_no_gradient(name, n, d):
    def value_and_gradients(enabled):
        z = [view.detach().float().requires_grad_() for view in pair(n, d)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = LOSSES[name](*z)
        return loss, torch.autograd.grad(loss, z)

    loss, grads = value_and_gradients(True)
    exact, exact_grads = value_and_gradients(False)
    assert torch.equal(loss, exact)
    for a, b in zip(grads, exact_grads):
        # The backward pass runs in the precision of the forward one, wherever it is called.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_correlation_is_eq_10():
    torch.manual_seed(0)
    y = torch.randn(50, 6) @ torch.randn(6, 6)
    c = np.corrcoef(y.T.double().numpy())
    squares = [c[i, j] ** 2 for i in range(6) for j in range(6) if i != j]
    assert correlation(y).item() == pytest.approx(sum(squares) / (6 * 5), rel=1e-5)
    y[:, 2] = 7.0  # a dimension that says nothing correlates with none
    c = np.corrcoef(np.delete(y.T.double().numpy(), 2, axis=0))
    squares = (c ** 2).sum() - 5
    assert correlation(y).item() == pytest.approx(squares / (6 * 5), rel=1e-5)


# --- views ----------------------------------------------------------------------------------------

def test_views_of_the_paper_its_later_version_and_the_release():
    jitter = dict(jitter=(0.4, 0.4, 0.2, 0.1))
    both = 2 * [jitter | dict(blur_p=0.5, solarize_p=0.1)]
    byol = [jitter | dict(blur_p=1.0), jitter | dict(blur_p=0.1, solarize_p=0.2)]
    assert vicreg.VIEWS["paper"] == ((0.2, 1.0), both)
    assert vicreg.VIEWS["iclr"] == ((0.08, 1.0), both)
    assert vicreg.VIEWS["released"] == ((0.08, 1.0), byol)


@pytest.mark.parametrize("area", [(0.2, 1.0), (0.08, 1.0)])
def test_sampled_views(area):
    image = Image.new("RGB", (400, 300))
    sample = functools.partial(vicreg.sample_views, image, area, 96)
    torch.manual_seed(0)
    views = [view for _ in range(1500) for view in sample()]
    assert len(views) == 3000
    tops, lefts, heights, widths = np.array([box for box, _, _ in views]).T
    assert (tops >= 0).all() and (tops + heights <= 300).all()
    assert (lefts >= 0).all() and (lefts + widths <= 400).all()
    share = heights * widths / 120_000
    low, high = area
    assert low - 0.01 < share.min() < low + 0.02 and 0.95 < share.max() <= high
    assert (widths / heights).min() > 0.73 and (widths / heights).max() < 1.36
    assert 0.45 < np.mean([flip for _, flip, _ in views]) < 0.55
    assert {size for _, _, size in views} == {96}

    torch.manual_seed(0)
    assert [view for _ in range(2) for view in sample()] == views[:4]  # the global generator
    a, b = sample()
    assert a != b


# --- the model ------------------------------------------------------------------------------------

def test_projector():
    layers = [type(layer) for layer in vicreg.mlp(5, 8, 9, 7)]
    inner = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert layers == [*inner, *inner, nn.Linear]
    projector = vicreg.mlp(5, 8, 9, 7)
    assert projector[-1].bias is None and projector[0].bias is not None
    assert vicreg.widths("8192-4096-128") == [8192, 4096, 128]


@pytest.mark.parametrize("inner", [(), ("no-bn",)])
def test_normalized_embeddings_of_table_4b(inner):
    torch.manual_seed(0)
    backbone = common.build_backbone("tiny_convnet", 32)
    x = torch.randn(2, 7, 3, 32, 32)

    def embeddings(*outer):
        model = vicreg.VICReg(backbone, (8, 6), normalization=(*inner, *outer))
        layers = [type(layer) for layer in model.projector]
        assert layers[1] == (nn.Identity if inner else nn.BatchNorm1d)
        assert len(layers) == 4 + len(outer)
        assert not any(p.requires_grad for p in model.projector[4:].parameters())
        model.projector[3].weight.data *= 100  # so that BatchNorm's epsilon is small beside them
        return model(*x)[0].detach()

    z = embeddings()
    assert len(z.std(0).unique()) > 1 and len(z.norm(dim=1).unique()) > 1
    z = embeddings("standardize")  # the covariances are correlations
    torch.testing.assert_close(z.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(6), atol=1e-4, rtol=0)
    z = embeddings("l2")
    torch.testing.assert_close(z.norm(dim=1), torch.full((7,), 6 ** 0.5))


def test_l2_normalization_is_that_of_eq_9():
    """On the sphere of radius sqrt(D) with gamma = 1, as on the unit sphere with 1 / sqrt(D)."""
    torch.manual_seed(0)
    d = 6
    model = vicreg.VICReg(common.build_backbone("tiny_convnet", 32), (8, d), normalization=["l2"])
    raw = torch.randn(2, 7, d, dtype=torch.float64)
    z_a, z_b = model.projector[-1](raw)
    _, parts = vicreg_loss(z_a, z_b)

    unit_a, unit_b = raw / raw.norm(dim=2, keepdim=True)
    similarity = -(unit_a * unit_b).sum(1).mean()  # Eq. (9)
    torch.testing.assert_close(parts["inv"], 2 + 2 * similarity)
    hinges = [variance(z, gamma=d ** -0.5, eps=1e-4 / d) for z in (unit_a, unit_b)]
    torch.testing.assert_close(parts["var"], d ** 0.5 * sum(hinges))
    covariances = covariance(unit_a) + covariance(unit_b)
    torch.testing.assert_close(parts["cov"], d ** 2 * covariances)


def test_flags_of_table_4b(flags, tmp_path):
    how = ("--epochs", 1, "--normalization", "standardize", "no-bn", "--out", tmp_path)
    assert run("vicreg", *flags("vicreg"), *how, "--name", "a") == 0
    model = checkpoint(tmp_path / "a")["model"]
    norms = {name.rsplit(".", 1)[0] for name in model if name.endswith("running_var")}
    assert "projector.4" in norms and "projector.1" not in norms
    assert "projector.4.weight" not in model
    assert lines(tmp_path / "a")[-1]["loss"] > 0
    how = ("--epochs", 1, "--normalization", "l2", "--gamma", 50, "--out", tmp_path)
    assert run("vicreg", *flags("vicreg"), *how, "--name", "b") == 0
    assert 98 < lines(tmp_path / "b")[-1]["var"] < 100  # of two views, each near 50 - 1


def test_model_pairs_views_and_embeddings():
    torch.manual_seed(0)
    model = vicreg.VICReg(common.build_backbone("tiny_convnet", 32), (8, 6), num_classes=3).eval()
    x_a, x_b = torch.randn(2, 5, 3, 32, 32)
    z_a, z_b, y_a, logits = model(x_a, x_b)
    with torch.no_grad():
        _, y = model.backbone(x_a)
        torch.testing.assert_close(y_a, y)
        torch.testing.assert_close(z_a, model.projector(y))
        torch.testing.assert_close(z_b, model.projector(model.backbone(x_b)[1]))
        torch.testing.assert_close(logits, model.probe(y))
    logits.sum().backward()  # the classifier's gradient ends at the representations
    assert model.probe.weight.grad.any()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert vicreg.VICReg(model.backbone, (8, 6))(x_a, x_b)[3] is None
