"""One simplification that LLVM cannot know: transposing a matrix twice gives it back.

A transposed simdgroup_load is a load and a movmatrix (umfa_backend.h); a B operand is a movmatrix
of the fragment. Where the one feeds the other, both go.
"""

from __future__ import annotations

import re

_TRANSPOSE = re.compile(
    r"^\s*(%[\w.]+) = (?:tail )?call i32 asm "
    r"\"movmatrix\.sync\.aligned\.m8n8\.trans\.b16 \$0, \$1;\", \"=r,r\"\(i32 (%?[\w.]+)\).*\n",
    re.MULTILINE,
)
_FUNCTION = re.compile(r"^define .*?^\}$", re.MULTILINE | re.DOTALL)
_VALUE = re.compile(r"%[\w.]+")


def cancel_transposes(ir: str) -> str:
    """The optimised IR without pairs of transposes."""
    return _FUNCTION.sub(lambda m: _in_function(m.group()), ir)


def _in_function(text: str) -> str:
    source = {m.group(1): m.group(2) for m in _TRANSPOSE.finditer(text)}
    # A transpose of a transpose is its operand, which may be such a one again.
    same: dict[str, str] = {}
    for outer, inner in source.items():
        if inner in source:
            same[outer] = source[inner]
    if not same:
        return text

    def resolve(name: str) -> str:
        while name in same:
            name = same[name]
        return name

    text = _TRANSPOSE.sub(lambda m: "" if m.group(1) in same else m.group(), text)
    text = _VALUE.sub(lambda m: resolve(m.group()), text)
    used = set()
    for line in text.splitlines():
        found = _VALUE.findall(line)
        used.update(found[1:] if re.match(r"\s*%[\w.]+ =", line) else found)
    return _TRANSPOSE.sub(lambda m: m.group() if m.group(1) in used else "", text)
