"""Cuts preprocessed Metal text into tokens that know the line they came from."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""
    (?P<marker>^\#[^\n]*)
  | (?P<space>\s+)
  | (?P<number>\.?[0-9](?:[eEpP][+-]|[0-9A-Za-z_.'])*)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
  | (?P<mark>::|->\*?|\+\+|--|<<=?|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|\.\.\.|.)
    """,
    re.VERBOSE | re.MULTILINE,
)
_LINE_MARKER = re.compile(r'#\s*(?:line\s+)?(\d+)\s+"((?:[^"\\]|\\.)*)"')


@dataclass(slots=True)
class Token:
    """One token; ``text`` may be replaced, ``original`` stays as it was read."""

    kind: str  # name, number, string, mark
    text: str
    start: int
    end: int
    file: str
    line: int
    original: str

    @property
    def location(self) -> str:
        return f"{self.file}:{self.line}"


def tokenize(text: str) -> list[Token]:
    """Tokens of ``text``, following the line markers of the preprocessor. ``>`` is always single,
    so that the end of nested template arguments needs no care."""
    result: list[Token] = []
    file, line = "<source>", 1
    for match in _TOKEN.finditer(text):
        kind, word = str(match.lastgroup), match.group()
        if kind == "space":
            line += word.count("\n")
            continue
        if kind == "marker":
            found = _LINE_MARKER.match(word)
            if found:
                # The marker names the line after it; the newline still to come adds one.
                line, file = int(found.group(1)) - 1, found.group(2)
            continue
        start, end = match.span()
        result.append(Token(kind, word, start, end, file, line, word))
    return result


_OPEN = {"(": ")", "[": "]", "{": "}"}
_CLOSE = {v: k for k, v in _OPEN.items()}


def matching(tokens: list[Token], i: int) -> int:
    """Index of the bracket that closes the one at ``i``; the last token if none does."""
    depth = 0
    for k in range(i, len(tokens)):
        text = tokens[k].original
        if text in _OPEN:
            depth += 1
        elif text in _CLOSE:
            depth -= 1
            if depth == 0:
                return k
    return len(tokens) - 1


def matching_back(tokens: list[Token], i: int) -> int:
    """Index of the bracket that opens the one closed at ``i``."""
    depth = 0
    for k in range(i, -1, -1):
        text = tokens[k].original
        if text in _CLOSE:
            depth += 1
        elif text in _OPEN:
            depth -= 1
            if depth == 0:
                return k
    return 0


def matching_angle(tokens: list[Token], i: int) -> int | None:
    """Index of the ``>`` that closes the ``<`` at ``i``, or None if it is a comparison."""
    depth = 0
    k = i
    while k < len(tokens):
        text = tokens[k].original
        if text in _OPEN:
            k = matching(tokens, k)
        elif text == "<":
            depth += 1
        elif text == ">":
            depth -= 1
            if depth == 0:
                return k
        elif text in (";", "{", "}", ")", "]"):
            return None
        k += 1
    return None


def matching_angle_back(tokens: list[Token], i: int) -> int | None:
    """Index of the ``<`` that opens the ``>`` at ``i``."""
    depth = 0
    k = i
    while k >= 0:
        text = tokens[k].original
        if text in _CLOSE:
            k = matching_back(tokens, k)
        elif text == ">":
            depth += 1
        elif text == "<":
            depth -= 1
            if depth == 0:
                return k
        elif text in (";", "{", "}", "(", "["):
            return None
        k -= 1
    return None


def parts_of(tokens: list[Token], start: int, end: int) -> list[tuple[int, int]]:
    """Token ranges between the commas at the top level of [start, end)."""
    parts, first, i = [], start, start
    while i < end:
        text = tokens[i].text
        if text in ("(", "[", "{"):
            i = matching(tokens, i)
        elif text == "<":
            close = matching_angle(tokens, i)
            i = close if close is not None and close < end else i
        elif text == ",":
            parts.append((first, i))
            first = i + 1
        i += 1
    if first < end:
        parts.append((first, end))
    return parts


def is_double(token: Token) -> bool:
    """Whether this is a floating-point literal without a suffix."""
    text = token.text.lower()
    if token.kind != "number":
        return False
    if text.startswith("0x"):
        return "p" in text and not text.endswith(("f", "h"))
    floating = "." in text or re.fullmatch(r"\d+e[+-]?\d+[a-z]*", text) is not None
    return floating and not text.endswith(("f", "h"))


def spelled(tokens: list[Token]) -> str:
    """The tokens as text again, without attributes' line breaks."""
    return " ".join(t.original for t in tokens)
