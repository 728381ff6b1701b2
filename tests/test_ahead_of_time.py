"""Tier 3: the production launches compile for sm_80, sm_90 and sm_100 and stay inside their budgets, without a GPU."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton")

import compilation
import production


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    """A fresh process without the interpreter; spawned, because a fork would inherit an imported Triton."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()  # the process starts now, with this environment
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
        yield pool


def _compiled(compiler: ProcessPoolExecutor, case: object, architecture: int) -> list[compilation.Compiled]:
    return compiler.submit(compilation.compile_launches, f"production:{case.__name__}", architecture).result()


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("case", production.CASES, ids=lambda case: case.__name__)
def test_budget(compiler: ProcessPoolExecutor, case: object, architecture: int) -> None:
    """No spills, shared memory within the limit, tensor-core instructions where there is a matrix product."""
    for launch in _compiled(compiler, case, architecture):
        assert launch.spilled == 0, launch
        assert launch.shared <= compilation.MAX_SHARED[architecture], launch
        if launch.kernel in production.MATRIX_KERNELS:
            assert launch.matrix_instructions > 0, launch


@pytest.mark.parametrize("architecture", [80, 90])
def test_chunks_are_promoted(compiler: ProcessPoolExecutor, architecture: int) -> None:
    """Split products multiply-add their chunks into registers: an element of the accumulator takes one operation there
    and one that adds the small products. A compiler that accumulates in the tensor core leaves only the second."""
    launches = _compiled(compiler, production.split_dot_products, architecture)
    operations = {launch.kernel: launch.float_operations / launch.tile for launch in launches if launch.tile}
    assert operations["_prepared_distance"] >= 2
    assert operations["_mine"] >= 3  # and one for the key


@pytest.mark.parametrize("case", production.CASES, ids=lambda case: case.__name__)
def test_compiles_for_blackwell(compiler: ProcessPoolExecutor, case: object) -> None:
    """sm_100: compiles, not run. Products of prepared rows use the tensor cores: a tile that asks for too much tensor
    memory compiles to a trap."""
    launches = _compiled(compiler, case, 100)
    assert launches
    assert all(launch.matrix_instructions for launch in launches if launch.kernel.startswith("_prepared"))


@pytest.mark.parametrize("case", production.ON_AMD, ids=lambda case: case.__name__)
def test_compiles_for_amd(compiler: ProcessPoolExecutor, case: object) -> None:
    """gfx942, with the conservative tiles: compiles, not run."""
    for kernel, (spilled, matrix_instructions) in (
        compiler.submit(compilation.compile_for_gfx942, f"production:{case.__name__}").result().items()
    ):
        assert spilled == 0, kernel
        assert matrix_instructions > 0 or kernel not in production.MATRIX_KERNELS, kernel


@pytest.mark.parametrize("case", production.OVER_SIZES, ids=lambda case: case.__name__)
def test_one_binary_for_all_batch_sizes(compiler: ProcessPoolExecutor, case: object) -> None:
    """Batch sizes 1 to 300 run the same binary of every kernel: a new size never compiles."""
    counts = compiler.submit(compilation.specialisations, f"production:{case.__name__}", 90).result()
    assert set(counts.values()) == {1}, counts
