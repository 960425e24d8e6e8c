"""A call as a custom function of mlx's: mx.grad, mx.vjp, mx.value_and_grad, mx.checkpoint and
mx.vmap."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import mlx.core as mx

from .. import _ext
from .._errors import UnsupportedError, message
from . import _mlx_graph, _mlx_vmap

_marks: dict[str, object] = {"mark": None}
"""The last time that `_compiled` ran as Python."""


def _note(*arrays: Any) -> Any:
    _marks["mark"] = object()  # never the same twice, also where threads meet
    return arrays[0]


# mlx does not say which arrays it traces, but its compiled functions depend on that: given such an
# array, they run as Python each time. Given others, they do so only when they meet a new dtype or
# number of dimensions. This takes 1 us, and a custom function with its evaluation 20.
_compiled: Any = mx.compile(_note, shapeless=True)


def traced(arrays: Iterable[Any]) -> bool:
    """Whether mlx may be tracing one of the arrays, for a derivative or a graph. True for the first
    of their kind."""
    before = _marks["mark"]
    _compiled(*arrays)
    return _marks["mark"] is not before


@lru_cache(maxsize=1)
def _tells() -> bool:
    """Whether `traced` is right in this release of mlx, whose documentation does not promise it."""
    x = mx.zeros((2, 2))
    found: list[bool] = []

    def watched(y: Any) -> Any:
        z = mx.sin(y)
        found.extend((traced((x, y)), traced((x, z))))
        return z.sum()

    mx.grad(watched)(x)
    mx.jvp(lambda y: [watched(y)], [x], [x])
    mx.grad(mx.checkpoint(watched))(x)
    traced((x, x))  # the first of their kind
    if not all(found) or traced((x, x)):
        return False
    _ext.plain_mlx(mx.array, mx, _compiled, _marks)
    return True


def applies(tensors: Iterable[Any]) -> bool:
    # mlx cannot see through DLPack: without a custom function it would take the result for a
    # constant, and return a gradient of zero.
    if mx.default_device().type != mx.DeviceType.cpu:
        return True
    return traced(x for x in tensors if isinstance(x, mx.array)) or not _tells()


def records() -> bool:
    return False  # a traced array has a shape, and that is enough


def transformed() -> bool:
    return False


def wanted(tensors: Iterable[Any]) -> list[bool]:
    return [False for _ in tensors]  # known only in the backward pass


def refuse(function: str, tensors: dict[str, Any]) -> None:
    """`_mlx.call` refuses, once a derivative is asked for."""


def zeros_like(tensor: Any) -> Any:
    return mx.zeros_like(tensor)


def run(call: Any, tensors: dict[str, Any]) -> tuple[Any, ...]:
    given = list(tensors.values())
    if call.tables:
        own = [i for i, tensor in enumerate(given) if isinstance(tensor, mx.array)]
    else:
        own = list(range(len(given)))
    inputs = [given[i] for i in own]
    if None in call.gradients:
        inputs = [_without_gradient(call, i, given[i]) for i in own]

    def completed(inputs: Iterable[Any]) -> list[Any]:
        """With the tables, which are NumPy's."""
        tensors = list(given)
        for i, tensor in zip(own, inputs, strict=True):
            tensors[i] = tensor
        return tensors

    def compute(*inputs: Any) -> Any:
        return _mlx_graph.computed(lambda: call.forward(completed(inputs)), call.backend)

    forward: Any = mx.custom_function(compute)
    forward.vjp(lambda *primal: _backward(call, own, completed, *primal))
    forward.jvp(lambda *_: _refuse(call, *_FORWARD_MODE))
    forward.vmap(lambda *mapped: _mapped(call, own, completed, *mapped))
    results = tuple(forward(*inputs))
    if len(results) < 3:
        return results
    return (*results[:2], _guarded(results[2], lambda *_: _refuse(call, *_WEIGHTS)))


