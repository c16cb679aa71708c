"""bagssl.py: the objectives against golden numbers, distributions and themselves on several
processes; the patches and their bag; the training run."""
import functools
import itertools
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, make_images, user_error
from PIL import Image

import bagssl
import common
import training
import vicreg
from bagssl import bag_loss, nt_xent, spectral_loss, total_coding_rate

DEFAULTS = {"vicreg": (25.0, 25.0, 1.0), "tcr": (30.0, 0.2), "simclr": (0.1,), "spectral": (1.0,)}


def rows(n, d, seed=0, unit=False):
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(z, dim=1) if unit else z


@pytest.fixture(scope="module")
def golden():
    arrays = np.load(ROOT / "tests/golden/bagssl.npz")
    return {key: torch.tensor(value) for key, value in arrays.items()}


# --- objectives -----------------------------------------------------------------------------------

def test_golden_coding_rate(golden):
    z = golden["z"].requires_grad_()
    rate = total_coding_rate(z, golden["tcr_eps"].item())
    rate.backward()
    torch.testing.assert_close(-rate, golden["tcr"])
    torch.testing.assert_close(-z.grad, golden["grad_tcr"])


def test_golden_nt_xent(golden):
    value = nt_xent(golden["z_a"], golden["z_b"], golden["ntxent_temperature"].item())
    torch.testing.assert_close(value.double(), golden["ntxent"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("n,d", [(20, 6), (6, 20), (7, 7), (8, 7), (2, 1)])
def test_coding_rate_on_both_sides(n, d):
    z = rows(n, d, unit=True)
    eps = 0.3
    for product in (z.T @ z, z @ z.T):  # D x D, n x n
        matrix = torch.eye(len(product)) + d / (n * eps) * product
        expected = torch.linalg.slogdet(matrix).logabsdet / 2
        torch.testing.assert_close(total_coding_rate(z, eps), expected)
    assert torch.autograd.gradcheck(lambda z: total_coding_rate(z, eps), z.requires_grad_())


def test_coding_rate_known_values():
    eye = torch.eye(4, dtype=torch.float64)  # n = D orthonormal rows: D eigenvalues of 1 + 1 / eps
    assert total_coding_rate(eye, 0.5).item() == pytest.approx(4 / 2 * math.log(3))
    same = eye[:1].expand(8, -1)  # collapsed: one eigenvalue, 1 + D / eps
    assert total_coding_rate(same, 0.5).item() == pytest.approx(math.log(9) / 2)


@pytest.mark.parametrize("n,d", [(12, 5), (5, 12)])
def test_eq_7_as_the_paper_states_it(n, d):
    """Z holds the embeddings as columns (d x N), of unit length."""
    constants = []
    for seed in range(3):
        z = rows(n, d, seed, unit=True).T
        gram = (z.T @ z - torch.eye(n)).square().sum()
        first = (z @ z.T - torch.eye(d)).square().sum()
        second = (z @ z.T - n / d * torch.eye(d)).square().sum()
        constants.append((gram - second).item())
        # The paper writes gram = first; they differ by a number that no embedding changes.
        torch.testing.assert_close((gram - first).item(), float(n - d))
        # The left side is the spectral regularization: Eq. (6)'s second term, over a minibatch.
        spread = (spectral_loss(z.T, z.T, 3.0) + 1) / 3
        torch.testing.assert_close(n * (n - 1) * spread, gram)
    np.testing.assert_allclose(constants, n * n / d - n)  # C


def toy(w=1.4):
    """p(x_1, x_2) of four patches, its marginal, and z with w z_1^T z_2 = p(x_1, x_2) / (p p)."""
    joint = rows(4, 4).abs() + 2 * torch.eye(4)
    joint = joint @ joint.T  # symmetric, positive definite
    joint = joint / joint.sum()
    p = joint.sum(1)
    return joint, p, torch.linalg.cholesky(joint / (p[:, None] * p) / w)


def expectation_over_batches(z, joint, lam, n=2):
    """The mean loss of all batches of n pairs, each pair drawn from p(x_1, x_2)."""
    pairs = list(itertools.product(range(4), range(4)))
    total = 0
    for batch in itertools.product(pairs, repeat=n):
        a, b = zip(*batch)
        chance = math.prod(joint[pair].item() for pair in batch)
        total = total + chance * spectral_loss(z[list(a)], z[list(b)], lam)
    return total


def test_spectral_loss_is_eq_6():
    joint, p, _ = toy()
    z, lam = rows(4, 3, 1), 0.7
    products = z @ z.T
    expected = -(joint * products).sum() + lam * (p[:, None] * p * products.square()).sum()
    torch.testing.assert_close(expectation_over_batches(z, joint, lam), expected)


def test_spectral_loss_is_least_at_the_density_ratio():
    """Proposition 3.1 with lambda = w / 2."""
    w = 1.4
    joint, p, z = toy(w)
    z.requires_grad_()
    loss = expectation_over_batches(z, joint, w / 2)
    loss.backward()
    assert z.grad.abs().max() < 1e-12
    ratio = joint / (p[:, None] * p)
    torch.testing.assert_close(loss.detach(), -(p[:, None] * p * ratio.square()).sum() / (2 * w))
    for seed in range(5):
        other = z.detach() + 0.1 * rows(4, 4, seed)
        assert expectation_over_batches(other, joint, w / 2) > loss


def test_nt_xent_is_a_loop():
    z_a, z_b = rows(5, 4), rows(5, 4, 1)
    z = [v / v.norm() for v in (*z_a, *z_b)]
    terms = []
    for i in range(10):
        scores = {j: math.exp(z[i] @ z[j] / 0.3) for j in range(10) if j != i}
        terms.append(-math.log(scores[(i + 5) % 10] / sum(scores.values())))
    assert nt_xent(z_a, z_b, 0.3).item() == pytest.approx(np.mean(terms))
    assert nt_xent(5 * z_a, 2 * z_b, 0.3).item() == pytest.approx(np.mean(terms))


@pytest.mark.parametrize("objective", DEFAULTS)
@pytest.mark.parametrize("n,d", [(4, 6), (6, 4)])
def test_gradcheck(objective, n, d):
    z = [rows(n, d, seed).requires_grad_() for seed in range(3)]
    loss = functools.partial(bag_loss, objective=objective)
    assert torch.autograd.gradcheck(lambda *z: loss(z)[0], z)


def test_terms_are_weighted_as_the_paper_has_them():
    z_a, z_b = rows(9, 5), rows(9, 5, 1)
    unit_a, unit_b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
    sim = F.cosine_similarity(z_a, z_b).mean()
    rate = (total_coding_rate(unit_a, 0.4) + total_coding_rate(unit_b, 0.4)) / 2
    loss, parts = bag_loss([z_a, z_b], "tcr", 7.0, 0.4)
    torch.testing.assert_close(loss, -(7 * sim + rate))
    torch.testing.assert_close((parts["sim"], parts["tcr"]), (sim, rate))

    close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(bag_loss([z_a, z_b], "simclr", 0.2)[0], nt_xent(z_a, z_b, 0.2))
    close(bag_loss([z_a, z_b], "spectral", 0.2)[0], spectral_loss(unit_a, unit_b, 0.2))
    ours, our_parts = bag_loss([z_a, z_b], "vicreg", 3.0, 4.0, 5.0)
    for module in (vicreg, bagssl):
        theirs, their_parts = module.vicreg_loss(z_a, z_b, 3.0, 4.0, 5.0)
        close(ours, theirs)
        close(our_parts, their_parts)


@pytest.mark.parametrize("objective,coefficients", DEFAULTS.items())
def test_coefficients_have_the_paper_s_values_by_default(objective, coefficients):
    z = [rows(6, 128, seed) for seed in range(2)]
    assert bag_loss(z, objective)[0] == bag_loss(z, objective, *coefficients)[0]
    if objective == "tcr":
        wide = [rows(6, 8192, seed) for seed in range(2)]
        assert bag_loss(wide, "tcr")[0] == bag_loss(wide, "tcr", 1920.0, 0.2)[0]


def pair_loss(z_a, z_b, objective, *coefficients):
    """An objective for two patches as its definition has it."""
    if objective == "vicreg":
        return vicreg.vicreg_loss(z_a, z_b, *coefficients)
    z_a, z_b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
    sim = (z_a * z_b).sum(1).mean()
    if objective == "tcr":
        lam, eps = coefficients
        tcr = (total_coding_rate(z_a, eps) + total_coding_rate(z_b, eps)) / 2
        return -(lam * sim + tcr), {"sim": sim, "tcr": tcr}
    loss = {"simclr": nt_xent, "spectral": spectral_loss}[objective]
    return loss(z_a, z_b, *coefficients), {"sim": sim}


@pytest.mark.parametrize("objective,coefficients", DEFAULTS.items())
def test_more_patches_are_all_pairs(objective, coefficients):
    z = [rows(6, 4, seed).requires_grad_() for seed in range(4)]
    loss, parts = bag_loss(z, objective, *coefficients)
    pairs = [pair_loss(a, b, objective, *coefficients) for a, b in itertools.combinations(z, 2)]
    expected = sum(value for value, _ in pairs) / 6
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z))
    for key in parts:
        torch.testing.assert_close(parts[key], sum(p[key] for _, p in pairs) / 6)


