"""Stage "sanitizer": compute-sanitizer over one small call a kernel, several processes at once.

memcheck finds accesses outside of an allocation; the caching allocator would hide them inside its blocks, so it is off.
racecheck finds shared memory that two threads use without a barrier between them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from benchmarks.lines import ROOT
from benchmarks.units import Context, Skip, Unit

MEMCHECKED_AT_ONCE = 6
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")


def units(context: Context) -> list[Unit]:
    if context.toy:
        return [Unit("compute-sanitizer", partial(_skip, "a rehearsal without a GPU"))]
    tool = find_tool()
    if tool is None:
        return [Unit("compute-sanitizer", partial(_skip, "compute-sanitizer is neither on the PATH nor with CUDA"))]
    from benchmarks.calls import RACING, calls

    limit = max(5.0, context.left() - 3)
    names = list(calls())
    parts = [names[i::MEMCHECKED_AT_ONCE] for i in range(MEMCHECKED_AT_ONCE)]
    checks = [("memcheck", part, "") for part in parts]
    checks += [("racecheck", [name], kernel) for kernel, name in RACING.items()]
    return [Unit("all checks", partial(_all, context, tool, checks, limit), limit + 3)]


def find_tool() -> str | None:
    """compute-sanitizer of the PATH or of the CUDA toolkit."""
    folders = [os.path.join(home, "bin") for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders, *PLACES]))


def _skip(reason: str) -> dict[str, Any]:
    raise Skip(reason)


def _all(context: Context, tool: str, checks: list[tuple[str, list[str], str]], limit: float) -> dict[str, Any]:
    """Every check is a line of its own; this one counts them."""
    done = context.done()
    described = subprocess.run([tool, "--help"], capture_output=True, text=True, check=False, timeout=30).stdout
    named = {f"{kind} {kernel or ', '.join(names)}": (kind, names, kernel) for kind, names, kernel in checks}
    left = {name: check for name, check in named.items() if name not in done}

    def run(name: str) -> str:
        found = check(tool, described, *left[name], limit)
        context.results.append(context.stage, name, **found)
        return str(found["status"])

    with ThreadPoolExecutor(len(checks)) as pool:
        statuses = list(pool.map(run, left))
    return {"checks": len(named), "failed": statuses.count("failed")}


def check(tool: str, described: str, kind: str, names: list[str], kernel: str, limit: float) -> dict[str, Any]:
    """One process under compute-sanitizer; "failed" where it reports errors, "skipped" where it cannot look."""
    command = [tool, "--tool", kind, "--error-exitcode", "9"]
    if "--launch-timeout" in described:  # it waits 10 seconds for CUDA to be used; importing PyTorch may take longer
        command += ["--launch-timeout", "120"]
    # Which kernels are looked at, where this version can choose: PyTorch's own take most of the time.
    chosen = ["--kernel-name", f"kns={kernel}"] if kernel and "--kernel-name " in described else []
    began = time.time()
    found = _looked(command + chosen, names, limit)
    if chosen and found["status"] == "skipped":  # this version may write the choice in another way
        found = _looked(command, names, max(1.0, began + limit - time.time()))
    return {"calls": names, "kernel": kernel, "seconds": round(time.time() - began, 1), **found}


def _looked(command: list[str], names: list[str], limit: float) -> dict[str, Any]:
    calls = [sys.executable, "-m", "benchmarks.calls", *names]
    try:
        run = subprocess.run(
            [*command, *calls],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as over:
        text = over.stdout.decode(errors="replace") if isinstance(over.stdout, bytes) else str(over.stdout or "")
        return {"status": "hung", "reached": _reached(text), "log": text[-1500:]}
    return verdict(run.returncode, run.stdout)


def verdict(code: int, text: str) -> dict[str, Any]:
    """What the tool said. An end without its summary is none: it may not support the device."""
    summary = re.findall(r"={5,} (?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    if not summary or re.search(r"Device not supported|Unable to find injection|Failed to initialize", text):
        reason = "compute-sanitizer could not look"
        return {"status": "skipped", "reason": reason, "code": code, "log": text[-1500:]}
    if re.match(r"0 (errors|hazards)", summary[-1]) and "call: done" in text:
        return {"status": "ok", "summary": summary[-1]}
    first = re.search(r"={5,} (?:Invalid|Error|Race|Program|Uninit|Barrier).*(?:\n.*){0,12}", text)
    found = {"summary": summary[-1], "error": summary[-1], "reached": _reached(text), "code": code}
    return {"status": "failed", **found, "log": first.group()[:1500] if first else text[-1500:]}


def _reached(text: str) -> str:
    """The call under way at the end."""
    return (re.findall(r"^call: (.*)", text, re.MULTILINE) or [""])[-1]
