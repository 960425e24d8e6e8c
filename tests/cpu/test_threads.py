"""Threads: how many there are, who may call, and what fork leaves behind."""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import umfa
from tests import cases
from tests.cases import Case, normal
from tests.checks import BASE, assert_close, assert_same_bits

if TYPE_CHECKING:
    from tests.attend import Attend
    from tests.conftest import RunPython

PRINT_THREADS = """
import numpy as np, umfa
x = np.ones((1, 64, 4, 8), np.float32)
assert np.allclose(umfa.flash_attn_func(x, x, x), 1)
print(umfa.get_num_threads())
"""


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({"UMFA_NUM_THREADS": "1"}, 1),
        ({"UMFA_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "3", "UMFA_NUM_THREADS": "2"}, 2),
        ({"OMP_NUM_THREADS": "3,2"}, 3),  # OpenMP's form for nested levels: the outermost counts
        ({"OMP_NUM_THREADS": "3 ,2"}, 3),
        ({"OMP_NUM_THREADS": " 3 "}, 3),
        ({"OMP_NUM_THREADS": "99999"}, 1024),
        ({"UMFA_NUM_THREADS": " 3 "}, 3),
    ],
    ids=str,
)
def test_environment_sets_the_number_of_threads(
    variables: dict[str, str], threads: int, run_python: RunPython
) -> None:
    process = run_python(PRINT_THREADS, **variables)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == [str(threads)]


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "99999999999999999999", "2 4"])
def test_a_senseless_environment_is_an_error_that_says_so(text: str, run_python: RunPython) -> None:
    process = run_python(PRINT_THREADS, UMFA_NUM_THREADS=text)
    assert process.returncode == 1, process.stdout  # an exception, not a signal
    last_line = process.stderr.strip().splitlines()[-1]
    assert "ValueError" in last_line
    assert "UMFA_NUM_THREADS" in last_line
    assert text in last_line


def test_an_unknown_instruction_set_in_the_environment_is_an_error(run_python: RunPython) -> None:
    process = run_python(PRINT_THREADS, UMFA_CPU_ISA="z80")
    assert process.returncode == 1, process.stdout
    last_line = process.stderr.strip().splitlines()[-1]
    assert "UMFA_CPU_ISA" in last_line
    assert "z80" in last_line


def test_set_num_threads() -> None:
    for threads in (1, 4, 2):
        umfa.set_num_threads(threads)
        assert umfa.get_num_threads() == threads


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1, ValueError), (10**9, ValueError), (2**80, (ValueError, OverflowError)),
     (1.5, TypeError), ("2", TypeError), (None, TypeError)],
    ids=repr,
)  # fmt: skip
def test_set_num_threads_refuses(value: Any, error: Any) -> None:
    before = umfa.get_num_threads()
    with pytest.raises(error) as caught:
        umfa.set_num_threads(value)
    assert str(caught.value).startswith("[umfa.set_num_threads] ")
    assert str(value) in str(caught.value)
    assert umfa.get_num_threads() == before


CASE = Case((2, 4, 150, 170, 48), "float32", heads_k=2, options=(("causal", True),))


def test_small_calls_wake_no_threads(run_python: RunPython) -> None:
    """Waking a thread costs more than a small call; a large one is worth it."""
    run = run_python(
        """
import os, sys
os.environ["UMFA_NUM_THREADS"] = "3"
import numpy as np, umfa
def threads():
    return len(os.listdir("/proc/self/task"))
def call(length):
    x = np.ones((1, length, 2, 16), np.float32)
    umfa.flash_attn_func(x, x, x)
if not os.path.isdir("/proc/self/task"):
    print("skip"); sys.exit()
before = threads()
for length in (1, 7, 40, 64): call(length)
assert threads() == before, "a small call woke threads"
call(2048)
assert threads() == before + 2, "a large call did not"
print("done")
"""
    )
    assert run.returncode == 0, run.stderr
    if run.stdout.strip() == "skip":
        pytest.skip("no /proc")


@pytest.mark.slow_emulated
def test_many_python_threads_at_once(attend_numpy: Attend) -> None:
    """Different problems at the same time, each with the bits it has alone."""
    problems = [
        Case((1, 2 + i % 3, 60 + 17 * i, 90 + 11 * i, 16 * (1 + i % 4)), dtype, seed=i)
        for i, dtype in enumerate(["float32", "float16", "bfloat16"] * 2)
    ]
    alone = [attend_numpy(*cases.inputs(problem)) for problem in problems]
    exact = [cases.expected(problem)[0] for problem in problems]
    start = threading.Barrier(8)

    def work(worker: int) -> None:
        start.wait()
        for turn in range(30):
            i = (worker + turn) % len(problems)
            result = attend_numpy(*cases.inputs(problems[i]))
            bits = f"u{result.out.dtype.itemsize}"
            assert_same_bits(result.out.view(bits), alone[i].out.view(bits))
            assert_close(result.out.astype(np.float64), exact[i], BASE[problems[i].dtype])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


