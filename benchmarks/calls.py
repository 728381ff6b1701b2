"""One small call for every kernel: what compute-sanitizer looks at, in seconds.

``python -m benchmarks.calls NAME …`` runs them, each announced by a line. Large problems' routes are taken by small
ones here: their thresholds are set to nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

import apd_kernels as ak
from benchmarks.workload import DEVICE

Call = Callable[[], Any]


def _rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _batch(n: int = 12, d: int = 64) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n, device=DEVICE) // 3
    return _rows(n // 3, d, 1)[labels] + _rows(n, d), labels


def _backward(x: Tensor, function: Callable[[Tensor], Any]) -> Tensor:
    a = x.detach().requires_grad_()
    found = function(a)
    values = [found] if isinstance(found, Tensor) else list(found)
    return torch.autograd.grad(torch.stack([value.float().sum() for value in values]).sum(), a)[0]


@contextmanager
def large_routes() -> Iterator[None]:
    """Small problems take the routes of large ones: split products, tiles above the diagonal, sorted winners."""
    from apd_kernels.kernels import adversarial, mining, prepared

    changes = [
        (prepared, "LARGE_PRODUCTS", 0),
        (mining, "TRIANGLE_ROWS", (1, 16384)),
        (mining, "SCANNED_ANCHORS", 4),
        (adversarial, "SCANNED_ANCHORS", 4),
        (mining, "SLAB", 16),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _as_large(call: Call) -> Call:
    def run() -> Any:
        with large_routes():
            return call()

    return run


def _ssd() -> Tensor:
    x = _rows(8, 64).view(8, 8, 4, 2)
    permutation = torch.arange(8, device=DEVICE).roll(4)
    logits = [x * 0.5, x - 1]
    return _backward(x, lambda a: ak.ssd_mask(a, logits, permutation))


def _memories() -> None:
    x, labels = _batch()
    queue, clusters = ak.CrossBatchMemory(20, 64).to(DEVICE), ak.ClusterMemory(4, 64).to(DEVICE)
    queue.enqueue(x, labels)
    queue.enqueue(x, labels)
    clusters.reset(x, labels)
    clusters.update(x, labels)


def _perturbation_loss() -> Tensor:
    x, _ = _batch()
    bank, indices = _rows(20, 64, 2), torch.arange(24, device=DEVICE).view(12, 2) % 20
    _backward(x, lambda a: ak.metric_perturbation_loss(a, x.roll(3, 0), x.roll(1, 1)))
    negatives = bank[indices].requires_grad_()
    ak.metric_perturbation_loss(x, negatives, x.roll(1, 1)).backward()
    return _backward(x, lambda a: ak.metric_perturbation_loss(a, bank, x.roll(1, 1), indices=indices))


def _rank() -> Any:
    x, labels = _batch(24)
    return ak.rank_metrics(x[::2], x[1::2], labels[::2], labels[1::2], precision="fp32")


def _knn() -> Any:
    x, labels = _batch(60)
    cams = torch.arange(60, device=DEVICE) % 2
    ak.knn(x[:7], x, 5, exclude_same=(labels[:7], labels, cams[:7], cams))
    ak.knn(_rows(4, 64, 1), _rows(200, 64), 1)  # many rows for each that is asked for: a bound first
    return ak.knn(x, x, 9, metric="euclidean", exclude_self=True)


def calls() -> dict[str, Call]:
    """By name; the names of kernels that they are there for are in it where it is not the operation's."""
    x, labels = _batch()
    y, y_labels = _rows(40, 64, 3), torch.arange(40, device=DEVICE) % 6

    @cache
    def kept() -> list[ak.PreparedRows]:
        return [ak.prepare_rows(y, precision=precision) for precision in ("fp32", "tf32")]

    def distance(a: Tensor, b: Any = y, **options: Any) -> Tensor:
        return ak.pairwise_distance(a, b, **{"precision": "fp32", **options})

    def perturb(rows: Tensor = x, **options: Any) -> Tensor:
        return ak.metric_perturb(rows, labels, epsilon=0.5, steps=2, **options)

    with_memory = {"memory": y, "memory_labels": y_labels}
    return {
        "triplet_loss": lambda: _backward(x, lambda a: ak.triplet_loss(a, labels)),
        "triplet_loss of many": _as_large(lambda: _backward(x, lambda a: ak.triplet_loss(a, labels))),
        "pairwise_distance": lambda: _backward(x, distance),
        "pairwise_distance, split": _as_large(lambda: _backward(x, distance)),
        "pairwise_distance, x with itself, split": _as_large(lambda: _backward(x, lambda a: distance(a, None))),
        "pairwise_distance, kept": lambda: [distance(x, rows, precision=None) for rows in kept()],
        "batch_hard in a memory": lambda: _backward(x, lambda a: ak.batch_hard(a, labels, y, y_labels).distances),
        "batch_hard in a memory, split": _as_large(
            lambda: _backward(x, lambda a: ak.batch_hard(a, labels, y, y_labels, precision="fp32").distances)
        ),
        "batch_hard, kept": lambda: [ak.batch_hard(x, labels, rows, y_labels) for rows in kept()],
        "metric_perturb, one program": perturb,
        "metric_perturb, several programs": lambda: ak.metric_perturb(
            _rows(66, 264), torch.arange(66, device=DEVICE) // 4, epsilon=0.5, steps=1
        ),
        "metric_perturb, step by step": lambda: perturb(x[:, :16].clone()),
        "metric_perturb, l∞": lambda: perturb(norm="linf"),
        "metric_perturb of many": _as_large(lambda: perturb(norm="linf")),
        "metric_perturb in a memory": lambda: perturb(**with_memory),
        "metric_perturb, negative": lambda: perturb(objective="negative"),
        "metric_perturbation_loss": _perturbation_loss,
        "paired_distance": lambda: _backward(x, lambda a: ak.paired_distance(a, x.roll(1, 1))),
        "circle_loss": lambda: _backward(x, lambda a: ak.circle_loss(a, labels)),
        "supervised_contrastive_loss in a memory": lambda: _backward(
            x, lambda a: ak.supervised_contrastive_loss(a, labels, y, y_labels)
        ),
        "weighted_pairs": lambda: _backward(x, lambda a: ak.triplet_loss(a, labels, mining="weighted")),
        "ssd_mask": _ssd,
        "memories": _memories,
        "rank_metrics": _rank,
        "knn": _knn,
    }


# Programs of these wait for each other, or share what they have stored, inside a launch.
RACING = {"_triplet": "triplet_loss", "_solve": "metric_perturb, one program", "_collect": "knn"}


def main() -> None:
    named = calls()
    for name in sys.argv[1:] or named:
        print(f"call: {name}", flush=True)
        named[name]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    print("call: done", flush=True)


if __name__ == "__main__":
    main()
