"""docs/lc_dino.py: the loss, the teacher, a run."""
import importlib

import pytest
import torch
from helpers import SMALL, checkpoint, lines, run

import common
import cribo
import lc_loss
from weights import load_backbone

lc_dino = importlib.import_module("docs.lc_dino")
FLAGS = (*SMALL, "--size", 32, "--head", "32-16-24", "--base-lr", 0.02, "--workers", 0)


def inputs(b=3, grid=4, seed=0):
    """What lc_dino_loss() takes, of random numbers."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 2 * b, 10, generator=g)
    f = torch.randn(2, b, 6, grid, grid, generator=g)
    points = 2 * torch.rand(b, grid, grid, 2, generator=g) - 1
    valid = torch.rand(b, grid, grid, generator=g) < 0.6
    center = torch.randn(10, generator=g)
    return *logits, *f, points, valid, center, 0.05


def test_the_loss_is_eq_5_with_dinos():
    teacher, student, f_c, f_sc, points, valid, center, temp = inputs()
    p = torch.softmax((teacher - center) / temp, 1)
    log_q = torch.log_softmax(student / 0.1, 1)
    dino = -(p[:3] * log_q[3:]).sum(1).mean() / 2 - (p[3:] * log_q[:3]).sum(1).mean() / 2
    local = lc_loss.local_contrastive_loss(f_c, f_sc, points, valid, 0.2)
    loss, parts = lc_dino.lc_dino_loss(*inputs(), alpha=0.3, temperature=0.2)
    torch.testing.assert_close(parts["dino"], dino)
    torch.testing.assert_close(parts["local"], local)
    torch.testing.assert_close(loss, 0.7 * dino + 0.3 * local)


def build(num_classes=2):
    torch.manual_seed(0)
    backbone = common.build_backbone("tiny_convnet", 32)
    return lc_dino.Network(backbone, (8, 6, 10), num_classes, norm_last_layer=True)


def test_views_have_their_places():
    student = build().eval()
    x = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        image_logits, f_c, logits = student(x, 0)
        _, f_sc, _ = student(x, 1)
        maps, z_bar = student.backbone(x)
        expected, _ = student.head(z_bar, z_bar[:0])
        torch.testing.assert_close(image_logits, expected)
        for f, half in ((f_c, maps[:3]), (f_sc, maps[3:])):
            rows = student.local(half.flatten(0, 1)).view(3, 4, 4, 256)
            torch.testing.assert_close(f, rows.permute(0, 3, 1, 2))
        torch.testing.assert_close(logits, student.probe(z_bar[3:]))


def test_gradients_reach_all_of_the_student_and_nothing_of_the_teacher():
    model = lc_dino.StudentAndTeacher(build(0))
    x = torch.randn(6, 3, 32, 32)
    teacher_logits, f_c, _ = model.teacher(x, 0)
    image_logits, f_sc, _ = model.student(x, 1)
    points = torch.zeros(3, 4, 4, 2)
    valid = torch.ones(3, 4, 4, dtype=torch.bool)
    loss, _ = lc_dino.lc_dino_loss(teacher_logits, image_logits, f_c, f_sc, points, valid,
                                   model.center, 0.04)
    loss.backward()
    missing = [name for name, p in model.student.named_parameters()
               if p.requires_grad and p.grad is None]
    assert not missing  # DDP would refuse them
    assert all(p.grad is None for p in model.teacher.parameters())


def test_the_teacher_is_the_moving_average():
    model = lc_dino.StudentAndTeacher(build())
    before = [p.clone() for p in model.teacher.parameters()]
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(1.0)
    model.update_teacher(0.75)
    for old, new in zip(before, model.teacher.parameters()):
        torch.testing.assert_close(new, old + 0.25)
    assert model.teacher.head.object is model.teacher.head.image


def test_runs_with_and_without_the_local_loss(images, tmp_path):
    last = {}
    for alpha in (0, 0.5):
        name = f"alpha{alpha}"
        how = (*FLAGS, "--data", images, "--alpha", alpha, "--out", tmp_path, "--name", name)
        assert run("docs.lc_dino", *how) == 0
        log = lines(tmp_path / name)
        for line in log:
            expected = (1 - alpha) * line["dino"] + alpha * line["local"]
            assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert log[-1]["std"] > 0.01 and log[-1]["local_spread"] > 0.1
        last[alpha] = sum(line["local"] for line in log[-4:]) / 4
    assert last[0.5] < last[0] - 0.05  # places are found

    model = checkpoint(tmp_path / name)["model"]
    backbone = load_backbone(tmp_path / name).state_dict()
    assert all(torch.equal(value, model[f"teacher.backbone.{name}"])
               for name, value in backbone.items())


def test_recipes_hold_what_the_program_reads():
    for recipe in lc_dino.RECIPES.values():
        shared = {name: value for name, value in cribo.VIT_SMALL.items() if name in recipe}
        assert set(recipe) == set(shared)
        assert recipe["base_lr"] == 5e-4 or recipe["arch"] == "tiny_convnet"
    imagenet = lc_dino.RECIPES["imagenet"]
    assert (imagenet["epochs"], imagenet["batch_size"], imagenet["weight_decay"]) == (300, 1024,
                                                                                      0.04)
