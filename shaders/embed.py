"""Writes the C++ file that holds the shaders: python embed.py OUTPUT [--metallib FILE].

Metal compiles text without any search path, so each .metal file is flattened: the project's own
headers take the place of their first #include. Metal's own (``<metal_stdlib>``) stay.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

SHADERS = Path(__file__).resolve().parent
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_PRAGMA_ONCE = re.compile(r"^\s*#\s*pragma\s+once\s*$")


def flatten(file: str, seen: set[str] | None = None) -> str:
    """Text of `file`, a path inside shaders/, with line markers that keep messages right."""
    seen = set() if seen is None else seen
    seen.add(file)
    lines = [f'#line 1 "{file}"']
    for number, line in enumerate((SHADERS / file).read_text().splitlines(), start=1):
        if _PRAGMA_ONCE.match(line):
            lines.append("")
        elif found := _INCLUDE.match(line):
            if found[1] not in seen:
                lines += [flatten(found[1], seen).rstrip("\n"), f'#line {number + 1} "{file}"']
            else:
                lines.append("")
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def sources() -> list[str]:
    """The .metal files, by name."""
    return sorted(path.name for path in SHADERS.glob("*.metal"))


def dependencies() -> list[Path]:
    """Every file whose change changes the output."""
    return sorted([Path(__file__), *SHADERS.rglob("*.metal"), *SHADERS.rglob("*.h")])


def _literal(text: str) -> str:
    # A macro or a string could hold any delimiter but this one; compilers take 64 KiB at a time.
    pieces = [text[i : i + 12000] for i in range(0, len(text), 12000)] or [""]
    return "\n".join(f'R"UMFAMSL({piece})UMFAMSL"' for piece in pieces)


def cpp(metallib: bytes | None) -> str:
    """The C++ file."""
    branches = "".join(
        f'    if (file == "{name}") return\n{_literal(flatten(name))};\n' for name in sources()
    )
    data = ", ".join(str(byte) for byte in metallib or b"")
    bytes_ = f"const unsigned char metallib_bytes[] = {{{data or 0}}};\n"
    size = len(metallib or b"")
    return (
        "// Written by shaders/embed.py.\n"
        '#include "metal/shaders.h"\n\n'
        "namespace umfa::metal {\n"
        f"namespace {{\nalignas(16) {bytes_}}}\n\n"
        f"std::string_view shader_text(std::string_view file) {{\n{branches}    return {{}};\n"
        "}\n\n"
        "std::string_view metallib() {\n"
        f"    return {{reinterpret_cast<const char*>(metallib_bytes), {size}}};\n}}\n\n"
        "}  // namespace umfa::metal\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--metallib", type=Path)
    arguments = parser.parse_args()
    text = cpp(arguments.metallib.read_bytes() if arguments.metallib else None)
    arguments.output.write_text(text)


if __name__ == "__main__":
    main()
