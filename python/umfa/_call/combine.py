"""Running a merge of partial results: frameworks' tensors to the core, and its results back."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import _ext
from .._frameworks import Framework, framework_of
from .prepared import recorded


class Combination(NamedTuple):
    """The arguments of one merge."""

    function: str
    out_partial: Any
    lse_partial: Any
    out: Any
    out_dtype: Any
    backend: Any


def run_combination(call: Combination) -> tuple[Any, Any]:
    """Computes. Returns (out, lse)."""
    framework, tensors, out = _ready(call)

    def compute(*inputs: Any) -> tuple[Any, ...]:
        given = dict(zip(tensors, inputs, strict=True))
        arguments = _exported(framework, call, given, out)
        allocate_like, play = framework.allocate, None
        stream = _stream(framework, call, given, out)
        if stream is not None:
            allocate_like, play = stream.allocate, stream.play

        def allocate(shape: tuple[int, ...], dtype: str) -> tuple[Any, Any]:
            return allocate_like(inputs[0], shape, dtype, call.backend)

        merged, lse = _ext.combine(*arguments, allocate, play)
        if out is not None:
            return (framework.finish(lse),)
        return framework.finish(merged), framework.finish(lse)

    inputs = tensors.values()
    if framework.call is None:
        results = compute(*inputs)
    else:
        results = framework.call(compute, call.function, *inputs, backend=call.backend)
    if out is None:
        merged, lse = results
        return merged, lse
    framework.mark_written(out)
    return out, results[0]


def judge_combination(call: Combination) -> tuple[bool, str]:
    """The routing's verdict on a merge, and its reason."""
    framework, tensors, out = _ready(call)
    return recorded(
        framework,
        lambda: _ext.combine_can_run(*_exported(framework, call, tensors, out)),
        call.backend,
    )


def warm_up_combination(call: Combination) -> tuple[str, int, int]:
    """Compiles a merge's kernels. Returns (backend, kernels used, kernels built now)."""
    framework, tensors, out = _ready(call)

    def compiled() -> tuple[str, int, int]:
        arguments = _exported(framework, call, tensors, out)
        stream = _stream(framework, call, tensors, out)
        if stream is None:
            return _ext.combine_warm_up(*arguments)
        name, _, _ = _ext.combine_warm_up(*arguments, stream.warm_up)
        return name, stream.used, stream.built

    return recorded(framework, compiled, call.backend)


def _stream(framework: Framework, call: Combination, tensors: dict[str, Any], out: Any) -> Any:
    """The stream of the tensors; None where umfa computes before it returns."""
    if framework.in_stream is None or not framework.in_stream(tensors["out_partial"]):
        return None
    written = {} if out is None else {"out": out}
    results = ["lse"] if written else ["out", "lse"]
    return framework.stream(call.function, {**tensors, **written}, results)


def _ready(call: Combination) -> tuple[Framework, dict[str, Any], Any]:
    """The tensors' framework, those that are read, and the one to write, which may be None."""
    _ext.backend_name(call.backend, call.function)
    tensors = {"out_partial": call.out_partial, "lse_partial": call.lse_partial}
    out = None
    if call.out is None:
        framework = framework_of(call.function, tensors)
    else:
        tensors["out"] = call.out
        framework = framework_of(call.function, tensors, ("out",))
        out = tensors.pop("out")
        framework.check_writable(out, call.function, "out")
    if framework.autodiff is not None:
        framework.autodiff.refuse(call.function, tensors)
    return framework, tensors, out


def _exported(
    framework: Framework, call: Combination, tensors: dict[str, Any], out: Any
) -> tuple[str, Any, Any, Any, Any, str]:
    """What `_ext` takes of a merge."""
    out_partial, lse_partial = (
        framework.export(tensor, call.function, name, call.backend)
        for name, tensor in tensors.items()
    )
    return (
        call.function,
        out_partial,
        lse_partial,
        None if out is None else framework.export(out, call.function, "out", call.backend),
        call.out_dtype,
        call.backend,
    )
