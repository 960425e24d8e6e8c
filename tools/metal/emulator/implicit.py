"""Conversions to and from bfloat that nobody wrote. clang finds them, but not of literals that fit
exactly, and it lets half and bfloat meet in one operator. So the text is read a second time, with
every literal replaced by one that does not fit, and with half as wide as double: what clang then
says of bfloat is true of the first text as well. Other errors of that reading mean nothing.
"""

from __future__ import annotations

import re

_PRECISION = re.compile(r"warning: (implicit conversion.* to '(?:metal::)?bfloat'.*)")
_MIXED = re.compile(r"warning: implicit conversion increases .*: '(?:metal::)?bfloat'.* to 'half'")
FLAGS = ("-DUMFA_WIDE_HALF", "-fsyntax-only", "-ferror-limit=0", "-Wdouble-promotion")


def conversions(messages: str) -> list[str]:
    """Those that both readings tell of."""
    return [
        f"{line.split(' warning: ')[0]} error: {found.group(1)}"
        for line in messages.splitlines()
        if (found := _PRECISION.search(line))
    ]


def conversions_of_second_reading(messages: str, own_headers: tuple[str, ...]) -> list[str]:
    refused = []
    for line in messages.splitlines():
        place = line.split(" warning: ")[0]
        if place.startswith(own_headers):
            continue
        if _MIXED.search(line):
            refused.append(f"{place} error: half and bfloat in one operator: convert one of them")
        elif _PRECISION.search(line) and "'half'" not in line:
            refused.append(f"{place} error: implicit conversion to bfloat: write bfloat(...)")
    return refused
