"""Files that are written and read: what is there already, what is left behind, and what is not what its name says."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import socket
import stat
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("faiss")

from command_line import error, run
from drawn import draw_data_set
from feature_files import draw_features, write
from readers import WHOLE

from apd import files
from apd.cli.common import reported
from apd.data import images
from apd.data.datasets.matlab import read_variable
from apd.data.images import load_image, within
from apd.data.market import read_market
from apd.errors import DataWarning, InputError, printable
from apd.files import check_destination, misfit, only_writer, replacing, write_text
from apd.retrieval import ranked_lists
from apd.retrieval.features import load_features, map_array
from apd.run import read_info
from apd.training.log import read_metrics
from apd_kernels import GalleryError

if os.name == "posix":
    import fcntl

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


@posix
def test_descriptors_are_written_to_where_they_stand(tmp_path: Path) -> None:
    """``/dev/stdout`` and what a shell puts for ``>(…)``: of a pipe no file of that name could be replaced."""
    reader, writer = os.pipe()
    write_text(Path(f"/dev/fd/{writer}"), "figures")
    assert os.read(reader, 100) == b"figures"
    with (tmp_path / "out").open("wb", buffering=0) as file:
        file.write(b"before ")
        write_text(Path(f"/dev/fd/{file.fileno()}"), "figures")
        file.write(b" after")
    assert (tmp_path / "out").read_bytes() == b"before figures after"
    for descriptor in (reader, writer):
        os.close(descriptor)


@posix
def test_a_secret_is_one_from_the_first_byte(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.touch(0o600)
    with replacing(secret) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600


@posix
def test_what_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    for name, target in (("loop", "loop"), ("dangling", "nowhere/x"), ("within", "file/x"), ("good", "new")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "file").touch()
    here = socket.socket(socket.AF_UNIX)
    here.bind(os.path.relpath(tmp_path / "socket"))  # such a name has 107 characters at most
    bad = {
        "loop": "symbolic links",
        "dangling": "no folder .*nowhere",
        "within": "Not a directory",
        "x" * 300: "too long",
    }
    bad |= {"socket": "cannot be written to", ".": "got a folder", "none/x": "no folder", "file/x": "Not a directory"}
    for name, message in bad.items():
        with pytest.raises(InputError, match=message):
            check_destination(tmp_path / name)
    here.close()
    for path in (tmp_path / "good", tmp_path / "file", tmp_path / ("x" * 255), Path(os.devnull), Path("/dev/stdout")):
        check_destination(path)


def test_the_longest_name_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250 + ".json")
    write_text(path, "{}")
    assert path.read_text() == "{}"


@posix
def test_drafts_of_killed_processes_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once; not the draft of one that is still writing, nor a file of somebody else."""
    others = [tmp_path / name for name in (".notes.tmp", ".0123456789abcdef.tmp")]
    for path in others:
        path.write_bytes(b"half")
    read, write = os.pipe()
    killed = os.fork()
    if not killed:
        with replacing(tmp_path / "never") as file:
            file.write(b"half")
            os.write(write, b"x")
            time.sleep(10)
            os._exit(0)
    os.read(read, 1)
    os.close(read)
    os.close(write)
    with replacing(tmp_path / "living") as file:
        file.write(b"x")
        monkeypatch.setattr(files, "_swept", set())
        write_text(tmp_path / "a", "a")
        assert len(list(tmp_path.glob(".apd-*"))) == 2
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        monkeypatch.setattr(files, "_swept", set())
        write_text(tmp_path / "a", "a")
        assert len(list(tmp_path.glob(".apd-*"))) == 1
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a", tmp_path / "living", *others])


