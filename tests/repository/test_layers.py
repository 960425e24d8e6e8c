"""No include and no import against the layers of ARCHITECTURE.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import umfa
from umfa import _ext
from umfa._call import public

ROOT = Path(__file__).parents[2]

INCLUDES = {
    "src/core": {"core", "shared", "umfa"},
    "src/cpu": {"cpu", "core", "shared"},
    "src/metal": {"metal", "core", "shared"},
    "src/capi": {"core", "umfa"},
    "src/python": {"python", "core", "umfa"},
    "shaders": {"shared"},
    "include/umfa": {"umfa"},
}
"""Folders whose headers the files of a folder may include."""

IMPORTS = [
    "_ext", "_errors", "_stats", "_attempt", "_replace", "_frameworks", "_call", "torch_ops",
    "_functional", "quant", "fa3", "fa4", "torch", "transformers", "_diffusers_rope", "diffusers",
    "shim", "jax", "mlx", "mlx_lm", "comfyui", "bench", "cli",
]  # fmt: skip
"""The parts of the package: each may import those before it, and itself. Only the commands and what
they need import the package's public names."""

_INCLUDE = re.compile(r'^\s*#\s*(?:include|import)\s*"([^"]+)"', re.MULTILINE)


def wrong_includes(folder: str, text: str) -> list[str]:
    """Those of a file's text that its folder may not have."""
    allowed = INCLUDES[folder]
    return [name for name in _INCLUDE.findall(text) if name.split("/")[0] not in allowed]


def part_of(module: str) -> str:
    """'umfa._call.run' -> '_call'; the package itself, and what runs its command, come last."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__main__" else "umfa"


def rank(part: str) -> int:
    return len(IMPORTS) if part == "umfa" else IMPORTS.index(part)


def imported(module: str, package: bool, text: str) -> Iterator[str]:
    """The modules of umfa that a module's text imports, by their full names."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (x.name for x in node.names if x.name.split(".")[0] == "umfa")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + package]
                base = ".".join([*kept, base]) if base else ".".join(kept)
            if base == "umfa":
                yield from (f"umfa.{x.name}" for x in node.names)
            elif base.startswith("umfa."):
                yield base


def wrong_imports(module: str, package: bool, text: str) -> list[str]:
    """Those of a module's text that go upwards."""
    own = part_of(module)
    commands = {"bench", "cli", "umfa"}
    return [
        name
        for name in imported(module, package, text)
        if rank(part_of(name)) > rank(own) and not (own in commands and name == "umfa")
    ]


def test_includes_go_downwards() -> None:
    files = 0
    for folder in INCLUDES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in (".h", ".cpp", ".mm", ".metal", ".c", ".def"):
                continue
            files += 1
            wrong = wrong_includes(folder, path.read_text())
            assert not wrong, f"{path.relative_to(ROOT)} includes {wrong}"
    assert files > 80


def test_imports_go_downwards() -> None:
    package = ROOT / "python"
    for path in sorted((package / "umfa").rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        wrong = wrong_imports(module, is_package, path.read_text())
        assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize(
    ("folder", "include"),
    [
        ("src/core", "metal/plan_forward.h"),
        ("src/core", "cpu/thread_pool.h"),
        ("src/cpu", "metal/capabilities.h"),
        ("src/python", "cpu/features.h"),
        ("src/capi", "python/record.h"),
        ("shaders", "core/problem.h"),
    ],
)
def test_a_planted_include_is_found(folder: str, include: str) -> None:
    assert wrong_includes(folder, f'#pragma once\n#include "{include}"\n') == [include]


@pytest.mark.parametrize(
    ("module", "line", "name"),
    [
        ("umfa._frameworks._torch", "from .._call.run import run", "umfa._call.run"),
        ("umfa._call.run", "from .._functional import sdpa", "umfa._functional"),
        ("umfa._call.run", "import umfa", "umfa"),
        ("umfa._functional.sdpa", "from umfa.cli import demo", "umfa.cli"),
        ("umfa._errors", "from . import _frameworks", "umfa._frameworks"),
    ],
)
def test_a_planted_import_is_found(module: str, line: str, name: str) -> None:
    assert wrong_imports(module, False, line) == [name]


def test_an_option_without_a_field_is_an_error_at_import() -> None:
    function = _ext.Function("umfa.f", query="q", key="k", value="v")
    with pytest.raises(TypeError, match=r"umfa\.f has parameters .*\['prefix'\]"):

        @public(function)
        def f(q: object, k: object, v: object, prefix: object = None) -> _ext.Attention:
            raise AssertionError

    with pytest.raises(TypeError, match="has no field 'prefix'"):
        _ext.Function("umfa.f", prefix="p")
    with pytest.raises(TypeError, match="Attention has no field 'prefix'"):
        _ext.Attention(function, query=1, key=1, value=1, prefix=1, backend="cpu")  # type: ignore[call-arg]


def test_the_c_header_has_the_options_as_they_are_defined() -> None:
    from tools import c_options

    assert c_options.HEADER.read_text() == c_options.updated(), "run python tools/c_options.py"


def test_every_public_function_has_a_record() -> None:
    from umfa._call._public import BODIES

    names = {function.__name__ for function in BODIES}
    functions = {x for x in umfa.__all__ if x.startswith(("flash_", "fused_", "scaled_"))}
    assert names >= functions
