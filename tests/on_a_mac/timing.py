"""Runs the tests that use the GPU, measures, and writes the report of docs/on-a-mac.md.

python tests/on_a_mac.py [--output FILE] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import umfa

ROOT = Path(__file__).parents[1]
SECONDS = 0.5  # of timing, for each shape and backend

# Metal's own checks: of calls, and of every memory access of a kernel.
VALIDATION = {"MTL_DEBUG_LAYER": "1", "MTL_SHADER_VALIDATION": "1"}

# (batch, seqlen, heads, head_dim); a call takes 4 * batch * heads * seqlen**2 * head_dim FLOP.
SMALL = [(1, n, 8, 64) for n in (16, 32, 64, 96, 128, 192, 256, 384, 512)]
LARGE = [(1, 1024, 16, 64), (1, 1536, 24, 128), (1, 4096, 8, 128), (1, 8192, 8, 128)]


@dataclass
class Tests:
    """One run of pytest."""

    title: str
    status: int
    passed: int
    failed: int
    skipped: int
    seconds: float
    failures: list[str]


def run_tests(title: str, environment: dict[str, str], arguments: list[str]) -> Tests:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        begin = time.monotonic()
        process = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            check=False,
        )
        seconds = time.monotonic() - begin
        if not report.exists():  # the process died
            return Tests(title, process.returncode, 0, 0, 0, seconds, ["no report: pytest died"])
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
        failures = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        skipped = int(suite.get("skipped", 0))
        passed = int(suite.get("tests", 0)) - skipped - len(failures)
        return Tests(title, process.returncode, passed, len(failures), skipped, seconds, failures)


def seconds_of(shape: tuple[int, ...], dtype: type, backend: str) -> tuple[float, float]:
    """Median time of a call, and the GPU's own share of it."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(3))
    umfa.flash_attn_func(q, k, v, backend=backend)  # builds pipelines, starts threads
    times, before = [], umfa.stats()
    while sum(times) < SECONDS or len(times) < 3:
        begin = time.perf_counter()
        umfa.flash_attn_func(q, k, v, backend=backend)
        times.append(time.perf_counter() - begin)
    gpu = (umfa.stats().gpu_seconds - before.gpu_seconds) / len(times)
    return statistics.median(times), gpu


def flop(shape: tuple[int, ...]) -> float:
    batch, seqlen, heads, head_dim = shape
    return 4.0 * batch * heads * seqlen**2 * head_dim


def timings(shapes: list[tuple[int, int, int, int]], dtype: type) -> list[str]:
    lines = [
        "| batch x seqlen x heads x head_dim | MFLOP | CPU ms | Metal ms | of which GPU ms "
        "| GPU TFLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    for shape in shapes:
        cpu, _ = seconds_of(shape, dtype, "cpu")
        metal, gpu = seconds_of(shape, dtype, "metal")
        rate = flop(shape) / gpu * 1e-12 if gpu > 0 else float("nan")
        name = " x ".join(map(str, shape))
        lines.append(
            f"| {name} | {flop(shape) * 1e-6:.1f} | {cpu * 1e3:.3f} | {metal * 1e3:.3f} "
            f"| {gpu * 1e3:.3f} | {rate:.2f} |"
        )
    return lines


def output_of(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "not there"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip() or f"status {done.returncode}"


def describe() -> list[str]:
    environment = output_of(sys.executable, "-m", "umfa", "env", "--json")
    return [
        "## The machine",
        "",
        f"* {platform.platform()}",
        f"* Metal compiler: {output_of('xcrun', 'metal', '--version').splitlines()[0]}",
        "",
        "```json",
        json.dumps(json.loads(environment), indent=1),
        "```",
        "",
    ]


def describe_tests(runs: list[Tests]) -> list[str]:
    lines = ["## Tests", "", "| | passed | failed | skipped | seconds |", "|---|---|---|---|---|"]
    lines += [
        f"| {r.title} | {r.passed} | {r.failed} | {r.skipped} | {r.seconds:.0f} |" for r in runs
    ]
    for run in runs:
        lines += ["", f"Failed, {run.title}:", *(f"* `{name}`" for name in run.failures[:50])] * (
            bool(run.failures)
        )
    return [*lines, ""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "umfa-on-a-mac.md")
    parser.add_argument("--quick", action="store_true", help="a few tests only, to try the script")
    arguments = parser.parse_args()

    metal = umfa.backends()[0]
    print(f"Metal: {metal.device or metal.reason}")
    select = ["-m", "gpu and not slow", *(["-k", "test_no_keys"] if arguments.quick else [])]
    everything = [
        "-m",
        "gpu and (slow or not slow)",
        *(["-k", "test_no_keys"] if arguments.quick else []),
    ]
    runs = [
        run_tests("with Metal's validation", VALIDATION, select),
        run_tests("all, without validation", {}, everything),
    ]
    lines: list[Any] = ["# umfa on a Mac", ""]
    if not metal.available:
        lines += [f"**No Apple GPU was used: {metal.reason}.**", ""]
    lines += [*describe(), *describe_tests(runs)]
    if metal.available and not arguments.quick:
        lines += [
            "## Where the GPU begins to pay (float32, NumPy)",
            "",
            "`worthwhile_flop` in src/metal/backend.mm should be where the columns cross.",
            "",
            *timings(SMALL, np.float32),
            "",
            "## Large (float16, NumPy)",
            "",
            *timings(LARGE, np.float16),
            "",
            f"`{umfa.stats()}`",
            "",
        ]
    arguments.output.write_text("\n".join(lines))
    print(f"wrote {arguments.output}")
    return 0 if metal.available and all(run.status == 0 for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
