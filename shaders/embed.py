"""Writes the C++ file that holds the shaders: python embed.py OUTPUT [--metallib FILE].

The assembler puts the metallib in (.incbin): as a list of numbers, the compiler takes 10 s and
0.66 GB for 4 MB of it.

Metal compiles text without any search path, so each .metal file is flattened: the project's own
headers take the place of their first #include. Metal's own (``<metal_stdlib>``) stay.
"""

from __future__ import annotations

import argparse
import hashlib
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


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _metallib(path: Path | None) -> tuple[str, str]:
    """C++ that puts the file into the library, and that returns it."""
    if path is None:
        return "", "    return {};\n"
    data = path.read_bytes()
    # The digest is for what caches objects by their text: it does not see the file behind .incbin.
    digest = hashlib.sha256(data).hexdigest()
    include = _quoted(f".incbin {_quoted(str(path.resolve()))}\n").replace("\n", "\\n")
    embedded = (
        f"// sha256 of the metallib: {digest}\n"
        "asm(\n"
        "#ifdef __APPLE__\n"
        '    ".pushsection __TEXT,__const\\n"\n'
        '    ".globl _umfa_metallib\\n"\n'
        '    ".private_extern _umfa_metallib\\n"\n'
        '    ".p2align 4\\n"\n'
        '    "_umfa_metallib:\\n"\n'
        "#else\n"
        '    ".pushsection .rodata\\n"\n'
        '    ".globl umfa_metallib\\n"\n'
        '    ".hidden umfa_metallib\\n"\n'
        '    ".type umfa_metallib, %object\\n"\n'
        f'    ".size umfa_metallib, {len(data)}\\n"\n'
        '    ".p2align 4\\n"\n'
        '    "umfa_metallib:\\n"\n'
        "#endif\n"
        f"    {include}\n"
        '    ".popsection\\n");\n'
        'extern "C" __attribute__((visibility("hidden"))) const char umfa_metallib[];\n\n'
    )
    return embedded, f"    return {{umfa_metallib, {len(data)}}};\n"


def cpp(metallib: Path | None) -> str:
    """The C++ file. It refers to the metallib, which must stay where it is until it is compiled."""
    branches = "".join(
        f'    if (file == "{name}") return\n{_literal(flatten(name))};\n' for name in sources()
    )
    embedded, returned = _metallib(metallib)
    return (
        "// Written by shaders/embed.py.\n"
        '#include "core/instruments.h"\n\n'
        f"{embedded}"
        "namespace umfa::metal {\n\n"
        f"std::string_view shader_text(std::string_view file) {{\n{branches}    return {{}};\n"
        "}\n\n"
        f"std::string_view metallib() {{\n{returned}}}\n\n"
        "}  // namespace umfa::metal\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--metallib", type=Path)
    parser.add_argument(
        "--metallib-or-text",
        type=Path,
        help="a metallib that may be missing: the library then has only the text",
    )
    arguments = parser.parse_args()
    metallib: Path | None = arguments.metallib
    if arguments.metallib_or_text and arguments.metallib_or_text.exists():
        metallib = arguments.metallib_or_text
    arguments.output.write_text(cpp(metallib))


if __name__ == "__main__":
    main()
