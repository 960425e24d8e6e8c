"""Finds and calls the compilers: clang out of the ``ziglang`` package, and the system's for the
runtime and for linking (zig would first build a C++ library for minutes)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from . import implicit, precompiled
from .errors import EmulatorError, SourceError

PACKAGE = Path(__file__).resolve().parent
HEADERS = PACKAGE / "include"
BACKEND = PACKAGE / "backend"
OWN_HEADERS = (str(HEADERS), str(BACKEND))


@functools.cache
def clang() -> tuple[str, ...]:
    """Command of the clang that reads kernels. UMFA_METAL_CLANG overrides it."""
    if given := os.environ.get("UMFA_METAL_CLANG"):
        return tuple(given.split())
    spec = importlib.util.find_spec("ziglang")
    if spec is None or not spec.submodule_search_locations:
        raise EmulatorError("the emulator compiles kernels with clang: pip install ziglang")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return (str(folder / ("zig.exe" if os.name == "nt" else "zig")), "clang")


@functools.cache
def system_compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("clang++")
    if found is None:
        raise EmulatorError("the emulator links with the system's C++ compiler, and none is here")
    return found


@functools.cache
def native_flags() -> tuple[str, ...]:
    """This processor's own instructions: half precision is slow without them."""
    return ("-march=native",) if platform.machine() in ("x86_64", "AMD64") else ()


def kernel_flags() -> tuple[str, ...]:
    """Without the processor's instructions for bfloat, which flush subnormals in any mode."""
    return (*native_flags(), "-mno-avx512bf16", "-mno-avxneconvert") if native_flags() else ()


@functools.cache
def fingerprint() -> str:
    """Of everything but the kernel that decides what is built."""
    h = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            h.update(file.relative_to(PACKAGE).as_posix().encode())
            h.update(file.read_bytes())
    h.update(run([*clang(), "--version"]).encode())
    h.update(platform.platform().encode())
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        flags = re.search(r"^flags.*$", cpu.read_text(), re.MULTILINE)
        h.update(flags.group().encode() if flags else b"")
    return h.hexdigest()


