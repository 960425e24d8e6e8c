"""Every two features together, on shapes drawn at random, against the reference.

Whatever can go together does: each case has its two features, and each of the others with some
probability. The cases are the same in every run; one is repeated by ``check(first, second, seed)``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import reference
import umfa
from checks import BASE, LSE, Tolerance, assert_close
from frameworks import DTYPES, Array
from sequences import offsets, paged, rotary_tables, rotated, slopes_of, unpaged
from umfa._attention import run
from umfa._frameworks import framework_of
from umfa._options import make_options

FEATURES = [
    "causal", "window", "softcap", "alibi", "bool mask", "float mask", "gqa", "value head dim",
    "sinks", "chunk", "varlen", "paged", "append", "rotary", "float16", "bfloat16", "lse",
    "few queries",
]  # fmt: skip
APART = [
    {"bool mask", "float mask"},
    {"float16", "bfloat16"},
    # A dense mask is one for dense tensors.
    *({mask, x} for mask in ("bool mask", "float mask") for x in ("varlen", "paged", "append")),
    *({mask, "rotary"} for mask in ("bool mask", "float mask")),
    # flash_attn_varlen_func does not append, and rotates only what is appended.
    {"varlen", "append"},
    {"varlen", "rotary"},
]
PAIRS = [pair for pair in itertools.combinations(FEATURES, 2) if set(pair) not in APART]
# umfa rotates in float32, and rounding to the dtype may then fall on the other side.
ROTATED_LSE = {"float32": 3e-5, "float16": 1e-3, "bfloat16": 8e-3}


def drawn_features(pair: tuple[str, str], rng: np.random.Generator) -> set[str]:
    found = set(pair)
    for feature in rng.permutation(FEATURES):
        fits = not any(feature in two and two & found - {feature} for two in APART)
        if fits and rng.random() < 0.2:
            found.add(str(feature))
    if "rotary" in found:
        found.add("append")
    return found


@dataclass
class Problem:
    """Sequences one by one, and the options for all of them."""

    features: set[str]
    rng: np.random.Generator
    dtype: str
    lengths_q: list[int]
    lengths_k: list[int]  # before anything is appended
    new_rows: int
    heads: int
    heads_k: int
    head_dim: int
    head_dim_v: int
    options: dict[str, Any]

    def __str__(self) -> str:
        shape = f"q{self.lengths_q} k{self.lengths_k}+{self.new_rows} h{self.heads}/{self.heads_k}"
        options = {k: getattr(x, "shape", x) for k, x in self.options.items()}
        return f"{sorted(self.features)} {shape} d{self.head_dim}/{self.head_dim_v} {options}"

    def normal(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[self.dtype])


def drawn(features: set[str], rng: np.random.Generator) -> Problem:
    def integer(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    batch, heads_k = integer(1, 3), integer(1, 3)
    heads = heads_k * (integer(2, 4) if "gqa" in features else 1)
    head_dim = integer(2, 40) if rng.random() < 0.7 else int(rng.choice([64, 80, 128]))
    head_dim_v = head_dim
    while "value head dim" in features and head_dim_v == head_dim:
        head_dim_v = integer(1, 70)
    varied = bool({"varlen", "append", "paged"} & features)

    def lengths(low: int, high: int) -> list[int]:
        if not varied:
            return [integer(low, high)] * batch
        return [integer(low, high) if rng.random() < 0.9 else 0 for _ in range(batch)]

    lengths_q = lengths(1, 4) if "few queries" in features else lengths(17, 90)
    if "varlen" not in features:
        lengths_q = [max(lengths_q)] * batch
    lengths_k = lengths(600, 1100) if rng.random() < 0.1 else lengths(1, 200)
    new_rows = 0
    if "append" in features:
        new_rows = lengths_q[0] if rng.random() < 0.5 else integer(0, 9)

    options: dict[str, Any] = {"causal": "causal" in features}
    if "window" in features:
        options["window_size"] = (integer(-1, 60), integer(-1, 60))
    if "softcap" in features:
        options["softcap"] = float(rng.uniform(1, 30))
    if "alibi" in features:
        shape = (heads,) if rng.random() < 0.5 else (batch, heads)
        options["alibi_slopes"] = rng.uniform(0, 0.5, shape).astype(np.float32)
    if "sinks" in features:
        kind = DTYPES[str(rng.choice(list(DTYPES)))]
        options["learnable_sink"] = (3 * rng.standard_normal(heads)).astype(kind)
    if "chunk" in features:
        options["attention_chunk"] = integer(1, 80)
    if rng.random() < 0.3:
        options["softmax_scale"] = float(rng.uniform(-0.4, 0.4))
    (dtype,) = {"float16", "bfloat16"} & features or {"float32"}
    return Problem(
        features, rng, dtype, lengths_q, lengths_k, new_rows, heads, heads_k, head_dim,
        head_dim_v, options,
    )  # fmt: skip


@dataclass
class Found:
    """What umfa gave, sequence by sequence, and what it was given."""

    out: list[Array]  # (seqlen_q, heads, head_dim_v)
    lse: list[Array] | None  # (heads, seqlen_q)
    tensors: list[tuple[Array, Array, Array]]  # of each sequence, without the batch
    masks: list[Array] | None = None


def drawn_mask(problem: Problem) -> Array:
    rng, batch = problem.rng, len(problem.lengths_q)
    full = (batch, problem.heads, problem.lengths_q[0], problem.lengths_k[0])
    shape = [n if rng.random() < 0.6 else 1 for n in full]
    if shape[0] == 1 and rng.random() < 0.5:
        shape = shape[1:]
    seen = rng.random(shape) < 0.8
    if "bool mask" in problem.features:
        return seen
    bias = np.where(seen, rng.standard_normal(shape), -np.inf)
    return bias.astype(DTYPES["float32" if rng.random() < 0.5 else problem.dtype])


def dense(problem: Problem) -> Found:
    """By the core's common entry: no public function has masks and all of the rest."""
    batch, lse = len(problem.lengths_q), "lse" in problem.features
    q = problem.normal(batch, problem.lengths_q[0], problem.heads, problem.head_dim)
    k = problem.normal(batch, problem.lengths_k[0], problem.heads_k, problem.head_dim)
    v = problem.normal(batch, problem.lengths_k[0], problem.heads_k, problem.head_dim_v)
    tensors = {"q": q, "k": k, "v": v}
    masks = None
    if {"bool mask", "float mask"} & problem.features:
        mask = tensors["attn_mask"] = drawn_mask(problem)
        masks = list(np.broadcast_to(mask, (batch, problem.heads, q.shape[1], k.shape[1]))[:, None])
    for name in ("alibi_slopes", "learnable_sink"):
        if name in problem.options:
            tensors[name] = problem.options[name]
    made = make_options(
        "umfa.flash_attn_func",
        ("q", "k", "v"),
        0.0,
        problem.options.get("softmax_scale"),
        problem.options["causal"],
        problem.options.get("window_size", (-1, -1)),
        problem.options.get("softcap", 0.0),
        False,
        lse,
        "cpu",
        attention_chunk=problem.options.get("attention_chunk", 0),
    )
    results = run(NUMPY, "umfa.flash_attn_func", made, tensors, "cpu")
    given = [(q[b], k[b], v[b]) for b in range(batch)]
    return Found(list(results[0]), list(results[1]) if lse else None, given, masks)


