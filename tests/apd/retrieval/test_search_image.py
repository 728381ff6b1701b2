"""From a run and a data set to a gallery, and from an image to a ranked list and its picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("timm")
pytest.importorskip("typer")
pytest.importorskip("faiss")

from command_line import error, run
from drawn import SIZE, draw_data_set, write_run

from apd.data.images import load_image
from apd.errors import InputError
from apd.reports.picture import RIGHT, UNKNOWN, WRONG, write_ranked_picture
from apd.retrieval.features import FeatureSet, load_features
from apd.retrieval.ranked_lists import RankedLists
from apd.run import Run
from apd_kernels import Gallery, SearchResult


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return draw_data_set(tmp_path / "set")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "mine")


@pytest.fixture
def gallery(data: Path, checkpoint: Path, tmp_path: Path) -> Path:
    run("index", "--checkpoint", checkpoint, "--data", data, "--output", tmp_path / "gallery")
    return tmp_path / "gallery"


def _query(data: Path, pid: int = 2) -> Path:
    return data / "query" / f"{pid:04d}_c1s1_000000_00.png"


def _described(checkpoint: Path, paths: list[Path], flip: bool = False) -> np.ndarray:
    images = torch.from_numpy(np.stack([load_image(path, SIZE) for path in paths])).permute(0, 3, 1, 2).float() / 255
    network = Run(checkpoint).load_model("cpu")
    with torch.no_grad():
        rows = network(images)
        if flip:
            rows = torch.nn.functional.normalize(rows + network(images.flip(3)))
        return rows.double().numpy()


def test_the_gallery_knows_its_run(data: Path, checkpoint: Path, gallery: Path) -> None:
    saved = Gallery.load(gallery)
    assert saved.notes == {
        "run": str(checkpoint),
        "data": str(data),
        "model": "mine",
        "fingerprint": Run(checkpoint).fingerprint(),
        "image_size": list(SIZE),
        "flip_test": False,
        "descriptor": "before_bn",
        "label_smoothing": 0.0,
    }
    files = sorted((data / "bounding_box_test").iterdir())
    assert saved.metadata["name"].tolist() == [path.relative_to(data).as_posix() for path in files]
    assert saved.ids.tolist() == [int(path.name[:4]) for path in files]


@pytest.mark.parametrize("flip", [False, True])
def test_search(data: Path, checkpoint: Path, gallery: Path, tmp_path: Path, flip: bool) -> None:
    """The list is that of the network's descriptors; a query is described as the gallery was."""
    if flip:
        run("index", "--checkpoint", checkpoint, "--data", data, "--output", gallery, "--flip-test")
    out = tmp_path / "lists.json"
    printed = run("search", "--gallery", gallery, "--query", _query(data), "-k", 4, "--output", out)
    files = sorted((data / "bounding_box_test").iterdir())
    distances = (1 - _described(checkpoint, files, flip) @ _described(checkpoint, [_query(data)], flip).T).ravel()
    (one,) = json.loads(out.read_text())["queries"]
    assert (one["id"], one["camera"], one["name"]) == (2, 1, str(_query(data)))
    assert [match["row"] for match in one["results"]] == np.argsort(distances)[:4].tolist()
    for match in one["results"]:
        assert match["distance"] == pytest.approx(distances[match["row"]], abs=1e-5)
        assert f"  {match['name']}" in printed
    assert f"flip test {'on' if flip else 'off'}" in printed
    assert "id 2  camera 1" in printed


def test_several_queries(data: Path, gallery: Path, tmp_path: Path) -> None:
    """Identity and camera: as the options say, else as the file name says, else not known."""
    portrait = tmp_path / "portrait é.png"
    shutil.copy(_query(data), portrait)
    distractor = tmp_path / "0000_c2s1_000000_00.png"
    shutil.copy(_query(data), distractor)
    out = tmp_path / "lists.json"
    search = ["search", "--gallery", gallery, "--query", portrait, "--query", _query(data, 3), "--query", distractor]

    def labels(*arguments: object) -> list[tuple[int, int]]:
        run(*search, "--output", out, *arguments)
        return [(one["id"], one["camera"]) for one in json.loads(out.read_text())["queries"]]

    assert labels() == [(-1, -1), (3, 1), (-1, 2)]
    assert labels("--id", 4, "--camera", 2) == [(4, 2)] * 3
    printed = run(*search)
    assert "id -1" not in printed
    assert "3 images, 1 identity, 2 cameras; portrait é.png, the first of 3 images" in printed
    assert " of 1 query: an image of the same identity at rank 1" in printed


