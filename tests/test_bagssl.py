"""bagssl.py: the objectives against golden numbers, distributions and themselves on several processes; the bag; the run."""
import itertools
import json
import math
import os
import random
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

import bagssl
import common
import vicreg
from bagssl import bag_loss, nt_xent, spectral_loss, total_coding_rate

DEFAULTS = {"vicreg": (25.0, 25.0, 1.0), "tcr": (30.0, 0.2), "simclr": (0.1,), "spectral": (1.0,)}


def rows(n, d, seed=0, unit=False):
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(z, dim=1) if unit else z


@pytest.fixture(scope="module")
def golden():
    return {key: torch.tensor(value) for key, value in np.load(ROOT / "tests/golden/bagssl.npz").items()}


# --- objectives ----------------------------------------------------------------------------------------------------


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
    z, eps = rows(n, d, unit=True), 0.3
    for product, size in ((z.T @ z, d), (z @ z.T, n)):  # D x D, n x n
        expected = torch.linalg.slogdet(torch.eye(size) + d / (n * eps) * product)[1] / 2
        torch.testing.assert_close(total_coding_rate(z, eps), expected)
    assert torch.autograd.gradcheck(lambda z: total_coding_rate(z, eps), (z.requires_grad_(),))


def test_coding_rate_known_values():
    eye = torch.eye(4, dtype=torch.float64)  # n = D orthonormal rows: each of D eigenvalues is 1 + 1 / eps
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
        first, second = ((z @ z.T - c * torch.eye(d)).square().sum() for c in (1, n / d))
        constants.append((gram - second).item())
        # The paper writes gram = first; they differ by a number that no embedding changes (Le et al., Lemma 3.2).
        torch.testing.assert_close((gram - first).item(), float(n - d))
        # The left side is the spectral regularisation: the second term of Eq. (6), over a minibatch.
        spread = (spectral_loss(z.T, z.T, 3.0) + 1) / 3
        torch.testing.assert_close(n * (n - 1) * spread, gram)
    np.testing.assert_allclose(constants, n * n / d - n)  # C


def toy(w=1.4):
    """p(x_1, x_2) over four patches, its marginal, and embeddings with w z_1^T z_2 = p(x_1, x_2) / (p(x_1) p(x_2))."""
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
        assert expectation_over_batches(z.detach() + 0.1 * rows(4, 4, seed), joint, w / 2) > loss


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
    z = [rows(n, d, seed).requires_grad_() for seed in range(2)]
    assert torch.autograd.gradcheck(lambda *z: bag_loss(z, objective, *DEFAULTS[objective])[0], z)


def test_terms_are_weighted_as_the_paper_has_them():
    z_a, z_b = rows(9, 5), rows(9, 5, 1)
    sim = F.cosine_similarity(z_a, z_b).mean()
    rate = sum(total_coding_rate(F.normalize(z, dim=1), 0.4) for z in (z_a, z_b)) / 2
    loss, parts = bag_loss([z_a, z_b], "tcr", 7.0, 0.4)
    torch.testing.assert_close(loss, -(7 * sim + rate))
    torch.testing.assert_close((parts["sim"], parts["tcr"]), (sim, rate))
    torch.testing.assert_close(bag_loss([z_a, z_b], "simclr", 0.2)[0], nt_xent(z_a, z_b, 0.2))
    unit_a, unit_b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
    assert bag_loss([z_a, z_b], "spectral", 0.2)[0] == spectral_loss(unit_a, unit_b, 0.2)
    assert bag_loss([z_a, z_b], "vicreg", 3.0, 4.0, 5.0)[0] == vicreg.vicreg_loss(z_a, z_b, 3.0, 4.0, 5.0)[0]


