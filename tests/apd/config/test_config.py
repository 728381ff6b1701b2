"""Configurations: what a file and a ``key=value`` may say, what is refused and how, and what is shown of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")

import yaml

from apd.cli.config_display import print_config
from apd.config.files import load_config, save_config, shipped_configs
from apd.config.values import OURS, PAPER, SETTINGS, TRANSREID, Config, advice, check, value_of
from apd.errors import InputError

SHIPPED = ("cpu", "demo", "market", "paper", "small")


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _error(file: Path | str | None, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The values themselves


@pytest.mark.parametrize("key", SETTINGS)
def test_every_value_is_explained(key: str) -> None:
    setting = SETTINGS[key]
    assert setting.help
    assert setting.source in (PAPER, TRANSREID, OURS)
    assert not setting.choices or setting.default in setting.choices


@pytest.mark.parametrize("key", [key for key, setting in SETTINGS.items() if setting.type in (int, float)])
def test_every_number_has_a_range(key: str) -> None:
    with pytest.raises(InputError, match=rf"^{key}: expected "):
        check(_changed(key, math.nan if SETTINGS[key].type is float else -1))


def _changed(key: str, value: Any) -> Config:
    section, _, name = key.rpartition(".")
    if not section:
        return dataclasses.replace(Config(), **{name: value})
    return dataclasses.replace(Config(), **{section: dataclasses.replace(getattr(Config(), section), **{name: value})})


# Shipped


def test_shipped() -> None:
    assert tuple(shipped_configs()) == SHIPPED
    assert load_config("market") == Config()  # it says what the defaults are
    assert load_config(None) == Config()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_is_sound(name: str) -> None:
    config = load_config(name)
    assert advice(config) == []
    assert load_config(shipped_configs()[name]) == config
    assert load_config(name, ["seed=5"]) == dataclasses.replace(config, seed=5)


def test_cpu_and_demo_are_small() -> None:
    for name, size, dim, steps, lr in (("cpu", (128, 64), 192, 2000, 1e-3), ("demo", (64, 32), 96, 600, 1e-3)):
        config = load_config(name)
        assert (config.data.height, config.data.width) == size
        assert (config.model.embed_dim, config.model.pretrained, config.train.steps) == (dim, "none", steps)
        assert (config.train.lr, config.train.weight_decay, config.train.clip) == (lr, 0.05, 1.0)


def test_a_file_named_like_a_shipped_one_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert load_config("demo").data.height == 64  # a folder is none
    _written(tmp_path / "cpu", "seed: 9")
    assert load_config("cpu") == dataclasses.replace(Config(), seed=9)


# Round trip


def _every_value_changed() -> Config:
    changed = {
        "data": {"height": 192, "width": 96, "flip": 1 / 3, "pad": 0, "erasing": 1e-17, "train_on": "original"},
        "mpg": {"lr": 2.2250738585072014e-308, "trunk": "random:resnet50", "weight_mp": 1e22, "steps": 10**12},
        "model": {"pretrained": "a: b # c é.pt", "patch_size": 8, "embed_dim": 96, "heads": 3, "ssd": "none"},
        "loss": {"margin": 0.1 + 0.2, "triplets": "own", "weight_k": 1e-05},
        "latent": {"epsilon": 1e16},
        "train": {"steps": 7, "clip": 1.0, "batch_size": 6, "instances": 3, "optimizer": "adamw"},
    }
    config = Config(seed=2**32 - 1, perturbation="none", precision="bf16")
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in changed.items()}
    )


@pytest.mark.parametrize("config", [Config(), _every_value_changed(), *map(load_config, SHIPPED)])
def test_round_trip(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config
    # Other programs, which read YAML 1.1, find the same and all of it.
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == dataclasses.asdict(config)
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("text", ["1e5", "no", "0x10", "1:30", "true", "5", "~", "2020-01-01", " a ", "'", "x  y" * 40])
def test_text_stays_text(text: str, tmp_path: Path) -> None:
    """Also text that looks like something else; in an override a file's name needs no quotes."""
    config = _changed("mpg.trunk_weights", text)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["mpg"]["trunk_weights"] == text
    if text not in ("~", " a "):
        assert load_config(None, [f"mpg.trunk_weights={text}"]) == config
    assert load_config(None, [f'mpg.trunk_weights="{text}"']) == config


