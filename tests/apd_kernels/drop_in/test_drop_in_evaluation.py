"""Evaluation of torchreid and fast-reid, against outputs of their own functions, and their evaluators."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import golden_cases

from apd_kernels.drop_in import fastreid, torchreid

NAMES = ("q_pids", "g_pids", "q_camids", "g_camids")
PROJECTS = {"torchreid": torchreid, "fastreid": fastreid}


@pytest.mark.parametrize("function", ["evaluate_rank", "evaluate_cy"])
@pytest.mark.parametrize("project", PROJECTS)
def test_golden_rankings(real_data: Path, project: str, function: str) -> None:
    """Ties in the order of the gallery; Cython's figures are in float32."""
    error = 1e-6 if function == "evaluate_cy" else 1e-10
    for name, case in golden_cases(real_data, f"{project}_{function}"):
        labels = [case[key] for key in NAMES]
        found = PROJECTS[project].evaluate_rank(case["distmat"], *labels, max_rank=int(case["max_rank"]))
        assert isinstance(found[0], np.ndarray), name
        assert found[0].dtype == np.float32, name
        kept = len(case["cmc"])  # in one case Python's are shorter
        assert len(found[0]) == min(int(case["max_rank"]), case["distmat"].shape[1]) >= kept, name
        np.testing.assert_allclose(found[0][:kept], case["cmc"], atol=1e-6, err_msg=name)
        if project == "torchreid":
            assert found[1] == pytest.approx(float(case["mAP"]), abs=error), name
        else:
            assert [type(of) for of in found[1:]] == [list, list]
            np.testing.assert_allclose(found[1], case["all_AP"], rtol=0, atol=error, err_msg=name)
            np.testing.assert_allclose(found[2], case["all_INP"], rtol=0, atol=error, err_msg=name)


@pytest.mark.parametrize("project", PROJECTS)
def test_golden_single_shot(real_data: Path, project: str) -> None:
    """AP is of all images, exactly; the curve is drawn, exact where each identity has one image."""
    for name, case in golden_cases(real_data, f"{project}_eval_cuhk03"):
        curves = []
        for _ in range(2):
            np.random.seed(int(case["np_seed"]))  # noqa: NPY002
            cmc, average = PROJECTS[project].evaluate_rank(
                case["distmat"], *(case[key] for key in NAMES), int(case["max_rank"]), use_metric_cuhk03=True
            )
            curves.append(cmc)
        assert average == pytest.approx(float(case["mAP"]), abs=1e-10), name
        np.testing.assert_array_equal(*curves)
        theirs = case["cmc"]
        if name == "one_image_per_identity":
            np.testing.assert_allclose(cmc[: len(theirs)], theirs, atol=1e-6)
        else:  # ours draws once for all queries, ten times: a standard deviation of at most 0.5 / √10
            assert np.abs(cmc[: len(theirs)] - theirs).max() < 0.2
            np.random.seed(int(case["np_seed"]) + 1)  # noqa: NPY002
            other, _ = PROJECTS[project].evaluate_rank(
                case["distmat"], *(case[key] for key in NAMES), int(case["max_rank"]), use_metric_cuhk03=True
            )
            assert not np.array_equal(other, cmc)


@pytest.mark.parametrize("project", PROJECTS)
def test_golden_re_ranking(real_data: Path, project: str) -> None:
    for name, case in golden_cases(real_data, f"{project}_re_ranking"):
        options = {"k1": int(case["k1"]), "k2": int(case["k2"]), "lambda_value": float(case["lambda_value"])}
        matrices = [case[key] for key in ("q_g_dist", "q_q_dist", "g_g_dist")]
        mixed = [matrices[0].astype(np.float64), *map(torch.from_numpy, matrices[1:])]
        for given in (matrices, mixed):
            found = PROJECTS[project].re_ranking(*given, **options)
            assert isinstance(found, np.ndarray)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, case["final_dist"], atol=2e-6, err_msg=name)


