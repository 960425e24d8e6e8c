"""Names of other versions for what there is: s_aux, return_lse; masks beside everything else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.array_libraries import Framework
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close, assert_same_bits
from tests.sequences import offsets

QUERY, KEY = normal((2, 7, 4, 8), seed=1), normal((2, 9, 4, 8), seed=2)
SINK = normal((4,), seed=3)
CU_Q, CU_K = offsets([7, 7]), offsets([9, 9])
PACKED = QUERY.reshape(14, 4, 8), KEY.reshape(18, 4, 8), KEY.reshape(18, 4, 8)
QKV = np.stack([KEY] * 3, axis=2)

CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "func": (umfa.flash_attn_func, (QUERY, KEY, KEY)),
    "qkvpacked": (umfa.flash_attn_qkvpacked_func, (QKV,)),
    "kvpacked": (umfa.flash_attn_kvpacked_func, (QUERY, QKV[:, :, 1:])),
    "varlen": (umfa.flash_attn_varlen_func, (*PACKED, CU_Q, CU_K, 7, 9)),
    "varlen qkvpacked": (
        umfa.flash_attn_varlen_qkvpacked_func, (QKV.reshape(18, 3, 4, 8), CU_K, 9),
    ),
    "varlen kvpacked": (
        umfa.flash_attn_varlen_kvpacked_func,
        (PACKED[0], QKV[:, :, 1:].reshape(18, 2, 4, 8), CU_Q, CU_K, 7, 9),
    ),
    "kvcache": (umfa.flash_attn_with_kvcache, (QUERY, KEY, KEY)),
    "rope": (
        umfa.fused_rope_attention,
        (QUERY, KEY, KEY, np.ones((9, 4), np.float32), np.zeros((9, 4), np.float32)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_s_aux_is_learnable_sink(name: str) -> None:
    function, tensors = CALLS[name]
    found = function(*tensors, s_aux=SINK)
    assert_same_bits(found, function(*tensors, learnable_sink=SINK))
    assert not np.array_equal(found, function(*tensors))
    with pytest.raises(ValueError, match="learnable_sink and s_aux exclude each other; got both"):
        function(*tensors, s_aux=SINK, learnable_sink=SINK)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "kvcache"])
def test_return_lse_is_a_pair(name: str) -> None:
    function, tensors = CALLS[name]
    found = function(*tensors, return_lse=True)
    out, lse, weights = function(*tensors, return_attn_probs=True)
    assert isinstance(found, tuple)
    assert len(found) == 2
    assert_same_bits(found[0], out)
    assert_same_bits(found[1], lse)
    assert weights is None
    with pytest.raises(ValueError, match="return_lse and return_attn_probs exclude each other"):
        function(*tensors, return_lse=True, return_attn_probs=True)
    with pytest.raises(TypeError, match="return_lse is not a bool; got 'yes'"):
        function(*tensors, return_lse="yes")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_masks_go_with_every_function(name: str, kind: str) -> None:
    """`reference` tells what a call without tables must give; all of these ask the same."""
    function, tensors = CALLS[name]
    query = KEY if "qkv" in name else QUERY
    mask: Any = np.random.default_rng(5).random((2, 1, query.shape[1], 9)) < 0.6
    if kind == "float32":
        mask = np.where(mask, normal(mask.shape, seed=7), -np.inf).astype(np.float32)
    out = function(*tensors, attn_mask=mask, causal=True)
    expected, _ = reference.attention(query, KEY, KEY, mask=mask, causal=True)
    assert_close(out.reshape(expected.shape).astype(float), expected, BASE["float32"])


def test_a_mask_of_sequences_is_about_each_of_them(framework: Framework) -> None:
    lengths_q, lengths_k = [3, 0, 8, 1], [5, 4, 9, 0]
    query = normal((12, 4, 8), seed=1)
    key, value = normal((18, 2, 8), seed=2), normal((18, 2, 8), seed=3)
    # Wider than the longest: a cache's columns may go on.
    mask = np.random.default_rng(6).random((4, 4, 8, 13)) < 0.7
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    make = framework.tensor
    out, lse = umfa.flash_attn_varlen_func(
        make(query), make(key), make(value), make(cu_q), make(cu_k), 8, 9, causal=True,
        attn_mask=make(mask), return_lse=True,
    )  # fmt: skip
    for b in range(4):
        q, k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        own = mask[b, :, : lengths_q[b], : lengths_k[b]]
        exact, exact_lse = reference.attention(
            query[None, q], key[None, k], value[None, k], mask=own, causal=True
        )
        assert_close(framework.float64(out)[None, q], exact, BASE["float32"])
        assert_close(framework.float64(lse)[None, :, q], exact_lse, LSE, "lse")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 4, 7, 8), "(2, 4, 7, 9)"),
        ((3, 1, 1, 9), "(2, 4, 7, 9)"),
        ((2, 4, 6, 9), "(2, 4, 7, 9)"),
        ((1, 2, 4, 7, 9), "(2, 4, 7, 9)"),
    ],
)
def test_masks_of_sequences_that_do_not_fit(shape: tuple[int, ...], expected: str) -> None:
    function, tensors = CALLS["varlen"]
    with pytest.raises(ValueError, match="attn_mask has the wrong shape") as caught:
        function(*tensors, attn_mask=np.ones(shape, bool))
    assert str(shape) in str(caught.value)
    assert f"a shape that broadcasts to {expected} (the longest sequences)" in str(caught.value)
