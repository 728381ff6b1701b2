"""Hard images keep their content: the bound, the control, and when they join; and a training that collapses says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")

from apd.data.sampler import PKSampler, WithCounterparts
from apd.models.trunk import Trunk, TrunkFeatures
from apd.training.synthesis import HardImages, noisy


class Pixels(Trunk):
    """φ is the image itself, so that the change of φ can be read off the pixels."""

    def __init__(self) -> None:
        super().__init__("pixels")

    def forward(self, images: Tensor) -> TrunkFeatures:
        return TrunkFeatures(images, images.mean((2, 3)))


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 3, 16, 8, generator=torch.Generator().manual_seed(0))


def change_of(made: Tensor) -> Tensor:
    return (made - images(len(made))).abs().flatten(1).mean(1)


class Darker(nn.Module):
    """Each image by another factor."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(1, 0, len(x)).view(-1, 1, 1, 1)


@pytest.mark.parametrize("limit", [0.05, 0.2, 10.0])
def test_no_image_changes_more_than_the_limit(limit: float) -> None:
    free, held = change_of(Darker()(images())), change_of(HardImages(Darker(), Pixels(), limit)(images()))
    assert (held <= limit).all()
    assert torch.equal(held[free <= limit], free[free <= limit])  # these are left as they are
    far = free > limit
    assert (held[far] > limit - free[far] / 64 - 1e-6).all()  # and these reach as far as they may, in 64 steps


def test_without_a_limit_nothing_is_held_back() -> None:
    assert torch.equal(HardImages(Darker(), None, None)(images()), Darker()(images()))


def test_noise_is_that_of_the_image() -> None:
    """So that neither the other images of a batch nor a second call change it."""
    whole = noisy(images())
    assert torch.equal(whole[2:3], noisy(images()[2:3]))
    assert not torch.equal(whole[0] - images()[0], whole[1] - images()[1])
    assert (change_of(HardImages(noisy, Pixels(), 0.1)(images())) <= 0.1).all()


def test_counterparts_join_late_and_originals_keep_their_order() -> None:
    labels = np.repeat(np.arange(8), 6)
    order = PKSampler(labels, 8, 2, seed=3)
    mixed = WithCounterparts(order, len(labels), first=5, probability=0.5, seed=3)
    plain, found = order.batches(0), mixed.batches(0)
    replaced = 0
    for step in range(40):
        one, other = np.array(next(plain)), np.array(next(found))
        assert (other % len(labels) == one).all()
        assert step >= 5 or (other == one).all()
        replaced += int((other >= len(labels)).sum())
    assert 90 < replaced < 190  # of 35 steps of 8
    again = WithCounterparts(order, len(labels), first=5, probability=0.5, seed=3).batches(17)
    late = mixed.batches(0)
    for _ in range(17):
        next(late)
    assert next(again) == next(late)
