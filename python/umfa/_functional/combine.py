"""flash_attn_combine: one result from those of parts of the keys."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _ext
from .._call._public import BODIES
from .._call.run import run
from .._errors import message
from .._ext import Attention, Function
from .._frameworks import Framework, dtype_name, framework_of

_COMBINE = Function("umfa.flash_attn_combine", layout="bhsd", broadcasts=True, value="out_partial")


def flash_attn_combine(
    out_partial: Any,
    lse_partial: Any,
    out: Any = None,
    out_dtype: Any = None,
    *,
    backend: str = "auto",
) -> Any:
    """Merges results of attention over parts of the keys into that over all of them (flash-attn 3).

    For keys that lie in several places: parts of a long cache, of several calls or machines.

    Parameters
    ----------
    out_partial : tensor, shape (parts, batch, seqlen_q, nheads, head_dim)
        Or (parts, total_q, nheads, head_dim). Result of each part: float32, float16 or bfloat16.
    lse_partial : tensor, shape (parts, batch, seqlen_q, nheads)
        Or (parts, total_q, nheads). float32: natural log-sum-exp of each part, -inf where it saw no
        key (its result then does not count). `flash_attn_func` returns it with the last two
        dimensions the other way round: ``lse.transpose(1, 2)``.
    out : tensor, optional
        Where to write the result, for torch and numpy (not a buffer, which is only read): of the
        result's shape, float32, float16 or bfloat16, and on the device of `out_partial`.
    out_dtype : dtype of the framework, optional
        That of the result; that of `out_partial`, or of `out`, if None.
    backend : {"auto", "metal", "cpu"}
        Which backend runs the call; see `flash_attn_func`.

    Returns
    -------
    out : tensor, shape (batch, seqlen_q, nheads, head_dim)
        Or (total_q, nheads, head_dim). 0 where no part saw a key.
    softmax_lse : tensor, shape (batch, seqlen_q, nheads), float32
        Or (total_q, nheads).

    Raises
    ------
    ValueError, TypeError
        An argument is wrong; the message holds the offending value.
    umfa.UnsupportedError
        Gradients; `out` of a framework whose arrays cannot be written.
    """
    attention, finish = _attention_over_parts(out_partial, lse_partial, out, out_dtype, backend)
    return finish(*run(attention, autocasts=False))


def _attention_over_parts(
    out_partial: Any, lse_partial: Any, out: Any, out_dtype: Any, backend: str
) -> tuple[Attention, Callable[[Any, Any], tuple[Any, Any]]]:
    """An attention whose keys are the parts: scores are 0, the log-sum-exp is the mask, the results
    are the values. Also the function that makes the results from the attention's."""
    function = _COMBINE.name
    tensors = {"out_partial": out_partial, "lse_partial": lse_partial}
    if out is None:
        framework = framework_of(function, tensors)
    else:
        given = {**tensors, "out": out}
        framework = framework_of(function, given, ("out",))
        tensors = {name: given[name] for name in tensors}
    out_partial, lse_partial = tensors.values()
    for name, tensor in tensors.items():
        _ext.check_tensor(function, name, framework.export(tensor, function, name, backend))
    _check_shapes(function, out_partial, lse_partial)
    dtype = dtype_name(out_partial.dtype)
    wanted = dtype if out_dtype is None else _checked_dtype(function, out_dtype)
    if out is not None:
        wanted = _checked_out(framework, function, out_partial, out, out_dtype)
    # Half precision would be rounded twice, and the second time for nothing.
    parts = out_partial if wanted == dtype else framework.cast(out_partial, "float32")
    zeros = [
        framework.from_numpy(np.zeros((1, n, 1), np.float32), parts)
        for n in (1, out_partial.shape[0])
    ]
    order = (*range(1, out_partial.ndim - 1), 0, out_partial.ndim - 1)
    # Masks are kept in other units: what is common to the parts would cost their last bits.
    relative, top = framework.minus_top(lse_partial)
    attention = Attention(
        _COMBINE,
        query=zeros[0],
        key=zeros[1],
        value=framework.permute(parts, order),
        attn_mask=framework.permute(relative, order[:-1])[..., None, :],
        softmax_scale=1.0,
        grouped=False,
        return_lse=True,
        backend=backend,
    )

    def finish(merged: Any, lse: Any) -> tuple[Any, Any]:
        merged, lse = merged[..., 0, :], lse[..., 0] + top
        if out is not None:
            framework.copy_to(out, merged)
            return out, lse
        same = wanted == dtype_name(merged.dtype)
        return merged if same else framework.cast(merged, wanted), lse

    return attention, finish


def _asked(
    out_partial: Any,
    lse_partial: Any,
    out: Any = None,
    out_dtype: Any = None,
    *,
    backend: str = "auto",
) -> Attention:
    return _attention_over_parts(out_partial, lse_partial, out, out_dtype, backend)[0]


BODIES[flash_attn_combine] = _asked


_DTYPES = ("float32", "float16", "bfloat16")


def _checked_dtype(function: str, out_dtype: Any) -> str:
    name = dtype_name(out_dtype)
    if name not in _DTYPES:
        raise TypeError(
            message(
                function, "out_dtype is wrong", reprlib.repr(out_dtype),
                "float32, float16 or bfloat16",
            )
        )  # fmt: skip
    return name


def _check_shapes(function: str, out_partial: Any, lse_partial: Any) -> None:
    shape, lse_shape = tuple(out_partial.shape), tuple(lse_partial.shape)
    if len(shape) not in (4, 5) or shape[0] < 1:
        raise ValueError(
            message(
                function,
                "out_partial has the wrong shape",
                shape,
                "(parts, batch, seqlen_q, nheads, head_dim) or (parts, total_q, nheads, head_dim), "
                "at least one part",
            )
        )
    if lse_shape != shape[:-1]:
        raise ValueError(
            message(function, "lse_partial has the wrong shape", lse_shape, str(shape[:-1]))
        )
    dtype = dtype_name(lse_partial.dtype)
    if dtype != "float32":
        raise TypeError(message(function, "lse_partial has the wrong dtype", dtype, "float32"))


def _checked_out(
    framework: Framework, function: str, out_partial: Any, out: Any, out_dtype: Any
) -> str:
    """The dtype of `out`, into which a result can be written."""
    framework.check_writable(out, function, "out")
    _ext.check_tensor(function, "out", framework.export(out, function, "out"), writable=True)
    expected = tuple(out_partial.shape)[1:]
    if tuple(out.shape) != expected:
        raise ValueError(
            message(function, "out has the wrong shape", tuple(out.shape), str(expected))
        )
    devices = [getattr(tensor, "device", None) for tensor in (out, out_partial)]
    if devices[0] != devices[1]:
        raise ValueError(message(function, "out is on another device", *map(str, devices)))
    dtype = dtype_name(out.dtype)
    if out_dtype is not None and _checked_dtype(function, out_dtype) != dtype:
        raise TypeError(
            message(function, "out and out_dtype differ", f"{dtype} and {out_dtype}", "one dtype")
        )
    return dtype
