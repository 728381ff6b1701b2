"""The examples run as they are called, and what they print means what they say."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from places import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def output(example: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", example, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_example_is_run_here() -> None:
    assert [example.stem for example in EXAMPLES] == [
        "pair_losses",
        "rank_shards",
        "triplet_metric_perturb",
        "vit_ssd_mask",
    ]


def output_here(example: Path, *arguments: str) -> str:
    """As `output`, without the start of a process."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [str(example), *arguments])
        try:
            runpy.run_path(str(example), run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise
    return printed.getvalue()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_help(example: Path) -> None:
    assert "--help" in output_here(example, "--help")


def test_triplet_metric_perturb() -> None:
    """Both ways of training learn: chance is near 0.06."""
    (example,) = (example for example in EXAMPLES if example.stem == "triplet_metric_perturb")
    found = re.findall(r"(without|with) metric_perturb: mAP (\d\.\d+)", output(example))
    assert [name for name, _ in found] == ["without", "with"]
    assert all(float(mean) > 0.2 for _, mean in found)


def test_pair_losses() -> None:
    """Random rows: as they are in tests/apd_kernels/test_pairs.py, with a gradient."""
    (example,) = (example for example in EXAMPLES if example.stem == "pair_losses")
    found = re.findall(r"(\w+)_loss: \d\.\d+, gradient of norm (\d\.\d+)", output_here(example, "--images", "32"))
    assert [name for name, _ in found] == ["lifted_structured", "multi_similarity", "smooth_ap"]
    assert all(float(norm) > 0 for _, norm in found)


def test_vit_ssd_mask() -> None:
    """What is to carry identity learns it."""
    (example,) = (example for example in EXAMPLES if example.stem == "vit_ssd_mask")
    text = output(example)
    losses = [float(value) for value in re.findall(r"L_K (\d\.\d+)", text)]
    assert losses[-1] < losses[0]
    assert "descriptors at test: (32, " in text


def test_rank_shards(tmp_path: Path) -> None:
    """Pieces of another size are another gallery; the same files are used again."""
    (example,) = (example for example in EXAMPLES if example.stem == "rank_shards")
    arguments = ["--images", "5000", "--piece", "1900", "--folder", str(tmp_path)]
    first = output(example, *arguments)
    assert len(list(tmp_path.glob("piece_*.npy"))) == 6
    (mean,) = re.findall(r"5000 images: mAP (\d\.\d+)", first)
    assert float(mean) > 0.3
    assert re.findall(r"mAP .*;", output_here(example, *arguments)) == re.findall(r"mAP .*;", first)
    arguments[1] = "5500"  # the last piece is another one
    grown = output_here(example, *arguments)
    assert len(np.load(tmp_path / "piece_00003.npy")) == 5500 - 2 * 1900
    arguments[-1] = str(tmp_path / "new")
    assert re.findall(r"mAP .*;", output_here(example, *arguments)) == re.findall(r"mAP .*;", grown)
