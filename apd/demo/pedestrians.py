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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

from apd.demo.pedestrian_backgrounds import background
from apd.demo.pedestrian_figures import Cloth, Colour, Person, Placement, Pose, draw_figure
from apd.errors import InputError

SUPERSAMPLING = 4  # drawn at 4 times the size and averaged down: clean edges


@dataclass(frozen=True)
class Camera:
    """Where a camera stands, what is behind the people, and what it does to colours."""

    background: str  # a name of pedestrian_backgrounds.BACKGROUNDS
    haze: str  # colour of the air in front of it
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
    tops: tuple[str, ...]  # these and the following: as in pedestrian_figures.Person
    bottoms: tuple[str, ...]
    patterns: tuple[str, ...]
    hats: tuple[str, ...]
    bags: tuple[str, ...]
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
                haze="#96b489",
                views=("front", "front", "front", "side"),
                horizon=0.62,
                scale=0.91,
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
                haze="#ae9287",
                views=("front", "front", "back", "side"),
                horizon=0.74,
                scale=0.87,
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
                haze="#9daabd",
                views=("front", "front", "front", "side"),
                horizon=0.7,
                scale=0.89,
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
                haze="#ada494",
                views=("front", "front", "back", "side"),
                horizon=0.42,
                scale=0.85,
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
                haze="#d1b4bc",
                views=("front", "front", "front", "side"),
                horizon=0.68,
                scale=0.90,
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
                haze="#acbcb3",
                views=("front", "front", "back", "side"),
                horizon=0.3,
                scale=0.85,
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
                haze="#c6b488",
                views=("front", "front", "front", "side"),
                horizon=0.72,
                scale=0.88,
                pitch=0.04,
                lean=0.01,
                light=0.5,
                gains=(1.03, 1.00, 0.95),
                gamma=1.02,
                contrast=0.98,
                saturation=0.97,
                exposure=0.04,
                blur=0.35,
                noise=0.006,
            ),
            Camera(
                background="platform",
                haze="#98b0be",
                views=("front", "front", "back", "side"),
                horizon=0.55,
                scale=0.90,
                pitch=0.07,
                lean=-0.01,
                light=-0.7,
                gains=(0.96, 1.01, 1.02),
                gamma=0.98,
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


def _person(domain: Domain, seed: int, pid: int) -> Person:
    draw = random.Random(f"{seed} {domain.name} {pid}")

    def colour(names: Sequence[str]) -> Colour:
        red, green, blue = ImageColor.getrgb(draw.choice(names))[:3]
        return red, green, blue

    def cloth() -> Cloth:
        first, second = draw.sample(domain.colours, 2)
        return Cloth(colour([first]), colour([second]), draw.choice(domain.patterns))

    top_cloth, bottom_cloth, bottom = cloth(), cloth(), draw.choice(domain.bottoms)
    if bottom != "skirt":  # loud trousers are rare
        bottom_cloth = Cloth(bottom_cloth.colour, bottom_cloth.second, draw.choice(("plain", "plain", "seam")))
    top = draw.choice(domain.tops)
    if bottom == "dress":
        bottom_cloth = top_cloth
        top = draw.choice(("shirt", "sweater"))
    return Person(
        height=draw.uniform(0.92, 1.02),
        build=draw.uniform(0.9, 1.18),
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
    strip = background(camera.background, camera.haze, camera.horizon, height, seed)
    left = draw.randrange(strip.width - width)
    picture = strip.crop((left, 0, left + width, height))

    middle = width / 2 + width * (draw.uniform(-0.05, 0.05) - camera.lean)
    ground = height * (0.955 + draw.uniform(-0.025, 0.02))
    unit = height * camera.scale * person.height * draw.uniform(0.96, 1.03)
    view, mirror = draw.choice(camera.views), draw.random() < 0.5
    step = domain.stride * math.sin(draw.uniform(0, math.tau))
    pose = Pose(view, step, draw.random() < domain.bent_arm)
    place = Placement(middle, ground, unit, mirror, camera.pitch, camera.lean, camera.light)
    _cast_shadow(picture, place)
    draw_figure(picture, person, pose, place)

    picture = picture.filter(ImageFilter.BoxBlur(1.7 * camera.blur * height / 64))
    return _exposed(np.asarray(picture.reduce(SUPERSAMPLING)), camera, draw)


def _cast_shadow(picture: Image.Image, place: Placement) -> None:
    middle, ground, unit = place.middle, place.ground, place.unit
    mask = Image.new("L", picture.size)
    pen = ImageDraw.Draw(mask)
    pen.ellipse((middle - 0.17 * unit, ground - 0.035 * unit, middle + 0.17 * unit, ground + 0.025 * unit), fill=130)
    x0, x1 = sorted((middle, middle - 0.44 * unit * place.light))  # away from the light
    pen.ellipse((x0 - 0.05 * unit, ground - 0.05 * unit, x1 + 0.05 * unit, ground + 0.015 * unit), fill=110)
    picture.paste((25, 25, 35), mask=mask.filter(ImageFilter.BoxBlur(0.012 * unit)))


def _exposed(pixels: np.ndarray, camera: Camera, draw: random.Random) -> np.ndarray:
    """What the camera makes of the light: exposure, cast, contrast, light falling off to one side, noise."""
    noise = np.random.default_rng(draw.getrandbits(64)).standard_normal(pixels.shape)
    x = (pixels / 255.0) ** camera.gamma
    grey = x.mean(2, keepdims=True)
    x = grey + camera.saturation * (x - grey)
    x = 0.5 + camera.contrast * (x - 0.5)
    brightness = math.exp(draw.gauss(0, camera.exposure))
    cast = np.array([gain * math.exp(draw.gauss(0, camera.exposure / 3)) for gain in camera.gains])
    slope = 1 + 0.15 * camera.light * np.linspace(-1, 1, pixels.shape[1])[None, :, None]
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