# Values


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.lr=0.001", 0.001),
        ("train.lr=1e-3", 1e-3),
        ("train.lr=1E-3", 1e-3),
        ("train.lr=.5", 0.5),
        ("train.lr=5.", 5.0),
        ("train.lr=1", 1.0),
        ("train.lr = 0.25", 0.25),
        ("model.msp_bias_init=-2", -2.0),
        ("model.msp_bias_init=-2.5e0", -2.5),
        ("mpg.steps=20_000", 20000),
        ("train.steps=none", None),
        ("train.steps=null", None),
        ("train.steps=", None),
        ("train.clip=None", None),
        ("loss.margin=0.3", 0.3),
        ("data.cache=true", True),
        ("data.cache=False", False),
        ("precision=no", "no"),
        ("perturbation=none", "none"),
        ("model.pretrained=none", "none"),
        ("model.pretrained=weights #1=best: [x].pt", "weights #1=best: [x].pt"),
        ("mpg.trunk_weights=none", None),
    ],
)
def test_scalars(override: str, value: Any, tmp_path: Path) -> None:
    key, _, text = (part.strip() for part in override.partition("="))
    found = value_of(load_config(None, [override]), key)
    assert (type(found), found) == (type(value), value)
    section, _, name = key.rpartition(".")
    if "#" not in text:
        nested = f"{section}: {{{name}: {text}}}" if section else f"{name}: {text}"
        found = value_of(load_config(_written(tmp_path / "c.yaml", nested)), key)
        assert (type(found), found) == (type(value), value)


def test_overrides_are_on_top_of_the_file_and_the_last_counts(tmp_path: Path) -> None:
    path = _written(tmp_path / "c.yaml", "seed: 3\ntrain:\n  lr: 1e-3  # a float\n  batch_size: 32\nloss:\n  # none\n")
    config = load_config(path, ["train.lr=0.1", "train.lr=0.2", "data.pad=2"])
    assert (config.seed, config.train.lr, config.train.batch_size, config.data.pad) == (3, 0.2, 32, 2)
    assert load_config(path).train.lr == 1e-3
    assert load_config(str(path)).train.instances == 4


