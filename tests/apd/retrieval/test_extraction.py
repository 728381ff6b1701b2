"""Features of images by timm models, networks of one's own and runs."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")
pytest.importorskip("typer")
pytest.importorskip("faiss")

from command_line import error, run
from drawn import SIZE, draw_data_set, write_run

from apd.data.images import load_image
from apd.errors import InputError
from apd.retrieval.extraction import IMAGENET_MEAN, IMAGENET_STD, extract, load_extractor
from apd.retrieval.features import load_features
from apd.run import Run

OWN = '''
import torch
from torch import nn


class Columns(nn.Module):
    """Mean colour of the left and of the right half."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return nn.functional.adaptive_avg_pool2d(x, (1, 2)).flatten(1)


class Output(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x.mean((2, 3)))


def pair():
    return Output(lambda f: (f, f))


def named():
    return Output(lambda f: {"features": f, "logits": f})


def maps():
    return Output(lambda f: f[:, :, None, None])


def whole_numbers():
    return Output(lambda f: f.long())


def one_row():
    return Output(lambda f: f[:1])


def not_finite():
    return Output(lambda f: torch.where(torch.arange(len(f))[:, None] == 3, torch.nan, f))


def wrong_size():
    return nn.Sequential(nn.Flatten(), nn.Linear(7, 2))


def number():
    return 3


def wants_more(name):
    return nn.Identity()


