"""The batches of all ranks as one, with gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from apd_kernels._core.checks import FEATURE_DTYPES, check_features, check_integers
from apd_kernels._core.operators import internal_dtype


class GatheredBatch(NamedTuple):
    """The rows of all ranks, the same on every rank."""

    features: Tensor  # (N, D) or (S, N, D), N the sum over the ranks; differentiable
    labels: Tensor  # (N,)
    start: int  # the first row that is this rank's


def gather_features(features: Tensor, labels: Tensor, *, group: dist.ProcessGroup | None = None) -> GatheredBatch:
    """The features and labels of all ranks in the order of the ranks, whose batches may differ in size.

    The gradient is the exact one of the sum over all ranks: what a rank gets for its rows is the sum of what every
    rank's loss says about them. With DistributedDataParallel, which takes the mean of the parameters' gradients over
    the ranks, the parameters therefore follow the mean of the ranks' losses:

    - every rank takes the same loss of the global batch, ``triplet_loss(all.features, all.labels)``: parameters get the
      gradient of one process with the global batch;
    - every rank takes the loss of its own n rows against all N of them: the same, if a mean over its rows is weighted
      by n · ranks / N, or the batches are of one size. (`batch_hard` with `y` excludes nobody, so there an anchor is
      its own positive, at distance 0; that matters where its identity has no other row.)

    Without DistributedDataParallel sum the parameters' gradients over the ranks and divide by their number.

    Both passes are collective: every rank of the group has to call it, and to run its backward pass, or none. The sizes
    are exchanged first, for which the process waits; so it is meant for the outside of `torch.compile` and of CUDA
    graphs. Gradients are summed in float32 (float64 for float64).

    Args:
        features: this rank's, shape (n, D) or (S, n, D), n ≥ 0; float16, bfloat16, float32 or float64. All but n is the
            same on every rank.
        labels: shape (n,), any integer dtype.
        group: of the ranks; all of them when None.

    Returns:
        `GatheredBatch` ``(features, labels, start)``; the arguments themselves and 0 without an initialised process
        group, or with one rank.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device; on every rank, features whose dtype or
            shape differs from the first rank's in more than n.

    >>> import torch
    >>> from apd_kernels import gather_features, triplet_loss
    >>> x, labels = torch.tensor([[0.0], [1.0], [1.5], [9.0]]), torch.tensor([7, 7, 8, 8])
    >>> everybody = gather_features(x, labels)  # one process: nothing to gather
    >>> triplet_loss(everybody.features, everybody.labels), everybody.start
    (tensor(2.0250), 0)
    """
    check_features("features", features)
    check_integers("labels", labels, features.shape[-2], features.device)
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return GatheredBatch(features, labels, 0)
    sizes = _sizes(features, group)
    if sum(sizes) == 0:
        return GatheredBatch(features, labels, 0)
    return GatheredBatch(
        _Gather.apply(features, sizes, group),
        gathered_rows(labels.to(torch.int64), sizes, group).to(labels.dtype),
        sum(sizes[: dist.get_rank(group)]),
    )


def _sizes(features: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    """The rows of each rank; what else there is of the features has to be the same."""
    sets = features.shape[0] if features.dim() == 3 else 0
    kind = (FEATURE_DTYPES.index(features.dtype), sets, features.shape[-1])
    ours = torch.tensor([features.shape[-2], *kind], device=features.device)
    theirs = torch.stack(_all_gather(ours, group)).tolist()
    for rank, (_, *other) in enumerate(theirs):
        if other != theirs[0][1:]:
            expected, got = (_described(*values) for values in (theirs[0][1:], other))
            raise ValueError(f"features: expected {expected} on every rank as on rank 0, got {got} on rank {rank}")
    return [size for size, *_ in theirs]


def _described(dtype: int, sets: int, dimension: int) -> str:
    return f"{FEATURE_DTYPES[dtype]} of shape ({f'{sets}, ' if sets else ''}N, {dimension})"


def _all_gather(x: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """x of every rank; of one shape."""
    everybody = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, x, group=group)
    return everybody


def gathered_rows(rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all ranks, each rank's padded to the largest number on the way: collectives take one shape."""
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    return torch.cat([theirs[:size] for theirs, size in zip(_all_gather(padded, group), sizes, strict=True)])


class _Gather(torch.autograd.Function):
    """y = all ranks' rows; ∂x = the sum over the ranks of their ∂y, this rank's rows of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.sizes, ctx.group, ctx.dtype = sizes, group, x.dtype
        return gathered_rows(x.movedim(-2, 0), sizes, group).movedim(0, -2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rank = dist.get_rank(ctx.group)
        total = gradient.to(internal_dtype(gradient), copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        start = sum(ctx.sizes[:rank])
        return total.narrow(-2, start, ctx.sizes[rank]).to(ctx.dtype), None, None
