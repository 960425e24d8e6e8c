"""Exact attention in float64 NumPy, written to be read: what every backend is compared with.

Nothing here uses umfa. The convention for tests: round the inputs to the tested dtype first, then
hand them in; this module widens them to float64 and from there on rounding does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tests import philox

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
    window_size: tuple[int | None, int | None] = (-1, -1),
    window_offsets: bool = False,
    softcap: float = 0.0,
    alibi_slopes: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    attention_chunk: int = 0,
    attention_chunk_offset: int = 0,
    prefix_len: int = 0,
    learnable_sink: ArrayLike | None = None,
    qv: ArrayLike | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
    first_index: int = 0,
) -> tuple[FloatArray, FloatArray]:
    r"""Compute softmax attention and its log-sum-exp, head by head.

    For query row :math:`i` and key :math:`j` of one head, with the key position of the row
    :math:`p_i = i + \mathrm{offset}` (see `alignment`),

    .. math::

        s_{ij} &= \mathrm{scale} \cdot (q_i \cdot k_j
                  + \mathrm{qv}_i \cdot v_j \text{ if qv is given}) \\
        s_{ij} &\leftarrow \mathrm{softcap} \cdot \tanh(s_{ij} / \mathrm{softcap})
                  \quad\text{if softcap} > 0 \\
        s_{ij} &\leftarrow s_{ij} - \mathrm{slope} \cdot |p_i - j|
                  \quad\text{if alibi\_slopes is given} \\
        s_{ij} &\leftarrow s_{ij} + \mathrm{mask}_{ij}
                  \quad\text{if a mask of numbers is given} \\
        s_{ij} &\leftarrow -\infty \quad\text{if row } i \text{ does not see key } j \\
        \mathrm{lse}_i &= \log \bigl(\sum_j e^{s_{ij}}
                  + e^{\mathrm{sink}} \text{ if learnable\_sink is given}\bigr) \\
        o_i &= \sum_{j \text{ not dropped}} e^{s_{ij} - \mathrm{lse}_i} \, v_j
                  / (1 - \mathrm{dropout\_p})

    Parameters
    ----------
    query : array (batch, seqlen_q, heads, head_dim)
    key : array (batch, seqlen_k, heads_k, head_dim)
    value : array (batch, seqlen_k, heads_k, head_dim_v)
        `heads` is a multiple of `heads_k`; query head ``h`` reads key/value head
        ``h // (heads // heads_k)``.
    softmax_scale : float, optional
        ``1 / sqrt(head_dim)`` unless given; with `qv` that of both products' channels.
    causal : bool
        Row `i` sees only keys ``j <= p_i``.
    alignment : {"lower_right", "upper_left"}
        ``offset = seqlen_k - seqlen_q``: the last row sits on the last key (flash-attn, MLX), or
        ``offset = 0``: the first row sits on the first key (PyTorch's ``is_causal``, JAX).
    window_size : (left, right)
        Row `i` sees only keys in ``[p_i - left, p_i + right]``; -1 leaves a side unbounded.
    window_offsets : bool
        None leaves a side unbounded, and negative numbers, -1 among them, are what they are.
    softcap : float
        0 turns it off.
    alibi_slopes : array (heads,) or (batch, heads), optional
    mask : array that broadcasts to (batch, heads, seqlen_q, seqlen_k), optional
        bool: row `i` sees key `j` only where it is true. Numbers: added to the scores.
    attention_chunk : int
        If above 0, row `i` sees only keys with ``j // attention_chunk == p_i // attention_chunk``,
        where `attention_chunk_offset` is added to `j` and `p_i` first.
    prefix_len : int
        Every row also sees the keys ``j < prefix_len``, unless the mask hides them.
    learnable_sink : array (heads,), optional
        A logit of its own in each head's softmax, neither scaled nor capped, without a value.
    qv : array (batch, seqlen_q, heads, head_dim_v), optional
    dropout_p, dropout_seed, dropout_offset
        Which probabilities are dropped: `philox.dropped`.
    first_index : int
        How dropout counts the first index of the batch, so that sequences can be checked alone.

    Returns
    -------
    out : float64 array (batch, seqlen_q, heads, head_dim_v)
        Zero in rows that see no key.
    lse : float64 array (batch, heads, seqlen_q)
        Natural logarithm; in rows that see no key ``-inf``, or the sink.
    """
    call = _Call(
        query,
        key,
        value,
        softmax_scale=softmax_scale,
        causal=causal,
        alignment=alignment,
        window_size=window_size,
        window_offsets=window_offsets,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        mask=mask,
        attention_chunk=attention_chunk,
        attention_chunk_offset=attention_chunk_offset,
        prefix_len=prefix_len,
        learnable_sink=learnable_sink,
        qv=qv,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
        first_index=first_index,
    )
    batch, seqlen_q, heads, _ = call.query.shape
    out = np.zeros((batch, seqlen_q, heads, call.value.shape[3]))
    lse = np.full((batch, heads, seqlen_q), -np.inf)
    for b, h, rows in call.blocks():
        at = call.scores(b, h, rows)
        out[b, rows, h], lse[b, h, rows] = softmax_times(
            at.scores, at.sees, call.value[b, :, call.key_head(h)], call.sinks[h], at.kept
        )
    out /= 1.0 - dropout_p
    return out, lse


class Scores(NamedTuple):
    """Rows of one head: (rows, seqlen_k) each."""

    scores: FloatArray
    sees: NDArray[np.bool_]
    kept: NDArray[np.bool_] | None
    """Without dropout None."""
    slope: FloatArray | float
    """Derivative of softcap."""
    distance: NDArray[np.int64]


class _Call:
    """The arguments of `attention`, brought to one form."""

    def __init__(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        *,
        softmax_scale: float | None = None,
        alignment: Alignment = "lower_right",
        softcap: float = 0.0,
        alibi_slopes: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        prefix_len: int = 0,
        learnable_sink: ArrayLike | None = None,
        qv: ArrayLike | None = None,
        dropout_p: float = 0.0,
        dropout_seed: int = 0,
        dropout_offset: int = 0,
        first_index: int = 0,
        **visibility: Any,
    ) -> None:
        self.query, self.key, self.value = (
            np.asarray(x).astype(np.float64) for x in (query, key, value)
        )
        self.head_dim = self.query.shape[3]
        if qv is not None:  # more channels of the same product
            self.query = np.concatenate([self.query, np.asarray(qv).astype(np.float64)], axis=3)
            self.key = np.concatenate([self.key, self.value], axis=3)
        batch, seqlen_q, heads, channels = self.query.shape
        seqlen_k = self.key.shape[1]
        self.group = heads // max(self.key.shape[2], 1)
        self.scale = channels**-0.5 if softmax_scale is None else softmax_scale
        self.offset = seqlen_k - seqlen_q if alignment == "lower_right" else 0
        self.softcap, self.prefix_len, self.visibility = softcap, prefix_len, visibility
        self.dropout = (dropout_p, dropout_seed, dropout_offset)
        self.first_index = first_index
        self.slopes = np.zeros((batch, heads))
        if alibi_slopes is not None:
            self.slopes = np.broadcast_to(
                np.asarray(alibi_slopes, dtype=np.float64), (batch, heads)
            )
        self.sinks = np.full(heads, -np.inf)
        if learnable_sink is not None:
            self.sinks = np.asarray(learnable_sink).astype(np.float64)
        self.shown, self.bias = None, None
        if mask is not None:
            full = (batch, heads, seqlen_q, seqlen_k)
            self.shown = np.broadcast_to(np.asarray(mask), full)
            if self.shown.dtype != bool:
                self.bias = np.broadcast_to(np.asarray(mask).astype(np.float64), full)
                self.shown = ~np.isneginf(self.bias)

    def key_head(self, head: int) -> int:
        return head // self.group

    def blocks(self) -> Iterator[tuple[int, int, slice]]:
        """(batch, head, rows), a limited number of rows at a time."""
        batch, seqlen_q, heads, _ = self.query.shape
        for b, h in np.ndindex(batch, heads):
            for start in range(0, seqlen_q, ROWS_AT_A_TIME):
                yield b, h, slice(start, min(start + ROWS_AT_A_TIME, seqlen_q))

    def scores(self, b: int, h: int, rows: slice) -> Scores:
        seqlen_k = self.key.shape[1]
        positions = np.arange(rows.start, rows.stop) + self.offset
        sees = visible(positions, seqlen_k, **self.visibility)
        scores = self.scale * (self.query[b, rows, h] @ self.key[b, :, self.key_head(h)].T)
        slope: FloatArray | float = 1.0
        if self.softcap > 0.0:
            capped = np.tanh(scores / self.softcap)
            scores, slope = self.softcap * capped, 1 - capped**2
        distance = np.abs(positions[:, None] - np.arange(seqlen_k)[None, :])
        if self.slopes[b, h] != 0.0:
            scores -= self.slopes[b, h] * distance
        sees[:, : self.prefix_len] = True
        if self.bias is not None:
            scores = scores + self.bias[b, h, rows]
        if self.shown is not None:
            sees = sees & self.shown[b, h, rows]
        kept = None
        if self.dropout[0] > 0:
            kept = ~philox.dropped(
                *self.dropout,
                batch=self.first_index + b,
                head=h,
                rows=np.arange(rows.start, rows.stop),
                seqlen_k=seqlen_k,
            )
        return Scores(scores, sees, kept, slope, distance)


class Gradients(NamedTuple):
    """What `gradients` returns; None for what the call does not have."""

    dq: FloatArray
    dk: FloatArray
    dv: FloatArray
    dqv: FloatArray | None
    dmask: FloatArray | None
    dsinks: FloatArray | None
    dalibi_slopes: FloatArray | None


def gradients(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    dout: ArrayLike,
    dlse: ArrayLike | None = None,
    *,
    given_out: ArrayLike | None = None,
    **options: Any,
) -> Gradients:
    r"""Gradients of ``sum(out * dout) + sum(lse * dlse)`` of `attention`.

    With the probabilities :math:`p_{ij} = e^{s_{ij} - \mathrm{lse}_i}`, the factor
    :math:`m_{ij}` of dropout, which is 0 or :math:`1 / (1 - \mathrm{dropout\_p})`, and
    :math:`\mathrm{do}_i`, :math:`\mathrm{dl}_i` for rows of `dout` and `dlse`,

    .. math::

        dv_j &= \sum_i m_{ij} p_{ij} \mathrm{do}_i \\
        \delta_i &= \mathrm{do}_i \cdot o_i - \mathrm{dl}_i \\
        ds_{ij} &= p_{ij} (m_{ij} \, \mathrm{do}_i \cdot v_j - \delta_i)

    :math:`ds` is the gradient of the scores as they enter the softmax, and so that of the mask;
    what comes before them follows by the chain rule. A sink has :math:`-e^{\mathrm{sink} -
    \mathrm{lse}_i} \delta_i` from each row.

    Parameters
    ----------
    query, key, value, **options
        Those of `attention`.
    dout : array (batch, seqlen_q, heads, head_dim_v)
    dlse : array (batch, heads, seqlen_q), optional
    given_out : array (batch, seqlen_q, heads, head_dim_v), optional
        The result as a backward pass gets it, rounded to its dtype, which is what :math:`\delta` is
        made of. It matters in sums over :math:`ds` that cancel.

    Returns
    -------
    Gradients
        float64, each of the shape of what it belongs to: those of the mask and the slopes are
        summed over the dimensions in which they broadcast. Rows that see no key add nothing.
    """
    call = _Call(query, key, value, **options)
    dout = np.asarray(dout).astype(np.float64)
    batch, seqlen_q, heads, _ = call.query.shape
    upstream = np.zeros((batch, heads, seqlen_q))
    if dlse is not None:
        upstream = np.asarray(dlse).astype(np.float64)
    share = 1.0 - call.dropout[0]
    dq, dk, dv = (np.zeros(x.shape) for x in (call.query, call.key, call.value))
    dmask = np.zeros(call.bias.shape) if call.bias is not None else None
    dsinks, dslopes = np.zeros(heads), np.zeros((batch, heads))
    for b, h, rows in call.blocks():
        at, h_k = call.scores(b, h, rows), call.key_head(h)
        own_out, value_of_head = dout[b, rows, h], call.value[b, :, h_k]
        out, lse = softmax_times(at.scores, at.sees, value_of_head, call.sinks[h], at.kept)
        seen = ~np.isneginf(lse)
        own_out = np.where(seen[:, None], own_out, 0.0)
        finite_lse = np.where(seen, lse, 0.0)
        p = np.exp(np.where(at.sees, at.scores, -np.inf) - finite_lse[:, None])
        m = (1.0 if at.kept is None else at.kept) / share
        out = out / share if given_out is None else np.asarray(given_out)[b, rows, h]
        delta = (own_out * out).sum(1) - np.where(seen, upstream[b, h, rows], 0.0)
        dv[b, :, h_k] += (m * p).T @ own_out
        ds = p * (m * (own_out @ value_of_head.T) - delta[:, None])
        if dmask is not None:
            dmask[b, h, rows] = ds
        dslopes[b, h] -= (ds * at.distance).sum()
        if np.isfinite(call.sinks[h]):
            dsinks[h] -= (np.exp(call.sinks[h] - finite_lse) * delta * seen).sum()
        ds = ds * at.slope * call.scale
        dq[b, rows, h] = ds @ call.key[b, :, h_k]
        dk[b, :, h_k] += ds.T @ call.query[b, rows, h]
    dqv = None
    if options.get("qv") is not None:  # whose keys are the values
        dq, dqv = dq[..., : call.head_dim], dq[..., call.head_dim :]
        dk, more = dk[..., : call.head_dim], dk[..., call.head_dim :]
        dv = dv + more
    slopes, mask = options.get("alibi_slopes"), options.get("mask")
    return Gradients(
        dq,
        dk,
        dv,
        dqv,
        None if dmask is None else summed_to(dmask, np.shape(mask)),
        None if options.get("learnable_sink") is None else dsinks,
        None if slopes is None else summed_to(dslopes, np.shape(slopes)),
    )


def summed_to(array: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """The sum over the dimensions in which an array of that shape was broadcast to `array`."""
    wide = (1,) * (array.ndim - len(shape)) + tuple(shape)
    axes = tuple(i for i, n in enumerate(wide) if n == 1)
    return array.sum(axis=axes, keepdims=True).reshape(shape)


def scaled_dot_product(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_mask: ArrayLike | None = None,
    *,
    is_causal: bool = False,
    alignment: Alignment = "upper_left",
    scale: float | None = None,
    enable_gqa: bool = False,
    **dropout: Any,
) -> FloatArray:
    """Compute PyTorch's ``scaled_dot_product_attention`` by `attention`.

    Parameters
    ----------
    query : array (..., heads, seqlen_q, head_dim)
    key : array (..., heads, seqlen_k, head_dim)
    value : array (..., heads, seqlen_k, head_dim_v)
        Two dimensions or more; heads and what comes before them broadcast.
    attn_mask : array that broadcasts to (..., heads, seqlen_q, seqlen_k), optional
    enable_gqa : bool
        Key and value heads are not broadcast but shared, as in `attention`.
    **dropout
        `dropout_p`, `dropout_seed` and `dropout_offset` of `attention`.

    Returns
    -------
    float64 array (..., heads, seqlen_q, head_dim_v)
    """
    flat = flattened(query, key, value, attn_mask, enable_gqa=enable_gqa)
    out, _ = attention(
        *flat.tensors,
        mask=flat.mask,
        causal=is_causal,
        alignment=alignment,
        softmax_scale=scale,
        **dropout,
    )
    return out.transpose(0, 2, 1, 3).reshape(flat.shape)


def combine(out_partial: ArrayLike, lse_partial: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Compute `umfa.flash_attn_combine`: merge the results over parts of the keys.

    Parameters
    ----------
    out_partial : array (parts, ..., head_dim)
    lse_partial : array (parts, ...)
        A part with -inf has no weight.

    Returns
    -------
    out : float64 array (..., head_dim)
    lse : float64 array (...)
    """
    parts, lse = (np.asarray(x).astype(np.float64) for x in (out_partial, lse_partial))
    seen = lse > -np.inf
    top = np.where(seen.any(0), np.where(seen, lse, -np.inf).max(0), 0)
    weights = np.where(seen, np.exp(lse - top), 0)
    total = weights.sum(0)
    parts = np.where(seen[..., None], parts, 0)
    out = (parts * weights[..., None]).sum(0) / np.where(total > 0, total, 1)[..., None]
    with np.errstate(divide="ignore"):
        return out, top + np.log(total)


class Flattened(NamedTuple):
    """Arguments of `scaled_dot_product` as `attention` takes them."""

    tensors: tuple[NDArray[Any], NDArray[Any], NDArray[Any]]  # (batch, seqlen, heads, head_dim)
    mask: NDArray[Any] | None  # (batch, heads, seqlen_q, seqlen_k)
    shape: tuple[int, ...]
    """Of the result."""


def flattened(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_mask: ArrayLike | None,
    *,
    enable_gqa: bool,
) -> Flattened:
    """Broadcast all batch dimensions and make them one, heads likewise."""
    arrays = [np.asarray(x) for x in (query, key, value)]
    ndim = max(x.ndim for x in arrays)
    arrays = [x.reshape((1,) * (max(ndim, 3) - x.ndim) + x.shape) for x in arrays]
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in arrays))
    heads = [x.shape[-3] for x in arrays]
    if enable_gqa:
        heads[1:] = [max(heads[1:])] * 2
    else:
        heads = list(np.broadcast_shapes(*((h,) for h in heads))) * 3
    flat = tuple(
        np.broadcast_to(x, (*batch, h, *x.shape[-2:]))
        .reshape(int(np.prod(batch)), h, *x.shape[-2:])
        .transpose(0, 2, 1, 3)
        for x, h in zip(arrays, heads, strict=True)
    )
    mask = None
    if attn_mask is not None:
        lengths = (flat[0].shape[1], flat[1].shape[1])
        mask = np.broadcast_to(np.asarray(attn_mask), (*batch, heads[0], *lengths))
        mask = mask.reshape(int(np.prod(batch)), *mask.shape[-3:])
    shape = (*batch, heads[0], flat[0].shape[1], flat[2].shape[3])
    return Flattened((flat[0], flat[1], flat[2]), mask, shape[-ndim:])


