"""Rules of the Metal language that clang, taking the text for C++, would let pass.

Each rule is a function that yields (token, message); its name, with hyphens, is the rule's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from . import reserved
from .errors import SourceError
from .rewrite import threadgroup_variables
from .structure import (
    BUILTIN_ARGUMENTS,
    KNOWN_ATTRIBUTES,
    LIBRARY_TYPES,
    MATRICES,
    PACKED,
    SCALARS,
    VECTOR_ELEMENTS,
    VECTORS,
    Structure,
)
from .tokens import Token, is_double, matching, matching_angle, matching_angle_back

Finding = tuple[Token, str]
Rule = Callable[[Structure], Iterator[Finding]]

_SPACES = {"device", "constant", "threadgroup", "thread"}


def missing_address_space(s: Structure) -> Iterator[Finding]:
    """Every pointer and reference says which memory it points to."""
    tokens = s.tokens
    types = {*SCALARS, *VECTORS, *PACKED, *MATRICES, *LIBRARY_TYPES, "void", "auto", "unsigned"}
    types |= s.records
    pointers: set[int] = set()
    for i, token in enumerate(tokens):
        if token.text not in ("*", "&") or i == 0 or i + 1 >= len(tokens):
            continue
        k, opening = i - 1, None
        while k > 0 and tokens[k].text in ("const", "volatile"):
            k -= 1
        if tokens[k].text == "*" and k in pointers:
            # Of a reference to a pointer Apple's compiler does not ask: MLX has such.
            if token.text == "*":
                yield token, "the pointer pointed to needs an address space (thread, device, ...)"
            continue
        if tokens[k].text == "(" and _names_type(s, k - 1, types):
            opening, k = k, k - 1  # a reference to an array
        if tokens[k].text == ">":
            angle = matching_angle_back(tokens, k)
            if angle is None or angle == 0:
                continue
            k = angle - 1
        if tokens[k].kind != "name" or not _names_type(s, k, types):
            continue
        if not _starts_declaration(tokens, k):
            continue
        after = tokens[i + 1]
        declares = after.kind == "name" or after.text in (*")>,*&[(;", "=")
        if not declares or (after.text == "(" and tokens[i + 2].text not in ("*", "&")):
            continue
        if opening is not None:
            declares = after.kind == "name" and tokens[i + 2].text == ")"
            if not declares or tokens[i + 3].text != "[":
                continue
        pointers.add(i)
        words = set()
        while k >= 0 and tokens[k].text not in ("(", ",", ";", "{", "}", "<", "=", ")"):
            words.add(tokens[k].text)
            if tokens[k].text == ">":
                k = matching_angle_back(tokens, k) or k
            k -= 1
        if not words & _SPACES:
            yield token, "a pointer or reference needs an address space (thread, device, ...)"


def _names_type(s: Structure, k: int, types: set[str]) -> bool:
    """Whether token ``k`` names a type: a type parameter of another template does not."""
    name = s.tokens[k].text
    if name in types or s.is_type(name, k):
        return True
    return name in s.aliases and s.tokens[k - 1].text == "::"


def _starts_declaration(tokens: list[Token], k: int) -> bool:
    """Whether what precedes the type name at ``k`` lets it begin a declaration or a cast, so that
    the star after it is no multiplication."""
    k -= 1
    while k > 0 and tokens[k].text == "::":
        k -= 2
    before = tokens[k]
    if before.kind == "name":
        return before.text not in ("return", "case", "goto", "operator")
    return before.text in ("(", ",", ";", "{", "}", "<", ">", ")", "]", ":", "=")


def unsuffixed_literal(s: Structure) -> Iterator[Finding]:
    """1.0 is a double in C++, which Metal has not."""
    for token in s.tokens:
        if is_double(token):
            yield (
                token,
                f"the literal {token.text} has no suffix: Metal reads it as a float, C++ as a "
                f"double; write {token.text}f or {token.text}h",
            )


def threadgroup_variable(s: Structure) -> Iterator[Finding]:
    """Threadgroup variables live in the body of a kernel and have no initialiser."""
    for first, name, initialised in threadgroup_variables(s):
        scopes = s.scope_of(first)
        shown = s.tokens[name].text
        if not any(x.kind == "kernel" for x in scopes):
            yield s.tokens[first], f"threadgroup variable '{shown}' outside of a kernel's body"
        elif initialised:
            yield s.tokens[first], f"threadgroup variable '{shown}' has an initialiser"


def program_scope_variable(s: Structure) -> Iterator[Finding]:
    """Variables outside of functions are constant and have a value."""
    tokens = s.tokens
    constants = {c.statement[0] for c in s.constants}
    i = 0
    while i < len(tokens):
        scopes = s.scope_of(i)
        if any(x.kind != "namespace" for x in scopes):
            i += 1
            continue
        end, assigned, call, braces = i, False, False, False
        while end < len(tokens) and tokens[end].text not in (";", "}"):
            text = tokens[end].text
            if text == "(" and not assigned:
                call = True
            if text == "{" and not assigned:
                braces = True
                break
            if text == "=":
                assigned = True
            end = (
                matching(tokens, end) + 1
                if text in "([{" and end not in s.attribute_at
                else (s.attribute_at[end] + 1 if end in s.attribute_at else end + 1)
            )
        words = [t.text for t in tokens[i:end]]
        skipped = {"using", "typedef", "template", "namespace", "struct", "class", "enum", "union"}
        skipped |= {"static_assert", "friend"}
        if braces:
            # A function or a type: step over it. A namespace: step into it.
            i = end + 1 if "namespace" in words else matching(tokens, end) + 1
            continue
        if words and words[0] not in skipped and not call and i not in constants and len(words) > 1:
            name = next((w for w in words[1:] if w not in ("const", "constant")), words[0])
            if "constant" not in words and "threadgroup" not in words:
                yield tokens[i], f"the variable declared with '{name}' must be 'constant'"
            elif "constant" in words and not assigned and "extern" not in words:
                yield tokens[i], "a constant needs a value"
        i = end + 1


def static_member(s: Structure) -> Iterator[Finding]:
    """Static data of a class is constant memory, too."""
    tokens = s.tokens
    for i, token in enumerate(tokens):
        scopes = s.scope_of(i)
        if token.text != "static" or not scopes or scopes[-1].kind != "type":
            continue
        end = i
        while tokens[end].text not in (";", "=", "{", "("):
            end = (matching_angle(tokens, end) or end) + 1 if tokens[end].text == "<" else end + 1
        start = i
        while tokens[start - 1].text not in (";", "{", "}", ":", ">"):
            start -= 1
        if tokens[end].text != "(" and "constant" not in {t.text for t in tokens[start:end]}:
            yield token, "static data of a class must be 'constant'"


def static_local(s: Structure) -> Iterator[Finding]:
    for i, token in enumerate(s.tokens):
        if token.text != "static":
            continue
        scopes = s.scope_of(i)
        inside = [x.kind for x in scopes if x.kind in ("function", "kernel", "type")]
        if inside and inside[-1] != "type":
            yield token, "static variables in functions do not exist"


_FORBIDDEN = {
    "double": "there is no double",
    "goto": "there is no goto",
    "new": "there is no new",
    "delete": "there is no delete",
    "virtual": "there are no virtual functions",
    "throw": "there are no exceptions",
    "try": "there are no exceptions",
    "catch": "there are no exceptions",
    "dynamic_cast": "there is no dynamic_cast",
    "typeid": "there is no typeid",
    "thread_local": "there is no thread_local",
    "register": "there is no register",
    "asm": "there is no inline assembly",
    "__asm": "there is no inline assembly",
    "__asm__": "there is no inline assembly",
    "printf": "there is no printf",
    "concept": "there are no concepts",
    "requires": "there are no concepts",
    "consteval": "there is no consteval",
    "constinit": "there is no constinit",
    "co_await": "there are no coroutines",
    "ext_vector_type": "vectors have 2, 3 or 4 components, and are spelled float4 or vec<float, 4>",
    "vector_size": "vectors have 2, 3 or 4 components, and are spelled float4 or vec<float, 4>",
    "__int128": "there are no integers of 128 bits",
    "address_space": "write device, constant, threadgroup or thread",
}


def forbidden_word(s: Structure) -> Iterator[Finding]:
    tokens = s.tokens
    for i, token in enumerate(tokens):
        if token.kind != "name":
            continue
        after = tokens[i + 1].text if i + 1 < len(tokens) else ""
        if token.text in _FORBIDDEN:
            if token.text == "delete" and tokens[i - 1].text == "=":
                continue
            yield token, _FORBIDDEN[token.text]
        elif token.text == "std" and after == "::":
            yield token, "there is no namespace std"
        elif token.text == "long" and after in ("long", "double"):
            yield token, f"there is no long {after}"
        elif token.text.startswith("__builtin_") and token.text not in _BUILTINS:
            yield token, f"there is no {token.text}"
        elif token.text == "main" and after == "(" and not s.scope_of(i):
            yield token, "no function is named main"


# What the macros of Metal's headers are made of here, and what is known to work there.
_BUILTINS = {
    *("__builtin_huge_valf", "__builtin_nanf", "__builtin_expect", "__builtin_unreachable"),
    *("__builtin_assume", "__builtin_is_constant_evaluated", "__builtin_ctz", "__builtin_clz"),
}


def long_long_literal(s: Structure) -> Iterator[Finding]:
    for token in s.tokens:
        if token.kind == "number" and token.text.lower().rstrip("u").endswith("ll"):
            yield token, f"the literal {token.text} is a long long, which does not exist"


def c_variadic(s: Structure) -> Iterator[Finding]:
    tokens = s.tokens
    for i, token in enumerate(tokens[:-1]):
        alone = tokens[i - 1].text in (",", "(") and tokens[i + 1].text == ")"
        if token.text == "..." and alone:
            yield token, "there are no functions of any number of arguments, only templates"


def boolean_to_integer(s: Structure) -> Iterator[Finding]:
    """``int4 m = a < b;``: comparing vectors gives booleans, which do not convert by themselves."""
    tokens = s.tokens
    pattern = re.compile(r"(char|short|int|long)[234]")
    for i, token in enumerate(tokens[:-3]):
        declares = tokens[i + 1].kind == "name" and tokens[i + 2].text == "="
        if token.kind != "name" or not pattern.fullmatch(token.text) or not declares:
            continue
        k = i + 3
        words = []
        while tokens[k].text not in (";", ","):
            angle = matching_angle(tokens, k) if tokens[k].text == "<" else None
            if angle is not None and tokens[angle + 1].text in ("(", "{", "::"):
                k = angle
            elif tokens[k].text in "([{":
                k = matching(tokens, k)
            else:
                words.append(tokens[k].text)
            k += 1
        if {"<", ">", "<=", ">=", "==", "!="} & set(words) and "?" not in words:
            yield token, f"a comparison gives bool{token.text[-1]}, not {token.text}: convert it"


# Functions of namespace metal whose names people like to use themselves.
_LIBRARY = {
    *("min", "max", "clamp", "abs", "select", "fract", "dot", "length", "distance", "step", "mix"),
    *("sign", "exp", "exp2", "log", "log2", "pow", "sqrt", "rsqrt", "floor", "ceil", "round"),
    *("saturate", "smoothstep", "fma", "popcount", "clz", "ctz", "any", "all", "isnan", "isinf"),
}


_OF_VECTORS = {"dot", "length", "distance"}  # of one number Metal has none


def ambiguous_name(s: Structure) -> Iterator[Finding]:
    """A function of one's own, named like one of Metal's and for the same types, beside
    ``using namespace metal``: whoever calls it calls either."""
    tokens = s.tokens
    using = any(
        t.text == "using" and [x.text for x in tokens[i + 1 : i + 3]] == ["namespace", "metal"]
        for i, t in enumerate(tokens)
    )
    if not using:
        return
    numbers = {*SCALARS, *VECTORS}
    for i, token in enumerate(tokens[:-2]):
        if token.text not in _LIBRARY or tokens[i + 1].text != "(" or s.scope_of(i):
            continue
        if tokens[i - 1].kind != "name" or tokens[i - 1].text not in numbers:
            continue
        close = matching(tokens, i + 1)
        types = {t.text for t in tokens[i + 2 : close] if t.text in (numbers | s.records)}
        if token.text in _OF_VECTORS and not types & {*VECTORS}:
            continue
        defined = types and types <= numbers - {"bool", "bfloat"} and tokens[close + 1].text == "{"
        called = any(
            tokens[k].text == token.text and tokens[k + 1].text == "(" and s.scope_of(k)
            for k in range(close, len(tokens) - 1)
            if tokens[k - 1].text not in ("::", ".", "->")
        )
        if defined and called:
            yield token, f"'{token.text}' and metal::{token.text} are the same to its callers"


def kernel_pointer(s: Structure) -> Iterator[Finding]:
    """What a kernel's pointers point to is what they are bound to."""
    for kernel in s.all_kernels():
        for p in kernel.parameters:
            words = [t.text for t in p.declaration]
            if p.kind == "buffer" and not {"device", "constant"} & set(words):
                yield p.declaration[0], f"[[buffer]] '{p.name}' must be device or constant"
            elif p.kind == "threadgroup" and "threadgroup" not in words:
                yield p.declaration[0], f"[[threadgroup]] '{p.name}' must be threadgroup memory"
            elif words.count("*") > 1:
                yield p.declaration[0], f"'{p.name}' is a pointer to a pointer"


