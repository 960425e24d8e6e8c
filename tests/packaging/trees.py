"""Copies of what `pip install .` reads, and a compiler that keeps its objects between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Objects are compiled once, without optimisation, and copied for every other folder. The compiler
# always writes the dependencies of the binding's sources: how it spells the folder is tested too.
COMPILER = """#!{python}
import hashlib, re, shutil, subprocess, sys
from pathlib import Path

root, cache, arguments = {root!r}, Path({cache!r}), sys.argv[1:]
source = next((a for a in arguments if a.startswith(root) and a.endswith(".cpp")), None)
if source is None or "-c" not in arguments:
    sys.exit(subprocess.run(["c++", *arguments]).returncode)
output = arguments[arguments.index("-o") + 1]
key = hashlib.sha256(" ".join(arguments).replace(root, "").encode()).hexdigest()
kept = cache / key
status = 0
if not kept.exists():
    status = subprocess.run(["c++", *arguments, "-O0"]).returncode
    if status == 0:
        shutil.copyfile(output, kept)
elif "/src/python/" in source:
    status = subprocess.run(["c++", *arguments, "-fsyntax-only"]).returncode
shutil.copyfile(kept, output) if status == 0 else None
sys.exit(status)
"""
READ_BY_A_BUILD = (
    *("CMakeLists.txt", "CMakePresets.json", "LICENSE", "README.md", "pyproject.toml"),
    *("cmake", "include", "python", "shaders", "src"),
)


def copy_of_sources(folder: Path) -> Path:
    """`folder`, filled."""
    folder.mkdir(parents=True)
    for name in READ_BY_A_BUILD:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


def caching_compiler(tool: Path, root: Path, cache: Path) -> Path:
    cache.mkdir(exist_ok=True)
    tool.write_text(COMPILER.format(python=sys.executable, root=str(root), cache=str(cache)))
    tool.chmod(0o755)
    return tool


def cmake(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Its output and its messages are one text."""
    environment = {name: text for name, text in os.environ.items() if name not in ("CC", "CXX")}
    return subprocess.run(
        ["cmake", *arguments],
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )


def configure(source: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In the folder `build` of the sources, as pip does, unless an option -B names another."""
    nanobind = pytest.importorskip("nanobind")
    return cmake(
        *("-S", str(source), "-B", str(source / "build"), "-G", "Ninja"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dnanobind_DIR={nanobind.cmake_dir()}"),
        *options,
        **variables,
    )
