"""Asking before computing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import FunctionType
from typing import Any, overload

from .._errors import UnsupportedError, message
from .._frameworks import shape_of
from ._public import BODIES
from .combine import Combination, judge_combination
from .run import judge


@overload
def can_run(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
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

    ``can_run(q, k, v, ...)`` checks `flash_attn_func`. To check another function of umfa, pass it
    first: ``can_run(umfa.scaled_dot_product_attention, query, key, value)``.

    The same code routes the call. Nothing is computed, and an error that the function would raise
    about its arguments becomes the reason. Errors that occur only during the computation are not
    predicted: a failed allocation, or a derivative that mlx requests later.

    Returns
    -------
    (bool, str)
        ``(True, "")``, or False and the reason.
    """
    function: Callable[..., Any]
    if args and callable(args[0]) and shape_of(args[0]) is None:
        if not isinstance(args[0], FunctionType) or args[0] not in BODIES:
            expected = "a function of umfa that computes, or tensors for flash_attn_func"
            got = getattr(args[0], "__qualname__", type(args[0]).__qualname__)
            return False, message("umfa.can_run", "the function is not known", got, expected)
        function, rest = args[0], args[1:]
    else:
        function = next(x for x in BODIES if x.__name__ == "flash_attn_func")
        rest = args
    body = BODIES[function]
    try:
        inspect.signature(body).bind(*rest, **kwargs)
    except TypeError as error:
        expected = f"those of {function.__name__}"
        got = str(error).removeprefix("got ")  # the message has this word
        return False, message("umfa.can_run", "the arguments do not fit", got, expected)
    try:
        record = body(*rest, **kwargs)
        if isinstance(record, Combination):
            return judge_combination(record)
        return judge(record)
    except (ValueError, TypeError, UnsupportedError) as error:
        return False, re.sub(r"^\[umfa\.[\w.]+\]", "[umfa.can_run]", str(error))
