"""umfa under mlx-lm: its models compute attention with umfa, unchanged.

>>> import umfa.mlx_lm
>>> umfa.mlx_lm.enable()
>>> print(umfa.stats())  # what ran on umfa, and why the rest did not

Importing this module changes nothing.
"""

from __future__ import annotations

import threading
from typing import Any

from mlx_lm.models import base

from . import mlx as umfa_mlx
from ._replace import Replaced, Replacement
from ._stats import count_left

__all__ = ["disable", "enable", "is_enabled"]

_NAME = "umfa.mlx_lm"
_REASON = "the cache is quantised: mlx-lm multiplies matrices itself; use a cache without kv_bits"
_lock = threading.Lock()


def __dir__() -> list[str]:
    return __all__


def enable() -> None:
    """Let umfa compute the attention of mlx-lm's models, until `disable`.

    They call ``mx.fast.scaled_dot_product_attention``, which is replaced for the whole process, as
    `umfa.mlx.enable` does and describes; models that are loaded already are reached too. With a
    quantised cache, mlx-lm multiplies matrices itself: `umfa.stats` counts these calls. Enabling
    twice is the same as once.
    """
    with _lock:
        _replacement.install()
        umfa_mlx.want(_NAME, True)


def disable() -> None:
    """Undo `enable`. If `umfa.mlx.enable` was called too, MLX's function stays umfa's."""
    with _lock:
        umfa_mlx.want(_NAME, False)
        _replacement.remove()


def is_enabled() -> bool:
    """Whether `enable` holds now."""
    return _replacement.installed


def _make(stock: Replaced) -> Replaced:
    def counted(*args: Any, **kwargs: Any) -> Any:
        count_left("mlx_lm.scaled_dot_product_attention", _REASON)
        return stock(*args, **kwargs)

    return counted


_replacement = Replacement(base, "quantized_scaled_dot_product_attention", _make)
