"""Forms of published Metal that a reader of tokens, or C++ itself, takes for something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tools.emulator.emulator_kernels import HEADER, floats, library, run
from tools.metal.emulator import KernelError, Library, Options, SourceError


def test_constant_expressions_in_attributes() -> None:
    text = """
        #define FC 100
        constant constexpr int BASE = 2;
        enum Slot { first_slot = BASE - 1, next_slot, last_slot = 1 << 3 };
        constant int a [[function_constant(FC + 0)]];
        constant int b [[function_constant(FC + (1 << 1) * 3 % 4)]];
        constant int c [[function_constant(0x10 | 07)]];
        kernel void f(device int* out [[buffer(00)]], device const int* x [[buffer(BASE + 1)]],
                      device const int* y [[buffer(next_slot)]],
                      device const int* z [[buffer(last_slot + 010 - 1u)]],
                      threadgroup int* room [[threadgroup(BASE - 1)]],
                      uint t [[thread_position_in_grid]]) {
            room[t] = x[t] + y[t] + z[t];
            out[t] = room[t] + a + b + c;
        }"""
    x, y, z = (np.arange(32, dtype=np.int32) * n for n in (1, 100, 10000))
    out = np.zeros(32, np.int32)
    run(
        text,
        {0: out, 3: x, 2: y, 15: z},
        constants={100: 3, 102: 5, 0x17: 7},
        memory={1: 128},
    )
    assert (out == x + y + z + 15).all()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("n", "'n' is no constant"),
        ("1 +", "an operand is missing"),
        ("1 / 0", "a division by zero"),
        ("1 << 70", "a shift by 70"),
        ("(1 2)", "'\\)' is missing"),
        ("1 2", "'2' is not expected here"),
        ("30 + 1", "index 31 is not in 0..30"),
        ("2 - 3", "index -1 is not in 0..30"),
        ("1.5f", "needs an integer"),
        ("09", "needs an integer"),
    ],
)
def test_what_is_no_constant_expression(index: str, message: str) -> None:
    text = f"""constant int n [[function_constant(0)]];
        kernel void f(device int* x [[buffer({index})]]) {{}}"""
    with pytest.raises(SourceError, match=message):
        library(text)


def test_a_constant_with_two_values_is_none() -> None:
    text = """struct A { enum { at = 1 }; }; struct B { enum { at = 2 }; };
        kernel void f(device int* x [[buffer(at)]]) {}"""
    with pytest.raises(SourceError, match="'at' is no constant"):
        library(text)
    library(text.replace("at = 2", "at = 1"))


UNROLLED = """
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MANY {many}
#define UNROLL _Pragma("unroll(MIN(3, MANY))")
#include "more.h"
template <int N>
kernel void f(device float* out [[buffer(0)]], uint t [[thread_position_in_grid]]) {{
    float x = 0.0f;
    #pragma unroll(MIN(2, MANY))
    for (int i = 0; i < 6; i++) x += 1.0f;
    #pragma unroll MANY
    for (int i = 0; i < 6; i++) x += 1.0f;
    #pragma clang loop unroll_count(MIN(N, MANY))
    for (int i = 0; i < 6; i++) x += 1.0f;
    UNROLL
    for (int i = 0; i < 6; i++) x += 1.0f;
#undef MANY
#define MANY 5
    #pragma unroll(MANY)
    for (int i = 0; i < 6; i++) x += 1.0f;
    #pragma unroll
    for (int i = 0; i < 6; i++) x += 1.0f;
    out[t] = more(x);
}}
template [[host_name("f")]] kernel decltype(f<4>) f<4>;
"""
MORE = """#define HERE 2
inline float more(float x) {
    #pragma unroll(HERE)
    for (int i = 0; i < 6; i++) x += 1.0f;
    return x;
}
"""


def test_macros_in_pragmas(tmp_path: Path) -> None:
    (tmp_path / "more.h").write_text(MORE)
    out = np.zeros(32, np.float32)
    made = Library(HEADER + UNROLLED.format(many=4), include_dirs=[tmp_path])
    made.dispatch("f", 1, 32, {0: out})
    assert (out == 42).all()


def test_values_of_macros_in_pragmas(tmp_path: Path) -> None:
    """The pragma gets its macro's value, not nothing."""
    (tmp_path / "more.h").write_text(MORE)
    with pytest.raises(SourceError, match="invalid value '-1'"):
        Library(HEADER + UNROLLED.format(many="(-1)"), include_dirs=[tmp_path])


def test_variables_named_like_other_templates_types() -> None:
    """``S0 * x`` is a product where ``S0`` is a variable, a pointer only where it is a type."""
    x, out = floats(32), np.zeros(32, np.float32)
    run(
        """
        template <typename S0, class S1 = int>
        S0 twice(S0 a) { device S0* p = nullptr; return a + a; }
        template <typename S0> struct Holder { S0 value; };
        inline float local(float x) { using W = float; return (W)x; }
        kernel void f(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                      uint t [[thread_position_in_grid]]) {
            const float S0 = 2.0f, S1 = 3.0f, W = 4.0f, x = in[t];
            const float S = S0 * x;
            float y = (S0) * x + max(S1 * x, S0 * x) - (W) * x;
            out[t] = S + y + twice(x) + local(x);
        }""",
        {0: x, 1: out},
    )
    expected = 2 * x + 2 * x + np.maximum(3 * x, 2 * x) - 4 * x + 2 * x + x
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    wrong = "template <typename S0> void g(S0 a) { S0* p = &a; } void h(float a) { float S0 = a; }"
    with pytest.raises(SourceError) as caught:
        library(wrong)
    assert caught.value.rules == ("missing-address-space",)


