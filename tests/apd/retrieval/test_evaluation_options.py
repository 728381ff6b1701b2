"""``apd evaluate`` and ``apd rerank``: what each option does to the figures, and what does not go together."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("faiss")

from command_line import error, run
from feature_files import draw_features, part, write

from apd_kernels import k_reciprocal_rerank, pairwise_distance, rank_metrics


def _tensors(arrays: dict[str, np.ndarray]) -> list[torch.Tensor]:
    """Features, identities and cameras of queries and gallery, in the order of `rank_metrics`."""
    sides = part(arrays, 1), part(arrays, 2)
    return [torch.from_numpy(side["features"].astype(np.float32)) for side in sides] + [
        torch.from_numpy(side[name].astype(np.int64)) for name in ("pids", "camids") for side in sides
    ]


def _figures(result: Any) -> dict[str, Any]:
    cmc = {str(k): float(result.cmc[k - 1]) for k in (1, 5, 10)}
    return {"cmc": cmc, "mAP": result.mAP, "mINP": result.mINP, "num_valid_queries": int(result.valid.sum())}


def _evaluated(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    run("evaluate", *arguments, "--json", tmp_path / "out.json")
    found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    return found


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    return draw_features()


@pytest.fixture
def features(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    return write(tmp_path / "f.npz", arrays)


# conventions


@pytest.mark.parametrize("ties", ["pessimistic", "optimistic", "expected"])
def test_ties(tmp_path: Path, arrays: dict[str, np.ndarray], ties: str) -> None:
    """Of features that are all equal the expectation is chance, and the others are the extremes."""
    arrays["features"][:] = 1
    found = _evaluated(tmp_path, "--features", write(tmp_path / "f.npz", arrays), "--ties", ties)
    expected = _figures(rank_metrics(*_tensors(arrays), ties=ties))
    assert found["ties"] == ties
    assert {name: found[name] for name in expected} == expected
    assert (found["cmc"]["1"] == 0, found["cmc"]["1"] == 1) == (ties == "pessimistic", ties == "optimistic")


def test_single_shot(tmp_path: Path, features: Path, arrays: dict[str, np.ndarray]) -> None:
    found = _evaluated(tmp_path, "--features", features, "--single-shot", 4, "--seed", 9)
    expected = _figures(rank_metrics(*_tensors(arrays), single_shot=4, seed=9))
    assert {name: found[name] for name in expected} == expected
    assert found["single_shot"] == {"draws": 4, "seed": 9}
    whole = _evaluated(tmp_path, "--features", features)
    assert whole["cmc"] != found["cmc"]
    assert whole["mAP"] == found["mAP"]
    printed = run("evaluate", "--features", features, "--single-shot", 4, "--seed", 9)
    assert "mean of 4 draws of one image of each identity, seed 9" in printed


def _among_themselves(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    features, ids = torch.from_numpy(arrays["features"].astype(np.float32)), torch.from_numpy(arrays["pids"]).long()
    own = torch.arange(len(ids))
    return _figures(rank_metrics(features, features, ids, ids, exclude=own))


def test_exclude_self(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A file without split, searched in itself; without cameras, and without names."""
    expected = _among_themselves(arrays)
    for left_out in (("split",), ("split", "camids", "names")):
        rows = {name: values for name, values in arrays.items() if name not in left_out}
        features = write(tmp_path / "f.npz", rows)
        for sources in (["--features", features], ["--query", features, "--gallery", features]):
            found = _evaluated(tmp_path, *sources, "--exclude-self")
            assert {name: found[name] for name in expected} == expected
            assert found["exclude_self"] is True
    assert "removed     the query itself" in run("evaluate", "--features", features, "--exclude-self")
    assert "no array 'split'" in error("evaluate", "--features", features)


