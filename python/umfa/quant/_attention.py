"""umfa.quantized_attention: attention over keys and values that stay quantised."""

from __future__ import annotations

from typing import Any

from .._call import public
from .._errors import UnsupportedError, message
from .._ext import Attention, Function
from .._functional._types import WindowSize
from ._tensor import QuantizedTensor

_NAME = "umfa.quantized_attention"
_SPELLED: dict[str, Any] = {
    "query": "q",
    "key": "k",
    "value": "v",
    "key_scales": "k.scales",
    "key_offsets": "k.zero_points",
    "value_scales": "v.scales",
    "value_offsets": "v.zero_points",
    "quant_mode": "mode",
}
_BSHD = Function(_NAME, **_SPELLED)
_BHSD = Function(_NAME, layout="bhsd", **_SPELLED)


@public(_BSHD, others=frozenset(("layout",)))
def quantized_attention(
    q: Any,
    k: Any,
    v: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    *,
    mode: str | None = None,
    smooth_k: bool = True,
    attn_mask: Any = None,
    learnable_sink: Any = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    rotary_interleaved: bool = True,
    qv: Any = None,
    attention_chunk: int = 0,
    attention_chunk_offset: int = 0,
    prefix_lens: Any = None,
    causal_alignment: str = "bottom_right",
    num_splits: int = 0,
    batch_invariant: bool = False,
    return_lse: bool = False,
    out: Any = None,
    out_dtype: Any = None,
    layout: str = "bshd",
    backend: str = "auto",
) -> Attention:
    """Attention with quantised keys, values or both, or whose products are quantised.

    Codes become numbers a tile at a time, so no dequantised copy of a cache is made. The result is
    that of the same call on ``k.dequantize()`` and ``v.dequantize()``.

    With a `mode`, q, k and v are plain tensors, which are quantised within the call.

    Parameters
    ----------
    q : tensor, shape (batch, seqlen_q, nheads, head_dim)
        float32, float16 or bfloat16. (total_q, nheads, head_dim) with `cu_seqlens_q`.
    k, v : QuantizedTensor or tensor, shape (batch, seqlen_k, nheads_k, head_dim)
        Each in a format of its own. v's head_dim may differ. (total_k, nheads_k, head_dim) with
        `cu_seqlens_k`; (pages, page_size, nheads_k, head_dim) with `block_table`.
    softmax_scale, causal, window_size, softcap, alibi_slopes
        As in `flash_attn_func`.
    mode : {"sage", "int8"}, optional
        "sage": q and k are rounded to int8, with a scale for each row, and their products are sums
        of integers. Weights and values are multiplied as in `flash_attn_func`. "int8": weights and
        values are rounded too, with scales for 96 keys at a time.
    smooth_k : bool
        With a `mode`, whether the mean of each channel of the keys is taken off before they are
        rounded, and its part of the scores added after. The mean is over the keys of a sequence and
        head.
    attn_mask, learnable_sink, qv, attention_chunk, attention_chunk_offset, prefix_lens
        As in `flash_attn_with_kvcache`; so are `causal_alignment`, `num_splits`, `batch_invariant`,
        `out` and `out_dtype`.
    dropout_p, dropout_seed
        As in `flash_attn_func`.
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
        As in `flash_attn_varlen_func`. For a cache, `seqused_k` is what `flash_attn_with_kvcache`
        calls `cache_seqlens`.
    cache_batch_idx, cache_leftpad, block_table, rotary_cos, rotary_sin, rotary_interleaved
        As in `flash_attn_with_kvcache`. Rotary angles go to queries and all keys.
    return_lse : bool
        Also return the log-sum-exp.
    layout : {"bshd", "bhsd"}
        Order of the dimensions of q, k, v and the result.
    backend : {"auto", "metal", "cpu"}
        Which backend runs the call; see `flash_attn_func`.

    Returns
    -------
    out : tensor, shape (batch, seqlen_q, nheads, head_dim)
        Of the dtype of q.
    softmax_lse : tensor, shape (batch, nheads, seqlen_q), float32
        Only with `return_lse`.

    Raises
    ------
    ValueError, TypeError
        An argument is wrong; the message holds the offending value.
    umfa.UnsupportedError
        No backend has what is asked for: a quantised q, gradients, a `mode` on Metal or beside a
        quantised k or v or `qv`, dropout with "int8".
    """
    if layout not in ("bshd", "bhsd"):
        raise ValueError(message(_NAME, "layout is unknown", repr(layout), "'bshd' or 'bhsd'"))
    if isinstance(q, QuantizedTensor):
        raise UnsupportedError(
            message(_NAME, "q is quantised", q.dtype, "a tensor, as q.dequantize() returns it")
        )
    return Attention(
        _BSHD if layout == "bshd" else _BHSD,
        query=q,
        **_operand("key", "k", k, layout),
        **_operand("value", "v", v, layout),
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        quant_mode="none" if mode is None else mode,
        smooth_k=smooth_k,
        attn_mask=attn_mask,
        learnable_sink=learnable_sink,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        qv=qv,
        attention_chunk=attention_chunk,
        attention_chunk_offset=attention_chunk_offset,
        prefix_lens=prefix_lens,
        causal_alignment=causal_alignment,
        num_splits=num_splits,
        batch_invariant=batch_invariant,
        return_lse=return_lse,
        out=out,
        out_dtype=out_dtype,
        backend=backend,
    )


def _operand(field: str, name: str, tensor: Any, layout: str) -> dict[str, Any]:
    """The fields of the record that a plain or quantised tensor fills."""
    if not isinstance(tensor, QuantizedTensor):
        return {field: tensor}
    if tensor.layout != layout:
        what = f"layout differs: that of {name} and of the call"
        raise ValueError(message(_NAME, what, repr(tensor.layout), repr(layout)))
    data, scales, offsets = tensor._parts
    return {
        field: data,
        f"{field}_scales": scales,
        f"{field}_offsets": offsets,
        f"{field}_format": tensor._format.text(tensor.shape[-1]),
    }
