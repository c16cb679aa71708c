"""cribo.py: clustering, objects, matches and losses against golden numbers and loops; the model; the training run."""
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
from test_vicreg import wait_for_line

import common
import cribo
import training
import weights
from cribo import MemoryBank, cycle_consistent_matches, distillation_loss, nearest, object_representations
from cribo import joint_space_clustering as clustering


def golden(name):
    return {k: torch.tensor(v) for k, v in np.load(ROOT / f"tests/golden/{name}.npz").items()}


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def two_views(b=3, grid=4, d=8, k=5, seed=0):
    """Tokens (B, 2N, D), positions of two random crops (B, 2N, 2) and K starting tokens (B, K)."""
    g = torch.Generator().manual_seed(seed)
    boxes = 100 * torch.rand(b, 2, 4, generator=g) + torch.tensor([0, 0, 50, 50])
    pos = cribo.joint_positions(boxes, torch.rand(b, 2, generator=g) < 0.5, grid)
    tokens = torch.randn(b, 2 * grid ** 2, d, generator=g)
    return tokens, pos, torch.rand(b, 2 * grid ** 2, generator=g).argsort(1)[:, :k]


# --- positions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", "abcd")
def test_golden_positions(name):
    g = golden("positions")
    ours = cribo.positions(g[f"{name}_box"][None], g[f"{name}_flip"][None], len(g[f"{name}_grid"]))[0]
    torch.testing.assert_close(ours, g[f"{name}_grid"], rtol=0, atol=1e-3)


def test_joint_positions():
    boxes, flips = torch.tensor([[[0.0, 10, 20, 40], [5, 0, 10, 10]]]), torch.tensor([[True, False]])
    pos = cribo.joint_positions(boxes, flips, 2)
    assert pos[0].tolist() == [[5, 40], [5, 20], [15, 40], [15, 20], [7.5, 2.5], [7.5, 7.5], [12.5, 2.5], [12.5, 7.5]]


def test_views():
    rng = random.Random(0)
    views = [view for _ in range(300) for view in cribo.sample_views(rng, 300, 400, 224)]
    areas = np.array([h * w / 120000 for (_, _, h, w), _, _ in views])
    assert 0.24 < areas.min() < 0.28 and areas.max() > 0.9 and {size for _, _, size in views} == {224}
    assert 0.45 < np.mean([flip for _, flip, _ in views]) < 0.55 and len(views) == 600


# --- clustering ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cribo_small", "cribo_sem"])
def test_golden_clustering_objects_and_matches(name):
    g = golden(name)
    assignment = clustering(g["tokens"], g["positions"], int(g["num_objects"]), g["pos_weight"].item(), g["init"])
    assert torch.equal(assignment, g["assignment"])
    c_1, c_2, valid = object_representations(*g["last_tokens"].chunk(2, 1), assignment)
    assert torch.equal(valid.flatten(), g["valid"]) and torch.equal(valid.sum(1), g["objects_per_image"])
    torch.testing.assert_close(c_1, g["objects_1"])
    torch.testing.assert_close(c_2, g["objects_2"])
    bank = MemoryBank(40, 12)
    bank.push(*g["bank"])
    ours = cycle_consistent_matches(c_1, c_2, bank)
    for mine, theirs in zip(ours, ("nn_idx_1", "nn_idx_2", "cycle_1", "cycle_2")):
        assert torch.equal(mine, g[theirs])


def literal_clustering(tokens, pos, k, pos_weight, init):
    """Design, section 6, CrIBo (b), word by word, with a B x 2N x 2N x K mask."""
    tokens, (b, n, _) = F.normalize(tokens, dim=2), tokens.shape
    hard = torch.zeros(b, n, k)
    for image in range(b):
        for cluster in range(k):
            hard[image, init[image, cluster], cluster] = 1
    centroids = torch.stack([t[i] for t, i in zip(tokens, init)])
    columns = torch.full((b, 1, k), 1 / k)
    apart = (pos[:, :, None] - pos[:, None]).square().sum(3).sqrt()  # (B, 2N, 2N)
    for _ in range(5):
        others = (hard[:, None] > 0) & ~torch.eye(n, dtype=torch.bool)[:, :, None]  # (B, 2N, 2N, K)
        d = torch.where(others, apart[..., None], torch.inf).min(2).values
        d = torch.stack([torch.where(x.isinf(), torch.where(x.isinf(), 0, x).mean(), x) for x in d])
        d = d / d.flatten(1).max(1).values[:, None, None]
        cost = pos_weight * d - tokens @ centroids.mT
        plan = torch.exp(-20 * (cost - cost.min()) / (cost.max() - cost.min()))
        for _ in range(5):
            plan = plan / plan.sum(2, keepdim=True)
            plan = columns * plan / plan.sum(1, keepdim=True)
        hard = F.one_hot(plan.argmax(2), k).float()
        columns = hard.sum(1, keepdim=True) + 0.01
        columns = columns / columns.sum(2, keepdim=True)
        centroids = F.normalize(hard.mT @ tokens, dim=2)
    return torch.cat([view / view.sum(1, keepdim=True).clamp(min=1) for view in hard.chunk(2, 1)], 1)


