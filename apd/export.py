"""A run's describer as an ONNX file, for programs without PyTorch."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apd.errors import InputError
from apd.files import write_bytes
from apd.run import Run

OPSET = 18
TOLERANCE = 1e-4  # largest distance of a descriptor, whose length is 1, from PyTorch's
_CHECKED = (1, 5)  # batch sizes; it is traced with another one
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_INPUT, _OUTPUT = "images", "descriptors"


class Exported(NamedTuple):
    """What was written."""

    metadata: dict[str, str]
    difference: float  # the largest distance of a descriptor from PyTorch's that was found


def export_onnx(run: Run, path: Path, *, opset: int = OPSET) -> Exported:
    """Write what a run describes images with: one pass, of the relevant part.

    The file takes ``images``, float32 (B, 3, H, W), RGB in [0, 1], for any B, and gives ``descriptors``, float32
    (B, D) of length 1. The network's own normalization of the images is inside. What it was made from, and how images
    are to be given to it, is in its metadata. Before it is written, ONNX Runtime's descriptors are compared with
    PyTorch's at two batch sizes.

    Args:
        run: with a finished training.
        path: the ``.onnx`` file to write or replace in one step.
        opset: version of the ONNX operators, at least 18.

    Raises:
        ImportError: onnx, onnxruntime or onnxscript is not installed.
        InputError: the run has no weights, or the descriptors differ by more than `TOLERANCE`; then nothing is written.
    """
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"apd export needs {', '.join(missing)}: pip install 'apd-kernels[export]'")
    model = run.load_model()
    metadata = _metadata(run)
    content = _as_onnx(model, run.size, opset, metadata)
    difference = _largest_difference(content, model, run.size)
    if not difference <= TOLERANCE:  # NaN is none of them
        raise InputError(
            f"{run.path}: ONNX Runtime's descriptors differ from PyTorch's by {difference:.1e}, more than "
            f"{TOLERANCE:.0e}; no file is written"
        )
    write_bytes(path, content)
    return Exported(metadata, difference)


def _metadata(run: Run) -> dict[str, str]:
    height, width = run.size
    return {
        "run": run.name,
        "fingerprint": run.fingerprint(),
        "height": str(height),
        "width": str(width),
        "input": "float32 (B, 3, height, width), RGB in [0, 1], resized by a bicubic filter with antialiasing",
        "normalization": "inside the network",
        "output": f"float32 (B, D), of length 1; class token (of a CNN: pooled map) {run.config.model.descriptor}",
        "tolerance": f"{TOLERANCE:g}",
    }


def _as_onnx(model: nn.Module, size: tuple[int, int], opset: int, metadata: Mapping[str, str]) -> bytes:
    images = torch.zeros(2, 3, *size)  # a batch of 1 would be taken for a constant
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, on its own deprecated calls
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        # The package's operator has no counterpart in ONNX; its formula has.
        operator: Any = torch.ops.apd_kernels.ssd_mask.default
        program = program.run_decompositions({**torch.export.default_decompositions(), operator: _ssd_mask})
        exported = torch.onnx.export(
            program,
            (images,),
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            opset_version=opset,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert exported is not None
    proto = exported.model_proto
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString()


def _ssd_mask(features: Tensor, logits: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    """K and NK, as `apd_kernels.ssd_mask` defines them."""
    relevant = torch.stack([logit.sigmoid() for logit in logits]).mean(0) * features
    return relevant, features - relevant


@torch.no_grad()
def _largest_difference(content: bytes, model: nn.Module, size: tuple[int, int]) -> float:
    from onnxruntime import InferenceSession

    session = InferenceSession(content, providers=["CPUExecutionProvider"])
    random = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch in _CHECKED:
        images = torch.rand(batch, 3, *size, generator=random)
        (found,) = session.run([_OUTPUT], {_INPUT: images.numpy()})
        expected = model(images)
        if found.shape != expected.shape:
            return float("inf")
        distances = (torch.from_numpy(found) - expected).norm(dim=1)
        largest = float(torch.cat([distances, torch.tensor([largest])]).max())
    return largest
