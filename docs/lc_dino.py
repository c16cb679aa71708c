# SPDX-License-Identifier: MIT
"""LC-loss on DINO (arXiv:2207.04398, Appendix B): two method files combined in a third program.

The local contrastive loss, its views and correspondences are lc_loss.py's; DINO's head, loss and
centre are cribo.py's. A student learns from both losses; the teacher is its moving average.

    python -m docs.lc_dino                                            # a demonstration, on a CPU
    torchrun --nproc_per_node=8 -m docs.lc_dino --data imagenet       # 8 GPUs: 300 epochs
    python -m docs.lc_dino --alpha 0 --name dino                      # DINO alone, on these views

Differences
 1. The paper has Swin-T, which is not in common.py: here ViT-S/16, or any other --arch.
 2. Appendix B gives optimizer, learning rate, weight decay, epochs, batch and alpha. The rest is
    DINO's, as CrIBo's release has it, without drop path and small crops.
 3. L_G of Eq. (5) is the mean of DINO's two directions, not their sum.
"""
import argparse
import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn

import common
import cribo
import lc_loss
import training

IMAGENET = dict(
    arch="vit_small_patch16", size=224, head="2048-256-65536", epochs=300, batch_size=1024,
    base_lr=5e-4, final_lr=1e-5, warmup_epochs=10, weight_decay=0.04, final_weight_decay=0.4,
    clip_grad=0.0, freeze_epochs=1, norm_last_layer=False, momentum=0.996, teacher_temp=0.07,
    temp_warmup_epochs=30)
RECIPES = {
    "imagenet": IMAGENET,
    "small": IMAGENET | dict(  # this and the next one: cribo.py's
        arch="vit_tiny_patch16", size=160, head="2048-256-4096", epochs=400, batch_size=128,
        momentum=0.99, temp_warmup_epochs=15),
    "shapes": IMAGENET | dict(
        arch="tiny_convnet", size=64, head="512-128-1024", epochs=4, batch_size=64, base_lr=0.016,
        warmup_epochs=1, final_weight_decay=0.04, clip_grad=3.0, norm_last_layer=True,
        momentum=0.99, teacher_temp=0.04),
}


class Network(nn.Module):
    """Student or teacher: backbone, DINO's head and LC-loss's local branch."""

    def __init__(self, backbone, widths, num_classes, norm_last_layer):
        super().__init__()
        self.backbone = backbone
        self.head = cribo.Head(backbone.dim, *widths, norm_last_layer)
        self.head.object = self.head.image  # without objects one last layer is enough
        self.local = lc_loss.mlp(backbone.dim, backbone.dim, 256)
        self.probe = nn.Linear(backbone.dim, num_classes) if num_classes else None

    def forward(self, x, local_view):
        """Views (2B, 3, H0, W0), all I_c and then all I_sc -> logits (2B, L), local projections
        (B, 256, h, w) of local_view, 0 for I_c or 1 for I_sc, and of I_sc logits (B, classes)."""
        maps, z_bar = self.backbone(x)  # (2B, N, D), (2B, D)
        image_logits, _ = self.head(z_bar, z_bar[:0])
        f = lc_loss.project_maps(maps.chunk(2)[local_view], self.local)
        logits = self.probe(z_bar.detach().chunk(2)[1]) if self.probe else None
        return image_logits, f, logits


class StudentAndTeacher(nn.Module):
    def __init__(self, student):
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.backbone = self.teacher.backbone  # what a run saves as backbone.pt
        self.register_buffer("center", torch.zeros(student.head.image.out_features))

    @torch.no_grad()
    def update_teacher(self, momentum):
        teacher = list(self.teacher.parameters())
        torch._foreach_lerp_(teacher, list(self.student.parameters()), 1 - momentum)


