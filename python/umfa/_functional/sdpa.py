"""PyTorch's scaled_dot_product_attention, for the tensors of every framework."""

from __future__ import annotations

from typing import Any

from .._call import public
from .._errors import message
from .._ext import Attention, Function
from .._frameworks import causal_bias, shape_of

_SDPA = Function(
    "umfa.scaled_dot_product_attention",
    layout="bhsd",
    broadcasts=True,
    causal="is_causal",
    softmax_scale="scale",
    grouped="enable_gqa",
)


@public(_SDPA, reuse=True)
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str = "auto",
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
    out: Any = None,
    out_dtype: Any = None,
    batch_invariant: bool = False,
) -> Attention:
    """Exact attention with the arguments of ``torch.nn.functional.scaled_dot_product_attention``.

    Takes tensors of every framework that `flash_attn_func` takes, reads them where they are (but
    see its notes on ``torch.autocast``), and allocates nothing of the size of the scores: a mask is
    read through its own strides, never expanded.

    Parameters
    ----------
    query : tensor, shape (..., nheads, seqlen_q, head_dim)
        float32, float16 or bfloat16, with 2 to 8 dimensions. ``nheads`` and the dimensions before
        it broadcast among query, key and value.
    key : tensor, shape (..., nheads, seqlen_kv, head_dim)
        Same framework. The dtypes of `query`, `key` and `value` may differ.
    value : tensor, shape (..., nheads, seqlen_kv, head_dim_v)
        Same framework. ``head_dim_v`` may differ from ``head_dim``.
    attn_mask : tensor that broadcasts to (..., nheads, seqlen_q, seqlen_kv), optional
        bool: a query attends where it is True. float32, float16 or bfloat16: added to the scores
        after `scale`; it need not have the dtype of `query`. Or torch's ``causal_upper_left`` or
        ``causal_lower_right`` of ``torch.nn.attention.bias``, which is not materialised.
    dropout_p : float
        Probability, below 1, with which each attention weight is left out; the others are divided
        by ``1 - dropout_p``. As in torch, pass 0 outside training. There, umfa warns once
        of dropout without a seed (see `flash_attn_func`).
    is_causal : bool
        Query ``i`` sees the keys ``j <= i`` (aligned at the top left, unlike `flash_attn_func`).
        Excludes `attn_mask`.
    scale : float, optional
        Factor on the scores; ``head_dim ** -0.5`` if None.
    enable_gqa : bool
        Let query heads share key and value heads: query head ``h`` of ``nheads`` reads key head
        ``h // (nheads // nheads_kv)``.
    backend : {"auto", "metal", "cpu"}
        Which backend runs the call; see `flash_attn_func`.
    dropout_seed, dropout_offset : int, optional
        Seed and offset of the dropout; see `flash_attn_func`.
    out : tensor, shape (..., nheads, seqlen_q, head_dim_v), optional
        Where to write the result; see `flash_attn_func`.
    out_dtype : dtype, optional
        The dtype of the result; see `flash_attn_func`.
    batch_invariant : bool
        See `flash_attn_func`.

    Returns
    -------
    tensor, shape (..., nheads, seqlen_q, head_dim_v)
        `out`, or else a contiguous tensor in the framework of `query`, and in its dtype unless
        `out_dtype` gives another. A query that attends to no key gets 0.

    Raises
    ------
    ValueError, TypeError
        An argument is wrong; the message holds the offending value.
    umfa.UnsupportedError
        The call is sound but not implemented yet: traced arrays of mlx, second derivatives
        and forward mode, float64 and float8, ``head_dim`` above 576.

    Notes
    -----
    Torch tensors that require grad get gradients, as in `flash_attn_func`.
    """
    if attn_mask is not None and is_causal is not False:
        raise ValueError(
            message(
                _SDPA.name,
                "attn_mask and is_causal exclude each other",
                "both",
                "a mask that is causal itself, or is_causal alone",
            )
        )
    bias = None if attn_mask is None else causal_bias(attn_mask)
    if bias is not None:
        _check_bias(bias, query, key)
    return Attention(
        _SDPA,
        query=query,
        key=key,
        value=value,
        attn_mask=attn_mask if bias is None else None,
        dropout_p=dropout_p,
        causal=is_causal if bias is None else True,
        causal_alignment="top_left" if bias is None else bias[0],
        softmax_scale=scale,
        grouped=enable_gqa,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
        out=out,
        out_dtype=out_dtype,
        batch_invariant=batch_invariant,
        backend=backend,
    )


def _check_bias(bias: tuple[str, int, int], query: Any, key: Any) -> None:
    shapes = shape_of(query) or (), shape_of(key) or ()
    lengths = tuple(shape[-2] if len(shape) >= 2 else None for shape in shapes)
    if None not in lengths and lengths != bias[1:]:
        raise ValueError(
            message(
                _SDPA.name,
                "attn_mask is a causal bias of other lengths",
                f"seqlen_q, seqlen_kv = {bias[1:]}",
                f"{lengths}, those of query and key",
            )
        )
