"""`benchmarks.gpu` without a GPU: a rehearsal of every stage, and stages that crash, hang, fail or are cut off."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import calls, lines, recorder, report
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import sanitizer as gpu_sanitizer
from benchmarks.gpu.__main__ import FAISS, STAGES, Run, Stage
from benchmarks.units import Context, run_units

MODULES = {
    # Each unit is a line; what it does when it is run.
    "good": 'return {"answer": 42}',
    "wrong": 'raise ValueError("off by 1")',
    "skipping": 'raise Skip("no such tool")',
    "killing": "os._exit(139)",
    "hanging": "time.sleep(1000)",
    "losing": "os._exit(75)",
    "leaving": 'subprocess.Popen(["sleep", "1000"]); time.sleep(1000)',
}


def stage_of(folder: Path, *names: str, until: float = 590, limit: float = 1.5) -> Stage:
    """A stage whose units do what `MODULES` says, from a module of its own."""
    module = f"made_{folder.name.replace('-', '_')}_{'_'.join(names)}"
    functions = "\n".join(f"def {name}():\n    {MODULES[name]}" for name in names)
    units = ", ".join(f'Unit("{name}", {name}, {limit})' for name in names)
    text = f"import os, subprocess, time\nfrom benchmarks.units import Skip, Unit\n{functions}\n"
    (folder / f"{module}.py").write_text(f"{text}\ndef units(context):\n    return [{units}]\n")
    return Stage("_".join(names), until, ("benchmarks",), module)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Run("a made-up card", tmp_path / "out")


def statuses(run: Run, stage: Stage) -> dict[str, str]:
    return {unit: line["status"] for unit, line in run.results(stage).last(stage.name).items()}


def test_a_stage_survives_its_units(here: Run, tmp_path: Path) -> None:
    """Crashed and hung units are recorded, those behind them run in a new process, and nothing is run twice."""
    stage = stage_of(tmp_path, "killing", "good", "hanging", "wrong", "skipping", "leaving")
    last = stage_of(tmp_path, "good")
    assert not gpu.run(here, [stage, last], time.time(), 1.0)
    expected = {"killing": "crashed", "good": "ok", "hanging": "hung", "wrong": "failed", "skipping": "skipped"}
    assert statuses(here, stage) == {**expected, "leaving": "hung", "": "ok"}
    assert statuses(here, last) == {"good": "ok", "": "ok"}
    found = here.results(stage).last(stage.name)
    assert found["killing"]["code"] == 139
    assert found["good"]["answer"] == 42
    assert found["wrong"]["error"] == "ValueError: off by 1"
    assert found["skipping"]["reason"] == "no such tool"

    size = here.results(stage).path.stat().st_size
    began = time.time()
    gpu.run(here, [stage, last], time.time(), 1.0)
    assert here.results(stage).path.stat().st_size == size
    assert time.time() - began < 1


def test_retry_runs_again_what_ended_badly(here: Run, tmp_path: Path) -> None:
    stage = stage_of(tmp_path, "good", "killing")
    gpu.run(here, [stage], time.time(), 1.0)
    before = len(here.results(stage).read())
    again = Run(here.device, here.output, retry=time.time())
    gpu.run(again, [stage], time.time(), 1.0)
    new = [(line["unit"], line["status"]) for line in here.results(stage).read()[before:]]
    assert new == [("killing", "begun"), ("killing", "crashed"), ("", "ok")]


def test_a_stage_that_is_cut_goes_on_in_the_next_call(here: Run, tmp_path: Path) -> None:
    """The stage's time is over before its unit's: the unit is no failure, and runs in the next call."""
    slow = stage_of(tmp_path, "good", "hanging", limit=100)
    last = stage_of(tmp_path, "good")
    here.stage(slow, time.time() + 2)
    here.stage(last, time.time() + 20)
    assert statuses(here, slow) == {"good": "ok", "hanging": "cut"}
    assert statuses(here, last)[""] == "ok"
    (tmp_path / f"{slow.module}.py").write_text(
        (tmp_path / f"{slow.module}.py").read_text().replace("time.sleep(1000)", "return {}")
    )
    here.stage(slow, time.time() + 20)
    assert statuses(here, slow) == {"good": "ok", "hanging": "ok", "": "ok"}


def test_a_lost_device_and_a_stage_that_does_not_start(here: Run, tmp_path: Path) -> None:
    """After a fault that the process has noticed the next one goes on; what cannot be imported ends its own stage."""
    stage = stage_of(tmp_path, "losing", "good")
    broken = Stage("broken", 590, ("benchmarks",), "no_such_module")
    gpu.run(here, [broken, stage], time.time(), 1.0)
    assert statuses(here, stage) == {"losing": "crashed", "good": "ok", "": "ok"}
    assert statuses(here, broken) == {gpu.START: "crashed"}
    assert "no_such_module" in here.results(broken).last("broken")[gpu.START]["log"]


def test_tests_that_hang_or_break_the_device(tmp_path: Path) -> None:
    """Each is recorded by name, the tests behind it run in another worker; what is recorded is left out next time."""
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text("from benchmarks import recorder\nrecorder.TEST_SECONDS = 1.0\n")
    (tmp_path / "test_made.py").write_text(
        "import time\n"
        "def test_first(): pass\n"
        "def test_hanging(): time.sleep(1000)\n"
        'def test_breaking(): raise RuntimeError("CUDA error: an illegal memory access was encountered")\n'
        "def test_wrong(): assert 1 == 2\n"
        "def test_last(): pass\n"
    )
    results = lines.Results(tmp_path / "results.jsonl", "A card", "source")
    leave_out = tmp_path / "leave_out.txt"
    leave_out.write_text("")
    command = [sys.executable, "-m", "pytest", "test_made.py", "-q", "-n", "1", "-p", "benchmarks.recorder"]
    command += ["-p", "no:cacheprovider", "--max-worker-restart=5"]
    names = {**os.environ, **recorder.environment_of(results, "correctness", leave_out), "PYTHONPATH": str(lines.ROOT)}
    subprocess.run(command, cwd=tmp_path, env=names, check=False, timeout=100)
    found = {unit.partition("::")[2]: line for unit, line in results.last("correctness").items()}
    bad = {"test_hanging", "test_breaking", "test_wrong"}
    assert {name: line["status"] for name, line in found.items()} == {
        name: "failed" if name in bad else "ok" for name in (*bad, "test_first", "test_last")
    }
    assert "crashed while running" in found["test_hanging"]["message"]
    assert "illegal memory access" in found["test_breaking"]["message"]
    assert "assert 1 == 2" in found["test_wrong"]["message"]

    leave_out.write_text("\n".join(results.ended("correctness")))
    before = len(results.read())
    assert subprocess.run(command, cwd=tmp_path, env=names, check=False, timeout=100).returncode == 5  # no tests
    assert len(results.read()) == before


def test_lines_of_another_device_or_source_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    one, other = lines.Results(path, "one", "a"), lines.Results(path, "one", "b")
    one.append("goals", "unit", "ok")
    with path.open("a") as file:
        file.write('{"stage": "goals", "unit": "half of a li')
    assert one.ended("goals") == {"unit"}
    assert not other.ended("goals")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert "there is none to use (AssertionError: torch.cuda.is_available() is False)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--toy", "--minutes", "0"])
    assert "--minutes: expected a positive number, got 0.0" in capsys.readouterr().err


def test_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage from end to end at toy sizes; the second call has nothing to do, and the report has their tables."""
    arguments = ["--toy", "--output", str(tmp_path), "--minutes", "10"]
    assert gpu.main(arguments) == 0, (tmp_path / "run.log").read_text()[-3000:]
    results = tmp_path / "results.jsonl"
    recorded = lines.read(results)
    for stage in STAGES:
        found = {line["unit"]: line["status"] for line in recorded if line["stage"] == stage.name}
        assert found[""] == "ok", stage
        assert set(found.values()) <= {"ok", "skipped"}, found
        assert len(found) > 1, stage
    assert [line["status"] for line in recorded if "::test_no_rows" in line["unit"]] == ["ok"] * 4

    began = time.time()
    assert gpu.main(arguments) == 0
    assert time.time() - began < 2
    assert len(lines.read(results)) == len(recorded)
    assert capsys.readouterr().out.count("finished by an earlier call") == len(STAGES)

    text = gpu_report.tables(results)
    for heading in ("### Times", "### Root mean square errors", "### Tiles"):
        assert heading in text
    assert "| triplet_loss 8x32 forward+backward |" in text
    document = tmp_path / "gpu.md"
    document.write_text(f"{gpu_report.BEGIN}\nold\n{gpu_report.END}\n")
    monkeypatch.setattr(sys, "argv", ["report", str(results), "--into", str(document)])
    with pytest.raises(SystemExit, match="expected lines of a GPU"):
        report.main()  # a rehearsal's times are nobody's


