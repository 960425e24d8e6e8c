"""umfa under PyTorch's own functions: programs that call
``torch.nn.functional.scaled_dot_product_attention`` run on umfa, unchanged.

>>> import umfa.torch
>>> umfa.torch.enable()
>>> print(umfa.stats())  # what ran on umfa, and why the rest did not

Importing this module changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import _switch
from ._mps import synchronize
from ._quantized import quantized_attention

__all__ = [
    "disable",
    "enable",
    "is_enabled",
    "quantized_attention",
    "register",
    "sdpa",
    "synchronize",
    "uninstall",
]


def __dir__() -> list[str]:
    return __all__


def enable() -> None:
    """Let umfa compute torch's attention, in all threads, until `disable`.

    The first call in a process puts umfa's kernels into torch's dispatcher: make it while no other
    thread runs torch. Later, `enable` and `disable` only set a flag that each call reads. They may
    then be called at any time.

    What changes:

    - ``torch.nn.functional.scaled_dot_product_attention`` on CPU and MPS tensors, with its
      gradients, under autocast and inference mode, in graphs of ``torch.compile`` and
      ``torch.export``, and on jagged nested tensors.
    - ``torch.nn.attention.varlen.varlen_attn`` and ``varlen_attn_out`` on CPU and MPS tensors,
      for which torch has no kernels.
    - The fused attention of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` in eval
      mode.

    A call that umfa does not support runs as if umfa were not there, and `umfa.stats` counts it
    with the reason. ``nn.MultiheadAttention`` with ``need_weights=True`` (its default) multiplies
    matrices itself, and is counted likewise. Enabling twice is the same as once.
    """
    _switch.enable()


def disable() -> None:
    """Undo `enable`: torch computes with its own kernels again, bit for bit.

    Each of its calls then costs a few microseconds more than in a process that never enabled umfa;
    see `uninstall`. Inside of `sdpa`, umfa stays enabled until its block ends.
    """
    _switch.disable()


def is_enabled() -> bool:
    """Whether torch's attention runs on umfa now, by `enable`, `sdpa` or torch (see `register`)."""
    return _switch.is_enabled()


@contextmanager
def sdpa() -> Iterator[None]:
    """Let umfa compute torch's attention inside of a ``with`` block; see `enable`.

    Blocks may be nested. What `enable` says of threads holds here too.
    """
    _switch.enter()
    try:
        yield
    finally:
        _switch.leave()


def uninstall() -> None:
    """Remove umfa's kernels from torch's dispatcher. torch's calls are then as fast as before the
    first `enable`.

    Call it while no other thread runs torch: the dispatcher does not allow a kernel to be removed
    during a call. `enable` puts the kernels back.

    Raises
    ------
    ValueError
        umfa is enabled.
    """
    _switch.uninstall()


def register() -> None:
    """Make umfa known to torch as a flash attention, by the name "umfa".

    ``torch.nn.attention.activate_flash_attention_impl("umfa")`` then does what `enable` does, until
    ``torch.nn.attention.restore_flash_attention_impl()``. Nothing is enabled before.

    Raises
    ------
    umfa.UnsupportedError
        This torch has no such registry.
    """
    _switch.register()
