"""torch tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import _ext
from .._errors import UnsupportedError, message
from .._stats import count_wait
from . import _torch_autodiff, _torch_mps, _torch_tables, causal_bias
from ._versions import release

_forward_ad: Any = forward_ad  # its functions carry no annotations

# What torch.autocast casts for scaled_dot_product_attention. It casts float8 too, which is refused
# here, since its scale is not known.
_AUTOCAST_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))


def autocast(
    function: str, tensors: dict[str, Any], written: tuple[str, ...], cast: tuple[str, ...]
) -> None:
    first = next(iter(tensors.values()))
    device = "cpu" if first.is_cpu else "mps"  # tensors elsewhere are refused
    if not torch.is_autocast_enabled(device):
        return
    dtype = torch.get_autocast_dtype(device)
    for name in cast:
        tensor = tensors[name]
        _check_dense(tensor, function, name)
        if tensor.dtype is dtype or tensor.dtype not in _AUTOCAST_DTYPES:
            continue
        if tensor.device.type != device:
            continue
        if name in written:
            continue  # keeps its dtype
        tensors[name] = _cast_unexpanded(tensor, dtype)


def _cast_unexpanded(tensor: Any, dtype: torch.dtype) -> Any:
    """`tensor.to(dtype)` that copies no element twice: expanded dimensions stay expanded."""
    once = tensor
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            once = once.narrow(dimension, 0, 1)
    return once.to(dtype).expand(tensor.shape)


# The binding reads tensors of exactly this class through DLPack's C exchange API: no capsule.
_HAS_EXCHANGE_API = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

_autocasts: Any = getattr(  # on any device
    torch._C, "_is_any_autocast_enabled", lambda: torch.is_autocast_enabled("cpu")
)
_ext.plain_torch(
    torch.Tensor,
    torch.empty_like,
    (*_torch_autodiff.TRANSFORMING, _autocasts),
    torch.is_grad_enabled,
    vars(_forward_ad),
)


def export(tensor: Any, function: str, argument: str, backend: str = "auto") -> Any:
    if (
        _HAS_EXCHANGE_API
        and type(tensor) is torch.Tensor
        and tensor.is_cpu
        and _forward_ad._current_level < 0
        # The API would show the memory of these, without saying what it means.
        and not (tensor.is_neg() or tensor.is_nested or tensor.is_quantized or _is_wrapped(tensor))
        and tensor.layout is torch.strided
    ):
        return tensor
    _check_plain(tensor, function, argument)
    if _forward_ad._current_level >= 0 and _forward_ad.unpack_dual(tensor).tangent is not None:
        raise UnsupportedError(
            message(
                function,
                f"{argument} carries a forward-mode tangent, which would be lost",
                "a dual tensor",
                "a tensor without tangent",
            )
        )
    # Lazily negated or conjugated views export the memory without the minus sign.
    shown = tensor.detach().resolve_conj().resolve_neg()
    if _torch_mps.is_mps(tensor):
        _check_offset(shown, function, argument)
    return shown


def in_stream(tensor: Any) -> bool:
    return _torch_mps.is_mps(tensor)


def stream(
    function: str, tensors: dict[str, Any], results: Sequence[str], obstacle: str = ""
) -> _torch_mps.Stream | None:
    reason = obstacle or _torch_mps.missing()
    if reason:
        # DLPack knows no Metal streams: what torch has queued must be done before umfa's own queue
        # reads it. The other direction needs nothing, since the call waits.
        _torch_mps.wait(reason)
        return None
    return _torch_mps.Stream(function, tensors, results, allocate)


def reads_later(table: Any) -> bool:
    return isinstance(table, torch.Tensor) and _torch_mps.is_mps(table) and not _torch_mps.missing()


def _check_offset(tensor: Any, function: str, argument: str) -> None:
    """Refuses slices on MPS from torch before 2.10.

    It exports the handle of the Metal buffer plus the offset, which is the handle of nothing.
    """
    offset = tensor.storage_offset()
    if offset != 0 and release(torch.__version__) < (2, 10):
        raise UnsupportedError(
            message(
                function,
                f"{argument} is a slice on MPS, whose address torch before 2.10 exports wrongly",
                f"storage_offset {offset} with torch {torch.__version__}",
                f"a copy ({argument}.clone()), or torch >= 2.10",
            )
        )


def _is_recorded(tensor: Any) -> bool:
    """Whether the tensor is one of a recorder's that is at work, so that none will read it now."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return _torch_autodiff.records() and isinstance(tensor, (FakeTensor, FunctionalTensor))


