"""From Metal text to a loadable library, through a cache addressed by content."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import lint, structure, toolchain
from .early import read_early
from .instrument import instrument
from .launcher import constants_in_ir, constants_in_text, launcher, with_constants
from .rewrite import rewrite


@dataclass(frozen=True)
class Built:
    """A built library: the file to load, and what the text declares."""

    path: Path
    kernels: dict[str, str]  # host name to source location
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
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    asked = (str(source), *(repr(sorted(given.items())) for given in (macros, constants)))
    notes = folder / f"text-{_digest(*asked, str(checks), *sorted(allow))}.json"
    alone = _stands_alone(source, include_dirs)
    if alone and notes.exists():
        return _noted(notes)
    flat = None if alone else preprocessed(source, include_dirs, macros)
    front = _Front(
        folder,
        _digest(flat or str(source), asked[1], str(checks), *sorted(allow)),
        lambda: _rewritten(flat or preprocessed(source, include_dirs, macros), allow),
    )
    values = constants_in_ir(front.declared.constants, constants)
    ir = front.ir(constants_in_text(front.declared.constants, constants))
    key = _digest(ir.name, repr(sorted(values.items())))
    if not (folder / f"{key}.json").exists():
        runtime()  # part of building, so that the first dispatch does not wait for it
        if not ir.exists():
            front.compile(ir, constants, allow, checks)
        text = with_constants(zlib.decompress(ir.read_bytes()).decode(), values)
        _make(folder, key, toolchain.optimise(text), checks)
    built = _built(folder, key, front.declared)
    if alone:
        _write(notes, json.dumps({**asdict(built), "path": built.path.name}))
    return built


def _digest(*parts: str) -> str:
    """Cache key of a build from `parts` by this version of the emulator."""
    return hashlib.sha256("\0".join([toolchain.fingerprint(), *parts]).encode()).hexdigest()[:32]


_INCLUDES_A_FILE = re.compile(r'#\s*(?:include|embed)\s*"|__has_include')


def _stands_alone(source: str | Path, include_dirs: Sequence[str | Path]) -> bool:
    """Whether the text includes no files but the emulator's own."""
    if isinstance(source, Path) or "\n" not in source or include_dirs:
        return False
    return not _INCLUDES_A_FILE.search(source)


@functools.lru_cache(maxsize=1024)
def _noted(notes: Path) -> Built:
    """The library of an earlier build of the text, which is not parsed or checked again."""
    loaded = json.loads(notes.read_text())
    return Built(
        notes.parent / loaded["path"],
        loaded["kernels"],
        [(f, n) for f, n in loaded["sites"]],
        {int(k): [(n, s) for n, s in v] for k, v in loaded["variables"].items()},
        [(symbol, name, index) for symbol, name, index in loaded["unset"]],
    )


def _built(folder: Path, key: str, declared: _Declared) -> Built:
    loaded = json.loads((folder / f"{key}.json").read_text())
    return Built(
        folder / f"{key}.so",
        declared.kernels,
        [(f, n) for f, n in loaded["sites"]],
        {int(k): [(n, s) for n, s in v] for k, v in loaded["variables"].items()},
        [
            (symbol, c.name, c.index)
            for symbol in loaded["unset"]
            for c in declared.constants
            if symbol == c.name or symbol.endswith(f"{len(c.name)}{c.name}E")
        ],
    )


class _Declared(NamedTuple):
    """What a build must know of a text that is compiled already."""

    kernels: dict[str, str]  # host name to source location
    constants: list[structure.FunctionConstant]


