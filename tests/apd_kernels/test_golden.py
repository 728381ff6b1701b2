"""Outputs of other Re-ID code bases on seeded data, file by file, from their own float64 runs.

Where a code base means something else by a name, the comparison converts, and its comments say how. float32, on
PyTorch and in the kernels, is held against the same float64 outputs, since the stored embeddings are float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from golden_files import OTHERS
from oracle import assert_close, leaf
from places import TESTS
from torch import Tensor

from apd_kernels import (
    CrossBatchMemory,
    Pairing,
    batch_hard,
    circle_loss,
    cosface_loss,
    pairwise_distance,
    triplet_loss,
    weighted_pairs,
)

# Every file on distances, mining, losses and memories, and the tests that compare it.
COMPARED = {
    "bau_MemoryBank_momentum_update": ("test_memory.py::test_golden_centroids",),
    "bau_SoftTripletLoss": ("test_golden.py::test_soft_triplet",),
    "bau_TripletLoss": (
        "test_golden.py::test_batch_hard_triplet",
        "test_losses.py::test_triplet_equals_other_projects",
    ),
    "bau_align_uniform_domain": ("test_golden_centres.py::test_alignment_and_uniformity",),
    "bau_batch_hard": ("test_golden.py::test_bau_mining",),
    "bau_pairwise_distance": ("test_golden.py::test_distances",),
    "clipreid_SupConLoss": ("test_contrastive.py::test_contrastive_loss_equals_clip_reid",),
    "clustercontrast_ClusterMemory": (
        "test_golden_centres.py::test_hard_cluster_memory",
        "test_memory.py::test_golden_centroids",
        "test_contrastive.py::test_cross_entropy_of_a_memory_equals_cluster_contrast",
    ),
    "fastreid_compute_cosine_distance": ("test_golden.py::test_distances",),
    "fastreid_compute_euclidean_distance": ("test_golden.py::test_distances",),
    "fastreid_pairwise_circleloss": ("test_contrastive.py::test_circle_loss_equals_other_projects",),
    "fastreid_pairwise_cosface": ("test_golden.py::test_cosface",),
    "fastreid_triplet_loss": (
        "test_golden.py::test_batch_hard_triplet",
        "test_golden.py::test_weighted_triplet",
        "test_weighting.py::test_weights_have_the_gradient_of_fast_reid",
    ),
    "fastreid_weighted_example_mining": (
        "test_golden.py::test_fast_reid_mining",
        "test_weighting.py::test_weighted_mining_equals_fast_reid",
    ),
    "metabin_triplet_loss": ("test_golden.py::test_triplet_within_and_across_domains",),
    "pml_BatchHardMiner": ("test_golden.py::test_pml_mining",),
    "pml_CircleLoss": ("test_contrastive.py::test_circle_loss_equals_other_projects",),
    "pml_ContrastiveLoss": ("test_golden.py::test_pairs_with_margins",),
    "pml_CrossBatchMemory": ("test_golden.py::test_losses_against_a_queue", "test_memory.py::test_golden_queue"),
    "pml_TripletMarginLoss": ("test_golden.py::test_mean_over_active_triplets",),
    "strongbaseline_CenterLoss": ("test_golden_centres.py::test_distance_to_the_own_centre",),
    "strongbaseline_TripletLoss": (
        "test_golden.py::test_batch_hard_triplet",
        "test_losses.py::test_triplet_equals_other_projects",
    ),
    "torchreid_TripletLoss": (
        "test_golden.py::test_batch_hard_triplet",
        "test_losses.py::test_triplet_equals_other_projects",
    ),
    "torchreid_compute_distance_matrix_cosine": ("test_golden.py::test_distances",),
    "torchreid_compute_distance_matrix_euclidean": ("test_golden.py::test_distances",),
    "transreid_TripletLoss": (
        "test_golden.py::test_batch_hard_triplet",
        "test_losses.py::test_triplet_equals_other_projects",
    ),
    "transreid_cosine_similarity": ("test_golden.py::test_distances",),
    "transreid_euclidean_distance": ("test_golden.py::test_distances",),
    "transreid_hard_example_mining": ("test_golden.py::test_transreid_mining",),
}
Case = dict[str, np.ndarray]


def test_every_file_is_compared(real_data: Path) -> None:
    """No file of the folder is left out, and the tests named above exist."""
    names = {path.stem for path in (real_data / "golden").glob("*.npz")}
    here = {name for name in names if not re.fullmatch(OTHERS, name.partition("_")[2])}
    assert here == COMPARED.keys()
    for file, test in {tuple(test.split("::")) for tests in COMPARED.values() for test in tests}:
        assert f"def {test}(" in next(TESTS.rglob(file)).read_text()


def _golden(folder: Path, name: str, backend: Backend, prefix: str = "") -> Iterator[tuple[str, Case]]:
    """The cases of a file; in the interpreter, which is slow, one with unequal counts where there is one."""
    with np.load(folder / "golden" / f"{name}.npz", allow_pickle=False) as file:
        cases = [str(case) for case in file["cases"] if case.startswith(prefix)]
        if backend.interpreted:
            cases = [case for case in cases if case.startswith("unequal")][:1] or cases[:1]
        for case in cases:
            yield case, {key.removeprefix(f"{case}__"): file[key] for key in file.files if key.startswith(f"{case}__")}


def _tags(arrays: Case, backend: Backend, suffix: str = "") -> list[str]:
    """The arguments with which the loss was taken; two of them in the interpreter."""
    tags = [key.removeprefix("loss").removesuffix("_f64") for key in arrays if re.fullmatch(f"loss.*{suffix}_f64", key)]
    return tags[:: (len(tags) + 1) // 2] if backend.interpreted else tags


def _kinds(backend: Backend) -> list[tuple[torch.dtype, float]]:
    """The dtypes to take and the relative error to allow."""
    return [(torch.float32, 1e-5)] if backend.name == "triton" else [(torch.float64, 1e-8), (torch.float32, 1e-5)]


def _tensor(array: np.ndarray, backend: Backend, dtype: torch.dtype | None = None) -> Tensor:
    return torch.from_numpy(np.asarray(array)).to(device=backend.device, dtype=dtype)


def _agree(loss: Tensor, x: Tensor, arrays: Case, tag: str, relative: float, case: str, floor: float = 0.0) -> None:
    """Value and, where one is stored, gradient; `floor` is what the other side is known to be off by."""
    what = f"{case} {tag}"
    loss.backward()
    expected, gradient = (arrays.get(f"{name}{tag}_f64") for name in ("loss", "grad"))
    assert_close(loss, torch.from_numpy(np.asarray(expected)), relative, what, scale=floor / relative)
    if gradient is not None:
        assert_close(
            x.grad, torch.from_numpy(gradient), 10 * relative, f"gradient of {what}", scale=floor / len(x) / relative
        )


def _alone(labels: Tensor) -> bool:
    """Whether an identity has a single row."""
    return bool((labels.unique(return_counts=True)[1] == 1).any())


# The clamp of squares at 1e-12 in most code bases makes a distance of 0 one of 1e-6.
CLAMP = 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "bau_pairwise_distance",
        "fastreid_compute_cosine_distance",
        "fastreid_compute_euclidean_distance",
        "torchreid_compute_distance_matrix_cosine",
        "torchreid_compute_distance_matrix_euclidean",
        "transreid_cosine_similarity",
        "transreid_euclidean_distance",
    ],
)
def test_distances(real_data: Path, backend: Backend, name: str) -> None:
    """What the other code bases call Euclidean is its square here; a cosine similarity is the angle in TransReID."""
    metric = "cosine" if "cosine" in name else "sqeuclidean"
    for case, arrays in _golden(real_data, name, backend):
        for dtype, relative in _kinds(backend):
            x, y = (_tensor(arrays[side], backend, dtype) for side in "xy")
            found = pairwise_distance(x, y, metric=metric)
            if name == "transreid_cosine_similarity":
                found = (1 - found).clamp(-1 + 1e-5, 1 - 1e-5).arccos()
            expected = torch.from_numpy(arrays["ref64"])
            if name == "transreid_cosine_similarity" and dtype == torch.float32:  # arccos magnifies rounding near 1
                found, expected = found.cos(), expected.cos()
            assert_close(found, expected, relative, f"{case} {dtype}", scale=1.0)
            if dtype == torch.float32 and name != "transreid_cosine_similarity":
                # Away from the origin squares cancel in their float32, by up to 0.03; ours are centred.
                relative = 3e-2 / expected.max().item() if case == "large_norm_offset" else relative
                assert_close(found, torch.from_numpy(arrays["dist"]), relative, f"their float32 {case}", scale=1.0)


def _normalised(x: Tensor) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + 1e-12)


def _options(tag: str) -> tuple[float | None, float, bool]:
    """Margin (None: soft), hard factor and whether rows are normalised."""
    margin = re.search(r"_m([\d.]+|None)", tag)
    factor = re.search(r"_hf([\d.]+)", tag)
    assert margin is not None
    value = None if margin[1] == "None" else float(margin[1])
    if "_hard" in tag and value == 0:  # fast-reid's soft margin
        value = None
    return value, float(factor[1]) if factor else 0.0, "normfeat" in tag or "_norm1" in tag


def _term(gap: Tensor, margin: float | None) -> Tensor:
    return F.softplus(gap) if margin is None else (gap + margin).clamp(min=0)


@pytest.mark.parametrize("name", ["torchreid", "bau", "strongbaseline", "transreid", "fastreid"])
def test_batch_hard_triplet(real_data: Path, backend: Backend, name: str) -> None:
    """With the batch as y too, an anchor is its own positive, as there; gradients of both sides add up in one leaf."""
    for case, arrays in _golden(
        real_data, f"{name}_{'triplet_loss' if name == 'fastreid' else 'TripletLoss'}", backend
    ):
        labels = _tensor(arrays["labels"], backend)
        floor = CLAMP if _alone(labels) or case == "ties_integer" else 0.0
        for tag in _tags(arrays, backend, "hard1" if name == "fastreid" else ""):
            margin, factor, normalised = _options(tag)
            for dtype, relative in _kinds(backend):
                x = leaf(torch.from_numpy(arrays["embeddings"]), backend.device, dtype)
                rows = _normalised(x) if normalised else x
                # A cosine distance of fast-reid is 2 − 2 cos.
                metric = "sqeuclidean" if normalised and name == "fastreid" else "euclidean"
                stored = [key for key in (f"dist_ap{tag}_f64", f"dist_an{tag}_f64") if key in arrays]
                if stored:
                    far, near = (d.clamp(min=CLAMP) for d in batch_hard(rows, labels, rows, labels).distances)
                    far, near = far * (1 + factor), near * (1 - factor)
                    for ours, key in zip((far, near), stored, strict=True):
                        assert_close(ours, torch.from_numpy(arrays[key]), relative, f"{key} of {case}")
                if factor:
                    loss = _term(far - near, margin).mean()
                else:
                    loss = triplet_loss(rows, labels, rows, labels, margin=margin, metric=metric)
                _agree(loss, x, arrays, tag, relative, f"{case} {dtype}", floor)


def test_soft_triplet(real_data: Path, backend: Backend) -> None:
    """BAU's margin is a share of smoothing in the cross-entropy of (d_p, d_n)."""
    for case, arrays in _golden(real_data, "bau_SoftTripletLoss", backend):
        labels = _tensor(arrays["labels"], backend)
        for tag in _tags(arrays, backend):
            share, _, _ = _options(tag)
            for dtype, relative in _kinds(backend):
                x = leaf(torch.from_numpy(arrays["embeddings"]), backend.device, dtype)
                positive, negative = batch_hard(x, labels, x, labels).distances
                loss = share * F.softplus(negative - positive) + (1 - share) * F.softplus(positive - negative)
                _agree(loss.mean(), x, arrays, tag, relative, f"{case} {dtype}", CLAMP * _alone(labels))


