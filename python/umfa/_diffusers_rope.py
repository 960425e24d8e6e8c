"""diffusers' processors of FLUX whose rotary embedding umfa's kernel applies.

diffusers' own rotate queries and keys in float32, which writes several copies of both, and ask the
dispatcher for attention. Those here hide the tables from that code and hand them to the backend
beside the mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2ParallelSelfAttnProcessor,
)

NAME = "umfa"
"""The backend that understands `Rotated`."""


class Rotated(NamedTuple):
    """What the backend gets in place of a mask: diffusers hands masks through as they are."""

    mask: torch.Tensor | None
    cos: torch.Tensor
    """(rows, head dim / 2)."""
    sin: torch.Tensor


class _FusedRope:
    """Before one of diffusers' classes in a class's bases."""

    _attention_backend: Any
    _umfa_stock: type
    """That class."""

    def _hidden(self, mask: Any, rotary: Any) -> tuple[Any, Any]:
        """What the stock class gets as mask and tables. Another backend gets both as they are."""
        if rotary is None or self._attention_backend != NAME:
            return mask, rotary
        # The tables have each number twice: channels 2i and 2i + 1 are a pair.
        cos, sin = (table[..., ::2] for table in rotary)
        return Rotated(mask, cos, sin), None


class _Joint(_FusedRope):
    """Attention of text and image together."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        hidden = self._hidden(attention_mask, image_rotary_emb)
        stock: Any = super()  # one of diffusers' classes
        return stock.__call__(attn, hidden_states, encoder_hidden_states, *hidden)


class Flux(_Joint, FluxAttnProcessor):
    """FLUX.1."""

    _umfa_stock = FluxAttnProcessor


class Flux2(_Joint, Flux2AttnProcessor):
    """FLUX.2's double blocks."""

    _umfa_stock = Flux2AttnProcessor


class Flux2Parallel(_FusedRope, Flux2ParallelSelfAttnProcessor):
    """FLUX.2's single blocks, whose attention is beside their feed-forward layer."""

    _umfa_stock = Flux2ParallelSelfAttnProcessor

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        hidden = self._hidden(attention_mask, image_rotary_emb)
        return super().__call__(attn, hidden_states, *hidden)


_FUSED: dict[type, type] = {kind._umfa_stock: kind for kind in (Flux, Flux2, Flux2Parallel)}


def can_fuse(processor: Any) -> bool:
    """Whether there is a class for it. Subclasses may do something else with the tables."""
    return type(processor) in _FUSED or isinstance(processor, _FusedRope)


def fuse(processor: Any) -> None:
    """Give a processor the class that hides the tables. It stays the same object, with its backend,
    for all that hold it."""
    processor.__class__ = _FUSED.get(type(processor), type(processor))


def unfuse(processor: Any) -> None:
    """Give it diffusers' class back, also to a copy that was made in between."""
    if isinstance(processor, _FusedRope):
        processor.__class__ = processor._umfa_stock
