"""flash-attention 3's functions, with its names, order and defaults: what is imported there from
``flash_attn_interface``.

Dtypes, strides and head dims are those of `umfa.flash_attn_func`. ``backend`` is a keyword that
flash-attention 3 does not have. `HINTS` lists the arguments that cannot change a result and are not
used. ``q_descale``, ``k_descale`` and ``v_descale``, for float8 tensors, raise
`umfa.UnsupportedError` unless they are None.
"""

from __future__ import annotations

from typing import Any

from ._call import public
from ._errors import message
from ._ext import Attention, Function
from ._frameworks import shape_of
from ._functional._cache import check_rotary, lengths
from ._functional._foreign import HINTS, OTHERS, refuse
from ._functional._packed import head_groups, slices
from ._functional._types import WindowSize
from ._functional.combine import flash_attn_combine

__all__ = [
    "HINTS",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

# flash-attention 3 returns only the log-sum-exp for it.
_PROBS = "return_attn_probs"
_FUNC = Function("umfa.fa3.flash_attn_func", query="q", key="k", value="v", return_lse=_PROBS)
_VARLEN = Function(
    "umfa.fa3.flash_attn_varlen_func", query="q", key="k", value="v", return_lse=_PROBS
)
_QKVPACKED = Function(
    "umfa.fa3.flash_attn_qkvpacked_func",
    query="qkv[:, :, 0]",
    key="qkv[:, :, 1]",
    value="qkv[:, :, 2]",
    return_lse=_PROBS,
)
_KVCACHE = Function(
    "umfa.fa3.flash_attn_with_kvcache",
    query="q",
    key="k_cache",
    value="v_cache",
    new_key="k",
    new_value="v",
    seqused_k="cache_seqlens",
    block_table="page_table",
    return_lse="return_softmax_lse",
)


@public(_FUNC, others=OTHERS)
def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
) -> Attention:
    """`umfa.flash_attn_func` as flash-attention 3 spells it.

    Parameters
    ----------
    q : tensor, shape (batch, seqlen_q, nheads, head_dim)
    k : tensor, shape (batch, seqlen_kv, nheads_kv, head_dim)
    v : tensor, shape (batch, seqlen_kv, nheads_kv, head_dim_v)
    num_splits : int
        Into how many parts, at most, the keys of few queries are cut; 0 for umfa's choice. The
        default, flash-attention 3's, cuts none, which over long caches is slower.
    return_attn_probs : bool
        Also return the log-sum-exp.

    Everything else is as in `umfa.flash_attn_func`.

    Returns
    -------
    out : tensor, shape (batch, seqlen_q, nheads, head_dim_v)
    softmax_lse : tensor, shape (batch, nheads, seqlen_q), float32
        Only with `return_attn_probs`.

    Raises
    ------
    ValueError, TypeError, umfa.UnsupportedError
        As in `umfa.flash_attn_func`.
    """
    del pack_gqa, sm_margin  # HINTS
    refuse(_FUNC, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    return Attention(
        _FUNC,
        query=q,
        key=k,
        value=v,
        softmax_scale=softmax_scale,
        causal=causal,
        qv=qv,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        deterministic=deterministic,
        return_lse=return_attn_probs,
        backend=backend,
    )


@public(_QKVPACKED, packed=("qkv", "num_heads_q"), others=OTHERS)
def flash_attn_qkvpacked_func(
    qkv: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
) -> Attention:
    """`flash_attn_func` on query, key and value in one tensor.

    Parameters
    ----------
    qkv : tensor, shape (batch, seqlen, 3, nheads, head_dim)
        Or (batch, seqlen, nheads + 2 nheads_kv, head_dim), heads of queries first. Read in place
        (jax copies the slices).
    num_heads_q : int, optional
        Heads of the query; needed for four dimensions, and not for five.

    Everything else, results and errors included, is as in `flash_attn_func`.
    """
    del sm_margin  # HINTS
    refuse(_QKVPACKED, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    if len(shape_of(qkv) or ()) == 4:
        q, k, v = head_groups(_QKVPACKED, "qkv", qkv, num_heads_q)
    elif num_heads_q is None:
        q, k, v = slices(_QKVPACKED, "qkv", qkv, 3, 2, "(batch, seqlen, 3, nheads, head_dim)")
    else:
        raise ValueError(
            message(
                _QKVPACKED.name,
                "num_heads_q is for a qkv of four dimensions",
                shape_of(qkv),
                "(batch, seqlen, nheads + 2 nheads_kv, head_dim)",
            )
        )
    return Attention(
        _QKVPACKED,
        query=q,
        key=k,
        value=v,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        return_lse=return_attn_probs,
        backend=backend,
    )


@public(_VARLEN, others=OTHERS)
def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    seqused_q: Any = None,
    seqused_k: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
) -> Attention:
    """`umfa.flash_attn_varlen_func` as flash-attention 3 spells it.

    Parameters
    ----------
    q : tensor, shape (total_q, nheads, head_dim)
        Or (batch, seqlen_q, nheads, head_dim), where `cu_seqlens_q` is None.
    k : tensor, shape (total_k, nheads_kv, head_dim)
        Or (batch, seqlen_kv, nheads_kv, head_dim), where `cu_seqlens_k` is None.
    v : tensor, shape as that of `k`, with head_dim_v channels

    Everything else is as in `umfa.flash_attn_varlen_func` and `flash_attn_func`.

    Returns
    -------
    out : tensor, shape as that of `q`, with head_dim_v channels
    softmax_lse : tensor, shape (nheads, total_q) or (batch, nheads, seqlen_q), float32
        Only with `return_attn_probs`.
    """
    del pack_gqa, sm_margin  # HINTS
    refuse(_VARLEN, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    return Attention(
        _VARLEN,
        query=q,
        key=k,
        value=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        softmax_scale=softmax_scale,
        causal=causal,
        qv=qv,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        deterministic=deterministic,
        return_lse=return_attn_probs,
        backend=backend,
    )


@public(_KVCACHE, packed=("cache_seqlens",), others=OTHERS)
def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    qv: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    page_table: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k_new: Any = None,
    max_seqlen_q: Any = None,
    rotary_seqlens: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    backend: str = "auto",
) -> Attention:
    """`umfa.flash_attn_with_kvcache` as flash-attention 3 spells it.

    Parameters
    ----------
    q : tensor, shape (batch, seqlen_q, nheads, head_dim)
        Or (total_q, nheads, head_dim), with `cu_seqlens_q`.
    k_cache, v_cache : tensor, shape (batch_cache, seqlen_cache, nheads_kv, head_dim)
        With `page_table`: (pages, page_size, nheads_kv, head_dim), any page size. The value's
        head dim may differ.
    k, v : tensor, shape (batch, seqlen_new, nheads_kv, head_dim), optional
        Or (total_new, nheads_kv, head_dim), with `cu_seqlens_k_new`. Written into the caches **in
        place**, behind the `cache_seqlens` rows in use.
    cache_batch_idx : int32 or int64 tensor, shape (batch,), optional
        Which index of the cache belongs to which query; with `page_table` which of its rows.
    cache_leftpad : int32 or int64 tensor, shape (batch,), optional
        First row that counts, of the cache or of the sequence's pages.
    page_table : int32 or int64 tensor, shape (batch, pages of a sequence), optional
        ``block_table`` of `umfa.flash_attn_with_kvcache`.
    cu_seqlens_q, cu_seqlens_k_new : int32 or int64 tensor, shape (batch + 1,), optional
        Sequence ``b`` has the rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` of `q`; likewise
        of `k` and `v`. Either may be there without the other.
    max_seqlen_q : int or tensor without dimensions, optional
        At least the longest sequence of queries; only checked.
    rotary_seqlens : int32 or int64 tensor, shape (batch,), optional
        Position of a sequence's first query and first new key, for rotary angles; `cache_seqlens`
        if None.

    Everything else is as in `umfa.flash_attn_with_kvcache`.

    Returns
    -------
    out : tensor, shape as that of `q`, with head_dim_v channels
    softmax_lse : tensor, shape (batch, nheads, seqlen_q) or (nheads, total_q), float32
        Only with `return_softmax_lse`. Flash-attention 3 goes on with what it accumulated of each
        split; umfa has nothing of the kind to return.

    Raises
    ------
    ValueError, TypeError, umfa.UnsupportedError
        As in `umfa.flash_attn_with_kvcache`.
    """
    del scheduler_metadata, pack_gqa, sm_margin  # HINTS
    refuse(_KVCACHE, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    check_rotary(_KVCACHE, (k, v), (rotary_cos, rotary_sin))
    return Attention(
        _KVCACHE,
        query=q,
        key=k_cache,
        value=v_cache,
        new_key=k,
        new_value=v,
        qv=qv,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        seqused_k=lengths(_KVCACHE, cache_seqlens, q, cu_seqlens_q),
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=page_table,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        max_seqlen_q=max_seqlen_q,
        rotary_seqlens=rotary_seqlens,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        rotary_interleaved=rotary_interleaved,
        num_splits=num_splits,
        return_lse=return_softmax_lse,
        backend=backend,
    )


def get_scheduler_metadata(
    batch_size: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    num_heads_q: Any,
    num_heads_kv: Any,
    headdim: Any,
    cache_seqlens: Any,
    qkv_dtype: Any = None,
    headdim_v: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k_new: Any = None,
    cache_leftpad: Any = None,
    page_size: Any = None,
    max_seqlen_k_new: Any = 0,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> None:
    """What `flash_attn_with_kvcache` takes as `scheduler_metadata`: None, since umfa prepares
    nothing.

    All arguments are `HINTS`. ``qkv_dtype`` is None and not torch's bfloat16 by default, so that
    umfa does not need torch.
    """
