"""``flash_attn.layers.rotary``: rotary position embedding, in torch."""

from __future__ import annotations

from typing import Any

import torch

from .._errors import message

__all__ = ["apply_rotary_emb", "apply_rotary_emb_func"]


def apply_rotary_emb(
    x: Any,
    cos: Any,
    sin: Any,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Any = 0,
    cu_seqlens: Any = None,
    max_seqlen: int | None = None,
) -> Any:
    """Rotate the first ``rotary_dim`` channels of each row by the angles of its position.

    Parameters
    ----------
    x : tensor, shape (batch, seqlen, nheads, head_dim)
        Or (total, nheads, head_dim) with `cu_seqlens`.
    cos, sin : tensor, shape (positions, rotary_dim / 2)
    interleaved : bool
        Rotates the pairs (0, 1), (2, 3), ...; if False one channel of each half.
    inplace : bool
        Write the result into `x`.
    seqlen_offsets : int or integer tensor, shape (batch,)
        The position of each sequence's first row.
    cu_seqlens : integer tensor, shape (batch + 1,), optional
        Where each sequence begins.
    max_seqlen : int, optional
        At least the longest sequence; only checked.

    Returns
    -------
    tensor
        Of the shape and the dtype of `x`. The arithmetic is float32. Differentiable in `x`.

    Raises
    ------
    ValueError
        Shapes do not fit, or a position is none of the tables'.
    """
    channels = 2 * cos.shape[-1]
    if cos.ndim != 2 or cos.shape != sin.shape or channels > x.shape[-1]:
        got = f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        raise ValueError(_message("cos and sin do not fit x", got, "(positions, rotary_dim / 2)"))
    places = _positions(x, seqlen_offsets, cu_seqlens, max_seqlen)
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < len(cos):
        got = f"positions {int(places.min())} to {int(places.max())}"
        raise ValueError(_message("cos and sin have no such rows", got, f"0 to {len(cos) - 1}"))
    c, s = (table[places].float().unsqueeze(-2) for table in (cos, sin))
    turned, rest = x[..., :channels].float(), x[..., channels:]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, -1)
    parts = first * c - second * s, first * s + second * c
    joined = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    result = torch.cat((joined.to(x.dtype), rest), -1)
    return x.copy_(result) if inplace else result


apply_rotary_emb_func = apply_rotary_emb


def _positions(x: Any, offsets: Any, cu_seqlens: Any, max_seqlen: int | None) -> Any:
    """Of each row: (batch or 1, seqlen), or (total,) of packed sequences."""
    if cu_seqlens is None:
        if x.ndim != 4:
            expected = "(batch, seqlen, nheads, head_dim), or cu_seqlens"
            raise ValueError(_message("x has the wrong shape", tuple(x.shape), expected))
        begin = _begins(offsets, x.shape[0], x.device)
        return begin[:, None] + torch.arange(x.shape[1], device=x.device)
    bounds = cu_seqlens.to(x.device, torch.int64)
    lengths = bounds.diff()
    if x.ndim != 3 or bounds[0] != 0 or bounds[-1] != len(x) or bool((lengths < 0).any()):
        got = f"x {tuple(x.shape)}, cu_seqlens {cu_seqlens.tolist()}"
        raise ValueError(_message("cu_seqlens do not fit x", got, "sequences that fill all rows"))
    if max_seqlen is not None and int(lengths.max()) > max_seqlen:
        expected = f"at least {int(lengths.max())}"
        raise ValueError(_message("max_seqlen is too small", max_seqlen, expected))
    begin = _begins(offsets, len(lengths), x.device)
    shift = (begin - bounds[:-1]).expand(len(lengths)).repeat_interleave(lengths)
    return torch.arange(len(x), device=x.device) + shift


def _begins(offsets: Any, batch: int, device: Any) -> Any:
    begin = torch.as_tensor(offsets, dtype=torch.int64, device=device).reshape(-1)
    if len(begin) not in (1, batch):
        expected = f"an integer, or {batch} of them"
        raise ValueError(_message("seqlen_offsets have the wrong shape", len(begin), expected))
    return begin


def _message(what: str, got: object, expected: str) -> str:
    return message("umfa.shim.apply_rotary_emb", what, got, expected)
