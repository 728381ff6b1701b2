"""Losses on centres and centroids against other projects' outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from conftest import Backend
from oracle import assert_close, leaf
from test_golden import Case, _agree, _golden, _kinds, _tensor
from torch import Tensor

from apd_kernels import (
    ClusterMemory,
    paired_distance,
    pairwise_distance,
    supervised_contrastive_loss,
)


def test_alignment_and_uniformity(real_data: Path, backend: Backend) -> None:
    """BAU's three losses from our distances: value and gradients."""
    for case, arrays in _golden(real_data, "bau_align_uniform_domain", backend):
        y, dids, of_centres = (_tensor(arrays[name], backend) for name in ("y", "dids", "center_domains"))
        for dtype, relative in _kinds(backend):
            weak, strong = (leaf(torch.from_numpy(arrays[name]), backend.device, dtype) for name in ("f_w", "f_s"))
            weight, centres = (_tensor(arrays[name], backend, dtype) for name in ("weight", "centers"))
            what = f"{case} {dtype}"
            share = weight * (y[:, None] == y)
            aligned = (pairwise_distance(strong, weak, metric="sqeuclidean") * share).sum() / share.sum()
            aligned.backward()
            assert_close(aligned, torch.from_numpy(np.asarray(arrays["align_f64"])), relative, what)
            for leaf_, name in ((weak, "f_w"), (strong, "f_s")):
                assert_close(leaf_.grad, torch.from_numpy(arrays[f"align_grad_{name}_f64"]), 10 * relative, what)

            x = leaf(torch.from_numpy(arrays["f_w"]), backend.device, dtype)
            i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
            uniform = (-2 * pairwise_distance(x, metric="sqeuclidean")[i, j]).exp().mean().log()
            _agree_named(uniform, x, arrays, "uniform", relative, what)

            x = leaf(torch.from_numpy(arrays["f_w"]), backend.device, dtype)
            d = pairwise_distance(x, centres, metric="sqeuclidean").masked_fill(dids[:, None] != of_centres, torch.inf)
            nearest = d.topk(len(x) + 1, largest=False).values[:, 1:]
            _agree_named((-2 * nearest).exp().mean().log(), x, arrays, "domain", relative, what)


def _agree_named(loss: Tensor, x: Tensor, arrays: Case, name: str, relative: float, what: str) -> None:
    found = {"loss_f64": arrays[f"{name}_f64"], "grad_f64": arrays[f"{name}_grad_f64"]}
    _agree(loss, x, found, "", relative, f"{name} {what}")


def test_distance_to_the_own_centre(real_data: Path, backend: Backend) -> None:
    """The center loss, from paired distances; its clamp adds 1e-12 for every other class."""
    for case, arrays in _golden(real_data, "strongbaseline_CenterLoss", backend):
        labels = _tensor(arrays["labels"], backend)
        for dtype, relative in _kinds(backend):
            x, centres = (leaf(torch.from_numpy(arrays[of]), backend.device, dtype) for of in ("embeddings", "centers"))
            loss = paired_distance(x, centres[labels], metric="sqeuclidean").mean() + 1e-12 * (len(centres) - 1)
            _agree(loss, x, arrays, "", relative, f"{case} {dtype}")
            assert_close(centres.grad, torch.from_numpy(arrays["grad_centers_f64"]), 10 * relative, case)


def test_hard_cluster_memory(real_data: Path, backend: Backend) -> None:
    """Cluster Contrast's hard form: its loss is that of the other form, and the memory moves in the backward pass, by
    the sample of each identity that is least similar to its centroid."""
    compared = 0
    for case, arrays in _golden(real_data, "clustercontrast_ClusterMemory", backend, "hard1"):
        for dtype, relative in _kinds(backend):
            relative = max(relative, 1e-7)  # the other side keeps its momentum in float32
            before = _tensor(arrays["features_before"], backend)
            options = {"momentum": float(arrays["momentum"]), "hardest": True, "dtype": dtype, "device": backend.device}
            memory = ClusterMemory(*before.shape, **options)
            memory.centroids.copy_(before)
            memory.valid.fill_(True)
            for step in (1, 2):
                x = leaf(torch.from_numpy(arrays[f"inputs{step}"]), backend.device, dtype)
                labels, rows = _tensor(arrays[f"targets{step}"], backend), F.normalize(x)
                memory.update_in_backward(rows, labels)
                loss = supervised_contrastive_loss(
                    rows, labels, *memory.rows(), metric="dot", temperature=float(arrays["temp"])
                )
                found = {f"{key}_f64": arrays[f"{key}{step}_f64"] for key in ("loss", "grad")}
                _agree(loss, x, found, "", relative, f"{case} step {step}")
                assert_close(memory.centroids, torch.from_numpy(arrays[f"features_after{step}_f64"]), relative, case)
        compared += 1
    assert compared == (1 if backend.interpreted else 3)
