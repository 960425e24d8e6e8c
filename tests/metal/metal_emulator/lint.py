"""Rules of the Metal language that clang, taking the text for C++, would let pass.

Each rule is a function that yields (token, message); its name, with hyphens, is the rule's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

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
from .tokens import Token, is_double, matching, matching_angle_back

Finding = tuple[Token, str]
Rule = Callable[[Structure], Iterator[Finding]]

_SPACES = {"device", "constant", "threadgroup", "thread"}


def missing_address_space(s: Structure) -> Iterator[Finding]:
    """Every pointer and reference says which memory it points to."""
    tokens = s.tokens
    types = {*SCALARS, *VECTORS, *PACKED, *MATRICES, *LIBRARY_TYPES, "void", "auto", "unsigned"}
    types |= s.records | s.aliases | s.type_parameters
    for i, token in enumerate(tokens):
        if token.text not in ("*", "&") or i == 0 or i + 1 >= len(tokens):
            continue
        k = i - 1
        while k > 0 and tokens[k].text in ("const", "volatile"):
            k -= 1
        if tokens[k].text == ">":
            opening = matching_angle_back(tokens, k)
            if opening is None or opening == 0:
                continue
            k = opening - 1
        if tokens[k].kind != "name" or tokens[k].text not in types:
            continue
        if not _starts_declaration(tokens, k):
            continue
        after = tokens[i + 1]
        declares = after.kind == "name" or after.text in (")", ">", ",", "*", "&", "[", "(")
        if not declares or (after.text == "(" and tokens[i + 2].text not in ("*", "&")):
            continue
        words = set()
        while k >= 0 and tokens[k].text not in ("(", ",", ";", "{", "}", "<", "=", ")"):
            words.add(tokens[k].text)
            if tokens[k].text == ">":
                k = matching_angle_back(tokens, k) or k
            k -= 1
        if not words & _SPACES:
            yield token, "a pointer or reference needs an address space (thread, device, ...)"


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
    """1.0 is a double, which Metal has not."""
    for token in s.tokens:
        if is_double(token):
            yield (
                token,
                f"the literal {token.text} is a double: write {token.text}f or {token.text}h",
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
        skipped |= {"static_assert", "friend", "extern"}
        if braces:
            # A function or a type: step over it. A namespace: step into it.
            i = end + 1 if "namespace" in words else matching(tokens, end) + 1
            continue
        if words and words[0] not in skipped and not call and i not in constants and len(words) > 1:
            name = next((w for w in words[1:] if w not in ("const", "constant")), words[0])
            if "constant" not in words and "threadgroup" not in words:
                yield tokens[i], f"the variable declared with '{name}' must be 'constant'"
            elif "constant" in words and not assigned:
                yield tokens[i], "a constant needs a value"
        i = end + 1


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


def unknown_vector(s: Structure) -> Iterator[Finding]:
    pattern = re.compile(rf"(?:packed_)?(?:{'|'.join(VECTOR_ELEMENTS)})(8|16)")
    for token in s.tokens:
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
    for i, token in enumerate(tokens[:-3]):
        if token.text != "&" or tokens[i - 1].kind in ("name", "number"):
            continue
        if tokens[i - 1].text in (")", "]") or tokens[i + 1].kind != "name":
            continue
        k = i + 2
        while tokens[k].text == "[":
            k = matching(tokens, k) + 1
        members = {t.text for t in tokens if t.kind == "name"} & s.records
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
        kernel_call,
        lambda_expression,
    )
}


def check(s: Structure, allow: frozenset[str] = frozenset()) -> None:
    """Raises SourceError with all findings, unless their rule is in ``allow``."""
    found = [
        (token, name, message)
        for name, rule in RULES.items()
        if name not in allow
        for token, message in rule(s)
    ]
    if found:
        found.sort(key=lambda f: (f[0].start, f[1]))
        lines = [f"{t.location}: error: {message} [{name}]" for t, name, message in found]
        raise SourceError("\n".join(lines), tuple(name for _, name, _ in found))
