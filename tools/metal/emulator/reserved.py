"""Rules about names that are taken: by the language, by its library, by its macros.

Two sets. `RULES` are what Metal itself refuses, or makes ambiguous: they hold for any text.
`OWN_RULES` are stricter and hold for umfa's own shaders, which nobody has compiled with Apple's
compiler: a name there is no word that Metal knows, so that no rule about hiding needs to be right.
Functions of the library are the exception, as names of variables, parameters and members: published
Metal hides them so, and compiles.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from . import words
from .declarations import Declaration
from .structure import Structure
from .tokens import Token

Finding = tuple[Token, str]
_AT_NAMESPACE_SCOPE = ("variable", "function", "type", "alias", "namespace", "enumerator")


def keyword_name(s: Structure) -> Iterator[Finding]:
    """A keyword is no name, in no scope."""
    for d in s.declared:
        if d.token.text in words.KEYWORDS:
            yield (
                d.token,
                f"'{d.token.text}' is a keyword of Metal, and here the name of a {d.kind}",
            )


def predeclared_macro(s: Structure) -> Iterator[Finding]:
    """A macro of Metal's headers is replaced by its text before the compiler sees a name."""
    for d in s.declared:
        if d.token.text in words.MACROS or d.token.text.startswith("__builtin_"):
            yield d.token, f"'{d.token.text}' is a macro of Metal, and here the name of a {d.kind}"


def predeclared_type(s: Structure) -> Iterator[Finding]:
    """At global scope a name of <metal_types> is declared twice, and one of namespace metal is
    ambiguous beside ``using namespace metal``."""
    using = _uses_metal(s)
    for d in s.declared:
        name = d.token.text
        if not _is_global(s, d) or d.kind in ("parameter", "template parameter", "namespace"):
            continue
        again = name in words.GLOBAL_TYPES and d.kind != "alias"
        if again or (using and name in words.LIBRARY_TYPES | words.ENUMERATORS):
            yield d.token, f"'{name}' is declared by Metal, and here again as a {d.kind}"


def hidden_type(s: Structure) -> Iterator[Finding]:
    """Nothing of ours is named like a type, a namespace or an enumerator of Metal's."""
    for d in s.declared:
        if d.token.text in words.TYPES:
            yield d.token, f"'{d.token.text}' is a type or constant of Metal, and here a {d.kind}"


def hidden_function(s: Structure) -> Iterator[Finding]:
    """Nothing of ours at namespace scope is named like a function of Metal's."""
    for d in s.declared:
        at_namespace = d.scope == "namespace" and d.kind in _AT_NAMESPACE_SCOPE
        if at_namespace and d.token.text in words.FUNCTIONS:
            yield d.token, f"'{d.token.text}' is a function of Metal, and here a {d.kind}"


def coming_word(s: Structure) -> Iterator[Finding]:
    """Words of Metal 4 and of later C++, and those that begin functions as attributes."""
    for d in s.declared:
        if d.token.text in words.COMING_WORDS:
            yield d.token, f"'{d.token.text}' is a word of Metal 3 or 4, and here a {d.kind}"


def reserved_identifier(s: Structure) -> Iterator[Finding]:
    """Two underscores, or one before a capital, are the implementation's."""
    for d in s.declared:
        if words.is_reserved(d.token.text) or d.token.text == "main":
            yield d.token, f"'{d.token.text}' is reserved, and here the name of a {d.kind}"


RULES = (keyword_name, predeclared_macro, predeclared_type)
OWN_RULES = (*RULES, hidden_type, hidden_function, coming_word, reserved_identifier)


def _uses_metal(s: Structure) -> bool:
    return any(
        t.text == "using"
        and [x.text for x in s.tokens[i + 1 : i + 3]] == ["namespace", "metal"]
        and not s.scope_of(i)
        for i, t in enumerate(s.tokens)
    )


def _is_global(s: Structure, d: Declaration) -> bool:
    return d.scope == "namespace" and not d.qualified and not s.scope_of(d.at)


# ---------------------------------------------------------------------------------------- macros


@dataclass(frozen=True)
class Macro:
    """A ``#define`` as the text has it, before the preprocessor takes it away."""

    name: str
    parameters: tuple[str, ...]
    file: str
    line: int


_DEFINE = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)(\([^()]*\))?", re.MULTILINE)
_COMMENT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"', re.DOTALL)


def _blanked(match: re.Match[str]) -> str:
    text = match.group()
    return text if text.startswith('"') else re.sub(r"[^\n]", " ", text)


def macros_of(text: str, file: str) -> list[Macro]:
    """Every macro that ``text`` defines, in whatever branch of its conditions."""
    plain = _COMMENT.sub(_blanked, text.replace("\\\n", "  "))
    folded = text.count("\\\n")
    found = []
    for m in _DEFINE.finditer(plain):
        given = (m.group(2) or "()")[1:-1].split(",")
        names = tuple(p.strip().removesuffix("...").strip() for p in given)
        line = plain.count("\n", 0, m.start()) + 1
        found.append(Macro(m.group(1), tuple(n for n in names if n), file, line))
    return found if not folded else _true_lines(text, found)


def _true_lines(text: str, found: list[Macro]) -> list[Macro]:
    """Their lines where the text has continued ones."""
    lines = text.split("\n")
    place: dict[int, int] = {}
    logical, continued = 0, False
    for number, line in enumerate(lines, 1):
        if not continued:
            logical += 1
            place[logical] = number
        continued = line.endswith("\\")
    return [Macro(m.name, m.parameters, m.file, place.get(m.line, m.line)) for m in found]


def macro_faults(macros: list[Macro]) -> list[tuple[str, str, Macro]]:
    """(rule, message, macro) of those whose name or parameter is taken. C++ lets a macro be named
    like a keyword; what follows then says other things than it seems to."""
    faults = []
    for macro in macros:
        for name, kind in (
            (macro.name, "a macro"),
            *((p, "the parameter of a macro") for p in macro.parameters),
        ):
            taken = _taken(name)
            if taken is not None:
                faults.append((taken[0], f"'{name}' is {taken[1]}, and here {kind}", macro))
    return faults


def _taken(name: str) -> tuple[str, str] | None:
    if name in words.KEYWORDS:
        return "keyword-name", "a keyword of Metal"
    if name in words.MACROS:
        return "predeclared-macro", "a macro of Metal"
    if name in words.TYPES:
        return "hidden-type", "a type or constant of Metal"
    if name in words.FUNCTIONS:
        return "hidden-function", "a function of Metal"
    if name in words.COMING_WORDS:
        return "coming-word", "a word of Metal 3 or 4"
    if words.is_reserved(name) or name == "main":
        return "reserved-identifier", "reserved"
    return None
