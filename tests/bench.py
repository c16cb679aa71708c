"""Time and peak memory of this project's parts beside what they replace, on this machine.

    python tests/bench.py [--only vicreg_256 lars ...] [--out benchmark.json]

Each row runs ours and a baseline in one process, in turns, and takes medians. The baselines are
short literal versions of the papers' algorithms, written here; torchvision's ordinary pipeline; and
lightly's VICRegLLoss where it is installed. Memory is the peak of what PyTorch allocates during a
call beyond what it held before, on the CPU as on a GPU. Sizes that would take minutes on a CPU have
smaller stand-ins there; each row prints the size that it ran. The goals are those for the full
sizes. Wants a quiet machine: other work on it moves the times, though less the ratios.
"""
import argparse
import copy
import functools
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler says nothing of its own

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import helpers

import bagssl
import common
import cribo
import lc_loss
import training
import vicreg
import vicregl

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
BF16 = training.has_bf16()

# --- Measuring ------------------------------------------------------------------------------------

def clock(call):
    """Seconds of one call, the GPU's work included."""
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(ours, baseline, pairs=None, seconds=12):
    """Median seconds of both, in turns after a first call of each, and of the turns' ratios."""
    first = clock(ours) + clock(baseline)
    pairs = pairs or min(101, max(3, round(seconds / first)))
    turns = [(clock(ours), clock(baseline)) for _ in range(pairs)]
    a, b = [statistics.median(times) for times in zip(*turns)]
    faster = statistics.median(b / a for a, b in turns)
    return dict(pairs=pairs, ours_s=a, baseline_s=b, faster=faster)


def peak_memory(call):
    """Bytes that PyTorch holds at most during a call, beyond what it held before."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    events = sorted([e for e in events if e.name() == "[memory]"], key=lambda e: e.start_ns())
    sizes = [e.nbytes() for e in events]  # of blocks taken, and minus those returned
    return int(np.cumsum([0, *sizes]).max())


def gradients(loss, *inputs):
    """A call of loss(*inputs) and its backward pass."""
    inputs = [x.requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(loss(*inputs), inputs)


def randn(*shape):
    return torch.randn(*shape, device=DEVICE)


# --- Losses ---------------------------------------------------------------------------------------

def off_diagonal(matrices):
    """(..., D, D) -> (..., D (D - 1)).

    Without the first element, each row of D + 1 ends with one of the diagonal.
    """
    d = matrices.shape[-1]
    return matrices.flatten(-2)[..., 1:].unflatten(-1, (d - 1, d + 1))[..., :-1].flatten(-2)


def algorithm_1(z_a, z_b):
    """VICReg's Algorithm 1; z (n, D), or (n, M, D) with the covariances of each of M matches."""
    n, d = len(z_a), z_a.shape[-1]
    loss = 25 * F.mse_loss(z_a, z_b)
    for z in (z_a, z_b):
        loss = loss + 25 * F.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean()
        z = (z - z.mean(0)).transpose(0, -2)  # (..., n, D)
        cov = z.mT @ z / (n - 1)  # (..., D, D)
        loss = loss + off_diagonal(cov).pow_(2).sum(-1).mean() / d
    return loss


def vicreg_row(n, d=8192):
    z_a, z_b = randn(n, d), randn(n, d)
    ours = gradients(lambda a, b: vicreg.vicreg_loss(a, b)[0], z_a, z_b)
    return f"n={n} D={d}", ours, gradients(algorithm_1, z_a, z_b)


class Gather(torch.autograd.Function):
    """The rows of all processes, with gradient: what VICReg's released code gathers."""

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def on_process(rank, world, n, d):
    z_a, z_b = torch.randn(n, d), torch.randn(n, d)
    ours = gradients(lambda a, b: vicreg.vicreg_loss(a, b)[0], z_a, z_b)
    gathered = lambda a, b: algorithm_1(Gather.apply(a), Gather.apply(b))  # noqa: E731
    baseline = gradients(gathered, z_a, z_b)
    return alternate(ours, baseline, pairs=5)


def vicreg_gloo(n=256, d=8192, world=2):
    """Measured inside `world` CPU processes of one thread each."""
    measured, *_ = helpers.POOL.call(world, on_process, n, d, seconds=600)
    helpers.POOL.close()
    return f"G={world} n={n} each D={d}, 1 thread each", measured


