"""Merging partial results, through the whole host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests.array_libraries import DTYPES
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close
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
