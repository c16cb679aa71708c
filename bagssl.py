# SPDX-License-Identifier: MIT
r"""BagSSL: Bag of Image Patch Embedding Behind the Success of Self-Supervised Learning.

Yubei Chen, Adrien Bardes, Zengyi Li, Yann LeCun. TMLR 2023, arXiv:2206.08954

Joint-embedding methods learn which patches occur together in an image. So each view is a patch of
one fixed scale, and two patches of an image should have similar projections z. Four objectives keep
all z from being the same: VICReg, total coding rate (TCR), SimCLR and the spectral loss. The image
is then a bag: the mean of its patches' embeddings, before the projector (names as in Appendix D).

    python bagssl.py                                         # a demonstration, on a CPU
    python bagssl.py --data cifar10 --loss tcr               # one GPU; or vicreg, simclr, spectral
    torchrun --nproc_per_node=8 bagssl.py --data imagenet    # 8 GPUs: the paper's 800 epochs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_id=1 --rdzv_backend=c10d \
        --rdzv_endpoint=HOST:29500 bagssl.py --data imagenet # on each of 4 nodes, HOST one of them
    python -m evaluate bag --checkpoint runs/bagssl-shapes --bags 1 16    # accuracy of bags

    Eq. (6)  spectral_loss     Appendix C.1-C.3  RECIPES, bag_loss, total_coding_rate, nt_xent
    Eq. (7)  off_diagonal      Appendix C.4      local_aggregation
    In vicreg_loss and all it calls, Eqs. and Algorithm 1 are those of VICReg, arXiv:2105.04906v1.

Differences
 1. Written from the appendix alone, which lacks TCR's formula (here that of EMP-SSL,
    arXiv:2304.03977), the patches' scale (0.2 of the area; on CIFAR 14 x 14 of 32 x 32, as E has
    it for CIFAR-10), and whether the bag normalizes embeddings before it takes their mean (no).
 2. EMP-SSL's similarity is that of a patch to the mean of the image's patches; ours is between
    patches. With `--patches` above 2, the loss is the mean over all pairs, as Eq. (6) is about
    pairs, and BYOL's two colour augmentations take turns. All patches are one batch for BatchNorm.
 3. A patch is a square, as in Appendix D: 71 x 71 of 224 x 224 has 0.1 of the image's area. BYOL's
    augmentations (C.1-C.3): here its colours and flips; `--patch-scale 0.08-1` adds its crops.
 4. Eq. (6) is estimated without bias: its second mean leaves out the pairs of the first. As in
    Appendix B its z have length one: without that, 8192 dimensions start at a loss of 1e5.
 5. The first equality of Eq. (7) holds up to the constant N - d; 1/d I_N below it must be N/d I_d.
 6. TCR's lambda is 0.234 D by default: C.1 has 30 for 128 dimensions, C.2 has 1920 for 8192. For
    CIFAR-100's 512 dimensions C.1 has 30 too; its recipe follows that.
 7. C.4's 5 x 5 maps give 2 x 2 windows. Here 4 x 4 maps do so too, with smaller ones at the border.
 8. Learning rates are read as base rates. The recipes of shapes and small are our own. As in
    vicreg.py: no bias in the projector's last layer, residual branches start at zero, incomplete
    batches are dropped, blur, float32 losses, LARS, a linear classifier (here on detached bags).
"""
import argparse
import functools
import itertools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.transforms import RandomResizedCrop

# --- 1. Views and positions -----------------------------------------------------------------------

JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
COLOURS = [dict(jitter=JITTER, blur_p=1.0), dict(jitter=JITTER, blur_p=0.1, solarize_p=0.2)]  # BYOL


def sample_patches(image, area, patches, size):
    """Random patches of a PIL image, [(box, flip, size), ...], drawn with torch's global generator.
    box: (top, left, height, width) in pixels, its share of the image in the range `area`, a square
    where that is one number; flip: mirrored left to right; size: the view's side in pixels."""
    ratio = (1, 1) if area[0] == area[1] else (3 / 4, 4 / 3)
    boxes = [RandomResizedCrop.get_params(image, area, ratio) for _ in range(patches)]
    return [(box, torch.rand(()).item() < 0.5, size) for box in boxes]