@pytest.mark.parametrize("pos_weight,k", [(0.0, 5), (1.0, 5), (2.0, 12), (4.0, 1)])
def test_clustering_is_the_literal_one(pos_weight, k):
    tokens, pos, init = two_views(k=k, seed=k)
    assert torch.equal(clustering(tokens, pos, k, pos_weight, init), literal_clustering(tokens, pos, k, pos_weight, init))


def test_sinkhorn_marginals():
    columns = F.normalize(torch.rand(3, 5, generator=torch.Generator().manual_seed(0)).double(), p=1, dim=1)
    cost = torch.rand(3, 16, 5, generator=torch.Generator().manual_seed(1)).double()
    plan = cribo.sinkhorn(cost, columns, 300, 20.0)
    torch.testing.assert_close(plan.sum(1), columns)
    torch.testing.assert_close(plan.sum(2), torch.full((3, 16), 1 / 16).double())
    scaled = (plan.log() + 20 * cost)  # only rows and columns were scaled: the sum of two vectors
    rest = scaled - scaled.mean(1, keepdim=True) - scaled.mean(2, keepdim=True) + scaled.mean((1, 2), keepdim=True)
    assert rest.abs().max() < 1e-9
    torch.testing.assert_close(cribo.sinkhorn(cost, columns, 5, 20.0).sum(1), columns)


def planted(seed=0):
    """Three contents in horizontal stripes of the image, seen in two crops of it: tokens, positions, their stripes."""
    boxes = torch.tensor([[[0.0, 0, 90, 60], [10, 20, 70, 60]]] * 4)
    pos = cribo.joint_positions(boxes, torch.tensor([[False, True]] * 4), 6)
    stripe = (pos[..., 0] / 30).long().clamp(max=2)  # (B, 2N)
    contents = 3 * F.one_hot(torch.arange(3), 8).float()
    return contents[stripe] + 0.3 * rand(*stripe.shape, 8, seed=seed), pos, stripe


def groups(assignment):
    """Each location's cluster (B, 2N)."""
    assert torch.equal((assignment > 0).sum(2), torch.ones(assignment.shape[:2]).long())
    return assignment.argmax(2)


def test_planted_groups_are_found():
    tokens, pos, stripe = planted()
    init = torch.stack([torch.tensor([(s == k).nonzero()[0].item() for k in range(3)]) for s in stripe])
    for pos_weight in (0.0, 1.0):
        assert torch.equal(groups(clustering(tokens, pos, 3, pos_weight, init)), stripe)
    torch.manual_seed(0)
    assignment = clustering(tokens, pos, 6, 1.0)  # more clusters than groups: parts of them
    for label, s in zip(groups(assignment), stripe):
        purity = sum(s[label == k].bincount().max() for k in label.unique()) / len(s)
        assert purity > 0.9


def test_clusters_are_compact_where_content_is_the_same():
    _, pos, _ = planted()
    tokens = torch.ones(*pos.shape[:2], 8) + 1e-3 * rand(*pos.shape[:2], 8)
    init = torch.tensor([[0, 35]] * 4)  # upper left and lower right corner of the first view
    label = groups(clustering(tokens, pos, 2, 8.0, init))

    def spread(label):
        inside = [p[chosen].var(0).sum() * chosen.sum() for p, x in zip(pos, label) for chosen in (x == 0, x == 1)]
        return sum(inside) / pos.var(1).sum() / pos.shape[1]
    random_label = (torch.rand(label.shape, generator=torch.Generator().manual_seed(0)) < 0.5).long()
    assert spread(label) < 0.75 < 0.95 < spread(random_label)
    assert spread(label) < 0.8 * spread(groups(clustering(tokens, pos, 2, 0.0, init)))


def test_clustering_does_not_depend_on_units():
    tokens, pos, init = two_views()
    ours = clustering(tokens.requires_grad_(), pos, 5, 1.0, init)
    assert not ours.requires_grad and ours.dtype == torch.float32
    factor = torch.tensor([1.0, 4.0, 0.25])[:, None, None]  # powers of two: nothing is rounded
    assert torch.equal(ours, clustering(8 * tokens, factor * pos, 5, 1.0, init))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours, clustering(tokens, pos, 5, 1.0, init))


