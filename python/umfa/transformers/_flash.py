"""The implementation "umfa_flash": transformers calls umfa where it would call flash-attn.

transformers recognises flash attention by "flash" in the name of the implementation. Continuous
batching, packed training and the vision towers of some models hand lengths of sequences only to
such implementations. `modeling_flash_attention_utils` then removes the padding, and calls the
functions that `_lazy_imports` has found for the name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import modeling_flash_attention_utils as _utils

from .._errors import UnsupportedError, message
from .._functional.flash_attn import flash_attn_func
from .._functional.kvcache import flash_attn_with_kvcache
from .._functional.varlen import flash_attn_varlen_func
from .._stats import count_taken

NAME = "umfa_flash"
utils: Any = _utils  # what is replaced here is private
_stock: Any = None


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Has the signature of `function`: transformers reads from it which options there are."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        count_taken(f"transformers.{function.__name__}")
        return out

    return call


_FUNCTIONS = tuple(
    _counted(function)
    for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)
)


def _imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
    """The functions of an implementation, and those that pad and remove padding."""
    if implementation == NAME:
        return (*_FUNCTIONS, utils._pad_input, utils._unpad_input)
    return _stock(implementation, *args, **kwargs)


def attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Any = None,
    **others: Any,
) -> tuple[Any, Any]:
    """(batch, heads, rows, head dim) of query, key and value; returns (batch, rows, heads, head
    dim), and None for the weights. The mask is of (batch, keys), or None without padding.

    transformers' own function converts float32 to the dtype of the weights, and extends values to
    the head dim of keys. umfa needs neither.
    """
    if position_bias is not None:
        raise _refusal("a bias of the scores", f"position_bias {tuple(position_bias.shape)}")
    if others.get("output_attentions"):
        raise _refusal("weights to return", "output_attentions=True")
    causal = module.is_causal if is_causal is None else is_causal
    _check_mask(attention_mask, query, key, causal)
    if attention_mask is not None and not causal and others.get("sliding_window") is None:
        return _of_keys(query, key, value, attention_mask, dropout, scaling, **others), None
    out = utils._flash_attention_forward(
        *(x.transpose(1, 2) for x in (query, key, value)),
        attention_mask,
        query_length=query.shape[2],
        is_causal=causal,
        dropout=dropout,
        softmax_scale=scaling,
        attn_implementation=NAME,
        **others,
    )
    return out, None


def _of_keys(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    dropout: float,
    scaling: float | None,
    softcap: float | None = None,
    s_aux: Any = None,
    **others: Any,
) -> Any:
    """Padding in the keys only. transformers' function would remove the same rows of the query,
    which are other tokens in the attention of a decoder to its encoder. The other options are of
    causal or packed attention."""
    del others
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    function, seen = _FUNCTIONS[0], mask[:, None, None, :].bool()
    options = {"softcap": softcap or 0.0, "learnable_sink": s_aux}
    return function(q, k, v, dropout, scaling, attn_mask=seen, **options)


def _check_mask(mask: Any, query: Any, key: Any, causal: bool) -> None:
    """transformers' function would read rows of another sequence."""
    if mask is None:
        return
    (batch, _, rows, _), keys = query.shape, key.shape[2]
    least = rows if causal else keys  # without a mask for the end of a static cache
    if mask.ndim != 2 or mask.shape[0] != batch or not least <= mask.shape[1] <= keys:
        what, expected = (
            "attention_mask has the wrong shape",
            f"(batch, keys), here {(batch, keys)}",
        )
        if mask.ndim > 2:
            expected += ', or attn_implementation="umfa" for this mask'
        raise ValueError(message("umfa.transformers", what, tuple(mask.shape), expected))


def _refusal(what: str, got: str) -> UnsupportedError:
    expected = 'attn_implementation="umfa"'
    return UnsupportedError(message("umfa.transformers", f'"{NAME}" has no {what}', got, expected))


def install() -> None:
    global _stock
    if _stock is None:
        _stock = utils._lazy_imports
        utils._lazy_imports = _imports


def remove() -> None:
    global _stock
    if _stock is None:
        return
    if utils._lazy_imports is _imports:  # else somebody else has replaced it meanwhile
        utils._lazy_imports = _stock
        if utils._loaded_implementation == NAME:  # its functions are umfa's
            utils._loaded_implementation = None
        _stock = None
