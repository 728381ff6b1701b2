"""Ranked lists, and the files that they are written to."""

from __future__ import annotations

import csv
import io
import operator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from apd.data.images import within
from apd.files import replacing, write_json, write_text
from apd.retrieval.evaluation import Reranking
from apd.retrieval.features import FeatureSet
from apd_kernels import SearchResult


@dataclass(frozen=True)
class RankedLists:
    """The nearest gallery images of each query, with what is known of them."""

    query: FeatureSet
    metric: str
    found: SearchResult
    names: np.ndarray  # (Q, k) gallery image names; "" where there is none
    reranking: Reranking | None = None  # with which the distances were re-ranked

    @property
    def distance(self) -> str:
        """What the distances are, in words."""
        return self.metric if self.reranking is None else f"{self.metric}, re-ranked: {self.reranking}"

    def first(self, count: int) -> RankedLists:
        """The lists of so many queries."""
        part = slice(count)
        return replace(
            self,
            query=self.query.select(part),
            found=SearchResult(*(column[part] for column in self.found)),
            names=self.names[part],
        )

    def located(self, folder: Path, *, outside: bool) -> RankedLists:
        """With names of queries that are image files in a folder; InputError for one that is `outside` and may not."""
        find = operator.truediv if outside else within
        names = np.array([str(find(folder, name)) for name in self.query.names.tolist()])
        return replace(self, query=replace(self.query, names=names))

    def check_within(self, folder: Path) -> None:
        """InputError for the name of a gallery image that leads out of their folder: anybody may have written it."""
        for query in range(len(self.query)):
            for match in self.matches(query):
                within(folder, match[3])

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


def write_lists(lists: RankedLists, path: Path) -> None:
    """All ranked lists: ``.json``, one object a query; ``.csv``, one line a match; ``.npz``, arrays (Q, k) or (Q,)."""
    if path.suffix == ".json":
        write_json(path, _as_json(lists))
    elif path.suffix == ".csv":
        write_text(path, _as_csv(lists))
    else:
        with replacing(path) as file:
            np.savez(file, **_as_arrays(lists))


def _as_arrays(lists: RankedLists) -> dict[str, Any]:
    found, query = lists.found, lists.query
    arrays = {"rows": found.indices, "distances": found.distances, "pids": found.ids, "camids": found.cams}
    known = {"query_pids": query.pids, "query_camids": query.camids}
    return {
        **{name: values.numpy() for name, values in arrays.items()},
        "names": lists.names,
        "query_names": query.names,
        **{name: values for name, values in known.items() if values is not None},
    }


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
    re_ranking = False if lists.reranking is None else lists.reranking.as_json()
    return {"metric": lists.metric, "re_ranking": re_ranking, "queries": queries}


_FORMULAS = tuple("=+-@\t\r\n＝＋－＠")  # some take the wide signs for the others


def _quoted(name: str) -> str:
    """A spreadsheet would take a name that begins so for a formula, and run it; in front of it ' says text."""
    return f"'{name}" if name.startswith(_FORMULAS) else name


def _as_csv(lists: RankedLists) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["query", "query_id", "query_camera", "query_name", "rank", "row", "id", "camera", "name", "distance"]
    )
    for query in range(len(lists.query)):
        for rank, match in enumerate(lists.matches(query), 1):
            row = [query, *lists.describe(query), rank, *match]
            writer.writerow([_quoted(value) if isinstance(value, str) else value for value in row])
    return text.getvalue()
