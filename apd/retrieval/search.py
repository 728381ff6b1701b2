"""Galleries of features, and searches in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from apd.data.datasets import DataSpec, read_dataset
from apd.data.market import DISTRACTOR, label_in_place
from apd.errors import InputError
from apd.files import misfit
from apd.retrieval.evaluation import LABELS, Reranking, features_tensor, integers_tensor
from apd.retrieval.extraction import Extractor, extract, label_column, load_extractor
from apd.retrieval.features import FeatureSet, difference
from apd.retrieval.ranked_lists import RankedLists
from apd_kernels import Gallery, RerankedDistances, SearchResult, k_reciprocal_rerank
from apd_kernels.evaluation.retrieval_metrics import Unlabelled

_OPTIONS = {"max_distance": "--max-distance", "parameters": "--parameter"}  # by the argument that they are given to


def index_features(rows: FeatureSet, metric: str, *, index: str = "Flat", device: str | None = None) -> Gallery:
    """A gallery of the rows, with the image names as metadata ``"name"`` beside the file's columns.

    Args:
        rows: what is indexed; an index that needs training is trained with them.
        metric, index, device: as in `apd_kernels.Gallery`.

    Raises:
        InputError: FAISS cannot build such an index, or not of so few rows.
    """
    gallery = _empty(rows.dim, metric, index, device=device, fingerprint=rows.about.get("fingerprint"))
    gallery.notes = dict(rows.about)
    _add(gallery, rows, rows.names)
    return gallery


def _empty(dim: int, metric: str, index: str, **options: Any) -> Gallery:
    try:
        return Gallery(dim, metric, index=index, **options)
    except ValueError as error:
        raise InputError(f"--index {index}: {error}") from error


def check_before(extractor: Extractor, image: Path, metric: str, index: str, present: Gallery | None) -> None:
    """Describe one image, so that what cannot become a gallery is said before all are described.

    Args:
        extractor, image: a network, and an image of the gallery.
        metric, index: of a new gallery.
        present: the gallery that is added to; None for a new one.

    Raises:
        InputError: FAISS has no such index for these descriptors, or another network made the gallery's.
    """
    dim = extract(extractor, [image]).shape[1]
    if present is None:
        _empty(dim, metric, index, device="cpu")
        return
    about = {**extractor.about(), "dimensions": dim}
    name = "dimensions" if dim != present.dim else difference(present.notes, about)
    if name is not None:
        raise InputError(
            f"{extractor.name}: {name}: expected {present.notes.get(name, present.dim)} as the gallery, got "
            f"{about.get(name)}; features that were made in two ways have no distance"
        )


def append_features(gallery: Gallery, path: Path, rows: FeatureSet, data: Path | None = None) -> None:
    """Add rows to a gallery that was loaded.

    Args:
        gallery, path: the gallery, and where it was loaded from.
        rows: with the columns that the gallery has.
        data: the folder to which the image names are relative. Names from another folder than the gallery's are kept
            as whole paths.

    Raises:
        InputError: the rows have another dimension, were made by another model, or are in the gallery already.
    """
    check_fits(rows, gallery, path)
    if ("fingerprint" in gallery.notes) != ("fingerprint" in rows.about):
        known, unknown = (path, rows.path) if "fingerprint" in gallery.notes else (rows.path, path)
        raise InputError(f"{unknown}: does not say which model made its features, as {known} does; not appended")
    names = rows.names
    if data is not None and gallery.notes.get("data", str(data.resolve())) != str(data.resolve()):
        names = np.array([str(data.resolve() / name) for name in names])
    if not rows.named:
        names = np.array([f"{rows.path.name}, {name}" for name in names])
    present = np.isin(names, gallery.metadata.get("name", names[:0]))
    if present.any():
        raise InputError(
            f"{path}: has {int(present.sum()):,} of the {len(rows):,} images of {rows.path} already, "
            f"{names[present][0]} for one; nothing was appended"
        )
    _add(gallery, rows, names)


def _add(gallery: Gallery, rows: FeatureSet, names: np.ndarray) -> None:
    try:
        gallery.add(rows.features, rows.pids, rows.camids, {"name": names, **rows.columns})
    except (TypeError, ValueError) as error:
        reason = str(error).partition("; call train")[0]  # the library's way out
        raise InputError(f"{rows.path}: {reason}") from error


def check_fits(rows: FeatureSet, gallery: Gallery, path: Path) -> None:
    """InputError for rows of another dimension than the gallery's, or of another model where both are known."""
    if rows.dim != gallery.dim:
        raise InputError(f"{rows.path}: features: expected {gallery.dim} dimensions as the gallery, got {rows.dim}")
    if (name := difference(gallery.notes, rows.about)) is not None:
        raise InputError(
            f"{rows.path}: {name}: expected {gallery.notes.get(name)} as the gallery {path}, got "
            f"{rows.about.get(name)}; features that were made in two ways have no distance"
        )


