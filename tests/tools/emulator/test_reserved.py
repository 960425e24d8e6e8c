"""Names that Metal has taken are refused, for every sort of declaration."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.tools.emulator.emulator_kernels import HEADER
from tools.metal.emulator import (
    SourceError,
    build,
    lint,
    own,
    published,
    structure,
    toolchain,
    words,
)
from tools.metal.emulator.declarations import declarations
from tools.metal.emulator.reserved import macro_faults, macros_of
from tools.metal.emulator.tokens import tokenize

SHADERS = Path(__file__).parents[3] / "shaders"
USING = "using namespace metal;\n"

# What is declared, as "kind: text" with the name in the place of @.
LOCAL = """
variable: void g() { int @ = 1; }
variable: void g() { const int @ = 1; }
variable: void g() { int @; }
variable: void g() { int a = 1, @ = 2; }
variable: void g() { int a[2], @[2] = {}; }
variable: void g() { float4 @(1.0f); }
variable: void g() { float4 @{}; }
variable: void g() { device const float* @ = nullptr; }
variable: void g(thread int& x) { thread int& @ = x; }
variable: void g(thread int (&x)[4]) { thread int (&@)[4] = x; }
variable: void g() { for (int @ = 0;;) {} }
variable: void g() { for (int i = 0, @ = 2;;) {} }
variable: void g() { if (bool @ = true) {} }
variable: void g() { while (bool @ = true) {} }
variable: void g() { switch (int @ = 2) { default:; } }
variable: void g() { if (true) { const uint @ = 3; } else int b; }
variable: void g() { do { const uint @ = 3; } while (false); }
variable: void g() { switch (1) { case 1: { auto @ = 3; } } }
variable: kernel void k() { threadgroup float @[32]; }
variable: void g() { vec<float, 4> @; }
variable: template <typename T> void g() { typename T::type @; }
parameter: void g(int @) {}
parameter: void g(int a, const int @ = 2) {}
parameter: void g(device const float* @) {}
parameter: void g(device const float* const @) {}
parameter: void g(constant float& @, int b) {}
parameter: void g(thread int (&@)[4]) {}
parameter: void g(thread float @[4]) {}
parameter: float g(vec<float, 4> @) { return 1.0f; }
parameter: kernel void k(uint @ [[thread_position_in_grid]]) {}
parameter: kernel void k(device const float* @ [[buffer(0)]], uint b [[threads_per_grid]]) {}
parameter: struct S { void f(int @) {} };
parameter: struct S { S(int @) : x(1) {} int x; };
parameter: void g() { auto f = [&](int @) { return 1; }; }
variable: void g() { auto f = [&](int a) { int @ = a; return 1; }; }
member: struct S { int @; };
member: struct S { int a, @; };
member: struct S { float @[4]; };
member: struct S { device const float* @; };
member: struct S { static constant constexpr const int @ = 1; };
member: struct S { int @ : 3; };
member: struct S { static int @(int a) { return a; } };
member: struct S { int @() const { return 1; } };
member: struct S { template <typename T> T @(T a) { return a; } };
member: struct S { struct { int @; } inner; };
member: union U { int a; float @; };
label: void g() { @: ; }
template parameter: template <typename @> void g() {}
template parameter: template <typename T, class @ = int> struct S {};
template parameter: template <int @> void g() {}
template parameter: template <int A = 2, bool @ = false> void g() {}
template parameter: template <typename... @> void g() {}
template parameter: template <template <typename> class @> struct S {};
type: struct S { struct @ {}; };
type: void g() { struct @ { int a; }; }
alias: struct S { using @ = int; };
alias: void g() { typedef float @; }
enumerator: struct S { enum E { A, @ = 3 }; };
"""
NAMESPACE = """
variable: constant float @ = 1.0f;
variable: constant constexpr float a = 1.0f, @ = 2.0f;
variable: constant bool @ [[function_constant(0)]];
variable: constant float @[2] = {1.0f, 2.0f};
function: void @() {}
function: inline float @(float a) { return a; }
function: template <typename T> T @(T a) { return a; }
function: device const float* @(device const float* a) { return a; }
function: kernel void @(device float* a) {}
function: [[kernel]] void @(device float* a) {}
function: void @(int a);
type: struct @ { int a; };
type: struct @;
type: class @ {};
type: union @ { int a; };
type: template <typename T> struct @ { T a; };
type: template <typename T> class @;
type: struct alignas(16) @ { int a; };
type: enum @ { A };
type: enum class @ : uchar { A };
enumerator: enum E { @, B };
enumerator: enum class E { A, @ = 2 };
alias: using @ = int;
alias: template <typename T> using @ = vec<T, 4>;
alias: typedef float @;
alias: typedef float @[4];
alias: typedef struct { int a; } @;
namespace: namespace @ { constant int a = 1; }
namespace: namespace a { namespace @ { constant int b = 1; } }
variable: namespace a { constant float @ = 1.0f; }
function: namespace a { void @() {} }
type: namespace a { struct @ { int a; }; }
"""


def _cases(text: str) -> list[tuple[str, str]]:
    pairs = [line.split(": ", 1) for line in text.strip().splitlines()]
    return [(kind, form) for kind, form in pairs]


LOCAL_FORMS, NAMESPACE_FORMS = _cases(LOCAL), _cases(NAMESPACE)
FORMS = LOCAL_FORMS + NAMESPACE_FORMS


NAME_RULES = {
    name: lint.OWN_RULES[name]
    for name in (
        *("keyword-name", "predeclared-macro", "predeclared-type", "hidden-type"),
        *("hidden-function", "coming-word", "reserved-identifier"),
    )
}


def rules_of(text: str) -> list[tuple[str, str, str]]:
    """(rule, name, message) of what the rules for umfa's own text find."""
    s = structure.Structure(tokenize(text))
    # Not `read`, which refuses a kernel that has lost its name.
    structure._find_attributes(s)
    structure._find_scopes(s)
    return [(rule, t.text, message) for t, rule, message in lint.findings(s, NAME_RULES)]


