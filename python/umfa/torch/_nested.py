"""Jagged nested tensors: torch's own attention for them pads or multiplies matrices; umfa reads the
packed rows without padding."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nested._internal import ops as _ops
from torch.nested._internal.nested_tensor import NestedTensor

from .._errors import UnsupportedError, message
from .._functional.varlen import flash_attn_varlen_func
from .._replace import Replaced, Replacement
from ._attempt import attempt

ops: Any = _ops  # torch does not export what is replaced here
_NAME = "scaled_dot_product_attention of nested tensors"


def _sdpa(
    stock: Replaced,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    def by_umfa() -> Any:
        if attn_mask is not None:
            raise _refusal("attn_mask is given", "a mask", "is_causal, or none")
        if not enable_gqa and query.shape[1] != key.shape[1]:  # flash-attn's function needs no flag
            raise _refusal("heads differ", "enable_gqa=False", "enable_gqa=True")
        rows = [_rows(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value"))]
        (q, q_offsets), (k, k_offsets), (v, _) = rows
        out = flash_attn_varlen_func(
            q, k, v, q_offsets, k_offsets, _longest(q_offsets), _longest(k_offsets),
            dropout_p, scale, is_causal, causal_alignment="top_left",
        )  # fmt: skip
        return torch.nested.nested_tensor_from_jagged(
            out, q_offsets, min_seqlen=query._maybe_min_seqlen, max_seqlen=query._maybe_max_seqlen
        ).transpose(1, 2)

    given = (query, key, value, attn_mask, dropout_p, is_causal)
    return attempt(_NAME, by_umfa, lambda: stock(*given, scale=scale, enable_gqa=enable_gqa))


def _rows(tensor: Any, name: str) -> tuple[Any, Any]:
    """The rows as (all rows, heads, head dim), and where sequences begin."""
    if not (isinstance(tensor, NestedTensor) and tensor.dim() == 4 and tensor._ragged_idx == 2):
        raise _refusal(f"{name} is ragged elsewhere than in its rows", tuple(tensor.shape),
                       "a jagged tensor (batch, heads, rows, head_dim)")  # fmt: skip
    given: Any = tensor
    if given.lengths() is not None:
        raise _refusal(f"{name} has gaps between its sequences", "lengths", "contiguous sequences")
    whole: Any = given.transpose(1, 2)
    return whole.values(), whole.offsets()


def _longest(offsets: Any) -> int:
    return int(offsets.diff().max()) if len(offsets) > 1 else 0


def _refusal(what: str, got: Any, expected: str) -> UnsupportedError:
    return UnsupportedError(message("umfa.torch", what, got, expected))


_replacement = Replacement(
    ops, "jagged_scaled_dot_product_attention", lambda stock: partial(_sdpa, stock)
)


def install() -> None:
    _replacement.install()


def remove() -> None:
    _replacement.remove()
