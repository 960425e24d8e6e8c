"""num_splits: into how many parts decoding cuts the keys."""

from __future__ import annotations

import numpy as np
import pytest

import umfa
from tests import reference
from tests.array_libraries import DTYPES, Array
from tests.attend import call_core
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close, assert_same_bits
from tests.sequences import offsets

pytestmark = pytest.mark.cpu_only

TILE = 64  # parts begin at its multiples


def part_of(keys: int, splits: int) -> int:
    """Keys of a part; 0: the backend chooses up to 32 parts of at least 512."""
    tiles = -(-keys // TILE)
    return max(512, -(-tiles // 32) * TILE) if splits == 0 else -(-tiles // splits) * TILE


def tensors(seqlen_q: int, seqlen_k: int, dtype: str = "float32") -> tuple[Array, Array, Array]:
    return (
        normal((2, seqlen_q, 4, 32), dtype, seed=1),
        normal((2, seqlen_k, 2, 32), dtype, seed=2),
        normal((2, seqlen_k, 2, 40), dtype, seed=3),
    )


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("splits", [1, 2, 7, 1000, 2**31 - 1])
def test_equals_the_reference(splits: int, dtype: str, isa: str) -> None:
    for seqlen_q, seqlen_k in ((1, 1500), (2, 65), (2, 3)):
        q, k, v = tensors(seqlen_q, seqlen_k, dtype)
        options = {"causal": True, "window_size": (1200, 0), "softcap": 3.0}
        found, lse = call_core(q, k, v, num_splits=splits, **options)
        expected, expected_lse = reference.attention(q, k, v, **options)
        assert_close(found.astype(np.float64), expected, BASE[dtype])
        assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")


def test_the_parts_are_those_asked_for() -> None:
    """Each length of the parts rounds in its own way; the same length gives the same bits."""
    keys = 4096
    q, k, v = tensors(1, keys)
    found = {
        splits: call_core(q, k, v, num_splits=splits)[0].tobytes()
        for splits in (0, 1, 2, 3, 4, 7, 8, 9, 16, 21, 22, 32, 60, 64, 1000, 2**31 - 1)
    }
    assert part_of(keys, 0) == part_of(keys, 8) == 512
    assert part_of(keys, 64) == part_of(keys, 1000) == TILE
    for a in found:
        for b in found:
            same_parts = part_of(keys, a) == part_of(keys, b)
            assert (found[a] == found[b]) == same_parts, (a, b)


def test_one_part_is_what_few_keys_are() -> None:
    """Up to 512 keys are one part whoever chooses; behind them, hidden keys make no other."""
    q, k, v = tensors(1, 4096)
    expected, _ = call_core(q, k[:, :512], v[:, :512])
    mask = np.arange(4096) < 512
    found, _ = call_core(q, k, v, num_splits=1, window_size=(-1, -1), attn_mask=mask)
    masked, _ = call_core(q, k[:, :512], v[:, :512], attn_mask=mask[:512])
    assert_same_bits(found.view("u4"), masked.view("u4"))
    one, _ = call_core(q, k[:, :512], v[:, :512], num_splits=1)
    assert_same_bits(one.view("u4"), expected.view("u4"))


def test_every_sequence_is_cut_by_its_own_length() -> None:
    lengths = [700, 64, 0, 2000]
    cu_q, cu_k = offsets([1, 1, 1, 1]), offsets(lengths)
    q = normal((4, 4, 32), seed=1)
    k, v = (normal((cu_k[-1], 2, 32), seed=i) for i in (2, 3))
    for splits in (1, 5):
        found, _ = call_core(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, num_splits=splits)
        for b in range(4):
            rows = slice(cu_k[b], cu_k[b + 1])
            alone, _ = call_core(
                q[None, b : b + 1], k[None, rows], v[None, rows], num_splits=splits
            )
            assert_same_bits(found[b].view("u4"), alone[0, 0].view("u4"), f"{splits}, {b}")


def test_many_queries_have_nothing_to_split() -> None:
    q, k, v = tensors(100, 1500)
    expected, _ = call_core(q, k, v)
    for splits in (1, 7):
        found, _ = call_core(q, k, v, num_splits=splits)
        assert_same_bits(found.view("u4"), expected.view("u4"))


@pytest.mark.parametrize("splits", [1, 2, 8])
def test_every_function_takes_it(splits: int) -> None:
    q, k, v = tensors(1, 2000)
    starts_q, starts_k = offsets([1, 1]), offsets([2000, 2000])
    packed = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    other, one = (call_core(q, k, v, num_splits=n)[0] for n in (3, splits))
    assert other.tobytes() != one.tobytes()
    cos, sin = np.ones((2000, 4), np.float32), np.zeros((2000, 4), np.float32)
    for found in (
        umfa.flash_attn_func(q, k, v, num_splits=splits),
        umfa.flash_attn_varlen_func(*packed, starts_q, starts_k, 1, 2000, num_splits=splits),
        umfa.fused_rope_attention(q, k, v, cos, sin, num_splits=splits),
    ):
        assert_same_bits(found.reshape(one.shape).view("u4"), one.view("u4"))
