"""5-way 5-shot classification. LC-loss, Section 4.4, Table 7

600 episodes: 5 random classes, 5 labelled images of each; logistic regression on their features,
fixed as the backbone gives them, classifies other images of these classes.

    python -m evaluate fewshot --checkpoint resnet50.pth --arch resnet50 --data DTD

Differences
 1. Unsaid in the paper: 15 queries a class; features of length one and scikit-learn's default
    penalty, as Tian et al. (arXiv:2003.11539) have it.
"""
import torch
import torch.nn.functional as F

import common
from evaluate.features import all_features, open_part

NAME = "few-shot"
prepare = open_part


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


def draw_episode(members, ways, count, generator):
    """Rows (ways, count) of `count` images of each of `ways` classes, from each class's rows."""
    rows = []
    classes = torch.randperm(len(members), generator=generator)[:ways]
    for c in classes.tolist():
        order = torch.randperm(len(members[c]), generator=generator)
        rows.append(members[c][order[:count]])
    return torch.stack(rows)


def run(backbone, data, args, ways=5, shots=5, queries=15, episodes=600):
    """Mean accuracy in % over episodes."""
    y, labels, _ = all_features(backbone, data, args)
    y = F.normalize(y, dim=1)
    count = shots + queries
    members = []
    for c in range(len(data.classes)):
        rows = (labels == c).nonzero().flatten()
        if len(rows) >= count:
            members.append(rows.cpu())
    if len(members) < ways:
        raise common.UserError(f"few-shot episodes need {ways} classes of {count} images or more: "
                               f"{args.data} has {len(members)}")

    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(ways, device=args.device)
    support_classes = F.one_hot(truth.repeat_interleave(shots)).to(y.dtype)
    query_classes = truth.repeat_interleave(queries)
    drawn = [draw_episode(members, ways, count, generator) for _ in range(episodes)]
    drawn = torch.stack(drawn).to(args.device)  # (episodes, ways, count)
    accuracy = []
    for rows in drawn.split(100):
        support, query = rows.split([shots, queries], 2)  # (E, ways, shots), (E, ways, queries)
        support = y[support.flatten(1)]  # (E, ways * shots, D)
        query = y[query.flatten(1)]
        logits = logistic_regression(support, support_classes, query)
        right = logits.argmax(2) == query_classes
        accuracy.append(100 * right.double().mean(1))
    accuracy = torch.cat(accuracy)
    half_width = 1.96 * accuracy.std().item() / episodes**0.5
    return {"": {"accuracy": accuracy.mean().item(), "95% +-": half_width}}
