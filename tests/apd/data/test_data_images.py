"""Image files: right colours, upright, of the asked size; damage is an error that names the file."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from apd.data import images
from apd.data.images import BACKGROUND, ImageStore, load_image
from apd.errors import InputError


def _picture(height: int = 128, width: int = 64) -> np.ndarray:
    """Four quadrants of different colours."""
    picture = np.empty((height, width, 3), np.uint8)
    middle, centre = height // 2, width // 2
    picture[:middle, :centre], picture[:middle, centre:] = (200, 30, 30), (30, 200, 30)
    picture[middle:, :centre], picture[middle:, centre:] = (30, 30, 200), (120, 120, 20)
    return picture


def _encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _assert_same(found: np.ndarray, expected: np.ndarray, tolerance: float = 0) -> None:
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    # JPEG blurs colour across the edges between quadrants: those rows and columns say nothing.
    inner = np.ones(expected.shape[:2], bool)
    if tolerance:
        for axis in (0, 1):
            middle = expected.shape[axis] // 2
            inner[(slice(None),) * axis + (slice(middle - 8, middle + 8),)] = False
    difference = np.abs(found.astype(int) - expected.astype(int))[inner]
    assert difference.max() <= tolerance


@pytest.mark.parametrize("name", ["a.jpg", "a.JPG", "a.jpeg", "a.png", "a", "name with space é.jpg"])
@pytest.mark.parametrize(
    ("kind", "tolerance"), [("PNG", 0), ("BMP", 0), ("JPEG", 4), ("TIFF", 0), ("PPM", 0), ("JPEG2000", 4)]
)
def test_content_decides(tmp_path: Path, name: str, kind: str, tolerance: int) -> None:
    path = _written(tmp_path / name, _encoded(_picture(), kind))
    _assert_same(load_image(path, None), _picture(), tolerance)
    _assert_same(load_image(str(path), None), _picture(), tolerance)


def test_grey(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (128, 64), np.uint8)
    path = _written(tmp_path / "a.png", _encoded(grey, "PNG"))
    _assert_same(load_image(path, None), np.repeat(grey[:, :, None], 3, 2))
    path = _written(tmp_path / "a.jpg", _encoded(np.full((128, 64), 77, np.uint8), "JPEG"))
    _assert_same(load_image(path, None), np.full((128, 64, 3), 77, np.uint8), 1)
    path = _written(tmp_path / "bits.png", _encoded(Image.fromarray(grey > 127), "PNG"))
    _assert_same(load_image(path, None), np.repeat(np.where(grey > 127, 255, 0).astype(np.uint8)[:, :, None], 3, 2))


def test_grey_16_bit(tmp_path: Path) -> None:
    ramp = np.repeat(np.linspace(0, 65535, 128).astype(np.uint16)[:, None], 64, 1)
    found = load_image(_written(tmp_path / "a.png", _encoded(ramp, "PNG")), None)
    assert found.shape == (128, 64, 3)
    assert np.abs(found.astype(float) - ramp[:, :, None] / 257).max() <= 0.5  # rounded, not clipped


def test_cmyk(tmp_path: Path) -> None:
    red = Image.new("CMYK", (64, 128), (0, 255, 255, 0))
    found = load_image(_written(tmp_path / "a.jpg", _encoded(red, "JPEG")), None)
    _assert_same(found, np.broadcast_to(np.array([255, 0, 0], np.uint8), (128, 64, 3)), 4)


def _transparent(kind: str) -> Image.Image:
    """Left half opaque (200, 30, 30), right half fully transparent over another colour."""
    if kind in ("RGBA", "LA"):
        image = Image.new("RGBA", (64, 128), (200, 30, 30, 255) if kind == "RGBA" else (90, 90, 90, 255))
        image.paste((10, 20, 30, 0), (32, 0, 64, 128))
        return image.convert(kind)
    image = Image.new("P", (64, 128), 1)
    image.putpalette([10, 20, 30, 200, 30, 30])
    image.paste(0, (32, 0, 64, 128))
    return image


@pytest.mark.parametrize(
    ("kind", "options", "colour"),
    [
        ("RGBA", {}, (200, 30, 30)),
        ("LA", {}, (90, 90, 90)),
        ("P", {"transparency": 0}, (200, 30, 30)),
        ("P", {"transparency": b"\0\xff"}, (200, 30, 30)),
    ],
)
def test_transparency(tmp_path: Path, kind: str, options: dict[str, object], colour: tuple[int, int, int]) -> None:
    """One rule for a palette and for an alpha channel, and the colours of the palette, not its indices."""
    found = load_image(_written(tmp_path / "a.png", _encoded(_transparent(kind), "PNG", **options)), None)
    expected = np.empty((128, 64, 3), np.uint8)
    expected[:, :32], expected[:, 32:] = colour, BACKGROUND
    _assert_same(found, expected)


def test_half_transparent(tmp_path: Path) -> None:
    palette = _transparent("P")
    alpha = Image.new("RGBA", (64, 128), (200, 30, 30, 64))
    alpha.paste((10, 20, 30, 128), (32, 0, 64, 128))
    files = {"p.png": _encoded(palette, "PNG", transparency=b"\x80\x40"), "a.png": _encoded(alpha, "PNG")}
    loaded = [load_image(_written(tmp_path / name, content), None) for name, content in files.items()]
    _assert_same(loaded[0], loaded[1])
    for column, colour, opacity in ((0, (200, 30, 30), 64 / 255), (63, (10, 20, 30), 128 / 255)):
        expected = opacity * np.array(colour) + (1 - opacity) * np.array(BACKGROUND)
        assert np.abs(loaded[0][0, column] - expected).max() <= 1


def test_palette(tmp_path: Path) -> None:
    palette = _transparent("P")
    found = load_image(_written(tmp_path / "a.png", _encoded(palette, "PNG")), None)
    assert found[0, 0].tolist() == [200, 30, 30]
    assert found[0, 63].tolist() == [10, 20, 30]


# How a camera that was held so stores the upright picture (EXIF 2.32, tag 0x0112).
ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[::-1],
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: x.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(("kind", "tolerance"), [("JPEG", 4), ("PNG", 0)])
def test_orientation(tmp_path: Path, orientation: int, kind: str, tolerance: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(ORIENTATIONS[orientation](_picture()))
    path = _written(tmp_path / "a.jpg", _encoded(stored, kind, exif=exif))
    _assert_same(load_image(path, None), _picture(), tolerance)
    _assert_same(load_image(path, (128, 64)), _picture(), tolerance)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (16, 1024), (1024, 16), (3, 500), (128, 64)])
def test_resized(tmp_path: Path, height: int, width: int) -> None:
    path = _written(tmp_path / "a.png", _encoded(np.full((height, width, 3), (200, 30, 30), np.uint8), "PNG"))
    _assert_same(load_image(path, (128, 64)), np.full((128, 64, 3), (200, 30, 30), np.uint8))


def test_interpolation(tmp_path: Path) -> None:
    """Bicubic with antialiasing, of the fully decoded picture: torch's float64 filter says the same."""
    picture = np.random.default_rng(0).integers(0, 256, (512, 256, 3), np.uint8)
    for kind in ("PNG", "JPEG"):
        path = _written(tmp_path / "a", _encoded(picture, kind))
        whole = torch.from_numpy(load_image(path, None)).permute(2, 0, 1)[None].double()
        expected = torch.nn.functional.interpolate(whole, (64, 32), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
        assert (torch.from_numpy(load_image(path, (64, 32))) - expected.clamp(0, 255)).abs().max() < 1.5


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def _noise(kind: str) -> bytes:
    return _encoded(np.random.default_rng(0).integers(0, 256, (128, 64, 3), np.uint8), kind)


UNREADABLE = {
    "zero bytes": b"",
    "text": b"this is not an image\n" * 20,
    "half a JPEG": _noise("JPEG")[: len(_noise("JPEG")) * 55 // 100],
    "most of a JPEG": _noise("JPEG")[:-40],
    "header of a JPEG": _noise("JPEG")[:200],
    "start of a JPEG": _noise("JPEG")[:2],
    "half a PNG": _noise("PNG")[: len(_noise("PNG")) // 2],
    "header of a PNG": _noise("PNG")[:33],
    "half a BMP": _noise("BMP")[: len(_noise("BMP")) // 2],
    "header of a BMP": _noise("BMP")[:30],
    "PNG without pixels": _png_header(64, 128),
    "wrong checksum": _noise("PNG")[:40] + b"\0\0\0\0" + _noise("PNG")[44:],
    "decompression bomb": _png_header(100_000, 100_000),
    "another format": _encoded(_picture(), "TGA"),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 128\nshowpage\n",
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("size", [None, (128, 64)])
def test_unreadable(tmp_path: Path, name: str, size: tuple[int, int] | None) -> None:
    path = _written(tmp_path / "a é.jpg", UNREADABLE[name])
    with pytest.raises(InputError, match="cannot be read as an image") as error:
        load_image(path, size)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (10_000, 12_000)])
def test_too_many_pixels(tmp_path: Path, width: int, height: int) -> None:
    """Pillow only warns of these, and would decode hundreds of megabytes."""
    path = _written(tmp_path / "a.png", _png_header(width, height))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(InputError, match=f"expected an image of at most .* pixels, got {width} × {height}"):
            load_image(path, (128, 64))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_32_bits(tmp_path: Path, dtype: type) -> None:
    path = _written(tmp_path / "a.tif", _encoded(np.ones((8, 4), dtype), "TIFF"))
    with pytest.raises(InputError, match="pixels of 32 bits, whose white is not known"):
        load_image(path, None)


def test_first_frame(tmp_path: Path) -> None:
    colours = [Image.new("RGB", (4, 8), colour) for colour in ("red", "blue")]
    colours[0].save(tmp_path / "a.gif", save_all=True, append_images=colours[1:])
    assert (load_image(tmp_path / "a.gif", None) == [255, 0, 0]).all()


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{tmp_path / 'a.jpg'}: no such file$"):
        load_image(tmp_path / "a.jpg", None)
    with pytest.raises(InputError, match="expected a file, found a folder"):
        load_image(tmp_path, None)


# ImageStore


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (20, 40, 20, 3), np.uint8)
    return [_written(tmp_path / f"{i}.png", _encoded(picture, "PNG")) for i, picture in enumerate(pictures)]


@pytest.mark.parametrize("cache", [True, False])
def test_store(paths: list[Path], cache: bool) -> None:
    store = ImageStore(paths, (32, 16), cache=cache)
    assert len(store) == 20
    for i, path in enumerate(paths):
        image = store[i]
        assert image.dtype == torch.uint8
        assert image.is_contiguous()
        assert torch.equal(image, torch.from_numpy(load_image(path, (32, 16))).permute(2, 0, 1))
    assert len(ImageStore([], (32, 16), cache=cache)) == 0


@pytest.mark.parametrize("cache", [True, False])
def test_store_reads_once(paths: list[Path], cache: bool) -> None:
    store = ImageStore(paths, (32, 16), cache=cache)
    for path in paths:
        path.unlink()
    if cache:
        assert store[3].shape == (3, 32, 16)
    else:
        with pytest.raises(InputError, match=r"3\.png: no such file"):
            store[3]


def test_store_names_the_unreadable(paths: list[Path]) -> None:
    _written(paths[7], UNREADABLE["half a JPEG"])
    with pytest.raises(InputError, match=r"7\.png: cannot be read as an image"):
        ImageStore(paths, (32, 16), cache=True)
    store = ImageStore(paths, (32, 16), cache=False)
    assert store[6].shape == (3, 32, 16)
    with pytest.raises(InputError, match=r"7\.png: cannot be read as an image"):
        store[7]


def test_store_out_of_memory(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(images.torch, "empty", no_memory)
    with pytest.raises(InputError, match=r"^cache: no memory for 20 images, 0.0 GB$"):
        ImageStore(paths, (32, 16), cache=True)


# The real files

SHAPES = {
    "good_rgb.jpg": (128, 64),
    "UPPER_CASE.JPG": (128, 64),
    "name with space é.jpg": (128, 64),
    "png_named.jpg": (128, 64),
    "jpeg_named.png": (128, 64),
    "one_by_one.jpg": (1, 1),
    "wide_1024x16.jpg": (16, 1024),
    "gray.jpg": (128, 64),
    "gray16.png": (128, 64),
    "cmyk.jpg": (128, 64),
    "palette_alpha.png": (128, 64),
    "rgba.png": (128, 64),
    "exif_rotated.jpg": (128, 64),
}
DAMAGED = {"truncated.jpg", "header_only.jpg", "zero_byte.jpg", "text.jpg"}


@pytest.fixture
def broken(real_data: Path) -> Path:
    return real_data / "data" / "broken" / "images"


def test_broken_is_complete(broken: Path) -> None:
    assert {path.name for path in broken.iterdir()} == SHAPES.keys() | DAMAGED


@pytest.mark.parametrize("name", SHAPES)
def test_broken_readable(broken: Path, name: str) -> None:
    found = load_image(broken / name, None)
    assert found.shape == (*SHAPES[name], 3)
    assert load_image(broken / name, (128, 64)).shape == (128, 64, 3)
    rows = found.mean((1, 2))
    if name == "gray16.png":
        assert np.abs(rows - np.linspace(0, 255, 128)).max() < 1
    elif name == "cmyk.jpg":
        assert np.abs(found.astype(int) - (255, 0, 0)).max() < 5
    elif name == "gray.jpg":
        assert (found == found[:, :, :1]).all()
    elif name == "exif_rotated.jpg":
        assert np.abs(found[:28].astype(int) - (255, 0, 0)).max() < 5
        assert np.abs(found[36:].astype(int) - (0, 0, 255)).max() < 5
    elif name in ("palette_alpha.png", "rgba.png"):
        with Image.open(broken / name) as image:
            pixels = np.asarray(image.convert("RGBA")).astype(float)
        opacity = pixels[:, :, 3:] / 255
        expected = opacity * pixels[:, :, :3] + (1 - opacity) * np.array(BACKGROUND)
        assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_broken_unreadable(broken: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"^{broken / name}: cannot be read as an image"):
        load_image(broken / name, (128, 64))
