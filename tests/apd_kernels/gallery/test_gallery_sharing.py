"""Threads that share a gallery, and processes that share a folder."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("faiss")

from folder_lock import held

from apd_kernels import Gallery, GalleryError
from apd_kernels.gallery.atomic_folder import FolderBusy, exclusive
from apd_kernels.gallery.columns import Column
from apd_kernels.gallery.folder import write_gallery
from apd_kernels.gallery.rows import GalleryRows
from apd_kernels.gallery.sharing import Sharing

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


def test_neither_searches_nor_writers_are_kept_out() -> None:
    """With always one writer more who waits, a search waits for one of them and not for all."""
    sharing, done, writes = Sharing(), threading.Event(), 0

    def write() -> None:
        nonlocal writes
        while not done.is_set():
            with sharing.writing():
                time.sleep(0.001)
                writes += 1

    def search() -> None:
        for _ in range(10):
            before = writes
            with sharing.reading():
                assert writes <= before + 2
            time.sleep(0.004)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            pool.submit(write)
        try:
            pool.submit(search).result(10)
        finally:
            done.set()
    assert (sharing._readers, sharing._waiting, sharing._late, sharing._due) == (0, 0, 0, 0)


@pytest.mark.parametrize("index", ["Flat", "HNSW8"])
def test_searches_go_on_beside_a_save(index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = Gallery(8, "euclidean", index=index, device="cpu")
    add(gallery, 0)
    add(gallery, 1)
    gallery.remove(torch.tensor([0]))  # the index has one entry more now, which is not saved
    writing, searched = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> None:
        writing.set()
        assert searched.wait(10)
        write_gallery(*arguments)

    monkeypatch.setattr("apd_kernels.gallery.gallery.write_gallery", slow)
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(gallery.save, tmp_path)
        assert writing.wait(10)
        found = gallery.search(rows(0), 3)
        searched.set()
        saving.result()
    assert torch.equal(Gallery.load(tmp_path, device="cpu").search(rows(0), 3).indices, found.indices)


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


def test_a_folder_that_was_removed_while_it_was_waited_for(tmp_path: Path) -> None:
    """The lock is of the folder that is there now, or it would keep nobody out."""
    folder = tmp_path / "made" / "inside"
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        with held(folder):
            waiting = pool.submit(lambda: stack.enter_context(exclusive(folder)))
            time.sleep(0.1)
        waiting.result()
        with pytest.raises(FolderBusy), exclusive(folder, wait=False):
            pass
        pool.submit(stack.close).result()
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "made"])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_process_lets_go_whatever_it_has_forked(tmp_path: Path) -> None:
    """Workers live on for seconds."""
    read, write = os.pipe()
    killed = os.fork()
    if not killed:
        with exclusive(tmp_path):
            if not os.fork():
                os.write(write, b"forked")
                time.sleep(3)
                os._exit(0)
            time.sleep(10)
            os._exit(0)
    os.read(read, 6)
    with pytest.raises(FolderBusy), exclusive(tmp_path, wait=False):
        pass
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    with exclusive(tmp_path, wait=False):
        pass
    os.close(read)
    os.close(write)


def test_load_change_save_of_several(tmp_path: Path) -> None:
    """Without `locked` some of the rows are lost, as the later save knows nothing of them."""
    folder = tmp_path / "gallery"
    Gallery(8, "euclidean", device="cpu").save(folder)

    def append(number: int) -> None:
        with Gallery.locked(folder):
            gallery = Gallery.load(folder, device="cpu")
            add(gallery, number)
            gallery.save(folder)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(append, range(BATCHES)))
    assert sorted(Gallery.load(folder, device="cpu").ids.tolist()) == [n for n in range(BATCHES) for _ in range(BATCH)]


def _repeat_a_key(gallery: Gallery) -> None:
    gallery._columns.keys.replace(np.array([1]), np.array([0]))


def _lose_a_camera(gallery: Gallery) -> None:  # as a Ctrl-C in the middle of a change does
    gallery._columns.cams.keep(np.arange(BATCH) > 0)


def _lose_a_row(gallery: Gallery) -> None:
    gallery._rows.keep(np.arange(BATCH) > 0)


def _no_number(gallery: Gallery) -> None:
    gallery._rows.matrix()[2, 3] = np.nan


def _no_norm(gallery: Gallery) -> None:
    gallery._rows.largest_norm = float("nan")


def _small_norm(gallery: Gallery) -> None:  # by which searches would take a wrong answer for settled
    gallery._rows.largest_norm /= 2


def _zero_row(gallery: Gallery) -> None:
    gallery._rows.matrix()[2] = 0


@pytest.mark.parametrize(
    ("spoil", "fault", "trusted"),
    [
        (_repeat_a_key, "do not fit", False),
        (_lose_a_camera, "do not fit", False),
        (_lose_a_row, "do not fit", False),
        (_no_number, "it holds rows that are not finite", True),
        (_no_norm, "its largest norm, nan|do not fit", False),
        (_small_norm, "its largest norm, .* is not that of its rows", True),
        (_zero_row, "marks of rows of length 0", True),
    ],
)
def test_what_load_refuses_is_not_saved(
    spoil: Callable[[Gallery], None], fault: str, trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is it loaded from a folder that somebody has sealed anew."""
    gallery = Gallery(8, "euclidean", device="cpu")
    add(gallery, 0)
    gallery.save(tmp_path)
    spoil(gallery)
    with pytest.raises(GalleryError, match=f"not saved: .*({fault})"):
        gallery.save(tmp_path)
    assert len(Gallery.load(tmp_path, device="cpu")) == BATCH
    with monkeypatch.context() as patch:
        patch.setattr(GalleryRows, "fault", lambda self: None)
        patch.setattr("apd_kernels.gallery.folder._fit", lambda *arguments: True)
        patch.setattr("apd_kernels.gallery.columns.Columns.__len__", lambda self: BATCH - (spoil is _lose_a_row))
        gallery.save(tmp_path)
    with pytest.raises(GalleryError, match=f"damaged: .*({fault})"):
        Gallery.load(tmp_path, device="cpu")
    if trusted:
        assert len(Gallery.load(tmp_path, device="cpu", verify=False)) == BATCH
