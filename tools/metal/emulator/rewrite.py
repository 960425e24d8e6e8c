"""Turns Metal text into C++ for clang, token by token, keeping every line in its place."""

from __future__ import annotations

import re

from .copies import copy_between_memories
from .spaces import constant_objects, rewrite_records
from .structure import PACKED, SCALARS, VECTORS, Structure
from .tokens import is_double, matching, matching_angle, matching_back

_MAKE = "::umfa_backend::make"
_CAST = "::umfa_backend::cast"
_NUMBER_SUFFIX = re.compile(r"(?i)^(.*?)(bf|h)$")
# Names that stay attributes of C++.
_STANDARD_ATTRIBUTES = {"maybe_unused", "fallthrough", "nodiscard", "noreturn", "deprecated"}


def rewrite(text: str, s: Structure, inexact: bool = False) -> str:
    """C++ for the Metal text whose structure is ``s``; for `implicit`, with inexact literals."""
    edits = [""] * len(s.tokens)
    for i, token in enumerate(s.tokens):
        edits[i] = token.text
    prefix: dict[int, str] = {}
    _instantiations(s, edits)
    _utilities(s, edits)
    _attributes(s, edits)
    _function_constants(s, edits, prefix)
    _literals(s, edits, inexact)
    _boolean_vectors(s, edits)
    _vector_variables(s, edits)
    _threadgroup_variables(s, edits, prefix)
    _array_parameters(s, edits)
    _strings(s, edits)
    _constructors(s, edits)
    copy_between_memories(s, edits, prefix)
    rewrite_records(s, edits, prefix)
    constant_objects(s, edits)
    _limits(s, edits)
    pieces, at = [], 0
    for i, token in enumerate(s.tokens):
        pieces.append(text[at : token.start])
        pieces.append(prefix.get(i, ""))
        pieces.append(edits[i])
        at = token.end
    pieces.append(text[at:])
    result = _own_names(s) + "".join(pieces)
    return re.sub(r"^#pragma umfa include (\w+)$", r"#include <\1>", result, flags=re.MULTILINE)


def _blank(edits: list[str], start: int, end: int) -> None:
    for i in range(start, end):
        edits[i] = ""


def _instantiations(s: Structure, edits: list[str]) -> None:
    for start, end, _ in s.instantiations:
        for i in range(start, end):
            if s.tokens[i].text == "kernel":
                edits[i] = ""


_UTILITIES = {
    *("move", "forward", "swap", "declval"),
    *("integer_sequence", "index_sequence", "make_integer_sequence", "make_index_sequence"),
}


def _utilities(s: Structure, edits: list[str]) -> None:
    """``metal::move`` and its like are reached by their whole names in any case."""
    for i, token in enumerate(s.tokens):
        if token.text not in _UTILITIES or i < 2:
            continue
        if s.tokens[i - 1].text == "::" and s.tokens[i - 2].text == "metal":
            edits[i - 2] = "umfa_utility"


def _own_names(s: Structure) -> str:
    """Names that the text takes for itself: beside ``using namespace metal`` the utilities' would
    be a second meaning of them."""
    own = set()
    for i, token in enumerate(s.tokens):
        if token.text not in _UTILITIES:
            continue
        before = s.tokens[i - 1]
        outside = all(x.kind == "namespace" and x.name != "metal" for x in s.scope_of(i))
        if outside and (before.kind == "name" or before.text in "*&>"):
            own.add(token.text)
    return "".join(f"#define UMFA_OWN_{name}\n" for name in sorted(own))


def _attributes(s: Structure, edits: list[str]) -> None:
    for start, end, found in s.attributes:
        if all(a.name in _STANDARD_ATTRIBUTES for a in found):
            continue
        is_kernel = any(a.name == "kernel" for a in found)
        _blank(edits, start, end + 1)
        instantiation = any(a <= start <= b for a, b, _ in s.instantiations)
        if is_kernel and not instantiation:
            edits[start] = "kernel "


