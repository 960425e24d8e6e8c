"""The stages, in their order, and how one runs in a process of its own."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tests.on_a_mac.part import Part

# Statuses of a stage's process.
GOOD, BAD, WRONG = 0, 1, 3


class Stage(NamedTuple):
    """A part of the report: `module`:`function`, in at most `seconds`."""

    name: str
    title: str
    target: str
    seconds: float


ABOUT = Stage("about", "The machine", "tests.on_a_mac.about:run", 300)
COMPILE = Stage("compile", "Every kernel, compiled", "tests.on_a_mac.compile:run", 3600)
LANES = Stage("lanes", "Lanes of 8x8 matrices", "tests.on_a_mac.lanes:run", 300)
ROWS = Stage("rows", "Kernels without matrices, run without umfa", "tests.on_a_mac.rows:run", 300)
SELF_TEST = Stage("self-test", "umfa's self-test", "tests.on_a_mac.self_test:run", 900)
SMOKE = Stage("smoke", "A small call of everything", "tests.on_a_mac.smoke:run", 1800)
VALIDATED = Stage(
    "validated", "Tests, with Metal's validation", "tests.on_a_mac.suite:run_validated", 4 * 3600
)
EVERYTHING = Stage(
    "everything", "All tests, without validation", "tests.on_a_mac.suite:run_everything", 4 * 3600
)
TIMING = Stage("timing", "Times", "tests.on_a_mac.timing:run", 1800)

OWN = [ABOUT, COMPILE, LANES, ROWS, SELF_TEST, SMOKE, VALIDATED, EVERYTHING, TIMING]
# Hosted Macs have no GPU for the rest.
HOSTED = [ABOUT, COMPILE, LANES, ROWS]


def command(stage: Stage, part: Path, *, quick: bool, double: bool) -> list[str]:
    """What runs a stage, from any directory that has the repository on its path."""
    flags = [*(["--quick"] if quick else []), *(["--on-the-double"] if double else [])]
    return [
        sys.executable,
        "-m",
        "tests.on_a_mac",
        "--stage",
        stage.target,
        "--part",
        str(part),
        *flags,
    ]


def gpu_of(double: bool, target: str) -> Any:
    """The double's machine, if it is wanted. Tests bring their own."""
    if not double or target.startswith("tests.on_a_mac.suite:"):
        return contextlib.nullcontext()
    from tools.metal import double as metal_double
    from tools.metal.double import gpus

    return metal_double.machine(gpus.Emulator(), os.environ.get("UMFA_SELF_TEST", "0"))


def run_here(target: str, part: Path, *, quick: bool, double: bool) -> int:
    """Run a stage in this process; its status."""
    module, function = target.split(":")
    written = Part(part)
    with gpu_of(double, target):
        getattr(importlib.import_module(module), function)(written, quick=quick)
    if written.wrong:
        return WRONG
    return BAD if written.failures else GOOD
