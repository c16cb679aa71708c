"""CrIBo: Self-Supervised Learning via Cross-Image Object-Level Bootstrapping.

Tim Lebailly, Thomas Stegmuller, Behzad Bozorgtabar, Jean-Philippe Thiran, Tinne Tuytelaars. ICLR 2024. arXiv:2310.07855

A student learns to predict, as DINO's does, what its own moving average, the teacher, says of the other view of an image:
of the image as a whole, and of each of its objects. The objects are clusters of the local features of both views
together, so that each is known in either view. And an object's nearest neighbour among the objects of earlier images must
be predicted from it too, where the match is trusted: where going to the neighbour, to the other view and back leads home.

    python cribo.py                                                    # a demonstration: scenes made in memory, on a CPU
    python cribo.py --data imagenet --batch-size 128                   # one GPU
    torchrun --nproc_per_node=8 cribo.py --data imagenet               # eight: the paper's ViT-S/16
    torchrun --nproc_per_node=8 cribo.py --data imagenet --arch vit_base_patch16 --epochs 400         # its ViT-B/16
    torchrun --nproc_per_node=8 cribo.py --data coco                   # ViT-S/16; coco/ holds train2017 alone, or as train/
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 cribo.py --data imagenet

    Eq. (1)  object_representations     Eqs. (5)-(10)  distillation_loss     Table 5  --no-object --no-cross-image
    Eq. (2)  nearest, MemoryBank        Eq. (11)       cribo_loss            Table 7  --no-cycle
    Eqs. (3), (4)  cycle_consistent_matches            Section 3.2.1, Table 4  joint_space_clustering

The result, `backbone.pt`, is the teacher's backbone, as DINO's evaluations take it.

Differences
 1. Eq. (2) says arg min of the similarity; arg max is meant. Eq. (9) divides by the temperature inside the head; here it
    is outside, as in Eq. (5).
 2. The paper takes the clustering from CrOC without details: joint_space_clustering() is the released code's, exactly,
    with the teacher's features. The scale of its costs is taken over each process's own part of the batch.
 3. The released code averages the two directions of each loss; the paper, and this file, add them.
 4. Eqs. (6) and (8) are averaged over the objects of all images and processes together, as the released code does within
    a process, not first within each image: few trusted objects weigh as much as many. B_j in Eq. (4), too, is the batch
    of all processes.
 5. From the released code: no cross-image term in the first epoch; the bank keeps the teacher's objects unnormalised.
    Ours: nor is there one before the bank is full. It has room for K objects of each of S images; those that are
    discarded leave theirs to more images. It is kept in bfloat16 (`--bank-dtype`) and searched in float16.
 6. "Exactly the same as in DINO": for every backbone the defaults of DINO's code, from which its published runs depart here
    and there: its lr, 5e-4 * batch / 256, warmup, final lr 1e-5, weight decay from 0.04 to 0.4 but
    for biases and normalisation, last layers with rows of norm one, frozen in the first epoch, centres with momentum 0.9,
    a teacher's temperature that rises from 0.04 to 0.07 in 30 epochs (here with each step), each parameter's gradient
    clipped to norm 3 (`--clip-grad`). Drop path is the student's only. Colours are DINO's; crops
    have 25 to 100% of the image's area.
 7. A ResNet's global representation is its average; BatchNorm in the teacher uses the statistics of its own batch.
 8. A linear classifier on detached representations reports accuracy while training; incomplete batches are dropped;
    shapes, tiny_vit and tiny_convnet are this project's own.
"""
import argparse
import copy
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import StochasticDepth

# --- 1. Views and positions ----------------------------------------------------------------------------------------

JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
COLOURS = dict(jitter=JITTER, blur_p=1.0, solarize_p=0.0), dict(jitter=JITTER, blur_p=0.1, solarize_p=0.2)


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
    """Two views of an image of height x width pixels, of 25 to 100% of its area: [(box, flip, size), ...]."""
    return [(random_box(rng, height, width, (0.25, 1.0)), rng.random() < 0.5, size) for _ in range(2)]


