"""Running a call: frameworks' tensors to the core, and its results back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import _ext
from .._errors import message
from .._frameworks import Framework, framework_of, known_framework
from .gradients import differentiable
from .prepared import Prepared, execute, exported, prepared, recorded, stays, stream_of, with_tables


def run(attention: _ext.Attention) -> Any:
    """Computes. Returns out, or (out, lse), or (out, lse, weights or None)."""
    call = prepared(attention.options)
    tensors = attention.tensors
    framework = ready(call, tensors, later=True)
    options = call.options
    autodiff = framework.autodiff
    # A recorded call draws its seed each time that it runs.
    if options.lacks_seed and (autodiff is None or not autodiff.records()):
        call = call._replace(options=options.replace(dropout_seed=_seed(framework, call, tensors)))
    results = compute(framework, call, tensors)
    for name in call.written:
        framework.mark_written(tensors[name])
    if options.return_attn_probs and len(results) == 2:
        return (*results, None)
    return results[0] if len(results) == 1 else results


def run_prepared(call: Prepared, given: tuple[Any, ...]) -> Any:
    """`run` of a call on query, key and value whose options are known."""
    q, k, v = given
    names = call.names
    tensors = {names[0]: q, names[1]: k, names[2]: v}
    kind = type(q)
    framework = known_framework(kind) if kind is type(k) is type(v) else None
    if framework is None:
        framework = framework_of(call.function, tensors)
    if framework.autocast is not None:
        framework.autocast(call.function, tensors, (), call.autocast)
    results = compute(framework, call, tensors)
    return results[0] if len(results) == 1 else results


def judge(attention: _ext.Attention) -> tuple[bool, str]:
    """The routing's verdict on a call, its backward pass included, and its reason."""
    call = prepared(attention.options)
    tensors = attention.tensors
    framework = ready(call, tensors)
    autodiff = framework.autodiff
    if autodiff is not None and autodiff.transformed():
        autodiff.refuse(call.function, tensors)
    if framework.stand_ins is not None:
        framework, tensors = framework.stand_ins(call, tensors)
    verdict = _verdict(framework, call, tensors)
    if not verdict[0] or autodiff is None:
        return verdict
    wanted = autodiff.wanted(tensors.values())
    if not any(wanted):
        return verdict
    operation = differentiable(framework, autodiff, call)
    operation.check(wanted)
    return operation.judge(list(tensors.values()), wanted)


def _verdict(framework: Framework, call: Prepared, tensors: dict[str, Any]) -> tuple[bool, str]:
    """The routing's verdict on a call."""
    return recorded(
        framework,
        lambda: _ext.attention_can_run(call.options, exported(framework, call, tensors)),
        call.backend,
    )


def run_backward(
    attention: _ext.Attention, out: Any, lse: Any, dout: Any, wanted: Sequence[bool]
) -> tuple[Any, ...]:
    """The gradients of a call that was computed elsewhere, for each of its tensors; None where it
    is not wanted. `out` and `lse` are its results."""
    call = prepared(attention.options)
    tensors = attention.tensors
    framework = ready(call, tensors)
    assert framework.autodiff is not None
    operation = differentiable(framework, framework.autodiff, call)
    operation.check(wanted)
    return operation.backward(list(tensors.values()), out, lse, dout, None, wanted)


def warm_up(attention: _ext.Attention) -> tuple[str, int, int]:
    """Compiles a call's kernels. Returns (backend, kernels used, kernels built now)."""
    call = prepared(attention.options)
    tensors = attention.tensors
    framework = ready(call, tensors, later=True)
    if framework.recorded is not None and framework.autodiff is not None:
        # Such a framework does not tell what it will differentiate: calls have a log-sum-exp.
        operation = differentiable(framework, framework.autodiff, call)
        call = call._replace(options=operation.options)

    def compiled(own: dict[str, Any]) -> tuple[str, int, int]:
        shown = exported(framework, call, own)
        stream = stream_of(framework, call, own, ())
        if stream is None:
            return _ext.attention_warm_up(call.options, shown)
        name, _, _ = _ext.attention_warm_up(call.options, shown, stream.warm_up)
        return name, stream.used, stream.built

    return recorded(
        framework, lambda: with_tables(framework, call, tensors, compiled), call.backend
    )


def ready(call: Prepared, tensors: dict[str, Any], later: bool = False) -> Framework:
    """The tensors' framework. Checks what it can tell, and replaces tensors by what it must: tables
    by copies on the host, others as autocast demands. `later`: tables stay where a kernel can read
    them."""
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
        later = later and _may_stay(framework, call, own)
        for name in call.tables:
            if not (later and stays(framework, tensors[name])):
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


def _may_stay(framework: Framework, call: Prepared, own: dict[str, Any]) -> bool:
    """Whether a kernel may read the tables of a call, on its other tensors `own`. Gradients, and
    seeds that a refused call must not draw, need the numbers."""
    autodiff = framework.autodiff
    return not call.options.lacks_seed and (autodiff is None or not autodiff.applies(own.values()))


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
    if framework.draw_seed is None:
        return 0  # `ready` has refused it
    if framework.autodiff is None or not framework.autodiff.transformed():
        possible, _ = _verdict(framework, call, tensors)
        if not possible:
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
    autodiff = framework.autodiff
    if autodiff is not None and autodiff.applies(tensors.values()):
        results = autodiff.run(differentiable(framework, autodiff, call), tensors)
        options = call.options
        return results if options.return_lse or options.return_attn_probs else results[:1]
    return execute(framework, call, tensors)
