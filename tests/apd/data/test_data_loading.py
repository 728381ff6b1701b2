"""PK sampling, and batches that depend on nothing but the seed and the step."""

from __future__ import annotations

import os
import pickle
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from apd.data import loading
from apd.data.augmentation import Augmentation, ShiftedCrop, training_transform
from apd.data.images import ImageStore
from apd.data.loading import device_batches, images_in_order, training_batches
from apd.data.sampler import DomainSampler, PKSampler
from apd.errors import InputError

# PKSampler


def _labels(counts: list[int], seed: int = 0) -> np.ndarray:
    """`counts[i]` images of identity 10 i + 3, in random order."""
    labels = np.repeat(np.arange(len(counts)) * 10 + 3, counts)
    return np.random.default_rng(seed).permutation(labels)


CASES = [  # images of each identity, P, K
    ([8] * 12, 4, 4),
    ([4] * 4, 4, 4),
    ([12, 4, 8, 4, 16], 2, 4),
    ([5, 7, 9, 11, 13], 3, 4),
    ([1, 2, 3, 4, 9], 3, 4),
    ([1] * 7, 3, 4),
    ([1], 1, 1),
    ([3, 2, 5], 2, 1),
    ([1, 100], 2, 8),
    (list(range(1, 40)), 16, 4),
]


