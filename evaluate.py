"""The papers' evaluation protocols, for a checkpoint of any method. Runs under torchrun, or on one CPU.

    python evaluate.py knn --checkpoint runs/vicreg-shapes
    python evaluate.py linear --checkpoint resnet50.pth --arch resnet50 --data imagenet [--no-augment]
    python evaluate.py linear --checkpoint resnet50.pth --arch resnet50 --data imagenet --finetune --labels 0.01
    python evaluate.py fewshot --checkpoint resnet50.pth --arch resnet50 --data DTD
    python evaluate.py segment --checkpoint dino.pth --arch vit_small_patch16 --data voc [--layers 4] [--finetune]
    python evaluate.py retrieve --checkpoint cribo.pth --arch vit_small_patch16 --data voc --subsample 1 8 64 128
    python evaluate.py correspond --checkpoint runs/lc_loss-shapes
    python evaluate.py bag --checkpoint runs/bagssl-cifar10 [--bags 1 16] [--patch-scale 0.2]
    torchrun --nproc_per_node=8 evaluate.py knn --checkpoint runs/vicreg-imagenet/backbone.pt --arch resnet50 --data imagenet

    knn         k nearest neighbours by cosine, by majority and weighted: VICReg, Appendix C.1
    linear      a linear classifier on frozen representations: VICReg B.3, VICRegL D.1; semi-supervised: VICReg B.3
    fewshot     5-way 5-shot logistic regression: LC-loss, Section 4.4, Table 7
    segment     a linear or FCN head on local features: VICRegL D.2 and Table 8, CrIBo A.2
    retrieve    dense nearest neighbours: CrIBo, Section 4.1
    correspond  matches under a flip, and matches by location against matches by feature: LC-loss 4.6, VICRegL
    bag         k-NN and linear on bags of patches, before and after the projector, and on local aggregation: BagSSL

--checkpoint: a run folder, last.pt, backbone.pt, a state dict of torchvision or timm, a release of VICReg, VICRegL, DINO
or CrIBo, or `random`, the untrained baseline. The table is added to PROTOCOL.json beside the checkpoint.

Masks (segment, retrieve) come with `shapes`, `voc` (torchvision's, its 1,464 training images), a folder of {train,val}/
{images,masks}, or ADE20K's own layout, images/{training,validation} and annotations/. They are 8-bit PNGs of class ids,
255 = void; a folder has as many classes as its training masks name. ADE20K's 0 is void, so its ids are shifted by -1.

Differences
 1. The 1% and 10% of labels are drawn here, the same share of each class; the papers use SimCLR's lists of files.
 2. Unsaid: SGD's momentum (0.9), few-shot's 15 queries a class, and its logistic regression on normalised features with
    scikit-learn's default penalty, as Tian et al. (arXiv 2003.11539) have it.
 3. Of mmsegmentation's schedules: polynomial decay (power 0.9, to 0), batch 16, weight decay 5e-4 (SGD) or 0.01 (AdamW),
    flips, crops of an image enlarged 1 to 2 times (not 0.5 to 2, so nothing is padded), no colour distortion. FCN: two
    convolutions of a quarter of the features' width, the input not concatenated. AdamW with VICRegL's rates, where CrIBo
    has Adam with 8e-4, 3e-4, 1e-4, 8e-5 (`--lr`). VICRegL's ConvNeXts and ViTs are `--layers 4`. Evaluation is of whole
    images with the short side at --size.
 4. On the CPU, networks with BatchNorm that are trained here (--finetune, FCN) use each process's own statistics.
 5. bag looks at all of the central square; its linear accuracy is the best of --lr, on features that every process holds
    in memory: 5 GB a bag for a ResNet-50 with an 8192-wide projector on ImageNet-100, too much on ImageNet.
"""
import argparse
import concurrent.futures
import copy
import functools
import json
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

import bagssl
import common
import shapes
import training
import vicreg
import vicregl
import weights

# --- Images with labels --------------------------------------------------------------------------------------------


def center_view(rng, height, width, size):
    """The central square: 7/8 of the short side, as is usual on ImageNet, or all of it for images under 100 pixels."""
    return central_square(round(min(height, width) * (1 if size < 100 else 7 / 8)), height, width, size)


def whole_view(rng, height, width, size):
    """The central square of all of the short side."""
    return central_square(min(height, width), height, width, size)


