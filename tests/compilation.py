"""Compile the launches of an operation for a GPU that is not there, and read the machine code.

Runs in its own process without TRITON_INTERPRET (the interpreter and the compiler exclude each other). What is compiled
is what the launcher asked for: `recording` collects its launches on meta tensors, and the argument types and
alignments are derived as Triton's own launcher derives them.
"""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Bytes a block may use.
MAX_SHARED = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    120: 99 * 1024,
    121: 99 * 1024,
}
TENSOR_MEMORY = 512  # columns, of sm_100
# In PTX, each of which becomes one instruction of the machine: HMMA, HGMMA, UTCHMMA and their like.
MATRIX_INSTRUCTION = r"\bmma\.sync\b|\bwgmma\.mma_async\b|\btcgen05\.mma\b"
_TYPES = {
    "torch.float16": "fp16",
    "torch.bfloat16": "bf16",
    "torch.float32": "fp32",
    "torch.float64": "fp64",
    "torch.int32": "i32",
    "torch.int64": "i64",
    "torch.bool": "i1",
}


@dataclass(frozen=True)
class Compiled:
    """One compiled launch."""

    kernel: str
    shared: int  # bytes
    registers: int
    spilled: int  # bytes of stack or local memory
    matrix_instructions: int
    tensor_memory: int  # columns
    traps: int


_compiled: dict[tuple[str, str, int], Compiled] = {}


def compile_launches(case: str, architecture: int) -> list[Compiled]:
    """Compile every launch of ``<module>:<function>``, a function without arguments that calls a launcher."""
    return [_compile(launch, architecture) for launch in _recorded(case, architecture)]


def compile_tiles(cases: Sequence[str], architecture: int, kernels: Sequence[str]) -> list[Compiled]:
    """Compile the first launch of each of `kernels` with each tile, of all that the cases launch."""
    first: dict[tuple[Any, ...], Any] = {}
    for case in cases:
        for launch in _recorded(case, architecture):
            if launch.name in kernels:
                first.setdefault((launch.name, *_sizes(launch)), launch)
    return [_compile(launch, architecture) for launch in first.values()]


def float_operations(case: str, architecture: int) -> dict[str, float]:
    """FFMA and FADD for each element of an accumulator, of each kernel of a case that has a BM × BN tile."""
    found = {}
    for launch in _recorded(case, architecture):
        options = launch.options
        if "BM" in options and "BN" in options:
            with _file_of(_build(launch, architecture).asm["cubin"]) as cubin:
                code = _cuobjdump("-sass", cubin)
            elements = options["BM"] * options["BN"] // (32 * options.get("num_warps", 4))
            found[launch.name] = len(re.findall(r"\b(?:FFMA|FADD)2?\b", code)) / elements
    return found


def compile_for_gfx942(case: str) -> dict[str, tuple[int, int]]:
    """Vector registers spilled and matrix instructions of each kernel of a case, compiled for an AMD GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = {}
    for launch in _recorded(case, 0):
        signature, constexprs, attributes, options = _specialisation(launch)
        source = ASTSource(launch.kernel, signature, constexprs, attributes)
        compiled = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=options)
        code = compiled.asm["amdgcn"]
        (spilled,) = re.findall(r"\.vgpr_spill_count:\s+(\d+)", code)
        found[launch.name] = int(spilled), code.count("v_mfma")
    return found


def specialisations(case: str, architecture: int) -> dict[str, int]:
    """How many different binaries of each kernel the launches of ``<module>:<function>`` need."""
    keys: dict[str, set[str]] = {}
    for launch in _recorded(case, architecture):
        keys.setdefault(launch.name, set()).add(repr(_specialisation(launch)))
    return {kernel: len(distinct) for kernel, distinct in keys.items()}


@functools.lru_cache(64)
def _recorded(case: str, architecture: int) -> list[Any]:
    from apd_kernels.kernels._launch import recording

    module, _, name = case.partition(":")
    function = getattr(importlib.import_module(module), name)
    with recording(architecture) as launches:
        function()
    assert launches, f"{case} launched nothing"
    return launches


def _specialisation(launch: Any) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any], dict[str, Any]]:
    """Signature, constants, attributes and compile options of a launch, as Triton's own launcher derives them."""
    kernel, options = launch.kernel, dict(launch.options)
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    positional = dict(zip(kernel.arg_names, launch.arguments, strict=False))
    for index, parameter in enumerate(kernel.params):
        value = positional.get(parameter.name, options.pop(parameter.name, None))
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constexprs[(index,)] = value
        else:
            signature[parameter.name] = _type(value, (index,), constexprs, attributes, not parameter.do_not_specialize)
    return signature, constexprs, attributes, options


