"""Drawn pedestrians: small multi-domain Re-ID data sets that need no download and show nobody real.

An identity is a body, its garments (kinds, colours, patterns), hair and what it carries. A domain is a place: the
fashion there, a palette of few colours, and two cameras, each with its background, light, colour cast, blur and view.
Identities of a domain share its colours and differ in how they wear them, and every camera and image shifts the
colours, so that counting colours does not tell who is who.
"""

from __future__ import annotations

import math
import os
import random
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter

from apd.errors import InputError

Colour = tuple[int, int, int]
Polygon = list[tuple[float, float]]

SUPERSAMPLING = 4  # drawn at 4 times the size and averaged down: clean edges


@dataclass(frozen=True)
class Camera:
    """Where a camera stands, what is behind the people, and what it does to colours."""

    background: str  # a name of BACKGROUNDS
    views: tuple[str, ...]  # "front", "back", "side": from where people are seen, drawn uniformly
    horizon: float  # upper edge of the floor, in image heights from the top
    scale: float  # height of a person of average height, in image heights
    pitch: float  # looking down: 0 level, larger heads and shorter legs above
    lean: float  # tilt of the camera, x per y
    light: float  # side of the light: −1 left … 1 right; its size is the strength
    gains: tuple[float, float, float]  # colour cast, of red, green and blue
    gamma: float
    contrast: float
    saturation: float
    exposure: float  # standard deviation of the log brightness between images
    blur: float  # radius, final pixels of a 64-row image
    noise: float  # standard deviation, of 1


@dataclass(frozen=True)
class Domain:
    """A place with its fashion and its cameras. A value that stands twice in a tuple is drawn twice as often."""

    name: str
    colours: tuple[str, ...]
    tops: tuple[str, ...]  # "shirt", "sweater", "jacket", "coat"
    bottoms: tuple[str, ...]  # "trousers", "wide", "shorts", "skirt", "dress"
    patterns: tuple[str, ...]  # "plain", "stripes", "pinstripes", "blocks", "checks", "dots", "print"
    hats: tuple[str, ...]  # "none", "cap", "beanie", "brim"
    bags: tuple[str, ...]  # "none", "hand", "sling", "backpack", "suitcase"
    stride: float  # largest step: 0 stands still, 1 walks fast
    bent_arm: float  # probability that an arm is bent, as if holding a telephone
    cameras: tuple[Camera, Camera]