def test_golden_jaccard(real_data: Path) -> None:
    for name, case in golden_cases(real_data, "fastreid_compute_jaccard_distance"):
        features, k1, k2 = torch.from_numpy(case["features"]), int(case["k1"]), int(case["k2"])
        found = fastreid.compute_jaccard_distance(features, k1, k2, search_option=3)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, case["jaccard"], atol=2e-5, err_msg=name)
        np.fill_diagonal(found, 0)
        block = fastreid.build_dist(features[:20], features[20:], "jaccard", k1=k1, k2=k2)
        np.testing.assert_allclose(block, found[:20, 20:], atol=1e-6)
        half = fastreid.compute_jaccard_distance(features, k1, k2, 3, fp16=True)
        assert half.dtype == np.float16
        np.testing.assert_allclose(half, found, atol=6e-3)


def test_golden_expansion(real_data: Path) -> None:
    for name, case in golden_cases(real_data, "fastreid_aqe"):
        query, gallery = (torch.from_numpy(case[f"{side}_feat"]) for side in ("query", "gallery"))
        found = fastreid.aqe(query, gallery, int(case["qe_times"]), int(case["qe_k"]), float(case["alpha"]))
        for ours, side in zip(found, ("query", "gallery"), strict=True):
            np.testing.assert_allclose(ours, case[f"out_{side}"], rtol=1e-5, atol=1e-6, err_msg=name)


def test_golden_verification(real_data: Path) -> None:
    for name, case in golden_cases(real_data, "fastreid_evaluate_roc"):
        scores, labels = fastreid.evaluate_roc(case["distmat"], *(case[key] for key in NAMES))
        np.testing.assert_array_equal(labels, case["labels"], err_msg=name)
        # A query's own distances are in order, there as here.
        np.testing.assert_array_equal(scores, case["scores"], err_msg=name)


