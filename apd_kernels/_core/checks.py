"""Argument checks. Each error names the argument, what was expected and what came.

Only shape, dtype, device and Python values are looked at, never the data: no check synchronises with a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LONGEST = 1 << 16  # a list of no more places costs next to nothing, however few rows there are
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense tensor, got a {kind} one")


def check_floating(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if x.dtype not in FEATURE_DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")


def check_features(name: str, x: Tensor, *, sets: bool = True) -> None:
    """(N, D) or, with `sets`, (S, N, D); N may be 0, D may not."""
    check_floating(name, x)
    if x.dim() != 2 and not (sets and x.dim() == 3):
        shapes = "(N, D) or (S, N, D)" if sets else "(N, D)"
        raise ValueError(f"{name}: expected shape {shapes}, got {tuple(x.shape)}")
    if x.shape[-1] < 1:
        raise ValueError(f"{name}: expected at least one feature dimension, got shape {tuple(x.shape)}")


def check_same_kind(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other.dtype} as {other_name}, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {other_name}, got {x.device}")


def check_comparable(name: str, y: Tensor, other_name: str, x: Tensor) -> None:
    """`y` is a second set of feature rows to compare with those of `x`."""
    check_features(name, y)
    check_same_kind(name, y, other_name, x)
    if y.dim() != x.dim() or y.shape[-1] != x.shape[-1] or y.shape[:-2] != x.shape[:-2]:
        expected = (*x.shape[:-2], "M", x.shape[-1])
        raise ValueError(f"{name}: expected shape ({', '.join(map(str, expected))}), got {tuple(y.shape)}")


def check_gallery(gallery: Tensor, query: Tensor) -> None:
    """`gallery` are rows (G, D) to compare with those of `query`, (Q, D)."""
    check_features("gallery", gallery, sets=False)
    check_same_kind("gallery", gallery, "query", query)
    if gallery.shape[1] != query.shape[1]:
        raise ValueError(f"gallery: expected shape (G, {query.shape[1]}), got {tuple(gallery.shape)}")


def check_integers(name: str, values: Tensor, count: int, device: torch.device) -> None:
    """(count,) integers on `device`: labels, identities, cameras."""
    check_tensor(name, values)
    if values.dtype not in INTEGER_DTYPES:
        unsigned = str(values.dtype).startswith("torch.uint")
        expected = "uint8 or a signed integer dtype" if unsigned else "an integer dtype"
        raise TypeError(f"{name}: expected {expected}, got {values.dtype}")
    if values.dim() != 1 or values.shape[0] != count:
        raise ValueError(f"{name}: expected shape ({count},), got {tuple(values.shape)}")
    if values.device != device:
        raise ValueError(f"{name}: expected device {device}, got {values.device}")


def check_length(name: str, value: int, rows: int) -> None:
    """Of a list that is made for each query, or a CMC: as long as there are rows, or any small number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    if value > max(rows, LONGEST):
        raise ValueError(f"{name}: expected at most {max(rows, LONGEST):,} for {rows:,} gallery rows, got {value:,}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: float, *, minimum: float = 0.0) -> None:
    """A finite Python number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not minimum <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite number of at least {minimum:g}, got {value}")
