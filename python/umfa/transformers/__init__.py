"""umfa as an attention implementation of Hugging Face's transformers.

>>> import umfa.transformers
>>> umfa.transformers.register()
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="umfa")

Importing this module changes nothing.
"""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from . import _attention, _masks

__all__ = ["register"]

NAME = "umfa"


def __dir__() -> list[str]:
    return __all__


def register() -> None:
    """Make ``attn_implementation="umfa"`` known to transformers.

    Then ``from_pretrained(..., attn_implementation="umfa")`` and
    ``model.set_attn_implementation("umfa")`` run a model's attention on umfa, with its gradients.
    Masks stay descriptions: causal, sliding window, chunks, padding and packed sequences are never
    written out as a (seqlen_q, seqlen_kv) matrix. A mask of another kind, such as blocks of image
    tokens that see each other, is written out as transformers' own "sdpa" writes it, and
    `umfa.stats` counts the calls with one.

    Registering twice is the same as once.
    """
    AttentionInterface.register(NAME, _attention.attention)
    AttentionMaskInterface.register(NAME, _masks.mask)
