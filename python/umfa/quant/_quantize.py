"""umfa.quantize."""

from __future__ import annotations

from typing import Any

from .. import _ext
from ._run import offset_of, run_quantize
from ._tensor import QuantizedTensor


def quantize(
    x: Any,
    dtype: Any,
    granularity: str | None = None,
    symmetric: bool = True,
    block: tuple[int, int | None] | None = None,
    scale_dtype: Any = None,
    *,
    layout: str = "bshd",
    nonfinite: str = "raise",
    backend: str = "auto",
) -> QuantizedTensor:
    """Quantises a tensor.

    docs/quantization.md says which formats exist, and what they are to the bit.

    Parameters
    ----------
    x : tensor, shape (batch, seqlen, nheads, head_dim)
        float32, float16 or bfloat16, of torch, numpy, jax or mlx. There may be no batch dimension.
        With ``layout="bhsd"`` (batch, nheads, seqlen, head_dim), where both first dimensions may
        be absent.
    dtype : {"int8", "int4", "float8_e4m3fn", "float8_e5m2", "nf4", "mxfp8", "mxfp4"}
        Also "fp8_e4m3", "fp8_e5m2", and the framework's own dtype where it has one.
    granularity : {"tensor", "row", "block", "channel"}, optional
        Which elements share a scale: all; those of one token and head; blocks of some tokens and
        channels of one head; those of one channel and head. None is "row", or "block" for mxfp8 and
        mxfp4.
    symmetric : bool
        Without it, int8 and int4 have zero points, and codes are unsigned.
    block : (tokens, channels), optional
        Size of a block, for ``granularity="block"``. None in place of `channels` is all channels.
        MX formats have (1, 32).
    scale_dtype : {"float32", "float16"}, optional
        float32 if None. MX formats have float8_e8m0fnu.
    layout : {"bshd", "bhsd"}
        Order of the dimensions of `x`.
    nonfinite : {"raise", "nan"}
        What a NaN or an infinity in `x` does, or a number too large for a float16 scale: raise
        ValueError, which waits for a GPU, or give the scale of its block the value NaN, so that it
        dequantises to NaN.
    backend : {"auto", "metal", "cpu"}
        Which backend runs the call; see `flash_attn_func`.

    Returns
    -------
    QuantizedTensor
        Its tensors are of the framework of `x`.

    Raises
    ------
    ValueError, TypeError
        An argument is wrong, or `x` has numbers that are not finite.
    umfa.UnsupportedError
        There is no such format; `x` requires gradients.
    """
    name = "umfa.quantize"
    form = _ext.QuantFormat(
        name,
        dtype,
        granularity,
        offset_of(name, symmetric),
        scale_dtype,
        block,
        layout,
    )
    parts, shape = run_quantize(name, x, form, nonfinite, backend)
    return QuantizedTensor._made(parts, form, shape)
