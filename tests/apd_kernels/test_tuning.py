"""The table of tiles, the file of measured ones, and what `warmup` compiles."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apd_kernels import autotune, warmup
from apd_kernels.tuning import OPERATIONS, fastest, work_of

tuning = pytest.importorskip("apd_kernels.kernels._tuning")

TILE = {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}


def test_every_row_says_why() -> None:
    """A conservative row for unknown GPUs, evidence for each, and nothing claimed of GPUs that ran nothing."""
    for kernel, rows in tuning.TABLE.items():
        assert tuning.CONSERVATIVE in rows, kernel
        for family, tile in rows.items():
            assert family in (tuning.CONSERVATIVE, *tuning.FAMILIES.values())
            assert set(tile.options) == set(rows[tuning.CONSERVATIVE].options)
            assert tile.evidence
            if family in (100, 120):
                assert tile.evidence.endswith("not run")


@pytest.mark.parametrize(
    ("capability", "family"),
    [
        (0, 0),
        (75, 0),
        (80, 80),
        (86, 86),
        (89, 86),
        (90, 90),
        (100, 100),
        (101, 0),
        (103, 100),
        (110, 0),
        (120, 120),
        (121, 120),
        (130, 0),
    ],
)
def test_unknown_gpus_take_the_conservative_row(capability: int, family: int) -> None:
    """And their products have accumulators of their own, as on tcgen05: that is right on any GPU."""
    from apd_kernels.kernels._launch import dot_precision, recording

    with recording(capability):
        x = torch.empty(1, device="meta")
        assert tuning.family(x) == family
        rows = tuning.TABLE["mine.split"]
        assert tuning.tile("mine.split", x) == dict(rows[family].options)
        assert tuning.has_descriptors(x) == (family in (90, 100))
        in_registers = family in (80, 86, 90, 120)
        assert tuning.separate_accumulators(x) == (not in_registers)
        if capability >= 80:
            assert dot_precision(x, "fp32") == ("tf32x3" if in_registers else "tf32x3 apart")
        else:
            assert dot_precision(x, "fp32") == "ieee"
        assert dot_precision(x, "tf32") == "tf32"
        assert dot_precision(x.half(), "fp32") == "ieee"


def test_file_of_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round trip; another GPU, Triton or source has another file; a damaged file is an error that names it."""
    monkeypatch.setenv("APD_KERNELS_CACHE", str(tmp_path))
    path = tuning.cache_file("NVIDIA H100")
    assert path.parent == tmp_path
    assert tuning.load_tiles(path) == {}
    tuning.save_tiles(path, {"mine.split": TILE}, device="NVIDIA H100")
    assert tuning.load_tiles(path) == {"mine.split": TILE}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert tuning.cache_file("NVIDIA H200") != path
    monkeypatch.setattr(tuning, "source_hash", lambda: "another")
    assert tuning.cache_file("NVIDIA H100") != path
    monkeypatch.undo()
    monkeypatch.setattr("triton.__version__", "0.0")
    assert tuning.cache_file("NVIDIA H100") != path
    whole = path.read_text()
    for text in (
        whole[: len(whole) // 2],
        "[]",
        json.dumps({"tiles": {"no such kernel": TILE}}),
        json.dumps({"tiles": {"mine.split": {"BM": 64}}}),
        json.dumps({"tiles": {"mine.split": {**TILE, "BM": "64"}}}),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"tiles-[0-9a-f]{16}\.json: not a file of tiles"):
            tuning.load_tiles(path)


def test_measured_tiles_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file says goes before the table, on the device it was measured on."""

    class Rows:
        is_cuda = True

        def get_device(self) -> int:
            return 0

    path = tmp_path / "tiles.json"
    tuning.save_tiles(path, {"mine.split": TILE})
    monkeypatch.setattr(tuning, "_device_file", lambda device: path)
    monkeypatch.setattr(tuning, "architecture", lambda x: 90)
    assert tuning.tile("mine.split", Rows()) == TILE
    assert tuning.tile("mine.plain", Rows()) == dict(tuning.TABLE["mine.plain"][90].options)
    with tuning.use_tile("mine.split", {**TILE, "BM": 128}):
        assert tuning.tile("mine.split", Rows())["BM"] == 128


def test_the_fastest_tile_wins() -> None:
    """By the timer's word; tiles that do not fit are left out; none that fits is an error."""
    candidates = [{**TILE, "BM": rows} for rows in (16, 32, 64, 128)]

    def timer(work: Callable[[], Any]) -> float | None:
        return {16: 3.0, 32: None, 64: 1.0, 128: 2.0}[work()["BM"]]

    def work() -> dict[str, int]:
        return tuning.tile("mine.split", torch.empty(1))

    assert fastest("mine.split", candidates, work, timer) == (candidates[2], (1.0, 3.0))
    with pytest.raises(RuntimeError, match=r"mine.split: no tile runs"):
        fastest("mine.split", candidates, work, lambda work: None)


@pytest.mark.parametrize("kernel", tuning.TABLE)
def test_autotune_times_the_kernel_that_it_names(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that is timed asks for that row of the table."""
    from apd_kernels import use_backend
    from apd_kernels._core.backend import INTERPRETED

    if not INTERPRETED:
        pytest.skip("needs the interpreter")
    asked: list[str] = []
    table = tuning.tile

    def tile(kernel: str, x: torch.Tensor) -> dict[str, int]:
        asked.append(kernel)
        return table(kernel, x)

    for module in ("distance", "mining", "prepared"):
        monkeypatch.setattr(f"apd_kernels.kernels.{module}.tile", tile, raising=False)
    if kernel.endswith(("split", "wide")):
        monkeypatch.setattr("apd_kernels.kernels.prepared.LARGE_PRODUCTS", 0)
    if kernel.startswith("triangle"):
        monkeypatch.setattr("apd_kernels.kernels.mining.TRIANGLE_ROWS", (1, 16384))
    with use_backend("triton"):
        work = work_of(kernel, 16, device="cpu", small=8, large=8)
        asked.clear()
        work()
    assert set(asked) == {kernel}  # ranking asks once for each of its two passes
    assert kernel in tuning.CANDIDATES


def _specialisations(operations: tuple[str, ...]) -> tuple[set[str], set[str]]:
    """Binaries that a warm-up compiles, and those that batches of many sizes ask for."""
    import compilation

    from apd_kernels._core.operands import Operands
    from apd_kernels._core.pairing import Pairing
    from apd_kernels.kernels import distance, losses, mining
    from apd_kernels.kernels._launch import recording
    from apd_kernels.kernels._workloads import WORKLOADS, Features

    def keys(launches: list[Any]) -> set[str]:
        return {f"{one.kernel.__name__} {compilation._specialisation(one)!r}" for one in launches}

    with recording(90) as warmed:
        for name in operations:
            WORKLOADS[name](Features(2048, torch.float32, "euclidean", "fp32"))
    with recording(90) as used:
        for n in (2, 3, 17, 64, 100, 256, 300, 1024, 1500, 4096, 5000):
            x, labels = torch.empty(n, 2048, device="meta"), torch.empty(n, dtype=torch.int64, device="meta")
            loss, *saved = losses.triplet_loss(x, None, Operands(), Pairing(labels), 0.3, False, "euclidean", "fp32")
            mining.pair_gradient(x, None, *saved, loss, "euclidean", True, False)
            d = distance.pairwise_distance(x, None, Operands(), "euclidean", "fp32")
            distance.pairwise_distance_backward(d, d, x, None, "euclidean", "fp32", True, False)
            y, y_labels = (
                torch.empty(20 * n, 2048, device="meta"),
                torch.empty(20 * n, dtype=torch.int64, device="meta"),
            )
            mining.batch_hard(x, y, Operands(), Pairing(labels, y_labels), "euclidean", "fp32")
    return keys(warmed), keys(used)


def test_warm_operations_compile_nothing() -> None:
    """After the warm-up no batch size, small or large, in the batch or a memory, needs another binary."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            warmed, used = pool.apply(_specialisations, (("triplet_loss", "pairwise_distance", "batch_hard"),))
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
    assert used
    assert used <= warmed, used - warmed


def test_every_operation_has_a_workload() -> None:
    from apd_kernels.kernels._workloads import WORKLOADS

    assert tuple(WORKLOADS) == OPERATIONS


def test_nothing_to_compile_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert warmup(OPERATIONS, 512, (torch.float32, torch.float64)) == dict.fromkeys(OPERATIONS, 0.0)
    with pytest.raises(RuntimeError, match="autotune: expected a CUDA device and Triton"):
        autotune(512)


@pytest.mark.gpu
def test_warmup_on_the_gpu() -> None:
    """Every operation compiles, and again in next to no time."""
    first = warmup(OPERATIONS, 256, (torch.float32, torch.float16), metrics=("euclidean", "cosine"))
    again = warmup(OPERATIONS, 256, (torch.float32, torch.float16), metrics=("euclidean", "cosine"))
    assert sum(again.values()) < max(1.0, sum(first.values()))
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="warmup: expected before, not during the capture"), torch.cuda.graph(graph):
        warmup(["triplet_loss"], 256)


@pytest.mark.gpu
def test_autotune_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APD_KERNELS_CACHE", str(tmp_path))
    tuning._device_file.cache_clear()
    try:
        tiles = autotune(256, kernels=["mine.rows"], verbose=False)
        assert set(tiles) == {"mine.rows"}
        assert tuning.tile("mine.rows", torch.empty(1, device="cuda")) == tiles["mine.rows"]
    finally:
        tuning._device_file.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (["rank_metrics"], 512),
            {},
            ValueError,
            r"operations: expected 'pairwise_distance' or .*, got 'rank_metrics'",
        ),
        ((["triplet_loss"], 0), {}, ValueError, r"dimension: expected an integer of at least 1, got 0"),
        ((["triplet_loss"], 8, (torch.int32,)), {}, TypeError, r"dtypes: expected float16, .*got torch.int32"),
        ((["triplet_loss"], 8), {"metrics": ("l1",)}, ValueError, r"metrics: expected 'euclidean' or"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        warmup(*arguments, **options)
