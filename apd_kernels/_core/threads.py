"""Blocks of work on the cores of a CPU, each block on one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`work` of every item, in order; as many at once as PyTorch has threads, and each of them on one.

    A pass of many small operations over a block that stays in one core's cache beats every operation on all cores:
    those wait for each other thousands of times, and for whatever else the machine does.
    """
    every = list(items)
    inference = torch.is_inference_mode_enabled()

    def alone(item: Item) -> Result:
        # A thread of its own starts with gradients recorded and outside of inference mode.
        with torch.inference_mode(inference), torch.no_grad():
            return work(item)

    threads = min(torch.get_num_threads(), len(every))
    if threads <= 1:
        return [work(item) for item in every]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(alone, every))
