"""``.ci/run``: its groups of stages, with stand-ins for every program that it calls."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "run"
CI = (ROOT / ".github" / "workflows" / "ci.yml").read_text()

PROGRAMS = (
    *("apt-get", "cibuildwheel", "clang-format", "cmake", "g++", "mypy", "pip", "pre-commit"),
    *("pytest", "python", "ruff", "validate-pyproject", "zizmor"),
)
RECORD = """#!/bin/sh
echo "$(basename "$0") $*" >>"$CALLS"
case "$(basename "$0") $*" in
*"$FAILS"*)
    # As the worker of pytest does that a sanitizer ends.
    case "$ASAN_OPTIONS" in *log_path=*) echo "a report" >"${ASAN_OPTIONS##*log_path=}.7" ;; esac
    exit 3
    ;;
"python -m venv "*) mkdir -p "$3/bin" && : >"$3/bin/activate" ;;
"python -c from umfa"*) echo portable ;;
"dpkg -x "*) mkdir -p "$3/usr/bin" && cp "$0" "$3/usr/bin/qemu-aarch64-static" ;;
esac
"""


class Run(NamedTuple):
    """A finished run: its status, its stages in order, what it called, what it printed."""

    status: int
    stages: list[str]
    calls: list[str]
    text: str


def run(folder: Path, *arguments: str, fails: str = "nothing") -> Run:
    """Run a copy of the script; the program whose command line contains `fails` ends with 3."""
    repository, programs, calls = folder / "repository", folder / "bin", folder / "calls"
    for name in ("src", "include", "shaders", "tests", "tools", ".ci", "build/asan", "build/tsan"):
        (repository / name).mkdir(parents=True)
    programs.mkdir()
    calls.touch()
    shutil.copy(SCRIPT, repository / ".ci" / "run")
    shutil.copy(ROOT / "README.md", repository)
    stress = [repository / "build" / name / "double_stress" for name in ("asan", "tsan")]
    for path in (*(programs / name for name in (*PROGRAMS, "dpkg")), *stress):
        path.write_text(RECORD)
        path.chmod(0o755)
    done = subprocess.run(
        ["bash", ".ci/run", *arguments],
        cwd=repository,
        env={
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": "python",
            "CALLS": str(calls),
            "FAILS": fails,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    stages = re.findall(r"^==> (.+)$", done.stdout, re.MULTILINE)
    text = done.stdout + done.stderr
    return Run(done.returncode, stages, calls.read_text().splitlines(), text)


def groups() -> list[str]:
    done = subprocess.run(["bash", SCRIPT, "--groups"], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_without_arguments_every_stage_runs_once(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.status == 0, done.text
    assert "CI OK: every stage passed" in done.text
    assert len(set(done.stages)) == len(done.stages)
    titles = re.findall(r'^\s*stage "([^"$]+)"$', SCRIPT.read_text(), re.MULTILINE)
    assert [s for s in done.stages if not s.startswith("README: ")] == titles
    assert sum(s.startswith("README: ") for s in done.stages) == 2
    for call in (
        *("pytest ", "pytest -m slow", "ruff check .", "ruff format --check .", "pre-commit "),
        *("mypy --strict", "zizmor ", "double_stress"),
    ):
        assert any(line.startswith(call) for line in done.calls), call


@pytest.mark.parametrize("group", groups())
def test_a_group_alone_makes_what_it_needs(group: str, tmp_path: Path) -> None:
    done = run(tmp_path, group)
    assert done.status == 0, done.text
    assert f"CI OK: {group} passed" in done.text
    assert any(call.startswith("python -m venv") for call in done.calls)
    # Stages of other groups have not run.
    all_stages = run(tmp_path / "all").stages
    assert 0 < len(done.stages) < len(all_stages)
    assert [s for s in all_stages if s in done.stages] == done.stages


def test_groups_run_in_their_own_order(tmp_path: Path) -> None:
    stages = run(tmp_path, "slow", "readme").stages
    assert stages.index("slow tests") > stages.index("install torch") > 1
    assert stages[1].startswith("README: ")


@pytest.mark.parametrize(
    ("group", "fails", "stage"),
    [
        ("readme", "python -m umfa", "README: pip install . && python -m umfa"),
        ("frameworks", "pip download", "Apple's names, from PyPI"),
        ("frameworks", "python -c from umfa", "acceptance on every instruction set"),
        ("frameworks", "test_acceptance", "acceptance on every instruction set"),
        ("slow", "pytest -m slow", "slow tests"),
        ("lint", "ruff check", "ruff"),
        ("wheel", "validate-pyproject", "packaging for macOS"),
        ("sanitize", "pytest tests/metal/host", "tests under the sanitizers"),
    ],
)
def test_a_failure_ends_the_run(group: str, fails: str, stage: str, tmp_path: Path) -> None:
    """At once, though a command after it would succeed."""
    done = run(tmp_path, group, fails=fails)
    assert done.status != 0, done.text
    assert done.stages[-1] == stage
    assert f"CI FAILED: stage '{stage}' ended with status {done.status}" in done.text


def test_what_a_sanitizer_reports_is_printed(tmp_path: Path) -> None:
    assert "a report" in run(tmp_path, "sanitize", fails="pytest tests/metal/host").text


@pytest.mark.parametrize("arguments", [("lintt",), ("lint", ""), ("lint", "--groups"), ("lint*",)])
def test_an_unknown_group_is_refused_by_name(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(tmp_path, *arguments)
    assert done.status == 2
    assert f"no group of stages '{arguments[-1]}'" in done.text
    assert done.calls == []


def test_ci_runs_every_group_with_time_enough() -> None:
    """The workflow's limits are above the script's own, which says what it was doing."""
    jobs = re.split(r"^  (?=[\w-]+:$)", CI[CI.index("\njobs:") :], flags=re.MULTILINE)[1:]
    stages, readme = (
        next(job for job in jobs if job.startswith(x)) for x in ("stages:", "readme:")
    )
    found = re.search(r"group: \[(.+)\]", stages)
    assert found is not None
    assert {*found[1].split(", "), "readme"} == set(groups())
    assert "bash .ci/run ${{ matrix.group }}" in stages
    assert "bash .ci/run readme" in readme
    limit = re.search(r"^readonly limit=(\d+)", SCRIPT.read_text(), re.MULTILINE)
    assert limit is not None
    for job in jobs:
        minutes = re.search(r"timeout-minutes: (\d+)", job)
        assert minutes is not None
        assert int(minutes[1]) * 60 >= int(limit[1]) + 300, job
