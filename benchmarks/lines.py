"""Results of a run as JSON lines: appended and flushed as they come, so that what was measured outlives a crash.

A line belongs to one unit of one stage, on one device, with one state of the source. A unit "begun" has no result yet;
any other status ends it: "ok", "failed" (wrong, or an error), "skipped" (with the reason), "crashed" and "hung" (the
process ended or was ended under it). "cut" says that the stage's time was over: such a unit runs in the next call.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENDED = ("ok", "failed", "skipped", "crashed", "hung")
BAD = ("failed", "crashed", "hung")
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Results:
    """The lines of one device and one state of the source in a file that may hold others."""

    path: Path
    device: str  # name and versions, one string
    source: str  # hash

    def append(self, stage: str, unit: str, status: str, **values: Any) -> None:
        own = {"device": self.device, "source": self.source, "time": time.time()}
        append(self.path, {"stage": stage, "unit": unit, "status": status, **values, **own})

    def read(self) -> list[dict[str, Any]]:
        return [line for line in read(self.path) if (line["device"], line["source"]) == (self.device, self.source)]

    def last(self, stage: str) -> dict[str, dict[str, Any]]:
        """The last line of each unit. The unit "" is the stage itself, "ok" when it came to its end."""
        return {line["unit"]: line for line in self.read() if line["stage"] == stage}

    def ended(self, stage: str, retry: float = 0.0) -> set[str]:
        """Units that need not run again; those that did not end well before the time `retry` do."""
        return {
            unit
            for unit, line in self.last(stage).items()
            if line["status"] in ENDED and (line["status"] == "ok" or line["time"] >= retry)
        }


def append(path: Path, line: dict[str, Any]) -> None:
    """One write for one line, so that lines of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = (json.dumps(line, default=str) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """All lines; one that was cut off in the middle is left out."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"stage", "unit", "status", "device", "source", "time"} <= set(line):
            lines.append(line)
    return lines


def source_hash(folders: Iterable[str] = ("apd_kernels", "benchmarks", "tests"), root: Path = ROOT) -> str:
    """Of all Python files in these folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