def _function_constants(s: Structure, edits: list[str], prefix: dict[int, str]) -> None:
    """Declared here, defined at the very end: the value is known to the optimiser, but not to the
    compiler, which therefore refuses it where a constant expression is needed."""
    for c in s.constants:
        start, end = c.statement
        _blank(edits, start, end)
        edits[start] = (
            f"extern constant {c.type} {c.name}; extern constant bool umfa_defined_{c.name}"
        )
    names = {c.name: c for c in s.constants}
    for i, token in enumerate(s.tokens):
        if token.text == "is_function_constant_defined" and s.tokens[i + 1].text == "(":
            close = matching(s.tokens, i + 1)
            name = s.tokens[close - 1].text
            if name not in names:
                raise s.fail(token, "function-constant", f"'{name}' is no function constant")
            _blank(edits, i, close + 1)
            edits[i] = f"umfa_defined_{name}"


def threadgroup_variables(s: Structure) -> list[tuple[int, int, bool]]:
    """Declarations of variables in threadgroup memory: first token, the name, has initialiser.
    Pointers to threadgroup memory are not among them, and lists in braces, which published kernels
    have, no initialisers."""
    found = []
    for i, token in enumerate(s.tokens):
        if token.text != "threadgroup" or token.kind != "name":
            continue
        k = i - 1
        while k >= 0 and s.tokens[k].text in ("const", "static", "volatile", "]", "[", ")"):
            if s.tokens[k].text in ("]", ")"):
                break
            k -= 1
        if k >= 0 and s.tokens[k].text not in (";", "{", "}"):
            continue
        name, pointer, end = i, False, i + 1
        while end < len(s.tokens):
            text = s.tokens[end].text
            if text == "<":
                end = matching_angle(s.tokens, end) or end
            elif text in ("*", "&"):
                pointer = True
            elif text in ("[", "=", ";", ",", "(", "{"):
                break
            elif s.tokens[end].kind == "name":
                name = end
            end += 1
        if pointer or s.tokens[end].text == "(":
            continue
        initialised = False
        while end < len(s.tokens) and s.tokens[end].text != ";":
            text = s.tokens[end].text
            initialised = initialised or (text == "=" and s.tokens[end + 1].text != "{")
            end = matching(s.tokens, end) + 1 if text in "([{" else end + 1
        found.append((i, name, initialised))
    return found


STORAGE = "umfa_storage_"


def _threadgroup_variables(s: Structure, edits: list[str], prefix: dict[int, str]) -> None:
    """A variable in threadgroup memory is one for all threads: static, in the eyes of C++. The
    empty initialiser is for structs, whose constructors know no other memory than a thread's. The
    kernel sees a reference: clang would take the alignment of a vector access from the variable
    itself, and the check for misaligned ones would have nothing to check."""
    for first, _, _ in threadgroup_variables(s):
        if not any(x.kind == "kernel" for x in s.scope_of(first)):
            continue
        edits[first] = "static __attribute__((used)) threadgroup"
        references = ""
        type_ = _may_construct(s, first)
        if type_ is not None:
            prefix[type_[0]] = "::umfa_backend::raw<" + prefix.get(type_[0], "")
            edits[type_[1]] += ">"
        i, name = first + 1, first
        while True:
            text = s.tokens[i].text
            if text == "<":
                i = matching_angle(s.tokens, i) or i
            elif s.tokens[i].kind == "name":
                name = i
            if text == "{" or (text == "=" and s.tokens[i + 1].text == "{"):
                # Nobody promises that the memory holds it: it stays unwritten, and is checked so.
                end = matching(s.tokens, i + (text == "=")) + 1
                _blank(edits, i, end)
                i = end
                continue
            if text in (",", ";"):
                shown = s.tokens[name].text
                edits[name] = STORAGE + shown
                references += f" auto& {shown} = ::umfa_backend::opaque({STORAGE}{shown});"
                edits[i] = f" = {{}}{text}"
                if text == ";":
                    break
            i = matching(s.tokens, i) + 1 if text in "([{" else i + 1
        edits[i] += references


