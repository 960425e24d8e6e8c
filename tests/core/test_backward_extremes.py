"""The backward pass where numbers are extreme: hidden NaN, huge and tiny gradients, sinks."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests import reference
from tests.array_libraries import DTYPES, Array
from tests.cases import normal
from tests.checks import BASE, assert_close
from tests.gradients import Forward, assert_gradients, wanted_of

SHAPE = (1, 2, 70, 130, 40)


def inputs(dtype: str = "float32") -> tuple[dict[str, Array], Array]:
    batch, heads, seqlen_q, seqlen_k, head_dim = SHAPE
    given = {
        "query": normal((batch, seqlen_q, heads, head_dim), dtype, seed=1),
        "key": normal((batch, seqlen_k, heads, head_dim), dtype, seed=2),
        "value": normal((batch, seqlen_k, heads, head_dim), dtype, seed=3),
    }
    return given, normal((batch, seqlen_q, heads, head_dim), dtype, seed=4)


HIDING: dict[str, dict[str, Any]] = {
    "window": {"window_size": (20, 10), "causal_alignment": "top_left"},  # keys 81 and up
    "bool mask": {"attn_mask": np.arange(130) < 81},
    "float mask": {"attn_mask": np.where(np.arange(130) < 81, 0, -np.inf).astype(np.float32)},
    "bool mask with rows": {"attn_mask": np.tile(np.arange(130) < 81, (70, 1))},
    "float mask with rows": {
        "attn_mask": np.tile(np.where(np.arange(130) < 81, 0, -np.inf), (70, 1)).astype(np.float32)
    },
    "dropout": {"attn_mask": np.arange(130) < 81, "dropout_p": 0.5, "dropout_seed": 1},
    "softcap": {"attn_mask": np.arange(130) < 81, "softcap": 5.0},
}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", HIDING)
def test_hidden_keys_do_not_matter(name: str, dtype: str, bad: float) -> None:
    """The bits are those of finite keys, and theirs have a gradient of 0."""
    given, dout = inputs(dtype)
    given = given | HIDING[name]
    wanted = wanted_of(given)
    clean = Forward(**given).backward(dout, wanted=wanted)
    for operand in ("key", "value"):
        given[operand] = given[operand].copy()
        given[operand][:, 81:] = bad
    found = Forward(**given).backward(dout, wanted=wanted)
    for gradient, array in found.items():
        assert array.tobytes() == clean[gradient].tobytes(), gradient
    assert not found["dk"][:, 81:].any()
    assert not found["dv"][:, 81:].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_stays_with_those_who_see_it(dtype: str) -> None:
    """A key of NaN reaches the rows that see it and the keys that they see, and no others."""
    given, dout = inputs(dtype)
    clean = Forward(**given, attention_chunk=30).backward(dout)
    key = given["key"].copy()
    key[:, 95] = np.nan
    found = Forward(**given | {"key": key}, attention_chunk=30).backward(dout)
    rows = (np.arange(70) + 60) // 30 == 95 // 30
    keys = np.arange(130) // 30 == 95 // 30
    for name, seen in (("dq", rows), ("dk", keys), ("dv", keys)):
        assert np.isnan(found[name][:, seen]).all(), name
        assert found[name][:, ~seen].tobytes() == clean[name][:, ~seen].tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", ["query", "dout"])
def test_nan_of_a_query_stays_with_its_keys(dtype: str, bad: str) -> None:
    """Also beside a query with which it shares a product."""
    given, dout = inputs(dtype)
    call = {"window_size": (9, 0), "causal_alignment": "top_left"}  # query i sees keys i - 9 to i
    clean = Forward(**given, **call).backward(dout)
    row = 40
    changed = dout.copy() if bad == "dout" else given["query"].copy()
    changed[:, row] = np.nan
    if bad == "dout":
        found = Forward(**given, **call).backward(changed)
    else:
        found = Forward(**given | {"query": changed}, **call).backward(dout)
    seen = np.isin(np.arange(130), np.arange(row - 9, row + 1))
    for name, nan in (("dq", np.arange(70) == row), ("dk", seen), ("dv", seen)):
        assert np.isnan(found[name][:, nan]).all(), name
        assert found[name][:, ~nan].tobytes() == clean[name][:, ~nan].tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_see_nothing_add_nothing(dtype: str) -> None:
    """Not even where query, out's gradient or the log-sum-exp's are NaN."""
    given, dout = inputs(dtype)
    dlse = normal((1, 2, 70), seed=5)
    seen = np.arange(70) % 3 != 1
    given |= {"attn_mask": np.broadcast_to(seen[:, None], (70, 130)).copy()}
    clean = Forward(**given).backward(dout, dlse)
    given["query"], dout, dlse = given["query"].copy(), dout.copy(), dlse.copy()
    given["query"][:, ~seen] = dout[:, ~seen] = np.nan
    dlse[:, :, ~seen] = np.nan
    found = Forward(**given).backward(dout, dlse)
    assert not found["dq"][:, ~seen].any()
    for name, array in found.items():
        assert array.tobytes() == clean[name].tobytes(), name
    # None sees any: causal, and more queries than keys.
    short = {name: x[:, :20] if name != "query" else x for name, x in inputs()[0].items()}
    found = Forward(**short, causal=True).backward(np.nan_to_num(dout, nan=1.0))
    assert not found["dq"][:, :50].any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nothing_is_left_of_the_call_before(dtype: str) -> None:
    """Odd numbers of channels, queries and keys, in memory that held NaN."""
    shapes = {"query": (1, 67, 2, 17), "key": (1, 101, 2, 17), "value": (1, 101, 2, 19)}
    given = {name: normal(x, dtype, seed=i) for i, (name, x) in enumerate(shapes.items())}
    dout = normal((1, 67, 2, 19), dtype, seed=4)
    call = Forward(**given)
    clean = call.backward(dout)
    bad, bad_dout = inputs(dtype)
    Forward(**{name: np.full_like(x, np.nan) for name, x in bad.items()}).backward(bad_dout)
    for name, array in call.backward(dout).items():
        assert np.isfinite(array.astype(np.float64)).all(), name
        assert array.tobytes() == clean[name].tobytes(), name


@pytest.mark.parametrize("factor", [2.0**13, 2.0**-16, 2.0**-24])
def test_float16_with_scaled_gradients(factor: float) -> None:
    """Loss scaling: inside there is room for it; in float32 nothing is lost at all."""
    given, dout = inputs("float16")
    scaled = (dout.astype(np.float64) * factor).astype(np.float16)
    call = Forward(**given)
    expected = reference.gradients(*given.values(), scaled)
    wide = call.backward(scaled, float32=True)
    assert_gradients(wide, expected, 2e-3)
    # Rounding to float16 is all that is added: to the nearest, subnormal numbers too.
    for name, array in call.backward(scaled).items():
        assert array.tobytes() == wide[name].astype(np.float16).tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_any_size(dtype: str) -> None:
    """The same bits, but for the exponent: also of loss scaling, which bfloat16 does not need."""
    given, dout = inputs(dtype)
    call = Forward(**given)
    plain = call.backward(dout)
    for factor in (2.0**60, 2.0**16, 2.0**-24, 2.0**-60):
        scale = np.asarray(factor, DTYPES[dtype])
        found = call.backward(dout * scale)
        for name, array in found.items():
            assert array.tobytes() == (plain[name] * scale).tobytes(), name


@pytest.mark.parametrize("logit", [-np.inf, -200.0, 30.0, 1e4])
def test_sinks(logit: float) -> None:
    given, dout = inputs()
    given |= {"learnable_sink": np.array([logit, 0.5], np.float32)}
    found = Forward(**given).backward(dout, wanted=wanted_of(given))
    own = dict(given)
    tensors = [own.pop(name) for name in ("query", "key", "value")]
    expected = reference.gradients(*tensors, dout, **own)
    for name, array in found.items():
        wide = getattr(expected, name)
        for head in range(2):
            at = (head,) if name == "dsinks" else (slice(None), slice(None), head)
            largest = max(float(np.abs(wide[at]).max()), 1e-30)
            error = float(np.abs(array[at] - wide[at]).max())
            assert error <= 3e-5 * largest + 1e-37, f"{name} {head}: {error:.3g} of {largest:.3g}"


def test_large_scores() -> None:
    """Scores of a thousand: probabilities are still right, because the log-sum-exp's float32 is."""
    given, dout = inputs()
    given["query"] = given["query"] * np.float32(30)
    expected = reference.gradients(*given.values(), dout)
    assert_gradients(Forward(**given).backward(dout), expected, 2e-4)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_scores_that_float32_cannot_tell_from_the_log_sum_exp(dtype: str, alibi: bool) -> None:
    """Of such scores a probability may round to 0, but to no more than 1."""
    given, dout = inputs(dtype)
    if alibi:
        given["alibi_slopes"] = np.float32([0.5, 0.25])
    call = Forward(**given, softmax_scale=np.float32(1e30))
    found = call.backward(dout, wanted=("dv",), float32=True)["dv"]
    most = np.abs(dout.astype(np.float64)).sum(axis=1, keepdims=True)
    assert (np.abs(found) <= most * (1 + 1e-6)).all()
    assert found.any()


@pytest.mark.parametrize("of_mask", ["float32", "bfloat16"])
def test_rows_of_the_lowest_number_add_nothing(of_mask: str) -> None:
    """Their output is the mean of the values, but the log-sum-exp does not tell of how many."""
    given, dout = inputs()
    mask = np.zeros((70, 130), DTYPES[of_mask])
    mask[30] = ml_dtypes.finfo(mask.dtype).min
    call = Forward(**given, attn_mask=mask)
    assert_close(call.out[:, 30], given["value"].astype(np.float64).mean(axis=1), BASE["float32"])
    without = dout.copy()
    without[:, 30] = 0
    expected = call.backward(without)
    for name, array in call.backward(dout).items():
        assert array.tobytes() == expected[name].tobytes(), name
    assert not expected["dq"][:, 30].any()
