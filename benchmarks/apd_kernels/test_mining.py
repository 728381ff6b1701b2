from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apd_kernels import batch_hard, prepare_rows
from benchmarks import eager
from benchmarks.workload import CANDIDATES, ON_GPU, compiled, identities

COUNT, EACH, DIMENSION = (4096, 16, 2048) if ON_GPU else (1024, 8, 512)


@pytest.mark.parametrize("candidate", [*CANDIDATES, "kept", "pytorch-metric-learning", "floor"])
def test_batch_hard_in_a_memory(measure: Callable[..., None], candidate: str) -> None:
    """The hardest pairs of 256 anchors in a memory of EACH rows for each of COUNT identities."""
    y, y_labels = identities(COUNT, EACH, DIMENSION)
    x, labels = (y[::EACH][:256] + 0.1).contiguous(), y_labels[::EACH][:256].contiguous()
    work: Callable[[], tuple[torch.Tensor, ...]]
    if candidate in ("ours", "kept"):
        rows = prepare_rows(y) if candidate == "kept" else y

        def work() -> tuple[torch.Tensor, ...]:
            return tuple(batch_hard(x, labels, rows, y_labels).distances)
    elif candidate == "pytorch-metric-learning":
        miners = pytest.importorskip("pytorch_metric_learning.miners")
        distances = pytest.importorskip("pytorch_metric_learning.distances")
        miner = miners.BatchHardMiner(distance=distances.LpDistance(normalize_embeddings=False))

        def work() -> tuple[torch.Tensor, ...]:
            anchors, positive, negative = miner(x, labels, y, y_labels)
            return (x[anchors] - y[positive]).norm(dim=1), (x[anchors] - y[negative]).norm(dim=1)
    elif candidate == "floor":

        def work() -> tuple[torch.Tensor, ...]:
            return (x @ y.t(),)
    else:
        function = compiled(candidate, eager.batch_hard)

        def work() -> tuple[torch.Tensor, ...]:
            return function(x, labels, y, y_labels)

    expected = eager.batch_hard(x.double(), labels, y.double(), y_labels)
    title = f"batch_hard 256x{COUNT * EACH}x{DIMENSION} forward"
    measure(work, title=title, candidate=candidate, expected=expected, tolerance=1e-5)
