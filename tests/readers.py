"""Every reader of a file, with a whole file for it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from feature_files import draw_features
from PIL import Image
from places import ROOT
from safetensors.torch import save
from scipy.io import savemat

from apd.config.files import load_config
from apd.data.datasets.lists import read_manifest
from apd.data.datasets.matlab import read_variable
from apd.data.images import load_image
from apd.data.splits import read_splits
from apd.experiments.ablation.plan import load_plan
from apd.experiments.ablation.results import ResultFile
from apd.experiments.protocol_runs import _read_result
from apd.models.weights import load_weights
from apd.retrieval.features import load_features, map_array
from apd.retrieval.targets import Queries, load_queries, save_queries
from apd.run import load_tensors, read_info
from apd.training.checkpoint import load_checkpoint
from apd.training.log import read_metrics
from apd.training.synthesis import _forget_changed
from apd_kernels import Gallery


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
    "ablation": ("plan.yaml", (ROOT / "configs" / "ablation-cpu.yaml").read_bytes(), load_plan),
    "results": (
        "results.jsonl",
        b'{"row": "a", "seed": 0, "tests": '
        b'{"t": {"splits": "d", "rank-1": 0, "rank-5": 1, "rank-10": 1, "mAP": 0.5}}}\n',
        ResultFile,
    ),
    "splits": ("s.json", b'[{"query": ["a"], "gallery": ["b", "c"]}]', lambda path: read_splits(path, ["a", "b", "c"])),
    "protocol": (
        "r.json",
        b'{"weights": "w", "lists": null, "queries": 3, "left_out": 0, "splits": '
        b'[{"mAP": 0.5, "rank-1": 0, "rank-5": 1, "rank-10": 1}]}',
        lambda path: _read_result(path, {"weights": "w", "lists": None}),
    ),
    "sources": ("train.sources.json", b'{"0001_c1.jpg": "7-00000001"}', lambda path: _forget_changed(path, [], [])),
    "queries": ("q.npz", b"", lambda path: load_queries(path, ["t"])),
    "matlab": (
        "m.mat",
        _bytes(lambda file: savemat(file, {"x": {"a": np.arange(4.0), "b": [[1, 2], [3, 4]]}})),
        lambda path: read_variable(path, "x"),
    ),
    "matlab, packed": (
        "m.mat",
        _bytes(lambda file: savemat(file, {"x": np.array([1, np.eye(2)], object)}, do_compression=True)),
        lambda path: read_variable(path, "x"),
    ),
    "gallery": ("g/manifest.json", b"", lambda path: Gallery.load(path.parent, device="cpu")),
}


def write_whole(kind: str, folder: Path) -> Path:
    """The whole file of a kind, with what belongs to it."""
    name, content, _ = WHOLE[kind]
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if kind == "queries":
        save_queries(path, {"t": Queries(np.arange(3), np.ones(3, bool), np.ones(3))})
    elif kind == "gallery":
        gallery = Gallery(2)
        gallery.add(np.eye(2, dtype=np.float32), metadata={"name": np.array(["a", "b"])})
        gallery.save(path.parent)
    else:
        path.write_bytes(content)
    return path
