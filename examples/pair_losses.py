"""Three losses over all pairs of a batch, written with `pair_reduce`: docs/pair-reduce.md explains them.

python examples/pair_losses.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from apd_kernels import paired_distance
from apd_kernels.pairs import Pairing, PairReducer, jit, pair_reduce, tl
from apd_kernels.reducers import exponentials, joined, log_total

# Lifted structured loss, generalised (Song et al., 2016; Hermans et al., 2017):
#     mean_i max(0, ln Σ_p exp(d_ip) + ln Σ_n exp(m − d_in))


def lifted_tile(d, positive, negative, values):
    farthest, of_positives = exponentials(d, positive)
    nearest, of_negatives = exponentials(values[0] - d, negative)
    return farthest, of_positives, nearest, of_negatives


def lifted_combine(state, later):
    farthest, of_positives = joined(state[0], state[1], later[0], later[1])
    nearest, of_negatives = joined(state[2], state[3], later[2], later[3])
    return farthest, of_positives, nearest, of_negatives


def lifted_finish(state, values):
    return log_total(state[0], state[1]), log_total(state[2], state[3])


def lifted_weights(d, positive, negative, values, results, gradients):
    of_positives = gradients[0] * tl.exp(tl.where(positive, d - results[0], 0.0))
    of_negatives = -gradients[1] * tl.exp(tl.where(negative, values[0] - d - results[1], 0.0))
    return tl.where(positive, of_positives, of_negatives)


LIFTED = PairReducer(
    start=(-1e30, 0.0, -1e30, 0.0),
    tile=lifted_tile, combine=lifted_combine, finish=lifted_finish, weights=lifted_weights, name="lifted",
)  # fmt: skip


def lifted_structured_loss(x: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    of_positives, of_negatives = pair_reduce(x, None, LIFTED, Pairing(labels), parameters=(margin,))
    return (of_positives + of_negatives).clamp(min=0).mean()


# Multi-similarity loss with its mining (Wang et al., 2019), s the cosine similarity:
#     mean_i ln(1 + Σ_p exp(−α (s_ip − λ))) / α + ln(1 + Σ_n exp(β (s_in − λ))) / β
# over the positives with s_ip < max_n s_in + ε and the negatives with s_in > min_p s_ip − ε.


def extremes_tile(d, positive, negative, values):
    return tl.max(tl.where(positive, d, -3.0), 1), tl.min(tl.where(negative, d, 3.0), 1)


def extremes_combine(state, later):
    return tl.maximum(state[0], later[0]), tl.minimum(state[1], later[1])


@jit
def similar_terms(d, positive, negative, values):
    """The exponentials of the positives and of the negatives that are mined, 0 of the others."""
    farthest, nearest, alpha, beta, base, epsilon = values
    near, far = positive & (d > nearest - epsilon), negative & (d < farthest + epsilon)
    of_positive = tl.where(near, tl.exp(tl.where(near, alpha * (base - 1 + d), 0.0)), 0.0)
    return of_positive, tl.where(far, tl.exp(tl.where(far, beta * (1 - d - base), 0.0)), 0.0)


def similar_tile(d, positive, negative, values):
    of_positives, of_negatives = similar_terms(d, positive, negative, values)
    return tl.sum(of_positives, 1), tl.sum(of_negatives, 1)


def similar_combine(state, later):
    return state[0] + later[0], state[1] + later[1]


def similar_weights(d, positive, negative, values, results, gradients):
    of_positive, of_negative = similar_terms(d, positive, negative, values)
    return gradients[0] * values[2] * of_positive - gradients[1] * values[3] * of_negative


EXTREMES = PairReducer(start=(-3.0, 3.0), tile=extremes_tile, combine=extremes_combine, name="extremes")
SIMILAR = PairReducer(
    start=(0.0, 0.0), tile=similar_tile, combine=similar_combine, weights=similar_weights, name="multi_similarity"
)


def multi_similarity_loss(
    x: Tensor, labels: Tensor, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, epsilon: float = 0.1
) -> Tensor:
    extremes = pair_reduce(x.detach(), None, EXTREMES, Pairing(labels), metric="cosine")
    of_positives, of_negatives = pair_reduce(
        x, None, SIMILAR, Pairing(labels),
        values=extremes, parameters=(alpha, beta, base, epsilon), metric="cosine",
    )  # fmt: skip
    return (of_positives.log1p() / alpha + of_negatives.log1p() / beta).mean()


# Smooth-AP (Brown et al., 2020), s the cosine similarity, σ the sigmoid:
#     1 − mean_i mean_p r(i, p; positives) / r(i, p; all),   r(i, p; J) = 1 + Σ_{j ∈ J, j ≠ p} σ((s_ij − s_ip) / τ)
# An anchor stands once for each of its positives, with d_ip as its value.


def ranks_tile(d, positive, negative, values):
    above = tl.sigmoid((values[0] - d) / values[1])
    slope = above * (1 - above) / values[1]  # by d_ip
    return (
        tl.sum(tl.where(positive, above, 0.0), 1), tl.sum(tl.where(negative, above, 0.0), 1),
        tl.sum(tl.where(positive, slope, 0.0), 1), tl.sum(tl.where(negative, slope, 0.0), 1),
    )  # fmt: skip


def ranks_combine(state, later):
    return state[0] + later[0], state[1] + later[1], state[2] + later[2], state[3] + later[3]


def ranks_weights(d, positive, negative, values, results, gradients):
    above = tl.sigmoid((values[0] - d) / values[1])
    return -tl.where(positive, gradients[0], gradients[1]) * above * (1 - above) / values[1]


RANKS = PairReducer(
    start=(0.0, 0.0, 0.0, 0.0), tile=ranks_tile, combine=ranks_combine, weights=ranks_weights, name="smooth_ap"
)


def smooth_ap_loss(x: Tensor, labels: Tensor, temperature: float = 0.01) -> Tensor:
    same = (labels[:, None] == labels).fill_diagonal_(False)
    anchor, other = same.nonzero().unbind(1)
    t = paired_distance(x[anchor], x[other], metric="cosine")
    positives, negatives, by_positives, by_negatives = pair_reduce(
        x[anchor], x, RANKS, Pairing(labels[anchor], labels, own=anchor),
        values=(t.detach(),), parameters=(temperature,), metric="cosine",
    )  # fmt: skip
    # The sums as functions of d_ip, too: values have no gradient, so it is added to first order.
    change = t - t.detach()
    positives = positives + by_positives.detach() * change + 0.5  # p itself counts σ(0) = ½
    share = positives / (positives + negatives + by_negatives.detach() * change)
    count = same.sum(1)[anchor]
    return 1 - (share / count).sum() / same.any(1).sum().clamp(min=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64, help="rows of the batch, four of each identity")
    parser.add_argument("--dimension", type=int, default=128)
    chosen = parser.parse_args()
    labels = torch.arange(chosen.images) // 4
    x = torch.randn(chosen.images, chosen.dimension, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.normalize(x, dim=1).requires_grad_()
    for loss in (lifted_structured_loss, multi_similarity_loss, smooth_ap_loss):
        value = loss(x, labels)
        (gradient,) = torch.autograd.grad(value, x)
        print(f"{loss.__name__}: {value.item():.4f}, gradient of norm {gradient.norm().item():.4f}")


if __name__ == "__main__":
    main()