def _may_construct(s: Structure, first: int) -> tuple[int, int] | None:
    """Tokens of the type of a threadgroup variable, if it may be a class with constructors: those
    know no threadgroup memory, and are not called in Metal either."""
    tokens = s.tokens
    start = first + 1
    while tokens[start].text in ("const", "volatile", "static"):
        start += 1
    end = start + (tokens[start].text == "typename")
    while tokens[end + 1].text in ("::", "<") or tokens[end].text == "::":
        end += 1
        if tokens[end].text == "<":
            end = matching_angle(tokens, end) or end
    built = {r.name for r in s.record_list if r.has_constructor}
    words = {t.text for t in tokens[start : end + 1]}
    may = words & (built | s.aliases | s.type_parameters) or "::" in words
    return (start, end) if may and tokens[end + 1].kind == "name" else None


def _literals(s: Structure, edits: list[str], inexact: bool) -> None:
    for i, token in enumerate(s.tokens):
        if token.kind != "number" or (
            token.text[:2] in ("0x", "0X") and "p" not in token.text.lower()
        ):
            continue
        found = _NUMBER_SUFFIX.match(token.text)
        if is_double(token):  # the linter was told to let it pass: Metal takes it for a float
            edits[i] += "f"
        elif found:
            value, suffix = found.group(1), found.group(2).lower()
            edits[i] = f"{value}f16" if suffix == "h" else f"((bfloat){value}f)"
        if inexact and edits[i].endswith(("f", "f16")) and "." in edits[i]:
            edits[i] = "0.1f16" if edits[i].endswith("6") else "0.1f"


def _constructors(s: Structure, edits: list[str]) -> None:
    """T(...), (T)x and static_cast<T>(x) where T is a vector or may become one in a template."""
    tokens = s.tokens
    fixed = {*VECTORS, *PACKED, "half", "bfloat"}
    names = fixed | s.aliases | s.type_parameters
    for i, token in enumerate(tokens[:-1]):
        if token.kind != "name":
            continue
        before = tokens[i - 1].text if i else ""
        if token.text == "static_cast" and tokens[i + 1].text == "<":
            close = matching_angle(tokens, i + 1)
            if close is None:
                continue
            words = {t.text for t in tokens[i + 2 : close]}
            if words & (names | {"vec"}) and not words & {"*", "&"}:
                edits[i] = _MAKE
            continue
        end = i
        if token.text == "vec" and tokens[i + 1].text == "<":
            close = matching_angle(tokens, i + 1)
            if close is None:
                continue
            end = close
        elif token.text not in names or not (token.text in fixed or s.is_type(token.text, i)):
            continue
        elif token.text in s.aliases and tokens[i + 1].text == "<":  # an alias template
            close = matching_angle(tokens, i + 1)
            if close is None:
                continue
            end = close
        first = i
        if before == "::" and i >= 2 and tokens[i - 2].text == "metal":
            first = i - 2
            before = tokens[first - 1].text
        if tokens[end + 1].text == "(" and before not in (".", "->", "::", "operator", "~"):
            inner = tokens[end + 2].text
            closing = matching(tokens, end + 1)
            declares = inner in ("*", "&") and tokens[closing + 1].text in ("[", "(")
            if not declares:
                edits[first] = f"{_MAKE}<{edits[first]}"
                edits[end] += ">"
        elif tokens[end + 1].text == ")":
            opening = first - 1
            if tokens[opening].text == "const":
                opening -= 1
            if tokens[opening].text == "(" and _starts_cast(s, opening, end + 1):
                edits[opening] = _CAST + "<"
                edits[end + 1] = ">{}->*"


def _boolean_vectors(s: Structure, edits: list[str]) -> None:
    """``vec<bool, N>``, or what a template parameter may turn into it: clang's own has one byte for
    all components. Where the arguments are deduced, ``vec`` stays."""
    tokens = s.tokens
    plain = {*SCALARS} - {"bool"}
    for i, token in enumerate(tokens[:-3]):
        if token.text != "vec" or tokens[i + 1].text != "<" or tokens[i + 2].text in plain:
            continue
        close = matching_angle(tokens, i + 1)
        if close is None or _is_deduced(s, i, close):
            continue
        edits[i] = "::umfa_backend::vector"
        if tokens[i - 1].text == "::":
            _blank(edits, i - 2, i)


