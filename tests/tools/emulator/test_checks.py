"""Every check, with a planted bug that only it finds, beside the mended kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.tools.emulator.emulator_kernels import HEADER, floats, library, run
from tools.metal.emulator import KernelError, Library, Options, SourceError

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def fires(
    check: str, body: str, buffers: dict[int, Any], match: str | None = None, **more: Any
) -> None:
    """The kernel runs, checked, until ``check`` stops it with a message like ``match``."""
    with pytest.raises(KernelError, match=match) as caught:
        run(body, buffers, **more)
    assert caught.value.check == check
    assert caught.value.location.startswith("<source>:")


# ------------------------------------------------------------------------------------- the text


LINT = [
    (
        "missing-address-space",
        "float sum(float* p) { return p[0]; }",
        "float sum(device float* p) { return p[0]; }",
    ),
    (
        "missing-address-space",
        "float g(float x) { float* p = &x; return *p; }",
        "float g(float x) { thread float* p = &x; return *p; }",
    ),
    (
        "missing-address-space",
        "struct S { float& r; };",
        "struct S { thread float& r; };",
    ),
    (
        "missing-address-space",
        "template <typename T> T first(const T& x) { return x; }",
        "template <typename T> T first(thread const T& x) { return x; }",
    ),
    (
        "missing-address-space",
        "uint g(device half* p) { return *(uint*)p; }",
        "uint g(device half* p) { return *(device uint*)p; }",
    ),
    (
        "unsuffixed-literal",
        "float g(float x) { return x * 0.5; }",
        "float g(float x) { return x * 0.5f; }",
    ),
    (
        "unsuffixed-literal",
        "half g(half x) { return x * 1e-3; }",
        "half g(half x) { return x * 1e-3h; }",
    ),
    (
        "threadgroup-variable",
        "threadgroup float tile[32];",
        "constant float tile[2] = {1.0f, 2.0f};",
    ),
    (
        "threadgroup-variable",
        "float g() { threadgroup float tile[32]; return tile[0]; }",
        "float g(threadgroup float* tile) { return tile[0]; }",
    ),
    (
        "threadgroup-variable",
        "kernel void k() { threadgroup float x = 0.0f; }",
        "kernel void k() { threadgroup float x; x = 0.0f; }",
    ),
    ("program-scope-variable", "float scale = 2.0f;", "constant float scale = 2.0f;"),
    ("program-scope-variable", "constant float scale;", "constant float scale = 1.0f;"),
    ("program-scope-variable", "constexpr int n = 2;", "constexpr constant int n = 2;"),
    (
        "static-local",
        "int g() { static int n = 0; return n; }",
        "int g() { int n = 0; return n; }",
    ),
    (
        "forbidden-word",
        "float g(float x) { double y = x; return y; }",
        "float g(float x) { return x; }",
    ),
    (
        "forbidden-word",
        "int g(int x) { return std::max(x, 1); }",
        "int g(int x) { return max(x, 1); }",
    ),
    ("forbidden-word", "long long g() { return 1; }", "long g() { return 1; }"),
    ("unknown-vector", "float g(float8 x) { return x[0]; }", "float g(float4 x) { return x[0]; }"),
    (
        "unknown-swizzle",
        "float2 g(float4 x) { return x.lo; }",
        "float2 g(float4 x) { return x.xy; }",
    ),
    (
        "component-address",
        "float g(float4 x) { thread float* p = &x.y; return *p; }",
        "float g(float4 x) { return x.y; }",
    ),
    (
        "unknown-attribute",
        "kernel void k(uint t [[thread_position_in_grit]]) {}",
        "kernel void k(uint t [[thread_position_in_grid]]) {}",
    ),
    (
        "builtin-arguments",
        "kernel void k(uint2 a [[thread_position_in_grid]], uint b [[threads_per_grid]]) {}",
        "kernel void k(uint2 a [[thread_position_in_grid]], uint2 b [[threads_per_grid]]) {}",
    ),
    (
        "builtin-arguments",
        "kernel void k(ushort a [[thread_index_in_simdgroup]],"
        " uint b [[simdgroup_index_in_threadgroup]]) {}",
        "kernel void k(ushort a [[thread_index_in_simdgroup]],"
        " ushort b [[simdgroup_index_in_threadgroup]]) {}",
    ),
    (
        "kernel-argument",
        "kernel void k(uint n [[buffer(0)]]) {}",
        "kernel void k(constant uint& n [[buffer(0)]]) {}",
    ),
    (
        "buffer-index-twice",
        "kernel void k(device float* a [[buffer(0)]], device float* b [[buffer(0)]]) {}",
        "kernel void k(device float* a [[buffer(0)]], device float* b [[buffer(1)]]) {}",
    ),
    (
        "buffer-index",
        "kernel void k(device float* a [[buffer(31)]]) {}",
        "kernel void k(device float* a [[buffer(30)]]) {}",
    ),
    (
        "kernel-call",
        "kernel void a() {} kernel void b() { a(); }",
        "void a() {} kernel void b() { a(); }",
    ),
    ("kernel-void", "kernel int a() { return 1; }", "kernel void a() {}"),
    (
        "host-name-twice",
        'template <typename T> kernel void f() {} template [[host_name("a")]] kernel '
        'decltype(f<int>) f<int>; template [[host_name("a")]] kernel decltype(f<uint>) f<uint>;',
        'template <typename T> kernel void f() {} template [[host_name("a")]] kernel '
        'decltype(f<int>) f<int>; template [[host_name("b")]] kernel decltype(f<uint>) f<uint>;',
    ),
    (
        "lambda-expression",
        "int g(int x) { auto f = [&](int y) { return x + y; }; return f(1); }",
        "int g(int x) { return x + 1; }",
    ),
    (
        "implicit-bfloat",
        "bfloat g(float x) { return x; }",
        "bfloat g(float x) { return bfloat(x); }",
    ),
    # A literal that fits is no better.
    ("implicit-bfloat", "void g() { bfloat b = 1.0f; }", "void g() { bfloat b = 1.0bf; }"),
    (
        "implicit-bfloat",
        "void h(bfloat) {} void g() { h(1.0f); }",
        "void h(bfloat) {} void g() { h(bfloat(1.0f)); }",
    ),
    (
        "implicit-bfloat",
        "float g(half a, bfloat b) { return a * b; }",
        "float g(half a, bfloat b) { return a * float(b); }",
    ),
    (
        "kernel-parameter",
        "kernel void k(uint n) {}",
        "kernel void k(constant uint& n) {}",
    ),
    ("kernel-name", "kernel void main() {}", "kernel void main_() {}"),
    (
        "kernel-overload",
        "kernel void k() {} kernel void k(device int* x) {}",
        "template <int N> kernel void k() {} template <typename T> kernel void k(device T* x) {}",
    ),
    (
        "function-constant-twice",
        "constant int a [[function_constant(1)]]; constant int b [[function_constant(1)]];",
        "constant int a [[function_constant(1)]]; constant int b [[function_constant(2)]];",
    ),
    (
        "function-constant",
        "constant int a [[function_constant(1)]] = 3;",
        "constant int a [[function_constant(1)]];",
    ),
    (
        "function-constant",
        "constant int a [[function_constant(65536)]];",
        "constant int a [[function_constant(65535)]];",
    ),
    (
        "function-constant",
        "struct S { int a; }; constant S a [[function_constant(1)]];",
        "struct S { int a; }; constant int2 a [[function_constant(1)]];",
    ),
    (
        "function-constant",
        "int a [[function_constant(1)]];",
        "constant int a [[function_constant(1)]];",
    ),
    (
        "function-constant",
        "constant int a = 1; int g() { return is_function_constant_defined(a); }",
        "constant int a [[function_constant(1)]];"
        " int g() { return is_function_constant_defined(a); }",
    ),
    (
        "instantiation",
        'template <typename T> void f() {} template [[host_name("a")]] kernel'
        " decltype(f<int>) f<int>;",
        'template <typename T> kernel void f() {} template [[host_name("a")]] kernel'
        " decltype(f<int>) f<int>;",
    ),
    (
        "host-name",
        "template <typename T> kernel void f() {} template kernel decltype(f<int>) f<int>;",
        'template <typename T> kernel void f() {} template [[host_name("a")]] kernel'
        " decltype(f<int>) f<int>;",
    ),
    (
        "kernel-pointer",
        "kernel void k(thread float* p) {}",
        "kernel void k(device float* p) {}",
    ),
    (
        "kernel-pointer",
        "kernel void k(device float* p [[threadgroup(0)]]) {}",
        "kernel void k(threadgroup float* p [[threadgroup(0)]]) {}",
    ),
    (
        "kernel-pointer",
        "kernel void k(threadgroup float* p [[buffer(0)]]) {}",
        "kernel void k(constant float* p [[buffer(0)]]) {}",
    ),
    ("missing-address-space", "using P = float*;", "using P = device float*;"),
    ("missing-address-space", "void g(float (&a)[4]) {}", "void g(thread float (&a)[4]) {}"),
    ("missing-address-space", "void g(device float** p) {}", "void g(device float*& p) {}"),
    (
        "missing-address-space",
        "template <typename P> struct W {}; void g() { W<float*> w; }",
        "template <typename P> struct W {}; void g() { W<device float*> w; }",
    ),
    (
        "missing-address-space",
        "void g(device float* a) { auto* p = a; }",
        "void g(device float* a) { device auto* p = a; }",
    ),
    (
        "static-member",
        "struct S { static constexpr int n = 3; };",
        "struct S { static constant constexpr const int n = 3; static int f() { return n; } };",
    ),
    ("threadgroup-variable", "struct S { threadgroup float a[4]; };", "struct S { float a[4]; };"),
    (
        "long-long-literal",
        "void g() { long x = 1LL; }",
        "void g() { long x = 1L; }",
    ),
    ("c-variadic", "void g(int n, ...) {}", "template <typename... A> void g(int n, A... a) {}"),
    (
        "boolean-to-integer",
        "int4 g(float4 a) { int4 m = a < 1.0f; return m; }",
        "int4 g(float4 a) { int4 m = int4(a < 1.0f); int2 n = a.x < 1.0f ? 2 : 3;"
        " return m + n.x; }",
    ),
    (
        "ambiguous-name",
        "float min(float a, float b) { return a; } float g(float a) { return min(a, 1.0f); }",
        "float least(float a, float b) { return a; } float g(float a) { return least(a, 1.0f); }",
    ),
    (
        "vector-condition",
        "float4 g(float4 a, float4 b) { return a < b ? a : b; }",
        "float4 g(float4 a, float4 b) { return select(b, a, a < b); }",
    ),
    (
        "address-space-cast",
        "void g(device float* p) { threadgroup float* q = (threadgroup float*)p; q[0] = 1.0f; }",
        "void g(device float* p) { device half* q = (device half*)p; q[0] = 1.0h; }",
    ),
    (
        "address-space-cast",
        "float g(constant float* p) { thread float* q = (thread float*)p; return *q; }",
        "float g(constant float* p) { thread float q = *p; return q; }",
    ),
    (
        "function-pointer",
        "int f(int n) { return n; } int g(int x) { int (*p)(int) = f; return p(x); }",
        "int f(int n) { return n; } template <int (*p)(int)> int h(int x) { return p(x); }"
        " int g(int x) { return h<f>(x); }",
    ),
    (
        "constant-value",
        "float f(float x) { return x; } constant float a = f(2.0f);",
        "constexpr float f(float x) { return x; } constant float a = f(2.0f);",
    ),
    ("unknown-vector", "vec<float, 8> g();", "vec<float, 4> g();"),
    ("forbidden-word", "int main() { return 0; }", "int main_() { return 0; }"),
    ("forbidden-word", "__int128 g();", "long g();"),
    (
        "forbidden-word",
        "int g(int x) { return __builtin_popcount(x); }",
        "int g(int x) { return popcount(x); }",
    ),
    (
        "forbidden-word",
        "typedef float f8 __attribute__((ext_vector_type(8)));",
        "typedef float f8[8];",
    ),
    ("unknown-attribute", "void g(int x) { if (x) [[likely]] {} }", "void g(int x) { if (x) {} }"),
    # test_reserved.py has every word and every sort of declaration.
    (
        "keyword-name",
        "float g(float4 fragment) { return fragment.x; }",
        "float g(float4 piece) { return piece.x; }",
    ),
    (
        "predeclared-macro",
        "float g() { float INFINITY; return 1.0f; }",
        "float g() { return 1.0f; }",
    ),
    ("predeclared-type", "struct sampler { int x; };", "struct own_sampler { int x; };"),
]


@pytest.mark.parametrize(("rule", "wrong", "right"), LINT)
def test_rules_of_the_text(rule: str, wrong: str, right: str) -> None:
    with pytest.raises(SourceError) as caught:
        library("\n\n" + wrong)
    assert rule in caught.value.rules
    assert "<source>:5:" in str(caught.value)
    library(right)


CLANG = [
    (  # address spaces mixed
        "void g(device float* p, threadgroup float* q) { p = q; }",
        "void g(device float* p, threadgroup float* q) { p[0] = q[0]; }",
        "device|threadgroup",
    ),
    (
        "void h(threadgroup float* q) {} void g(device float* p) { h(p); }",
        "void h(device float* q) {} void g(device float* p) { h(p); }",
        "device",
    ),
    ("void g(constant float* p) { p[0] = 1.0f; }", "void g(device float* p) { p[0] = 1.0f; }",
     "read-only"),
    # vectors
    ("float4 g(half4 x) { return x; }", "float4 g(half4 x) { return float4(x); }", "half"),
    ("float4 g(float2 x) { return float4(x, x.x); }", "float4 g(float2 x) { return float4(x, x); }",
     "number of components"),
    ("float4 g(float4 a, half4 b) { return a * b; }",
     "float4 g(float4 a, half4 b) { return a * float4(b); }",
     "vector"),
    ("uint4 g(float4 x) { return x; }", "uint4 g(float4 x) { return uint4(x); }", "uint"),
    # bfloat
    ("half g(bfloat x) { return x; }", "half g(bfloat x) { return half(float(x)); }", "half"),
    ("float g(bfloat x) { return exp2(x); }", "float g(bfloat x) { return exp2(float(x)); }",
     "deleted"),
    ("bfloat g(bfloat x) { return simd_sum(x); }",
     "float g(bfloat x) { return simd_sum(float(x)); }",
     "no bool, bfloat or 64-bit"),
    # function constants are no constant expressions
    ("constant int n [[function_constant(0)]]; float g() { float a[n]; return a[0]; }",
     "constant int n [[function_constant(0)]]; float g() { float a[4]; return a[n & 3]; }",
     "variable"),
    ("constant bool b [[function_constant(0)]]; int g() { if constexpr (b) return 1; return 0; }",
     "constant bool b [[function_constant(0)]]; int g() { if (b) return 1; return 0; }",
     "constant"),
    ("constant int n [[function_constant(0)]]; template <int k> int f() { return k; }"
     " int g() { return f<n>(); }",
     "constant int n [[function_constant(0)]]; template <int k> int f() { return k; }"
     " int g() { return f<2>() + n; }", "no matching function"),
    # matrices
    ("void g(device half* p) { simdgroup_float8x8 m; simdgroup_load(m, p); }",
     "void g(device float* p) { simdgroup_float8x8 m; simdgroup_load(m, p); }", "simdgroup_load"),
    ("void g(constant float* p) { simdgroup_float8x8 m; simdgroup_load(m, p); }",
     "void g(threadgroup float* p) { simdgroup_float8x8 m; simdgroup_load(m, p); }",
     "simdgroup_load"),
    ("simdgroup_matrix<int, 8, 8> g();void h() { g(); }",
     "simdgroup_matrix<half, 8, 8> g();void h() { g(); }", "half, bfloat or float"),
    ("void g(threadgroup atomic_float* p) "
     "{ atomic_fetch_add_explicit(p, 1.0f, memory_order_relaxed); }",
     "void g(device atomic_float* p) { atomic_fetch_add_explicit(p, 1.0f, memory_order_relaxed); }",
     "device only"),
    # members and memories
    ("struct S { float x; float get() const { return x; } }; float g(device S* s)"
     " { return s->get(); }",
     "struct S { float x; float get() const device { return x; } }; float g(device S* s)"
     " { return s->get(); }", "device"),
    ("struct S { float x; void set() thread { x = 1.0f; } }; void g(threadgroup S& s) { s.set(); }",
     "struct S { float x; void set() threadgroup { x = 1.0f; } };"
     " void g(threadgroup S& s) { s.set(); }", "threadgroup"),
    ("void g(device atomic_int* p) { *p = 3; }",
     "void g(device atomic_int* p) { atomic_store_explicit(p, 3, memory_order_relaxed); }", "="),
    ("void g(device atomic_ulong* p) { atomic_fetch_add_explicit(p, 1ul, memory_order_relaxed); }",
     "void g(device atomic_ulong* p) { atomic_max_explicit(p, 1ul, memory_order_relaxed); }",
     "atomic_max"),
    ("bool4 g(uint4 x) { return x; }", "bool4 g(uint4 x) { return bool4(x); }", "no viable"),
    ("float g(float4 a, float4 b) { if (a < b) return 1.0f; return 0.0f; }",
     "float g(float4 a, float4 b) { if (all(a < b)) return 1.0f; return 0.0f; }", "bool"),
    ("float g(float x) { return max(x, 0); }", "float g(float x) { return max(x, 0.0f); }",
     "no matching function"),
    ("int g(int x) { return x; }"
     " #include <cmath>".replace(" #", "\n#"), "int g(int x) { return x; }", "cmath"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "right", "match"), CLANG)
def test_rules_that_clang_knows(wrong: str, right: str, match: str) -> None:
    # Functions that nothing calls are compiled all the same.
    with pytest.raises(SourceError, match=match):
        library(wrong, constants={0: 1} if "int n [[" in wrong else {0: True})
    library(right, constants={0: 1} if "int n [[" in wrong else {0: True})


def test_headers_must_be_included() -> None:
    body = (
        "using namespace metal;\n"
        "kernel void k(device float* p [[buffer(0)]]) { p[0] = exp2(p[0]); }"
    )
    with pytest.raises(SourceError):
        Library("#include <metal_types>\n" + body)
    Library("#include <metal_math>\n" + body)


def test_a_rule_can_be_allowed() -> None:
    text = HEADER + "float g(float x) { auto f = [&](float y) { return x + y; }; return f(1.0f); }"
    Library(text, options=Options(allow=frozenset({"lambda-expression"})))


# --------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    ("access", "where"),
    [
        ("out[t + 1] = 1.0f;", "4 bytes at byte 128 of buffer 0, which has 128"),
        ("out[t] = in[t + 100000000];", "of buffer 1"),
        ("out[t] = in[int(t) - 1];", "at byte -4 of buffer 1"),
        ("out[t] = *(device const packed_float4*)(in + t);", "16 bytes at byte 116 of buffer 1"),
        ("out[t] = n[t / 31];", "at byte 4 of buffer 2"),
    ],
)
def test_bounds_of_buffers(access: str, where: str) -> None:
    text = """kernel void f(device float* out [[buffer(0)]], device const float* in [[buffer(1)]],
                            constant float* n [[buffer(2)]],
                            uint t [[thread_position_in_grid]]) { %s }"""
    buffers = {0: floats(32), 1: floats(32), 2: floats(1)}
    access = access.replace(
        "device const packed_float4*)(in + t)", "device const packed_float4*)(in + t)"
    )
    value = access.replace(" = *(", " = (*(").replace("(in + t);", "(in + t)).x;")
    fires("out of bounds", text % value, buffers, where)
    run(text % "out[t] = in[t] + n[t / 32];", buffers)


def test_bounds_of_simdgroup_load() -> None:
    text = """kernel void f(device const half* a [[buffer(0)]], device half* b [[buffer(1)]]) {
        simdgroup_half8x8 m;
        simdgroup_load(m, a + %d, 16);
        simdgroup_store(m, b, 8);
    }"""
    buffers = {0: np.ones(7 * 16 + 8, np.float16), 1: np.zeros(64, np.float16)}
    fires("out of bounds", text % 1, buffers, r"<source>:5: .*at byte \d+ of buffer 0")
    run(text % 0, buffers)


def test_bounds_of_threadgroup_memory() -> None:
    text = """kernel void f(device float* out [[buffer(0)]],
                 threadgroup float* p [[threadgroup(3)]],
                            uint t [[thread_index_in_threadgroup]]) {
        threadgroup float a[32];
        threadgroup float b[32];
        a[t] = b[t] = 0.0f;
        if (t < 16) p[t] = 0.0f;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[t] = %s;
    }"""
    out = {0: floats(32)}
    memory = {3: 64}
    fires(
        "out of bounds", text % "a[t + 1]", out, "byte 128 of .*'a', which has 128", memory=memory
    )
    fires(
        "out of bounds", text % "p[t]", out, "of threadgroup memory 3, which has 64", memory=memory
    )
    fires("out of bounds", text % "p[t % 16]", out, "did not ask|which has", memory={})
    run(text % "a[31 - t] + b[31 - t] + p[t / 2]", out, memory=memory)


def test_unbound_buffer() -> None:
    text = """constant bool has [[function_constant(0)]];
        kernel void f(device float* out [[buffer(0)]], device float* x [[buffer(1)]],
            device float* y [[buffer(2), function_constant(has)]]) { out[0] = %s; }"""
    out = {0: floats(1)}
    no = {0: False}
    fires("unbound buffer", text % "x[0]", out, "buffer 1", constants=no, threads=1)
    fires(
        "unbound buffer", text % "y[0]", out, "function constant is false", constants=no, threads=1
    )
    run(text % "has ? y[0] : 1.0f", out, constants=no, threads=1)


@pytest.mark.parametrize("space", ["device", "threadgroup"])
def test_misaligned_vectors(space: str) -> None:
    text = """kernel void f(device float* out [[buffer(0)]], device half* in [[buffer(1)]],
                            uint t [[thread_index_in_threadgroup]]) {
        threadgroup half tile[160];
        for (uint i = t; i < 160; i += 32) tile[i] = in[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[t] = float((*(%s const half4*)(%s + t * %d)).x);
    }"""
    name = "in" if space == "device" else "tile"
    buffers = {0: floats(32), 1: np.ones(160, np.float16)}
    fires("misaligned access", text % (space, name, 3), buffers, "not a multiple of 8")
    run(text % (space, name, 4), buffers)


def test_misaligned_view_from_the_host() -> None:
    text = """kernel void f(device float4* x [[buffer(0)]]) { x[0] = 1.0f; }"""
    x = np.zeros(16, np.float32)
    fires("misaligned access", text, {0: x[1:5]}, "buffer 0 at byte 0", threads=1)
    run(text, {0: x[4:8]}, threads=1)


# ------------------------------------------------------------------------------ threadgroup memory


def test_uninitialised_threadgroup_memory() -> None:
    text = """kernel void f(device float* out [[buffer(0)]],
                 uint t [[thread_index_in_threadgroup]]) {
        threadgroup float a[32];
        if (t < %d) a[t] = 1.0f;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[t] = a[31 - t];
    }"""
    out = {0: floats(32)}
    fires("uninitialised threadgroup memory", text % 31, out, "'a' at byte 124")
    run(text % 32, out)


def test_threadgroup_memory_does_not_survive_its_threadgroup() -> None:
    text = """kernel void f(device float* out [[buffer(0)]],
                 uint g [[threadgroup_position_in_grid]],
                            uint t [[thread_index_in_threadgroup]]) {
        threadgroup float a[32];
        %s a[t] = 1.0f;
        out[g * 32 + t] = a[t];
    }"""
    out = {0: floats(64)}
    fires("uninitialised threadgroup memory", text % "if (g == 0)", out, threadgroups=2)
    run(text % "", out, threadgroups=2)


def test_uninitialised_memory_is_nan_without_checks() -> None:
    out = np.zeros(32, np.float32)
    run(
        """kernel void f(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
            threadgroup float a[32];
            if (t > 40) a[t] = 0.0f;
            out[t] = a[t];
        }""",
        {0: out},
        options=Options(checks=False),
    )
    assert np.isnan(out).all()


def test_uninitialised_registers_are_no_numbers() -> None:
    out = np.zeros(32, np.float32)
    text = """
        void fill(thread float* a, uint n) { for (uint i = 0; i < n; i++) a[i] = 1.0f; }
        kernel void f(device float* out [[buffer(0)]], constant uint& n [[buffer(1)]],
                      uint t [[thread_index_in_threadgroup]]) {
            float a[8];
            simdgroup_float8x8 m;
            %s
            fill(a, n);
            simdgroup_float8x8 one(1.0f);
            simdgroup_multiply_accumulate(m, one, one, m);
            out[t] = a[t %% 8] + m.thread_elements()[0];
        }"""
    cleared = "m = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);"
    run(text % "", {0: out, 1: np.uint32(8).tobytes()})
    assert np.isnan(out).all()
    run(text % cleared, {0: out, 1: np.uint32(7).tobytes()})
    assert np.isnan(out[7::8]).all()
    assert not np.isnan(out[:7]).any()
    run(text % cleared, {0: out, 1: np.uint32(8).tobytes()})
    assert not np.isnan(out).any()


def test_threadgroup_memory_limit() -> None:
    text = """kernel void f(device float* out [[buffer(0)]],
                 threadgroup float* p [[threadgroup(0)]],
                            uint t [[thread_index_in_threadgroup]]) {
        threadgroup float a[%d];
        a[t] = p[t] = 0.0f;
        out[t] = a[t];
    }"""
    with pytest.raises(KernelError, match="32784 bytes") as caught:
        run(text % 8164, {0: floats(32)}, memory={0: 128})
    assert caught.value.check == "threadgroup memory"
    run(text % 8160, {0: floats(32)}, memory={0: 128})


def test_thread_limits() -> None:
    text = """[[kernel, max_total_threads_per_threadgroup(64)]]
        void f(device float* out [[buffer(0)]],
                     uint t [[thread_position_in_grid]]) { out[t] = 0.0f; }"""
    out = {0: floats(1024 + 32)}
    fires("too many threads", text, out, "max_total_threads_per_threadgroup is 64", threads=96)
    run(text, out, threads=64)
    plain = text.replace("[[kernel, max_total_threads_per_threadgroup(64)]]", "kernel")
    with pytest.raises(KernelError, match="1056 threads"):
        run(plain, out, threads=1056)
    run(plain, out, threads=1024)


# ------------------------------------------------------------------------------------------ races


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ("a[t] = 1.0f; out[t] = a[63 - t];", "'a'"),  # read after write
        ("a[t] = 1.0f; BARRIER float x = a[63 - t]; a[t] = x;", "writes.*read"),  # write after read
        ("a[0] = 1.0f;", "writes.*wrote"),  # both write
        ("a[t] = 1.0f; threadgroup_barrier(mem_flags::mem_none); out[t] = a[63 - t];", "'a'"),
        ("a[t] = 1.0f; threadgroup_barrier(mem_flags::mem_device); out[t] = a[63 - t];", "'a'"),
        # A simdgroup's barrier orders its own lanes only.
        ("a[t] = 1.0f; simdgroup_barrier(mem_flags::mem_threadgroup); out[t] = a[63 - t];", "'a'"),
        # Lockstep orders nothing.
        ("a[t] = 1.0f; simd_sum(a[t]); out[t] = a[t ^ 1];", "'a'"),
    ],
)
def test_races_in_threadgroup_memory(wrong: str, match: str, seed: int) -> None:
    text = """kernel void f(device float* out [[buffer(0)]],
                 uint t [[thread_index_in_threadgroup]]) {
        threadgroup float a[64];
        a[t] = 0.0f;
        BARRIER
        %s
    }""".replace("BARRIER", BARRIER)
    out = {0: floats(64)}
    body = text % wrong.replace("BARRIER", BARRIER)
    # The order decides which of two accesses comes second and is blamed; reads and writes swap.
    match = match if seed == 0 and "writes" not in match else "which thread"
    fires("data race", body, out, match, threads=64, seed=seed)


def test_mended_races_in_threadgroup_memory() -> None:
    text = f"""kernel void f(device float* out [[buffer(0)]],
                             uint t [[thread_index_in_threadgroup]]) {{
        threadgroup float a[64];
        a[t] = 0.0f;
        {BARRIER}
        float x = a[63 - t];
        {BARRIER}
        a[t] = x;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        out[t] = a[t ^ 1];
        {BARRIER}
        if (t == 0) a[0] = 2.0f;
        {BARRIER}
        out[t] += a[0];
    }}"""
    for seed in range(4):
        run(text, {0: floats(64)}, threads=64, seed=seed)


def test_races_in_device_memory() -> None:
    text = """kernel void f(device float* x [[buffer(0)]], uint t [[thread_position_in_grid]]) {
        x[t] = 1.0f;
        threadgroup_barrier(mem_flags::%s);
        x[t + 128] = x[t ^ %d];
    }"""
    x = {0: floats(256)}
    more: dict[str, Any] = {"threads": 64, "threadgroups": 2}
    # Between threadgroups of one dispatch no barrier helps, whichever runs first.
    for seed in (0, 1, 2):
        fires("data race", text % ("mem_device", 64), x, "which thread", **more, seed=seed)
    fires("data race", text % ("mem_threadgroup", 1), x, "which thread", **more)
    run(text % ("mem_device", 1), x, **more)


def test_read_modify_write_needs_atomics() -> None:
    text = """kernel void f(device uint* x [[buffer(0)]]) { x[0] += 1; }"""
    fires("data race", text, {0: np.zeros(1, np.uint32)})
    count = np.zeros(1, np.uint32)
    run(
        """kernel void f(device atomic_uint* x [[buffer(0)]])
           { atomic_fetch_add_explicit(x, 1u, memory_order_relaxed); }""",
        {0: count},
    )
    assert count[0] == 32


@pytest.mark.parametrize("seed", range(6))
def test_race_with_any_reader(seed: int) -> None:
    """However many have read a byte, the one reader that the writer races with is remembered."""
    text = """kernel void f(device float* out [[buffer(0)]],
                 uint t [[thread_index_in_threadgroup]]) {
        threadgroup float a[1];
        if (t == 0) a[0] = 1.0f;
        BARRIER
        float x = 0.0f;
        if (t %% 32 == %d || t >= %d) x = a[0];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        if (t < 2) x += a[0];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        if (t == 0) a[0] = 2.0f;
        out[t] = x;
    }""".replace("BARRIER", BARRIER)
    out = {0: floats(96)}
    fires("data race", text % (5, 1000), out, "which thread", threads=96, seed=seed)
    fires("data race", text % (33, 95), out, "which thread", threads=96, seed=seed)
    run(text % (33, 1000), out, threads=96, seed=seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("space", ["device", "threadgroup"])
@pytest.mark.parametrize(
    "wrong",
    [
        "if (t == 40) plain[0] = 1; ADD",  # written plainly, then atomically
        "ADD if (t == 40) plain[0] = 1;",
        "if (t == 40) seen = plain[0]; ADD",
        "ADD if (t == 40) seen = plain[0];",
        "if (t == 40) plain[0] = 1; seen = atomic_load_explicit(count, memory_order_relaxed);",
    ],
)
def test_atomics_race_with_plain_accesses(wrong: str, space: str, seed: int) -> None:
    text = f"""kernel void f(device uint* out [[buffer(0)]], device uint* memory [[buffer(1)]],
                 uint t [[thread_index_in_threadgroup]]) {{
        threadgroup uint tile[1];
        {space} uint* plain = {"memory" if space == "device" else "tile"};
        {space} atomic_uint* count = ({space} atomic_uint*)plain;
        uint seen = 0;
        if (t == 0) atomic_store_explicit(count, 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
        %s
        out[t] = seen;
    }}"""
    add = "atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);"
    between = "threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);"
    buffers = {0: np.zeros(64, np.uint32), 1: np.zeros(1, np.uint32)}
    body = text % wrong.replace("ADD", add)
    fires("data race", body, buffers, "which thread", threads=64, seed=seed)
    run(text % f"{add} {between} seen = plain[0];", buffers, threads=64, seed=seed)
    assert (buffers[0] == 64).all()


def test_race_names_both_threads_and_the_line() -> None:
    with pytest.raises(KernelError) as caught:
        run(
            """kernel void f(device float* x [[buffer(0)]],
                         uint2 t [[thread_position_in_threadgroup]],
                             uint2 g [[threadgroup_position_in_grid]]) {
                x[t.x] = 1.0f;
            }""",
            {0: floats(32)},
            threads=(32, 1),  # type: ignore[arg-type]
            threadgroups=(1, 2),
        )
    message = str(caught.value)
    assert "<source>:6: data race in kernel 'f'" in message
    assert "thread (0,0,0) of threadgroup (0,1,0) writes buffer 0 at byte 0" in message
    assert "thread (0,0,0) of threadgroup (0,0,0) wrote" in message


# -------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        ("if (t >= n) return; BARRIER", "divergent barrier"),
        ("if (t < 32) { BARRIER }", "divergent barrier"),
        ("if (t % 2 == 0) { BARRIER } else { BARRIER }", "divergent barrier"),
        ("for (uint i = 0; i < t; i++) { BARRIER }", "divergent barrier"),
        ("if (t < 16) simdgroup_barrier(mem_flags::mem_none); BARRIER", "divergent"),
        ("if (t % 2 == 0) x = simd_sum(x); else x = simd_sum(x + 1.0f);", "divergent simdgroup"),
        ("if (t % 2 == 0) x = simd_max(x); else x = simd_min(x); BARRIER", "divergent simdgroup"),
        ("if (t < 16) x = simd_sum(x); BARRIER", "divergent"),
        ("if (t < 16) x = simd_shuffle_xor(x, 1); x = simd_sum(x);", "divergent simdgroup"),
        ("if (t % 32 < 16) simdgroup_multiply_accumulate(m, m, m, m); BARRIER", "divergent"),
        ("if (t % 32 < 16) simdgroup_load(m, y); BARRIER", "divergent simdgroup operation"),
        ("simdgroup_load(m, y + t); BARRIER", "divergent simdgroup operation"),
        ("if (t % 32 < 16) simdgroup_load(m, y);", "divergent simdgroup operation"),
        ("if (t == 5) return; simdgroup_multiply(m, m, m);", "inactive lanes"),
        ("if (t == 5) return; x = simd_shuffle_xor(x, 1);", "inactive lanes"),
        ("x = simd_shuffle(x, ushort(t + 32));", "inactive lanes"),
        ("x = simd_shuffle_xor(x, t % 2);", "non-uniform shuffle"),
        ("x = simd_broadcast(x, ushort(t));", "non-uniform shuffle"),
    ],
)
def test_divergence(wrong: str, check: str, seed: int) -> None:
    text = """kernel void f(device float* out [[buffer(0)]], constant uint& n [[buffer(1)]],
                            device const float* y [[buffer(2)]],
                            uint t [[thread_index_in_threadgroup]]) {
        float x = 1.0f;
        simdgroup_float8x8 m(1.0f);
        %s
        out[t] = x + m.thread_elements()[0];
    }"""
    body = text % wrong.replace("BARRIER", BARRIER)
    buffers = {0: floats(64), 1: np.uint32(50).tobytes(), 2: floats(200)}
    with pytest.raises(KernelError) as caught:
        run(body, buffers, threads=64, seed=seed)
    assert caught.value.check.startswith(check) or "divergent" in caught.value.check


def test_convergence() -> None:
    """The mended forms: conditions that whole simdgroups or threadgroups share, and threads that
    return after the last thing to share."""
    out = np.zeros(64, np.float32)
    for seed in range(3):
        run(
            f"""kernel void f(device float* out [[buffer(0)]], constant uint& n [[buffer(1)]],
                             device const float* y [[buffer(2)]],
                             uint t [[thread_index_in_threadgroup]]) {{
                float x = t < n ? 1.0f : 0.0f;
                simdgroup_float8x8 m(1.0f);
                if (t >= 32) x = simd_sum(x);
                {BARRIER}
                if (t < 32) {{ simdgroup_load(m, y); simdgroup_multiply(m, m, m); }}
                x = simd_shuffle(x, ushort(31 - t % 32));
                for (uint i = 0; i < n; i++) {BARRIER}
                if (t >= n) return;
                x = simd_max(x);
                out[t] = x + 0.0f * m.thread_elements()[0];
            }}""",
            {0: out, 1: np.uint32(50).tobytes(), 2: np.ones(64, np.float32)},
            threads=64,
            seed=seed,
        )
    assert out.tolist() == [1] * 32 + [18] * 18 + [0] * 14


def test_partial_simdgroup_cannot_multiply_matrices() -> None:
    text = """kernel void f(device float* out [[buffer(0)]]) {
        simdgroup_float8x8 m(1.0f);
        simdgroup_multiply(m, m, m);
        simdgroup_store(m, out, 8);
    }"""
    fires("inactive lanes", text, {0: floats(64)}, "32 lanes", threads=24)
    run(text, {0: floats(64)}, threads=32)


def test_dead_loop_is_not_a_hang() -> None:
    """A thread that waits for one that will not come is an error, not a wait."""
    text = f"""kernel void f(device float* out [[buffer(0)]],
                 uint t [[thread_index_in_threadgroup]]) {{
        if (t < 32) {BARRIER} else simdgroup_barrier(mem_flags::mem_none);
    }}"""
    fires("divergent barrier", text, {0: floats(1)}, threads=64)


def test_stack_overflow_is_not_checked_but_large_arrays_fit() -> None:
    out = np.zeros(32, np.float32)
    run(
        """kernel void f(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
            float a[4096];
            for (uint i = 0; i < 4096; i++) a[(i * 7 + t) % 4096] = float(i);
            out[t] = a[t];
        }""",
        {0: out},
    )
    assert out[0] == 0
