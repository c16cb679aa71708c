"""vicreg.py: the loss against the paper, the golden numbers and itself on several processes; the training run."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import ROOT, kill_tree, make_images, on_processes, script, start, user_error

import vicreg
from vicreg import covariance, variance, vicreg_loss


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


def pair(n, d, scale=0.7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(n, d, generator=g, dtype=torch.float64) + 3).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("n,d", [(8, 50), (31, 32), (32, 32), (33, 32), (200, 7), (2, 5), (4, 1)])
def test_loss_is_algorithm_1(n, d):
    z, w = pair(n, d), pair(n, d)
    ours, theirs = vicreg_loss(*z)[0], algorithm_1(*w)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for a, b in zip(z, w):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["vicreg_wide", "vicreg_tall"])
def test_golden(name):
    g = {k: torch.tensor(v) for k, v in np.load(ROOT / f"tests/golden/{name}.npz").items()}
    z_a, z_b = g["z_a"].requires_grad_(), g["z_b"].requires_grad_()
    loss, parts = vicreg_loss(z_a, z_b, 25.0, 12.5, 1.0)
    loss.backward()
    for ours, theirs in ((loss, g["loss"]), (parts["inv"], g["sim"]), (parts["var"], 2 * g["std"]), (parts["cov"], g["cov"]),
                         (z_a.grad, g["grad_z_a"]), (z_b.grad, g["grad_z_b"])):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


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
    torch.testing.assert_close(vicreg_loss(z, z + 2)[1]["inv"].item(), 4.0)


def test_both_sides_of_the_duality():
    for n, d in ((20, 60), (60, 20)):
        z = pair(n, d)[0].detach()
        c = torch.cov(z.T)
        torch.testing.assert_close(covariance(z), (c.square().sum() - c.diagonal().square().sum()) / d)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_embeddings_stay_finite_under_autocast(dtype):
    scale = 100 if dtype == torch.float16 else 1e4  # 64 squares of 100 would not fit into half precision
    z_a, z_b = (scale * torch.randn(64, 512, generator=torch.Generator().manual_seed(i)) for i in range(2))
    z_a, z_b = z_a.to(dtype).requires_grad_(), z_b.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = vicreg_loss(z_a, z_b)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and z_a.grad.isfinite().all()
    exact = vicreg_loss(z_a.detach().double(), z_b.double())[0]
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)


def _ddp(rank, world, widths, rows):
    """Loss, terms and parameter gradients for each embedding width, of this process's share of the rows."""
    results = []
    for d in widths:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, d)).double()
        x_a, x_b = torch.randn(2, sum(rows), 5, dtype=torch.float64)
        mine = slice(sum(rows[:rank]), sum(rows[:rank + 1]))
        net = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
        try:
            loss, parts = vicreg_loss(net(x_a[mine]), net(x_b[mine]))
        except RuntimeError as error:
            return str(error)
        loss.backward()
        results.append((loss.item(), {k: v.item() for k, v in parts.items()}, [p.grad for p in model.parameters()]))
    return results