constant = 3
'''


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return draw_data_set(tmp_path / "set")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder."""
    (tmp_path / "networks_of_a_user.py").write_text(OWN)
    (tmp_path / "cannot_be_imported.py").write_text("import there_is_no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("networks_of_a_user", "cannot_be_imported"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "networks_of_a_user"


def _images(data: Path) -> tuple[list[Path], Tensor]:
    paths = sorted((data / "bounding_box_test").iterdir())
    images = np.stack([load_image(path, SIZE) for path in paths])
    return paths, torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


# what the network gets, and what is written


def test_own_network(data: Path, own: str, tmp_path: Path) -> None:
    """All parts, sorted by split and name; ImageNet's mean and deviation."""
    out = tmp_path / "f.npz"
    printed = run("extract", "--model", f"{own}:Columns", "--data", data, "--output", out, "--size", "32x16")
    assert "4 images, 2 identities, 2 cameras; set, split 0, train" in printed
    assert "32 × 16 pixels; flip test off" in printed
    with np.load(out, allow_pickle=False) as archive:
        arrays = dict(archive)
    assert {name: (values.dtype.kind, values.dtype.itemsize) for name, values in arrays.items() if name != "names"} == {
        "features": ("f", 4),
        "pids": ("i", 4),
        "camids": ("i", 4),
        "split": ("i", 1),
        "model": ("U", 4 * len(f"{own}:Columns")),
        "fingerprint": ("U", 4 * 64),
        "image_size": ("i", 8),
        "flip_test": ("b", 1),
    }
    assert str(arrays["model"]) == f"{own}:Columns"
    assert arrays["image_size"].tolist() == [32, 16]
    folders = {"bounding_box_train": 0, "query": 1, "bounding_box_test": 2}
    files = sorted((folders[path.parent.name], path) for path in data.rglob("*.png"))
    assert arrays["names"].tolist() == [path.relative_to(data).as_posix() for _, path in files]
    assert arrays["split"].tolist() == [split for split, _ in files]
    assert arrays["pids"].tolist() == [int(path.name[:4]) for _, path in files]
    assert arrays["camids"].tolist() == [int(path.name[6]) for _, path in files]
    for row, (_, path) in zip(arrays["features"], files, strict=True):
        image = (load_image(path, SIZE) / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
        halves = np.concatenate([image[:, :8].mean((0, 1)), image[:, 8:].mean((0, 1))])
        np.testing.assert_allclose(row.reshape(3, 2).T.ravel(), halves, atol=1e-5)
    assert len(load_features(out).part("gallery")) == 12
    assert not list(tmp_path.glob(".*"))


def test_mean_std_and_flip_test(data: Path, own: str) -> None:
    paths, images = _images(data)
    options: dict[str, Any] = {"size": SIZE, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    plain = extract(load_extractor(f"{own}:Columns", "cpu", **options), paths)
    mean, std = (torch.tensor(options[name]).view(3, 1, 1) for name in ("mean", "std"))
    x = (images - mean) / std
    np.testing.assert_allclose(plain.reshape(-1, 3, 2)[:, :, 0], x[..., :8].mean((2, 3)), atol=1e-5)
    both = extract(load_extractor(f"{own}:Columns", "cpu", **options, flip_test=True), paths).reshape(-1, 3, 2)
    np.testing.assert_allclose(both, x.mean((2, 3))[:, :, None].expand(-1, -1, 2), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5, 12, 64])
def test_batches(data: Path, own: str, batch_size: int) -> None:
    paths, _ = _images(data)
    extractor = load_extractor(f"{own}:Columns", "cpu", size=SIZE)
    done: list[int] = []
    rows = extract(extractor, paths, batch_size=batch_size, advance=done.append)
    assert sum(done) == len(paths) == 12
    assert max(done) == min(batch_size, 12)
    network: Any = extractor.module[1]  # type: ignore[index]
    assert [len(x) for x in network.seen] == done
    np.testing.assert_allclose(rows, extract(extractor, paths), atol=1e-6)


def test_a_module_here_stands_in_for_nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text("make = 1")
    (tmp_path / "colorsys.py").write_text("make = 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(InputError, match=r"colorsys \(.*colorsys\.py\) has no 'make'"):
        load_extractor("colorsys:make", "cpu")
    with pytest.raises(InputError, match="expected a function or class, got int"):
        load_extractor("only_here:make", "cpu")


def test_default_size_of_an_own_network(own: str) -> None:
    assert load_extractor(f"{own}:Columns", "cpu").size == (256, 128)


def test_timm_model(data: Path, tmp_path: Path) -> None:
    """Its own mean, deviation and size; untrained weights are the same in every call."""
    import timm

    paths, _ = _images(data)
    extractor = load_extractor("timm:test_vit", "cpu", weights="none")
    assert extractor.size == (160, 160)
    assert extractor.name == "timm:test_vit, untrained"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = timm.create_model("test_vit", num_classes=0).eval()
    images = np.stack([load_image(path, (160, 160)) for path in paths[:3]])
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        np.testing.assert_allclose(extract(extractor, paths[:3]), expected(x).numpy(), atol=1e-4)
    assert extractor.fingerprint == load_extractor("timm:test_vit", "cpu", weights="none").fingerprint

    torch.save(expected.state_dict(), tmp_path / "w.pth")
    loaded = load_extractor("timm:test_vit", "cpu", weights=str(tmp_path / "w.pth"))
    np.testing.assert_array_equal(extract(loaded, paths[:3]), extract(extractor, paths[:3]))
    resized = load_extractor("timm:test_vit", "cpu", weights=str(tmp_path / "w.pth"), size=SIZE)
    assert extract(resized, paths).shape == (12, 64)
    assert resized.fingerprint != loaded.fingerprint  # its position embeddings were resized


def test_a_convolutional_timm_model_takes_any_size(data: Path) -> None:
    extractor = load_extractor("timm:test_resnet", "cpu", weights="none", size=SIZE)
    assert extract(extractor, _images(data)[0]).shape[0] == 12


def test_run(data: Path, tmp_path: Path) -> None:
    paths, images = _images(data)
    folder = write_run(tmp_path / "runs" / "mine")
    extractor = load_extractor(str(folder), "cpu")
    assert extractor.about() == {
        "model": "mine",
        "fingerprint": Run(folder).fingerprint(),
        "image_size": list(SIZE),
        "flip_test": False,
        "descriptor": "before_bn",
        "label_smoothing": 0.0,
    }
    network = Run(folder).load_model("cpu")
    with torch.no_grad():
        np.testing.assert_allclose(extract(extractor, paths), network(images).numpy(), atol=1e-5)
        mirrored = nn.functional.normalize(network(images) + network(images.flip(3)))
    both = extract(load_extractor(str(folder), "cpu", flip_test=True), paths)
    np.testing.assert_allclose(both, mirrored.numpy(), atol=1e-5)
    out = tmp_path / "f.npz"
    run("extract", "--model", folder, "--data", data, "--output", out, "--part", "query", "--part", "gallery")
    assert load_features(out).split.tolist() == [1] * 5 + [2] * 12  # type: ignore[union-attr]
    assert "--size 64x32: " in error("extract", "--model", folder, "--data", data, "--output", out, "--size", "64x32")


def test_parts_that_are_missing(data: Path, own: str, tmp_path: Path) -> None:
    shutil.rmtree(data / "bounding_box_train")
    command = ["extract", "--model", f"{own}:Columns", "--data", data, "--output", tmp_path / "f.npz"]
    printed = run(*command)
    assert "train       left out: not in the data set" in printed
    assert len(load_features(tmp_path / "f.npz")) == 17
    assert "bounding_box_train" in error(*command, "--part", "train")
    for folder in ("query", "bounding_box_test"):
        shutil.rmtree(data / folder)
    assert "set: no folder 'bounding_box_train'" in error(*command)


def test_data_warnings_are_one_line(data: Path, own: str, tmp_path: Path) -> None:
    (data / "query" / "portrait.png").write_bytes(next((data / "query").iterdir()).read_bytes())
    printed = run("extract", "--model", f"{own}:Columns", "--data", data, "--output", tmp_path / "f.npz")
    lines = [line for line in printed.splitlines() if "portrait" in line]
    assert len(lines) == 1
    assert lines[0].startswith("Warning: ")
    assert len(load_features(tmp_path / "f.npz")) == 21


# errors


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("pair", "expected a tensor (B, D) as the network's output, got tuple of 2 (Tensor, Tensor)"),
        ("named", "expected a tensor (B, D) as the network's output, got dict of 2 (features, logits)"),
        (
            "maps",
            "expected floating point (21, D) as the network's output for 21 images, got torch.float32 (21, 3, 1, 1)",
        ),
        ("whole_numbers", "for 21 images, got torch.int64 (21, 3)"),
        ("one_row", "for 21 images, got torch.float32 (1, 3)"),
        ("not_finite", "gives NaN or infinite values for "),
        ("wrong_size", "fails on images (21, 3, 32, 16): RuntimeError: "),
        ("number", "expected a torch.nn.Module from number(), got int"),
        ("wants_more", "wants_more() fails: TypeError: "),
        ("constant", "expected a function or class, got int"),
        ("absent", "has no 'absent'"),
    ],
)
def test_wrong_networks(data: Path, own: str, tmp_path: Path, model: str, message: str) -> None:
    out = tmp_path / "f.npz"
    found = error("extract", "--model", f"{own}:{model}", "--data", data, "--output", out, "--size", "32x16")
    assert found.startswith(f"Error: {own}:{model}: ")
    assert message in found
    assert not out.exists()
    if model == "not_finite":
        assert "bounding_box_train/0009_c2" in found  # the fourth of the sorted rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no_such_module:f"], "cannot import no_such_module: ModuleNotFoundError"),
        (["--model", "cannot_be_imported:f"], "No module named 'there_is_no_such_package'"),
        (["--model", "resnet50"], "resnet50: expected timm:NAME, package.module:factory or the folder of a run"),
        (["--model", "."], "not the folder of a run"),
        (["--model", "timm:no_such_model"], "timm:no_such_model: timm has no model of this name"),
        (["--model", "timm:test_vit.no_such_tag", "--weights", "none"], "no_such_tag"),
        (["--model", "timm:test_vit", "--weights", "absent.pth"], "--weights: absent.pth: no such file"),
        (["--model", "timm:test_vit", "--weights", "networks_of_a_user.py"], "not a file of weights"),
        (["--model", "timm:test_vit", "--mean", "0", "0", "0"], "--mean, --std: are for package.module:factory"),
        (["--model", "{own}:Columns", "--weights", "none"], "--weights: is for timm:NAME"),
        (["--model", "{own}:Columns", "--size", "256"], "--size 256: expected height x width"),
        (["--model", "{own}:Columns", "--size", "0x5"], "--size 0x5: expected height x width"),
        (["--model", "{own}:Columns", "--part", "test"], "--part test: expected train, query or gallery"),
        (["--model", "{own}:Columns", "--output", "f.txt"], "expected a name that ends in .npz"),
        (["--model", "{own}:Columns", "--output", "absent/f.npz"], "there is no folder absent"),
        (["--model", "{own}:Columns", "--data", "absent"], "absent: no such folder"),
    ],
)
def test_wrong_options(data: Path, own: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    given = [argument.format(own=own) for argument in arguments]
    for option, value in (("--data", str(data)), ("--output", "f.npz")):
        given += [] if option in given else [option, value]
    assert message in error("extract", *given)
    assert not (tmp_path / "f.npz").exists()


def test_an_unreadable_image_is_named(data: Path, own: str, tmp_path: Path) -> None:
    out = tmp_path / "f.npz"
    out.write_bytes(b"before")
    broken = data / "query" / "0003_c1s1_000000_00.png"
    broken.write_bytes(broken.read_bytes()[:200])
    found = error("extract", "--model", f"{own}:Columns", "--data", data, "--output", out, "--batch-size", 3)
    assert "0003_c1s1_000000_00.png: cannot be read" in found
    assert out.read_bytes() == b"before"


def test_a_full_disk_leaves_the_old_file(data: Path, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    out = tmp_path / "f.npz"
    out.write_bytes(b"before")
    monkeypatch.setattr("os.fsync", full)
    printed = run("extract", "--model", f"{own}:Columns", "--data", data, "--output", out, code=1)
    assert printed.splitlines()[-1] == f"Error: {tmp_path}: No space left on device"
    assert out.read_bytes() == b"before"
    assert not list(tmp_path.glob(".*"))


def test_weights_of_another_model(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"--weights: .*w\.pth: .* missing"):
        load_extractor("timm:test_vit", "cpu", weights=str(tmp_path / "w.pth"))


def test_weights_that_cannot_be_had_are_a_quick_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apd.models.weights.in_cache", lambda name: False)
    monkeypatch.setattr("apd.models.weights._reachable", lambda config: False)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"timm:test_vit: its weights are not in timm's cache .* --weights FILE"):
        load_extractor("timm:test_vit", "cpu")
    assert time.monotonic() - start < 5


# a run on a data set


def test_evaluate_a_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of its features, and with them what they depend on."""
    folder = write_run(tmp_path / "mine")
    run("extract", "--model", folder, "--data", data, "--output", tmp_path / "f.npz")
    run("evaluate", "--features", tmp_path / "f.npz", "--json", tmp_path / "features.json")
    evaluate = ["evaluate", "--checkpoint", folder, "--data", data, "--json", tmp_path / "run.json"]
    printed = run(*evaluate)
    for stated in ("32 × 16 pixels; flip test off", "before_bn", "label smoothing off", "re-ranking  off"):
        assert stated in printed
    expected, found = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("features", "run"))
    assert expected["num_valid_queries"] == 5
    assert {name: found[name] for name in expected} == expected
    about = load_extractor(str(folder), "cpu").about()
    assert {name: found[name] for name in found if name not in expected} == {"data": str(data)}
    assert found.items() >= about.items()
    monkeypatch.chdir(data)
    assert "5 images, 5 identities, 1 camera; set, split 1, query" in run(
        "evaluate", "--checkpoint", folder, "--data", "."
    )
    assert "flip test on" in run(*evaluate, "--flip-test")
    assert json.loads((tmp_path / "run.json").read_text())["flip_test"] is True


def test_evaluate_needs_query_and_gallery_only(data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "bounding_box_train")
    folder = write_run(tmp_path / "mine")
    run("evaluate", "--checkpoint", folder, "--data", data)
    shutil.rmtree(data / "query")
    assert "set: no folder 'query'" in error("evaluate", "--checkpoint", folder, "--data", data)


def test_wrong_runs(data: Path, tmp_path: Path) -> None:
    evaluate = ["evaluate", "--data", data, "--checkpoint"]
    assert "absent: expected the folder of a run; there is no such folder" in error(*evaluate, tmp_path / "absent")
    folder = write_run(tmp_path / "mine")
    (folder / "best.safetensors").write_bytes(b"damaged")
    assert "best.safetensors: not a .safetensors file" in error(*evaluate, folder)
    (folder / "best.safetensors").unlink()
    assert "no best.safetensors" in error(*evaluate, folder)
    assert "--flip-test: is for --checkpoint" in error("evaluate", "--features", "f.npz", "--flip-test")
