"""``xformers.ops.memory_efficient_attention``, and its forward pass alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import fa3
from .._errors import UnsupportedError, message
from .._functional.flash_attn import flash_attn_func
from .._functional.varlen import flash_attn_varlen_func
from .._stats import count_taken
from . import _xformers_bias as bias
from ._xformers_seqinfo import refuse

__all__ = [
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
]


def memory_efficient_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: Any = None,
) -> Any:
    """Attention by umfa, with gradients.

    Parameters
    ----------
    query : tensor, shape (batch, seqlen_q, heads, head_dim)
        Or (batch, seqlen_q, head_dim) for one head, or (batch, seqlen_q, groups, heads, head_dim),
        where the `heads` of a group share the key and the value that was expanded to them.
        float32, float16 or bfloat16.
    key : tensor, shape (batch, seqlen_k, heads, head_dim), or as `query`
    value : tensor, shape (batch, seqlen_k, heads, head_dim_v), or as `query`
    attn_bias : tensor or an object of ``xformers.ops.fmha.attn_bias``, optional
        A tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k) is added to the scores: with
        5 dimensions (batch, groups, heads, ...), with 3 (batch, ...).
    p : float
        Probability with which each weight is dropped.
    scale : float, optional
        Factor on the scores; ``head_dim ** -0.5`` if None.
    op
        Which of its kernels xformers takes: not used, because it cannot change a result.
    output_dtype : torch.dtype, optional
        Of the result; that of `query` if None.

    Returns
    -------
    tensor, shape (batch, seqlen_q, heads, head_dim_v), or as `query`
        A query that sees no key gets 0.

    Raises
    ------
    ValueError, TypeError
        Shapes do not fit; the message holds the offending value.
    umfa.UnsupportedError
        Gradients, or dropout, with keys in pages or with sequences of keys that overlap.
    """
    del op
    return _attend(query, key, value, attn_bias, p, scale, output_dtype, False)[0]


def memory_efficient_attention_forward(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: Any = None,
) -> Any:
    """`memory_efficient_attention` without gradients."""
    del op
    with torch.no_grad():
        return _attend(query, key, value, attn_bias, p, scale, output_dtype, False)[0]


def memory_efficient_attention_forward_requires_grad(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: Any = None,
) -> tuple[Any, Any]:
    """(result, log-sum-exp) without gradients.

    The second is float32 (batch, heads, seqlen_q), with 5 dimensions (batch, groups, heads,
    seqlen_q); -inf for a query that sees no key.

    Raises
    ------
    NotImplementedError
        Dropout, as in xformers.
    """
    del op
    if p != 0:
        what, expected = "this function has no dropout", "0, or memory_efficient_attention"
        raise NotImplementedError(message("umfa.shim.xformers", what, f"p={p}", expected))
    with torch.no_grad():
        return _attend(query, key, value, attn_bias, p, scale, output_dtype, True)


class _Options(NamedTuple):
    """Of one call, besides its tensors and the mask."""

    p: float
    scale: float | None
    output_dtype: Any
    with_lse: bool


def _attend(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any,
    p: float,
    scale: float | None,
    output_dtype: Any,
    with_lse: bool,
) -> tuple[Any, Any]:
    _check_shapes(query, key, value)
    q, k, v = _heads(query), *_shared_heads(key, value)
    options = _Options(p, scale, output_dtype, with_lse)
    if isinstance(attn_bias, bias.AttentionBias):
        found = _described(q, k, v, attn_bias, options)
    elif attn_bias is None or isinstance(attn_bias, torch.Tensor):
        found = _dense(q, k, v, _numbers(attn_bias, query), bias.Rule(), options)
    else:
        expected = "a tensor, or an object of xformers.ops.fmha.attn_bias"
        what, got = "attn_bias is none", type(attn_bias).__name__
        raise TypeError(message("umfa.shim.xformers", what, got, expected))
    count_taken("xformers.ops.memory_efficient_attention")
    out, lse = found if with_lse else (found, None)
    out = out.reshape(*query.shape[:-1], value.shape[-1])
    if lse is not None and query.ndim == 5:
        lse = lse.unflatten(1, query.shape[2:4])
    return out, lse


def _check_shapes(query: Any, key: Any, value: Any) -> None:
    shapes = [tuple(x.shape) for x in (query, key, value)]
    (q, k, v), ndim = shapes, query.ndim
    if ndim not in (3, 4, 5) or any(len(x) != ndim for x in shapes):
        expected = "3, 4 or 5 dimensions, all of them as many"
        raise refuse("query, key and value have wrong shapes", shapes, expected)
    if k[:1] + k[2:] != q[:1] + q[2:] or v[:-1] != k[:-1]:
        expected = "the same batch and heads (expanded to them), and values as many as keys"
        raise refuse("query, key and value do not fit", shapes, expected)


def _heads(x: Any) -> Any:
    """(batch, rows, heads, channels)"""
    return x.unsqueeze(2) if x.ndim == 3 else x.flatten(2, 3) if x.ndim == 5 else x


def _shared_heads(key: Any, value: Any) -> tuple[Any, Any]:
    """The same, without the copies that the heads of a group were expanded to."""
    if key.ndim == 5 and all(x.stride(3) == 0 or x.shape[3] == 1 for x in (key, value)):
        return key[:, :, :, 0], value[:, :, :, 0]
    return _heads(key), _heads(value)


def _numbers(given: Any, query: Any) -> Any:
    """A mask of numbers as (batch, heads, queries, keys)."""
    if given is None:
        return None
    if not given.is_floating_point():
        what, expected = "attn_bias is added to scores", "float32, float16 or bfloat16"
        raise TypeError(message("umfa.shim.xformers", what, given.dtype, expected))
    if given.ndim != {3: 3, 4: 4, 5: 5}[query.ndim]:
        expected = f"{query.ndim} dimensions, as the query has"
        raise refuse("attn_bias has the wrong shape", tuple(given.shape), expected)
    if query.ndim == 3:
        return given.unsqueeze(1)
    if query.ndim == 5:
        return given.expand(-1, *query.shape[2:4], -1, -1).flatten(1, 2)
    return given


def _described(q: Any, k: Any, v: Any, mask: Any, options: _Options) -> Any:
    if isinstance(mask, bias._Pages):
        return _paged(q, k, v, mask, options)
    if isinstance(mask, bias._Blocks):
        return _packed(q, k, v, mask, options)
    given = mask._bias if isinstance(mask, bias.LowerTriangularMaskWithTensorBias) else None
    return _dense(q, k, v, given, mask.rule(), options)


def _visibility(rule: bias.Rule) -> dict[str, Any]:
    """The rule as umfa's options."""
    left, right = (-1 if x is None else x for x in (rule.left, rule.right))
    return {
        "causal": right == 0,
        "window_size": (left, -1 if right == 0 else right),
        "causal_alignment": "top_left" if rule.top_left else "bottom_right",
    }


