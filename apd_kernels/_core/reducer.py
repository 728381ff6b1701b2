"""Reductions over pairs that users write: once, in Triton's language, for the kernels and for PyTorch."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apd_kernels._core.backend import HAS_TRITON


def _tensors(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    like = a if isinstance(a, Tensor) else b
    a, b = (v if isinstance(v, Tensor) else torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in (a, b))
    return a, b


def _over_pairs(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int], Tensor]:
    def reduced(values: Tensor, axis: int) -> Tensor:
        if axis != 1:
            raise ValueError(f"axis: expected 1, the pairs of an anchor, got {axis}")
        return reduce(values)

    return reduced


def _without_nan(values: Tensor, other: float) -> Tensor:
    return torch.where(values != values, other, values)  # as Triton's


LANGUAGE = types.SimpleNamespace(
    abs=torch.abs,
    exp=torch.exp,
    log=torch.log,
    sqrt=torch.sqrt,
    sigmoid=torch.sigmoid,
    where=torch.where,
    maximum=lambda a, b: torch.fmax(*_tensors(a, b)),
    minimum=lambda a, b: torch.fmin(*_tensors(a, b)),
    sum=_over_pairs(lambda values: values.sum(-1)),
    max=_over_pairs(lambda values: _without_nan(values, -float("inf")).amax(-1)),
    min=_over_pairs(lambda values: _without_nan(values, float("inf")).amin(-1)),
    float32=torch.float32,
)
"""What functions of a `PairReducer` may use of ``triton.language``, in PyTorch."""


def language() -> Any:
    """``triton.language``, or the part of it that there is in PyTorch where Triton is not installed."""
    return importlib.import_module("triton.language") if HAS_TRITON else LANGUAGE


def device_function(function: Any) -> Any:
    """``triton.jit``, for what functions of a reducer call; the function itself where Triton is not installed."""
    return importlib.import_module("triton").jit(function) if HAS_TRITON else function


class PairReducer:
    """A reduction of every anchor's pairs to a few numbers, for `pair_reduce`: see docs/pair-reduce.md.

    Functions are written once, with ``tl`` from ``apd_kernels.pairs``: Triton compiles them into the kernels, and the
    PyTorch path calls them with tensors, `tl` being the part of it that PyTorch has (abs, exp, log, sqrt, sigmoid,
    where, maximum, minimum; sum, max, min over axis 1). They return tuples, and use nothing from around them but `tl`
    and functions under ``apd_kernels.pairs.jit``: numbers come as parameters.

    Args:
        start: the state of an anchor that has met no pair, as numbers; combined with it a state stays what it is.
        tile: ``(d, positive, negative, values) -> state``: what a tile of distances comes to, for each of its rows.
            `positive` and `negative` are its masks, of pairs that are neither nothing may be taken. `values` are those
            of the anchors, which broadcast against `d`, followed by the parameters.
        combine: ``(state, later) -> state``: of two parts of the columns, element by element.
        finish: ``(state, values) -> results``; the state itself where it is None.
        weights: ``(d, positive, negative, values, results, gradients) -> ∂L/∂d``, with the results of each anchor and
            the gradients ∂L/∂result, which broadcast against `d`; None: the results have no gradient.
        name: of the compiled kernels.

    Raises:
        TypeError: a function that is none, or that has captured variables. ValueError: no `start`.

    >>> from apd_kernels import PairReducer
    >>> from apd_kernels.pairs import tl
    >>> def tile(d, positive, negative, values):
    ...     return (tl.max(tl.where(positive, d, -1.0), 1),)
    >>> def combine(state, later):
    ...     return (tl.maximum(state[0], later[0]),)
    >>> PairReducer(start=(-1.0,), tile=tile, combine=combine, name="farthest_positive")
    PairReducer(farthest_positive)
    """

    def __init__(
        self,
        *,
        start: tuple[float, ...],
        tile: Callable[..., Any],
        combine: Callable[..., Any],
        finish: Callable[..., Any] | None = None,
        weights: Callable[..., Any] | None = None,
        name: str = "pair_reducer",
    ):
        if not start:
            raise ValueError(f"start: expected at least one number, got {start!r}")
        self.start = tuple(map(float, start))
        self.name = name
        given = {"tile": tile, "combine": combine, "finish": finish, "weights": weights}
        self.functions = {key: _plain(key, function) for key, function in given.items() if function is not None}
        self.key = f"{name}#{next(_count)}"
        REDUCERS[self.key] = self

    def __repr__(self) -> str:
        return f"PairReducer({self.name})"

    @functools.cached_property
    def in_torch(self) -> dict[str, Callable[..., Any]]:
        """The functions with PyTorch's `LANGUAGE`."""
        return {key: _rebound(function) for key, function in self.functions.items()}

    def started(self, like: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.full_like(like, number) for number in self.start)

    def finished(self, state: tuple[Tensor, ...], values: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The results in PyTorch, of states (…, 1)."""
        finish = self.in_torch.get("finish")
        return tuple(state if finish is None else finish(state, values))

    @functools.lru_cache(8)  # noqa: B019 - reducers live as long as their modules
    def results(self, values: int, parameters: int) -> int:
        """How many there are."""
        one = torch.zeros(1)
        return len(self.finished(self.started(one), (one,) * values + (0.5,) * parameters))


REDUCERS: dict[str, PairReducer] = {}
"""By key: an operator takes no Python object."""
_count = itertools.count()


def _plain(name: str, function: Any) -> types.FunctionType:
    """The Python function, also of one under ``@triton.jit``."""
    function = getattr(function, "fn", function)
    if not inspect.isfunction(function):
        raise TypeError(f"{name}: expected a function, got {type(function).__name__}")
    if function.__closure__:
        captured = ", ".join(function.__code__.co_freevars)
        raise TypeError(f"{name}: expected a function without captured variables, got {captured}; pass parameters")
    return function


def _rebound(function: types.FunctionType) -> Callable[..., Any]:
    names = dict(function.__globals__)
    for name in function.__code__.co_names:
        value = names.get(name)
        if isinstance(value, types.ModuleType) and value.__name__ == "triton.language":
            names[name] = LANGUAGE
        elif inspect.isfunction(inner := getattr(value, "fn", value)):
            names[name] = _rebound(inner)
    return types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
