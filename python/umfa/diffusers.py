"""umfa under Hugging Face's diffusers.

>>> import umfa.diffusers
>>> print(umfa.diffusers.enable(pipe))  # a pipeline, or one of its models
transformer (FluxTransformer2DModel): attention modules: 57 through diffusers' dispatcher

Importing this module changes nothing.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, MochiAttention

from ._errors import UnsupportedError, message
from ._functional.flash_attn import flash_attn_func
from ._functional.rope import fused_rope_attention
from ._stats import count_taken
from .torch import _switch

__all__ = ["Coverage", "disable", "enable"]

NAME = "umfa"
_FUNCTION = "umfa.diffusers"
_EARLIER = "_umfa_earlier_backend"
"""Where a processor, and so each of its copies, keeps the backend that `enable` has replaced."""
_enabled: WeakSet[torch.nn.Module] = WeakSet()
"""Models for which torch's attention runs on umfa."""


def __dir__() -> list[str]:
    return __all__


class Coverage(NamedTuple):
    """What `enable` found in one model."""

    name: str
    """The pipeline's name of it."""
    kind: str
    """Its class."""
    by_umfa: int
    """Attention modules whose processor asks diffusers' dispatcher, and so umfa."""
    by_torch: int
    """Those whose processor calls PyTorch's scaled_dot_product_attention, which runs on umfa as
    `umfa.torch.enable` describes."""
    others: dict[str, int]
    """Those that compute attention themselves, by the class of their processor."""
    fused: int = 0
    """Of `by_umfa`, those whose rotary embedding umfa's kernel applies."""

    def __str__(self) -> str:
        parts = [f"{self.by_umfa} through diffusers' dispatcher"] if self.by_umfa else []
        if self.fused:
            parts[0] += f", {self.fused} of them with rotary embedding"
        if self.by_torch:
            parts.append(f"{self.by_torch} through torch's attention")
        parts += [f"{n} not by umfa ({kind})" for kind, n in self.others.items()]
        return f"{self.name} ({self.kind}): attention modules: {', '.join(parts) or 'none'}"


