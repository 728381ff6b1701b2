"""The demonstration: what it writes, and that its figures mean what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("faiss")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from apd.cli import app
from apd.demo import DOMAINS, EPSILONS, flipped_share, generate_features, nearest_is_right
from apd.features import load_features
from apd_kernels import Gallery


def test_flipped_share() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2])
    before = torch.tensor([[0.0], [1.0], [5.0], [6.0], [9.0]])
    assert nearest_is_right(before, labels).tolist() == [True, True, True, True, False]
    assert flipped_share(before, before, labels) == 0
    after = torch.tensor([[0.0], [4.0], [5.5], [6.0], [8.0]])  # row 1 of the four now lies nearest to row 2
    assert flipped_share(before, after, labels) == 0.25


def test_generated_features_are_seeded() -> None:
    one, again, other = (generate_features(DOMAINS[0], seed) for seed in (0, 0, 1))
    assert all((one[name] == again[name]).all() for name in one)
    assert not (one["features"] == other["features"]).all()
    assert (one["features"] >= 0).all()
    assert not (one["features"] == generate_features(DOMAINS[1], 0)["features"][: len(one["features"])]).all()


def test_demo(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "demo"
    result = CliRunner().invoke(app, ["demo", "--output", str(folder)])
    assert result.exit_code == 0, result.output
    figures = json.loads((folder / "demo.json").read_text())
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    for file in (folder / "demo.png", folder / "demo.json", *(folder / f"{domain.name}.npz" for domain in DOMAINS)):
        assert f"wrote {file}" in result.output
    assert not list(folder.glob("*tmp*"))
    assert set(figures["seconds"]) == {"features", "evaluation", "gallery", "perturbation", "plot"}
    for domain in DOMAINS:
        found = figures["domains"][domain.name]
        assert f"{found['evaluation']['mAP']:.3f}" in result.output
        assert 0.2 < found["evaluation"]["mAP"] < 0.9
        assert found["rank1_by_search"] == pytest.approx(found["evaluation"]["cmc"]["1"], abs=1e-12)
        # The ascent flips ever more neighbours as the ball grows, far more than random steps as long.
        assert found["flipped"] == sorted(found["flipped"])
        assert len(found["flipped"]) == len(EPSILONS)
        assert found["flipped"][0] > 0.1
        assert found["flipped"][-1] > 3 * found["flipped_by_noise"][-1]
        rows = load_features(folder / f"{domain.name}.npz")
        assert len(Gallery.load(folder / f"{domain.name}_gallery")) == (rows.split == 2).sum()
        assert len(np.unique(rows.identities())) == domain.identities
