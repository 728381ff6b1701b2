from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apd_kernels import knn
from benchmarks.workload import DEVICE, ON_GPU, identities

# Market-1501's size on a GPU, a sixth of it on a CPU.
QUERIES, GALLERY, DIMENSION, PEOPLE = (3368, 19732, 2048, 751) if ON_GPU else (560, 3288, 512, 125)


@pytest.mark.parametrize("k", [10, 100, 1000])
@pytest.mark.parametrize("candidate", ["ours", "eager", "faiss"])
def test_knn(measure: Callable[..., None], candidate: str, k: int) -> None:
    """The k nearest gallery rows, from features in one piece; FAISS builds its flat index inside the timing."""
    rows, _ = identities(PEOPLE, -(-(QUERIES + GALLERY) // PEOPLE), DIMENSION)
    rows = rows[torch.randperm(len(rows), device=DEVICE)]
    query, gallery = rows[:QUERIES], rows[QUERIES : QUERIES + GALLERY].contiguous()

    def ours() -> torch.Tensor:
        return knn(query, gallery, k, metric="euclidean", precision="fp32").distances

    def matrix() -> torch.Tensor:
        return torch.cdist(query, gallery).topk(k, largest=False).values

    def index() -> torch.Tensor:
        faiss = pytest.importorskip("faiss")
        if not ON_GPU:
            flat = faiss.IndexFlatL2(DIMENSION)
            flat.add(gallery.numpy())
            return torch.from_numpy(flat.search(query.numpy(), k)[0]).sqrt()
        pytest.importorskip("faiss.contrib.torch_utils")  # FAISS then takes CUDA tensors
        flat = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), DIMENSION)
        flat.add(gallery)
        return flat.search(query, k)[0].sqrt()

    expected = torch.cdist(query.double(), gallery.double()).topk(k, largest=False).values
    measure(
        {"ours": ours, "eager": matrix, "faiss": index}[candidate],
        title=f"knn {QUERIES}x{GALLERY}x{DIMENSION}, k={k}",
        candidate=candidate,
        expected=(expected,),
        tolerance=1e-4,
    )
