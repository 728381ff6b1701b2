"""Compile kernels before they are needed; measure which tiles suit the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from apd_kernels._core.backend import HAS_TRITON, INTERPRETED, named_backend
from apd_kernels._core.checks import FEATURE_DTYPES, check_choice
from apd_kernels._core.operands import METRICS
from apd_kernels._core.precision import resolve_precision
from apd_kernels.distance import pairwise_distance
from apd_kernels.evaluation.ranking import rank_metrics
from apd_kernels.mining import batch_hard
from apd_kernels.prepared import prepare_rows

OPERATIONS = (
    "pairwise_distance",
    "paired_distance",
    "batch_hard",
    "triplet_loss",
    "weighted_pairs",
    "circle_loss",
    "supervised_contrastive_loss",
    "metric_perturb",
    "metric_perturbation_loss",
    "memories",
)


def warmup(
    operations: Iterable[str],
    dimension: int,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    *,
    metrics: Sequence[str] = ("euclidean",),
    precision: str | None = None,
    device: torch.device | int | None = None,
) -> dict[str, float]:
    """Compile what operations launch for features of one dimension, forward and backward, for any batch size.

    Compiled are the routes of one feature set with int64 labels, without domains. Nothing runs and no memory is taken.
    Triton keeps what it compiled in its own cache on disk, so the seconds are spent once a machine. Compile before a
    CUDA graph is captured: capturing cannot.

    Args:
        operations: names out of `apd_kernels.tuning.OPERATIONS`; ``"memories"`` are the updates of `CrossBatchMemory`
            and `ClusterMemory`.
        dimension: D of the features.
        dtypes: of the features; float64 has no kernels.
        metrics: of the operations that take one.
        precision: as the operations will be called with.
        device: CUDA device, the current one for None.

    Returns:
        Seconds by operation; 0 where there is nothing to compile, because PyTorch serves.

    Raises:
        TypeError, ValueError: an unknown operation, dtype or metric.
        RuntimeError: during a CUDA graph's capture.

    >>> warmup(["triplet_loss"], 2048) if not torch.cuda.is_available() else {"triplet_loss": 0.0}
    {'triplet_loss': 0.0}
    """
    operations = list(operations)
    for name in operations:
        check_choice("operations", name, OPERATIONS)
    _check_dimension(dimension)
    for dtype in dtypes:
        if dtype not in FEATURE_DTYPES:
            raise TypeError(f"dtypes: expected float16, bfloat16, float32 or float64, got {dtype}")
    for metric in metrics:
        check_choice("metrics", metric, METRICS)
    precision = resolve_precision(precision)
    if not _kernels_serve():
        return dict.fromkeys(operations, 0.0)
    _refuse_capture("warmup")
    from apd_kernels.kernels._launch import compiling
    from apd_kernels.kernels._workloads import WORKLOADS, Features

    seconds = {}
    with torch.cuda.device(device), compiling(torch.cuda.current_device()):
        for name in operations:
            start = time.perf_counter()
            for dtype in dtypes:
                for metric in metrics if dtype != torch.float64 else ():
                    WORKLOADS[name](Features(dimension, dtype, metric, precision))
            seconds[name] = time.perf_counter() - start
    return seconds


def autotune(
    dimension: int = 2048,
    *,
    kernels: Sequence[str] | None = None,
    device: torch.device | int | None = None,
    verbose: bool = True,
) -> dict[str, dict[str, int]]:
    """Measure tiles of the distance, mining and ranking kernels on this GPU and keep the fastest for every later run.

    Some minutes. The results go to a file, ``tiles-KEY.json`` in the folder named by the environment variable
    ``APD_KERNELS_CACHE`` (``~/.cache/apd_kernels``); the key is made of the GPU's name, Triton's version and the
    source of the kernels, so nothing stale is read. Without that file the table in ``kernels/_tuning.py`` holds.
    Results of the operations keep their error bounds but not their last bits: another tile sums in another order.

    Args:
        dimension: D of the features that are measured with.
        kernels: rows of the table, such as ``"mine.split"``; all for None.
        device: CUDA device, the current one for None.
        verbose: print each kernel's tile, beside the time of the table's.

    Returns:
        Constants and options by kernel, as written to the file.

    Raises:
        ValueError: an unknown kernel.
        RuntimeError: without a CUDA device and Triton, or during a CUDA graph's capture.

    >>> tiles = autotune(2048, kernels=["mine.split"]) if torch.cuda.is_available() else {}
    """
    _check_dimension(dimension)
    if not _kernels_serve():
        raise RuntimeError("autotune: expected a CUDA device and Triton, which are what it measures")
    _refuse_capture("autotune")
    from apd_kernels.kernels import _tuning

    for kernel in kernels or ():
        check_choice("kernels", kernel, tuple(_tuning.TABLE))
    with torch.cuda.device(device):
        name = torch.cuda.get_device_name()
        path = _tuning.cache_file(name)
        tiles = _tuning.load_tiles(path)
        for kernel in kernels or _tuning.TABLE:
            work = work_of(kernel, dimension)
            x = torch.empty(0, device="cuda")
            others = [] if _tuning.family(x) == 100 else _tuning.CANDIDATES[kernel]
            tiles[kernel], milliseconds = fastest(kernel, [_tuning.tile(kernel, x), *others], work, _milliseconds)
            if verbose:
                print(f"{kernel}: {tiles[kernel]} {milliseconds[0]:.3f} ms, before {milliseconds[1]:.3f} ms")
        import triton

        _tuning.save_tiles(path, tiles, device=name, triton=triton.__version__)
    return tiles


def fastest(
    kernel: str,
    candidates: Sequence[Mapping[str, int]],
    work: Callable[[], Any],
    timer: Callable[[Callable[[], Any]], float | None],
) -> tuple[dict[str, int], tuple[float, float]]:
    """The candidate with the least time, with that time and the first candidate's; `timer` returns None for no fit."""
    from apd_kernels.kernels._tuning import use_tile

    times: list[tuple[float, Mapping[str, int]]] = []
    for options in candidates:
        with use_tile(kernel, options):
            milliseconds = timer(work)
        if milliseconds is not None:
            times.append((milliseconds, options))
    if not times:
        raise RuntimeError(f"{kernel}: no tile runs on this device")
    least, options = min(times, key=lambda pair: pair[0])
    return dict(options), (least, times[0][0])