@pytest.mark.parametrize("objective,name", [("tcr", "total_coding_rate"), ("vicreg", "moments"),
                                            ("vicreg", "off_diagonal")])
def test_a_patch_s_own_terms_are_computed_once(monkeypatch, objective, name):
    calls = []
    function = getattr(bagssl, name)

    def counted(*args):
        calls.append(args)
        return function(*args)
    monkeypatch.setattr(bagssl, name, counted)
    z = [rows(6, 4, seed) for seed in range(16)]
    bag_loss(z, objective)
    assert len(calls) == 16


@pytest.mark.parametrize("objective", DEFAULTS)
def test_half_precision_under_autocast(objective):
    z = [rows(16, 64, seed).to(torch.bfloat16).requires_grad_() for seed in range(2)]
    exact = bag_loss([v.detach().double() for v in z], objective, *DEFAULTS[objective])[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = bag_loss(z, objective, *DEFAULTS[objective])
    loss.backward()
    assert loss.dtype == torch.float32 and all(v.grad.isfinite().all() for v in z)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n,d", [(16, 64), (64, 16)])
@pytest.mark.parametrize("function", [
    nt_xent, spectral_loss, lambda z_a, z_b: total_coding_rate(z_a) + total_coding_rate(z_b),
    lambda z_a, z_b: bagssl.vicreg_loss(z_a, z_b)[0],
], ids=["nt_xent", "spectral_loss", "total_coding_rate", "vicreg_loss"])
def test_each_loss_guards_its_own_precision(function, n, d):
    z = [rows(n, d, seed, unit=True).float().requires_grad_() for seed in range(2)]
    plain = function(*z)
    with torch.autocast("cpu", torch.bfloat16):
        guarded = function(*z)
    assert guarded.dtype == torch.float32 and torch.equal(guarded, plain)
    for a, b in zip(torch.autograd.grad(guarded, z), torch.autograd.grad(plain, z)):
        assert torch.equal(a, b)


def test_other_shapes_raise():
    for loss in (nt_xent, spectral_loss, bagssl.vicreg_loss):
        for other in ((6, 5), (4, 1), (4, 6)):
            with pytest.raises((RuntimeError, ValueError)):
                loss(rows(4, 5), rows(*other))


# --- patches --------------------------------------------------------------------------------------

def blank(height, width):
    return Image.new("RGB", (width, height))


@pytest.mark.parametrize("height,width,scale,side", [(32, 32, "0.1914", 14), (224, 224, "0.1", 71),
                                                     (120, 160, "0.2", 62), (375, 500, "0.2", 194)])
def test_patches_have_the_scale_and_lie_anywhere(height, width, scale, side):
    torch.manual_seed(0)
    area = bagssl.parse_scale(scale)
    image = blank(height, width)
    patches = [bagssl.sample_patches(image, area, 3, 48) for _ in range(700)]
    assert all(len(p) == 3 for p in patches)
    boxes = np.array([box for p in patches for box, _, _ in p])
    assert (boxes[:, 2:] == side).all()
    assert {size for p in patches for *_, size in p} == {48}
    for begin, room in ((boxes[:, 0], height - side), (boxes[:, 1], width - side)):
        assert begin.min() == 0 and begin.max() == room and abs(begin.mean() / room - 0.5) < 0.03
    assert 0.45 < np.mean([flip for p in patches for _, flip, _ in p]) < 0.55
    first, second = boxes[::3], boxes[1::3]
    assert abs(np.corrcoef(first[:, 0], second[:, 0])[0, 1]) < 0.1  # drawn independently


def test_a_range_is_multi_scale():
    torch.manual_seed(0)
    area = bagssl.parse_scale("0.08-1")
    assert area == (0.08, 1.0)
    image = blank(100, 100)
    boxes = np.array([bagssl.sample_patches(image, area, 1, 48)[0][0] for _ in range(500)])
    share = boxes[:, 2] * boxes[:, 3] / 1e4
    assert share.min() < 0.12 and share.max() > 0.85
    assert (boxes[:, 2] != boxes[:, 3]).mean() > 0.9


@pytest.mark.parametrize("height,width", [(73, 73), (375, 500), (500, 375), (107, 96)])
@pytest.mark.parametrize("count", [1, 4, 16, 64, 256])
def test_dense_grid(height, width, count):
    views = bagssl.patch_grid(blank(height, width), 0.2, count, 48)
    assert {(flip, size) for _, flip, size in views} == {(False, 48)}
    boxes = np.array([box for box, _, _ in views])
    side = boxes[0, 2]
    assert len(set(map(tuple, boxes))) == count and (boxes[:, 2:] == side).all()
    for axis, pixels in enumerate((height, width)):
        starts = np.unique(boxes[:, axis])
        assert len(starts) == math.isqrt(count)
        np.testing.assert_allclose((boxes[:, axis] + side / 2).mean(), pixels / 2, atol=0.5)
        if count > 1:
            assert starts[0] == 0 and starts[-1] + side == pixels
            assert np.ptp(np.diff(starts)) <= 1


def test_dense_grid_known_values():
    found = [box for box, _, _ in bagssl.patch_grid(blank(10, 10), 0.16, 4, 8)]
    assert found == [(0, 0, 4, 4), (0, 6, 4, 4), (6, 0, 4, 4), (6, 6, 4, 4)]
    for count in (0, 2, 8):
        with pytest.raises(ValueError, match="square"):
            bagssl.patch_grid(blank(10, 10), 0.16, count, 8)


@pytest.mark.parametrize("height,width,scale", [
    (32, 32, 14**2 / 32**2), (224, 224, 0.1), (375, 500, 0.2), (500, 375, 0.05), (40, 200, 0.2),
    (50, 60, 1.0), (30, 300, 0.9),
])
def test_training_and_the_bag_have_one_definition_of_scale(height, width, scale):
    """A share of the whole image's area; where no such square fits, the largest that does."""
    torch.manual_seed(0)
    image = blank(height, width)
    (box, _, _), = bagssl.sample_patches(image, (scale, scale), 1, 48)
    for count in (1, 9):
        for grid_box, _, _ in bagssl.patch_grid(image, scale, count, 48):
            assert grid_box[2:] == box[2:]


# --- the bag --------------------------------------------------------------------------------------

def test_bag_embedding():
    y = torch.randn(3, 5, 7)
    bag = bagssl.bag_embedding(y)
    torch.testing.assert_close(bag, bagssl.bag_embedding(y[:, torch.randperm(5)]))
    assert torch.equal(bagssl.bag_embedding(y[:, :1]), y[:, 0])
    torch.testing.assert_close(bag[1, 2], sum(y[1, p, 2] for p in range(5)) / 5)


def test_local_aggregation():
    maps = torch.randn(2, 25, 512)  # Appendix C.4: 512 x 5 x 5 -> 2048
    found = bagssl.local_aggregation(maps)
    assert found.shape == (2, 2048)
    image = maps.mT.reshape(2, 512, 5, 5)
    windows = [image[:, :, i:i + 3, j:j + 3].mean((2, 3)) for i in (0, 2) for j in (0, 2)]
    torch.testing.assert_close(found, torch.stack(windows, 2).flatten(1))
    small = bagssl.local_aggregation(maps[:, :16])
    assert small.shape == (2, 2048)  # 4 x 4: the last windows have two rows or columns
    torch.testing.assert_close(small[:, 3::4], maps[:, [10, 11, 14, 15]].mean(1))
    assert torch.equal(bagssl.local_aggregation(maps[:, :1]), maps[:, 0])


def test_local_aggregation_refuses_maps_that_are_not_square():
    for n in (2, 12, 15, 24):
        with pytest.raises(ValueError, match=f"{n} locations"):
            bagssl.local_aggregation(torch.randn(2, n, 8))


def test_model_pairs_patches_and_embeddings():
    torch.manual_seed(0)
    model = bagssl.BagSSL(common.TinyConvNet(), (16, 8), 5).eval()
    patches = list(torch.randn(3, 4, 3, 32, 32))
    with torch.no_grad():
        projections, logits = model(patches)
        y = [model.backbone(x)[1] for x in patches]
        for z, each in zip(projections, y, strict=True):
            torch.testing.assert_close(z, model.projector(each), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits, model.probe(sum(y) / 3), rtol=1e-4, atol=1e-5)
    _, logits = model.train()(patches)
    logits.sum().backward()
    rest = [*model.backbone.parameters(), *model.projector.parameters()]
    assert all(p.grad is None for p in rest)


# --- the command line -----------------------------------------------------------------------------

SMALL = ("--arch", "tiny_convnet", "--size", 32, "--projector", "32-16", "--batch-size", 8,
         "--base-lr", 1, "--warmup-epochs", 1, "--epochs", 6, "--log-every", 1, "--save-minutes", 0,
         "--workers", 0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make_images(folder / "train", 44)
    return folder


@pytest.fixture
def run_here(monkeypatch, images, tmp_path):
    """bagssl.main() in this process, without the evaluation at its end."""
    monkeypatch.setattr(training.Run, "finish", lambda self, *protocols, **_: None)

    def run(*args):
        command = ["bagssl.py", "--data", images, *SMALL, "--out", tmp_path, *args]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in command])
        bagssl.main()
    return run


