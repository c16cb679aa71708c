"""How well predicted masks agree with the true ones."""
import torch

import common


def confusion(predicted, mask, num_classes):
    """Counts of pixels (true class, predicted class); void (-1) in the mask is left out."""
    pairs = (mask * num_classes + predicted)[mask >= 0]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def mean_iou(counts):
    """Intersection over union in %, the mean over the classes that occur in the masks.

    counts: the confusion of all images. A class that is predicted but occurs in no mask has no term
    of its own, where mmsegmentation counts an IoU of 0; its pixels are missing in the intersection
    of their true classes.
    """
    counts = counts.double()
    intersection = counts.diag()
    union = counts.sum(0) + counts.sum(1) - intersection
    present = counts.sum(1) > 0
    if not present.any():
        raise common.UserError("the validation masks hold nothing but void")
    return 100 * (intersection / union)[present].mean().item()