@posix
@pytest.mark.parametrize("moment", ["listed", "made", "finished"])
def test_two_processes_write_and_sweep_a_folder(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts come and go in the middle of the other's sweep, and a sweep comes in the middle of any writing."""
    lock, replace, swept = fcntl.flock, os.replace, []

    def sweep() -> None:
        if not swept:
            swept.append(moment)
            monkeypatch.setattr(files, "_swept", set())
            files._sweep(tmp_path)

    def locked(file: Any, how: int) -> None:
        if moment == "made" and not how & fcntl.LOCK_NB:
            sweep()
        lock(file, how)

    def replaced(draft: Path, path: Path) -> None:
        if moment == "finished":
            sweep()
        replace(draft, path)

    if moment == "listed":
        monkeypatch.setattr(Path, "iterdir", lambda self: iter([self / ".apd-0123456789abcdef.tmp"]))
        swept.append(moment)
    monkeypatch.setattr(files.fcntl, "flock", locked)
    monkeypatch.setattr(files.os, "replace", replaced)
    write_text(tmp_path / "a", "a")
    assert swept == [moment]
    assert os.listdir(tmp_path) == ["a"]


@posix
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    draft = tmp_path / ".apd-0123456789abcdef.tmp"  # somebody may be writing it
    draft.write_bytes(b"half")
    with only_writer(tmp_path):
        write_text(tmp_path / "a", "a")
    assert sorted(os.listdir(tmp_path)) == [draft.name, "a"]


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
    with pytest.raises(InputError, match="expected a file, found a pipe, a device or a socket"):
        load_image(pipe, None)


@posix
@pytest.mark.parametrize("kind", WHOLE)
def test_a_pipe_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    name, _, read = WHOLE[kind]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((InputError, GalleryError)):
            read(path)


@contextmanager
def bounded() -> Iterator[None]:
    """Whatever waits is interrupted after 3 seconds, and then fails."""

    def interrupt(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 3, 0.2)
    began = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 3


def test_large_pictures_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All threads together: eight of 64 megapixels would take gigabytes."""
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path in paths:
        Image.new("RGB", (20, 20)).save(path)
    together: list[int] = []
    reading: list[Path] = []

    def slow(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        reading.append(tmp_path)
        together.append(len(reading))
        time.sleep(0.01)
        reading.pop()
        return np.zeros((*size, 3), np.uint8)

    monkeypatch.setattr(images, "_pixels", slow)
    for most, expected in ((399, {1}), (400, {1, 2, 3})):
        together.clear()
        monkeypatch.setattr(images, "_MANY_PIXELS", most)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda path: load_image(path, (2, 2)), paths))
        assert set(together) <= expected
    assert max(together) > 1


def test_a_picture_of_one_line(tmp_path: Path) -> None:
    Image.new("1", (30_000, 1)).save(tmp_path / "line.png")
    with pytest.raises(InputError, match=r"line.png: expected sides of at most 20,000 pixels, got 30000 × 1"):
        load_image(tmp_path / "line.png", (64, 32))


@pytest.mark.parametrize(
    ("name", "values", "columns"),
    [
        ("pids", np.zeros(3, "V1000"), ()),
        ("camids", np.zeros((3, 1000), int), ()),
        ("names", np.zeros(3, "U5000"), ()),
        ("features", np.zeros((3, 2), np.longdouble), ()),
        ("features", np.zeros(3), ()),
        ("colour", np.zeros((3, 100)), ["colour"]),
        ("colour", np.zeros(3, "U5000"), ["colour"]),
    ],
)
def test_arrays_are_refused_by_their_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, values: np.ndarray, columns: list[str]
) -> None:
    file = write(tmp_path / "f.npz", {"features": np.zeros((3, 2), np.float32), name: values})
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(InputError, match=name):
        load_features(file, columns)


def test_large_arrays_beside_the_features_stay_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another program, which has arrays of the names that say of a model what it is."""
    about = dict.fromkeys(("model", "fingerprint", "image_size", "flip_test"), np.zeros(1000))
    file = write(tmp_path / "f.npz", {"features": np.zeros((3, 2), np.float32), **about})
    unpacked = []
    found = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(
        np.lib.npyio.NpzFile, "__getitem__", lambda self, name: (unpacked.append(name), found(self, name))[1]
    )
    assert load_features(file).about == {}
    assert unpacked == ["features"]


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


@pytest.mark.parametrize("element", [b"\x0e\0\0\0\0\0\0\0", b"\x0f\0\0\0\x08\0\0\0" + zlib.compress(b"")])
def test_an_empty_array_of_matlab(tmp_path: Path, element: bytes) -> None:
    path = tmp_path / "m.mat"
    path.write_bytes(b" " * 124 + b"\0\1IM" + element)
    with pytest.raises(InputError, match=r"m\.mat: x: cut off or damaged"):
        read_variable(path, "x")


@pytest.mark.parametrize("content", ["[" * 5000, '{"a": ' * 5000, "[1]", "\x00", '"x"'])
def test_a_damaged_run_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json"):
        read_info(tmp_path)


@pytest.mark.parametrize("value", [None, 5, "x", [5], {"a": "x"}, {"a": []}, True])
@pytest.mark.parametrize("key", ["data", "contents", "threads", "trunk_choice", "seconds", "weights", "own_test"])
def test_values_of_another_kind_in_run_json(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / "run.json").write_text(json.dumps({key: value}))
    if (key, value) in [("threads", 5), ("trunk_choice", "x")] or (
        value == {"a": "x"} and key in ("contents", "weights")
    ):
        assert read_info(tmp_path) == {key: value}
        return
    with pytest.raises(InputError, match=rf"run\.json: {key}(\.a|\[0\])?: expected .*, got "):
        read_info(tmp_path)


@pytest.mark.parametrize(
    ("value", "shape", "found"),
    [
        ({"a": 1, "b": [1.5]}, {"a": int, "b": [float], "c?": str}, None),
        ({"a": 1}, {"a": int, "b": [float]}, "no 'b'"),
        ({"a": {"b": None}}, {"a": {...: (str, type(None))}}, None),
        ({"a": {"b": 1}}, {"a": {...: (str, type(None))}}, "a.b: expected text or nothing, got a whole number"),
        ([{"a": True}], [{"a": int}], "[0].a: expected a whole number, got true or false"),
        ({"x": object}, {"a?": int}, None),
        (float("inf"), float, "expected a number, got a number"),
        pytest.param(10**400, float, "expected a number, got a whole number", id="large"),
        ({}, [int], "expected a list, got keys with values"),
    ],
)
def test_shapes(value: object, shape: object, found: str | None) -> None:
    assert misfit(value, shape) == found


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


@posix
@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../b.png", "link/b.png", "a\0b", "link"])
def test_names_do_not_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="leads out of"):
        within(folder, name)
    (tmp_path / "other").symlink_to(folder)
    assert within(tmp_path / "other", "query/../a.png") == tmp_path / "other" / "query/../a.png"