def nearest_by_loop(query, candidates, a, b, kept):
    """Algorithm 1 of VICRegL, lines 22-28: query (B, N, D), candidates (B, N', D), compared by a
    and b."""
    images = torch.arange(len(query), device=query.device)
    found, distances = [], []
    for location in range(query.shape[1]):
        offsets = a[:, location, None] - b  # (B, N', .)
        distance, nearest = offsets.norm(dim=2).min(1)  # (B,)
        found.append(candidates[images, nearest])
        distances.append(distance)
    best = torch.stack(distances, 1).topk(kept, largest=False).indices  # (B, kept)
    best = best[..., None].expand(-1, -1, query.shape[2])
    return query.gather(1, best), torch.stack(found, 1).gather(1, best)  # (B, kept, D)


def local_row(b=64, side=7, d=512, kept=20):
    maps = randn(b, side ** 2, d), randn(b, side ** 2, d)
    boxes = 10 + 90 * torch.rand(2, b, 4, device=DEVICE)
    flips = torch.rand(2, b, device=DEVICE) < 0.5
    pos = [vicregl.positions(*view, side) for view in zip(boxes, flips)]  # (B, H, W, 2)
    flat = [p.flatten(1, 2) for p in pos]
    return f"B={b} N={side ** 2} D={d} {kept} matches", maps, pos, flat, kept


def local_literal():
    size, maps, _, pos, kept = local_row()

    def literal(a, b):
        with torch.no_grad():
            pairs = [(a.detach(), b.detach()), pos]
        return sum(algorithm_1(*nearest_by_loop(a, b, *pair, kept)) for pair in pairs)

    ours = gradients(lambda a, b: vicregl.local_criterion(a, b, *pos)[0], *maps)
    return size, ours, gradients(literal, *maps)


def local_lightly():
    from lightly.loss import VICRegLLoss

    size, maps, pos, flat, kept = local_row()
    theirs, y = VICRegLLoss(alpha=0.0, num_matches=(kept, kept)), randn(len(maps[0]), 2)

    def ours(a, b):  # both directions, as there
        there, _ = vicregl.local_criterion(a, b, *flat)
        back, _ = vicregl.local_criterion(b, a, *flat[::-1])
        return there + back

    def lightly(a, b):
        return theirs([(y, m.unflatten(1, pos[0].shape[1:3])) for m in (a, b)], pos)

    return size, gradients(ours, *maps), gradients(lightly, *maps)


def masked_distances(distances, labels, num_objects):
    """cribo.distances_to_clusters with a B x 2N x 2N x K tensor."""
    members = F.one_hot(labels, num_objects + 1)[:, None, :, :-1].bool()  # (B, 1, 2N, K)
    d = distances[..., None].where(members, torch.inf).amin(2)  # (B, 2N, 2N, K) -> (B, 2N, K)
    none = d.isinf()
    d = d.where(~none, d.masked_fill(none, 0).mean((1, 2), keepdim=True))
    return d / d.amax((1, 2), keepdim=True)


def clustering(b=16, side=14, k=32, d=384):
    tokens = randn(b, 2 * side ** 2, d)
    pos = 224 * torch.rand(b, 2 * side ** 2, 2, device=DEVICE)
    init = torch.rand(b, 2 * side ** 2, device=DEVICE).argsort(1)[:, :k]
    ours = functools.partial(cribo.joint_space_clustering, tokens, pos, k, 1.0, init)

    def literal():
        with mock.patch.object(cribo, "distances_to_clusters", masked_distances):
            ours()

    return f"B={b} N={side ** 2} K={k}", ours, literal


def bank_search(n=2048, rows=300_000, d=384):
    queries, bank = randn(n, d), randn(rows, d)
    return (f"{n} in {rows} x {d}", lambda: cribo.nearest(queries, bank),
            lambda: (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(1))


def coding_rate(side, n=1024, d=128, eps=0.2):
    """total_coding_rate against the logdet of z z^T ("n") or z^T z ("d")."""
    def logdet(z):
        product = z @ z.T if side == "n" else z.T @ z
        identity = torch.eye(len(product), device=z.device)
        return 0.5 * torch.logdet(identity + d / (n * eps) * product)

    z = F.normalize(randn(n, d), dim=1)
    return f"n={n} d={d}", gradients(bagssl.total_coding_rate, z), gradients(logdet, z)


# --- Training steps -------------------------------------------------------------------------------

IMAGES, PROJECTOR = (256, 3 * [8192]) if CUDA else (8, 3 * [2048])
ARCH, VIT, SIZE = "resnet50", "vit_small_patch16", 224
STEP = f"{IMAGES} images of {SIZE}, {{}}, " + ("bf16" if BF16 else "float32")


def views(count, images=IMAGES):
    shape = (images, 3, SIZE, SIZE)
    return [torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE) for _ in range(count)]


