"""umfa under MLX's own function: programs that call ``mx.fast.scaled_dot_product_attention`` run on
umfa, unchanged.

>>> import umfa.mlx
>>> umfa.mlx.enable()
>>> print(umfa.stats())  # what ran on umfa, and why the rest did not

Importing this module changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ._attempt import attempt
from ._call import public
from ._errors import UnsupportedError, message
from ._ext import Attention, Function
from ._frameworks import _mlx_graph
from ._replace import Replaced, Replacement

__all__ = ["disable", "enable", "is_enabled", "sdpa", "vmap"]

_NAME = "umfa.mlx"
_WHERE = "mlx.fast.scaled_dot_product_attention"
_FUNCTION = Function(
    _NAME,
    layout="bhsd",
    query="q",
    key="k",
    value="v",
    attn_mask="mask",
    softmax_scale="scale",
    learnable_sink="sinks",
)

_lock = threading.Lock()
_reasons: list[object] = []
"""Why umfa is enabled: the names of the modules whose `enable` holds, and an object for each open
block of `sdpa`."""


def __dir__() -> list[str]:
    return __all__


def enable() -> None:
    """Let umfa compute ``mx.fast.scaled_dot_product_attention``, in all threads, until `disable`.

    Programs that look the function up when they call it (``mx.fast.scaled_dot_product_attention``,
    as mlx.nn and mlx-lm do) reach umfa; a name that was imported before does not.

    On MLX's GPU a call becomes part of MLX's graph, inside of ``mx.compile`` too. Without Metal,
    umfa computes when it is called: MLX evaluates the inputs then. Gradients work (``mx.grad``,
    ``mx.value_and_grad``, ``mx.checkpoint``). A call that umfa does not support, and without Metal
    one inside of ``mx.compile`` or ``mx.vmap``, whose arrays have no values, runs as if umfa were
    not there, and `umfa.stats` counts it with the reason. On the GPU, map functions with `vmap`.
    Enabling twice is the same as once.
    """
    want(_NAME, True)


def disable() -> None:
    """Undo `enable`: MLX's function is MLX's.

    Inside of `sdpa`, and until `umfa.mlx_lm.disable` if that is enabled, umfa stays enabled.
    """
    want(_NAME, False)


def is_enabled() -> bool:
    """Whether MLX's function is umfa's now."""
    return _replacement.installed


@contextmanager
def sdpa() -> Iterator[None]:
    """Let umfa compute MLX's function inside of a ``with`` block; see `enable`."""
    reason = object()
    want(reason, True)
    try:
        yield
    finally:
        want(reason, False)


def vmap(fun: Callable[..., Any], in_axes: Any = 0, out_axes: Any = 0) -> Callable[..., Any]:
    """As ``mx.vmap``, of a function that calls umfa on a GPU.

    A mapped call of umfa becomes one call with a larger batch. ``mx.vmap`` itself asks MLX's
    kernels for a rule that they do not have, and raises.

    Parameters
    ----------
    fun
        A function of arrays. What it captures is not mapped.
    in_axes, out_axes
        As those of ``mx.vmap``.

    Returns
    -------
    callable
        The mapped function. It raises `umfa.UnsupportedError` where a call of umfa inside of it has
        sequences of different lengths or dropout, maps what has no batch dimension (sinks, rotary
        angles), or cannot be part of MLX's graph.
    """

    def traced(*args: Any, **kwargs: Any) -> Any:
        with _mlx_graph.mapping():
            return fun(*args, **kwargs)

    mapped: Callable[..., Any] = mx.vmap(traced, in_axes, out_axes)
    return mapped


def want(reason: object, on: bool) -> None:
    """umfa is enabled while there is a reason for it."""
    with _lock:
        if on and reason not in _reasons:
            _reasons.append(reason)
        elif not on and reason in _reasons:
            _reasons.remove(reason)
        if _reasons:
            _replacement.install()
        else:
            _replacement.remove()


def _make(stock: Replaced) -> Replaced:
    def sdpa(*args: Any, **options: Any) -> Any:
        """As MLX's: (batch, heads, rows, head dim)."""
        return attempt(_WHERE, lambda: _by_umfa(*args, **options), lambda: stock(*args, **options))

    return sdpa


_replacement = Replacement(mx.fast, "scaled_dot_product_attention", _make)


def _by_umfa(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: Any = None,
    mask: Any = None,
    sinks: Any = None,
    force_fused: bool = False,
    stream: Any = None,
    **others: Any,
) -> Any:
    if others:  # of a release of MLX that is newer than this text
        raise UnsupportedError(message(_NAME, "an option is unknown", ", ".join(others), "none"))
    if scale is None:
        raise TypeError(message(_NAME, "scale is missing", None, "a number"))
    if not type(q) is type(k) is type(v) is mx.array:
        got = ", ".join(type(x).__name__ for x in (q, k, v))
        raise TypeError(message(_NAME, "q, k and v are not all of MLX", got, "mx.array"))
    if stream is not None:
        raise UnsupportedError(message(_NAME, "a stream is given", stream, "none"))
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(message(_NAME, "mask is unknown", mask, "'causal' or an array"))
    # umfa never holds the scores, which is what force_fused demands.
    del force_fused
    options: dict[str, Any] = {"scale": scale}
    if isinstance(mask, str):
        options["causal"] = True
    elif mask is not None:
        options["mask"] = mask
    if sinks is not None:
        options["sinks"] = sinks
    if not q.dtype == k.dtype == v.dtype:
        options["out_dtype"] = mx.result_type(q, k, v)
    return _attention(q, k, v, **options)


@public(_FUNCTION, reuse=True)
def _attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: Any,
    mask: Any = None,
    sinks: Any = None,
    causal: bool = False,
    out_dtype: Any = None,
) -> Attention:
    """The call as a record. Calls with the same options, apart from arrays, share one set."""
    return Attention(
        _FUNCTION,
        query=q,
        key=k,
        value=v,
        softmax_scale=scale,
        attn_mask=mask,
        learnable_sink=sinks,
        causal=causal,
        out_dtype=out_dtype,
        backend="auto",
    )