def _data(queries: int = 12, images: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(queries, 16, generator=generator)
    gallery = torch.randn(images, 16, generator=generator)
    labels = [torch.randint(high, (n,), generator=generator) for high in (6, 3) for n in (queries, images)]
    gallery += query[:1] * labels[1][:, None] / 3
    return query, gallery, labels


@pytest.mark.parametrize("project", PROJECTS)
def test_odd_matrices(project: str) -> None:
    """float64, reversed, transposed, half, tensors, lists of labels, −1 as an identity: as the plain matrix."""
    query, gallery, labels = _data()
    labels[0][:3] = labels[1][:9] = -1
    matrix = torch.cdist(query, gallery).half().float()
    plain = PROJECTS[project].evaluate_rank(matrix.numpy(), *(of.numpy() for of in labels))
    mean = plain[1] if project == "torchreid" else np.mean(plain[1])
    assert project == "torchreid" or len(plain[1]) == len(query)  # the three of identity −1, too
    reversed_labels = [labels[0].numpy()[::-1], labels[1].numpy(), labels[2].numpy()[::-1], labels[3].numpy()]
    for distances, of in (
        (matrix.double().numpy(), labels),
        (matrix.half(), labels),
        (np.asfortranarray(matrix.numpy()), [part.int() for part in labels]),
        (matrix, [part.tolist() for part in labels]),
        (matrix.numpy()[::-1], reversed_labels),
    ):
        found = PROJECTS[project].evaluate_rank(distances, *of)
        np.testing.assert_allclose(found[0], plain[0], atol=1e-6)
        assert (found[1] if project == "torchreid" else np.mean(found[1])) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("project", PROJECTS)
def test_nothing_to_count_is_said(project: str) -> None:
    query, gallery, labels = _data()
    matrix = torch.cdist(query, gallery)
    evaluate_rank = PROJECTS[project].evaluate_rank
    with pytest.raises(ValueError, match="query_ids"):
        evaluate_rank(matrix, labels[0] + 100, *labels[1:])
    one_camera = labels[2] * 0, labels[3] * 0
    with pytest.raises(ValueError, match="camera"):
        evaluate_rank(matrix, *labels[:2], *one_camera)
    with pytest.raises(ValueError, match="query"):
        evaluate_rank(matrix[:0], labels[0][:0], labels[1], labels[2][:0], labels[3])
    with pytest.raises(TypeError, match="q_pids: expected numbers"):
        evaluate_rank(matrix, ["a"] * 12, *labels[1:])
    with pytest.raises(ValueError, match="NaN"):
        evaluate_rank(matrix * torch.nan, *labels)


def _engine(query: torch.Tensor, gallery: torch.Tensor, labels: list[torch.Tensor]) -> tuple[Any, dict[str, Any]]:
    """An engine in torchreid's style, with its class in a module of its own, and its loaders."""

    class Engine:
        use_gpu = False

        def parse_data_for_eval(self, data: Any) -> Any:
            return data

        def extract_features(self, images: torch.Tensor) -> torch.Tensor:
            return images * 2

        _evaluate = torchreid.evaluate

    def loader(features: torch.Tensor, pids: torch.Tensor, camids: torch.Tensor) -> list[Any]:
        return [(features[at], pids[at], camids[at]) for at in (slice(0, 5), slice(5, None))]

    loaders = {
        "query_loader": loader(query, labels[0], labels[2]),
        "gallery_loader": loader(gallery, labels[1], labels[3]),
    }
    return Engine(), loaders


@pytest.mark.parametrize("rerank", [False, True], ids=["plain", "re-ranked"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("single_shot", [False, True], ids=["all", "single shot"])
def test_torchreid_engine(metric: str, rerank: bool, single_shot: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of the matrix, as the engine's own steps make it."""
    query, gallery, labels = _data()
    engine, loaders = _engine(query, gallery, labels)
    np.random.seed(4)  # noqa: NPY002
    found = engine._evaluate(
        "market", **loaders, dist_metric=metric, use_metric_cuhk03=single_shot, rerank=rerank, normalize_feature=True
    )
    unit = [torch.nn.functional.normalize(of) for of in (query, gallery)]
    matrix = torchreid.compute_distance_matrix(*unit, metric).numpy()
    if rerank:
        own = [torchreid.compute_distance_matrix(of, of, metric) for of in unit]
        matrix = torchreid.re_ranking(matrix, *own)
    np.random.seed(4)  # noqa: NPY002
    cmc, average = torchreid.evaluate_rank(matrix, *(of.numpy() for of in labels), use_metric_cuhk03=single_shot)
    assert found == (pytest.approx(cmc[0], abs=1e-6), pytest.approx(average, abs=1e-6))
    assert f"mAP: {average:.1%}" in capsys.readouterr().out


def test_torchreid_pictures_get_a_matrix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    query, gallery, labels = _data()
    engine, loaders = _engine(query, gallery, labels)
    seen = {}

    def visualize_ranked_results(distmat: Any, dataset: Any, data_type: str, **options: Any) -> None:
        seen.update(options, shape=distmat.shape, order=np.argsort(distmat, axis=1), first=distmat[0])

    module = types.ModuleType("their_engine")
    module.visualize_ranked_results = visualize_ranked_results  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_engine", module)
    type(engine).__module__ = "their_engine"
    engine.datamanager = types.SimpleNamespace(
        fetch_test_loaders=lambda name: ([], []), data_type="image", width=8, height=16
    )
    engine._evaluate("market", **loaders, visrank=True, save_dir=str(tmp_path))
    matrix = torch.cdist(query * 2, gallery * 2) ** 2
    assert seen["shape"] == (12, 60)
    np.testing.assert_array_equal(seen["order"], matrix.argsort(dim=1))
    np.testing.assert_allclose(seen["first"], matrix[0], rtol=1e-4)
    assert seen["save_dir"].endswith("visrank_market")


class _Comm(types.ModuleType):
    """`fastreid.utils.comm` of two processes, seen from one."""

    def __init__(self, size: int, others: list[Any], rank: int = 0) -> None:
        super().__init__("fastreid.utils.comm")
        self.size, self.others, self.rank = size, others, rank

    def get_world_size(self) -> int:
        return self.size

    def synchronize(self) -> None: ...

    def gather(self, data: Any, dst: int) -> list[Any]:
        return [data, self.others] if self.rank == dst else []

    def is_main_process(self) -> bool:
        return self.rank == 0


def _fast_reid_evaluator(metric: str, **enabled: Any) -> Any:
    query, gallery, labels = _data()
    parts = [(query, labels[0], labels[2]), (gallery, labels[1], labels[3])]
    predictions = [dict(zip(("feats", "pids", "camids"), part, strict=True)) for part in parts]
    test = {
        "METRIC": metric,
        "AQE": {"ENABLED": False, "QE_TIME": 1, "QE_K": 5, "ALPHA": 3.0},
        "RERANK": {"ENABLED": False, "K1": 8, "K2": 3, "LAMBDA": 0.3},
        "ROC": {"ENABLED": False},
    }
    for name in enabled:
        test[name]["ENABLED"] = True  # type: ignore[index]
    spaces = {key: types.SimpleNamespace(**value) if isinstance(value, dict) else value for key, value in test.items()}

    class ReidEvaluator:
        evaluate = fastreid.evaluate

        def __init__(self) -> None:
            self.cfg = types.SimpleNamespace(TEST=types.SimpleNamespace(**spaces))
            self._num_query, self._predictions = len(query), predictions

    return ReidEvaluator()


def _with_comm(monkeypatch: pytest.MonkeyPatch, comm: _Comm) -> None:
    package, utils = types.ModuleType("fastreid"), types.ModuleType("fastreid.utils")
    utils.comm = comm  # type: ignore[attr-defined]
    for module in (package, utils, comm):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("switches", [(), ("AQE",), ("RERANK",), ("ROC",), ("AQE", "RERANK", "ROC")], ids="+".join)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_fast_reid_evaluator(metric: str, switches: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of the matrix, made step by step as `ReidEvaluator` does."""
    if "ROC" in switches:
        pytest.importorskip("sklearn")
    _with_comm(monkeypatch, _Comm(1, []))
    evaluator = _fast_reid_evaluator(metric, **dict.fromkeys(switches, True))
    found = evaluator.evaluate()
    query, gallery, labels = _data()
    if "AQE" in switches:
        query, gallery = fastreid.aqe(query, gallery, 1, 5, 3.0)
    matrix = fastreid.build_dist(query, gallery, metric)
    if "RERANK" in switches:
        if metric == "cosine":
            query, gallery = (torch.nn.functional.normalize(of) for of in (query, gallery))
        jaccard = fastreid.build_dist(query, gallery, "jaccard", k1=8, k2=3)
        matrix = jaccard * (1 - 0.3) + matrix * 0.3
    cmc, averages, inverses = fastreid.evaluate_rank(matrix, *(of.numpy() for of in labels))
    expected = {f"Rank-{rank}": cmc[rank - 1] * 100 for rank in (1, 5, 10)}
    expected |= {"mAP": np.mean(averages) * 100, "mINP": np.mean(inverses) * 100}
    expected["metric"] = (np.mean(averages) + cmc[0]) / 2 * 100
    if "ROC" in switches:
        from sklearn.metrics import roc_curve

        scores, different = fastreid.evaluate_roc(matrix, *(of.numpy() for of in labels))
        rates, accepted, _ = roc_curve(different, scores)
        for name, rate in (("1e-04", 1e-4), ("1e-03", 1e-3), ("1e-02", 1e-2)):
            expected[f"TPR@FPR={name}"] = accepted[np.argmin(np.abs(rates - rate))]
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-4), name
    assert evaluator._results == found


def test_fast_reid_evaluator_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = _fast_reid_evaluator("cosine")
    _with_comm(monkeypatch, _Comm(1, []))
    alone = evaluator.evaluate()
    evaluator._predictions, others = evaluator._predictions[:1], evaluator._predictions[1:]
    _with_comm(monkeypatch, _Comm(2, others))
    assert evaluator.evaluate() == alone
    _with_comm(monkeypatch, _Comm(2, others, rank=1))
    monkeypatch.setattr(sys.modules["fastreid.utils.comm"], "gather", lambda data, dst: [])
    assert evaluator.evaluate() == {}


def test_evaluators_make_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a matrix of queries and gallery")

    monkeypatch.setattr(torchreid, "pairwise_distance", refuse)
    monkeypatch.setattr(fastreid, "pairwise_distance", refuse)
    monkeypatch.setattr("apd_kernels.evaluation.rerank.RerankedDistances.dense", refuse)
    _with_comm(monkeypatch, _Comm(1, []))
    for switches in ((), ("RERANK",)):
        _fast_reid_evaluator("euclidean", **dict.fromkeys(switches, True)).evaluate()
    engine, loaders = _engine(*_data())
    for rerank in (False, True):
        engine._evaluate("market", **loaders, rerank=rerank)