DOMAINS = (
    Domain(
        name="campus",
        colours=("#d9473a", "#f2c14e", "#3b7fc4", "#f4f1ea", "#2f3b52", "#5aa469"),
        tops=("shirt", "shirt", "sweater", "jacket"),
        bottoms=("trousers", "shorts", "shorts", "skirt", "dress"),
        patterns=("plain", "stripes", "blocks", "print"),
        hats=("none", "none", "none", "cap"),
        bags=("none", "backpack", "backpack", "sling"),
        stride=0.8,
        bent_arm=0.15,
        cameras=(
            Camera(
                background="park",
                views=("front", "front", "back", "side"),
                horizon=0.62,
                scale=0.89,
                pitch=0.02,
                lean=0.00,
                light=0.9,
                gains=(1.02, 1.01, 0.96),
                gamma=0.98,
                contrast=1.02,
                saturation=1.02,
                exposure=0.04,
                blur=0.2,
                noise=0.005,
            ),
            Camera(
                background="bricks",
                views=("back", "back", "front", "side"),
                horizon=0.74,
                scale=0.85,
                pitch=0.06,
                lean=0.01,
                light=-0.5,
                gains=(0.95, 0.99, 1.04),
                gamma=1.04,
                contrast=0.97,
                saturation=0.94,
                exposure=0.04,
                blur=0.35,
                noise=0.006,
            ),
        ),
    ),
    Domain(
        name="street",
        colours=("#2b2f38", "#8a5a34", "#b4bac0", "#9c2f3c", "#2f5688", "#dcc08a"),
        tops=("coat", "coat", "jacket", "sweater"),
        bottoms=("trousers", "trousers", "wide", "skirt"),
        patterns=("plain", "plain", "checks", "pinstripes", "blocks"),
        hats=("none", "none", "beanie", "brim"),
        bags=("none", "hand", "sling", "hand"),
        stride=1.0,
        bent_arm=0.25,
        cameras=(
            Camera(
                background="houses",
                views=("front", "front", "back", "side"),
                horizon=0.7,
                scale=0.87,
                pitch=0.00,
                lean=-0.01,
                light=-0.6,
                gains=(0.98, 1.00, 1.02),
                gamma=0.95,
                contrast=0.95,
                saturation=0.95,
                exposure=0.04,
                blur=0.3,
                noise=0.006,
            ),
            Camera(
                background="road",
                views=("back", "back", "front", "side"),
                horizon=0.42,
                scale=0.83,
                pitch=0.08,
                lean=0.02,
                light=0.8,
                gains=(1.04, 0.99, 0.95),
                gamma=1.02,
                contrast=1.03,
                saturation=1.00,
                exposure=0.04,
                blur=0.25,
                noise=0.008,
            ),
        ),
    ),
    Domain(
        name="mall",
        colours=("#e58fb1", "#6c4a9e", "#f7f3ee", "#2aa198", "#26262b", "#e07b39"),
        tops=("shirt", "sweater", "sweater", "jacket"),
        bottoms=("dress", "skirt", "trousers", "wide"),
        patterns=("plain", "dots", "stripes", "checks", "blocks"),
        hats=("none", "none", "none", "brim"),
        bags=("none", "hand", "hand", "sling"),
        stride=0.55,
        bent_arm=0.4,
        cameras=(
            Camera(
                background="shops",
                views=("front", "front", "back", "side"),
                horizon=0.68,
                scale=0.88,
                pitch=0.03,
                lean=0.00,
                light=0.4,
                gains=(1.02, 0.98, 1.02),
                gamma=0.97,
                contrast=1.00,
                saturation=1.03,
                exposure=0.04,
                blur=0.2,
                noise=0.005,
            ),
            Camera(
                background="hall",
                views=("back", "back", "front", "side"),
                horizon=0.3,
                scale=0.83,
                pitch=0.11,
                lean=-0.02,
                light=-0.4,
                gains=(1.01, 1.02, 0.95),
                gamma=1.03,
                contrast=0.98,
                saturation=0.95,
                exposure=0.04,
                blur=0.4,
                noise=0.008,
            ),
        ),
    ),
    Domain(
        name="station",
        colours=("#3c8066", "#e0b03a", "#c0402e", "#efeae0", "#31355a", "#8fa3bd"),
        tops=("sweater", "jacket", "coat", "shirt"),
        bottoms=("trousers", "trousers", "wide", "skirt", "shorts"),
        patterns=("plain", "stripes", "checks", "blocks", "print", "dots"),
        hats=("none", "none", "cap", "beanie"),
        bags=("none", "backpack", "suitcase", "sling", "hand"),
        stride=0.7,
        bent_arm=0.3,
        cameras=(
            Camera(
                background="tunnel",
                views=("front", "back", "side"),
                horizon=0.72,
                scale=0.86,
                pitch=0.04,
                lean=0.01,
                light=0.5,
                gains=(1.04, 1.00, 0.93),
                gamma=1.04,
                contrast=0.98,
                saturation=0.97,
                exposure=0.04,
                blur=0.35,
                noise=0.006,
            ),
            Camera(
                background="platform",
                views=("front", "back", "side"),
                horizon=0.55,
                scale=0.88,
                pitch=0.07,
                lean=-0.01,
                light=-0.7,
                gains=(0.95, 1.01, 1.02),
                gamma=0.97,
                contrast=0.95,
                saturation=0.94,
                exposure=0.04,
                blur=0.3,
                noise=0.006,
            ),
        ),
    ),
)
SOURCES, UNSEEN = DOMAINS[:3], DOMAINS[3]

_SKIN = ("#f3d3bb", "#e5b592", "#c98f68", "#94613f", "#643f2b")
_HAIR = ("#241a15", "#4a2f1d", "#8a5a2b", "#d1a85a", "#9b9a98")
_SHOES = ("#1d1d20", "#f0efe9", "#6b4a30", "#8c2f2a")


# Identities


@dataclass(frozen=True)
class _Cloth:
    colour: Colour
    second: Colour
    pattern: str


