"""Files that are written and read: what is there already, what is left behind, and what is not what its name says."""

from __future__ import annotations

import csv
import io
import os
import stat
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("faiss")

from command_line import error, run
from drawn import draw_data_set
from feature_files import draw_features, write

from apd import files
from apd.data.images import load_image, within
from apd.data.market import read_market
from apd.errors import DataWarning, InputError
from apd.files import printable, replacing, write_text
from apd.retrieval.features import load_features, map_array
from apd.run import read_info
from apd.training.log import read_metrics

posix = pytest.mark.skipif(os.name != "posix", reason="pipes, modes and links of POSIX")


# writing


@posix
def test_a_file_keeps_its_mode_and_a_link_is_followed(tmp_path: Path) -> None:
    secret, link = tmp_path / "secret.json", tmp_path / "link.json"
    secret.write_text("old")
    secret.chmod(0o600)
    link.symlink_to(secret)
    write_text(link, "new")
    assert link.is_symlink()
    assert secret.read_text() == "new"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


@posix
def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "figures")
        assert os.read(reader, 100) == b"figures"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]
    write_text(Path(os.devnull), "nothing")
    assert not Path(os.devnull).is_file()


def test_the_longest_name_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250 + ".json")
    write_text(path, "{}")
    assert path.read_text() == "{}"


@posix
def test_drafts_of_killed_processes_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in a process; not the draft of one that is still writing, nor a file with another name."""
    old, other, young = (tmp_path / name for name in (".a.npz.0123abcd.tmp", ".notes.tmp", ".0123456789abcdef.tmp"))
    for path in (old, other, young):
        path.write_bytes(b"half")
    long_ago = time.time() - 3600
    for path in (old, other):
        os.utime(path, (long_ago, long_ago))
    monkeypatch.setattr(files, "_swept", set())
    with replacing(tmp_path / "living") as file:
        file.write(b"x")
        (draft,) = (path for path in tmp_path.iterdir() if path.name.startswith(".") and path not in (other, young))
        os.utime(draft, (long_ago, long_ago))
        monkeypatch.setattr(files, "_swept", set())
        write_text(tmp_path / "b", "b")
        assert draft.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["b", "living", other.name, young.name])


# reading


@posix
@pytest.mark.filterwarnings("error::apd.errors.DataWarning")
def test_what_is_no_file_is_left_out_of_a_data_set(tmp_path: Path) -> None:
    folder = draw_data_set(tmp_path / "data")
    before = read_market(folder).query
    pipe, loop = (folder / "query" / f"0009_c1s1_00000{i}_00.jpg" for i in (1, 2))
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    with pytest.warns(DataWarning, match=r"query: 2 entries are no files .* left out: 0009_c1s1_000001_00.jpg, 0009"):
        assert read_market(folder).query == before
    with pytest.raises(InputError, match="expected a file, found a pipe or a device"):
        load_image(pipe, None)


def test_a_picture_of_one_line(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("1", (30_000, 1)).save(tmp_path / "line.png")
    with pytest.raises(InputError, match=r"line.png: expected sides of at most 20,000 pixels, got 30000 × 1"):
        load_image(tmp_path / "line.png", (64, 32))


def test_an_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """800 MB of zeros in 0.8 MB: of the wrong number of dimensions."""
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (200_000_000,)})
        with archive.open("features.npy", "w", force_zip64=True) as file:
            file.write(header.getvalue())
            for _ in range(100):
                file.write(bytes(8_000_000))
    start = time.process_time()
    with pytest.raises(InputError, match=r"features: expected floating point \(N, D\), got float32 \(200000000,\)"):
        load_features(path)
    assert time.process_time() - start < 0.5


DAMAGED = {
    "not at all": b"\x00\x01\x02" * 50,
    "header of a function": b"\x93NUMPY\x01\x00\x16\x00{'descr': print(1)}    \n",
    "unclosed header": b"\x93NUMPY\x01\x00\x16\x00{'descr': '<f4', (((((((\n",
    "negative shape": b"\x93NUMPY\x01\x00\x46\x00"
    + b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3, 2), }".ljust(69)
    + b"\n",
    "version": b"\x93NUMPY\x09\x00" + bytes(30),
    "nothing": b"",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
@pytest.mark.parametrize("read", [map_array, load_features, read_metrics, read_info], ids=lambda f: f.__name__)
def test_damage_is_one_line_that_names_the_file(tmp_path: Path, read: object, content: bytes) -> None:
    path = tmp_path / {"read_metrics": "metrics.csv", "read_info": "run.json"}.get(read.__name__, "file.npy")  # type: ignore[attr-defined]
    path.write_bytes(content)
    if read is read_metrics and not content:
        assert read_metrics(path) == []
        return
    with pytest.raises(InputError) as failure:
        read(tmp_path if read is read_info else path)  # type: ignore[operator]
    assert str(path) in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("content", ["[" * 5000, '{"a": ' * 5000, "[1]", "\x00", '"x"'])
def test_a_damaged_run_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json"):
        read_info(tmp_path)


@pytest.mark.parametrize("step", ["0x3", "²", "", "-1", "\x00", "9" * 200_000])
def test_a_damaged_metrics_csv(tmp_path: Path, step: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(f"stage,step\nsp,{step}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"metrics\.csv"):
        read_metrics(path)


# names


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nrank 1", "a\x07b", "a\u202eb", "a\udcffb"])
def test_names_do_not_reach_the_terminal_as_they_are(name: str) -> None:
    assert printable(name).isprintable()
    assert printable("Straße 7/人.jpg") == "Straße 7/人.jpg"


def test_names_of_a_feature_file_on_the_terminal_and_in_a_table(tmp_path: Path) -> None:
    arrays = draw_features()
    names = arrays["names"].astype("U60")
    names[arrays["split"] == 2] = "=cmd|' /C calc'!A1\x1b[2J"
    file = write(tmp_path / "f.npz", arrays | {"names": names})
    gallery = tmp_path / "g"
    run("index", "--features", file, "--output", gallery)
    text = run("search", "--gallery", gallery, "--features", file, "--output", tmp_path / "lists.csv")
    assert "\x1b[2J" not in text
    assert "\\x1b[2J" in text
    with (tmp_path / "lists.csv").open(newline="") as lines:
        assert all(row["name"].startswith("'=cmd") for row in csv.DictReader(lines))


def test_an_error_is_one_line(tmp_path: Path) -> None:
    message = error("evaluate", "--features", tmp_path / "a\nError: all is well\x1b[2J.npz")
    assert "\\nError: all is well\\x1b[2J.npz" in message


@pytest.mark.parametrize("name", ["../secret.png", "/data/../etc/passwd", "a/../../b.png"])
def test_names_do_not_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="leads out of"):
        within(tmp_path, name)
    assert within(tmp_path, "query/a.png") == tmp_path / "query" / "a.png"
