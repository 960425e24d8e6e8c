"""flash-attn's functions on packed sequences, with its names, order and defaults."""

from __future__ import annotations

from typing import Any

from .._call import public
from .._errors import message
from .._ext import Attention, Function
from ._packed import slices
from ._types import WindowSize

_FUNC = Function("umfa.flash_attn_varlen_func", query="q", key="k", value="v")
_QKVPACKED = Function(
    "umfa.flash_attn_varlen_qkvpacked_func",
    query="qkv[:, 0]",
    key="qkv[:, 1]",
    value="qkv[:, 2]",
    cu_seqlens_q="cu_seqlens",
    max_seqlen_q="max_seqlen",
)
_KVPACKED = Function(
    "umfa.flash_attn_varlen_kvpacked_func", query="q", key="kv[:, 0]", value="kv[:, 1]"
)


@public(_FUNC)
def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
    *,
    seqused_q: Any = None,
    seqused_k: Any = None,
    backend: str = "auto",
    attn_mask: Any = None,
    attention_chunk: int = 0,
    learnable_sink: Any = None,
    s_aux: Any = None,
    qv: Any = None,
    return_lse: bool = False,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
    causal_alignment: str = "bottom_right",
    attention_chunk_offset: int = 0,
    prefix_lens: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    num_splits: int = 0,
    batch_invariant: bool = False,
) -> Attention:
    """`flash_attn_func` on sequences of different lengths, packed one after the other.

    Parameters
    ----------
    q : tensor, shape (total_q, nheads, head_dim)
    k : tensor, shape (total_k, nheads_kv, head_dim)
        With `block_table`: (pages, page_size, nheads_kv, head_dim), any page size.
    v : tensor, shape (total_k, nheads_kv, head_dim_v)
        With `block_table` as `k`.
    cu_seqlens_q : int32 or int64 tensor, shape (batch + 1,)
        Sequence ``b`` holds the rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` of `q`. Empty
        sequences are fine, and the first one may begin anywhere. Rows of the output that belong to
        none are 0, their log-sum-exp -inf.
    cu_seqlens_k : int32 or int64 tensor, shape (batch + 1,)
        The same of `k` and `v`; with `block_table` only the lengths count, and None means all rows
        of the table's pages.
    max_seqlen_q, max_seqlen_k : int or tensor without dimensions, or None
        At least the longest sequence; only checked.
    block_table : int32 or int64 tensor, shape (batch, pages of a sequence), optional
        Page ``block_table[b, j // page_size]`` holds key ``j`` of sequence ``b``.
    seqused_q, seqused_k : int32 or int64 tensor, shape (batch,), optional
        How many rows of each sequence count (flash-attn 3).
    causal, window_size
        Aligned at the bottom right of each sequence, or as `causal_alignment` says.
    attn_mask : tensor that broadcasts to (batch, nheads, longest seqlen_q, longest seqlen_k)
        Element ``[b, h, i, j]`` is about query ``i`` and key ``j`` of sequence ``b``; more rows and
        columns than the longest sequences have are fine.
    qv : tensor, shape (total_q, nheads, head_dim_v), optional

    Everything else is as in `flash_attn_func`.

    Returns
    -------
    out : tensor, shape (total_q, nheads, head_dim_v)
    softmax_lse : tensor, shape (nheads, total_q), float32
        Only with `return_attn_probs` or `return_lse`.
    S_dmask : tensor, shape (batch, nheads, longest seqlen_q, longest seqlen_k), or None
        Only with `return_attn_probs`, as in `flash_attn_func`; 0 beyond a sequence's end.

    Raises
    ------
    ValueError, TypeError
        A table is not monotone, reaches past the end, or names a page that is not there: nothing
        has been written then.
    """
    needed = {"cu_seqlens_q": cu_seqlens_q}
    if block_table is None:
        needed["cu_seqlens_k"] = cu_seqlens_k
    _check_given(_FUNC, needed)
    return Attention(
        _FUNC,
        query=q,
        key=k,
        value=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        block_table=block_table,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        attn_mask=attn_mask,
        attention_chunk=attention_chunk,
        learnable_sink=learnable_sink,
        s_aux=s_aux,
        qv=qv,
        return_lse=return_lse,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
        causal_alignment=causal_alignment,
        attention_chunk_offset=attention_chunk_offset,
        prefix_lens=prefix_lens,
        out=out,
        out_dtype=out_dtype,
        num_splits=num_splits,
        batch_invariant=batch_invariant,
        backend=backend,
    )


