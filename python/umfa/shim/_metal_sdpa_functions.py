"""The functions of ``metal_sdpa_extension``."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import _ext
from .._errors import message
from .._ext import integer
from .._functional.flash_attn import flash_attn_func
from .._functional.rope import fused_rope_attention
from .._functional.sdpa import scaled_dot_product_attention
from .._stats import count_taken
from ..torch._quantized import QuantFormat, mode, quantized_attention
from ._dispatch_stats import count, count_result, get_dispatch_stats, reset_dispatch_stats

__all__ = [
    "QUANT_BLOCK_WISE",
    "QUANT_INT4",
    "QUANT_INT8",
    "QUANT_ROW_WISE",
    "QUANT_TENSOR_WISE",
    "clear_quantization_mode",
    "get_dispatch_stats",
    "get_version",
    "hadamard_rotate",
    "is_metal_available",
    "metal_flash_attention_autograd",
    "metal_quantized_flash_attention_autograd",
    "reset_dispatch_stats",
    "rope_scaled_dot_product_attention",
    "set_quantization_mode",
    "sparse_indexer_scores",
]

QUANT_INT8, QUANT_INT4 = 3, 4
QUANT_TENSOR_WISE, QUANT_ROW_WISE, QUANT_BLOCK_WISE = 0, 1, 2

MOST_HADAMARD = 1024
BLOCK_TOKENS = 64


def metal_flash_attention_autograd(
    query: Any, key: Any, value: Any, is_causal: bool = False, scale: float = 0.0
) -> Any:
    """torch's ``scaled_dot_product_attention`` by umfa, with gradients.

    Parameters
    ----------
    query, key, value : tensor, shape (batch, heads, seqlen, head_dim)
        float32, float16 or bfloat16, any strides.
    is_causal : bool
        Aligned at the top left.
    scale : float
        Factor on the scores; 0 is ``head_dim ** -0.5``.

    Returns
    -------
    tensor, shape (batch, heads, seqlen, head_dim)
        In the dtype of `query`.
    """
    out = scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=None if scale == 0 else scale
    )
    count_taken("metal_sdpa_extension.metal_flash_attention_autograd")
    count_result(out)
    return out


def rope_scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    rope_cos: Any,
    rope_sin: Any,
    attn_mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Any:
    """Attention of queries and keys that are rotated first, in interleaved pairs of channels.

    Parameters
    ----------
    query : tensor, shape (batch, heads, seqlen, head_dim)
        float32, float16 or bfloat16, any strides.
    key, value : tensor, shape (batch, heads_kv, seqlen, head_dim)
        `heads` is a multiple of `heads_kv`.
    rope_cos, rope_sin : tensor, shape (seqlen, head_dim), (1, seqlen, head_dim) or (batch, ...)
        Row ``i`` is for query ``i`` and key ``i``. Both channels of a pair have the same number. A
        table for all of the batch is applied by the kernel; tables for each index of it, and calls
        that are recorded in a graph, are applied by torch to copies of `query` and `key`.
    attn_mask : tensor that broadcasts to (batch, heads, seqlen, seqlen), optional
        bool (True attends) or numbers that are added to the scores.
    is_causal : bool
        Query ``i`` sees the keys ``j <= i``, and of them those that `attn_mask` shows.
    scale : float, optional
        Factor on the scores; ``head_dim ** -0.5`` if None.

    Returns
    -------
    tensor, shape (batch, heads, seqlen, head_dim)
        Differentiable with respect to `query`, `key`, `value` and `attn_mask`.

    Raises
    ------
    ValueError
        A table has another shape, or the channels of a pair have different numbers.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            what, expected = f"{name} has the wrong shape", "(batch, heads, seqlen, head_dim)"
            raise ValueError(_message(what, tuple(x.shape), expected))
    tables = [
        _table(x, name, query) for name, x in (("rope_cos", rope_cos), ("rope_sin", rope_sin))
    ]
    if key.shape[-2] != query.shape[-2]:
        raise ValueError(_message("key has another length than query", tuple(key.shape), "as many"))
    options: dict[str, Any] = {"softmax_scale": scale, "causal": is_causal, "attn_mask": attn_mask}
    options["causal_alignment"] = "top_left"
    if torch.compiler.is_compiling() or any(x.shape[0] > 1 for x in tables):
        q, k = (_rotated(x, *tables) for x in (query, key))
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, value)), **options)
    else:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        halves = [x[0, :, ::2] for x in tables]
        out = fused_rope_attention(q, k, v, *halves, rotary_interleaved=True, **options)
    count_taken("metal_sdpa_extension.rope_scaled_dot_product_attention")
    count_result(out, "rope")
    return out.transpose(1, 2)


