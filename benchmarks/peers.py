"""Other Re-ID projects with their own functions and with ours: agreement, time, and their own tests.

``make peers`` runs this in an environment of its own, with the projects as the package index has them, and writes the
table between the markers of docs/drop-in.md. What cannot be imported is said in the table.
"""

from __future__ import annotations

import argparse
import collections
import collections.abc
import contextlib
import importlib.metadata
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

START, END = "<!-- peers: written by `make peers` -->", "<!-- /peers -->"


class Case(NamedTuple):
    """One function: what its project does, what we do, and how often each is run."""

    project: str
    what: str
    theirs: Callable[[], Any]
    ours: Callable[[], Any]
    runs: int = 15


def with_old_names() -> None:
    """fast-reid's configuration and OML's transforms use names that Python 3.10 and NumPy 2 have dropped."""
    for name in ("Mapping", "MutableMapping", "Sequence"):
        if not hasattr(collections, name):
            setattr(collections, name, getattr(collections.abc, name))
    if not hasattr(np, "float_"):
        setattr(np, "float_", np.float64)  # noqa: B010 (the name itself is refused in code)


def numbers(value: Any) -> list[np.ndarray]:
    """All numbers in a result, in order."""
    if value is None:
        return []
    if isinstance(value, dict):
        return [part for key in value for part in numbers(value[key])]
    if isinstance(value, (tuple, list)):
        if value and all(np.isscalar(part) for part in value):
            return [np.asarray(value, dtype=np.float64)]
        return [part for of in value for part in numbers(of)]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    return [np.asarray(value, dtype=np.float64).ravel()]


def difference(theirs: Any, ours: Any) -> float:
    """The largest difference over the largest value, of each part; the largest of these."""
    worst = 0.0
    for one, other in zip(numbers(theirs), numbers(ours), strict=True):
        shared = min(one.size, other.size)
        if shared:
            scale = max(np.abs(one[:shared]).max(), 1e-30)
            worst = max(worst, float(np.abs(one[:shared] - other[:shared]).max() / scale))
    return worst


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measured(case: Case) -> tuple[float, float]:
    """Difference, and their time over ours: medians of runs in turns."""
    with contextlib.redirect_stdout(io.StringIO()):
        apart = difference(case.theirs(), case.ours())
        times = [(timed(case.theirs), timed(case.ours)) for _ in range(case.runs)]
    theirs, ours = (statistics.median(side) for side in zip(*times, strict=True))
    return apart, theirs / ours


def step(loss: Callable[..., torch.Tensor], x: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any]:
    """Loss and gradient."""

    def run() -> Any:
        rows = x.clone().requires_grad_()
        value = loss(rows, labels)
        value.backward()
        return value, rows.grad

    return run


