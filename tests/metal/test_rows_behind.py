"""Rows behind the last key of a sequence, channels behind the last one, and foreign pages.

Kernels load whole tiles and runs of rows: past the end they must read an existing row again, and
what it holds must not count. Memory there is NaN or infinite in one call and zero in the other, and
both have the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cases import normal
from tests.checks import assert_same_bits
from tests.metal import emulated
from tests.tiers import crossed

KEYS, SPACE = [203, 61], 240  # of each sequence; rows that each has

# Query heads, key heads, queries, head dim and its kernel: a single row of a key head, matrices,
# packed heads (also with padded channels, and in the second part of queries) and whole tiles.
KERNELS = {
    "vector": (2, 2, 1, 64, "decode_vector"),
    "vector, padded": (2, 2, 1, 40, "decode_vector"),
    "matrices": (4, 2, 1, 64, "decode_f16"),
    "matrices, padded": (4, 2, 3, 72, "decode_f16"),
    "packed heads": (4, 2, 2, 320, "forward_f16"),
    "packed heads, qv": (4, 2, 2, 64, "forward_f16"),
    "tiles": (4, 2, 40, 64, "forward_f16"),
    "tiles, padded": (4, 2, 40, 72, "forward_f16"),
    "tiles, one for K and V": (4, 2, 40, 256, "forward_f16"),
}
LAYOUTS = ["dense", "cache", "packed", "pages of 16", "pages of 24"]

# In the order of KERNELS. Where something hides keys, kernels keep NaN in values out in any case.
OPTIONS = ["none", "mask", "none", "splits", "window", "mask", "none", "none", "window"]


def keys_of(layout: str, heads: int, head_dim: int, fill: float, seed: int) -> tuple[Any, Any]:
    """Keys or values in memory that is `fill` elsewhere, and what says where they are."""
    rows = [normal((n, heads, head_dim), "float16", seed=seed + i) for i, n in enumerate(KEYS)]
    if layout.startswith("pages"):
        size = int(layout.split()[-1])
        count = SPACE // size
        table = np.random.default_rng(7).permutation(2 * count + 3)[: 2 * count]
        pages = np.full((2 * count + 3, size, heads, head_dim + 8), fill, np.float16)
        for own, indices in zip(rows, table.reshape(2, count), strict=True):
            padded = np.full((SPACE, heads, head_dim), fill, np.float16)
            padded[: len(own)] = own
            pages[indices, ..., :head_dim] = padded.reshape(count, size, heads, head_dim)
        table = table.reshape(2, count)
        table[1, -(-KEYS[1] // size) :] = table[0, 0]  # never read
        used = {"block_table": table, "seqused_k": np.array(KEYS)}
        return pages[..., :head_dim], used
    memory = np.full((2, SPACE, heads, head_dim + 8), fill, np.float16)
    for own, to in zip(rows, memory, strict=True):
        to[: len(own), :, :head_dim] = own
    inner = memory[..., :head_dim]
    if layout == "dense":  # the first sequence alone
        return inner[:1, : KEYS[0]], {}
    if layout == "cache":
        return inner, {"seqused_k": np.array(KEYS)}
    return inner.reshape(-1, heads, head_dim), {
        "cu_seqlens_k": np.array([0, SPACE, 2 * SPACE]),
        "seqused_k": np.array(KEYS),
    }


def computed(kernel: str, layout: str, option: str, fill: float) -> tuple[Any, Any]:
    heads, heads_k, seqlen_q, head_dim, _ = KERNELS[kernel]
    batch = 1 if layout == "dense" else 2
    query = normal((batch, seqlen_q, heads, head_dim), "float16", seed=0)
    key, where = keys_of(layout, heads_k, head_dim, fill, 1)
    value, _ = keys_of(layout, heads_k, head_dim, fill, 3)
    options: dict[str, Any] = {}
    more: dict[str, Any] = {}
    if "qv" in kernel:
        more["qv"] = normal(query.shape, "float16", seed=5)
    if option == "window":
        options["window_size"] = (150, 0)
    if option == "splits":
        options["num_splits"] = 3
    if option == "mask":
        columns = KEYS[0] if layout == "dense" else SPACE
        mask = normal((batch, heads, seqlen_q, columns), "float16", seed=6)
        mask[..., 3::7] = -np.inf
        more["attn_mask"] = mask
    if layout == "packed":
        more |= {"cu_seqlens_q": np.array([0, seqlen_q, 2 * seqlen_q])}
        query = query.reshape(-1, heads, head_dim)
        if "qv" in more:
            more["qv"] = more["qv"].reshape(query.shape)
        options |= {"max_seqlen_q": seqlen_q, "max_seqlen_k": SPACE}
    return emulated.call(query, key, value, options, **where, **more)


@pytest.mark.parametrize(
    ("kernel", "layout", "option", "bad"),
    crossed(list(KERNELS), LAYOUTS, OPTIONS, [np.nan, np.inf]),
)
def test_what_lies_behind_rows_does_not_count(
    kernel: str, layout: str, option: str, bad: float
) -> None:
    clean = computed(kernel, layout, option, 0.0)
    names = [launch["kernel"] for launch in emulated.last_plan["launches"]]
    assert any(name.startswith(KERNELS[kernel][4]) for name in names), names
    for found, expected in zip(computed(kernel, layout, option, bad), clean, strict=True):
        assert np.isfinite(found).all()
        assert_same_bits(found, expected)
