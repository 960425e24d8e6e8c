"""What of a call does not depend on its tensors, and the tensors as the core takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

from .. import _ext
from .._errors import HostReadsError, OutOfRangeError, UnsupportedError
from .._frameworks import Framework


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


def exported(framework: Framework, call: Prepared, tensors: dict[str, Any]) -> tuple[Any, ...]:
    """DLPack objects, in the order of the options' names."""
    export, function, tables, backend = framework.export, call.function, call.tables, call.backend
    if not tables:
        return tuple([export(tensor, function, name, backend) for name, tensor in tensors.items()])
    return tuple(
        tensor
        if name in tables and not stays(framework, tensor)
        else export(tensor, function, name, backend)
        for name, tensor in tensors.items()
    )


def stays(framework: Framework, table: Any) -> bool:
    """Whether a table lies on the GPU, where a kernel reads it."""
    return framework.reads_later is not None and framework.reads_later(table)


def stream_of(
    framework: Framework,
    call: Prepared,
    tensors: dict[str, Any],
    results: Sequence[str],
    **saved: Any,
) -> Any:
    """The stream of the call's tensors; None where umfa computes before it returns.

    `exported` comes first: it may queue copies.
    """
    if framework.in_stream is None or not framework.in_stream(tensors[call.names[0]]):
        return None
    options = call.options
    named = {}
    for field, (name, tensor) in zip(options.fields, tensors.items(), strict=True):
        if name not in call.tables or stays(framework, tensor):
            named[field] = tensor
    tables = {}  # of a call whose tables a kernel reads
    if any(stays(framework, tensors[name]) for name in call.tables):
        spelled = zip(options.fields, call.names, strict=True)
        tables = {field: name for field, name in spelled if name in call.tables}
    gathers = options.return_attn_probs and options.dropout_p != 0
    obstacle = "the host gathers the matrix of weights" if gathers else ""
    stream = framework.stream(call.function, {**named, **saved}, results, obstacle)
    if tables:
        stream.read_tables(tables)
    return stream


T = TypeVar("T")


def recorded(framework: Framework, compute: Callable[[], T], backend: Any) -> T:
    """`compute()`, without evaluating tensors if the framework has a graph that can take it."""
    if framework.recorded is None:
        return compute()
    return cast(T, framework.recorded(compute, backend))


def execute(framework: Framework, call: Prepared, tensors: dict[str, Any]) -> tuple[Any, ...]:
    """(out,), (out, lse) or (out, lse, weights)."""
    return with_tables(framework, call, tensors, lambda own: _execute(framework, call, own))


def with_tables(
    framework: Framework,
    call: Prepared,
    tensors: dict[str, Any],
    compute: Callable[[dict[str, Any]], T],
) -> T:
    """`compute(tensors)`, with tables on the GPU if it can, else with copies on the host."""
    if any(stays(framework, tensors[name]) for name in call.tables):
        try:
            return compute(tensors)
        except OutOfRangeError:  # in an earlier call
            raise
        except (HostReadsError, UnsupportedError, ValueError, TypeError):
            # Nothing has run. With the numbers at hand the call can, or the error says what it got.
            tensors = on_host(framework, call, tensors)
    return compute(tensors)


def on_host(framework: Framework, call: Prepared, tensors: dict[str, Any]) -> dict[str, Any]:
    """The same tensors, with tables where the host reads them."""
    return {
        name: framework.to_host(tensor, call.function, name)
        if name in call.tables and stays(framework, tensor)
        else tensor
        for name, tensor in tensors.items()
    }


def _execute(framework: Framework, call: Prepared, tensors: dict[str, Any]) -> tuple[Any, ...]:
    shown = exported(framework, call, tensors)
    allocate, play = framework.allocate, None
    stream = stream_of(framework, call, tensors, ("lse",) if "out" in tensors else ("out", "lse"))
    if stream is not None:
        allocate, play = stream.allocate, stream.play
    out, lse, weights = _ext.attention_forward(
        call.options,
        shown,
        allocate,
        tensors[call.names[0]],
        call.backend,
        play,
    )
    result = tensors["out"] if out is None else framework.finish(out)
    if lse is None:
        return (result,)
    if weights is None:
        return result, framework.finish(lse)
    return result, framework.finish(lse), framework.finish(weights)
