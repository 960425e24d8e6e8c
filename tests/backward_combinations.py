"""Gradients of problems with any two features together, as combinations.py draws them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from tests import reference
from tests.array_libraries import Array
from tests.attend import BSHD
from tests.combinations import (
    APART,
    FEATURES,
    PER_CALL,
    Problem,
    drawn,
    drawn_features,
    drawn_mask,
    drawn_qv,
)
from tests.gradients import RELATIVE, Forward, compare, wanted_of
from tests.sequences import offsets, rotary_tables, rotated, slopes_of
from umfa import _ext

# Caches that are appended to or paged have no gradients, and one of lse there always is.
BACKWARD_FEATURES = [
    x for x in FEATURES if x not in ("paged", "append", "rotary", "num_splits", "lse")
]
BACKWARD_PAIRS = [
    pair for pair in itertools.combinations(BACKWARD_FEATURES, 2) if set(pair) not in APART
]


class Drawn:
    """A problem's tensors, and where each sequence lies in them."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        rng, heads = problem.rng, problem.heads
        self.lengths = list(zip(problem.lengths_q, problem.lengths_k, strict=True))
        batch = len(self.lengths)
        self.tables: dict[str, Any] = {}
        self.at_q: list[Any] = [(b,) for b in range(batch)]
        self.at_k = self.at_q
        lead: tuple[tuple[int, ...], tuple[int, ...]] = (
            (batch, problem.lengths_q[0]),
            (batch, problem.lengths_k[0]),
        )
        if "varlen" in problem.features:
            cu_q, cu_k = offsets(problem.lengths_q), offsets(problem.lengths_k, np.int64)
            lead = (int(cu_q[-1]) + 2,), (int(cu_k[-1]) + 1,)
            self.at_q = [slice(a, b) for a, b in itertools.pairwise(cu_q)]
            self.at_k = [slice(a, b) for a, b in itertools.pairwise(cu_k)]
            self.tables = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
        self.given: dict[str, Array] = {
            "query": problem.normal("q", *lead[0], heads, problem.head_dim),
            "key": problem.normal("k", *lead[1], problem.heads_k, problem.head_dim),
            "value": problem.normal("v", *lead[1], problem.heads_k, problem.head_dim_v),
        }
        self.given |= drawn_mask(problem, beyond="varlen" in problem.features)
        self.given |= drawn_qv(problem, *lead[0])
        self.dout = problem.normal("out", *lead[0], heads, problem.head_dim_v)
        lse_shape = (heads, *lead[0]) if len(lead[0]) == 1 else (batch, heads, lead[0][1])
        self.dlse = rng.standard_normal(lse_shape).astype(np.float32)
        self.interleaved = bool(rng.random() < 0.5)
        if "rope" in problem.features:
            channels = 2 * int(rng.integers(1, problem.head_dim // 2 + 1))
            cos, sin = rotary_tables(lead[1][1], channels)
            self.tables |= {
                "rotary_cos": cos,
                "rotary_sin": sin,
                "rotary_interleaved": self.interleaved,
            }

    def dlse_of(self, b: int) -> Array:
        return self.dlse[:, self.at_q[b]] if self.dlse.ndim == 2 else self.dlse[b]

    def turned(self, rows: Array, name: str, *, back: bool = False) -> Array:
        """Rows of one sequence, rotated where the call does; `back`: by the opposite angles."""
        if "rope" not in self.problem.features or name not in ("query", "key"):
            return rows
        queries, keys = self.lengths[0]
        first = 0 if name == "key" or "top left" in self.problem.features else keys - queries
        cos, sin = self.tables["rotary_cos"], self.tables["rotary_sin"]
        at = np.arange(first, first + len(rows))
        return rotated(rows, cos, -sin if back else sin, at, interleaved=self.interleaved)


def expected(drawn_problem: Drawn, wanted: tuple[str, ...], out: Array) -> dict[str, Array]:
    """The reference's gradients, sequence by sequence, put together; of what gave `out`."""
    problem, given = drawn_problem.problem, drawn_problem.given
    batch = len(drawn_problem.lengths)
    options = {k: x for k, x in problem.options.items() if k not in PER_CALL}
    if "top left" in problem.features:
        options["alignment"] = "upper_left"
    slopes, mask = problem.options.get("alibi_slopes"), given.get("attn_mask")
    wide = None
    if mask is not None:
        longest = (max(problem.lengths_q), max(problem.lengths_k))
        columns = max(longest[1], mask.shape[-1])
        wide = np.broadcast_to(mask, (batch, problem.heads, longest[0], columns))
    found = {
        name: np.zeros(given[field].shape) for name, field in OF_ROWS.items() if name in wanted
    }
    dmask = np.zeros(wide.shape) if wide is not None else None
    dslopes, dsinks = np.zeros((batch, problem.heads)), np.zeros(problem.heads)
    for b, (queries, keys) in enumerate(drawn_problem.lengths):
        at_q, at_k = drawn_problem.at_q[b], drawn_problem.at_k[b]
        own = {
            name: drawn_problem.turned(given[name][at], name)[None]
            for name, at in (("query", at_q), ("key", at_k), ("value", at_k))
        }
        one = reference.gradients(
            *own.values(),
            drawn_problem.dout[at_q][None],
            drawn_problem.dlse_of(b)[None],
            given_out=np.asarray(out)[at_q][None].astype(np.float64),
            alibi_slopes=slopes_of(slopes, b),
            mask=None if wide is None else wide[b : b + 1, :, :queries, :keys],
            qv=given["qv"][at_q][None] if "qv" in given else None,
            first_index=b,
            prefix_len=min(int(problem.options.get("prefix_lens", [0] * batch)[b]), keys),
            **options,
        )
        for name, gradient in found.items():
            rows = getattr(one, name)[0]
            at = at_q if name in ("dq", "dqv") else at_k
            gradient[at] = drawn_problem.turned(rows, OF_ROWS[name], back=True)
        if dmask is not None and one.dmask is not None:
            dmask[b, :, :queries, :keys] = one.dmask[0]
        if one.dalibi_slopes is not None:
            dslopes[b] = one.dalibi_slopes
        if one.dsinks is not None:
            dsinks += one.dsinks
    if dmask is not None and mask is not None:
        found["dmask"] = reference.summed_to(dmask, mask.shape)
    if slopes is not None:
        found["dalibi_slopes"] = reference.summed_to(dslopes, slopes.shape)
    found["dsinks"] = dsinks
    return found


OF_ROWS = {"dq": "query", "dk": "key", "dv": "value", "dqv": "qv"}


def backward_on_emulator(own: Drawn, call: Forward, wanted: tuple[str, ...]) -> dict[str, Array]:
    """The gradients by the kernels for the GPU, of what the CPU's forward pass has found."""
    from tests.metal import emulated

    given = {**own.given, **own.tables, **own.problem.options}
    attention = _ext.Attention(BSHD, backend="metal", **given)
    return emulated.backward(attention, (call.out, call.lse, own.dout, own.dlse), wanted)


def check(first: str, second: str, seed: int, backend: str = "cpu") -> None:
    on_cpu = backend == "cpu"
    names = BACKWARD_FEATURES
    rng = np.random.default_rng([names.index(first), names.index(second), seed, 1])
    problem = drawn(drawn_features((first, second), rng, names), rng, 700)
    own = Drawn(problem)
    inputs = own.given | {
        name: problem.options[name]
        for name in ("alibi_slopes", "learnable_sink")
        if name in problem.options
    }
    wanted = wanted_of(inputs)
    # What dropout keeps is larger by the share of what it does not. A gradient that cancels to
    # hardly anything has the error of its terms, which are of the order of 1, and for a slope of
    # the order of the distances between queries and keys.
    tolerance = RELATIVE[problem.narrowest("q", "k", "v", "out")]
    tolerance /= 1 - problem.options.get("dropout_p", 0.0)
    try:
        call = Forward(**own.given, **own.tables, **problem.options)
        if on_cpu:
            found = call.backward(own.dout, own.dlse, wanted=wanted)
        else:
            found = backward_on_emulator(own, call, wanted)
        wide = expected(own, wanted, call.out)
        for name, gradient in found.items():
            rounding = RELATIVE[str(gradient.dtype)]
            floor = float(max(*problem.lengths_q, *problem.lengths_k, 1))
            floor = floor if name == "dalibi_slopes" else 1.0
            compare(name, gradient, wide[name], max(tolerance, rounding), floor)
    except Exception as error:
        raise AssertionError(
            f"check({first!r}, {second!r}, {seed}, {backend!r}): {problem}"
        ) from error
