"""umfa's own shaders, read as Apple's compiler would: every file in every branch of its conditions,
by rules that published Metal need not keep (`reserved.OWN_RULES`, `provenance`)."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from . import lint, structure, toolchain
from .declarations import declarations
from .provenance import faults, forms, raw_forms
from .reserved import Macro, macro_faults, macros_of
from .tokens import tokenize
from .words import MACROS

# What conditions in shaders/ may ask for: `structures` reads the text with each of them and
# without. UMFA_METAL_EMULATOR is never defined on a Mac.
KNOWN_CONDITIONS = frozenset(
    (
        *("__METAL__", "__METAL_VERSION__", "UMFA_METAL_EMULATOR"),
        *("UMFA_KERNEL", "UMFA_MERGES", "UMFA_SHAPE", "UMFA_M"),
        *("UMFA_OF", "UMFA_INLINE_CONSTANTS"),
    )
)
_MACRO = "'{}' is a macro of Metal, and here the name of a {} [predeclared-macro]"
_CONDITION = re.compile(r"^[ \t]*#[ \t]*(?:el)?if(?:n?def)?\b([^\n]*)", re.MULTILINE)


def sources(folder: Path) -> list[Path]:
    """The libraries and the headers of the shaders."""
    return [*sorted(folder.glob("*.metal")), *sorted(folder.rglob("*.h"))]


def _inline_constants(path: Path) -> tuple[tuple[str, str], ...]:
    """What a launcher without function constants puts in front of a library."""
    header = path.parent / "shared" / "constants.h"
    text = header.read_text() if header.exists() else ""
    names = re.findall(r"\bX\(\d+, \w+, (\w+)\)", text)
    return (("UMFA_INLINE_CONSTANTS", "1"), *((f"UMFA_VALUE_{name}", "1") for name in names))


def _variants(path: Path) -> list[tuple[bool, tuple[tuple[str, str], ...]]]:
    """Whether the emulator is there, and the macros, of every text that is made of a library."""
    one = (("UMFA_KERNEL", '"one"'), ("UMFA_T", "half"), ("UMFA_M", "half"))
    shape = {
        "forward": (("UMFA_SHAPE", "64, 64, 32, 2, 4, 1, false"),),
        "decode": (("UMFA_SHAPE", "64, 64, 1, 4"),),
        "decode_vector": (("UMFA_SHAPE", "64, 64, 4"),),
        "backward_mask": (("UMFA_SHAPE", "64, 64, 16, 2, 4, 1"),),
    }
    one += shape.get(path.stem, ())
    found = [(True, ()), (False, ()), (False, one), (False, one + _inline_constants(path))]
    if path.stem == "decode":
        others = tuple(x for x in one if x[0] != "UMFA_SHAPE")
        found.append((False, (*others, ("UMFA_MERGES", "1"), ("UMFA_SHAPE", "8, 4"))))
    if path.stem == "quantize_scales":
        found = found[:2]
        for function in ("umfa_quantize_scales", "umfa_quantize_gathered"):
            named = (*one, ("UMFA_OF", function))
            found += [(False, named), (False, named + _inline_constants(path))]
    if path.stem == "backward":
        shape_of = ("UMFA_SHAPE", "64, 64, 16, 2, 4, 1")
        found.append((False, (*one, ("UMFA_OF", "umfa_dq"), shape_of)))
    return found


@functools.lru_cache(maxsize=64)
def flattened(
    path: Path, folder: Path, text: str, emulated: bool, given: tuple[tuple[str, str], ...]
) -> str:
    """A library with its headers in it, as a Mac's preprocessor would leave it."""
    quoted = str(path).replace("\\", "\\\\").replace('"', '\\"')
    head = "" if emulated else f'#undef UMFA_METAL_EMULATOR\n# 1 "{quoted}"\n'
    return toolchain.preprocess(head + text, str(path), str(folder), [str(folder)], dict(given))


def texts(folder: Path, emulated: bool = True) -> list[tuple[structure.Structure, str]]:
    """Every library in every variant that a Mac compiles and, if ``emulated``, in the emulator's:
    its structure and its preprocessed text."""
    found = []
    for path in sorted(folder.glob("*.metal")):
        for is_emulated, given in _variants(path):
            if emulated or not is_emulated:
                flat = flattened(path, folder, path.read_text(), is_emulated, given)
                found.append((structure.read(flat), flat))
    return found


def structures(folder: Path) -> list[structure.Structure]:
    return [s for s, _ in texts(folder)]


def macros(folder: Path) -> list[Macro]:
    return [m for p in sources(folder) for m in macros_of(p.read_text(), str(p))]


def unknown_conditions(folder: Path) -> list[str]:
    """Macros in conditions that no variant defines, with their places."""
    found = []
    for path in sources(folder):
        text = path.read_text()
        for m in _CONDITION.finditer(text):
            for name in re.findall(r"[A-Za-z_]\w*", m.group(1).split("//")[0]):
                if name not in KNOWN_CONDITIONS | {"defined"}:
                    found.append(f"{path}:{text.count(chr(10), 0, m.start()) + 1}: {name}")
    return found


def name_faults(folder: Path) -> list[str]:
    """Names in the shaders that a rule refuses: ``file:line: error: message [rule]``."""
    found: dict[str, None] = {}
    for s in structures(folder):
        for token, rule, message in lint.findings(s, lint.OWN_RULES):
            found[f"{token.location}: error: {message} [{rule}]"] = None
    for path in sources(folder):
        for d in declarations(tokenize(path.read_text())):
            if d.token.text in MACROS:  # which the preprocessor replaces
                where = f"{path}:{d.token.line}"
                found[f"{where}: error: {_MACRO.format(d.token.text, d.kind)}"] = None
    for rule, message, macro in macro_faults(macros(folder)):
        found[f"{macro.file}:{macro.line}: error: {message} [{rule}]"] = None
    return sorted(found)


def form_faults(folder: Path, known: dict[tuple[str, str], tuple[str, str]]) -> list[str]:
    """Forms in what a Mac compiles that are not in the table, with their places."""
    found: dict[str, None] = {}
    for s, flat in texts(folder, emulated=False):
        found |= dict.fromkeys(faults(forms(s, flat), known))
    for path in sources(folder):
        found |= dict.fromkeys(faults(raw_forms(path.read_text(), str(path)), known))
    return sorted(found)
