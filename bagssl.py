"""BagSSL: an image is represented by the bag of its patches' embeddings.

Yubei Chen, Adrien Bardes, Zengyi Li, Yann LeCun. "Bag of Image Patch Embedding Behind the Success of Self-Supervised
Learning". TMLR 2023. arXiv:2206.08954

Joint-embedding methods model which patches occur together in an image. So each view is a small patch of one fixed scale,
drawn towards another patch of the same image, and whatever keeps all of them from being the same will do: variance and
covariance (VICReg), coding rate (TCR), contrast (SimCLR) or the spectral loss, of which the paper shows what it models.
The image is then the mean of its patches' embeddings, taken before the projector.

    python bagssl.py                                                   # a demonstration: scenes made in memory, on a CPU
    python bagssl.py --data cifar10 --loss tcr                         # one GPU: also vicreg, simclr, spectral
    torchrun --nproc_per_node=8 bagssl.py --data imagenet              # eight: Appendix C.3
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 bagssl.py --data imagenet
    python evaluate.py bag --checkpoint runs/bagssl-cifar10            # bags of 1, 4, 16, 64 and 256 patches

    Eq. (6)       spectral_loss                     Appendix C.1-C.3  RECIPES, COEFFICIENTS, total_coding_rate, nt_xent
    Eq. (7)       total_coding_rate, covariance     Appendix C.4      local_aggregation
    In all that vicreg_loss() is made of, equations, Algorithm 1 and Appendix B are those of VICReg, arXiv:2105.04906.

Differences
 1. Written from the paper's appendix alone. Not in it: TCR's formula (its authors' EMP-SSL has this one: the mean of both
    patches' rates, each with l2-normalised embeddings), the patches' scale of 0.2 (14 x 14 of 32 x 32 on CIFAR), and
    that the bag is a plain mean, without normalisation before it.
 2. Patches are squares: Appendix D's "scale 0.1" is 71 x 71 of 224 x 224. They are resized to --size, on CIFAR from 14 to
    32 pixels, which the appendix leaves open. A range, `--patch-scale 0.08-1`, draws crops as BYOL does, which makes
    Appendix D's "multi-scale" model.
 3. With `--patches` above 2 the loss is the mean over all pairs, since the objectives model p(x_1, x_2), and BYOL's two
    colour augmentations alternate. All patches go through the network as one batch, for BatchNorm too.
 4. Eq. (6) is estimated without bias: its second mean is over patches of different images. Embeddings have length one, as
    Appendix B assumes. Without that the optimum, w z_1^T z_2 = p(x_1, x_2) / (p(x_1) p(x_2)), would be in reach, but
    training starts from losses of 1e5 with the 8192-wide projector, and then stays long with the constant solution.
 5. The first equality of Eq. (7) holds up to the constant N - d. "1/d I_N" below it must read N/d I_d.
 6. Learning rates are read as base rates for a batch of 256, as in vicreg.py. imagenet's lambda of TCR is imagenet100's.
    shapes is this project's own recipe.
 7. C.4 pools 5 x 5 maps to 2 x 2. The stem here makes 4 x 4 of the same images; windows over the lower and right border
    average what there is, so that both give 2 x 2.
 8. As in vicreg.py: no bias in the projector's last layer, LARS neither decays nor scales biases and normalisation,
    residual branches start at zero, incomplete batches are dropped. The linear classifier that reports accuracy while
    training sees the bag of an image's --patches patches; the k-NN at the end, as everywhere, sees whole images.
"""
import argparse
import itertools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# --- 1. Views and positions ----------------------------------------------------------------------------------------

JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
COLOURS = dict(jitter=JITTER, blur_p=1.0, solarize_p=0.0), dict(jitter=JITTER, blur_p=0.1, solarize_p=0.2)  # BYOL's two


def random_box(rng, height, width, area, ratio=(3 / 4, 4 / 3)):
    """A random crop (top, left, height, width) in pixels, drawn as torchvision's RandomResizedCrop draws it.

    rng: a random.Random; area: range of the crop's share of the image; ratio: range of width / height.
    """
    for _ in range(10):
        pixels = rng.uniform(*area) * height * width
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < h <= height and 0 < w <= width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def sample_patches(rng, height, width, area, patches, size):
    """Patches of an image of height x width pixels: [(box, flip, size), ...]. Squares where the scale is fixed."""
    ratio = (1, 1) if area[0] == area[1] else (3 / 4, 4 / 3)
    return [(random_box(rng, height, width, area, ratio), rng.random() < 0.5, size) for _ in range(patches)]


