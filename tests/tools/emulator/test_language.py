"""Each feature of the language, with a small kernel and NumPy's answer."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.tools.emulator.emulator_kernels import HEADER, floats, library, run
from tools.metal.emulator import DispatchError, KernelError, Library, Options, SourceError


def test_position_arguments_in_three_dimensions() -> None:
    out = np.zeros((24 * 2, 8), np.uint32)
    run(
        """
        [[kernel]] void f(device uint* out [[buffer(0)]],
                          uint3 grid [[thread_position_in_grid]],
                          uint3 group [[threadgroup_position_in_grid]],
                          uint3 groups [[threadgroups_per_grid]],
                          uint3 local [[thread_position_in_threadgroup]],
                          uint3 size [[threads_per_threadgroup]],
                          uint3 total [[threads_per_grid]],
                          uint index [[thread_index_in_threadgroup]],
                          ushort lane [[thread_index_in_simdgroup]],
                          ushort simdgroup [[simdgroup_index_in_threadgroup]],
                          ushort width [[threads_per_simdgroup]],
                          ushort count [[simdgroups_per_threadgroup]]) {
            uint at = ((grid.z * total.y + grid.y) * total.x + grid.x) * 8;
            out[at] = group.x + 10 * group.y + 100 * group.z;
            out[at + 1] = local.x + 10 * local.y + 100 * local.z;
            out[at + 2] = index;
            out[at + 3] = lane + 100 * simdgroup;
            out[at + 4] = width + 100 * count;
            out[at + 5] = size.x + 10 * size.y + 100 * size.z;
            out[at + 6] = groups.x + 10 * groups.y + 100 * groups.z;
            out[at + 7] = total.x * total.y * total.z;
        }""",
        {0: out},
        threads=(4, 3, 2),  # type: ignore[arg-type]
        threadgroups=(1, 2, 1),
    )
    grid = out.reshape(2, 6, 4, 8)
    assert grid[1, 5, 3].tolist() == [10, 123, 23, 23, 132, 234, 121, 48]
    assert grid[0, 3, 0, 0] == 10
    assert grid[1, 0, 2, 2] == 14


def test_parameter_may_be_named_as_its_attribute() -> None:
    out = np.zeros(64, np.uint32)
    run(
        """kernel void f(device uint* buffer [[buffer(0)]],
                         uint thread_position_in_grid [[thread_position_in_grid]]) {
            buffer[thread_position_in_grid] = thread_position_in_grid;
        }""",
        {0: out},
        threadgroups=2,
    )
    assert out.tolist() == list(range(64))


def test_vectors_construct_swizzle_and_convert() -> None:
    out = np.zeros(24, np.float32)
    half = np.array([1, 2, 3, 4], np.float16)
    run(
        """
        template <typename T4> T4 doubled(float a) { return T4(a) + T4(a, a, 0, 0); }
        kernel void f(device float4* out [[buffer(0)]], device const half4* in [[buffer(1)]],
                      uint t [[thread_position_in_grid]]) {
            if (t != 0) return;
            float2 two = float2(in[0].zw);
            out[0] = float4(two, 5.0f, float(in->x));
            out[1] = (float4)in[0] * 2.0f;
            out[2].xyz = float3(1.0f).zyx + float3(two.yx, -1.0f);
            float4 negated = -(float4)in[0];
            out[2].w = negated.y;
            out[3] = float4(int4(2.9f, -2.9f, 0.5f, 7.0f)) + doubled<float4>(1.0f) * 100.0f;
            out[4] = static_cast<float4>(uint4(uchar4(255, 1, 2, 3)));
            vec<float, 4> v = metal::float4(0.0f);
            v.rg = v.ab + 4.0f;
            v[3] = half(2.5h);
            out[5] = v;
        }""",
        {0: out, 1: half},
    )
    expected = [
        [3, 4, 5, 1],
        [2, 4, 6, 8],
        [5, 4, 0, -2],
        [202, 198, 100, 107],
        [255, 1, 2, 3],
        [4, 4, 0, 2.5],
    ]
    assert out.reshape(6, 4).tolist() == expected


def test_three_component_vectors_and_packed_ones() -> None:
    packed = np.arange(12, dtype=np.float32)
    out = np.full(16, -1, np.float32)
    run(
        """
        struct Pair { packed_float3 a; float b; };
        kernel void f(device float3* out [[buffer(0)]],
                     device const packed_float3* in [[buffer(1)]],
                      device const Pair* pairs [[buffer(2)]],
                      uint t [[thread_position_in_grid]]) {
            static_assert(sizeof(float3) == 16 && sizeof(packed_float3) == 12, "");
            static_assert(sizeof(packed_half4) == 8 && alignof(packed_half4) == 2, "");
            static_assert(sizeof(Pair) == 16, "");
            if (t < 3) out[t] = float3(in[t + 1]);
            float3 sum = pairs[0].a;
            if (t == 3) out[t] = sum + pairs[0].b;
        }""",
        {0: out, 1: packed, 2: packed[4:8].copy()},
    )
    assert out.reshape(4, 4)[:, :3].tolist() == [[3, 4, 5], [6, 7, 8], [9, 10, 11], [11, 12, 13]]


def test_half_rounds_every_operation_and_bfloat_converts() -> None:
    a = np.array([2048, 1, 0.1, 60000], np.float16)
    out = np.zeros(4, np.float16)
    small = floats(4).astype(ml_dtypes.bfloat16)
    bf = np.zeros(8, ml_dtypes.bfloat16)
    run(
        """
        kernel void f(device const half* a [[buffer(0)]], device half* out [[buffer(1)]],
                      device const bfloat* b [[buffer(2)]], device bfloat* c [[buffer(3)]],
                      uint t [[thread_position_in_grid]]) {
            if (t > 3) return;
            out[t] = a[t] + 1.0h - a[t];
            c[t] = b[t] * 3.0bf;
            c[t + 4] = bfloat(float(b[t]) * 3.0f);
            static_assert(sizeof(bfloat4) == 8, "");
        }""",
        {0: a, 1: out, 2: small, 3: bf},
    )
    with np.errstate(all="ignore"):
        assert out.tolist() == (a + np.float16(1) - a).tolist()
    expected = (small.astype(np.float32) * 3).astype(ml_dtypes.bfloat16)
    assert bf.tolist() == [*expected.tolist(), *expected.tolist()]


def test_as_type_and_bit_functions() -> None:
    out = np.zeros(8, np.uint32)
    run(
        """
        kernel void f(device uint* out [[buffer(0)]], uint t [[thread_position_in_grid]]) {
            if (t != 0) return;
            out[0] = as_type<uint>(1.0f);
            out[1] = as_type<uint>(half2(1.0h, 2.0h));
            out[2] = as_type<ushort>(bfloat(1.0f));
            out[3] = popcount(0xffu) + clz(1u) + ctz(8u);
            out[4] = extract_bits(0xabcdu, 4, 8);
            out[5] = mulhi(0x80000000u, 6u);
            out[6] = rotate(0x80000001u, 1u);
            out[7] = as_type<uint>(uchar4(1, 2, 3, 4));
        }""",
        {0: out},
    )
    expected = [0x3F800000, 0x40003C00, 0x3F80, 8 + 31 + 3, 0xBC, 3, 3, 0x04030201]
    assert out.tolist() == expected


def test_math_functions() -> None:
    x = np.abs(floats(32)) + 0.1
    out = np.zeros((16, 32), np.float32)
    run(
        """
        kernel void f(device const float* x [[buffer(0)]], device float* out [[buffer(1)]],
                      uint t [[thread_position_in_grid]]) {
            float v = x[t];
            float r[16] = {exp(v), exp2(v), log(v), log2(v), sqrt(v), rsqrt(v), sin(v), cos(v),
                           tanh(v), pow(v, 1.5f), fma(v, v, 1.0f), clamp(v, 0.5f, 1.0f),
                           precise::exp(v), fast::exp2(v), max(v, 1.0f) + min(v, 1.0f),
                           dot(float3(v), float3(1.0f, 2.0f, 3.0f))};
            for (int i = 0; i < 16; i++) out[32 * i + t] = r[i];
        }""",
        {0: x, 1: out},
    )
    y = x.astype(np.float64)
    expected = [
        *(np.exp(y), np.exp2(y), np.log(y), np.log2(y), np.sqrt(y), 1 / np.sqrt(y), np.sin(y)),
        *(np.cos(y), np.tanh(y), y**1.5, y * y + 1, np.clip(y, 0.5, 1), np.exp(y), np.exp2(y)),
        *(np.maximum(y, 1) + np.minimum(y, 1), 6 * y),
    ]
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-6)


def test_simd_reductions_and_scans() -> None:
    x = np.random.default_rng(0).integers(1, 100, 64).astype(np.uint32)
    out = np.zeros((9, 64), np.uint32)
    run(
        """
        kernel void f(device const uint* x [[buffer(0)]], device uint* out [[buffer(1)]],
                      uint t [[thread_position_in_grid]]) {
            uint v = x[t];
            out[t] = simd_sum(v);
            out[64 + t] = simd_min(v);
            out[128 + t] = simd_max(v);
            out[192 + t] = simd_and(v);
            out[256 + t] = simd_or(v);
            out[320 + t] = simd_xor(v);
            out[384 + t] = simd_prefix_inclusive_sum(v);
            out[448 + t] = simd_prefix_exclusive_sum(v);
            out[512 + t] = uint(simd_product(v % 2 + 1));
        }""",
        {0: x, 1: out},
        threads=64,
    )
    for n in (0, 1):
        part = slice(32 * n, 32 * n + 32)
        v = x[part]
        rows = [np.add.reduce(v), v.min(), v.max(), np.bitwise_and.reduce(v)]
        rows += [np.bitwise_or.reduce(v), np.bitwise_xor.reduce(v)]
        for got, expected in zip(out[:6, part], rows, strict=True):
            assert (got == expected).all()
        assert (out[6, part] == np.cumsum(v)).all()
        assert (out[7, part] == np.cumsum(v) - v).all()
        assert (out[8, part] == np.uint32(np.prod(v.astype(np.uint64) % 2 + 1) & 0xFFFFFFFF)).all()


def test_simd_shuffles_and_votes() -> None:
    x = np.arange(32, dtype=np.float32)
    out = np.zeros((13, 32), np.float32)
    run(
        """
        kernel void f(device const float* x [[buffer(0)]], device float* out [[buffer(1)]],
                      ushort t [[thread_index_in_simdgroup]]) {
            float v = x[t];
            out[t] = simd_shuffle(v, ushort(31 - t));
            out[32 + t] = simd_shuffle_xor(v, 9);
            out[64 + t] = simd_shuffle_down(v, 3);
            out[96 + t] = simd_shuffle_up(v, 3);
            out[128 + t] = simd_shuffle_rotate_down(v, 3);
            out[160 + t] = simd_shuffle_rotate_up(v, 3);
            out[192 + t] = simd_broadcast(v, 7);
            out[224 + t] = simd_broadcast_first(v);
            out[256 + t] = simd_shuffle_and_fill_down(v, v + 100.0f, 3);
            out[288 + t] = simd_shuffle_and_fill_up(v, v + 100.0f, 3);
            out[320 + t] = float(ulong(simd_ballot(t % 2 == 1)) & 0xffff);
            out[352 + t] = float(simd_any(t == 3)) + 2.0f * float(simd_all(t < 31));
            out[384 + t] = simd_sum(float2(v, 1.0f)).y + float(simd_is_first());
        }""",
        {0: x, 1: out},
        options=Options(checks={"edge": False}),
    )
    t = np.arange(32)
    expected = [
        *(31 - t, t ^ 9, np.where(t + 3 < 32, t + 3, t), np.where(t >= 3, t - 3, t)),
        *((t + 3) % 32, (t - 3) % 32, 0 * t + 7, 0 * t),
        *(np.where(t + 3 < 32, t + 3, 100 + t - 29), np.where(t >= 3, t - 3, 100 + 29 + t)),
        *(0 * t + 0xAAAA, 0 * t + 1, np.where(t == 0, 33, 32)),
    ]
    np.testing.assert_array_equal(out, np.array(expected, np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("space", ["device", "threadgroup"])
def test_simdgroup_matrix(dtype: type, space: str) -> None:
    name = {np.float16: "half", np.float32: "float"}.get(dtype, "bfloat")
    a, b = (floats(400, s).astype(dtype).reshape(20, 20) for s in (1, 2))
    out = np.zeros((3, 64), np.float32)
    stage = (
        f"threadgroup {name} sa[400]; threadgroup {name} sb[400];"
        "for (uint i = t; i < 400; i += 32) { sa[i] = a[i]; sb[i] = b[i]; }"
        "threadgroup_barrier(mem_flags::mem_threadgroup);"
    )
    pa, pb = ("sa", "sb") if space == "threadgroup" else ("a", "b")
    run(
        f"""
        kernel void f(device const {name}* a [[buffer(0)]], device const {name}* b [[buffer(1)]],
                      device float* out [[buffer(2)]], uint t [[thread_index_in_simdgroup]]) {{
            {stage if space == "threadgroup" else ""}
            simdgroup_{name}8x8 x, y;
            simdgroup_load(x, {pa} + 20 + 1, 20);
            simdgroup_load(y, {pb}, 20, ulong2(3, 2), true);
            auto c = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
            simdgroup_multiply_accumulate(c, x, y, c);
            simdgroup_store(c, out, 8);
            simdgroup_float8x8 d;
            simdgroup_multiply(d, x, y);
            d.thread_elements() *= 2.0f;
            thread float2& held = reinterpret_cast<thread float2&>(d.thread_elements());
            held[0] += 0.0f;
            simdgroup_store(d, out + 64, 8, ulong2(0), true);
            simdgroup_float8x8 e(3.0f);
            simdgroup_store(e, out + 128, 8);
        }}""",
        {0: a, 1: b, 2: out},
    )
    x = a.astype(np.float64)[1:9, 1:9]
    y = b.astype(np.float64)[2:10, 3:11].T
    product = x @ y
    np.testing.assert_allclose(out[0].reshape(8, 8), product + 1, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out[1].reshape(8, 8), 2 * product.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out[2].reshape(8, 8), 3 * np.eye(8))


def test_lane_map() -> None:
    """Row and column of every lane's first element, as on Apple's GPUs."""
    out = np.zeros((2, 32), np.float32)
    table = np.arange(64, dtype=np.float32)
    run(
        """
        kernel void f(device const float* table [[buffer(0)]], device float* out [[buffer(1)]],
                      uint t [[thread_index_in_simdgroup]]) {
            simdgroup_float8x8 m;
            simdgroup_load(m, table, 8);
            out[t] = m.thread_elements()[0];
            out[32 + t] = m.thread_elements()[1];
        }""",
        {0: table, 1: out},
    )
    lane = np.arange(32)
    quad = lane // 4
    row = (quad & 4) + (lane // 2) % 4
    column = (quad & 2) * 2 + (lane % 2) * 2
    assert (out[0] == row * 8 + column).all()
    assert (out[1] == row * 8 + column + 1).all()


def test_atomics() -> None:
    counts = np.zeros(4, np.uint32)
    total = np.zeros(1, np.float32)
    run(
        """
        kernel void f(device atomic_uint* counts [[buffer(0)]],
                     device atomic_float* total [[buffer(1)]],
                      uint t [[thread_position_in_grid]], uint i [[thread_index_in_threadgroup]]) {
            threadgroup atomic_int shared;
            if (i == 0) atomic_store_explicit(&shared, 0, memory_order_relaxed);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            atomic_fetch_add_explicit(&shared, 2, memory_order_relaxed);
            atomic_fetch_add_explicit(&counts[t % 2], 1u, memory_order_relaxed);
            atomic_fetch_max_explicit(&counts[2], t, memory_order_relaxed);
            atomic_fetch_add_explicit(total, 0.5f, memory_order_relaxed);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            uint expected = 0;
            while (!atomic_compare_exchange_weak_explicit(&counts[3], &expected, expected + 1,
                                                          memory_order_relaxed,
                                                          memory_order_relaxed)) {}
            if (atomic_load_explicit(&shared, memory_order_relaxed) != 128)
                atomic_store_explicit(&counts[2], 0u, memory_order_relaxed);
        }""",
        {0: counts, 1: total},
        threads=64,
        threadgroups=3,
        seed=4,
    )
    assert counts.tolist() == [96, 96, 191, 192]
    assert total[0] == 96


def test_function_constants_and_optional_buffers() -> None:
    body = """
        constant bool has_mask [[function_constant(0)]];
        constant int factor [[function_constant(7)]];
        constant float scale [[function_constant(8)]];
        constant float given = is_function_constant_defined(scale) ? scale : 10.0f;
        kernel void f(device float* out [[buffer(0)]],
                      device const float* mask [[buffer(5), function_constant(has_mask)]],
                      uint t [[thread_position_in_grid]]) {
            float x = given * factor;
            if (has_mask) x += mask[t];
            out[t] = x;
        }"""
    out, mask = np.zeros(32, np.float32), floats(32)
    run(body, {0: out, 5: mask}, constants={0: True, 7: 3, 8: 0.5})
    np.testing.assert_allclose(out, 1.5 + mask)
    run(body, {0: out}, constants={0: False, 7: -2})
    assert (out == -20).all()


def test_function_constant_without_value() -> None:
    body = """
        constant int factor [[function_constant(7)]];
        kernel void f(device int* out [[buffer(0)]]) { out[0] = factor; }"""
    with pytest.raises(KernelError, match=r"'factor' \(index 7\)") as caught:
        run(body, {0: np.zeros(1, np.int32)}, threads=1)
    assert caught.value.check == "function constant"


def test_function_constant_of_wrong_type() -> None:
    body = """
        constant bool flag [[function_constant(0)]];
        kernel void f(device int* out [[buffer(0)]]) { out[0] = flag; }"""
    with pytest.raises(SourceError, match="has type bool; got 1"):
        library(body, constants={0: 1})


def test_templates_with_both_spellings_of_instantiation() -> None:
    made = library("""
        #define instantiate(type, n) \\
            template [[host_name("a_" #type "_" #n)]] [[kernel]] decltype(f<type, n>) f<type, n>;
        template <typename T, int N, bool twice = false>
        [[kernel]] void f(device T* out [[buffer(0)]], uint t [[thread_position_in_grid]]) {
            threadgroup T tile[N * 2];
            tile[t] = T(N);
            if constexpr (twice) tile[t] *= T(2);
            out[t] = tile[t];
        }
        instantiate(float, 32)
        instantiate(half, 64)
        typedef decltype(f<int, 32, true>) f_t;
        template [[host_name("b")]] kernel f_t f<int, 32, true>;
        template [[host_name("c")]] kernel void f<uint, 40>(device uint* out [[buffer(0)]],
                                                           uint t [[thread_position_in_grid]]);
        """)
    assert made.kernels == ("a_float_32", "a_half_64", "b", "c")
    for name, dtype, value in (
        ("a_float_32", np.float32, 32),
        ("a_half_64", np.float16, 64),
        ("b", np.int32, 64),
        ("c", np.uint32, 40),
    ):
        out = np.zeros(32, dtype)
        counters = made.dispatch(name, 1, 32, {0: out})
        assert (out == value).all()
        n = {"b": 32, "c": 40}.get(name, value)
        assert counters.threadgroup_memory == 2 * n * out.itemsize


def test_structs_includes_and_macros(tmp_path: Path) -> None:
    (tmp_path / "shared.h").write_text(
        "#pragma once\nstruct Params { uint n; float scale; ulong stride; float4 shift; };\n"
        "template <typename T> T half_of(T x) { return x / T(TWO); }\n"
    )
    kernel = tmp_path / "k.metal"
    kernel.write_text(
        HEADER
        + """#include "shared.h"
        kernel void f(constant Params& params [[buffer(0)]],
                     device const Params* same [[buffer(1)]],
                      device float4* out [[buffer(2)]], uint t [[thread_position_in_grid]]) {
            const Params p = params;
            Params q = same[0];
            const auto r = *same;
            auto s = params;
            float local[2] = {r.scale - s.scale, 0.0f};
            auto decayed = local;
            q.shift += decayed[t % 2];
            if (t < p.n) out[t] = half_of(p.scale) + q.shift + float(params.stride);
        }
        """
    )
    layout = np.dtype({"names": ["n", "scale", "stride", "shift"],
                       "formats": ["u4", "f4", "u8", "4f4"], "offsets": [0, 4, 8, 16],
                       "itemsize": 32})  # fmt: skip
    params = np.zeros(1, layout)
    params[0] = (3, 5.0, 100, [1, 2, 3, 4])
    out = np.zeros((4, 4), np.float32)
    made = Library(kernel, macros={"TWO": 2})
    made.dispatch("f", 1, 32, {0: params.tobytes(), 1: params.view(np.uint8), 2: out})
    assert out.tolist() == [[103.5, 104.5, 105.5, 106.5]] * 3 + [[0] * 4]


def test_project_header_shared_with_the_host() -> None:
    """shaders/shared/*.h compile for the GPU as they do for the host."""
    shaders = Path(__file__).parents[3] / "shaders"
    out = np.zeros(32, np.int32)
    made = Library(
        HEADER
        + """#include "shared/visible.h"
        kernel void f(device int* out [[buffer(0)]], uint t [[thread_position_in_grid]]) {
            umfa::Visible<int> v = {40, 8, 4, 0, 0, 0, 0};
            const int i = int(t), tile = next_tile(v, i, i, 0, 8);
            const umfa::KeyRange some = seen_by_some(v, i, i, tile, 16);
            const umfa::KeyRange all = seen_by_all(v, i, i, tile, 16);
            const umfa::VisibleRow row = visible_row(v, i, tile, 16);
            const bool same = row.begin == some.begin && row.end == all.end;
            out[t] = same ? visible_end(v, i) - visible_begin(v, i) : -1;
        }""",
        include_dirs=[shaders],
    )
    made.dispatch("f", 1, 32, {0: out})
    assert out.tolist() == [5] * 32


def test_program_scope_constants_and_constexpr() -> None:
    out = np.zeros(32, np.float32)
    run(
        """
        constant float table[4] = {1.0f, 2.0f, 4.0f, 8.0f};
        constant constexpr int kCount = 4;
        struct Traits { static constant constexpr const int width = 8; };
        enum class Mode : uint { first, second };
        METAL_FUNC float pick(uint i, thread const float& bias) { return table[i % kCount] + bias; }
        kernel void f(device float* out [[buffer(0)]], uint t [[thread_position_in_grid]]) {
            float bias = t < Traits::width ? 0.5f : 0.0f;
            out[t] = pick(t, bias) + float(Mode::second == Mode(t));
        }""",
        {0: out},
    )
    assert out[:10].tolist() == [1.5, 3.5, 4.5, 8.5, 1.5, 2.5, 4.5, 8.5, 1, 2]


def test_threadgroup_memory_from_the_host() -> None:
    out = np.zeros(64, np.float32)
    run(
        """kernel void f(device float* out [[buffer(0)]], threadgroup float* a [[threadgroup(0)]],
                         threadgroup half* b [[threadgroup(1)]],
                         uint t [[thread_index_in_threadgroup]]) {
            a[t] = float(t);
            b[t] = half(t);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            out[t] = a[63 - t] + float(b[t]);
        }""",
        {0: out},
        threads=64,
        memory={0: 256, 1: 128},
    )
    assert (out == 63).all()


def test_compile_error_has_the_line_of_the_source() -> None:
    with pytest.raises(SourceError, match=r"<source>:4:.*no member named 'nothing'"):
        library("kernel void f(device float4* out [[buffer(0)]]) {\nout[0] = metal::nothing(1);\n}")


def test_missing_kernel_is_named() -> None:
    made = library("kernel void f(device float* out [[buffer(0)]]) { out[0] = 1.0f; }")
    with pytest.raises(DispatchError, match=r"no kernel 'g'.*there are: f"):
        made.dispatch("g", 1, 1)


def test_overlapping_written_buffers_are_refused() -> None:
    made = library("""kernel void f(device float* a [[buffer(0)]],
                 device const float* b [[buffer(1)]])
                      { a[0] = b[1]; }""")
    x = np.zeros(8, np.float32)
    with pytest.raises(DispatchError, match="buffers 0 and 1 overlap"):
        made.dispatch("f", 1, 1, {0: x, 1: x[4:]})


def test_finite_constants_and_limits() -> None:
    out = np.zeros(4, np.float32)
    run(
        """kernel void f(device float* out [[buffer(0)]]) {
            out[0] = numeric_limits<float>::lowest();
            out[1] = -FLT_MAX;
            out[2] = float(numeric_limits<half>::max()) + float(HALF_MAX);
            out[3] = M_LOG2E_F;
        }""",
        {0: out},
        threads=1,
    )
    big = np.finfo(np.float32)
    assert out[:3].tolist() == [big.min, big.min, 2 * 65504]
    np.testing.assert_allclose(out[3], np.log2(np.e), rtol=1e-7)


def test_options_exist() -> None:
    assert Options().checks


def test_text_as_others_write_it() -> None:
    """Idioms of published kernels: qualifiers in any order, unrolled loops, traits, aliases."""
    out = np.zeros(64, np.float32)
    x = np.arange(256, dtype=np.float16)
    run(
        """
        #include <metal_simdgroup>
        #include <metal_simdgroup_matrix>
        #define STEEL_CONST static constant constexpr const
        #define STEEL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")
        #pragma METAL fp math_mode(safe)

        template <typename T> struct TypeTraits { using vec_t = vec<T, 4>; };
        template <typename U> struct Limits {
            STEEL_CONST U max = metal::numeric_limits<U>::max();
            STEEL_CONST U finite_min = -metal::numeric_limits<U>::max();
        };
        struct MaxOp {
            template <typename T> METAL_FUNC static constexpr T apply(T a, T b) {
                return metal::max(a, b);
            }
        };
        struct ExpSubOp {
            template <typename T> METAL_FUNC static constexpr T apply(T a, T b) {
                return fast::exp2(a - b);
            }
        };
        template <typename T, short kRows, short kCols> struct BaseFrag {
            typedef metal::vec<T, kRows * kCols / 32> frag_type;
            METAL_FUNC static constexpr short2 get_coord(
                ushort lane [[thread_index_in_simdgroup]]) {
                const short qid = lane / 4;
                const short fm = (qid & 4) + ((lane / 2) % 4);
                const short fn = (qid & 2) * 2 + (lane % 2) * 2;
                return short2{fn, fm};
            }
            template <typename SrcPtr>
            METAL_FUNC static constexpr void load(thread frag_type& dst, SrcPtr src, int ld) {
                STEEL_PRAGMA_UNROLL
                for (short j = 0; j < 2; j++) dst[j] = static_cast<T>(src[j * ld]);
            }
            template <typename Op>
            METAL_FUNC static void row_reduce(thread const frag_type& in, thread T* out) {
                T r = Op::apply(in.x, in.y);
                r = Op::apply(r, simd_shuffle_xor(r, ushort(1)));
                r = Op::apply(r, simd_shuffle_xor(r, ushort(8)));
                out[0] = Op::apply(out[0], r);
            }
        };
        template <typename T, typename AccumType = float>
        struct Loader {
            const device T* src;
            threadgroup T* dst;
            const short bi;
            METAL_FUNC Loader(const device T* src_, threadgroup T* dst_, ushort lane)
                : src(src_ + lane), dst(dst_ + lane), bi(lane) {}
            METAL_FUNC void load() const thread {
                using Vec = typename TypeTraits<T>::vec_t;
                *((threadgroup Vec*)(dst + bi * 3)) = *((const device Vec*)(src + bi * 3));
            }
        };
        template <typename T, int BN = 8, typename AccumType = float>
        [[kernel, max_total_threads_per_threadgroup(BN * 4)]] void f(
            const device T* x [[buffer(0)]],
            device float* out [[buffer(1)]],
            const constant int64_t& stride [[buffer(2)]],
            uint simd_lane_id [[thread_index_in_simdgroup]],
            uint3 tid [[threadgroup_position_in_grid]]) {
            (void)stride;
            using Frag = BaseFrag<AccumType, 8, 8>;
            threadgroup T smem[128];
            Loader<T> loader(x, smem, ushort(simd_lane_id));
            loader.load();
            threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
            const short2 simd_coord = Frag::get_coord(ushort(simd_lane_id));
            const short sm = simd_coord.y, sn = simd_coord.x;
            thread typename Frag::frag_type frag;
            Frag::load(frag, smem + sm * stride + sn, 1);
            AccumType most[1] = {Limits<AccumType>::finite_min};
            Frag::template row_reduce<MaxOp>(frag, most);
            auto e = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
            reinterpret_cast<thread typename Frag::frag_type&>(e.thread_elements()) = frag;
            AccumType lo[2];
            for (short i = 0; i < 2; ++i) lo[i] = ExpSubOp::apply(frag[i], most[0]);
            device auto* target = out + sm * 8 + sn;
            target[0] = lo[0];
            target[1] = lo[1] + (T)0;
        }
        #define instantiate(name, ...)  \\
            template [[host_name(name)]] [[kernel]] decltype(f<__VA_ARGS__>) f<__VA_ARGS__>;
        instantiate("f", half, 8)
        """,
        {0: x, 1: out, 2: np.int64(8).tobytes()},
    )
    np.testing.assert_allclose(out.reshape(8, 8), 2.0 ** (np.arange(8) - 7.0) * np.ones((8, 1)))


def test_quantised_blocks_as_ggml_lays_them_out() -> None:
    blocks = np.zeros(4, np.dtype([("d", "f2"), ("q", "i1", 32)]))
    blocks["d"] = [1, 0.5, 2, 4]
    blocks["q"] = np.arange(128).reshape(4, 32) - 64
    out = np.zeros(128, np.float32)
    run(
        """
        #define QK 32
        typedef struct { half d; int8_t qs[QK]; } block_q8_0;
        typedef struct { int32_t ne00; uint64_t nb01; } args_t;
        template <typename type4> void dequantize(device const block_q8_0* xb, short il,
                                                  thread type4& reg) {
            device const int8_t* qs = ((device const int8_t*)xb->qs);
            const float d = xb->d;
            for (int i = 0; i < 4; i++) reg[i] = (qs[i + 4 * il] * d);
        }
        typedef decltype(dequantize<half4>) dequantize_t;
        template <typename q4_t, void (*deq)(device const block_q8_0*, short, thread q4_t&)>
        kernel void g(constant args_t& args, device const char* src, device char* dst,
                      threadgroup half* shmem [[threadgroup(0)]],
                      ushort tiisg [[thread_index_in_simdgroup]],
                      ushort3 ntg [[threads_per_threadgroup]]) {
            threadgroup q4_t* so4 = (threadgroup q4_t*)(shmem + 0 * QK);
            for (short i = tiisg; i < args.ne00 / 4; i += ntg.x) {
                q4_t tmp;
                deq((device const block_q8_0*)(src + (i / 8) * args.nb01), i % 8, tmp);
                so4[i] = (q4_t)tmp;
            }
            simdgroup_barrier(mem_flags::mem_threadgroup);
            device float4* dst4 = (device float4*)dst;
            for (short i = tiisg; i < args.ne00 / 4; i += ntg.x) dst4[i] = (float4)so4[31 - i];
        }
        typedef decltype(g<half4, dequantize<half4>>) g_t;
        template [[host_name("f")]] kernel g_t g<half4, dequantize<half4>>;
        """,
        {
            0: np.int32([128, 0]).tobytes() + np.uint64(34).tobytes(),
            1: blocks.view(np.uint8),
            2: out,
        },
        memory={0: 256},
    )
    expected = (blocks["q"].astype(np.float32) * blocks["d"][:, None].astype(np.float32)).ravel()
    np.testing.assert_array_equal(out.reshape(32, 4)[::-1].ravel(), expected)
