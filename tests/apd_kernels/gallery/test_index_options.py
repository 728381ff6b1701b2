"""``apd index``: any FAISS index, further columns, and more rows for a gallery that is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("timm")
pytest.importorskip("typer")
pytest.importorskip("faiss")

from command_line import error, run
from drawn import draw_data_set, write_run
from feature_files import draw_features, part, write

from apd_kernels import Gallery

ABOUT = {"model": "a", "fingerprint": "12ab", "image_size": [4, 2], "flip_test": False}


@pytest.fixture
def rows() -> dict[str, np.ndarray]:
    return part(draw_features(900), 2)


def _first(rows: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    return {name: values[:count] for name, values in rows.items()}


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW8", "PQ4x4"])
def test_any_index(tmp_path: Path, rows: dict[str, np.ndarray], factory: str) -> None:
    features, gallery = write(tmp_path / "f.npz", rows), tmp_path / "g"
    printed = run("index", "--features", features, "--output", gallery, "--index", factory)
    assert f"index       {factory}" in printed
    loaded = Gallery.load(gallery)
    assert loaded.index == factory
    found = loaded.search(rows["features"].astype(np.float32), 1)
    expected = rows["features"].astype(np.float64)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(loaded.features, expected, atol=1e-6)
    same = (found.ids[:, 0].numpy() == rows["pids"]).mean()
    assert same > 0.95  # a row is its own nearest


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("IVF4096,Flat", "f.npz: features: expected at least 4096 rows to train the index 'IVF4096,Flat', got "),
        ("Rubbish", "--index Rubbish: index: expected a factory string that FAISS can build for 12 dimensions"),
        ("IDMap,Flat", "--index IDMap,Flat: index: expected a factory string without IDMap"),
    ],
)
def test_wrong_index(tmp_path: Path, rows: dict[str, np.ndarray], factory: str, message: str) -> None:
    features = write(tmp_path / "f.npz", rows)
    found = error("index", "--features", features, "--output", tmp_path / "g", "--index", factory)
    assert message in found
    assert "train(features)" not in found
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
def test_append(tmp_path: Path, rows: dict[str, np.ndarray], factory: str) -> None:
    """Further rows, after those that are there, with the columns of the gallery."""
    rows["hour"] = np.arange(len(rows["pids"])) % 24
    gallery = tmp_path / "g"
    index = ["index", "--output", gallery, "--features"]
    first = write(tmp_path / "a.npz", _first(rows, 200))
    rest = write(tmp_path / "b.npz", {name: values[200:] for name, values in rows.items()})
    run(*index, first, "--index", factory, "--metric", "euclidean", "--column", "hour")
    printed = run(*index, rest, "--append")
    assert f"indexed     {len(rows['pids']) - 200} images" in printed
    assert f"gallery     {len(rows['pids'])} images" in printed
    loaded = Gallery.load(gallery)
    assert (loaded.metric, loaded.index) == ("euclidean", factory)
    assert loaded.ids.tolist() == rows["pids"].tolist()
    assert loaded.cams.tolist() == rows["camids"].tolist()
    assert loaded.metadata["name"].tolist() == rows["names"].tolist()
    assert loaded.metadata["hour"].tolist() == rows["hour"].tolist()
    run(*index, write(tmp_path / "c.npz", {"features": rows["features"][:3] + 1, "hour": rows["hour"][:3]}), "--append")
    assert Gallery.load(gallery).metadata["name"].tolist()[-1] == "c.npz, row 2"


def test_append_refuses(tmp_path: Path, rows: dict[str, np.ndarray]) -> None:
    """Another dimension, metric, index, model, columns, and images that are there already; nothing has changed then."""
    gallery = tmp_path / "g"
    index = ["index", "--output", gallery, "--features"]
    more = write(
        tmp_path / "more.npz", rows | ABOUT | {"names": np.array([f"more {i}" for i in range(len(rows["pids"]))])}
    )
    assert "g: no such folder" in error(*index, more, "--append")
    first = write(tmp_path / "a.npz", _first(rows, 100) | ABOUT | {"hour": np.zeros(100, int)})
    run(*index, first)
    before = _contents(gallery)
    narrow = write(tmp_path / "narrow.npz", part(draw_features(dim=5), 2))
    unknown = write(tmp_path / "unknown.npz", rows)
    other = write(tmp_path / "other.npz", rows | ABOUT | {"fingerprint": "34cd"})
    for arguments, message in (
        ([narrow], "narrow.npz: features: expected 12 dimensions as the gallery, got 5"),
        ([more, "--metric", "euclidean"], "--metric euclidean: the gallery"),
        ([more, "--index", "HNSW8"], "--index HNSW8: the gallery"),
        ([other], "other.npz: fingerprint: expected 12ab as the gallery"),
        ([unknown], "unknown.npz: does not say which model made its features"),
        ([first], "has 100 of the 100 images of"),
        ([more, "--column", "hour"], "--column: is for --features, in a new gallery"),
    ):
        assert message in error(*index, *arguments, "--append"), message
    assert _contents(gallery) == before
    run(*index, more, "--append", "--metric", "cosine", "--index", "Flat")
    run(*index, first, "--column", "hour")
    assert "more.npz: no array 'hour'" in error(*index, more, "--append")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("name", "--column name: every gallery has its own"),
        ("absent", "f.npz: no array 'absent'"),
        ("features", "f.npz: features: expected shape ("),
        ("short", "f.npz: short: expected shape ("),
    ],
)
def test_wrong_columns(tmp_path: Path, rows: dict[str, np.ndarray], column: str, message: str) -> None:
    features = write(tmp_path / "f.npz", rows | {"short": np.zeros(3)})
    assert message in error("index", "--features", features, "--output", tmp_path / "g", "--column", column)


def test_append_images(tmp_path: Path) -> None:
    """Of another data set, whose images are found when they are drawn; with another run nothing is appended."""
    data, other = draw_data_set(tmp_path / "a"), draw_data_set(tmp_path / "b", seed=1)
    checkpoint, gallery = write_run(tmp_path / "run"), tmp_path / "g"
    index = ["index", "--output", gallery, "--checkpoint", checkpoint, "--data"]
    run(*index, data)
    assert "has 12 of the 12 images" in error(*index, data, "--append")
    run(*index, other, "--append")
    names = Gallery.load(gallery).metadata["name"].tolist()
    files = [sorted((folder / "bounding_box_test").iterdir()) for folder in (data, other)]
    assert names == [path.relative_to(data).as_posix() for path in files[0]] + [str(path) for path in files[1]]
    query = other / "query" / "0002_c1s1_000000_00.png"
    report = tmp_path / "found.html"
    search = ("search", "--gallery", gallery, "--query", query, "-k", 24, "--report", report)
    assert f"{other}/bounding_box_test/" in (message := error(*search))  # anybody may have written these names
    assert f"leads out of {data}, where the images are; --outside shows such images, too" in message
    run(*search, "--outside")
    page = report.read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 25
    assert 'class="missing"' not in page.partition("<body>")[2]
    shutil.rmtree(checkpoint)
    write_run(checkpoint, seed=1)
    message = error(*index, draw_data_set(tmp_path / "c", seed=2), "--append")
    assert "fingerprint: expected " in message
