"""A linear classifier on representations. VICReg, Appendix B.3, Table 1; VICRegL, Appendix D.1

SGD, batch 256, 100 epochs, cosine decay, weight decay 1e-6, random crops of 0.2 to 1 of the area
and flips; at test time the central square. Each learning rate has a classifier of its own; all are
trained at once, and the best by top-1 on the validation images is repeated in the last row: VICReg
has 0.02, VICRegL the best of the others. Top-5 is that of the same classifier.

    torchrun --nproc_per_node=8 -m evaluate linear --checkpoint resnet50.pth --arch resnet50 \
        --data imagenet
    python -m evaluate linear --checkpoint runs/vicreg-shapes --no-augment      # quick
    python -m evaluate linear --checkpoint resnet50.pth --arch resnet50 --data imagenet \
        --finetune --labels 0.01          # semi-supervised: 1% or 10% of the labels, VICReg B.3

Differences
 1. The 1% and 10% are drawn here, the same share of each class; the papers use SimCLR's lists.
 2. Unsaid in the papers: SGD's momentum, 0.9. Rates are for a batch of 256, and scale with it.
 3. `--no-augment` computes the features of the central squares once, and keeps them.
 4. On the CPU, `--finetune` takes BatchNorm's statistics over each process's own images.
"""
import argparse
import functools

import numpy as np
import torch
from torch import nn
from torchvision.transforms import RandomResizedCrop

import common
import training
from evaluate.features import (
    all_features, features, labelled, load_batches, open_labelled, pooled, summed, to_input)
from evaluate.heads import Heads, fit, shuffled, sweep_table

NAME = "linear"
LRS = [30, 10, 1, 0.3, 0.1, 0.03, 0.02, 0.01]
FINETUNE = {0.01: (0.03, 0.08), 0.1: (0.01, 0.1)}  # labels: rates of the backbone and of the head


def add_flags(flag):
    yes_or_no = argparse.BooleanOptionalAction
    flag("--lr", type=float, nargs="+", default=LRS, help="of a batch of 256")
    flag("--epochs", type=int, help="by default 100, with --finetune 20")
    flag("--batch-size", type=int, default=256, help="of all processes together")
    flag("--augment", action=yes_or_no, default=True, help="random crops and flips")
    flag("--finetune", action="store_true", help="the backbone is trained too")
    flag("--labels", type=float, choices=FINETUNE, help="with --finetune: share of the labels")


def prepare(args):
    alone = bool(args.labels) != args.finetune
    if alone or (args.finetune and not args.augment):
        raise common.UserError("--finetune and --labels go together, and not with --no-augment")
    return open_labelled(args)


def train_view(image, size):
    box = RandomResizedCrop.get_params(image, (0.2, 1.0), ratio=(3 / 4, 4 / 3))
    flip = torch.rand(()).item() < 0.5
    return [(box, flip, size)]


def few_labels(data, share):
    """Indices of the same share of each class, at least one image of each."""
    rng = np.random.default_rng(0)
    labels = np.array([data.label(i) for i in range(len(data))])
    chosen = []
    for c in range(len(data.classes)):
        members = rng.permutation(np.flatnonzero(labels == c))
        chosen.append(members[: max(1, round(share * len(members)))])
    return np.concatenate(chosen)


def classifiers(width, num_classes, count):
    torch.manual_seed(0)
    heads = [nn.Linear(width, num_classes) for _ in range(count)]
    for head in heads:
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    return heads


def fit_linear(model, batches, total, lrs, backbone_lr, decay, args):
    """fit() with SGD and cosine decay; the rates are for a batch of 256."""
    scale = args.batch_size / 256
    lrs = [scale * lr for lr in lrs]
    if backbone_lr is not None:
        backbone_lr = scale * backbone_lr
    sgd = functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=decay)
    cosine = functools.partial(training.cosine_schedule, total=1, warmup=0, peak=1, final=0)
    fit(model, batches, total, lrs, backbone_lr, sgd, cosine, args.device)


def hits(logits, target):
    """How many targets (b,) are the first, and how many among the first five, of logits (b, C)."""
    found = logits.topk(min(5, logits.shape[1])).indices == target[:, None]  # (b, 5)
    return torch.stack([found[:, 0].sum(), found.sum()])


def accuracies(counts, n):
    return [{"top-1": 100 * one / n, "top-5": 100 * five / n} for one, five in counts.tolist()]


def linear_on_kept(y, labels, queries, targets, num_classes, args):
    """Accuracies on queries (m, D) of classifiers fitted to y (n, D), one for each of args.lr."""
    total = (args.epochs or 100) * (len(y) // args.batch_size)
    order = shuffled(len(y), total, args)
    rows = ([row for _, row in batch] for batch in order)
    batches = ((y[i], labels[i]) for i in rows)
    heads = classifiers(y.shape[1], num_classes, len(args.lr))
    model = Heads(nn.Identity(), lambda _, y: y, heads)
    fit_linear(model, batches, total, args.lr, None, 1e-6, args)
    counts = torch.stack([hits(head(queries), targets) for head in model.heads])
    return accuracies(counts, len(queries))


def linear_on_images(backbone, train, val, args):
    """The same of classifiers fitted to augmented images; with args.finetune the backbone too."""
    lrs, backbone_lr, decay, epochs = args.lr, None, 1e-6, 100
    chosen = np.flatnonzero([train.label(i) >= 0 for i in range(len(train))])
    if args.finetune:
        backbone_lr, lr = FINETUNE[args.labels]
        lrs, decay, epochs = [lr], 0.0, 20
        chosen = few_labels(train, args.labels)
    total = (args.epochs or epochs) * (len(chosen) // args.batch_size)
    order = shuffled(len(chosen), total, args)
    order = ([(epoch, int(chosen[row])) for epoch, row in batch] for batch in order)
    views = common.Views(train, functools.partial(train_view, size=args.size), seed=0)
    loaded = load_batches(views, args, batch_sampler=order)
    batches = ((to_input(b.views[0], args.device), b.labels.to(args.device)) for b in loaded)
    heads = classifiers(backbone.dim, len(train.classes), len(lrs))
    model = Heads(backbone, pooled, heads, args.finetune, args.bf16)
    fit_linear(model, batches, total, lrs, backbone_lr, decay, args)

    counts = torch.zeros(len(lrs) + 1, 2, dtype=torch.float64, device=args.device)
    for y, target, _ in features(backbone, val, args):
        for count, head in zip(counts, model.heads):
            count += hits(head(y), target)
        counts[-1] += len(y)
    *counts, n = summed(counts)
    return lrs, accuracies(torch.stack(counts), n[0].item())


def run(backbone, data, args):
    """Accuracies in % of linear classifiers, one for each learning rate."""
    train, val = data
    if args.augment:
        return sweep_table(*linear_on_images(backbone, train, val, args))
    y, labels = labelled(*all_features(backbone, train, args))
    queries, targets = all_features(backbone, val, args)
    rows = linear_on_kept(y, labels, queries, targets, len(train.classes), args)
    return sweep_table(args.lr, rows)