def patch_grid(image, scale, count, size):
    """A dense grid of `count` patches, as sample_patches() gives them; a single one is central.

    Each has the share `scale` of the image's area. Raises ValueError unless `count` is a square.
    """
    grid = math.isqrt(count)
    if count < 1 or grid**2 != count:
        raise ValueError(f"{count} patches are no square grid")
    side = round(math.sqrt(scale * image.height * image.width))
    side = min(side, image.height, image.width)
    shares = [i / (grid - 1) for i in range(grid)] if grid > 1 else [0.5]
    tops = [round(share * (image.height - side)) for share in shares]
    lefts = [round(share * (image.width - side)) for share in shares]
    corners = itertools.product(tops, lefts)
    return [((top, left, side, side), False, size) for top, left in corners]


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
    """z (n/G, D) minus its mean over all processes' n rows, variances (D,), n. VICReg Eq. (2).

    Raises RuntimeError on every process where they hold unequal numbers of rows.
    """
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
    """Variances (D,) -> how far standard deviations are below gamma, on average. VICReg Eq. (1)."""
    return F.relu(gamma - torch.sqrt(var + eps)).mean()


def off_diagonal(z, var, n):
    """Sum of squared off-diagonal covariances, / D, from moments(z). VICReg Eqs. (3), (4).

    With C = z^T z / (n - 1) and S = z z^T / (n - 1), ||C||_F = ||S||_F: the smaller one serves.
    This duality is BagSSL's Eq. (7), whose Z has the embeddings as columns: it is our z^T.
    """
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
    """Mean squared error of patches' projections (n/G, D). VICReg Eq. (5), as in Algorithm 1."""
    if z_a.shape != z_b.shape:
        raise ValueError(f"embeddings of different shapes: {list(z_a.shape)}, {list(z_b.shape)}")
    return F.mse_loss(float32(z_a), float32(z_b))


def vicreg_loss(z_a, z_b, inv_coeff=25.0, var_coeff=25.0, cov_coeff=1.0, gamma=1.0):
    """VICReg Eq. (6), as in Algorithm 1; lambda, mu, nu: inv_, var_, cov_coeff; gamma: hinge().

    Projections z_a, z_b (n/G, D), n > 1 -> the loss, and its terms, unweighted. A collective: var
    and cov are those of all n rows. Once differentiable; raises as moments() does. Training calls
    vicreg_of_bag(), its mean over pairs of patches.
    """
    inv = invariance(z_a, z_b)
    z_a, var_a, n = moments(float32(z_a))
    z_b, var_b, n = moments(float32(z_b))
    var = hinge(var_a, gamma) + hinge(var_b, gamma)
    cov = off_diagonal(z_a, var_a, n) + off_diagonal(z_b, var_b, n)
    loss = inv_coeff * inv + var_coeff * var + cov_coeff * cov
    return loss, {"inv": inv, "var": var, "cov": cov}


class Gather(torch.autograd.Function):
    """all_rows() with gradient: what the losses of all processes ask of a row is added up."""

    @staticmethod
    def forward(ctx, z):
        moments(z[:, :1])  # raises where numbers of rows are unequal; one column is enough
        return all_rows(z)

    @staticmethod
    def backward(ctx, grad):
        if not dist.is_initialized():
            return grad
        total = all_sum(grad.contiguous())  # (n, D)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def total_coding_rate(z, eps=0.2):
    """1/2 logdet(I + D / (n eps) z^T z) of rows z (n/G, D) of length one: the volume they span.

    In nats, the same on all processes. A collective, once differentiable; raises as moments() does.
    """
    rows = Gather.apply(float32(z))  # (n, D)
    n, d = rows.shape
    with torch.autocast(z.device.type, enabled=False):
        # z^T z and z z^T have the same eigenvalues but for zeros, which add log 1: the smaller one.
        x = rows.T if n >= d else rows
        # d<S, x x^T> = 2 <S, dx x^T>, S symmetric: two equal halves, and x.detach() passes on one.
        product = twice_the_gradient(x @ x.detach().T)  # (D, n) (n, D) or (n, D) (D, n)
        identity = torch.eye(len(product), dtype=rows.dtype, device=rows.device)
        root = torch.linalg.cholesky_ex(identity + d / (n * eps) * product).L
    return root.diagonal().log().sum()  # half of the logarithm of det = det(root)^2


