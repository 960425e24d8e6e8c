"""Where the tensors of a case lie: shapes, strides and sizes, the same for planner and runner."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .cases import Case
from .codes import FIELDS, format_of

ITEM_BYTES = {"bool": 1, "int8": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
STORAGE = {
    "bool": np.uint8, "int8": np.int8, "uint8": np.uint8, "float16": np.float16,
    "bfloat16": np.uint16, "float32": np.float32,
}  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """A view of a buffer of its own. Numbers of elements, not bytes."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    size: int  # of the buffer

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    def view(self, buffer: np.ndarray) -> np.ndarray:
        """The tensor in its buffer."""
        strides = tuple(s * buffer.itemsize for s in self.strides)
        return np.lib.stride_tricks.as_strided(buffer[self.start :], self.shape, strides)


def placements(case: Case) -> dict[str, Placement]:
    """By the names in a plan's table of tensors."""
    c = case
    found = {
        "query": _tensor(c, c.seqlen_q, c.heads, c.head_dim, 0),
        "key": _tensor(c, c.seqlen_k, c.heads_k, c.head_dim, 1),
        "value": _tensor(c, c.seqlen_k, c.heads_k, c.head_dim_v, 2),
        "out": _tensor(c, c.seqlen_q, c.heads, c.head_dim_v, 0),
    }
    if c.qv:
        found["qv"] = _tensor(c, c.seqlen_q, c.heads, c.head_dim_v, 0)
    if c.rotary:
        # Queries of a cache stand behind it, others where the last keys do.
        positions = c.seqlen_k + c.seqlen_q
        for name in ("rotary_cos", "rotary_sin"):
            found[name] = _contiguous("float32", (positions, rotary_channels(c) // 2))
    for i, (name, columns) in enumerate((("key", c.head_dim), ("value", c.head_dim_v)), 1):
        if c.new_rows:
            found[f"new_{name}"] = _tensor(c, c.new_rows, c.heads_k, columns, i)
            if c.page_size:
                found[name] = _pages(c, columns, i)
    if c.sinks:
        found["learnable_sink"] = _contiguous("float32", (c.heads,))
    if c.seqlens_q:
        found |= _packed(c)
    elif c.lse:
        found["lse"] = _contiguous("float32", (c.batch, c.heads, c.seqlen_q))
    if c.alibi:
        found["alibi_slopes"] = _contiguous("float32", (c.batch, c.heads))
    if c.mask:
        full = (c.batch, c.heads, c.seqlen_q, c.seqlen_k)
        shape = tuple(n if v else 1 for n, v in zip(full, c.mask_varies, strict=True))
        found["attn_mask"] = _contiguous(c.mask, shape)
    if c.backward:
        found |= _backward(c, found)
    for name in ("key", "value", "out"):
        found[name] = replace(found[name], dtype=c.dtype_of(name))
    for field in FIELDS:
        if form := format_of(c, field):
            shape = (c.batch, c.seqlen_k, c.heads_k)
            found[field] = _contiguous(form.storage, (*shape, form.row_bytes))
            found[f"{field}_scales"] = _contiguous("float16", (*shape, form.blocks))
    return found


def _backward(c: Case, forward: dict[str, Placement]) -> dict[str, Placement]:
    found = {"dout": forward["out"]}
    if c.dlse:
        found["dlse"] = forward["lse"]
    for name in written(c):
        of = GRADIENTS[name]
        found[name] = forward[of]
        if c.float32_gradients:
            found[name] = replace(forward[of], dtype="float32")
    return found


GRADIENTS = {
    "dq": "query", "dk": "key", "dv": "value", "dqv": "qv", "dmask": "attn_mask",
    "dsinks": "learnable_sink", "dalibi_slopes": "alibi_slopes",
}  # fmt: skip
"""What each belongs to."""


def written(c: Case) -> tuple[str, ...]:
    """Names of what a case computes."""
    if not c.backward:
        return ("out", "lse")
    has = {"dqv": c.qv, "dmask": c.mask not in ("", "bool"), "dsinks": c.sinks,
           "dalibi_slopes": c.alibi}  # fmt: skip
    return tuple(name for name in GRADIENTS if has.get(name, True))


UNUSED_ROWS = 20  # of packed queries, behind the last sequence


def _packed(c: Case) -> dict[str, Placement]:
    one = replace(c, batch=1, seqlens_q=(), seqlens_k=())
    rows_q, rows_k = sum(c.seqlens_q) + UNUSED_ROWS, sum(c.seqlens_k)
    found = {
        "query": _without_batch(_tensor(one, rows_q, c.heads, c.head_dim, 0)),
        "out": _without_batch(_tensor(one, rows_q, c.heads, c.head_dim_v, 0)),
    }
    for i, (name, columns) in enumerate((("key", c.head_dim), ("value", c.head_dim_v)), 1):
        if c.page_size:
            found[name] = _pages(c, columns, i)
        else:
            found[name] = _without_batch(_tensor(one, rows_k, c.heads_k, columns, i))
    if c.lse:
        found["lse"] = _contiguous("float32", (c.heads, rows_q))
    return found


def _pages(c: Case, columns: int, which: int) -> Placement:
    one = replace(c, batch=int(block_table(c).max()) + 2, seqlens_q=(), seqlens_k=())
    return _tensor(one, c.page_size, c.heads_k, columns, which)


def rotary_channels(c: Case) -> int:
    """Not all, where there are enough for some that do not turn."""
    return c.head_dim // 4 * 2 or c.head_dim // 2 * 2


def lengths_k(c: Case) -> tuple[int, ...]:
    """Keys of each sequence, new ones included."""
    return c.seqlens_k or (c.seqlen_k,) * c.batch


def _without_batch(place: Placement) -> Placement:
    return replace(place, shape=place.shape[1:], strides=place.strides[1:])


def block_table(c: Case) -> np.ndarray:
    """Pages in any order."""
    columns = -(-max(lengths_k(c)) // c.page_size)
    return np.random.default_rng(0).permutation(c.batch * columns).reshape(c.batch, columns)


def tables(c: Case) -> dict[str, np.ndarray]:
    """What says where the sequences lie, by umfa's names."""
    if c.new_rows:
        found = {"seqused_k": np.full(c.batch, c.seqlen_k - c.new_rows)}
        if c.page_size:
            found["block_table"] = block_table(c)
        return {name: table.astype(np.int32) for name, table in found.items()}
    if not c.seqlens_q:
        return {}
    found = {"cu_seqlens_q": np.concatenate([[0], np.cumsum(c.seqlens_q)])}
    if c.page_size:
        found |= {"block_table": block_table(c), "seqused_k": np.array(c.seqlens_k)}
    else:
        found["cu_seqlens_k"] = np.concatenate([[0], np.cumsum(c.seqlens_k)])
    return {name: table.astype(np.int32) for name, table in found.items()}


def _contiguous(dtype: str, shape: tuple[int, ...]) -> Placement:
    strides, size = [], 1
    for n in reversed(shape):
        strides.append(size)
        size *= n
    return Placement(dtype, shape, tuple(reversed(strides)), 0, size)


def _tensor(c: Case, rows: int, heads: int, columns: int, which: int) -> Placement:
    """(batch, rows, heads, columns), laid out as the case says."""
    shape = (c.batch, rows, heads, columns)
    plain = _contiguous(c.dtype, shape)
    if c.layout == "bshd":
        return plain
    if c.layout == "bhsd":  # another order in memory
        strides = (rows * heads * columns, columns, rows * columns, 1)
        return Placement(c.dtype, shape, strides, 0, plain.size)
    if c.layout == "packed":  # one of three in each row, as in a (B, S, 3, H, D) tensor
        row = 3 * heads * columns
        strides = (rows * row, row, columns, 1)
        return Placement(c.dtype, shape, strides, which * heads * columns, c.batch * rows * row)
    if c.layout == "odd":  # nothing aligned: one element in, rows an odd number of elements long
        row = heads * columns + 1 - heads * columns % 2
        return Placement(c.dtype, shape, (rows * row, row, columns, 1), 1, 1 + c.batch * rows * row)
    if c.layout == "channels":  # every other element
        strides = tuple(2 * s for s in plain.strides)
        return Placement(c.dtype, shape, strides, 0, 2 * plain.size)
    raise ValueError(f"layout {c.layout!r} is unknown")
