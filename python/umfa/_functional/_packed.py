"""Tensors that hold query, key and value, or key and value, side by side."""

from __future__ import annotations

from typing import Any

from .._errors import message
from .._ext import Function
from .._frameworks import framework_of, shape_of


def slices(
    function: Function, name: str, packed: Any, count: int, dimension: int, layout: str
) -> list[Any]:
    """The `count` slices of `packed` along `dimension`, the third from the end."""
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
