"""What only a GPU can tell, skipped without one; DEVICE=cpu runs what it can on the CPU instead.

Losses in float32 against the CPU in float64, BatchNorm's kernels, NCCL, host syncs, training.
"""
import os
import signal
import warnings

import helpers
import pytest
import torch
import torch.distributed as dist
from helpers import METHODS, checkpoint, lines
from torch import nn

import bagssl
import common
import cribo
import lc_loss
import training
import vicreg
import vicregl
from evaluate import knn

DEVICE = torch.device(os.environ.get("DEVICE", "cuda"))
CPU = torch.device("cpu")
CUDA = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="no GPU"),
]
only_cuda = pytest.mark.skipif(not CUDA, reason="of CUDA alone")


def distance(a, b):
    """|a - b| / |b| of tensors on any device."""
    a = a.detach().cpu().double()
    b = b.detach().cpu().double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


# --- losses ---------------------------------------------------------------------------------------
# loss(device, dtype) -> leaves, loss: the same numbers for all devices and types.

BOXES = torch.tensor([[3.0, 5, 90, 70], [20, 11, 60, 60]])


def draw(device, dtype, *shapes):
    torch.manual_seed(0)
    drawn = [torch.randn(shape) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def vicreg_case(width, device, dtype):
    z = draw(device, dtype, (64, width), (64, width))
    loss, _ = vicreg.vicreg_loss(*z)
    return z, loss


def vicregl_case(views, device, dtype):
    sides = [7, 7, 3, 3][:views]
    e = draw(device, dtype, *[(16, 48)] * views)
    maps = draw(device, dtype, *[(16, side**2, 24) for side in sides])
    boxes = BOXES.repeat(16, views // 2, 1).to(device)  # positions in float32, so ties fall alike
    flips = (torch.arange(16 * views).view(16, views) % 3 == 0).to(device)
    pos = vicregl.map_positions(boxes, flips, maps)
    loss, _ = vicregl.vicregl_loss(e, maps, pos)
    return e + maps, loss


def lc_loss_case(kind, device, dtype):
    embeddings = draw(device, dtype, *[(16, 32)] * 4)
    f_c, f_sc = draw(device, dtype, (16, 24, 7, 7), (16, 24, 7, 7))
    boxes = BOXES.repeat(8, 1).to(device)
    flips = (torch.arange(16) % 2 == 0).to(device)
    sizes = torch.tensor([[100, 90]]).repeat(16, 1).to(device)
    place = lc_loss.correspondences(boxes, flips, sizes, 7)
    loss, _ = lc_loss.lc_loss(*embeddings, f_c, f_sc, *place, local_loss=kind)
    return [*embeddings[:2], f_sc], loss


def cribo_case(_, device, dtype):
    image, objects, *teacher = draw(device, dtype, (32, 96), (20, 96), (32, 96), (20, 96), (7, 96))
    trusted = torch.tensor([0, 3, 4, 9, 11, 12, 19], device=device)
    centers = draw(device, dtype, (96,), (96,))
    targets = cribo.Targets(*[t.detach() for t in teacher], trusted)
    loss, _ = cribo.cribo_loss(targets, image, objects, *[c.detach() for c in centers], 0.07)
    return [image, objects], loss


def bagssl_case(objective, device, dtype):
    z = draw(device, dtype, (48, 96), (48, 96), (48, 96))
    loss, _ = bagssl.bag_loss(z, objective)
    return z, loss


CASES = [(vicreg_case, 16), (vicreg_case, 256), (vicregl_case, 2), (vicregl_case, 4),
         (lc_loss_case, "contrastive"), (lc_loss_case, "mse"), (cribo_case, None),
         *((bagssl_case, objective) for objective in ("vicreg", "tcr", "simclr", "spectral"))]


@pytest.mark.parametrize("case,option", CASES)
def test_losses_and_gradients(case, option):
    found = []
    for device, dtype in ((CPU, torch.float64), (DEVICE, torch.float32)):
        leaves, loss = case(option, device, dtype)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for expected, ours in zip(*found):
        assert expected.any() and distance(ours, expected) < 2e-5


@pytest.mark.parametrize("case,option", CASES)
def test_losses_compute_in_float32_whatever_autocast_says(case, option):
    _, expected = case(option, DEVICE, torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        _, loss = case(option, DEVICE, torch.float32)
    assert loss.dtype == torch.float32 and distance(loss, expected) < 1e-6


def test_clustering():
    torch.manual_seed(0)
    tokens = torch.randn(8, 392, 64)
    positions = 224 * torch.rand(8, 392, 2)
    init = torch.rand(8, 392).argsort(1)[:, :12]
    found = [cribo.joint_space_clustering(tokens.to(device), positions.to(device), 12, 1.0,
                                          init.to(device)).cpu() for device in (CPU, DEVICE)]
    same = (found[0] > 0) == (found[1] > 0)
    assert same.float().mean() > 0.999  # at near-ties rounding decides


def test_bank_search_and_matches():
    torch.manual_seed(0)
    queries = torch.randn(500, 384)
    rows = torch.randn(100_000, 384).bfloat16()
    for kind in (torch.bfloat16, torch.float32):
        found = [cribo.nearest(queries.to(device), rows.to(device, kind)).cpu()
                 for device in (CPU, DEVICE)]
        assert (found[0] == found[1]).float().mean() > 0.99
    assert cribo.nearest(queries[:0].to(DEVICE), rows.to(DEVICE)).shape == (0,)

    results = []
    for device in (CPU, DEVICE):
        bank = cribo.MemoryBank(1000, 384, torch.bfloat16).to(device)
        old = rows[:1000].float()
        bank.push(old.to(device), (old + 0.1).to(device))
        c = old[:200] + 0.5 * queries[:200]
        found = cribo.cycle_consistent_matches(c.to(device), (c + 0.1).to(device), bank)
        results.append(torch.stack(found).cpu())
    assert (results[0] == results[1]).float().mean() > 0.99 and results[0][2:].any()


def test_nearest_neighbors():
    torch.manual_seed(0)
    queries = torch.randn(500, 64)
    rows = torch.randn(5000, 64)
    labels = torch.arange(5000)
    results = []
    for device in (CPU, DEVICE):
        chunks = [(x.to(device), y.to(device), [0, 1][i % 2:])  # trial 1 has all, trial 0 half
                  for i, (x, y) in enumerate(zip(rows.split(400), labels.split(400)))]
        trials = knn.nearest_rows(queries.to(device), chunks, 20, trials=2)
        results.append([torch.stack(found).cpu() for found in zip(*trials)])
    (similarity, found), (expected, neighbors) = results
    torch.testing.assert_close(similarity, expected, rtol=0, atol=1e-5)
    assert (found == neighbors).float().mean() > 0.99  # at near-ties rounding decides


def test_object_representations():
    torch.manual_seed(0)
    z = torch.randn(2, 8, 49, 32)
    labels = torch.randint(0, 60, (8, 98))
    q = nn.functional.one_hot(labels, 60).float()
    expected = cribo.object_representations(*z, q)
    ours = cribo.object_representations(*z.to(DEVICE), q.to(DEVICE), len(expected[0]))
    for a, b in zip(ours, expected):
        assert distance(a, b) < 1e-5


# --- common and training --------------------------------------------------------------------------

def test_colours():
    torch.manual_seed(0)
    views = [torch.randint(0, 256, (64, 3, side, side), dtype=torch.uint8) for side in (96, 96, 48)]
    colours = [common.Photometric(vicreg.JITTER, blur_p=p, solarize_p=0.2) for p in (1, 0.1, 0.5)]
    found = []
    for device in (CPU, DEVICE):
        torch.manual_seed(1)
        found.append(common.recolour(colours, [view.to(device) for view in views]))
    for expected, ours in zip(*found):
        far = (ours.cpu() - expected).abs() > 1e-3
        assert far.float().mean() < 1e-4  # a hue or a solarized value at its edge


@pytest.mark.parametrize("arch", ["resnet18", "convnext_tiny", "vit_tiny_patch16"])
def test_backbones(arch):
    torch.manual_seed(0)
    model = common.build_backbone(arch).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        _, expected = model(x)
        model = model.to(DEVICE, memory_format=torch.channels_last)
        _, ours = model(x.to(DEVICE))
    assert distance(ours, expected) < 5e-3  # cuDNN multiplies in TF32


@pytest.mark.parametrize("make", [
    lambda params: training.LARS(params, lr=0.1, weight_decay=1e-4),
    lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
])
def test_optimizers(make):
    found = []
    for device in (CPU, DEVICE):
        params = draw(device, torch.float32, (64, 32), (64,), (8, 3, 3, 3))
        optimizer = make(params)
        for step in range(5):
            for p in params:
                p.grad = torch.sin(p.detach() * (step + 1))
            optimizer.step()
        found.append(params)
    for expected, ours in zip(*found):
        assert distance(ours, expected) < 1e-5


@pytest.fixture
def group(tmp_path):
    """One process is a group of its own: all collectives through NCCL."""
    yield lambda: dist.init_process_group("nccl" if CUDA else "gloo", rank=0, world_size=1,
                                          init_method=f"file://{tmp_path}/store")
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_group_of_one_process_computes_the_same_losses(group):
    def all_losses():
        found = []
        for case, option in CASES:
            leaves, loss = case(option, DEVICE, torch.float32)
            found += [loss, *torch.autograd.grad(loss, leaves)]
        return found

    alone = all_losses()
    group()
    for ours, expected in zip(all_losses(), alone):
        assert distance(ours, expected) < 1e-5
    objects, first = cribo.all_objects(torch.randn(7, 8, device=DEVICE))
    assert objects.shape == (7, 8) and first == 0


@pytest.mark.parametrize("bf16", [False, True])
def test_batch_norm_in_a_group_is_batch_norm(bf16, group):
    """Values, gradients and running statistics of two steps of a network in DDP."""
    def train():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                              nn.Flatten(), nn.Linear(8 * 36, 16, bias=False),
                              nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
        model, ddp = training.distribute(model, DEVICE)
        x = (3 + torch.randn(32, 3, 8, 8)).to(DEVICE)
        for _ in range(2):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                y = ddp(x)
            y.float().square().mean().backward()
        grads = [p.grad for p in model.parameters()]
        return [y, *grads, *model.buffers()], model, ddp

    alone, *_ = train()
    group()
    ours, *kept = train()
    assert isinstance(kept[0][1], training.GlobalBatchNorm)
    for a, b in zip(ours, alone, strict=True):
        assert distance(a, b) < (0.05 if bf16 else 1e-3)
    del kept


# --- runs -----------------------------------------------------------------------------------------

def run(method, flags, tmp_path, name, *more):
    args = (*flags(method), "--bf16", "--out", tmp_path, "--name", name, *more)
    assert helpers.run(method, *args) == 0
    return lines(tmp_path / name)


@pytest.fixture(autouse=True)
def device_of_runs(monkeypatch):
    """DEVICE=cpu hides a GPU that is there."""
    if not CUDA:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("method", METHODS)
def test_thirty_steps_in_bf16(method, flags, tmp_path, monkeypatch, capsys):
    log = run(method, flags, tmp_path, "gpu", "--epochs", 6)
    assert f"processes: 1 on {DEVICE.type}" in capsys.readouterr().out
    assert [line["step"] for line in log] == list(range(1, 31))
    assert checkpoint(tmp_path / "gpu")["step"] == 30  # all that it saves is finite
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = run(method, flags, tmp_path, "cpu", "--epochs", 6, "--no-bf16")
    assert log[0]["loss"] == pytest.approx(on_cpu[0]["loss"], rel=0.1)


def counting_syncs(monkeypatch, begin, mode):
    """Sets the mode in which torch tells host syncs, from a step's batch to the next step's."""
    batches = training.Run.batches

    def watched(self, sample):
        for batch in batches(self, sample):
            if CUDA and self.step >= begin:
                torch.cuda.set_sync_debug_mode(mode)
            yield batch
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(training.Run, "batches", watched)


QUIET = ("--log-every", 1000, "--save-minutes", 60)


@pytest.mark.parametrize("method,more", [
    ("vicreg", ""), ("vicregl", ""), ("vicregl", "--views multicrop --size 40"), ("lc_loss", ""),
    *(("bagssl", f"--loss {loss}") for loss in ("vicreg", "tcr", "simclr", "spectral"))])
def test_a_step_has_no_host_sync(method, more, flags, tmp_path, monkeypatch):
    counting_syncs(monkeypatch, 3, "error")
    if "multicrop" in more:
        monkeypatch.setattr(vicregl, "SMALL", (6, (0.08, 0.4), 0.4))
        monkeypatch.setitem(vicregl.VIEWS, "multicrop", [vicregl.LARGE, vicregl.SMALL])
    end = training.Run.end_step

    def end_step(self):
        if CUDA and self.step + 1 == self.total:  # the last step logs and saves
            torch.cuda.set_sync_debug_mode("default")
        end(self)

    monkeypatch.setattr(training.Run, "end_step", end_step)
    log = training.Run.log

    def log_quietly(self, **metrics):
        mode = torch.cuda.get_sync_debug_mode() if CUDA else 0
        if CUDA and self.step + 1 == self.total:
            torch.cuda.set_sync_debug_mode("default")
        log(self, **metrics)
        if CUDA:
            torch.cuda.set_sync_debug_mode(mode)

    monkeypatch.setattr(training.Run, "log", log_quietly)
    run(method, flags, tmp_path, "run", *QUIET, "--epochs", 2, *more.split())


@only_cuda
def test_a_step_of_cribo_has_two_host_syncs(flags, tmp_path, monkeypatch):
    counting_syncs(monkeypatch, 6, "warn")  # after the first epoch; the bank is asked at its end
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run("cribo", flags, tmp_path, "run", *QUIET, "--epochs", 4)
    syncs = [w for w in caught if "called a synchronizing" in str(w.message)]
    steps = 20 - 6 - 1  # the last one logs and saves
    assert 2 * steps <= len(syncs)
    by_place = {}
    for w in syncs:
        by_place[w.filename, w.lineno] = by_place.get((w.filename, w.lineno), 0) + 1
    often = [place for place, count in by_place.items() if count >= steps]
    assert len(often) == 2, by_place


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_stopped_goes_on(method, flags, tmp_path, monkeypatch):
    """The same steps, rates and, but for the order of sums, numbers."""
    whole = run(method, flags, tmp_path, "whole", "--no-bf16")
    with monkeypatch.context() as patch:
        helpers.at_step(patch, 6, helpers.interrupted(signal.SIGTERM))
        assert len(run(method, flags, tmp_path, "cut", "--no-bf16")) == 7
    cut = run(method, flags, tmp_path, "cut", "--no-bf16")
    assert [line["lr"] for line in cut] == [line["lr"] for line in whole]
    for i in (6, 7):  # of the stopped run, and of the one that went on
        assert cut[i]["loss"] == pytest.approx(whole[i]["loss"], rel=0.02)


@only_cuda
@pytest.mark.parametrize("method", ["vicreg", "cribo"])
def test_compiled(method, flags, tmp_path):
    eager, compiled = (run(method, flags, tmp_path, name, "--no-bf16", "--epochs", 1, *more)
                       for name, *more in (("eager",), ("compiled", "--compile")))
    assert compiled[0]["loss"] == pytest.approx(eager[0]["loss"], rel=1e-3)
    names = [list(checkpoint(tmp_path / name)["model"]) for name in ("eager", "compiled")]
    assert names[0] == names[1]
