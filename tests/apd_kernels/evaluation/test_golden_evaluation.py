"""Evaluation and re-ranking of other code bases: which test compares a file, or why none does; and PML's figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from golden_files import OTHERS
from places import TESTS
from test_ranking import _golden

from apd_kernels import RankMetrics, rank_metrics

RANKINGS = "test_ranking.py::test_golden_rankings"
LISTS = "test_ranking.py::test_golden_open_reid"
RERANKED = "test_rerank.py::test_golden_matrices"
JACCARD = "test_rerank.py::test_golden_jaccard"
COMPARED = {
    "bau_cmc": LISTS,
    "bau_mean_ap": LISTS,
    "clustercontrast_cmc": LISTS,
    "clustercontrast_mean_ap": LISTS,
    "clustercontrast_compute_jaccard_distance": JACCARD,
    "fastreid_aqe": "test_rerank.py::test_golden_expansion",
    "fastreid_compute_jaccard_distance": JACCARD,
    "fastreid_eval_cuhk03": RANKINGS,
    "fastreid_evaluate_cy": RANKINGS,
    "fastreid_evaluate_rank": RANKINGS,
    "fastreid_re_ranking": RERANKED,
    "layumi_evaluate": "test_ranking.py::test_golden_trapezoid",
    "layumi_re_ranking": "test_rerank.py::test_golden_similarities",
    "pml_AccuracyCalculator": "test_golden_evaluation.py::test_accuracy_calculator",
    "strongbaseline_eval_func": RANKINGS,
    "torchreid_eval_cuhk03": RANKINGS,
    "torchreid_evaluate_cy": RANKINGS,
    "torchreid_evaluate_rank": RANKINGS,
    "torchreid_re_ranking": RERANKED,
    "transreid_R1_mAP_eval": "test_ranking.py::test_golden_from_features",
    "transreid_eval_func": RANKINGS,
    "transreid_re_ranking": "test_rerank.py::test_golden_half_encodings",
}
NOT_COMPARED = {
    "fastreid_evaluate_roc": "scores and labels of all pairs, for a ROC curve: not a figure that the library has",
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
    "name", ["query_reference_k_none", "query_reference_k10", "query_reference_max_bin", "avg_of_avgs", "same_source"]
)
def test_accuracy_calculator(real_data: Path, name: str) -> None:
    """pytorch-metric-learning's mean average precision, mean reciprocal rank and precision at 1, of the metric it has
    by default. With k it looks at no more neighbours and still divides by all positives; then only the last two are
    ours. R-precision and MAP@R are not figures of the field; `same_source_k5` has nothing else in the file."""
    case = _golden(real_data, "pml_AccuracyCalculator")[name]
    own = torch.arange(len(case["query"])) if bool(case["ref_includes_query"]) else None
    query, query_ids = case["query"], case["query_labels"]
    gallery, gallery_ids = case.get("reference", query), case.get("reference_labels", query_ids)
    arguments = query, gallery, query_ids, gallery_ids
    result = rank_metrics(*arguments, metric="euclidean", exclude=own, max_rank=len(gallery))
    averaged = [of_query[result.valid] for of_query in (result.ap, *_of_each_query(result, arguments, own))]
    if bool(case["avg_of_avgs"]):
        ids = query_ids[result.valid]
        averaged = [torch.stack([values[ids == i].mean() for i in ids.unique()]) for values in averaged]
    average, reciprocal, first = (float(values.mean()) for values in averaged)
    if int(case["k"]) == -1:
        assert average == pytest.approx(float(case["mean_average_precision"]), abs=1e-6)
    if int(case["k"]) != 10:  # of ten neighbours
        assert reciprocal == pytest.approx(float(case["mean_reciprocal_rank"]), abs=1e-6)
    assert first == pytest.approx(float(case["precision_at_1"]), abs=1e-6)


def _of_each_query(
    result: RankMetrics, arguments: tuple[torch.Tensor, ...], own: torch.Tensor | None
) -> list[torch.Tensor]:
    """1 / rank of the first positive, and whether that is 1, from the CMC of each query alone."""
    query, gallery, query_ids, gallery_ids = arguments
    ranks = torch.full((len(query),), torch.inf, dtype=torch.float64)
    for i in result.valid.nonzero()[:, 0].tolist():
        alone = rank_metrics(query[[i]], gallery, query_ids[[i]], gallery_ids, metric="euclidean",
                             exclude=None if own is None else own[[i]], max_rank=len(gallery))  # fmt: skip
        ranks[i] = 1 + int((alone.cmc == 0).sum())
    return [1 / ranks, (ranks == 1).double()]
