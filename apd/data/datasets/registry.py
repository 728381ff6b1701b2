"""The data sets that are known by name: where their images lie, what their authors count, how they are tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from apd.data.datasets.layouts import (
    CUHK03_VARIANTS,
    read_cuhk02,
    read_cuhk03,
    read_cuhk_sysu,
    read_grid,
    read_ilids,
    read_pictures,
    read_prid,
    read_viper,
)
from apd.data.datasets.lists import msmt17_variant, read_manifest, read_msmt17
from apd.data.datasets.ten_splits import grid_splits, half_by_camera, half_by_image
from apd.data.market import ENDINGS, FOLDERS, ReidFolder, read_market
from apd.data.splits import Split

ALL = tuple(FOLDERS)
TEST = ("query", "gallery")
_MARKET_LAYOUT = (("bounding_box_train",), ("query", "bounding_box_test"))


@dataclass(frozen=True)
class Published:
    """What the authors of a data set count in one part."""

    images: int  # distractors included
    identities: int
    distractors: int = 0


@dataclass(frozen=True)
class DataSet:
    """A data set by name.

    `layouts` are alternatives, each a few folders or files that lie in the data set's folder; by the first a folder is
    recognised that is given without a name.
    """

    name: str
    title: str  # as papers write it
    short: str  # its abbreviation in tables
    read: Callable[..., ReidFolder]  # (folder, parts[, variant])
    layouts: tuple[tuple[str, ...], ...]
    inside: tuple[str, ...] = ()  # folders within the one given that may hold the layout
    aliases: tuple[str, ...] = ()  # further names, and usual names of its folder
    parts: tuple[str, ...] = ALL
    variants: tuple[str, ...] = ()
    variant_in: Callable[[Path], str] | None = None  # the variant that is read of a folder where none is named
    published: Mapping[str, Published] = field(default_factory=dict)  # by part, "part/variant" where they differ
    splits: Callable[[ReidFolder, int], list[Split]] | None = None  # its test, of rows query + gallery, by seed
    cameras_known: bool = True

    def find(self, path: Path, variant: str | None = None) -> Path:
        """The folder that holds the layout: `path`, or one within it; `path` where none does.

        The reader then says what is missing.
        """
        # What is unpacked into a folder of its own name lies in two.
        folders = [path, *(path / name for name in self.inside), *(path / name / name for name in self.inside)]
        if variant is not None:  # MSMT17_V2 before MSMT17_V1 where both are there
            folders.sort(key=lambda folder: not folder.name.lower().endswith(variant))
        return next((folder for folder in folders if any(_lies_in(folder, layout) for layout in self.layouts)), path)

    def recognises(self, path: Path) -> bool:
        """Whether a folder without a name is such a data set; one above it may hold others as well, and is not."""
        return _lies_in(path, self.layouts[0])

    def counts(self, part: str, variant: str | None) -> Published | None:
        """The published size of a part; None where none is known."""
        return self.published.get(f"{part}/{variant}", self.published.get(part))


def _lies_in(folder: Path, layout: tuple[str, ...]) -> bool:
    return all((folder / entry).exists() for entry in layout)


MARKET_LAYOUT = DataSet("market", "any data set in the layout of Market-1501", "–", read_market, _MARKET_LAYOUT)
MANIFEST = DataSet("csv", "CSV file: path,pid,camid,split[,domain]", "–", read_manifest, ())
PICTURES = DataSet(
    "pictures", "a folder of images without labels, to describe and to search", "–", read_pictures, (), parts=TEST
)

_KNOWN = (
    DataSet(
        name="market1501",
        title="Market-1501 (Zheng et al. 2015)",
        short="M",
        read=read_market,
        layouts=_MARKET_LAYOUT,
        inside=("Market-1501-v15.09.15", "Market-1501"),
        aliases=("Market-1501", "Market-1501-v15.09.15"),
        published={
            "train": Published(12_936, 751),
            "query": Published(3_368, 750),
            "gallery": Published(15_913, 750, distractors=2_798),
        },
    ),
    DataSet(
        name="dukemtmc",  # withdrawn by its authors: for those who have it
        title="DukeMTMC-reID (Ristani et al. 2016, Zheng et al. 2017)",
        short="D",
        read=read_market,
        layouts=_MARKET_LAYOUT,
        inside=("DukeMTMC-reID",),
        aliases=("DukeMTMC-reID", "dukemtmcreid"),
        published={
            "train": Published(16_522, 702),
            "query": Published(2_228, 702),
            "gallery": Published(17_661, 1_110),
        },
    ),
    DataSet(
        name="msmt17",
        title="MSMT17 (Wei et al. 2018)",
        short="MS",
        read=read_msmt17,
        layouts=(("list_train.txt",), ("list_query.txt", "list_gallery.txt")),
        inside=("MSMT17_V1", "MSMT17_V2"),
        aliases=("MSMT17_V1", "MSMT17_V2"),
        variants=("v1", "v2"),
        variant_in=msmt17_variant,
        published={
            "train": Published(32_621, 1_041),
            "query": Published(11_659, 3_060),
            "gallery": Published(82_161, 3_060),
        },
    ),
    DataSet(
        name="cuhk03",
        title="CUHK03-NP (Li et al. 2014, Zhong et al. 2017)",
        short="C3",
        read=read_cuhk03,
        layouts=(("detected", "labeled"), ("detected",), ("labeled",), *_MARKET_LAYOUT),
        inside=("cuhk03-np", "CUHK03-NP"),
        aliases=("cuhk03-np",),
        variants=CUHK03_VARIANTS,
        variant_in=lambda folder: "labeled" if folder.name.lower() == "labeled" else "detected",
        published={
            "train/detected": Published(7_365, 767),
            "query": Published(1_400, 700),
            "gallery/detected": Published(5_332, 700),
            "train/labeled": Published(7_368, 767),
            "gallery/labeled": Published(5_328, 700),
        },
    ),
    DataSet(
        name="cuhk02",
        title="CUHK02 (Li and Wang 2013)",
        short="C2",
        read=read_cuhk02,
        layouts=(("P1/cam1", "P1/cam2"),),
        inside=("Dataset",),
        published={
            "train": Published(6_308, 1_577),
            "query": Published(478, 239),
            "gallery": Published(478, 239),
        },
    ),
    DataSet(
        name="cuhk-sysu",
        title="CUHK-SYSU, people cut out (Xiao et al. 2017)",
        short="CS",
        read=read_cuhk_sysu,
        layouts=(("cropped_images",), ("cropped_image",), ("bounding_box_train",)),
        aliases=("cuhksysu", "CUHK-SYSU"),
        parts=("train",),
        published={"train": Published(34_574, 11_934)},
        cameras_known=False,
    ),
    DataSet(
        name="prid",
        title="PRID 2011, single shot (Hirzer et al. 2011)",
        short="PRID",
        read=read_prid,
        layouts=(("single_shot/cam_a", "single_shot/cam_b"),),
        inside=("prid_2011",),
        aliases=("prid2011", "prid_2011"),
        parts=TEST,
        published={"query": Published(385, 385), "gallery": Published(749, 749)},
        splits=half_by_camera,
    ),
    DataSet(
        name="grid",
        title="GRID (Loy et al. 2009)",
        short="GRID",
        read=read_grid,
        layouts=(("probe", "gallery"),),
        inside=("underground_reid",),
        aliases=("underground_reid", "qmul-grid", "underground_grid"),
        parts=TEST,
        published={"query": Published(250, 250), "gallery": Published(1_025, 250, distractors=775)},
        splits=grid_splits,
    ),
    DataSet(
        name="viper",
        title="VIPeR (Gray et al. 2007)",
        short="VIPeR",
        read=read_viper,
        layouts=(("cam_a", "cam_b"),),
        inside=("VIPeR",),
        parts=TEST,
        published={"query": Published(632, 632), "gallery": Published(632, 632)},
        splits=half_by_camera,
    ),
    DataSet(
        name="ilids",
        title="i-LIDS, 119 people (Zheng et al. 2009)",
        short="iLIDS",
        read=read_ilids,
        layouts=(("Persons",), ("images",)),
        inside=("i-LIDS_Pedestrian",),
        aliases=("i-LIDS", "QMUL-iLIDS", "i-LIDS_Pedestrian"),
        parts=TEST,
        published={"query": Published(119, 119), "gallery": Published(357, 119)},
        splits=half_by_image,
        cameras_known=False,
    ),
)
DATASETS: dict[str, DataSet] = {dataset.name: dataset for dataset in (*_KNOWN, MARKET_LAYOUT, MANIFEST, PICTURES)}


def normal_name(name: str) -> str:
    """Without case, hyphens and the like: `Market-1501` and `market1501` are one name."""
    return "".join(character for character in name.lower() if character.isalnum())


_BY_NAME: dict[str, DataSet] = {
    normal_name(name): dataset for dataset in DATASETS.values() for name in (dataset.name, *dataset.aliases)
}


def dataset_named(name: str) -> DataSet | None:
    """The data set of a name or alias, however it is written; None where there is none."""
    return _BY_NAME.get(normal_name(name))


def recognised(path: Path) -> DataSet:
    """The data set that a folder or file without a name is, by its layout; that of Market-1501 is taken first.

    A folder of no known layout that holds images is one of pictures. Any other is taken for one of Market-1501, whose
    reader says what is missing.
    """
    if path.suffix.lower() == ".csv" and path.is_file():
        return MANIFEST
    if any((path / folder).is_dir() for folder in FOLDERS.values()):
        return MARKET_LAYOUT
    known = next((dataset for dataset in _KNOWN if dataset.recognises(path)), None)
    if known is None and path.is_dir() and any(file.suffix.lower() in ENDINGS for file in path.iterdir()):
        return PICTURES
    return known or MARKET_LAYOUT
