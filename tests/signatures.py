"""What umfa's functions take besides what flash-attn 2 and torch have: by keyword, so that it is
never in the way."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

DROPOUT = ["dropout_seed", "dropout_offset"]
_MASKS = ["backend", "attn_mask", "attention_chunk", "learnable_sink", "s_aux", "qv"]
_LATER = [
    "causal_alignment",
    "attention_chunk_offset",
    "prefix_lens",
    "out",
    "out_dtype",
    "batch_invariant",
]
CACHE = [*_MASKS, *_LATER]
_SPLIT = _LATER.index("out_dtype") + 1
EXTRAS = [*_MASKS, "return_lse", *DROPOUT, *_LATER[:_SPLIT], "num_splits", *_LATER[_SPLIT:]]


def by_keyword(function: Callable[..., Any]) -> list[str]:
    kind = inspect.Parameter.KEYWORD_ONLY
    return [x.name for x in inspect.signature(function).parameters.values() if x.kind is kind]


def by_position(function: Callable[..., Any]) -> dict[str, Any]:
    """Their names and defaults."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(function).parameters.values()
    return {x.name: x.default for x in parameters if x.kind is kind}
