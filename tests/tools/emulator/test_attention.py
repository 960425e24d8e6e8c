"""Whole kernels: a tiled matrix product and a small flash attention, and how fast they run."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests import reference
from tests.tools.emulator.emulator_kernels import floats, library
from tools.metal.emulator import Library, Options

MATMUL = """
struct Sizes { uint m, n, k; };

// 32x32 of c per threadgroup, 16x16 per simdgroup.
template <typename T, int BK>
[[kernel, max_total_threads_per_threadgroup(128)]] void matmul(
    device const T* a [[buffer(0)]], device const T* b [[buffer(1)]], device float* c [[buffer(2)]],
    constant Sizes& sizes [[buffer(3)]], uint2 group [[threadgroup_position_in_grid]],
    uint tid [[thread_index_in_threadgroup]], uint sg [[simdgroup_index_in_threadgroup]]) {
    constexpr int LDA = BK + 8, LDB = 32 + 8;
    threadgroup T as[32 * LDA];
    threadgroup T bs[BK * LDB];
    simdgroup_float8x8 acc[2][2];
    for (int i = 0; i < 4; i++) acc[i / 2][i % 2] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    const uint row = group.y * 32, column = group.x * 32, r0 = sg / 2 * 16, c0 = sg % 2 * 16;
    typedef vec<T, 4> T4;
    for (uint k = 0; k < sizes.k; k += BK) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = tid; i < 32 * BK / 4; i += 128) {
            const uint ra = i / (BK / 4), ca = i % (BK / 4) * 4, rb = i / 8, cb = i % 8 * 4;
            *(threadgroup T4*)(as + ra * LDA + ca) =
                *(device const T4*)(a + (row + ra) * sizes.k + k + ca);
            *(threadgroup T4*)(bs + rb * LDB + cb) =
                *(device const T4*)(b + (k + rb) * sizes.n + column + cb);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int kk = 0; kk < BK; kk += 8) {
            simdgroup_matrix<T, 8, 8> fa[2], fb[2];
            for (int i = 0; i < 2; i++) {
                simdgroup_load(fa[i], as + (r0 + 8 * i) * LDA + kk, LDA);
                simdgroup_load(fb[i], bs + kk * LDB + c0 + 8 * i, LDB);
            }
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 2; j++)
                    simdgroup_multiply_accumulate(acc[i][j], fa[i], fb[j], acc[i][j]);
        }
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++)
            simdgroup_store(acc[i][j], c + (row + r0 + 8 * i) * sizes.n + column + c0 + 8 * j,
                            sizes.n);
}
template [[host_name("matmul_half")]] [[kernel]] decltype(matmul<half, 32>) matmul<half, 32>;
template [[host_name("matmul_float")]] [[kernel]] decltype(matmul<float, 16>) matmul<float, 16>;
"""

ATTENTION = """
constant bool causal [[function_constant(0)]];

