"""The first call with some kernels: the CPU runs it while they are compiled."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umfa
from tests.checks import BASE, assert_close
from tests.metal.host.test_self_test import forget
from tests.metal.metal_tensors import MetalTensor
from tests.reference import attention
from tools.metal import double as metal_double
from tools.metal.double import Double, Kernel
from tools.metal.double.gpus import Emulator, Recorder

ROOT = Path(__file__).parents[3]
LARGE = (1, 512, 4, 64)


class SlowCompiler(Recorder):
    """Pipelines are ready when the test sets `free`."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()

    def prepare(self, kernel: Kernel) -> int:
        self.free.wait()
        return super().prepare(kernel)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metal_double.CACHES, str(tmp_path))


@pytest.fixture
def double(recorder: Recorder) -> Iterator[Double]:
    with metal_double.machine(recorder, background_compile="1") as machine:
        yield machine


def call(shape: tuple[int, ...] = LARGE, seqlen_kv: int | None = None, **options: Any) -> str:
    """The backend that ran a call, with a star if kernels were compiled meanwhile."""
    x = np.zeros(shape, np.float16)
    y = x if seqlen_kv is None else np.zeros((shape[0], seqlen_kv, *shape[2:]), np.float16)
    before = umfa.stats()
    umfa.flash_attn_func(x, y, y, **options)
    after = umfa.stats()
    assert (after.cpu_calls - before.cpu_calls) + (after.metal_calls - before.metal_calls) == 1
    ran = "cpu" if after.cpu_calls > before.cpu_calls else "metal"
    return ran + "*" * (after.calls_while_compiling - before.calls_while_compiling)


def test_the_first_call_runs_on_the_cpu(double: Double) -> None:
    before = umfa.stats().pipelines
    assert call() == "cpu*"
    assert [call(), call((2, 600, 4, 64), causal=True)] == ["metal", "metal"], "the same kernel"
    assert call(softcap=5.0) == "cpu*", "another kernel"
    assert call(softcap=7.0) == "metal"
    assert umfa.stats().pipelines - before == 2, "each was compiled once"


def test_the_order_of_calls_decides_and_not_time() -> None:
    """The second call waits, however long compiling takes."""
    gpu = SlowCompiler()
    with metal_double.machine(gpu, background_compile="1"):
        try:
            assert call() == "cpu*"
            assert umfa.backends()[0].device.endswith("; some are being compiled now")
            assert call(softcap=5.0) == "cpu*"
            found: list[str] = []
            second = threading.Thread(target=lambda: found.append(call()))
            second.start()
            second.join(0.2)
            assert not found
        finally:
            gpu.free.set()
        second.join()
        assert found == ["metal"]


def test_some_kernels_of_a_call_are_known(double: Double) -> None:
    """Keys that are split need a kernel more, and the one that merges."""
    few = (64, 1, 4, 128)
    assert call(few, 200) == "cpu*"
    assert call(few, 200) == "metal"
    assert call((1, 1, 4, 128), 20000) == "cpu*"
    assert call((1, 1, 4, 128), 20000) == "metal"


def test_never_where_the_caller_decides(double: Double) -> None:
    assert call(backend="metal") == "metal"
    assert call() == "metal", "that call needed the kernels"
    x = np.zeros(LARGE, np.float16)
    assert umfa.warmup(x, x, x, softcap=5.0)[:3] == ("metal", 1, 1)
    assert call(softcap=5.0) == "metal", "warmup prepared it"
    y = MetalTensor(double, x)
    before = umfa.stats().metal_calls
    umfa.flash_attn_func(y, y, y, return_lse=True)
    assert umfa.stats().metal_calls - before == 1, "tensors on the GPU"


def test_asking_compiles_nothing(double: Double) -> None:
    x = np.zeros(LARGE, np.float16)
    assert umfa.can_run(x, x, x) == (True, "")
    assert call() == "cpu*"


def test_small_and_long_calls(double: Double) -> None:
    assert call((1, 8, 2, 64)) == "cpu", "too small for the GPU"
    assert call((1, 8192, 8, 128)) == "metal", "2.7e11 FLOP: compiling takes less"


def test_off(recorder: Recorder) -> None:
    with metal_double.machine(recorder):
        assert call() == "metal"


def test_another_value_is_an_error(recorder: Recorder) -> None:
    with (
        metal_double.machine(recorder, background_compile="no"),
        pytest.raises(ValueError, match="UMFA_BACKGROUND_COMPILE is wrong; got 'no'; expected"),
    ):
        call()


def test_an_archive_changes_nothing(recorder: Recorder) -> None:
    """What ran where must not depend on earlier processes."""
    switches = {"background_compile": "1", "pipeline_archive": "1"}
    with metal_double.machine(recorder, **switches) as machine:
        for _ in range(2):
            assert call() == "cpu*"
            assert call() == "metal"
            forget(machine)


def test_what_does_not_compile_is_said_by_the_next_call(double: Double) -> None:
    double.fault("pipeline")
    assert call() == "cpu*"
    umfa_idle(double)
    assert call() == "metal", "it compiles now"
    double.fault("pipeline", count=2)
    assert call(softcap=5.0) == "cpu*"
    umfa_idle(double)
    with pytest.raises(RuntimeError, match="Metal could not build the kernel"):
        call(softcap=5.0)


def umfa_idle(double: Double) -> None:
    while umfa.backends()[0].device.endswith("now"):
        pass


def test_the_self_test_runs_in_the_background_too() -> None:
    """Results of either backend are right; a GPU that computes nothing is found out."""
    with metal_double.machine(Recorder(), "1", background_compile="1"):
        assert call() == "cpu*"
        assert call() == "cpu", "the self-test excludes its kernels"


@pytest.mark.slow
def test_results_of_both() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 300, 2, 64)).astype(np.float32) for _ in range(3))
    with metal_double.machine(Emulator(), background_compile="1"):
        before = umfa.stats()
        for _ in range(2):
            out = umfa.flash_attn_func(q, k, v)
            assert_close(out.astype(np.float64), attention(q, k, v)[0], BASE["float32"])
        after = umfa.stats()
    assert after.cpu_calls - before.cpu_calls == after.metal_calls - before.metal_calls == 1


def test_many_threads(double: Double) -> None:
    before = umfa.stats()
    threads = [threading.Thread(target=call_many, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = umfa.stats()
    assert after.calls_while_compiling - before.calls_while_compiling == 4, "one for each kernel"
    assert after.pipelines - before.pipelines == 4


def call_many(number: int) -> None:
    for i in range(9):
        x = np.zeros(LARGE, np.float16)
        umfa.flash_attn_func(x, x, x, softcap=5.0 * (i % 3 > 0), return_lse=(i + number) % 3 > 1)


CHILD = """
import threading
import numpy as np
import umfa
from tools.metal import double as metal_double
from tools.metal.double.gpus import Recorder

with metal_double.machine(Recorder(), "0", background_compile="1"):
    x = np.zeros((1, 512, 4, 64), np.float16)
    umfa.flash_attn_func(x, x, x)
    assert umfa.stats().calls_while_compiling == 1
"""


def test_a_process_may_end_at_once() -> None:
    metal_double.load()
    subprocess.run([sys.executable, "-c", CHILD], cwd=ROOT, check=True, timeout=120)