@pytest.mark.parametrize("objective", DEFAULTS)
def test_more_patches_are_all_pairs(objective):
    z, coefficients = [rows(6, 4, seed) for seed in range(4)], DEFAULTS[objective]
    loss, parts = bag_loss(z, objective, *coefficients)
    pairs = [bag_loss([z[i], z[j]], objective, *coefficients) for i in range(4) for j in range(i)]
    assert len(pairs) == 6
    torch.testing.assert_close(loss, sum(value for value, _ in pairs) / 6)
    for key in parts:
        torch.testing.assert_close(parts[key], sum(p[key] for _, p in pairs) / 6)


@pytest.mark.parametrize("objective", DEFAULTS)
def test_half_precision_under_autocast(objective):
    z = [rows(16, 64, seed).to(torch.bfloat16).requires_grad_() for seed in range(2)]
    exact = bag_loss([v.detach().double() for v in z], objective, *DEFAULTS[objective])[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = bag_loss(z, objective, *DEFAULTS[objective])
    loss.backward()
    assert loss.dtype == torch.float32 and all(v.grad.isfinite().all() for v in z)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def _ddp(rank, world, widths):
    """Loss and parameter gradients for each objective and width, of this process's share of 12 rows."""
    results = []
    for (objective, coefficients), d in itertools.product(DEFAULTS.items(), widths):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, d)).double()
        x = torch.randn(3, 12, 5, dtype=torch.float64)[:, rank * 12 // world:(rank + 1) * 12 // world]
        net = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
        loss, parts = bag_loss(net(x.flatten(0, 1)).chunk(3), objective, *coefficients)
        loss.backward()
        results.append((loss.item(), {k: v.item() for k, v in parts.items()}, [p.grad for p in model.parameters()]))
    return results


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_equal_one(tmp_path, world):
    widths = [4, 40]  # fewer and more than the 12 rows
    shares = on_processes(world, tmp_path, _ddp, widths)
    for i, (loss, parts, grads) in enumerate(_ddp(0, 1, widths)):
        assert sum(s[i][0] for s in shares) / world == pytest.approx(loss, rel=1e-9)
        for key, value in parts.items():
            assert sum(s[i][1][key] for s in shares) / world == pytest.approx(value, rel=1e-9)
        for share in shares:
            for a, b in zip(grads, share[i][2]):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_twins_are_the_same_to_the_letter():
    ours, theirs = ((ROOT / name).read_text() for name in ("bagssl.py", "vicreg.py"))
    for begin, end in (("JITTER =", "\n"), ("def random_box", "\n\n\n"), ("class AllSum", "def all_rows"),
                       ("def all_rows", "\n\n\n"), ("def moments", "# ---"), ("def mlp", "\n\n\n")):
        twins = [text[text.index(begin):text.index(end, text.index(begin))].rstrip() for text in (theirs, ours)]
        assert twins[0] in ours and len(twins[0]) > 30, begin


# --- patches -------------------------------------------------------------------------------------------------------


def test_patches_have_the_scale_and_lie_anywhere():
    rng = random.Random(0)
    for height, width, scale, side in ((32, 32, "0.1914", 14), (224, 224, "0.1", 71), (120, 160, "0.2", 62)):
        area = bagssl.parse_scale(scale)
        patches = [bagssl.sample_patches(rng, height, width, area, 3, 48) for _ in range(700)]
        assert all(len(p) == 3 for p in patches)
        boxes = np.array([box for p in patches for box, _, _ in p])
        assert (boxes[:, 2:] == side).all() and {size for p in patches for *_, size in p} == {48}
        for begin, room in ((boxes[:, 0], height - side), (boxes[:, 1], width - side)):
            assert begin.min() == 0 and begin.max() == room and abs(begin.mean() / room - 0.5) < 0.03
        assert 0.45 < np.mean([flip for p in patches for _, flip, _ in p]) < 0.55
        first, second = boxes[::3], boxes[1::3]
        assert abs(np.corrcoef(first[:, 0], second[:, 0])[0, 1]) < 0.1  # drawn independently


def test_a_range_is_multi_scale():
    rng, area = random.Random(0), bagssl.parse_scale("0.08-1")
    assert area == (0.08, 1.0)
    boxes = np.array([bagssl.sample_patches(rng, 100, 100, area, 1, 48)[0][0] for _ in range(500)])
    share = boxes[:, 2] * boxes[:, 3] / 1e4
    assert share.min() < 0.12 and share.max() > 0.85 and (boxes[:, 2] != boxes[:, 3]).mean() > 0.9


def test_dense_grid():
    for pixels, patch in ((73, 32), (501, 224), (107, 48)):
        for count in (1, 4, 16, 64, 256):
            boxes = np.array(bagssl.patch_grid(pixels, patch, count))
            assert len(set(map(tuple, boxes))) == count and (boxes[:, 2:] == patch).all()
            centres = boxes[:, :2] + patch / 2
            np.testing.assert_allclose(centres.mean(0), pixels / 2, atol=0.5)
            if count > 1:
                assert boxes[:, :2].min() == 0 and (boxes[:, :2] + patch).max() == pixels
                assert all(np.ptp(np.diff(np.unique(boxes[:, axis]))) <= 1 for axis in (0, 1))
            assert len(np.unique(boxes[:, 0])) == len(np.unique(boxes[:, 1])) == math.isqrt(count)
    assert bagssl.patch_grid(10, 4, 4) == [(0, 0, 4, 4), (0, 6, 4, 4), (6, 0, 4, 4), (6, 6, 4, 4)]
    for count in (0, 2, 8):
        with pytest.raises(ValueError, match="square"):
            bagssl.patch_grid(10, 4, count)
    assert bagssl.image_side(71, 0.1) == 225 and bagssl.image_side(14, 14 ** 2 / 32 ** 2) == 32


def test_a_grid_patch_is_what_training_cuts():
    coarse, patch = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8), 48
    side = bagssl.image_side(patch, 0.2)
    image = Image.fromarray(coarse).resize((2 * side, 2 * side), Image.BICUBIC)
    whole = common.cut(image, (0, 0, 2 * side, 2 * side), False, side)
    for top, left, h, w in bagssl.patch_grid(side, patch, 16):
        assert abs(h * w / side ** 2 - 0.2) < 0.005
        patch_alone = common.cut(image, (2 * top, 2 * left, 2 * h, 2 * w), False, patch)
        error = (patch_alone.float() - whole[:, top:top + h, left:left + w].float()).abs()
        assert error[:, 2:-2, 2:-2].max() <= 2 and error.mean() < 1  # at its border training's patch sees nothing beyond