CLASSES = {
    "keyword-name": sorted(words.KEYWORDS),
    "coming-word": sorted(words.COMING_WORDS),
    "predeclared-macro": sorted(words.MACROS),
    "hidden-type": sorted(words.TYPES),
    "reserved-identifier": ["_A", "a__b", "__x", "main"],
}


@pytest.mark.parametrize("rule", CLASSES)
def test_every_word_in_every_sort_of_declaration(rule: str) -> None:
    step = 1 if rule == "keyword-name" else len(CLASSES[rule]) // 4
    missed = []
    for kind, form in FORMS:
        assert rules_of(USING + form.replace("@", "ordinary")) == []
        for word in CLASSES[rule][::step]:
            found = rules_of(USING + form.replace("@", word))
            told = any(r == rule and w == word and kind in message for r, w, message in found)
            if not told and (kind, word) != ("label", "default"):  # which is a switch's
                missed.append((form, word))
    assert missed == []


def test_functions_of_the_library_at_namespace_scope_and_elsewhere() -> None:
    for _, form in NAMESPACE_FORMS:
        for word in sorted(words.FUNCTIONS)[::7]:
            found = rules_of(USING + form.replace("@", word))
            assert [r for r, _, _ in found] == ["hidden-function"], (form, word)
    for _, form in LOCAL_FORMS:
        assert rules_of(USING + form.replace("@", "cos")) == [], form


