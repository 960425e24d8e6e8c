"""The arm64 kernels on an emulated CPU: against the float64 reference and this machine's."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

import umfa
from tests import checks, reference
from tests.array_libraries import DTYPES, Array
from tests.cases import Case, expected, inputs, normal, options
from tests.checks import Tolerance
from tests.cpu import arm64
from tests.cpu import test_kernel_math as kernel_math

# CPU models, the instruction set that each should choose, and those forced on the first.
CHOSEN = {"max": "neon_bf16", "cortex-a57": "neon", "neoverse-n1": "neon"}
FORCED = ["neon_bf16", "neon", "portable"]

CASES = [
    Case(shape, dtype, heads_k, head_dim_v, tuple(given.items()), alibi, seed=seed)
    for dtype in ("float32", "float16", "bfloat16")
    for seed, (shape, heads_k, head_dim_v, given, alibi) in enumerate(
        [
            ((1, 2, 77, 33, 40), None, None, {}, ""),
            ((1, 2, 33, 77, 64), 1, None, {"causal": True}, ""),
            ((1, 1, 130, 130, 80), None, None, {"causal": True}, ""),
            ((1, 2, 40, 250, 128), 1, None, {"window_size": (30, 5)}, ""),
            ((2, 2, 9, 100, 192), None, None, {"softcap": 5.0}, "batch_heads"),
            ((1, 2, 50, 101, 64), None, 40, {"causal": True, "softmax_scale": 0.3}, "heads"),
            ((1, 4, 1, 301, 64), 1, None, {}, ""),
            ((1, 8, 2, 1500, 128), 2, None, {"causal": True}, ""),
            ((1, 1, 5, 7, 3), None, 5, {"causal": True}, ""),
            ((1, 1, 20, 4, 16), None, None, {"causal": True}, ""),  # rows that see no key
        ]
    )
]


class Result(NamedTuple):
    out: Array
    lse: Array


class Problem(NamedTuple):
    query: Array
    key: Array
    value: Array
    options: dict[str, object]

    def packed(self) -> bytes:
        """As attend.cpp reads it."""
        batch, seqlen_q, heads, head_dim = self.query.shape
        _, seqlen_kv, heads_kv, head_dim_v = self.value.shape
        given = dict(self.options)
        slopes = given.pop("alibi_slopes", None)
        left, right = given.pop("window_size", (-1, -1))
        bfloat = self.query.dtype == ml_dtypes.bfloat16
        header = struct.pack(
            "13q2d",
            *(4 if bfloat else 2, 8 * self.query.dtype.itemsize),
            *(batch, heads, heads_kv, seqlen_q, seqlen_kv, head_dim, head_dim_v),
            *(given.pop("causal", False), left, right, 0 if slopes is None else slopes.ndim),
            *(given.pop("softmax_scale", 0.0), given.pop("softcap", 0.0)),
        )
        assert not given
        arrays = [self.query, self.key, self.value, *([] if slopes is None else [slopes])]
        return header + b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)

    def here(self) -> Result:
        out, lse, _ = umfa.flash_attn_func(
            self.query, self.key, self.value, return_attn_probs=True, backend="cpu", **self.options
        )
        return Result(out, lse)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arm64.qemu()
    return arm64.build_attend(tmp_path_factory.mktemp("arm64"))


def run_program(program: Path, problems: list[Problem], isa: str) -> list[Result]:
    """Without `tests.attend`: the program is built for another processor and has no Python."""
    given = b"".join(problem.packed() for problem in problems)
    answer = arm64.run(program, stdin=given, isa=isa)
    results = []
    at = 0
    for problem in problems:
        batch, seqlen_q, heads, _ = problem.query.shape
        found = []
        for shape, dtype in (
            ((batch, seqlen_q, heads, problem.value.shape[3]), problem.query.dtype),
            ((batch, heads, seqlen_q), np.dtype(np.float32)),
        ):
            count = int(np.prod(shape))
            found.append(np.frombuffer(answer, dtype, count, at).reshape(shape))
            at += count * dtype.itemsize
        results.append(Result(*found))
    assert at == len(answer)
    return results


@pytest.mark.parametrize("cpu", CHOSEN)
def test_best_set_is_chosen(cpu: str, program: Path) -> None:
    """Features are found at run time: older CPUs fall back."""
    assert arm64.run(program, "isa", cpu=cpu).decode().strip() == CHOSEN[cpu]


def test_older_cpu_runs_it(program: Path) -> None:
    """Nothing that every CPU executes was compiled with newer instructions."""
    case = Case((1, 1, 33, 40, 64), "bfloat16")
    problem = Problem(*inputs(case), options(case))
    answer = arm64.run(program, stdin=problem.packed(), cpu="cortex-a57")
    (neon,) = run_program(program, [problem], "neon")
    assert answer == neon.out.tobytes() + neon.lse.tobytes()


@pytest.mark.parametrize("isa", FORCED)
def test_equals_reference_and_this_machine(isa: str, program: Path) -> None:
    problems = [Problem(*inputs(case), options(case)) for case in CASES]
    for case, problem, result in zip(
        CASES, problems, run_program(program, problems, isa), strict=True
    ):
        tolerance = checks.BASE[case.dtype]
        out, lse = expected(case)
        checks.assert_close(result.out.astype(np.float64), out, tolerance, f"{case}: out")
        checks.assert_close(result.lse.astype(np.float64), lse, checks.LSE, f"{case}: lse")
        here = problem.here()
        checks.assert_close(
            result.out.astype(np.float64), here.out.astype(np.float64), tolerance, f"{case}: x86"
        )
        checks.assert_close(result.lse, here.lse, checks.LSE, f"{case}: lse, x86")


@pytest.mark.parametrize("isa", FORCED)
def test_hidden_nan_and_tiny_values(isa: str, program: Path) -> None:
    """V rows that nobody sees may hold NaN; values that BFDOT takes for 0 must not become it."""
    problems = []
    for dtype in ("float32", "float16", "bfloat16"):
        query, key, value = (normal((1, 40, 2, 24), dtype, seed=i) for i in range(3))
        value[0, 25:] = np.nan
        value[0, 30] = np.inf
        problems.append(Problem(query, key, value, {"causal": True}))
    tiny = {"float16": (3e-7, 2.0**-24), "bfloat16": (1e-38, 2.0**-133)}
    for dtype, (factor, _) in tiny.items():
        query, key = (normal((1, 30, 1, 16), dtype, seed=i) for i in range(2))
        value = normal((1, 30, 1, 16), dtype, seed=2, factor=factor)
        problems.append(Problem(query, key, value, {}))
    results = run_program(program, problems, isa)

    for problem, result in zip(problems[:3], results, strict=False):
        seen = (array[:, :25] for array in (problem.query, problem.key, problem.value))
        out, lse = reference.attention(*seen, causal=True)
        dtype = next(name for name in checks.BASE if problem.query.dtype == DTYPES[name])
        got = result.out.astype(np.float64)
        checks.assert_close(got[:, :25], out, checks.BASE[dtype], f"{dtype}: out")
        checks.assert_close(result.lse[:, :, :25].astype(np.float64), lse, checks.LSE, dtype)
        assert np.isnan(got[:, 25:]).all()
    for problem, result, (_, spacing) in zip(problems[3:], results[3:], tiny.values(), strict=True):
        out, _ = reference.attention(problem.query, problem.key, problem.value)
        got = result.out.astype(np.float64)
        checks.assert_close(got, out, Tolerance(spacing, 1e-2), "tiny")
        assert (got != 0).any()


@pytest.mark.parametrize("isa", FORCED)
def test_nan_scores_reach_their_rows(isa: str, program: Path) -> None:
    problems = []
    for dtype in ("float32", "float16", "bfloat16"):
        query, key, value = (normal((1, 120, 1, 24), dtype, seed=i) for i in range(3))
        query[0, 3], key[0, 100] = np.nan, np.nan
        problems.append(Problem(query, key, value, {"causal": True}))
    for result in run_program(program, problems, isa):
        row_is_nan = np.isnan(result.out.astype(np.float32)[0, :, 0])
        assert (row_is_nan.all(1) == row_is_nan.any(1)).all()
        assert row_is_nan.any(1).nonzero()[0].tolist() == [3, *range(100, 120)]
        np.testing.assert_array_equal(np.isnan(result.lse[0, 0]), row_is_nan[:, 0])


@pytest.mark.parametrize("isa", FORCED)
@pytest.mark.parametrize("spoiled", ["query", "key", "value"])
def test_nan_stays_in_its_row_of_two(isa: str, spoiled: str, program: Path) -> None:
    """The same for decoding: NaN in what only the last row sees."""
    problems = []
    for dtype in ("float32", "float16", "bfloat16"):
        query, key, value = (
            normal((1, length, heads, 64), dtype, seed=heads + length)
            for length, heads in ((2, 4), (600, 1), (600, 1))
        )
        {"query": query, "key": key, "value": value}[spoiled][0, -1] = np.nan
        problems.append(Problem(query, key, value, {"causal": True}))
    for result in run_program(program, problems, isa):
        assert np.isfinite(result.out[0, 0].astype(np.float32)).all()
        assert np.isnan(result.out[0, 1].astype(np.float32)).all()
        assert np.isfinite(result.lse[0, :, 0]).all()
        assert np.isnan(result.lse[0, :, 1]).all() == (spoiled != "value")


@pytest.mark.parametrize("isa", ["neon", "neon_bf16"])
def test_vector_functions(isa: str, tmp_path: Path) -> None:
    """test_kernel_math.py, on the emulated CPU."""
    arm64.qemu()
    program = arm64.build_kernel_math(tmp_path, isa)

    def call(function: str, bits: Array) -> Array:
        words = np.ascontiguousarray(bits, dtype=np.uint32)
        assert words.size % 64 == 0
        return np.frombuffer(arm64.run(program, function, stdin=words.tobytes()), np.uint32)

    kernel_math.test_exp2_at_its_edges(call)
    kernel_math.test_exp2_is_within_two_ulp(97, call)
    kernel_math.test_tanh_at_its_edges(call)
    kernel_math.test_tanh_is_within_three_ulp(call)
    for name in ("drop_panel", "drop_keys"):
        kernel_math.test_dropout_drops_what_philox_says(call, name)
    for name in ("f16", "bf16"):
        kernel_math.test_loads_are_exact(call, name)
        kernel_math.test_stores_round_to_nearest_even(call, name)
