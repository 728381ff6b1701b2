"""A report of training and retrieval: one HTML file that needs nothing else, neither network nor JavaScript.

Each ``…_section`` makes a section of plain data; `write_report` puts sections into a page.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from apd.config.values import SETTINGS, Config, shown, value_of
from apd.data.images import load_image
from apd.errors import InputError
from apd.files import write_text
from apd.retrieval.comparison import Chance, Difference, Retrieval
from apd.retrieval.ranked_lists import RankedLists

TEMPLATE = "template.html.jinja"
_SIGNS = {"right": "✓", "wrong": "✗", "": ""}
_LARGEST = 192  # pixels of an embedded image's height: twice what is shown, for fine screens


# What a page is made of


@dataclass(frozen=True)
class Table:
    """Cells are text; the first column names the row."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True  # the other columns are numbers
    strong: int | None = None  # a row to stand out


@dataclass(frozen=True)
class Tile:
    """A picture, or two side by side, with a caption."""

    images: Sequence[str]  # data: addresses
    caption: Sequence[str]  # lines
    frame: str = ""  # "right", "wrong" or none
    missing: str = ""  # the name of an image that cannot be shown


@dataclass(frozen=True)
class Strip:
    """Pictures in a row."""

    kind: ClassVar[str] = "strip"
    title: str
    first: Tile | None  # stands apart
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Plot:
    kind: ClassVar[str] = "plot"
    title: str
    svg: Markup


@dataclass(frozen=True)
class Commands:
    kind: ClassVar[str] = "commands"
    lines: Sequence[str]


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    title: str
    text: Sequence[str]  # paragraphs
    blocks: Sequence[Table | Strip | Plot | Commands]
    notes: Sequence[str] = ()  # paragraphs below
    folded: bool = False


