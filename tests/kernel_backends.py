"""The kernels alone, for tests of what only kernels have: in the interpreter, and with `-m gpu` on a CUDA device."""

from __future__ import annotations

import pytest
from conftest import Backend

from apd_kernels._core.backend import HAS_TRITON

_without_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

on_kernels = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(Backend("triton", "cpu"), id="interpreter", marks=_without_triton),
        pytest.param(Backend("triton", "cuda"), id="triton-cuda", marks=[pytest.mark.gpu, _without_triton]),
    ],
    indirect=True,
)
