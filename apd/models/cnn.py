"""A timm CNN as a sequence of its modules, to be cut after a stage, and its batch norms with statistics by branch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apd.errors import InputError

CONTENT_REDUCTION = 8  # φ's, and where SSD works unless model.stage says otherwise: the paper's stage 2


class Steps(NamedTuple):
    """A CNN's `forward_features` as modules called one after the other, by name."""

    names: tuple[str, ...]
    stage: int  # modules up to the stage that ends in the map F, that one included
    content: int | None  # and up to the map at reduction 8
    channels: int  # of F
    dim: int  # of the pooled end


def stage_at(cnn: Any, reduction: int) -> str | None:
    """The name of the last module whose map has a reduction, as timm lists them."""
    found = [info["module"] for info in getattr(cnn, "feature_info", ()) if info["reduction"] == reduction]
    return found[-1] if found else None


@torch.no_grad()
def find_steps(cnn: Any, name: str, stage: str | None, size: tuple[int, int]) -> Steps:
    """The steps of a CNN, found by watching it work and checked by repeating them.

    Args:
        cnn: the network; it is left as it was.
        name: its name, for the errors.
        stage: a module, by its dotted name; None for the last one at reduction 8.
        size: height and width of the images, pixels.

    Raises:
        InputError: it is no such CNN, or has no such stage.
    """
    content = stage_at(cnn, CONTENT_REDUCTION)
    wanted = stage if stage is not None else content
    if wanted is None:
        raise InputError(f"model.backbone: {name} has no stage at reduction {CONTENT_REDUCTION}; name a model.stage")
    modules = dict(_cut(cnn, "", wanted))
    training = cnn.training
    cnn.eval()
    try:
        images = torch.linspace(-1, 1, 3 * size[0] * size[1]).view(1, 3, *size)
        names, end = _watched(cnn, modules, images)
        if wanted not in names:
            stages = [info["module"] for info in getattr(cnn, "feature_info", ())]
            raise InputError(f"model.stage: expected a module of {name} such as {', '.join(stages)}, got {wanted!r}")
        maps = [images]
        for step in names:
            maps.append(modules[step](maps[-1]))
        f = cnn.forward_head(end)
        plain = all(isinstance(one, Tensor) and one.ndim == 4 for one in (*maps, end))
        if not plain or end.shape[1] != cnn.num_features or not torch.allclose(maps[-1], end):
            raise ValueError("its stages are no plain sequence of maps")
    except (AttributeError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        expected = f"a vision transformer, or a CNN that can be cut after {wanted}"
        raise InputError(f"model.backbone: expected {expected}, got {name}: {error}") from error
    finally:
        cnn.train(training)

    def after(module: str | None) -> int | None:
        return names.index(module) + 1 if module in names else None

    cut = after(wanted)
    assert cut is not None
    return Steps(tuple(names), cut, after(content), maps[cut].shape[1], f.shape[1])


def _cut(module: nn.Module, prefix: str, target: str) -> Iterator[tuple[str, nn.Module]]:
    """The children of a module by dotted name; one that has the target inside of it is cut into its own children."""
    for child, inner in module.named_children():
        path = prefix + child
        if target.startswith(f"{path}."):
            yield from _cut(inner, f"{path}.", target)
        else:
            yield path, inner


def _watched(cnn: Any, modules: dict[str, nn.Module], images: Tensor) -> tuple[list[str], Tensor]:
    """The modules in the order in which `forward_features` calls them, and its result."""
    called: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.append(name)) for name, module in modules.items()
    ]
    try:
        return called, cnn.forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def batch_norms(network: nn.Module) -> list[nn.Module]:
    """The layers whose result for an image depends on its batch."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def add_branch_statistics(norms: Sequence[nn.Module], branches: int) -> None:
    """Give batch norms running statistics for the branches 1 … `branches` − 1 as well; their own are branch 0's.

    They begin as copies of those.
    """
    for norm in norms:
        for name in _STATISTICS:
            for branch in range(1, branches):
                norm.register_buffer(f"{name}_{branch}", getattr(norm, name).clone())


def is_branch_statistic(name: str) -> bool:
    """Whether a tensor has the name of what `add_branch_statistics` adds."""
    own, _, branch = name.rpartition(".")[2].rpartition("_")
    return own in _STATISTICS and branch.isdigit()


@contextmanager
def statistics_of(norms: Sequence[nn.Module], branch: int) -> Iterator[None]:
    """Inside, batch norms use and update a branch's running statistics alone."""
    if branch == 0:
        yield
        return
    own = [{name: getattr(norm, name) for name in _STATISTICS} for norm in norms]
    try:
        for norm in norms:
            _set(norm, {name: getattr(norm, f"{name}_{branch}") for name in _STATISTICS})
        yield  # the norms write into the tensors in place
    finally:
        for norm, statistics in zip(norms, own, strict=True):
            _set(norm, statistics)


def _set(norm: nn.Module, statistics: dict[str, Tensor]) -> None:
    for name, tensor in statistics.items():
        setattr(norm, name, tensor)
