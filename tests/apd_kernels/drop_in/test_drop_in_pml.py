"""Subclasses of pytorch-metric-learning's classes: against golden outputs and against the classes themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import golden_cases
from oracle import assert_close, leaf
from torch import Tensor

pml = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402
from pytorch_metric_learning.utils import accuracy_calculator  # noqa: E402
from pytorch_metric_learning.utils.inference import CustomKNN  # noqa: E402

from apd_kernels.drop_in import pytorch_metric_learning as ours  # noqa: E402

KINDS = [pytest.param(torch.float64, 1e-10, id="float64"), pytest.param(torch.float32, 1e-5, id="float32")]
DISTANCES = {
    "default_lp_normalised": lambda: ours.LpDistance(),
    "lp_unnormalised": lambda: ours.LpDistance(normalize_embeddings=False),
    "cosine": lambda: distances.CosineSimilarity(),
    "lp_power2": lambda: ours.LpDistance(power=2),
}


def _batch(n: int = 40, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 16, generator=generator, dtype=dtype), torch.randint(8, (n,), generator=generator)


def _number(tag: str, name: str) -> float:
    found = re.search(rf"_{name}([\d.]+)", tag)
    assert found is not None
    return float(found[1])


@pytest.fixture(autouse=True)
def few_pairs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our operations for batches of any size; `test_few_pairs_on_the_cpu` puts the limits back."""
    for name in ("PAIRS_ON_CPU", "CIRCLE_PAIRS_ON_CPU"):
        monkeypatch.setattr(ours, name, 0)


@pytest.fixture
def never_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the base classes is not to run."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the base class's own code")

    monkeypatch.setattr(losses.CircleLoss, "_compute_loss", refuse)
    monkeypatch.setattr(miners.BatchEasyHardMiner, "mine", refuse)
    monkeypatch.setattr(torch, "cdist", refuse)


def test_golden_miner(real_data: Path, never_the_base: None) -> None:
    for case, arrays in golden_cases(real_data, "pml_BatchHardMiner"):
        labels, y_labels = (torch.from_numpy(arrays[name]) for name in ("labels", "ref_labels"))
        for dtype in (torch.float64, torch.float32):
            x, y = (torch.from_numpy(arrays[name]).to(dtype) for name in ("embeddings", "ref_emb"))
            for key, distance in DISTANCES.items():
                found = ours.BatchHardMiner(distance=distance())(x, labels)
                for index, which in zip(found, "apn", strict=True):
                    assert torch.equal(index, torch.from_numpy(arrays[f"{key}_{which}"])), f"{key} {case}"
            found = ours.BatchHardMiner()(x, labels, y, y_labels)
            for index, which in zip(found, "apn", strict=True):
                assert torch.equal(index, torch.from_numpy(arrays[f"ref_{which}"])), f"ref {case}"


def _agree(x: Tensor, loss: Tensor, arrays: dict[str, Any], tag: str, limit: float, what: str) -> None:
    loss.backward()
    assert_close(loss, torch.from_numpy(np.asarray(arrays[f"loss{tag}_f64"])), limit, what)
    gradient = torch.from_numpy(arrays[f"grad{tag}_f64"])
    # PyTorch's softplus, which they take, is the identity from 20 on: 2e-9 off in its derivative.
    assert_close(x.grad, gradient, max(10 * limit, 5e-9), f"gradient of {what}", scale=1e-3)


@pytest.mark.parametrize(("dtype", "relative"), KINDS)
def test_golden_circle(real_data: Path, dtype: torch.dtype, relative: float, never_the_base: None) -> None:
    for case, arrays in golden_cases(real_data, "pml_CircleLoss"):
        for key in [key for key in arrays if key.startswith("loss") and key.endswith("_f64")]:
            tag = key.removeprefix("loss").removesuffix("_f64")
            x = leaf(torch.from_numpy(arrays["embeddings"]), "cpu", dtype)
            loss = ours.CircleLoss(m=_number(tag, "m"), gamma=_number(tag, "g"))
            _agree(x, loss(x, torch.from_numpy(arrays["labels"])), arrays, tag, relative, f"{case} {tag}")


