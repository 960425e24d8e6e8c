"""Dropout: what it drops, and that nothing else changes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import umfa
from tests import philox, reference
from tests.array_libraries import DTYPES, Array
from tests.attend import BHSD, call_core
from tests.cases import normal
from tests.checks import BASE, LSE, Tolerance, assert_close, assert_same_bits
from tests.sequences import offsets, paged, rotary_tables, rotated

pytestmark = pytest.mark.cpu_only

SEED, OFFSET = 0x9E3779B97F4A7C15, 0x1234567890
CALL: dict[str, Any] = {"dropout_seed": SEED, "dropout_offset": OFFSET}
NAMES = list(DTYPES)


def tolerance(dtype: str, p: float) -> Tolerance:
    """What is kept grows by 1 / (1 - p), its error with it."""
    return Tolerance(BASE[dtype].atol / (1 - p), BASE[dtype].rtol)


# ---- the generator -------------------------------------------------------------------------------

# Random123's known answers for philox4x32-10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter: Any, key: Any, words: Any) -> None:
    assert tuple(map(int, philox.philox(counter, key))) == words


def test_the_reference_drops_what_philox_says() -> None:
    query, key, value = normal((2, 5, 3, 4), seed=1), normal((2, 9, 3, 4), seed=2), np.eye(9)
    value = np.broadcast_to(value[None, :, None], (2, 9, 3, 9))
    plain, plain_lse = reference.attention(query, key, value)
    found, lse = reference.attention(query, key, value, dropout_p=0.25, **CALL, first_index=7)
    assert (lse == plain_lse).all()
    key_of_call = philox.philox((OFFSET % 2**32, OFFSET >> 32, 0, 0), (SEED % 2**32, SEED >> 32))[
        :2
    ]
    # Keys 0, 1, 8, 9 share an evaluation, then 2, 3, 10, 11.
    places = {0: (0, 0), 1: (0, 1), 8: (0, 2), 2: (1, 0), 3: (1, 1), 4: (2, 0), 5: (2, 1)}
    places |= {6: (3, 0), 7: (3, 1)}
    for b, i, h, j in np.ndindex(2, 5, 3, 9):
        four, place = places[j]
        words = philox.philox((four, i, h, 7 + b), (int(key_of_call[0]), int(key_of_call[1])))
        kept = int(words[place]) >= 2**30
        assert found[b, i, h, j] == (plain[b, i, h, j] / 0.75 if kept else 0)


# ---- which probabilities -------------------------------------------------------------------------


def kept_by(
    shape: tuple[int, int, int, int], dtype: str, p: float, **options: Any
) -> tuple[Array, Array]:
    """What each probability became, (batch, queries, heads, keys), and the expected mask.

    Equal scores and the identity for values show every probability by itself.
    """
    batch, seqlen_q, heads, seqlen_k = shape
    zeros = np.zeros((batch, max(seqlen_q, seqlen_k), heads, 8), DTYPES[dtype])
    eye = np.eye(seqlen_k, dtype=np.float32)[None, :, None].astype(DTYPES[dtype])
    value = np.broadcast_to(eye, (batch, seqlen_k, heads, seqlen_k))
    out, _ = call_core(zeros[:, :seqlen_q], zeros[:, :seqlen_k], value, dropout_p=p, **options)
    expected = np.array(
        [
            [
                ~philox.dropped(
                    p, options["dropout_seed"], options["dropout_offset"],
                    batch=b, head=h, rows=np.arange(seqlen_q), seqlen_k=seqlen_k,
                )
                for h in range(heads)
            ]
            for b in range(batch)
        ]
    )  # fmt: skip
    return out.astype(np.float64), expected.transpose(0, 2, 1, 3)


SHAPES = [(2, 70, 3, 101), (1, 33, 2, 300), (2, 1, 5, 130), (1, 2, 3, 509), (1, 17, 1, 1)]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_mask_bit_for_bit(shape: tuple[int, int, int, int], dtype: str, isa: str) -> None:
    found, expected = kept_by(shape, dtype, 0.3, **CALL)
    np.testing.assert_array_equal(found != 0, expected)
    share = 1 / (shape[3] * 0.7)
    assert_close(found, np.where(expected, share, 0.0), Tolerance(1e-12, BASE[dtype].rtol))
    assert not np.signbit(found).any()


@pytest.mark.parametrize("p", [0.02, 0.5, 0.97])
def test_the_share_that_is_kept(p: float) -> None:
    found, expected = kept_by((2, 200, 4, 256), "float32", p, **CALL)
    np.testing.assert_array_equal(found != 0, expected)
    count = found.size
    assert abs((found != 0).mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / count)
    # Nor does any place in a row, or any row, stand out.
    for axes in ((0, 1, 2), (0, 2, 3)):
        part = (found != 0).mean(axis=axes)
        assert abs(part - (1 - p)).max() < 5 * math.sqrt(p * (1 - p) * part.size / count)


@pytest.mark.parametrize("seqlen_q", [2, 40])
def test_seed_and_offset_count_in_full(seqlen_q: int) -> None:
    shape, masks = (1, seqlen_q, 2, 64), []
    for seed, offset in ((0, 0), (1, 0), (0, 1), (2**32, 0), (0, 2**32), (2**64 - 1, 2**64 - 1)):
        found, expected = kept_by(shape, "float32", 0.5, dropout_seed=seed, dropout_offset=offset)
        np.testing.assert_array_equal(found != 0, expected)
        masks.append(found != 0)
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert 0.25 < (a != b).mean() < 0.75


# ---- with everything else ------------------------------------------------------------------------

# (batch, heads, seqlen_q, seqlen_k, head_dim), heads_k, head_dim_v, p, options
CASES: list[tuple[tuple[int, int, int, int, int], int, int, float, dict[str, Any]]] = [
    ((2, 4, 70, 131, 40), 2, 24, 0.1, {}),
    ((1, 2, 130, 130, 64), 2, 64, 0.5, {"causal": True}),
    ((1, 2, 40, 250, 32), 1, 32, 0.2, {"window_size": (30, 5)}),
    ((2, 2, 50, 99, 16), 2, 7, 0.9, {"attention_chunk": 23, "softcap": 5.0}),
    ((1, 3, 20, 4, 16), 1, 16, 0.4, {"causal": True}),  # rows that see no key
    ((2, 8, 1, 300, 64), 2, 64, 0.1, {}),
    ((1, 4, 2, 1500, 32), 2, 40, 0.5, {"causal": True}),  # several parts
    ((1, 4, 1, 1500, 32), 2, 40, 0.5, {"num_splits": 3, "window_size": (700, 0)}),
    ((2, 2, 2, 61, 5), 1, 3, 0.3, {"window_size": (9, -1), "softcap": 3.0}),
]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("index", range(len(CASES)))
def test_equals_the_reference(index: int, dtype: str, isa: str) -> None:
    (batch, heads, seqlen_q, seqlen_k, head_dim), heads_k, head_dim_v, p, options = CASES[index]
    query = normal((batch, seqlen_q, heads, head_dim), dtype, seed=1)
    key = normal((batch, seqlen_k, heads_k, head_dim), dtype, seed=2)
    value = normal((batch, seqlen_k, heads_k, head_dim_v), dtype, seed=3)
    more: dict[str, Any] = {}
    if index % 2:
        more["alibi_slopes"] = np.linspace(0.02, 0.3, heads, dtype=np.float32)
        more["learnable_sink"] = np.linspace(-1, 2, heads, dtype=np.float32)
    found, lse = call_core(query, key, value, dropout_p=p, **CALL, **options, **more)
    _, plain_lse = call_core(query, key, value, **options, **more)
    options = {name: x for name, x in options.items() if name != "num_splits"}
    expected, expected_lse = reference.attention(
        query, key, value, dropout_p=p, **CALL, **options, **more
    )
    assert_close(found.astype(np.float64), expected, tolerance(dtype, p))
    assert_close(lse.astype(np.float64), expected_lse, Tolerance(LSE.atol, 1e-6), "lse")
    assert_same_bits(lse.view("u4"), plain_lse.view("u4"), "lse")


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("seqlen_q", [2, 65])
def test_with_a_mask(seqlen_q: int, kind: str, isa: str) -> None:
    query, key, value = (normal((2, n, 3, 16), seed=i) for i, n in enumerate((seqlen_q, 110, 110)))
    mask = np.random.default_rng(4).random((2, 3, seqlen_q, 110)) < 0.7
    mask[0, 0, 0] = False
    if kind == "float":
        mask = np.where(mask, normal(mask.shape, seed=5), -np.inf).astype(np.float32)
    found, _ = call_core(query, key, value, attn_mask=mask, dropout_p=0.4, **CALL)
    expected, _ = reference.attention(query, key, value, mask=mask, dropout_p=0.4, **CALL)
    assert_close(found.astype(np.float64), expected, tolerance("float32", 0.4))


@pytest.mark.parametrize("page_size", [0, 7, 64])
def test_queries_and_keys_count_inside_their_sequence(page_size: int, isa: str) -> None:
    lengths_q, lengths_k = [40, 1, 0, 19, 3], [90, 33, 12, 0, 600]
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    query = normal((cu_q[-1], 4, 24), seed=1)
    key, value = (normal((cu_k[-1], 2, 24), seed=i) for i in (2, 3))
    tensors, tables = [query, key, value], {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    if page_size:
        wide = [np.full((5, max(lengths_k), 2, 24), np.nan, np.float32) for _ in range(2)]
        for b, n in enumerate(lengths_k):
            for to, x in zip(wide, (key, value), strict=True):
                to[b, :n] = x[cu_k[b] : cu_k[b] + n]
        tensors[1:], tables["block_table"] = paged(wide, page_size)
    found, lse = call_core(*tensors, **tables, causal=True, dropout_p=0.3, **CALL)
    for b in range(5):
        own, own_lse = reference.attention(
            query[None, cu_q[b] : cu_q[b + 1]],
            key[None, cu_k[b] : cu_k[b + 1]],
            value[None, cu_k[b] : cu_k[b + 1]],
            causal=True, dropout_p=0.3, **CALL, first_index=b,
        )  # fmt: skip
        rows = slice(cu_q[b], cu_q[b + 1])
        assert_close(found[rows].astype(np.float64), own[0], tolerance("float32", 0.3), f"{b}")
        assert_close(lse[:, rows].astype(np.float64), own_lse[0], Tolerance(LSE.atol, 1e-6))


def test_with_appended_and_rotated_keys(isa: str) -> None:
    used, new = np.array([50, 0, 131]), 3
    key, value = (normal((3, 140, 2, 16), seed=i) for i in (1, 2))
    new_key, new_value = (normal((3, new, 2, 16), seed=i) for i in (3, 4))
    query = normal((3, 2, 4, 16), seed=5)
    cos, sin = rotary_tables(200, 12)
    found, _ = call_core(
        query, key, value, new_key=new_key, new_value=new_value, rotary_cos=cos, rotary_sin=sin,
        seqused_k=used, causal=True, dropout_p=0.3, **CALL,
    )  # fmt: skip
    turned = rotated(query, cos, sin, used[:, None] + np.arange(2), interleaved=True)
    for b, n in enumerate(used + new):
        expected, _ = reference.attention(
            turned[b : b + 1], key[b : b + 1, :n], value[b : b + 1, :n],
            causal=True, dropout_p=0.3, **CALL, first_index=b,
        )  # fmt: skip
        assert_same_bits(value[b, n - new : n].view("u4"), new_value[b].view("u4"))
        assert_close(found[b].astype(np.float64), expected[0], tolerance("float32", 0.3), f"{b}")


def sdpa(query: Array, key: Array, value: Array, mask: Array | None = None) -> None:
    more = {} if mask is None else {"attn_mask": mask}
    found, _ = call_core(query, key, value, BHSD, dropout_p=0.3, **CALL, **more)
    expected = reference.scaled_dot_product(query, key, value, mask, dropout_p=0.3, **CALL)
    assert_close(found.astype(np.float64), expected, tolerance("float32", 0.3))


@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_all_batch_dimensions_count_as_one(seqlen_q: int) -> None:
    shapes = [(seqlen_q, 8), (37, 8), (37, 5)]
    q, k, v = (normal((2, 3, 4, 2, *s), seed=i) for i, s in enumerate(shapes))
    sdpa(q, k, v)
    # Strides that no one step walks along: other orders, gaps, and what broadcasts.
    turned = [normal((4, 2, 3, 2, *s), seed=i).transpose(1, 2, 0, 3, 4, 5) for i, s in
              enumerate(shapes)]  # fmt: skip
    sdpa(*turned)
    sdpa(q, turned[1], v)
    sdpa(np.repeat(q, 2, axis=1)[:, ::2], k, np.repeat(v, 2, axis=2)[:, :, ::2])
    sdpa(q, k[:1, :, :1], v[:, :1])
    sdpa(q, k, v, normal((3, 1, 1, seqlen_q, 37), seed=9))
    sdpa(q[0, 0, 0], k[0, 0, 0], v)
    sdpa(q[0, 0, 0, 0], k[0, 0, 0, 0], v[0, 0, 0, 0])


# ---- extremes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen_q", [2, 40])
def test_hardly_any(seqlen_q: int, isa: str) -> None:
    query, key, value = (normal((1, n, 2, 16), seed=i) for i, n in enumerate((seqlen_q, 70, 70)))
    plain, _ = call_core(query, key, value)
    found, _ = call_core(query, key, value, dropout_p=2.0**-33, **CALL)
    assert_same_bits(found.view("u4"), plain.view("u4"))
    found, _ = call_core(query, key, value, dropout_p=2.0**-31, **CALL)
    assert_close(found, plain, Tolerance(1e-12, 1e-6))


@pytest.mark.parametrize("seqlen_q", [2, 40])
def test_nearly_all(seqlen_q: int, isa: str) -> None:
    p = 1 - 2.0**-10
    found, expected = kept_by((1, seqlen_q, 4, 512), "float32", p, **CALL)
    assert 0 < expected.sum() < 300
    np.testing.assert_array_equal(found != 0, expected)
    assert_close(found, expected * (2.0**10 / 512), Tolerance(1e-12, 1e-5))
    for p in (1 - 2.0**-32, math.nextafter(1, 0)):
        found, expected = kept_by((1, seqlen_q, 4, 512), "float32", p, **CALL)
        assert not expected.any()
        assert not found.any()


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("seqlen_q", [3, 50])
def test_a_hidden_key_stays_hidden_and_a_dropped_one_is_not(
    seqlen_q: int, dtype: str, isa: str
) -> None:
    """NaN reaches the rows that see its key, dropped or not, and no others."""
    query, key, value = (
        normal((1, n, 1, 8), dtype, seed=i) for i, n in enumerate((seqlen_q, 50, 50))
    )
    last = value.copy()
    last[0, 49] = 0
    expected, _ = reference.attention(query, key, last, causal=True, dropout_p=0.5, **CALL)
    value[0, 49] = np.nan
    found, _ = call_core(query, key, value, causal=True, dropout_p=0.5, **CALL)
    assert np.isnan(found[0, -1].astype(np.float32)).all()
    assert_close(found[0, :-1].astype(np.float64), expected[0, :-1], tolerance(dtype, 0.5))


@pytest.mark.parametrize("seqlen_q", [3, 50])
def test_values_that_bfloat16_products_take_for_zero(seqlen_q: int, isa: str) -> None:
    query, key = (normal((1, n, 2, 8), "bfloat16", seed=n) for n in (seqlen_q, 60))
    value = normal((1, 60, 2, 8), "bfloat16", seed=3, factor=2.0**-110)
    found, _ = call_core(query, key, value, dropout_p=0.5, **CALL)
    expected, _ = reference.attention(query, key, value, dropout_p=0.5, **CALL)
    assert_close(
        found.astype(np.float64) * 2.0**110, expected * 2.0**110, tolerance("bfloat16", 0.5)
    )


@pytest.mark.parametrize("seqlen_q", [2, 300])
def test_same_bits_for_any_number_of_threads(seqlen_q: int) -> None:
    query, key, value = (normal((2, n, 4, 32), seed=i) for i, n in enumerate((seqlen_q, 700, 700)))
    found = []
    for threads in (1, 2, 5):
        umfa.set_num_threads(threads)
        found.append(call_core(query, key, value, dropout_p=0.3, **CALL)[0].view("u4"))
    for again in found[1:]:
        assert_same_bits(again, found[0])


def test_other_queries_change_no_bit() -> None:
    query, key, value = (normal((1, n, 2, 32), seed=i) for i, n in enumerate((600, 200, 200)))
    whole, _ = call_core(query, key, value, dropout_p=0.3, **CALL)
    for n in (33, 100, 257):
        part, _ = call_core(query[:, :n], key, value, dropout_p=0.3, **CALL)
        assert_same_bits(part.view("u4"), np.ascontiguousarray(whole[:, :n]).view("u4"))
