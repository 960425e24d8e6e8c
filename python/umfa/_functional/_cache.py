"""What functions on caches share."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._errors import message
from .._ext import Function, integer
from .._frameworks import is_buffer, shape_of


def check_rotary(function: Function, new: tuple[Any, Any], angles: tuple[Any, Any]) -> None:
    """Raises where there are `angles` without `new` keys and values."""
    if all(x is None for x in new) and any(x is not None for x in angles):
        raise ValueError(
            message(
                function.name,
                "rotary_cos and rotary_sin are for new keys",
                "no k and v",
                "k and v, or queries and keys that are rotated already",
            )
        )


def lengths(function: Function, cache_seqlens: Any, q: Any, cu_seqlens_q: Any = None) -> Any:
    """The rows in use as a table, where they are one number for all sequences."""
    if cache_seqlens is None or type(cache_seqlens) in (list, tuple):
        return cache_seqlens
    is_number = type(cache_seqlens) is int or shape_of(cache_seqlens) == ()
    if not is_number and (hasattr(cache_seqlens, "__dlpack__") or is_buffer(cache_seqlens)):
        return cache_seqlens
    length = integer(function.name, "cache_seqlens", cache_seqlens, "a number of rows, or a tensor")
    if cu_seqlens_q is None:
        shape = shape_of(q) or ()
        batch = shape[:1] if len(shape) == 4 else (0,)
    elif type(cu_seqlens_q) in (list, tuple):
        batch = (max(len(cu_seqlens_q) - 1, 0),)
    else:
        shape = shape_of(cu_seqlens_q) or ()
        batch = (max(shape[0] - 1, 0),) if len(shape) == 1 else (0,)
    return np.full(batch, length, dtype=np.int64)
