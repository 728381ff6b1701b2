"""What stage 1 is watched by, against formulas and counts written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

pytest.importorskip("timm")

from apd.data.images import ImageStore, load_image
from apd.models.trunk import Trunk, TrunkFeatures
from apd.training.monitors import camera_distance, camera_pairs, flipped_share, sample_grid, sample_images
from apd.training.sources import Sources

SIZE = (16, 8)


class Halves(Trunk):
    """φ is the image at half the size."""

    def __init__(self) -> None:
        super().__init__("halves")
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> TrunkFeatures:
        self.seen.append(len(images))
        return TrunkFeatures(avg_pool2d(images, 2), images.flatten(1))


def sources(folder: Path, labels: list[int], cameras: list[int]) -> Sources:
    random = np.random.default_rng(0)
    paths = []
    for i in range(len(labels)):
        paths.append(folder / f"{i}.png")
        Image.fromarray(random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(paths[-1])
    n = len(labels)
    return Sources(tuple(paths), np.array(labels), np.zeros(n, np.int64), np.array(cameras), max(labels) + 1, n)


def store_of(made: Sources) -> ImageStore:
    return ImageStore(made.paths, SIZE, cache=False)


def distance_between_cameras(trunk: Trunk, made: Sources, **options: Any) -> float | None:
    return camera_distance(trunk, store_of(made), made.labels, made.cameras, device=torch.device("cpu"), **options)


def test_flipped_share() -> None:
    bank = torch.tensor([[0.0], [1.0], [5.0], [6.0], [20.0]])
    labels = torch.tensor([0, 0, 1, 1, 2])  # the last has nobody of its identity and does not count
    batch = torch.tensor([0, 2, 4])
    assert flipped_share(bank[batch], batch, bank, labels) == 0
    # Image 0 moved nearest to image 2: another identity. Image 2 stays.
    assert flipped_share(torch.tensor([[4.0], [5.0], [20.0]]), batch, bank, labels) == 0.5


def test_pairs_are_of_one_person_and_two_cameras(tmp_path: Path) -> None:
    made = sources(tmp_path, [0, 0, 0, 1, 1, 2, 3, 3], [1, 1, 2, 1, 1, 2, 2, 3])
    pairs = camera_pairs(made.labels, made.cameras, 100, seed=0)
    assert sorted(pairs[:, 0]) == [0, 1, 2, 6, 7]  # every image with such a partner; 1 has one camera, 2 one image
    assert (made.labels[pairs[:, 0]] == made.labels[pairs[:, 1]]).all()
    assert (made.cameras[pairs[:, 0]] != made.cameras[pairs[:, 1]]).all()
    assert (camera_pairs(made.labels, made.cameras, 100, seed=0) == pairs).all()
    assert len(camera_pairs(made.labels, made.cameras, 2, seed=0)) == 2


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_distance_is_the_mean_of_equation_4(tmp_path: Path, batch_size: int) -> None:
    made, trunk = sources(tmp_path, [0, 0, 1, 1, 1, 2], [1, 2, 1, 2, 3, 1]), Halves()
    found = distance_between_cameras(trunk, made, batch_size=batch_size, seed=3)

    def shallow(i: int) -> np.ndarray:
        pixels = load_image(made.paths[i], None).astype(np.float64) / 255
        return pixels.reshape(8, 2, 4, 2, 3).mean((1, 3))

    pairs = camera_pairs(made.labels, made.cameras, None, seed=3)
    assert len(pairs) == 5
    assert found == pytest.approx(np.mean([np.abs(shallow(i) - shallow(j)).mean() for i, j in pairs]), rel=1e-5)
    assert max(trunk.seen) <= max(2, batch_size)  # one batch is in memory


def test_no_distance_with_one_camera(tmp_path: Path) -> None:
    made = sources(tmp_path, [0, 0, 1, 1], [1, 1, 2, 2])
    assert distance_between_cameras(Halves(), made, batch_size=4, seed=0) is None


def test_reference_takes_a_bounded_number_of_pairs(tmp_path: Path) -> None:
    """Of more images than are drawn, as many pairs are taken; without a bound one of every image."""
    made = sources(tmp_path, [i // 2 for i in range(600)], [1, 2] * 300)
    trunk = Halves()
    distance_between_cameras(trunk, made, most=256, batch_size=64, seed=0)
    assert sum(trunk.seen) == 512
    distance_between_cameras(trunk, made, batch_size=64, seed=0)
    assert sum(trunk.seen) == 512 + 1200


def test_picture_has_originals_above_what_is_made_of_them(tmp_path: Path) -> None:
    made = sources(tmp_path, list(range(20)), [1] * 20)
    originals = sample_images(store_of(made))
    assert originals.shape == (8, 3, *SIZE)
    for image, path in ((originals[0], made.paths[0]), (originals[-1], made.paths[-1])):
        pixels = load_image(path, None)
        assert torch.equal((255 * image).round(), torch.from_numpy(pixels).permute(2, 0, 1).float())

    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1 - x

    picture = sample_grid(Inverse(), originals)
    assert picture.shape == (3, 2 * 16, 8 * 8)
    for i in range(8):
        column = picture[:, :, 8 * i : 8 * (i + 1)]
        assert torch.equal(column[:, :16], originals[i])
        assert torch.equal(column[:, 16:], 1 - originals[i])
    few = sources(tmp_path, [0, 1, 2], [1, 1, 1])
    assert len(sample_images(store_of(few))) == 3
