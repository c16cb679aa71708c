"""A linear classifier. VICReg, Appendix B.3, Table 1; VICRegL, Appendix D.1

SGD, 100 epochs, cosine decay, crops of 0.2 to 1 of the area and flips, on a frozen backbone; one
classifier a learning rate, in one pass: VICReg has 0.02, VICRegL the best of the others.
Or --finetune --labels 0.01 (or 0.1): with 1% of the labels, and the backbone is trained too (B.3).

    python -m evaluate linear --checkpoint runs/vicreg-shapes --no-augment             # quick
    torchrun --nproc_per_node=8 -m evaluate linear --checkpoint resnet50.pth --data imagenet

Differences
 1. The 1% and 10% are drawn here, the same share of each class; the paper uses SimCLR's lists.
 2. Unsaid: momentum 0.9. BatchNorm that is trained has the statistics of all processes.
"""
import functools

import numpy as np
import torch
from torch import nn
from torchvision.transforms import RandomResizedCrop

import common
import training
from evaluate import features
from evaluate.features import all_features, labelled, open_labelled, percent, to_input
from evaluate.heads import Heads, fit, shuffled, sweep_table

NAME = "linear"
LRS = [30, 10, 1, 0.3, 0.1, 0.03, 0.02, 0.01]
FINETUNE = {0.01: (0.03, 0.08), 0.1: (0.01, 0.1)}  # labels: rates of the backbone and of the head


def add_flags(flag):
    flag("--lr", type=float, nargs="+", default=LRS, help="of a batch of 256")
    flag("--epochs", type=int, help="by default 100, with --finetune 20")
    flag("--batch-size", type=int, default=256, help="of all processes together")
    flag("--no-augment", action="store_false", dest="augment", help="central squares, kept")
    flag("--finetune", action="store_true", help="the backbone is trained too")
    flag("--labels", type=float, choices=FINETUNE, help="with --finetune: share of the labels")


def prepare(args):
    """Opens the data and settles the flags. Raises UserError."""
    if bool(args.labels) != args.finetune or (args.finetune and not args.augment):
        raise common.UserError("--finetune and --labels go together, and not with --no-augment")
    if args.finetune:
        args.lr = [FINETUNE[args.labels][1]]
    args.epochs = args.epochs or (20 if args.finetune else 100)
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
    return np.concatenate(chosen).tolist()


def classifiers(width, num_classes, count):
    torch.manual_seed(0)
    heads = [nn.Linear(width, num_classes) for _ in range(count)]
    for head in heads:
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    return heads


def fit_classifiers(model, batches, total, args, backbone_lr=None, decay=1e-6):
    """fit() with SGD and cosine decay, at rates for a batch of 256."""
    scale = args.batch_size / 256
    lrs = [scale * lr for lr in args.lr]
    if backbone_lr is not None:
        backbone_lr = scale * backbone_lr
    sgd = functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=decay)
    cosine = functools.partial(training.cosine_schedule, total=1, warmup=0, peak=1, final=0)
    fit(model, batches, total, lrs, backbone_lr, sgd, cosine, args.device)
    return model.heads


def fit_on_kept(y, labels, num_classes, args):
    """Classifiers of representations y (n, D), one for each of args.lr."""
    total = args.epochs * (len(y) // args.batch_size)

    def batches():
        for batch in shuffled(range(len(y)), total, args):
            rows = [row for _, row in batch]
            yield y[rows], labels[rows]

    heads = classifiers(y.shape[1], num_classes, len(args.lr))
    model = Heads(nn.Identity(), lambda _, y: y, heads)
    return fit_classifiers(model, batches(), total, args)


def fit_on_images(backbone, train, args):
    """The same on augmented images; with args.finetune the backbone is trained too."""
    chosen = [i for i in range(len(train)) if train.label(i) >= 0]
    if args.finetune:
        chosen = few_labels(train, args.labels)
    total = args.epochs * (len(chosen) // args.batch_size)
    views = common.Views(train, lambda image: train_view(image, args.size), seed=0)
    order = shuffled(chosen, total, args)
    loaded = training.data_loader(views, args.workers, batch_sampler=order)
    batches = ((to_input(b.views[0], args.device), b.labels) for b in loaded)
    heads = classifiers(backbone.dim, len(train.classes), len(args.lr))
    model = Heads(backbone, features.pooled, heads, args.finetune, args.bf16)
    if args.finetune:
        return fit_classifiers(model, batches, total, args, FINETUNE[args.labels][0], decay=0.0)
    return fit_classifiers(model, batches, total, args)


@torch.no_grad()
def accuracies(heads, y, targets):
    """Top-1 and top-5 accuracy in % of each classifier on representations y (m, D)."""
    rows = []
    for head in heads:
        logits = head(y)  # (m, C)
        right = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (m, 5)
        top_1 = percent(right[:, 0])
        top_5 = percent(right.any(1))
        rows.append({"top-1": top_1, "top-5": top_5})
    return rows


def run(backbone, data, args):
    """Accuracies in % of linear classifiers, one for each learning rate."""
    train, val = data
    if args.augment:
        heads = fit_on_images(backbone, train, args)
    else:
        kept = labelled(*all_features(backbone, train, args))
        heads = fit_on_kept(*kept, len(train.classes), args)
    queries, targets, _ = all_features(backbone, val, args)
    return sweep_table(args.lr, accuracies(heads, queries, targets))
