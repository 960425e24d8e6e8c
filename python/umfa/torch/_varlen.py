"""``torch.nn.attention.varlen`` on umfa: the operations that its functions call.

torch has no kernel of these operations for CPU and MPS tensors. So umfa's own error is raised for
what it refuses. A kernel of another library's, if there is one, computes what umfa refuses.
"""

from __future__ import annotations

from typing import Any

import torch

from .._call.run import run, run_backward
from .._errors import UnsupportedError, message
from .._ext import Attention, Function
from ._attempt import attempt, plainly
from ._kernels import Kernel, Override, Stock

_FORWARD = "_flash_attention_forward"
_FORWARD_OUT = "_flash_attention_forward_no_dropout_inplace"
_BACKWARD = "_flash_attention_backward"
_NAME = "umfa.torch.varlen_attn"
_FUNCTION = Function(
    _NAME,
    softmax_scale="scale",
    cu_seqlens_q="cu_seq_q",
    cu_seqlens_k="cu_seq_k",
    max_seqlen_q="max_q",
    max_seqlen_k="max_k",
)


def _forward(stock: Any) -> Kernel:
    """(out, log-sum-exp, state of the generator, unused, an empty matrix of weights)"""

    def kernel(keys: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        def by_umfa() -> Any:
            # torch's graphs expect the strides of query.
            out = torch.empty_like(query)
            lse = _run(out, query, *args, **kwargs)
            state, unused = (query.new_zeros(shape, dtype=torch.uint64) for shape in ((2,), ()))
            return out, lse, state, unused, query.new_empty(0)

        return _attempt(_FORWARD, stock, by_umfa, keys, query, *args, **kwargs)

    return kernel


def _forward_out(stock: Any) -> Kernel:
    """The log-sum-exp; the result itself is written to the first argument."""

    def kernel(keys: Any, out: Any, *args: Any, **kwargs: Any) -> Any:
        return _attempt(
            _FORWARD_OUT, stock, lambda: _run(out, *args, **kwargs), keys, out, *args, **kwargs
        )

    return kernel


def _backward(stock: Any) -> Kernel:
    """The gradients of query, key and value, each with the strides of its tensor."""

    def kernel(
        keys: Any,
        grad_out: Any,
        query: Any,
        key: Any,
        value: Any,
        out: Any,
        logsumexp: Any,
        cum_seq_q: Any,
        cum_seq_k: Any,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        rng_state: Any,
        unused: Any,
        **options: Any,
    ) -> Any:
        def by_umfa() -> Any:
            call = _record(
                query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
                **options,
            )  # fmt: skip
            wanted = [i < 3 for i in range(len(call.tensors))]
            with plainly(query):
                found = run_backward(call, out, logsumexp, grad_out, wanted)
                return tuple(
                    torch.empty_like(x).copy_(gradient)
                    for x, gradient in zip((query, key, value), found[:3], strict=True)
                )

        return _attempt(
            _BACKWARD, stock, by_umfa, keys, grad_out, query, key, value, out, logsumexp,
            cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused,
            **options,
        )  # fmt: skip

    return kernel


def _attempt(operation: str, stock: Any, ours: Any, *args: Any, **kwargs: Any) -> Any:
    by_torch = None if isinstance(stock, Stock) else lambda: stock.call_boxed(*args, **kwargs)
    return attempt(operation, ours, by_torch)


def _run(out: Any, *args: Any, **kwargs: Any) -> Any:
    """Writes the result to `out`, and returns the log-sum-exp."""
    with plainly(out):
        _, lse = run(_record(*args, **kwargs, out=out))
    return lse


def _record(
    query: Any,
    key: Any,
    value: Any,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Any = None,
    alibi_slopes: Any = None,
    block_table: Any = None,
    num_splits: int | None = None,
    out: Any = None,
) -> Attention:
    """The call as umfa describes it."""
    if dropout_p != 0 or return_debug_mask:
        what = "neither dropout nor the matrix of weights is implemented"
        got = f"dropout_p={dropout_p}, return_debug_mask={return_debug_mask}"
        raise UnsupportedError(message(_NAME, what, got, "0 and False"))
    if cum_seq_q is None:
        raise UnsupportedError(message(_NAME, "cu_seq_q is missing", None, "packed sequences"))
    if value.shape[-1] != query.shape[-1]:  # torch's graphs give the result the shape of query
        what, got = "value has another head_dim than query", value.shape[-1]
        raise UnsupportedError(message(_NAME, what, got, str(query.shape[-1])))
    return Attention(
        _FUNCTION,
        backend="auto",
        query=query,
        key=key,
        value=value,
        cu_seqlens_q=cum_seq_q,
        cu_seqlens_k=cum_seq_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        softmax_scale=scale,
        causal=is_causal,
        window_size=(
            -1 if window_size_left is None else window_size_left,
            -1 if window_size_right is None else window_size_right,
        ),
        seqused_k=seqused_k,
        alibi_slopes=alibi_slopes,
        block_table=block_table,
        num_splits=num_splits or 0,
        # What torch promises of num_splits=1.
        batch_invariant=num_splits == 1,
        return_lse=True,
        out=out,
    )


_KEYS = "CPU", "MPS"
OVERRIDES = (
    Override(_FORWARD, _KEYS, _forward),
    Override(_FORWARD_OUT, _KEYS, _forward_out),
    Override(_BACKWARD, _KEYS, _backward),
)
