"""The launches whose machine code is checked: each operation at the sizes that it is used at, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from apd_kernels.kernels import distance, losses, mining, perturb

CASES: list[Callable[[], None]] = []

MATRIX_KERNELS = {"_distance", "_gradient", "_mine"}
"""Kernels built on a matrix product: they must use the tensor cores."""


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES.append(function)
    return function


def _rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _indices(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.int64, device="meta")


@case
def distance_fp32() -> None:
    distance.pairwise_distance(_rows(4096, 2048), _rows(8192, 2048), "euclidean", "fp32")
    distance.pairwise_distance(_rows(4096, 2048), None, "cosine", "fp32")


@case
def distance_tf32() -> None:
    distance.pairwise_distance(_rows(4096, 2048), None, "euclidean", "tf32")


@case
def distance_half() -> None:
    distance.pairwise_distance(_rows(4096, 2048, dtype=torch.float16), None, "euclidean", "fp32")


@case
def distance_bf16_of_fp32() -> None:
    distance.pairwise_distance(_rows(4096, 2048), None, "euclidean", "bf16")


@case
def distance_gradient() -> None:
    x, y, g = _rows(4096, 2048), _rows(8192, 2048), _rows(4096, 8192)
    distance.pairwise_distance_backward(g, g, x, y, "euclidean", "fp32")
    distance.pairwise_distance_backward(_rows(4096, 4096), _rows(4096, 4096), x, None, "dot", "fp32")


@case
def triplet_batch() -> None:
    losses.triplet_loss(_rows(64, 2048), _indices(64), None, None, 0.3, False, "euclidean", "fp32")


@case
def triplet_sets_half() -> None:
    x = _rows(5, 64, 768, dtype=torch.bfloat16)
    losses.triplet_loss(x, _indices(64), None, None, None, True, "sqeuclidean", "fp32")


@case
def mining_in_memory() -> None:
    x, y = _rows(256, 2048), _rows(65536, 2048)
    mining.batch_hard(x, _indices(256), y, _indices(65536), "cosine", "tf32")


@case
def pair_gradient() -> None:
    x, y, w, i = _rows(256, 2048), _rows(4096, 2048), _rows(256), _indices(256)
    mining.pair_gradient(x, None, w, w, i, i, "euclidean", True, False)
    mining.pair_gradient(x, y, w, w, i, i, "dot", True, True)


@case
def perturbation_loss() -> None:
    x, negatives, one = _rows(64, 2048), _rows(64, 4, 2048), _rows(1)
    losses.metric_perturbation_loss(x, negatives, x)
    losses.metric_perturbation_loss_backward(one, x, negatives, x, _rows(64, 4), _rows(64), True)


@case
def metric_perturb() -> None:
    perturb.metric_perturb(_rows(64, 2048), _indices(64), 0.1, 0.025, 2, True, "l2", "fp32")
    perturb.metric_perturb(_rows(4096, 512), _indices(4096), 0.1, 0.1, 1, False, "linf", "fp32")
