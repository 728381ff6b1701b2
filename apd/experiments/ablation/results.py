"""The results of an ablation: one JSON line a finished run, and what the lines say together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from apd.errors import InputError
from apd.files import misfit, reading, write_text
from apd.retrieval.comparison import paired_difference
from apd.retrieval.targets import FIGURES, Queries

Key = tuple[str, int | None]  # row and seed; of a bracket its name and None


class ResultFile:
    """``results.jsonl``: written anew with each line and renamed, so that it is whole at any moment.

    Args:
        path: the file; it need not exist.

    Raises:
        InputError: a line is none that was written here.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[str] = _lines(path) if path.exists() else []
        self.latest: dict[Key, dict[str, Any]] = {}  # the last line of each run
        for number, text in enumerate(self._lines, 1):
            self._note(text, f"{path}: line {number}")

    def add(self, line: dict[str, Any]) -> None:
        """Append a result, which has `row` and `seed`."""
        text = json.dumps(line, ensure_ascii=False)
        write_text(self._path, "\n".join([*self._lines, text]) + "\n")
        self._lines.append(text)
        self._note(text, str(self._path))

    def _note(self, text: str, where: str) -> None:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not a result of an ablation: {error}") from error
        if found := misfit(line, _LINE):
            raise InputError(f"{where}: not a result of an ablation: {found}")
        self.latest[line["row"], line["seed"]] = line


_LINE = {
    **{"row": str, "seed": (int, type(None)), "config?": str, "weights?": str, "steps?": int, "seconds?": {...: float}},
    "tests?": {...: {"splits": str, **dict.fromkeys(FIGURES, float)}},
}


def _lines(path: Path) -> list[str]:
    """Ended by line feeds alone: a title may hold other characters that `str.splitlines` takes for an end."""
    with reading(path, "not UTF-8 text"):
        text = path.read_text(encoding="utf-8")
    return text.removesuffix("\n").split("\n") if text else []


class Summary(NamedTuple):
    """A figure over the seeds."""

    mean: float
    sd: float | None  # of a single run; None for one seed
    seeds: int


def summary(values: Sequence[float]) -> Summary:
    """Mean and standard deviation (n − 1) of at least one value."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(float(np.mean(values)), sd, len(values))


@dataclass(frozen=True)
class Comparison:
    """A row minus its control, by the seeds that both have.

    Two errors: of the seeds, from the spread of the differences, and of the test, from which people are in it
    (`apd.retrieval.comparison.paired_difference` of the seeds' mean).
    """

    difference: float
    seeds: int
    seed_error: float | None  # standard error; None for one seed
    test_error: float

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval over seeds, by Student's t; None for one seed."""
        if self.seed_error is None:
            return None
        half = t_quantile(self.seeds - 1) * self.seed_error
        return self.difference - half, self.difference + half

    @property
    def error(self) -> float | None:
        """Standard error of both; the test's holds a part of the seeds', so it is rather too large."""
        return None if self.seed_error is None else math.hypot(self.seed_error, self.test_error)

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` from two standard errors on."""
        if self.error is None:
            return "one seed"
        if self.difference == 0 or abs(self.difference) < 2 * self.error:
            return "not resolved"
        return "better" if self.difference > 0 else "worse"


def compare(ours: Mapping[int, Queries], theirs: Mapping[int, Queries], part: str) -> Comparison | None:
    """Compare two rows on a target.

    Args:
        ours, theirs: by seed, what the same queries found.
        part: ``"right"`` (rank-1) or ``"ap"`` (mAP).

    Returns:
        None where they have no seed in common.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    values = [np.stack([getattr(row[seed], part) for seed in seeds]).astype(np.float64) for row in (ours, theirs)]
    differences = (values[0] - values[1]).mean(1)
    people = paired_difference(values[0].mean(0), values[1].mean(0), ours[seeds[0]].identities)
    sd = summary(differences.tolist()).sd
    return Comparison(
        difference=float(differences.mean()),
        seeds=len(seeds),
        seed_error=None if sd is None else sd / math.sqrt(len(seeds)),
        test_error=people.error,
    )


def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """The value that Student's t stays below with a probability.

    The distribution function for a whole number of degrees of freedom is a finite sum (Abramowitz and Stegun, 26.7.3
    and 26.7.4), inverted here by bisection.

    Args:
        freedom: degrees of freedom, at least 1.
        probability: above one half.

    >>> round(t_quantile(2), 4)
    4.3027
    """
    low, high = 0.0, 1.0
    while _t_below(high, freedom) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, freedom) < probability else (low, middle)
    return high


def _t_below(t: float, freedom: int) -> float:
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, freedom, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = sine * total
    if odd:
        inside = 2 / math.pi * (angle + (inside if freedom > 1 else 0.0))
    return (1 + inside) / 2
