# SPDX-License-Identifier: MIT
r"""VICRegL: Self-Supervised Learning of Local Visual Features.

Adrien Bardes, Jean Ponce, Yann LeCun. NeurIPS 2022. arXiv:2210.01571

VICReg pulls two views of an image together as wholes. VICRegL also pulls together single locations
of their feature maps. Each location is matched twice: by place, with the location of the other view
whose centre is nearest in the original image, and by content, with the one whose feature vector is
nearest. The closest matches of each kind go through VICReg's criterion.

    python vicregl.py                                         # a demonstration, on a CPU
    torchrun --nproc_per_node=8 vicregl.py --data imagenet    # 8 GPUs: ResNet-50, 100 epochs
    torchrun --nproc_per_node=8 vicregl.py --data imagenet --epochs 300 --batch-size 2048 \
        --base-lr 0.2 --final-lr 0.0016                       # and 300 epochs
    torchrun --nproc_per_node=8 vicregl.py --data imagenet --arch convnext_small  # or convnext_base
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_id=1 --rdzv_backend=c10d \
        --rdzv_endpoint=HOST:29500 vicregl.py --data imagenet # on each of 4 nodes, HOST one of them

    Algorithm 1, lines 4-19   train                   Eq. (2)     location_distances, match
    Algorithm 1, lines 21-40  local_criterion         Eq. (4)     vicregl_loss
    Algorithm 1, filter_best  closest                 Appendix C  positions
    Algorithm 1, lines 42-59  vicreg_loss             lines 22-29 alone  --match place

Differences
 1. The released code halves variance and covariance: `--var-coeff 12.5 --cov-coeff 0.5` gives its
    loss. As in vicreg.py, covariances may come from the Gram matrix, and the loss is in float32.
 2. From the released code: the local projector; variance and covariance of local features at each
    index of the matches, which keep the queries' spatial order; both directions of the local
    criterion, averaged; with more than two views the pairs (i, j), i one of the two large ones; and
    what vicreg.py's Difference 4 lists.
 3. Both kinds of match keep the 20 closest, as the paper's figures say. The released code keeps all
    feature matches (`--num-feature-matches 0 0`), and of the location matches 20 in one direction,
    4 in the other, also between two large views. Here the size of the view that queries decides
    (`--num-matches 20 4`). A view with fewer locations matches all that it has.
 4. Positions of a mirrored view are mirrored (Appendix C); in the released code not by default.
 5. All terms are averaged over pairs of views. The released code averages the global variance and
    covariance over views, where large ones weigh less. With two views it is the same.
 6. The release means to train ConvNeXt's local projector at a tenth of the learning rate, but a
    misspelt name matches no parameter. Here as there it has the full rate.
 7. Unsaid in the appendix, ours: vicreg.py's colours; ResNet-50's final learning rate for batches
    of 512; ConvNeXt's 400 epochs and LayerNorm in its projectors; views of one size in one pass, so
    BatchNorm sees all of them; cifar10's 7 matches of 16 locations, about as 20 of 49.
"""
import argparse
import functools
import itertools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import RandomResizedCrop

# --- 1. Views and positions -----------------------------------------------------------------------

JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
COLOURS = [dict(jitter=JITTER, blur_p=0.5, solarize_p=0.1)]  # of every view
TWO = [(2, (0.08, 1.0), 1.0)]  # how many, the crop's share of the image's area, side / --size
LARGE = (2, (0.4, 1.0), 1.0)
SMALL = (6, (0.08, 0.4), 96 / 224)
VIEWS = {"two": TWO, "multicrop": [LARGE, SMALL]}


def sample_views(image, kinds, size):
    """The views of a PIL image, [(box, flip, size), ...], drawn with torch's global generator;
    kinds: of VIEWS; box: (top, left, height, width) in pixels; flip: mirrored left to right."""
    views = []
    for count, area, scale in kinds:
        for _ in range(count):
            box = RandomResizedCrop.get_params(image, area, ratio=(3 / 4, 4 / 3))
            flip = torch.rand(()).item() < 0.5
            views.append((box, flip, round(scale * size)))
    return views