def image_side(patch, scale):
    """The side of a square image of which a square of `patch` pixels is the share `scale` of the area."""
    return round(patch / math.sqrt(scale))


def patch_grid(pixels, patch, count):
    """A dense grid of `count` (1, 4, 9, ...) square patches in a square image, from border to border; one: in the centre.

    pixels, patch: the sides of both -> boxes [(top, left, height, width), ...] in pixels, row by row. ValueError unless
    `count` is a square.
    """
    grid, room = math.isqrt(count), pixels - patch
    if count < 1 or grid ** 2 != count:
        raise ValueError(f"{count} patches are no square grid")
    starts = [round(room * i / (grid - 1)) for i in range(grid)] if grid > 1 else [room // 2]
    return [(top, left, patch, patch) for top in starts for left in starts]


# --- 2. Loss -------------------------------------------------------------------------------------------------------


class AllSum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs (a plain dist.all_reduce would give 1/G of it)."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return AllSum.forward(ctx, grad)


def all_sum(x):
    return AllSum.apply(x) if dist.is_initialized() else x


def all_rows(z):
    """The rows (n/G, D) of each process -> (n, D), those of all; without gradient."""
    if not dist.is_initialized():
        return z.detach()
    rows = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, z.detach().contiguous())
    return torch.cat(rows)


def gather(z):
    """The rows of all processes as in all_rows(), with gradient: the sum of what each process has for a row."""
    if not dist.is_initialized():
        return z
    before, after = len(z) * dist.get_rank(), len(z) * (dist.get_world_size() - dist.get_rank() - 1)
    return all_sum(F.pad(z, (0, 0, before, after)))  # (n/G, D) -> (n, D)


def moments(z):
    """Mean and variance (D,) of each dimension over the rows z (n/G, D) of all processes, and n. Eq. (2).

    Raises RuntimeError where processes hold unequal numbers of rows.
    """
    var, mean = torch.var_mean(z, 0, correction=0)  # keeps only z for the backward pass, where z - mean would be a copy
    if not dist.is_initialized():
        return mean, var * len(z) / (len(z) - 1), len(z)
    n = len(z) * dist.get_world_size()
    total = all_sum(torch.cat([len(z) * mean, z.new_full((1,), len(z))]))  # (D + 1,)
    torch._assert_async(total[-1] == n, "the processes hold batches of unequal size")  # the GPU is not waited for
    mean_of_all = total[:-1] / n
    var = var + (mean - mean_of_all).square()  # (D,), about the mean of all
    return mean_of_all, all_sum(len(z) * var) / (n - 1), n


def invariance(z_a, z_b):
    """Mean squared error between the embeddings (n/G, D) of two views. Eq. (5), averaged over D as in Algorithm 1."""
    return F.mse_loss(z_a, z_b)


def variance(z, gamma=1.0, eps=1e-4):
    """Hinge on each dimension's standard deviation over the global batch. z (n/G, D) -> scalar. Eq. (1)."""
    _, var, _ = moments(z)
    return F.relu(gamma - torch.sqrt(var + eps)).mean()


def covariance(z):
    """Sum of squared off-diagonal covariances over the global batch, / D. z (n/G, D) -> scalar. Eqs. (3), (4).

    With C = z^T z / (n - 1) and S = z z^T / (n - 1), ||C||_F = ||S||_F, so the sum is ||C||^2 or ||S||^2, whichever
    matrix is smaller, minus the squared variances. Differentiable once.
    """
    mean, var, n = moments(z)  # (D,); var is the diagonal of C
    z, d = z - mean, z.shape[1]
    if n < d:
        s = z @ all_rows(z).T / (n - 1)  # (n/G, D) (D, n) -> (n/G, n): this process's rows of S
        mine = s.square().sum()
        total = all_sum(2 * mine - mine.detach())  # S is symmetric: through its rows flows half of the gradient
    else:
        total = (all_sum(z.T @ z) / (n - 1)).square().sum()  # (D, n) (n, D) -> (D, D)  Eq. (3)
    return (total - var.square().sum()) / d  # Eq. (4)


