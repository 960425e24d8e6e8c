"""umfa's kernels for torch's attention of dense tensors; torch's for what umfa does not support.

`_SDPA` needs an override at the autograd keys of its devices, and one at BackendSelect for
inference mode (see `_kernels.Below`). Transforms of torch.func and graphs call `_FOR_CPU`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._call import repeated
from .._call.run import run_backward
from .._errors import UnsupportedError, message
from .._ext import Attention, Function
from .._frameworks import _torch_autodiff
from .._functional.flash_attn import flash_attn_func
from .._functional.sdpa import scaled_dot_product_attention
from .._stats import count_left
from ._attempt import attempt, computed, plainly, thread
from ._kernels import Kernel, Override
from ._quantized import QuantFormat, mode, quantized_attention

_SDPA = "scaled_dot_product_attention"
QUANTIZED = f"{_SDPA}, quantised"
_FOR_CPU = "_scaled_dot_product_flash_attention_for_cpu"
_FOR_MPS = "_scaled_dot_product_attention_math_for_mps"
_SAFE_SOFTMAX = "_safe_softmax"
_FOR_CPU_BACKWARD = f"{_FOR_CPU}_backward"

_transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active
_fused_allowed: Callable[[], bool] = torch._C._get_flash_sdp_enabled


def _is_fused(query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float) -> bool:
    """Whether torch puts `_FOR_CPU` into the graph that is being recorded.

    That graph is better than one with umfa's own operation: it runs on umfa or on torch, as umfa is
    enabled when it runs. torch keeps graphs in a cache on disk, whose keys do not know of umfa.
    """
    given = query, key, value
    return (
        _fused_allowed()
        and dropout_p == 0
        and all(x.is_cpu and x.dim() == 4 and not x.is_nested for x in given)
        and len({x.dtype for x in given}) == 1
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and all(0 not in x.shape and x.stride(-1) == 1 for x in given)
        and (attn_mask is None or not attn_mask.requires_grad)
    )


def _sdpa(stock: Any) -> Kernel:
    def kernel(
        keys: Any,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        # Options other than the defaults, and none by position: umfa then remembers the call.
        options: dict[str, Any] = {}
        if attn_mask is not None:
            options["attn_mask"] = attn_mask
        if dropout_p != 0:
            options["dropout_p"] = dropout_p
        if is_causal:
            options["is_causal"] = True
        if scale is not None:
            options["scale"] = scale
        if enable_gqa:
            options["enable_gqa"] = True
        form = mode.form
        if form is None and not thread.stock and _fused_allowed():
            found = repeated(scaled_dot_product_attention, (query, key, value), options)
            if found is not None:
                return computed(_SDPA, found)

        def by_torch() -> Any:
            return stock.call_boxed(
                keys, query, key, value, attn_mask, dropout_p, is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip

        def by_umfa() -> Any:
            _require_fused()
            return scaled_dot_product_attention(query, key, value, **options)

        if form is not None:
            return attempt(
                QUANTIZED, lambda: _on_codes(form, (query, key, value), **options), by_torch
            )
        # Transforms of torch.func have a rule for torch's inner operations, none for umfa's.
        if _transformed() or not (query.is_cpu or query.is_mps):
            return by_torch()
        if _torch_autodiff.records() and _is_fused(query, key, value, attn_mask, dropout_p):
            return by_torch()
        return attempt(_SDPA, by_umfa, by_torch)

    return kernel


def _require_fused() -> None:
    if not _fused_allowed():
        what = "torch.nn.attention.sdpa_kernel excludes fused kernels"
        raise UnsupportedError(message("umfa.torch", what, "MATH", "FLASH_ATTENTION"))


def _require_one_mask(attn_mask: Any, is_causal: bool) -> None:
    """Inner operations of torch's combine them."""
    if is_causal and attn_mask is not None:
        what = "attn_mask and is_causal exclude each other"
        raise UnsupportedError(message("umfa", what, "both", "one"))


