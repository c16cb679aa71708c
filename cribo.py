# SPDX-License-Identifier: MIT
r"""CrIBo: Self-Supervised Learning via Cross-Image Object-Level Bootstrapping.

T. Lebailly, T. Stegmuller, B. Bozorgtabar, J.-P. Thiran, T. Tuytelaars. ICLR 2024. arXiv:2310.07855

A student learns to predict what a teacher, its own moving average, says of the other view of an
image, as in DINO: of the image and of its objects, clusters of the features of both views. It also
predicts each object's nearest neighbour among those of earlier images, if the match is trusted: if
the way to the neighbour, to its other view and back to the batch ends at the same object.

    python cribo.py                                                  # a demonstration, on a CPU
    python cribo.py --data imagenet --batch-size 128                 # one GPU
    torchrun --nproc_per_node=8 cribo.py --data imagenet             # 8 GPUs: the paper's ViT-S/16
    torchrun --nproc_per_node=8 cribo.py --data imagenet --arch vit_base_patch16  # its ViT-B/16
    torchrun --nproc_per_node=8 cribo.py --data coco                 # ViT-S/16 on COCO's train2017
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_id=1 --rdzv_backend=c10d \
        --rdzv_endpoint=HOST:29500 cribo.py --data imagenet          # on each of 4 nodes

    Section 3.2.1  joint_space_clustering       Eqs. (5)-(10)  distillation_loss
    Eq. (1)        object_representations       Eq. (11)       cribo_loss
    Eq. (2)        nearest, MemoryBank          Appendix A.1   Head, RECIPES
    Eqs. (3), (4)  cycle_consistent_matches     Fig. 5         "bootstrap" in the log
    Table 5        --no-object, --no-cross-image               Table 7  --no-cycle

Differences
 1. Eq. (2) says arg min of a similarity: arg max is meant. Eq. (9) divides by the temperature
    inside the head: here it is done outside, as in Eq. (5).
 2. The paper takes the clustering from CrOC without details: here it is the released code's, on the
    teacher's features. The costs of all images of a process are scaled together.
 3. The released code averages the two directions of each loss; the paper and this file add them.
 4. Eqs. (6) and (8) are means over one image's objects; in the released code over all objects of a
    process, here of all processes. B_j in Eq. (4), too, is the batch of all processes, not of one:
    it holds more objects that may be nearer. With 8 processes 4.5% are trusted here, 20% there.
 5. From the released code: no cross-image term in the first epoch; the bank keeps the teacher's
    objects unnormalised. Ours: it has K places for each of S images, in bfloat16; one epoch must
    fill it, as a larger one would hold objects' own earlier selves. By Table 4 S must be large: the
    cross-image term helps with 25k, not with 1k or 5k.
 6. "Exactly the same as in DINO" (A.1) is settled by the released code's arguments: ViT-S without
    gradient clipping, with free norms in the last layers; ViT-B with a recipe of its own. The
    teacher's temperature rises at each step. Drop path is the student's only.
 7. The released ImageNet checkpoints have K = 32 (`--num-objects 32`), not A.1's 12.
 8. Ours: a ResNet's global representation is its average; BatchNorm in the teacher takes its own
    batch; blur as in vicreg.py; no incomplete last batches; a linear classifier reports accuracy.
"""
import argparse
import copy
import functools
import typing

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.transforms import RandomResizedCrop

# --- 1. Views and positions -----------------------------------------------------------------------

JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
COLOURS = [  # of the first view and of the second
    dict(jitter=JITTER, blur_p=1.0),
    dict(jitter=JITTER, blur_p=0.1, solarize_p=0.2),
]


def sample_views(image, size):
    """Two views of a PIL image, [(box, flip, size), ...]; box: (top, left, height, width)."""
    area = (0.25, 1.0)
    boxes = [RandomResizedCrop.get_params(image, area, ratio=(3 / 4, 4 / 3)) for _ in range(2)]
    return [(box, torch.rand(()).item() < 0.5, size) for box in boxes]


