"""A call inside jax's transforms: a custom call of XLA's, and another as its backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import jax
import jax.custom_batching
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from .. import _ext
from .._errors import UnsupportedError, message
from . import _numpy

_why_not = ""
"""Why XLA does not take the custom calls; empty if it does."""

try:
    for _name, _handler in _ext.xla_handlers().items():
        jax.ffi.register_ffi_target(_name, _handler, platform="cpu")
except Exception as error:  # calls outside of transforms need none
    _why_not = str(error)

Results = Sequence[tuple[tuple[int, ...], str]]
"""(shape, dtype) of each."""


def applies(tensors: Iterable[Any]) -> bool:
    return any(isinstance(tensor, jax.core.Tracer) for tensor in tensors)


def records() -> bool:
    return False  # each call says it by its tensors


def transformed() -> bool:
    return False


def wanted(tensors: Iterable[Any]) -> list[bool]:
    return [False for _ in tensors]  # known only once jax differentiates


def refuse(function: str, tensors: dict[str, Any]) -> None:
    """`_jax.export` refuses what is traced."""


def zeros_like(tensor: Any) -> Any:
    return jnp.zeros_like(tensor)


def run(call: Any, tensors: dict[str, Any]) -> tuple[Any, ...]:
    if _why_not:
        _refuse(call, "this release of jax takes no custom calls of umfa", _why_not, "a newer jax")
    operands = _varying(tensors.values(), _manual_axes(tensors.values()))
    traced_tables = [x for x in call.tables if isinstance(tensors[x], jax.core.Tracer)]
    if call.returns_weights and traced_tables:
        _refuse(
            call,
            f"the size of the matrix of weights depends on {traced_tables[0]}",
            "a traced table",
            "a table that is a constant",
        )
    # With the numbers of the tables that are constants.
    shown = exported(call, operands)
    asked, both = (_ext.attention_results(x, shown) for x in (call.asked.options, call.options))
    attention = _differentiable(call, asked, both)
    try:
        results: tuple[Any, ...] = attention(*operands)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        _refuse(
            call,
            "forward-mode differentiation is not implemented",
            "a tangent (jax.jvp, jax.jacfwd or jax.linearize)",
            "reverse mode (jax.grad, jax.vjp or jax.jacrev)",
        )
    return results


def _differentiable(call: Any, asked: Results, both: Results) -> Any:
    """The call as a function of its tensors. `asked` are its results, `both` those that a backward
    pass needs."""

    @jax.custom_vjp
    def attention(*operands: Any) -> tuple[Any, ...]:
        return _custom_call("umfa.attention", call.asked.options, asked, operands)

    def forward(*given: Any) -> tuple[tuple[Any, ...], Any]:
        operands = tuple(x.value for x in given)
        wants = [x.perturbed and jnp.issubdtype(x.value.dtype, jnp.floating) for x in given]
        call.check(wants)
        _check_backward(call, both, operands, wants)
        results = _once(call, "umfa.attention", both, operands)
        # A tree holds what is known while tracing: () where a gradient is wanted.
        known = tuple(() if wants_it else None for wants_it in wants)
        returned = results[:1] if len(asked) == 1 else results
        return returned, (operands, *results[:2], known)

    def backward(saved: Any, cotangents: Any) -> tuple[Any, ...]:
        operands, out, lse, known = saved
        dout, dlse, dweights = (*cotangents, None, None)[:3]
        if not _is_zero(dweights):
            _refuse(
                call,
                "the matrix of weights has no gradient",
                "a derivative of it",
                "derivatives of out",
            )
        if _is_zero(dout) and _is_zero(dlse):
            return (None,) * len(operands)
        dout = jnp.zeros_like(out) if _is_zero(dout) else dout
        upstream = (dout,) if _is_zero(dlse) else (dout, dlse)
        wants = [wants_it is not None for wants_it in known]
        found = iter(_gradients(call, operands, wants, (out, lse, *upstream)))
        return tuple(next(found) if wants_it else None for wants_it in wants)

    attention.defvjp(forward, backward, symbolic_zeros=True)
    return attention


def _gradients(
    call: Any, operands: tuple[Any, ...], wants: Sequence[bool], saved: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The gradients that are wanted."""
    results = [
        (x.shape, str(x.dtype)) for x, wants_it in zip(operands, wants, strict=True) if wants_it
    ]
    names = ",".join(_names(call, wants))
    return _once(call, "umfa.attention_backward", results, (*operands, *saved), gradients=names)


