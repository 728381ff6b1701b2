"""Gradients of the model's losses against finite differences in float64; what is frozen, drawn or exchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.functional import softplus

pytest.importorskip("timm")

from apd.config.values import Config, LatentConfig, LossConfig, MPGConfig
from apd.data.images import ImageStore
from apd.models.mpgnet import Discriminator, Generator, discriminator_loss, generator_losses
from apd.models.spnet import Branch, Branches, Heads
from apd.models.trunk import Trunk, TrunkFeatures
from apd.training import mpg
from apd.training.log import read_metrics
from apd.training.losses import latent_loss, randomly_moved, spnet_losses
from apd.training.monitors import camera_distance
from apd.training.sources import Sources
from apd_kernels import identity_derangement, metric_perturb

LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("name", ["loss", "loss_k", "loss_nk", "loss_kp"])
@pytest.mark.parametrize("config", [LossConfig(), LossConfig(triplets="own", margin=0.5, label_smoothing=0.1)])
def test_gradients_of_spnet_losses(name: str, config: LossConfig) -> None:
    def loss(*parts: Tensor) -> Tensor:
        branches = [Branch(parts[2 * i], parts[2 * i + 1]) for i in range(3)]
        made = Branches(*branches, torch.tensor([True] * 5 + [False]))
        return spnet_losses(made, LABELS, config, 0.7)[name]

    inputs = [doubles(6, 4 if i % 2 == 0 else 3, seed=i) for i in range(6)]
    assert gradcheck(loss, inputs, atol=1e-7, rtol=1e-5)


def finite_difference(loss: Callable[[], Tensor], parameter: Tensor, step: float = 1e-6) -> Tensor:
    """The central difference along every entry of a small parameter."""
    found = torch.zeros_like(parameter)
    with torch.no_grad():
        for place in np.ndindex(*parameter.shape):
            value = parameter[place].clone()
            parameter[place] = value + step
            above = loss()
            parameter[place] = value - step
            found[place] = (above - loss()) / (2 * step)
            parameter[place] = value
    return found


class SmoothTrunk(Trunk):
    def __init__(self) -> None:
        super().__init__("smooth")
        self.shallow = nn.Conv2d(3, 2, 3, stride=2, dtype=torch.float64)
        self.deep = nn.Linear(3 * 16 * 16, 4, dtype=torch.float64)
        self.freeze()

    def forward(self, images: Tensor) -> TrunkFeatures:
        return TrunkFeatures(self.shallow(images), self.deep(images.flatten(1)))


def test_gradients_of_equations_1_to_5() -> None:
    torch.manual_seed(0)
    generator, discriminator, trunk = Generator(2, 1).double(), Discriminator(2, 1).double().eval(), SmoothTrunk()
    nn.init.normal_(generator.change.weight, std=0.3)
    nn.init.normal_(generator.change.bias, std=0.3)
    images, bank = torch.rand(2, 3, 16, 16, dtype=torch.float64), doubles(5, 4).detach()
    negatives = torch.tensor([[0, 1], [3, 2]])

    def losses() -> Any:
        original = TrunkFeatures(*(part.detach() for part in trunk(images)))
        return generator_losses(generator, discriminator, trunk, images, original, bank, negatives, MPGConfig())[0]

    bias = generator.change.bias
    assert bias is not None
    for name in ("adversarial", "metric", "content", "consistency", "total"):
        (gradient,) = torch.autograd.grad(getattr(losses(), name), bias)
        expected = finite_difference(lambda name=name: getattr(losses(), name), bias.data)  # type: ignore[misc]
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    assert all(parameter.grad is None for parameter in trunk.parameters())

    made, others = images.flip(0), torch.rand(4, 3, 16, 16, dtype=torch.float64)
    weight = discriminator.last.bias
    assert weight is not None
    (gradient,) = torch.autograd.grad(discriminator_loss(discriminator, made, others), weight)
    expected = finite_difference(lambda: discriminator_loss(discriminator, made, others), weight.data)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("direction", ["adversarial", "random"])
def test_latent_loss_is_that_of_moved_features(direction: str) -> None:
    """Triplets mined among the moved features, cross-entropy through the heads with the batch's own statistics."""
    torch.manual_seed(0)
    heads, features = Heads(4, 3, 1).double().train(), doubles(6, 4)
    nn.init.normal_(heads.classifier.weight)
    config = LatentConfig(direction=direction, epsilon=0.2, steps=3)
    torch.manual_seed(5)
    found = latent_loss(features, LABELS, heads, LossConfig(), config)
    torch.manual_seed(5)
    if direction == "random":
        moved = randomly_moved(features, 0.2)
    else:
        moved = metric_perturb(features, LABELS, epsilon=0.2, epsilon_mode="relative", steps=3)
    assert ((moved - features).norm(dim=1) <= 0.2 * features.norm(dim=1) * (1 + 1e-6)).all()
    distances = (moved[:, None] - moved[None]).norm(dim=2)
    terms = []
    for a in range(6):
        same = LABELS.eq(LABELS[a])
        positive = max(distances[a, j] for j in range(6) if same[j] and j != a)
        negative = min(distances[a, j] for j in range(6) if not same[j])
        terms.append(softplus(positive - negative))
    normed = (moved - moved.mean(0)) / (moved.var(0, unbiased=False) + 1e-5).sqrt()
    logits = (normed * heads.norms[0].weight) @ heads.classifier.weight.T
    cross = (logits.logsumexp(1) - logits[torch.arange(6), LABELS]).mean()
    torch.testing.assert_close(found, torch.stack(terms).mean() + cross, rtol=1e-6, atol=1e-8)


