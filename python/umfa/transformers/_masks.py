"""transformers' masks as descriptions.

transformers describes a mask by a function of two positions, which is built from a few parts. Each
attention implementation converts it to the form that it needs. A matrix of bool for 64k tokens is
4 GiB.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import masking_utils

from .._errors import UnsupportedError, message


class Pattern(NamedTuple):
    """Query position p sees key position k if ``p - left <= k <= p + right``, and both lie in the
    same chunk and the same sequence. None: no such limit."""

    left: int | None = None
    right: int | None = None
    chunk: int | None = None
    chunk_padding: Any = None
    """(batch,) Positions before the first chunk."""
    sequences: Any = None
    """(batch, seqlen) Equal numbers belong to the same sequence."""


class Mask(torch.Tensor):
    """A mask of shape (batch, 1, seqlen_q, seqlen_kv) without elements: models hand it on, and only
    umfa's attention reads it."""

    pattern: Pattern
    padding: Any
    """(batch, seqlen_kv) bool: the keys that are there. None: all."""
    q_offset: int
    kv_offset: int
    """Positions of the first query and the first key."""
    written: Callable[[], Any]
    """Writes it out, as a tensor of bool."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], device: Any) -> Mask:
        make: Any = torch.Tensor._make_wrapper_subclass
        mask: Mask = make(cls, shape, dtype=torch.bool, device=device)
        return mask

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"umfa's mask of shape {tuple(self.shape)}: {self.pattern}"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise UnsupportedError(
            message(
                "umfa.transformers",
                "this model computes with its mask, which umfa keeps as a description",
                str(function),
                'a model that hands it on, or attn_implementation="sdpa"',
            )
        )


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Any = None,
    device: Any = "cpu",
    **others: Any,
) -> Any:
    """What transformers asks for: a `Mask`; None if an encoder masks nothing; or, for an unknown
    pattern and in graphs that are compiled, the matrix of bool."""
    may_skip = others.get("allow_is_bidirectional_skip", False)
    others.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    written = partial(
        masking_utils.sdpa_mask, batch_size=batch_size, q_length=q_length, kv_length=kv_length,
        q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function,
        attention_mask=attention_mask, device=device, **others,
    )  # fmt: skip
    pattern = decoded(mask_function)
    compiler: Any = torch.compiler
    if pattern is None or compiler.is_compiling():
        return written()
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
        if bool(padding.all()):
            padding = None
    if may_skip and padding is None and pattern == Pattern():
        return None  # some encoders compute with their masks, if there are any
    made = Mask((batch_size, 1, q_length, kv_length), device)
    made.pattern, made.padding, made.written = pattern, padding, written
    made.q_offset, made.kv_offset = int(q_offset), kv_offset
    return made


def decoded(function: Any) -> Pattern | None:
    """The pattern of a mask function of transformers'; None if it has a part that is not known."""
    if function is masking_utils.causal_mask_function:
        return Pattern(right=0)
    if function is masking_utils.bidirectional_mask_function:
        return Pattern()
    name = getattr(function, "__qualname__", "").removesuffix(".<locals>.inner_mask")
    if getattr(function, "__module__", "") != masking_utils.__name__:
        return None
    held = _held(function)
    if name == "and_masks.<locals>.and_mask":
        return _both([decoded(part) for part in held["mask_functions"]])
    if name == "sliding_window_overlay":
        return Pattern(left=held["sliding_window"] - 1)
    if name == "sliding_window_bidirectional_overlay":
        return Pattern(left=held["sliding_window"], right=held["sliding_window"])
    if name == "chunked_overlay":
        return Pattern(chunk=held["chunk_size"], chunk_padding=held["left_padding"])
    if name == "packed_sequence_mask_function":
        return Pattern(sequences=held["packed_sequence_mask"])
    if name == "remap_positions_for_packed_sequence":
        # Within a sequence positions are consecutive, so that their differences are those of rows.
        return decoded(held["mask_function"])
    return None


def _held(function: Any) -> dict[str, Any]:
    """The variables of the function that made this one."""
    cells = function.__closure__ or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True)
    }


def _both(parts: list[Pattern | None]) -> Pattern | None:
    """What all of them allow."""
    whole = Pattern()
    for part in parts:
        if part is None:
            return None
        left, right = _less(whole.left, part.left), _less(whole.right, part.right)
        if (whole.chunk is not None and part.chunk is not None) or (
            whole.sequences is not None and part.sequences is not None
        ):
            return None
        chunked = part if part.chunk is not None else whole
        packed = part if part.sequences is not None else whole
        whole = Pattern(left, right, chunked.chunk, chunked.chunk_padding, packed.sequences)
    return whole


def _less(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)
