"""New keys and values into caches in one piece and in pages, rotated, then attention over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import reference
from tests.cases import normal
from tests.checks import BASE, LSE, Tolerance, assert_close, assert_same_bits
from tests.metal import emulated
from tests.metal.emulated import MACHINES
from tests.sequences import paged, rotary_tables, rotated
from tests.tiers import crossed

Array = np.ndarray[Any, np.dtype[Any]]
pytestmark = pytest.mark.usefixtures("own_settings")

BATCH, ROWS, HEADS, HEADS_K = 3, 90, 4, 2
INTERLEAVED = pytest.mark.parametrize("interleaved", [True, False], ids=["pairs", "halves"])


def bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(np.uint8)


class Cache:
    """Caches in which nothing but the rows in use holds numbers, and rows that are to be added."""

    def __init__(
        self, used: list[int], new: int, dtype: str = "float16", head_dim: int = 64,
        head_dim_v: int = 0, batch: int = 0,
    ) -> None:  # fmt: skip
        self.used, self.new = np.array(used), new
        self.dims = (head_dim, head_dim_v or head_dim)
        shapes = [(batch or len(used), ROWS, HEADS_K, d) for d in self.dims]
        self.caches = [normal(shape, dtype, seed=i) for i, shape in enumerate(shapes, 1)]
        self.index = np.arange(len(used))
        for cache in self.caches:
            cache[len(used) :] = np.nan
            for b, n in enumerate(used):
                cache[b, n:] = np.nan
        self.rows = [
            normal((len(used), new, HEADS_K, d), dtype, seed=i) for i, d in enumerate(self.dims, 3)
        ]

    def move(self, index: list[int]) -> None:
        """Sequence b to index `index[b]` of the batch."""
        self.index = np.array(index)
        order = [*index, *(set(range(len(self.caches[0]))) - set(index))]
        for cache in self.caches:
            cache[order] = cache.copy()

    def after(self, **rotary: Any) -> list[Array]:
        """What the caches must hold afterwards, by bits where nothing is rotated."""
        key, value = (cache.copy() for cache in self.caches)
        new_key, new_value = self.rows
        if rotary:
            positions = self.used[:, None] + np.arange(self.new)
            new_key = rotated(new_key, rotary["cos"], rotary["sin"], positions,
                              interleaved=rotary["interleaved"])  # fmt: skip
        for b, (i, n) in enumerate(zip(self.index, self.used, strict=True)):
            key[i, n : n + self.new], value[i, n : n + self.new] = new_key[b], new_value[b]
        return [key, value]


def check_attention(
    found: tuple[Array, Array], query: Array, after: list[Array], begin: Any, end: Any,
    index: Any, tolerance: Tolerance = LSE, **options: Any,
) -> None:  # fmt: skip
    out, lse = found
    for b in range(len(query)):
        key, value = (cache[None, index[b], begin[b] : end[b]] for cache in after)
        exact, exact_lse = reference.attention(query[b, None], key, value, **options)
        assert_close(out[b, None].astype(np.float64), exact, BASE[query.dtype.name])
        assert_close(lse[b, None].astype(np.float64), exact_lse, tolerance, "lse")


def kernels() -> list[str]:
    return [launch["kernel"].split("_")[0] for launch in emulated.last_plan["launches"]]


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", pytest.param("float32", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"),
    [(64, 64), (33, 40), pytest.param(300, 7, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_rows_are_copied_bit_for_bit(
    seqlen_q: int, head_dim: int, head_dim_v: int, dtype: str
) -> None:
    """And nothing else is written."""
    cache = Cache([0, 41, 77], 13, dtype, head_dim, head_dim_v)
    query = normal((BATCH, seqlen_q, HEADS, head_dim), dtype, seed=0)
    after, (new_key, new_value) = cache.after(), cache.rows
    found = emulated.call(
        query, *cache.caches, {"causal": True}, new_key=new_key, new_value=new_value,
        seqused_k=cache.used,
    )  # fmt: skip
    for mine, expected in zip(cache.caches, after, strict=True):
        assert_same_bits(bits(mine), bits(expected), "cache")
    check_attention(found, query, after, [0] * 3, cache.used + 13, range(3), causal=True)
    assert kernels() == ["append", "decode" if seqlen_q == 1 and head_dim < 256 else "forward"]


@pytest.mark.parametrize("seqlen_q", [2, 20])
def test_a_part_of_a_larger_cache(seqlen_q: int) -> None:
    """Any index, keys that count from somewhere on; every stride its own."""
    cache = Cache([10, 41, 77], 5, batch=4)
    cache.move([2, 0, 3])
    left = np.array([4, 0, 77])
    query = normal((BATCH, seqlen_q, HEADS, 64), "float16", seed=0)
    wide = [
        np.full((*x.shape[:3], 2 * x.shape[3]), np.nan, x.dtype)[..., ::2] for x in cache.caches
    ]
    for to, x in zip(wide, cache.caches, strict=True):
        to[...] = x
    new_key, new_value = (x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2) for x in cache.rows)
    found = emulated.call(
        query, *wide, {"causal": True}, new_key=new_key, new_value=new_value,
        seqused_k=cache.used, cache_batch_idx=cache.index, cache_leftpad=left,
    )  # fmt: skip
    after = cache.after()
    for mine, expected in zip(wide, after, strict=True):
        assert_same_bits(bits(mine), bits(expected), "cache")
        assert np.isnan(mine.base[..., 1::2]).all()
    check_attention(found, query, after, left, cache.used + 5, cache.index, causal=True)


def check_rotated(
    seqlen_q: int, interleaved: bool, causal: bool = True, dtype: str = "float16",
    head_dim: int = 64, channels: int = 40,
) -> None:  # fmt: skip
    cache = Cache([0, 41, 60], 20, dtype, head_dim)
    cos, sin = rotary_tables(90, channels)
    query = normal((BATCH, seqlen_q, HEADS, head_dim), dtype, seed=0)
    new_key, new_value = cache.rows
    after = cache.after(cos=cos, sin=sin, interleaved=interleaved)
    options = {"causal": causal, "rotary_interleaved": interleaved}
    found = emulated.call(
        query, *cache.caches, options, new_key=new_key, new_value=new_value,
        seqused_k=cache.used, rotary_cos=cos, rotary_sin=sin,
    )  # fmt: skip
    mine, untouched = cache.caches[0], (..., slice(channels, None))
    assert_same_bits(bits(mine[untouched]), bits(after[0][untouched]), "cache")
    assert_same_bits(bits(cache.caches[1]), bits(after[1]), "cache")
    used = ~np.isnan(after[0].astype(np.float64))
    assert_same_bits(np.isnan(mine.astype(np.float64)), ~used, "rows in use")
    assert_close(
        mine[used].astype(np.float64), after[0][used].astype(np.float64), BASE[dtype], "new keys"
    )
    steps = np.arange(seqlen_q) if causal else np.zeros(seqlen_q, int)
    turned = rotated(query, cos, sin, cache.used[:, None] + steps, interleaved=interleaved)
    tolerance = {"float32": LSE, "float16": Tolerance(1e-3, 0)}.get(dtype, Tolerance(1e-2, 0))
    check_attention(
        found, turned, after, [0] * 3, cache.used + 20, range(3), tolerance, causal=causal
    )


@pytest.mark.parametrize(
    "machine", [None, pytest.param("permuted lane map", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seqlen_q", [1, pytest.param(4, marks=pytest.mark.slow), 20])
@INTERLEAVED
def test_rotated(interleaved: bool, seqlen_q: int, causal: bool, machine: str | None) -> None:
    """New keys turn by their place in the cache; queries from the first one's on, or all by it."""
    if machine:
        emulated.settings.options = MACHINES[machine]
    check_rotated(seqlen_q, interleaved, causal)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "channels", "interleaved"),
    crossed(
        [["float16", 80, 72], ["float32", 33, 32], ["float32", 192, 192], ["bfloat16", 128, 64]],
        [True, False],
    ),
)
def test_rotated_queries_of_decode(
    interleaved: bool, dtype: str, head_dim: int, channels: int
) -> None:
    """Whose channels lie in another order, and not always in registers."""
    emulated.settings.family = 9
    check_rotated(2, interleaved, dtype=dtype, head_dim=head_dim, channels=channels)
    assert kernels() == ["append", "decode"]


