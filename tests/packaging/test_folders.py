"""umfa builds in a folder of any name, as browsers, file managers and people choose them.

Each is configured and built up to the stub of the extension, which is the last step that runs a
command of umfa's own. The objects are those of the first folder; see trees.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.packaging import trees

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("cmake") and shutil.which("ninja") and shutil.which("c++")),
        reason="needs cmake, ninja and a compiler",
    ),
]

NAMES = ("umfa (1)", "Bob's", "~[x]{y}=:", "R&D", "a$b", "ünï", "a#b", "50%", "a,b")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("objects")


@pytest.mark.parametrize(
    "name", [*NAMES[:3], *(pytest.param(name, marks=pytest.mark.nightly) for name in NAMES[3:])]
)
def test_a_folder_of_any_name(name: str, cache: Path, tmp_path: Path) -> None:
    source = trees.copy_of_sources(tmp_path / name)
    compiler = trees.caching_compiler(tmp_path / "compiler", source, cache)
    configured = trees.configure(source, f"-DCMAKE_CXX_COMPILER={compiler}")
    assert configured.returncode == 0, configured.stdout
    built = trees.cmake("--build", str(source / "build"))
    assert built.returncode == 0, built.stdout
    stub = (source / "build" / "_ext.pyi").read_text(encoding="utf-8")
    assert "def attention_forward" in stub
    # Every path that the compiler wrote down is one that ninja finds again.
    again = trees.cmake("--build", str(source / "build"))
    assert "no work to do" in again.stdout