def positions(boxes, flips, grid):
    """Centre of each location of a view's feature map, as (y, x) in pixels of the original image.

    boxes (B, 4): top, left, height, width in pixels; flips (B,): mirrored left to right -> (B, grid, grid, 2).
    """
    top, left, height, width = boxes[..., None].unbind(1)  # (B, 1) each
    centers = (torch.arange(grid, device=boxes.device, dtype=boxes.dtype) + 0.5) / grid  # (grid,) in units of the crop
    y = top + height * centers  # (B, grid)
    x = left + width * torch.where(flips[:, None], centers.flip(0), centers)  # (B, grid)
    return torch.stack([y[:, :, None].expand(-1, -1, grid), x[:, None, :].expand(-1, grid, -1)], 3)


def joint_positions(boxes, flips, grid):
    """boxes (B, 2, 4) and flips (B, 2) of two views -> the positions of the locations of both, (B, 2N, 2), N = grid^2."""
    views = zip(boxes.unbind(1), flips.unbind(1))
    return torch.cat([positions(box, flip, grid).flatten(1, 2) for box, flip in views], 1)  # 2 x (B, N, 2) -> (B, 2N, 2)


# --- 2. Loss -------------------------------------------------------------------------------------------------------


def sinkhorn(cost, columns, iters, sharpness):
    """exp(-sharpness * cost) scaled to rows that sum to 1/n each and columns (B, K) that sum to `columns`; (B, n, K).

    columns: shares of the whole, summing to 1. The columns' sums are exact, the rows' in the limit of many iterations.
    """
    plan = torch.exp(-sharpness * cost)
    for _ in range(iters):
        plan = plan / (plan.sum(2, keepdim=True) * plan.shape[1])
        plan = plan / plan.sum(1, keepdim=True) * columns[:, None]
    return plan


def distances_to_clusters(distances, labels, num_objects):
    """From each location to the nearest other one of each cluster, in units of the image's largest such distance.

    distances (B, n, n): between locations, inf on the diagonal; labels (B, n): clusters, num_objects for none
    -> (B, n, K). Where a cluster has no other location it is the image's mean, in which such entries count 0.
    """
    # The least of distances[b, i, j] over the i of each cluster (distances are symmetric): B x n x n memory, where a mask
    # would need B x n x n x K. Whole rows meet whole rows, five times faster on a CPU than a scatter along the last axis.
    b, n = labels.shape
    first = torch.arange(0, b * (num_objects + 1), num_objects + 1, device=labels.device)  # each image's first cluster
    rows = (first[:, None] + labels).view(-1, 1).expand(-1, n)  # (B n, n)
    d = distances.new_full((b * (num_objects + 1), n), torch.inf)
    d = d.scatter_reduce_(0, rows, distances.flatten(0, 1), "amin").view(b, -1, n)[:, :num_objects].mT  # (B, n, K)
    none = d.isinf()
    mean = d.masked_fill(none, 0).mean((1, 2), keepdim=True)  # (B, 1, 1)
    d = torch.where(none, mean, d)
    return d / d.amax((1, 2), keepdim=True).clamp(min=1e-12)  # 0 where all locations are one


@torch.no_grad()
def joint_space_clustering(tokens, positions, num_objects, pos_weight, init=None, iters=5, sinkhorn_iters=5,
                           sinkhorn_lambda=20.0):
    """Which object each location of an image's two views belongs to. Section 3.2.1, after the released code.

    tokens (B, 2N, D): local features of the first view and the second; positions (B, 2N, 2) in pixels of the image;
    pos_weight: lambda_pos; init (B, K): the tokens that start the clusters, by default K <= 2N random ones
    -> (B, 2N, K) float32: each location in one cluster, the columns of each view divided by their sum (if any).
    """
    (b, n, _), k = tokens.shape, num_objects
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = F.normalize(tokens.float(), dim=2)
        positions = positions.float()
        if init is None:
            init = torch.rand(b, n, device=tokens.device).argsort(1)[:, :k]  # distinct
        distances = torch.cdist(positions, positions, compute_mode="donot_use_mm_for_euclid_dist")  # (B, 2N, 2N), exact
        distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        labels = torch.full((b, n), k, device=tokens.device)  # at first a cluster is its starting token, the rest in none
        labels.scatter_(1, init, torch.arange(k, device=tokens.device).expand(b, -1))
        centroids = tokens.gather(1, init[..., None].expand(-1, -1, tokens.shape[2]))  # (B, K, D)
        columns = tokens.new_full((b, k), 1 / k)
        for _ in range(iters):
            similarity = tokens @ centroids.mT  # (B, 2N, D) (B, D, K) -> (B, 2N, K)
            cost = pos_weight * distances_to_clusters(distances, labels, k) - similarity
            low, high = cost.aminmax()
            cost = (cost - low) / (high - low).clamp(min=1e-12)
            labels = sinkhorn(cost, columns, sinkhorn_iters, sinkhorn_lambda).argmax(2)  # (B, 2N)
            hard = F.one_hot(labels, k).float()  # (B, 2N, K)
            columns = F.normalize(hard.sum(1) + 0.01, p=1, dim=1)
            centroids = F.normalize(hard.mT @ tokens, dim=2)  # (B, K, 2N) (B, 2N, D) -> (B, K, D)
        return torch.cat([F.normalize(view, p=1, dim=1) for view in hard.chunk(2, 1)], 1)


