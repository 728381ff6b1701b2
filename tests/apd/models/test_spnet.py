"""SP-Net: its maps, branches and losses against formulas written here in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

pytest.importorskip("timm")

from apd.config.values import LatentConfig, LossConfig, ModelConfig
from apd.errors import InputError
from apd.models.spnet import MSP, Branch, Branches, Heads, SPNet, build_spnet, parameter_groups
from apd.training.losses import latent_loss, spnet_losses

SIZE = (32, 16)
LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
SMALL = ModelConfig(
    backbone="vit_tiny_patch16_224", pretrained="none", patch_size=8, embed_dim=24, depth=2, heads=2, drop_path=0.0
)


def network(**changes: object) -> SPNet:
    torch.manual_seed(0)
    return build_spnet(replace(SMALL, **changes), SIZE, 4)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(8, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(4, 2), (7, 5), (1, 1)])
def test_msp_keeps_the_map_size(size: tuple[int, int]) -> None:
    assert all(logits.shape == (2, 6, *size) for logits in MSP(6)(torch.randn(2, 6, *size)))


def test_msp_is_equation_6() -> None:
    msp, features = MSP(3).double(), torch.randn(2, 3, 6, 4, dtype=torch.float64)

    def dilated(convolution: torch.nn.Conv2d, x: Tensor) -> Tensor:
        """By the definition: out[h, w] = b + Σ_ij W_ij x[h + 2i − p, w + 2j − p], zero outside."""
        kernel, pad = convolution.kernel_size[0], convolution.kernel_size[0] - 1
        out = torch.zeros_like(x) + convolution.bias[:, None, None]
        for h in range(6):
            for w in range(4):
                for i in range(kernel):
                    for j in range(kernel):
                        y, z = h + 2 * i - pad, w + 2 * j - pad
                        if 0 <= y < 6 and 0 <= z < 4:
                            out[:, :, h, w] += x[:, :, y, z] @ convolution.weight[:, :, i, j].T
        return out

    expected = [
        dilated(msp.dc1, features),
        dilated(msp.dc2, dilated(msp.dc3, features).sigmoid()),
        dilated(msp.dc4, features),
    ]
    torch.testing.assert_close(msp(features), expected)
    assert [c.kernel_size for c in (msp.dc1, msp.dc2, msp.dc3, msp.dc4)] == [(3, 3), (2, 2), (3, 3), (2, 2)]


def test_first_bias_keeps_most_of_the_map(images: Tensor) -> None:
    for bias, low, high in ((2.0, 0.8, 0.95), (0.0, 0.4, 0.6)):
        model = network(msp_bias_init=bias)
        features = model.embed(images)
        share = (model.relevant_map(images) / features).median()
        assert low < share < high


def test_baseline_is_the_transformer(images: Tensor) -> None:
    sized = network(backbone="test_vit", patch_size=None, embed_dim=None, depth=None, heads=None, ssd="none").eval()
    assert sized.vit.dynamic_img_size
    model = network(ssd="none").eval()
    for each in (sized, model):
        torch.testing.assert_close(each(images), each.vit(each.normalize(images)))
    torch.testing.assert_close(model.normalize(images), (images - 0.5) / 0.5)


@pytest.mark.parametrize("descriptor", ["before_bn", "after_bn"])
def test_inference_takes_the_relevant_branch_alone(images: Tensor, descriptor: str) -> None:
    model = network(descriptor=descriptor).eval()
    passes = []
    model.vit.blocks[0].register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    features = model.embed(images)
    a1, a2, a3 = (logits.sigmoid() for logits in model.msp(features))
    f = model.encode((a1 + a2 + a3) / 3 * features)
    expected = f if descriptor == "before_bn" else model.heads.norms[0](f)
    passes.clear()
    torch.testing.assert_close(model(images), expected)
    assert passes == [8]


def test_branches_pass_as_one_batch(images: Tensor) -> None:
    model = network().train()
    passes, maps = [], []
    model.vit.blocks[0].register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    encode = model.encode
    model.encode = lambda x: maps.append(x) or encode(x)  # type: ignore[method-assign, func-returns-value]
    branches = model.branches(images, LABELS)
    assert passes == [24]
    features = model.embed(images)
    relevant, irrelevant, perturbed = maps[0].chunk(3)
    torch.testing.assert_close(relevant + irrelevant, features)
    # The NK in each K* is that of one image, and of another identity.
    added = perturbed - relevant
    distance = (added[:, None] - irrelevant[None]).flatten(2).abs().amax(2)
    assert (distance.min(1).values < 1e-5).all()
    assert (LABELS[distance.argmin(1)] != LABELS).all()
    assert branches.exchanged is not None
    assert branches.exchanged.all()
    assert all(branch.logits.shape == (8, 4) for branch in branches[:3])


@pytest.mark.parametrize(("ssd", "expected"), [("none", 1), ("msp", 1), ("sds", 2), ("sps", 3)])
def test_rows_of_the_ablation(images: Tensor, ssd: str, expected: int) -> None:
    branches = network(ssd=ssd).train().branches(images, LABELS)
    assert sum(branch is not None for branch in branches[:3]) == expected
    losses = spnet_losses(branches, LABELS, LossConfig(), 1.0)
    assert set(losses) == {"loss", "loss_k", "loss_nk", "loss_kp"} - set(("loss_nk", "loss_kp")[expected - 1 :])
    losses["loss"].backward()


def test_statistics_of_the_relevant_norm_ignore_other_branches(images: Tensor) -> None:
    """K's running mean and variance are the same with and without the other branches."""
    full, alone = network().train(), network(ssd="msp").train()
    alone.load_state_dict({k: v for k, v in full.state_dict().items() if k in alone.state_dict()})
    full.branches(images, LABELS)
    alone.branches(images, LABELS)
    torch.testing.assert_close(full.heads.norms[0].running_mean, alone.heads.norms[0].running_mean)
    torch.testing.assert_close(full.heads.norms[0].running_var, alone.heads.norms[0].running_var)
    assert not torch.allclose(full.heads.norms[1].running_mean, full.heads.norms[0].running_mean)


