"""Stage "faiss" (``--faiss``): the gallery searched by FAISS on a GPU, against the CPU and against float64."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apd_kernels import Gallery
from benchmarks.units import Context, Skip, Unit
from benchmarks.workload import ON_GPU, ranking_features

DEVICE = "cuda" if ON_GPU else "cpu"


def units(context: Context) -> list[Unit]:
    rows, dimension = (60, 16) if context.toy else (50_000, 512)
    few, many = (5, 20) if context.toy else (100, 3000)  # FAISS on a GPU gives 2048 at most
    found = [Unit("faiss", versions, 30)]
    for metric in ("euclidean", "cosine", "dot"):
        for share in (1.0, 0.3, 0.05):
            work = partial(compared, metric, rows, dimension, few, share)
            found.append(Unit(f"{metric}, k={few}, {share:.0%} may be found", work, 60))
        found.append(Unit(f"{metric}, k={many}", partial(compared, metric, rows, dimension, many, 1.0), 60))
    return found


def versions() -> dict[str, Any]:
    faiss = _faiss()
    return {"faiss": faiss.__version__, "gpus": faiss.get_num_gpus()}


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise Skip(f"FAISS could not be imported ({error}): pip install faiss-gpu, or unpack its wheel") from error
    if ON_GPU and not faiss.get_num_gpus():
        raise Skip(f"faiss {faiss.__version__} finds no GPU: it is a build for CPUs, or its CUDA libraries are missing")
    return faiss


def compared(metric: str, rows: int, dimension: int, k: int, share: float) -> dict[str, Any]:
    """Distances and keys on both devices, which promise the same bits, and whether a nearer row was missed."""
    _faiss()
    torch.manual_seed(0)
    queries = max(4, rows // 500)
    query, gallery = (t.cpu() for t in ranking_features(queries, rows, dimension, max(2, rows // 20), spread=1.0)[:2])
    gallery[rows // 2 : rows // 2 + 10] = gallery[:10]  # equal rows are ordered by their place
    where = torch.rand(rows) < share if share < 1 else None
    found, seconds = {}, {}
    for device in ("cpu", DEVICE):
        there = Gallery(dimension, metric=metric, device=device)
        there.add(gallery)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            found[device] = there.search(query, k, where=where)
            times.append(time.perf_counter() - began)
        seconds[device] = statistics.median(times)
    mine, theirs = found[DEVICE], found["cpu"]
    values: dict[str, Any] = {f"{device}_ms": 1e3 * value for device, value in seconds.items()}
    values["same_bits"] = bool(
        torch.equal(mine.distances, theirs.distances) and torch.equal(mine.indices, theirs.indices)
    )
    values["missed"] = _missed(query, gallery, where, metric, mine.distances)
    good = values["same_bits"] and not values["missed"]
    return values if good else {**values, "status": "failed", "error": "another result than on the CPU or in float64"}


def _missed(query: Tensor, gallery: Tensor, where: Tensor | None, metric: str, distances: Tensor) -> int:
    """Places whose distance is larger than the exact one by more than float32's rounding."""
    x, y = query.to(DEVICE).double(), gallery.to(DEVICE).double()
    if metric == "cosine":
        x, y = torch.nn.functional.normalize(x), torch.nn.functional.normalize(y)
    exact = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") if metric == "euclidean" else -(x @ y.t())
    exact = exact + (metric == "cosine")
    if where is not None:
        exact.masked_fill_(~where.to(DEVICE), torch.inf)
    best = exact.topk(min(distances.shape[1], len(gallery)), largest=False).values.cpu()
    scale = best[best.isfinite()].abs().max()
    return int((distances[:, : best.shape[1]].double() - best > 1e-5 * scale).sum())