def run(command: Sequence[str], text: str | None = None) -> str:
    """Output of a command; its messages become an exception if it fails."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EmulatorError(f"{' '.join(command[:3])} ... failed:\n{done.stderr}")
    return done.stdout


# Warnings of clang's that are errors in Metal.
_ERRORS = (
    "-Werror=vla-cxx-extension",
    "-Werror=return-type",
    "-Werror=conversion-null",
    "-Werror=uninitialized",
    "-Werror=division-by-zero",
)


def compile_language(text: str, flags: Sequence[str]) -> str:
    """LLVM IR of rewritten Metal text. The flags choose the target and where headers are found."""
    command = _language(*flags, "-S", "-emit-llvm", "-o", "-", "-")
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SourceError(_metal_words(done.stderr))
    return done.stdout


def _reading(*flags: str) -> list[str]:
    """For this machine."""
    return _language(
        *("-O2", "-g1", "-fPIC", *kernel_flags(), f"-I{HEADERS}", f"-I{BACKEND}"),
        *("-Xclang", "-disable-llvm-passes", "-ftrivial-auto-var-init=pattern"),
        # A large frame touches all of its pages, and so the guard behind a fiber's stack.
        "-fstack-clash-protection",
        # C++ takes loops without side effects to end, and clang would remove those that do not.
        "-fno-finite-loops",
        # Names of files stay whole, so that those of the emulator's own headers are known.
        "-fdebug-compilation-dir=.",
        *flags,
    )


def _language(*flags: str) -> list[str]:
    return [
        *clang(),
        *("-x", "c++", "-std=c++23", "-nostdinc", "-include", "metal_types"),
        *("-fno-exceptions", "-fno-rtti", "-fno-stack-protector", "-fno-unwind-tables"),
        *("-fno-asynchronous-unwind-tables", "-ffp-contract=on", "-fno-lax-vector-conversions"),
        *("-Xclang", "-ffloat16-excess-precision=none"),
        *("-Xclang", "-fbfloat16-excess-precision=none"),
        *("-fno-math-errno", "-fno-threadsafe-statics", "-fconvergent-functions"),
        *("-fno-strict-aliasing", "-fno-caret-diagnostics", "-Wno-everything"),
        *("-Wimplicit-float-conversion", *_ERRORS),
        *flags,
    ]


def compile_kernel(
    text: str, second: str | None, runtime_initialised: frozenset[str], folder: Path
) -> str:
    """LLVM IR of rewritten Metal text, not optimised yet. Variables without a value get one that is
    no number, so that reading them shows. ``second`` is the text for the second reading, if bfloat
    is in it; of ``runtime_initialised`` variables the value may be known only when the library is
    loaded. Precompiled headers are kept in ``folder``."""
    reading = _reading()
    headers = precompiled.flags(folder, text, reading, fingerprint())
    command = [*reading, *headers, "-S", "-emit-llvm", "-Wglobal-constructors", "-o", "-", "-"]
    other = None
    if second is not None:
        reading = _reading(*implicit.FLAGS)
        headers = precompiled.flags(folder, second, reading, fingerprint())
        other = subprocess.Popen(
            [*reading, *headers, "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=_feed, args=(other, second)).start()
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    second_messages = ""
    if other is not None and other.stderr is not None:
        second_messages = other.stderr.read()
        other.stderr.close()
        other.wait()
    if done.returncode != 0:
        raise SourceError(_metal_words(done.stderr))
    refused = implicit.conversions(done.stderr)
    refused = refused or implicit.conversions_of_second_reading(second_messages, OWN_HEADERS)
    if refused:
        raise SourceError("\n".join(refused), ("implicit-bfloat",))
    _refuse_initialisers(done.stderr, text, runtime_initialised)
    return done.stdout


def _feed(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(text)
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


_CONSTRUCTOR = re.compile(r"^(.*):(\d+):\d+: warning: declaration requires a global constructor")


def _refuse_initialisers(messages: str, text: str, allowed: frozenset[str]) -> None:
    places = [m.groups() for m in map(_CONSTRUCTOR.match, messages.splitlines()) if m]
    refused = [
        f"{file}:{line}: error: the value of a constant must be a constant expression"
        for file, line in places
        if f"{file}:{line}" not in allowed and "launcher" not in file
    ]
    if refused:
        raise SourceError("\n".join(refused), ("constant-value",))


def optimise(ir: str) -> str:
    command = [
        *clang(),
        *("-x", "ir", "-O2", "-g1", "-fPIC", "-S", "-emit-llvm", "-o", "-", "-"),
        *(*kernel_flags(), "-fno-vectorize", "-fno-slp-vectorize", "-Wno-everything"),
    ]
    return run(command, ir)


_FOLLOWS = re.compile(
    r"umfa_signature|in the global namespace|overloaded function could not be resolved"
    r"|function-style cast or type construction|error: expected '\)'|too many errors"
)


def _metal_words(messages: str) -> str:
    for n, word in ((1, "device"), (2, "constant"), (3, "threadgroup")):
        messages = messages.replace(f"__attribute__((address_space({n})))", word)
        messages = messages.replace(f"address space '{n}'", f"address space '{word}'")
    lines: list[str] = []
    of_error = True
    for line in messages.splitlines():
        note = ": note: " in line  # which belongs to the message before it
        if not note:
            of_error = "warning: " not in line and not line.startswith("In file included")
            # What the entry functions then cannot say either is no news.
            of_error = of_error and not (lines and _FOLLOWS.search(line))
        if of_error and not (note and line.startswith(OWN_HEADERS)):
            lines.append(line.replace(str(HEADERS) + os.sep, ""))
    return "\n".join(lines)


def preprocess(
    text: str, name: str, folder: str, include_dirs: Sequence[str], macros: dict[str, str]
) -> str:
    """The text with its macros and its own headers, without Metal's."""
    flags: list[str] = [
        *clang(),
        *("-E", "-x", "c++", "-std=c++17", "-undef", "-nostdinc"),
        f"-I{HEADERS / 'preprocess'}",
        *([f"-I{folder}"] if folder else []),
        *(f"-I{d}" for d in include_dirs),
        *("-D__METAL__=1", "-D__METAL_VERSION__=310", "-D__METAL_MACOS__=1"),
        *("-D__HAVE_BFLOAT__=1", "-DUMFA_METAL_EMULATOR=1"),
        *(f"-D{k}={v}" for k, v in macros.items()),
        "-fno-caret-diagnostics",
    ]
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    named = f'# 1 "{quoted}"\n{text}'
    flat = _preprocessed(named, flags)
    if not any(_has_names(pragma) for pragma in _UNROLL.findall(flat)):
        return flat
    return _expand_pragmas(flat, _preprocessed(named, [*flags, "-dD"]))


