"""Evaluation and re-ranking of other code bases: which test compares a file, or why none does; and PML's figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from golden_files import OTHERS
from places import TESTS
from test_ranking import _golden

from apd_kernels import positive_ranks

RANKINGS = "test_ranking.py::test_golden_rankings"
LISTS = "test_ranking.py::test_golden_open_reid"
RERANKED = "test_rerank_golden.py::test_golden_matrices"
JACCARD = "test_rerank_golden.py::test_golden_jaccard"
COMPARED = {
    "bau_cmc": LISTS,
    "bau_mean_ap": LISTS,
    "clustercontrast_cmc": LISTS,
    "clustercontrast_mean_ap": LISTS,
    "clustercontrast_compute_jaccard_distance": JACCARD,
    "fastreid_aqe": "test_rerank_golden.py::test_golden_expansion",
    "fastreid_compute_jaccard_distance": JACCARD,
    "fastreid_eval_cuhk03": RANKINGS,
    "fastreid_evaluate_cy": RANKINGS,
    "fastreid_evaluate_rank": RANKINGS,
    "fastreid_evaluate_roc": "test_ranking.py::test_golden_verification",
    "fastreid_re_ranking": RERANKED,
    "layumi_evaluate": "test_ranking.py::test_golden_trapezoid",
    "layumi_re_ranking": "test_rerank_golden.py::test_golden_similarities",
    "pml_AccuracyCalculator": "test_golden_evaluation.py::test_accuracy_calculator",
    "strongbaseline_eval_func": RANKINGS,
    "torchreid_eval_cuhk03": RANKINGS,
    "torchreid_evaluate_cy": RANKINGS,
    "torchreid_evaluate_rank": RANKINGS,
    "torchreid_re_ranking": RERANKED,
    "transreid_R1_mAP_eval": "test_ranking.py::test_golden_from_features",
    "transreid_eval_func": RANKINGS,
    "transreid_re_ranking": "test_rerank_golden.py::test_golden_half_encodings",
}
NOT_COMPARED = {
    "strongbaseline_CrossEntropyLabelSmooth": "torch.nn.functional.cross_entropy(label_smoothing=0.1)",
}


def test_every_file_is_compared_or_has_a_reason(real_data: Path) -> None:
    names = {path.stem for path in (real_data / "golden").glob("*.npz")}
    assert {name for name in names if re.fullmatch(OTHERS, name.partition("_")[2])} == {*COMPARED, *NOT_COMPARED}
    for name, place in COMPARED.items():
        file, test = place.split("::")
        text = next(TESTS.rglob(file)).read_text()
        assert f"def {test}(" in text
        peer, _, function = name.partition("_")
        assert any(f'"{use}"' in text for use in (name, f"{{peer}}_{function}", function)), name
        assert peer in text, name


@pytest.mark.parametrize(
    "name",
    [
        "query_reference_k_none",
        "query_reference_k10",
        "query_reference_max_bin",
        "avg_of_avgs",
        "same_source",
        "same_source_k5",
    ],
)
def test_accuracy_calculator(real_data: Path, name: str) -> None:
    """pytorch-metric-learning's figures of the metric it has by default. With k it looks at no more neighbours: its
    mean average precision divides by all positives still, and leaves the others out."""
    case = _golden(real_data, "pml_AccuracyCalculator")[name]
    own = torch.arange(len(case["query"])) if bool(case["ref_includes_query"]) else None
    query, query_ids = case["query"], case["query_labels"]
    gallery, gallery_ids = case.get("reference", query), case.get("reference_labels", query_ids)
    ranks = positive_ranks(query, gallery, query_ids, gallery_ids, metric="euclidean", exclude=own)
    valid = ranks.positives > 0
    k = int(case["k"])
    if k == -2:  # as many as the largest identity has, in all of the gallery
        k = int(gallery_ids.unique(return_counts=True)[1].max())
    k = k if k > 0 else len(gallery)
    precision = torch.where(ranks.rank <= k, ranks.hit / ranks.rank.double(), 0)
    average = torch.bincount(ranks.query, weights=precision, minlength=len(query)) / ranks.positives
    figures = {
        "mean_average_precision": average,
        "mean_reciprocal_rank": ranks.reciprocal_rank(k),
        "precision_at_1": (ranks.reciprocal_rank() == 1).double(),
        "r_precision": ranks.r_precision(),
        "mean_average_precision_at_r": ranks.ap_at_r(),
    }
    for figure, values in figures.items():
        if figure not in case:
            continue
        kept = values[valid]
        if bool(case["avg_of_avgs"]):
            ids = query_ids[valid]
            kept = torch.stack([kept[ids == i].mean() for i in ids.unique()])
        assert float(kept.mean()) == pytest.approx(float(case[figure]), abs=1e-6), figure
