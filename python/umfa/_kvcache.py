"""flash_attn_with_kvcache, with flash-attn 2's names, order and defaults."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._attend import attend_sequences
from ._attention import Act, run
from ._errors import message
from ._frameworks import shape_of
from ._frameworks._buffer import is_buffer
from ._options import WindowSize, flag, integer


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    backend: str = "auto",
    attn_mask: Any = None,
    attention_chunk: int = 0,
    learnable_sink: Any = None,
    s_aux: Any = None,
    qv: Any = None,
) -> Any:
    """Attention of a few new queries over a cache of keys and values, which may be extended first.

    Parameters
    ----------
    q : tensor, shape (batch, seqlen_q, nheads, head_dim)
    k_cache, v_cache : tensor, shape (batch_cache, seqlen_cache, nheads_kv, head_dim)
        With `block_table`: (pages, page_size, nheads_kv, head_dim), any page size. The value's
        head dim may differ.
    k, v : tensor, shape (batch, seqlen_new, nheads_kv, head_dim), optional
        Written into the caches **in place**, behind the `cache_seqlens` rows in use, before
        anything is read. Not for jax and mlx, whose arrays cannot be written, nor for caches that
        are objects with the buffer protocol, which are only read. Under ``torch.autocast`` the
        caches must have its dtype (see the notes of `flash_attn_func`).
    rotary_cos, rotary_sin : tensor, shape (positions, rotary_dim / 2), optional
        Only with `k` and `v`: rotates the new keys by the angles of their positions in the cache,
        and the queries from position ``cache_seqlens`` on: with `causal`, a window or a chunk one
        after the other, else all by that position's. The first ``rotary_dim`` channels turn.
    cache_seqlens : int, or int32 or int64 tensor, shape (batch,), optional
        Rows in use; all of them if None.
    cache_batch_idx : int32 or int64 tensor, shape (batch,), optional
        Which index of the cache belongs to which query; not with `block_table`.
    cache_leftpad : int32 or int64 tensor, shape (batch,), optional
        First row that counts; not with `block_table`.
    block_table : int32 or int64 tensor, shape (batch, pages of a sequence), optional
        Page ``block_table[b, j // page_size]`` holds key ``j`` of sequence ``b``.
    rotary_interleaved : bool
        Rotates the pairs (0, 1), (2, 3), ...; if False one channel of each half.
    num_splits : int
        Into how many parts, at most, the keys of few queries are cut, so that all threads have
        some; 1 for none, 0 for umfa's choice. Parts are whole tiles of keys. Many queries keep the
        threads busy without: they are never cut.
    return_softmax_lse : bool
        Also return the log-sum-exp, shape (batch, nheads, seqlen_q), float32.
    attn_mask, qv
        As in `flash_attn_varlen_func`; `qv` has the shape (batch, seqlen_q, nheads, head_dim_v).
        With `cache_leftpad`, columns of the mask, and positions of windows and chunks, count from
        the first row that counts; rotary positions are rows of the cache.

    Everything else is as in `flash_attn_func`; `causal` aligns at the bottom right of the keys in
    use, the new ones included.

    Returns
    -------
    out : tensor, shape (batch, seqlen_q, nheads, head_dim_v)
    softmax_lse
        Only with `return_softmax_lse`.

    Raises
    ------
    ValueError, TypeError
        A table names rows, pages or indices that are not there, or the new rows do not fit: nothing
        has been written then.
    umfa.UnsupportedError
        As in `flash_attn_func`; `k` and `v` of a framework whose arrays cannot be written.
    """
    return attend_kvcache(run, "umfa.flash_attn_with_kvcache", locals())


def attend_kvcache(act: Act, function: str, arguments: dict[str, Any]) -> Any:
    """The function without its docstring, for whoever does something else at the end."""
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    turns = arguments["rotary_cos"] is not None or arguments["rotary_sin"] is not None
    if k is None and v is None and turns:
        raise ValueError(
            message(
                function,
                "rotary_cos and rotary_sin are for new keys",
                "no k and v",
                "k and v, or queries and keys that are rotated already",
            )
        )
    arguments["new_key"], arguments["new_value"] = k, v
    arguments["return_lse"] = flag(function, "return_softmax_lse", arguments["return_softmax_lse"])
    k_cache, lengths = arguments["k_cache"], arguments["cache_seqlens"]
    if lengths is None and arguments["attn_mask"] is not None:
        # The same mask fits as does when the length is given.
        rows = shape_of(k_cache) or ()
        known = len(rows) == 4 and isinstance(rows[1], int)  # else the call is refused
        lengths = rows[1] if known and arguments["block_table"] is None else None
    tables = {name: arguments[name] for name in ("cache_batch_idx", "cache_leftpad", "block_table")}
    return attend_sequences(
        act,
        function,
        {"q": q, "k_cache": k_cache, "v_cache": arguments["v_cache"]},
        arguments,
        {"seqused_k": _lengths(function, lengths, q), **tables},
        "cache_seqlens",
    )


def _lengths(function: str, cache_seqlens: Any, q: Any) -> Any:
    if cache_seqlens is None or hasattr(cache_seqlens, "__dlpack__"):
        return cache_seqlens
    if type(cache_seqlens) is not int and is_buffer(cache_seqlens):
        return cache_seqlens
    length = integer(function, "cache_seqlens", cache_seqlens, "a number of rows, or a tensor")
    shape = shape_of(q) or ()
    return np.full(shape[:1] if len(shape) == 4 else 0, length, dtype=np.int64)
