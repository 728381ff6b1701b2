"""Data sets by name: each reader on a miniature in exactly the layout in which the data set is distributed."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")

import miniatures

from apd.data.datasets import DATASETS, DataSpec, domains, present_parts, read_dataset, read_source
from apd.data.datasets.matlab import read_variable
from apd.data.images import load_image
from apd.data.market import FOLDERS, ReidFolder, Sample
from apd.errors import DataWarning, InputError


def read(data: object, *parts: str) -> tuple[ReidFolder, list[str]]:
    """The data set, and the warnings but those about its size: a miniature is smaller than what is published."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = read_dataset(str(data), parts or present_parts(str(data)))
    return folder, [text for w in caught if "published are" not in (text := str(w.message))]


def labels(samples: tuple[Sample, ...]) -> list[tuple[str, int, int]]:
    return [(sample.path.name, sample.pid, sample.camid) for sample in samples]


def counts(folder: ReidFolder) -> dict[str, tuple[int, int]]:
    parts = ((part, getattr(folder, part)) for part in FOLDERS)
    return {part: (len(samples), len({s.pid for s in samples} - {0})) for part, samples in parts if samples}


@pytest.mark.parametrize(
    ("name", "expected", "junk"),
    [
        ("market1501", {"train": (16, 4), "query": (6, 3), "gallery": (7, 3)}, 1),
        ("dukemtmc", {"train": (16, 4), "query": (6, 3), "gallery": (6, 3)}, 0),
        ("msmt17", {"train": (9, 3), "query": (3, 3), "gallery": (6, 3)}, 0),
        ("cuhk03", {"train": (16, 4), "query": (6, 3), "gallery": (6, 3)}, 0),
        ("cuhk02", {"train": (32, 8), "query": (4, 2), "gallery": (4, 2)}, 0),
        ("cuhk-sysu", {"train": (6, 3)}, 0),
        ("prid", {"query": (8, 8), "gallery": (10, 10)}, 0),
        ("grid", {"query": (6, 6), "gallery": (10, 6)}, 0),
        ("viper", {"query": (6, 6), "gallery": (6, 6)}, 0),
        ("ilids", {"query": (7, 7), "gallery": (14, 7)}, 0),
    ],
)
def test_layouts(tmp_path: Path, name: str, expected: dict[str, tuple[int, int]], junk: int) -> None:
    path = miniatures.ALL[name](tmp_path)
    folder, said = read(f"{name}:{path}")
    assert (counts(folder), folder.junk, said) == (expected, junk, [])
    images = (*folder.train, *folder.query, *folder.gallery)
    for sample in images:
        assert load_image(sample.path, None).shape == (*miniatures.SIZE, 3)
        assert sample.path.is_relative_to(folder.path)
        assert sample.camid >= 1
    assert not {s.pid for s in folder.train} & {s.pid for s in (*folder.query, *folder.gallery)}
    assert len({s.path for s in images}) == len(images)
    # The folder above, as downloads are often unpacked, and one part alone.
    if folder.path != path or path.name in DATASETS[name].inside:
        assert read(f"{name}:{path.parent if path == folder.path else path}")[0] == folder
    part = next(iter(expected))
    assert counts(read(f"{name}:{path}", part)[0]) == {part: expected[part]}


@pytest.mark.parametrize("name", [name for name in miniatures.ALL if name not in ("market1501", "dukemtmc")])
def test_layouts_are_recognised(tmp_path: Path, name: str) -> None:
    path = miniatures.ALL[name](tmp_path)
    assert read(path)[0] == read(f"{name}:{path}")[0]


