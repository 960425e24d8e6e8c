"""flash_attn_combine: parts of the keys, merged, are attention over all of them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries, reference
from tests.array_libraries import DTYPES, Array, Framework
from tests.cases import normal
from tests.checks import BASE, LSE, Tolerance, assert_close

CUTS = [0, 3, 3, 70, 71, 300]  # parts of every size, an empty one among them


def parts(dtype: str = "float32", packed: bool = False) -> tuple[Array, Array, tuple[Any, Any]]:
    """Partial results and log-sum-exps as float32, and what they must add up to."""
    query = normal((2, 5, 4, 16), dtype, seed=1)
    key, value = normal((2, 300, 2, 16), dtype, seed=2), normal((2, 300, 2, 24), dtype, seed=3)
    found = [
        reference.attention(query, key[:, a:b], value[:, a:b]) for a, b in itertools.pairwise(CUTS)
    ]
    out = np.stack([x for x, _ in found]).astype(np.float32)
    lse = np.stack([x.swapaxes(1, 2) for _, x in found]).astype(np.float32)
    whole, whole_lse = reference.attention(query, key, value)
    whole_lse = whole_lse.swapaxes(1, 2)
    if packed:
        out, lse, whole, whole_lse = (
            x.reshape(*x.shape[:first], -1, *x.shape[first + 2 :])
            for x, first in ((out, 1), (lse, 1), (whole, 0), (whole_lse, 0))
        )
    return out, lse, (whole, whole_lse)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_parts_make_the_whole(packed: bool, framework: Framework) -> None:
    out_partial, lse_partial, (whole, whole_lse) = parts(packed=packed)
    out, lse = umfa.flash_attn_combine(framework.tensor(out_partial), framework.tensor(lse_partial))
    assert isinstance(out, framework.array_type)
    assert isinstance(lse, framework.array_type)
    assert_close(framework.float64(out), whole, BASE["float32"])
    assert_close(framework.float64(lse), whole_lse, LSE, "lse")


def test_of_its_own_results(framework: Framework) -> None:
    query, key = (framework.tensor(normal((1, 3, 2, 8), seed=i)) for i in (1, 2))
    halves = [umfa.flash_attn_func(query, x, x, return_lse=True) for x in (key[:, :1], key[:, 1:])]
    stack = framework.module.stack
    lse_partial = stack([framework.permute(lse, (0, 2, 1)) for _, lse in halves])
    out, _ = umfa.flash_attn_combine(stack([out for out, _ in halves]), lse_partial)
    expected = framework.float64(umfa.flash_attn_func(query, key, key))
    assert_close(framework.float64(out), expected, BASE["float32"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_results_of_another_dtype(dtype: str, framework: Framework) -> None:
    out_partial, lse_partial, (whole, _) = parts()
    ours = framework.tensor(out_partial), framework.tensor(lse_partial)
    kind = framework.tensor(normal((1,), dtype, seed=0)).dtype
    out, lse = umfa.flash_attn_combine(*ours, out_dtype=kind)
    assert framework.dtype_name(out) == dtype
    assert framework.dtype_name(lse) == "float32"
    assert_close(framework.float64(out), whole, BASE[dtype])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_partial_results_of_16_bits(dtype: str, framework: Framework) -> None:
    out_partial, lse_partial, (whole, _) = parts()
    rounded = DTYPES[dtype]
    out, _ = umfa.flash_attn_combine(
        framework.tensor(out_partial.astype(rounded)), framework.tensor(lse_partial)
    )
    assert framework.dtype_name(out) == dtype
    # Every part was rounded once already.
    assert_close(
        framework.float64(out),
        whole,
        Tolerance(2 * BASE[dtype].atol, 2 * BASE[dtype].rtol),
    )


@pytest.mark.parametrize("framework", ["numpy", "torch"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_out_is_written(dtype: str, framework: Framework) -> None:
    out_partial, lse_partial, (whole, _) = parts()
    out = framework.tensor(normal(whole.shape, dtype, seed=9))
    found, _ = umfa.flash_attn_combine(
        framework.tensor(out_partial), framework.tensor(lse_partial), out
    )
    assert found is out
    assert_close(framework.float64(out), whole, BASE[dtype])


@pytest.mark.parametrize("framework", ["jax", "mlx"], indirect=True)
def test_out_that_cannot_be_written(framework: Framework) -> None:
    out_partial, lse_partial, (whole, _) = parts()
    ours = [framework.tensor(x.astype(np.float32)) for x in (out_partial, lse_partial, whole)]
    with pytest.raises(umfa.UnsupportedError, match="out would have to be written in place"):
        umfa.flash_attn_combine(*ours)


def test_a_part_that_saw_nothing_does_not_count(framework: Framework) -> None:
    out_partial, lse_partial, _ = parts()
    out_partial[0, 0], lse_partial[0, 0] = np.nan, -np.inf
    lse_partial[:, 1, 2, 3] = -np.inf
    out, lse = umfa.flash_attn_combine(framework.tensor(out_partial), framework.tensor(lse_partial))
    out, lse = framework.numpy(out), framework.numpy(lse)
    assert np.isfinite(out).all()
    assert (out[1, 2, 3] == 0).all()
    assert lse[1, 2, 3] == -np.inf
    assert np.isfinite(np.delete(lse[1], 2, axis=0)).all()


def test_one_part_is_itself() -> None:
    out_partial, lse_partial, _ = parts()
    out, lse = umfa.flash_attn_combine(out_partial[3:4], lse_partial[3:4])
    assert_close(out.astype(float), out_partial[3].astype(float), BASE["float32"])
    assert_close(lse.astype(float), lse_partial[3].astype(float), LSE, "lse")


ZERO = np.zeros((2, 1, 3, 4, 8), np.float32)
BAD = {
    "no parts": (ZERO[:0], ZERO[:0, ..., 0], ValueError, "(0, 1, 3, 4, 8)"),
    "3 dimensions": (ZERO[0, 0], ZERO[0, 0, ..., 0], ValueError, "(3, 4, 8)"),
    "lse with heads first": (
        ZERO, ZERO[..., 0].swapaxes(2, 3), ValueError, "(2, 1, 4, 3); expected (2, 1, 3, 4)",
    ),
    "lse of float16": (ZERO, ZERO[..., 0].astype("f2"), TypeError, "float16; expected float32"),
    "lse of bool": (ZERO, ZERO[..., 0] == 0, TypeError, "bool; expected float32"),
    "float64": (ZERO.astype("f8"), ZERO[..., 0], umfa.UnsupportedError, "float64"),
    "integers": (ZERO.astype("i4"), ZERO[..., 0], TypeError, "int32"),
    "no tensor": (ZERO, None, TypeError, "lse_partial is not a tensor; got None"),
    "head_dim 513": (
        np.zeros((2, 1, 1, 1, 513), "f4"), np.zeros((2, 1, 1, 1), "f4"), umfa.UnsupportedError,
        "513",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name: str) -> None:
    out_partial, lse_partial, error, text = BAD[name]
    with pytest.raises(error) as caught:
        umfa.flash_attn_combine(out_partial, lse_partial)
    assert str(caught.value).startswith("[umfa.flash_attn_combine] ")
    assert text in str(caught.value)
    possible, reason = umfa.can_run(umfa.flash_attn_combine, out_partial, lse_partial)
    assert not possible
    assert text in reason


def test_bad_out() -> None:
    lse = ZERO[..., 0]
    for out, dtype, error, text in (
        (ZERO, None, ValueError, "out has the wrong shape; got (2, 1, 3, 4, 8)"),
        (ZERO[0].copy(), np.float16, TypeError, "out and out_dtype differ"),
        (ZERO[0].astype(np.int32), None, TypeError, "out has the wrong dtype; got int32"),
        (None, np.float64, TypeError, "out_dtype is wrong; got <class 'numpy.float64'>"),
        (None, "text", TypeError, "out_dtype is wrong; got 'text'"),
        (ZERO[0], None, ValueError, "out overlaps out_partial"),
    ):
        with pytest.raises(error) as caught:
            umfa.flash_attn_combine(ZERO, lse, out, dtype)
        assert text in str(caught.value)
    out = ZERO[0].copy()
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        umfa.flash_attn_combine(ZERO, lse, out)


def test_can_run_and_the_backend() -> None:
    lse = ZERO[..., 0]
    assert umfa.can_run(umfa.flash_attn_combine, ZERO, lse) == (True, "")
    wide = np.broadcast_to(np.zeros((), np.float32), (2, 1, 2**31, 1, 1))
    possible, reason = umfa.can_run(umfa.flash_attn_combine, wide, wide[..., 0], backend="metal")
    assert not possible
    assert "metal: more than 2147483647 parts, or rows" in reason
    for backend in (None, 3):
        with pytest.raises(TypeError, match="backend"):
            umfa.flash_attn_combine(ZERO, lse, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend is unknown; got 'gpu'"):
        umfa.flash_attn_combine(ZERO, lse, backend="gpu")


def test_torch_learns_that_out_was_written() -> None:
    torch = array_libraries.load("torch").module
    out = torch.ones(1, 3, 4, 8)
    before = out._version
    umfa.flash_attn_combine(torch.from_numpy(ZERO), torch.zeros(2, 1, 3, 4), out)
    assert out._version > before
    assert (out == 0).all()


def test_gradients_are_refused() -> None:
    torch = array_libraries.load("torch").module
    partial = torch.zeros(2, 1, 3, 4, 8, requires_grad=True)
    with pytest.raises(umfa.UnsupportedError, match="out_partial requires grad"):
        umfa.flash_attn_combine(partial, torch.zeros(2, 1, 3, 4))
