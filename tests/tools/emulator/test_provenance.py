"""A form of the language that nobody has published is refused in umfa's shaders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.metal.emulator import own, provenance, published
from tools.metal.emulator.structure import read

SHADERS = Path(__file__).parents[3] / "shaders"
KNOWN = provenance.table()


def unknown(text: str) -> list[tuple[str, str]]:
    """Forms of a preprocessed text that are not in the table."""
    found = dict.fromkeys(f.key for f in provenance.forms(read(text), text))
    return [key for key in found if key not in KNOWN]


# A form without precedent, and how else to write what it says.
REFUSED = [
    (
        ("reference", "bound to ?:"),
        "void g(thread float (&x)[2], bool b) { thread float& a = b ? x[0] : x[1]; a = 1.0f; }",
        "void g(thread float (&x)[2], bool b) { thread float& a = x[b ? 0 : 1]; a = 1.0f; }",
    ),
    (
        ("array", "a part of an array bound to T (&)[N]"),
        "template <int N> void f(thread float (&x)[N]) {} void g() { float x[2][4]; f(x[0]); }",
        "template <int N> void f(thread float (&x)[N]) {} void g() { float x[4]; f(x); }",
    ),
    (
        ("array", "a part of an array bound to T (&)[N]"),
        "void f(int n, thread float (&x)[4]) {} void g(thread float (&x)[2][4]) { f(1, x[1]); }",
        "void f(int n, float x) {} void g(thread float (&x)[2][4]) { f(1, x[1][2]); }",
    ),
    (
        ("array", "overloads that differ in an array's elements"),
        "int f(thread half (&x)[8]) { return 1; } int f(thread float (&x)[4]) { return 2; }",
        "int f(thread half (&x)[8]) { return 1; } int g(thread float (&x)[4]) { return 2; }",
    ),
    (
        ("thread_elements()", "by a computed index"),
        "void g(thread simdgroup_matrix<float, 8, 8>& m, int i) {"
        " m.thread_elements()[i % 2] = 1.0f; }",
        "void g(thread simdgroup_matrix<float, 8, 8>& m, int i) {"
        " m.thread_elements()[i] = m.thread_elements()[1]; }",
    ),
    (
        ("struct", "assigned from device"),
        "struct S { int a; }; void g(device const S* s) { S x; x = s[1]; }",
        "struct S { int a; }; void g(device const S* s) { S x = s[1]; S y; y = x; y.a = s[0].a; }",
    ),
    (
        ("struct", "assigned from device"),
        "struct S { int a; }; void g(device const S* s) { S x; x = *s; }",
        "struct S { int a; }; void g(device const S* s) { const S x = s[0]; }",
    ),
    (
        ("struct", "assigned from constant"),
        "struct S { int a; }; struct T { S s; }; void g(constant S& s) { T x; x.s = s; }",
        "struct S { int a; }; struct T { S s; }; void g(constant S& s) { T x = {s}; }",
    ),
    (
        ("unrolled loop", "unroll by /= 2"),
        "void g() {\n#pragma clang loop unroll(full)\nfor (int i = 8; i > 0; i /= 2) {}\n}",
        "void g() {\n#pragma clang loop unroll(full)\nfor (int i = 8; i > 0; i >>= 1) {}\n}",
    ),
    (
        ("unrolled loop", "unroll by *= 2"),
        "void g() {\n#pragma clang loop unroll(full)\nfor (int i = 1; i < 9; i *= 2) {}\n}",
        "void g() {\n#pragma clang loop unroll(full)\nfor (int i = 1; i < 9; i += 2) {}\n}",
    ),
    (
        ("unrolled loop", "unroll of while"),
        "void g(int i) {\n#pragma clang loop unroll(full)\nwhile (i > 0) --i;\n}",
        "void g(int i) {\n#pragma clang loop unroll(full)\nfor (int k = 0; k < 4; ++k) --i;\n}",
    ),
    (
        ("kernel", "template of a kernel in a namespace"),
        "namespace a { template <typename T> [[kernel]] void k(device T* x [[buffer(0)]]) {} }",
        "template <typename T> [[kernel]] void k(device T* x [[buffer(0)]]) {}",
    ),
    (
        ("kernel", "kernel in a namespace"),
        "namespace a { [[kernel]] void k(device int* x [[buffer(0)]]) {} }",
        "[[kernel]] void k(device int* x [[buffer(0)]]) {}",
    ),
    (
        ("instantiation", "template [[host_name]] [[kernel]] decltype A::f<...>"),
        "namespace a { template <typename T> [[kernel]] void k(device T* x [[buffer(0)]]) {} }"
        ' template [[host_name("k")]] [[kernel]] decltype(a::k<int>) a::k<int>;',
        "template <typename T> [[kernel]] void k(device T* x [[buffer(0)]]) {}"
        ' template [[host_name("k")]] [[kernel]] decltype(k<int>) k<int>;',
    ),
    (
        ("attribute", "[[visible]]"),
        "[[visible]] float g(float x) { return x; }",
        "inline float g(float x) { return x; }",
    ),
    (
        ("attribute", "[[thread_position_in_grid ushort3]]"),
        "[[kernel]] void k(ushort3 at [[thread_position_in_grid]]) {}",
        "[[kernel]] void k(uint3 at [[thread_position_in_grid]]) {}",
    ),
    (
        ("attribute", "__attribute__((noinline))"),
        "__attribute__((noinline)) float g(float x) { return x; }",
        "__attribute__((always_inline)) float g(float x) { return x; }",
    ),
    (
        ("function", "simd_ballot(1)"),
        "bool g(bool x) { return simd_ballot(x); }",
        "bool g(bool x) { return simd_any(x); }",
    ),
    (
        ("function", "nobody_knows(1)"),
        "float g(float x) { return nobody_knows(x); }",
        "float known(float x) { return x; } float g(float x) { return known(x); }",
    ),
    (
        ("function", "fast::fma(3)"),
        "float g(float x) { return fast::fma(x, x, x); }",
        "float g(float x) { return fma(x, x, x); }",
    ),
    (
        ("method", "elements(0)"),
        "struct S { int a; }; int g(S s) { return s.elements(); }",
        "struct S { int elements() { return 1; } }; int g(S s) { return s.elements(); }",
    ),
    (("type", "texture2d"), "void g(texture2d<float> t) {}", "void g(float t) {}"),
    (("type", "long4"), "void g(long4 t) {}", "void g(uint4 t) {}"),
    (
        ("constant", "mem_texture"),
        "void g() { threadgroup_barrier(mem_flags::mem_texture); }",
        "void g() { threadgroup_barrier(mem_flags::mem_threadgroup); }",
    ),
    (
        ("as_type", "half4 of uint2"),
        "void g(uint2 x) { half y = as_type<half4>(x).x; }",
        "void g(uint x) { half y = as_type<half2>(x).x; }",
    ),
    (
        ("as_type", "float of unknown"),
        "struct S { uint a; }; float g(S s) { return as_type<float>(s.a); }",
        "struct S { uint a; }; float g(S s) { const uint a = s.a; return as_type<float>(a); }",
    ),
    (
        ("cast", "reinterpret_cast<constant *>"),
        "float g(constant uint* x) { return reinterpret_cast<constant float*>(x)[0]; }",
        "float g(device uint* x) { return reinterpret_cast<device float*>(x)[0]; }",
    ),
    (("cast", "(constant *)"), "void g(constant int* x) { f((constant uint*)x); }", "void g() {}"),
    (
        ("pointer", "member: threadgroup const &"),
        "struct S { threadgroup const float& x; };",
        "struct S { device const float* x; };",
    ),
    (
        ("pointer", "kernel parameter: device &"),
        "[[kernel]] void k(device float& x [[buffer(0)]]) {}",
        "[[kernel]] void k(device float* x [[buffer(0)]]) {}",
    ),
    (("declaration", "enum"), "enum E { A };", "struct E { int a; };"),
    (("word", "do"), "void g(int x) { do --x; while (x); }", "void g(int x) { while (x) --x; }"),
    (("word", "switch"), "void g(int x) { switch (x) {} }", "void g(int x) { if (x) {} }"),
    (("word", "and"), "bool g(bool a) { return a and a; }", "bool g(bool a) { return a && a; }"),
    (
        ("word", "for of a range"),
        "void g(thread float (&x)[2]) { for (float y : x) {} }",
        "void g(thread float (&x)[2]) { for (int i = 0; i < 2; ++i) {} }",
    ),
    (("operator", "->*"), "int g(S s) { return s->*p; }", "int g(thread S* s) { return s->p; }"),
    (("literal", "decimal ul"), "ulong g() { return 1ul; }", "uint g() { return 1u; }"),
    (("literal", "character"), "int g() { return 'a'; }", "int g() { return 97; }"),
    (
        ("template parameter", "template"),
        "template <template <typename> class T> struct S { int a; };",
        "template <typename T> struct S { int a; };",
    ),
]


@pytest.mark.parametrize(("form", "wrong", "right"), REFUSED)
def test_what_has_no_precedent(form: tuple[str, str], wrong: str, right: str) -> None:
    assert form in unknown(wrong)
    assert form not in unknown(right)
    assert form not in KNOWN


def test_what_is_gone_after_preprocessing() -> None:
    def found(text: str) -> list[tuple[str, str, int]]:
        forms = provenance.raw_forms(text, "a.h")
        return [(*f.key, f.token.line) for f in forms if f.key not in KNOWN]

    assert found("#pragma clang fp contract(fast)") == [("pragma", "clang fp contract(fast)", 1)]
    assert found("\n#include <metal_texture>") == [("include", "metal_texture", 2)]
    assert found("#if __METAL_IOS__") == [("macro", "__METAL_IOS__", 1)]
    host = "#ifndef __METAL__\n#include <stdint.h>\n#endif\n"
    assert found(host) == []
    assert found(host.replace("METAL__", "METAL_VERSION__")) == []
    assert found(host + "#include <stdint.h>") == [("include", "stdint.h", 4)]
    assert (
        found("#ifdef __METAL__\n#include <metal_stdlib>\n#else\n#include <stdint.h>\n#endif") == []
    )
    assert found("#pragma once\n#pragma clang loop unroll_count(8)") == []


def test_types_in_as_type_are_told_from_what_is_declared() -> None:
    text = """
    template <typename T> void g(uint a, thread float (&b)[2], T c, bool d) {
        const half2 e = half2(0.0h);
        as_type<A>(a); as_type<B>(b[0]); as_type<C>(c); as_type<D>(e); as_type<E>(0x1u);
        as_type<F>(d ? a & 1u : a << 16); as_type<G>((uint(1) << 2)); as_type<H>(1.0f);
        as_type<I>(static_cast<ushort>(a)); as_type<J>(-a);
    }
    """
    found = [f.form for f in provenance.forms(read(text), text) if f.kind == "as_type"]
    types = ["uint", "float", "T", "half2", "uint", "uint", "uint", "float", "ushort", "unknown"]
    assert found == [f"{name} of {of}" for name, of in zip("ABCDEFGHIJ", types, strict=True)]


def test_the_shaders_use_published_forms_alone() -> None:
    assert own.form_faults(SHADERS, KNOWN) == []


def test_a_form_in_any_file_and_branch_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.metal").write_text(
        '#include "b.h"\n#ifdef UMFA_KERNEL\nenum E { A };\n#endif\n#pragma clang fp contract(on)\n'
    )
    (tmp_path / "b.h").write_text("inline bool g(bool a) { return simd_ballot(a); }\n")
    faults = own.form_faults(tmp_path, KNOWN)
    lines = [f.removeprefix(f"{tmp_path}/").split(": error: ")[0] for f in faults]
    assert set(lines) == {"a.metal:3", "a.metal:5", "b.h:1"}
    assert all(f.endswith("[provenance]") for f in faults)


def test_the_table_is_sorted_and_has_a_source_for_each_row() -> None:
    rows = list(KNOWN)
    assert rows == sorted(rows)
    for source, place in KNOWN.values():
        specification = "(" in source or source.startswith("Metal Shading Language")
        assert specification or ("/" in source and "/" in place), (source, place)


@pytest.mark.slow
def test_the_rows_from_mlx_are_in_mlx() -> None:
    include = published.folder()
    if include is None:
        pytest.skip("mlx is not installed")
    found = published.forms_of(include, published.headers(include))
    # Seen by hand: what MLX itself declares, in a macro, or in a header for Metal 4.
    by_hand = {
        ("attribute", "[[host_name(...)]]"),
        ("function", "simd_max(1)"),
        ("function", "simd_shuffle_xor(2)"),
        ("function", "simd_sum(1)"),
        ("instantiation", "template [[host_name]] [[kernel]] decltype f<...>"),
        ("pragma", "clang loop unroll_count(N)"),
        ("unrolled loop", "unroll_count by ++"),
        ("unrolled loop", "unroll_count by += constant"),
    }
    rows = {key for key, (source, _) in KNOWN.items() if source.startswith("ml-explore/mlx")}
    assert rows - set(found) == by_hand
