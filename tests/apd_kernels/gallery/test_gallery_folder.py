"""The gallery's folder: round trips, damage, foreign content, full disks and killed saves."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from apd_kernels import Gallery, GalleryError, SearchResult
from apd_kernels._core.operands import METRICS
from apd_kernels.gallery import atomic_folder as folder

faiss = pytest.importorskip("faiss")

FILES = 7  # index, keys, ids, cams, zero rows, one column of metadata, manifest


def _rows(n: int, d: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def _assert_same(found: SearchResult, expected: SearchResult) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def _filled(n: int = 30, metric: str = "cosine", seed: int = 0) -> Gallery:
    gallery = Gallery(6, metric)
    gallery.add(
        _rows(n, 6, seed), torch.arange(n), torch.arange(n) % 3, {"name": [f"{seed}_{i}.jpg" for i in range(n)]}
    )
    return gallery


def _assert_equal(found: Gallery, expected: Gallery) -> None:
    assert (found.dim, found.metric, len(found)) == (expected.dim, expected.metric, len(expected))
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.cams, expected.cams)
    assert found.metadata.keys() == expected.metadata.keys()
    assert all((found.metadata[name] == expected.metadata[name]).all() for name in found.metadata)
    queries = _rows(7, expected.dim, seed=9)
    _assert_same(found.search(queries, 5), expected.search(queries, 5))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [0, 1, 199])
def test_round_trip(tmp_path: Path, metric: str, n: int) -> None:
    gallery = _filled(n, metric)
    path = tmp_path / "new folder" / "gallery é"
    gallery.save(path)
    loaded = Gallery.load(str(path))
    _assert_equal(loaded, gallery)
    for one in (loaded, gallery):
        one.add(_rows(3, 6, seed=4), metadata={"name": ["x", "y", "z"]})
    _assert_equal(loaded, gallery)
    loaded.save(path)
    _assert_equal(Gallery.load(path), gallery)
    assert len(list(path.iterdir())) == FILES


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_a_gallery_keeps_its_mode(tmp_path: Path) -> None:
    _filled().save(tmp_path / "g")
    (tmp_path / "g" / folder.MANIFEST).chmod(0o600)
    _filled(5).save(tmp_path / "g")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "g").iterdir()} == {0o600}


def test_notes(tmp_path: Path) -> None:
    """Saved with the rows, at the same step: a gallery that replaces another has its own notes or none."""
    notes = {"model": "é.pt", "size": [256, 128], "flip": False, "of": {"fingerprint": "0a", "share": 0.1, "by": None}}
    gallery = _filled(5)
    gallery.notes = notes
    gallery.save(tmp_path / "g")
    loaded = Gallery.load(tmp_path / "g")
    assert loaded.notes == notes
    for wrong in ({"size": (256, 128)}, {1: "one"}, {"x": float("nan")}, {"x": torch.ones(1)}, ["x"]):
        gallery.notes = wrong
        with pytest.raises(TypeError, match="notes: expected a dictionary"):
            gallery.save(tmp_path / "g")
    assert Gallery.load(tmp_path / "g").notes == notes
    _filled(5).save(tmp_path / "g")
    assert Gallery.load(tmp_path / "g").notes == {}


def test_galleries_saved_before_there_were_notes(tmp_path: Path) -> None:
    _filled(5).save(tmp_path / "g")
    _sealed(tmp_path / "g", lambda manifest: manifest.pop("notes"))
    _assert_equal(Gallery.load(tmp_path / "g"), _filled(5))


def test_zero_rows_survive_loading(tmp_path: Path) -> None:
    gallery = Gallery(2)
    gallery.add(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    gallery.save(tmp_path / "g")
    assert Gallery.load(tmp_path / "g").search(torch.tensor([[1.0, 0.0]]), 2).distances.tolist() == [[0, 1]]


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "g"
    _filled(5).save(path)
    draw = random.Random(0)
    for file in path.iterdir():
        content = file.read_bytes()
        for i in range(len(content)):
            damaged = bytearray(content)
            damaged[i] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(GalleryError):
                Gallery.load(path)
        file.write_bytes(content)
    _assert_equal(Gallery.load(path), _filled(5))


def test_every_truncation_and_extension_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "g"
    _filled(5).save(path)
    for file in path.iterdir():
        content = file.read_bytes()
        for damaged in [content[:n] for n in (0, 1, 100, len(content) // 2, len(content) - 1)] + [content + b"\n"]:
            file.write_bytes(damaged)
            with pytest.raises(GalleryError, match="damaged"):
                Gallery.load(path)
        file.unlink()
        with pytest.raises(GalleryError, match=rf"missing|no {folder.MANIFEST}"):
            Gallery.load(path)
        file.write_bytes(content)
    _assert_equal(Gallery.load(path), _filled(5))


def _sealed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the manifest as a program would that knows the format."""
    manifest = json.loads((path / folder.MANIFEST).read_bytes())
    del manifest["seal"]
    change(manifest)
    manifest["seal"] = folder._seal(manifest)
    (path / folder.MANIFEST).write_bytes(folder._rendered(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=3), "saved in format version 3, this release reads up to 2: install a newer one"),
        (lambda m: m.update(format="other"), "expected format 'apd-kernels gallery', got 'other'"),
        (lambda m: m.update(count=6), "damaged: its index or arrays do not fit its manifest"),
        (lambda m: m.update(dim=7), "damaged: its index or arrays do not fit its manifest"),
        (lambda m: m.update(metric="euclidean"), "damaged: its index or arrays do not fit its manifest"),
        (lambda m: m.update(dim="6"), "damaged"),
        (lambda m: m.update(metric="l2"), "damaged"),
        (lambda m: m.update(notes=["x"]), "damaged"),
        (lambda m: m.pop("dim"), "damaged"),
        (lambda m: m.update(files=[]), "damaged"),
        (lambda m: m["files"].pop("index.faiss"), "damaged"),
        (
            lambda m: m["files"]["index.faiss"].update(name="../x-0123456789abcdef.faiss"),
            "is not the name of a data file",
        ),
        (lambda m: m["files"].update({"index.faiss": m["files"]["keys.npy"]}), "damaged"),
        (lambda m: m["files"].update({"keys.npy": m["files"]["index.faiss"]}), "damaged"),
        (lambda m: m["files"].update({"keys.npy": m["files"]["metadata0.npy"]}), "damaged"),
        (lambda m: m["files"].update({"zero.npy": m["files"]["ids.npy"]}), "damaged"),
        (lambda m: m.update(index="HNSW8"), "damaged"),
        (lambda m: m.update(index="Bogus"), "damaged"),
        (lambda m: m.update(index=7), "damaged"),
        (lambda m: m.update(next_key="5"), "damaged"),
        (lambda m: m.update(next_key=2**63 + 1), "damaged"),
        (lambda m: m.update(version="2"), "damaged: expected a format version from 1 to 2, got '2'"),
        (lambda m: m.update(version=0), "damaged: expected a format version from 1 to 2, got 0"),
        (lambda m: m.update(version=True), "damaged: expected a format version from 1 to 2, got True"),
        (lambda m: m.update(largest_norm="5"), "damaged"),
        (lambda m: m.update(fingerprint=5), "damaged"),
        (lambda m: m.update(metadata=["name", "frame"]), "damaged"),
    ],
)
def test_newer_and_foreign_manifests(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    path = tmp_path / "g"
    _filled(5).save(path)
    _sealed(path, change)
    with pytest.raises(GalleryError, match=message):
        Gallery.load(path)


def test_foreign_folders_are_neither_loaded_nor_replaced(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    with_text = tmp_path / "with text"
    with_text.mkdir()
    (with_text / "notes.txt").write_text("mine")
    other_manifest = tmp_path / "other manifest"
    other_manifest.mkdir()
    (other_manifest / "manifest.json").write_text('{"format": "something else"}')
    unreadable = tmp_path / "unreadable"
    unreadable.mkdir()
    (unreadable / "manifest.json").write_text("{")
    for path in (file, with_text, other_manifest, unreadable):
        with pytest.raises(GalleryError, match=path.name):
            Gallery.load(path)
        before = sorted(tmp_path.rglob("*"))
        for refused in (Gallery.check_destination, _filled().save):
            with pytest.raises(GalleryError, match=r"expected a folder to save to|not replaced"):
                refused(path)
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(GalleryError, match="no such folder"):
        Gallery.load(tmp_path / "absent")
    assert (with_text / "notes.txt").read_text() == "mine"
    assert issubclass(GalleryError, ValueError)


def test_destinations(tmp_path: Path) -> None:
    """Nothing, an empty folder, a gallery, or what a killed first save left; asking changes nothing."""
    for name in ("gallery", "killed"):
        _filled(5).save(tmp_path / name)
    (tmp_path / "killed" / "manifest.json").unlink()
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for name in ("gallery", "killed", "empty", "absent", "absent/inner"):
        Gallery.check_destination(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_other_files_in_a_gallery_stay(tmp_path: Path) -> None:
    path = tmp_path / "g"
    _filled(5).save(path)
    (path / "notes.txt").write_text("mine")
    _filled(8).save(path)
    assert (path / "notes.txt").read_text() == "mine"
    assert len(Gallery.load(path)) == 8


def test_damaged_data_can_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "g"
    _filled(5).save(path)
    next(path.glob("index-*")).write_bytes(b"")
    _filled(8).save(path)
    assert len(Gallery.load(path)) == 8


_STEPS = ("fsync", "replace")


@contextmanager
def _at_step(number: int, action: Callable[[], None]) -> Iterator[None]:
    """Run `action` instead of the `number`-th step of a save that touches the disk's state."""
    count = 0
    originals = {name: getattr(os, name) for name in (*_STEPS, "unlink")}

    def stepping(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                action()
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in originals:
            setattr(os, name, stepping(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


@pytest.mark.parametrize("replacing", [False, True])
def test_full_disk_leaves_the_old_gallery(tmp_path: Path, replacing: bool) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "g"
    for step in range(1, FILES + 4):
        shutil.rmtree(path, ignore_errors=True)
        if replacing:
            _filled(5).save(path)
        with _at_step(step, full), pytest.raises(OSError, match="No space left"):
            _filled(8).save(path)
        committed = step == FILES + 3  # after each file, the folder, and the replacement of the manifest
        assert path.exists() == (replacing or committed)
        if path.exists():
            assert len(Gallery.load(path)) == (8 if committed else 5)
            assert len(list(path.iterdir())) == FILES  # nothing left behind


def test_full_disk_while_faiss_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "g"
    _filled(5).save(path)
    monkeypatch.setattr(folder.HashingWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        _filled(8).save(path)
    assert len(Gallery.load(path)) == 5
    assert len(list(path.iterdir())) == FILES


def _in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; its id. The child computes nothing in parallel, so the fork is safe."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("replacing", [False, True])
def test_kill_at_every_step(tmp_path: Path, replacing: bool) -> None:
    """SIGKILL before each step of a save: the old gallery or the new one loads, and the next save tidies up."""
    old, new = _filled(5), _filled(8, seed=1)
    seen = set()
    for step in range(1, 2 * FILES + 5):
        path = tmp_path / str(step)
        if replacing:
            old.save(path)

        def work(step: int = step, path: Path = path) -> None:
            with _at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                new.save(path)
            os._exit(0)

        _, status = os.waitpid(_in_child(work), 0)
        killed = os.WIFSIGNALED(status)
        assert killed or os.WEXITSTATUS(status) == 0
        try:
            loaded = Gallery.load(path)
        except GalleryError as error:
            assert not replacing
            assert killed
            assert "never completely" in str(error)  # noqa: PT017
        else:
            seen.add((killed, len(loaded)))
            _assert_equal(loaded, old if len(loaded) == 5 else new)
        new.save(path)
        _assert_equal(Gallery.load(path), new)
        assert len(list(path.iterdir())) == FILES
    assert seen >= ({(True, 5), (True, 8), (False, 8)} if replacing else {(True, 8), (False, 8)})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_any_time_and_read_meanwhile(tmp_path: Path) -> None:
    """Two processes save over and over; loading never fails, whenever it happens and whenever they are killed."""
    path = tmp_path / "g"
    galleries = {200: _filled(200), 300: _filled(300, seed=1)}
    galleries[200].save(path)

    def save_forever(size: int) -> None:
        while True:
            galleries[size].save(path)

    draw = random.Random(0)
    sizes = []
    for _ in range(4):
        children = [_in_child(lambda size=size: save_forever(size)) for size in galleries]  # type: ignore[misc]
        try:
            until = time.monotonic() + 0.1 + 0.1 * draw.random()
            while time.monotonic() < until or (len(set(sizes)) < 2 and time.monotonic() < until + 10):
                sizes.append(len(Gallery.load(path)))
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        loaded = Gallery.load(path)
        _assert_equal(loaded, galleries[len(loaded)])
    assert set(sizes) == {200, 300}
    galleries[300].save(path)
    assert len(list(path.iterdir())) == FILES


# Every kind of index, mapped files, models, older folders


def _of_kind(index: str, n: int = 300, seed: int = 0) -> Gallery:
    gallery = Gallery(6, index=index, device="cpu", fingerprint="model a")
    gallery.add(
        _rows(n, 6, seed),
        torch.arange(n),
        torch.arange(n) % 3,
        {"name": [f"{seed}_{i}.jpg" for i in range(n)], "frame": torch.arange(n).numpy()},
        keys=torch.arange(n) * 2,
    )
    return gallery


@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat", "HNSW8", "PQ3x4", "PCA4,IVF4,SQ8"])
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("verify", [False, True])
def test_round_trip_of_every_kind(tmp_path: Path, index: str, mmap: bool, verify: bool) -> None:
    """A loaded gallery answers alike, also after changes, which never reach the files it is mapped from."""
    path, other = tmp_path / "g", tmp_path / "other"
    gallery = _of_kind(index)
    gallery.remove(torch.tensor([6, 8]))
    gallery.update(torch.tensor([10]), _rows(1, 6, seed=3))
    gallery.save(path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    loaded = Gallery.load(path, device="cpu", mmap=mmap, verify=verify, fingerprint="model a")
    assert (loaded.index, loaded.fingerprint) == (index, "model a")
    assert torch.equal(loaded.keys, gallery.keys)
    _assert_equal(loaded, gallery)
    for one in (loaded, gallery):
        one.update(
            torch.tensor([2]), torch.ones(1, 6), ids=torch.tensor([77]), metadata={"name": ["a much longer name"]}
        )
        one.remove(torch.tensor([0, 4]))
        one.add(_rows(3, 6, seed=4), metadata={"name": ["x", "y", "z"], "frame": [1, 2, 3]})
        assert one.keys[-3:].tolist() == [599, 600, 601]
    _assert_equal(loaded, gallery)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    loaded.save(other)
    _assert_equal(Gallery.load(other, device="cpu"), gallery)
    mapped = Gallery.load(path, device="cpu", mmap=True)
    mapped.save(path)  # onto the files that it is mapped from
    _assert_equal(Gallery.load(path, device="cpu"), mapped)


def test_mapped_arrays_stay_in_their_files(tmp_path: Path) -> None:
    _of_kind("HNSW8").save(tmp_path / "g")
    loaded = Gallery.load(tmp_path / "g", device="cpu", mmap=True)
    loaded.search(_rows(2, 6), 3, exclude_same=(torch.tensor([1, 2]), torch.tensor([1, 2])))
    columns = loaded._columns
    for column in (columns.keys, columns.ids, columns.cams, *columns.metadata.values(), loaded._rows.zero):
        assert isinstance(column.values(), np.memmap)
    maps = Path("/proc/self/maps")
    if maps.exists():
        mapped = maps.read_text()
        assert all(str(file) in mapped for file in (tmp_path / "g").glob("*.faiss"))


@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat", "HNSW8"])
@pytest.mark.parametrize("mmap", [False, True])
def test_empty_galleries(tmp_path: Path, index: str, mmap: bool) -> None:
    Gallery(6, index=index, device="cpu").save(tmp_path / "g")
    loaded = Gallery.load(tmp_path / "g", device="cpu", mmap=mmap)
    assert loaded.search(_rows(2, 6), 3).indices.tolist() == [[-1] * 3] * 2
    loaded.add(_rows(20, 6))
    assert loaded.search(_rows(20, 6), 1).indices[:, 0].tolist() == list(range(20))


def test_saved_with_one_engine_loaded_with_another(tmp_path: Path) -> None:
    _of_kind("Flat").save(tmp_path / "g")
    found = Gallery.load(tmp_path / "g", device="cpu", engine="fused", mmap=True).search(_rows(7, 6, seed=9), 5)
    assert torch.equal(found.indices, _of_kind("Flat").search(_rows(7, 6, seed=9), 5).indices)
    _of_kind("HNSW8").save(tmp_path / "g")
    with pytest.raises(ValueError, match="index: expected 'Flat' with engine='fused', got 'HNSW8'"):
        Gallery.load(tmp_path / "g", device="cpu", engine="fused")


def test_nothing_of_removed_rows_is_saved(tmp_path: Path) -> None:
    for index in ("Flat", "HNSW8", "IVF4,Flat"):
        gallery = _of_kind(index)
        row = _rows(300, 6)[7]
        gallery.remove(torch.tensor([14]))
        gallery.save(tmp_path / "g")
        code = torch.nn.functional.normalize(row, dim=0).numpy().tobytes()[:3]
        rows = Gallery.load(tmp_path / "g", device="cpu")._rows.matrix()
        assert len(rows) == 299
        assert not any(stored.tobytes()[:3] == code and abs(stored[0] - row[0] / row.norm()) < 1e-6 for stored in rows)
        if index != "Flat":
            assert Gallery.load(tmp_path / "g", device="cpu")._approximate.entries == 299  # type: ignore[union-attr]


@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat", "HNSW8", "PQ3x4"])
@pytest.mark.parametrize("mmap", [False, True])
def test_random_damage_is_noticed(tmp_path: Path, index: str, mmap: bool) -> None:
    """Flipped bits, truncations and blocks of zeros in every file, at random places."""
    path = tmp_path / "g"
    gallery = _of_kind(index, 60)
    gallery.save(path)
    draw = random.Random(1)
    for file in path.iterdir():
        content = file.read_bytes()
        for _ in range(12):
            flipped, zeroed = bytearray(content), bytearray(content)
            flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            start = draw.randrange(len(content))
            zeroed[start : start + 64] = bytes(len(zeroed[start : start + 64]))
            for damaged in (flipped, zeroed, content[: draw.randrange(len(content))]):
                if damaged == content:
                    continue
                file.write_bytes(damaged)
                with pytest.raises(GalleryError):
                    Gallery.load(path, device="cpu", mmap=mmap)
        file.write_bytes(content)
    _assert_equal(Gallery.load(path, device="cpu", mmap=mmap), gallery)


def test_sizes_are_compared_without_verification(tmp_path: Path) -> None:
    path = tmp_path / "g"
    _of_kind("HNSW8").save(path)
    for file in path.iterdir():
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        with pytest.raises(GalleryError, match="damaged"):
            Gallery.load(path, device="cpu", verify=False)
        file.write_bytes(content)


def test_another_model(tmp_path: Path) -> None:
    _of_kind("Flat").save(tmp_path / "g")
    with pytest.raises(GalleryError, match="expected a gallery made with the model 'model b', got 'model a'"):
        Gallery.load(tmp_path / "g", fingerprint="model b")
    _filled().save(tmp_path / "g")
    with pytest.raises(GalleryError, match="expected a gallery made with the model 'model b', got None"):
        Gallery.load(tmp_path / "g", fingerprint="model b")


@pytest.mark.parametrize("mmap", [False, True])
def test_folders_of_version_1(tmp_path: Path, mmap: bool) -> None:
    """A flat index, arrays in one .npz, neither keys nor fingerprint; the next save writes the newest version."""
    path = tmp_path / "g"
    gallery = _filled(20)

    def write_arrays(writer: folder.HashingWriter) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, ids=gallery.ids, cams=gallery.cams, **{"metadata.name": gallery.metadata["name"]})
        writer.write(buffer.getbuffer())

    def write_index(writer: folder.HashingWriter) -> None:
        faiss.write_index(gallery._rows.index, faiss.PyCallbackIOWriter(writer.write))

    fields = {"dim": 6, "metric": "cosine", "count": 20, "notes": {"a": 1}}
    files = {"index.faiss": write_index, "arrays.npz": write_arrays}
    folder.save_folder(path, "apd-kernels gallery", 1, fields, files, GalleryError)
    loaded = Gallery.load(path, mmap=mmap)
    _assert_equal(loaded, gallery)
    assert loaded.notes == {"a": 1}
    assert loaded.keys.tolist() == list(range(20))
    loaded.save(path)
    assert len(list(path.iterdir())) == FILES
    _assert_equal(Gallery.load(path, mmap=mmap), gallery)


def test_read_only_destination(tmp_path: Path) -> None:
    """The operating system's error; the old gallery stays."""
    path = tmp_path / "g"
    _filled(5).save(path)
    if os.geteuid() == 0:  # root may write everywhere else
        with pytest.raises(OSError, match=r"Permission denied|Read-only|No such file|not permitted"):
            _filled(8).save("/proc/gallery")
    else:
        path.chmod(0o555)
        with pytest.raises(PermissionError):
            _filled(8).save(path)
        path.chmod(0o755)
    assert len(Gallery.load(path)) == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("index", ["Flat", "HNSW8"])
def test_a_disk_that_fills_up(tmp_path: Path, index: str) -> None:
    """The system refuses bytes beyond a limit, in the middle of a file: OSError, and the old gallery stays."""
    import resource

    path = tmp_path / "g"
    old, new = _of_kind(index, 20), _of_kind(index, 300, seed=1)
    old.save(path)
    for limit in (0, 200, 3000):

        def work(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                new.save(path)
            except OSError as error:
                os._exit(0 if error.errno == errno.EFBIG else 2)

        _, status = os.waitpid(_in_child(work), 0)
        assert os.WEXITSTATUS(status) == 0
        _assert_equal(Gallery.load(path, device="cpu"), old)
        assert len(list(path.iterdir())) == (8 if index == "Flat" else 9)