def float32(x):
    """x in float32 (float64 stays): pixels and z^T z need more than half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def positions(boxes, flips, grid):
    """Where the locations of a map have their centres in the original image. Appendix C.

    boxes (B, 4): top, left, height, width in pixels; flips (B,): mirrored left to right
    -> (B, grid, grid, 2): y and x in pixels, for maps of grid x grid locations.
    """
    top, left, height, width = float32(boxes).split(1, 1)  # (B, 1) each
    centres = torch.arange(grid, device=top.device, dtype=top.dtype) + 0.5
    centres = centres / grid  # (grid,), from 0 to 1 in the crop
    y = top + height * centres  # (B, grid)
    x = left + width * centres  # (B, grid)
    x = torch.where(flips[:, None], x.flip(1), x)  # a mirrored view's first column is on the right
    y = y[:, :, None].expand(-1, -1, grid)  # (B, grid, grid)
    x = x[:, None, :].expand(-1, grid, -1)  # (B, grid, grid)
    return torch.stack([y, x], 3)


def map_positions(boxes, flips, maps):
    """boxes (B, V, 4), flips (B, V), maps V x (B, N, D) of square views -> positions V x (B, N, 2).
    Raises ValueError where N is no square."""
    found = {}
    numbers = [features.shape[1] for features in maps]
    for n in set(numbers):  # of all views at once, for fewer launches
        grid = math.isqrt(n)
        if grid**2 != n:
            raise ValueError(f"a map of {n} locations is not square")
        pos = positions(boxes.flatten(0, 1), flips.flatten(), grid)  # (BV, grid, grid, 2)
        found[n] = pos.view(*flips.shape, n, 2)
    return [found[n][:, view] for view, n in enumerate(numbers)]


# --- 2. Loss --------------------------------------------------------------------------------------
# n: images of the global batch; G: processes; B = n/G: images of this one; M: matches of an image

def all_sum(x):
    """The sum of x over G processes that all go on to compute the same loss from it.

    On each process the loss then has the same gradient g with respect to the sum. DDP takes the
    mean of gradients, so x needs the gradient G g; through a plain dist.all_reduce it would get g.
    """
    if not dist.is_initialized():
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (x - x.detach())  # adds 0, with gradient G


def all_rows(z):
    """The rows (n/G, ...) of each process -> (n, ...), those of all, without gradient."""
    if not dist.is_initialized():
        return z.detach()
    rows = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, z.detach().contiguous())
    return torch.cat(rows)


def twice_the_gradient(x):
    return 2 * x - x.detach()


def moments(z):
    """z (n/G, D) minus its mean over all n rows of the global batch, variances (D,), n.

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
    """Variances (K, D) -> (K,): how far standard deviations are below gamma, on average over D."""
    return F.relu(gamma - torch.sqrt(var + eps)).mean(1)


def off_diagonal(z, var, n):
    """Centred z (n/G, K, D), variances (K, D) -> (K,): sums of squared covariances, / D.

    With C = z^T z / (n - 1) and S = z z^T / (n - 1), ||C||_F = ||S||_F: the smaller one serves.
    """
    d = z.shape[2]
    rows = z.transpose(0, 1)  # (K, n/G, D)
    with torch.autocast(z.device.type, enabled=False):
        if n >= d:
            c = all_sum(rows.mT @ rows) / (n - 1)  # (K, D, n/G) (K, n/G, D) -> (K, D, D)
            squares = c.square().sum((1, 2))  # (K,)
        else:
            others = all_rows(z).transpose(0, 1)  # (K, n, D)
            s = rows @ others.mT / (n - 1)  # (K, n/G, D) (K, D, n) -> (K, n/G, n): some rows of S
            # d||S||^2 = 2 <S, dz z^T + z dz^T>: two equal halves, and all_rows() passes on one.
            squares = all_sum(twice_the_gradient(s.square().sum((1, 2))))  # (K,)
    return (squares - var.square().sum(1)) / d  # the diagonal of C holds the variances


def variance_and_covariance(z):
    """The terms of Algorithm 1, lines 47-57: of embeddings z (n/G, D) -> (1,), (1,); of local
    features z (n/G, ..., D), at each of the K indices `...` for itself -> (K,), (K,)."""
    d = z.shape[-1]
    z, var, n = moments(float32(z).flatten(1))  # (n/G, K D), (K D,)
    z = z.unflatten(1, (-1, d))  # (n/G, K, D)
    var = var.unflatten(0, (-1, d))  # (K, D)
    return hinge(var), off_diagonal(z, var, n)


