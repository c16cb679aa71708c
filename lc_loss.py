"""LC-loss: Self-supervised Learning with Local Contrastive Loss for Detection and Semantic Segmentation.

Ashraful Islam, Ben Lundell, Harpreet Sawhney, Sudipta Sinha, Peter Morales, Richard Radke. WACV 2023. arXiv:2207.04398

BYOL makes a network's prediction for one view of an image agree with a slowly moving target network's projection of
the other. LC-loss adds that each point of one view should find its own place in the other: the similarity of its
feature to every location of the other view, as a softmax, is made large where the point really lies. One view is the
whole image, only resized and recoloured; the other is cropped, flipped and recoloured; so the places are known.

    python lc_loss.py                                                  # a demonstration: scenes made in memory, on a CPU
    python lc_loss.py --data imagenet --batch-size 256                 # one GPU
    torchrun --nproc_per_node=8 lc_loss.py --data imagenet             # eight: the paper's batch of 4096
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 lc_loss.py --data imagenet

    Eq. (1)  byol_loss           Eqs. (2)-(4)  local_contrastive_loss       Section 3    correspondences, BYOL
    Eq. (5)  lc_loss             Table 6       local_mse_loss               Section 4.1  BYOL.local, RECIPES

Another method's loss with LC-loss, as the paper's Appendix B has it for DINO: local_contrastive_loss knows nothing of
BYOL. Give it the teacher's map of the resized view (detached) and the student's map of the
cropped view, both through a local projection, and add alpha (there 0.5) times it to (1 - alpha) times that loss.

Differences
 1. No code was released. The temperature is not given: 0.1, `--temperature`.
 2. BYOL's symmetric loss is the sum of Eq. (1) over the two directions, on the same two views that the local term uses,
    so that there is no third forward pass (the paper reports 1% overhead). `--alpha 0` is BYOL's loss on these views: one
    of them is always the whole image, where BYOL crops both.
 3. The paper's resized view has "blur, solarization, color distortion": it gets BYOL's second colour augmentation (blur
    0.1, solarization 0.2), the cropped view the first (blur always, no solarization).
 4. A point in the outer half cell of the cropped view takes the value of the border's locations.
 5. Eq. (4) is averaged over an image's valid points, then over the images that have any.
 6. The paper lists projections of 4096 and predictions of 256 dimensions; BYOL's, which it says it uses, have 4096 hidden
    and 256 output units each: those.
 7. The local branch has a ReLU after its BatchNorm, as BYOL's projector; from BYOL's code, no bias in last layers.
 8. cifar10 and shapes are this project's own recipes; shapes has alpha 0.5, as Appendix B has it for DINO.
 9. As in vicreg.py: LARS neither decays nor scales biases and normalisation, residual branches start at zero, incomplete
    batches are dropped, a linear classifier on detached representations reports accuracy while training.
"""
import argparse
import copy
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# --- 1. Views and positions ----------------------------------------------------------------------------------------

JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
COLOURS = dict(jitter=JITTER, blur_p=0.1, solarize_p=0.2), dict(jitter=JITTER, blur_p=1.0, solarize_p=0.0)  # I_c, I_sc


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


def sample_views(rng, height, width, size):
    """I_c, the whole image, and I_sc, a flipped crop of 8 to 100% of its area: [(box, flip, size), ...]. Section 3."""
    crop = random_box(rng, height, width, (0.08, 1.0))
    return [((0, 0, height, width), False, size), (crop, rng.random() < 0.5, size)]


def correspondences(boxes, flips, sizes, grid):
    """Where the centres of a grid over the whole image I_c lie in the cropped view I_sc. Section 3.

    boxes (B, 4): the crop's top, left, height, width in pixels; flips (B,); sizes (B, 2): the image's height and width.
    -> points (B, grid, grid, 2) as (x, y), from -1 at the cropped view's left or upper edge to 1 at the other; and
    valid (B, grid, grid): whether the point falls inside it.
    """
    centres = (torch.arange(grid, device=boxes.device) + 0.5) / grid  # in units of the image's sides
    top, left, height, width = boxes[:, :, None].unbind(1)  # (B, 1) each
    y = (centres * sizes[:, :1] - top) / height  # (B, grid), in units of the crop's sides
    x = (centres * sizes[:, 1:] - left) / width
    x = torch.where(flips[:, None], 1 - x, x)
    points = torch.stack([x[:, None].expand(-1, grid, -1), y[:, :, None].expand(-1, -1, grid)], 3) * 2 - 1
    return points, (points.abs() <= 1).all(3)


# --- 2. Loss -------------------------------------------------------------------------------------------------------


def byol_loss(q, g):
    """2 - 2 cos(prediction q, target projection g), (B, D) each, averaged over the batch. Eq. (1)."""
    return (2 - 2 * F.cosine_similarity(q, g, dim=1)).mean()


