"""torch.ops.umfa: what recorders (torch.compile, torch.export, make_fx) put into their graphs.

A node of a graph takes tensors and plain values. The options of a call are text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .._errors import UnsupportedError, message

_decoder: list[Callable[[str], Any]] = []


def use(decoder: Callable[[str], Any]) -> None:
    """Sets what makes a `_call.gradients.Differentiable` of its text."""
    _decoder[:] = [decoder]


def forward(call: Any, tensors: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Records the call."""
    use(call.decoder)
    if call.returns_weights:
        raise UnsupportedError(
            message(
                call.function,
                "the matrix of weights cannot be recorded",
                "return_attn_probs with dropout inside of torch.compile, torch.export or the like",
                "return_lse, or an eager call",
            )
        )
    seed = None
    if call.lacks_seed:
        if torch._C._are_functorch_transforms_active():
            raise UnsupportedError(
                message(
                    call.function,
                    "dropout_seed is missing in a recorded transform of torch.func",
                    None,
                    "a dropout_seed",
                )
            )
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64)  # anew in each run
    out, lse = attention(_nodes(tensors), seed, call.text)
    return out, lse


def backward(
    call: Any,
    tensors: Iterable[Any],
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Records the gradients that are wanted."""
    use(call.decoder)
    return tuple(attention_backward(_nodes(tensors), None, out, lse, dout, dlse, wanted, call.text))


def _nodes(tensors: Iterable[Any]) -> list[Tensor]:
    """Tables may be NumPy arrays, which become constants."""
    return [x if isinstance(x, Tensor) else torch.tensor(x) for x in tensors]


@lru_cache(maxsize=256)
def _of_text(text: str) -> Any:
    return _decoder[0](text)


def _seeded(text: str, seed: Tensor | None) -> Any:
    call = _of_text(text)
    return call if seed is None else call.seeded(int(seed))


@torch.library.custom_op("umfa::attention", mutates_args=())
def attention(tensors: Sequence[Tensor], seed: Tensor | None, call: str) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp)."""
    known = _seeded(call, seed)
    out, lse = known.forward(known.on_host(tensors))
    return out, lse


@attention.register_fake
def _(tensors: Sequence[Tensor], seed: Tensor | None, call: str) -> tuple[Tensor, Tensor]:
    out, lse = (
        tensors[0].new_empty(shape, dtype=getattr(torch, dtype))
        for shape, dtype in _of_text(call).results(tensors)
    )
    return out, lse


@torch.library.custom_op("umfa::attention_backward", mutates_args=())
def attention_backward(
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    wanted: Sequence[bool],
    call: str,
) -> list[Tensor]:
    """The gradients of those tensors that are wanted."""
    known = _seeded(call, seed)
    found = known.backward(known.on_host(tensors), out, lse, dout, dlse, wanted)
    return [gradient for gradient in found if gradient is not None]


@attention_backward.register_fake
def _(
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    wanted: Sequence[bool],
    call: str,
) -> list[Tensor]:
    return [
        tensor.new_empty(tensor.shape)
        for tensor, wants in zip(tensors, wanted, strict=True)
        if wants
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, seed, ctx.call = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output, *([] if seed is None else [seed]))
    ctx.count = len(tensors)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
    tensors, (out, lse, *seed) = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    wanted = ctx.needs_input_grad[0]
    if dout is None and dlse is None:
        return [None] * ctx.count, None, None
    found = iter(
        attention_backward(
            tensors, seed[0] if seed else None, out, lse, dout, dlse, wanted, ctx.call
        )
    )
    return [next(found) if wants else None for wants in wanted], None, None


def _refuse(ctx: Any, *gradients: Any) -> Any:
    raise UnsupportedError(
        message(
            _of_text(ctx.call).function,
            "the gradient of a gradient is not implemented",
            "a second derivative",
            "first derivatives only",
        )
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.call = inputs[-1]


attention.register_autograd(_differentiate, setup_context=_save)
attention_backward.register_autograd(_refuse, setup_context=_remember)