@dataclass(frozen=True)
class _Person:
    height: float
    build: float  # 1: average
    skin: Colour
    hair: str
    hair_colour: Colour
    hat: str
    hat_colour: Colour
    top: str
    top_cloth: _Cloth
    inner: Colour  # what an open jacket shows
    bottom: str
    bottom_cloth: _Cloth
    scarf: Colour | None
    shoes: Colour
    bag: str
    bag_colour: Colour


def _person(domain: Domain, seed: int, identity: int) -> _Person:
    draw = random.Random(f"{seed} {domain.name} {identity}")

    def colour(names: Sequence[str]) -> Colour:
        red, green, blue = ImageColor.getrgb(draw.choice(names))[:3]
        return red, green, blue

    def cloth() -> _Cloth:
        first, second = draw.sample(domain.colours, 2)
        return _Cloth(colour([first]), colour([second]), draw.choice(domain.patterns))

    top_cloth, bottom_cloth, bottom = cloth(), cloth(), draw.choice(domain.bottoms)
    if bottom != "skirt":  # loud trousers are rare
        bottom_cloth = _Cloth(bottom_cloth.colour, bottom_cloth.second, draw.choice(("plain", "plain", "seam")))
    top = draw.choice(domain.tops)
    if bottom == "dress":
        bottom_cloth = top_cloth
        top = draw.choice(("shirt", "sweater"))
    return _Person(
        height=draw.uniform(0.88, 1.02),
        build=draw.uniform(0.84, 1.14),
        skin=colour(_SKIN),
        hair=draw.choice(("short", "short", "bob", "long", "bun", "bald")),
        hair_colour=colour(_HAIR),
        hat=draw.choice(domain.hats),
        hat_colour=colour(domain.colours),
        top=top,
        top_cloth=top_cloth,
        inner=colour(domain.colours),
        bottom=bottom,
        bottom_cloth=bottom_cloth,
        scarf=colour(domain.colours) if top in ("coat", "jacket") and draw.random() < 0.4 else None,
        shoes=colour(_SHOES),
        bag=draw.choice(domain.bags),
        bag_colour=colour(domain.colours + _SHOES),
    )


# Drawing. Body coordinates: x from the middle of the body, y from the soles (0) to the crown (1) of an average person.


def _oval(x: float, y: float, width: float, height: float) -> Polygon:
    turns = [math.tau * k / 20 for k in range(20)]
    return [(x + width * math.cos(t), y + height * math.sin(t)) for t in turns]


def _limb(points: Polygon, widths: Sequence[float]) -> list[Polygon]:
    """A bent line of changing half width, with round joints."""
    shapes = [_oval(x, y, width, width) for (x, y), width in zip(points, widths, strict=True)]
    for (x0, y0), (x1, y1), w0, w1 in zip(points, points[1:], widths, widths[1:], strict=False):
        length = math.hypot(x1 - x0, y1 - y0) or 1.0
        nx, ny = (y1 - y0) / length, (x0 - x1) / length
        shapes.append(
            [
                (x0 + w0 * nx, y0 + w0 * ny),
                (x1 + w1 * nx, y1 + w1 * ny),
                (x1 - w1 * nx, y1 - w1 * ny),
                (x0 - w0 * nx, y0 - w0 * ny),
            ]
        )
    return shapes


def _mirrored(half: Polygon) -> Polygon:
    return half + [(-x, y) for x, y in reversed(half)]


def _box(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _darker(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(value * factor)) for value in colour)
    return red, green, blue


