"""SageAttention's function."""

from __future__ import annotations

from typing import Any

from .._call import public
from .._errors import message
from .._ext import Attention, Function
from .._frameworks import shape_of

_NAME = "umfa.sageattn"
_SPELLED: dict[str, Any] = {
    "query": "q",
    "key": "k",
    "value": "v",
    "causal": "is_causal",
    "softmax_scale": "sm_scale",
}
_FUNCTIONS = {
    "HND": Function(_NAME, layout="bhsd", **_SPELLED),
    "NHD": Function(_NAME, **_SPELLED),
}

_HINTS = {
    "qk_quant_gran": (None, "per_block", "per_warp", "per_thread"),
    "pv_accum_dtype": (None, "fp16", "fp32", "fp16+fp32", "fp32+fp16", "fp32+fp32"),
    "quantization_backend": (None, "triton", "cuda"),
}
"""What SageAttention's kernels for CUDA can be told, and its values. All results are at least as
exact here: scales are those of rows, sums are float32."""


@public(_FUNCTIONS["HND"], others=frozenset(("tensor_layout", *_HINTS)))
def sageattn(
    q: Any,
    k: Any,
    v: Any,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    *,
    smooth_k: bool = True,
    qk_quant_gran: str | None = None,
    pv_accum_dtype: str | None = None,
    quantization_backend: str | None = None,
    backend: str = "auto",
) -> Attention:
    """Attention with the arguments of SageAttention's ``sageattn`` (Zhang et al. 2024).

    That is `quantized_attention` with ``mode="sage"``, whose other options this function lacks.

    Parameters
    ----------
    q : tensor, shape (batch, nheads, seqlen_q, head_dim)
        float32, float16 or bfloat16. (batch, seqlen_q, nheads, head_dim) with
        ``tensor_layout="NHD"``; so are k and v.
    k, v : tensor, shape (batch, nheads_k, seqlen_k, head_dim)
        v's head_dim may differ. nheads_k divides nheads.
    tensor_layout : {"HND", "NHD"}
        Order of the dimensions of q, k, v and the result.
    is_causal : bool
        Query i sees the keys up to i. There must be as many queries as keys.
    sm_scale : float, optional
        Factor on the scores; ``head_dim ** -0.5`` if None.
    return_lse : bool
        Also return the log-sum-exp.
    smooth_k : bool
        As in `quantized_attention`.
    qk_quant_gran, pv_accum_dtype, quantization_backend : str, optional
        What SageAttention's kernels can be told. They change nothing here.
    backend : {"auto", "metal", "cpu"}
        Which backend runs the call; see `flash_attn_func`.

    Returns
    -------
    out : tensor
        The shape and dtype of q, with v's head_dim.
    lse : tensor, shape (batch, nheads, seqlen_q), float32
        Natural logarithm of the sum of the exponentials of the scores of q and k as they are
        given. Only with `return_lse`.

    Raises
    ------
    ValueError, TypeError
        An argument is wrong; the message holds the offending value.
    umfa.UnsupportedError
        No backend has what is asked for: gradients, tensors on the GPU.
    """
    if not isinstance(tensor_layout, str) or tensor_layout not in _FUNCTIONS:
        what, expected = "tensor_layout is unknown", "'HND' or 'NHD'"
        raise ValueError(message(_NAME, what, repr(tensor_layout), expected))
    hints = qk_quant_gran, pv_accum_dtype, quantization_backend
    for (name, known), value in zip(_HINTS.items(), hints, strict=True):
        if not isinstance(value, str | None) or value not in known:
            expected = ", ".join(repr(x) for x in known)
            raise ValueError(message(_NAME, f"{name} is unknown", repr(value), expected))
    if is_causal is True:
        _check_lengths(q, k, -2 if tensor_layout == "HND" else -3)
    return Attention(
        _FUNCTIONS[tensor_layout],
        query=q,
        key=k,
        value=v,
        quant_mode="sage",
        smooth_k=smooth_k,
        causal=is_causal,
        softmax_scale=sm_scale,
        return_lse=return_lse,
        backend=backend,
    )


def _check_lengths(q: Any, k: Any, dim: int) -> None:
    """Where queries stand among fewer or more keys, SageAttention does not say."""
    shapes = shape_of(q), shape_of(k)
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return  # what is wrong with them is said later
    lengths = [shape[dim] for shape in shapes if shape is not None]
    if lengths[0] != lengths[1]:
        expected = "as many, or umfa.quantized_attention with a causal_alignment"
        raise ValueError(
            message(
                _NAME,
                "is_causal needs as many queries as keys",
                f"{lengths[0]} and {lengths[1]}",
                expected,
            )
        )
