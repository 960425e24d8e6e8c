"""get_dispatch_stats: which route the calls took, counted as SimpleTuner reads it."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import torch

from ..torch import _attempt
from ..torch._overrides import QUANTIZED

ROUTES = (
    "total",
    "fp32_instream",
    "fp32_autograd",
    "fp32_direct",
    "quantized_autograd",
    "rope_instream",
    "rope_autograd",
    "mask_all_true_skipped",
    "pytorch_fallback",
)

_lock = threading.Lock()
_counts: Counter[str] = Counter()


def get_dispatch_stats() -> dict[str, int]:
    """Calls since umfa took the place of torch's attention, or since `reset_dispatch_stats`.

    ``total`` counts all calls: of torch's ``scaled_dot_product_attention`` and of this module.
    ``fp32_instream`` (without gradients) and ``fp32_autograd`` (with) are those that umfa computed,
    of any dtype; ``rope_instream`` and ``rope_autograd`` those with rotary embedding;
    ``quantized_autograd`` those that were quantised, with and without gradients.
    ``pytorch_fallback`` counts what umfa left to torch; `umfa.stats` knows the reasons. umfa has no
    other routes, so that ``fp32_direct`` and ``mask_all_true_skipped`` stay 0: a mask that hides
    nothing is read like any other.
    """
    with _lock:
        return {route: _counts[route] for route in ROUTES}


def reset_dispatch_stats() -> None:
    """Begin to count anew."""
    with _lock:
        _counts.clear()


def count(route: str) -> None:
    with _lock:
        _counts["total"] += 1
        _counts[route] += 1


def count_result(result: Any, prefix: str = "fp32") -> None:
    """Counts a call that umfa computed, unless it is only recorded in a graph."""
    if torch.compiler.is_compiling():
        return
    count(f"{prefix}_autograd" if result.requires_grad else f"{prefix}_instream")


def _heard(operation: str, result: Any) -> None:
    """A call of torch's attention; its backward pass is no call."""
    if operation.endswith("backward"):
        return
    if result is None:
        count("pytorch_fallback")
    elif operation == QUANTIZED:
        count("quantized_autograd")
    else:
        count_result(result[0] if isinstance(result, tuple) else result)


def listen() -> None:
    if _heard not in _attempt.listeners:
        _attempt.listeners.append(_heard)


def stop() -> None:
    if _heard in _attempt.listeners:
        _attempt.listeners.remove(_heard)
