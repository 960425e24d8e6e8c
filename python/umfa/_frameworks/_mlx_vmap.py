"""mx.vmap of a call: one call with a larger batch.

The mapped axis becomes the outermost part of the batch dimension. Arrays that are not mapped are
repeated where each index needs its own, and shared where the call lets indices of the batch share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .._errors import UnsupportedError, message

_OPERANDS = ("query", "key", "value", "qv")
_SHARED = ("learnable_sink", "rotary_cos", "rotary_sin")
"""These have no batch dimension."""


def refuse(call: Any, what: str, got: str, expected: str) -> Any:
    raise UnsupportedError(message(call.function, what, got, expected))


class Batch:
    """The batch of a mapped call.

    Parameters
    ----------
    call
        A `_call.gradients.Differentiable`.
    tensors
        Its arrays, in the order of its names; the mapped ones have an axis more.
    axes
        Of each the mapped axis, or None.
    wants
        For a backward pass, whether the gradient of each is wanted.
    """

    def __init__(
        self,
        call: Any,
        tensors: Sequence[Any],
        axes: Sequence[int | None],
        wants: Sequence[bool] | None = None,
    ) -> None:
        self._call, self._axes = call, axes
        self._wants = wants or [False] * len(axes)
        options = call.options
        if call.tables:
            what = "sequences of different lengths, whose places are the same for all indices"
            refuse(call, f"mx.vmap maps {what}", "tables of lengths", "one call for all of them")
        if options.dropout_p != 0:
            what = "the dropped weights depend on the index in the batch, which mx.vmap hides"
            refuse(call, what, f"dropout_p={options.dropout_p:g} in mx.vmap", "dropout_p=0")
        self._fields = dict(zip(call.names, options.fields, strict=True))
        self.indices = next(
            x.shape[axis] for x, axis in zip(tensors, axes, strict=True) if axis is not None
        )
        shapes = [
            _without(x.shape, axis)
            for x, axis, field in zip(tensors, axes, self._fields.values(), strict=True)
            if field in _OPERANDS
        ]
        self._ndim = max(map(len, shapes))
        self._batch = max(
            (shape[0] for shape in shapes if len(shape) == self._ndim and shape[0] != 1), default=1
        )
        self._has_batch = self._ndim > 3

    def merged(self, tensors: Sequence[Any]) -> list[Any]:
        """The call's arrays with the mapped axis in their batch dimension."""
        found = []
        rows = zip(self._fields.items(), tensors, self._axes, self._wants, strict=True)
        for (name, field), x, axis, wanted in rows:
            if field in _OPERANDS:
                found.append(self.merge(x, axis, self._ndim))
            elif field in _SHARED and axis is None and not wanted:
                found.append(x)
            elif field == "attn_mask" and (wanted or axis is not None or self._is_of_batch(x)):
                found.append(self.merge(x, axis, self._ndim))
            elif field == "alibi_slopes" and (wanted or axis is not None or x.ndim == 2):
                found.append(self.merge(x, axis, 1 + self._has_batch))
            elif axis is None and not wanted and field in ("attn_mask", "alibi_slopes"):
                found.append(x)
            else:
                got = f"{name} is mapped" if axis is not None else f"a gradient of {name}"
                refuse(self._call, f"{name} has no batch dimension", f"mx.vmap, and {got}",
                       f"one {name} for all indices, without a gradient")  # fmt: skip
        return found

    def _is_of_batch(self, mask: Any) -> bool:
        return self._has_batch and mask.ndim == self._ndim and mask.shape[0] != 1

    def merge(self, x: Any, axis: int | None, ndim: int) -> Any:
        """An array with `ndim` dimensions. If it has a batch dimension, that is the first."""
        own = _without(x.shape, axis)
        x = mx.moveaxis(x, axis, 0) if axis is not None else x[None]
        full = (1,) * (ndim - len(own)) + own
        x = x.reshape(x.shape[0], *full)
        if not self._has_batch:
            return mx.broadcast_to(x, (self.indices, *full))
        batch = full[0] if full[0] != 1 else self._batch
        x = mx.broadcast_to(x, (self.indices, batch, *full[1:]))
        return x.reshape(self.indices * batch, *full[1:])

    def divided(self, result: Any) -> Any:
        """A result with the mapped axis in front."""
        if not self._has_batch:
            return result
        return result.reshape(self.indices, -1, *result.shape[1:])

    def gradient(self, found: Any, tensor: Any, axis: int | None) -> Any:
        """The gradient of an array before `merge`, with the mapped axis in front."""
        own = _without(tensor.shape, axis)
        found = self.divided(found)
        # What has been repeated for each index of the batch has one gradient.
        if self._has_batch and found.shape[1] != 1 and (len(own) < found.ndim - 1 or own[0] == 1):
            found = found.sum(axis=1, keepdims=True)
        return found.reshape(self.indices, *own)


def _without(shape: Sequence[int], axis: int | None) -> tuple[int, ...]:
    """A shape as the mapped function sees it."""
    return tuple(n for i, n in enumerate(shape) if i != axis)
