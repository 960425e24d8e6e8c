"""From Metal text to PTX, through the emulator's front end and a cache addressed by content."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.metal.emulator import EmulatorError, SourceError, toolchain
from tools.metal.emulator.build import cache_folder, read
from tools.metal.emulator.rewrite import rewrite

from .entries import Entry, entries
from .ir import for_nvptx
from .peephole import improve

PACKAGE = Path(__file__).resolve().parent
_TARGET = (
    *("-target", "nvptx64-nvidia-cuda", "-nogpulib"),
    *(
        "-Xclang",
        "-target-cpu",
        "-Xclang",
        "sm_90",
        "-Xclang",
        "-target-feature",
        "-Xclang",
        "+ptx83",
    ),
)
_SHARED = re.compile(r"\.shared \.align \d+ \.b(\d+) (\w+)(?:\[(\d+)\])?;")
_UNDEFINED = re.compile(r"^\.extern \.(?:global|func)\b.*?(\w+)(?:\[\d*\])?;?$", re.MULTILINE)


@dataclass(frozen=True)
class Ptx:
    """A library of kernels as PTX."""

    text: str
    kernels: dict[str, Entry]
    threads: int | None
    shared: dict[str, int]  # static shared bytes of each kernel


def compile(
    source: str | Path,
    include_dirs: Sequence[str | Path] = (),
    macros: Mapping[str, Any] | None = None,
    constants: Mapping[int, Any] | None = None,
    threads: int | Sequence[int] | None = None,
    allow: frozenset[str] = frozenset(),
) -> Ptx:
    """Compiles a Metal source to PTX, or finds it compiled.

    Parameters
    ----------
    source, include_dirs, macros, constants
        As for `tools.metal.emulator.Library`.
    threads
        Size of the threadgroup: up to three numbers. It becomes a bound that ptxas divides the
        registers by, and a constant in the code: the kernel must be launched so.
    allow
        Rules of the linter to ignore.

    Raises
    ------
    SourceError
        The text is not Metal, or uses a function constant that was given no value.
    """
    code, made, count = as_cpp(source, include_dirs, macros, constants, threads, allow)
    key = hashlib.sha256("\0".join([_fingerprint(), code, str(count)]).encode()).hexdigest()[:32]
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    cached = folder / f"{key}.ptx"
    if not cached.exists():
        _write(cached, _compile(code, count))
    text = cached.read_text()
    return Ptx(text, {e.host_name: e for e in made}, count, _shared(text, made))


def as_cpp(
    source: str | Path,
    include_dirs: Sequence[str | Path] = (),
    macros: Mapping[str, Any] | None = None,
    constants: Mapping[int, Any] | None = None,
    threads: int | Sequence[int] | None = None,
    allow: frozenset[str] = frozenset(),
) -> tuple[str, list[Entry], int | None]:
    """C++ for the source, the entries in it, and the number of threads if that is known."""
    flat, declared = read(source, include_dirs, macros or {}, allow)
    size = None if threads is None else _three(threads)
    appended, made = entries(declared, constants or {}, size)
    count = None if size is None else size[0] * size[1] * size[2]
    return rewrite(flat, declared) + appended, made, count


def _three(threads: int | Sequence[int]) -> tuple[int, int, int]:
    given = (threads,) if isinstance(threads, int) else tuple(threads)
    x, y, z = (*given, 1, 1)[:3]
    return x, y, z


def _fingerprint() -> str:
    h = hashlib.sha256(toolchain.fingerprint().encode())
    for file in sorted([*PACKAGE.glob("*.py"), *(PACKAGE / "include").iterdir()]):
        h.update(file.name.encode() + file.read_bytes())
    return h.hexdigest()


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(suffix=".ptx", dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(name, path)


def as_ir(code: str, threads: int | None) -> str:
    """LLVM IR of the C++, optimised for NVPTX: all but the making of PTX is done."""
    unoptimised = toolchain.compile_language(
        code,
        [
            *_TARGET,
            *("-O3", "-Xclang", "-disable-llvm-passes", "-ffreestanding", "-g0"),
            f"-I{toolchain.HEADERS}",
            f"-I{PACKAGE / 'include'}",
        ],
    )
    return improve(_clang_ir(for_nvptx(unoptimised, threads), "-O3", "-emit-llvm"))


def _compile(code: str, threads: int | None) -> str:
    text = _clang_ir(as_ir(code, threads), "-O3", "-Xclang", "-disable-llvm-passes")
    missing = _UNDEFINED.findall(text)
    if missing:
        raise SourceError(f"without a value or a definition: {', '.join(missing)}", ("undefined",))
    return text


def _clang_ir(text: str, *flags: str) -> str:
    done = subprocess.run(
        [*toolchain.clang(), *_TARGET, "-x", "ir", "-S", *flags, "-o", "-", "-", "-Wno-everything"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise EmulatorError(f"clang does not take the IR:\n{done.stderr[-4000:]}")
    return done.stdout


def _shared(text: str, made: Sequence[Entry]) -> dict[str, int]:
    """Bytes of the shared variables that each entry names, each aligned to 16."""
    sizes = {name: int(bits) // 8 * int(count or 1) for bits, name, count in _SHARED.findall(text)}
    found = {}
    for entry in made:
        start = re.search(rf"\.entry {re.escape(entry.symbol)}\(", text)
        body = text[start.start() : text.index("\n}\n", start.start())] if start else ""
        names = set(re.findall(r"\w+", body)) & set(sizes)
        found[entry.host_name] = sum(-(-sizes[n] // 16) * 16 for n in names)
    return found


__all__ = ["Entry", "Ptx", "compile"]