class _Sketch:
    """Draws shapes in body coordinates onto an image, lit from one side."""

    def __init__(
        self, image: Image.Image, middle: float, ground: float, unit: float, camera: Camera, mirror: bool
    ) -> None:
        self.image = image
        self.pen = ImageDraw.Draw(image)
        self.middle, self.ground, self.unit, self.camera = middle, ground, unit, camera
        self.sign = -1 if mirror else 1
        # Shading in two tones: every shape is drawn dark, then again in its own colour, moved towards the light.
        self.shift = round(math.copysign(0.014 * unit, camera.light)) if camera.light else 0
        self.shade = 1 - 0.42 * min(1.0, abs(camera.light) + 0.2)
        self.shades = [int(value * self.shade) for value in range(256)] * 3

    def pixels(self, shape: Polygon) -> Polygon:
        pitch, lean = self.camera.pitch, self.camera.lean
        return [
            (
                self.middle + self.unit * (self.sign * x * (1 + pitch * (y - 0.5)) + lean * y),
                self.ground - self.unit * (y + pitch * (y * y - y)),
            )
            for x, y in shape
        ]

    def add(self, shapes: Iterable[Polygon], cloth: Colour | Image.Image, shaded: bool = True) -> None:
        drawn = [self.pixels(shape) for shape in shapes]
        moved = [[(x + self.shift, y - 1) for x, y in shape] for shape in drawn] if shaded else drawn
        if isinstance(cloth, tuple):
            if shaded:
                for shape in drawn:
                    self.pen.polygon(shape, fill=_darker(cloth, self.shade))
            for shape in moved:
                self.pen.polygon(shape, fill=cloth)
            return
        masks = []
        for layer in (drawn, moved):
            mask = Image.new("L", self.image.size)
            pen = ImageDraw.Draw(mask)
            for shape in layer:
                pen.polygon(shape, fill=255)
            masks.append(mask)
        self.image.paste(cloth.point(self.shades), mask=masks[0])
        self.image.paste(cloth, mask=ImageChops.multiply(*masks))

    def cloth(self, cloth: _Cloth) -> Colour | Image.Image:
        """The colour of a plain cloth, a picture of a patterned one."""
        shapes = _PATTERNS[cloth.pattern]
        if not shapes:
            return cloth.colour
        picture = Image.new("RGB", self.image.size, cloth.colour)
        pen = ImageDraw.Draw(picture)
        for shape in shapes:
            pen.polygon(self.pixels(shape), fill=cloth.second)
        return picture


def _grid(step: float, size: float) -> list[Polygon]:
    across, down = int(0.6 / step) + 1, int(1.0 / step)
    return [
        _oval(-0.3 + step * (column + (row % 2) / 2), step * row, size, size)
        for row in range(down)
        for column in range(across)
    ]


_PATTERNS: dict[str, list[Polygon]] = {
    "plain": [],
    "stripes": [_box(-0.4, y / 100, 0.4, y / 100 + 0.045) for y in range(5, 90, 9)],
    "pinstripes": [_box(x / 100, 0, x / 100 + 0.022, 1) for x in range(-32, 33, 6)],
    "blocks": [_box(-0.4, 0.28, 0.4, 0.655)],
    "checks": [
        _box(
            -0.36 + 0.11 * column + 0.055 * (row % 2),
            0.055 * row,
            -0.305 + 0.11 * column + 0.055 * (row % 2),
            0.055 * row + 0.055,
        )
        for row in range(18)
        for column in range(7)
    ],
    "dots": _grid(0.08, 0.019),
    "print": [_oval(0, 0.71, 0.055, 0.055)],
    "seam": [_box(x - 0.014, 0, x + 0.014, 0.5) for x in (-0.105, 0.105, 0.0)],
}


