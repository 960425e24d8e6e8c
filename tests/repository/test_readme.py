"""The README and docs/ do what they say: their Python runs, their C compiles, their links work.

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

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
EXAMPLES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


class Block(NamedTuple):
    """A fenced block, its file, the heading above it, and the HTML comment that marks it."""

    document: str
    heading: str
    language: str
    mark: str
    code: str


def relative(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def fenced(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    blocks = []
    heading = ""
    pattern = r"^#+ (.+)$|^(?:<!-- (.+) -->\n)?```(\w*)\n((?:.*\n)*?)```$"
    for found in re.finditer(pattern, text, re.MULTILINE):
        if found[1]:
            heading = found[1]
        else:
            mark = found[2] or ""
            blocks.append(Block(relative(document), heading, found[3], mark, found[4]))
    return blocks


BLOCKS = [block for document in EXAMPLES for block in fenced(document)]
PYTHON = [block for block in BLOCKS if block.language == "python"]


NEEDS = {"umfa.comfyui": {"torch"}}
"""Libraries that a module of umfa imports and a block that uses it does not."""


def imports(code: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
            names |= NEEDS.get(node.module, set())
    return names


def promised(code: str) -> list[str]:
    return re.findall(r"(?:# -> |/\* -> )(.*?)(?: \*/)?$", code, re.MULTILINE)


def assert_prints(output: str, lines: list[str]) -> None:
    printed = iter(output.splitlines())
    for line in lines:  # in this order; other lines may come between
        assert line in printed, output


def test_there_are_examples() -> None:
    found = {block.document for block in PYTHON}
    assert found >= {"README.md", "docs/usage.md", "docs/backends.md"}


@pytest.mark.parametrize("block", PYTHON, ids=lambda b: f"{b.document}:{b.heading}")
def test_python_runs(block: Block, tmp_path: Path) -> None:
    for name in sorted(imports(block.code)):
        provided = f"umfa.shim.{name}(" in block.code
        if not provided and importlib.util.find_spec(name) is None:
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
    # The document's `python` is the one that runs the tests.
    shell = f"set -eu\npython() {{ '{sys.executable}' \"$@\"; }}\n{compile_.code}./example\n"
    result = subprocess.run(
        ["sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert_prints(result.stdout, promised(example.code))


def test_ci_finds_the_two_commands() -> None:
    """`.ci/run` takes them from here; these are the words that the README promises."""
    marked = [(b.document, b.code.strip()) for b in BLOCKS if b.mark == "ci: run"]
    assert marked == [
        ("README.md", "pip install . && python -m umfa"),
        ("README.md", "pip install '.[test]' && pytest"),
    ]


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document in links."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []
