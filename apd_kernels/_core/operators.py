"""One route from Python to an implementation: an operator in the library ``apd_kernels``.

An operator's last argument is the backend's name; its body is the function of the same name in
``apd_kernels/kernels/<module>.py`` or ``apd_kernels/reference/<module>.py``. Both take the operator's other arguments
and return what its fake returns. So `torch.compile`, `opcheck` and CUDA graphs see one opaque call per operation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from apd_kernels._core.backend import implementation

NAMESPACE = "apd_kernels"
_NOTHING_TO_DO: AbstractContextManager[Any] = nullcontext()
_library = torch.library.Library(NAMESPACE, "DEF")


def operator(
    module: str, schema: str, *, fake: Callable[..., Any], grouped: tuple[type[Any], ...] = ()
) -> Callable[..., Any]:
    """Define ``apd_kernels::<name>`` from `schema` (whose last argument is ``str backend``) and return its overload.

    Args:
        module: file name, without ``.py``, that holds the implementations under kernels/ and reference/.
        schema: as in ``torch.library.define``, name included.
        fake: shapes and dtypes of the results; takes the operator's arguments.
        grouped: named tuples, in the order of the schema, whose ``schema()`` is part of it: the implementation takes
            each as one argument. (An operator takes them one by one: a ``Tensor[]`` costs 0.1 ms a call in autograd.)
    """
    name, _, parameters = schema.partition("(")
    places = [(parameters.partition(kind.schema())[0].count(","), kind) for kind in grouped]

    def body(*arguments: Any) -> Any:
        *inputs, backend = arguments
        for start, kind in reversed(places):
            stop = start + len(kind._fields)
            inputs[start:stop] = [kind(*inputs[start:stop])]
        function = getattr(implementation(backend, module), name)
        with implementation_context(inputs[0], backend):
            return function(*inputs)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, body, "CompositeExplicitAutograd")  # every device: those without kernels take PyTorch
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    overload: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return overload


def implementation_context(x: Tensor, backend: str) -> AbstractContextManager[Any]:
    """What an implementation may rely on: no autocast of its products, and x's GPU current for Triton's launches."""
    device = x.device
    autocast = torch.is_autocast_enabled(device.type)
    elsewhere = backend == "triton" and x.is_cuda and device.index != torch.cuda.current_device()
    if not autocast and not elsewhere:
        return _NOTHING_TO_DO
    stack = ExitStack()
    if autocast:
        stack.enter_context(torch.autocast(device.type, enabled=False))
    if elsewhere:
        stack.enter_context(torch.cuda.device_of(x))
    return stack


def differentiable(
    overload: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> None:
    """Register the derivative of an operator; `backward` calls operators itself, so it is compiled like the forward.

    `torch.library.register_autograd`, which serves operators that take lists, registers the same, but reads the whole
    schema again for each argument of a call (to fill in defaults; there are none here): 0.1 ms for the twenty of
    `triplet_loss`, as much as a small batch's work.
    """
    name = overload.name()  # type: ignore[attr-defined]
    if "Tensor[]" in str(overload._schema):  # type: ignore[attr-defined]
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_library)
        return

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            *inputs, keyset = arguments
            output = _below_autograd(overload, keyset, inputs)
            setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return *backward(ctx, *gradients), None  # nothing for the keyset

    def autograd(keyset: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
            return Derivative.apply(*inputs, keyset)
        return _below_autograd(overload, keyset, inputs)

    _library.impl(name.partition("::")[2], autograd, "Autograd", with_keyset=True)


def _below_autograd(overload: Any, keyset: Any, inputs: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


def first_derivatives_only(overload: Callable[..., Any]) -> None:
    """Mark an operator that computes a derivative: differentiating it again is an error, not a silent zero."""
    name = overload.name()  # type: ignore[attr-defined]

    def refuse(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{name}: first derivatives only; it cannot be differentiated again")

    torch.library.register_autograd(name, refuse, lib=_library)


def internal_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 inputs: what distances and losses are computed and returned in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
