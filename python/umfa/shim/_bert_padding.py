"""``flash_attn.bert_padding``: rows of a batch without their padding, and back, in torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from .._errors import message

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(x: Any, indices: Any) -> Any:
    """The rows `indices` (n,) of `x` (rows, ...). Differentiable."""
    return x.index_select(0, indices)


def index_first_axis_residual(x: Any, indices: Any) -> tuple[Any, Any]:
    """`index_first_axis`, and `x`, whose gradients add up."""
    return index_first_axis(x, indices), x


def index_put_first_axis(values: Any, indices: Any, first_axis_dim: int) -> Any:
    """`first_axis_dim` rows: those at `indices` (n,) are `values` (n, ...), the others 0.
    Differentiable."""
    rows = values.new_zeros(first_axis_dim, *values.shape[1:])
    return rows.index_copy(0, indices, values)


def unpad_input(
    hidden_states: Any, attention_mask: Any, unused_mask: Any = None
) -> tuple[Any, Any, Any, int, Any]:
    """The rows that count, one sequence after the other.

    Parameters
    ----------
    hidden_states : tensor, shape (batch, seqlen, ...)
    attention_mask : tensor, shape (batch, seqlen)
        bool or integers: 1 where a row counts.
    unused_mask : tensor, shape (batch, seqlen), optional
        1 where a row is kept although it does not count.

    Returns
    -------
    rows : tensor, shape (total, ...)
    indices : int64 tensor, shape (total,)
        Where the rows were among all ``batch * seqlen``.
    cu_seqlens : int32 tensor, shape (batch + 1,)
        Where each sequence begins among the rows.
    max_seqlen : int
    seqused : int32 tensor, shape (batch,)
        How many rows of each sequence count.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    _check(hidden_states, kept, "attention_mask")
    lengths = kept.sum(-1, dtype=torch.int32)
    rows, indices = _rows(hidden_states, kept)
    longest = int(lengths.max()) if len(lengths) else 0
    return rows, indices, _offsets(lengths), longest, attention_mask.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Any, attention_mask_in_length: Any
) -> tuple[Any, Any, Any, int]:
    """`unpad_input` of rows that hold several sequences each.

    Parameters
    ----------
    hidden_states : tensor, shape (batch, seqlen, ...)
    attention_mask_in_length : integer tensor, shape (batch, seqlen)
        The lengths of the sequences in each row, in order; 0 elsewhere.

    Returns
    -------
    rows, indices, cu_seqlens, max_seqlen
    """
    _check(hidden_states, attention_mask_in_length, "attention_mask_in_length")
    lengths = attention_mask_in_length[attention_mask_in_length != 0].to(torch.int32)
    filled = attention_mask_in_length.sum(-1, keepdim=True)
    positions = torch.arange(hidden_states.shape[1], device=filled.device)
    rows, indices = _rows(hidden_states, positions < filled)
    return rows, indices, _offsets(lengths), int(lengths.max()) if len(lengths) else 0


def pad_input(hidden_states: Any, indices: Any, batch: int, seqlen: int) -> Any:
    """The inverse of `unpad_input`: (total, ...) to (batch, seqlen, ...), 0 in padded rows."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(
        0, (batch, seqlen)
    )


def _check(hidden_states: Any, mask: Any, name: str) -> None:
    rows = tuple(hidden_states.shape[:2])
    if tuple(mask.shape) != rows:
        what = f"{name} has the wrong shape"
        expected = f"{rows}, (batch, seqlen) of hidden_states"
        raise ValueError(message("umfa.shim.unpad_input", what, tuple(mask.shape), expected))


def _rows(hidden_states: Any, kept: Any) -> tuple[Any, Any]:
    indices = kept.flatten().nonzero().flatten()
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices


def _offsets(lengths: Any) -> Any:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
