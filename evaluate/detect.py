"""Detection: Faster or Mask R-CNN on a backbone. LC-loss, 4.2 and 4.4; VICReg, Appendix B.4

torchvision's detectors on a feature pyramid (FPN) over the stages of a ResNet or ConvNeXt, or over
the last map of another backbone. The backbone is trained too, or not (--freeze; LC-loss, Table 4).
Mask R-CNN where the data has masks. AP in % is COCO's; what VOC calls difficult is ignored.

    python -m evaluate detect --checkpoint runs/lc_loss-shapes --baseline          # minutes
    torchrun --nproc_per_node=8 -m evaluate detect --checkpoint resnet50.pth --arch resnet50 \\
        --data voc [--freeze]

--data: shapes; voc: VOCdevkit/VOC2007 and VOC2012 in $DATA; a folder with COCO's annotations/
instances_train2017.json, train2017/ and the same of val; or one with images/train/ and YOLO's
labels/train/, or train/images/ and train/labels/, and the same of val.

VOC's and COCO's steps, rates, warmup are VICReg's; LC-loss gives COCO's 90,000 steps and, for VOC,
SCRL's way. YOLO: as VOC. Unsaid, as in detectron2: momentum 0.9, weight decay 1e-4, short sides of
480 (COCO: 640) to 800 pixels in training and 800 after it; BatchNorm in the pyramid.
Not as in the papers
 1. VICReg has a C4 backbone for VOC, not LC-loss's pyramid; LC-loss has RetinaNet for COCO's boxes.
 2. VOC: 101 recall points and matching as in COCO; detectron2 has VOC 2007's 11 points.
 3. ConvNeXts and ViTs: AdamW, 1e-4, weight decay 0.05. BatchNorm has the statistics of all
    processes on CUDA, as in LC-loss; on the CPU each process has its own.
"""
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import common
import training
from evaluate.detection import Average
from evaluate.heads import shuffled
from evaluate.objects import open_objects

NAME = "detection"
SIZE = 800  # pixels of the short side, but for shapes
# Shares of the steps: warmup, and drops, after which the rate is divided by 10. smallest: the short
# side in training, as a share of --size. dim: the pyramid's width. regions: of an image, for heads.
WIDE = dict(dim=256, regions=512, proposals=1000)
NARROW = dict(dim=64, regions=32, proposals=100)
PRESETS = {
    "voc": WIDE | dict(steps=24_000, lr=0.05, warmup=1 / 24, drops=[3 / 4, 11 / 12], smallest=0.6),
    "coco": WIDE | dict(steps=90_000, lr=0.04, warmup=5 / 9000, drops=[6 / 9, 8 / 9], smallest=0.8),
    "shapes": NARROW | dict(steps=300, lr=0.02, warmup=0.1, drops=[6 / 9, 8 / 9], smallest=1.0),
}
PRESETS["yolo"] = PRESETS["voc"]


def add_flags(flag):
    flag("--steps", type=int, help="by default those of the papers")
    flag("--lr", type=float, help="the peak of the learning rate")
    flag("--batch-size", type=int, default=16, help="of all processes together")
    flag("--freeze", action="store_true", help="the backbone stays as it is")


def prepare(args):
    """The training and validation parts of --data, with objects; settles --steps. UserError."""
    train, val = open_objects(args)
    args.steps = args.steps or PRESETS[train.form]["steps"]
    return train, val


# --- 1. Images ------------------------------------------------------------------------------------

class Loaded(torch.utils.data.Dataset):
    """Item (epoch, index) -> an image (3, H0, W0), uint8, and its objects; in training half of all
    are mirrored, and crowds left out."""

    def __init__(self, data, train):
        self.data = data
        self.train = train

    def __getitem__(self, key):
        image, target = self.data.pair(key[1])
        image = torch.from_numpy(image).permute(2, 0, 1)
        if not self.train:
            return image, target
        sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
        kept = ~target["crowd"] & (sides > 0).all(1)
        target = {name: values[kept] for name, values in target.items()}
        if np.random.default_rng(key).random() < 0.5:
            image = image.flip(2)
            target["boxes"][:, [2, 0]] = image.shape[2] - target["boxes"][:, [0, 2]]
            if "masks" in target:
                target["masks"] = target["masks"].flip(2)
        return image, target


# --- 2. Model -------------------------------------------------------------------------------------

class Pyramid(nn.Module):
    """Images (B, 3, H0, W0) -> {level: features (B, dim, H, W)}, from the finest level on."""

    def __init__(self, backbone, dim, bf16):
        super().__init__()
        self.backbone = backbone
        self.bf16 = bf16
        self.out_channels = dim
        self.levels = 4 if isinstance(backbone, common.ResNet | common.ConvNeXt) else 1
        coarser = LastLevelMaxPool() if self.levels == 4 else None
        with torch.no_grad():
            x = next(backbone.parameters()).new_zeros(1, 3, 64, 64)
            maps = backbone.eval().stages(x)[-self.levels :]
        widths = [m.shape[1] for m in maps]
        self.fpn = FeaturePyramidNetwork(widths, dim, coarser, nn.BatchNorm2d)

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            maps = self.backbone.stages(x)[-self.levels :]
            maps = self.fpn(dict(zip("0123", maps)))
        return {level: m.float() for level, m in maps.items()}


