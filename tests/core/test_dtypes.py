"""Query, key, value and result of different dtypes."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.array_libraries import DTYPES, Array, Framework
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close, assert_same_bits
from tests.process_memory import STATUS
from tests.tiers import crossed

if TYPE_CHECKING:
    from tests.conftest import RunPython

ALL = list(itertools.product(DTYPES, repeat=3))
# Every pair of dtypes for every pair of tensors.
SOME = [x for x in ALL if sum(list(DTYPES).index(name) for name in x) % 3 == 0]


def tensors(dtypes: tuple[str, ...], seqlen_q: int, keys: int = 300) -> list[Array]:
    shapes = [(2, seqlen_q, 4, 40), (2, keys, 2, 40), (2, keys, 2, 24)]
    return [normal(s, d, seed=i) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))]


def check(arrays: list[Array], out_dtype: str | None = None, **options: Any) -> None:
    more = {} if out_dtype is None else {"out_dtype": out_dtype}
    out, lse = umfa.flash_attn_func(*arrays, return_lse=True, backend="cpu", **more, **options)
    expected, expected_lse = reference.attention(*arrays, **options)
    name = out_dtype or arrays[0].dtype.name
    assert out.dtype.name == name
    assert_close(out.astype(np.float64), expected, BASE[name])
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")


@pytest.mark.parametrize(("dtypes", "seqlen_q"), crossed(ALL, [1, 70]), ids=str)
def test_every_combination(dtypes: tuple[str, ...], seqlen_q: int) -> None:
    for out_dtype in (None, *DTYPES):
        check(tensors(dtypes, seqlen_q), out_dtype, causal=True)


@pytest.mark.sanitize
@pytest.mark.parametrize("seqlen_q", [3, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtypes", SOME, ids="-".join)
def test_every_instruction_set(dtypes: tuple[str, ...], seqlen_q: int, isa: str) -> None:
    arrays = tensors(dtypes, seqlen_q)
    check(arrays, qv=normal((2, seqlen_q, 4, 24), dtypes[0], seed=5), window_size=(90, 10))
    check([x[..., ::-2] for x in arrays], "float32", softcap=5.0)


@pytest.mark.parametrize("seqlen_q", [1, 40])
@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16"])
def test_one_dtype_in_is_as_exact_as_its_result(out_dtype: str, seqlen_q: int, isa: str) -> None:
    """A float32 result of 16-bit tensors equals that of their float32 copies bit for bit."""
    narrow = tensors((out_dtype,) * 3, seqlen_q)
    wide = [x.astype(np.float32) for x in narrow]
    found = umfa.flash_attn_func(*narrow, out_dtype="float32", backend="cpu")
    check(narrow, "float32")
    assert_same_bits(
        found.view(np.uint32), umfa.flash_attn_func(*wide, backend="cpu").view(np.uint32)
    )


def test_hidden_values_of_any_dtype(isa: str) -> None:
    """NaN in a value that a query cannot see does not reach its output."""
    for dtypes, seqlen_q in itertools.product(SOME, (2, 40)):
        query, key, value = tensors(dtypes, seqlen_q, keys=60)
        spoiled = value.copy()
        spoiled[:, -1] = np.nan
        out, clean = (
            umfa.flash_attn_func(query, key, x, causal=True, backend="cpu")
            for x in (spoiled, value)
        )
        assert np.isnan(out[:, -1].astype(np.float32)).all()
        assert_same_bits(out[:, :-1].view(np.uint8), clean[:, :-1].view(np.uint8))


# Ties between roundings, and numbers at and beyond the limits of each dtype.
AWKWARD = np.array(
    [1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-11, 1 + 3 * 2**-11, -(1 + 2**-8), 65519.9, 65520, 3e38,
     -3.3e38, np.inf, np.nan, 6e-8, 2.9e-8, 3e-8, -0.0, 1e-40],
    np.float32,
)  # fmt: skip


def appended(new: str, cache: str, call: Any) -> tuple[Array, Array]:
    """Keys and values of the cache after appending 2 rows of awkward numbers."""
    rows = np.resize(AWKWARD, (1, 2, 1, len(AWKWARD))).astype(DTYPES[new])
    query = np.zeros((1, 1, 1, len(AWKWARD)), np.float32)
    caches = [np.zeros((1, 4, 1, len(AWKWARD)), DTYPES[cache]) for _ in range(2)]
    call(query, *caches, rows, rows, cache_seqlens=1)
    return caches[0], caches[1]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(("new", "cache"), [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_new_rows_are_rounded_to_the_nearest_even(new: str, cache: str, isa: str) -> None:
    def call(*arrays: Array, **options: Any) -> None:
        umfa.flash_attn_with_kvcache(*arrays, backend="cpu", **options)

    expected = np.resize(AWKWARD, (1, 2, 1, len(AWKWARD))).astype(DTYPES[new])
    for found in appended(new, cache, call):
        rounded = expected.astype(DTYPES[cache])
        nan = np.isnan(rounded.astype(np.float32))
        assert np.array_equal(np.isnan(found[:, 1:3].astype(np.float32)), nan)
        assert_same_bits(
            np.where(nan, 0, found[:, 1:3].view(f"u{rounded.itemsize}")),
            np.where(nan, 0, rounded.view(f"u{rounded.itemsize}")),
        )
        assert not found[:, [0, 3]].any()


def test_frameworks(framework: Framework) -> None:
    arrays = tensors(("float32", "bfloat16", "float16"), 5)
    out = umfa.flash_attn_func(*map(framework.tensor, arrays), backend="cpu")
    assert framework.dtype_name(out) == "float32"
    assert_close(framework.float64(out), reference.attention(*arrays)[0], BASE["float32"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_qv_has_the_dtype_of_query(dtype: str) -> None:
    query, key, value = tensors(("float16", dtype, dtype), 4)
    qv = normal((2, 4, 4, 24), dtype, seed=9)
    text = f"dtype differs: q has float16, qv has {dtype}"
    with pytest.raises(TypeError, match=text):
        umfa.flash_attn_func(query, key, value, qv=qv)
    possible, reason = umfa.can_run(query, key, value, qv=qv)
    assert not possible
    assert text in reason


def test_can_run() -> None:
    for dtypes in ALL:
        assert umfa.can_run(*tensors(dtypes, 3), backend="cpu") == (True, "")


MEMORY = """
import ml_dtypes, numpy as np, umfa

key, value = (np.ones((1, 32768, 8, 128), ml_dtypes.bfloat16) for _ in range(2))  # 67 MB each
small = np.ones((1, 8, 1, 8), np.float32)
umfa.flash_attn_func(small, small, small, backend="cpu")  # starts the threads
before = status("VmRSS")
for rows in (1, 64):
    out = umfa.flash_attn_func(np.ones((1, rows, 8, 128), np.float32), key, value, backend="cpu")
    assert out.dtype == np.float32 and (out == 1).all()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_narrow_cache_is_never_copied(run_python: RunPython) -> None:
    """A float32 copy would take 134 MB for each of key and value."""
    process = run_python(STATUS + MEMORY)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < 20e6
