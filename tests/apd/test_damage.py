"""Damaged files of every kind: each reader takes what it gets or says in one line what is wrong with the file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
pytest.importorskip("faiss")
pytest.importorskip("timm")

from feature_files import draw_features
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from apd.config.files import load_config
from apd.data.datasets.lists import read_manifest
from apd.data.images import load_image
from apd.errors import InputError
from apd.models.weights import load_weights
from apd.retrieval.features import load_features, map_array
from apd.run import load_tensors, read_info
from apd.training.checkpoint import load_checkpoint
from apd.training.log import read_metrics


def _bytes(write: Callable[[io.BytesIO], Any]) -> bytes:
    content = io.BytesIO()
    write(content)
    return content.getvalue()


NETWORK = torch.nn.Linear(2, 3)
WHOLE: dict[str, tuple[str, bytes, Callable[[Path], Any]]] = {
    "features": ("f.npz", _bytes(lambda file: np.savez(file, **draw_features(12, 3))), load_features),
    "array": ("f.npy", _bytes(lambda file: np.save(file, np.ones((3, 2), np.float32))), map_array),
    "run.json": ("run.json", b'{"seconds": {"sp": 1.5}, "data": ["a"]}', lambda path: read_info(path.parent)),
    "metrics": ("metrics.csv", b"stage,step,loss\nsp,10,1.5\nsp,20,1.25\n", read_metrics),
    "manifest": (
        "m.csv",
        b"path,pid,camid,split\na.jpg,1,1,query\nb.jpg,1,2,gallery\n",
        lambda path: read_manifest(path, ["query", "gallery"]),
    ),
    "configuration": ("c.yaml", b"seed: 3\ntrain:\n  lr: 0.1\n  steps: none\n", load_config),
    "tensors": ("t.safetensors", save({"a": torch.ones(2, 3)}), load_tensors),
    "checkpoint": (
        "last/sp-00000002.pt",
        _bytes(lambda file: torch.save({"stage": "sp", "step": 2, "model": {"a": torch.ones(3)}}, file)),
        lambda path: load_checkpoint(path.parent.parent, "sp"),
    ),
    "weights": (
        "w.pth",
        _bytes(lambda file: torch.save(NETWORK.state_dict(), file)),
        lambda path: load_weights(torch.nn.Linear(2, 3), path, "model.pretrained"),
    ),
    "image": (
        "i.png",
        _bytes(lambda file: Image.new("RGB", (9, 7), (1, 2, 3)).save(file, "PNG")),
        lambda path: load_image(path, (8, 4)),
    ),
}
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


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_files_are_read(tmp_path: Path, kind: str) -> None:
    name, content, read = WHOLE[kind]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    read(path)


@pytest.mark.parametrize("kind", WHOLE)
@given(edits=EDITS)
@settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_an_input_error(tmp_path: Path, kind: str, edits: list[tuple[float, str, bytes]]) -> None:
    name, content, read = WHOLE[kind]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(damaged(content, edits))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(path)
        except InputError as error:
            message = str(error)
            assert path.name in message or path.parent.name in message, message
