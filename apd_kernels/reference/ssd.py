"""Self-perturbation of feature maps from a mean of sigmoids, and the permutation that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import itemgetter

import torch
from torch import Tensor

from apd_kernels._core.maps import channel_axis, memory_format, stacked_like
from apd_kernels._core.operators import internal_dtype

# Elements of a map that are worked on at once on the CPU, so that what is read again is still in the cache. Forward and
# backward of 64×768×16×8 float32 with three maps on 2 cores: 26 ms; in blocks of 2¹⁷ 31, of 2²⁰ 28, all at once 38.
# Intermediate values lie in the memory of the results: with a new tensor for each it was 44 ms, and 1.9 instead of
# 1.0 ms for 32×192×8×4, where eager autograd takes 1.1.
BLOCK_ELEMENTS = 1 << 19


def ssd_mask(features: Tensor, logits: list[Tensor]) -> tuple[Tensor, Tensor]:
    """K = a ⊙ F and NK = F − K, with a = mean_i σ(l_i)."""
    relevant, irrelevant = _like(features, features.dtype), _like(features, features.dtype)
    _write(features, logits, None, relevant, irrelevant, None)
    return relevant, irrelevant


def ssd_mask_perturbed(
    features: Tensor, logits: list[Tensor], permutation: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K, NK, K* = K + NK[permutation], and the inverse of the permutation."""
    inverse = _inverse(permutation)
    relevant, irrelevant, perturbed = (_like(features, features.dtype) for _ in range(3))
    _write(features, logits, permutation, relevant, irrelevant, perturbed)
    return relevant, irrelevant, perturbed, inverse


def ssd_mask_stacked(features: Tensor, logits: list[Tensor], permutation: Tensor | None) -> tuple[Tensor, Tensor]:
    """K, NK and, with a permutation, K*, as one batch, and the inverse of the permutation."""
    size = len(features)
    inverse = features.new_empty(0, dtype=torch.int64) if permutation is None else _inverse(permutation)
    stacked = stacked_like(features, 2 if permutation is None else 3)
    relevant, irrelevant, perturbed = stacked[:size], stacked[size : 2 * size], stacked[2 * size :]
    _write(features, logits, permutation, relevant, irrelevant, perturbed)
    return stacked, inverse


def _inverse(permutation: Tensor) -> Tensor:
    images, inverse = permutation.sort()
    if not permutation.is_cuda and not torch.equal(images, torch.arange(len(images), device=images.device)):
        missing = min({*range(len(images))} - {*images.tolist()})
        raise ValueError(f"permutation: expected each of 0 … {len(images) - 1} once, got no {missing}")
    return inverse


