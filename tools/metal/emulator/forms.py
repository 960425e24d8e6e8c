"""The forms of the language that a text uses: its vocabulary, as far as tokens tell it.

Which attribute on which type, which function with how many arguments, which pair of types in an
``as_type``, what a pointer points to and who holds it. `unusual` has the forms that take more than
a place in the text to see.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from . import words
from .declarations import Declaration
from .reading import SPACES, TYPE_WORDS, Form, Reading
from .structure import BUILTIN_ARGUMENTS, Structure
from .tokens import Token, matching, matching_angle, parts_of

_PRAGMA = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+([^\n]+)", re.MULTILINE)
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<([^>\n]+)>", re.MULTILINE)
_ASKED = re.compile(r"^[ \t]*#[ \t]*(?:el)?if[^\n]*?\b(__\w+__)\b", re.MULTILINE)


def _without_host(text: str) -> str:
    """The text without the branches that only a host compiles, in as many lines."""
    kept, host = [], []
    for line in text.split("\n"):
        m = re.match(r"[ \t]*#[ \t]*(ifdef|ifndef|if|else|elif|endif)\b[ \t]*(\w*)", line)
        if m and m.group(1).startswith("if"):
            asks = m.group(2) in ("__METAL__", "__METAL_VERSION__")
            host.append({"ifdef": False, "ifndef": True}.get(m.group(1)) if asks else None)
        elif m and m.group(1) == "else" and host[-1] is not None:
            host[-1] = not host[-1]
        elif m and m.group(1) == "endif":
            host.pop()
        kept.append("" if True in host and not m else line)
    return "\n".join(kept)


def raw_forms(text: str, file: str) -> Iterator[Form]:
    """Forms that are gone after preprocessing: pragmas, system headers, predefined macros."""
    text = _without_host(text)
    for kind, pattern in (("pragma", _PRAGMA), ("include", _INCLUDE), ("macro", _ASKED)):
        for m in pattern.finditer(text):
            shown = re.sub(r"\d+", "N", m.group(1).strip()) if kind == "pragma" else m.group(1)
            line = text.count("\n", 0, m.start()) + 1
            yield Form(kind, shown, Token("marker", m.group(), 0, 0, file, line, m.group()))


_LOOP = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+clang loop (unroll\w*)\([^\n]*", re.MULTILINE)


def loop_forms(s: Structure, flat: str) -> Iterator[Form]:
    """Loops that are asked to be unrolled, by how they step."""
    starts = [t.start for t in s.tokens]
    at = 0
    for m in _LOOP.finditer(flat):
        while at < len(starts) and starts[at] < m.end():
            at += 1
        token = s.tokens[at]
        if token.text != "for":
            yield Form("unrolled loop", f"{m.group(1)} of {token.text}", token)
            continue
        close = matching(s.tokens, at + 1)
        step = close
        while s.tokens[step].text != ";":
            step -= 1
        words_of_step = [t.text for t in s.tokens[step + 1 : close]]
        yield Form("unrolled loop", f"{m.group(1)} by {_step(words_of_step)}", token)


def _step(step: list[str]) -> str:
    """How a loop steps: ++, += constant, or what it does in full."""
    if "," in step:
        return "several steps"
    text = "".join(step)
    for mark in ("++", "--", "+=", "-=", ">>=", "<<="):
        if mark in text:
            return mark if mark in ("++", "--") else f"{mark} constant"
    return " ".join(step[1:])


_OWN_WORDS = words.CPP_KEYWORDS | words.METAL_KEYWORDS
_STATEMENTS = words.word_set(
    "if else for while do switch case default break continue return goto sizeof alignof this"
    " nullptr true false operator static_assert constexpr static inline const volatile mutable"
    " extern friend explicit virtual union enum class struct typedef using namespace template"
    " typename decltype auto alignas public private protected new delete try catch throw"
)


def _outside_angles(found: list[str]) -> list[str]:
    """The words of a type without its template arguments."""
    kept, depth = [], 0
    for word in found:
        depth += {"<": 1, ">": -1}.get(word, 0)
        if depth == 0:
            kept.append(word)
    return kept


def _literal(token: Token) -> str:
    """The sort of a literal: 1.0f, 0x1u, 12, "text"."""
    text = token.text.lower()
    if token.kind == "string":
        return "string" if text.startswith('"') else "character"
    base = "hexadecimal" if text.startswith("0x") else "decimal"
    floating = base == "decimal" and any(c in text for c in ".e")
    suffix = re.sub(r"^(?:0x[0-9a-f]+|[0-9.]+(?:e[+-]?\d+)?)", "", text)
    return f"{'floating' if floating else base} {suffix}".strip()


class Vocabulary(Reading):
    """What each part of the language has of forms in one text."""

    def all(self) -> Iterator[Form]:
        for part in (
            *(self.attributes, self.functions, self.types, self.casts, self.statements),
            *(self.pointers, self.declarations),
        ):
            yield from part()

    # --------------------------------------------------------------------------- attributes

    def attributes(self) -> Iterator[Form]:
        """[[name]] with what it takes; of a built-in argument with its type."""
        for start, _, found in self.s.attributes:
            for a in found:
                shown = a.name + ("(...)" if a.arguments else "")
                if a.name in BUILTIN_ARGUMENTS:
                    shown += f" {self.text(start - 2)}"
                yield Form("attribute", f"[[{shown}]]", a.token)
        for i, token in enumerate(self.tokens):
            if token.text == "__attribute__":
                inner = "".join(self.words_in(i + 1, matching(self.tokens, i + 1) + 1))
                yield Form("attribute", f"__attribute__{inner}", token)

    # ---------------------------------------------------------------------------- functions

    def functions(self) -> Iterator[Form]:
        """Calls of what the text does not declare, with their number of arguments."""
        kinds = (
            "function",
            "member",
            "type",
            "alias",
            "variable",
            "parameter",
            "template parameter",
        )
        for i, token in enumerate(self.tokens):
            if token.kind != "name" or i in self.in_attribute or i in self.names:
                continue
            after = i + 1
            if self.text(after) == "<":
                close = matching_angle(self.tokens, after)
                after = after if close is None else close + 1
            if self.text(after) != "(" or token.text in _OWN_WORDS | words.TYPES | {
                "__attribute__"
            }:
                continue
            member = self.text(i - 1) in (".", "->")
            qualified = self.text(i - 1) == "::" and self.text(i - 2) in (
                "metal",
                "fast",
                "precise",
            )
            if not qualified and any(
                d.kind in kinds and (d.kind == "member") >= member
                for d in self.by_name.get(token.text, ())
            ):
                continue
            count = len(parts_of(self.tokens, after + 1, matching(self.tokens, after)))
            space = f"{self.text(i - 2)}::" if qualified and self.text(i - 2) != "metal" else ""
            yield Form("method" if member else "function", f"{space}{token.text}({count})", token)

    # -------------------------------------------------------------------------------- types

    def types(self) -> Iterator[Form]:
        """Types and constants of the language and the library that the text names."""
        for i, token in enumerate(self.tokens):
            if token.kind != "name" or i in self.in_attribute or i in self.names:
                continue
            name = token.text
            if self.text(i - 1) in (".", "->") or name in ("as_type", "metal", "fast", "precise"):
                continue
            if name in words.ENUMERATORS:
                yield Form("constant", name, token)
            elif name in TYPE_WORDS | words.TYPES and name not in self.by_name:
                yield Form("type", name, token)

    # -------------------------------------------------------------------------------- casts

    def casts(self) -> Iterator[Form]:
        for i, token in enumerate(self.tokens):
            if token.text in ("reinterpret_cast", "static_cast", "const_cast") and (
                close := matching_angle(self.tokens, i + 1)
            ):
                yield Form("cast", f"{token.text}<{self.shape(i + 2, close)}>", token)
            elif token.text == "as_type" and (close := matching_angle(self.tokens, i + 1)):
                end = matching(self.tokens, close + 1)
                given = "".join(self.canonical(w) for w in self.words_in(i + 2, close))
                yield Form("as_type", f"{given} of {self.type_of(close + 2, end)}", token)
            elif token.text == "(" and self.is_type(i + 1):
                close = matching(self.tokens, i)
                before, after = self.tokens[i - 1], self.tokens[close + 1]
                is_cast = after.kind in ("name", "number") or after.text in ("(", "-", "*", "&")
                opens = before.text in ("=", "(", ",", "return", "{", ";", "}", "?", ":")
                inside = all(t.text not in (",", "(") for t in self.tokens[i + 1 : close])
                if is_cast and opens and inside and not self.is_declarator(i):
                    yield Form("cast", f"({self.shape(i + 1, close)})", token)

    def is_type(self, i: int) -> bool:
        name = self.text(i)
        return (
            name in TYPE_WORDS
            or name in SPACES
            or (name in words.TYPES and name not in self.by_name)
        )

    def is_declarator(self, i: int) -> bool:
        return any(d.kind in ("function", "member") for k in (i - 1,) if (d := self.names.get(k)))

    # --------------------------------------------------------------------------- statements

    def statements(self) -> Iterator[Form]:
        """Words of C++ that make statements and declarations, and its operators."""
        for i, token in enumerate(self.tokens):
            if i in self.in_attribute:
                continue
            if token.kind == "name" and token.text in _STATEMENTS | words.ALTERNATIVE_TOKENS:
                shown = token.text
                if shown == "if" and self.text(i + 1) == "constexpr":
                    shown = "if constexpr"
                if shown == "for" and self.has_colon(i + 1):
                    shown = "for of a range"
                yield Form("word", shown, token)
            elif token.kind == "mark" and token.text not in ("(", ")", "{", "}", ",", ";", "."):
                yield Form("operator", token.text, token)
            elif token.kind in ("number", "string"):
                yield Form("literal", _literal(token), token)

    def has_colon(self, i: int) -> bool:
        found = [self.text(k) for k in self.top_level(i + 1, matching(self.tokens, i))]
        return ":" in found and "?" not in found

    # ----------------------------------------------------------------------------- pointers

    def pointers(self) -> Iterator[Form]:
        """What points where: who holds the pointer or reference, and to which memory."""
        for d in self.s.declared:
            if d.kind not in ("variable", "parameter", "member", "function"):
                continue
            found = [t.text for t in d.type]
            marks = "".join(w for w in _outside_angles(found) if w in ("*", "&", "&&"))
            if not marks:
                continue
            space = next((w for w in found if w in SPACES), "no space")
            const = "const " if "const" in found and d.kind != "function" else ""
            array = self.text(d.at - 2) == "(" and self.text(d.at + 1) == ")"
            k, dims = (d.at + 2 if array else d.at + 1), ""
            while self.text(k) == "[" and self.text(k + 1) != "[":
                k, dims = matching(self.tokens, k) + 1, dims + "[]"
            in_kernel = d.kind == "parameter" and self.is_kernel(d.at)
            holder = "kernel parameter" if in_kernel else d.kind
            target = f"({marks}){dims}" if array else marks + dims
            yield Form("pointer", f"{holder}: {space} {const}{target}", d.token)

    def is_kernel(self, i: int) -> bool:
        opens = self.function_of(i)
        return any(x.open == opens and x.kind == "kernel" for x in self.s.scopes)

    # ------------------------------------------------------------------------- declarations

    def declared_form(self, d: Declaration) -> str:
        found = {t.text for t in d.type}
        where = {"type": " of a type", "function": " in a function"}.get(d.scope, "")
        first = next((w for w in ("struct", "class", "union", "enum") if w in found), "")
        if d.kind == "type":
            return f"{first}{where}"
        shown = [
            w for w in ("static", "constexpr", "constant", "threadgroup", "inline") if w in found
        ]
        marks = {"*", "&"} & found
        shown = [w for w in shown if w not in ("constant", "threadgroup") or not marks]
        dims, k = "", d.at + 1
        while self.text(k) == "[" and self.text(k + 1) != "[":
            dims, k = dims + "[]", matching(self.tokens, k) + 1
        function_constant = any(
            a.name == "function_constant"
            for start, _, attributes in self.s.attributes
            if start == k and d.scope == "namespace" and d.kind == "variable"
            for a in attributes
        )
        if function_constant:
            return f"function constant {self.text(d.at - 1)}"
        ends = {"=": " = value", "{": " {}", "(": "(...)"}
        initial = ends.get(self.text(k), "") if d.kind in ("variable", "member") else ""
        if self.text(k) == "=" and self.text(k + 1) == "{":
            initial = " = {}"
        if d.kind == "function" or (d.kind == "member" and self.text(d.at + 1) == "("):
            initial = "()"
        return " ".join([*shown, d.kind]) + dims + initial + where

    def declarations(self) -> Iterator[Form]:
        for d in self.s.declared:
            yield Form("declaration", self.declared_form(d), d.token)