def unknown_vector(s: Structure) -> Iterator[Finding]:
    pattern = re.compile(rf"(?:packed_)?(?:{'|'.join(VECTOR_ELEMENTS)})(8|16)")
    for i, token in enumerate(s.tokens):
        if token.text == "vec" and s.tokens[i + 1].text == "<":
            close = matching_angle(s.tokens, i + 1)
            count = s.tokens[close - 1].text if close else ""
            simple = close and s.tokens[close - 2].text == ","
            if simple and count.isdigit() and count not in ("2", "3", "4"):
                yield token, f"there is no vec of {count}: vectors have 2, 3 or 4 components"
        if token.kind == "name" and pattern.fullmatch(token.text):
            yield token, f"there is no {token.text}: vectors have 2, 3 or 4 components"


def unknown_swizzle(s: Structure) -> Iterator[Finding]:
    """clang's vectors know .lo and the like; Metal's know xyzw and rgba, not mixed."""
    members = {
        s.tokens[i].text
        for x in s.scopes
        if x.kind == "type"
        for i in range(x.open, min(x.close, len(s.tokens)))
        if s.tokens[i].kind == "name"
    }
    pattern = re.compile(r"lo|hi|even|odd|s[0-9a-fA-F]+")
    for i, token in enumerate(s.tokens):
        if (
            token.kind == "name"
            and s.tokens[i - 1].text in (".", "->")
            and pattern.fullmatch(token.text)
            and token.text not in members
        ):
            yield token, f"there is no swizzle .{token.text}"


