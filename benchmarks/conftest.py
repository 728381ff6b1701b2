"""One way to time for every suite.

A candidate's result is first compared with a float64 reference: a wrong result fails and is never timed. Wall time is
what pytest-benchmark reports, from the call to the finished result (the device is synchronised). Beside it stands the
peak of memory during one call, above what was held before: of PyTorch's allocator, and on a CPU of the whole process,
whichever is more; of work of more than a second the latter alone. Work of more than ten seconds is timed once. On CUDA
two times between events, with the L2 cache flushed before each run, are recorded too: of the call, and of a replay of
the CUDA graph that a call is captured in, which is the device's work without Python's.

The candidate "floor" is the work that no implementation can leave out: the product or the copy, as PyTorch does it.
Nothing is compared where `expected` is empty: a floor, or a result that the suite has checked itself.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.workload import ON_GPU

_SLOW = 10.0  # seconds
_PROFILED = 1.0  # seconds: the profile of a Python loop over 3,848 images took 20 GB
_RESET = Path("/proc/self/clear_refs")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the table's heading says: device and versions."""
    import apd_kernels._core.backend as backend

    machine_info["device"] = (
        torch.cuda.get_device_name() if ON_GPU else f"{processor()}, {torch.get_num_threads()} threads"
    )
    machine_info["torch"] = torch.__version__
    if backend.HAS_TRITON:
        import triton

        machine_info["triton"] = triton.__version__


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@pytest.fixture(autouse=True)
def _plain_state() -> None:
    """Each benchmark starts without compiled graphs, cached memory or another one's random state."""
    torch.manual_seed(0)
    torch.compiler.reset()
    if ON_GPU:
        torch.cuda.empty_cache()


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Callable[..., None]:
    """``measure(work, title=…, candidate=…, expected=…, tolerance=…)`` checks `work()`, then times it."""

    def run(
        work: Callable[[], Tensor | tuple[Tensor, ...]],
        *,
        title: str,
        candidate: str,
        expected: tuple[Tensor, ...],
        tolerance: float,
    ) -> None:
        if candidate == "floor":
            expected = ()
        if candidate == "compile" and not ON_GPU and not (shutil.which("g++") or shutil.which("clang++")):
            pytest.skip("torch.compile on the CPU needs a C++ compiler")
        began = time.perf_counter()
        got = work()
        seconds = time.perf_counter() - began
        got = got if isinstance(got, tuple) else (got,)
        for value, reference in zip(got if expected else (), expected, strict=True):
            error = (value.detach().double() - reference.double()).abs().max().item()
            assert error <= tolerance * max(1.0, reference.abs().max().item()), f"{candidate} is off by {error:.3g}"

        def finished() -> None:
            work()
            if ON_GPU:
                torch.cuda.synchronize()

        benchmark.group = title
        benchmark.extra_info["candidate"] = candidate
        if ON_GPU:
            import triton

            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            finished()
            benchmark.extra_info["peak_mb"] = (torch.cuda.max_memory_allocated() - held) / 2**20
            benchmark.extra_info["event_ms"] = triton.testing.do_bench(work, return_mode="median")
        else:
            benchmark.extra_info["peak_mb"] = max(
                _resident_peak(finished), _allocated_peak(finished) if seconds < _PROFILED else 0.0
            )
        if seconds > _SLOW:
            benchmark.pedantic(finished, rounds=1)
        else:
            benchmark(finished)
        if ON_GPU:
            benchmark.extra_info.update(_replayed(work, candidate))

    return run


def _replayed(work: Callable[[], object], candidate: str) -> dict[str, float | str]:
    """``graph_ms`` of `work` as a CUDA graph, or under ``no_graph`` the reason why it cannot be captured."""
    import triton

    if candidate == "faiss":
        return {"no_graph": "FAISS ends the process where it would wait for the device during a capture"}
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            # A work that waits is refused here: in a capture it would leave the allocator in a state of capturing.
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(3):
                work()
            torch.cuda.set_sync_debug_mode("default")
            with torch.cuda.graph(graph, stream=stream):
                work()
    except RuntimeError as error:
        return {"no_graph": str(error).partition("\n")[0]}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"graph_ms": triton.testing.do_bench(graph.replay, return_mode="median")}


def _resident_peak(work: Callable[[], None]) -> float:
    """MB by which the process grew at most during `work`: NumPy's and FAISS's too, but not what was free already."""
    if not _RESET.exists():  # Linux alone has it
        work()
        return 0.0
    _RESET.write_text("5")  # the peak is now what is there
    before = _highest_resident()
    work()
    return _highest_resident() - before


def _highest_resident() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def _allocated_peak(work: Callable[[], None]) -> float:
    """MB that PyTorch's allocator on the CPU held at most during `work`, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20
