"""Registers ``torch.ops.umfa``, the operations in graphs of umfa's calls.

Import it before ``torch.export.load`` reads such a graph. A program that has recorded a call of
umfa has them already.
"""

from __future__ import annotations

from functools import partial
from typing import cast

from ._call.gradients import Differentiable
from ._frameworks import Framework, _torch, _torch_autodiff, _torch_ops

__all__: list[str] = []

_torch_ops.use(partial(Differentiable.of_text, cast(Framework, _torch), _torch_autodiff))
