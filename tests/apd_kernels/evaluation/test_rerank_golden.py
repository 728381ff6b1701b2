"""Re-ranking, Jaccard distances and query expansion against outputs of other projects, and on real features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_rerank import squared
from test_rerank import assert_close

from apd_kernels import (
    jaccard_distance,
    k_reciprocal_rerank,
    k_reciprocal_rerank_from_distances,
    query_expansion,
    rank_metrics,
)

pytestmark = [pytest.mark.oldest, pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")]


def _golden(folder: Path, file: str) -> dict[str, dict[str, Any]]:
    """The arrays of each case."""
    arrays = np.load(folder / "golden" / f"{file}.npz")
    cases: dict[str, dict[str, Any]] = {}
    for key in arrays.files:
        case, _, name = key.partition("__")
        if name:
            value = torch.from_numpy(np.atleast_1d(arrays[key]))
            cases.setdefault(case, {})[name] = value if arrays[key].ndim else value.item()
    return cases


@pytest.mark.parametrize("peer", ["torchreid", "fastreid"])
def test_golden_matrices(real_data: Path, peer: str) -> None:
    for name, case in _golden(real_data, f"{peer}_re_ranking").items():
        matrices = (case[key] for key in ("q_g_dist", "q_q_dist", "g_g_dist"))
        found = k_reciprocal_rerank_from_distances(*matrices, **{k: case[k] for k in ("k1", "k2", "lambda_value")})
        assert_close(found.dense(), case["final_dist"], 1e-6, name)


def test_golden_similarities(real_data: Path) -> None:
    """layumi takes similarities and makes 2 − 2s of them."""
    for name, case in _golden(real_data, "layumi_re_ranking").items():
        matrices = (2 - 2 * case[key] for key in ("q_g_sim", "q_q_sim", "g_g_sim"))
        found = k_reciprocal_rerank_from_distances(*matrices, **{k: case[k] for k in ("k1", "k2", "lambda_value")})
        assert_close(found.dense(), case["final_dist"], 1e-6, name)


def test_golden_half_encodings(real_data: Path) -> None:
    """float16 sums are taken in the same order, so few results differ: where a weight's last bit did."""
    for name, case in _golden(real_data, "transreid_re_ranking").items():
        options = {k: case[k] for k in ("k1", "k2", "lambda_value")}
        found = k_reciprocal_rerank(case["prob_feat"], case["gal_feat"], variant="transreid", **options)
        assert_close(found.dense(), case["final_dist"], 5e-4, name)
        assert float(((found.dense() - case["final_dist"]).abs() > 1e-6).float().mean()) < 0.02, name
        exact = k_reciprocal_rerank(case["prob_feat"], case["gal_feat"], **options)
        assert_close(exact.dense(), case["final_dist"], 4e-3, name)


def test_golden_local_distances(real_data: Path) -> None:
    """TransReID's `local_distmat` is added to its squares: so are matrices, which it has anyway."""
    case = _golden(real_data, "transreid_re_ranking")["default"]
    options = {k: case[k] for k in ("k1", "k2", "lambda_value")}
    sets = case["prob_feat"], case["gal_feat"]
    squares = torch.from_numpy(squared(torch.cat(sets))).float()
    count = len(sets[0])
    parts = squares[:count, count:], squares[:count, :count], squares[count:, count:]
    found = k_reciprocal_rerank_from_distances(*parts, variant="transreid", **options)
    assert_close(found.dense(), case["final_dist"], 5e-4)
    halves = (part / 2 + part / 2 for part in parts)
    assert torch.equal(
        k_reciprocal_rerank_from_distances(*halves, variant="transreid", **options).dense(), found.dense()
    )


def test_golden_evaluation(real_data: Path) -> None:
    case = _golden(real_data, "transreid_R1_mAP_eval")["rerank"]
    count = case["num_query"]
    sizes = [count, len(case["feats"]) - count]
    query, gallery, *labels = (part for key in ("feats", "pids", "camids") for part in case[key].split(sizes))
    if case["feat_norm"]:
        query, gallery = (torch.nn.functional.normalize(x) for x in (query, gallery))
    found = k_reciprocal_rerank(query, gallery, k1=50, k2=15, variant="transreid")
    assert_close(found.dense(), case["distmat"], 1e-3)
    result = found.rank_metrics(*labels)
    assert result.mAP == pytest.approx(case["mAP"], abs=1e-3)
    assert_close(result.cmc, case["cmc"], 1e-6)


@pytest.mark.parametrize("peer", ["clustercontrast", "fastreid"])
def test_golden_jaccard(real_data: Path, peer: str) -> None:
    for name, case in _golden(real_data, f"{peer}_compute_jaccard_distance").items():
        found = jaccard_distance(case["features"], k1=case["k1"], k2=case["k2"])
        assert_close(found, case["jaccard"], 1e-6, name)


def test_golden_expansion(real_data: Path) -> None:
    for name, case in _golden(real_data, "fastreid_aqe").items():
        options = {"k": case["qe_k"], "alpha": case["alpha"], "times": case["qe_times"]}
        found = query_expansion(case["query_feat"], case["gallery_feat"], **options)
        assert_close(found.query, case["out_query"], 1e-6, name)
        assert_close(found.gallery, case["out_gallery"], 1e-6, name)


@pytest.mark.parametrize("name", ["cuhk03", "market_mini"])
def test_real_features_gain(real_data: Path, name: str) -> None:
    """Re-ranking raises mAP on real features, as it does in the paper."""
    file = np.load(real_data / "data" / "features" / f"osnet_{name}.npz")
    features, ids, cams = (torch.from_numpy(file[key]) for key in ("features", "pids", "camids"))
    query, gallery = (torch.from_numpy(file["split"] == split) for split in (1, 2))
    x = torch.nn.functional.normalize(features.float())
    labels = ids[query], ids[gallery], cams[query], cams[gallery]
    before = rank_metrics(x[query], x[gallery], *labels)
    after = k_reciprocal_rerank(x[query], x[gallery]).rank_metrics(*labels)
    assert after.mAP > before.mAP
