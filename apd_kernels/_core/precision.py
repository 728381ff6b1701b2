"""How precisely float32 products are taken on tensor cores; the one place where PyTorch's switch is read."""

from __future__ import annotations

import torch

from apd_kernels._core.checks import check_choice
from apd_kernels._core.compiler import constant_in_graphs

PRECISIONS = ("fp32", "tf32", "bf16")
_OF_SWITCH = {
    "ieee": "fp32",
    "highest": "fp32",
    "none": "fp32",
    "tf32": "tf32",
    "high": "tf32",
    "bf16": "bf16",
    "medium": "bf16",
}


def resolve_precision(precision: str | None) -> str:
    """``"fp32"``, ``"tf32"`` or ``"bf16"``: the argument, or PyTorch's matmul switch where it is None."""
    if precision is not None:
        check_choice("precision", precision, PRECISIONS)
        return precision
    return _switch()


@constant_in_graphs
def _switch() -> str:
    # The legacy getter raises once the new API has been used, so the new one is asked first.
    switch = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if switch == "none":
        try:
            switch = torch.get_float32_matmul_precision()
        except RuntimeError:
            switch = "none"
    return _OF_SWITCH[switch]