@pytest.mark.parametrize("loss,given", [("vicreg", (1.5, 2.5, 3.5)), ("tcr", (4.5, 0.5)),
                                        ("simclr", (0.6,)), ("spectral", (0.7,))])
def test_the_flags_reach_the_loss(run_here, monkeypatch, loss, given):
    seen = []

    def spy(projections, *rest):
        seen.append((len(projections), projections[0].shape, rest))
        return bag_loss(projections, *rest)
    monkeypatch.setattr(bagssl, "bag_loss", spy)
    run_here("--loss", loss, "--patches", 3, "--epochs", 2, "--inv-coeff", 1.5, "--var-coeff", 2.5,
             "--cov-coeff", 3.5, "--tcr-coeff", 4.5, "--tcr-eps", 0.5, "--temperature", 0.6,
             "--spectral-coeff", 0.7)
    assert seen == 10 * [(3, (8, 16), (loss, *given))]


def test_tcr_s_lambda_follows_the_width(run_here, monkeypatch):
    seen = []

    def spy(z, lam=None, eps=0.2):
        loss, parts = tcr_of_bag(z, lam, eps)
        seen.append(-(loss + parts["tcr"]) / parts["sim"])
        return loss, parts
    tcr_of_bag = bagssl.tcr_of_bag
    monkeypatch.setattr(bagssl, "tcr_of_bag", spy)
    run_here("--loss", "tcr", "--epochs", 1, "--warmup-epochs", 0)  # imagenet's recipe, 16 wide
    assert len(seen) == 5
    torch.testing.assert_close(torch.stack(seen).mean().item(), 3.75, rtol=1e-3, atol=0)


