"""Training from images to a run folder: what is written, what a restart gives, what goes wrong and how it says so."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("typer")

import warm
from command_line import error, run
from tiny import TINY, draw_training_set, trained

from apd.config.files import load_config, save_config
from apd.config.values import Config, TrainConfig
from apd.data.market import Sample
from apd.data.sampler import PKSampler
from apd.errors import DataWarning, InputError
from apd.run import Run, update_info
from apd.training.checkpoint import load_checkpoint, save_checkpoint
from apd.training.engine import LossGuard
from apd.training.log import read_metrics
from apd.training.sources import Sources, gather_sources, split_validation
from apd.training.sp import rate, total_steps
from apd.training.step import TrainingStep
from apd.training.train import make_trunk, start_run, train_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_training_set(tmp_path_factory.mktemp("data") / "drawn")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Run:
    return trained(tmp_path_factory.mktemp("runs") / "whole", data)


def test_run_folder(whole: Run, data: Path) -> None:
    path = whole.path
    assert Run(path).config == load_config(None, TINY)
    rows = read_metrics(path / "metrics.csv")
    assert [(row["stage"], row["step"]) for row in rows] == [("mpg", "2"), ("mpg", "4"), ("sp", "2"), ("sp", "4")]
    for row in rows:
        names = ("loss_g", "loss_d", "loss_mp", "loss_c", "loss_s", "flipped")
        names = names if row["stage"] == "mpg" else ("loss", "loss_k", "loss_nk", "loss_kp", "accuracy", "lr")
        assert all(np.isfinite(float(row[name])) for name in names)
    assert list((path / "tensorboard" / "mpg").iterdir())
    assert list((path / "tensorboard" / "sp").iterdir())
    assert (path / "baseline" / "best.safetensors").is_file()  # trunk: self
    assert not list(path.rglob(".*.tmp"))
    synthesized = sorted((path / "synthesized" / "drawn" / "bounding_box_train").iterdir())
    originals = sorted((data / "bounding_box_train").iterdir())
    assert [file.stem for file in synthesized] == [file.stem for file in originals]
    info = whole.info()
    assert info["data"] == [str(data)]
    assert info["threads"] == 1
    assert set(info["seconds"]) == {"mpg", "synthesize", "sp"}
    (own,) = info["own_test"].values()
    assert own["end"]["queries"] == 8
    assert 0 <= own["step 0"]["rank-1"] <= 1
    descriptors = whole.load_model()(torch.rand(3, 3, 32, 16))
    torch.testing.assert_close(descriptors.norm(dim=1), torch.ones(3))


def test_training_on_both_takes_the_steps_of_the_originals(whole: Run, data: Path) -> None:
    """An epoch counts original images, so that a run with synthesized ones is trained no longer."""
    row = read_metrics(whole.path / "metrics.csv")[-1]
    assert float(row["epoch"]) == pytest.approx(4 * 8 / 32)
    assert total_steps(TrainConfig(epochs=2.0, batch_size=8), 32) == 8
    assert total_steps(TrainConfig(epochs=2.0, batch_size=8, steps=5), 32) == 5


def _weights(path: Path) -> dict[str, torch.Tensor]:
    from apd.run import load_tensors

    return load_tensors(path)


def _same_results(one: Path, other: Path) -> None:
    """The same bits: losses, generator, synthesized images and network."""
    for name in ("best.safetensors", "generator.safetensors"):
        first, second = _weights(one / name), _weights(other / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    ours, theirs = ([dict(row, seconds="") for row in read_metrics(p / "metrics.csv")] for p in (one, other))
    assert ours == theirs
    for file in (one / "synthesized").rglob("*.jpg"):
        assert file.read_bytes() == (other / file.relative_to(one)).read_bytes()


_INTERRUPTED = """
import os, signal, sys, torch
from apd.run import Run
from apd.training import mpg, sp
from apd.training.train import train_run

torch.set_num_threads(1)
path, stage, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
save = sp.save_checkpoint

def save_and_die(run, *what):
    save(run, *what)
    if what[:2] == (stage, step):
        os.kill(os.getpid(), signal.SIGKILL)

