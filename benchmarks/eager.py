"""The operations as Re-ID code bases write them in PyTorch: whole matrices, autograd, argsort."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def distance(x: Tensor, y: Tensor) -> Tensor:
    squared = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.t()
    return squared.clamp(min=1e-12).sqrt()


def batch_hard(x: Tensor, labels: Tensor, y: Tensor, y_labels: Tensor) -> tuple[Tensor, Tensor]:
    d = distance(x, y)
    same = labels[:, None] == y_labels
    return d.masked_fill(~same, -torch.inf).amax(1), d.masked_fill(same, torch.inf).amin(1)


def triplet_loss(x: Tensor, labels: Tensor, margin: float | None) -> Tensor:
    d = distance(x, x)
    same = labels[:, None] == labels
    farthest = d.masked_fill(~same, -torch.inf).amax(1)
    nearest = d.masked_fill(same, torch.inf).amin(1)
    gap = farthest - nearest
    return F.softplus(gap).mean() if margin is None else (gap + margin).clamp(min=0).mean()


def ascent_step(x: Tensor, start: Tensor, labels: Tensor, epsilon: float, step: float, norm: str) -> Tensor:
    """One step of projected gradient ascent by autograd: mined on the matrix, differentiated by row differences."""
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        with torch.no_grad():
            d = distance(z, z)
            same = labels[:, None] == labels
            positive = d.masked_fill(~same, -torch.inf).fill_diagonal_(-torch.inf).argmax(1)
            negative = d.masked_fill(same, torch.inf).argmin(1)
        gap = (z - z[positive]).norm(dim=1) - (z - z[negative]).norm(dim=1)
        (gradient,) = torch.autograd.grad(F.softplus(gap).sum(), z)
    return _moved(x, start, gradient, epsilon, step, norm)


def descent_step(x: Tensor, start: Tensor, negatives: Tensor, epsilon: float, step: float) -> Tensor:
    """One step of projected gradient descent of eq. 3 by autograd, in the L2 ball."""
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(perturbation_loss(z, negatives, start), z)
    return _moved(x, start, -gradient, epsilon, step, "l2")


def _moved(x: Tensor, start: Tensor, direction: Tensor, epsilon: float, step: float, norm: str) -> Tensor:
    if norm == "linf":
        return start + (x + step * direction.sign() - start).clamp(-epsilon, epsilon)
    offset = x + step * F.normalize(direction) - start
    return start + offset * (epsilon / offset.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)


def perturbation_loss(perturbed: Tensor, negatives: Tensor, original: Tensor) -> Tensor:
    to_negatives = (perturbed[:, None] - negatives).norm(dim=2)
    to_original = (perturbed - original).norm(dim=1)
    return F.softplus(to_negatives - to_original[:, None]).mean()


def ssd_mask(features: Tensor, logits: list[Tensor], permutation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention = sum(torch.sigmoid(logit) for logit in logits) / len(logits)
    relevant = attention * features
    irrelevant = features - relevant
    return relevant, irrelevant, relevant + irrelevant[permutation]


def rank_metrics(
    query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, query_cams: Tensor, gallery_cams: Tensor
) -> Tensor:
    """mAP and rank-1 by a distance matrix and one argsort a row, in blocks of queries that fit the memory."""
    query, gallery = F.normalize(query), F.normalize(gallery)
    precisions, firsts = [], []
    for start in range(0, len(query), 1024):
        rows = slice(start, start + 1024)
        order = (1 - query[rows] @ gallery.t()).argsort(1)
        match = gallery_ids[order] == query_ids[rows, None]
        keep = ~(match & (gallery_cams[order] == query_cams[rows, None]))
        match = match & keep
        rank = keep.cumsum(1)
        hits = match.cumsum(1)
        precisions.append((hits / rank.clamp(min=1) * match).sum(1) / match.sum(1).clamp(min=1))
        firsts.append((match & (rank == 1)).any(1))
        valid = match.any(1)
        precisions[-1], firsts[-1] = precisions[-1][valid], firsts[-1][valid]
    return torch.stack([torch.cat(precisions).mean(), torch.cat(firsts).float().mean()])


def rank_metrics_in_a_loop(
    query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, query_cams: Tensor, gallery_cams: Tensor
) -> Tensor:
    """The same as most code bases do it: the whole matrix, NumPy's argsort, and a Python loop over queries."""
    distances = (1 - F.normalize(query) @ F.normalize(gallery).t()).numpy()
    order = np.argsort(distances, axis=1)
    ids, cams = gallery_ids.numpy(), gallery_cams.numpy()
    precisions, firsts = [], []
    for ranked, pid, cam in zip(order, query_ids.numpy(), query_cams.numpy(), strict=True):
        match = ids[ranked] == pid
        match = match[~(match & (cams[ranked] == cam))]
        if match.any():
            places = np.flatnonzero(match)
            precisions.append(np.mean(np.arange(1, len(places) + 1) / (places + 1)))
            firsts.append(match[0])
    return torch.tensor([np.mean(precisions), np.mean(firsts)])