def test_clusters_start_at_distinct_random_tokens():
    tokens, pos, _ = two_views()
    torch.manual_seed(0)
    first = clustering(tokens, pos, 32, 0.0, iters=1)  # as many clusters as tokens: each has its own
    assert (first.sum(1) == 1).all()
    seen = [clustering(tokens, pos, 5, 1.0) for _ in range(2)]
    assert not torch.equal(*seen)
    for view in seen[0].chunk(2, 1):
        sums = view.sum(1)
        torch.testing.assert_close(sums[sums > 0], torch.ones_like(sums[sums > 0]))


def test_equal_tokens_are_finite():
    _, pos, init = two_views()
    assignment = clustering(torch.ones(3, 32, 8), pos, 5, 0.0, init)
    assert assignment.isfinite().all() and (assignment > 0).sum() == 3 * 32


# --- objects -------------------------------------------------------------------------------------------------------


def test_objects_in_one_view_only_are_dropped():
    z_1, z_2 = rand(2, 2, 3, 4).requires_grad_()
    q = torch.zeros(2, 6, 3)
    q[0, :, 0] = torch.tensor([0.5, 0.5, 0, 1, 0, 0])  # in both views
    q[0, 2, 1] = 1  # in the first view alone
    q[0, 4:, 2] = 0.5  # in the second alone
    q[1, :, 2] = torch.tensor([0, 0.5, 0.5, 1 / 3, 1 / 3, 1 / 3])
    q[1, 0, 0] = 1
    c_1, c_2, valid = object_representations(z_1, z_2, q)
    assert valid.tolist() == [[True, False, False], [False, False, True]]
    torch.testing.assert_close(c_1, torch.stack([z_1[0, :2].mean(0), z_1[1, 1:].mean(0)]))
    torch.testing.assert_close(c_2, torch.stack([z_2[0, 0], z_2[1].mean(0)]))
    (grad,) = torch.autograd.grad(c_1.sum(), z_1)
    assert grad[0, 2].abs().max() == 0 and (grad[0, :2] == 0.5).all()
    none, _, valid = object_representations(z_1, z_2, torch.zeros(2, 6, 3))
    assert none.shape == (0, 4) and not valid.any()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(object_representations(z_1, z_2, q)[0], c_1)


# --- the bank and its matches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearest_is_by_cosine_in_chunks(dtype):
    queries, rows = rand(20, 6), (rand(50, 6, seed=1) * (1 + 5 * rand(50, 1, seed=2).abs())).to(dtype)
    expected = F.cosine_similarity(queries[:, None].to(dtype).float(), rows[None].float(), dim=2).argmax(1)
    assert (expected != (queries @ rows.float().T).argmax(1)).any()
    for chunk in (1, 7, 50, 64):
        agree = (nearest(queries, rows, chunk) == expected).float().mean()
        assert agree == 1 if dtype == torch.float32 else agree > 0.9
    close = 1 + 1e-3 * rows  # of which bfloat16 would take the cosines for one
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = nearest(close[:20].float(), close.float())
    assert in_autocast.tolist() == nearest(close[:20].float(), close.float()).tolist()
    assert dtype == torch.bfloat16 or in_autocast.tolist() == list(range(20))
    same = torch.ones(1, 6)
    assert nearest(same, same.expand(5, -1), 2).tolist() == [0]  # of equals the first
    assert nearest(queries[:0], rows).shape == (0,)


def entry(*numbers):
    """A row for each number, by which it can be known again."""
    return torch.tensor([[1.0, i] for i in numbers]).view(-1, 2)


def test_bank_keeps_the_newest_in_order():
    bank, given = MemoryBank(5, 2), 0
    for count in (3, 0, 1):
        new = entry(*range(given, given + count))
        bank.push(new, -new)
        given += count
        assert not bank.ready
    assert bank.nearest(-entry(1, 3), 0).max() < 4  # of what is there, though an empty entry would have cosine 0
    for count, kept in ((1, [0, 1, 2, 3, 4]), (2, [5, 6, 2, 3, 4]), (4, [10, 6, 7, 8, 9]), (7, [17, 13, 14, 15, 16])):
        new = entry(*range(given, given + count))
        bank.push(new, -new)
        given += count
        assert bank.ready and bank.objects[0, :, 1].tolist() == kept and torch.equal(bank.objects[0], -bank.objects[1])
    saved = MemoryBank(5, 2)
    saved.load_state_dict(bank.state_dict())
    for b in (bank, saved):
        b.push(entry(given), entry(given))
    assert torch.equal(saved.objects, bank.objects) and (bank.objects[0, :, 1] == given - 5).sum() == 0


