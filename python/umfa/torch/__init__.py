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

__all__ = ["disable", "enable", "is_enabled", "sdpa"]


def __dir__() -> list[str]:
    return __all__


def enable() -> None:
    """Let umfa compute torch's scaled dot product attention, in all threads, until `disable`.

    Call it, and `disable`, while no other thread runs torch: torch's dispatcher does not allow its
    kernels to be replaced during a call.

    What changes:

    - ``torch.nn.functional.scaled_dot_product_attention`` on CPU and MPS tensors, with its
      gradients, under autocast and inference mode, and recorded by ``torch.compile`` and
      ``torch.export`` while umfa is enabled.
    - ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` in eval mode: their fused fast
      path, which would not call that function, is switched off.

    - The same function on jagged nested tensors.

    A call that umfa does not support runs as if umfa were not there, and `umfa.stats` counts it
    with the reason. ``nn.MultiheadAttention`` with ``need_weights=True`` (its default) multiplies
    matrices itself, and is counted likewise. Enabling twice is the same as once.
    """
    _switch.enable()


def disable() -> None:
    """Undo `enable`: torch dispatches to its own kernels again, bit for bit.

    Inside of `sdpa`, umfa stays enabled until its block ends.
    """
    _switch.disable()


def is_enabled() -> bool:
    """Whether torch's attention runs on umfa now, by `enable` or `sdpa`."""
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
