"""Losses over all pairs of an anchor: circle loss and supervised contrastive loss, without an N×M matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apd_kernels._core.checks import check_choice, check_number
from apd_kernels._core.operands import Operands, PreparedRows, checked_operands
from apd_kernels._core.operators import differentiable, first_derivatives_only, internal_dtype, operator
from apd_kernels._core.pairing import Pairing, checked_pairing
from apd_kernels._core.reduction import REDUCTIONS, reduced
from apd_kernels.mining import gradients
from apd_kernels.reference import contrastive as reference


def circle_loss(
    x: Tensor,
    labels: Tensor,
    y: Tensor | PreparedRows | None = None,
    y_labels: Tensor | None = None,
    *,
    margin: float = 0.25,
    gamma: float = 128.0,
    precision: str | None = None,
    own: Tensor | None = None,
    y_valid: Tensor | None = None,
    domains: Tensor | None = None,
    y_domains: Tensor | None = None,
    positives: str = "all",
    negatives: str = "all",
    reduction: str = "mean",
) -> Tensor:
    """Circle loss of cosine similarities (Sun et al., 2020, eq. 6; pairwise labels), without a similarity matrix.

    With s_p and s_n the similarities of an anchor to its positives and negatives, m the margin and γ `gamma`, its term
    is softplus(LSE_p(−γ α_p (s_p − 1 + m)) + LSE_n(γ α_n (s_n − m))), where LSE is the log of the sum of exponentials.
    The weights α_p = max(0, 1 + m − s_p) and α_n = max(0, s_n + m) are constants to the gradient, as in fast-reid and
    pytorch-metric-learning. The loss is the mean over anchors with a positive and a negative; 0 where none has both.

    Args:
        x: anchors, shape (N, D) or (S, N, D) for S feature sets with the same labels; float16, bfloat16, float32 or
            float64. Any length: rows are normalised.
        labels, y, y_labels, own, y_valid, domains, y_domains, positives, negatives: as in `batch_hard` (label −1,
            too); rows of `y` that are `prepare_rows` are prepared for ``"cosine"``.
        margin: m, at least 0; the paper takes 0.25 for re-identification and 0.4 for fine-grained retrieval.
        gamma: γ, above 0: 128 and 80 there.
        precision: of the products, as in `pairwise_distance`. Their rounding is multiplied by up to γ (1 + 2m) before
            the exponential: float32 grade leaves about 1e-5 of a term at γ = 128.
        reduction: as in `triplet_loss`. ``"none"`` is made by `pair_reduce`, whose backward pass computes the products
            again.

    Returns:
        The loss, a float32 scalar ((S,) for S sets; float64 for float64 inputs), or the N terms, 0 where an anchor
        does not count. Where it is to be differentiated the forward pass also computes the gradients of `x`, and of `y`
        where it needs one, so that nothing is computed twice: they are held until the backward pass, which only scales
        them. Beside them at most 64 MB of pair weights exist at a time. First derivatives only. An anchor paired with a
        NaN makes the loss NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device, size or choice.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.5, 1.0]])
    >>> circle_loss(x, torch.tensor([7, 7, 8, 8]), margin=0.25, gamma=32.0)
    tensor(3.3074)
    """
    check_number("margin", margin)
    _check_above_zero("gamma", gamma)
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        from apd_kernels.reducers import margin_terms

        pairing = Pairing(labels, y_labels, own, domains, y_domains, y_valid, positives, negatives)
        return reduced(*margin_terms("circle", x, y, pairing, float(gamma), float(margin), precision), reduction)
    x, rows, prepared, precision, backend = checked_operands(x, y, "cosine", precision)
    pairing = checked_pairing(x, labels, rows, y_labels, own, domains, y_domains, y_valid, positives, negatives)
    return _loss(x, rows, prepared, pairing, "circle", float(gamma), float(margin), precision, backend, reduction)


def cosface_loss(
    x: Tensor,
    pairing: Pairing,
    y: Tensor | PreparedRows | None = None,
    *,
    margin: float = 0.25,
    gamma: float = 128.0,
    precision: str | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The pairwise form of CosFace: a circle loss without its weights, by `pair_reduce`.

    The term of an anchor is softplus(LSE_p(−γ s_p) + LSE_n(γ (s_n + m))), with similarities as in `circle_loss`; as
    fast-reid's ``pairwise_cosface``, whose mean is ``reduction="mean_all"``.

    Args:
        x: anchors, shape (N, D) or (S, N, D); float16, bfloat16, float32 or float64. Rows are normalised.
        pairing: which pairs are positives and negatives: ``Pairing(labels)``, with ``y_labels`` where there is a `y`.
        y: other rows, shape (M, D) or (S, M, D), or `prepare_rows` of them for ``"cosine"``.
        margin, gamma, precision, reduction: as in `circle_loss`.

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs), or the N terms. First derivatives only.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device, size or choice.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.5, 1.0]])
    >>> cosface_loss(x, Pairing(torch.tensor([7, 7, 8, 8])), margin=0.25, gamma=8.0)
    tensor(0.1914)
    """
    from apd_kernels.reducers import margin_terms

    check_number("margin", margin)
    _check_above_zero("gamma", gamma)
    check_choice("reduction", reduction, REDUCTIONS)
    return reduced(*margin_terms("cosface", x, y, pairing, float(gamma), float(margin), precision), reduction)


