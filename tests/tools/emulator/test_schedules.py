"""Schedules and numerical modes: what they change and what they must not."""

from __future__ import annotations

import numpy as np

from tests.tools.emulator.emulator_kernels import floats, library, run
from tools.metal.emulator import KernelError, Options

SUM = """kernel void f(device const float* x [[buffer(0)]], device float* out [[buffer(1)]],
                       uint t [[thread_position_in_grid]]) { out[t] = simd_sum(x[t]); }"""


def test_schedules_give_the_same_results_and_counts() -> None:
    made = library("""
        kernel void f(device const float* x [[buffer(0)]], device float* out [[buffer(1)]],
                      uint t [[thread_index_in_threadgroup]], uint g [[thread_position_in_grid]]) {
            threadgroup float tile[96];
            float v = exp2(x[g]);
            for (int i = 0; i < 5; i++) {
                tile[t] = v;
                threadgroup_barrier(mem_flags::mem_threadgroup);
                v = tile[(t + 37) % 96] + simd_max(v) * 0.5f;
                threadgroup_barrier(mem_flags::mem_threadgroup);
            }
            out[g] = v;
        }""")
    x, results = floats(96 * 5), []
    for seed in (0, 1, 2, 77):
        out = np.zeros(96 * 5, np.float32)
        results.append((out.tobytes(), made.dispatch("f", 5, 96, {0: x, 1: out}, None, seed)))
    assert all(r == results[0] for r in results)


def test_schedules_differ() -> None:
    """Atomics tell the order in which threads and threadgroups ran."""
    made = library("""
        kernel void f(device atomic_uint* next [[buffer(0)]], device uint* out [[buffer(1)]],
                      uint t [[thread_position_in_grid]]) {
            out[t] = atomic_fetch_add_explicit(next, 1u, memory_order_relaxed);
        }""")
    seen = []
    for seed in (0, 1, 2, 1):
        out = np.zeros(256, np.uint32)
        made.dispatch("f", 4, 64, {0: np.zeros(1, np.uint32), 1: out}, None, seed)
        assert sorted(out) == list(range(256))
        seen.append(out.tolist())
    assert seen[0] == list(range(256))
    assert seen[1] != seen[0]
    assert seen[1] != seen[2]
    assert seen[1] == seen[3]


def test_random_schedules_find_what_one_order_hides() -> None:
    """Threads in order happen to fill the tile before it is read; the values then look right, and
    only the race check or another order shows the bug."""
    body = """kernel void f(device float* out [[buffer(0)]],
                 uint t [[thread_index_in_threadgroup]]) {
        threadgroup float tile[64];
        tile[t] = float(t);
        simd_sum(1.0f);
        out[t] = tile[t ^ 1];
    }"""
    expected = (np.arange(64) ^ 1).astype(np.float32)
    unchecked = Options(checks=False)
    out = np.zeros(64, np.float32)
    run(body, {0: out}, threads=64, options=unchecked)
    assert (out == expected).all()
    other = body.replace("t ^ 1", "63 - t")
    run(other, {0: out}, threads=64, options=unchecked)
    assert np.isnan(out).any()
    try:
        run(body, {0: out}, threads=64)
    except KernelError as error:
        assert error.check == "data race"  # noqa: PT017
    else:
        raise AssertionError("the race was not seen")


def test_reversed_reductions() -> None:
    x = floats(32) * np.logspace(-4, 4, 32).astype(np.float32)
    forward, backward = np.zeros(32, np.float32), np.zeros(32, np.float32)
    run(SUM, {0: x, 1: forward})
    run(SUM, {0: x, 1: backward}, options=Options(reverse_reductions=True))
    assert forward[0] == np.add.accumulate(x)[-1]
    assert backward[0] == np.add.accumulate(x[::-1])[-1]
    assert forward[0] != backward[0]


def test_flush_to_zero() -> None:
    body = """kernel void f(device const float* x [[buffer(0)]], device float* out [[buffer(1)]],
                            uint t [[thread_position_in_grid]]) { out[t] = x[t] * 0.5f; }"""
    tiny = np.full(32, np.finfo(np.float32).tiny, np.float32)
    out = np.ones(32, np.float32)
    run(body, {0: tiny, 1: out})
    assert (out == tiny / 2).all()
    run(body, {0: tiny, 1: out}, options=Options(flush_to_zero=True))
    assert (out == 0).all()
    assert tiny[0] / np.float32(2) > 0  # the mode ended with the dispatch


def test_math_noise_stays_within_the_bounds_of_fast_math() -> None:
    body = """kernel void f(device const float* x [[buffer(0)]], device float* out [[buffer(1)]],
                            uint t [[thread_position_in_grid]]) {
        out[t] = exp2(x[t]);
        out[t + 1024] = precise::exp2(x[t]);
    }"""
    x = np.linspace(-20, 20, 1024, dtype=np.float32)
    exact, noisy = np.zeros(2048, np.float32), np.zeros(2048, np.float32)
    more = {"threads": 1024}
    run(body, {0: x, 1: exact}, **more)  # type: ignore[arg-type]
    run(body, {0: x, 1: noisy}, options=Options(math_noise=True), **more)  # type: ignore[arg-type]
    assert (exact[1024:] == noisy[1024:]).all()
    ulps = np.abs(exact[:1024].view(np.int32) - noisy[:1024].view(np.int32))
    assert ulps.max() > 10
    assert (ulps <= 3 + np.floor(np.abs(2 * x))).all()


def test_permuted_lane_map_is_invisible_to_loads_and_stores() -> None:
    body = """kernel void f(device const float* x [[buffer(0)]], device float* out [[buffer(1)]],
                            device float* held [[buffer(2)]],
                            uint t [[thread_index_in_simdgroup]]) {
        simdgroup_float8x8 a, b;
        simdgroup_load(a, x, 8);
        simdgroup_load(b, x, 8, 0, true);
        simdgroup_multiply(b, a, b);
        simdgroup_store(b, out, 8);
        held[t] = a.thread_elements()[0];
        float row = a.thread_elements()[0] + a.thread_elements()[1];
        row += simd_shuffle_xor(row, 1);
        row += simd_shuffle_xor(row, 8);
        held[32 + umfa_lane_row() * 4 + umfa_lane_column() / 2] = row;
    }"""
    x = floats(64)
    results = []
    for permute in (False, True):
        out, held = np.zeros(64, np.float32), np.zeros(64, np.float32)
        run(body, {0: x, 1: out, 2: held}, options=Options(permute_lanes=permute))
        results.append((out, held))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert (results[0][1][:32] != results[1][1][:32]).any()
    # Sums along rows need no map: the lanes of a row differ in bits 0 and 3 in both.
    rows = np.repeat(x.reshape(8, 8).sum(1), 4)
    for _, held in results:
        np.testing.assert_allclose(held[32:], rows, rtol=1e-5, atol=1e-5)
