"""Unusual numbers and unusual sizes: NaN, infinities, zeros, subnormals, nothing at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import umfa
from tests import reference
from tests.array_libraries import DTYPES
from tests.cases import Case, expected, inputs, normal
from tests.checks import BASE, LSE, Tolerance, assert_close, assert_same_bits
from tests.tiers import crossed

if TYPE_CHECKING:
    from tests.attend import Attend


@pytest.mark.parametrize(
    ("dtype", "causal", "seqlen_q"),
    crossed(list(DTYPES), [False, True], [1, 5, 70], mark=pytest.mark.slow_emulated),
)
def test_no_keys(dtype: str, causal: bool, seqlen_q: int, attend: Attend) -> None:
    """Rows that see no key return 0, and the logarithm of an empty sum."""
    result = attend.arrays(
        normal((2, seqlen_q, 4, 16), dtype, seed=0),
        normal((2, 0, 2, 16), dtype, seed=1),
        normal((2, 0, 2, 24), dtype, seed=2),
        causal=causal,
    )
    assert result.out.shape == (2, seqlen_q, 4, 24)
    assert (result.out.astype(np.float64) == 0).all()
    assert (result.lse == -np.inf).all()


@pytest.mark.parametrize(
    ("query_shape", "key_shape"),
    [
        ((2, 0, 4, 16), (2, 7, 2, 16)),
        ((0, 5, 4, 16), (0, 7, 2, 16)),
        ((0, 0, 4, 16), (0, 0, 2, 16)),
        ((2, 5, 0, 16), (2, 7, 0, 16)),
    ],
    ids=["no queries", "no batch", "nothing", "no heads"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_queries(
    query_shape: tuple[int, ...], key_shape: tuple[int, ...], dtype: str, attend: Attend
) -> None:
    result = attend.arrays(
        normal(query_shape, dtype, seed=0),
        normal(key_shape, dtype, seed=1),
        normal(key_shape, dtype, seed=2),
        causal=True,
    )
    assert result.out.shape == query_shape  # `attend` has looked at dtype and lse
    assert result.out.size == result.lse.size == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("position", [0, 31, 32, 69])
def test_bad_numbers_in_seen_values_come_out(
    position: int, bad: float, dtype: str, attend: Attend
) -> None:
    """One element of one value row: that channel of every row that sees it, and nothing else."""
    query, key, value = (normal((1, 70, 2, 24), dtype, seed=i) for i in range(3))
    clean = attend.arrays(query, key, value).out
    value[0, position, 1, 5] = bad
    found = attend.arrays(query, key, value).out
    touched = np.zeros(found.shape, dtype=bool)
    touched[0, :, 1, 5] = True
    # inf times a weight that rounds to 0 is NaN; times any other weight it stays inf.
    ours = found.astype(np.float64)
    good = np.isnan(ours) | (ours == bad)
    assert good[touched].all()
    assert (found[~touched] == clean[~touched]).all()


@pytest.mark.parametrize("operand", ["query", "key"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_scores_comes_out(dtype: str, operand: str, attend: Attend) -> None:
    """A maximum that ignores NaN would silently drop the key."""
    arrays = {name: normal((1, 70, 2, 24), dtype, seed=i) for i, name in enumerate("qkv")}
    arrays[operand[0]][0, 33, 1, 7] = np.nan
    result = attend.arrays(arrays["q"], arrays["k"], arrays["v"])
    touched = np.zeros(result.lse.shape, dtype=bool)
    touched[0, 1, slice(33, 34) if operand == "query" else slice(None)] = True
    assert np.isnan(result.lse[touched]).all()
    assert np.isfinite(result.lse[~touched]).all()
    out = result.out.astype(np.float64).transpose(0, 2, 1, 3)
    assert np.isnan(out[touched]).all()
    assert np.isfinite(out[~touched]).all()


@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}, {"causal": True}], ids=str)
def test_nan_as_the_only_seen_key(options: dict[str, object], attend_numpy: Attend) -> None:
    """A row whose only key is NaN sees a key: it is NaN, not an empty row."""
    query, key, value = (normal((1, 40, 1, 16), seed=i) for i in range(3))
    key[0, 0] = np.nan
    result = attend_numpy(query, key, value, **(options | {"causal": True}))
    assert np.isnan(result.out).all()
    assert np.isnan(result.lse).all()


def test_infinite_score_is_not_silent(attend_numpy: Attend) -> None:
    """exp(inf - inf) has no value, so a row with a score of +inf cannot be an ordinary number."""
    query, key, value = (np.abs(normal((1, 40, 1, 16), seed=i)) for i in range(3))
    key[0, 20, 0, 3] = np.inf
    result = attend_numpy(query, key, value)
    assert np.isnan(result.out).all()


def test_scores_of_minus_infinity_weigh_nothing(attend_numpy: Attend) -> None:
    query, key, value = (np.abs(normal((1, 40, 1, 16), seed=i)) for i in range(3))
    without = attend_numpy(query, key[:, 1:], value[:, 1:])
    key[0, 0] = -np.inf  # every score of key 0 is -inf, although the key is seen
    found = attend_numpy(query, key, value)
    assert_close(found.out, without.out, BASE["float32"])
    assert_close(found.lse, without.lse, LSE, "lse")


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_scores_give_the_mean(dtype: str, attend: Attend) -> None:
    query = np.zeros_like(normal((1, 50, 2, 16), dtype, seed=0))
    key, value = (normal((1, 75, 2, 16), dtype, seed=i) for i in (1, 2))
    result = attend.arrays(query, key, value)
    mean = np.broadcast_to(value.astype(np.float64).mean(axis=1, keepdims=True), query.shape)
    assert_close(result.out.astype(np.float64), mean, BASE[dtype])
    assert_close(result.lse, np.full((1, 2, 50), np.log(75)), LSE, "lse")


def test_large_values_do_not_overflow_on_the_way(attend: Attend) -> None:
    """The mean of numbers near the largest float16 is near it too; their plain sum is not."""
    query, key = (normal((1, 64, 1, 16), "float16", seed=i) for i in range(2))
    value = np.full((1, 64, 1, 16), 60000, np.float16)
    result = attend.arrays(query, key, value)
    assert_close(result.out.astype(np.float64), value.astype(np.float64), BASE["float16"])


@pytest.mark.parametrize(("dtype", "factor"), [("float16", 3e-7), ("bfloat16", 1e-38)])
def test_subnormal_values_are_not_flushed(dtype: str, factor: float, attend_numpy: Attend) -> None:
    query, key = (normal((1, 30, 1, 16), dtype, seed=i) for i in range(2))
    value = normal((1, 30, 1, 16), dtype, seed=2, factor=factor)
    result = attend_numpy(query, key, value)
    out, _ = reference.attention(query, key, value)
    spacing = {"float16": 2.0**-24, "bfloat16": 2.0**-133}[dtype]
    # Wide: the point is that tiny inputs do not become 0.
    assert_close(result.out.astype(np.float64), out, Tolerance(spacing, 1e-2))
    assert (result.out != 0).any()


@pytest.mark.parametrize("rise", [30.0, -30.0], ids=["rising", "falling"])
def test_maximum_that_moves_from_tile_to_tile(rise: float, attend_numpy: Attend) -> None:
    """Online softmax rescales when the maximum grows, by factors down to 0."""
    query = np.ones((1, 40, 1, 4), np.float32)
    key = np.zeros((1, 600, 1, 4), np.float32)
    key[0, :, 0, 0] = np.linspace(0, rise, 600)
    value = normal((1, 600, 1, 4), seed=2)
    result = attend_numpy(query, key, value, softmax_scale=8.0)
    out, _ = reference.attention(query, key, value, softmax_scale=8.0)
    assert_close(result.out.astype(np.float64), out, BASE["float32"])


@pytest.mark.cpu_only
def test_out_alone(attend: Attend) -> None:
    """Without return_attn_probs the function returns the same output, and not in a tuple."""
    case = Case((2, 3, 33, 44, 20), "bfloat16")
    fw = attend.framework
    tensors = [fw.tensor(array) for array in inputs(case)]
    out = umfa.flash_attn_func(*tensors, backend=attend.backend)
    assert isinstance(out, fw.array_type)
    assert_same_bits(fw.bits(out), fw.bits(attend(*tensors).out))
    assert_close(fw.float64(out), expected(case)[0], BASE["bfloat16"])


def test_deterministic_and_defaults_spelled_out(attend_numpy: Attend) -> None:
    arrays = [normal((1, 40, 2, 16), seed=i) for i in range(3)]
    defaults = umfa.flash_attn_func(*arrays)
    positional = umfa.flash_attn_func(*arrays, 0.0, None, False, (-1, -1), 0.0, None, True, False)
    spelled = umfa.flash_attn_func(*arrays, softmax_scale=0.25, window_size=[-1, -1])
    assert_same_bits(positional.view("u4"), defaults.view("u4"))
    assert_same_bits(spelled.view("u4"), defaults.view("u4"))
