"""What torch.library promises for every operator: schema, fakes, autograd and AOT dispatch agree with the body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import features
from torch import Tensor

import apd_kernels  # noqa: F401  (defines the operators)

OPERATORS: dict[str, Callable[[], list[tuple[Any, ...]]]] = {}


def operator(function: Callable[[], list[tuple[Any, ...]]]) -> Callable[[], list[tuple[Any, ...]]]:
    OPERATORS[function.__name__] = function
    return function


def _leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


LABELS = features(6, 4)[1]
INDEX = torch.tensor([1, 0, 3, 2, 5, -1])


@operator
def pairwise_distance() -> list[tuple[Any, ...]]:
    return [
        (_leaf(6, 4), _leaf(5, 4, seed=1), "euclidean", "fp32", "torch"),
        (_leaf(2, 6, 4), None, "cosine", "fp32", "torch"),
    ]


@operator
def pairwise_distance_backward() -> list[tuple[Any, ...]]:
    x, y = _leaf(6, 4).detach(), _leaf(5, 4, seed=1).detach()
    return [
        (torch.ones(6, 5), torch.cdist(x, y), x, y, "euclidean", "fp32", "torch"),
        (torch.ones(6, 6), torch.cdist(x, x), x, None, "dot", "fp32", "torch"),
    ]


@operator
def batch_hard() -> list[tuple[Any, ...]]:
    return [
        (_leaf(6, 4), LABELS, None, None, "euclidean", "fp32", "torch"),
        (_leaf(2, 6, 4), LABELS, _leaf(2, 5, 4), LABELS[:5], "dot", "fp32", "torch"),
    ]


@operator
def pair_gradient() -> list[tuple[Any, ...]]:
    x, w = _leaf(6, 4).detach(), torch.ones(6)
    return [
        (x, None, w, w, INDEX, INDEX.flip(0), "euclidean", True, False, "torch"),
        (x, x + 1, w, w, INDEX, INDEX.flip(0), "dot", True, True, "torch"),
    ]


@operator
def triplet_loss() -> list[tuple[Any, ...]]:
    return [
        (_leaf(6, 4), LABELS, None, None, 0.3, False, "euclidean", "fp32", "torch"),
        (_leaf(2, 6, 4), LABELS, _leaf(2, 5, 4), LABELS[:5], None, True, "sqeuclidean", "fp32", "torch"),
    ]


@operator
def triplet_loss_indexed() -> list[tuple[Any, ...]]:
    return [
        (_leaf(6, 4), None, INDEX, INDEX.flip(0), 0.3, False, "euclidean", "torch"),
        (_leaf(6, 4), _leaf(7, 4), INDEX, INDEX.flip(0), None, True, "dot", "torch"),
    ]


@operator
def metric_perturbation_loss() -> list[tuple[Any, ...]]:
    return [(_leaf(3, 4), _leaf(3, 2, 4, seed=1), _leaf(3, 4, seed=2), "torch")]


@operator
def metric_perturbation_loss_backward() -> list[tuple[Any, ...]]:
    rows = [_leaf(*shape, seed=shape[0]).detach() for shape in ((3, 4), (3, 2, 4), (3, 4))]
    return [
        (torch.tensor(1.0), *rows, torch.ones(3, 2), torch.ones(3), for_negatives, "torch")
        for for_negatives in (True, False)
    ]


@operator
def metric_perturb() -> list[tuple[Any, ...]]:
    return [(_leaf(6, 4), LABELS, 0.1, 0.1, 2, False, "l2", "fp32", "torch")]


def _maps() -> tuple[Tensor, list[Tensor]]:
    return _leaf(3, 2, 2, 2), [_leaf(3, 2, 2, 2, seed=1), _leaf(3, 1, 2, 2, seed=2)]


@operator
def ssd_mask() -> list[tuple[Any, ...]]:
    return [(*_maps(), "torch")]


@operator
def ssd_mask_perturbed() -> list[tuple[Any, ...]]:
    return [(*_maps(), torch.tensor([1, 2, 0]), "torch")]


@operator
def ssd_mask_backward() -> list[tuple[Any, ...]]:
    features, logits = (_leaf(3, 2, 2, 2).detach(), [_leaf(3, 1, 2, 2, seed=1).detach()])
    gradient, permutation = torch.ones(3, 2, 2, 2), torch.tensor([1, 2, 0])
    inverse = permutation.argsort()
    return [
        (features, logits, permutation, inverse, gradient, None, gradient, True, True, "torch"),
        (features, logits, None, None, gradient, gradient, None, True, False, "torch"),
    ]


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    overload = getattr(torch.ops.apd_kernels, name).default
    for arguments in OPERATORS[name]():
        torch.library.opcheck(overload, arguments)


def test_every_operator_is_checked() -> None:
    """An operator defined without a case here fails this test."""
    defined = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("apd_kernels::")
    }
    assert defined == set(OPERATORS)