def _dense(q: Any, k: Any, v: Any, mask: Any, rule: bias.Rule, options: _Options) -> Any:
    return flash_attn_func(
        q, k, v, options.p, options.scale, attn_mask=mask, return_lse=options.with_lse,
        out_dtype=options.output_dtype, **_visibility(rule),
    )  # fmt: skip


def _packed(q: Any, k: Any, v: Any, mask: Any, options: _Options) -> Any:
    """Blocks: sequences of a batch with one index."""
    _check_rows(q, k, mask)
    queries, keys, k, v = mask.q_seqinfo.seqstart, mask.k_seqinfo, k[0], v[0]
    used = getattr(keys, "seqlen", None)
    where: dict[str, Any] = {"cu_seqlens_k": keys.seqstart, "seqused_k": used}
    if isinstance(mask, bias.BlockDiagonalGappyKeysMask):
        starts, lengths = keys.seqstart.tolist()[:-1], keys.seqlen.tolist()
        bounds = [*starts, len(k)]
        ends = [x + y for x, y in zip(starts, lengths, strict=True)]
        if all(x <= y for x, y in zip(ends, bounds[1:], strict=True)):
            where["cu_seqlens_k"] = bounds
        else:  # not one after the other: each row is a page
            where = {"cu_seqlens_k": None, "seqused_k": lengths}
            where["block_table"] = _rows_as_pages(starts, lengths, len(k))
            k, v = k.unsqueeze(1), v.unsqueeze(1)
    return _varlen(q, k, v, queries, where, mask.rule(), options)


