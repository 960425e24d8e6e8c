"""Tensors of any other library that speaks DLPack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import _ext


def export(tensor: Any, function: str, argument: str) -> Any:
    return tensor


def allocate(like: Any, shape: tuple[int, ...], dtype: str | None) -> tuple[Any, Any]:
    memory = _ext.empty(shape, _ext.dtype_of(like) if dtype is None else dtype)
    namespace = getattr(like, "__array_namespace__", None)
    return memory, (memory, None if namespace is None else namespace())


def finish(handle: Any) -> Any:
    """An array of the caller's library if it follows the array API standard, else bare DLPack."""
    memory, namespace = handle
    return memory if namespace is None else namespace.from_dlpack(memory)


def call(compute: Callable[..., Any], function: str, *tensors: Any) -> Any:
    return compute(*tensors)