mpg.save_checkpoint = sp.save_checkpoint = save_and_die
train_run(Run(path), "cpu")
"""


@pytest.mark.parametrize(("stage", "step"), [("mpg", 3), ("sp", 1)])
def test_killed_run_goes_on_to_the_same_bits(tmp_path: Path, whole: Run, data: Path, stage: str, step: int) -> None:
    """Killed with SIGKILL after a checkpoint between two lines of metrics.csv, and resumed."""
    path = tmp_path / "killed"
    killed = start_run(path, whole.config, [data])
    shutil.copytree(whole.path / "baseline", path / "baseline")  # the trunk's own training is not the point
    command = [sys.executable, "-c", _INTERRUPTED, str(path), stage, str(step)]
    assert warm.Popen(command).wait() == -signal.SIGKILL
    assert (path / "last" / f"{stage}-{step:08}.pt").is_file()
    assert not (path / "best.safetensors").is_file()
    train_run(killed, "cpu")
    _same_results(path, whole.path)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize("stage", ["mpg", "sp"])
def test_a_signal_ends_a_training_with_a_checkpoint(
    tmp_path: Path, whole: Run, data: Path, stage: str, signum: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next step, and the rest goes on to the same bits."""
    from apd.training import mpg, sp

    module = {"mpg": mpg, "sp": sp}[stage]
    guard, steps = module.LossGuard.watch, []

    def watch(self: Any, step: int, *rest: Any) -> None:
        steps.append(step)
        if step == 2:
            os.kill(os.getpid(), signum)
        guard(self, step, *rest)

    path = tmp_path / "run"
    start_run(path, whole.config, [data])
    shutil.copytree(whole.path / "baseline", path / "baseline")
    if stage == "sp":
        for name in ("generator.safetensors", "run.json", "metrics.csv"):
            shutil.copy(whole.path / name, path)
    with monkeypatch.context() as patch:
        patch.setattr(module.LossGuard, "watch", watch)
        message = run("train", "--resume", path, "--device", "cpu", code=128 + signum)
    assert steps == [1, 2]
    assert f"interrupted at step 2; go on with: apd train --resume {path}" in message
    assert (path / "last" / f"{stage}-00000002.pt").is_file()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train_run(Run(path), "cpu")
    _same_results(path, whole.path)


def test_resumed_in_the_middle_of_a_stage(tmp_path: Path, whole: Run, data: Path) -> None:
    """From the checkpoint of step 2, without the one of step 4, on the command line."""
    path = tmp_path / "resumed"
    shutil.copytree(whole.path, path)
    (path / "best.safetensors").unlink()
    (path / "last" / "sp-00000004.pt").unlink()
    assert "wrote" in run("train", "--resume", path, "--device", "cpu")
    _same_results(path, whole.path)


BASELINE = ("perturbation=none", "model.ssd=none")


