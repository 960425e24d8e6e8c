"""What kernels found wrong with tables that lie on torch's MPS device.

The host does not read such a table: a kernel clamps its numbers, and notes the first that was out
of range in a place of the call's own. These places are read when the host waits for the GPU anyway.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from .. import _ext
from .._errors import OutOfRangeError, message

PLACES = 4096
"""Calls that may be on their way; half as many make umfa look, which waits."""

_FORMAT = "<qqqiiii"  # TableFault of shaders/shared/params.h
BYTES = struct.calcsize(_FORMAT)
_WORDS = BYTES // 8
_FIELDS = tuple(_ext.table_fields())


class _Call(NamedTuple):
    place: int
    function: str
    names: Mapping[str, str]  # of its tables, as the caller calls them, by field


class _Device:
    """The places of one device, which are taken in a ring."""

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # or nothing outside of it could clear the memory
            self.memory = _zeros(PLACES * _WORDS, device)
        self.next = 0
        self.calls: list[_Call] = []  # queued, and not known to be right


_lock = threading.Lock()
_devices: dict[str, _Device] = {}


def _zeros(size: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int64, device=device)


def take(device: torch.device) -> tuple[Any, int]:
    """A call's own place: the memory as a tensor, and the byte at which it starts."""
    with _lock:
        own = _devices.get(str(device))
        if own is None:
            own = _devices[str(device)] = _Device(device)
        place = own.next
        own.next = (place + 1) % PLACES
    return own.memory, place * BYTES


def queued(device: torch.device, offset: int, function: str, names: Mapping[str, str]) -> bool:
    """Notes that the call of a place is in the stream. Returns whether so many are that it is time
    to look."""
    with _lock:
        calls = _devices[str(device)].calls
        calls.append(_Call(offset // BYTES, function, names))
        return len(calls) >= PLACES // 2


def check() -> None:
    """Raises if a table of a call that the GPU has run was out of range.

    Waits for the GPU if there are such calls.

    Raises
    ------
    ValueError
        What the first of these calls got. Its results are those of the clamped numbers.
    """
    faulty: list[str] = []
    with _lock:
        for device in _devices.values():
            if not device.calls:
                continue
            data = device.memory.cpu().numpy().tobytes()
            calls, device.calls = device.calls, []
            if data.count(0) == len(data):
                continue
            device.memory.zero_()
            for call in calls:
                found = struct.unpack_from(_FORMAT, data, call.place * BYTES)
                if found[3] != 0:
                    faulty.append(_text(call, found))
    if faulty:
        others = f" (and {len(faulty) - 1} later calls had others)" if len(faulty) > 1 else ""
        raise OutOfRangeError(faulty[0] + others)


def _text(call: _Call, found: tuple[int, ...]) -> str:
    got, low, high, table, row, column, _ = found
    if table > len(_FIELDS):
        what, expected = (
            ("has more keys than max_seqlen_k allows", f"at most {high}"),
            ("has positions behind the last rotary angle", f"at most {high} for the first"),
            (
                "would write rows that a sequence before it, or it itself, writes",
                "a place for each new row",
            ),
        )[table - len(_FIELDS) - 1]
        return message(call.function, f"sequence {row} {what}, as the GPU found", got, expected)
    field = _FIELDS[table - 1]
    entry = f"{call.names[field]}[{row}]" + (f"[{column}]" if field == "block_table" else "")
    return message(
        call.function,
        f"{entry} was out of range when the GPU ran the call",
        got,
        f"{low} to {high}",
    )
