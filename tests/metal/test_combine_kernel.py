"""Merging the results of parts of the keys, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import reference
from tests.array_libraries import DTYPES
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close, assert_same_bits
from tests.metal import emulated
from tests.metal.emulated import MACHINES, SOME_MACHINES
from tests.metal.test_plan_forward import host_names, layout

Array = np.ndarray[Any, np.dtype[Any]]
pytestmark = pytest.mark.usefixtures("own_settings")

SHAPES = {
    "dense": (3, 2, 5, 3, 24),
    "packed": (4, 7, 2, 64),
    "many parts": (70, 1, 2, 1, 8),
    "one part": (1, 2, 3, 2, 16),
    "several simdgroups a row": (2, 1, 3, 2, 300),
}


def inputs(shape: tuple[int, ...], dtype: str = "float32") -> tuple[Array, Array]:
    return normal(shape, dtype, seed=1), 5 * normal(shape[:-1], seed=2)


def combine(out_partial: Array, lse_partial: Array, dtype: str = "float32") -> tuple[Array, Array]:
    # Poisoned, as recycled memory may be: every element must be written.
    out = np.full(out_partial.shape[1:], np.nan, DTYPES[dtype])
    lse = np.full(out.shape[:-1], np.nan, np.float32)
    emulated.combine(out_partial, lse_partial, out, lse)
    return out, lse


def check(out_partial: Array, lse_partial: Array, dtype: str = "float32") -> None:
    out, lse = combine(out_partial, lse_partial, dtype)
    exact, exact_lse = reference.combine(out_partial, lse_partial)
    assert_close(out.astype(np.float64), exact, BASE[dtype])
    assert_close(lse.astype(np.float64), exact_lse, LSE, "lse")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape: tuple[int, ...]) -> None:
    check(*inputs(shape))


@pytest.mark.parametrize("to", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("of", ["float32", "float16", "bfloat16"])
def test_dtypes(of: str, to: str) -> None:
    check(*inputs((3, 2, 4, 2, 20), of), to)
    (launch,) = emulated.last_plan["launches"]
    assert launch["kernel"] in host_names("combine.metal")
    assert launch["constants"] == {}
    assert launch["buffer_count"] == len(layout("COMBINE")) == 5


@pytest.mark.parametrize("machine", SOME_MACHINES)
def test_other_machines(machine: str) -> None:
    emulated.settings.options = MACHINES[machine]
    emulated.settings.schedule_seed = 3
    check(*inputs((40, 2, 4, 2, 20)))


def test_parts_that_saw_no_key() -> None:
    out_partial, lse_partial = inputs((3, 2, 4, 2, 8))
    lse_partial[1, 0], out_partial[1, 0] = -np.inf, np.nan
    lse_partial[:, 1, 2, 1], out_partial[:, 1, 2, 1] = -np.inf, np.inf
    check(out_partial, lse_partial)
    out, lse = combine(out_partial, lse_partial)
    assert (out[1, 2, 1] == 0).all()
    assert lse[1, 2, 1] == -np.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_log_sum_exp_that_is_no_number_shows(bad: float) -> None:
    out_partial, lse_partial = inputs((3, 1, 2, 2, 8))
    lse_partial[2, 0, 1, 0] = bad
    out, lse = combine(out_partial, lse_partial)
    for found in (out, lse):
        assert np.isnan(found[0, 1, 0]).all()
        assert np.isfinite(np.delete(found.reshape(4, -1), 2, axis=0)).all()


def test_any_strides() -> None:
    """Channels backwards, parts last, one log-sum-exp for all rows; nothing else is written."""
    out_partial, lse_partial = inputs((3, 2, 4, 2, 8))
    lse_partial = np.broadcast_to(lse_partial[:, :1, :1], lse_partial.shape)
    exact, exact_lse = reference.combine(out_partial, lse_partial)
    strided = np.ascontiguousarray(out_partial.transpose(1, 2, 3, 4, 0)[..., ::-1, :])
    strided = strided[..., ::-1, :].transpose(4, 0, 1, 2, 3)
    out = np.full((2, 2, 4, 16), 7, np.float32)
    lse = np.full((2, 2, 8), 7, np.float32)
    emulated.combine(
        strided, lse_partial, out[..., ::2].transpose(0, 2, 1, 3), lse[..., ::2].transpose(0, 2, 1)
    )
    assert_close(out[..., ::2].astype(np.float64), exact.transpose(0, 2, 1, 3), BASE["float32"])
    assert_close(lse[..., ::2].astype(np.float64), exact_lse.transpose(0, 2, 1), LSE, "lse")
    assert (out[..., 1::2] == 7).all()
    assert (lse[..., 1::2] == 7).all()


def test_one_part_keeps_its_bits() -> None:
    out_partial, lse_partial = inputs((1, 2, 5, 3, 40))
    out, lse = combine(out_partial, lse_partial)
    assert_same_bits(out.view(np.uint32), out_partial[0].view(np.uint32))
    assert_same_bits(lse.view(np.uint32), lse_partial[0].view(np.uint32), "lse")


def test_every_element_is_read_once() -> None:
    out_partial, lse_partial = inputs((6, 2, 5, 3, 128), "float16")
    with emulated.counting() as counters:
        combine(out_partial, lse_partial, "float16")
    (kernel,) = counters
    assert kernel.buffer_bytes_read[0] == out_partial.nbytes
    assert kernel.buffer_bytes_written[2] == out_partial.nbytes // 6
    assert kernel.buffer_bytes_written[3] == lse_partial.nbytes // 6
    assert kernel.threadgroup_barriers == 0


@pytest.mark.parametrize("shape", [(2, 0, 4, 2, 8), (2, 1, 0, 2, 8), (2, 5, 0, 8)])
def test_nothing_to_merge(shape: tuple[int, ...]) -> None:
    combine(*inputs(shape))
    assert emulated.last_plan["launches"] == []


def test_without_function_constants() -> None:
    """As PyTorch and MLX launch it: there are none, so that its bits are the same."""
    ours = inputs((3, 2, 4, 2, 20))
    usual = combine(*ours)
    emulated.settings.function_constants = False
    for a, b in zip(combine(*ours), usual, strict=True):
        assert_same_bits(a.view(np.uint32), b.view(np.uint32))