def boxes():
    """Random boxes (B, 2, 4) and flips (B, 2) of two views of images of 375 x 500 pixels."""
    image = torch.empty(3, 375, 500)
    crop = functools.partial(T.RandomResizedCrop.get_params, image, (0.2, 1.0), (3 / 4, 4 / 3))
    box = [[crop(), crop()] for _ in range(IMAGES)]
    flips = torch.rand(IMAGES, 2, device=DEVICE) < 0.5
    return torch.tensor(box, dtype=torch.float32, device=DEVICE), flips


def autocast():
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=BF16)


def on_device(model):
    torch.manual_seed(0)
    return model.to(DEVICE, memory_format=torch.channels_last).train()


def training_step(model, colours, forward, loss, optimizer=None, after=lambda: None):
    """A step on two random views as in the methods' train(): colours, forward(views),
    loss(outputs), gradient, update."""
    x = views(2)
    colours = [common.Photometric(**colour) for colour in colours]
    if optimizer is None:
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = training.LARS(params, lr=0.1, weight_decay=1e-6)

    def step():
        torch.manual_seed(0)
        inputs = [colour(view) for colour, view in zip(colours, x)]
        with autocast():
            outputs = forward(inputs)
        value = loss(outputs)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        after()

    return step


def vicreg_step():
    model = on_device(vicreg.VICReg(common.build_backbone(ARCH), PROJECTOR))
    _, colours = vicreg.VIEWS["paper"]
    return training_step(model, colours, lambda x: model(*x),
                         lambda out: vicreg.vicreg_loss(*out[:2])[0])


def vicregl_step():
    model = on_device(vicregl.VICRegL(common.build_backbone(ARCH), PROJECTOR))
    places = boxes()

    def loss(outputs):
        embeddings, maps, *_ = outputs
        return vicregl.vicregl_loss(embeddings, maps, vicregl.map_positions(*places, maps))[0]

    return training_step(model, 2 * vicregl.COLOURS, model, loss)


def bagssl_step():
    model = on_device(bagssl.BagSSL(common.build_backbone(ARCH), PROJECTOR))
    return training_step(model, bagssl.COLOURS, model,
                         lambda out: bagssl.bag_loss(out[0], "vicreg")[0])


def lc_step(alpha=0.1):
    """alpha 0: BYOL, without anything local; what LC-loss adds to."""
    model = on_device(lc_loss.BYOL(common.build_backbone(ARCH), alpha=alpha))
    box, flip = boxes()
    sizes = torch.tensor([[375, 500]], device=DEVICE).expand(IMAGES, -1)
    grid = SIZE // model.backbone.stride

    def loss(outputs):
        out, _ = outputs
        points, valid = lc_loss.correspondences(box[:, 1], flip[:, 1], sizes, grid)
        return lc_loss.lc_loss(*out, points, valid, alpha)[0]

    return training_step(model, lc_loss.COLOURS, lambda x: model(*x), loss,
                         after=lambda: model.update_target(0.996))


