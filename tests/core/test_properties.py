"""Whatever shape, dtype, mask and memory layout: the answer is that of the reference.

The examples are the same in every run (derandomized): a failure here is a failure everywhere, and
the file takes the same time everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import reference
from tests.array_libraries import DTYPES, Array
from tests.checks import BASE, Tolerance, assert_close, assert_same_bits

if TYPE_CHECKING:
    from tests.attend import Attend

# Four minutes there, most of them compiling kernels for ever new combinations.
pytestmark = pytest.mark.slow_emulated(tier="nightly")

PROFILE = settings(
    deadline=None,  # the first call starts threads; a slow machine is no error
    derandomize=True,
    database=None,
    max_examples=400,
    # `attend_numpy` keeps nothing from one call to the next, so one per test function will do.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Problem(NamedTuple):
    """Views into larger arrays, and the options to call with."""

    query: Array
    key: Array
    value: Array
    options: dict[str, Any]


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...], dtype: str) -> Array:
    """An array of the given shape, somewhere in memory: any axis order, step, direction, offset.

    Each axis may also be an expanded one (stride 0). What lies between the elements of the view is
    NaN, so that a kernel which reads past its row shows.
    """
    order = draw(st.permutations(range(4)))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2])) for _ in shape]
    expanded = [draw(st.integers(0, 9)) == 0 for _ in shape]
    margins = [draw(st.integers(0, 2)) for _ in shape]
    lengths = [1 if e else n for n, e in zip(shape, expanded, strict=True)]
    stored = [m + n * abs(s) + m for m, n, s in zip(margins, lengths, steps, strict=True)]

    memory = np.full([stored[axis] for axis in order], np.nan, dtype=DTYPES[dtype])
    view = memory.transpose(np.argsort(order))
    view = view[
        tuple(slice(m, m + n * abs(s)) for m, n, s in zip(margins, lengths, steps, strict=True))
    ]
    view = view[tuple(slice(None, None, s) for s in steps)]
    assert view.shape == tuple(lengths)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    view[...] = rng.standard_normal(lengths, dtype=np.float32)
    if expanded[3]:
        # All channels alike: without this, dot products would be sqrt(head_dim) times as large as
        # those of independent channels, and so would their rounding.
        view[...] /= view.dtype.type(shape[3] ** 0.25)
    return np.broadcast_to(view, shape)


lengths = st.one_of(st.integers(1, 20), st.integers(21, 140), st.sampled_from([32, 64, 128]))
head_dims = st.one_of(st.integers(1, 24), st.sampled_from([32, 64, 65, 80, 100, 128]))
window_sides = st.one_of(st.just(-1), st.integers(0, 10), st.integers(11, 150))


@st.composite
def problems(draw: st.DrawFn, dtype: str) -> Problem:
    batch = draw(st.integers(1, 3))
    heads_k = draw(st.integers(1, 3))
    heads = heads_k * draw(st.integers(1, 4))
    seqlen_q, seqlen_k = draw(lengths), draw(lengths)
    head_dim = draw(head_dims)
    head_dim_v = draw(st.one_of(st.just(head_dim), head_dims))
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["causal"] = True
    if draw(st.integers(0, 2)) == 0:
        options["window_size"] = (draw(window_sides), draw(window_sides))
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.floats(0.5, 60))
    if draw(st.integers(0, 3)) == 0:
        options["softmax_scale"] = draw(st.floats(-0.5, 0.5))
    if draw(st.integers(0, 3)) == 0:
        shape = draw(st.sampled_from([(heads,), (batch, heads)]))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        options["alibi_slopes"] = rng.uniform(-0.05, 0.5, shape).astype(np.float32)
    return Problem(
        draw(views((batch, seqlen_q, heads, head_dim), dtype)),
        draw(views((batch, seqlen_k, heads_k, head_dim), dtype)),
        draw(views((batch, seqlen_k, heads_k, head_dim_v), dtype)),
        options,
    )


def largest_bias(problem: Problem) -> float:
    slopes = problem.options.get("alibi_slopes", np.zeros(1))
    return float(np.abs(slopes).max() * (problem.query.shape[1] + problem.key.shape[1]))


@PROFILE
@given(problem=st.sampled_from(list(DTYPES)).flatmap(problems))
def test_equals_the_reference(problem: Problem, attend_numpy: Attend) -> None:
    query, key, value, options = problem
    found = attend_numpy(query, key, value, **options)
    out, lse = reference.attention(query, key, value, **options)
    assert_close(found.out.astype(np.float64), out, BASE[query.dtype.name])
    # float32 holds a log-sum-exp of 100 to 4e-6; biases make it that large.
    rtol = 1e-6 if largest_bias(problem) > 10 else 0.0
    assert_close(found.lse.astype(np.float64), lse, Tolerance(2e-5, rtol), "lse")


def bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


@settings(PROFILE, max_examples=150)
@given(problem=st.sampled_from(list(DTYPES)).flatmap(problems))
def test_memory_layout_changes_no_bit(problem: Problem, attend_numpy: Attend) -> None:
    query, key, value, options = problem
    of_views = attend_numpy(query, key, value, **options)
    of_copies = attend_numpy(*map(np.ascontiguousarray, (query, key, value)), **options)
    assert_same_bits(bits(of_views.out), bits(of_copies.out))
    assert_same_bits(bits(of_views.lse), bits(of_copies.lse), "lse")


@pytest.mark.slow_emulated
@settings(PROFILE, max_examples=100)
@given(problem=st.sampled_from(list(DTYPES)).flatmap(problems), data=st.data())
def test_what_a_row_does_not_see_changes_no_bit(
    problem: Problem, data: st.DataObject, attend_numpy: Attend
) -> None:
    query, key, value, options = problem
    seqlen_q, seqlen_k = query.shape[1], key.shape[1]
    clean = attend_numpy(query, key, value, **options)
    position = data.draw(st.integers(0, seqlen_k - 1))
    key, value = key.copy(), value.copy()
    key[:, position] = data.draw(st.sampled_from([np.nan, np.inf, 1e4]))
    value[:, position] = data.draw(st.sampled_from([np.nan, np.inf, 1e4]))
    found = attend_numpy(query, key, value, **options)
    sees = reference.visible(
        np.arange(seqlen_q) + seqlen_k - seqlen_q,
        seqlen_k,
        causal=options.get("causal", False),
        window_size=options.get("window_size", (-1, -1)),
    )
    unaffected = ~sees[:, position]
    assert_same_bits(bits(found.out[:, unaffected]), bits(clean.out[:, unaffected]))
    assert_same_bits(bits(found.lse[:, :, unaffected]), bits(clean.lse[:, :, unaffected]), "lse")


@settings(PROFILE, max_examples=100)
@given(problem=problems("float32"), data=st.data())
def test_keys_in_any_order(problem: Problem, data: st.DataObject, attend_numpy: Attend) -> None:
    """Without masks and positions, attention does not know where a key stands."""
    options = {k: x for k, x in problem.options.items() if k in ("softcap", "softmax_scale")}
    order = data.draw(st.permutations(range(problem.key.shape[1])))
    straight = attend_numpy(problem.query, problem.key, problem.value, **options)
    shuffled = attend_numpy(
        problem.query, problem.key[:, order], problem.value[:, order], **options
    )
    # Each of the two may be off by half the tolerance of a comparison with the exact answer.
    assert_close(shuffled.out, straight.out, BASE["float32"])
    assert_close(shuffled.lse, straight.lse, Tolerance(2e-5, 0.0), "lse")
