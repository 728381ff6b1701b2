"""The page of a run: what it shows is what was measured, and it needs nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("timm")
pytest.importorskip("faiss")
pytest.importorskip("matplotlib")

from command_line import error, run
from drawn import SIZE, draw_data_set, write_run
from html_page import Page, shown
from tiny import draw_training_set, trained

from apd.data.images import load_image
from apd.reports import sections as run_sections
from apd.reports.page import heat_picture
from apd.reports.sections import attention_section, lists_section
from apd.retrieval.comparison import Retrieval
from apd.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("report")
    data, target = draw_training_set(root / "drawn"), draw_data_set(root / "other")
    path = trained(root / "apd", data).path
    printed = run("report", path, "--target", target)
    return SimpleNamespace(run=Run(path), data=data, target=target, page=Page(path / "report.html"), printed=printed)


def test_one_file_with_every_section(made: SimpleNamespace) -> None:
    made.page.check_alone()
    assert f"wrote {made.run.path / 'report.html'}" in made.printed
    headings = re.findall(r"<(?:h2|summary)>(.*?)</", made.page.source)
    assert headings == [
        "Result",
        "Ranked lists: drawn, own test",
        "Ranked lists: other, target",
        "Originals and synthesized hard samples",
        "Attention of MSP",
        "Training",
        "Time",
        "Configuration",
        "Environment",
    ]
    assert made.page.source.count('class="tile pair"') == 6
    assert made.page.source.count("<svg") == 5  # losses and two monitors of stage 1, losses and accuracy of stage 2


def test_figures_are_those_of_evaluate(made: SimpleNamespace, tmp_path: Path) -> None:
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', made.page.source)
    cells = {name: re.findall(r"<td>(.*?)</td>", row) for name, row in rows}
    for name, data in (("drawn, own test", made.data), ("other, target", made.target)):
        run("evaluate", "--checkpoint", made.run.path, "--data", data, "--json", tmp_path / "figures.json")
        figures = json.loads((tmp_path / "figures.json").read_text())
        queries, _, rank1, _, mean_ap = cells[name]
        assert queries == str(figures["num_valid_queries"])
        assert rank1.startswith(f"{100 * figures['cmc']['1']:.1f} ± ")
        assert mean_ap == f"{100 * figures['mAP']:.1f}"


def test_a_query_without_an_answer_does_not_shift_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are of the queries that count, lists of all of them."""
    asked: list[list[int]] = []
    monkeypatch.setattr(run_sections.report, "ranked_strips", lambda lists, queries, *_: asked.append(queries) or [])
    found = Retrieval(np.array([7, 8]), np.array([True, False]), np.array([1.0, 0.5]), np.array([2, 5]))
    section = lists_section("Ranked lists", "a run", found, SimpleNamespace(), Path("data"))
    assert asked == [[2, 5]]
    assert "1 of 2 queries are right" in section.text[0]


def test_heat_picture() -> None:
    """Dark where the value is smallest, light where it is largest."""
    picture = shown(heat_picture(np.full((32, 16, 3), 128, np.uint8), np.array([[0.2, 0.9], [0.5, 0.5]])))
    assert picture.shape == (32, 16, 3)
    corners = [float(picture[y, x].mean()) for y, x in ((4, 4), (4, 12), (28, 8))]
    assert corners[0] < corners[2] < corners[1]


def test_attention_is_what_masks_the_features(made: SimpleNamespace) -> None:
    """The mean of the three maps is K / F, averaged over the channels; the page states its range."""
    network, paths = made.run.load_network(), sorted((made.data / "query").iterdir())[:2]
    images = torch.from_numpy(np.stack([load_image(path, SIZE) for path in paths])).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        maps = network.attention(images)
        shares = (network.relevant_map(images) / network.embed(images)).mean(1)
    assert maps.shape == (2, 3, 4, 2)
    torch.testing.assert_close(maps.mean(1), shares, atol=1e-4, rtol=1e-4)
    strips = attention_section(made.run, paths).blocks
    captions = [tile.caption for tile in strips[0].tiles]
    assert [name for name, _ in captions] == ["a1", "a2", "a3", "mean"]
    assert captions[3][1] == f"{float(shares[0].min()):.2f}–{float(shares[0].max()):.2f}"


def test_a_baseline_has_neither_attention_nor_synthesized_images(made: SimpleNamespace, tmp_path: Path) -> None:
    path = trained(tmp_path / "baseline", made.data, "perturbation=none", "model.ssd=none").path
    run("report", path, "--output", tmp_path / "page.html")
    source = Page(tmp_path / "page.html").source
    assert "Attention of MSP" not in source
    assert "synthesized hard samples" not in source
    assert "Ranked lists: drawn, own test" in source


def test_errors(made: SimpleNamespace, tmp_path: Path) -> None:
    assert "no such folder" in error("report", made.run.path, "--target", tmp_path / "nothing")
    assert "--output" in error("report", made.run.path, "--output", tmp_path / "page.pdf")
    assert "not the folder of a run" in error("report", tmp_path)
    assert "names no data folders" in error("report", write_run(tmp_path / "run"))


def test_two_targets_of_one_name(made: SimpleNamespace, tmp_path: Path) -> None:
    other = draw_data_set(tmp_path / "other", seed=1)
    run("report", made.run.path, "--target", made.target, "--target", other, "--output", tmp_path / "page.html")
    source = Page(tmp_path / "page.html").source
    assert f"Ranked lists: {made.target}, target" in source
    assert f"Ranked lists: {other}, target" in source