def test_heads_are_those_of_transreid() -> None:
    heads = Heads(512, 100, 1)
    assert not heads.norms[0].bias.requires_grad
    assert heads.classifier.bias is None
    assert 0.0009 < float(heads.classifier.weight.detach().std()) < 0.0011


def hand_written(branches: Branches, config: LossConfig, ramp: float) -> dict[str, Tensor]:
    """The formulas of the module docstring, anchor by anchor."""

    def distance(x: Tensor, i: int, j: int) -> Tensor:
        return (x[i] - x[j]).norm()

    def mined(x: Tensor) -> list[tuple[int, int, int]]:
        triplets = []
        for a in range(8):
            positives = [j for j in range(8) if LABELS[j] == LABELS[a] and j != a]
            negatives = [j for j in range(8) if LABELS[j] != LABELS[a]]
            p = max(positives, key=lambda j: float(distance(x, a, j)))
            triplets.append((a, p, min(negatives, key=lambda j: float(distance(x, a, j)))))
        return triplets

    f, n, k = (branch.features.double() for branch in branches[:3] if branch is not None)
    shared = config.triplets == "shared"
    of_f = mined(f)
    of_n, of_k = (of_f, of_f) if shared else (mined(n), mined(k))
    if config.triplets == "reversed":
        of_n = [
            (
                a,
                min((j for j in range(8) if LABELS[j] == LABELS[a] and j != a), key=lambda j: float(distance(n, a, j))),
                max((j for j in range(8) if LABELS[j] != LABELS[a]), key=lambda j: float(distance(n, a, j))),
            )
            for a in range(8)
        ]

    def keep(x: Tensor, triplets: list[tuple[int, int, int]], logits: Tensor) -> Tensor:
        terms = [softplus(distance(x, a, p) - distance(x, a, n)) for a, p, n in triplets]
        return torch.stack(terms).mean() + cross_entropy(logits.double(), LABELS)

    terms = [softplus(distance(n, a, j) - distance(n, a, p)) for a, p, j in of_n]
    wrong = LABELS[torch.tensor([j for _, _, j in of_n])]
    losses = {
        "loss_k": keep(f, of_f, branches.relevant.logits),
        "loss_nk": torch.stack(terms).mean() + cross_entropy(branches.irrelevant.logits.double(), wrong),
        "loss_kp": keep(k, of_k, branches.perturbed.logits),
    }
    loss = 1.0 * losses["loss_k"] + ramp * (0.5 * losses["loss_nk"] + 0.1 * losses["loss_kp"])
    return {"loss": loss, **losses}


def random_branches(seed: int) -> Branches:
    generator = torch.Generator().manual_seed(seed)
    made = [Branch(torch.randn(8, 6, generator=generator), torch.randn(8, 4, generator=generator)) for _ in range(3)]
    return Branches(*made, torch.ones(8, dtype=torch.bool))


