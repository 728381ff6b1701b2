"""One route from Python to an implementation: an operator in the library ``apd_kernels``.

An operator is defined by its function in ``apd_kernels/reference/<module>.py``: name, arguments and results are that
function's. A last argument names the backend: ``"torch"`` runs that function, ``"triton"`` the one of the same name in
``apd_kernels/kernels/<module>.py``. So `torch.compile`, `opcheck` and CUDA graphs see one opaque call per operation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from apd_kernels._core.backend import implementation

NAMESPACE = "apd_kernels"
_NOTHING_TO_DO: AbstractContextManager[Any] = nullcontext()
_library = torch.library.Library(NAMESPACE, "DEF")


def operator(
    function: Callable[..., Any], *, fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """Define ``apd_kernels::<name>`` from a function of ``apd_kernels/reference`` and return the operator's overload.

    Args:
        function: its annotations give the schema. A named tuple (`Operands`, `Pairing`) is one argument of the function
            and one for each field of the operator: a ``Tensor[]`` costs 0.1 ms a call in autograd.
        fake: shapes and dtypes of the results; takes the operator's arguments by name, without the backend.
        mutates: arguments that are written to.
    """
    module, name = function.__module__.rpartition(".")[2], function.__name__
    names, schema, bundles = _signature(function, mutates)

    def body(*arguments: Any) -> Any:
        *inputs, backend = arguments
        for start, kind in bundles:
            inputs[start : start + len(kind._fields)] = [kind(*inputs[start : start + len(kind._fields)])]
        run = function if backend == "torch" else getattr(implementation(backend, module), name)
        with implementation_context(inputs[0], backend):
            return run(*inputs)

    def shapes(*arguments: Any) -> Any:
        return fake(**dict(zip(names, arguments[:-1], strict=True)))

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, body, "CompositeExplicitAutograd")  # every device: those without kernels take PyTorch
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=_library)
    overload: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return overload


def _signature(
    function: Callable[..., Any], mutates: tuple[str, ...]
) -> tuple[list[str], str, list[tuple[int, type[Any]]]]:
    """The operator's arguments, its schema, and where named tuples start, each counted after those before it."""
    hints = get_type_hints(function)
    fields: list[tuple[str, Any]] = []
    bundles = []
    for place, name in enumerate(inspect.signature(function).parameters):
        if hasattr(hints[name], "_fields"):
            bundles.append((place, hints[name]))
            fields += get_type_hints(hints[name]).items()
        else:
            fields.append((name, hints[name]))
    aliases = dict(zip(mutates, "abcdefgh", strict=False))
    arguments = [f"{_schema_type(kind, aliases.get(name))} {name}" for name, kind in fields]
    results = hints["return"]
    kinds = get_args(results) if getattr(results, "__origin__", None) is tuple else (results,)
    returned = ", ".join(_schema_type(kind) for kind in kinds if kind is not type(None))
    returned = returned if kinds == (results,) and returned else f"({returned})"
    schema = f"{function.__name__}({', '.join([*arguments, 'str backend'])}) -> {returned}"
    return [name for name, _ in fields], schema, bundles


def _schema_type(kind: Any, alias: str | None = None) -> str:
    """``Tensor | None`` is ``Tensor?``, ``list[Tensor]`` is ``Tensor[]``; what is written to gets its alias."""
    parts = get_args(kind)
    if type(None) in parts:
        return f"{_schema_type(next(part for part in parts if part is not type(None)))}?"
    if getattr(kind, "__origin__", None) is list:
        return f"{_schema_type(parts[0])}[]"
    return f"Tensor({alias}!)" if alias else str(kind.__name__)


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
