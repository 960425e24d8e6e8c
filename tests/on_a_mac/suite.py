"""Stages: the tests that use the GPU, a process for each file: a crash loses no other's results."""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from tests.on_a_mac.part import Part
from tests.on_a_mac.process import run_limited

ROOT = Path(__file__).parents[2]
# Metal's own checks: of calls, and of every memory access of a kernel.
VALIDATION = {"MTL_DEBUG_LAYER": "1", "MTL_SHADER_VALIDATION": "1"}
VALIDATED, EVERYTHING = "gpu and not slow", "gpu and (slow or not slow)"
TEST_SECONDS, FILE_SECONDS = 300, 3600
QUICK = ("tests/core/test_values.py", "-k", "test_no_keys")


class Result(NamedTuple):
    """What became of the tests of a file."""

    passed: int
    skipped: int
    failures: dict[str, str]  # test -> text in full


def files_with(expression: str, quick: bool) -> collections.Counter[str]:
    """How many tests each file has for an expression of pytest's -m."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0"),
            *("-m", expression, *(QUICK if quick else ())),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"^(tests/\S+?\.py)::", done.stdout, re.MULTILINE)
    if not found:
        raise RuntimeError(f"no tests: {done.stdout}{done.stderr}")
    return collections.Counter(found)


def parse(report: Path) -> Result:
    """A JUnit file."""
    failures, skipped, passed = {}, 0, 0
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        bad = case.find("failure")
        bad = bad if bad is not None else case.find("error")
        if bad is not None:
            name = f"{case.get('classname')}::{case.get('name')}"
            failures[name] = f"{bad.get('message') or ''}\n\n{bad.text or ''}"
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return Result(passed, skipped, failures)


def time_limit() -> list[str]:
    """Of a single test: a GPU that hangs ends one worker, and the next test gets another."""
    if importlib.util.find_spec("pytest_timeout") is None:
        return []
    return [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]


def message_of(text: str) -> str:
    """What failures have in common: the error, without the test's own lines."""
    errors = re.findall(r"^E\s+(.+)$", text, re.MULTILINE)
    return "\n".join(errors) or text


def run_tests(part: Part, expression: str, environment: dict[str, str], quick: bool) -> None:
    expected = files_with(expression, quick)
    if not time_limit():
        part.write("pytest-timeout is not installed: no limit for a single test.", "")
    part.write("| file | passed | failed | skipped | lost | seconds |", "|---|---|---|---|---|---|")
    grouped: dict[str, list[tuple[str, str]]] = {}
    passed = 0
    for file, count in sorted(expected.items()):
        with tempfile.TemporaryDirectory() as folder:
            report, log = Path(folder) / "report.xml", Path(folder) / "log"
            begin = time.monotonic()
            outcome = run_limited(
                [
                    *(sys.executable, "-m", "pytest", file, "-q", "-n", "2", "-m", expression),
                    *(f"--junitxml={report}", *time_limit(), *(QUICK[1:] if quick else ())),
                ],
                log,
                FILE_SECONDS,
                {**os.environ, **environment},
                ROOT,
            )
            seconds = time.monotonic() - begin
            result = parse(report) if report.exists() else Result(0, 0, {})
            bad = len(result.failures)
            lost = count - result.passed - result.skipped - bad
            part.write(
                f"| {file} | {result.passed} | {bad} | {result.skipped} | {lost} | {seconds:.0f} |"
            )
            part.failures += bad
            passed += result.passed
            for name, text in result.failures.items():
                grouped.setdefault(message_of(text), []).append((name, text))
            if lost > 0 or (outcome.status != 0 and bad == 0):
                grouped.setdefault(outcome.words, []).append((file, outcome.tail))
                part.failures += 1
    if not passed:
        part.fail("No test ran", "all were skipped, failed or lost; see the reasons above")
    for message, tests in grouped.items():
        names = [f"`{name}`" for name, _ in tests]
        part.fail(f"{len(tests)} failed alike: {', '.join(names)}", f"{message}\n\n{tests[0][1]}")


def run_validated(part: Part, *, quick: bool) -> None:
    run_tests(part, VALIDATED, VALIDATION, quick)


def run_everything(part: Part, *, quick: bool) -> None:
    run_tests(part, EVERYTHING, {}, quick)
