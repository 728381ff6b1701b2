"""How launchers start kernels, and what they know of the device.

Launchers call `launch` instead of ``kernel[grid](...)``. Inside `recording` nothing runs: the launches are collected,
so that tests can compile, for a GPU that is not there, exactly the specialisations that a launcher asks for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apd_kernels._core.backend import INTERPRETED

# Capabilities from 100 on whose tensor cores are those of sm_80, not tcgen05.
ADD_IN_REGISTERS = (120, 121)


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its grid, its positional arguments, and constexprs and options by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's; of a walk over pairs (see _pairs.py) that of its reduction."""
        reduction, name = self.options.get("REDUCTION"), str(self.kernel.__name__)
        return name if reduction is None else str(reduction.name_of(name))


@dataclass
class _Recording:
    architecture: int
    launches: list[Launch] | None  # None: they are compiled


_recording: ContextVar[_Recording | None] = ContextVar("apd_kernels_recording", default=None)


@contextmanager
def recording(architecture: int) -> Iterator[list[Launch]]:
    """Collect launches as for compute capability `architecture` (80, 90, 100 and so on) instead of running them."""
    launches: list[Launch] = []
    token = _recording.set(_Recording(architecture, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


@contextmanager
def compiling(device: int) -> Iterator[None]:
    """Compile launches for the current CUDA device `device` instead of running them; tensors may be on meta."""
    token = _recording.set(_Recording(0 if torch.version.hip else _capability(device), None))
    try:
        yield
    finally:
        _recording.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)``, or record it. A grid with an empty axis launches nothing."""
    if 0 in grid:
        return
    record = _recording.get()
    if record is None:
        kernel[grid](*arguments, **options)
    elif record.launches is None:
        kernel.warmup(*arguments, grid=grid, **options)
    else:
        record.launches.append(Launch(kernel, grid, arguments, options))


def architecture(x: Tensor) -> int:
    """Compute capability of x's device as major·10 + minor; 0 for AMD GPUs and in the interpreter."""
    record = _recording.get()
    if record is not None:
        return record.architecture
    return 0 if INTERPRETED or torch.version.hip else _capability(x.get_device())


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def dot_precision(x: Tensor, precision: str) -> str:
    """How kernels multiply rows like `x`: as ``tl.dot`` has it, ``"ieee"``, ``"tf32x3"`` or ``"tf32"``; ``"bf16"``; or
    ``"tf32x3 apart"``, as in `_tiles.product`.

    float32 grade is three TF32 products. Triton's own add into one accumulator, which is right where tensor cores add
    in registers (sm_80 to sm_90, and sm_120) and wrong on tcgen05 (sm_100 and what follows it, triton#10821): there
    each has an accumulator of its own. AMD and GPUs without TF32 take the exact form. Half inputs multiply exactly as
    they are.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        return "ieee"
    if precision == "fp32":
        capability = architecture(x)
        if capability < 80:
            return "ieee"
        return "tf32x3" if capability < 100 or capability in ADD_IN_REGISTERS else "tf32x3 apart"
    return precision


def sets_of_rows(x: Tensor) -> Tensor:
    """(N, D) or (S, N, D) as (S, N, D) whose rows are contiguous and one row stride apart over all sets."""
    x = x if x.dim() == 3 else x[None]
    sets, rows, dimension = x.shape
    stride = row_stride(x)
    if (dimension > 1 and x.stride(2) != 1) or stride < dimension or (sets > 1 and x.stride(0) != rows * stride):
        # Not contiguous(): it looks at no stride of a dimension of size 1, and would return the same tensor.
        return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    return x


def row_stride(x: Tensor) -> int:
    """Elements between rows of (S, N, D): over the sets where each has one row, D where there is only one row."""
    sets, rows, dimension = x.shape
    if rows > 1:
        return x.stride(1)
    return x.stride(0) if sets > 1 else dimension