class Report(tuple[Coverage, ...]):
    """`Coverage` of each model; printed, a line for each."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def enable(pipe: Any, *, fused_rope: bool = False) -> Report:
    """Let umfa compute the attention of a pipeline, or of one model.

    Processors that ask diffusers' dispatcher get the backend "umfa", as
    ``model.set_attention_backend("umfa")`` would give it. All others reach umfa through PyTorch's
    attention, which runs on umfa as `umfa.torch.enable` describes, in the whole process.

    Parameters
    ----------
    pipe : DiffusionPipeline or torch.nn.Module
    fused_rope : bool
        umfa's kernel also applies the rotary embedding of FLUX.1's and FLUX.2's queries and keys,
        where it loads them. Otherwise diffusers writes rotated copies. A second call without
        `fused_rope` takes this back.

    Returns
    -------
    tuple of Coverage
        What was found in each model. Print it.

    Raises
    ------
    TypeError
        `pipe` is neither.
    UnsupportedError
        `fused_rope`, and no processor is one of FLUX.1's or FLUX.2's. Nothing has changed then.
    """
    models = _models(pipe)
    if fused_rope:
        _refuse_without_rope(models)
    backend = _backend()
    if not _switch.is_enabled_by(_FUNCTION):  # umfa.torch.disable() has switched all models off
        _enabled.clear()
    _enabled.update(model for _, model in models)
    _switch.enable(_FUNCTION)
    return Report(_enable(name, model, backend, fused_rope) for name, model in models)


def disable(pipe: Any) -> None:
    """Undo `enable`: the processors have the backends that they had before. So have those of a copy
    of a model that was enabled.

    PyTorch's attention is PyTorch's again, unless another model is enabled or the program called
    `umfa.torch.enable`. `umfa.torch.disable` takes PyTorch's attention from all models.
    """
    models = _models(pipe)
    for _, model in models:
        for processor in _processors(model):
            _set_rope(processor, False)
            if hasattr(processor, _EARLIER):
                processor._attention_backend = getattr(processor, _EARLIER)
                delattr(processor, _EARLIER)
    _enabled.difference_update([model for _, model in models])
    if not _enabled:
        _switch.disable(_FUNCTION)


def _models(pipe: Any) -> list[tuple[str, torch.nn.Module]]:
    """Those of a pipeline by name, or the one that is given."""
    if isinstance(pipe, torch.nn.Module):
        return [("model", pipe)]
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        what, expected = "pipe has no models", "a DiffusionPipeline or a torch.nn.Module"
        raise TypeError(message(_FUNCTION, what, type(pipe).__name__, expected))
    return [(name, x) for name, x in components.items() if isinstance(x, torch.nn.Module)]


def _processors(model: torch.nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, (Attention, MochiAttention, AttentionModuleMixin)):
            processor = getattr(module, "processor", None)
            if processor is not None:
                yield processor


def _refuse_without_rope(models: list[tuple[str, torch.nn.Module]]) -> None:
    from . import _diffusers_rope as rope

    found = [processor for _, model in models for processor in _processors(model)]
    if not any(map(rope.can_fuse, found)):
        kinds = sorted({type(processor).__name__ for processor in found})
        what, expected = (
            "fused_rope fits none of the processors",
            "FLUX.1, FLUX.2, or no fused_rope",
        )
        raise UnsupportedError(message(_FUNCTION, what, ", ".join(kinds) or "none", expected))


def _set_rope(processor: Any, fused: bool) -> bool:
    """Let umfa's kernel rotate, or diffusers; whether umfa's will."""
    if not fused and not hasattr(processor, "_umfa_stock"):
        return False  # the usual case, which does not import FLUX
    from . import _diffusers_rope as rope

    if not rope.can_fuse(processor):
        return False
    (rope.fuse if fused else rope.unfuse)(processor)
    return fused


def _enable(name: str, model: torch.nn.Module, backend: Any, fused_rope: bool) -> Coverage:
    by_umfa = by_torch = fused = 0
    others: Counter[str] = Counter()
    for processor in _processors(model):
        if hasattr(processor, "_attention_backend"):
            if not hasattr(processor, _EARLIER):
                setattr(processor, _EARLIER, processor._attention_backend)
            processor._attention_backend = backend
            by_umfa += 1
            fused += _set_rope(processor, fused_rope)
        elif _calls_torch(type(processor)):
            by_torch += 1
        else:
            others[type(processor).__name__] += 1
    return Coverage(name, type(model).__name__, by_umfa, by_torch, dict(others), fused)


def _calls_torch(kind: type) -> bool:
    """Whether a processor calls torch's attention, by its source."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return False
    return "scaled_dot_product_attention" in source


def _backend() -> Any:
    """diffusers' name of umfa. Its enumeration of backends is closed, so that a member is put into
    the tables that one is looked up in."""
    names: Any = attention_dispatch.AttentionBackendName
    if NAME not in names._value2member_map_:
        member = str.__new__(names, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        names._member_names_.append(member._name_)
        names._member_map_[member._name_] = member
        names._value2member_map_[NAME] = member
    member = names(NAME)
    registry: Any = attention_dispatch._AttentionBackendRegistry
    if member not in registry._backends:
        registry.register(member)(_attention)
    return member


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Any:
    """As diffusers calls its backends: (batch, rows, heads, head dim)."""
    if _parallel_config is not None:
        expected = 'none, or the backend "native" for it'
        raise UnsupportedError(
            message(
                _FUNCTION, "context parallelism is not there yet", "a parallel config", expected
            )
        )
    rotary: list[Any] = []
    if isinstance(attn_mask, tuple):  # `_diffusers_rope.Rotated`
        attn_mask, *rotary = attn_mask
    if (
        attn_mask is not None
        and attn_mask.ndim == 2
        and attn_mask.shape == (query.shape[0], key.shape[1])
    ):  # of keys: diffusers' other backends take it so
        attn_mask = attn_mask[:, None, None, :]
    if not enable_gqa and query.shape[2] != key.shape[2]:
        got = f"{query.shape[2]} heads of query, {key.shape[2]} of key"
        raise ValueError(message(_FUNCTION, "heads differ", got, "enable_gqa=True, or as many"))
    options: dict[str, Any] = {
        "dropout_p": dropout_p, "softmax_scale": scale, "causal": is_causal,
        "causal_alignment": "top_left", "attn_mask": attn_mask, "return_lse": return_lse,
    }  # fmt: skip
    if rotary:
        result = fused_rope_attention(query, key, value, *rotary, **options)
    else:
        result = flash_attn_func(query, key, value, **options)
    count_taken("diffusers.dispatch_attention_fn")
    return result
