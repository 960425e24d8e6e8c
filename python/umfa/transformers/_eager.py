"""Attention with its weights, which umfa does not return: transformers' eager attention."""

from __future__ import annotations

import sys
from typing import Any

import torch

from .._errors import UnsupportedError, message
from .._stats import count_left
from ._masks import Mask


def attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    is_causal: bool,
    dropout: float,
    scaling: float | None,
    **others: Any,
) -> tuple[Any, Any]:
    """Result and weights of the eager attention in the module's file. Counted as left."""
    kind = type(module)
    eager = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
    if eager is None:
        raise UnsupportedError(
            message(
                "umfa.transformers",
                f"umfa returns no weights, and {kind.__module__} has no eager_attention_forward",
                "output_attentions=True",
                'output_attentions=False, or attn_implementation="eager"',
            )
        )
    count_left("transformers.attention", "output_attentions=True: umfa returns no weights")
    given = {name: x for name, x in others.items() if x is not None}
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = _added(mask, query, key, is_causal)
    found: tuple[Any, Any] = eager(
        module, query, key, value, mask, scaling=scale, dropout=dropout, **given
    )
    return found


def _added(mask: Any, query: Any, key: Any, is_causal: bool) -> Any:
    """The mask as the number that is added to each score; None if there is nothing to mask."""
    rows, keys = query.shape[2], key.shape[2]
    if isinstance(mask, Mask):
        mask = mask.written()
    elif mask is None and is_causal and rows > 1:
        mask = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None or mask.dtype is not torch.bool:
        return mask
    least = torch.finfo(query.dtype).min
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, least)
