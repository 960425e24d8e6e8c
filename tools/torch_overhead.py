"""What one call of torch's attention costs with umfa's kernels in torch's dispatcher.

python tools/torch_overhead.py [BURSTS]

Prints microseconds for a tiny call (4 queries of 8 elements), in one process, for torch before
`umfa.torch.enable`, enabled and disabled in turns, and after `umfa.torch.uninstall`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import quantiles

import torch
from torch.nn.functional import scaled_dot_product_attention

import umfa.torch

CALLS = 100


def burst() -> float:
    """Microseconds per call."""
    q = torch.zeros(1, 1, 4, 8)
    started = time.perf_counter()
    for _ in range(CALLS):
        scaled_dot_product_attention(q, q, q)
    return (time.perf_counter() - started) / CALLS * 1e6


def measure(bursts: int, *states: Callable[[], None]) -> list[float]:
    """The 5th percentile in each state, entered in turns: other programs only add time."""
    found: list[list[float]] = [[] for _ in states]
    for _ in range(bursts):
        for times, enter in zip(found, states, strict=True):
            enter()
            times.append(burst())
    return [quantiles(times, n=20)[0] for times in found]


def main(bursts: int) -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        (never,) = measure(bursts, lambda: None)
        enabled, disabled = measure(bursts, umfa.torch.enable, umfa.torch.disable)
        umfa.torch.uninstall()
        (uninstalled,) = measure(bursts, lambda: None)
    print(f"never enabled {never:.1f}, enabled {enabled:.1f}, disabled {disabled:.1f}, ", end="")
    print(f"uninstalled {uninstalled:.1f} us")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
