"""Augmentation, one image at a time and by batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

pytest.importorskip("torchvision")

from apd.data.augmentation import DRAWS, Augmentation, ShiftedCrop, augment_batch, jittered, training_transform


def _image(height: int = 32, width: int = 16) -> Tensor:
    return torch.randint(1, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether `found` is uint8 `expected`, scaled to [0, 1] in float32."""
    return found.dtype == torch.float32 and torch.allclose(found, expected / 255, rtol=0, atol=1e-6)


def test_nothing_to_do() -> None:
    image = _image()
    assert _same(training_transform(Augmentation(0.0, 0, 0.0, (0.5, 0.5, 0.5)))(image), image)


def test_flip() -> None:
    image = _image()
    always, never, half = (training_transform(Augmentation(p, 0, 0.0, (0, 0, 0))) for p in (1.0, 0.0, 0.5))
    assert _same(always(image), image.flip(2))
    torch.manual_seed(0)
    flipped = sum(_same(half(image), image.flip(2)) for _ in range(200))
    assert 60 < flipped < 140
    assert _same(never(image), image)


def test_pad_and_crop() -> None:
    """Each of the (2 pad + 1)² places in the padded image is found, and nothing else."""
    image, pad = _image(), 2
    padded = torch.nn.functional.pad(image, (pad,) * 4)
    places = {
        padded[:, top : top + 32, left : left + 16].numpy().tobytes()
        for top in range(2 * pad + 1)
        for left in range(2 * pad + 1)
    }
    torch.manual_seed(0)
    found = {ShiftedCrop(pad)(image).numpy().tobytes() for _ in range(400)}
    assert found == places


def test_erasing() -> None:
    image, fill = _image(), (0.25, 0.5, 0.75)
    transform = training_transform(Augmentation(0.0, 0, 1.0, fill))
    torch.manual_seed(0)
    shares = []
    for _ in range(200):
        found = transform(image)
        erased = (found == torch.tensor(fill)[:, None, None]).all(0)
        rows, columns = torch.where(erased)
        assert _same(found[:, ~erased], image[:, ~erased])
        assert len(rows) == len(rows.unique()) * len(columns.unique())  # a rectangle
        shares.append(erased.float().mean().item())
    assert min(shares) < 0.05 < 0.25 < max(shares) < 0.35
    half = training_transform(Augmentation(0.0, 0, 0.5, fill))
    untouched = sum(_same(half(image), image) for _ in range(200))
    assert 60 < untouched < 140


def test_colours_of_one_image() -> None:
    """Jitter and grey with their probabilities, and nothing else."""
    image = _image()
    torch.manual_seed(0)
    grey = training_transform(Augmentation(grey=0.5))
    found = [grey(image) for _ in range(200)]
    without = [bool((x[0] == x[1]).all() and (x[1] == x[2]).all()) for x in found]
    assert 60 < sum(without) < 140
    assert all(_same(x, image) for x, is_grey in zip(found, without, strict=True) if not is_grey)
    jitter = training_transform(Augmentation(jitter=0.5, strengths=(0.2, 0.2, 0.2, 0.1)))
    found = [jitter(image) for _ in range(200)]
    assert 60 < sum(_same(x, image) for x in found) < 140
    assert len({x.numpy().tobytes() for x in found}) > 60


@pytest.mark.parametrize(
    ("place", "factor", "function"),
    [
        (0, 1.3, v2.functional.adjust_brightness),
        (0, 0.6, v2.functional.adjust_brightness),
        (1, 1.4, v2.functional.adjust_contrast),
        (1, 0.0, v2.functional.adjust_contrast),
        (2, 1.5, v2.functional.adjust_saturation),
        (2, 0.2, v2.functional.adjust_saturation),
        (3, 0.1, v2.functional.adjust_hue),
        (3, -0.5, v2.functional.adjust_hue),
    ],
)
def test_jitter_is_torchvisions(place: int, factor: float, function: object) -> None:
    """Colours at random, and grey, black, white and pure ones."""
    images = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    images[1, :, 0] = torch.eye(3).repeat(1, 3)[:, :7]
    images[1, :, 1], images[1, :, 2], images[1, :, 3] = 0.3, 0.0, 1.0
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(2, 1)
    assert torch.allclose(jittered(images, factors), images, atol=1e-6)
    factors[:, place] = factor
    assert callable(function)
    expected = torch.stack([function(image, factor) for image in images])
    # torchvision's luminance has weights of four digits, and its contrast 0.2989 + 0.587 + 0.114 = 0.9999
    torch.testing.assert_close(jittered(images, factors), expected, rtol=0, atol=2e-4)


# By batches

EVERYTHING = Augmentation(0.5, 3, 0.5, (0.25, 0.5, 0.75), 0.5, (0.2, 0.2, 0.2, 0.1), 0.3)