@pytest.mark.parametrize(("dtype", "relative"), KINDS)
def test_golden_triplets(real_data: Path, dtype: torch.dtype, relative: float) -> None:
    for case, arrays in golden_cases(real_data, "pml_TripletMarginLoss"):
        for key in [key for key in arrays if key.startswith("loss") and key.endswith("_f64")]:
            tag = key.removeprefix("loss").removesuffix("_f64")
            distance = distances.CosineSimilarity() if "cosine" in tag else None
            distance = distance or ours.LpDistance(normalize_embeddings="unnorm" not in tag)
            loss = ours.TripletMarginLoss(
                margin=_number(tag, "m"), swap="swap" in tag, smooth_loss="smooth" in tag, distance=distance
            )
            hard = "batchhard" in tag
            limit = relative
            if case == "pk_near_duplicates" and not hard and distance.p == 2 and not distance.is_inverted:
                if dtype == torch.float32:
                    continue  # distances of 1e-4 out of float32 products are rounding, there and here
                limit = 1e-7  # and of float64 ones it is 5e-9 of them
            elif case == "pk_near_duplicates":
                limit = max(limit, 1e-7)
            x, labels = leaf(torch.from_numpy(arrays["embeddings"]), "cpu", dtype), torch.from_numpy(arrays["labels"])
            mined = ours.BatchHardMiner(distance=distance)(x, labels) if hard else None
            _agree(x, loss(x, labels, mined), arrays, tag, limit, f"{case} {tag}")


@pytest.mark.parametrize("case", ["contrastive", "triplet_margin0.3", "circle", "contrastive_batchhard"])
def test_golden_memory(real_data: Path, case: str) -> None:
    arrays = dict(golden_cases(real_data, "pml_CrossBatchMemory"))[case]
    lp = ours.LpDistance()
    loss = {
        "contrastive": losses.ContrastiveLoss(distance=lp),
        "triplet_margin0.3": ours.TripletMarginLoss(margin=0.3, distance=lp),
        "circle": ours.CircleLoss(m=0.4, gamma=80),
        "contrastive_batchhard": losses.ContrastiveLoss(distance=lp),
    }[case]
    miner = ours.BatchHardMiner(distance=lp) if case.endswith("batchhard") else None
    memory = ours.CrossBatchMemory(loss, 32, memory_size=int(arrays["memory_size"]), miner=miner)
    for step in range(1, 6):
        x = leaf(torch.from_numpy(arrays[f"embeddings{step}"]), "cpu", torch.float64)
        found = {f"{key}_f64": arrays[f"{key}{step}_f64"] for key in ("loss", "grad")}
        _agree(x, memory(x, torch.from_numpy(arrays[f"labels{step}"])), found, "", 1e-10, f"{case} {step}")
        assert memory.queue_idx == int(arrays[f"queue_idx{step}"])
    assert_close(memory.embedding_memory, torch.from_numpy(arrays["memory_after5_f64"]), 1e-12)