def lc_dino_loss(teacher_logits, logits, f_c, f_sc, points, valid, center, teacher_temp, alpha=0.5,
                 temperature=0.1):
    """Eq. (5) with DINO's loss as L_G -> the loss, and its terms, unweighted. Arguments as in
    cribo.distillation_loss() and lc_loss.local_contrastive_loss(); a collective, as they are."""
    dino = cribo.distillation_loss(teacher_logits, logits, center, teacher_temp, 0.1) / 2
    local = lc_loss.local_contrastive_loss(f_c, f_sc, points, valid, temperature)
    return (1 - alpha) * dino + alpha * local, {"dino": dino, "local": local}


def train(args):
    device = training.set_up(args.seed)
    data = common.open_data(args.data, "train", args.size)
    backbone = training.build_backbone(args)
    grid = common.grid_of(args.size, backbone.stride)
    student = Network(backbone, args.head, len(data.classes), args.norm_last_layer)
    student, ddp = training.distribute(student, device)
    model = StudentAndTeacher(student).to(device)
    optimizer = cribo.make_optimizer(student)
    run = training.Run(args, model, optimizer, data, device)  # resumes

    colours = [common.Photometric(**colour, size=args.size) for colour in lc_loss.COLOURS]

    for batch in run.batches(functools.partial(lc_loss.sample_views, size=args.size)):
        epoch = run.step / run.per_epoch
        x = torch.cat(common.recolour(colours, batch.views))  # (2B, 3, H0, W0)
        points, valid = lc_loss.correspondences(
            batch.boxes[:, 1], batch.flips[:, 1], batch.sizes, grid)

        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            with torch.no_grad():
                teacher_logits, f_c, _ = model.teacher(x, 0)
            image_logits, f_sc, logits = ddp(x, 1)
        rise = min(1, epoch / args.temp_warmup_epochs)
        temp = 0.04 + rise * (args.teacher_temp - 0.04)
        loss, parts = lc_dino_loss(teacher_logits, image_logits, f_c, f_sc, points, valid,
                                   model.center, temp, args.alpha, args.temperature)
        cribo.update_center(model.center, teacher_logits)
        probe_loss, accuracy = training.probe(logits, batch.labels)

        lr = run.set_lr()
        momentum = training.cosine_schedule(run.step, run.total, 0, args.momentum, 1.0)
        decay = training.cosine_schedule(run.step, run.total, 0, args.weight_decay,
                                         args.final_weight_decay)
        optimizer.param_groups[0]["weight_decay"] = decay
        optimizer.zero_grad()
        (loss + probe_loss).backward()
        if args.clip_grad:
            for p in student.parameters():  # each by itself, as in DINO
                nn.utils.clip_grad_norm_(p, args.clip_grad)
        if epoch < args.freeze_epochs:
            student.head.image.zero_grad()  # to None, so AdamW leaves this layer alone
        optimizer.step()
        model.update_teacher(momentum)

        std = F.normalize(teacher_logits.float(), dim=1).std(0).mean()  # 0: collapsed
        local_spread = lc_loss.spread(f_c.flatten(2).mT)  # over an image's locations
        run.log(loss=loss, **parts, std=std, local_spread=local_spread, **accuracy, lr=lr,
                momentum=momentum, temperature=temp)
        run.end_step()

    run.finish("knn", "correspond")


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    flag = parser.add_argument
    flag("--alpha", type=float, default=0.5, help="weight of the local term; DINO's has 1 - alpha")
    flag("--temperature", type=float, default=0.1, help="tau of the contrastive term")
    flag("--head", type=cribo.head_widths, help="hidden, bottleneck, output width")
    flag("--momentum", type=float, help="of the teacher at the start; it ends at 1")
    flag("--teacher-temp", type=float, help="the teacher's temperature after its rise from 0.04")
    limits = dict(alpha=(0, 1), temperature=(0.001, 10), teacher_temp=(0.001, 1), momentum=(0, 1))
    training.launch(train, parser, RECIPES, **limits)


if __name__ == "__main__":
    main()