# What is refused


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("train.lrr", "did you mean train.lr?"),
        ("TRAIN.LR", "did you mean train.lr?"),
        ("Seed", "did you mean seed?"),
        ("LR", "did you mean mpg.lr or train.lr?"),
        ("trunk", "did you mean mpg.trunk?"),
        ("trnk", "did you mean mpg.trunk?"),
        ("lr", "did you mean mpg.lr or train.lr?"),
        ("steps", "did you mean mpg.steps, latent.steps or train.steps?"),
        ("data.trunk", "did you mean mpg.trunk?"),
        ("trian.lr", "did you mean train.lr?"),
        ("modl.head", "did you mean model.heads?"),
        ("train.weight_mp", "did you mean mpg.weight_mp?"),
        ("mpg.widht", "did you mean mpg.width?"),
        ("optimiser", "did you mean train.optimizer?"),
        ("sed", "did you mean seed?"),
        ("trian", "did you mean train?"),
        ("xyzzy", "`apd config show` lists every key"),
    ],
)
def test_unknown_keys(key: str, hint: str, tmp_path: Path) -> None:
    assert _error("cpu", f"{key}=1") == f"{key}: unknown; {hint}"
    section, _, name = key.rpartition(".")
    path = _written(tmp_path / "c.yaml", f"{section}: {{{name}: 1}}" if section else f"{key}: 1")
    if not section or section in ("train", "mpg", "data"):
        assert _error(path) == f"{path}: {key}: unknown; {hint}"
    else:  # the section is what is unknown
        assert _error(path).startswith(f"{path}: {section}: unknown; did you mean ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=1.5", "train.steps: expected an integer or none, got 1.5"),
        ("mpg.steps=1e3", "mpg.steps: expected an integer, got 1000.0"),
        ("mpg.steps=none", "mpg.steps: expected an integer, got 'none'"),
        ("mpg.steps=", "mpg.steps: expected an integer, got null"),
        ("mpg.steps=true", "mpg.steps: expected an integer, got true"),
        ("mpg.steps=010", "mpg.steps: expected an integer, got '010'"),
        ("train.lr=fast", "train.lr: expected a number, got 'fast'"),
        ("train.lr=true", "train.lr: expected a number, got true"),
        ("train.lr=1:30", "train.lr: expected a number, got '1:30'"),
        ("train.lr=.nan", "train.lr: expected more than 0, got nan"),
        ("train.lr=.inf", "train.lr: expected more than 0, got inf"),
        ("data.cache=yes", "data.cache: expected true or false, got 'yes'"),
        ("data.cache=1", "data.cache: expected true or false, got 1"),
        ("mpg.trunk=", "mpg.trunk: expected text, got null"),
        ("mpg.trunk=''", "mpg.trunk: expected text, got ''"),
        ("model.ssd=SPS", "model.ssd: expected one of none, msp, sds, sps, got 'SPS'"),
        ("train.optimizer=adam", "train.optimizer: expected one of sgd, adamw, got 'adam'"),
        ("precision=fp32", "precision: expected one of no, bf16, fp16, got 'fp32'"),
        ("seed=-1", "seed: expected from 0 to 2³² − 1, got -1"),
        ("seed=4294967296", "seed: expected from 0 to 2³² − 1, got 4294967296"),
        ("data.height=0", "data.height: expected at least 1, got 0"),
        ("data.pad=128", "data.pad: expected less than data.width (128), got 128"),
        ("data.flip=1.1", "data.flip: expected from 0 to 1, got 1.1"),
        ("data.erasing=-0.1", "data.erasing: expected from 0 to 1, got -0.1"),
        ("model.drop_path=1", "model.drop_path: expected from 0 to less than 1, got 1.0"),
        ("loss.weight_nk=-1", "loss.weight_nk: expected at least 0, got -1.0"),
        ("loss.margin=-0.3", "loss.margin: expected at least 0, got -0.3"),
        ("train.steps=-1", "train.steps: expected at least 0, got -1"),
        ("mpg.batch_size=1", "mpg.batch_size: expected at least 2, got 1"),
        ("train.instances=1", "train.instances: expected at least 2, got 1"),
        ("train.clip=0", "train.clip: expected more than 0, got 0.0"),
        ("data.width=126", "data.width: expected a multiple of 4, since the generator halves images twice, got 126"),
        ("mpg.trunk=random", "mpg.trunk: expected auto, self, a timm name or random:NAME, got 'random'"),
        (
            "train.accumulate=3",
            "train.accumulate: expected a divisor of the 16 identities of a step, 2 or more in a part, got 3",
        ),
        (
            "train.accumulate=16",
            "train.accumulate: expected a divisor of the 16 identities of a step, 2 or more in a part, got 16",
        ),
        ("data.jitter_hue=0.6", "data.jitter_hue: expected from 0 to 0.5, got 0.6"),
        (
            "train.batch_size=62",
            "train.batch_size: expected a multiple of train.instances (4) for at least 2 identities, got 62",
        ),
        (
            "train.batch_size=4",
            "train.batch_size: expected a multiple of train.instances (4) for at least 2 identities, got 4",
        ),
        (
            "model.embed_dim=96",
            "model.embed_dim: expected none with model.pretrained=timm, whose weights fit the backbone's own sizes "
            "only, got 96",
        ),
    ],
)
def test_values(override: str, message: str, tmp_path: Path) -> None:
    assert _error(None, override) == message
    key, _, text = override.partition("=")
    section, _, name = key.rpartition(".")
    path = _written(tmp_path / "c.yaml", f"{section}:\n  {name}: {text}\n" if section else f"{key}: {text}\n")
    assert _error(path) == f"{path}: {message}"
    assert _error("market", override) == message  # the file is not to blame


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.patch_size=12"], "data.height: expected a multiple of model.patch_size (12), got 128"),
        (["data.width=40"], "data.width: expected a multiple of model.patch_size (16), got 40"),
        (["model.heads=5"], "model.embed_dim: expected a multiple of model.heads (5), got 192"),
        (
            ["mpg.trunk=random:resnet50", "mpg.trunk_weights=w.pt"],
            "mpg.trunk_weights: expected none with mpg.trunk=random:resnet50, which is untrained, got 'w.pt'",
        ),
    ],
)
def test_values_that_exclude_each_other(overrides: list[str], message: str) -> None:
    assert _error("cpu", *overrides).endswith(message)


def test_sizes_are_free_where_nothing_depends_on_them() -> None:
    load_config("cpu", ["perturbation=none", "model.patch_size=15", "data.height=135", "data.width=45"])
    load_config("cpu", ["model.pretrained=own.pt"])  # a file may hold weights of any size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected keys with values, such as 'seed: 0', got nothing"),
        ("# only a comment\n", "expected keys with values, such as 'seed: 0', got nothing"),
        ("- seed\n", "expected keys with values, such as 'seed: 0', got a list"),
        ("seed\n", "expected keys with values, such as 'seed: 0', got 'seed'"),
        ("seed: 1\ntrain:\n  lr: 1\n  clip: 2\n  lr: 3\n", "line 5: lr is given twice"),
        ("train:\n  lr: 1\nseed: 1\ntrain:\n  clip: 3\n", "line 4: train is given twice"),
        ("train: 5\n", "train: expected a section with keys of its own, got 5"),
        ("train: [lr]\n", "train: expected a section with keys of its own, got a list"),
        ("train.lr: 5\n", "train.lr: expected lr inside of the section train"),
        ("train:\n  lr: [1]\n", "train.lr: expected a number, got a list"),
        ("seed: {a: 1}\n", "seed: expected an integer, got a section"),
        ("mpg: {trunk: 5}\n", "mpg.trunk: expected text, got 5"),
        ("1: 2\n", "1: unknown; `apd config show` lists every key"),
        ("seed: [1\n", "line 2: expected ',' or ']', but got '<stream end>'"),
        ("seed: 1\n\ttrain: 2\n", "line 2: found character '\\t' that cannot start any token"),
        ("seed: !!python/object/apply:os.getcwd []\n", "line 1: could not determine a constructor for the tag"),
        ("seed: 1\n---\nseed: 2\n", "line 2: but found another document"),
        ("seed: " + "[" * 5000, "not YAML: "),
        ("seed: " + "1" * 5000, "not YAML: "),
        ("a: \x00", "not YAML: "),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    path = _written(tmp_path / "c.yaml", text)
    assert _error(path).startswith(f"{path}: {message}")


