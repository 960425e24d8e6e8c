"""Exact attention in float64, by NumPy or by CuPy in blocks of rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from .cases import Case

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
    return sees


def offset(case: Case) -> int:
    """Position of the first query among the keys."""
    return 0 if case.causal == "upper_left" else case.seqlen_k - case.seqlen_q


def visible_pairs(case: Case) -> int:
    """Pairs of a query and a key that it sees, in one head."""
    left, right = case.window
    if case.causal:
        right = 0
    p = np.arange(case.seqlen_q, dtype=np.int64) + offset(case)
    begin = np.maximum(0, p - left) if left >= 0 else np.zeros_like(p)
    end = np.minimum(case.seqlen_k, p + right + 1) if right >= 0 else np.full_like(p, case.seqlen_k)
    return int(np.maximum(0, end - begin).sum())


def attention(case: Case, tensors: dict[str, Any], xp: Any = np) -> tuple[Any, Any]:
    """Output (batch, seqlen_q, heads, head_dim_v) and log-sum-exp (batch, heads, seqlen_q).

    `tensors` are float64 (a bool mask is bool) and of the module `xp`.
    """
    q, k, v = (tensors[name] for name in ("query", "key", "value"))
    scale = case.scale or case.head_dim**-0.5
    keys = xp.arange(case.seqlen_k)[None, :]
    out = xp.zeros((case.batch, case.seqlen_q, case.heads, case.head_dim_v))
    lse = xp.zeros((case.batch, case.heads, case.seqlen_q))
    full = (case.batch, case.heads, case.seqlen_q, case.seqlen_k)
    mask = xp.broadcast_to(tensors["mask"], full) if "mask" in tensors else None
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
                # flash-attn counts distance from the lower right, whatever the causal alignment.
                own = xp.arange(rows.start, rows.stop)[:, None] + case.seqlen_k - case.seqlen_q
                scores = scores - tensors["alibi_slopes"][b, h] * xp.abs(own - keys)
            if mask is not None:
                if case.mask == "bool":
                    sees = sees & mask[b, h, rows]
                else:
                    scores = scores + mask[b, h, rows]
            scores = xp.where(sees, scores, -xp.inf)
            top = scores.max(axis=1)
            empty = top == -xp.inf
            top = xp.where(empty, 0.0, top)
            weights = xp.exp(scores - top[:, None])
            total = weights.sum(axis=1)
            safe = xp.where(empty, 1.0, total)
            out[b, rows, h] = (weights @ v[b, :, h_k]) / safe[:, None]
            lse[b, h, rows] = xp.where(empty, -xp.inf, top + xp.log(safe))
    return out, lse
