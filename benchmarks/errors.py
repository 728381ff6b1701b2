"""Errors against float64, as a table: ``python -m benchmarks.errors [--into FILE.md]``.

What runs is what a user runs on this machine: the kernels on CUDA, PyTorch elsewhere. With ``--into`` the table
replaces what stands between the two marker comments of that file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from apd_kernels import (
    batch_hard,
    circle_loss,
    paired_distance,
    pairwise_distance,
    supervised_contrastive_loss,
    triplet_loss,
)
from benchmarks.conftest import processor
from benchmarks.report import insert
from benchmarks.workload import DEVICE, ON_GPU

BEGIN, END = "<!-- errors: begin -->", "<!-- errors: end -->"
N, D = (4096, 2048) if ON_GPU else (1024, 2048)
Loss = Callable[[Tensor, Tensor], Tensor]


def feature_sets() -> dict[str, Tensor]:
    """What networks give: signed rows, rows after a ReLU on the unit sphere, and pairs that nearly coincide."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(N // 4, D, generator=generator).repeat_interleave(4, 0)
    rows = centres + torch.randn(N, D, generator=generator)
    duplicates = rows.repeat_interleave(2, 0)[:N]
    duplicates[1::2] += 1e-4 * torch.randn(N // 2, D, generator=generator)
    return {"Gaussian": rows, "unit, ≥ 0": F.normalize(rows.relu()), "pairs 1e-4 apart": duplicates}


def distances64(x: Tensor, metric: str) -> Tensor:
    if metric == "cosine":
        x = F.normalize(x)
    if metric in ("cosine", "dot"):
        return float(metric == "cosine") - x @ x.mT
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def losses() -> dict[str, tuple[Loss, Loss]]:
    """Ours, and the formula on whole matrices."""

    def masks(labels: Tensor) -> tuple[Tensor, Tensor]:
        same = labels[:, None] == labels
        return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same

    def triplet(x: Tensor, labels: Tensor) -> Tensor:
        positive, negative = masks(labels)
        d = distances64(x, "euclidean")
        far, near = d.masked_fill(~positive, -torch.inf).amax(1), d.masked_fill(~negative, torch.inf).amin(1)
        return F.softplus(far - near, threshold=40).mean()

    def weighted(x: Tensor, labels: Tensor) -> Tensor:
        positive, negative = masks(labels)
        d = distances64(x, "euclidean")
        far = (d.masked_fill(~positive, -torch.inf).softmax(1) * d).sum(1)
        near = ((-d).masked_fill(~negative, -torch.inf).softmax(1) * d).sum(1)
        return F.softplus(far - near, threshold=40).mean()

    def circle(x: Tensor, labels: Tensor) -> Tensor:
        positive, negative = masks(labels)
        s = F.normalize(x) @ F.normalize(x).mT
        p, n = (1.25 - s).detach().clamp(min=0) * (s - 0.75), (s + 0.25).detach().clamp(min=0) * (s - 0.25)
        over_p = (-128 * p).masked_fill(~positive, -torch.inf).logsumexp(1)
        return F.softplus(over_p + (128 * n).masked_fill(~negative, -torch.inf).logsumexp(1), threshold=40).mean()

    def contrastive(x: Tensor, labels: Tensor) -> Tensor:
        positive, negative = masks(labels)
        logits = 10 * F.normalize(x) @ F.normalize(x).mT
        over = logits.masked_fill(~(positive | negative), -torch.inf).logsumexp(1)
        return (over - (logits * positive).sum(1) / positive.sum(1)).mean()

    return {
        "triplet_loss": (lambda x, labels: triplet_loss(x, labels, margin=None), triplet),
        "triplet_loss, weighted": (lambda x, labels: triplet_loss(x, labels, margin=None, mining="weighted"), weighted),
        "circle_loss": (circle_loss, circle),
        "supervised_contrastive_loss": (supervised_contrastive_loss, contrastive),
    }


def lines() -> Iterator[str]:
    yield "| operation | features | of | largest | root mean square |"
    yield "|---|---|---|---|---|"

    def line(operation: str, name: str, of: str, error: Tensor) -> str:
        error = error.double()
        return f"| {operation} | {name} | {of} | {error.abs().max():.1e} | {error.square().mean().sqrt():.1e} |"

    for name, rows in feature_sets().items():
        x, labels = rows.to(DEVICE), torch.arange(N, device=DEVICE) // 4
        exact = x.double()
        norms = exact.norm(dim=1)
        for metric in ("euclidean", "cosine", "dot"):
            expected = distances64(exact, metric)
            scale = {
                "euclidean": norms[:, None] + norms,
                "cosine": torch.ones(1).to(norms),
                "dot": norms[:, None] * norms,
            }
            of = {"euclidean": "‖x‖ + ‖y‖", "cosine": "1", "dot": "‖x‖‖y‖"}[metric]
            error = (pairwise_distance(x, metric=metric, precision="fp32") - expected) / scale[metric]
            yield line(f"pairwise_distance, {metric}", name, of, error)
        shifted = x.roll(1, 0)
        paired = (exact - exact.roll(1, 0)).norm(dim=1)
        yield line("paired_distance, euclidean", name, "the distance", paired_distance(x, shifted) / paired - 1)
        mined = batch_hard(x, labels, precision="fp32").distances
        same = labels[:, None] == labels
        d = distances64(exact, "euclidean")
        near = d.masked_fill(same, torch.inf).amin(1)
        far = d.masked_fill(~same, -torch.inf).amax(1)
        found = torch.cat([mined.positive / far - 1, mined.negative / near - 1])
        yield line("batch_hard, euclidean", name, "the best distance", found)
        for operation, (ours, formula) in losses().items():
            a, b = x.clone().requires_grad_(), exact.clone().requires_grad_()
            value, expected = ours(a, labels), formula(b, labels)
            value.backward()
            expected.backward()
            assert a.grad is not None
            assert b.grad is not None
            yield line(operation, name, "the loss", (value.detach() - expected.detach()) / expected.detach())
            yield line(operation, name, "largest of the gradient", (a.grad - b.grad) / b.grad.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, help="file whose marked section the table replaces")
    arguments = parser.parse_args()
    where = torch.cuda.get_device_name() if ON_GPU else processor()
    text = "\n".join([f"{where}; torch {torch.__version__}; {N} float32 rows of {D} in identities of 4.", "", *lines()])
    print(text) if arguments.into is None else insert(arguments.into, text, BEGIN, END)


if __name__ == "__main__":
    main()
