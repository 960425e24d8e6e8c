"""The PTX back end's mathematical functions, compiled for this machine."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tools.metal.emulator import toolchain
from tools.metal.ptx.translate import PACKAGE

Array = np.ndarray[Any, np.dtype[Any]]

# Name, function in double, range, bound in ulp.
ONE = {
    "exp": (np.exp, (-110, 95), 2),
    "exp2": (np.exp2, (-155, 130), 2),
    "exp10": (lambda x: 10.0**x, (-46, 39), 0.51),
    "log": (np.log, (1e-38, 1e38), 0.51),
    "log2": (np.log2, (1e-38, 1e38), 0.51),
    "log10": (np.log10, (1e-38, 1e38), 0.51),
    "sin": (np.sin, (-1e4, 1e4), 0.51),
    "cos": (np.cos, (-1e4, 1e4), 0.51),
    "tan": (np.tan, (-1e4, 1e4), 0.51),
    "asin": (np.arcsin, (-1, 1), 0.51),
    "acos": (np.arccos, (-1, 1), 0.51),
    "atan": (np.arctan, (-1e3, 1e3), 0.51),
    "sinh": (np.sinh, (-89, 89), 0.51),
    "cosh": (np.cosh, (-89, 89), 0.51),
    "tanh": (np.tanh, (-12, 12), 2),
    "asinh": (np.arcsinh, (-1e6, 1e6), 0.51),
    "acosh": (np.arccosh, (1, 1e6), 0.51),
    "atanh": (np.arctanh, (-1, 1), 0.51),
    "rsqrt": (lambda x: x**-0.5, (1e-37, 1e37), 1.5),
}
TWO = {"pow": np.power, "atan2": np.arctan2, "fmod": np.fmod}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("math")
    loops = "".join(
        f"void {n}(const float* x, float* r, long k) "
        f"{{ for (long i = 0; i < k; i++) r[i] = umfa_{n}(x[i], 1); }}\n"
        for n in ONE
    ) + "".join(
        f"void {n}_(const float* x, const float* y, float* r, long k) "
        f"{{ for (long i = 0; i < k; i++) r[i] = umfa_{n}(x[i], y[i]{extra}); }}\n"
        for n, extra in (("pow", ", 1"), ("atan2", ", 1"), ("fmod", ""))
    )
    source = folder / "math.cpp"
    source.write_text(f'#include "umfa_ptx_math.h"\nextern "C" {{\n{loops}}}\n')
    output = folder / "math.so"
    command = [
        toolchain.system_compiler(), "-std=c++20", "-O2", "-shared", "-fPIC", "-ffp-contract=off",
        *toolchain.native_flags(), f"-I{PACKAGE / 'include'}", str(source), "-o", str(output),
    ]  # fmt: skip
    toolchain.run(command)
    return ctypes.CDLL(str(output))


def call(library: ctypes.CDLL, name: str, *arguments: Array) -> Array:
    arrays = [np.ascontiguousarray(x, np.float32) for x in arguments]
    result = np.empty_like(arrays[0])
    pointers = [x.ctypes.data_as(ctypes.c_void_p) for x in (*arrays, result)]
    library[name](*pointers, ctypes.c_long(result.size))
    return result


def samples(low: float, high: float) -> Array:
    """Evenly and logarithmically spread; the ends, whole numbers and their neighbours are in it."""
    rng = np.random.default_rng(0)
    found = [rng.uniform(low, high, 20000), np.array([low, high])]
    small = np.exp2(rng.uniform(-30, np.log2(max(abs(low), abs(high))), 20000))
    found += [small, -small]
    whole = np.arange(max(low, -200), min(high, 200), 1.0).astype(np.float32)
    found += [whole, np.nextafter(whole, np.float32(np.inf)), np.nextafter(whole, -np.float32(9e9))]
    x = np.concatenate(found).astype(np.float32)
    return x[(x >= low) & (x <= high)]


def ulps(found: Array, exact: Array) -> Array:
    """Distance in units in the last place of float, denormals included."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = exact.astype(np.float32)
        unit = np.spacing(np.abs(rounded)).astype(np.float64)
        error = np.abs(found.astype(np.float64) - exact) / unit
    return np.where(found == rounded, 0.0, error)


@pytest.mark.parametrize("name", ONE)
def test_functions_of_one_argument(name: str, library: ctypes.CDLL) -> None:
    function: Callable[[Array], Array]
    function, (low, high), bound = ONE[name]
    x = samples(low, high)
    with np.errstate(all="ignore"):
        exact = function(x.astype(np.float64))
    error = ulps(call(library, name, x), exact)
    worst = int(np.argmax(error))
    assert error[worst] <= bound, (x[worst], exact[worst])


@pytest.mark.parametrize("name", ONE)
def test_special_values(name: str, library: ctypes.CDLL) -> None:
    function, *_ = ONE[name]
    x = np.array([0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e38, -1e38, 2], np.float32)
    if name in ("sin", "cos", "tan"):
        x = x[np.abs(x) != np.float32(1e38)]  # beyond what is promised
    if name == "rsqrt":
        x = x[~np.isin(x, [0, -np.inf])]  # where NumPy's power is another function
    with np.errstate(all="ignore"):
        exact = function(x.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(call(library, name, x), exact, rtol=3e-7)


@pytest.mark.parametrize("name", TWO)
def test_functions_of_two_arguments(name: str, library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(1)
    special = np.array([0.0, -0.0, 1, -1, 2, -3, 0.5, np.inf, -np.inf, np.nan, 1e30, 7.25])
    x, y = (v.ravel() for v in np.meshgrid(special, special))
    x = np.concatenate([x, rng.uniform(-20, 20, 20000), np.exp2(rng.uniform(-99, 99, 5000))])
    y = np.concatenate([y, rng.uniform(-20, 20, 20000), rng.uniform(-1, 1, 5000)])
    x, y = x.astype(np.float32), y.astype(np.float32)
    with np.errstate(all="ignore"):
        exact = TWO[name](x.astype(np.float64), y.astype(np.float64))
        expected = exact.astype(np.float32)
    found = call(library, f"{name}_", x, y)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    assert (ulps(found, exact)[finite] <= 0.51).all()
