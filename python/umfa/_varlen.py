"""flash-attn's functions on packed sequences, with its names, order and defaults."""

from __future__ import annotations

from typing import Any

from ._attention import Act, run
from ._frameworks import framework_of, to_numpy
from ._options import WindowSize, make_table_options
from ._packed import check_packed


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
    attention_chunk: int = 0,
    learnable_sink: Any = None,
    backend: str = "auto",
) -> Any:
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
        sequences are fine. Rows of the output that belong to none are 0, their log-sum-exp -inf.
    cu_seqlens_k : int32 or int64 tensor, shape (batch + 1,)
        The same of `k` and `v`; with `block_table` only the lengths count.
    max_seqlen_q, max_seqlen_k : int or tensor without dimensions, or None
        At least the longest sequence; only checked.
    block_table : int32 or int64 tensor, shape (batch, pages of a sequence), optional
        Page ``block_table[b, j // page_size]`` holds key ``j`` of sequence ``b``.
    seqused_q, seqused_k : int32 or int64 tensor, shape (batch,), optional
        How many rows of each sequence count (flash-attn 3).
    attention_chunk : int
        If above 0, a query sees only keys of its own chunk of that many positions (flash-attn 3).
    learnable_sink : tensor, shape (nheads,), optional
        One more logit for each head's softmax, without a value (flash-attn 4).
    causal, window_size
        Aligned at the bottom right of each sequence.

    Everything else is as in `flash_attn_func`.

    Returns
    -------
    out : tensor, shape (total_q, nheads, head_dim_v)
    softmax_lse : tensor, shape (nheads, total_q), float32
        Only with `return_attn_probs`, followed by None.

    Raises
    ------
    ValueError, TypeError
        A table is not monotone, reaches past the end, or names a page that is not there: nothing
        has been written then.
    """
    return attend_varlen(
        run,
        "umfa.flash_attn_varlen_func",
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        block_table,
        seqused_q,
        seqused_k,
        attention_chunk,
        learnable_sink,
        backend,
    )
