"""``F.multi_head_attention_forward``: where torch computes attention without
``scaled_dot_product_attention``, it is counted."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch.nn.functional as F  # noqa: N812 (its usual name)

from .._stats import count_left
from ._multihead import NAME, WEIGHTS

_stock: Any = None
_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def _counted(*args: Any, **kwargs: Any) -> Any:
    """``F.multi_head_attention_forward``. umfa does not compute its weights."""
    given = _SIGNATURE.bind_partial(*args, **kwargs).arguments
    if given.get("need_weights", True):
        count_left(f"torch.{NAME}", WEIGHTS)
    return _stock(*args, **kwargs)


def install() -> None:
    global _stock
    _stock = F.multi_head_attention_forward
    # torch.jit.script then compiles the function that it knows.
    functools.update_wrapper(_counted, _stock)
    setattr(_counted, "__script_if_tracing_wrapper", True)
    setattr(_counted, "__original_fn", _stock)
    F.multi_head_attention_forward = _counted


def remove() -> None:
    if F.multi_head_attention_forward is _counted:  # else somebody else has replaced it meanwhile
        F.multi_head_attention_forward = _stock
