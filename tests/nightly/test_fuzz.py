"""Random bad arguments to every public function, through Python and through C; see fuzz.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import umfa
from tests.nightly import fuzz
from umfa import fa3, fa4

ROOT = Path(__file__).parents[2]


def test_no_function_is_left_out() -> None:
    names = {function.__name__ for function in fuzz.FUNCTIONS}
    others = {"backends", "get_include", "get_library", "get_num_threads", "set_num_threads"}
    others |= {
        "stats",
        "self_test",
        "BackendInfo",
        "SelfTest",
        "Stats",
        "Left",
        "UnsupportedError",
        "Warmup",
        "warmup",
        "HINTS",
        "QuantizedTensor",
        "quantize",
        "quantized_attention",
        "sageattn",
        "suggest_precision",
    }
    others |= {"get_scheduler_metadata"}  # accepts anything and returns None
    assert {*umfa.__all__, *fa3.__all__, *fa4.__all__} == names | others


@pytest.mark.parametrize("what", ["python", "c"])
def test_some_calls(what: str, tmp_path: Path) -> None:
    """One second in every run, with a fixed seed."""
    run(what, 0, 1, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("what", ["python", "c"])
def test_fuzz(what: str, nightly_seed: int, nightly_seconds: float, tmp_path: Path) -> None:
    run(what, nightly_seed, nightly_seconds, tmp_path)


def run(what: str, seed: int, seconds: float, folder: Path) -> None:
    """Runs in a separate process. After a crash, the progress file has the number of the call."""
    progress = folder / "progress"
    command = [sys.executable, "-W", "ignore", "-m", "tests.nightly.fuzz", what]
    command += ["--seed", str(seed), "--seconds", str(seconds), "--progress", str(progress)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    number = progress.read_text() if progress.exists() else "none"
    print(done.stdout)
    assert done.returncode == 0, (
        f"{' '.join(command[4:8])} ended with {done.returncode} at call {number}:\n"
        f"{done.stdout[-4000:]}{done.stderr[-4000:]}"
    )