def test_cycle_on_a_bank_with_known_answers():
    e = torch.eye(8)
    c_1, c_2 = torch.stack([e[0], e[1], e[2]]), torch.stack([e[3], e[4], e[5]])
    bank = MemoryBank(4, 8)
    # entry 0: both ways to object 0 (3 times as long: the cosine decides). Entry 1: object 1's neighbour in the first
    # view, whose other view is like object 2's; so 1 is not trusted from view 1. Entry 2: object 1's neighbour in the
    # second view, and in the first it is like object 1: trusted from view 2. Entry 3: object 2's in both, but its first
    # view is nearer to object 0.
    m_1 = torch.stack([3 * e[0], e[1] + 0.1 * e[7], 0.5 * e[1] + 0.4 * e[6], 0.8 * e[0] + 0.7 * e[2] + e[6]])
    m_2 = torch.stack([2 * e[3], 0.3 * e[5] + 0.1 * e[4] + e[7], e[4], e[5]])
    bank.push(m_1, m_2)
    nn_1, nn_2, ok_1, ok_2 = cycle_consistent_matches(c_1, c_2, bank)
    assert nn_1.tolist() == [0, 1, 3] and nn_2.tolist() == [0, 2, 3]
    assert ok_1.tolist() == [True, False, True] and ok_2.tolist() == [True, True, False]
    swapped = cycle_consistent_matches(c_2, c_1, _bank(m_2, m_1))
    for ours, theirs in zip(swapped, (nn_2, nn_1, ok_2, ok_1)):
        assert torch.equal(ours, theirs)


def _bank(m_1, m_2):
    bank = MemoryBank(len(m_1), m_1.shape[1])
    bank.push(m_1, m_2)
    return bank


def _objects(rank, world):
    """Ten objects in both views, of which the two processes hold 7 and 3, then 0 and 4; the bank and its matches."""
    c, more = rand(2, 10, 6), rand(2, 4, 6, seed=1)
    bank = _bank(*(c + 0.7 * rand(2, 10, 6, seed=2)))
    mine = slice(0, 10) if world == 1 else (slice(0, 7), slice(7, 10))[rank]
    matches = torch.stack(cycle_consistent_matches(c[0, mine], c[1, mine], bank))
    bank.push(c[0, mine], c[1, mine])
    mine = slice(0, 4) if world == 1 else (slice(0, 0), slice(0, 4))[rank]
    bank.push(more[0, mine], more[1, mine])
    return matches, bank.objects, bank.pushed


def test_processes_share_bank_and_batch(tmp_path):
    matches, objects, pushed = _objects(0, 1)
    shares = on_processes(2, tmp_path, _objects)
    assert torch.equal(torch.cat([s[0] for s in shares], 1), matches)
    assert 0 < matches[2:, :7].sum() < 14 and 0 < matches[2:, 7:].sum() < 6  # some are trusted, in both processes
    for share in shares:
        assert torch.equal(share[1], objects) and share[2] == pushed == 24


# --- losses --------------------------------------------------------------------------------------------------------