def object_representations(z_1, z_2, assignment):
    """Eq. (1): the mean of the local features of each object that is in both views.

    z_1, z_2 (B, N, D): local features; assignment (B, 2N, K) -> c_1, c_2 (M, D) float32, a row for each of the M valid
    objects, image by image, and valid (B, K).
    """
    with torch.autocast(z_1.device.type, enabled=False):
        q_1, q_2 = assignment.chunk(2, 1)  # (B, N, K) each
        valid = (q_1.sum(1) > 0) & (q_2.sum(1) > 0)  # (B, K)
        c_1, c_2 = (torch.einsum("bnk,bnd->bkd", q, z.float()) for q, z in ((q_1, z_1), (q_2, z_2)))  # (B, K, D)
        kept = valid.flatten().nonzero().flatten()  # (M,) of the B K: a size, for which the host must wait
        return c_1.flatten(0, 1)[kept], c_2.flatten(0, 1)[kept], valid


@torch.no_grad()
def nearest(queries, rows, chunk=8192):
    """The index (M,) of the row (S, D) that has the largest cosine similarity to each query (M, D). Eq. (2).

    No more than M x chunk similarities exist at a time. Rows of 16 bits are sought as float16 and summed in float32: unit
    vectors in bfloat16 would swap several times as many near neighbours.
    """
    with torch.autocast(rows.device.type, enabled=False):
        dtype = torch.float32 if rows.dtype == torch.float32 else torch.float16
        queries = F.normalize(queries.float(), dim=1).to(dtype)
        best = torch.full((len(queries),), -torch.inf, device=rows.device)
        index = torch.zeros(len(queries), dtype=torch.long, device=rows.device)
        for start in range(0, len(rows), chunk):
            part = F.normalize(rows[start:start + chunk].float(), dim=1).to(dtype).mT  # (D, chunk)
            if rows.is_cuda and dtype == torch.float16:
                value, i = torch.mm(queries, part, out_dtype=torch.float32).max(1)  # (M, D) (D, chunk) -> (M, chunk) -> (M,)
            else:
                value, i = (queries.float() @ part.float()).max(1)
            index = torch.where(value > best, start + i, index)
            best = torch.maximum(value, best)
        return index


@torch.no_grad()
def all_objects(c):
    """Objects (M, D) of this process -> those of all processes in their order, and the index of this one's first."""
    if not dist.is_initialized():
        return c.detach(), 0
    rank, counts = dist.get_rank(), torch.zeros(dist.get_world_size(), dtype=torch.long, device=c.device)
    counts[rank] = len(c)
    dist.all_reduce(counts)
    counts = counts.tolist()
    padded = F.pad(c, (0, 0, 0, max(counts) - len(c)))  # (max M, D): all_gather wants equal shapes
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    return torch.cat([rows[:count] for rows, count in zip(everyone, counts)]), sum(counts[:rank])


