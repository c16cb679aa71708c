"""All methods on two and three processes: losses, gradients and runs equal those of one."""
import itertools
import math
import os
import signal
import threading
import time

import helpers
import pytest
import torch
import torch.distributed as dist
from helpers import METHODS, assert_same, checkpoint, lines, on_processes, run_in_pool
from torch import nn

import bagssl
import common
import cribo
import lc_loss
import training
import vicreg
import vicregl

# --- losses and gradients -------------------------------------------------------------------------
# case(rank, world) -> [(loss, its terms, gradients), ...] of this process's share of some rows.

ROWS = 12
WIDTHS = [4, 40]  # fewer and more than the rows


def share(rank, world, count=ROWS):
    return slice(rank * count // world, (rank + 1) * count // world)


def network(*widths):
    torch.manual_seed(0)
    layers = [nn.Linear(i, o) for i, o in zip(widths, widths[1:])]
    layers.insert(1, nn.Tanh())
    return nn.Sequential(*layers).double()


def in_ddp(model):
    """In DDP, which must live until the backward pass: keep it in a variable."""
    return nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model


def result(loss, parts, model):
    loss.backward()
    values = {name: value.item() for name, value in parts.items()}
    return loss.item(), values, [p.grad.clone() for p in model.parameters()]


def vicreg_case(rank, world):
    results = []
    for d in WIDTHS:
        model = network(5, 8, d)
        x_a, x_b = torch.randn(2, ROWS, 5).double()
        net = in_ddp(model)
        mine = share(rank, world)
        loss, parts = vicreg.vicreg_loss(net(x_a[mine]), net(x_b[mine]))
        results.append(result(loss, parts, model))
    return results


def vicregl_case(rank, world):
    results = []
    for d, alpha in itertools.product(WIDTHS, (0.0, 0.75, 1.0)):
        model = network(5, 8, d)
        x = [torch.randn(ROWS, n, 5).double() for n in (9, 9, 4)]  # two large views, a small one
        pos = [50 * torch.rand(ROWS, n, 2).double() for n in (9, 9, 4)]
        net = in_ddp(model)
        mine = share(rank, world)
        views = net(torch.cat([view[mine].flatten(0, 1) for view in x]))
        rows = len(x[0][mine])
        maps = views.split([rows * view.shape[1] for view in x])
        maps = [view.unflatten(0, (rows, -1)) for view in maps]
        embeddings = [view.mean(1) for view in maps]
        loss, parts = vicregl.vicregl_loss(embeddings, maps, [p[mine] for p in pos], alpha,
                                           num_matches=(5, 2), num_feature_matches=(4, 3))
        results.append(result(loss, parts, model))
    return results


def lc_loss_case(rank, world):
    """No image of the first process shares a point with its crop."""
    results = []
    for local_loss in (lc_loss.local_contrastive_loss, lc_loss.local_mse_loss):
        torch.manual_seed(0)
        model = nn.Conv2d(5, 5, 1).double()
        f_c, f_sc = torch.randn(2, ROWS, 5, 3, 3).double()
        points = 2.4 * torch.rand(ROWS, 3, 3, 2).double() - 1.2
        valid = (points.abs() <= 1).all(3)
        valid[:ROWS // 3] = False
        mine = share(rank, world)
        net = in_ddp(model)
        loss = local_loss(f_c[mine], net(f_sc[mine]), points[mine], valid[mine])
        results.append(result(loss, {}, model))
    return results


class Both(nn.Module):
    """A linear student of images and one of objects."""

    def __init__(self):
        super().__init__()
        self.image = nn.Linear(5, 8)
        self.object = nn.Linear(5, 8)

    def forward(self, image, objects):
        return self.image(image), self.object(objects)


def cribo_case(rank, world):
    """The processes hold different numbers of objects, of which more, fewer or none are trusted."""
    results = []
    for last, trust in ((3, 0.5), (0, 0.5), (10, 0.5), (3, 0.0), (3, 1.0)):
        torch.manual_seed(0)
        model = Both().double()
        images = torch.randn(2, ROWS, 5).double()
        objects = torch.randn(2, 10, 5).double()
        image_t, object_t, neighbour_t = [torch.randn(2, n, 8).double() for n in (ROWS, 10, 10)]
        ok = torch.rand(2, 10) < trust
        i = share(rank, world)
        o = share(rank, world, 10 - last)  # the last process has so many more
        if rank == world - 1:
            o = slice(o.start, 10)
        net = in_ddp(model)
        logits = net(images[:, i].flatten(0, 1), objects[:, o].flatten(0, 1))
        ok = ok[:, o].flatten()
        neighbours = neighbour_t[:, o].flatten(0, 1)[ok]
        targets = cribo.Targets(image_t[:, i].flatten(0, 1), object_t[:, o].flatten(0, 1),
                                neighbours, ok.nonzero().flatten())
        centers = [torch.zeros(8).double(), torch.zeros(8).double()]
        loss, parts = cribo.cribo_loss(targets, *logits, *centers, 0.05)
        loss, parts, grads = result(loss, parts, model)
        cribo.update_center(centers[0], targets.image)
        cribo.update_center(centers[1], targets.objects)
        results.append((loss, parts, grads + centers))
    return results


BAG_LOSSES = {"vicreg": (25.0, 25.0, 1.0), "tcr": (30.0, 0.2), "simclr": (0.5,), "spectral": (1.0,)}


def bagssl_case(rank, world):
    results = []
    for (objective, coefficients), d in itertools.product(BAG_LOSSES.items(), WIDTHS):
        model = network(5, 8, d)
        x = torch.randn(3, ROWS, 5).double()[:, share(rank, world)]
        net = in_ddp(model)
        embeddings = net(x.flatten(0, 1)).chunk(3)
        loss, parts = bagssl.bag_loss(embeddings, objective, *coefficients)
        results.append(result(loss, parts, model))
    return results


CASES = dict(vicreg=vicreg_case, vicregl=vicregl_case, lc_loss=lc_loss_case, cribo=cribo_case,
             bagssl=bagssl_case)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_processes_equal_one(method, world):
    alone = CASES[method](0, 1)
    shares = on_processes(world, CASES[method])
    for loss, _, grads in alone:
        assert math.isfinite(loss) and any(grad.any() for grad in grads)
    for i, (loss, parts, grads) in enumerate(alone):
        theirs = [results[i] for results in shares]
        near = 1e-7 if method == "cribo" else 1e-9  # its means are over counts in float32
        mean = sum(value for value, _, _ in theirs) / world
        assert mean == pytest.approx(loss, rel=near, abs=1e-12)
        for name, part in parts.items():
            mean = sum(their_parts[name] for _, their_parts, _ in theirs) / world
            assert mean == pytest.approx(part, rel=near, abs=1e-12), name
        for _, their_parts, their_grads in theirs:
            for name in parts.keys() & {"var", "cov", "local_var", "local_cov", "tcr"}:
                assert their_parts[name] == pytest.approx(parts[name], rel=1e-9), name
            for a, b in zip(grads, their_grads, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


UNEQUAL = {
    "vicreg-wide": lambda z_a, z_b: vicreg.vicreg_loss(z_a, z_b),
    "vicreg-tall": lambda z_a, z_b: vicreg.vicreg_loss(z_a[:, :3], z_b[:, :3]),
    "variance": lambda z_a, z_b: vicreg.variance(z_a),
    "covariance": lambda z_a, z_b: vicreg.covariance(z_a),
    "vicregl-global": lambda z_a, z_b: vicregl.vicregl_loss([z_a, z_b], [], [], alpha=1.0),
    "vicregl-local": lambda z_a, z_b: vicregl.local_criterion(
        z_a.view(-1, 5, 8), z_b.view(-1, 5, 8), z_a[:, :10].view(-1, 5, 2),
        z_b[:, :10].view(-1, 5, 2)),
    "tcr-wide": lambda z_a, z_b: bagssl.total_coding_rate(z_a),
    "tcr-tall": lambda z_a, z_b: bagssl.total_coding_rate(z_a[:, :3]),
    "nt_xent": lambda z_a, z_b: bagssl.nt_xent(z_a, z_b),
    "spectral": lambda z_a, z_b: bagssl.spectral_loss(z_a, z_b),
    **{f"bag-{objective}": lambda z_a, z_b, objective=objective: bagssl.bag_loss(
        [z_a, z_b], objective, *BAG_LOSSES[objective]) for objective in BAG_LOSSES},
}


def _unequal(rank, world, name):
    z_a, z_b = torch.randn(2, 4 + rank, 40)
    try:
        UNEQUAL[name](z_a, z_b)
        return "nothing"
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("name", UNEQUAL)
def test_unequal_batches_are_refused_by_all(name):
    """4, 5 and 6 rows: the second process has the mean, and must raise too."""
    for said in on_processes(3, _unequal, name):
        assert "batches of unequal size" in said


def _bank(rank, world):
    """Ten objects in both views, of which the first process holds 7, then four that it has not."""
    torch.manual_seed(0)
    c = torch.randn(2, 10, 6)
    more = torch.randn(2, 4, 6)
    bank = cribo.MemoryBank(10, 6)
    bank.push(*(c + 0.7 * torch.randn(2, 10, 6)) if rank == 0 else torch.zeros(2, 0, 6))
    mine = [slice(0, 7), slice(7, 10)][rank] if world > 1 else slice(0, 10)
    matches = torch.stack(cribo.cycle_consistent_matches(c[0, mine], c[1, mine], bank))
    bank.push(c[0, mine], c[1, mine])
    mine = [slice(0, 0), slice(0, 4)][rank] if world > 1 else slice(0, 4)
    bank.push(more[0, mine], more[1, mine])
    return matches, bank.objects, bank.pushed


def test_processes_share_bank_and_batch():
    matches, objects, pushed = _bank(0, 1)
    shares = on_processes(2, _bank)
    assert torch.equal(torch.cat([share[0] for share in shares], 1), matches)
    assert 0 < matches[2:, :7].sum() < 14 and 0 < matches[2:, 7:].sum() < 6  # some are trusted
    for _, their_objects, their_pushed in shares:
        assert torch.equal(their_objects, objects) and their_pushed == pushed == 24


# --- BatchNorm ------------------------------------------------------------------------------------

def _batch_norm(rank, world):
    """Output, gradients and buffers of a network with BatchNorm on this process's share of 12."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten(),
                          nn.Linear(5 * 16, 7), nn.BatchNorm1d(7), nn.Linear(7, 4)).double()
    x = 3 + 2 * torch.randn(12, 3, 6, 6).double()
    kinds = [type(module) for module in model]
    names = list(model.state_dict())
    if world:
        model, ddp = training.distribute(model, torch.device("cpu"))
        assert nn.BatchNorm2d not in [type(module) for module in model] != kinds
        assert list(model.state_dict()) == names and not ddp.broadcast_buffers
    mine = share(rank, world or 1, 12)
    x = x[mine].contiguous(memory_format=torch.channels_last).requires_grad_()
    for _ in range(2):  # statistics run
        y = (ddp if world else model)(x)
    y.sin().sum().backward()
    parameters = torch.cat([p.grad.flatten() for p in model.parameters()])
    buffers = torch.cat([b.flatten().double() for b in model.buffers()])
    model.eval()
    return y.detach(), x.grad, parameters, buffers, model(x).detach()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_batch_norm_is_that_of_the_joined_batch(world):
    alone = _batch_norm(0, 0)
    shares = on_processes(world, _batch_norm)
    outputs, inputs, parameters, buffers, evaluated = zip(*shares)
    assert alone[3].abs().min() > 0
    for ours, expected in zip((outputs, inputs, evaluated), (alone[0], alone[1], alone[4])):
        torch.testing.assert_close(torch.cat(ours), expected, rtol=0, atol=1e-10)
    for grads in parameters:  # DDP has averaged those of sums over the shares
        torch.testing.assert_close(world * grads, alone[2], rtol=0, atol=1e-10)
    for theirs in buffers:
        torch.testing.assert_close(theirs, alone[3], rtol=0, atol=1e-10)


def _batch_norm_in_half(rank, world):
    torch.manual_seed(0)
    model, ddp = training.distribute(nn.BatchNorm2d(5), torch.device("cpu"))
    x = 30 + torch.randn(64, 5, 4, 4)
    x = x.bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = ddp(x[share(rank, world, 64)])
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    expected = nn.functional.batch_norm(x.float(), None, None, training=True)
    torch.testing.assert_close(y.float(), expected[share(rank, world, 64)], rtol=2**-8, atol=1e-5)
    return model.running_mean, x.float().mean((0, 2, 3))


def test_batch_norm_of_bf16_has_statistics_in_float32():
    for running, mean in on_processes(2, _batch_norm_in_half):
        torch.testing.assert_close(running, 0.1 * mean, rtol=1e-6, atol=0)


def _plain_colours():
    """The colours are drawn for each process: without them, processes see what one would."""
    normal = common.recolour

    def plain(colours, views):
        return [common.normalize(view.float() / 255) for view in views]

    def undo():
        common.recolour = normal

    common.recolour = plain
    return undo


@pytest.mark.parametrize("method", [method for method in METHODS if method != "cribo"])
def test_training_on_processes_equals_training_on_one(method, flags, tmp_path):
    """With BatchNorm and all. (CrIBo's clusters start from tokens that each process draws.)"""
    args = (*flags(method), "--out", tmp_path, "--epochs", 1, "--name")
    for world in (1, 2):
        answers = on_processes(world, run_in_pool, method, (*args, world), (_plain_colours,))
        assert codes(answers) == world * [0]
    own = {"std", "spread", "local_spread", "corr"}  # of each process's share
    for one, two in zip(lines(tmp_path / "1"), lines(tmp_path / "2"), strict=True):
        for key in one.keys() - own:
            assert two[key] == pytest.approx(one[key], rel=1e-5), key
    one, two = (checkpoint(tmp_path / name)["model"] for name in "12")
    for key in one:
        distance = (one[key].double() - two[key].double()).norm()
        assert distance < 1e-5 * one[key].double().norm(), key


# --- whole runs -----------------------------------------------------------------------------------

def codes(answers):
    return [answer["code"] for answer in answers]


ABLATIONS = [
    ("vicreg", "--projector 32-4 --views released"),  # more rows than dimensions
    ("vicregl", "--views multicrop --num-matches 4 2 --size 56"),
    ("vicregl", "--alpha 0"),
    ("vicregl", "--alpha 1"),
    ("lc_loss", "--alpha 0"),
    ("lc_loss", "--alpha 1"),
    ("lc_loss", "--local-loss mse --alpha 0.5"),
    ("cribo", "--no-cycle --arch tiny_vit --drop-path 0.1 --bf16"),
    ("cribo", "--no-object --no-cross-image"),
    *(("bagssl", f"--loss {loss} --patches 3") for loss in BAG_LOSSES),
]


@pytest.mark.parametrize("method,more", ABLATIONS)
def test_variants_run_on_two_processes(method, more, flags, tmp_path):
    args = (*flags(method), *more.split(), "--epochs", 2, "--out", tmp_path, "--name", "two")
    first, second = on_processes(2, run_in_pool, method, args)
    assert codes([first, second]) == [0, 0], (first, second)
    assert "2 on cpu" in first["out"] and not second["out"]
    log = lines(tmp_path / "two")
    assert [line["step"] for line in log] == list(range(1, 11))
    assert all(math.isfinite(value) for line in log for value in line.values())
    parameters = first["parameters"]
    assert parameters and helpers.equal(parameters, second["parameters"])
    if method == "cribo" and "--no-cycle" in more:
        assert log[-1]["bootstrap"] == 1 and log[-1]["cross_image"] > 0
        assert checkpoint(tmp_path / "two")["model"]["bank.objects"].dtype == torch.bfloat16
    if method == "cribo" and "--no-object" in more:
        assert log[-1]["loss"] == pytest.approx(log[-1]["image"])
        assert log[-1]["cross_image"] == 0 < log[-1]["object"]


def _signal(rank, step):
    """SIGTERM to one process at a step; votes at every third."""
    normal, every = training.Run.log, training.VOTE_EVERY

    def log(self, **metrics):
        normal(self, **metrics)
        if self.step == step and training.rank_and_world()[0] == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    def undo():
        training.Run.log = normal
        training.VOTE_EVERY = every

    training.Run.log = log
    training.VOTE_EVERY = 3
    return undo


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_stop_and_resume_to_the_bit(method, flags, tmp_path):
    args = (*flags(method), "--out", tmp_path, "--save-minutes", 60, "--name")
    assert codes(on_processes(2, run_in_pool, method, (*args, "whole"))) == [0, 0]
    for rank, step, saved in ((0, 4, 6), (1, 11, 12)):
        stop = (_signal, rank, step)
        answers = on_processes(2, run_in_pool, method, (*args, "cut"), stop)
        assert codes(answers) == [0, 0], answers
        assert f"SIGTERM: saved at step {saved}" in answers[0]["out"]
        assert checkpoint(tmp_path / "cut")["step"] == saved
    assert codes(on_processes(2, run_in_pool, method, (*args, "cut"))) == [0, 0]
    assert_same(tmp_path / "whole", tmp_path / "cut")


def _poison(step):
    """From a step on, the second process sees NaN."""
    normal = common.recolour
    calls = []

    def poisoned(colours, views):
        calls.append(1)
        views = normal(colours, views)
        nan = dist.get_rank() == 1 and len(calls) > step
        return [x * math.nan for x in views] if nan else views

    def undo():
        common.recolour = normal

    common.recolour = poisoned
    return undo


@pytest.mark.parametrize("log_every", [1, 1000])  # found at a log line, and by a save
def test_nan_in_one_process_stops_all(log_every, flags, tmp_path):
    args = (*flags("vicreg"), "--log-every", log_every, "--out", tmp_path, "--name", "nan")
    for answer in on_processes(2, run_in_pool, "vicreg", args, (_poison, 12)):
        assert str(answer["code"]).startswith("UserError: NaN or infinity"), answer
    kept = checkpoint(tmp_path / "nan")
    assert kept["step"] == 10  # the last vote to save before
    assert all(value.isfinite().all() for value in kept["model"].values())


def test_batches_that_processes_cannot_share(flags, tmp_path):
    for size in (9, 2):
        args = (*flags("vicreg"), "--batch-size", size, "--out", tmp_path)
        for answer in on_processes(2, run_in_pool, "vicreg", args):
            assert f"--batch-size {size}" in str(answer["code"])


def _differing(rank, world, args, change):
    return run_in_pool(rank, world, "vicreg", (*args, *change) if rank == 1 else args)


@pytest.mark.parametrize("change", ["--seed 1", "--base-lr 2", "--inv-coeff 5", "--data OTHER"])
def test_processes_that_differ_are_refused(change, flags, tmp_path):
    other = helpers.make_images(tmp_path / "other", 45)
    change = [other if word == "OTHER" else word for word in change.split()]
    args = (*flags("vicreg"), "--out", tmp_path, "--name", "differ")
    for answer in on_processes(2, _differing, args, change):
        assert "the processes differ" in str(answer["code"])


def _note_keys(path):
    """Writes down every (epoch, index) that is trained on."""
    normal = common.Batches.__iter__

    def noting(self):
        for keys in normal(self):
            with open(path, "a") as file:
                file.writelines(f"{epoch} {index}\n" for epoch, index in keys)
            yield keys

    def undo():
        common.Batches.__iter__ = normal

    common.Batches.__iter__ = noting
    return undo


def _note_and_stop(path, step):
    undo_notes = _note_keys(path)
    undo_signal = _signal(0, step)

    def undo():
        undo_signal()
        undo_notes()

    return undo


def test_another_number_of_processes_sees_the_same_data(flags, tmp_path):
    """Some steps on one process, some on three, the rest on two."""
    notes = tmp_path / "keys"
    args = (*flags("vicreg"), "--batch-size", 6, "--out", tmp_path, "--name", "cut")
    for world, stop in ((1, 4), (3, 14), (2, None)):
        prepare = (_note_and_stop, notes, stop) if stop else (_note_keys, notes)
        answers = on_processes(world, run_in_pool, "vicreg", args, prepare)
        assert codes(answers) == world * [0], answers
    seen = notes.read_text().splitlines()
    total = 4 * (44 // 6)
    assert len(seen) == len(set(seen)) == 6 * total and len(lines(tmp_path / "cut")) == total
    whole = [key for batch in common.Batches(44, 6, 0, total, seed=0) for key in batch]
    assert sorted(seen) == sorted(f"{epoch} {index}" for epoch, index in whole)


# --- collectives ----------------------------------------------------------------------------------

def _collectives(rank, world, method, args):
    """All collectives of a run's fourth step, which neither logs, saves nor votes, and how many
    times it normalizes a batch."""
    normal = training.Run.batches
    normalize = training.GlobalBatchNorm.forward
    counted = []
    normalized = []

    def forward(self, x):
        normalized.append(1)
        return normalize(self, x)

    def batches(self, sample):
        steps = normal(self, sample)
        yield from itertools.islice(steps, 3)
        normalized.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            yield next(steps)
        counted.extend(event.name for event in profiler.events() if "c10d::" in event.name)
        counted.append(len(normalized))
        yield from steps

    training.Run.batches = batches
    training.GlobalBatchNorm.forward = forward
    answer = run_in_pool(rank, world, method, args)
    training.Run.batches = normal
    training.GlobalBatchNorm.forward = normalize
    *counted, normalized = counted
    return answer["code"], counted, normalized


@pytest.mark.parametrize("method,most", [("vicreg", 16), ("vicregl", 24)])
@pytest.mark.parametrize("width", [4, 16])  # less and more than the batch of 8
def test_collectives_of_a_step(method, most, width, flags, tmp_path):
    rare = ("--log-every", 1000, "--save-minutes", 60, "--epochs", 1)
    args = (*flags(method), "--projector", f"32-{width}", *rare, "--out", tmp_path)
    for code, counted, normalized in on_processes(2, _collectives, method, args):
        assert code == 0 and normalized > 0
        others = len(counted) - 4 * normalized  # mean and variance, forward and backward
        assert 0 < others <= most, counted


# --- starts ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("late", [0, 1, 2])
def test_each_start_has_a_store_of_its_own(late):
    store = dist.HashStore()
    found = {}

    def begin(start, rank):
        time.sleep(0.2 * (rank == late))
        mine = training.fresh_store(store, rank, 3)
        mine.set(f"here {rank}", str(start))
        found[start, rank] = [mine.get(f"here {r}") for r in range(3)]

    for start in range(3):  # what earlier starts left in the store must not be found
        threads = [threading.Thread(target=begin, args=(start, rank)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert all(found[start, rank] == 3 * [str(start).encode()] for rank in range(3))
