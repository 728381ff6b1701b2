"""APD's metric-perturbation loss: perturbed samples toward negatives, away from their originals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apd_kernels._core.backend import resolve_backend
from apd_kernels._core.checks import check_comparable, check_features, check_floating, check_same_kind, check_tensor
from apd_kernels._core.operators import differentiable, first_derivatives_only, internal_dtype, operator
from apd_kernels.reference import perturbation_loss as reference


def metric_perturbation_loss(
    perturbed: Tensor, negatives: Tensor, original: Tensor, *, indices: Tensor | None = None
) -> Tensor:
    """How far perturbed samples are from matching negatives better than their originals (APD, eq. 3).

    The mean over samples i and their negatives j of ln(1 + exp(d(p_i, n_ij) − d(p_i, o_i))) with the Euclidean
    distance d: it falls as a perturbed sample moves toward its negatives and away from its original. Where only
    `perturbed` needs a gradient, as in APD, the forward pass computes it from the rows that it has in hand, and the
    backward pass does no more than scale it.

    Args:
        perturbed: features of the perturbed samples, shape (N, D); float16, bfloat16, float32 or float64.
        negatives: features of other identities, shape (N, D), or (N, M, D) for M to a sample; with `indices` a bank of
            features, shape (K, D). Dtype as `perturbed`; any strides, expanded ones too, are read as they lie.
        original: features of the originals, shape (N, D), dtype as `perturbed`.
        indices: rows of the bank that are each sample's negatives, int64 (N,) or (N, M); the kernels read them where
            they lie. −1 stands for no negative, as in the indices of `batch_hard`, and is left out of the mean. Another
            index outside the bank is a ValueError on the CPU. On CUDA that check would wait for the GPU: nothing is
            read outside the bank, and the loss and that sample's gradient are NaN.

    Returns:
        float32 scalar (float64 for float64 inputs); 0 where there is no pair. Differentiable once in all three, with
        `indices` in `perturbed` and `original`; the gradient of a distance at 0 is 0.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device; a bank that requires a gradient; on the
            CPU, an index outside the bank.

    >>> import torch
    >>> x = torch.tensor([[0.0, 0.0]])
    >>> metric_perturbation_loss(x, torch.tensor([[3.0, 4.0]]), x)
    tensor(5.0067)
    >>> bank = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    >>> metric_perturbation_loss(x, bank, x, indices=torch.tensor([[1, -1]]))
    tensor(10.0000)
    """
    check_features("perturbed", perturbed, sets=False)
    check_floating("negatives", negatives)
    check_same_kind("negatives", negatives, "perturbed", perturbed)
    count, dimension = perturbed.shape
    if indices is not None:
        indices = _checked_indices(indices, negatives, perturbed)
    elif negatives.dim() not in (2, 3) or negatives.shape[0] != count or negatives.shape[-1] != dimension:
        raise ValueError(
            f"negatives: expected shape ({count}, {dimension}) or ({count}, M, {dimension}), "
            f"got {tuple(negatives.shape)}"
        )
    elif negatives.dim() == 2:
        negatives = negatives[:, None]
    check_comparable("original", original, "perturbed", perturbed)
    if original.shape != perturbed.shape:
        raise ValueError(f"original: expected shape {tuple(perturbed.shape)}, got {tuple(original.shape)}")
    only_perturbed = perturbed.requires_grad and not (negatives.requires_grad or original.requires_grad)
    with_gradient = torch.is_grad_enabled() and only_perturbed
    backend = resolve_backend(perturbed)
    loss, *_ = _metric_perturbation_loss(perturbed, negatives, original, indices, with_gradient, backend)
    return loss


def _checked_indices(indices: Tensor, bank: Tensor, perturbed: Tensor) -> Tensor:
    """As (N, M)."""
    check_tensor("indices", indices)
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: expected torch.int64, got {indices.dtype}")
    count, dimension = perturbed.shape
    if indices.dim() not in (1, 2) or indices.shape[0] != count:
        raise ValueError(f"indices: expected shape ({count},) or ({count}, M), got {tuple(indices.shape)}")
    if indices.device != perturbed.device:
        raise ValueError(f"indices: expected device {perturbed.device} as perturbed, got {indices.device}")
    if bank.dim() != 2 or bank.shape[1] != dimension:
        raise ValueError(f"negatives: expected shape (K, {dimension}) with indices, got {tuple(bank.shape)}")
    if bank.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "negatives: expected a bank without requires_grad with indices, got one with it; "
            "detach it, or pass negatives[indices] for its gradient"
        )
    return indices if indices.dim() == 2 else indices[:, None]


def _fake(
    perturbed: Tensor, negatives: Tensor, indices: Tensor | None, with_gradient: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = internal_dtype(perturbed)
    count, dimension = perturbed.shape
    each = (negatives if indices is None else indices).shape[1]
    return (
        perturbed.new_empty((), dtype=dtype),
        perturbed.new_empty((), dtype=dtype),
        perturbed.new_empty((count, each), dtype=dtype),
        perturbed.new_empty((count,), dtype=dtype),
        perturbed.new_empty((count, dimension) if with_gradient else (0,)),
    )


def _fake_backward(
    perturbed: Tensor, negatives: Tensor, original: Tensor, for_negatives: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        perturbed.new_empty(perturbed.shape),
        negatives.new_empty(negatives.shape if for_negatives else (0,)),
        original.new_empty(original.shape),
    )


def _fake_scaled(total: Tensor, **_: Any) -> Tensor:
    return total.new_empty(total.shape)


# Besides the loss: 1 / number of pairs; d(p_i, n_ij), (N, M); d(p_i, o_i), (N,); and with_gradient the gradient of the
# sum over pairs with respect to `perturbed`, (N, D) in its dtype. Not of the mean: that could leave float16's range,
# and where the number of pairs is a power of two, scaling it in the backward pass rounds nothing.
_metric_perturbation_loss = operator(reference.metric_perturbation_loss, fake=_fake)
_metric_perturbation_loss_backward = operator(reference.metric_perturbation_loss_backward, fake=_fake_backward)
first_derivatives_only(_metric_perturbation_loss_backward)
_metric_perturbation_loss_scaled = operator(reference.metric_perturbation_loss_scaled, fake=_fake_scaled)
first_derivatives_only(_metric_perturbation_loss_scaled)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    perturbed, negatives, original, indices, ctx.with_gradient, ctx.backend = inputs
    _, share, to_negatives, to_original, total = output
    # `total` stays part of the graph, so that differentiating it is an error and no silent zero.
    ctx.mark_non_differentiable(share, to_negatives, to_original)
    if ctx.with_gradient:
        # The rows are not kept: nothing but `perturbed` was to have a gradient.
        ctx.save_for_backward(share, total)
    else:
        ctx.save_for_backward(share, perturbed, negatives, original, indices, to_negatives, to_original)


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    if ctx.with_gradient:
        share, total = ctx.saved_tensors
        scaled = _metric_perturbation_loss_scaled(gradient, share, total, ctx.backend)
        return scaled if needed[0] else None, None, None, None, None, None
    gradients = _metric_perturbation_loss_backward(gradient, *ctx.saved_tensors, needed[1], ctx.backend)
    return *(value if wanted else None for value, wanted in zip(gradients, needed, strict=True)), None, None, None


differentiable(_metric_perturbation_loss, _setup_context, _backward)
