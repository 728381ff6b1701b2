"""Self-perturbation of feature maps, one launch forward and one backward.

    a = mean_i σ(l_i),  K = a F,  NK = F − K,  K*_b = K_b + NK_π(b)
    k = ∂K + ∂K*,  n_b = ∂NK_b + ∂K*_π⁻¹(b)
    ∂F = n + a (k − n),  ∂l_i = σ'(l_i) F (k − n) / M,  summed over the channels where l_i has one for all

A map is images × positions × channels with a step for each, so both memory formats are read as they lie. Where all maps
of an image are one run of memory in the same order, that run is taken as the channels of a single position.

NK_π(b) is computed again from F and l of image π(b), and ∂K* is read twice, where it lies and at π⁻¹(b). The programs
of one tile go through all images before the next tile begins, so the second reading finds its data in the L2 cache:
from memory each map is read once, 1 + M reads and 3 writes forward, 4 + M reads and 1 + M writes backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels._core.maps import channel_axis, memory_format, stacked_like
from apd_kernels.kernels._launch import launch

ELEMENTS = 1024  # of a tile: 8 to a thread, one or two 16-byte accesses a map


@triton.jit
def _sigmoid(x):
    """σ(x) and σ'(x), without overflow and without the cancellation of 1 − σ."""
    e = tl.exp(-tl.abs(x))
    r = 1 / (1 + e)
    return tl.where(x >= 0, 1.0, e) * r, e * r * r


@triton.jit
def _at(steps, b, p, c):
    """Offsets of a tile of positions × channels, of positions × 1 in a map with one channel for all."""
    if steps[2] is None:
        return b * steps[0] + p[:, None] * steps[1]
    else:
        return b * steps[0] + p[:, None] * steps[1] + c[None, :] * steps[2]


