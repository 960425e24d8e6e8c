"""Merging partial results, and the matrix of weights, through the whole host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests.array_libraries import DTYPES
from tests.cases import normal
from tests.checks import BASE, LSE, Tolerance, assert_close
from tests.metal.metal_tensors import MetalTensor, to_numpy
from tools.metal.double import Double
from tools.metal.double.gpus import Recorder

PARTS = (3, 2, 5, 3, 24)


def partial_results() -> tuple[Any, Any]:
    out_partial, lse_partial = normal(PARTS, seed=1), normal(PARTS[:-1], seed=2)
    lse_partial[1, 0] = -np.inf
    return out_partial, lse_partial


def check(found: tuple[Any, Any], expected: tuple[Any, Any], dtype: str = "float32") -> None:
    assert_close(found[0].astype(np.float64), expected[0].astype(np.float64), BASE[dtype])
    assert_close(found[1].astype(np.float64), expected[1].astype(np.float64), LSE, "lse")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_host_memory(dtype: str, emulated: Double) -> None:
    ours = partial_results()
    found, expected = (
        umfa.flash_attn_combine(*ours, out_dtype=DTYPES[dtype], backend=backend)
        for backend in ("metal", "cpu")
    )
    assert found[0].dtype == DTYPES[dtype]
    check(found, expected, dtype)


def test_metal_buffers(emulated: Double) -> None:
    ours = partial_results()
    tensors = [MetalTensor(emulated, array, 64) for array in ours]
    found = umfa.flash_attn_combine(*tensors)
    expected = umfa.flash_attn_combine(*ours, backend="cpu")
    check((to_numpy(emulated, found[0]), to_numpy(emulated, found[1])), expected)


def test_host_memory_stays_on_the_cpu(double: Double, recorder: Recorder) -> None:
    umfa.flash_attn_combine(*partial_results())
    assert not recorder.dispatches
    umfa.flash_attn_combine(*partial_results(), backend="metal")
    (dispatch,) = recorder.dispatches
    assert dispatch.name == "combine_f32_f32"


CALLS: dict[str, dict[str, Any]] = {
    "dense": {},
    "causal": {"causal": True, "alibi_slopes": normal((2, 4), seed=9)},
}


@pytest.mark.parametrize("name", ["causal", pytest.param("dense", marks=pytest.mark.slow)])
def test_weights_of_dense_calls(name: str, emulated: Double) -> None:
    options = CALLS[name]
    q, k, v = (normal((2, n, h, 16), seed=i) for i, (n, h) in enumerate([(9, 4), (40, 2), (40, 2)]))
    found, expected = (
        umfa.flash_attn_func(
            q, k, v, 0.3, return_attn_probs=True, dropout_seed=4, backend=backend, **options
        )[2]
        for backend in ("metal", "cpu")
    )
    assert (np.sign(found) == np.sign(expected)).all()
    assert_close(found.astype(np.float64), expected.astype(np.float64), Tolerance(2e-6, 1e-5))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_in_metal_buffers(dtype: str, emulated: Double) -> None:
    """Nobody reads the caller's buffers on the host, and the matrix is one of Metal's."""
    arrays = [normal((2, n, 2, 16), dtype, seed=n) for n in (9, 40, 40)]
    options: dict[str, Any] = {"return_attn_probs": True, "dropout_seed": 4}
    expected = umfa.flash_attn_func(*arrays, 0.3, **options, backend="cpu")[2]
    tensors = [MetalTensor(emulated, array, 64) for array in arrays]
    found = to_numpy(emulated, umfa.flash_attn_func(*tensors, 0.3, **options)[2])
    assert found.dtype == dtype
    assert (np.sign(found) == np.sign(expected)).all()
    assert_close(found.astype(np.float64), expected.astype(np.float64), BASE[dtype])


def test_weights_of_packed_sequences_in_metal_buffers(emulated: Double) -> None:
    arrays = [normal((n, 2, 16), seed=n) for n in (12, 45, 45)]
    tables = np.array([0, 9, 12], np.int32), np.array([0, 40, 45], np.int32)
    options: dict[str, Any] = {"return_attn_probs": True, "dropout_seed": 4}
    call = (*tables, 9, 40, 0.3)
    expected = umfa.flash_attn_varlen_func(*arrays, *call, **options, backend="cpu")[2]
    tensors = [MetalTensor(emulated, array) for array in arrays]
    found = umfa.flash_attn_varlen_func(*tensors, *call, **options)[2]
    matrix = to_numpy(emulated, found)
    assert matrix.shape == (2, 2, 9, 40)
    assert (np.sign(matrix) == np.sign(expected)).all()
    assert_close(matrix.astype(np.float64), expected.astype(np.float64), Tolerance(2e-6, 1e-5))
