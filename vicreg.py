# SPDX-License-Identifier: MIT
r"""VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning.

Adrien Bardes, Jean Ponce, Yann LeCun. arXiv:2105.04906v1 (ICLR 2022: other sections, --views iclr)

Two views of an image should have the same embedding (invariance). Over a batch, each dimension
should keep a standard deviation of one (variance) and no two should say the same (covariance). The
variance term alone prevents collapse: no negatives, momentum encoder, stop-gradient, normalization.

    python vicreg.py                                         # a demonstration, on a CPU
    torchrun --nproc_per_node=8 vicreg.py --data imagenet    # 8 GPUs: the paper's 1000 epochs
    python vicreg.py --data imagenet --batch-size 256 --base-lr 0.5 --epochs 100       # one GPU
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_id=1 --rdzv_backend=c10d \
        --rdzv_endpoint=HOST:29500 vicreg.py --data imagenet # on each of 4 nodes, HOST one of them

    Eqs. (1), (2)  variance      Eq. (5)   invariance       Algorithm 1   vicreg_loss
    Eqs. (3), (4)  covariance    Eq. (6)   vicreg_loss      Appendix B.1  VICReg, RECIPES
    Eq. (7)        train         Eq. (10)  correlation      Appendix B.2  VIEWS

Differences
 1. Eq. (5) sums over dimensions, Algorithm 1 and the released code average: averaged here.
 2. The released code halves the variance term: `--var-coeff 12.5` gives its loss. Its views are
    `--views released`, its final learning rate is 0.001 of the peak (`--final-lr 0.0016`).
 3. Where n < D, Eq. (4) comes from the Gram matrix: the same number. The loss is in float32.
 4. From the released code: no bias in the projector's last layer; residual branches start at zero;
    LARS (eta 0.001) neither decays nor scales biases and normalization; variance and covariance are
    over the batch of all processes; blur of 0.1 to 2 pixels at 224. Ours: in proportion at another
    `--size`; incomplete batches are dropped; only a linear classifier sees labels.
 5. cifar10, cifar100 and imagenet100 follow "Bag of Image Patch Embedding" (Appendix C.1, C.2): its
    learning rates are read as base rates. Those of shapes and small are this project's own.
"""
import argparse
import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import RandomResizedCrop

# --- 1. Views and positions -----------------------------------------------------------------------

JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
SYMMETRIC = 2 * [dict(jitter=JITTER, blur_p=0.5, solarize_p=0.1)]
BYOL = [dict(jitter=JITTER, blur_p=1.0), dict(jitter=JITTER, blur_p=0.1, solarize_p=0.2)]
VIEWS = {  # the crop's share of the image's area; colours of the first and the second view
    "paper": ((0.2, 1.0), SYMMETRIC),
    "iclr": ((0.08, 1.0), SYMMETRIC),
    "released": ((0.08, 1.0), BYOL),
}


def sample_views(image, area, size):
    """Two views of a PIL image, [(box, flip, size), ...], drawn with torch's global generator. box:
    (top, left, height, width) in pixels, its share of the image in `area`; flip: mirrored."""
    ratio = (3 / 4, 4 / 3)  # width to height
    boxes = [RandomResizedCrop.get_params(image, area, ratio) for _ in range(2)]
    return [(box, torch.rand(()).item() < 0.5, size) for box in boxes]


# --- 2. Loss --------------------------------------------------------------------------------------

def float32(x):
    """x in float32 (float64 stays): in half precision, z^T z would overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def all_sum(x):
    """The sum of x over G processes that all go on to compute the same loss from it.

    The loss then has one gradient g with respect to the sum, the same on each process. DDP takes
    the mean of gradients, so x needs G g; through a plain dist.all_reduce it would get g.
    """
    if not dist.is_initialized():
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (x - x.detach())  # adds 0, with gradient G


def all_rows(z):
    """The rows (n/G, D) of each process -> (n, D), those of all, without gradient."""
    if not dist.is_initialized():
        return z.detach()
    rows = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, z.detach().contiguous())
    return torch.cat(rows)


def twice_the_gradient(x):
    return 2 * x - x.detach()


def moments(z):
    """z (n/G, D) minus its mean over all n rows of the global batch, variances (D,), n. Eq. (2).
    Raises RuntimeError on every process where they hold unequal numbers of rows."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    count = z.new_zeros(world)
    count[rank] = len(z)
    # No gradient goes through the mean. It would cancel, as the centred rows sum to zero.
    total = all_sum(torch.cat([z.detach().sum(0), count]))  # (D + G,)
    total, count = total.split([z.shape[1], world])
    torch._assert_async((count == count[0]).all(), "the processes hold batches of unequal size")

    n = len(z) * world
    z = z - total / n
    var = all_sum(z.square().sum(0)) / (n - 1)  # (D,)
    return z, var, n