@pytest.mark.parametrize("triplets", ["shared", "own", "reversed"])
@pytest.mark.parametrize("ramp", [0.0, 0.4, 1.0])
def test_losses_are_the_papers(triplets: str, ramp: float) -> None:
    config = LossConfig(triplets=triplets)
    for seed in range(5):
        branches = random_branches(seed)
        found = spnet_losses(branches, LABELS, config, ramp)
        for name, value in hand_written(branches, config, ramp).items():
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)


def test_choices_of_triplets_differ() -> None:
    values = {
        triplets: float(spnet_losses(random_branches(0), LABELS, LossConfig(triplets=triplets), 1.0)["loss_nk"])
        for triplets in ("shared", "own", "reversed")
    }
    assert len(set(values.values())) == 3


def test_images_without_an_exchange_are_left_out() -> None:
    """An image whose K* kept its own identity's NK takes no part in L_K* as an anchor."""
    branches = random_branches(0)
    exchanged = torch.tensor([True] * 6 + [False] * 2)
    found = spnet_losses(branches._replace(exchanged=exchanged), LABELS, LossConfig(), 1.0)["loss_kp"]
    f, k = branches.relevant.features.double(), branches.perturbed.features.double()
    terms = []
    for a in range(6):
        same, distances = LABELS[a] == LABELS, (f - f[a]).norm(dim=1)
        p = int(distances.where(same, -torch.inf).argmax())
        n = int(distances.where(~same, torch.inf).argmin())
        terms.append(softplus((k[a] - k[p]).norm() - (k[a] - k[n]).norm()))
    expected = torch.stack(terms).mean() + cross_entropy(branches.perturbed.logits[:6].double(), LABELS[:6])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_latent_loss_is_harder_and_keeps_the_statistics() -> None:
    torch.manual_seed(0)
    heads = Heads(6, 4, 1).train()
    torch.nn.init.normal_(heads.classifier.weight)
    features = torch.randn(8, 6, requires_grad=True)
    before = heads.norms[0].running_mean.clone()
    near, far = (
        latent_loss(features, LABELS, heads, LossConfig(), LatentConfig(epsilon=epsilon)) for epsilon in (1e-6, 0.3)
    )
    assert far > near
    far.backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0
    torch.testing.assert_close(heads.norms[0].running_mean, before)


def test_parameter_groups() -> None:
    model = network()
    weights, biases = parameter_groups(model, 0.1, 1e-4, 2.0)
    assert (weights["lr"], biases["lr"]) == (0.1, 0.2)
    found = {id(p) for group in (weights, biases) for p in group["params"]}
    assert found == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(p.ndim == 1 for p in biases["params"])


def test_weights_of_another_network(tmp_path: Path) -> None:
    deeper = build_spnet(replace(SMALL, depth=3), SIZE, 4).vit.state_dict()
    for state, message in (
        (deeper, r"tensors have no place in the model: blocks\.2\."),
        ({**deeper, "pos_embed": torch.zeros(3)}, "not weights of this model"),
    ):
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(InputError, match=rf"model\.pretrained: .*weights\.pth: .*{message}"):
            build_spnet(replace(SMALL, pretrained=str(tmp_path / "weights.pth")), SIZE, 4)
    torch.save({**deeper, "head.weight": torch.zeros(9, 24)}, tmp_path / "weights.pth")
    model = build_spnet(replace(SMALL, depth=3, pretrained=str(tmp_path / "weights.pth")), SIZE, 4)
    assert all(torch.equal(tensor, deeper[name]) for name, tensor in model.vit.state_dict().items())


def test_backbones_that_do_not_serve() -> None:
    with pytest.raises(InputError, match="vision transformer"):  # its patches are of a CNN's map
        build_spnet(ModelConfig(backbone="vit_tiny_r_s16_p8_224", pretrained="none"), (64, 32), 4)
    for size, message in (((60, 32), r"data\.height: .* 16 pixels, got 60"), ((64, 28), r"data\.width: .* got 28")):
        with pytest.raises(InputError, match=message):
            build_spnet(ModelConfig(backbone="vit_tiny_patch16_224", pretrained="none"), size, 4)
    with pytest.raises(InputError, match="nonesuch"):
        build_spnet(ModelConfig(backbone="nonesuch", pretrained="none"), SIZE, 4)
