"""jax arrays; _jax_autodiff.py has calls inside of jit, grad and vmap."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from .. import _ext
from .._errors import UnsupportedError, message
from . import _jax_autodiff, _numpy


def export(tensor: Any, function: str, argument: str, backend: str = "auto") -> Any:
    if isinstance(tensor, jax.core.Tracer):
        raise UnsupportedError(
            message(
                function,
                f"{argument} is being traced by jax.jit, grad or vmap",
                f"a {type(tensor).__name__}",
                "a concrete array; call it outside the transform",
            )
        )
    if tensor.is_deleted():
        raise ValueError(
            message(function, f"{argument} has been deleted", "no data", "a live array")
        )
    if len(tensor.devices()) != 1:
        raise UnsupportedError(
            message(
                function,
                f"{argument} is spread over several devices",
                sorted(str(device) for device in tensor.devices()),
                "an array on one device",
            )
        )
    return tensor.block_until_ready()


def allocate(
    like: Any, shape: tuple[int, ...], dtype: str, backend: str = "auto"
) -> tuple[Any, Any]:
    # jax arrays are immutable: the result is written outside and taken over without a copy.
    memory = _ext.empty(shape, dtype)
    return memory, (memory, like.sharding)


def finish(handle: Any) -> Any:
    memory, sharding = handle
    array = jax.dlpack.from_dlpack(memory)
    if array.sharding == sharding:
        return array
    # Copied before this returns. Otherwise a thread of XLA's frees the memory later, which ends the
    # process if Python is about to end (4 of 24 runs on a loaded machine).
    return jax.device_put(np.asarray(array), sharding, may_alias=False)


call = None
recorded = None


def to_host(tensor: Any, function: str, argument: str) -> Any:
    if isinstance(tensor, jax.core.Tracer):
        return tensor  # the custom call will read it
    return np.asarray(export(tensor, function, argument))


def check_writable(tensor: Any, function: str, argument: str) -> None:
    raise UnsupportedError(
        message(
            function,
            f"{argument} would have to be written in place, which jax arrays cannot be",
            "an immutable array",
            "tensors of torch or numpy, or results that are returned",
        )
    )


autodiff = _jax_autodiff

autocast = None

in_stream = None
reads_later = None

draw_seed = None


def trains(tensors: Iterable[Any]) -> bool:
    return True


def stand_ins(call: Any, tensors: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if not _jax_autodiff.applies(tensors.values()):
        return sys.modules[__name__], tensors
    shown = _jax_autodiff.stand_ins(call, tensors.values())
    return _numpy, dict(zip(tensors, shown, strict=True))


def mark_written(tensor: Any) -> None:
    """Never reached: check_writable raises."""
