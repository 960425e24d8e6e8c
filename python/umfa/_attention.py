"""Where every public function ends: tensors and options, ready for the core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from . import _ext
from ._frameworks import Framework

# (framework, function, options, tensors by argument name, backend). Query, key and value come first
# among the tensors, under the caller's names; then those of "alibi_slopes" and "attn_mask" that are
# there. Returns (out,) or (out, lse).
Act: TypeAlias = Callable[[Framework, str, _ext.Options, dict[str, Any], Any], tuple[Any, ...]]


def run(
    framework: Framework,
    function: str,
    options: _ext.Options,
    tensors: dict[str, Any],
    backend: Any,
) -> tuple[Any, ...]:
    """Computes."""
    names = tuple(tensors)

    def compute(*inputs: Any) -> tuple[Any, ...]:
        def allocate(shape: tuple[int, ...], dtype: str) -> tuple[Any, Any]:
            return framework.allocate(inputs[0], shape, dtype, backend)

        out, lse = _ext.attention_forward(
            options, *_exported(framework, function, names, inputs, backend), allocate
        )
        return (
            (framework.finish(out),)
            if lse is None
            else (framework.finish(out), framework.finish(lse))
        )

    return framework.call(compute, function, *tensors.values())


def judge(
    framework: Framework,
    function: str,
    options: _ext.Options,
    tensors: dict[str, Any],
    backend: Any,
) -> tuple[Any, ...]:
    """The routing's verdict on the same call, (bool, reason), where `run` has its only result."""
    names, inputs = tuple(tensors), tuple(tensors.values())
    exported = _exported(framework, function, names, inputs, backend)
    return (_ext.attention_can_run(options, *exported),)


def _exported(
    framework: Framework,
    function: str,
    names: tuple[str, ...],
    tensors: tuple[Any, ...],
    backend: Any,
) -> tuple[Any, Any, Any, Any, Any]:
    export = framework.export
    query = export(tensors[0], function, names[0], backend)
    key = export(tensors[1], function, names[1], backend)
    value = export(tensors[2], function, names[2], backend)
    slopes = mask = None
    for name, tensor in zip(names[3:], tensors[3:], strict=True):
        if name == "attn_mask":
            mask = export(tensor, function, name, backend)
        else:
            slopes = export(tensor, function, name, backend)
    return query, key, value, slopes, mask