def test_a_folder_of_market_layout_needs_no_name(tmp_path: Path) -> None:
    path = miniatures.market1501(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and is no Market-1501: its size is nobody's
        folder = read_dataset(path)
    assert folder == read(f"market1501:{path}")[0]
    assert present_parts(path) == list(FOLDERS)
    with pytest.raises(InputError, match="no folder 'bounding_box_train'; the layout of Market-1501"):
        read_dataset(tmp_path / "Market-1501-v15.09.15" / "query")


def test_a_folder_of_data_sets_is_none(tmp_path: Path) -> None:
    """Without a name nobody knows which of them is meant."""
    miniatures.market1501(tmp_path)
    miniatures.viper(tmp_path)
    with pytest.raises(InputError, match="no folder 'bounding_box_train'"):
        read_dataset(tmp_path)
    assert read(f"market1501:{tmp_path}")[0].path == tmp_path / "Market-1501-v15.09.15"


def test_a_source_that_is_named_in_two_ways_is_one(tmp_path: Path) -> None:
    from apd.config.values import Config
    from apd.training.train import start_run

    path = miniatures.market1501(tmp_path)
    with pytest.raises(InputError, match="expected different folders"):
        start_run(tmp_path / "run", Config(), [path, f"market1501+test:{tmp_path}"])


def test_published_sizes(tmp_path: Path) -> None:
    path = miniatures.market1501(tmp_path)
    with pytest.warns(DataWarning) as warned:
        read_dataset(f"market1501:{path}", ("gallery",))
    assert [str(w.message) for w in warned] == [
        f"{path}: market1501, gallery: published are 15,913 images of 750 identities, 2,798 of them distractors; "
        "here are 7 images of 3 identities, 1 of them distractors"
    ]


def test_a_size_as_published_is_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from apd.data.datasets import Published

    path = miniatures.cuhk03(tmp_path)
    for variant, images in (("detected", 16), ("labeled", 17)):
        monkeypatch.setitem(DATASETS["cuhk03"].published, f"train/{variant}", Published(images, 4))
    for data in (f"cuhk03:{path}", f"cuhk03/labeled:{path}", f"cuhk03:{path / 'labeled'}"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_dataset(data, ("train",))


def test_msmt17(tmp_path: Path) -> None:
    one, two = miniatures.msmt17(tmp_path), miniatures.msmt17(tmp_path, "v2")
    folder, _ = read(f"msmt17:{one}")
    assert labels(folder.query)[0] == ("0000_000_01_0303morning_0000_0.jpg", 10_001, 1)
    assert [(pid, camid) for _, pid, camid in labels(folder.train)][:3] == [(1, 1), (1, 2), (1, 15)]
    assert {sample.pid for sample in folder.train} == {1, 2, 3}  # list_val.txt's third among them, and 0 is nobody
    assert read(f"msmt17/v2:{tmp_path}")[0].path == two
    assert read(f"msmt17/v1:{tmp_path}")[0].path == one
    assert "mask_train_v2" in str(read(two)[0].train[0].path)

    extra = "0000/0000_003_12_0303morning_0164_1_ex.jpg"  # some names go on behind the number of the track
    miniatures.draw(two / "mask_train_v2" / extra, 0, 12)
    with (two / "list_train.txt").open("a") as lines:
        lines.write(f"{extra} 0\n")
    assert (Path(extra).name, 1, 12) in labels(read(two)[0].train)

    listed = two / "list_query.txt"  # as editors leave it
    listed.write_text(listed.read_text().replace(" ", "\t") + "\n \n")
    assert read(two)[0].query == read(f"msmt17/v2:{tmp_path}")[0].query != ()
    nested = tmp_path / "zip" / "MSMT17_V2"  # unpacked into a folder of its name
    nested.parent.mkdir()
    shutil.copytree(two, nested / "MSMT17_V2")
    assert read(f"msmt17:{nested.parent}")[0].path == nested / "MSMT17_V2"

    (one / "train" / "0000" / "0000_001_02_0303morning_0001_1.jpg").unlink()
    folder, said = read(f"msmt17:{one}")
    assert len(folder.train) == 8
    assert said == [f"{one}: 1 listed image is not there: train/0000/0000_001_02_0303morning_0001_1.jpg"]
    (one / "list_val.txt").unlink()
    with pytest.raises(InputError, match=r"no list_val\.txt"):
        read(f"msmt17:{one}")
    for line in ("0000/0000_000_01_x.jpg", "0000/0000.jpg 0", "0000/0000_000_00_x.jpg 0", "0000/0000_000_01_x.jpg x"):
        (one / "list_val.txt").write_text(f"0000/0000_001_02_0303morning_0001_1.jpg 0\n{line}\n")
        with pytest.raises(InputError, match=r"list_val\.txt: line 2: expected"):
            read(f"msmt17:{one}")
    with pytest.raises(InputError, match="no folder 'train', which MSMT17 V1 has"):
        read(f"msmt17/v1:{two}")


def test_cuhk03_variants(tmp_path: Path) -> None:
    path = miniatures.cuhk03(tmp_path)
    assert len(read(f"cuhk03:{path}")[0].train) == len(read(f"CUHK03-NP/detected:{path}")[0].train) == 16
    assert len(read(f"cuhk03/labeled:{path}")[0].train) == len(read(f"cuhk03:{path / 'labeled'}")[0].train) == 17
    with pytest.raises(InputError, match="expected the variant 'labeled', got the folder of 'detected'"):
        read(f"cuhk03/labeled:{path / 'detected'}")
    raw = tmp_path / "raw"
    (raw / "cuhk03_release").mkdir(parents=True)
    with pytest.raises(InputError, match="no folder 'detected'"):
        read(f"cuhk03:{raw}")
    (raw / "cuhk03_release" / "cuhk-03.mat").touch()
    with pytest.raises(InputError, match=r"the raw cuhk-03\.mat .* is not read; take CUHK03-NP"):
        read(f"cuhk03:{raw}")


def test_cuhk02_numbers(tmp_path: Path) -> None:
    folder, _ = read(f"cuhk02:{miniatures.cuhk02(tmp_path)}")
    assert labels(folder.train)[0] == ("001_001.png", 10_001, 1)
    assert {(s.path.parts[-3], s.pid // 10_000, (s.camid + 1) // 2) for s in folder.train} == {
        (f"P{pair}", pair, pair) for pair in (1, 2, 3, 4)
    }
    assert {(s.pid, s.camid) for s in folder.query} == {(50_001, 9), (50_002, 9)}
    assert {(s.pid, s.camid) for s in folder.gallery} == {(50_001, 10), (50_002, 10)}


@pytest.mark.parametrize(
    ("name", "pid"),
    [
        ("cropped_images/p11422_s16929_1.jpg", 11_422),
        ("cropped_image/p00007_n01_s00001_hard0.png", 7),
        ("bounding_box_train/0009_c0_1.jpg", 9),
    ],
)
def test_cuhk_sysu_forms(tmp_path: Path, name: str, pid: int) -> None:
    miniatures.draw(tmp_path / name, pid, 1)
    miniatures.draw((tmp_path / name).with_name("scene.jpg"), 1, 1)
    folder, said = read(f"cuhk-sysu:{tmp_path}")
    assert labels(folder.train) == [(name.rpartition("/")[2], pid, 1)]
    assert "1 file is left out, not named as CUHK-SYSU names them" in said[0]
    assert "scene.jpg" in said[0]
    with pytest.raises(InputError, match="has no part 'query', only train"):
        read(f"cuhk-sysu:{tmp_path}", "query")
    with pytest.raises(InputError, match="whole scenes are not read"):
        read(f"cuhk-sysu:{tmp_path.parent}")


def test_prid_numbers_mean_other_people_in_each_camera(tmp_path: Path) -> None:
    folder, _ = read(f"prid:{miniatures.prid(tmp_path)}")
    assert [pid for _, pid, _ in labels(folder.query)] == [1, 2, 3, 4, 5, 6, 201, 202]
    assert [pid for _, pid, _ in labels(folder.gallery)] == [1, 2, 3, 4, 5, 6, 386, 387, 388, 389]


def test_grid_viper_ilids_labels(tmp_path: Path) -> None:
    folder, _ = read(f"grid:{miniatures.grid(tmp_path)}")
    assert [(pid, camid) for _, pid, camid in labels(folder.gallery)][:5] == [(0, 3), (0, 4), (0, 5), (0, 6), (1, 2)]
    folder, _ = read(f"viper:{miniatures.viper(tmp_path)}")
    assert labels(folder.query)[0] == ("000_45.bmp", 1, 1)  # 0 would be a distractor
    assert labels(folder.gallery)[0] == ("000_90.bmp", 1, 2)
    folder, _ = read(f"ilids:{miniatures.ilids(tmp_path)}")
    assert labels(folder.query)[0] == ("0001001.jpg", 1, 1)
    assert labels(folder.gallery)[:2] == [("0001002.jpg", 1, 2), ("0001003.jpg", 1, 3)]


@pytest.mark.parametrize("name", ["prid", "grid", "viper", "ilids", "cuhk02"])
def test_misnamed_files_are_named(tmp_path: Path, name: str) -> None:
    path = miniatures.ALL[name](tmp_path)
    before, _ = read(f"{name}:{path}")
    wrong = (*before.query, *before.gallery)[0].path.parent / "IMG_2041.jpg"
    wrong.touch()
    after, said = read(f"{name}:{path}")
    assert after == before
    (message,) = said
    assert "1 file is left out, not named as" in message
    assert message.endswith(wrong.relative_to(before.path).as_posix())


@pytest.mark.parametrize(("name", "part"), [("viper", "cam_b"), ("prid", "single_shot/cam_b"), ("grid", "gallery")])
def test_a_missing_folder_is_named(tmp_path: Path, name: str, part: str) -> None:
    path = miniatures.ALL[name](tmp_path)
    (path / part).rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"no folder '{part}'; "):
        read(f"{name}:{path}")
    (path / part).mkdir()
    with pytest.raises(InputError, match="no images of the part 'gallery'"):
        read(f"{name}:{path}")


# Tests in ten splits


@pytest.mark.parametrize(
    ("name", "queries", "gallery"),
    [("viper", 3, 3), ("prid", 3, 3 + 4), ("grid", 3, 3 + 4), ("ilids", 4, 4)],
)
def test_ten_splits(tmp_path: Path, name: str, queries: int, gallery: int) -> None:
    folder, _ = read(f"{name}:{miniatures.ALL[name](tmp_path)}")
    make = DATASETS[name].splits
    assert make is not None
    splits = make(folder, 0)
    images = (*folder.query, *folder.gallery)
    assert len(splits) == 10
    for split in splits:
        asking, answering = [images[i] for i in split.query], [images[i] for i in split.gallery]
        assert (len(asking), len(answering)) == (queries, gallery)
        assert len({sample.pid for sample in asking}) == queries
        assert {sample.pid for sample in asking} <= {sample.pid for sample in answering}
        assert not {sample.path for sample in asking} & {sample.path for sample in answering}
        if name != "ilids":
            assert set(asking) <= set(folder.query)
            assert set(answering) <= set(folder.gallery)
    assert len({tuple(split.query) for split in splits}) > 3
    again = make(folder, 0)
    assert [(a.query.tolist(), a.gallery.tolist()) for a in splits] == [
        (b.query.tolist(), b.gallery.tolist()) for b in again
    ]


def test_grid_takes_the_partitions_that_come_with_it(tmp_path: Path) -> None:
    path = miniatures.grid(tmp_path, [[1, 2, 3], [4, 6, 2]])
    folder, _ = read(f"grid:{path}")
    splits = DATASETS["grid"].splits(folder, 0)  # type: ignore[misc]
    images = (*folder.query, *folder.gallery)
    tested = [sorted({images[i].pid for i in split.gallery}) for split in splits]
    assert tested == [[0, 4, 5, 6], [0, 1, 3, 5]]
    for wrong in ([[1, 2, 77]], [[1, 2, 3, 4, 5, 6]]):
        miniatures.grid(tmp_path, wrong)
        with pytest.raises(InputError, match="trainIdxAll, partition 1: expected some of the 6 identities"):
            DATASETS["grid"].splits(folder, 0)  # type: ignore[misc]
    (path / "features_and_partitions.mat").unlink()
    with pytest.raises(InputError, match=r"features_and_partitions\.mat: no such file"):
        DATASETS["grid"].splits(folder, 0)  # type: ignore[misc]


@pytest.mark.parametrize("compressed", [False, True])
def test_matlab_files(tmp_path: Path, compressed: bool) -> None:
    from scipy.io import savemat

    numbers = np.random.default_rng(0).random((7, 5)).astype(np.float32)
    cells = np.empty((2, 1), object)
    cells[0, 0], cells[1, 0] = np.arange(3, dtype=np.uint8)[None], {"a": np.int16([[4]]), "b": np.zeros((0, 2))}
    path = tmp_path / "x.mat"
    savemat(path, {"numbers": numbers, "cells": cells, "text": "abc"}, do_compression=compressed)
    np.testing.assert_array_equal(read_variable(path, "numbers"), numbers)
    first, second = read_variable(path, "cells")
    np.testing.assert_array_equal(first, [[0, 1, 2]])
    assert second[0]["a"] == 4
    assert second[0]["b"].shape == (0, 2)
    with pytest.raises(InputError, match="no variable 'other'"):
        read_variable(path, "other")
    with pytest.raises(InputError, match="text: cut off or damaged, or no plain numbers"):
        read_variable(path, "text")
    content = path.read_bytes()
    (tmp_path / "cut.mat").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cut off or damaged|no variable"):
        read_variable(tmp_path / "cut.mat", "text")
    (tmp_path / "hdf.mat").write_bytes(b"MATLAB 7.3 MAT-file" + bytes(200))
    with pytest.raises(InputError, match=r"MATLAB 7\.3 \(HDF5\)"):
        read_variable(tmp_path / "hdf.mat", "x")
    (tmp_path / "not.mat").write_bytes(b"no")
    with pytest.raises(InputError, match="not a MATLAB file"):
        read_variable(tmp_path / "not.mat", "x")


# Names and sources


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("some/folder", DataSpec(Path("some/folder"))),
        ("Market-1501:a/b", DataSpec(Path("a/b"), "market1501")),
        ("market1501+test:a", DataSpec(Path("a"), "market1501", None, True)),
        ("cuhk03/Labeled+test:a:b", DataSpec(Path("a:b"), "cuhk03", "labeled", True)),
        ("C:/data", DataSpec(Path("C:/data"))),  # a drive
    ],
)
def test_specs(text: str, expected: DataSpec) -> None:
    assert DataSpec.parse(text) == expected
    assert DataSpec.parse(str(expected)) == expected