def float32(x):
    """x in float32 (float64 stays)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def positions(boxes, flips, grid):
    """Where the locations of a map have their centres in the original image.

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


def joint_positions(boxes, flips, grid):
    """boxes (B, 2, 4), flips (B, 2) of two views -> positions of both (B, 2N, 2), N = grid^2."""
    both = positions(boxes.flatten(0, 1), flips.flatten(), grid)  # (2B, grid, grid, 2)
    return rearrange(both, "(b view) h w yx -> b (view h w) yx", view=2)


# --- 2. Loss --------------------------------------------------------------------------------------

def sinkhorn(cost, columns, iters, sharpness):
    """Scales exp(-sharpness * cost) (B, n, K): its columns to sums `columns` (B, K), and its rows,
    more nearly with each iteration, to equal sums."""
    plan = torch.exp(-sharpness * cost)
    for _ in range(iters):
        plan = plan / plan.sum(2, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True) * columns[:, None]
    return plan


def distances_to_clusters(distances, labels, num_objects):
    """From each location to the nearest other one of each cluster: (B, n, K), from 0 to 1.

    distances (B, n, n): between locations, infinite from each to itself; labels (B, n): clusters,
    num_objects for none. Clusters without another location are at the image's mean distance, in
    which they count as 0.
    """
    b, n = labels.shape
    size = num_objects + 1  # clusters of an image, the last one for locations without a cluster
    cluster = labels + size * torch.arange(b, device=labels.device)[:, None]  # unique in the batch
    d = distances.new_full((b * size, n), torch.inf)
    # Row i of an image's distances goes to the cluster of location i, which keeps the minimum.
    index = cluster.flatten()[:, None].expand(-1, n)  # (B n, n)
    d.scatter_reduce_(0, index, distances.flatten(0, 1), "amin")
    d = rearrange(d, "(b k) n -> b n k", b=b)[:, :, :num_objects]

    none = d.isinf()
    mean = d.masked_fill(none, 0).mean((1, 2), keepdim=True)  # (B, 1, 1)
    d = torch.where(none, mean, d)
    return d / d.amax((1, 2), keepdim=True).clamp(min=1e-12)


