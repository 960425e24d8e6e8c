"""flash-attention 4's functions, with its names, order and defaults: what is imported there from
``flash_attn.cute``.

Results are always pairs, the log-sum-exp None unless asked for. Windows may lie beside the
diagonal: None is unbounded, and a bound below 0 moves the window's edge across it. Two bounds
whose sum is below 0 are unbounded, as they are there.

Dtypes, strides and head dims are those of `umfa.flash_attn_func`. ``backend`` is a keyword that
flash-attention 4 does not have. `HINTS` lists the arguments that cannot change a result and are not
used. Programs (``score_mod``, ``mask_mod``), sparsity
(``block_sparse_tensors``, ``gather_kv_indices``) and what belongs to them raise
`umfa.UnsupportedError` unless they are None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._call import public
from ._ext import Attention, Function
from ._functional._foreign import HINTS, OTHERS, refuse
from ._functional._types import WindowSize

__all__ = ["HINTS", "flash_attn_func", "flash_attn_varlen_func"]

_FUNC = Function("umfa.fa4.flash_attn_func", query="q", key="k", value="v")
_VARLEN = Function(
    "umfa.fa4.flash_attn_varlen_func", query="q", key="k", value="v", block_table="page_table"
)
# Without q and k the scores are qv.v: those of queries qv and keys v.
_FUNC_OF_QV = Function("umfa.fa4.flash_attn_func", query="qv", key="v, as keys,", value="v")
_VARLEN_OF_QV = Function(
    "umfa.fa4.flash_attn_varlen_func",
    query="qv",
    key="v, as keys,",
    value="v",
    block_table="page_table",
)


def _pair(attention: Attention, result: Any) -> tuple[Any, Any]:
    """With qv, flash-attention 4's log-sum-exp has heads last."""
    if not isinstance(result, tuple):
        return result, None
    out, lse = result
    return out, lse.swapaxes(-1, -2) if "qv" in attention.tensors else lse


@public(_FUNC, others=OTHERS, finish=_pair)
def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    qv: Any = None,
    gather_kv_indices: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (None, None),
    learnable_sink: Any = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    aux_tensors: Any = None,
    aux_scalars: Any = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
    *,
    backend: str = "auto",
) -> Attention:
    """`umfa.flash_attn_func` as flash-attention 4 spells it.

    Parameters
    ----------
    q : tensor, shape (batch, seqlen_q, nheads, head_dim)
    k : tensor, shape (batch, seqlen_kv, nheads_kv, head_dim)
        `q` and `k` may both be None where there is a `qv`: scores are then ``qv vᵀ`` alone, times
        ``head_dim_v ** -0.5`` where `softmax_scale` is None.
    v : tensor, shape (batch, seqlen_kv, nheads_kv, head_dim_v)
    window_size : (int or None, int or None)
        ``(left, right)``: query ``i`` sees the keys ``j`` with ``p - left <= j <= p + right``,
        where ``p = i + seqlen_kv - seqlen_q``. None is unbounded.
        ``causal`` makes ``right`` 0. Two bounds whose sum is then below 0 are unbounded, too:
        the call is causal, or sees all keys.
    num_splits : int
        Into how many parts, at most, the keys of few queries are cut; 0 for umfa's choice. The
        default, flash-attention 4's, cuts none, which over long caches is slower.

    Everything else is as in `umfa.flash_attn_func`.

    Returns
    -------
    out : tensor, shape (batch, seqlen_q, nheads, head_dim_v)
    softmax_lse : tensor, shape (batch, nheads, seqlen_q), float32, or None
        None unless `return_lse`. With `qv` of shape (batch, seqlen_q, nheads).

    Raises
    ------
    ValueError, TypeError, umfa.UnsupportedError
        As in `umfa.flash_attn_func`.
    """
    del pack_gqa  # HINTS
    function = _FUNC
    if q is None and k is None and qv is not None:
        function, q, k, qv = _FUNC_OF_QV, qv, v, None
    refuse(
        function,
        gather_kv_indices=gather_kv_indices,
        score_mod=score_mod,
        score_mod_bwd=score_mod_bwd,
        mask_mod=mask_mod,
        aux_tensors=aux_tensors,
        aux_scalars=aux_scalars,
        block_sparse_tensors=block_sparse_tensors,
        block_sparse_tensors_bwd=block_sparse_tensors_bwd,
        gather_bwd_recompute_p=gather_bwd_recompute_p,
        gather_bwd_token_chunk=gather_bwd_token_chunk,
    )
    return Attention(
        function,
        query=q,
        key=k,
        value=v,
        qv=qv,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        window_offsets=True,
        learnable_sink=learnable_sink,
        softcap=softcap,
        num_splits=num_splits,
        deterministic=deterministic,
        return_lse=return_lse,
        backend=backend,
    )


@public(_VARLEN, others=OTHERS, finish=_pair)
def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    qv: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    min_seqlen_k: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    gather_kv_indices: Any = None,
    page_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (None, None),
    learnable_sink: Any = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_sparse_tensors: Any = None,
    aux_tensors: Any = None,
    aux_scalars: Any = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
    *,
    backend: str = "auto",
) -> Attention:
    """`umfa.flash_attn_varlen_func` as flash-attention 4 spells it.

    Parameters
    ----------
    q : tensor, shape (total_q, nheads, head_dim)
        Or (batch, seqlen_q, nheads, head_dim), without `cu_seqlens_q`.
    k : tensor, shape (total_k, nheads_kv, head_dim)
        Or (batch, seqlen_kv, nheads_kv, head_dim), without `cu_seqlens_k`; with `page_table`
        (pages, page_size, nheads_kv, head_dim). `q` and `k` may both be None, as in
        `flash_attn_func`.
    v : tensor, shape as that of `k`, with head_dim_v channels
    page_table : int32 or int64 tensor, shape (batch, pages of a sequence), optional
        ``block_table`` of `umfa.flash_attn_varlen_func`.

    Everything else is as in `umfa.flash_attn_varlen_func` and `flash_attn_func`.

    Returns
    -------
    out : tensor, shape as that of `q`, with head_dim_v channels
    softmax_lse : tensor, shape (nheads, total_q) or (batch, nheads, seqlen_q), float32, or None
        None unless `return_lse`. With `qv` of shape (total_q, nheads) or (batch, seqlen_q, nheads).
    """
    del pack_gqa, min_seqlen_k, scheduler_metadata  # HINTS
    del seqlen_k_per_split, disable_scheduler_metadata  # HINTS
    function = _VARLEN
    if q is None and k is None and qv is not None:
        function, q, k, qv = _VARLEN_OF_QV, qv, v, None
    refuse(
        function,
        gather_kv_indices=gather_kv_indices,
        score_mod=score_mod,
        score_mod_bwd=score_mod_bwd,
        mask_mod=mask_mod,
        aux_tensors=aux_tensors,
        aux_scalars=aux_scalars,
        block_sparse_tensors=block_sparse_tensors,
        gather_bwd_recompute_p=gather_bwd_recompute_p,
        gather_bwd_token_chunk=gather_bwd_token_chunk,
    )
    return Attention(
        function,
        query=q,
        key=k,
        value=v,
        qv=qv,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        block_table=page_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        window_offsets=True,
        learnable_sink=learnable_sink,
        softcap=softcap,
        num_splits=num_splits,
        deterministic=deterministic,
        return_lse=return_lse,
        backend=backend,
    )
