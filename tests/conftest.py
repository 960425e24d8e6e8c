"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import cases
import checks
import frameworks
import umfa
from cases import Case
from checks import Tolerance
from frameworks import Array, Framework
from umfa import _ext


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say once, not once per test function, that a framework is absent.

    pytest folds skips of one place, and takes a fixture's skip to be at the test that asked for it.
    """
    report = yield
    if isinstance(report.longrepr, tuple) and report.longrepr[2].endswith("is not installed"):
        report.longrepr = (frameworks.__file__, 1, report.longrepr[2])
    return report


@pytest.fixture(params=frameworks.NAMES)
def framework(request: pytest.FixtureRequest) -> Framework:
    """Each array library in turn; choose some with ``indirect=True``."""
    return frameworks.load(request.param)


class Result(NamedTuple):
    """What umfa returned, in the caller's framework."""

    out: Any
    lse: Any


class Attend:
    """Calls umfa on tensors of one framework and checks what holds for every call.

    All numerical tests go through here, so this is the one place that will learn about backends:
    the fixture below gets a `backend` parameter, and this class selects it around the call.
    """

    def __init__(self, framework: Framework) -> None:
        self.framework = framework

    def __call__(self, query: Any, key: Any, value: Any, **options: Any) -> Result:
        if isinstance(options.get("alibi_slopes"), np.ndarray):
            options["alibi_slopes"] = self.framework.tensor(options["alibi_slopes"])
        out, lse, probabilities = umfa.flash_attn_func(
            query, key, value, return_attn_probs=True, **options
        )
        assert probabilities is None
        assert isinstance(out, self.framework.array_type)
        assert isinstance(lse, self.framework.array_type)
        assert tuple(out.shape) == (*query.shape[:3], value.shape[3])
        assert tuple(lse.shape) == (query.shape[0], query.shape[2], query.shape[1])
        assert self.framework.dtype_name(out) == self.framework.dtype_name(query)
        assert self.framework.dtype_name(lse) == "float32"
        return Result(out, lse)

    def arrays(self, query: Array, key: Array, value: Array, **options: Any) -> Result:
        """The same from NumPy arrays to NumPy arrays, by way of the framework."""
        tensors = (self.framework.tensor(array) for array in (query, key, value))
        result = self(*tensors, **options)
        return Result(*map(self.framework.numpy, result))

    def case(
        self, case: Case, tolerance: Tolerance | None = None, lse_tolerance: Tolerance = checks.LSE
    ) -> None:
        """Run a case and compare output and log-sum-exp with the reference."""
        result = self.arrays(*cases.inputs(case), **cases.options(case))
        out, lse = cases.expected(case)
        tolerance = tolerance or checks.BASE[case.dtype]
        checks.assert_close(result.out.astype(np.float64), out, tolerance, "out")
        checks.assert_close(result.lse.astype(np.float64), lse, lse_tolerance, "lse")


@pytest.fixture
def attend(framework: Framework) -> Attend:
    """umfa on the tensors of `framework`."""
    return Attend(framework)


@pytest.fixture
def attend_numpy() -> Attend:
    """umfa on NumPy arrays, for tests in which the framework does not matter."""
    return Attend(frameworks.load("numpy"))


@pytest.fixture(autouse=True)
def _settings_stay() -> Iterator[None]:
    """Put process-wide settings back, whatever the test did to them."""
    threads, isa = umfa.get_num_threads(), _ext.cpu_isa()
    yield
    umfa.set_num_threads(threads)
    _ext.set_cpu_isa(isa)


RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """Run a script in a fresh interpreter, with some environment variables set.

    Returns the finished process; a status other than 0 is the caller's to judge. The variables that
    umfa reads are removed first, so that the caller's environment does not decide the test.
    """

    def run(
        script: str, *arguments: str, timeout: float = 120, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            name: text
            for name, text in os.environ.items()
            if not name.startswith("UMFA_") and name != "OMP_NUM_THREADS"
        }
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env=environment | variables,
            cwd=tmp_path,  # away from the checkout: the installed package is tested
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
