"""Threads of a training: how many, kept by a run that goes on, and how they wait for one another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from places import ROOT

pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("typer")

from command_line import run
from tiny import TINY, draw_training_set

from apd.config.files import load_config
from apd.console import console
from apd.openmp import WAITING, WAITING_BRIEFLY, let_waiting_threads_sleep
from apd.run import Run, load_tensors
from apd.training import threads as module
from apd.training.threads import available_cpus, available_threads, training_threads, useful_threads
from apd.training.train import start_run, train_run

NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Eight CPUs, all of them PyTorch's; no container, and nothing said by the user."""
    for name in NUMBERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(module, "_CGROUPS", tmp_path / "cgroup")
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (TINY, 1),
        (["data.height=64", "data.width=32"], 2),
        (["data.height=128", "data.width=64"], 8),
        ([], 8),
    ],
)
def test_small_networks_take_few(eight: None, values: list[str], expected: int) -> None:
    assert useful_threads(load_config(None, values), available_threads()) == expected
    assert useful_threads(load_config(None, values), 1) == 1


@pytest.mark.parametrize("name", NUMBERS)
def test_the_number_that_the_user_set_is_taken(eight: None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "8")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    assert available_threads() == 8
    assert useful_threads(load_config(None, TINY), 8) == 8


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_quota_of_a_container(eight: None, tmp_path: Path, files: dict[str, str], expected: int) -> None:
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_cpus() == available_threads() == expected


def test_number_is_said_and_given_back(eight: None) -> None:
    for began, expected in ((3, "3 threads\n"), (1, "1 thread\n"), (None, "8 threads\n")):
        with console.capture() as capture, training_threads(began):
            assert torch.get_num_threads() == (began or 8)
        assert capture.get() == expected
        assert torch.get_num_threads() == 8
    with console.capture() as capture, training_threads(9):
        assert torch.get_num_threads() == 9
    assert capture.get() == "9 threads, as the run began, on 8 CPUs: slower, but to the same bits\n"


def test_run_goes_on_with_the_threads_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two; the process that goes on has one, and one thread makes other bits."""
    data = draw_training_set(tmp_path / "data")
    values = [*TINY, "perturbation=none", "model.embed_dim=96", "train.batch_size=32", "train.instances=4"]
    seen = []
    set_threads = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda number: (seen.append(number), set_threads(number)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    set_threads(1)
    try:
        for number in (1, 2):
            train_run(start_run(tmp_path / str(number), load_config(None, values), [data], threads=number), "cpu")
            assert Run(tmp_path / str(number)).info()["threads"] == number
        bits = {number: load_tensors(tmp_path / str(number) / "best.safetensors") for number in (1, 2)}
        assert any(not torch.equal(bits[1][name], value) for name, value in bits[2].items())
        path = tmp_path / "resumed"
        shutil.copytree(tmp_path / "2", path)
        (path / "best.safetensors").unlink()
        (path / "last" / "sp-00000004.pt").unlink()
        seen.clear()
        assert "2 threads" in run("train", "--resume", path, "--device", "cpu")
        assert seen == [2, 1]
        resumed = load_tensors(path / "best.safetensors")
        assert all(torch.equal(resumed[name], value) for name, value in bits[2].items())

        older = tmp_path / "2"  # a run of a version that did not write the number down
        info = {name: value for name, value in Run(older).info().items() if name != "threads"}
        (older / "run.json").write_text(json.dumps(info))
        (older / "best.safetensors").unlink()
        assert "1 thread\n" in run("train", "--resume", older, "--device", "cpu")
        assert "threads" not in Run(older).info()
    finally:
        set_threads(before)


@pytest.mark.parametrize("said", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "1"}])
def test_waiting_threads_sleep_where_the_user_says_nothing(
    said: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in WAITING:
        monkeypatch.setenv(name, "")  # and so put back after the test
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    let_waiting_threads_sleep()
    found = {name: os.environ[name] for name in WAITING if name in os.environ}
    assert found == (said or WAITING_BRIEFLY)


@pytest.mark.parametrize(("said", "policy", "spins"), [(None, "PASSIVE", "4000"), ("ACTIVE", "ACTIVE", "30000000000")])
def test_openmp_reads_it_from_the_command_line(said: str | None, policy: str, spins: str) -> None:
    """The runtime that PyTorch brings says how it waits when it is loaded: so it was set before."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT)}
    if said is not None:
        environment["OMP_WAIT_POLICY"] = said
    command = [sys.executable, "-m", "apd.cli", "env"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"OMP_WAIT_POLICY={policy}" in ended.stdout
    # GNU's; it names PASSIVE also where nothing is set, and then turns 300,000 times.
    found = {line.split("=")[1].strip(" '") for line in ended.stderr.splitlines() if "GOMP_SPINCOUNT" in line}
    assert found <= {spins}
    assert found or sys.platform != "linux"
