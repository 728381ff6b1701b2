"""Tier 3: the production launches compile for GPUs that are not there and stay inside their budgets.

Every launch is compiled for sm_90. For the others the default run compiles each kernel once with each of its tiles, and
`make test-long` every launch; and for sm_90, variants with other masks, metrics and dtypes. What a launch compiles to
does not change between runs, and a kernel's variants differ in their epilogues.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton")

import compilation
import production
import triton

VERSION = ".".join(triton.__version__.split(".")[:2])

# By Triton version: bytes that a thread may spill, by architecture and kernel; else none. Other versions, which nobody
# has looked at, have no such budget. Measured with 3.6.0, 3.7.1,
# 3.8.0 and 3.9.0. Not measured: kernels without a product but for sm_90 and of 3.8, and under 3.7 sm_86, sm_89, sm_120.
# sm_86 was compiled under 3.8 alone, where its products are as those of sm_89. Versions divide the same registers
# differently. Kernels with more than 24 bytes hold an accumulator of half of the registers; a few bytes appear where
# ptxas stops at 80, 128 or 168 registers to let more programs in.
SPILLED: dict[str, dict[tuple[int, str], int]] = {
    "3.6": {
        (80, "_prepared_distance"): 88,
        (89, "_weigh"): 8,
        (90, "_distance"): 16,
        (90, "_mine"): 16,
        (90, "_mine_triangle"): 40,
        (90, "_prepared_distance"): 24,
        (120, "_distance"): 16,
    },
    "3.7": {
        (80, "_distance"): 40,
        (90, "_distance"): 144,
        (90, "_mine_triangle"): 40,
        (90, "_pair_gradient"): 8,
        (90, "_prepared_distance"): 8,
    },
    "3.8": {
        (86, "_move"): 8,
        (86, "_pair_gradient"): 8,
        (89, "_move"): 8,
        (89, "_pair_gradient"): 8,
        (120, "_collect"): 8,
        (120, "_contrast"): 8,
    },
    "3.9": {
        (89, "_gradient"): 8,
        (90, "_distance"): 184,
        (90, "_group_maxima"): 8,
        (90, "_mine"): 48,
        (90, "_mine_triangle"): 232,
        (90, "_move"): 24,
    },
}


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    """A fresh process without the interpreter; spawned, because a fork would inherit an imported Triton."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()  # the process starts now, with this environment
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
        yield pool


def _name(case: object) -> str:
    return f"production:{case.__name__}"


def _marked(architectures: tuple[int, ...]) -> list[object]:
    """All cases for all architectures, most of them only in the long run."""
    return [
        pytest.param(
            case,
            architecture,
            id=f"{case.__name__}-{architecture}",
            marks=[] if architecture == 90 and case not in production.VARIANTS else pytest.mark.long,
        )
        for case in production.CASES
        for architecture in architectures
    ]


def _within_budget(launch: compilation.Compiled, architecture: int) -> None:
    """No spills but those known of this Triton, shared and tensor memory within the limits, tensor-core instructions
    where there is a matrix product. A tile that asks for too much tensor memory may compile to a trap."""
    allowed = SPILLED.get(VERSION, {}).get((architecture, launch.kernel), 0)
    assert architecture == 100 or VERSION not in SPILLED or launch.spilled <= allowed, launch
    assert launch.shared <= compilation.MAX_SHARED[architecture], launch
    assert launch.tensor_memory <= compilation.TENSOR_MEMORY, launch
    assert launch.traps == 0, launch
    assert launch.matrix_instructions > 0 or launch.kernel not in production.MATRIX_KERNELS, launch


@pytest.mark.parametrize(("case", "architecture"), _marked((80, 86, 89, 90, 100, 120)))
def test_budget(compiler: ProcessPoolExecutor, case: object, architecture: int) -> None:
    launches = compiler.submit(compilation.compile_launches, _name(case), architecture).result()
    assert launches
    for launch in launches:
        _within_budget(launch, architecture)


@pytest.mark.parametrize("architecture", [80, 89, *(pytest.param(it, marks=pytest.mark.long) for it in (100, 120))])
@pytest.mark.parametrize("part", [0, 1])
def test_every_tile(compiler: ProcessPoolExecutor, part: int, architecture: int) -> None:
    """One launch of each kernel with a matrix product and each of its tiles, of every second kernel at a time.

    sm_100 has no budget of registers. sm_86 compiles to what sm_89 does."""
    kernels = sorted(production.MATRIX_KERNELS)[part::2]
    cases = [_name(case) for case in production.CASES]
    launches = compiler.submit(compilation.compile_tiles, cases, architecture, kernels).result()
    assert {launch.kernel for launch in launches} == set(kernels)
    for launch in launches:
        _within_budget(launch, architecture)


@pytest.mark.parametrize("architecture", [80, 90])
def test_chunks_are_promoted(compiler: ProcessPoolExecutor, architecture: int) -> None:
    """Split products multiply-add their chunks into registers: an element of the accumulator takes one operation there
    and one that adds the small products. A compiler that accumulates in the tensor core leaves only the second."""
    case = _name(production.split_dot_products)
    operations = compiler.submit(compilation.float_operations, case, architecture).result()
    assert operations["_prepared_distance"] >= 2
    assert operations["_mine"] >= 3  # and one for the key


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.__name__, marks=[] if case in production.ON_AMD_SOON else pytest.mark.long)
        for case in production.ON_AMD
    ],
)
def test_compiles_for_amd(compiler: ProcessPoolExecutor, case: object) -> None:
    """gfx942, with the conservative tiles: compiles, not run."""
    for kernel, (spilled, matrix_instructions) in (
        compiler.submit(compilation.compile_for_gfx942, _name(case)).result().items()
    ):
        assert spilled == 0, kernel
        assert matrix_instructions > 0 or kernel not in production.MATRIX_KERNELS, kernel


@pytest.mark.parametrize("case", production.OVER_SIZES, ids=lambda case: case.__name__)
def test_one_binary_for_all_batch_sizes(compiler: ProcessPoolExecutor, case: object) -> None:
    """Batch sizes 1 to 300 run the same binary of every kernel: a new size never compiles."""
    counts = compiler.submit(compilation.specialisations, _name(case), 90).result()
    assert set(counts.values()) == {1}, counts
