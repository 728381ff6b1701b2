"""The table of tiles: which sizes a kernel runs with on which GPU, and what speaks for them.

A row holds for one family of GPUs. Others, AMD's among them (gfx942: compiles, not run), take the conservative row: no
descriptors, little shared memory. `apd_kernels.autotune` measures other rows on the machine itself and keeps them in a
file; whoever has not called it runs this table.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import triton
from torch import Tensor

from apd_kernels.kernels._launch import architecture

CACHE_VARIABLE = "APD_KERNELS_CACHE"
CONSERVATIVE = 0
FAMILIES = {80: 80, 86: 86, 89: 86, 90: 90, 100: 100, 103: 100, 120: 120, 121: 120}


@dataclass(frozen=True)
class Tile:
    """Constants and compile options of a kernel."""

    options: Mapping[str, int]
    evidence: str  # the measurement or estimate behind it


def _tile(evidence: str, **options: int) -> Tile:
    return Tile(options, evidence)


_NOT_RUN = "compiles, not run"
_H100 = "H100, the same tile in a probe of the product alone: "

# Rows of TABLE[kernel][family]. BM, BN: rows and columns of a tile of pairs; BK: elements of a row at a time (of the
# gradient: pairs at a time, BD elements of a row).
TABLE: dict[str, dict[int, Tile]] = {
    # Rows as they come, loaded through pointers; problems that take less than about 1 ms.
    "distance.rows": {
        CONSERVATIVE: _tile("estimate: programs fit several times", BM=64, BN=64, BK=32, num_warps=8, num_stages=3),
    },
    # The same, large problems in TF32, bfloat16 or of half-precision rows.
    "distance.wide": {
        CONSERVATIVE: _tile("estimate: as distance.rows", BM=64, BN=64, BK=32, num_warps=8, num_stages=3),
        80: _tile("estimate: 4 times the products a byte", BM=128, BN=128, BK=32, num_warps=8, num_stages=3),
        90: _tile("estimate; BK=64 spills", BM=128, BN=128, BK=32, num_warps=8, num_stages=4),
    },
    "mine.wide": {
        CONSERVATIVE: _tile("estimate: as distance.rows", BM=64, BN=64, BK=32, num_warps=8, num_stages=3),
        80: _tile("estimate: more products a byte, no spills", BM=128, BN=64, BK=32, num_warps=8, num_stages=3),
        86: _tile("estimate: as sm_80, 48 KB", BM=128, BN=64, BK=32, num_warps=8, num_stages=3),
        90: _tile("estimate; BK=64 spills", BM=128, BN=128, BK=32, num_warps=8, num_stages=4),
        120: _tile(_NOT_RUN, BM=128, BN=64, BK=32, num_warps=8, num_stages=3),
    },
    "gradient.rows": {
        CONSERVATIVE: _tile("estimate; 8 warps spill on sm_80", BM=64, BN=32, BD=32, num_warps=4, num_stages=3),
        86: _tile("estimate; 3 stages spill", BM=64, BN=32, BD=32, num_warps=4, num_stages=2),
        120: _tile(_NOT_RUN, BM=64, BN=32, BD=32, num_warps=4, num_stages=2),
    },
    "mine.rows": {
        CONSERVATIVE: _tile("estimate: narrow, to fill the GPU", BM=64, BN=32, BK=32, num_warps=8, num_stages=3),
    },
    # Rows against themselves by tiles of BM × BM on and above the diagonal.
    "triangle.rows": {
        CONSERVATIVE: _tile("estimate", BM=64, BK=32, num_warps=8, num_stages=3),
    },
    "triangle.split": {
        CONSERVATIVE: _tile("estimate from sm_80", BM=64, BK=32, num_warps=4, num_stages=2),
        80: _tile("estimate: most products a byte without spills", BM=128, BK=32, num_warps=8, num_stages=2),
        86: _tile("estimate: as sm_80, 32 KB", BM=128, BK=32, num_warps=8, num_stages=2),
        90: _tile("estimate: as distance.split, 255 registers", BM=128, BK=32, num_warps=8, num_stages=4),
        100: _tile(_NOT_RUN, BM=64, BK=64, num_warps=4, num_stages=3),
    },
    # float32 rows split into float16 parts.
    "distance.split": {
        CONSERVATIVE: _tile("estimate from sm_80", BM=64, BN=64, BK=32, num_warps=4, num_stages=2),
        80: _tile("estimate: most products a byte without spills", BM=128, BN=128, BK=32, num_warps=8, num_stages=2),
        86: _tile("estimate: 228 registers, 56 KB; 128 × 128 spills", BM=128, BN=64, BK=32, num_warps=8, num_stages=2),
        90: _tile(_H100 + "157 TFLOP/s (cuBLAS float32: 50)", BM=128, BN=128, BK=32, num_warps=8, num_stages=4),
        100: _tile(_NOT_RUN, BM=64, BN=64, BK=64, num_warps=4, num_stages=3),
        120: _tile(_NOT_RUN, BM=128, BN=64, BK=32, num_warps=8, num_stages=2),
    },
    "gradient.split": {
        CONSERVATIVE: _tile("estimate from sm_80", BM=64, BD=64, BK=32, num_warps=4, num_stages=2),
        80: _tile("estimate: most products a byte without spills", BM=64, BD=128, BK=32, num_warps=8, num_stages=2),
        86: _tile("estimate: as sm_80, 48 KB", BM=64, BD=128, BK=32, num_warps=8, num_stages=2),
        90: _tile("estimate: 128 × 128 spills", BM=64, BD=128, BK=32, num_warps=8, num_stages=3),
        100: _tile(_NOT_RUN, BM=64, BD=64, BK=32, num_warps=4, num_stages=3),
        120: _tile(_NOT_RUN, BM=64, BD=128, BK=32, num_warps=8, num_stages=2),
    },
    "mine.split": {
        CONSERVATIVE: _tile("estimate from sm_80", BM=64, BN=64, BK=32, num_warps=4, num_stages=2),
        80: _tile("estimate: 128 × 128 spills", BM=128, BN=64, BK=32, num_warps=8, num_stages=2),
        86: _tile("estimate: as sm_80, 32 KB", BM=128, BN=64, BK=32, num_warps=8, num_stages=2),
        90: _tile("estimate: as distance.split, 252 registers", BM=128, BN=128, BK=32, num_warps=8, num_stages=4),
        100: _tile(_NOT_RUN, BM=64, BN=64, BK=64, num_warps=4, num_stages=3),
        120: _tile(_NOT_RUN, BM=128, BN=64, BK=32, num_warps=8, num_stages=2),
    },
    # Rows that are multiplied as they are or in TF32 or bfloat16, prepared.
    "distance.plain": {
        CONSERVATIVE: _tile("estimate", BM=64, BN=64, BK=32, num_warps=4, num_stages=3),
        90: _tile("estimate: 4 × 32 KB of stages and 2 warp groups", BM=128, BN=128, BK=64, num_warps=8, num_stages=3),
        100: _tile(_NOT_RUN, BM=128, BN=128, BK=64, num_warps=8, num_stages=3),
    },
    "mine.plain": {
        CONSERVATIVE: _tile("estimate", BM=64, BN=64, BK=32, num_warps=4, num_stages=3),
        90: _tile("estimate: as distance.plain, 179 registers", BM=128, BN=128, BK=64, num_warps=8, num_stages=3),
        100: _tile(_NOT_RUN, BM=128, BN=64, BK=64, num_warps=8, num_stages=3),
    },
    # Counting for CMC and mAP.
    "rank.split": {
        CONSERVATIVE: _tile("estimate from sm_80", BM=64, BN=64, BK=32, num_warps=4, num_stages=2),
        80: _tile("estimate: 170 registers; 128 × 128 spills", BM=128, BN=64, BK=32, num_warps=8, num_stages=2),
        86: _tile("estimate: as sm_80, 24 KB", BM=128, BN=64, BK=32, num_warps=8, num_stages=2),
        90: _tile("estimate: as distance.split, 254 registers", BM=128, BN=128, BK=32, num_warps=8, num_stages=4),
        100: _tile(_NOT_RUN, BM=64, BN=64, BK=64, num_warps=4, num_stages=3),
        120: _tile(_NOT_RUN, BM=128, BN=64, BK=32, num_warps=8, num_stages=2),
    },
    "rank.plain": {
        CONSERVATIVE: _tile("estimate", BM=64, BN=64, BK=32, num_warps=4, num_stages=3),
        80: _tile("estimate: 241 registers, 64 KB", BM=128, BN=128, BK=64, num_warps=8, num_stages=3),
        86: _tile("estimate: 219 registers, 64 KB", BM=128, BN=128, BK=32, num_warps=8, num_stages=3),
        90: _tile("estimate: 238 registers; 128 × 256 spills", BM=128, BN=128, BK=64, num_warps=8, num_stages=3),
        100: _tile(_NOT_RUN, BM=128, BN=64, BK=64, num_warps=8, num_stages=3),
        120: _tile(_NOT_RUN, BM=128, BN=128, BK=32, num_warps=8, num_stages=3),
    },
}  # fmt: skip

# What `autotune` measures.
_BLOCKS = [(64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 64, 8), (128, 128, 8), (128, 256, 8)]
_OF_PAIRS = [
    {"BM": m, "BN": n, "BK": k, "num_warps": warps, "num_stages": stages}
    for (m, n, warps), k, stages in product(_BLOCKS, (32, 64), (2, 3, 4))
]
_OF_ELEMENTS = [
    {"BM": m, "BD": d, "BK": k, "num_warps": warps, "num_stages": stages}
    for (m, d, warps), k, stages in product(_BLOCKS, (32, 64), (2, 3, 4))
]
_OF_BOTH = [
    {"BM": m, "BN": n, "BD": d, "num_warps": warps, "num_stages": stages}
    for (m, n, warps), d, stages in product(_BLOCKS[:4], (32, 64), (2, 3))
]
# On tcgen05 accumulators lie in a memory of their own, and too many become a trap instead of an error: 100 runs what
# its row says.
_SQUARE = [
    {"BM": m, "BK": k, "num_warps": warps, "num_stages": stages}
    for (m, warps), k, stages in product([(64, 4), (64, 8), (128, 8)], (32, 64), (2, 3, 4))
]
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "distance.rows": _OF_PAIRS,
    "distance.wide": _OF_PAIRS,
    "mine.wide": _OF_PAIRS,
    "gradient.rows": _OF_BOTH,
    "mine.rows": _OF_PAIRS,
    "triangle.rows": _SQUARE,
    "triangle.split": _SQUARE,
    "distance.split": _OF_PAIRS,
    "gradient.split": _OF_ELEMENTS,
    "mine.split": _OF_PAIRS,
    "distance.plain": _OF_PAIRS,
    "mine.plain": _OF_PAIRS,
    "rank.split": _OF_PAIRS,
    "rank.plain": _OF_PAIRS,
}

_named: ContextVar[tuple[str, Mapping[str, int]] | None] = ContextVar("apd_kernels_tile", default=None)
_tuned: dict[str, dict[str, dict[str, int]]] = {}  # by path of the cache file


def tile(kernel: str, x: Tensor) -> dict[str, int]:
    """Constants and options of `kernel` on x's device: named by `use_tile`, measured by `autotune` or of the table."""
    named = _named.get()
    if named is not None and named[0] == kernel:
        return dict(named[1])
    if x.is_cuda:
        measured = _measured(x.get_device()).get(kernel)
        if measured is not None:
            return dict(measured)
    rows = TABLE[kernel]
    return dict(rows.get(family(x), rows[CONSERVATIVE]).options)