def test_random_direction_has_the_whole_radius_and_no_aim() -> None:
    torch.manual_seed(0)
    features = 7 * torch.randn(4000, 8)
    change = randomly_moved(features, 0.3) - features
    torch.testing.assert_close(change.norm(dim=1), 0.3 * features.norm(dim=1), rtol=1e-4, atol=1e-4)
    unit = change / change.norm(dim=1, keepdim=True)
    assert unit.mean(0).abs().max() < 5 / (4000 * 8) ** 0.5  # uniform on the sphere: each mean is 0 ± 1 / √(N D)
    torch.testing.assert_close(unit.T @ unit / 4000, torch.eye(8) / 8, rtol=0, atol=0.02)
    half = features[:8].half().requires_grad_()
    moved = randomly_moved(half, 0.3)
    moved.sum().backward()
    assert moved.dtype == torch.float16
    assert half.grad is not None
    assert (half.grad == 1).all()
    torch.testing.assert_close(randomly_moved(features, 0.0), features)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 3, 3, 3], [0, 0, 0, 0, 1]])
def test_exchanged_parts_are_of_other_identities(labels: list[int]) -> None:
    """Also where an identity fills half of the batch, or more: then those without a partner are not exchanged."""
    y = torch.tensor(labels)
    for seed in range(20):
        torch.manual_seed(seed)
        permutation, valid = identity_derangement(y, return_valid=True, check=False)
        assert (y[permutation][valid] != y[valid]).all()
        assert sorted(permutation.tolist()) == list(range(len(y)))
        assert int(valid.sum()) == min(len(y), 2 * int((y != y.mode().values).sum()))


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    """Two domains of 4 identities, 2 cameras and 2 images each."""
    random = np.random.default_rng(0)
    paths, labels, domains, cameras = [], [], [], []
    for label in range(8):
        for camera in (1, 2):
            for frame in range(2):
                paths.append(tmp_path / f"{label}_{camera}_{frame}.png")
                Image.fromarray(random.integers(0, 256, (32, 16, 3), dtype=np.uint8)).save(paths[-1])
                labels.append(label)
                domains.append(label // 4)
                cameras.append(camera)
    return Sources(tuple(paths), np.array(labels), np.array(domains), np.array(cameras), 8, 32)


class SmallTrunk(Trunk):
    def __init__(self) -> None:
        super().__init__("small")
        self.convolution = nn.Conv2d(3, 4, 8, stride=8)
        self.freeze()

    def forward(self, images: Tensor) -> TrunkFeatures:
        shallow = self.convolution(images)
        return TrunkFeatures(shallow, shallow.mean((2, 3)))


def test_stage_1(tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    """The discriminator's real images are the negatives of eq. 3; the trunk stays; the monitors are written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    store = ImageStore(sources.paths, (32, 16), cache=True)
    pixels = torch.stack([store[i] for i in range(len(store))]).float() / 255
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def rows(images: Tensor) -> Tensor:
        return (images[:, None] - pixels[None]).flatten(2).abs().amax(2).argmin(1)

    def generator_side(*args: Any) -> Any:
        found = generator_losses(*args)
        seen.append((rows(args[3]), args[6], found[0].content.detach()))
        return found

    def discriminator_side(discriminator: Discriminator, made: Tensor, negatives: Tensor) -> Tensor:
        images, indices, _ = seen[-1]
        assert torch.equal(rows(negatives), indices.flatten())
        labels, domains = torch.from_numpy(sources.labels), torch.from_numpy(sources.domains)
        assert (labels[indices] != labels[images][:, None]).all()
        assert (domains[indices] == domains[images][:, None]).all()
        return discriminator_loss(discriminator, made, negatives)

    monkeypatch.setattr(mpg, "generator_losses", generator_side)
    monkeypatch.setattr(mpg, "discriminator_loss", discriminator_side)
    default = Config()
    options = MPGConfig(
        steps=4,
        batch_size=4,
        negatives=2,
        width=4,
        blocks=1,
        discriminator_width=4,
        discriminator_layers=2,
        sample_steps=3,
    )
    config = Config(mpg=options, log_steps=2, data=type(default.data)(height=32, width=16, workers=0, cache=True))
    trunk = SmallTrunk()
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    apart = camera_distance(
        trunk, store, sources.labels, sources.cameras, batch_size=4, seed=config.seed, device=torch.device("cpu")
    )
    mpg.train_mpg(tmp_path / "run", sources, trunk, config, "cpu", apart)
    assert len(seen) == 4
    assert all(torch.equal(before[name], tensor) for name, tensor in trunk.state_dict().items())
    assert all(parameter.grad is None for parameter in trunk.parameters())

    assert apart is not None
    lines = read_metrics(tmp_path / "run" / "metrics.csv")
    for line, (one, other) in zip(lines, (seen[:2], seen[2:]), strict=True):
        content = float((one[2] + other[2]) / 2)
        assert float(line["content"]) == pytest.approx(content / apart, rel=1e-4)
        assert 0 <= float(line["flipped"]) <= 1
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "mpg"))
    events.Reload()
    (tag,) = events.Tags()["images"]
    assert [picture.step for picture in events.Images(tag)] == [3, 4]  # every third step, and the last
    assert (events.Images(tag)[0].height, events.Images(tag)[0].width) == (64, 8 * 16)
