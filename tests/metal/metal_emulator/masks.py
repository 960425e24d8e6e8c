"""Comparing vectors gives Metal booleans, and clang masks of all ones. The difference is mended in
the IR before it is optimised, where a mask is still a sign extension of bits and nothing else is.
"""

from __future__ import annotations

import re

from .errors import SourceError
from .sites import Sites

_MASK = re.compile(r"= sext (<\d+ x i1>)")
_CHOICE = re.compile(r"= select <\d+ x i1> .*, !dbg !(\d+)")


def mend(ir: str, own_headers: str) -> str:
    """The IR with masks of zeros and ones. Raises SourceError where a vector chooses by ``?:``."""
    _refuse_choices(ir, own_headers)
    return _MASK.sub(r"= zext \1", ir)


def _refuse_choices(ir: str, own_headers: str) -> None:
    found = list(_CHOICE.finditer(ir))
    if not found:
        return
    sites = Sites(ir.split("\n"), own_headers)
    lines = []
    for choice in found:
        file, line = sites.table[sites.number(int(choice.group(1)))]
        if file:
            lines.append(
                f"{file}:{line}: error: the condition of ?: is one bool, not a vector of them: "
                "use select() [vector-condition]"
            )
    if lines:
        raise SourceError("\n".join(dict.fromkeys(lines)), ("vector-condition",))