@torch.no_grad()
def joint_space_clustering(tokens, positions, num_objects, pos_weight, init=None, iters=5,
                           sinkhorn_iters=5, sinkhorn_lambda=20.0):
    """Which object each location of an image's two views belongs to. Section 3.2.1.

    tokens (B, 2N, D): local features, first view then second; positions (B, 2N, 2): theirs, else
    ValueError; pos_weight: lambda_pos; init (B, K): tokens that start the clusters, else random
    -> Q (B, 2N, K): each location in one cluster, columns l1-normalised in each view.
    """
    b, n, _ = tokens.shape
    if positions.shape != (b, n, 2):  # a map that is no square grid, or has a [CLS] token
        raise ValueError(f"positions {list(positions.shape)} are not those of {n} tokens")
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = F.normalize(float32(tokens), dim=2)
        positions = float32(positions)
        y, x = positions.unbind(2)  # (B, 2N) each
        distances = torch.hypot(y[:, :, None] - y[:, None], x[:, :, None] - x[:, None])
        distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)

        # At first a cluster is its one starting token. All other locations are in none.
        if init is None:
            init = torch.rand(b, n, device=tokens.device).argsort(1)[:, :num_objects]  # distinct
        numbers = torch.arange(num_objects, device=tokens.device).expand(b, -1)  # (B, K)
        labels = torch.full((b, n), num_objects, device=tokens.device)
        labels.scatter_(1, init, numbers)
        centroids = tokens.take_along_dim(init[:, :, None], 1)  # (B, K, D)
        shares = tokens.new_full((b, num_objects), 1 / num_objects)  # of the locations

        for _ in range(iters):
            similarity = tokens @ centroids.mT  # (B, 2N, D) (B, D, K) -> (B, 2N, K)
            apart = distances_to_clusters(distances, labels, num_objects)  # (B, 2N, K)
            cost = pos_weight * apart - similarity
            low, high = cost.aminmax()  # of all images
            cost = (cost - low) / (high - low).clamp(min=1e-12)

            plan = sinkhorn(cost, shares, sinkhorn_iters, sinkhorn_lambda)
            labels = plan.argmax(2)  # (B, 2N)
            q = F.one_hot(labels, num_objects).to(tokens.dtype)  # (B, 2N, K)
            centroids = F.normalize(q.mT @ tokens, dim=2)  # (B, K, 2N) (B, 2N, D) -> (B, K, D)
            shares = F.normalize(q.sum(1) + 0.01, p=1, dim=1)  # more than 0: none is lost for good

        views = q.unflatten(1, (2, n // 2))  # (B, 2, N, K)
        return F.normalize(views, p=1, dim=2).flatten(1, 2)


def in_both_views(assignment):
    """Which objects of an assignment (B, 2N, K) have locations in both views: (B, K) bool."""
    q_1, q_2 = assignment.chunk(2, 1)  # (B, N, K) each
    return (q_1.sum(1) > 0) & (q_2.sum(1) > 0)


def object_representations(z_1, z_2, assignment, count=None):
    """Mean local features of each object that is in both views. Eq. (1).

    z_1, z_2 (B, N, D), assignment Q (B, 2N, K), count: M, which spares a host sync
    -> c_1, c_2 (M, D), image by image; valid (B, K).
    """
    with torch.autocast(z_1.device.type, enabled=False):
        q_1, q_2 = assignment.chunk(2, 1)  # (B, N, K) each
        c_1 = q_1.mT @ z_1.to(q_1.dtype)  # (B, K, N) (B, N, D) -> (B, K, D)
        c_2 = q_2.mT @ z_2.to(q_2.dtype)
    valid = in_both_views(assignment)
    if count is None:
        count = valid.sum()
    kept = valid.flatten().argsort(descending=True, stable=True)[:count]  # (M,), image by image
    return c_1.flatten(0, 1)[kept], c_2.flatten(0, 1)[kept], valid


@torch.no_grad()
def nearest(queries, rows, chunk=None):
    """The index (M,) of the row (R, D) of largest cosine to each query (M, D). Eq. (2).

    Only M x chunk cosines exist at a time. On CUDA rows in bfloat16 are compared in float16.
    """
    if chunk is None:
        chunk = 65_536 if rows.is_cuda else 8_192
    if not len(queries):  # max() refuses no rows, which a batch without objects has
        return torch.zeros(0, dtype=torch.long, device=rows.device)
    found = []
    with torch.autocast(rows.device.type, enabled=False):
        queries = F.normalize(queries.float(), dim=1)
        half = queries.half()
        for part in rows.split(chunk):
            part = F.normalize(part.float(), dim=1)  # (chunk, D)
            if rows.is_cuda and rows.dtype == torch.bfloat16:
                cosines = torch.mm(half, part.half().T, out_dtype=torch.float32)
            else:
                cosines = queries @ part.T  # (M, D) (D, chunk) -> (M, chunk)
            found.append(cosines.max(1))
    values, indices = map(torch.stack, zip(*found))  # (chunks, M) each
    best = values.argmax(0, keepdim=True)
    return (chunk * best + indices.gather(0, best))[0]


@torch.no_grad()
def all_counts(count):
    """`count` () of each process, a list. A collective, and a host sync."""
    if not dist.is_initialized():
        return [count.item()]
    counts = count.new_zeros(dist.get_world_size())
    counts[dist.get_rank()] = count
    dist.all_reduce(counts)
    return counts.tolist()


@torch.no_grad()
def all_objects(c, counts=None):
    """Objects (M, D) of each process, M its own -> those of all, and where this process's begin.
    counts: M of each process, which spares a host sync."""
    if not dist.is_initialized():
        return c.detach(), 0
    if counts is None:
        counts = all_counts(torch.tensor(len(c), device=c.device))
    padded = F.pad(c, (0, 0, 0, max(counts) - len(c)))  # all_gather wants equal shapes
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    rows = [part[:count] for part, count in zip(gathered, counts)]
    return torch.cat(rows), sum(counts[: dist.get_rank()])


class MemoryBank(nn.Module):
    """M_1 and M_2 of Section 3.2.2: `objects` (2, num_objects, D), the newest, in both views."""

    def __init__(self, num_objects, dim, dtype=torch.float32):
        super().__init__()
        self.register_buffer("objects", torch.zeros(2, num_objects, dim, dtype=dtype))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))  # objects

    @property
    def ready(self):
        return self.pushed.item() >= self.objects.shape[1]

    def push(self, c_1, c_2, counts=None):
        """Adds objects (M, D) of each process in place of the oldest ones. A collective; counts: as
        in all_objects()."""
        size = self.objects.shape[1]
        both, _ = all_objects(torch.cat([c_1, c_2], 1), counts)  # (G M, 2D)
        both = both[-size:].to(self.objects.dtype)
        slots = (self.pushed + torch.arange(len(both), device=both.device)) % size
        self.objects[:, slots] = torch.stack(both.chunk(2, 1))  # (2, G M, D)
        self.pushed += len(both)


