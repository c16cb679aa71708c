"""Segmentation by a head on local features. VICRegL, Appendix D.2, Table 8; CrIBo, Appendix A.2

A linear head (VICRegL, CrIBo 4.2) or `--head fcn` (VICRegL Table 8, LC-loss Tables 3 and 4) predicts
a class for each location of the feature map; the logits are upsampled to the mask. The backbone is
frozen or trained too (`--finetune`). mIoU in % for each learning rate, and the best.

    python -m evaluate segment --checkpoint resnet50.pth --arch resnet50 --data voc
    python -m evaluate segment --checkpoint dino.pth --arch vit_small_patch16 --data voc --layers 4
    python -m evaluate segment --checkpoint runs/vicregl-shapes --steps 500

ResNets have SGD and their last stage dilated, for VICRegL's 32 x 32 features of 512 x 512 pixels;
ConvNeXts and ViTs have AdamW, and `--layers 4` in VICRegL and CrIBo. VICRegL: 40,000 steps on VOC,
160,000 on ADE20K; CrIBo 80,000 and 160,000; LC-loss 20,000 on VOC.

As in mmsegmentation
 1. Decay (1 - progress)^0.9; batch 16; momentum 0.9 and weight decay 5e-4 (SGD), 0.01 (AdamW).
 2. Crops flipped half of the time; cross-entropy over all pixels but void; dropout of 0.1 in FCN.
Different from it
 1. The rate decays to 0; its schedules end at 1e-4 (CrIBo's fine-tuning: at a tenth of the rate).
 2. Crops are of an image enlarged 1 to 2 times, not 0.5 to 2, so nothing is padded; no distortion of
    colors. VOC is torchvision's 1,464 training images, not the 10,582 with the extra masks.
 3. Validation images are seen whole, the short side at --size; its test slides windows of 512 pixels
    with stride 480. Classes that are predicted but in no mask have no term in the mIoU (miou.py).
 4. FCN: both convolutions have a quarter of the features' width; the input is not concatenated.
Different from CrIBo: AdamW with VICRegL's rates; there Adam with 8e-4, 3e-4, 1e-4, 8e-5 (`--lr`).
LC-loss fine-tunes or freezes a ResNet-50 with mmsegmentation's FCN, at one rate, which it leaves
open. On the CPU, BatchNorm that is trained here has each process's own statistics.
"""
import copy
import functools

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import training
from evaluate.features import load_batches, summed, to_input
from evaluate.heads import Heads, fit, shuffled, sweep_table
from evaluate.masks import open_masks, targets, whole_images
from evaluate.miou import confusion, mean_iou

NAME = "segmentation"
SIZE = 512  # pixels, but for shapes
SGD_LRS = [0.1, 0.05, 0.03, 0.02, 0.01]
FROZEN_LRS = [1e-3, 8e-4, 3e-4, 1e-4, 8e-5]
FINETUNE_LRS = [1e-4, 8e-5, 3e-5, 1e-5, 8e-6, 3e-6, 1e-6]


def add_flags(flag):
    flag("--lr", type=float, nargs="+", help="by default those of VICRegL, D.2")
    flag("--steps", type=int, default=40_000)
    flag("--batch-size", type=int, default=16, help="of all processes together")
    flag("--layers", type=int, choices=[1, 4], default=1, help="stages that the head sees")
    flag("--head", choices=["linear", "fcn"], default="linear")
    flag("--finetune", action="store_true", help="each rate trains a copy of the backbone")


def prepare(args):
    return open_masks(args)


class Crops(torch.utils.data.Dataset):
    """Item (epoch, index) -> a random square of an image (3, size, size), uint8, and of its mask."""

    def __init__(self, data, size):
        self.data = data
        self.size = size

    def __getitem__(self, key):
        rng = np.random.default_rng(key)
        image, mask = self.data.pair(key[1])
        side = round(min(image.size) / rng.uniform(1, 2))
        left = int(rng.integers(image.width - side + 1))
        top = int(rng.integers(image.height - side + 1))
        flip = rng.random() < 0.5
        pixels = common.cut(image, (top, left, side, side), flip, self.size)
        box = (left, top, left + side, top + side)
        mask = targets(mask.resize((self.size, self.size), Image.NEAREST, box=box))
        return pixels, mask.flip(1) if flip else mask


def local_features(backbone, x, layers=1):
    """The last `layers` stages, upsampled to the finest, side by side: (B, D, H, W). D.2"""
    maps = backbone.stages(x)[-layers:]  # (B, D_i, H_i, W_i) each
    finest = maps[0].shape[2:]
    maps = [m if m.shape[2:] == finest else F.interpolate(m, finest, mode="bilinear") for m in maps]
    return torch.cat(maps, 1)


def dilate(backbone):
    """A ResNet of stride 16, not 32: its last stage is dilated instead of strided. At every other
    location its features are those of before, as only what follows the stride is dilated."""
    for conv in backbone.layer4.modules():
        if isinstance(conv, nn.Conv2d):
            if conv.kernel_size == (3, 3) and conv.stride == (1, 1):
                conv.dilation = (2, 2)
                conv.padding = (2, 2)
            conv.stride = (1, 1)
    backbone.stride = 16


def fcn(width, num_classes):
    """The FCN head of VICRegL, Table 8."""
    hidden = width // 4
    layers = []
    for i in (width, hidden):
        layers += [nn.Conv2d(i, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout2d(0.1), nn.Conv2d(hidden, num_classes, 1))


def train_heads(backbone, read, train, lrs, optimizer, args):
    """One head for each learning rate, trained on random crops -> a Heads."""
    torch.manual_seed(0)
    with torch.no_grad():
        x = torch.zeros(1, 3, args.size, args.size, device=args.device)
        width = read(backbone.eval(), x).shape[1]
    heads = []
    for _ in lrs:
        linear = nn.Conv2d(width, train.num_classes, 1)
        heads.append(fcn(width, train.num_classes) if args.head == "fcn" else linear)
    model = Heads(copy.deepcopy(backbone), read, heads, args.finetune, args.bf16)
    order = shuffled(len(train), args.steps, args)
    crops = load_batches(Crops(train, args.size), args, batch_sampler=order)
    batches = ((to_input(x, args.device), mask.to(args.device)) for x, mask in crops)
    backbone_lr = lrs[0] if args.finetune else None
    fit(model, batches, args.steps, lrs, backbone_lr, optimizer,
        lambda progress: (1 - progress) ** 0.9, args.device)
    return model


@torch.no_grad()
def evaluate_heads(model, val, stride, args):
    """mIoU in % of each head on whole images, each mask in its own size."""
    rank, world = training.rank_and_world()
    counts = torch.zeros(len(model.heads), val.num_classes, val.num_classes, dtype=torch.long)
    counts = counts.to(args.device)
    mine = range(rank, len(val), world)
    for x, mask in whole_images(val, mine, args.size, stride, args):
        for count, logits in zip(counts, model(x)):
            logits = F.interpolate(logits, mask.shape, mode="bilinear")  # (1, C, H0, W0)
            count += confusion(logits[0].argmax(0), mask, val.num_classes)
    return [{"mIoU": mean_iou(count)} for count in summed(counts)]


def run(backbone, data, args):
    """mIoU in % of a head on local features, for each learning rate."""
    train, val = data
    if args.size % backbone.stride:
        raise common.UserError(f"--size {args.size} must be a multiple of {backbone.stride}, the "
                               "stride of the backbone")
    if isinstance(backbone, common.ResNet) and backbone.stride == 32:
        dilate(backbone)
    optimizer = functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)
    lrs = SGD_LRS
    if isinstance(backbone, common.ConvNeXt | common.ViT):
        optimizer = functools.partial(torch.optim.AdamW, weight_decay=0.01)
        lrs = FINETUNE_LRS if args.finetune else FROZEN_LRS
    lrs = args.lr or lrs
    read = functools.partial(local_features, layers=args.layers)

    groups = [[lr] for lr in lrs] if args.finetune else [lrs]  # trained at once
    rows = []
    for group in groups:
        model = train_heads(backbone, read, train, group, optimizer, args)
        rows += evaluate_heads(model, val, backbone.stride, args)
    return sweep_table(lrs, rows)