def _table(table: Any, name: str, query: Any) -> Any:
    """The table in float32 as (1 or batch, seqlen, head_dim)."""
    batch, _, rows, channels = query.shape
    whole = table[None] if table.ndim == 2 else table
    if whole.ndim != 3 or whole.shape[0] not in (1, batch) or whole.shape[1:] != (rows, channels):
        expected = f"({rows}, {channels}), (1, {rows}, {channels}) or ({batch}, {rows}, {channels})"
        raise ValueError(_message(f"{name} has the wrong shape", tuple(table.shape), expected))
    whole = whole.to(torch.float32)
    if not torch.compiler.is_compiling() and not torch.equal(whole[..., ::2], whole[..., 1::2]):
        what = f"the channels of a pair differ in {name}"
        raise ValueError(_message(what, "a table of other pairs", "[..., 2i] == [..., 2i + 1]"))
    return whole


def _rotated(x: Any, cos: Any, sin: Any) -> Any:
    """`x` (batch, heads, seqlen, head_dim) rotated by the tables, and rounded to its dtype."""
    even, odd = x[..., ::2].float(), x[..., 1::2].float()
    c, s = cos[:, None, :, ::2], sin[:, None, :, ::2]
    return torch.stack((even * c - odd * s, odd * c + even * s), -1).flatten(-2).to(x.dtype)


def _message(what: str, got: object, expected: str) -> str:
    return message("umfa.shim.rope_scaled_dot_product_attention", what, got, expected)


def is_metal_available() -> bool:
    """Whether umfa can use an Apple GPU here."""
    return any(name == "metal" and available for name, available, *_ in _ext.backends())


def get_version() -> tuple[int, int, int]:
    """umfa's version."""
    major, minor, patch = _ext.version().split(".")[:3]
    return int(major), int(minor), int(patch)


def hadamard_rotate(x: Any, block_size: int = 256) -> Any:
    """Multiply each block of channels by the Hadamard matrix, **in place**; twice changes nothing.

    Parameters
    ----------
    x : tensor, shape (..., channels)
        Of a floating dtype.
    block_size : int
        A power of 2 up to 1024 that divides `channels`. The matrix is scaled by
        ``block_size ** -0.5``.

    Returns
    -------
    tensor
        `x`.
    """
    function, powers = "umfa.shim.hadamard_rotate", f"a power of 2 up to {MOST_HADAMARD}"
    size = integer(function, "block_size", block_size, powers)
    if size < 1 or size > MOST_HADAMARD or size & (size - 1):
        raise ValueError(message(function, "block_size is no such number", size, powers))
    if x.ndim == 0 or x.shape[-1] % size:
        expected = f"a multiple of block_size={size} as the last dimension"
        raise ValueError(message(function, "x has no whole blocks", tuple(x.shape), expected))
    if not x.is_floating_point():
        raise TypeError(message(function, "x has the wrong dtype", x.dtype, "a floating dtype"))
    rotated = x.to(torch.promote_types(x.dtype, torch.float32))
    for step in (1 << i for i in range(size.bit_length() - 1)):
        first, second = rotated.unflatten(-1, (-1, 2, step)).unbind(-2)
        rotated = torch.stack((first + second, first - second), -2).flatten(-3)
    return x.copy_(rotated / math.sqrt(size))


