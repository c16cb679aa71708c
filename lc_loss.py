# SPDX-License-Identifier: MIT
r"""Self-supervised Learning with Local Contrastive Loss for Detection and Semantic Segmentation.

LC-loss. Islam, Lundell, Sawhney, Sinha, Morales, Radke. WACV 2023, arXiv:2207.04398

BYOL: an online network learns to predict, from one view of an image, what a target network makes of
another view; the target is a moving average of the online network. LC-loss adds a local term: each
point of one view must find its own, known place in the other, among all places there. I_c is the
whole image with other colours (c); I_sc also differs in space (s): it is a crop, flipped or not.

    python lc_loss.py                                        # a demonstration, on a CPU
    torchrun --nproc_per_node=8 lc_loss.py --data imagenet   # 8 GPUs: the paper's 400 epochs
    python lc_loss.py --data imagenet --batch-size 256 --epochs 100                    # one GPU
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_id=1 --rdzv_backend=c10d \
        --rdzv_endpoint=HOST:29500 lc_loss.py --data imagenet # on each of 4 nodes, HOST one of them

    Eq. (1)        byol_loss                 Section 3    sample_views, correspondences
    Eqs. (2)-(4)   local_contrastive_loss    Section 4.1  BYOL, COLOURS, RECIPES
    Eq. (5)        lc_loss                   Table 6      local_mse_loss

Differences
 1. No code was released, and the paper does not give the temperature: `--temperature`, 0.1.
 2. BYOL's loss is Eq. (1) in both directions, added, on I_c and I_sc: no third view is needed. So
    `--alpha 0` is BYOL with one view never cropped, not the BYOL of the paper's tables.
 3. Of BYOL's two colour augmentations, I_c has the one with solarization, I_sc the other.
 4. A point in the outer half of a border cell takes the value of that border's cells.
 5. Eq. (4) is averaged over an image's points, then over the images that have any.
 6. The paper's projections of 4096 dimensions are read as BYOL's: 4096 hidden units, 256 outputs.
 7. The local branch has a ReLU after its BatchNorm. As in BYOL's code, last layers have no bias.
 8. `--local-loss mse` (Table 6) has a predictor, as BYOL's own loss: without it, it collapses.
 9. The recipes of shapes and small are our own. As in vicreg.py (its Differences 3, 4) are LARS,
    precision, initialization, blur, dropped batches, and the linear classifier, which sees I_sc.
10. Names: the paper's I_t and p_t are I_sc and p_sc here. Its pooled f is the representation y; our
    f_c and f_sc are the local projections of its maps F.
11. VICReg's Table 3 adds a variance term to BYOL. Not here: 40 lines; its BYOL crops both views.
"""
import argparse
import copy
import functools
import math
from collections import namedtuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torchvision.transforms import RandomResizedCrop

# --- 1. Views and positions -----------------------------------------------------------------------

JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
COLOURS = [
    dict(jitter=JITTER, blur_p=0.1, solarize_p=0.2),  # of I_c
    dict(jitter=JITTER, blur_p=1.0),  # of I_sc
]


def sample_views(image, size):
    """I_c, all of a PIL image, and I_sc, a crop of it: [(box, flip, size), ...]. Section 3.

    Drawn with torch's global generator. box: (top, left, height, width) and the view's side `size`
    in pixels; flip: mirrored left to right.
    """
    whole = (0, 0, image.height, image.width)
    crop = RandomResizedCrop.get_params(image, (0.08, 1.0), ratio=(3 / 4, 4 / 3))
    flip = torch.rand(()).item() < 0.5
    return [(whole, False, size), (crop, flip, size)]