// Eight queries per simdgroup, scores and probabilities in registers, keys straight from memory.
template <int D>
[[kernel]] void attention(device const half* q [[buffer(0)]], device const half* k [[buffer(1)]],
                          device const half* v [[buffer(2)]], device float* o [[buffer(3)]],
                          constant uint& length [[buffer(4)]], constant float& scale [[buffer(5)]],
                          uint3 group [[threadgroup_position_in_grid]],
                          ushort sg [[simdgroup_index_in_threadgroup]]) {
    const ushort row = umfa_lane_row(), column = umfa_lane_column();
    const uint base = group.y * length * D, first = group.x * 32 + sg * 8;
    simdgroup_half8x8 qs[D / 8];
    simdgroup_float8x8 os[D / 8];
    for (int d = 0; d < D / 8; d++) {
        simdgroup_load(qs[d], q + base + first * D + d * 8, D);
        os[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    float most = -FLT_MAX, total = 0.0f;
    const uint end = causal ? first + 8 : length;
    for (uint j = 0; j < end; j += 8) {
        auto s = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        for (int d = 0; d < D / 8; d++) {
            simdgroup_half8x8 ks;
            simdgroup_load(ks, k + base + j * D + d * 8, D, ulong2(0), true);
            simdgroup_multiply_accumulate(s, qs[d], ks, s);
        }
        float2 x = s.thread_elements() * scale;
        if (causal) {
            if (j + column > first + row) x[0] = -FLT_MAX;
            if (j + column + 1 > first + row) x[1] = -FLT_MAX;
        }
        float next = max(most, max(x[0], x[1]));
        next = max(next, simd_shuffle_xor(next, 1));
        next = max(next, simd_shuffle_xor(next, 8));
        const float keep = fast::exp2(most - next);
        const float2 p = fast::exp2(x - next);
        total = total * keep + p[0] + p[1];
        most = next;
        simdgroup_half8x8 ps;
        ps.thread_elements() = half2(p);
        for (int d = 0; d < D / 8; d++) {
            simdgroup_half8x8 vs;
            simdgroup_load(vs, v + base + j * D + d * 8, D);
            os[d].thread_elements() *= keep;
            simdgroup_multiply_accumulate(os[d], ps, vs, os[d]);
        }
    }
    total += simd_shuffle_xor(total, 1);
    total += simd_shuffle_xor(total, 8);
    for (int d = 0; d < D / 8; d++) {
        os[d].thread_elements() *= 1.0f / total;
        simdgroup_store(os[d], o + base + first * D + d * 8, D);
    }
}
template [[host_name("attention")]] [[kernel]] decltype(attention<32>) attention<32>;
"""


@pytest.fixture(scope="module")
def libraries() -> dict[bool, Library]:
    checked, unchecked = Library.build_all(
        [lambda c=c: library(MATMUL, options=Options(checks=c)) for c in (True, False)]  # type: ignore[misc]
    )
    return {True: checked, False: unchecked}


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize(("name", "dtype"), [("half", np.float16), ("float", np.float32)])
def test_tiled_matrix_product(
    libraries: dict[bool, Library], checks: bool, name: str, dtype: type
) -> None:
    m, n, k = 96, 128, 256
    a, b = (
        floats(m * k, 1).reshape(m, k).astype(dtype),
        floats(k * n, 2).reshape(k, n).astype(dtype),
    )
    expected = a.astype(np.float64) @ b.astype(np.float64)
    for seed, permute in ((0, False), (5, True)):
        c = np.full((m, n), np.nan, np.float32)
        start = time.perf_counter()
        counters = libraries[checks].dispatch(
            f"matmul_{name}",
            (n // 32, m // 32),
            128,
            {0: a, 1: b, 2: c, 3: np.uint32([m, n, k]).tobytes()},
            schedule_seed=seed,
            options=Options(permute_lanes=permute),
        )
        seconds = time.perf_counter() - start
        np.testing.assert_allclose(c, expected, atol=1e-3)
        assert counters.mma == m * n * k // 512
        assert counters.device_bytes_read == (m // 32) * (n // 32) * 64 * k * a.itemsize
        assert counters.device_bytes_written == c.nbytes
        print(f"{name}, checks {checks}, seed {seed}: {2 * m * n * k / seconds / 1e9:.2f} GFLOP/s")


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal: bool) -> None:
    heads, length, width = 2, 96, 32
    q, k, v = (
        floats(heads * length * width, s).reshape(heads, length, width).astype(np.float16)
        for s in (1, 2, 3)
    )
    scale = width**-0.5
    expected = reference.scaled_dot_product(q, k, v, is_causal=causal)
    made = library(ATTENTION, constants={0: causal})
    for seed, options in (
        (0, Options()),
        (1, Options(permute_lanes=True, math_noise=True, flush_to_zero=True)),
    ):
        out = np.full((heads, length, width), np.nan, np.float32)
        counters = made.dispatch(
            "attention",
            (length // 32, heads),
            128,
            {
                **dict(enumerate((q, k, v, out))),
                4: np.uint32(length).tobytes(),
                5: np.float32(scale * np.log2(np.e)).tobytes(),
            },
            schedule_seed=seed,
            options=options,
        )
        np.testing.assert_allclose(out, expected, atol=3e-3)
    tiles = length // 8
    pairs = tiles * (tiles + 1) // 2 if causal else tiles * tiles
    assert counters.mma == heads * pairs * 2 * width // 8
    assert counters.buffer_bytes_read[1] == heads * pairs * 8 * width * 2
