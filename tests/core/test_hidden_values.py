"""NaN and infinities in values that a query does not see: they do not reach it, on any backend.

A hidden key has the weight 0, and 0 * NaN is NaN, so a product of matrices alone would let it
through. Rows that do not see a bad value have the bits that they have with a zero in its place.
A key with a score of -inf counts as hidden, whatever hides others beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import umfa
from tests.array_libraries import DTYPES, Array
from tests.attend import call_on
from tests.cases import normal
from tests.checks import assert_same_bits
from tests.sequences import offsets, paged
from tests.tiers import crossed

if TYPE_CHECKING:
    from tests.attend import Attend

BATCH, HEADS, HEADS_K, KEYS, HEAD_DIM = 2, 4, 2, 90, 32
BAD = {"nan": [np.nan], "inf": [np.inf], "-inf": [-np.inf], "all": [np.nan, np.inf, -np.inf]}
# Hidden from some rows or from all, alone or beside each other, at the edges of tiles and inside.
PLACES = [0, 3, 7, 8, 31, 32, 33, 60, 61, 62, 88, 89]


@dataclass
class Problem:
    """What is asked, and what each query sees: (batch, seqlen_q, keys)."""

    sees: Array
    function: Any = umfa.flash_attn_func
    options: dict[str, Any] = field(default_factory=dict)
    page_size: int = 0


def band(seqlen_q: int, left: int = KEYS, right: int = KEYS, chunk: int = KEYS) -> Array:
    """What causal, a window and chunks leave visible."""
    positions = np.arange(seqlen_q)[:, None] + KEYS - seqlen_q
    keys = np.arange(KEYS)[None, :]
    shown = (keys >= positions - left) & (keys <= positions + right)
    shown &= positions // chunk == keys // chunk
    return np.broadcast_to(shown, (BATCH, seqlen_q, KEYS))


def masked(kind: str, seqlen_q: int) -> Problem:
    """Masks of `kind`: bool, a dtype, or a bool mask of keys alone ("padding")."""
    shown = np.random.default_rng(7).random((BATCH, 1, seqlen_q, KEYS)) < 0.7
    shown[..., 60:63] = False  # hidden from all
    if kind == "padding":
        shown = shown[:, :, :1]
    mask = shown
    if kind in DTYPES:
        biases = normal(shown.shape, kind, seed=11)
        mask = np.where(shown, biases, np.asarray(-np.inf, biases.dtype))
    sees = np.broadcast_to(shown[:, 0], (BATCH, seqlen_q, KEYS))
    return Problem(sees, options={"attn_mask": mask})


def problem_of(kind: str, seqlen_q: int) -> Problem:
    cache, varlen = umfa.flash_attn_with_kvcache, umfa.flash_attn_varlen_func
    causal = band(seqlen_q, right=0)
    lengths = {"cache_seqlens": np.full(BATCH, KEYS, np.int32)}
    tables = {
        "cu_seqlens_q": offsets([seqlen_q] * BATCH),
        "cu_seqlens_k": offsets([KEYS] * BATCH),
        "max_seqlen_q": seqlen_q,
        "max_seqlen_k": KEYS,
    }
    window = {"window_size": (9, 2)}
    problems = {
        "none": Problem(np.ones((BATCH, seqlen_q, KEYS), bool)),
        "causal": Problem(causal, options={"causal": True}),
        # What is dropped is seen: 0 * NaN.
        "dropout": Problem(causal, options={"causal": True, "dropout_p": 0.5, "dropout_seed": 3}),
        "window": Problem(band(seqlen_q, 9, 2), options=window),
        "chunk": Problem(
            band(seqlen_q, right=0, chunk=24), options={"attention_chunk": 24, "causal": True}
        ),
        "varlen": Problem(causal, varlen, {"causal": True, **tables}),
        "paged": Problem(causal, cache, {"causal": True, **lengths}, page_size=16),
        "paged window": Problem(band(seqlen_q, 9, 2), cache, {**window, **lengths}, page_size=16),
        "splits": Problem(causal, cache, {"causal": True, "num_splits": 4, **lengths}),
    }
    return problems[kind] if kind in problems else masked(kind, seqlen_q)


KINDS = ["causal", "dropout", "window", "chunk", "varlen", "paged", "paged window", "splits"]
MASKS = ["bool", "padding", *DTYPES]


def result(backend: str, problem: Problem, query: Array, key: Array, value: Array) -> Array:
    """(batch, seqlen_q, heads, head_dim), from the layout that the function takes."""
    options = dict(problem.options)
    tensors = [query, key, value]
    if problem.page_size:
        tensors[1:], options["block_table"] = paged([key, value], problem.page_size)
    if problem.function is umfa.flash_attn_varlen_func:
        tensors = [x.reshape(-1, *x.shape[2:]) for x in tensors]
    found = call_on(backend, problem.function, *tensors, **options)
    out = found[0] if isinstance(found, tuple) else found
    return out.reshape(*query.shape[:3], value.shape[3])


def check(
    problem: Problem,
    dtype: str,
    bad: str,
    backend: str,
    head_dim: int = HEAD_DIM,
    head_dim_v: int = HEAD_DIM,
) -> None:
    seqlen_q = problem.sees.shape[1]
    query = normal((BATCH, seqlen_q, HEADS, head_dim), dtype, seed=1)
    key = normal((BATCH, KEYS, HEADS_K, head_dim), dtype, seed=2)
    value = normal((BATCH, KEYS, HEADS_K, head_dim_v), dtype, seed=3)
    poisoned, zeroed = value.copy(), value.copy()
    touched = np.zeros((BATCH, seqlen_q, HEADS_K, head_dim_v), bool)
    for n, place in enumerate(PLACES):
        channel, head = 37 * n % head_dim_v, n % HEADS_K
        poisoned[:, place, head, channel] = BAD[bad][n % len(BAD[bad])]
        zeroed[:, place, head, channel] = 0
        touched[:, :, head, channel] |= problem.sees[:, :, place]
    touched = np.repeat(touched, HEADS // HEADS_K, axis=2)
    found = result(backend, problem, query, key, poisoned)
    clean = result(backend, problem, query, key, zeroed)
    assert not touched.all()
    assert_same_bits(found[~touched], clean[~touched])
    assert not np.isfinite(found[touched].astype(np.float64)).any(), "what is seen comes out"


@pytest.mark.parametrize(
    ("kind", "seqlen_q"),
    crossed([*KINDS, *MASKS], [1, 40, 4, 40], mark=pytest.mark.slow_emulated),
)
def test_hidden_values_touch_nothing(kind: str, seqlen_q: int, attend_numpy: Attend) -> None:
    check(problem_of(kind, seqlen_q), "float32", "all", attend_numpy.backend)


@pytest.mark.slow_emulated
@pytest.mark.parametrize("seqlen_q", [1, 4, 40])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*KINDS, *MASKS])
def test_hidden_values_one_by_one(
    kind: str, dtype: str, bad: str, seqlen_q: int, attend_numpy: Attend
) -> None:
    if attend_numpy.backend == "metal":
        pytest.skip("the kernels are those of metal-emulated")
    check(problem_of(kind, seqlen_q), dtype, bad, attend_numpy.backend)


@pytest.mark.parametrize("seqlen_q", [2, 20])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "head_dim_v"),
    [
        ("float32", 256, 256),  # on Metal, simdgroups share the channels
        pytest.param("float16", 128, 128, marks=pytest.mark.slow_emulated),
        pytest.param("bfloat16", 192, 128, marks=pytest.mark.slow_emulated),
        pytest.param("float16", 256, 250, marks=pytest.mark.slow_emulated),
        pytest.param("float16", 512, 512, marks=pytest.mark.slow_emulated),  # V in K's place
        pytest.param("float32", 576, 512, marks=pytest.mark.slow_emulated),
    ],
)
def test_hidden_values_at_other_head_dims(
    dtype: str, head_dim: int, head_dim_v: int, seqlen_q: int, attend_numpy: Attend
) -> None:
    problem = problem_of("causal", seqlen_q)
    check(problem, dtype, "all", attend_numpy.backend, head_dim, head_dim_v)


@pytest.mark.parametrize("seqlen_q", [2, 20])
@pytest.mark.parametrize("head_dim", [64, pytest.param(576, marks=pytest.mark.slow_emulated)])
def test_hidden_values_of_a_compressed_cache(
    head_dim: int, seqlen_q: int, attend_numpy: Attend
) -> None:
    """`qv` meets the values in the scores, too: what is hidden there stays hidden."""
    problem = problem_of("causal", seqlen_q)
    shape = (BATCH, seqlen_q, HEADS)
    query, qv = normal((*shape, head_dim), seed=1), normal((*shape, 512), seed=4)
    key = normal((BATCH, KEYS, HEADS_K, head_dim), seed=2)
    value = normal((BATCH, KEYS, HEADS_K, 512), seed=3)
    poisoned, zeroed = value.copy(), value.copy()
    poisoned[:, KEYS - 1, :, 7], zeroed[:, KEYS - 1, :, 7] = np.nan, 0
    problem.options["qv"] = qv
    found = result(attend_numpy.backend, problem, query, key, poisoned)
    clean = result(attend_numpy.backend, problem, query, key, zeroed)
    assert_same_bits(found[:, :-1], clean[:, :-1])
    assert np.isnan(found[:, -1]).all(), "a score of NaN is a weight of NaN"


@pytest.mark.parametrize(
    ("kind", "dtype", "seqlen_q"),
    crossed(
        ["none", *KINDS, "bool", "float32"],
        list(DTYPES),
        [1, 40, 4, 40],
        mark=pytest.mark.slow_emulated,
    ),
)
def test_keys_with_a_score_of_minus_infinity_count_as_hidden(
    kind: str, dtype: str, seqlen_q: int, attend_numpy: Attend
) -> None:
    if attend_numpy.backend == "metal":
        pytest.skip("the kernels are those of metal-emulated")
    problem = problem_of(kind, seqlen_q)
    alike = (problem.sees == problem.sees[:, :1]).all() and "attn_mask" not in problem.options
    if attend_numpy.backend == "metal-emulated" and (alike or kind == "splits"):
        pytest.skip("Metal looks for bad values only where it reads keys hidden from some row")
    query = normal((BATCH, seqlen_q, HEADS, HEAD_DIM), dtype, seed=1)
    key, value = (normal((BATCH, KEYS, HEADS_K, HEAD_DIM), dtype, seed=n) for n in (2, 3))
    query[..., 0] = np.abs(query[..., 0]) + query.dtype.type(0.25)
    key[:, PLACES, :, 0] = -np.inf
    poisoned, zeroed = value.copy(), value.copy()
    poisoned[:, PLACES] = np.resize(BAD["all"], (HEAD_DIM,))
    zeroed[:, PLACES] = 0
    found = result(attend_numpy.backend, problem, query, key, poisoned)
    assert_same_bits(found, result(attend_numpy.backend, problem, query, key, zeroed))
    assert np.isfinite(found.astype(np.float64)).all()


@pytest.mark.parametrize("seqlen_q", [1, 3, 130])
def test_rows_with_scores_of_minus_infinity_alone_are_zero(seqlen_q: int) -> None:
    """Beside rows with finite scores, over several tiles."""
    query, key, value = (normal((1, n, 2, 64), seed=n) for n in (seqlen_q, 300, 301))
    value = value[:, :300].copy()
    key[..., 0] = -3e38
    query[..., 0] = 1
    query[:, ::2, :, 0] = 2  # overflows
    value[:, 10], value[:, 290] = np.nan, np.inf
    out, lse, _ = umfa.flash_attn_func(query, key, value, return_attn_probs=True, backend="cpu")
    assert (out[:, ::2] == 0).all()
    assert np.isneginf(lse[:, :, ::2]).all()
    assert np.isnan(out[:, 1::2]).all()
    assert np.isfinite(lse[:, :, 1::2]).all()
