"""What one call of torch's attention costs with umfa's kernels in torch's dispatcher.

python tools/torch_overhead.py [TURNS]

Prints microseconds for a tiny call (4 queries of 8 elements), in one process, for torch before
`umfa.torch.enable`, enabled and disabled in turns, and after `umfa.torch.uninstall`. The floor is
what umfa disabled costs at least: torch's own kernels, called by Python in the places of umfa's.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import umfa.torch

CALLS, BURSTS = 20, 20  # few calls: a burst is done before the system lets another program run
PLACES = (
    ("scaled_dot_product_attention", "BackendSelect"),
    ("_scaled_dot_product_flash_attention_for_cpu", "CPU"),
)
"""Operations and dispatch keys of umfa's that such a call meets."""


def fastest() -> float:
    """Microseconds per call, of the fastest burst."""
    q = torch.zeros(1, 1, 4, 8)
    least = math.inf
    for _ in range(BURSTS):
        started = time.perf_counter()
        for _ in range(CALLS):
            scaled_dot_product_attention(q, q, q)
        least = min(least, time.perf_counter() - started)
    return least / CALLS * 1e6


def measure(turns: int, *states: Callable[[], None]) -> list[float]:
    """The least in each state, entered in turns: other programs only add time."""
    found: list[list[float]] = [[] for _ in states]
    for _ in range(turns):
        for times, enter in zip(found, states, strict=True):
            enter()
            times.append(fastest())
    return [min(times) for times in found]


class Floor:
    """torch's own kernels in the places of umfa's, called from Python."""

    library: Any = None

    def enter(self) -> None:
        umfa.torch.disable()
        umfa.torch.uninstall()
        make_library: Any = torch.library.Library  # its methods carry no annotations
        self.library = make_library("aten", "IMPL")
        with warnings.catch_warnings():  # torch warns that its kernel is replaced
            warnings.simplefilter("ignore")
            for name, key in PLACES:
                kernel = torch.library.get_kernel(f"aten::{name}", "CPU").call_boxed
                self.library.impl(name, kernel, key, with_keyset=True, allow_override=True)

    def leave(self) -> None:
        if self.library is not None:
            self.library._destroy()
            self.library = None


def main(turns: int) -> None:
    torch.set_num_threads(1)
    floor = Floor()

    def enabled() -> None:
        floor.leave()
        umfa.torch.enable()

    with torch.inference_mode():
        (never,) = measure(turns, lambda: None)
        on, off, least = measure(turns, enabled, umfa.torch.disable, floor.enter)
        floor.leave()
        (uninstalled,) = measure(turns, lambda: None)
    print(f"never enabled {never:.1f}, enabled {on:.1f}, disabled {off:.1f} ", end="")
    print(f"(floor {least:.1f}), uninstalled {uninstalled:.1f} us")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