def test_own_functions_beside_those_of_metal() -> None:
    """A scalar `dot`, which Metal has not, and names that C++'s library has and Metal has not."""
    x, out = floats(32), np.zeros((2, 32), np.float32)
    run(
        """
        static inline float dot(float a, float b) { return a * b; }
        static inline float length(float a) { return a < 0.0f ? -a : a; }
        constant float forward = 2.0f;
        float move(float x, int y) { return x * float(y); }
        void swap(thread float& a, device float* b) { float c = a; a = b[0]; b[0] = c; }
        kernel void f(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                      uint t [[thread_position_in_grid]]) {
            float x = in[t], y = 1.0f;
            out[32 + t] = x;
            swap(y, out + 32 + t);
            out[t] = dot(x, y) + dot(float2(x, y), float2(1.0f, 2.0f)) + forward * move(x, 3)
                + length(x) + metal::move(y);
        }""",
        {0: x, 1: out},
    )
    np.testing.assert_allclose(out[0], x * x + 3 * x + 6 * x + abs(x) + x, rtol=1e-5, atol=1e-5)
    assert (out[1] == 1).all()
    run(
        """kernel void forward(device float* out [[buffer(0)]],
                               uint t [[thread_position_in_grid]]) { out[t] = 1.0f; }
           struct declval { float x; };""",
        {0: out[0]},
        kernel="forward",
    )
    with pytest.raises(SourceError) as caught:  # as before: the same to its callers
        library(
            "float dot(float2 a, float2 b) { return a.x; } float g(float2 a) { return dot(a, a); }"
        )
    assert caught.value.rules == ("ambiguous-name",)


def test_metals_own_utilities_stay() -> None:
    out = np.zeros(64, np.float32)
    run(
        """kernel void f(device float* out [[buffer(0)]], uint t [[thread_position_in_grid]]) {
            float a = 1.0f, b = 2.0f;
            swap(a, b);
            out[t] = move(a);
            out[32 + t] = metal::forward<float>(b);
        }""",
        {0: out},
    )
    assert out.tolist() == [2] * 32 + [1] * 32


def test_threadgroup_arrays_with_a_list() -> None:
    """Accepted, and worth nothing: who relies on it reads what nobody wrote."""
    text = """kernel void f(device float* out [[buffer(0)]],
                     uint t [[thread_index_in_threadgroup]]) {
        threadgroup float a[32] = {0}, b[32] = {};
        %s
        out[t] = a[t] + b[t];
    }"""
    out = np.zeros(32, np.float32)
    run(text % "a[t] = 1.0f; b[t] = 2.0f;", {0: out})
    assert (out == 3).all()
    for written in ("b[t] = 2.0f;", "a[t] = 1.0f;"):
        with pytest.raises(KernelError, match="uninitialised threadgroup memory"):
            run(text % written, {0: out})
    run(text % "b[t] = 2.0f;", {0: out}, options=Options(checks={"uninitialised": False}))
    assert np.isnan(out).all()


def test_comparisons_of_bfloat() -> None:
    x = np.tile(np.array([1.0, np.nan, 2.0, -1.0], np.float32), 8)
    y = np.tile(np.array([1.0, 1.0, np.nan, 1.0], np.float32), 8)
    out = np.zeros((4, 32), np.int32)
    run(
        """kernel void f(device const float* x [[buffer(0)]], device const float* y [[buffer(1)]],
                         device int* out [[buffer(2)]], uint t [[thread_position_in_grid]]) {
            bfloat a = bfloat(x[t]), b = bfloat(y[t]);
            out[t] = metal::isunordered(a, b);
            out[32 + t] = isordered(a, b);
            out[64 + t] = isless(a, b);
            out[96 + t] = isequal(bfloat2(a, b), bfloat2(b, b)).x;
        }""",
        {0: x, 1: y, 2: out},
    )
    assert out[:, :4].tolist() == [[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0]]


def test_alias_templates_construct() -> None:
    out = np.zeros((3, 32), np.float32)
    run(
        """
        template <typename T, int N> using Vec = vec<T, N>;
        template <int N> struct Wide { static constexpr constant int size = N / 2; };
        template <int N> using Row = vec<float, Wide<N>::size>;
        template <typename T, int N> T total(T x) {
            Vec<T, N> v = Vec<T, N>(x);
            v += (Vec<T, N>)T(1);
            v *= Vec<T, N>(vec<T, N - 1>(T(2)), T(3));
            T r = T(0);
            for (int i = 0; i < N; i++) r += v[i];
            return r;
        }
        template <int N> float last(float x) { return Row<N>(x, Row<N / 2 + 1>(x))[1]; }
        kernel void f(device float* out [[buffer(0)]], uint t [[thread_position_in_grid]]) {
            out[t] = total<float, 3>(float(t));
            out[32 + t] = float(total<half, 4>(half(t)));
            out[64 + t] = Row<4>(float(t), 5.0f).y;
        }""",
        {0: out},
    )
    t = np.arange(32)
    assert out.tolist() == [((t + 1) * 7).tolist(), ((t + 1) * 9).tolist(), [5.0] * 32]


def test_a_literal_without_a_suffix_says_so() -> None:
    """Metal reads it as a float, and has no double that it could be."""
    with pytest.raises(SourceError, match=r"0\.0 has no suffix: Metal reads it as a float"):
        library("float g(float x) { return x + 0.0; }")
