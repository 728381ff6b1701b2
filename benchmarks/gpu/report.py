"""Tables of what `benchmarks.gpu` recorded, one section a device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.__main__ import FAISS, STAGES, START, TOY_DEVICE
from benchmarks.lines import BAD, read

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
GOAL_NAMES = {"wall_us": "wall", "event_us": "events", "graph_us": "graph", "times_floor": "× floor"}
Lines = dict[str, dict[str, Any]]  # the last line of each unit


def tables(path: Path, *, toy: bool = True) -> str:
    """Markdown. Without `toy`, lines of a rehearsal are left out.

    Raises:
        ValueError: no lines are left.
    """
    devices: dict[str, list[dict[str, Any]]] = {}
    for line in read(path):
        if toy or not line["device"].startswith(TOY_DEVICE):
            devices.setdefault(line["device"], []).append(line)
    if not devices:
        raise ValueError(f"results: expected lines of a GPU in {path}, found none")
    return "\n\n".join("\n".join(_section(device, lines)) for device, lines in devices.items())


def _section(device: str, lines: list[dict[str, Any]]) -> Iterator[str]:
    stages = {stage.name: _latest(lines, stage.name) for stage in (*STAGES, FAISS)}
    day = time.strftime("%Y-%m-%d", time.gmtime(max(line["time"] for line in lines)))
    yield f"## {device}"
    yield ""
    yield f"{day}. {_machine(stages['first'])}".strip()
    yield ""
    yield "| stage | ok | failed | crashed or hung | skipped | not reached | finished |"
    yield "|---|---|---|---|---|---|---|"
    for name, found in stages.items():
        if found:
            yield _counts(name, found)
    for heading, table in (
        ("Times", _times(stages["goals"], stages["peers"])),
        ("Root mean square errors of float32-grade products", _grade(stages["grade"])),
        ("Tiles", _tiles(stages["tiles"])),
        ("FAISS", _faiss(stages["faiss"])),
        ("What did not end well", _faults(stages)),
    ):
        rows = list(table)
        if rows:
            yield from ("", f"### {heading}", "", *rows)


def _latest(lines: list[dict[str, Any]], stage: str) -> Lines:
    """Of the state of the source that was measured last; older ones are of other kernels."""
    own = [line for line in lines if line["stage"] == stage]
    return {line["unit"]: line for line in own if line["source"] == own[-1]["source"]}


def _machine(first: Lines) -> str:
    versions, ceilings = (first.get(unit, {}) for unit in ("versions", "ceilings"))
    parts = []
    if versions.get("driver"):
        parts.append(f"Driver, clock now, highest clock, power limit: {versions['driver']}.")
    if "copy_tb_s" in ceilings:
        products = ", ".join(f"{name} {ceilings[f'product_{name}_tflop_s']:.0f}" for name in ("fp32", "tf32", "fp16"))
        parts.append(f"A copy moves {ceilings['copy_tb_s']:.2f} TB/s; PyTorch's products, TFLOP/s: {products}.")
    return " ".join(parts)


def _counts(name: str, found: Lines) -> str:
    counts: dict[str, int] = {}
    for unit, line in found.items():
        if unit not in ("", START):
            counts[line["status"]] = counts.get(line["status"], 0) + 1
    numbers = [
        counts.get("ok", 0),
        counts.get("failed", 0),
        counts.get("crashed", 0) + counts.get("hung", 0),
        counts.get("skipped", 0),
        counts.get("cut", 0) + counts.get("begun", 0),
        "yes" if "" in found else "no",
    ]
    return f"| {name} | {' | '.join(map(str, numbers))} |"


def _times(goals: Lines, peers: Lines) -> Iterator[str]:
    rows = [line for line in goals.values() if "wall_us" in line]
    if not rows:
        return
    yield (
        "Microseconds, medians. Wall: from the call to the finished result. Events: on the device, between two events. "
        "Graph: of a CUDA graph's replay, a call. Inputs rotate where they would stay in the L2 cache. "
        "Floor: the product or the copy alone, by events. Goals are for one H100 80GB. Peers: events, on the wall "
        "where there are none."
    )
    yield ""
    yield "| operation | wall | events | graph | goal | reached | floor | peers |"
    yield "|---|---|---|---|---|---|---|---|"
    for line in rows:
        cells = [f"{_number(line['wall_us'])} ± {line['wall_spread_us']:.2g}"]
        cells += [_number(line.get(name)) for name in ("event_us", "graph_us")]
        goal = line.get("goal") or {}
        cells.append(", ".join(f"{GOAL_NAMES[name]} {_number(value)}" for name, value in goal.items()) or "–")
        cells.append(", ".join(_reached(line.get(name), value) for name, value in goal.items()) or "–")
        cells.append(_number(line.get("floor_us")))
        others = [peer for peer in peers.values() if peer.get("case") == line["unit"] and "wall_us" in peer]
        shown = (f"{peer['candidate']} {_number(peer.get('event_us', peer['wall_us']))}" for peer in others)
        cells.append(", ".join(shown) or "–")
        yield f"| {line['unit']} | {' | '.join(cells)} |"
    reasons = {line["unit"]: line["no_graph"] for line in rows if "no_graph" in line}
    if reasons:
        yield ""
        yield "Without a graph: " + "; ".join(f"{unit} ({reason})" for unit, reason in reasons.items()) + "."


def _reached(value: float | None, goal: float) -> str:
    if value is None:
        return "not measured"
    return "yes" if value <= goal else f"{value / goal:.1f}× as long"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}".replace(",", " ") if value >= 1000 else f"{value:.3g}"


def _grade(found: Lines) -> Iterator[str]:
    rows = [line for line in found.values() if "ours_rms" in line]
    if not rows:
        return
    yield "Relative to ‖x‖‖y‖ and the like; beside it the same from PyTorch's float32 product of the same rows."
    yield ""
    yield "| product | rows | ours | float32 | no larger |"
    yield "|---|---|---|---|---|"
    for line in rows:
        kind = "centred" if line["centred"] else "plain"
        good = "yes" if line["ours_rms"] <= line["float32_rms"] else "**no**"
        yield f"| {line['unit']} | {kind} | {line['ours_rms']:.1e} | {line['float32_rms']:.1e} | {good} |"


def _tiles(found: Lines) -> Iterator[str]:
    rows = [line for line in found.values() if "table_ms" in line]
    if not rows:
        return
    yield (
        "Milliseconds by events. Noise: between two measurements of the table's tile. A candidate whose result was "
        "wrong has no time."
    )
    yield ""
    yield "| kernel | row | the table's | ms | noise | the best other | ms | tried | refused | wrong |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for line in rows:
        best, others = line["best"], line["others"]
        cells = [_options(line["table"]), f"{line['table_ms']:.3g}", f"{line['noise']:.1%}"]
        cells += ["–", "–"] if best is None else [_options(best["options"]), f"{best['ms']:.3g}"]
        refused = sum("refused" in other for other in others)
        wrong = sum("refused" not in other and "ms" not in other for other in others)
        yield f"| {line['kernel']} | {line['row']} | {' | '.join(cells)} | {len(others)} | {refused} | {wrong} |"


def _options(options: dict[str, int]) -> str:
    sizes = "×".join(str(options[name]) for name in ("BM", "BN", "BD", "BK") if name in options)
    return f"{sizes}, {options['num_warps']} warps, {options['num_stages']} stages"


def _faiss(found: Lines) -> Iterator[str]:
    rows = [line for line in found.values() if "same_bits" in line]
    if not rows:
        return
    yield "| search | CPU ms | GPU ms | the same bits | nearer rows missed |"
    yield "|---|---|---|---|---|"
    for line in rows:
        times = " | ".join(_number(line.get(name)) for name in ("cpu_ms", "cuda_ms"))
        yield f"| {line['unit']} | {times} | {'yes' if line['same_bits'] else '**no**'} | {line['missed']} |"


def _faults(stages: dict[str, Lines]) -> Iterator[str]:
    for name, found in stages.items():
        for unit, line in found.items():
            if line["status"] not in (*BAD, "skipped") or (line["status"] == "skipped" and "::" in unit):
                continue
            ends = str(line.get("log") or "").strip().splitlines()[-1:]
            text = line.get("error") or line.get("message") or line.get("reason") or " ".join(ends) or "no message"
            text = str(text).replace("|", "/").replace("`", "'").replace("<", "‹")
            yield f"- {name}, {unit}: {line['status']}: {text[:300]}"
