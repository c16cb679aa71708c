"""k nearest neighbors. VICReg, Appendix C.1, Table 5

A validation image gets the class of most of its k nearest training images, k = 20 and 200.

    python -m evaluate knn --checkpoint runs/vicreg-shapes --baseline

Differences
 1. The paper names neither the distance nor the vote. Here: cosine similarity, and two votes, by
    majority and with the weight exp(similarity / 0.07) of the paper's reference [43].
"""
import torch
import torch.nn.functional as F

from evaluate.features import all_features, concatenated, features, labelled, open_labelled, percent

NAME = "k-NN"
prepare = open_labelled


def keep_nearest(best, best_labels, similarity, labels):
    """Puts the k largest of best (b, k) and similarity (b, m), in order, into best, and the labels
    (m,) of the latter into best_labels (b, k)."""
    better = similarity.amax(1) > best[:, -1]  # few queries, once many rows were seen
    better = better.nonzero().flatten()  # (b',)
    candidates = torch.cat([best[better], similarity[better]], 1)  # (b', k + m)
    new_labels = labels.expand(len(better), -1)
    candidate_labels = torch.cat([best_labels[better], new_labels], 1)
    best[better], i = candidates.topk(best.shape[1])
    best_labels[better] = candidate_labels.gather(1, i)


def nearest_rows(queries, chunks, k, trials=1):
    """Yields for each trial the k largest cosine similarities of queries (n, D), which are the same
    on all processes, to the rows of all processes, and the rows' labels: (n, k).

    chunks: an iterable of (rows (m, D), labels (m,), numbers of the trials that have them). Where
    there are fewer than k rows, -inf and -1 fill up.
    """
    queries = F.normalize(queries, dim=1)
    shape = (trials, len(queries), k)
    best = queries.new_full(shape, -torch.inf)
    best_labels = torch.full(shape, -1, device=queries.device)
    held = 2**22 if queries.device.type == "cpu" else 2**27  # similarities: a CPU's cache
    for rows, labels, members in chunks:
        if not len(rows):
            continue
        rows = F.normalize(rows, dim=1)
        tile = max(1, held // len(rows))
        for start in range(0, len(queries), tile):
            part = slice(start, start + tile)
            similarity = queries[part] @ rows.T  # (tile, D) (D, m) -> (tile, m)
            for trial in members:
                keep_nearest(best[trial, part], best_labels[trial, part], similarity, labels)

    for similarity, labels in zip(best, best_labels):
        similarity = concatenated(similarity, dim=1)  # (n, G k)
        labels = concatenated(labels, dim=1)
        similarity, i = similarity.topk(k)
        yield similarity, labels.gather(1, i)


def vote(similarity, labels, num_classes, temperature=None):
    """Each query's class (n,) from its neighbors (n, k): of most of them, or, with a temperature,
    each of weight exp(similarity / temperature)."""
    weight = torch.ones_like(similarity)
    if temperature is not None:
        weight = torch.exp((similarity - 1) / temperature)
    weight = weight * (labels >= 0)
    votes = weight.new_zeros(len(labels), num_classes)
    votes.scatter_add_(1, labels.clamp(min=0), weight)  # (n, k) -> (n, classes)
    return votes.argmax(1)


def run(backbone, data, args, ks=(20, 200), temperature=0.07):
    """Accuracy in % of k-NN classifiers on representations."""
    train, val = data
    queries, targets, _ = all_features(backbone, val, args)
    shares = features(backbone, train, args)
    memory = ((*labelled(y, labels), [0]) for y, labels, _ in shares)
    similarity, labels = next(nearest_rows(queries, memory, max(ks)))
    row = {}
    for k in ks:
        for name, t in ((f"{k}-NN", None), (f"{k}-NN weighted", temperature)):
            predicted = vote(similarity[:, :k], labels[:, :k], len(train.classes), t)
            row[name] = percent(predicted == targets)
    return {"": row}