def test_bau_mining(real_data: Path, backend: Backend) -> None:
    """Distances, winners and their indices; an anchor alone in its identity wins itself."""
    for case, arrays in _golden(real_data, "bau_batch_hard", backend):
        labels = _tensor(arrays["labels"], backend)
        for dtype, relative in _kinds(backend):
            x = _tensor(arrays["embeddings"], backend, dtype)
            found = batch_hard(x, labels, x, labels)
            for ours, theirs in zip(
                (*found.distances, *found.indices), ("p", "n", "p_indice", "n_indice"), strict=True
            ):
                expected = torch.from_numpy(arrays[f"hard_{theirs}_f64"])
                if theirs.endswith("indice"):
                    assert torch.equal(ours.cpu(), expected), f"{theirs} of {case} {dtype}"
                else:
                    assert_close(ours.clamp(min=CLAMP), expected, relative, f"{theirs} of {case} {dtype}")
            for metric, key in (("euclidean", "dist"), ("cosine", "cosine_dist")):
                _matrix_agrees(x, metric, arrays[f"{key}_f64"], relative, f"{metric} of {case}")


def _matrix_agrees(x: Tensor, metric: str, expected: np.ndarray, relative: float, what: str, factor: float = 1) -> None:
    """Root distances are compared as squares, which is where the rounding of a small one shows at its size."""
    found, expected = pairwise_distance(x, metric=metric) * factor, torch.from_numpy(expected)
    power = 2 if metric == "euclidean" else 1
    assert_close(found**power, expected**power, relative, what, scale=1.0)


