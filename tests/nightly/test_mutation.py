"""Mutation testing, and that the table of covering tests names files that exist."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools import mutate


def test_the_table_names_what_exists() -> None:
    for pattern, (tests, _) in mutate.COVERED.items():
        assert list(mutate.ROOT.glob(pattern)), pattern
        for test in tests:
            assert (mutate.ROOT / test).exists(), test
    assert len(mutate.choose(25, 1, "")) == 25
    assert mutate.choose(25, 1, "") == mutate.choose(25, 1, "")


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
