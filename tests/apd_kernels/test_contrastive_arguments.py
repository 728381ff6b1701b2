"""Wrong arguments of the losses over all pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apd_kernels import circle_loss, supervised_contrastive_loss

Loss = Callable[..., Tensor]
X, LABELS = torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize("loss", [circle_loss, supervised_contrastive_loss], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, r"x: expected a torch.Tensor, got list"),
        ({"x": X.long()}, TypeError, r"x: expected float16, .*, got torch.int64"),
        ({"x": X[0]}, ValueError, r"x: expected shape \(N, D\) or \(S, N, D\), got \(3,\)"),
        ({"x": X[:, :0]}, ValueError, r"x: expected at least one feature dimension"),
        ({"labels": LABELS[:3]}, ValueError, r"labels: expected shape \(4,\), got \(3,\)"),
        ({"labels": LABELS[None]}, ValueError, r"labels: expected shape \(4,\), got \(1, 4\)"),
        ({"labels": LABELS.float().requires_grad_()}, TypeError, r"labels: expected an integer dtype"),
        ({"labels": LABELS.to("meta")}, ValueError, r"labels: expected device cpu, got meta"),
        ({"y": X}, ValueError, r"y_labels: expected with y, got None"),
        ({"y_labels": LABELS}, ValueError, r"y: expected with y_labels, got None"),
        ({"y": X[:, :2], "y_labels": LABELS}, ValueError, r"y: expected shape \(M, 3\), got \(4, 2\)"),
        ({"y": X[None], "y_labels": LABELS}, ValueError, r"y: expected shape \(M, 3\), got \(1, 4, 3\)"),
        ({"y": X.half(), "y_labels": LABELS}, TypeError, r"y: expected torch.float32 as x, got torch.float16"),
        ({"y": X.to("meta"), "y_labels": LABELS}, ValueError, r"y: expected device cpu as x, got meta"),
        ({"y": X, "y_labels": LABELS[:2]}, ValueError, r"y_labels: expected shape \(4,\), got \(2,\)"),
        ({"y": X, "y_labels": LABELS, "y_valid": LABELS}, TypeError, r"y_valid: expected torch.bool, got torch.int64"),
        ({"own": LABELS}, ValueError, r"y: expected with own, got None"),
        ({"positives": "within"}, ValueError, r"domains: expected with positives='within', got None"),
        ({"negatives": "none"}, ValueError, r"negatives: expected 'all' or 'within' or 'across', got 'none'"),
        ({"precision": "fp16"}, ValueError, r"precision: expected 'fp32' or 'tf32' or 'bf16', got 'fp16'"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_input(loss: Loss, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss(**{"x": X, "labels": LABELS, **change})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: circle_loss(X, LABELS, margin=-0.1), ValueError, r"margin: expected a finite number of at least 0"),
        (lambda: circle_loss(X, LABELS, margin=None), TypeError, r"margin: expected a number, got NoneType"),
        (lambda: circle_loss(X, LABELS, gamma=0.0), ValueError, r"gamma: expected a finite number above 0, .*got 0"),
        (lambda: circle_loss(X, LABELS, gamma=-1.0), ValueError, r"gamma: expected a finite number"),
        (lambda: circle_loss(X, LABELS, gamma=float("inf")), ValueError, r"gamma: expected a finite number"),
        (
            lambda: supervised_contrastive_loss(X, LABELS, temperature=0),
            ValueError,
            r"temperature: expected a finite number above 0, .*got 0",
        ),
        (
            lambda: supervised_contrastive_loss(X, LABELS, temperature=float("nan")),
            ValueError,
            r"temperature: expected a finite number",
        ),
        (
            lambda: supervised_contrastive_loss(X, LABELS, metric="euclidean"),
            ValueError,
            r"metric: expected 'cosine' or 'dot', got 'euclidean'",
        ),
    ],
)
def test_bad_choices(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
