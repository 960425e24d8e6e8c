"""``python -m umfa env``: the facts about this installation that a bug report needs."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from rich.markup import escape

import umfa
from umfa import _ext
from umfa.cli import terminal

T = TypeVar("T")

# Asked for their version only. Importing them could take seconds, or fail, which may be the bug.
PACKAGES = (
    "nanobind-backend",
    "numpy",
    "ml_dtypes",
    "torch",
    "jax",
    "mlx",
    "transformers",
    "diffusers",
)


class Umfa(TypedDict):
    """This package."""

    version: str
    library: str
    compiler: str


class Python(TypedDict):
    """The interpreter."""

    implementation: str
    version: str


class System(TypedDict):
    """The operating system; ``macos`` is None elsewhere."""

    system: str
    release: str
    machine: str
    libc: str | None
    macos: str | None


class Isa(TypedDict):
    """One set of CPU kernels in the library, and whether this CPU can run it."""

    name: str
    usable: bool


class Cpu(TypedDict):
    """The CPU, and how umfa uses it; ``isa`` and ``threads`` are None if that is a problem."""

    model: str
    cores: int
    features: list[str]
    isa: str | None
    isas: list[Isa]
    threads: int | None


class Backend(TypedDict):
    """One backend; ``reason`` says why it is not available, ``device`` what its GPU is."""

    name: str
    available: bool
    reason: str
    device: str


class Report(TypedDict):
    """All of it, as ``env --json`` prints it."""

    umfa: Umfa
    python: Python
    platform: System
    cpu: Cpu
    backends: list[Backend]
    self_tests: list[dict[str, Any]]
    """The fields of `umfa.SelfTest`, for each dtype."""
    tuning: dict[str, Any] | None
    """What `python -m umfa tune` chose, or the defaults; None without a GPU."""
    environment: dict[str, str]
    packages: dict[str, str]
    problems: list[str]  # what umfa refuses to work with, such as a mistyped environment variable


def tidy(text: str) -> str:
    """Take the user's name out of paths: ``site-packages/...`` where that says it, else ``~``."""
    for key in ("platlib", "purelib"):
        folder = Path(sysconfig.get_path(key))
        for spelling in {str(folder), str(folder.resolve())}:
            text = text.replace(spelling + os.sep, folder.name + os.sep)
    home = os.path.expanduser("~")
    if len(home) > 1:  # "/" is the home of some container users
        text = text.replace(home, "~")
    # Someone else's home: under sudo, or with HOME set to a scratch folder.
    return re.sub(r"/(home|Users)/[^/:]+", "~", text)


def cpu_model() -> str:
    """Return the CPU's marketing name, or its architecture where the system does not tell."""
    name = ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if sys.platform == "darwin":
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
        else:
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
            found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
            name = found[1] if found else ""
    return name.strip() or platform.machine()


def cores() -> int:
    """Count the logical cores that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def packages() -> dict[str, str]:
    """Return the versions of those of `PACKAGES` that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def environment() -> dict[str, str]:
    """Return the environment variables that umfa reads."""
    return {
        name: tidy(value)
        for name, value in sorted(os.environ.items())
        if name.startswith("UMFA_") or name == "OMP_NUM_THREADS"
    }


def self_tests() -> list[dict[str, Any]]:
    """Return the outcomes of the GPU self-test, which runs now if it has not run yet."""
    return [
        test._replace(
            faults={name: tidy(fault) for name, fault in test.faults.items()},
            kept=tidy(test.kept),
            not_kept=tidy(test.not_kept),
        )._asdict()
        for test in umfa.self_test()
    ]


def tuning() -> dict[str, Any] | None:
    """Return the GPU's tuned choices and where they come from; None without a GPU."""
    found = _ext.tuning()
    if found is None:
        return None
    return found | {name: tidy(found[name]) for name in ("kept", "ignored")}


def collect() -> Report:
    """Gather the report; a value that umfa cannot tell goes to ``problems``."""
    problems = []

    def attempt(ask: Callable[[], T]) -> T | None:
        try:
            return ask()
        except ValueError as error:
            text = tidy(str(error))
            if text not in problems:  # several questions may meet the same one
                problems.append(text)
            return None

    attempt(lambda: _ext.backend_name("auto"))
    tests = attempt(self_tests) or []  # first, since backends() reports the outcome
    libc = " ".join(platform.libc_ver()).strip()
    return {
        "umfa": {
            "version": umfa.__version__,
            "library": tidy(umfa.get_library()),
            "compiler": _ext.compiler(),
        },
        "python": {
            "implementation": platform.python_implementation(),
            "version": platform.python_version(),
        },
        "platform": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
            "libc": libc or None,
            "macos": platform.mac_ver()[0] or None,
        },
        "cpu": {
            "model": cpu_model(),
            "cores": cores(),
            "features": list(_ext.cpu_features()),
            "isa": attempt(_ext.cpu_isa),
            "isas": [{"name": name, "usable": usable} for name, usable in _ext.cpu_isas()],
            "threads": attempt(umfa.get_num_threads),
        },
        "backends": [
            {
                "name": backend.name,
                "available": backend.available,
                "reason": tidy(backend.reason),
                "device": backend.device,
            }
            for backend in umfa.backends()
        ],
        "self_tests": tests,
        "tuning": attempt(tuning),
        "environment": environment(),
        "packages": packages(),
        "problems": problems,
    }


