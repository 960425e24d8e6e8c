"""Tensors of any other library that speaks DLPack."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import _ext
from .._errors import message

METAL = 8  # DLPack's code of the device


def export(tensor: Any, function: str, argument: str, backend: str = "auto") -> Any:
    # Asked for here, not by the binding: a capsule that the producer keeps must be marked as used,
    # and what the producer raises must reach the caller.
    try:
        try:
            return tensor.__dlpack__(max_version=(1, 0))
        except TypeError:  # written before DLPack 1.0
            return tensor.__dlpack__()
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            message(function, f"{argument} does not give out its memory", error, "a DLPack tensor")
        ) from error


def allocate(
    like: Any, shape: tuple[int, ...], dtype: str, backend: str = "auto"
) -> tuple[Any, Any]:
    memory = _ext.empty(shape, dtype, "metal" if like.__dlpack_device__()[0] == METAL else "cpu")
    namespace = getattr(like, "__array_namespace__", None)
    return memory, (memory, None if namespace is None else namespace())


def finish(handle: Any) -> Any:
    """An array of the caller's library if it follows the array API standard, else bare DLPack."""
    memory, namespace = handle
    return memory if namespace is None else namespace.from_dlpack(memory)


call = None
recorded = None


def to_host(tensor: Any, function: str, argument: str) -> Any:
    return tensor


def check_writable(tensor: Any, function: str, argument: str) -> None:
    """Every such tensor may be."""


autodiff = None

autocast = None

in_stream = None
reads_later = None

draw_seed = None


def trains(tensors: Iterable[Any]) -> bool:
    return True


stand_ins = None


def mark_written(tensor: Any) -> None:
    """Nothing to be told."""
