"""Self-perturbation of feature maps: APD's SSD step, and the permutation between identities that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from apd_kernels._core.backend import resolve_backend
from apd_kernels._core.checks import check_floating, check_integers, check_same_kind, check_tensor
from apd_kernels._core.maps import channel_axis, memory_format, stacked_like
from apd_kernels._core.operators import differentiable, first_derivatives_only, operator
from apd_kernels.reference import ssd as reference


class DisentangledMaps(NamedTuple):
    """What `ssd_mask` made of the features, each of their shape, dtype and memory format."""

    relevant: Tensor  # K
    irrelevant: Tensor  # NK = F − K
    perturbed: Tensor | None  # K* = K + NK of another image; None without a permutation


@overload
def ssd_mask(
    features: Tensor, logits: Sequence[Tensor], permutation: Tensor | None, *, stacked: Literal[False] = ...
) -> DisentangledMaps: ...
@overload
def ssd_mask(
    features: Tensor, logits: Sequence[Tensor], permutation: Tensor | None, *, stacked: Literal[True]
) -> Tensor: ...
@overload
def ssd_mask(
    features: Tensor, logits: Sequence[Tensor], permutation: Tensor | None, *, stacked: bool
) -> DisentangledMaps | Tensor: ...
def ssd_mask(
    features: Tensor, logits: Sequence[Tensor], permutation: Tensor | None, *, stacked: bool = False
) -> DisentangledMaps | Tensor:
    """Split features into identity-relevant and irrelevant parts, and perturb the first with another image's second.

    With a the mean of the sigmoids of the logits: K = a ⊙ F, NK = F − K, K* = K + NK[permutation] (APD, SSD: Tan et
    al., Neural Networks 186:107287, 2025). Computed in float32 (float64 for float64), forward and backward in one pass
    over the maps each.

    Args:
        features: F, shape (B, C, H, W), contiguous or channels_last, or (B, L, C); float16, bfloat16, float32 or
            float64. Other strides serve too.
        logits: at least one map of attention before its sigmoid, each of the features' shape, or with one channel for
            all: (B, 1, H, W) or (B, L, 1). Dtype and device as `features`.
        permutation: the image whose NK each image receives, int64 (B,), each of 0 … B−1 once; see
            `identity_derangement`. None leaves out K*. A wrong one is a ValueError on the CPU. On CUDA that check would
            wait for the GPU, so it is left to the caller: the gradient of an image that is not named is NaN, that of
            one named twice lacks a part, and an entry outside 0 … B−1 gives NaN (in the kernels; on the PyTorch path,
            the error of indexing).
        stacked: return the maps as one batch for one pass of a shared network. They are written where they belong in
            it, and its gradient is read there: nothing is copied.

    Returns:
        `DisentangledMaps` ``(relevant, irrelevant, perturbed)``. With `stacked` one tensor of 3B images, K, NK, K* in
        this order (2B, K and NK, without a permutation), which ``DisentangledMaps(*network(maps).chunk(3))`` names
        again. Differentiable once in the features and all logits.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or, on the CPU, no permutation.

    >>> import torch
    >>> features = torch.tensor([4.0, 8.0]).view(2, 1, 1)
    >>> relevant, irrelevant, perturbed = ssd_mask(features, [torch.full((2, 1, 1), 1.0986)], torch.tensor([1, 0]))
    >>> relevant.flatten(), irrelevant.flatten(), perturbed.flatten()
    (tensor([3.0000, 6.0000]), tensor([1.0000, 2.0000]), tensor([5.0000, 7.0000]))
    >>> ssd_mask(features, [torch.full((2, 1, 1), 1.0986)], torch.tensor([1, 0]), stacked=True).flatten()
    tensor([3.0000, 6.0000, 1.0000, 2.0000, 5.0000, 7.0000])
    """
    _check_maps(features, logits)
    if permutation is not None:
        check_integers("permutation", permutation, len(features), features.device)
        if permutation.dtype != torch.int64:
            raise TypeError(f"permutation: expected torch.int64, got {permutation.dtype}")
    backend = resolve_backend(features)
    if stacked:
        maps, _ = _ssd_mask_stacked(features, list(logits), permutation, backend)
        return maps
    if permutation is None:
        relevant, irrelevant = _ssd_mask(features, list(logits), backend)
        return DisentangledMaps(relevant, irrelevant, None)
    relevant, irrelevant, perturbed, _ = _ssd_mask_perturbed(features, list(logits), permutation, backend)
    return DisentangledMaps(relevant, irrelevant, perturbed)


def _check_maps(features: Tensor, logits: Sequence[Tensor]) -> None:
    check_floating("features", features)
    if features.dim() not in (3, 4):
        raise ValueError(f"features: expected shape (B, C, H, W) or (B, L, C), got {tuple(features.shape)}")
    axis = channel_axis(features)
    if features.shape[axis] < 1:
        raise ValueError(f"features: expected at least one channel, got shape {tuple(features.shape)}")
    if not isinstance(logits, (list, tuple)):
        raise TypeError(f"logits: expected a list or tuple of tensors, got {type(logits).__name__}")
    if not logits:
        raise ValueError("logits: expected at least one map, got none")
    shared = tuple(1 if dim == axis else size for dim, size in enumerate(features.shape))
    for index, logit in enumerate(logits):
        name = f"logits[{index}]"
        check_floating(name, logit)
        check_same_kind(name, logit, "features", features)
        if tuple(logit.shape) not in (tuple(features.shape), shared):
            raise ValueError(f"{name}: expected shape {tuple(features.shape)} or {shared}, got {tuple(logit.shape)}")


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _fake(features: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return _like(features), _like(features)


def _fake_perturbed(features: Tensor, permutation: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inverse = permutation.new_empty(permutation.shape)
    return _like(features), _like(features), _like(features), inverse


def _fake_stacked(features: Tensor, permutation: Tensor | None, **_: Any) -> tuple[Tensor, Tensor]:
    inverse = features.new_empty(0 if permutation is None else permutation.shape, dtype=torch.int64)
    return stacked_like(features, 2 if permutation is None else 3), inverse


def _fake_backward(
    features: Tensor, logits: list[Tensor], for_features: bool, for_logits: bool, **_: Any
) -> tuple[Tensor, list[Tensor]]:
    return (
        _like(features) if for_features else features.new_empty(0),
        [_like(logit) if for_logits else features.new_empty(0) for logit in logits],
    )


_ssd_mask = operator(reference.ssd_mask, fake=_fake)
# Also returns the inverse of the permutation, for the backward pass.
_ssd_mask_perturbed = operator(reference.ssd_mask_perturbed, fake=_fake_perturbed)
# K, NK, K* one after the other, and the inverse of the permutation.
_ssd_mask_stacked = operator(reference.ssd_mask_stacked, fake=_fake_stacked)
_ssd_mask_backward = operator(reference.ssd_mask_backward, fake=_fake_backward)
first_derivatives_only(_ssd_mask_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, logits, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, None, None, *logits)


def _setup_perturbed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, logits, permutation, ctx.backend = inputs
    *_, inverse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(inverse)
    ctx.save_for_backward(features, permutation, inverse, *logits)


def _setup_stacked(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, logits, permutation, ctx.backend = inputs
    _, inverse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(inverse)
    ctx.save_for_backward(features, permutation, None if permutation is None else inverse, *logits)


def _gradients(ctx: Any, *maps: Tensor | None) -> tuple[Tensor | None, list[Tensor | None]]:
    """Of the features and the logits, from those of the maps; None for an output that was not used."""
    features, permutation, inverse, *logits = ctx.saved_tensors
    for_features, for_logits = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1])
    if all(gradient is None for gradient in maps):
        return None, [None] * len(logits)
    to_features, to_logits = _ssd_mask_backward(
        features, logits, permutation, inverse, *maps, for_features, for_logits, ctx.backend
    )
    return to_features if for_features else None, to_logits if for_logits else [None] * len(logits)


def _backward(ctx: Any, for_relevant: Tensor | None, for_irrelevant: Tensor | None) -> tuple[Any, ...]:
    return *_gradients(ctx, for_relevant, for_irrelevant, None), None


def _backward_perturbed(
    ctx: Any, for_relevant: Tensor | None, for_irrelevant: Tensor | None, for_perturbed: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    return *_gradients(ctx, for_relevant, for_irrelevant, for_perturbed), None, None


def _backward_stacked(ctx: Any, for_maps: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    permuted = ctx.saved_tensors[1] is not None
    maps = (None,) * 3 if for_maps is None else for_maps.chunk(3) if permuted else (*for_maps.chunk(2), None)
    return *_gradients(ctx, *maps), None, None


differentiable(_ssd_mask, _setup_context, _backward)
differentiable(_ssd_mask_perturbed, _setup_perturbed, _backward_perturbed)
differentiable(_ssd_mask_stacked, _setup_stacked, _backward_stacked)


@overload
def identity_derangement(
    labels: Tensor,
    generator: torch.Generator | None = ...,
    *,
    return_valid: Literal[False] = ...,
    check: bool | None = ...,
) -> Tensor: ...
@overload
def identity_derangement(
    labels: Tensor,
    generator: torch.Generator | None = ...,
    *,
    return_valid: Literal[True],
    check: bool | None = ...,
) -> tuple[Tensor, Tensor]: ...
def identity_derangement(
    labels: Tensor,
    generator: torch.Generator | None = None,
    *,
    return_valid: bool = False,
    check: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A random permutation that gives every image one of another identity.

    The images stand in a random order of identities, in random order inside each; every one takes the image s places
    further on, round the end, with s random between c and B − c, where c is the size of the largest identity. So all
    images of other identities are possible, not all with the same probability. It runs on the labels' device, without
    waiting for it.

    Args:
        labels: identity of each image, shape (B,), any integer dtype.
        generator: source of the random numbers, on the labels' device; PyTorch's own when None. The same state gives
            the same permutation. Under ``torch.compile`` only None.
        return_valid: also return which images received another identity.
        check: whether to raise when an identity fills more than half of the batch, so that no such permutation exists.
            None checks labels on the CPU, and nothing under ``torch.compile``. On CUDA a check waits for the GPU.

    Returns:
        int64 (B,), or ``(permutation, valid)`` with bool (B,): False where no other identity was left, only possible
        without the check. As many rows as can be are valid then.

    Raises:
        ValueError: an identity fills more than half of the batch, where that is checked; a wrong shape.
        TypeError: labels of a wrong dtype.

    >>> import torch
    >>> labels = torch.tensor([3, 3, 5, 5])
    >>> labels[identity_derangement(labels)]
    tensor([5, 5, 3, 3])
    """
    check_tensor("labels", labels)
    if labels.dim() != 1:
        raise ValueError(f"labels: expected shape (B,), got {tuple(labels.shape)}")
    check_integers("labels", labels, len(labels), labels.device)
    if check is None:
        check = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if check and len(labels):
        identities, counts = labels.unique(return_counts=True)
        count, index = (int(value) for value in counts.max(0))
        if 2 * count > len(labels):
            raise ValueError(
                f"labels: expected no identity in more than half of {len(labels)} rows, "
                f"got identity {int(identities[index])} in {count}"
            )
    permutation = reference.identity_derangement(labels, generator)
    return (permutation, labels != labels[permutation]) if return_valid else permutation