def invariance(z_a, z_b):
    """Mean squared error of two views' embeddings (n/G, ..., D). Algorithm 1, line 44."""
    if z_a.shape != z_b.shape:
        raise ValueError(f"embeddings of different shapes: {list(z_a.shape)}, {list(z_b.shape)}")
    return F.mse_loss(float32(z_a), float32(z_b))


def vicreg_loss(z_a, z_b, inv_coeff=25.0, var_coeff=25.0, cov_coeff=1.0):
    """Algorithm 1, vicreg; lambda, mu and nu are inv_coeff, var_coeff and cov_coeff.

    Embeddings z_a, z_b (n/G, D), n > 1 -> the loss, and its terms, unweighted; of local features
    (n/G, ..., D) their mean over the indices `...`. A collective of G processes: var and cov are
    those of all n rows, and the gradient that DDP averages is that of one process with all rows.
    Once differentiable. Raises RuntimeError as moments() does.
    """
    inv = invariance(z_a, z_b)
    both = torch.stack([z_a, z_b], 1)  # (n/G, 2, ..., D): half of the collectives of two calls
    var, cov = variance_and_covariance(both)  # (2K,), (2K,)
    var = 2 * var.mean()  # mean(var of z_a) + mean(var of z_b)
    cov = 2 * cov.mean()
    loss = inv_coeff * inv + var_coeff * var + cov_coeff * cov
    return loss, {"inv": inv, "var": var, "cov": cov}


@torch.no_grad()
def location_distances(pos_a, pos_b):
    """Distances (..., N, N') in pixels between positions (..., N, 2) and (..., N', 2). Eq. (2)."""
    difference = float32(pos_a).unsqueeze(-2) - float32(pos_b).unsqueeze(-3)  # (..., N, N', 2)
    y, x = difference.unbind(-1)
    return torch.hypot(y, x)  # exact: the same place is at 0


@torch.no_grad()
def feature_distances(map_a, map_b):
    """Distances (..., N, N') between features (..., N, D) and (..., N', D).

    A matrix product is fast, but rounds small distances between features far from zero. So the mean
    of the image is taken off, which changes no distance.
    """
    mean = float32(map_b).mean(-2, keepdim=True)  # (..., 1, D)
    map_a = float32(map_a) - mean
    map_b = float32(map_b) - mean
    return torch.cdist(map_a, map_b, compute_mode="use_mm_for_euclid_dist")


def closest(distances, num_matches=None):
    """The closest pairs of a query and its nearest candidate: filter_best of Algorithm 1.

    distances (..., N, N') -> indices of queries, ascending, and of their candidates, (..., M) each.
    M is num_matches, at most N; None or 0: N. Of equal distances the first wins.
    """
    distance, nearest = distances.min(-1)  # (..., N) each: lines 25 and 34
    if not num_matches:
        num_matches = distance.shape[-1]
    kept = distance.argsort(dim=-1, stable=True)[..., :num_matches]  # (..., M)
    kept = kept.sort(-1).values
    return kept, nearest.gather(-1, kept)


def select(maps, indices):
    """maps (..., N, D) at indices (..., M) -> (..., M, D), much faster than gather()."""
    n, d = maps.shape[-2:]
    rows = maps.flatten(0, -2)  # (... N, D)
    first = torch.arange(0, len(rows), n, device=maps.device)  # row of each map
    index = first.view(*indices.shape[:-1], 1) + indices  # (..., M)
    return rows.index_select(0, index.flatten()).view(*index.shape, d)


def match(query, candidates, distances, num_matches=None):
    """Each query's nearest candidate, for the num_matches closest pairs, in the queries' order.

    query (..., N, D), candidates (..., N', D), distances (..., N, N') -> (..., M, D), (..., M, D),
    with M as in closest(). Gradients flow to the features, not to the choice.
    """
    kept, nearest = closest(distances, num_matches)
    return select(query, kept), select(candidates, nearest)


def weighted_sum(*criteria):
    """Of (weight, (loss, terms)), ...: the sum of weight * loss, and the sums of weight * term."""
    total = 0.0
    for weight, (loss, terms) in criteria:
        total = total + weight * torch.stack([loss, *terms.values()])  # (4,)
    loss, inv, var, cov = total.unbind()
    return loss, {"inv": inv, "var": var, "cov": cov}