def supervised_contrastive_loss(
    x: Tensor,
    labels: Tensor,
    y: Tensor | PreparedRows | None = None,
    y_labels: Tensor | None = None,
    *,
    temperature: float = 0.1,
    metric: str = "cosine",
    precision: str | None = None,
    own: Tensor | None = None,
    y_valid: Tensor | None = None,
    domains: Tensor | None = None,
    y_domains: Tensor | None = None,
    positives: str = "all",
    negatives: str = "all",
    reduction: str = "mean",
) -> Tensor:
    """Supervised contrastive loss (Khosla et al., 2020, eq. 2: the sum outside the log), without a similarity matrix.

    With logits l_ij = s_ij / τ, the term of anchor i is the mean over its positives p of LSE_j(l_ij) − l_ip, where j
    runs over its positives and negatives. The loss is the mean over anchors with a positive; 0 where none has one.

    It is also InfoNCE, where each anchor has one positive: ``y`` the other view, ``labels`` and ``y_labels`` both
    ``torch.arange(N)``. And it is the cross-entropy of a memory of centroids (cluster contrast, SpCL), where ``y`` are
    the K centroids and ``y_labels`` is ``torch.arange(K)``: ``supervised_contrastive_loss(x, labels, *memory.rows())``
    for a `ClusterMemory`.

    Args:
        x: anchors, shape (N, D) or (S, N, D) for S feature sets with the same labels; float16, bfloat16, float32 or
            float64.
        labels, y, y_labels, own, y_valid, domains, y_domains, positives, negatives: as in `batch_hard` (label −1,
            too); a pair that they leave out is in neither sum.
        temperature: τ, above 0.
        metric: ``"cosine"``, of rows that are normalised, or ``"dot"`` of rows as they are.
        precision: of the products, as in `pairwise_distance`; their rounding is divided by τ.
        reduction: as in `circle_loss`.

    Returns:
        The loss, a float32 scalar ((S,) for S sets; float64 for float64 inputs), or the N terms. Gradients, memory and
        NaN are as in `circle_loss`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device, size or choice.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.5, 1.0]])
    >>> supervised_contrastive_loss(x, torch.tensor([7, 7, 8, 8]), temperature=0.5)
    tensor(0.4471)
    >>> centroids = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> supervised_contrastive_loss(x, torch.tensor([0, 0, 1, 1]), centroids, torch.arange(2), temperature=0.5)
    tensor(0.1877)
    """
    _check_above_zero("temperature", temperature)
    check_choice("metric", metric, ("cosine", "dot"))
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        from apd_kernels.reducers import contrastive_terms

        pairing = Pairing(labels, y_labels, own, domains, y_domains, y_valid, positives, negatives)
        return reduced(*contrastive_terms(x, y, pairing, float(temperature), metric, precision), reduction)
    x, rows, prepared, precision, backend = checked_operands(x, y, metric, precision)
    pairing = checked_pairing(x, labels, rows, y_labels, own, domains, y_domains, y_valid, positives, negatives)
    return _loss(x, rows, prepared, pairing, "contrastive", 1 / temperature, 0.0, precision, backend, reduction)


def _check_above_zero(name: str, value: float) -> None:
    check_number(name, value)
    if value < 1e-30:  # its inverse is to be in the range of float32, too
        raise ValueError(f"{name}: expected a finite number above 0, of at least 1e-30, got {value}")


def _loss(
    x: Tensor,
    y: Tensor | None,
    prepared: Operands,
    pairing: Pairing,
    form: str,
    scale: float,
    margin: float,
    precision: str,
    backend: str,
    reduction: str,
) -> Tensor:
    with_gradient = torch.is_grad_enabled()
    needs_x = with_gradient and x.requires_grad
    needs_y = with_gradient and y is not None and y.requires_grad
    choices = form, scale, margin, precision, needs_x, needs_y, backend
    loss, share, *_ = _contrastive_loss(x, y, *prepared, *pairing, *choices)
    if reduction == "mean":
        return loss
    return loss / share if reduction == "sum" else loss / (share * max(1, x.shape[-2]))


def _fake(x: Tensor, y: Tensor | None, needs_x: bool, needs_y: bool, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = internal_dtype(x)
    loss = x.new_empty(x.shape[:-2], dtype=dtype)
    return (
        loss,
        torch.empty_like(loss),
        x.new_empty(x.shape if needs_x else 0, dtype=dtype),
        x.new_empty(0 if y is None or not needs_y else y.shape, dtype=dtype),
    )


def _fake_scaled(for_x: Tensor, for_y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return for_x.new_empty(for_x.shape), for_y.new_empty(for_y.shape)


# Besides the loss: 1 / number of terms, and the gradients of the sum of the terms in float32 (float64), empty where not
# needed. `form` is "circle" (`scale` γ) or "contrastive" (`scale` 1/τ).
_contrastive_loss = operator(reference.contrastive_loss, fake=_fake)
_contrastive_loss_scaled = operator(reference.contrastive_loss_scaled, fake=_fake_scaled)
first_derivatives_only(_contrastive_loss_scaled)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, *_, ctx.backend = inputs
    _, *rest = output
    # The gradients stay part of the graph, so that differentiating them is an error and no silent zero.
    ctx.mark_non_differentiable(rest[0])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*rest)
    ctx.dtypes = x.dtype, x.dtype if y is None else y.dtype
    ctx.inputs = len(inputs)


def _backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if gradient is None:
        return (None,) * ctx.inputs
    sides = _contrastive_loss_scaled(gradient, *ctx.saved_tensors, ctx.backend)
    return gradients(ctx, *(side.to(dtype) for side, dtype in zip(sides, ctx.dtypes, strict=True)))


differentiable(_contrastive_loss, _setup_context, _backward)