def family(x: Tensor) -> int:
    """80, 86, 90, 100, 120, or 0 for another GPU and for none."""
    return FAMILIES.get(architecture(x), CONSERVATIVE)


def has_descriptors(x: Tensor) -> bool:
    """Whether tiles of prepared rows are loaded by TMA. In older GPUs descriptors become plain loads that spill; tiles
    of sm_120, which has TMA, are those of sm_80."""
    return family(x) in (90, 100)


def separate_accumulators(x: Tensor) -> bool:
    """Whether each dot of an iteration gets its own accumulator: on tcgen05 the sums are wrong else (triton#10821), and
    what an unknown GPU does is not known."""
    return family(x) not in (80, 86, 90, 120)


@contextmanager
def use_tile(kernel: str, options: Mapping[str, int]) -> Iterator[None]:
    """Inside the block `kernel` runs with these."""
    token = _named.set((kernel, options))
    try:
        yield
    finally:
        _named.reset(token)


def cache_file(device: str) -> Path:
    """Where tiles that were measured on such a device are kept: for another Triton or kernel source another file."""
    folder = os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "apd_kernels"
    key = hashlib.sha256("\n".join((device, triton.__version__, source_hash())).encode()).hexdigest()
    return Path(folder) / f"tiles-{key[:16]}.json"


