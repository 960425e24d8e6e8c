"""Attention whose scores are products of int8: against the float64 reference on rows that NumPy
rounds here a second time, and against exact attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries, reference
from tests.array_libraries import DTYPES, Array, Framework
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close
from tests.quant.test_attention import cosine
from tests.sequences import offsets, paged, rotary_tables

pytestmark = pytest.mark.cpu_only


def keys_of(shape: tuple[int, ...], dtype: str = "float32", *, seed: int) -> Array:
    """Keys in every 16th channel around 5. Multiples of 1/64, whose sums float32 holds exactly."""
    x = normal(shape, seed=seed)
    x[..., ::16] += 5
    return (np.rint(x * 64) / 64).astype(DTYPES[dtype])


def rounded(x: Array) -> Array:
    """The numbers of a row's int8 codes."""
    with np.errstate(invalid="ignore"):
        step = np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127)
        step = np.maximum(step, np.float32(2.0**-100))
        codes = np.rint(x.astype(np.float64) * (np.float32(1) / step))
        return codes * step


def as_rounded(q: Array, k: Array, smooth_k: bool = True) -> tuple[Array, Array]:
    """Queries and keys of float64 whose products are the scores. What smoothing takes off the keys
    is one more channel, of 1 in the keys that it was taken off."""
    q, k = q.astype(np.float32), k.astype(np.float32)
    mean = np.zeros((k.shape[0], 1, *k.shape[2:]), np.float32)
    if smooth_k and k.shape[1]:
        mean = (k.sum(1, keepdims=True, dtype=np.float32) / np.float32(k.shape[1])).astype("f4")
    of_heads = np.repeat(mean.astype(np.float64), q.shape[2] // k.shape[2], axis=2)
    shift = (q * of_heads).sum(-1, keepdims=True)
    smooth = k - mean
    taken = np.abs(smooth).max(-1, keepdims=True) <= np.abs(k).max(-1, keepdims=True)
    keys = rounded(np.where(taken, smooth, k))
    return np.concatenate([rounded(q), shift], -1), np.concatenate([keys, taken], -1)


def check(q: Array, k: Array, v: Array, smooth_k: bool = True, **options: Any) -> Array:
    """Against the reference on rounded rows."""
    named = {"mask": options["attn_mask"]} if "attn_mask" in options else {}
    named |= {x: y for x, y in options.items() if x not in ("attn_mask", "causal_alignment")}
    if options.get("causal_alignment") == "top_left":
        named["alignment"] = "upper_left"
    named.setdefault("softmax_scale", q.shape[-1] ** -0.5)
    out, lse = umfa.quantized_attention(
        q, k, v, mode="sage", smooth_k=smooth_k, return_lse=True, **options
    )
    expected, expected_lse = reference.attention(*as_rounded(q, k, smooth_k), v, **named)
    assert out.dtype == q.dtype
    assert_close(out.astype(np.float64), expected, BASE[q.dtype.name])
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")
    return out


SHAPES = [
    # batch, seqlen_q, seqlen_k, heads, heads_k, head_dim, head_dim_v
    (2, 37, 131, 4, 2, 64, 64),
    (1, 1, 300, 4, 1, 75, 33),  # one query, odd head dims
    (1, 3, 1, 2, 2, 1, 5),
    (1, 5, 200, 2, 1, 576, 512),
    (1, 70, 3, 1, 1, 128, 16),
    (1, 6, 0, 2, 2, 64, 64),
    (1, 0, 6, 2, 2, 64, 64),
]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], dtype: str) -> None:
    batch, seqlen_q, seqlen_k, heads, heads_k, head_dim, head_dim_v = shape
    q = normal((batch, seqlen_q, heads, head_dim), dtype, seed=1)
    k = keys_of((batch, seqlen_k, heads_k, head_dim), dtype, seed=2)
    v = normal((batch, seqlen_k, heads_k, head_dim_v), dtype, seed=3)
    check(q, k, v)
    check(q, k, v, smooth_k=False, causal=True)


def test_every_instruction_set(isa: str) -> None:
    for dtype in DTYPES:
        q, v = (normal((1, n, 4, 72), dtype, seed=n) for n in (70, 260))
        k = keys_of((1, 260, 2, 72), dtype, seed=2)
        check(q, k, v[:, :, :2], causal=True)
        check(q, k, v[:, :, :2, :40], softcap=4.0)
    k, v = keys_of((1, 260, 2, 72), "float16", seed=2), normal((1, 260, 2, 72), seed=3)
    check(q, k, v)  # each of another dtype


