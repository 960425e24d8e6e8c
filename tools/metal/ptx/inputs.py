"""Random inputs of a case, and conversions that NumPy lacks."""

from __future__ import annotations

from typing import Any

import numpy as np

from .cases import Case
from .codes import format_of, random_scales
from .placement import STORAGE, Placement, block_table, lengths_k, placements, written

Array = np.ndarray[Any, np.dtype[Any]]


def to_bfloat16(x: Array) -> Array:
    """float32 as bits of bfloat16, rounded to nearest even. No NaN among them."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(x: Array) -> Array:
    return (np.ascontiguousarray(x).astype(np.uint32) << 16).view(np.float32)


def store(x: Array, dtype: str) -> Array:
    """float32 numbers as `dtype` is kept in a buffer."""
    return to_bfloat16(x) if dtype == "bfloat16" else x.astype(STORAGE[dtype])


def widen(x: Array, dtype: str) -> Array:
    """What is kept in a buffer, as float64."""
    return (from_bfloat16(x) if dtype == "bfloat16" else x).astype(np.float64)


def poison(place: Placement) -> Array:
    """A buffer full of NaN."""
    return np.full(place.size * place.item_bytes, 0xFF, np.uint8).view(STORAGE[place.dtype])


def random_buffers(case: Case, rng: np.random.Generator) -> dict[str, Array]:
    """Buffers of every input but the out and lse of a backward pass. What lies between a tensor's
    elements is NaN: it must not be read."""
    found = {}
    for name, place in placements(case).items():
        if name in ("out", "lse", *written(case)):
            continue
        buffer = poison(place)
        view = place.view(buffer)
        if name == "alibi_slopes":
            view[...] = np.exp2(-rng.uniform(1, 8, place.shape))
        elif name.startswith("rotary"):
            positions, pairs = place.shape
            angles = np.arange(positions)[:, None] * 10000.0 ** (-np.arange(pairs) / pairs)
            view[...] = np.cos(angles) if name == "rotary_cos" else np.sin(angles)
        elif place.dtype in ("int8", "uint8"):
            view[...] = rng.integers(0, 256, place.shape, np.uint8).view(STORAGE[place.dtype])
        elif name.endswith("_scales"):
            form = format_of(case, name.removesuffix("_scales"))
            assert form is not None
            view[...] = random_scales(form, place.shape, rng)
        elif place.dtype == "bool":
            view[...] = rng.random(place.shape) < 0.7
            if place.shape[2] > 3:
                view[:, :, 2] = 0  # a row that sees nothing
        else:
            values = rng.standard_normal(place.shape, np.float32)
            if name == "attn_mask":
                values[rng.random(place.shape) < 0.1] = -np.inf
            view[...] = store(values, place.dtype)
            if name in ("key", "value") and (case.page_size or case.new_rows):
                view[~_rows_in_use(case, place)] = poison(place)[0]
            if name == "value" and case.bad_from:
                bad = store(np.float32([np.inf, -np.inf]), place.dtype)
                for n, one in enumerate([poison(place)[0], *bad]):
                    view[:, case.bad_from + n :: 3] = one
        found[name] = buffer
    return found


def _rows_in_use(case: Case, place: Placement) -> Array:
    """Of the pages (pages, page_size) bools, or (batch, rows); without what is still to come."""
    used = np.zeros(place.shape[:2], bool)
    if not case.page_size:
        used[:, : case.seqlen_k - case.new_rows] = True
        return used
    lengths = [n - case.new_rows for n in lengths_k(case)]
    for pages, length in zip(block_table(case), lengths, strict=True):
        keys = np.arange(length)
        used[pages[keys // case.page_size], keys % case.page_size] = True
    return used
