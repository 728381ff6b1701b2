"""Weights of other projects: their containers, prefixes and layouts. Names are those of their code, values random."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")
import timm
from timm.layers import resample_abs_pos_embed

from apd.config.values import ModelConfig
from apd.errors import InputError
from apd.models.spnet import build_spnet
from apd.models.weights import load_weights
from apd.retrieval.extraction import load_extractor

SIZE = (32, 16)
VIT = ModelConfig(
    backbone="vit_tiny_patch16_224", pretrained="none", patch_size=8, embed_dim=24, depth=2, heads=2, drop_path=0.0
)
State = dict[str, Tensor]


def vit(size: tuple[int, int] = SIZE, name: str = "vit_tiny_patch16_224") -> Any:
    options = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    return timm.create_model(name, img_size=size, **options)


def under(prefix: str, state: State, **beside: Tensor) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()} | beside


def head(*names: str) -> State:
    return {name: torch.rand(5, 24) for name in names}


def loaded(content: Any, path: Path, capsys: pytest.CaptureFixture[str], model: Any = None) -> tuple[Any, str]:
    """The network, and the line that was said."""
    torch.save(content, path)
    model = vit() if model is None else model
    load_weights(model, path, "--weights")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 1
    return model, lines[0].removeprefix(f"--weights: {path}: ") if lines else ""


def same(model: nn.Module, state: State) -> None:
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], msg=name)


def clip(state: State) -> State:
    """CLIP's names of the same tensors, as CLIP-ReID keeps them; a token less than three-dimensional, no class bias."""
    names = (
        *(("patch_embed.proj", "conv1"), ("pos_embed", "positional_embedding"), ("cls_token", "class_embedding")),
        *(("blocks.", "transformer.resblocks."), ("norm_pre", "ln_pre"), ("norm1", "ln_1"), ("norm2", "ln_2")),
        *(
            ("attn.qkv.weight", "attn.in_proj_weight"),
            ("attn.qkv.bias", "attn.in_proj_bias"),
            ("attn.proj", "attn.out_proj"),
        ),
        *(("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")),
    )
    found = {}
    for name, tensor in state.items():
        name = name.replace("norm.", "ln_post.") if name.startswith("norm.") else name
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        found[name] = tensor.squeeze() if name == "class_embedding" else tensor
    found["positional_embedding"] = found["positional_embedding"][0]
    return found | {"proj": torch.rand(24, 16)}


LAYOUTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "timm": (lambda state: state, ""),
    "timm with its classifier": (lambda state: state | head("head.weight"), "left out: head"),
    "TransReID": (
        lambda state: under(
            "base.", state, **head("base.fc.weight", "base.sie_embed", "classifier.weight", "bottleneck.bias")
        ),
        "prefix base. taken off; left out: classifier, bottleneck, fc, sie_embed",
    ),
    "TransReID with JPM, in DataParallel": (
        lambda state: under(
            "module.base.", state, **under("module.b1.0.", state), **head("module.classifier_1.weight")
        ),
        "prefix module.base. taken off; left out: b1, classifier_1",
    ),
    "DINO's teacher, as TransReID-SSL and PersonViT": (
        lambda state: {
            "student": under("module.backbone.", {name: tensor + 1 for name, tensor in state.items()}),
            "teacher": under("backbone.", state, **head("head.mlp.0.weight", "head.last_layer.weight_v")),
            "optimizer": {"state": {}, "param_groups": []},
            "epoch": 100,
            "dino_loss": {"center": torch.zeros(1, 5)},
        },
        "taken from teacher; prefix backbone. taken off; left out: head",
    ),
    "both, in one dictionary": (
        lambda state: (
            under("student.", {name: tensor + 1 for name, tensor in state.items()}) | under("teacher.", state)
        ),
        "prefix teacher. taken off; left out: student",
    ),
    "timm's averaged weights": (
        lambda state: {"state_dict": {name: tensor + 1 for name, tensor in state.items()}, "state_dict_ema": state},
        "taken from state_dict_ema",
    ),
    "compiled, in containers of containers": (
        lambda state: {"net": {"model_state_dict": under("_orig_mod.module.model.", state)}},
        "taken from net.model_state_dict; prefix _orig_mod.module.model. taken off",
    ),
    "a container of another name": (lambda state: {"weights": state, "step": 3}, "taken from weights"),
    "torchreid's checkpoint": (
        lambda state: {"state_dict": state, "rank1": np.float64(0.4), "epoch": np.int64(3), "curve": np.ones(3)},
        "taken from state_dict",
    ),
    "lightning": (
        lambda state: {"state_dict": under("model.backbone.", state)},
        "taken from state_dict; prefix model.backbone. taken off",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_transformers(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    layout, said = LAYOUTS[name]
    state = vit().state_dict()
    model, line = loaded(layout(state), tmp_path / "w.pth", capsys)
    same(model, state)
    assert line == said


@pytest.mark.parametrize(
    ("size", "old"),
    [((48, 48), (6, 6)), ((64, 32), (8, 4)), ((80, 40), (10, 5)), ((56, 24), (7, 3))],
)
def test_position_embeddings_of_other_sizes(
    tmp_path: Path, size: tuple[int, int], old: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another image, square or upright; the grid is not in the file."""
    state = vit(size).state_dict()
    model, line = loaded(under("base.", state), tmp_path / "w.pth", capsys)
    expected = resample_abs_pos_embed(state["pos_embed"], [4, 2], list(old), num_prefix_tokens=1)
    same(model, state | {"pos_embed": expected})
    assert line.endswith(f"position embedding resized from {old[0]}×{old[1]} patches to 4×2")


def test_a_distilled_transformer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = vit().state_dict()
    positions = state["pos_embed"]
    distilled = state | {"pos_embed": torch.cat([positions[:, :1], torch.ones(1, 1, 24), positions[:, 1:]], 1)}
    model, line = loaded(distilled | {"dist_token": torch.ones(1, 1, 24)}, tmp_path / "w.pth", capsys)
    same(model, state)
    assert line == "distillation token left out; left out: dist_token"


def test_clips_image_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CLIP-ReID's: 16×8 patches there are 128, which are no square."""
    name = "vit_base_patch16_clip_quickgelu_224"
    state = vit((64, 32), name).state_dict()
    theirs = under("image_encoder.", clip(state), **head("classifier.weight", "cv_embed", "prompt_learner.cls_ctx"))
    model, line = loaded(theirs, tmp_path / "w.pth", capsys, vit(SIZE, name))
    expected = resample_abs_pos_embed(state["pos_embed"], [4, 2], [8, 4], num_prefix_tokens=1)
    same(model, state | {"pos_embed": expected})
    assert line == (
        "prefix image_encoder. taken off; position embedding resized from 8×4 patches to 4×2; "
        "left out: classifier, cv_embed, prompt_learner, head"
    )
    with pytest.raises(InputError, match=r"It is CLIP's image encoder, as CLIP-ReID's: that is timm's vit_base"):
        loaded(theirs, tmp_path / "w.pth", capsys)


def test_a_resnet_of_torchreid_and_of_fast_reid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    counters = len(state) - len(old)
    for content, said in (
        (
            {
                "state_dict": under("module.", old, **{"module.classifier.weight": torch.rand(4, 8)}),
                "rank1": np.float32(1),
            },
            f"taken from state_dict; prefix module. taken off; {counters} num_batches_tracked set to 0; "
            "left out: classifier",
        ),
        (
            {
                "model": under("backbone.", state, pixel_mean=torch.rand(3), **{"heads.weight": torch.rand(4)}),
                "iteration": 9,
            },
            "taken from model; prefix backbone. taken off; left out: pixel_mean, heads",
        ),
    ):
        model, line = loaded(content, tmp_path / "w.pth", capsys, timm.create_model("test_resnet", num_classes=0))
        same(model, state)
        assert line == said


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("layer1.0.bn1.IN.weight", "instance norms, as IBN-Net and fast-reid's"),
        ("conv2.0.conv2d.3.conv1.weight", "OSNet's streams, as torchreid's"),
        ("semantic_embed_w.0.weight", "a semantic controller, as SOLIDER's"),
        ("patch_embed.conv.0.weight", "a convolutional stem, as TransReID-SSL's"),
    ],
)
def test_networks_that_timm_lacks(tmp_path: Path, name: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They are said, with the way that is left: nothing is loaded by halves."""
    torch.manual_seed(0)
    state = vit().state_dict()
    model = vit()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    content = under(
        "backbone.", {key: tensor for key, tensor in state.items() if key != "norm.bias"} | {name: torch.rand(4)}
    )
    with pytest.raises(InputError, match=rf"It is another network: it has {what}.*--model package\.module:factory"):
        loaded({"teacher": content}, tmp_path / "w.pth", capsys, model)
    same(model, before)


NETWORK = """
from torch import nn


class OSNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential()
        self.conv1.conv, self.conv1.bn = nn.Conv2d(3, 4, 7, 4), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 6)
        self.classifier = nn.Linear(6, 10)

    def forward(self, x):
        return self.fc(self.conv1(x).mean((2, 3)))
"""


def test_a_network_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A classifier of other identities is left as it was made; anything else must fit."""
    (tmp_path / "users_osnet.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    network = load_extractor("users_osnet:OSNet", "cpu").module[1]  # type: ignore[index]
    state = {name: torch.rand(tensor.shape).to(tensor.dtype) for name, tensor in network.state_dict().items()}
    theirs = state | {"classifier.weight": torch.rand(751, 6), "classifier.bias": torch.rand(751)}
    torch.save({"state_dict": under("module.", theirs), "rank1": np.float64(0.5)}, "osnet.pth.tar")
    extractor: Any = load_extractor("users_osnet:OSNet", "cpu", weights="osnet.pth.tar")
    for name, tensor in extractor.module[1].state_dict().items():
        assert name.startswith("classifier") or torch.equal(tensor, state[name])
    assert "taken from state_dict; prefix module. taken off; made anew: classifier" in capsys.readouterr().out
    assert extractor.name == "users_osnet:OSNet, osnet.pth.tar"
    del theirs["fc.bias"]
    torch.save(theirs, "osnet.pth.tar")
    with pytest.raises(InputError, match=r"--weights: osnet\.pth\.tar: 1 tensors of the model are missing: fc\.bias"):
        load_extractor("users_osnet:OSNet", "cpu", weights="osnet.pth.tar")


@pytest.mark.parametrize("kind", ["namespace", "module", "script"])
@pytest.mark.filterwarnings("ignore")
def test_files_that_would_run_code(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They are refused, not called damaged, and the command that the message has converts them."""
    network, path = timm.create_model("test_resnet", num_classes=0), tmp_path / "it's w.pth"
    if kind == "script":
        torch.jit.save(torch.jit.trace(network.eval(), torch.rand(1, 3, 32, 32)), path)
    else:
        content = {"model": network.state_dict(), "args": argparse.Namespace(lr=1)} if kind == "namespace" else network
        torch.save(content, path)
    with pytest.raises(
        InputError, match=r"not read, because it holds .*, and to load that runs code of the file"
    ) as error:
        load_weights(timm.create_model("test_resnet", num_classes=0), path, "--weights")
    assert "damaged" not in str(error.value)
    command = str(error.value).partition("python -c ")[2].strip('"')
    subprocess.run([sys.executable, "-c", command], check=True)
    model = timm.create_model("test_resnet", num_classes=0)
    load_weights(model, path.with_suffix(".tensors.pth"), "--weights")
    same(model, network.state_dict())


def test_files_that_hold_no_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"expected a state dict of tensors, got one of epoch, args$"):
        loaded({"epoch": 3, "args": "lr 1"}, tmp_path / "w.pth", capsys)
    (tmp_path / "w.pth").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a file of weights, or cut off or damaged"):
        load_weights(vit(), tmp_path / "w.pth", "--weights")


@pytest.mark.parametrize(
    ("before", "after", "anew"),
    [
        ({"ssd": "sps"}, {"ssd": "sps"}, "heads.classifier"),
        ({"ssd": "none"}, {"ssd": "sps"}, "msp.dc1, msp.dc2, msp.dc3, msp.dc4, heads.norms, heads.classifier"),
        ({"ssd": "sps"}, {"ssd": "none"}, "heads.classifier"),
    ],
)
@pytest.mark.parametrize("backbone", ["vit", "cnn"])
def test_from_a_run(
    tmp_path: Path, backbone: str, before: Any, after: Any, anew: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that fits is taken over; branches' statistics begin as copies of those of the relevant one."""
    from apd.run import save_tensors

    config = VIT if backbone == "vit" else ModelConfig(backbone="test_resnet", pretrained="none", drop_path=0.0)
    torch.manual_seed(0)
    trained = build_spnet(replace(config, **before), SIZE, 4)
    for name, tensor in trained.state_dict().items():
        if name.endswith("running_mean"):
            tensor += 1
    save_tensors(tmp_path / "best.safetensors", trained)
    changed = replace(config, **after, pretrained=str(tmp_path / "best.safetensors"))
    model = build_spnet(changed, SIZE, 7)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert f"made anew: {anew}\n" in line
    theirs, ours = trained.state_dict(), model.state_dict()
    assert ours["heads.classifier.weight"].shape == (7, model.heads.classifier.in_features)
    assert all(
        torch.equal(ours[name], theirs[name])
        for name in ours
        if name.startswith(("vit.", "cnn.")) and name[-1] not in "12"
    )
    assert all(torch.equal(ours[name], theirs[name[:-2]]) for name in ours if name[-2:] in ("_1", "_2"))
    if before == after:
        assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith("msp."))
