"""Mutation testing, and that the table of covering tests names files that exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import mutate


def test_the_table_names_what_exists() -> None:
    for pattern, (tests, _) in mutate.COVERED.items():
        assert list(mutate.ROOT.glob(pattern)), pattern
        for test in tests:
            assert (mutate.ROOT / test).exists(), test
    assert len(mutate.choose(25, 1, "")) == 25
    assert mutate.choose(25, 1, "") == mutate.choose(25, 1, "")


@pytest.mark.parametrize(
    ("test", "verdict"),
    [
        ("assert True", mutate.SURVIVED),
        ("assert False", "killed by test_it.py::test_it"),
        ("yield", "killed by test_it.py"),  # pytest cannot collect it
    ],
)
def test_the_verdict_on_a_mutant(test: str, verdict: str, tmp_path: Path) -> None:
    assert verdict_on(tmp_path, f"def test_it(): {test}\n", "not slow") == verdict


def test_a_run_without_tests_is_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="pytest ended with 5"):
        verdict_on(tmp_path, "def test_it(): assert False\n", "slow")


def verdict_on(folder: Path, text: str, expression: str) -> str:
    """What becomes of a mutant whose only covering test is `text`."""
    (folder / "test_it.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    mutant = mutate.Mutant(Path("a.h"), 1, "a", "b", ("test_it.py",), expression)
    return mutate.run_tests(folder, folder, mutant)


@pytest.mark.nightly
def test_mutants_are_killed(nightly_seconds: float) -> None:
    script = str(mutate.ROOT / "tools" / "mutate.py")
    seconds = str(8 * nightly_seconds)  # enough for all mutants by default; each takes minutes
    done = subprocess.run(
        [sys.executable, script, "--seconds", seconds],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
