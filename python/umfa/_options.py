"""Python values of options, brought to the types the core takes. Ranges are the core's business."""

from __future__ import annotations

import contextlib
import numbers
import operator
import reprlib
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import numpy as np

from . import _ext
from ._errors import message
from ._frameworks import shape_of

# Options are never changed: calls with the same ones share them.
_made: dict[tuple[Any, ...], _ext.Options] = {}

WindowSize: TypeAlias = tuple[int, int] | Sequence[int]


def number(function: str, name: str, value: Any) -> float:
    if type(value) is float:
        return value
    # A tensor is refused even when it holds one number: its gradient would be lost unseen.
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(
            message(function, f"{name} is not a number", reprlib.repr(value), "a float")
        )
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            message(function, f"{name} is out of range", _shown(value), "a finite float")
        ) from None


def flag(function: str, name: str, value: Any) -> bool:
    if type(value) is bool:
        return value
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise TypeError(
        message(function, f"{name} is not a bool", reprlib.repr(value), "True or False")
    )


def _shown(number: Any) -> Any:
    """An int as a message can show it: str() refuses thousands of digits."""
    if isinstance(number, int) and abs(number) >= 10**1000:
        return f"an integer of {number.bit_length()} bits"
    return number


def unsigned(function: str, name: str, value: Any) -> int:
    """An int of 64 bits without a sign."""
    expected = "0 to 2**64 - 1"
    found = _index(function, name, value, expected)
    if not 0 <= found < 2**64:
        raise ValueError(message(function, f"{name} is out of range", _shown(found), expected))
    return found


def _index(function: str, name: str, value: Any, expected: str) -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except (TypeError, RuntimeError):  # the latter of torch's tensors without a value
        raise TypeError(
            message(function, f"{name} is not an integer", reprlib.repr(value), expected)
        ) from None


def integer(function: str, name: str, value: Any, expected: str) -> int:
    """An int that the core can be asked about: it judges the range, 64 bits is the door's width."""
    found = _index(function, name, value, expected)
    if not -(2**63) <= found < 2**63:
        raise ValueError(message(function, f"{name} does not fit 64 bits", _shown(found), expected))
    return found


def _window(function: str, window_size: Any) -> tuple[int, int]:
    pair = isinstance(window_size, Sequence) and not isinstance(window_size, (str, bytes))
    if not pair or len(window_size) != 2:
        raise TypeError(
            message(
                function,
                "window_size is not a pair",
                reprlib.repr(window_size),
                "(left, right) in keys, -1 meaning unbounded",
            )
        )
    left, right = window_size
    expected = "-1 (unbounded) or a number of keys"
    return (
        integer(function, "window_size left", left, expected),
        integer(function, "window_size right", right, expected),
    )


def _length(function: str, name: str, value: Any) -> int | None:
    """A number of rows; transformers passes tensors without dimensions."""
    if value is None:
        return None
    if type(value) is not int and shape_of(value) == () and hasattr(value, "item"):
        with contextlib.suppress(TypeError, RuntimeError):  # without a value: refused below
            value = value.item()
    return integer(function, name, value, "a number of rows")


def backend_name(function: str, backend: Any) -> str:
    expected, got = "'auto', 'metal' or 'cpu'", reprlib.repr(backend)
    if not isinstance(backend, str):
        raise TypeError(message(function, "backend is not a string", got, expected))
    # The core knows the names, but could not show one with a NUL, half a surrogate or no end.
    if not backend.isprintable() or len(backend) > 64:
        raise ValueError(message(function, "backend is unknown", got, expected))
    return backend


