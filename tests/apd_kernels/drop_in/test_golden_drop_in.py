"""The adapters with the names and signatures of the projects, against the projects' outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from apd_kernels.drop_in import openreid, transreid

KINDS = [(torch.float64, "f64", 1e-10), (torch.float32, "f32", 1e-5)]
TIED = ("ties_integer",)  # any subgradient is right there, and none is stored


def cases(folder: Path, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with np.load(folder / "golden" / f"{file}.npz", allow_pickle=False) as arrays:
        for case in map(str, arrays["cases"]):
            found = {key.removeprefix(f"{case}__"): arrays[key] for key in arrays.files if key.startswith(f"{case}__")}
            yield case, {key: value.item() if value.ndim == 0 else value for key, value in found.items()}


def close(found: Any, wanted: Any, relative: float, what: str) -> None:
    found = found.detach().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
    wanted = np.asarray(wanted, dtype=np.float64)
    assert found.shape == wanted.shape, what
    allowed = relative * max(1.0, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=0, atol=allowed, err_msg=what)


def _margin(tag: str) -> float | None:
    found = re.search(r"_m([\d.]+|None)", tag)
    assert found is not None
    return None if found[1] == "None" else float(found[1])


def _transreid(tag: str) -> Callable[[Tensor, Tensor], Any]:
    factor = re.search(r"_hf([\d.]+)", tag)
    loss = transreid.TripletLoss(_margin(tag), float(factor[1]) if factor else 0.0)
    return lambda x, labels: loss(x, labels, normalize_feature="normfeat" in tag)


LOSSES: dict[str, Callable[[str], Callable[[Tensor, Tensor], Any]]] = {
    "transreid_TripletLoss": _transreid,
    "strongbaseline_TripletLoss": _transreid,
    "bau_TripletLoss": lambda tag: openreid.TripletLoss(_margin(tag), "normfeat" in tag),
    "bau_SoftTripletLoss": lambda tag: openreid.SoftTripletLoss(_margin(tag)),
}


@pytest.mark.parametrize(("dtype", "kind", "relative"), KINDS, ids=("float64", "float32"))
@pytest.mark.parametrize("file", LOSSES)
def test_losses(real_data: Path, file: str, dtype: torch.dtype, kind: str, relative: float) -> None:
    """Value, distances where there are some, and gradient.

    Where an identity has one image its distance to itself is 1e-6 there, of a clamp, in float64; in float32 it is
    rounding of 3e-4. Nearly equal images are rounding in their float32, too: ours is held against their float64.
    """
    compared = 0
    for case, arrays in cases(real_data, file):
        labels = torch.from_numpy(arrays["labels"])
        alone = bool((labels.unique(return_counts=True)[1] == 1).any())
        for key in [key for key in arrays if re.fullmatch(r"loss.*_f64", key)]:
            tag = key.removeprefix("loss").removesuffix("_f64")
            x = torch.from_numpy(arrays["embeddings"]).to(dtype).requires_grad_()
            result = LOSSES[file](tag)(x, labels)
            loss, *distances = result if isinstance(result, tuple) else (result,)
            loss.backward()
            error = relative
            near = dtype == torch.float32 and (alone or case in ("pk_near_duplicates", *TIED))
            close(loss, arrays[f"loss{tag}_f64"], 5e-4 if near else error, f"{case} {tag}")
            for found, name in zip(distances, ("dist_ap", "dist_an"), strict=False):
                close(found, arrays[f"{name}{tag}_f64"], 5e-4 if near else error, f"{name} of {case} {tag}")
            if f"grad{tag}_f64" in arrays and case not in TIED:
                flipped = dtype == torch.float32 and case == "pk_near_duplicates"  # another of two equal pairs
                gradient, wanted = x.grad.double().numpy(), arrays[f"grad{tag}_f64"]
                if not flipped:
                    close(gradient, wanted, 10 * error, f"gradient of {case} {tag}")
            compared += 1
    assert compared >= 10


@pytest.mark.parametrize(("dtype", "kind", "relative"), KINDS, ids=("float64", "float32"))
def test_contrast_of_texts_and_images(real_data: Path, dtype: torch.dtype, kind: str, relative: float) -> None:
    for case, arrays in cases(real_data, "clipreid_SupConLoss"):
        sides = [torch.from_numpy(arrays[f"{name}_features"]).to(dtype).requires_grad_() for name in ("text", "image")]
        labels = (torch.from_numpy(arrays[name]) for name in ("t_label", "i_targets"))
        loss = transreid.SupConLoss("cpu")(*sides, *labels)
        loss.backward()
        close(loss, arrays["loss_f64"], relative, case)
        for side, name in zip(sides, ("text", "image"), strict=True):
            close(side.grad, arrays[f"grad_{name}_f64"], relative, f"{name} of {case}")


@pytest.mark.parametrize(("dtype", "kind", "relative"), KINDS, ids=("float64", "float32"))
@pytest.mark.parametrize("hard", [False, True], ids=["each", "hardest"])
def test_cluster_memory(real_data: Path, hard: bool, dtype: torch.dtype, kind: str, relative: float) -> None:
    """Two steps: loss, gradient, and the memory after the backward pass. The project keeps its momentum in float32."""
    for case, arrays in cases(real_data, "clustercontrast_ClusterMemory"):
        if bool(arrays["use_hard"]) != hard:
            continue
        before = torch.from_numpy(arrays["features_before"]).to(dtype)
        memory = openreid.ClusterMemory(before.shape[1], len(before), arrays["temp"], arrays["momentum"], hard).to(
            dtype
        )
        memory.features.copy_(before)
        for step in (1, 2):
            x = torch.from_numpy(arrays[f"inputs{step}"]).to(dtype).requires_grad_()
            loss = memory(x, torch.from_numpy(arrays[f"targets{step}"]))
            loss.backward()
            error = max(relative, 1e-7)
            close(loss, arrays[f"loss{step}_f64"], error, f"loss of {case}")
            close(x.grad, arrays[f"grad{step}_f64"], 10 * error, f"gradient of {case}")
            close(memory.features, arrays[f"features_after{step}_f64"], error, f"memory of {case}")
        with torch.no_grad():
            kept = memory.features.clone()
            memory(x.detach(), torch.from_numpy(arrays["targets2"]))
        assert torch.equal(memory.features, kept)


def test_memory_bank(real_data: Path) -> None:
    for case, arrays in cases(real_data, "bau_MemoryBank_momentum_update"):
        before = torch.from_numpy(arrays["features_before"])
        bank = openreid.MemoryBank(before.shape[1], len(before), arrays["momentum"])
        bank.features.copy_(before)
        bank.momentum_update(torch.from_numpy(arrays["inputs"]), torch.from_numpy(arrays["targets"]))
        close(bank.features, arrays["features_after"], 1e-6, case)


DISTANCES: dict[str, Callable[..., Any]] = {
    "transreid_euclidean_distance": transreid.euclidean_distance,
    "transreid_cosine_similarity": transreid.cosine_similarity,
}


@pytest.mark.parametrize("file", DISTANCES)
def test_distances(real_data: Path, file: str) -> None:
    """NumPy's matrices where the project has them; the project's own float32 is off by 0.03 far from the origin."""
    for case, arrays in cases(real_data, file):
        for dtype, _, relative in KINDS:
            found = DISTANCES[file](*(torch.from_numpy(arrays[side]).to(dtype) for side in "xy"))
            assert isinstance(found, np.ndarray)
            wanted = arrays["ref64"]
            if "similarity" in file and dtype == torch.float32:  # the arccosine magnifies rounding near 1
                found, wanted = np.cos(found), np.cos(wanted)
            close(found, wanted, relative, f"{case} {dtype}")


def test_mining(real_data: Path) -> None:
    for case, arrays in cases(real_data, "transreid_hard_example_mining"):
        labels, x = torch.from_numpy(arrays["labels"]), torch.from_numpy(arrays["embeddings"]).double()
        for metric, distance in (("euclidean", transreid.euclidean_dist), ("cosine", transreid.cosine_dist)):
            found = transreid.hard_example_mining(distance(x, x), labels, return_inds=True)
            assert len(transreid.hard_example_mining(distance(x, x), labels)) == 2
            for ours, name in zip(found, ("ap", "an", "p_inds", "n_inds"), strict=True):
                close(ours, arrays[f"{metric}_{name}"], 1e-6 if "near" in case else 1e-10, f"{metric} {name} of {case}")


RANKINGS: dict[str, Callable[..., Any]] = {
    "transreid_eval_func": transreid.eval_func,
    "strongbaseline_eval_func": transreid.eval_func,
}


@pytest.mark.parametrize("file", RANKINGS)
def test_rankings(real_data: Path, file: str) -> None:
    """Equal distances in the order of the gallery; the CMC is float32 and no longer than the gallery."""
    for case, arrays in cases(real_data, file):
        if "cmc_ties_best" in arrays and "cmc" not in arrays:
            continue
        cmc, *others = RANKINGS[file](*(arrays[k] for k in LABELS), max_rank=arrays["max_rank"])
        assert cmc.dtype == np.float32
        assert len(cmc) == min(arrays["max_rank"], arrays["distmat"].shape[1])
        close(cmc[: len(arrays["cmc"])], arrays["cmc"], 1e-6, case)
        close(others[0], arrays["mAP"], 1e-6, case)


LABELS = ("distmat", "q_pids", "g_pids", "q_camids", "g_camids")


@pytest.mark.parametrize("peer", ["bau", "clustercontrast"])
def test_open_reid_lists(real_data: Path, peer: str) -> None:
    for case, arrays in cases(real_data, f"{peer}_cmc"):
        arguments = [arrays.get(k) for k in LABELS] if "q_pids" in arrays else [arrays["distmat"]]
        named = {
            "cmc_default": {},
            "cmc_market1501": {"first_match_break": True},
            "cmc_allshots_top10": {"topk": 10},
            "cmc_separate_camera": {"separate_camera_set": True, "first_match_break": True},
        }
        for name, options in named.items():
            if name in arrays and case != "ties_mixed":
                found = openreid.cmc(*arguments, **options)
                close(found, arrays[name], 1e-9, f"{name} of {case}")
    for case, arrays in cases(real_data, f"{peer}_mean_ap"):
        arguments = [arrays[k] for k in LABELS if k in arrays]
        assert openreid.mean_ap(*arguments) == pytest.approx(arrays["mAP"], abs=1e-9), case


def test_reranking_of_features(real_data: Path) -> None:
    for case, arrays in cases(real_data, "transreid_re_ranking"):
        sides = [torch.from_numpy(arrays[k]) for k in ("prob_feat", "gal_feat")]
        sizes = [arrays[k] for k in ("k1", "k2", "lambda_value")]
        found = transreid.re_ranking(*sides, *sizes)
        close(found, arrays["final_dist"], 5e-4, case)
        both = torch.cat(sides)
        local = (torch.cdist(both.double(), both.double()) ** 2).float().numpy()
        only = transreid.re_ranking(*sides, *sizes, local_distmat=local, only_local=True)
        close(only, arrays["final_dist"], 5e-4, case)
        added = transreid.re_ranking(*sides, *sizes, local_distmat=np.zeros_like(local))
        close(added, arrays["final_dist"], 5e-4, case)


def test_evaluator(real_data: Path) -> None:
    """Figures; the matrix only when somebody looks."""
    for case, arrays in cases(real_data, "transreid_R1_mAP_eval"):
        evaluator = transreid.R1_mAP_eval(
            arrays["num_query"], arrays["max_rank"], arrays["feat_norm"], arrays["reranking"]
        )
        parts = [np.array_split(arrays[k], 3) for k in ("feats", "pids", "camids")]
        for feats, pids, camids in zip(*parts, strict=True):
            evaluator.update((torch.from_numpy(feats), pids, list(camids)))
        cmc, mean, distances, pids, _, query, gallery = evaluator.compute()
        error = 1e-3 if arrays["reranking"] else 1e-6
        close(cmc, arrays["cmc"], error, case)
        assert mean == pytest.approx(arrays["mAP"], abs=error)
        assert distances._made is None
        close(np.asarray(distances), arrays["distmat"], max(error, 1e-5), case)
        assert distances.shape == (len(query), len(gallery)) == distances.argsort(1).shape
        assert len(pids) == len(query) + len(gallery)
        assert np.array_equal(distances[3], np.asarray(distances)[3])


def test_jaccard(real_data: Path) -> None:
    for case, arrays in cases(real_data, "clustercontrast_compute_jaccard_distance"):
        features = torch.from_numpy(arrays["features"])
        found = openreid.compute_jaccard_distance(features, arrays["k1"], arrays["k2"], print_flag=False)
        assert isinstance(found, np.ndarray)
        close(found, arrays["jaccard"], 1e-6, case)
        with pytest.raises(ValueError, match="target_features: expected rows of one length, got 1 to 2"):
            openreid.compute_jaccard_distance(torch.cat([features, 2 * features[:1]]), print_flag=False)
