"""What the tests rely on in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import interpreter
import triton
import triton.language as tl

from apd_kernels._core.backend import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="the interpreter is used where there is no CUDA device"),
    pytest.mark.oldest,
]


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=str)
@pytest.mark.parametrize("shape", [(16, 16, 16), (64, 32, 32), (64, 64, 64), (128, 128, 32)], ids=str)
def test_equal_columns_have_equal_products(shape: tuple[int, int, int], dtype: type, order: str) -> None:
    m, n, k = shape
    draw = np.random.default_rng(m)
    a, row, column = (draw.standard_normal(size).astype(dtype) for size in ((m, k), (1, k), (k, 1)))
    b = np.ascontiguousarray(np.repeat(row, n, 0)).T if order == "rows" else np.repeat(column, n, 1)
    product = interpreter.dot(a, b, np.float32)
    assert (product == product[:, :1]).all()
    np.testing.assert_allclose(product, a.astype(np.float64) @ b.astype(np.float64), rtol=0, atol=1e-5 * k)
    a[:] = a[:1]
    assert (interpreter.dot(a, b, np.float32) == product[:1]).all()


def test_float32_is_rounded_to_bfloat16() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 10_000, dtype=np.uint32)
    ties = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00001, 0, 0x80000000], np.uint32)
    values = np.concatenate([bits, ties]).view(np.float32)
    ours = torch.from_numpy(interpreter.rounded_to_bfloat16(values).view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(ours, torch.from_numpy(values).bfloat16(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _sum(out, a, b):
    tl.store(out, a + b)


def test_an_integer_that_overflows_is_an_error() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    _sum[(1,)](out, 2**30, 2**30 - 1)
    assert out.item() == 2**31 - 1
    with pytest.raises(Exception, match="int32: add overflows"):
        _sum[(1,)](out, 2**30, 2**30)