def make_options(
    function: str,
    names: tuple[str, ...],
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    deterministic: Any,
    return_attn_probs: Any,
    backend: Any = "auto",
    *,
    top_left: bool = False,
    attention_chunk: Any = 0,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    lengths_name: str = "seqused_k",
    rotary_interleaved: Any = True,
    num_splits: Any = 0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
) -> _ext.Options:
    """The options of one call of flash-attn's kind; raises TypeError or ValueError.

    `top_left`: where `causal` aligns, for tests of the kernels.
    `lengths_name`: the caller's spelling of seqused_k.
    `names`: the caller's spelling of query, key and value, for the core's messages.
    """
    # Of these plain types, nothing needs to be looked at twice. Types first: True == 1 == 1.0.
    key = None
    if (
        type(window_size) is tuple
        and len(window_size) == 2
        and type(window_size[0]) is int
        and type(window_size[1]) is int
        and type(causal) is bool
        and type(deterministic) is bool
        and type(return_attn_probs) is bool
        and dropout_p == 0.0
        and type(dropout_p) is float
        and type(softcap) is float
        and (softmax_scale is None or type(softmax_scale) is float)
        and type(backend) is str
        and type(attention_chunk) is int
        and attention_chunk == 0
        and max_seqlen_q is None
        and max_seqlen_k is None
        and rotary_interleaved is True
        and type(num_splits) is int
        and num_splits == 0
    ):
        key = (
            function,
            names,
            lengths_name,
            window_size,
            causal,
            softmax_scale,
            softcap,
            return_attn_probs,
            backend,
            top_left,
        )
        known = _made.get(key)
        if known is not None:
            return known
    left, right = _window(function, window_size)
    flag(function, "deterministic", deterministic)  # every result is; nothing to switch
    options = _ext.Options(
        function,
        cast("tuple[str, str, str]", names),
        causal=flag(function, "causal", causal),
        softmax_scale=(
            None if softmax_scale is None else number(function, "softmax_scale", softmax_scale)
        ),
        window_left=left,
        window_right=right,
        softcap=number(function, "softcap", softcap),
        dropout_p=number(function, "dropout_p", dropout_p),
        return_lse=flag(function, "return_attn_probs", return_attn_probs),
        backend=backend_name(function, backend),
        top_left=top_left,
        attention_chunk=integer(
            function, "attention_chunk", attention_chunk, "0 (none) or a number of positions"
        ),
        max_seqlen_q=_length(function, "max_seqlen_q", max_seqlen_q),
        max_seqlen_k=_length(function, "max_seqlen_k", max_seqlen_k),
        lengths_name=lengths_name,
        rotary_interleaved=flag(function, "rotary_interleaved", rotary_interleaved),
        num_splits=integer(
            function, "num_splits", num_splits, "0 (umfa chooses) or a number of parts"
        ),
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
    )
    if key is not None and len(_made) < 256:
        _made[key] = options
    return options


_SDPA_NAMES = ("query", "key", "value")


def make_sdpa_options(
    function: str,
    dropout_p: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
    backend: Any = "auto",
    bias: str | None = None,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
) -> _ext.Options:
    """The options of one call of torch's kind.

    `bias`: "top_left" or "bottom_right" where a causal bias stands for the mask.
    """
    key = None
    if (
        type(is_causal) is bool
        and type(enable_gqa) is bool
        and dropout_p == 0.0
        and type(dropout_p) is float
        and (scale is None or type(scale) is float)
        and type(backend) is str
    ):
        key = (function, is_causal, enable_gqa, scale, backend, bias)
        known = _made.get(key)
        if known is not None:
            return known
    causal = flag(function, "is_causal", is_causal)
    options = _ext.Options(
        function,
        _SDPA_NAMES,
        causal=causal or bias is not None,
        softmax_scale=None if scale is None else number(function, "scale", scale),
        window_left=-1,
        window_right=-1,
        softcap=0.0,
        dropout_p=number(function, "dropout_p", dropout_p),
        return_lse=False,
        backend=backend_name(function, backend),
        top_left=bias != "bottom_right",
        torch_shapes=True,
        grouped=flag(function, "enable_gqa", enable_gqa),
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
    )
    if key is not None and len(_made) < 256:
        _made[key] = options
    return options
