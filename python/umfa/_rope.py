"""Attention with rotary position embedding in one pass."""

from __future__ import annotations

from typing import Any

from ._attention import Act, run
from ._frameworks import framework_of
from ._options import WindowSize, make_options


def fused_rope_attention(
    q: Any,
    k: Any,
    v: Any,
    rotary_cos: Any,
    rotary_sin: Any,
    *,
    rotary_interleaved: bool = True,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    return_attn_probs: bool = False,
    backend: str = "auto",
) -> Any:
    """`flash_attn_func` on queries and keys that are rotated on their way into the kernel.

    The result is that of rotating `q` and `k` first, rounded to their dtype; no rotated copy of
    them is made.

    Parameters
    ----------
    q, k, v : tensor
        As in `flash_attn_func`, with no more queries than keys.
    rotary_cos, rotary_sin : tensor, shape (positions, rotary_dim / 2)
        Key ``j`` stands at position ``j``, query ``i`` at ``i + seqlen_kv - seqlen_q``. The first
        ``rotary_dim`` channels turn.
    rotary_interleaved : bool
        Rotates the pairs (0, 1), (2, 3), ... (FLUX, GPT-J); if False one channel of each half
        (LLaMA, GPT-NeoX).

    Everything else, results and errors included, is as in `flash_attn_func`.

    Notes
    -----
    Rotary position embedding: Su et al. 2021 (arXiv:2104.09864).
    """
    return attend_rope(
        run,
        "umfa.fused_rope_attention",
        q,
        k,
        v,
        rotary_cos,
        rotary_sin,
        rotary_interleaved,
        softmax_scale,
        causal,
        window_size,
        softcap,
        return_attn_probs,
        backend,
    )


def attend_rope(
    act: Act,
    function: str,
    q: Any,
    k: Any,
    v: Any,
    rotary_cos: Any,
    rotary_sin: Any,
    rotary_interleaved: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    return_attn_probs: Any,
    backend: Any,
) -> Any:
    """The function without its docstring, for whoever does something else at the end."""
    tensors = {"q": q, "k": k, "v": v, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
    framework = framework_of(function, tensors)
    options = make_options(
        function,
        ("q", "k", "v"),
        0.0,
        softmax_scale,
        causal,
        window_size,
        softcap,
        False,
        return_attn_probs,
        backend,
        rotary_interleaved=rotary_interleaved,
    )
    results = act(framework, function, options, tensors, backend)
    return (results[0], results[1], None) if len(results) == 2 else results[0]
