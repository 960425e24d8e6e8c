"""Quantised tensors: `quantize`, the record that holds codes and scales, and attention on them.

docs/quantization.md describes each format to the bit.
"""

from __future__ import annotations

from ._attention import quantized_attention
from ._quantize import quantize
from ._sage import sageattn
from ._suggest import suggest_precision
from ._tensor import QuantizedTensor

__all__ = ["QuantizedTensor", "quantize", "quantized_attention", "sageattn", "suggest_precision"]