def test_a_memory_of_circles_lists_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with rows that are only enqueued."""
    batches = [(*_batch(25, seed=step), torch.arange(25) < 20 if step == 3 else None) for step in range(5)]

    def run(module: Any) -> list[float]:
        memory = module.CrossBatchMemory(module.CircleLoss(), 16, memory_size=60)
        return [memory(x, labels, enqueue_mask=mask).item() for x, labels, mask in batches]

    expected = run(losses)
    monkeypatch.setattr(losses.CrossBatchMemory, "create_indices_tuple", None)
    monkeypatch.setattr(losses.CircleLoss, "_compute_loss", None)
    assert run(ours) == pytest.approx(expected, rel=1e-10)


REDUCERS = {
    "mean": lambda: reducers.MeanReducer(),
    "nothing": lambda: reducers.DoNothingReducer(),
    "threshold": lambda: reducers.ThresholdReducer(low=0.1, high=60),
    "class weights": lambda: reducers.ClassWeightedReducer(torch.arange(1, 9).double()),
}


@pytest.mark.parametrize("reducer", REDUCERS)
def test_reducers_are_respected(reducer: str) -> None:
    x, labels = _batch()
    found = ours.CircleLoss(reducer=REDUCERS[reducer]())(x, labels)
    expected = losses.CircleLoss(reducer=REDUCERS[reducer]())(x, labels)
    if reducer == "nothing":
        found, expected = (of["loss"]["losses"].sum() for of in (found, expected))
    assert_close(found, expected, 1e-10)


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("distance", [*DISTANCES, "dot"])
def test_mined_triplets(distance: str, smooth: bool, reducer: str) -> None:
    """Through miner, loss and reducer, with a reference and without, and with a regularizer."""
    of_distance = DISTANCES.get(distance, lambda: distances.DotProductSimilarity(normalize_embeddings=False))
    y, y_labels = _batch(70, seed=1)
    for others in ((), (y, y_labels)):
        results = []
        for module_miners, module_losses in ((ours, ours), (miners, losses)):
            x, labels = _batch()
            x.requires_grad_()
            mined = module_miners.BatchHardMiner(distance=of_distance())(x.detach(), labels, *others)
            loss = module_losses.TripletMarginLoss(
                margin=0.3,
                smooth_loss=smooth,
                distance=of_distance(),
                reducer=REDUCERS[reducer](),
                embedding_regularizer=regularizers.LpRegularizer(),
            )(x, labels, mined, *others)
            if reducer == "nothing":
                loss = loss["loss"]["losses"].sum()
            loss.backward()
            results.append((*mined, loss, x.grad))
        for found, expected in zip(*results, strict=True):
            assert_close(found, expected, 1e-8)


def test_statistics_are_kept() -> None:
    x, labels = _batch()
    for of_distance in (lambda: distances.LpDistance(), lambda: distances.CosineSimilarity()):
        both = [of(distance=of_distance(), collect_stats=True) for of in (ours.BatchHardMiner, miners.BatchHardMiner)]
        for miner in both:
            miner.distance.collect_stats = False
            miner(x, labels)
        for name in ("num_triplets", "hardest_triplet", "easiest_triplet", "hardest_pos_pair", "easiest_neg_pair"):
            assert getattr(both[0], name) == pytest.approx(getattr(both[1], name), rel=1e-6), name


@pytest.mark.parametrize("kind", ["float labels", "other norm", "cube", "statistics", "ranges", "index tuple", "swap"])
def test_the_base_has_the_rest(kind: str) -> None:
    x, labels = _batch()
    distance = {
        "other norm": lambda: distances.LpDistance(p=1),
        "cube": lambda: distances.LpDistance(power=3),
        "statistics": lambda: distances.LpDistance(collect_stats=True),
    }.get(kind, lambda: distances.LpDistance())
    if kind == "float labels":
        labels = labels.double() + 0.5
    ranges = {"allowed_neg_range": (0.2, 1.3)} if kind == "ranges" else {}
    found, expected = [], []
    for results, of_miners, of_losses in ((found, ours, ours), (expected, miners, losses)):
        miner = of_miners.BatchHardMiner(distance=distance(), **ranges)
        mined = miner(x, labels)
        results += [*mined, of_losses.TripletMarginLoss(distance=distance(), swap=kind == "swap")(x, labels, mined)]
        results.append(of_losses.CircleLoss()(x, labels, mined if kind == "index tuple" else None))
        results.append(torch.tensor(miner.distance.final_avg_query_norm if kind == "statistics" else 0.0))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-9)


def test_few_pairs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the base class's, which is faster there; from the limit on they are ours."""
    monkeypatch.setattr(ours, "PAIRS_ON_CPU", 40 * 40)
    monkeypatch.setattr(ours, "CIRCLE_PAIRS_ON_CPU", 40 * 40)
    for name in ("circle_loss", "batch_hard", "pairwise_distance", "paired_distance"):
        monkeypatch.setattr(ours, name, None)
    uses = {
        "distance": lambda x, labels: ours.LpDistance()(x),
        "miner": lambda x, labels: ours.BatchHardMiner()(x, labels),
        "triplets": lambda x, labels: ours.TripletMarginLoss()(x, labels, (labels[:3] * 0,) * 3),
        "circle": lambda x, labels: ours.CircleLoss()(x, labels),
        "memory": lambda x, labels: ours.CrossBatchMemory(ours.CircleLoss(), 16, memory_size=len(x))(x, labels),
    }
    for use in uses.values():
        use(*_batch(39))
        with pytest.raises(TypeError, match="NoneType"):
            use(*_batch(40))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    x, labels = _batch(dtype=torch.float32)
    x = x.to(dtype)
    assert ours.LpDistance()(x).dtype == dtype
    loss = ours.CircleLoss(gamma=16)(x, labels)
    assert loss.dtype == dtype
    reference = losses.CircleLoss(gamma=16)(x.double(), labels).item()
    assert loss.item() == pytest.approx(reference, rel={torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1e-2))
    mined = ours.BatchHardMiner()(x, labels)
    assert ours.TripletMarginLoss()(x, labels, mined).dtype == dtype


