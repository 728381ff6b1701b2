"""Training cut into parts, and on several processes: the results are those of one process and one part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT, TESTS

pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("typer")

from tiny import TINY, draw_training_set, trained

from apd.config.files import load_config
from apd.errors import InputError
from apd.models.spnet import build_spnet
from apd.run import load_tensors
from apd.training import distributed as ranks
from apd.training.engine import make_accelerator, seed_step
from apd.training.log import read_metrics
from apd.training.losses import spnet_losses
from apd.training.step import TrainingStep
from apd.training.train import start_run

pytestmark = pytest.mark.usefixtures("one_thread")

# SGD, whose steps follow the gradient's size: AdamW turns rounding into steps. What is drawn for an image's place among
# those of its process or part would not be that of one process.
PLAIN = ("train.optimizer=sgd", "train.lr=0.05", "model.drop_path=0", "log_steps=1", "perturbation=none")
RUNS = {  # on two processes
    "latent": (*PLAIN, "perturbation=latent", "train.clip=1"),
    "parts": (*PLAIN, "model.ssd=sds", "train.accumulate=2", "loss.triplets=own"),
    "device": (*PLAIN, "data.augment=device", "train.sampler=domain", "data.jitter=0.5", "data.grey=0.5"),
    "stages": (*PLAIN, "perturbation=generator", "model.drop_path=0.2", "train.accumulate=2", "mpg.steps=2"),
}


def on_two_processes(folder: Path, sources: list[Path], runs: dict[str, list[str]]) -> None:
    script = TESTS / "train_on_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    root = ROOT
    environment = {**__import__("os").environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    arguments = [str(folder), json.dumps([str(path) for path in sources]), json.dumps(runs)]
    ended = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same people in two domains."""
    folder = tmp_path_factory.mktemp("data")
    return [draw_training_set(folder / name) for name in ("one", "other")]


@pytest.fixture(scope="module")
def shared(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    on_two_processes(folder, sources, {name: [*TINY, *values] for name, values in RUNS.items()})
    return folder


def assert_near(one: Path, other: Path) -> None:
    """The same training up to rounding: the lines of metrics.csv, and how far the weights moved."""
    ours, theirs = (read_metrics(path / "metrics.csv") for path in (one, other))
    assert len(ours) == len(theirs) == 4
    for row, expected in zip(ours, theirs, strict=True):
        for name, value in expected.items():
            if name != "seconds" and value:
                assert row[name] == value or float(row[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
    weights, expected_weights = (load_tensors(path / "best.safetensors") for path in (one, other))
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        torch.testing.assert_close(
            weights[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", ["latent", "parts", "device"])
def test_two_processes_are_one(tmp_path: Path, shared: Path, sources: list[Path], name: str) -> None:
    """`parts` is compared with one process that takes the step at once."""
    values = [value for value in RUNS[name] if "accumulate" not in value]
    alone = trained(tmp_path / "alone", sources, *values)
    assert_near(shared / name, alone.path)
    # And the comparison sees what another training is.
    other = trained(tmp_path / "other", sources, *values, "seed=1")
    with pytest.raises(AssertionError):
        assert_near(shared / name, other.path)


def test_both_stages_on_two_processes(shared: Path) -> None:
    """Of the first process is what stands in the folder, once."""
    path = shared / "stages"
    rows = [(row["stage"], row["step"]) for row in read_metrics(path / "metrics.csv")]
    assert rows == [("mpg", "1"), ("mpg", "2"), *(("sp", str(step)) for step in range(1, 5))]
    assert (path / "baseline" / "best.safetensors").is_file()  # trunk: self, of both processes
    assert len(list((path / "synthesized").rglob("*.jpg"))) == 64
    assert len(list((path / "tensorboard" / "sp").iterdir())) == 1
    assert not list(path.rglob(".*.tmp"))


def test_two_processes_go_on_to_the_same_bits(shared: Path) -> None:
    whole, resumed = shared / "stages", shared / "resumed"
    weights, expected = (load_tensors(path / "best.safetensors") for path in (resumed, whole))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    ours, theirs = ([dict(row, seconds="") for row in read_metrics(path / "metrics.csv")] for path in (resumed, whole))
    assert ours == theirs


def test_identities_that_cannot_be_shared_out(
    tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, [*TINY, "train.batch_size=12", "train.accumulate=2"])
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    message = r"expected identities \(6, 2 images of each\) for 2 processes × train.accumulate=2, a multiple of 4"
    with pytest.raises(InputError, match=message):
        start_run(tmp_path / "run", config, sources)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    assert ranks.own_rows(load_config(None, [*TINY, "train.batch_size=16"]).train) == slice(8, 16)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_parts_are_the_whole(tmp_path: Path, sources: list[Path], precision: str) -> None:
    """Mining, batch statistics and losses are of the whole step, whatever it is cut into."""
    values = [*PLAIN, "perturbation=latent", "model.ssd=sds", f"precision={precision}"]
    whole = trained(tmp_path / "whole", sources, *values)
    parts = trained(tmp_path / "parts", sources, *values, "train.accumulate=2")
    if precision == "no":
        assert_near(parts.path, whole.path)
    losses, expected = ([float(row["loss"]) for row in read_metrics(x.path / "metrics.csv")] for x in (parts, whole))
    assert losses == pytest.approx(expected, rel=0.02)


def test_gradient_of_parts_is_the_gradient() -> None:
    """With stochastic depth and exchanged maps: against one graph of all parts."""
    config = load_config(None, [*TINY, "model.drop_path=0.5", "train.batch_size=12", "train.accumulate=3"])
    torch.manual_seed(0)
    model = build_spnet(config.model, (32, 16), 6).train()
    images, labels = torch.rand(12, 3, 32, 16), torch.arange(6).repeat_interleave(2)
    losses = TrainingStep(model, config, make_accelerator(config, "cpu")).backward(7, images, slice(0, 12), labels, 0.5)
    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert model.heads.norms[0].num_batches_tracked == 1

    model.zero_grad()
    parts = []
    for place, part in enumerate(zip(images.chunk(3), labels.chunk(3), strict=True)):
        seed_step(config.seed, 2, 7, place)
        parts.append(model.branch_features(*part))
    branches = model.classified(torch.cat([x for x, _ in parts], 1), torch.cat([valid for _, valid in parts]))
    expected = spnet_losses(branches, labels, config.loss, 0.5)
    expected["loss"].backward()
    assert torch.equal(losses["loss"], expected["loss"])
    for name, value in model.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(found[name], value.grad, msg=lambda text, name=name: f"{name}: {text}")
