"""Rewrites records for objects in any memory (see `records`)."""

from __future__ import annotations

from .records import SPACES, Method, Record
from .structure import Structure
from .tokens import spelled

_SELF = "umfa_self"


def rewrite_records(s: Structure, edits: list[str], prefix: dict[int, str]) -> None:
    for record in s.record_list:
        if not record.is_named:
            edits[record.keyword] += f" {record.name}"
        _constructors(s, record, edits)
        for method in record.methods:
            space = _space(s, method)
            if space and not method.is_constructor:
                _explicit_object(s, record, method, space, edits, prefix)
        if not any(x.kind in ("function", "kernel") for x in s.scope_of(record.keyword)):
            # Classes in functions may have no templates, and do without.
            edits[record.open] += _additions(record)


def constant_objects(s: Structure, edits: list[str]) -> None:
    """``constant S s(...);`` at program scope: constructors know no constant memory."""
    built = {r.name for r in s.record_list if r.has_constructor}
    for i, token in enumerate(s.tokens):
        if token.text != "constant" or any(x.kind != "namespace" for x in s.scope_of(i)):
            continue
        k = i + 1
        while s.tokens[k].text == "::" or s.tokens[k + 1].text == "::":
            k += 1
        if s.tokens[k].text in built and s.tokens[k + 2].text in ("(", "{", "="):
            edits[i] = "const"


def _additions(record: Record) -> str:
    text = f" UMFA_ASSIGNS({record.name})"
    if record.has_constructor:
        text += f" UMFA_CONSTRUCTS({record.name})"
    return f" public: {text} private:" if record.kind == "class" else text


def _space(s: Structure, method: Method) -> str:
    words = {t.text for t in s.tokens[slice(*method.qualifiers)]}
    return next((x for x in SPACES if x in words), "")


def _constructors(s: Structure, record: Record, edits: list[str]) -> None:
    """A constructor for another memory builds what a thread's constructor builds: of those that
    differ in the memory alone, one stays."""
    seen = set()
    own = [m for m in record.methods if m.is_constructor]
    for method in sorted(own, key=lambda m: bool(_space(s, m))):
        tokens = s.tokens[method.start : method.parameters[1] + 1]
        key = spelled(tokens)
        if _space(s, method):
            if key in seen:
                for i in range(method.start, method.end + 1):
                    edits[i] = ""
                continue
            for i in range(*method.qualifiers):
                edits[i] = ""
        seen.add(key)


def _explicit_object(
    s: Structure,
    record: Record,
    method: Method,
    space: str,
    edits: list[str],
    prefix: dict[int, str],
) -> None:
    tokens = s.tokens
    words = [t.text for t in tokens[slice(*method.qualifiers)]]
    for i in range(*method.qualifiers):
        edits[i] = ""
    opening, close = method.parameters
    qualified = " ".join([w for w in ("const", "volatile") if w in words] + [space])
    comma = "" if close == opening + 1 else ", "
    edits[opening] += f"this {qualified} {record.name}& {_SELF}{comma}"
    if method.body is None:
        return
    members = _all_members(s, record) - _declared(s, method)
    first, last = method.body
    for i in range(first + 1, last):
        token, before = tokens[i], tokens[i - 1].text
        if token.text == "this":
            edits[i] = f"(&{_SELF})"
        elif token.text in members and token.kind == "name" and before not in (".", "->", "::"):
            prefix[i] = f"{_SELF}." + prefix.get(i, "")


def _all_members(s: Structure, record: Record) -> set[str]:
    found = set(record.members)
    for other in s.record_list:
        if other.name in record.bases:
            found |= other.members
    return found


def _declared(s: Structure, method: Method) -> set[str]:
    """Names of parameters and local variables, which hide members."""
    tokens = s.tokens
    found = set()
    opening, close = method.parameters
    last = close
    if method.body is not None:
        last = method.body[1]
    for i in range(opening + 1, last):
        token, before, after = tokens[i], tokens[i - 1], tokens[i + 1].text
        typed = before.kind == "name" and before.text not in ("return", "else", "case", "not")
        if i < close:
            typed = typed or before.text in ("&", "*", ">")
        else:
            typed = typed or before.text == ">"
        if token.kind == "name" and typed and after in ("=", ";", "{", "[", ",", ")", ":"):
            found.add(token.text)
    return found
