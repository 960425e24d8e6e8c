"""README, docs/, CHANGELOG and CONTRIBUTING agree with the code where a machine can tell."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import umfa

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
PAGES = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/*.md"))]


def text_of(name: str) -> str:
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def possible(head_dim: int, head_dim_v: int) -> bool:
    q, v = (np.zeros((1, 2, 1, size), np.float32) for size in (head_dim, head_dim_v))
    return umfa.can_run(q, q, v)[0]


def largest(of_value: bool) -> int:
    """The largest head dim of queries and keys, or of values, that `can_run` accepts."""
    accepted = [d for d in range(1, 1025) if possible(*((64, d) if of_value else (d, 64)))]
    assert accepted == list(range(1, len(accepted) + 1))
    return accepted[-1]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_head_dims(name: str) -> None:
    limits = largest(of_value=False), largest(of_value=True)
    for phrase in (
        r"head dims? (?:go to|1 to) (\d+) \(those of the value to (\d+)\)",
        r"head dims? 1 to (\d+)(?:, value's 1 to |, a head dim of its own \(1 to )(\d+)",
    ):
        for found in re.findall(phrase, text_of(name)):
            assert tuple(map(int, found)) == limits
    every = re.findall(r"head dims? (?:go to|1 to) (\d+)", text_of(name))
    assert set(map(int, every)) <= {limits[0]}
    assert every or name == "CONTRIBUTING.md"


def test_nothing_that_works_is_said_to_be_missing() -> None:
    missing = text_of("CHANGELOG.md").partition("**Not there yet**")[2]
    x = np.zeros((1, 4, 2, 8), np.float32)
    assert umfa.can_run(x, x, x, dropout_p=0.5) == (True, "")
    assert "dropout" not in missing


@pytest.mark.parametrize("name", [*DOCUMENTS, *PAGES])
def test_files_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:python|src|shaders|tests|cmake|\.ci)/[\w./-]+)`", text))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_readme_says_what_hidden_values_do() -> None:
    """tests/core/test_hidden_values.py tests it."""
    assert (
        "NaN and infinities in keys and values that a query does not see do not change its result, "
        "for any kind of mask and on both backends"
    ) in text_of("README.md")


def test_contributing_says_where_a_row_of_the_readme_comes_from() -> None:
    assert "`python -m umfa features --markdown`" in text_of("CONTRIBUTING.md")


def test_the_citation_names_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [umfa.__version__]
