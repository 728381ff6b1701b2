"""Everything that a GPU has to say about the kernels, in ten minutes: ``python -m benchmarks.gpu --minutes 10``.

Needs a Python with torch, triton, pytest, pytest-xdist and pytest-benchmark; no network. In this order:

    first        versions, what the card reaches, torch.compile(fullgraph=True) of every training operation
    correctness  the tests marked `gpu`, the riskiest kernels first
    grade        root mean square errors of float32-grade products, beside float32 products of the same rows
    sanitizer    compute-sanitizer: memcheck of every kernel, racecheck of those whose programs wait for each other
    goals        times of every operation beside the goal
    tiles        other tiles where the table of tiles holds an estimate
    peers        the same work in eager PyTorch, torch.compile, torch.cdist, pytorch-metric-learning

With ``--faiss`` instead: the gallery on a GPU against the CPU.

Each stage runs in a process of its own until its share of the minutes is over; what it leaves is the next one's. A unit
that crashes or hangs is recorded, and the stage goes on behind it in a new process. Results are lines of JSON in
``OUTPUT/results.jsonl``; a second call with the same device, versions and source runs what is missing.
``python -m benchmarks.report OUTPUT/results.jsonl --into docs/gpu.md`` makes the tables. ``--toy`` runs every stage
at toy sizes in Triton's interpreter: a rehearsal without a GPU, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.lines import BAD, ENDED, ROOT, Results, source_hash
from benchmarks.units import LOST_DEVICE

TEN_MINUTES = 600.0
RESERVE = 10.0  # seconds of the ten minutes in which nothing runs any more: starting, ending, the summary
START = "(before or between units)"
TOY_DEVICE = "no GPU: a rehearsal in Triton's interpreter"


@dataclass(frozen=True)
class Stage:
    name: str
    until: float  # seconds after the start of a call of ten minutes
    folders: tuple[str, ...]  # whose source its results depend on
    module: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "module", self.module or f"benchmarks.gpu.{self.name}")


MEASURING = ("apd_kernels", "benchmarks")
STAGES = (
    Stage("first", 40, MEASURING),
    Stage("correctness", 170, ("apd_kernels", "tests")),
    Stage("grade", 220, MEASURING),
    Stage("sanitizer", 330, MEASURING),
    Stage("goals", 460, MEASURING),
    Stage("tiles", 570, MEASURING),
    Stage("peers", 590, MEASURING),
)
FAISS = Stage("faiss", 590, MEASURING)

_PROBE = """
import json, torch, triton
from apd_kernels._core.backend import HAS_TRITON, missing_triton
assert torch.cuda.is_available(), "torch.cuda.is_available() is False"
assert HAS_TRITON, missing_triton()
card = "{} (sm_{}{})".format(torch.cuda.get_device_name(), *torch.cuda.get_device_capability())
print(json.dumps(f"{card}; torch {torch.__version__}, triton {triton.__version__}"))
"""


class NoDevice(RuntimeError):
    """There is no GPU that could be measured."""


def device_here() -> str:
    """Name and versions, asked in another process: this one never touches the GPU."""
    command = [sys.executable, "-c", _PROBE]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment())
    except subprocess.TimeoutExpired as error:
        raise NoDevice("the GPU did not answer for 120 seconds") from error
    if run.returncode:
        raise NoDevice((run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1])
    return str(json.loads(run.stdout.strip().splitlines()[-1]))


def toy_device() -> str:
    return f"{TOY_DEVICE}; torch {metadata.version('torch')}, triton {metadata.version('triton')}"


def environment(*, toy: bool = False, output: Path | None = None) -> dict[str, str]:
    """Of every process: this checkout first on the path, no tiles that were measured here before, no other backend."""
    names = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for name in ("TRITON_INTERPRET", "APD_KERNELS_BACKEND"):
        names.pop(name, None)
    names["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    if output is not None:
        names["APD_KERNELS_CACHE"] = str(output.resolve() / "tiles")
    if toy:
        names |= {"TRITON_INTERPRET": "1", "APD_KERNELS_BACKEND": "triton"}
        names |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return names


class Run:
    """One call: its results, its log, its stages one after another."""

    def __init__(self, device: str, output: Path, *, toy: bool = False, retry: float = 0.0) -> None:
        self.device, self.output, self.toy, self.retry = device, output, toy, retry
        self.log = output / "run.log"
        output.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        self._read: tuple[int, list[dict[str, Any]]] = (-1, [])

    def results(self, stage: Stage) -> Results:
        return Results(self.output / "results.jsonl", self.device, source_hash(stage.folders))

    def stage(self, stage: Stage, deadline: float) -> None:
        """Run it until it is finished or `deadline`, with a new process behind each crash."""
        results = self.results(stage)
        if "" in results.ended(stage.name) and not self.retry:
            print(f"{stage.name}: finished by an earlier call", flush=True)
            return
        began = time.time()
        while time.time() < deadline:
            started = time.time()
            code = self._process(stage, results, deadline)
            if code == 0:
                if START in results.last(stage.name):
                    results.append(stage.name, START, "ok")
                results.append(stage.name, "", "ok", seconds=round(time.time() - began, 1))
            if not code:
                break
            if not any(line["status"] in ENDED and line["unit"] != START for line in self._since(results, started)):
                break  # it does not even start
        self._summary(stage, results)

    def _process(self, stage: Stage, results: Results, deadline: float) -> int | None:
        """Start the stage's process and watch it; its exit status, None where its time was over."""
        started = time.time()
        command = [sys.executable, "-c", "from benchmarks.units import main; main()", stage.name, stage.module]
        command += ["--results", str(results.path.resolve()), "--device", results.device, "--source", results.source]
        command += ["--deadline", str(deadline), "--retry", str(self.retry), *["--toy"] * self.toy]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd=ROOT,
                env=environment(toy=self.toy, output=self.output),
            )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                now, unit = time.time(), self._current(results, started)
                late = now >= deadline
                if late or (unit is not None and now - unit["time"] > unit["limit"]):
                    self._end(process)
                    name = START if unit is None else unit["unit"]
                    seconds = round(now - (started if unit is None else unit["time"]), 1)
                    results.append(stage.name, name, "cut" if late else "hung", seconds=seconds, log=self._tail())
                    return None if late else -signal.SIGKILL
        finally:
            self._end(process)
        code, unit = process.returncode, self._current(results, started)
        if code and (unit is not None or code != LOST_DEVICE):
            name = START if unit is None else unit["unit"]
            results.append(stage.name, name, "crashed", code=code, log=self._tail())
        return code

    def _since(self, results: Results, started: float) -> list[dict[str, Any]]:
        """Lines since `started`, which are of one stage."""
        size = results.path.stat().st_size if results.path.exists() else 0
        if size != self._read[0]:
            self._read = size, [line for line in results.read() if line["time"] >= started]
        return [line for line in self._read[1] if line["time"] >= started]

    def _current(self, results: Results, started: float) -> dict[str, Any] | None:
        """The unit that has begun in this process and has not ended."""
        begun: dict[str, dict[str, Any]] = {}
        for line in self._since(results, started):
            if line["status"] == "begun":
                begun[line["unit"]] = line
            else:
                begun.pop(line["unit"], None)
        return next(reversed(begun.values()), None)

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        """The process with all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            print(f"process {process.pid} does not end; going on without it", flush=True)

    def _tail(self) -> str:
        """The end of the log, for a line about what went wrong."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 1500))
            return log.read().decode(errors="replace")

    def _summary(self, stage: Stage, results: Results) -> None:
        last = {unit: line for unit, line in results.last(stage.name).items() if unit}
        counts: dict[str, int] = {}
        for line in last.values():
            counts[line["status"]] = counts.get(line["status"], 0) + 1
        print(f"{stage.name}: " + (", ".join(f"{n} {status}" for status, n in counts.items()) or "nothing"), flush=True)
        for unit, line in last.items():
            if line["status"] in BAD:
                text = str(line.get("error") or line.get("message") or line.get("log") or "")
                print(f"    {line['status']}: {unit}: {text.strip()[-200:]}", flush=True)


