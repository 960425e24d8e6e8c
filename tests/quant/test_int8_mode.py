"""mode="int8": weights and values are rounded too, by tiles of 96 keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.array_libraries import DTYPES, Array
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close
from tests.quant.test_attention import cosine
from tests.quant.test_sage import SHAPES, keys_of
from tests.sequences import offsets, rotary_tables

pytestmark = pytest.mark.cpu_only


def both(*args: Any, mode: str = "int8", **options: Any) -> list[Array]:
    return list(umfa.quantized_attention(*args, mode=mode, return_lse=True, **options))


def values_of(shape: tuple[int, ...], dtype: str, *, seed: int) -> Array:
    """Integers that rounding leaves alone: in each tile the largest of each channel is 127."""
    x = np.rint(np.clip(30 * normal(shape, seed=seed), -126, 126))
    x[:, ::48] = 127
    return x.astype(DTYPES[dtype])


def test_equal_weights_give_the_mean(isa: str) -> None:
    """Of integers: neither weights nor values are rounded. Head dims that end within a vector."""
    for dtype in DTYPES:
        for head_dim_v in (64, 33, 5):
            q = np.zeros((1, 20, 2, 40), DTYPES[dtype])
            k = normal((1, 227, 1, 40), dtype, seed=1)
            v = values_of((1, 227, 1, head_dim_v), dtype, seed=2)
            for options in ({}, {"causal": True}, {"window_size": (50, 0)}):
                out, lse = both(q, k, v, **options)
                expected, expected_lse = reference.attention(q, k, v, **options)
                assert_close(out.astype(np.float64), expected, BASE[dtype])
                assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], dtype: str) -> None:
    """Little is lost beside mode "sage", and nothing of the log-sum-exp."""
    batch, seqlen_q, seqlen_k, heads, heads_k, head_dim, head_dim_v = shape
    q = normal((batch, seqlen_q, heads, head_dim), dtype, seed=1)
    k = keys_of((batch, seqlen_k, heads_k, head_dim), dtype, seed=2)
    v = normal((batch, seqlen_k, heads_k, head_dim_v), dtype, seed=3)
    for options in ({}, {"causal": True, "smooth_k": False}):
        compare_with_sage(q, k, v, **options)


def compare_with_sage(q: Array, k: Array, v: Array, **options: Any) -> None:
    out, lse = both(q, k, v, **options)
    sage, sage_lse = both(q, k, v, mode="sage", **options)
    assert out.dtype == q.dtype
    most = float(np.abs(v.astype(np.float64)).max(initial=0))
    difference = np.abs(out.astype(np.float64) - sage)
    assert difference.max(initial=0) <= 0.012 * most
    assert_close(lse.astype(np.float64), sage_lse.astype(np.float64), LSE, "lse")


OPTIONS: list[dict[str, Any]] = [
    {"causal": True, "causal_alignment": "top_left"},
    {"window_size": (17, 3)},
    {"softcap": 5.0},
    {"softmax_scale": -0.1},
    {"alibi_slopes": np.float32([0.1, 0.2, 0.3, 0.4])},
    {"attn_mask": normal((2, 1, 1, 131), seed=9) > -0.5},
    {"attn_mask": normal((1, 4, 1, 131), "float16", seed=9)},
    {"learnable_sink": np.float32([0.5, -1.0, 2.0, 0.0])},
    {"attention_chunk": 32, "attention_chunk_offset": 5},
    {"seqused_k": np.int32([131, 77])},
    {"rotary": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: "-".join(x))
def test_every_option(options: dict[str, Any]) -> None:
    options = dict(options)
    if options.pop("rotary", False):
        options["rotary_cos"], options["rotary_sin"] = rotary_tables(131, 32)
    for dtype in ("float32", "bfloat16"):
        q, v = (normal((2, n, 4, 64), dtype, seed=n) for n in (37, 131))
        k = keys_of((2, 131, 2, 64), dtype, seed=2)
        compare_with_sage(q, k, v[:, :, :2], **options)


def test_packed_sequences_have_the_bits_of_calls_of_their_own() -> None:
    lengths = [40, 0, 200]
    q, k, v = (normal((240, 2, 64), "float16", seed=i) for i in range(3))
    starts = offsets(lengths)
    out, lse = both(q, k, v, causal=True, cu_seqlens_q=starts, cu_seqlens_k=starts)
    for i in range(3):
        rows = slice(starts[i], starts[i + 1])
        alone = both(q[None, rows], k[None, rows], v[None, rows], causal=True)
        np.testing.assert_array_equal(out[rows], alone[0][0])
        np.testing.assert_array_equal(lse[:, rows], alone[1][0])


def test_the_same_bits_whatever_is_computed_beside() -> None:
    q, k, v = (normal((1, 700, 4, 64), "bfloat16", seed=i) for i in range(3))
    umfa.set_num_threads(1)
    one = both(q, k, v)
    umfa.set_num_threads(4)
    for own, other in zip(both(q, k, v), one, strict=True):
        np.testing.assert_array_equal(own, other)
    alone = both(q[:, 150:151], k, v)
    np.testing.assert_array_equal(alone[0], one[0][:, 150:151])
    np.testing.assert_array_equal(alone[1], one[1][:, :, 150:151])


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_outliers_and_one_large_weight(dtype: str) -> None:
    """The first key has a weight that is as large as that of hundreds of others together, as first
    tokens of language models have. Those others still count."""
    q, k, v = (normal((1, 512, 4, 128), dtype, seed=i) for i in range(3))
    k = k.astype(np.float32)
    k[..., ::16] += 5
    k = k.astype(q.dtype)
    exact, exact_lse = reference.attention(q, k, v)
    out, lse = both(q, k, v)
    assert cosine(out, exact) >= 0.9999
    assert np.abs(lse - exact_lse).max() < 0.05
    mask = np.zeros((1, 1, 1, 512), np.float32)
    mask[..., 0] = 6.5
    exact, _ = reference.attention(q, k, v, mask=mask)
    assert cosine(both(q, k, v, attn_mask=mask)[0], exact) >= 0.9998


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_values_that_are_not_finite(dtype: str) -> None:
    """They show where they are seen, and nowhere else."""
    q, k, v = (normal((1, 150, 2, 40), dtype, seed=i) for i in range(3))
    v[:, 20, 0, 3], v[:, 120, 1, 39] = np.nan, np.inf
    out, _ = both(q, k, v, causal=True)
    bad = np.zeros((1, 150, 2, 40), bool)
    bad[:, 20:, 0, 3] = bad[:, 120:, 1, 39] = True
    assert (np.isfinite(out) == ~bad).all()
    assert np.isnan(out[:, 20:, 0, 3]).all()
    assert (out[:, 120:, 1, 39] == np.inf).all()
    clean = np.where(np.isfinite(v), v, v.dtype.type(0))
    zeroed = both(q, k, clean, causal=True)[0]
    np.testing.assert_array_equal(out[~bad], zeroed[~bad])
    mask = np.ones((1, 1, 1, 150), bool)
    mask[..., [20, 120]] = False
    hidden = both(q, k, v, attn_mask=mask)[0]
    np.testing.assert_array_equal(hidden, both(q, k, clean, attn_mask=mask)[0])


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_queries_and_keys_that_are_not_finite(dtype: str) -> None:
    q, k, v = (normal((1, 50, 2, 40), dtype, seed=i) for i in range(3))
    q[:, 7, 0, 39] = k[:, 20, 1, 3] = np.nan
    out, lse = both(q, k, v, causal=True)
    wrong = np.zeros((1, 50, 2), bool)
    wrong[:, 7, 0] = wrong[:, 20:, 1] = True
    assert (np.isnan(out) == wrong[..., None]).all()
    assert (np.isnan(lse) == wrong.swapaxes(1, 2)).all()


def test_rows_and_blocks_that_see_nothing() -> None:
    q, k, v = (normal((1, 300, 2, 64), "float16", seed=i) for i in range(3))
    mask = np.ones((1, 1, 300, 300), bool)
    mask[:, :, 5] = False
    mask[:, :, 64:200] = False
    mask[:, :, :, 96:200] = False
    seen = mask[0, 0].any(-1)
    for own in (mask, np.where(mask, np.float16(0), np.float16(-np.inf))):
        out, lse = both(q, k, v, attn_mask=own)
        assert np.isfinite(out).all()
        assert (out[:, ~seen] == 0).all()
        assert (lse[:, :, ~seen] == -np.inf).all()
        assert np.isfinite(lse[:, :, seen]).all()
        compare_with_sage(q, k, v, attn_mask=own)


X = normal((1, 8, 2, 32), seed=0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dropout_p": 0.1, "dropout_seed": 1}, "with mode 'int8', dropout_p is not implemented"),
        ({"qv": X}, "with mode 'int8', qv is not implemented"),
        ({"v": umfa.quantize(X, "int8")}, "with mode 'int8', a quantised key or value is not"),
        ({"backend": "metal"}, "a mode that quantises query and key is not implemented"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_refusals(changes: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"q": X, "k": X, "v": X, "mode": "int8"}
    with pytest.raises(umfa.UnsupportedError, match=text):
        umfa.quantized_attention(**{**given, **changes})