def training(loss: Callable[..., torch.Tensor]) -> Callable[[], Any]:
    """Three steps of a small convolutional network, from the same weights; its losses and its last weights."""

    def run() -> Any:
        torch.manual_seed(0)
        layers = torch.nn.Conv2d(3, 16, 3, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten()
        network = torch.nn.Sequential(*layers, torch.nn.Linear(256, 128))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        images, labels = torch.randn(32, 3, 64, 32), torch.arange(8).repeat_interleave(4)
        values = []
        for _ in range(3):
            optimizer.zero_grad()
            value = loss(network(images), labels)
            value.backward()
            optimizer.step()
            values.append(value)
        return torch.stack(values), network[-1].weight

    return run


def with_arguments(loss: Callable[..., torch.Tensor], arguments: tuple[Any, ...]) -> Callable[..., torch.Tensor]:
    """A loss of rows and labels."""
    return lambda x, labels: loss(x, labels, *arguments)


def retrieval(queries: int, images: int, dimension: int = 256) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(queries, dimension, generator=generator)
    ids = [torch.randint(queries // 3, (n,), generator=generator) for n in (queries, images)]
    cams = [torch.randint(6, (n,), generator=generator) for n in (queries, images)]
    features = [centres[of] + 2 * torch.randn(len(of), dimension, generator=generator) for of in ids]
    return *(F.normalize(of) for of in features), [of.numpy() for of in (*ids, *cams)]  # type: ignore[return-value]


BATCHES = {
    f"{rows}×{dimension}": (
        torch.randn(rows, dimension, generator=torch.Generator().manual_seed(0)),
        torch.arange(rows // 4).repeat_interleave(4),
    )
    for rows, dimension in ((64, 2048), (256, 512))
}


def torchreid() -> list[Case]:
    """PyPI's torchreid."""
    from apd_kernels.drop_in import torchreid as ours

    losses = importlib.import_module("torchreid.reid.losses.hard_mine_triplet_loss")
    rank = importlib.import_module("torchreid.reid.metrics.rank")
    rerank = importlib.import_module("torchreid.reid.utils.rerank")
    engine = importlib.import_module("torchreid.reid.engine.engine")
    cases = [
        Case("torchreid", f"`TripletLoss`, {name}", step(losses.TripletLoss(), *of), step(ours.TripletLoss(), *of))
        for name, of in BATCHES.items()
    ]
    cases.append(
        Case("torchreid", "three training steps", training(losses.TripletLoss()), training(ours.TripletLoss()), 5)
    )
    query, gallery, labels = retrieval(200, 3000)
    matrix = ours.compute_distance_matrix(query, gallery).numpy()
    small = [ours.compute_distance_matrix(a, b).numpy() for a in (query, gallery[:600]) for b in (query, gallery[:600])]
    matrices = small[1], small[0], small[3]
    cases += [
        Case(
            "torchreid",
            "`evaluate_rank`, 200×3,000",
            lambda: rank.evaluate_rank(matrix, *labels, use_cython=False),
            lambda: ours.evaluate_rank(matrix, *labels),
            3,
        ),
        Case(
            "torchreid",
            "`re_ranking`, 200×600",
            lambda: rerank.re_ranking(*matrices),
            lambda: ours.re_ranking(*matrices),
            3,
        ),
    ]

    def loader(features: torch.Tensor, ids: np.ndarray, cams: np.ndarray) -> list[Any]:
        parts = zip(
            features.split(256), torch.from_numpy(ids).split(256), torch.from_numpy(cams).split(256), strict=True
        )
        return [{"img": f, "pid": p, "camid": c} for f, p, c in parts]

    loaders = loader(query, labels[0], labels[2]), loader(gallery, labels[1], labels[3])
    their_evaluate = engine.Engine._evaluate

    def evaluation(evaluate: Any, rerank: bool) -> Callable[[], Any]:
        def run() -> Any:
            engine.Engine._evaluate = evaluate
            instance = engine.Engine.__new__(engine.Engine)
            instance.use_gpu, instance.model = False, torch.nn.Identity()
            try:
                return instance._evaluate("drawn", query_loader=loaders[0], gallery_loader=loaders[1], rerank=rerank)
            finally:
                engine.Engine._evaluate = their_evaluate

        return run

    cases.append(
        Case(
            "torchreid",
            "`Engine._evaluate`, 200×3,000",
            evaluation(their_evaluate, False),
            evaluation(ours.evaluate, False),
            3,
        )
    )
    return cases


def fastreid() -> list[Case]:
    """PyPI's fastreid."""
    from apd_kernels.drop_in import fastreid as ours

    losses = importlib.import_module("fastreid.modeling.losses")
    rank = importlib.import_module("fastreid.evaluation.rank")
    distances = importlib.import_module("fastreid.utils.compute_dist")
    evaluator = importlib.import_module("fastreid.evaluation.reid_evaluation").ReidEvaluator
    cases = []
    for name, of in BATCHES.items():
        for function, arguments in (
            ("triplet_loss", (0.3, False, True)),
            ("triplet_loss", (0.3, True, False)),
            ("pairwise_circleloss", (0.25, 64)),
            ("pairwise_cosface", (0.25, 64)),
        ):
            what = f"`{function}`, {name}" + (", weighted" if arguments[1:] == (True, False) else "")
            theirs, our = (with_arguments(getattr(module, function), arguments) for module in (losses, ours))
            cases.append(Case("fast-reid", what, step(theirs, *of), step(our, *of)))
    cases.append(
        Case(
            "fast-reid",
            "three training steps",
            *(training(lambda x, t, of=module.triplet_loss: of(x, t, 0.3, False, True)) for module in (losses, ours)),
            5,
        )
    )
    query, gallery, labels = retrieval(200, 3000)
    matrix = ours.build_dist(query, gallery, "cosine")
    features = gallery[:800]
    cases += [
        Case(
            "fast-reid",
            "`evaluate_rank`, 200×3,000",
            lambda: rank.evaluate_rank(matrix, *labels, use_cython=False),
            lambda: ours.evaluate_rank(matrix, *labels),
            3,
        ),
        Case(
            "fast-reid",
            "`compute_jaccard_distance`, 800",
            lambda: distances.compute_jaccard_distance(features, search_option=3),
            lambda: ours.compute_jaccard_distance(features, search_option=3),
            3,
        ),
    ]
    off = types.SimpleNamespace(ENABLED=False)
    test = types.SimpleNamespace(METRIC="cosine", AQE=off, RERANK=off, ROC=off)
    predictions = [
        {"feats": f, "pids": torch.from_numpy(p), "camids": torch.from_numpy(c)}
        for f, p, c in ((query, labels[0], labels[2]), (gallery, labels[1], labels[3]))
    ]
    their_evaluate = evaluator.evaluate

    def evaluation(evaluate: Any) -> Callable[[], Any]:
        def run() -> Any:
            evaluator.evaluate = evaluate
            instance = evaluator.__new__(evaluator)
            instance.cfg, instance._num_query = types.SimpleNamespace(TEST=test), len(query)
            instance._predictions = predictions
            try:
                return instance.evaluate()
            finally:
                evaluator.evaluate = their_evaluate

        return run

    what = "`ReidEvaluator.evaluate`, 200×3,000"
    cases.append(Case("fast-reid", what, evaluation(their_evaluate), evaluation(ours.evaluate), 3))
    return cases


def pytorch_metric_learning() -> list[Case]:
    """The version that is installed."""
    from pytorch_metric_learning import losses, miners
    from pytorch_metric_learning.utils import accuracy_calculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    from apd_kernels.drop_in import pytorch_metric_learning as ours

    project = "pytorch-metric-learning"
    cases = []
    for name, of in BATCHES.items():

        def triplet(of_miners: Any, of_losses: Any) -> Callable[..., torch.Tensor]:
            miner, loss = of_miners.BatchHardMiner(), of_losses.TripletMarginLoss(0.3)
            return lambda x, labels: loss(x, labels, miner(x, labels))

        cases += [
            Case(project, f"`CircleLoss`, {name}", step(losses.CircleLoss(), *of), step(ours.CircleLoss(), *of)),
            Case(
                project,
                f"`BatchHardMiner` and `TripletMarginLoss`, {name}",
                step(triplet(miners, losses), *of),
                step(triplet(ours, ours), *of),
            ),
        ]
    labels = torch.randint(100, (256,), generator=torch.Generator().manual_seed(0))
    memories = (of.CrossBatchMemory(of.CircleLoss(), 512, 4096) for of in (losses, ours))
    both = (step(memory, BATCHES["256×512"][0], labels) for memory in memories)
    cases.append(Case(project, "`CrossBatchMemory` with `CircleLoss`, 256 and 4,096×512", *both, 5))
    cases.append(Case(project, "three training steps", *(training(of.CircleLoss()) for of in (losses, ours)), 5))
    query, gallery, of_all = retrieval(200, 3000)
    figures = ("mean_average_precision", "mean_average_precision_at_r", "precision_at_1", "r_precision")
    options: dict[str, Any] = {"include": figures, "device": torch.device("cpu"), "kmeans_func": lambda *_: None}
    from pytorch_metric_learning.distances import LpDistance

    theirs = accuracy_calculator.AccuracyCalculator(knn_func=CustomKNN(LpDistance()), **options)
    calculators = theirs, ours.AccuracyCalculator(**options)
    both = (
        lambda of=of: of.get_accuracy(query, torch.from_numpy(of_all[0]), gallery, torch.from_numpy(of_all[1]))
        for of in calculators
    )
    cases.append(Case(project, "`AccuracyCalculator`, 200×3,000", *both, 3))
    return cases


def boxmot() -> list[Case]:
    """BoxMOT's training of re-identification."""
    from apd_kernels.drop_in import boxmot as ours

    losses = importlib.import_module("boxmot.reid.training.losses")
    evaluator = importlib.import_module("boxmot.reid.training.evaluator")
    cases = [
        Case("BoxMOT", f"`{loss}`, {name}", *(step(getattr(module, loss)(), *of) for module in (losses, ours)))
        for name, of in BATCHES.items()
        for loss in ("TripletLoss", "CircleLoss")
    ]
    query, gallery, labels = retrieval(200, 3000)
    matrix = 1 - (query @ gallery.T).numpy()
    both = (lambda of=of: of.evaluate_ranking(matrix, *labels) for of in (evaluator, ours))
    cases.append(Case("BoxMOT", "`evaluate_ranking`, 200×3,000", *both, 3))
    return cases


def oml() -> list[Case]:
    """open-metric-learning."""
    theirs = importlib.import_module("oml.miners.inbatch_hard_tri").HardTripletsMiner()
    ours = importlib.import_module("apd_kernels.drop_in.oml").HardTripletsMiner()
    return [
        Case(
            "OML",
            f"`HardTripletsMiner`, {name}",
            *(lambda m=m, of=of: m._sample(of[0], of[1].tolist()) for m in (theirs, ours)),
        )
        for name, of in BATCHES.items()
    ]


PACKAGES = {
    "torchreid": "torchreid",
    "fast-reid": "fastreid",
    "pytorch-metric-learning": "pytorch-metric-learning",
    "BoxMOT": "boxmot",
    "OML": "open-metric-learning",
}
PROJECTS: dict[str, Callable[[], list[Case]]] = {
    "torchreid": torchreid,
    "fast-reid": fastreid,
    "pytorch-metric-learning": pytorch_metric_learning,
    "BoxMOT": boxmot,
    "OML": oml,
}


# Of pytorch-metric-learning: where a class of ours is used, but for two tests of `CrossBatchMemory` that take minutes.
OWN_TESTS = (
    "tests/distances",
    "tests/miners",
    "tests/reducers",
    "tests/regularizers",
    "tests/losses/test_circle_loss.py",
    "tests/losses/test_contrastive_loss.py",
    "tests/losses/test_cross_batch_memory.py",
    "tests/losses/test_margin_loss.py",
    "tests/losses/test_multi_similarity_loss.py",
    "tests/losses/test_triplet_margin_loss.py",
    "tests/utils/test_calculate_accuracies.py",
)


class Counts(NamedTuple):
    """Of a run of tests; the names of those that failed."""

    passed: int
    failed: list[str]
    left_out: int

    def __str__(self) -> str:
        names = f" ({', '.join(self.failed)})" if self.failed else ""
        return f"{self.passed} passed, {len(self.failed)} failed{names}, {self.left_out} not applicable"


def counted(report: Path) -> Counts:
    """Of pytest's JUnit file."""
    cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    left_out = sum(case.find("skipped") is not None for case in cases)
    return Counts(len(cases) - len(failed) - left_out, sorted({case.get("name", "") for case in failed}), left_out)


def own_tests(checkout: Path, ours: bool) -> Counts:
    """pytorch-metric-learning's own tests of the installed package, with its classes or with ours in their places."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(checkout / "tests", Path(folder) / "tests")
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["-p", "benchmarks.peers_plugin"] if ours else []
        command += ["--deselect", "tests/losses/test_cross_batch_memory.py::TestCrossBatchMemory::test_all_losses"]
        command += ["--deselect", "tests/losses/test_cross_batch_memory.py::TestCrossBatchMemory::test_loss"]
        environment = {**os.environ, "TEST_DEVICE": "cpu", "TEST_DTYPES": "float32,float64", "PYTHONPATH": os.getcwd()}
        there = [test for test in OWN_TESTS if (checkout / test).exists()]
        run = subprocess.run(
            [*command, *there], cwd=folder, env=environment, check=False, capture_output=True, text=True
        )
        if not report.exists():
            raise RuntimeError(f"pytest ended without a report: {run.stdout[-2000:]}{run.stderr[-2000:]}")
        return counted(report)


def table(projects: list[str], checkout: Path | None) -> list[str]:
    """The lines of the table."""
    lines = ["| project | what | largest difference | their time / ours |", "|---|---|---|---|"]
    for project in projects:
        version = importlib.metadata.version(PACKAGES[project])
        try:
            cases = PROJECTS[project]()
        except (ImportError, AttributeError) as error:
            lines.append(f"| {project} {version} | not applicable: {type(error).__name__}: {error} | | |")
            continue
        for case in cases:
            apart, ratio = measured(case)
            lines.append(f"| {project} {version} | {case.what} | {apart:.0e} | {ratio:.2f} |")
            print(lines[-1], flush=True)
    if checkout is not None and "pytorch-metric-learning" in projects:
        for ours, what in ((False, "as they are"), (True, "with ours")):
            lines.append(f"| pytorch-metric-learning | its own tests, {what} | {own_tests(checkout, ours)} | |")
            print(lines[-1], flush=True)
    return lines


def written(text: str, lines: list[str]) -> str:
    """A page with the lines between its markers.

    Raises:
        ValueError: it does not have both markers, once each and in order.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end or START in after or END in after or END in before:
        raise ValueError(f"expected {START} and {END} once each")
    return "\n".join([before + start, "", *lines, "", end + after])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PROJECTS, action="append", help="a project; several times for several")
    parser.add_argument(
        "--pml-tests", type=Path, help="a checkout of pytorch-metric-learning, whose package has no tests"
    )
    parser.add_argument("--page", type=Path, help="where to write the table, between its markers")
    arguments = parser.parse_args()
    with_old_names()
    torch.set_num_threads(1)
    lines = table(arguments.only or list(PROJECTS), arguments.pml_tests)
    if arguments.page is not None:
        text = written(arguments.page.read_text(encoding="utf-8"), lines)
        draft = arguments.page.with_suffix(".part")
        draft.write_text(text, encoding="utf-8")
        draft.replace(arguments.page)


if __name__ == "__main__":
    main()