def note_run(gallery: Gallery, extractor: Extractor, data: Path) -> None:
    """Keep in the gallery what describes further images as its own were described: the run, and how it was used.

    Args:
        gallery: made by `index_features` from the images of `data`.
        extractor: a run's.
        data: the data set's folder, to which the image names are relative.
    """
    assert extractor.run is not None
    gallery.notes |= {"run": str(extractor.run.resolve()), "data": str(data.resolve())}


def extractor_of(gallery: Gallery, path: Path, device: str, run: Path | None = None) -> Extractor:
    """The network that described the images of a gallery.

    Args:
        gallery, path: the gallery, and where it was loaded from.
        device: where to compute.
        run: the run's folder, if it has moved.

    Raises:
        InputError: the gallery was made from features, its run is not there, or the run has other weights now.
    """
    notes = _notes(gallery, path)
    if "run" not in notes:
        raise InputError(
            f"{path}: made from a feature file, so no model is known that could describe --query; search it with "
            "--features, or make a gallery with apd index --checkpoint RUN --data DIR"
        )
    folder = Path(notes["run"]) if run is None else run
    if run is None and not folder.is_dir():
        raise InputError(f"{path}: made with the run {folder}, which is not there; where is it now? --checkpoint RUN")
    extractor = load_extractor(str(folder), device, flip_test=notes["flip_test"])
    if extractor.fingerprint != notes["fingerprint"]:
        before, now = notes["fingerprint"][:12], extractor.fingerprint[:12]
        raise InputError(
            f"{path}: made with other weights ({before}…) than {folder} has now ({now}…); make the gallery anew with "
            f"apd index --checkpoint {folder}"
        )
    return extractor


_NOTES = {"run?": str, "data?": str, "flip_test?": bool, "fingerprint?": str}


def _notes(gallery: Gallery, path: Path) -> dict[str, Any]:
    """What `note_run` wrote; InputError where the gallery's notes are of another kind."""
    shape = _NOTES if "run" not in gallery.notes else {name.removesuffix("?"): kind for name, kind in _NOTES.items()}
    if found := misfit(gallery.notes, shape):
        raise InputError(f"{path}: its notes: {found}")
    return gallery.notes


def data_of(gallery: Gallery, path: Path, data: Path | None = None) -> Path:
    """The folder to which the image names of a gallery are relative.

    Args:
        gallery, path: the gallery, and where it was loaded from.
        data: the folder, if it has moved, or where the gallery was made from a feature file.

    Raises:
        InputError: it is not there, or not known.
    """
    notes = _notes(gallery, path)
    if data is None and "data" not in notes:
        raise InputError(f"{path}: made from a feature file; where are its images? --data DIR")
    folder = Path(notes["data"]) if data is None else data
    if not folder.is_dir():
        raise InputError(f"{path}: its images are not in {folder}: no such folder; where are they now? --data DIR")
    return folder


def query_images(paths: Sequence[Path]) -> list[Path]:
    """These files, and the images of these folders, by name.

    Raises:
        InputError: a folder holds no image.
    """
    return [
        image
        for path in paths
        for image in (
            [sample.path for sample in read_dataset(DataSpec(path, "pictures"), ("query",)).query]
            if path.is_dir()
            else [path]
        )
    ]


