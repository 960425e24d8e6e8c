"""Names of types: records, aliases, type parameters, and where they mean a type."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .tokens import Token, matching, matching_angle

if TYPE_CHECKING:
    from .structure import Structure

_VECTOR = re.compile(r"(?:bool|u?(?:char|short|int|long)|half|b?float)[234]")


def find_types(s: Structure) -> None:
    tokens = s.tokens
    for i, token in enumerate(tokens[:-2]):
        following = tokens[i + 1]
        if token.text in ("struct", "class", "union") and following.kind == "name":
            if i > 0 and tokens[i - 1].text in ("<", ","):
                s.type_parameters.add(following.text)
            else:
                s.records.add(following.text)
        elif token.text == "typename" and following.kind == "name":
            if tokens[i - 1].text in ("<", ",") and tokens[i + 2].text in (",", ">", "="):
                s.type_parameters.add(following.text)
        elif token.text == "using" and following.kind == "name" and tokens[i + 2].text == "=":
            end = i + 3
            while end + 1 < len(tokens) and tokens[end].text != ";":
                end += 1
            _add_alias(s, following.text, tokens[i + 3 : end])
        elif token.text == "typedef":
            end = i
            while end + 1 < len(tokens) and tokens[end].text != ";":
                end = matching(tokens, end) + 1 if tokens[end].text == "{" else end + 1
            if tokens[end - 1].kind == "name":
                _add_alias(s, tokens[end - 1].text, tokens[i + 1 : end - 1])


def _add_alias(s: Structure, name: str, definition: list[Token]) -> None:
    s.aliases.add(name)
    words = [t.text for t in definition if t.text not in ("metal", "::", "const", "typename")]
    if words and (words[0] == "vec" or (len(words) == 1 and _VECTOR.fullmatch(words[0]))):
        s.vector_aliases.add(name)
    elif name in s.vector_aliases:
        s.vector_aliases.discard(name)


def find_type_ranges(s: Structure) -> None:
    """A type parameter is one to the end of what its template declares, an alias to the end of its
    scope; one of a class is seen by name from elsewhere, too."""
    tokens = s.tokens
    last = len(tokens) - 1
    for i, token in enumerate(tokens):
        if token.text == "template" and i < last and tokens[i + 1].text == "<":
            close = matching_angle(tokens, i + 1) or i
            end = close
            while end < last and tokens[end].text not in (";", "{"):
                end = matching(tokens, end) + 1 if tokens[end].text in "([" else end + 1
            end = matching(tokens, end) if tokens[end].text == "{" else end
            for k in range(i + 2, close):
                if tokens[k].text in s.type_parameters and tokens[k].kind == "name":
                    s.type_ranges.setdefault(tokens[k].text, []).append((i, end))
        elif token.text in s.aliases and token.kind == "name":
            defines = tokens[i - 1].text == "using" or tokens[i + 1].text == ";"
            scopes = s.scope_of(i)
            inside = scopes and scopes[-1].kind in ("function", "kernel", "block")
            if defines:
                where = (i, scopes[-1].close) if inside else (0, last)
                s.type_ranges.setdefault(token.text, []).append(where)
