"""Ranked lists as a picture: in each row a query and its gallery images, nearest first."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

from apd.data.images import load_image
from apd.errors import InputError
from apd.files import replacing
from apd.retrieval.ranked_lists import RankedLists

RIGHT, WRONG, UNKNOWN = (34, 139, 34), (200, 30, 30), (150, 150, 150)
_BOX, _FRAME, _GAP = (96, 192), 4, 10  # pixels; a box is (width, height)
_LINE, _CAPTION = 13, 3  # height of a line of text, and lines below a box
_CELL = (_BOX[0] + 2 * _FRAME + _GAP, _BOX[1] + 2 * _FRAME + _CAPTION * _LINE + _GAP)
_LARGEST = 65_500  # pixels of a side: what a JPEG file can hold
_PAPER, _INK, _EMPTY = (255, 255, 255), (40, 40, 40), (235, 235, 235)


def write_ranked_picture(lists: RankedLists, folder: Path, path: Path) -> None:
    """Draw all lists and write or replace the picture in one step.

    Frames are green around images of the query's identity, red around others, and grey where the query's identity is
    not known. An image that cannot be read any more is an empty box with its name.

    Args:
        lists: the queries' names are image files; the found names are relative to `folder`.
        folder: the gallery's data set.
        path: a name that ends in .png, .jpg or .jpeg.

    Raises:
        InputError: the lists are too many or too long for a picture.
    """
    rows = [lists.matches(query) for query in range(len(lists.query))]
    columns = 1 + max(map(len, rows))
    size = _GAP + columns * _CELL[0] + _GAP, _GAP + len(rows) * _CELL[1]
    if max(size) > _LARGEST:
        lists_most, images_most = ((_LARGEST - gaps) // cell for gaps, cell in ((_GAP, _CELL[1]), (2 * _GAP, _CELL[0])))
        raise InputError(
            f"{path}: a picture can hold {lists_most} lists of {images_most - 1} images, got {len(rows):,} of "
            f"{columns - 1:,}; draw fewer with --show and -k, or write them with --output"
        )
    picture = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(picture)
    for row, matches in enumerate(rows):
        top = _GAP + row * _CELL[1]
        pid, camera, name = lists.describe(row)
        _draw(draw, picture, (_GAP, top), Path(name), name, _INK, ["query", *_labels(pid, camera)])
        for rank, (_, found, found_camera, found_name, distance) in enumerate(matches, 1):
            frame = UNKNOWN if pid in (None, -1) else RIGHT if found == pid else WRONG
            caption = [f"{rank}: {distance:.4f}", *_labels(found, found_camera)]
            left = 2 * _GAP + rank * _CELL[0]
            _draw(draw, picture, (left, top), folder / found_name, found_name, frame, caption)
    with replacing(path) as file:
        picture.save(file, "PNG" if path.suffix == ".png" else "JPEG", quality=92)


def _labels(pid: int | None, camera: int | None) -> list[str]:
    return [f"{what} {value}" for what, value in (("id", pid), ("camera", camera)) if value not in (None, -1)]


def _draw(
    draw: ImageDraw.ImageDraw,
    picture: Image.Image,
    corner: tuple[int, int],
    path: Path,
    name: str,
    frame: tuple[int, int, int],
    caption: list[str],
) -> None:
    """One image in its frame, with its caption below."""
    left, top = corner
    width, height = _BOX
    draw.rectangle((left, top, left + width + 2 * _FRAME - 1, top + height + 2 * _FRAME - 1), _EMPTY, frame, _FRAME)
    font = ImageFont.load_default(11)
    try:
        image = Image.fromarray(load_image(path, None))
    except InputError:
        text = "\n".join(wrap(name, 13)[: height // _LINE])
        draw.multiline_text((left + _FRAME + 3, top + _FRAME + 3), text, _INK, font)
    else:
        scale = min(width / image.width, height / image.height)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        offset = (left + _FRAME + (width - image.width) // 2, top + _FRAME + (height - image.height) // 2)
        picture.paste(image, offset)
    for line, text in enumerate(caption):
        draw.text((left, top + height + 2 * _FRAME + 1 + line * _LINE), text, _INK, font)
