"""What a build lacks is named, in a line that says how to get it.

The real CMakeLists.txt is configured, on a machine from which something has been taken.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging import trees

pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("ninja") and shutil.which("c++")),
    reason="needs cmake, ninja and a compiler",
)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one message of a configuration that failed."""
    assert done.returncode != 0, done.stdout
    messages = re.findall(r"^CMake Error at .*\n((?:  .*\n)+)", done.stdout, re.MULTILINE)
    assert len(messages) == 1, done.stdout
    return str(messages[0])


@pytest.fixture
def build(tmp_path: Path) -> tuple[str, ...]:
    return "-B", str(tmp_path / "build")


@pytest.mark.parametrize("name", ["a;b", "<a>", 'a"b'])
def test_a_folder_that_cmake_cannot_spell(name: str, tmp_path: Path) -> None:
    said = refused(trees.configure(trees.copy_of_sources(tmp_path / name)))
    assert f"umfa cannot be built here: CMake cannot spell the folder {tmp_path / name}.\n" in said


def test_no_compiler(build: tuple[str, ...], tmp_path: Path) -> None:
    tools = tmp_path / "bin"  # a PATH with everything but compilers
    tools.mkdir()
    for tool in ("cmake", "ninja"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    said = refused(trees.configure(trees.ROOT, *build, PATH=str(tools)))
    assert "umfa needs a C++20 compiler, and none works here.\n" in said
    assert "macOS: xcode-select --install. Debian, Ubuntu: apt install g++." in said
    cache = (tmp_path / "build" / "CMakeCache.txt").read_text()
    assert "CMAKE_CXX_COMPILER" not in cache, "a compiler that is installed now must be found"


@pytest.mark.parametrize("script", [None, "#!/bin/sh\nexit 1\n"], ids=["absent", "broken"])
def test_a_compiler_that_does_not_work(
    script: str | None, build: tuple[str, ...], tmp_path: Path
) -> None:
    compiler = tmp_path / "c++"
    if script is not None:
        compiler.write_text(script)
        compiler.chmod(0o755)
    said = refused(trees.configure(trees.ROOT, *build, CXX=str(compiler)))
    assert f"none works here (CXX is '{compiler}').\n" in said


def test_an_old_compiler(build: tuple[str, ...], tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    version = "-U__clang__ -U__GNUC__ -D__GNUC__=10 -D__GNUC_MINOR__=2"
    compiler.write_text(f'#!/bin/sh\nexec c++ {version} "$@" 2>/dev/null\n')
    compiler.chmod(0o755)
    said = refused(trees.configure(trees.ROOT, *build, f"-DCMAKE_CXX_COMPILER={compiler}"))
    assert re.search(
        r"umfa needs a newer C\+\+ compiler: \S+/c\+\+ is GNU 10\.2\S*; expected g", said
    )


def test_no_headers_of_python(build: tuple[str, ...], tmp_path: Path) -> None:
    said = refused(
        trees.configure(
            trees.ROOT, *build, "-DCMAKE_CXX_COMPILER=c++", f"-DPython_INCLUDE_DIR={tmp_path}"
        )
    )
    assert re.search(r"umfa needs Python's headers, and Python\.h of \S+ is missing\.\n", said)
    assert re.search(r"apt install python3\.\d+-dev\.", said)


def test_the_readme_names_the_same_compilers() -> None:
    floors = dict(
        re.findall(
            r"set\(oldest_(\w+) (\d+)\)",
            (trees.ROOT / "cmake" / "requirements.cmake").read_text(),
        )
    )
    readme = (trees.ROOT / "README.md").read_text(encoding="utf-8")
    assert f"g++ ≥ {floors['GNU']} or clang ≥ {floors['Clang']}" in readme
    assert f"Xcode ≥ {floors['AppleClang']})" in readme
