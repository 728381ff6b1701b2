"""Galleries of feature files, and ranked lists."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apd.errors import InputError
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
        """(id, camera, name) of a query; None where the file does not say."""
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
    try:
        found = gallery.search(query.features, k, exclude_same=exclude)
    except ValueError as error:
        raise InputError(f"{query.path}: {error}") from error
    names = gallery.metadata.get("name")
    if names is None:
        names = np.array([f"row {i}" for i in range(len(gallery))])
    indices = found.indices.numpy()
    listed = names[np.maximum(indices, 0)] if len(gallery) else np.full(indices.shape, "")
    return RankedLists(query, gallery.metric, found, np.where(indices < 0, "", listed))


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