def visible(
    positions: NDArray[np.int64],
    seqlen_k: int,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    window_offsets: bool = False,
    attention_chunk: int = 0,
    attention_chunk_offset: int = 0,
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
    left, right = (None if x == -1 and not window_offsets else x for x in window_size)
    if causal:
        right = 0
    p = positions[:, None]
    j = np.arange(seqlen_k)[None, :]
    sees = np.ones((len(positions), seqlen_k), dtype=bool)
    if left is not None:
        sees &= j >= p - left
    if right is not None:
        sees &= j <= p + right
    if attention_chunk > 0:
        shift = attention_chunk_offset
        sees &= (j + shift) // attention_chunk == (p + shift) // attention_chunk
    return sees


def softmax_times(
    scores: FloatArray,
    sees: NDArray[np.bool_],
    value: FloatArray,
    sink: float = -np.inf,
    kept: NDArray[np.bool_] | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Softmax over the visible keys times the values, and the log-sum-exp of each row.

    `kept`: the probabilities that meet a value.
    """
    scores = np.where(sees, scores, -np.inf)
    largest = np.maximum(scores.max(axis=1, initial=-np.inf), sink)
    empty = np.isneginf(largest)
    # The maximum only keeps exp() in range. An empty row has none; any finite number will do.
    largest = np.where(empty, 0.0, largest)
    weights = np.exp(scores - largest[:, None])
    total = np.where(empty, 1.0, weights.sum(axis=1) + np.exp(sink - largest))
    if kept is not None:
        weights = np.where(kept, weights, 0.0)
    out = (weights @ value) / total[:, None]
    lse = np.where(empty, -np.inf, largest + np.log(total))
    return out, lse