def correspondences(boxes, flips, sizes, grid):
    """The places p_sc in I_sc of points p_c: the centres of a grid over the whole image. Section 3.

    boxes (B, 4) and flips (B,) of I_sc, as in sample_views(); sizes (B, 2): image height, width
    -> points (B, grid, grid, 2) as (x, y), -1 at the left or upper edge of I_sc and 1 at the other;
       valid (B, grid, grid): whether they fall inside I_sc.
    """
    centres = (torch.arange(grid, device=boxes.device) + 0.5) / grid  # 0 to 1 over the image
    top, left, height, width = boxes[:, :, None].unbind(1)  # (B, 1) each
    y = (centres * sizes[:, :1] - top) / height  # (B, grid), 0 to 1 over the crop
    x = (centres * sizes[:, 1:] - left) / width
    x = torch.where(flips[:, None], 1 - x, x)

    x = repeat(x, "b w -> b h w", h=grid)
    y = repeat(y, "b h -> b h w", w=grid)
    points = 2 * torch.stack([x, y], 3) - 1  # (B, grid, grid, 2)
    return points, (points.abs() <= 1).all(3)


# --- 2. Loss --------------------------------------------------------------------------------------

def float32(x):
    """x in float32 (float64 stays): half precision would change gradients by several percent."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def byol_loss(q, g):
    """2 - 2 cos(q, g), averaged over the batch: predictions q (B, D) and the target's projections
    g (B, D), which get no gradient. Eq. (1)."""
    cosine = F.cosine_similarity(float32(q), float32(g).detach(), dim=1)  # (B,)
    return (2 - 2 * cosine).mean()


def mean_over_valid(values, valid):
    """Mean of values (B, h, w) over an image's valid points, then over images with any. Eq. (4).

    A collective: the images of all G processes count. The result is G times this process's share
    of that mean; so the average over processes, which DDP takes of gradients, is the mean.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    n_images = valid.any((1, 2)).sum()
    if world > 1:
        dist.all_reduce(n_images)  # a count: it has no gradient
    n_points = valid.sum((1, 2)).clamp(min=1)  # (B,)
    per_image = torch.where(valid, values, 0).sum((1, 2)) / n_points  # (B,)
    return world * per_image.sum() / n_images.clamp(min=1)


def local_contrastive_loss(f_c, f_sc, points, valid, temperature=0.1):
    """The negative log-likelihood of p_sc given p_c, over all locations of I_sc. Eqs. (2)-(4).

    f_c (B, D, h, w): F_xi in Eq. (2), the target's features of I_c, which get no gradient; f_sc
    (B, D, h', w'): F_theta, the online network's of I_sc; points (B, h, w, 2) and valid (B, h, w)
    from correspondences(). A collective, as mean_over_valid(). With DINO: teacher and student.
    """
    h_sc = f_sc.shape[2]
    f_c = F.normalize(float32(f_c).detach().flatten(2), dim=1)  # (B, D, N)
    f_sc = F.normalize(float32(f_sc).flatten(2), dim=1)  # (B, D, N')
    with torch.autocast(f_c.device.type, enabled=False):
        similarity = f_c.mT @ f_sc  # (B, N, D) (B, D, N') -> (B, N, N')  Eq. (2)
    nll = -F.log_softmax(similarity / temperature, dim=2)  # Eq. (3), for each location of I_sc

    # For each point p_c there is one map over I_sc, which is read at one place, p_sc.
    maps = rearrange(nll, "b n (h w) -> (b n) 1 h w", h=h_sc)
    places = rearrange(points, "b h w xy -> (b h w) 1 1 xy").to(maps.dtype)
    nll = F.grid_sample(maps, places, padding_mode="border", align_corners=False)  # (BN, 1, 1, 1)
    return mean_over_valid(nll.view_as(valid), valid)  # Eq. (4)


def local_mse_loss(f_c, f_sc, points, valid):
    """Eq. (1) between the features of p_c and p_sc, in place of the contrast. Table 6. Arguments as
    in local_contrastive_loss(), but f_sc from a predictor; it is itself interpolated at p_sc."""
    f_c = float32(f_c).detach()
    f_sc = float32(f_sc)
    # (B, D, h', w') at points (B, h, w, 2) -> (B, D, h, w)
    f_sc = F.grid_sample(f_sc, points.to(f_sc.dtype), padding_mode="border", align_corners=False)
    distance = 2 - 2 * F.cosine_similarity(f_sc, f_c, dim=1)  # (B, h, w)
    return mean_over_valid(distance, valid)


