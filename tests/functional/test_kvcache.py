"""flash_attn_with_kvcache: caches in one piece and in pages, appended to, rotated, padded."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries, reference
from tests.array_libraries import DTYPES, Array, Framework
from tests.attend import Attend
from tests.cases import Case, expected, inputs, normal
from tests.checks import BASE, LSE, Tolerance, assert_close, assert_same_bits
from tests.sequences import paged, rotary_tables, rotated, unpaged
from tests.signatures import CACHE, by_keyword, by_position

PAGE_SIZES = [1, 3, 16, 64, 256]
BATCH, ROWS, HEADS, HEADS_K, HEAD_DIM = 3, 150, 6, 2, 24
WRITABLE = ["numpy", "torch"]  # frameworks whose arrays can be


def caches(dtype: str = "float32", head_dim_v: int = HEAD_DIM) -> tuple[Array, Array]:
    return (
        normal((BATCH, ROWS, HEADS_K, HEAD_DIM), dtype, seed=2),
        normal((BATCH, ROWS, HEADS_K, head_dim_v), dtype, seed=3),
    )


def queries(seqlen_q: int, dtype: str = "float32", batch: int = BATCH) -> Array:
    return normal((batch, seqlen_q, HEADS, HEAD_DIM), dtype, seed=1)


def check_each(
    found: tuple[Array, Array],
    query: Array,
    keys: list[Array],
    values: list[Array],
    lse_tolerance: Tolerance = LSE,
    **options: Any,
) -> None:
    """Compare with the reference of each sequence; keys and values (rows, heads, channels)."""
    out, lse = found
    for b, (key, value) in enumerate(zip(keys, values, strict=True)):
        exact, exact_lse = reference.attention(query[b, None], key[None], value[None], **options)
        assert_close(out[b, None].astype(np.float64), exact, BASE[query.dtype.name], f"out of {b}")
        assert_close(lse[b, None].astype(np.float64), exact_lse, lse_tolerance, f"lse of {b}")


@pytest.fixture
def numpy() -> Framework:
    return array_libraries.load("numpy")


def test_a17_decode(framework: Framework) -> None:
    case = Case((1, 8, 1, 4096, 128), "float16", options=(("causal", True),))
    query, key, value = inputs(case)
    out, lse = expected(case)
    for more in ({}, {"cache_seqlens": 4096}):
        found, found_lse = Attend(framework).kvcache(query, key, value, causal=True, **more)
        assert_close(found.astype(np.float64), out, BASE["float16"])
        assert_close(found_lse.astype(np.float64), lse, LSE, "lse")


def test_a17_decode_appended_and_paged(numpy: Framework) -> None:
    case = Case((1, 8, 1, 4096, 128), "float16", options=(("causal", True),))
    query, key, value = inputs(case)
    start = [x.copy() for x in (key, value)]
    for x in start:
        x[:, -1:] = np.nan
    (k_pages, v_pages), table = paged(start, 100)
    found = Attend(numpy).kvcache(query, k_pages, v_pages, key[:, -1:], value[:, -1:],
        causal=True, cache_seqlens=4095, block_table=table,
    )  # fmt: skip
    for actual, exact, tolerance in zip(found, expected(case), (BASE["float16"], LSE), strict=True):
        assert_close(actual.astype(np.float64), exact, tolerance)


LENGTHS: dict[str, Any] = {
    "all": None,
    "int": 77,
    "numpy integer": np.int32(77),
    "int32": np.array([150, 0, 41], np.int32),
    "int64": np.array([1, 64, 149], np.int64),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("seqlen_q", [1, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cache_seqlens(dtype: str, seqlen_q: int, lengths: Any, framework: Framework) -> None:
    """Rows past the lengths are NaN, and never read."""
    key, value = caches(dtype, head_dim_v=40)
    used = np.broadcast_to(ROWS if lengths is None else lengths, BATCH)
    for b in range(BATCH):
        key[b, used[b] :] = value[b, used[b] :] = np.nan
    query = queries(seqlen_q, dtype)
    found = Attend(framework).kvcache(query, key, value, cache_seqlens=lengths, causal=True)
    check_each(
        found,
        query,
        [key[b, : used[b]] for b in range(BATCH)],
        [value[b, : used[b]] for b in range(BATCH)],
        causal=True,
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "causal": {"causal": True},
    "window": {"window_size": (20, 3)},
    "softcap": {"softcap": 5.0, "softmax_scale": 0.4},
    "alibi": {"alibi_slopes": np.abs(normal((HEADS,), seed=7)), "causal": True},
    "chunk": {"attention_chunk": 32, "causal": True},
    "sink": {"learnable_sink": normal((HEADS,), seed=8), "causal": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("seqlen_q", [1, 5, 33])
def test_options(seqlen_q: int, options: dict[str, Any], framework: Framework) -> None:
    key, value = caches()
    used = np.array([150, 20, 97], np.int32)
    query = queries(seqlen_q)
    found = Attend(framework).kvcache(query, key, value, cache_seqlens=used, **options)
    check_each(
        found,
        query,
        [key[b, : used[b]] for b in range(BATCH)],
        [value[b, : used[b]] for b in range(BATCH)],
        **options,
    )


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("seqlen_q", [1, 4, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_change_no_bit(dtype: str, seqlen_q: int, page_size: int, numpy: Framework) -> None:
    key, value = caches(dtype, head_dim_v=40)
    used = np.array([150, 0, 41], np.int32)
    query = queries(seqlen_q, dtype)
    (k_pages, v_pages), table = paged([key, value], page_size, seed=page_size)
    for options in OPTIONS.values():
        plain = Attend(numpy).kvcache(query, key, value, cache_seqlens=used, **options)
        found = Attend(numpy).kvcache(
            query, k_pages, v_pages, cache_seqlens=used, block_table=table, **options
        )
        for name, a, b in zip(("out", "lse"), found, plain, strict=True):
            assert_same_bits(numpy.bits(a), numpy.bits(b), name)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("integers", [np.int32, np.int64])
def test_pages_in_every_framework(page_size: int, integers: Any, framework: Framework) -> None:
    if framework.name == "jax" and integers is np.int64:
        pytest.skip("jax has no int64 unless told so")
    key, value = caches()
    query = queries(2)
    pages, table = paged([key, value], page_size)
    # What lies past a sequence's last page may be anything.
    wide = np.concatenate([table, np.full((BATCH, 2), -7)], axis=1).astype(integers)
    plain = Attend(framework).kvcache(query, key, value, cache_seqlens=ROWS - 1, causal=True)
    found = Attend(framework).kvcache(
        query, *pages, cache_seqlens=ROWS - 1, causal=True, block_table=wide
    )
    for name, a, b in zip(("out", "lse"), found, plain, strict=True):
        assert_same_bits(a.view(np.uint32), b.view(np.uint32), name)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_varlen_reads_pages_too(page_size: int, numpy: Framework) -> None:
    key, value = caches()
    used = np.array([150, 0, 41], np.int32)
    query = queries(9)
    plain, _ = Attend(numpy).kvcache(query, key, value, cache_seqlens=used, causal=True)
    pages, table = paged([key, value], page_size)
    cu_seqlens_q = np.arange(BATCH + 1, dtype=np.int32) * 9
    cu_seqlens_k = np.concatenate([[0], np.cumsum(used)])
    packed = query.reshape(-1, HEADS, HEAD_DIM)
    for lengths in ({"cu_seqlens_k": cu_seqlens_k}, {"cu_seqlens_k": None, "seqused_k": used}):
        found = umfa.flash_attn_varlen_func(
            packed, *pages, cu_seqlens_q, max_seqlen_q=9, max_seqlen_k=150, causal=True,
            block_table=table, backend="cpu", **lengths,
        )  # fmt: skip
        assert_same_bits(numpy.bits(found), numpy.bits(plain.reshape(found.shape)))


def appended(cache: Array, new: Array, used: Array) -> Array:
    after = cache.copy()
    for b in range(len(used)):
        after[b, used[b] : used[b] + new.shape[1]] = new[b]
    return after


@pytest.mark.parametrize("page_size", [None, *PAGE_SIZES], ids=str)
@pytest.mark.parametrize(("seqlen_q", "new_rows"), [(1, 1), (4, 4), (2, 5), (40, 40), (5, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("framework", WRITABLE, indirect=True)
def test_append(
    dtype: str, seqlen_q: int, new_rows: int, page_size: int | None, framework: Framework
) -> None:
    """Exactly the new rows change, and the result is that of a cache that held them before."""
    key, value = caches(dtype, head_dim_v=40)
    used = np.array([0, 110, 64], np.int32)
    k = normal((BATCH, new_rows, HEADS_K, HEAD_DIM), dtype, seed=4)
    v = normal((BATCH, new_rows, HEADS_K, 40), dtype, seed=5)
    after = [appended(key, k, used), appended(value, v, used)]
    query = queries(seqlen_q, dtype)
    plain = Attend(framework).kvcache(query, *after, cache_seqlens=used + new_rows, causal=True)
    if page_size is None:
        found = Attend(framework).kvcache(query, key, value, k, v, cache_seqlens=used, causal=True)
        written = [key, value]
    else:
        pages, table = paged([key, value], page_size)
        untouched = [~np.isin(np.arange(len(x)), table) for x in pages]
        found = Attend(framework).kvcache(
            query, *pages, k, v, cache_seqlens=used, causal=True, block_table=table
        )
        written = [unpaged(x, table, ROWS) for x in pages]
        for x, free in zip(pages, untouched, strict=True):
            assert np.isnan(x[free].astype(np.float32)).all()
    for name, a, b in zip(("k_cache", "v_cache"), written, after, strict=True):
        assert_same_bits(framework.bits(framework.tensor(a)), framework.bits(framework.tensor(b)))
        assert a.shape == b.shape, name
    for name, a, b in zip(("out", "lse"), found, plain, strict=True):
        integers = f"u{a.dtype.itemsize}"
        assert_same_bits(a.view(integers), b.view(integers), name)


TOKENS = 200


@pytest.mark.parametrize("chunks", ["one by one", "chunks"])
@pytest.mark.parametrize("page_size", [None, 1, 16, 37], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loop_over_tokens_is_one_causal_call(
    dtype: str, page_size: int | None, chunks: str, numpy: Framework
) -> None:
    query = normal((2, TOKENS, HEADS, HEAD_DIM), dtype, seed=1)
    k = normal((2, TOKENS, HEADS_K, HEAD_DIM), dtype, seed=2)
    v = normal((2, TOKENS, HEADS_K, HEAD_DIM), dtype, seed=3)
    exact, exact_lse = reference.attention(query, k, v, causal=True)
    start = [np.full((2, TOKENS + 9, HEADS_K, HEAD_DIM), np.nan, DTYPES[dtype]) for _ in range(2)]
    more = {}
    if page_size is not None:
        start, more["block_table"] = paged(start, page_size)
    steps = [1] * TOKENS if chunks == "one by one" else [17, 1, 64, 3, 100, 15]
    at, out, lse = 0, [], []
    for step in steps:
        rows = slice(at, at + step)
        found = Attend(numpy).kvcache(query[:, rows], *start, k[:, rows], v[:, rows],
            cache_seqlens=at, causal=True, **more,
        )  # fmt: skip
        out.append(found[0])
        lse.append(found[1])
        at += step
    assert_close(np.concatenate(out, axis=1).astype(np.float64), exact, BASE[dtype])
    assert_close(np.concatenate(lse, axis=2).astype(np.float64), exact_lse, LSE, "lse")


# umfa rotates in float32, and the rounding to the dtype may then fall on the other side.
ROTATED_LSE = {
    "float32": LSE,
    "float16": Tolerance(5e-4, 0.0),
    "bfloat16": Tolerance(4e-3, 0.0),
}

ADVANCING: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window_size": (30, 30)},
    "right window": {"window_size": (-1, 4)},
    "chunk": {"attention_chunk": 50},
}


@pytest.mark.parametrize("interleaved", [True, False], ids=["pairs", "halves"])
@pytest.mark.parametrize("rotary_dim", [2, 16, HEAD_DIM])
@pytest.mark.parametrize("options", [{}, *ADVANCING.values()], ids=["full", *ADVANCING])
@pytest.mark.parametrize(("seqlen_q", "new_rows"), [(1, 1), (3, 3), (2, 6), (33, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(
    dtype: str,
    seqlen_q: int,
    new_rows: int,
    options: dict[str, Any],
    rotary_dim: int,
    interleaved: bool,
    numpy: Framework,
) -> None:
    key, value = caches(dtype)
    used = np.array([0, 110, 64], np.int32)
    k = normal((BATCH, new_rows, HEADS_K, HEAD_DIM), dtype, seed=4)
    v = normal((BATCH, new_rows, HEADS_K, HEAD_DIM), dtype, seed=5)
    query = queries(seqlen_q, dtype)
    # No row more than the largest position: 110 and what comes after it.
    reach = max(new_rows, seqlen_q if options else 1)
    cos, sin = rotary_tables(110 + reach, rotary_dim, DTYPES[dtype])
    positions = used[:, None] + np.arange(seqlen_q) * bool(options)
    turned = rotated(query, cos, sin, positions, interleaved=interleaved)
    new = rotated(k, cos, sin, used[:, None] + np.arange(new_rows), interleaved=interleaved)
    expected_key, expected_value = appended(key, new, used), appended(value, v, used)
    found = Attend(numpy).kvcache(query, key, value, k, v, cos, sin,
        cache_seqlens=used, rotary_interleaved=interleaved, **options,
    )  # fmt: skip
    assert_close(
        key.astype(np.float64),
        expected_key.astype(np.float64),
        BASE[dtype],
        "k_cache",
    )
    assert_same_bits(numpy.bits(value), numpy.bits(expected_value), "v_cache")
    # From the cache as it was written: what is tested here is the queries' rotation.
    check_each(
        found,
        turned,
        [key[b, : used[b] + new_rows] for b in range(BATCH)],
        [value[b, : used[b] + new_rows] for b in range(BATCH)],
        ROTATED_LSE[dtype],
        **options,
    )


@pytest.mark.parametrize("tables", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("page_size", [None, 3, 64], ids=str)
@pytest.mark.parametrize("framework", WRITABLE, indirect=True)
def test_rotary_tables_of_other_dtypes_and_pages(
    page_size: int | None, tables: str, framework: Framework
) -> None:
    """In pages the same bits; the tables' dtype need not be the tensors'."""
    start = caches()
    used = np.array([3, 110, 64], np.int32)
    k, v = (normal((BATCH, 2, HEADS_K, HEAD_DIM), seed=i) for i in (4, 5))
    cos, sin = rotary_tables(140, 16, DTYPES[tables])
    query = queries(2)
    plain_caches = [x.copy() for x in start]
    plain = Attend(framework).kvcache(
        query, *plain_caches, k, v, cos, sin, cache_seqlens=used, causal=True
    )
    positions = used[:, None] + np.arange(2)
    turned = rotated(query, cos, sin, positions, interleaved=True)
    check_each(
        plain,
        turned,
        [plain_caches[0][b, : used[b] + 2] for b in range(BATCH)],
        [plain_caches[1][b, : used[b] + 2] for b in range(BATCH)],
        causal=True,
    )
    if page_size is None:
        return
    pages, table = paged(start, page_size)
    found = Attend(framework).kvcache(query, *pages, k, v, cos, sin,
        cache_seqlens=used, causal=True, block_table=table,
    )  # fmt: skip
    for name, a, b in zip(("out", "lse"), found, plain, strict=True):
        assert_same_bits(a.view(np.uint32), b.view(np.uint32), name)
    for x, y in zip(pages, plain_caches, strict=True):
        assert_same_bits(unpaged(x, table, ROWS).view(np.uint32), y.view(np.uint32))


def test_rotary_loop_is_one_rotated_causal_call(numpy: Framework) -> None:
    query = normal((1, 60, HEADS, HEAD_DIM), seed=1)
    k, v = (normal((1, 60, HEADS_K, HEAD_DIM), seed=i) for i in (2, 3))
    cos, sin = rotary_tables(60, HEAD_DIM)
    positions = np.arange(60)[None]
    exact, _ = reference.attention(
        rotated(query, cos, sin, positions, interleaved=False),
        rotated(k, cos, sin, positions, interleaved=False),
        v,
        causal=True,
    )
    start = [np.full_like(x, np.nan) for x in (k, v)]
    out = [
        Attend(numpy).kvcache(query[:, i, None], *start, k[:, i, None], v[:, i, None], cos, sin,
            cache_seqlens=i, causal=True, rotary_interleaved=False,
        )[0]
        for i in range(60)
    ]  # fmt: skip
    assert_close(np.concatenate(out, axis=1).astype(np.float64), exact, BASE["float32"])


@pytest.mark.parametrize("append", [False, True], ids=["read", "append"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("framework", WRITABLE, indirect=True)
def test_leftpad_and_batch_index(dtype: str, append: bool, framework: Framework) -> None:
    key, value = (normal((5, ROWS, HEADS_K, HEAD_DIM), dtype, seed=i) for i in (2, 3))
    index = np.array([4, 0, 3], np.int64)
    used = np.array([30, 100, 7], np.int32)
    leftpad = np.array([0, 55, 7], np.int32)
    for b, at in enumerate(index):
        key[at, : leftpad[b]] = value[at, : leftpad[b]] = np.nan
        key[at, used[b] :] = value[at, used[b] :] = np.nan
    query = queries(2, dtype)
    new = [normal((BATCH, 2, HEADS_K, HEAD_DIM), dtype, seed=i) for i in (4, 5)] if append else []
    before = key.copy()
    found = Attend(framework).kvcache(
        query, key, value, *new, cache_seqlens=used, cache_batch_idx=index,
        cache_leftpad=leftpad, causal=True,
    )  # fmt: skip
    ends = used + 2 * append
    check_each(
        found,
        query,
        [key[at, leftpad[b] : ends[b]] for b, at in enumerate(index)],
        [value[at, leftpad[b] : ends[b]] for b, at in enumerate(index)],
        causal=True,
    )
    for b, at in enumerate(index):
        if append:
            before[at, used[b] : ends[b]] = new[0][b]
    assert key.tobytes() == before.tobytes()


def test_rotary_counts_the_padding(numpy: Framework) -> None:
    """Positions are those of the cache: cache_leftpad moves none of them."""
    key, value = caches()
    used, leftpad = np.array([30, 100, 9]), np.array([5, 55, 9])
    k, v = (normal((BATCH, 2, HEADS_K, HEAD_DIM), seed=i) for i in (4, 5))
    cos, sin = rotary_tables(102, HEAD_DIM)
    query = queries(2)
    positions = used[:, None] + np.arange(2)
    new = rotated(k, cos, sin, positions, interleaved=True)
    expected_key = appended(key, new, used)
    found = Attend(numpy).kvcache(
        query, key, value, k, v, cos, sin, cache_seqlens=used, cache_leftpad=leftpad,
        causal=True,
    )  # fmt: skip
    assert_close(key, expected_key, BASE["float32"], "k_cache")
    check_each(
        found,
        rotated(query, cos, sin, positions, interleaved=True),
        [key[b, leftpad[b] : used[b] + 2] for b in range(BATCH)],
        [value[b, leftpad[b] : used[b] + 2] for b in range(BATCH)],
        causal=True,
    )


def test_key_and_value_cache_in_one_tensor(numpy: Framework) -> None:
    both = normal((BATCH, ROWS, 2, HEADS_K, HEAD_DIM), seed=2)
    apart = [np.ascontiguousarray(both[:, :, i]) for i in range(2)]
    k, v = (normal((BATCH, 2, HEADS_K, HEAD_DIM), seed=i) for i in (4, 5))
    query = queries(2)
    found = umfa.flash_attn_with_kvcache(
        query, both[:, :, 0], both[:, :, 1], k, v, cache_seqlens=9, causal=True
    )
    plain = Attend(numpy).kvcache(query, *apart, k, v, cache_seqlens=9, causal=True)
    assert_same_bits(numpy.bits(found), numpy.bits(plain[0]))
    for i in range(2):
        assert_same_bits(numpy.bits(both[:, :, i]), numpy.bits(apart[i]))


class OtherLibrary:
    """An array of a library that umfa does not know by name."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.shape = array.shape

    def __dlpack__(self, **how: Any) -> Any:
        return self.array.__dlpack__(**how)

    def __dlpack_device__(self) -> tuple[int, int]:
        device, index = self.array.__dlpack_device__()
        return int(device), int(index)


