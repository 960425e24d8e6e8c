"""The core's common entry on NumPy arrays, with any of its options and tensors together."""

from __future__ import annotations

from typing import Any

import numpy as np

from frameworks import Array
from umfa import _ext
from umfa._attention import run
from umfa._frameworks import framework_of

NUMPY: Any = framework_of("umfa", {"q": np.zeros(1)})
FUNCTION = "umfa.flash_attn_func"


def options_of(**options: Any) -> _ext.Options:
    """The options in flash-attn's words, or the core's; what is not named is off."""
    left, right = options.pop("window_size", (-1, -1))
    defaults = {
        "causal": False,
        "softmax_scale": None,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "return_lse": True,
        "backend": "cpu",
    }
    return _ext.Options(
        FUNCTION, ("q", "k", "v"), window_left=left, window_right=right, **(defaults | options)
    )


TENSORS = frozenset(
    (
        "attn_mask", "alibi_slopes", "learnable_sink", "qv", "new_key", "new_value", "rotary_cos",
        "rotary_sin", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "block_table",
    )
)  # fmt: skip


def attend(q: Array, k: Array, v: Array, **given: Any) -> tuple[Array, Array]:
    """Output and log-sum-exp, by the CPU backend; `given` are tensors and options."""
    tensors = {"q": q, "k": k, "v": v}
    tensors.update({name: given.pop(name) for name in TENSORS & set(given)})
    out, lse = run(NUMPY, FUNCTION, options_of(**given), tensors, "cpu")
    return out, lse
