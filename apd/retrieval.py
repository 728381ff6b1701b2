"""Galleries of features, and ranked lists."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apd.data.market import DISTRACTOR, label_of
from apd.errors import InputError
from apd.extraction import Extractor, extract, load_extractor
from apd.features import FeatureSet
from apd.files import write_json, write_text
from apd_kernels import Gallery, SearchResult


def index_features(rows: FeatureSet, metric: str, *, device: str | None = None) -> Gallery:
    """A gallery of the rows, with the image names as metadata ``"name"``."""
    gallery = Gallery(rows.dim, metric, device=device)
    try:
        gallery.add(rows.features, rows.pids, rows.camids, {"name": rows.names})
    except ValueError as error:
        raise InputError(f"{rows.path}: {error}") from error
    return gallery


def note_run(gallery: Gallery, extractor: Extractor, data: Path) -> None:
    """Keep in the gallery what describes further images as its own were described: the run, and how it was used.

    Args:
        gallery: made by `index_features` from the images of `data`.
        extractor: a run's.
        data: the data set's folder, to which the image names are relative.
    """
    assert extractor.run is not None
    gallery.fingerprint = extractor.fingerprint
    gallery.notes = {**extractor.about(), "run": str(extractor.run.resolve()), "data": str(data.resolve())}


def extractor_of(gallery: Gallery, path: Path, device: str, run: Path | None = None) -> Extractor:
    """The network that described the images of a gallery.

    Args:
        gallery, path: the gallery, and where it was loaded from.
        device: where to compute.
        run: the run's folder, if it has moved.

    Raises:
        InputError: the gallery was made from features, its run is not there, or the run has other weights now.
    """
    if "run" not in gallery.notes:
        raise InputError(
            f"{path}: made from a feature file, so no model is known that could describe --query; search it with "
            "--features, or make a gallery with apd index --checkpoint RUN --data DIR"
        )
    folder = Path(gallery.notes["run"]) if run is None else run
    if run is None and not folder.is_dir():
        raise InputError(f"{path}: made with the run {folder}, which is not there; where is it now? --checkpoint RUN")
    extractor = load_extractor(str(folder), device, flip_test=gallery.notes["flip_test"])
    if extractor.fingerprint != gallery.notes["fingerprint"]:
        before, now = gallery.notes["fingerprint"][:12], extractor.fingerprint[:12]
        raise InputError(
            f"{path}: made with other weights ({before}…) than {folder} has now ({now}…); make the gallery anew with "
            f"apd index --checkpoint {folder}"
        )
    return extractor


def data_of(gallery: Gallery, path: Path, data: Path | None = None) -> Path:
    """The folder of the images of a gallery that was made with a run.

    Args:
        gallery, path: the gallery, and where it was loaded from.
        data: the data set's folder, if it has moved.

    Raises:
        InputError: it is not there.
    """
    folder = Path(gallery.notes["data"]) if data is None else data
    if not folder.is_dir():
        raise InputError(f"{path}: its images are not in {folder}: no such folder; where are they now? --data DIR")
    return folder


def describe_queries(extractor: Extractor, images: Sequence[Path], pid: int | None, camera: int | None) -> FeatureSet:
    """Query rows of image files.

    Args:
        extractor: the network of the gallery.
        images: the files.
        pid, camera: of every image; None: as its file name says in the manner of Market-1501, or else unknown (−1).
    """
    labels = [label_of(image.name) or (-1, -1) for image in images]
    labels = [(-1 if found == DISTRACTOR else found, cam) for found, cam in labels]  # a distractor is nobody
    return FeatureSet(
        path=images[0],
        rows="an image" if len(images) == 1 else f"the first of {len(images)} images",
        features=extract(extractor, images),
        names=np.array([str(image) for image in images]),
        pids=np.array([found if pid is None else pid for found, _ in labels], np.int32),
        camids=np.array([found if camera is None else camera for _, found in labels], np.int32),
        split=None,
    )


@dataclass(frozen=True)
class RankedLists:
    """The nearest gallery images of each query, with what is known of them."""

    query: FeatureSet
    metric: str
    found: SearchResult
    names: np.ndarray  # (Q, k) gallery image names; "" where there is none

    def matches(self, query: int) -> list[tuple[int, int, int, str, float]]:
        """(gallery row, id, camera, name, distance) of one query's images, nearest first."""
        columns = (self.found.indices, self.found.ids, self.found.cams, self.names, self.found.distances)
        rows = zip(*(column[query].tolist() for column in columns), strict=True)
        return [row for row in rows if row[0] >= 0]

    def describe(self, query: int) -> tuple[int | None, int | None, str]:
        """(id, camera, name) of a query; None where that is not known, and −1 for an id of nobody."""
        pids, camids = self.query.pids, self.query.camids
        return (
            None if pids is None else int(pids[query]),
            None if camids is None else int(camids[query]),
            str(self.query.names[query]),
        )


def search_features(query: FeatureSet, gallery: Gallery, k: int, *, exclude_same_camera: bool = False) -> RankedLists:
    """Search every row; with `exclude_same_camera` without the images of its identity in its own camera."""
    if query.dim != gallery.dim:
        raise InputError(f"{query.path}: features: expected {gallery.dim} dimensions as the gallery, got {query.dim}")
    exclude = (query.identities(), query.cameras()) if exclude_same_camera else None
    k = min(k, max(1, len(gallery)))  # a column more would be memory for every query, and hold nothing
    try:
        found = gallery.search(query.features, k, exclude_same=exclude)
    except ValueError as error:
        raise InputError(f"{query.path}: {error}") from error
    names = gallery.metadata.get("name")
    if names is None:
        names = np.array([f"row {key}" for key in gallery.keys.tolist()])
    positions = gallery.positions(found.indices).numpy()
    listed = names[np.maximum(positions, 0)] if len(gallery) else np.full(positions.shape, "")
    return RankedLists(query, gallery.metric, found, np.where(positions < 0, "", listed))


def write_lists(lists: RankedLists, path: Path) -> None:
    """All ranked lists as ``.json`` (one object a query) or ``.csv`` (one line a match)."""
    if path.suffix == ".json":
        write_json(path, _as_json(lists))
    else:
        write_text(path, _as_csv(lists))


def _as_json(lists: RankedLists) -> dict[str, Any]:
    queries = []
    for query in range(len(lists.query)):
        pid, camera, name = lists.describe(query)
        results = [
            {
                "rank": rank,
                "row": row,
                "id": pid_found,
                "camera": camera_found,
                "name": name_found,
                "distance": distance,
            }
            for rank, (row, pid_found, camera_found, name_found, distance) in enumerate(lists.matches(query), 1)
        ]
        queries.append({"id": pid, "camera": camera, "name": name, "results": results})
    return {"metric": lists.metric, "queries": queries}


def _as_csv(lists: RankedLists) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["query", "query_id", "query_camera", "query_name", "rank", "row", "id", "camera", "name", "distance"]
    )
    for query in range(len(lists.query)):
        for rank, match in enumerate(lists.matches(query), 1):
            writer.writerow([query, *lists.describe(query), rank, *match])
    return text.getvalue()