def test_golden_losses():
    g = golden("cribo_loss")
    student, objects = g["student"].requires_grad_(), g["student_obj"].requires_grad_()
    temps = g["teacher_temp"].item(), g["student_temp"].item()
    teacher = g["teacher"], g["teacher_obj"], torch.cat([g["nn_1"], g["nn_2"]]), torch.cat([g["valid_1"], g["valid_2"]])
    centers = g["center"][0], g["center_obj"][0]
    loss, parts = cribo.cribo_loss(teacher, (student, objects), centers, *temps)
    for name, theirs in (("image", "global_cv"), ("object", "object_cv"), ("cross_image", "object_ci")):
        torch.testing.assert_close(parts[name] / 2, g[theirs])
    torch.testing.assert_close(loss, sum(parts.values()))
    (loss / 2).backward()
    torch.testing.assert_close(student.grad, g["grad_student"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(objects.grad, g["grad_student_obj"], rtol=1e-4, atol=1e-6)
    for center, logits, after in zip(centers, teacher, ("center_after", "center_obj_after")):
        cribo.update_center(center, logits)
        torch.testing.assert_close(center, g[after][0])


def test_terms_of_eq_11():
    image, objects, neighbours = (rand(2 * n, 9, seed=n) for n in (4, 6, 7))
    teacher = image, objects, neighbours[:12], torch.arange(12) % 3 == 0
    for terms in (["image"], ["image", "object"], ["image", "object", "cross_image"]):
        student = rand(8, 9, seed=8).requires_grad_(), rand(12, 9, seed=9).requires_grad_()
        loss, parts = cribo.cribo_loss(teacher, student, torch.zeros(2, 9), 0.05, terms=terms)
        torch.testing.assert_close(loss, sum(parts[name] for name in terms))
        loss.backward()  # all of the student has a gradient, as DDP asks
        assert student[0].grad.abs().sum() > 0 and (student[1].grad.abs().sum() > 0) == (len(terms) > 1)


def test_unequal_valid_counts_have_their_own_mean():
    teacher, student = rand(8, 5, dtype=torch.float64), rand(8, 5, seed=1, dtype=torch.float64)
    center, valid = rand(5, seed=2, dtype=torch.float64), torch.tensor([1, 1, 1, 0, 0, 1, 0, 0]).bool()
    p, log_q = ((teacher - center) / 0.04).softmax(1), (student / 0.1).log_softmax(1)
    expected = -(p[:3] * log_q[4:7]).sum() / 3 - (p[5] * log_q[1]).sum()
    torch.testing.assert_close(distillation_loss(teacher, student, center, 0.04, 0.1, valid), expected)


@pytest.mark.parametrize("rows", [0, 6])
def test_nothing_valid_is_zero_and_has_a_gradient(rows):
    layer = torch.nn.Linear(4, 5)
    loss = distillation_loss(rand(rows, 5), layer(rand(rows, 4)), torch.zeros(5), 0.04, 0.1, torch.zeros(rows).bool())
    loss.backward()
    assert loss == 0 and layer.weight.grad.abs().sum() == 0


def test_loss_is_in_float32_and_not_of_the_teacher():
    teacher, student = rand(8, 64).requires_grad_(), rand(8, 64, seed=1).requires_grad_()
    exact = distillation_loss(teacher.bfloat16().float(), student.bfloat16().float(), torch.zeros(64), 0.04, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        half = distillation_loss(teacher.bfloat16(), student.bfloat16(), torch.zeros(64), 0.04, 0.1)
    assert half.dtype == torch.float32 and half == exact
    half.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


class Both(torch.nn.Module):
    """A linear student of images and one of objects."""

    def __init__(self):
        super().__init__()
        self.image, self.object = torch.nn.Linear(5, 8), torch.nn.Linear(5, 8)

    def forward(self, image, objects):
        return self.image(image), self.object(objects)


def _ddp(rank, world):
    """Loss and gradients of a linear student: 6 images, 10 objects of which the first process holds 7, or all, or none."""
    results = []
    for split, trust in ((7, 0.5), (10, 0.5), (0, 0.5), (7, 0.0), (7, 1.0)):
        torch.manual_seed(0)
        net = Both().double()
        images, objects = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(2, 10, 5, dtype=torch.float64)
        image_t, object_t, neighbour_t = (torch.randn(2, n, 8, dtype=torch.float64) for n in (6, 10, 10))
        ok = torch.rand(2, 10) < trust
        centers = [torch.zeros(8, dtype=torch.float64) for _ in range(2)]
        i = slice(rank * 6 // world, (rank + 1) * 6 // world)
        o = slice(0, 10) if world == 1 else (slice(0, split), slice(split, 10))[rank]

        model = torch.nn.parallel.DistributedDataParallel(net) if world > 1 else net
        student = model(images[:, i].flatten(0, 1), objects[:, o].flatten(0, 1))
        teacher = [t[:, s].flatten(0, 1) for t, s in ((image_t, i), (object_t, o), (neighbour_t, o), (ok, o))]
        loss, parts = cribo.cribo_loss(teacher, student, centers, 0.05)
        loss.backward()
        for center, logits in zip(centers, teacher):
            cribo.update_center(center, logits)
        values = torch.stack([loss.detach(), *(v.detach() for v in parts.values())])
        results.append([values, *(p.grad.clone() for p in net.parameters()), *centers])
    return results


def test_processes_equal_one(tmp_path):
    shares = on_processes(2, tmp_path, _ddp)
    for case, alone in enumerate(_ddp(0, 1)):
        torch.testing.assert_close((shares[0][case][0] + shares[1][case][0]) / 2, alone[0], rtol=1e-6, atol=1e-9)
        for share in shares:
            for a, b in zip(alone[1:], share[case][1:], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


# --- the model -----------------------------------------------------------------------------------------------------


def tiny(arch="tiny_vit", drop_path=0.0, k=4, bank=3, classes=0):
    torch.manual_seed(0)
    student = cribo.Student(common.build_backbone(arch, 32, drop_path), (16, 8, 12), classes)
    return cribo.CrIBo(student, k, 1.0, bank)


def batch(b=4, grid=4):
    g = torch.Generator().manual_seed(0)
    pos = cribo.joint_positions(50 * torch.rand(b, 2, 4, generator=g) + 10, torch.rand(b, 2, generator=g) < 0.5, grid)
    return torch.randn(2 * b, 3, 32, 32, generator=g), pos


def test_teacher_moves_as_an_average():
    model = tiny()
    ours = [p for module in (model.backbone, model.head) for p in module.parameters()]
    theirs = [p for module in (model.student.backbone, model.student.head) for p in module.parameters()]
    first, seen = [p.clone() for p in ours], []
    for _ in range(3):
        for p in theirs:
            p.data += torch.randn_like(p)
        seen.append([p.clone() for p in theirs])
        model.update_teacher(0.9)
    for p, start_, *path in zip(ours, first, *seen):
        expected = 0.9 ** 3 * start_ + 0.1 * (0.81 * path[0] + 0.9 * path[1] + path[2])
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_convnet"])
def test_no_gradient_reaches_the_teacher(arch):
    model, (x, pos) = tiny(arch, classes=3), batch()
    for _ in range(3):  # by the third pass the bank is full
        assignment, valid, y, teacher = model(x, pos)
        *student, logits = model.student(x, assignment)
        loss, parts = cribo.cribo_loss(teacher, student, model.centers, 0.04)
    assert model.bank.ready and parts["cross_image"] > 0
    assert not any(t.requires_grad for t in (assignment, y, *teacher))
    (loss + logits.sum()).backward()
    for name, p in model.named_parameters():
        fixed = not name.startswith("student.") or name.endswith("original0")
        assert (p.grad is None) == fixed == (not p.requires_grad), name
    model.zero_grad()
    model.student(x, assignment)[2].sum().backward()
    seen = [name for name, p in model.student.named_parameters() if p.grad is not None]
    assert seen == ["probe.weight", "probe.bias"]  # it learns from the features, and they not from it


def test_only_the_student_drops_paths():
    model, (x, pos) = tiny(drop_path=0.5), batch()
    maps, y = model.backbone(x)
    assert torch.equal(model.backbone(x)[1], y) and not torch.equal(model.student.backbone(x)[1], y)
    conv = tiny("tiny_convnet")
    before = conv.backbone[1].running_mean.clone()
    conv(x, pos)  # the teacher keeps running statistics of its own
    assert not torch.equal(conv.backbone[1].running_mean, before)
    assert torch.equal(conv.student.backbone[1].running_mean, before)


def test_views_and_heads_are_paired():
    model, (x, pos) = tiny(classes=3), batch()  # at the start the teacher is the student
    for _ in range(3):
        before = model.bank.objects.clone(), int(model.bank.pushed)
        with torch.no_grad():
            assignment, valid, y, (image, objects, neighbours, ok) = model(x, pos)
            s_image, s_objects, logits = model.student(x, assignment)
            maps, pooled = model.backbone(x)
            c_1, c_2, kept = object_representations(maps[:4], maps[4:], assignment)
            torch.testing.assert_close(y, pooled)
            torch.testing.assert_close(logits, model.student.probe(pooled[:4]))
            torch.testing.assert_close(image, s_image)
            torch.testing.assert_close(objects, s_objects)
            z = F.normalize(model.head.trunk(torch.cat([c_1, c_2])), dim=1)
            torch.testing.assert_close(objects, model.head.object(z))
            torch.testing.assert_close(image, model.head.image(F.normalize(model.head.trunk(pooled), dim=1)))
            assert torch.equal(valid, kept) and not torch.equal(model.head.object.weight, model.head.image.weight)
            full = before[1] >= 12
            if full:
                bank = _bank(*before[0])
                nn_1, nn_2, ok_1, ok_2 = cycle_consistent_matches(c_1, c_2, bank)
                found = torch.cat([bank.objects[0, nn_1], bank.objects[1, nn_2]])
                expected = model.head.object(F.normalize(model.head.trunk(found), dim=1))
                torch.testing.assert_close(neighbours, expected)
                assert torch.equal(ok, torch.cat([ok_1, ok_2]))
            else:
                assert not ok.any()
            newest = (before[1] + torch.arange(len(c_1))[-12:]) % 12
            start_ = max(0, len(c_1) - 12)
            torch.testing.assert_close(model.bank.objects[:, (newest - start_) % 12], torch.stack([c_1, c_2])[:, start_:])
    assert full and model(x, pos, cycle=False)[3][3].all() and not model(x, pos, cross_image=False)[3][3].any()


def test_logits_are_cosines():
    model = tiny()
    weight = model.student.head.image.weight
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(12))
    assert model.student.head(rand(5, 128), rand(3, 128))[0].abs().max() <= 1 + 1e-6
    g = model.student.head.image.parametrizations.weight
    assert not g.original0.requires_grad and g.original1.requires_grad


def test_weight_decay_spares_biases_and_normalisation():
    student = tiny().student
    decayed, spared = (group["params"] for group in cribo.make_optimizer(student).param_groups)
    names = {id(p): name for name, p in student.named_parameters()}
    assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in spared)
    assert not any(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in decayed)
    assert len(decayed) + len(spared) == sum(p.requires_grad for p in student.parameters())


def test_clip_gradients():
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4, 5, 6)]
    for p, norm in zip(params, (10.0, 0.5, 3.0)):
        p.grad = F.normalize(torch.ones_like(p), dim=0) * norm
    cribo.clip_gradients(params, 3.0)
    assert [round(p.grad.norm().item(), 5) for p in params[:3]] == [3.0, 0.5, 3.0] and params[3].grad is None


def test_copied_alone(tmp_path):
    shutil.copy(ROOT / "cribo.py", tmp_path)
    code = ("import torch, cribo, importlib.util; assert importlib.util.find_spec('common') is None;"
            "pos = cribo.joint_positions(torch.tensor([[[0., 0, 9, 9]] * 2]), torch.tensor([[True, False]]), 3);"
            "maps = torch.randn(2, 1, 9, 4); q = cribo.joint_space_clustering(torch.cat([*maps], 1), pos, 3, 1.0);"
            "c_1, c_2, _ = cribo.object_representations(*maps, q); c = torch.cat([c_1, c_2]);"
            "print(cribo.distillation_loss(c, c, torch.zeros(4), 0.04, 0.1).item())")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) > 0, done.stderr


