"""qv, the part of the queries that meets the values, and the largest head dims."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.array_libraries import DTYPES
from tests.attend import call_core
from tests.cases import normal
from tests.checks import BASE, LSE, Tolerance, assert_close, assert_same_bits
from tests.sequences import offsets, paged, rotary_tables, rotated

pytestmark = pytest.mark.cpu_only

NAMES = list(DTYPES)
# Scores of a sum over 576 or 1088 channels are no better than their size allows.
LSE_LARGE = Tolerance(LSE.atol, 1e-6)


Shape = tuple[int, int, int, int, int, int, int]


def tensors_of(shape: Shape, dtype: str) -> dict[str, Any]:
    """(batch, heads, heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v)."""
    batch, heads, heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v = shape
    return {
        "q": normal((batch, seqlen_q, heads, head_dim), dtype, seed=1),
        "k": normal((batch, seqlen_k, heads_k, head_dim), dtype, seed=2),
        "v": normal((batch, seqlen_k, heads_k, head_dim_v), dtype, seed=3),
        "qv": normal((batch, seqlen_q, heads, head_dim_v), dtype, seed=4),
    }


CASES: list[tuple[Shape, dict[str, Any]]] = [
    ((2, 2, 2, 40, 130, 24, 16), {}),
    ((1, 4, 2, 70, 99, 17, 33), {"causal": True}),
    ((1, 2, 1, 33, 250, 1, 5), {"window_size": (40, 3)}),
    ((1, 2, 2, 50, 101, 64, 7), {"softcap": 4.0, "attention_chunk": 31}),
    ((1, 3, 1, 20, 100, 64, 512), {"causal": True}),  # MLA with absorbed weights
    ((2, 8, 1, 1, 300, 64, 512), {}),
    ((1, 5, 1, 2, 1300, 64, 128), {"causal": True}),  # several parts
    ((2, 4, 2, 2, 61, 9, 3), {"window_size": (20, -1)}),
    ((1, 2, 2, 1, 33, 576, 512), {}),
]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("index", range(len(CASES)))
def test_equals_the_reference(index: int, dtype: str, isa: str) -> None:
    shape, options = CASES[index]
    tensors = tensors_of(shape, dtype)
    more = dict(options)
    if index % 2:
        more["alibi_slopes"] = np.linspace(0.02, 0.3, shape[1], dtype=np.float32)
        more["learnable_sink"] = np.linspace(-1, 2, shape[1], dtype=np.float32)
        more["softmax_scale"] = 0.1
    found, lse = call_core(**tensors, **more)
    q, k, v = (tensors.pop(name) for name in "qkv")
    expected, expected_lse = reference.attention(q, k, v, **tensors, **more)
    assert_close(found.astype(np.float64), expected, BASE[dtype])
    assert_close(lse.astype(np.float64), expected_lse, LSE_LARGE, "lse")


@pytest.mark.parametrize("seqlen_q", [2, 60])
def test_with_a_mask_and_dropout(seqlen_q: int, isa: str) -> None:
    tensors = tensors_of((2, 2, 1, seqlen_q, 77, 12, 20), "float32")
    mask = np.where(
        np.random.default_rng(1).random((2, 2, seqlen_q, 77)) < 0.7, 0.5, -np.inf
    ).astype(np.float32)
    options: dict[str, Any] = {"dropout_p": 0.3, "dropout_seed": 5}
    found, _ = call_core(**tensors, attn_mask=mask, **options)
    q, k, v = (tensors.pop(name) for name in "qkv")
    expected, _ = reference.attention(q, k, v, mask=mask, **tensors, **options)
    assert_close(found.astype(np.float64), expected, Tolerance(3e-5, 1e-5))


@pytest.mark.parametrize("page_size", [0, 5, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_and_paged(page_size: int, dtype: str, isa: str) -> None:
    lengths_q, lengths_k = [40, 1, 0, 19, 2], [90, 33, 12, 0, 600]
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    q = normal((cu_q[-1], 4, 24), dtype, seed=1)
    k, v = (normal((cu_k[-1], 2, d), dtype, seed=d) for d in (24, 40))
    qv = normal((cu_q[-1], 4, 40), dtype, seed=3)
    keys, tables = [k, v], {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    if page_size:
        wide = [np.full((5, max(lengths_k), *x.shape[1:]), np.nan, x.dtype) for x in (k, v)]
        for b, n in enumerate(lengths_k):
            for to, x in zip(wide, (k, v), strict=True):
                to[b, :n] = x[cu_k[b] : cu_k[b] + n]
        keys, tables["block_table"] = paged(wide, page_size)
    found, lse = call_core(q, *keys, qv=qv, **tables, causal=True)
    for b in range(5):
        rows, own_keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        own, own_lse = reference.attention(
            q[None, rows], k[None, own_keys], v[None, own_keys], qv=qv[None, rows], causal=True
        )
        assert_close(found[rows].astype(np.float64), own[0], BASE[dtype], f"{b}")
        assert_close(lse[:, rows].astype(np.float64), own_lse[0], LSE_LARGE, f"lse {b}")


@pytest.mark.parametrize("seqlen_q", [2, 40])
def test_rotary_turns_query_and_key_only(seqlen_q: int, isa: str) -> None:
    used, new = np.array([50, 7, 131]), 3
    key, value = (normal((3, 140, 2, d), seed=d) for d in (16, 24))
    new_key, new_value = (normal((3, new, 2, d), seed=d + 1) for d in (16, 24))
    query, qv = (normal((3, seqlen_q, 4, d), seed=d + 2) for d in (16, 24))
    cos, sin = rotary_tables(200, 12)
    found, _ = call_core(
        query, key, value, qv=qv, new_key=new_key, new_value=new_value, rotary_cos=cos,
        rotary_sin=sin, seqused_k=used, causal=True,
    )  # fmt: skip
    turned = rotated(query, cos, sin, used[:, None] + np.arange(seqlen_q), interleaved=True)
    for b, n in enumerate(used + new):
        expected, _ = reference.attention(
            turned[b : b + 1], key[b : b + 1, :n], value[b : b + 1, :n], qv=qv[b : b + 1],
            causal=True,
        )  # fmt: skip
        assert_close(found[b].astype(np.float64), expected[0], BASE["float32"], f"{b}")


@pytest.mark.sanitize
@pytest.mark.parametrize("head_dims", [(16, 24), (576, 512)], ids=str)
@pytest.mark.parametrize("seqlen_q", [2, 40])
def test_rotary_of_all_keys(seqlen_q: int, head_dims: tuple[int, int], isa: str) -> None:
    head_dim, head_dim_v = head_dims
    tensors = tensors_of((1, 2, 1, seqlen_q, 130, head_dim, head_dim_v), "float32")
    cos, sin = rotary_tables(130, head_dim)
    found, _ = call_core(**tensors, rotary_cos=cos, rotary_sin=sin, causal=True)
    q = rotated(
        tensors["q"], cos, sin, 130 - seqlen_q + np.arange(seqlen_q)[None], interleaved=True
    )
    k = rotated(tensors["k"], cos, sin, np.arange(130)[None], interleaved=True)
    expected, _ = reference.attention(q, k, tensors["v"], qv=tensors["qv"], causal=True)
    assert_close(found.astype(np.float64), expected, BASE["float32"])


@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_any_strides(seqlen_q: int, isa: str) -> None:
    tensors = tensors_of((2, 4, 2, seqlen_q, 70, 24, 40), "float32")
    plain, _ = call_core(**tensors)
    apart = {name: np.repeat(x, 2, axis=3)[..., ::2] for name, x in tensors.items()}
    turned = {
        name: np.ascontiguousarray(x.transpose(2, 3, 0, 1)).transpose(2, 3, 0, 1)
        for name, x in tensors.items()
    }
    for views in (apart, turned):
        for name in tensors:
            found, _ = call_core(**(tensors | {name: views[name]}))
            assert_close(found, plain, Tolerance(1e-6, 1e-6), name)


@pytest.mark.parametrize("seqlen_q", [3, 50])
@pytest.mark.parametrize("dtype", NAMES)
def test_nan_in_a_hidden_value_stays_there(dtype: str, seqlen_q: int, isa: str) -> None:
    tensors = tensors_of((1, 2, 1, seqlen_q, 50, 8, 24), dtype)
    expected, _ = call_core(**tensors, causal=True)
    tensors["v"][0, 49] = np.nan
    found, _ = call_core(**tensors, causal=True)
    assert np.isnan(found[0, -1].astype(np.float32)).all()
    bits = f"u{found.itemsize}"
    assert_same_bits(
        np.ascontiguousarray(found[0, :-1]).view(bits),
        np.ascontiguousarray(expected[0, :-1]).view(bits),
    )


@pytest.mark.parametrize("seqlen_q", [2, 300])
def test_same_bits_for_any_number_of_threads(seqlen_q: int) -> None:
    tensors = tensors_of((1, 4, 2, seqlen_q, 700, 32, 48), "bfloat16")
    found = []
    for threads in (1, 2, 5):
        umfa.set_num_threads(threads)
        found.append(call_core(**tensors)[0].view("u2"))
    for again in found[1:]:
        assert_same_bits(again, found[0])


# ---- the largest head dims -----------------------------------------------------------------------

LARGE = [
    ((1, 2, 1, 40, 130, 576, 512), {"causal": True}),
    ((1, 2, 2, 33, 50, 575, 511), {}),
    ((1, 3, 1, 2, 700, 576, 512), {"causal": True}),
    ((2, 1, 1, 1, 40, 571, 509), {}),
]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("index", range(len(LARGE)))
def test_large_head_dims(index: int, dtype: str, isa: str) -> None:
    shape, options = LARGE[index]
    tensors = tensors_of(shape, dtype)
    q, k, v = (tensors[name] for name in "qkv")
    for qv in (None, tensors["qv"]):
        given = {} if qv is None else {"qv": qv}
        found, lse = call_core(q, k, v, **given, **options)
        expected, expected_lse = reference.attention(q, k, v, **given, **options)
        assert_close(found.astype(np.float64), expected, BASE[dtype])
        assert_close(lse.astype(np.float64), expected_lse, LSE_LARGE, "lse")


@pytest.mark.sanitize
@pytest.mark.parametrize("seqlen_q", [2, 40])
def test_all_of_a_large_head_dim_turns(seqlen_q: int, isa: str) -> None:
    query, new_key = (normal((1, n, 2, 576), seed=i) for i, n in enumerate((seqlen_q, 3)))
    new_value = normal((1, 3, 2, 512), seed=2)
    key, value = (normal((1, 60, 2, d), seed=d) for d in (576, 512))
    cos, sin = rotary_tables(100, 576)
    found, _ = call_core(
        query, key, value, new_key=new_key, new_value=new_value, rotary_cos=cos, rotary_sin=sin,
        seqused_k=np.array([50]), causal=True,
    )  # fmt: skip
    turned = rotated(query, cos, sin, 50 + np.arange(seqlen_q)[None], interleaved=True)
    wanted = rotated(new_key, cos, sin, 50 + np.arange(3)[None], interleaved=True)
    assert_close(key[:, 50:53].astype(np.float64), wanted.astype(np.float64), BASE["float32"])
    expected, _ = reference.attention(turned, key[:, :53], value[:, :53], causal=True)
    assert_close(found.astype(np.float64), expected, BASE["float32"])
