"""Which implementation runs: Triton kernels or the PyTorch path.

Automatic: Triton for CUDA tensors (not float64) where version 3.6 or newer is installed, PyTorch otherwise. A backend
named with `use_backend` or the environment variable ``APD_KERNELS_BACKEND`` is used or raises; it never falls back.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("triton", "torch")
ENVIRONMENT_VARIABLE = "APD_KERNELS_BACKEND"

# Of those before, 3.5 refuses a kernel of ssd_mask, 3.4 ends in a recursion, and 3.3 has no host descriptors of tiles.
OLDEST_TRITON = (3, 6)


def _triton_version() -> tuple[int, ...] | None:
    """(3, 6) of 3.6.0; None where it is not installed. Not by importing it, which takes longer than this package."""
    if importlib.util.find_spec("triton") is None:
        return None
    for distribution in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return tuple(map(int, re.findall(r"\d+", importlib.metadata.version(distribution))[:2]))
    return OLDEST_TRITON  # built by hand: it says at its first kernel what it lacks


TRITON_VERSION = _triton_version()
HAS_TRITON = TRITON_VERSION is not None and TRITON_VERSION >= OLDEST_TRITON
# Triton reads this when it is imported; under its interpreter the kernels also run on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected 'triton' or 'torch', got {name!r}")
    return name


_DEFAULT = os.environ.get(ENVIRONMENT_VARIABLE) or None
if _DEFAULT is not None:
    _checked(_DEFAULT, ENVIRONMENT_VARIABLE)
# Not a ContextVar, which torch.compile cannot read up to PyTorch 2.11.
_named = threading.local()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation of this thread inside the block on one named backend.

    Tasks of asyncio share their thread's.

    Args:
        name: ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: another name. Inside the block, operations raise ``RuntimeError`` or ``TypeError`` where the named
            backend cannot serve the input; they never fall back.

    >>> import torch
    >>> from apd_kernels import pairwise_distance, use_backend
    >>> with use_backend("torch"):
    ...     pairwise_distance(torch.eye(2), metric="sqeuclidean")
    tensor([[0., 2.],
            [2., 0.]])
    """
    outside = named_backend()
    _named.backend = _checked(name, "name")
    try:
        yield
    finally:
        _named.backend = outside


def named_backend() -> str | None:
    """The backend named by `use_backend` or the environment, None when the choice is automatic."""
    return getattr(_named, "backend", _DEFAULT)


def missing_triton() -> str:
    """Why there are no kernels where HAS_TRITON is false."""
    if TRITON_VERSION is None:
        return "triton is not installed; install it"
    needed, found = (".".join(map(str, version)) for version in (OLDEST_TRITON, TRITON_VERSION))
    return f"expected triton {needed} or newer, got {found}"


def resolve_backend(x: Tensor) -> str:
    """The backend that serves inputs like `x`; raises when a named one cannot."""
    name = named_backend()
    if name is None:
        return "triton" if x.is_cuda and HAS_TRITON and x.dtype != torch.float64 else "torch"
    if name == "triton":
        if not HAS_TRITON:
            raise RuntimeError(f"backend 'triton': {missing_triton()}; use the 'torch' backend")
        if not x.is_cuda and not INTERPRETED:
            raise RuntimeError(
                f"backend 'triton': expected CUDA tensors, got {x.device.type}; "
                "use the 'torch' backend, or set TRITON_INTERPRET=1 before start to run the kernels in the interpreter"
            )
        if x.dtype == torch.float64:
            raise TypeError("backend 'triton': float64 is served by the 'torch' backend only, got torch.float64")
    return name


def implementation(backend: str, module: str) -> ModuleType:
    """``apd_kernels.kernels.<module>`` or ``apd_kernels.reference.<module>``, imported on first use."""
    package = "kernels" if backend == "triton" else "reference"
    return importlib.import_module(f"apd_kernels.{package}.{module}")
