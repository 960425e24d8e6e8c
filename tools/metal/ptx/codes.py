"""Keys and values of a case that are quantised: their parts, and the numbers that they stand for.

Written from docs/quantization.md, without umfa: a mistake in one of the two shows as a difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .cases import Case

Array = np.ndarray[Any, np.dtype[Any]]

FIELDS = ("key", "value")
_STEPS = {"int8": 73.0, "int4": 4.6}
"""The standard deviation of codes that are all as frequent."""


@dataclass(frozen=True)
class Format:
    """Symmetric codes with float16 scales."""

    dtype: str
    """int8 or int4."""
    channels: int
    """Of one token that share a scale."""
    head_dim: int

    @property
    def text(self) -> str:
        """As umfa's record has it."""
        whole = self.channels == self.head_dim
        shared = "row none float16 0 0" if whole else f"block none float16 1 {self.channels}"
        return f"{self.dtype} {shared} {self.head_dim}"

    @property
    def storage(self) -> str:
        """The dtype of the bytes."""
        return "int8" if self.dtype == "int8" else "uint8"

    @property
    def row_bytes(self) -> int:
        return self.head_dim if self.dtype == "int8" else self.head_dim // 2

    @property
    def blocks(self) -> int:
        return -(-self.head_dim // self.channels)

    def numbers(self, data: Array, scales: Array) -> Array:
        """float32 products, as they are defined."""
        codes = data.astype(np.int32)
        if self.dtype == "int4":
            halves = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)
            codes = (halves ^ 8) - 8
        wide = np.repeat(scales.astype(np.float32), self.channels, -1)[..., : self.head_dim]
        return codes.astype(np.float32) * wide


def format_of(case: Case, field: str) -> Format | None:
    """Of "key" or "value"; None if it is a plain tensor."""
    text: str = getattr(case, f"{field}_codes", "")
    if not text:
        return None
    dtype, shared = text.split("_")
    head_dim = case.head_dim if field == "key" else case.head_dim_v
    return Format(dtype, head_dim if shared == "row" else int(shared), head_dim)


def random_scales(form: Format, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """So that numbers are about 1."""
    found: Array = (rng.uniform(0.5, 1, shape) / _STEPS[form.dtype]).astype(np.float16)
    return found
