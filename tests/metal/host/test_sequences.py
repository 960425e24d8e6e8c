"""Packed and cached sequences through the whole host: tables become data of the plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from metal_double import Double
from metal_gpus import Recorder
from metal_tensors import MetalTensor, to_numpy

import umfa
from cases import normal
from checks import BASE, LSE, assert_close

SEQUENCES, TASKS, PAGES = 11, 12, 13
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "chunk": {"attention_chunk": 16, "causal": True},
    "sink": {"learnable_sink": normal((4,), seed=9)},
}


def assert_same(found: Any, expected: Any, dtype: str) -> None:
    assert_close(found[0].astype(np.float64), expected[0].astype(np.float64), BASE[dtype])
    assert_close(found[1].astype(np.float64), expected[1].astype(np.float64), LSE, "lse")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("few", [False, True])
def test_varlen(few: bool, options: dict[str, Any], emulated: Double) -> None:
    """As the CPU, rows that no sequence uses included."""
    cu_q = np.array([0, 3, 3, 4, 10] if few else [0, 10, 10, 75, 90], np.int32)
    cu_k = np.array([0, 40, 60, 60, 150], np.int64)
    q = normal((int(cu_q[-1]) + 5, 4, 64), "float16", seed=0)
    k, v = (normal((150, 2, 64), "float16", seed=i) for i in (1, 2))
    results = [
        umfa.flash_attn_varlen_func(
            *(q, k, v, cu_q, cu_k, None, None), return_attn_probs=True, backend=backend, **options
        )
        for backend in ("metal", "cpu")
    ]
    assert_same(*results, "float16")
    assert (results[0][0][-5:] == 0).all()


@pytest.mark.parametrize("seqlen_q", [1, 30])
def test_pages(seqlen_q: int, emulated: Double) -> None:
    q = normal((2, seqlen_q, 4, 64), seed=0)
    k, v = (normal((9, 40, 2, 64), seed=i) for i in (1, 2))
    table = np.array([[3, 0, 8, 5], [7, 2, 1, -1]], np.int32)
    results = [
        umfa.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=np.array([150, 95], np.int32), block_table=table, causal=True,
            return_softmax_lse=True, backend=backend,
        )
        for backend in ("metal", "cpu")
    ]  # fmt: skip
    assert_same(*results, "float32")


def test_caches_in_metal_buffers(emulated: Double) -> None:
    arrays = [normal((2, 1, 4, 64), seed=0), *(normal((3, 90, 4, 64), seed=i) for i in (1, 2))]
    options: dict[str, Any] = {
        "cache_seqlens": np.array([90, 33]), "cache_batch_idx": np.array([2, 0]),
        "cache_leftpad": np.array([5, 0]),
    }  # fmt: skip
    expected = umfa.flash_attn_with_kvcache(*arrays, **options, backend="cpu")
    tensors = [MetalTensor(emulated, array, 64) for array in arrays]
    sinks = MetalTensor(emulated, np.full(4, -np.inf, np.float32))
    found = umfa.flash_attn_with_kvcache(*tensors, **options, learnable_sink=sinks)
    assert_close(to_numpy(emulated, found).astype(np.float64), expected, BASE["float32"])


def test_small_tables_are_bytes_and_large_ones_buffers(double: Double, recorder: Recorder) -> None:
    x = np.zeros((1, 4, 64), np.float32)
    for sequences in (50, 1000):
        cu = np.arange(sequences + 1, dtype=np.int32)
        x = np.zeros((sequences, 1, 32), np.float32)
        before = umfa.stats()
        umfa.flash_attn_varlen_func(x, x, x, cu, cu, 1, 1, backend="metal")
        after = umfa.stats()
        bound = recorder.dispatches[-1].buffers
        for index, item in ((SEQUENCES, 72), (TASKS, 16)):
            assert bound[index].is_bytes == (sequences * item < 4096)
            assert bound[index].length == sequences * item
        assert after.tensors_in_place - before.tensors_in_place == 4
        assert after.bytes_copied == before.bytes_copied
    assert PAGES not in bound


def test_no_memory_for_a_table(double: Double) -> None:
    x, cu = np.zeros((1000, 1, 32), np.float32), np.arange(1001, dtype=np.int32)
    double.fault("buffer")
    with pytest.raises(MemoryError, match=r"no memory for a table of sequences; got 72000 bytes"):
        umfa.flash_attn_varlen_func(x, x, x, cu, cu, 1, 1, backend="metal")


def test_what_is_not_there_yet_says_so(double: Double) -> None:
    q, k_cache, v_cache, k, v = (np.zeros((1, n, 2, 32), np.float32) for n in (1, 20, 20, 1, 1))
    tensors = (q, k_cache, v_cache, k, v)
    possible, reason = umfa.can_run(
        umfa.flash_attn_with_kvcache, *tensors, cache_seqlens=5, backend="metal"
    )
    assert not possible
    assert "is not implemented" in reason
    with pytest.raises(umfa.UnsupportedError, match=r"\(metal: .* is not implemented\)"):
        umfa.flash_attn_with_kvcache(*tensors, cache_seqlens=5, backend="metal")
