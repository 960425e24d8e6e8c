"""Writes C's struct of options into include/umfa/umfa.h, from src/core/options.def.

python tools/c_options.py           writes the header
python tools/c_options.py --check   exits with 1 if the header is not up to date
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DEFINITION = ROOT / "src" / "core" / "options.def"
HEADER = ROOT / "include" / "umfa" / "umfa.h"
BEGIN, END = "/* ---- from src/core/options.def ---- */", "/* ---- end ---- */"

_LINE = re.compile(r"^(UMFA_[A-Z_]+)\((\w+)((?:[^()\"]|\"[^\"]*\"|\([^()]*\))*)\)$", re.MULTILINE)
_TYPES = {
    "UMFA_INPUT": "const DLTensor*",
    "UMFA_TABLE": "const DLTensor*",
    "UMFA_NUMBER": "double",
    "UMFA_MAYBE_NUMBER": "double",
    "UMFA_COUNT": "int64_t",
    "UMFA_MAYBE_COUNT": "int64_t",
    "UMFA_SEED": "uint64_t",
    "UMFA_OFFSET": "uint64_t",
    "UMFA_FLAG": "int32_t",
    "UMFA_CHOICE": "int32_t",
    "UMFA_DTYPE": "int32_t",
    "UMFA_FORMAT": "const char*",
    "UMFA_WINDOW": "int64_t",
}
_INITIAL = {
    **dict.fromkeys(("UMFA_INPUT", "UMFA_TABLE", "UMFA_FORMAT"), "NULL"),
    "UMFA_MAYBE_COUNT": "-1",
}


class Field(NamedTuple):
    """A field of the struct."""

    declaration: str
    initial: str
    text: str


def fields() -> Iterator[Field]:
    """In the order of the definition."""
    for kind, name, rest in _LINE.findall(DEFINITION.read_text()):
        if kind not in _TYPES:
            continue
        text = "".join(re.findall(r'"([^"]*)"', rest))
        initial = _INITIAL.get(kind, "0")
        if kind in ("UMFA_NUMBER", "UMFA_COUNT", "UMFA_FLAG"):
            initial = rest.split(",")[1].strip()
            initial = {"true": "1", "false": "0"}.get(initial, initial)
        if kind == "UMFA_WINDOW":
            yield Field(f"int64_t {name}_left, {name}_right", "-1, -1", text)
        else:
            yield Field(f"{_TYPES[kind]} {name}", initial, text)


def struct() -> str:
    """The text between the markers."""
    lines = [BEGIN]
    for field in fields():
        lines += textwrap.wrap(
            f"/* {field.text} */", 96, initial_indent="    ", subsequent_indent="       "
        )
        lines.append(f"    {field.declaration};")
    lines += ["} umfa_attention_options;", "", "/* clang-format off */"]
    lines.append("#define UMFA_ATTENTION_OPTIONS_INIT \\")
    values = ["sizeof(umfa_attention_options)", "UMFA_LAYOUT_BSHD", "UMFA_BACKEND_AUTO"]
    values += [field.initial for field in fields()]
    body = textwrap.wrap("{" + ", ".join(values) + "}", 92, initial_indent="    ",
                         subsequent_indent="     ")  # fmt: skip
    lines += [f"{line} \\" for line in body[:-1]] + body[-1:]
    return "\n".join([*lines, "/* clang-format on */", END])


def updated() -> str:
    """The header as it should be."""
    text = HEADER.read_text()
    begin, end = text.index(BEGIN), text.index(END) + len(END)
    return text[:begin] + struct() + text[end:]


def main() -> int:
    """Write or check."""
    if "--check" in sys.argv[1:]:
        return int(HEADER.read_text() != updated())
    HEADER.write_text(updated())
    return 0


if __name__ == "__main__":
    sys.exit(main())