@triton.jit
def _load(x, steps, b, p, c, P, C):
    mask = (p < P)[:, None] if steps[2] is None else (p < P)[:, None] & (c < C)[None, :]
    return tl.load(x + _at(steps, b, p, c), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _attention(logits, steps, b, p, c, P, C, MAPS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    a = tl.zeros((BP, BC), tl.float32)
    for i in tl.static_range(MAPS):
        s, _ = _sigmoid(_load(logits[i], steps[i], b, p, c, P, C))
        a += s
    return a * (1.0 / MAPS)


@triton.jit(do_not_specialize=["B"])
def _mask(
    features, logits, permutation, relevant, irrelevant, perturbed, inverse, B, P, C,
    features_steps, logits_steps, out_steps, MAPS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // B
    b = (tl.program_id(0) % B).to(tl.int64)
    tiles = tl.cdiv(P, BP)
    p = (tile % tiles * BP + tl.arange(0, BP)).to(tl.int64)
    c = (tile // tiles * BC + tl.arange(0, BC)).to(tl.int64)
    mask = (p < P)[:, None] & (c < C)[None, :]
    out = _at(out_steps, b, p, c)
    f = _load(features, features_steps, b, p, c, P, C)
    K = _attention(logits, logits_steps, b, p, c, P, C, MAPS, BP, BC) * f
    tl.store(relevant + out, K.to(relevant.dtype.element_ty), mask=mask)
    tl.store(irrelevant + out, (f - K).to(irrelevant.dtype.element_ty), mask=mask)
    if permutation is not None:
        # No entry is trusted: one outside the batch must not be followed.
        other = tl.load(permutation + b)
        inside = (other >= 0) & (other < B)
        other = tl.where(inside, other, b)
        if tile == 0:
            tl.store(inverse + other, b, mask=inside)
        f = _load(features, features_steps, other, p, c, P, C)
        NK = f - _attention(logits, logits_steps, other, p, c, P, C, MAPS, BP, BC) * f
        K = tl.where(inside, K + NK, float("nan"))
        tl.store(perturbed + out, K.to(perturbed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B"])
def _mask_gradient(
    features, logits, permutation, inverse, for_relevant, for_irrelevant, for_perturbed, to_features, to_logits,
    B, P, C, features_steps, logits_steps, relevant_steps, irrelevant_steps, perturbed_steps,
    to_features_steps, to_logits_steps, MAPS: tl.constexpr, SUMMED: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """SUMMED: one of the logits has one channel for all; then a program goes through all channels of its positions."""
    tile = tl.program_id(0) // B
    b = (tl.program_id(0) % B).to(tl.int64)
    tiles = tl.cdiv(P, BP)
    p = (tile % tiles * BP + tl.arange(0, BP)).to(tl.int64)
    start = tile // tiles * BC
    stop = C if SUMMED else start + BC
    if for_perturbed is not None:
        # Where π does not name b exactly once, the stored inverse is not one.
        source = tl.load(inverse + b)
        inside = (source >= 0) & (source < B)
        source = tl.where(inside, source, b)
        inside &= tl.load(permutation + source) == b
    flow = tl.zeros((BP, BC), tl.float32)
    for c0 in range(start, stop, BC):
        c = (c0 + tl.arange(0, BC)).to(tl.int64)
        mask = (p < P)[:, None] & (c < C)[None, :]
        k = tl.zeros((BP, BC), tl.float32)
        n = tl.zeros((BP, BC), tl.float32)
        if for_relevant is not None:
            k += _load(for_relevant, relevant_steps, b, p, c, P, C)
        if for_irrelevant is not None:
            n += _load(for_irrelevant, irrelevant_steps, b, p, c, P, C)
        if for_perturbed is not None:
            k += _load(for_perturbed, perturbed_steps, b, p, c, P, C)
            taken_back = _load(for_perturbed, perturbed_steps, source, p, c, P, C)
            n += tl.where(inside, taken_back, float("nan"))
        difference = k - n
        through = difference * _load(features, features_steps, b, p, c, P, C)
        a = tl.zeros((BP, BC), tl.float32)
        for i in tl.static_range(MAPS):
            s, slope = _sigmoid(_load(logits[i], logits_steps[i], b, p, c, P, C))
            a += s
            if to_logits is not None and logits_steps[i][2] is not None:
                value = (through * slope * (1.0 / MAPS)).to(to_logits[i].dtype.element_ty)
                tl.store(to_logits[i] + _at(to_logits_steps[i], b, p, c), value, mask=mask)
        if to_features is not None:
            value = (n + a * (1.0 / MAPS) * difference).to(to_features.dtype.element_ty)
            tl.store(to_features + _at(to_features_steps, b, p, c), value, mask=mask)
        if SUMMED:
            flow += through
    if SUMMED:
        total = tl.sum(flow, 1, keep_dims=True)
        for i in tl.static_range(MAPS):
            if logits_steps[i][2] is None:
                _, slope = _sigmoid(_load(logits[i], logits_steps[i], b, p, p, P, C))
                value = (total * slope * (1.0 / MAPS)).to(to_logits[i].dtype.element_ty)
                tl.store(to_logits[i] + _at(to_logits_steps[i], b, p, p), value, mask=(p < P)[:, None])


class _Map(NamedTuple):
    """A map and its elements from image to image, position to position, channel to channel (None: one for all)."""

    data: Tensor | None
    steps: tuple[int, int, int | None] | None


def _map(x: Tensor | None, channels: int) -> _Map:
    """Copied only where height and width do not make one evenly spaced row of positions."""
    if x is None:
        return _Map(None, None)
    if x.dim() == 4 and min(x.shape[2:]) > 1 and x.stride(2) != x.shape[3] * x.stride(3):
        x = x.contiguous(memory_format=memory_format(x))
    position = 1 if x.dim() == 3 else 3 if x.shape[3] > 1 else 2
    axis = channel_axis(x)
    return _Map(x, (x.stride(0), x.stride(position), x.stride(axis) if x.shape[axis] == channels else None))


class _Tiling(NamedTuple):
    """Positions and channels of an image as the kernels see it, and of a tile."""

    positions: int
    channels: int
    BP: int
    BC: int


def _tiling(features: Tensor, *maps: Tensor | None) -> tuple[_Tiling, list[_Map]]:
    """Tiles along the memory of the features; a single position with all elements where every map allows it."""
    channels = features.shape[channel_axis(features)]
    positions = features.shape.numel() // (len(features) * channels)
    seen = [_map(x, channels) for x in (features, *maps)]
    steps = [x.steps for x in seen if x.steps is not None]
    for run in ((1, positions), (channels, 1)):  # positions next to each other, or channels
        if all((positions == 1 or p == run[0]) and (channels == 1 or c == run[1]) for _, p, c in steps):
            seen = [_Map(x, steps and (steps[0], 0, 1)) for x, steps in seen]
            channels *= positions
            BC = min(ELEMENTS, triton.next_power_of_2(channels))
            return _Tiling(1, channels, 1, BC), seen
    if steps[0][2] == 1:
        BC = min(256, triton.next_power_of_2(channels))
        BP = min(ELEMENTS // BC, triton.next_power_of_2(positions))
    else:
        BP = min(32, triton.next_power_of_2(positions))
        BC = min(ELEMENTS // BP, triton.next_power_of_2(channels))
    return _Tiling(positions, channels, BP, BC), seen


def _new(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def ssd_mask(features: Tensor, logits: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Launch `_mask` without a permutation: a program a tile of an image."""
    relevant, irrelevant = _new(features), _new(features)
    _launch_mask(features, logits, relevant, irrelevant, None, None, None)
    return relevant, irrelevant


def ssd_mask_perturbed(
    features: Tensor, logits: list[Tensor], permutation: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `_mask`; it also writes the inverse of the permutation, which saves the backward pass a launch."""
    relevant, irrelevant, perturbed = _new(features), _new(features), _new(features)
    permutation = permutation.contiguous()
    inverse = torch.empty(permutation.shape, dtype=torch.int64, device=permutation.device)
    _launch_mask(features, logits, relevant, irrelevant, perturbed, permutation, inverse)
    return relevant, irrelevant, perturbed, inverse


def ssd_mask_stacked(features: Tensor, logits: list[Tensor], permutation: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch `_mask` on the parts of one tensor."""
    stacked = stacked_like(features, 2 if permutation is None else 3)
    permutation = None if permutation is None else permutation.contiguous()
    size = 0 if permutation is None else len(permutation)
    inverse = torch.empty(size, dtype=torch.int64, device=features.device)
    parts = stacked.split(len(features)) if features.numel() else (stacked,) * 3
    relevant, irrelevant, perturbed = (*parts, None)[:3]
    _launch_mask(features, logits, relevant, irrelevant, perturbed, permutation, inverse if size else None)
    return stacked, inverse


def _launch_mask(
    features: Tensor,
    logits: list[Tensor],
    relevant: Tensor,
    irrelevant: Tensor,
    perturbed: Tensor | None,
    permutation: Tensor | None,
    inverse: Tensor | None,
) -> None:
    if not features.numel():
        return
    (P, C, BP, BC), (own, out, *attention) = _tiling(features, relevant, *logits)
    launch(
        _mask, (len(features) * triton.cdiv(P, BP) * triton.cdiv(C, BC),),
        own.data, tuple(x.data for x in attention), permutation, relevant, irrelevant, perturbed, inverse,
        len(features), P, C, own.steps, tuple(x.steps for x in attention), out.steps,
        MAPS=len(logits), BP=BP, BC=BC, num_warps=4,
    )  # fmt: skip


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
    """Launch `_mask_gradient`: a program a tile, or all channels of its positions to sum over them."""
    to_features = _new(features) if for_features else None
    to_logits = [_new(logit) for logit in logits] if for_logits else []
    permutation = None if permutation is None else permutation.contiguous()
    if features.numel():
        (P, C, BP, BC), maps = _tiling(
            features, for_relevant, for_irrelevant, for_perturbed, to_features, *logits, *to_logits
        )
        own, by_relevant, by_irrelevant, by_perturbed, to_own, *rest = maps
        attention, to_attention = rest[: len(logits)], rest[len(logits) :]
        summed = for_logits and any(x.steps is not None and x.steps[2] is None for x in attention)
        launch(
            _mask_gradient, (len(features) * triton.cdiv(P, BP) * (1 if summed else triton.cdiv(C, BC)),),
            own.data, tuple(x.data for x in attention), permutation, inverse,
            by_relevant.data, by_irrelevant.data, by_perturbed.data, to_own.data,
            tuple(x.data for x in to_attention) or None, len(features), P, C,
            own.steps, tuple(x.steps for x in attention), by_relevant.steps, by_irrelevant.steps, by_perturbed.steps,
            to_own.steps, tuple(x.steps for x in to_attention) or None,
            MAPS=len(logits), SUMMED=summed, BP=BP, BC=BC, num_warps=4,
        )  # fmt: skip
    return (
        features.new_empty(0) if to_features is None else to_features,
        to_logits if for_logits else [features.new_empty(0) for _ in logits],
    )