def vicreg_loss(z_a, z_b, inv_coeff=25.0, var_coeff=25.0, cov_coeff=1.0):
    """Eq. (6) as Algorithm 1 writes it, lambda, mu and nu being the coefficients of inv, var and cov.

    Embeddings z_a, z_b (n/G, D), n > 1 -> the loss, and its three unweighted terms. On G processes, which must all call
    it, var and cov are those of all n rows, and the gradient that DDP averages equals that of one process. Raises
    RuntimeError if the processes hold unequal numbers of rows.
    """
    with torch.autocast(z_a.device.type, enabled=False):
        z_a, z_b = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z_a, z_b))
        inv = invariance(z_a, z_b)
        var = variance(z_a) + variance(z_b)
        cov = covariance(z_a) + covariance(z_b)
        return inv_coeff * inv + var_coeff * var + cov_coeff * cov, {"inv": inv, "var": var, "cov": cov}


def total_coding_rate(z, eps=0.2):
    """1/2 logdet(I + D / (n eps) z^T z) over the global batch, for embeddings z (n/G, D) of unit length -> scalar.

    The volume that they span, in nats. z^T z (D x D) and z z^T (n x n) have the same eigenvalues but for zeros, so the
    determinant is that of the smaller one. Differentiable once.
    """
    d, n = z.shape[1], len(z) * (dist.get_world_size() if dist.is_initialized() else 1)
    if n < d:
        s = z @ all_rows(z).T  # (n/G, D) (D, n) -> (n/G, n): this process's rows of z z^T
        product = gather(2 * s - s.detach())  # (n, n), symmetric: through its rows flows half of the gradient
    else:
        product = all_sum(z.T @ z)  # (D, n/G) (n/G, D) -> (D, D)
    matrix = torch.eye(len(product), dtype=z.dtype, device=z.device) + d / (n * eps) * product
    return torch.linalg.cholesky_ex(matrix).L.diagonal().log().sum()  # of the root's diagonal: half the logdet


def nt_xent(z_a, z_b, temperature=0.1):
    """SimCLR's loss: each of the 2n embeddings must tell its partner from the 2n - 2 others by cosine similarity.

    z_a, z_b (n/G, D) -> scalar, the mean over this process's 2n/G; the others are those of all processes.
    """
    z = F.normalize(torch.cat([z_a, z_b]), dim=1)
    everyone = gather(z)  # (2n, D), a and b of one process after those of another
    first = len(z) * dist.get_rank() if dist.is_initialized() else 0
    logits = z @ everyone.T / temperature  # (2n/G, D) (D, 2n) -> (2n/G, 2n)
    logits.diagonal(first).fill_(-torch.inf)  # nobody's partner is itself
    partner = first + torch.arange(len(z), device=z.device).roll(len(z_a))
    return F.cross_entropy(logits, partner)


def spectral_loss(z_a, z_b, lam=1.0):
    """-E[z_1^T z_2] over patches of one image + lam E[(z_1^T z_2)^2] over independent ones. Eq. (6), lam = w / 2.

    z_a, z_b (n/G, D), n > 1 -> scalar, the mean over this process's rows of z_a; its expectation is Eq. (6).
    """
    everyone = gather(z_b)
    products = z_a @ everyone.T  # (n/G, D) (D, n) -> (n/G, n)
    together = (z_a * z_b).sum(1)  # (n/G,), those of one image: not independent
    independent = (products.square().sum(1) - together.square()) / (len(everyone) - 1)
    return (lam * independent - together).mean()


def pair_loss(z_a, z_b, objective, *coefficients):
    """An objective for two patches of each image. z_a, z_b (n/G, D) -> the loss, and its unweighted terms.

    objective: "vicreg", "tcr", "simclr" or "spectral"; coefficients: in the order of COEFFICIENTS.
    """
    if objective == "vicreg":
        return vicreg_loss(z_a, z_b, *coefficients)
    unit_a, unit_b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
    sim = (unit_a * unit_b).sum(1).mean()
    if objective == "tcr":
        lam, eps = coefficients
        tcr = (total_coding_rate(unit_a, eps) + total_coding_rate(unit_b, eps)) / 2
        return -(lam * sim + tcr), {"sim": sim, "tcr": tcr}
    loss = {"simclr": nt_xent, "spectral": spectral_loss}[objective]
    return loss(unit_a, unit_b, *coefficients), {"sim": sim}