@torch.no_grad()
def cycle_consistent_matches(c_1, c_2, bank, counts=None):
    """Nearest neighbours of objects c_1, c_2 (M, D) in a MemoryBank that is ready: nn_1, nn_2 (M,),
    indices into M_1 and M_2; and whether to trust them: ok_1, ok_2 (M,) bool. A collective."""
    m_1, m_2 = bank.objects
    torch._assert_async(bank.pushed >= len(m_1), "the bank is not full: see MemoryBank.ready")
    both, first = all_objects(torch.cat([c_1, c_2], 1), counts)  # (G M, 2D)
    b_1, b_2 = both.chunk(2, 1)
    own = first + torch.arange(len(c_1), device=c_1.device)  # (M,): where c_1 is in b_1

    # The views of an object have one index in both banks, both batches: a jump, Eq. (3), keeps it.
    nn_1 = nearest(c_1, m_1)  # Eq. (2)
    nn_2 = nearest(c_2, m_2)
    ok_1 = nearest(m_2[nn_1], b_2) == own  # Eq. (4)
    ok_2 = nearest(m_1[nn_2], b_1) == own
    return nn_1, nn_2, ok_1, ok_2


def other_view_log_probabilities(logits, temp):
    """The student's logits (2M, L) -> log-probabilities, row i those of object i's other view."""
    other = logits.roll(len(logits) // 2, 0)  # first views and second views change places
    return F.log_softmax(float32(other) / temp, dim=1)


def mean_cross_entropy(teacher_logits, log_q, center, teacher_temp, rows=None):
    """Mean of H(p, q) over the first views' rows plus mean over the second's. Eqs. (5)-(10).

    teacher_logits (T, L); log_q (2M, L): of other_view_log_probabilities(); rows (T,): those of the
    2M that the teacher's are for, by default all. A collective: means are over all G processes, and
    each returns G times its share, as DDP averages gradients. 0 without rows.
    """
    first_view = torch.arange(len(log_q), device=log_q.device) < len(log_q) // 2  # (2M,)
    if rows is not None:
        log_q = log_q[rows]  # (T, L)
        first_view = first_view[rows]
    logits = float32(teacher_logits.detach()) - center
    p = F.softmax(logits / teacher_temp, dim=1)  # (T, L)  Eqs. (5), (7), (9)
    entropy = -(p * log_q).sum(1)  # (T,): H(p, q)

    first = first_view.sum()
    count = torch.stack([first, len(first_view) - first]).to(p.dtype)  # Z_1, Z_2
    if dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return (entropy / torch.where(first_view, count[0], count[1])).sum()


def distillation_loss(teacher_logits, student_logits, center, teacher_temp, student_temp,
                      valid=None):
    """H(teacher of view 1, student of view 2) + H(teacher of 2, student of 1). Eqs. (5)-(10).

    logits (2M, L): first views, then second; center (L,): of the teacher's logits; valid (2M,): the
    teacher's rows that count, by default all. A collective, like mean_cross_entropy().
    """
    log_q = other_view_log_probabilities(student_logits, student_temp)
    if valid is not None:
        teacher_logits = teacher_logits[valid]
    return mean_cross_entropy(teacher_logits, log_q, center, teacher_temp, valid)


class Targets(typing.NamedTuple):
    """The teacher's logits of images and objects: all first views, then all second ones."""
    image: Tensor  # (2B, L)
    objects: Tensor  # (2M, L)
    neighbours: Tensor  # (T, L): of trusted nearest neighbours
    trusted: Tensor  # (T,): the objects, of 2M, whose neighbours they are


def cribo_loss(targets, image_logits, object_logits, image_center, object_center, teacher_temp,
               student_temp=0.1, object_coeff=1.0, cross_image_coeff=1.0):
    """Eq. (11). A coefficient of 0 leaves out an object term (Table 5).

    targets: of the teacher; image_logits (2B, L), object_logits (2M, L): of the student; centers
    (L,) -> the loss, and its terms, unweighted. A collective, like mean_cross_entropy().
    """
    image = distillation_loss(targets.image, image_logits, image_center, teacher_temp,
                              student_temp)  # Eq. (10)

    log_q = other_view_log_probabilities(object_logits, student_temp)  # (2M, L)
    objects = mean_cross_entropy(targets.objects, log_q, object_center, teacher_temp)  # Eq. (6)
    cross_image = mean_cross_entropy(targets.neighbours, log_q, object_center, teacher_temp,
                                     targets.trusted)  # Eq. (8)
    loss = image + object_coeff * objects + cross_image_coeff * cross_image
    return loss, {"image": image, "object": objects, "cross_image": cross_image}


@torch.no_grad()
def update_center(center, logits, momentum=0.9):
    """Moves center (L,) towards the mean of the teacher's logits (n/G, L). A collective."""
    total = logits.sum(0, dtype=center.dtype)
    total = F.pad(total, (0, 1), value=len(logits))  # (L + 1,): the number of rows comes last
    if dist.is_initialized():
        dist.all_reduce(total)
    mean = total[:-1] / total[-1]
    center.lerp_(torch.where(total[-1] > 0, mean, center), 1 - momentum)


# --- 3. Model -------------------------------------------------------------------------------------

class Head(nn.Module):
    """DINO's projection head, with a last layer for images and one for objects. Appendix A.1."""

    def __init__(self, dim, hidden, bottleneck, outputs, norm_last_layer):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, bottleneck))
        for layer in self.trunk[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.image = weight_norm(nn.Linear(bottleneck, outputs, bias=False))
        self.object = weight_norm(nn.Linear(bottleneck, outputs, bias=False))
        for layer in (self.image, self.object):
            norms = layer.parametrizations.weight.original0  # (outputs, 1): of the rows
            nn.init.ones_(norms).requires_grad_(not norm_last_layer)  # fixed: logits are cosines

    def forward(self, z_bar, c):
        """Global representations (2B, D), objects (M, D) -> logits (2B, L), (M, L)."""
        both = self.trunk(torch.cat([z_bar, c]))  # (2B + M, bottleneck)
        both = F.normalize(both, dim=1)
        image, objects = both.split([len(z_bar), len(c)])
        return self.image(image), self.object(objects)


class Student(nn.Module):
    """Backbone, head of these widths (hidden, bottleneck, outputs) and linear classifier.

    backbone: images (B, 3, H0, W0) -> maps z (B, N, D), global z_bar (B, D), with D = .dim
    """

    def __init__(self, backbone, widths=(2048, 256, 65_536), num_classes=0, norm_last_layer=True):
        super().__init__()
        self.backbone = backbone
        self.head = Head(backbone.dim, *widths, norm_last_layer)
        self.probe = nn.Linear(backbone.dim, num_classes) if num_classes else None

    def forward(self, x, assignment, count=None):
        """Views x (2B, 3, H0, W0), assignment (B, 2N, K), count: M, where it is known -> logits of
        images (2B, L), of objects (2M, L), and of the first views' classes (B, classes) or None."""
        z, z_bar = self.backbone(x)  # (2B, N, D), (2B, D)
        z_1, z_2 = z.chunk(2)  # (B, N, D) each
        c_1, c_2, _ = object_representations(z_1, z_2, assignment, count)  # (M, D) each
        image_logits, object_logits = self.head(z_bar, torch.cat([c_1, c_2]))
        first_views = z_bar.detach()[: len(z_1)]
        logits = self.probe(first_views) if self.probe else None
        return image_logits, object_logits, logits


class CrIBo(nn.Module):
    """The student; the teacher (`backbone`, `head`) and the centres of its logits; the bank."""

    def __init__(self, student, num_objects=12, pos_weight=1.0, bank_images=25_000):
        super().__init__()
        self.num_objects = num_objects
        self.pos_weight = pos_weight
        self.student = student
        self.backbone = copy.deepcopy(student.backbone).requires_grad_(False)
        self.head = copy.deepcopy(student.head).requires_grad_(False)
        for module in self.backbone.modules():  # no eval(), which would freeze BatchNorm as well
            if type(module).__name__ == "StochasticDepth":  # torchvision's drop path
                module.p = 0.0
            elif type(module).__name__ == "DropPath":  # timm's
                module.drop_prob = 0.0
        outputs = student.head.image.out_features
        self.register_buffer("image_center", torch.zeros(outputs))
        self.register_buffer("object_center", torch.zeros(outputs))
        self.bank = MemoryBank(bank_images * num_objects, student.backbone.dim, torch.bfloat16)

    @torch.no_grad()
    def forward(self, x, positions, match, cycle=True):
        """What the teacher says of views x (2B, 3, H0, W0) with positions (B, 2N, 2).

        match: whether to find neighbours, in a bank that is ready; cycle: to trust by Eq. (4), not
        all -> assignment (B, 2N, K), z_bar (2B, D), Targets. A collective.
        """
        z, z_bar = self.backbone(x)  # (2B, N, D), (2B, D)
        z_1, z_2 = z.chunk(2)  # (B, N, D) each
        z_cat = torch.cat([z_1, z_2], 1)  # (B, 2N, D)
        assignment = joint_space_clustering(z_cat, positions, self.num_objects, self.pos_weight)
        counts = all_counts(in_both_views(assignment).sum())
        own = counts[dist.get_rank() if dist.is_initialized() else 0]
        c_1, c_2, _ = object_representations(z_1, z_2, assignment, own)  # (M, D) each

        c = torch.cat([c_1, c_2])  # (2M, D)
        trusted = torch.arange(0, device=c.device)
        neighbours = c[:0]
        if match:
            nn_1, nn_2, ok_1, ok_2 = cycle_consistent_matches(c_1, c_2, self.bank, counts)
            ok = torch.cat([ok_1, ok_2]) | (not cycle)
            trusted = ok.nonzero().flatten()  # (T,) of the 2M
            m_1, m_2 = self.bank.objects
            neighbours = torch.cat([m_1[nn_1], m_2[nn_2]])  # (2M, D)
            neighbours = neighbours[trusted].to(c.dtype)  # (T, D)
        self.bank.push(c_1, c_2, counts)

        image, objects = self.head(z_bar, torch.cat([c, neighbours]))  # (2B, L), (2M + T, L)
        objects, neighbours = objects.split([len(c), len(trusted)])
        return assignment, z_bar, Targets(image, objects, neighbours, trusted)

    @torch.no_grad()
    def update_teacher(self, momentum):
        """theta_t <- momentum * theta_t + (1 - momentum) * theta_s."""
        student = [*self.student.backbone.parameters(), *self.student.head.parameters()]
        teacher = [*self.backbone.parameters(), *self.head.parameters()]
        torch._foreach_lerp_(teacher, student, 1 - momentum)


# --- 4. Training ----------------------------------------------------------------------------------

VIT_SMALL = dict(  # Appendix A.1, Difference 6
    arch="vit_small_patch16", size=224, head="2048-256-65536", epochs=800, batch_size=1024,
    base_lr=5e-4, final_lr=1e-5, warmup_epochs=10, weight_decay=0.04, final_weight_decay=0.4,
    drop_path=0.1, clip_grad=0.0, freeze_epochs=1, norm_last_layer=False, momentum=0.996,
    teacher_temp=0.07, temp_warmup_epochs=30, num_objects=12, pos_weight=1.0, bank_images=25_000)
RECIPES = {  # chosen by --arch or else by --data, imagenet's for any other; flags override it
    "imagenet": VIT_SMALL,
    "vit_base_patch16": VIT_SMALL | dict(
        arch="vit_base_patch16", epochs=400, base_lr=7.5e-4, final_lr=2e-6, clip_grad=0.3,
        freeze_epochs=3, norm_last_layer=True, temp_warmup_epochs=50),
    "coco": VIT_SMALL | dict(epochs=300, batch_size=256, num_objects=64, pos_weight=2.0),
    "small": VIT_SMALL | dict(  # this and the next one: this project's own
        arch="vit_tiny_patch16", size=160, head="2048-256-4096", epochs=400, batch_size=128,
        momentum=0.99, temp_warmup_epochs=15, bank_images=0),
    "shapes": VIT_SMALL | dict(
        arch="tiny_convnet", size=64, head="512-128-1024", epochs=4, batch_size=64, base_lr=0.016,
        warmup_epochs=1, final_weight_decay=0.04, drop_path=0.0, clip_grad=3.0,
        norm_last_layer=True, momentum=0.99, teacher_temp=0.04, num_objects=8, bank_images=1_000),
}


def make_optimizer(student):
    """AdamW with two groups: weights, which decay, and biases and normalization, which do not."""
    weights = [p for p in student.parameters() if p.ndim > 1 and p.requires_grad]
    others = [p for p in student.parameters() if p.ndim == 1]
    groups = [dict(params=weights), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, fused=True)


def check_sizes(args, grid, images):
    """Raises UserError where the clusters or the bank are impossible."""
    from common import UserError
    if not 0 < args.num_objects <= 2 * grid**2:
        raise UserError(f"--num-objects {args.num_objects}: two views have {2 * grid**2} locations")
    if args.bank_images >= images:
        raise UserError(f"--bank-images {args.bank_images}: give less than {images}, all images")


def train(args):
    import common
    import training
    device = training.set_up(args.seed)
    data = common.open_data(args.data, "train", args.size)
    backbone = training.build_backbone(args)
    grid = common.grid_of(args.size, backbone.stride)
    if not args.bank_images:
        args.bank_images = min(25_000, len(data) // 2)
    check_sizes(args, grid, len(data))
    student = Student(backbone, args.head, len(data.classes), args.norm_last_layer)
    student, ddp = training.distribute(student, device)  # not all: DDP would send the bank as well
    model = CrIBo(student, args.num_objects, args.pos_weight, args.bank_images).to(device)
    optimizer = make_optimizer(student)
    run = training.Run(args, model, optimizer, data, device)  # resumes

    colours = [common.Photometric(**colour, size=args.size) for colour in COLOURS]

    for batch in run.batches(functools.partial(sample_views, size=args.size)):
        epoch = run.step / run.per_epoch
        match = args.cross_image and epoch >= 1
        if match and epoch == 1 and not model.bank.ready:  # Difference 5
            most = model.bank.pushed.item() // args.num_objects
            raise common.UserError(f"--bank-images {args.bank_images}: one epoch's objects do not "
                                   f"fill the bank: give {most} or less, and another --name")

        x = torch.cat(common.recolour(colours, batch.views))  # (2B, 3, H0, W0)
        pos = joint_positions(batch.boxes, batch.flips, grid)  # (B, 2N, 2)

        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            assignment, z_bar, targets = model(x, pos, match, args.cycle)
            image_logits, object_logits, logits = ddp(x, assignment, len(targets.objects) // 2)
        rise = epoch / args.temp_warmup_epochs if epoch < args.temp_warmup_epochs else 1
        temp = 0.04 + rise * (args.teacher_temp - 0.04)
        loss, parts = cribo_loss(
            targets, image_logits, object_logits, model.image_center, model.object_center, temp,
            object_coeff=args.object, cross_image_coeff=args.cross_image)
        update_center(model.image_center, targets.image)
        update_center(model.object_center, targets.objects)
        probe_loss, accuracy = training.probe(logits, batch.labels)

        lr = run.set_lr()
        momentum = training.cosine_schedule(run.step, run.total, 0, args.momentum, 1.0)
        decay = training.cosine_schedule(run.step, run.total, 0, args.weight_decay,
                                         args.final_weight_decay)
        optimizer.param_groups[0]["weight_decay"] = decay
        optimizer.zero_grad()
        (loss + probe_loss).backward()
        if args.clip_grad:
            for p in student.parameters():  # each by itself, as in DINO
                nn.utils.clip_grad_norm_(p, args.clip_grad)
        if epoch < args.freeze_epochs:
            student.head.image.zero_grad()  # to None, so AdamW leaves these layers alone
            student.head.object.zero_grad()
        optimizer.step()
        model.update_teacher(momentum)

        seen = len(targets.objects)  # 2M
        std = F.normalize(z_bar.float(), dim=1).std(0).mean()  # 1/sqrt(D) at most; 0: collapsed
        run.log(loss=loss, **parts, bootstrap=len(targets.trusted) / max(1, seen),
                objects=seen / len(x), std=std, **accuracy, lr=lr, decay=decay,
                momentum=momentum, temperature=temp)
        run.end_step()  # saves as time goes by; stops on a signal

    claims = ["clusters"] if args.data == "shapes" else []  # photographs mostly have no masks
    run.finish("knn", *claims, figure="objects --checkpoint")


def head_widths(text):
    widths = [int(width) for width in text.split("-")]
    if len(widths) != 3 or min(widths) < 1:
        raise ValueError
    return widths


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    on_or_off = argparse.BooleanOptionalAction
    flag = parser.add_argument
    flag("--head", type=head_widths, help="hidden, bottleneck, output width, like 512-128-1024")
    flag("--num-objects", type=int, help="K, clusters of an image")
    flag("--pos-weight", type=float, help="lambda_pos, weight of distances in the clustering")
    flag("--bank-images", type=int, help="S, images in the bank; 0: half of all")
    flag("--object", default=True, action=on_or_off, help="the loss across views, Eq. (6)")
    flag("--cross-image", default=True, action=on_or_off, help="the loss across images, Eq. (8)")
    flag("--cycle", default=True, action=on_or_off, help="trust by Eq. (4); else all neighbours")
    flag("--teacher-temp", type=float, help="temperature of the teacher after its rise from 0.04")
    flag("--temp-warmup-epochs", type=float, help="epochs of that rise; 0: none")
    flag("--momentum", type=float, help="of the teacher at the start; it ends at 1")
    flag("--final-weight-decay", type=float, help="weight decay of the last step")
    flag("--drop-path", type=float, help="of the student: rate in the last block")
    flag("--clip-grad", type=float, help="largest norm of a parameter's gradient; 0: no limit")
    flag("--freeze-epochs", type=int, help="epochs in which the last layers do not learn")
    flag("--norm-last-layer", action=on_or_off, help="keep norm 1 in the rows of the last layers")
    try:
        from training import launch
    except ModuleNotFoundError:
        parser.parse_args()  # so that --help works where this file lies alone
        parser.error("training needs common.py and training.py beside this file")
    limits = dict(teacher_temp=(0.001, 1), momentum=(0, 1), drop_path=(0, 0.9))
    launch(train, parser, RECIPES, **limits)


if __name__ == "__main__":
    main()