@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_one(tmp_path, world):
    widths = [4, 40]  # fewer and more than the 12 rows
    alone = _ddp(0, 1, widths, [12])
    shares = on_processes(world, tmp_path, _ddp, widths, [12 // world] * world)
    for i, (loss, parts, grads) in enumerate(alone):
        assert abs(sum(s[i][0] for s in shares) / world - loss) < 1e-6
        for _, theirs, their_grads in (s[i] for s in shares):
            assert abs(theirs["var"] - parts["var"]) < 1e-9 and abs(theirs["cov"] - parts["cov"]) < 1e-9
            for a, b in zip(grads, their_grads):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_unequal_batches_are_refused(tmp_path):
    for said in on_processes(2, tmp_path, _ddp, [40], [5, 7]):
        assert "batches of unequal size" in said


def test_random_box_is_random_resized_crop():
    rng = random.Random(0)
    areas, aspects = [], []
    for _ in range(3000):
        top, left, height, width = vicreg.random_box(rng, 300, 400, (0.2, 1.0))
        assert 0 <= top <= 300 - height and 0 <= left <= 400 - width
        areas.append(height * width / 120000)
        aspects.append(np.log(width / height))
    image = torch.empty(3, 300, 400)
    get_params, ratio = torchvision.transforms.RandomResizedCrop.get_params, (3 / 4, 4 / 3)
    theirs = [get_params(image, (0.2, 1.0), ratio)[2:] for _ in range(3000)]
    tenths = np.linspace(0, 1, 11)
    for ours, their in ((areas, [h * w / 120000 for h, w in theirs]), (aspects, [np.log(w / h) for h, w in theirs])):
        assert np.abs(np.quantile(ours, tenths) - np.quantile(their, tenths)).max() < 0.04
    for height, width in ((10, 400), (400, 10)):  # no crop of that area fits: the same central crop
        box = vicreg.random_box(rng, height, width, (0.9, 1.0))
        assert box == get_params(torch.empty(3, height, width), (0.9, 1.0), ratio)


def test_copied_alone(tmp_path):
    shutil.copy(ROOT / "vicreg.py", tmp_path)
    code = ("import torch, vicreg, importlib.util; assert importlib.util.find_spec('common') is None;"
            "net = torch.nn.Module(); net.dim = 4; net.forward = lambda x: (None, x.mean((2, 3)) @ torch.ones(3, 4));"
            "z = vicreg.VICReg(net, (8, 8))(torch.randn(6, 3, 9, 9), torch.randn(6, 3, 9, 9))[:2];"
            "loss, parts = vicreg.vicreg_loss(*z); loss.backward(); print(loss.item(), *parts)")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[1:] == ["inv", "var", "cov"], done.stderr


# --- the command line ----------------------------------------------------------------------------------------------

SMALL = ("--arch", "tiny_convnet", "--size", 32, "--projector", "32-32", "--batch-size", 8, "--base-lr", 1,
         "--warmup-epochs", 1,
         "--epochs", 8, "--log-every", 1, "--save-minutes", 0)  # with 44 images: 5 steps an epoch, 40 in all


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make_images(folder / "train", 44)
    make_images(folder / "val", 10, seed=1)
    return folder


def outcome(folder):
    """Final weights, optimizer state and log without its clock."""
    state = torch.load(folder / "last.pt", weights_only=True)
    timing = ("images_per_s", "data_wait", "memory_gb", "eta_s")
    lines = [json.loads(line) for line in open(folder / "log.jsonl")]
    return state, [{k: v for k, v in line.items() if k not in timing} for line in lines]


def assert_same(a, b):
    assert a[1] == b[1]
    assert a[0]["step"] == b[0]["step"]
    for x, y in zip(a[0]["model"].values(), b[0]["model"].values(), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(a[0]["optimizer"]["state"].values(), b[0]["optimizer"]["state"].values(), strict=True):
        assert torch.equal(x["momentum"], y["momentum"])


def wait_for_line(folder, step, process, seconds=120):
    begin = time.time()
    while time.time() - begin < seconds:
        if (folder / "log.jsonl").exists() and sum(1 for _ in open(folder / "log.jsonl")) >= step:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise AssertionError(f"no line {step} in {folder} after {seconds} s")


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bit_identical(images, tmp_path, processes):
    command = ("vicreg.py", "--data", images, *SMALL, "--out", tmp_path)
    whole = script(*command, "--name", "whole", "--workers", 0, torchrun=processes)
    assert whole.returncode == 0, whole.stderr
    assert "20-NN" in whole.stdout and "random initialisation" in whole.stdout
    for number, (step, sign) in enumerate(((4, signal.SIGKILL), (12, signal.SIGTERM))):
        process = start(*command, "--name", "cut", "--workers", number, torchrun=processes)
        wait_for_line(tmp_path / "cut", step, process)
        if sign == signal.SIGKILL:
            kill_tree(process.pid)
        else:
            os.killpg(process.pid, sign)
        said = process.communicate(timeout=120)[0]
        assert ("SIGTERM: saved at step" in said) == (sign == signal.SIGTERM), said
        newest = next(p for p in (tmp_path / "cut" / "last.pt", tmp_path / "cut" / "previous.pt") if p.exists())
        assert torch.load(newest, weights_only=True)["step"] < 40
    resumed = script(*command, "--name", "cut", "--workers", 2, torchrun=processes)
    assert resumed.returncode == 0 and "resumed at step" in resumed.stdout, resumed.stderr
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))
    assert len(outcome(tmp_path / "cut")[1]) == 40
    backbone = torch.load(tmp_path / "cut" / "backbone.pt", weights_only=True)
    assert not any(k.startswith("backbone") for k in backbone)


def run_here(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["vicreg.py", *map(str, args)])
    vicreg.main()


def test_usr1_saves_and_another_argument_is_refused(images, tmp_path, monkeypatch, capsys):
    import training
    command = ("--data", images, *SMALL, "--save-minutes", 60, "--workers", 0, "--out", tmp_path)
    log = training.Run.log

    def interrupt(self, **metrics):
        log(self, **metrics)
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGUSR1)
    monkeypatch.setattr(training.Run, "log", interrupt)
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, *command)
    assert stop.value.code == 0 and "SIGUSR1: saved at step 7" in capsys.readouterr().out
    said = user_error(vicreg.main, monkeypatch, capsys, *command, "--name", f"vicreg-{images.name}", "--var-coeff", 3)
    assert "var-coeff 25.0 (now 3.0)" in said and "another --name" in said


