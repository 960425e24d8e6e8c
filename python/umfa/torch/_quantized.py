"""Attention that quantises its query, key and value, and learns through that."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .._call.run import run_backward
from .._errors import message
from .._ext import Attention, Function
from .._frameworks import framework_of
from .._functional._types import WindowSize
from ..quant import QuantizedTensor, quantize
from ..quant import quantized_attention as attention_on_codes
from ._attempt import plainly

_NAME = "umfa.torch.quantized_attention"
_SPELLED = {"query": "q", "key": "k", "value": "v"}
_FUNCTIONS = {
    layout: Function(_NAME, layout=layout, **_SPELLED)  # type: ignore[arg-type]
    for layout in ("bshd", "bhsd")
}


class QuantFormat(NamedTuple):
    """What `umfa.quantize` takes besides the tensor."""

    dtype: Any
    granularity: str | None = None
    symmetric: bool = True
    block: tuple[int, int | None] | None = None
    scale_dtype: Any = None


class Mode:
    """Read by every call of torch's attention that umfa computes."""

    form: QuantFormat | None = None
    """In which format query, key and value are quantised; None: they are not."""


mode = Mode()


def quantized_attention(
    q: Any,
    k: Any,
    v: Any,
    dtype: Any = "int8",
    granularity: str | None = None,
    symmetric: bool = True,
    block: tuple[int, int | None] | None = None,
    scale_dtype: Any = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    attn_mask: Any = None,
    learnable_sink: Any = None,
    attention_chunk: int = 0,
    prefix_lens: Any = None,
    causal_alignment: str = "bottom_right",
    layout: str = "bshd",
    backend: str = "auto",
) -> Any:
    """Attention of quantised queries, keys and values, for training.

    The result is that of attention on the numbers that the codes stand for. Gradients pass
    straight through the quantisers (Bengio et al. 2013): those of q, k and v are the gradients with
    respect to these numbers, which are computed and added up in float32.

    For the backward pass, codes and scales of q, k and v are saved, the result and the
    log-sum-exp, and not q, k and v themselves.

    Parameters
    ----------
    q : torch.Tensor, shape (batch, seqlen_q, nheads, head_dim)
        float32, float16 or bfloat16.
    k, v : torch.Tensor, shape (batch, seqlen_k, nheads_k, head_dim)
        v's head_dim may differ. `nheads` is a multiple of `nheads_k`.
    dtype, granularity, symmetric, block, scale_dtype
        The format of q, k and v, as `umfa.quantize` takes it.
    softmax_scale, causal, window_size, softcap, alibi_slopes, attn_mask, learnable_sink,
    attention_chunk, prefix_lens, causal_alignment
        As in `umfa.quantized_attention`. They stay as they are; `alibi_slopes`, a float `attn_mask`
        and `learnable_sink` get gradients, too.
    layout : {"bshd", "bhsd"}
        Order of the dimensions of q, k, v and the result.
    backend : {"auto", "metal", "cpu"}
        Which backend runs the call; see `umfa.flash_attn_func`.

    Returns
    -------
    torch.Tensor, shape (batch, seqlen_q, nheads, head_dim)
        Of the dtype of q.

    Raises
    ------
    ValueError, TypeError
        An argument is wrong, or q, k or v has numbers that are not finite.
    umfa.UnsupportedError
        No backend has what is asked for, or there is no such format.
    RuntimeError
        A second derivative is taken, or a transform of torch.func meets the call.
    """
    if layout not in ("bshd", "bhsd"):
        raise ValueError(message(_NAME, "layout is unknown", repr(layout), "'bshd' or 'bhsd'"))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(message(_NAME, f"{name} is not torch's", type(x), "torch.Tensor"))
    rows = {"q": q, "k": k, "v": v}
    framework = framework_of(_NAME, rows)
    if framework.autocast is not None:
        framework.autocast(_NAME, rows, (), tuple(rows))
    options = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "attention_chunk": attention_chunk,
        "prefix_lens": prefix_lens,
        "causal_alignment": causal_alignment,
        "backend": backend,
    }
    form = QuantFormat(dtype, granularity, symmetric, block, scale_dtype)
    return _Attention.apply(  # type: ignore[no-untyped-call]
        form, layout, options, *rows.values(), alibi_slopes, attn_mask, learnable_sink
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, form: QuantFormat, layout: str, options: dict[str, Any], *tensors: Any
    ) -> Any:
        *rows, slopes, mask, sink = tensors
        backend = options["backend"]
        with plainly(rows[0]):
            codes = [quantize(x, **form._asdict(), layout=layout, backend=backend) for x in rows]
            query, key, value = codes
            out, lse = attention_on_codes(
                query.dequantize(backend=backend),
                key,
                value,
                **options,
                alibi_slopes=slopes,
                attn_mask=mask,
                learnable_sink=sink,
                return_lse=True,
                out_dtype=rows[0].dtype,
                layout=layout,
            )
        ctx.layout, ctx.options = layout, options
        ctx.dtypes = [x.dtype for x in rows]
        ctx.codes = [(x._format, x.shape) for x in codes]
        parts = [part for x in codes for part in x._parts]
        ctx.save_for_backward(*parts, slopes, mask, sink, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Any) -> Any:
        *parts, slopes, mask, sink, out, lse = ctx.saved_tensors
        backend = ctx.options["backend"]
        with plainly(dout):
            # In float32, as the forward pass reads codes: rounded keys would give other weights
            # than those that the log-sum-exp belongs to.
            q, k, v = (
                QuantizedTensor._made(tuple(parts[3 * i : 3 * i + 3]), *own).dequantize(
                    backend=backend
                )
                for i, own in enumerate(ctx.codes)
            )
            call = Attention(
                _FUNCTIONS[ctx.layout],
                query=q,
                key=k,
                value=v,
                alibi_slopes=slopes,
                attn_mask=mask,
                learnable_sink=sink,
                **ctx.options,
            )
            asked = zip(
                ("q", "k", "v", "alibi_slopes", "attn_mask", "learnable_sink"),
                ctx.needs_input_grad[3:],
                strict=True,
            )
            wants = {name for name, needs in asked if needs}
            names = list(call.tensors)
            found = run_backward(call, out, lse, dout, [name in wants for name in names])
        gradients = dict(zip(names, found, strict=True))
        own = [
            None if gradients[name] is None else gradients[name].to(dtype)
            for name, dtype in zip("qkv", ctx.dtypes, strict=True)
        ]
        others = (gradients.get(x) for x in ("alibi_slopes", "attn_mask", "learnable_sink"))
        return (None, None, None, *own, *others)