@pytest.mark.cpu_only  # no other backend has these threads
def test_threads_come_and_go_while_others_compute(attend_numpy: Attend) -> None:
    """set_num_threads during a call must neither break the call nor wait forever."""
    arrays = cases.inputs(CASE)
    expected = attend_numpy(*arrays, causal=True).out
    done = threading.Event()

    def change() -> None:
        threads = 1
        while not done.is_set():
            threads = threads % 4 + 1
            umfa.set_num_threads(threads)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(100):
            out = attend_numpy(*arrays, causal=True).out
            assert_same_bits(out.view("u4"), expected.view("u4"))
    finally:
        done.set()
        changer.join()


def test_other_python_threads_run_during_a_call() -> None:
    """The GIL is released: a clock in another thread goes on ticking."""
    arrays = [normal((1, 3000, 4, 64), seed=i) for i in range(3)]
    umfa.set_num_threads(1)  # leaves a core for the clock
    ticks: list[float] = []
    done = threading.Event()

    def clock() -> None:
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    ticker = threading.Thread(target=clock)
    ticker.start()
    try:
        begin = time.perf_counter()
        umfa.flash_attn_func(*arrays)
        end = time.perf_counter()
    finally:
        done.set()
        ticker.join()
    # Ticks well inside the call: those at its edges could fall before the GIL is taken.
    margin = (end - begin) / 10
    assert end - begin > 0.02, "too short a call to tell anything; make the problem larger"
    inside = [t for t in ticks if begin + margin < t < end - margin]
    assert len(inside) >= 3, f"{len(inside)} ticks in {end - begin:.3f} s"


FORK = """
import faulthandler, os, signal, sys, threading, time, warnings
import numpy as np, umfa

warnings.simplefilter("ignore")  # newer Pythons warn about fork in any process with threads
faulthandler.dump_traceback_later(60, exit=True)
rng = np.random.default_rng(0)
arrays = [rng.standard_normal((2, 200, 4, 32), dtype=np.float32) for _ in range(3)]
umfa.set_num_threads(4)
expected = umfa.flash_attn_func(*arrays, causal=True)

def fork_and_compare():
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # a child whose pool has no threads would wait forever
        status = 1
        try:
            same = all(
                np.array_equal(umfa.flash_attn_func(*arrays, causal=True), expected)
                for _ in range(3)
            )
            umfa.set_num_threads(2)
            same = same and np.array_equal(umfa.flash_attn_func(*arrays, causal=True), expected)
            status = 0 if same else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"child: exit code {os.waitstatus_to_exitcode(status)}"
    assert np.array_equal(umfa.flash_attn_func(*arrays, causal=True), expected)
"""

FORK_IDLE = FORK + "\nfor _ in range(5):\n    fork_and_compare()\n"

FORK_BUSY = (
    FORK
    + """
done = threading.Event()
failures = []

def keep_busy():
    while not done.is_set():
        if not np.array_equal(umfa.flash_attn_func(*arrays, causal=True), expected):
            failures.append("wrong result while forking")

threads = [threading.Thread(target=keep_busy) for _ in range(2)]
for thread in threads:
    thread.start()
try:
    for _ in range(20):
        fork_and_compare()
finally:
    done.set()
    for thread in threads:
        thread.join()
assert not failures, failures
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("script", [FORK_IDLE, FORK_BUSY], ids=["idle", "while computing"])
def test_fork(script: str, run_python: RunPython) -> None:
    """Data loaders fork. The child has none of the parent's threads, and must not wait for them."""
    process = run_python(script, timeout=90)
    assert process.returncode == 0, process.stderr


MULTIPROCESSING = """
import multiprocessing, sys
import numpy as np, umfa

def work(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, 100, 4, 16), dtype=np.float32)
    return umfa.flash_attn_func(x, x, x)

if __name__ == "__main__":
    here = [work(i) for i in range(4)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        there = pool.map(work, range(4))
    assert all(map(np.array_equal, here, there))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no fork")
def test_multiprocessing_pool(run_python: RunPython) -> None:
    process = run_python("import warnings; warnings.simplefilter('ignore')\n" + MULTIPROCESSING)
    assert process.returncode == 0, process.stderr


def test_interpreter_ends_while_threads_compute(run_python: RunPython) -> None:
    """A daemon thread inside a call when the interpreter shuts down must not crash it.

    Up to CPython 3.13, such a thread is unwound when it asks for the GIL back, and unwinding
    through a C++ destructor terminates the process.
    """
    process = run_python(
        """
import threading, time
import numpy as np, umfa

x = np.ones((1, 500, 4, 64), np.float32)

def forever():
    while True:
        umfa.flash_attn_func(x, x, x)

for _ in range(3):
    threading.Thread(target=forever, daemon=True).start()
time.sleep(0.3)
""",
        timeout=60,
    )
    assert process.returncode == 0, f"{process.returncode}: {process.stderr}"
