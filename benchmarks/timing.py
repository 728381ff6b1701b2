"""Three times of one work: wall, between CUDA events, and of a CUDA graph's replay; all in microseconds.

A work comes as several callables over inputs of their own, which together are more than twice the L2 cache: so none
finds its input there, and no time is spent on flushing between two calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch

from benchmarks.workload import ON_GPU

Work = Callable[[], Any]
LARGEST_ROTATION = 256


def l2_bytes() -> int:
    """Of the current device; 64 MB where PyTorch does not say."""
    return int(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 64 << 20))


def rotations(input_bytes: int) -> int:
    """How many inputs it takes that a later call does not find the first one's in the L2 cache."""
    if not ON_GPU:
        return 1
    cache = l2_bytes()
    return 1 if input_bytes > 2 * cache else min(LARGEST_ROTATION, 1 + -(-2 * cache // max(1, input_bytes)))


def wall(works: Sequence[Work], seconds: float) -> dict[str, float]:
    """Median and half the interquartile range, from the call to the finished result."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    for work in cycle(works):
        began = time.perf_counter()
        work()
        if ON_GPU:
            torch.cuda.synchronize()
        now = time.perf_counter()
        times.append(1e6 * (now - began))
        if len(times) >= 1000 or (now > end and (len(times) >= 3 or now > end + seconds)):
            break
    ordered = sorted(times)
    spread = (ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]) / 2
    return {"wall_us": median(times), "wall_spread_us": spread, "calls": len(times)}


def events(works: Sequence[Work], seconds: float, estimate: float) -> float:
    """Median time on the device between two events around a call; of short works mostly the host's."""
    count = max(3, min(200, int(seconds / max(estimate, 1e-6))))
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    torch.cuda.synchronize()
    for (begin, end), work in zip(marks, cycle(works), strict=False):
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return median(1e3 * begin.elapsed_time(end) for begin, end in marks)


def graph(works: Sequence[Work], seconds: float, estimate: float) -> dict[str, float | str]:
    """``graph_us`` of one call, from replays of a graph of all `works`; or under ``no_graph`` why there is none."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    captured = torch.cuda.CUDAGraph()
    # A short work is captured several times, so that the start of the graph does not count.
    calls = list(islice(cycle(works), max(len(works), min(20, int(2e-3 / max(estimate, 1e-6))))))
    try:
        with torch.cuda.stream(stream):
            # A work that waits is refused here: in a capture it would leave the allocator in a state of capturing.
            torch.cuda.set_sync_debug_mode("error")
            works[0]()
            works[-1]()
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        with torch.cuda.graph(captured, stream=stream):
            for work in calls:
                work()
        captured.replay()
        torch.cuda.synchronize()
    except Exception as error:  # the capture's own errors are of many types
        return {"no_graph": f"{type(error).__name__}: {error}".partition("\n")[0][:200]}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"graph_us": events([captured.replay], seconds, estimate * len(calls)) / len(calls)}


def all_times(works: Sequence[Work], *, seconds: float, capture: bool = True) -> dict[str, Any]:
    """Wall, events and graph, `seconds` each at most, but for works that take longer; the peak of memory of a call."""
    if not ON_GPU:
        return wall(works, seconds)
    for work in (works[0], works[-1]):
        work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    works[0]()
    torch.cuda.synchronize()
    found: dict[str, Any] = {"peak_mb": (torch.cuda.max_memory_allocated() - held) / 2**20}
    found |= wall(works, seconds)
    estimate = found["wall_us"] / 1e6
    found["event_us"] = events(works, seconds, estimate)
    if capture:
        found |= graph(works, seconds, estimate)
    return found
