"""fused_rope_attention: the same as rotating first, in its dtype."""

from __future__ import annotations

import numpy as np
import pytest

import umfa
from tests import reference
from tests.cases import normal
from tests.checks import BASE, LSE, Tolerance, assert_close
from tests.sequences import rotary_tables, rotated


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_kv", "head_dim", "rotary_dim"),
    [
        (192, 192, 128, 128),
        (7, 130, 64, 64),
        (40, 77, 40, 16),
        (1, 300, 72, 72),
        (130, 131, 80, 32),
    ],
    ids=str,
)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_equals_rotating_first(
    seqlen_q: int,
    seqlen_kv: int,
    head_dim: int,
    rotary_dim: int,
    dtype: str,
    interleaved: bool,
    causal: bool,
) -> None:
    """A30, at sizes for every run; both kernels of the CPU, partial rotation, grouped heads."""
    random = np.random.default_rng(5)
    query, key, value = (
        random.standard_normal((2, rows, heads, head_dim)).astype(dtype)
        for rows, heads in ((seqlen_q, 4), (seqlen_kv, 2), (seqlen_kv, 2))
    )
    angles = np.outer(np.arange(seqlen_kv), 10000.0 ** -np.linspace(0, 1, rotary_dim // 2))
    cos, sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    out, lse, _ = umfa.fused_rope_attention(
        query,
        key,
        value,
        cos,
        sin,
        rotary_interleaved=interleaved,
        causal=causal,
        return_attn_probs=True,
    )
    at = np.arange(seqlen_q) + seqlen_kv - seqlen_q
    want, want_lse = reference.attention(
        rotated(query, cos, sin, at, interleaved=interleaved),
        rotated(key, cos, sin, np.arange(seqlen_kv), interleaved=interleaved),
        value,
        causal=causal,
    )
    assert_close(out.astype(np.float64), want, BASE[dtype], "out")
    # A float32 product that is rounded to float16 may land on the other side of a tie.
    assert_close(
        lse.astype(np.float64), want_lse, LSE if dtype == "float32" else Tolerance(1e-3, 0)
    )


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_a30_flux(interleaved: bool) -> None:
    """(1, 24, 4608, 4608, 128): the fused pass and rotating first, in every row of every head."""
    query, key, value = (normal((1, 4608, 24, 128), "bfloat16", seed=i) for i in range(3))
    cos, sin = rotary_tables(4608, 128)
    out = umfa.fused_rope_attention(query, key, value, cos, sin, rotary_interleaved=interleaved)
    query, key = (
        rotated(x, cos, sin, np.arange(4608), interleaved=interleaved) for x in (query, key)
    )
    unfused = umfa.flash_attn_func(query, key, value)
    assert_close(out.astype(np.float64), unfused.astype(np.float64), Tolerance(5e-3, 8e-3))
    rows, heads = [0, 1, 95, 96, 2000, 4607], [0, 7, 23]
    exact, _ = reference.attention(
        query[:, rows][:, :, heads], key[:, :, heads], value[:, :, heads]
    )
    assert_close(out[:, rows][:, :, heads].astype(np.float64), exact, BASE["bfloat16"])


def test_refuses_more_queries_than_keys() -> None:
    x = np.zeros((1, 5, 1, 8), np.float32)
    table = np.ones((9, 4), np.float32)
    with pytest.raises(
        ValueError, match=r"seqlen_q must not exceed seqlen_kv with rotary_cos; got 5 and 3;"
    ):
        umfa.fused_rope_attention(x, x[:, :3], x[:, :3], table, table)


def test_refuses_short_tables() -> None:
    x = np.zeros((1, 5, 1, 8), np.float32)
    with pytest.raises(
        ValueError, match=r"rotary_cos has too few positions; got 4; expected at lea"
    ):
        umfa.fused_rope_attention(x, x, x, np.ones((4, 4), np.float32), np.ones((5, 4), np.float32))
