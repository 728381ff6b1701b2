"""Self-perturbation of feature maps from a mean of sigmoids, and the permutation that it takes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from apd_kernels._core.maps import channel_axis, memory_format, stacked_like
from apd_kernels._core.operators import internal_dtype

# Elements of a map that are worked on at once on the CPU, so that temporaries stay in the cache. Three maps of
# 64×768×16×8 float32 on 2 cores, forward and backward: 50 ms, and 173 ms all at once.
BLOCK_ELEMENTS = 1 << 18


def ssd_mask(features: Tensor, logits: list[Tensor]) -> tuple[Tensor, Tensor]:
    """K = a ⊙ F and NK = F − K, with a = mean_i σ(l_i)."""
    dtype = internal_dtype(features)
    relevant, irrelevant = _like(features, dtype), _like(features, dtype)
    _split(features, logits, relevant, irrelevant)
    return relevant.to(features.dtype), irrelevant.to(features.dtype)


def ssd_mask_perturbed(
    features: Tensor, logits: list[Tensor], permutation: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K, NK, K* = K + NK[permutation], and the inverse of the permutation."""
    inverse = _inverse(permutation)
    dtype = internal_dtype(features)
    relevant, irrelevant, perturbed = (_like(features, dtype) for _ in range(3))
    _split(features, logits, relevant, irrelevant)
    _perturb(relevant, irrelevant, permutation, perturbed)
    dtype = features.dtype
    return relevant.to(dtype), irrelevant.to(dtype), perturbed.to(dtype), inverse


def ssd_mask_stacked(features: Tensor, logits: list[Tensor], permutation: Tensor | None) -> tuple[Tensor, Tensor]:
    """K, NK and, with a permutation, K*, as one batch, and the inverse of the permutation."""
    size = len(features)
    inverse = features.new_empty(0, dtype=torch.int64) if permutation is None else _inverse(permutation)
    stacked = stacked_like(features, 2 if permutation is None else 3, internal_dtype(features))
    relevant, irrelevant, perturbed = stacked[:size], stacked[size : 2 * size], stacked[2 * size :]
    _split(features, logits, relevant, irrelevant)
    if permutation is not None:
        _perturb(relevant, irrelevant, permutation, perturbed)
    return stacked.to(features.dtype), inverse


def _inverse(permutation: Tensor) -> Tensor:
    inverse = permutation.argsort()
    rows = torch.arange(len(permutation), device=permutation.device)
    if not permutation.is_cuda and not torch.equal(permutation[inverse], rows):
        missing = min({*range(len(rows))} - {*permutation.tolist()})
        raise ValueError(f"permutation: expected each of 0 … {len(rows) - 1} once, got no {missing}")
    return inverse


def _split(features: Tensor, logits: list[Tensor], relevant: Tensor, irrelevant: Tensor) -> None:
    """Write K and NK, not yet rounded to the dtype of the features."""
    dtype = relevant.dtype
    for block in _image_blocks(features):
        own = features[block].to(dtype)
        torch.mul(_mean([logit[block].to(dtype).sigmoid() for logit in logits]), own, out=relevant[block])
        torch.sub(own, relevant[block], out=irrelevant[block])


def _perturb(relevant: Tensor, irrelevant: Tensor, permutation: Tensor, perturbed: Tensor) -> None:
    """Write K*."""
    for block in _image_blocks(relevant):
        torch.add(relevant[block], irrelevant[permutation[block]], out=perturbed[block])


