"""``apd search``: filters, thresholds, engines, re-ranking, and the page of ranked lists."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("typer")
pytest.importorskip("faiss")

from command_line import error, run
from drawn import draw_data_set, write_run
from feature_files import draw_features, part, write
from html_page import Page

from apd_kernels import Gallery, k_reciprocal_rerank


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    arrays = draw_features(240)
    count = len(arrays["pids"])
    return arrays | {
        "scene": np.array(["hall", "yard"])[np.arange(count) % 2],
        "height": np.arange(count) / 4,
        "night": np.arange(count) % 3 == 0,
    }


@pytest.fixture
def features(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    return write(tmp_path / "f.npz", arrays)


@pytest.fixture
def gallery(tmp_path: Path, features: Path) -> Path:
    columns = ["--column", "scene", "--column", "height", "--column", "night"]
    run("index", "--features", features, "--output", tmp_path / "g", *columns)
    return tmp_path / "g"


def _lists(gallery: Path, features: Path, *arguments: object) -> list[list[dict[str, Any]]]:
    output = gallery.parent / "lists.json"
    run("search", "--gallery", gallery, "--features", features, "--output", output, *arguments)
    return [one["results"] for one in json.loads(output.read_text())["queries"]]


# filters


@pytest.mark.parametrize(
    ("conditions", "chosen"),
    [
        (["id=3"], lambda rows: rows["pids"] == 3),
        (["camera=1", "camera=2"], lambda rows: rows["camids"] < 3),
        (["scene=yard", "camera=1"], lambda rows: (rows["scene"] == "yard") & (rows["camids"] == 1)),
        (["night=true"], lambda rows: rows["night"]),
        (["night=False"], lambda rows: ~rows["night"]),
        (["height=50.25", "height=50.5"], lambda rows: (rows["height"] == 50.25) | (rows["height"] == 50.5)),
        (["name=image 239 é.jpg"], lambda rows: rows["names"] == "image 239 é.jpg"),
    ],
)
@pytest.mark.parametrize("rerank", [[], ["--rerank", "torchreid"]])
def test_where(
    gallery: Path, features: Path, arrays: dict[str, np.ndarray], conditions: list[str], chosen: Any, rerank: list[str]
) -> None:
    """All that meet the conditions, and nothing else."""
    where = [argument for condition in conditions for argument in ("--where", condition)]
    expected = np.flatnonzero(chosen(part(arrays, 2))).tolist()
    assert expected
    for matches in _lists(gallery, features, "-k", 1000, *where, *rerank):
        assert sorted(match["row"] for match in matches) == expected


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (["colour=red"], "--where colour=red: expected KEY=VALUE with the key id or camera or name or scene or height"),
        (["scene"], "--where scene: expected KEY=VALUE"),
        (["id=three"], "--where id=three: expected an integer"),
        (["height=tall"], "--where height=tall: expected a number"),
        (["night=yes"], "--where night=yes: expected true or false"),
        (["camera=9"], "--where camera=9: no image of the gallery has this value"),
        (["name=image 239 é.jpg", "height=50.5"], "no image of the gallery meets all of them"),
    ],
)
def test_wrong_where(gallery: Path, features: Path, conditions: list[str], message: str) -> None:
    where = [argument for condition in conditions for argument in ("--where", condition)]
    assert message in error("search", "--gallery", gallery, "--features", features, *where)


def test_max_distance(gallery: Path, features: Path) -> None:
    every = _lists(gallery, features, "-k", 1000)
    limit = float(np.median([match["distance"] for matches in every for match in matches]))
    found = _lists(gallery, features, "-k", 1000, "--max-distance", limit)
    assert found == [[match for match in matches if match["distance"] <= limit] for matches in every]
    assert "--max-distance: max_distance: expected" in error(
        "search", "--gallery", gallery, "--features", features, "--max-distance", -1
    )


# engines and indexes


def test_fused(gallery: Path, features: Path) -> None:
    for faiss, fused in zip(
        _lists(gallery, features, "--where", "camera=1"),
        _lists(gallery, features, "--where", "camera=1", "--engine", "fused"),
        strict=True,
    ):
        assert [match["row"] for match in fused] == [match["row"] for match in faiss]
        assert [match["distance"] for match in fused] == pytest.approx([m["distance"] for m in faiss], abs=1e-6)


def test_parameters(tmp_path: Path, features: Path) -> None:
    """With one of sixteen cells fewer of the nearest are found than with all of them."""
    gallery = tmp_path / "g"
    run("index", "--features", features, "--output", gallery, "--index", "IVF16,Flat")
    exact = tmp_path / "exact"
    run("index", "--features", features, "--output", exact)
    every = _lists(exact, features, "-k", 3)
    assert _lists(gallery, features, "-k", 3, "--parameter", "nprobe=16") == every
    assert _lists(gallery, features, "-k", 3, "--parameter", "nprobe=1") != every
    search = ["search", "--gallery", gallery, "--features", features]
    assert "--parameter: parameters: expected 'nprobe' or" in error(*search, "--parameter", "efSearch=4")
    for wrong in ("nprobe", "nprobe=", "nprobe=0", "nprobe=-1", "=3", "nprobe=x"):
        assert f"--parameter {wrong}: expected KEY=N" in error(*search, "--parameter", wrong)
    assert "--engine fused: " in (message := error(*search, "--engine", "fused"))
    assert "expected 'Flat'" in message


# re-ranking


@pytest.mark.parametrize(("metric", "variant"), [("cosine", "torchreid"), ("euclidean", "transreid")])
def test_rerank(tmp_path: Path, features: Path, arrays: dict[str, np.ndarray], metric: str, variant: str) -> None:
    gallery = tmp_path / "g"
    run("index", "--features", features, "--output", gallery, "--metric", metric)
    rerank = ["--rerank", variant, "--k1", 12, "--k2", 4, "--lambda", 0.2]
    found = _lists(gallery, features, "-k", 5, *rerank)
    query, images = (torch.from_numpy(part(arrays, split)["features"].astype(np.float32)) for split in (1, 2))
    options = {"k1": 12, "k2": 4, "lambda_value": 0.2}
    expected = k_reciprocal_rerank(query, images, variant=variant, metric=metric, **options)
    nearest = expected.topk(5)
    distances = [[match["distance"] for match in matches] for matches in found]
    np.testing.assert_allclose(distances, nearest.distances, atol=2e-3 if variant == "transreid" else 1e-5)
    rows = torch.tensor([[match["row"] for match in matches] for matches in found])
    np.testing.assert_allclose(distances, expected.dense().gather(1, rows), atol=2e-3)

    fewer = _lists(gallery, features, "-k", 1000, *rerank, "--exclude-same-camera")
    labels = part(arrays, 1)
    for pid, camera, matches in zip(labels["pids"], labels["camids"], fewer, strict=True):
        assert (pid, camera) not in [(match["id"], match["camera"]) for match in matches]
        same = (part(arrays, 2)["pids"] == pid) & (part(arrays, 2)["camids"] == camera)
        assert len(matches) == (~same).sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rerank", "transreid"], "--rerank transreid: is defined on Euclidean distances; got the metric cosine"),
        (["--rerank", "torchreid", "--max-distance", 1], "--max-distance: is for distances of features"),
        (["--rerank", "torchreid", "--parameter", "nprobe=2"], "--parameter: is for distances of features"),
        (["--k2", 3], "--k2: is for --rerank"),
        (["--data", "d"], "--data: is for --picture and --report"),
        (["--report", "r.txt"], "--report r.txt: expected a name that ends in .html"),
        (["--report", "r.html", "--show", 0], "--show 0: leaves no list"),
        (["--report", "r.html"], "made from a feature file; where are its images? --data DIR"),
        (["--report", "r.html", "--data", "absent"], "its images are not in absent"),
        (["--output", "l.txt"], ".json or .csv or .npz"),
    ],
)
def test_wrong_options(gallery: Path, features: Path, arguments: list[object], message: str) -> None:
    assert message in error("search", "--gallery", gallery, "--features", features, *arguments)


def test_queries_of_another_model(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    about = {"model": "a", "fingerprint": "12ab", "image_size": [4, 2], "flip_test": False}
    run("index", "--features", write(tmp_path / "a.npz", arrays | about), "--output", tmp_path / "g")
    assert Gallery.load(tmp_path / "g").fingerprint == "12ab"
    search = ["search", "--gallery", tmp_path / "g", "--features"]
    run(*search, write(tmp_path / "unknown.npz", arrays))
    other = write(tmp_path / "b.npz", arrays | about | {"image_size": [8, 4]})
    assert "b.npz: image_size: expected [4, 2] as the gallery" in error(*search, other)


# the page


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return draw_data_set(tmp_path / "set")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_run(tmp_path / "mine")


def _frames(path: Path) -> list[list[str]]:
    """Of each list of the page: what its found images are framed as."""
    page = Page(path)
    page.check_alone()
    names = {"tile right": "right", "tile wrong": "wrong", "tile ": "none"}
    strips = page.source.partition("<body>")[2].split('<div class="tiles">')[1:]
    strips = [strip.partition("</div>\n</div>")[0] for strip in strips]
    return [[names[piece.partition('"')[0]] for piece in strip.split('<figure class="')[1:]] for strip in strips]


def test_report_of_images(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    """Frames as the identities are; none where a query's identity is not known; an image that is gone is named."""
    gallery, report, output = tmp_path / "g", tmp_path / "found.html", tmp_path / "lists.json"
    run("index", "--checkpoint", checkpoint, "--data", data, "--output", gallery)
    shutil.copy(data / "query" / "0002_c1s1_000000_00.png", tmp_path / "portrait <b>.png")
    queries = ["--query", data / "query" / "0002_c1s1_000000_00.png", "--query", tmp_path / "portrait <b>.png"]
    search = ["search", "--gallery", gallery, *queries, "-k", 6, "--output", output, "--report", report]
    printed = run(*search, "--where", "camera=1")
    assert printed.splitlines()[-1] == f"wrote {report}"
    known, _ = json.loads(output.read_text())["queries"]
    right = [match["id"] == 2 for match in known["results"]]
    assert True in right
    assert False in right
    assert _frames(report) == [["right" if same else "wrong" for same in right], ["none"] * len(right)]
    page = report.read_text(encoding="utf-8")
    assert f"0002_c1s1_000000_00.png: 1 of {len(right)} right" in page
    assert "portrait &lt;b&gt;.png" in page
    assert "<td>camera=1</td>" in page
    for match in known["results"]:
        assert f"<span>camera {match['camera']}</span><span>{match['distance']:#.3g}</span>" in page
    assert page.count("data:image/jpeg;base64,") == 2 * (1 + len(right))
    gone = data / known["results"][1]["name"]
    gone.unlink()
    run(*search, "--where", "camera=1")
    page = report.read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 2 * len(right)
    assert page.count(f'<div class="missing">{gone.name}</div>') == 2
    assert not list(tmp_path.glob(".*"))