def test_wrong_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no data set is called 'markt1501'; did you mean market1501"):
        DataSpec.parse("markt1501:x")
    with pytest.raises(InputError, match="variants of cuhk03: expected detected, labeled, got 'both'"):
        DataSpec.parse("cuhk03/both:x")
    with pytest.raises(InputError, match="variants of viper: expected none"):
        DataSpec.parse("viper/a:x")
    (tmp_path / "a:b").mkdir()
    assert DataSpec.parse(tmp_path / "a:b") == DataSpec(tmp_path / "a:b")
    monkeypatch.chdir(tmp_path)
    Path("viper:x").mkdir()
    assert DataSpec.parse("viper:x") == DataSpec(Path("viper:x"))  # what is there is no name
    with pytest.raises(InputError, match="no such folder"):
        read_dataset(f"viper:{tmp_path / 'nowhere'}", ("query",))


def test_sources(tmp_path: Path) -> None:
    path = miniatures.market1501(tmp_path)
    folder = read_source(path)
    assert (len(folder.train), len(folder.query), len(folder.gallery)) == (16, 6, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        everything = read_source(f"market1501+test:{path}")
        assert (len(everything.train), everything.query, everything.gallery) == (16 + 6 + 6, (), ())
        assert {sample.pid for sample in everything.train} == set(range(1, 8))  # and no distractor
        assert len(read_source(f"viper+test:{miniatures.viper(tmp_path)}").train) == 12
        with pytest.raises(InputError, match="has no part 'train', only query and gallery"):
            read_source(f"viper:{tmp_path}")


# Manifests


def manifest(path: Path, *lines: str, header: str = "path,pid,camid,split") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join((header, *lines)) + "\n")
    return path