NUMPY: Any = framework_of("umfa", {"q": np.zeros(1)})


def cut(packed: Array, starts: Array) -> list[Array]:
    return [packed[a:b] for a, b in itertools.pairwise(starts)]


def varlen(problem: Problem) -> Found:
    lse = "lse" in problem.features
    cu_q, cu_k = offsets(problem.lengths_q), offsets(problem.lengths_k, np.int64)
    q = problem.normal(int(cu_q[-1]) + 2, problem.heads, problem.head_dim)
    k = problem.normal(int(cu_k[-1]) + 1, problem.heads_k, problem.head_dim)
    v = problem.normal(int(cu_k[-1]) + 1, problem.heads_k, problem.head_dim_v)
    tensors, more = [q, k, v], {}
    if "paged" in problem.features:
        rows = max(*problem.lengths_k, 1)
        batch = len(problem.lengths_k)
        whole = [np.full((batch, rows, *x.shape[1:]), np.nan, x.dtype) for x in (k, v)]
        for wide, x in zip(whole, (k, v), strict=True):
            for b, part in enumerate(cut(x, cu_k)):
                wide[b, : len(part)] = part
        pages, more["block_table"] = paged(whole, int(problem.rng.integers(1, 40)))
        tensors[1:] = pages
    found = umfa.flash_attn_varlen_func(
        *tensors, cu_q, cu_k, max(problem.lengths_q), max(problem.lengths_k),
        return_attn_probs=lse, backend="cpu", **more, **problem.options,
    )  # fmt: skip
    out = found[0] if lse else found
    assert not out[cu_q[-1] :].any()
    given = list(zip(cut(q, cu_q), cut(k, cu_k), cut(v, cu_k), strict=True))
    lses = [x.T for x in cut(found[1].T, cu_q)] if lse else None
    return Found(cut(out, cu_q), lses, given)