def test_recipes_have_the_appendix_numbers():
    keys = ("arch", "epochs", "batch_size", "base_lr", "final_lr", "weight_decay", "warmup_epochs",
            "projector")
    found = {data: tuple(recipe[key] for key in keys) for data, recipe in bagssl.RECIPES.items()}
    wide = "8192-8192-8192"
    assert found["cifar10"] == ("resnet34", 600, 1024, 0.3, 0, 1e-4, 10, "4096-128")
    assert found["cifar100"] == ("resnet34", 600, 1024, 0.3, 0, 1e-4, 10, "4096-512")
    assert found["imagenet100"] == ("resnet50", 400, 1024, 0.1, 0, 1e-4, 10, wide)
    assert found["imagenet"] == ("resnet50", 800, 1024, 0.1, 0, 1e-6, 10, wide)
    # lambda: 30 and 1920 are the default for these widths, but 30 is not with 512 dimensions
    given = {data: r["tcr_coeff"] for data, r in bagssl.RECIPES.items() if "tcr_coeff" in r}
    assert given == {"cifar100": 30}


@pytest.mark.parametrize("args,words", [
    (["--data", "nowhere"], "no data set 'nowhere'"),
    (["--patches", 1], "--patches 1"),
    (["--tcr-eps", 0], "--tcr-eps 0"),
    (["--temperature", 0], "--temperature 0"),
    (["--temperature", -0.1], "--temperature -0.1"),
    (["--temperature", "nan"], "--temperature nan"),
    (["--tcr-coeff", -1], "--tcr-coeff -1"),
    (["--loss", "byol"], "'byol'"),
    *[(["--patch-scale", text], f"--patch-scale: invalid parse_scale value: '{text}'")
      for text in ("0", "1.1", "x", "0.5-0.2", "0.1-0.2-0.3", "", "nan")],
])
def test_bad_input(images, tmp_path, monkeypatch, capsys, args, words):
    args = "--data", images, *SMALL, "--out", tmp_path, *args
    assert words in user_error(bagssl.main, monkeypatch, capsys, *args)


def test_colours_alternate(run_here, monkeypatch):
    made = []

    class Stop(Exception):
        pass

    class Recorder:
        def __init__(self, **colour):
            made.append(colour)

        def draw(self, n):
            raise Stop
    monkeypatch.setattr(common, "Photometric", Recorder)
    with pytest.raises(SystemExit):
        run_here("--patches", 3)
    expected = [bagssl.COLOURS[0], bagssl.COLOURS[1], bagssl.COLOURS[0]]
    assert made == [colour | {"size": 32} for colour in expected]
    assert [colour["blur_p"] for colour in bagssl.COLOURS] == [1.0, 0.1]
