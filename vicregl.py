"""VICRegL: Self-Supervised Learning of Local Visual Features.

Adrien Bardes, Jean Ponce, Yann LeCun. NeurIPS 2022. arXiv:2210.01571

VICReg pulls two views of an image together as wholes. VICRegL also pulls together single locations of their feature
maps, matched in two ways: by place (the location of the other view whose centre lies nearest in the original image) and
by content (the location whose feature vector is nearest). The closest matches of each kind go through VICReg's
criterion, one batch for each of them; `alpha` weighs the global against the local criterion.

    python vicregl.py                                                  # a demonstration: scenes made in memory, on a CPU
    python vicregl.py --data imagenet --batch-size 256                 # one GPU
    torchrun --nproc_per_node=8 vicregl.py --data imagenet             # eight: the paper's ResNet-50, 100 epochs
    torchrun --nproc_per_node=8 vicregl.py --data imagenet --epochs 300 --batch-size 2048 --base-lr 0.2 \
        --final-lr 0.0016                                              # and 300 epochs
    torchrun --nproc_per_node=8 vicregl.py --data imagenet --arch convnext_small                      # its ConvNeXt
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 vicregl.py --data imagenet

    Algorithm 1, vicreg           vicreg_loss                    Appendix C   positions
    Algorithm 1, local_criterion  local_criterion (with Eq. 2)   Eq. (4)      vicregl_loss
    Algorithm 1, filter_best      closest, match

Differences
 1. The released code halves variance and covariance: `--var-coeff 12.5 --cov-coeff 0.5` gives its loss. As in vicreg.py,
    the off-diagonal sum comes from the smaller of covariance and Gram matrix, in float32; statistics are over the batch of
    all processes; no bias in a projector's last layer; each residual branch starts at zero; LARS neither decays nor scales
    biases and normalisation.
 2. Unsaid in the paper, from the released code: variance and covariance of local features are taken over the batch at
    each index of the matches, in the queries' spatial order, then averaged; the local criterion is the mean of its two
    directions; with more than two views the pairs are (i, j), i one of the two large views.
 3. Both kinds of match keep the 20 closest, as the paper's figures say. The released code keeps all feature matches:
    `--num-feature-matches 0`; and 20 location matches in one direction, 4 in the other, where there are small views. Here
    the size of the querying view decides: `--num-matches 20 4`. A view with fewer locations matches all it has.
 4. Positions of a flipped view are flipped (Appendix C); the released code does not by default.
 5. The released code averages the global variance and covariance over views; here, as all terms, over pairs of views,
    in which the two large ones weigh more. For two views it is the same.
 6. Views of one size pass the network together, so BatchNorm's statistics are over all of them.
 7. Unsaid in the appendix, ours: all views have vicreg.py's colour augmentation; the final learning rate is 0.001 of the
    peak for ResNet-50 at batch 512 too; ConvNeXt trains for 400 epochs, with LayerNorm in both projectors.
 8. cifar10 follows vicreg.py's recipe but for the colours, with 7 matches of its 16 locations, about the share that 20 is
    of 49; shapes and tiny_convnet are this project's own. An incomplete last batch of an epoch is dropped.
 9. A linear classifier on detached representations reports accuracy while training; nothing else sees the labels.
"""
import argparse
import functools
import itertools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# --- 1. Views and positions ----------------------------------------------------------------------------------------

JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
VIEWS = {  # of each kind of view, large ones first: how many, the crop's share of the image's area, its side in --size
    "two": [(2, (0.08, 1.0), 1)],
    "multicrop": [(2, (0.4, 1.0), 1), (6, (0.08, 0.4), 96 / 224)],
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


def sample_views(rng, height, width, kinds, size):
    """The views of an image of height x width pixels: [(box, flip, size), ...]; kinds: one of VIEWS."""
    return [(random_box(rng, height, width, area), rng.random() < 0.5, round(scale * size))
            for count, area, scale in kinds for _ in range(count)]


def positions(boxes, flips, grid):
    """Centre of each location of a view's feature map, as (y, x) in pixels of the original image. Appendix C.

    boxes (B, 4): top, left, height, width in pixels; flips (B,): mirrored left to right -> (B, grid, grid, 2).
    """
    top, left, height, width = boxes[..., None].unbind(1)  # (B, 1) each
    centers = (torch.arange(grid, device=boxes.device, dtype=boxes.dtype) + 0.5) / grid  # (grid,) in units of the crop
    y = top + height * centers  # (B, grid)
    x = left + width * torch.where(flips[:, None], centers.flip(0), centers)  # (B, grid)
    return torch.stack([y[:, :, None].expand(-1, -1, grid), x[:, None, :].expand(-1, grid, -1)], 3)


def map_positions(boxes, flips, maps):
    """boxes (B, V, 4), flips (B, V), maps V x (B, N, D) -> the positions of their locations, V x (B, N, 2)."""
    return [positions(box, flip, math.isqrt(m.shape[1])).flatten(1, 2)  # (B, H, W, 2) -> (B, N, 2)
            for box, flip, m in zip(boxes.unbind(1), flips.unbind(1), maps)]


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
    """Mean and variance of each entry over the rows z (B/G, ...) of all processes, and B.

    Raises RuntimeError where processes hold unequal numbers of rows.
    """
    var, mean = torch.var_mean(z, 0, correction=0)  # keeps only z for the backward pass, where z - mean would be a copy
    if not dist.is_initialized():
        return mean, var * len(z) / (len(z) - 1), len(z)
    n = len(z) * dist.get_world_size()
    total = all_sum(torch.cat([len(z) * mean.flatten(), z.new_full((1,), len(z))]))  # (D + 1,) or (M D + 1,)
    torch._assert_async(total[-1] == n, "the processes hold batches of unequal size")  # the GPU is not waited for
    mean_of_all = total[:-1].view_as(mean) / n
    var = var + (mean - mean_of_all).square()  # (D,) or (M, D): about the mean of all
    return mean_of_all, all_sum(len(z) * var) / (n - 1), n


def invariance(z_a, z_b):
    """Mean squared error between the embeddings of two views. Algorithm 1, line 44."""
    return F.mse_loss(z_a, z_b)


def variance(z, gamma=1.0, eps=1e-4):
    """Hinge on each dimension's standard deviation over the global batch. Algorithm 1, lines 47-49.

    z (B/G, D), or local features (B/G, M, D): statistics over B at each of M matches, then the mean -> scalar.
    """
    _, var, _ = moments(z)
    return F.relu(gamma - torch.sqrt(var + eps)).mean()


def covariance(z):
    """Sum of squared off-diagonal covariances over the global batch, / D. Algorithm 1, lines 52-57.

    z (B/G, D), or local features (B/G, M, D): statistics over B at each of M matches, then the mean -> scalar.
    With C = z^T z / (B - 1) and S = z z^T / (B - 1), ||C||_F = ||S||_F, so the sum is ||C||^2 or ||S||^2, whichever
    matrix is smaller, minus the squared variances. Differentiable once.
    """
    mean, var, n = moments(z)  # (D,) or (M, D); var is the diagonal of C
    z, d = z - mean, z.shape[-1]
    rows = z.transpose(0, -2)  # (B, D) as it is, or (B, M, D) -> (M, B, D)
    if n < d:
        s = rows @ all_rows(z).transpose(0, -2).mT / (n - 1)  # (M, B/G, D) (M, D, B) -> (M, B/G, B): this process's rows
        mine = s.square().sum((-2, -1))  # () or (M,)
        total = all_sum(2 * mine - mine.detach())  # S is symmetric: through its rows flows half of the gradient
    else:
        total = (all_sum(rows.mT @ rows) / (n - 1)).square().sum((-2, -1))  # (M, D, B) (M, B, D) -> (M, D, D)
    return ((total - var.square().sum(-1)) / d).mean()


def vicreg_loss(z_a, z_b, inv_coeff=25.0, var_coeff=25.0, cov_coeff=1.0):
    """Algorithm 1, vicreg, lambda, mu and nu being the coefficients of inv, var and cov.

    z_a, z_b (B/G, D) or (B/G, M, D), B > 1 -> the loss, and its three unweighted terms. On G processes, which must all
    call it, var and cov are those of all B rows, and the gradient that DDP averages equals that of one process. Raises
    RuntimeError if the processes hold unequal numbers of rows.
    """
    with torch.autocast(z_a.device.type, enabled=False):
        z_a, z_b = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z_a, z_b))
        inv = invariance(z_a, z_b)
        var = variance(z_a) + variance(z_b)
        cov = covariance(z_a) + covariance(z_b)
        return inv_coeff * inv + var_coeff * var + cov_coeff * cov, {"inv": inv, "var": var, "cov": cov}


