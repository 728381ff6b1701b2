"""The people of the drawn data set.

Body coordinates: x from the middle of the body, y from the soles (0) to the crown (1) of a person of average height.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw

Colour = tuple[int, int, int]
Polygon = list[tuple[float, float]]


@dataclass(frozen=True)
class Cloth:
    """What a garment is made of."""

    colour: Colour
    second: Colour
    pattern: str  # a name of _PATTERNS


@dataclass(frozen=True)
class Person:
    """Everything that belongs to an identity."""

    height: float  # 1: average
    build: float  # width of the body, 1: average
    skin: Colour
    hair: str  # "short", "bob", "long", "bun", "bald"
    hair_colour: Colour
    hat: str  # "none", "cap", "beanie", "brim"
    hat_colour: Colour
    top: str  # "shirt", "sweater", "jacket", "coat"
    top_cloth: Cloth
    inner: Colour  # what an open jacket or coat shows
    bottom: str  # "trousers", "wide", "shorts", "skirt", "dress"
    bottom_cloth: Cloth
    scarf: Colour | None
    shoes: Colour
    bag: str  # "none", "hand", "sling", "backpack", "suitcase"
    bag_colour: Colour


@dataclass(frozen=True)
class Pose:
    """How a person is seen in one image."""

    view: str  # "front", "back", "side"
    step: float  # phase of the walk, −1 … 1; 0 stands
    bent_arm: bool  # as if holding a telephone


@dataclass(frozen=True)
class Placement:
    """Where in the picture a person stands, and how the camera looks at it."""

    middle: float  # x of the body's middle, pixels
    ground: float  # y of the soles, pixels
    unit: float  # height of a person of height 1, pixels
    mirror: bool
    pitch: float  # looking down: 0 level, above it larger heads and shorter legs
    lean: float  # tilt of the camera, x per y
    light: float  # side of the light: −1 left … 1 right; its size is the strength


def _oval(x: float, y: float, width: float, height: float) -> Polygon:
    turns = [math.tau * k / 20 for k in range(20)]
    return [(x + width * math.cos(t), y + height * math.sin(t)) for t in turns]


def _limb(points: Polygon, widths: Sequence[float]) -> list[Polygon]:
    """A bent line of changing half width, with round joints."""
    shapes = [_oval(x, y, width, width) for (x, y), width in zip(points, widths, strict=True)]
    for (x0, y0), (x1, y1), w0, w1 in zip(points, points[1:], widths, widths[1:], strict=False):
        length = math.hypot(x1 - x0, y1 - y0) or 1.0
        nx, ny = (y1 - y0) / length, (x0 - x1) / length
        near = [(x0 + w0 * nx, y0 + w0 * ny), (x1 + w1 * nx, y1 + w1 * ny)]
        far = [(x1 - w1 * nx, y1 - w1 * ny), (x0 - w0 * nx, y0 - w0 * ny)]
        shapes.append(near + far)
    return shapes


def _mirrored(half: Polygon) -> Polygon:
    return half + [(-x, y) for x, y in reversed(half)]


def _box(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _darker(colour: Colour, factor: float) -> Colour:
    red, green, blue = (round(value * factor) for value in colour)
    return red, green, blue


_PATTERNS: dict[str, list[Polygon]] = {
    "plain": [],
    "stripes": [_box(-0.4, y / 100, 0.4, y / 100 + 0.045) for y in range(5, 90, 9)],
    "pinstripes": [_box(x / 100, 0, x / 100 + 0.022, 1) for x in range(-32, 33, 6)],
    "blocks": [_box(-0.4, 0.28, 0.4, 0.655)],
    "checks": [
        _box(x, 0.055 * row, x + 0.055, 0.055 * row + 0.055)
        for row in range(18)
        for x in (-0.36 + 0.11 * column + 0.055 * (row % 2) for column in range(7))
    ],
    "dots": [_oval(-0.3 + 0.08 * (k + (row % 2) / 2), 0.08 * row, 0.019, 0.019) for row in range(12) for k in range(8)],
    "print": [_oval(0, 0.71, 0.055, 0.055)],
    "seam": [_box(x - 0.014, 0, x + 0.014, 0.5) for x in (-0.105, 0.105, 0.0)],
}


class _Sketch:
    """Draws shapes in body coordinates onto a picture, lit from one side."""

    def __init__(self, picture: Image.Image, place: Placement) -> None:
        self.picture, self.place = picture, place
        self.pen = ImageDraw.Draw(picture)
        self.sign = -1 if place.mirror else 1
        # Shading in two tones: every shape is drawn dark, then again in its own colour, moved towards the light.
        self.shift = round(math.copysign(0.014 * place.unit, place.light)) if place.light else 0
        self.shade = 1 - 0.42 * min(1.0, abs(place.light) + 0.2)
        self.shades = [int(value * self.shade) for value in range(256)] * 3

    def pixels(self, shape: Polygon) -> Polygon:
        place = self.place
        return [
            (
                place.middle + place.unit * (self.sign * x * (1 + place.pitch * (y - 0.5)) + place.lean * y),
                place.ground - place.unit * (y + place.pitch * (y * y - y)),
            )
            for x, y in shape
        ]

    def add(self, shapes: Iterable[Polygon], cloth: Colour | Image.Image) -> None:
        """Shaded shapes, which lie in front of all before them."""
        drawn = [self.pixels(shape) for shape in shapes]
        moved = [[(x + self.shift, y - 1) for x, y in shape] for shape in drawn]
        if isinstance(cloth, Image.Image):
            whole, lit = self._mask(drawn), self._mask(moved)
            self.picture.paste(cloth.point(self.shades), mask=whole)
            self.picture.paste(cloth, mask=ImageChops.multiply(whole, lit))
        else:
            for layer, colour in ((drawn, _darker(cloth, self.shade)), (moved, cloth)):
                for shape in layer:
                    self.pen.polygon(shape, fill=colour)

    def add_flat(self, shapes: Iterable[Polygon], colour: Colour) -> None:
        """Shapes without shading: details."""
        for shape in shapes:
            self.pen.polygon(self.pixels(shape), fill=colour)

    def _mask(self, shapes: Iterable[Polygon]) -> Image.Image:
        mask = Image.new("L", self.picture.size)
        pen = ImageDraw.Draw(mask)
        for shape in shapes:
            pen.polygon(shape, fill=255)
        return mask

    def cloth(self, cloth: Cloth) -> Colour | Image.Image:
        """The colour of a plain cloth, a picture of a patterned one."""
        shapes = _PATTERNS[cloth.pattern]
        if not shapes:
            return cloth.colour
        picture = Image.new("RGB", self.picture.size, cloth.colour)
        pen = ImageDraw.Draw(picture)
        for shape in shapes:
            pen.polygon(self.pixels(shape), fill=cloth.second)
        return picture


def draw_figure(picture: Image.Image, person: Person, pose: Pose, place: Placement) -> None:
    """Draw one person onto an RGB picture, from what is farthest to what is nearest.

    Args:
        picture: drawn on in place.
        person: who.
        pose: how the person stands.
        place: where, and how the camera looks at it.
    """
    sketch = _Sketch(picture, place)
    legs, arms = _joints(person, pose)
    side = pose.view == "side"
    top, bottom = sketch.cloth(person.top_cloth), sketch.cloth(person.bottom_cloth)
    _draw_behind(sketch, person, pose.view)
    if side:
        _draw_arm(sketch, person, arms[0], top)
    _draw_legs(sketch, person, pose, legs, bottom)
    _draw_torso(sketch, person, pose.view, top)
    _draw_straps(sketch, person, pose.view)
    for arm in arms[side:]:
        _draw_arm(sketch, person, arm, top)
    _draw_bag(sketch, person, pose.view, arms[0][2])
    if person.scarf:
        sketch.add([_oval(0, 0.85, 0.068, 0.028)], person.scarf)
        if pose.view == "front":
            sketch.add([_box(0.01, 0.69, 0.05, 0.85)], person.scarf)
    _draw_head(sketch, person, pose.view)


def _joints(person: Person, pose: Pose) -> tuple[list[Polygon], list[Polygon]]:
    """Hip, knee and foot of both legs; shoulder, elbow and hand of both arms. In a side view the far one is first."""
    b, step = person.build, pose.step
    legs: list[Polygon] = []
    arms: list[Polygon] = []
    if pose.view == "side":
        for s in (-step, step):
            legs.append([(0, 0.48), (0.10 * s + 0.015, 0.265), (0.19 * s - 0.03 * abs(s), 0.03 + 0.02 * max(0, -s))])
            arms.append([(0, 0.79), (-0.08 * s - 0.01, 0.64), (-0.15 * s + 0.03, 0.49)])
        if pose.bent_arm:
            arms[1] = [(0, 0.79), (0.0, 0.63), (0.13, 0.69)]
        return legs, arms
    hip, elbow = 0.055 * b, 0.15 * b + 0.01
    lifts = (max(0.0, step) * 0.05, max(0.0, -step) * 0.05)  # of the left and the right foot; hands the other way round
    for s, foot, hand in zip((-1, 1), lifts, lifts[::-1], strict=True):
        legs.append([(s * hip, 0.48), (s * hip * 1.1, 0.265 + foot), (s * hip * (1.05 - 3 * foot), 0.03 + foot)])
        arms.append([(s * 0.118 * b, 0.79), (s * elbow, 0.64 + hand / 2), (s * (elbow - hand / 2), 0.485 + hand)])
    if pose.bent_arm:
        arms[1] = [(0.118 * b, 0.79), (0.175 * b, 0.645), (0.075, 0.735)]
    return legs, arms


def _draw_behind(sketch: _Sketch, person: Person, view: str) -> None:
    if person.hair == "long" and view != "back":
        right = 0.02 if view == "side" else 0.068
        sketch.add([_box(-0.068, 0.78, right, 0.93)], _darker(person.hair_colour, 0.85))
    if person.bag == "backpack" and view != "back":
        x, width = (-0.13 * person.build, 0.065) if view == "side" else (0.0, 0.105 * person.build)
        sketch.add([_oval(x, 0.68, width, 0.125)], person.bag_colour)


def _draw_arm(sketch: _Sketch, person: Person, arm: Polygon, cloth: Colour | Image.Image) -> None:
    b = person.build
    sketch.add(_limb(arm, (0.032 * b, 0.026 * b, 0.022)), person.skin)
    thick = b * (1.25 if person.top in ("coat", "jacket") else 1.1)
    shoulder, elbow, hand = arm
    if person.top == "shirt":
        sketch.add(_limb([shoulder, elbow], (0.038 * thick, 0.036 * thick)), cloth)
    else:
        cuff = (elbow[0] * 0.12 + hand[0] * 0.88, elbow[1] * 0.12 + hand[1] * 0.88)
        sketch.add(_limb([shoulder, elbow, cuff], (0.037 * thick, 0.033 * thick, 0.029 * thick)), cloth)


def _draw_legs(
    sketch: _Sketch, person: Person, pose: Pose, legs: Sequence[Polygon], cloth: Colour | Image.Image
) -> None:
    b, side = person.build, pose.view == "side"
    wide = 1.35 if person.bottom == "wide" else 1.0
    for hip, knee, (x, y) in legs:
        if person.bottom in ("trousers", "wide"):
            sketch.add(_limb([hip, knee, (x, y)], (0.052 * b, 0.036, 0.024)), cloth)
            sketch.add(_limb([hip, knee, (x, y + 0.02)], (0.06 * b, 0.044 * b * wide, 0.034 * wide * wide)), cloth)
        else:
            sketch.add(_limb([hip, knee, (x, y)], (0.052 * b, 0.036, 0.024)), person.skin)
        toe = 0.075 if side else math.copysign(0.012, x)
        sketch.add(_limb([(x, y - 0.012), (x + toe, y - 0.016)], (0.03, 0.022)), person.shoes)
        if person.bottom == "shorts":
            hem = (0.25 * hip[0] + 0.75 * knee[0], 0.25 * hip[1] + 0.75 * knee[1])
            sketch.add(_limb([hip, hem], (0.066 * b, 0.056 * b)), cloth)
    if person.bottom in ("skirt", "dress"):
        waist, hem_width = (0.088 * b, 0.155 * b) if side else (0.076 * b, 0.16 * b)
        swing = 0.04 * pose.step if side else 0.0
        sketch.add([[(-waist, 0.53), (waist, 0.53), (hem_width + swing, 0.255), (-hem_width + swing, 0.255)]], cloth)


_HEMS = {"shirt": (0.46, 0.098), "sweater": (0.44, 0.108), "jacket": (0.42, 0.118), "coat": (0.27, 0.142)}


def _draw_torso(sketch: _Sketch, person: Person, view: str, cloth: Colour | Image.Image) -> None:
    b = person.build
    hem, flare = (0.5, 0.085) if person.bottom == "dress" else _HEMS[person.top]
    if view == "side":
        neck, half = 0.028, [(0.03, 0.865), (0.075 * b, 0.79), (0.08 * b, 0.62), (0.8 * flare * b, hem)]
    else:
        neck = 0.026
        half = [(0.03, 0.865), (0.12 * b, 0.825), (0.128 * b, 0.77), (0.1 * b, 0.6), (flare * b, hem)]
    sketch.add([_box(-neck, 0.83, neck, 0.89)], person.skin)
    sketch.add([_mirrored(half)], cloth)
    if view == "front" and person.top in ("jacket", "coat"):
        sketch.add([_mirrored([(-0.03 * b, hem), (-0.022, 0.6), (-0.03, 0.862)])], person.inner)
    elif view == "front":
        sketch.add_flat([[(-0.028, 0.868), (0.028, 0.868), (0, 0.83)]], person.skin)


def _draw_straps(sketch: _Sketch, person: Person, view: str) -> None:
    b, strap = person.build, _darker(person.bag_colour, 0.8)
    if person.bag == "sling":
        sketch.add_flat([[(-0.085 * b, 0.835), (-0.055 * b, 0.845), (0.125 * b, 0.53), (0.095 * b, 0.53)]], strap)
        sketch.add([_box(0.06 * b, 0.44, 0.06 * b + 0.12, 0.545)], person.bag_colour)
    elif person.bag == "backpack" and view == "front":
        sketch.add_flat([_box(x * b - 0.014, 0.62, x * b + 0.014, 0.845) for x in (-0.07, 0.07)], strap)


def _draw_bag(sketch: _Sketch, person: Person, view: str, hand: tuple[float, float]) -> None:
    b, strap = person.build, _darker(person.bag_colour, 0.8)
    x, y = hand
    if person.bag == "backpack" and view == "back":
        sketch.add([_oval(0, 0.69, 0.1 * b, 0.135), _box(-0.1 * b, 0.56, 0.1 * b, 0.7)], person.bag_colour)
        sketch.add([_box(-0.065 * b, 0.59, 0.065 * b, 0.66)], strap)
    elif person.bag == "hand":
        sketch.add([_box(x - 0.055, y - 0.16, x + 0.055, y - 0.05)], person.bag_colour)
        sketch.add_flat(_limb([(x - 0.035, y - 0.06), (x, y), (x + 0.035, y - 0.06)], (0.007,) * 3), strap)
    elif person.bag == "suitcase":
        x -= 0.16 if view == "side" else 0.06
        sketch.add_flat(_limb([hand, (x, 0.27)], (0.01, 0.01)), (70, 70, 74))
        sketch.add([_box(x - 0.08, 0.02, x + 0.08, 0.29)], person.bag_colour)
        sketch.add_flat([_box(x - 0.05, 0.05, x - 0.035, 0.26), _box(x + 0.035, 0.05, x + 0.05, 0.26)], strap)


def _draw_head(sketch: _Sketch, person: Person, view: str) -> None:
    y = 0.925
    sketch.add([_oval(0, y, 0.06, 0.073)], person.skin)
    if view != "back":
        eyes = (0.038,) if view == "side" else (-0.024, 0.024)
        sketch.add_flat([_oval(x, y - 0.002, 0.008, 0.011) for x in eyes], (40, 30, 28))
    if person.hair != "bald":
        _draw_hair(sketch, person, view, y)
    crown = [(x, z) for x, z in _oval(0, y + 0.01, 0.07, 0.085) if z > y + 0.028]
    if person.hat != "none":
        sketch.add([crown], person.hat_colour)
    if person.hat == "cap" and view != "back":
        left, right = (0.02, 0.115) if view == "side" else (-0.055, 0.055)
        sketch.add([_box(left, y + 0.02, right, y + 0.038)], _darker(person.hat_colour, 0.7))
    elif person.hat == "beanie":
        sketch.add([_oval(0, 1.02, 0.022, 0.02)], person.hat_colour)
        sketch.add_flat([_box(-0.07, y + 0.022, 0.07, y + 0.05)], _darker(person.hat_colour, 0.75))
    elif person.hat == "brim":
        sketch.add([_oval(0, y + 0.034, 0.118, 0.016)], _darker(person.hat_colour, 0.8))


def _draw_hair(sketch: _Sketch, person: Person, view: str, y: float) -> None:
    colour = person.hair_colour
    if view == "back":
        sketch.add([_oval(0, y + 0.008, 0.066, 0.074)], colour)
        if person.hair in ("long", "bob"):
            sketch.add([_box(-0.068, 0.77 if person.hair == "long" else 0.86, 0.068, y)], colour)
    elif view == "side":
        sketch.add([[(x, z) for x, z in _oval(0, y + 0.01, 0.066, 0.076) if z > y + 0.012 or x < -0.02]], colour)
        if person.hair == "bob":
            sketch.add([_box(-0.07, 0.865, -0.005, y + 0.03)], colour)
    else:
        sketch.add([[(x, z) for x, z in _oval(0, y + 0.008, 0.066, 0.076) if z > y + 0.025]], colour)
        if person.hair == "bob":
            sketch.add([_box(x - 0.012, 0.865, x + 0.012, y + 0.03) for x in (-0.058, 0.058)], colour)
    if person.hair == "bun" and person.hat == "none":
        sketch.add([_oval(-0.05 if view == "side" else 0, 1.005, 0.034, 0.03)], colour)
