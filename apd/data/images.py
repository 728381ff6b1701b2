"""Reading image files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from apd.errors import InputError

BACKGROUND = (255, 255, 255)  # white behind transparent pixels, as viewers show them
# Named, because Pillow hands some other formats to outside programs.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "JPEG2000", "PPM")
MAX_PIXELS = 64 * 1024**2  # more is no picture of a person, but a file made to fill the memory
MAX_SIDE = 20_000
_THREADS = min(8, os.cpu_count() or 1)


def load_image(path: Path | str, size: tuple[int, int] | None) -> np.ndarray:
    """Read an image file as upright 8-bit RGB.

    The format is known by the content, not by the name. EXIF orientation is
    applied, 16-bit grey scaled to 8 bits, transparency (of a palette or of an
    alpha channel) laid over `BACKGROUND`. Of several frames the first is taken.

    Args:
        path: a file of one of the `FORMATS`.
        size: (height, width) in pixels to resize to, bicubic with antialiasing as in TransReID; None: as stored.

    Returns:
        uint8 (H, W, 3).

    Raises:
        InputError: the file is missing, cut off, or no such image.
    """
    if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
        raise InputError(f"{path}: expected a file, found a pipe or a device")  # which would wait for ever
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if max(width, height) > MAX_SIDE:  # to resize one costs memory by its sides
                raise InputError(f"{path}: expected sides of at most {MAX_SIDE:,} pixels, got {width} × {height}")
            if width * height > MAX_PIXELS:
                raise InputError(f"expected an image of at most {MAX_PIXELS:,} pixels, got {width} × {height}")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            rgb = _as_rgb(image)
            if size is not None:
                rgb = rgb.resize((size[1], size[0]), Image.Resampling.BICUBIC)
            return np.array(rgb)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: expected a file, found a folder") from None
    except PermissionError:
        raise InputError(f"{path}: no permission to read it") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more for damage
        raise InputError(f"{path}: cannot be read as an image, or is cut off or damaged") from error


def check_readable(paths: Sequence[Path | str], advance: Callable[[int], None] = lambda done: None) -> None:
    """Decode images, so that a damaged one ends a command before its work.

    Args:
        paths: of the images.
        advance: called with 1 for each.

    Raises:
        InputError: some cannot be read; the message counts them and names the first.
    """

    def look(path: Path | str) -> str | None:
        try:
            load_image(path, None)
            return None
        except InputError as error:
            return str(error)

    errors = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for error in pool.map(look, paths):
            advance(1)
            if error is not None:
                errors.append(error)
    if errors:
        more = f", and {len(errors) - 1} more of {len(paths):,} images" if len(errors) > 1 else ""
        raise InputError(f"{errors[0]}{more}")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # what is white in it, 1.0 or 255.0, nobody says
        raise InputError("floating point pixels, whose white is not known; expected whole numbers")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), picture).convert("RGB")
    return image.convert("RGB")


def within(folder: Path, name: str) -> Path:
    """The file of a name that a gallery or a feature file brings: of the folder, or of its own where it is absolute, as
    those of images that were appended from another data set are.

    Raises:
        InputError: it goes up from the folder.
    """
    if ".." in Path(name).parts:
        raise InputError(f"{name}: leads out of {folder}, where the images are")
    return folder / name


class ImageStore:
    """Images of one size, by index.

    Args:
        paths: N image files.
        size: (height, width) in pixels of every image.
        cache: read all of them now and keep them, N × height × width × 3 bytes; otherwise each is read when asked for.

    Raises:
        InputError: with `cache`, an image cannot be read, or there is not enough memory.
    """

    def __init__(self, paths: Sequence[Path | str], size: tuple[int, int], *, cache: bool) -> None:
        self._paths = list(paths)
        self._size = size
        self._images = self._read_all() if cache else None

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        """Image `index`, uint8 (3, H, W)."""
        return self._read(index) if self._images is None else self._images[index]

    @property
    def bytes(self) -> int:
        """Size of all images in memory."""
        return len(self) * 3 * self._size[0] * self._size[1]

    def all(self) -> Tensor:
        """All images, uint8 (N, 3, H, W), read now unless they are kept.

        Raises:
            InputError: an image cannot be read, or there is not enough memory.
        """
        return self._read_all() if self._images is None else self._images

    def _read(self, index: int) -> Tensor:
        return torch.from_numpy(load_image(self._paths[index], self._size)).permute(2, 0, 1).contiguous()

    def _read_all(self) -> Tensor:
        shape = (len(self), 3, *self._size)
        try:
            images = torch.empty(shape, dtype=torch.uint8)
        except RuntimeError as error:
            gigabytes = np.prod(shape, dtype=float) / 1e9
            raise InputError(f"cache: no memory for {len(self):,} images, {gigabytes:.1f} GB") from error

        def read(index: int) -> None:
            images[index] = self._read(index)

        with ThreadPoolExecutor(_THREADS) as pool:  # Pillow decodes and resizes outside Python's lock
            for _ in pool.map(read, range(len(self))):
                pass  # raises what a thread raised, and drops the images that have not begun
        return images
