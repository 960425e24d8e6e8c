"""``python -m umfa tune``: it picks what is fastest, and a record that is not right is not used."""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umfa
from tests.cases import DTYPES, Case, expected, inputs
from tests.checks import BASE, assert_close
from tests.metal.host.test_self_test import forget
from tools.metal import double as metal_double
from tools.metal.double import Double, Kernel
from tools.metal.double.gpus import Emulator, Recorder, memory
from umfa import _ext
from umfa.cli import env, tune

ROOT = Path(__file__).parents[3]
BUDGET = argparse.Namespace(seconds=100.0)


class Timed(Recorder):
    """A GPU whose kernels take the planted time."""

    def __init__(self, seconds: Callable[[Kernel], float]) -> None:
        super().__init__()
        self.seconds = seconds

    def run(self, kernel: Kernel) -> None:
        time.sleep(self.seconds(kernel))


class Clocked(Recorder):
    """A GPU whose kernels take the planted time by a clock of its own: sleeping is not exact."""

    def __init__(self, time_of: Callable[[Kernel], float]) -> None:
        super().__init__()
        self.time_of = time_of
        self.clock = 0.0

    def run(self, kernel: Kernel) -> None:
        super().run(kernel)
        self.clock += self.time_of(kernel)

    def seconds(self, call: Callable[[], Any]) -> float:
        before = self.clock
        call()
        return self.clock - before


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(metal_double.CACHES, str(tmp_path))
    monkeypatch.setattr(tune, "CALLS", 3)
    monkeypatch.setattr(tune, "TILED", (1, 40, 1))
    return tmp_path / "umfa" / "tuning.txt"


@pytest.fixture
def double(recorder: Recorder) -> Iterator[Double]:
    with metal_double.machine(recorder, tune="1") as machine:
        yield machine


def splits(kernel: Kernel) -> int:
    return kernel.threadgroups[0]


def planted(best: int) -> Callable[[Kernel], float]:
    """Decoding is fastest with `best` splits of 8 key heads on 8 cores; others take 3 ms more."""
    return lambda kernel: (
        0.001 + 0.003 * (splits(kernel) != best) if "decode_f16" in kernel.name else 0.0
    )