def test_pictures_of_a_search_lie_in_their_folder(tmp_path: Path) -> None:
    """The names of a feature file, of its queries too; what they lead to would be embedded in the report."""
    arrays = draw_features(40)
    folder = tmp_path / "images"
    folder.mkdir()
    arrays["names"][arrays["split"] == 2] = "inside.png"
    Image.new("RGB", (8, 16)).save(folder / "inside.png")
    for names, split in (("../secret.png", 1), (str(tmp_path / "secret.png"), 2)):
        named = arrays["names"].astype("U300")
        named[arrays["split"] == 1] = "inside.png"
        named[arrays["split"] == split] = names
        file = write(tmp_path / "f.npz", arrays | {"names": named})
        run("index", "--features", file, "--output", tmp_path / f"g{split}")
        search = ("search", "--gallery", tmp_path / f"g{split}", "--features", file, "--data", folder)
        for option, path in (("--report", tmp_path / "r.html"), ("--picture", tmp_path / "p.png")):
            assert f"{names}: leads out of {folder}" in error(*search, option, path).replace("Error: ", "")
            assert not path.exists()
            run(*search, option, path, "--outside")
            assert path.is_file()
            path.unlink()


def test_names_of_folders_on_the_terminal(tmp_path: Path) -> None:
    """Neither a control sequence nor a line of their own, and no markup."""
    folder = draw_data_set(tmp_path / "a\x1b]0;title\x07\nnothing wrong[bold][")
    text = run("data", "check", folder)
    assert "a\\x1b]0;title\\x07\\nnothing wrong[bold][" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("name", ["=1", "＝1", "\n=1", "@x", "+1", "-1"])
def test_a_spreadsheet_runs_no_names(name: str) -> None:
    assert ranked_lists._quoted(name) == f"'{name}"
    assert ranked_lists._quoted(f"a{name}") == f"a{name}"


def test_commands_let_their_processes_import_nothing_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for before in (None, "x"):
        monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
        if before is not None:
            monkeypatch.setenv("PYTHONSAFEPATH", before)
        reported(lambda: seen.append(os.environ["PYTHONSAFEPATH"]))()
        assert os.environ.get("PYTHONSAFEPATH") == before
    assert seen == ["1", "1"]