def cached(problem: Problem) -> Found:
    rng, batch, lse = problem.rng, len(problem.lengths_q), "lse" in problem.features
    used, new_rows = np.array(problem.lengths_k), problem.new_rows
    rows = int(used.max()) + new_rows + int(rng.integers(0, 3)) or 1
    q = problem.normal(batch, problem.lengths_q[0], problem.heads, problem.head_dim)
    k_cache = problem.normal(batch, rows, problem.heads_k, problem.head_dim)
    v_cache = problem.normal(batch, rows, problem.heads_k, problem.head_dim_v)
    for b in range(batch):
        k_cache[b, used[b] :] = v_cache[b, used[b] :] = np.nan
    after_k, after_v = k_cache.copy(), v_cache.copy()
    tensors, more, turned = [q, k_cache, v_cache], dict(problem.options), q
    table = None
    if "paged" in problem.features:
        tensors[1:], table = paged([k_cache, v_cache], int(rng.integers(1, 40)))
        more["block_table"] = table
    if "append" in problem.features:
        k = problem.normal(batch, new_rows, problem.heads_k, problem.head_dim)
        v = problem.normal(batch, new_rows, problem.heads_k, problem.head_dim_v)
        tensors += [k, v]
        if "rotary" in problem.features:
            rotary_dim = 2 * int(rng.integers(1, problem.head_dim // 2 + 1))
            cos, sin = rotary_tables(rows + q.shape[1], rotary_dim)
            interleaved = bool(rng.random() < 0.5)
            left, right = problem.options.get("window_size", (-1, -1))
            chunk = problem.options.get("attention_chunk", 0)
            steps = problem.options["causal"] or left >= 0 or right >= 0 or chunk > 0
            positions = used[:, None] + np.arange(q.shape[1]) * steps
            turned = rotated(q, cos, sin, positions, interleaved=interleaved)
            positions = used[:, None] + np.arange(new_rows)
            tensors += [cos, sin]
            more["rotary_interleaved"] = interleaved
            k = rotated(k, cos, sin, positions, interleaved=interleaved)
        for b in range(batch):
            after_k[b, used[b] : used[b] + new_rows] = k[b]
            after_v[b, used[b] : used[b] + new_rows] = v[b]
    found = umfa.flash_attn_with_kvcache(
        *tensors, cache_seqlens=used, return_softmax_lse=lse, backend="cpu", **more
    )
    if table is not None:
        k_cache, v_cache = (unpaged(x, table, rows) for x in tensors[1:3])
    else:
        k_cache, v_cache = tensors[1:3]
    ends = used + new_rows
    for b in range(batch):
        assert_close(
            k_cache[b, : ends[b]].astype(np.float64),
            after_k[b, : ends[b]].astype(np.float64),
            BASE[problem.dtype],
            "k_cache",
        )
        assert v_cache[b, : ends[b]].tobytes() == after_v[b, : ends[b]].tobytes()
        assert np.isnan(k_cache[b, ends[b] :].astype(np.float32)).all()
    given = [(turned[b], k_cache[b, : ends[b]], v_cache[b, : ends[b]]) for b in range(batch)]
    return Found(list(found[0] if lse else found), list(found[1]) if lse else None, given)


def check(first: str, second: str, seed: int) -> None:
    rng = np.random.default_rng([FEATURES.index(first), FEATURES.index(second), seed])
    problem = drawn(drawn_features((first, second), rng), rng)
    features = problem.features
    way = varlen if "varlen" in features else cached if {"append", "paged"} & features else dense
    options = {k: x for k, x in problem.options.items() if k != "alibi_slopes"}
    lse_tolerance = (
        Tolerance(ROTATED_LSE[problem.dtype], 1e-6)
        if "rotary" in features
        else (Tolerance(LSE.atol, 1e-6))
    )
    try:
        found = way(problem)
        for b, (query, key, value) in enumerate(found.tensors):
            out, lse = reference.attention(
                query[None],
                key[None],
                value[None],
                alibi_slopes=slopes_of(problem.options.get("alibi_slopes"), b),
                mask=None if found.masks is None else found.masks[b],
                **options,
            )
            assert_close(found.out[b].astype(np.float64), out[0], BASE[problem.dtype], f"out {b}")
            if found.lse is not None:
                assert_close(found.lse[b].astype(np.float64), lse[0], lse_tolerance, f"lse {b}")
    except Exception as error:
        raise AssertionError(f"check({first!r}, {second!r}, {seed}): {problem}") from error


@pytest.mark.sanitize
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs(pair: tuple[str, str]) -> None:
    for seed in range(3):
        check(*pair, seed)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs_at_length(pair: tuple[str, str]) -> None:
    for seed in range(3, 20):
        check(*pair, seed)


def test_enough_of_them() -> None:
    assert 3 * len(PAIRS) >= 400
    assert 17 * len(PAIRS) >= 2000
    assert {x for pair in PAIRS for x in pair} == set(FEATURES)