@pytest.mark.parametrize("args,words", [
    (["--data", "nowhere"], ["no data set 'nowhere'", "looked for", "--data shapes"]),
    (["--data", "EMPTY"], ["no images in", ".jpg"]),
    (["--batch-size", 1], ["--batch-size 1", "at least 2"]),
    (["--batch-size", 64], ["larger than the 44 images"]),
    (["--arch", "resnet19"], ["no architecture 'resnet19'", "resnet18"]),
    (["--size", 7], ["smaller than one stride", "--size 8"]),
])
def test_bad_input(images, tmp_path, monkeypatch, capsys, args, words):
    (tmp_path / "empty").mkdir()
    args = [tmp_path / "empty" if a == "EMPTY" else a for a in args]
    said = user_error(vicreg.main, monkeypatch, capsys, "--data", images, *SMALL, *args, "--workers", 0, "--out", tmp_path)
    for word in words:
        assert word in said


def test_indivisible_batch_under_torchrun(images, tmp_path):
    done = script("vicreg.py", "--data", images, *SMALL, "--batch-size", 9, "--out", tmp_path, torchrun=2)
    assert done.returncode != 0
    assert "error: --batch-size 9 must be at least 2 for each of the 2 processes" in done.stderr


def test_nan_stops_and_keeps_the_last_good_checkpoint(images, tmp_path, monkeypatch, capsys):
    command = ("--data", images, *SMALL, "--workers", 0, "--out", tmp_path, "--name", "nan", "--base-lr", 1e36)
    said = user_error(vicreg.main, monkeypatch, capsys, *command)
    assert "NaN" in said and all(f"{term} " in said for term in ("inv", "var", "cov", "lr"))
    kept = torch.load(tmp_path / "nan" / "last.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in kept["model"].values())


def test_broken_images_are_replaced_counted_and_limited(tmp_path, monkeypatch, capsys):
    folder = make_images(tmp_path / "train", 120).parent
    whole = (folder / "train" / "class0" / "0002.jpg").read_bytes()
    (folder / "train" / "class0" / "0002.jpg").write_bytes(whole[:200])
    args = ("--data", folder, *SMALL, "--workers", 0, "--epochs", 1, "--out", tmp_path)
    run_here(monkeypatch, *args, "--name", "one")
    out, err = capsys.readouterr()
    assert err.count("cannot read") == 1 and "0002.jpg" in err and "broken 1" in out
    assert json.loads(open(tmp_path / "one" / "log.jsonl").readlines()[-1])["broken"] == 1
    (folder / "train" / "class0" / "0004.jpg").write_bytes(b"no image")
    said = user_error(vicreg.main, monkeypatch, capsys, *args, "--name", "two")
    assert "over 1%" in said and "0002.jpg" in said and "0004.jpg" in said