# What only looks like a declaration of these words, or declares none.
INNOCENT = """
float4 operator+(float4 a, int b) { return a; }
struct S { operator float() const { return 1.0f; } S() = default; };
struct S { thread S& operator=(thread const S& other) { return *this; } };
void g(int, float, bool) {} void h(unsigned int, device const float*, thread const float4&) {}
void f(unsigned long a, long int b, unsigned char c) {}
constant unsigned int n = sizeof(float[4]);
template <typename = void, int = 3> struct S;
template <typename> struct S; template <int> struct R;
template <> struct S<float> { using type = half; }; template <> struct S<half, int>;
using A = device float*; typedef unsigned int word_t;
constant bool same = is_same_v<float, half>, b = true;
constant bool both = true && is_same_v<float, half>;
float g(float a) { return a < 1.0f ? a : float(2); }
void g(float a, float b) { a = a * b; a < b; b = -a; (void)a; int(3); if (a < b && b > a) a = b; }
void g(device float* p, float c) { *p = c; p[0] = float(c); device float* q = (device float*)p; }
void g(float a) { switch (int(a)) { case 1: break; default: return; } for (;;) break; }
template [[host_name("a")]] [[kernel]] decltype(f<float>) f<float>;
struct S { float cos, sin; }; float g(S s, float min) { return s.cos + s.sin * min; }
float g(float dot) { float step = dot; for (int all = 0; all < 3; ++all) step += 1.0f; }
auto g(int a) -> float { return 1.0f; }
static_assert(sizeof(float) == 4, "float");
using metal::float4; namespace m = metal;
"""


def test_what_declares_none_of_them() -> None:
    for text in INNOCENT.strip().splitlines():
        assert rules_of(text) == [], text


def test_only_what_metal_refuses_is_refused_in_published_text() -> None:
    lint_of(
        "float g(float tile, float bias, float object, float quad) { return tile + bias + quad; }"
        "float erf(float x) { return x; } float h(float cos, float sin) { return cos * sin; }"
        "struct _S { int __x; }; namespace a { struct array { int x; }; }"
    )
    for rule, text in (
        ("keyword-name", "float g(float fragment) { return fragment; }"),
        ("keyword-name", "struct S { int vertex; };"),
        ("keyword-name", "constant int kernel = 1;"),
        ("keyword-name", "float ray_data(float x) { return x; }"),
        ("predeclared-macro", "void g() { float INFINITY; }"),
        ("predeclared-type", "struct sampler { int x; };"),
        ("predeclared-type", "constant int quad = 2;"),
    ):
        with pytest.raises(SourceError) as caught:
            lint_of(text)
        assert rule in caught.value.rules, text
    lint_of("struct sampler { int x; };", "predeclared-type")


def lint_of(text: str, *allowed: str) -> None:
    """What `Library` does with a text before it compiles it, with rules of ``Options.allow``."""
    build.read(HEADER + text, (), {}, frozenset(allowed))


# ---------------------------------------------------------------------------------------- macros


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("keyword-name", "#define vertex 1"),
        ("keyword-name", "  #  define device"),
        ("keyword-name", "#define F(a, fragment) (a)"),
        ("keyword-name", "#if 0\n#define F(\\\n    kernel, \\\n    b) 1\n#endif"),
        ("keyword-name", "#define F(const...) 1"),
        ("hidden-type", "#define half2 1"),
        ("hidden-type", "#define F(texture2d) 1"),
        ("hidden-function", "#define min(a, b) ((a) < (b) ? (a) : (b))"),
        ("predeclared-macro", "#define INFINITY 1.0f"),
        ("coming-word", "#define TILE(tile) 1"),
        ("reserved-identifier", "#define _OPEN 1"),
        ("reserved-identifier", "#define __METAL_VERSION__ 310"),
    ],
)
def test_macros_and_their_parameters(rule: str, text: str) -> None:
    faults = macro_faults(macros_of("/* one */ int a;\n" + text + "\n", "x.h"))
    assert [r for r, _, _ in faults] == [rule]
    lines = [n for n, line in enumerate(text.splitlines(), 2) if "define" in line]
    assert [m.line for _, _, m in faults] == lines


