"""Query, key, value and result of different dtypes, in the float kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.array_libraries import DTYPES, Array
from tests.attend import call_on
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close, assert_same_bits
from tests.core.test_dtypes import ALL, SOME, appended, tensors
from tests.metal import emulated
from tests.tiers import crossed

pytestmark = pytest.mark.usefixtures("own_settings")
BOTH = pytest.mark.parametrize("seqlen_q", [1, 40], ids=["decode", "prefill"])
EACH = [
    *crossed(SOME, [1, 40]),
    *(pytest.param(x, n, marks=pytest.mark.slow) for x in ALL if x not in SOME for n in (1, 40)),
]


def check(arrays: list[Array], out_dtype: str | None = None, **options: Any) -> list[str]:
    """Compares with the reference. Returns the names of the kernels."""
    out, lse = call_on(
        "metal-emulated", umfa.flash_attn_func, *arrays, out_dtype=out_dtype, **options
    )
    expected, expected_lse = reference.attention(*arrays, **options)
    name = out_dtype or arrays[0].dtype.name
    assert out.dtype.name == name
    assert_close(out.astype(np.float64), expected, BASE[name])
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")
    return [launch["kernel"] for launch in emulated.last_plan["launches"]]


@pytest.mark.parametrize(("dtypes", "seqlen_q"), EACH, ids=str)
def test_every_combination(dtypes: tuple[str, ...], seqlen_q: int) -> None:
    kernels = check(tensors(dtypes, seqlen_q, keys=70), causal=True)
    kind = {"float32": "f32", "float16": "f16", "bfloat16": "bf16_as_f32"}
    kernel = kind[dtypes[0]] if len(set(dtypes)) == 1 else "f32"
    assert [name.split("_d")[0].split("_", 1)[1] for name in kernels] == [kernel]


@BOTH
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_out_dtype(out_dtype: str, seqlen_q: int) -> None:
    """If only the dtype of the result differs, arithmetic is float32 too."""
    kernels = check(tensors(("float16",) * 3, seqlen_q, keys=70), out_dtype)
    assert ("f16" if out_dtype == "float16" else "f32") in kernels[0]


@BOTH
def test_calls_of_one_dtype_know_no_other(seqlen_q: int) -> None:
    """Their kernels are what they would be without the constants."""
    for dtype in DTYPES:
        arrays = tensors((dtype,) * 3, seqlen_q)
        emulated.call(*arrays)
        for launch in emulated.last_plan["launches"]:
            assert not any(launch["constants"][i] for i in range(22, 28))


@pytest.mark.parametrize(("wide", "seqlen_q"), crossed([True, False], [1, 40]))
def test_rotated_keys_and_qv(wide: bool, seqlen_q: int) -> None:
    query, key, value = tensors(("float16", "bfloat16", "float16"), seqlen_q, keys=70)
    if not wide:
        key, value = (np.repeat(x, 2, axis=-1)[..., ::2] for x in (key, value))
    check([query, key, value], qv=normal((2, seqlen_q, 4, 24), "float16", seed=5))
    angles = np.linspace(0, 3, 70 * 16).reshape(70, 16)
    cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
    out, _ = call_on("metal-emulated", umfa.fused_rope_attention, query, key, value, cos, sin)
    expected = umfa.fused_rope_attention(query, key, value, cos, sin, backend="cpu")
    assert_close(out.astype(np.float64), expected.astype(np.float64), BASE["float16"])


@pytest.mark.parametrize("num_splits", [1, 3])
def test_splits(num_splits: int) -> None:
    arrays = tensors(("bfloat16", "float16", "float32"), 2)
    out, lse = emulated.call(*arrays, {"num_splits": num_splits, "out_dtype": "float16"})
    assert out.dtype == np.float16
    expected, expected_lse = reference.attention(*arrays)
    assert_close(out.astype(np.float64), expected, BASE["float16"])
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")
    names = [launch["kernel"] for launch in emulated.last_plan["launches"]]
    assert names == ["decode_f32_d64_v64_q1", "decode_merge_f16_d128"][: min(num_splits, 2)]


@BOTH
def test_hidden_values(seqlen_q: int) -> None:
    query, key, value = tensors(("float16", "float32", "bfloat16"), seqlen_q + 1, keys=60)
    value[:, -1] = np.nan
    out, _ = call_on("metal-emulated", umfa.flash_attn_func, query, key, value, causal=True)
    expected, _ = reference.attention(query[:, :-1], key[:, :-1], value[:, :-1], causal=True)
    assert_close(out[:, :-1].astype(np.float64), expected, BASE["float16"])
    assert np.isnan(out[:, -1]).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(
    ("new", "cache"), [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str
)
def test_new_rows_have_the_bits_of_the_cpu(new: str, cache: str) -> None:
    def on_cpu(*arrays: Array, **options: Any) -> None:
        umfa.flash_attn_with_kvcache(*arrays, backend="cpu", **options)

    def on_gpu(*arrays: Array, **options: Any) -> None:
        call_on("metal-emulated", umfa.flash_attn_with_kvcache, *arrays, **options)

    for found, expected in zip(
        appended(new, cache, on_gpu), appended(new, cache, on_cpu), strict=True
    ):
        nan = np.isnan(expected.astype(np.float32))
        assert np.array_equal(np.isnan(found.astype(np.float32)), nan)
        bits = f"u{expected.itemsize}"
        assert_same_bits(np.where(nan, 0, found.view(bits)), np.where(nan, 0, expected.view(bits)))


def test_a_narrow_cache_is_read_as_it_is() -> None:
    """Keys and values are read once, 2 bytes an element; no launch or scratch converts them."""
    query, key, value = (normal((1, n, 2, 64), seed=i) for i, n in enumerate((1, 512, 512)))
    for dtype, size in (("float32", 4), ("bfloat16", 2), ("float16", 2)):
        arrays = [query, key.astype(DTYPES[dtype]), value.astype(DTYPES[dtype])]
        with emulated.counting() as counters:
            emulated.call(*arrays, {"num_splits": 1})
        (launch,) = counters
        unused = emulated.last_plan["scratch_bytes"]
        assert unused == [4, 8], "one element for each buffer of partial results"
        assert launch.buffer_bytes_read[1] == launch.buffer_bytes_read[2] == size * key.size
