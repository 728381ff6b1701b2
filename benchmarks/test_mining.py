from __future__ import annotations

from collections.abc import Callable

import pytest

from apd_kernels import batch_hard
from benchmarks import eager
from benchmarks.workload import CANDIDATES, ON_GPU, compiled, identities

COUNT, EACH, DIMENSION = (4096, 16, 2048) if ON_GPU else (1024, 8, 512)


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_batch_hard_in_a_memory(measure: Callable[..., None], candidate: str) -> None:
    """The hardest pairs of 256 anchors in a memory of EACH rows for each of COUNT identities."""
    y, y_labels = identities(COUNT, EACH, DIMENSION)
    x, labels = (y[::EACH][:256] + 0.1).contiguous(), y_labels[::EACH][:256].contiguous()
    if candidate == "ours":

        def work():  # type: ignore[no-untyped-def]
            return tuple(batch_hard(x, labels, y, y_labels).distances)
    else:
        function = compiled(candidate, eager.batch_hard)

        def work():  # type: ignore[no-untyped-def]
            return function(x, labels, y, y_labels)

    expected = eager.batch_hard(x.double(), labels, y.double(), y_labels)
    title = f"batch_hard 256x{COUNT * EACH}x{DIMENSION} forward"
    measure(work, title=title, candidate=candidate, expected=expected, tolerance=1e-5)
