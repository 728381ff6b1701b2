"""The report: one page without outside resources, right frames, numbers as measured."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from html_page import Page, shown
from PIL import Image
from places import ROOT

pytest.importorskip("faiss")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from apd.config.files import load_config
from apd.errors import InputError
from apd.reports.page import (
    Commands,
    Plot,
    Section,
    Strip,
    Synthesized,
    Table,
    Tile,
    choose_queries,
    configuration_section,
    curve_plots,
    domains_table,
    environment_section,
    picture,
    ranked_strips,
    results_table,
    synthesized_strips,
    times_table,
    verdict,
    write_report,
)
from apd.retrieval.comparison import Chance, Difference, Retrieval
from apd.retrieval.features import FeatureSet
from apd.retrieval.ranked_lists import RankedLists
from apd_kernels import SearchResult


def draw(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (64, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), colour, np.uint8)).save(path)
    return path


def retrieval(right: list[bool], ap: list[float]) -> Retrieval:
    return Retrieval(np.arange(len(right)), np.array(right), np.array(ap), np.arange(len(right)))


def test_picture(tmp_path: Path) -> None:
    small = shown(picture(draw(tmp_path / "small.png", (200, 40, 90))))
    assert small.shape == (64, 32, 3)
    assert np.abs(small.astype(int) - (200, 40, 90)).max() < 4
    assert shown(picture(draw(tmp_path / "large.png", (0, 0, 0), (768, 256)))).shape == (192, 64, 3)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=r"text\.png"):
        picture(tmp_path / "text.png")


def test_results_table() -> None:
    found = {
        "baseline": retrieval([True, False, False, False], [1.0, 0.5, 0.25, 0.25]),
        "APD": retrieval([True, True, False, False], [1.0, 1.0, 0.5, 0.5]),
    }
    differences = {"APD − baseline": [Difference(0.25, 0.25, 4, 4), Difference(-0.012, 0.004, 4, 4)]}
    table = results_table(Chance(0.0123, 0.0456), found, differences)
    assert table.rows == [
        ("random ranking, expected", "1.2", "4.6"),
        ("baseline", "25.0 ± 21.7", "50.0"),
        ("APD", "50.0 ± 25.0", "75.0"),
        ("APD − baseline", "+25.0 ± 25.0", "−1.2 ± 0.4"),
    ]
    assert table.strong == 2
    domains = domains_table({"campus": (Chance(0.0123, 0.0456), found)})
    assert domains.head == ("rank-1, %", "queries", "random", "baseline", "APD")
    assert domains.rows == [("campus", "4", "1.2", "25.0", "50.0")]


def test_verdict_follows_the_numbers() -> None:
    def of(mean: float, error: float) -> str:
        return verdict("mAP", "APD", "baseline", Difference(mean, error, 9, 9))

    assert of(0.03, 0.01) == "APD − baseline, mAP: +3.0 ± 1.0 points; APD is ahead, by at least two standard errors."
    assert "baseline is ahead" in of(-0.03, 0.01)
    assert "−1.9 ± 1.0 points; not resolved" in of(-0.019, 0.01)
    assert "no difference" in of(0.0, 0.0)


def test_queries_are_chosen_by_rule() -> None:
    ap = [0.9, 0.8, 0.7, 0.6, 0.95, 0.1, 0.2, 0.3, 0.4, 0.5]
    right = [True] * 5 + [False] * 5
    assert choose_queries(retrieval(right, ap)) == [0, 2, 8, 6]  # second and fourth of five in either group
    assert choose_queries(retrieval([True, False], [1.0, 0.5])) == [0, 1]
    assert choose_queries(retrieval([False, False, False], [0.1, 0.3, 0.2])) == [1, 0]


def ranked(tmp_path: Path) -> RankedLists:
    """Query 0, person 7, finds persons 7, 8 and 7; query 1, person 9, finds 8 and nothing else."""
    query = FeatureSet(
        path=tmp_path,
        rows="all rows",
        features=np.ones((2, 1)),
        names=np.array([str(draw(tmp_path / "query" / f"{i}.png", (10 * i, 0, 0))) for i in range(2)]),
        pids=np.array([7, 9]),
        camids=np.array([1, 2]),
        split=None,
    )
    names = np.array([["a.png", "b.png", "c.png"], ["b.png", "", ""]])
    for i, name in enumerate("abc"):
        draw(tmp_path / f"{name}.png", (0, 100 * i, 0))
    found = SearchResult(
        distances=torch.tensor([[0.1, 0.2, 0.3], [0.4, torch.inf, torch.inf]]),
        indices=torch.tensor([[0, 1, 2], [1, -1, -1]]),
        ids=torch.tensor([[7, 8, 7], [8, -1, -1]]),
        cams=torch.tensor([[2, 2, 1], [2, -1, -1]]),
    )
    return RankedLists(query, "cosine", found, names)


def test_ranked_strips(tmp_path: Path) -> None:
    first, second = ranked_strips(ranked(tmp_path), [0, 1], tmp_path, ["one", "two"])
    assert (first.title, second.title) == ("one", "two")
    assert first.first is not None
    assert first.first.caption == ("query", "camera 1", "identity 7")
    assert first.first.frame == ""
    assert [tile.frame for tile in first.tiles] == ["right", "wrong", "right"]
    assert [tile.caption for tile in first.tiles] == [
        ("1 ✓", "camera 2", "0.100"),
        ("2 ✗", "camera 2", "0.200"),
        ("3 ✓", "camera 1", "0.300"),
    ]
    assert [int(shown(tile.images[0])[0, 0, 1]) // 50 for tile in first.tiles] == [0, 2, 4]
    assert [tile.frame for tile in second.tiles] == ["wrong"]


def test_synthesized_strips(tmp_path: Path) -> None:
    pair = Synthesized(draw(tmp_path / "a.png", (0, 0, 0)), draw(tmp_path / "b.png", (250, 250, 250)), ("identity 1",))
    (strip,) = synthesized_strips({"campus": [pair]})
    assert strip.title == "campus"
    assert [int(shown(image).mean()) // 100 for image in strip.tiles[0].images] == [0, 2]


def rows(stage: str, **columns: list[float]) -> list[dict[str, str]]:
    length = len(next(iter(columns.values())))
    return [
        {"stage": stage, "step": str(10 * i + 10), **{name: str(values[i]) for name, values in columns.items()}}
        for i in range(length)
    ]


def test_curves() -> None:
    apd = rows("mpg", loss_g=[1.0, 2.0], flipped=[0.1, 0.2]) + rows("sp", loss_k=[3.0, 1.0], loss_nk=[2.0, 2.5])
    plots = curve_plots({"baseline": rows("sp", loss_k=[3.0, 2.0]), "APD": apd})
    assert [plot.title.partition(":")[0] for plot in plots] == ["Stage 1, MPG-Net", "Stage 1", "Stage 2"]
    for label in ("L_K, baseline", "L_K, APD", "L_NK, APD"):
        assert label in plots[2].svg
    assert "L_K*" not in plots[2].svg
    names = [set(re.findall(r' id="([^"]*)"', plot.svg)) for plot in plots]
    assert not names[0] & names[1]  # an id stands once in a page
    assert "currentColor" in plots[0].svg
    assert "#010203" not in plots[0].svg
    assert curve_plots({"baseline": []}) == []


def test_configuration() -> None:
    configs = {
        "baseline": load_config("demo", ["perturbation=none", "model.ssd=none"]),
        "APD": load_config("demo", ["train.epochs=7"]),
    }
    section = configuration_section(configs)
    (table,) = section.blocks
    assert isinstance(table, Table)
    assert table.head == ("key", "default", "baseline", "APD")
    assert ("perturbation", "generator", "none", "generator") in table.rows
    assert ("train.epochs", "120.0", "120.0", "7.0") in table.rows
    assert all(len(set(row[1:])) > 1 for row in table.rows)


def test_times() -> None:
    table = times_table({"draw": 3.0, "train": 60.4}, {"train": {"stage 1": 40.0}})
    assert [(row[0].strip(), row[1]) for row in table.rows] == [
        ("draw", "3"),
        ("train", "60"),
        ("of it stage 1", "40"),
        ("in all", "63"),
    ]
    assert table.strong == 3


def test_page(tmp_path: Path) -> None:
    strips = ranked_strips(ranked(tmp_path), [0], tmp_path, ["right"])
    plots = curve_plots({"<b>": rows("sp", loss_k=[3.0, 2.0])})
    sections = [
        Section("Numbers", ["a < b & c"], [Table(("", "rank-1"), [("APD", "51.7")], strong=0)], ["after"]),
        Section("Pictures", [], strips),
        Section("Curves", [], plots),
        Section("Commands", [], [Commands(["apd search --query 'a b'"])]),
        environment_section([("torch", "2.0 <dev>")]),
    ]
    path = tmp_path / "report.html"
    write_report(path, "A & B", ["It came out."], sections)
    page = Page(path)
    page.check_alone()
    assert path.stat().st_size < 100_000
    for text in ("A & B", "It came out.", "a < b & c", "51.7", "after", "2.0 <dev>", "apd search --query 'a b'"):
        assert text in page.texts, text
    frames = re.findall(r'class="tile (right|wrong)?">.*?<span>(.*?)</span>', page.source)
    assert frames == [("", "query"), ("right", "1 ✓"), ("wrong", "2 ✗"), ("right", "3 ✓")]
    assert page.source.count("data:image/jpeg") == 4
    assert page.source.count("<svg") == 1
    assert "<details>" in page.source
    again = tmp_path / "again.html"
    write_report(
        again,
        "A & B",
        ["It came out."],
        [*sections[:2], Section("Curves", [], curve_plots({"<b>": rows("sp", loss_k=[3.0, 2.0])})), *sections[3:]],
    )
    assert again.read_text() == path.read_text()


def test_blocks_of_a_page_are_all_drawn(tmp_path: Path) -> None:
    """A kind of block that the template forgets would vanish silently."""
    template = (ROOT / "apd" / "reports" / "template.html.jinja").read_text(encoding="utf-8")
    for block in (Table, Strip, Plot, Commands):
        assert f'one.kind == "{block.kind}"' in template
    write_report(tmp_path / "empty.html", "nothing", [], [Section("none", [], [Strip("s", None, [Tile([], ())])])])
    Page(tmp_path / "empty.html").check_alone()