def build(backbone, data, args):
    """torchvision's detector of the objects of `data` on a backbone. Anchors are 8 strides wide on
    each level of a pyramid; on a single one 2, 4, ..., 32 strides, as on VICReg's C4 backbone."""
    preset = PRESETS[data.form]
    pyramid = Pyramid(backbone, preset["dim"], args.bf16)
    sides = [backbone.stride * 2**i for i in range(5)]  # the finest of four levels has an eighth
    anchors = [(side,) for side in sides]
    if pyramid.levels == 1:
        anchors = [tuple(2 * side for side in sides)]
    anchors = AnchorGenerator(anchors, len(anchors) * [(0.5, 1.0, 2.0)])
    sizes = list(range(args.size, int(preset["smallest"] * args.size) - 1, -32))
    classes = 1 + len(data.classes)  # with the ground

    detector = MaskRCNN if data.has_masks else FasterRCNN
    model = detector(pyramid, classes, min_size=sizes[::-1], max_size=5 * args.size // 3,
                     rpn_anchor_generator=anchors, rpn_post_nms_top_n_train=preset["proposals"],
                     rpn_post_nms_top_n_test=preset["proposals"],
                     box_batch_size_per_image=preset["regions"])
    if data.has_masks:  # torchvision's heads, as wide as the pyramid
        dim = preset["dim"]
        model.roi_heads.mask_head = MaskRCNNHeads(dim, 4 * [dim], 1)
        model.roi_heads.mask_predictor = MaskRCNNPredictor(dim, dim, classes)
    return model


# --- 3. Training ----------------------------------------------------------------------------------

def schedule(progress, warmup, drops):
    """The learning rate's factor, where `progress` goes from 0 to 1: warmup from a third, drops."""
    passed = sum(progress >= drop for drop in drops)
    return min(1.0, (1 + 2 * progress / warmup) / 3) * 0.1**passed


def moved(tensors, device):
    return {name: x.to(device) for name, x in tensors.items()}


def fine_tune(backbone, data, args):
    """A detector, trained with its backbone or, with args.freeze, on it."""
    torch.manual_seed(0)
    preset = PRESETS[data.form]
    adam = isinstance(backbone, common.ConvNeXt | common.ViT)
    if args.lr is None:
        args.lr = 1e-4 if adam else preset["lr"]
    backbone.requires_grad_(not args.freeze)
    model = build(backbone, data, args).to(args.device, memory_format=torch.channels_last)
    ddp = model
    if dist.is_initialized():  # not training.distribute(): the processes' images differ in size
        if args.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        ddp = nn.parallel.DistributedDataParallel(model)
    ddp.train()
    model.backbone.backbone.train(not args.freeze)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, momentum=0.9, weight_decay=1e-4)
    if adam:
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)

    order = shuffled(range(len(data)), args.steps, args)
    batches = training.data_loader(Loaded(data, True), args.workers, batch_sampler=order,
                                   collate_fn=list)
    for step, pairs in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step / args.steps, preset["warmup"], preset["drops"])
        images = [image.to(args.device).float() / 255 for image, _ in pairs]
        targets = [moved(target, args.device) for _, target in pairs]
        losses = ddp(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, args.steps // 10) == 0 and training.rank_and_world()[0] == 0:
            shown = [f"{name} {value:.3f}" for name, value in losses.items()]
            print(f"step {step + 1}/{args.steps}", *shown, sep="  ", flush=True)

    if dist.is_initialized():  # BatchNorm's statistics on the CPU are each process's own
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    return model.eval()


@torch.no_grad()
def measure(model, data, args):
    """AP in % of boxes, and of masks where the data has them."""
    kinds = ["boxes", "masks"] if data.has_masks else ["boxes"]
    averages = {kind: Average(kind, len(data.classes)) for kind in kinds}
    rank, world = training.rank_and_world()
    order = [(0, index) for index in range(rank, len(data), world)]
    loader = training.data_loader(Loaded(data, False), args.workers, batch_size=None, sampler=order)
    for (_, index), (image, truth) in zip(order, loader):
        (found,) = model([image.to(args.device).float() / 255])
        if data.has_masks:
            found["masks"] = found["masks"][:, 0] >= 0.5  # (n, H0, W0)
        for average in averages.values():
            average.add(index, moved(found, "cpu"), truth)
    return {kind: average.table(args.device) for kind, average in averages.items()}


def run(backbone, data, args):
    """AP in % on the validation part of a detector that is trained on the training part."""
    train, val = data
    return measure(fine_tune(backbone, train, args), val, args)
