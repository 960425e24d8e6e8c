"""mlx arrays. A call becomes part of MLX's graph where that can be (`_mlx_graph`); else its arrays
are evaluated, and umfa computes before it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .. import _ext
from .._errors import UnsupportedError, message
from .._stats import count_wait
from . import _mlx_autodiff, _mlx_graph
from ._dlpack import METAL


def _on_gpu(tensor: Any, backend: str) -> bool:
    """Whether umfa is to have the array as a Metal buffer."""
    if tensor.__dlpack_device__()[0] != METAL or _ext.backend_name(backend) == "cpu":
        return False
    return any(name == "metal" and available for name, available, *_ in _ext.backends())


def _evaluate(tensor: Any, function: str, argument: str) -> None:
    try:
        mx.eval(tensor)
    except (RuntimeError, ValueError) as error:
        if "transformation" not in str(error):
            raise
        reason = _mlx_graph.reason()
        raise UnsupportedError(
            message(
                function,
                f"{argument} is being traced by mx.compile or mx.vmap"
                + (f", and the call needs its value: {reason}" if reason else ""),
                "a tracer",
                "an array with a value; call it outside the transform",
            )
        ) from None


def export(tensor: Any, function: str, argument: str, backend: str = "auto") -> Any:
    if _mlx_graph.is_recording():
        return _mlx_graph.outline(tensor)
    _evaluate(tensor, function, argument)
    # eval() has waited: umfa's own queue may read. On a Mac, mlx offers its unified memory as
    # Metal; the CPU view is asked for by name.
    return tensor.__dlpack__() if _on_gpu(tensor, backend) else tensor.__dlpack__(dl_device=(1, 0))


def allocate(
    like: Any, shape: tuple[int, ...], dtype: str, backend: str = "auto"
) -> tuple[Any, Any]:
    memory = _ext.empty(shape, dtype, "metal" if _on_gpu(like, backend) else "cpu")
    return memory, memory


def finish(handle: Any) -> Any:
    return handle.result() if isinstance(handle, _mlx_graph.Cell) else mx.from_dlpack(handle)


def in_stream(tensor: Any) -> bool:
    return _mlx_graph.is_recording()


def stream(
    function: str, tensors: Mapping[str, Any], results: Sequence[str], obstacle: str = ""
) -> _mlx_graph.Graph:
    if obstacle:
        raise _mlx_graph.NotRecordedError(obstacle)
    return _mlx_graph.Graph(tensors, results)


def call(compute: Callable[..., Any], function: str, *tensors: Any, backend: str = "auto") -> Any:
    # For functions without a backward pass. mlx cannot see through DLPack: without this, mx.grad
    # would take the result for a constant and return a gradient of zero.
    guarded = mx.custom_function(
        lambda *inputs: _mlx_graph.computed(lambda: compute(*inputs), backend)
    )

    def refuse(*_: Any) -> Any:
        raise UnsupportedError(
            message(
                function,
                "a derivative is asked for, and this function has no backward pass",
                "mx.grad, mx.vjp or mx.jvp",
                "a call outside of them",
            )
        )

    guarded.vjp(refuse)
    guarded.jvp(refuse)
    return guarded(*tensors)


def to_host(tensor: Any, function: str, argument: str) -> Any:
    if not _mlx_graph.missing():
        count_wait(f"{argument} is a table of mlx's, which the host reads")
    _evaluate(tensor, function, argument)
    return np.array(tensor)


def check_writable(tensor: Any, function: str, argument: str) -> None:
    raise UnsupportedError(
        message(
            function,
            f"{argument} would have to be written in place, which mlx arrays cannot be",
            "an immutable array",
            "tensors of torch or numpy, or results that are returned",
        )
    )


autodiff = _mlx_autodiff

autocast = None


def draw_seed() -> int:
    low, high = np.array(mx.random.randint(0, 2**31 - 1, (2,))).tolist()
    return int(low | high << 31)


def trains(tensors: Iterable[Any]) -> bool:
    return True


stand_ins = None
reads_later = None

recorded = _mlx_graph.computed


def mark_written(tensor: Any) -> None:
    """Never reached: check_writable raises."""
