"""The README does what it says: its Python runs, its C compiles, its links lead somewhere.

A comment ``# -> text`` (``/* -> text */`` in C) after a print is the line that must come out.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


class Block(NamedTuple):
    """A fenced block, the heading above it, and the HTML comment that marks it."""

    heading: str
    language: str
    mark: str
    code: str


def fenced(text: str) -> list[Block]:
    blocks = []
    heading = ""
    pattern = r"^#+ (.+)$|^(?:<!-- (.+) -->\n)?```(\w*)\n((?:.*\n)*?)```$"
    for found in re.finditer(pattern, text, re.MULTILINE):
        if found[1]:
            heading = found[1]
        else:
            blocks.append(Block(heading, found[3], found[2] or "", found[4]))
    return blocks


BLOCKS = fenced(README)


def imports(code: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def promised(code: str) -> list[str]:
    return re.findall(r"(?:# -> |/\* -> )(.*?)(?: \*/)?$", code, re.MULTILINE)


def assert_prints(output: str, lines: list[str]) -> None:
    printed = iter(output.splitlines())
    for line in lines:  # in this order; other lines may come between
        assert line in printed, output


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "python"], ids=lambda b: b.heading
)
def test_python_runs(block: Block, tmp_path: Path) -> None:
    for name in sorted(imports(block.code)):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    script = tmp_path / "snippet.py"
    script.write_text(block.code, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert result.returncode == 0, result.stderr
    assert_prints(result.stdout, promised(block.code))


def test_c_example_compiles_and_runs(tmp_path: Path) -> None:
    if not shutil.which("cc"):
        pytest.skip("cc is not installed")
    (example,) = (block for block in BLOCKS if block.language == "c")
    (compile_,) = (block for block in BLOCKS if block.mark == "test: compile example.c")
    (tmp_path / "example.c").write_text(example.code, encoding="utf-8")
    # The README's `python` is the one that runs the tests.
    shell = f"set -eu\npython() {{ '{sys.executable}' \"$@\"; }}\n{compile_.code}./example\n"
    result = subprocess.run(
        ["sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert_prints(result.stdout, promised(example.code))


def test_ci_finds_the_two_commands() -> None:
    """`.ci/run` takes them from here; these are the words that the README promises."""
    marked = [block.code.strip() for block in BLOCKS if block.mark == "ci: run"]
    assert marked == ["pip install . && python -m umfa", "pip install '.[test]' && pytest"]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    local = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    missing = [link for link in local if not (ROOT / link).exists()]
    assert missing == []