def at_points(maps, points):
    """Bilinear interpolation of maps (M, C, h, w) at points (M, n, 2) as (x, y) in [-1, 1] -> (M, C, n)."""
    points = points[:, None].to(maps.dtype)  # (M, 1, n, 2)
    return F.grid_sample(maps, points, padding_mode="border", align_corners=False)[:, :, 0]


def mean_over_valid(values, valid):
    """Mean over each image's valid points, then over the images of all processes that have any. (B, N) -> scalar.

    On G processes each returns G times its share, so that DDP's average of gradients is that of one process.
    """
    count = valid.any(1).sum().float()
    if dist.is_initialized():
        dist.all_reduce(count)  # a constant: nothing to differentiate
        count = count / dist.get_world_size()
    per_image = torch.where(valid, values, 0).sum(1) / valid.sum(1).clamp(min=1)  # (B,)
    return per_image.sum() / count.clamp(min=1e-6)


def local_contrastive_loss(f_c, f_sc, points, valid, temperature=0.1):
    """Minus the log-likelihood that each point of I_c lies in I_sc where it does lie. Eqs. (2)-(4).

    f_c (B, D, h, w): the target's features of I_c (detached); f_sc (B, D, h', w'): the online network's of I_sc;
    points (B, h, w, 2) and valid (B, h, w) from correspondences(). Images without a valid point count nothing.
    """
    (b, _, h, w), (h_sc, w_sc) = f_c.shape, f_sc.shape[2:]
    f_c, f_sc = F.normalize(f_c.flatten(2), dim=1), F.normalize(f_sc.flatten(2), dim=1)  # (B, D, N), (B, D, N')
    similarity = f_c.mT @ f_sc  # (B, N, D) (B, D, N') -> (B, N, N')  Eq. (2)
    nll = -F.log_softmax(similarity / temperature, dim=2)  # Eq. (3), at every location of I_sc
    # A map of I_sc for each point of I_c, read at one place: (BN, 1, h', w') at (BN, 1, 2) -> (BN, 1, 1)
    nll = at_points(nll.reshape(b * h * w, 1, h_sc, w_sc), points.reshape(b * h * w, 1, 2))
    return mean_over_valid(nll.view(b, h * w), valid.flatten(1))  # Eq. (4)


def local_mse_loss(f_c, f_sc, points, valid):
    """Eq. (1) between the features of corresponding points, instead of the contrast. Table 6. Shapes as above."""
    at = at_points(f_sc, points.flatten(1, 2))  # (B, D, N)
    return mean_over_valid(2 - 2 * F.cosine_similarity(at, f_c.flatten(2), dim=1), valid.flatten(1))


def lc_loss(q_c, q_sc, g_c, g_sc, f_c, f_sc, points, valid, alpha=0.1, temperature=0.1, local_loss="contrastive"):
    """Eq. (5), BYOL's loss being symmetric: the loss, and its two unweighted terms.

    q, g (B, D): predictions and target projections of I_c and I_sc; the rest as in local_contrastive_loss().
    """
    with torch.autocast(q_c.device.type, enabled=False):
        tensors = q_c, q_sc, g_c, g_sc, f_c, f_sc
        q_c, q_sc, g_c, g_sc, f_c, f_sc = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)
        byol = byol_loss(q_c, g_sc) + byol_loss(q_sc, g_c)
        if local_loss == "mse":
            local = local_mse_loss(f_c, f_sc, points, valid)
        else:
            local = local_contrastive_loss(f_c, f_sc, points, valid, temperature)
        return (1 - alpha) * byol + alpha * local, {"byol": byol, "local": local}


# --- 3. Model ------------------------------------------------------------------------------------------------------


def mlp(*widths):
    """BYOL's projector, predictor and, row by row, the 1x1 convolutions of the local branch: linear, BN, ReLU, linear."""
    layers = []
    for i, o in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False))