def work_of(
    kernel: str, dimension: int, *, device: str = "cuda", small: int = 1024, large: int = 8192
) -> Callable[[], Any]:
    """A call that spends its time in `kernel`."""
    operation, form = kernel.split(".")
    precision = "tf32" if form in ("plain", "wide") else "fp32"
    if operation == "mine":
        n, m = small // 4, small if form == "rows" else 2 * large
    elif operation == "triangle":
        n = m = small if form == "rows" else large // 2
    else:
        n = m = small if form == "rows" else large
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, dimension, device=device, generator=generator, requires_grad=operation == "gradient")
    y = torch.randn(m, dimension, device=device, generator=generator)
    others = (
        prepare_rows(y, precision=precision) if form in ("split", "plain") and operation in ("mine", "distance") else y
    )
    if operation == "rank":
        labels, y_labels = (torch.arange(rows, device=device) // 4 for rows in (n, m))
        return lambda: rank_metrics(x, y, labels, y_labels, metric="dot", precision=precision)
    if operation == "triangle":
        return lambda: batch_hard(x, torch.arange(n, device=device) // 4, precision=precision)
    if operation == "mine":
        labels, y_labels = (torch.arange(rows, device=device) // 4 for rows in (n, m))
        return lambda: batch_hard(x, labels, others, y_labels, precision=precision)
    if operation == "distance":
        return lambda: pairwise_distance(x, others, precision=precision)
    distance = pairwise_distance(x, others, precision=precision)
    weights = torch.rand(n, m, device=device, generator=generator)
    return lambda: torch.autograd.grad(distance, x, weights, retain_graph=True)


def _milliseconds(work: Callable[[], Any]) -> float | None:
    import triton

    try:
        return float(triton.testing.do_bench(work, return_mode="median"))
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
        return None


def _kernels_serve() -> bool:
    return HAS_TRITON and not INTERPRETED and torch.cuda.is_available() and named_backend() != "torch"


def _check_dimension(dimension: int) -> None:
    if type(dimension) is not int or dimension < 1:
        raise ValueError(f"dimension: expected an integer of at least 1, got {dimension!r}")


def _refuse_capture(name: str) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{name}: expected before, not during the capture of a CUDA graph, which cannot compile")