def describe_queries(extractor: Extractor, images: Sequence[Path], pid: int | None, camera: int | None) -> FeatureSet:
    """Query rows of image files.

    Args:
        extractor: the network of the gallery.
        images: the files.
        pid, camera: of every image; None: as its file name says in the manner of Market-1501, or else unknown (−1).
    """
    labels = [label_in_place(image) or (-1, -1) for image in images]
    labels = [(-1 if found == DISTRACTOR else found, cam) for found, cam in labels]  # a distractor is nobody
    return FeatureSet(
        path=images[0],
        rows="an image" if len(images) == 1 else f"the first of {len(images)} images",
        features=extract(extractor, images),
        names=np.array([str(image) for image in images]),
        pids=label_column([found if pid is None else pid for found, _ in labels]),
        camids=label_column([found if camera is None else camera for _, found in labels]),
        split=None,
        about=extractor.about(),
    )


def search_features(
    query: FeatureSet,
    gallery: Gallery,
    k: int,
    *,
    exclude_same_camera: bool = False,
    unlabelled: Unlabelled = LABELS,
    where: np.ndarray | None = None,
    max_distance: float | None = None,
    parameters: Mapping[str, int] | None = None,
) -> RankedLists:
    """Search every row.

    Args:
        query: rows of the gallery's dimension.
        gallery: what is searched.
        k: images listed for each query.
        exclude_same_camera: without the images of a query's identity in its own camera.
        unlabelled: the identity and the camera that equal nothing there.
        where, max_distance, parameters: as in `apd_kernels.Gallery.search`.

    Raises:
        InputError: the rows, or a parameter, are not for this gallery.
    """
    exclude = (query.identities(), query.cameras()) if exclude_same_camera else None
    k = min(k, max(1, len(gallery)))  # a column more would be memory for every query, and hold nothing
    try:
        found = gallery.search(
            query.features,
            k,
            exclude_same=exclude,
            where=where,
            max_distance=max_distance,
            parameters=parameters,
            **unlabelled._asdict(),
        )
    except ValueError as error:
        argument = str(error).partition(":")[0]
        raise InputError(f"{_OPTIONS.get(argument, query.path)}: {error}") from error
    positions = gallery.positions(found.indices).numpy()
    return RankedLists(query, gallery.metric, found, _listed(_names(gallery), positions))


def search_reranked(
    query: FeatureSet,
    gallery: Gallery,
    k: int,
    reranking: Reranking,
    *,
    exclude_same_camera: bool = False,
    unlabelled: Unlabelled = LABELS,
    where: np.ndarray | None = None,
    device: str = "cpu",
) -> RankedLists:
    """Search every row by re-ranked distances to the whole gallery, of which what is left out is not listed.

    Args:
        query, gallery, k, exclude_same_camera, unlabelled: as for `search_features`.
        reranking: of the gallery's metric.
        where: bool (N,), the rows that may be listed.
        device: where to compute.

    Raises:
        InputError: the variant has another metric than the gallery, or the rows are not for it.
    """
    try:
        reranked = k_reciprocal_rerank(
            features_tensor(query, device).float(),
            gallery.features.to(device),
            metric=gallery.metric,
            **reranking.as_json(),
        )
    except ValueError as error:
        raise InputError(f"{query.path}, re-ranked: {error}") from error
    images = _Images(gallery.keys, gallery.ids, gallery.cams, _names(gallery))
    return _ranked(reranked, query, images, k, gallery.metric, reranking, exclude_same_camera, unlabelled, where)


def rank_reranked(
    reranked: RerankedDistances,
    query: FeatureSet,
    gallery: FeatureSet,
    k: int,
    metric: str,
    reranking: Reranking,
    *,
    exclude_same_camera: bool = False,
    unlabelled: Unlabelled = LABELS,
) -> RankedLists:
    """The k nearest gallery images of each query by re-ranked distances.

    Args:
        reranked: of these rows, with this `metric` and `reranking`.
        query, gallery: the rows.
        k, exclude_same_camera, unlabelled: as for `search_features`.
    """
    ids, cams = (
        torch.full((len(gallery),), -1) if values is None else integers_tensor(values)
        for values in (gallery.pids, gallery.camids)
    )
    images = _Images(torch.arange(len(gallery)), ids, cams, gallery.names)
    return _ranked(reranked, query, images, k, metric, reranking, exclude_same_camera, unlabelled, None)


