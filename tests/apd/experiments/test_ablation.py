"""An ablation on drawn people: what is trained, what is taken over, the table, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("typer")

import warm
from command_line import error, run

from apd.config.files import load_config, save_config
from apd.experiments.ablation import execute
from apd.experiments.ablation.execute import Ablation
from apd.experiments.ablation.plan import load_plan
from apd.experiments.ablation.tables import tables
from apd.files import write_text
from apd.run import Run
from apd.training.log import read_metrics

BASE = """
data: {height: 32, width: 16, pad: 2, workers: 0, cache: true}
mpg: {steps: 2, batch_size: 4, negatives: 2, width: 4, blocks: 1, trunk: self, discriminator_width: 4,
  discriminator_layers: 2}
model: {backbone: vit_tiny_patch16_224, pretrained: none, patch_size: 8, embed_dim: 24, depth: 2, heads: 2}
loss: {ramp_epochs: 1}
train: {batch_size: 8, instances: 2, steps: 3, optimizer: adamw, lr: 0.0005, warmup_epochs: 1, bias_lr: 1}
log_steps: 1
checkpoint_minutes: 0.00001
"""
ROWS = """
  baseline: {title: the baseline, values: [perturbation=none, model.ssd=none]}
  longer: {title: baseline × 2 steps, values: [perturbation=none, model.ssd=none], times: 2, seeds: 0}
  spnet: [perturbation=none]
  apd: {values: [data.train_on=both], trunk: baseline, seeds: [1]}
  synthesized: {values: [data.train_on=synthesized], trunk: baseline, generator: apd, seeds: [1]}
"""
PLAN = f"""
title: Drawn
note: mechanics, not evidence
config: base.yaml
seeds: [0, 1]
rows: {ROWS}
compare: {{spnet: [baseline, longer], apd: spnet}}
targets:
  unseen: {{rule: two_cameras, identities: 4, repeats: 3}}
  other: {{rule: one_per_camera, repeats: 2}}
brackets:
  network: {{model: "ablation_network:make", size: [16, 8], flip_test: true}}
  foreign: {{features: "foreign_{{target}}.npz"}}
"""


NETWORK = """
from torch import nn
def make():
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An ablation file with its data: 8 identities to train on, 6 and 5 others in two targets, and foreign features."""
    folder = tmp_path_factory.mktemp("ablation")
    random = np.random.default_rng(0)
    for name, identities, parts in (
        ("source", range(1, 9), ("bounding_box_train",) * 2),
        ("unseen", range(1, 7), ("query", "bounding_box_test")),
        ("other", range(1, 6), ("bounding_box_train", "bounding_box_train")),
    ):
        names = []
        for pid in identities:
            colour = random.integers(40, 215, 3)
            for camera in (1, 2):
                for frame in (1, 2):
                    path = folder / name / parts[frame - 1] / f"{pid:04d}_c{camera}s1_{frame:06d}_00.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    pixels = np.clip(colour + random.integers(-40, 40, (32, 16, 3)) + 10 * camera, 0, 255)
                    Image.fromarray(pixels.astype(np.uint8)).save(path)
                    names.append((f"{path.parent.name}/{path.name}", pid, camera))
        names_, pids, camids = (np.array(column) for column in zip(*names[::-1], strict=True))
        perfect = np.eye(9, dtype=np.float32)[pids]
        np.savez(folder / f"foreign_{name}.npz", features=perfect, pids=pids, camids=camids, names=names_)
    write_text(folder / "base.yaml", BASE)
    write_text(folder / "rows.yaml", PLAN)
    write_text(folder / "ablation_network.py", NETWORK)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def command(place: Path, *more: object, file: str = "rows.yaml", output: str = "out") -> tuple[object, ...]:
    targets = ("--target", place / "unseen", "--target", f"other={place / 'other'}")
    return ("ablate", place / file, "--data", place / "source", *targets, "--output", place / output, *more)


@pytest.fixture(scope="module")
def warm_workers() -> Iterator[None]:
    """In this process trainings begin with their imports done; those of a command's own process begin as they do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "subprocess", SimpleNamespace(Popen=warm.Popen, PIPE=subprocess.PIPE))
        yield


@pytest.fixture(scope="module")
def whole(place: Path, warm_workers: None) -> str:
    """What the command prints."""
    write_text(place / "table.md", "before\n<!-- rows: begin -->\nold\n<!-- rows: end -->\nafter\n")
    return run(*command(place, "--jobs", 3, "--features", place, "--into", place / "table.md"))