def run(here: Run, stages: Sequence[Stage], start: float, minutes: float) -> bool:
    """Whether nothing went wrong. What was not reached is no fault: the next call goes on there."""
    scale = (60 * minutes - RESERVE * min(1.0, minutes)) / (TEN_MINUTES - RESERVE)
    for stage in stages:
        here.stage(stage, start + scale * stage.until)
    last = {stage.name: here.results(stage).last(stage.name) for stage in stages}
    unfinished = [name for name, lines in last.items() if "" not in lines]
    print(f"{time.time() - start:.0f} s; results: {here.output / 'results.jsonl'}", flush=True)
    if unfinished:
        print(f"not finished: {', '.join(unfinished)}; the same command goes on there", flush=True)
    return not any(line["status"] in BAD for lines in last.values() for line in lines.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything; the stages share them (10)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of results and log (runs/gpu)")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", choices=[s.name for s in STAGES], help="these alone")
    parser.add_argument("--faiss", action="store_true", help="the gallery on a GPU alone; needs faiss-gpu")
    parser.add_argument("--retry", action="store_true", help="run again what failed, crashed or hung before")
    parser.add_argument("--toy", action="store_true", help="toy sizes in Triton's interpreter, without a GPU")
    given = parser.parse_args(arguments)
    start = time.time()
    if not given.minutes > 0:
        parser.error(f"--minutes: expected a positive number, got {given.minutes}")
    try:
        device = toy_device() if given.toy else device_here()
    except NoDevice as error:
        print(f"This measures a GPU, and there is none to use ({error}).", file=sys.stderr)
        print("A rehearsal without one: python -m benchmarks.gpu --toy", file=sys.stderr)
        return 2
    print(device, flush=True)
    stages = [FAISS] if given.faiss else [s for s in STAGES if given.stages is None or s.name in given.stages]
    # A stage that is asked for by name takes the time of those left out.
    if given.stages is not None:
        stages = [Stage(s.name, FAISS.until * (i + 1) / len(stages), s.folders) for i, s in enumerate(stages)]
    # Ended from outside, the processes of the stage end too.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        here = Run(device, given.output, toy=given.toy, retry=start if given.retry else 0.0)
        return 0 if run(here, stages, start, given.minutes) else 1
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
