"""The kernels' own vector functions, compiled alone: exp2, tanh and the 16-bit conversions."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import umfa
from tests import philox

ROOT = Path(__file__).parents[2]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    "amx_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    "neon": [],
    "neon_bf16": ["-march=armv8.2-a+bf16"],
}
BASES = {
    "avx512_bf16": ["avx512.cpp"],
    "amx_bf16": ["avx512.cpp"],
    "neon_bf16": ["neon.cpp"],
}
USABLE = [name for name, usable in umfa._ext.cpu_isas() if usable]
Run = Callable[[str, np.ndarray], np.ndarray]


@pytest.fixture(scope="module", params=USABLE)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("math") / request.param
    subprocess.run(
        [
            *(compiler.split()),
            "-std=c++20",
            "-O3",
            "-ffp-contract=fast",
            "-w",
            *FLAGS[request.param],
            f'-DKERNEL_FILE="cpu/isa/{request.param}.cpp"',
            *("-iquote", str(Path(__file__).with_name("without_tables"))),
            f"-I{ROOT / 'src'}",
            f"-I{ROOT / 'shaders'}",
            str(Path(__file__).with_name("kernel_math.cpp")),
            *(str(ROOT / "src/cpu/isa" / name) for name in BASES.get(request.param, [])),
            "-o",
            str(program),
        ],
        check=True,
    )

    def call(function: str, bits: np.ndarray) -> np.ndarray:
        words = np.ascontiguousarray(bits, dtype=np.uint32)
        assert words.size % 64 == 0
        out = subprocess.run(
            [program, function], input=words.tobytes(), stdout=subprocess.PIPE, check=True
        )
        return np.frombuffer(out.stdout, dtype=np.uint32)

    return call


def every(step: int, low: float, high: float) -> np.ndarray:
    """Bit patterns of every step-th float32 in [low, high], both of one sign, as float32."""
    first, last = sorted(int(np.float32(x).view(np.uint32)) for x in (low, high))
    count = ((last - first) // step + 1) // 64 * 64
    return (first + step * np.arange(count, dtype=np.uint64)).astype(np.uint32)


def ulps(got: np.ndarray, want: np.ndarray) -> float:
    """Largest distance to the exact result, in units of the result's last place."""
    spacing = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
    return float(np.max(np.abs(got.astype(np.float64) - want) / spacing))


@pytest.mark.parametrize("step", [pytest.param(97, marks=pytest.mark.slow), 997])
def test_exp2_is_within_two_ulp(step: int, run: Run) -> None:
    for low, high in ((1e-8, 127.0), (-126.0, -1e-8)):
        bits = every(step, low, high)
        got = run("exp2", bits).view(np.float32)
        assert (
            ulps(got, np.exp2(bits.view(np.float32).astype(np.float64))) <= 1.25
        )  # measured 1.2 without FMA, 1.0 with


def test_exp2_at_its_edges(run: Run) -> None:
    x = np.zeros(64, np.float32)
    x[:6] = 0.0, -0.0, -126.0, -np.inf, np.nan, -200.0
    got = run("exp2", x.view(np.uint32)).view(np.float32)
    assert got[:4].tolist() == [1.0, 1.0, 2.0**-126, 0.0]
    assert np.isnan(got[4])
    assert got[5] == 0.0


def test_tanh_is_within_three_ulp(run: Run) -> None:
    for low, high in ((1e-30, 90.0), (-90.0, -1e-30)):
        bits = every(499, low, high)
        got = run("tanh", bits).view(np.float32)
        assert ulps(got, np.tanh(bits.view(np.float32).astype(np.float64))) <= 3


def test_tanh_at_its_edges(run: Run) -> None:
    x = np.zeros(64, np.float32)
    x[:5] = 0.0, np.inf, -np.inf, np.nan, 1e30
    got = run("tanh", x.view(np.uint32)).view(np.float32)
    assert got[:3].tolist() == [0.0, 1.0, -1.0]
    assert np.isnan(got[3])
    assert got[4] == 1.0


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_loads_are_exact(run: Run, name: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    want = bits.view(np.float16 if name == "f16" else ml_dtypes.bfloat16).astype(np.float32)
    got = run(f"load_{name}", bits.astype(np.uint32)).view(np.float32)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_stores_round_to_nearest_even(run: Run, name: str) -> None:
    bits = (np.arange(1 << 22, dtype=np.uint64) * 1021 % (1 << 32)).astype(np.uint32)
    # Ties and their neighbours, which a stride over all floats seldom meets.
    with np.errstate(over="ignore", invalid="ignore"):
        dtype = np.float16 if name == "f16" else ml_dtypes.bfloat16
        halves = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
        ties = (halves.view(np.uint32) + (0x1000 if name == "f16" else 0x8000)).astype(np.uint32)
        bits = np.concatenate([bits, ties, ties - 1, ties + 1])
        want = bits.view(np.float32).astype(dtype)
    got = run(f"store_{name}", bits).astype(np.uint16).view(dtype)
    nan = np.isnan(want.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    np.testing.assert_array_equal(got.view(np.uint16)[~nan], want.view(np.uint16)[~nan])


@pytest.mark.parametrize("name", ["drop_panel", "drop_keys"])
def test_dropout_drops_what_philox_says(run: Run, name: str) -> None:
    """The constants are kernel_math.cpp's. Dropped numbers keep their sign, others all bits."""
    heads = 6
    lanes = int(run("lanes", np.zeros(0))[0])
    queries, keys = (lanes, 48) if name == "drop_panel" else (1, 32)
    values = np.random.default_rng(0).standard_normal((heads, keys, queries), dtype=np.float32)
    values[0, :, 0] = np.nan
    found = run(name, values.view(np.uint32).ravel())
    head, key, query = np.ogrid[:heads, 96 : 96 + keys, 5 : 5 + queries]
    four, place = key // 16 * 4 + key % 8 // 2, key % 2 + key % 16 // 8 * 2
    words = philox.philox((four, query, head, 11), (0xA4093822, 0x299F31D0))
    dropped = np.choose(place, words) < 0x60000000
    bits = values.view(np.uint32)
    expected = np.where(dropped, bits & np.uint32(0x80000000), bits)
    assert 0.3 < dropped.mean() < 0.45
    np.testing.assert_array_equal(found.reshape(bits.shape), expected)
