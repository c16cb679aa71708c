"""Detection: Faster or Mask R-CNN on a backbone. LC-loss, 4.2 and 4.4; VICReg, Appendix B.4

torchvision's detectors on a feature pyramid (FPN) over the stages of a ResNet or ConvNeXt, or over
the last map of another backbone. The backbone is trained too, or not (--freeze; LC-loss, Table 4).
Mask R-CNN where the data has masks. AP in % is COCO's; what VOC calls difficult is ignored. The
detector is kept as detector.pt beside the checkpoint, for `python visualize.py detections`.

    python -m evaluate detect --checkpoint runs/lc_loss-shapes --baseline          # minutes
    torchrun --nproc_per_node=8 -m evaluate detect --checkpoint resnet50.pth --arch resnet50 \\
        --data voc [--freeze]

--data: shapes; voc: VOCdevkit/VOC2007 and VOC2012 in $DATA; a folder with COCO's annotations/
instances_train2017.json, train2017/ and the same of val; or one with images/train/ and YOLO's
labels/train/, or train/images/ and train/labels/, and the same of val.

VOC's (YOLO's too) and COCO's steps, rates, warmup are VICReg's; LC-loss gives COCO's 90,000 steps
and, for VOC, SCRL's way. Unsaid, as in detectron2: momentum 0.9, weight decay 1e-4, short sides of
480 (COCO: 640) to 800 pixels in training and 800 after it; BatchNorm in the pyramid.
Not as in the papers
 1. VICReg has a C4 backbone for VOC, not LC-loss's pyramid; LC-loss has RetinaNet for COCO's boxes.
 2. VOC: 101 recall points and matching as in COCO; detectron2 has VOC 2007's 11 points.
 3. ConvNeXts and ViTs: AdamW, 1e-4, weight decay 0.05. BatchNorm has the statistics of all
    processes on CUDA, as in LC-loss; on the CPU each process has its own.
"""
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchvision import ops
from torchvision.models import detection

import common
import training
from evaluate.detection import judge, table
from evaluate.features import progress
from evaluate.heads import shuffled
from evaluate.objects import open_objects

NAME = "detection"
SIZE = 800  # pixels of the short side, but for shapes
prepare = open_objects
# smallest: the short side in training, as a share of --size. warmup, drops: shares of the steps; at
# a drop the rate is divided by 10. dim: the pyramid's width. anchor: side of the smallest, pixels.
# limits: what else torchvision's detectors are told.
WIDE = dict(dim=256, anchor=32, limits=dict(rpn_post_nms_top_n_train=1000))
FEW = dict(box_batch_size_per_image=16, rpn_post_nms_top_n_train=100, rpn_post_nms_top_n_test=100)
NARROW = dict(dim=64, anchor=16, limits=FEW)
VOC = WIDE | dict(smallest=0.6, steps=24_000, lr=0.05, warmup=1 / 24, drops=[3 / 4, 11 / 12])
COCO = WIDE | dict(smallest=0.8, steps=90_000, lr=0.04, warmup=5 / 9000, drops=[2 / 3, 8 / 9])
SHAPES = NARROW | dict(smallest=1.0, steps=500, lr=0.02, warmup=0.1, drops=[2 / 3, 8 / 9])
PRESETS = dict(voc=VOC, coco=COCO, yolo=VOC, shapes=SHAPES)


def add_flags(flag):
    flag("--steps", type=int, help="by default those of the papers")
    flag("--lr", type=float, help="the peak of the learning rate")
    flag("--batch-size", type=int, default=16, help="of all processes together")
    flag("--freeze", action="store_true", help="the backbone stays as it is")