def test_transreid_mining(real_data: Path, backend: Backend) -> None:
    """Its cosine distance is (1 − cos) / 2."""
    for case, arrays in _golden(real_data, "transreid_hard_example_mining", backend):
        labels = _tensor(arrays["labels"], backend)
        for dtype, relative in _kinds(backend):
            x = _tensor(arrays["embeddings"], backend, dtype)
            for metric, factor in (("euclidean", 1.0), ("cosine", 0.5)):
                found = batch_hard(x, labels, x, labels, metric=metric)
                for ours, indices, which in zip(found.distances, found.indices, "pn", strict=True):
                    what = f"{metric} {which} of {case} {dtype}"
                    expected = torch.from_numpy(arrays[f"{metric}_a{which}"])
                    assert_close(factor * ours, expected, relative, what)
                    assert torch.equal(indices.cpu(), torch.from_numpy(arrays[f"{metric}_{which}_inds"])), what
                _matrix_agrees(x, metric, arrays[f"{metric}_dist_f64"], relative, f"{metric} of {case}", factor)


def test_fast_reid_mining(real_data: Path, backend: Backend) -> None:
    """Its cosine distance is 2 − 2 cos, as the squares of unit rows. (Its weighted means: test_weighting.py.)"""
    for case, arrays in _golden(real_data, "fastreid_weighted_example_mining", backend):
        labels = _tensor(arrays["labels"], backend)
        for dtype, relative in _kinds(backend):
            x = _tensor(arrays["embeddings"], backend, dtype)
            for metric, factor, least in (("euclidean", 1.0, CLAMP), ("cosine", 2.0, 0.0)):
                found = batch_hard(x, labels, x, labels, metric=metric)
                for ours, which in zip(found.distances, ("ap", "an"), strict=True):
                    expected = torch.from_numpy(arrays[f"{metric}_hard_{which}_f64"])
                    what = f"{metric} {which} of {case} {dtype}"
                    assert_close((factor * ours).clamp(min=least), expected, relative, what)
                _matrix_agrees(x, metric, arrays[f"{metric}_dist_f64"], relative, f"{metric} of {case}", factor)