def test_append_to_caches_of_any_dlpack_library(numpy: Framework) -> None:
    key, value = caches()
    k, v = (normal((BATCH, 2, HEADS_K, HEAD_DIM), seed=i) for i in (4, 5))
    lengths = np.array([3, 4, 5])
    other = [key.copy(), value.copy()]
    Attend(numpy).kvcache(queries(1), key, value, k, v, cache_seqlens=lengths)
    umfa.flash_attn_with_kvcache(
        *map(OtherLibrary, (queries(1), *other, k, v)), cache_seqlens=OtherLibrary(lengths)
    )
    assert_same_bits(numpy.bits(other[0]), numpy.bits(key))
    assert_same_bits(numpy.bits(other[1]), numpy.bits(value))


@pytest.mark.parametrize("splits", [1, 2, 7, 1000])
def test_num_splits(splits: int, framework: Framework) -> None:
    rows = 2000
    key = normal((2, rows, HEADS_K, HEAD_DIM), seed=2)
    value = normal((2, rows, HEADS_K, HEAD_DIM), seed=3)
    found = Attend(framework).kvcache(queries(1, batch=2), key, value, num_splits=splits)
    check_each(found, queries(1, batch=2), list(key), list(value))


@pytest.mark.parametrize(
    ("splits", "error", "text"),
    [
        (-1, ValueError, "num_splits is out of range; got -1"),
        (2**31, ValueError, f"num_splits is out of range; got {2**31}"),
        (2**70, ValueError, "num_splits does not fit 64 bits"),
        (1.5, TypeError, "num_splits is not an integer; got 1.5"),
        (True, TypeError, "num_splits is not an integer; got True"),
        (None, TypeError, "num_splits is not an integer; got None"),
    ],
)
def test_bad_num_splits(splits: Any, error: type[Exception], text: str) -> None:
    key, value = caches()
    with pytest.raises(error, match=re.escape(text)):
        umfa.flash_attn_with_kvcache(queries(1), key, value, num_splits=splits)


def test_no_queries_still_append(numpy: Framework) -> None:
    key, value = caches()
    k, v = (normal((BATCH, 2, HEADS_K, HEAD_DIM), seed=i) for i in (4, 5))
    wanted = appended(key, k, np.full(BATCH, 3))
    Attend(numpy).kvcache(queries(0), key, value, k, v, cache_seqlens=3)
    assert_same_bits(numpy.bits(key), numpy.bits(wanted))


def test_only_out_without_return_softmax_lse(framework: Framework) -> None:
    tensors = [framework.tensor(x) for x in (queries(1), *caches())]
    found = umfa.flash_attn_with_kvcache(*tensors, cache_seqlens=5)
    assert isinstance(found, framework.array_type)


def test_signature_is_that_of_flash_attn() -> None:
    names = ["q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens"]
    names += ["cache_batch_idx", "cache_leftpad", "block_table", "softmax_scale", "causal"]
    names += ["window_size", "softcap", "rotary_interleaved", "alibi_slopes", "num_splits"]
    names += ["return_softmax_lse"]
    assert list(by_position(umfa.flash_attn_with_kvcache)) == names
    assert by_keyword(umfa.flash_attn_with_kvcache) == CACHE