def lines(place: Path, output: str = "out") -> list[dict]:
    return [json.loads(line) for line in (place / output / "results.jsonl").read_text().splitlines()]


def test_results(whole: str, place: Path) -> None:
    found = {(line["row"], line["seed"]): line for line in lines(place)}
    assert len(lines(place)) == len(found) == 9
    assert {key for key in found if key[1] is not None} == {
        *((row, seed) for row in ("baseline", "spnet") for seed in (0, 1)),
        *(("longer", 0), ("apd", 1), ("synthesized", 1)),
    }
    assert found["longer", 0]["steps"] == 2 * found["baseline", 0]["steps"] == 6
    assert [row["step"] for row in read_metrics(place / "out/runs/longer/0/metrics.csv")][-1] == "6"
    assert found["foreign", None]["tests"]["unseen"]["mAP"] == 1
    for line in found.values():
        for test in line["tests"].values():
            assert 0 <= test["rank-1"] <= test["rank-5"] <= test["rank-10"] <= 1
    assert found["baseline", 0]["config"] != found["baseline", 1]["config"]
    splits = json.loads((place / "out/splits/unseen.json").read_text())
    assert [len(split["query"]) for split in splits] == [8] * 6  # 4 identities × 2 images; 3 splits × 2 directions
    assert not list((place / "out").rglob(".*.tmp"))


def test_runs_are_those_of_apd_train(whole: str, place: Path) -> None:
    changes = ("seed=1", "perturbation=none")
    run("train", "--config", place / "base.yaml", "--data", place / "source", "--output", place / "single", *changes)
    single, ours = Run(place / "single"), Run(place / "out/runs/spnet/1")
    assert single.config == ours.config
    assert single.fingerprint() == ours.fingerprint()


def test_trunk_and_generator_are_shared(whole: str, place: Path) -> None:
    runs = place / "out/runs"
    assert Run(runs / "apd/1").config.mpg.trunk_weights == str(runs / "baseline/1")
    assert not (runs / "apd/1/baseline").exists()
    assert "mpg" in Run(runs / "apd/1").info()["seconds"]
    assert "mpg" not in Run(runs / "synthesized/1").info()["seconds"]
    generators = [(runs / row / "1/generator.safetensors").read_bytes() for row in ("apd", "synthesized")]
    assert generators[0] == generators[1]


def test_table(whole: str, place: Path) -> None:
    table = (place / "out/results.md").read_text()
    assert table.startswith("Drawn: 7 of 7 runs. **Mechanics, not evidence.** ")
    assert "**unseen: 3 random splits of 4 identities × both directions, seed 0**" in table
    assert "| foreign | – | – | 100.0 | 100.0 | 100.0 | 100.0 | – |" in table
    assert "| chance | – | – | 25.0 | – | – |" in table  # in the other camera 2 of 8 images are right
    assert "+ trunk of baseline, generator of apd |" in table
    written = (place / "table.md").read_text()
    assert written == f"before\n<!-- rows: begin -->\n{table.rstrip()}\n<!-- rows: end -->\nafter\n"
    for row in ("the baseline", "baseline × 2 steps", "spnet"):
        assert row in whole
    values = [100 * line["tests"]["unseen"]["mAP"] for line in lines(place) if line["row"] == "baseline"]
    assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} |" in table


def test_differences_are_to_the_better_control(whole: str, place: Path) -> None:
    plan = load_plan(place / "rows.yaml")
    ablation = Ablation(
        plan,
        data=[place / "source"],
        targets={name: place / name for name in ("unseen", "other")},
        output=place / "out",
        device="cpu",
    )
    found = {(line["row"], line["seed"]): line["tests"] for line in lines(place)}
    rows = {(row[0], row[2], row[3]): row for row in tables(ablation)["differences"].rows}
    assert len(rows) == 8
    for (name, target, figure), row in rows.items():
        if name == "apd":
            assert row[1] == "spnet"
            assert row[4] == "1"
            assert row[6] == "–"
            assert row[8] == "one seed"
            continue
        differences = {
            title: np.mean([found["spnet", s][target][figure] - found[control, s][target][figure] for s in seeds])
            for title, control, seeds in (
                ("the baseline", "baseline", (0, 1)),
                ("baseline × 2 steps", "longer", (0,)),  # only by the seed that both have
            )
        }
        assert differences[row[1]] == min(differences.values())
        assert row[5] == f"{100 * differences[row[1]]:+.1f}"


