"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

import umfa
from tests import array_libraries, mac
from tests.array_libraries import Framework
from tests.attend import Attend
from tests.metal import emulated
from tools.metal.emulator import Options
from umfa import _ext

METAL, TOOLS = (Path(__file__).parent / name for name in ("metal", "tools"))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("umfa")
    group.addoption(
        "--nightly-seconds", type=float, default=900.0, help="for each test of -m nightly"
    )
    group.addoption(
        "--nightly-seed", type=int, default=secrets.randbits(32), help="else a fresh one"
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    # Worker processes get these options from the main process.
    if "nightly" not in config.option.markexpr:
        return None
    seconds, seed = config.option.nightly_seconds, config.option.nightly_seed
    return f"nightly: {seconds:g} s for each test, --nightly-seed {seed}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say once, not once per test function, that a framework or the GPU is absent.

    pytest folds skips of one place, and takes a fixture's skip to be at the test that asked for it.
    """
    report = yield
    if isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if reason.endswith("is not installed"):
            report.longrepr = (array_libraries.__file__, 1, reason)
        elif mac.is_reason(reason.removeprefix("Skipped: ")):
            report.longrepr = (mac.__file__, 1, reason)
    return report


@pytest.fixture(params=[name for name, _ in _ext.cpu_isas()])
def isa(request: pytest.FixtureRequest) -> str:
    """Each set of CPU kernels that this machine can run, chosen for the test."""
    if not dict(_ext.cpu_isas())[request.param]:
        pytest.skip(f"no {request.param} on this machine")
    _ext.set_cpu_isa(request.param)
    return str(request.param)


@pytest.fixture(params=array_libraries.NAMES)
def framework(request: pytest.FixtureRequest) -> Framework:
    """Each array library in turn; choose some with ``indirect=True``."""
    return array_libraries.load(request.param)


@pytest.fixture(
    params=[
        "cpu",
        "metal-emulated",
        "metal-permuted",
        pytest.param("metal", marks=pytest.mark.gpu),
    ]
)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Who computes; see `Attend`. Tests marked ``cpu_only`` never meet the others.

    Each test on the emulator has a schedule of its own, the same in every run. "metal-permuted" has
    another map of lanes to matrix elements too, and meets the acceptance set only, if it is slow:
    test_any_machine of the kernels' own tests has that map in every run.
    """
    if request.param == "metal" and not mac.IS_MAC:
        # Builds the host: only for tests that need it.
        from tools.metal import double as metal_double
        from tools.metal.double import gpus

        with metal_double.machine(gpus.Emulator()):
            yield request.param
        return
    before = emulated.settings
    emulated.settings = emulated.Settings(
        schedule_seed=zlib.crc32(request.node.nodeid.encode()) | 1,
        options=Options(permute_lanes=request.param == "metal-permuted"),
    )
    yield request.param
    emulated.settings = before


# What may run through the host by default; the rest of the suite is slow, and its kernels are
# those of "metal-emulated".
_HOST_BY_DEFAULT = {
    "test_a20_bhsd_memory_seen_as_bshd",
    "test_a21_slices_of_packed_qkv",
    "test_alibi",
    "test_metal_names_what_it_lacks",
    "test_no_keys",
    "test_no_queries",
    "test_small",
    "test_value_has_its_own_head_dim",
}
_HOST_FRAMEWORKS = {"numpy", "torch"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop pairs that make no sense, CPU-only tests on other backends, and what is slow.

    Tests marked slow or nightly run only where the expression after -m speaks of them: "-m metal"
    leaves them out.

    The emulator takes NumPy arrays. The host takes those of all frameworks in the same way, by
    DLPack: one beside NumPy shows it.
    """
    dropped, need_gpu = [], []
    for item in items:
        runs_kernels = METAL in item.path.parents or TOOLS in item.path.parents
        if runs_kernels:
            item.add_marker(pytest.mark.metal)
        emulates = runs_kernels and item.path.name != "test_plan_forward.py"
        if emulates and not mac.EMULATOR_RUNS:
            item.add_marker(pytest.mark.skip(reason=mac.EMULATOR_REASON))
        parameters = getattr(item, "callspec", None)
        values = parameters.params if parameters else {}
        backend = values.get("backend", "cpu")
        on_gpu = backend == "metal" and mac.IS_MAC
        if on_gpu or item.path.name == "test_gpu_tensors.py":
            need_gpu.append(item)
        if backend == "cpu":
            continue
        if not item.get_closest_marker("metal"):
            item.add_marker(pytest.mark.metal)
        frameworks_of = _HOST_FRAMEWORKS if backend == "metal" else {"numpy"}
        if (
            (not on_gpu and values.get("framework", "numpy") not in frameworks_of)
            or item.get_closest_marker("cpu_only")
            or (backend == "metal-permuted" and not item.path.name.endswith("acceptance.py"))
        ):
            dropped.append(item)
        elif on_gpu:
            continue
        elif not mac.EMULATOR_RUNS:
            item.add_marker(pytest.mark.skip(reason=mac.EMULATOR_REASON))
        elif slow := item.get_closest_marker("slow_emulated"):
            item.add_marker(slow.kwargs.get("tier", "slow"))
        elif backend == "metal-permuted":
            item.add_marker(pytest.mark.slow)
        elif backend == "metal":
            name = getattr(item, "originalname", "")
            if name not in _HOST_BY_DEFAULT or values.get("framework", "numpy") != "numpy":
                item.add_marker(pytest.mark.slow)
    absent = set(dropped)
    _sample_kernel_tests([item for item in items if item not in absent])
    if need_gpu and (reason := mac.missing_gpu()):
        for item in need_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))
    for item in items:
        tiers = [tier for tier in ("nightly", "slow") if item.get_closest_marker(tier)]
        if tiers and tiers[0] not in config.option.markexpr:
            dropped.append(item)
    if dropped:
        config.hook.pytest_deselected(items=list(dict.fromkeys(dropped)))
        gone = set(dropped)
        items[:] = [item for item in items if item not in gone]


def _runs_kernels(item: pytest.Item) -> bool:
    """On the emulator, or through the host on the double."""
    backend = getattr(getattr(item, "callspec", None), "params", {}).get("backend", "")
    own = item.path.parent == METAL and not item.path.name.startswith("test_plan")
    return own or (str(backend).startswith("metal") and not mac.IS_MAC)


def _sample_kernel_tests(items: list[pytest.Item]) -> None:
    """Of a test's parameters on the emulator, the first and a quarter of the others always run.

    Their kernels take half of the run's time to compile. Of what is slow, the first and a tenth of
    the others stay there, and the rest is nightly. A hash chooses, so that no value of one
    parameter is left out in favour of another.
    """
    for tier, share, next_tier in (("", 4, "slow"), ("slow", 10, "nightly")):
        seen = set()
        for item in items:
            of_tier = {mark for mark in ("slow", "nightly") if item.get_closest_marker(mark)}
            if not hasattr(item, "callspec") or not _runs_kernels(item) or of_tier != {tier} - {""}:
                continue
            if item.get_closest_marker("whole"):
                continue
            function = (item.path, getattr(item, "originalname", item.name))
            if function in seen and zlib.crc32((tier + item.name).encode()) % share:
                item.add_marker(next_tier)
            seen.add(function)


@pytest.fixture
def attend(framework: Framework, backend: str) -> Attend:
    """umfa on the tensors of `framework`."""
    return Attend(framework, backend)


@pytest.fixture
def attend_numpy(backend: str) -> Attend:
    """umfa on NumPy arrays, for tests in which the framework does not matter."""
    return Attend(array_libraries.load("numpy"), backend)


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
