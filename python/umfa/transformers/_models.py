"""Which models may have umfa's names. A model whose attention is code of its own would take the
name, and never call umfa.

transformers has no hook for this: it asks methods of `PreTrainedModel`, which are replaced here.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel

from .._errors import UnsupportedError, message
from .._stats import count_left
from . import _flash

NAME = "umfa"
_stock: dict[str, Any] = {}


def _own_code(model: Any) -> bool:
    """transformers reads this from the model's source; of a notebook it has none."""
    kind = type(model)
    return kind.__module__ != "__main__" and not kind._can_set_attn_implementation()


def _require(model: Any, name: Any) -> None:
    """Raise if the model would not call umfa under this name."""
    kind = type(model).__name__
    if name in (NAME, _flash.NAME) and _own_code(model):
        expected = 'attn_implementation="eager"'
        if model._supports_sdpa:
            expected = 'attn_implementation="sdpa", which umfa.torch.enable() computes'
        what = f"{kind} computes attention in its own code, and does not ask for an implementation"
        raise UnsupportedError(message("umfa.transformers", what, repr(name), expected))
    if name == _flash.NAME and not model._supports_flash_attn:
        what = f"{kind} does not support flash attention"
        expected = f'attn_implementation="{NAME}"'
        raise UnsupportedError(message("umfa.transformers", what, repr(name), expected))


def get_correct_attn_implementation(model: Any, requested: Any, *args: Any, **kwargs: Any) -> Any:
    """Asked for each model that is made, and for each part of a model that is changed."""
    _require(model, requested)
    return _stock["get_correct_attn_implementation"](model, requested, *args, **kwargs)


def _check_and_adjust_attn_implementation(
    model: Any, name: Any, is_init_check: bool = False, **kwargs: Any
) -> Any:
    """Models with sinks list the flash functions that know sinks, and replace others."""
    listed = getattr(model, "_compatible_flash_implementations", None) or ()
    if name == _flash.NAME and "flash_attention_4" in listed:
        name = model.get_correct_attn_implementation(name, is_init_check)
        _flash.utils.lazy_import_flash_attention(name)
        return name
    stock = _stock["_check_and_adjust_attn_implementation"]
    return stock(model, name, is_init_check, **kwargs)


def set_attn_implementation(model: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers only warns of a model that cannot be changed, and of its parts."""
    whole = attn_implementation
    if isinstance(whole, dict):
        whole = whole.get("", model.config._attn_implementation)
    _require(model, whole)
    if whole in (NAME, _flash.NAME):
        parts = {type(x): x for x in model.modules() if isinstance(x, PreTrainedModel)}
        for kind, part in parts.items():
            if _own_code(part):
                reason = "computes attention in its own code"
                count_left(f"transformers.{kind.__name__}", reason)
    return _stock["set_attn_implementation"](model, attn_implementation, *args, **kwargs)


_OURS = (
    get_correct_attn_implementation,
    _check_and_adjust_attn_implementation,
    set_attn_implementation,
)


def install() -> None:
    if _stock:
        return
    for ours in _OURS:
        _stock[ours.__name__] = getattr(PreTrainedModel, ours.__name__)
        functools.update_wrapper(ours, _stock[ours.__name__])
        setattr(PreTrainedModel, ours.__name__, ours)


def remove() -> None:
    replaced = [getattr(PreTrainedModel, ours.__name__) is ours for ours in _OURS]
    if not _stock or not all(replaced):  # somebody else has replaced one meanwhile, and calls it
        return
    for name, stock in _stock.items():
        setattr(PreTrainedModel, name, stock)
    _stock.clear()
