"""The command line: its figures, its files, and one clear line for everything that is wrong."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("faiss")

from command_line import error as _error
from command_line import run as _run
from feature_files import draw_features as _arrays
from feature_files import write as _file

from apd.files import write_text
from apd_kernels import Gallery

COMMANDS = ("train", "synthesize", "config", "extract", "evaluate", "rerank", "index", "search", "demo", "env")


@pytest.fixture
def features(tmp_path: Path) -> Path:
    return _file(tmp_path / "features.npz", _arrays())


def _expected(arrays: dict[str, np.ndarray], metric: str, ap: str) -> dict[str, Any]:
    """The definitions, query by query."""
    query, gallery = ({name: values[arrays["split"] == part] for name, values in arrays.items()} for part in (1, 2))
    precisions, penalties, hits = [], [], []
    for i in range(len(query["pids"])):
        x, y = query["features"][i].astype(np.float64), gallery["features"].astype(np.float64)
        cosine = y @ x / np.linalg.norm(y, axis=1)
        distance = -cosine if metric == "cosine" else np.linalg.norm(x - y, axis=1)
        same = gallery["pids"] == query["pids"][i]
        kept = ~(same & (gallery["camids"] == query["camids"][i]))
        right = same[kept][np.argsort(distance[kept])]
        if not right.any():
            continue
        ranks = np.flatnonzero(right) + 1
        found = np.arange(1, len(ranks) + 1)
        precision = found / ranks
        if ap == "trapezoidal":
            before = np.where(ranks == 1, 1.0, (found - 1) / np.maximum(ranks - 1, 1))
            precision = (precision + before) / 2
        precisions.append(precision.mean())
        penalties.append(len(ranks) / ranks[-1])
        hits.append([ranks[0] <= k for k in (1, 5, 10)])
    return {
        "cmc": dict(zip(("1", "5", "10"), np.mean(hits, 0), strict=True)),
        "mAP": np.mean(precisions),
        "mINP": np.mean(penalties),
        "num_queries": len(query["pids"]),
        "num_valid_queries": len(hits),
        "num_left_out_queries": len(query["pids"]) - len(hits),
        "metric": metric,
        "ap": ap,
        "ties": "pessimistic",
        "re_ranking": False,
        "single_shot": False,
        "exclude_self": False,
        "ignore_cameras": False,
        "junk": -1,
        "unknown_camera": -1,
        "descriptor": None,
    }


def _assert_figures(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert found.pop("cmc") == pytest.approx(expected.pop("cmc"), abs=1e-9)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)


# evaluate


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("ap", ["rectangular", "trapezoidal"])
def test_evaluate(tmp_path: Path, metric: str, ap: str) -> None:
    arrays = _arrays()
    chosen = np.flatnonzero(arrays["split"] == 1)[:2]
    arrays["pids"][chosen] = 77  # not in the gallery: left out
    features = _file(tmp_path / "f.npz", arrays)
    out = tmp_path / "out.json"
    printed = _run("evaluate", "--features", features, "--metric", metric, "--ap", ap, "--json", out)
    expected = _expected(arrays, metric, ap)
    left_out = expected["num_queries"] - expected["num_valid_queries"]
    assert left_out >= 2
    for figure in ("mAP", "mINP"):
        assert f"{expected[figure]:.6f}" in printed
    assert f"{expected['num_valid_queries']} counted, {left_out} left out" in printed
    assert f"{ap}:" in printed
    assert "pessimistic" in printed
    _assert_figures(json.loads(out.read_text()), expected)
    assert not list(tmp_path.glob(".*"))


def test_evaluate_two_files(tmp_path: Path) -> None:
    """Without a split all rows of each file count; with one, the query rows and the gallery rows."""
    arrays = _arrays()
    expected = _expected(arrays, "cosine", "rectangular")
    files = []
    for name, part in (("query", 1), ("gallery", 2)):
        rows = {key: values[arrays["split"] == part] for key, values in arrays.items() if key not in ("split", "names")}
        files += [f"--{name}", _file(tmp_path / f"{name}.npz", rows)]
    whole = _file(tmp_path / "whole.npz", arrays)
    for sources in (files, ["--query", whole, "--gallery", whole]):
        _run("evaluate", *sources, "--json", tmp_path / "out.json")
        _assert_figures(json.loads((tmp_path / "out.json").read_text()), dict(expected))


@pytest.mark.parametrize(
    "arguments", [[], ["--query", "q.npz"], ["--features", "f.npz", "--query", "q.npz"], ["--gallery", "g.npz"]]
)
def test_evaluate_wants_one_source(arguments: list[str]) -> None:
    assert "either --features, or --query and --gallery" in _error("evaluate", *arguments)


REFERENCE = """
cuhk03 cosine 199 0.316583 0.547739 0.345945 0.264044
cuhk03 euclidean 199 0.336683 0.492462 0.322023 0.220193
cuhk01 cosine 972 0.759259 0.894033 0.737614 0.657561
cuhk01 euclidean 972 0.633745 0.824074 0.616537 0.515005
viper cosine 316 0.449367 0.677215 0.554992 0.554992
viper euclidean 316 0.439873 0.604430 0.522546 0.522546
pku cosine 74 0.202703 0.432432 0.235322 0.143594
pku euclidean 74 0.256757 0.500000 0.230139 0.113250
market_mini cosine 30 0.700000 0.966667 0.759286 0.716587
market_mini euclidean 30 0.700000 0.933333 0.730491 0.671631
"""
TRAPEZOIDAL = {"cuhk03": 0.316152, "cuhk01": 0.710543, "viper": 0.502180, "pku": 0.214947, "market_mini": 0.714028}


@pytest.mark.parametrize("row", REFERENCE.strip().splitlines())
def test_reference_figures(real_data: Path, tmp_path: Path, row: str) -> None:
    """To six decimals, as two other implementations have them."""
    name, metric, counted, *figures = row.split()
    out = tmp_path / "out.json"
    features = real_data / "data" / "features" / f"osnet_{name}.npz"
    printed = _run("evaluate", "--features", features, "--metric", metric, "--json", out)
    assert all(figure in printed for figure in figures)
    found = json.loads(out.read_text())
    assert found["num_valid_queries"] == int(counted)
    assert [f"{value:.6f}" for value in (found["cmc"]["1"], found["cmc"]["5"], found["mAP"], found["mINP"])] == figures


@pytest.mark.parametrize("name", TRAPEZOIDAL)
def test_trapezoidal_reference_figures(real_data: Path, tmp_path: Path, name: str) -> None:
    features = real_data / "data" / "features" / f"osnet_{name}.npz"
    _run("evaluate", "--features", features, "--ap", "trapezoidal", "--json", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["mAP"] == pytest.approx(TRAPEZOIDAL[name], abs=5e-7)


# index and search


def _index(features: Path, folder: Path, *arguments: object) -> str:
    return _run("index", "--features", features, "--output", folder, *arguments)


def test_index_and_search(features: Path, tmp_path: Path) -> None:
    arrays = _arrays()
    query, gallery = (np.flatnonzero(arrays["split"] == part) for part in (1, 2))
    printed = _index(features, tmp_path / "g")
    assert f"{len(gallery)} images" in printed
    assert "split 2, gallery" in printed
    assert len(Gallery.load(tmp_path / "g")) == len(gallery)

    out = tmp_path / "lists.json"
    printed = _run("search", "--gallery", tmp_path / "g", "--features", features, "-k", 4, "--show", 2, "--output", out)
    assert f"{len(query)} images" in printed
    assert "split 1, query" in printed
    assert printed.count("distance      id") == 2
    assert f"lists of 2 of {len(query)} queries" in printed

    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["metric"] == "cosine"
    lists = content["queries"]
    x, y = (arrays["features"][rows].astype(np.float64) for rows in (query, gallery))
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))
    order = np.argsort(1 - x @ y.T, 1)[:, :4]
    assert [one["name"] for one in lists] == arrays["names"][query].tolist()
    for i, one in enumerate(lists):
        assert one["id"] == arrays["pids"][query[i]]
        assert [match["row"] for match in one["results"]] == order[i].tolist()
        assert [match["rank"] for match in one["results"]] == [1, 2, 3, 4]
        for match in one["results"]:
            row = gallery[match["row"]]
            assert (match["id"], match["camera"]) == (arrays["pids"][row], arrays["camids"][row])
            assert match["name"] == arrays["names"][row]
            assert match["distance"] == pytest.approx(1 - x[i] @ y[match["row"]], abs=1e-6)
            if i < 2:
                assert match["name"] in printed
                assert f"{match['distance']:.6f}" in printed

    _run("search", "--gallery", tmp_path / "g", "--features", features, "-k", 4, "--output", tmp_path / "lists.csv")
    with (tmp_path / "lists.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * len(query)
    flat = [(i, one["name"], match) for i, one in enumerate(lists) for match in one["results"]]
    for line, (i, name, match) in zip(rows, flat, strict=True):
        assert (int(line["query"]), line["query_name"]) == (i, name)
        assert {key: line[key] for key in match} == {key: str(value) for key, value in match.items()}


def test_lists_of_names_that_are_no_utf8(tmp_path: Path) -> None:
    """As Python reads a file name with the byte FF."""
    arrays = _arrays(4)
    names = [f"{i} \udcff.jpg" for i in range(4)]
    features = _file(tmp_path / "f.npz", {"features": arrays["features"], "names": np.array(names)})
    _index(features, tmp_path / "g")
    for ending in ("json", "csv"):
        out = tmp_path / f"lists.{ending}"
        _run("search", "--gallery", tmp_path / "g", "--features", features, "-k", 1, "--output", out)
    assert [one["name"] for one in json.loads((tmp_path / "lists.json").read_text())["queries"]] == names
    assert "3 \\udcff.jpg" in (tmp_path / "lists.csv").read_text(encoding="utf-8")


def test_search_without_the_query_camera(features: Path, tmp_path: Path) -> None:
    _index(features, tmp_path / "g", "--metric", "euclidean")
    out = tmp_path / "lists.json"
    search = ["search", "--gallery", tmp_path / "g", "--features", features, "-k", 50, "--output", out]

    def same_camera(*arguments: str) -> list[int]:
        _run(*search, *arguments)
        return [
            sum((match["id"], match["camera"]) == (one["id"], one["camera"]) for match in one["results"])
            for one in json.loads(out.read_text())["queries"]
        ]

    assert sum(same_camera()) > 0
    assert sum(same_camera("--exclude-same-camera")) == 0


def test_search_of_features_alone(tmp_path: Path) -> None:
    """Without identities, cameras, split and names everything is indexed and every row is a query."""
    features = _file(tmp_path / "f.npz", {"features": _arrays()["features"]})
    printed = _index(features, tmp_path / "g")
    assert "all rows" in printed
    printed = _run("search", "--gallery", tmp_path / "g", "--features", features, "-k", 2, "--show", 90)
    assert "row 89" in printed
    assert "identity" not in printed
    assert "no array 'pids'" in _error(
        "search", "--gallery", tmp_path / "g", "--features", features, "--exclude-same-camera"
    )


def test_more_than_the_gallery_has(features: Path, tmp_path: Path) -> None:
    """All rows, and no memory for others."""
    _index(features, tmp_path / "g")
    out = tmp_path / "lists.json"
    _run("search", "--gallery", tmp_path / "g", "--features", features, "-k", 10**15, "--output", out)
    rows = int((_arrays()["split"] == 2).sum())
    assert all(len(one["results"]) == rows for one in json.loads(out.read_text())["queries"])


def test_index_replaces_only_galleries(features: Path, tmp_path: Path) -> None:
    _index(features, tmp_path / "g")
    _index(features, tmp_path / "g", "--metric", "euclidean")
    assert Gallery.load(tmp_path / "g").metric == "euclidean"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "not replaced" in _error("index", "--features", features, "--output", tmp_path / "mine")
    assert "expected a folder" in _error("index", "--features", features, "--output", features)


def test_search_errors(features: Path, tmp_path: Path) -> None:
    _index(features, tmp_path / "g")
    other = _file(tmp_path / "other.npz", _arrays(dim=7))
    message = _error("search", "--gallery", tmp_path / "g", "--features", other)
    assert "other.npz: features: expected 12 dimensions as the gallery, got 7" in message
    assert "no such folder" in _error("search", "--gallery", tmp_path / "absent", "--features", features)
    assert "expected a folder" in _error("search", "--gallery", features, "--features", features)
    next((tmp_path / "g").glob("index-*")).write_bytes(b"damaged")
    assert "damaged" in _error("search", "--gallery", tmp_path / "g", "--features", features)
    for arguments, message in (
        (["--output", "lists.txt"], ".json or .csv"),
        (["--output", str(tmp_path / "absent" / "lists.csv")], "there is no folder"),
    ):
        assert message in _error("search", "--gallery", tmp_path / "g", "--features", features, *arguments)
    assert "'-k'" in _run("search", "--gallery", tmp_path / "g", "--features", features, "-k", 0, code=2)


# feature files


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda arrays: arrays.pop(name)


def _with(name: str, values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda arrays: arrays.update({name: values(arrays) if callable(values) else values})


def _not_finite(arrays: dict[str, Any]) -> np.ndarray:
    features = arrays["features"].copy()
    features[[4, 8], 0] = [np.nan, np.inf]
    return features


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("features"), "no array 'features'; found camids, names, pids, split"),
        (_without("pids"), "no array 'pids'"),
        (_without("camids"), "no array 'camids'"),
        (_without("split"), "no array 'split'; without one, give two files as --query and --gallery"),
        (_with("features", np.ones((90, 12), int)), "features: expected floating point (N, D), got int64 (90, 12)"),
        (_with("features", np.ones(90)), "features: expected floating point (N, D), got float64 (90,)"),
        (_with("features", np.ones((0, 12))), "features: no rows"),
        (_with("features", _not_finite), "features: NaN or infinite values in 2 of 90 rows: 4, 8"),
        (_with("pids", np.ones(90)), "pids: expected integers, got float64"),
        (_with("pids", np.ones(89, int)), "pids: expected shape (90,)"),
        (_with("camids", np.ones((90, 1), int)), "camids: expected shape (90,)"),
        (_with("split", np.full(90, 3)), "split: expected 0 (train), 1 (query) or 2 (gallery), got 3"),
        (_with("split", np.full(90, 2)), "split: no query rows (value 1)"),
        (_with("split", np.full(90, 1)), "split: no gallery rows (value 2)"),
        (_with("names", np.array([{}] * 90)), "names: expected strings, got object"),
        (_with("names", np.arange(90)), "names: expected strings, got int64"),
        (_with("pids", np.arange(90)), "expected at least one query with a gallery image of the same identity"),
    ],
)
def test_wrong_arrays(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    arrays = _arrays()
    change(arrays)
    error = _error("evaluate", "--features", _file(tmp_path / "f.npz", arrays))
    assert "f.npz: " in error
    assert message in error


def test_wrong_files(features: Path, tmp_path: Path) -> None:
    content = features.read_bytes()
    for name, damaged in (
        ("truncated", content[: len(content) // 2]),
        ("cut by one", content[:-1]),
        ("empty", b""),
        ("text", b"features,pids\n"),
    ):
        (tmp_path / name).write_bytes(damaged)
        error = _error("evaluate", "--features", tmp_path / name)
        assert f"{name}: not an .npz file, or cut off or damaged" in error
    np.save(tmp_path / "single.npy", np.ones(3))
    assert "single.npy: expected an .npz file" in _error("evaluate", "--features", tmp_path / "single.npy")
    assert "absent.npz: no such file" in _error("evaluate", "--features", tmp_path / "absent.npz")
    assert "expected a file, found a folder" in _error("evaluate", "--features", tmp_path)
    dim = _file(tmp_path / "dim.npz", _arrays(dim=5))
    error = _error("evaluate", "--query", features, "--gallery", dim)
    assert "dim.npz: features: expected 12 dimensions" in error


def test_changed_bytes_are_never_evaluated(features: Path, tmp_path: Path) -> None:
    """The archive's own checksums: wherever a byte of an array changes, the array is named."""
    content = features.read_bytes()
    with zipfile.ZipFile(features) as archive:
        members = [(entry.filename, entry.header_offset, entry.file_size) for entry in archive.infolist()]
    for name, start, size in members:
        damaged = bytearray(content)
        damaged[start + 80 + size // 2] ^= 4
        (tmp_path / "f.npz").write_bytes(damaged)
        error = _error("evaluate", "--features", tmp_path / "f.npz")
        assert f"f.npz: {name.removesuffix('.npy')}: cannot be read" in error


def test_outputs_are_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = ["evaluate", "--features", "absent.npz", "--json"]
    assert "there is no folder" in _error(*evaluate, tmp_path / "absent" / "o.json")
    assert "expected a file name, got a folder" in _error(*evaluate, tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    assert f"no permission to write to {tmp_path}" in _error(*evaluate, tmp_path / "o.json")


def test_a_full_disk_is_one_line(features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    out = tmp_path / "out.json"
    write_text(out, "before")
    monkeypatch.setattr("os.fsync", full)
    printed = _run("evaluate", "--features", features, "--json", out, code=1)
    assert printed.splitlines()[-1] == f"Error: {tmp_path}: No space left on device"
    assert out.read_text() == "before"
    assert not list(tmp_path.glob(".*"))


# env, help


def test_env() -> None:
    printed = _run("env")
    for name in ("apd-kernels", "python", "platform", "torch", "triton", "faiss", "numpy", "gpus", "backend"):
        assert any(line.startswith(name) for line in printed.splitlines()), name


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    assert "--help" in _run(command, "--help")


def test_help_is_quick() -> None:
    """`apd --help` lists the commands without importing PyTorch, FAISS or numpy."""
    script = """
import sys
from apd.cli import app
try:
    app(["--help"])
finally:
    loaded = {"torch", "faiss", "numpy", "matplotlib"} & set(sys.modules)
    assert not loaded, loaded
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert all(command in run.stdout for command in COMMANDS)


def test_an_ascii_terminal(features: Path, tmp_path: Path) -> None:
    """Names that the terminal cannot show are shown with question marks."""
    _index(features, tmp_path / "g")
    command = [sys.executable, "-m", "apd.cli", "search", "--gallery", str(tmp_path / "g"), "--features", str(features)]
    run = subprocess.run(command, capture_output=True, env={"PYTHONIOENCODING": "ascii"}, check=False)
    assert run.returncode == 0, run.stderr
    assert b"image 89 ?.jpg" in run.stdout or b" ?.jpg" in run.stdout


def test_version() -> None:
    import apd_kernels

    assert _run("--version").strip() == apd_kernels.__version__
