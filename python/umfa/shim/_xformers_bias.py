"""``xformers.ops.fmha.attn_bias``: masks that are described in a few numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

import torch

from ._xformers_seqinfo import (
    _GappySeqInfo,
    _PaddedSeqLenInfo,
    _SeqLenInfo,
    moved,
    refuse,
)

__all__ = [
    "AttentionBias",
    "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionMask",
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask",
    "BlockDiagonalCausalMask",
    "BlockDiagonalCausalWithOffsetGappyKeysMask",
    "BlockDiagonalCausalWithOffsetPaddedKeysMask",
    "BlockDiagonalGappyKeysMask",
    "BlockDiagonalLocalAttentionPaddedKeysMask",
    "BlockDiagonalMask",
    "BlockDiagonalPaddedKeysMask",
    "LocalAttentionFromBottomRightMask",
    "LowerTriangularFromBottomRightLocalAttentionMask",
    "LowerTriangularFromBottomRightMask",
    "LowerTriangularMask",
    "LowerTriangularMaskWithTensorBias",
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask",
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask",
    "PagedBlockDiagonalGappyKeysMask",
    "PagedBlockDiagonalPaddedKeysMask",
    "_GappySeqInfo",
    "_PaddedSeqLenInfo",
    "_SeqLenInfo",
]


class Rule(NamedTuple):
    """A query sees the keys from `left` before its position to `right` behind it."""

    left: int | None = None
    right: int | None = None
    top_left: bool = False
    """Query ``i`` has the position ``i``; else the last query has that of the last key."""

    def visible(self, rows: int, columns: int, device: Any) -> Any:
        """bool (rows, columns)"""
        place = torch.arange(rows, device=device)[:, None]
        place = place if self.top_left else place + columns - rows
        key = torch.arange(columns, device=device)[None, :]
        seen = torch.ones(rows, columns, dtype=torch.bool, device=device)
        if self.left is not None:
            seen &= key >= place - self.left
        if self.right is not None:
            seen &= key <= place + self.right
        return seen


CAUSAL, CAUSAL_BOTTOM_RIGHT = Rule(right=0, top_left=True), Rule(right=0)


class AttentionBias:
    """Base of all of them. They take the place of a matrix that is added to the scores."""

    def rule(self) -> Rule:
        """Which keys a query sees, of its own block where there are blocks."""
        return Rule()

    def to(self, device: Any) -> Any:
        """The same one on `device`."""
        return moved(self, device) if is_dataclass(self) else self

    def _seen(self, rows: int, columns: int, device: Any) -> Any:
        return self.rule().visible(rows, columns, device)

    def materialize(
        self, shape: Sequence[int], dtype: Any = torch.float32, device: Any = "cpu"
    ) -> Any:
        """The matrix (..., queries, keys), of that shape: 0 where a query sees a key, else -inf."""
        seen = self._seen(shape[-2], shape[-1], device)
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -math.inf)
        return mask.expand(*shape[:-2], *mask.shape)


# ---- one block -----------------------------------------------------------------------------------


class LowerTriangularMask(AttentionBias):
    """Query ``i`` sees the keys ``j <= i``."""

    def __init__(self, device: Any = None) -> None:
        del device  # there is no tensor in it

    def rule(self) -> Rule:
        return CAUSAL

    def add_bias(self, bias: Any) -> LowerTriangularMaskWithTensorBias:
        """The same one, and `bias` (batch, heads, queries, keys) is added to the scores."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """See `LowerTriangularMask.add_bias`."""

    def __init__(self, bias: Any) -> None:
        super().__init__()
        self._bias = bias

    def to(self, device: Any) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(self._bias.to(device))

    def materialize(
        self, shape: Sequence[int], dtype: Any = torch.float32, device: Any = "cpu"
    ) -> Any:
        return super().materialize(shape, dtype, device) + self._bias


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causal, and the last query sees the last key."""

    def rule(self) -> Rule:
        return CAUSAL_BOTTOM_RIGHT

    def make_local_attention(
        self, window_size: int
    ) -> LowerTriangularFromBottomRightLocalAttentionMask:
        """Only the last `window_size` keys of them."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """See `LowerTriangularFromBottomRightMask.make_local_attention`."""

    _window_size: int

    def __post_init__(self) -> None:
        _check_window(self._window_size)

    def rule(self) -> Rule:
        return Rule(self._window_size - 1, 0)


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """From `window_left` keys before the query's position to `window_right` behind it."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        for name in ("window_left", "window_right"):
            if getattr(self, name) < 0:
                raise refuse(f"{name} is no length", getattr(self, name), "0 or above")

    def rule(self) -> Rule:
        return Rule(self.window_left, self.window_right)