def component_address(s: Structure) -> Iterator[Finding]:
    """No pointer to a component of a vector."""
    tokens = s.tokens
    swizzle = re.compile(r"[xyzw]{1,4}|[rgba]{1,4}")
    members = any(t.kind == "name" and t.text in s.records for t in tokens)
    for i, token in enumerate(tokens[:-3]):
        if token.text != "&" or tokens[i - 1].kind in ("name", "number"):
            continue
        if tokens[i - 1].text in (")", "]") or tokens[i + 1].kind != "name":
            continue
        k = i + 2
        while tokens[k].text == "[":
            k = matching(tokens, k) + 1
        if tokens[k].text == "." and swizzle.fullmatch(tokens[k + 1].text) and not members:
            yield token, "a component of a vector has no address"


def unknown_attribute(s: Structure) -> Iterator[Finding]:
    for _, _, found in s.attributes:
        for a in found:
            if a.name.split("::")[0] not in KNOWN_ATTRIBUTES:
                yield a.token, f"unknown attribute [[{a.name}]]"


def builtin_arguments(s: Structure) -> Iterator[Finding]:
    """Positions agree in their number of components, simdgroup values in scalar type."""
    for kernel in s.all_kernels():
        types: dict[str, set[str]] = {"position": set(), "simdgroup": set()}
        for p in kernel.parameters:
            if p.kind != "builtin":
                continue
            words = [t.text for t in p.declaration if t.text in {*SCALARS, *VECTORS}]
            if not words:
                continue
            kind = BUILTIN_ARGUMENTS[p.builtin]
            if not re.fullmatch(r"(uint|ushort)[23]?", words[0]):
                yield p.declaration[0], f"{p.builtin} is uint or ushort, not {words[0]}"
            if kind != "position" and words[0][-1] in "23":
                yield p.declaration[0], f"{p.builtin} is a scalar"
            elif kind == "position":
                types[kind].add(words[0][-1] if words[0][-1] in "23" else "1")
            elif kind in types:
                types[kind].add(words[0])
        for kind, found in types.items():
            if len(found) > 1:
                yield (
                    kernel.token,
                    f"the {kind} arguments of '{kernel.name}' differ in "
                    + ("components: " if kind == "position" else "type: ")
                    + ", ".join(sorted(found)),
                )