def _draw_person(sketch: _Sketch, person: _Person, view: str, step: float, bent: bool) -> None:
    """One person; `step` is the phase of the walk, −1 … 1."""
    side, back, b = view == "side", view == "back", person.build
    top, bottom = sketch.cloth(person.top_cloth), sketch.cloth(person.bottom_cloth)
    hip = 0.055 * b

    # Arms: shoulder, elbow, hand; legs: hip, knee, foot. The first of each is the far one of a side view.
    if side:
        swings = (-step, step)
        legs = [
            [(0, 0.48), (0.10 * s + 0.015, 0.265), (0.19 * s - 0.03 * abs(s), 0.03 + 0.02 * max(0, -s))] for s in swings
        ]
        arms = [[(0, 0.79), (-0.08 * s - 0.01, 0.64), (-0.15 * s + 0.03, 0.49)] for s in swings]
        if bent:
            arms[1] = [(0, 0.79), (0.0, 0.63), (0.13, 0.69)]
    else:
        lifts = (max(0.0, step) * 0.05, max(0.0, -step) * 0.05)
        legs = [
            [(s * hip, 0.48), (s * hip * 1.1, 0.265 + lift), (s * hip * (1.05 - 3 * lift), 0.03 + lift)]
            for s, lift in zip((-1, 1), lifts, strict=True)
        ]
        arms = [
            [
                (s * 0.118 * b, 0.79),
                (s * (0.15 * b + 0.01), 0.64 + lift / 2),
                (s * (0.15 * b + 0.01 - lift / 2), 0.485 + lift),
            ]
            for s, lift in zip((-1, 1), lifts[::-1], strict=True)
        ]
        if bent:
            arms[1] = [(0.118 * b, 0.79), (0.175 * b, 0.645), (0.075, 0.735)]

    if person.hair == "long" and not back:
        sketch.add([_box(-0.068, 0.78, 0.02 if side else 0.068, 0.93)], _darker(person.hair_colour, 0.85))
    if person.bag == "backpack" and not back:
        x = -0.13 * b if side else 0.0
        sketch.add([_oval(x, 0.68, 0.065 if side else 0.105 * b, 0.125)], person.bag_colour)
    if side:
        _draw_arm(sketch, person, arms[0], top)

    # Legs and what they wear
    bare = person.bottom in ("shorts", "skirt", "dress")
    for leg in legs:
        x, y = leg[2]
        toe = 0.075 if side else math.copysign(0.012, x)
        wide = 1.35 if person.bottom == "wide" else 1.0
        sketch.add(_limb(leg, (0.052 * b, 0.036, 0.024)), person.skin if bare else bottom)
        if person.bottom in ("trousers", "wide"):
            sketch.add(
                _limb([leg[0], leg[1], (x, y + 0.02)], (0.06 * b, 0.044 * b * wide, 0.034 * wide * wide)), bottom
            )
        sketch.add(_limb([(x, y - 0.012), (x + toe, y - 0.016)], (0.03, 0.022)), person.shoes)
        if person.bottom == "shorts":
            knee = (0.25 * leg[0][0] + 0.75 * leg[1][0], 0.25 * leg[0][1] + 0.75 * leg[1][1])
            sketch.add(_limb([leg[0], knee], (0.066 * b, 0.056 * b)), bottom)
    if person.bottom in ("skirt", "dress"):
        swing = 0.04 * step if side else 0.0
        wide, hem = (0.11, 0.155) if side else (0.095, 0.16), 0.255
        sketch.add(
            [
                [
                    (-wide[0] * b * 0.8, 0.53),
                    (wide[0] * b * 0.8, 0.53),
                    (wide[1] * b + swing, hem),
                    (-wide[1] * b + swing, hem),
                ]
            ],
            bottom,
        )

    # Torso
    hem, flare = {"shirt": (0.46, 0.098), "sweater": (0.44, 0.108), "jacket": (0.42, 0.118), "coat": (0.27, 0.142)}[
        person.top
    ]
    if person.bottom == "dress":
        hem, flare = 0.5, 0.085
    if side:
        half = [(0.03, 0.865), (0.075 * b, 0.79), (0.08 * b, 0.62), (0.8 * flare * b, hem)]
        sketch.add([_box(-0.028, 0.83, 0.028, 0.89)], person.skin)
    else:
        half = [(0.03, 0.865), (0.12 * b, 0.825), (0.128 * b, 0.77), (0.1 * b, 0.6), (flare * b, hem)]
        sketch.add([_box(-0.026, 0.83, 0.026, 0.89)], person.skin)
    sketch.add([_mirrored(half)], top)
    if person.top in ("jacket", "coat") and view == "front":
        sketch.add(
            [[(-0.03, 0.862), (0.03, 0.862), (0.026, 0.6), (0.045 * b, hem), (-0.045 * b, hem), (-0.026, 0.6)]],
            person.inner,
        )
    elif view == "front":
        sketch.add([[(-0.028, 0.868), (0.028, 0.868), (0, 0.83)]], person.skin, shaded=False)

    # What is carried
    strap = _darker(person.bag_colour, 0.8)
    if person.bag == "sling":
        sketch.add(
            [[(-0.085 * b, 0.835), (-0.055 * b, 0.845), (0.125 * b, 0.53), (0.095 * b, 0.53)]], strap, shaded=False
        )
        sketch.add([_box(0.06 * b, 0.44, 0.06 * b + 0.12, 0.545)], person.bag_colour)
    elif person.bag == "backpack" and view == "front":
        for s in (-1, 1):
            sketch.add([_box(s * 0.07 * b - 0.014, 0.62, s * 0.07 * b + 0.014, 0.845)], strap, shaded=False)
    for arm in arms[side:]:
        _draw_arm(sketch, person, arm, top)
    if person.bag == "backpack" and back:
        sketch.add([_oval(0, 0.69, 0.1 * b, 0.135), _box(-0.1 * b, 0.56, 0.1 * b, 0.7)], person.bag_colour)
        sketch.add([_box(-0.065 * b, 0.59, 0.065 * b, 0.66)], strap)
    x, y = arms[0][2]
    if person.bag == "hand":
        sketch.add([_box(x - 0.055, y - 0.16, x + 0.055, y - 0.05)], person.bag_colour)
        sketch.add(_limb([(x - 0.035, y - 0.06), (x, y), (x + 0.035, y - 0.06)], (0.007,) * 3), strap, shaded=False)
    elif person.bag == "suitcase":
        x = x - 0.16 if side else x - 0.06
        sketch.add(_limb([arms[0][2], (x, 0.27)], (0.01, 0.01)), (70, 70, 74), shaded=False)
        sketch.add([_box(x - 0.08, 0.02, x + 0.08, 0.29)], person.bag_colour)
        sketch.add([_box(x - 0.05, 0.05, x - 0.035, 0.26), _box(x + 0.035, 0.05, x + 0.05, 0.26)], strap, shaded=False)
    if person.scarf:
        sketch.add([_oval(0, 0.85, 0.068, 0.028)], person.scarf)
        if view == "front":
            sketch.add([_box(0.01, 0.69, 0.05, 0.85)], person.scarf)
    _draw_head(sketch, person, view)


