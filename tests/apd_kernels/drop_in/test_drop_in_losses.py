"""Losses and distances of torchreid and fast-reid, against outputs of their own functions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import golden_cases
from oracle import assert_close, leaf
from torch import Tensor

from apd_kernels.drop_in import fastreid, torchreid

KINDS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def _number(tag: str, name: str) -> float:
    found = re.search(rf"_{name}([\d.]+)", tag)
    assert found is not None
    return float(found[1])


def _fast_reid_triplet(tag: str) -> Callable[[Tensor, Tensor], Tensor]:
    options = _number(tag, "m"), bool(_number(tag, "norm")), bool(_number(tag, "hard"))
    return lambda x, labels: fastreid.triplet_loss(x, labels, *options)


LOSSES = {
    "torchreid_TripletLoss": lambda tag: torchreid.TripletLoss(margin=_number(tag, "m")),
    "fastreid_triplet_loss": _fast_reid_triplet,
    "fastreid_pairwise_circleloss": lambda tag: (
        lambda x, labels: fastreid.pairwise_circleloss(x, labels, _number(tag, "m"), _number(tag, "g"))
    ),
    "fastreid_pairwise_cosface": lambda tag: (
        lambda x, labels: fastreid.pairwise_cosface(x, labels, _number(tag, "m"), _number(tag, "g"))
    ),
}


def _near_in_products(case: str, name: str, tag: str) -> bool:
    """Whether small distances decide that their side takes from products: squares of 1e-8 beside norms of 1 to 100."""
    return case == "pk_near_duplicates" and "cosface" not in name and "circle" not in name and "norm1" not in tag


@pytest.mark.parametrize(("dtype", "relative"), KINDS, ids=["float64", "float32"])
@pytest.mark.parametrize("name", LOSSES)
def test_golden_losses(real_data: Path, name: str, dtype: torch.dtype, relative: float) -> None:
    compared = 0
    for case, arrays in golden_cases(real_data, name):
        labels = torch.from_numpy(arrays["labels"])
        for key in arrays:
            if not (key.startswith("loss") and key.endswith("_f64")):
                continue
            tag = key.removeprefix("loss").removesuffix("_f64")
            weighted = "hard0" in tag
            if dtype == torch.float32 and weighted and _near_in_products(case, name, tag):
                continue  # distances of 1e-4 out of float32 products are rounding, here and there
            x = leaf(torch.from_numpy(arrays["embeddings"]), "cpu", dtype)
            loss = LOSSES[name](tag)(x, labels)
            loss.backward()
            # Their own float64 roots near 1e-4 are off by 5e-9 of the squares' products.
            limit = 1e-7 if dtype == torch.float64 and _near_in_products(case, name, tag) else relative
            assert_close(loss, torch.from_numpy(np.asarray(arrays[key])), limit, f"{case} {tag}")
            if f"grad{tag}_f64" in arrays:
                gradient = torch.from_numpy(arrays[f"grad{tag}_f64"])
                # PyTorch's softplus, which they take, is the identity from 20 on: 2e-9 off in its derivative.
                softplus = 5e-9 if "pairwise" in name else 0
                assert_close(x.grad, gradient, max(10 * limit, softplus), f"gradient of {case} {tag}", scale=1e-3)
            compared += 1
    assert compared > 10


def test_golden_distances(real_data: Path) -> None:
    functions = {
        "torchreid_compute_distance_matrix_euclidean": torchreid.compute_distance_matrix,
        "torchreid_compute_distance_matrix_cosine": lambda x, y: torchreid.compute_distance_matrix(x, y, "cosine"),
        "fastreid_compute_euclidean_distance": fastreid.build_dist,
        "fastreid_compute_cosine_distance": lambda x, y: fastreid.build_dist(x, y, "cosine"),
    }
    for name, function in functions.items():
        for case, arrays in golden_cases(real_data, name):
            for dtype, relative in KINDS:
                found = torch.as_tensor(function(*(torch.from_numpy(arrays[side]).to(dtype) for side in "xy")))
                assert found.dtype == dtype
                assert_close(found, torch.from_numpy(arrays["ref64"]), relative, f"{name} {case}", scale=1.0)


def test_golden_matrices_of_losses(real_data: Path) -> None:
    """fast-reid's distances inside of its losses; the roots as squares, in which their rounding has its size."""
    for case, arrays in golden_cases(real_data, "fastreid_weighted_example_mining"):
        for dtype, relative in KINDS:
            x = torch.from_numpy(arrays["embeddings"]).to(dtype)
            for function, key, power in (
                (fastreid.euclidean_dist, "euclidean", 2),
                (fastreid.cosine_dist, "cosine", 1),
            ):
                expected = torch.from_numpy(arrays[f"{key}_dist_f64"]) ** power
                for other in (x, x.clone()):
                    found = function(x, other).double() ** power
                    assert_close(found, expected, relative, f"{case} {key}", scale=1.0)
        assert fastreid.euclidean_dist(x, x).diagonal().eq(torch.tensor(1e-6)).all()


