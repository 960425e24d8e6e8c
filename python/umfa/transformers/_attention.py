"""A model's attention, computed by umfa."""

from __future__ import annotations

from typing import Any

import torch

from .._functional.flash_attn import flash_attn_func
from .._functional.varlen import flash_attn_varlen_func
from .._stats import count_left, count_taken
from ..quant import QuantizedTensor, quantized_attention
from . import _eager
from ._cache import Stored, first_tokens
from ._masks import Mask, Pattern

_NAME = "transformers.attention"


def attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Any = None,
    position_bias: Any = None,
    **others: Any,
) -> tuple[Any, Any]:
    """(batch, heads, rows, head dim) of query, key and value; returns (batch, rows, heads, head
    dim), and None for the weights unless they are asked for. The mask has the sliding window."""
    if others.get("output_attentions"):
        others |= {"position_bias": position_bias, "softcap": softcap, "s_aux": s_aux}
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return _eager.attention(
            module, query, key, value, attention_mask, causal, dropout, scaling, **others
        )
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "learnable_sink": s_aux,
    }
    if isinstance(key, Stored) and key.mean is not None and (softcap or s_aux is not None):
        count_left(_NAME, "keys without their mean (smooth_keys) have other softcaps and sinks")
        key, value = key.written(), value.written()
    q, k, v = (x.rows if isinstance(x, Stored) else x.transpose(1, 2) for x in (query, key, value))
    out = None
    if isinstance(attention_mask, Mask):
        out = _described(q, k, v, attention_mask, position_bias, options)
        if out is None:
            attention_mask = attention_mask.written()
    if out is None and attention_mask is not None:
        bias = attention_mask[..., : k.shape[1]]
        if position_bias is not None:
            bias = _biased(position_bias, bias)
        out = _attend(q, k, v, attn_mask=bias, **options)
        count_taken(f"{_NAME} with a mask that is written out")
        return out, None
    if out is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and q.shape[1] > 1
        if causal and k.shape[1] > q.shape[1]:  # a static cache: no token is there yet
            k, v = (first_tokens(x, q.shape[1]) for x in (k, v))
        bias = None if position_bias is None else position_bias[..., : k.shape[1]]
        out = _attend(q, k, v, causal=causal, attn_mask=bias, **options)
    count_taken(_NAME)
    return out, None


def _described(
    q: Any, k: Any, v: Any, mask: Mask, position_bias: Any, options: dict[str, Any]
) -> Any:
    """None where umfa has no option for what the mask describes."""
    pattern, padding = mask.pattern, mask.padding
    if pattern.sequences is not None:
        return None if position_bias is not None else _packed(q, k, v, mask, options)
    shift = mask.q_offset - mask.kv_offset
    rows, keys = q.shape[1], k.shape[1]
    if pattern.right == 0 and shift + rows < keys:  # a static cache: no token is there yet
        keys = shift + rows
        k, v = (first_tokens(x, keys) for x in (k, v))
        padding = None if padding is None else padding[:, :keys]
    bias = None if padding is None else padding[:, None, None, :]
    if position_bias is not None:
        bias = _biased(position_bias[..., :keys], bias)
    # Windows and chunks count from the diagonal that ends in the last row and the last key.
    beyond = shift - (keys - rows)
    if pattern.chunk is not None:
        first = _first_chunk(pattern)
        if beyond != 0 or first is None:
            return None
        options = options | {
            "attention_chunk": pattern.chunk,
            "attention_chunk_offset": mask.kv_offset - first,
        }
    left = -1 if pattern.left is None else pattern.left - beyond
    right = -1 if pattern.right is None else pattern.right + beyond
    if (pattern.left is not None and left < 0) or (pattern.right is not None and right < 0):
        return None
    return _attend(q, k, v, window_size=(left, right), attn_mask=bias, **options)


def _attend(q: Any, k: Any, v: Any, **options: Any) -> Any:
    run = quantized_attention if isinstance(k, QuantizedTensor) else flash_attn_func
    return run(q, k, v, **options)


def _first_chunk(pattern: Pattern) -> int | None:
    """Where the first chunk begins; None if that differs among the sequences."""
    if pattern.chunk_padding is None:
        return 0
    first = pattern.chunk_padding.flatten()
    return int(first[0]) if bool((first == first[0]).all()) else None


def _packed(q: Any, k: Any, v: Any, mask: Mask, options: dict[str, Any]) -> Any:
    """Sequences behind each other in each row of the batch."""
    pattern, (batch, rows) = mask.pattern, q.shape[:2]
    if mask.padding is not None or k.shape[1] != rows or mask.q_offset != mask.kv_offset:
        return None
    if isinstance(k, QuantizedTensor):
        return None
    marks = pattern.sequences.expand(batch, rows)
    begins = torch.ones_like(marks, dtype=torch.bool)
    begins[:, 1:] = marks[:, 1:] != marks[:, :-1]
    offsets = torch.nonzero(begins.flatten()).flatten().int().cpu()
    offsets = torch.cat([offsets, torch.tensor([batch * rows], dtype=torch.int32)])
    longest = int(offsets.diff().max())
    if pattern.chunk is not None:
        if _first_chunk(pattern) != 0:
            return None
        options = options | {"attention_chunk": pattern.chunk}
    left = -1 if pattern.left is None else pattern.left
    right = -1 if pattern.right is None else pattern.right
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = flash_attn_varlen_func(
        q, k, v, offsets, offsets, longest, longest, window_size=(left, right), **options
    )
    return out.unflatten(0, (batch, rows))


def _biased(position_bias: Any, mask: Any) -> Any:
    """A float mask of both."""
    if mask is None:
        return position_bias
    if mask.dtype is torch.bool:
        return position_bias.masked_fill(~mask, float("-inf"))
    return position_bias + mask
