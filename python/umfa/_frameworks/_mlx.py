"""mlx arrays, evaluated eagerly (outside mx.compile and mx.vmap)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .. import _ext
from .._errors import UnsupportedError, message


def export(tensor: Any, function: str, argument: str) -> Any:
    try:
        mx.eval(tensor)
    except (RuntimeError, ValueError) as error:
        if "transformation" not in str(error):
            raise
        raise UnsupportedError(
            message(
                function,
                f"{argument} is being traced by mx.compile or mx.vmap",
                "a tracer",
                "an array with a value; call it outside the transform",
            )
        ) from None
    # On a Mac, mlx offers its unified memory as Metal; the CPU view is asked for by name.
    return tensor.__dlpack__(dl_device=(1, 0))


def allocate(like: Any, shape: tuple[int, ...], dtype: str) -> tuple[Any, Any]:
    memory = _ext.empty(shape, dtype)
    return memory, memory


def finish(handle: Any) -> Any:
    return mx.from_dlpack(handle)


def call(compute: Callable[..., Any], function: str, *tensors: Any) -> Any:
    # mlx cannot see through DLPack: without this, mx.grad would take the result for a constant and
    # return a gradient of zero.
    guarded = mx.custom_function(compute)

    def refuse(*_: Any) -> Any:
        raise UnsupportedError(
            message(
                function,
                "a derivative is asked for, and the backward pass is not implemented yet",
                "mx.grad, mx.vjp or mx.jvp",
                "a call outside of them",
            )
        )

    guarded.vjp(refuse)
    guarded.jvp(refuse)
    return guarded(*tensors)