def test_soft_margin_that_overflows_is_the_hinge() -> None:
    """fast-reid computes the exponential; where that is infinite it takes the hinge with margin 0.3, of all anchors."""
    x = torch.tensor([[0.0], [200.0], [1.0], [201.0]])
    labels = torch.tensor([0, 0, 1, 1])
    found = fastreid.triplet_loss(x, labels, 0, norm_feat=False, hard_mining=True)
    assert found.item() == pytest.approx(199.3)
    # 80 is below the limit, ln of the largest float32; float64 holds both.
    x = torch.tensor([[0.0], [81.0], [1.0], [82.0]])
    assert fastreid.triplet_loss(x, labels, 0, False, True).item() == pytest.approx(80.0)
    wide = fastreid.triplet_loss(x.double() * 3, labels, 0, False, True)
    assert wide.item() == pytest.approx(240.0)


def test_batch_of_one_identity() -> None:
    """torchreid raises there; fast-reid's distance to no negative is 1e9, or 0 with weights."""
    x, labels = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([5, 5, 5])
    assert torchreid.TripletLoss()(x, labels) == 0
    for margin in (0.3, 0):
        assert fastreid.triplet_loss(x, labels, margin, False, True) == 0
    d = torch.tensor([[1e-6, 1, 3], [1, 1e-6, 2], [3, 2, 1e-6]])
    expected = (d * d.softmax(1)).sum(1).mean() + 0.3
    assert fastreid.triplet_loss(x, labels, 0.3, False, False).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["half", "strided", "small labels", "unequal"])
def test_odd_batches(kind: str) -> None:
    """The same numbers of the same values, whatever holds them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 16, generator=generator).half().float()
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 4] if kind == "unequal" else [0, 0, 0, 1, 1, 1, 2, 2, 2])
    same_x, same_labels = {
        "half": (x.half(), labels),
        "strided": (x.repeat(1, 2)[:, ::2].T.contiguous().T, labels),
        "small labels": (x, labels.to(torch.uint8)),
        "unequal": (x.flip(0).contiguous(), labels.flip(0)),
    }[kind]
    if kind == "strided":
        same_x = torch.stack([x, -x], 2)[..., 0]
        assert not same_x.is_contiguous()
    losses: list[Callable[[Tensor, Tensor], Tensor]] = [
        torchreid.TripletLoss(),
        lambda x, t: fastreid.triplet_loss(x, t, 0.3, False, False),
        lambda x, t: fastreid.triplet_loss(x, t, 0, True, True),
        lambda x, t: fastreid.pairwise_circleloss(x, t, 0.25, 32),
        lambda x, t: fastreid.pairwise_cosface(x, t, 0.25, 32),
    ]
    for loss in losses:
        first, second = loss(x, labels), loss(same_x, same_labels)
        assert second.dtype == torch.float32
        assert second.item() == pytest.approx(first.item(), rel=1e-5)
        assert math.isfinite(first.item())


def test_errors_name_the_argument() -> None:
    x, labels = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    with pytest.raises(TypeError, match="labels: "):
        torchreid.TripletLoss()(x, labels.float())
    with pytest.raises(ValueError, match="margin: "):
        torchreid.TripletLoss(margin=-1.0)(x, labels)
    with pytest.raises(ValueError, match="metric: "):
        torchreid.compute_distance_matrix(x, x, "manhattan")
    with pytest.raises(ValueError, match="metric: "):
        fastreid.build_dist(x, x, "manhattan")
