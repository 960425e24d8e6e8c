"""The fused attention of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` in eval mode.

torch's fused layer calls ``_native_multi_head_attention`` too, so that this override reaches it.
Its input is a tensor (batch, rows, embedding) or a strided nested tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from .._errors import UnsupportedError, message
from .._functional.flash_attn import flash_attn_func
from .._functional.varlen import flash_attn_varlen_func
from ._attempt import attempt
from ._kernels import Kernel, Override

NAME = "nn.MultiheadAttention"
WEIGHTS = "need_weights=True: torch multiplies matrices itself; pass need_weights=False"
_OPERATION = "_native_multi_head_attention"


def _native(stock: Any) -> Kernel:
    """(out, None): the second result would be the weights."""

    def kernel(
        keys: Any,
        query: Any,
        key: Any,
        value: Any,
        embed_dim: int,
        num_head: int,
        qkv_weight: Any,
        qkv_bias: Any,
        proj_weight: Any,
        proj_bias: Any,
        mask: Any = None,
        need_weights: bool = True,
        average_attn_weights: bool = True,
        mask_type: int | None = None,
    ) -> Any:
        def by_umfa() -> Any:
            if need_weights:
                raise UnsupportedError(f"[umfa.torch] {WEIGHTS}")
            if query is not key or key is not value:
                what = "query, key and value are not the same tensor"
                raise _refusal(what, "several", "one tensor")

            def project(rows: Any) -> Any:
                """query, key and value, each (..., heads, head_dim)"""
                stacked: Any = F.linear(rows, qkv_weight, qkv_bias)
                return stacked.unflatten(-1, (3, num_head, -1)).unbind(-3)

            out = (
                _nested(query, project, mask)
                if query.is_nested
                else _dense(project(query), mask, mask_type)
            )
            return F.linear(out, proj_weight, proj_bias), None

        def by_torch() -> Any:
            return stock.call_boxed(
                keys, query, key, value, embed_dim, num_head, qkv_weight, qkv_bias,
                proj_weight, proj_bias, mask, need_weights, average_attn_weights, mask_type,
            )  # fmt: skip

        return attempt(NAME, by_umfa, by_torch)

    return kernel


def _dense(projected: Any, mask: Any, mask_type: int | None) -> Any:
    """(batch, rows, embedding)"""
    seen = None
    if mask is not None:
        # The modules make masks of floating point, -inf where theirs are True. torch's kernel would
        # hide all that is not 0, so that its layer gives NaN for a mask that is to be added.
        seen = ~mask if mask.dtype is torch.bool else mask
        if mask_type == 1:  # padding: (batch, keys)
            seen = seen[:, None, None, :]
    q, k, v = projected
    return flash_attn_func(q, k, v, attn_mask=seen).flatten(-2)


def _nested(query: Any, project: Any, mask: Any) -> Any:
    """A nested tensor like `query`."""
    if mask is not None:
        raise _refusal("a mask with nested tensors", "a mask", "none")
    parts = query.unbind()
    lengths = [len(x) for x in parts]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = project(torch.cat(parts))
    out = flash_attn_varlen_func(q, k, v, offsets, offsets, max(lengths), max(lengths))
    return torch.nested.as_nested_tensor(list(out.flatten(-2).split(lengths)))


def _refusal(what: str, got: str, expected: str) -> UnsupportedError:
    return UnsupportedError(message("umfa.torch", what, got, expected))


OVERRIDES = (Override(_OPERATION, ("CPU", "NestedTensorCPU"), _native),)