def kernel_argument(s: Structure) -> Iterator[Finding]:
    for kernel in s.all_kernels():
        for p in kernel.parameters:
            words = [t.text for t in p.declaration]
            if p.kind == "buffer" and not {"*", "&", "["} & set(words):
                yield p.declaration[0], f"[[buffer]] '{p.name}' must be a pointer or a reference"


def kernel_call(s: Structure) -> Iterator[Finding]:
    for i, token in enumerate(s.tokens[:-1]):
        calls = token.text in s.kernels and token.kind == "name" and s.tokens[i + 1].text == "("
        calls = calls and s.tokens[i - 1].text not in ("::", ".", "->", "template")
        if calls and any(x.kind in ("kernel", "function") for x in s.scope_of(i)):
            yield token, f"kernel '{token.text}' is called"


def lambda_expression(s: Structure) -> Iterator[Finding]:
    """Lambdas came with Metal 3.2; the shaders must run on 3.1."""
    tokens = s.tokens
    for i, token in enumerate(tokens[:-2]):
        if token.text != "[" or i in s.attribute_at or (i - 1) in s.attribute_at:
            continue
        if tokens[i - 1].text in ("=", "(", ",", "return") and tokens[i + 1].text in (
            "&",
            "=",
            "]",
        ):
            yield token, "lambdas need Metal 3.2"


