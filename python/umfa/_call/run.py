"""Running a call: frameworks' tensors to the core, and its results back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import _ext
from .._errors import message
from .._frameworks import Framework, framework_of


class Prepared(NamedTuple):
    """What of a call does not depend on its tensors."""

    options: _ext.Options
    function: str
    backend: str
    names: tuple[str, ...]
    tables: frozenset[str]
    autocast: tuple[str, ...]
    written: tuple[str, ...]


def prepared(options: _ext.Options) -> Prepared:
    return Prepared(
        options,
        options.function,
        options.backend,
        options.names,
        frozenset(options.tables),
        options.autocast,
        options.written,
    )


def run(attention: _ext.Attention) -> Any:
    """Computes. Returns out, or (out, lse), or (out, lse, weights or None)."""
    call = prepared(attention.options)
    tensors = attention.tensors
    framework = ready(call, tensors)
    options = call.options
    if options.lacks_seed:
        call = call._replace(options=options.replace(dropout_seed=_seed(framework, call, tensors)))
    results = compute(framework, call, tensors)
    for name in call.written:
        framework.mark_written(tensors[name])
    if options.return_attn_probs and len(results) == 2:
        return (*results, None)
    return results[0] if len(results) == 1 else results


def run_prepared(call: Prepared, given: tuple[Any, ...]) -> Any:
    """`run` of a call on query, key and value whose options are known."""
    tensors = dict(zip(call.names, given, strict=True))
    framework = framework_of(call.function, tensors)
    if framework.autocast is not None:
        framework.autocast(call.function, tensors, (), call.autocast)
    results = compute(framework, call, tensors)
    return results[0] if len(results) == 1 else results


def judge(attention: _ext.Attention) -> tuple[bool, str]:
    """The routing's verdict on a call, and its reason."""
    call = prepared(attention.options)
    framework = ready(call, attention.tensors)
    return _ext.attention_can_run(call.options, exported(framework, call, attention.tensors))


def ready(call: Prepared, tensors: dict[str, Any]) -> Framework:
    """The tensors' framework. Checks what it can tell, and replaces tensors by what it must: tables
    by copies on the host, others as autocast demands."""
    function, options = call.function, call.options
    if options.return_lse and options.return_attn_probs:
        raise ValueError(
            message(
                function, "return_lse and return_attn_probs exclude each other", "both",
                "one of them",
            )
        )  # fmt: skip
    own = tensors
    if call.tables:
        own = {name: tensor for name, tensor in tensors.items() if name not in call.tables}
    framework = framework_of(function, own, call.written)
    for name in call.written:
        framework.check_writable(own[name], function, name)
    if framework.autocast is not None and call.autocast:
        framework.autocast(function, own, call.written, call.autocast)
    if call.tables:
        tensors.update(own)
        for name in call.tables:
            tensors[name] = _on_host(function, name, tensors[name])
    if options.lacks_seed and framework.draw_seed is None:
        raise ValueError(
            message(
                function,
                "dropout_seed is missing, and this framework has no global random generator",
                None,
                "0 to 2**64 - 1",
            )
        )
    return framework


def _on_host(function: str, name: str, table: Any) -> Any:
    """A table of integers, a list or of whatever framework: the host reads it before anything
    runs."""
    if type(table) in (list, tuple):
        table = _from_list(function, name, table)
    given = {name: table}
    framework = framework_of(function, given)
    return framework.to_host(given[name], function, name)


def _from_list(function: str, name: str, values: Sequence[Any]) -> Any:
    """Integers, or rows of as many each."""
    if not values or type(values[0]) not in (list, tuple):
        return np.array(_integers(function, name, values), np.int64)
    rows = []
    for i, row in enumerate(values):
        if type(row) not in (list, tuple) or len(row) != len(values[0]):
            got = f"{len(row)} entries" if type(row) in (list, tuple) else type(row).__name__
            raise ValueError(
                message(
                    function, f"{name}[{i}] is no row like the first", got,
                    f"a list of {len(values[0])} integers",
                )
            )  # fmt: skip
        rows.append(_integers(function, f"{name}[{i}]", row))
    return np.array(rows, np.int64)


def _integers(function: str, name: str, values: Sequence[Any]) -> list[int]:
    """Python's, NumPy's, or tensors without dimensions."""
    return [
        _ext.integer(function, f"{name}[{i}]", value, "an integer")
        for i, value in enumerate(values)
    ]


def _seed(framework: Framework, call: Prepared, tensors: dict[str, Any]) -> int:
    """Draws a seed from the framework's generator. A refused call must not advance it."""
    possible, _ = _ext.attention_can_run(call.options, exported(framework, call, tensors))
    if not possible or framework.draw_seed is None:
        return 0  # computing will say why
    if not framework.trains(tensors.values()):
        _warn_of_dropout(call)
    return framework.draw_seed()


_SAID: set[str] = set()
"""Warnings already given in this process."""


def _warn_of_dropout(call: Prepared) -> None:
    """Warns once per process of dropout outside training."""
    if "dropout" in _SAID:
        return
    text = message(
        call.function,
        "weights are dropped at random outside training",
        f"dropout_p={call.options.dropout_p:g} without dropout_seed",
        "dropout_p=0 for inference, or a dropout_seed where dropout is wanted (Monte Carlo "
        "dropout). umfa says this once",
    )
    # The warning points at the caller of the public function, four frames up.
    warnings.warn(text, UserWarning, stacklevel=5)
    _SAID.add("dropout")  # after warn(): if a filter makes it an error, every call raises it


def compute(framework: Framework, call: Prepared, tensors: dict[str, Any]) -> tuple[Any, ...]:
    """(out,), (out, lse) or (out, lse, weights)."""
    if framework.call is None:
        return _compute(framework, call, tensors)

    def again(*inputs: Any) -> tuple[Any, ...]:
        return _compute(framework, call, dict(zip(tensors, inputs, strict=True)))

    results: tuple[Any, ...] = framework.call(again, call.function, *tensors.values())
    return results


def _compute(framework: Framework, call: Prepared, tensors: dict[str, Any]) -> tuple[Any, ...]:
    first = tensors[call.names[0]]

    def allocate(shape: tuple[int, ...], dtype: str) -> tuple[Any, Any]:
        return framework.allocate(first, shape, dtype, call.backend)

    out, lse, weights = _ext.attention_forward(
        call.options, exported(framework, call, tensors), allocate
    )
    result = tensors["out"] if out is None else framework.finish(out)
    if lse is None:
        return (result,)
    if weights is None:
        return result, framework.finish(lse)
    return result, framework.finish(lse), framework.finish(weights)


def exported(framework: Framework, call: Prepared, tensors: dict[str, Any]) -> tuple[Any, ...]:
    """DLPack objects, in the order of the options' names."""
    export, function, tables, backend = framework.export, call.function, call.tables, call.backend
    if not tables:
        return tuple([export(tensor, function, name, backend) for name, tensor in tensors.items()])
    return tuple(
        tensor if name in tables else export(tensor, function, name, backend)
        for name, tensor in tensors.items()
    )
