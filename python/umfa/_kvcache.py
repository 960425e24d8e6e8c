"""flash_attn_with_kvcache, with flash-attn 2's names, order and defaults."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._attention import Act, run, table
from ._errors import message
from ._frameworks import framework_of
from ._options import WindowSize, integer, make_options


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
    attention_chunk: int = 0,
    learnable_sink: Any = None,
    backend: str = "auto",
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
        anything is read. Not for jax and mlx, whose arrays cannot be written.
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
        How many pieces the keys are cut into. Accepted and checked, but umfa chooses itself, so
        that results do not depend on it.
    return_softmax_lse : bool
        Also return the log-sum-exp, shape (batch, nheads, seqlen_q), float32.
    attention_chunk, learnable_sink
        As in `flash_attn_varlen_func`.

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
    return attend_kvcache(
        run,
        "umfa.flash_attn_with_kvcache",
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        softmax_scale,
        causal,
        window_size,
        softcap,
        rotary_interleaved,
        alibi_slopes,
        num_splits,
        return_softmax_lse,
        attention_chunk,
        learnable_sink,
        backend,
    )


def attend_kvcache(
    act: Act,
    function: str,
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any,
    v: Any,
    rotary_cos: Any,
    rotary_sin: Any,
    cache_seqlens: Any,
    cache_batch_idx: Any,
    cache_leftpad: Any,
    block_table: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    rotary_interleaved: Any,
    alibi_slopes: Any,
    num_splits: Any,
    return_softmax_lse: Any,
    attention_chunk: Any,
    learnable_sink: Any,
    backend: Any,
) -> Any:
    """The function without its docstring, for whoever does something else at the end."""
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    optional = {
        "new_key": k,
        "new_value": v,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "alibi_slopes": alibi_slopes,
        "learnable_sink": learnable_sink,
    }
    shown = {"new_key": "k", "new_value": "v"}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    framework = framework_of(
        function, {**tensors, **{shown.get(name, name): each for name, each in given.items()}}
    )
    tensors.update(given)
    splits = integer(function, "num_splits", num_splits, "0 (umfa chooses) or a number of pieces")
    if splits < 0:
        raise ValueError(message(function, "num_splits is out of range", splits, "at least 0"))
    options = make_options(
        function,
        ("q", "k_cache", "v_cache"),
        0.0,
        softmax_scale,
        causal,
        window_size,
        softcap,
        False,
        return_softmax_lse,
        backend,
        attention_chunk=attention_chunk,
        lengths_name="cache_seqlens",
        rotary_interleaved=rotary_interleaved,
    )
    if k is not None or v is not None:
        framework.check_writable(k_cache, function, "k_cache")
        framework.check_writable(v_cache, function, "v_cache")
    elif rotary_cos is not None or rotary_sin is not None:
        raise ValueError(
            message(
                function,
                "rotary_cos and rotary_sin are for new keys",
                "no k and v",
                "k and v, or queries and keys that are rotated already",
            )
        )
    tables = {
        "seqused_k": _lengths(function, cache_seqlens, q),
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "block_table": block_table,
    }
    for name, value in tables.items():
        if value is not None:
            tensors[name] = table(function, "cache_seqlens" if name == "seqused_k" else name, value)
    results = act(framework, function, options, tensors, backend)
    return results if len(results) == 2 else results[0]


def _lengths(function: str, cache_seqlens: Any, q: Any) -> Any:
    if cache_seqlens is None or hasattr(cache_seqlens, "__dlpack__"):
        return cache_seqlens
    length = integer(function, "cache_seqlens", cache_seqlens, "a number of rows, or a tensor")
    shape = tuple(getattr(q, "shape", ()))
    return np.full(shape[:1] if len(shape) == 4 else 0, length, dtype=np.int64)
