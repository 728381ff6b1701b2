"""What torch.library promises for every operator: schema, fakes, autograd and AOT dispatch agree with the body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import example_losses
import pytest
import torch
from oracle import features
from torch import Tensor

from apd_kernels import prepare_rows
from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing

pytestmark = pytest.mark.oldest

OPERATORS: dict[str, Callable[[], list[tuple[Any, ...]]]] = {}


def operator(function: Callable[[], list[tuple[Any, ...]]]) -> Callable[[], list[tuple[Any, ...]]]:
    OPERATORS[function.__name__] = function
    return function


def _leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


LABELS = features(6, 4)[1]
INDEX = torch.tensor([1, 0, 3, 2, 5, -1])
RULED = Pairing(
    LABELS, LABELS[:5], torch.arange(6) - 1, LABELS % 2, LABELS[:5] % 2, LABELS[:5] >= 0, "within", "across"
)


def _prepared(y: Tensor, metric: str = "euclidean") -> Operands:
    return prepare_rows(y.detach() + 3, metric=metric).operands


@operator
def pairwise_distance() -> list[tuple[Any, ...]]:
    return [
        (_leaf(6, 4), _leaf(5, 4, seed=1), *Operands(), "euclidean", "fp32", "torch"),
        (_leaf(6, 4), _leaf(5, 4).detach(), *_prepared(_leaf(5, 4)), "sqeuclidean", "fp32", "torch"),
        (_leaf(2, 6, 4), None, *Operands(), "cosine", "fp32", "torch"),
    ]


@operator
def pairwise_distance_backward() -> list[tuple[Any, ...]]:
    x, y = _leaf(6, 4).detach(), _leaf(5, 4, seed=1).detach()
    return [
        (torch.ones(6, 5), torch.cdist(x, y), x, y, "euclidean", "fp32", True, True, "torch"),
        (torch.ones(6, 6), torch.cdist(x, x), x, None, "dot", "fp32", True, False, "torch"),
    ]


@operator
def paired_distance() -> list[tuple[Any, ...]]:
    return [(_leaf(6, 4), _leaf(6, 4, seed=1), "euclidean", "torch"), (_leaf(2, 6, 4), _leaf(2, 6, 4), "dot", "torch")]


@operator
def paired_distance_backward() -> list[tuple[Any, ...]]:
    x, y, one = _leaf(6, 4).detach(), _leaf(6, 4, seed=1).detach(), torch.ones(6)
    return [(one, one, x, y, "cosine", True, True, "torch"), (one, one, x, y, "dot", False, True, "torch")]


@operator
def batch_hard() -> list[tuple[Any, ...]]:
    return [
        (_leaf(6, 4), None, *Operands(), *Pairing(LABELS), "euclidean", "fp32", "torch"),
        (_leaf(2, 6, 4), _leaf(2, 5, 4), *Operands(), *Pairing(LABELS, LABELS[:5]), "dot", "fp32", "torch"),
        (_leaf(6, 4), _leaf(5, 4).detach(), *_prepared(_leaf(5, 4)), *RULED, "euclidean", "fp32", "torch"),
    ]


@operator
def pair_gradient() -> list[tuple[Any, ...]]:
    x, w = _leaf(6, 4).detach(), torch.ones(6)
    return [
        (x, None, w, w, INDEX, INDEX.flip(0), None, "euclidean", True, False, "torch"),
        (x, x + 1, w, w, INDEX, INDEX.flip(0), torch.tensor(0.5), "dot", True, True, "torch"),
    ]


@operator
def triplet_loss() -> list[tuple[Any, ...]]:
    return [
        (_leaf(6, 4), None, *Operands(), *Pairing(LABELS), 0.3, False, "euclidean", "fp32", "torch"),
        (
            _leaf(2, 6, 4),
            _leaf(2, 5, 4),
            *Operands(),
            *Pairing(LABELS, LABELS[:5]),
            None,
            True,
            "sqeuclidean",
            "fp32",
            "torch",
        ),
        (_leaf(6, 4), _leaf(5, 4).detach(), *_prepared(_leaf(5, 4)), *RULED, 0.3, True, "euclidean", "fp32", "torch"),
    ]


@operator
def triplet_loss_indexed() -> list[tuple[Any, ...]]:
    return [
        (_leaf(6, 4), None, INDEX, INDEX.flip(0), 0.3, False, "euclidean", "torch"),
        (_leaf(6, 4), _leaf(7, 4), INDEX, INDEX.flip(0), None, True, "dot", "torch"),
    ]


@operator
def contrastive_loss() -> list[tuple[Any, ...]]:
    x, y, bank = _leaf(6, 4), _leaf(5, 4, seed=1), _leaf(5, 4).detach()
    return [
        (x, None, *Operands(), *Pairing(LABELS), "circle", 16.0, 0.25, "fp32", True, False, "torch"),
        (x, y, *Operands(), *RULED, "contrastive", 10.0, 0.0, "fp32", True, True, "torch"),
        (_leaf(2, 6, 4), None, *Operands(), *Pairing(LABELS), "contrastive", 2.0, 0.0, "fp32", True, False, "torch"),
        (x, bank, *_prepared(bank, "dot"), *RULED, "circle", 16.0, 0.25, "fp32", True, False, "torch"),
        (x.detach(), bank, *Operands(), *RULED, "circle", 16.0, 0.25, "fp32", False, False, "torch"),
    ]


@operator
def contrastive_loss_scaled() -> list[tuple[Any, ...]]:
    x, y = _leaf(2, 6, 4).detach(), _leaf(2, 5, 4).detach()
    one, sets = torch.tensor(1.0), torch.tensor([1.0, 2.0])
    return [(sets, sets, x, y, "torch"), (one, one, x[0], torch.zeros(0), "torch")]


@operator
def pair_reduce() -> list[tuple[Any, ...]]:
    values, lifted = torch.empty(0, 6), example_losses.load().LIFTED.key
    return [
        (_leaf(6, 4), None, *Operands(), *Pairing(LABELS), values, [1.0], lifted, "euclidean", "fp32", "torch"),
        (_leaf(6, 4), _leaf(5, 4, seed=1), *Operands(), *RULED, values, [0.5], lifted, "dot", "fp32", "torch"),
    ]


@operator
def pair_reduce_backward() -> list[tuple[Any, ...]]:
    results, lifted = torch.ones(2, 6), example_losses.load().LIFTED.key
    choices = torch.empty(0, 6), [1.0], lifted, "euclidean", "fp32"
    x, y = _leaf(6, 4).detach(), _leaf(5, 4, seed=1).detach()
    return [
        (results, results, x, None, *Operands(), *Pairing(LABELS), *choices, True, False, "torch"),
        (results, results, x, y, *Operands(), *RULED, *choices, True, True, "torch"),
    ]


@operator
def weighted_pairs() -> list[tuple[Any, ...]]:
    return [
        (_leaf(6, 4), None, *Operands(), *Pairing(LABELS), "euclidean", "fp32", "torch"),
        (_leaf(2, 6, 4), _leaf(2, 5, 4), *Operands(), *RULED, "dot", "fp32", "torch"),
        (_leaf(6, 4), _leaf(5, 4).detach(), *_prepared(_leaf(5, 4)), *RULED, "sqeuclidean", "fp32", "torch"),
    ]


@operator
def weighted_pairs_backward() -> list[tuple[Any, ...]]:
    x, y, one = _leaf(6, 4).detach(), _leaf(5, 4, seed=1).detach(), torch.ones(6)
    return [
        (*(one,) * 6, x, None, *Operands(), *Pairing(LABELS), "euclidean", "fp32", True, False, "torch"),
        (*(one,) * 6, x, y, *_prepared(y), *RULED, "euclidean", "fp32", True, True, "torch"),
        (*(one,) * 6, x, y, *Operands(), *RULED, "dot", "fp32", False, True, "torch"),
    ]


@operator
def metric_perturbation_loss() -> list[tuple[Any, ...]]:
    rows = [_leaf(3, 4), _leaf(3, 2, 4, seed=1), _leaf(3, 4, seed=2)]
    bank, indices = _leaf(5, 4).detach(), torch.tensor([[0], [4], [-1]])
    return [
        (*rows, None, False, "torch"),
        (rows[0], rows[1].detach(), rows[2].detach(), None, True, "torch"),
        (rows[0], bank, rows[2], indices, False, "torch"),
        (rows[0], bank, rows[2].detach(), indices, True, "torch"),
    ]


@operator
def metric_perturbation_loss_backward() -> list[tuple[Any, ...]]:
    rows = [_leaf(*shape, seed=shape[0]).detach() for shape in ((3, 4), (3, 2, 4), (3, 4))]
    one, distances = torch.tensor(1.0), (torch.ones(3, 2), torch.ones(3))
    return [
        *((one, one, *rows, None, *distances, for_negatives, "torch") for for_negatives in (True, False)),
        (one, one, rows[0], rows[0], rows[2], torch.tensor([[0, 2], [-1, 1], [0, 0]]), *distances, False, "torch"),
    ]


@operator
def metric_perturbation_loss_scaled() -> list[tuple[Any, ...]]:
    return [(torch.tensor(1.0), torch.tensor(0.5), _leaf(3, 4).detach(), "torch")]


@operator
def metric_perturb() -> list[tuple[Any, ...]]:
    x, ball = _leaf(6, 4), (0.1, 0.1, 2, False, "l2", "fp32", "torch")
    return [
        (x, LABELS, None, None, None, *ball),
        (_leaf(6, 40), LABELS, None, None, None, *ball),
        (x, LABELS, x.detach() + 0.01, _leaf(5, 4, seed=1).detach(), LABELS[:5], *ball),
    ]


@operator
def negative_perturb() -> list[tuple[Any, ...]]:
    negatives, valid = _leaf(6, 2, 4, seed=1).detach(), torch.ones(6, dtype=torch.bool)
    return [(_leaf(6, 4), negatives, valid, None, 0.1, 0.1, 2, True, "linf", "torch")]


def _maps() -> tuple[Tensor, list[Tensor]]:
    return _leaf(3, 2, 2, 2), [_leaf(3, 2, 2, 2, seed=1), _leaf(3, 1, 2, 2, seed=2)]


@operator
def ssd_mask() -> list[tuple[Any, ...]]:
    return [(*_maps(), "torch")]


@operator
def ssd_mask_perturbed() -> list[tuple[Any, ...]]:
    return [(*_maps(), torch.tensor([1, 2, 0]), "torch")]


@operator
def ssd_mask_stacked() -> list[tuple[Any, ...]]:
    return [(*_maps(), torch.tensor([1, 2, 0]), "torch"), (*_maps(), None, "torch")]


@operator
def ssd_mask_backward() -> list[tuple[Any, ...]]:
    features, logits = (_leaf(3, 2, 2, 2).detach(), [_leaf(3, 1, 2, 2, seed=1).detach()])
    gradient, permutation = torch.ones(3, 2, 2, 2), torch.tensor([1, 2, 0])
    inverse = permutation.argsort()
    return [
        (features, logits, permutation, inverse, gradient, None, gradient, True, True, "torch"),
        (features, logits, None, None, gradient, gradient, None, True, False, "torch"),
    ]


@operator
def enqueue() -> list[tuple[Any, ...]]:
    rows, labels, x = torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64), _leaf(3, 4).detach()
    return [
        (rows.clone(), labels.clone(), torch.tensor(count), x, LABELS[:3], skipped, "torch")
        for count, skipped in ((0, 0), (4, 2))
    ]


@operator
def momentum_update() -> list[tuple[Any, ...]]:
    return [(torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool), _leaf(6, 4).detach(), LABELS, 0.2, "torch")]


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    overload = getattr(torch.ops.apd_kernels, name).default
    for arguments in OPERATORS[name]():
        torch.library.opcheck(overload, arguments)
        torch.library.opcheck(overload, tuple(map(_transposed, arguments)))


def _transposed(value: Any) -> Any:
    """The same values in transposed memory: results must have the strides that the fakes promise all the same."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() not in (2, 3):
        return value
    return value.detach().mT.contiguous().mT.requires_grad_(value.requires_grad)


def test_every_operator_is_checked() -> None:
    """An operator defined without a case here fails this test."""
    defined = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("apd_kernels::")
    }
    assert defined == set(OPERATORS)
