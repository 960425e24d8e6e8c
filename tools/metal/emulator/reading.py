"""What the readers of forms ask a text: who declares a name, what type an expression has."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from . import words
from .declarations import Declaration
from .structure import Structure
from .tokens import Token, matching, matching_angle


@dataclass(frozen=True)
class Form:
    """One use of a form: what sort of form, which, and where."""

    kind: str
    form: str
    token: Token

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.form


SPACES = ("device", "constant", "threadgroup", "thread", "threadgroup_imageblock")
TYPE_WORDS = words.word_set(
    "bool char short int long unsigned signed float half bfloat void auto wchar_t double"
)


class Reading:
    """A text with what is asked of it for its forms."""

    def __init__(self, s: Structure) -> None:
        self.s = s
        self.tokens = s.tokens
        self.by_name: dict[str, list[Declaration]] = defaultdict(list)
        for d in s.declared:
            self.by_name[d.token.text].append(d)
        self.names = {d.at: d for d in s.declared}
        self.in_attribute = {
            k for start, end in s.attribute_at.items() for k in range(start, end + 1)
        }

    def text(self, i: int) -> str:
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""

    def words_in(self, i: int, end: int) -> list[str]:
        return [t.text for t in self.tokens[i:end]]

    def nearest(self, name: str, i: int) -> Declaration | None:
        """The last declaration of ``name`` before token ``i`` that is in a scope around it."""
        best = None
        for d in self.by_name.get(name, ()):
            if d.at <= i and d.kind in ("variable", "parameter") and self.reaches(d, i):
                best = d
        return best

    def reaches(self, d: Declaration, i: int) -> bool:
        scopes = self.s.scope_of(d.at)
        if scopes == self.s.scope_of(i)[: len(scopes)]:
            return d.kind == "variable" or self.function_of(d.at) == self.function_of(i)
        return False

    def function_of(self, i: int) -> int:
        """Where the body of the function begins that holds token ``i`` or whose parameter it is."""
        for x in self.s.scope_of(i):
            if x.kind in ("function", "kernel"):
                return x.open
        k = i
        while k < len(self.tokens) and self.text(k) not in ("{", ";"):
            k += 1
        return k

    def shape(self, i: int, end: int) -> str:
        """A type as what it points to and where that is; a scalar as a value."""
        found = self.words_in(i, end)
        space = next((w for w in found if w in SPACES), "")
        marks = "".join(w for w in found if w in ("*", "&"))
        const = "const " if "const" in found and marks else ""
        return " ".join(x for x in (space, (const + marks) if marks else "value") if x)

    def type_of(self, i: int, end: int) -> str:
        """Type of an expression, as far as its tokens tell it; "unknown" otherwise."""
        while self.text(i) == "(" and matching(self.tokens, i) == end - 1:
            i, end = i + 1, end - 1
        depth = i
        for k in self.top_level(i, end):
            if self.text(k) == "?":
                depth = k + 1
            elif self.text(k) == ":" and depth > i:
                return self.type_of(k + 1, end)
        first = self.tokens[i]
        if first.text == "static_cast" and (close := matching_angle(self.tokens, i + 1)):
            return self.canonical(self.text(close - 1))
        if first.kind == "number":
            suffix = first.text.lower()
            floating = "." in suffix and not suffix.startswith("0x")
            if floating:
                return "half" if suffix.endswith("h") else "float"
            return "uint" if suffix.endswith("u") else "int"
        if first.text in TYPE_WORDS | words.TYPES and self.text(i + 1) == "(":
            return self.canonical(first.text)
        if first.kind != "name":
            return "unknown"
        d = self.nearest(first.text, i)
        if d is None or self.text(i + 1) in (".", "->", "("):
            return "unknown"
        names = [t.text for t in d.type if t.text not in (*SPACES, "const", "constexpr", "*", "&")]
        plain = [n for n in names if n in TYPE_WORDS | words.TYPES or n in self.by_name]
        return self.kind_of_type(plain[0]) if plain else "unknown"

    def kind_of_type(self, name: str) -> str:
        kinds = {d.kind for d in self.by_name.get(name, ())}
        return "T" if "template parameter" in kinds else self.canonical(name)

    def canonical(self, name: str) -> str:
        """uint for uint32_t, and what an alias of the text stands for."""
        for d in self.by_name.get(name, ()):
            if d.kind == "alias" and len(d.type) > 1 and d.type[0].text != "using":
                name = d.type[-1].text
        m = re.fullmatch(r"(u?)int(8|16|32|64)_t", name)
        sizes = {"8": "char", "16": "short", "32": "int", "64": "long"}
        return m.group(1) + sizes[m.group(2)] if m else name

    def top_level(self, i: int, end: int) -> Iterator[int]:
        while i < end:
            yield i
            i = matching(self.tokens, i) + 1 if self.text(i) in ("(", "[", "{") else i + 1