def hinge(var, gamma=1.0, eps=1e-4):
    """Variances (D,) -> how far standard deviations are below gamma, on average. Eq. (1)."""
    return F.relu(gamma - torch.sqrt(var + eps)).mean()


def off_diagonal(z, var, n):
    """Sum of squared off-diagonal covariances, / D, from moments(z). Eqs. (3), (4). With
    C = z^T z / (n - 1) and S = z z^T / (n - 1), ||C||_F = ||S||_F: the smaller one serves."""
    d = z.shape[1]
    with torch.autocast(z.device.type, enabled=False):
        if n >= d:
            c = all_sum(z.T @ z) / (n - 1)  # (D, n/G) (n/G, D) -> (D, D)  Eq. (3)
            squares = c.square().sum()
        else:
            s = z @ all_rows(z).T / (n - 1)  # (n/G, D) (D, n) -> (n/G, n): some rows of S
            # d||S||^2 = 2 <S, dz z^T + z dz^T>: two equal halves, and all_rows() passes on one.
            squares = all_sum(twice_the_gradient(s.square().sum()))
    return (squares - var.square().sum()) / d  # the diagonal of C holds the variances.  Eq. (4)


def invariance(z_a, z_b):
    """Mean squared error of two views' embeddings (n/G, D). Eq. (5), averaged as in Algorithm 1."""
    if z_a.shape != z_b.shape:
        raise ValueError(f"embeddings of different shapes: {list(z_a.shape)}, {list(z_b.shape)}")
    return F.mse_loss(float32(z_a), float32(z_b))


def variance(z, gamma=1.0, eps=1e-4):
    """Hinge on the standard deviation of z (n/G, D) over the global batch. Eqs. (1), (2)."""
    _, var, _ = moments(float32(z))
    return hinge(var, gamma, eps)


def covariance(z):
    """Sum of squared off-diagonal covariances of z (n/G, D), / D. Once differentiable. Eq. (4)."""
    return off_diagonal(*moments(float32(z)))


def vicreg_loss(z_a, z_b, inv_coeff=25.0, var_coeff=25.0, cov_coeff=1.0, gamma=1.0):
    """Eq. (6) as Algorithm 1 writes it; lambda, mu, nu: inv_, var_ and cov_coeff; gamma: hinge().

    Embeddings z_a, z_b (n/G, D), n > 1 -> the loss, and its terms, unweighted. A collective of G
    processes: var and cov are those of all n rows, and the gradient that DDP averages is that of
    one process with all rows. Once differentiable. Raises RuntimeError as moments() does.
    """
    inv = invariance(z_a, z_b)
    z_a, var_a, n = moments(float32(z_a))
    z_b, var_b, n = moments(float32(z_b))
    var = hinge(var_a, gamma) + hinge(var_b, gamma)
    cov = off_diagonal(z_a, var_a, n) + off_diagonal(z_b, var_b, n)
    loss = inv_coeff * inv + var_coeff * var + cov_coeff * cov
    return loss, {"inv": inv, "var": var, "cov": cov}


def correlation(y):
    """Mean squared correlation of dimensions of one view's representations y (B, D). Eq. (10)."""
    y = y.float().T
    y = F.normalize(y - y.mean(1, keepdim=True))  # (D, B); a constant dimension is 0
    c = y @ y.T  # (D, B) (B, D) -> (D, D)
    d = len(c)
    return c.square().fill_diagonal_(0).sum() / (d * (d - 1))


# --- 3. Model -------------------------------------------------------------------------------------

def widths(text):
    return [int(width) for width in text.split("-")]


def mlp(*widths, norm=nn.BatchNorm1d):
    """The projector: linear layers; normalization and ReLU after all but the last."""
    layers = []
    for i, o in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(i, o), norm(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False))