# --- the bag -------------------------------------------------------------------------------------------------------


def test_bag_embedding():
    y = torch.randn(3, 5, 7)
    torch.testing.assert_close(bagssl.bag_embedding(y), bagssl.bag_embedding(y[:, torch.randperm(5)]))
    assert torch.equal(bagssl.bag_embedding(y[:, :1]), y[:, 0])
    torch.testing.assert_close(bagssl.bag_embedding(y)[1, 2], sum(y[1, p, 2] for p in range(5)) / 5)


def test_image_embedding_is_the_mean_over_its_patches():
    x = torch.randn(2, 3, 22, 22)
    seen = []

    def embed(patches):
        seen.append(patches)
        return patches.amax((2, 3))
    found = bagssl.image_embedding(embed, x, 10, 4)
    corners = [x[:, :, i:i + 10, j:j + 10].amax((2, 3)) for i in (0, 12) for j in (0, 12)]
    torch.testing.assert_close(found, sum(corners) / 4)
    assert len(seen) == 4 and all(p.shape == (2, 3, 10, 10) for p in seen)
    torch.testing.assert_close(bagssl.image_embedding(embed, x, 10, 1), x[:, :, 6:16, 6:16].amax((2, 3)))


def test_local_aggregation():
    maps = torch.randn(2, 25, 512)  # Appendix C.4: 512 x 5 x 5 -> 2048
    found = bagssl.local_aggregation(maps)
    assert found.shape == (2, 2048)
    image = maps.mT.reshape(2, 512, 5, 5)
    expected = torch.stack([image[:, :, i:i + 3, j:j + 3].mean((2, 3)) for i in (0, 2) for j in (0, 2)], 2)
    torch.testing.assert_close(found, expected.flatten(1))
    small = bagssl.local_aggregation(maps[:, :16])
    assert small.shape == (2, 2048)  # 4 x 4: the last windows have two rows or columns
    torch.testing.assert_close(small[:, 3::4], maps[:, [10, 11, 14, 15]].mean(1))
    assert torch.equal(bagssl.local_aggregation(maps[:, :1]), maps[:, 0])


