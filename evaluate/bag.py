"""Bags of patches. "Bag of Image Patch Embedding" (BagSSL), Appendix C.4

20-NN and linear accuracy on the whole image's representation, on its local aggregation (C.4), and
on bags: the mean of the embeddings of 1, 4, 16, ... patches on a regular grid, before the projector
and, where the checkpoint has it, after. "cosine": in %, of a bag's and its whole image's embedding.

    python -m evaluate bag --checkpoint runs/bagssl-cifar10 --bags 1 16 --patch-scale 0.1 0.2 0.4

Differences
 1. As in training, patches are squares of --patch-scale of the image's area, resized to --size.
 2. The best linear accuracy of --lr, from features in memory: 5 GB with an 8192-wide projector on
    ImageNet-100. For ImageNet, --no-linear streams the training images' for each row instead.
 3. The paper's main text is not at hand: the numbers of patches and the protocol are ours.
"""
import functools
import itertools
import math

import torch
from torch import nn

import bagssl
import common
import training
import weights
from evaluate.features import all_features, features, labelled, open_labelled, percent, whole_view
from evaluate.knn import nearest_rows, vote
from evaluate.linear import LRS, accuracies, fit_on_kept

NAME = "bags"


def add_flags(flag):
    flag("--bags", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="patches: squares")
    flag("--patch-scale", type=float, nargs="+", help="shares of the area; the run's, or 0.2")
    flag("--no-linear", action="store_false", dest="linear", help="for data larger than memory")
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
        args.patch_scale = [low if low == high else 0.2]  # a run may have a range
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


def measure(backbone, data, names, args, whole=None, **how):
    """Rows of these names, each for so many columns of the features, 0 for all others; and the
    validation images' features. whole: those of the whole images."""
    train, val = data
    rank, world = training.rank_and_world()
    queries, targets, _ = all_features(backbone, val, args, **how)
    if args.linear:
        y, labels = labelled(*all_features(backbone, train, args, **how))
        kept = list(zip(y[rank::world].split(4096), labels[rank::world].split(4096)))
    table = {}
    first = 0
    for name, width in names.items():
        columns = slice(first, first + width if width else None)
        first += width
        q = queries[:, columns]
        chunks = kept if args.linear else features(backbone, train, args, **how)
        memory = ((*labelled(rows[:, columns], found), [0]) for rows, found, *_ in chunks)
        predicted = vote(*next(nearest_rows(q, memory, 20)), len(train.classes))
        row = {"20-NN": percent(predicted == targets), "linear": None, "cosine": None}
        if args.linear:
            heads = fit_on_kept(y[:, columns], labels, len(train.classes), args)
            row["linear"] = max(found["top-1"] for found in accuracies(heads, q, targets))
        if whole is not None:
            row["cosine"] = 100 * torch.cosine_similarity(q, whole[:, columns]).mean().item()
        table[name] = row
    return table, queries


def run(backbone, data, args):
    """20-NN and linear accuracy and cosines in % on whole images, local aggregations and bags."""
    projector = load_projector(args.checkpoint)
    spaces = {"": backbone.dim}  # and their widths
    if projector:
        projector = projector.to(args.device)
        spaces[", after the projector"] = projector[-1].out_features

    def embed(y):
        return torch.cat([y, projector(y)], 1) if projector else y

    def read_whole(backbone, x):
        maps, y = backbone(x)
        return torch.cat([embed(y), bagssl.local_aggregation(maps)], 1)

    def read_bag(backbone, x, count):
        _, y = backbone(x)  # (B P, D)
        return bagssl.bag_embedding(embed(y).unflatten(0, (-1, count)))  # (B, P, D) -> (B, D)

    names = {f"whole image{space}": width for space, width in spaces.items()}
    names["local aggregation"] = 0
    table, whole = measure(backbone, data, names, args, read=read_whole, view=whole_view)
    for scale, count in itertools.product(args.patch_scale, args.bags):
        prefix = f"scale {scale:g}, " if len(args.patch_scale) > 1 else ""
        names = {f"{prefix}bag of {count}{space}": width for space, width in spaces.items()}
        view = functools.partial(bagssl.patch_grid, scale=scale, count=count)
        read = functools.partial(read_bag, count=count)
        rows, _ = measure(backbone, data, names, args, whole, read=read, view=view,
                          batch_size=max(1, 256 // count))
        table |= rows
    return table
