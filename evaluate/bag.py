"""Bags of patches. "Bag of Image Patch Embedding" (BagSSL), Appendix C.4

20-NN and linear accuracy on the whole image's representation, on its local aggregation (C.4), and
on bags: the mean of the embeddings of 1, 4, 16, ... patches on a regular grid, before the projector
and, where the checkpoint has it, after.

    python -m evaluate bag --checkpoint runs/bagssl-cifar10 --bags 1 16

Differences
 1. Patches are cut as in training: squares of the share --patch-scale of the whole image's
    area (at most all of the short side), resized to --size.
 2. The linear accuracy is the best of --lr. It needs the features of all images in memory: 5 GB a
    bag for a ResNet-50 with an 8192-wide projector on ImageNet-100, too much on ImageNet.
 3. The paper's main text is not at hand: the numbers of patches and the protocol are ours.
"""
import functools
import math

import torch
from torch import nn

import bagssl
import common
import training
import weights
from evaluate.features import all_features, labelled, open_labelled, percent, whole_view
from evaluate.knn import nearest_of_all, vote
from evaluate.linear import LRS, accuracies, fit_on_kept

NAME = "bags"


def add_flags(flag):
    flag("--bags", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="patches: squares")
    flag("--patch-scale", type=float, help="a patch's share of the area; that of the run, or 0.2")
    flag("--lr", type=float, nargs="+", default=LRS, help="all are trained at once")
    flag("--epochs", type=int, default=100, help="of linear classifiers")
    flag("--batch-size", type=int, default=256, help="of linear classifiers")


def prepare(args):
    if any(math.isqrt(count) ** 2 != count for count in args.bags):
        raise common.UserError(f"--bags {' '.join(map(str, args.bags))}: patches are a grid, so "
                               "their numbers are squares")
    if args.patch_scale is None:
        scale = args.run.get("patch_scale", "0.2")
        low, high = bagssl.parse_scale(scale) if isinstance(scale, str) else scale
        args.patch_scale = low if low == high else 0.2  # a run may have a range
    return open_labelled(args)


def load_projector(checkpoint, name="projector"):
    """The projector in a run's last.pt or in a release of VICReg or VICRegL, in eval mode; None
    where there is none. Raises UserError for one that is built differently."""
    if checkpoint == "random":
        return None
    state = {}
    for key, value in weights.read_checkpoint(checkpoint).get("model", {}).items():
        key = key.removeprefix("module.")
        if key.startswith(f"{name}."):
            state[key.removeprefix(f"{name}.")] = value
    if not state:
        return None
    norm = nn.LayerNorm
    if any(key.endswith("running_mean") for key in state):
        norm = nn.BatchNorm1d
    layers = []
    for matrix in state.values():
        if matrix.ndim == 2:
            outputs, inputs = matrix.shape
            layers += [nn.Linear(inputs, outputs), norm(outputs), nn.ReLU()]
    if layers:
        layers[-3:] = [nn.Linear(inputs, outputs, bias=False)]
    projector = nn.Sequential(*layers)
    try:
        projector.load_state_dict(state)
    except RuntimeError:
        raise common.UserError(
            f"{checkpoint}: its {name} is not of linear layers with normalization between them and "
            "no bias in the last; evaluate the backbone alone: backbone.pt") from None
    return projector.eval()


def knn_and_linear(y, labels, queries, targets, num_classes, args):
    """20-NN and the best linear accuracy in % on queries (m, D), from rows y (n, D)."""
    rank, world = training.rank_and_world()
    mine = zip(y[rank::world].split(4096), labels[rank::world].split(4096))
    predicted = vote(*nearest_of_all(queries, mine, 20), num_classes)
    heads = fit_on_kept(y, labels, num_classes, args)
    linear = [row["top-1"] for row in accuracies(heads, queries, targets)]
    return {"20-NN": percent(predicted == targets), "linear": max(linear)}


def run(backbone, data, args):
    """20-NN and linear accuracy in % on whole images, local aggregations and bags."""
    train, val = data
    projector = load_projector(args.checkpoint)
    if projector:
        projector = projector.to(args.device)

    def read_whole(backbone, x):
        maps, y = backbone(x)
        return torch.cat([y, bagssl.local_aggregation(maps)], 1)

    def read_bag(backbone, x, count):
        _, y = backbone(x)  # (B P, D)
        if projector:
            y = torch.cat([y, projector(y)], 1)
        return bagssl.bag_embedding(y.unflatten(0, (-1, count)))  # (B, P, D) -> (B, D)

    table = {}

    def add_rows(first, second, **how):
        """A row for the first backbone.dim columns of the features, one for the others, if any."""
        y, labels = labelled(*all_features(backbone, train, args, **how))
        queries, targets, _ = all_features(backbone, val, args, **how)
        widths = [backbone.dim, y.shape[1] - backbone.dim]
        for name, rows, q in zip([first, second], y.split(widths, 1), queries.split(widths, 1)):
            if rows.shape[1]:
                table[name] = knn_and_linear(rows, labels, q, targets, len(train.classes), args)

    add_rows("whole image", "local aggregation", read=read_whole, view=whole_view)
    for count in args.bags:
        name = f"bag of {count}"
        view = functools.partial(bagssl.patch_grid, scale=args.patch_scale, count=count)
        read = functools.partial(read_bag, count=count)
        add_rows(name, f"{name}, after the projector", read=read, view=view,
                 batch_size=max(1, 256 // count))
    return table
