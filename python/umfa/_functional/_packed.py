"""Tensors that hold query, key and value, or key and value, side by side."""

from __future__ import annotations

from typing import Any

from .._errors import message
from .._ext import Function, integer
from .._frameworks import Framework, framework_of, shape_of


def _sliceable(function: Function, name: str, packed: Any) -> tuple[Any, Framework]:
    given = {name: packed}
    framework = framework_of(function.name, given)
    packed = given[name]
    if not hasattr(type(packed), "__getitem__"):
        raise TypeError(
            message(
                function.name,
                f"{name} cannot be sliced into its parts",
                type(packed).__qualname__,
                "a tensor with __getitem__ and shape",
            )
        )
    return packed, framework


def slices(
    function: Function, name: str, packed: Any, count: int, dimension: int, layout: str
) -> list[Any]:
    """The `count` slices of `packed` along `dimension`, the third from the end."""
    packed, framework = _sliceable(function, name, packed)
    shape = shape_of(packed) or ()
    try:
        if len(shape) != dimension + 3 or shape[dimension] != count:
            raise ValueError(message(function.name, f"{name} has the wrong shape", shape, layout))
        return [packed[(slice(None),) * dimension + (i,)] for i in range(count)]
    except (RuntimeError, ValueError):
        # Nested, sparse and other tensors without strides have shapes and slices of their own, or
        # none: the reason is that they are such.
        framework.export(packed, function.name, name)
        raise


def head_groups(function: Function, name: str, packed: Any, num_heads_q: Any) -> list[Any]:
    """Queries, keys and values that share the dimension of heads, the second from the end."""
    packed, _ = _sliceable(function, name, packed)
    heads = packed.shape[-2]
    expected = f"1 to {heads - 2}, so that as many heads of keys as of values are left"
    queries = integer(function.name, "num_heads_q", num_heads_q, expected)
    if not 0 < queries < heads or (heads - queries) % 2:
        raise ValueError(
            message(function.name, f"num_heads_q does not fit {heads} heads", queries, expected)
        )
    middle = (heads + queries) // 2
    bounds = ((0, queries), (queries, middle), (middle, heads))
    return [packed[..., first:last, :] for first, last in bounds]
