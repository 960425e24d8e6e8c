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
from weakref import WeakKeyDictionary

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, MochiAttention

from . import torch as umfa_torch
from ._errors import UnsupportedError, message
from ._functional.flash_attn import flash_attn_func
from ._stats import count_taken

__all__ = ["Coverage", "disable", "enable"]

NAME = "umfa"
_FUNCTION = "umfa.diffusers"
_earlier: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""Of each processor, the backend that `enable` has replaced."""


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

    def __str__(self) -> str:
        parts = [f"{self.by_umfa} through diffusers' dispatcher"] if self.by_umfa else []
        if self.by_torch:
            parts.append(f"{self.by_torch} through torch's attention")
        parts += [f"{n} not by umfa ({kind})" for kind, n in self.others.items()]
        return f"{self.name} ({self.kind}): attention modules: {', '.join(parts) or 'none'}"


class Report(tuple[Coverage, ...]):
    """`Coverage` of each model; printed, a line for each."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def enable(pipe: Any) -> Report:
    """Let umfa compute the attention of a pipeline, or of one model.

    Processors that ask diffusers' dispatcher get the backend "umfa", as
    ``model.set_attention_backend("umfa")`` would give it. All others reach umfa through PyTorch's
    attention: `umfa.torch.enable` is called too, and holds for the whole process.

    Returns
    -------
    tuple of Coverage
        What was found in each model. Print it.

    Raises
    ------
    TypeError
        `pipe` is neither.
    """
    models = _models(pipe)
    backend = _backend()
    umfa_torch.enable()
    return Report(_enable(name, model, backend) for name, model in models)


def disable(pipe: Any) -> None:
    """Undo `enable`: the processors have the backends that they had before, and PyTorch's attention
    is PyTorch's."""
    for _, model in _models(pipe):
        for processor in _processors(model):
            if processor in _earlier:
                processor._attention_backend = _earlier.pop(processor)
    umfa_torch.disable()


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


def _enable(name: str, model: torch.nn.Module, backend: Any) -> Coverage:
    by_umfa = by_torch = 0
    others: Counter[str] = Counter()
    for processor in _processors(model):
        if hasattr(processor, "_attention_backend"):
            if processor not in _earlier:
                _earlier[processor] = processor._attention_backend
            processor._attention_backend = backend
            by_umfa += 1
        elif _calls_torch(type(processor)):
            by_torch += 1
        else:
            others[type(processor).__name__] += 1
    return Coverage(name, type(model).__name__, by_umfa, by_torch, dict(others))


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
    if (
        attn_mask is not None
        and attn_mask.ndim == 2
        and attn_mask.shape == (query.shape[0], key.shape[1])
    ):  # of keys: diffusers' other backends take it so
        attn_mask = attn_mask[:, None, None, :]
    if not enable_gqa and query.shape[2] != key.shape[2]:
        got = f"{query.shape[2]} heads of query, {key.shape[2]} of key"
        raise ValueError(message(_FUNCTION, "heads differ", got, "enable_gqa=True, or as many"))
    result = flash_attn_func(
        query, key, value, dropout_p, scale, is_causal,
        causal_alignment="top_left", attn_mask=attn_mask, return_lse=return_lse,
    )  # fmt: skip
    count_taken("diffusers.dispatch_attention_fn")
    return result