@pytest.mark.parametrize(("counts", "p", "k"), CASES)
def test_epoch(counts: list[int], p: int, k: int) -> None:
    labels = _labels(counts)
    size = dict(Counter(labels.tolist()))
    sampler = PKSampler(labels, p * k, k, seed=0)
    for number in range(5):
        epoch = sampler.epoch(number)
        assert epoch
        groups: Counter[int] = Counter()
        for batch in epoch:
            assert all(type(image) is int for image in batch)
            rows = labels[batch].reshape(p, k)
            assert (rows == rows[:, :1]).all()
            assert len(set(rows[:, 0].tolist())) == p
            groups.update(rows[:, 0].tolist())
        seen = Counter(image for batch in epoch for image in batch)
        for image, times in seen.items():
            few = size[int(labels[image])]
            # repetition tops up, as evenly as it goes; it never replaces an image that is there
            assert times in ({1} if few >= k else {k // few, -(-k // few)})
        for label, times in groups.items():
            assert sum(image in seen for image in np.flatnonzero(labels == label)) == min(times * k, size[label])
        left = [label for label, few in size.items() if groups[label] < max(1, few // k)]
        assert len(left) < p  # the epoch ends when, and only when, P identities cannot be found


@pytest.mark.parametrize(("groups", "identities"), [(1, 8), (3, 2), (5, 4)])
def test_every_image_once(groups: int, identities: int) -> None:
    """Where counts are equal multiples of K and no identity can be left over."""
    p = min(identities, 4)
    sampler = PKSampler(_labels([groups * 4] * identities), p * 4, 4, seed=0)
    seen = sorted(image for batch in sampler.epoch(0) for image in batch)
    assert seen == list(range(groups * 4 * identities))


def test_no_image_waits_for_ever() -> None:
    """What does not fill a group, or is left over, is another image in another epoch."""
    labels = _labels([5, 6, 7, 9])
    sampler = PKSampler(labels, 8, 4, seed=0)
    seen = {image for number in range(30) for batch in sampler.epoch(number) for image in batch}
    assert seen == set(range(len(labels)))


def test_epochs_differ_and_repeat() -> None:
    labels = _labels([8] * 12)
    sampler = PKSampler(labels, 16, 4, seed=1)
    epochs = [sampler.epoch(number) for number in range(4)]
    assert all(a != b for i, a in enumerate(epochs) for b in epochs[:i])
    assert [sampler.epoch(number) for number in (3, 1, 0, 2)] == [epochs[number] for number in (3, 1, 0, 2)]
    assert PKSampler(labels, 16, 4, seed=1).epoch(2) == epochs[2]
    assert PKSampler(labels, 16, 4, seed=2).epoch(2) != epochs[2]
    assert PKSampler(labels, 16, 4, seed=2).epoch(1) != epochs[2]  # seed and number do not just add up


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda x: np.array(x, np.int32)])
def test_labels_of_any_kind(kind: type) -> None:
    labels = _labels([5, 6, 7]).tolist()
    assert PKSampler(kind(labels), 8, 4, seed=0).epoch(0) == PKSampler(labels, 8, 4, seed=0).epoch(0)


def test_batches_from_any_step() -> None:
    sampler = PKSampler(_labels([5, 7, 9, 11, 13]), 12, 4, seed=0)
    lengths = [len(sampler.epoch(number)) for number in range(10)]
    expected = [batch for number in range(10) for batch in sampler.epoch(number)]
    for start in (0, 1, lengths[0] - 1, lengths[0], lengths[0] + 1, sum(lengths[:4]), sum(lengths[:6]) + 1):
        assert list(islice(sampler.batches(start), 7)) == expected[start : start + 7]


@pytest.mark.parametrize(
    ("counts", "batch_size", "instances", "message"),
    [
        ([4] * 3, 16, 4, r"expected at least 4 identities \(batches of 16, 4 images of each\), got 3"),
        ([], 16, 4, "expected at least 4 identities .* got 0"),
        ([4] * 9, 18, 4, "expected a multiple of the 4 images .* got 18"),
        ([4] * 9, 0, 4, "batch size: .* got 0"),
        ([4] * 9, 16, 0, "batch size"),
    ],
)
def test_impossible_batches(counts: list[int], batch_size: int, instances: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PKSampler(_labels(counts), batch_size, instances, seed=0)


# Domains


@pytest.mark.parametrize(("p", "shares"), [(6, [2, 2, 2]), (8, [3, 3, 2]), (3, [1, 1, 1])])
def test_domains_are_balanced(p: int, shares: list[int]) -> None:
    """Whatever their sizes: 4, 9 and 30 identities. The domains take turns within a batch."""
    counts = np.random.default_rng(0).integers(1, 9, 43)
    labels = np.repeat(np.arange(43), counts)
    domains = np.searchsorted([4, 13], labels, side="right")
    sampler = DomainSampler(labels, domains, p * 2, 2, seed=0)
    batches = list(islice(sampler.batches(0), 60))
    for batch in batches:
        rows = labels[batch].reshape(p, 2)
        assert (rows == rows[:, :1]).all()
        assert len(set(rows[:, 0].tolist())) == p
        found = domains[batch][::2]
        assert np.bincount(found).tolist() == shares
        assert found[:3].tolist() == [0, 1, 2]
    assert set(labels[np.concatenate(batches)]) == set(range(43))  # nobody is left out
    assert list(islice(sampler.batches(17), 5)) == batches[17:22]
    assert list(islice(DomainSampler(labels, domains, p * 2, 2, seed=1).batches(0), 60)) != batches


def test_impossible_domains() -> None:
    labels, domains = np.arange(9) // 3, np.arange(9) // 3
    with pytest.raises(InputError, match="each of the 3 sources in a step, got batches of 2 identities"):
        DomainSampler(labels, domains, 4, 2, seed=0)
    with pytest.raises(InputError, match="expected at least 2 identities"):
        DomainSampler(labels, domains, 12, 2, seed=0)
    with pytest.raises(InputError, match="expected a multiple of the 2 images"):
        DomainSampler(labels, domains, 7, 2, seed=0)


# Batches


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether `found` is uint8 `expected`, scaled to [0, 1] in float32."""
    return found.dtype == torch.float32 and torch.allclose(found, expected / 255, rtol=0, atol=1e-6)


OPTIONS = Augmentation(0.5, 3, 0.5, (0.4, 0.5, 0.6), 0.5, (0.2, 0.2, 0.2, 0.1), 0.2)
TRANSFORM = training_transform(OPTIONS)
LABELS = np.repeat(np.arange(6), 6)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    pictures = np.random.default_rng(0).integers(0, 256, (len(LABELS), 24, 12, 3), np.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(len(LABELS))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    return paths


@pytest.fixture
def store(paths: list[Path]) -> ImageStore:
    return ImageStore(paths, (24, 12), cache=True)


def _batches(
    store: ImageStore, start: int = 0, stop: int = 6, workers: int = 0, seed: int = 0, sampler_seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    sampler = PKSampler(LABELS, 8, 2, seed=sampler_seed)
    batches = training_batches(store, sampler, TRANSFORM, seed=seed, start=start, stop=stop, workers=workers)
    return [(images, indices) for images, indices in batches]


def _assert_equal(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    assert len(found) == len(expected)
    for (images, indices), (expected_images, expected_indices) in zip(found, expected, strict=True):
        assert torch.equal(indices, expected_indices)
        assert torch.equal(images, expected_images)


def test_training_batches(store: ImageStore) -> None:
    batches = _batches(store)
    assert [indices.tolist() for _, indices in batches] == list(islice(PKSampler(LABELS, 8, 2, seed=0).batches(0), 6))
    for images, indices in batches:
        assert images.dtype == torch.float32
        assert images.shape == (8, 3, 24, 12)
        assert indices.dtype == torch.int64
        assert images.min() >= 0
        assert images.max() <= 1
    assert _batches(store, 4, 4) == []


@pytest.mark.parametrize("cache", [True, False])
def test_workers_change_nothing(paths: list[Path], cache: bool) -> None:
    store = ImageStore(paths, (24, 12), cache=cache)
    _assert_equal(_batches(store, workers=2), _batches(store))


def _threads(image: Tensor) -> Tensor:
    return torch.tensor(torch.get_num_threads())


def _parent(image: Tensor) -> Tensor:
    return torch.tensor(os.getppid())


def test_workers_are_not_forked_from_a_process_with_threads(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose locks they would wait for; and there are no more of them than make sense."""
    order = {"seed": 0, "start": 0, "stop": 1}
    sampler = PKSampler(LABELS, 12, 4, seed=0)
    (batch,) = training_batches(store, sampler, _parent, workers=1, **order)
    server = int(batch.images[0])
    assert server != os.getpid()
    os.kill(server, signal.SIGTERM)  # as Slurm does, while one more batch is needed
    (batch,) = training_batches(store, sampler, _parent, workers=1, **order)
    assert set(batch.images.tolist()) == {server}

    asked: list[int] = []
    monkeypatch.setattr(loading.os, "cpu_count", lambda: None)
    monkeypatch.setattr(loading, "DataLoader", lambda *args, **kw: asked.append(kw["num_workers"]) or [])
    assert list(training_batches(store, sampler, _parent, workers=10**9, **order)) == []
    assert asked == [8]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory that is a file without a name")
def test_workers_share_the_images_that_are_kept(store: ImageStore) -> None:
    """Neither copied for each, nor in /dev/shm, of which containers have 64 MB."""
    sent = ForkingPickler.dumps(store)
    assert len(sent) < store.bytes / 4
    received = pickle.loads(sent)
    assert torch.equal(received.all(), store.all())
    store.all()[3] = 7
    assert (received[3] == 7).all()
    assert not store.all().is_shared()


def test_workers_take_one_thread_each(store: ImageStore) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        order = {"seed": 0, "start": 0, "stop": 2, "workers": 2}
        sampler = PKSampler(LABELS, 12, 4, seed=0)
        batches = list(training_batches(store, sampler, _threads, **order))
    finally:
        torch.set_num_threads(threads)
    assert [batch.images.tolist() for batch in batches] == [[1] * 12] * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_restart_changes_nothing(store: ImageStore, workers: int) -> None:
    whole = _batches(store)
    torch.manual_seed(12345)
    _assert_equal(_batches(store, 4, workers=workers), whole[4:])


@pytest.mark.parametrize("where", ["workers", "device"])
def test_rows_of_a_process(store: ImageStore, where: str) -> None:
    """Each has its own images as they would be in the whole batch, and knows which the others have."""

    def batches(rows: slice, start: int = 0) -> list[tuple[Tensor, Tensor]]:
        sampler, order = PKSampler(LABELS, 8, 2, seed=0), {"seed": 0, "start": start, "stop": 4, "rows": rows}
        if where == "device":
            return [*map(tuple, device_batches(store.all(), sampler, OPTIONS, **order))]
        return [*map(tuple, training_batches(store, sampler, TRANSFORM, workers=0, **order))]

    whole = batches(slice(None))
    parts = [batches(slice(0, 4)), batches(slice(4, 8))]
    for step, (images, indices) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), images)
        assert all(torch.equal(part[step][1], indices) for part in parts)
    _assert_equal(batches(slice(None), 2), whole[2:])


def test_batches_on_the_device(store: ImageStore) -> None:
    sampler = PKSampler(LABELS, 8, 2, seed=0)
    before = torch.get_rng_state()
    batches = list(device_batches(store.all(), sampler, OPTIONS, seed=0, start=0, stop=6))
    assert torch.equal(torch.get_rng_state(), before)
    assert [indices.tolist() for _, indices in batches] == list(islice(sampler.batches(0), 6))
    for images, _ in batches:
        assert images.dtype == torch.float32
        assert images.shape == (8, 3, 24, 12)
        assert 0 <= images.min() <= images.max() <= 1
    plain = device_batches(store.all(), sampler, Augmentation(), seed=0, start=0, stop=2)
    for images, indices in plain:
        assert _same(images, torch.stack([store[i] for i in indices.tolist()]))
    other = next(device_batches(store.all(), sampler, OPTIONS, seed=1, start=0, stop=1))
    assert not torch.equal(other.images, batches[0].images)


@pytest.mark.parametrize("workers", [0, 2])
def test_random_numbers_of_torch_are_left_alone(store: ImageStore, workers: int) -> None:
    before = torch.get_rng_state()
    _batches(store, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


class _SameImage:
    """Every place of every batch holds image 5."""

    def batches(self, start: int) -> Iterator[list[int]]:
        while True:
            yield [5] * 8


def test_augmentation_is_of_seed_step_and_place(store: ImageStore) -> None:
    def augmented(seed: int, start: int = 0) -> list[Tensor]:
        batches = training_batches(
            store, _SameImage(), ShiftedCrop(12), seed=seed, start=start, stop=start + 3, workers=0
        )
        return [image for images, _ in batches for image in images]

    images = augmented(0)
    different = {image.numpy().tobytes() for image in images}
    assert len(different) > 18  # of 24, out of 625 shifts: place and step make a difference
    assert not any(torch.equal(a, b) for a, b in pairwise(images))
    assert sum(torch.equal(a, b) for a, b in zip(images, augmented(1), strict=True)) < 3
    # What else is in the batch makes none.
    sampler = PKSampler(LABELS, 8, 2, seed=0)
    mixed = training_batches(store, sampler, ShiftedCrop(12), seed=0, start=0, stop=3, workers=0)
    for step, (batch, indices) in enumerate(mixed):
        for place, index in enumerate(indices.tolist()):
            if index == 5:
                assert torch.equal(batch[place], images[8 * step + place])


def test_seed_of_the_run(store: ImageStore) -> None:
    first, second = _batches(store, seed=0), _batches(store, seed=1)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))  # the sampler has its own
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("order", ["training", "plain"])
def test_unreadable_image(paths: list[Path], workers: int, order: str) -> None:
    """One line that names it, also from another process."""
    paths[7].write_bytes(b"text")
    store = ImageStore(paths, (24, 12), cache=False)
    with pytest.raises(InputError) as error:
        _ = _batches(store, workers=workers) if order == "training" else list(images_in_order(store, 5, workers))
    assert str(error.value) == (
        f"{paths[7]}: cannot be read as an image, or is cut off or damaged: cannot identify image file"
    )


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (7, 0), (7, 2), (36, 0), (100, 0), (100, 2)])
def test_images_in_order(store: ImageStore, batch_size: int, workers: int) -> None:
    before = torch.get_rng_state()
    batches = list(images_in_order(store, batch_size, workers))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    found = torch.cat(batches)
    assert _same(found, torch.stack([store[i] for i in range(len(store))]))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_images_in_order() -> None:
    assert list(images_in_order(ImageStore([], (24, 12), cache=False), 8, 0)) == []
