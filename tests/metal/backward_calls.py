"""Attention calls whose gradients the tests take: sequences, options, and the float64 answers."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from tests import reference
from tests.array_libraries import DTYPES, Array
from tests.checks import BASE, Tolerance, assert_close
from tests.metal import emulated
from tests.sequences import offsets, rotated, slopes_of
from umfa import _ext

FUNCTION = _ext.Function("umfa.test", query="q", key="k", value="v")
PER_CALL = {
    "rotary_cos",
    "rotary_sin",
    "rotary_interleaved",
    "alibi_slopes",
    "attn_mask",
    "causal_alignment",
    "prefix_lens",
}
"""Options that the reference takes in other words, or for one sequence."""


TOLERANCES = BASE | {"bfloat16": Tolerance(1e-2, 8e-3)}
"""Those of a forward pass; in bfloat16 P, dS and the given out are each rounded to eight bits."""


@dataclass
class Call:
    """One call: sequences of these lengths, packed unless they are all the same."""

    lengths_q: list[int] = field(default_factory=lambda: [70])
    lengths_k: list[int] = field(default_factory=lambda: [100])
    heads: int = 2
    heads_k: int = 1
    head_dim: int = 64
    head_dim_v: int = 0
    """0: as head_dim."""
    dtype: str = "float32"
    dtypes: dict[str, str] = field(default_factory=dict)
    """Of "query", "key", "value", "out" or "dout", where they are not `dtype`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the record, tensors among them."""
    has_qv: bool = False
    packed: bool = False
    dlse: bool = False
    factor: float = 1.0
    """On dout."""
    seed: int = 0

    def __post_init__(self) -> None:
        self.head_dim_v = self.head_dim_v or self.head_dim
        self.packed = self.packed or len({*self.lengths_q}) > 1 or len({*self.lengths_k}) > 1
        rng = np.random.default_rng(self.seed)
        draw = rng.standard_normal
        q, k = self.lengths_q, self.lengths_k
        shapes = {
            "query": (q, self.heads, self.head_dim),
            "key": (k, self.heads_k, self.head_dim),
            "value": (k, self.heads_k, self.head_dim_v),
            "dout": (q, self.heads, self.head_dim_v),
        }
        if self.has_qv:
            shapes["qv"] = (q, self.heads, self.head_dim_v)
        self.tensors: dict[str, list[Array]] = {
            name: [
                ((self.factor if name == "dout" else 1) * draw((n, *more))).astype(self.kind(name))
                for n in lengths
            ]
            for name, (lengths, *more) in shapes.items()
        }
        self.given_dlse = [draw((self.heads, n)).astype(np.float32) for n in q]
        self.results = [self.forward(b) for b in range(len(q))]

    def kind(self, name: str) -> Any:
        name = "query" if name == "qv" else name
        return DTYPES[self.dtypes.get(name, self.dtype)]

    def changed(self, **fields: Any) -> Call:
        return dataclasses.replace(self, **fields)

    def reference_options(self, b: int) -> dict[str, Any]:
        found = {k: v for k, v in self.options.items() if k not in PER_CALL}
        if self.has_qv:
            found["qv"] = self.tensors["qv"][b][None]
        found["alibi_slopes"] = slopes_of(self.options.get("alibi_slopes"), b)
        if self.options.get("causal_alignment") == "top_left":
            found["alignment"] = "upper_left"
        if "prefix_lens" in self.options:
            found["prefix_len"] = min(int(self.options["prefix_lens"][b]), self.lengths_k[b])
        if "attn_mask" in self.options:
            mask = self.options["attn_mask"]
            own = mask[b : b + 1] if mask.shape[0] > 1 else mask
            rows = self.lengths_q[b] if mask.shape[2] > 1 else 1
            keys = self.lengths_k[b] if mask.shape[3] > 1 else 1
            found["mask"] = own[:, :, :rows, :keys]
        if "dropout_p" in self.options:
            found["first_index"] = b
        return found

    def one(self, b: int, *names: str) -> list[Array]:
        """As attention takes them: queries and keys rotated."""
        return [self.turned(b, name, self.tensors[name][b])[None] for name in names]

    def turned(self, b: int, name: str, rows: Array, *, back: bool = False) -> Array:
        """Rotated where the call rotates; `back`: by the opposite angles."""
        if name not in ("query", "key") or "rotary_cos" not in self.options:
            return rows
        top_left = self.options.get("causal_alignment") == "top_left"
        first = self.lengths_k[b] - self.lengths_q[b] if name == "query" and not top_left else 0
        cos, sin = self.options["rotary_cos"], self.options["rotary_sin"]
        at = np.arange(first, first + len(rows))
        interleaved = self.options.get("rotary_interleaved", True)  # as the core has it
        return rotated(rows, cos, -sin if back else sin, at, interleaved=interleaved)

    def forward(self, b: int) -> tuple[Array, Array]:
        """(out, lse) of one sequence, as the forward pass rounds them."""
        tensors = self.one(b, "query", "key", "value")
        out, lse = reference.attention(*tensors, **self.reference_options(b))
        return out[0].astype(self.kind("out")), lse[0].astype(np.float32)

    def gradients(self, b: int) -> reference.Gradients:
        """Of one sequence."""
        return reference.gradients(
            *self.one(b, "query", "key", "value", "dout"),
            self.given_dlse[b][None] if self.dlse else None,
            given_out=self.results[b][0][None].astype(np.float64),
            **self.reference_options(b),
        )

    def expected(self) -> dict[str, list[Array]]:
        """dq, dk, dv and dqv of each sequence, and the gradients that are sums over all of them."""
        found: dict[str, list[Array]] = {"dq": [], "dk": [], "dv": []}
        if self.has_qv:
            found["dqv"] = []
        own = [self.gradients(b) for b in range(len(self.lengths_q))]
        for name, of in found.items():
            tensor = emulated.GRADIENT_OF[name]
            of += [self.turned(b, tensor, getattr(x, name)[0], back=True)
                   for b, x in enumerate(own)]  # fmt: skip
        slopes = sum_of([one.dalibi_slopes for one in own])
        if np.ndim(self.options.get("alibi_slopes")) == 2:
            slopes = np.stack([one.dalibi_slopes for one in own])
        dmask = np.zeros(np.shape(self.options.get("attn_mask")))
        for b, one in enumerate(own):
            if one.dmask is not None:
                rows, keys = one.dmask.shape[2:]
                dmask[b if dmask.shape[0] > 1 else 0, :, :rows, :keys] += one.dmask[0]
        return found | {
            "dmask": [dmask],
            "dsinks": [sum_of([one.dsinks for one in own])],
            "dalibi_slopes": [slopes],
        }

    # ---- as umfa takes it ------------------------------------------------------------------------

    def joined(self, parts: list[Array], axis: int = 0) -> Array:
        if not self.packed:
            return np.stack(parts)
        more = list(parts[0].shape)
        more[axis] = 2  # rows that belong to no sequence
        return np.concatenate([*parts, np.full(more, np.nan, parts[0].dtype)], axis=axis)

    def record(self) -> tuple[_ext.Attention, tuple[Array, Array, Array, Array | None]]:
        """The call, and (out, lse, dout, dlse)."""
        given = {name: self.joined(x) for name, x in self.tensors.items() if name != "dout"}
        options = dict(self.options)
        if self.packed:
            options["cu_seqlens_q"] = offsets(self.lengths_q)
            options["cu_seqlens_k"] = offsets(self.lengths_k)
        if "out" in self.dtypes:
            options["out_dtype"] = self.dtypes["out"]
        attention = _ext.Attention(FUNCTION, backend="metal", **given, **options)
        out = self.joined([out for out, _ in self.results])
        lse = self.joined([lse for _, lse in self.results], axis=1)
        dlse = self.joined(self.given_dlse, axis=1) if self.dlse else None
        return attention, (out, lse, self.joined(self.tensors["dout"]), dlse)

    def run(self, wanted: tuple[str, ...] = ("dq", "dk", "dv"), **how: Any) -> dict[str, Array]:
        return emulated.backward(*self.record(), wanted, **how)

    def separate(self, name: str, found: Array) -> list[Array]:
        """A gradient's sequences. What lies behind them must be 0."""
        if name not in ("dq", "dk", "dv", "dqv"):
            return [found]
        if not self.packed:
            return list(found)
        starts = offsets(self.lengths_k if name in ("dk", "dv") else self.lengths_q)
        assert (found[starts[-1] :] == 0).all(), f"{name} of rows in no sequence"
        return [found[a:b] for a, b in itertools.pairwise(starts)]

    def tolerance(self, largest: float, dtype: str) -> Tolerance:
        """For numbers of the size of the largest, in a gradient of this dtype."""
        dtypes = (self.dtype, dtype, *self.dtypes.values())
        base = max((TOLERANCES[x] for x in dtypes), key=lambda t: t.rtol)
        return Tolerance(base.atol * max(largest, self.factor), base.rtol)

    def check(self, wanted: tuple[str, ...] = ("dq", "dk", "dv"), **how: Any) -> dict[str, Array]:
        found, expected = self.run(wanted, **how), self.expected()
        for name, array in found.items():
            for own, right in zip(self.separate(name, array), expected[name], strict=True):
                largest = float(np.abs(right).max(initial=0))
                assert_close(
                    own.astype(np.float64), right, self.tolerance(largest, str(own.dtype)), name
                )
        return found


def sum_of(parts: list[Any]) -> Array:
    return np.asarray(sum(x for x in parts if x is not None), np.float64)


def bits(array: Array) -> Array:
    """To compare all bits."""
    wide = array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
    return wide.view(np.uint16 if wide.itemsize == 2 else np.uint32)