OPTIONS: list[dict[str, Any]] = [
    {"causal": True},
    {"causal": True, "causal_alignment": "top_left"},
    {"window_size": (17, 3)},
    {"softcap": 5.0},
    {"softmax_scale": 0.3},
    {"softmax_scale": -0.1},
    {"alibi_slopes": np.float32([0.1, 0.2, 0.3, 0.4])},
    {"attn_mask": normal((2, 1, 1, 131), seed=9) > -0.5},
    {"attn_mask": normal((1, 4, 1, 131), "float16", seed=9)},
    {"learnable_sink": np.float32([0.5, -1.0, 2.0, 0.0])},
    {"dropout_p": 0.3, "dropout_seed": 5},
    {"attention_chunk": 32, "attention_chunk_offset": 5},
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: "-".join(x))
def test_every_option(options: dict[str, Any], dtype: str) -> None:
    q, v = (normal((2, n, 4, 64), dtype, seed=n) for n in (37, 131))
    k = keys_of((2, 131, 2, 64), dtype, seed=2)
    out = check(q, k, v[:, :, :2], **options)
    without = umfa.quantized_attention(q, k, v[:, :, :2], mode="sage")
    assert (out != without).any(), "the option has no effect"


def both(*args: Any, **options: Any) -> list[Array]:
    return list(umfa.quantized_attention(*args, mode="sage", return_lse=True, **options))


def assert_same(found: list[Array], expected: list[Array]) -> None:
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own, other)


def test_sequences_have_the_bits_of_calls_of_their_own() -> None:
    """Packed, padded and in pages. The mean is that of each sequence. What no sequence has is
    NaN."""
    lengths_q, lengths_k = [40, 0, 3], [70, 33, 5]
    q = normal((43, 4, 64), "float16", seed=1)
    k, v = (keys_of((108, 2, 64), "float16", seed=i) for i in (2, 3))
    starts = offsets(lengths_q), offsets(lengths_k)
    out, lse = both(q, k, v, causal=True, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])
    padded = [np.full((3, 70, 2, 64), np.nan, np.float16) for _ in range(2)]
    for i, length in enumerate(lengths_k):
        rows_q, rows_k = (slice(x[i], x[i + 1]) for x in starts)
        alone = both(q[None, rows_q], k[None, rows_k], v[None, rows_k], causal=True)
        assert_same([out[rows_q], lse[:, rows_q]], [x[0] for x in alone])
        for tensor, rows in zip(padded, (k, v), strict=True):
            tensor[i, :length] = rows[rows_k]
    queries = normal((3, 20, 4, 64), "float16", seed=4)
    used = np.int32(lengths_k)
    found = both(queries, *padded, causal=True, seqused_k=used)
    pages, table = paged(padded, 16, seed=5)
    assert_same(both(queries, *pages, causal=True, seqused_k=used, block_table=table), found)
    pad = np.int32([3, 30, 1])
    found = both(queries, *padded, causal=True, seqused_k=used, cache_leftpad=pad)
    for i, length in enumerate(lengths_k):
        own = [x[i : i + 1, pad[i] : length] for x in padded]
        assert_same([x[i] for x in found], [x[0] for x in both(queries[[i]], *own, causal=True)])
    order = np.int32([2, 0, 1])
    swapped = both(queries, *padded, seqused_k=used[order], cache_batch_idx=order)
    assert_same(swapped, both(queries, *(x[order] for x in padded), seqused_k=used[order]))


def test_rotary_angles_come_before_rounding() -> None:
    """The keys' mean is that of rotated keys."""
    q, k, v = (normal((1, n, 2, 64), seed=n) for n in (40, 100, 101))
    cos, sin = rotary_tables(100, 32)
    found = both(q, k, v[:, :100], causal=True, rotary_cos=cos, rotary_sin=sin)

    def rotated(x: Array, first: int) -> Array:
        c, s = (t[first : first + x.shape[1], None] for t in (cos, sin))
        half = c.shape[-1]
        a, b = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
        y = x.copy()
        y[..., : 2 * half : 2], y[..., 1 : 2 * half : 2] = a * c - b * s, a * s + b * c
        return y

    plain = both(rotated(q, 60), rotated(k, 0), v[:, :100], causal=True)
    # A last bit of the angles' products may change a code.
    assert_close(found[0].astype(np.float64), plain[0], BASE["bfloat16"])
    assert_close(found[1], plain[1], BASE["bfloat16"], "lse")


