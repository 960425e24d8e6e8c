"""Sequences of different lengths, packed, cached or in pages, and their reference one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tests import reference
from tests.array_libraries import Array
from tests.reference import FloatArray


def offsets(lengths: Sequence[int], dtype: Any = np.int32) -> NDArray[Any]:
    """cu_seqlens of packed sequences."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)


def slopes_of(alibi_slopes: ArrayLike | None, index: int) -> Array | None:
    """The slopes (heads,) of one sequence, from (heads,) or (batch, heads)."""
    if alibi_slopes is None:
        return None
    slopes = np.asarray(alibi_slopes)
    return slopes if slopes.ndim == 1 else slopes[index]


def varlen_reference(
    query: Array,
    key: Array,
    value: Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    seqused_q: ArrayLike | None = None,
    seqused_k: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    **options: Any,
) -> tuple[FloatArray, FloatArray]:
    """`reference.attention` of each sequence; rows that belong to none are 0, their LSE -inf."""
    total, heads, _ = query.shape
    out = np.zeros((total, heads, value.shape[2]))
    lse = np.full((heads, total), -np.inf)
    starts_q, starts_k = np.asarray(cu_seqlens_q), np.asarray(cu_seqlens_k)
    used_q = np.diff(starts_q) if seqused_q is None else np.asarray(seqused_q)
    used_k = np.diff(starts_k) if seqused_k is None else np.asarray(seqused_k)
    for b in range(len(starts_q) - 1):
        rows = slice(starts_q[b], starts_q[b] + used_q[b])
        keys = slice(starts_k[b], starts_k[b] + used_k[b])
        own, own_lse = reference.attention(
            query[None, rows],
            key[None, keys],
            value[None, keys],
            alibi_slopes=slopes_of(alibi_slopes, b),
            **options,
        )
        out[rows], lse[:, rows] = own[0], own_lse[0]
    return out, lse


def paged(
    caches: Sequence[Array], page_size: int, seed: int = 0, spare: int = 3
) -> tuple[list[Array], NDArray[np.int32]]:
    """Caches (batch, rows, heads, channels) cut into pages in random order, and the block table.

    What no row fills is NaN: the ends of last pages, and `spare` pages that belong to nobody.
    """
    batch, rows = caches[0].shape[:2]
    count = -(-rows // page_size)
    rng = np.random.default_rng(seed)
    places = rng.permutation(batch * count + spare)[: batch * count].reshape(batch, count)
    pages = []
    for cache in caches:
        own = np.full((batch * count + spare, page_size, *cache.shape[2:]), np.nan, cache.dtype)
        for b, p in np.ndindex(batch, count):
            rest = cache[b, p * page_size : (p + 1) * page_size]
            own[places[b, p], : len(rest)] = rest
        pages.append(own)
    return pages, places.astype(np.int32)


def unpaged(pages: Array, block_table: NDArray[Any], rows: int) -> Array:
    """The cache (batch, rows, heads, channels) that lies in the pages."""
    batch = len(block_table)
    return pages[block_table].reshape(batch, -1, *pages.shape[2:])[:, :rows]


def rotated(
    rows: Array, cos: Array, sin: Array, positions: NDArray[np.int64], *, interleaved: bool
) -> Array:
    """Rotary position embedding of rows (..., seqlen, heads, channels), rounded to their dtype.

    Parameters
    ----------
    cos, sin : array (positions, rotary_dim / 2)
    positions : int array (..., seqlen)
    """
    half = cos.shape[1]
    wide = rows.astype(np.float64)
    c, s = (x.astype(np.float64)[positions][..., None, :] for x in (cos, sin))
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = wide[..., first].copy(), wide[..., second].copy()
    wide[..., first] = a * c - b * s
    wide[..., second] = a * s + b * c
    return wide.astype(rows.dtype)


def rotary_tables(positions: int, rotary_dim: int, dtype: Any = np.float32) -> tuple[Array, Array]:
    """cos and sin of a usual model."""
    frequencies = 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    angles = np.arange(positions)[:, None] * frequencies
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