def test_macros_that_are_none() -> None:
    text = '// #define vertex\n/*\n#define half\n*/\nchar a[] = "#define int";\n#undef kernel\n'
    assert macro_faults(macros_of(text + "#define UMFA(NAME, ...) vertex NAME\n", "x.h")) == []


# ----------------------------------------------------------------------------------- the word list


def test_names_of_the_stand_in_headers_are_in_the_list() -> None:
    known = words.KEYWORDS | words.TYPES | words.FUNCTIONS | words.MACROS | words.COMING_WORDS
    # Metal has no such functions; the stand-in needs them.
    known |= {"forward", "move"}
    missing = {}
    for path in sorted(toolchain.HEADERS.rglob("*")):
        if path.is_file() and path.name != "umfa_launch.h":
            for d in _public(path.read_text()):
                internal = d.lower().startswith("umfa") or d.startswith("_")
                if d not in known and not internal:
                    missing[d] = path.name
    assert missing == {}


def _public(text: str) -> Iterator[str]:
    """What a header declares at namespace scope, outside of the emulator's own namespace, and
    what its macros declare: UMFA_MATH_1(sin, ...)."""
    plain = re.sub(
        r"namespace umfa_\w+ \{.*?\n\}  // namespace umfa_\w+", "", text, flags=re.DOTALL
    )
    for macro in macros_of(plain, ""):
        yield macro.name
    body = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", "", plain, flags=re.MULTILINE)
    yield from re.findall(r"^UMFA_(?:MATH|INTEGER|COMPARE|CLASSIFY)\w*\((\w+),", body, re.MULTILINE)
    for d in declarations(tokenize(body)):
        if d.scope == "namespace" and d.kind in ("type", "alias", "enumerator", "function"):
            yield d.token.text


# ------------------------------------------------------------------------------ umfa's own shaders


def test_the_shaders_take_no_name_of_metals() -> None:
    assert own.name_faults(SHADERS) == []


def test_every_condition_in_the_shaders_is_read_both_ways() -> None:
    assert own.unknown_conditions(SHADERS) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "a.metal",
            "#ifdef UMFA_METAL_EMULATOR\nconstant int a = 1;\n#else\nvoid g(int quad);\n#endif",
        ),
        ("a.metal", "#ifdef UMFA_KERNEL\nvoid g(int half2) {}\n#endif"),
        ("a.metal", '#include "b.h"'),
        ("a.metal", "void g() { float MAXFLOAT = 1.0f; }"),
        ("b.h", "#pragma once\n#ifdef OTHER\n#define tensor 1\n#endif"),
    ],
)
def test_names_are_found_in_every_branch_and_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "b.h").write_text("struct S { int visible; };\n")
    (tmp_path / "a.metal").write_text("constant int a = 1;\n")
    (tmp_path / name).write_text(text)
    assert len(own.name_faults(tmp_path)) == 1
    assert bool(own.unknown_conditions(tmp_path)) == ("OTHER" in text)


def _chunks() -> list[str]:
    """The declarations at namespace scope of all shaders, each once, as text."""
    found: dict[str, None] = {}
    for s in own.structures(SHADERS):
        start, namespaces = 0, {x.open for x in s.scopes if x.kind == "namespace"}
        for i, token in enumerate(s.tokens):
            if any(x.kind != "namespace" for x in s.scope_of(i)):
                continue
            opens = token.text == "{" and i in namespaces
            after = s.tokens[i + 1].text if i + 1 < len(s.tokens) else ""
            closes = token.text == "}" and after != ";"
            if token.text == ";" or opens or closes:
                text = " ".join(t.text for t in s.tokens[start : i + 1])
                if not opens and len(text) > 2:
                    found[text] = None
                start = i + 1
    return list(found)


def _names_in_place() -> list[tuple[str, str]]:
    """Each name that a shader declares, with the declaration that holds it."""
    pairs = []
    for chunk in _chunks():
        names = {d.token.text for d in declarations(tokenize(chunk))}
        pairs += [(chunk, name) for name in sorted(names)]
    return pairs


