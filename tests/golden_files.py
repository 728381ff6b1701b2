"""Which files of ``golden/`` are compared where, and their cases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Other operations: ranking, re-ranking, query expansion; and a cross-entropy of class scores, which has no distance.
OTHERS = (
    r"(aqe|cmc|mean_ap|evaluate(_cy|_rank|_roc)?|eval_(func|cuhk03)|R1_mAP_eval|AccuracyCalculator|re_ranking"
    r"|compute_jaccard_distance|CrossEntropyLabelSmooth)"
)


def golden_cases(folder: Path, name: str) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The cases of a file: their names and arrays."""
    with np.load(folder / "golden" / f"{name}.npz", allow_pickle=False) as file:
        for case in map(str, file["cases"]):
            yield case, {key.removeprefix(f"{case}__"): file[key] for key in file.files if key.startswith(f"{case}__")}
