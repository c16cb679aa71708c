"""What protocols start from: a checkpoint's backbone, and representations of a data set."""
import sys
import time

import torch
import torch.distributed as dist

import common
import training
import weights

# --- 1. Checkpoints -------------------------------------------------------------------------------

def add_flags(flag):
    """The flags of every command that starts from a checkpoint."""
    flag("--checkpoint", help="a run folder, a file of weights, or random: an untrained network")
    flag("--arch", help="by default what the run or the weights tell; "
         + ", ".join(common.ARCHITECTURES))
    flag("--stem-padding", type=int, default=1, help="2 for solo-learn's ResNets of CIFAR")
    flag("--data", help="as in training; by default that of the run, or shapes")
    flag("--size", type=int, help="side of images in pixels; by default that of the run, or 224")


def load(args, size=None):
    """The backbone of args.checkpoint, a path or `random`. Raises UserError.

    What is None of args.arch, .data, .size and .bf16 becomes that of the run that trained it;
    args.run: that run's flags, or {}. size: in place of the run's, for other data than shapes.
    """
    if args.checkpoint is None:
        raise common.UserError("--checkpoint is missing: a run folder, weights, or random")
    args.run = {}
    if args.checkpoint != "random":
        flags = weights.read_checkpoint(args.checkpoint).get("args")
        args.run = flags if isinstance(flags, dict) else {}

    def settle(name, otherwise):
        value = getattr(args, name)
        if value is None:
            value = args.run.get(name)
        setattr(args, name, value if isinstance(value, type(otherwise)) else otherwise)

    settle("arch", "")
    settle("data", "shapes")
    if size and args.size is None and args.data != "shapes":
        args.size = size
    settle("size", 224)
    settle("bf16", training.has_bf16())
    if args.checkpoint == "random":
        torch.manual_seed(0)
        return common.build_backbone(args.arch, args.size)

    backbone = weights.load_backbone(args.checkpoint, args.arch or None)
    args.arch = backbone.arch
    if args.stem_padding != 1:
        if not isinstance(backbone, common.ResNet):
            raise common.UserError(f"--stem-padding is for a ResNet, not for {args.arch}")
        backbone.conv1.padding = (args.stem_padding, args.stem_padding)
    bad = [name for name, value in backbone.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise common.UserError(f"{args.checkpoint} is no trained network: {bad[0]} holds NaN or "
                               "infinity; take an earlier checkpoint")
    return backbone


def untrained(args, backbone):
    """The network of the same architecture and size from which a run of the same seed starts."""
    seed = args.run.get("seed", 0)
    torch.manual_seed(seed if isinstance(seed, int) else 0)
    fresh = weights.fresh(backbone.state_dict(), args.arch)
    if isinstance(fresh, common.ResNet):
        fresh.conv1.padding = backbone.conv1.padding
    return fresh


# --- 2. Processes ---------------------------------------------------------------------------------

def say(text):
    """Prints, on the first process alone."""
    if training.rank_and_world()[0] == 0:
        training.say(text)


def summed(x):
    """The sum of x over processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def concatenated(x, dim=0):
    """What the processes hold, in any sizes of `dim`, one after the other."""
    if not dist.is_initialized():
        return x
    x = x.movedim(dim, 0)
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=x.device)
    counts[dist.get_rank()] = len(x)
    counts = summed(counts).tolist()
    parts = list(x.new_zeros(sum(counts), *x.shape[1:]).split(counts))
    parts[dist.get_rank()] = x
    return summed(torch.cat(parts)).movedim(0, dim)  # each row plus zeros


def progress(steps, total, what):
    """Yields the steps, and tells on stderr how much of `total` is done and the time left: on a
    terminal in one line, written anew each second; else in a line after 5 s, then every 10 s."""
    terminal = sys.stderr.isatty()
    pause, end = (1, "") if terminal else (10, "\n")
    begin = time.monotonic()
    due = begin + pause / 2
    for done, step in enumerate(steps, 1):
        yield step
        now = time.monotonic()
        if now >= due and training.rank_and_world()[0] == 0:
            due = now + pause
            left = (now - begin) * (total / done - 1)
            left = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
            training.say(f"{what}: {done / total:.0%}, {left} left", sys.stderr, end)
    if terminal:
        training.say("", sys.stderr, end="")


# --- 3. Images ------------------------------------------------------------------------------------

def open_labelled(args):
    """The training and validation parts of --data, which must have labels. Raises UserError."""
    train, val = [common.open_data(args.data, split, args.size) for split in ("train", "val")]
    if val is None or not val.classes or train.classes != val.classes:
        lone = sorted({*train.classes}.symmetric_difference(val.classes if val else ()))
        found = f"not in both: {', '.join(lone[:6])}" if val else "there is no val/"
        raise common.UserError(f"{args.protocol} needs labels: {args.data} must hold train/CLASS/ "
                               "and val/CLASS/ (or valid/, test/) with the same classes; "
                               + (found if lone else "no image has a label"))
    return train, val


def open_part(args):
    """The validation part of --data, or the training part where there is no other."""
    val = common.open_data(args.data, "val", args.size)
    return val or common.open_data(args.data, "train", args.size)


def whole_view(image, size, share=1.0):
    """The central square, `share` of the short side."""
    side = round(share * min(image.size))
    top = (image.height - side) // 2
    left = (image.width - side) // 2
    return [((top, left, side, side), False, size)]


def center_view(image, size):
    """The same of 7/8 of the short side, as is usual; of all of it for under 100 pixels."""
    return whole_view(image, size, 1.0 if size < 100 else 7 / 8)


def to_input(x, device):
    """uint8 images (B, 3, H0, W0) -> what a backbone takes."""
    return common.normalize(x.to(device, non_blocking=True).float() / 255)


class Stacked(common.Views):
    """Item index -> a sample with its views in one tensor: a worker can hand over few of them."""

    def __getitem__(self, index):
        sample = super().__getitem__((0, index))
        return sample._replace(views=torch.stack(sample.views))


def read_batches(data, view, args, batch_size):
    """Yields the indices (b,) and a Batch of this process's images on the device, the views as one
    tensor (b, V, 3, size, size). view(image, size) -> V views. Broken images are left out."""
    rank, world = training.rank_and_world()
    batch_size = min(batch_size, max(1, len(data) // world))  # something for every process
    chunks = torch.arange(len(data)).split(batch_size)[rank::world]
    views = Stacked(data, lambda image: view(image, size=args.size), seed=0)
    keys = [chunk.tolist() for chunk in chunks]
    loader = training.data_loader(views, args.workers, batch_sampler=keys)
    for index, batch in progress(zip(chunks, loader), len(chunks), f"{len(data)} images"):
        if batch.broken.any():  # another image has taken the place of a broken one
            training.warn(f"{int(batch.broken.sum())} such image(s) have no part in the result")
            index = index[~batch.broken]
            batch = [part[~batch.broken] for part in batch]
        parts = [part.to(args.device, non_blocking=True) for part in batch]
        yield index.to(args.device), common.Batch(*parts)


# --- 4. Representations ---------------------------------------------------------------------------

def pooled(backbone, x):
    return backbone(x)[1]


@torch.no_grad()
def features(backbone, data, args, read=pooled, view=center_view, batch_size=256):
    """Yields representations (b, D) in float32, labels and indices (b,) of this process's images.
    view(image, size) -> V views; read(backbone, their inputs (b V, 3, size, size)) -> (b, D)."""
    backbone.eval()
    for index, batch in read_batches(data, view, args, batch_size):
        x = to_input(batch.views.flatten(0, 1), args.device)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            y = read(backbone, x)
        yield y.float(), batch.labels, index


def all_features(backbone, data, args, **how):
    """The same of all processes' images, in the order of the data: (n, D), (n,) and (n,)."""
    columns = zip(*features(backbone, data, args, **how))
    y, labels, index = [concatenated(torch.cat(parts)) for parts in columns]
    order = index.argsort()
    return y[order], labels[order], index[order]


def labelled(y, labels, _=None):
    """Without the images that have no label, as in STL-10."""
    return y[labels >= 0], labels[labels >= 0]


def percent(right):
    return 100 * right.double().mean().item()