@pytest.mark.parametrize("count", [2, 4, 6])
def test_the_fastest_split_is_chosen(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 key heads on 8 cores: as many splits as threadgroups per core."""
    monkeypatch.setattr(tune, "LENGTHS", (64,))
    gpu = Clocked(planted(count))
    monkeypatch.setattr(tune, "gpu_seconds", gpu.seconds)
    with metal_double.machine(gpu, tune="1"):
        assert tune.run(BUDGET) == 0
        assert _ext.tuning()["decode_threadgroups_per_core"] == count
        q, k = np.ones((1, 1, 32, 128), np.float16), np.ones((1, 8192, 8, 128), np.float16)
        assert split_count(q, k) == count


def split_count(q: Any, k: Any) -> int:
    recorder = Recorder()
    with metal_double.machine(recorder, tune="1"):
        umfa.flash_attn_func(q, k, k, backend="metal")
    return splits(recorder.dispatches[0])


def test_without_a_difference_the_default_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "LENGTHS", (64,))
    gpu = Clocked(lambda kernel: 0.002 * ("f16_d128_v" in kernel.name))
    monkeypatch.setattr(tune, "gpu_seconds", gpu.seconds)
    with metal_double.machine(gpu, tune="1"):
        assert tune.run(BUDGET) == 0
        assert _ext.tuning()["decode_threadgroups_per_core"] == 3


DTYPE_OF = {"f16": "float16", "bf16": "bfloat16", "bf16_as_f32": "bfloat16", "f32": "float32"}

MORE_KEYS = "forward_f16_d128_v128_k32_q1_f2"
"""An alternative that Apple7 has."""


class Fills(Clocked):
    """Tiles write the planted number to 40 rows of a head. `fast` takes less than the others."""

    def __init__(self, fast: str, number: Callable[[str], float]) -> None:
        super().__init__(lambda kernel: 1.0 if kernel.name == fast else 1.1)
        self.number = number

    def run(self, kernel: Kernel) -> None:
        super().run(kernel)
        if found := re.match(r"forward_(\w+?)_d(\d+)_", kernel.name):
            out, dtype = kernel.buffers[3], DTYPES[DTYPE_OF[found.group(1)]]
            bits = memory(out)[out.offset :][: 40 * int(found.group(2)) * np.dtype(dtype).itemsize]
            bits.view(dtype)[:] = self.number(kernel.name)


@pytest.fixture
def fills(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], float]], Fills]:
    """A GPU on which only tiles are chosen."""
    monkeypatch.setattr(tune, "SPLITS", (3,))
    monkeypatch.setattr(tune, "LENGTHS", (64,))

    def made(number: Callable[[str], float]) -> Fills:
        gpu = Fills(MORE_KEYS, number)
        monkeypatch.setattr(tune, "gpu_seconds", gpu.seconds)
        return gpu

    return made


def test_the_fastest_tiles_are_chosen(fills: Any, cache: Path) -> None:
    gpu = fills(lambda name: 1.0)
    with metal_double.machine(gpu, tune="1") as machine:
        assert tune.run(BUDGET) == 0
        forget(machine)  # as a later process
        found = _ext.tuning()
        assert (found["tiles"], found["kept"]) == ([MORE_KEYS], str(cache))
        (line,) = (x for x in found["measured"] if MORE_KEYS in x)
        assert line.startswith("forward_f16_d128_v128_k16 ")
        assert "us on the GPU" in line
        for dtype, name in ((np.float16, MORE_KEYS), (np.float32, "forward_f32_d128_v128_k16")):
            x = np.ones((1, 100, 2, 128), dtype)
            umfa.flash_attn_func(x, x, x, backend="metal")
            assert gpu.dispatches[-1].name == name
        assert f"tiles: {MORE_KEYS}" in env.rows(env.collect())["tuning"]


@pytest.mark.parametrize("number", [2.0, np.nan])
def test_wrong_tiles_are_not_chosen(number: float, fills: Any) -> None:
    gpu = fills(lambda name: number if name == MORE_KEYS else 1.0)
    with metal_double.machine(gpu, tune="1"):
        assert tune.run(BUDGET) == 0
        found = _ext.tuning()
        assert found["tiles"] == []
        assert any(f"{MORE_KEYS} is wrong" in line for line in found["measured"])


def test_tiles_that_do_not_run_are_left_out(fills: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fills(lambda name: 1.0)

    def prepare(kernel: Kernel) -> int:
        if kernel.name == MORE_KEYS:
            raise LookupError("planted")
        return 8192

    monkeypatch.setattr(gpu, "prepare", prepare)
    with metal_double.machine(gpu, tune="1"):
        assert tune.run(BUDGET) == 0
        found = _ext.tuning()
        assert found["tiles"] == []
        assert any(f"{MORE_KEYS} does not run: " in line for line in found["measured"])


def test_tiles_that_umfa_does_not_know(double: Double, cache: Path) -> None:
    unknown = "forward_f16_d128_v128_k99"
    with pytest.raises(
        ValueError, match=rf"\[umfa.tune\] values are out of range; got .*{unknown}"
    ):
        _ext.tune(1e7, 3, [], keep=True, tiles=[unknown])
    assert not cache.exists()
    _ext.tune(1e9, 3, [], keep=True, tiles=[MORE_KEYS])
    text = cache.read_text().replace(MORE_KEYS, unknown)
    body = text[: text.rindex("sum ")]
    cache.write_text(f"{body}sum {digest(body)}\n")
    forget(double)
    found = _ext.tuning()
    assert (found["worthwhile_flop"], found["tiles"]) == (2e7, [])
    assert found["ignored"] == f"{cache} has values that umfa does not know"


def digest(text: str) -> str:
    """As src/metal/cache_folder.cpp has it."""
    found = 0xCBF29CE484222325
    for byte in text.encode():
        found = (found ^ byte) * 0x100000001B3 % 2**64
    return f"{found:016x}"


class Named(Emulator):
    """Knows which kernels it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def run(self, kernel: Kernel) -> None:
        self.names.append(kernel.name)
        super().run(kernel)


@pytest.mark.parametrize(
    ("family", "types"),
    [
        pytest.param(9, {"f16"}, marks=pytest.mark.slow),
        pytest.param(7, {"f16", "bf16_as_f32", "f32"}, marks=pytest.mark.slow),
        pytest.param(9, {"bf16", "f32"}, marks=pytest.mark.slow),
    ],
)
def test_other_tiles_attend_right(family: int, types: set[str]) -> None:
    """Every alternative, on the emulator and against float64."""
    gpu = Named()
    tested = set()
    with metal_double.machine(gpu, tune="1") as machine:
        machine.set_machine(family=family)
        groups = _ext.tuning()["tile_choices"]
        assert len(groups) == 6, "three dtypes, two head dims"
        for name in itertools.chain(*(others for _, *others in groups)):
            kind, head_dim = re.match(r"forward_(\w+?)_d(\d+)_", name).groups()  # type: ignore[union-attr]
            if kind not in types:
                continue
            case = Case(
                (1, 2, 75, 90, int(head_dim)), DTYPE_OF[kind], heads_k=1,
                options=(("causal", True),),
            )  # fmt: skip
            _ext.tune(1e7, 3, [], keep=False, tiles=[name])
            out = umfa.flash_attn_func(*inputs(case), causal=True, backend="metal")
            assert gpu.names[-1] == name
            assert_close(out, expected(case)[0], BASE[case.dtype], name)
            tested.add(kind)
    assert tested == types


def test_the_threshold_lies_where_the_gpu_begins_to_win(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """A launch costs 5 ms here, and the CPU's time is planted too."""
    monkeypatch.setattr(tune, "SPLITS", (3,))
    cpu = {64: 0.001, 96: 0.002, 128: 0.003, 192: 0.012, 256: 0.02}
    monkeypatch.setattr(tune, "LENGTHS", tuple(cpu))
    real = umfa.flash_attn_func
    gpu = Clocked(lambda kernel: 0.005)
    monkeypatch.setattr(tune, "gpu_seconds", gpu.seconds)
    monkeypatch.setattr(tune, "wall_seconds", gpu.seconds)

    def call(q: Any, k: Any, v: Any, *, backend: str) -> Any:
        if backend == "cpu":
            gpu.clock += cpu[q.shape[1]]
            return None
        return real(q, k, v, backend=backend)

    monkeypatch.setattr(umfa, "flash_attn_func", call)
    with metal_double.machine(gpu, tune="1"):
        assert tune.run(BUDGET) == 0
        found = _ext.tuning()
    assert found["worthwhile_flop"] == 4.0 * 192 * 192 * 8 * 64
    assert found["kept"] == str(cache)
    assert any("7.5e+07 FLOP: metal" in line for line in found["measured"])


def use(threshold: float, count: int = 4) -> None:
    _ext.tune(threshold, count, ["a line"], keep=True)


def test_a_record_is_used_by_later_processes(double: Double, cache: Path) -> None:
    x = np.zeros((1, 256, 4, 64), np.float32)  # 6.7e7 FLOP
    for threshold, calls in ((1e9, 0), (1e6, 1)):
        use(threshold)
        forget(double)
        before = umfa.stats().metal_calls
        umfa.flash_attn_func(x, x, x)
        assert umfa.stats().metal_calls - before == calls
        found = _ext.tuning()
        assert (found["worthwhile_flop"], found["kept"]) == (threshold, str(cache))
        assert found["when"].endswith("Z")
        assert "Apple M1" in found["device"]
        assert found["measured"] == ["a line"]
    text = env.rows(env.collect())["tuning"]
    assert "from 1.0e+06 FLOP" in text
    assert "a line" in text
    for threshold, count in ((float("nan"), 3), (1e13, 3), (1e7, 0), (1e7, 17)):
        with pytest.raises(ValueError, match=r"\[umfa.tune\] values are out of range; got"):
            use(threshold, count)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "another byte": lambda content: content.replace(b"flop 1", b"flop 2"),
    "not text": lambda content: bytes(range(256)),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_record_is_ignored(how: str, double: Double, cache: Path) -> None:
    use(1e9)
    content = cache.read_bytes()
    cache.write_bytes(DAMAGE[how](content))
    assert cache.read_bytes() != content
    forget(double)
    found = _ext.tuning()
    assert (found["worthwhile_flop"], found["decode_threadgroups_per_core"]) == (2e7, 3)
    assert found["ignored"] == f"{cache} is damaged"
    assert "is damaged" in env.rows(env.collect())["tuning"]


def test_a_record_of_another_gpu_is_ignored(double: Double, cache: Path) -> None:
    use(1e9)
    assert umfa.__version__ in cache.read_text()
    double.set_machine(name="Apple M4", architecture="applegpu_g16g", family=9)
    assert _ext.tuning()["worthwhile_flop"] == 2e7
    assert _ext.tuning()["ignored"] == f"{cache} is of another GPU, macOS or umfa"


def test_off(double: Double, recorder: Recorder, cache: Path) -> None:
    use(1e9)
    double.stop()
    with metal_double.machine(recorder, tune="0"):
        assert _ext.tuning()["worthwhile_flop"] == 2e7
        assert _ext.tuning()["ignored"] == "UMFA_TUNE=0"
        assert tune.run(BUDGET) == 1
    double.start(tune="1")


@pytest.mark.parametrize("folder", ["/proc/nowhere", "relative"])
def test_without_a_folder(folder: str, double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", folder)
    monkeypatch.setenv("HOME", "/proc/nowhere")
    found = _ext.tune(1e8, 2, [], keep=True)
    assert found["kept"] == ""
    assert "/proc/nowhere" in found["ignored"]
    assert _ext.tuning()["worthwhile_flop"] == 1e8, "this process uses it"


def test_a_hang_ends_it(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = threading.Event()

    class Hangs(Recorder):
        def run(self, kernel: Kernel) -> None:
            free.wait()

    with metal_double.machine(Hangs(), tune="1"):
        try:
            assert tune.run(BUDGET, patience=0.3) == 1
            assert "nothing is kept: the GPU did not answer" in capsys.readouterr().out
            assert _ext.tuning()["worthwhile_flop"] == 2e7
        finally:
            free.set()
    assert not cache.exists()


def test_the_budget_ends_it(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    with metal_double.machine(Timed(lambda kernel: 0.01), tune="1"):
        assert tune.run(argparse.Namespace(seconds=0.05)) == 1
        assert _ext.tuning()["decode_threadgroups_per_core"] == 3
    assert "nothing is kept: the time budget is spent" in capsys.readouterr().out
    assert not cache.exists()


def test_an_error_ends_it(double: Double, capsys: pytest.CaptureFixture[str]) -> None:
    double.fault("execution", value=2)
    assert tune.run(BUDGET) == 1
    assert "nothing is kept: [umfa.flash_attn_func]" in capsys.readouterr().out


def test_without_a_gpu(double: Double, capsys: pytest.CaptureFixture[str]) -> None:
    double.set_machine(present=False)
    assert _ext.tuning() is None
    assert tune.run(BUDGET) == 1
    assert "there is no GPU to tune; got no Metal device" in capsys.readouterr().out
    with pytest.raises(umfa.UnsupportedError, match="there is no GPU to tune"):
        use(1e7)


@pytest.mark.parametrize("present", [True, False])
def test_an_invalid_variable(
    present: bool,
    double: Double,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    double.set_machine(present=present)
    monkeypatch.setenv("UMFA_TUNE", "banana")
    message = "[umfa] UMFA_TUNE is wrong; got 'banana'; expected '0' or '1'"
    assert tune.run(BUDGET) == 1
    assert capsys.readouterr().out == message + "\n"
    assert env.collect()["problems"] == [message], "once"


@pytest.mark.parametrize("text", ["nan", "0", "-1", "181", "inf", "soon"])
def test_a_budget_that_makes_no_sense(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--seconds={text}"])
    assert text in capsys.readouterr().err
    assert parser.parse_args(["--seconds=180"]).seconds == 180


CHILD = """
import sys
from tools.metal import double as metal_double
from tools.metal.double.gpus import Recorder
from umfa import _ext
with metal_double.machine(Recorder(), tune="1"):
    for i in range(20):
        _ext.tune(float(sys.argv[1]), 3, ["x" * 2000], keep=True)
        metal_double.load().umfa_double_release()
        found = _ext.tuning()
        assert not found["ignored"], found
        assert found["worthwhile_flop"] in (1e7, 1e8), found
"""


def test_two_processes_at_once() -> None:
    metal_double.load()
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, value], cwd=ROOT) for value in ("1e7", "1e8")
    ]
    assert [child.wait(120) for child in children] == [0, 0]