# --- the command line ----------------------------------------------------------------------------------------------

SMALL = ("--arch", "tiny_convnet", "--size", 32, "--head", "32-16-24", "--batch-size", 8, "--base-lr", 0.1, "--epochs", 3,
         "--warmup-epochs", 1, "--temp-warmup-epochs", 2, "--momentum", 0.9, "--num-objects", 4, "--bank-images", 10,
         "--log-every", 1, "--save-minutes", 0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make_images(folder / "train", 44)
    make_images(folder / "val", 10, seed=1)
    return folder


def test_a_run_step_by_step(images, tmp_path, monkeypatch):
    heads, trunks, seen, losses, clipped = [], [], [], [], []

    def update(self, momentum):
        head = self.student.head
        heads.append([p.clone() for layer in (head.image, head.object) for p in layer.parameters()])
        trunks.append(head.trunk[0].weight.clone())
        return teacher(self, momentum)

    def forward(self, x, pos, *args):
        seen.append((x, pos))
        return whole(self, x, pos, *args)

    def loss(teacher, student, centers, *args, **options):
        losses.append((centers.clone(), [logits.float().mean(0) for logits in teacher[:2]]))
        return total(teacher, student, centers, *args, **options)

    def clip(parameters, limit):
        clipped.append(limit)
        return clip_(parameters, limit)
    teacher, whole, total, clip_ = cribo.CrIBo.update_teacher, cribo.CrIBo.forward, cribo.cribo_loss, cribo.clip_gradients
    monkeypatch.setattr(cribo, "cribo_loss", loss)
    monkeypatch.setattr(cribo, "clip_gradients", clip)
    monkeypatch.setattr(cribo.CrIBo, "update_teacher", update)
    monkeypatch.setattr(cribo.CrIBo, "forward", forward)
    arguments = ["cribo.py", "--data", images, *SMALL, "--workers", 0, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(a) for a in arguments])
    cribo.main()
    for step in range(1, 15):  # five steps an epoch; the rate of the very first is zero
        same = all(torch.equal(a, b) for a, b in zip(heads[step - 1], heads[step]))
        assert same == (step < 5) and not torch.equal(trunks[step - 1], trunks[step])
    torch.testing.assert_close(heads[-1][0], torch.ones(24, 1))
    views = common.Views(common.open_data(str(images)), lambda *a: cribo.sample_views(*a, size=32), 0)
    samples = [views[key] for key in next(iter(common.Batches(44, 8, 0, 5, 0)))]
    boxes, flips = (torch.stack([getattr(s, name) for s in samples]) for name in ("boxes", "flips"))
    assert torch.equal(seen[0][1], cribo.joint_positions(boxes, flips, 4)) and flips.any() and not flips.all()
    generator = training.seed_step(0, 0)
    coloured = [common.Photometric(**colour)(torch.stack([s.views[i] for s in samples]), generator)
                for i, colour in enumerate(cribo.COLOURS)]
    assert torch.equal(seen[0][0], torch.cat(coloured)) and clipped == [3.0] * 15
    for (before, means), (after, _) in zip(losses, losses[1:]):
        torch.testing.assert_close(after, 0.9 * before + 0.1 * torch.stack(means), rtol=1e-4, atol=1e-6)

    folder = tmp_path / f"cribo-{images.name}"
    log = [json.loads(line) for line in open(folder / "log.jsonl")]
    assert len(log) == 15
    for i, line in enumerate(log):
        assert line["loss"] == pytest.approx(line["image"] + line["object"] + line["cross_image"])
        if i < 5:
            assert line["cross_image"] == line["bootstrap"] == 0
        assert 0 < line["bootstrap"] <= 1 and line["cross_image"] > 0 if i > 6 else True
        assert 1 < line["objects"] <= 4 and 0 < line["valid"] <= 1 and line["std"] > 0
        assert line["temperature"] == pytest.approx(0.04 + 0.03 * min(1, i / 10))
        assert line["decay"] == pytest.approx(0.4 - 0.18 * (1 + np.cos(np.pi * i / 15)))
        assert line["momentum"] == pytest.approx(1 - 0.05 * (1 + np.cos(np.pi * i / 15)))
    assert log[5]["lr"] == pytest.approx(0.1 * 8 / 256)

    state = torch.load(folder / "last.pt", weights_only=True)
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [log[-1]["decay"], 0.0]
    state = state["model"]
    backbone = weights.load_backbone(folder).state_dict()
    saved = torch.load(folder / "backbone.pt", weights_only=True)
    assert any(not torch.equal(value, state[f"student.backbone.{key}"]) for key, value in backbone.items())
    for key, value in backbone.items():  # the result is the teacher's
        assert torch.equal(value, state[f"backbone.{key}"]) and torch.equal(value, saved[key])