@torch.no_grad()
def cycle_consistent_matches(c_1, c_2, bank):
    """Eqs. (2)-(4): the nearest neighbours of objects c_1, c_2 (M, D) in a MemoryBank that is ready, and their trust.

    -> nn_1, nn_2 (M,): indices into the bank's two parts; ok_1, ok_2 (M,) bool: whether the neighbour, seen in its other
    view, has its own nearest neighbour, among that view's objects in the batch of all processes, in the same object.
    """
    batch, first = all_objects(torch.cat([c_1, c_2], 1))  # (G M, 2D)
    batch, own = batch.chunk(2, 1), first + torch.arange(len(c_1), device=c_1.device)
    matches, closed = [], []
    for view, c in enumerate((c_1, c_2)):
        matches.append(bank.nearest(c, view))
        jumped = bank.objects[1 - view, matches[view]]  # Eq. (3): (M, D)
        closed.append(nearest(jumped, batch[1 - view]) == own)  # Eq. (4): the second jump keeps the index
    return *matches, *closed


def distillation_loss(teacher_logits, student_logits, center, teacher_temp, student_temp, valid=None):
    """H(teacher of view 1, student of view 2) + H(teacher of 2, student of 1), each a mean. Eqs. (5)-(10).

    logits (2M, L): images or objects of the first view, then the same of the second; center (L,): taken off the
    teacher's; valid (2M,) bool: which of the teacher's count, by default all. Means are over the valid rows of all
    processes: each returns G times its share, so that DDP's average of gradients is that of one process. 0 without any.
    """
    if valid is None:
        valid = torch.ones(len(teacher_logits), dtype=torch.bool, device=teacher_logits.device)
    count, loss = valid.view(2, -1).sum(1).float(), 0.0  # (2,): Z_1 and Z_2 in Eq. (8)
    if dist.is_initialized():
        dist.all_reduce(count)  # a constant: nothing to differentiate
        count = count / dist.get_world_size()
    views = zip(teacher_logits.chunk(2), reversed(student_logits.chunk(2)), valid.chunk(2), count)
    for teacher, student, counted, total in views:
        teacher, student = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (teacher.detach(), student))
        p = F.softmax((teacher - center) / teacher_temp, dim=1)  # (M, L)  Eq. (5)
        entropy = -(p * F.log_softmax(student / student_temp, dim=1)).sum(1)  # (M,)
        loss = loss + torch.where(counted, entropy, 0).sum() / total.clamp(min=1e-6)  # Eqs. (6), (8), (10)
    return loss


def cribo_loss(teacher, student, centers, teacher_temp, student_temp=0.1, terms=("image", "object", "cross_image")):
    """Eq. (11): the sum of the `terms`, and all of them.

    teacher: logits (2B, L) of images, (2M, L) of objects, (2M, L) of their nearest neighbours, and whether these are
    trusted, (2M,) bool; student: logits of images and of objects; centers: of images' and objects' logits, (L,) each.
    """
    (image_t, object_t, neighbour_t, ok), (image_s, object_s) = teacher, student
    temps = teacher_temp, student_temp
    parts = {"image": distillation_loss(image_t, image_s, centers[0], *temps),  # Eq. (10)
             "object": distillation_loss(object_t, object_s, centers[1], *temps),  # Eq. (6)
             "cross_image": distillation_loss(neighbour_t, object_s, centers[1], *temps, ok)}  # Eq. (8)
    return sum(part * (name in terms) for name, part in parts.items()), parts


@torch.no_grad()
def update_center(center, logits, momentum=0.9):
    """center (L,) <- momentum * center + (1 - momentum) * the mean of logits (n, L) of all processes, if there are any."""
    total = torch.cat([logits.float().sum(0), center.new_full((1,), len(logits))])  # (L + 1,)
    if dist.is_initialized():
        dist.all_reduce(total)
    mean = torch.where(total[-1] > 0, total[:-1] / total[-1].clamp(min=1), center)
    center.lerp_(mean, 1 - momentum)


# --- 3. Model ------------------------------------------------------------------------------------------------------


def mlp(*widths):
    """Linear layers, each but the last with GELU."""
    layers = []
    for i, o in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(i, o), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