def _draw_arm(sketch: _Sketch, person: _Person, arm: Polygon, cloth: Colour | Image.Image) -> None:
    b = person.build
    sketch.add(_limb(arm, (0.032 * b, 0.026 * b, 0.022)), person.skin)
    short = person.top == "shirt"
    end = arm[1] if short else (arm[1][0] * 0.12 + arm[2][0] * 0.88, arm[1][1] * 0.12 + arm[2][1] * 0.88)
    thick = 1.25 if person.top in ("coat", "jacket") else 1.1
    points, widths = ([arm[0], end], (0.038, 0.036)) if short else ([arm[0], arm[1], end], (0.037, 0.033, 0.029))
    sketch.add(_limb(points, [width * b * thick for width in widths]), cloth)


def _draw_head(sketch: _Sketch, person: _Person, view: str) -> None:
    hair, y = person.hair_colour, 0.925
    sketch.add([_oval(0, y, 0.06, 0.073)], person.skin)
    if view != "back":
        eyes = (0.038,) if view == "side" else (-0.024, 0.024)
        sketch.add([_oval(x, y - 0.002, 0.008, 0.011) for x in eyes], (40, 30, 28), shaded=False)
    if person.hair != "bald":
        if view == "back":
            sketch.add([_oval(0, y + 0.008, 0.066, 0.074)], hair)
            if person.hair in ("long", "bob"):
                sketch.add([_box(-0.068, 0.77 if person.hair == "long" else 0.86, 0.068, y)], hair)
        elif view == "side":
            cap = [(x, z) for x, z in _oval(0, y + 0.01, 0.066, 0.076) if z > y + 0.012 or x < -0.02]
            sketch.add([cap], hair)
        else:
            sketch.add([[(x, z) for x, z in _oval(0, y + 0.008, 0.066, 0.076) if z > y + 0.025]], hair)
        if person.hair == "bob" and view != "back":
            sides = [_box(-0.07, 0.865, -0.046 if view == "front" else -0.005, y + 0.03)]
            if view == "front":
                sides.append(_box(0.046, 0.865, 0.07, y + 0.03))
            sketch.add(sides, hair)
        if person.hair == "bun" and person.hat == "none":
            sketch.add([_oval(-0.05 if view == "side" else 0, 1.005, 0.034, 0.03)], hair)
    crown = [(x, z) for x, z in _oval(0, y + 0.01, 0.07, 0.085) if z > y + 0.028]
    if person.hat == "cap":
        sketch.add([crown], person.hat_colour)
        if view != "back":
            sketch.add(
                [_box(0.02 if view == "side" else -0.055, y + 0.02, 0.115 if view == "side" else 0.055, y + 0.038)],
                _darker(person.hat_colour, 0.7),
            )
    elif person.hat == "beanie":
        sketch.add([crown, _oval(0, 1.02, 0.022, 0.02)], person.hat_colour)
        sketch.add([_box(-0.07, y + 0.022, 0.07, y + 0.05)], _darker(person.hat_colour, 0.75), shaded=False)
    elif person.hat == "brim":
        sketch.add([crown], person.hat_colour)
        sketch.add([_oval(0, y + 0.034, 0.118, 0.016)], _darker(person.hat_colour, 0.8))


