"""Places behind the drawn pedestrians: a strip several images wide, of which every image shows a piece."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

from PIL import Image, ImageColor, ImageDraw, ImageFilter


class _Scene:
    """A strip to draw on; x and y in image heights from the top left, so x goes from 0 to 2."""

    def __init__(self, height: int, horizon: float, draw: random.Random) -> None:
        self.image = Image.new("RGB", (2 * height, height))
        self.pen = ImageDraw.Draw(self.image)
        self.height, self.horizon, self.draw = height, horizon, draw

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: str, vary: float = 0.0) -> None:
        fill, h = self._varied(colour, vary), self.height
        if x1 > x0 and y1 > y0:
            self.pen.rectangle((x0 * h, y0 * h, x1 * h - 1, y1 * h - 1), fill=fill)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: str, vary: float = 0.0) -> None:
        fill, h = self._varied(colour, vary), self.height
        self.pen.ellipse(((x - rx) * h, (y - ry) * h, (x + rx) * h, (y + ry) * h), fill=fill)

    def _varied(self, colour: str, vary: float) -> tuple[int, ...]:
        factor = 1 + self.draw.uniform(-vary, vary)
        return tuple(min(255, round(value * factor)) for value in ImageColor.getrgb(colour)[:3])

    def floor(self, colour: str, line: str | None = None, rows: int = 6, vary: float = 0.03) -> None:
        """A floor of slabs that grow larger towards the viewer; `line` is the colour of the joints."""
        edges = [self.horizon + (1 - self.horizon) * (k / rows) ** 1.7 for k in range(rows + 1)]
        for k, (y0, y1) in enumerate(pairwise(edges)):
            width = 0.14 + 0.05 * k
            x = -self.draw.uniform(0, width)
            while x < 2:
                self.box(x, y0, x + width, y1, line or colour)
                self.box(x, y0, x + width - (0.008 if line else 0), y1 - (0.006 if line else 0), colour, vary)
                x += width


def _park(s: _Scene) -> None:
    s.box(0, 0, 2, 1, "#bcd9ee")
    for _ in range(26):
        s.oval(s.draw.uniform(0, 2), s.draw.uniform(0.05, 0.35), 0.16, 0.13, "#7fae62", 0.14)
    for _ in range(9):
        x = s.draw.uniform(0, 2)
        s.box(x, 0.2, x + 0.035, s.horizon, "#6d5138", 0.15)
    for _ in range(60):
        s.oval(s.draw.uniform(0, 2), s.horizon - 0.06 + s.draw.uniform(-0.03, 0.03), 0.07, 0.07, "#4f8145", 0.16)
    s.box(0, s.horizon, 2, 1, "#8fbf68")
    for _ in range(300):
        x, y = s.draw.uniform(0, 2), s.draw.uniform(s.horizon, 1)
        s.box(x, y, x + 0.03, y + 0.008, "#86b560", 0.16)
    s.box(0, 0.86, 2, 1, "#d8c7a3")


def _bricks(s: _Scene) -> None:
    s.box(0, 0, 2, 1, "#b9a99a")
    for row in range(int(s.horizon / 0.05) + 1):
        for column in range(17):
            x, y = 0.125 * column - 0.06 * (row % 2), 0.05 * row
            s.box(x, y, x + 0.115, min(y + 0.042, s.horizon), "#a9624c", 0.12)
    for x in (0.25, 1.0, 1.7):
        s.box(x, 0.06, x + 0.26, 0.42, "#e8e4da")
        s.box(x + 0.02, 0.08, x + 0.12, 0.4, "#5d7484", 0.1)
        s.box(x + 0.14, 0.08, x + 0.24, 0.4, "#5d7484", 0.1)
    s.floor("#b7b2aa", "#9b968e")


def _houses(s: _Scene) -> None:
    s.box(0, 0, 2, 1, "#d4d8dc")
    x = -0.1
    while x < 2:
        width = s.draw.uniform(0.3, 0.45)
        colour = s.draw.choice(("#c8b59a", "#a8a29c", "#b98d78", "#8f9aa3"))
        s.box(x, 0, x + width, s.horizon, colour, 0.05)
        for row in range(3):
            for column in range(3):
                u, v = x + 0.04 + column * (width - 0.04) / 3, 0.05 + 0.2 * row
                s.box(u, v, u + 0.07, min(v + 0.12, s.horizon), "#4d5a66", 0.2)
        s.box(x + width - 0.012, 0, x + width, s.horizon, "#77716b")
        x += width
    s.floor("#9a9a9c", "#868688")
    s.box(0, 0.93, 2, 0.95, "#c9c7c0")


def _road(s: _Scene) -> None:
    s.box(0, 0, 2, s.horizon, "#a3aa9b")
    for k in range(5):
        x, y = 0.42 * k + s.draw.uniform(0, 0.1), s.horizon - 0.07
        colour = s.draw.choice(("#a33b34", "#d9d9d6", "#3d5573", "#3b3d42"))
        s.box(x, y - 0.05, x + 0.34, y + 0.05, colour)
        s.box(x + 0.06, y - 0.11, x + 0.26, y - 0.04, "#3f4a52", 0.1)
        for wheel in (0.07, 0.27):
            s.oval(x + wheel, y + 0.05, 0.035, 0.035, "#1f1f22")
    s.box(0, s.horizon, 2, 1, "#6d6e72")
    for k in range(10):
        s.box(0.2 * k, 0.6, 0.2 * k + 0.1, 0.98, "#d9d8d2", 0.04)
    for _ in range(300):
        x, y = s.draw.uniform(0, 2), s.draw.uniform(s.horizon, 1)
        s.box(x, y, x + 0.012, y + 0.006, "#77787b", 0.2)


def _shops(s: _Scene) -> None:
    s.box(0, 0, 2, 1, "#efe6da")
    for k in range(5):
        x = 0.42 * k - 0.05
        s.box(x, 0.12, x + 0.37, s.horizon, "#f9f0d2", 0.05)
        s.box(x, 0.02, x + 0.37, 0.1, s.draw.choice(("#c4475b", "#3a7d7c", "#5b4a86", "#d08a3a")))
        for _ in range(5):
            u = x + s.draw.uniform(0.02, 0.3)
            s.box(u, 0.3, u + 0.05, s.horizon - 0.08, s.draw.choice(("#d8a7b5", "#9cc3c0", "#b8a6d0", "#e3c08f")), 0.1)
        s.box(x, s.horizon - 0.08, x + 0.37, s.horizon - 0.05, "#b09a80")
    s.floor("#e2d8cc", "#cdbfae", rows=5)


def _hall(s: _Scene) -> None:
    s.box(0, 0, 2, 1, "#d7d9d2")
    for k in range(7):
        s.box(0.3 * k, 0, 0.3 * k + 0.03, s.horizon, "#aeb3ab")
        s.box(0.3 * k + 0.06, 0.03, 0.3 * k + 0.26, s.horizon - 0.06, "#bcd0d3", 0.08)
    s.floor("#c9bfa4", "#b3a88d", rows=8, vary=0.08)


def _tunnel(s: _Scene) -> None:
    s.box(0, 0, 2, 1, "#a9a89d")
    for row in range(int(s.horizon / 0.07) + 1):
        for column in range(26):
            x, y = 0.08 * column, 0.07 * row
            s.box(x, y, x + 0.074, min(y + 0.064, s.horizon), "#3f7a7c" if row == 5 else "#dcd9c8", 0.05)
    for x in (0.12, 0.85, 1.5):
        s.box(x, 0.08, x + 0.3, 0.4, "#4a4a4f")
        s.box(x + 0.015, 0.095, x + 0.285, 0.385, s.draw.choice(("#d9805f", "#6fa3b8", "#c9b24d")))
        s.oval(x + 0.15, 0.24, 0.08, 0.08, "#efe6cf")
    s.floor("#8f8b84", "#7b7771")


def _platform(s: _Scene) -> None:
    s.box(0, 0, 2, 1, "#59636b")
    s.box(0, 0.06, 2, s.horizon - 0.06, "#c9cdd0")
    s.box(0, s.horizon - 0.2, 2, s.horizon - 0.14, "#b23a34")
    for k in range(8):
        x = 0.27 * k
        s.box(x, 0.12, x + 0.18, s.horizon - 0.24, "#33414d", 0.15)
        if k % 3 == 0:
            s.box(x + 0.2, 0.1, x + 0.205, s.horizon - 0.06, "#6a7076")
    s.box(0, s.horizon - 0.06, 2, s.horizon, "#2c2f33")
    s.floor("#a3a19b", "#8e8c86")
    s.box(0, s.horizon + 0.05, 2, s.horizon + 0.09, "#e0b83c")


BACKGROUNDS: dict[str, Callable[[_Scene], None]] = {
    "park": _park,
    "bricks": _bricks,
    "houses": _houses,
    "road": _road,
    "shops": _shops,
    "hall": _hall,
    "tunnel": _tunnel,
    "platform": _platform,
}


@lru_cache(maxsize=16)
def background(name: str, haze: str, horizon: float, height: int, seed: int) -> Image.Image:
    """Draw a place.

    Args:
        name: a name of `BACKGROUNDS`.
        haze: colour of the air in front of it.
        horizon: upper edge of the floor, as a share of the height.
        height: of the strip, pixels.
        seed: another seed, other details.

    Returns:
        An RGB strip, twice as wide as high; shared between calls, not to be changed.
    """
    scene = _Scene(height, horizon, random.Random(f"{seed} {name}"))
    BACKGROUNDS[name](scene)
    # Out of focus and in haze, so that people stand out.
    strip = scene.image.filter(ImageFilter.GaussianBlur(height / 130))
    return Image.blend(Image.new("RGB", strip.size, haze), strip, 0.35)