def test_manifest(tmp_path: Path) -> None:
    path = manifest(
        tmp_path / "my set" / "list.csv",
        "a/1.png,7,1,train",
        '"a/2, copy.png",7,2,train',
        "b/3.png,9,1,query",
        "b/4.png,0,3,gallery",
        "b/5.png,-1,1,gallery",
    )
    folder, said = read(path)
    assert (folder.path, folder.junk, said) == (path.parent, 1, [])
    assert labels(folder.train) == [("1.png", 7, 1), ("2, copy.png", 7, 2)]
    assert labels(folder.query) == [("3.png", 9, 1)]
    assert labels(folder.gallery) == [("4.png", 0, 3)]
    assert read(f"csv:{path}") == (folder, [])
    assert present_parts(manifest(tmp_path / "t.csv", "a.png,1,1,train")) == ["train"]
    both = manifest(tmp_path / "both.csv", "a.png,1,1,train", "b.png,1,1,query")
    assert "1 identity is both in train and in query or gallery: 1" in read(both)[1][0]


def test_manifest_of_domains(tmp_path: Path) -> None:
    path = manifest(
        tmp_path / "list.csv",
        "1.png,1,1,train,shop",
        "2.png,3,2,train,shop",
        "3.png,1,1,train,campus",
        "4.png,5,4,train,campus",
        "5.png,0,1,gallery,shop",
        header="path,pid,camid,split,domain",
    )
    folder, _ = read(path)
    assert {s.path.name: (s.pid, s.camid) for s in folder.train} == {
        "3.png": (1, 1),
        "4.png": (5, 4),
        "1.png": (6, 5),  # behind the five people and four cameras of the campus
        "2.png": (8, 6),
    }
    assert folder.gallery[0].pid == 0
    assert [[s.path.name for s in one] for one in domains(folder.train)] == [["3.png", "4.png"], ["1.png", "2.png"]]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a.png,x,1,train", "line 3: pid: expected a whole number from -1, got 'x'"),
        ("a.png,1,0,train", "line 3: camid: expected a whole number from 1, got '0'"),
        ("a.png,99999999999999999999,1,train", "line 3: pid: expected a whole number"),
        ("a.png,1,1,test", "line 3: split: expected train, query, gallery, got 'test'"),
        ("a.png,0,1,train", "line 3: pid: 0 is a distractor"),
        ("/a.png,1,1,train", "line 3: path: expected one within the folder"),
        ("../a.png,1,1,train", "line 3: path: expected one within the folder"),
        (",1,1,train", "line 3: path: expected one"),
        ("a.png,1,1", "line 3: expected 4 values"),
        ("a.png,1,1,train,more", "line 3: expected 4 values"),
    ],
)
def test_wrong_manifests(tmp_path: Path, line: str, expected: str) -> None:
    path = manifest(tmp_path / "x.csv", "b.png,1,1,train", line)
    with pytest.raises(InputError, match=expected):
        read(path)