@public(_QKVPACKED, packed=("qkv",))
def flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
    attn_mask: Any = None,
    attention_chunk: int = 0,
    learnable_sink: Any = None,
    s_aux: Any = None,
    qv: Any = None,
    return_lse: bool = False,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
    causal_alignment: str = "bottom_right",
    attention_chunk_offset: int = 0,
    prefix_lens: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    num_splits: int = 0,
    batch_invariant: bool = False,
) -> Attention:
    """`flash_attn_varlen_func` on query, key and value stacked in one tensor.

    Parameters
    ----------
    qkv : tensor, shape (total, 3, nheads, head_dim)
        Read in place (jax copies the slices).

    Everything else, results and errors included, is as in `flash_attn_varlen_func`.
    """
    q, k, v = slices(_QKVPACKED, "qkv", qkv, 3, 1, "(total, 3, nheads, head_dim)")
    _check_given(_QKVPACKED, {"cu_seqlens": cu_seqlens})
    return Attention(
        _QKVPACKED,
        query=q,
        key=k,
        value=v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        attn_mask=attn_mask,
        attention_chunk=attention_chunk,
        learnable_sink=learnable_sink,
        s_aux=s_aux,
        qv=qv,
        return_lse=return_lse,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
        causal_alignment=causal_alignment,
        attention_chunk_offset=attention_chunk_offset,
        prefix_lens=prefix_lens,
        out=out,
        out_dtype=out_dtype,
        num_splits=num_splits,
        batch_invariant=batch_invariant,
        backend=backend,
    )


@public(_KVPACKED, packed=("kv",))
def flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
    attn_mask: Any = None,
    attention_chunk: int = 0,
    learnable_sink: Any = None,
    s_aux: Any = None,
    qv: Any = None,
    return_lse: bool = False,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
    causal_alignment: str = "bottom_right",
    attention_chunk_offset: int = 0,
    prefix_lens: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    num_splits: int = 0,
    batch_invariant: bool = False,
) -> Attention:
    """`flash_attn_varlen_func` on key and value stacked in one tensor.

    Parameters
    ----------
    kv : tensor, shape (total_k, 2, nheads_kv, head_dim)
        Read in place (jax copies the slices).

    Everything else, results and errors included, is as in `flash_attn_varlen_func`.
    """
    k, v = slices(_KVPACKED, "kv", kv, 2, 1, "(total_k, 2, nheads_kv, head_dim)")
    _check_given(_KVPACKED, {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k})
    return Attention(
        _KVPACKED,
        query=q,
        key=k,
        value=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        attn_mask=attn_mask,
        attention_chunk=attention_chunk,
        learnable_sink=learnable_sink,
        s_aux=s_aux,
        qv=qv,
        return_lse=return_lse,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
        causal_alignment=causal_alignment,
        attention_chunk_offset=attention_chunk_offset,
        prefix_lens=prefix_lens,
        out=out,
        out_dtype=out_dtype,
        num_splits=num_splits,
        batch_invariant=batch_invariant,
        backend=backend,
    )


def _check_given(function: Function, tables: dict[str, Any]) -> None:
    for name, table in tables.items():
        if table is None:
            raise TypeError(
                message(function.name, f"{name} is missing", None, "an int32 or int64 tensor")
            )
