"""flash_attn_with_kvcache, with flash-attn 2's names, order and defaults."""

from __future__ import annotations

from typing import Any

from .._call import public
from .._ext import Attention, Function
from .._frameworks import shape_of
from ._cache import check_rotary, lengths
from ._types import WindowSize

_KVCACHE = Function(
    "umfa.flash_attn_with_kvcache",
    query="q",
    key="k_cache",
    value="v_cache",
    new_key="k",
    new_value="v",
    seqused_k="cache_seqlens",
    return_lse="return_softmax_lse",
)


@public(_KVCACHE, packed=("cache_seqlens",))
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
    causal_alignment: str = "bottom_right",
    attention_chunk_offset: int = 0,
    prefix_lens: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    batch_invariant: bool = False,
) -> Attention:
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
        are objects with the buffer protocol, which are only read. They are rounded to the
        dtypes of the caches, which may differ; new keys are rotated first. Under
        ``torch.autocast`` the caches keep their dtypes.
    rotary_cos, rotary_sin : tensor, shape (positions, rotary_dim / 2), optional
        Only with `k` and `v`. Rotates the new keys by the angles of their positions in the cache.
        With `causal`, a window or a chunk, query ``i`` is rotated by the angles of position
        ``cache_seqlens + i``; otherwise every query by those of ``cache_seqlens``. Rotates the
        first ``rotary_dim`` channels.
    cache_seqlens : int, or int32 or int64 tensor, shape (batch,), optional
        Rows in use; all of them if None.
    cache_batch_idx : int32 or int64 tensor, shape (batch,), optional
        Which index of the cache belongs to which query. With `block_table` which of its rows, as in
        flash-attn 3: sequence ``b`` has the pages of ``block_table[cache_batch_idx[b]]``.
    cache_leftpad : int32 or int64 tensor, shape (batch,), optional
        First row that counts. With `block_table` a row of the sequence's pages, as in flash-attn 3;
        pages that end before it are not read.
    block_table : int32 or int64 tensor, shape (batch, pages of a sequence), optional
        Page ``block_table[b, j // page_size]`` holds key ``j`` of sequence ``b``.
    rotary_interleaved : bool
        Rotates the pairs (0, 1), (2, 3), ...; if False one channel of each half.
    num_splits : int
        Largest number of parts into which the keys are split, so that all threads have work when
        there are few queries. 1: no split; 0: umfa chooses. Parts are whole tiles of keys. Calls
        with many queries never split the keys.
    return_softmax_lse : bool
        Also return the log-sum-exp, shape (batch, nheads, seqlen_q), float32.
    attn_mask, qv
        As in `flash_attn_varlen_func`; `qv` has the shape (batch, seqlen_q, nheads, head_dim_v).
        With `cache_leftpad`, columns of the mask, and positions of windows and chunks, count from
        the first row that counts; rotary positions are rows of the cache.

    Everything else is as in `flash_attn_func`; `causal` aligns at the bottom right of the keys in
    use, the new ones included, or as `causal_alignment` says.

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
    check_rotary(_KVCACHE, (k, v), (rotary_cos, rotary_sin))
    if cache_seqlens is None and attn_mask is not None:
        # The same mask fits as does when the length is given.
        rows = shape_of(k_cache) or ()
        known = len(rows) == 4 and isinstance(rows[1], int)  # else the call is refused
        cache_seqlens = rows[1] if known and block_table is None else None
    return Attention(
        _KVCACHE,
        query=q,
        key=k_cache,
        value=v_cache,
        new_key=k,
        new_value=v,
        seqused_k=lengths(_KVCACHE, cache_seqlens, q),
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        rotary_interleaved=rotary_interleaved,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
        return_lse=return_softmax_lse,
        attn_mask=attn_mask,
        attention_chunk=attention_chunk,
        learnable_sink=learnable_sink,
        s_aux=s_aux,
        qv=qv,
        causal_alignment=causal_alignment,
        attention_chunk_offset=attention_chunk_offset,
        prefix_lens=prefix_lens,
        out=out,
        out_dtype=out_dtype,
        batch_invariant=batch_invariant,
        backend=backend,
    )