def local_criterion(map_a, map_b, pos_a, pos_b, num_matches=20, num_feature_matches=20,
                    inv_coeff=25.0, var_coeff=25.0, cov_coeff=1.0, match_by="both"):
    """Algorithm 1, local_criterion: one direction, from a to b.

    maps (B, N, D), pos (B, N, 2) in pixels -> the loss, and its terms, unweighted; of P pairs of
    views, maps (B, P, N, D) and pos (B, P, N, 2), the mean of P losses. num_matches by location,
    num_feature_matches by feature: gamma, how many to keep; None or 0: all. match_by: "place",
    "content" or both. A collective, once differentiable. Raises as vicreg_loss() does.
    """
    coefficients = (inv_coeff, var_coeff, cov_coeff)
    map_a = float32(map_a)
    map_b = float32(map_b)
    criteria = []

    if match_by != "content":  # Location-based loss function: lines 22-29
        distances = location_distances(pos_a, pos_b)
        map_a_filtered, map_a_nn_filtered = match(map_a, map_b, distances, num_matches)
        criteria.append((1, vicreg_loss(map_a_filtered, map_a_nn_filtered, *coefficients)))

    if match_by != "place":  # Feature-based loss function: lines 31-38
        distances = feature_distances(map_a, map_b)
        map_a_filtered, map_a_nn_filtered = match(map_a, map_b, distances, num_feature_matches)
        criteria.append((1, vicreg_loss(map_a_filtered, map_a_nn_filtered, *coefficients)))

    return weighted_sum(*criteria)


def mean_local_criterion(maps, pos, num_matches, num_feature_matches, *options):
    """local_criterion() averaged over the pairs of vicregl_loss() and both directions of each."""
    from_large = (num_matches[0], num_feature_matches[0])
    from_small = (num_matches[-1], num_feature_matches[-1])

    def mean_over(a, b, numbers):
        """The mean over the directions from view a[p] to view b[p]."""
        map_a = torch.stack([maps[view] for view in a], 1)  # (B, P, N, D)
        map_b = torch.stack([maps[view] for view in b], 1)
        pos_a = torch.stack([pos[view] for view in a], 1)  # (B, P, N, 2)
        pos_b = torch.stack([pos[view] for view in b], 1)
        return local_criterion(map_a, map_b, pos_a, pos_b, *numbers, *options)

    between_large = mean_over([0, 1], [1, 0], from_large)
    if len(maps) == 2:
        return between_large
    small = list(range(2, len(maps)))
    i = len(small) * [0] + len(small) * [1]  # each of the two large views
    j = small + small  # with each small one
    to_small = mean_over(i, j, from_large)
    to_large = mean_over(j, i, from_small)
    share = 1 / (len(maps) - 1)  # of the 2 (V - 1) pairs, (0, 1) and (1, 0) are 2
    rest = (1 - share) / 2
    return weighted_sum((share, between_large), (rest, to_small), (rest, to_large))


def mean_global_criterion(z, inv_coeff, var_coeff, cov_coeff):
    """vicreg_loss(z[i], z[j]) averaged over the pairs (i, j) of vicregl_loss()."""
    views = len(z)
    z = float32(torch.stack(z, 1))  # (n/G, V, D)
    z_i = z[:, :2, None].expand(-1, -1, views, -1)  # (n/G, 2, V, D)
    z_j = z[:, None].expand_as(z_i)
    inv = invariance(z_i, z_j) * views / (views - 1)  # 0 where j = i

    def mean_over_pairs(terms):
        """Of terms (V,), one a view: a large view is in V of the 2 (V - 1) pairs, a small in 2."""
        return (views * terms[:2].sum() + 2 * terms[2:].sum()) / (2 * (views - 1))

    var, cov = map(mean_over_pairs, variance_and_covariance(z))
    loss = inv_coeff * inv + var_coeff * var + cov_coeff * cov
    return loss, {"inv": inv, "var": var, "cov": cov}


