"""Attention with rotary position embedding in one pass."""

from __future__ import annotations

from typing import Any

from .._call import public
from .._errors import message
from .._ext import Attention, Function
from ._types import WindowSize

_ROPE = Function("umfa.fused_rope_attention", query="q", key="k", value="v")


@public(_ROPE)
def fused_rope_attention(
    q: Any,
    k: Any,
    v: Any,
    rotary_cos: Any,
    rotary_sin: Any,
    *,
    rotary_interleaved: bool = True,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    return_attn_probs: bool = False,
    backend: str = "auto",
    attn_mask: Any = None,
    attention_chunk: int = 0,
    learnable_sink: Any = None,
    s_aux: Any = None,
    qv: Any = None,
    return_lse: bool = False,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
    causal_alignment: str = "bottom_right",
    attention_chunk_offset: int = 0,
    prefix_lens: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    num_splits: int = 0,
    batch_invariant: bool = False,
) -> Attention:
    """`flash_attn_func` with rotary embedding: the kernel rotates q and k when it loads them.

    The result equals that of rotating `q` and `k` first and rounding them to their dtype, but no
    rotated copy is allocated.

    Parameters
    ----------
    q, k, v : tensor
        As in `flash_attn_func`, with no more queries than keys unless ``causal_alignment`` is
        "top_left".
    rotary_cos, rotary_sin : tensor, shape (positions, rotary_dim / 2)
        Key ``j`` has position ``j``, query ``i`` has ``i + seqlen_kv - seqlen_q``, or ``i`` with
        ``causal_alignment="top_left"``. The first ``rotary_dim`` channels are rotated.
    rotary_interleaved : bool
        Rotates the pairs (0, 1), (2, 3), ... (FLUX, GPT-J); if False one channel of each half
        (LLaMA, GPT-NeoX).

    Everything else, results and errors included, is as in `flash_attn_func`.

    Notes
    -----
    Rotary position embedding: Su et al. 2021 (arXiv:2104.09864).
    """
    for name, table in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        if table is None:
            raise TypeError(
                message(
                    _ROPE.name, f"{name} is missing", None, "a tensor; see fused_rope_attention"
                )
            )
    return Attention(
        _ROPE,
        query=q,
        key=k,
        value=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_attn_probs=return_attn_probs,
        attn_mask=attn_mask,
        attention_chunk=attention_chunk,
        learnable_sink=learnable_sink,
        s_aux=s_aux,
        qv=qv,
        return_lse=return_lse,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
        causal_alignment=causal_alignment,
        attention_chunk_offset=attention_chunk_offset,
        prefix_lens=prefix_lens,
        out=out,
        out_dtype=out_dtype,
        num_splits=num_splits,
        batch_invariant=batch_invariant,
        backend=backend,
    )
