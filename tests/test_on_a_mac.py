"""The command that a Mac's owner runs, tried where there is no Mac."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_self_hosted_mac_runs_it() -> None:
    workflow = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    gpu = workflow[workflow.index("\n  gpu:") :]
    assert "self-hosted" in gpu
    assert re.search(r"run: bash \.ci/on-a-mac\b", gpu)
    assert "tests/on_a_mac.py" in (ROOT / ".ci" / "on-a-mac").read_text()


@pytest.mark.skipif(sys.platform == "darwin", reason="it would run")
def test_the_command_asks_first_where_it_is() -> None:
    done = subprocess.run(
        ["bash", ROOT / ".ci" / "on-a-mac"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "it can only be run on a Mac with Apple silicon" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="it says so itself there")
def test_it_says_what_it_could_not_do(tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "on_a_mac.py", "--quick", "--output", report],
        env={**os.environ, "PYTEST_ADDOPTS": "-n 0 -p no:cacheprovider"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, "without a GPU nothing is proven"
    text = report.read_text()
    assert "**No Apple GPU was used: " in text
    # Title, passed, failed, skipped: pytest -m gpu found tests, which pass on the double of Metal.
    rows = re.findall(r"^\| (.+) \| (\d+) \| (\d+) \| (\d+) \| \d+ \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == ["with Metal's validation", "all, without validation"]
    passed = [int(row[1]) + int(row[3]) for row in rows]
    assert 0 < passed[0] < passed[1], "the second run has the slow ones, too"
    assert {row[2] for row in rows} == {"0"}
    assert str(Path.home()) not in text
