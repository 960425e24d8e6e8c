"""How other libraries shape the bytes of their formats."""

from __future__ import annotations

from typing import Any

from .._errors import message

_GGUF_BYTES = {"q8_0": 34, "q4_0": 18}


def mlx_bytes(function: str, data: Any) -> Any:
    """A tensor of uint32, or of uint8, as bytes: the same memory."""
    name = str(getattr(data, "dtype", None)).rpartition(".")[2]
    if name == "uint8":
        return data
    if name != "uint32":
        raise TypeError(message(function, "data has the wrong dtype", name, "uint32 or uint8"))
    # Each framework's view() divides the last dimension's elements.
    return data.view(_uint8(data))


def _uint8(data: Any) -> Any:
    """The framework's uint8."""
    kind = type(data.dtype)
    if kind.__module__ == "torch":
        import torch

        return torch.uint8
    if kind.__module__.startswith("mlx"):
        import mlx.core as mx

        return mx.uint8
    return "uint8"


def gguf_channels(function: str, dtype: str, size: int) -> int:
    """Number of channels that `size` bytes hold."""
    of_block = _GGUF_BYTES[dtype]
    if size == 0 or size % of_block:
        expected = f"a multiple of {of_block}, the bytes of a block of 32 channels"
        raise ValueError(
            message(
                function, f"data's last dimension is not made of {dtype} blocks", size, expected
            )
        )
    return size // of_block * 32