def cribo_step():
    student = on_device(cribo.Student(common.build_backbone(VIT, drop_path=0.1)))
    model = cribo.CrIBo(student, bank_images=25_000 if CUDA else 1_000).to(DEVICE)
    model.bank.objects.normal_()
    model.bank.pushed.fill_(model.bank.objects.shape[1])
    pos = cribo.joint_positions(*boxes(), SIZE // student.backbone.stride)

    def forward(x):
        x = torch.cat(x)
        assignment, _, targets = model(x, pos, True)
        image, objects, _ = student(x, assignment)
        return targets, image, objects

    def loss(outputs):
        targets, *_ = outputs
        cribo.update_center(model.image_center, targets.image)
        cribo.update_center(model.object_center, targets.objects)
        return cribo.cribo_loss(*outputs, model.image_center, model.object_center, 0.07)[0]

    return training_step(student, cribo.COLOURS, forward, loss, cribo.make_optimizer(student),
                         lambda: model.update_teacher(0.996))


def backbone_alone(arch, teacher):
    """Forward and backward of two views; `teacher`: and the forward pass of a second network."""
    model = on_device(common.build_backbone(arch))
    x = [common.normalize(view.float() / 255) for view in views(2)]
    target = copy.deepcopy(model)

    def passes():
        with autocast():
            loss = sum(model(view)[1].float().square().mean() for view in x)
            with torch.no_grad():
                for view in x * teacher:
                    target(view)
        model.zero_grad()
        loss.backward()

    return passes


def step_row(make, arch=ARCH, teacher=False):
    return STEP.format(arch), make(), backbone_alone(arch, teacher)


def against(make, make_other):
    return STEP.format(ARCH), make(), make_other()


def lars_row():
    model = on_device(common.build_backbone(ARCH))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    params = list(model.parameters())
    momenta = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def loop(lr=1e-4, decay=1e-6, momentum=0.9, eta=0.001):
        for p, m in zip(params, momenta):
            update = p.grad
            if p.ndim > 1:
                update = update.add(p, alpha=decay)
                w, u = p.norm(), update.norm()
                update = update * torch.where((w > 0) & (u > 0), eta * w / u, 1.0)
            m.mul_(momentum).add_(update)
            p.add_(m, alpha=-lr)

    return ARCH, training.LARS(params, lr=1e-4, weight_decay=1e-6).step, loop


# --- Data -----------------------------------------------------------------------------------------

def photos(folder, count=16, width=500, height=375):
    """JPEG files of about 110 kB, as ImageNet's: noise whose strength falls with its frequency."""
    rng = np.random.default_rng(0)
    for i in range(count):
        image = np.full((height, width, 3), 128.0)
        for cells in (3, 6, 12, 24, 48, 96, 192, 384):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            noise = np.asarray(noise.resize((width, height), Image.BICUBIC))
            image += (noise - 128.0) / cells ** 0.25
        image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
        image.save(Path(folder) / f"{i}.jpg", quality=90)
    return common.find_images(folder)


def on_one_thread(call):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    call()
    torch.set_num_threads(threads)


def loader(colours, folder=tempfile.TemporaryDirectory()):  # noqa: B008
    """Two views of each of 16 files on one core: common.Views (and Photometric on the device)
    against torchvision's.

    Without `colours`, ours is what a worker of a GPU run does, where colours cost the CPU nothing.
    """
    data = photos(folder.name)
    sample = functools.partial(vicreg.sample_views, area=(0.2, 1.0), size=224)
    dataset = common.Views(data, sample, seed=0)
    colour = common.Photometric(**vicreg.VIEWS["paper"][1][0])

    def blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))

    transform = T.Compose([
        T.RandomResizedCrop(224, (0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(*vicreg.JITTER)], 0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([blur], 0.5),
        T.RandomSolarize(128, 0.1),
        T.ToTensor(),
        T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])

    def ours():
        batch = torch.utils.data.default_collate([dataset[0, i] for i in range(len(data))])
        for x in batch.views * colours:
            colour(x.to(DEVICE))

    def pillow():
        images = [Image.open(data.name(i)).convert("RGB") for i in range(len(data))]
        torch.utils.data.default_collate([[transform(im), transform(im)] for im in images])

    size = f"{len(data)} JPEG of 500x375, {os.path.getsize(data.name(0)) / 1000:.0f} kB"
    return size, functools.partial(on_one_thread, ours), functools.partial(on_one_thread, pillow)


def photometric():
    """Colours of 2 x IMAGES views against a step of the plain backbone with LARS on them."""
    x = torch.cat(views(2))
    colour = common.Photometric(**vicreg.VIEWS["paper"][1][0])
    model = on_device(common.build_backbone(ARCH))
    optimizer = training.LARS(model.parameters(), lr=0.1)
    inputs = common.normalize(x.float() / 255)

    def step():
        with autocast():
            loss = model(inputs)[1].float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return f"{len(x)} views of {SIZE}", lambda: colour(x), step


# --- Table ----------------------------------------------------------------------------------------

# name: (function, baseline, goals: how many times faster, and smaller at its peak; below 1 for what
# comes on top of the baseline)
ROWS = {
    "vicreg_256": (functools.partial(vicreg_row, 256), "Algorithm 1", 20, 10),
    "vicreg_2048": (functools.partial(vicreg_row, 2048), "Algorithm 1", 3, 3),
    "vicreg_gloo": (vicreg_gloo, "gather, Algorithm 1", 10, None),
    "local": (local_literal, "Algorithm 1", 3, None),
    "local_lightly": (local_lightly, "lightly", 3, None),
    "clustering": (clustering, "B x 2N x 2N x K", 20, 10),
    "bank": (bank_search, "full matrix, topk", 1, 20),
    "tcr_n": (functools.partial(coding_rate, "n"), "logdet, n x n", 1, 1),
    "tcr_d": (functools.partial(coding_rate, "d"), "logdet, d x d", 1, 1),
    "lars": (lars_row, "loop over parameters", 3 if CUDA else 1, None),
    "loader": (functools.partial(loader, False), "Pillow, torchvision", 4, None),
    "loader_colours": (functools.partial(loader, True), "Pillow, torchvision", 4, None),
    "photometric": (photometric, "backbone step", 1 / 0.08, None),
    "lc_byol": (functools.partial(against, lc_step, functools.partial(lc_step, 0.0)), "BYOL step",
                1 / 1.03, None),
    "vicregl_vicreg": (functools.partial(against, vicregl_step, vicreg_step), "VICReg step",
                       1 / 1.09, 1 / 1.2),
    "step_vicreg": (functools.partial(step_row, vicreg_step), "backbone passes", None, None),
    "step_vicregl": (functools.partial(step_row, vicregl_step), "backbone passes", None, None),
    "step_lc": (functools.partial(step_row, lc_step, teacher=True), "backbone passes", None, None),
    "step_cribo": (functools.partial(step_row, cribo_step, VIT, True), "backbone passes", None,
                   None),
    "step_bagssl": (functools.partial(step_row, bagssl_step), "backbone passes", None, None),
}
NO_MEMORY = {"vicreg_gloo", "loader", "loader_colours"}  # measured elsewhere, or mostly Pillow's


def machine():
    """What the numbers hold for, and the FLOP/s of a large matrix product."""
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    n = 8192 if CUDA else 2048
    a = randn(n, n).to(torch.bfloat16 if BF16 else torch.float32)
    seconds = statistics.median(clock(lambda: a @ a) for _ in range(9))
    return dict(cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(),
                gpu=torch.cuda.get_device_name() if CUDA else "none", torch=torch.__version__,
                python=platform.python_version(), matmul_dtype=str(a.dtype),
                matmul_tflops=2 * n ** 3 / seconds / 1e12)


def measure(name, matmul_flops):
    """One row: size, seconds, peak memory; of steps also images/s and the share of matmul_flops."""
    function, baseline, *_ = ROWS[name]
    torch.manual_seed(0)
    size, *calls = function()
    row = dict(size=size, baseline=baseline)
    if isinstance(calls[0], dict):  # the row has measured itself
        return row | calls[0]
    row |= alternate(*calls)
    if name not in NO_MEMORY:
        ours, theirs = map(peak_memory, calls)
        row |= dict(ours_mb=ours / 1e6, baseline_mb=theirs / 1e6, smaller=theirs / max(ours, 1))
    if name.startswith("step_"):
        with FlopCounterMode(display=False) as counter:
            calls[0]()
        row |= dict(images_per_s=IMAGES / row["ours_s"],
                    share_of_matmul=counter.get_total_flops() / row["ours_s"] / matmul_flops)
    return row


def show(ratio, goal, on_top):
    """A ratio of the baseline to ours and its goal: "20.3x (20)", or, where ours comes on top of
    it, "+2.1% (+3%)"."""
    if ratio is None:
        return "-"
    if on_top:
        shown = f"{100 / ratio - 100:+.1f}%"
        return f"{shown} ({100 / goal - 100:+.0f}%)" if goal else shown
    digits = 0 if ratio >= 100 else 1 if ratio >= 10 else 2
    shown = f"{ratio:.{digits}f}x"
    return f"{shown} ({goal:.3g})" if goal else shown


def cells(name, row):
    *_, faster, smaller = ROWS[name]
    on_top = not faster or faster < 1
    seconds = f"{1e3 * row['ours_s']:.4g} / {1e3 * row['baseline_s']:.4g}"
    memory = steps = ""
    if "ours_mb" in row:
        memory = f"{row['ours_mb']:.0f} / {row['baseline_mb']:.0f}"
    if "images_per_s" in row:
        steps = f"{row['images_per_s']:.1f} img/s, {row['share_of_matmul']:.0%}"
    return (name, row["size"], row["baseline"], seconds, show(row["faster"], faster, on_top),
            memory, show(row.get("smaller"), smaller, on_top), row["pairs"], steps)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW",
                        help=", ".join(ROWS))
    parser.add_argument("--out", type=Path, default="benchmark.json")
    args = parser.parse_args()
    about = machine()
    rows = {}
    for key, value in about.items():
        print(key, f"{value:.4g}" if isinstance(value, float) else value, end="; ")
    print("\n\n| row | size | baseline | ms, ours / theirs | time (goal) | peak MB, ours / theirs "
          "| memory (goal) | turns | |")
    print("| --- " * 9 + "|")
    for name in args.only:
        try:
            rows[name] = measure(name, 1e12 * about["matmul_tflops"])
        except ImportError as error:
            print(f"| {name} | left out: {error} |")
            continue
        print("| " + " | ".join(map(str, cells(name, rows[name]))) + " |", flush=True)
        args.out.write_text(json.dumps({"machine": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