def test_killed_and_resumed_is_bit_identical(images, tmp_path):
    command = ("cribo.py", "--data", images, *SMALL, "--out", tmp_path)
    whole = script(*command, "--name", "whole", "--workers", 0)
    assert whole.returncode == 0 and "20-NN" in whole.stdout, whole.stderr
    process = start(*command, "--name", "cut", "--workers", 0)
    wait_for_line(tmp_path / "cut", 8, process)
    kill_tree(process.pid)
    process.communicate()
    resumed = script(*command, "--name", "cut", "--workers", 1)
    assert resumed.returncode == 0 and "resumed at step" in resumed.stdout, resumed.stderr
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert {"bank.objects", "bank.pushed", "centers", "backbone.0.weight", "student.backbone.0.weight"} <= a["model"].keys()
    assert a["model"]["bank.pushed"] > 100 and a["model"]["centers"].abs().sum(1).min() > 0
    assert a["model"].keys() == b["model"].keys()
    for key, value in a["model"].items():
        assert torch.equal(value, b["model"][key]), key
    a, b = ([json.loads(line) for line in open(tmp_path / name / "log.jsonl")] for name in ("whole", "cut"))
    assert len(a) == len(b) == 15
    for key in ("step", "loss", "image", "object", "cross_image", "bootstrap", "objects", "valid", "std", "lr", "decay",
                "momentum", "temperature"):
        assert [line[key] for line in a] == [line[key] for line in b]


