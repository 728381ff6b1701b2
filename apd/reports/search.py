"""Ranked lists of a search as a page: the queries, what was found, and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from apd.reports.page import Section, Table, ranked_strips, write_report
from apd.retrieval.ranked_lists import RankedLists


def write_search_report(lists: RankedLists, total: int, folder: Path, path: Path, facts: Mapping[str, str]) -> None:
    """One HTML file with its pictures inside, which needs nothing else.

    Args:
        lists: the lists to show, with image files as query names; the found names are relative to `folder`.
        total: queries that were searched; `lists` may be the first of them.
        folder: the gallery's data set.
        path: the ``.html`` file, written or replaced in one step.
        facts: how the search was made, by the name of the fact.
    """
    count = len(lists.query)
    notes = [_note(lists, query) for query in range(count)]
    shown = f"{count:,} {'query' if count == 1 else 'queries'}"
    summary = [shown if count == total else f"{shown} of {total:,}", f"Distance: {lists.distance}."]
    text = (
        "Nearest first. Green ✓: the query's identity; red ✗: another; no frame: the query's identity is not known. "
        "Below: camera and distance."
    )
    sections = [
        Section("Ranked lists", [text], ranked_strips(lists, range(count), folder, notes)),
        Section("How it was made", [], [Table(("", ""), list(facts.items()), numbers=False)], folded=True),
    ]
    write_report(path, "Search", summary, sections)


def _note(lists: RankedLists, query: int) -> str:
    pid, _, name = lists.describe(query)
    matches = lists.matches(query)
    note = Path(name).name
    if pid in (None, -1):
        return note
    right = sum(found == pid for _, found, *_ in matches)
    return f"{note}: {right} of {len(matches)} right"
