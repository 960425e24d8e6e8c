"""Frameworks' tensors to the core's quantiser, and its results back."""

from __future__ import annotations

from typing import Any

from .. import _ext
from .._errors import message
from .._frameworks import Framework, framework_of

Parts = tuple[Any, Any, Any]
"""Data, scales and zero points; None for those that a format lacks."""

NONFINITE = ("raise", "nan")
_RESULTS = ("data", "scales", "zero_points")


def run_quantize(
    function: str,
    x: Any,
    form: _ext.QuantFormat,
    nonfinite: str,
    backend: str,
    out: Parts | None = None,
) -> tuple[Parts, tuple[int, ...]]:
    """Quantises `x`; into `out`, tensors of the framework of `x`, if given.

    Returns the parts and the shape of `x`.
    """
    _ext.backend_name(backend, function)
    if nonfinite not in NONFINITE:
        expected = "'raise' or 'nan'"
        raise ValueError(message(function, "nonfinite is unknown", repr(nonfinite), expected))
    tensors = {"x": x}
    framework = framework_of(function, tensors)
    _refuse_gradients(framework, function, tensors)
    written = None if out is None else _writable(framework, function, out, backend)

    def compute(tensor: Any) -> tuple[Any, ...]:
        exported = framework.export(tensor, function, "x", backend)
        given = dict(zip(_RESULTS, out or (), strict=False))
        waits = "" if nonfinite == "nan" else "nonfinite='raise' has to know of numbers like NaN"
        stream = _stream(framework, function, {"x": tensor, **given}, _RESULTS, waits)
        allocate_like = framework.allocate if stream is None else stream.allocate

        def allocate(shape: tuple[int, ...], dtype: str) -> tuple[Any, Any]:
            return allocate_like(tensor, shape, dtype, backend)

        made = _ext.quantize(
            function,
            exported,
            form,
            nonfinite == "nan",
            backend,
            written,
            allocate,
            None if stream is None else stream.play,
        )
        return tuple(framework.finish(part) for part in made if part is not None)

    shape = tuple(int(n) for n in tensors["x"].shape)
    if out is not None:
        compute(tensors["x"])
        for tensor in out:
            if tensor is not None:
                framework.mark_written(tensor)
        return out, shape
    made = _called(framework, function, compute, tensors["x"])
    return (made[0], made[1], made[2] if len(made) > 2 else None), shape


def run_dequantize(
    function: str, parts: Parts, form: _ext.QuantFormat, channels: int, dtype: Any, backend: str
) -> Any:
    """The numbers of a quantised tensor."""
    _ext.backend_name(backend, function)
    framework = framework_of(function, _named(parts))

    def compute(*given: Any) -> Any:
        remaining = iter(given)
        own = [None if part is None else next(remaining) for part in parts]
        _, exported = exported_parts(function, (own[0], own[1], own[2]), backend)
        named = dict(zip(("data", "scales", "offsets"), own, strict=True))
        stream = _stream(framework, function, named, ("out",))
        allocate_like = framework.allocate if stream is None else stream.allocate

        def allocate(shape: tuple[int, ...], name: str) -> tuple[Any, Any]:
            return allocate_like(own[0], shape, name, backend)

        play = None if stream is None else stream.play
        out = _ext.dequantize(function, *exported, form, channels, dtype, backend, allocate, play)
        return framework.finish(out)

    return _called(framework, function, compute, *(part for part in parts if part is not None))


def offset_of(function: str, symmetric: Any) -> str:
    """The core's name of what `symmetric` means."""
    if not isinstance(symmetric, bool):
        raise TypeError(
            message(function, "symmetric is not a bool", repr(symmetric), "True or False")
        )
    return "none" if symmetric else "zero_point"


def exported_parts(function: str, parts: Parts, backend: str) -> tuple[Framework, Parts]:
    """The framework of the tensors, and what `_ext` takes of them."""
    tensors = _named(parts)
    framework = framework_of(function, tensors)
    _refuse_gradients(framework, function, tensors)
    for name, tensor in tensors.items():
        tensors[name] = framework.export(tensor, function, name, backend)
    return framework, (tensors["data"], tensors.get("scales"), tensors.get("zero_points"))


def _named(parts: Parts) -> dict[str, Any]:
    """Those parts that the format has, by name."""
    named = zip(_RESULTS, parts, strict=True)
    return {name: tensor for name, tensor in named if tensor is not None}


def _stream(
    framework: Framework,
    function: str,
    tensors: dict[str, Any],
    results: tuple[str, ...],
    obstacle: str = "",
) -> Any:
    """The stream of the first tensor; None where umfa computes before it returns."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if framework.in_stream is None or not framework.in_stream(next(iter(present.values()))):
        return None
    return framework.stream(function, present, results, obstacle)


def _called(framework: Framework, function: str, compute: Any, *tensors: Any) -> Any:
    """compute(*tensors), so that the framework's automatic differentiation notices."""
    if framework.call is None:
        return compute(*tensors)
    return framework.call(compute, function, *tensors)


def _refuse_gradients(framework: Framework, function: str, tensors: dict[str, Any]) -> None:
    if framework.autodiff is not None:
        framework.autodiff.refuse(function, tensors)


def _writable(framework: Framework, function: str, out: Parts, backend: str) -> Parts:
    def one(tensor: Any, name: str) -> Any:
        if tensor is None:
            return None
        framework.check_writable(tensor, function, name)
        return framework.export(tensor, function, name, backend)

    data, scales, zero_points = out
    return one(data, "data"), one(scales, "scales"), one(zero_points, "zero_points")
