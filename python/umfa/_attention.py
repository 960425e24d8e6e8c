"""Where every public function ends: tensors and options, ready for the core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from . import _ext
from ._frameworks import SHOWN, Framework, framework_of

TABLES = frozenset(
    (
        "cu_seqlens_q",
        "cu_seqlens_k",
        "seqused_q",
        "seqused_k",
        "cache_batch_idx",
        "cache_leftpad",
        "block_table",
    )
)
"""Integers that say where sequences lie; the core reads them on the CPU."""

# (framework, function, options, tensors by argument name, backend). Query, key and value come first
# among the tensors, under the caller's names; then the others that are there, under the core's, the
# TABLES among them as `table` gives them. Returns (out,) or (out, lse).
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
    if framework.call is None:
        return _compute(framework, function, options, names, tuple(tensors.values()), backend)

    def compute(*inputs: Any) -> tuple[Any, ...]:
        return _compute(framework, function, options, names, inputs, backend)

    results: tuple[Any, ...] = framework.call(compute, function, *tensors.values())
    return results


def _compute(
    framework: Framework,
    function: str,
    options: _ext.Options,
    names: tuple[str, ...],
    inputs: tuple[Any, ...],
    backend: Any,
) -> tuple[Any, ...]:
    def allocate(shape: tuple[int, ...], dtype: str) -> tuple[Any, Any]:
        return framework.allocate(inputs[0], shape, dtype, backend)

    if len(names) == 3:  # the common case
        export = framework.export
        out, lse = _ext.attention_forward(
            options,
            export(inputs[0], function, names[0], backend),
            export(inputs[1], function, names[1], backend),
            export(inputs[2], function, names[2], backend),
            None,
            None,
            allocate,
        )
    else:
        exported = _exported(framework, function, names, inputs, backend)
        query, key, value, slopes, mask, others = exported
        out, lse = _ext.attention_forward(
            options, query, key, value, slopes, mask, allocate, others
        )
    if lse is None:
        return (framework.finish(out),)
    return framework.finish(out), framework.finish(lse)


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
) -> tuple[Any, Any, Any, Any, Any, dict[str, Any] | None]:
    export = framework.export
    query = export(tensors[0], function, names[0], backend)
    key = export(tensors[1], function, names[1], backend)
    value = export(tensors[2], function, names[2], backend)
    slopes = mask = others = None
    for name, tensor in zip(names[3:], tensors[3:], strict=True):
        if name == "attn_mask":
            mask = export(tensor, function, name, backend)
        elif name == "alibi_slopes":
            slopes = export(tensor, function, name, backend)
        else:
            others = {} if others is None else others
            if name not in TABLES:
                tensor = export(tensor, function, SHOWN.get(name, name), backend)
            others[name] = tensor
    return query, key, value, slopes, mask, others


def table(function: str, name: str, value: Any) -> Any:
    """A table of sequences, of whatever framework: the host reads it before anything runs."""
    given = {name: value}
    framework = framework_of(function, given)
    return framework.to_host(given[name], function, name)