def nt_xent(z_a, z_b, temperature=0.1):
    """SimCLR's loss: each of 2n projections finds its partner among the 2n - 1 others, by cosine.

    z_a, z_b (n/G, D) -> the mean over this process's 2n/G. A collective, as total_coding_rate() is.
    """
    z = torch.stack([z_a, z_b]).flatten(0, 1)  # (2n/G, D)
    z = F.normalize(float32(z), dim=1)
    rows = Gather.apply(z)  # (2n, D)
    first = len(z) * dist.get_rank() if dist.is_initialized() else 0  # where z begins in them
    with torch.autocast(z.device.type, enabled=False):
        logits = z @ rows.T / temperature  # (2n/G, D) (D, 2n) -> (2n/G, 2n)
    logits.diagonal(first).fill_(-torch.inf)  # not its own partner
    partner = first + torch.arange(len(z), device=z.device).roll(len(z_a))
    return F.cross_entropy(logits, partner)


def spectral_loss(z_a, z_b, lam=1.0):
    """-E[z_1^T z_2] of one image's patches + lam E[(z_1^T z_2)^2] of independent ones. Eq. (6).

    z_a, z_b (n/G, D) -> the mean over this process's z_a. A collective, as total_coding_rate() is.
    """
    z_a = float32(z_a)
    z_b = float32(z_b)
    rows = Gather.apply(z_b)  # (n, D)
    with torch.autocast(z_a.device.type, enabled=False):
        products = z_a @ rows.T  # (n/G, D) (D, n) -> (n/G, n)
    together = (z_a * z_b).sum(1)  # (n/G,): of one image
    apart = products.square().sum(1) - together.square()  # (n/G,): of n - 1 other images
    return (lam * apart / (len(rows) - 1) - together).mean()


def similarity(z):
    """The mean cosine over all pairs of an image's patches z (P, n/G, D) of length one."""
    p = len(z)
    squares = z.sum(0).square().sum(1)  # (n/G,): |z_1 + ... + z_P|^2 has P ones, each pair twice
    return (squares.mean() - p) / (p * (p - 1))


def vicreg_of_bag(z, inv_coeff=25.0, var_coeff=25.0, cov_coeff=1.0):
    """The mean of vicreg_loss() over all pairs of patches z (P, n/G, D), in a time linear in P."""
    patches = [moments(z_p) for z_p in z]
    inv = 2 * z.var(0).mean()  # the mean of (z_a - z_b)^2 over pairs is twice a variance
    hinges = [hinge(var_p) for _, var_p, _ in patches]
    var = 2 * torch.stack(hinges).mean()
    cov = 2 * torch.stack([off_diagonal(*patch) for patch in patches]).mean()
    loss = inv_coeff * inv + var_coeff * var + cov_coeff * cov
    return loss, {"inv": inv, "var": var, "cov": cov}


def tcr_of_bag(z, lam=None, eps=0.2):
    """-(lam similarity + coding rate) of patches z (P, n/G, D) of length one; lam None: 0.234 D."""
    if lam is None:
        lam = 30 / 128 * z.shape[2]  # Appendices C.1 and C.2
    sim = similarity(z)
    tcr = torch.stack([total_coding_rate(z_p, eps) for z_p in z]).mean()
    return -(lam * sim + tcr), {"sim": sim, "tcr": tcr}


