"""From Metal text to a loadable library, through a cache addressed by content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import lint, structure, toolchain
from .early import read_early
from .instrument import instrument
from .launcher import launcher
from .rewrite import rewrite


@dataclass(frozen=True)
class Built:
    """A built library: the file to load, and what the text declares."""

    path: Path
    structure: structure.Structure
    sites: list[tuple[str, int]]
    variables: dict[int, list[tuple[str, int]]]  # of each kernel: name and bytes
    unset: list[tuple[str, str, int]]  # symbol, name and index of constants without a value


def cache_folder() -> Path:
    """``UMFA_METAL_CACHE``, or a folder of the user's."""
    given = os.environ.get("UMFA_METAL_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "umfa-metal-emulator"


def build(
    source: str | Path,
    include_dirs: Sequence[str | Path],
    macros: Mapping[str, Any],
    constants: Mapping[int, Any],
    checks: bool,
    allow: frozenset[str],
) -> Built:
    """Builds a library, or finds it built. Raises SourceError for text that is not Metal."""
    flat, declared = read(source, include_dirs, macros, allow)
    code = rewrite(flat, declared) + launcher(declared, constants)
    second = rewrite(flat, declared, inexact=True) if _mentions_bfloat(declared) else None
    key = hashlib.sha256(
        "\0".join([toolchain.fingerprint(), code, str(checks), *sorted(allow)]).encode()
    ).hexdigest()[:32]
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    library, notes = folder / f"{key}.so", folder / f"{key}.json"
    if not notes.exists():
        runtime()  # part of building, so that the first dispatch does not wait for it
        late = structure.initialised_late(declared)
        ir = toolchain.compile_kernel(code, second, late)
        ir = toolchain.optimise(read_early(ir, toolchain.OWN_HEADERS, allow, checks))
        _make(folder, library, notes, ir, checks)
    loaded = json.loads(notes.read_text())
    return Built(
        library,
        declared,
        [(f, n) for f, n in loaded["sites"]],
        {int(k): [(n, s) for n, s in v] for k, v in loaded["variables"].items()},
        [
            (symbol, c.name, c.index)
            for symbol in loaded["unset"]
            for c in declared.constants
            if symbol == c.name or symbol.endswith(f"{len(c.name)}{c.name}E")
        ],
    )


def read(
    source: str | Path,
    include_dirs: Sequence[str | Path],
    macros: Mapping[str, Any],
    allow: frozenset[str],
) -> tuple[str, structure.Structure]:
    """The preprocessed text, and what it declares, checked by the linter."""
    is_path = isinstance(source, Path) or ("\n" not in source and source.endswith(".metal"))
    text = Path(source).read_text() if is_path else str(source)
    flat = toolchain.preprocess(
        text,
        str(source) if is_path else "<source>",
        str(Path(source).resolve().parent) if is_path else "",
        [str(d) for d in include_dirs],
        {k: _macro(v) for k, v in macros.items()},
    )
    declared = structure.read(flat)
    lint.check(declared, allow)
    return flat, declared


def _macro(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _mentions_bfloat(s: structure.Structure) -> bool:
    return any(t.text.startswith("bfloat") for t in s.tokens)


def _make(folder: Path, library: Path, notes: Path, ir: str, checks: bool) -> None:
    """Builds in a folder of its own and moves the results into place, the notes last: another
    process that does the same meanwhile does no harm."""
    work = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    try:
        done = instrument(ir, toolchain.OWN_HEADERS, checks)
        (work / "kernel.ll").write_text(done.text)
        toolchain.assemble(work / "kernel.ll", work / "kernel.o")
        toolchain.link(work / "kernel.o", work / "kernel.so")
        (work / "notes.json").write_text(
            json.dumps(
                {
                    "sites": done.sites,
                    "variables": {
                        k: [(v.name, v.size) for v in found] for k, found in done.variables.items()
                    },
                    "unset": done.unset,
                }
            )
        )
        os.replace(work / "kernel.so", library)
        os.replace(work / "notes.json", notes)
    finally:
        if not os.environ.get("UMFA_METAL_KEEP"):
            shutil.rmtree(work, ignore_errors=True)


def runtime() -> Path:
    """The runtime's shared library, compiled once."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"runtime-{toolchain.fingerprint()[:32]}.so"
    if not path.exists():
        handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        toolchain.compile_runtime(Path(name))
        os.replace(name, path)
    return path
