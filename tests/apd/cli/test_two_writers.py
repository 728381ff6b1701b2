"""Two commands on one folder: the later one says so in a line, and does nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("faiss")

from command_line import error, run
from feature_files import draw_features, write
from folder_lock import held
from tiny import TINY, draw_training_set

from apd.run import Run
from apd_kernels import Gallery

BUSY = "another process is writing to it; try again when it has ended"


def test_append(tmp_path: Path) -> None:
    arrays = draw_features()
    file, gallery = write(tmp_path / "f.npz", arrays), tmp_path / "gallery"
    run("index", "--features", file, "--output", gallery)
    before = Gallery.load(gallery, device="cpu").keys
    with held(gallery):
        assert f"{gallery}: {BUSY}" in error("index", "--features", file, "--output", gallery, "--append")
    assert np.array_equal(Gallery.load(gallery, device="cpu").keys, before)


def test_a_failed_index_leaves_no_folder(tmp_path: Path) -> None:
    error("index", "--features", tmp_path / "absent.npz", "--output", tmp_path / "gallery")
    assert not (tmp_path / "gallery").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--data", "absent"),
        ("synthesize", "--checkpoint", "absent", "--data", "absent"),
        ("demo",),
        ("ablate", "ablation-cpu", "--data", "absent", "--target", "absent"),
        ("protocol", "run", "P1"),
    ],
    ids=lambda command: command[0],
)
def test_before_any_work(command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even what is to be read is looked for."""
    monkeypatch.setattr("apd.experiments.protocols.locate", lambda *arguments: {})
    with held(tmp_path):
        assert f"{tmp_path}: {BUSY}" in error(*command, "--output", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_resume(tmp_path: Path) -> None:
    data = draw_training_set(tmp_path / "data")
    values = [*TINY, "perturbation=none", "model.ssd=none", "train.steps=1"]
    run("train", "--data", data, "--output", tmp_path / "run", "--device", "cpu", *values)
    before = Run(tmp_path / "run").fingerprint()
    with held(tmp_path / "run"):
        assert f"{tmp_path / 'run'}: {BUSY}" in error("train", "--resume", tmp_path / "run", "--device", "cpu")
    assert Run(tmp_path / "run").fingerprint() == before
