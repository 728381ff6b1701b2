"""Feature files drawn for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def draw_features(n: int = 90, dim: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of a feature file: 8 identities in 3 cameras, in the splits 0, 1 and 2."""
    random = np.random.default_rng(seed)
    pids = random.integers(1, 9, n)
    features = random.standard_normal((10, dim))[pids] + 0.8 * random.standard_normal((n, dim))
    return {
        "features": features.astype(np.float16),
        "pids": pids.astype(np.int32),
        "camids": random.integers(1, 4, n).astype(np.int32),
        "split": np.sort(random.integers(0, 3, n)).astype(np.int8),
        "names": np.array([f"image {i} é.jpg" for i in range(n)]),
    }


def part(arrays: dict[str, np.ndarray], split: int) -> dict[str, np.ndarray]:
    """The rows of one split, without it."""
    chosen = arrays["split"] == split
    return {name: values[chosen] for name, values in arrays.items() if name != "split"}


def write(path: Path, arrays: dict[str, Any]) -> Path:
    np.savez(path, **arrays)
    return path
