"""Quantised tensors: `quantize`, and the record that holds codes and scales.

docs/quantization.md describes each format to the bit.
"""

from __future__ import annotations

from ._quantize import quantize
from ._tensor import QuantizedTensor

__all__ = ["QuantizedTensor", "quantize"]