def _once(
    call: Any, target: str, results: Results, operands: tuple[Any, ...], **more: Any
) -> tuple[Any, ...]:
    """A custom call in a backward pass, where its own gradients would be second ones."""

    @jax.custom_vjp
    def operation(*operands: Any) -> tuple[Any, ...]:
        return _custom_call(target, call.options, results, operands, **more)

    def refuse(*_: Any) -> NoReturn:
        _refuse(
            call,
            "the gradient of a gradient is not implemented",
            "a second derivative",
            "first derivatives only",
        )

    operation.defvjp(refuse, refuse)
    found: tuple[Any, ...] = operation(*operands)
    return found


def _custom_call(
    target: str, options: Any, results: Results, operands: Sequence[Any], **more: Any
) -> tuple[Any, ...]:
    method = _vmap_method(options, operands)
    struct: Any = jax.ShapeDtypeStruct
    shapes = [struct(shape, jnp.dtype(dtype)) for shape, dtype in results]
    attributes = _attributes(options) | more
    ffi_method = "sequential" if method == "fold" else method
    operation = jax.ffi.ffi_call(target, shapes, vmap_method=ffi_method)
    if method != "fold":
        return _varying(operation(*operands, **attributes), _manual_axes(operands))

    @jax.custom_batching.custom_vmap
    def foldable(*operands: Any) -> tuple[Any, ...]:
        return _varying(operation(*operands, **attributes), _manual_axes(operands))

    @foldable.def_vmap
    def fold(size: int, batched: Sequence[bool], *operands: Any) -> tuple[Any, Any]:
        """The slices as a longer batch."""
        longer = []
        for x, has_slices in zip(operands, batched, strict=True):
            slices = x if has_slices else jnp.broadcast_to(x, (size, *x.shape))
            longer.append(slices.reshape(size * slices.shape[1], *slices.shape[2:]))
        folded = [((size * shape[0], *shape[1:]), dtype) for shape, dtype in results]
        found = _custom_call(target, options, folded, longer, **more)
        back = tuple(x.reshape(size, *shape) for x, (shape, _) in zip(found, results, strict=True))
        return back, (True,) * len(back)

    found: tuple[Any, ...] = foldable(*operands)
    return found


def _vmap_method(options: Any, operands: Sequence[Any]) -> str:
    """How slices are taken: "fold", as a longer batch; "broadcast_all", with one more dimension;
    "sequential", one by one. Dropout depends on the index in the batch, and other tensors need not
    have a batch."""
    if options.fields != ("query", "key", "value") or options.dropout_p != 0:
        return "sequential"
    if not options.description["broadcasts"]:
        return "fold"
    ranks = {x.ndim for x in operands[:3]}
    return "broadcast_all" if len(ranks) == 1 and operands[0].ndim > 2 else "sequential"


def _attributes(options: Any) -> dict[str, Any]:
    """The description as XLA's types: text, bool, int64, float64, array of int64."""
    described = options.description
    given = {
        "function": described["function"],
        "layout": described["layout"],
        "broadcasts": described["broadcasts"],
        "backend": described["backend"],
        "tensors": ",".join(described["tensors"]),
        "names": ";".join(f"{field}={name}" for field, name in described["names"].items()),
    }
    return {name: _attribute(value) for name, value in (given | described["values"]).items()}