def bag_loss(projections, objective="vicreg", *coefficients):
    """The mean of an objective over all pairs of an image's patches -> the loss, and its terms.

    projections: P > 1 tensors (n/G, D); coefficients: of vicreg_of_bag, tcr_of_bag, nt_xent or
    spectral_loss. The terms are unweighted. A collective of G processes: DDP's mean gradient is
    that of one process with all n rows. Once differentiable; raises as moments() does.
    """
    z = float32(torch.stack(list(projections)))  # (P, n/G, D)
    if objective == "vicreg":
        return vicreg_of_bag(z, *coefficients)
    z = F.normalize(z, dim=2)
    if objective == "tcr":
        return tcr_of_bag(z, *coefficients)
    pair_loss = {"simclr": nt_xent, "spectral": spectral_loss}[objective]
    pairs = itertools.combinations(z, 2)
    losses = [pair_loss(z_a, z_b, *coefficients) for z_a, z_b in pairs]
    return torch.stack(losses).mean(), {"sim": similarity(z)}


# --- 3. Model -------------------------------------------------------------------------------------

def widths(text):
    return [int(width) for width in text.split("-")]


def mlp(*widths, norm=nn.BatchNorm1d):
    """The projector: linear layers; batch normalization and ReLU after all but the last."""
    layers = []
    for i, o in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(i, o), norm(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False))


def bag_embedding(patch_embeddings):
    """The image's embedding: the mean of those of its patches. (B, P, D) -> (B, D)."""
    return patch_embeddings.mean(1)


def local_aggregation(maps):
    """Average pooling of maps (B, N, D) with window 3 and stride 2, flattened. Appendix C.4.

    Raises ValueError unless the maps are square.
    """
    side = math.isqrt(maps.shape[1])
    if side**2 != maps.shape[1]:
        raise ValueError(f"maps of {maps.shape[1]} locations are not square")
    maps = rearrange(maps, "b (h w) d -> b d h w", h=side)
    return F.avg_pool2d(maps, min(3, side), 2, ceil_mode=True).flatten(1)


class BagSSL(nn.Module):
    """backbone: images (B, 3, H0, W0) -> maps (B, N, D), embeddings (B, D), with D = .dim"""

    def __init__(self, backbone, widths=(8192, 8192, 8192), num_classes=0):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.dim, *widths)
        self.probe = nn.Linear(backbone.dim, num_classes) if num_classes else None

    def forward(self, patches):
        """P patches (B, 3, H0, W0) of each image -> P projections (B, widths[-1]), and logits of
        the bag of their embeddings, detached, (B, classes) or None."""
        p = len(patches)
        _, y = self.backbone(torch.cat(patches))  # (P B, D)
        bag = bag_embedding(rearrange(y.detach(), "(p b) d -> b p d", p=p))
        logits = self.probe(bag) if self.probe else None
        return self.projector(y).chunk(p), logits


# --- 4. Training ----------------------------------------------------------------------------------

RESNET50 = dict(arch="resnet50", size=224, projector="8192-8192-8192", batch_size=1024, base_lr=0.1,
                final_lr=0.0, warmup_epochs=10)
CIFAR = dict(arch="resnet34", size=32, projector="4096-128", epochs=600, batch_size=1024,
             base_lr=0.3, final_lr=0.0, weight_decay=1e-4, warmup_epochs=10, patch_scale="0.1914")
RECIPES = {  # chosen by --data, or by the number of its images; every flag overrides it
    "imagenet": RESNET50 | dict(epochs=800, weight_decay=1e-6),  # Appendix C.3
    "imagenet100": RESNET50 | dict(epochs=400, weight_decay=1e-4),  # Appendix C.2
    "small": RESNET50 | dict(arch="resnet18", size=160, projector="2048-2048-2048", epochs=400,
                             batch_size=128, base_lr=0.8, weight_decay=1e-6),
    "cifar10": CIFAR,  # Appendix C.1; patches of 14 / 32 of the side
    "cifar100": CIFAR | dict(projector="4096-512", tcr_coeff=30.0),
    "shapes": dict(arch="tiny_convnet", size=48, projector="1024-128", epochs=5, batch_size=128,
                   base_lr=4.0, final_lr=0.0, weight_decay=1e-6, warmup_epochs=1, loss="simclr",
                   temperature=0.2),
}