def _encodings(weighted: Tensor, order: Tensor, k: int, half: int, k2: int) -> Tensor:
    """One dense row an image: the softmax of what is `weighted` over its k-reciprocal neighbours, then k2 averaged."""
    encodings = torch.zeros_like(weighted)

    def mutual(i: int, length: int) -> Tensor:
        forward = order[i, :length]
        return forward[(order[forward, :length] == i).any(1)]

    halves = [mutual(i, half) for i in range(len(weighted))]
    for i in range(len(weighted)):
        first = mutual(i, k)
        others = [halves[j] for j in first.tolist()]
        added = [other for other in others if torch.isin(other, first).sum() > 2 / 3 * len(other)]
        columns = torch.cat([first, *added]).unique()
        encodings[i, columns] = torch.softmax(-weighted[i, columns], 0)
    return torch.stack([encodings[near].mean(0) for near in order[:, :k2]]) if k2 > 1 else encodings


def _jaccard(row: Tensor, encodings: Tensor) -> Tensor:
    columns = row.nonzero()[:, 0]  # a few dozen of N
    shared = torch.minimum(row[columns], encodings[:, columns]).sum(1)
    return 1 - shared / (2 - shared)


def k_reciprocal_rerank(query: Tensor, gallery: Tensor, k1: int = 20, k2: int = 6, lambda_value: float = 0.3) -> Tensor:
    """Re-ranked distances with N×N matrices and a Python loop over images, as the published code has it."""
    rows, queries = torch.cat([query, gallery]), len(query)
    squares = torch.cdist(rows, rows).square()
    own = squares / squares.amax(1, keepdim=True)
    order = squares.argsort(dim=1, stable=True)[:, : k1 + 1]
    encodings = _encodings(own, order, k1 + 1, round(k1 / 2) + 1, k2)
    final = torch.empty(queries, len(gallery), dtype=own.dtype, device=own.device)
    for i in range(queries):
        final[i] = (1 - lambda_value) * _jaccard(encodings[i], encodings[queries:]) + lambda_value * own[i, queries:]
    return final


def jaccard_distance(rows: Tensor, k1: int = 20, k2: int = 6) -> Tensor:
    """Jaccard distances with N×N matrices and Python loops over images, as code for pseudo-labels has it."""
    squares = torch.cdist(rows, rows).square()
    order = squares.argsort(dim=1, stable=True)[:, :k1]
    encodings = _encodings(squares, order, k1, round(k1 / 2) + 1, k2)
    return torch.stack([_jaccard(row, encodings) for row in encodings])


def circle_loss(
    x: Tensor, labels: Tensor, y: Tensor, y_labels: Tensor, margin: float = 0.25, gamma: float = 128.0
) -> Tensor:
    """As in fast-reid; an anchor is not its own positive where y is x."""
    s = F.normalize(x) @ F.normalize(y).t()
    positive = labels[:, None] == y_labels
    negative = ~positive
    if y is x:
        positive = positive.clone().fill_diagonal_(False)
    of_positives = -gamma * (1 + margin - s.detach()).clamp(min=0) * (s - 1 + margin)
    of_negatives = gamma * (s.detach() + margin).clamp(min=0) * (s - margin)
    sums = [
        logits.masked_fill(~mask, -torch.inf).logsumexp(1)
        for logits, mask in ((of_positives, positive), (of_negatives, negative))
    ]
    return F.softplus(sums[0] + sums[1]).mean()


def supervised_contrastive_loss(
    x: Tensor, labels: Tensor, y: Tensor, y_labels: Tensor, temperature: float = 0.1
) -> Tensor:
    logits = F.normalize(x) @ F.normalize(y).t() / temperature
    positive = labels[:, None] == y_labels
    if y is x:
        positive = positive.clone().fill_diagonal_(False)
        logits = logits.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), -torch.inf)
    terms = logits.logsumexp(1, keepdim=True) - logits
    return (terms.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()
