"""Counters, against counts made by hand."""

from __future__ import annotations

import numpy as np

from tests.tools.emulator.emulator_kernels import floats, run
from tools.metal.emulator import Options

BODY = """
constant float weights[2] = {1.0f, 2.0f};
kernel void f(device const float4* x [[buffer(0)]], device float* out [[buffer(1)]],
              constant float& scale [[buffer(2)]],
              uint t [[thread_index_in_threadgroup]], uint g [[thread_position_in_grid]]) {
    threadgroup float tile[64];
    tile[t] = dot(x[g], float4(scale));
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float v = tile[63 - t] * 3.0f;
    v = exp2(v) + simd_shuffle_xor(v, 1);
    simdgroup_barrier(mem_flags::mem_none);
    v = simd_sum(v);
    simdgroup_float8x8 m(1.0f);
    simdgroup_multiply_accumulate(m, m, m, m);
    out[g] = v + m.thread_elements()[0];
}"""


def test_counts() -> None:
    threads, groups = 64, 3
    n = threads * groups
    simdgroups = n // 32
    for checks in (True, False):
        x, out = floats(4 * n), np.zeros(n, np.float32)
        counters = run(
            BODY,
            {0: x, 1: out, 2: np.float32(1).tobytes()},
            threads=threads,
            threadgroups=groups,
            options=Options(checks=checks),
        )
        assert counters.mma == simdgroups
        assert counters.exp2 == n
        assert counters.shuffles == simdgroups
        assert counters.simd_operations == simdgroups
        assert counters.threadgroup_barriers == groups
        assert counters.simdgroup_barriers == simdgroups
        assert counters.threadgroups == groups
        assert counters.threadgroup_memory == 256
        assert counters.device_bytes_read == 16 * n
        assert counters.device_bytes_written == 4 * n
        assert counters.constant_bytes_read == 4 * n
        assert counters.threadgroup_bytes_read == 4 * n
        assert counters.threadgroup_bytes_written == 4 * n
        # dot: a product and three fused; then *, + and +.
        assert counters.fma == 3 * n
        assert counters.flops == (1 + 6 + 3) * n
        if checks:
            assert counters.buffer_bytes_read == {0: 16 * n, 1: 0, 2: 4 * n}
            assert counters.buffer_bytes_written == {0: 0, 1: 4 * n, 2: 0}


def test_functions_that_stay_out_of_line_are_counted() -> None:
    """Their names may hold those of the emulator's types, which pass structs on."""
    body = """
struct Place { short row, column; };
__attribute__((noinline)) float at(threadgroup const float* tile, Place place) {
    return tile[place.row * 8 + place.column] * 3.0f;
}
kernel void f(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
    threadgroup float tile[64];
    tile[t] = float(t);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    Place place;
    place.row = t / 8;
    place.column = t % 8;
    out[t] = at(tile, place);
}"""
    counters = run(body, {0: np.zeros(64, np.float32)}, threads=64)
    assert counters.threadgroup_bytes_read == 4 * 64
    assert counters.flops == 64