def parse_scale(text):
    """A share of the image's area, like 0.2, or a range, like 0.08-1 -> (low, high). ValueError."""
    shares = [float(share) for share in text.split("-")]
    low, high = shares[0], shares[-1]
    if len(shares) > 2 or not 0 < low <= high <= 1:
        raise ValueError(f"{text} is no share of an area, and no range of shares")
    return low, high


def train(args):
    import common
    import training
    device = training.set_up(args.seed)
    data = common.open_data(args.data, "train", args.size)
    backbone = training.build_backbone(args)
    model = BagSSL(backbone, args.projector, len(data.classes))
    model, ddp = training.distribute(model, device)
    optimizer = training.LARS(model.parameters(), weight_decay=args.weight_decay)
    run = training.Run(args, model, optimizer, data, device)  # resumes

    sample = functools.partial(sample_patches, area=args.patch_scale, patches=args.patches,
                               size=args.size)
    colours = [common.Photometric(**COLOURS[p % 2], size=args.size) for p in range(args.patches)]
    coefficients = {
        "vicreg": [args.inv_coeff, args.var_coeff, args.cov_coeff],
        "tcr": [args.tcr_coeff, args.tcr_eps],
        "simclr": [args.temperature],
        "spectral": [args.spectral_coeff],
    }[args.loss]

    for batch in run.batches(sample):
        patches = common.recolour(colours, batch.views)

        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            projections, logits = ddp(patches)
        loss, parts = bag_loss(projections, args.loss, *coefficients)
        probe_loss, accuracy = training.probe(logits, batch.labels)

        lr = run.set_lr()
        optimizer.zero_grad()
        (loss + probe_loss).backward()
        optimizer.step()

        z = F.normalize(projections[0].detach().float(), dim=1)
        std = z.std(0).mean()  # at most D^-1/2
        run.log(loss=loss, **parts, std=std, **accuracy, lr=lr)
        run.end_step()  # saves as time goes by; stops on a signal

    run.finish("knn", "bag --bags 1 16 --no-linear", figure="neighbors --scale 0.2 --checkpoint")


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    flag = parser.add_argument
    flag("--projector", type=widths, metavar="WIDTHS", help="of its layers, like 8192-8192-8192")
    objectives = ["vicreg", "tcr", "simclr", "spectral"]
    flag("--loss", default="vicreg", choices=objectives, help="the objective")
    flag("--patches", type=int, default=2, help="of each image")
    flag("--patch-scale", type=parse_scale, default="0.2",
         help="share of the image's area, like 0.2, or a range, like 0.08-1")
    flag("--inv-coeff", type=float, default=25.0, help="vicreg: lambda, of the invariance term")
    flag("--var-coeff", type=float, default=25.0, help="vicreg: mu, of the variance term")
    flag("--cov-coeff", type=float, default=1.0, help="vicreg: nu, of the covariance term")
    flag("--tcr-coeff", type=float, help="tcr: lambda, of similarity; 0.234 a dimension by default")
    flag("--tcr-eps", type=float, default=0.2, help="tcr: epsilon")
    flag("--temperature", type=float, default=0.1, help="simclr: of the cosines")
    flag("--spectral-coeff", type=float, default=1.0, help="spectral: lambda of Eq. (6)")
    try:
        from training import launch
    except ModuleNotFoundError:
        parser.parse_args()  # so that --help works where this file lies alone
        parser.error("training needs common.py and training.py beside this file")
    positive = (1e-3, 1e3)
    launch(train, parser, RECIPES, patches=(2, 256), tcr_eps=positive, temperature=positive)


if __name__ == "__main__":
    main()
