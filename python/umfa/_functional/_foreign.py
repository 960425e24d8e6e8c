"""Arguments of flash-attention 3 and 4 that are no options of umfa's."""

from __future__ import annotations

import reprlib
from typing import Any

from .._errors import UnsupportedError, message
from .._ext import Function

HINTS = frozenset(
    {
        "pack_gqa",  # whether heads that share keys are one tile of queries
        "sm_margin",  # how many multiprocessors are left to others
        "scheduler_metadata",  # an order of work, prepared by get_scheduler_metadata
        "disable_scheduler_metadata",
        "seqlen_k_per_split",  # how long each of num_splits is
        "min_seqlen_k",  # a promise about lengths, which umfa reads anyway
    }
)
"""Hints about speed, which cannot change a result: accepted, and not used. No other argument of
umfa's functions is."""

UNSUPPORTED = frozenset(
    {
        "q_descale",
        "k_descale",
        "v_descale",
        "gather_kv_indices",
        "score_mod",
        "score_mod_bwd",
        "mask_mod",
        "aux_tensors",
        "aux_scalars",
        "block_sparse_tensors",
        "block_sparse_tensors_bwd",
        "gather_bwd_recompute_p",
        "gather_bwd_token_chunk",
    }
)
"""Arguments for what umfa cannot do: all but their default raises `UnsupportedError`."""

OTHERS = HINTS | UNSUPPORTED


def refuse(function: Function, **arguments: Any) -> None:
    """Raises for the first of these `UNSUPPORTED` arguments that is given."""
    for name, value in arguments.items():
        if name not in UNSUPPORTED:
            raise TypeError(f"{name} is not listed as unsupported")
        if value is not None and value is not False:
            raise UnsupportedError(
                message(function.name, f"{name} is not implemented", reprlib.repr(value), "None")
            )
