"""BoxMOT's losses and ranking, and OML's miner, against formulas; and against the packages where they are installed."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, leaf
from torch import Tensor

from apd_kernels.drop_in import boxmot


def _batch(labels: list[int]) -> tuple[Tensor, Tensor]:
    x = torch.randn(len(labels), 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return leaf(x, "cpu", torch.float64), torch.tensor(labels)


LABELS = {"pk": [0, 0, 1, 1, 2, 2], "unequal": [0, 0, 0, 1, 1, 2]}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("labels", LABELS)
def test_triplet(labels: str, soft: bool) -> None:
    losses = []
    for ours in (True, False):
        x, ids = _batch(LABELS[labels])
        if ours:
            loss = boxmot.TripletLoss(margin=0.4, soft_margin=soft)(x, ids)
        else:
            d = (x[:, None] - x).square().sum(2).clamp(min=1e-12).sqrt()
            same = ids[:, None] == ids
            gap = d.masked_fill(~same, -torch.inf).amax(1) - d.masked_fill(same, torch.inf).amin(1) + 0.4
            loss = (F.softplus(gap) if soft else gap.relu()).mean()
        loss.backward()
        losses.append((loss, x.grad))
    for found, expected in zip(*losses, strict=True):
        assert_close(found, expected, 1e-10)


def test_circle() -> None:
    """The mean over the five anchors that have both kinds of pairs."""
    losses = []
    for ours in (True, False):
        x, ids = _batch(LABELS["unequal"])
        if ours:
            loss = boxmot.CircleLoss(margin=0.2, gamma=16)(x, ids)
        else:
            rows = F.normalize(x)
            s = rows @ rows.T
            same = (ids[:, None] == ids).fill_diagonal_(False)
            different = ids[:, None] != ids
            p = (-16 * (1.2 - s.detach()).relu() * (s - 0.8)).masked_fill(~same, -torch.inf)[:5]
            n = (16 * (s.detach() + 0.2).relu() * (s - 0.2)).masked_fill(~different, -torch.inf)[:5]
            loss = F.softplus(p.logsumexp(1) + n.logsumexp(1)).mean()
        loss.backward()
        losses.append((loss, x.grad))
    for found, expected in zip(*losses, strict=True):
        assert_close(found, expected, 1e-10)
    x, _ = _batch([0, 1, 2])
    lone = boxmot.CircleLoss()(x, torch.arange(3))
    lone.backward()
    assert lone == 0


def test_ranking() -> None:
    distances = np.array([[0.1, 0.2, 0.3, 0.4], [0.3, 0.2, 0.2, 0.9], [0.1, 0.2, 0.3, 0.4]])
    labels = [np.array(of) for of in ([7, 8, 9], [8, 7, 8, 7], [0, 0, 0], [0, 0, 1, 1])]
    cmc, average = boxmot.evaluate_ranking(distances, *labels, max_rank=9)
    # The first: 7 of camera 0 is left out, so 8, 8, 7; the second: 8 of camera 0 is, so 7, 8, 7; the third has none.
    np.testing.assert_allclose(cmc, [0, 0.5, 1, 1])
    assert cmc.dtype == np.float32
    assert average == pytest.approx((1 / 3 + 1 / 2) / 2)
    none = boxmot.evaluate_ranking(distances[2:], labels[0][2:], labels[1], labels[2][2:], labels[3])
    np.testing.assert_array_equal(none[0], np.zeros(4))
    assert none[1] == 0
    only_own_camera = boxmot.evaluate_ranking(distances, labels[0], labels[1], labels[2], labels[3] * 0)
    assert only_own_camera[1] == 0
    with pytest.raises(ValueError, match="query_ids"):
        boxmot.evaluate_ranking(distances[:2], *labels)


def test_boxmot_itself() -> None:
    losses = pytest.importorskip("boxmot.reid.training.losses")
    evaluator = pytest.importorskip("boxmot.reid.training.evaluator")
    x, ids = _batch(LABELS["pk"])
    for soft in (False, True):
        assert_close(boxmot.TripletLoss(0.2, soft)(x, ids), losses.TripletLoss(0.2, soft)(x, ids), 1e-10)
    assert_close(boxmot.CircleLoss()(x, ids), losses.CircleLoss()(x, ids), 1e-10)
    generator = np.random.default_rng(0)
    distances = generator.random((9, 60))
    labels = [generator.integers(high, size=n) for high in (4, 3) for n in (9, 60)]
    found, expected = (of.evaluate_ranking(distances, *labels) for of in (boxmot, evaluator))
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    assert found[1] == pytest.approx(expected[1], abs=1e-12)


@pytest.fixture
def oml(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Our module over OML, or, where that is not installed or knows no NumPy 2, over a class of its shape."""
    try:
        importlib.import_module("oml.miners.inbatch_hard_tri")
    except (ImportError, AttributeError):

        class HardTripletsMiner:
            def sample(self, features: Tensor, labels: Any) -> Any:
                return self._sample(features, labels)  # type: ignore[attr-defined]

        package, miners, module = (types.ModuleType(f"oml{end}") for end in ("", ".miners", ".miners.inbatch_hard_tri"))
        module.HardTripletsMiner = HardTripletsMiner  # type: ignore[attr-defined]
        miners.inbatch_hard_tri = module  # type: ignore[attr-defined]
        for of in (package, miners, module):
            monkeypatch.setitem(sys.modules, of.__name__, of)
    name = "apd_kernels.drop_in.oml"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    del sys.modules[name]


@pytest.mark.parametrize("as_list", [False, True])
def test_oml_miner(oml: Any, as_list: bool) -> None:
    x, ids = _batch([0, 0, 1, 1, 1, 2, 2])
    labels = ids.tolist() if as_list else ids
    d = torch.cdist(x, x)
    same = ids[:, None] == ids
    farthest = d.masked_fill(~same, -1).argmax(1).tolist()
    nearest = d.masked_fill(same, torch.inf).argmin(1).tolist()
    miner = oml.HardTripletsMiner()
    assert miner.sample(x, labels) == (list(range(7)), farthest, nearest)
    assert miner._sample_from_distmat(d, labels) == (list(range(7)), farthest, nearest)
    assert miner._sample(x, [0, 0, 0, 1, 2, 2, 2])[0] == [0, 1, 2, 4, 5, 6]
