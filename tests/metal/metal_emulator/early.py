"""What is done to LLVM IR before it is optimised, while it still says what the text said.

Comparing vectors gives Metal booleans, and clang masks of all ones: the sign extensions, of which
there are no others here, become zero extensions. And some things that clang accepts and Metal does
not are plain to see: a vector that chooses by ``?:``, casts from one memory to another, calls
through pointers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .errors import SourceError
from .sites import Sites

_MASK = re.compile(r"= sext (<\d+ x i1>)")
# That memory is there, which would let the optimiser read where the kernel does not.
_PROMISE = re.compile(r" dereferenceable(?:_or_null)?\(\d+\)")
_SPACES = {"": "thread", "1": "device", "2": "constant", "3": "threadgroup"}
_CHOICE = re.compile(r"= select <\d+ x i1> ")
_CAST = re.compile(r"= addrspacecast ptr(?: addrspace\((\d)\))? .* to ptr(?: addrspace\((\d)\))?")
_CALL = re.compile(r"\bcall .*?(?:@([\w$.]+)|%[\w.]+)\(")
_DEBUG = re.compile(r"!dbg !(\d+)")

Finding = tuple[str, str, str]  # a line of IR, a rule and what it says


def read_early(ir: str, own_headers: tuple[str, ...], allow: frozenset[str]) -> str:
    """The IR to optimise. Raises SourceError for what Metal does not have."""
    lines = ir.split("\n")
    found = [f for f in _expressions(lines) if f[1] not in allow]
    if found:
        _refuse(lines, found, own_headers)
    return _PROMISE.sub("", _MASK.sub(r"= zext \1", ir))


def _expressions(lines: list[str]) -> Iterator[Finding]:
    for line in lines:
        if not line.startswith("  "):
            continue
        if _CHOICE.search(line):
            yield (
                line,
                "vector-condition",
                "the condition of ?: is one bool, not a vector of them: use select()",
            )
        elif cast := _CAST.search(line):
            a, b = (_SPACES[x or ""] for x in cast.groups())
            yield line, "address-space-cast", f"a pointer to {a} memory is cast to {b} memory"
        elif (call := _CALL.search(line)) and call.group(1) is None:
            yield line, "function-pointer", "a function is called through a pointer"


def _refuse(lines: list[str], found: list[Finding], own_headers: tuple[str, ...]) -> None:
    sites = Sites(lines, own_headers)
    messages: dict[str, str] = {}
    for line, rule, message in found:
        debug = _DEBUG.search(line)
        file, number = sites.table[sites.number(int(debug.group(1)))] if debug else ("", 0)
        if file and not file.startswith("<launcher"):
            messages[f"{file}:{number}: error: {message} [{rule}]"] = rule
    if messages:
        raise SourceError("\n".join(messages), tuple(messages.values()))