@torch.no_grad()
def location_distances(pos_a, pos_b):
    """Euclidean distances (B, N, N') between positions (B, N, 2) and (B, N', 2), exact: the same place is at 0."""
    return torch.cdist(pos_a, pos_b, compute_mode="donot_use_mm_for_euclid_dist")


@torch.no_grad()
def feature_distances(map_a, map_b):
    """Squared distances (B, N, N') between features (B, N, D) and (B, N', D).

    By a matrix product in float32, four times faster than exact differences. Rounding, 1e-7 of the squared norms once the
    mean is taken off, may exchange candidates that are almost equally near; no gradient depends on the distance itself.
    """
    with torch.autocast(map_a.device.type, enabled=False):
        map_a, map_b = (m.to(torch.promote_types(m.dtype, torch.float32)) for m in (map_a, map_b))
        mean = map_b.mean((0, 1))
        map_a, map_b = map_a - mean, map_b - mean
        products = map_a @ map_b.mT  # (B, N, D) (B, D, N') -> (B, N, N')
        return map_a.square().sum(2)[:, :, None] - 2 * products + map_b.square().sum(2)[:, None, :]


def closest(distances, num_matches=None):
    """Each query's nearest candidate, for the num_matches closest pairs: filter_best of Algorithm 1.

    distances (B, N, N') -> indices of the queries, in ascending order, and of their candidates, (B, M) each.
    M is num_matches, or N where that is smaller or num_matches is None or 0. Of equal distances the first one wins.
    """
    distance, nearest = distances.min(2)  # (B, N) each: Algorithm 1, lines 25 and 34
    kept = distance.argsort(dim=1, stable=True)[:, :num_matches or None].sort(1).values  # (B, N) -> (B, M)
    return kept, nearest.gather(1, kept)


def select(maps, indices):
    """maps (B, N, D) at indices (B, M) -> (B, M, D)."""
    first = torch.arange(0, maps.shape[0] * maps.shape[1], maps.shape[1], device=maps.device)  # (B,)
    rows = (first[:, None] + indices).flatten()  # (B M,) of the B N rows: whole rows move, also in the backward pass
    return maps.flatten(0, 1).index_select(0, rows).unflatten(0, indices.shape)


def match(query, candidates, distances, num_matches=None):
    """Each query's nearest candidate, for the num_matches closest pairs, in the queries' spatial order.

    query (B, N, D), candidates (B, N', D), distances (B, N, N') -> (B, M, D), (B, M, D), with M as in closest().
    Gradients flow to the features, not to the choice.
    """
    kept, nearest = closest(distances, num_matches)
    return select(query, kept), select(candidates, nearest)


def local_matches(map_a, map_b, pos_a, pos_b, num_matches=20, num_feature_matches=20):
    """The matches from a to b by location and those by feature: two pairs of (B, M, D). Arguments: local_criterion's."""
    return (match(map_a, map_b, location_distances(pos_a, pos_b), num_matches),  # Eq. (2); Algorithm 1, lines 22-28
            match(map_a, map_b, feature_distances(map_a, map_b), num_feature_matches))  # lines 31-37


def local_criterion(map_a, map_b, pos_a, pos_b, num_matches=20, num_feature_matches=20,
                    inv_coeff=25.0, var_coeff=25.0, cov_coeff=1.0):
    """Algorithm 1, local_criterion: one direction, from a to b; location-based plus feature-based.

    maps (B, N, D), pos (B, N, 2) in pixels -> the loss, and its three unweighted terms. num_matches, for location-based
    matches, and num_feature_matches: how many to keep, None or 0 for all. Raises as vicreg_loss does.
    """
    pairs = local_matches(map_a, map_b, pos_a, pos_b, num_matches, num_feature_matches)
    losses, parts = zip(*(vicreg_loss(*pair, inv_coeff, var_coeff, cov_coeff) for pair in pairs))  # lines 29, 38
    return sum(losses), {key: sum(part[key] for part in parts) for key in parts[0]}