def _attribute(value: Any) -> Any:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.int64(value if value < 2**63 else value - 2**64)  # jax has none of uint64
    if isinstance(value, float):
        return np.float64(value)
    return np.array(value, np.int64) if isinstance(value, tuple) else value


def _manual_axes(arrays: Iterable[Any]) -> frozenset[Any]:
    """The axes of the mesh along which any of the arrays differ, inside of jax.shard_map."""
    axes: frozenset[Any] = frozenset()
    for array in arrays:
        if isinstance(array, jax.core.Tracer):
            aval: Any = array.aval
            kind = getattr(aval, "mat", None)  # jax before 0.10: vma
            axes |= frozenset(getattr(aval, "vma", ()) if kind is None else kind.varying)
    return axes


def _varying(arrays: Iterable[Any], axes: frozenset[Any]) -> tuple[Any, ...]:
    """The same arrays, which may differ along these axes: what a custom call takes must agree in
    that, and jax does not know it of results."""
    if not axes:
        return tuple(arrays)
    lax: Any = jax.lax
    varying = []
    for array in arrays:
        missing = tuple(axes - _manual_axes([array]))
        if missing and hasattr(lax, "pcast"):
            array = lax.pcast(array, missing, to="varying")
        elif missing:
            array = lax.pvary(array, missing)
        varying.append(array)
    return tuple(varying)


def _check_backward(
    call: Any, results: Results, operands: Sequence[Any], wants: Sequence[bool]
) -> None:
    """Raises what the backward pass would, of shapes and dtypes."""
    if not any(wants):
        return
    out, lse = (_numpy.export(_memory(*x), call.function, "out") for x in results[:2])
    possible, reason = _ext.attention_backward_can_run(
        call.options, exported(call, operands), (out, lse, out, None), _names(call, wants)
    )
    if not possible:
        raise call.refusal(reason)


def _names(call: Any, wants: Sequence[bool]) -> list[str]:
    names = zip(call.gradients, wants, strict=True)
    return [name for name, wants_it in names if wants_it and name is not None]


def exported(call: Any, operands: Sequence[Any]) -> tuple[Any, ...]:
    """What the core needs to check a call on these tensors."""
    return tuple(
        shown if name in call.tables else _numpy.export(shown, call.function, name)
        for name, shown in zip(call.names, stand_ins(call, operands), strict=True)
    )


def stand_ins(call: Any, operands: Iterable[Any]) -> list[Any]:
    """Arrays of the same shapes and dtypes, whose numbers nobody reads; those of tables, which the
    core does read, are right if they are known, and else zeros, which suit every call."""
    shown = []
    for name, tensor in zip(call.names, operands, strict=True):
        if not isinstance(tensor.dtype, np.dtype):  # keys of jax.random's
            raise TypeError(
                message(
                    call.function, f"{name} has the wrong dtype", tensor.dtype, "a dtype of numbers"
                )
            )
        if name not in call.tables:
            shown.append(_memory(_shape(call, name, tensor), tensor.dtype))
        elif isinstance(tensor, jax.core.Tracer):
            shown.append(np.zeros(_shape(call, name, tensor), tensor.dtype))
        else:
            shown.append(tensor)
    return shown


def _shape(call: Any, name: str, tensor: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = tensor.shape
    if not all(isinstance(size, int) for size in shape):
        _refuse(call, f"{name} has symbolic sizes", f"shape {shape}", "sizes that are numbers")
    return shape


def _memory(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array of this shape on the memory of one number."""
    one = np.empty((), jnp.dtype(dtype))
    steps = [one.itemsize]
    for size in shape[:0:-1]:
        steps.insert(0, steps[0] * max(size, 1))
    return np.lib.stride_tricks.as_strided(one, shape, steps[: len(shape)])


def _is_zero(cotangent: Any) -> bool:
    return cotangent is None or isinstance(cotangent, SymbolicZero)


def _refuse(call: Any, what: str, got: str, expected: str) -> NoReturn:
    raise UnsupportedError(message(call.function, what, got, expected))
