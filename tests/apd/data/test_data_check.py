"""``apd data``: what it counts, what it finds wrong, its exit code; and data sets by name in the other commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("typer")
pytest.importorskip("faiss")

import miniatures
from command_line import error, run
from drawn import draw_data_set, write_run

from apd.data.datasets import DATASETS, Published
from apd.retrieval.features import load_features


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_list() -> None:
    text = run("data", "list")
    assert all(name in text for name in DATASETS)
    assert "train 12,936 of 751, query 3,368 of 750, gallery 15,913 of 750" in text


def test_nothing_wrong(tmp_path: Path) -> None:
    path = draw_data_set(tmp_path / "drawn")
    text = run("data", "check", path, "--images")
    assert ["train", "4", "2", "2", "0"] in lines(text)
    assert ["gallery", "12", "5", "2", "2"] in lines(text)
    assert "nothing wrong; every image was read" in text
    assert "no image was opened" in run("data", "check", path)


def test_sizes_are_compared_by_name(tmp_path: Path) -> None:
    path = miniatures.market1501(tmp_path)
    text = run("data", "check", path, "--as", "Market1501", code=2)
    assert "1 junk left out" in text
    assert "market1501, query: published are 3,368 images of 750 identities; here are 6 images of 3 identities" in text
    assert run("data", "check", f"market1501:{path}", code=2) == text
    assert "published" not in run("data", "check", path)  # as a folder it is nobody's


def test_a_complete_data_set_has_exit_code_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = miniatures.ilids(tmp_path)
    for part, size in (("query", Published(7, 7)), ("gallery", Published(14, 7))):
        monkeypatch.setitem(DATASETS["ilids"].published, part, size)
    text = run("data", "check", path)
    assert ["query", "7", "7", "not", "known", "0"] in lines(text)


def test_broken_images_and_copies_are_named(tmp_path: Path) -> None:
    path = draw_data_set(tmp_path / "drawn")
    (path / "query" / "0003_c1s1_000000_00.png").write_bytes(b"no image")
    shutil.copy(path / "bounding_box_train" / "0008_c1s1_000000_00.png", path / "query" / "0001_c1s1_000000_00.png")
    assert "nothing wrong" in run("data", "check", path)
    text = run("data", "check", path, "--images", code=2)
    assert "query/0003_c1s1_000000_00.png: cannot be read as an image" in text
    assert (
        "1 image is in two parts, or of two identities: bounding_box_train/0008_c1s1_000000_00.png = "
        "query/0001_c1s1_000000_00.png" in text
    )


def test_a_part_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    path = miniatures.msmt17(tmp_path)
    (path / "list_query.txt").unlink()
    text = run("data", "check", path, code=2)
    assert ["gallery", "6", "3", "2", "0"] in lines(text)
    assert f"{path}: no list_query.txt" in text
    assert "msmt17, train: published are 32,621" in text


def test_overlap_and_names_are_findings(tmp_path: Path) -> None:
    path = draw_data_set(tmp_path / "drawn")
    shutil.copy(path / "query" / "0001_c1s1_000000_00.png", path / "bounding_box_train")
    (path / "query" / "IMG_1.jpg").touch()
    text = run("data", "check", path, code=2)
    assert "1 identity is both in train and in query or gallery: 1" in text
    assert "1 file is left out, not named" in text


def test_queries_without_an_answer_are_counted(tmp_path: Path) -> None:
    path = draw_data_set(tmp_path / "drawn")
    (path / "bounding_box_test" / "0003_c2s1_000001_00.png").unlink()
    text = run("data", "check", path)
    assert "queries without an answer from another camera: 1 of 5" in text
    for image in (path / "bounding_box_test").glob("*_c2s1_*"):
        image.unlink()
    text = run("data", "check", path, code=2)
    assert "queries without an answer from another camera: 5 of 5" in text
    assert "no query has an image of its identity from another camera in the gallery" in text
    assert "apd evaluate --ignore-cameras" in text


def test_images_of_a_manifest_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("path,pid,camid,split\nx.csv,1,1,query\nb/c.png,1,2,gallery\n")
    assert f"{tmp_path}: 1 image is not there: b/c.png" in run("data", "check", path, code=2)


def test_errors(tmp_path: Path) -> None:
    assert "no such folder" in error("data", "check", tmp_path / "x")
    assert "did you mean viper?" in error("data", "check", tmp_path, "--as", "vipr")
    assert "no folder 'cam_a'" in error("data", "check", tmp_path, "--as", "viper")


def test_other_commands_take_names(tmp_path: Path) -> None:
    network, grid = write_run(tmp_path / "run"), miniatures.grid(tmp_path)
    features = tmp_path / "grid.npz"
    text = run("extract", "--model", network, "--data", f"grid:{grid}", "--output", features)
    assert "grid, query: published are 250 images" in text
    rows = load_features(features)
    assert rows.names[0].startswith("probe/0001_1_")
    assert np.bincount(rows.split).tolist() == [0, 6, 10]
    text = run("evaluate", "--checkpoint", network, "--data", f"grid:{grid}")
    assert "6 counted, 0 left out" in text
    assert "note: GRID (Loy et al. 2009): all images at once; published figures are means over ten splits" in text
    run("index", "--checkpoint", network, "--data", tmp_path / "underground_reid", "--output", tmp_path / "gallery")
    query = next((grid / "probe").iterdir())
    picture = tmp_path / "found.png"
    run("search", "--gallery", tmp_path / "gallery", "--query", query, "-k", 3, "--picture", picture)
    assert picture.is_file()
    assert "has no part 'train'" in error(
        "extract", "--model", network, "--data", f"grid:{grid}", "--part", "train", "--output", features
    )
