"""Problems with any two features together, on shapes drawn at random, against the reference.

Whatever can go together does: each case has its two features, and each of the others with some
probability. The cases are the same in every run; one is repeated by ``check(first, second, seed)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import umfa
from tests import reference
from tests.array_libraries import DTYPES, Array
from tests.attend import call_on
from tests.checks import BASE, LSE, Tolerance, assert_close
from tests.sequences import offsets, paged, rotary_tables, rotated, slopes_of, unpaged

FEATURES = [
    "causal", "window", "softcap", "alibi", "bool mask", "float mask", "gqa", "value head dim",
    "sinks", "chunk", "varlen", "paged", "append", "rotary", "rope", "dropout", "qv", "num_splits",
    "float16", "bfloat16", "lse", "few queries", "top left",
    "prefix", "batch invariant", "mixed dtypes", "out_dtype",
]  # fmt: skip
APART = [
    {"bool mask", "float mask"},
    *(set(two) for two in itertools.combinations(("float16", "bfloat16", "mixed dtypes"), 2)),
    # flash_attn_varlen_func does not append, and rotates only what is appended.
    *({"varlen", x} for x in ("append", "rotary", "num_splits")),
    # flash_attn_with_kvcache has no dropout.
    *({"dropout", x} for x in ("append", "rotary", "num_splits")),
    # fused_rope_attention takes dense tensors.
    *({"rope", x} for x in ("varlen", "paged", "append", "rotary", "num_splits")),
]
PAIRS = [pair for pair in itertools.combinations(FEATURES, 2) if set(pair) not in APART]
# umfa rotates in float32, and rounding to the dtype may then fall on the other side.
ROTATED_LSE = {"float32": 3e-5, "float16": 1e-3, "bfloat16": 8e-3}


PER_CALL = {
    "alibi_slopes",
    "causal_alignment",
    "prefix_lens",
    "batch_invariant",
    "out_dtype",
}  # other words for the reference


def drawn_features(
    pair: tuple[str, str], rng: np.random.Generator, features: Sequence[str] = FEATURES
) -> set[str]:
    found = set(pair)
    for feature in rng.permutation(features):
        fits = not any(feature in two and two & found - {feature} for two in APART)
        if fits and rng.random() < 0.15:
            found.add(str(feature))
    if "rotary" in found:
        found.add("append")
    if {"dropout", "paged"} <= found:  # the one function that has both
        found.add("varlen")
    return found


@dataclass
class Problem:
    """Sequences one by one, and the options for all of them."""

    features: set[str]
    rng: np.random.Generator
    dtypes: dict[str, str]  # of "q", "k", "v", what is appended ("k new", "v new") and "out"
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
        return (
            f"{sorted(self.features)} {shape} d{self.head_dim}/{self.head_dim_v} "
            f"{list(self.dtypes.values())} {options}"
        )

    def normal(self, tensor: str, *shape: int) -> Array:
        kind = DTYPES[self.dtypes[tensor]]
        return self.rng.standard_normal(shape, dtype=np.float32).astype(kind)

    def narrowest(self, *tensors: str) -> str:
        """The least precise dtype of these tensors."""
        return max((self.dtypes[x] for x in tensors), key=lambda x: BASE[x].rtol)


def drawn(features: set[str], rng: np.random.Generator, most: int) -> Problem:
    """A problem with up to `most` keys."""

    def integer(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    batch, heads_k = integer(1, 3), integer(1, 3)
    heads = heads_k * (integer(2, 4) if "gqa" in features else 1)
    head_dim = integer(2, 40) if rng.random() < 0.7 else int(rng.choice([64, 80, 128]))
    head_dim_v = head_dim
    while "value head dim" in features and head_dim_v == head_dim:
        head_dim_v = integer(1, 70)
    varied = bool({"varlen", "append", "paged", "num_splits"} & features)

    def lengths(low: int, high: int) -> list[int]:
        if not varied:
            return [integer(low, high)] * batch
        return [integer(low, high) if rng.random() < 0.9 else 0 for _ in range(batch)]

    lengths_q = lengths(1, 4) if "few queries" in features else lengths(17, 90)
    if "varlen" not in features:
        lengths_q = [max(lengths_q)] * batch
    lengths_k = lengths(most // 2, most) if rng.random() < 0.1 else lengths(1, 200)
    if "rope" in features:  # a position for each query
        lengths_k = [max(k, q) for k, q in zip(lengths_k, lengths_q, strict=True)]
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
        if rng.random() < 0.5:
            options["attention_chunk_offset"] = integer(-100, 200)
    if "dropout" in features:
        options["dropout_p"] = float(rng.uniform(0.05, 0.8))
        options["dropout_seed"] = int(rng.integers(0, 2**63))
        options["dropout_offset"] = integer(0, 5)
    if "top left" in features:
        options["causal_alignment"] = "top_left"
    if "batch invariant" in features:
        options["batch_invariant"] = True
    if "prefix" in features:
        kind = np.int64 if rng.random() < 0.5 else np.int32
        options["prefix_lens"] = rng.integers(0, 120, batch).astype(kind)
    if rng.random() < 0.3:
        options["softmax_scale"] = float(rng.uniform(-0.4, 0.4))
    (dtype,) = {"float16", "bfloat16"} & features or {"float32"}
    dtypes = dict.fromkeys(("q", "k", "v", "k new", "v new"), dtype)
    if "mixed dtypes" in features:
        dtypes = {name: str(rng.choice(list(DTYPES))) for name in dtypes}
    dtypes["out"] = dtypes["q"]
    if "out_dtype" in features:
        options["out_dtype"] = dtypes["out"] = str(rng.choice(list(DTYPES)))
    return Problem(
        features, rng, dtypes, lengths_q, lengths_k, new_rows, heads, heads_k, head_dim,
        head_dim_v, options,
    )  # fmt: skip


@dataclass
class Found:
    """What umfa gave, sequence by sequence, and what it was given."""

    out: list[Array]  # (seqlen_q, heads, head_dim_v)
    lse: list[Array] | None  # (heads, seqlen_q)
    tensors: list[tuple[Array, Array, Array]]  # of each sequence, without the batch
    masks: Array | None = None  # that broadcasts to (batch, heads, longest q, longest k)
    qv: list[Array] | None = None


def drawn_mask(problem: Problem, beyond: bool) -> dict[str, Array]:
    """As arguments; `beyond`: the mask may go on where the longest sequence ends."""
    rng, batch = problem.rng, len(problem.lengths_q)
    if not {"bool mask", "float mask"} & problem.features:
        return {}
    more = int(rng.integers(0, 4)) if beyond else 0
    keys = max(problem.lengths_k) + problem.new_rows + more
    full = (batch, problem.heads, max(problem.lengths_q), keys)
    shape = [n if rng.random() < 0.6 else 1 for n in full]
    if shape[0] == 1 and rng.random() < 0.5:
        shape = shape[1:]
    seen = rng.random(shape) < 0.8
    if "bool mask" in problem.features:
        return {"attn_mask": seen}
    bias = np.where(seen, rng.standard_normal(shape), -np.inf)
    return {
        "attn_mask": bias.astype(DTYPES["float32" if rng.random() < 0.5 else problem.dtypes["q"]])
    }


def drawn_qv(problem: Problem, *shape: int) -> dict[str, Array]:
    if "qv" not in problem.features:
        return {}
    return {"qv": problem.normal("q", *shape, problem.heads, problem.head_dim_v)}


def dense(problem: Problem, backend: str) -> Found:
    batch, lse = len(problem.lengths_q), "lse" in problem.features
    rows, keys = problem.lengths_q[0], problem.lengths_k[0]
    q = problem.normal("q", batch, rows, problem.heads, problem.head_dim)
    k = problem.normal("k", batch, keys, problem.heads_k, problem.head_dim)
    v = problem.normal("v", batch, keys, problem.heads_k, problem.head_dim_v)
    more = drawn_mask(problem, beyond=False) | drawn_qv(problem, batch, rows)
    function, tensors, turned_q, turned_k = umfa.flash_attn_func, [q, k, v], q, k
    if "rope" in problem.features:
        function = umfa.fused_rope_attention
        cos, sin = rotary_tables(keys, 2 * int(problem.rng.integers(1, problem.head_dim // 2 + 1)))
        interleaved = bool(problem.rng.random() < 0.5)
        at = np.arange(keys)
        at_q = at[:rows] if "top left" in problem.features else at[keys - rows :]
        turned_q = rotated(q, cos, sin, at_q, interleaved=interleaved)
        turned_k = rotated(k, cos, sin, at, interleaved=interleaved)
        tensors += [cos, sin]
        more["rotary_interleaved"] = interleaved
    found = call_on(backend, function, *tensors, return_lse=lse, **more, **problem.options)
    out, lses = found if isinstance(found, tuple) else (found, None)
    given = [(turned_q[b], turned_k[b], v[b]) for b in range(batch)]
    qv = more.get("qv")
    return Found(list(out), lses, given, more.get("attn_mask"), None if qv is None else list(qv))


def cut(packed: Array, starts: Array) -> list[Array]:
    return [packed[a:b] for a, b in itertools.pairwise(starts)]


def varlen(problem: Problem, backend: str) -> Found:
    lse = "lse" in problem.features
    cu_q, cu_k = offsets(problem.lengths_q), offsets(problem.lengths_k, np.int64)
    q = problem.normal("q", int(cu_q[-1]) + 2, problem.heads, problem.head_dim)
    k = problem.normal("k", int(cu_k[-1]) + 1, problem.heads_k, problem.head_dim)
    v = problem.normal("v", int(cu_k[-1]) + 1, problem.heads_k, problem.head_dim_v)
    more = drawn_mask(problem, beyond=True) | drawn_qv(problem, len(q))
    tensors = [q, k, v]
    if "paged" in problem.features:
        rows = max(*problem.lengths_k, 1)
        batch = len(problem.lengths_k)
        whole = [np.full((batch, rows, *x.shape[1:]), np.nan, x.dtype) for x in (k, v)]
        for wide, x in zip(whole, (k, v), strict=True):
            for b, part in enumerate(cut(x, cu_k)):
                wide[b, : len(part)] = part
        pages, more["block_table"] = paged(whole, int(problem.rng.integers(1, 40)))
        tensors[1:] = pages
    found = call_on(
        backend, umfa.flash_attn_varlen_func, *tensors, cu_q, cu_k, max(problem.lengths_q),
        max(problem.lengths_k), return_lse=lse, **more, **problem.options,
    )  # fmt: skip
    out, lses = found if isinstance(found, tuple) else (found, None)
    assert not out[cu_q[-1] :].any()
    given = list(zip(cut(q, cu_q), cut(k, cu_k), cut(v, cu_k), strict=True))
    return Found(
        cut(out, cu_q),
        None if lses is None else [x.T for x in cut(lses.T, cu_q)],
        given,
        more.get("attn_mask"),
        cut(more["qv"], cu_q) if "qv" in more else None,
    )


def cached(problem: Problem, backend: str) -> Found:
    rng, batch, lse = problem.rng, len(problem.lengths_q), "lse" in problem.features
    used, new_rows = np.array(problem.lengths_k), problem.new_rows
    rows = int(used.max()) + new_rows + int(rng.integers(0, 3)) or 1
    q = problem.normal("q", batch, problem.lengths_q[0], problem.heads, problem.head_dim)
    k_cache = problem.normal("k", batch, rows, problem.heads_k, problem.head_dim)
    v_cache = problem.normal("v", batch, rows, problem.heads_k, problem.head_dim_v)
    for b in range(batch):
        k_cache[b, used[b] :] = v_cache[b, used[b] :] = np.nan
    after_k, after_v = k_cache.copy(), v_cache.copy()
    tensors, turned = [q, k_cache, v_cache], q
    more = drawn_mask(problem, beyond=True) | drawn_qv(problem, *q.shape[:2])
    if "num_splits" in problem.features:
        more["num_splits"] = int(rng.integers(0, 9))
    table = None
    if "paged" in problem.features:
        tensors[1:], table = paged([k_cache, v_cache], int(rng.integers(1, 40)))
        more["block_table"] = table
    if "append" in problem.features:
        k = problem.normal("k new", batch, new_rows, problem.heads_k, problem.head_dim)
        v = problem.normal("v new", batch, new_rows, problem.heads_k, problem.head_dim_v)
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
            # Rounded once, to the cache's dtype.
            k = rotated(k.astype(np.float64), cos, sin, positions, interleaved=interleaved)
        for b in range(batch):
            after_k[b, used[b] : used[b] + new_rows] = k[b]
            after_v[b, used[b] : used[b] + new_rows] = v[b]
    found = call_on(
        backend, umfa.flash_attn_with_kvcache, *tensors, cache_seqlens=used,
        return_softmax_lse=lse, **more, **problem.options,
    )  # fmt: skip
    if table is not None:
        k_cache, v_cache = (unpaged(x, table, rows) for x in tensors[1:3])
    else:
        k_cache, v_cache = tensors[1:3]
    ends = used + new_rows
    for b in range(batch):
        assert_close(
            k_cache[b, : ends[b]].astype(np.float64),
            after_k[b, : ends[b]].astype(np.float64),
            BASE[problem.dtypes["k"]],
            "k_cache",
        )
        assert v_cache[b, : ends[b]].tobytes() == after_v[b, : ends[b]].tobytes()
        assert np.isnan(k_cache[b, ends[b] :].astype(np.float32)).all()
    given = [(turned[b], k_cache[b, : ends[b]], v_cache[b, : ends[b]]) for b in range(batch)]
    out, lses = found if isinstance(found, tuple) else (found, None)
    qv = more.get("qv")
    return Found(list(out), lses, given, more.get("attn_mask"), None if qv is None else list(qv))


def check(first: str, second: str, seed: int, backend: str = "cpu") -> None:
    rng = np.random.default_rng([FEATURES.index(first), FEATURES.index(second), seed])
    most = 1100 if backend == "cpu" else 400
    problem = drawn(drawn_features((first, second), rng), rng, most)
    features, batch = problem.features, len(problem.lengths_q)
    with_cache = {"append", "paged", "num_splits"} & features
    way = varlen if "varlen" in features else cached if with_cache else dense
    options = {k: x for k, x in problem.options.items() if k not in PER_CALL}
    if "top left" in features:
        options["alignment"] = "upper_left"
    turned = {"rotary", "rope"} & features
    rotated_to = problem.narrowest("q", "k")
    lse_tolerance = Tolerance(ROTATED_LSE[rotated_to] if turned else LSE.atol, 1e-6)
    # What is kept is larger by the share of what is not, its error too.
    rounded_to = problem.narrowest("q", "k", "out") if turned else problem.dtypes["out"]
    base, kept = BASE[rounded_to], 1 - problem.options.get("dropout_p", 0.0)
    tolerance = Tolerance(base.atol / kept, base.rtol)
    try:
        found = way(problem, backend)
        masks = None
        if found.masks is not None:
            longest = max(problem.lengths_q), max(problem.lengths_k) + problem.new_rows
            columns = max(longest[1], found.masks.shape[-1])
            masks = np.broadcast_to(found.masks, (batch, problem.heads, longest[0], columns))
        for b, (query, key, value) in enumerate(found.tensors):
            out, lse = reference.attention(
                query[None],
                key[None],
                value[None],
                alibi_slopes=slopes_of(problem.options.get("alibi_slopes"), b),
                mask=None if masks is None else masks[b, :, : len(query), : len(key)],
                qv=None if found.qv is None else found.qv[b][None],
                first_index=b,
                prefix_len=int(problem.options.get("prefix_lens", [0] * batch)[b]),
                **options,
            )
            assert_close(found.out[b].astype(np.float64), out[0], tolerance, f"out {b}")
            if found.lse is not None:
                assert_close(found.lse[b].astype(np.float64), lse[0], lse_tolerance, f"lse {b}")
    except Exception as error:
        raise AssertionError(
            f"check({first!r}, {second!r}, {seed}, {backend!r}): {problem}"
        ) from error
