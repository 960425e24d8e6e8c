"""A call as an operation of torch's: autograd, torch.func, torch.compile and torch.export."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .._errors import UnsupportedError, message

_functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_modes_active: Callable[[], int] = torch._C._len_torch_dispatch_stack
_jit_trace: Callable[[], Any] = torch._C._get_tracing_state
TRANSFORMING: tuple[Callable[[], Any], ...] = (_functorch_active, _modes_active, _jit_trace)
"""Each returns something true wherever `transformed` may."""
_RECORDERS = tuple(
    (getattr(torch._C._TorchDispatchModeKey, key), name)
    for key, name in (
        ("PROXY", "make_fx"),
        ("FAKE", "FakeTensorMode"),
        ("FUNCTIONAL", "FunctionalTensorMode"),
    )
)


def applies(tensors: Iterable[Any]) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if getattr(tensor, "requires_grad", False):  # not of a table in NumPy's memory
                return True
    return transformed()


def records() -> bool:
    return _recorder() != ""


def _recorder() -> str:
    """What records operations instead of running them; empty if nothing does."""
    if _modes_active() > 0:
        for key, name in _RECORDERS:
            if torch._C._get_dispatch_mode(key) is not None:
                return name
    return ""


def transformed() -> bool:
    return _functorch_active() or records() or _jit_trace() is not None


def wanted(tensors: Iterable[Any]) -> list[bool]:
    if not torch.is_grad_enabled():
        return [False for _ in tensors]
    return [getattr(tensor, "requires_grad", False) for tensor in tensors]


def refuse(function: str, tensors: dict[str, Any]) -> None:
    first = next(iter(tensors))
    plain = "a call with plain tensors"
    if _jit_trace() is not None or records():
        # The recorder would see an empty tensor and nothing that fills it.
        recorder = _recorder() or "torch.jit.trace"
        raise UnsupportedError(message(function, f"{first} is being recorded", recorder, plain))
    for name, wants in zip(tensors, wanted(tensors.values()), strict=True):
        if wants:
            raise UnsupportedError(
                message(
                    function,
                    f"{name} requires grad, and this function has no backward pass",
                    "requires_grad=True",
                    "a call under torch.no_grad(), or tensors that do not require grad",
                )
            )


def zeros_like(tensor: Any) -> Any:
    return torch.zeros_like(tensor)


def run(call: Any, tensors: dict[str, Any]) -> tuple[Any, ...]:
    if _jit_trace() is not None:
        refuse(call.function, tensors)
    given = tuple(tensors.values())
    asked = wanted(given)
    call.check(asked)
    if _functorch_active():
        if _functionalizes():
            return _record(call, given)
        return _apply(call, given)
    if records():
        return _record(call, given)
    results = _apply(call, given)
    # What the backward pass would refuse is refused now. Without tables, shapes and dtypes decide.
    kind = (*asked, *((x.shape, x.dtype, x.device) for x in given)) if not call.tables else None
    if kind is None or kind not in call.judged:
        with torch.no_grad():
            possible, reason = call.judge(given, asked, *results[:2])
        if not possible:
            raise call.refusal(reason)
        if kind is not None and len(call.judged) < 64:
            call.judged.add(kind)
    return results


def _functionalizes() -> bool:
    """Whether the innermost transform of torch.func is functionalize."""
    top: Any = torch._C._functorch.peek_interpreter_stack()
    return bool(top.key() == torch._C._functorch.TransformType.Functionalize)


def _record(call: Any, tensors: Iterable[Any]) -> tuple[Any, ...]:
    """Puts the call into the graph that is being recorded, as one of `torch.ops.umfa`."""
    from . import _torch_ops  # which few programs need

    return _torch_ops.forward(call, tensors)


def _apply(call: Any, tensors: Iterable[Any]) -> tuple[Any, ...]:
    results: tuple[Any, ...] = _Attention.apply(call, *tensors)  # type: ignore[no-untyped-call]
    return results


class _Attention(torch.autograd.Function):
    """forward(call, *tensors) -> (out, lse) or (out, lse, weights)"""

    @staticmethod
    def forward(call: Any, *tensors: Any) -> tuple[Any, ...]:
        # Where a transform is recorded, autograd is torch.func's, and the graph has the operation.
        results: tuple[Any, ...] = _record(call, tensors) if records() else call.forward(tensors)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        call, *tensors = inputs
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        # Tables may be NumPy arrays.
        ctx.others = [None if isinstance(x, torch.Tensor) else x for x in tensors]
        ctx.save_for_backward(*(x for x in tensors if isinstance(x, torch.Tensor)), *output[:2])

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any, *weights: Any) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        out, lse = saved[-2:]
        tensors = [saved.pop(0) if x is None else x for x in ctx.others]
        wants = ctx.needs_input_grad[1:]
        if dout is None and dlse is None:
            return (None,) * (1 + len(tensors))
        ctx.call.check(wants)
        if _is_batched(dout) or _is_batched(dlse):
            return (None, *_for_each_gradient(ctx, wants, out, lse, dout, dlse, tensors))
        given = (out, lse, dout, dlse, *tensors)
        if torch.is_grad_enabled() or _functorch_active():
            found = iter(_Backward.apply(ctx.call, wants, *given))  # type: ignore[no-untyped-call]
        else:
            found = iter(_Backward.forward(ctx.call, wants, *given))
        return (None, *(next(found) if want else None for want in wants))

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Any, *tensors: Any) -> Any:
        return _one_by_one(lambda *x: _apply(call, x), info, in_dims[1:], tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _refuse_forward_mode(ctx.call)


def _is_batched(tensor: Any) -> bool:
    """Whether the tensor stands for several gradients: is_grads_batched of torch.autograd.grad."""
    return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)


def _for_each_gradient(
    ctx: Any, wants: Any, out: Any, lse: Any, dout: Any, dlse: Any, tensors: list[Any]
) -> tuple[Any, ...]:
    """`_Attention.backward` of one of these gradients after the other."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    if level != 1 or torch.is_grad_enabled():
        raise UnsupportedError(
            message(
                ctx.call.function,
                "is_grads_batched is not implemented with second derivatives or inside of itself",
                f"create_graph={torch.is_grad_enabled()}, level {level}",
                "create_graph=False, level 1",
            )
        )

    def unstacked(tensor: Any) -> list[Any] | None:
        # The size counts only for tensors that stand for one gradient.
        return list(torch._remove_batch_dim(tensor, level, 1, 0)) if _is_batched(tensor) else None

    douts, dlses = unstacked(dout), unstacked(dlse)
    count = len(next(x for x in (douts, dlses) if x is not None))
    found = [
        ctx.call.backward(
            tensors,
            out,
            lse,
            dout if douts is None else douts[i],
            dlse if dlses is None else dlses[i],
            wants,
        )
        for i in range(count)
    ]
    return tuple(
        None if gradients[0] is None else torch._add_batch_dim(torch.stack(gradients), 0, level)
        for gradients in zip(*found, strict=True)
    )


