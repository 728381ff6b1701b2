"""The field's augmentation: one image at a time as it is read, or a batch at once on the device that trains.

Both do the same things in the same order: horizontal flip, zero padding and random crop, colour jitter, grey, random
erasing. They draw their random numbers differently, so a run keeps to one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from apd.config.values import DataConfig

_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601
_AREA = (0.02, 0.33)  # of an erased rectangle, as a share of the image (Zhong et al. 2020)
_LOG_RATIO = (math.log(0.3), math.log(3.3))  # of its height to its width
_TRIES = 10  # rectangles that are drawn until one fits, as in torchvision


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image; probabilities and strengths of 0 leave it as it is."""

    flip: float = 0.0  # probability of a horizontal flip
    pad: int = 0  # width of the zero padding, pixels
    erasing: float = 0.0  # probability that a rectangle is erased
    fill: Sequence[float] = (0.0, 0.0, 0.0)  # its colour in [0, 1]: the network's mean, so that it is 0 to the network
    jitter: float = 0.0  # probability of a colour jitter
    strengths: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # of brightness, contrast, saturation, hue
    grey: float = 0.0  # probability that the colours are taken away

    @staticmethod
    def of(config: DataConfig, fill: Sequence[float]) -> Augmentation:
        """As configured."""
        strengths = (config.jitter_brightness, config.jitter_contrast, config.jitter_saturation, config.jitter_hue)
        return Augmentation(config.flip, config.pad, config.erasing, tuple(fill), config.jitter, strengths, config.grey)


def as_floats(images: Tensor) -> Tensor:
    """From uint8 to float32 in [0, 1], any shape."""
    return v2.functional.to_dtype(images, torch.float32, scale=True)


# One image at a time


class ShiftedCrop:
    """Zero padding on all four sides and a random crop of the image's own size.

    Args:
        pad: width of the padding, pixels.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, image: Tensor) -> Tensor:
        top, left = torch.randint(-self.pad, self.pad + 1, (2,)).tolist()
        # What lies outside the image is zero: no padded copy is needed.
        return v2.functional.crop(image, top, left, *image.shape[-2:])


class RandomColours:
    """Colour jitter and grey, each with its probability."""

    def __init__(self, options: Augmentation) -> None:
        self.options = options

    def __call__(self, image: Tensor) -> Tensor:
        draws = torch.rand(6, dtype=torch.float64).numpy()
        if draws[0] < self.options.jitter:
            image = jittered(image[None], torch.from_numpy(_factors(draws[None, 1:5], self.options)))[0]
        if draws[5] < self.options.grey:
            image = luminance(image).expand_as(image)
        return image


def training_transform(options: Augmentation) -> Callable[[Tensor], Tensor]:
    """The augmentation of one image, its random numbers torch's.

    Returns:
        a function from uint8 (3, H, W) to float32 (3, H, W) in [0, 1].
    """
    colours = [RandomColours(options)] if options.jitter or options.grey else []
    # Two plain calls: v2.ToDtype takes 32 µs where its function takes 11 (128×64, one CPU core).
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(options.flip),
            ShiftedCrop(options.pad),
            as_floats,
            *colours,
            v2.RandomErasing(options.erasing, value=list(options.fill)),
        ]
    )


# A batch at once


def augment_batch(images: Tensor, draws: np.ndarray, options: Augmentation) -> Tensor:
    """The augmentation of a batch on the images' device; nothing waits for it, and no image is handled alone.

    Args:
        images: uint8 (B, 3, H, W).
        draws: uniform in [0, 1), float64 (B, `DRAWS`): row i decides what happens to image i, and to no other.
        options: what is done.

    Returns:
        float32 (B, 3, H, W) in [0, 1].
    """
    height, width = images.shape[-2:]
    flip, shift, jitter, factors, grey, erase, rectangle = np.split(draws, np.cumsum(_PARTS)[:-1], axis=1)
    moves = np.floor(shift * (2 * options.pad + 1)) - options.pad
    rectangles = np.where(erase < options.erasing, _rectangles(rectangle, height, width), 0)
    numbers = _on(np.concatenate([flip < options.flip, moves, rectangles], 1).astype(np.int32), images.device)
    flipped, top, left, *bounds = numbers[:, :, None].unbind(1)

    rows, columns = (torch.arange(n, dtype=torch.int32, device=images.device) for n in (height, width))
    source_rows, source_columns = rows + top, columns + left  # (B, H), (B, W), before the flip
    inside = _within(source_rows, 0, height)[:, :, None] & _within(source_columns, 0, width)[:, None]
    source_columns = torch.where(flipped > 0, width - 1 - source_columns, source_columns)
    pixels = source_rows.clamp(0, height - 1)[:, :, None] * width + source_columns.clamp(0, width - 1)[:, None]
    index = pixels.flatten(1)[:, None].expand(-1, 3, -1).long()
    moved = as_floats(images.flatten(2).gather(2, index).unflatten(2, (height, width)) * inside[:, None])

    if (chosen := np.flatnonzero(jitter < options.jitter)).size:
        here = _on(chosen, images.device)
        moved[here] = jittered(moved[here], _on(_factors(factors[chosen], options), images.device))
    if (chosen := np.flatnonzero(grey < options.grey)).size:
        here = _on(chosen, images.device)
        moved[here] = luminance(moved[here]).expand(-1, 3, -1, -1)
    if not options.erasing:
        return moved
    first_row, first_column, tall, wide = bounds
    erased = _within(rows, first_row, tall)[:, :, None] & _within(columns, first_column, wide)[:, None]
    return torch.where(erased[:, None], moved.new_tensor(options.fill)[:, None, None], moved)


_PARTS = (1, 2, 1, 4, 1, 1, 2 * _TRIES + 2)  # flip, shift, jitter, its factors, grey, erasing, its rectangles and place
DRAWS = sum(_PARTS)  # random numbers of an image in `augment_batch`


def _within(places: Tensor, start: Tensor | int, size: Tensor | int) -> Tensor:
    return (places >= start) & (places < start + size)


def _rectangles(draws: np.ndarray, height: int, width: int) -> np.ndarray:
    """Top, left, height and width (B, 4) of the first rectangle that fits; height and width 0 where none does."""
    share, ratio, place = np.split(draws, [_TRIES, 2 * _TRIES], axis=1)
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * share) * height * width
    ratio = np.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * ratio)
    sizes = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 2).round()  # (B, tries, 2)
    fits = (sizes < (height, width)).all(2)
    found = sizes[np.arange(len(draws)), fits.argmax(1)] * fits.max(1, keepdims=True)
    return np.concatenate([np.floor(place * ((height, width) - found + 1)), found], 1)


def _on(array: np.ndarray, device: torch.device) -> Tensor:
    """A small array on the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# Colours


