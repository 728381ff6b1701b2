"""Threads that share a gallery, and processes that share a folder."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("faiss")

from folder_lock import held

from apd_kernels import Gallery
from apd_kernels.gallery.atomic_folder import FolderBusy, exclusive
from apd_kernels.gallery.columns import Column

BATCH, BATCHES = 7, 12


def rows(number: int) -> torch.Tensor:
    return torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(number))


def add(gallery: Gallery, number: int) -> None:
    gallery.add(rows(number), torch.full((BATCH,), number), metadata={"name": [f"{number}"] * BATCH})


@pytest.fixture
def slow_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of several columns takes so long that a reader would see it half done."""
    append, keep = Column.append, Column.keep

    def slow_append(self: Column, values: np.ndarray) -> None:
        time.sleep(0.002)
        append(self, values)

    def slow_keep(self: Column, kept: np.ndarray) -> None:
        time.sleep(0.002)
        keep(self, kept)

    monkeypatch.setattr(Column, "append", slow_append)
    monkeypatch.setattr(Column, "keep", slow_keep)


@pytest.mark.parametrize("index", ["Flat", "HNSW8"])
def test_searches_beside_a_writer_see_whole_changes(index: str, slow_columns: None, tmp_path: Path) -> None:
    gallery = Gallery(8, "euclidean", index=index, device="cpu")
    add(gallery, 0)
    done = threading.Event()

    def search() -> int:
        count = 0
        while not done.is_set():
            found = gallery.search(rows(0), BATCH * BATCHES)
            each = found.ids[0][found.ids[0] >= 0].bincount()
            assert {*each.tolist()} <= {0, BATCH}  # all of a batch or nothing
            assert len(gallery.metadata["name"]) % BATCH == 0
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        searches = [pool.submit(search) for _ in range(3)]
        try:
            for number in range(1, BATCHES):
                add(gallery, number)
                if number % 3 == 0:
                    gallery.remove(gallery.keys[gallery.ids == number])
        finally:
            done.set()
        assert all(one.result() > 0 for one in searches)
    gallery.save(tmp_path / "g")
    assert torch.equal(Gallery.load(tmp_path / "g", device="cpu").keys, gallery.keys)


def test_writers_take_turns(slow_columns: None) -> None:
    gallery = Gallery(8, "euclidean", device="cpu")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: add(gallery, number), range(BATCHES)))
    assert gallery.keys.tolist() == list(range(BATCH * BATCHES))
    for number in range(BATCHES):
        mine = gallery.ids == number
        assert set(gallery.metadata["name"][mine.numpy()]) == {str(number)}
        assert torch.equal(gallery.features[mine], rows(number))


def test_a_copy_has_a_lock_of_its_own() -> None:
    gallery = Gallery(8, "euclidean", device="cpu")
    assert copy.copy(gallery._sharing) is not gallery._sharing


def test_one_writer_of_a_folder(tmp_path: Path) -> None:
    with (
        held(tmp_path),
        pytest.raises(FolderBusy, match="another process is writing to it"),
        exclusive(tmp_path, wait=False),
    ):
        pass
    with exclusive(tmp_path, wait=False), exclusive(tmp_path, wait=False):  # a thread may lock again
        pass
    with exclusive(tmp_path, wait=False):
        pass


def test_a_resealed_gallery_with_keys_that_repeat(tmp_path: Path) -> None:
    from apd_kernels import GalleryError

    gallery = Gallery(8, "euclidean", device="cpu")
    add(gallery, 0)
    gallery._columns.keys.replace(np.array([1]), np.array([0]))
    gallery.save(tmp_path)
    with pytest.raises(GalleryError, match="do not fit"):
        Gallery.load(tmp_path, device="cpu")


def test_a_resealed_gallery_with_a_row_that_is_not_finite(tmp_path: Path) -> None:
    from apd_kernels import GalleryError

    gallery = Gallery(8, "euclidean", device="cpu")
    add(gallery, 0)
    gallery._rows.matrix()[2, 3] = np.nan
    gallery.save(tmp_path)
    with pytest.raises(GalleryError, match="holds rows that are not finite"):
        Gallery.load(tmp_path, device="cpu")
    assert len(Gallery.load(tmp_path, device="cpu", verify=False)) == BATCH
