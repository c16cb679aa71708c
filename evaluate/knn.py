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


def nearest_rows(queries, chunks, k, tile=8192):
    """The k largest cosine similarities of queries (n, D) to rows, and the rows' labels: (n, k).

    chunks: an iterable of (rows (m, D), labels (m,)). No more than tile x m similarities exist at a
    time. Where there are fewer than k rows, -inf and -1 fill up.
    """
    queries = F.normalize(queries, dim=1)
    best = queries.new_full((len(queries), k), -torch.inf)
    best_labels = torch.full((len(queries), k), -1, device=queries.device)
    for rows, labels in chunks:
        rows = F.normalize(rows, dim=1)
        for start in range(0, len(queries), tile):
            part = slice(start, start + tile)
            similarity = queries[part] @ rows.T  # (tile, D) (D, m) -> (tile, m)
            similarity, i = similarity.topk(min(k, len(labels)))  # (tile, k)
            candidates = torch.cat([best[part], similarity], 1)  # (tile, 2k)
            candidate_labels = torch.cat([best_labels[part], labels[i]], 1)
            best[part], j = candidates.topk(k)
            best_labels[part] = candidate_labels.gather(1, j)
    return best, best_labels


def merged(chunks, least=4096):
    """The same rows and labels in chunks of `least` rows or more: topk is faster on long rows."""
    held = []
    for chunk in chunks:
        held.append(chunk)
        if sum(len(labels) for _, labels in held) >= least:
            yield [torch.cat(parts) for parts in zip(*held)]
            held = []
    if held:
        yield [torch.cat(parts) for parts in zip(*held)]


def nearest_of_all(queries, chunks, k):
    """nearest_rows() for queries that all processes hold, among the chunks of all processes."""
    similarity, labels = nearest_rows(queries, merged(chunks), k)
    similarity = concatenated(similarity, dim=1)  # (n, G k)
    labels = concatenated(labels, dim=1)
    similarity, i = similarity.topk(k)
    return similarity, labels.gather(1, i)


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
    memory = (labelled(y, labels) for y, labels, _ in shares)
    similarity, labels = nearest_of_all(queries, memory, max(ks))
    row = {}
    for k in ks:
        for name, t in ((f"{k}-NN", None), (f"{k}-NN weighted", temperature)):
            predicted = vote(similarity[:, :k], labels[:, :k], len(train.classes), t)
            row[name] = percent(predicted == targets)
    return {"": row}
