"""Exact attention in float64, by NumPy or by CuPy in blocks of rows.

It is independent of tests/reference.py on purpose. It runs on a machine with a GPU that has neither
umfa nor its tests, and a mistake in one of the two references shows as a difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from .cases import Case
from .dropout import stays
from .inputs import store, widen
from .placement import block_table, rotary_channels

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
    for b, (one, queries, keys) in enumerate(sequences(case)):
        own = {"query": tensors["query"][None, queries]}
        own |= {name: tensors[name][keys][None] for name in ("key", "value")}
        own |= {n: tensors[n] for n in ("learnable_sink",) if n in tensors}
        if case.alibi:
            own["alibi_slopes"] = tensors["alibi_slopes"][b : b + 1]
        found_out, found_lse = attention(one, own, xp)
        out[queries], lse[:, queries] = found_out[0], found_lse[0]
    return out, lse


def _rotated(case: Case, rows: Any, tensors: dict[str, Any], positions: Any) -> Any:
    """(batch, seqlen, heads, channels) by the angles of `positions`, rounded to the dtype."""
    half = rotary_channels(case) // 2
    cos, sin = (tensors[f"rotary_{name}"][positions][:, None] for name in ("cos", "sin"))
    pairs = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    first, second = pairs if case.rotary == "pairs" else (slice(half), slice(half, 2 * half))
    a, b, turned = rows[..., first], rows[..., second], rows.copy()
    turned[..., first], turned[..., second] = a * cos - b * sin, a * sin + b * cos
    return widen(store(turned.astype(np.float32), case.dtype), case.dtype)


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
    scale = case.scale or q.shape[3] ** -0.5
    keys = xp.arange(case.seqlen_k)[None, :]
    out = xp.zeros((case.batch, case.seqlen_q, case.heads, case.head_dim_v))
    lse = xp.zeros((case.batch, case.heads, case.seqlen_q))
    full = (case.batch, case.heads, case.seqlen_q, case.seqlen_k)
    mask = xp.broadcast_to(tensors["attn_mask"], full) if "attn_mask" in tensors else None
    for b, h in np.ndindex(case.batch, case.heads):
        h_k = h // (case.heads // case.heads_k)
        for start in range(0, case.seqlen_q, ROWS_AT_A_TIME):
            rows = slice(start, min(start + ROWS_AT_A_TIME, case.seqlen_q))
            positions = xp.arange(rows.start, rows.stop)[:, None] + offset(case)
            sees = visible(case, positions, keys)
            scores = scale * (q[b, rows, h] @ k[b, :, h_k].T)
            if case.softcap:
                scores = case.softcap * xp.tanh(scores / case.softcap)
            if case.alibi:
                scores = scores - tensors["alibi_slopes"][b, h] * xp.abs(positions - keys)
            if mask is not None:
                if case.mask == "bool":
                    sees = sees & mask[b, h, rows]
                else:
                    scores = scores + mask[b, h, rows]
            scores = xp.where(sees, scores, -xp.inf)
            # CuPy's max() takes no `initial`.
            top = scores.max(axis=1) if scores.shape[1] else xp.full(len(scores), -xp.inf)
            empty = top == -xp.inf
            top = xp.where(empty, 0.0, top)
            weights = xp.exp(scores - top[:, None])
            total = weights.sum(axis=1)
            safe = xp.where(empty, 1.0, total)
            if case.dropout:
                queries = xp.arange(rows.start, rows.stop)
                kept = stays(case.dropout, 0, 0, b, h, queries, case.seqlen_k, xp)
                weights = weights * kept / (1 - case.dropout)
            out[b, rows, h] = (weights @ v[b, :, h_k]) / safe[:, None]
            lse[b, h, rows] = xp.where(empty, -xp.inf, top + xp.log(safe))
            if case.sinks:
                own_lse = lse[b, h, rows]
                with_sink = xp.logaddexp(own_lse, tensors["learnable_sink"][h])
                out[b, rows, h] *= xp.exp(own_lse - with_sink)[:, None]
                lse[b, h, rows] = with_sink
    return out, lse
