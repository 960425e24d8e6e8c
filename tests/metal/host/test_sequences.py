"""Packed and cached sequences through the whole host: tables become data of the plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests.cases import normal
from tests.checks import BASE, LSE, Tolerance, assert_close, assert_same_bits
from tests.metal.metal_tensors import MetalTensor, to_numpy
from tests.sequences import rotary_tables
from tools.metal.double import Double
from tools.metal.double.gpus import Recorder

SEQUENCES, TASKS, PAGES = 8, 9, 10
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
    for sequences in (40, 1000):
        cu = np.arange(sequences + 1, dtype=np.int32)
        x = np.zeros((sequences, 1, 32), np.float32)
        before = umfa.stats()
        umfa.flash_attn_varlen_func(x, x, x, cu, cu, 1, 1, backend="metal")
        after = umfa.stats()
        bound = recorder.dispatches[-1].buffers
        for index, item in ((SEQUENCES, 88), (TASKS, 16)):
            assert bound[index].is_bytes == (sequences * item < 4096)
            assert bound[index].length == sequences * item
        assert after.tensors_in_place - before.tensors_in_place == 4
        assert after.bytes_copied == before.bytes_copied
    assert PAGES not in bound


def test_no_memory_for_a_table(double: Double) -> None:
    x, cu = np.zeros((1000, 1, 32), np.float32), np.arange(1001, dtype=np.int32)
    double.fault("buffer", skip=2)  # two are for intermediate results
    with pytest.raises(MemoryError, match=r"no memory for a table of sequences; got 88000 bytes"):
        umfa.flash_attn_varlen_func(x, x, x, cu, cu, 1, 1, backend="metal")


# ---- new rows ------------------------------------------------------------------------------------

Arrays = list[np.ndarray[Any, np.dtype[Any]]]
KEY, VALUE, NEW_KEY, NEW_VALUE = range(4)


def new_rows(dtype: str = "float16", new: int = 9) -> tuple[Arrays, dict[str, Any]]:
    """q, caches, k, v, and what goes with them. What no row fills is NaN."""
    query = normal((2, 3, 4, 64), dtype, seed=0)
    caches = [normal((3, 90, 2, 64), dtype, seed=i) for i in (1, 2)]
    rows = [normal((2, new, 2, 64), dtype, seed=i) for i in (3, 4)]
    for cache in caches:
        cache[1] = np.nan
        cache[2, 81:] = cache[0, 33:] = np.nan
    options: dict[str, Any] = {
        "cache_seqlens": np.array([81, 33]), "cache_batch_idx": np.array([2, 0]), "causal": True,
        "return_softmax_lse": True,
        **dict(zip(("rotary_cos", "rotary_sin"), rotary_tables(90, 32), strict=True)),
    }  # fmt: skip
    return [query, *caches, *rows], options


@pytest.fixture(scope="module")
def expected() -> tuple[Any, Arrays]:
    """What the CPU gives: its results, and the caches afterwards."""
    arrays, options = new_rows()
    return umfa.flash_attn_with_kvcache(*arrays, **options, backend="cpu"), arrays[1:3]


def assert_appended(found: Any, caches: Arrays, expected: tuple[Any, Arrays]) -> None:
    results, expected_caches = expected
    assert_close(found[0].astype(np.float64), results[0].astype(np.float64), BASE["float16"])
    assert_close(found[1].astype(np.float64), results[1].astype(np.float64), Tolerance(1e-3, 0))
    for mine, theirs in zip(caches, expected_caches, strict=True):
        np.testing.assert_allclose(mine.astype(float), theirs.astype(float), rtol=1e-3, atol=1e-3)
    untouched = np.isnan(expected_caches[1])
    assert_same_bits(
        caches[1][~untouched].view(np.uint16), expected_caches[1][~untouched].view(np.uint16)
    )


def test_append_in_place(emulated: Double, expected: tuple[Any, Arrays]) -> None:
    arrays, options = new_rows()
    before = umfa.stats()
    found = umfa.flash_attn_with_kvcache(*arrays, **options, backend="metal")
    assert_appended(found, arrays[1:3], expected)
    assert umfa.stats().tensors_copied == before.tensors_copied


def test_append_to_copies_that_come_home(emulated: Double, expected: tuple[Any, Arrays]) -> None:
    """Where Metal cannot map the caches: copied in, since old rows are read, and back."""
    arrays, options = new_rows()
    backs = [np.full((3, 90, 2, 2 * 64), 7, np.float16) for _ in range(2)]
    caches = [back[..., :64] for back in backs]
    for to, cache in zip(caches, arrays[1:3], strict=True):
        to[...] = cache
    emulated.fault("no_copy", count=100)
    before = umfa.stats()
    found = umfa.flash_attn_with_kvcache(
        arrays[0], *caches, *arrays[3:], **options, backend="metal"
    )
    assert umfa.stats().tensors_copied - before.tensors_copied == 9
    assert_appended(found, caches, expected)
    for back in backs:  # what lies between rows is not the caches'
        assert (back[..., 64:] == 7).all()


def test_append_to_metal_buffers(emulated: Double, expected: tuple[Any, Arrays]) -> None:
    arrays, options = new_rows()
    tensors = [MetalTensor(emulated, array, 64 * i) for i, array in enumerate(arrays)]
    for name in ("rotary_cos", "rotary_sin"):
        options[name] = MetalTensor(emulated, options[name], 8)
    found = umfa.flash_attn_with_kvcache(*tensors, **options)
    assert_appended(
        [to_numpy(emulated, x) for x in found],
        [to_numpy(emulated, x) for x in tensors[1:3]],
        expected,
    )


def test_append_reaches_the_callers_memory(double: Double, recorder: Recorder) -> None:
    """One launch before the others, whose buffers are where the caller has them."""
    arrays, options = new_rows()
    umfa.flash_attn_with_kvcache(*arrays, **options, backend="metal")
    append, *_, last = recorder.dispatches
    assert append.name == "append_f16"
    assert last.name.startswith("decode")
    addresses = {i: b.data + b.offset for i, b in append.buffers.items() if not b.is_bytes}
    for index, array in zip((KEY, VALUE, NEW_KEY, NEW_VALUE), arrays[1:], strict=True):
        assert addresses[index] == array.ctypes.data


@pytest.mark.parametrize("seqlen_q", [0, 20])
def test_append_for_many_queries_and_none(seqlen_q: int, emulated: Double) -> None:
    caches = [normal((2, 40, 2, 32), seed=i) for i in (1, 2)]
    rows = [normal((2, 11, 2, 32), seed=i) for i in (3, 4)]
    query = normal((2, seqlen_q, 2, 32), seed=0)
    results = []
    for backend in ("metal", "cpu"):
        own = [cache.copy() for cache in caches]
        out = umfa.flash_attn_with_kvcache(
            query, *own, *rows, cache_seqlens=np.array([29, 7]), causal=True, backend=backend
        )
        results.append((out, *own))
    assert_close(results[0][0].astype(np.float64), results[1][0], BASE["float32"])
    for mine, theirs in zip(results[0][1:], results[1][1:], strict=True):
        assert_same_bits(mine.view(np.uint32), theirs.view(np.uint32), "cache")