def test_search_without_the_query_camera(data: Path, gallery: Path, tmp_path: Path) -> None:
    search = ["search", "--gallery", gallery, "-k", 50, "--exclude-same-camera", "--output", tmp_path / "lists.json"]
    run(*search, "--query", _query(data))
    (one,) = json.loads((tmp_path / "lists.json").read_text())["queries"]
    assert len(one["results"]) == 11
    assert (2, 1) not in [(match["id"], match["camera"]) for match in one["results"]]
    shutil.copy(_query(data), tmp_path / "portrait.png")
    unknown = ["--query", tmp_path / "portrait.png"]
    assert "--exclude-same-camera: the query's identity or camera is not known" in error(*search, *unknown)
    assert "is not known" in error(*search, *unknown, "--id", 2)
    run(*search, *unknown, "--id", 2, "--camera", 1)


# pictures


def _frames(path: Path, rows: int) -> list[list[tuple[int, int, int]]]:
    """The colours of the frames, read just inside of the upper left corner of each cell but the query's."""
    image = np.asarray(Image.open(path).convert("RGB"))
    known = (RIGHT, WRONG, UNKNOWN)
    found = []
    for row in range(rows):
        line = [tuple(pixel) for pixel in image[10 + row * (image.shape[0] - 10) // rows + 1].tolist()]
        starts = [i for i in range(1, len(line)) if line[i] in known and line[i - 1] not in known]
        found.append([line[start] for start in starts])
    return found


def test_picture(data: Path, gallery: Path, tmp_path: Path) -> None:
    """Green for the query's identity, red for others, grey where it is not known; one row a query."""
    shutil.copy(_query(data), tmp_path / "portrait.png")
    out, picture = tmp_path / "lists.json", tmp_path / "picture.png"
    printed = run(
        *("search", "--gallery", gallery, "--query", _query(data), "--query", tmp_path / "portrait.png"),
        *("-k", 7, "--output", out, "--picture", picture),
    )
    assert printed.splitlines()[-1] == f"wrote {picture}"
    known, _ = json.loads(out.read_text())["queries"]
    right = [match["id"] == 2 for match in known["results"]]
    assert True in right
    assert False in right
    assert _frames(picture, 2) == [[RIGHT if same else WRONG for same in right], [UNKNOWN] * 7]
    run("search", "--gallery", gallery, "--query", tmp_path / "portrait.png", "-k", 7, "--id", 2, "--picture", picture)
    assert _frames(picture, 1) == [[RIGHT if same else WRONG for same in right]]
    assert not list(tmp_path.glob(".*"))
    run("search", "--gallery", gallery, "--query", _query(data), "--picture", tmp_path / "picture.jpg")
    assert Image.open(tmp_path / "picture.jpg").format == "JPEG"


def test_a_picture_that_no_file_can_hold(tmp_path: Path) -> None:
    pids = np.ones(400, np.int32)
    query = FeatureSet(tmp_path / "q.npz", "all rows", np.ones((400, 2)), pids.astype(str), pids, pids, None)
    for many, long in ((400, 1), (1, 600)):
        found = (np.zeros((many, long)), np.arange(many * long).reshape(many, long), *np.ones((2, many, long), int))
        names = np.full((many, long), "a.png")
        lists = RankedLists(query.select(slice(many)), "cosine", SearchResult(*map(torch.from_numpy, found)), names)
        message = f"p.jpg: a picture can hold .* got {many} of {long}; draw fewer with --show and -k"
        with pytest.raises(InputError, match=message):
            write_ranked_picture(lists, tmp_path, tmp_path / "p.jpg")
    assert not list(tmp_path.iterdir())


def test_picture_shows_the_images(data: Path, gallery: Path, tmp_path: Path) -> None:
    """Each image is where its caption says; one that is gone is an empty box."""
    out, picture = tmp_path / "lists.json", tmp_path / "picture.png"
    search = ["search", "--gallery", gallery, "--query", _query(data), "-k", 3, "--output", out, "--picture", picture]
    run(*search)
    (one,) = json.loads(out.read_text())["queries"]
    names = [_query(data), *(data / match["name"] for match in one["results"])]
    before = np.asarray(Image.open(picture)).astype(float)
    cell = before.shape[1] // 4

    def middle(image: np.ndarray, column: int) -> np.ndarray:
        left = column * cell + cell // 2
        return image[90:130, left - 20 : left + 20].mean((0, 1))

    for column, name in enumerate(names):
        np.testing.assert_allclose(middle(before, column), load_image(name, None).mean((0, 1)), atol=8)
    names[2].unlink()
    run(*search)
    after = np.asarray(Image.open(picture)).astype(float)
    assert after.shape == before.shape
    changed = [column for column in range(4) if (middle(after, column) != middle(before, column)).any()]
    assert changed == [2]
    moved = tmp_path / "elsewhere"
    shutil.move(data, moved)
    search[4] = _query(moved)
    message = error(*search)
    assert message == f"Error: {gallery}: its images are not in {data}: no such folder; where are they now? --data DIR"
    assert f"not in {names[2]}" in error(*search, "--data", names[2])
    run(*search, "--data", moved)
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), after)