def test_model_pairs_patches_and_embeddings():
    torch.manual_seed(0)
    model = bagssl.BagSSL(common.TinyConvNet(), (16, 8), 5).eval()
    patches = list(torch.randn(3, 4, 3, 32, 32))
    with torch.no_grad():
        embeddings, logits = model(patches)
        y = [model.backbone(x)[1] for x in patches]
        for z, each in zip(embeddings, y, strict=True):
            torch.testing.assert_close(z, model.projector(each), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits, model.probe(sum(y) / 3), rtol=1e-4, atol=1e-5)
    _, logits = model.train()(patches)
    logits.sum().backward()
    assert all(p.grad is None for p in [*model.backbone.parameters(), *model.projector.parameters()])


def test_copied_alone(tmp_path):
    shutil.copy(ROOT / "bagssl.py", tmp_path)
    code = ("import torch, bagssl, importlib.util; assert importlib.util.find_spec('common') is None;"
            "net = torch.nn.Module(); net.dim = 4; net.forward = lambda x: (None, x.mean((2, 3)) @ torch.ones(3, 4));"
            "z = bagssl.BagSSL(net, (8, 8))([torch.randn(6, 3, 9, 9) for _ in range(3)])[0];"
            "[print(bagssl.bag_loss(z, name, *c)[0].item()) for name, c in"
            " [('vicreg', (25, 25, 1)), ('tcr', (30, 0.2)), ('simclr', (0.1,)), ('spectral', (1,))]]")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.split()) == 4, done.stderr


# --- the command line ----------------------------------------------------------------------------------------------

