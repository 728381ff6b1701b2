"""Several processes that train one network, started by ``torchrun`` or ``accelerate launch``.

Each takes the images of its share of a step's identities through the network. Features are gathered, so that heads,
batch norms, mining and losses are those of the whole step, on every process the same. The first process alone writes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from apd.config.values import TrainConfig
from apd.console import console
from apd.errors import InputError
from apd.training.log import StageLog

# Stage 1, synthesis and validation are the first process's, and the others wait for it. Where it dies, the launcher
# ends them.
_PATIENCE = timedelta(days=7)
_Result = TypeVar("_Result")


def join(device: str) -> None:
    """Join the processes that a launcher has started; without one, nothing. Only the first one prints.

    Args:
        device: ``"cpu"`` (gloo) or ``"cuda"`` (NCCL, a GPU for each process).
    """
    PartialState(cpu=device == "cpu", timeout=_PATIENCE)
    if rank() > 0:
        console.quiet = True


def leave() -> None:
    """Part from them, at the end of the program."""
    if world_size() > 1:
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes train."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0, the first one, writes."""
    return dist.get_rank() if world_size() > 1 else 0


def on_first(work: Callable[[], _Result]) -> _Result:
    """What `work` returns, done by the first process alone, on all of them."""
    found: list[Any] = [work() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(found)
    return found[0]


def on_any(asked: bool) -> bool:
    """Whether any of the processes says so, as all of them know it.

    A collective on the CPU: no GPU is waited for.
    """
    if world_size() == 1:
        return asked
    found = torch.tensor(int(asked))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_on_cpu(dist.group.WORLD))
    return bool(found)


@functools.cache
def _on_cpu(world: Any) -> Any:
    return world if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=_PATIENCE)


def own_rows(config: TrainConfig) -> slice:
    """The rows of each batch that are this process's: whole identities.

    Raises:
        InputError: the identities of a step cannot be shared out evenly.
    """
    identities, shares = config.batch_size // config.instances, world_size() * config.accumulate
    if identities % shares:
        raise InputError(
            f"train.batch_size: expected identities ({identities}, {config.instances} images of each) for "
            f"{world_size()} processes × train.accumulate={config.accumulate}, a multiple of {shares}"
        )
    size = config.batch_size // world_size()
    return slice(rank() * size, (rank() + 1) * size)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over the processes, in one collective.

    `DistributedDataParallel` would overlap it with the backward pass, but knows one forward and one backward pass,
    which gradient caching is not.
    """
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


class Unlogged(StageLog):
    """The log of a process that writes none."""

    seconds = 0.0

    def __init__(self) -> None: ...

    def __enter__(self) -> Unlogged:
        return self

    def __exit__(self, *error: object) -> None: ...

    def due(self, step: int) -> bool:
        return False

    def step(self, step: int, values: dict[str, Tensor], **facts: float) -> None: ...
