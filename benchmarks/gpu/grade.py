"""Stage "grade": the errors of `benchmarks.grade`, one line a product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.grade import products
from benchmarks.units import Context, Unit


def units(context: Context) -> list[Unit]:
    named = products(context.toy)
    if context.toy:  # a product of each form
        named = {name: named[name] for name in list(named)[:: len(named) // 5]}
    return [Unit(name, partial(_measured, product, context.toy), 30) for name, product in named.items()]


def _measured(product: Callable[[], dict[str, Any]], toy: bool) -> dict[str, Any]:
    """Larger than the float32 product's is a failure, on a GPU: a CPU's product is none to be held against."""
    found = product()
    if toy or found["ours_rms"] <= found["float32_rms"]:
        return found
    return {**found, "status": "failed", "error": f"{found['ours_rms']:.2e} against {found['float32_rms']:.2e}"}