# Function.apply asks for it in each call, and making it takes as long as the call.
_Attention.forward.__signature__ = inspect.signature(_Attention.forward)  # type: ignore[attr-defined]


class _Backward(torch.autograd.Function):
    """The gradients that are wanted, as an operation that has none of its own."""

    @staticmethod
    def forward(
        call: Any, wants: tuple[bool, ...], out: Any, lse: Any, dout: Any, dlse: Any, *tensors: Any
    ) -> tuple[Any, ...]:
        if records():
            from . import _torch_ops

            return _torch_ops.backward(call, tensors, out, lse, dout, dlse, wants)
        found = call.backward(tensors, out, lse, dout, dlse, wants)
        return tuple(gradient for gradient in found if gradient is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.call = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise UnsupportedError(
            message(
                ctx.call.function,
                "the gradient of a gradient is not implemented",
                "a second derivative",
                "first derivatives only",
            )
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Any, wants: tuple[bool, ...], *tensors: Any) -> Any:
        return _one_by_one(lambda *x: _Backward.apply(call, wants, *x), info, in_dims[2:], tensors)  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _refuse_forward_mode(ctx.call)


def _refuse_forward_mode(call: Any) -> None:
    raise UnsupportedError(
        message(
            call.function,
            "forward-mode differentiation is not implemented",
            "a tangent (torch.func.jvp, jacfwd or torch.autograd.forward_ad)",
            "reverse mode (backward, torch.func.grad, vjp or jacrev)",
        )
    )


def _one_by_one(
    operation: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], tensors: tuple[Any, ...]
) -> tuple[Any, Any]:
    """The operation on every slice: tables and options are those of one call, so slices cannot in
    general become a longer batch."""
    slices = []
    for i in range(info.batch_size):
        given = zip(tensors, in_dims, strict=True)
        slices.append(operation(*(x if dim is None else x.select(dim, i) for x, dim in given)))
    results = tuple(torch.stack(column) for column in zip(*slices, strict=True))
    return results, (0,) * len(results)
