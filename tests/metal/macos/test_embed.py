"""The bytes of a metallib as they are in the library, for macOS and for Linux."""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.metal.macos import cross, macho
from tools.metal.emulator import toolchain

# As a metallib begins, and every byte there is, to an odd length.
METALLIB = b"MTLB" + random.Random(1).randbytes(70_000) + bytes(range(256)) + b"\0end"
NAMES = ["plain", 'a$b (1) it\'s \\n "quoted" %d R&D größer']

# What umfa calls, for C.
SHIM = """#include "core/instruments.h"
extern "C" __attribute__((visibility("default"))) const char* shim_bytes() {
    return umfa::metal::metallib().data();
}
extern "C" __attribute__((visibility("default"))) unsigned long shim_size() {
    return umfa::metal::metallib().size();
}
"""


def embed(folder: Path, name: str = "plain") -> Path:
    """The C++ file of a library that has METALLIB, kept in a folder of that name."""
    (folder / name).mkdir()
    metallib = folder / name / "umfa.metallib"
    metallib.write_bytes(METALLIB)
    embedded = folder / "embedded.cpp"
    script = cross.ROOT / "shaders" / "embed.py"
    subprocess.run([sys.executable, script, embedded, "--metallib", metallib], check=True)
    subprocess.run([sys.executable, script, folder / "text.cpp"], check=True)
    assert embedded.stat().st_size < (folder / "text.cpp").stat().st_size + 5000, (
        "compilers take seconds for the bytes as text"
    )
    return embedded


@pytest.mark.parametrize("name", NAMES, ids=["plain", "odd"])
def test_in_an_object_for_macos(name: str, tmp_path: Path) -> None:
    compiled = cross.compile_one(embed(tmp_path, name), tmp_path / "embedded.o", *cross.CORE)
    image = macho.read(compiled)
    assert image.arm64
    section, address = image.defined["_umfa_metallib"]
    assert section[:2] == ("__TEXT", "__const")
    assert address % 16 == 0
    assert image.content(compiled, "_umfa_metallib", len(METALLIB)) == METALLIB


# With an empty cache, zig first builds its C++ library, which takes a minute and a half. The
# default run tests the object for macOS and the library for Linux.
@pytest.mark.slow
def test_in_a_library_for_macos(tmp_path: Path) -> None:
    shim = tmp_path / "shim.cpp"
    shim.write_text(SHIM)
    objects = [
        cross.compile_one(embed(tmp_path), tmp_path / "embedded.o", *cross.CORE),
        cross.compile_one(shim, tmp_path / "shim.o", *cross.CORE),
    ]
    library = cross.link(tmp_path / "shim.dylib", objects, "-Wl,-dead_strip")
    image = macho.read(library)
    assert image.defined["_umfa_metallib"][1] % 16 == 0
    assert image.content(library, "_umfa_metallib", len(METALLIB)) == METALLIB


@pytest.mark.parametrize("name", NAMES, ids=["plain", "odd"])
def test_in_a_library_for_linux(name: str, tmp_path: Path) -> None:
    shim = tmp_path / "shim.cpp"
    shim.write_text(SHIM)
    library = tmp_path / "shim.so"
    toolchain.run(
        [
            *(toolchain.system_compiler(), "-std=c++20", "-O1", "-shared", "-fPIC"),
            *("-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{cross.ROOT / 'src'}"),
            *(str(embed(tmp_path, name)), str(shim), "-o", str(library)),
        ]
    )
    loaded = ctypes.CDLL(str(library))
    loaded.shim_bytes.restype, loaded.shim_size.restype = ctypes.c_void_p, ctypes.c_ulong
    assert loaded.shim_size() == len(METALLIB)
    assert loaded.shim_bytes() % 16 == 0
    assert ctypes.string_at(loaded.shim_bytes(), loaded.shim_size()) == METALLIB


def test_what_caches_objects_by_their_text_sees_another_metallib(tmp_path: Path) -> None:
    before = embed(tmp_path).read_text()
    (tmp_path / "plain" / "umfa.metallib").write_bytes(METALLIB[:-1] + b"D")
    after = tmp_path / "after.cpp"
    script, metallib = cross.ROOT / "shaders" / "embed.py", tmp_path / "plain" / "umfa.metallib"
    subprocess.run([sys.executable, script, after, "--metallib", metallib], check=True)
    assert after.read_text() != before