def test_the_same_bits_whatever_is_computed_beside() -> None:
    """Threads, other queries, batch_invariant, layouts, num_splits."""
    q, k, v = (normal((1, n, 4, 64), "bfloat16", seed=n) for n in (300, 700, 701))
    v = v[:, :700]
    umfa.set_num_threads(1)
    one = both(q, k, v)
    umfa.set_num_threads(4)
    assert_same(both(q, k, v), one)
    assert_same(both(q, k, v, batch_invariant=True, num_splits=3), one)
    assert_same(both(q[:, 150:151], k, v), [one[0][:, 150:151], one[1][:, :, 150:151]])
    swapped = both(*(x.swapaxes(1, 2) for x in (q, k, v)), layout="bhsd")
    assert_same([swapped[0].swapaxes(1, 2), swapped[1]], one)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a31_outliers_in_channels_of_the_keys(dtype: str) -> None:
    """(1,4,512,512,128). Every 16th channel of the keys is around 5, or has 5 times the range of
    the others."""
    q, k, v = (normal((1, 512, 4, 128), dtype, seed=i) for i in range(3))
    for change, least in ((np.add, 0.9999), (np.multiply, 0.9995)):
        keys = k.astype(np.float32)
        keys[..., ::16] = change(keys[..., ::16], 5)
        keys = keys.astype(k.dtype)
        exact, exact_lse = reference.attention(q, keys, v)
        out, lse = both(q, keys, v)
        assert cosine(out, exact) >= least
        assert np.abs(lse - exact_lse).max() < 0.05
    shifted = k.astype(np.float32)
    shifted[..., ::16] += 20
    shifted = shifted.astype(k.dtype)
    exact, _ = reference.attention(q, shifted, v)
    rough = umfa.quantized_attention(q, shifted, v, mode="sage", smooth_k=False)
    assert cosine(both(q, shifted, v)[0], exact) >= 0.9999 > cosine(rough, exact)


