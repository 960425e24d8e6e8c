"""Every kernel can be launched without function constants, as PyTorch and MLX launch kernels.

Constants are text, threadgroup memory is static, and parameters come in a buffer. The results have
the bits of a launch with function constants.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import reference
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close, assert_same_bits
from tests.metal import emulated

Array = np.ndarray[Any, np.dtype[Any]]
pytestmark = pytest.mark.usefixtures("own_settings")


def tensors(dtype: str, seqlen_q: int, seqlen_k: int) -> list[Array]:
    shapes = [(2, seqlen_q, 4, 64), (2, seqlen_k, 2, 64), (2, seqlen_k, 2, 64)]
    return [normal(shape, dtype, seed=i) for i, shape in enumerate(shapes)]


def bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(np.uint8)


def call(
    function_constants: bool,
    arrays: list[Array],
    options: dict[str, Any],
    **others: Any,
) -> tuple[list[str], list[Array]]:
    """The kernels launched, and what the call wrote: out, lse, and the caches."""
    emulated.settings.function_constants = function_constants
    query, *caches = (array.copy() for array in arrays)
    results = emulated.call(query, *caches, options, **others)
    return [x["kernel"] for x in emulated.last_plan["launches"]], [*results, *caches]


def call_twice(
    arrays: list[Array], options: dict[str, Any], **others: Any
) -> tuple[list[str], list[Array]]:
    _, usual = call(True, arrays, options, **others)
    kernels, inline = call(False, arrays, options, **others)
    for a, b in zip(inline, usual, strict=True):
        assert_same_bits(bits(a), bits(b))
    return kernels, inline


@pytest.mark.parametrize(
    ("dtype", "seqlen_q", "num_splits", "kernels"),
    [
        ("float16", 20, 0, ["forward_f16_d64_v64_k32_q2_f1"]),
        pytest.param("float32", 20, 0, ["forward_f32_d64_v64_k32"], marks=pytest.mark.slow),
        pytest.param(
            "bfloat16", 20, 0, ["forward_bf16_as_f32_d64_v64_k16"], marks=pytest.mark.slow
        ),
        pytest.param("float16", 2, 1, ["decode_f16_d64_v64_q1"], marks=pytest.mark.slow),
        ("float16", 2, 3, ["decode_f16_d64_v64_q1", "decode_merge_f16_d128"]),
    ],
)
def test_attention(dtype: str, seqlen_q: int, num_splits: int, kernels: list[str]) -> None:
    """With some of what function constants switch on, and some of what they leave out."""
    arrays = tensors(dtype, seqlen_q, 150)
    mask = normal((1, 4, seqlen_q, 150), "float32", seed=3)
    options = {"causal": True, "num_splits": num_splits}
    found, (out, lse, *_) = call_twice(arrays, options, attn_mask=mask)
    assert found == kernels
    expected, expected_lse = reference.attention(*arrays, causal=True, mask=mask)
    assert_close(out.astype(np.float64), expected, BASE[dtype])
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")


@pytest.mark.parametrize("seqlen_q", [2, 20])
def test_plain_attention(seqlen_q: int) -> None:
    """What takes the most of the kernels away."""
    arrays = tensors("float16", seqlen_q, 70)
    _, (out, *_) = call_twice(arrays, {"return_lse": False})
    assert_close(out.astype(np.float64), reference.attention(*arrays)[0], BASE["float16"])


@pytest.mark.parametrize("paged", [False, True])
def test_append_and_clear(paged: bool) -> None:
    """New rows go into the caches, rows of no sequence become 0, and sequences are attended to."""
    used, new, rows = np.array([30, 7]), 5, np.array([3, 1])
    query, key, value = tensors("float16", 3, 48)
    new_rows = [normal((2, new, 2, 64), "float16", seed=i) for i in (5, 6)]
    table = np.array([[4, 1, 0], [2, 5, 3]])
    options = {"causal": True}
    others = {"seqused_k": used, "seqused_q": rows}
    caches = [key, value]
    if paged:
        others["block_table"] = table
        caches = [cache.reshape(6, 16, 2, 64)[np.argsort(table.ravel())] for cache in caches]
    found, (out, lse, *after) = call_twice(
        [query, *caches], options, new_key=new_rows[0], new_value=new_rows[1], **others
    )
    assert [name.split("_")[0] for name in found] == ["append", "clear", "decode"]
    if paged:
        after = [cache[table.ravel()].reshape(key.shape) for cache in after]
    for cache, before, added in zip(after, (key, value), new_rows, strict=True):
        for b, n in enumerate(used):
            assert_same_bits(bits(cache[b, n : n + new]), bits(added[b]))
            assert_same_bits(bits(cache[b, :n]), bits(before[b, :n]))
    for b, n in enumerate(used + new):
        expected, expected_lse = reference.attention(
            query[b, None, : rows[b]], *(cache[b, None, :n] for cache in after), causal=True
        )
        assert_close(out[b, None, : rows[b]].astype(np.float64), expected, BASE["float16"])
        assert_close(lse[b, None, :, : rows[b]].astype(np.float64), expected_lse, LSE, "lse")
    assert (out[1, 1:] == 0).all()
    assert np.isneginf(lse[1, :, 1:]).all()