def test_small_and_lone_batches() -> None:
    """No positives, no negatives, one row, and one pair of each kind, whose loss is 0 there."""
    x, _ = _batch(4)
    for labels in ([0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 1, 2]):
        for of in ("CircleLoss", "TripletMarginLoss"):
            results = []
            for module in (ours, losses):
                rows = leaf(x, "cpu", torch.float64)
                loss = getattr(module, of)()(rows, torch.tensor(labels))
                loss.backward()
                results.append((loss, rows.grad))
            for found, expected in zip(*results, strict=True):
                assert_close(found, expected, 1e-9, scale=1e-6)
        mined = [module.BatchHardMiner()(x, torch.tensor(labels)) for module in (ours, miners)]
        for found, expected in zip(*mined, strict=True):
            assert torch.equal(found, expected)
    reference = torch.tensor([0, 1])
    for module in (ours, losses):
        assert module.CircleLoss()(x[:1], torch.tensor([0]), None, x[1:3], reference) == 0
        assert module.CircleLoss()(x[:1], torch.tensor([0])) == 0


@pytest.mark.parametrize("own", [False, True])
def test_knn_function(own: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(50, 8, generator=generator)
    query = reference[:20] if own else torch.randn(20, 8, generator=generator)
    found = ours.KNN()(query, 7, reference, own)
    theirs = CustomKNN(distances.LpDistance(normalize_embeddings=False, power=2))(query, 7, reference, own)
    assert torch.equal(found[1], theirs[1])
    assert_close(found[0], theirs[0], 1e-5)
    assert torch.equal(ours.KNN()(query, 3)[1], ours.KNN()(query, 3, query)[1])


OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "k": {"k": 5},
    "as many as needed": {"k": "max_bin_count"},
    "mean of means": {"avg_of_avgs": True},
    "per class": {"return_per_class": True, "exclude": ("AMI", "NMI")},
}


