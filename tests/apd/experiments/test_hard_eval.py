"""The hard testing set: controls of a known size, the verdict by its rule, and the command on a drawn miniature."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")
pytest.importorskip("typer")

from command_line import error, run
from drawn import SIZE
from tiny import draw_training_set, trained

from apd.data.images import load_image
from apd.data.market import read_market
from apd.experiments.hard_eval import (
    HardTest,
    Row,
    across_cameras,
    colour_jitter,
    gaussian_blur,
    gaussian_noise,
    generated,
    matching_strength,
    run_hard_test,
)
from apd.models.trunk import Trunk, TrunkFeatures
from apd.retrieval.comparison import Retrieval

pytestmark = pytest.mark.usefixtures("one_thread")

BASELINE = ("perturbation=none", "model.ssd=none")
# A generator that has moved away from G(x) = x in few steps.
FAST = ("mpg.lr=0.003", "mpg.steps=8")


class Pixels(Trunk):
    """φ and ψ are the image itself."""

    def forward(self, images: Tensor) -> TrunkFeatures:
        return TrunkFeatures(images, images.flatten(1))


def randoms(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


@pytest.mark.parametrize("change", [gaussian_noise, gaussian_blur, colour_jitter, partial(generated, nn.Sigmoid())])
def test_a_change_of_strength_0_is_none_and_more_is_more(change: object) -> None:
    assert callable(change)
    images = 0.2 + 0.6 * torch.rand(5, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(change(images, randoms(5), 0.0), images)
    sizes = [float((change(images, randoms(5), strength) - images).abs().mean()) for strength in (0.1, 0.4, 1.6)]
    assert sizes[0] <= sizes[1] < sizes[2]
    again = change(images[2:3], randoms(5)[2:3], 0.4)
    torch.testing.assert_close(again, change(images, randoms(5), 0.4)[2:3])  # whatever images are beside it


def test_noise_has_its_standard_deviation() -> None:
    noise = gaussian_noise(torch.zeros(8, 3, 64, 64), randoms(8), 0.3)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.01)


def test_matching_strength() -> None:
    assert matching_strength(lambda strength: strength**2, 0.25, 2.0) == pytest.approx(0.5, rel=0.005)
    assert matching_strength(lambda strength: strength, 3.0, 2.0) == 2.0  # out of reach


def test_across_cameras(tmp_path: Path) -> None:
    """Each image of the test parts against one of its person's from the other camera, by hand."""
    folder = read_market(draw_training_set(tmp_path), ("query", "gallery"))
    samples = (*folder.query, *folder.gallery)
    images = {sample.path: load_image(sample.path, SIZE) / 255 for sample in samples}
    expected = [
        np.mean(
            [
                np.abs(images[one.path] - images[other.path]).mean()
                for other in samples
                if other.pid == one.pid and other.camid != one.camid
            ]
        )
        for one in samples
    ]
    found = [across_cameras(folder, SIZE, Pixels("pixels"), "cpu", seed) for seed in range(20)]
    assert len(set(found)) > 1  # which partner is drawn depends on the seed
    assert np.mean(found) == pytest.approx(np.mean(expected), rel=0.005)


