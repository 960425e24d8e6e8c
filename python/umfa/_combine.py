"""flash_attn_combine: one result from those of parts of the keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _ext
from ._attention import Act, run
from ._errors import message
from ._frameworks import dtype_name, framework_of
from ._options import backend_name


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
        Where to write the result, for torch and numpy.
    out_dtype : dtype of the framework, optional
        That of the result; that of `out_partial`, or of `out`, if None.
    backend : {"auto", "metal", "cpu"}
        Who computes; see `flash_attn_func`.

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
    return combine(run, "umfa.flash_attn_combine", locals())


def combine(act: Act, function: str, arguments: dict[str, Any]) -> Any:
    """The function without its docstring, for whoever does something else at the end.

    A row's parts are keys of an attention with that row's log-sum-exp as a mask, whose scores are
    else 0, and their results its values.
    """
    out_partial, lse_partial = arguments["out_partial"], arguments["lse_partial"]
    out, out_dtype, backend = (arguments[name] for name in ("out", "out_dtype", "backend"))
    tensors = {"out_partial": out_partial, "lse_partial": lse_partial}
    framework = framework_of(function, tensors if out is None else {**tensors, "out": out})
    _check_shapes(function, out_partial, lse_partial)
    if out is not None:
        _check_out(function, out_partial, out, out_dtype)
        framework.check_writable(out, function, "out")
        out_dtype = out.dtype
    zeros = [framework.from_numpy(np.zeros((1, n, 1), np.float32), out_partial)
             for n in (1, out_partial.shape[0])]  # fmt: skip
    order = (*range(1, out_partial.ndim - 1), 0, out_partial.ndim - 1)
    permute = framework.permute
    mask = permute(lse_partial, order[:-1])
    options = _ext.Options(
        function,
        ("query", "key", "out_partial"),
        causal=False,
        softmax_scale=1.0,
        window_left=-1,
        window_right=-1,
        softcap=0.0,
        dropout_p=0.0,
        return_lse=True,
        backend=backend_name(function, backend),
        torch_shapes=True,
        grouped=False,
    )
    results = act(
        framework,
        function,
        options,
        {
            "query": zeros[0],
            "key": zeros[1],
            "out_partial": permute(out_partial, order),
            "attn_mask": mask[..., None, :],
        },
        backend,
    )
    if len(results) == 1:
        return results[0]
    merged, lse = results[0][..., 0, :], results[1][..., 0]
    if out is not None:
        framework.copy_to(out, merged)
        return out, lse
    return merged if out_dtype is None else framework.cast(merged, out_dtype), lse


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
    if dtype_name(lse_partial) != "float32":
        raise TypeError(
            message(function, "lse_partial has the wrong dtype", dtype_name(lse_partial), "float32")
        )


def _check_out(function: str, out_partial: Any, out: Any, out_dtype: Any) -> None:
    expected = tuple(out_partial.shape)[1:]
    if tuple(out.shape) != expected:
        raise ValueError(
            message(function, "out has the wrong shape", tuple(out.shape), str(expected))
        )
    if out_dtype is not None and out_dtype != out.dtype:
        raise TypeError(
            message(function, "out and out_dtype differ", f"{out.dtype} and {out_dtype}", "one")
        )