def _on_codes(
    form: QuantFormat,
    tensors: tuple[Any, Any, Any],
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`_SDPA` with a quantised query, key and value."""
    query, key, _ = tensors
    _require_fused()
    _require_one_mask(attn_mask, is_causal)
    if _transformed() or _torch_autodiff.records():
        what = "quantised attention is transformed or recorded"
        raise UnsupportedError(message("umfa.torch", what, "torch.func or a graph", "eager mode"))
    if dropout_p != 0:
        what = "quantised attention drops no weights"
        raise UnsupportedError(message("umfa.torch", what, f"dropout_p={dropout_p}", "dropout_p=0"))
    if query.dim() != 4 or (query.shape[1] != key.shape[1] and not enable_gqa):
        what = "quantised attention does not broadcast heads"
        got, expected = tuple(query.shape), "(batch, heads, seqlen, head_dim), as many heads of key"
        raise UnsupportedError(message("umfa.torch", what, got, expected))
    return quantized_attention(
        *tensors,
        **form._asdict(),
        softmax_scale=scale,
        causal=is_causal,
        causal_alignment="top_left",
        attn_mask=attn_mask,
        layout="bhsd",
    )


def _for_cpu(stock: Any) -> Kernel:
    """(out, log-sum-exp). torch's graphs assert their strides: out has the query's, and the
    log-sum-exp is in the order batch, row, head."""

    def kernel(
        keys: Any,
        query: Any,
        key: Any,
        value: Any,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Any = None,
        scale: float | None = None,
    ) -> Any:
        def by_umfa() -> Any:
            _require_one_mask(attn_mask, is_causal)
            out = torch.empty_like(query)
            q, k, v, o = (x.transpose(1, 2) for x in (query, key, value, out))
            with plainly(query):
                _, lse = flash_attn_func(
                    q, k, v, dropout_p, scale, is_causal,
                    causal_alignment="top_left",
                    attn_mask=attn_mask,
                    return_lse=True,
                    out=o,
                )  # fmt: skip
            return out, lse.transpose(1, 2).contiguous().transpose(1, 2)

        def by_torch() -> Any:
            return stock.call_boxed(
                keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )

        return attempt(_FOR_CPU, by_umfa, by_torch)

    return kernel


_FUNCTION = Function("umfa.torch", layout="bhsd", softmax_scale="scale", causal="is_causal")


def _for_cpu_backward(stock: Any) -> Kernel:
    """Gradients in the order batch, row, head, which torch's graphs assert."""

    def kernel(
        keys: Any,
        grad_out: Any,
        query: Any,
        key: Any,
        value: Any,
        out: Any,
        logsumexp: Any,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Any = None,
        scale: float | None = None,
    ) -> Any:
        def by_umfa() -> Any:
            call = Attention(
                _FUNCTION,
                backend="auto",
                query=query,
                key=key,
                value=value,
                attn_mask=attn_mask,
                causal=is_causal,
                causal_alignment="top_left",
                softmax_scale=scale,
                dropout_p=dropout_p,
            )
            wanted = [True, True, True, False][: len(call.tensors)]
            with plainly(query):
                found = run_backward(call, out, logsumexp, grad_out, wanted)[:3]
            return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in found)

        def by_torch() -> Any:
            return stock.call_boxed(
                keys, grad_out, query, key, value, out, logsumexp, dropout_p, is_causal,
                attn_mask=attn_mask, scale=scale,
            )  # fmt: skip

        return attempt(_FOR_CPU_BACKWARD, by_umfa, by_torch)

    return kernel


def _for_mps(stock: Any) -> Kernel:
    """(out, an empty tensor). The second result would be the matrix of weights, which torch's own
    kernels for MPS do not compute either where they are fused."""

    def kernel(
        keys: Any,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        dropout_mask: Any = None,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        def by_umfa() -> Any:
            if dropout_mask is not None:
                what = "dropout_mask says which weights to drop"
                raise UnsupportedError(message("umfa.torch", what, "a mask", "dropout_p alone"))
            out = scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
            return out, query.new_empty(0)

        def by_torch() -> Any:
            return stock.call_boxed(
                keys, query, key, value, attn_mask, dropout_p, is_causal, dropout_mask,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip

        return attempt(_FOR_MPS, by_umfa, by_torch)

    return kernel


def _safe_softmax(stock: Any) -> Kernel:
    """torch's own. Only its attention by matrix products calls it: under torch.func without
    `_SDPA`."""

    def kernel(keys: Any, x: Any, dim: int, dtype: Any = None) -> Any:
        if not thread.stock:
            count_left(
                f"torch.{_SDPA}",
                "torch computed it by matrix products, as vmap does with fewer than 4 dimensions",
            )
        return stock.call_boxed(keys, x, dim, dtype)

    return kernel


OVERRIDES = (
    Override(_SDPA, ("BackendSelect", "AutogradCPU", "AutogradMPS", "AutogradNestedTensor"), _sdpa),
    Override(_FOR_MPS, ("MPS",), _for_mps),
    Override(_SAFE_SOFTMAX, ("CPU",), _safe_softmax),
    Override(_FOR_CPU, ("CPU",), _for_cpu),
    Override(_FOR_CPU_BACKWARD, ("CPU",), _for_cpu_backward),
)
