"""Functions of ``flash_attn.flash_attn_interface`` that ring-flash-attn and others call, although
their names are private: a pass forward or backward without autograd."""

from __future__ import annotations

import math
from typing import Any

import torch

from .._call.run import run_backward
from .._errors import UnsupportedError, message
from .._ext import Attention, Function
from .._frameworks import _torch
from .._functional.flash_attn import flash_attn_func
from .._functional.varlen import flash_attn_varlen_func
from .._stats import count_taken

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
]

_BACKWARD = Function("umfa.shim._flash_attn_backward", query="q", key="k", value="v")
_VARLEN_BACKWARD = Function("umfa.shim._flash_attn_varlen_backward", query="q", key="k", value="v")


def _flash_attn_forward(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Any,
    return_softmax: bool,
) -> tuple[Any, Any, Any, Any]:
    """`umfa.flash_attn_func` without autograd.

    Returns
    -------
    out : tensor, shape (batch, seqlen_q, nheads, head_dim)
    softmax_lse : tensor, shape (batch, nheads, seqlen_q), float32
        +inf for a query that sees no key.
    S_dmask : tensor, shape (batch, nheads, seqlen_q, seqlen_k)
        Without elements unless `return_softmax` and dropout ask for it.
    rng_state : tensor, shape (2,), int64
        Seed and offset of the dropout, for `_flash_attn_backward`.
    """
    rng_state = _drawn(dropout_p, q)
    with torch.no_grad():
        results = flash_attn_func(
            q, k, v, dropout_p, softmax_scale, causal, (window_size_left, window_size_right),
            softcap, alibi_slopes, False, return_softmax, **_seed(dropout_p, rng_state),
            return_lse=not return_softmax,
        )  # fmt: skip
    count_taken("flash_attn._flash_attn_forward")
    return _four(results, rng_state)


def _flash_attn_varlen_forward(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    return_softmax: bool = False,
    block_table: Any = None,
    leftpad_k: Any = None,
    seqused_k: Any = None,
    zero_tensors: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """`umfa.flash_attn_varlen_func` without autograd; results as those of `_flash_attn_forward`,
    with the log-sum-exp as (nheads, total_q).

    Rows of no sequence are 0, whether `zero_tensors` asks for it or not.

    Raises
    ------
    umfa.UnsupportedError
        `leftpad_k` is given.
    """
    del zero_tensors
    if leftpad_k is not None:
        function, expected = "umfa.shim._flash_attn_varlen_forward", "cu_seqlens_k without padding"
        what = "leftpad_k is not implemented"
        raise UnsupportedError(message(function, what, tuple(leftpad_k.shape), expected))
    rng_state = _drawn(dropout_p, q)
    with torch.no_grad():
        results = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
            softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes,
            False, return_softmax, block_table, **_seed(dropout_p, rng_state),
            seqused_k=seqused_k, return_lse=not return_softmax,
        )  # fmt: skip
    count_taken("flash_attn._flash_attn_varlen_forward")
    return _four(results, rng_state)


def _flash_attn_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    softmax_lse: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Any,
    deterministic: bool,
    rng_state: Any = None,
) -> Any:
    """Write the gradients of `_flash_attn_forward` into `dq`, `dk` and `dv`, where they are given.

    `out` and `softmax_lse` may be those of more keys than `k` has, as in a ring: then the gradients
    are the part of these keys.

    Returns
    -------
    softmax_d : tensor, shape (batch, nheads, seqlen_q), float32
        The sums of ``dout * out``. flash-attn pads its rows to a multiple of 128.
    """
    call = Attention(
        _BACKWARD,
        backend="auto",
        query=q,
        key=k,
        value=v,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=(window_size_left, window_size_right),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        **_known_seed(_BACKWARD.name, dropout_p, rng_state),
    )
    _write_gradients(call, out, softmax_lse, dout, (dq, dk, dv))
    count_taken("flash_attn._flash_attn_backward")
    return _products(dout, out).transpose(1, 2)


def _flash_attn_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    softmax_lse: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Any,
    deterministic: bool,
    rng_state: Any = None,
    zero_tensors: bool = False,
) -> Any:
    """The same of `_flash_attn_varlen_forward`; `softmax_lse` and the result are (nheads, total_q).

    Gradients of rows of no sequence are 0, whether `zero_tensors` asks for it or not.
    """
    del zero_tensors
    call = Attention(
        _VARLEN_BACKWARD,
        backend="auto",
        query=q,
        key=k,
        value=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=(window_size_left, window_size_right),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        **_known_seed(_VARLEN_BACKWARD.name, dropout_p, rng_state),
    )
    _write_gradients(call, out, softmax_lse, dout, (dq, dk, dv))
    count_taken("flash_attn._flash_attn_varlen_backward")
    return _products(dout, out).transpose(0, 1)


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


def _drawn(dropout_p: float, like: Any) -> Any:
    """(seed, offset). Only dropout advances torch's generator."""
    seed = _torch.draw_seed() if dropout_p > 0 else 0
    return torch.tensor([seed, 0], dtype=torch.int64, device=like.device)


def _seed(dropout_p: float, rng_state: Any) -> dict[str, Any]:
    if dropout_p == 0:
        return {}
    seed, offset = rng_state.tolist()
    return {"dropout_seed": seed, "dropout_offset": offset}


def _known_seed(function: str, dropout_p: float, rng_state: Any) -> dict[str, Any]:
    if dropout_p > 0 and rng_state is None:
        what, expected = "rng_state is missing", "that of the call forward, which dropped weights"
        raise ValueError(message(function, what, None, expected))
    return _seed(dropout_p, rng_state)


def _four(results: tuple[Any, ...], rng_state: Any) -> tuple[Any, Any, Any, Any]:
    out, lse, *weights = results
    given = weights[0] if weights and weights[0] is not None else out.new_empty(0)
    return out, lse.masked_fill(lse == -math.inf, math.inf), given, rng_state


def _write_gradients(
    call: Attention, out: Any, lse: Any, dout: Any, gradients: tuple[Any, Any, Any]
) -> None:
    lse = lse.masked_fill(lse == math.inf, -math.inf)
    wanted = [x is not None for x in gradients] + [False] * (len(call.tensors) - 3)
    with torch.no_grad():
        for given, found in zip(
            gradients, run_backward(call, out, lse, dout, wanted), strict=False
        ):
            if given is not None:
                given.copy_(found)


def _products(dout: Any, out: Any) -> Any:
    return (dout.detach().float() * out.detach().float()).sum(-1)