def _check_window(window_size: int) -> None:
    if window_size <= 0:
        raise refuse("window_size is no length", window_size, "above 0")


# ---- blocks --------------------------------------------------------------------------------------


class _Blocks(AttentionBias):
    """Queries see keys of the block with their number only."""

    q_seqinfo: Any
    k_seqinfo: Any

    def blocks(self) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """(rows of the queries, rows of the keys) of each."""
        yield from zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True)

    def _seen(self, rows: int, columns: int, device: Any) -> Any:
        expected = self.q_seqinfo.seqstart_py[-1], self.k_seqinfo.seqstart_py[-1]
        if (rows, columns) != expected:
            raise refuse("the shape is not that of the blocks", (rows, columns), str(expected))
        seen = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        for (first, behind), (first_key, behind_key) in self.blocks():
            part = self.rule().visible(behind - first, behind_key - first_key, device)
            seen[first:behind, first_key:behind_key] = part
        return seen


def _check_counts(queries: Any, keys: Any) -> None:
    if len(queries) != len(keys):
        got = f"{len(queries)} and {len(keys)}"
        raise refuse("there are not as many sequences of queries as of keys", got, "as many")


@dataclass
class BlockDiagonalMask(_Blocks):
    """Sequences of different lengths, one after the other in one batch index."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(cls, q_seqlen: Any, kv_seqlen: Any = None, *, device: Any = None) -> Any:
        """Of lists of lengths; those of the keys are those of the queries if None."""
        queries = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        if kv_seqlen is None or kv_seqlen == q_seqlen:
            return cls(queries, queries)
        _check_counts(q_seqlen, kv_seqlen)
        return cls(queries, _SeqLenInfo.from_seqlens(kv_seqlen, device=device))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Any]) -> tuple[Any, Any]:
        """(mask, all rows): of tensors (batch, rows, ...), as one (1, all rows, ...)."""
        mask = cls.from_seqlens([x.shape[1] for x in tensors for _ in range(x.shape[0])])
        mask._batch_sizes = [x.shape[0] for x in tensors]
        return mask, _joined(tensors)

    @classmethod
    def from_tensor_lists_qkv(
        cls, tensors_q: Sequence[Any], tensors_k: Sequence[Any], tensors_v: Any = None
    ) -> tuple[Any, Any, Any, Any]:
        """(mask, queries, keys, values or None), each as in `from_tensor_list`."""
        lists = [x for x in (tensors_q, tensors_k, tensors_v) if x is not None]
        batches = [[x.shape[0] for x in tensors] for tensors in lists]
        rows = [[x.shape[1] for x in tensors] for tensors in lists]
        if batches != [batches[0]] * len(lists) or rows[1:] != [rows[1]] * (len(lists) - 1):
            shapes = [[tuple(x.shape) for x in tensors] for tensors in lists]
            raise refuse("the lists do not fit", shapes, "equal batches, keys as many as values")
        seqlens = [
            [n for n, b in zip(column, batches[0], strict=True) for _ in range(b)]
            for column in rows[:2]
        ]
        mask = cls.from_seqlens(*seqlens)
        mask._batch_sizes = batches[0]
        values = None if tensors_v is None else _joined(tensors_v)
        return mask, _joined(tensors_q), _joined(tensors_k), values

    def split_queries(self, tensor: Any) -> list[Any]:
        """The sequences of a tensor (1, rows of all queries, ...)."""
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor: Any) -> list[Any]:
        """The sequences of a tensor (1, rows of all keys, ...)."""
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def split(self, tensor: Any) -> list[Any]:
        """The inverse of `from_tensor_list`."""
        if self.q_seqinfo is not self.k_seqinfo:
            what, got = "queries and keys have lengths of their own", tuple(tensor.shape)
            raise refuse(what, got, "split_queries or split_kv")
        return self.split_queries(tensor)

    def _as(self, kind: Any, *more: Any) -> Any:
        return kind(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, *more)

    def make_causal(self) -> Any:
        """Each block is causal, from its top left on."""
        return self._as(BlockDiagonalCausalMask)

    def make_causal_from_bottomright(self) -> Any:
        """Each block is causal, from its bottom right on."""
        return self._as(BlockDiagonalCausalFromBottomRightMask)

    def make_local_attention(self, window_size: int) -> Any:
        """`make_causal`, and only the last `window_size` keys."""
        return self._as(BlockDiagonalCausalLocalAttentionMask, window_size)

    def make_local_attention_from_bottomright(self, window_size: int) -> Any:
        """`make_causal_from_bottomright`, and only the last `window_size` keys."""
        return self._as(BlockDiagonalCausalLocalAttentionFromBottomRightMask, window_size)


def _joined(tensors: Sequence[Any]) -> Any:
    return torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], 1)


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """See `BlockDiagonalMask.make_causal`."""

    def rule(self) -> Rule:
        return CAUSAL


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """See `BlockDiagonalMask.make_causal_from_bottomright`. No block has more queries than keys."""

    def __post_init__(self) -> None:
        for i, ((first, behind), (first_key, behind_key)) in enumerate(self.blocks()):
            if behind - first > behind_key - first_key:
                got = f"{behind - first} queries, {behind_key - first_key} keys"
                raise refuse(f"block {i} has more queries than keys", got, "as many keys or more")

    def rule(self) -> Rule:
        return CAUSAL_BOTTOM_RIGHT


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """See `BlockDiagonalMask.make_local_attention`."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _check_window(self._window_size)

    def rule(self) -> Rule:
        return Rule(self._window_size - 1, 0, top_left=True)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """See `BlockDiagonalMask.make_local_attention_from_bottomright`."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_window(self._window_size)

    def rule(self) -> Rule:
        return Rule(self._window_size - 1, 0)


# ---- keys with padding ---------------------------------------------------------------------------


@dataclass
class BlockDiagonalPaddedKeysMask(_Blocks):
    """Blocks whose keys begin a fixed number of rows apart."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Any,
        kv_padding: int,
        kv_seqlen: Any,
        causal_diagonal: Any = None,
        *,
        device: Any = None,
    ) -> Any:
        """Of lists of lengths; `causal_diagonal` is a leftover of xformers'."""
        del causal_diagonal
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, device))

    def make_paged(self, block_tables: Any, page_size: int, paged_type: Any) -> Any:
        """The same sequences, with their keys in pages."""
        keys, padding = self.k_seqinfo, block_tables.shape[1] * page_size
        paged = _PaddedSeqLenInfo(
            keys.seqstart, keys.max_seqlen, keys.min_seqlen, keys.seqstart_py, keys.seqlen,
            keys.seqlen_py, padding,
        )  # fmt: skip
        return paged_type(self.q_seqinfo, paged, block_tables, page_size)

    def make_local_attention(self, window_left: int, window_right: int) -> Any:
        """With a window that is aligned at the bottom right of each block."""
        kind = BlockDiagonalLocalAttentionPaddedKeysMask
        return kind(self.q_seqinfo, self.k_seqinfo, window_left, window_right)


