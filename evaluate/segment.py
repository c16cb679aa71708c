"""Segmentation by a head on local features. VICRegL, Appendix D.2, Table 8; CrIBo, Appendix A.2

A linear head (VICRegL; CrIBo, Table 6) or an FCN (VICRegL, Table 8; LC-loss, Tables 3 and 4) gives
each location logits, which are upsampled to the mask; the backbone is frozen or trained too. Here:
ResNets have SGD and a dilated last stage, for VICRegL's 32 x 32 features of 512 x 512 pixels;
ConvNeXts and ViTs have AdamW, and `--layers 4` in VICRegL and CrIBo.

    python -m evaluate segment --checkpoint runs/vicregl-shapes --steps 500
    python -m evaluate segment --checkpoint dino.pth --arch vit_small_patch16 --data voc --layers 4

As in mmsegmentation: decay (1 - progress)^0.9; batch 16; momentum 0.9 and weight decay 5e-4 (SGD)
or 0.01 (AdamW); flips; cross-entropy over all pixels but void; dropout of 0.1 in the FCN.
Not as in mmsegmentation
 1. Learning rates decay to 0; there to 1e-4 (to a tenth in CrIBo's fine-tuning).
 2. Crops of an image enlarged 1 to 2 times, there 0.5 to 2 and padded; no distortion of colors.
 3. Validation images are seen whole, the short side at --size; there in windows of 512 pixels with
    stride 480. A class that is predicted but in no mask counts as an IoU of 0 there, not here.
 4. FCN: two convolutions of a quarter of the features' width, without a skip connection.
Not as in the papers: the defaults are VICRegL's, on VOC's 1,464 training images (they may have more
masks). CrIBo: 80,000 steps, Adam with 8e-4, 3e-4, 1e-4, 8e-5; LC-loss: 20,000; ADE20K: 160,000.
"""
import copy
import functools
import textwrap

import torch
import torch.nn.functional as F
from torch import nn

import common
import training
from evaluate.features import say, summed, to_input
from evaluate.heads import Heads, confusion, fit, ious, mean_iou, shuffled, sweep_table
from evaluate.masks import Crops, mask_flags, open_masks, whole_images

NAME = "segmentation"
prepare = open_masks
SIZE = 512  # pixels, but for shapes
SGD_LRS = [0.1, 0.05, 0.03, 0.02, 0.01]
FROZEN_LRS = [1e-3, 8e-4, 3e-4, 1e-4, 8e-5]
FINETUNE_LRS = [1e-4, 8e-5, 3e-5, 1e-5, 8e-6, 3e-6, 1e-6]


def add_flags(flag):
    mask_flags(flag)
    flag("--lr", type=float, nargs="+", help="by default those of VICRegL, D.2")
    flag("--steps", type=int, default=40_000)
    flag("--batch-size", type=int, default=16, help="of all processes together")
    flag("--layers", type=int, choices=[1, 4], default=1, help="stages that the head sees")
    flag("--head", choices=["linear", "fcn"], default="linear")
    flag("--finetune", action="store_true", help="each rate trains a copy of the backbone")


def local_features(backbone, x, layers=1):
    """The last `layers` stages, upsampled to the finest, side by side: (B, D, H, W). D.2"""
    maps = backbone.stages(x)[-layers:]  # (B, D_i, H_i, W_i) each
    finest = maps[0].shape[2:]
    return torch.cat([F.interpolate(m, finest, mode="bilinear") for m in maps], 1)


def dilate(backbone):
    """Dilates a ResNet's last stage in place of striding it: stride 16, not 32. At every other
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
        layers += [nn.Conv2d(i, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout2d(0.1), nn.Conv2d(hidden, num_classes, 1))


def train_heads(backbone, read, train, lrs, optimizer, args):
    """One head for each learning rate, trained on random crops -> a Heads."""
    torch.manual_seed(0)
    with torch.no_grad():
        x = torch.zeros(1, 3, args.size, args.size, device=args.device)
        width = read(backbone.eval(), x).shape[1]
    build = fcn if args.head == "fcn" else functools.partial(nn.Conv2d, kernel_size=1)
    heads = [build(width, train.num_classes) for _ in lrs]
    model = Heads(copy.deepcopy(backbone), read, heads, args.finetune, args.bf16)
    order = shuffled(range(len(train)), args.steps, args)
    crops = training.data_loader(Crops(train, args.size), args.workers, batch_sampler=order)
    batches = ((to_input(x, args.device), mask) for x, mask in crops)
    backbone_lr = lrs[0] if args.finetune else None
    fit(model, batches, args.steps, lrs, backbone_lr, optimizer,
        lambda progress: (1 - progress) ** 0.9, args.device)
    return model


@torch.no_grad()
def evaluate_heads(model, val, lrs, stride, args):
    """mIoU in % of each head on whole images, each mask in its own size; prints that of classes."""
    rank, world = training.rank_and_world()
    c = val.num_classes
    counts = torch.zeros(len(model.heads), c, c, dtype=torch.long, device=args.device)
    mine = range(rank, len(val), world)
    for x, mask in whole_images(val, mine, args.size, stride, args):
        for count, logits in zip(counts, model(x)):
            logits = F.interpolate(logits, mask.shape, mode="bilinear")  # (1, C, H0, W0)
            count += confusion(logits[0].argmax(0), mask, c)
    counts = summed(counts)
    for lr, count in zip(lrs, counts):
        shown = [f"{c}: {iou:.1f}" for c, iou in ious(count).items()]
        say(textwrap.fill(f"lr {lr:g}, IoU of class {', '.join(shown)}", 100))
    return [{"mIoU": mean_iou(count)} for count in counts]


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
    groups = [[lr] for lr in lrs] if args.finetune else [lrs]  # what is trained at once
    rows = []
    for group in groups:
        model = train_heads(backbone, read, train, group, optimizer, args)
        rows += evaluate_heads(model, val, group, backbone.stride, args)
    return sweep_table(lrs, rows)