def sparse_indexer_scores(q: Any, k: Any, scale: float = 1.0) -> Any:
    """``q kᵀ · scale``, by torch: the scores of DeepSeek's indexer, before its ReLU.

    Parameters
    ----------
    q : tensor, shape (batch, heads, seqlen_q, head_dim)
    k : tensor, shape (batch, heads, seqlen_k, head_dim)

    Returns
    -------
    tensor, shape (batch, heads, seqlen_q, seqlen_k)
    """
    return torch.matmul(q, k.transpose(-2, -1)) * scale


def metal_quantized_flash_attention_autograd(
    query: Any,
    key: Any,
    value: Any,
    is_causal: bool,
    scale: float,
    target_precision: int,
    quant_mode: int,
    attn_mask: Any = None,
) -> Any:
    """Attention of a quantised query, key and value. Gradients pass straight through the quantiser.

    Parameters
    ----------
    query, key, value : tensor, shape (batch, heads, seqlen, head_dim)
        float32, float16 or bfloat16, any strides.
    is_causal : bool
        Aligned at the top left.
    scale : float
        Factor on the scores; 0 is ``head_dim ** -0.5``.
    target_precision : {QUANT_INT8, QUANT_INT4}
        Symmetric codes of 8 or 4 bits.
    quant_mode : {QUANT_TENSOR_WISE, QUANT_ROW_WISE, QUANT_BLOCK_WISE}
        What shares a scale: all elements, those of one token and head, or those of 64 tokens of a
        head.
    attn_mask : tensor that broadcasts to (batch, heads, seqlen, seqlen), optional
        bool (True attends) or numbers that are added to the scores.

    Returns
    -------
    tensor, shape (batch, heads, seqlen, head_dim)
        In the dtype of `query`.
    """
    form = _format("metal_quantized_flash_attention_autograd", target_precision, quant_mode)
    out = quantized_attention(
        query, key, value, **form._asdict(),
        softmax_scale=None if scale == 0 else scale,
        causal=is_causal,
        causal_alignment="top_left",
        attn_mask=attn_mask,
        layout="bhsd",
    )  # fmt: skip
    count_taken("metal_sdpa_extension.metal_quantized_flash_attention_autograd")
    count("quantized_autograd")
    return out


def set_quantization_mode(target_precision: int, quant_mode: int) -> None:
    """Let torch's ``scaled_dot_product_attention``, where umfa computes it, quantise query, key and
    value as `metal_quantized_flash_attention_autograd` does, until `clear_quantization_mode`.

    Calls with dropout, under ``torch.func`` and in graphs are not quantised: torch computes them,
    and `umfa.stats` counts them with the reason.
    """
    mode.form = _format("set_quantization_mode", target_precision, quant_mode)


def clear_quantization_mode() -> None:
    """Nothing is quantised any more."""
    mode.form = None


def _format(function: str, target_precision: int, quant_mode: int) -> QuantFormat:
    dtypes = {QUANT_INT8: "int8", QUANT_INT4: "int4"}
    granularities = {
        QUANT_TENSOR_WISE: "tensor",
        QUANT_ROW_WISE: "row",
        QUANT_BLOCK_WISE: "block",
    }
    for name, given, known in (
        ("target_precision", target_precision, "QUANT_INT8 (3) or QUANT_INT4 (4)"),
        ("quant_mode", quant_mode, "QUANT_TENSOR_WISE (0), _ROW_WISE (1) or _BLOCK_WISE (2)"),
    ):
        if given not in list(dtypes if name == "target_precision" else granularities):
            raise ValueError(message(f"umfa.shim.{function}", f"{name} is unknown", given, known))
    granularity = granularities[quant_mode]
    block = (BLOCK_TOKENS, None) if granularity == "block" else None
    return QuantFormat(dtypes[target_precision], granularity, block=block)
