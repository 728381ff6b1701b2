"""Backends and devices for every test.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is imported: here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# With AMX oneDNN's bfloat16 convolutions of maps of 2×1 return NaN now and then (torch 2.14.1; never without AMX).
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import torch._dynamo  # before torch.empty is patched: it finds functions by identity

from apd_kernels import use_backend
from apd_kernels._core.backend import HAS_TRITON, INTERPRETED

if HAS_TRITON and INTERPRETED:
    import interpreter

    interpreter.mend()

_without_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


# The files that take longest (the first three minutes, the others one or less): with ``--dist loadfile`` a worker takes
# a whole file, so that what its tests share is made once, and both workers end together if these come first.
LONGEST = (
    "test_ahead_of_time.py",
    "test_gpu_run.py",
    "test_ranking.py",
    "test_neighbors.py",
    "test_adversarial_solver.py",
    "test_adversarial.py",
    "test_prepared.py",
    "test_training_distributed.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `long` run where ``-m`` asks for them; gpu tests where there is a device, and are skipped where they
    are asked for without one. The longest files come first."""
    asked = config.option.markexpr
    left_out = [] if "long" in asked else [item for item in items if item.get_closest_marker("long")]
    if not torch.cuda.is_available():
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        if "gpu" in asked:
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        else:
            left_out += gpu
    config.hook.pytest_deselected(items=left_out)
    gone = set(left_out)
    items[:] = [item for item in items if item not in gone]
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@dataclass(frozen=True)
class Backend:
    name: str
    device: str

    @property
    def interpreted(self) -> bool:
        return self.name == "triton" and self.device == "cpu"


@pytest.fixture(
    params=[
        pytest.param(Backend("torch", "cpu"), id="torch"),
        pytest.param(Backend("triton", "cpu"), id="interpreter", marks=_without_triton),
        pytest.param(Backend("triton", "cuda"), id="triton-cuda", marks=[pytest.mark.gpu, _without_triton]),
        pytest.param(Backend("torch", "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Runs the test once per implementation; inside it, that implementation is named, so nothing falls back."""
    chosen: Backend = request.param
    if chosen.interpreted and torch.cuda.is_available():
        pytest.skip("the interpreter is used where there is no CUDA device")
    with use_backend(chosen.name):
        yield chosen


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty is full of NaN (integers: a large value), so an element that a kernel forgets shows."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        result = allocate(*args, **kwargs)
        if (
            isinstance(result, torch.Tensor)
            and result.device.type in ("cpu", "cuda")
            and not torch.compiler.is_compiling()
        ):
            if result.is_floating_point():
                result.fill_(float("nan"))
            elif result.dtype != torch.bool:
                result.fill_(torch.iinfo(result.dtype).max // 2)
        return result

    return poisoned


@pytest.fixture
def real_data() -> Path:
    """The folder named by APD_TEST_DATA: real Re-ID features and outputs of other projects; never part of this one."""
    folder = os.environ.get("APD_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("APD_TEST_DATA does not name the folder with real Re-ID data")
    return Path(folder)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny networks: more threads wait for one another, and sums in another order are other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