def _k_means(x: Tensor, clusters: int) -> Tensor:
    return torch.arange(len(x)) % clusters


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("source", ["reference", "itself", "included", "some are lone", "all are lone"])
def test_accuracy_calculator(source: str, options: str) -> None:
    x, labels = _batch(30, dtype=torch.float32)
    y, y_labels = _batch(120, seed=5, dtype=torch.float32)
    if source == "some are lone":
        labels = labels + (torch.arange(30) % 3 == 0) * 100
    elif source == "all are lone":
        labels = labels + 100
    given = {
        "itself": (x, labels),
        "included": (x, labels, torch.cat([x, y]), torch.cat([labels, y_labels]), True),
    }.get(source, (x, labels, y, y_labels))
    arguments = {"device": torch.device("cpu"), "kmeans_func": _k_means, **OPTIONS[options]}
    distance = distances.LpDistance(normalize_embeddings=False)
    theirs = accuracy_calculator.AccuracyCalculator(knn_func=CustomKNN(distance), **arguments)
    calculator = ours.AccuracyCalculator(**arguments)
    for form in (lambda of: of, lambda of: of.numpy() if isinstance(of, Tensor) else of):
        found, expected = calculator.get_accuracy(*map(form, given)), theirs.get_accuracy(*map(form, given))
        assert list(found) == list(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-7, err_msg=name)
    some = calculator.get_accuracy(*given, include=("precision_at_1",))
    np.testing.assert_allclose(some["precision_at_1"], expected["precision_at_1"], atol=1e-7)
    assert len(some) == 1


def test_golden_accuracy(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "knn", None)  # lists of neighbours are not asked for
    for name, case in golden_cases(real_data, "pml_AccuracyCalculator"):
        own, k = bool(case["ref_includes_query"]), int(case["k"])
        calculator = ours.AccuracyCalculator(
            exclude=("AMI", "NMI"),
            avg_of_avgs=bool(case["avg_of_avgs"]),
            k={-1: None, -2: "max_bin_count"}.get(k, k),
            device=torch.device("cpu"),
            kmeans_func=_k_means,
        )
        given = [case[key] for key in ("query", "query_labels", "reference", "reference_labels") if key in case]
        found = calculator.get_accuracy(*given, **({"ref_includes_query": own} if len(given) == 4 else {}))
        for figure, value in found.items():
            if figure in case:
                error = 1e-7 if figure == "mean_reciprocal_rank" else 1e-10  # theirs is float32
                assert value == pytest.approx(float(case[figure]), abs=error), f"{figure} of {name}"


def test_figures_of_a_subclass_and_own_searches() -> None:
    class Calculator(ours.AccuracyCalculator):
        def calculate_precision_at_1(self, **kwargs: Any) -> float:
            return 42.0

        def calculate_share(self, knn_labels: Tensor, query_labels: Tensor, **kwargs: Any) -> float:
            return (knn_labels[:, :3] == query_labels[:, None]).double().mean().item()

        def requires_knn(self) -> list[str]:
            return [*super().requires_knn(), "share"]

    x, labels = _batch(30, dtype=torch.float32)
    own = Calculator(exclude=("AMI", "NMI"), device=torch.device("cpu"), kmeans_func=_k_means)
    found = own.get_accuracy(x, labels)
    assert found["precision_at_1"] == 42
    expected = (labels[ours.KNN()(x, 3, x, True)[1]] == labels[:, None]).double().mean()
    assert found["share"] == pytest.approx(expected.item())
    calls = []

    def search(*arguments: Any) -> Any:
        calls.append(arguments)
        return ours.KNN()(*arguments)

    searched = ours.AccuracyCalculator(
        include=("r_precision",), device=torch.device("cpu"), knn_func=search, kmeans_func=_k_means
    ).get_accuracy(x, labels)
    assert len(calls) == 1
    assert searched["r_precision"] == pytest.approx(found["r_precision"])


def test_wrong_arguments() -> None:
    x, labels = _batch(10, dtype=torch.float32)
    calculator = ours.AccuracyCalculator(device=torch.device("cpu"), kmeans_func=_k_means)
    with pytest.raises(ValueError, match="same length"):
        calculator.get_accuracy(x, labels[:9])
    with pytest.raises(ValueError, match="ref_includes_query"):
        calculator.get_accuracy(x, labels, x.flip(0), labels, ref_includes_query=True)
    with pytest.raises(ValueError, match="NaN"):
        calculator.get_accuracy(x * torch.nan, labels, x, labels)
