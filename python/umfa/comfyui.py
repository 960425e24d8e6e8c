"""umfa under ComfyUI: a node that lets umfa compute the attention of a model.

A file in ComfyUI's folder ``custom_nodes``, such as ``custom_nodes/umfa_nodes.py``, needs one line:

>>> from umfa.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

Importing this module changes nothing, and imports nothing of ComfyUI's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._attempt import attempt
from ._errors import UnsupportedError, message
from ._ext import integer
from ._functional.flash_attn import flash_attn_func

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "attention"]

_NAME = "umfa.comfyui.attention"
_WHERE = "comfyui.optimized_attention"
_KEY = "optimized_attention_override"

_NO_OPTIONS = {"transformer_options", "_inside_attn_wrapper"}
"""What ComfyUI passes on beside the options of a call."""

_HINTS = {"low_precision_attention"}
"""It allows less precision. umfa computes with float32 in any case."""


def __dir__() -> list[str]:
    return __all__


def attention(
    q: Any,
    k: Any,
    v: Any,
    heads: int,
    mask: Any = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    **others: Any,
) -> Any:
    """Exact attention with the arguments of ComfyUI's ``optimized_attention``.

    Parameters
    ----------
    q : torch tensor, shape (batch, rows, heads * head_dim)
        (batch, heads, rows, head_dim) with `skip_reshape`. float32, float16 or bfloat16.
    k, v : torch tensor
        As `q`, with as many rows as there are keys, and fewer heads with `enable_gqa`.
    heads : int
        Of `q`.
    mask : torch tensor, optional
        (rows, keys), (batch, rows, keys) or what broadcasts to (batch, heads, rows, keys). bool: a
        query attends where it is True. Numbers are added to the scores.
    attn_precision : torch.dtype, optional
        The least precision of the scores. umfa's is float32, whatever the dtype of `q`.
    skip_reshape, skip_output_reshape : bool
        Whether the tensors, and the result, have a dimension of heads.
    scale : float, optional
        Factor on the scores; ``head_dim ** -0.5`` if None.
    enable_gqa : bool
        Let query heads share key and value heads.
    others
        What ComfyUI passes to all of its attention functions (``transformer_options`` and such),
        and its hint ``low_precision_attention``.

    Returns
    -------
    torch tensor, shape (batch, rows, heads * head_dim)
        (batch, heads, rows, head_dim) with `skip_output_reshape`. The dtype of `q`.

    Raises
    ------
    ValueError, TypeError
        An argument is wrong; the message holds the offending value.
    umfa.UnsupportedError
        Another option is given, `attn_precision` is above float32, or umfa cannot run the call.
    """
    _check_options(attn_precision, others)
    heads = integer(_NAME, "heads", heads, "an int")
    _check_tensors(q, k, v, mask, skip_reshape)
    if not skip_reshape:
        q, k, v = _with_heads(q, k, v, heads)
    else:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.shape[2] != heads:
        raise ValueError(message(_NAME, "heads is not that of q", heads, str(q.shape[2])))
    if not enable_gqa and not q.shape[2] == k.shape[2] == v.shape[2]:
        got = f"{q.shape[2]}, {k.shape[2]} and {v.shape[2]}"
        raise ValueError(message(_NAME, "heads differ", got, "enable_gqa=True, or as many"))
    if mask is not None and mask.ndim == 3:
        mask = mask[:, None]  # of a batch, for all heads
    out = flash_attn_func(q, k, v, softmax_scale=scale, attn_mask=mask)
    return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)


def _check_options(attn_precision: Any, others: dict[str, Any]) -> None:
    unknown = others.keys() - _NO_OPTIONS - _HINTS
    if unknown:
        got, expected = ", ".join(sorted(unknown)), "scale and enable_gqa"
        raise UnsupportedError(message(_NAME, "an option is unknown", got, expected))
    if not isinstance(attn_precision, torch.dtype | None):
        what, expected = "attn_precision is no dtype", "a torch.dtype, or None"
        raise TypeError(message(_NAME, what, repr(attn_precision), expected))
    if attn_precision is not None and attn_precision.itemsize > 4:
        what = "attn_precision is above umfa's"
        raise UnsupportedError(message(_NAME, what, attn_precision, "float32 or less"))


def _check_tensors(q: Any, k: Any, v: Any, mask: Any, skip_reshape: bool) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("mask", mask)):
        if not isinstance(x, torch.Tensor) and not (x is None and name == "mask"):
            what, got = f"{name} is not a tensor of torch", type(x).__name__
            raise TypeError(message(_NAME, what, got, "torch.Tensor"))
    layout = "(batch, rows, heads * head_dim)"
    if skip_reshape:
        layout = "(batch, heads, rows, head_dim), because of skip_reshape"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3 + skip_reshape:
            got = f"shape {tuple(x.shape)}"
            raise ValueError(message(_NAME, f"{name} has {x.ndim} dimensions", got, layout))


def _with_heads(q: Any, k: Any, v: Any, heads: int) -> tuple[Any, ...]:
    """(batch, rows, heads, head_dim) of tensors whose last dimension is both."""
    if heads < 1 or q.shape[2] % heads or q.shape[2] == 0:
        got = f"{tuple(q.shape)} and {heads}"
        raise ValueError(
            message(_NAME, "q and heads do not fit", got, "(batch, rows, heads * head_dim)")
        )
    head_dim = q.shape[2] // heads
    for name, x in (("k", k), ("v", v)):
        if x.shape[2] % head_dim:
            expected = f"(batch, keys, heads * {head_dim})"
            raise ValueError(message(_NAME, f"{name} does not fit", tuple(x.shape), expected))
    return tuple(x.unflatten(2, (-1, head_dim)) for x in (q, k, v))


class _Override:
    """What ComfyUI calls in place of the attention function that it has chosen."""

    def __init__(self, previous: Callable[..., Any] | None) -> None:
        self.previous = previous
        """What another node has set before; umfa leaves calls to it, and else to ComfyUI's."""

    def __call__(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def by_others() -> Any:
            if self.previous is not None:
                return self.previous(stock, *args, **kwargs)
            return stock(*args, **kwargs)

        return attempt(_WHERE, lambda: attention(*args, **kwargs), by_others)


class UmfaAttention:
    """The node: a model in, the same model with umfa's attention out."""

    DESCRIPTION = "Compute the attention of this model with umfa."
    CATEGORY = "model/patch"
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"model": ("MODEL",), "enabled": ("BOOLEAN", {"default": True})}}

    def apply(self, model: Any, enabled: bool) -> tuple[Any]:
        """A clone of the model, whose runs umfa computes; with `enabled` False, does not. The model
        that is given, and others that share its weights, stay as they are."""
        clone = model.clone()
        options = dict(clone.model_options.get("transformer_options", {}))
        current = options.get(_KEY)
        if enabled and not isinstance(current, _Override):
            options[_KEY] = _Override(current)
        elif not enabled and isinstance(current, _Override):
            options[_KEY] = current.previous
            if current.previous is None:
                del options[_KEY]
        clone.model_options["transformer_options"] = options
        return (clone,)


NODE_CLASS_MAPPINGS: dict[str, type] = {"UmfaAttention": UmfaAttention}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {"UmfaAttention": "umfa attention"}
"""What ComfyUI looks for in a file of custom nodes."""