def test_pml_mining(real_data: Path, backend: Backend) -> None:
    """Anchors with both a positive and a negative, in order; also against other rows."""
    for case, arrays in _golden(real_data, "pml_BatchHardMiner", backend):
        labels, y_labels = (_tensor(arrays[name], backend) for name in ("labels", "ref_labels"))
        for dtype, _ in _kinds(backend):
            x, y = (_tensor(arrays[name], backend, dtype) for name in ("embeddings", "ref_emb"))
            for key, found in (
                ("default_lp_normalised", batch_hard(F.normalize(x), labels)),
                ("lp_unnormalised", batch_hard(x, labels)),
                ("cosine", batch_hard(x, labels, metric="cosine")),
                ("lp_power2", batch_hard(F.normalize(x), labels, metric="sqeuclidean")),
                ("ref", batch_hard(F.normalize(x), labels, F.normalize(y), y_labels)),
            ):
                chosen = (found.valid.nonzero()[:, 0], *(index[found.valid] for index in found.indices))
                for ours, which in zip(chosen, "apn", strict=True):
                    assert torch.equal(ours.cpu(), torch.from_numpy(arrays[f"{key}_{which}"])), f"{key} {which} {case}"


def _weight_sums(d: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Σ exp(d − max d) over positives and Σ exp(−d) over negatives, to which fast-reid and MetaBIN add 1e-6."""
    farthest = d.masked_fill(~positive, 0).amax(1, keepdim=True)
    return ((d - farthest).exp() * positive).sum(1), ((-d).exp() * negative).sum(1)


def test_weighted_triplet(real_data: Path, backend: Backend) -> None:
    """fast-reid's loss without hard mining: the same within its 1e-6, and exactly where its 1e-6 is put back.

    That 1e-6 is next to a sum of exp(−d), so its negative distance vanishes at large distances; ours does not. The
    files hold moderate distances.
    """
    for case, arrays in _golden(real_data, "fastreid_triplet_loss", backend):
        labels = _tensor(arrays["labels"], backend)
        same = labels[:, None] == labels
        for tag in _tags(arrays, backend, "hard0"):
            margin, _, normalised = _options(tag)
            metric = "sqeuclidean" if normalised else "euclidean"
            for dtype, relative in _kinds(backend):
                if case == "pk_near_duplicates" and dtype == torch.float32 and not normalised:
                    continue  # distances of 1e-4 from products, theirs and ours, are rounding, and so is their gradient
                what = f"{case} {dtype}"
                # An anchor's distance to itself comes from a product here: rounding in place of 0 or of their 1e-6.
                itself = 0.0 if normalised else CLAMP if dtype == torch.float64 else 1e-4
                x = leaf(torch.from_numpy(arrays["embeddings"]), backend.device, dtype)
                rows = _normalised(x) if normalised else x
                sums = _weight_sums(pairwise_distance(rows, metric=metric), same, ~same)
                added = max((4e-6 / of.min()).item() for of in sums)
                loss = triplet_loss(rows, labels, rows, labels, margin=margin, mining="weighted", metric=metric)
                _agree(loss, x, arrays, tag, relative, what, itself + added)

                x.grad = None
                rows = _normalised(x) if normalised else x
                sums = _weight_sums(pairwise_distance(rows, metric=metric), same, ~same)
                found = weighted_pairs(rows, labels, rows, labels, metric=metric).distances
                far, near = (ours * of / (of + 1e-6) for ours, of in zip(found, sums, strict=True))
                _agree(_term(far - near, margin).mean(), x, arrays, tag, relative, f"converted {what}", itself)


def _rules(flags: str, labels: Tensor, domains: Tensor) -> tuple[Tensor, dict[str, Any]] | None:
    """What MetaBIN's flags (same identity, others in the domain, other domains) are here, for rows that are x and y.

    There an anchor is always its own positive, and every identity is in one domain. None: no rules say that.
    """
    each = torch.arange(len(labels), device=labels.device)
    return {
        "p100_n011": (labels, {}),
        "p100_n001": (labels, {"negatives": "across", "domains": domains, "y_domains": domains}),
        "p100_n010": (labels, {"negatives": "within", "domains": domains, "y_domains": domains}),
        "p110_n001": (domains, {}),
        "p000_n011": (labels, {"positives": "within", "domains": each, "y_domains": each}),  # only itself is within
        "p010_n100": None,  # farther from its own identity than from others
    }[flags]


def _flagged(flags: str, labels: Tensor, domains: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of the flags, (N, N)."""
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    same, within = labels[:, None] == labels, domains[:, None] == domains
    kinds = (same & ~itself, within & ~same, ~within)
    positive, negative = (
        sum((kind for kind, flag in zip(kinds, of, strict=True) if flag == "1"), torch.zeros_like(itself))
        for of in (flags[1:4], flags[6:9])
    )
    return positive | itself, negative


def test_triplet_within_and_across_domains(real_data: Path, backend: Backend) -> None:
    """MetaBIN's losses, hard and weighted, as domain rules; one set of flags from the distances of all pairs."""
    for case, arrays in _golden(real_data, "metabin_triplet_loss", backend):
        labels, domains = (_tensor(arrays[name], backend) for name in ("labels", "domain_labels"))
        for tag in _tags(arrays, backend):
            flags = re.search(r"p\d{3}_n\d{3}", tag)
            named = flags[0] if flags else "p100_n011"
            masks, rules = _flagged(named, labels, domains), _rules(named, labels, domains)
            margin: float | None = float(tag.split("_")[1][1:])
            margin = None if margin == 0 and "logistic" in tag else margin
            metric, hard = "cosine" if "cosine" in tag else "euclidean", "hard1" in tag
            for dtype, relative in _kinds(backend):
                what = f"{case} {dtype}"
                x = leaf(torch.from_numpy(arrays["embeddings"]), backend.device, dtype)
                rows = _normalised(x) if "norm1" in tag else x
                d = pairwise_distance(rows, metric=metric)
                # As in fast-reid: 1e-6 in place of 0, and 1e-6 beside the weights.
                floor = CLAMP if metric == "euclidean" and (_alone(labels) or not hard or named == "p000_n011") else 0.0
                if not hard:
                    floor = 1e-4 if floor and dtype == torch.float32 else floor
                    floor += max((4e-6 / of.min()).item() for of in _weight_sums(d.detach(), *masks))
                if rules is not None:
                    of, options = rules
                    options = {"mining": "hard" if hard else "weighted", "metric": metric, **options}
                    loss = triplet_loss(rows, of, rows, of, margin=margin, **options)
                elif hard:
                    far, near = d.masked_fill(~masks[0], -torch.inf), d.masked_fill(~masks[1], torch.inf)
                    loss = _term(far.amax(1) - near.amin(1), margin).mean()
                else:
                    far, near = (
                        (sign * d).masked_fill(~of, -torch.inf).softmax(1) * d
                        for sign, of in zip((1, -1), masks, strict=True)
                    )
                    loss = _term(far.sum(1) - near.sum(1), margin).mean()
                _agree(loss, x, arrays, tag, relative, what, floor)


def _mean_active(terms: Tensor) -> Tensor:
    """pytorch-metric-learning's mean over the terms above 0."""
    return terms.sum() / (terms > 0).sum().clamp(min=1)


def test_mean_over_active_triplets(real_data: Path, backend: Backend) -> None:
    """The mean is over terms above 0, where ours is over anchors; all triplets, from our distances, but for one tag."""
    for case, arrays in _golden(real_data, "pml_TripletMarginLoss", backend):
        labels = _tensor(arrays["labels"], backend)
        same = labels[:, None] == labels
        valid = (same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device))[:, :, None] & ~same[:, None]
        for tag in _tags(arrays, backend):
            margin, _, _ = _options(tag.replace("_batchhard", ""))
            metric = "cosine" if "cosine" in tag else "euclidean"
            for dtype, relative in _kinds(backend):
                if case == "pk_near_duplicates" and dtype == torch.float32 and "batchhard" not in tag:
                    continue  # distances of 1e-4 from products, theirs and ours, are rounding
                x = leaf(torch.from_numpy(arrays["embeddings"]), backend.device, dtype)
                rows = x if "unnorm" in tag else F.normalize(x)
                if "batchhard" in tag:
                    mined = batch_hard(rows, labels)
                    gap = (mined.distances.positive - mined.distances.negative)[mined.valid]
                    mean = triplet_loss(rows, labels, margin=margin)
                    assert_close(mean, _term(gap, margin).mean(), relative, f"mean over anchors of {case}")
                else:
                    d = pairwise_distance(rows, metric=metric)
                    near = torch.minimum(d[:, None], d) if "swap" in tag else d[:, None]  # (anchor, positive, negative)
                    gap = (d[:, :, None] - near)[valid]
                terms = F.softplus(gap + margin) if "smooth" in tag else _term(gap, margin)
                _agree(_mean_active(terms), x, arrays, tag, relative, f"{case} {dtype}")


