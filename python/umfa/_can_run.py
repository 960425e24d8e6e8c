"""Asking before computing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, overload

from ._attention import judge
from ._combine import combine, flash_attn_combine
from ._errors import UnsupportedError, message
from ._flash_attn import (
    attend,
    attend_kvpacked,
    attend_qkvpacked,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from ._kvcache import attend_kvcache, flash_attn_with_kvcache
from ._options import WindowSize
from ._rope import attend_rope, fused_rope_attention
from ._sdpa import attend_sdpa, scaled_dot_product_attention
from ._varlen import (
    attend_varlen,
    attend_varlen_kvpacked,
    attend_varlen_qkvpacked,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

# Each takes (act, function) and the arguments of its function, by name.
_BODIES: dict[Callable[..., Any], Callable[..., Any]] = {
    flash_attn_combine: combine,
    flash_attn_func: attend,
    flash_attn_kvpacked_func: attend_kvpacked,
    flash_attn_qkvpacked_func: attend_qkvpacked,
    flash_attn_varlen_func: attend_varlen,
    flash_attn_varlen_kvpacked_func: attend_varlen_kvpacked,
    flash_attn_varlen_qkvpacked_func: attend_varlen_qkvpacked,
    flash_attn_with_kvcache: attend_kvcache,
    fused_rope_attention: attend_rope,
    scaled_dot_product_attention: attend_sdpa,
}


@overload
def can_run(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
    **more: Any,
) -> tuple[bool, str]: ...


@overload
def can_run(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> tuple[bool, str]: ...


def can_run(*args: Any, **kwargs: Any) -> tuple[bool, str]:
    """Whether a function of umfa would accept these arguments, and if not, why.

    ``can_run(q, k, v, ...)`` is about `flash_attn_func`. Another function of umfa is named first,
    before its arguments: ``can_run(umfa.scaled_dot_product_attention, query, key, value)``.

    Asks the same code that routes the call; computes nothing and raises nothing that the function
    would raise about its arguments. What only shows while computing stays unseen: that memory runs
    out, or that mlx will ask for a derivative.

    Returns
    -------
    (bool, str)
        ``(True, "")``, or False and the reason.
    """
    function: Callable[..., Any] = flash_attn_func
    rest = args
    if args and isinstance(args[0], FunctionType) and args[0] in _BODIES:
        function, rest = args[0], args[1:]
    try:
        bound = inspect.signature(function).bind(*rest, **kwargs)
    except TypeError as error:
        expected = f"those of {function.__name__}"
        return False, message("umfa.can_run", "the arguments do not fit", error, expected)
    bound.apply_defaults()
    try:
        possible, reason = _BODIES[function](judge, "umfa.can_run", dict(bound.arguments))
    except (ValueError, TypeError, UnsupportedError) as error:
        return False, str(error)
    return possible, reason


can_run.__signature__ = inspect.signature(flash_attn_func).replace(  # type: ignore[attr-defined]
    return_annotation="tuple[bool, str]"
)