def ssd_mask_backward(
    features: Tensor,
    logits: list[Tensor],
    permutation: Tensor | None,
    inverse: Tensor | None,
    for_relevant: Tensor | None,
    for_irrelevant: Tensor | None,
    for_perturbed: Tensor | None,
    for_features: bool,
    for_logits: bool,
) -> tuple[Tensor, list[Tensor]]:
    """With k = ∂K + ∂K* and n = ∂NK + ∂K*[inverse]: ∂F = n + a (k − n), ∂l_i = σ'(l_i) Σ F (k − n) / M.

    The sum goes over the channels of a map with one channel for all; M is the number of maps.
    """
    dtype = internal_dtype(features)
    to_features = _like(features, features.dtype) if for_features else features.new_empty(0)
    to_logits = [_like(logit, logit.dtype) if for_logits else features.new_empty(0) for logit in logits]
    for block in _image_blocks(features):
        nothing = torch.zeros((), dtype=dtype, device=features.device)
        k = nothing if for_relevant is None else for_relevant[block].to(dtype)
        n = nothing if for_irrelevant is None else for_irrelevant[block].to(dtype)
        if for_perturbed is not None and permutation is not None and inverse is not None:
            k = k + for_perturbed[block].to(dtype)
            n = n + _taken_back(for_perturbed, permutation, inverse, block).to(dtype)
        difference = k - n
        sigmoids = [logit[block].to(dtype).sigmoid() for logit in logits]
        if for_features:
            to_features[block] = n + _mean(sigmoids) * difference
        if for_logits:
            flow = difference * features[block] / len(logits)
            for logit, sigmoid, result in zip(logits, sigmoids, to_logits, strict=True):
                through = flow if logit.shape == features.shape else flow.sum(channel_axis(features), keepdim=True)
                result[block] = through * sigmoid * (1 - sigmoid)
    return to_features, to_logits


def _mean(maps: list[Tensor]) -> Tensor:
    total, *rest = maps
    for x in rest:
        total = total + x
    return total / len(maps)


def _taken_back(x: Tensor, permutation: Tensor, inverse: Tensor, block: slice) -> Tensor:
    """x[inverse[block]]; NaN for an image that the permutation does not name once, which only the CPU refuses."""
    images = torch.arange(block.start, block.stop, device=x.device)
    factor = torch.where(permutation[inverse[block]] == images, 1.0, float("nan"))
    return x[inverse[block]].mul_(factor.view(-1, *(1,) * (x.dim() - 1)))


def _image_blocks(features: Tensor) -> Iterator[slice]:
    """Images whose maps together stay within BLOCK_ELEMENTS; all of them on a GPU."""
    images = len(features)
    if not features.is_cuda and images:
        images = max(1, BLOCK_ELEMENTS * images // max(1, features.numel()))
    for start in range(0, len(features), images or 1):
        yield slice(start, min(start + images, len(features)))


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))


def identity_derangement(labels: Tensor, generator: torch.Generator | None) -> Tensor:
    """Rows in a random order of identities, and in random order inside each, take the row `shift` places further on.

    An identity fills at most c consecutive places, so a shift between c and B − c leads out of it from all of them.
    Where c > B − c no shift does: one between B − c and c takes every row of the other identities to a row of the
    largest, and as many of its rows out of it, which is the most that can be.
    """
    size = len(labels)
    if size == 0:
        return torch.empty_like(labels, dtype=torch.int64)
    # Not torch.rand: its form with a generator takes no symbolic size, so it would not compile for all sizes at once.
    drawn = labels.new_empty((3, size), dtype=torch.float64).uniform_(generator=generator)
    # Places in sorted order, not the random numbers, order rows and identities: they differ even if numbers do not.
    rows, ranks = drawn[:2].argsort(-1)
    rows = rows[labels[rows].argsort(stable=True)]
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = labels[rows[1:]] != labels[rows[:-1]]
    identity = first.cumsum(0) - 1
    places = torch.arange(size, device=labels.device)
    largest = (places - torch.where(first, places, 0).cummax(0).values).max() + 1
    rows = rows[ranks[identity].argsort(stable=True)]
    least, most = torch.minimum(largest, size - largest), torch.maximum(largest, size - largest)
    shift = least + (drawn[2, 0] * (most - least + 1)).long()  # uniform to within size / 2⁵³
    return rows.clone().scatter_(0, rows, rows[(places + shift) % size])