def _is_deduced(s: Structure, i: int, close: int) -> bool:
    """Whether the vector at ``i`` is in a parameter list or the arguments of a specialisation."""
    tokens = s.tokens
    if tokens[close + 1].text in ("(", ")", "::"):
        return False
    k, depth, aliased = i - 1, 0, False
    while k > 0 and tokens[k].text not in (";", "{", "}"):
        text = tokens[k].text
        aliased = aliased or text == "using"
        if text == "template" and aliased:
            return True
        if text == ")":
            k = matching_back(tokens, k)
        elif text == "(":
            return True
        elif text == ">":
            depth += 1
        elif text == "<":
            depth -= 1
            if depth < 0 and k >= 2 and tokens[k - 2].text in ("struct", "class"):
                return True
        k -= 1
    return False


def _strings(s: Structure, edits: list[str]) -> None:
    """A string is in constant memory."""
    for i, token in enumerate(s.tokens):
        if token.kind == "string" and token.text[0] == '"' and edits[i] == token.text:
            before = s.tokens[i - 1]
            if before.text in ("(", ",", "=", "return") and not _in_assertion(s, i):
                edits[i] = f"((constant char*){token.text})"


def _in_assertion(s: Structure, i: int) -> bool:
    opening = i
    while opening > 0 and s.tokens[opening].text not in (";", "{", "}"):
        if s.tokens[opening].text in ("static_assert", "_Static_assert", "__attribute__", "asm"):
            return True
        opening -= 1
    return False


def _array_parameters(s: Structure, edits: list[str]) -> None:
    """``constant int* a`` for the parameter ``constant int a[3]``: clang lets an array decay to a
    pointer only after it has refused the qualifier."""
    tokens = s.tokens
    for i, token in enumerate(tokens):
        if token.text not in ("device", "constant", "threadgroup") or token.kind != "name":
            continue
        k = i - 1
        while k > 0 and tokens[k].text in ("const", "volatile", "typename"):
            k -= 1
        if tokens[k].text not in ("(", ","):
            continue
        k = i + 1
        while tokens[k].text not in ("(", ")", ",", ";", "[", "*", "&", "{", "="):
            k = (matching_angle(tokens, k) or k) + 1 if tokens[k].text == "<" else k + 1
        if tokens[k].text != "[" or k in s.attribute_at or tokens[k - 1].kind != "name":
            continue
        close = matching(tokens, k)
        deeper = tokens[close + 1].text == "[" and close + 1 not in s.attribute_at
        edits[k - 1] = f"(*{edits[k - 1]})" if deeper else f"* {edits[k - 1]}"
        _blank(edits, k, close + 1)


def _vector_variables(s: Structure, edits: list[str]) -> None:
    """``short2 v(a, b);`` constructs as ``short2(a, b)`` does."""
    tokens = s.tokens
    names = {*VECTORS} | s.vector_aliases
    for i, token in enumerate(tokens[:-4]):
        if token.kind != "name" or token.text not in (*names, "vec"):
            continue
        k = i
        if tokens[i + 1].text == "<":
            k = matching_angle(tokens, i + 1) or i
        if tokens[k + 1].kind != "name" or tokens[k + 2].text != "(" or tokens[k + 3].text == ")":
            continue
        close = matching(tokens, k + 2)
        inside = any(x.kind in ("function", "kernel") for x in s.scope_of(i))
        if inside and tokens[close + 1].text in (";", ","):
            spelling = "".join(edits[i : k + 1])
            edits[k + 1] += f" = {_MAKE}<{spelling}>"


def _starts_cast(s: Structure, opening: int, closing: int) -> bool:
    before, after = s.tokens[opening - 1], s.tokens[closing + 1]
    if before.kind in ("name", "number") and before.text not in ("return", "case", "else"):
        return False
    if before.text in (")", "]", ">"):
        return False
    return after.kind in ("name", "number") or after.text in ("(", "-", "*", "&", "!", "~")


def _limits(s: Structure, edits: list[str]) -> None:
    for kernel in s.all_kernels():
        if kernel.max_threads:
            edits[kernel.body[0]] += f" umfa_check_max_threads({kernel.max_threads});"
