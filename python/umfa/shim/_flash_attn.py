"""The modules of `umfa.shim.flash_attn`, and flash-attn's public functions."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .._functional import flash_attn, kvcache, varlen
from .._stats import count_taken
from . import _bert_padding, _flash_attn_private, _flash_attn_rotary
from ._modules import Shim

VERSION = "2.8.3"
"""The release of flash-attn whose interface the modules have."""


def _as_flash_attn(function: Callable[..., Any]) -> Callable[..., Any]:
    """umfa's function, with what flash-attn 2 returns beside the result: +inf as the log-sum-exp
    of a query that sees no key, and no elements where there are no weights."""

    where = f"flash_attn.{function.__name__}"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        results = function(*args, **kwargs)
        count_taken(where)
        if not isinstance(results, tuple):
            return results
        out, lse, *weights = results
        if not hasattr(lse, "masked_fill"):  # not torch's
            return _of_arrays(out, lse, *weights)
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        return (out, lse, *(out.new_empty(0) if x is None else x for x in weights))

    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return call


def _of_arrays(out: Any, lse: Any, *weights: Any) -> tuple[Any, ...]:
    """The same results of libraries that flash-attn does not know."""
    if isinstance(lse, np.ndarray):
        library: Any = np  # which says so itself since its release 2
    else:
        library = lse.__array_namespace__()
    lse = library.where(lse == -math.inf, math.inf, lse)
    none = library.zeros((0,), dtype=out.dtype)
    return (out, lse, *(none if x is None else x for x in weights))


PUBLIC = {
    function.__name__: _as_flash_attn(function)
    for function in (
        flash_attn.flash_attn_func,
        flash_attn.flash_attn_kvpacked_func,
        flash_attn.flash_attn_qkvpacked_func,
        varlen.flash_attn_varlen_func,
        varlen.flash_attn_varlen_kvpacked_func,
        varlen.flash_attn_varlen_qkvpacked_func,
        kvcache.flash_attn_with_kvcache,
    )
}


def _exported(module: Any) -> dict[str, Any]:
    return {name: getattr(module, name) for name in module.__all__}


_shim = Shim(
    "umfa.shim.flash_attn",
    {
        "flash_attn": {"__doc__": "Attention by umfa.", "__version__": VERSION, **PUBLIC},
        "flash_attn.flash_attn_interface": {**PUBLIC, **_exported(_flash_attn_private)},
        "flash_attn.bert_padding": _exported(_bert_padding),
        "flash_attn.layers": {},
        "flash_attn.layers.rotary": _exported(_flash_attn_rotary),
    },
)


def install() -> Shim:
    return _shim.install()
