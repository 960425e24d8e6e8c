"""Asking before computing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, overload

from .._errors import UnsupportedError, message
from ._public import BODIES, called
from .combine import Combination, judge_combination
from .gradients import Differentiable
from .prepared import prepared
from .run import judge, ready


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
    predicted: a failed allocation, or a derivative that mlx or jax requests later.

    Returns
    -------
    (bool, str)
        ``(True, "")``, or False and the reason.
    """
    try:
        function, rest = called("umfa.can_run", args)
    except TypeError as error:
        return False, str(error)
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


def gradients_can_run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """Whether a call that `can_run` accepts would have the gradients of all its float tensors.

    Unlike `can_run`, it takes tensors of frameworks without automatic differentiation.
    """
    record = BODIES[function](*args, **kwargs)
    if isinstance(record, Combination):
        return False, "no gradients of partial results"
    call = prepared(record.options)
    framework = ready(call, record.tensors)
    tensors = list(record.tensors.values())
    operation = Differentiable(framework, framework.autodiff, call)
    pairs = zip(tensors, operation.gradients, strict=True)
    wanted = [name is not None and "bool" not in str(x.dtype) for x, name in pairs]
    return operation.judge(tensors, wanted)
