"""5-way 5-shot classification. LC-loss, Section 4.4, Table 7

600 episodes: 5 random classes, 5 labelled images of each; logistic regression on their features,
fixed as the backbone gives them, classifies other images of these classes.

    python -m evaluate fewshot --checkpoint resnet50.pth --arch resnet50 --data DTD

Differences
 1. Unsaid in the paper: 15 queries a class; features of length one and scikit-learn's default
    penalty, as Tian et al. (arXiv:2003.11539) have it. The images are those of the validation part
    if there is one. "95% +-" is half the width of the mean's 95% interval.
"""
import torch
import torch.nn.functional as F

import common
from evaluate.features import all_features

NAME = "few-shot"


def add_flags(flag):
    pass


def prepare(args):
    val = common.open_data(args.data, "val", args.size)
    return val or common.open_data(args.data, "train", args.size)


def logistic_regression(x, y, queries, steps=500):
    """Logits (E, m, C) of queries (E, m, D) by E logistic regressions, each fitted to its own rows.

    x (E, n, D) of unit length, y (n, C) one-hot. Minimizes the sum of the cross-entropies plus
    ||W||^2 / 2, with a free bias, by gradient descent on a, where W = x^T a. As rows have length
    one, the curvature is below 1 + n, which sets the step.
    """
    kernel = x @ x.mT  # (E, n, D) (E, D, n) -> (E, n, n)
    rate = 1 / (1 + x.shape[1])
    a = x.new_zeros(len(x), *y.shape)
    bias = x.new_zeros(len(x), 1, y.shape[1])
    for _ in range(steps):
        error = (kernel @ a + bias).softmax(2) - y  # (E, n, C)
        a = a - rate * (error + a)
        bias = bias - rate * error.sum(1, keepdim=True)
    w = x.mT @ a  # (E, D, n) (E, n, C) -> (E, D, C)
    return queries @ w + bias


def draw_episode(members, ways, images, generator):
    """Rows (ways, images) of random images of `ways` random classes, from each class's rows."""
    rows = []
    for c in torch.randperm(len(members), generator=generator)[:ways].tolist():
        chosen = torch.randperm(len(members[c]), generator=generator)[:images]
        rows.append(members[c][chosen])
    return torch.stack(rows)


def run(backbone, data, args, ways=5, shots=5, queries=15, episodes=600):
    """Mean accuracy in % over episodes."""
    y, labels = all_features(backbone, data, args)
    y = F.normalize(y, dim=1)
    labels = labels.cpu()
    members = [(labels == c).nonzero().flatten() for c in range(len(data.classes))]
    members = [rows for rows in members if len(rows) >= shots + queries]
    if len(members) < ways:
        raise common.UserError(f"few-shot episodes need {ways} classes of {shots + queries} images "
                               f"or more: {args.data} has {len(members)}")

    generator = torch.Generator().manual_seed(0)
    drawn = [draw_episode(members, ways, shots + queries, generator) for _ in range(episodes)]
    drawn = torch.stack(drawn).to(args.device)  # (episodes, ways, shots + queries)
    truth = torch.arange(ways, device=args.device)
    support_classes = F.one_hot(truth.repeat_interleave(shots)).to(y.dtype)
    query_classes = truth.repeat_interleave(queries)

    accuracy = []
    for rows in drawn.split(100):
        support = y[rows[:, :, :shots].flatten(1)]  # (E, ways * shots, D)
        query = y[rows[:, :, shots:].flatten(1)]
        logits = logistic_regression(support, support_classes, query)
        accuracy.append((logits.argmax(2) == query_classes).double().mean(1))
    accuracy = 100 * torch.cat(accuracy)
    half_width = 1.96 * accuracy.std().item() / episodes**0.5
    return {"": {"accuracy": accuracy.mean().item(), "95% +-": half_width}}
