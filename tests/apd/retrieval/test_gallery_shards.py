"""A gallery in pieces: bit for bit the figures of one piece, whatever the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("faiss")

from command_line import error, run
from feature_files import draw_features, part, write

from apd.retrieval import shards
from apd.retrieval.features import load_features
from apd.retrieval.shards import open_shards


@pytest.fixture
def gallery() -> dict[str, np.ndarray]:
    rows = part(draw_features(400), 2)
    rows["pids"][::9] = -1
    rows["features"][5:9] = rows["features"][4]  # ties
    return rows


@pytest.fixture
def query(tmp_path: Path) -> Path:
    return write(tmp_path / "q.npz", part(draw_features(400), 1))


def _rows(arrays: dict[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
    return {name: values[start:stop] for name, values in arrays.items()}


def _write_npy(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.save(path, arrays["features"])
    for name in ("pids", "camids"):
        np.save(path.with_suffix(f".{name}.npy"), arrays[name])
    return path


def _evaluated(*arguments: object, out: Path) -> str:
    run("evaluate", *arguments, "--json", out)
    return out.read_text()


@pytest.mark.parametrize("options", [[], ["--metric", "euclidean", "--ap", "trapezoidal", "--ties", "expected"]])
def test_bit_for_bit(
    tmp_path: Path,
    query: Path,
    gallery: dict[str, np.ndarray],
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = write(tmp_path / "whole.npz", gallery)
    sources = ["--query", query, *options]
    expected = _evaluated(*sources, "--gallery", whole, out=tmp_path / "out.json")
    folder = tmp_path / "pieces"
    folder.mkdir()
    pieces = [
        write(folder / "a.npz", _rows(gallery, 0, 50) | {"split": np.full(50, 2)}),
        _write_npy(folder / "b.npy", _rows(gallery, 50, 120)),
        write(folder / "c.npz", _rows(gallery, 120, len(gallery["pids"]))),
    ]
    (folder / ".hidden.npz").write_bytes(b"")
    (folder / "notes.txt").write_text("not a piece")
    several = [argument for piece in reversed(pieces) for argument in ("--gallery", piece)]
    assert _evaluated(*sources, *several, out=tmp_path / "out.json") == expected
    monkeypatch.setattr(shards, "_PIECE_BYTES", 4 * 12 * 7)  # seven rows at a time
    assert _evaluated(*sources, "--gallery", folder, out=tmp_path / "out.json") == expected
    one = _write_npy(tmp_path / "one.npy", gallery)
    assert _evaluated(*sources, "--gallery", one, out=tmp_path / "out.json") == expected
    cameras = len(np.unique(gallery["camids"]))
    printed = run("evaluate", *sources, "--gallery", folder)
    assert f"gallery     {len(gallery['pids'])} images, 8 identities, {cameras} cameras; 3 files" in printed


def test_a_piece_at_a_time(
    tmp_path: Path, query: Path, gallery: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An .npy file is mapped, not read."""
    one = _write_npy(tmp_path / "one.npy", gallery)
    monkeypatch.setattr(shards, "_PIECE_BYTES", 4 * 12 * 7)
    pieces = list(open_shards([one], load_features(query)).pieces())
    assert all(isinstance(piece.features, np.memmap) for piece in pieces)
    assert {len(piece) for piece in pieces[:-1]} == {7}
    assert sum(map(len, pieces)) == len(gallery["pids"])


def test_a_broken_row_is_found_in_its_piece(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, query: Path, gallery: dict[str, np.ndarray]
) -> None:
    monkeypatch.setattr("apd.retrieval.shards._PIECE_BYTES", 4 * 12 * 10)
    broken = gallery["features"].copy()
    broken[23, 2] = np.nan
    one = _write_npy(tmp_path / "one.npy", gallery | {"features": broken})
    message = error("evaluate", "--query", query, "--gallery", one)
    assert "one.npy, from row 20 on: gallery: expected finite features" in message
    assert message.endswith("in 1 rows: 3")


def test_wrong_pieces(tmp_path: Path, query: Path, gallery: dict[str, np.ndarray]) -> None:
    whole = write(tmp_path / "whole.npz", gallery)
    one = _write_npy(tmp_path / "one.npy", gallery)
    evaluate = ["evaluate", "--query", query, "--gallery"]
    (tmp_path / "empty").mkdir()
    assert "empty: no .npz and no .npy file in this folder" in error(*evaluate, tmp_path / "empty")
    assert "whole.npz: given twice" in error(*evaluate, whole, "--gallery", tmp_path / "." / "whole.npz")
    assert "absent.npy: no such file" in error(*evaluate, tmp_path / "absent.npy")
    assert "absent.npz: no such file" in error(*evaluate, whole, "--gallery", tmp_path / "absent.npz")
    other = write(tmp_path / "other.npz", part(draw_features(dim=5), 2))
    assert "other.npz: features: expected 12 dimensions" in error(*evaluate, one, "--gallery", other)
    np.save(tmp_path / "one.pids.npy", gallery["pids"][1:])
    assert "one.pids.npy: expected integers (" in error(*evaluate, one)
    np.save(tmp_path / "one.pids.npy", gallery["pids"])
    (tmp_path / "one.camids.npy").unlink()
    assert "one.npy: no array 'camids'; --ignore-cameras evaluates" in error(*evaluate, one)
    np.save(one, gallery["pids"])
    assert "one.npy: expected floating point features (N, D), got int32" in error(*evaluate, one)
    broken = gallery["features"].copy()
    broken[3, 2] = np.nan
    _write_npy(one, gallery | {"features": broken})
    assert "one.npy, from row 0 on: gallery: expected finite features" in error(*evaluate, one)
    _write_npy(one, gallery | {"pids": gallery["pids"] + 100})
    message = error(*evaluate, one)
    assert "expected at least one query with a gallery image of the same identity" in message
    one.write_bytes(one.read_bytes()[:-1])
    assert "cut off or damaged" in error(*evaluate, one)


def test_a_piece_that_changes(tmp_path: Path, query: Path, gallery: dict[str, np.ndarray]) -> None:
    whole = write(tmp_path / "whole.npz", gallery)
    pieces = open_shards([whole], load_features(query)).pieces()
    write(whole, _rows(gallery, 0, 5))
    with pytest.raises(ValueError, match="has changed while it was read"):
        next(pieces)


def test_progress_covers_both_passes(query: Path, tmp_path: Path, gallery: dict[str, np.ndarray]) -> None:
    from apd.retrieval.evaluation import Conventions, evaluate_shards

    rows = load_features(query)
    opened = open_shards([write(tmp_path / "whole.npz", gallery)], rows)
    seen: list[int] = []
    result = evaluate_shards(rows, opened, Conventions(), advance=seen.append)
    assert sum(seen) == 2 * len(opened)
    assert json.dumps(result.as_json())
