"""cribo.py: clustering, objects, matches and losses against golden numbers and loops; the model."""
import functools
import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_images, user_error
from PIL import Image
from torch import nn

import common
import cribo
import training
import weights
from cribo import (
    MemoryBank,
    cycle_consistent_matches,
    distillation_loss,
    nearest,
    object_representations,
)
from cribo import joint_space_clustering as clustering

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    return {key: torch.tensor(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def two_views(b=3, grid=4, d=8, k=5, seed=0):
    """Tokens (B, 2N, D), positions of two random crops (B, 2N, 2) and K starting tokens (B, K)."""
    torch.manual_seed(seed)
    boxes = 100 * torch.rand(b, 2, 4) + torch.tensor([0, 0, 50, 50])
    pos = cribo.joint_positions(boxes, torch.rand(b, 2) < 0.5, grid)
    tokens = torch.randn(b, 2 * grid**2, d)
    return tokens, pos, torch.rand(b, 2 * grid**2).argsort(1)[:, :k]


# --- views and positions --------------------------------------------------------------------------

@pytest.mark.parametrize("name", "abcd")
def test_golden_positions(name):
    g = golden("positions")
    box, flip, grid = (g[f"{name}_{key}"] for key in ("box", "flip", "grid"))
    ours = cribo.positions(box[None], flip[None], len(grid))[0]
    torch.testing.assert_close(ours, grid, rtol=0, atol=1e-3)
    half = cribo.positions(box[None].half(), flip[None], len(grid))[0]
    exact = cribo.positions(box[None].half().double(), flip[None], len(grid))[0]
    assert half.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(half.double(), exact, rtol=1e-6, atol=1e-5)


def test_joint_positions():
    boxes = torch.tensor([[[0.0, 10, 20, 40], [5, 0, 10, 10]]])
    pos = cribo.joint_positions(boxes, torch.tensor([[True, False]]), 2)
    first = [[5, 40], [5, 20], [15, 40], [15, 20]]
    second = [[7.5, 2.5], [7.5, 7.5], [12.5, 2.5], [12.5, 7.5]]
    assert pos[0].tolist() == first + second


def test_views():
    torch.manual_seed(0)
    image = Image.new("RGB", (400, 300))
    views = [view for _ in range(300) for view in cribo.sample_views(image, 224)]
    areas = np.array([h * w / 120000 for (_, _, h, w), _, _ in views])
    assert 0.24 < areas.min() < 0.28 and areas.max() > 0.9
    assert {size for _, _, size in views} == {224}
    assert 0.45 < np.mean([flip for _, flip, _ in views]) < 0.55 and len(views) == 600


# --- clustering -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["cribo_small", "cribo_sem"])
def test_golden_clustering_objects_and_matches(name):
    g = golden(name)
    k, pos_weight = g["num_objects"].item(), g["pos_weight"].item()
    assignment = clustering(g["tokens"], g["positions"], k, pos_weight, g["init"])
    assert torch.equal(assignment, g["assignment"])
    c_1, c_2, valid = object_representations(*g["last_tokens"].chunk(2, 1), assignment)
    assert torch.equal(valid.flatten(), g["valid"])
    assert torch.equal(valid.sum(1), g["objects_per_image"])
    torch.testing.assert_close(c_1, g["objects_1"])
    torch.testing.assert_close(c_2, g["objects_2"])
    ours = cycle_consistent_matches(c_1, c_2, full_bank(*g["bank"]))
    for mine, theirs in zip(ours, ("nn_idx_1", "nn_idx_2", "cycle_1", "cycle_2")):
        assert torch.equal(mine, g[theirs])


def literal_clustering(tokens, pos, k, pos_weight, init):
    """Design, section 6, CrIBo (b), word by word, with a B x 2N x 2N x K mask."""
    tokens = F.normalize(tokens, dim=2)
    b, n, _ = tokens.shape
    hard = torch.zeros(b, n, k)
    for image in range(b):
        for cluster in range(k):
            hard[image, init[image, cluster], cluster] = 1
    centroids = torch.stack([t[i] for t, i in zip(tokens, init)])
    columns = torch.full((b, 1, k), 1 / k)
    apart = (pos[:, :, None] - pos[:, None]).square().sum(3).sqrt()  # (B, 2N, 2N)
    itself = torch.eye(n, dtype=torch.bool)[:, :, None]
    for _ in range(5):
        others = (hard[:, None] > 0) & ~itself  # (B, 2N, 2N, K)
        d = torch.where(others, apart[..., None], torch.inf).min(2).values
        d = torch.stack([torch.where(x.isinf(), x.masked_fill(x.isinf(), 0).mean(), x) for x in d])
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
    return torch.cat([v / v.sum(1, keepdim=True).clamp(min=1) for v in hard.chunk(2, 1)], 1)


@pytest.mark.parametrize("pos_weight,k", [(0.0, 5), (1.0, 5), (2.0, 12), (4.0, 1)])
def test_clustering_is_the_literal_one(pos_weight, k):
    tokens, pos, init = two_views(k=k, seed=k)
    ours = clustering(tokens, pos, k, pos_weight, init)
    assert torch.equal(ours, literal_clustering(tokens, pos, k, pos_weight, init))


def test_sinkhorn_marginals():
    columns = F.normalize(rand(3, 5, dtype=torch.float64).abs(), p=1, dim=1)
    cost = rand(3, 16, 5, seed=1, dtype=torch.float64).sigmoid()
    plan = cribo.sinkhorn(cost, columns, 300, 20.0)
    torch.testing.assert_close(plan.sum(1), columns)
    torch.testing.assert_close(plan.sum(2), torch.full((3, 16), 1 / 16).double())
    scaled = plan.log() + 20 * cost  # only rows and columns were scaled: the sum of two vectors
    rest = scaled - scaled.mean(1, keepdim=True) - scaled.mean(2, keepdim=True)
    rest = rest + scaled.mean((1, 2), keepdim=True)
    assert rest.abs().max() < 1e-9
    torch.testing.assert_close(cribo.sinkhorn(cost, columns, 5, 20.0).sum(1), columns)


def planted(seed=0):
    """Three contents in horizontal stripes of the image, seen in two crops of it."""
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
    init = [[(s == k).nonzero()[0].item() for k in range(3)] for s in stripe]
    for pos_weight in (0.0, 1.0):
        found = groups(clustering(tokens, pos, 3, pos_weight, torch.tensor(init)))
        assert torch.equal(found, stripe)
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
        """The variance of positions within clusters, as a share of all."""
        inside = 0
        for p, x in zip(pos, label):
            for chosen in (x == 0, x == 1):
                inside += p[chosen].var(0).sum() * chosen.sum()
        return inside / pos.var(1).sum() / pos.shape[1]

    assert spread(label) < 0.75 < 0.95 < spread((rand(*label.shape) < 0).long())
    assert spread(label) < 0.8 * spread(groups(clustering(tokens, pos, 2, 0.0, init)))


def test_clustering_does_not_depend_on_units():
    tokens, pos, init = two_views()
    ours = clustering(tokens.requires_grad_(), pos, 5, 1.0, init)
    assert not ours.requires_grad and ours.dtype == torch.float32
    factor = torch.tensor([1.0, 4.0, 0.25])[:, None, None]  # powers of two: nothing is rounded
    assert torch.equal(ours, clustering(8 * tokens, factor * pos, 5, 1.0, init))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours, clustering(tokens, pos, 5, 1.0, init))


def test_clustering_is_in_float32():
    tokens, pos, init = two_views()
    tokens, pos = tokens.bfloat16(), pos.bfloat16()
    exact = clustering(tokens.float(), pos.float(), 5, 1.0, init)
    assert torch.equal(clustering(tokens, pos, 5, 1.0, init), exact)


def test_clusters_start_at_distinct_random_tokens():
    tokens, pos, _ = two_views()
    torch.manual_seed(0)
    first = clustering(tokens, pos, 32, 0.0, iters=1)  # as many clusters as tokens: each has one
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


def test_locations_without_a_place_are_refused():
    tokens, pos, init = two_views()
    for wrong in (rand(3, 34, 8), rand(3, 24, 8), rand(2, 32, 8)):  # a [CLS] token; 3 x 4; a batch
        with pytest.raises(ValueError, match="not those of"):
            clustering(wrong, pos, 5, 1.0, init)


# --- objects --------------------------------------------------------------------------------------

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
    half = object_representations(z_1.bfloat16(), z_2.bfloat16(), q)[0]
    assert half.dtype == torch.float32


# --- the bank and its matches ---------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearest_is_by_cosine_in_chunks(dtype):
    queries = rand(20, 6)
    rows = (rand(50, 6, seed=1) * (1 + 5 * rand(50, 1, seed=2).abs())).to(dtype)
    cosines = F.cosine_similarity(queries[:, None], rows[None].float(), dim=2)  # (20, 50)
    expected = cosines.argmax(1)
    assert (expected != (queries @ rows.float().T).argmax(1)).any()
    for chunk in (1, 7, 50, 64):
        assert torch.equal(nearest(queries, rows, chunk), expected)
    same = torch.ones(1, 6)
    assert nearest(same, same.expand(5, -1), 2).tolist() == [0]  # of equals the first
    assert nearest(queries[:0], rows).shape == (0,)


def test_nearest_is_in_float32():
    close = 1 + 1e-2 * rand(50, 6)  # in bfloat16 all cosines would be one
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest(close[:20], close).tolist() == list(range(20))


def entry(*numbers):
    """A row for each number, by which it can be known again."""
    return torch.tensor([[1.0, i] for i in numbers]).view(-1, 2)


def full_bank(m_1, m_2):
    bank = MemoryBank(len(m_1), m_1.shape[1])
    bank.push(m_1, m_2)
    return bank


def test_bank_keeps_the_newest_in_order():
    bank, given = MemoryBank(5, 2), 0
    for count in (3, 0, 1):
        new = entry(*range(given, given + count))
        bank.push(new, -new)
        given += count
        assert not bank.ready
    with pytest.raises(RuntimeError, match="not full"):  # an empty entry would have cosine 0
        cycle_consistent_matches(entry(1), entry(1), bank)
    kept = {1: [0, 1, 2, 3, 4], 2: [5, 6, 2, 3, 4], 4: [10, 6, 7, 8, 9], 7: [17, 13, 14, 15, 16]}
    for count, numbers in kept.items():
        new = entry(*range(given, given + count))
        bank.push(new, -new)
        given += count
        assert bank.ready and bank.objects[0, :, 1].tolist() == numbers
        assert torch.equal(bank.objects[0], -bank.objects[1])
    saved = MemoryBank(5, 2)
    saved.load_state_dict(bank.state_dict())
    for b in (bank, saved):
        b.push(entry(given), entry(given))
    assert torch.equal(saved.objects, bank.objects)
    assert (bank.objects[0, :, 1] == given - 5).sum() == 0


def test_cycle_on_a_bank_with_known_answers():
    e = torch.eye(8)
    c_1, c_2 = e[[0, 1, 2]], e[[3, 4, 5]]
    # Entry 0: both ways to object 0 (3 times as long: the cosine decides).
    # Entry 1: object 1's neighbour in the first view; its other view is like object 2's, so 1 is
    # not trusted from view 1. Entry 2: object 1's neighbour in the second view, and in the first it
    # is like object 1: trusted from view 2. Entry 3: object 2's in both, but its first view is
    # nearer to object 0.
    m_1 = [3 * e[0], e[1] + 0.1 * e[7], 0.5 * e[1] + 0.4 * e[6], 0.8 * e[0] + 0.7 * e[2] + e[6]]
    m_2 = [2 * e[3], 0.3 * e[5] + 0.1 * e[4] + e[7], e[4], e[5]]
    m_1, m_2 = torch.stack(m_1), torch.stack(m_2)
    nn_1, nn_2, ok_1, ok_2 = cycle_consistent_matches(c_1, c_2, full_bank(m_1, m_2))
    assert nn_1.tolist() == [0, 1, 3] and nn_2.tolist() == [0, 2, 3]
    assert ok_1.tolist() == [True, False, True] and ok_2.tolist() == [True, True, False]
    swapped = cycle_consistent_matches(c_2, c_1, full_bank(m_2, m_1))
    for ours, theirs in zip(swapped, (nn_2, nn_1, ok_2, ok_1)):
        assert torch.equal(ours, theirs)


def test_matches_are_equations_2_to_4():
    """Word by word, object by object."""
    torch.manual_seed(0)
    c = torch.randn(2, 9, 6)
    bank = full_bank(*(c.repeat(1, 3, 1) + torch.randn(2, 27, 6)))

    def nn(query, rows):
        return F.cosine_similarity(query[None], rows).argmax().item()

    nn_1, nn_2, ok_1, ok_2 = cycle_consistent_matches(*c, bank)
    for i, (found, ok) in enumerate(((nn_1, ok_1), (nn_2, ok_2))):
        for k in range(9):
            neighbour = nn(c[i, k], bank.objects[i])
            back = nn(bank.objects[1 - i, neighbour], c[1 - i])
            assert found[k] == neighbour and ok[k] == (back == k)
    assert 0 < ok_1.sum() < 9


# --- losses ---------------------------------------------------------------------------------------

def test_golden_losses():
    g = golden("cribo_loss")
    student, objects = g["student"].requires_grad_(), g["student_obj"].requires_grad_()
    temps = g["teacher_temp"].item(), g["student_temp"].item()
    ok = torch.cat([g["valid_1"], g["valid_2"]])
    neighbours = torch.cat([g["nn_1"], g["nn_2"]])
    rows = ok.nonzero().flatten()
    targets = cribo.Targets(g["teacher"], g["teacher_obj"], neighbours[rows], rows)
    centers = g["center"][0], g["center_obj"][0]
    loss, parts = cribo.cribo_loss(targets, student, objects, *centers, *temps)
    halves = {"image": "global_cv", "object": "object_cv", "cross_image": "object_ci"}
    for name, theirs in halves.items():
        torch.testing.assert_close(parts[name] / 2, g[theirs])
    torch.testing.assert_close(loss, sum(parts.values()))
    alone = distillation_loss(neighbours, objects, centers[1], *temps, ok)
    torch.testing.assert_close(alone, parts["cross_image"])
    (loss / 2).backward()
    torch.testing.assert_close(student.grad, g["grad_student"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(objects.grad, g["grad_student_obj"], rtol=1e-4, atol=1e-6)
    for center, logits, after in zip(centers, targets, ("center_after", "center_obj_after")):
        cribo.update_center(center, logits)
        torch.testing.assert_close(center, g[after][0])


@pytest.mark.parametrize("coeffs", [(1, 1), (1, 0), (0, 0), (True, False), (0.5, 2.0)])
def test_terms_of_eq_11(coeffs):
    rows = torch.arange(0, 12, 3)
    targets = cribo.Targets(rand(8, 9, seed=4), rand(12, 9, seed=6), rand(4, 9, seed=7), rows)
    student = rand(8, 9, seed=8).requires_grad_(), rand(12, 9, seed=9).requires_grad_()
    centers = torch.zeros(2, 9)
    loss, parts = cribo.cribo_loss(targets, *student, *centers, 0.05, 0.1, *coeffs)
    image, objects, cross_image = (parts[name] for name in ("image", "object", "cross_image"))
    expected = image + coeffs[0] * objects + coeffs[1] * cross_image
    torch.testing.assert_close(loss, expected)
    assert min(image, objects, cross_image) > 0
    loss.backward()  # all of the student has a gradient, as DDP asks
    assert student[0].grad.abs().sum() > 0
    assert (student[1].grad.abs().sum() > 0) == (coeffs != (0, 0))


def test_unequal_valid_counts_have_their_own_mean():
    teacher, student = rand(2, 8, 5, dtype=torch.float64)
    center = rand(5, seed=2, dtype=torch.float64)
    valid = torch.tensor([1, 1, 1, 0, 0, 1, 0, 0]).bool()
    p, log_q = ((teacher - center) / 0.04).softmax(1), (student / 0.1).log_softmax(1)
    expected = -(p[:3] * log_q[4:7]).sum() / 3 - (p[5] * log_q[1]).sum()
    ours = distillation_loss(teacher, student, center, 0.04, 0.1, valid)
    torch.testing.assert_close(ours, expected)
    everything = distillation_loss(teacher, student, center, 0.04, 0.1)
    expected = -(p[:4] * log_q[4:]).sum() / 4 - (p[4:] * log_q[:4]).sum() / 4
    torch.testing.assert_close(everything, expected)


@pytest.mark.parametrize("rows", [0, 6])
def test_nothing_valid_is_zero_and_has_a_gradient(rows):
    layer = nn.Linear(4, 5)
    student = layer(rand(rows, 4))
    none = torch.zeros(rows).bool()
    loss = distillation_loss(rand(rows, 5), student, torch.zeros(5), 0.04, 0.1, none)
    loss.backward()
    assert loss == 0 and layer.weight.grad.abs().sum() == 0


def test_loss_is_in_float32_and_not_of_the_teacher():
    center = torch.zeros(64)

    def value(teacher, student):
        loss = distillation_loss(teacher, student, center, 0.04, 0.1)
        return loss, torch.autograd.grad(loss, [teacher, student], allow_unused=True)

    teacher, student = rand(2, 8, 64).bfloat16()
    half = teacher.clone().requires_grad_(), student.clone().requires_grad_()
    single = teacher.float().requires_grad_(), student.float().requires_grad_()
    exact, (none, grad) = value(*single)
    assert none is None
    with torch.autocast("cpu", torch.bfloat16):
        for ours in (half, single):
            loss, (none, ours_grad) = value(*ours)
            assert loss.dtype == torch.float32 and loss == exact and none is None
            torch.testing.assert_close(ours_grad.float(), grad, rtol=1e-2, atol=1e-4)
        assert torch.equal(ours_grad, grad)


def test_center_stays_without_objects():
    center = rand(5)
    before = center.clone()
    cribo.update_center(center, torch.zeros(0, 5))
    assert torch.equal(center, before)
    logits = rand(7, 5, seed=1).bfloat16()
    cribo.update_center(center, logits)
    torch.testing.assert_close(center, 0.9 * before + 0.1 * logits.float().mean(0))


# --- the model ------------------------------------------------------------------------------------

def tiny(arch="tiny_vit", drop_path=0.0, k=4, bank=3, **options):
    torch.manual_seed(0)
    backbone = common.build_backbone(arch, 32, drop_path)
    return cribo.CrIBo(cribo.Student(backbone, (16, 8, 12), **options), k, 1.0, bank)


def batch(b=4, grid=4):
    torch.manual_seed(0)
    boxes = 50 * torch.rand(b, 2, 4) + 10
    pos = cribo.joint_positions(boxes, torch.rand(b, 2) < 0.5, grid)
    return torch.randn(2 * b, 3, 32, 32), pos


def test_teacher_moves_as_an_average():
    model = tiny()
    ours = [*model.backbone.parameters(), *model.head.parameters()]
    theirs = [*model.student.backbone.parameters(), *model.student.head.parameters()]
    first, seen = [p.clone() for p in ours], []
    for _ in range(3):
        for p in theirs:
            p.data += torch.randn_like(p)
        seen.append([p.clone() for p in theirs])
        model.update_teacher(0.9)
    for p, start, *path in zip(ours, first, *seen):
        expected = 0.9**3 * start + 0.1 * (0.81 * path[0] + 0.9 * path[1] + path[2])
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_convnet"])
@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_no_gradient_reaches_the_teacher(arch, norm_last_layer):
    model = tiny(arch, num_classes=3, norm_last_layer=norm_last_layer)
    x, pos = batch()
    for step in range(3):  # by the third pass the bank is full
        assignment, z_bar, targets = model(x, pos, match=step == 2)
        *student, logits = model.student(x, assignment)
    centers = model.image_center, model.object_center
    loss, parts = cribo.cribo_loss(targets, *student, *centers, 0.04)
    assert parts["cross_image"] > 0
    assert not any(t.requires_grad for t in (assignment, z_bar, *targets))
    (loss + logits.sum()).backward()
    for name, p in model.named_parameters():
        norms = name.endswith("original0") and norm_last_layer
        fixed = not name.startswith("student.") or norms
        assert (p.grad is None) == fixed == (not p.requires_grad), name
    model.zero_grad()
    model.student(x, assignment)[2].sum().backward()
    seen = [name for name, p in model.student.named_parameters() if p.grad is not None]
    assert seen == ["probe.weight", "probe.bias"]  # it learns from the features, they not from it


class DropPath(nn.Module):
    """timm's module, as far as it matters here."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return F.dropout(x, self.drop_prob, self.training)


def test_only_the_student_drops_paths():
    model, (x, _) = tiny(drop_path=0.5), batch()
    _, z_bar = model.backbone(x)
    assert torch.equal(model.backbone(x)[1], z_bar)
    assert not torch.equal(model.student.backbone(x)[1], z_bar)

    backbone = common.build_backbone("tiny_vit", 32)
    for block in backbone.blocks:
        block.drop_path = DropPath(0.5)
    model = cribo.CrIBo(cribo.Student(backbone, (16, 8, 12)), 4, 1.0, 3)
    _, z_bar = model.backbone(x)
    assert torch.equal(model.backbone(x)[1], z_bar)
    assert not torch.equal(model.student.backbone(x)[1], z_bar)


def test_batch_normalization_of_the_teacher_is_its_own():
    model, (x, pos) = tiny("tiny_convnet"), batch()
    before = model.backbone[1].running_mean.clone()
    model(x, pos, match=False)
    assert not torch.equal(model.backbone[1].running_mean, before)
    assert torch.equal(model.student.backbone[1].running_mean, before)


def test_views_and_heads_are_paired():
    model, (x, pos) = tiny(num_classes=3), batch()  # at the start the teacher is the student
    head, bank = model.head, model.bank
    bank.objects = bank.objects.float()  # to compare without rounding

    def logits(last, z):
        return last(F.normalize(head.trunk(z), dim=1))

    for step in range(3):
        before = full_bank(*bank.objects)
        pushed = bank.pushed.item()
        match = step == 2
        with torch.no_grad():
            assignment, z_bar, targets = model(x, pos, match)
            image, objects, classes = model.student(x, assignment)
            maps, pooled = model.backbone(x)
            c_1, c_2, _ = object_representations(maps[:4], maps[4:], assignment)
            both = torch.cat([c_1, c_2])
            torch.testing.assert_close(z_bar, pooled)
            torch.testing.assert_close(classes, model.student.probe(pooled[:4]))
            torch.testing.assert_close(targets.image, image)
            torch.testing.assert_close(targets.objects, objects)
            torch.testing.assert_close(targets.objects, logits(head.object, both))
            torch.testing.assert_close(targets.image, logits(head.image, pooled))
            if match:
                nn_1, nn_2, ok_1, ok_2 = cycle_consistent_matches(c_1, c_2, before)
                found = torch.cat([before.objects[0, nn_1], before.objects[1, nn_2]])
                ok = torch.cat([ok_1, ok_2])
                assert ok.sum() > 0 and torch.equal(targets.trusted, ok.nonzero().flatten())
                torch.testing.assert_close(targets.neighbours, logits(head.object, found[ok]))
            else:
                assert len(targets.neighbours) == len(targets.trusted) == 0
        assert not torch.equal(head.object.weight, head.image.weight)
        expected = before.objects.clone()
        for m, pair in enumerate(zip(c_1[-12:], c_2[-12:])):
            expected[:, (pushed + m) % 12] = torch.stack(pair)
        torch.testing.assert_close(bank.objects, expected)
    _, _, targets = model(x, pos, match=True, cycle=False)
    assert torch.equal(targets.trusted, torch.arange(len(targets.objects)))


def test_the_head_sees_only_what_counts():
    model, (x, pos) = tiny(), batch()
    rows = []
    model.head.trunk.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    for step in range(4):
        _, _, targets = model(x, pos, match=step >= 2)
        trusted = len(targets.trusted)
        assert (trusted > 0) == (step >= 2) and trusted <= len(targets.objects)
        assert rows.pop() == len(x) + len(targets.objects) + trusted and not rows


def test_matching_before_the_bank_is_full_raises():
    model = tiny(bank=1000)
    with pytest.raises(RuntimeError, match="not full"):
        model(*batch(), match=True)


def test_logits_are_cosines():
    model = tiny()
    weight = model.student.head.image.weight
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(12))
    assert model.student.head(rand(5, 128), rand(3, 128))[0].abs().max() <= 1 + 1e-6
    for fixed in (True, False):
        norms = tiny(norm_last_layer=fixed).student.head.image.parametrizations.weight
        assert norms.original0.requires_grad == (not fixed) and norms.original1.requires_grad
        torch.testing.assert_close(norms.original0, torch.ones(12, 1))


def test_weight_decay_spares_biases_and_normalization():
    student = tiny(num_classes=3).student
    decayed, spared = (group["params"] for group in cribo.make_optimizer(student).param_groups)
    names = {id(p): name for name, p in student.named_parameters()}
    assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in spared)
    assert not any(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in decayed)
    assert len(decayed) + len(spared) == sum(p.requires_grad for p in student.parameters())


# --- the command line -----------------------------------------------------------------------------

SMALL = ("--arch", "tiny_convnet", "--size", 32, "--head", "32-16-24", "--batch-size", 8,
         "--base-lr", 0.1, "--epochs", 3, "--warmup-epochs", 1, "--temp-warmup-epochs", 2,
         "--momentum", 0.9, "--num-objects", 4, "--bank-images", 10, "--log-every", 1,
         "--save-minutes", 0, "--workers", 0)  # with 44 images: 5 steps an epoch, 15 in all


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make_images(folder / "train", 44)
    return folder


@pytest.fixture
def run(images, tmp_path, monkeypatch):
    """run(name, *flags) -> the run's folder."""
    finished = []
    monkeypatch.setattr(training.Run, "finish", lambda self, *names, **_: finished.append(names))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(name, *flags):
        args = ["--data", images, *SMALL, "--out", tmp_path, "--name", name, *flags]
        monkeypatch.setattr(sys, "argv", ["cribo.py", *map(str, args)])
        cribo.main()
        return tmp_path / name

    run.finished = finished
    return run


def log_of(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def parse(monkeypatch, *args):
    """What train() would be given."""
    seen = []
    monkeypatch.setattr(cribo, "train", seen.append)
    monkeypatch.setattr(sys, "argv", ["cribo.py", *map(str, args)])
    cribo.main()
    return seen[0]


def test_recipes(monkeypatch):
    """Appendix A.1, and DINO's settings as the release's argument files have them."""
    small = parse(monkeypatch, "--data", "imagenet")
    assert small.arch == "vit_small_patch16" and small.head == [2048, 256, 65536]
    assert (small.epochs, small.batch_size) == (800, 1024)
    assert (small.base_lr, small.final_lr) == (5e-4, 1e-5)
    assert (small.clip_grad, small.norm_last_layer, small.freeze_epochs) == (0, False, 1)
    assert (small.teacher_temp, small.temp_warmup_epochs, small.warmup_epochs) == (0.07, 30, 10)
    assert (small.pos_weight, small.bank_images, small.num_objects) == (1.0, 25_000, 12)
    assert (small.weight_decay, small.final_weight_decay, small.drop_path) == (0.04, 0.4, 0.1)

    base = parse(monkeypatch, "--data", "imagenet", "--arch", "vit_base_patch16")
    assert base.arch == "vit_base_patch16"
    assert (base.epochs, base.batch_size, base.base_lr, base.final_lr) == (400, 1024, 7.5e-4, 2e-6)
    assert (base.clip_grad, base.norm_last_layer, base.freeze_epochs) == (0.3, True, 3)
    assert (base.teacher_temp, base.temp_warmup_epochs, base.num_objects) == (0.07, 50, 12)

    coco = parse(monkeypatch, "--data", "coco")
    assert (coco.arch, coco.epochs, coco.batch_size) == ("vit_small_patch16", 300, 256)
    assert (coco.pos_weight, coco.bank_images, coco.num_objects) == (2.0, 25_000, 64)
    assert (coco.clip_grad, coco.norm_last_layer, coco.base_lr) == (0, False, 5e-4)
    assert parse(monkeypatch).arch == "tiny_convnet"
    flags = "--norm-last-layer", "--freeze-epochs", 2, "--head", "8-4-16"
    given = parse(monkeypatch, "--data", "imagenet", *flags)
    assert (given.norm_last_layer, given.freeze_epochs, given.head) == (True, 2, [8, 4, 16])


@pytest.mark.parametrize("flags,words", [
    (["--size", 44], "views of 44 pixels: --size must make a multiple of 8"),
    (["--size", 8], "views of 8 pixels: .*16 or more"),
    (["--num-objects", 33], "--num-objects 33: two views have 32 locations"),
    (["--num-objects", 0], "--num-objects 0"),
    (["--bank-images", 44], "--bank-images 44: .*less than 44"),
    (["--bank-images", -1], "--bank-images -1"),
    (["--head", "a-b-c"], "--head.*a-b-c"),
    (["--head", "1-2-3-4"], "--head.*1-2-3-4"),
    (["--head", "0-2-3"], "--head.*0-2-3"),
    (["--teacher-temp", 0], "--teacher-temp 0"),
    (["--temp-warmup-epochs", -1], "--temp-warmup-epochs -1"),
    (["--momentum", 1.5], "--momentum 1.5"),
    (["--drop-path", 1], "--drop-path 1"),
    (["--clip-grad", -1], "--clip-grad -1"),
    (["--freeze-epochs", -1], "--freeze-epochs -1"),
    (["--pos-weight", "nan"], "--pos-weight nan"),
])
def test_bad_input(images, tmp_path, monkeypatch, capsys, flags, words):
    args = "--data", images, *SMALL, "--out", tmp_path, *flags
    said = user_error(cribo.main, monkeypatch, capsys, *args)
    assert re.search(words, said), said


def test_a_bank_that_one_epoch_does_not_fill_is_refused(run, images, tmp_path, monkeypatch, capsys):
    def refused(name, size):
        args = "--data", images, *SMALL, "--out", tmp_path, "--name", name, "--bank-images", size
        said = user_error(cribo.main, monkeypatch, capsys, *args)
        assert f"--bank-images {size}: one epoch's objects do not fill the bank: give " in said
        assert len(log_of(tmp_path / name)) == 5
        return int(said.partition("give ")[2].split()[0])

    most = refused("43", 43)
    assert 25 < most < 40  # of 40 images, each with at most 4 objects
    assert refused("more", most + 1) == most
    assert len(log_of(run("most", "--bank-images", most))) == 15
    assert len(log_of(run("unused", "--bank-images", 43, "--no-cross-image"))) == 15


RUNS = {  # flags; epochs without a gradient in the last layers; whether their norms are fixed
    "free": (("--freeze-epochs", 1), 1, False),
    "fixed": (("--freeze-epochs", 2, "--norm-last-layer", "--clip-grad", 0.01), 2, True),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_step_by_step(run, images, monkeypatch, kind):
    flags, frozen, fixed = RUNS[kind]
    heads, trunks, seen, losses, norms = [], [], [], [], []
    update, forward, total = cribo.CrIBo.update_teacher, cribo.CrIBo.forward, cribo.cribo_loss
    adamw = torch.optim.AdamW.step

    def spied_update(self, momentum):
        head = self.student.head
        heads.append([p.clone() for layer in (head.image, head.object) for p in layer.parameters()])
        trunks.append(head.trunk[0].weight.clone())
        return update(self, momentum)

    def spied_forward(self, x, pos, *args):
        seen.append((x, pos))
        return forward(self, x, pos, *args)

    def spied_loss(targets, image, objects, *args, **options):
        means = [logits.float().mean(0) for logits in targets[:2]]
        losses.append((torch.stack(args[:2]), torch.stack(means)))
        return total(targets, image, objects, *args, **options)

    def spied_step(self, *args):
        params = [p for group in self.param_groups for p in group["params"]]
        norms.append(max(p.grad.norm() for p in params if p.grad is not None).item())
        return adamw(self, *args)

    monkeypatch.setattr(cribo, "cribo_loss", spied_loss)
    monkeypatch.setattr(cribo.CrIBo, "update_teacher", spied_update)
    monkeypatch.setattr(cribo.CrIBo, "forward", spied_forward)
    monkeypatch.setattr(torch.optim.AdamW, "step", spied_step)
    folder = run(kind, *flags)

    assert run.finished == [("knn",)]  # `clusters` wants masks
    for step in range(1, 15):  # five steps an epoch; the rate of the very first is zero
        same = all(torch.equal(a, b) for a, b in zip(heads[step - 1], heads[step]))
        assert same == (step < 5 * frozen) and not torch.equal(trunks[step - 1], trunks[step])
    assert torch.allclose(heads[-1][0], torch.ones(24, 1)) == fixed  # the norms
    if fixed:
        assert max(norms) == pytest.approx(0.01, rel=1e-3)
    else:
        assert max(norms) > 0.05

    data = common.open_data(str(images))
    views = common.Views(data, functools.partial(cribo.sample_views, size=32), 0)
    samples = [views[key] for key in next(iter(common.Batches(44, 8, 0, 5, 0)))]
    boxes = torch.stack([s.boxes for s in samples])
    flips = torch.stack([s.flips for s in samples])
    assert torch.equal(seen[0][1], cribo.joint_positions(boxes, flips, 4))
    assert flips.any() and not flips.all()
    torch.manual_seed(common.seed_of(0, 0, 0, 1))
    colours = [common.Photometric(**colour, size=32) for colour in cribo.COLOURS]
    coloured = common.recolour(colours, [torch.stack([s.views[i] for s in samples])
                                         for i in range(2)])
    assert torch.equal(seen[0][0], torch.cat(coloured))
    for (before, means), (after, _) in zip(losses, losses[1:]):
        torch.testing.assert_close(after, 0.9 * before + 0.1 * means, rtol=1e-4, atol=1e-6)

    log = log_of(folder)
    assert len(log) == 15
    for i, line in enumerate(log):
        assert line["loss"] == pytest.approx(line["image"] + line["object"] + line["cross_image"])
        if i < 5:
            assert line["cross_image"] == line["bootstrap"] == 0
        if i > 6:  # of so few objects it may happen that none is trusted
            assert 0 <= line["bootstrap"] <= 1
            assert (line["cross_image"] > 0) == (line["bootstrap"] > 0)
        assert 1 < line["objects"] <= 4 and line["std"] > 0
        assert line["temperature"] == pytest.approx(0.04 + 0.03 * min(1, i / 10))
        assert line["decay"] == pytest.approx(0.4 - 0.18 * (1 + np.cos(np.pi * i / 15)))
        assert line["momentum"] == pytest.approx(1 - 0.05 * (1 + np.cos(np.pi * i / 15)))
    assert log[5]["lr"] == pytest.approx(0.1 * 8 / 256)
    assert sum(line["bootstrap"] > 0 for line in log[7:]) >= 6  # of 8

    state = torch.load(folder / "last.pt", weights_only=True)
    decays = [group["weight_decay"] for group in state["optimizer"]["param_groups"]]
    assert decays == pytest.approx([log[-1]["decay"], 0.0])
    state = state["model"]
    assert state["bank.objects"].dtype == torch.bfloat16
    saved = torch.load(folder / "backbone.pt", weights_only=True)
    backbone = weights.load_backbone(folder).state_dict()
    for key, value in backbone.items():  # the result is the teacher's
        assert torch.equal(value, state[f"backbone.{key}"]) and torch.equal(value, saved[key])
    assert any(not torch.equal(v, state[f"student.backbone.{k}"]) for k, v in backbone.items())


def test_no_rise_of_the_temperature(run):
    log = log_of(run("constant", "--temp-warmup-epochs", 0, "--epochs", 1))
    assert [line["temperature"] for line in log] == pytest.approx(5 * [0.07])


def test_stopped_and_resumed_is_bit_identical(run, monkeypatch):
    whole = run("whole")
    update, steps = cribo.CrIBo.update_teacher, []

    def interrupted(self, momentum):
        steps.append(momentum)
        if len(steps) == 8:
            os.kill(os.getpid(), signal.SIGUSR1)
        update(self, momentum)

    monkeypatch.setattr(cribo.CrIBo, "update_teacher", interrupted)
    run("cut")
    assert len(steps) == 8
    run("cut")
    assert len(steps) == 15
    cut = whole.parent / "cut"
    a, b = (torch.load(f / "last.pt", weights_only=True)["model"] for f in (whole, cut))
    expected = {"bank.objects", "bank.pushed", "image_center", "object_center", "backbone.0.weight"}
    assert expected <= a.keys() == b.keys()
    assert a["bank.pushed"] > 100 and min(a["image_center"].norm(), a["object_center"].norm()) > 0
    for key, value in a.items():
        assert torch.equal(value, b[key]), key
    same = ("step", "loss", "image", "object", "cross_image", "bootstrap", "objects", "std",
            "accuracy", "lr", "decay", "momentum", "temperature")
    for x, y in zip(log_of(whole), log_of(cut), strict=True):
        assert [x[key] for key in same] == [y[key] for key in same]


@pytest.mark.parametrize("flags", [
    ("--no-cycle", "--arch", "tiny_vit", "--drop-path", 0.1, "--bf16"),
    ("--no-object", "--no-cross-image"),
])
def test_ablations(run, flags):
    last = log_of(run("ablation", *flags))[-1]
    if "--no-cycle" in flags:
        assert last["bootstrap"] == 1 and last["cross_image"] > 0
    else:
        assert last["loss"] == pytest.approx(last["image"])
        assert last["cross_image"] == 0 < last["object"]
