"""Pointers into what is bound: they compare and differ as those into the host's memory."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tools.emulator.emulator_kernels import floats, library, run
from tools.metal.emulator import KernelError, Options

POINTERS = """kernel void f(device long* out [[buffer(0)]], device const float* a [[buffer(1)]],
                     device const float* b [[buffer(2)]], constant float* c [[buffer(3)]],
                     constant float* d [[buffer(4)]], device const float* tail [[buffer(5)]],
                     device const float* other [[buffer(6)]],
                     uint t [[thread_position_in_grid]]) {
    if (t > 0) return;
    out[0] = a == b;
    out[1] = a != b;
    out[2] = c == d;
    out[3] = b - a;
    out[4] = tail - a;
    out[5] = tail > a;
    out[6] = (ulong)tail - (ulong)a;
    out[7] = a == other;
    out[8] = a + 8 == tail;
    out[9] = a != nullptr;
}"""
SAME = [1, 0, 1, 0, 8, 1, 32, 0, 1, 1]


@pytest.mark.parametrize("checks", [True, False])
def test_one_array_at_two_indices(checks: bool) -> None:
    whole, out = floats(40), np.zeros(10, np.int64)
    run(
        POINTERS,
        {0: out, 1: whole, 2: whole, 3: whole, 4: whole, 5: whole[8:], 6: floats(40)},
        options=Options(checks=checks),
    )
    assert out.tolist() == SAME


def test_one_array_with_two_offsets() -> None:
    """As ``setBuffer:offset:`` binds one buffer twice."""
    out = np.zeros(1, np.int64)
    text = """kernel void f(device long* out [[buffer(0)]], device const float* a [[buffer(1)]],
                           device const float* b [[buffer(2)]]) { out[0] = b - a; }"""
    whole = floats(40)
    library(text).dispatch("f", 1, 1, {0: out, 1: whole, 2: whole}, buffer_offsets={1: 16, 2: 48})
    assert out[0] == 8


def test_a_mask_that_may_be_the_input() -> None:
    """ggml's softmax: what is bound twice is not there."""
    text = """kernel void f(device const float* src0 [[buffer(0)]],
                     device const float* src1 [[buffer(1)]], device float* out [[buffer(2)]],
                     uint t [[thread_position_in_grid]]) {
        const float bias = src1 != src0 ? src1[t] : 0.0f;
        out[t] = src0[t] + bias;
    }"""
    x, out = floats(32), np.zeros(32, np.float32)
    run(text, {0: x, 1: x, 2: out})
    assert (out == x).all()
    run(text, {0: x, 1: floats(32, 2), 2: out})
    assert (out == x + floats(32, 2)).all()


def test_bounds_stay_those_of_each_binding() -> None:
    """Of two views of one array each ends where it ends, though the other goes on there."""
    text = """kernel void f(device float* out [[buffer(0)]], device const float* a [[buffer(1)]],
                     device const float* b [[buffer(2)]], uint t [[thread_position_in_grid]]) {
        out[t] = a[t + %d] + b[t];
    }"""
    whole, out = floats(64), np.zeros(32, np.float32)
    buffers = {0: out, 1: whole[:32], 2: whole[32:]}
    with pytest.raises(KernelError, match="4 bytes at byte 128 of buffer 1, which has 128"):
        run(text % 1, buffers)
    run(text % 0, buffers)
    assert (out == whole[:32] + whole[32:]).all()


def test_loops_over_pointers() -> None:
    text = """kernel void f(device float* out [[buffer(0)]], device const float* a [[buffer(1)]],
                     constant uint& n [[buffer(2)]]) {
        float total = 0.0f;
        device const float* end = a + n;
        for (device const float* p = a; p != end; p++) total += *p;
        for (device const float* p = end; p > a; p -= 2) total += p[-1];
        out[0] = total;
    }"""
    x, out = np.arange(10, dtype=np.float32), np.zeros(1, np.float32)
    run(text, {0: out, 1: x, 2: np.uint32(10).tobytes()}, threads=1)
    assert out[0] == 45 + 25
