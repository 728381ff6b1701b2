from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from apd_kernels import Gallery
from benchmarks.workload import DEVICE, ON_GPU, identities

PEOPLE, EACH, DIMENSION, QUERIES = (50_000, 10, 512, 256) if ON_GPU else (2_000, 10, 512, 256)
ROWS = PEOPLE * EACH


class Case(NamedTuple):
    index: str  # FAISS's factory string
    k: int
    parameters: dict[str, int]
    share: float = 1.0  # of the rows that may be found


CASES = {
    "Flat": Case("Flat", 100, {}),
    "Flat, filter": Case("Flat", 100, {}, share=0.3),
    "IVF256,Flat": Case("IVF256,Flat", 10, {"nprobe": 64}),
    "HNSW32": Case("HNSW32", 10, {"efSearch": 64}),
}


def _rows() -> tuple[Tensor, Tensor]:
    """Queries and gallery, with identity structure in 64 dimensions as real features have it."""
    low, _ = identities(PEOPLE, EACH, 64)
    spread = torch.randn(64, DIMENSION, device=DEVICE)
    query = low[torch.randperm(ROWS, device=DEVICE)[:QUERIES]]
    return (query + 0.1 * torch.randn_like(query)) @ spread, low @ spread


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("candidate", ["ours", "faiss", "eager"])
def test_search(measure: Callable[..., None], candidate: str, case: Case) -> None:
    """The k nearest rows of each query; what is searched is built once, outside the timing.

    "faiss" is the same index by itself; an index that may miss rows is first held against the exact k nearest, and
    the title says how many of them ours found.
    """
    query, rows = _rows()
    allowed = torch.rand(ROWS, device=DEVICE) < case.share
    gallery = Gallery(DIMENSION, metric="euclidean", index=case.index)
    gallery.add(rows)

    def ours() -> Tensor:
        where = allowed if case.share < 1 else None
        return gallery.search(query, case.k, where=where, parameters=case.parameters).distances

    def matrix() -> Tensor:
        distances = torch.cdist(query, rows)
        if case.share < 1:
            distances.masked_fill_(~allowed, torch.inf)
        return distances.topk(case.k, largest=False).values

    blocks = (torch.cdist(some.double(), rows.double()).masked_fill_(~allowed, torch.inf) for some in query.split(32))
    expected = torch.cat([block.topk(case.k, largest=False).values for block in blocks])
    title = f"Gallery.search {QUERIES}x{ROWS}x{DIMENSION}, k={case.k}, {case.index}"
    title += "".join(f", {name} {value}" for name, value in case.parameters.items())
    if case.share < 1:
        title += f", {case.share:.0%} may be found"
    exact = case.index == "Flat"
    if not exact:
        recall = _recall(ours(), expected)
        assert recall > 0.8
        title += f", recall {recall:.3f}"
    work = {"ours": ours, "eager": matrix}.get(candidate) or _faiss(case, query, rows, allowed)
    if not exact and candidate == "faiss":
        assert _recall(work(), expected) > 0.8
    measure(
        work,
        title=title,
        candidate=candidate,
        expected=(expected.cpu() if candidate != "eager" else expected,) if exact or candidate == "eager" else (),
        tolerance=1e-4,
    )


def _faiss(case: Case, query: Tensor, rows: Tensor, allowed: Tensor) -> Callable[[], Tensor]:
    """FAISS without the gallery, on the CPU: its GPU indexes take no filter and are not of all kinds."""
    faiss: Any = pytest.importorskip("faiss")
    index = faiss.index_factory(DIMENSION, case.index)
    index.train(rows.cpu().numpy())
    index.add(rows.cpu().numpy())
    queries = query.cpu().numpy()
    if case.share < 1:
        bits = np.packbits(allowed.cpu().numpy(), bitorder="little")
        parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
    elif case.index.startswith("IVF"):
        parameters = faiss.SearchParametersIVF(**case.parameters)
    elif case.index.startswith("HNSW"):
        parameters = faiss.SearchParametersHNSW(**case.parameters)
    else:
        parameters = None

    def search() -> Tensor:
        return torch.from_numpy(index.search(queries, case.k, params=parameters)[0]).sqrt()

    return search


def _recall(distances: Tensor, nearest: Tensor) -> float:
    """The share of found rows that are no farther than the k-th nearest, up to rounding."""
    limit = nearest[:, -1:].cpu() * (1 + 1e-5)
    return (distances.cpu() <= limit).double().mean().item()