def _check_plain(tensor: Any, function: str, argument: str) -> None:
    """Refuses tensors that stand for something else than one strided block of memory."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise UnsupportedError(
            message(
                function,
                f"{argument} is inside a torch.func transform",
                "a functorch tensor",
                "a plain strided tensor",
            )
        )
    _check_dense(tensor, function, argument)


def _check_dense(tensor: Any, function: str, argument: str) -> None:
    """The same of tensors that may have no memory now."""
    plain = "a plain strided tensor"
    if tensor.is_nested:
        raise UnsupportedError(
            message(
                function,
                f"{argument} is a nested tensor",
                f"a nested tensor with layout {tensor.layout}",
                "a dense tensor (see flash_attn_varlen_func for sequences of different lengths)",
            )
        )
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and not _is_recorded(
        tensor
    ):
        raise UnsupportedError(
            message(
                function,
                f"{argument} is a tensor subclass without memory of its own",
                f"{type(tensor).__module__}.{type(tensor).__qualname__}",
                plain,
            )
        )
    if tensor.layout is not torch.strided or tensor.is_quantized:
        got = tensor.dtype if tensor.is_quantized else tensor.layout
        raise UnsupportedError(message(function, f"{argument} is not a dense tensor", got, plain))
    if type(tensor) is not torch.Tensor and causal_bias(tensor) is not None:
        # By class a tensor, but its memory holds nothing.
        raise UnsupportedError(
            message(
                function,
                f"{argument} is a causal bias, which only scaled_dot_product_attention takes",
                f"{type(tensor).__module__}.{type(tensor).__qualname__}",
                "causal=True for the lower right, or a mask that is written out",
            )
        )
    if tensor.device.type == "meta":
        raise ValueError(
            message(function, f"{argument} has no data", "device meta", "a tensor on cpu or mps")
        )


def allocate(
    like: Any, shape: tuple[int, ...], dtype: str, backend: str = "auto"
) -> tuple[Any, Any]:
    tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    return tensor, tensor


def finish(handle: Any) -> Any:
    return handle


call = None
recorded = None
autodiff = _torch_autodiff


def to_host(tensor: Any, function: str, argument: str) -> Any:
    if _torch_autodiff.records():
        return tensor  # the recorded operation will copy it
    _check_plain(tensor, function, argument)
    if _torch_mps.is_mps(tensor):
        count_wait(f"{argument} is a table on the GPU, which the host reads")
        on_host = tensor.detach().cpu()
        _torch_tables.check()
        return on_host
    return tensor.detach().cpu()


def check_writable(tensor: Any, function: str, argument: str) -> None:
    _check_dense(tensor, function, argument)
    lazy = "negated" if tensor.is_neg() else "conjugated" if tensor.is_conj() else ""
    if lazy:  # what is written would be read with the other sign
        raise ValueError(
            message(function, f"{argument} cannot be written", f"a lazily {lazy} view", "a copy")
        )
    for what, refused in (
        ("requires grad", tensor.requires_grad and torch.is_grad_enabled()),
        (
            "is an inference tensor outside of inference mode",
            tensor.is_inference() and not torch.is_inference_mode_enabled(),
        ),
    ):
        if refused:
            raise UnsupportedError(
                message(
                    function,
                    f"{argument} cannot be written in place: it {what}",
                    f"a {tensor.dtype} tensor",
                    "a detached copy",
                )
            )


def trains(tensors: Iterable[Any]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


stand_ins = None


def mark_written(tensor: Any) -> None:
    # An operation in place on no elements: it raises the version that autograd compares.
    tensor.detach()[:0].zero_()


def draw_seed() -> int:
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64))
