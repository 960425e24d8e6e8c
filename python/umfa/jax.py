"""jax.nn's attention, computed by umfa.

>>> from umfa.jax import dot_product_attention  # in place of jax.nn's

Importing this module changes nothing.
"""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from ._call.run import run
from ._errors import message
from ._ext import Attention, Function

__all__ = ["dot_product_attention"]

_NAME = "umfa.jax.dot_product_attention"


def __dir__() -> list[str]:
    return __all__


def _function(mask: str) -> Function:
    return Function(
        _NAME,
        attn_mask=mask,
        softmax_scale="scale",
        causal="is_causal",
        window_size="local_window_size",
        seqused_q="query_seq_lengths",
        seqused_k="key_value_seq_lengths",
    )


_FUNCTIONS = {name: _function(name) for name in ("mask", "bias", "bias with mask")}
"""By what the core's one mask is, so that errors name it."""

_BIASES = (jnp.float32, jnp.float16, jnp.bfloat16, jnp.float64)
"""Dtypes that are handed on as they are. The core says that it refuses the last."""


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention` with memory independent of both sequence lengths.

    It works inside of ``jax.jit``, ``grad``, ``vmap``, ``scan``, ``checkpoint`` and, under jit,
    ``shard_map``, as a custom call of XLA's on the CPU. No Python runs when a compiled function
    does.

    Parameters
    ----------
    query : array, shape (B, T, N, H) or (T, N, H)
        float32, float16 or bfloat16.
    key : array, shape (B, S, K, H) or (S, K, H)
        N is a multiple of K. Query head ``n`` reads key head ``n // (N // K)``.
    value : array, shape (B, S, K, H) or (S, K, H)
        Its head dim may also differ from H, and the dtypes of the three may differ. jax refuses
        both.
    bias : array that broadcasts to (B, N, T, S), optional
        Added to the scores. Differentiable.
    mask : array of bool that broadcasts to (B, N, T, S), optional
        A query attends where it is True. If `bias` is given too, both are joined into one array of
        the shape to which they broadcast.
    scale : float, optional
        Factor on the scores, ``H ** -0.5`` if None. Differentiable if it is a traced number, which
        costs a float32 copy of `query`.
    is_causal : bool
        Query ``i`` sees the keys ``j <= i``.
    query_seq_lengths : array of int, shape (B,), optional
        Rows of `query` that count. The rows after them become 0.
    key_value_seq_lengths : array of int, shape (B,), optional
        Rows of `key` and `value` that count.
    local_window_size : int or pair of int, optional
        ``(left, right)``: query ``i`` sees the keys ``i - left <= j <= i + right``. An int is both.
        Negative numbers count from the other side.
    implementation : {None, "umfa"}
        Both are umfa. jax's own implementations are those of `jax.nn.dot_product_attention`.
    return_residual : bool
        Also return the log-sum-exp of the scores.

    Returns
    -------
    out : array
        Shape and dtype of `query` (the last dimension is that of `value`). A query that sees no key
        gets 0. jax gives it the mean of all values.
    residual : array, shape (B, T, N) or (T, N), dtype of `key`
        Only with `return_residual`. Natural logarithm, without gradient. -inf for a query that sees
        no key, where jax gives a large negative number.

    Raises
    ------
    ValueError, TypeError
        An argument is wrong; the message holds the offending value.
    umfa.UnsupportedError
        Second derivatives, forward mode, float64, H above 576.
    """
    if implementation not in (None, "umfa"):
        _refuse(
            "implementation is not one of umfa's",
            repr(implementation),
            "None or 'umfa', or a call of jax.nn.dot_product_attention",
        )
    q, k, v = (_array(x) for x in (query, key, value))
    out_dtype = None
    if isinstance(scale, jax.Array):
        q, scale, out_dtype = _scaled(q, scale)
    unbatched = q.ndim == 3
    if unbatched:
        q, k, v = (x[None] if x.ndim == 3 else x for x in (q, k, v))
    what, attn_mask = _masks(bias, mask)
    _check_no_longer(what, attn_mask, q, k)
    window, is_causal = _window(local_window_size, is_causal)
    results = run(
        Attention(
            _FUNCTIONS[what],
            query=q,
            key=k,
            value=v,
            attn_mask=attn_mask,
            softmax_scale=scale,
            causal=is_causal,
            causal_alignment="top_left",
            window_size=window,
            window_offsets=window is not None and min(window) < 0,
            out_dtype=out_dtype,
            seqused_q=_lengths(query_seq_lengths, q, "query_seq_lengths"),
            seqused_k=_lengths(key_value_seq_lengths, k, "key_value_seq_lengths"),
            return_lse=return_residual,
            backend="auto",
        )
    )
    if not return_residual:
        return results[0] if unbatched else results
    out, lse = results
    residual = jax.lax.stop_gradient(lse.swapaxes(1, 2).astype(k.dtype))
    return (out[0], residual[0]) if unbatched else (out, residual)


def _array(x: Any) -> Any:
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _masks(bias: Any, mask: Any) -> tuple[str, Any]:
    """(name in errors, the core's mask)."""
    if mask is not None:
        mask = _array(mask)
        if mask.dtype != jnp.bool_:
            expected = "bool; give what is to be added as bias"
            raise TypeError(message(_NAME, "mask has the wrong dtype", mask.dtype, expected))
    if bias is None:
        return "mask", mask
    bias = _array(bias)
    if bias.dtype not in _BIASES:  # integers and bool are numbers here
        bias = bias.astype(jnp.float32)
    if mask is None:
        return "bias", bias
    try:
        return "bias with mask", jnp.where(mask, bias, -jnp.inf)
    except ValueError:
        got = f"{bias.shape} and {mask.shape}"
        _refuse("bias and mask do not broadcast", got, "shapes that broadcast to (B, N, T, S)")


def _check_no_longer(what: str, mask: Any, query: Any, key: Any) -> None:
    """With lengths, the core takes a mask that is longer than the rows. jax does not."""
    if mask is None or not query.ndim == key.ndim == 4:
        return
    batch, rows, heads, _ = query.shape
    keys = key.shape[1]
    if any(size not in (1, x) for size, x in zip(mask.shape[::-1], (keys, rows), strict=False)):
        expected = f"a shape that broadcasts to {(batch, heads, rows, keys)}"
        _refuse(f"{what} has the wrong shape", str(mask.shape), expected)


def _window(size: Any, is_causal: bool) -> tuple[tuple[int, int] | None, bool]:
    """(the core's window, whether the call is causal beside it)."""
    if size is None:
        return None, is_causal
    try:
        left, right = (operator.index(x) for x in (size if _is_pair(size) else (size, size)))
    except TypeError:
        text = message(_NAME, "local_window_size is wrong", size, "an int or a pair of int")
        raise TypeError(text) from None
    if is_causal:
        right = min(right, 0)
    if left + right < 0:
        _refuse("local_window_size leaves no key", f"{size}, is_causal={is_causal}",
                "left + right >= 0")  # fmt: skip
    return (left, right), False


def _is_pair(size: Any) -> bool:
    return isinstance(size, (tuple, list)) and len(size) == 2


def _lengths(lengths: Any, rows: Any, name: str) -> Any:
    """Lengths beyond the rows are all rows, and negative ones none, as in jax's masks."""
    if lengths is None:
        return None
    lengths = _array(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(message(_NAME, f"{name} has the wrong dtype", lengths.dtype, "int32"))
    return jnp.clip(lengths, 0, rows.shape[1] if rows.ndim > 1 else 0).astype(jnp.int32)


def _scaled(query: Any, scale: Any) -> tuple[Any, Any, Any]:
    """(query, scale, dtype of the result) for a scale that is an array. What is traced has no value
    for the custom call's options: the query is multiplied by it, in float32."""
    if scale.ndim:
        _refuse("scale has dimensions", f"shape {scale.shape}", "a number")
    if not isinstance(scale, jax.core.Tracer):
        return query, float(scale), None
    return query.astype(jnp.float32) * scale.astype(jnp.float32), 1.0, query.dtype


def _refuse(what: str, got: str, expected: str) -> NoReturn:
    raise ValueError(message(_NAME, what, got, expected))