class Head(nn.Module):
    """DINO's projection heads of images and objects, which share all but the last layer. Appendix A.1.

    y (2B, D), c (2M, D) -> logits (2B, L), (2M, L), before the temperature: cosines with L directions.
    """

    def __init__(self, dim, hidden=2048, bottleneck=256, outputs=65536):
        super().__init__()
        self.trunk = mlp(dim, hidden, hidden, bottleneck)
        for layer in self.trunk[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.image, self.object = (weight_norm(nn.Linear(bottleneck, outputs, bias=False)) for _ in range(2))
        for layer in (self.image, self.object):  # original0 holds the norms of the rows, original1 their directions
            nn.init.ones_(layer.parametrizations.weight.original0).requires_grad_(False)

    def forward(self, y, c):
        z, z_c = F.normalize(self.trunk(torch.cat([y, c])), dim=1).split([len(y), len(c)])  # (2B + 2M, 256)
        return self.image(z), self.object(z_c)


class Student(nn.Module):
    """backbone: images (., 3, H0, W0) -> maps (., N, D), pooled (., D = backbone.dim); widths: of the head after D."""

    def __init__(self, backbone, widths=(2048, 256, 65536), num_classes=0):
        super().__init__()
        self.backbone, self.head = backbone, Head(backbone.dim, *widths)
        self.probe = nn.Linear(backbone.dim, num_classes) if num_classes else None

    def forward(self, x, assignment):
        """x (2B, 3, H0, W0): the first views, then the second; assignment (B, 2N, K) -> logits of images (2B, L) and of
        objects (2M, L), and the probe's of the first views (B, classes) or None."""
        maps, y = self.backbone(x)  # (2B, N, D), (2B, D)
        c_1, c_2, _ = object_representations(*maps.chunk(2), assignment)
        return *self.head(y, torch.cat([c_1, c_2])), self.probe(y.chunk(2)[0].detach()) if self.probe else None


class MemoryBank(nn.Module):
    """M_1 and M_2 of Section 3.2.2: the newest `num_objects` objects of all processes, `objects` (2, num_objects, D).

    Every process holds all of them. Shards would search with as many products in each process, but would first exchange
    queries and then answers, to save most of 2.5 GB a GPU on COCO, ViT-S in bfloat16, and of 0.5 GB on ImageNet.
    """

    def __init__(self, num_objects, dim, dtype=torch.float32):
        super().__init__()
        self.register_buffer("objects", torch.zeros(2, num_objects, dim, dtype=dtype))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))  # so far; the next goes to pushed % num_objects

    @property
    def ready(self):
        """Whether it is full."""
        return self.pushed.item() >= self.objects.shape[1]

    def push(self, c_1, c_2):
        """Adds the objects (M, D) of both views of each process; the oldest make room."""
        rows = all_objects(torch.cat([c_1, c_2], 1))[0][-self.objects.shape[1]:]  # (G M, 2D)
        slots = (self.pushed + torch.arange(len(rows), device=rows.device)) % self.objects.shape[1]
        self.objects[:, slots] = torch.stack(rows.chunk(2, 1)).to(self.objects.dtype)  # (2, G M, D)
        self.pushed += len(rows)

    def nearest(self, queries, view):
        """The index (M,) of the entry of M_1 (view 0) or M_2 (view 1) nearest to each query (M, D). Eq. (2)."""
        return nearest(queries, self.objects[view, :self.pushed])


class CrIBo(nn.Module):
    """The teacher's backbone and head; the student that they follow; the centres of the teacher's logits; the bank."""

    def __init__(self, student, num_objects=12, pos_weight=1.0, bank_images=25_000, bank_dtype=torch.float32):
        super().__init__()
        self.num_objects, self.pos_weight, self.student = num_objects, pos_weight, student
        self.backbone, self.head = copy.deepcopy(student.backbone), copy.deepcopy(student.head)
        for module in (self.backbone, self.head):
            module.requires_grad_(False)
        for module in self.backbone.modules():
            if isinstance(module, StochasticDepth):
                module.p = 0.0  # not by eval(): BatchNorm takes the statistics of the teacher's own batch
        self.register_buffer("centers", torch.zeros(2, len(student.head.image.weight)))  # of images' and objects' logits
        self.bank = MemoryBank(bank_images * num_objects, student.backbone.dim, bank_dtype)

    @torch.no_grad()
    def forward(self, x, positions, cross_image=True, cycle=True):
        """What the teacher says of two views x (2B, 3, H0, W0) with positions (B, 2N, 2); its objects go to the bank.

        cross_image: whether to match objects, once the bank is full; cycle: whether to trust by Eq. (4), else all
        -> assignment (B, 2N, K), valid (B, K), representations (2B, D), and cribo_loss's `teacher`.
        """
        maps, y = self.backbone(x)  # (2B, N, D), (2B, D)
        maps_1, maps_2 = maps.chunk(2)
        tokens = torch.cat([maps_1, maps_2], 1)  # (B, 2N, D)
        assignment = joint_space_clustering(tokens, positions, self.num_objects, self.pos_weight)
        c_1, c_2, valid = object_representations(maps_1, maps_2, assignment)
        objects = neighbours = torch.cat([c_1, c_2])  # (2M, D)
        ok = torch.zeros(len(objects), dtype=torch.bool, device=x.device)
        if cross_image and self.bank.ready:
            nn_1, nn_2, ok_1, ok_2 = cycle_consistent_matches(c_1, c_2, self.bank)
            neighbours = torch.cat([self.bank.objects[0, nn_1], self.bank.objects[1, nn_2]]).to(objects.dtype)  # (2M, D)
            ok = torch.cat([ok_1, ok_2]) if cycle else ~ok
        self.bank.push(c_1, c_2)
        image_logits, logits = self.head(y, torch.cat([objects, neighbours]))
        return assignment, valid, y, (image_logits, *logits.chunk(2), ok)

    @torch.no_grad()
    def update_teacher(self, momentum):
        """theta_t <- momentum * theta_t + (1 - momentum) * theta_s."""
        for name in ("backbone", "head"):
            ours, theirs = getattr(self, name).parameters(), getattr(self.student, name).parameters()
            torch._foreach_lerp_(list(ours), list(theirs), 1 - momentum)