def _rows_as_pages(starts: list[int], lengths: list[int], rows: int) -> list[list[int]]:
    longest = max(lengths)
    for start, length in zip(starts, lengths, strict=True):
        if start + length > rows:
            got = f"rows {start} to {start + length}"
            raise refuse("a sequence reaches behind the keys", got, f"at most {rows}")
    return [[min(start + j, rows - 1) for j in range(longest)] for start in starts]


def _check_rows(q: Any, k: Any, mask: Any) -> None:
    expected = 1, mask.q_seqinfo.seqstart_py[-1]
    if tuple(q.shape[:2]) != expected:
        raise refuse("query does not fit attn_bias", tuple(q.shape[:2]), f"{expected}, then heads")
    if isinstance(mask, bias._Blocks) and k.shape[1] != mask.k_seqinfo.seqstart_py[-1]:
        rows = mask.k_seqinfo.seqstart_py[-1]
        raise refuse("key does not fit attn_bias", tuple(k.shape[:2]), f"(1, {rows}), then heads")


def _varlen(
    q: Any, k: Any, v: Any, queries: Any, where: dict[str, Any], rule: bias.Rule, options: _Options
) -> Any:
    found = flash_attn_varlen_func(
        q[0], k, v, queries, where.pop("cu_seqlens_k"), None, None, options.p, options.scale,
        return_lse=options.with_lse, out_dtype=options.output_dtype, **where, **_visibility(rule),
    )  # fmt: skip
    return tuple(x.unsqueeze(0) for x in found) if options.with_lse else found.unsqueeze(0)


def _paged(q: Any, k: Any, v: Any, mask: Any, options: _Options) -> Any:
    _check_rows(q, k, mask)
    size, rows = mask.page_size, k.shape[1]
    if k.shape[0] != 1 or rows % size:
        expected = f"(1, a multiple of page_size={size}), then heads"
        raise refuse("keys are no whole pages", tuple(k.shape[:2]), expected)
    k, v = (x[0].unflatten(0, (rows // size, size)) for x in (k, v))
    queries, keys = mask.q_seqinfo.seqstart, mask.k_seqinfo
    if isinstance(mask, bias.PagedBlockDiagonalPaddedKeysMask):
        where = {"cu_seqlens_k": None, "seqused_k": keys.seqlen, "block_table": mask.block_tables}
        return _varlen(q, k, v, queries, where, mask.rule(), options)
    if options.p != 0:
        what, expected = "dropout is not implemented for this mask", "0"
        raise UnsupportedError(message("umfa.shim.xformers", what, f"p={options.p}", expected))
    visible = _visibility(mask.rule())
    found = fa3.flash_attn_with_kvcache(
        q[0], k, v, cache_seqlens=keys.seqlen, cache_leftpad=keys.seqstart[:-1],
        page_table=mask.block_tables, cu_seqlens_q=queries, softmax_scale=options.scale,
        causal=visible["causal"], window_size=visible["window_size"],
        return_softmax_lse=options.with_lse,
    )  # fmt: skip
    out, *lse = found if options.with_lse else (found,)
    out = out.unsqueeze(0).to(options.output_dtype or out.dtype)
    return (out, lse[0].unsqueeze(0)) if options.with_lse else out