def test_rehearsal_of_faiss(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    handler = signal.getsignal(signal.SIGTERM)
    assert gpu.main(["--toy", "--faiss", "--output", str(tmp_path)]) == 0
    assert signal.getsignal(signal.SIGTERM) == handler
    found = [line for line in lines.read(tmp_path / "results.jsonl") if "same_bits" in line]
    assert len(found) == 12
    assert {line["stage"] for line in found} == {FAISS.name}


def test_tables_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One section a device, of the newest source alone; goals reached and missed; what went wrong is listed."""
    path, document = tmp_path / "results.jsonl", tmp_path / "gpu.md"
    old, new = lines.Results(path, "A card", "old"), lines.Results(path, "A card", "new")
    old.append("goals", "first", "ok", wall_us=9.0, wall_spread_us=0.0, goal={})
    times = {"wall_us": 1234.4, "wall_spread_us": 2.0, "event_us": 40.0, "graph_us": 12.0}
    goal = {"graph_us": 15, "wall_us": 150}
    new.append("goals", "first", "ok", **times, floor_us=3.0, goal=goal)
    new.append("goals", "second", "failed", error="off by 0.1")
    new.append("peers", "first: eager", "ok", case="first", candidate="eager", wall_us=5000.0, event_us=90.0)
    new.append("grade", "a product", "ok", ours_rms=4.4e-8, float32_rms=1.1e-7, centred=False)
    new.append("sanitizer", "memcheck x", "hung", log="call: x\nlast words")
    document.write_text(f"before\n{gpu_report.BEGIN}\nold\n{gpu_report.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["report", str(path), "--into", str(document)])
    report.main()
    text = document.read_text()
    assert text.startswith(f"before\n{gpu_report.BEGIN}\n## A card\n")
    assert text.endswith(f"{gpu_report.END}\nafter\n")
    row = "| first | 1 234 ± 2 | 40 | 12 | graph 15, wall 150 | yes, 8.2× as long | 3 | eager 90 |"
    assert row in text
    assert "| goals | 1 | 1 | 0 | 0 | 0 | no |" in text
    assert "| a product | plain | 4.4e-08 | 1.1e-07 | yes |" in text
    assert "- goals, second: failed: off by 0.1" in text
    assert "- sanitizer, memcheck x: hung: last words" in text


def test_what_compute_sanitizer_says() -> None:
    good = "call: a\ncall: done\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_sanitizer.verdict(0, good)["status"] == "ok"
    races = "call: done\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert gpu_sanitizer.verdict(0, races)["status"] == "ok"
    bad = "call: a\n========= Invalid __global__ write of size 4 bytes\n=========     at _mine\n"
    found = gpu_sanitizer.verdict(9, bad + "========= ERROR SUMMARY: 3 errors\n")
    assert (found["status"], found["reached"], found["summary"]) == ("failed", "a", "3 errors")
    assert found["log"].startswith("========= Invalid __global__ write")
    assert gpu_sanitizer.verdict(1, "========= Error: Device not supported\n")["status"] == "skipped"
    assert (
        gpu_sanitizer.verdict(0, good.replace("call: done\n", ""))["status"] == "failed"
    )  # it did not come to its end


def test_compute_sanitizer_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that refuses the choice of a kernel is asked without it; every check is a line, errors are failures."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\n"
        'case "$*" in --help) echo "  --kernel-name arg  --launch-timeout arg"; exit;; esac\n'
        'case "$*" in *kns=*) echo "unknown filter"; exit 1;; esac\n'
        'say() { echo "call: done"; echo "========= $1"; exit $2; }\n'
        'case "$*" in *racecheck*) say "RACECHECK SUMMARY: 0 hazards displayed" 0;; esac\n'
        'case "$*" in *rank_metrics*) say "ERROR SUMMARY: 2 errors" 9;; esac\n'
        'say "ERROR SUMMARY: 0 errors" 0\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    results = lines.Results(tmp_path / "results.jsonl", "A card", "source")
    context = Context(results, "sanitizer", toy=False, retry=0.0, deadline=time.time() + 60)
    run_units(context, gpu_sanitizer.units(context))
    found = results.last("sanitizer")
    assert found["all checks"]["failed"] == 1
    assert found["all checks"]["checks"] == gpu_sanitizer.MEMCHECKED_AT_ONCE + len(calls.RACING) == len(found) - 1
    assert [unit for unit, line in found.items() if line["status"] == "failed" and "rank_metrics" not in unit] == []
    assert all(line["status"] == "ok" for unit, line in found.items() if unit.startswith("racecheck"))


def test_every_kernel_has_a_small_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compute-sanitizer looks at leaves no kernel out."""
    from apd_kernels import use_backend
    from apd_kernels.kernels import _launch
    from apd_kernels.kernels._pairs import Reduction

    named, launched, reductions, reduced = set(), set(), set(), set()

    def counted(kernel: object, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
        if 0 not in grid:
            launched.add(launched_name(kernel))
            if isinstance(reduction := options.get("REDUCTION"), Reduction):
                reduced.add(reduction)
                launched.add(reduction.name_of(launched_name(kernel)))  # as it is compiled, and as the tool sees it
        if torch.cuda.is_available() or launched_name(kernel) not in slow:
            _launch.launch(kernel, grid, *arguments, **options)

    def launched_name(kernel: object) -> str:
        return str(getattr(kernel, "fn", kernel).__name__)

    slow: set[str] = {"_choose", "_move"}  # seconds in the interpreter; nobody looks at their results here
    for path in Path(_launch.__file__).parent.glob("*.py"):
        module = import_module(f"apd_kernels.kernels.{path.stem}")
        named |= {name for name in re.findall(r"\n +launch\(\s*(\w+)", path.read_text()) if name in vars(module)}
        if hasattr(module, "launch") and module is not _launch:
            monkeypatch.setattr(module, "launch", counted)
        reductions |= {one for one in vars(module).values() if isinstance(one, Reduction)}
    with use_backend("triton"):
        for call in calls.calls().values():
            call()
    assert launched >= named, named - launched
    assert len(named) > 35
    assert reduced >= reductions, {one.name for one in reductions - reduced}
    assert len(reductions) > 5
    assert set(calls.RACING) <= launched
    assert set(calls.RACING.values()) <= set(calls.calls())


def test_make_gpu() -> None:
    """The task needs no environment, and passes on what it is called with."""
    text = (lines.ROOT / "Makefile").read_text()
    task = text[text.index("\ngpu:") :].partition("\n\n")[0]
    assert "$(READY)" not in task
    assert "$(BIN)" not in task
    assert json.dumps("benchmarks.gpu")[1:-1] in task