def central_square(side, height, width, size):
    return [(((height - side) // 2, (width - side) // 2, side, side), False, size)]


def to_input(x, device):
    """uint8 images (B, 3, H, W) -> what a backbone takes."""
    return common.normalize(x.to(device, non_blocking=True).float() / 255)


def pooled(backbone, x):
    return backbone(x)[1]


@torch.no_grad()
def features(backbone, data, size, device, bf16=False, workers=0, batch_size=256, read=pooled, view=center_view):
    """Yields representations (b, D) in float32, labels and indices (b,) of this process's share of `data`.

    read(backbone, images (b, 3, size, size)) -> (b, D); view: what is seen of an image.
    """
    rank, world = training.rank_and_world()
    keys = [(0, i) for i in range(rank, len(data), world)]
    views = common.Views(data, functools.partial(view, size=size), seed=0)
    chunks = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
    for chunk, batch in zip(chunks, torch.utils.data.DataLoader(views, batch_sampler=chunks, num_workers=workers)):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            y = read(backbone, to_input(batch.views[0], device)).float()
        whole = batch.broken < 0  # an unreadable image has no part in a result
        for i in batch.broken[~whole].tolist():
            print("warning:", common.printable(f"cannot read {data.name(i)}; it is left out"), file=sys.stderr, flush=True)
        yield y[whole.to(device)], batch.labels[whole].to(device), torch.tensor([i for _, i in chunk])[whole].to(device)


def all_features(backbone, data, size, device, bf16, workers, **how):
    """The same of all processes' shares, in the order of the data: (n, D) and (n,)."""
    parts = list(zip(*features(backbone, data, size, device, bf16, workers, **how)))
    y, labels, index = gather(*(torch.cat(part) for part in parts))
    i = index.argsort()
    return y[i], labels[i]


def labelled(y, labels):
    return y[labels >= 0], labels[labels >= 0]  # STL-10 has images without


def all_sum(x):
    """The sum over processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather(*tensors, dim=0):
    """Concatenates what the processes hold, in any sizes of `dim`."""
    if not dist.is_initialized():
        return tensors
    everyone = []
    for x in (t.movedim(dim, 0) for t in tensors):
        counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=x.device)
        counts[dist.get_rank()] = len(x)
        counts = all_sum(counts).tolist()
        padded = x.new_zeros(max(counts), *x.shape[1:])  # all_gather wants equal shapes
        padded[:len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        everyone.append(torch.cat([part[:count] for part, count in zip(parts, counts)]).movedim(0, dim))
    return tuple(everyone)


# --- k nearest neighbours ------------------------------------------------------------------------------------------


def nearest(queries, chunks, k, tile=8192):
    """The k largest cosine similarities of queries (n, D) to rows that come in chunks, and their labels: (n, k) each.

    chunks: an iterable of (rows (m, D), labels (m,)). No more than tile x m similarities exist at a time.
    Where there are fewer than k rows, -inf and -1 fill up.
    """
    queries = F.normalize(queries, dim=1)
    best = queries.new_full((len(queries), k), -torch.inf)
    best_labels = torch.full((len(queries), k), -1, device=queries.device)
    for rows, labels in chunks:
        rows = F.normalize(rows, dim=1).T
        for start in range(0, len(queries), tile):
            part = slice(start, start + tile)
            new, i = (queries[part] @ rows).topk(min(k, len(labels)))  # (tile, D) (D, m) -> (tile, m) -> (tile, k)
            best[part], j = torch.cat([best[part], new], 1).topk(k)
            best_labels[part] = torch.cat([best_labels[part], labels[i]], 1).gather(1, j)  # (tile, 2k) -> (tile, k)
    return best, best_labels


def joined(chunks, rows=4096):
    """The same rows and labels in chunks of `rows` or a little more: topk is several times faster on long rows."""
    held = []
    for chunk in chunks:
        held.append(chunk)
        if sum(len(labels) for _, labels in held) >= rows:
            yield [torch.cat(parts) for parts in zip(*held)]
            held = []
    if held:
        yield [torch.cat(parts) for parts in zip(*held)]


def nearest_of_all(queries, chunks, k):
    """nearest() for queries that all processes hold, among all processes' chunks."""
    similarity, labels = gather(*nearest(queries, joined(chunks), k), dim=1)
    similarity, i = similarity.topk(k)
    return similarity, labels.gather(1, i)


def vote(similarity, labels, num_classes, temperature=None):
    """Each query's class (n,) by its neighbours (n, k): by majority, or each weighted by exp(similarity / temperature)."""
    weight = torch.ones_like(similarity) if temperature is None else torch.exp((similarity - 1) / temperature)
    votes = weight.new_zeros(len(labels), num_classes).scatter_add_(1, labels.clamp(min=0), weight * (labels >= 0))
    return votes.argmax(1)


def knn(backbone, train, val, size, device, bf16=False, workers=0, ks=(20, 200), temperature=0.07):
    """Accuracy in % of k-NN classifiers on frozen features -> {"20-NN": ..., "20-NN weighted": ..., ...}."""
    backbone.eval()
    queries, targets = all_features(backbone, val, size, device, bf16, workers)
    shares = features(backbone, train, size, device, bf16, workers)
    similarity, labels = nearest_of_all(queries, (labelled(y, label) for y, label, _ in shares), max(ks))
    result = {}
    for k in ks:
        for name, t in ((f"{k}-NN", None), (f"{k}-NN weighted", temperature)):
            right = vote(similarity[:, :k], labels[:, :k], len(train.classes), t) == targets
            result[name] = 100 * right.double().mean().item()
    return result


def knn_report(args, backbone, path, device):
    """k-NN accuracy of `backbone` beside that of its random initialisation; silent where the data has no labels."""
    train, val = (common.open_data(args.data, split, args.size) for split in ("train", "val"))
    if val is None or not val.classes or train.classes != val.classes:
        return
    torch.manual_seed(args.seed)
    fresh = common.build_backbone(args.arch, args.size).to(device)
    both = {str(path.parent): backbone, "random initialisation": fresh}
    rows = {name: knn(b, train, val, args.size, device, args.bf16, args.workers) for name, b in both.items()}
    report(f"k-NN on {args.data}, %", rows, path)


# --- Training heads ------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """One head for each learning rate of a sweep: one pass of the backbone, frozen or not, feeds them all.

    read(backbone, images) -> the features that the heads see, in float32.
    """

    def __init__(self, backbone, read, heads, finetune=False, bf16=False):
        super().__init__()
        self.backbone, self.heads = backbone.train(finetune).requires_grad_(finetune), nn.ModuleList(heads)
        self.read, self.bf16 = read, bf16

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            y = self.read(self.backbone, x)
        y = y.float()
        return [head(y) for head in self.heads]


def cross_entropy(logits, target):
    """The mean over all processes' samples or pixels but void ones (-1); maps of logits are upsampled to the target's size.

    logits (B, C) for target (B,), or (B, C, H, W) for (B, H0, W0). DDP averages gradients, hence the factor of G.
    """
    if logits.ndim == 4:
        logits = F.interpolate(logits, target.shape[1:], mode="bilinear")  # (B, C, H0, W0)
    known = all_sum((target >= 0).sum()).clamp(min=1)
    return training.rank_and_world()[1] * F.cross_entropy(logits, target, ignore_index=-1, reduction="sum") / known


def fit(model, batches, total, lrs, backbone_lr, optimizer, schedule, device):
    """Trains each head of a Heads at its own rate, and the backbone at backbone_lr (None: frozen).

    batches: `total` pairs of input and target; schedule(progress in [0, 1]) -> the factor of all learning rates.
    """
    model, ddp = training.distribute(model, device)
    groups = [dict(params=list(head.parameters()), lr=lr) for head, lr in zip(model.heads, lrs)]
    if backbone_lr is not None:
        groups.append(dict(params=list(model.backbone.parameters()), lr=backbone_lr))
    optimizer = optimizer(groups)
    for step, (x, target) in enumerate(batches):
        for group, peak in zip(optimizer.param_groups, [*lrs, backbone_lr]):
            group["lr"] = peak * schedule(step / total)
        losses = torch.stack([cross_entropy(logits, target) for logits in ddp(x)])  # heads share no parameter
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        if (step + 1) % max(1, total // 10) == 0:
            rank, world = training.rank_and_world()
            losses = all_sum(losses.detach()) / world
            if rank == 0:
                print(f"step {step + 1}/{total}  loss", *(f"{loss:.3f}" for loss in losses.tolist()), flush=True)
    if dist.is_initialized():  # on the CPU each process has its own running statistics: one model for all
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    model.eval()


def shuffled(n, total, args):
    """This process's share of batches 0..total, as lists of (epoch, row of n)."""
    rank, world = training.rank_and_world()
    if args.batch_size % world or args.batch_size > n:
        raise common.UserError(f"--batch-size {args.batch_size} must be divisible by the {world} processes and at most the "
                               f"{n} training images of {args.data}")
    return common.Batches(n, args.batch_size, 0, total, 0, rank, world)


def sweep_table(lrs, column, values):
    rows = {f"lr {lr:g}": {column: value} for lr, value in zip(lrs, values)}
    return rows | {"best": {column: max(values)}} if len(lrs) > 1 else rows


# --- linear --------------------------------------------------------------------------------------------------------


def train_view(rng, height, width, size):
    """VICReg B.3: a random crop of 0.2 to 1 of the area, flipped half of the time."""
    return [(vicreg.random_box(rng, height, width, (0.2, 1.0)), rng.random() < 0.5, size)]


def few_labels(data, share):
    """Indices of the same share of each class, at least one image of each."""
    labels, rng = np.array([data.label(i) for i in range(len(data))]), np.random.default_rng(0)
    members = [rng.permutation(np.flatnonzero(labels == c)) for c in range(len(data.classes))]
    return np.concatenate([m[:max(1, round(share * len(m)))] for m in members])


def linear_heads(width, num_classes, count):
    torch.manual_seed(0)
    heads = [nn.Linear(width, num_classes) for _ in range(count)]
    for head in heads:
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    return heads


def fit_linear(model, batches, total, lrs, backbone_lr, decay, args, device):
    """fit() as linear classifiers are trained. Rates are for a batch of 256 and scale with --batch-size."""
    scale = args.batch_size / 256
    fit(model, batches, total, [lr * scale for lr in lrs], backbone_lr and backbone_lr * scale,
        functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=decay),
        lambda progress: training.cosine_schedule(progress, 1, 0, 1, 0), device)


def linear_on_kept(y, labels, queries, targets, num_classes, args, device, epochs=100):
    """Top-1 accuracy in % on queries (m, D) of linear classifiers fitted to y (n, D), one for each of args.lr."""
    total = (args.epochs or epochs) * (len(y) // args.batch_size)
    rows = ([i for _, i in batch] for batch in shuffled(len(y), total, args))
    model = Heads(nn.Identity(), lambda _, y: y, linear_heads(y.shape[1], num_classes, len(args.lr)))
    fit_linear(model, ((y[i], labels[i]) for i in rows), total, args.lr, None, 1e-6, args, device)
    return [100 * (head(queries).argmax(1) == targets).double().mean().item() for head in model.heads]


def linear(backbone, train, val, args, device):
    """Top-1 accuracy in % of linear classifiers on representations, one for each rate. VICReg B.3, VICRegL D.1.

    Semi-supervised with args.finetune and args.labels (0.01 or 0.1): the backbone is trained too. VICReg B.3.
    Without args.augment, the features of the training images' centres are computed once and kept.
    """
    if not args.augment:
        parts = [all_features(backbone.eval(), data, args.size, device, args.bf16, args.workers) for data in (train, val)]
        accuracy = linear_on_kept(*labelled(*parts[0]), *parts[1], len(train.classes), args, device)
        return sweep_table(args.lr, "top-1", accuracy)
    lrs, backbone_lr, decay, epochs = args.lr, None, 1e-6, 100
    chosen = np.flatnonzero([train.label(i) >= 0 for i in range(len(train))])
    if args.finetune:
        backbone_lr, lr = {0.01: (0.03, 0.08), 0.1: (0.01, 0.1)}[args.labels]
        lrs, decay, epochs, chosen = [lr], 0.0, 20, few_labels(train, args.labels)
    total = (args.epochs or epochs) * (len(chosen) // args.batch_size)
    order = ([(epoch, int(chosen[i])) for epoch, i in batch] for batch in shuffled(len(chosen), total, args))
    views = common.Views(train, functools.partial(train_view, size=args.size), seed=0)
    loader = torch.utils.data.DataLoader(views, batch_sampler=order, num_workers=args.workers)
    batches = ((to_input(batch.views[0], device), batch.labels.to(device)) for batch in loader)
    heads = linear_heads(backbone.dim, len(train.classes), len(lrs))
    model = Heads(backbone, pooled, heads, args.finetune, args.bf16)
    fit_linear(model, batches, total, lrs, backbone_lr, decay, args, device)
    right = torch.zeros(len(lrs) + 1, dtype=torch.float64, device=device)  # each head's hits, and the number of images
    for y, target, _ in features(backbone.eval(), val, args.size, device, args.bf16, args.workers):
        hits = [(head(y).argmax(1) == target).sum() for head in model.heads]
        right += torch.stack([*hits, torch.tensor(len(y), device=device)])
    all_sum(right)
    return sweep_table(lrs, "top-1", (100 * right[:-1] / right[-1]).tolist())


# --- fewshot -------------------------------------------------------------------------------------------------------


def logistic_regression(x, y, queries, steps=500):
    """Logits (E, m, C) of queries (E, m, D) under E multinomial logistic regressions, each fitted to its own rows.

    x (E, n, D) of unit length, y (n, C) one-hot. Minimises the summed cross-entropy + ||W||^2 / 2, with a free bias, by
    gradient descent on W = x^T a: with unit rows the loss's curvature is below 1 + n, which sets the step.
    """
    kernel, rate = x @ x.mT, 1 / (1 + x.shape[1])  # (E, n, D) (E, D, n) -> (E, n, n)
    a, bias = x.new_zeros(len(x), *y.shape), x.new_zeros(len(x), 1, y.shape[1])
    for _ in range(steps):
        error = (kernel @ a + bias).softmax(2) - y  # (E, n, C)
        a, bias = a - rate * (error + a), bias - rate * error.sum(1, keepdim=True)
    return queries @ (x.mT @ a) + bias  # (E, m, D) (E, D, C) -> (E, m, C)


def fewshot(backbone, data, args, device, ways=5, shots=5, queries=15, episodes=600):
    """Mean accuracy in % over episodes of `ways` classes, and the half width of its 95% interval. LC-loss, Table 7."""
    y, labels = all_features(backbone.eval(), data, args.size, device, args.bf16, args.workers)
    y, labels, generator = F.normalize(y, dim=1), labels.cpu(), torch.Generator().manual_seed(0)
    members = [(labels == c).nonzero().flatten() for c in range(len(data.classes))]
    members = [m for m in members if len(m) >= shots + queries]
    if len(members) < ways:
        raise common.UserError(f"few-shot episodes need {ways} classes of {shots + queries} images or more: {args.data} has "
                               f"{len(members)}")

    def draw(n, count):
        return torch.randperm(n, generator=generator)[:count].tolist()

    rows = torch.stack([torch.stack([members[c][draw(len(members[c]), shots + queries)] for c in draw(len(members), ways)])
                        for _ in range(episodes)]).to(device)  # (episodes, ways, shots + queries)
    truth, accuracy = torch.arange(ways, device=device), []
    for part in rows.split(100):
        support, query = y[part[:, :, :shots].flatten(1)], y[part[:, :, shots:].flatten(1)]  # (E, ways * shots, D), ...
        logits = logistic_regression(support, F.one_hot(truth.repeat_interleave(shots)).float(), query)
        accuracy.append((logits.argmax(2) == truth.repeat_interleave(queries)).double().mean(1))
    accuracy = 100 * torch.cat(accuracy)
    return {args.checkpoint: {"accuracy": accuracy.mean().item(), "95% +-": 1.96 * accuracy.std().item() / episodes ** 0.5}}


# --- Images with masks ---------------------------------------------------------------------------------------------


class MaskedShapes(shapes.Shapes):
    num_classes = 1 + len(shapes.Shapes.classes)  # with the ground

    def pair(self, index):
        return tuple(Image.fromarray(array) for array in self.scene(index))


class Masked:
    """Images in files with their masks, 8-bit PNGs of class ids: pair(i) -> the RGB image and the mask, both PIL.

    shift is subtracted from the ids, modulo 256. All files are looked at once, before anything is computed: raises
    UserError, naming the file, where an image has no mask or one of another size, or an id is beyond num_classes
    (None: as many as there are).
    """

    def __init__(self, images, masks, num_classes=None, shift=0):
        self.images, self.masks, self.shift = images, common.Images(masks), shift
        with concurrent.futures.ThreadPoolExecutor() as pool:
            largest = list(pool.map(self.check, range(len(self))))
        self.num_classes = num_classes or max(largest) + 1
        if max(largest) >= self.num_classes:
            worst = self.masks.name(np.argmax(largest))
            raise common.UserError(f"{worst} holds the class id {max(largest)}, but there are {self.num_classes} classes")

    def __len__(self):
        return len(self.images)

    def check(self, index):
        """The largest id of a mask but void."""
        name, mask = self.images.name(index), self.masks.name(index)
        if not os.path.isfile(mask):
            raise common.UserError(f"{name} has no mask: looked for {mask}")
        try:
            with Image.open(name) as image:
                size = image.size[::-1] if image.getexif().get(0x0112, 1) > 4 else image.size  # lying on its side
            with Image.open(mask) as opened:
                mode, ids = opened.mode, np.array(opened)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on broken files
            raise common.UserError(f"cannot read {name} or its mask {mask} ({error})") from error
        if mode not in ("L", "P"):
            raise common.UserError(f"{mask} is no 8-bit image of class ids: its mode is {mode}")
        if ids.shape != size[::-1]:
            raise common.UserError(f"{mask} has {ids.shape[1]} x {ids.shape[0]} pixels, its image {size[0]} x {size[1]}")
        ids = ids - np.uint8(self.shift)
        return int(ids.max(initial=0, where=ids != 255))

    def pair(self, index):
        try:
            with Image.open(self.masks.name(index)) as mask:
                return self.images.load(index), Image.fromarray(np.array(mask) - np.uint8(self.shift))
        except OSError as error:
            raise common.UserError(f"cannot read {self.images.name(index)} or its mask ({error})") from error


def open_masks(name, size):
    """The training and validation parts of a data set with masks (see this file's header). Raises as Masked does."""
    if name == "shapes":
        return [MaskedShapes(split, 3 * size // 2) for split in ("train", "val")]
    data = Path(os.environ.get("DATA", "data"))
    if name == "voc":
        parts = [common.open_data("voc", split) for split in ("train", "val")]
        names = [[part.name(i).replace("JPEGImages", "SegmentationClass") for i in range(len(part))] for part in parts]
        return [Masked(part, [Path(n).with_suffix(".png") for n in name], 21) for part, name in zip(parts, names)]
    root = Path(name) if Path(name).is_dir() else data / name
    ade = (root / "annotations").is_dir()
    if ade:  # its own layout
        folders = [[root / kind / split for kind in ("images", "annotations")] for split in ("training", "validation")]
    else:
        folders = [[root / split / kind for kind in ("images", "masks")] for split in ("train", "val")]
    parts, num_classes = [], 150 if ade else None
    for folder, masks in folders:
        images = common.find_images(folder)
        if not len(images):
            raise common.UserError(f"no images in {folder}: give shapes, voc, ADE20K's folder, or one with train/images, "
                                   "train/masks, val/images and val/masks")
        paths = [masks / Path(images.name(i)).relative_to(folder).with_suffix(".png") for i in range(len(images))]
        parts.append(Masked(images, paths, num_classes, shift=int(ade)))
        num_classes = parts[0].num_classes
    return parts


def targets(mask):
    """A mask as int64, where void is -1."""
    mask = torch.from_numpy(np.array(mask)).long()
    return mask.masked_fill(mask == 255, -1)


class Crops(torch.utils.data.Dataset):
    """Item (epoch, index) -> a random square of an image (3, size, size), uint8, and of its mask (size, size)."""

    def __init__(self, data, size):
        self.data, self.size = data, size

    def __getitem__(self, key):
        rng, (image, mask) = random.Random(f"{key}"), self.data.pair(key[1])
        side = round(min(image.size) / rng.uniform(1, 2))
        left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
        flip, box = rng.random() < 0.5, (left, top, left + side, top + side)
        mask = targets(mask.resize((self.size, self.size), Image.NEAREST, box=box))
        return common.cut(image, (top, left, side, side), flip, self.size), mask.flip(1) if flip else mask


class Whole(torch.utils.data.Dataset):
    """Item index -> an image (3, h, w), uint8, h and w multiples of `stride`, and its mask (H0, W0) as it is.

    The short side is scaled to `size`; None: images keep their own size, rounded down.
    """

    def __init__(self, data, size, stride):
        self.data, self.size, self.stride = data, size, stride

    def __getitem__(self, index):
        image, mask = self.data.pair(index)
        scale = self.size / min(image.size) if self.size else 1
        w, h = (max(1, round(scale * side) // self.stride) * self.stride for side in image.size)
        return torch.from_numpy(np.array(image.resize((w, h), Image.BICUBIC))).permute(2, 0, 1), targets(mask)


def whole_images(data, indices, size, stride, args, device):
    """Yields a backbone's inputs (1, 3, h, w) and masks (H0, W0)."""
    for image, mask in torch.utils.data.DataLoader(Whole(data, size, stride), batch_size=None, sampler=indices,
                                                   num_workers=args.workers):
        yield to_input(image[None], device), mask.to(device)


def confusion(predicted, mask, num_classes):
    """Counts of pixels (true class, predicted class), void (-1) left out."""
    pairs = (mask * num_classes + predicted)[mask >= 0]
    return torch.bincount(pairs, minlength=num_classes ** 2).view(num_classes, num_classes)


def mean_iou(counts):
    """Mean over the classes that occur in the masks, of intersection over union in %; counts: all images' confusion."""
    counts = counts.double()
    union = counts.sum(0) + counts.sum(1) - counts.diag()
    present = counts.sum(1) > 0
    if not present.any():
        raise common.UserError("the validation masks hold nothing but void")
    return 100 * (counts.diag() / union)[present].mean().item()


# --- segment -------------------------------------------------------------------------------------------------------


def local_features(backbone, x, layers=1):
    """The last `layers` stages (B, D_i, H_i, W_i), upsampled to the finest and concatenated: (B, D, H, W). VICRegL D.2."""
    maps = backbone.stages(x)[-layers:]
    finest = maps[0].shape[2:]
    return torch.cat([F.interpolate(m, finest, mode="bilinear") if m.shape[2:] != finest else m for m in maps], 1)


def dilate(backbone):
    """A ResNet of stride 16, not 32: its last stage is dilated, not strided. VICRegL D.2: 32 x 32 features of 512 x 512.

    At every other location its features are those of before: only what follows the stride is dilated.
    """
    for conv in backbone.layer4.modules():
        if isinstance(conv, nn.Conv2d):
            if conv.kernel_size == (3, 3) and conv.stride == (1, 1):
                conv.dilation = conv.padding = 2, 2
            conv.stride = 1, 1
    backbone.stride = 16


def fcn(width, num_classes):
    """The FCN head of VICRegL, Table 8."""
    layers, hidden = [], width // 4
    for i in (width, hidden):
        layers += [nn.Conv2d(i, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout2d(0.1), nn.Conv2d(hidden, num_classes, 1))


def segment(backbone, train, val, args, device):
    """mIoU in % of a head on local features, for each learning rate. VICRegL D.2, Table 8; CrIBo A.2.

    The logits of each location are upsampled bilinearly to the mask, in training and in evaluation, where that is the
    mask of the whole image in its own size. With args.finetune every rate trains a copy of the backbone of its own.
    """
    if args.size % backbone.stride:
        raise common.UserError(f"--size {args.size} must be a multiple of {backbone.stride}, the stride of the backbone")
    if isinstance(backbone, common.ResNet) and backbone.stride == 32:
        dilate(backbone)
    if isinstance(backbone, common.ConvNeXt | common.ViT):
        optimizer = functools.partial(torch.optim.AdamW, weight_decay=0.01)
        lrs = [1e-4, 8e-5, 3e-5, 1e-5, 8e-6, 3e-6, 1e-6] if args.finetune else [1e-3, 8e-4, 3e-4, 1e-4, 8e-5]
    else:
        optimizer, lrs = functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4), [0.1, 0.05, 0.03, 0.02, 0.01]
    lrs, num_classes, (rank, world) = args.lr or lrs, train.num_classes, training.rank_and_world()
    read = functools.partial(local_features, layers=args.layers)
    with torch.no_grad():
        width = read(backbone.eval(), torch.zeros(1, 3, args.size, args.size, device=device)).shape[1]
    result = []
    for group in [[lr] for lr in lrs] if args.finetune else [lrs]:
        torch.manual_seed(0)
        heads = [fcn(width, num_classes) if args.head == "fcn" else nn.Conv2d(width, num_classes, 1) for _ in group]
        model = Heads(copy.deepcopy(backbone), read, heads, args.finetune, args.bf16)
        loader = torch.utils.data.DataLoader(Crops(train, args.size), num_workers=args.workers,
                                             batch_sampler=shuffled(len(train), args.steps, args))
        batches = ((to_input(x, device), mask.to(device)) for x, mask in loader)
        fit(model, batches, args.steps, group, group[0] if args.finetune else None, optimizer,
            lambda progress: (1 - progress) ** 0.9, device)
        counts = torch.zeros(len(group), num_classes, num_classes, dtype=torch.int64, device=device)
        with torch.no_grad():
            for x, mask in whole_images(val, range(rank, len(val), world), args.size, backbone.stride, args, device):
                for count, logits in zip(counts, model(x)):
                    logits = F.interpolate(logits, mask.shape, mode="bilinear")  # (1, C, H, W) -> (1, C, H0, W0)
                    count += confusion(logits[0].argmax(0), mask, num_classes)
        result += [mean_iou(count) for count in all_sum(counts)]
    return sweep_table(lrs, "mIoU", result)


# --- retrieve ------------------------------------------------------------------------------------------------------


def cells(mask, h, w):
    """For each pixel of a mask (H0, W0), the number of the cell of an h x w grid in which it lies."""
    y, x = (torch.arange(n, device=mask.device) * m // n for n, m in zip(mask.shape, (h, w)))
    return y[:, None] * w + x


def majority(mask, h, w, num_classes):
    """The most frequent class in each cell of a mask, void aside, or -1 where there is nothing else: (h * w,)."""
    pairs = (cells(mask, h, w) * num_classes + mask)[mask >= 0]
    votes = torch.bincount(pairs, minlength=h * w * num_classes).view(h * w, num_classes)
    return votes.argmax(1).where(votes.sum(1) > 0, -1)


@torch.no_grad()
def patches(backbone, data, indices, args, device):
    """Yields for each image its local features (N, D), their grid (h, w) and its mask (H0, W0)."""
    for x, mask in whole_images(data, indices, None, backbone.stride, args, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            maps = backbone.stages(x)[-1].float()
        yield maps[0].flatten(1).T, maps.shape[2:], mask  # (1, D, h, w) -> (h w, D)


def retrieve(backbone, train, val, args, device, k=50, runs=5):
    """mIoU in % of k-NN classification of all patches of the validation images. CrIBo, Section 4.1.

    The memory holds every patch of the training images, each sub-sampled set of them drawn `runs` times, with the class
    that most of its pixels have (a patch of nothing but void is left out). Images keep their size, rounded down to a
    multiple of the stride. A validation patch gets the class of most of its k nearest patches by cosine. "mIoU" is that of
    the pixels of the masks in their own size, where all pixels of a patch are predicted to be of its class; "patch mIoU"
    that of the patches against their own majority labels.

    Exact. Training patches are recomputed and never kept, validation patches are held for args.chunk images at a time.
    """
    backbone.eval()
    (rank, world), num_classes = training.rank_and_world(), train.num_classes
    trials = [(factor, run) for factor in args.subsample for run in range(runs if factor > 1 else 1)]
    counts = torch.zeros(len(trials), 2, num_classes, num_classes, dtype=torch.int64, device=device)
    for start in range(0, len(val), args.chunk):
        mine = range(start + rank, min(start + args.chunk, len(val)), world)
        held = list(patches(backbone, val, mine, args, device))
        own = torch.cat([torch.empty(0, backbone.dim, device=device), *(maps for maps, _, _ in held)])
        queries, owner = gather(own, torch.full((len(own),), rank, device=device))
        for (factor, run), count in zip(trials, counts):
            chosen = np.random.default_rng((factor, run)).permutation(len(train))[:math.ceil(len(train) / factor)]
            memory = ((maps[label >= 0], label[label >= 0])
                      for maps, grid, mask in patches(backbone, train, chosen[rank::world].tolist(), args, device)
                      for label in [majority(mask, *grid, num_classes)])
            predicted = vote(*nearest_of_all(queries, memory, k), num_classes)[owner == rank]
            for part, (_, grid, mask) in zip(predicted.split([len(maps) for maps, _, _ in held]), held):
                count[0] += confusion(part[cells(mask, *grid)], mask, num_classes)  # (h w,) -> (H0, W0)
                count[1] += confusion(part, majority(mask, *grid, num_classes), num_classes)
    score, rows = [[mean_iou(c) for c in count] for count in all_sum(counts)], {}
    for factor in args.subsample:
        values = np.array([value for value, (f, _) in zip(score, trials) if f == factor])  # (runs, 2)
        (pixels, patch), (std, _) = values.mean(0).tolist(), values.std(0).tolist()
        rows[f"1/{factor} of the images"] = {"mIoU": pixels, "std over runs": std, "patch mIoU": patch}
    return rows


# --- correspond ----------------------------------------------------------------------------------------------------


def four_views(rng, height, width, size):
    """The centre of an image, the same mirrored, and two random crops as VICRegL draws them."""
    (box, _, _), = center_view(rng, height, width, size)
    return [(box, False, size), (box, True, size), *vicreg.sample_views(rng, height, width, (0.08, 1.0), size)]


@torch.no_grad()
def correspond(backbone, data, args, device, num_matches=20, batch_size=64):
    """Two shares in % of right correspondences, and that of random ones -> {"flip", "location = feature", "chance"}.

    flip: an image against itself mirrored, blurred, jittered and made gray; each location's match is the arg max of
    cosine similarity, right at the mirrored location (LC-loss, 4.6).
    location = feature: two random crops; of one crop's locations inside the other, the num_matches best matches by
    feature distance, right where they are the matches by location too (VICRegL, Eqs. 2 and 3).
    """
    backbone.eval()
    rank, world = training.rank_and_world()
    views = common.Views(data, functools.partial(four_views, size=args.size), seed=0)
    chunks = [[(0, i) for i in range(start, min(start + batch_size, len(data)))]
              for start in range(0, len(data), batch_size)][rank::world]  # whole batches, for the same colours on any G
    colour = common.Photometric(jitter=(0.4, 0.4, 0.2, 0.1), blur_p=0.5)
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for chunk, batch in zip(chunks, torch.utils.data.DataLoader(views, batch_sampler=chunks, num_workers=args.workers)):
        inputs = [to_input(v, device) for v in batch.views]
        inputs[1] = colour(batch.views[1].to(device), torch.Generator().manual_seed(chunk[0][1]))
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            maps = [backbone.stages(x)[-1].float()[batch.broken.to(device) < 0] for x in inputs]  # (B, D, h, w)
        boxes, flips = (t[batch.broken < 0].to(device) for t in (batch.boxes, batch.flips))
        h, w = maps[0].shape[2:]
        images, locations = torch.tensor([len(boxes), len(boxes) * h * w], device=device)
        plain, mirrored, a, b = (m.flatten(2).mT for m in maps)  # (B, N, D)
        similarity = F.normalize(plain, dim=2) @ F.normalize(mirrored, dim=2).mT  # (B, N, D) (B, D, N) -> (B, N, N)
        right = similarity.argmax(2) == torch.arange(h * w, device=device).view(h, w).flip(1).flatten()
        pos_a, pos_b = (vicregl.positions(boxes[:, v], flips[:, v], h).flatten(1, 2) for v in (2, 3))  # (B, N, 2)
        low, high = boxes[:, None, 3, :2], boxes[:, None, 3, :2] + boxes[:, None, 3, 2:]  # (B, 1, 2)
        inside = ((pos_a >= low) & (pos_a <= high)).all(2)  # (B, N)
        by_location = torch.cdist(pos_a, pos_b, compute_mode="donot_use_mm_for_euclid_dist").argmin(2)
        distance, by_feature = torch.cdist(a, b).min(2)
        kept = distance.where(inside, torch.inf).argsort(1)[:, :num_matches]  # (B, N) -> (B, n)
        kept = torch.zeros_like(inside).scatter_(1, kept, True) & inside
        agree = (by_location == by_feature) & kept
        sums += torch.stack([right.sum(), locations, agree.sum(), kept.sum(), images])
    right, locations, agree, kept, images = all_sum(sums).tolist()
    return {args.checkpoint: {"flip": 100 * right / locations, "location = feature": 100 * agree / max(kept, 1),
                              "chance": 100 * images / locations}}


# --- bag -----------------------------------------------------------------------------------------------------------


def load_projector(checkpoint, name="projector"):
    """A projector in a run's last.pt or in a release of VICReg or VICRegL, in eval mode; None where there is none.

    Raises UserError for one that is built differently.
    """
    state = {} if checkpoint == "random" else common.read_checkpoint(checkpoint).get("model", {})
    state = {key.removeprefix("module."): value for key, value in state.items()}
    state = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    if not state:
        return None
    matrices = [value for value in state.values() if value.ndim == 2]
    norm = nn.BatchNorm1d if any(key.endswith("running_mean") for key in state) else nn.LayerNorm
    try:
        projector = vicregl.mlp(matrices[0].shape[1], *(len(matrix) for matrix in matrices), norm=norm)
        projector.load_state_dict(state)
    except (IndexError, RuntimeError):
        raise common.UserError(f"{checkpoint}: its {name} is not of linear layers with normalisation between them and no "
                               "bias in the last; evaluate the backbone alone: backbone.pt") from None
    return projector.eval()


def bag(backbone, train, val, args, device):
    """20-NN and linear accuracy in % on bags of patches, before and after the projector. BagSSL.

    First, for comparison, that on the whole image's representation and on its local aggregation (BagSSL, Appendix C.4).
    args.bags: numbers of patches; args.patch_scale: a patch's share of the area; its input has args.size pixels.
    """
    projector = load_projector(args.checkpoint)
    projector = projector and projector.to(device)
    spaces = ["", ", after the projector"][:1 + bool(projector)]

    def whole(backbone, x):
        maps, y = backbone(x)
        return torch.cat([y, bagssl.local_aggregation(maps)], 1)

    def embed(x):
        y = pooled(backbone, x)
        return torch.cat([y, projector(y)], 1) if projector else y

    def accuracies(names, widths, size, **how):
        """A row for each name, on so many columns of the features that `how` describes."""
        parts = [all_features(backbone.eval(), data, size, device, args.bf16, args.workers, **how) for data in (train, val)]
        y, labels = labelled(*parts[0])
        (queries, targets), (rank, world) = parts[1], training.rank_and_world()
        for name, rows, q in zip(names, y.split(widths, 1), queries.split(widths, 1)):
            neighbours = nearest_of_all(q, zip(rows[rank::world].split(4096), labels[rank::world].split(4096)), 20)
            found = 100 * (vote(*neighbours, len(train.classes)) == targets).double().mean().item()
            probes = linear_on_kept(rows, labels, q, targets, len(train.classes), args, device)
            table[name] = {"20-NN": found, "linear": max(probes)}

    table = {}
    with torch.no_grad():
        aggregated = whole(backbone.eval(), torch.zeros(1, 3, args.size, args.size, device=device)).shape[1] - backbone.dim
    accuracies(["whole image", "local aggregation"], [backbone.dim, aggregated], args.size, read=whole, view=whole_view)
    widths = [backbone.dim, *([projector[-1].out_features] if projector else [])]
    for count in args.bags:
        read = functools.partial(lambda _, x, count: bagssl.image_embedding(embed, x, args.size, count), count=count)
        names = [f"bag of {count}{space}" for space in spaces]
        accuracies(names, widths, bagssl.image_side(args.size, args.patch_scale), read=read, view=whole_view)
    return table


# --- Command line --------------------------------------------------------------------------------------------------


def report(title, rows, path):
    """Prints {row: {column: number}} as a table and adds it to the JSON in `path`, both on the first process only."""
    if training.rank_and_world()[0]:
        return
    columns = list(next(iter(rows.values())))
    print("  ".join([f"{title:24}", *columns]))
    for name, row in rows.items():
        print("  ".join([f"{name:{max(24, len(title))}}", *(f"{row[c]:{len(c)}.1f}" for c in columns)]), flush=True)
    tables = json.loads(path.read_text()) if path.exists() else {}
    training.write(path, lambda file: file.write(json.dumps(tables | {title: rows}, indent=1).encode()))


def load(args):
    """The checkpoint's backbone, and where its results go; what is not given of --data, --size, --bf16 is as in its run."""
    path, run = Path(args.checkpoint), {}
    if args.checkpoint != "random":
        flags = common.read_checkpoint(path).get("args")
        run = flags if isinstance(flags, dict) else {}
    args.data = args.data or run.get("data", "shapes")
    dense = args.protocol == "segment" and args.data != "shapes"
    if args.protocol == "bag" and args.patch_scale is None:  # that of the run, if it has one and no range
        scale = str(run.get("patch_scale", 0.2))
        args.patch_scale = 0.2 if "-" in scale else float(scale)
    args.size = args.size or (512 if dense else run.get("size", 224))  # 512: VICRegL D.2, CrIBo A.2
    args.bf16 = run.get("bf16", training.has_bf16()) if args.bf16 is None else args.bf16
    if args.checkpoint == "random":
        torch.manual_seed(0)
        return common.build_backbone(args.arch, args.size), Path(f"{args.protocol}.json")
    folder = path if path.is_dir() else path.parent
    return weights.load_backbone(path, args.arch), folder / f"{args.protocol}.json"


def open_parts(args):
    """What a protocol takes beside the backbone: [train, val], or the one part that it looks at."""
    if args.protocol in ("segment", "retrieve"):
        return open_masks(args.data, args.size)
    train, val = (common.open_data(args.data, split, args.size) for split in ("train", "val"))
    if args.protocol in ("fewshot", "correspond"):
        return [val or train]
    if val is None or not val.classes or train.classes != val.classes:
        raise common.UserError(f"{args.protocol} needs labels: {args.data} must hold train/CLASS/ and val/CLASS/ (or "
                               "test/CLASS/) with the same classes")
    return [train, val]


def knn_table(backbone, train, val, args, device):
    return {args.checkpoint: knn(backbone, train, val, args.size, device, args.bf16, args.workers)}


def parse_args():
    shared = argparse.ArgumentParser(add_help=False)
    flag = shared.add_argument
    flag("--checkpoint", required=True, help="a run folder, a file of weights, or 'random'")
    flag("--data", help="default: that of the run")
    flag("--arch", help="known from a run folder")
    flag("--size", type=int, help="pixels; default: that of the run; segment: 512")
    flag("--workers", type=int, default=2)
    flag("--bf16", action=argparse.BooleanOptionalAction, default=None)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="protocol", required=True)

    def command(run, name=None):
        added = commands.add_parser(name or run.__name__, parents=[shared])
        added.set_defaults(run=run)
        return added.add_argument

    command(knn_table, "knn")
    command(fewshot)
    command(correspond)
    flag = command(linear)
    flag("--lr", type=float, nargs="+", default=[30, 10, 1, 0.3, 0.1, 0.03, 0.02, 0.01], help="all are trained at once")
    flag("--epochs", type=int, help="default: 100, fine-tuned 20")
    flag("--batch-size", type=int, default=256, help="over all processes")
    flag("--augment", action=argparse.BooleanOptionalAction, default=True, help="without: cached features of central crops")
    flag("--finetune", action="store_true")
    flag("--labels", type=float, choices=[0.01, 0.1], help="share of the labels, with --finetune")
    flag = command(segment)
    flag("--lr", type=float, nargs="+", help="all are trained at once, or one after the other with --finetune")
    flag("--steps", type=int, default=40_000, help="VICRegL: 40,000 on VOC, 160,000 on ADE20K; CrIBo: 80,000 and 160,000")
    flag("--batch-size", type=int, default=16, help="over all processes")
    flag("--layers", type=int, choices=[1, 4], default=1)
    flag("--head", choices=["linear", "fcn"], default="linear")
    flag("--finetune", action="store_true")
    flag = command(retrieve)
    flag("--subsample", type=int, nargs="+", default=[1, 8, 64, 128], help="one of so many training images is used")
    flag("--chunk", type=int, default=1000, help="validation images held in memory at a time")
    flag = command(bag)
    flag("--bags", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="numbers of patches, squares")
    flag("--patch-scale", type=float, help="a patch's share of the area; default: that of the run, or 0.2")
    flag("--lr", type=float, nargs="+", default=[30, 10, 1, 0.3, 0.1, 0.03, 0.02, 0.01], help="all are trained at once")
    flag("--epochs", type=int, help="of linear classifiers; default: 100")
    flag("--batch-size", type=int, default=256)
    args = parser.parse_args()
    if args.protocol == "bag" and not all(n > 0 and math.isqrt(n) ** 2 == n for n in args.bags):
        raise common.UserError(f"--bags {' '.join(map(str, args.bags))}: patches are a grid, so their numbers are squares")
    if args.protocol == "bag" and not 0 < (args.patch_scale or 0.2) <= 1:
        raise common.UserError(f"--patch-scale {args.patch_scale}: give a share of the area, up to 1")
    if args.protocol == "linear" and (args.finetune != bool(args.labels) or args.finetune and not args.augment):
        raise common.UserError("--finetune and --labels go together, and not with --no-augment (VICReg B.3)")
    return args


def main():
    with training.one_line_errors():
        args = parse_args()
        device = training.set_up(seed=0)
        backbone, path = load(args)
        kept = ("arch", "size", "finetune", "labels", "augment", "layers", "head", "steps", "epochs", "batch_size",
                "patch_scale")
        setting = ", ".join(f"{key} {vars(args)[key]}" for key in kept if vars(args).get(key) is not None)
        rows = args.run(backbone.to(device), *open_parts(args), args, device)
        report(f"{args.protocol} of {args.checkpoint} on {args.data}, % ({setting})", rows, path)


if __name__ == "__main__":
    main()
