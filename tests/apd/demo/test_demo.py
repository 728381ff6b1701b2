"""The demonstration, with few people and few steps: what it writes, and that its figures mean what they say."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("faiss")
pytest.importorskip("matplotlib")

from command_line import error, run
from html_page import Page

from apd.console import console
from apd.data.market import read_market
from apd.demo import demonstration as module
from apd.demo.demonstration import FOLDERS_OF, prepare_folder, run_demo
from apd.demo.pedestrians import SOURCES, UNSEEN
from apd.demo.report import TRAININGS, Demo, figures, headline, verdicts
from apd.errors import InputError
from apd.reports.page import Synthesized
from apd.reports.sections import Flips, measure_flips
from apd.retrieval.comparison import Retrieval
from apd.run import Run
from apd.training.sources import gather_sources

SMALL = (
    *("train.steps=3", "train.batch_size=8", "train.instances=2", "mpg.steps=3", "mpg.batch_size=8"),
    *("mpg.negatives=2", "mpg.width=4", "mpg.blocks=1", "mpg.discriminator_width=4"),
    *("model.embed_dim=24", "model.depth=2", "log_steps=1"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    output = tmp_path_factory.mktemp("demo") / "new folder" / "demo"
    with console.capture() as capture:
        demo = run_demo(
            output,
            seed=3,
            sources=SOURCES[:2],
            train_identities=5,
            test_identities=4,
            frames=2,
            overrides=SMALL,
        )
    return SimpleNamespace(output=output, demo=demo, printed=capture.get())


def test_the_two_trainings_are_comparable(made: SimpleNamespace) -> None:
    baseline, apd = Run(made.output / "baseline").config, Run(made.output / "apd").config
    assert (baseline.perturbation, baseline.model.ssd) == ("none", "none")
    assert (apd.perturbation, apd.model.ssd, apd.mpg.trunk) == ("generator", "sps", "self")
    assert Path(apd.mpg.trunk_weights) == made.output / "baseline"
    assert baseline.train == apd.train
    assert baseline.data == apd.data
    assert baseline.seed == apd.seed == 3
    assert apd.train.steps == 3


def test_nothing_of_the_unseen_domain_is_trained_on(made: SimpleNamespace) -> None:
    for name in FOLDERS_OF.values():
        trained = [Path(folder).name for folder in Run(made.output / name).info()["data"]]
        assert trained == [domain.name for domain in SOURCES[:2]]
    assert not (made.output / "data" / UNSEEN.name / "bounding_box_train").exists()


def test_figures(made: SimpleNamespace) -> None:
    """What search finds, what rank_metrics counts and what is written are the same."""
    demo: Demo = made.demo
    assert list(demo.tested) == ["campus", "street", "station"]
    tested = demo.on_unseen()
    assert tested.size() == "8 queries of 4 identities, 8 gallery images, 2 cameras"
    assert tested.chance.rank1 == pytest.approx(1 / 7)  # of 8 images one is right and one of the query's own camera
    assert list(tested.rankers) == ["colours", "normalized colours", "baseline", "SP-Net", "noise", "APD"]
    searched = demo.lists.found.ids[:, 0].numpy() == demo.lists.query.identities()
    assert searched.tolist() == tested.rankers["APD"].right.tolist()
    written = json.loads((made.output / "demo.json").read_text())
    assert written == {"made_by": "apd demo", **json.loads(json.dumps(figures(demo)))}
    assert written["domains"]["station"]["APD"]["rank1"] == pytest.approx(searched.mean())
    assert written["domains"]["station"]["APD − baseline"]["mAP"]["mean"] == pytest.approx(
        tested.rankers["APD"].mAP - tested.rankers["baseline"].mAP
    )
    for name in TRAININGS:  # the training evaluates the sources itself
        own = Run(made.output / name.lower()).info()["own_test"]
        for folder, found in own.items():
            here = demo.tested[Path(folder).name].rankers[name]
            assert found["end"]["rank-1"] == pytest.approx(here.rank1)
            assert found["end"]["mAP"] == pytest.approx(here.mAP, abs=1e-6)


def test_stages_are_timed(made: SimpleNamespace) -> None:
    names = ["draw the domains", *(f"train {name}" for name in TRAININGS), "test on every domain"]
    names += ["index and search the unseen domain", "write the report"]
    assert list(made.demo.seconds) == names
    for name in names:
        assert re.search(rf"^{name}: \d+ s$", made.printed, re.MULTILINE)


def test_report_is_one_file_with_the_numbers(made: SimpleNamespace) -> None:
    page = Page(made.output / "report.html")
    page.check_alone()
    for tested in made.demo.tested.values():
        for ranked in tested.rankers.values():
            assert f"{100 * ranked.rank1:.1f}" in page.texts
    for line in (headline(made.demo), *verdicts(made.demo)):
        assert line in page.texts
        assert line in made.printed.replace("\n", " ")
    assert page.source.count('class="tile pair"') == 2 * 6
    assert "mpg.trunk_weights" in page.texts
    assert made.printed.count("One seed and drawn people") == page.source.count("One seed and drawn people") == 1


def test_flips(made: SimpleNamespace, tmp_path: Path) -> None:
    """Originals as their own synthesized images flip nowhere; images of one person only flip for all others."""
    apd, folders = made.demo.apd, [read_market(folder, ("train",)).train for folder in made.demo.sources]
    originals = [sample.path for samples in folders for sample in samples]
    labels = gather_sources(folders, 0, 0)[0].labels

    def flips(paths: list[Path]) -> Flips:
        pairs = [Synthesized(path, other, ()) for path, other in zip(originals, paths, strict=True)]
        return measure_flips(apd, pairs, labels, "cpu")

    same = flips(originals)
    assert (same.images, same.change, same.made, same.noise) == (len(originals), 0, 0, 0)
    assert 0 < same.right <= len(originals)
    moved = flips([originals[0]] * len(originals))
    assert moved.right == same.right
    assert moved.right - 4 <= moved.made <= moved.right
    assert moved.change > 0.05
    text = next(text for text in Page(made.output / "report.html").texts if "noise of the same" in text)
    assert f"{same.right} of the {len(originals)} originals" in text


def test_frames_are_right(made: SimpleNamespace) -> None:
    """A green frame where the image found is of the query's identity, in every list shown."""
    page = (made.output / "report.html").read_text()
    strips = re.findall(r"identity (\d+)</span>.*?</div>\s*<div class=\"tiles\">(.*?)</div>", page, re.DOTALL)
    found = made.demo.lists
    assert strips
    for identity, tiles in strips:
        frames = re.findall(r'class="tile (right|wrong)"', tiles)
        queries = [i for i, pid in enumerate(found.query.identities()) if pid == int(identity)]
        expected = [["right" if match[1] == int(identity) else "wrong" for match in found.matches(i)] for i in queries]
        assert frames in expected


