"""Protocols: who trains, who tests, and whole ones on miniatures with a tiny network."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("typer")

import miniatures
from command_line import error, run

from apd.data.datasets import DATASETS, DataSpec
from apd.errors import DataWarning, InputError
from apd.experiments.protocols import AVERAGE, PROTOCOLS, locate, protocol_named
from apd.retrieval.features import FeatureSet
from apd.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (
    *("perturbation=none", "model.ssd=none", "data.height=32", "data.width=16", "data.pad=2", "data.workers=0"),
    *("model.backbone=vit_tiny_patch16_224", "model.pretrained=none", "model.patch_size=8", "model.embed_dim=24"),
    *("model.depth=1", "model.heads=2", "train.batch_size=4", "train.instances=2", "train.steps=2"),
    *("train.optimizer=adamw", "train.lr=0.0005", "train.warmup_epochs=1", "train.bias_lr=1", "log_steps=2"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for make in miniatures.ALL.values():
        make(folder)
    return folder


def figures(path: Path) -> dict:
    return json.loads((path / "table.json").read_text())


# What a protocol is


def test_definitions() -> None:
    tasks = {name: [task.name for task in protocol.tasks] for name, protocol in PROTOCOLS.items()}
    assert tasks == {
        "P1": ["M+C2+C3+CS→PRID+GRID+VIPeR+iLIDS"],
        "P2": ["MS+C3+CS→M", "M+C3+CS→MS", "M+MS+CS→C3"],
        "P3": ["MS+C3+CS→M", "M+C3+CS→MS", "M+MS+CS→C3"],
        "leave-one-out": ["D+MS+C3→M", "M+MS+C3→D", "M+D+C3→MS", "M+D+MS→C3"],
    }
    everything = {name: {task.all_images for task in protocol.tasks} for name, protocol in PROTOCOLS.items()}
    assert everything == {"P1": {True}, "P2": {False}, "P3": {True}, "leave-one-out": {False}}
    for protocol in PROTOCOLS.values():
        for task in protocol.tasks:
            assert not set(task.sources) & set(task.targets)
            assert all("train" in DATASETS[name].parts for name in task.sources)
            assert all("query" in DATASETS[name].parts for name in task.targets)
        for published in protocol.published:
            assert set(published.by_target) <= {*protocol.targets, AVERAGE}


def test_choice() -> None:
    chosen = protocol_named("p2", targets=["cuhk03"])
    assert [task.name for task in chosen.tasks] == ["M+MS+CS→C3"]
    assert [f.by_target for f in chosen.published] == [{"cuhk03": (44.4, 44.6)}, {"cuhk03": (42.8, 43.9)}]
    assert protocol_named("P1", targets=["viper"]).published == ()  # an average of four is no figure of one
    single = protocol_named("single-source", "market1501", ["msmt17", "cuhk03"])
    assert [task.name for task in single.tasks] == ["M→MS+C3"]
    for arguments, message in (
        (("P4",), "no such protocol; expected P1, P2, P3, leave-one-out, single-source"),
        (("P2", None, ["viper"]), "--target viper: expected of P2: market1501, msmt17, cuhk03"),
        (("P2", "viper"), "--source viper: is for single-source"),
        (("single-source",), "expected --source A and at least one --target B"),
        (("single-source", "viper", ["msmt17"]), "has no training images"),
        (("single-source", "msmt17", ["cuhk-sysu"]), "has no test images"),
        (("single-source", "msmt17", ["msmt17"]), "a target is unseen"),
        (("single-source", "x", ["msmt17"]), "--source x: expected a data set"),
    ):
        with pytest.raises(InputError, match=message):
            protocol_named(*arguments)


def test_where_the_data_sets_are(root: Path, tmp_path: Path) -> None:
    found = locate(PROTOCOLS["P1"].data_sets, root)
    assert found["ilids"] == DataSpec(root / "i-LIDS_Pedestrian", "ilids")
    assert found["cuhk03"] == DataSpec(root / "cuhk03-np", "cuhk03", "detected")
    assert locate(["msmt17"], root)["msmt17"].variant == "v1"
    given = DataSpec.parse(f"cuhk03/labeled:{root / 'cuhk03-np'}")
    assert locate(["cuhk03", "viper"], root, [given])["cuhk03"] == given
    with pytest.raises(InputError, match=r"no folder of cuhk02 .*; viper"):
        locate(["cuhk02", "viper"], tmp_path)
    with pytest.raises(InputError, match="expected NAME:PATH with a name of viper"):
        locate(["viper"], root, [given])
    with pytest.raises(InputError, match="the protocol says"):
        locate(["viper"], root, [DataSpec.parse("viper+test:x")])
    with pytest.raises(InputError, match="no such folder"):
        locate(["viper"], tmp_path / "x")


# Whole protocols


@pytest.fixture(scope="module")
def p1(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("protocols") / "p1"
    return output, run("protocol", "run", "P1", "--data-root", root, "--output", output, *TINY)


def test_p1(p1: tuple[Path, str], root: Path) -> None:
    output, text = p1
    (path,) = (output / "runs").iterdir()
    made = Run(path).info()
    assert made["data"] == [
        f"market1501+test:{root / 'Market-1501-v15.09.15'}",
        f"cuhk02+test:{root / 'cuhk02'}",
        f"cuhk03/detected+test:{root / 'cuhk03-np'}",
        f"cuhk-sysu:{root / 'CUHK-SYSU'}",
    ]
    assert "28 images, 7 identities" in text  # Market-1501's 16 + 6 + 6, and none of distractors
    assert made["own_test"] == {}
    (results,) = figures(output)["results"].values()
    assert {name: (found["splits"], found["queries"]) for name, found in results.items()} == {
        "prid": (10, 30),
        "grid": (10, 30),
        "viper": (10, 30),
        "ilids": (10, 40),
    }
    for found in results.values():
        assert 0 < found["mAP"] <= 1
    assert results["prid"]["sd"]["mAP"] > 0
    assert figures(output)[AVERAGE]["mAP"] == pytest.approx(sum(f["mAP"] for f in results.values()) / 4)
    table = (output / "table.md").read_text()
    assert table in text
    head, _, ours, *published = table.splitlines()
    assert head.count("mAP") == 5
    assert ours.count("±") == 8
    assert "| CILP-FGDI (published) | – | – | – | – | – | – | – | – | 82.2 | 75.5 |" in published
    assert "cuhk03/detected" in table
    lists = json.loads((output / "splits" / "viper.json").read_text())
    assert len(lists) == 10
    assert all(name.startswith("cam_a/") for one in lists for name in one["query"])


def test_a_protocol_goes_on_where_it_was(p1: tuple[Path, str], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import apd.experiments.protocol_runs

    output, _ = p1
    before = figures(output)
    (weights,) = output.glob("runs/*/best.safetensors")
    written = weights.stat().st_mtime_ns
    (viper,) = output.glob("results/*-viper.json")
    viper.unlink()
    (output / "table.json").unlink()
    tested: list[str | None] = []
    original = apd.experiments.protocol_runs.evaluate_target

    def evaluate(extractor: object, spec: DataSpec, lists: Path) -> object:
        tested.append(spec.name)
        return original(extractor, spec, lists)  # type: ignore[arg-type]

    monkeypatch.setattr(apd.experiments.protocol_runs, "evaluate_target", evaluate)
    run("protocol", "run", "P1", "--data-root", root, "--output", output, *TINY)
    assert tested == ["viper"]
    assert weights.stat().st_mtime_ns == written
    assert figures(output) == before
    lists = output / "splits" / "viper.json"  # other splits are another test
    own = lists.read_text()
    lists.write_text(json.dumps(json.loads(own)[:3]))
    run("protocol", "run", "P1", "--data-root", root, "--output", output, *TINY)
    (found,) = figures(output)["results"].values()
    assert (tested, found["viper"]["splits"]) == (["viper", "viper"], 3)
    lists.write_text("[]")
    assert f"Error: {lists}: expected a list of splits, got an empty one" in run(
        "protocol", "run", "P1", "--data-root", root, "--output", output, *TINY, code=2
    )
    lists.write_text(own)
    run("protocol", "run", "P1", "--data-root", root, "--output", output, *TINY)
    assert figures(output) == before
    arguments = ("protocol", "run", "P1", "--data-root", root, "--output", output, *TINY)
    assert "was begun with config.train.steps 2, not 3" in error(*arguments, "train.steps=3")
    labeled = f"cuhk03/labeled:{root / 'cuhk03-np'}"
    assert f"was begun with data.cuhk03 cuhk03/detected:{root}" in error(*arguments, "--data", labeled)
    assert "was begun with protocol P1, not P2" in error(*arguments[:2], "P2", *arguments[3:])
    viper.write_text("{")
    assert f"Error: {viper}: damaged" in run(*arguments, code=2)
    viper.unlink()


def test_an_interrupted_training_goes_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import apd.experiments.protocol_runs

    arguments = ("protocol", "run", "single-source", "--source", "msmt17", "--target", "viper", "--data-root", root)
    output = tmp_path / "out"
    monkeypatch.setattr(apd.experiments.protocol_runs, "train_run", lambda run, device: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*arguments, "--output", output, *TINY)
    assert (output / "runs" / "msmt17-to-viper" / "config.yaml").is_file()
    assert not (output / "table.md").exists()
    monkeypatch.undo()
    run(*arguments, "--output", output, *TINY)
    assert figures(output)["results"]["MS→VIPeR"]["viper"]["splits"] == 10


def test_the_splits_lists_decide(p1: tuple[Path, str], root: Path) -> None:
    """Whoever hands on the lists hands on the test."""
    from apd.experiments.protocol_runs import evaluate_target
    from apd.retrieval.extraction import load_extractor

    output, _ = p1
    lists = output / "splits" / "prid.json"
    content = json.loads(lists.read_text())
    (path,) = (output / "runs").iterdir()
    extractor, spec = load_extractor(str(path), "cpu"), DataSpec.parse(f"prid:{root}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        short = output / "short.json"
        short.write_text(json.dumps(content[:2]))
        assert evaluate_target(extractor, spec, short).splits == evaluate_target(extractor, spec, lists).splits[:2]
        content[0]["query"][0] = "cam_a/nobody.png"
        short.write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"names 'cam_a/nobody\.png'"):
            evaluate_target(extractor, spec, short)


def test_p2_and_p3_of_one_target(root: Path, tmp_path: Path) -> None:
    options = ("--data-root", root, "--target", "cuhk03")
    p2 = run("protocol", "run", "P2", *options, "--output", tmp_path / "P2", *TINY)
    (path,) = (tmp_path / "P2" / "runs").iterdir()
    assert [source.partition(":")[0] for source in Run(path).info()["data"]] == ["market1501", "msmt17/v1", "cuhk-sysu"]
    assert "| CILP-FGDI (published) | 44.4 | 44.6 |" in p2
    (results,) = figures(tmp_path / "P2")["results"].values()
    assert results["cuhk03"]["splits"] == 1
    assert results["cuhk03"]["queries"] == 6
    assert results["cuhk03"]["sd"]["mAP"] is None
    p3 = run("protocol", "run", "P3", *options, "--output", tmp_path / "P3", *TINY)
    (path,) = (tmp_path / "P3" / "runs").iterdir()
    sources = [source.partition(":")[0] for source in Run(path).info()["data"]]
    assert sources == ["market1501+test", "msmt17/v1+test", "cuhk-sysu"]
    assert "18 images, 6 identities" in p3  # MSMT17: three people to train on and three others


def test_single_source_with_a_generator(root: Path, tmp_path: Path) -> None:
    """CUHK02 has one file name in every camera: the synthesized images must not overwrite one another."""
    values = [value for value in TINY if value not in ("perturbation=none", "model.ssd=none")]
    generator = (
        "mpg.steps=1",
        "mpg.batch_size=4",
        "mpg.negatives=2",
        "mpg.width=4",
        "mpg.blocks=1",
        "mpg.trunk=self",
        "mpg.discriminator_width=4",
        "mpg.discriminator_layers=2",
    )
    arguments = ("protocol", "run", "single-source", "--source", "cuhk02", "--target", "viper", "--data-root", root)
    run(*arguments, "--output", tmp_path / "out", *values, *generator)
    images = list(tmp_path.glob("out/runs/cuhk02-to-viper/synthesized/*/bounding_box_train/*.jpg"))
    assert len(images) == 32
    assert "10001_c1_001_001.jpg" in {image.name for image in images}
    run("report", tmp_path / "out" / "runs" / "cuhk02-to-viper", "--target", f"viper:{root}")
    page = (tmp_path / "out" / "runs" / "cuhk02-to-viper" / "report.html").read_text()
    assert "Originals and synthesized hard samples" in page
    assert "VIPeR, target" in page


def test_no_target_has_a_say(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target is looked at before the training, whose end is the same without one, and tested when it is over."""
    import apd.experiments.protocol_runs as protocol_runs

    output = tmp_path / "out"
    target = shutil.copytree(root / "VIPeR", tmp_path / "VIPeR")
    sources = ("--source", "market1501", "--target", "viper", "--data-root", root, "--data", f"viper:{target}")
    command = ("protocol", "run", "single-source", *sources, "--output", output, *TINY)
    run_path = output / "runs" / "market1501-to-viper"
    damaged = sorted((target / "cam_b").iterdir())[-1]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    assert f"{damaged}: cannot be read as an image" in run(*command, code=2)
    assert not run_path.exists()
    damaged.write_bytes(whole)

    def stop(extractor: object, spec: DataSpec, lists: Path) -> FeatureSet:
        assert "finished" in Run(run_path).info()
        raise InputError(f"stop {spec.path}")

    monkeypatch.setattr(protocol_runs, "evaluate_target", stop)
    assert run(*command, code=2).splitlines()[-1] == f"Error: stop {target}"
    assert Run(run_path).info()["data"] == [f"market1501:{root / 'Market-1501-v15.09.15'}"]


def test_list() -> None:
    text = run("protocol", "list")
    assert "M+C2+C3+CS→PRID+GRID+VIPeR+iLIDS" in text
    assert "published, mAP / rank-1: BAU: cuhk03 42.8 / 43.9" in text
