"""umfa.suggest_precision: the smallest format that is exact enough."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .._errors import message
from .._frameworks import framework_of, shape_of
from ._attention import quantized_attention
from ._quantize import quantize

_NAME = "umfa.suggest_precision"
ROWS = 256
"""Queries that are measured, at most."""

_GROUPS = {"granularity": "block", "block": (1, 32), "scale_dtype": "float16"}
FORMATS: tuple[dict[str, Any], ...] = (
    {"dtype": "mxfp4"},
    {"dtype": "int4", **_GROUPS},
    {"dtype": "nf4", **_GROUPS},
    {"dtype": "int4", "symmetric": False, **_GROUPS},
    {"dtype": "int8", "granularity": "row", "scale_dtype": "float16"},
    {"dtype": "float8_e4m3fn", "granularity": "row", "scale_dtype": "float16"},
    {"dtype": "mxfp8"},
    {"dtype": "int8", **_GROUPS},
)
"""Those that are tried, as keyword arguments of `quantize`."""


class MeasuredFormat(NamedTuple):
    """What a format does to attention."""

    format: dict[str, Any]
    """Keyword arguments of `quantize`."""
    rel_error: float
    """Sum of the errors' magnitudes, divided by the sum of the result's."""
    nbytes: int
    """Of the quantised key and value together."""


class SuggestedPrecision(NamedTuple):
    """What `suggest_precision` found."""

    format: dict[str, Any] | None
    """Keyword arguments of `quantize`; None if no format is exact enough."""
    measured: tuple[MeasuredFormat, ...]
    """Every format that was tried, from the fewest bytes on."""

    def __str__(self) -> str:
        return "\n".join(
            f"{'->' if x.format == self.format else '  '} {_text(x.format):90} "
            f"{x.rel_error:.2e} {x.nbytes:>12} bytes"
            for x in self.measured
        )


def suggest_precision(
    q: Any,
    k: Any,
    v: Any,
    max_rel_error: float,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    layout: str = "bshd",
    backend: str = "auto",
) -> SuggestedPrecision:
    """The format of keys and values with the fewest bytes whose error in attention is small enough.

    Each format is measured: attention of the last 256 queries over all keys, on quantised keys and
    values, is compared with the same on the given ones, in float32 (under ``torch.autocast`` in its
    dtype).

    Parameters
    ----------
    q : tensor, shape (batch, seqlen_q, nheads, head_dim)
        float32, float16 or bfloat16. A sample of what the model computes.
    k, v : tensor, shape (batch, seqlen_k, nheads_k, head_dim)
        v's head_dim may differ.
    max_rel_error : float
        The largest sum of the errors' magnitudes, as a part of the sum of the result's.
    softmax_scale, causal
        As in `flash_attn_func`.
    layout : {"bshd", "bhsd"}
        Order of the dimensions of q, k and v.
    backend : {"auto", "metal", "cpu"}
        Which backend runs the calls; see `flash_attn_func`.

    Returns
    -------
    SuggestedPrecision
        ``umfa.quantize(k, **found.format)`` makes such keys. Printed, it is a table of what was
        measured.

    Raises
    ------
    ValueError, TypeError
        An argument is wrong, or attention of the sample is empty or not finite.
    umfa.UnsupportedError
        No backend has what is asked for.
    """
    limit = _limit(max_rel_error)
    if layout not in ("bshd", "bhsd"):
        raise ValueError(message(_NAME, "layout is unknown", repr(layout), "'bshd' or 'bhsd'"))
    tensors = {"q": q, "k": k, "v": v}
    framework = framework_of(_NAME, tensors)
    if len(shape_of(tensors["q"]) or ()) < 3:
        what, got = "q has the wrong shape", shape_of(tensors["q"])
        raise ValueError(message(_NAME, what, got, "(batch, seqlen, nheads, head_dim)"))
    tail = tensors["q"][..., -ROWS:, :, :] if layout == "bshd" else tensors["q"][..., -ROWS:, :]

    def attention(key: Any, value: Any) -> npt.NDArray[np.float64]:
        out = quantized_attention(
            tail,
            key,
            value,
            softmax_scale,
            causal,
            out_dtype="float32",
            layout=layout,
            backend=backend,
        )
        return np.asarray(framework.to_host(out, _NAME, "the result")).astype(np.float64)

    right = attention(k, v)
    if right.size == 0 or not np.isfinite(right).all():
        what = "the sample's attention is empty, or not finite"
        raise ValueError(message(_NAME, what, f"a result of shape {right.shape}", "finite numbers"))
    size = np.abs(right).sum()
    measured = []
    for form in FORMATS:
        # A number too large for a float16 scale gives NaN, and such a format is never exact enough.
        form_of = {**form, "layout": layout, "nonfinite": "nan", "backend": backend}
        key, value = (quantize(x, **form_of) for x in (k, v))
        error_sum = float(np.abs(attention(key, value) - right).sum())
        rel_error = error_sum / size if size else (0.0 if error_sum == 0 else math.inf)
        rel_error = math.inf if math.isnan(rel_error) else rel_error
        measured.append(MeasuredFormat(form, rel_error, key.nbytes + value.nbytes))
    measured.sort(key=lambda x: (x.nbytes, x.rel_error))
    found = next((x.format for x in measured if x.rel_error <= limit), None)
    return SuggestedPrecision(found, tuple(measured))


def _limit(max_rel_error: Any) -> float:
    try:
        limit = math.nan if isinstance(max_rel_error, (bool, str)) else float(max_rel_error)
    except (TypeError, ValueError):
        limit = math.nan
    if not limit > 0:
        raise ValueError(
            message(_NAME, "max_rel_error is no bound", repr(max_rel_error), "a number above 0")
        )
    return limit


def _text(form: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in form.items())
