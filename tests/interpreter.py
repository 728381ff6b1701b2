"""Triton's interpreter with products that a test can rely on, on any CPU, and with bfloat16.

The interpreter multiplies with NumPy. OpenBLAS adds the terms of an element in an order that depends on its column
(with its Haswell and Zen kernels in two out of five sizes), so equal columns do not tie as they do on a GPU. NumPy has
no bfloat16: the interpreter multiplies the integers that hold it, and cuts float32 off where a GPU rounds.

It is also slower than it need be: it lists and replaces the members of ``triton.language`` for every call of a device
function, which was 40% of the time of a kernel, looks types up in a table that it builds for every look, and asks for
the overflow of integers in its own language. With all three mended a kernel takes a third of the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt


def mend() -> None:
    """Give the interpreter a dot whose sums have one order for every element, and products and rounding of bfloat16."""
    from triton import language as tl
    from triton.runtime import interpreter

    InterpreterBuilder = interpreter.InterpreterBuilder
    interpreter._get_np_dtype = _looked_up_once(interpreter._get_np_dtype)
    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _patched_once(interpreter._patch_lang, interpreter._LangPatchScope)
        interpreter._patch_attr = _call_straight(interpreter.interpreter_semantic)
    _keep_types(tl, interpreter.TritonSemantic)

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, value: Any, target: Any) -> Any:
        if value.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return type(value)(rounded_to_bfloat16(value.data), tl.bfloat16)
        return cast(self, value, target)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = _create_dot


def _looked_up_once(look: Callable[[Any], Any]) -> Callable[[Any], Any]:
    found: dict[str, Any] = {}

    def dtype_of(triton_type: Any) -> Any:
        name = triton_type.scalar.name
        if name not in found:
            found[name] = look(triton_type)
        return found[name]

    return dtype_of


_ON_INTEGERS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _check_overflow(self: Any, a: Any, b: Any, operation: Callable[..., Any]) -> None:
    kind = a.type.scalar
    if kind.int_bitwidth < 64:
        exact = _ON_INTEGERS[operation.__name__](a.handle.data.astype(np.int64), b.handle.data.astype(np.int64))
        assert kind.get_int_min_value() <= exact.min(), f"{kind}: {operation.__name__} overflows"
        assert exact.max() <= kind.get_int_max_value(), f"{kind}: {operation.__name__} overflows"


def _keep_types(tl: Any, semantic: type) -> None:
    """Shapes and types, of which a kernel has a few dozen, are made once; values of equal shape need no broadcasting.

    What is kept is what Triton made; what it refuses, it refuses each time.
    """
    core = tl.core
    make_block, make_tensor = core.block_type.__init__, core.tensor.__init__
    equal, broadcast = core.dtype.__eq__, semantic.broadcast_impl_value
    blocks: dict[Any, dict[str, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        kind = element_ty.name, getattr(element_ty, "address_space", None), sizes
        if kind not in blocks or not all(type(size) is int for size in sizes):
            make_block(self, element_ty, shape)
            blocks[kind] = {**vars(self), "of_elements": {}}
        vars(self).update(blocks[kind])

    def with_element_ty(self: Any, element_ty: Any) -> Any:
        kind = element_ty.name, getattr(element_ty, "address_space", None)
        if kind not in self.of_elements:
            self.of_elements[kind] = core.block_type(element_ty, self.shape)
        return self.of_elements[kind]

    shapes: dict[Any, tuple[Any, Any]] = {}

    def tensor(self: Any, handle: Any, type: Any) -> None:
        found = vars(type).get("of_tensor")
        if found is None:
            make_tensor(self, handle, type)
            sizes = tuple(type.shape) if type.is_block() else ()
            found = type.of_tensor = *shapes.setdefault(sizes, (self.shape, self.numel)), self.dtype
        self.handle, self.type = handle, type
        self.shape, self.numel, self.dtype = found

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    core.block_type.__init__ = block_type
    core.block_type.with_element_ty = with_element_ty
    core.block_type.to_ir = lambda self, builder: self  # the interpreter's builder made an equal one
    core.tensor.__init__ = tensor
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    semantic.broadcast_impl_value = broadcast_impl_value
    semantic.computation_type_impl = functools.cache(semantic.computation_type_impl)
    semantic.scalar_constant = functools.lru_cache(4096, typed=True)(semantic.scalar_constant)
    # A tuple's type is asked for when it is an argument or a result, not for every shape.
    core.tuple.type = late = functools.cached_property(lambda self: core._type_for_tuple_values(self.values))
    late.__set_name__(core.tuple, "type")

    def tuple_of(self: Any, args: Any, type: Any = None) -> None:
        self.values = list(args)
        if type is not None:
            self.type = type if isinstance(type, core.tuple_type) else core.tuple_type(type)

    core.tuple.__init__ = tuple_of


def _call_straight(semantic: Any) -> Callable[..., None]:
    """What a kernel calls of ``triton.language`` leads to the function itself, without two more calls around it."""

    def patch(module: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)

        def straight(*arguments: Any, _semantic: Any = None, **options: Any) -> Any:
            return function(*arguments, **options, _semantic=semantic)

        scope.set_attr(module, name, straight)

    return patch


def _patched_once(patch: Callable[[Any], Any], scope: type) -> Callable[[Any], Any]:
    """`patch`, which replaces what a function's module sees of ``triton.language``, once for each launch."""
    from triton import language as tl

    launches: list[tuple[Any, set[int]]] = []  # the scope of the launch that runs, and the modules replaced for it

    @functools.cache
    def seen_by(function: Any) -> frozenset[int]:
        return frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)

    def of_launch(function: Any) -> Any:
        if launches:
            outer, replaced = launches[-1]
            if not seen_by(function) <= replaced:
                outer._changes += patch(function)._changes  # restored with the others when the launch ends
                replaced |= seen_by(function)
            return scope()
        outer = patch(function)
        launches.append((outer, set(seen_by(function))))
        restore = outer.restore

        def end_of_launch() -> None:
            launches.clear()
            restore()

        outer.restore = end_of_launch
        return outer

    return of_launch


def _create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    product = dot(_numbers(a), _numbers(b), d.data.dtype)
    return type(a)(product + d.data, d.dtype.scalar)


def dot(a: npt.NDArray[Any], b: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """a @ b, each element by one loop over the shared axis.

    einsum takes this loop where both operands lie along it. 64×64×32: 32 µs, OpenBLAS 11, a loop over k in Python 180.
    """
    columns = np.ascontiguousarray(np.swapaxes(b, -1, -2), dtype=dtype)
    return np.einsum("...ik,...jk->...ij", np.ascontiguousarray(a, dtype=dtype), columns)


def rounded_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves of the nearest bfloat16 numbers, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits + (0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def _numbers(handle: Any) -> npt.NDArray[Any]:
    """The values of a handle; bfloat16 is the upper half of a float32."""
    from triton import language as tl

    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    values: npt.NDArray[Any] = handle.data
    return values
