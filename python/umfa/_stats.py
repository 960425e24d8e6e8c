"""Counters: calls that umfa ran, and calls of other libraries that it computed or left to them."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, NamedTuple

from . import _ext

_lock = threading.Lock()
_taken: Counter[str] = Counter()
_left: Counter[tuple[str, str]] = Counter()
_waits: Counter[str] = Counter()
_plans = {"stream": 0, "graph": 0}

MOST_REASONS = 200
"""Reasons contain shapes, so a long run could collect any number of them."""


class Left(NamedTuple):
    """Calls that an integration left to the library's own attention; see `Stats.left`."""

    where: str
    """The function that was called, as ``torch.scaled_dot_product_attention``."""
    reason: str
    """Why umfa did not compute it."""
    calls: int


class Stats(NamedTuple):
    """What umfa has done in this process so far; see `stats`."""

    cpu_calls: int
    """Calls that the CPU backend ran."""
    metal_calls: int
    """Calls that the Metal backend ran, or recorded in a caller's command buffer."""
    calls_while_compiling: int
    """Of the calls on the CPU, those that ran there because Metal compiled their kernels."""
    tensors_in_place: int
    """Tensors that Metal calls read or wrote where they are."""
    tensors_copied: int
    """Tensors that Metal could not map and that umfa copied for the GPU."""
    bytes_copied: int
    """The size of those copies."""
    pipelines: int
    """Kernels made ready for the GPU: each once for each combination of options."""
    pipelines_from_text: int
    """Of them, those whose Metal text was compiled in this process."""
    pipelines_from_archive: int
    """Of them, those that an earlier process had compiled, read from the user's cache folder."""
    command_buffers: int
    """Command buffers that umfa committed."""
    queues_replaced: int
    """Command queues that umfa replaced after the GPU had failed."""
    gpu_seconds: float
    """Time that the GPU spent on umfa's command buffers, by its own clock."""
    plans_in_stream: int
    """Of the work of Metal calls, the parts that went into torch's own MPS stream: the host did not
    wait for them. Most calls are one part."""
    plans_in_graph: int
    """Of the same, the parts that became operations of MLX's graph, which runs them when it is
    evaluated."""
    waits: dict[str, int]
    """How often a call on MPS tensors or on arrays of MLX's GPU made the host wait for the GPU, by
    reason."""
    taken: dict[str, int]
    """Calls of other libraries' functions that umfa computed, by function; see
    `umfa.torch.enable`."""
    left: tuple[Left, ...]
    """Calls of such functions that umfa did not compute, and why."""

    def __str__(self) -> str:
        lines = [f"{self.cpu_calls} calls on the CPU, {self.metal_calls} on an Apple GPU"]
        lines += [f"  {calls:>8}  {where}: computed by umfa" for where, calls in self.taken.items()]
        lines += [f"  {x.calls:>8}  {x.where}: not by umfa. {x.reason}" for x in self.left]
        if self.plans_in_stream:
            lines.append(f"  {self.plans_in_stream:>8}  in torch's MPS stream, without a wait")
        if self.plans_in_graph:
            lines.append(f"  {self.plans_in_graph:>8}  in MLX's graph, without a wait")
        lines += [f"  {calls:>8}  waits for the GPU: {why}" for why, calls in self.waits.items()]
        if self.metal_calls:
            lines.append(
                f"GPU: {self.gpu_seconds:.3f} s in {self.command_buffers} command buffers; "
                f"{self.pipelines} kernels made ready, {self.pipelines_from_text} from text; "
                f"{self.tensors_copied} tensors ({self.bytes_copied} bytes) copied"
            )
        return "\n".join(lines)


def stats() -> Stats:
    """Counters since umfa was loaded. They only grow: subtract two readings to measure one call.

    ``print(umfa.stats())`` lists them in words.

    >>> before = umfa.stats()
    >>> out = umfa.flash_attn_func(q, k, v)
    >>> umfa.stats().tensors_copied - before.tensors_copied
    0
    """
    with _lock:
        taken = dict(_taken.most_common())
        left = tuple(Left(*key, calls) for key, calls in _left.most_common())
        waits, plans = dict(_waits.most_common()), dict(_plans)
    return Stats(
        **_ext.stats(),
        plans_in_stream=plans["stream"],
        plans_in_graph=plans["graph"],
        waits=waits,
        taken=taken,
        left=left,
    )


def count_in_stream() -> None:
    """Counts a plan that went into torch's stream."""
    with _lock:
        _plans["stream"] += 1


def count_in_graph() -> None:
    """Counts a plan that went into MLX's graph."""
    with _lock:
        _plans["graph"] += 1


def count_wait(reason: str) -> None:
    """Counts a wait for the GPU; of reasons there are few."""
    with _lock:
        _waits[reason] += 1


def count_taken(where: str) -> None:
    """Counts a call of another library's function that umfa computed."""
    with _lock:
        _taken[where] += 1


def count_left(where: str, reason: str) -> None:
    """Counts one that umfa did not compute."""
    with _lock:
        key = where, reason
        if key not in _left and len(_left) >= MOST_REASONS:
            key = where, "further reasons"
        _left[key] += 1


# torch.compile cannot trace a lock. It calls functions with this attribute itself, once for each
# tracing. That needs no torch.
_counters: Any = (count_taken, count_left)
for _counter in _counters:
    _counter._dynamo_marked_constant = True