def hard_test(shares: dict[str, float], distance: float = 0.2) -> HardTest:
    def found(share: float) -> Retrieval:
        right = np.arange(100) < 100 * share
        return Retrieval(np.arange(100) // 2, right, right.astype(np.float64), np.arange(100))

    rows = [Row(name, 1.0, distance, found(share), None) for name, share in shares.items()]
    return HardTest(0.5, tuple(rows))


@pytest.mark.parametrize(
    ("made", "controls", "distance", "ratio", "reached"),
    [
        (0.2, (0.7, 0.5, 0.6), 0.25, 2.0, True),
        (0.2, (0.7, 0.5, 0.6), 0.26, 2.0, False),  # more than half of what cameras differ by
        (0.4, (0.7, 0.5, 0.6), 0.2, 4 / 3, False),
        (0.7, (0.8, 0.9, 0.8), 0.2, None, True),  # no control hurts at all
        (0.8, (0.8, 0.9, 0.8), 0.2, None, False),
    ],
)
def test_verdict(made: float, controls: tuple[float, ...], distance: float, ratio: float | None, reached: bool) -> None:
    names = ("noise", "blur", "colour jitter")
    # The generator without L_MP is no measure: it may do as much harm as it likes.
    result = hard_test(
        {"originals": 0.8, "G(x)": made, **dict(zip(names, controls, strict=True)), "G without L_MP": 0.0}, distance
    )
    assert result.ratio == (None if ratio is None else pytest.approx(ratio))
    assert result.reached is reached
    assert result.verdict().startswith("reached: " if reached else "missed: ")
    assert result.weaker_controls == []
    assert result.drop("G(x)").mean == pytest.approx(0.8 - made)
    assert result.as_json()["rows"]["blur"]["drop"]["mean"] == pytest.approx(0.8 - controls[1])


def test_a_control_that_falls_short_is_named() -> None:
    result = hard_test({"originals": 0.8, "G(x)": 0.2, "noise": 0.5, "blur": 0.5, "colour jitter": 0.5})
    noise, *others = result.rows[2:]
    result = replace(result, rows=(*result.rows[:2], replace(noise, distance=0.19), *others))
    assert result.weaker_controls == ["noise"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("runs")
    data = draw_training_set(root / "drawn")
    baseline = trained(root / "baseline", data, *BASELINE)
    trunk = f"mpg.trunk_weights={baseline.path}"
    return SimpleNamespace(
        data=data,
        baseline=baseline,
        judge=trained(root / "judge", data, *BASELINE, "seed=1"),
        apd=trained(root / "apd", data, trunk, *FAST),
        control=trained(root / "control", data, trunk, *FAST, "mpg.weight_mp=0"),
    )


def test_controls_change_as_much_as_the_generator(runs: SimpleNamespace) -> None:
    folder = read_market(runs.data, ("query", "gallery"))
    result = run_hard_test(runs.apd, runs.judge, folder, control=runs.control)
    names = ["originals", "G(x)", "noise", "blur", "colour jitter", "G without L_MP"]
    assert [row.name for row in result.rows] == names
    assert result.row("originals").distance < 1e-6
    target = result.row("G(x)").distance
    assert target > 0
    for name in ("noise", "colour jitter", "G without L_MP"):
        assert result.row(name).distance == pytest.approx(target, rel=0.01)
    assert all(row.network is not None for row in result.rows)
    assert run_hard_test(runs.apd, runs.judge, folder, control=runs.control).as_json() == result.as_json()


def test_command(runs: SimpleNamespace, tmp_path: Path) -> None:
    """The figures of the originals are those of ``apd evaluate``; the table and the file say the same."""
    common = ("hardtest", runs.apd.path, "--judge", runs.judge.path, "--data", runs.data)
    printed = run(*common, "--json", tmp_path / "hard.json")
    found = json.loads((tmp_path / "hard.json").read_text())
    run("evaluate", "--checkpoint", runs.judge.path, "--data", runs.data, "--json", tmp_path / "plain.json")
    plain = json.loads((tmp_path / "plain.json").read_text())
    assert found["rows"]["originals"]["judge"]["rank1"] == pytest.approx(plain["cmc"]["1"])
    assert found["rows"]["originals"]["judge"]["mAP"] == pytest.approx(plain["mAP"])
    assert list(found["rows"]) == ["originals", "G(x)", "noise", "blur", "colour jitter"]
    assert f"{found['content']:.3f}" in printed
    assert ("reached: " if found["reached"] else "missed: ") in printed
    shares = [100 * found["rows"]["G(x)"][model]["rank1"] for model in ("judge", "network")]
    assert f"G(x) {shares[0]:.1f} → {shares[1]:.1f}" in printed


def test_synthesized_images_are_judged(runs: SimpleNamespace, tmp_path: Path) -> None:
    """G(x) stands for what ``apd synthesize`` writes: judged from the files, rank-1 is the same but for JPEG."""
    for part in ("query", "gallery"):
        run("synthesize", "--checkpoint", runs.apd.path, "--data", runs.data, "--output", tmp_path, "--part", part)
    run("evaluate", "--checkpoint", runs.judge.path, "--data", tmp_path, "--json", tmp_path / "made.json")
    from_files = json.loads((tmp_path / "made.json").read_text())
    result = run_hard_test(runs.apd, runs.judge, read_market(runs.data, ("query", "gallery")))
    assert result.row("G(x)").judge.mAP == pytest.approx(from_files["mAP"], abs=0.1)


def test_errors(runs: SimpleNamespace, tmp_path: Path) -> None:
    common = ("hardtest", runs.apd.path, "--data", runs.data)
    assert "is ψ of" in error(*common, "--judge", runs.baseline.path)
    assert "expected a baseline" in error(*common, "--judge", runs.apd.path)
    assert "mpg.weight_mp=0, got 2" in error(*common, "--judge", runs.judge.path, "--control", runs.apd.path)
    assert "no generator.safetensors" in error(
        "hardtest", runs.judge.path, "--data", runs.data, "--judge", runs.baseline.path
    )
