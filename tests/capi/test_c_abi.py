"""The C interface: a C99 program against the installed header and library, without Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import umfa

SOURCE = Path(__file__).with_name("forward_test.c")
NAMES = re.findall(r"^TEST\((\w+)\)", SOURCE.read_text(), re.MULTILINE)

STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]


def compiler(variable: str, *candidates: str) -> str:
    for name in (os.environ.get(variable, ""), *candidates):
        if name and shutil.which(name):
            return name
    pytest.skip(f"no compiler found: none of {', '.join(candidates)}")


def compile_or_fail(*command: str) -> None:
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, f"{' '.join(command)}\n{process.stderr}"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C tests, compiled and linked as a user would."""
    library = Path(umfa.get_library())
    assert library.is_file()
    binary = tmp_path_factory.mktemp("capi") / "forward_test"
    compile_or_fail(
        compiler("CC", "cc", "gcc", "clang"),
        "-std=c99", "-D_POSIX_C_SOURCE=200809L", *STRICT, f"-I{umfa.get_include()}",
        str(SOURCE), str(library), f"-Wl,-rpath,{library.parent}",
        "-lm", "-lpthread", "-o", str(binary),
    )  # fmt: skip
    return binary


@pytest.mark.parametrize("name", NAMES)
def test_c_program(name: str, program: Path) -> None:
    process = subprocess.run(
        [program, name, umfa.__version__], capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 0, f"status {process.returncode}\n{process.stderr}"
    assert process.stdout == "", "the library prints nothing"
    assert process.stderr == "", "the library prints nothing"


USER = """
#include "umfa/umfa.h"
#include "umfa/umfa.h"
umfa_attention_options defaults(void);
umfa_attention_options defaults(void) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    return options;
}
"""


@pytest.mark.parametrize("standard", ["c99", "c11", "c17"])
def test_header_compiles_as_c(standard: str, tmp_path: Path) -> None:
    (tmp_path / "user.c").write_text(USER)
    compile_or_fail(
        compiler("CC", "cc", "gcc", "clang"),
        f"-std={standard}", *STRICT, f"-I{umfa.get_include()}", "-fsyntax-only",
        str(tmp_path / "user.c"),
    )  # fmt: skip


@pytest.mark.parametrize("standard", ["c++11", "c++17", "c++20"])
def test_header_compiles_as_cpp(standard: str, tmp_path: Path) -> None:
    (tmp_path / "user.cpp").write_text(USER)
    compile_or_fail(
        compiler("CXX", "c++", "g++", "clang++"),
        f"-std={standard}", *STRICT, f"-I{umfa.get_include()}", "-fsyntax-only",
        str(tmp_path / "user.cpp"),
    )  # fmt: skip


def test_names_of_the_library_are_its_own() -> None:
    """What the library exports to a process starts with umfa_, or is C++ in namespace umfa."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    command = [nm, "-gU" if os.uname().sysname == "Darwin" else "-D", umfa.get_library()]
    if "-D" in command:
        command.insert(1, "--defined-only")
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # T: functions that other libraries would collide with. Instances of the C++ standard library's
    # templates are weak, and the same everywhere.
    names = {line.split()[-1].lstrip("_") for line in listed.splitlines() if " T " in line}
    assert {"umfa_attention_forward", "umfa_attention_combine", "umfa_attention_weights"} <= names
    assert {"umfa_last_error", "umfa_version"} <= names
    foreign = {name for name in names if not re.match(r"umfa_|Z.*4umfa|init$|fini$", name)}
    assert not foreign