@functools.cache
def source_hash() -> str:
    """Of all kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def save_tiles(path: Path, tiles: Mapping[str, Mapping[str, int]], **notes: str) -> None:
    """Write a cache file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    temporary.write_text(json.dumps({**notes, "tiles": tiles}, indent=2, sort_keys=True) + "\n")
    temporary.replace(path)
    _tuned.pop(str(path), None)


def load_tiles(path: Path) -> dict[str, dict[str, int]]:
    """The tiles of a cache file, none where it does not exist.

    Raises:
        ValueError: a file that is damaged or of something else; it names the file.
    """
    try:
        tiles = json.loads(path.read_text())["tiles"]
        for kernel, options in tiles.items():
            expected = set(TABLE[kernel][CONSERVATIVE].options)
            if set(options) != expected or not all(type(value) is int and value > 0 for value in options.values()):
                raise ValueError(f"{kernel}: {options}")
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of tiles ({error}); remove it and run autotune again") from error
    return dict(tiles)


def _measured(device: int) -> dict[str, dict[str, int]]:
    path = _device_file(device)
    if str(path) not in _tuned:
        _tuned[str(path)] = load_tiles(path)
    return _tuned[str(path)]


@functools.cache
def _device_file(device: int) -> Path:
    return cache_file(torch.cuda.get_device_name(device))