def test_the_better_control_is_chosen_by_the_seeds_that_are_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control that had an easier seed besides is not the better one for that."""
    from types import SimpleNamespace

    from apd.experiments.ablation import tables as module
    from apd.retrieval.targets import Queries

    def run(right: float) -> Queries:
        found = np.arange(20) < 20 * right
        return Queries(np.arange(20), found, found.astype(float))

    runs = {"ours": {0: run(0.5)}, "lucky": {0: run(0.1), 1: run(1.0)}, "good": {0: run(0.4)}, "absent": {}}
    rows = {name: SimpleNamespace(title=f"{name}|row") for name in runs}
    plan = SimpleNamespace(controls={"ours": ("lucky", "good", "absent")}, targets=["t"], rows=rows)
    found: Any = SimpleNamespace(plan=plan, queries=lambda row, target: runs[row])
    compared = list(module._differences(found))
    assert [row[:4] for row in compared] == [("ours|row", "good|row", "t", figure) for figure in ("rank-1", "mAP")]
    assert [row[5] for row in compared] == ["+10.0", "+10.0"]
    assert module._cell("a|b\nc") == "a\\|b c"


def test_called_again_nothing_is_done(whole: str, place: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*") if path.name != "results.md"}
    first = (place / "out/results.jsonl").read_text()
    printed = run(*command(place, "--features", place))
    assert "training" not in printed
    assert (place / "out/results.jsonl").read_text() == first
    changed = [p for p, t in before.items() if p.is_file() and p.stat().st_mtime_ns != t and p.parent.name != "splits"]
    assert changed == []


def test_other_splits_are_tested_anew(whole: str, place: Path) -> None:
    write_text(place / "seed.yaml", (place / "rows.yaml").read_text().replace("repeats: 3", "repeats: 3, seed: 5"))
    shutil.copytree(place / "out", place / "again")
    printed = run(*command(place, "--no-train", "--features", place, file="seed.yaml", output="again"))
    assert "training" not in printed
    old, new = lines(place, "again")[:9], lines(place, "again")[9:]
    assert len(new) == 9
    assert {line["tests"]["unseen"]["splits"] for line in old}.isdisjoint(
        line["tests"]["unseen"]["splits"] for line in new
    )
    assert "seed 5" in (place / "again/results.md").read_text()


def test_only_finished_runs_without_training(whole: str, place: Path) -> None:
    (place / "part/runs/baseline").mkdir(parents=True)
    shutil.copytree(place / "out/runs/baseline/0", place / "part/runs/baseline/0")
    printed = run(*command(place, "--no-train", output="part"))
    assert "note: foreign: left out; --features names the folder of its files" in printed
    assert [(line["row"], line["seed"]) for line in lines(place, "part")] == [("network", None), ("baseline", 0)]
    assert (place / "part/results.md").read_text().startswith("Drawn: 1 of 7 runs.")
    assert not (place / "part/runs/spnet").exists()


def test_killed_in_the_middle(whole: str, place: Path) -> None:
    """Parent killed by −9: the training ends with it, and the next call goes on to the same bits."""
    write_text(place / "base60.yaml", BASE.replace("steps: 3,", "steps: 60,"))
    text = PLAN[: PLAN.index("brackets:")].replace("base.yaml", "base60.yaml").replace("seeds: [0, 1]", "seeds: 0")
    text = text.replace(ROWS, "\n  baseline: [perturbation=none, model.ssd=none]\n")
    text = text.replace("{spnet: [baseline, longer], apd: spnet}", "{}")
    write_text(place / "slow.yaml", text)
    program = [sys.executable, "-m", "apd.cli", *map(str, command(place, file="slow.yaml", output="killed"))]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # As many threads as the calls that follow: another number adds in another order.
    process = subprocess.Popen(program, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    last = place / "killed/runs/baseline/0/last"
    deadline = time.monotonic() + 300
    while not (last.is_dir() and list(last.glob("sp-*.pt"))) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    newest = sorted(last.glob("sp-*.pt"))[-1]
    time.sleep(1)
    assert sorted(last.glob("sp-*.pt"))[-1] == newest  # nobody trains any more
    assert int(newest.stem.partition("-")[2]) < 60
    run(*command(place, file="slow.yaml", output="killed"))
    assert len(lines(place, "killed")) == 1
    config = load_config(place / "base60.yaml", ["perturbation=none", "model.ssd=none", "seed=0"])
    assert Run(place / "killed/runs/baseline/0").config == config
    run(
        "train",
        "--data",
        place / "source",
        "--output",
        place / "straight",
        "--config",
        place / "base60.yaml",
        "perturbation=none",
        "model.ssd=none",
        "seed=0",
    )
    assert Run(place / "straight").fingerprint() == Run(place / "killed/runs/baseline/0").fingerprint()


def test_trainings_share_the_threads(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five, two at once take two each; one that goes on keeps its number. Nothing is trained here."""
    text = PLAN[: PLAN.index("brackets:")].replace("seeds: [0, 1]", "seeds: 0")
    text = text.replace(ROWS, "\n  baseline: [perturbation=none, model.ssd=none]\n")
    write_text(place / "threads.yaml", text.replace("{spnet: [baseline, longer], apd: spnet}", "{}"))
    given = []

    class Process:
        def __init__(self, command: list[str], *, env: dict[str, str], **pipes: object) -> None:
            given.append(env["OMP_NUM_THREADS"])

        def wait(self) -> int:
            return 1

    monkeypatch.setattr(execute.subprocess, "Popen", Process)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    for jobs in (2, 5):
        printed = run(*command(place, "--jobs", jobs, file="threads.yaml", output="threads"), code=1)
        assert "baseline/0: training, 2 threads" in printed
    assert given == ["2", "2"]
    assert Run(place / "threads/runs/baseline/0").info()["threads"] == 2