class _Front:
    """The part of a build that does not depend on the values of bool and int function constants,
    in the cache: umfa's kernels have hundreds of sets of such values, for about a hundred texts.
    """

    def __init__(self, folder: Path, name: str, read: Callable[[], _Rewritten]) -> None:
        self._folder, self._name = folder, name
        self._read = functools.cache(read)
        notes = folder / f"declared-{name}.json"
        if not notes.exists():
            found = self._read().declared
            kernels = {name: x.kernel.token.location for name, x in found.entries.items()}
            constants = [asdict(c) for c in found.constants]
            _write(notes, json.dumps({"kernels": kernels, "constants": constants}))
        loaded = json.loads(notes.read_text())
        self.declared = _Declared(
            loaded["kernels"], [structure.FunctionConstant(**c) for c in loaded["constants"]]
        )

    def ir(self, in_text: list[str]) -> Path:
        """Where the IR is, or shall be, of the text with these definitions of constants."""
        return self._folder / f"ir-{_digest(self._name, *in_text)}"

    def compile(
        self, ir: Path, constants: Mapping[int, Any], allow: frozenset[str], checks: bool
    ) -> None:
        rewritten = self._read()
        code = rewritten.code + launcher(rewritten.declared, constants)
        passed = self._folder / f"passed-{_digest(rewritten.second or '')}"
        second = None if passed.exists() else rewritten.second
        late = structure.initialised_late(rewritten.declared)
        text = toolchain.compile_kernel(code, second, late, self._folder)
        passed.touch()
        text = read_early(text, toolchain.OWN_HEADERS, allow, checks)
        _write_bytes(ir, zlib.compress(text.encode(), 1))


class _Rewritten(NamedTuple):
    declared: structure.Structure
    code: str
    second: str | None  # for the second reading, if the text uses bfloat


def _rewritten(flat: str, allow: frozenset[str]) -> _Rewritten:
    declared = checked(flat, allow)
    second = rewrite(flat, declared, inexact=True) if _mentions_bfloat(declared) else None
    return _Rewritten(declared, rewrite(flat, declared), second)


def read(
    source: str | Path,
    include_dirs: Sequence[str | Path],
    macros: Mapping[str, Any],
    allow: frozenset[str],
) -> tuple[str, structure.Structure]:
    """The preprocessed text and its declarations, checked by the linter."""
    flat = preprocessed(source, include_dirs, macros)
    return flat, checked(flat, allow)


def preprocessed(
    source: str | Path, include_dirs: Sequence[str | Path], macros: Mapping[str, Any]
) -> str:
    is_path = isinstance(source, Path) or ("\n" not in source and source.endswith(".metal"))
    text = Path(source).read_text() if is_path else str(source)
    return toolchain.preprocess(
        text,
        str(source) if is_path else "<source>",
        str(Path(source).resolve().parent) if is_path else "",
        [str(d) for d in include_dirs],
        {k: _macro(v) for k, v in macros.items()},
    )


def checked(flat: str, allow: frozenset[str]) -> structure.Structure:
    """The text's declarations. Raises SourceError if the linter refuses the text."""
    declared = structure.read(flat)
    lint.check(declared, allow)
    return declared


def _macro(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _mentions_bfloat(s: structure.Structure) -> bool:
    return any(t.text.startswith("bfloat") for t in s.tokens)


def _make(folder: Path, key: str, ir: str, checks: bool) -> None:
    """Builds in a folder of its own and moves the results into place, the notes last: another
    process that does the same meanwhile does no harm."""
    work = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    try:
        done = instrument(ir, toolchain.OWN_HEADERS, checks)
        (work / "kernel.ll").write_text(done.text)
        toolchain.assemble(work / "kernel.ll", work / "kernel.o")
        toolchain.link(work / "kernel.o", work / "kernel.so")
        os.replace(work / "kernel.so", folder / f"{key}.so")
        notes = {
            "sites": done.sites,
            "variables": {
                k: [(v.name, v.size) for v in found] for k, found in done.variables.items()
            },
            "unset": done.unset,
        }
        _write(folder / f"{key}.json", json.dumps(notes))
    finally:
        if not os.environ.get("UMFA_METAL_KEEP"):
            shutil.rmtree(work, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    _write_bytes(path, text.encode())


def _write_bytes(path: Path, data: bytes) -> None:
    """Writes atomically: another process sees the whole file or none."""
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.replace(name, path)


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