class Pyramid(ops.FeaturePyramidNetwork):
    """Images (B, 3, H0, W0) -> {level: features (B, dim, H, W)}, from the finest level on."""

    def __init__(self, backbone, dim, bf16):
        levels = 4 if isinstance(backbone, common.ResNet | common.ConvNeXt) else 1
        widths = [backbone.dim // 2**i for i in reversed(range(levels))]
        coarser = ops.feature_pyramid_network.LastLevelMaxPool() if levels == 4 else None
        super().__init__(widths, dim, coarser, nn.BatchNorm2d)
        self.backbone = backbone
        self.levels = levels
        self.out_channels = dim
        self.bf16 = bf16

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            maps = self.backbone.stages(x)[-self.levels :]
            maps = super().forward(dict(zip("0123", maps)))
        return {level: m.float() for level, m in maps.items()}


def build(backbone, data, args):
    """torchvision's detector of the objects of `data` on a backbone. Each level of a pyramid has
    anchors of one size, a single level those of all five."""
    preset = PRESETS[data.form]
    dim = preset["dim"]
    sides = [preset["anchor"] * 2**i for i in range(5)]
    pyramid = Pyramid(backbone, dim, args.bf16)
    anchors = [sides] if pyramid.levels == 1 else [[side] for side in sides]
    ratios = len(anchors) * [(0.5, 1.0, 2.0)]
    smallest = int(preset["smallest"] * args.size)
    sizes = list(range(args.size, smallest - 1, -32))
    classes = 1 + len(data.classes)  # with the ground
    kind = detection.MaskRCNN if data.has_masks else detection.FasterRCNN
    model = kind(pyramid, classes, min_size=sizes[::-1], max_size=5 * args.size // 3,
                 rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(anchors, ratios),
                 **preset["limits"])
    if data.has_masks:  # torchvision's heads, as wide as the pyramid
        heads = detection.mask_rcnn
        model.roi_heads.mask_head = heads.MaskRCNNHeads(dim, 4 * [dim], 1)
        model.roi_heads.mask_predictor = heads.MaskRCNNPredictor(dim, dim, classes)
    return model


class Mirrored(torch.utils.data.Dataset):
    """Item (epoch, index) -> an image and its objects without crowds; half of all are mirrored."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, key):
        image, target = self.data[key[1]]
        left, top, right, bottom = target["boxes"].T
        kept = ~target["crowd"] & (left < right) & (top < bottom)
        target = {name: values[kept] for name, values in target.items()}
        if np.random.default_rng(key).random() < 0.5:
            image = image.flip(2)
            boxes = target["boxes"]
            boxes[:, [2, 0]] = image.shape[2] - boxes[:, [0, 2]]
            if "masks" in target:
                target["masks"] = target["masks"].flip(2)
        return image, target


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
    args.steps = args.steps or preset["steps"]
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
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=1e-4)
    if adam:
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)

    order = shuffled(range(len(data)), args.steps, args)
    loader = training.data_loader(Mirrored(data), args.workers, batch_sampler=order,
                                  collate_fn=list)
    for step, pairs in enumerate(progress(loader, args.steps, f"{args.steps} steps")):
        factor = schedule(step / args.steps, preset["warmup"], preset["drops"])
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        images = [image.to(args.device).float() / 255 for image, _ in pairs]
        targets = [moved(target, args.device) for _, target in pairs]
        loss = sum(ddp(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    if dist.is_initialized():  # BatchNorm's statistics on the CPU are each process's own
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    return model.eval()


@torch.no_grad()
def measure(model, data, args):
    """AP in % of boxes, and of masks where the data has them."""
    judged = {"boxes": [], "masks": []} if data.has_masks else {"boxes": []}
    rank, world = training.rank_and_world()
    order = torch.arange(len(data)).tensor_split(world)[rank].tolist()
    loader = training.data_loader(data, args.workers, batch_size=None, sampler=order)
    for image, truth in progress(loader, len(order), "validation images"):
        image = image.to(args.device).float() / 255
        (found,) = model([image])
        found = moved(found, "cpu")
        for kind, results in judged.items():
            results.append(judge(kind, found, truth))
    return {kind: table(results, args.device) for kind, results in judged.items()}


def kept_detector(checkpoint):
    """Where the detector on a checkpoint's backbone is kept."""
    path = Path(checkpoint)
    return path / "detector.pt" if path.is_dir() else path.with_name("detector.pt")


def run(backbone, data, args):
    """AP in % on the validation part of a detector that is trained on the training part."""
    train, val = data
    model = fine_tune(backbone, train, args)
    if args.checkpoint != "random" and training.rank_and_world()[0] == 0:
        settings = dict(arch=args.arch, data=args.data, size=args.size, bf16=args.bf16)
        state = dict(model=backbone.state_dict(), detector=model.state_dict(), args=settings)
        try:
            training.write(kept_detector(args.checkpoint), lambda file: torch.save(state, file))
        except common.UserError as error:
            training.warn(error)  # the result is worth more
    return measure(model, val, args)
