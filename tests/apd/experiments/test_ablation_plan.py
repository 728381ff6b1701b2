"""Ablation files: what they say, and what is refused; the statistics of the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from apd.config.files import load_config, shipped_ablations
from apd.errors import InputError
from apd.experiments.ablation.plan import load_plan
from apd.experiments.ablation.results import ResultFile, compare, summary, t_quantile
from apd.retrieval.targets import Queries

GOOD = """
config: small
seeds: [0, 1]
rows:
  a: [perturbation=none, model.ssd=none]
  b: {values: [perturbation=generator], trunk: a, seeds: 1, times: 3}
compare: {b: a}
targets: {t: {rule: own}}
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_configurations(tmp_path: Path) -> None:
    plan = load_plan(written(tmp_path / "plan.yaml", GOOD))
    a, b = plan.rows.values()
    assert (a.seeds, b.seeds, b.times, plan.controls) == ((0, 1), (1,), 3, {"b": ("a",)})
    assert plan.config(a, 1, tmp_path) == load_config("small", ["perturbation=none", "model.ssd=none", "seed=1"])
    made = plan.config(b, 1, tmp_path / "runs")
    assert made.train.steps == 9000
    assert made.mpg.trunk_weights == str(tmp_path / "runs/a/1")
    epochs = load_plan(written(tmp_path / "plan.yaml", GOOD.replace("perturbation=generator", "train.steps=none")))
    assert epochs.config(epochs.rows["b"], 1, tmp_path).train.epochs == 360


@pytest.mark.parametrize("name", shipped_ablations())
def test_shipped_ablations_are_sound(name: str) -> None:
    plan = load_plan(name)
    for row in plan.rows.values():
        for seed in row.seeds:
            plan.config(row, seed, Path("runs"))
    assert {"viper", "pku"} == set(plan.targets)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("config: small", "", "config: is missing"),
        ("config: small", "config: smal", "rows.a: smal: no such file"),
        ("config: small", "config: small\nrow: 3", "row: unknown; expected title, note, config"),
        ("[0, 1]", "[0, 0]", r"seeds: expected a list of different integers of at least 0, got \[0, 0\]"),
        ("model.ssd=none", "model.sd=none", "rows.a: model.sd: unknown; did you mean model.ssd"),
        ("model.ssd=none", "seed=4", "rows.a.values: seed: belongs into seeds"),
        ("model.ssd=none", "7", "rows.a.values: expected a list of texts KEY=VALUE"),
        ("trunk: a", "trunk: c", "rows.b.trunk: expected a row above it, got 'c'"),
        ("trunk: a", "trunk: b", "rows.b.trunk: expected a row above it, got 'b'"),
        ("seeds: 1", "seeds: 2", "rows.b.trunk: a has no seed 2"),
        ("generator]", "generator, 'mpg.trunk=auto']", "rows.b.trunk: expected mpg.trunk self"),
        ("times: 3", "times: 0", "rows.b.times: expected a number more than 0, got 0"),
        ("times: 3", "time: 3", "rows.b.time: unknown; expected title, seeds"),
        ("  a:", "  a/b:", "rows.a/b: expected a name of letters, digits"),
        ("b: a}", "b: c}", "compare.b: expected names of rows"),
        ("rule: own", "rule: mine", "targets.t.rule: expected one of two_cameras, one_per_camera, own, got 'mine'"),
        ("rule: own", "rule: two_cameras", "targets.t.identities: is needed for two_cameras"),
        ("rule: own", "rule: own, repeats: 3", "targets.t: the rule own draws nothing"),
        (
            "rule: own",
            "rule: one_per_camera, repeats: 0",
            "targets.t.repeats: expected an integer of at least 1, got 0",
        ),
        ("targets", "brackets: {x: {title: y}}\ntargets", "brackets.x: expected either model or features"),
        ("targets", "brackets: {x: {model: y, size: 3}}\ntargets", r"brackets.x.size: expected \[height, width\]"),
    ],
)
def test_wrong_files(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    path = written(tmp_path / "plan.yaml", GOOD.replace(old, new))
    with pytest.raises(InputError, match=f"plan.yaml: {message}"):
        load_plan(path)


def test_t_quantile_against_the_printed_table() -> None:
    expected = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}
    assert {n: round(t_quantile(n), 3) for n in expected} == expected
    assert t_quantile(10, 0.95) == pytest.approx(1.8125, abs=1e-4)


def queries(right: list[int]) -> Queries:
    return Queries(np.repeat(np.arange(len(right) // 2), 2), np.array(right, bool), np.array(right) / 2)


def test_comparison_by_hand() -> None:
    """Rank-1 of two seeds: 3/4 − 1/4 and 2/4 − 2/4, so a mean of 1/4 with the error (1/2)/√2 /√2 = 1/4."""
    ours = {0: queries([1, 1, 1, 0]), 1: queries([1, 1, 0, 0]), 2: queries([0, 0, 0, 0])}
    theirs = {0: queries([0, 1, 0, 0]), 1: queries([0, 1, 0, 1])}
    found = compare(ours, theirs, "right")
    assert found is not None
    assert (found.difference, found.seeds, found.seed_error) == (0.25, 2, pytest.approx(0.25))
    # By query the seeds' means differ by 1, 0, ½, −½: by identity by 1 and 0 in sum.
    assert found.test_error == pytest.approx((2 * (0.5**2 + 0.5**2)) ** 0.5 / 4)
    assert found.interval == pytest.approx((0.25 - 12.706 * 0.25, 0.25 + 12.706 * 0.25), abs=1e-3)
    assert found.verdict == "not resolved"
    half = compare(ours, theirs, "ap")
    assert half is not None
    assert half.difference == 0.125
    assert compare({0: ours[0]}, {1: theirs[1]}, "right") is None
    one = compare({0: ours[0]}, theirs, "right")
    assert one is not None
    assert (one.verdict, one.interval, one.error) == ("one seed", None, None)


def test_verdicts() -> None:
    random = np.random.default_rng(0)
    chance = {seed: queries(list(random.integers(0, 2, 400))) for seed in range(3)}
    good = {seed: queries(list((random.random(400) < 0.9).astype(int))) for seed in range(3)}
    for ours, theirs, verdict in ((good, chance, "better"), (chance, good, "worse"), (good, good, "not resolved")):
        found = compare(ours, theirs, "right")
        assert found is not None
        assert found.verdict == verdict


def test_summary() -> None:
    assert summary([1.0, 2.0, 4.5]) == (2.5, pytest.approx(np.std([1, 2, 4.5], ddof=1)), 3)
    assert summary([2.0]) == (2.0, None, 1)


def test_result_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results = ResultFile(path)
    results.add({"row": "a", "seed": 0, "value": 1})
    results.add({"row": "a", "seed": None, "value": 2})
    results.add({"row": "a", "seed": 0, "value": 3})
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert {key: line["value"] for key, line in ResultFile(path).latest.items()} == {("a", 0): 3, ("a", None): 2}
    results.add({"row": "b", "seed": 0, "bracket": {"title": "two\u2028lines"}})
    assert ("b", 0) in ResultFile(path).latest
    path.write_text(path.read_text(encoding="utf-8") + '{"row": "a"', encoding="utf-8")
    with pytest.raises(InputError, match=r"results\.jsonl: line 5: not a result of an ablation"):
        ResultFile(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        ResultFile(path)