def weighted_spread(sides):
    """Sums of weight * variance(z) and of weight * covariance(z) over sides [(weight, z (B/G, M, D)), ...].

    Statistics are those of each match alone, so sides of one shape and weight go through them side by side. A step on G
    processes then takes 22 collectives instead of 110, and 55 instead of 1,232 with eight views.
    """
    groups = {}
    for weight, z in sides:
        groups.setdefault((weight, z.shape), []).append(z)
    var = cov = 0.0
    for (weight, _), group in groups.items():
        z = torch.cat(group, 1)  # (B/G, S M, D)
        var, cov = var + weight * len(group) * variance(z), cov + weight * len(group) * covariance(z)
    return var, cov


def vicregl_loss(embeddings, maps, pos, alpha=0.75, num_matches=(20,), num_feature_matches=(20,),
                 inv_coeff=25.0, var_coeff=25.0, cov_coeff=1.0):
    """Eq. (4): alpha * global + (1 - alpha) * local, -> the loss, and the unweighted terms of both.

    embeddings V x (B, D), maps V x (B, N, D), pos V x (B, N, 2), V >= 2. The first two views are large. All terms are
    averaged over pairs of views (i, j), i one of the first two, j any other; the local ones, those of local_criterion(),
    also over both directions. num_matches, num_feature_matches: from a large view and, if there is a second number, from a
    small one. Raises as vicreg_loss does.
    """
    count, inv, local_inv, sides = len(embeddings), 0.0, 0.0, []
    kept = [(num_matches[k], num_feature_matches[k]) for k in [0, 0] + [-1] * (count - 2)]  # from each view
    with torch.autocast(embeddings[0].device.type, enabled=False):
        embeddings = [z.to(torch.promote_types(z.dtype, torch.float32)) for z in embeddings]
        maps = [m.to(torch.promote_types(m.dtype, torch.float32)) for m in maps]
        for i, j in [(0, 1), *itertools.product((0, 1), range(2, count))]:
            share = (2 if j == 1 else 1) / (2 * count - 2)  # no term changes with the order: (0, 1) is also (1, 0)
            inv = inv + share * invariance(embeddings[i], embeddings[j])
            for a, b in ((i, j), (j, i)):
                for pair in local_matches(maps[a], maps[b], pos[a], pos[b], *kept[a]):
                    local_inv = local_inv + share / 2 * invariance(*pair)
                    sides += [(share / 2, z) for z in pair]
        # A large view is in pairs whose shares sum to count / (2 count - 2), a small one in two
        var, cov = weighted_spread([((count if v < 2 else 2) / (2 * count - 2), z[:, None])
                                    for v, z in enumerate(embeddings)])
        local_var, local_cov = weighted_spread(sides)
        parts = {"inv": inv, "var": var, "cov": cov,
                 "local_inv": local_inv, "local_var": local_var, "local_cov": local_cov}
        inv, var, cov = (alpha * parts[key] + (1 - alpha) * parts[f"local_{key}"] for key in ("inv", "var", "cov"))
        return inv_coeff * inv + var_coeff * var + cov_coeff * cov, parts


# --- 3. Model ------------------------------------------------------------------------------------------------------


def mlp(*widths, norm):
    """A projector: linear layers, each but the last with normalisation and ReLU."""
    layers = []
    for i, o in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(i, o), norm(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False))