def test_files_that_are_none(tmp_path: Path) -> None:
    assert _error(tmp_path) == f"{tmp_path}: expected a file, found a folder"
    assert _error("cqu") == (
        "cqu: no such file, and the configurations shipped are cpu, demo, market, paper, small; did you mean cpu?"
    )
    absent = tmp_path / "absent.yaml"
    assert (
        _error(absent) == f"{absent}: no such file, and the configurations shipped are cpu, demo, market, paper, small"
    )
    (tmp_path / "latin1.yaml").write_bytes(b"model: {backbone: \xe9}")
    assert _error(tmp_path / "latin1.yaml").startswith(f"{tmp_path / 'latin1.yaml'}: not YAML: ")


def test_wrong_overrides() -> None:
    assert _error(None, "train.lr") == "train.lr: expected key=value, for example train.lr=1e-3"
    assert _error(None, "train=5") == "train: is a section; expected train.KEY=value"
    assert _error(None, "mpg.steps=" + "1" * 5000).startswith("mpg.steps: expected an integer, got '111")


# Advice


@pytest.mark.parametrize(
    ("overrides", "begins"),
    [
        (["model.pretrained=none"], "train.optimizer=sgd is the recipe for pretrained weights"),
        (["train.optimizer=adamw"], "train.lr=0.008 is the default of sgd"),
        (["train.epochs=5"], "train.warmup_epochs=5 of train.epochs=5: the learning rate still grows"),
        (["perturbation=latent", "data.train_on=synthesized"], "data.train_on=synthesized: perturbation=latent"),
        (["mpg.trunk=random:resnet50"], "mpg.trunk=random:resnet50: ψ and φ are untrained"),
    ],
)
def test_advice(overrides: list[str], begins: str) -> None:
    (line,) = advice(load_config(None, overrides))
    assert line.startswith(begins)


def test_no_advice_where_none_is_due() -> None:
    for overrides in (
        ["model.pretrained=none", "train.optimizer=adamw", "train.lr=5e-4"],
        ["perturbation=none", "mpg.trunk=random:resnet50"],
        ["train.epochs=1", "train.steps=5000"],
        ["data.train_on=synthesized"],
    ):
        assert advice(load_config(None, overrides)) == []


# apd config show


@pytest.mark.parametrize("name", [None, *SHIPPED])
def test_show_in_a_pipe(name: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One whole line for every value, whatever the width."""
    monkeypatch.setenv("COLUMNS", "40")
    config = load_config(name)
    print_config(config, name)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    lines = {line.split()[0]: line for line in printed.splitlines() if line and line.split()[0] in SETTINGS}
    assert list(lines) == list(SETTINGS)
    for key, setting in SETTINGS.items():
        value = value_of(config, key)
        assert setting.help in lines[key]
        assert lines[key].endswith(f"{setting.source})")
        assert all(choice in lines[key] for choice in setting.choices)
        written = str(value).lower() if value is None or isinstance(value, bool) else str(value)
        assert lines[key].split()[1] == written
        assert ("(default " in lines[key]) == (value != setting.default)
    assert load_config(None, [f"{key}={line.split()[1]}" for key, line in lines.items()]) == config


@pytest.mark.parametrize("width", [80, 120])
def test_show_on_a_terminal(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_config(load_config("demo", ["perturbation=none", "train.optimizer=sgd"]), "demo")
    printed = capsys.readouterr().out
    assert "\x1b[1m64" in printed
    assert "\x1b[1mpaper" not in printed
    plain = printed.replace("\x1b[0m", "").replace("\x1b[1m", "").replace("\x1b[2m", "")
    assert max(map(len, plain.splitlines())) <= width
    assert " ".join(SETTINGS["mpg.trunk"].help.split()) in " ".join(plain.split())
    assert "note: train.optimizer=sgd is the recipe for pretrained weights" in " ".join(plain.split())