def _padded(q_seqlen: Any, padding: int, kv_seqlen: Any, device: Any) -> tuple[Any, Any]:
    _check_counts(q_seqlen, kv_seqlen)
    keys = _PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, padding, device=device)
    return _SeqLenInfo.from_seqlens(q_seqlen, device=device), keys


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Causal, and the last query of a block sees the last of its keys in use."""

    causal_diagonal: Any = None

    def rule(self) -> Rule:
        return CAUSAL_BOTTOM_RIGHT


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """See `BlockDiagonalPaddedKeysMask.make_local_attention`."""

    window_left: int
    window_right: int

    def rule(self) -> Rule:
        return Rule(self.window_left, self.window_right)

    @classmethod
    def from_seqlens_local(
        cls, q_seqlen: Any, kv_padding: int, kv_seqlen: Any, window_left: int, window_right: int
    ) -> Any:
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, None), window_left, window_right)


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Causal as `BlockDiagonalCausalWithOffsetPaddedKeysMask`; only the last keys."""

    _window_size: int

    def __post_init__(self) -> None:
        _check_window(self._window_size)

    def rule(self) -> Rule:
        return Rule(self._window_size - 1, 0)

    @classmethod
    def from_seqlens_local(
        cls, q_seqlen: Any, kv_padding: int, kv_seqlen: Any, window_size: int
    ) -> Any:
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, None), window_size)


# ---- keys with gaps ------------------------------------------------------------------------------


