"""The launches whose machine code is checked: each operation at the sizes that it is used at, on meta tensors."""

from __future__ import annotations

import torch

from apd_kernels.kernels import distance


def _rows(n: int, d: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(n, d, dtype=dtype, device="meta")


def distance_fp32() -> None:
    distance.pairwise_distance(_rows(4096, 2048), _rows(8192, 2048), "euclidean", "fp32")
    distance.pairwise_distance(_rows(4096, 2048), None, "cosine", "fp32")


def distance_tf32() -> None:
    distance.pairwise_distance(_rows(4096, 2048), None, "euclidean", "tf32")


def distance_half() -> None:
    distance.pairwise_distance(_rows(4096, 2048, torch.float16), None, "euclidean", "fp32")


def distance_gradient() -> None:
    x, y, g = _rows(4096, 2048), _rows(8192, 2048), _rows(4096, 8192)
    distance.pairwise_distance_backward(g, g, x, y, "euclidean", "fp32")
    distance.pairwise_distance_backward(_rows(4096, 4096), _rows(4096, 4096), x, None, "dot", "fp32")


MATRIX_CASES = (distance_fp32, distance_tf32, distance_half, distance_gradient)
"""Launches that must use the tensor cores."""

VECTOR_CASES = ()
"""Launches without a matrix product."""