class BYOL(nn.Module):
    """Online network, predictor, and the target network that follows the online one; with a local branch each.

    backbone: images (B, 3, H0, W0) -> maps (B, N, D), pooled (B, D = backbone.dim); widths: of projector and predictor.
    """

    def __init__(self, backbone, widths=(4096, 256), num_classes=0):
        super().__init__()
        self.backbone = backbone
        self.projector, self.predictor = mlp(backbone.dim, *widths), mlp(widths[-1], *widths)
        self.local = mlp(backbone.dim, backbone.dim, 256)
        followed = ("backbone", "projector", "local")
        self.target = nn.ModuleDict({name: copy.deepcopy(getattr(self, name)) for name in followed})
        self.target.requires_grad_(False)
        self.probe = nn.Linear(backbone.dim, num_classes) if num_classes else None

    @staticmethod
    def project_maps(local, maps):
        """(B, N, D) -> (B, 256, h, w), for square maps."""
        side = math.isqrt(maps.shape[1])
        return local(maps.flatten(0, 1)).view(len(maps), side, side, -1).permute(0, 3, 1, 2)

    def forward(self, x_c, x_sc):
        """Views I_c, I_sc (B, 3, H0, W0) -> predictions and target projections of both ((B, 256) each), the target's local
        features of I_c and the online ones of I_sc (B, 256, h, w), and the probe's logits (B, classes) or None."""
        (_, y_c), (maps_sc, y_sc) = self.backbone(x_c), self.backbone(x_sc)
        q_c, q_sc = (self.predictor(self.projector(y)) for y in (y_c, y_sc))
        f_sc = self.project_maps(self.local, maps_sc)
        with torch.no_grad():
            (maps_c, y), (_, y_t) = self.target.backbone(x_c), self.target.backbone(x_sc)
            g_c, g_sc = self.target.projector(y), self.target.projector(y_t)
            f_c = self.project_maps(self.target.local, maps_c)
        logits = self.probe(y_c.detach()) if self.probe else None
        return q_c, q_sc, g_c, g_sc, f_c, f_sc, logits

    @torch.no_grad()
    def update_target(self, momentum):
        """xi <- momentum * xi + (1 - momentum) * theta."""
        for name, module in self.target.items():
            torch._foreach_lerp_(list(module.parameters()), list(getattr(self, name).parameters()), 1 - momentum)


# --- 4. Training ---------------------------------------------------------------------------------------------------

RECIPES = {  # chosen by --data; any other data set gets imagenet's
    "imagenet": dict(arch="resnet50", size=224, projector="4096-256", epochs=400, batch_size=4096, base_lr=0.3,
                     final_lr=0.0, weight_decay=1e-6, warmup_epochs=10, momentum=0.996, alpha=0.1),  # Section 4.1
    "cifar10": dict(arch="resnet18", size=32, projector="4096-256", epochs=600, batch_size=1024, base_lr=0.3,
                    final_lr=0.0, weight_decay=1e-6, warmup_epochs=10, momentum=0.996, alpha=0.1),
    "shapes": dict(arch="tiny_convnet", size=64, projector="1024-256", epochs=7, batch_size=128, base_lr=8.0,
                   final_lr=0.0, weight_decay=1e-6, warmup_epochs=1, momentum=0.97, alpha=0.5),
}


def train(args):
    import functools

    import common
    import training
    from evaluate import knn_report

    device = training.set_up(args.seed)
    data = common.open_data(args.data, "train", args.size)
    backbone = common.build_backbone(args.arch, args.size)
    if args.size % backbone.stride or args.size < 2 * backbone.stride:  # the grid of locations would not cover the view
        raise common.UserError(f"--size {args.size}: {args.arch} needs two or more times its stride, {backbone.stride}")
    # distribute() turns BatchNorm into SyncBatchNorm on CUDA: BYOL's batch statistics are the global batch's.
    model, ddp = training.distribute(BYOL(backbone, [int(w) for w in args.projector.split("-")], len(data.classes)), device)
    optimizer = training.LARS([p for p in model.parameters() if p.requires_grad], weight_decay=args.weight_decay)
    run = training.Run(args, model, optimizer, data, device)
    colour_c, colour_sc = (common.Photometric(**colour) for colour in COLOURS)

    for batch in run.batches(functools.partial(sample_views, size=args.size)):
        generator = training.seed_step(args.seed, run.step)
        x_c, x_sc = (colour(x, generator) for colour, x in zip((colour_c, colour_sc), batch.views))
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            *outputs, logits = ddp(x_c, x_sc)
        points, valid = correspondences(batch.boxes[:, 1], batch.flips[:, 1], batch.sizes, args.size // backbone.stride)
        loss, parts = lc_loss(*outputs, points, valid, args.alpha, args.temperature, args.local_loss)
        probe_loss, accuracy = training.probe(logits, batch.labels)
        lr, momentum = run.set_lr(), training.cosine_schedule(run.step, run.total, 0, args.momentum, 1.0)
        optimizer.zero_grad()
        (loss + probe_loss).backward()
        optimizer.step()
        model.update_target(momentum)
        std = F.normalize(outputs[0].detach().float(), dim=1).std(0).mean()  # 1/sqrt(D) at most; 0: collapsed
        run.log(loss=loss, **parts, valid=valid.float().mean(), std=std, **accuracy, lr=lr, momentum=momentum)

    knn_report(args, model.backbone, run.folder / "knn.json", device)


def main():
    import training

    with training.one_line_errors():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--projector", help="hidden and output width of projector and predictor")
        parser.add_argument("--alpha", type=float, help="weight of the local loss; 0: BYOL's alone")
        parser.add_argument("--local-loss", default="contrastive", choices=["contrastive", "mse"])
        parser.add_argument("--temperature", type=float, default=0.1)
        parser.add_argument("--momentum", type=float, help="of the target network at the start; 1 at the end")
        train(training.parse_args(parser, RECIPES))


if __name__ == "__main__":
    main()
