"""ONNX files: their descriptors are PyTorch's, at any batch size; and what is said where there can be none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("timm")
pytest.importorskip("typer")

from command_line import error, run
from drawn import SIZE, write_run

from apd import export
from apd.run import Run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With MSP, whose operator is this package's own."""
    return Run(write_run(tmp_path_factory.mktemp("run") / "tiny"))


@pytest.fixture(scope="module")
def onnx_file(made: Run) -> Path:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    path = made.path / "model.onnx"
    printed = run("export", made.path, "--output", path)
    assert f"wrote {path}" in printed
    return path


def described(path: Path, images: Tensor) -> np.ndarray:
    from onnxruntime import InferenceSession

    return InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"]).run(
        None, {"images": images.numpy()}
    )[0]


@pytest.mark.parametrize("batch", [1, 2, 3, 17])
def test_descriptors_are_those_of_the_run(made: Run, onnx_file: Path, batch: int) -> None:
    assert made.config.model.ssd == "sps"
    images = torch.rand(batch, 3, *SIZE, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        expected = made.load_model()(images).numpy()
    found = described(onnx_file, images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_metadata(made: Run, onnx_file: Path) -> None:
    import onnx

    model = onnx.load_from_string(onnx_file.read_bytes())
    onnx.checker.check_model(model, full_check=True)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["fingerprint"] == made.fingerprint()
    assert (metadata["height"], metadata["width"]) == tuple(map(str, SIZE))
    assert metadata["output"].endswith("class token (of a CNN: pooled map) before_bn")
    assert metadata["normalization"] == "inside the network"
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == export.OPSET
    assert not any(node.domain for node in model.graph.node)  # only ONNX's own operators
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param
    assert not batch.dim_value


def test_a_file_that_differs_is_not_written(made: Run, onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an exporter with a fault would make it: here of a network whose relevant part is the irrelevant one."""
    before = onnx_file.read_bytes()

    def exchanged(
        features: torch.Tensor, logits: list[torch.Tensor], backend: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        relevant = logits[0].sigmoid() * features
        return features - relevant, relevant

    monkeypatch.setattr(export, "_ssd_mask", exchanged)
    message = error("export", made.path, "--output", onnx_file)
    assert "differ from PyTorch's by" in message
    assert onnx_file.read_bytes() == before
    assert [path.name for path in made.path.glob("*.onnx")] == ["model.onnx"]


def test_errors(made: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--output" in error("export", made.path, "--output", tmp_path / "model.bin")
    monkeypatch.setattr(export, "_PACKAGES", ("torch", "no_such_package"))
    message = error("export", made.path, "--output", tmp_path / "model.onnx", code=1)
    assert "needs no_such_package: pip install 'apd-kernels[export]'" in message