def test_exclude_self_by_name(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Queries are found in a gallery of another order; one that is not there has nothing left out."""
    rows = {name: values for name, values in arrays.items() if name != "split"}
    order = np.random.default_rng(1).permutation(len(rows["pids"]))
    gallery = {name: values[order] for name, values in rows.items()}
    files = write(tmp_path / "q.npz", rows), write(tmp_path / "g.npz", gallery)
    sources = ["--query", files[0], "--gallery", files[1], "--exclude-self"]
    expected = _among_themselves(rows)
    found = _evaluated(tmp_path, *sources)
    assert found["cmc"] == pytest.approx(expected["cmc"])
    assert found["mAP"] == pytest.approx(expected["mAP"])

    write(files[1], gallery | {"names": np.array([f"other {i}" for i in range(len(order))])})
    assert "none of the 90 queries is an image of the gallery" in error("evaluate", *sources)
    write(files[1], gallery | {"names": np.array(["image 7 é.jpg"] * len(order))})
    assert "names: image 7 é.jpg is there more than once" in error("evaluate", *sources)
    del gallery["names"]
    write(files[1], gallery)
    assert "have no array 'names' both" in error("evaluate", *sources)


def test_queries_of_identity_0(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    first = np.flatnonzero(arrays["split"] == 1)[:2]
    arrays["pids"][first] = 0
    features = write(tmp_path / "f.npz", arrays)
    warnings = [line for line in run("evaluate", "--features", features).splitlines() if "Warning" in line]
    assert len(warnings) == 1
    assert "2 of" in warnings[0]
    assert "identity 0" in warnings[0]
    arrays["pids"][first] = -1
    assert "Warning" not in run("evaluate", "--features", write(features, arrays))


# re-ranking


OPTIONS = {"k1": 9, "k2": 3, "lambda_value": 0.5}
ARGUMENTS = ["--k1", 9, "--k2", 3, "--lambda", 0.5]


@pytest.mark.parametrize(("variant", "metric"), [("torchreid", "cosine"), ("transreid", "euclidean")])
def test_rerank(tmp_path: Path, features: Path, arrays: dict[str, np.ndarray], variant: str, metric: str) -> None:
    query, gallery, *labels = _tensors(arrays)
    for arguments, options in (([], {}), (ARGUMENTS, OPTIONS)):
        found = _evaluated(tmp_path, "--features", features, "--rerank", variant, "--metric", metric, *arguments)
        reranked = k_reciprocal_rerank(query, gallery, variant=variant, metric=metric, **options)
        expected = _figures(reranked.rank_metrics(*labels))
        assert {name: found[name] for name in expected} == expected
        assert found["re_ranking"] == {"variant": variant, "k1": 20, "k2": 6, "lambda_value": 0.3} | options
    printed = run("evaluate", "--features", features, "--rerank", variant, "--metric", metric, *ARGUMENTS)
    assert f"re-ranking  {variant}, k1 9, k2 3, lambda 0.5" in printed


def test_reranked_lists(tmp_path: Path, features: Path, arrays: dict[str, np.ndarray]) -> None:
    """The three formats hold the same lists; the figures are those of evaluate with and without --rerank."""
    query, gallery, *_ = _tensors(arrays)
    expected = k_reciprocal_rerank(query, gallery, metric="cosine", **OPTIONS).topk(4)
    figures = tmp_path / "figures.json"
    printed = ""
    for ending in ("json", "csv", "npz"):
        output = tmp_path / f"lists.{ending}"
        printed = run("rerank", "--features", features, "-k", 4, *ARGUMENTS, "--output", output, "--json", figures)
        assert printed.splitlines()[-1] == f"wrote {output}"
    with np.load(tmp_path / "lists.npz") as lists:
        assert lists["rows"].tolist() == expected.indices.tolist()
        np.testing.assert_array_equal(lists["distances"], expected.distances.numpy())
        found = part(arrays, 2)
        for name in ("pids", "camids", "names"):
            np.testing.assert_array_equal(lists[name], found[name][lists["rows"]])
            np.testing.assert_array_equal(lists[f"query_{name}"], part(arrays, 1)[name])
    content = json.loads((tmp_path / "lists.json").read_text())
    assert content["re_ranking"]["k1"] == 9
    rows = [[match["row"] for match in one["results"]] for one in content["queries"]]
    assert rows == expected.indices.tolist()
    with (tmp_path / "lists.csv").open(encoding="utf-8", newline="") as file:
        assert [int(line["row"]) for line in csv.DictReader(file)] == expected.indices.flatten().tolist()

    both = json.loads(figures.read_text())
    assert both["before"] == _evaluated(tmp_path, "--features", features)
    assert both["after"] == _evaluated(tmp_path, "--features", features, "--rerank", "torchreid", *ARGUMENTS)
    for name in ("before", "after"):
        assert f"{both[name]['mAP']:.6f}" in printed


def test_reranked_lists_without_the_query_camera(tmp_path: Path, features: Path) -> None:
    rerank = ["rerank", "--features", features, "-k", 1000, "--output", tmp_path / "lists.npz"]

    def lists(*arguments: str) -> dict[str, np.ndarray]:
        run(*rerank, *arguments)
        with np.load(tmp_path / "lists.npz") as found:
            return dict(found)

    def same(found: dict[str, np.ndarray]) -> np.ndarray:
        pids = found["pids"] == found["query_pids"][:, None]
        return pids & (found["camids"] == found["query_camids"][:, None])

    every, fewer = lists(), lists("--exclude-same-camera")
    assert same(every).any()
    assert not same(fewer).any()
    for i, removed in enumerate(same(every)):
        kept = (fewer["rows"][i] >= 0).sum()
        assert fewer["rows"][i, :kept].tolist() == every["rows"][i, ~removed].tolist()
        assert np.isinf(fewer["distances"][i, kept:]).all()


def test_reranked_lists_of_features_alone(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Without identities there are lists, and no figures."""
    features = write(tmp_path / "f.npz", {name: arrays[name] for name in ("features", "split")})
    printed = run("rerank", "--features", features, "--output", tmp_path / "lists.json")
    assert "mAP" not in printed
    assert len(json.loads((tmp_path / "lists.json").read_text())["queries"]) == (arrays["split"] == 1).sum()
    message = error("rerank", "--features", features, "--output", tmp_path / "l.json", "--json", tmp_path / "o.json")
    assert "--json: is for figures, which need the arrays 'pids' and 'camids'" in message


def test_reranked_lists_of_unknown_people(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Identity −1 everywhere is no identity: lists, and no figures."""
    query, gallery = arrays["split"] == 1, arrays["split"] == 2
    for unknown in (query, gallery, query | gallery):
        features = write(tmp_path / "f.npz", arrays | {"pids": np.where(unknown, -1, arrays["pids"])})
        printed = run("rerank", "--features", features, "--output", tmp_path / "lists.json")
        assert "mAP" not in printed
        assert printed.splitlines()[-1] == f"wrote {tmp_path / 'lists.json'}"


def test_reranked_lists_of_disjoint_people(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    """No query has an answer: lists, and no figures; where figures are asked for, no lists either."""
    disjoint = arrays | {"pids": arrays["pids"] + 1000 * (arrays["split"] == 2)}
    features, lists = write(tmp_path / "f.npz", disjoint), tmp_path / "lists.json"
    assert "--json: is for figures" in error(
        "rerank", "--features", features, "--output", lists, "--json", tmp_path / "o.json"
    )
    assert not lists.exists()
    printed = run("rerank", "--features", features, "--output", lists)
    assert f"note: no figures: {features}: no query has an image of its identity from another camera" in printed
    assert lists.exists()


def test_reranked_figures_without_cameras(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    del arrays["camids"]
    features, out = write(tmp_path / "f.npz", arrays), tmp_path / "o.json"
    options = ("rerank", "--features", features, "--output", tmp_path / "lists.json")
    assert "no array 'camids'; --ignore-cameras evaluates" in run(*options)
    run(*options, "--ignore-cameras", "--json", out)
    found = json.loads(out.read_text())
    q, g, ids, gallery_ids = _tensors(arrays | {"camids": arrays["pids"]})[:4]
    expected = k_reciprocal_rerank(q, g, metric="cosine", k1=20, k2=6, lambda_value=0.3).rank_metrics(ids, gallery_ids)
    assert found["after"]["mAP"] == expected.mAP
    assert all(found[when]["ignore_cameras"] for when in ("before", "after"))


# distances


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_distances(tmp_path: Path, features: Path, arrays: dict[str, np.ndarray], dtype: str) -> None:
    query, gallery, *labels = _tensors(arrays)
    matrix = pairwise_distance(query, gallery, metric="euclidean").numpy().astype(dtype)
    np.save(tmp_path / "d.npy", np.asfortranarray(matrix))
    before = (tmp_path / "d.npy").read_bytes()
    found = _evaluated(tmp_path, "--features", features, "--distances", tmp_path / "d.npy", "--ties", "optimistic")
    from apd_kernels import rank_metrics_from_distances

    expected = _figures(rank_metrics_from_distances(torch.from_numpy(matrix), *labels, ties="optimistic"))
    assert {name: found[name] for name in expected} == expected
    assert found["metric"] == f"as in {tmp_path / 'd.npy'}"
    assert (tmp_path / "d.npy").read_bytes() == before


def test_wrong_distances(tmp_path: Path, features: Path, arrays: dict[str, np.ndarray]) -> None:
    shape = tuple(int((arrays["split"] == split).sum()) for split in (1, 2))
    path = tmp_path / "d.npy"
    evaluate = ["evaluate", "--features", features, "--distances", path]
    assert "d.npy: no such file" in error(*evaluate)
    for content, message in (
        (np.zeros(shape[::-1]), f"d.npy: expected shape {shape}, queries by gallery images, got {shape[::-1]}"),
        (np.zeros(shape, int), "d.npy: expected distances in float16, float32 or float64, got int64"),
        (np.full(shape, np.nan), "distances: expected no NaN, got one in row 0"),
    ):
        np.save(path, content)
        assert message in error(*evaluate)
    assert "expected a file, found a folder" in error("evaluate", "--features", features, "--distances", tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    assert "not an .npy file of numbers, or cut off or damaged" in error(*evaluate)


# options that do not go together


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--distances", "d.npy", "--metric", "cosine"], "--distances with --metric: the distances are there already"),
        (["--distances", "d.npy", "--rerank", "torchreid"], "--distances with --rerank: re-ranking needs"),
        (["--distances", "d.npy", "--single-shot", 2], "--distances with --single-shot"),
        (["--rerank", "torchreid", "--single-shot", 2], "--rerank with --single-shot"),
        (["--rerank", "torchreid", "--exclude-self"], "--rerank with --exclude-self"),
        (["--rerank", "transreid"], "--rerank transreid: is defined on Euclidean distances; got the metric cosine"),
        (["--seed", 1], "--seed: is for --single-shot"),
        (["--k1", 4], "--k1: is for --rerank"),
        (["--lambda", 0], "--lambda: is for --rerank"),
        (["--flip-test"], "--flip-test: is for --checkpoint"),
    ],
)
def test_options_apart(features: Path, arguments: list[object], message: str) -> None:
    assert message in error("evaluate", "--features", features, *arguments)


@pytest.mark.parametrize("option", ["--exclude-self", "--rerank", "--single-shot", "--distances"])
def test_a_gallery_in_pieces_apart(features: Path, option: str) -> None:
    values = {"--rerank": ["torchreid"], "--single-shot": ["3"], "--distances": ["d.npy"]}
    pieces = ["--query", features, "--gallery", features, "--gallery", features]
    message = error("evaluate", *pieces, option, *values.get(option, []))
    assert f"{option} with a gallery in pieces" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--output", "l.txt"], ".json or .csv or .npz"), (["--output", "l.csv", "--variant", "transreid"], "Euclidean")],
)
def test_wrong_options_of_rerank(features: Path, arguments: list[str], message: str) -> None:
    assert message in error("rerank", "--features", features, *arguments)


# models


def test_two_models_have_no_distance(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    about = {"model": "a", "fingerprint": "12ab", "image_size": [4, 2], "flip_test": False, "descriptor": "before_bn"}
    query = write(tmp_path / "q.npz", part(arrays, 1) | about)
    gallery = write(tmp_path / "g.npz", part(arrays, 2) | about | {"model": "the same, moved"})
    sources = ["--query", query, "--gallery", gallery]
    found = _evaluated(tmp_path, *sources)
    assert found.items() >= about.items()
    write(gallery, part(arrays, 2) | about | {"fingerprint": "34cd"})
    assert "g.npz: fingerprint: expected 12ab as in" in error("evaluate", *sources)
    write(gallery, part(arrays, 2) | about | {"flip_test": True})
    assert "g.npz: flip_test: expected False as in" in error("evaluate", *sources)
    write(gallery, part(arrays, 2))  # not known: the user's word is taken
    _evaluated(tmp_path, *sources)


# no cameras, or one


@pytest.mark.parametrize("cameras", ["none", "one", "unknown"])
def test_ignore_cameras(tmp_path: Path, arrays: dict[str, np.ndarray], cameras: str) -> None:
    """The same figures as without cameras in the library; cameras that are not known need no option."""
    x, y, ids, gallery_ids, *_ = _tensors(arrays)
    wanted = _figures(rank_metrics(x, y, ids, gallery_ids))
    if cameras == "none":
        del arrays["camids"]
    else:
        arrays["camids"][:] = 1 if cameras == "one" else -1
    file = write(tmp_path / "f.npz", arrays)
    found = _evaluated(tmp_path, "--features", file, "--ignore-cameras")
    assert {name: found[name] for name in wanted} == wanted
    assert found["ignore_cameras"]
    if cameras == "unknown":
        found = _evaluated(tmp_path, "--features", file)
        assert {name: found[name] for name in wanted} == wanted
    else:
        assert "--ignore-cameras" in error("evaluate", "--features", file)
