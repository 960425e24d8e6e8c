"""Copies of structs out of device, constant and threadgroup memory, which clang's copy constructors
cannot make and Metal's can. Records with constructors get one for it (see `spaces`); an aggregate
may not have any, so what is copied is wrapped where the text copies: in declarations, in returns,
and in functions that take a struct by value.
"""

from __future__ import annotations

from .structure import PACKED, Structure
from .tokens import matching, matching_angle

_COPY = "::umfa_backend::copy("


def copy_between_memories(s: Structure, edits: list[str], prefix: dict[int, str]) -> None:
    _declarations(s, edits, prefix)
    aggregates = {
        r.name
        for r in s.record_list
        if not r.has_constructor and r.kind != "union" and not _is_template(s, r.keyword)
    }
    aliases = _typedefs(s, aggregates)
    _returns(s, edits, prefix, {r.name for r in s.record_list} | aliases | s.type_parameters)
    _parameters(s, edits, aggregates | aliases)


def _declarations(s: Structure, edits: list[str], prefix: dict[int, str]) -> None:
    """``S s = *p;`` with p in device memory: clang's copy constructors cannot, Metal's can."""
    tokens = s.tokens
    names = s.records | set(PACKED) | {f"{v[:-1]}3" for v in PACKED} | s.aliases | {"float3"}
    for i, token in enumerate(tokens[:-3]):
        declares = token.text in names or token.text == "auto"
        if not declares or (i and tokens[i - 1].text in ("struct", "class", "union")):
            continue
        k = i + 1
        if tokens[k].text == "<":
            close = matching_angle(tokens, k)
            if close is None:
                continue
            k = close + 1
        if not (tokens[k].kind == "name" and tokens[k + 1].text == "="):
            continue
        if not any(x.kind in ("function", "kernel") for x in s.scope_of(i)):
            continue
        end = k + 2
        if tokens[end].text == "{":
            continue
        if token.text == "auto" and not _names_an_object(s, end):
            continue
        while tokens[end].text not in (";", ",", ")"):
            end = matching(tokens, end) + 1 if tokens[end].text in "([{" else end + 1
        if tokens[end].text != ";":
            continue
        prefix[k + 2] = prefix.get(k + 2, "") + "::umfa_backend::copy("
        edits[end] = ")" + edits[end]


def _names_an_object(s: Structure, i: int) -> bool:
    """Whether the initialiser at ``i`` is name;  *name;  or  name[...];  and so may be a struct."""
    tokens = s.tokens
    i += tokens[i].text == "*"
    if tokens[i].kind != "name":
        return False
    end = i + 1
    if tokens[end].text == "[":
        end = matching(tokens, end) + 1
    return tokens[end].text == ";"


def _is_template(s: Structure, keyword: int) -> bool:
    return keyword > 0 and s.tokens[keyword - 1].text == ">"


def _typedefs(s: Structure, aggregates: set[str]) -> set[str]:
    """Names of the kind ``typedef struct {...} name;`` and ``typedef record name;``."""
    found = set()
    for r in s.record_list:
        after = s.tokens[r.close + 1] if r.close + 1 < len(s.tokens) else None
        typedef = s.tokens[r.keyword - 1].text == "typedef"
        if after is not None and after.kind == "name" and typedef and r.kind != "union":
            found.add(after.text)
    return found


def _returns(s: Structure, edits: list[str], prefix: dict[int, str], names: set[str]) -> None:
    tokens = s.tokens
    for i, token in enumerate(tokens[:-2]):
        if token.text != "return":
            continue
        end = i + 1
        end += tokens[end].text == "*"
        if tokens[end].kind != "name":
            continue
        end += 1
        while tokens[end].text in ("[", ".", "->"):
            end = matching(tokens, end) + 1 if tokens[end].text == "[" else end + 2
        functions = [x for x in s.scope_of(i) if x.kind == "function"]
        if tokens[end].text == ";" and functions and _returns_value(s, functions[-1].open, names):
            prefix[i + 1] = prefix.get(i + 1, "") + _COPY
            edits[end] = ")" + edits[end]


def _returns_value(s: Structure, body: int, names: set[str]) -> bool:
    """Whether the function of this body returns one of these types, and no pointer."""
    k = body - 1
    while k > 0 and s.tokens[k].text not in (";", "{", "}"):
        k -= 1
    words = []
    if s.tokens[k + 1].text == "template":
        k = matching_angle(s.tokens, k + 2) or k
    for token in s.tokens[k + 1 : body]:
        if token.text == "(":
            break
        words.append(token.text)
    return bool(names & set(words[:-1])) and not {"*", "&", "operator"} & set(words)


def _parameters(s: Structure, edits: list[str], names: set[str]) -> None:
    """``S x`` among the parameters of a function with a body."""
    tokens = s.tokens
    for scope in s.scopes:
        if scope.kind != "function":
            continue
        close = scope.open - 1
        while close > 0 and tokens[close].text in ("const", "thread", "noexcept"):
            close -= 1
        if tokens[close].text != ")":
            continue
        depth, i = 0, close
        while i > 0:
            depth += (tokens[i].text == ")") - (tokens[i].text == "(")
            if depth == 0:
                break
            i -= 1
        for k in range(i + 1, close - 1):
            before = tokens[k - 1].text
            start = before in ("(", ",") or (before == "const" and tokens[k - 2].text in ("(", ","))
            after = tokens[k + 2].text
            named = tokens[k].text in names and tokens[k + 1].kind == "name"
            if start and named and after in (",", ")"):
                edits[k] = f"::umfa_backend::by_value<{edits[k]}>"