@pytest.mark.parametrize("page_size", [1, 7, 64])
@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_pages(seqlen_q: int, page_size: int) -> None:
    """New rows run over the ends of pages. As a cache in one piece, bit for bit."""
    cache = Cache([0, 41, 77], 13)
    pages, table = paged(cache.caches, page_size)
    query = normal((BATCH, seqlen_q, HEADS, 64), "float16", seed=0)
    cos, sin = rotary_tables(110, 32)
    more = {
        "new_key": cache.rows[0], "new_value": cache.rows[1], "seqused_k": cache.used,
        "rotary_cos": cos, "rotary_sin": sin,
    }  # fmt: skip
    before = [x.copy() for x in pages]
    found = emulated.call(query, *pages, {"causal": True}, block_table=table, **more)
    expected = emulated.call(query, *cache.caches, {"causal": True}, **more)
    for mine, theirs in zip(found, expected, strict=True):
        assert_same_bits(bits(mine), bits(theirs))
    for mine, was, rows in zip(pages, before, cache.caches, strict=True):
        for b, n in enumerate(cache.used):
            for j in range(n, n + 13):
                place = (table[b, j // page_size], j % page_size)
                assert_same_bits(bits(mine[place]), bits(rows[b, j]), "page")
                was[place] = mine[place]
        assert_same_bits(bits(mine), bits(was), "pages")


@pytest.mark.parametrize("seed", [1, 2])
def test_any_schedule(seed: int) -> None:
    emulated.settings.schedule_seed = seed
    check_rotated(4, interleaved=True)
    test_pages(20, 7)


@pytest.mark.parametrize(("seqlen_q", "heads"), [(0, HEADS), (5, 0)])
def test_without_queries(seqlen_q: int, heads: int) -> None:
    """Nothing to attend, yet the rows are added."""
    heads_k = HEADS_K if heads else 0
    cache = Cache([10, 0], 4)
    caches = [x[:, :, :heads_k].copy() if not heads else x for x in cache.caches]
    query = np.zeros((2, seqlen_q, heads, 64), np.float16)
    new_key, new_value = (x[:, :, :heads_k] if not heads else x for x in cache.rows)
    after = cache.after()
    emulated.call(query, *caches, new_key=new_key, new_value=new_value, seqused_k=cache.used)
    if heads:
        for mine, expected in zip(caches, after, strict=True):
            assert_same_bits(bits(mine), bits(expected), "cache")
        assert kernels() == ["append"]
    else:
        assert kernels() == []


def test_no_new_rows() -> None:
    cache = Cache([10, 50], 0)
    query = normal((2, 3, HEADS, 64), "float16", seed=0)
    found = emulated.call(
        query, *cache.caches, new_key=cache.rows[0], new_value=cache.rows[1], seqused_k=cache.used
    )
    check_attention(found, query, cache.caches, [0, 0], cache.used, range(2))
    assert kernels() == ["decode"]


def test_each_row_is_read_and_written_once() -> None:
    cache = Cache([10, 50], 30)
    query = normal((2, 1, HEADS, 64), "float16", seed=0)
    with emulated.counting() as counters:
        emulated.call(
            query, *cache.caches, new_key=cache.rows[0], new_value=cache.rows[1],
            seqused_k=cache.used,
        )  # fmt: skip
    append = counters[0]
    size = cache.rows[0].nbytes
    assert append.buffer_bytes_read[2] == append.buffer_bytes_read[3] == size
    assert append.buffer_bytes_written[0] == append.buffer_bytes_written[1] == size
    assert append.threadgroup_barriers == 0
    assert emulated.last_plan["launches"][0]["grid"] == (8, HEADS_K, 1)
