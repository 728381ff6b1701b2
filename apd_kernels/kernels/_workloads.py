"""Launches of each operation at the sizes that reach all its routes, on meta tensors: what `warmup` compiles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels.kernels import (
    adversarial,
    contrastive,
    distance,
    losses,
    memory,
    mining,
    paired,
    perturbation_loss,
    prepared,
)
from apd_kernels.kernels import weighting as weighted

BATCH, MIDDLE_BATCH, LARGE_BATCH, MEMORY = 64, 1500, 4096, 65536


class Features:
    """Empty rows of one dimension and dtype, their labels and weights."""

    def __init__(self, dimension: int, dtype: torch.dtype, metric: str, precision: str):
        self.dimension, self.dtype, self.metric, self.precision = dimension, dtype, metric, precision
        # Rows of unit length are float32.
        self.internal = torch.float32 if metric == "cosine" else dtype

    def rows(self, n: int) -> Tensor:
        return torch.empty(n, self.dimension, dtype=self.internal, device="meta")

    def given(self, *shape: int) -> Tensor:
        return torch.empty(*shape, self.dimension, dtype=self.dtype, device="meta")

    def kept(self, n: int) -> Operands:
        return prepared.prepare_rows(self.rows(n), self.metric in ("euclidean", "sqeuclidean"), self.precision)


def values(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def pairwise_distance(of: Features) -> None:
    for n, m in ((BATCH, BATCH), (LARGE_BATCH, 2 * LARGE_BATCH)):
        for y in (None, of.rows(m)):
            x, columns = of.rows(n), n if y is None else m
            distance.pairwise_distance(x, y, Operands(), of.metric, of.precision)
            pairs = values(n, columns)
            distance.pairwise_distance_backward(pairs, pairs, x, y, of.metric, of.precision, True, y is not None)
    distance.pairwise_distance(of.rows(BATCH), of.rows(MEMORY), of.kept(MEMORY), of.metric, of.precision)


def paired_distance(of: Features) -> None:
    x = of.given(BATCH)
    paired.paired_distance(x, x, of.metric)
    paired.paired_distance_backward(values(BATCH), values(BATCH), x, x, of.metric, True, True)


def batch_hard(of: Features) -> None:
    for x, y, kept, pairing in _mined(of):
        mining.batch_hard(x, y, kept, pairing, of.metric, of.precision)
        _pair_gradient(of, x, y, None)


def triplet_loss(of: Features) -> None:
    for x, y, kept, pairing in _mined(of):
        for margin, reverse in ((0.3, False), (None, False), (0.3, True)):
            losses.triplet_loss(x, y, kept, pairing, margin, reverse, of.metric, of.precision)
            winners = integers(len(x)), integers(len(x))
            losses.triplet_loss_indexed(x, y, *winners, margin, reverse, of.metric)
        _pair_gradient(of, x, y, values())


def _mined(of: Features) -> list[tuple[Tensor, Tensor | None, Operands, Pairing]]:
    """Batches against themselves, and anchors against other rows, kept rows and rows of which some are not valid."""
    labels, y_labels = integers(BATCH), integers(MEMORY)
    x, y, valid = of.rows(BATCH), of.rows(MEMORY), torch.empty(MEMORY, dtype=torch.bool, device="meta")
    large = of.rows(4 * BATCH)
    return [
        (x, None, Operands(), Pairing(labels)),
        (of.rows(MIDDLE_BATCH), None, Operands(), Pairing(integers(MIDDLE_BATCH))),
        (of.rows(LARGE_BATCH), None, Operands(), Pairing(integers(LARGE_BATCH))),
        (x, of.rows(4 * BATCH), Operands(), Pairing(labels, integers(4 * BATCH))),
        (x, of.rows(4 * BATCH), Operands(), Pairing(labels, integers(4 * BATCH), own=labels)),
        (large, y, Operands(), Pairing(integers(len(large)), y_labels)),
        (x, y, of.kept(MEMORY), Pairing(labels, y_labels)),
        (x, y, of.kept(MEMORY), Pairing(labels, y_labels, y_valid=valid)),
    ]


def _pair_gradient(of: Features, x: Tensor, y: Tensor | None, scale: Tensor | None) -> None:
    weights, winners = (values(len(x)),) * 2, (integers(len(x)),) * 2
    mining.pair_gradient(x, y, *weights, *winners, scale, of.metric, True, y is not None)


def weighted_pairs(of: Features) -> None:
    labels, saved = integers(BATCH), (values(BATCH),) * 6
    for y, y_labels in ((None, None), (of.rows(MEMORY), integers(MEMORY))):
        x, pairing = of.rows(BATCH), Pairing(labels, y_labels)
        weighted.weighted_pairs(x, y, Operands(), pairing, of.metric, of.precision)
        weighted.weighted_pairs_backward(
            *saved, x, y, Operands(), pairing, of.metric, of.precision, True, y is not None
        )


def _contrastive(of: Features, form: str) -> None:
    labels = integers(BATCH)
    for y, y_labels in ((None, None), (of.rows(MEMORY), integers(MEMORY))):
        x, pairing = of.rows(BATCH), Pairing(labels, y_labels)
        choices = form, 10.0, 0.25, of.precision, True, y is not None
        loss, share, *sides = contrastive.contrastive_loss(x, y, Operands(), pairing, *choices)
        contrastive.contrastive_loss_scaled(loss, share, *sides)


def circle_loss(of: Features) -> None:
    _contrastive(Features(of.dimension, of.dtype, "cosine", of.precision), "circle")


def supervised_contrastive_loss(of: Features) -> None:
    _contrastive(Features(of.dimension, of.dtype, "cosine", of.precision), "contrastive")


def metric_perturb(of: Features) -> None:
    for n in (16, 32, BATCH, 128, 256, 512, 1024, LARGE_BATCH):
        x, labels = of.given(n), integers(n)
        for relative in (False, True):
            adversarial.metric_perturb(x, labels, None, None, None, 0.1, 0.02, 2, relative, "l2", of.precision)
            adversarial.metric_perturb(x, labels, None, None, None, 0.1, 0.02, 2, relative, "linf", of.precision)
    for norm in ("l2", "linf"):
        for relative in (False, True):
            others = of.given(BATCH, 4)
            valid = torch.empty(BATCH, dtype=torch.bool, device="meta")
            adversarial.negative_perturb(of.given(BATCH), others, valid, None, 0.1, 0.02, 2, relative, norm)
    bank, labels = of.given(MEMORY), integers(BATCH)
    for norm in ("l2", "linf"):
        adversarial.metric_perturb(x[:BATCH], labels, None, None, None, 0.1, 0.1, 2, False, norm, of.precision)
        adversarial.metric_perturb(
            x[:BATCH], labels, None, bank, integers(MEMORY), 0.1, 0.1, 2, False, norm, of.precision
        )


def metric_perturbation_loss(of: Features) -> None:
    x = of.given(BATCH)
    for negatives, indices in ((of.given(BATCH, 4), None), (of.given(MEMORY), integers(BATCH, 4))):
        *_, to_negatives, to_original, total = perturbation_loss.metric_perturbation_loss(
            x, negatives, x, indices, True
        )
        perturbation_loss.metric_perturbation_loss_scaled(values(), values(), total)
        perturbation_loss.metric_perturbation_loss_backward(
            values(), values(), x, negatives, x, indices, to_negatives, to_original, indices is None
        )


def memories(of: Features) -> None:
    x, labels, valid = of.given(BATCH), integers(BATCH), torch.empty(1000, dtype=torch.bool, device="meta")
    memory.enqueue(of.given(MEMORY), integers(MEMORY), integers(), x, labels, 0)
    memory.momentum_update(of.given(1000), valid, x, labels, 0.2)


WORKLOADS: dict[str, Callable[[Features], None]] = {
    function.__name__: function
    for function in (
        pairwise_distance,
        paired_distance,
        batch_hard,
        triplet_loss,
        weighted_pairs,
        circle_loss,
        supervised_contrastive_loss,
        metric_perturb,
        metric_perturbation_loss,
        memories,
    )
}