def write_report(path: Path, title: str, summary: Sequence[str], sections: Sequence[Section]) -> None:
    """Write or replace the page in one step.

    Args:
        path: the ``.html`` file.
        title: of the page.
        summary: paragraphs that come first; the first of them stands out.
        sections: in their order.
    """
    environment = Environment(
        loader=PackageLoader("apd.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(title=title, summary=summary, sections=sections)
    write_text(path, page)


def picture(path: Path) -> str:
    """An image file as a data: address, shrunk where it is larger than a page shows it.

    Raises:
        InputError: the file cannot be read.
    """
    return _embedded(Image.fromarray(load_image(path, None)))


def heat_picture(image: np.ndarray, values: np.ndarray) -> str:
    """Values in colour over a grey image, as a data: address; from their smallest, dark, to their largest, light.

    Args:
        image: uint8 (H, W, 3).
        values: (h, w), each for a rectangle of the image.
    """
    from matplotlib import colormaps

    low, high = values.min(), values.max()
    colours = colormaps["inferno"]((values - low) / max(high - low, 1e-12))[..., :3]
    heat = Image.fromarray((255 * colours).astype(np.uint8)).resize(image.shape[1::-1], Image.Resampling.NEAREST)
    return _embedded(Image.blend(Image.fromarray(image).convert("L").convert("RGB"), heat, 0.6))


def _embedded(image: Image.Image) -> str:
    if image.height > _LARGEST:
        image = image.resize((max(1, round(image.width * _LARGEST / image.height)), _LARGEST), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


# Results


def points(share: float) -> str:
    """A share in percent, as the field writes rank-1 and mAP."""
    return f"{100 * share:.1f}"


def _signed(difference: Difference) -> str:
    return f"{100 * difference.mean:+.1f} ± {100 * difference.error:.1f}".replace("-", "−")


def verdict(name: str, ours: str, theirs: str, difference: Difference) -> str:
    """One sentence on a difference: how large it is, and whether it is more than chance in the choice of queries.

    Args:
        name: of the figure.
        ours, theirs: the two models.
        difference: of `ours` − `theirs`.
    """
    if difference.resolved:
        ahead = ours if difference.mean > 0 else theirs
        judged = f"{ahead} is ahead, by at least two standard errors"
    elif difference.mean:
        judged = "not resolved: less than two standard errors"
    else:
        judged = "no difference"
    return f"{ours} − {theirs}, {name}: {_signed(difference)} points; {judged}."


def results_table(
    chance: Chance, retrievals: Mapping[str, Retrieval], differences: Mapping[str, Sequence[Difference]]
) -> Table:
    """The figures of one domain.

    Args:
        chance: of a random ranking.
        retrievals: what was measured, by the name of the ranker; the last stands out.
        differences: of rank-1 and of mAP, in this order, by the names of the two.
    """
    rows: list[Sequence[str]] = [("random ranking, expected", points(chance.rank1), points(chance.mAP))]
    rows += [
        (name, f"{points(found.rank1)} ± {points(found.rank1_error)}", points(found.mAP))
        for name, found in retrievals.items()
    ]
    strong = len(rows) - 1
    rows += [(name, *map(_signed, of_figures)) for name, of_figures in differences.items()]
    return Table(("", "rank-1, %", "mAP, %"), rows, strong=strong)


def domains_table(domains: Mapping[str, tuple[Chance, Mapping[str, Retrieval]]]) -> Table:
    """Rank-1, domain by domain.

    Args:
        domains: chance and what was measured, by the name of the domain; the same rankers in each.
    """
    rankers = list(next(iter(domains.values()))[1])
    rows = [
        (name, f"{len(found[rankers[0]].right)}", points(expected.rank1), *(points(found[r].rank1) for r in rankers))
        for name, (expected, found) in domains.items()
    ]
    return Table(("rank-1, %", "queries", "random", *rankers), rows)


def figures_table(domains: Mapping[str, tuple[Chance, Retrieval]]) -> Table:
    """What one network reaches.

    Args:
        domains: chance and what was measured, by the name of the domain.
    """
    rows = [
        (
            name,
            f"{len(found.right):,}",
            points(expected.rank1),
            f"{points(found.rank1)} ± {points(found.rank1_error)}",
            points(expected.mAP),
            points(found.mAP),
        )
        for name, (expected, found) in domains.items()
    ]
    return Table(("", "queries", "random rank-1, %", "rank-1, %", "random mAP, %", "mAP, %"), rows)


# Ranked lists


def choose_queries(found: Retrieval) -> list[int]:
    """Four queries by rule: of those right at rank 1 and of those wrong, by AP, those at the quarters ¼ and ¾.

    Fewer where there are fewer; the rows of `found`, the best AP first.
    """
    order = np.argsort(-found.ap, kind="stable")
    chosen: list[int] = []
    for group in (order[found.right[order]], order[~found.right[order]]):
        places = {round(share * (len(group) - 1)) for share in (0.25, 0.75)} if len(group) else set()
        chosen += [int(group[place]) for place in sorted(places)]
    return chosen


def ranked_strips(lists: RankedLists, queries: Sequence[int], folder: Path, notes: Sequence[str]) -> list[Strip]:
    """Queries with their nearest gallery images, in green and red frames, or in none where a query's identity is not
    known. An image that cannot be read is an empty box with its name.

    Args:
        lists: with image files as query names; the found names are relative to `folder`.
        queries: which of them.
        folder: the gallery's data set.
        notes: a few words on each query.
    """
    strips = []
    for query, note in zip(queries, notes, strict=True):
        pid, camera, name = lists.describe(query)
        known = pid not in (None, -1)
        tiles = []
        for rank, (_, found, found_camera, found_name, distance) in enumerate(lists.matches(query), 1):
            frame = "" if not known else "right" if found == pid else "wrong"
            place = f"{rank} {_SIGNS[frame]}".rstrip()
            caption = (place, *_labels(("camera", found_camera)), f"{distance:#.3g}")
            tiles.append(_tile(folder / found_name, caption, frame))
        strips.append(Strip(note, _tile(Path(name), ("query", *_labels(("camera", camera), ("identity", pid)))), tiles))
    return strips


def _labels(*values: tuple[str, int | None]) -> list[str]:
    return [f"{name} {value}" for name, value in values if value not in (None, -1)]


def _tile(path: Path, caption: Sequence[str], frame: str = "") -> Tile:
    try:
        return Tile([picture(path)], caption, frame)
    except InputError:
        return Tile([], caption, frame, missing=path.name)


# Synthesized images


class Synthesized(NamedTuple):
    """An original, what the generator made of it, and lines of a caption."""

    original: Path
    made: Path
    caption: Sequence[str]


def synthesized_strips(groups: Mapping[str, Sequence[Synthesized]]) -> list[Strip]:
    """Originals, on the left, beside their synthesized images.

    Args:
        groups: by the name of the group, a domain for example.

    Raises:
        InputError: an image cannot be read.
    """
    return [
        Strip(title, None, [Tile([picture(one.original), picture(one.made)], one.caption) for one in group])
        for title, group in groups.items()
    ]


# Curves

_INK = "#010203"  # stands for the page's colour of text until the plot is in the page
_COLOURS = ("#3987cf", "#d97b29", "#35a06b", "#cf5060", "#9270cc")  # readable on white and on black


class _Curve(NamedTuple):
    stage: str
    column: str
    label: str


_PLOTS = {
    "Stage 1, MPG-Net: losses": (
        _Curve("mpg", "loss_g", "L_G, fool D"),
        _Curve("mpg", "loss_d", "L_D"),
        _Curve("mpg", "loss_mp", "L_MP, toward a negative"),
        _Curve("mpg", "loss_c", "L_C, content"),
        _Curve("mpg", "loss_s", "L_S, second pass"),
    ),
    "Stage 1: share of a batch whose nearest neighbour flips": (_Curve("mpg", "flipped", "flipped"),),
    "Stage 1: content, φ-distance of G(x) and x over that between cameras": (_Curve("mpg", "content", "content"),),
    "Stage 2: losses": (
        _Curve("sp", "loss_k", "L_K"),
        _Curve("sp", "loss_nk", "L_NK"),
        _Curve("sp", "loss_kp", "L_K*"),
    ),
    "Stage 2: classifier's accuracy on its batch": (_Curve("sp", "accuracy", "accuracy"),),
}


def curve_plots(runs: Mapping[str, Sequence[Mapping[str, str]]]) -> list[Plot]:
    """Losses over steps; a plot for which no run has values is left out.

    Args:
        runs: the lines of each run's metrics.csv, by its name.
    """
    plots: list[Plot] = []
    for title, curves in _PLOTS.items():
        lines: list[tuple[str, list[int], list[float]]] = []
        for curve in curves:
            for name, rows in runs.items():
                steps = [row for row in rows if row["stage"] == curve.stage and row.get(curve.column)]
                if steps:
                    x = [int(row["step"]) for row in steps]
                    y = [float(row[curve.column]) for row in steps]
                    lines.append((f"{curve.label}, {name}", x, y))
        if lines:
            plots.append(Plot(title, _drawn(lines, f"plot{len(plots)}")))
    return plots


def _drawn(lines: Iterable[tuple[str, list[int], list[float]]], salt: str) -> Markup:
    """An inline SVG whose text and axes take the page's colour."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
        "svg.fonttype": "none",
        "svg.hashsalt": salt,  # names of clip paths: the same in every call, and others in every plot of a page
        "font.size": 9,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.6, 3.2), layout="constrained")
        axes = figure.subplots()
        for i, (label, x, y) in enumerate(lines):
            axes.plot(x, y, color=_COLOURS[i % len(_COLOURS)], linewidth=1.3, label=label)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25, color=_INK, linewidth=0.5)
        figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8)
        content = io.StringIO()
        figure.savefig(
            content, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r' (?:xmlns(?::xlink)?|width|height|version)="[^"]*"', "", svg, count=5)  # of the element svg
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # the same in every plot, and nothing refers to them
    return Markup(svg)


# How it came about


def times_table(seconds: Mapping[str, float], parts: Mapping[str, Mapping[str, float]]) -> Table:
    """Seconds of each stage and in all.

    Args:
        seconds: by stage.
        parts: of a stage, what it spent its time on.
    """
    rows = []
    for stage, value in seconds.items():
        rows.append((stage, f"{value:.0f}"))
        rows += [(f"\u2003of it {part}", f"{of:.0f}") for part, of in parts.get(stage, {}).items()]
    return Table(("stage", "seconds"), [*rows, ("in all", f"{sum(seconds.values()):.0f}")], strong=len(rows))


def configuration_section(configs: Mapping[str, Config]) -> Section:
    """Every value that differs from its default in a run, or between the runs.

    Args:
        configs: by the name of the run.
    """
    rows = [
        (key, shown(setting.default), *(shown(value_of(config, key)) for config in configs.values()))
        for key, setting in SETTINGS.items()
        if any(value_of(config, key) != setting.default for config in configs.values())
    ]
    text = f"{len(rows)} of {len(SETTINGS)} values differ from their defaults; `apd config show` explains each."
    return Section("Configuration", [text], [Table(("key", "default", *configs), rows, numbers=False)], folded=True)


def environment_section(lines: Sequence[tuple[str, str]]) -> Section:
    """Versions and devices.

    Args:
        lines: as of `apd.environment.describe_environment`.
    """
    return Section("Environment", [], [Table(("", ""), lines, numbers=False)], folded=True)
