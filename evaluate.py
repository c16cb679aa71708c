"""The papers' evaluation protocols, for a checkpoint of any method. Runs under torchrun, or on one CPU.

    python evaluate.py knn --checkpoint runs/vicreg-shapes
    torchrun --nproc_per_node=8 evaluate.py knn --checkpoint runs/vicreg-imagenet/backbone.pt --arch resnet50 --data imagenet

    knn    k nearest neighbours by cosine, by majority and weighted: VICReg, Appendix C.1
"""
import argparse
import functools
import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import common


def center_view(rng, height, width, size):
    """The central square: 7/8 of the short side, as is usual on ImageNet, or all of it for images under 100 pixels."""
    side = min(height, width) * (1 if size < 100 else 7 / 8)
    return [(((height - side) / 2, (width - side) / 2, side, side), False, size)]


@torch.no_grad()
def features(backbone, data, size, device, bf16=False, workers=0, batch_size=256):
    """Yields pooled representations (b, D) in float32, labels and indices (b,) of this process's share of `data`."""
    rank, world = common.rank_and_world()
    keys = [(0, i) for i in range(rank, len(data), world)]
    views = common.Views(data, functools.partial(center_view, size=size), seed=0)
    chunks = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
    for chunk, batch in zip(chunks, torch.utils.data.DataLoader(views, batch_sampler=chunks, num_workers=workers)):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            y = backbone(common.normalize(batch.views[0].to(device).float() / 255))[1].float()
        whole = batch.broken < 0  # an unreadable image has no part in a result
        yield y[whole.to(device)], batch.labels[whole].to(device), torch.tensor([i for _, i in chunk])[whole].to(device)


def gather(*tensors, dim=0):
    """Concatenates what the processes hold, in any sizes."""
    if not dist.is_initialized():
        return tensors
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [t.cpu() for t in tensors])
    return tuple(torch.cat(parts, dim).to(t.device) for t, parts in zip(tensors, zip(*everyone)))


def nearest(queries, chunks, k):
    """The k largest cosine similarities of queries (n, D) to rows that come in chunks, and their labels: (n, k) each.

    chunks: an iterable of (rows (m, D), labels (m,)). No more than n x (k + m) similarities exist at a time.
    Where there are fewer than k rows, -inf and -1 fill up.
    """
    queries = F.normalize(queries, dim=1)
    best = queries.new_full((len(queries), k), -torch.inf)
    best_labels = torch.full((len(queries), k), -1, device=queries.device)
    for rows, labels in chunks:
        similarity = torch.cat([best, queries @ F.normalize(rows, dim=1).T], 1)  # (n, D) (D, m) -> (n, k+m)
        best, i = similarity.topk(k)
        best_labels = torch.cat([best_labels, labels.expand(len(queries), -1)], 1).gather(1, i)
    return best, best_labels


def vote(similarity, labels, num_classes, temperature=None):
    """Each query's class (n,) by its neighbours (n, k): by majority, or each weighted by exp(similarity / temperature)."""
    weight = torch.ones_like(similarity) if temperature is None else torch.exp((similarity - 1) / temperature)
    votes = weight.new_zeros(len(labels), num_classes).scatter_add_(1, labels.clamp(min=0), weight * (labels >= 0))
    return votes.argmax(1)


def knn(backbone, train, val, size, device, bf16=False, workers=0, ks=(20, 200), temperature=0.07):
    """Accuracy in % of k-NN classifiers on frozen features -> {"20-NN": ..., "20-NN weighted": ..., ...}."""
    backbone.eval()
    run = functools.partial(features, backbone, size=size, device=device, bf16=bf16, workers=workers)
    queries, targets = gather(*(torch.cat(parts) for parts in list(zip(*run(val)))[:2]))
    labelled = ((y[label >= 0], label[label >= 0]) for y, label, _ in run(train))
    similarity, labels = gather(*nearest(queries, labelled, max(ks)), dim=1)
    similarity, i = similarity.topk(max(ks))  # the processes' best
    labels = labels.gather(1, i)
    result = {}
    for k in ks:
        for name, t in ((f"{k}-NN", None), (f"{k}-NN weighted", temperature)):
            right = vote(similarity[:, :k], labels[:, :k], len(train.classes), t) == targets
            result[name] = 100 * right.double().mean().item()
    return result


def report(title, rows, path):
    """Prints {row: {column: number}} as a table and writes it to `path` as JSON, both on the first process only."""
    if common.rank_and_world()[0]:
        return
    columns = list(next(iter(rows.values())))
    print("  ".join([f"{title:24}", *columns]))
    for name, row in rows.items():
        print("  ".join([f"{name:24}", *(f"{row[c]:{len(c)}.1f}" for c in columns)]), flush=True)
    common.write(path, lambda file: file.write(json.dumps({title: rows}, indent=1).encode()))


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


def load(args):
    """The checkpoint's backbone; --data, --size, --bf16 and --workers come from its run where not given."""
    path = Path(args.checkpoint)
    last = path / "last.pt" if path.is_dir() else path
    state = torch.load(last, map_location="cpu", weights_only=True) if last.is_file() else {}
    for key, value in {"data": "shapes", "size": 224, "bf16": common.has_bf16(), **state.get("args", {})}.items():
        if getattr(args, key, 0) is None:
            setattr(args, key, value)
    if args.checkpoint == "random":
        torch.manual_seed(0)
        return common.build_backbone(args.arch, args.size), Path(f"{args.protocol}.json")
    return common.load_backbone(args.checkpoint, args.arch), last.with_name(f"{args.protocol}.json")


def main():
    with common.one_line_errors():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("protocol", choices=["knn"])
        parser.add_argument("--checkpoint", required=True, help="a run folder, last.pt, backbone.pt, or 'random'")
        parser.add_argument("--data")
        parser.add_argument("--arch", help="known from a run folder")
        parser.add_argument("--size", type=int)
        parser.add_argument("--workers", type=int, default=2)
        parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None)
        args = parser.parse_args()
        device = common.set_up(seed=0)
        backbone, path = load(args)
        train, val = (common.open_data(args.data, split, args.size) for split in ("train", "val"))
        if val is None or not val.classes or train.classes != val.classes:
            raise common.UserError(f"k-NN needs labels: {args.data} must hold train/CLASS/ and val/CLASS/ (or test/CLASS/) "
                                   "with the same classes")
        row = knn(backbone.to(device), train, val, args.size, device, args.bf16, args.workers)
        report(f"k-NN on {args.data}, %", {args.checkpoint: row}, path)


if __name__ == "__main__":
    main()