SMALL = ("--arch", "tiny_convnet", "--size", 32, "--projector", "32-16", "--batch-size", 8, "--base-lr", 1,
         "--warmup-epochs", 1, "--epochs", 6, "--log-every", 1, "--save-minutes", 0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make_images(folder / "train", 44)
    make_images(folder / "val", 10, seed=1)
    return folder


def test_killed_and_resumed_is_bit_identical(images, tmp_path):
    command = ("bagssl.py", "--data", images, *SMALL, "--loss", "tcr", "--patches", 3, "--out", tmp_path)
    whole = script(*command, "--name", "whole", "--workers", 0)
    assert whole.returncode == 0 and "20-NN" in whole.stdout, whole.stderr
    process = start(*command, "--name", "cut", "--workers", 0)
    log, begin = tmp_path / "cut" / "log.jsonl", time.time()
    while not log.exists() or sum(1 for _ in open(log)) < 7:
        assert process.poll() is None and time.time() - begin < 120
        time.sleep(0.02)
    kill_tree(process.pid)
    process.communicate()
    resumed = script(*command, "--name", "cut", "--workers", 1)
    assert resumed.returncode == 0 and "resumed at step" in resumed.stdout, resumed.stderr
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    for x, y in zip(a["model"].values(), b["model"].values(), strict=True):
        assert torch.equal(x, y)
    a, b = ([json.loads(line) for line in open(tmp_path / name / "log.jsonl")] for name in ("whole", "cut"))
    assert len(a) == len(b) == 30
    for key in ("step", "loss", "sim", "tcr", "std", "accuracy", "lr"):
        assert [line[key] for line in a] == [line[key] for line in b]


@pytest.mark.parametrize("loss", ["tcr", *[pytest.param(name, marks=pytest.mark.slow)
                                           for name in ("vicreg", "simclr", "spectral")]])
def test_under_torchrun(images, tmp_path, loss):
    done = script("bagssl.py", "--data", images, *SMALL, "--epochs", 1, "--loss", loss, "--out", tmp_path, torchrun=2)
    assert done.returncode == 0 and "20-NN" in done.stdout, done.stderr


@pytest.mark.parametrize("loss", DEFAULTS)
def test_the_flags_reach_the_loss(images, tmp_path, monkeypatch, loss):
    seen = []

    def spy(embeddings, *rest):
        seen.append(([len(embeddings), embeddings[0].shape], rest))
        return bag_loss(embeddings, *rest)
    monkeypatch.setattr(bagssl, "bag_loss", spy)
    flags = ("--inv-coeff", 1.5, "--var-coeff", 2.5, "--cov-coeff", 3.5, "--tcr-coeff", 4.5, "--tcr-eps", 0.5,
             "--temperature", 0.6, "--spectral-coeff", 0.7)
    arguments = ["bagssl.py", "--data", images, *SMALL, "--loss", loss, "--patches", 3, "--epochs", 2, *flags]
    monkeypatch.setattr(sys, "argv", [str(a) for a in [*arguments, "--workers", 0, "--out", tmp_path]])
    bagssl.main()
    given = {"vicreg": (1.5, 2.5, 3.5), "tcr": (4.5, 0.5), "simclr": (0.6,), "spectral": (0.7,)}[loss]
    assert seen == 10 * [([3, (8, 16)], (loss, *given))]


def test_recipes_have_the_appendix_numbers():
    def of(data, *keys):
        return tuple(bagssl.RECIPES[data][key] for key in keys)
    keys = "arch", "epochs", "batch_size", "base_lr", "final_lr", "weight_decay", "warmup_epochs", "projector"
    assert of("cifar10", *keys) == ("resnet34", 600, 1024, 0.3, 0, 1e-4, 10, "4096-128")
    assert of("cifar100", *keys) == ("resnet34", 600, 1024, 0.3, 0, 1e-4, 10, "4096-512")
    assert of("imagenet100", *keys, "tcr_coeff") == ("resnet50", 400, 1024, 0.1, 0, 1e-4, 10, "8192-8192-8192", 1920)
    assert of("imagenet", *keys) == ("resnet50", 800, 1024, 0.1, 0, 1e-6, 10, "8192-8192-8192")


@pytest.mark.parametrize("args,words", [
    (["--data", "nowhere"], "no data set 'nowhere'"), (["--patches", 1], "--patches 1"),
    *[(["--patch-scale", text], f"--patch-scale {text}") for text in ("0", "1.1", "x", "0.5-0.2", "0.1-0.2-0.3", "")],
])
def test_bad_input(images, tmp_path, monkeypatch, capsys, args, words):
    args = "--data", images, *SMALL, "--workers", 0, "--out", tmp_path, *args
    assert words in user_error(bagssl.main, monkeypatch, capsys, *args)


def test_colours_alternate(images, tmp_path, monkeypatch):
    made = []

    class Stop(Exception):
        pass

    class Recorder:
        def __init__(self, **colour):
            made.append(colour)

        def __call__(self, x, generator):
            raise Stop
    monkeypatch.setattr(common, "Photometric", Recorder)
    arguments = ["bagssl.py", "--data", images, *SMALL, "--patches", 3, "--workers", 0, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(a) for a in arguments])
    with pytest.raises(Stop):
        bagssl.main()
    assert made == [bagssl.COLOURS[0], bagssl.COLOURS[1], bagssl.COLOURS[0]]
    assert [colour["blur_p"] for colour in bagssl.COLOURS] == [1.0, 0.1]
