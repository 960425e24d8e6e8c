"""Structs, classes and unions: what they hold, and what C++ must be told so that they behave as in
Metal, where an object may lie in any memory.

clang's own members know the thread's memory only. So assignments from memory to memory are added to
every record, constructors to those that have some, and a member function for another memory gets
its object as a parameter, which clang does know how to overload on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .tokens import Token, matching, matching_angle

SPACES = ("device", "constant", "threadgroup")
_QUALIFIERS = ("const", "volatile", "thread", "noexcept", *SPACES)


@dataclass
class Method:
    """A member function: token indices of its parts."""

    start: int
    name: int
    parameters: tuple[int, int]
    qualifiers: tuple[int, int]
    body: tuple[int, int] | None
    end: int  # its last token
    is_constructor: bool


@dataclass
class Record:
    name: str
    kind: str  # struct, class or union
    keyword: int
    open: int
    close: int
    is_named: bool
    bases: list[str] = field(default_factory=list)
    members: set[str] = field(default_factory=set)
    methods: list[Method] = field(default_factory=list)

    @property
    def has_constructor(self) -> bool:
        return any(m.is_constructor for m in self.methods)


def find_records(tokens: list[Token]) -> list[Record]:
    """All records with a body, except anonymous ones whose members belong to what is around."""
    found: list[Record] = []
    for i, token in enumerate(tokens[:-2]):
        if token.text not in ("struct", "class", "union") or token.kind != "name":
            continue
        before = tokens[i - 1].text if i else ""
        if before in ("<", ",", "enum", "(", "friend"):
            continue
        record = _read(tokens, i, before == "typedef", len(found))
        if record is not None:
            found.append(record)
    return found


def _read(tokens: list[Token], i: int, is_typedef: bool, number: int) -> Record | None:
    name, bases, k = "", [], i + 1
    while k < len(tokens) and tokens[k].text != "{":
        text = tokens[k].text
        if text == "[" or text == "(":
            k = matching(tokens, k)
        elif text == "<":
            k = matching_angle(tokens, k) or k
        elif text == ":":
            while tokens[k].text != "{":
                if tokens[k].kind == "name":
                    bases.append(tokens[k].text)
                k += 1
            break
        elif text in (";", ")", ">", "=", "*", "&", ","):
            return None
        elif tokens[k].kind == "name" and not name and text not in ("alignas", "__attribute__"):
            name = text
        elif tokens[k].kind == "name" and name and text != "final":
            return None  # a variable or a function of a struct's type
        k += 1
    if k >= len(tokens) or not (name or is_typedef):
        return None
    record = Record(name or f"umfa_record_{number}", tokens[i].text, i, k, matching(tokens, k),
                    bool(name), bases)  # fmt: skip
    _read_members(tokens, record)
    return record


def _read_members(tokens: list[Token], record: Record) -> None:
    i = record.open + 1
    while i < record.close:
        text = tokens[i].text
        if text in ("public", "private", "protected") and tokens[i + 1].text == ":":
            i += 2
            continue
        i = _read_member(tokens, record, i) + 1


def _read_member(tokens: list[Token], record: Record, start: int) -> int:
    """Reads one declaration of a record; returns its last token."""
    i = start
    if tokens[i].text == "template" and tokens[i + 1].text == "<":
        i = (matching_angle(tokens, i + 1) or i) + 1
    first = i
    while i < record.close:
        text = tokens[i].text
        if text == ";":
            _name_before(tokens, record, first, i)
            return i
        if text in ("using", "typedef", "friend", "static_assert") and i == first:
            while tokens[i].text != ";":
                i = matching(tokens, i) + 1 if tokens[i].text in "([{" else i + 1
            return i
        if text == "operator":
            opening = i + 1
            while tokens[opening].text != "(" or tokens[opening + 1].text == ")" == text:
                opening += 1
            if tokens[i + 1].text == "(" and tokens[i + 2].text == ")":
                opening = i + 3
            return _read_method(tokens, record, start, i, opening)
        if text == "(":
            if tokens[i - 1].text in ("alignas", "__attribute__", "decltype", "sizeof"):
                i = matching(tokens, i) + 1
                continue
            return _read_method(tokens, record, start, i - 1, i)
        if text == "<":
            i = (matching_angle(tokens, i) or i) + 1
            continue
        if text in ("=", "[", ",", ":"):
            _name_before(tokens, record, first, i)
        if text in ("[", "{"):
            end = matching(tokens, i)
            if text == "{" and tokens[first].text in ("union", "struct", "class", "enum"):
                anonymous = i == first + 1
                inner = Record("", tokens[first].text, first, i, end, False)
                if anonymous and tokens[first].text != "enum":
                    _read_members(tokens, inner)
                    record.members |= inner.members
            i = end + 1
            continue
        if text == "=":
            while tokens[i].text not in (";", ","):
                i = matching(tokens, i) + 1 if tokens[i].text in "([{" else i + 1
            continue
        i += 1
    return i


def _name_before(tokens: list[Token], record: Record, first: int, end: int) -> None:
    if end > first and tokens[end - 1].kind == "name":
        record.members.add(tokens[end - 1].text)


def _read_method(tokens: list[Token], record: Record, start: int, name: int, opening: int) -> int:
    close = matching(tokens, opening)
    k = close + 1
    while tokens[k].text in _QUALIFIERS or tokens[k].text in ("[", "&"):
        k = matching(tokens, k) + 1 if tokens[k].text == "[" else k + 1
        if tokens[k - 1].text == "noexcept" and tokens[k].text == "(":
            k = matching(tokens, k) + 1
    qualifiers = (close + 1, k)
    body = None
    while k < record.close:
        text = tokens[k].text
        if text == ";":
            break
        if text == "{" and tokens[k - 1].kind == "name" and _in_initialisers(tokens, close, k):
            k = matching(tokens, k) + 1
            continue
        if text == "{":
            body = (k, matching(tokens, k))
            k = body[1]
            break
        k = matching(tokens, k) + 1 if text in "([" else k + 1
    constructs = tokens[name].text == record.name and tokens[name - 1].text != "~"
    if not constructs and tokens[name].text != "operator":
        record.members.add(tokens[name].text)
    record.methods.append(Method(start, name, (opening, close), qualifiers, body, k, constructs))
    return k


def _in_initialisers(tokens: list[Token], close: int, k: int) -> bool:
    """Whether the brace at ``k`` initialises a member: ``: a{1}, b(2) {``."""
    return any(t.text == ":" for t in tokens[close:k]) and tokens[k - 1].text not in _QUALIFIERS