class _Images(NamedTuple):
    """What is known of gallery rows."""

    keys: Tensor
    ids: Tensor
    cams: Tensor
    names: np.ndarray


def _ranked(
    reranked: RerankedDistances,
    query: FeatureSet,
    images: _Images,
    k: int,
    metric: str,
    reranking: Reranking,
    exclude_same_camera: bool,
    unlabelled: Unlabelled,
    where: np.ndarray | None,
) -> RankedLists:
    k = min(k, max(1, len(images.keys)))
    distances = torch.full((len(query), k), torch.inf)
    positions = torch.full((len(query), k), -1)
    pids, camids = (query.identities(), query.cameras()) if exclude_same_camera else (None, None)
    for rows, block in reranked.blocks():
        if where is not None:
            block[:, torch.from_numpy(~where).to(block.device)] = torch.inf
        if pids is not None and camids is not None:
            ids, cams = (integers_tensor(values[rows])[:, None] for values in (pids, camids))
            block[unlabelled.removed(ids, cams, images.ids, images.cams).to(block.device)] = torch.inf
        # Stable: equal distances by position, as in all lists.
        nearest = block.sort(dim=1, stable=True)
        distances[rows] = nearest.values[:, :k].float().cpu()
        positions[rows] = nearest.indices[:, :k].cpu()
    positions[distances.isinf()] = -1
    keys, ids, cams = (torch.where(positions < 0, -1, column[positions]) for column in images[:3])
    found = SearchResult(distances, keys, ids, cams)
    return RankedLists(query, metric, found, _listed(images.names, positions.numpy()), reranking)


def _names(gallery: Gallery) -> np.ndarray:
    names = gallery.metadata.get("name")
    return np.array([f"row {key}" for key in gallery.keys.tolist()], str) if names is None else names.astype(str)


def _listed(names: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The names at these positions; "" where there is none."""
    if not len(names):
        return np.full(positions.shape, "")
    return np.where(positions < 0, "", names[np.maximum(positions, 0)])


def rows_where(gallery: Gallery, conditions: Sequence[str]) -> np.ndarray | None:
    """The rows that meet conditions, bool (N,); None without conditions.

    Args:
        gallery: what is searched.
        conditions: ``id=VALUE``, ``camera=VALUE``, ``name=VALUE`` or of any other column of the gallery. Of one column
            any value will do, and each column that is named must have one.

    Raises:
        InputError: a condition that cannot be understood, or that no row meets.
    """
    if not conditions:
        return None
    columns = {"id": gallery.ids.numpy(), "camera": gallery.cams.numpy(), **gallery.metadata}
    chosen: dict[str, np.ndarray] = {}
    for condition in conditions:
        key, equals, text = condition.partition("=")
        if not equals or key not in columns:
            raise InputError(f"--where {condition}: expected KEY=VALUE with the key {' or '.join(columns)}")
        met = columns[key] == _value(condition, text, columns[key].dtype)
        if not met.any():
            raise InputError(f"--where {condition}: no image of the gallery has this value")
        chosen[key] = chosen.get(key, False) | met
    rows = np.logical_and.reduce(list(chosen.values()))
    if not rows.any():
        raise InputError(f"--where {', '.join(conditions)}: no image of the gallery meets all of them")
    return np.asarray(rows)


_BOOLEANS = {"true": True, "false": False}


def _value(condition: str, text: str, dtype: np.dtype[Any]) -> Any:
    """A value as the column has it."""
    kinds = {"b": ("true or false", lambda: _BOOLEANS[text.lower()]), "f": ("a number", lambda: dtype.type(text))}
    kinds |= dict.fromkeys("iu", ("an integer", lambda: int(text))) | {"U": ("a string", lambda: text)}
    expected, read = kinds[dtype.kind]
    try:
        return read()
    except (KeyError, ValueError):
        raise InputError(f"--where {condition}: expected {expected}") from None
