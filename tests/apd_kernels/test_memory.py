from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import Backend
from oracle import METRICS, assert_close, features, leaf, tolerance
from torch import Tensor
from torch.nn import Module

import apd_kernels.memory
from apd_kernels import (
    ClusterMemory,
    CrossBatchMemory,
    batch_hard,
    supervised_contrastive_loss,
    triplet_loss,
    use_backend,
)
from apd_kernels.memory import NO_LABEL

pytestmark = pytest.mark.oldest


def batches(*sizes: int, dimension: int = 5, identities: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    rows, labels = features(max(1, sum(sizes)), dimension, dtype=torch.float32, seed=seed, identities=identities)
    return list(zip(rows[: sum(sizes)].split(sizes), labels[: sum(sizes)].split(sizes), strict=True))


def queue(capacity: int, given: list[tuple[Tensor, Tensor]]) -> tuple[dict[int, tuple[Tensor, int]], int]:
    """What each written slot holds, row by row, and how many rows there were."""
    slots, count = {}, 0
    for x, labels in given:
        for row, label in zip(x, labels.tolist(), strict=True):
            slots[count % capacity] = (row, label)
            count += 1
    return slots, count


@pytest.mark.parametrize("capacity", [1, 3, 8, 37, 199])
def test_ring(backend: Backend, capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a queue written row by row: wrapping, batches larger than the ring, empty ones, strided ones."""
    if backend.interpreted:  # a program fills several slots, as in a large ring
        monkeypatch.setattr("apd_kernels.kernels.memory.FILLING_PROGRAMS", 4)
    memory = CrossBatchMemory(capacity, 5, device=backend.device)
    given = batches(0, 1, 3, 0, 6, 40, 2, 8, 80)
    for step, (x, labels) in enumerate(given):
        wide = torch.full((len(x), 9), float("nan"))
        wide[:, 2:7] = x
        table = torch.stack([labels, labels + 50], 1).to((torch.int64, torch.uint8, torch.int32)[step % 3])
        memory.enqueue(wide.to(backend.device)[:, 2:7], table.to(backend.device)[:, 0])
        slots, count = queue(capacity, given[: step + 1])
        assert memory.enqueued == count
        assert memory.pointer == count % capacity
        assert memory.filled == min(count, capacity) == len(slots)
        assert memory.valid.tolist() == [slot in slots for slot in range(capacity)]
        for slot in range(capacity):
            row, label = slots.get(slot, slots.get(0, (torch.zeros(5), NO_LABEL)))
            assert torch.equal(memory.features[slot].cpu(), row)
            assert memory.labels[slot] == label
    memory.reset()
    assert not memory.valid.any()
    assert not memory.features.any()
    assert (memory.labels == NO_LABEL).all()


@pytest.mark.parametrize("metric", METRICS)
def test_mining_finds_written_rows_only(backend: Backend, metric: str) -> None:
    """A partly filled memory serves as `y`: rows, distances, validity and gradient are those of its written rows."""
    x, labels = features(23, 5, dtype=torch.float32, seed=7, identities=6)
    memory = CrossBatchMemory(70, 5, device=backend.device)
    x, labels = x.to(backend.device), labels.to(backend.device)
    for rows, row_labels in batches(4, 9, 30, 50):
        memory.enqueue(rows.to(backend.device), row_labels.to(backend.device))
        y, y_labels = (t[: int(memory.filled)] for t in memory.rows())
        ours, expected = (batch_hard(x, labels, *pair, metric=metric) for pair in (memory.rows(), (y, y_labels)))
        assert torch.equal(ours.valid, expected.valid)
        for side in (0, 1):
            found, written = (memory.features[mined.indices[side]] for mined in (ours, expected))
            assert torch.equal(found[ours.valid], written[ours.valid])
            assert_close(ours.distances[side], expected.distances[side], 1e-6)
        a, b = leaf(x, backend.device), leaf(x, backend.device)
        triplet_loss(a, labels, *memory.rows(), metric=metric, margin=None).backward()
        triplet_loss(b, labels, y, y_labels, metric=metric, margin=None).backward()
        assert_close(a.grad, b.grad, 1e-5, "gradient")


@pytest.mark.parametrize("metric", METRICS)
def test_nobody_is_valid_in_an_empty_memory(backend: Backend, metric: str) -> None:
    """Whatever the labels of the batch, the reserved one excepted."""
    x, _ = features(6, 5, dtype=torch.float32)
    labels = torch.tensor([NO_LABEL + 1, -1, 0, 0, 5, torch.iinfo(torch.int64).max], device=backend.device)
    for memory in (CrossBatchMemory(9, 5, device=backend.device), ClusterMemory(9, 5, device=backend.device)):
        a = leaf(x, backend.device)
        mined = batch_hard(a, labels, *memory.rows(), metric=metric)
        assert not mined.valid.any()
        assert (mined.indices.positive == -1).all()
        loss = triplet_loss(a, labels, *memory.rows(), metric=metric)
        loss.backward()
        assert loss == 0
        assert not a.grad.any()


def test_no_anchor_meets_itself(backend: Backend) -> None:
    """Mining before the batch is enqueued, as documented: a lone anchor has no positive. Afterwards it would have."""
    memory = CrossBatchMemory(20, 5, device=backend.device)
    x, labels = (t.to(backend.device) for t in batches(8)[0])
    memory.enqueue(x, labels)
    lone = torch.full((1,), 99, device=backend.device)
    assert not batch_hard(x[:1] + 1, lone, *memory.rows()).valid.any()
    memory.enqueue(x[:1] + 1, lone)
    own = batch_hard(x[:1] + 1, lone, *memory.rows())
    assert own.indices.positive.tolist() == [8]
    assert own.distances.positive.tolist() == [0]


def test_enqueue_before_backward_is_an_error(backend: Backend) -> None:
    """The rows that the gradient needs were overwritten: PyTorch notices, nothing is silently wrong."""
    memory = CrossBatchMemory(8, 5, device=backend.device)
    first, second = ([t.to(backend.device) for t in batch] for batch in batches(8, 8))
    memory.enqueue(*first)
    x = leaf(second[0], backend.device)
    loss = triplet_loss(x, second[1], *memory.rows())
    memory.enqueue(*second)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_ring_keeps_its_dtype(backend: Backend) -> None:
    """Rows are converted, so a half-precision memory serves half-precision anchors; nothing is differentiated."""
    memory = CrossBatchMemory(8, 5, dtype=torch.float16, device=backend.device)
    x, labels = (t.to(backend.device) for t in batches(6)[0])
    memory.enqueue(x.requires_grad_(), labels)
    assert memory.features.dtype == torch.float16
    assert not memory.features.requires_grad
    assert torch.equal(memory.features[:6], x.detach().half())
    assert batch_hard(x.half(), labels, *memory.rows()).valid.any()


def sequential(centroids: Tensor, valid: Tensor, x: Tensor, labels: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """The definition: one sample after the other."""
    centroids, valid = centroids.clone(), valid.clone()
    for sample, label in zip(x.to(centroids.dtype), labels.tolist(), strict=True):
        if 0 <= label < len(centroids):
            old = centroids[label]
            moved = momentum * old + (1 - momentum) * sample if valid[label] else sample
            norm = torch.linalg.vector_norm(moved)
            if norm != 0:
                centroids[label] = moved / norm
                valid[label] = True
    return centroids, valid


LABELS: dict[str, Callable[[int], Tensor]] = {
    "random": lambda n: torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(n)),
    "pk": lambda n: torch.arange(n) // 4 % 6,
    "one identity": lambda n: torch.full((n,), 3),
    "all different": lambda n: torch.arange(n) + 1,
    "outliers": lambda n: torch.randint(-3, 300, (n,), generator=torch.Generator().manual_seed(n)) % 12 - 2,
}


@pytest.mark.parametrize("momentum", [0.0, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_update_is_the_sequential_one(backend: Backend, dtype: torch.dtype, kind: str, momentum: float) -> None:
    """Three batches in a row, the first starting the identities; on the PyTorch path bit for bit."""
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("float64 is served by the PyTorch path")
    identities = 9
    memory = ClusterMemory(identities, 33, momentum=momentum, dtype=dtype, device=backend.device)
    expected = memory.centroids.cpu().clone(), memory.valid.cpu().clone()
    for n in (1, 7, 37):
        x = torch.randn(n, 33, generator=torch.Generator().manual_seed(n), dtype=dtype)
        labels = LABELS[kind](n)
        expected = sequential(*expected, x, labels, momentum)
        memory.update(x.to(backend.device), labels.to(backend.device))
        if backend == Backend("torch", "cpu"):
            assert torch.equal(memory.centroids, expected[0])
        assert_close(memory.centroids, expected[0], tolerance(dtype) / 2)
        assert torch.equal(memory.valid.cpu(), expected[1])
        expected = memory.centroids.cpu().clone(), expected[1]


def test_200_random_updates() -> None:
    """Sizes, momenta, dtypes and labels by seed, on the PyTorch path bit for bit; the ring with every batch besides."""
    for seed in range(200):
        choose = random.Random(seed)
        identities, dimension, n = choose.randint(1, 12), choose.randint(1, 40), choose.randint(0, 60)
        dtype, momentum = choose.choice((torch.float32, torch.float64)), choose.random()
        generator = torch.Generator().manual_seed(seed)
        memory = ClusterMemory(identities, dimension, momentum=momentum, dtype=dtype)
        ring, given = CrossBatchMemory(choose.randint(1, 50), dimension, dtype=dtype), []
        expected = memory.centroids.clone(), memory.valid.clone()
        for _ in range(2):
            x = torch.randn(n, dimension, generator=generator, dtype=dtype)
            labels = torch.randint(-1, identities + 1, (n,), generator=generator)
            expected = sequential(*expected, x, labels, momentum)
            memory.update(x, labels)
            assert torch.equal(memory.centroids, expected[0]), seed
            assert torch.equal(memory.valid, expected[1]), seed
            ring.enqueue(x, labels)
            given.append((x, labels))
        slots, _ = queue(len(ring.labels), given)
        for slot, (row, label) in slots.items():
            assert torch.equal(ring.features[slot], row), seed
            assert ring.labels[slot] == label, seed


def test_many_samples(backend: Backend) -> None:
    """More than the kernel looks at in one go, of two identities and an outlier."""
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.full((300,), -1)
    labels[[5, 20, 130, 140, 299]] = 2
    labels[[127, 128, 290]] = 0
    memory = ClusterMemory(3, 4, device=backend.device)
    expected = sequential(memory.centroids.cpu(), memory.valid.cpu(), x, labels, memory.momentum)
    memory.update(x.to(backend.device), labels.to(backend.device))
    assert_close(memory.centroids, expected[0], 1e-6)
    assert torch.equal(memory.valid.cpu(), expected[1])


def test_order_of_duplicates_counts(backend: Backend) -> None:
    """The last sample of an identity weighs most; samples of other identities may come in any order."""
    x = torch.eye(4)[:3].to(backend.device)
    same, mixed = (torch.tensor(labels, device=backend.device) for labels in ([1, 1, 1], [1, 0, 1]))
    results = []
    for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1]):
        memory = ClusterMemory(2, 4, momentum=0.5, device=backend.device)
        memory.update(x[order], same)
        results.append(memory.centroids[1])
        assert memory.centroids[1].argmax() == order[-1]
        assert memory.centroids[1].norm() == pytest.approx(1)
    assert not torch.allclose(results[0], results[1])
    # (0, 1), (1, 0) and (0, 1) in turn: c = e₀, then ½(e₀ + e₂) normalized
    memory = ClusterMemory(2, 4, momentum=0.5, device=backend.device)
    memory.update(x, mixed)
    other = ClusterMemory(2, 4, momentum=0.5, device=backend.device)
    other.update(x[[1, 0, 2]], mixed[[1, 0, 2]])
    assert torch.equal(memory.centroids, other.centroids)
    assert_close(memory.centroids[1], torch.tensor([0.5**0.5, 0, 0.5**0.5, 0]), 1e-6)


def test_samples_of_any_kind(backend: Backend) -> None:
    """Strided, half-precision, of other label types; labels are compared by value: uint8 255 is not int8 −1."""
    x, _ = features(20, 6, dtype=torch.float16)
    labels = torch.arange(20) % 3
    expected = ClusterMemory(300, 6, device=backend.device)
    expected.update(x.float().to(backend.device), labels.to(backend.device))
    wide = torch.full((20, 9), float("nan"), dtype=torch.float16)
    wide[:, 1:7] = x
    for dtype in (torch.uint8, torch.int32):
        memory = ClusterMemory(300, 6, device=backend.device)
        table = torch.stack([labels, labels + 1], 1).to(dtype).to(backend.device)
        memory.update(wide.to(backend.device)[:, 1:7], table[:, 0])
        assert torch.equal(memory.centroids, expected.centroids)
    memory.update(x[:2].to(backend.device), torch.tensor([255, 3], dtype=torch.uint8, device=backend.device))
    assert memory.valid.nonzero().flatten().tolist() == [0, 1, 2, 3, 255]
    before = memory.centroids.clone()
    memory.update(x[:3].to(backend.device), torch.tensor([-1, -128, -2], dtype=torch.int8, device=backend.device))
    memory.update(x[:0].to(backend.device), labels[:0].to(backend.device))
    assert torch.equal(memory.centroids, before)


def test_zero_and_nan_samples(backend: Backend) -> None:
    """What leaves no direction changes nothing, not even whether an identity was seen; NaN shows."""
    memory = ClusterMemory(4, 2, momentum=0.5, device=backend.device)
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-0.6, -0.8], [0.0, 2.0], [float("nan"), 1.0]], device=backend.device)
    memory.update(x, torch.tensor([0, 1, 1, 2, 3], device=backend.device))
    assert memory.valid.tolist() == [False, True, True, True]
    assert_close(memory.centroids[:3], torch.tensor([[0, 0], [0.6, 0.8], [0, 1]]), 1e-6)
    assert memory.centroids[3].isnan().all()


def test_reset_takes_the_means(backend: Backend) -> None:
    x, labels = features(40, 6, dtype=torch.float32, identities=5)
    labels[0], labels[1] = -1, 8  # nobody's
    memory = ClusterMemory(7, 6, device=backend.device)
    memory.update(torch.ones(1, 6, device=backend.device), torch.tensor([6], device=backend.device))
    memory.reset(x.to(backend.device), labels.to(backend.device))
    for identity in range(7):
        own = x[labels == identity].double()
        assert memory.valid[identity] == (len(own) > 0)
        mean = own.mean(0) if len(own) else torch.zeros(6)
        assert_close(memory.centroids[identity], torch.nn.functional.normalize(mean, dim=0), 1e-6)
    memory.reset(x[:0].to(backend.device), labels[:0].to(backend.device))
    assert not memory.valid.any()
    assert not memory.centroids.any()


def test_unseen_identities_are_not_mined(backend: Backend) -> None:
    """`rows` mines as the seen centroids alone do, whichever identities are missing."""
    x, labels = features(12, 6, dtype=torch.float32, identities=5)
    x, labels = x.to(backend.device), labels.to(backend.device)
    for seen in ([0, 1, 2, 3, 4], [2, 4], [0], [1, 2, 3]):
        memory = ClusterMemory(5, 6, device=backend.device)
        centres = torch.randn(len(seen), 6, generator=torch.Generator().manual_seed(1)).to(backend.device)
        identities = torch.tensor(seen, device=backend.device)
        memory.update(centres, identities)
        y, y_labels = memory.rows()
        ours = batch_hard(x, labels, y, y_labels)
        expected = batch_hard(x, labels, memory.centroids[identities], identities)
        assert torch.equal(ours.valid, expected.valid)
        for side in (0, 1):
            assert_close(ours.distances[side], expected.distances[side], 1e-6)
        a = leaf(x, backend.device)
        loss = triplet_loss(a, labels, y, y_labels)
        memory.update(x, labels)  # moves the centroids, not the rows of the loss
        loss.backward()
        assert a.grad.isfinite().all()


def make(kind: str, **options: Any) -> Module:
    return CrossBatchMemory(10, 5, **options) if kind == "ring" else ClusterMemory(4, 5, momentum=0.3, **options)


def feed(memory: Module, x: Tensor, labels: Tensor) -> None:
    (memory.enqueue if isinstance(memory, CrossBatchMemory) else memory.update)(x, labels)


@pytest.mark.parametrize("kind", ["ring", "cluster"])
def test_state_dict_round_trip(kind: str, tmp_path: Path) -> None:
    """A memory that was saved and loaded goes on to the same bits; it has no parameters."""
    memory, given = make(kind), batches(4, 9, 3, 8)
    assert not list(memory.parameters())
    for batch in given[:2]:
        feed(memory, *batch)
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    loaded, copied = make(kind), copy.deepcopy(memory)
    loaded.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    for batch in given[2:]:
        for each in (memory, loaded, copied):
            feed(each, *batch)
    for each in (loaded, copied):
        assert each.state_dict().keys() == memory.state_dict().keys()
        for name, value in memory.state_dict().items():
            assert torch.equal(each.state_dict()[name], value)
    with pytest.raises(RuntimeError, match="size mismatch"):
        (CrossBatchMemory(11, 5) if kind == "ring" else ClusterMemory(5, 5)).load_state_dict(memory.state_dict())


@pytest.mark.parametrize("kind", ["ring", "cluster"])
def test_compiles_in_one_graph(backend: Backend, kind: str) -> None:
    """Mining, then writing; with batch sizes that change: two graphs at most, and the same bits."""
    torch.compiler.reset()
    eager, compiled = (make(kind, device=backend.device) for _ in range(2))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(memory: Module, x: Tensor, labels: Tensor) -> Tensor:
        loss = triplet_loss(x, labels, *memory.rows())
        feed(memory, x, labels)
        return loss.detach()

    fast = torch.compile(lambda x, labels: step(compiled, x, labels), fullgraph=True, backend=counter)
    for x, labels in batches(4, 9, 3, 8, 5):
        x, labels = x.to(backend.device), labels.to(backend.device)
        assert torch.equal(fast(x, labels), step(eager, x, labels))
        for name, value in eager.state_dict().items():
            assert torch.equal(compiled.state_dict()[name], value), name
    assert counter.frame_count <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ring", "cluster"])
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_does_not_wait_for_the_gpu(kind: str, name: str) -> None:
    memory, given = make(kind, device="cuda"), [[t.cuda() for t in batch] for batch in batches(4, 9)]
    with use_backend(name):
        feed(memory, *given[0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            feed(memory, *given[1])
            memory.rows()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_wide_centroids(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what the kernel holds the PyTorch path serves, or a named backend raises."""
    monkeypatch.setattr(apd_kernels.memory, "MAX_DIMENSION", 4)
    memory, (x, labels) = ClusterMemory(4, 5, device=backend.device), batches(6)[0]
    if backend.name == "triton":
        with pytest.raises(ValueError, match=r"x: the 'triton' backend takes at most 4 dimensions, got 5"):
            memory.update(x.to(backend.device), labels.to(backend.device))
    else:
        memory.update(x.to(backend.device), labels.to(backend.device))
        assert memory.valid.any()


def _golden(folder: Path, name: str) -> dict[str, dict[str, np.ndarray]]:
    with np.load(folder / "golden" / f"{name}.npz", allow_pickle=False) as file:
        return {
            case: {key.removeprefix(f"{case}__"): file[key] for key in file.files if key.startswith(f"{case}__")}
            for case in file["cases"].tolist()
        }


def test_golden_queue(real_data: Path) -> None:
    """The same queue as pytorch-metric-learning's after every step; its unwritten labels are 0."""
    cases = _golden(real_data, "pml_CrossBatchMemory")
    assert len(cases) == 4
    for case in cases.values():
        memory = CrossBatchMemory(int(case["memory_size"]), 32, dtype=torch.float64)
        for step in range(1, 6):
            memory.enqueue(torch.from_numpy(case[f"embeddings{step}"]), torch.from_numpy(case[f"labels{step}"]))
            assert memory.pointer == int(case[f"queue_idx{step}"])
            assert bool(memory.valid.all()) == bool(case[f"filled{step}"])
            ours = torch.where(memory.valid, memory.labels, 0)
            assert torch.equal(ours, torch.from_numpy(case[f"memory_labels{step}"]).long())
        assert torch.equal(memory.features, torch.from_numpy(case["memory_after5_f64"]))


def test_golden_centroids(real_data: Path) -> None:
    """Cluster Contrast's memory over two steps, and BAU's, each sequential per sample."""
    seen = 0
    for name, case in _golden(real_data, "clustercontrast_ClusterMemory").items():
        if case["use_hard"]:
            continue
        seen += 1
        memory = ClusterMemory(*case["features_before"].shape, momentum=float(case["momentum"]), dtype=torch.float64)
        memory.centroids.copy_(torch.from_numpy(case["features_before"]))
        memory.valid.fill_(True)
        for step in (1, 2):
            x = torch.nn.functional.normalize(torch.from_numpy(case[f"inputs{step}"]).double(), dim=1)
            memory.update(x, torch.from_numpy(case[f"targets{step}"]))
            # The peer keeps its momentum in float32.
            assert_close(memory.centroids, torch.from_numpy(case[f"features_after{step}_f64"]), 1e-7, name)
    for name, case in _golden(real_data, "bau_MemoryBank_momentum_update").items():
        seen += 1
        memory = ClusterMemory(*case["features_before"].shape, momentum=float(case["momentum"]))
        memory.centroids.copy_(torch.from_numpy(case["features_before"]))
        memory.valid.fill_(True)
        memory.update(torch.from_numpy(case["inputs"]), torch.from_numpy(case["targets"]))
        assert_close(memory.centroids, torch.from_numpy(case["features_after"]), 1e-6, name)
    assert seen == 7


RING, CLUSTER = CrossBatchMemory(4, 2), ClusterMemory(4, 2)
ROWS, IDS = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CrossBatchMemory(0, 2), ValueError, r"capacity: expected at least 1, got 0"),
        (lambda: CrossBatchMemory(2.0, 2), TypeError, r"capacity: expected an int, got float"),
        (lambda: CrossBatchMemory(2, 0), ValueError, r"dimension: expected at least 1, got 0"),
        (lambda: CrossBatchMemory(2, 2, dtype=torch.int64), TypeError, r"dtype: expected float16, .*got torch.int64"),
        (lambda: ClusterMemory(-1, 2), ValueError, r"identities: expected at least 1, got -1"),
        (lambda: ClusterMemory(2, 2, momentum=1.1), ValueError, r"momentum: expected at most 1, got 1.1"),
        (lambda: ClusterMemory(2, 2, momentum=-0.1), ValueError, r"momentum: expected a finite number of at least 0"),
        (lambda: ClusterMemory(2, 2, dtype=torch.float16), TypeError, r"centroids: expected float32 or float64"),
        (lambda: ClusterMemory(2, 2).half().update(ROWS, IDS), TypeError, r"centroids: expected float32 or float64"),
        *(
            entry
            for feeder in (RING.enqueue, CLUSTER.update, CLUSTER.reset)
            for entry in (
                (lambda feeder=feeder: feeder(ROWS[:, :1], IDS), ValueError, r"x: expected shape \(N, 2\), got"),
                (lambda feeder=feeder: feeder(ROWS[None], IDS), ValueError, r"x: expected shape \(N, D\), got"),
                (lambda feeder=feeder: feeder(ROWS.int(), IDS), TypeError, r"x: expected float16, .* got torch.int32"),
                (lambda feeder=feeder: feeder(ROWS.to("meta"), IDS), ValueError, r"x: expected device cpu as the mem"),
                (lambda feeder=feeder: feeder(ROWS, IDS[:2]), ValueError, r"labels: expected shape \(3,\), got \(2,\)"),
                (lambda feeder=feeder: feeder(ROWS, IDS.float()), TypeError, r"labels: expected an integer dtype"),
            )
        ),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_hardest_sample_of_an_identity_moves_it(backend: Backend) -> None:
    """The least similar to the centroid as it was, of equal ones the first; labels of nobody move nothing."""
    memory = ClusterMemory(3, 2, momentum=0.5, hardest=True, device=backend.device)
    memory.update(
        torch.tensor([[2.0, 0.0], [0.0, 3.0]], device=backend.device), torch.tensor([0, 1], device=backend.device)
    )
    x = torch.tensor([[1.0, 0], [0, 1], [0, -1], [1, 0], [5, 5], [-1, 0]], device=backend.device)
    memory.update(x, torch.tensor([0, 0, 0, 1, -1, 7], device=backend.device))
    half = 0.5**0.5
    expected = torch.tensor([[half, half], [half, half], [0, 0]])  # of (0, 1) and (0, -1), equally similar, the first
    assert_close(memory.centroids, expected, 1e-6)
    assert memory.valid.tolist() == [True, True, False]
    assert repr(memory) == "ClusterMemory(identities=3, dimension=2, momentum=0.5, hardest=True)"


@pytest.mark.parametrize("hardest", [False, True])
def test_update_in_backward(backend: Backend, hardest: bool) -> None:
    """Once in every backward pass, not in the forward pass, and as `update` does it."""
    labels = torch.tensor([0, 1, 0], device=backend.device)
    x = torch.tensor([[1.0, 0.2], [0.3, 1.0], [1.0, -0.4]], device=backend.device, requires_grad=True)
    memory, other = (ClusterMemory(2, 2, hardest=hardest, device=backend.device) for _ in range(2))
    for each in (memory, other):
        each.update(x, labels)
    rows = torch.nn.functional.normalize(x)
    memory.update_in_backward(rows, labels)
    loss = supervised_contrastive_loss(rows, labels, *memory.rows(), metric="dot")
    assert torch.equal(memory.centroids, other.centroids)
    for retain in (True, False):
        loss.backward(retain_graph=retain)
        other.update(rows, labels)
        assert torch.equal(memory.centroids, other.centroids)
    with pytest.raises(ValueError, match="x: expected features that require a gradient, got some without"):
        memory.update_in_backward(x.detach(), labels)


def test_update_in_backward_keeps_no_batch() -> None:
    memory, layer = ClusterMemory(4, 8), torch.nn.Linear(8, 8)
    alive = []
    for _ in range(3):
        x = layer(torch.randn(16, 8))
        memory.update_in_backward(x, torch.arange(16) % 4)
        x.square().sum().backward()
        alive.append(weakref.ref(x))
        del x
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3
