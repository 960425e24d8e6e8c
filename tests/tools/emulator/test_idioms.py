"""Kernels written as people write them for Apple's compiler, each against NumPy.

The idioms are those of MLX, ggml, metal-flash-attention and PyTorch; the code is ours.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.tools.emulator.emulator_kernels import HEADER, floats, library, run
from tools.metal.emulator import Library, Options

ALLOW_LAMBDAS = Options(allow=frozenset({"lambda-expression"}))
MATRICES = "#include <metal_simdgroup>\n#include <metal_simdgroup_matrix>\n"

GEMM = (
    MATRICES
    + """
#define CONST static constant constexpr const
#define UNROLL _Pragma("clang loop unroll(full)")

struct Sizes { int m, n, k; int lda, ldb, ldc; };

template <typename T, short ROWS, short COLS, short LD, short THREADS>
struct TileLoader {
    CONST short kVector = COLS * ROWS / THREADS;
    CONST short kAcross = COLS / kVector;
    static_assert(kVector * kAcross == COLS, "threads must tile the columns");
    using Chunk = metal::vec<T, 4>;

    const int stride;
    const short row, column;
    threadgroup T* dst;
    const device T* src;

    METAL_FUNC TileLoader(const device T* src_, const int stride_, threadgroup T* dst_,
                          ushort thread_index [[thread_index_in_threadgroup]])
        : stride(stride_), row(thread_index / kAcross), column(kVector * (thread_index % kAcross)),
          dst(dst_ + row * LD + column), src(src_ + row * stride_ + column) {}

    METAL_FUNC void load_whole() const {
        UNROLL
        for (short i = 0; i < kVector; i += 4)
            *((threadgroup Chunk*)(dst + i)) = *((const device Chunk*)(src + i));
    }
    METAL_FUNC void load_part(short2 limit) const {
        UNROLL
        for (short i = 0; i < kVector; i++) {
            const bool inside = row < limit.y && column + i < limit.x;
            dst[i] = inside ? src[i] : T(0);
        }
    }
    METAL_FUNC void next(int by) { src += by; }
};

template <typename T, typename Acc, short N>
struct Accumulators {
    simdgroup_matrix<Acc, 8, 8> tile[N] = {simdgroup_matrix<Acc, 8, 8>(0)};
    METAL_FUNC void clear() {
        UNROLL
        for (short i = 0; i < N; i++) tile[i] = make_filled_simdgroup_matrix<Acc, 8, 8>(Acc(0));
    }
    METAL_FUNC void step(const threadgroup T* a, const threadgroup T* b, short lda, short ldb) {
        simdgroup_matrix<T, 8, 8> left, right;
        simdgroup_load(left, a, lda);
        UNROLL
        for (short i = 0; i < N; i++) {
            simdgroup_load(right, b + 8 * i, ldb);
            simdgroup_multiply_accumulate(tile[i], left, right, tile[i]);
        }
    }
};

template <typename T, typename Acc, short BM, short BN, short BK>
[[kernel, max_total_threads_per_threadgroup(BM / 8 * 32)]] void gemm(
    const device T* a [[buffer(0)]],
    const device T* b [[buffer(1)]],
    device T* c [[buffer(2)]],
    const constant Sizes* sizes [[buffer(3)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]],
    uint simd_group [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
    constexpr short PAD = 16 / sizeof(T), THREADS = BM / 8 * 32;
    threadgroup T as[BM * (BK + PAD)];
    threadgroup T bs[BK * (BN + PAD)];
    threadgroup Acc staged[BM * BN];
    using LoaderA = TileLoader<T, BM, BK, BK + PAD, THREADS>;
    using LoaderB = TileLoader<T, BK, BN, BN + PAD, THREADS>;
    const int row = group.y * BM, column = group.x * BN;
    thread LoaderA load_a(a + row * sizes->lda, sizes->lda, as, index);
    thread LoaderB load_b(b + column, sizes->ldb, bs, index);
    Accumulators<T, Acc, BN / 8> sums;
    sums.clear();
    for (int k = 0; k < sizes->k; k += BK) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (row + BM <= sizes->m && k + BK <= sizes->k) load_a.load_whole();
        else load_a.load_part(short2(sizes->k - k, sizes->m - row));
        if (column + BN <= sizes->n && k + BK <= sizes->k) load_b.load_whole();
        else load_b.load_part(short2(sizes->n - column, sizes->k - k));
        threadgroup_barrier(mem_flags::mem_threadgroup);
        UNROLL
        for (short kk = 0; kk < BK; kk += 8)
            sums.step(as + simd_group * 8 * (BK + PAD) + kk, bs + kk * (BN + PAD), BK + PAD,
                      BN + PAD);
        load_a.next(BK);
        load_b.next(BK * sizes->ldb);
    }
    UNROLL
    for (short i = 0; i < BN / 8; i++)
        simdgroup_store(sums.tile[i], staged, BN, ulong2(8 * i, simd_group * 8));
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (short i = lane; i < 8 * BN; i += 32) {
        const int r = simd_group * 8 + i / BN, q = i % BN;
        if (row + r < sizes->m && column + q < sizes->n)
            c[(row + r) * sizes->ldc + column + q] = T(staged[r * BN + q]);
    }
}