def lc_loss(q_c, q_sc, g_c, g_sc, f_c, f_sc, points, valid, alpha=0.1, temperature=0.1,
            local_loss="contrastive"):
    """Eq. (5): the loss, and its terms "byol" and "local", unweighted.

    q (B, D): the online network's predictions, g (B, D): the target's projections, of I_c and I_sc;
    the others as in local_contrastive_loss(). A term of weight 0 is not computed, its tensors may
    be None. A collective, as mean_over_valid(). Raises ValueError for another local_loss.
    """
    if local_loss not in ("contrastive", "mse"):
        raise ValueError("local_loss must be 'contrastive' or 'mse'")
    parts = {}
    if alpha < 1:
        parts["byol"] = byol_loss(q_c, g_sc) + byol_loss(q_sc, g_c)
    if alpha > 0 and local_loss == "mse":
        parts["local"] = local_mse_loss(f_c, f_sc, points, valid)
    elif alpha > 0:
        parts["local"] = local_contrastive_loss(f_c, f_sc, points, valid, temperature)
    loss = (1 - alpha) * parts.get("byol", 0) + alpha * parts.get("local", 0)
    return loss, parts


def spread(x):
    """Root mean square distance of N unit vectors, x (..., N, D) normalized, from their mean."""
    x = F.normalize(float32(x).detach(), dim=-1)
    squares = x.var(-2, correction=0).sum(-1)
    return squares.sqrt().mean()


# --- 3. Model -------------------------------------------------------------------------------------

def widths(text):
    return [int(width) for width in text.split("-")]


def mlp(*widths, norm=nn.BatchNorm1d):
    """BYOL's projector and predictor; for each location of a map, the paper's 1x1 convolutions."""
    layers = []
    for i, o in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(i, o), norm(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False))


def project_maps(maps, *layers):
    """Each location of square maps (B, N, D) through `layers` -> (B, D', h, w), where N = h w."""
    b, n, _ = maps.shape
    side = math.isqrt(n)
    if side**2 != n:
        raise ValueError(f"maps of {n} locations are not square")
    rows = rearrange(maps, "b n d -> (b n) d")
    for layer in layers:
        rows = layer(rows)
    return rearrange(rows, "(b h w) d -> b d h w", b=b, h=side)


# What lc_loss() takes, q, g (B, 256) and f (B, 256, h, w); None for a term of weight 0.
Outputs = namedtuple("Outputs", "q_c q_sc g_c g_sc f_c f_sc", defaults=6 * [None])


class BYOL(nn.Module):
    """Online network, predictors, target network and linear classifier. Sections 3 and 4.1.

    backbone: images (B, 3, H0, W0) -> maps (B, N, D), representations (B, D), with D = .dim;
    widths: of projector and predictor; alpha, local_loss: as in lc_loss(). What a term of weight 0
    needs is not built: DDP refuses unused parameters.
    """

    def __init__(self, backbone, widths=(4096, 256), num_classes=0, alpha=0.1,
                 local_loss="contrastive"):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.dim, *widths) if alpha < 1 else None
        self.local = mlp(backbone.dim, backbone.dim, 256) if alpha > 0 else None
        self.target = copy.deepcopy(self).requires_grad_(False)  # all of the above; no predictor
        self.predictor = mlp(widths[-1], *widths) if alpha < 1 else None
        self.local_predictor = nn.Identity()
        if alpha > 0 and local_loss == "mse":
            self.local_predictor = mlp(256, backbone.dim, 256)
        self.probe = nn.Linear(backbone.dim, num_classes) if num_classes else None

    def forward(self, x_c, x_sc):
        """Views I_c and I_sc (B, 3, H0, W0) -> Outputs, and of I_sc the logits (B, classes)."""
        out = {}
        maps_sc, y_sc = self.backbone(x_sc)
        target_maps_c, target_y_c = self.target.backbone(x_c)
        if self.projector:  # BYOL's loss: both views through both networks
            _, y_c = self.backbone(x_c)
            _, target_y_sc = self.target.backbone(x_sc)
            out["q_c"] = self.predictor(self.projector(y_c))
            out["q_sc"] = self.predictor(self.projector(y_sc))
            out["g_c"] = self.target.projector(target_y_c)
            out["g_sc"] = self.target.projector(target_y_sc)
        if self.local:
            out["f_c"] = project_maps(target_maps_c, self.target.local)
            out["f_sc"] = project_maps(maps_sc, self.local, self.local_predictor)
        logits = self.probe(y_sc.detach()) if self.probe else None
        return Outputs(**out), logits

    @torch.no_grad()
    def update_target(self, momentum):
        """xi <- momentum * xi + (1 - momentum) * theta, the target's and the online parameters."""
        xi = dict(self.target.named_parameters())
        theta = [self.get_parameter(name) for name in xi]
        torch._foreach_lerp_(list(xi.values()), theta, 1 - momentum)