def test_a_finished_run_is_said_to_be(tmp_path: Path, data: Path) -> None:
    made = trained(tmp_path / "run", data, *BASELINE)
    before = {path: path.stat().st_mtime_ns for path in made.path.rglob("*") if path.is_file()}
    text = run("train", "--resume", made.path, "--device", "cpu")
    assert text.splitlines() == [f"{made.path}: finished; --resume with train.steps=N trains on, to N steps"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_finished_run_is_trained_on(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its last step, by the schedule of the new length; killed on the way, it goes on from there."""
    made = trained(tmp_path / "run", data, *BASELINE)
    weights, resume = made.fingerprint(), ("train", "--resume", made.path, "--device", "cpu")
    assert "expected more than the 4 steps" in error(*resume, "train.steps=4")
    assert "the run counts steps" in error(*resume, "train.epochs=9")
    assert "stands alone, but for train.steps" in error(*resume, "train.steps=8", "train.lr=1")
    assert Run(made.path).config == made.config

    from apd.training import train

    with monkeypatch.context() as patch:  # the process is killed before a step
        patch.setattr(train, "train_sp", lambda *_: (_ for _ in ()).throw(InputError("killed")))
        assert "killed" in run(*resume, "train.steps=8", code=2)
    assert "wrote" in run(*resume)
    again = Run(made.path)
    assert again.config == replace(made.config, train=replace(made.config.train, steps=8))
    assert again.fingerprint() != weights
    assert "finished" in again.info()
    rows = read_metrics(made.path / "metrics.csv")
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"]
    factors = [rate(step, 4, 8) for step in (5, 7)]  # warm up of an epoch, which is 4 steps
    assert [float(row["lr"]) for row in rows[2:]] == pytest.approx([0.0005 * 8 / 64 * factor for factor in factors])
    assert "finished;" in run(*resume)

    shutil.rmtree(made.path / "last")
    assert "no checkpoint of stage 2" in error(*resume, "train.steps=12")
    update_info(made.path, collapsed={"step": 3})
    (made.path / "last").mkdir()
    save_checkpoint(made.path, "sp", 8, {})
    assert "collapsed at step 3" in error(*resume, "train.steps=12")


def test_trained_on_from_another_run(tmp_path: Path, data: Path) -> None:
    """Fine-tuning: the heads are of other people."""
    made = trained(tmp_path / "run", data, *BASELINE)
    fewer = draw_training_set(tmp_path / "fewer")
    for image in (fewer / "bounding_box_train").glob("0001_*"):
        image.unlink()
    values = [*TINY, *BASELINE, f"model.pretrained={made.path}"]
    text = run("train", "--data", fewer, "--output", tmp_path / "tuned", "--device", "cpu", *values, "train.steps=0")
    line = f"model.pretrained: {made.path}/best.safetensors: made anew: heads.classifier"
    assert text.splitlines().count(line) == 1
    ours, theirs = _weights(tmp_path / "tuned" / "best.safetensors"), _weights(made.path / "best.safetensors")
    assert len(ours["heads.classifier.weight"]) == 7
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != "heads.classifier.weight")
    message = error("train", "--data", data, "--output", tmp_path / "no", *values[:-1], f"model.pretrained={data}")
    assert f"model.pretrained: {data}: no best.safetensors: it is no run whose training has ended" in message


@pytest.mark.parametrize("folder", ["bounding_box_train", "query", "bounding_box_test"])
def test_damaged_images_are_said_before_the_training(tmp_path: Path, data: Path, folder: str) -> None:
    shutil.copytree(data, tmp_path / "data")
    first, *_, last = sorted((tmp_path / "data" / folder).iterdir())
    for image in (first, last):
        image.write_bytes(image.read_bytes()[:60])
    message = error("train", "--data", tmp_path / "data", "--output", tmp_path / "run", *TINY, *BASELINE)
    assert f"{first}: cannot be read as an image" in message
    assert "and 1 more of 48 images" in message
    assert not (tmp_path / "run").exists()


def test_a_test_that_cannot_be_taken_is_said_at_the_start(tmp_path: Path, data: Path) -> None:
    one, alone = tmp_path / "one", tmp_path / "alone"
    shutil.copytree(data, one)
    for image in [*one.glob("query/*_c2s1_*"), *one.glob("bounding_box_test/*_c2s1_*")]:
        image.unlink()
    shutil.copytree(data / "bounding_box_train", alone / "bounding_box_train")
    sources = ("--data", one, "--data", alone, "--output", tmp_path / "run", "--device", "cpu")
    text = run("train", *sources, *TINY, *BASELINE, "train.steps=1")
    told = [line for line in text.splitlines() if line.startswith("note: ") and "own test" in line]
    assert "note: one: there will be no own test: no query has an image of its identity from another camera" in told[0]
    assert "--ignore-cameras" in told[0]
    assert (
        told[1] == "note: alone: there will be no own test: it has no query and gallery apart from the training images"
    )
    assert text.index(told[1]) < text.index("baseline")
    assert Run(tmp_path / "run").info()["own_test"] == {}


def test_run_goes_on_with_the_images_that_it_began_with(tmp_path: Path, data: Path) -> None:
    """Another file would shift the batches without a word, another identity the classifier's rows."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    made = trained(tmp_path / "run", folder, "perturbation=none")
    (made.path / "best.safetensors").unlink()
    train = folder / "bounding_box_train"
    for name in ("0001_c1s1_000000_00.png", "0099_c1s1_000001_00.png"):
        shutil.copy(train / "0001_c1s1_000001_00.png", train / name)
        with pytest.raises(InputError, match=r"run: began with other training images than there are now in .*data"):
            train_run(Run(made.path), "cpu")
        (train / name).unlink()
    train_run(Run(made.path), "cpu")
    assert (made.path / "best.safetensors").is_file()


def test_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "sp", 2, {"x": torch.arange(3)})
    path = save_checkpoint(tmp_path, "sp", 4, {"x": torch.arange(4)})
    save_checkpoint(tmp_path, "mpg", 9, {})
    assert load_checkpoint(tmp_path, "sp")["step"] == 4
    whole = path.read_bytes()
    for content in (
        whole[: len(whole) // 2],
        b"",
        b"text",
        whole.replace(b"\x03\0\0\0\0\0\0\0", b"\x07\0\0\0\0\0\0\0"),
    ):
        path.write_bytes(content)
        with pytest.warns(DataWarning, match=path.name):
            found = load_checkpoint(tmp_path, "sp")
        assert found["step"] == 2
        assert found["x"].tolist() == [0, 1, 2]
    (tmp_path / "last" / "sp-00000002.pt").write_bytes(b"")
    with pytest.warns(DataWarning), pytest.raises(InputError, match="all checkpoints of stage sp are damaged"):
        load_checkpoint(tmp_path, "sp")
    assert load_checkpoint(tmp_path, "none") is None


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    """By a later checkpoint; a file of a large network is hundreds of megabytes."""
    half = tmp_path / "last" / ".sp-00000003.pt.0a1b2c3d.tmp"
    half.parent.mkdir()
    half.write_bytes(b"half")
    save_checkpoint(tmp_path, "sp", 4, {})
    assert half.exists()  # so young that somebody may just have begun to write it
    os.utime(half, (0, 0))
    save_checkpoint(tmp_path, "sp", 5, {})
    assert sorted(path.name for path in half.parent.iterdir()) == ["sp-00000004.pt", "sp-00000005.pt"]


def test_two_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, "sp", step, {})
    assert sorted(file.name for file in (tmp_path / "last").iterdir()) == ["sp-00000002.pt", "sp-00000010.pt"]


def test_learns_to_tell_identities_apart(tmp_path: Path, data: Path) -> None:
    """60 steps on 8 identities in their own colours."""
    made = trained(
        tmp_path / "run",
        data,
        *("perturbation=none", "train.steps=60", "train.batch_size=16", "train.lr=0.02"),
        *("data.erasing=0", "model.drop_path=0"),
    )
    rows = read_metrics(made.path / "metrics.csv")
    assert float(rows[-1]["loss_k"]) < 0.3 * float(rows[0]["loss_k"])
    assert float(rows[-1]["accuracy"]) == 1


@pytest.mark.parametrize("perturbation", ["latent", "both"])
def test_latent_perturbation(tmp_path: Path, whole: Run, data: Path, perturbation: str) -> None:
    changes = [f"perturbation={perturbation}", f"mpg.trunk_weights={whole.path / 'baseline'}"]
    made = trained(tmp_path / "run", data, *changes)
    rows = read_metrics(made.path / "metrics.csv")
    assert float(rows[-1]["loss_latent"]) > 0
    assert (made.path / "generator.safetensors").is_file() == (perturbation == "both")
    assert not (made.path / "baseline").exists()


def test_cnn_backbone(tmp_path: Path, data: Path) -> None:
    """Both stages with a CNN, also as ψ and φ, and random directions; its run is loaded with all statistics."""
    sizes = [f"model.{name}=none" for name in ("patch_size", "embed_dim", "depth", "heads")]
    changes = [*sizes, "model.backbone=test_resnet", "perturbation=both", "latent.direction=random"]
    made = trained(tmp_path / "run", data, *changes)
    rows = read_metrics(made.path / "metrics.csv")
    assert float(rows[1]["content"]) > 0
    assert float(rows[-1]["loss_latent"]) > 0
    assert made.load_model()(torch.rand(3, 3, 32, 16)).shape == (3, 96)
    assert "cnn.layer3.0.bn1.running_mean_2" in _weights(made.path / "best.safetensors")


def test_mixed_precision(tmp_path: Path, whole: Run, data: Path) -> None:
    """bfloat16 in both stages, in a process that has trained in float32: the losses are near, and not the same."""
    changes = ["precision=bf16", f"mpg.trunk_weights={whole.path / 'baseline'}"]
    made = trained(tmp_path / "run", data, *changes)
    ours, theirs = (read_metrics(path / "metrics.csv") for path in (made.path, whole.path))
    for row, other in zip(ours, theirs, strict=True):
        for name in ("loss_mp", "loss_c", "loss_k"):
            if row[name]:
                assert float(row[name]) == pytest.approx(float(other[name]), rel=0.1)
                assert row[name] != other[name]


def test_precision_that_a_cpu_lacks(tmp_path: Path, data: Path) -> None:
    with pytest.raises(InputError, match="precision: expected no or bf16 on the CPU, got fp16"):
        trained(tmp_path / "run", data, "perturbation=none", "precision=fp16")


@pytest.mark.parametrize("train_on", ["original", "synthesized"])
def test_images_of_stage_2(
    tmp_path: Path, whole: Run, data: Path, train_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apd.training import train as module

    seen = []

    def record(run: Path, sources: Sources, *rest: object) -> float:
        seen.append(sources)
        return 0.0

    monkeypatch.setattr(module, "train_sp", record)
    monkeypatch.setattr(module, "_report", lambda *rest: None)
    made = start_run(tmp_path / "run", load_config(None, [*TINY, f"data.train_on={train_on}"]), [data])
    shutil.copy(whole.path / "generator.safetensors", made.path)
    update_info(made.path, camera_distance=None)  # as an older version left it: nothing is held back
    train_run(made, "cpu")
    assert len(seen[0].paths) == 32
    assert all((made.path in path.parents) == (train_on == "synthesized") for path in seen[0].paths)


def test_validation_chooses_the_weights(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every mAP on the drawn images 1, the scores come from here: the second of four validations is the best."""
    from apd.training import validation
    from apd.training.validation import evaluate_samples

    scores, seen = [0.5, 0.9, 0.9, 0.7], []

    def scripted(model: torch.nn.Module, query: list[Sample], gallery: list[Sample], *rest: Any) -> Any:
        found = evaluate_samples(model, query, gallery, *rest)
        seen.append((query, gallery, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
        return found._replace(mAP=scores[len(seen) - 1])

    monkeypatch.setattr(validation, "evaluate_samples", scripted)
    changes = ["perturbation=none", "model.ssd=none", "train.validation_identities=2", "train.validation_epochs=0.5"]
    made = trained(tmp_path / "run", data, *changes, "train.steps=8", "train.lr=0.01")
    rows = read_metrics(made.path / "metrics.csv")
    assert [float(row["validation_map"]) for row in rows if row["validation_map"]] == scores
    kept = _weights(made.path / "best.safetensors")
    assert len(kept["heads.classifier.weight"]) == 6  # 8 − 2 identities
    same = [all(torch.equal(kept[name], state[name]) for name in kept) for *_, state in seen]
    assert same == [False, True, False, False]
    sources, (held_out,) = gather_sources([_samples(data)], 2, 0)
    assert not {sample.path for sample in held_out} & set(sources.paths)
    assert [list(part) for part in seen[0][:2]] == [list(part) for part in split_validation(held_out)]


def _samples(data: Path) -> tuple[Sample, ...]:
    from apd.data.market import read_market

    return read_market(data, ("train",)).train


def test_two_sources(tmp_path: Path, data: Path, whole: Run) -> None:
    """The same number is another person in another domain; folders of one name stay apart."""
    other = tmp_path / "elsewhere" / "drawn"
    shutil.copytree(data, other)
    config = load_config(None, [*TINY, f"mpg.trunk_weights={whole.path / 'baseline'}"])
    made = start_run(tmp_path / "run", config, [data, other])
    train_run(made, "cpu")
    assert len(_weights(made.path / "best.safetensors")["heads.classifier.weight"]) == 16
    assert sorted(path.name for path in (made.path / "synthesized").iterdir()) == ["0-drawn", "1-drawn"]
    sources, _ = gather_sources([_samples(data), _samples(other)], 0, 0)
    assert sources.labels.max() == 15
    assert (sources.labels[sources.domains == 1] >= 8).all()


def test_no_step_and_identities_held_out(tmp_path: Path, data: Path) -> None:
    """The network that the run began with."""
    run = trained(tmp_path / "run", data, "perturbation=none", "train.steps=0", "train.validation_identities=2")
    (result,) = run.info()["own_test"].values()
    assert result["step 0"] == result["end"]


def test_finished_run_is_read_only(tmp_path: Path, whole: Run, data: Path) -> None:
    """Of ψ and φ that are asked for again, nothing is written."""
    shutil.copytree(whole.path, tmp_path / "run")
    info = tmp_path / "run" / "run.json"
    before = info.stat().st_mtime_ns, info.stat().st_ino
    assert make_trunk(Run(tmp_path / "run"), "cpu").name.startswith("self")
    assert (info.stat().st_mtime_ns, info.stat().st_ino) == before


def test_validation_needs_two_cameras() -> None:
    samples = [
        Sample(Path(f"{pid}_{camera}"), pid, camera) for pid in range(5) for camera in (1, 2) if pid or camera == 1
    ]
    _, (held_out,) = gather_sources([samples], 2, 0)
    assert 0 not in {sample.pid for sample in held_out}
    with pytest.raises(InputError, match=r"expected fewer than the 4 identities \(of 5\) .* got 4"):
        gather_sources([samples], 4, 0)


def test_rate() -> None:
    rates = [rate(step, 10, 110) for step in range(110)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(rates) == rates[9] == rates[10] == 1
    assert rates[60] == pytest.approx(0.5)
    assert rates[-1] < 0.001
    assert rate(0, 0, 10) == 1


def test_loss_that_is_not_finite_names_step_and_images(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the bad step is saved, and the run can go on from before it."""
    from apd.training import step as module

    steps, given = [], module.spnet_losses

    def spoiled(*arguments: Any) -> dict[str, torch.Tensor]:
        losses = given(*arguments)
        steps.append(losses)
        if len(steps) == 3:
            losses["loss"] = losses["loss"] * torch.nan
        return losses

    monkeypatch.setattr(module, "spnet_losses", spoiled)
    path = tmp_path / "run"
    message = r"sp: the loss of step 3 is nan.* The step's 8 images: (.*\.png, ){4}…"
    with pytest.raises(InputError, match=message) as raised:
        trained(path, data, "perturbation=none", "log_steps=1")
    sampler = PKSampler(gather_sources([_samples(data)], 0, 0)[0].labels, 8, 2, seed=0)
    first = [_samples(data)[i].path for i in next(sampler.batches(2))][:4]
    assert all(str(image) in str(raised.value) for image in first)
    assert sorted(file.name for file in (path / "last").iterdir()) == ["sp-00000001.pt", "sp-00000002.pt"]
    assert [row["step"] for row in read_metrics(path / "metrics.csv")] == ["1", "2"]
    assert not (path / "best.safetensors").exists()
    monkeypatch.undo()
    train_run(Run(path), "cpu")
    assert [row["step"] for row in read_metrics(path / "metrics.csv")] == ["1", "2", "3", "4"]


def test_losses_of_a_gpu_are_looked_at_together() -> None:
    """In order; what is written waits for the look."""
    guard = LossGuard("sp", [Path(f"{i}.png") for i in range(9)], [])
    waiting = [torch.tensor(value) for value in (1.0, torch.inf, torch.nan)]
    for step, loss in enumerate(waiting, 1):
        guard._waiting.append((step, loss, torch.tensor([step, step + 3, step])))
    with pytest.raises(InputError, match=r"step 2 is inf.* The step's 2 images: 2\.png, 5\.png$"):
        guard.settle()
    guard.settle()  # said once


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss may have a gradient that is not."""

    def broken(self: TrainingStep, step: int, *rest: Any) -> dict[str, torch.Tensor]:
        losses = backward(self, step, *rest)
        if step == 4:
            next(self._model.parameters()).grad.fill_(torch.nan)
        return losses

    backward = TrainingStep.backward
    monkeypatch.setattr(TrainingStep, "backward", broken)
    with pytest.raises(InputError, match=r"sp: the weights after step 4 are not finite.* images: "):
        trained(tmp_path / "run", data, "perturbation=none", "train.clip=null")
    assert not (tmp_path / "run" / "best.safetensors").exists()
    assert not list((tmp_path / "run").glob("last/*4.pt"))


def test_diverged_training_is_stopped(tmp_path: Path, data: Path) -> None:
    with pytest.raises(InputError, match=r"sp: the loss of step [2-4] is nan"):
        trained(tmp_path / "run", data, "perturbation=none", "train.lr=1e30", "train.warmup_epochs=0")


def test_errors(tmp_path: Path, whole: Run, data: Path) -> None:
    assert "--data" in error("train")
    assert "did you mean train.lr" in error("train", "--data", data, "train.lrr=1")
    assert "bounding_box_train" in error("train", "--data", tmp_path, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="named twice"):
        start_run(tmp_path / "run", whole.config, [data, data / ".." / data.name])
    assert not (tmp_path / "run").exists()
    assert "there is a run already" in error("train", "--data", data, "--output", whole.path)
    assert "stands alone" in error("train", "--resume", whole.path, "train.lr=1")
    assert "not the folder of a run" in error("train", "--resume", tmp_path)
    (tmp_path / "cut").mkdir()
    for name in ("config.yaml", "run.json"):
        shutil.copy(whole.path / name, tmp_path / "cut")
    for name in ("best.safetensors", "generator.safetensors"):
        (tmp_path / "cut" / name).write_bytes((whole.path / name).read_bytes()[:1000])
    with pytest.raises(InputError, match=r"best\.safetensors: not a \.safetensors file, or cut off"):
        Run(tmp_path / "cut").load_model()
    with pytest.raises(InputError, match=r"generator\.safetensors: not a \.safetensors file"):
        Run(tmp_path / "cut").load_generator()
    config = replace(whole.config, model=replace(whole.config.model, embed_dim=36))
    shutil.copy(whole.path / "best.safetensors", tmp_path / "cut")
    save_config(config, tmp_path / "cut" / "config.yaml")
    other = Run(tmp_path / "cut")
    with pytest.raises(InputError, match="do not fit"):
        other.load_model()


def test_too_few_identities(tmp_path: Path, data: Path) -> None:
    config = load_config(None, [*TINY, "perturbation=none", "train.batch_size=64", "train.instances=2"])
    with pytest.raises(InputError, match="at least 32 identities"):
        train_run(start_run(tmp_path / "run", config, [data]), "cpu")


def test_stage_2_that_cannot_begin_ends_the_run_before_stage_1(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apd.training import train as module

    monkeypatch.setattr(module, "make_trunk", lambda *rest: pytest.fail("stage 1 has begun"))
    for name, change, message in (
        ("identities", "train.batch_size=64", "at least 32 identities"),
        ("backbone", "model.backbone=nonesuch", "nonesuch"),
        ("weights", f"model.pretrained={tmp_path / 'none.pth'}", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            trained(tmp_path / name, data, change)


def test_stage_1_that_cannot_begin_makes_no_run(tmp_path: Path, data: Path) -> None:
    """With trunk=self it would else be said after the baseline's training."""
    for change, message in (
        ("mpg.batch_size=33", "mpg.batch_size: expected at most the 32 training images, got 33"),
        ("mpg.trunk=nonesuch", "mpg.trunk: nonesuch: timm has no model"),
    ):
        with pytest.raises(InputError, match=message):
            start_run(tmp_path / "run", load_config(None, [*TINY, change]), [data])
    assert not (tmp_path / "run").exists()
    start_run(tmp_path / "run", load_config(None, [*TINY, "mpg.batch_size=33", "perturbation=latent"]), [data])


def test_auto_trunk_is_chosen_once(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that began with one ψ and φ does not go on with another one, because a server is out of reach by then."""
    from apd.training import train as module

    config = load_config(None, [*TINY, "mpg.trunk=auto"])
    made = start_run(tmp_path / "run", config, [data])
    built = []
    monkeypatch.setattr(module, "build_trunk", lambda name, weights: built.append(name) or name)
    monkeypatch.setattr(module, "BaselineTrunk", lambda *rest: pytest.fail("the trunk became another one"))
    for choice in ("resnet50", "self"):
        monkeypatch.setattr(module, "resolve_trunk", lambda *rest, choice=choice: choice)
        module.make_trunk(made, "cpu")
    assert built == ["resnet50", "resnet50"]


def test_untrained_trunk_belongs_to_the_seed(tmp_path: Path, data: Path) -> None:
    from apd.training.train import make_trunk

    config = load_config(None, [*TINY, "mpg.trunk=random:test_resnet"])
    made = start_run(tmp_path / "run", config, [data])
    first, second = make_trunk(made, "cpu").state_dict(), make_trunk(made, "cpu").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_trunk_must_be_a_baseline(tmp_path: Path, whole: Run, data: Path) -> None:
    config = load_config(None, [*TINY, f"mpg.trunk_weights={whole.path}"])
    with pytest.raises(InputError, match=r"mpg\.trunk_weights: .*expected a baseline"):
        train_run(start_run(tmp_path / "run", config, [data]), "cpu")


def test_synthesize(tmp_path: Path, whole: Run, data: Path) -> None:
    """All parts, the same files again, and those of an interrupted call kept."""
    output = tmp_path / "new"
    parts = [option for part in ("train", "query", "gallery") for option in ("--part", part)]
    arguments = ("synthesize", "--checkpoint", whole.path, "--data", data, "--output", output, *parts)
    assert f"wrote {output}" in run(*arguments)
    files = sorted(output.rglob("*.jpg"))
    assert len(files) == 32 + 8 + 8
    made = {file: file.read_bytes() for file in files}
    for file in files[::3]:
        file.unlink()
    files[1].write_bytes(b"kept")
    run(*arguments)
    assert files[1].read_bytes() == b"kept"
    assert all(file.read_bytes() == made[file] for file in files if file != files[1])
    with Image.open(files[0]) as image:
        assert image.size == (16, 32)
    assert "train, query or gallery" in error(*arguments, "--part", "test")


def test_synthesized_images_do_not_mix(tmp_path: Path, whole: Run, data: Path) -> None:
    """Neither with the originals nor with those of another generator."""
    originals = sorted(data.rglob("*"))
    arguments = ("synthesize", "--data", data, "--checkpoint")
    assert "holds the originals" in error(*arguments, whole.path, "--output", data)
    assert sorted(data.rglob("*")) == originals
    run(*arguments, whole.path, "--output", tmp_path / "new")
    shutil.copytree(whole.path, tmp_path / "other")
    state = _weights(tmp_path / "other" / "generator.safetensors")
    (tmp_path / "other" / "generator.safetensors").write_bytes(save({**state, "change.bias": torch.ones(3)}))
    update_info(tmp_path / "other", weights={})
    assert "of another generator" in error(*arguments, tmp_path / "other", "--output", tmp_path / "new")


def test_config_show() -> None:
    assert "train.lr" in run("config", "show", "cpu")


def test_run_information_is_valid_json(whole: Run) -> None:
    info = json.loads((whole.path / "run.json").read_text())
    assert info["versions"]["torch"] == torch.__version__
    assert info["trunk"].startswith("self")


def test_default_configuration_is_the_papers() -> None:
    config = Config()
    assert (config.mpg.weight_mp, config.mpg.weight_s, config.mpg.weight_c) == (2.0, 1.0, 1.0)
    assert (config.loss.weight_k, config.loss.weight_nk, config.loss.weight_kp) == (1.0, 0.5, 0.1)


def test_compiled_network(tmp_path: Path, data: Path) -> None:
    """Losses as without, up to rounding, and one compilation: no step is compiled anew."""
    values = ("perturbation=none", "model.ssd=sds", "model.drop_path=0", "model.depth=1", "train.optimizer=sgd")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (trained(tmp_path / flag, data, *values, f"train.compile={flag}") for flag in ("false", "true"))
    ours, theirs = ([float(row["loss"]) for row in read_metrics(run.path / "metrics.csv")] for run in (compiled, plain))
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_weights_that_change_after_the_training(tmp_path: Path, whole: Run) -> None:
    """Any flipped bit of them would give other descriptors, which nothing else notices."""
    shutil.copytree(whole.path, tmp_path / "run")
    for name, load in (("best.safetensors", Run.load_network), ("generator.safetensors", Run.load_generator)):
        path = tmp_path / "run" / name
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: has changed since the training of its run ended"):
            load(Run(tmp_path / "run"))


def test_training_images_that_were_replaced_are_named(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    made = trained(tmp_path / "run", folder, "perturbation=none")
    (made.path / "best.safetensors").unlink()
    replaced = sorted((folder / "bounding_box_train").iterdir())[3]
    Image.new("RGB", (16, 32), (1, 2, 3)).save(replaced)
    with pytest.raises(InputError, match=rf"began with other contents of 1 training image: .*{replaced.name}"):
        train_run(Run(made.path), "cpu")


def test_what_was_made_of_a_changed_original_is_made_again(tmp_path: Path, whole: Run, data: Path) -> None:
    folder, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, folder)
    command = ("synthesize", "--checkpoint", whole.path, "--data", folder, "--output", out, "--device", "cpu")
    run(*command)
    made = sorted((out / "bounding_box_train").glob("*.jpg"))
    before = {path: path.stat().st_mtime_ns for path in made}
    replaced = sorted((folder / "bounding_box_train").iterdir())[3]
    Image.new("RGB", (16, 32), (200, 2, 3)).save(replaced)
    run(*command)
    assert [path for path in made if path.stat().st_mtime_ns != before[path]] == [made[3]]
