"""Reductions over pairs that users write, compiled into the skeleton of _pairs.py."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels._core.reducer import REDUCERS
from apd_kernels.kernels._launch import dot_precision, sets_of_rows
from apd_kernels.kernels._pairs import Reduction, add_weighted_pairs, reduced
from apd_kernels.kernels.distance import METRIC_NUMBER


@triton.jit
def _as_it_is(state, values):
    return state


@functools.cache
def _reduction(key: str) -> Reduction:
    reducer = REDUCERS[key]
    functions = {name: triton.jit(function) for name, function in reducer.functions.items()}
    functions.setdefault("finish", _as_it_is)
    return Reduction(reducer.name, start=reducer.start, **functions)


def _planes(stacked: Tensor) -> tuple[Tensor, ...]:
    """Each of (K, …, N), contiguous and at a multiple of 16 bytes: else another binary for some sizes."""
    if len(stacked) == 0:
        return ()
    planes = stacked.reshape(len(stacked), -1).float()
    size = planes.shape[1]
    if size % 4:
        planes = torch.nn.functional.pad(planes, (0, 4 - size % 4))
    return tuple(planes.contiguous())


def pair_reduce(
    x: Tensor,
    y: Tensor | None,
    prepared: Operands,
    pairing: Pairing,
    values: Tensor,
    parameters: list[float],
    reducer: str,
    metric: str,
    precision: str,
) -> Tensor:
    """Launch `reduce_rows` and `merge_splits`."""
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    results = REDUCERS[reducer].results(len(values), len(parameters))
    choices = a, b, pairing, METRIC_NUMBER[metric], dot_precision(a, precision), results
    found = reduced(_reduction(reducer), *choices, _planes(values), tuple(parameters))
    return torch.stack(found).view(results, *x.shape[:-1])


def pair_reduce_backward(
    gradients: Tensor,
    results: Tensor,
    x: Tensor,
    y: Tensor | None,
    prepared: Operands,
    pairing: Pairing,
    values: Tensor,
    parameters: list[float],
    reducer: str,
    metric: str,
    precision: str,
    needs_x: bool,
    needs_y: bool,
) -> tuple[Tensor, Tensor]:
    """Blocks of `weigh_tiles`, each with its sums of rows."""
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    for_x = torch.zeros(x.shape if needs_x else 0, dtype=torch.float32, device=x.device)
    for_y = torch.zeros(0 if y is None or not needs_y else y.shape, dtype=torch.float32, device=x.device)
    given = _planes(values), tuple(parameters), _planes(results), _planes(gradients)
    add_weighted_pairs(for_x, for_x if y is None else for_y, _reduction(reducer), a, b, pairing, METRIC_NUMBER[metric],
                       dot_precision(a, precision), precision, given)  # fmt: skip
    return for_x.to(x.dtype), for_y.to(x.dtype if y is None else y.dtype)
