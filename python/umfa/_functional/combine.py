"""flash_attn_combine: one result from those of parts of the keys."""

from __future__ import annotations

from typing import Any

from .._call._public import BODIES
from .._call.combine import Combination, run_combination


def flash_attn_combine(
    out_partial: Any,
    lse_partial: Any,
    out: Any = None,
    out_dtype: Any = None,
    *,
    backend: str = "auto",
) -> Any:
    """Merges partial results over disjoint keys into the result over all keys (flash-attn 3).

    For keys in several places: parts of a long cache, several calls or several machines.

    Parameters
    ----------
    out_partial : tensor, shape (parts, batch, seqlen_q, nheads, head_dim)
        Or (parts, total_q, nheads, head_dim). Result of each part: float32, float16 or bfloat16.
    lse_partial : tensor, shape (parts, batch, seqlen_q, nheads)
        Or (parts, total_q, nheads). float32: natural log-sum-exp of each part. A part that saw no
        key has -inf and is ignored. `flash_attn_func` returns the last two dimensions swapped: pass
        ``lse.transpose(1, 2)``.
    out : tensor, optional
        Where to write the result, for torch and numpy (not a buffer, which is only read): of the
        result's shape, float32, float16 or bfloat16, on the device of `out_partial`, and in memory
        of its own.
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
    return run_combination(_combination(out_partial, lse_partial, out, out_dtype, backend=backend))


def _combination(
    out_partial: Any,
    lse_partial: Any,
    out: Any = None,
    out_dtype: Any = None,
    *,
    backend: str = "auto",
) -> Combination:
    """The arguments as a record: shared by the call and by `can_run`."""
    name = "umfa.flash_attn_combine"
    return Combination(name, out_partial, lse_partial, out, out_dtype, backend)


BODIES[flash_attn_combine] = _combination
