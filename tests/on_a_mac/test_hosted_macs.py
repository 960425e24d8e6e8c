"""CI's macOS jobs, modelled here: which tests they collect, and which they skip, and why.

Hosted Macs have an "Apple Paravirtual device": GPU family Apple5, without simdgroup matrices.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import mac
from tests.on_a_mac.fake_mac import PARAVIRTUAL
from umfa import _ext

ROOT = Path(__file__).parents[2]
NO_GPU = f"no Apple GPU that umfa can use: {PARAVIRTUAL}"
# Of tests that no Mac runs, whatever its GPU, that want what only `.ci/run frameworks` fetches, or
# that this machine has no instructions for.
NOT_ON_MACS = {
    *(f"no {isa} on this machine" for isa, usable in _ext.cpu_isas() if not usable),
    *("it would run", "it says so itself there", "reads /proc"),
    "Linux grants the registers of a CPU with AMX on request",
    "UMFA_APPLE_API is not set; see test_apple_names.py",
}


def macos_jobs() -> dict[str, str]:
    """Text of the jobs that run on macOS, as ``file:job``."""
    jobs = {}
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        text = path.read_text()
        parts = re.split(r"^  ([\w-]+):$", text[text.index("\njobs:") :], flags=re.MULTILINE)
        for name, body in zip(parts[1::2], parts[2::2], strict=True):
            if re.search(r"macos", body, re.IGNORECASE):
                jobs[f"{path.name}:{name}"] = body
    return jobs


def of_readme(job: str) -> list[str]:
    assert "bash .ci/run readme" in job
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"<!-- ci: run -->\n```sh\n(.+)\n```", text)
    words = shlex.split(commands[1].split("&&")[1])
    assert words[0] == "pytest"
    return words[1:]


def of_cibuildwheel(job: str) -> list[str]:
    assert "cibuildwheel --platform macos" in job
    text = (ROOT / "pyproject.toml").read_text()
    command = re.search(r'^test-command = "(.+)"$', text, re.MULTILINE)
    assert command is not None
    words = shlex.split(command[1].replace("{project}", str(ROOT)))
    assert words[0] == "pytest"
    return words[1:]


# What each job asks of pytest; of those that run none, None.
JOBS: dict[str, Callable[[str], list[str]] | None] = {
    "ci.yml:readme": of_readme,
    "wheels.yml:build": of_cibuildwheel,
    "wheels.yml:hosted-gpu": None,  # .ci/on-a-mac --hosted
    "wheels.yml:gpu": None,  # .ci/on-a-mac: test_a_real_gpu
}


class Item(NamedTuple):
    """A collected test."""

    name: str
    backend: str | None
    framework: str | None
    marks: list[str]
    skipped: list[str]

    @property
    def folder(self) -> str:
        return self.name.removeprefix("tests/").split("::")[0].split("/")[0]

    @property
    def is_emulated(self) -> bool:
        if self.folder == "on_a_mac":
            return "metal" in self.marks
        return self.folder in ("metal", "tools") and "test_plan_forward.py" not in self.name

    @property
    def on_gpu(self) -> bool:
        return self.backend == "metal" or "test_gpu_tensors.py" in self.name


def collect(folder: Path, *arguments: str) -> list[Item]:
    report = folder / "report.json"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "UMFA_"))}
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "tests.on_a_mac.fake_mac",
                "--fake-mac",
                str(report),
            ),
            *("--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments),
        ],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "error" not in done.stdout.splitlines()[-1], done.stdout[-3000:]
    return [Item(**entry) for entry in json.loads(report.read_text())]


def check_hosted(items: list[Item]) -> None:
    """On a Mac without a usable GPU: all that needs one is skipped by reason, the rest runs."""
    for item in items:
        because = set(item.skipped) - NOT_ON_MACS
        expected: set[str] = set()
        if item.on_gpu:
            expected = {NO_GPU}
        elif item.is_emulated or item.backend in ("metal-emulated", "metal-permuted"):
            expected = {mac.EMULATOR_REASON}
        assert because == expected, item


def run_in(items: list[Item]) -> set[str]:
    """Folders, and files beside them, of which something runs."""
    return {item.folder for item in items if not item.skipped}


ALWAYS = {
    *("bench", "cli", "core", "cpu", "frameworks", "functional", "on_a_mac", "packaging"),
    *("repository", "test_reference.py"),
}


def test_every_macos_job_is_modelled() -> None:
    assert set(macos_jobs()) == set(JOBS)


@pytest.mark.slow
def test_the_readme_on_a_hosted_mac(tmp_path: Path) -> None:
    arguments = of_readme(macos_jobs()["ci.yml:readme"])
    items = collect(tmp_path, *arguments)
    check_hosted(items)
    assert run_in(items) >= ALWAYS | {"metal"}, "the planner is tested there, too"
    reasons = {reason for item in items for reason in item.skipped}
    assert reasons - NOT_ON_MACS == {NO_GPU, mac.EMULATOR_REASON}
    assert not any("slow" in item.marks for item in items)


@pytest.mark.slow
def test_the_wheel_on_a_hosted_mac(tmp_path: Path) -> None:
    arguments = of_cibuildwheel(macos_jobs()["wheels.yml:build"])
    items = collect(tmp_path, *arguments)
    check_hosted(items)
    assert run_in(items) >= ALWAYS
    assert {item.backend for item in items} == {"cpu", None}
    assert not any({"slow", "gpu", "metal"} & set(item.marks) for item in items)
    assert {reason for item in items for reason in item.skipped} <= NOT_ON_MACS


@pytest.mark.slow
def test_a_real_gpu(tmp_path: Path) -> None:
    """A Mac of one's own, with the README's command: nothing is skipped for want of a GPU."""
    items = collect(tmp_path, "--fake-gpu")
    on_gpu = [item for item in items if item.on_gpu]
    assert len(on_gpu) > 1000
    assert {item.framework for item in on_gpu} >= {"numpy", "torch", "jax", "mlx"}
    assert {item.folder for item in on_gpu} >= {"core", "functional", "frameworks"}
    assert not any(item.skipped for item in on_gpu)
    for item in items:
        reasons = set(item.skipped) - NOT_ON_MACS
        is_emulated = item.is_emulated or item.backend in ("metal-emulated", "metal-permuted")
        assert reasons == ({mac.EMULATOR_REASON} if is_emulated else set()), item


@pytest.mark.parametrize("value", ["yes", "0"])
def test_the_variable_takes_one_value(value: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from tests import mac"],
        env={**os.environ, "UMFA_TEST_PRETEND_MAC": value, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"UMFA_TEST_PRETEND_MAC is unknown; got '{value}'; expected '1'" in done.stderr


def test_a_pretended_mac_is_green_and_says_why(tmp_path: Path) -> None:
    """The suite runs as on a Mac without a usable GPU: tests of every kind, by reason."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider"),
            *("tests/frameworks/test_gpu_tensors.py", "tests/core/test_backend.py"),
            *("tests/metal/test_decode_kernel.py", "tests/core/test_extremes.py"),
        ],
        cwd=ROOT,
        env={**os.environ, "UMFA_TEST_PRETEND_MAC": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "failed" not in done.stdout
    skips = re.findall(r"^SKIPPED \[(\d+)\] (\S+): (.+)$", done.stdout, re.MULTILINE)
    reasons = {reason for _, _, reason in skips if not reason.endswith("is not installed")}
    no_gpu = {reason for reason in reasons if reason.startswith("no Apple GPU that umfa can use: ")}
    assert len(no_gpu) == 1
    assert reasons - no_gpu - NOT_ON_MACS == {mac.EMULATOR_REASON}
    places = {place.split(":")[0] for _, place, reason in skips if reason in reasons - NOT_ON_MACS}
    assert places == {"tests/mac.py"}, "folded, not one line a test"