@dataclass
class BlockDiagonalGappyKeysMask(_Blocks):
    """Blocks whose keys are anywhere. They may overlap."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _GappySeqInfo

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Any, kv_seqstarts: Any, kv_seqlen: Any, *, device: Any = None
    ) -> Any:
        """Of lists; the last of `kv_seqstarts` is the number of all keys."""
        _check_counts(q_seqlen, kv_seqlen)
        make = _GappySeqInfo.from_seqlens_gappy
        keys = make(kv_seqstarts, kv_seqlen, False, device=device)
        return cls(_SeqLenInfo.from_seqlens(q_seqlen, device=device), keys)

    def make_paged(
        self, block_tables: Any, page_size: int, notional_padding: int, paged_type: Any
    ) -> Any:
        """The same sequences with their keys in pages: sequence ``b`` begins at row
        ``b * notional_padding`` here, and at the first row of its pages there."""
        rows = block_tables.shape[1] * page_size
        found = self.k_seqinfo.seqstart_py[:-1]
        starts = [x - i * notional_padding for i, x in enumerate(found)]
        if notional_padding % page_size or not all(0 <= x < rows for x in starts):
            got = f"notional_padding={notional_padding}, page_size={page_size}, starts {starts}"
            raise refuse("the sequences do not fit pages", got, f"whole pages, starts below {rows}")
        lengths, device = self.k_seqinfo.seqlen_py, block_tables.device
        keys = _GappySeqInfo.from_seqlens_gappy(starts, lengths, True, device=device)
        return paged_type(self.q_seqinfo, keys, block_tables, page_size)


@dataclass
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """Causal, and the last query of a block sees the last of its keys."""

    def rule(self) -> Rule:
        return CAUSAL_BOTTOM_RIGHT


# ---- keys in pages -------------------------------------------------------------------------------


class _Pages(AttentionBias):
    """Keys in pages of `page_size` rows: page ``block_tables[b, j // page_size]`` holds key ``j``
    of sequence ``b``."""

    q_seqinfo: Any
    k_seqinfo: Any
    block_tables: Any
    page_size: int

    def key_rows(self) -> Iterator[tuple[int, int]]:
        """(first, behind the last) of each sequence's keys among the rows of its own pages."""
        raise NotImplementedError

    def _seen(self, rows: int, columns: int, device: Any) -> Any:
        """Of keys as they lie in memory, up to the last page in use."""
        tables = self.block_tables.to(device)
        expected = self.q_seqinfo.seqstart_py[-1], tables.numel() * self.page_size
        if (rows, columns) != expected:
            raise refuse("the shape is not that of the pages", (rows, columns), str(expected))
        there = (int(tables.max()) + 1) * self.page_size
        seen = torch.zeros(rows, there, dtype=torch.bool, device=device)
        intervals = zip(self.q_seqinfo.intervals(), self.key_rows(), tables, strict=True)
        for (first, behind), (first_key, behind_key), table in intervals:
            key = torch.arange(first_key, behind_key, device=device)
            place = table.long()[key // self.page_size] * self.page_size + key % self.page_size
            part = self.rule().visible(behind - first, len(key), device)
            seen[first:behind].index_copy_(1, place, part)
        return seen


@dataclass
class PagedBlockDiagonalPaddedKeysMask(_Pages):
    """Each sequence has the first ``seqlen`` rows of its pages."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo
    block_tables: Any
    page_size: int

    def key_rows(self) -> Iterator[tuple[int, int]]:
        yield from ((0, length) for length in self.k_seqinfo.seqlen_py)

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Any,
        kv_seqlen: Any,
        block_tables: Any,
        page_size: int,
        *,
        device: Any = None,
    ) -> Any:
        """Of lists of lengths, and the pages of each sequence (sequences, pages)."""
        padding = block_tables.shape[1] * page_size
        return cls(*_padded(q_seqlen, padding, kv_seqlen, device), block_tables, page_size)


@dataclass
class PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    """Causal, and the last query of a sequence sees its last key."""

    def rule(self) -> Rule:
        return CAUSAL_BOTTOM_RIGHT


@dataclass
class PagedBlockDiagonalGappyKeysMask(_Pages):
    """Each sequence has the rows from ``seqstart`` to before ``seqlen`` of its pages."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _GappySeqInfo
    block_tables: Any
    page_size: int

    def key_rows(self) -> Iterator[tuple[int, int]]:
        yield from zip(self.k_seqinfo.seqstart_py, self.k_seqinfo.seqlen_py, strict=False)

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Any,
        kv_seqstarts: Any,
        kv_seqlen: Any,
        block_tables: Any,
        page_size: int,
        *,
        device: Any = None,
    ) -> Any:
        """Of lists: `kv_seqstarts` are rows of each sequence's own pages."""
        _check_counts(q_seqlen, kv_seqlen)
        make = _GappySeqInfo.from_seqlens_gappy
        keys = make(kv_seqstarts, kv_seqlen, True, device=device)
        queries = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        return cls(queries, keys, block_tables, page_size)


@dataclass
class PagedBlockDiagonalCausalWithOffsetGappyKeysMask(PagedBlockDiagonalGappyKeysMask):
    """Causal, and the last query of a sequence sees its last key."""

    def rule(self) -> Rule:
        return CAUSAL_BOTTOM_RIGHT
