"""Real process groups: gloo, 2 and 4 processes of one thread, started once each."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import warm
from oracle import assert_close, features
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apd_kernels import (
    ClusterMemory,
    CrossBatchMemory,
    RankAccumulator,
    RankMetrics,
    batch_hard,
    gather_features,
    pairwise_distance,
    rank_metrics,
    triplet_loss,
)

SIZES = {2: (5, 3), 4: (4, 0, 7, 2)}  # rows of each rank
IMAGES, D = 6, 5


def model() -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    linear = nn.Linear(IMAGES, D, dtype=torch.float64)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return nn.Sequential(linear, nn.Tanh())  # distances alone would leave the bias without a gradient


def global_batch(world: int) -> tuple[Tensor, Tensor]:
    return features(sum(SIZES[world]), IMAGES, seed=world, identities=3)


def to_all(own: Tensor, everybody: Tensor) -> Tensor:
    """A loss of each own row against all rows."""
    return nn.functional.softplus(pairwise_distance(own, everybody, metric="sqeuclidean") / 9).mean(1)


def work(rank: int, world: int, folder: str) -> None:
    """What one process does; its results go into a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(minutes=5),  # a busy machine may start the processes far apart
    )
    group = dist.new_group([1, world - 1]) if world == 4 else None
    try:
        results = {name: scenario(rank, world) for name, scenario in SCENARIOS.items()}
        if world == 4 and rank in (1, 3):
            results["subgroup"] = gather_features(*own_batch(rank, world), group=group)
        torch.save(results, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # without taking the interpreter down, where a thread of gloo's aborted once on a busy machine


def own_batch(rank: int, world: int) -> tuple[Tensor, Tensor]:
    return tuple(t.split(SIZES[world])[rank] for t in global_batch(world))  # type: ignore[return-value]


def gathered(rank: int, world: int) -> dict[str, Any]:
    """Values of all kinds."""
    x, labels = own_batch(rank, world)
    return {
        "plain": gather_features(x, labels),
        "half": gather_features(x.half(), labels.to(torch.int16)),
        "bfloat16": gather_features(x.bfloat16(), labels.to(torch.uint8)),
        "sets": gather_features(torch.stack([x, 2 * x, 3 * x]), labels),
        "strided": gather_features(x.mT.contiguous().mT, labels),
        "nothing": gather_features(x[:0], labels[:0]),
    }


def same_loss_everywhere(rank: int, world: int) -> dict[str, Any]:
    """Every rank takes the loss of the global batch, under DistributedDataParallel."""
    x, labels = own_batch(rank, world)
    network = DistributedDataParallel(model())
    output = network(x)
    output.retain_grad()
    everybody = gather_features(output, labels)
    loss = triplet_loss(everybody.features, everybody.labels, margin=None)
    loss.backward()
    return {"loss": loss.detach(), "features": output.grad, "parameters": [p.grad for p in network.parameters()]}


def own_rows_against_all(rank: int, world: int) -> dict[str, Any]:
    """Every rank takes the mean loss of its rows, weighted as documented."""
    x, labels = own_batch(rank, world)
    network = DistributedDataParallel(model())
    everybody = gather_features(network(x), labels)
    own = everybody.features[everybody.start : everybody.start + len(x)]
    loss = to_all(own, everybody.features).sum() * world / len(everybody.labels)
    loss.backward()
    return {"parameters": [p.grad for p in network.parameters()]}


def gradient_kinds(rank: int, world: int) -> dict[str, Tensor]:
    """Σ over the ranks of (rank + 1) · Σ w ⊙ gathered, in half precision and with sets."""
    x, labels = own_batch(rank, world)
    results = {}
    for name, leaf in {"half": x.half(), "sets": torch.stack([x, x]).mT.contiguous().mT}.items():
        leaf = leaf.clone().requires_grad_()
        everybody = gather_features(leaf, labels).features
        weights = torch.arange(everybody.numel(), dtype=torch.float64).reshape(everybody.shape) / 16
        (everybody * weights * (rank + 1)).sum().backward()
        results[name] = leaf.grad
    return results


def second_derivative(rank: int, world: int) -> str:
    x, labels = own_batch(rank, world)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(gather_features(x, labels).features.square().sum(), x, create_graph=True)
    try:
        gradient.sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


def memories(rank: int, world: int) -> dict[str, Tensor]:
    """A ring and centroids, fed three gathered batches."""
    x, labels = own_batch(rank, world)
    ring, clusters = CrossBatchMemory(20, IMAGES, dtype=torch.float64), ClusterMemory(3, IMAGES)
    for step in range(3):
        everybody = gather_features(x + step, labels)
        ring.enqueue(everybody.features, everybody.labels)
        clusters.update(everybody.features, everybody.labels)
    return {**ring.state_dict(), **clusters.state_dict()}


def mismatches(rank: int, world: int) -> list[str]:
    """The last rank's features differ from the others'; nobody hangs."""
    x, labels = own_batch(rank, world)
    messages = []
    for other in (x[:, :-1], x.float(), x[None]):
        with pytest.raises(ValueError, match="features: expected") as error:
            gather_features(other if rank == world - 1 else x, labels)
        messages.append(str(error.value))
    return messages


PIECES = {2: (300, 157), 4: (100, 0, 7, 350)}  # gallery images of each rank


def retrieval(world: int) -> tuple[Tensor, ...]:
    """Queries and gallery; ties, junk, a query's own image."""
    generator = torch.Generator().manual_seed(world)
    images = sum(PIECES[world])
    gallery = torch.randint(-2, 3, (images, 24), generator=generator).float() + torch.randn(24, generator=generator)
    ids, cams = (torch.randint(low, 40, (images,), generator=generator) for low in (-1, 37))
    own = torch.arange(0, images, 7)
    return gallery[own], gallery, ids[own], ids, cams[own], cams, own


def ranking(rank: int, world: int) -> dict[str, Any]:
    """Each rank has its piece of the gallery, in two shards."""
    query, gallery, query_ids, gallery_ids, query_cams, gallery_cams, own = retrieval(world)
    start = sum(PIECES[world][:rank])
    middle, stop = start + PIECES[world][rank] // 3, start + PIECES[world][rank]
    results = {}
    for metric, options in RANKINGS.items():
        ranks = RankAccumulator(query, query_ids, query_cams, metric=metric, exclude=own, **options)
        for step in (ranks.add_positives, ranks.count):
            for piece in (slice(start, middle), slice(middle, stop)):
                step(gallery[piece], gallery_ids[piece], gallery_cams[piece])
            ranks.exchange()
        results[metric] = tuple(ranks.compute())
    return results


RANKINGS: dict[str, dict[str, Any]] = {"euclidean": {"ties": "expected"}, "cosine": {}, "dot": {"ap": "trapezoidal"}}
SCENARIOS = {
    function.__name__: function
    for function in (
        gathered,
        same_loss_everywhere,
        own_rows_against_all,
        gradient_kinds,
        second_derivative,
        memories,
        mismatches,
        ranking,
    )
}


@pytest.fixture(scope="module", params=[2, 4], ids="{} processes".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each rank."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("gloo is not available")
    folder: Path = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        arguments = request.param, str(folder)
        torch.multiprocessing.start_processes(work, arguments, nprocs=request.param, start_method=warm.START)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


def test_rows_of_all_ranks_in_order(ranks: list[dict[str, Any]]) -> None:
    world = len(ranks)
    x, labels = global_batch(world)
    expected = {
        "plain": (x, labels),
        "half": (x.half(), labels.to(torch.int16)),
        "bfloat16": (x.bfloat16(), labels.to(torch.uint8)),
        "sets": (torch.stack([x, 2 * x, 3 * x]), labels),
        "strided": (x, labels),
        "nothing": (x[:0], labels[:0]),
    }
    for rank, results in enumerate(ranks):
        for name, (rows, ids) in expected.items():
            ours = results["gathered"][name]
            assert ours.features.dtype == rows.dtype
            assert ours.labels.dtype == ids.dtype
            assert torch.equal(ours.features, rows)
            assert torch.equal(ours.labels, ids)
            assert ours.start == (0 if name == "nothing" else sum(SIZES[world][:rank]))


def test_gradient_of_one_process_with_the_global_batch(ranks: list[dict[str, Any]]) -> None:
    """Parameters: exactly that, by DistributedDataParallel's mean. Features: the sum of every rank's equal loss."""
    world = len(ranks)
    x, labels = global_batch(world)
    network = model()
    output = network(x)
    output.retain_grad()
    loss = triplet_loss(output, labels, margin=None)
    loss.backward()
    for rank, results in enumerate(ranks):
        ours = results["same_loss_everywhere"]
        assert torch.equal(ours["loss"], loss.detach())
        assert_close(ours["features"], world * output.grad.split(SIZES[world])[rank], 1e-12, "features")
        for gradient, parameter in zip(ours["parameters"], network.parameters(), strict=True):
            assert_close(gradient, parameter.grad, 1e-12, "parameters")


def test_gradient_of_own_rows_against_all(ranks: list[dict[str, Any]]) -> None:
    """Unequal batches: weighted as documented, parameters follow the mean over the global batch."""
    x, _ = global_batch(len(ranks))
    network = model()
    output = network(x)
    to_all(output, output).mean().backward()
    for results in ranks:
        for gradient, parameter in zip(
            results["own_rows_against_all"]["parameters"], network.parameters(), strict=True
        ):
            assert_close(gradient, parameter.grad, 1e-12)


def test_gradient_of_sets_and_halves(ranks: list[dict[str, Any]]) -> None:
    world = len(ranks)
    x, _ = global_batch(world)
    for rank, results in enumerate(ranks):
        for name, shape in (("half", x.shape), ("sets", (2, *x.shape))):
            weights = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape) / 16
            expected = (weights * sum(range(1, world + 1))).split(SIZES[world], -2)[rank]
            ours = results["gradient_kinds"][name]
            assert ours.dtype == (torch.float16 if name == "half" else torch.float64)
            assert_close(ours, expected, 1e-3 if name == "half" else 1e-12, name)


def test_memories_are_the_same_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    """And the same as in one process that is given the global batches."""
    x, labels = global_batch(len(ranks))
    ring, clusters = CrossBatchMemory(20, IMAGES, dtype=torch.float64), ClusterMemory(3, IMAGES)
    for step in range(3):
        ring.enqueue(x + step, labels)
        clusters.update(x + step, labels)
    expected = {**ring.state_dict(), **clusters.state_dict()}
    for results in ranks:
        assert results["memories"].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(results["memories"][name], value), name


def test_metrics_of_a_gallery_on_several_ranks(ranks: list[dict[str, Any]]) -> None:
    """Bit for bit those of one process with the whole gallery, on every rank."""
    *arguments, own = retrieval(len(ranks))
    for metric, options in RANKINGS.items():
        whole = rank_metrics(*arguments, metric=metric, exclude=own, **options)
        for results in ranks:
            for name, found, wanted in zip(RankMetrics._fields, results["ranking"][metric], whole, strict=True):
                assert str(found) == str(wanted), name
                if isinstance(wanted, Tensor):
                    assert torch.equal(found.nan_to_num(-1), wanted.nan_to_num(-1)), name


def test_subgroup(ranks: list[dict[str, Any]]) -> None:
    """The order is that of the ranks in the group."""
    if len(ranks) != 4:
        pytest.skip("a subgroup needs more processes")
    expected = global_batch(4)[0].split(SIZES[4])
    for rank, start in ((1, 0), (3, len(expected[1]))):
        assert torch.equal(ranks[rank]["subgroup"].features, torch.cat([expected[1], expected[3]]))
        assert ranks[rank]["subgroup"].start == start


def test_ranks_that_differ_are_named(ranks: list[dict[str, Any]]) -> None:
    last = len(ranks) - 1
    common = r"features: expected torch.float64 of shape (N, 6) on every rank as on rank 0, got "
    for results in ranks:
        assert results["mismatches"] == [
            f"{common}torch.float64 of shape (N, 5) on rank {last}",
            f"{common}torch.float32 of shape (N, 6) on rank {last}",
            f"{common}torch.float64 of shape (1, N, 6) on rank {last}",
        ]


def test_second_derivatives_are_refused(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert "once_differentiable" in results["second_derivative"]


def test_one_process_has_nothing_to_gather(tmp_path: Path) -> None:
    """Without a group, and in a group of one: the arguments themselves."""
    x, labels = features(6, 4)

    def check() -> None:
        ours = gather_features(x, labels)
        assert ours.features is x
        assert ours.labels is labels
        assert ours.start == 0
        assert batch_hard(*ours[:2]).valid.any()

    check()
    if not (dist.is_available() and dist.is_gloo_available()):
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        check()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0.0]], torch.zeros(1)), TypeError, r"features: expected a torch.Tensor, got list"),
        ((torch.zeros(2), torch.zeros(2)), ValueError, r"features: expected shape \(N, D\) or \(S, N, D\), got \(2,\)"),
        ((torch.zeros(2, 3), torch.zeros(2)), TypeError, r"labels: expected an integer dtype, got torch.float32"),
        ((torch.zeros(2, 3), torch.zeros(3).int()), ValueError, r"labels: expected shape \(2,\), got \(3,\)"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gather_features(*arguments)