def _batch(size: int = 40) -> tuple[Tensor, np.ndarray]:
    images = torch.randint(1, 256, (size, 3, 32, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images, np.random.default_rng(0).random((size, DRAWS))


def test_an_image_of_a_batch_depends_on_its_own_numbers() -> None:
    images, draws = _batch()
    whole = augment_batch(images, draws, EVERYTHING)
    assert whole.dtype == torch.float32
    assert whole.is_contiguous()
    for i in range(len(images)):
        alone = augment_batch(images[i : i + 1], draws[i : i + 1], EVERYTHING)
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-6)
    assert torch.equal(augment_batch(images, draws, EVERYTHING), whole)


def test_batch_of_nothing_to_do() -> None:
    images, draws = _batch()
    assert _same(augment_batch(images, draws, Augmentation()), images)


def test_flips_of_a_batch() -> None:
    images, draws = _batch(200)
    found = augment_batch(images, draws, Augmentation(flip=0.5))
    flipped = [_same(x, image.flip(2)) for x, image in zip(found, images, strict=True)]
    assert 60 < sum(flipped) < 140
    assert all(flip or _same(x, image) for flip, x, image in zip(flipped, found, images, strict=True))
    assert _same(augment_batch(images, draws, Augmentation(flip=1.0)), images.flip(3))


def test_crops_of_a_batch() -> None:
    """Each of the (2 pad + 1)² places in the padded image is found, and nothing else; with flips, those of the image
    that is flipped first."""
    image, pad, draws = _image(), 2, np.random.default_rng(0).random((400, DRAWS))
    for flip in (0.0, 1.0):
        padded = torch.nn.functional.pad(image.flip(2) if flip else image, (pad,) * 4)
        places = {
            padded[:, top : top + 32, left : left + 16].numpy().tobytes()
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
        }
        found = augment_batch(image.expand(400, -1, -1, -1), draws, Augmentation(flip=flip, pad=pad))
        assert {x.numpy().tobytes() for x in (found * 255).round().to(torch.uint8)} == places


def test_erasing_of_a_batch() -> None:
    """Rectangles of the sizes and places that torchvision draws."""
    image, fill = _image(), (0.25, 0.5, 0.75)
    draws = np.random.default_rng(0).random((2000, DRAWS))
    images = image.expand(2000, -1, -1, -1)
    erased = (
        augment_batch(images, draws, Augmentation(erasing=1.0, fill=fill)) == torch.tensor(fill)[:, None, None]
    ).all(1)
    torch.manual_seed(0)
    theirs = [v2.RandomErasing.make_params(v2.RandomErasing(1.0), [image]) for _ in range(2000)]
    rows, columns = erased.any(2), erased.any(1)
    assert torch.equal(erased, rows[:, :, None] & columns[:, None])  # a rectangle
    ours = torch.stack([rows.sum(1), columns.sum(1), rows.int().argmax(1), columns.int().argmax(1)], 1).float()
    expected = torch.tensor([[row["h"], row["w"], row["i"], row["j"]] for row in theirs]).float()
    for ours_, theirs_ in zip(ours.T, expected.T, strict=True):
        # two samples of 2000: the means differ by five of their standard errors at most
        assert abs(ours_.mean() - theirs_.mean()) < 5 * theirs_.std() * (2 / 2000) ** 0.5
        assert abs(ours_.std() / theirs_.std() - 1) < 0.1
    half = augment_batch(images, draws, Augmentation(erasing=0.5, fill=fill))
    assert 850 < sum(_same(x, image) for x in half) < 1150


def test_no_rectangle_fits() -> None:
    """In an image of one pixel's width."""
    image = _image(8, 1)[None]
    draws = np.random.default_rng(0).random((1, DRAWS))
    assert _same(augment_batch(image, draws, Augmentation(erasing=1.0)), image)


def test_colours_of_a_batch() -> None:
    images, draws = _batch(200)
    strengths = (0.2, 0.2, 0.2, 0.1)
    found = augment_batch(images, draws, Augmentation(jitter=0.5, strengths=strengths))
    untouched = torch.tensor([_same(x, image) for x, image in zip(found, images, strict=True)])
    assert 60 < untouched.sum() < 140
    change = (found.mean((1, 2, 3)) / images.float().mean((1, 2, 3)) * 255)[~untouched]
    assert change.min() > 0.7
    assert change.max() < 1.3
    assert change.std() > 0.05  # each has its own factors
    grey = augment_batch(images, draws, Augmentation(grey=0.3))
    without = (grey == grey[:, :1]).all(3).all(2).all(1)
    assert 35 < without.sum() < 85
    assert _same(grey[~without], images[~without])
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close(grey[without][:, 0], (images[without] / 255 * weights).sum(1))


@pytest.mark.gpu
def test_batch_on_a_gpu() -> None:
    """As on the CPU, up to rounding, and without waiting for the device."""
    images, draws = _batch()
    expected = augment_batch(images, draws, EVERYTHING)
    on_gpu = images.cuda()
    augment_batch(on_gpu, draws, EVERYTHING)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = augment_batch(on_gpu, draws, EVERYTHING)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-5)