class VICRegL(nn.Module):
    """backbone: images (B, 3, H0, W0) -> maps (B, N, D), pooled (B, D = backbone.dim); widths: the projectors'.

    norm: in the projectors, nn.BatchNorm1d or nn.LayerNorm.
    """

    def __init__(self, backbone, widths=(8192, 8192, 8192), local_widths=(512, 512, 512), num_classes=0,
                 norm=nn.BatchNorm1d):
        super().__init__()
        self.backbone, self.projector = backbone, mlp(backbone.dim, *widths, norm=norm)
        self.local_projector = mlp(backbone.dim, *local_widths, norm=norm)
        self.probe = nn.Linear(backbone.dim, num_classes) if num_classes else None

    def forward(self, views):
        """V views (B, 3, H0, W0), those of one size in a row -> embeddings V x (B, widths[-1]), local features
        V x (B, N, local_widths[-1]) and the probe's logits of the first view (B, classes) or None."""
        embeddings, maps, first = [], [], None
        for _, group in itertools.groupby(views, key=lambda x: x.shape[2:]):  # one pass for each size
            group = list(group)
            m, y = self.backbone(torch.cat(group))  # v views: (vB, N, D), (vB, D)
            first = y if first is None else first
            local = self.local_projector(m.flatten(0, 1)).unflatten(0, m.shape[:2])  # (vB N, D) -> (vB, N, D)
            embeddings += self.projector(y).chunk(len(group))
            maps += local.chunk(len(group))
        logits = self.probe(first[:len(views[0])].detach()) if self.probe else None
        return embeddings, maps, logits


# --- 4. Training ---------------------------------------------------------------------------------------------------

RECIPES = {  # chosen by --arch (any ConvNeXt) or else by --data; any other data set gets imagenet's
    "imagenet": dict(arch="resnet50", size=224, projector="8192-8192-8192", epochs=100, batch_size=512, base_lr=0.3,
                     final_lr=0.0006, weight_decay=1e-6, warmup_epochs=10),
    "convnext": dict(arch="convnext_small", size=224, views="multicrop", projector="8192-8192-8192", epochs=400,
                     batch_size=384, base_lr=0.00075, final_lr=1.125e-6, weight_decay=0.05, warmup_epochs=10,
                     drop_path=0.1, local_lr_ratio=0.1),
    "cifar10": dict(arch="resnet34", size=32, projector="4096-128", local_projector="512-512-128", epochs=600,
                    batch_size=1024, base_lr=0.3, final_lr=0.0, weight_decay=1e-4, warmup_epochs=10, num_matches=[7],
                    num_feature_matches=[7]),
    "shapes": dict(arch="tiny_convnet", size=64, projector="1024-1024-1024", local_projector="128-128", epochs=7,
                   batch_size=128, base_lr=8.0, final_lr=0.0, weight_decay=1e-6, warmup_epochs=1),
}


def check_views(args, backbone):
    """Says, before the run, which views have fewer locations than --num-matches. Raises UserError if one has none."""
    import common
    import training

    for kind, (_, _, scale) in enumerate(VIEWS[args.views]):
        size = round(scale * args.size)
        if size < backbone.stride:
            raise common.UserError(f"views of {size} pixels are smaller than one stride of {args.arch}: --size "
                                   f"{math.ceil(backbone.stride / scale)} at least, or --views two")
        with torch.no_grad():
            locations = backbone.eval()(torch.zeros(1, 3, size, size))[0].shape[1]
        backbone.train()
        for flag in ("num_matches", "num_feature_matches"):
            if len(getattr(args, flag)) > 2 or min(getattr(args, flag)) < 0:
                raise common.UserError(f"--{flag.replace('_', '-')} takes one number, or one for large and one for small "
                                       "views; 0: all")
            asked = getattr(args, flag)[0 if kind == 0 else -1]
            if asked > locations and training.rank_and_world()[0] == 0:
                print(f"note: views of {size} pixels have {locations} locations, so --{flag.replace('_', '-')} is "
                      f"{locations} for them, not {asked}", flush=True)


def make_optimizer(args, model):
    """LARS, or for a ConvNeXt AdamW: it decays no bias and no normalisation, and trains the local projector slowly."""
    import training

    if not args.arch.startswith("convnext"):
        return training.LARS(model.parameters(), weight_decay=args.weight_decay)
    groups = {}
    for name, p in model.named_parameters():
        decayed, local = p.squeeze().ndim > 1, name.startswith("local_projector")  # a layer scale is (D, 1, 1)
        groups.setdefault((decayed, local), dict(
            params=[], weight_decay=args.weight_decay * decayed, lr_ratio=args.local_lr_ratio if local else 1.0,
        ))["params"].append(p)
    return torch.optim.AdamW(groups.values())