# --- 4. Training ---------------------------------------------------------------------------------------------------

RECIPES = {  # chosen by --data; any other data set gets imagenet's
    "imagenet": dict(arch="vit_small_patch16", size=224, head="2048-256-65536", epochs=800, batch_size=1024, base_lr=5e-4,
                     final_lr=1e-5, weight_decay=0.04, warmup_epochs=10, momentum=0.996, drop_path=0.1, num_objects=12,
                     pos_weight=1.0, bank_images=25_000, temp_warmup_epochs=30),  # Appendix A.1
    "coco": dict(arch="vit_small_patch16", size=224, head="2048-256-65536", epochs=300, batch_size=256, base_lr=5e-4,
                 final_lr=1e-5, weight_decay=0.04, warmup_epochs=10, momentum=0.996, drop_path=0.1, num_objects=64,
                 pos_weight=2.0, bank_images=25_000, temp_warmup_epochs=30),
    "shapes": dict(arch="tiny_convnet", size=64, head="512-128-1024", epochs=7, batch_size=128, base_lr=8e-3, final_lr=1e-5,
                   weight_decay=0.04, final_weight_decay=0.04, warmup_epochs=1, momentum=0.99, drop_path=0.0, num_objects=8,
                   pos_weight=1.0, bank_images=2_000, teacher_temp=0.04, temp_warmup_epochs=1),
}


def make_optimizer(student):
    """AdamW with two groups: what decays, and biases and normalisation, which do not."""
    groups = [], []
    for name, p in student.named_parameters():
        if p.requires_grad:
            groups[name.endswith("bias") or p.ndim == 1].append(p)
    return torch.optim.AdamW([dict(params=groups[0]), dict(params=groups[1], weight_decay=0.0)])


