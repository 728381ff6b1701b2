from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from apd_kernels import identity_derangement, use_backend


def label_sets(count: int, largest: int, seed: int) -> list[Tensor]:
    """Random labels of which some identity may have more than half."""
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for _ in range(count):
        size, identities = (int(torch.randint(1, limit, (), generator=generator)) for limit in (largest, 12))
        sets.append(torch.randint(-identities, identities, (size,), generator=generator))
    return sets


def is_permutation(permutation: Tensor) -> bool:
    return permutation.dtype == torch.int64 and permutation.sort().values.tolist() == list(range(len(permutation)))


def test_every_row_gets_another_identity() -> None:
    """On random label sets: where that can be; elsewhere as many rows as can, twice those of the other identities."""
    feasible = 0
    for labels in label_sets(300, 40, 0):
        permutation, valid = identity_derangement(labels, return_valid=True, check=False)
        assert is_permutation(permutation)
        assert torch.equal(valid, labels != labels[permutation])
        size, largest = len(labels), int(labels.unique(return_counts=True)[1].max())
        assert int(valid.sum()) == (size if 2 * largest <= size else 2 * (size - largest))
        if 2 * largest <= size:
            feasible += 1
            assert (labels != labels[identity_derangement(labels)]).all()
        else:
            with pytest.raises(ValueError, match=rf"in more than half of {size} rows, got identity -?\d+ in {largest}"):
                identity_derangement(labels)
    assert 100 < feasible < 290


def test_every_pair_of_identities_occurs() -> None:
    for labels in ([0, 0, 1, 2, 2, 3], [5, 5, 5, 7, 8, 9, 9], [3, 3, 4, 4], list(range(8)) * 3):
        given = torch.tensor(labels)
        seen = {
            pair for _ in range(400) for pair in zip(labels, given[identity_derangement(given)].tolist(), strict=True)
        }
        assert seen == set(itertools.permutations(set(labels), 2))


def distribution(labels: list[int]) -> Counter[tuple[int, ...]]:
    """How many of the equally likely outcomes (order of identities, orders inside, shift) give each permutation."""
    identities = sorted(set(labels))
    members = [[row for row, label in enumerate(labels) if label == identity] for identity in identities]
    size, largest = len(labels), max(map(len, members))
    outcomes: Counter[tuple[int, ...]] = Counter()
    for order in itertools.permutations(range(len(identities))):
        for inside in itertools.product(*(itertools.permutations(members[i]) for i in order)):
            rows = [row for group in inside for row in group]
            for shift in range(min(largest, size - largest), max(largest, size - largest) + 1):
                permutation = [0] * size
                for place, row in enumerate(rows):
                    permutation[row] = rows[(place + shift) % size]
                outcomes[tuple(permutation)] += 1
    return outcomes


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [4, 7, 4, 1, 1], [0, 0, 1, 2, 2, 3], [6, 6, 6, 2]])
def test_frequencies(labels: list[int]) -> None:
    """Every possible permutation, and no other, as often as the algorithm makes it, within 5 standard deviations."""
    outcomes = distribution(labels)
    total, draws = outcomes.total(), 6000
    generator = torch.Generator().manual_seed(0)
    given = torch.tensor(labels)
    seen = Counter(tuple(identity_derangement(given, generator, check=False).tolist()) for _ in range(draws))
    assert seen.keys() <= outcomes.keys()
    for permutation, weight in outcomes.items():
        p = weight / total
        assert abs(seen[permutation] - draws * p) <= 5 * (draws * p * (1 - p)) ** 0.5, permutation
    pairs, expected = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for counts, by_pair in ((seen, pairs), (outcomes, expected)):
        for permutation, count in counts.items():
            for row, partner in enumerate(permutation):
                by_pair[row, partner] += count
    for pair, weight in expected.items():
        p = weight / total
        assert abs(pairs[pair] - draws * p) <= 5 * (draws * p * (1 - p)) ** 0.5 + 1e-9, pair


def test_derangement_of_few() -> None:
    for dtype in (torch.uint8, torch.int32, torch.int64):
        permutation, valid = identity_derangement(torch.zeros(0, dtype=dtype), return_valid=True)
        assert (permutation.dtype, permutation.shape, valid.dtype, valid.shape) == (torch.int64, (0,), torch.bool, (0,))
        one = torch.ones(1, dtype=dtype)
        permutation, valid = identity_derangement(one, return_valid=True, check=False)
        assert (permutation.tolist(), valid.tolist()) == ([0], [False])
        with pytest.raises(
            ValueError, match=r"labels: expected no identity in more than half of 1 rows, got identity 1"
        ):
            identity_derangement(one)
        assert identity_derangement(torch.tensor([3, 4], dtype=dtype)).tolist() == [1, 0]


def test_derangement_repeats_with_its_generator() -> None:
    labels = torch.arange(16).repeat_interleave(4)
    first, second, other = (
        identity_derangement(labels, torch.Generator().manual_seed(seed)).tolist() for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


def test_derangement_compiles_in_one_graph() -> None:
    """Without the check, which has to wait for the data: labels that no permutation serves come back as not valid."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda labels: identity_derangement(labels, return_valid=True), fullgraph=True, backend=counter
    )
    for size in (12, 9, 16, 30):
        labels = torch.arange(size) // 3
        permutation, valid = compiled(labels)
        assert is_permutation(permutation)
        assert torch.equal(valid, labels != labels[permutation])
        assert valid.all()
    assert counter.frame_count <= 2
    assert compiled(torch.tensor([1, 1, 1, 2]))[1].sum() == 2


def test_derangement_needs_no_backend() -> None:
    """It is made of PyTorch operations on every device."""
    labels = torch.tensor([1, 1, 2, 2])
    with use_backend("triton"):
        assert (labels != labels[identity_derangement(labels)]).all()


@pytest.mark.gpu
def test_derangement_does_not_wait_for_the_gpu() -> None:
    labels = torch.tensor([1, 1, 2, 2, 3], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        permutation, valid = identity_derangement(labels, return_valid=True)
        unserved = identity_derangement(labels[:1], return_valid=True)[1]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert is_permutation(permutation.cpu())
    assert valid.all()
    assert not unserved.any()
    with pytest.raises(ValueError, match="labels: expected no identity in more than half of 1 rows"):
        identity_derangement(labels[:1], check=True)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([1, 2], TypeError, r"labels: expected a torch.Tensor, got list"),
        (torch.zeros(2), TypeError, r"labels: expected an integer dtype, got torch.float32"),
        (torch.zeros(2, dtype=torch.bool), TypeError, r"labels: expected an integer dtype, got torch.bool"),
        (torch.zeros(2, 1, dtype=torch.int64), ValueError, r"labels: expected shape \(B,\), got \(2, 1\)"),
    ],
)
def test_bad_labels(labels: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        identity_derangement(labels)