def vicregl_loss(embeddings, maps, pos, alpha=0.75, num_matches=(20, 20),
                 num_feature_matches=(20, 20), inv_coeff=25.0, var_coeff=25.0, cov_coeff=1.0,
                 match_by="both"):
    """Eq. (4): alpha * global + (1 - alpha) * local. Algorithm 1, lines 13-15.

    embeddings V x (B, D), maps V x (B, N, D), pos V x (B, N, 2) in pixels: two large views first
    -> the loss, and the terms of both criteria, unweighted, averaged over pairs of views (i, j), i
    one of the first two, j any other. num_matches, num_feature_matches (of large views, of small
    ones), match_by: see local_criterion(). A collective, once differentiable; see vicreg_loss().
    """
    coefficients = (inv_coeff, var_coeff, cov_coeff)
    loss = 0.0
    parts = {}
    if alpha > 0:
        global_loss, parts = mean_global_criterion(embeddings, *coefficients)
        loss = alpha * global_loss
    if alpha < 1:
        local_loss, local_parts = mean_local_criterion(
            maps, pos, num_matches, num_feature_matches, *coefficients, match_by)
        loss = loss + (1 - alpha) * local_loss
        parts |= {f"local_{name}": term for name, term in local_parts.items()}
    return loss, parts


# --- 3. Model -------------------------------------------------------------------------------------

def widths(text):
    return [int(width) for width in text.split("-")]


def mlp(*widths, norm=nn.BatchNorm1d):
    """A projector: linear layers; normalization and ReLU after all but the last."""
    layers = []
    for i, o in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(i, o), norm(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False))


class VICRegL(nn.Module):
    """Backbone, projector for whole views, local projector for locations, linear classifier.

    backbone: images (B, 3, H0, W0) -> maps (B, N, D), representations (B, D), with D = .dim
    widths, local_widths: of projectors, None where one is not used; norm: their normalization
    """

    def __init__(self, backbone, widths=(8192, 8192, 8192), local_widths=(512, 512, 512),
                 num_classes=0, norm=nn.BatchNorm1d):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.dim, *widths, norm=norm) if widths else None
        self.local_projector = mlp(backbone.dim, *local_widths, norm=norm) if local_widths else None
        self.probe = nn.Linear(backbone.dim, num_classes) if num_classes else None

    def forward(self, views):
        """V views (B, 3, H0, W0), those of one size in a row -> embeddings V x (B, widths[-1]),
        local features V x (B, N, local_widths[-1]), each [] without its projector, and of the first
        view the logits (B, classes) or None."""
        embeddings = []
        maps = []
        representations = []
        for _, group in itertools.groupby(views, key=lambda view: view.shape[2:]):
            group = list(group)  # v views of one size pass together
            features, y = self.backbone(torch.cat(group))  # (vB, N, D), (vB, D)
            representations += y.detach().chunk(len(group))
            if self.projector:
                embeddings += self.projector(y).chunk(len(group))
            if self.local_projector:
                local = self.local_projector(features.flatten(0, 1))  # (vB N, D)
                local = local.unflatten(0, features.shape[:2])  # (vB, N, D)
                maps += local.chunk(len(group))
        logits = self.probe(representations[0]) if self.probe else None
        return embeddings, maps, logits


# --- 4. Training ----------------------------------------------------------------------------------

CONVNEXT = dict(size=224, views="multicrop", projector="8192-8192-8192", epochs=400,
                final_lr=1.125e-6, weight_decay=0.05, warmup_epochs=10, drop_path=0.1)
RECIPES = {  # chosen by --arch or its family, else by --data, else imagenet's; a flag overrides it
    "convnext": CONVNEXT | dict(arch="convnext_small", batch_size=384, base_lr=0.00075),
    "convnext_base": CONVNEXT | dict(arch="convnext_base", batch_size=576, base_lr=0.0005),
    "imagenet": dict(arch="resnet50", size=224, projector="8192-8192-8192", epochs=100,
                     batch_size=512, base_lr=0.3, final_lr=0.0006, weight_decay=1e-6,
                     warmup_epochs=10),
    "small": dict(arch="resnet18", size=160, projector="2048-2048-2048", epochs=400, batch_size=128,
                  base_lr=0.8, final_lr=0.0, weight_decay=1e-6, warmup_epochs=10,
                  num_matches=[10, 10], num_feature_matches=[10, 10]),
    "cifar10": dict(arch="resnet34", size=32, projector="4096-128", local_projector="512-512-128",
                    epochs=600, batch_size=1024, base_lr=0.3, final_lr=0.0, weight_decay=1e-4,
                    warmup_epochs=10, num_matches=[7, 7], num_feature_matches=[7, 7]),
    "shapes": dict(arch="tiny_convnet", size=64, projector="1024-1024-1024",
                   local_projector="128-128", epochs=4, batch_size=128, base_lr=8.0, final_lr=0.0,
                   weight_decay=1e-6, warmup_epochs=1),
}


