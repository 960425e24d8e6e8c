"""Exact attention in float64 NumPy, written to be read: what every backend is compared with.

Nothing here uses umfa. The convention for tests: round the inputs to the tested dtype first, then
hand them in; this module widens them to float64 and from there on rounding does not matter.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Alignment = Literal["lower_right", "upper_left"]
FloatArray = NDArray[np.float64]

ROWS_AT_A_TIME = 1024
"""Query rows whose scores are held at once, so that long sequences fit into memory."""


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    alignment: Alignment = "lower_right",
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> tuple[FloatArray, FloatArray]:
    r"""Compute softmax attention and its log-sum-exp, head by head.

    For query row :math:`i` and key :math:`j` of one head, with the key position of the row
    :math:`p_i = i + \mathrm{offset}` (see `alignment`),

    .. math::

        s_{ij} &= \mathrm{scale} \cdot q_i \cdot k_j \\
        s_{ij} &\leftarrow \mathrm{softcap} \cdot \tanh(s_{ij} / \mathrm{softcap})
                  \quad\text{if softcap} > 0 \\
        s_{ij} &\leftarrow s_{ij} - \mathrm{slope} \cdot |p_i - j|
                  \quad\text{if alibi\_slopes is given} \\
        s_{ij} &\leftarrow s_{ij} + \mathrm{mask}_{ij}
                  \quad\text{if a mask of numbers is given} \\
        s_{ij} &\leftarrow -\infty \quad\text{if row } i \text{ does not see key } j \\
        \mathrm{lse}_i &= \log \sum_j e^{s_{ij}} \\
        o_i &= \sum_j e^{s_{ij} - \mathrm{lse}_i} \, v_j

    Parameters
    ----------
    query : array (batch, seqlen_q, heads, head_dim)
    key : array (batch, seqlen_k, heads_k, head_dim)
    value : array (batch, seqlen_k, heads_k, head_dim_v)
        `heads` is a multiple of `heads_k`; query head ``h`` reads key/value head
        ``h // (heads // heads_k)``.
    softmax_scale : float, optional
        ``1 / sqrt(head_dim)`` unless given.
    causal : bool
        Row `i` sees only keys ``j <= p_i``.
    alignment : {"lower_right", "upper_left"}
        ``offset = seqlen_k - seqlen_q``: the last row sits on the last key (flash-attn, MLX), or
        ``offset = 0``: the first row sits on the first key (PyTorch's ``is_causal``, JAX).
    window_size : (left, right)
        Row `i` sees only keys in ``[p_i - left, p_i + right]``; -1 leaves a side unbounded.
    softcap : float
        0 turns it off.
    alibi_slopes : array (heads,) or (batch, heads), optional
    mask : array that broadcasts to (batch, heads, seqlen_q, seqlen_k), optional
        bool: row `i` sees key `j` only where it is true. Numbers: added to the scores.

    Returns
    -------
    out : float64 array (batch, seqlen_q, heads, head_dim_v)
        Zero in rows that see no key.
    lse : float64 array (batch, heads, seqlen_q)
        Natural logarithm; ``-inf`` in rows that see no key.
    """
    query, key, value = (np.asarray(x).astype(np.float64) for x in (query, key, value))
    batch, seqlen_q, heads, head_dim = query.shape
    _, seqlen_k, heads_k, head_dim_v = value.shape
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    offset = seqlen_k - seqlen_q if alignment == "lower_right" else 0
    slopes = np.zeros((batch, heads))
    if alibi_slopes is not None:
        slopes = np.broadcast_to(np.asarray(alibi_slopes, dtype=np.float64), (batch, heads))

    shown, bias = None, None
    if mask is not None:
        full = (batch, heads, seqlen_q, seqlen_k)
        shown = np.broadcast_to(np.asarray(mask), full)
        if shown.dtype != bool:
            bias = np.broadcast_to(np.asarray(mask).astype(np.float64), full)
            shown = ~np.isneginf(bias)

    out = np.zeros((batch, seqlen_q, heads, head_dim_v))
    lse = np.full((batch, heads, seqlen_q), -np.inf)
    for b, h in np.ndindex(batch, heads):
        h_k = h // (heads // heads_k)
        for start in range(0, seqlen_q, ROWS_AT_A_TIME):
            rows = slice(start, min(start + ROWS_AT_A_TIME, seqlen_q))
            positions = np.arange(rows.start, rows.stop) + offset
            sees = visible(positions, seqlen_k, causal=causal, window_size=window_size)
            scores = scale * (query[b, rows, h] @ key[b, :, h_k].T)
            if softcap > 0.0:
                scores = softcap * np.tanh(scores / softcap)
            if slopes[b, h] != 0.0:
                distance = np.abs(positions[:, None] - np.arange(seqlen_k)[None, :])
                scores -= slopes[b, h] * distance
            if bias is not None:
                scores = scores + bias[b, h, rows]
            if shown is not None:
                sees = sees & shown[b, h, rows]
            out[b, rows, h], lse[b, h, rows] = softmax_times(scores, sees, value[b, :, h_k])
    return out, lse


def visible(
    positions: NDArray[np.int64],
    seqlen_k: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> NDArray[np.bool_]:
    """Say which keys each row sees.

    Parameters
    ----------
    positions : int array (rows,)
        Key position of every row, that is, row index plus the alignment's offset. It may lie
        before the first key or after the last one.

    Returns
    -------
    bool array (rows, seqlen_k)
        True where the row attends to the key.
    """
    left, right = window_size
    if causal:
        right = 0
    p = positions[:, None]
    j = np.arange(seqlen_k)[None, :]
    sees = np.ones((len(positions), seqlen_k), dtype=bool)
    if left >= 0:
        sees &= j >= p - left
    if right >= 0:
        sees &= j <= p + right
    return sees


def softmax_times(
    scores: FloatArray, sees: NDArray[np.bool_], value: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Softmax over the visible keys times the values, and the log-sum-exp of each row."""
    empty = ~sees.any(axis=1)
    scores = np.where(sees, scores, -np.inf)
    # The maximum only keeps exp() in range. An empty row has none; any finite number will do.
    largest = np.where(empty, 0.0, scores.max(axis=1, initial=-np.inf))
    weights = np.exp(scores - largest[:, None])
    total = np.where(empty, 1.0, weights.sum(axis=1))
    out = (weights @ value) / total[:, None]
    lse = np.where(empty, -np.inf, largest + np.log(total))
    return out, lse