def _pair_margins(d: Tensor, positive: Tensor, negative: Tensor, least: float, most: float) -> Tensor:
    return _mean_active((d[positive] - least).clamp(min=0)) + _mean_active((most - d[negative]).clamp(min=0))


def test_pairs_with_margins(real_data: Path, backend: Backend) -> None:
    """pytorch-metric-learning's contrastive loss of all pairs, from our distances."""
    for case, arrays in _golden(real_data, "pml_ContrastiveLoss", backend):
        labels = _tensor(arrays["labels"], backend)
        same = labels[:, None] == labels
        positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        for tag in _tags(arrays, backend):
            margins = [float(part[1:]) for part in tag.split("_")[-2:]]
            metric = {"cosine": "cosine", "sq": "sqeuclidean"}.get(tag.split("_")[1], "euclidean")
            if metric == "cosine":  # margins of similarities
                margins = [1 - margin for margin in margins]
            for dtype, relative in _kinds(backend):
                if case == "pk_near_duplicates" and dtype == torch.float32:
                    continue
                x = leaf(torch.from_numpy(arrays["embeddings"]), backend.device, dtype)
                d = pairwise_distance(F.normalize(x), metric=metric)
                loss = _pair_margins(d, positive, ~same, *margins)
                _agree(loss, x, arrays, tag, relative, f"{case} {dtype}")