def luminance(images: Tensor) -> Tensor:
    """Grey (…, 1, H, W) of images (…, 3, H, W)."""
    red, green, blue = images.unbind(-3)
    return (_LUMINANCE[0] * red + _LUMINANCE[1] * green + _LUMINANCE[2] * blue).unsqueeze(-3)


def _factors(draws: np.ndarray, options: Augmentation) -> np.ndarray:
    """What `jittered` takes, float32 (B, 4), of numbers (B, 4) in [0, 1)."""
    return (np.array([1, 1, 1, 0]) + (2 * draws - 1) * np.array(options.strengths)).astype(np.float32)


def jittered(images: Tensor, factors: Tensor) -> Tensor:
    """Images with other colours.

    Args:
        images: (B, 3, H, W) in [0, 1].
        factors: (B, 4): of brightness, of contrast around the mean luminance, of saturation around the luminance; shift
            of the hue, in turns of the colour wheel.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    brightness, contrast, saturation, hue = factors[:, :, None, None, None].unbind(1)
    images = (images * brightness).clamp(0, 1)
    mean = luminance(images).mean((-2, -1), keepdim=True)
    images = (mean + contrast * (images - mean)).clamp(0, 1)
    grey = luminance(images)
    images = (grey + saturation * (images - grey)).clamp(0, 1)
    return _turned(images, hue)


def _turned(images: Tensor, shift: Tensor) -> Tensor:
    """The hue of HSV moved, its value and chroma kept."""
    value, largest = images.max(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    scale = 1 / chroma.clamp(min=1e-12)  # grey pixels have no hue: chroma 0 keeps them
    sixths = torch.where(largest == 0, green - blue, torch.where(largest == 1, blue - red, red - green)) * scale
    sixths = sixths + 2 * largest + 6 * shift
    # A channel falls from the value by the chroma where the hue is far from its own: red 0, green 2, blue 4 sixths.
    away = (sixths + sixths.new_tensor([5.0, 3.0, 1.0])[:, None, None]) % 6
    return value - chroma * torch.minimum(away, 4 - away).clamp(0, 1)