@torch.no_grad()
def clip_gradients(parameters, limit):
    """Scales each parameter's own gradient down to norm `limit`, as DINO does."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, (limit / (norms + 1e-6)).clamp(max=1).unbind())


def train(args):
    import functools

    import common
    import training
    from evaluate import knn_report

    device = training.set_up(args.seed)
    data = common.open_data(args.data, "train", args.size)
    backbone = common.build_backbone(args.arch, args.size, args.drop_path)
    grid = args.size // backbone.stride
    if args.size % backbone.stride or grid < 2:  # the grid of locations would not cover the view
        raise common.UserError(f"--size {args.size}: {args.arch} needs two or more times its stride, {backbone.stride}")
    if not 0 < args.num_objects <= 2 * grid ** 2:
        raise common.UserError(f"--num-objects {args.num_objects}: two views have {2 * grid ** 2} locations to cluster")
    if not 0 < args.bank_images < len(data):
        raise common.UserError(f"--bank-images {args.bank_images}: it must be less than the {len(data)} images of "
                               f"{args.data}, as a bank of all of them would always hold each object itself")
    widths = [int(w) for w in args.head.split("-")]
    # Only the student is given to DDP, which would send all buffers, the bank's gigabytes too, at each step.
    student, ddp = training.distribute(Student(backbone, widths, len(data.classes)), device)
    bank_dtype = getattr(torch, args.bank_dtype)
    model = CrIBo(student, args.num_objects, args.pos_weight, args.bank_images, bank_dtype).to(device)
    optimizer = make_optimizer(student)
    run = training.Run(args, model, optimizer, data, device)
    colours = [common.Photometric(**colour) for colour in COLOURS]
    terms = ["image"] + ["object"] * args.object + ["cross_image"] * args.cross_image

    for batch in run.batches(functools.partial(sample_views, size=args.size)):
        generator = training.seed_step(args.seed, run.step)
        x = torch.cat([colour(view, generator) for colour, view in zip(colours, batch.views)])  # (2B, 3, H0, W0)
        pos = joint_positions(batch.boxes, batch.flips, grid)
        first_epoch = run.step < run.per_epoch
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            assignment, valid, y, teacher = model(x, pos, args.cross_image and not first_epoch, args.cycle)
            *outputs, logits = ddp(x, assignment)
        teacher_temp = 0.04 + (args.teacher_temp - 0.04) * min(1, run.step / (args.temp_warmup_epochs * run.per_epoch))
        loss, parts = cribo_loss(teacher, outputs, model.centers, teacher_temp, terms=terms)
        for center, seen in zip(model.centers, teacher):
            update_center(center, seen)
        probe_loss, accuracy = training.probe(logits, batch.labels)
        lr, momentum = run.set_lr(), training.cosine_schedule(run.step, run.total, 0, args.momentum, 1.0)
        decay = training.cosine_schedule(run.step, run.total, 0, args.weight_decay, args.final_weight_decay)
        optimizer.param_groups[0]["weight_decay"] = decay
        optimizer.zero_grad()
        (loss + probe_loss).backward()
        if args.clip_grad:
            clip_gradients(student.parameters(), args.clip_grad)
        if first_epoch:
            for p in (*student.head.image.parameters(), *student.head.object.parameters()):
                p.grad = None
        optimizer.step()
        model.update_teacher(momentum)
        ok, present = teacher[-1], assignment.any(1)  # (2M,), (B, K)
        run.log(loss=loss, **parts, bootstrap=ok.sum() / max(1, len(ok)),  # the ratio of Fig. 5
                objects=present.sum(1).float().mean(), valid=valid.sum() / present.sum(),
                std=F.normalize(y.float(), dim=1).std(0).mean(),  # 1/sqrt(D) at most; 0: collapsed
                **accuracy, lr=lr, decay=decay, momentum=momentum, temperature=teacher_temp)

    knn_report(args, model.backbone, run.folder / "knn.json", device)


def main():
    import training

    with training.one_line_errors():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        on_or_off = argparse.BooleanOptionalAction
        parser.add_argument("--head", help="hidden, bottleneck and output widths of the projection heads")
        parser.add_argument("--num-objects", type=int, help="K, clusters an image")
        parser.add_argument("--pos-weight", type=float, help="lambda_pos, weight of the distance in clustering")
        parser.add_argument("--bank-images", type=int, help="S, images whose objects the bank keeps")
        parser.add_argument("--bank-dtype", default="bfloat16", choices=["bfloat16", "float32"])
        parser.add_argument("--object", default=True, action=on_or_off, help="the loss across views, Eq. (6)")
        parser.add_argument("--cross-image", default=True, action=on_or_off, help="the loss across images, Eq. (8)")
        parser.add_argument("--cycle", default=True, action=on_or_off, help="the condition of Eq. (4)")
        parser.add_argument("--teacher-temp", type=float, default=0.07, help="after its warmup from 0.04")
        parser.add_argument("--temp-warmup-epochs", type=int)
        parser.add_argument("--momentum", type=float, help="of the teacher at the start; 1 at the end")
        parser.add_argument("--final-weight-decay", type=float, default=0.4)
        parser.add_argument("--drop-path", type=float, help="of the student")
        parser.add_argument("--clip-grad", type=float, default=3.0, help="norm of each parameter's gradient; 0: off")
        train(training.parse_args(parser, RECIPES))


if __name__ == "__main__":
    main()
