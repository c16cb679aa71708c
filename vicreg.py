"""VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning.

Adrien Bardes, Jean Ponce, Yann LeCun. ICLR 2022. arXiv:2105.04906

Two views of an image should have the same embedding (invariance), while over a batch each of its dimensions keeps
a standard deviation of at least one (variance) and no two dimensions say the same (covariance). The variance term
alone prevents collapse: no negatives, no momentum encoder, no stop-gradient, no normalisation of the embeddings.

    python vicreg.py                                                   # a demonstration: scenes made in memory, on a CPU
    python vicreg.py --data imagenet --batch-size 256                  # one GPU
    torchrun --nproc_per_node=8 vicreg.py --data imagenet              # eight: the paper's run
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 vicreg.py --data imagenet

    Eq. (1), (2)  variance           Eq. (5)  invariance        Algorithm 1  vicreg_loss
    Eq. (3), (4)  covariance         Eq. (6)  vicreg_loss       Appendix B   VIEWS, VICReg, RECIPES
                                     Eq. (7)  train

Differences
 1. Eq. (5) sums over dimensions, Algorithm 1 and the released code average: averaged here.
 2. The released code halves the variance term: `--var-coeff 12.5` gives its loss. The paper's is the default.
 3. The released code draws the views differently (area from 0.08; blur 1.0 / 0.1 and solarize 0 / 0.2 for the first /
    second view): `--views released`. Its final learning rate is 0.001 of the peak: `--final-lr 0.0016` at batch 2048.
 4. The off-diagonal sum of Eq. (4) comes from the smaller of covariance (D x D) and Gram matrix (n x n): the same
    number, see covariance(). vicreg_loss() computes in float32 whatever autocast says.
 5. Unsaid in the paper, from its released code: no bias in the projector's last layer; each residual branch starts
    at zero; LARS (momentum 0.9, eta 0.001) neither decays nor scales biases and normalisation; variance and covariance
    over the batch of all processes; blur of 0.1 to 2 pixels.
 6. An incomplete last batch of an epoch is dropped.
 7. cifar10, cifar100 and imagenet100 follow "Bag of Image Patch Embedding" (Appendix C.1, C.2): its learning rates are
    read as base rates for a batch of 256, and its augmentation, BYOL's, is that of `--views released`. shapes and
    tiny_convnet are this project's own.
 8. A linear classifier on detached representations reports accuracy while training; nothing else sees the labels.
"""
import argparse
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# --- 1. Views and positions ----------------------------------------------------------------------------------------

JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
VIEWS = {  # Appendix B.2: the crop's share of the image's area; colour augmentation of the first and second view
    "paper": ((0.2, 1.0), *2 * [dict(jitter=JITTER, blur_p=0.5, solarize_p=0.1)]),
    "released": ((0.08, 1.0), dict(jitter=JITTER, blur_p=1.0, solarize_p=0.0),
                 dict(jitter=JITTER, blur_p=0.1, solarize_p=0.2)),
}


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


def sample_views(rng, height, width, area, size):
    """Two views of an image of height x width pixels: [(box, flip, size), ...]."""
    return [(random_box(rng, height, width, area), rng.random() < 0.5, size) for _ in range(2)]


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


# --- 3. Model ------------------------------------------------------------------------------------------------------


def mlp(*widths):
    """The projector: linear layers, each but the last with batch normalisation and ReLU. Appendix B.1."""
    layers = []
    for i, o in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False))


class VICReg(nn.Module):
    """backbone: images (B, 3, H0, W0) -> maps (B, N, D), pooled (B, D = backbone.dim); widths: the projector's."""

    def __init__(self, backbone, widths=(8192, 8192, 8192), num_classes=0):
        super().__init__()
        self.backbone, self.projector = backbone, mlp(backbone.dim, *widths)
        self.probe = nn.Linear(backbone.dim, num_classes) if num_classes else None

    def forward(self, x_a, x_b):
        """Views (B, 3, H0, W0) -> embeddings z_a, z_b (B, widths[-1]) and the probe's logits (B, classes) or None."""
        (_, y_a), (_, y_b) = self.backbone(x_a), self.backbone(x_b)  # representations (B, D)
        logits = self.probe(y_a.detach()) if self.probe else None
        return self.projector(y_a), self.projector(y_b), logits


# --- 4. Training ---------------------------------------------------------------------------------------------------

RECIPES = {  # chosen by --data; any other data set gets imagenet's
    "imagenet": dict(arch="resnet50", size=224, projector="8192-8192-8192", epochs=1000, batch_size=2048, base_lr=0.2,
                     final_lr=0.002, weight_decay=1e-6, warmup_epochs=10),  # Appendix B.1
    "imagenet100": dict(arch="resnet50", size=224, projector="8192-8192-8192", epochs=400, batch_size=1024, base_lr=0.1,
                        final_lr=0.0, weight_decay=1e-4, warmup_epochs=10, views="released"),
    "cifar10": dict(arch="resnet34", size=32, projector="4096-128", epochs=600, batch_size=1024, base_lr=0.3,
                    final_lr=0.0, weight_decay=1e-4, warmup_epochs=10, views="released"),
    "cifar100": dict(arch="resnet34", size=32, projector="4096-512", epochs=600, batch_size=1024, base_lr=0.3,
                     final_lr=0.0, weight_decay=1e-4, warmup_epochs=10, views="released"),
    "shapes": dict(arch="tiny_convnet", size=64, projector="1024-1024-1024", epochs=7, batch_size=128, base_lr=8.0,
                   final_lr=0.0, weight_decay=1e-6, warmup_epochs=1),
}


def train(args):
    import functools

    import common
    import training
    from evaluate import knn_report

    device = training.set_up(args.seed)
    data = common.open_data(args.data, "train", args.size)
    backbone = common.build_backbone(args.arch, args.size)
    widths = [int(w) for w in args.projector.split("-")]
    model, ddp = training.distribute(VICReg(backbone, widths, len(data.classes)), device)
    optimizer = training.LARS(model.parameters(), weight_decay=args.weight_decay)
    run = training.Run(args, model, optimizer, data, device)
    area, *colours = VIEWS[args.views]
    colour_a, colour_b = (common.Photometric(**colour) for colour in colours)

    for batch in run.batches(functools.partial(sample_views, area=area, size=args.size)):
        generator = training.seed_step(args.seed, run.step)
        x_a, x_b = (colour(x, generator) for colour, x in zip((colour_a, colour_b), batch.views))
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            z_a, z_b, logits = ddp(x_a, x_b)
        loss, parts = vicreg_loss(z_a, z_b, args.inv_coeff, args.var_coeff, args.cov_coeff)
        probe_loss, accuracy = training.probe(logits, batch.labels)
        lr = run.set_lr()
        optimizer.zero_grad()
        (loss + probe_loss).backward()
        optimizer.step()
        run.log(loss=loss, **parts, std=z_a.detach().float().std(0).mean(), **accuracy, lr=lr)

    knn_report(args, model.backbone, run.folder / "knn.json", device)


def main():
    import training

    with training.one_line_errors():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--projector", help="widths of its layers")
        parser.add_argument("--views", default="paper", choices=VIEWS)
        parser.add_argument("--inv-coeff", type=float, default=25.0)
        parser.add_argument("--var-coeff", type=float, default=25.0)
        parser.add_argument("--cov-coeff", type=float, default=1.0)
        train(training.parse_args(parser, RECIPES))


if __name__ == "__main__":
    main()
