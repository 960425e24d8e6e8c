"""Integer constant expressions, as attributes hold them: ``buffer(BASE + 1)``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from .tokens import Token, matching

_BINARY: dict[str, tuple[int, Callable[[int, int], int]]] = {
    "|": (1, lambda a, b: a | b),
    "^": (2, lambda a, b: a ^ b),
    "&": (3, lambda a, b: a & b),
    "<<": (4, lambda a, b: a << b),
    ">>": (4, lambda a, b: a >> b),
    "+": (5, lambda a, b: a + b),
    "-": (5, lambda a, b: a - b),
    "*": (6, lambda a, b: a * b),
    "/": (6, lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)),
    "%": (6, lambda a, b: a - _BINARY["/"][1](a, b) * b),
}
_UNARY: dict[str, Callable[[int], int]] = {"-": lambda a: -a, "+": lambda a: a, "~": lambda a: ~a}
_MOST_SHIFTED = 63


def integer(text: str) -> int:
    """The value of an integer literal: decimal, hexadecimal, binary or octal."""
    digits = re.sub(r"(?i)[ul]+$", "", text).replace("'", "")
    if re.fullmatch(r"0[0-7]+", digits):
        return int(digits, 8)
    return int(digits, 0)


def evaluate(tokens: list[Token], names: Mapping[str, int]) -> int:
    """The value of a constant expression over ``names``. Raises ValueError if it is none."""
    value, at = _binary(tokens, 0, names, 1)
    if at != len(tokens):
        raise ValueError(f"'{tokens[at].text}' is not expected here")
    return value


def _binary(tokens: list[Token], at: int, names: Mapping[str, int], least: int) -> tuple[int, int]:
    value, at = _operand(tokens, at, names)
    while at < len(tokens):
        operator, length = tokens[at].text, 1
        if operator == ">" and at + 1 < len(tokens) and tokens[at + 1].text == ">":
            operator, length = ">>", 2
        rank, apply = _BINARY.get(operator, (0, None))
        if apply is None or rank < least:
            break
        right, at = _binary(tokens, at + length, names, rank + 1)
        if operator in "/%" and right == 0:
            raise ValueError("a division by zero")
        if operator in ("<<", ">>") and not 0 <= right <= _MOST_SHIFTED:
            raise ValueError(f"a shift by {right}")
        value = apply(value, right)
    return value, at


def _operand(tokens: list[Token], at: int, names: Mapping[str, int]) -> tuple[int, int]:
    if at >= len(tokens):
        raise ValueError("an operand is missing")
    token = tokens[at]
    if token.text in _UNARY:
        value, at = _operand(tokens, at + 1, names)
        return _UNARY[token.text](value), at
    if token.text == "(":
        value, at = _binary(tokens, at + 1, names, 1)
        if at >= len(tokens) or tokens[at].text != ")":
            raise ValueError("')' is missing")
        return value, at + 1
    if token.kind == "number":
        return integer(token.text), at + 1
    if token.text in names and token.kind == "name":
        return names[token.text], at + 1
    raise ValueError(f"'{token.text}' is no constant")


def constants(tokens: list[Token]) -> dict[str, int]:
    """Integer constants of the text by name: ``constexpr`` and ``constant`` variables, enumerators.
    A name with two values is left out."""
    found: dict[str, int] = {}
    twice: set[str] = set()

    def add(name: str, value: int) -> None:
        if found.setdefault(name, value) != value:
            twice.add(name)

    for i, token in enumerate(tokens):
        if token.text == "enum":
            for name, value in _enumerators(tokens, i, found):
                add(name, value)
        elif token.text == "=" and token.kind == "mark" and _is_constant(tokens, i):
            end = i + 1
            while end < len(tokens) and tokens[end].text not in (";", ","):
                end = matching(tokens, end) + 1 if tokens[end].text in "([{" else end + 1
            try:
                add(tokens[i - 1].text, evaluate(tokens[i + 1 : end], found))
            except ValueError:
                continue
    return {name: value for name, value in found.items() if name not in twice}


def _is_constant(tokens: list[Token], at: int) -> bool:
    """Whether the variable before ``=`` is declared as a constant integer."""
    if at == 0 or tokens[at - 1].kind != "name":
        return False
    k, words = at - 2, set()
    while k >= 0 and tokens[k].kind == "name":
        words.add(tokens[k].text)
        k -= 1
    starts = k < 0 or tokens[k].text in (";", "{", "}", "]")
    real = {"float", "half", "bfloat", "double", "bool"}
    return starts and bool(words & {"constant", "constexpr", "const"}) and not words & real


def _enumerators(tokens: list[Token], at: int, names: Mapping[str, int]) -> list[tuple[str, int]]:
    k = at
    while k < len(tokens) and tokens[k].text not in ("{", ";", "(", ")"):
        k += 1
    if k >= len(tokens) or tokens[k].text != "{":
        return []
    found: list[tuple[str, int]] = []
    end, value, k = matching(tokens, k), 0, k + 1
    while k < end:
        name, stop = tokens[k].text, k + 1
        while stop < end and tokens[stop].text != ",":
            stop = matching(tokens, stop) + 1 if tokens[stop].text in "([{" else stop + 1
        if stop > k + 1:
            try:
                value = evaluate(tokens[k + 2 : stop], {**names, **dict(found)})
            except ValueError:
                return found
        found.append((name, value))
        value, k = value + 1, stop + 1
    return found