WORDS = sorted(words.KEYWORDS | words.COMING_WORDS | words.MACROS | words.TYPES)


def _survivors(renamings: Iterable[tuple[str, str, str]]) -> list[str]:
    """Of (declaration, name, word) those that no rule refuses with the word for the name."""
    alive = []
    for chunk, name, word in renamings:
        found = rules_of(USING + re.sub(rf"\b{name}\b", word, chunk))
        if word not in {w for _, w, _ in found}:
            alive.append(f"{name} -> {word} in {chunk[:60]}")
    return alive


@pytest.mark.slow
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_any_name_of_a_shader_replaced_by_a_keyword_is_refused(every: bool) -> None:
    """Each third name in each declaration by one keyword, or in the smallest by all."""
    pairs, keywords = _names_in_place(), sorted(words.KEYWORDS)
    assert len(pairs) > 500
    if every:
        smallest = dict(sorted(((n, c) for c, n in pairs), key=lambda pair: -len(pair[1])))
        assert _survivors((c, n, w) for n, c in smallest.items() for w in keywords) == []
    else:
        rng = random.Random(12)
        assert _survivors((c, n, rng.choice(keywords)) for c, n in pairs[::3]) == []


@pytest.mark.slow
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_any_name_of_a_shader_replaced_by_another_word_is_refused(every: bool) -> None:
    """All names of a declaration at once, by words that are no keywords: these leave a text with
    its grammar. In as many rounds as there are words each name has had each word."""
    others = [w for w in WORDS if w not in words.KEYWORDS]
    named: dict[str, list[str]] = {}
    for chunk, name in _names_in_place():
        named.setdefault(chunk, []).append(name)
    for turn in range(0, len(others), 1 if every else 87):
        for chunk, names in named.items():
            new = {n: others[(k + turn) % len(others)] for k, n in enumerate(names)}
            text = re.sub(r"\b[A-Za-z_]\w*\b", lambda m, new=new: new.get(m[0], m[0]), chunk)
            found = {w for _, w, _ in rules_of(USING + text)}
            assert found >= set(new.values()), (chunk[:60], set(new.values()) - found)


def test_a_macro_of_the_shaders_named_by_any_word_of_metals_is_refused() -> None:
    macros = own.macros(SHADERS)
    assert len(macros) > 50
    for macro in macros:
        for word in WORDS + sorted(words.FUNCTIONS):
            assert macro_faults([dataclasses.replace(macro, name=word)]), word
            for n in range(len(macro.parameters)):
                given = (*macro.parameters[:n], word, *macro.parameters[n + 1 :])
                assert macro_faults([dataclasses.replace(macro, parameters=given)]), word


@pytest.mark.nightly  # 100 s
def test_names_at_namespace_scope_replaced_by_functions_of_metals_are_refused() -> None:
    renamings = [
        (chunk, d.token.text, word)
        for chunk in _chunks()
        for d in declarations(tokenize(chunk))
        if d.scope == "namespace" and d.kind in ("function", "variable", "type", "alias")
        for word in sorted(words.FUNCTIONS)
    ]
    assert _survivors(renamings) == []


# --------------------------------------------------------------------------------- published Metal


SOME = {"sdpa_vector.h", "softmax.h", "sort.h", "utils.h", "atomic.h"}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_published_kernels_declare_nothing_that_is_taken(every: bool) -> None:
    """MLX's headers as its wheel has them, which Apple's compiler reads every day."""
    include = published.folder()
    if include is None:
        pytest.skip("mlx is not installed")
    rules = {n: lint.RULES[n] for n in ("keyword-name", "predeclared-macro", "predeclared-type")}
    for path in published.headers(include):
        if every or path.name in SOME:
            found = lint.findings(structure.read(published.flattened(include, path)), rules)
            assert [f"{t.location}: {message}" for t, _, message in found] == [], path
