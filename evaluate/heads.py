"""Training heads on a backbone, all learning rates of a sweep in one pass; tables; mIoU."""
import statistics

import torch
import torch.nn.functional as F
from torch import nn

import common
import training
from evaluate.features import progress, summed


class Heads(nn.Module):
    """One head for each learning rate; the backbone computes once for all of them.
    read(backbone, images) -> the features that the heads see."""

    def __init__(self, backbone, read, heads, finetune=False, bf16=False):
        super().__init__()
        self.backbone = backbone.train(finetune).requires_grad_(finetune)
        self.heads = nn.ModuleList(heads)
        self.read = read
        self.bf16 = bf16

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            y = self.read(self.backbone, x)
        y = y.float()
        return [head(y) for head in self.heads]


def cross_entropy(logits, target):
    """The mean over all processes' samples or pixels but void ones (-1). Logits (B, C) for targets
    (B,), or maps of logits (B, C, H, W), which are upsampled, for masks (B, H0, W0)."""
    if logits.ndim == 4:
        logits = F.interpolate(logits, target.shape[1:], mode="bilinear")  # (B, C, H0, W0)
    _, world = training.rank_and_world()
    known = summed((target >= 0).sum()).clamp(min=1)
    total = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
    return world * total / known  # DDP takes the mean of gradients, where the sum is meant


def fit(model, batches, total, lrs, backbone_lr, optimizer, schedule, device):
    """Trains each head of a Heads at its own rate, the backbone at backbone_lr (None: frozen).
    batches: `total` pairs of input and target; schedule(progress, 0 to 1) -> all rates' factor."""
    model, ddp = training.distribute(model, device)
    groups = [dict(params=list(head.parameters())) for head in model.heads]
    peaks = list(lrs)
    if backbone_lr is not None:
        groups.append(dict(params=list(model.backbone.parameters())))
        peaks.append(backbone_lr)
    optimizer = optimizer(groups)

    for step, (x, target) in enumerate(progress(batches, total, f"{total} steps")):
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * schedule(step / total)
        target = target.to(device, non_blocking=True)
        losses = torch.stack([cross_entropy(logits, target) for logits in ddp(x)])
        optimizer.zero_grad()
        losses.sum().backward()  # each head's gradient is its own: they share no parameter
        optimizer.step()

    model.eval()


def shuffled(indices, total, args):
    """Yields this process's part of `total` batches of `indices`, as lists of (epoch, index)."""
    rank, world = training.rank_and_world()
    n = len(indices)
    if args.batch_size % world or args.batch_size > n:
        raise common.UserError(f"--batch-size {args.batch_size} must be a multiple of the {world} "
                               f"processes and at most the {n} training images of {args.data}")
    for batch in common.Batches(n, args.batch_size, 0, total, 0, rank, world):
        yield [(epoch, indices[row]) for epoch, row in batch]


def sweep_table(lrs, rows):
    """A row {column: %} for each learning rate, and the one that is best in the first column."""
    table = {f"lr {lr:g}": row for lr, row in zip(lrs, rows)}
    if len(lrs) > 1:
        first = next(iter(rows[0]))
        table["best"] = max(rows, key=lambda row: row[first])
    return table


def confusion(predicted, mask, num_classes):
    """Counts of pixels (true class, predicted class); void (-1) in the mask is left out."""
    pairs = (mask * num_classes + predicted)[mask >= 0]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def ious(counts):
    """Intersection over union in % of the classes that occur in the masks, {class: IoU}; counts:
    the confusion of all images. Raises UserError."""
    intersection = counts.diag()
    union = counts.sum(0) + counts.sum(1) - intersection
    present = counts.sum(1).nonzero().flatten()
    if not len(present):
        raise common.UserError("the validation masks hold nothing but void")
    share = 100 * intersection[present].double() / union[present]
    return dict(zip(present.tolist(), share.tolist()))


def mean_iou(counts):
    return statistics.fmean(ious(counts).values())