def test_losses_against_a_queue(real_data: Path, backend: Backend) -> None:
    """A batch is enqueued, then compared with the written rows but its own copies: `own` and `y_valid` say which.

    Means are over terms above 0. The loss of all triplets is another one than ours and comes from our distances.
    """
    for case, arrays in _golden(real_data, "pml_CrossBatchMemory", backend):
        dtype, relative = _kinds(backend)[0]
        memory = CrossBatchMemory(int(arrays["memory_size"]), 32, dtype=dtype, device=backend.device)
        for step in range(1, 3 if backend.interpreted else 6):
            x = leaf(torch.from_numpy(arrays[f"embeddings{step}"]), backend.device, dtype)
            labels = _tensor(arrays[f"labels{step}"], backend)
            own = (memory.pointer + torch.arange(len(x), device=x.device)) % len(memory.labels)
            memory.enqueue(x, labels)
            features, y_labels = memory.rows()
            rows, y = F.normalize(x), F.normalize(features)
            options: dict[str, Any] = {"own": own, "y_valid": memory.valid}
            kept = memory.valid.repeat(len(x), 1).scatter(1, own[:, None], False)
            same = labels[:, None] == y_labels
            positive, negative = kept & same, kept & ~same
            if case == "circle":
                assert (positive.any(1) & negative.any(1)).all(), "else the means over anchors would differ"
                loss = circle_loss(x, labels, features, y_labels, margin=0.4, gamma=80.0, **options)
            elif case == "contrastive_batchhard":
                mined = batch_hard(rows, labels, y, y_labels, **options)
                far, near = (d[mined.valid] for d in mined.distances)
                loss = _mean_active(far) + _mean_active((1 - near).clamp(min=0))
            else:
                d = pairwise_distance(rows, y)
                if case == "contrastive":
                    loss = _pair_margins(d, positive, negative, 0.0, 1.0)
                else:
                    gap = (d[:, :, None] - d[:, None])[positive[:, :, None] & negative[:, None]]
                    loss = _mean_active(_term(gap, 0.3))
            found = {f"{key}_f64": arrays[f"{key}{step}_f64"] for key in ("loss", "grad")}
            _agree(loss, x, found, "", relative * (100 if case == "circle" else 1), f"{case} step {step}")
            assert memory.pointer == int(arrays[f"queue_idx{step}"])


def test_cosface(real_data: Path, backend: Backend) -> None:
    """The mean over all anchors, one without a positive at 0."""
    for case, arrays in _golden(real_data, "fastreid_pairwise_cosface", backend):
        pairing = Pairing(_tensor(arrays["labels"], backend))
        for tag in _tags(arrays, backend):
            margin, gamma = (float(part[1:]) for part in tag.split("_")[1:])
            for dtype, relative in _kinds(backend):
                x = leaf(torch.from_numpy(arrays["embeddings"]), backend.device, dtype)
                loss = cosface_loss(x, pairing, margin=margin, gamma=gamma, reduction="mean_all")
                _agree(loss, x, arrays, tag, 10 * relative, f"{case} {dtype}")