def _write(
    features: Tensor,
    logits: list[Tensor],
    permutation: Tensor | None,
    relevant: Tensor,
    irrelevant: Tensor,
    perturbed: Tensor | None,
) -> None:
    """Write K, NK and, with a permutation, K*, the sum of what is not yet rounded to the dtype of the features."""
    dtype = internal_dtype(features)
    rounded = features.dtype != dtype
    all_k, all_nk = (_like(features, dtype), _like(features, dtype)) if rounded else (relevant, irrelevant)
    nothing = torch.zeros((), dtype=dtype, device=features.device)
    for part in _blocks(features):
        own, k, nk = part(features).to(dtype), part(all_k), part(all_nk)
        # Until they are written, K's memory takes the sum of the sigmoids, and NK's each of them but the first.
        attention = _sum((_sigmoid(part(x), own, nk if i else k) for i, x in enumerate(logits)), k)
        # The division by M costs no pass of its own as a factor of the product.
        torch.addcmul(nothing, attention, own, value=1 / len(logits), out=k)
        torch.sub(own, k, out=nk)
        if rounded:
            part(relevant).copy_(k)
            part(irrelevant).copy_(nk)
    if permutation is not None and perturbed is not None:
        for part in _blocks(features):
            result = part(perturbed)
            taken = torch.index_select(all_nk, 0, part(permutation), out=None if rounded else result)
            torch.add(taken, part(all_k), out=result)


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
    rounded = features.dtype != dtype
    to_features = _like(features, features.dtype) if for_features else features.new_empty(0)
    to_logits = [_like(logit, logit.dtype) if for_logits else features.new_empty(0) for logit in logits]
    nothing = flow = taken = torch.zeros((), dtype=dtype, device=features.device)
    share = 1 / len(logits)
    whole = [logit.shape == features.shape for logit in logits]
    unnamed = None if permutation is None or inverse is None else _unnamed(permutation, inverse, features)
    for part in _blocks(features):
        own = part(features).to(dtype)
        if flow.shape != own.shape:
            flow, taken = torch.empty_like(own), torch.empty_like(own)
        k = nothing if for_relevant is None else part(for_relevant).to(dtype)
        n = nothing if for_irrelevant is None else part(for_irrelevant).to(dtype)
        if for_perturbed is not None and inverse is not None:
            k = torch.add(k, part(for_perturbed).to(dtype), out=flow)
            others = torch.index_select(for_perturbed, 0, part(inverse), out=None if rounded else taken)
            if unnamed is not None:
                others.mul_(part(unnamed))
            n = torch.add(n, others.to(dtype), out=taken)
        torch.sub(k, n, out=flow)
        # A gradient's memory takes what it is made of: that of a map its sigmoid, that of the features their sum.
        results = [part(x) for x in to_logits]
        places = [None] * len(logits) if rounded or not for_logits else results
        sigmoids = [_sigmoid(part(x), own, place) for x, place in zip(logits, places, strict=True)]
        if for_features:
            result = part(to_features)
            attention = _sum(iter(sigmoids), torch.empty_like(own) if rounded else result)
            torch.addcmul(n, attention, flow, value=share, out=result)
        if for_logits:
            torch.addcmul(nothing, own, flow, value=share, out=flow)
            for_all = flow if all(whole) else flow.sum(channel_axis(features), keepdim=True)
            for own_map, sigmoid, result in zip(whole, sigmoids, results, strict=True):
                through = flow if own_map else for_all
                torch.ops.aten.sigmoid_backward.grad_input(through, sigmoid, grad_input=sigmoid)
                if sigmoid is not result:
                    result.copy_(sigmoid)
    return to_features, to_logits


def _sigmoid(logit: Tensor, own: Tensor, place: Tensor | None) -> Tensor:
    """In the dtype of `own`; in `place` unless it has one channel for all."""
    x = logit.to(own.dtype)
    copied = None if x is logit else x
    return torch.sigmoid(x, out=copied if place is None or x.shape != own.shape else place)


def _sum(maps: Iterator[Tensor], place: Tensor) -> Tensor:
    """In `place` unless it has one channel for all, or is the one map."""
    total = next(maps)
    for x in maps:
        total = torch.add(total, x, out=place if place.shape in (total.shape, x.shape) else None)
    return total


def _unnamed(permutation: Tensor, inverse: Tensor, features: Tensor) -> Tensor | None:
    """NaN for an image that the permutation does not name once, which only the CPU refuses, else 1; None if all are."""
    images = torch.arange(len(inverse), device=features.device)
    source = permutation[inverse]
    if not features.is_cuda and torch.equal(source, images):
        return None
    named = (source == images).to(features.dtype)
    return (named / named).view(-1, *(1,) * (features.dim() - 1))


def _blocks(features: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Take images whose maps together stay within BLOCK_ELEMENTS; all of them on a GPU."""
    size, elements = len(features), features.numel()
    if features.is_cuda or elements <= BLOCK_ELEMENTS:
        yield lambda x: x
        return
    images = max(1, BLOCK_ELEMENTS * size // elements)
    for start in range(0, size, images):
        yield itemgetter(slice(start, start + images))


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