def test_a_run_of_another_configuration_is_refused(whole: str, place: Path) -> None:
    shutil.copytree(place / "out/runs/baseline", place / "foreign/runs/baseline")
    path = place / "foreign/runs/baseline/1"
    save_config(load_config(path / "config.yaml", ["train.lr=0.1"]), path / "config.yaml")
    message = error(*command(place, output="foreign"))
    assert (
        "foreign/runs/baseline/1: train.lr: expected 0.0005, as baseline with seed 1 has it, got a run with 0.1"
        in message
    )
    save_config(load_config(path / "config.yaml", ["train.lr=0.0005"]), path / "config.yaml")
    info = json.loads((path / "run.json").read_text())
    write_text(path / "run.json", json.dumps({**info, "data": ["/elsewhere"]}))
    assert "foreign/runs/baseline/1: data: expected" in error(*command(place, output="foreign"))
    assert not (place / "foreign/runs/spnet").exists()


def test_a_copied_trunk_is_the_same(whole: str, place: Path) -> None:
    """Runs copied into another ablation's folder still name the old trunk."""
    shutil.copytree(place / "out/runs", place / "copied/runs")
    run(*command(place, "--no-train", output="copied"))
    assert sum(line["seed"] is not None for line in lines(place, "copied")) == 7


def test_one_failing_run_stops_no_other(whole: str, place: Path) -> None:
    shutil.copytree(place / "out", place / "failing")
    runs = place / "failing/runs"
    for broken in ("spnet/0", "apd/1"):
        (runs / broken / "best.safetensors").write_bytes(b"cut off")
    for missing in ("baseline/0", "synthesized/1"):
        shutil.rmtree(runs / missing)
    printed = run(*command(place, output="failing"), code=1)
    assert "Error: spnet/0: " in printed
    assert "best.safetensors: not a .safetensors file" in " ".join(printed.split())
    assert "Error: synthesized/1: needs apd/1, which failed" in printed
    assert Run(runs / "baseline/0").fingerprint() == Run(place / "out/runs/baseline/0").fingerprint()


def test_wrong_commands(place: Path) -> None:
    base = ("ablate", place / "rows.yaml", "--data", place / "source", "--output", place / "wrong")
    unseen, other = ("--target", place / "unseen"), ("--target", place / "other")
    assert "--target: no folder of other; give NAME=FOLDER" in error(*base, *unseen)
    assert "--target unseen: given twice" in error(*base, *unseen, "--target", f"unseen={place / 'other'}")
    assert "has the targets unseen, other" in error(*base, *unseen, *other, "--target", place / "source")
    assert "is a source; a target is never trained on" in error(*base, *unseen, "--target", f"other={place / 'source'}")
    assert "table2.md: no such file" in error(*base, *unseen, *other, "--into", place / "table2.md")
    write_text(place / "plain.md", "nothing")
    assert "expected the markers <!-- rows: begin -->" in error(*base, *unseen, *other, "--into", place / "plain.md")
    assert "the ablations shipped are ablation-cpu, ablation" in error("ablate", "nothing", *base[2:], *unseen, *other)