def _backward(
    call: Any,
    own: list[int],
    completed: Callable[[Iterable[Any]], list[Any]],
    inputs: Any,
    cotangents: Any,
    results: Any,
) -> tuple[Any, ...]:
    # mlx asks for the gradients of all inputs, and then takes those that it needs.
    inputs = inputs if isinstance(inputs, (list, tuple)) else [inputs]
    wants = [False] * len(call.names)
    for i, tensor in zip(own, inputs, strict=True):
        wants[i] = call.gradients[i] is not None and mx.issubdtype(tensor.dtype, mx.floating)

    def compute(out: Any, lse: Any, dout: Any, dlse: Any, *inputs: Any) -> list[Any]:
        found = _mlx_graph.computed(
            lambda: call.backward(completed(inputs), out, lse, dout, dlse, wants), call.backend
        )
        return [gradient for gradient in found if gradient is not None]

    backward: Any = mx.custom_function(compute)
    backward.vjp(lambda *_: _refuse(call, *_SECOND))
    backward.jvp(lambda *_: _refuse(call, *_SECOND))
    backward.vmap(lambda *mapped: _mapped_backward(call, own, completed, wants, *mapped))
    found = iter(backward(*results[:2], *cotangents[:2], *inputs))
    return tuple(
        next(found) if wants[i] else mx.zeros_like(x) for i, x in zip(own, inputs, strict=True)
    )


def _batch(
    call: Any, own: list[int], axes: Any, tensors: list[Any], wants: list[bool] | None = None
) -> _mlx_vmap.Batch:
    every: list[int | None] = [None] * len(tensors)
    for i, axis in zip(own, axes, strict=True):
        every[i] = axis
    return _mlx_vmap.Batch(call, tensors, every, wants)


def _mapped(
    call: Any,
    own: list[int],
    completed: Callable[[Iterable[Any]], list[Any]],
    inputs: Any,
    axes: Any,
) -> tuple[list[Any], list[int]]:
    """The call for all indices of the axes that mx.vmap maps."""
    inputs, axes = (x if isinstance(x, (list, tuple)) else [x] for x in (inputs, axes))
    tensors = completed(inputs)
    batch = _batch(call, own, axes, tensors)
    merged = batch.merged(tensors)
    results = run(call, dict(zip(call.names, merged, strict=True)))
    return [batch.divided(x) for x in results], [0] * len(results)


def _mapped_backward(
    call: Any,
    own: list[int],
    completed: Callable[[Iterable[Any]], list[Any]],
    wants: list[bool],
    given: Any,
    axes: Any,
) -> tuple[list[Any], list[int]]:
    """Likewise of the gradients that are wanted."""
    saved, inputs = given[:4], given[4:]
    tensors = completed(inputs)
    batch = _batch(call, own, axes[4:], tensors, wants)
    # In the layout of the results every dimension is there, so that none has to be added.
    folded = [
        batch.merge(x, axis, x.ndim - (axis is not None))
        for x, axis in zip(saved, axes[:4], strict=True)
    ]
    found = _mlx_graph.computed(
        lambda: call.backward(batch.merged(tensors), *folded, wants), call.backend
    )
    of = dict(zip(own, axes[4:], strict=True))
    gradients = [
        batch.gradient(gradient, tensors[i], of[i])
        for i, gradient in enumerate(found)
        if gradient is not None
    ]
    return gradients, [0] * len(gradients)


_FORWARD_MODE = (
    "forward-mode differentiation is not implemented",
    "mx.jvp",
    "reverse mode (mx.grad, mx.value_and_grad or mx.vjp)",
)
_SECOND = (
    "the gradient of a gradient is not implemented",
    "a second derivative",
    "first derivatives only",
)
_WEIGHTS = (
    "the matrix of weights has no gradient",
    "a derivative of it",
    "derivatives of out",
)


def _refuse(call: Any, what: str, got: str, expected: str) -> Any:
    raise UnsupportedError(message(call.function, what, got, expected))


def _without_gradient(call: Any, index: int, tensor: Any) -> Any:
    """The same tensor; if it has no gradient, `call.check` says so once that is asked for."""
    if call.gradients[index] is not None or not mx.issubdtype(tensor.dtype, mx.floating):
        return tensor
    wanted = [i == index for i in range(len(call.names))]
    return _guarded(tensor, lambda *_: call.check(wanted))


def _guarded(tensor: Any, refuse: Callable[..., Any]) -> Any:
    """The same tensor. `refuse` raises once a derivative through it is asked for."""
    guarded: Any = mx.custom_function(lambda x: x)
    guarded.vjp(refuse)
    guarded.jvp(refuse)
    return guarded(tensor)
