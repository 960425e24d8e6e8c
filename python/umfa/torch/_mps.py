"""Calls on torch's MPS device, which run later."""

from __future__ import annotations

import torch

from .._frameworks import _torch_tables


def synchronize() -> None:
    """Wait for all that is queued on the MPS device, and report what umfa found wrong there.

    Tables of lengths, offsets and pages on the MPS device (``cu_seqlens_q``, ``cache_seqlens``,
    ``block_table``, ...) are read by the GPU alone. A number that is out of range is clamped, so
    that nothing outside of the tensors is read or written. The next call of umfa that waits for the
    GPU raises, or this function, which does what ``torch.mps.synchronize()`` does and looks.

    Raises
    ------
    ValueError
        A call got such a number. The text names the function and the entry. Its results are of no
        use.
    """
    torch.mps.synchronize()
    _torch_tables.check()
