"""What a bug report must say about the machine."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys

import torch

from apd.openmp import WAITING
from apd_kernels._core.backend import HAS_TRITON, INTERPRETED, missing_triton, named_backend

_PACKAGES = ("torch", "triton", "numpy", "faiss", "timm", "torchvision", "accelerate")
_VARIABLES = (
    "APD_KERNELS_BACKEND",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    *WAITING,
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "NVIDIA_TF32_OVERRIDE",
)


def describe_environment() -> list[tuple[str, str]]:
    """(what, value) lines."""
    lines = [("apd-kernels", _distribution("apd-kernels")), ("python", platform.python_version())]
    lines.append(("platform", f"{platform.platform()}, {os.cpu_count()} CPUs"))
    lines += [(name, _package(name)) for name in _PACKAGES]
    lines.append(("cuda of torch", torch.version.cuda or "none"))
    lines += _devices()
    lines.append(("faiss gpus", _faiss_gpus()))
    lines.append(("backend", _backend()))
    lines.append(("threads", str(torch.get_num_threads())))
    variables = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    lines.append(("variables", " ".join(variables) or "none set"))
    return lines


def _distribution(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _package(name: str) -> str:
    """The version of an importable package; its distribution may have another name, as FAISS's has."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return "not installed"
    except Exception as error:  # a broken installation is what the reader of the report must see
        return f"cannot be imported: {type(error).__name__}: {error}"
    version = str(getattr(module, "__version__", None) or _distribution(name))
    if name == "faiss":
        options = getattr(module, "get_compile_options", lambda: "")().split()
        return f"{version} ({'with' if 'GPU' in options else 'without'} GPU code)"
    return version


def _devices() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("gpus", "none that torch can use")]
    lines = []
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        memory = device.total_memory / 2**30
        lines.append((f"gpu {i}", f"{device.name}, compute capability {device.major}.{device.minor}, {memory:.0f} GiB"))
    return lines


def _faiss_gpus() -> str:
    try:
        return str(importlib.import_module("faiss").get_num_gpus())
    except Exception:  # reported on the line of the package
        return "unknown"


def _backend() -> str:
    named = named_backend()
    if named is not None:
        return f"{named} (named by APD_KERNELS_BACKEND)"
    cuda = "triton" if HAS_TRITON else f"torch ({missing_triton()})"
    interpreter = ", Triton's interpreter is on" if INTERPRETED and "triton" in sys.modules else ""
    return f"automatic: {cuda} for CUDA tensors, torch for others{interpreter}"
