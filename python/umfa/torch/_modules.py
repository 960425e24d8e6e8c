"""``F.multi_head_attention_forward``: where torch computes attention without
``scaled_dot_product_attention``, it is counted."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch.nn.functional as F  # noqa: N812 (its usual name)

from .._replace import Replaced, Replacement
from .._stats import count_left
from ._multihead import NAME, WEIGHTS

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def _make(stock: Replaced) -> Replaced:
    def counted(*args: Any, **kwargs: Any) -> Any:
        """``F.multi_head_attention_forward``. umfa does not compute its weights."""
        given = _SIGNATURE.bind_partial(*args, **kwargs).arguments
        if given.get("need_weights", True):
            count_left(f"torch.{NAME}", WEIGHTS)
        return stock(*args, **kwargs)

    return counted


_replacement = Replacement(F, "multi_head_attention_forward", _make)


def install() -> None:
    stock = F.multi_head_attention_forward
    ours = functools.update_wrapper(_replacement.install(), stock)
    # torch.jit.script then compiles the function that it knows.
    setattr(ours, "__script_if_tracing_wrapper", True)
    setattr(ours, "__original_fn", stock)


def remove() -> None:
    _replacement.remove()