def _build(launch: Any, architecture: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constexprs, attributes, options = _specialisation(launch)
    source = ASTSource(launch.kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def _compile(launch: Any, architecture: int) -> Compiled:
    """Once in a process, whatever cases launch it."""
    name = launch.name
    key = name, repr(_specialisation(launch)), architecture
    if key not in _compiled:
        built = _build(launch, architecture)
        with _file_of(built.asm["cubin"]) as cubin:
            usage = {
                field: int(value)
                for field, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", cubin))
            }
        _compiled[key] = Compiled(
            kernel=name,
            shared=built.metadata.shared,
            registers=usage["REG"],
            spilled=usage["STACK"] + usage["LOCAL"],
            matrix_instructions=len(re.findall(MATRIX_INSTRUCTION, built.asm["ptx"])),
            tensor_memory=getattr(built.metadata, "tmem_size", 0) or 0,
            traps=len(re.findall(r"\btrap;", built.asm["ptx"])),
        )
    return _compiled[key]


def _type(
    value: Any, path: tuple[int, ...], constexprs: dict[Any, Any], attributes: dict[Any, Any], specialize: bool
) -> Any:
    """The signature entry of one run-time argument; None and a specialised 1 become constants, as at launch."""
    if isinstance(value, tuple):  # Triton specialises what is inside a tuple in any case
        return tuple(_type(item, (*path, index), constexprs, attributes, True) for index, item in enumerate(value))
    if value is None or (type(value) is int and specialize and value == 1):
        constexprs[path] = value
        return "constexpr"
    if type(value) is float:
        return "fp32"
    if type(value) is int:
        if specialize and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if hasattr(value, "block_shape"):
        return f"tensordesc<{_TYPES[str(value.base.dtype)]}{list(value.block_shape)}>"
    if specialize:  # the caching allocator aligns every tensor to 512 bytes
        attributes[path] = [["tt.divisibility", 16]]
    return "*" + _TYPES[str(value.dtype)]


@contextmanager
def _file_of(cubin: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        yield file.name


def _cuobjdump(option: str, cubin: str) -> str:
    """``-res-usage`` takes milliseconds, ``-sass`` as long as to compile a kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def _sizes(launch: Any) -> list[int]:
    """Of its tile, and the number of warps."""
    names = ("BM", "BLOCK", "BN", "BD", "BK")
    return [*(launch.options[name] for name in names if name in launch.options), launch.options.get("num_warps", 4)]


def table(cases: Iterable[str], architectures: Iterable[int] = (80, 89, 90, 100, 120)) -> Iterator[str]:
    """Markdown: what the compiler made of every product, of several sets of constants the most registers and so on."""
    yield "| launch | kernel | tile | sm | registers | spilled bytes | shared KB | matrix instructions |"
    yield "|---|---|---|---|---|---|---|---|"
    worst: dict[tuple[str, ...], list[int]] = {}
    for case in cases:
        for architecture in architectures:
            for launch in _recorded(f"production:{case}", architecture):
                *sizes, warps = _sizes(launch)
                compiled = _compile(launch, architecture)
                if compiled.matrix_instructions == 0:
                    continue
                tile = f"{'×'.join(map(str, sizes))}, {warps} warps"
                found = [compiled.registers, compiled.spilled, compiled.shared // 1024, compiled.matrix_instructions]
                key = (case, f"`{compiled.kernel}`", tile, str(architecture))
                worst[key] = [max(pair) for pair in zip(found, worst.get(key, found), strict=True)]
    for key, found in worst.items():
        yield "| " + " | ".join([*key, *map(str, found)]) + " |"


if __name__ == "__main__":  # python tests/compilation.py CASE …
    import sys

    sys.path.insert(0, str(Path(__file__).parent))
    print("\n".join(table(sys.argv[1:])))