def test_report_of_features(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    """The first queries, whose images are in the gallery's folder, or in one of their own."""
    gallery, features, report = tmp_path / "g", tmp_path / "f.npz", tmp_path / "found.html"
    run("extract", "--model", checkpoint, "--data", data, "--output", features)
    run("index", "--features", features, "--output", gallery)
    search = ["search", "--gallery", gallery, "--features", features, "-k", 3, "--show", 2, "--report", report]
    picture = tmp_path / "found.png"
    run(*search, "--data", data, "--rerank", "torchreid", "--picture", picture)
    assert picture.stat().st_size
    page = report.read_text(encoding="utf-8")
    assert [len(frames) for frames in _frames(report)] == [3, 3]
    assert "2 queries of 5" in page
    assert "cosine, re-ranked: torchreid, k1 20, k2 6, lambda 0.3" in page
    assert page.count("data:image/jpeg;base64,") == 8
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(data / "query", elsewhere / "query")
    run(*search, "--data", data)
    assert report.read_text(encoding="utf-8").count('<div class="missing">') == 2
    run(*search, "--data", data, "--query-data", elsewhere)
    assert '<div class="missing">' not in report.read_text(encoding="utf-8")
    assert "--query-data: is for --features" in error(
        *("search", "--gallery", gallery, "--query", data / "x.png", "--query-data", data, "--report", report)
    )