# errors


def test_a_changed_or_moved_run(data: Path, checkpoint: Path, gallery: Path, tmp_path: Path) -> None:
    search = ["search", "--gallery", gallery, "--query", _query(data)]
    before = run(*search)
    moved = tmp_path / "moved"
    shutil.move(checkpoint, moved)
    assert "gallery: made with the run " in (message := error(*search))
    assert str(checkpoint) in message
    assert run(*search, "--checkpoint", moved).splitlines()[1:] == before.splitlines()[1:]  # the run's name has changed
    write_run(checkpoint, seed=1)
    message = error(*search)
    assert "gallery: made with other weights" in message
    assert Run(moved).fingerprint()[:12] in message
    assert "apd index --checkpoint" in message


def test_a_gallery_of_features(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Knows no model; a run's gallery that it replaces leaves nothing behind."""
    gallery, features = tmp_path / "g", tmp_path / "f.npz"
    run("index", "--checkpoint", checkpoint, "--data", data, "--output", gallery)
    run("extract", "--model", checkpoint, "--data", data, "--output", features)
    run("search", "--gallery", gallery, "--features", features)
    run("index", "--features", features, "--output", gallery)
    message = error("search", "--gallery", gallery, "--query", _query(data))
    assert "made from a feature file" in message
    assert "apd index --checkpoint RUN --data DIR" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --query IMAGE or --features"),
        (["--query", "q.png", "--features", "f.npz"], "give either --query IMAGE or --features"),
        (["--features", "f.npz", "--checkpoint", "r"], "--checkpoint: is for --query IMAGE"),
        (["--features", "f.npz", "--id", "3"], "--id: is for --query IMAGE"),
        (["--query", "q.png", "--picture", "p.gif"], "expected a name that ends in .png or .jpg"),
        (["--query", "q.png", "--picture", "absent/p.png"], "there is no folder absent"),
        (["--query", "absent.png"], "absent.png: no such file"),
        (["--query", "."], "no images in this folder"),
    ],
)
def test_wrong_options(gallery: Path, arguments: list[str], message: str) -> None:
    assert message in error("search", "--gallery", gallery, *arguments)


@pytest.mark.parametrize(
    "arguments", [[], ["--checkpoint", "r"], ["--data", "d"], ["--features", "f", "--checkpoint", "r", "--data", "d"]]
)
def test_one_source(arguments: list[str], tmp_path: Path) -> None:
    for command in (["index", "--output", tmp_path / "g"], ["evaluate"]):
        assert "--checkpoint and --data" in error(*command, *arguments)
    assert not (tmp_path / "g").exists()


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = lambda *arguments, **options: pytest.fail("images were described")  # noqa: E731
    monkeypatch.setattr("apd.retrieval.extraction.extract", described)
    (tmp_path / "file").touch()
    index = ["index", "--checkpoint", checkpoint, "--data", data, "--output"]
    assert "not replaced: a folder with other content" in error(*index, data)
    assert "expected a folder to save to, found a file" in error(*index, tmp_path / "file")


def test_nothing_is_written_without_the_images(data: Path, checkpoint: Path, gallery: Path) -> None:
    """A gallery stays as it was if one of the new images cannot be read."""
    before = {path.name: path.read_bytes() for path in gallery.iterdir()}
    broken = data / "bounding_box_test" / "0001_c1s1_000001_00.png"
    broken.write_bytes(b"")
    message = error("index", "--checkpoint", checkpoint, "--data", data, "--output", gallery)
    assert "0001_c1s1_000001_00.png: cannot be read" in message
    assert {path.name: path.read_bytes() for path in gallery.iterdir()} == before