def make_optimizer(arch, model, weight_decay):
    """LARS; for a ConvNeXt AdamW, which decays no bias and no normalization."""
    import training
    if not arch.startswith("convnext"):
        return training.LARS(model.parameters(), weight_decay=weight_decay)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return torch.optim.AdamW([dict(params=matrices, weight_decay=weight_decay),
                              dict(params=vectors, weight_decay=0.0)], fused=True)


def train(args):
    import common
    import training
    device = training.set_up(args.seed)
    data = common.open_data(args.data, "train", args.size)
    kinds = VIEWS[args.views]
    backbone = training.build_backbone(args)
    for _, _, scale in kinds:
        common.grid_of(round(scale * args.size), backbone.stride)  # positions need a whole grid
    projector = args.projector if args.alpha > 0 else None
    local_projector = args.local_projector if args.alpha < 1 else None
    norm = nn.LayerNorm if args.arch.startswith("convnext") else nn.BatchNorm1d
    model = VICRegL(backbone, projector, local_projector, len(data.classes), norm)
    model, ddp = training.distribute(model, device)
    optimizer = make_optimizer(args.arch, model, args.weight_decay)
    run = training.Run(args, model, optimizer, data, device)  # resumes

    colours = itertools.repeat(common.Photometric(**COLOURS[0], size=args.size))
    sample = functools.partial(sample_views, kinds=kinds, size=args.size)
    for batch in run.batches(sample):
        views = common.recolour(colours, batch.views)

        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            embeddings, maps, logits = ddp(views)
        pos = map_positions(batch.boxes, batch.flips, maps)
        loss, parts = vicregl_loss(embeddings, maps, pos, args.alpha, args.num_matches,
                                   args.num_feature_matches, args.inv_coeff, args.var_coeff,
                                   args.cov_coeff, args.match)
        probe_loss, accuracy = training.probe(logits, batch.labels)

        lr = run.set_lr()
        optimizer.zero_grad()
        (loss + probe_loss).backward()
        optimizer.step()

        if embeddings:
            parts["std"] = embeddings[0].detach().float().std(0).mean()
        run.log(loss=loss, **parts, **accuracy, lr=lr)
        run.end_step()  # saves as time goes by; stops on a signal

    run.finish("knn", "correspond", figure="matches --checkpoint")


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    flag = parser.add_argument
    flag("--projector", type=widths, metavar="WIDTHS", help="of its layers, like 8192-8192-8192")
    flag("--local-projector", type=widths, metavar="WIDTHS", default="512-512-512",
         help="the same, for single locations")
    flag("--views", default="two", choices=VIEWS, help="two views, or two large and six small ones")
    flag("--alpha", type=float, default=0.75, help="weight of the global criterion, from 0 to 1")
    numbers = dict(type=int, nargs=2, default=[20, 20], metavar=("LARGE", "SMALL"))
    flag("--num-matches", **numbers, help="location matches from a large, a small view; 0: all")
    flag("--num-feature-matches", **numbers, help="the same for feature matches")
    flag("--match", default="both", choices=["place", "content", "both"], help="locations by what")
    flag("--inv-coeff", type=float, default=25.0, help="lambda, weight of the invariance term")
    flag("--var-coeff", type=float, default=25.0, help="mu, weight of the variance term")
    flag("--cov-coeff", type=float, default=1.0, help="nu, weight of the covariance term")
    flag("--drop-path", type=float, default=0.0, help="rate, of ConvNeXt and ViT")
    try:
        from training import launch
    except ModuleNotFoundError:
        parser.parse_args()  # so that --help works where this file lies alone
        parser.error("training needs common.py and training.py beside this file")
    launch(train, parser, RECIPES, alpha=(0, 1), drop_path=(0, 0.9))


if __name__ == "__main__":
    main()