def test_manifests_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column 'camid'; expected path,pid,camid,split"):
        read(manifest(tmp_path / "x.csv", header="path,pid,split"))
    with pytest.raises(InputError, match=r"no x2\.csv"):
        read_dataset(f"csv:{tmp_path / 'x2.csv'}", ("train",))
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read(tmp_path / "bytes.csv")
    with pytest.raises(InputError, match="no images of the part 'train'"):
        read(manifest(tmp_path / "y.csv"), "train")


@pytest.mark.parametrize(
    ("header", "hint"),
    [
        ("path;pid;camid;split", "got 'path;pid;camid;split'; values are separated by ';', not by a comma"),
        ("path\tpid\tcamid\tsplit", "values are separated by '\\\\t'"),
        ("path, pid, camid, split", "no column 'pid'; .*; names are without spaces and capitals"),
        ("path,pid,camid,split,path", "the column 'path' is named twice"),
        ("Path,PID,CamID,Split", "no column 'path'; .*, got 'Path,PID,CamID,Split'; names are without"),
    ],
)
def test_headers_that_are_nearly_right(tmp_path: Path, header: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        read(manifest(tmp_path / "x.csv", "a.png,1,1,train", header=header))


def test_lines_that_are_there_twice(tmp_path: Path) -> None:
    path = manifest(
        tmp_path / "x.csv",
        "a.png,1,1,query",
        "b.png,1,2,gallery",
        "b.png,1,2,gallery",
        "a.png,1,1,gallery",
        "a.png,2,1,gallery",
    )
    folder, said = read(path)
    assert labels(folder.gallery) == [("b.png", 1, 2), ("a.png", 1, 1), ("a.png", 2, 1)]  # an image may ask and answer
    assert said == [
        f"{path}: 1 line is there twice, and counted once: line 4 is line 3",
        f"{path}: 1 image is listed with two identities or cameras: a.png in lines 2 and 6",
    ]


def test_large_numbers_and_unknown_cameras(tmp_path: Path) -> None:
    path = manifest(
        tmp_path / "x.csv",
        "a.png,1700000000123,-1,train,b",
        "b.png,3,2,train,a",
        header="path,pid,camid,split,domain",
    )
    assert labels(read(path)[0].train) == [("a.png", 1700000000126, -1), ("b.png", 3, 2)]


def test_manifests_without_identities(tmp_path: Path) -> None:
    """They are read only to be described; to train or to test on they are junk."""
    path = manifest(tmp_path / "x.csv", "a.png,-1,-1,gallery", "b.png,-1,2,gallery")
    assert labels(read_dataset(path, ("gallery",), unlabelled=True).gallery) == [("a.png", -1, -1), ("b.png", -1, 2)]
    with pytest.raises(InputError, match=r"no images of the part 'gallery'; left out: 2 of junk \(identity -1\)"):
        read_dataset(path, ("gallery",))
    some = manifest(tmp_path / "some.csv", "a.png,-1,-1,gallery", "b.png,4,2,gallery")
    assert labels(read_dataset(some, ("gallery",), unlabelled=True).gallery) == [("b.png", 4, 2)]
    bare = manifest(tmp_path / "bare.csv", "a.png", header="path")
    assert labels(read_dataset(bare, present_parts(bare, unlabelled=True), unlabelled=True).gallery) == [
        ("a.png", -1, -1)
    ]
    with pytest.raises(InputError, match="no column 'pid'"):
        read_dataset(bare, ("gallery",))


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    for name in ("frame_1.jpg", "0007_c2s1_000001_00.PNG", "notes.txt", "a.heic"):
        (tmp_path / name).touch()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.jpg").touch()
    folder, said = read(tmp_path, "gallery")
    assert labels(folder.gallery) == [("0007_c2s1_000001_00.PNG", 7, 2), ("frame_1.jpg", -1, -1)]
    assert "1 file is left out, pictures of a kind that is not read" in said[0]
    assert said[1] == f"{tmp_path}: images in folders within it are not read: more"
    with pytest.raises(InputError, match="no folder 'query'; the layout of Market-1501"):
        read_dataset(tmp_path, ("query", "gallery"))
