"""Exact attention in float64, by NumPy or by CuPy in blocks of rows.

It is independent of tests/reference.py on purpose. It runs on a machine with a GPU that has neither
umfa nor its tests, and a mistake in one of the two references shows as a difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .cases import Case
from .dropout import stays
from .inputs import store, widen
from .placement import GRADIENTS, block_table, rotary_channels, written

ROWS_AT_A_TIME = 1024


def visible(case: Case, positions: Any, keys: Any) -> Any:
    """Which keys (a row) the queries at `positions` (a column) see."""
    left, right = case.window
    if case.causal:
        right = 0
    sees = (keys >= 0) & (positions == positions)
    if left >= 0:
        sees &= keys >= positions - left
    if right >= 0:
        sees &= keys <= positions + right
    if case.chunk:
        sees &= positions // case.chunk == keys // case.chunk
    return sees


def offset(case: Case) -> int:
    """Position of the first query among the keys."""
    return 0 if case.causal == "upper_left" else case.seqlen_k - case.seqlen_q


def visible_pairs(case: Case) -> int:
    """Pairs of a query and a key that it sees, in one head of one of the batch, on average."""
    if case.seqlens_q:
        return sum(visible_pairs(one) for one, *_ in sequences(case)) // case.batch
    left, right = case.window
    if case.causal:
        right = 0
    p = np.arange(case.seqlen_q, dtype=np.int64) + offset(case)
    begin = np.maximum(0, p - left) if left >= 0 else np.zeros_like(p)
    end = np.minimum(case.seqlen_k, p + right + 1) if right >= 0 else np.full_like(p, case.seqlen_k)
    return int(np.maximum(0, end - begin).sum())


def sequences(case: Case) -> Iterator[tuple[Case, slice, Any]]:
    """Each sequence as a case by itself; its queries; its keys as an index of key and value."""
    start_q = start_k = 0
    for b, (length_q, length_k) in enumerate(zip(case.seqlens_q, case.seqlens_k, strict=True)):
        one = replace(
            case, batch=1, seqlens_q=(), seqlens_k=(), page_size=0, seqlen_q=length_q,
            seqlen_k=length_k,
        )  # fmt: skip
        # Zero means "as the other" where a case is made.
        object.__setattr__(one, "seqlen_k", length_k)
        keys: Any = slice(start_k, start_k + length_k)
        if case.page_size:
            j = np.arange(length_k)
            keys = (block_table(case)[b, j // case.page_size], j % case.page_size)
        yield one, slice(start_q, start_q + length_q), keys
        start_q, start_k = start_q + length_q, start_k + length_k


def _packed_attention(case: Case, tensors: dict[str, Any], xp: Any) -> tuple[Any, Any]:
    rows = len(tensors["query"])
    out, lse = xp.zeros((rows, case.heads, case.head_dim_v)), xp.full((case.heads, rows), -xp.inf)
    for one, queries, _, own in _sequences(case, tensors):
        found_out, found_lse = attention(one, own, xp)
        out[queries], lse[:, queries] = found_out[0], found_lse[0]
    return out, lse


def _sequences(
    case: Case, tensors: dict[str, Any]
) -> Iterator[tuple[Case, slice, Any, dict[str, Any]]]:
    """sequences(), and the tensors of each."""
    for b, (one, queries, keys) in enumerate(sequences(case)):
        own = {"query": tensors["query"][None, queries]}
        own |= {name: tensors[name][keys][None] for name in ("key", "value")}
        own |= {n: tensors[n] for n in ("learnable_sink",) if n in tensors}
        if case.alibi:
            own["alibi_slopes"] = tensors["alibi_slopes"][b : b + 1]
        yield one, queries, keys, own


def _rotated(case: Case, rows: Any, tensors: dict[str, Any], positions: Any) -> Any:
    """(batch, seqlen, heads, channels) by the angles of `positions`, rounded to the dtype."""
    turned = _turned(case, rows, tensors, positions)
    return widen(store(turned.astype(np.float32), case.dtype), case.dtype)


def _turned(
    case: Case, rows: Any, tensors: dict[str, Any], positions: Any, *, back: bool = False
) -> Any:
    """`back`: by the opposite angles."""
    half = rotary_channels(case) // 2
    cos, sin = (tensors[f"rotary_{name}"][positions][:, None] for name in ("cos", "sin"))
    sin = -sin if back else sin
    pairs = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    first, second = pairs if case.rotary == "pairs" else (slice(half), slice(half, 2 * half))
    a, b, turned = rows[..., first], rows[..., second], rows.copy()
    turned[..., first], turned[..., second] = a * cos - b * sin, a * sin + b * cos
    return turned


def _prepared(case: Case, tensors: dict[str, Any], xp: Any) -> tuple[Any, Any, Any]:
    """Query, key and value as the product sees them: appended, rotated, with both parts."""
    q, k, v = (tensors[name] for name in ("query", "key", "value"))
    old = case.seqlen_k - case.new_rows
    if case.new_rows:
        if case.page_size:
            j = np.arange(old)
            places = (block_table(case)[:, j // case.page_size], j % case.page_size)
            k, v = k[places], v[places]
        new_key = tensors["new_key"]
        if case.rotary:
            new_key = _rotated(case, new_key, tensors, np.arange(old, case.seqlen_k))
        k = xp.concatenate([k[:, :old], new_key], 1)
        v = xp.concatenate([v[:, :old], tensors["new_value"]], 1)
    elif case.rotary:
        k = _rotated(case, k, tensors, np.arange(case.seqlen_k))
    if case.rotary:
        first = old if case.new_rows else case.seqlen_k - case.seqlen_q
        moves = not case.new_rows or case.causal or max(*case.window, case.chunk - 1) >= 0
        q = _rotated(case, q, tensors, first + np.arange(case.seqlen_q) * bool(moves))
    if case.qv:
        q, k = xp.concatenate([q, tensors["qv"]], 3), xp.concatenate([k, v], 3)
    return q, k, v


def attention(case: Case, tensors: dict[str, Any], xp: Any = np) -> tuple[Any, Any]:
    """Output (batch, seqlen_q, heads, head_dim_v) and log-sum-exp (batch, heads, seqlen_q).

    Of packed sequences without the batch.
    `tensors` are float64 (a bool mask is bool) and of the module `xp`.
    """
    if case.seqlens_q:
        return _packed_attention(case, tensors, xp)
    q, k, v = _prepared(case, tensors, xp)
    out = xp.zeros((case.batch, case.seqlen_q, case.heads, case.head_dim_v))
    lse = xp.zeros((case.batch, case.heads, case.seqlen_q))
    for at in _blocks(case, tensors, q, k, xp):
        b, h, rows = at.batch, at.head, at.rows
        # CuPy's max() takes no `initial`.
        scores = at.scores
        top = scores.max(axis=1) if scores.shape[1] else xp.full(len(scores), -xp.inf)
        empty = top == -xp.inf
        top = xp.where(empty, 0.0, top)
        weights = xp.exp(scores - top[:, None])
        total = weights.sum(axis=1)
        safe = xp.where(empty, 1.0, total)
        out[b, rows, h] = ((weights * at.kept) @ v[b, :, at.head_k]) / safe[:, None]
        lse[b, h, rows] = xp.where(empty, -xp.inf, top + xp.log(safe))
        if case.sinks:
            own_lse = lse[b, h, rows]
            with_sink = xp.logaddexp(own_lse, tensors["learnable_sink"][h])
            out[b, rows, h] *= xp.exp(own_lse - with_sink)[:, None]
            lse[b, h, rows] = with_sink
    return out, lse


class Block(NamedTuple):
    """Rows of queries of one head, with their scores (rows, seqlen_k), -inf where hidden."""

    batch: int
    head: int
    head_k: int
    rows: slice
    scores: Any
    distance: Any
    """Between queries and keys, (rows, seqlen_k)."""
    slope: Any
    """Derivative of softcap."""
    kept: Any
    """Factor of dropout: 0 or 1 / (1 - p)."""


def _blocks(case: Case, tensors: dict[str, Any], q: Any, k: Any, xp: Any) -> Iterator[Block]:
    scale = case.scale or q.shape[3] ** -0.5
    keys = xp.arange(case.seqlen_k)[None, :]
    full = (case.batch, case.heads, case.seqlen_q, case.seqlen_k)
    mask = xp.broadcast_to(tensors["attn_mask"], full) if "attn_mask" in tensors else None
    for b, h in np.ndindex(case.batch, case.heads):
        h_k = h // (case.heads // case.heads_k)
        for start in range(0, case.seqlen_q, ROWS_AT_A_TIME):
            rows = slice(start, min(start + ROWS_AT_A_TIME, case.seqlen_q))
            positions = xp.arange(rows.start, rows.stop)[:, None] + offset(case)
            sees, distance = visible(case, positions, keys), xp.abs(positions - keys)
            scores, slope, kept = scale * (q[b, rows, h] @ k[b, :, h_k].T), 1.0, 1.0
            if case.softcap:
                capped = xp.tanh(scores / case.softcap)
                scores, slope = case.softcap * capped, 1 - capped**2
            if case.alibi:
                scores = scores - tensors["alibi_slopes"][b, h] * distance
            if mask is not None:
                if case.mask == "bool":
                    sees = sees & mask[b, h, rows]
                else:
                    scores = scores + mask[b, h, rows]
            if case.dropout:
                queries = xp.arange(rows.start, rows.stop)
                kept = stays(case.dropout, 0, 0, b, h, queries, case.seqlen_k, xp)
                kept = kept / (1 - case.dropout)
            scores = xp.where(sees, scores, -xp.inf)
            yield Block(b, h, h_k, rows, scores, distance, slope, kept)


def gradients(case: Case, tensors: dict[str, Any], xp: Any = np) -> dict[str, Any]:
    """Every gradient of the call, by the names in placement.py.

    `tensors` has dout, and perhaps dlse, beside the others, and the out of the forward pass as the
    backward pass gets it, rounded.
    """
    if case.seqlens_q:
        return _packed_gradients(case, tensors, xp)
    q, k, v = _prepared(case, tensors, xp)
    scale = case.scale or q.shape[3] ** -0.5
    _, lse = attention(case, tensors, xp)
    out, dout = tensors["out"], tensors["dout"]
    dlse = tensors.get("dlse", xp.zeros_like(lse))
    dq, dk, dv = (xp.zeros(x.shape) for x in (q, k, v))
    dscores = xp.zeros((case.batch, case.heads, case.seqlen_q, case.seqlen_k))
    dsinks, dslopes = xp.zeros(case.heads), xp.zeros((case.batch, case.heads))
    for at in _blocks(case, tensors, q, k, xp):
        b, h, h_k, rows = at.batch, at.head, at.head_k, at.rows
        own_lse = lse[b, h, rows]
        p = xp.exp(at.scores - xp.where(own_lse == -xp.inf, 0.0, own_lse)[:, None])
        own = dout[b, rows, h]
        dv[b, :, h_k] += (p * at.kept).T @ own
        delta = (own * out[b, rows, h]).sum(axis=1) - dlse[b, h, rows]
        ds = p * (at.kept * (own @ v[b, :, h_k].T) - delta[:, None])
        dscores[b, h, rows] = ds
        dslopes[b, h] -= (ds * at.distance).sum()
        if case.sinks:
            dsinks[h] -= (xp.exp(tensors["learnable_sink"][h] - own_lse) * delta).sum()
        ds = ds * at.slope * scale
        dq[b, rows, h] = ds @ k[b, :, h_k]
        dk[b, :, h_k] += ds.T @ q[b, rows, h]
    found = {"dsinks": dsinks, "dalibi_slopes": dslopes}
    if "attn_mask" in tensors:
        broadcast = tuple(i for i, n in enumerate(tensors["attn_mask"].shape) if n == 1)
        found["dmask"] = dscores.sum(axis=broadcast, keepdims=True)
    if case.qv:
        found["dqv"], dv = dq[..., case.head_dim :], dv + dk[..., case.head_dim :]
        dq, dk = dq[..., : case.head_dim], dk[..., : case.head_dim]
    if case.rotary:
        first = case.seqlen_k - case.seqlen_q
        dq = _turned(case, dq, tensors, first + np.arange(case.seqlen_q), back=True)
        dk = _turned(case, dk, tensors, np.arange(case.seqlen_k), back=True)
    return found | {"dq": dq, "dk": dk, "dv": dv}


def _packed_gradients(case: Case, tensors: dict[str, Any], xp: Any) -> dict[str, Any]:
    found = {name: xp.zeros(tensors[GRADIENTS[name]].shape) for name in written(case)}
    for b, (one, queries, keys, own) in enumerate(_sequences(case, tensors)):
        own |= {name: tensors[name][None, queries] for name in ("out", "dout")}
        if case.dlse:
            own["dlse"] = tensors["dlse"][None, :, queries]
        places = {"dq": queries, "dk": keys, "dv": keys, "dalibi_slopes": b}
        for name, x in gradients(one, own, xp).items():
            if name in found:
                found[name][places[name]] = x[0]
    return found
