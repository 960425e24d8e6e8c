"""Library functions of Metal against NumPy, many to a kernel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.tools.emulator.emulator_kernels import floats, run
from tools.metal.emulator import Options


def evaluate(expressions: list[str], prelude: str = "", n: int = 1, **more: Any) -> np.ndarray:
    """Each expression, as a float, in a kernel of one simdgroup whose lanes are ``t``."""
    lines = "".join(f"{{ out[{32 * i} + t] = float({e}); }}\n" for i, e in enumerate(expressions))
    out = np.zeros((len(expressions), 32), np.float32)
    run(
        f"""{prelude}
        kernel void f(device float* out [[buffer(0)]], device const float* x [[buffer(1)]],
                      uint t [[thread_index_in_threadgroup]]) {{ float v = x[t]; (void)v;
            {lines} }}""",
        {0: out, 1: floats(32), **more.get("buffers", {})},
    )
    return out


CONSTANT = [
    # rounding and parts of numbers
    ("floor(-1.5f) + 10.0f * ceil(-1.5f) + 100.0f * trunc(-1.5f)", -2 - 10 - 100),
    ("rint(2.5f) + 10.0f * round(2.5f) + 100.0f * rint(3.5f)", 2 + 30 + 400),
    ("round(-0.5f) + fract(-0.25f)", -1 + 0.75),
    ("fract(-1e-9f)", 1 - 2**-24),
    ("sign(-3.0f) + 10.0f * sign(0.0f) + 100.0f * sign(2.0h)", 99),
    ("step(1.0f, 1.0f) + step(1.0f, 0.5f)", 1),
    ("smoothstep(0.0f, 2.0f, 1.0f) + smoothstep(0.0f, 1.0f, -1.0f)", 0.5),
    ("smoothstep(0.0f, 2.0f, float2(0.5f, 9.0f)).x", 0.15625),
    ("mix(1.0f, 3.0f, 0.25f) + mix(float2(0.0f), float2(4.0f), 0.5f).y", 3.5),
    ("saturate(2.0f) + saturate(-1.0f) + clamp(5, 1, 3)", 4),
    ("clamp(float3(-1.0f, 0.5f, 9.0f), 0.0f, 1.0f).z", 1),
    ("abs(-3) + fabs(-0.5f) + abs(int2(-4, 1)).x", 7.5),
    ("fmod(-7.5f, 2.0f) + fdim(3.0f, 1.0f) + fdim(1.0f, 3.0f)", -1.5 + 2),
    ("copysign(3.0f, -0.0f) + copysign(half(1.0h), 2.0h)", -2),
    ("ldexp(0.75f, 4) + ldexp(float2(1.0f), int2(1, 2)).y", 12 + 4),
    ("ilogb(10.0f) + ilogb(0.15625f)", 3 - 3),
    ("max3(1.0f, 5.0f, 3.0f) + min3(4, 2, 9) + median3(7.0f, 1.0f, 3.0f)", 5 + 2 + 3),
    ("fmax3(1.0f, 5.0f, 3.0f) + fmin3(4.0f, 2.0f, 9.0f) + fmedian3(7.0f, 1.0f, 3.0f)", 10),
    ("fmax(NAN, 2.0f) + fmin(3.0f, NAN)", 5),
    ("max(0.0f, float2(-1.0f, 2.0f)).y + max(float2(-1.0f, 2.0f), 0.0f).x", 2),
    ("powr(2.0f, 3.0f) + pow(-2.0f, 3.0f)", 0),
    ("precise::divide(1.0f, 4.0f) + fast::divide(1.0f, 2.0f)", 0.75),
    ("nextafter(1.0f, 2.0f) - 1.0f", 2**-23),
    ("as_type<uint>(nextafter(0.0f, -1.0f)) == 0x80000001u", 1),
    ("sinpi(0.5f) + 10.0f * cospi(1.0f) + tanpi(0.25f)", 1 - 10 + 1),
    ("exp10(2.0f) + log10(1000.0f) + exp2(-1.0f)", 103.5),
    ("sinh(1.0f) - 0.5f * (exp(1.0f) - exp(-1.0f))", 0),
    ("acosh(cosh(1.5f)) + asinh(sinh(0.5f)) + atanh(0.0f)", 2),
    ("atan2(1.0f, -1.0f)", 3 * math.pi / 4),
    # classes of numbers
    ("isnan(NAN) + 2 * isinf(-INFINITY) + 4 * isfinite(1.0f) + 8 * isnormal(1e-40f)", 7),
    ("isnan(half(NAN)) + 2 * signbit(-0.0f) + 4 * isinf(half(INFINITY))", 7),
    ("any(isnan(float2(1.0f, NAN))) + 2 * all(isfinite(float3(1.0f)))", 3),
    ("isunordered(1.0f, NAN) + 2 * isordered(1.0f, 2.0f) + 4 * islessgreater(1.0f, 1.0f)", 3),
    # integers
    ("popcount(0xffu) + popcount(uchar(7)) + popcount(-1) + popcount(uint2(3u, 1u)).x", 45),
    ("clz(1u) + 100 * clz(uchar(1)) + 1000 * clz(short(1)) + 100000 * int(clz(1ul))", 6315731),
    ("ctz(8u) + ctz(ushort(0)) + ctz(0ul)", 3 + 16 + 64),
    ("reverse_bits(uchar(1)) + reverse_bits(0x80000000u)", 129),
    ("rotate(0x80000001u, 1u) + rotate(uchar(0x81), uchar(1))", 6),
    ("mulhi(0x80000000u, 6u) + mulhi(-2147483647, 4)", 3 - 2),
    ("mulhi(0x8000000000000000ul, 6ul)", 3),
    ("mul24(0x1000003, 5) + mad24(-3, 4, 20)", 15 + 8),
    ("madhi(0x80000000u, 6u, 5u)", 8),
    ("extract_bits(0xabcdu, 4, 8) + extract_bits(-16, 2, 6)", 0xBC - 4),
    ("insert_bits(0xff00u, 0x5u, 4, 4)", 0xFF50),
    ("absdiff(3u, 10u) + absdiff(5, -5)", 17),
    ("addsat(uchar(250), uchar(10)) + subsat(uchar(3), uchar(10))", 255),
    ("float(addsat(2000000000, 2000000000))", 2147483647),
    ("hadd(7u, 10u) + rhadd(7u, 10u)", 8 + 9),
    ("madsat(short(300), short(300), short(1))", 32767),
    ("min(ushort(3), ushort(9)) + max(-1l, 4l)", 7),
    # geometry
    ("dot(float3(1.0f, 2.0f, 3.0f), float3(4.0f, 5.0f, 6.0f))", 32),
    ("dot(half2(2.0h), half2(3.0h))", 12),
    ("cross(float3(1.0f, 0.0f, 0.0f), float3(0.0f, 1.0f, 0.0f)).z + length(float2(3.0f, 4.0f))", 6),
    ("normalize(float4(0.0f, 3.0f, 0.0f, 4.0f)).w", 0.8),
    ("distance(float2(1.0f), float2(4.0f, 5.0f))", 5),
    ("length_squared(float2(3.0f, 4.0f)) + distance_squared(float2(1.0f), float2(4.0f, 5.0f))", 50),
    ("reflect(float2(1.0f, -1.0f), float2(0.0f, 1.0f)).y", 1),
    ("faceforward(float2(1.0f, 2.0f), float2(0.0f, 1.0f), float2(0.0f, 1.0f)).y", -2),
    # packing
    ("pack_float_to_unorm4x8(float4(1.0f, 0.0f, 0.5f, 2.0f)) == 0xff8000ffu", 1),
    ("unpack_unorm4x8_to_float(0xff800000u).w + unpack_snorm4x8_to_float(0x80u).x", 0),
    ("unpack_snorm2x16_to_float(pack_float_to_snorm2x16(float2(-1.0f, 1.0f))).x", -1),
    ("unpack_unorm2x16_to_half(0xffffu).x", 1),
    # bits
    ("as_type<half2>(0x40003c00u).y + as_type<float>(0x3f800000u)", 3),
    ("as_type<half>(ushort(0x6400 | 7)) - 1024.0h", 7),
    ("as_type<uint>(uchar4(1, 2, 3, 4)) == 0x04030201u", 1),
    ("float(as_type<bfloat>(ushort(0x4049)))", 3.140625),
    ("as_type<int2>(1l << 32).y + as_type<ulong>(uint2(5u, 0u))", 6),
    # conversions
    ("int(-2.9f) + uchar(3.7f) + short(half(-1.5h))", -2 + 3 - 1),
    ("half(bfloat(1.5f)) + float(bfloat(half(2.5h)))", 4),
    ("(half)(bfloat)0.25f + static_cast<bfloat>(half(0.5h))", 0.75),
    ("float4(bfloat4(half4(1.0h, 2.0h, 3.0h, 4.0h))).w", 4),
    ("numeric_limits<half>::max() + half(-HALF_MAX)", 0),
    ("numeric_limits<uchar>::max() + numeric_limits<short>::lowest() + INT_MAX * 0", 255 - 32768),
    ("1.5bf * 2.0bf", 3),
    # integers as hosts count them
    ("float(uint64_t(1) << 40) / float(int64_t(1) << 38)", 4),
    ("ptrdiff_t(-3) / 2 + long(7) % 4", 2),
    ("ushort(65535) + 1", 65536),
    ("(uint(3) - uint(4)) >> 31", 1),
    ("char(-1) >> 1", -1),
]  # fmt: skip


def test_functions_of_constants() -> None:
    got = evaluate([e for e, _ in CONSTANT])
    for (expression, expected), values in zip(CONSTANT, got, strict=True):
        message = f"{expression}: {values[0]}, not {expected}"
        assert np.allclose(values, np.float32(expected), rtol=3e-6, atol=1e-6), message


BOOLEANS = [
    ("any(float4(v, 1.0f, 2.0f, 3.0f) < float4(0.0f))", lambda v: v < 0),
    ("all(float2(v) >= 0.0f)", lambda v: v >= 0),
    ("select(float4(1.0f), float4(2.0f), float4(v) > float4(0.0f)).z", lambda v: 1 + (v > 0)),
    ("select(1.0f, 2.0f, v > 0.0f)", lambda v: 1 + (v > 0)),
    ("float4(float4(v) > 0.0f).y", lambda v: v > 0),
    ("int4(float4(v) > 0.0f).x", lambda v: v > 0),
    ("(float2(v) > 0.0f).y", lambda v: v > 0),
    ("!(v > 0.0f)", lambda v: v <= 0),
    ("all(!(float3(v) > 0.0f))", lambda v: v <= 0),
    ("any((float2(v) > 0.0f) && (float2(v) < 0.5f))", lambda v: (v > 0) & (v < 0.5)),
    ("negative(v).x + 2.0f * negative(v).y", lambda v: (v < 0) * 3),
    ("flags(float2(v, 1.0f) < 0.0f, bool2(true, false))", lambda v: (v < 0) | 0),
    ("counted(uchar4(1, 2, 3, 4) == uchar4(1, 0, 3, 0))", lambda v: v * 0 + 2),
    ("counted(half4(half(v)) == half4(half(v)))", lambda v: v * 0 + 4),
    ("sizeof(bool2) + 10 * sizeof(bool3) + 100 * sizeof(bool4)", lambda v: v * 0 + 442),
    ("any(isless(float2(v), float2(0.0f)))", lambda v: v < 0),
    ("counted(vec<bool, 4>(true, false, true, v > 0.0f))", lambda v: 2 + (v > 0)),
    ("all(bool2(v > 0.0f) == bool2(true)) + 2 * any(bool3(false))", lambda v: v > 0),
]


def test_vectors_of_booleans() -> None:
    prelude = """
        bool2 negative(float x) { return float2(x) < 0.0f; }
        float flags(bool2 a, bool2 b) { bool2 c = a & b; c = c || bool2(false); return c.x; }
        int counted(bool4 m) { int n = 0; for (int i = 0; i < 4; i++) n += m[i]; return n; }
        """
    got = evaluate([e for e, _ in BOOLEANS], prelude)
    v = floats(32)
    for (expression, expected), values in zip(BOOLEANS, got, strict=True):
        np.testing.assert_array_equal(values, expected(v).astype(np.float32), expression)


def test_booleans_in_memory_take_a_byte_each() -> None:
    masks = np.array([[1, 0, 1, 1], [0, 0, 0, 1]], bool)
    out = np.zeros((2, 4), bool)
    run(
        """kernel void f(device const bool4* in [[buffer(0)]], device bool4* out [[buffer(1)]],
                         uint t [[thread_index_in_threadgroup]]) {
            if (t > 1) return;
            bool4 m = in[t];
            out[t] = !m;
            if (any(m)) out[t].y = m.x && in[t].w;
        }""",
        {0: masks, 1: out},
    )
    expected = ~masks
    expected[:, 1] = masks[:, 0] & masks[:, 3]
    np.testing.assert_array_equal(out, expected)


def test_functions_with_results_by_reference() -> None:
    got = evaluate(
        ["split(v).x", "split(v).y", "parts(v).x", "parts(v).y", "circle(v).x", "circle(v).y"],
        """float2 split(float x) { int k; float m = frexp(x, k); return float2(m, float(k)); }
           float2 parts(float x) { float whole; float f = modf(x, whole); return float2(f, whole); }
           float2 circle(float x) { float c; float s = sincos(x, c); return float2(s, c); }""",
    )
    v = floats(32)
    mantissa, exponent = np.frexp(v)
    fraction, whole = np.modf(v)
    for values, expected in zip(
        got, [mantissa, exponent, fraction, whole, np.sin(v), np.cos(v)], strict=True
    ):
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


def test_matrices() -> None:
    got = evaluate(
        [
            "(m() * float4(1.0f, 0.0f, 0.0f, 1.0f)).y",
            "(float4(0.0f, 1.0f, 0.0f, 0.0f) * m()).z",
            "(m() * m())[1][2]",
            "transpose(m())[2].w",
            "determinant(float2x2(1.0f, 2.0f, 3.0f, 4.0f))",
            "determinant(float3x3(float3(2.0f, 0.0f, 1.0f), float3(0.0f, 3.0f, 0.0f),"
            " float3(1.0f, 0.0f, 4.0f)))",
            "float4x4(half4x4(2.0f))[3][3] + (2.0f * m() - m() / 2.0f)[0].y",
            "float2x3(float3(1.0f), float3(2.0f))[1].z",
        ],
        """float4x4 m() { float4x4 r; for (int c = 0; c < 4; c++)
               r[c] = float4(0.0f, 1.0f, 2.0f, 3.0f) + 4.0f * float(c); return r; }""",
    )[:, 0]
    m = np.arange(16, dtype=np.float32).reshape(4, 4).T  # m[row, column]
    expected = [
        m[1] @ [1, 0, 0, 1],
        m[1, 2],
        (m @ m)[2, 1],
        m[2, 3],
        -2,
        21,
        2 + 1.5 * m[1, 0],
        2,
    ]
    np.testing.assert_allclose(got, expected)


@pytest.mark.parametrize("threads", [32, 64])
def test_quadgroups(threads: int) -> None:
    x = np.random.default_rng(0).integers(1, 50, threads).astype(np.int32)
    out = np.zeros((17, threads), np.int32)
    run(
        """kernel void f(device const int* x [[buffer(0)]], device int* out [[buffer(1)]],
                         uint t [[thread_index_in_threadgroup]],
                         uint n [[threads_per_threadgroup]],
                         ushort lane [[thread_index_in_quadgroup]],
                         ushort quad [[quadgroup_index_in_threadgroup]],
                         ushort quads [[quadgroups_per_threadgroup]]) {
            int v = x[t];
            int r[17] = {quad_sum(v), quad_product(v), quad_min(v), quad_max(v), quad_or(v),
                         quad_shuffle(v, ushort(3 - lane)), quad_shuffle_xor(v, 2),
                         quad_shuffle_down(v, 1), quad_shuffle_up(v, 1), quad_broadcast(v, 2),
                         quad_prefix_inclusive_sum(v), quad_prefix_exclusive_sum(v),
                         int(ulong(quad_ballot(v % 2 == 0))),
                         quad_any(v == 1) + 2 * quad_all(v > 5),
                         lane + 4 * quad, quads, quad_shuffle_rotate_down(v, 1)};
            for (int i = 0; i < 17; i++) out[i * n + t] = r[i];
        }""",
        {0: x, 1: out},
        threads=threads,
        options=Options(checks={"edge": False}),
    )
    q = x.reshape(-1, 4)
    lanes = np.arange(4)

    def whole(values: Any) -> Any:
        return np.repeat(values, 4)

    inclusive = np.cumsum(q, 1)
    expected = [
        *(whole(q.sum(1)), whole(q.prod(1)), whole(q.min(1)), whole(q.max(1))),
        whole(np.bitwise_or.reduce(q, 1)),
        *(q[:, ::-1], q[:, lanes ^ 2], q[:, [1, 2, 3, 3]], q[:, [0, 0, 1, 2]], whole(q[:, 2])),
        *(inclusive, inclusive - q, whole(((q % 2 == 0) << lanes).sum(1))),
        whole((q == 1).any(1) + 2 * (q > 5).all(1)),
        *(np.arange(threads), np.full(threads, threads // 4), q[:, [1, 2, 3, 0]]),
    ]
    for i, values in enumerate(expected):
        np.testing.assert_array_equal(out[i], np.asarray(values).ravel(), f"row {i}")
