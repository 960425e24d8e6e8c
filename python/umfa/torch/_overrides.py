"""Kernels of umfa's for torch's own operations, and torch's for what umfa does not support.

An override at the key of a device alone would lose gradients under ``torch.compile``, and one at
its autograd key alone would be missed in inference mode: `_SDPA` needs both. Transforms of
torch.func, and inductor's graphs of programs without gradients, call `_FOR_CPU` past it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from .._call.run import run_backward
from .._errors import UnsupportedError, message
from .._ext import Attention, Function
from .._functional.flash_attn import flash_attn_func
from .._functional.sdpa import scaled_dot_product_attention
from .._stats import count_left
from ._attempt import attempt, thread

_SDPA = "scaled_dot_product_attention"
_FOR_CPU = "_scaled_dot_product_flash_attention_for_cpu"
_SAFE_SOFTMAX = "_safe_softmax"
_FOR_CPU_BACKWARD = f"{_FOR_CPU}_backward"

_library: Any = None
_transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active
_fused_allowed: Callable[[], bool] = torch._C._get_flash_sdp_enabled


def _sdpa(dispatch_key: str) -> Callable[..., Any]:
    stock = torch.library.get_kernel(f"aten::{_SDPA}", dispatch_key)

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
        def by_torch() -> Any:
            return stock.call_boxed(
                keys, query, key, value, attn_mask, dropout_p, is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip

        def by_umfa() -> Any:
            if not _fused_allowed():
                what = "torch.nn.attention.sdpa_kernel excludes fused kernels"
                raise UnsupportedError(message("umfa.torch", what, "MATH", "FLASH_ATTENTION"))
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
            return scaled_dot_product_attention(query, key, value, **options)

        if _transformed():
            # Transforms of torch.func have a rule for torch's inner operations, none for umfa's.
            return by_torch()
        return attempt(_SDPA, by_umfa, by_torch)

    return kernel


def _for_cpu() -> Callable[..., Any]:
    """(out, log-sum-exp). torch's graphs assert their strides: out has the query's, and the
    log-sum-exp is in the order batch, row, head."""
    stock = torch.library.get_kernel(f"aten::{_FOR_CPU}", "CPU")

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
            if is_causal and attn_mask is not None:  # torch combines them
                raise UnsupportedError(
                    message("umfa", "attn_mask and is_causal exclude each other", "both", "one")
                )
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            out, lse = flash_attn_func(
                q, k, v, dropout_p, scale, is_causal,
                causal_alignment="top_left",
                attn_mask=attn_mask,
                return_lse=True,
            )  # fmt: skip
            out = torch.empty_like(query, dtype=out.dtype).copy_(out.transpose(1, 2))
            return out, lse.transpose(1, 2).contiguous().transpose(1, 2)

        def by_torch() -> Any:
            return stock.call_boxed(
                keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )

        return attempt(_FOR_CPU, by_umfa, by_torch)

    return kernel


_FUNCTION = Function("umfa.torch", layout="bhsd", softmax_scale="scale", causal="is_causal")


def _for_cpu_backward() -> Callable[..., Any]:
    """Gradients in the order batch, row, head, which torch's graphs assert."""
    stock = torch.library.get_kernel(f"aten::{_FOR_CPU_BACKWARD}", "CPU")

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
            found = run_backward(call, out, logsumexp, grad_out, wanted)[:3]
            return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in found)

        def by_torch() -> Any:
            return stock.call_boxed(
                keys, grad_out, query, key, value, out, logsumexp, dropout_p, is_causal,
                attn_mask=attn_mask, scale=scale,
            )  # fmt: skip

        return attempt(_FOR_CPU_BACKWARD, by_umfa, by_torch)

    return kernel


def _safe_softmax() -> Callable[..., Any]:
    """torch's own. Only its attention by matrix products calls it: under torch.func without
    `_SDPA`."""
    stock = torch.library.get_kernel(f"aten::{_SAFE_SOFTMAX}", "CPU")

    def kernel(keys: Any, x: Any, dim: int, dtype: Any = None) -> Any:
        if not thread.stock:
            count_left(
                f"torch.{_SDPA}",
                "torch computed it by matrix products, as vmap does with fewer than 4 dimensions",
            )
        return stock.call_boxed(keys, x, dim, dtype)

    return kernel


def install() -> None:
    global _library
    kernels = [(_SDPA, key, _sdpa(key)) for key in ("CPU", "AutogradCPU", "MPS", "AutogradMPS")]
    kernels.append((_SAFE_SOFTMAX, "CPU", _safe_softmax()))
    kernels += [(_FOR_CPU, "CPU", _for_cpu()), (_FOR_CPU_BACKWARD, "CPU", _for_cpu_backward())]
    make_library: Any = torch.library.Library  # its methods carry no annotations
    _library = make_library("aten", "IMPL")
    for operation, key, kernel in kernels:
        with warnings.catch_warnings():  # torch warns that its kernel is replaced
            warnings.simplefilter("ignore")
            _library.impl(operation, kernel, key, with_keyset=True, allow_override=True)
    _forget()


def remove() -> None:
    global _library
    _library._destroy()
    _library = None
    _forget()


def _forget() -> None:
    """Python's operations keep what the dispatcher once said of their keys, for FakeTensors."""
    for operation in (_SDPA, _FOR_CPU, _FOR_CPU_BACKWARD, _SAFE_SOFTMAX):
        cache = getattr(getattr(torch.ops.aten, operation).default, "_dispatch_cache", None)
        if cache is not None:
            cache.clear()