@torch.no_grad()
def match_report(args, model, device):
    """Prints the share of feature matches that are nearest by location too, over two views of validation images."""
    import common
    import training

    val = common.open_data(args.data, "val", args.size)
    if val is None or training.rank_and_world()[0]:
        return
    views = common.Views(val, functools.partial(sample_views, kinds=VIEWS["two"], size=args.size), args.seed)
    keys = [(0, i) for i in range(min(len(val), 512))]
    agree = []
    for batch in torch.utils.data.DataLoader(views, batch_sampler=[keys[i:i + 64] for i in range(0, len(keys), 64)]):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            _, maps, _ = model.eval()([common.normalize(x.to(device).float() / 255) for x in batch.views])
        pos = map_positions(batch.boxes.to(device), batch.flips.to(device), maps)
        kept, nearest = closest(feature_distances(*maps), args.num_feature_matches[0])
        agree.append(nearest == location_distances(*pos).argmin(2).gather(1, kept))  # (B, M)
    share = torch.cat(agree).double().mean().item()
    chance = 1 / maps[1].shape[1]
    print(f"{share:.1%} of the feature matches are the nearest location too (by chance {chance:.1%})", flush=True)


def train(args):
    import common
    import training
    from evaluate import knn_report

    device = training.set_up(args.seed)
    data = common.open_data(args.data, "train", args.size)
    backbone = common.build_backbone(args.arch, args.size, args.drop_path)
    check_views(args, backbone)
    widths, local_widths = ([int(w) for w in s.split("-")] for s in (args.projector, args.local_projector))
    norm = nn.LayerNorm if args.arch.startswith("convnext") else nn.BatchNorm1d
    model, ddp = training.distribute(VICRegL(backbone, widths, local_widths, len(data.classes), norm), device)
    optimizer = make_optimizer(args, model)
    run = training.Run(args, model, optimizer, data, device)
    colour = common.Photometric(jitter=JITTER, blur_p=0.5, solarize_p=0.1)

    for batch in run.batches(functools.partial(sample_views, kinds=VIEWS[args.views], size=args.size)):
        generator = training.seed_step(args.seed, run.step)
        views = [colour(x, generator) for x in batch.views]
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            embeddings, maps, logits = ddp(views)
        pos = map_positions(batch.boxes, batch.flips, maps)
        loss, parts = vicregl_loss(embeddings, maps, pos, args.alpha, args.num_matches, args.num_feature_matches,
                                   args.inv_coeff, args.var_coeff, args.cov_coeff)
        probe_loss, accuracy = training.probe(logits, batch.labels)
        lr = run.set_lr()
        optimizer.zero_grad()
        (loss + probe_loss).backward()
        optimizer.step()
        run.log(loss=loss, **parts, std=embeddings[0].detach().float().std(0).mean(), **accuracy, lr=lr)

    knn_report(args, model.backbone, run.folder / "knn.json", device)
    match_report(args, model, device)


def main():
    import training

    with training.one_line_errors():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--projector", help="widths of its layers")
        parser.add_argument("--local-projector", default="512-512-512", help="widths of its layers")
        parser.add_argument("--views", default="two", choices=VIEWS)
        parser.add_argument("--alpha", type=float, default=0.75, help="weight of the global criterion, of 1")
        parser.add_argument("--num-matches", type=int, nargs="+", default=[20], metavar="N",
                            help="location matches from a large view, and from a small one if another number; 0: all")
        parser.add_argument("--num-feature-matches", type=int, nargs="+", default=[20], metavar="N", help="the same")
        parser.add_argument("--inv-coeff", type=float, default=25.0)
        parser.add_argument("--var-coeff", type=float, default=25.0)
        parser.add_argument("--cov-coeff", type=float, default=1.0)
        parser.add_argument("--drop-path", type=float, default=0.0, help="of ConvNeXt and ViT")
        parser.add_argument("--local-lr-ratio", type=float, default=1.0, help="of the local projector (AdamW)")
        train(training.parse_args(parser, RECIPES))


if __name__ == "__main__":
    main()