# Backgrounds: a strip four images wide, of which every image shows a piece. x and y in image heights from the top left.


class _Scene:
    def __init__(self, height: int, horizon: float, draw: random.Random) -> None:
        self.image = Image.new("RGB", (2 * height, height))
        self.pen = ImageDraw.Draw(self.image)
        self.height, self.horizon, self.draw = height, horizon, draw

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: str, vary: float = 0.0) -> None:
        red, green, blue = ImageColor.getrgb(colour)[:3]
        fill = _darker((red, green, blue), 1 + self.draw.uniform(-vary, vary))
        h = self.height
        if x1 > x0 and y1 > y0:
            self.pen.rectangle((x0 * h, y0 * h, x1 * h - 1, y1 * h - 1), fill=fill)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: str, vary: float = 0.0) -> None:
        red, green, blue = ImageColor.getrgb(colour)[:3]
        fill = _darker((red, green, blue), 1 + self.draw.uniform(-vary, vary))
        h = self.height
        self.pen.ellipse(((x - rx) * h, (y - ry) * h, (x + rx) * h, (y + ry) * h), fill=fill)

    def floor(self, colour: str, line: str | None = None, rows: int = 6, vary: float = 0.03) -> None:
        """A floor that grows lighter towards the viewer, with slabs that grow larger."""
        edges = [self.horizon + (1 - self.horizon) * (k / rows) ** 1.7 for k in range(rows + 1)]
        for k, (y0, y1) in enumerate(zip(edges, edges[1:], strict=False)):
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
def _background(name: str, horizon: float, height: int, seed: int) -> Image.Image:
    scene = _Scene(height, horizon, random.Random(f"{seed} {name}"))
    BACKGROUNDS[name](scene)
    # Out of focus and in haze, so that people stand out.
    strip = scene.image.filter(ImageFilter.GaussianBlur(height / 130))
    haze = strip.resize((1, 1), Image.Resampling.BOX).resize(strip.size).point(lambda value: 110 + value // 2)
    return Image.blend(haze, strip, 0.4)


# Images


@dataclass(frozen=True)
class Drawing:
    """An image of a drawn data set."""

    pid: int
    camid: int  # from 1
    frame: int  # of this identity and camera, from 1
    image: np.ndarray  # uint8 (height, width, 3)


def draw_person(
    domain: Domain, seed: int, pid: int, camid: int, frame: int, size: tuple[int, int] = (64, 32)
) -> np.ndarray:
    """Draw one image, a function of its arguments alone.

    Args:
        domain: the place.
        seed: another seed, other people and other images of the same domain.
        pid: which identity.
        camid: which camera, from 1.
        frame: which image of this identity and camera.
        size: height and width, pixels.

    Returns:
        The image, uint8 (height, width, 3).
    """
    person, camera = _person(domain, seed, pid), domain.cameras[camid - 1]
    draw = random.Random(f"{seed} {domain.name} {pid} {camid} {frame}")
    height, width = (SUPERSAMPLING * side for side in size)
    strip = _background(camera.background, camera.horizon, height, seed)
    left = draw.randrange(strip.width - width) if strip.width > width else 0
    image = strip.crop((left, 0, left + width, height))

    middle = width / 2 + width * (draw.uniform(-0.07, 0.07) - camera.lean)
    ground = height * (0.955 + draw.uniform(-0.025, 0.02))
    unit = height * camera.scale * person.height * draw.uniform(0.96, 1.03)
    _cast_shadow(image, middle, ground, unit, camera.light)
    view = draw.choice(camera.views)
    sketch = _Sketch(image, middle, ground, unit, camera, mirror=draw.random() < 0.5)
    step = domain.stride * math.sin(draw.uniform(0, math.tau))
    _draw_person(sketch, person, view, step, bent=draw.random() < domain.bent_arm)

    if camera.blur:
        image = image.filter(ImageFilter.BoxBlur(1.7 * camera.blur * height / 64))
    return _exposed(np.asarray(image.reduce(SUPERSAMPLING)), camera, draw)


def _cast_shadow(image: Image.Image, middle: float, ground: float, unit: float, light: float) -> None:
    mask = Image.new("L", image.size)
    reach = -light * 0.22 * unit  # away from the light
    pen = ImageDraw.Draw(mask)
    pen.ellipse((middle - 0.17 * unit, ground - 0.035 * unit, middle + 0.17 * unit, ground + 0.025 * unit), fill=130)
    x0, x1 = sorted((middle, middle + 2 * reach))
    pen.ellipse((x0 - 0.05 * unit, ground - 0.05 * unit, x1 + 0.05 * unit, ground + 0.015 * unit), fill=110)
    image.paste((25, 25, 35), mask=mask.filter(ImageFilter.BoxBlur(0.012 * unit)))


def _exposed(pixels: np.ndarray, camera: Camera, draw: random.Random) -> np.ndarray:
    """What the camera makes of the light: exposure, cast, contrast, light falling off to one side, noise."""
    height, width = pixels.shape[:2]
    noise = np.random.default_rng(draw.getrandbits(64)).standard_normal(pixels.shape)
    x = (pixels / 255.0) ** camera.gamma
    grey = x.mean(2, keepdims=True)
    x = grey + camera.saturation * (x - grey)
    x = 0.5 + camera.contrast * (x - 0.5)
    brightness = math.exp(draw.gauss(0, camera.exposure))
    cast = np.array([gain * math.exp(draw.gauss(0, camera.exposure / 3)) for gain in camera.gains])
    slope = 1 + 0.15 * camera.light * np.linspace(-1, 1, width)[None, :, None]
    x = x * slope * brightness * cast + camera.noise * noise
    return (255 * np.clip(x, 0, 1)).round().astype(np.uint8)


def draw_domain(
    domain: Domain,
    seed: int,
    size: tuple[int, int] = (64, 32),
    *,
    pids: Iterable[int] = range(1, 101),
    frames: int = 4,
) -> Iterator[Drawing]:
    """Draw a domain, image by image.

    Args:
        domain: the place.
        seed: another seed, other people.
        size: height and width, pixels.
        pids: which identities.
        frames: images of an identity in each camera.

    Yields:
        The images of one identity after the other, camera by camera.
    """
    for pid in pids:
        for camid in range(1, len(domain.cameras) + 1):
            for frame in range(1, frames + 1):
                yield Drawing(pid, camid, frame, draw_person(domain, seed, pid, camid, frame, size))


def write_domain(
    folder: Path,
    domain: Domain,
    seed: int,
    *,
    train_identities: int = 40,
    test_identities: int = 60,
    frames: int = 4,
    size: tuple[int, int] = (64, 32),
) -> None:
    """Write a domain as a new folder in the layout of Market-1501, with PNG images.

    The test identities come after the training identities. The first image of a test identity in each camera is a
    query, the others are the gallery.

    Args:
        folder: the folder to make; it appears when it is complete.
        domain: the place.
        seed: another seed, other people.
        train_identities: identities in ``bounding_box_train``; with 0 that folder is left out.
        test_identities: identities in ``query`` and ``bounding_box_test``.
        frames: images of an identity in each camera.
        size: height and width, pixels.

    Raises:
        InputError: `folder` exists.
    """
    if folder.exists():
        raise InputError(f"{folder}: exists already; expected a folder to make")
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        for drawing in draw_domain(
            domain, seed, size, pids=range(1, train_identities + test_identities + 1), frames=frames
        ):
            if drawing.pid <= train_identities:
                part = "bounding_box_train"
            else:
                part = "query" if drawing.frame == 1 else "bounding_box_test"
            path = draft / part / f"{drawing.pid:04d}_c{drawing.camid}s1_{drawing.frame:06d}_00.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawing.image).save(path, compress_level=1)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