def backend_rows(report: Report) -> dict[str, str]:
    """One row a backend: available, or why not."""
    rows = {}
    for backend in report["backends"]:
        if backend["available"]:
            device = escape(backend["device"])
            word = "[yellow]available in part[/]" if backend["reason"] else "[green]available[/]"
            text = f"{word}: {device}" if device else word
        else:
            text = f"[yellow]not available[/]: {escape(backend['reason'])}"
        rows[f"{backend['name']} backend"] = text
    return rows


def self_test_rows(report: Report) -> dict[str, str]:
    """When each dtype was tested on the GPU and the outcome; empty without a test."""
    lines = []
    for test in report["self_tests"]:
        faults = test["faults"]
        excluded = [f"{name} excluded: {why}" for name, why in faults.items() if why]
        passed = len(faults) - len(excluded)
        kept = f"in {test['kept']}" if test["kept"] else f"not kept: {test['not_kept']}"
        colour = "yellow" if excluded else "green"
        lines += [
            f"[{colour}]{test['dtype']}: {passed} of {len(faults)} families of kernels pass[/]",
            escape(
                f"  {test['device']}, {test['system']}, {test['when']}, "
                f"{test['pipelines']} pipelines in {test['seconds']:.1f} s, {kept}"
            ),
            *(escape(f"  {line}") for line in excluded),
            *(
                f"  {name} tested again: an earlier process ended during its test"
                for name in test["tried_again"]
            ),
        ]
    if not lines and os.environ.get("UMFA_SELF_TEST") == "0":
        lines = ["off: UMFA_SELF_TEST=0"]
    return {"self-test": "\n".join(lines)} if lines else {}


def tuning_rows(tuned: dict[str, Any] | None) -> dict[str, str]:
    """The choices in use, and what they follow from; empty without a GPU."""
    if tuned is None:
        return {}
    values = (
        f"'auto' uses the GPU from {tuned['worthwhile_flop']:.1e} FLOP, keys are split among "
        f"{tuned['decode_threadgroups_per_core']} threadgroups per core"
    )
    if tuned["tiles"]:
        values += f"; tiles: {', '.join(tuned['tiles'])}"
    if tuned["kept"]:
        source = f"measured {tuned['when']} on {tuned['device']}, {tuned['system']}"
        source += f", in {tuned['kept']}"
    elif tuned["ignored"]:
        source = f"defaults; the record is not used: {tuned['ignored']}"
    else:
        source = "defaults; python -m umfa tune measures"
    return {"tuning": escape("\n  ".join([values, source, *tuned["measured"]]))}


def cpu_rows(report: Report) -> dict[str, str]:
    """The CPU, the kernels in use and the threads."""
    cpu = report["cpu"]
    others = [
        isa["name"] + ("" if isa["usable"] else " (not on this CPU)")
        for isa in cpu["isas"]
        if isa["name"] != cpu["isa"]
    ]
    also = f", also built: {', '.join(others)}" if others else ""
    return {
        "CPU": escape(cpu["model"]),
        "CPU features": escape(" ".join(cpu["features"]) or "none that umfa uses"),
        "CPU kernels": escape(f"{cpu['isa'] or 'none'} in use{also}"),
        "threads": f"{cpu['threads'] or 'none'} of {cpu['cores']} cores",
    }


def problem_rows(report: Report) -> dict[str, str]:
    """Nothing, if all is well."""
    problems = report["problems"]
    return {"problem": f"[red]{escape(chr(10).join(problems))}[/]"} if problems else {}


def rows(report: Report) -> dict[str, str]:
    """The whole report for a reader."""
    about, python, system = report["umfa"], report["python"], report["platform"]
    name = f"macOS {system['macos']}" if system["macos"] else system["system"]
    parts = [name, system["release"], system["machine"], system["libc"] or ""]
    return {
        "umfa": escape(about["version"]),
        "library": escape(about["library"]),
        "compiler": escape(about["compiler"]),
        "Python": escape(f"{python['implementation']} {python['version']}"),
        "platform": escape(" ".join(part for part in parts if part)),
        **cpu_rows(report),
        **backend_rows(report),
        **self_test_rows(report),
        **tuning_rows(report["tuning"]),
        "environment": escape(
            "\n".join(f"{key}={value}" for key, value in report["environment"].items())
            or "no UMFA_* variable, no OMP_NUM_THREADS"
        ),
        "packages": escape("\n".join(f"{key} {v}" for key, v in report["packages"].items())),
        **problem_rows(report),
    }


def run(*, as_json: bool = False) -> int:
    """Print the report."""
    report = collect()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        terminal.print_rows(terminal.console(), rows(report))
    return 0
