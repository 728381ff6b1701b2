"""Damaged files of every kind: each reader takes what it gets or says in one line what is wrong with the file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("faiss")
pytest.importorskip("timm")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import WHOLE, write_whole

from apd.errors import InputError
from apd_kernels import GalleryError

EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["flip", "cut", "repeat", "insert"]), st.binary(min_size=1, max_size=9)),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    for where, kind, inserted in edits:
        at = int(where * len(content))
        if kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ (inserted[0] or 1)]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "repeat":
            content = content[:at] + content[at : at + 40] * 2 + content[at + 40 :]
        else:
            content = content[:at] + inserted + content[at:]
    return content


# What a value in a JSON file may be instead.
OTHERS = st.sampled_from([None, 0, -1, 1e400, float("nan"), 2**70, True, "", "x", [], [1], {}, {"a": 1}])


def with_another_value(content: bytes, where: float, value: Any, removed: bool) -> bytes:
    """JSON in which something is replaced, or missing."""
    text = content.decode()
    lines = [json.loads(line) for line in text.splitlines()] if text.count("\n") == 1 else [json.loads(text)]
    places: list[tuple[Any, Any]] = [(lines, 0)]
    for held, key in places:  # grows
        inner = held[key]
        keys = inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        places += [(inner, one) for one in keys]
    held, key = places[int(where * (len(places) - 1))]
    if removed and isinstance(held, dict):
        del held[key]
    else:
        held[key] = value
    return "\n".join(map(json.dumps, lines)).encode()


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_files_are_read(tmp_path: Path, kind: str) -> None:
    WHOLE[kind][2](write_whole(kind, tmp_path))


bounded = settings(
    derandomize=True, max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read_damaged(kind: str, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            WHOLE[kind][2](path)
        except (InputError, GalleryError) as error:
            message = str(error)
            assert path.name in message or path.parent.name in message, message
            assert len(message) < 1000, message


@pytest.mark.parametrize("kind", WHOLE)
@given(edits=EDITS)
@bounded
def test_damage_is_an_input_error(tmp_path: Path, kind: str, edits: list[tuple[float, str, bytes]]) -> None:
    whole = tmp_path / "whole"  # written once for all examples
    if not whole.exists():
        whole.write_bytes(write_whole(kind, tmp_path).read_bytes())
    read_damaged(kind, tmp_path / WHOLE[kind][0], damaged(whole.read_bytes(), edits))


@pytest.mark.parametrize("kind", [kind for kind, (name, *_) in WHOLE.items() if ".json" in name and kind != "gallery"])
@given(where=st.floats(0, 1), value=OTHERS, removed=st.booleans())
@bounded
def test_other_values_are_an_input_error(tmp_path: Path, kind: str, where: float, value: Any, removed: bool) -> None:
    content = with_another_value(WHOLE[kind][1], where, value, removed)
    read_damaged(kind, tmp_path / WHOLE[kind][0], content)