def bag_loss(embeddings, objective="vicreg", *coefficients):
    """The mean of pair_loss() over all pairs of an image's patches -> the loss, and its unweighted terms.

    embeddings: P > 1 tensors (n/G, D). On G processes, which must all call it with equally many rows, the gradient that
    DDP averages equals that of one process.
    """
    with torch.autocast(embeddings[0].device.type, enabled=False):
        embeddings = [z.to(torch.promote_types(z.dtype, torch.float32)) for z in embeddings]
        pairs = itertools.combinations(embeddings, 2)
        losses, parts = zip(*(pair_loss(*pair, objective, *coefficients) for pair in pairs))
        return torch.stack(losses).mean(), {key: torch.stack([p[key] for p in parts]).mean() for key in parts[0]}


# --- 3. Model ------------------------------------------------------------------------------------------------------


def mlp(*widths):
    """The projector: linear layers, each but the last with batch normalisation and ReLU. Appendix B.1."""
    layers = []
    for i, o in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False))


def bag_embedding(patch_embeddings):
    """The image's embedding: the mean of those of its patches. (B, P, D) -> (B, D)."""
    return patch_embeddings.mean(1)


def image_embedding(embed, x, patch, count):
    """The bag of a dense grid over whole images.

    embed: patches (B, 3, patch, patch) -> (B, D); x (B, 3, R, R): images at the size where a patch has `patch` pixels,
    so that cutting needs no resizing: R = image_side(patch, scale) -> (B, D).
    """
    boxes = patch_grid(x.shape[2], patch, count)
    return bag_embedding(torch.stack([embed(x[:, :, top:top + h, left:left + w]) for top, left, h, w in boxes], 1))


def local_aggregation(maps):
    """Average pooling of square maps with window 3 and stride 2, flattened. Appendix C.4. (B, N, D) -> (B, D h w)."""
    side = math.isqrt(maps.shape[1])
    maps = maps.mT.unflatten(2, (side, side))  # (B, D, H, W)
    return F.avg_pool2d(maps, min(3, side), 2, ceil_mode=True).flatten(1)


class BagSSL(nn.Module):
    """backbone: images (B, 3, H0, W0) -> maps (B, N, D), pooled (B, D = backbone.dim); widths: the projector's."""

    def __init__(self, backbone, widths=(8192, 8192, 8192), num_classes=0):
        super().__init__()
        self.backbone, self.projector = backbone, mlp(backbone.dim, *widths)
        self.probe = nn.Linear(backbone.dim, num_classes) if num_classes else None

    def forward(self, patches):
        """P patches of each image, P x (B, 3, H0, W0) -> P embeddings (B, widths[-1]), and the probe's logits of their
        bag (B, classes) or None."""
        _, y = self.backbone(torch.cat(patches))  # representations (P B, D)
        bag = bag_embedding(y.detach().unflatten(0, (len(patches), -1)).transpose(0, 1))  # (P, B, D) -> (B, P, D) -> (B, D)
        logits = self.probe(bag) if self.probe else None
        return self.projector(y).chunk(len(patches)), logits


# --- 4. Training ---------------------------------------------------------------------------------------------------