@pytest.mark.parametrize("smooth_k", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_rows_that_are_not_finite(dtype: str, bad: float, smooth_k: bool) -> None:
    """Such a query gives NaN. Such a key does to those who see it, and has no effect on others."""
    q, k, v = (normal((1, 50, 2, 40), dtype, seed=i) for i in range(3))
    clean = both(q, k, v, causal=True)
    q[:, 7, 0, 39] = k[:, 20, 1, 3] = bad
    out, lse = both(q, k, v, causal=True, smooth_k=smooth_k)
    wrong = np.zeros((1, 50, 2), bool)
    wrong[:, 7, 0] = wrong[:, 20:, 1] = True
    assert (np.isnan(out) == wrong[..., None]).all()
    assert (np.isnan(lse) == wrong.swapaxes(1, 2)).all()
    # That one key is not in the mean changes the rounding.
    away = ~np.broadcast_to(wrong[..., None], out.shape)
    difference = out[away].astype(np.float64) - clean[0][away]
    assert np.abs(difference).max() < 0.1
    mask = np.ones((1, 1, 1, 50), bool)
    mask[..., 20] = False
    out, _ = both(q, k, v, attn_mask=mask)
    assert np.isnan(out[:, 7, 0]).all()
    out[:, 7, 0] = 0
    assert np.isfinite(out).all()
    v[:, 20] = np.nan
    out, _ = both(q, k, v, attn_mask=mask)
    out[:, 7, 0] = 0
    assert np.isfinite(out).all(), "a hidden value shows"


@pytest.mark.parametrize("held", [0.0, 1e4, 3e38, np.nan])
@pytest.mark.parametrize("mode", ["sage", "int8"])
def test_what_a_mask_hides_does_no_harm(mode: str, held: float) -> None:
    """Keys that nobody sees take part in the mean, but do not enlarge the error of the others."""
    q, k, v = (normal((1, 40, 2, 64), seed=i) for i in range(3))
    k[:, 32:] = held
    mask = np.arange(40)[None, None, None] < 32
    for q_, most in ((q, 0.02), (10 * q, 0.2)):
        exact = reference.attention(q_, k[:, :32], v[:, :32])
        out, lse, *_ = umfa.quantized_attention(
            q_, k, v, mode=mode, attn_mask=mask, return_lse=True
        )
        error = np.abs(out - exact[0]).sum() / np.abs(exact[0]).sum()
        assert error < most
        assert np.abs(lse - exact[1]).max() < most * 5


def test_numbers_that_are_not_finite_do_not_count_for_a_mean() -> None:
    """Else the mean of the two keys that have numbers would be a twentieth of what it is."""
    q = normal((1, 40, 2, 64), seed=0)
    k = np.full((1, 40, 2, 64), np.nan, np.float32)
    k[:, :2] = 5 + normal((1, 2, 2, 64), seed=1) / 100
    mask = np.arange(40)[None, None, None] < 2
    _, lse, *_ = umfa.quantized_attention(
        q, k, np.ones_like(k), mode="sage", attn_mask=mask, return_lse=True
    )
    exact = reference.attention(q, k[:, :2], np.ones_like(k[:, :2]))
    assert np.abs(lse - exact[1]).max() < 1e-3


def test_scales_whose_product_is_out_of_range() -> None:
    """Products of codes are 0 here: so are the scores."""
    q, k = np.zeros((1, 1, 1, 4), np.float32), np.zeros((1, 2, 1, 4), np.float32)
    q[..., 0] = 1e22
    k[0, :, 0, 1] = 1e22, 2e22
    for smooth_k in (True, False):
        _, lse, *_ = umfa.quantized_attention(
            q, k, np.ones_like(k), mode="sage", smooth_k=smooth_k, return_lse=True
        )
        assert lse == pytest.approx(np.log(2))


def test_rows_and_blocks_that_see_nothing() -> None:
    """0, and a log-sum-exp of -inf: of single rows, of a whole panel and tile, of a whole call."""
    q, k, v = (normal((1, 300, 2, 64), "float16", seed=i) for i in range(3))
    mask = np.ones((1, 1, 300, 300), bool)
    mask[:, :, 5] = False
    mask[:, :, 64:200] = False
    mask[:, :, :, 96:200] = False
    for own in (mask, np.where(mask, np.float16(0), np.float16(-np.inf))):
        out, lse = both(q, k, v, attn_mask=own)
        seen = mask[0, 0].any(-1)
        assert np.isfinite(out).all()
        assert (out[:, ~seen] == 0).all()
        assert (lse[:, :, ~seen] == -np.inf).all()
        assert np.isfinite(lse[:, :, seen]).all()
    check(q, k, v, attn_mask=mask)
    out, lse = both(q, k, v, attn_mask=np.zeros((1, 1, 1, 1), bool))
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def test_numbers_at_the_ends_of_the_range() -> None:
    """Zeros, equal keys, subnormal numbers, and such as have sums beyond the range."""
    q, k, v = (normal((1, 40, 2, 64), seed=i) for i in range(3))
    nothing = np.zeros_like(k)
    mean = np.broadcast_to(v.mean(1, keepdims=True), v.shape)
    for own in (nothing, np.ones_like(k), nothing + np.float32(1e-42)):
        out, lse = both(q, own, v)
        assert_close(out.astype(np.float64), mean, BASE["float32"])
        exact = np.log(40) + (q @ own[0, 0, 0]).swapaxes(1, 2) / 8
        assert_close(lse.astype(np.float64), exact, LSE, "lse")
    assert_close(both(nothing, k, v)[0].astype(np.float64), mean, BASE["float32"])
    huge = np.where(k > 0, np.float32(3e38), np.float32(-1e38))
    tiny = q * np.float32(1e-20)
    found = both(tiny, huge, v, softmax_scale=1e-19)
    assert_same(found, both(tiny, huge, v, softmax_scale=1e-19, smooth_k=False))
    exact, exact_lse = reference.attention(tiny, huge, v, softmax_scale=1e-19)
    assert cosine(found[0], exact) > 0.999
    assert np.abs(found[1] - exact_lse).max() < 0.1
    least = np.float32(2.0**-112)
    check(q, k * least, v)
    check(q * least, k, v)


def test_sageattn_in_every_framework(framework: Framework) -> None:
    q, k, v = (normal((2, 4, n, 64), "float16", seed=n) for n in (50, 51, 52))
    k, v = k[:, :2, :50], v[:, :2, :50]
    own = [framework.tensor(np.ascontiguousarray(x)) for x in (q, k, v)]
    out, lse = umfa.sageattn(*own, is_causal=True, sm_scale=0.2, return_lse=True)
    assert isinstance(out, framework.array_type)
    exact, exact_lse = reference.attention(
        *(x.swapaxes(1, 2) for x in (q, k, v)), causal=True, softmax_scale=0.2
    )
    assert cosine(framework.float64(out).swapaxes(1, 2), exact) >= 0.9999
    assert np.abs(framework.float64(lse) - exact_lse).max() < 0.1
    swapped = [framework.tensor(np.ascontiguousarray(x.swapaxes(1, 2))) for x in (q, k, v)]
    hints = {"qk_quant_gran": "per_warp", "pv_accum_dtype": "fp32", "quantization_backend": "cuda"}
    again = umfa.sageattn(*swapped, "NHD", True, 0.2, smooth_k=True, **hints)
    np.testing.assert_array_equal(framework.numpy(again).swapaxes(1, 2), framework.numpy(out))


X = normal((1, 8, 2, 32), seed=0)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"mode": "int3"}, ValueError, "mode is unknown; got 'int3'; expected 'none' or 's"),
        ({"mode": None, "smooth_k": False}, ValueError, "smooth_k is for a mode that quantises t"),
        ({"smooth_k": "x"}, TypeError, "smooth_k is not a bool; got 'x'"),
        ({"k": umfa.quantize(X, "int8")}, umfa.UnsupportedError, "with mode 'sage', a quantised"),
        ({"v": umfa.quantize(X, "int8")}, umfa.UnsupportedError, "with mode 'sage', a quantised"),
        ({"q": umfa.quantize(X, "int8")}, umfa.UnsupportedError, "q is quantised; got int8"),
        ({"qv": X}, umfa.UnsupportedError, "with mode 'sage', qv is not implemented"),
        ({"backend": "metal"}, umfa.UnsupportedError, "a mode that quantises query and key is no"),
        ({"q": X[..., :16]}, ValueError, "head_dim differs: q has 16, k has 32"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_refusals(changes: dict[str, Any], error: type, text: str) -> None:
    given: dict[str, Any] = {"q": X, "k": X, "v": X, "mode": "sage"}
    with pytest.raises(error, match=rf"^\[umfa\.quantized_attention\] .*{text}"):
        umfa.quantized_attention(**{**given, **changes})


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"tensor_layout": "HDN"}, ValueError, "tensor_layout is unknown; got 'HDN'; expected 'H"),
        ({"attn_mask": X}, TypeError, "unexpected keyword argument 'attn_mask'"),
        ({"qk_quant_gran": "per_tensor"}, ValueError, "qk_quant_gran is unknown; got 'per_tensor'"),
        ({"pv_accum_dtype": "fp8"}, ValueError, "pv_accum_dtype is unknown; got 'fp8'"),
        ({"quantization_backend": 3}, ValueError, "quantization_backend is unknown; got 3"),
        ({"is_causal": 3}, TypeError, "is_causal is not a bool; got 3"),
        ({"sm_scale": "x"}, TypeError, "sm_scale is not a number"),
        ({"backend": "metal"}, umfa.UnsupportedError, "a mode that quantises query and key is not"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_sageattn_refusals(options: dict[str, Any], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        umfa.sageattn(X, X, X, **options)
    longer = normal((1, 8, 3, 32), seed=1)
    with pytest.raises(ValueError, match="is_causal needs as many queries as keys; got 2 and 3"):
        umfa.sageattn(X, longer, longer, is_causal=True)


def test_can_run_and_gradients() -> None:
    assert umfa.can_run(umfa.sageattn, X, X, X) == (True, "")
    torch = array_libraries.load("torch").module
    x = torch.randn(1, 8, 2, 32, requires_grad=True)
    with pytest.raises(umfa.UnsupportedError, match="a mode that quantises query and key is not i"):
        umfa.sageattn(x, x, x).sum().backward()


def test_jax_jit() -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    q, k, v = (jax.numpy.asarray(normal((1, 2, 40, 64), seed=n)) for n in range(3))
    jitted = jax.jit(lambda *x: umfa.sageattn(*x, is_causal=True, smooth_k=False))
    np.testing.assert_array_equal(
        jitted(q, k, v), umfa.sageattn(q, k, v, is_causal=True, smooth_k=False)
    )
