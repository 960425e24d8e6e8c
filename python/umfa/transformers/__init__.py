"""umfa as an attention implementation of Hugging Face's transformers.

>>> import umfa.transformers
>>> umfa.transformers.register()
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="umfa")

Importing this module changes nothing.
"""

from __future__ import annotations

import inspect

import transformers

from .._errors import UnsupportedError, message

try:
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

    from . import _attention, _cache, _flash, _masks, _models
    from ._cache import QuantizedCache
except ImportError as error:  # that of a name that came later
    raise ImportError(
        message(
            "umfa.transformers",
            f"this transformers cannot be extended ({error})",
            f"transformers {transformers.__version__}",
            "5.24 or later",
        )
    ) from error

__all__ = ["QuantizedCache", "register", "unregister"]


def __dir__() -> list[str]:
    return __all__


def register() -> None:
    """Make ``attn_implementation="umfa"`` and ``"umfa_flash"`` known to transformers.

    Then ``from_pretrained(..., attn_implementation="umfa")`` and
    ``model.set_attn_implementation("umfa")`` run a model's attention on umfa, with its gradients.
    Masks stay descriptions: causal, sliding window, chunks, padding and packed sequences are never
    written out as a (seqlen_q, seqlen_kv) matrix. A mask of another kind, such as blocks of image
    tokens that see each other, is written out as transformers' own "sdpa" writes it, and
    `umfa.stats` counts the calls with one.

    "umfa_flash" stands where transformers wants flash-attn's functions: continuous batching
    (``model.generate_batch``) takes only such a name, and models hand the lengths of packed
    sequences only to one.

    A model whose attention is code of its own (Bloom, MPT, Falcon, …) would take a name and never
    call umfa: both names raise `umfa.UnsupportedError` for it. With ``output_attentions=True`` a
    call runs on the model's eager attention, which has weights, and is counted.

    ``generate(cache_implementation="quantized", cache_config={"backend": "umfa", ...})`` then makes
    a `QuantizedCache`; the rest of the dictionary is its parameters.

    Registering twice is the same as once. A transformers that is too old raises
    `umfa.UnsupportedError`.
    """
    _check_version()
    AttentionInterface.register(_models.NAME, _attention.attention)
    AttentionMaskInterface.register(_models.NAME, _masks.mask)
    AttentionInterface.register(_flash.NAME, _flash.attention)
    AttentionMaskInterface.register(_flash.NAME, masking_utils.flash_attention_mask)
    _flash.install()
    _models.install()
    _cache.install()


def unregister() -> None:
    """Undo `register`. A model that still has a name of umfa's raises a KeyError when it runs: give
    it another with ``set_attn_implementation``."""
    for name in (_models.NAME, _flash.NAME):
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)
    _models.remove()
    _flash.remove()
    _cache.remove()


def _check_version() -> None:
    """Earlier releases describe masks by positions in the cache, and know 2 flash functions."""
    describes = "q_length" in inspect.signature(masking_utils.sdpa_mask).parameters
    if describes and hasattr(_flash.utils, "_flash_with_kvcache_fn"):
        return
    what = "this transformers asks for masks or flash functions in another way"
    got, expected = f"transformers {transformers.__version__}", "5.24 or later"
    raise UnsupportedError(message("umfa.transformers.register", what, got, expected))