class VICReg(nn.Module):
    """Backbone, projector and linear classifier. Appendix B.1; normalization: Table 4b."""

    def __init__(self, backbone, widths=(8192, 8192, 8192), num_classes=0, normalization=()):
        super().__init__()
        self.backbone = backbone  # images -> maps (B, N, D), representations (B, D), with D = .dim
        norm = nn.Identity if "no-bn" in normalization else nn.BatchNorm1d
        self.projector = mlp(backbone.dim, *widths, norm=norm)
        if "standardize" in normalization:
            self.projector.append(nn.BatchNorm1d(widths[-1], affine=False))
        if "l2" in normalization:  # |z| = sqrt(D): gamma stays 1, Eq. (5) becomes 2 + 2 Eq. (9)
            self.projector.append(nn.RMSNorm(widths[-1], elementwise_affine=False))
        self.probe = nn.Linear(backbone.dim, num_classes) if num_classes else None

    def forward(self, x_a, x_b):
        """Views (B, 3, H0, W0) -> embeddings (B, widths[-1]) of both, and of the first view the
        representations (B, D), detached, and logits (B, classes) or None."""
        _, y_a = self.backbone(x_a)
        _, y_b = self.backbone(x_b)
        logits = self.probe(y_a.detach()) if self.probe else None
        return self.projector(y_a), self.projector(y_b), y_a.detach(), logits


# --- 4. Training ----------------------------------------------------------------------------------

RESNET50 = dict(arch="resnet50", size=224, projector="8192-8192-8192", warmup_epochs=10)
CIFAR = dict(arch="resnet34", size=32, projector="4096-128", epochs=600, batch_size=1024,
             base_lr=0.3, final_lr=0.0, weight_decay=1e-4, warmup_epochs=10, views="released")
RECIPES = {  # chosen by --data, or by the number of its images; every flag overrides it
    "imagenet": RESNET50 | dict(epochs=1000, batch_size=2048, base_lr=0.2, final_lr=0.002,
                                weight_decay=1e-6),  # Appendix B.1
    "imagenet100": RESNET50 | dict(epochs=400, batch_size=1024, base_lr=0.1, final_lr=0.0,
                                   weight_decay=1e-4, views="released"),
    "small": RESNET50 | dict(arch="resnet18", size=160, projector="2048-2048-2048", epochs=400,
                             batch_size=128, base_lr=0.8, final_lr=0.0, weight_decay=1e-6),
    "cifar10": CIFAR,
    "cifar100": CIFAR | dict(projector="4096-512"),
    "shapes": dict(arch="tiny_convnet", size=64, projector="1024-1024-1024", epochs=5,
                   batch_size=128, base_lr=8.0, final_lr=0.0, weight_decay=1e-6, warmup_epochs=1),
}


def train(args):
    import common
    import training
    device = training.set_up(args.seed)
    data = common.open_data(args.data, "train", args.size)
    backbone = training.build_backbone(args)
    model = VICReg(backbone, args.projector, len(data.classes), args.normalization)
    model, ddp = training.distribute(model, device)
    optimizer = training.LARS(model.parameters(), weight_decay=args.weight_decay)
    run = training.Run(args, model, optimizer, data, device)  # resumes

    area, colours = VIEWS[args.views]
    colours = [common.Photometric(**colour, size=args.size) for colour in colours]
    sample = functools.partial(sample_views, area=area, size=args.size)
    coefficients = args.inv_coeff, args.var_coeff, args.cov_coeff, args.gamma
    for batch in run.batches(sample):
        x_a, x_b = common.recolour(colours, batch.views)

        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            z_a, z_b, y_a, logits = ddp(x_a, x_b)
        loss, parts = vicreg_loss(z_a, z_b, *coefficients)
        probe_loss, accuracy = training.probe(logits, batch.labels)

        lr = run.set_lr()
        optimizer.zero_grad()
        (loss + probe_loss).backward()
        optimizer.step()

        std = z_a.detach().float().std(0).mean()
        run.log(loss=loss, **parts, std=std, corr=correlation(y_a), **accuracy, lr=lr)
        run.end_step()  # saves as time goes by; stops on a signal

    run.finish("knn")


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    flag = parser.add_argument
    flag("--projector", type=widths, metavar="WIDTHS", help="of its layers, like 8192-8192-8192")
    flag("--views", default="paper", choices=VIEWS, help="which version's augmentation")
    flag("--inv-coeff", type=float, default=25.0, help="lambda, weight of the invariance term")
    flag("--var-coeff", type=float, default=25.0, help="mu, weight of the variance term")
    flag("--cov-coeff", type=float, default=1.0, help="nu, weight of the covariance term")
    flag("--gamma", type=float, default=1.0, help="standard deviation aimed at, Eq. (1)")
    flag("--normalization", nargs="+", default=[], choices=["standardize", "l2", "no-bn"],
         help="Table 4b: of the embeddings, two ways; none in the projector")
    try:
        from training import launch
    except ModuleNotFoundError:
        parser.parse_args()  # so that --help works where this file lies alone
        parser.error("training needs common.py and training.py beside this file")
    launch(train, parser, RECIPES)


if __name__ == "__main__":
    main()
