"""Test cases as values: shapes, options, seeded inputs, and their float64 answers."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests import reference
from tests.array_libraries import DTYPES, Array

Options = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One attention problem. Hashable, so that its reference is worked out once for all frameworks.

    Parameters
    ----------
    shape
        (batch, heads, seqlen_q, seqlen_k, head_dim).
    heads_k, head_dim_v
        Only where they differ from `heads`, `head_dim`.
    options
        Keyword arguments of `flash_attn_func`, as a tuple of pairs.
    alibi
        "" (none), "heads" for slopes (heads,), "batch_heads" for (batch, heads).
    factor
        All inputs are multiplied by it before they are rounded.
    """

    shape: tuple[int, int, int, int, int]
    dtype: str = "float32"
    heads_k: int | None = None
    head_dim_v: int | None = None
    options: tuple[tuple[str, Any], ...] = ()
    alibi: str = ""
    factor: float = 1.0
    seed: int = 0
    label: str = field(default="", compare=False)

    @property
    def flop(self) -> float:
        """Of the two matrix products, nothing masked."""
        batch, heads, seqlen_q, seqlen_k, head_dim = self.shape
        return 4.0 * batch * heads * seqlen_q * seqlen_k * head_dim

    def shrunk(self, limit: float) -> Case:
        """Itself, or one batch and one group of heads where it takes more than `limit` FLOP."""
        _, heads, seqlen_q, seqlen_k, head_dim = self.shape
        if self.flop <= limit:
            return self
        group = heads // (self.heads_k or heads)
        return dataclasses.replace(
            self, shape=(1, group, seqlen_q, seqlen_k, head_dim), heads_k=1 if group > 1 else None
        )

    def __str__(self) -> str:
        parts = [self.label] if self.label else []
        parts.append("x".join(map(str, self.shape)))
        if self.heads_k is not None:
            parts.append(f"hk{self.heads_k}")
        if self.head_dim_v is not None:
            parts.append(f"dv{self.head_dim_v}")
        for name, value in self.options:
            text = "_".join(map(str, value)) if isinstance(value, tuple) else str(value)
            parts.append(name if value is True else f"{name}_{text}")
        if self.alibi:
            parts.append(f"alibi_{self.alibi}")
        parts.append(self.dtype)
        return "-".join(parts)


def normal(
    shape: tuple[int, ...], dtype: str = "float32", *, seed: int, factor: float = 1
) -> Array:
    """Standard normal numbers times `factor`, rounded to `dtype`."""
    rng = np.random.default_rng(seed)
    return (factor * rng.standard_normal(shape, dtype=np.float32)).astype(DTYPES[dtype])


@functools.lru_cache(maxsize=16)
def inputs(case: Case) -> tuple[Array, Array, Array]:
    """Query, key and value in BSHD, in the tested dtype. Read-only: they are shared."""
    batch, heads, seqlen_q, seqlen_k, head_dim = case.shape
    heads_k = case.heads_k or heads
    head_dim_v = case.head_dim_v or head_dim
    arrays = tuple(
        normal(shape, case.dtype, seed=1000 * case.seed + i, factor=case.factor)
        for i, shape in enumerate(
            (
                (batch, seqlen_q, heads, head_dim),
                (batch, seqlen_k, heads_k, head_dim),
                (batch, seqlen_k, heads_k, head_dim_v),
            )
        )
    )
    for array in arrays:
        array.flags.writeable = False
    return arrays


def options(case: Case) -> Options:
    """The keyword arguments of the case; ALiBi slopes as a NumPy array."""
    found: Options = dict(case.options)
    if case.alibi:
        batch, heads = case.shape[:2]
        shape = (heads,) if case.alibi == "heads" else (batch, heads)
        # Slopes of a real model are 2^-1 … 2^-8; they differ per head so that a mix-up shows.
        exponents = np.linspace(1, 8, int(np.prod(shape)), dtype=np.float32)
        found["alibi_slopes"] = np.exp2(-exponents).reshape(shape)
    return found


@functools.lru_cache(maxsize=16)
def expected(case: Case) -> tuple[reference.FloatArray, reference.FloatArray]:
    """Output and log-sum-exp of the case, by `reference.attention`."""
    return reference.attention(*inputs(case), **options(case))