RULES: dict[str, Rule] = {
    rule.__name__.replace("_", "-"): rule
    for rule in (
        missing_address_space,
        unsuffixed_literal,
        threadgroup_variable,
        program_scope_variable,
        static_local,
        forbidden_word,
        unknown_vector,
        unknown_swizzle,
        component_address,
        unknown_attribute,
        builtin_arguments,
        kernel_argument,
        kernel_pointer,
        kernel_call,
        static_member,
        long_long_literal,
        c_variadic,
        boolean_to_integer,
        ambiguous_name,
        lambda_expression,
        *reserved.RULES,
    )
}

# Of umfa's own shaders, which no compiler of Apple's has read yet.
OWN_RULES: dict[str, Rule] = {
    **RULES,
    **{rule.__name__.replace("_", "-"): rule for rule in reserved.OWN_RULES},
}


def findings(s: Structure, rules: dict[str, Rule]) -> list[tuple[Token, str, str]]:
    """What the rules find, as (token, rule, message) in the order of the text."""
    found = [(token, name, message) for name, rule in rules.items() for token, message in rule(s)]
    return sorted(found, key=lambda f: (f[0].start, f[1]))


def check(s: Structure, allow: frozenset[str] = frozenset()) -> None:
    """Raises SourceError with all findings, unless their rule is in ``allow``."""
    found = findings(s, {name: rule for name, rule in RULES.items() if name not in allow})
    if found:
        lines = [f"{t.location}: error: {message} [{name}]" for t, name, message in found]
        raise SourceError("\n".join(lines), tuple(name for _, name, _ in found))
