"""Stage "first": what this machine is, what its card reaches, and whether the operations compile into one graph."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

import apd_kernels as ak
from benchmarks.cases import fp32_precision, relative
from benchmarks.gpu.sanitizer import find_tool
from benchmarks.timing import events, l2_bytes
from benchmarks.units import Context, Unit
from benchmarks.workload import DEVICE, ON_GPU

Operation = Callable[[Tensor, Tensor], Tensor]


def units(context: Context) -> list[Unit]:
    found = [Unit("versions", versions)]
    if ON_GPU:
        found.append(Unit("ceilings", ceilings, 20))
    operations = list(OPERATIONS.items())[1:3] if context.toy else list(OPERATIONS.items())
    return found + [Unit(f"fullgraph {name}", partial(fullgraph, function), 30) for name, function in operations]


def versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": sys.version.split()[0], "cpus": os.cpu_count()}
    for package in (
        "torch",
        "triton",
        "numpy",
        "pytest",
        "pytest-xdist",
        "pytest-benchmark",
        "pytorch-metric-learning",
    ):
        found[package] = _version(package)
    found["compute_sanitizer"] = find_tool()
    if ON_GPU:
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"cuda": torch.version.cuda, "name": card.name, "multiprocessors": card.multi_processor_count}
        found |= {"memory_gb": card.total_memory / 1e9, "l2_mb": l2_bytes() / 2**20}
        found["driver"] = _driver()
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def ceilings() -> dict[str, float]:
    """What a copy and PyTorch's products reach, in TB/s (read and written) and TFLOP/s."""
    n = 8192
    source = torch.randn(1 << 28, device=DEVICE)
    target = torch.empty_like(source)

    def copied() -> None:
        target.copy_(source)

    copied()
    found = {"copy_tb_s": 2 * 4 * source.numel() / events([copied], 0.2, 1e-3) / 1e6}
    for name, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("fp16", torch.float16)):
        x, y = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))

        def multiplied(x: Tensor = x, y: Tensor = y, name: str = name) -> None:
            with fp32_precision(name):
                torch.mm(x, y)

        multiplied()
        found[f"product_{name}_tflop_s"] = 2 * n**3 / events([multiplied], 0.3, 5e-3) / 1e6
    return found


def _ssd(maps: Tensor, labels: Tensor) -> Tensor:
    found = ak.ssd_mask(maps, [maps * 0.5], labels.argsort().roll(3))
    return torch.cat([part for part in found if part is not None]).square().sum()


OPERATIONS: dict[str, Operation] = {
    "triplet_loss": lambda x, labels: ak.triplet_loss(x, labels),
    "pairwise_distance": lambda x, labels: ak.pairwise_distance(x, x.roll(1, 0)).sum(),
    "paired_distance": lambda x, labels: ak.paired_distance(x, x.roll(1, 1)).sum(),
    "batch_hard": lambda x, labels: torch.cat(list(ak.batch_hard(x, labels).distances)).sum(),
    "weighted triplet_loss": lambda x, labels: ak.triplet_loss(x, labels, mining="weighted"),
    "circle_loss": lambda x, labels: ak.circle_loss(x, labels),
    "supervised_contrastive_loss": lambda x, labels: ak.supervised_contrastive_loss(x, labels),
    "metric_perturb": lambda x, labels: ak.metric_perturb(x, labels, epsilon=0.5, steps=2).square().sum(),
    "metric_perturbation_loss": lambda x, labels: ak.metric_perturbation_loss(x, x.detach().roll(3, 0), x.roll(1, 1)),
    "ssd_mask": lambda x, labels: _ssd(x.view(len(x), 16, 2, 2), labels),
}


def fullgraph(function: Operation) -> dict[str, Any]:
    """One graph without a break, with the value and the gradient of a plain call."""
    labels = torch.arange(12, device=DEVICE) // 3
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for called in (function, compiled):
        value = called(x, labels)
        results.append((value, *torch.autograd.grad(value, x)))
    error = relative(results[1], results[0])
    return {"relative_error": error, "status": "ok" if error <= 1e-5 else "failed"}