@pytest.mark.parametrize("flags", [("--no-cycle", "--arch", "tiny_vit", "--drop-path", 0.1, "--bf16"),
                                   pytest.param(("--no-object", "--no-cross-image"), marks=pytest.mark.slow)])
def test_ablations_under_torchrun(images, tmp_path, flags):
    command = "cribo.py", "--data", images, *SMALL, "--epochs", 2, *flags, "--out", tmp_path, "--workers", 0
    done = script(*command, torchrun=2)
    assert done.returncode == 0 and "20-NN" in done.stdout, done.stderr
    (log,) = tmp_path.glob("*/log.jsonl")
    last = [json.loads(line) for line in open(log)][-1]
    if "--no-cycle" in flags:
        assert last["bootstrap"] == 1 and last["cross_image"] > 0
        state = torch.load(log.parent / "last.pt", weights_only=True)["model"]
        assert state["bank.objects"].dtype == torch.bfloat16
    else:
        assert last["loss"] == pytest.approx(last["image"]) and last["cross_image"] == 0 < last["object"]


def test_bad_input(images, tmp_path, monkeypatch, capsys):
    args = "--data", images, *SMALL, "--out", tmp_path
    for size in (44, 8):
        assert "times its stride, 8" in user_error(cribo.main, monkeypatch, capsys, *args, "--size", size)
    for k in (33, 0):
        assert "have 32 locations" in user_error(cribo.main, monkeypatch, capsys, *args, "--num-objects", k)
    assert "less than the 44 images" in user_error(cribo.main, monkeypatch, capsys, *args, "--bank-images", 44)