def test_commands_work_as_printed(made: SimpleNamespace) -> None:
    lines = [line.strip() for line in made.printed.partition("How to go on:")[2].splitlines() if line.strip()]
    programs = [shlex.split(line) for line in lines]
    assert [Path(words[0]).name for words in programs] == ["apd", "apd", "apd", "tensorboard"]
    searched, evaluated, shown = (run(*words[1:]) for words in programs[:3])
    assert "rank" in searched
    assert (made.output / "ranked.png").is_file()
    rank1 = made.demo.on_unseen().rankers["APD"].rank1
    assert f"{rank1:.6f}" in evaluated
    assert "values differ from the defaults" in shown
    assert programs[3][1:] == ["--logdir", str(made.output)]
    assert list(made.output.glob("apd/tensorboard/*/events*"))


def test_verdicts_follow_the_numbers(made: SimpleNamespace) -> None:
    def of(apd: list[bool], baseline: list[bool]) -> str:
        def ranked(right: list[bool]) -> Retrieval:
            return Retrieval(np.arange(len(right)), np.array(right), 0.5 * np.array(right), np.arange(len(right)))

        tested = replace(
            made.demo.on_unseen(), rankers={"baseline": ranked(baseline), "noise": ranked(apd), "APD": ranked(apd)}
        )
        return verdicts(replace(made.demo, tested={"station": tested}))[0]

    assert "baseline is ahead" in of([False] * 20, [True] * 15 + [False] * 5)
    assert "APD is ahead" in of([True] * 15 + [False] * 5, [False] * 20)
    assert "not resolved" in of([True] * 5 + [False] * 5, [False] * 5 + [True] * 4 + [False])
    assert "no difference" in of([True, False], [True, False])


def test_an_earlier_demonstration_is_replaced(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    prepare_folder(output)
    for name in ("data", "apd", "gallery"):
        (output / name).mkdir()
        (output / name / "old").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (output / "baseline").symlink_to(elsewhere)
    (output / "report.html").touch()
    (output / "notes.txt").touch()  # not the demonstration's
    prepare_folder(output)
    assert sorted(path.name for path in output.iterdir()) == ["demo.json", "notes.txt"]
    assert (elsewhere / "kept").exists()


@pytest.mark.parametrize("content", [None, "{}", "no json", '{"made_by": "me"}', "[1]"])
def test_a_foreign_folder_is_refused(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").touch()
    if content is not None:
        (tmp_path / "demo.json").write_text(content)
    message = error("demo", "--output", tmp_path)
    assert f"{tmp_path}: not empty, and not made by apd demo" in message
    assert (tmp_path / "data" / "precious").exists()
    assert (tmp_path / "demo.json").exists() == (content is not None)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="expected a folder, found a file"):
        prepare_folder(tmp_path / "file")


def test_command_passes_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(module, "run_demo", lambda *arguments, **options: calls.append((arguments, options)))
    run("demo", "--output", tmp_path, "--seed", 4, "--device", "cpu")
    assert calls == [((tmp_path,), {"seed": 4, "device": "cpu"})]