def test_images_without_labels(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    """A folder of pictures is described, indexed and searched; nobody need say who is on them."""
    crops, features, gallery = tmp_path / "crops", tmp_path / "f.npz", tmp_path / "crops-gallery"
    crops.mkdir()
    for number, image in enumerate(sorted((data / "query").iterdir())):
        shutil.copy(image, crops / f"frame_{number:05}.png")
    text = run("extract", "--model", checkpoint, "--data", crops, "--output", features)
    assert "images      5 images; crops, all rows" in text
    rows = load_features(features)
    assert (rows.split, set(rows.identities()), set(rows.cameras())) == (None, {-1}, {-1})
    assert "says the identity of no image" in run(
        "rerank", "--query", features, "--gallery", features, "--output", tmp_path / "r.json"
    )
    run("extract", "--model", checkpoint, "--data", crops, "--output", features, "--part", "query")
    assert load_features(features).split.tolist() == [1] * 5  # type: ignore[union-attr]
    (tmp_path / "x.csv").write_text("path\ncrops/frame_00000.png\n")
    run("extract", "--model", checkpoint, "--data", tmp_path / "x.csv", "--output", features)
    assert load_features(features).split is None

    run("index", "--checkpoint", checkpoint, "--data", crops, "--output", gallery)
    lists = tmp_path / "lists.json"
    run("search", "--gallery", gallery, "--query", crops, "-k", 1, "--output", lists, "--picture", tmp_path / "p.png")
    found = json.loads(lists.read_text())["queries"]
    assert [query["results"][0]["name"] for query in found] == [f"frame_{number:05}.png" for number in range(5)]
    with Image.open(tmp_path / "p.png") as picture, Image.open(_picture_of(tmp_path, gallery, crops)) as one:
        assert picture.height > 2 * one.height  # three of the five, as --show says


def _picture_of(tmp_path: Path, gallery: Path, crops: Path) -> Path:
    run("search", "--gallery", gallery, "--query", crops / "frame_00000.png", "-k", 1, "--picture", tmp_path / "1.png")
    return tmp_path / "1.png"


def test_images_without_cameras(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    """Query and gallery are folders apart, and their names say an identity alone."""
    query, gallery = tmp_path / "asking", tmp_path / "answering"
    for folder, part in ((query, "query"), (gallery, "bounding_box_test")):
        folder.mkdir()
        for number, image in enumerate(sorted((data / part).iterdir())):
            shutil.copy(image, folder / f"{image.name[:4]}_{number}.png")
    sides = ("evaluate", "--checkpoint", checkpoint, "--query", query, "--gallery", gallery)
    assert "--ignore-cameras" in error(*sides)
    assert "is described by a run: --checkpoint RUN" in error("evaluate", "--query", query, "--gallery", gallery)
    assert "5 counted, 0 left out" in run(*sides, "--ignore-cameras")

    one = tmp_path / "one"
    shutil.copytree(data, one)
    for image in (one / "bounding_box_test").glob("*_c2s1_*"):
        image.unlink()
    message = error("evaluate", "--checkpoint", tmp_path / "no run", "--data", one)  # before a run is opened
    assert "no query has an image of its identity from another camera" in message
    assert "--ignore-cameras" in message
    assert "5 counted" in run("evaluate", "--checkpoint", checkpoint, "--data", one, "--ignore-cameras")


def test_a_missing_image_is_said_before_any_is_described(tmp_path: Path, checkpoint: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("path,pid,camid,split\na.png,1,1,query\nb.png,1,2,gallery\n")
    message = error("extract", "--model", checkpoint, "--data", path, "--output", tmp_path / "f.npz")
    assert f"{tmp_path}: 2 images are not there: {tmp_path / 'a.png'}, {tmp_path / 'b.png'}" in message


def test_a_gallery_that_cannot_be_made_is_said_before_its_images_are_described(
    tmp_path: Path, data: Path, checkpoint: Path, gallery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apd.cli import retrieval

    monkeypatch.setattr(retrieval, "extracted", lambda *_: pytest.fail("described"))
    index = ("index", "--data", data, "--output")
    assert "--index PQ7: " in error(*index, tmp_path / "new", "--checkpoint", checkpoint, "--index", "PQ7")
    other = write_run(tmp_path / "other", seed=1)
    assert "other: fingerprint: expected " in error(*index, gallery, "--checkpoint", other, "--append")
