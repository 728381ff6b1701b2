"""Stage "peers": what users run today, timed as the goals are."""

from __future__ import annotations

from functools import partial

from benchmarks.cases import cases
from benchmarks.gpu.goals import SECONDS, measure
from benchmarks.units import Context, Unit


def units(context: Context) -> list[Unit]:
    seconds = 0.01 if context.toy else SECONDS
    return [
        Unit(f"{case.name}: {peer}", partial(measure, case, peer, work, seconds), 60)
        for case in list(cases(context.toy))[: 3 if context.toy else None]
        for peer, work in case.peers.items()
        if not (context.toy and peer == "torch.compile")  # a C++ compiler's minutes, not ours
    ]
