"""How xformers' block-diagonal masks describe sequences: where each begins, and how long it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .._errors import message
from .._ext import integer


def moved(described: Any, device: Any) -> Any:
    """A copy of a dataclass, with the tensors in it on `device`."""
    values = {x.name: getattr(described, x.name) for x in fields(described)}
    return replace(described, **{x: y.to(device) for x, y in values.items() if hasattr(y, "to")})


def refuse(what: str, got: object, expected: str) -> ValueError:
    return ValueError(message("umfa.shim.xformers", what, got, expected))


def lengths_of(name: str, seqlens: Any) -> list[int]:
    if isinstance(seqlens, torch.Tensor):
        raise refuse(f"{name} are a tensor", tuple(seqlens.shape), "a list of integers")
    found = [integer("umfa.shim.xformers", name, x, "integers") for x in seqlens]
    if any(x < 0 for x in found):
        raise refuse(f"{name} are no lengths", found, "0 and above")
    return found


def _table(values: Sequence[int], device: Any) -> Any:
    return torch.tensor(values, dtype=torch.int32, device="cpu" if device is None else device)


@dataclass
class _SeqLenInfo:
    """Sequences one after the other.

    ``seqstart`` (sequences + 1,) int32 says where each begins, and ``seqstart_py`` is the same as a
    list. umfa reads the tensors, which a program may change between calls.
    """

    seqstart: Any
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    def to(self, device: Any) -> Any:
        return moved(self, device)

    def intervals(self) -> Iterator[tuple[int, int]]:
        """(first row, first row behind) of each sequence."""
        yield from zip(self.seqstart_py, self.seqstart_py[1:], strict=False)

    @classmethod
    def from_seqlens(cls, seqlens: Any, *, device: Any = None) -> _SeqLenInfo:
        found = lengths_of("seqlens", seqlens)
        starts = [sum(found[:i]) for i in range(len(found) + 1)]
        return cls(_table(starts, device), max(found, default=-1), min(found, default=-1), starts)

    def split(self, x: Any, batch_sizes: Sequence[int] | None = None) -> list[Any]:
        """The sequences of `x` (1, rows, ...), as many in each part as `batch_sizes` says."""
        if x.shape[0] != 1 or x.shape[1] != self.seqstart_py[-1]:
            expected = f"(1, {self.seqstart_py[-1]}, ...)"
            raise refuse("the tensor to split has the wrong shape", tuple(x.shape), expected)
        parts, first = [], 0
        for count in batch_sizes or [1] * (len(self.seqstart_py) - 1):
            rows = slice(self.seqstart_py[first], self.seqstart_py[first + count])
            parts.append(x[:, rows].reshape(count, -1, *x.shape[2:]))
            first += count
        return parts


@dataclass
class _PaddedSeqLenInfo(_SeqLenInfo):
    """Sequences of ``seqlen`` rows each, which begin ``padding`` rows apart."""

    seqlen: Any
    seqlen_py: Sequence[int]
    padding: int

    def intervals(self) -> Iterator[tuple[int, int]]:
        for start, length in zip(self.seqstart_py, self.seqlen_py, strict=False):
            yield start, start + length

    @classmethod
    def from_seqlens(cls, seqlens: Any, *, device: Any = None) -> _SeqLenInfo:
        raise refuse("padding is missing", "from_seqlens", "from_seqlens_padded")

    @classmethod
    def from_seqlens_padded(
        cls, seqlens: Any, padding: int, *, device: Any = None
    ) -> _PaddedSeqLenInfo:
        found = lengths_of("seqlens", seqlens)
        if any(x > padding for x in found):
            raise refuse("a sequence is longer than padding", found, f"at most {padding}")
        starts = [padding * i for i in range(len(found) + 1)]
        return cls(
            _table(starts, device), max(found, default=-1), min(found, default=-1), starts,
            _table(found, device), found, padding,
        )  # fmt: skip

    def split(self, x: Any, batch_sizes: Sequence[int] | None = None) -> list[Any]:
        raise refuse("padded sequences cannot be split", tuple(x.shape), "sequences in a row")


@dataclass
class _GappySeqInfo(_SeqLenInfo):
    """Sequences anywhere: sequence ``b`` has ``seqlen[b]`` rows from ``seqstart[b]`` on. In a paged
    mask, its rows are those from ``seqstart[b]`` to before ``seqlen[b]`` of its own pages."""

    seqlen: Any
    seqlen_py: Sequence[int]

    def intervals(self) -> Iterator[tuple[int, int]]:
        for start, length in zip(self.seqstart_py, self.seqlen_py, strict=False):
            yield start, start + length

    @classmethod
    def from_seqlens(cls, seqlens: Any, *, device: Any = None) -> _SeqLenInfo:
        raise refuse("starts are missing", "from_seqlens", "from_seqlens_gappy")

    @classmethod
    def from_seqlens_gappy(
        cls, seqstarts: Any, seqlens: Any, paged: bool, *, device: Any = None
    ) -> _GappySeqInfo:
        starts, found = lengths_of("seqstarts", seqstarts), lengths_of("seqlens", seqlens)
        if not found or len(starts) != len(found) + (not paged):
            got = f"{len(starts)} starts, {len(found)} lengths"
            expected = "as many" if paged else "one start more, the number of all rows"
            raise refuse("starts and lengths do not fit", got, expected)
        longest, shortest = max(found), min(found)
        if paged:
            found = [x + y for x, y in zip(starts, found, strict=True)]
            starts.append(-1)
        return cls(_table(starts, device), longest, shortest, starts, _table(found, device), found)

    def split(self, x: Any, batch_sizes: Sequence[int] | None = None) -> list[Any]:
        raise refuse("sequences with gaps cannot be split", tuple(x.shape), "sequences in a row")