# --- 4. Training ----------------------------------------------------------------------------------

RECIPES = {  # chosen by --data, or by the number of its images; every flag overrides it
    "imagenet": dict(arch="resnet50", size=224, projector="4096-256", epochs=400, batch_size=4096,
                     base_lr=0.3, final_lr=0.0, weight_decay=1e-6, warmup_epochs=10,
                     momentum=0.996, alpha=0.1),  # Section 4.1
    "small": dict(arch="resnet18", size=160, projector="2048-256", epochs=400, batch_size=128,
                  base_lr=0.8, final_lr=0.0, weight_decay=1e-6, warmup_epochs=10,
                  momentum=0.99, alpha=0.1),
    "shapes": dict(arch="tiny_convnet", size=64, projector="1024-256", epochs=4, batch_size=128,
                   base_lr=4.0, final_lr=0.0, weight_decay=1e-6, warmup_epochs=1,
                   momentum=0.97, alpha=0.5),
}


def train(args):
    import common
    import training
    device = training.set_up(args.seed)
    data = common.open_data(args.data, "train", args.size)
    backbone = training.build_backbone(args)
    grid = common.grid_of(args.size, backbone.stride)
    model = BYOL(backbone, args.projector, len(data.classes), args.alpha, args.local_loss)
    model, ddp = training.distribute(model, device)
    optimizer = training.LARS(model.parameters(), weight_decay=args.weight_decay)
    run = training.Run(args, model, optimizer, data, device)  # resumes

    colours = [common.Photometric(**colour, size=args.size) for colour in COLOURS]
    for batch in run.batches(functools.partial(sample_views, size=args.size)):
        x_c, x_sc = common.recolour(colours, batch.views)
        points, valid = correspondences(batch.boxes[:, 1], batch.flips[:, 1], batch.sizes, grid)

        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            out, logits = ddp(x_c, x_sc)
        loss, parts = lc_loss(*out, points, valid, args.alpha, args.temperature, args.local_loss)
        probe_loss, accuracy = training.probe(logits, batch.labels)

        lr = run.set_lr()
        momentum = training.cosine_schedule(run.step, run.total, 0, args.momentum, 1.0)  # as BYOL
        optimizer.zero_grad()
        (loss + probe_loss).backward()
        optimizer.step()
        model.update_target(momentum)

        if "byol" in parts:
            parts["spread"] = spread(out.g_c)  # over the batch; 0 after a collapse
        if "local" in parts:
            parts["local_spread"] = spread(out.f_c.flatten(2).mT)  # over an image's locations
            parts["valid"] = valid.float().mean()
        run.log(loss=loss, **parts, **accuracy, lr=lr, momentum=momentum)
        run.end_step()  # saves as time goes by; stops on a signal

    run.finish("knn", "correspond", figure="correspond --checkpoint")


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    flag = parser.add_argument
    flag("--projector", type=widths, metavar="WIDTHS", help="of projector and predictor")
    flag("--alpha", type=float, help="weight of the local term; BYOL's has 1 - alpha")
    flag("--local-loss", default="contrastive", choices=["contrastive", "mse"], help="local term")
    flag("--temperature", type=float, default=0.1, help="tau of the contrastive term")
    flag("--momentum", type=float, help="of the target network at the start; it ends at 1")
    try:
        from training import launch
    except ModuleNotFoundError:
        parser.parse_args()  # so that --help works where this file lies alone
        parser.error("training needs common.py and training.py beside this file")
    limits = dict(alpha=(0, 1), temperature=(0.001, math.inf), momentum=(0, 1))
    launch(train, parser, RECIPES, **limits)


if __name__ == "__main__":
    main()
