"""ACCEPTANCE.md lists every case once, and the tests that it names exist and say so themselves."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = re.findall(
    r"^\| (A\d\d) \| .+ \| ([^|]+) \|$",
    (HERE / "ACCEPTANCE.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
LABEL = re.compile(r"(?:\b|_)[Aa](0[1-9]|[12][0-9]|3[0-6])(?:\b|_)")
# Modules of which every test belongs to the case: its number need not stand in each of them.
WHOLE = {"A36": {"core/test_bad_input.py", "core/test_bad_tables.py"}}


def labels(text: str) -> set[str]:
    return {f"A{number}" for number in LABEL.findall(text)}


def source_of(path: str, name: str) -> str:
    """The test's text and that of the lists of cases which its decorators name."""
    text = (HERE / path).read_text(encoding="utf-8")
    tree = ast.parse(text)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
    assert functions, f"{path} has no {name}"
    (function,) = functions
    used = {n.id for d in function.decorator_list for n in ast.walk(d) if isinstance(n, ast.Name)}
    nodes: list[ast.stmt] = [function]
    for node in tree.body:
        if isinstance(node, ast.Assign) and {getattr(t, "id", "") for t in node.targets} & used:
            nodes.append(node)
    parts = [ast.get_source_segment(text, node) or "" for node in nodes]
    decorators = [ast.get_source_segment(text, d) or "" for d in function.decorator_list]
    return "\n".join(parts + decorators)


def test_every_case_is_listed_once() -> None:
    assert [case for case, _ in ROWS] == [f"A{number:02}" for number in range(1, 37)]


@pytest.mark.parametrize(("case", "tests"), ROWS, ids=[case for case, _ in ROWS])
def test_the_tests_exist_and_name_their_case(case: str, tests: str) -> None:
    found = re.findall(r"`([^`]+)`", tests)
    assert found
    for name in found:
        if name.startswith("umfa."):
            # When it comes, the row must name the tests that came with it.
            assert importlib.util.find_spec(name) is None, f"{name} is there: say what tests {case}"
            continue
        path, _, function = name.partition("::")
        text = source_of(path, function)
        if not tests.startswith("not yet") and path not in WHOLE.get(case, set()):
            assert case in labels(text), f"{name} does not say that it is {case}"


def test_no_test_names_a_case_that_the_list_has_elsewhere() -> None:
    listed = {
        (case, path) for case, tests in ROWS for path in re.findall(r"`([^`:]+\.py)::", tests)
    }
    for file in sorted(HERE.rglob("test_*.py")):
        if file == Path(__file__):
            continue
        path = file.relative_to(HERE).as_posix()
        text = file.read_text(encoding="utf-8")
        said = set(re.findall(r'label="(A\d\d)"', text))
        said |= {f"A{n}" for n in re.findall(r"def test_a(\d\d)_", text)}
        said |= {f"A{n}" for n in re.findall(r'"""A(\d\d)[ :,.]', text)}
        assert {(case, path) for case in said} <= listed, path