COEFFICIENTS = {  # of each objective, in the order in which pair_loss() takes them; all are flags
    "vicreg": ("inv_coeff", "var_coeff", "cov_coeff"), "tcr": ("tcr_coeff", "tcr_eps"), "simclr": ("temperature",),
    "spectral": ("spectral_coeff",),
}
RECIPES = {  # chosen by --data; any other data set gets imagenet's
    "imagenet": dict(arch="resnet50", size=224, projector="8192-8192-8192", epochs=800, batch_size=1024, base_lr=0.1,
                     final_lr=0.0, weight_decay=1e-6, warmup_epochs=10, tcr_coeff=1920.0),  # Appendix C.3
    "imagenet100": dict(arch="resnet50", size=224, projector="8192-8192-8192", epochs=400, batch_size=1024, base_lr=0.1,
                        final_lr=0.0, weight_decay=1e-4, warmup_epochs=10, tcr_coeff=1920.0),  # Appendix C.2
    "cifar10": dict(arch="resnet34", size=32, projector="4096-128", epochs=600, batch_size=1024, base_lr=0.3,
                    final_lr=0.0, weight_decay=1e-4, warmup_epochs=10, patch_scale="0.1914"),  # Appendix C.1; (14/32)^2
    "cifar100": dict(arch="resnet34", size=32, projector="4096-512", epochs=600, batch_size=1024, base_lr=0.3,
                     final_lr=0.0, weight_decay=1e-4, warmup_epochs=10, patch_scale="0.1914"),
    "shapes": dict(arch="tiny_convnet", size=48, projector="1024-128", epochs=7, batch_size=128, base_lr=4.0,
                   final_lr=0.0, weight_decay=1e-6, warmup_epochs=1, loss="simclr", temperature=0.2),
}


def parse_scale(text):
    """--patch-scale, one number or a range like 0.08-1 -> (low, high). Raises UserError."""
    import common

    try:
        low, *rest = [float(number) for number in text.split("-")]
        high, = rest or [low]
        if 0 < low <= high <= 1:
            return low, high
    except ValueError:
        pass
    raise common.UserError(f"--patch-scale {text}: give a share of the image's area, like 0.2, or a range, like 0.08-1")


def train(args):
    import functools

    import common
    import training
    from evaluate import knn_report

    device = training.set_up(args.seed)
    area, coefficients = parse_scale(args.patch_scale), [vars(args)[name] for name in COEFFICIENTS[args.loss]]
    if args.patches < 2:
        raise common.UserError(f"--patches {args.patches}: the loss compares patches of an image, 2 or more")
    data = common.open_data(args.data, "train", args.size)
    backbone = common.build_backbone(args.arch, args.size)
    widths = [int(w) for w in args.projector.split("-")]
    model, ddp = training.distribute(BagSSL(backbone, widths, len(data.classes)), device)
    optimizer = training.LARS(model.parameters(), weight_decay=args.weight_decay)
    run = training.Run(args, model, optimizer, data, device)
    colours = [common.Photometric(**COLOURS[i % 2]) for i in range(args.patches)]

    for batch in run.batches(functools.partial(sample_patches, area=area, patches=args.patches, size=args.size)):
        generator = training.seed_step(args.seed, run.step)
        patches = [colour(x, generator) for colour, x in zip(colours, batch.views)]
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            embeddings, logits = ddp(patches)
        loss, parts = bag_loss(embeddings, args.loss, *coefficients)
        probe_loss, accuracy = training.probe(logits, batch.labels)
        lr = run.set_lr()
        optimizer.zero_grad()
        (loss + probe_loss).backward()
        optimizer.step()
        std = F.normalize(embeddings[0].detach().float(), dim=1).std(0).mean()  # 1/sqrt(D) at most; 0: collapsed
        run.log(loss=loss, **parts, std=std, **accuracy, lr=lr)

    knn_report(args, model.backbone, run.folder / "knn.json", device)


def main():
    import training

    with training.one_line_errors():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--projector", help="widths of its layers")
        parser.add_argument("--loss", default="vicreg", choices=COEFFICIENTS)
        parser.add_argument("--patch-scale", default="0.2", help="share of the image's area, or a range like 0.08-1")
        parser.add_argument("--patches", type=int, default=2, help="of each image")
        parser.add_argument("--inv-coeff", type=float, default=25.0, help="of VICReg")
        parser.add_argument("--var-coeff", type=float, default=25.0, help="of VICReg")
        parser.add_argument("--cov-coeff", type=float, default=1.0, help="of VICReg")
        parser.add_argument("--tcr-coeff", type=float, default=30.0, help="lambda, the weight of similarity beside the TCR")
        parser.add_argument("--tcr-eps", type=float, default=0.2)
        parser.add_argument("--temperature", type=float, default=0.1, help="of SimCLR")
        parser.add_argument("--spectral-coeff", type=float, default=1.0, help="lambda of Eq. (6)")
        train(training.parse_args(parser, RECIPES))


if __name__ == "__main__":
    main()