def _preprocessed(text: str, flags: Sequence[str]) -> str:
    done = subprocess.run([*flags, "-"], input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SourceError(done.stderr)
    return done.stdout


# Pragmas in which macros count; clang leaves those to its parser, which no longer knows them.
_UNROLL = re.compile(r"^#pragma ((?:clang loop|GCC|unroll|nounroll)\b.*)$", re.MULTILINE)
_DIRECTIVE = re.compile(r"^#(?:define|undef) .*$|" + _UNROLL.pattern, re.MULTILINE)


_PRAGMA_WORDS = {
    *("clang", "loop", "GCC", "unroll", "nounroll", "unroll_count", "vectorize", "interleave"),
    *("full", "enable", "disable", "assume_safety", "vectorize_width", "interleave_count"),
}


def _has_names(pragma: str) -> bool:
    return not set(re.findall(r"[A-Za-z_]\w*", pragma)) <= _PRAGMA_WORDS


def _expand_pragmas(flat: str, with_definitions: str) -> str:
    """The text with the macros in its pragmas expanded, as they are defined at each of them."""
    lines = []
    for found in _DIRECTIVE.finditer(with_definitions):
        pragma = found.group(1)
        if pragma is None:
            lines.append(found.group())
            continue
        kept, opening, rest = pragma.partition("(" if "(" in pragma else " ")
        lines += [f'"umfa pragma" "{kept}{opening}"', f"{rest}", '"umfa end"']
    command = [*clang(), *("-E", "-P", "-x", "c++", "-undef", "-nostdinc", "-Wno-everything", "-")]
    text = run(command, "\n".join(lines) + "\n")
    expanded = re.findall(r'"umfa pragma" "(.*?)"\s*(.*?)\s*"umfa end"', text, re.DOTALL)
    pragmas = iter(f"#pragma {start}{' '.join(rest.split())}" for start, rest in expanded)
    return _UNROLL.sub(lambda _: next(pragmas), flat)


def assemble(ir: Path, output: Path) -> None:
    """Object file of instrumented IR, which is optimised already. The code generator's quick way
    takes less than half the time, and its code runs 10 % longer."""
    run(
        [
            *clang(),
            *("-x", "ir", "-O0", "-Xclang", "-disable-llvm-passes", "-fPIC", "-c", str(ir)),
            *("-Wno-override-module", "-o", str(output)),
        ]
    )


def compile_runtime(output: Path) -> None:
    """The runtime is a shared library of its own: one set of fibers and of reserved addresses
    serves all kernels of a process."""
    sources = sorted((PACKAGE / "runtime").glob("*.cpp"))
    run(
        [
            system_compiler(),
            *("-std=c++20", "-O3", "-fPIC", *native_flags(), "-ffp-contract=fast"),
            *("-shared", *map(str, sources), "-lm", "-pthread", "-o", str(output)),
        ]
    )


def link(kernel: Path, output: Path) -> None:
    """A library of kernels, which finds the runtime among what is loaded already."""
    later = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    run([system_compiler(), "-shared", "-fPIC", str(kernel), *later, "-o", str(output)])