#define instantiate_gemm(name, type, acc, bm, bn, bk)                         \\
    template [[host_name("gemm_" #name "_" #bm "x" #bn)]] [[kernel]] decltype(\\
        gemm<type, acc, bm, bn, bk>) gemm<type, acc, bm, bn, bk>;
#define instantiate_blocks(name, type, acc) \\
    instantiate_gemm(name, type, acc, 16, 16, 16) instantiate_gemm(name, type, acc, 32, 16, 32)
instantiate_blocks(f16, half, float) instantiate_blocks(f32, float, float)
instantiate_blocks(bf16, bfloat, float)
"""
)


@pytest.fixture(scope="module")
def gemm() -> Library:
    return library(GEMM)


@pytest.mark.parametrize("block", [(16, 16, 16), (32, 16, 32)])
@pytest.mark.parametrize(
    ("name", "dtype"), [("f16", np.float16), ("f32", np.float32), ("bf16", ml_dtypes.bfloat16)]
)
@pytest.mark.parametrize("shape", [(32, 16, 32), (37, 21, 19)])
def test_tiled_product(gemm: Library, name: str, dtype: Any, block: Any, shape: Any) -> None:
    m, n, k = shape
    lda, ldb = -(-k // 8) * 8, -(-n // 8) * 8
    a = np.zeros((m, lda), dtype)
    b = np.zeros((k, ldb), dtype)
    a[:, :k] = floats(m * k).reshape(m, k)
    b[:, :n] = floats(k * n, 2).reshape(k, n)
    c = np.zeros((m, n), dtype)
    sizes = np.array([m, n, k, lda, ldb, n], np.int32)
    bm, bn, _ = block
    gemm.dispatch(
        f"gemm_{name}_{bm}x{bn}",
        (-(-n // bn), -(-m // bm), 1),
        (bm // 8 * 32, 1, 1),
        {0: a, 1: b, 2: c, 3: sizes.tobytes()},
        schedule_seed=3,
    )
    expected = a[:, :k].astype(np.float64) @ b[:, :n].astype(np.float64)
    tolerance = {"f32": 1e-5, "f16": 2e-3, "bf16": 2e-2}[name]
    np.testing.assert_allclose(c.astype(np.float64), expected, rtol=tolerance, atol=4 * tolerance)


ROWS = """
constant uint axis [[function_constant(0)]];
constant bool has_weight [[function_constant(1)]];
constant bool has_weight_or_default = is_function_constant_defined(has_weight) ? has_weight : false;

template <typename T, int READS = 4>
[[kernel]] void softmax(const device T* in [[buffer(0)]], device T* out [[buffer(1)]],
                        uint row [[threadgroup_position_in_grid]],
                        uint lid [[thread_position_in_threadgroup]],
                        uint lsize [[threads_per_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]],
                        uint simd_group [[simdgroup_index_in_threadgroup]]) {
    constexpr int WIDTH = 32;
    threadgroup float local_max[WIDTH];
    threadgroup float local_sum[WIDTH];
    in += row * size_t(axis);
    out += row * size_t(axis);
    float values[READS];
    if (simd_group == 0) { local_max[lane] = -INFINITY; local_sum[lane] = 0; }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float most = -INFINITY;
    for (int i = 0; i < READS; i++) {
        const uint at = lid * READS + i;
        values[i] = at < axis ? float(in[at]) : -INFINITY;
        most = metal::max(most, values[i]);
    }
    most = simd_max(most);
    if (lane == 0) local_max[simd_group] = most;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simd_group == 0) {
        most = simd_max(local_max[lane]);
        if (lane == 0) local_max[0] = most;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    most = local_max[0];
    float total = 0;
    for (int i = 0; i < READS; i++) {
        values[i] = fast::exp(values[i] - most);
        total += values[i];
    }
    total = simd_sum(total);
    if (lane == 0) local_sum[simd_group] = total;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    total = simd_sum(local_sum[lane]);
    for (int i = 0; i < READS; i++) {
        const uint at = lid * READS + i;
        if (at < axis) out[at] = T(values[i] / total);
    }
}

template <typename T>
kernel void rms_norm(const device T* in, const device T* weight
                     [[buffer(1), function_constant(has_weight_or_default)]],
                     device T* out [[buffer(2)]], constant float& eps [[buffer(3)]],
                     threadgroup float* shared [[threadgroup(0)]],
                     uint row [[threadgroup_position_in_grid]],
                     ushort tid [[thread_index_in_threadgroup]],
                     ushort threads [[threads_per_threadgroup]],
                     ushort lane [[thread_index_in_simdgroup]],
                     ushort simd_group [[simdgroup_index_in_threadgroup]],
                     ushort simd_groups [[simdgroups_per_threadgroup]]) {
    const device T* x = in + row * axis;
    float sum = 0.0f;
    for (uint i = tid; i < axis; i += threads) sum += float(x[i]) * float(x[i]);
    sum = simd_sum(sum);
    if (lane == 0) shared[simd_group] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (tid < simd_groups) sum = shared[tid];
    else sum = 0.0f;
    if (simd_group == 0) {
        sum = simd_sum(sum);
        if (tid == 0) shared[0] = metal::precise::rsqrt(sum / axis + eps);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
    const float scale = shared[0];
    for (uint i = tid; i < axis; i += threads) {
        T y = static_cast<T>(float(x[i]) * scale);
        if (has_weight_or_default) y = y * weight[i];
        out[row * axis + i] = y;
    }
}

#define instantiate(name, type)                                              \\
    template [[host_name("softmax_" #name)]] [[kernel]] decltype(softmax<type>) softmax<type>; \\
    typedef decltype(rms_norm<type>) rms_norm_##name##_t;                    \\
    template [[host_name("rms_norm_" #name)]] kernel rms_norm_##name##_t rms_norm<type>;
instantiate(float32, float)
instantiate(float16, half)
"""


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows(dtype: Any) -> None:
    rows, axis = 5, 300
    x = floats(rows * axis).astype(dtype).reshape(rows, axis)
    weight = floats(axis, 2).astype(dtype)
    name = np.dtype(dtype).name
    wide = x.astype(np.float64)
    tolerance = 2e-3 if dtype == np.float16 else 1e-5
    for has_weight in (True, None):
        constants = {0: axis} if has_weight is None else {0: axis, 1: has_weight}
        made = library(ROWS, constants=constants)
        out = np.zeros_like(x)
        made.dispatch(f"softmax_{name}", rows, 96, {0: x, 1: out})
        e = np.exp(wide - wide.max(1, keepdims=True))
        np.testing.assert_allclose(out, e / e.sum(1, keepdims=True), rtol=tolerance, atol=1e-5)
        buffers = {0: x, 2: out, 3: np.float32(1e-5).tobytes()}
        if has_weight:
            buffers[1] = weight
        made.dispatch(f"rms_norm_{name}", rows, 64, buffers, {0: 128})
        expected = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5)
        expected = expected * weight.astype(np.float64) if has_weight else expected
        np.testing.assert_allclose(out, expected, rtol=2 * tolerance, atol=tolerance)


def test_four_bit_blocks() -> None:
    rng = np.random.default_rng(0)
    block = np.dtype([("d", "f2"), ("m", "f2"), ("qs", "u1", 16)])
    x = np.zeros(8, block)
    x["d"], x["m"] = rng.random(8) + 0.5, rng.random(8)
    x["qs"] = rng.integers(0, 256, (8, 16))
    out = np.zeros((3, 8, 32), np.float32)
    run(
        """
        #define QK 32
        typedef half ggml_half;
        typedef half2 ggml_half2;
        typedef struct {
            union {
                struct { ggml_half d; ggml_half m; };
                ggml_half2 dm;
            };
            uint8_t qs[QK / 2];
        } block_q4_1;
        static_assert(sizeof(block_q4_1) == 2 * sizeof(ggml_half) + QK / 2, "wrong block");

        template <typename type4x4>
        void dequantize_q4_1(device const block_q4_1* xb, short il, thread type4x4& reg) {
            device const uint16_t* qs = ((device const uint16_t*)xb + 2);
            const float d1 = il ? (xb->d / 16.h) : xb->d;
            const float d2 = d1 / 256.f;
            const float m = xb->m;
            const ushort mask0 = il ? 0x00F0 : 0x000F;
            const ushort mask1 = mask0 << 8;
            float4x4 reg_f;
            for (int i = 0; i < 8; i++) {
                reg_f[i / 2][2 * (i % 2) + 0] = ((qs[i] & mask0) * d1) + m;
                reg_f[i / 2][2 * (i % 2) + 1] = ((qs[i] & mask1) * d2) + m;
            }
            reg = (type4x4)reg_f;
        }
        // The exponent of 1024 makes a half of ten bits of an integer.
        static inline half2 magic(ushort q) {
            const uint bits = uint(q & 0xf) | uint((q >> 4) & 0xf) << 16 | 0x64006400u;
            return as_type<half2>(bits) - 1024.h;
        }
        kernel void f(device const void* src [[buffer(0)]], device float* out [[buffer(1)]],
                      ushort tiisg [[thread_index_in_simdgroup]]) {
            device const block_q4_1* x = (device const block_q4_1*)src;
            if (tiisg < 16) {
                half4x4 h;
                float4x4 f;
                const short b = tiisg / 2, il = tiisg % 2;
                dequantize_q4_1(x + b, il, h);
                dequantize_q4_1(x + b, il, f);
                for (short i = 0; i < 16; ++i) {
                    out[32 * b + 16 * il + i] = f[i / 4][i % 4];
                    out[256 + 32 * b + 16 * il + i] = h[i / 4][i % 4];
                }
            } else {
                for (short b = 0; b < 8; b++) {
                    device const uchar4* q = (device const uchar4*)x[b].qs;
                    const uchar byte = q[(tiisg - 16) / 4][tiisg % 4];
                    const half2 dm = x[b].dm;
                    const half2 v = magic(byte) * dm.x + dm.y;
                    out[512 + 32 * b + tiisg - 16] = v.x;
                    out[512 + 32 * b + tiisg] = v.y;
                }
            }
        }""",
        {0: x.view(np.uint8), 1: out},
    )
    q = np.concatenate([x["qs"] & 15, x["qs"] >> 4], 1).astype(np.float64)
    expected = q * x["d"][:, None].astype(np.float64) + x["m"][:, None]
    np.testing.assert_allclose(out[0], expected, rtol=1e-6)
    np.testing.assert_allclose(out[1], expected, rtol=1e-3)
    np.testing.assert_allclose(out[2], expected, rtol=3e-3)


def test_rotary_embedding_in_three_dimensions() -> None:
    heads, length, dim = 3, 5, 16
    x = floats(heads * length * dim).reshape(heads, length, dim)
    out = np.zeros_like(x)
    layout = np.array([dim, length], np.int64)
    run(
        """
        template <typename T, bool traditional>
        void rotate_pair(const device T* in, device T* out, constant const int64_t strides[2],
                         float theta, ushort3 pos, ushort3 grid) {
            const ulong base = (ulong(pos.z) * strides[1] + pos.y) * strides[0];
            ulong i, j;
            if (traditional) { i = base + 2 * pos.x; j = i + 1; }
            else { i = base + pos.x; j = i + grid.x; }
            const float2 sc = float2(metal::fast::cos(theta), metal::fast::sin(theta));
            const float2 v = float2(in[i], in[j]);
            float2 r;
            r.x = dot(v, float2(sc.x, -sc.y));
            r.y = dot(v, sc.yx);
            out[i] = static_cast<T>(r[0]);
            out[j] = static_cast<T>(r[1]);
        }
        kernel void f(const device float* in, device float* out,
                      constant const int64_t strides[2],
                      constant const float& base,
                      ushort3 pos [[thread_position_in_grid]],
                      ushort3 grid [[threads_per_grid]],
                      ushort width [[thread_execution_width]],
                      ushort3 shape [[dispatch_threads_per_threadgroup]]) {
            const float d = static_cast<float>(pos.x) / static_cast<float>(grid.x);
            rotate_pair<float, false>(in, out, strides, pos.y * metal::exp2(-d * base), pos, grid);
            if (width != 32 || shape.x != grid.x) out[0] = NAN;
        }""",
        {0: x, 1: out, 2: layout.tobytes(), 3: np.float32(np.log2(10000)).tobytes()},
        threads=(dim // 2, length, 1),  # type: ignore[arg-type]
        threadgroups=(1, 1, heads),
    )
    theta = np.arange(length)[:, None] * 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    a, b = x[..., : dim // 2], x[..., dim // 2 :]
    expected = np.concatenate(
        [a * np.cos(theta) - b * np.sin(theta), a * np.sin(theta) + b * np.cos(theta)], -1
    )
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_argument_of_the_maximum() -> None:
    x = np.random.default_rng(3).integers(0, 500, 1000).astype(np.float32)
    out = np.zeros(1, np.uint32)
    run(
        """
        template <typename U> struct IndexValPair {
            uint32_t index;
            U val;
        };
        template <typename U> struct ArgMax {
            static constexpr constant U init = metal::numeric_limits<U>::lowest();
            IndexValPair<U> reduce(IndexValPair<U> best, IndexValPair<U> current) {
                if (best.val < current.val ||
                    (best.val == current.val && best.index > current.index)) {
                    return current;
                } else {
                    return best;
                }
            }
        };
        template <typename U>
        IndexValPair<U> simd_shuffle_down(IndexValPair<U> data, uint16_t delta) {
            return IndexValPair<U>{metal::simd_shuffle_down(data.index, delta),
                                   metal::simd_shuffle_down(data.val, delta)};
        }
        kernel void f(const device float* in [[buffer(0)]], device uint32_t* out [[buffer(1)]],
                      const constant uint& n [[buffer(2)]],
                      uint lid [[thread_position_in_threadgroup]],
                      uint lsize [[threads_per_threadgroup]],
                      uint simd_size [[threads_per_simdgroup]],
                      uint lane [[thread_index_in_simdgroup]],
                      uint simd_group [[simdgroup_index_in_threadgroup]]) {
            ArgMax<float> op;
            threadgroup IndexValPair<float> local_data[32];
            IndexValPair<float> best{0, ArgMax<float>::init};
            for (uint r = lid; r < n; r += lsize) best = op.reduce(best, {r, in[r]});
            for (uint offset = simd_size / 2; offset > 0; offset /= 2)
                best = op.reduce(best, simd_shuffle_down(best, offset));
            if (lane == 0) local_data[simd_group] = best;
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (simd_group != 0) return;
            if (lid < lsize / simd_size) best = local_data[lid];
            for (uint offset = simd_size / 2; offset > 0; offset /= 2) {
                IndexValPair<float> other = simd_shuffle_down(best, offset);
                if (lid + offset < lsize / simd_size) best = op.reduce(best, other);
            }
            if (lid == 0) out[0] = best.index;
        }""",
        {0: x, 1: out, 2: np.uint32(1000).tobytes()},
        threads=128,
        options=Options(checks={"edge": False}),  # only the first lane's result counts
    )
    assert out[0] == x.argmax()


def test_prefix_sums_over_a_threadgroup() -> None:
    x = np.random.default_rng(1).integers(0, 9, 256).astype(np.int32)
    out = np.zeros((2, 256), np.int32)
    run(
        """
        kernel void f(device const int* in [[buffer(0)]], device int* out [[buffer(1)]],
                      uint lid [[thread_position_in_threadgroup]],
                      uint lane [[thread_index_in_simdgroup]],
                      uint simd_group [[simdgroup_index_in_threadgroup]],
                      uint simd_groups [[simdgroups_per_threadgroup]]) {
            threadgroup int sums[32];
            const int own = in[lid];
            int scanned = simd_prefix_inclusive_sum(own);
            if (lane == 31) sums[simd_group] = scanned;
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (simd_group == 0) {
                const int before = lane < simd_groups ? sums[lane] : 0;
                const int prefix = simd_prefix_exclusive_sum(before);
                if (lane < simd_groups) sums[lane] = prefix;
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            out[lid] = scanned + sums[simd_group];
            int walked = own;
            for (ushort i = 1; i < 32; i *= 2) {
                const int other = simd_shuffle_and_fill_up(walked, 0, i);
                walked += other;
            }
            out[256 + lid] = walked;
        }""",
        {0: x, 1: out},
        threads=256,
    )
    np.testing.assert_array_equal(out[0], np.cumsum(x))
    np.testing.assert_array_equal(out[1], np.cumsum(x.reshape(8, 32), 1).ravel())


def test_histogram_and_other_atomics() -> None:
    x = np.random.default_rng(2).integers(0, 16, 512).astype(np.uint32)
    bins = np.zeros(16, np.uint32)
    floats_ = np.zeros(2, np.float32)
    extremes = np.array([0xFFFFFFFF, 0], np.uint32)
    product = np.array([1.0], np.float32)
    run(
        """
        // Any operation on a float, by comparing and exchanging its bits.
        template <typename Op>
        METAL_FUNC void update(device atomic_uint* object, float value, Op op) {
            uint expected = atomic_load_explicit(object, memory_order_relaxed);
            uint desired;
            do {
                desired = as_type<uint>(op(as_type<float>(expected), value));
            } while (!atomic_compare_exchange_weak_explicit(
                object, &expected, desired, memory_order_relaxed, memory_order_relaxed));
        }
        struct Multiply { float operator()(float a, float b) const { return a * b; } };
        kernel void f(device const uint* in [[buffer(0)]],
                      device atomic_uint* bins [[buffer(1)]],
                      device atomic<float>* sums [[buffer(2)]],
                      device metal::atomic_uint* extremes [[buffer(3)]],
                      device uint* product [[buffer(4)]],
                      uint lid [[thread_index_in_threadgroup]],
                      uint tid [[thread_position_in_grid]]) {
            threadgroup atomic_uint local_bins[16];
            threadgroup atomic_int count;
            if (lid < 16) atomic_store_explicit(&local_bins[lid], 0u, memory_order_relaxed);
            if (lid == 0) atomic_store_explicit(&count, 0, memory_order_relaxed);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            const uint v = in[tid];
            atomic_fetch_add_explicit(local_bins + v, 1u, memory_order_relaxed);
            atomic_fetch_add_explicit(&count, v % 2 ? 1 : 0, memory_order_relaxed);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (lid < 16) {
                const uint n = atomic_load_explicit(&local_bins[lid], memory_order_relaxed);
                atomic_fetch_add_explicit(&bins[lid], n, memory_order_relaxed);
            }
            if (lid == 0) {
                const float odd = atomic_load_explicit(&count, memory_order_relaxed);
                atomic_fetch_add_explicit(&sums[0], odd, memory_order_relaxed);
                atomic_fetch_sub_explicit(&sums[1], 1.5f, memory_order_relaxed);
                update((device atomic_uint*)product, 2.0f, Multiply());
            }
            atomic_fetch_min_explicit(extremes, v, memory_order_relaxed);
            atomic_fetch_max_explicit(extremes + 1, v, memory_order_relaxed);
            if (atomic_exchange_explicit(&bins[0], atomic_load_explicit(&bins[0],
                    memory_order_relaxed), memory_order_relaxed) > 512u)
                atomic_fetch_or_explicit(extremes, 1u << 31, memory_order_relaxed);
        }""",
        {0: x, 1: bins, 2: floats_, 3: extremes, 4: product.view(np.uint32)},
        threads=128,
        threadgroups=4,
        seed=5,
    )
    np.testing.assert_array_equal(bins, np.bincount(x, minlength=16))
    assert floats_.tolist() == [(x % 2).sum(), -6]
    assert extremes.tolist() == [x.min(), x.max()]
    assert product[0] == 16


def test_votes() -> None:
    x = np.random.default_rng(4).integers(0, 100, 32).astype(np.int32)
    out = np.zeros((4, 32), np.uint32)
    run(
        """
        kernel void f(device const int* in [[buffer(0)]], device uint* out [[buffer(1)]],
                      uint lane [[thread_index_in_simdgroup]]) {
            const bool odd = in[lane] & 1;
            const simd_vote vote = simd_ballot(odd);
            const uint64_t bits = static_cast<simd_vote::vote_t>(vote);
            const uint below = popcount(uint(bits) & ((1u << lane) - 1));
            out[lane] = uint(bits);
            out[32 + lane] = below;
            out[64 + lane] = simd_any(in[lane] == 7) + 2 * simd_all(in[lane] >= 0) + 4 * vote.any();
            out[96 + lane] = uint((simd_vote::vote_t)simd_active_threads_mask()) == 0xffffffffu;
        }""",
        {0: x, 1: out},
    )
    odd = x % 2
    assert (out[0] == int((odd.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum())).all()
    np.testing.assert_array_equal(out[1], np.cumsum(odd) - odd)
    assert (out[2] == int((x == 7).any()) + 2 + 4).all()
    assert (out[3] == 1).all()


def test_matrices_in_all_spellings() -> None:
    a, b = floats(256).reshape(16, 16), floats(64, 2).reshape(8, 8)
    out = np.zeros((6, 8, 8), np.float32)
    run(
        MATRICES
        + """
        kernel void f(const device float* a [[buffer(0)]], const device float* b [[buffer(1)]],
                      device float* out [[buffer(2)]],
                      ushort lane [[thread_index_in_simdgroup]]) {
            threadgroup float tile[16 * 16];
            for (ushort i = lane; i < 256; i += 32) tile[i] = a[i];
            simdgroup_barrier(mem_flags::mem_threadgroup);
            simdgroup_float8x8 x, xt, y, sum = make_filled_simdgroup_matrix<float, 8>(0.f);
            simdgroup_load(x, a, 16, ulong2(8, 4));
            simdgroup_load(xt, tile, 16, ulong2(8, 4), true);
            simdgroup_load(y, b, 8, 0, false);
            simdgroup_store(x * y, out);
            simdgroup_multiply(sum, xt, y);
            simdgroup_store(sum, out + 64, 8, ulong2(0, 0));
            sum = simdgroup_float8x8(0);
            simdgroup_multiply_accumulate(sum, x, y, sum);
            thread auto& held = sum.thread_elements();
            held *= 2.0f;
            simdgroup_store(sum, out + 128);
            metal::simdgroup_matrix<half, 8, 8> small(2.0h);
            simdgroup_matrix<float, 8, 8> wide;
            simdgroup_multiply(wide, small, small);
            simdgroup_store(wide, out + 192);
            ((thread float2&)wide.thread_elements()) = float2(1.0f, 2.0f);
            float2 pair = wide.thread_elements();
            simdgroup_store(wide, out + 256, 8);
            const ushort qid = lane / 4;
            const ushort row = (qid & 4) + (lane / 2) % 4, column = (qid & 2) * 2 + (lane % 2) * 2;
            *(device float2*)(out + 320 + row * 8 + column) = pair.yx;
        }""",
        {0: a, 1: b, 2: out},
    )
    x = a[4:12, 8:16]
    np.testing.assert_allclose(out[0], x @ b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out[1], x.T @ b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out[2], 2 * x @ b, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(out[3], 4 * np.eye(8))
    np.testing.assert_array_equal(out[4], np.tile([1, 2], (8, 4)))
    np.testing.assert_array_equal(out[5], np.tile([2, 1], (8, 4)))


def test_complex_numbers_with_members_for_every_memory() -> None:
    z = (floats(64) + 1j * floats(64, 2)).astype(np.complex64)
    w = np.array([0.5 + 2j], np.complex64)
    out = np.zeros(64, np.complex64)
    real = np.zeros(64, np.float32)
    run(
        """
        struct complex64_t;
        template <typename T>
        static constexpr constant bool is_real = !metal::is_same_v<T, complex64_t> &&
            metal::is_convertible_v<T, float>;
        struct complex64_t {
            float real;
            float imag;
            constexpr complex64_t(float real, float imag) : real(real), imag(imag) {};
            constexpr complex64_t() : real(0), imag(0) {};
            constexpr complex64_t() threadgroup : real(0), imag(0) {};
            template <typename T, typename = typename metal::enable_if<is_real<T>>::type>
            constexpr complex64_t(T x) thread : real(x), imag(0) {}
            template <typename T, typename = typename metal::enable_if<is_real<T>>::type>
            constexpr complex64_t(T x) device : real(x), imag(0) {}
            template <typename T, typename = typename metal::enable_if<is_real<T>>::type>
            constexpr operator T() const thread { return static_cast<T>(real); }
            template <typename T, typename = typename metal::enable_if<is_real<T>>::type>
            constexpr operator T() const device { return static_cast<T>(real); }
            float norm() const thread { return real * real + imag * imag; }
            float norm() const device { return this->real * real + imag * this->imag; }
            float norm() const constant { return real * real + imag * imag; }
            void scale(float by) device { real *= by; imag *= by; }
            void scale(float by) threadgroup { real *= by; imag *= by; }
        };
        constexpr complex64_t operator*(complex64_t a, complex64_t b) {
            return {a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real};
        }
        complex64_t operator+(const thread complex64_t& a, const thread complex64_t& b) {
            return {a.real + b.real, a.imag + b.imag};
        }
        struct Twice { template <typename T> T operator()(T x) { return x + x; } };
        template <typename T, typename Op>
        [[kernel]] void unary(device const T* in, device T* out, constant T& w, device float* real,
                              uint t [[thread_position_in_grid]]) {
            threadgroup T tile[64];
            tile[t] = in[t];
            T x = tile[t], y;
            y = in[t];
            out[t] = Op()(x * w);
            out[t].scale(0.5f);
            tile[t].scale(2.0f);
            out[t] = out[t] * tile[t];
            real[t] = static_cast<float>(in[t]) + w.norm() + in[t].norm() + y.norm();
        }
        template [[host_name("f")]] [[kernel]] decltype(unary<complex64_t, Twice>)
            unary<complex64_t, Twice>;
        """,
        {0: z, 1: out, 2: w.tobytes(), 3: real},
        threads=64,
    )
    np.testing.assert_allclose(out, z * w * 2 * z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(real, z.real + abs(w) ** 2 + 2 * abs(z) ** 2, rtol=1e-4, atol=1e-5)


def test_structs_go_from_memory_to_memory() -> None:
    record = np.dtype([("key", "i4"), ("value", "f4", 3)])
    x = np.zeros(32, record)
    x["key"] = np.arange(32)
    x["value"] = floats(96).reshape(32, 3)
    out = np.zeros(32, record)
    total = np.zeros(32, np.float32)
    run(
        """
        typedef struct { int key; float value[3]; } entry_t;
        struct Table { entry_t entries[32]; };
        enum class Order : int { up, down = 1 };
        union Bits { float f; uint u; };
        constant entry_t extra = {100, {1.0f, 2.0f, 3.0f}};
        constant Order order = Order::down;
        static inline entry_t pick(device const entry_t* from, uint i) { return from[i]; }
        static float sum(entry_t e) { return e.value[0] + e.value[1] + e.value[2]; }
        kernel void f(device const Table& in [[buffer(0)]], device entry_t* out [[buffer(1)]],
                      device float* totals [[buffer(2)]],
                      uint t [[thread_position_in_grid]]) {
            threadgroup entry_t tile[32];
            tile[t] = in.entries[t];
            threadgroup_barrier(mem_flags::mem_threadgroup);
            entry_t mine = tile[order == Order::down ? 31 - t : t];
            const entry_t same = pick(in.entries, mine.key);
            mine = tile[same.key];
            Bits bits;
            bits.f = sum(tile[t]) + sum(extra) + sum(in.entries[t]);
            bits.u ^= 1u << 31;
            totals[t] = bits.f;
            out[t] = mine;
            out[t].key += extra.key;
        }""",
        {0: x.view(np.uint8), 1: out.view(np.uint8), 2: total},
    )
    np.testing.assert_array_equal(out["key"], 131 - np.arange(32))
    np.testing.assert_array_equal(out["value"], x["value"][::-1])
    np.testing.assert_allclose(total, -(6 + 2 * x["value"].sum(1)), rtol=1e-5)


def test_bits_and_pieces_of_the_language() -> None:
    out = np.zeros(32, np.float32)
    run(
        """
        namespace detail {
        constant float kTable[2][4] = {{1.0f, 2.0f, 4.0f, 8.0f}, {0.5f}};
        constant constexpr const ushort kWidth = 32;
        enum Kind { first = 3, second };
        template <int N> struct Factorial {
            static constant constexpr int value = N * Factorial<N - 1>::value;
        };
        template <> struct Factorial<0> { static constant constexpr int value = 1; };
        template <typename T, int N> struct Fixed {
            T data[N];
            thread T& operator[](int i) { return data[i]; }
            const thread T& operator[](int i) const { return data[i]; }
            T sum() const { T s = 0; for (int i = 0; i < N; i++) s += data[i]; return s; }
        };
        template <typename T> T fold(T x) { return x; }
        template <typename T, typename... Rest> T fold(T x, Rest... rest) {
            return x + fold(rest...);
        }
        struct float5 { float4 head; float tail; };
        METAL_FUNC float total(thread const float5& v) { return dot(v.head, 1.0f) + v.tail; }
        inline void add_to(thread float* x, const float by = 1.0f) { *x += by; }
        inline void add_to(device float* x, const float by = 1.0f) { *x += by; }
        }  // namespace detail
        using detail::Fixed;
        using namespace detail;
        kernel void f(device float* out, const ushort t [[thread_index_in_threadgroup]],
                      const ushort2 pos [[thread_position_in_grid]]) {
            float r = kTable[t & 1][t % 4];
            Fixed<float, 3> fixed = {{1.0f, 2.0f}};
            fixed[2] = 3.0f;
            add_to(&r, fixed.sum());
            switch (t % 3) {
                case 0: r += Kind::second; break;
                case 1: r += Factorial<4>::value; [[fallthrough]];
                default: r += fold(1.0f, 2.0f, 3.0f);
            }
            float4 v = float4(0.0f);
            v.xz = float2(1.0f, 2.0f);
            v.wy += v.zx;
            v = v.wzyx;
            v[t % 4] += 1.0f;
            r += total({v, float(pos.x)});
            device float* target = &out[t];
            *target = 0.0f;
            add_to(target);
            const auto square = [](float x) { return x * x; };
            out[t] += r + square(2.0f) + (t < kWidth ? 0.0f : NAN);
            int n = 0;
            do { if (n == 3) continue; } while (++n < 5);
            out[t] += n;
        }""",
        {0: out},
        options=ALLOW_LAMBDAS,
    )
    t = np.arange(32)
    table = np.array([[1, 2, 4, 8], [0.5, 0, 0, 0]])
    expected = table[t & 1, t % 4] + 6 + np.choose(t % 3, [4, 24 + 6, 6])
    expected = expected + 6 + 1 + t + 1 + 4 + 5
    np.testing.assert_allclose(out, expected)


def test_header_included_as_metal_projects_do(tmp_path: Any) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "ops.h").write_text(
        "#pragma once\n#include <metal_stdlib>\n#include <metal_math>\n#include <metal_atomic>\n"
        "struct Add { template <typename T> T operator()(T a, T b) { return a + b; } };\n"
        "#if defined(__METAL_VERSION__) && __METAL_VERSION__ >= 310\n"
        "typedef bfloat bfloat16_t;\n#endif\n"
        "#ifdef __HAVE_BFLOAT__\nconstant constexpr int kHasBfloat = 1;\n#endif\n"
    )
    out = np.zeros(32, np.float32)
    made = Library(
        HEADER
        + """#include "kernels/ops.h"
        kernel void f(device float* out, uint t [[thread_position_in_grid]]) {
            bfloat16_t b = bfloat16_t(2.0f);
            out[t] = Add()(float(t), float(b)) + kHasBfloat;
        }""",
        include_dirs=[tmp_path],
    )
    made.dispatch("f", 1, 32, {0: out})
    np.testing.assert_array_equal(out, np.arange(32) + 3)
